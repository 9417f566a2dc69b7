"""History of inputs: against ridge regression's closed form, the formula by hand, and SGD."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from avalanche_classp import CLASSPOptimizer, carry_accumulators
from avalanche_classp.optim.accumulators import diagonal, exact_inputs, inputs
from avalanche_classp.optim.watch import find_layers, rows_of

parametrize = pytest.mark.parametrize
BATCH = 8


@pytest.fixture
def every_step(monkeypatch):
    """Renew the root in every step."""
    monkeypatch.setattr(inputs, "EVERY", 1)


def watched(model, **hyper):
    optimizer = CLASSPOptimizer(model.parameters(), history="inputs", **hyper)
    optimizer.watch(model)
    return optimizer


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    (model(x) - y).square().sum(1).mean().div(2).backward()
    optimizer.step()


def data(outputs=3, features=6, count=64):
    x = torch.randn(count, features, dtype=torch.float64) * torch.arange(1, features + 1)
    return x, torch.randn(count, outputs, dtype=torch.float64)


def ridge(x, y, penalty, start):
    """Return what ridge regression towards the weights at the start gives, bias first."""
    x = nn.functional.pad(x, (1, 0), value=1.0)
    regular = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(regular, x.T @ y + penalty * start.T).T


def joined_moments(state):
    """Return A, the constant's row and column first."""
    if "basis" in state:
        V = state["basis"]
        return V @ state["moments"] @ V.T
    P = state["inverse"].double()
    R = state.get("rows", P[:0]).double()  # between a forward pass and its step
    A = state["epsilon"] * (P.inverse() - torch.eye(len(P))) + R.T @ R
    return A.to(state["inverse"])


def joined(layer):
    return torch.cat([layer.bias.detach()[:, None], layer.weight.detach()], 1)


@parametrize("order", [range(8), reversed(range(8)), [3, 1, 7, 0, 2, 6, 5, 4]])
@parametrize("epsilon", [0.01, 1.0, 100.0])
def test_a_linear_layer_is_ridge_regression_after_every_experience(order, epsilon):
    """Squared error, power 1, lr · epsilon = 1, every sample once: recursive least squares."""
    layer = nn.Linear(6, 3).double()
    start = joined(layer)
    optimizer = watched(layer, lr=1 / epsilon, epsilon=epsilon, power=1.0)
    x, y = data()
    seen = []
    for i in order:
        seen += range(i * BATCH, (i + 1) * BATCH)
        batch = slice(i * BATCH, (i + 1) * BATCH)
        step(layer, optimizer, x[batch], y[batch])
        # The mean over a mini-batch counts: the penalty beside sums is epsilon times its size.
        assert_close(joined(layer), ridge(x[seen], y[seen], epsilon * BATCH, start))


def test_so_it_is_when_the_head_grows(every_step):
    """New outputs start from zero history of their own and the inputs' history so far."""
    x, y = data(outputs=5)
    small, large = nn.Linear(6, 3).double(), nn.Linear(6, 5).double()
    optimizer = watched(small, lr=2.0, epsilon=0.5, power=1.0)
    start = joined(small)
    step(small, optimizer, x[:BATCH], y[:BATCH, :3])
    with torch.no_grad():
        large.weight[:3], large.bias[:3] = small.weight, small.bias
    grown = CLASSPOptimizer(large.parameters(), history="inputs", lr=2.0, epsilon=0.5, power=1.0)
    grown.watch(large)
    carry_accumulators(optimizer, small.named_parameters(), grown, large.named_parameters())
    for i in range(1, 8):
        batch = slice(i * BATCH, (i + 1) * BATCH)
        step(large, grown, x[batch], y[batch])
    assert_close(joined(large)[:3], ridge(x, y[:, :3], 0.5 * BATCH, start))


@parametrize("power", [0.5, 1.0, 1.5, 2.0])
def test_the_formula_by_hand(every_step, power):
    layer = nn.Linear(5, 4).double()
    optimizer = watched(layer, lr=0.1, epsilon=3.0, power=power)
    W, A = joined(layer), torch.zeros(6, 6, dtype=torch.float64)
    for _ in range(6):
        x, y = data(4, 5, BATCH)
        ones = nn.functional.pad(x, (1, 0), value=1.0)
        G = (ones @ W.T - y).T @ ones / BATCH
        A = A + ones.T @ ones / BATCH
        values, vectors = torch.linalg.eigh(torch.eye(6, dtype=torch.float64) + A / 3.0)
        W = W - 0.1 * G @ vectors @ torch.diag(values ** (-1 / power)) @ vectors.T
        step(layer, optimizer, x, y)
    assert_close(joined(layer), W)
    assert_close(diagonal(optimizer.state[layer.weight], layer.weight)[0], A.diagonal()[1:])


@parametrize("limit", [{"power": 1e12}, {"epsilon": 1e30, "power": 1.0}, {"apply_decay": False}])
def test_in_the_limit_it_is_sgd(limit):
    ours = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    theirs = copy.deepcopy(ours)
    optimizer = watched(ours, lr=0.05, **limit)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.05)
    for _ in range(5):
        x, y = data(count=BATCH)
        step(ours, optimizer, x, y)
        step(theirs, sgd, x, y)
    assert_close(list(ours.parameters()), list(theirs.parameters()))


def test_a_sketch_keeps_the_large_directions_and_the_mean_of_the_others():
    torch.manual_seed(0)
    layer = nn.Linear(40, 3).double()
    optimizer = watched(layer, lr=1e-3, epsilon=1.0, power=1.0, rank=12)
    scales = torch.cat([torch.full((8,), 10.0), torch.full((32,), 0.1)]).double()
    directions = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    A = torch.zeros(41, 41, dtype=torch.float64)
    for _ in range(60):
        x = torch.randn(BATCH, 40, dtype=torch.float64) * scales @ directions
        ones = nn.functional.pad(x, (1, 0), value=1.0)
        A += ones.T @ ones / BATCH
        step(layer, optimizer, x, torch.zeros(BATCH, 3, dtype=torch.float64))
    state = optimizer.state[layer.weight]
    V, S = state["basis"], state["moments"]
    assert_close(V.T @ V, torch.eye(12, dtype=torch.float64))
    assert_close(S.trace() + state["rest"], A.trace(), rtol=1e-6, atol=0)
    values = torch.linalg.eigvalsh(S)[-8:]
    expected = torch.linalg.eigvalsh(A)[-8:]
    # What enters the basis late is known by a sample; all but a few per cent is there.
    assert_close(values, expected, rtol=0.1, atol=0)


@parametrize("channels", [15, 16, 20])
def test_a_few_more_inputs_than_directions(channels):
    """Then few directions lie outside, and those of rounding are not to be taken for some."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, channels, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(channels, 32, 3)
        )
        optimizer = watched(model, rank=128)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.rand(10, 3, 16, 16)).square().mean().backward()
            optimizer.step()
        V = optimizer.state[model[3].weight]["basis"]
        assert_close(V.T @ V, torch.eye(V.shape[1]), atol=1e-4, rtol=0)
        assert all(p.isfinite().all() for p in model.parameters())


def test_what_is_not_watched_keeps_a_history_of_weights():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = CLASSPOptimizer(model.parameters(), history="inputs")
    report = optimizer.watch(model)
    assert report.covered == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(report.others) == ["1.weight", "1.bias"]
    assert "1.weight: no layer whose inputs" in str(report)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    assert set(optimizer.state[model[1].weight]) == {"accumulator"}
    assert "inverse" in optimizer.state[model[0].weight]


def test_without_watching_a_step_says_what_to_do():
    layer = nn.Linear(3, 2)
    optimizer = CLASSPOptimizer(layer.parameters(), history="inputs")
    layer(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.watch\(model\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="history='inputs'; this optimizer has none"):
        CLASSPOptimizer(layer.parameters()).watch(layer)
    with pytest.raises(ValueError, match="model that this optimizer trains"):
        optimizer.watch(nn.Linear(3, 2))


class _ByKeyword(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(query=x, value=x, key=x)[0]
        return self.layer(input=x)


@parametrize(
    "layer", [nn.Linear(8, 3), nn.MultiheadAttention(8, 2, batch_first=True)], ids=["linear", "mha"]
)
def test_inputs_given_by_keyword_are_seen(layer):
    model = _ByKeyword(layer)
    optimizer = watched(model)
    model(torch.ones(2, 5, 8)).sum().backward()
    optimizer.step()
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.in_proj_weight
    assert_close(joined_moments(optimizer.state[weight]), torch.ones(9, 9))


def test_what_attention_does_not_call_keeps_a_history_of_weights():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    optimizer = CLASSPOptimizer(model.parameters(), history="inputs")
    report = optimizer.watch(model)
    assert "self_attn.in_proj_weight" in report.covered
    assert {"self_attn.out_proj.weight", "self_attn.out_proj.bias"} <= report.others.keys()
    model(torch.randn(2, 5, 8)).sum().backward()
    optimizer.step()
    assert set(optimizer.state[model.self_attn.out_proj.weight]) == {"accumulator"}


@parametrize("how", ["functional", "eval mode"])
def test_a_layer_that_was_never_seen_is_refused_before_anything_moves(how):
    layer = nn.Linear(3, 2)
    optimizer = watched(layer)
    if how == "functional":
        nn.functional.linear(torch.ones(1, 3), layer.weight).sum().backward()
    else:
        layer.eval()(torch.ones(1, 3)).sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .* never seen"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


@parametrize("model", [nn.LSTM(3, 2), nn.ConvTranspose1d(2, 2, 3), nn.Bilinear(2, 2, 2)], ids=str)
def test_a_model_with_nothing_to_watch_is_refused(model):
    optimizer = CLASSPOptimizer(model.parameters(), history="inputs")
    with pytest.raises(ValueError, match="no layer whose inputs can be seen"):
        optimizer.watch(model)


def test_it_looks_in_training_with_gradients_only():
    layer = nn.Linear(3, 2)
    optimizer = watched(layer)
    with torch.no_grad():
        layer(torch.ones(1, 3))
    layer.eval()
    layer(torch.ones(1, 3))
    copied = copy.deepcopy(layer).train()
    copied(torch.ones(1, 3))
    assert not optimizer.state
    layer.train()(torch.ones(1, 3))
    assert_close(joined_moments(optimizer.state[layer.weight]).sum(), torch.tensor(16.0))


CONVOLUTIONS = [
    nn.Conv1d(2, 3, 3, stride=2, padding=1),
    nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, groups=2, bias=False),
    nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(2, 3, 3, padding="same"),
    nn.Conv3d(1, 2, 2),
]


@parametrize("layer", CONVOLUTIONS, ids=str)
def test_patches_are_what_a_convolution_multiplies(layer):
    dims = len(layer.kernel_size)
    x = torch.randn(2, layer.in_channels, *(7, 6, 5)[:dims])
    (rows,) = rows_of(layer, (x,))
    kernel = layer.weight.flatten(1)
    expected = layer(x)
    if layer.groups == 1:
        out = rows @ kernel.T + (0 if layer.bias is None else layer.bias)
        out = out.view(2, *expected.shape[2:], -1).movedim(-1, 1)
    else:
        per_group = rows.view(-1, layer.groups, kernel.shape[1])
        parts = kernel.view(layer.groups, -1, kernel.shape[1])
        out = torch.einsum("rgi,goi->rgo", per_group, parts).flatten(1)
        out = out.view(2, *expected.shape[2:], -1).movedim(-1, 1)
    assert_close(out, expected)


@parametrize("layer", CONVOLUTIONS, ids=str)
def test_convolutions_train(layer):
    model = nn.Sequential(copy.deepcopy(layer), nn.Flatten())
    optimizer = watched(model)
    x = torch.randn(2, layer.in_channels, *(7, 6, 5)[: len(layer.kernel_size)])
    before = model[0].weight.detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
    assert "inverse" in optimizer.state[model[0].weight]


def test_many_positions_are_sampled_and_random_numbers_stay_the_users():
    layer = nn.Conv2d(3, 4, 3)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    optimizer = watched(layer)
    layer(torch.ones(8, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert torch.equal(torch.rand(3), expected)
    assert_close(joined_moments(optimizer.state[layer.weight]), torch.ones(28, 28))


def test_attention_parametrized_and_shared_weights_and_two_calls():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    optimizer = watched(attention)
    x = torch.randn(2, 5, 8)
    attention(x, x, x)[0].sum().backward()
    optimizer.step()
    assert optimizer.state[attention.in_proj_weight]["inverse"].shape == (9, 9)

    plain, spectral = nn.Linear(4, 4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    model = nn.Sequential(plain, spectral)
    optimizer = watched(model)
    model(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    assert "inverse" in optimizer.state[spectral.parametrizations.weight.original]

    twice = nn.Linear(3, 3)
    optimizer = watched(twice)
    twice(twice(torch.ones(2, 3))).sum().backward()
    # The constant, once for each call.
    assert_close(joined_moments(optimizer.state[twice.weight])[0, 0], torch.tensor(2.0))

    shared = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared[1].weight = shared[0].weight
    optimizer = watched(shared)
    shared(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert_close(joined_moments(optimizer.state[shared[0].weight])[0, 0], torch.tensor(2.0))


def test_a_step_sees_all_mini_batches_since_the_last():
    layer = nn.Linear(3, 2)
    optimizer = watched(layer)
    for _ in range(4):
        layer(torch.ones(2, 3)).sum().div(4).backward()
    assert_close(joined_moments(optimizer.state[layer.weight])[0, 0], torch.tensor(4.0))
    optimizer.step()


@parametrize("reentrant", [True, False])
def test_activation_checkpointing_does_not_count_inputs_twice(reentrant):
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    repeated = copy.deepcopy(model)
    once, again = watched(model), watched(repeated)
    x = torch.randn(8, 4, requires_grad=True)
    for _ in range(3):
        step(model, once, x, 0.0)
        again.zero_grad()
        out = checkpoint(repeated, x, use_reentrant=reentrant)
        out.square().sum(1).mean().div(2).backward()
        again.step()
    for layer, other in ((model[0], repeated[0]), (model[2], repeated[2])):
        A = joined_moments(once.state[layer.weight])
        assert_close(joined_moments(again.state[other.weight]), A)
        assert_close(A[0, 0], torch.tensor(3.0))
    assert_close(list(model.parameters()), list(repeated.parameters()))


@parametrize("threshold", [0.0, 1e-30])
@parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_masks_do_not_change_the_step(layout, threshold):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=layout)
    optimizers = [watched(models[0]), watched(models[1], threshold=threshold)]
    for _ in range(3):
        x = torch.randn(2, 3, 6, 6)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert_close(list(models[0].parameters()), list(models[1].parameters()))


def test_a_bias_without_gradient_stays():
    layer = nn.Linear(4, 3)
    layer.bias.requires_grad_(False)
    before = layer.bias.clone()
    optimizer = watched(layer)
    layer(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.bias, before)


@parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_accumulate_in_float32(dtype):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = watched(model)
    with torch.autocast("cpu", dtype):
        loss = model(torch.randn(8, 4)).float().square().mean()
    loss.backward()
    optimizer.step()
    assert optimizer.state[model[2].weight]["inverse"].dtype == torch.float32
    half = nn.Linear(4, 2).to(torch.bfloat16)
    optimizer = watched(half)
    half(torch.randn(8, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert optimizer.state[half.weight]["inverse"].dtype == torch.float32


@parametrize("size", [1e19, 1e25, 1e38])
@parametrize("rank", [2, 6, None])
def test_inputs_whose_squares_are_not_finite_are_not_remembered(size, rank):
    layer = nn.Linear(6, 3)
    optimizer = watched(layer, lr=0.1, rank=rank)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, size, 1.0):
        layer(x * scale)
    state = optimizer.state[layer.weight]
    assert all(
        value.isfinite().all() for value in state.values() if isinstance(value, torch.Tensor)
    )
    step(layer, optimizer, x, torch.zeros(16, 3))
    assert layer.weight.isfinite().all()


def test_inputs_that_are_not_finite_are_not_remembered():
    layer = nn.Linear(3, 2)
    optimizer = watched(layer)
    for value in (torch.nan, 1e30):
        layer(torch.full((2, 3), value))
        layer.weight.grad, layer.bias.grad = torch.zeros(2, 3), torch.zeros(2)
        optimizer.step()
    assert_close(joined_moments(optimizer.state[layer.weight]), torch.zeros(4, 4))


# Dynamo looks at the gradient of what it goes on with after the hook.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_is_watched():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = watched(model)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        compiled(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    assert_close(joined_moments(optimizer.state[model[0].weight])[0, 0], torch.tensor(2.0))


def test_a_state_is_saved_loaded_and_goes_on_bit_for_bit(tmp_path):
    def train(model, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            optimizer.zero_grad()
            model(torch.randn(16, 30, generator=generator)).square().mean().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 2))
    other = copy.deepcopy(model)
    optimizer = watched(model, rank=5)
    train(model, optimizer, range(40))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    train(model, optimizer, range(40, 80))
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(weights)
    again = watched(other, rank=5)
    again.load_state_dict(state)
    train(other, again, range(40, 80))
    assert_close(list(model.parameters()), list(other.parameters()), rtol=0, atol=0)


def test_consolidation_multiplies_up_to_what_rounding_leaves():
    layer = nn.Linear(3, 2)
    optimizer = watched(layer)
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    before = joined_moments(state)
    optimizer.consolidate(10.0)
    assert_close(joined_moments(state), 10 * before, rtol=1e-4, atol=1e-4)
    for _ in range(60):
        optimizer.consolidate(10.0)
    optimizer.step()
    assert layer.weight.isfinite().all()


def test_layers_are_found_by_what_they_are():
    model = nn.Sequential(nn.Embedding(5, 3), nn.ConvTranspose2d(1, 1, 2), nn.Linear(3, 2))
    assert [layer.module for layer in find_layers(model)] == [model[2]]


@pytest.fixture
def avalanche_classp():
    from avalanche_classp import CLASSP

    return CLASSP


@parametrize("model", ["linear_head", "growing_head", "many_heads"])
def test_in_avalanche_it_needs_no_other_value(avalanche_classp, model):
    import conftest

    tasks = [0, 1, 2] if model == "many_heads" else None
    benchmark = conftest.make_benchmark(tasks=tasks)
    strategy = avalanche_classp(
        model=getattr(conftest, model)(), history="inputs", train_mb_size=8, evaluator=None
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    first = next(p for p in strategy.model.parameters() if p.dim() == 2)
    state = strategy.optimizer.state[first]
    assert state["step"] == 9  # 3 mini-batches an experience
    assert_close(joined_moments(state)[0, 0], torch.tensor(9.0))
    heads = [
        n for n, p in strategy.model.named_parameters() if "inverse" in strategy.optimizer.state[p]
    ]
    assert len(heads) == sum(p.dim() == 2 for p in strategy.model.parameters())


def test_a_stopped_run_goes_on_as_if_it_had_not(avalanche_classp, tmp_path):
    import conftest

    from avalanche_classp import checkpointed

    benchmark = conftest.make_benchmark()

    def make():
        model = conftest.growing_head()
        return avalanche_classp(model=model, history="inputs", train_mb_size=8, evaluator=None)

    whole, stopped = make(), make()
    for experience in checkpointed(benchmark.train_stream, whole, tmp_path / "whole"):
        conftest.seed_everything(1)
        whole.train(experience)
    for i, experience in enumerate(checkpointed(benchmark.train_stream, stopped, tmp_path / "b")):
        if i == 2:
            break
        conftest.seed_everything(1)
        stopped.train(experience)
    again = make()
    for experience in checkpointed(benchmark.train_stream, again, tmp_path / "b"):
        conftest.seed_everything(1)
        again.train(experience)
    assert conftest.same(conftest.weights(whole.model), conftest.weights(again.model))


def test_many_rows_count_by_few_with_the_same_moments_on_average():
    torch.manual_seed(0)
    x = torch.randn(256, 5) + torch.arange(5.0)
    ones = nn.functional.pad(x, (1, 0), value=1.0)
    layer = nn.Linear(5, 2)
    optimizer = watched(layer, lr=0.0)
    for _ in range(400):
        layer(x).sum().backward()
        assert len(optimizer.state[layer.weight]["rows"]) == exact_inputs.ROWS
        optimizer.step()
    A = joined_moments(optimizer.state[layer.weight])
    assert_close(A[0], 400 * ones.mean(0), rtol=1e-3, atol=0)  # the mean exactly
    assert_close(A / 400, ones.T @ ones / 256, rtol=0.05, atol=0.05)


def test_another_epsilon_keeps_what_was_seen():
    x, y = data()
    layer = nn.Linear(6, 3).double()
    optimizer = watched(layer, lr=0.1, epsilon=2.0)
    step(layer, optimizer, x[:BATCH], y[:BATCH])
    before = joined_moments(optimizer.state[layer.weight])
    optimizer.param_groups[0]["epsilon"] = 50.0
    ones = nn.functional.pad(x[BATCH : 2 * BATCH], (1, 0), value=1.0)
    step(layer, optimizer, x[BATCH : 2 * BATCH], y[BATCH : 2 * BATCH])
    expected = before + ones.T @ ones / BATCH
    assert_close(joined_moments(optimizer.state[layer.weight]), expected)


def test_a_thousand_passes_without_a_step_need_no_more_memory():
    layer = nn.Linear(3, 2)
    optimizer = watched(layer)
    for _ in range(1000):
        layer(torch.ones(4, 3))
    assert len(optimizer.state[layer.weight]["rows"]) <= 8 * exact_inputs.ROWS + 4


@parametrize("rank", [4, 3, None])
def test_a_rank_of_all_inputs_is_exact(rank):
    layer = nn.Linear(4, 2)
    optimizer = watched(layer, rank=rank)
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert ("inverse" in optimizer.state[layer.weight]) == (rank != 3)


@parametrize(("count", "epsilon"), [(40, 1.0), (20_000, 2.0)])
def test_the_plugin_fits_epsilon_to_the_first_experience(avalanche_classp, count, epsilon):
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from torch.utils.data import TensorDataset

    def experience(size):
        dataset = TensorDataset(torch.randn(size, 3), torch.zeros(size, dtype=torch.long))
        dataset.targets = [0] * size
        return as_classification_dataset(dataset)

    stream = benchmark_from_datasets(train=[experience(count), experience(90_000)]).train_stream
    keywords = {"history": "inputs", "evaluator": None, "train_mb_size": 10_000}
    strategy = avalanche_classp(model=nn.Linear(3, 2), **keywords)
    given = avalanche_classp(model=nn.Linear(3, 2), epsilon=7.0, **keywords)
    for part in stream:
        for trained, expected in ((strategy, epsilon), (given, 7.0)):
            trained.train(part)
            assert trained.optimizer.param_groups[0]["epsilon"] == expected


def test_accumulated_gradients_are_one_mini_batch_with_so_many_times_the_epsilon():
    """Each of the k forward passes counts in the history."""
    x, y = data()
    whole = nn.Linear(6, 3).double()
    parts = copy.deepcopy(whole)
    joint, accumulated = watched(whole, epsilon=1.0), watched(parts, epsilon=4.0)
    for batch in torch.arange(64).split(32):
        step(whole, joint, x[batch], y[batch])
        accumulated.zero_grad()
        for some in batch.split(8):
            (parts(x[some]) - y[some]).square().sum(1).mean().div(2 * 4).backward()
        accumulated.step()
    assert_close(joined(parts), joined(whole))
