"""Histories of directions from gradients: against the formula in float64, and where they go."""

import copy

import pytest
import torch
from conftest import GROWING, build, growing_head, linear_head, naive
from torch import nn
from torch.testing import assert_close

from avalanche_classp import (
    CLASSP,
    CLASSPOptimizer,
    CLASSPPlugin,
    NonFiniteGradientError,
    carry_accumulators,
)
from avalanche_classp.metrics import layers
from avalanche_classp.optim.accumulators import diagonal
from avalanche_classp.optim.accumulators.gradients import ROWS, new_sketch, sketch_update_
from avalanche_classp.optim.rule import Rule, cutoff, rule_of

parametrize = pytest.mark.parametrize
POWERS = [0.5, 1.0, 1.5, 2.0, 3.0]


def rule(**other):
    return Rule(
        **{"lr": 0.1, "threshold": 0.0, "epsilon": 0.01, "power": 2.0, "apply_decay": True} | other
    )


def gradients(steps, *shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, *shape, generator=generator, dtype=dtype)


def root(A, epsilon, exponent):
    """Return (epsilon I + A)^exponent."""
    values, vectors = torch.linalg.eigh(A)
    return vectors @ torch.diag((epsilon + values.clamp_min(0)) ** exponent) @ vectors.T


def by_the_formula(w, grads, *, lr, epsilon, power, both_sides=False):
    """Return W, A and L, the matrices whole."""
    A = torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64)
    L = torch.zeros(len(w), len(w), dtype=torch.float64)
    for g in grads:
        norm = g.square().sum().sqrt()
        A = A + g.T @ g * norm ** (power - 2)
        L = L + g @ g.T * norm ** (power - 2)
        if both_sides:
            half = -1 / (2 * power)
            w = w - lr * root(L, epsilon, half) @ g @ root(A, epsilon, half)
        else:
            w = w - lr * g @ root(A, epsilon, -1 / power)
    return w, A, L


@parametrize("power", POWERS)
@parametrize("both_sides", [False, True])
@parametrize("outputs", [1, 3, ROWS])
def test_with_all_columns_and_rows_it_is_the_formula(power, both_sides, outputs):
    """Nothing is shed and no rows are mixed: what is left is the full matrix."""
    w = gradients(1, outputs, 6, seed=1)[0]
    state, grads = new_sketch(w, 8, both_sides), gradients(11, outputs, 6)
    expected, A, L = by_the_formula(
        w, grads, lr=0.1, epsilon=0.01, power=power, both_sides=both_sides
    )
    for g in grads:
        sketch_update_(w, g, state, rule(power=power))
    assert_close(w, expected)
    assert_close(state["sketch"] @ state["sketch"].T, A)
    assert state["escaped"].abs() < 1e-10
    if both_sides:
        assert_close(state["out_sketch"] @ state["out_sketch"].T, L)
        assert state["out_escaped"].abs() < 1e-10


@parametrize("both_sides", [False, True])
@parametrize("power", POWERS)
def test_a_single_weight_has_the_papers_rule(power, both_sides):
    w = [nn.Parameter(torch.ones(1, 1, dtype=torch.float64)) for _ in range(2)]
    hyper = {"lr": 0.1, "epsilon": 0.01, "power": power}
    matrix = CLASSPOptimizer([w[1]], history="gradients", rank=1, both_sides=both_sides, **hyper)
    optimizers = [CLASSPOptimizer([w[0]], **hyper), matrix]
    for g in gradients(12, 1, 1):
        for weight, optimizer in zip(w, optimizers, strict=True):
            weight.grad = g.clone()
            optimizer.step()
    assert_close(w[1].detach(), w[0].detach())


def test_vectors_keep_the_papers_rule():
    models = [nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(8, 4)
    for model, history in zip(models, ("weights", "gradients"), strict=True):
        optimizer = CLASSPOptimizer(model.parameters(), lr=0.1, epsilon=0.1, history=history)
        model(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(models[0].bias, models[1].bias)
    assert not torch.equal(models[0].weight, models[1].weight)


def test_what_is_shed_bounds_what_is_lost():
    """Frequent Directions: B Bᵀ is at most the sum of GᵀG, and that at most B Bᵀ + ρ I."""
    w = torch.zeros(5, 20, dtype=torch.float64)
    state, grads = new_sketch(w, rank=6), gradients(32, 5, 20)
    for g in grads:
        sketch_update_(w, g, state, rule())
    exact = torch.einsum("soi,soj->ij", grads, grads)
    B = state["sketch"]
    lost = torch.linalg.eigvalsh(exact - B @ B.T)
    assert lost.min() > -1e-8
    assert 0 < lost.max() <= state["escaped"] + 1e-8
    # All columns are orthogonal: their lengths are what the root is taken of.
    assert_close(B.T @ B, torch.diag(B.square().sum(0)))
    # The rank-6 error is at most the tail's share (Liberty 2013): ‖A‖²_F / 6.
    assert state["escaped"] <= exact.trace() / 6


def test_random_rows_have_the_right_sum_on_average_and_come_again():
    grads = gradients(600, 3 * ROWS, 5)
    states = []
    for _ in range(2):
        w = torch.zeros(3 * ROWS, 5, dtype=torch.float64)
        state = new_sketch(w, rank=5)
        for g in grads:
            sketch_update_(w, g, state, rule())
        states.append(state)
    assert torch.equal(states[0]["sketch"], states[1]["sketch"])
    B = states[0]["sketch"]
    exact = torch.einsum("soi,soj->ij", grads, grads)
    assert torch.linalg.matrix_norm(B @ B.T - exact, 2) < 0.1 * torch.linalg.matrix_norm(exact, 2)


def test_a_used_direction_is_protected_whatever_weights_it_is_made_of():
    """The history is that of directions: the paper's rule would also stop the other one."""
    used, free = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    moved = {}
    for history in ("weights", "gradients"):
        w = nn.Parameter(torch.zeros(1, 2))
        optimizer = CLASSPOptimizer([w], lr=1.0, epsilon=0.01, power=2.0, history=history)
        for _ in range(100):
            w.grad = used.clone()
            optimizer.step()
        for direction in (used, free):
            before = w.detach().clone()
            w.grad = 0.01 * direction
            optimizer.step()
            moved[history, direction is free] = (w.detach() - before).norm().item()
    assert moved["gradients", True] > 50 * moved["gradients", False]
    assert moved["weights", True] == pytest.approx(moved["weights", False], rel=0.01)


def test_with_both_sides_used_inputs_stay_free_for_other_outputs():
    """With a history of the inputs alone they are used up for all."""
    used, other = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    moved = {}
    for both_sides in (False, True):
        w = nn.Parameter(torch.zeros(2, 2))
        optimizer = CLASSPOptimizer(
            [w], lr=1.0, epsilon=0.01, power=2.0, history="gradients", rank=2, both_sides=both_sides
        )
        for _ in range(100):
            w.grad = used.clone()
            optimizer.step()
        for gradient in (used, other):
            before = w.detach().clone()
            w.grad = 0.01 * gradient
            optimizer.step()
            moved[both_sides, gradient is other] = (w.detach() - before).norm().item()
    assert moved[False, True] == pytest.approx(moved[False, False], rel=0.01)
    assert moved[True, True] == pytest.approx(10 * moved[True, False], rel=0.01)  # (100/0.01)^(1/4)


@parametrize("power", [1.0, 2.0])
def test_steps_do_not_depend_on_the_scale_of_gradients(power):
    results = []
    for scale in (1.0, 1e-3):
        w = torch.zeros(4, 6, dtype=torch.float64)
        state = new_sketch(w, rank=3)
        for g in gradients(9, 4, 6):
            sketch_update_(w, scale * g, state, rule(power=power, epsilon=0.01 * scale**power))
        results.append(w)
    assert_close(results[0], results[1])


def test_the_threshold_stops_weights_and_history():
    w = nn.Parameter(torch.ones(2, 3))
    optimizer = CLASSPOptimizer([w], lr=0.1, threshold=0.25, power=1.0, history="gradients", rank=3)
    w.grad = torch.tensor([[1.0, 0.5, -0.2], [0.1, -0.7, 0.0]])
    optimizer.step()
    moved = w.detach() != 1
    assert moved.tolist() == [[True, False, False], [False, True, False]]
    passed = torch.tensor([[1.0, 0.0, 0.0], [0.0, -0.7, 0.0]])
    norm = passed.norm()
    B = optimizer.state[w]["sketch"]
    assert_close(B @ B.T, passed.T @ passed / norm)


def test_without_decay_it_is_sgd_and_the_history_grows():
    w = nn.Parameter(torch.ones(2, 3))
    optimizer = CLASSPOptimizer([w], lr=0.1, apply_decay=False, history="gradients", rank=2)
    w.grad = torch.full((2, 3), 0.5)
    optimizer.step()
    assert_close(w.detach(), torch.full((2, 3), 0.95))
    assert optimizer.state[w]["sketch"].any()


def test_maximize_turns_the_step():
    ends = []
    for maximize in (False, True):
        w = nn.Parameter(torch.zeros(2, 3))
        optimizer = CLASSPOptimizer([w], maximize=maximize, history="gradients", rank=2)
        w.grad = gradients(1, 2, 3, dtype=torch.float32)[0]
        optimizer.step()
        ends.append(w.detach())
    assert torch.equal(ends[0], -ends[1])


def test_gradients_of_zero_change_nothing():
    w = nn.Parameter(torch.ones(2, 3))
    optimizer = CLASSPOptimizer([w], history="gradients", rank=2)
    for _ in range(5):
        w.grad = torch.zeros(2, 3)
        optimizer.step()
    assert torch.equal(w.detach(), torch.ones(2, 3))
    assert not optimizer.state[w]["sketch"].any()


def test_a_gradient_that_is_not_finite_is_refused_or_left_out():
    for nonfinite in ("raise", "skip"):
        w = nn.Parameter(torch.ones(2, 3))
        optimizer = CLASSPOptimizer([w], nonfinite=nonfinite, history="gradients", rank=2)
        w.grad = torch.tensor([[1.0, torch.nan, 1.0], [torch.inf, 1.0, 1.0]])
        if nonfinite == "raise":
            with pytest.raises(RuntimeError, match="non-finite"):
                optimizer.step()
            assert torch.equal(w.detach(), torch.ones(2, 3))
        else:
            optimizer.step()
            stopped = w.detach() == 1
            assert stopped.tolist() == [[False, True, False], [True, False, False]]
            assert optimizer.state[w]["sketch"].isfinite().all()


@parametrize("power", POWERS)
@parametrize("both_sides", [False, True])
def test_consolidation_multiplies_the_history_of_every_direction(power, both_sides):
    w, grads = gradients(1, 5, 6)[0], gradients(6, 5, 6, seed=1)
    hyper = {"lr": 0.1, "epsilon": 0.01, "power": power}
    _, A, L = by_the_formula(w, grads, **hyper, both_sides=both_sides)
    p = nn.Parameter(w.clone())
    optimizer = CLASSPOptimizer([p], history="gradients", rank=8, both_sides=both_sides, **hyper)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    optimizer.consolidate(7)
    before, last = p.detach().clone(), gradients(1, 5, 6, seed=2)[0]
    p.grad = last.clone()
    optimizer.step()
    norm = last.norm() ** (power - 2)
    A, L = 7 * A + last.T @ last * norm, 7 * L + last @ last.T * norm
    if both_sides:
        step = root(L, 0.01, -0.5 / power) @ last @ root(A, 0.01, -0.5 / power)
    else:
        step = last @ root(A, 0.01, -1 / power)
    assert_close(before - p, 0.1 * step)


def test_beside_a_consolidated_direction_a_new_one_is_remembered():
    """Without a ceiling it would be taken for rounding, and never be protected."""
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = CLASSPOptimizer([p], lr=1.0, epsilon=0.01, power=2.0, history="gradients", rank=2)
    old, new = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    p.grad = old
    optimizer.step()
    for _ in range(100):
        optimizer.consolidate(10)
    moved = []
    for g in (old, new, new, new):
        before = p.detach().clone()
        p.grad = g
        optimizer.step()
        moved.append((p - before).norm().item())
    assert moved[0] == pytest.approx(2**0.5 / (0.01 * 2**20) ** 0.5, rel=1e-3)
    assert moved[1:] == pytest.approx([2**0.5 / (0.01 + 2 * i) ** 0.5 for i in (1, 2, 3)], rel=0.05)


@parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_convolutions_and_dtypes(dtype):
    """All dimensions but the first are the inputs; half precision keeps a float32 history."""
    w = nn.Parameter(torch.zeros(4, 3, 2, 2, dtype=dtype))
    flat = nn.Parameter(torch.zeros(4, 12, dtype=dtype))
    optimizer = CLASSPOptimizer([w, flat], history="gradients", rank=5)
    for g in gradients(6, 4, 3, 2, 2).to(dtype):
        w.grad, flat.grad = g, g.view(4, 12)
        optimizer.step()
    assert torch.equal(w.detach().view(4, 12), flat.detach())
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.state[w]["sketch"].dtype == kept
    assert optimizer.state[w]["sketch"].shape == (12, 5)


@parametrize("both_sides", [False, True])
def test_a_state_is_saved_loaded_and_goes_on_bit_for_bit(tmp_path, both_sides):
    def train(model, optimizer, begin, end):
        for g in gradients(end, 5, 7, dtype=torch.float32)[begin:]:
            model.weight.grad, model.bias.grad = g, g[:, 0].clone()
            optimizer.step()

    model = nn.Linear(7, 5)
    optimizer = CLASSPOptimizer(
        model.parameters(), lr=0.1, history="gradients", rank=3, both_sides=both_sides
    )
    train(model, optimizer, 0, 6)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    other = nn.Linear(7, 5)
    loaded = CLASSPOptimizer(other.parameters())
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (other, loaded)):
        train(m, o, 6, 13)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)
    small = CLASSPOptimizer(nn.Linear(6, 5).parameters())
    with pytest.raises(ValueError, match=r"for 7 inputs, .* \(5, 6\); .*carry_accumulators"):
        small.load_state_dict(saved[1])


def test_a_half_precision_state_is_not_rounded():
    w = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    optimizer = CLASSPOptimizer([w], history="gradients", rank=2)
    w.grad = gradients(1, 2, 3)[0].to(torch.bfloat16)
    optimizer.step()
    other = CLASSPOptimizer([nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (loaded,) = other.state.values()
    assert loaded["sketch"].dtype == torch.float32
    assert torch.equal(loaded["sketch"], optimizer.state[w]["sketch"])


def test_a_model_that_moves_to_another_dtype_keeps_its_history():
    model = nn.Linear(3, 2)
    optimizer = CLASSPOptimizer(model.parameters(), history="gradients", rank=3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = optimizer.state[model.weight]["sketch"]
    model.double()
    optimizer.zero_grad()
    model(torch.zeros(1, 3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    after = optimizer.state[model.weight]["sketch"]
    assert_close(after @ after.T, (before @ before.T).double())


@parametrize("both_sides", [False, True])
def test_a_bigger_model_takes_the_sketches(both_sides):
    old, new = nn.Linear(3, 2), nn.Linear(5, 4)
    optimizers = [
        CLASSPOptimizer(m.parameters(), history="gradients", rank=3, both_sides=both_sides)
        for m in (old, new)
    ]
    old(torch.ones(1, 3)).sum().backward()
    optimizers[0].step()
    report = carry_accumulators(
        optimizers[0], old.named_parameters(), optimizers[1], new.named_parameters()
    )
    assert report.grown["weight"] == ((2, 3), (4, 5))
    state, old_state = optimizers[1].state[new.weight], optimizers[0].state[old.weight]
    for name, size in (("sketch", 3), ("out_sketch", 2))[: 1 + both_sides]:
        assert torch.equal(state[name][:size], old_state[name])
        assert not state[name][size:].any()
    new(torch.ones(1, 5)).sum().backward()
    optimizers[1].step()
    back = carry_accumulators(
        optimizers[1], new.named_parameters(), optimizers[0], old.named_parameters()
    )
    assert "weight" in back.dropped


@parametrize(
    ("shape", "rank", "columns", "out_columns"),
    [
        ((400, 784), 128, 128, 128),
        ((10, 400), 128, 10, 10),
        ((2, 400), 128, 8, 2),
        ((400, 6), 128, 6, 8),
        ((64, 32, 3, 3), 128, 64, 64),
        ((64, 32, 3, 3), 16, 16, 16),
        ((0, 5), 3, 3, 0),
    ],
)
def test_a_sketch_has_no_more_numbers_than_weights(shape, rank, columns, out_columns):
    """But for layers of less than 8 outputs: a step brings up to 8 directions."""
    state = new_sketch(torch.empty(shape), rank, both_sides=True)
    inputs = torch.empty(shape[1:]).numel()
    assert state["sketch"].shape == (inputs, columns)
    assert state["out_sketch"].shape == (shape[0], out_columns)


def test_a_sketch_widens_with_its_layer():
    old, new = nn.Linear(30, 2, bias=False), nn.Linear(30, 20, bias=False)
    optimizers = [CLASSPOptimizer(m.parameters(), history="gradients", rank=12) for m in (old, new)]
    old(torch.eye(30)).square().sum().backward()
    optimizers[0].step()
    before = optimizers[0].state[old.weight]["sketch"]
    assert before.shape == (30, 8)
    carry_accumulators(optimizers[0], old.named_parameters(), optimizers[1], new.named_parameters())
    new.weight.grad = torch.zeros(20, 30)
    optimizers[1].step()
    after = optimizers[1].state[new.weight]["sketch"]
    assert after.shape == (30, 12)
    assert_close(after @ after.T, before @ before.T)


@parametrize("both_sides", [False, True])
def test_in_avalanche_a_growing_head_keeps_its_sketch(tiny, both_sides):
    hyper = {"history": "gradients", "rank": 8, "lr": 0.01, "both_sides": both_sides}
    strategy = build(CLASSP, growing_head(), optimizer=None, **hyper)
    sizes, steps = [], 0
    for experience in tiny.train_stream:
        strategy.train(experience)
        head = strategy.model.get_parameter(GROWING[0])
        sizes.append(len(head))
        # Each experience counts on from the last one: nothing has begun anew.
        assert strategy.optimizer.state[head]["step"] > steps
        steps = strategy.optimizer.state[head]["step"]
        assert both_sides == ("out_sketch" in strategy.optimizer.state[head])
    assert sizes[-1] > sizes[0]


@parametrize("both_sides", [False, True])
def test_plugin_and_metrics_take_it(tiny, both_sides):
    plugin = CLASSPPlugin(history="gradients", rank=4, epsilon=0.1, lr=0.01, both_sides=both_sides)
    strategy = naive(linear_head(), plugin)
    strategy.train(tiny.train_stream[0])
    matrices = [layer for layer in layers(strategy) if layer.param.dim() == 2]
    parameters = dict(strategy.model.named_parameters())
    for layer in matrices:
        state = strategy.optimizer.state[parameters[layer.name]]
        A = state["sketch"] @ state["sketch"].T
        expected = (A.diagonal() + state["escaped"]).expand(layer.param.shape)
        if both_sides:
            L = state["out_sketch"] @ state["out_sketch"].T
            expected = (expected * (L.diagonal() + state["out_escaped"])[:, None]).sqrt()
        assert_close(layer.accumulator, expected)
        assert torch.equal(diagonal(state, layer.param), layer.accumulator)
    assert matrices


@parametrize(
    ("change", "error", "message"),
    [
        ({"rank": -1}, ValueError, "rank must be at least 1, got -1"),
        ({"rank": 2.0}, TypeError, "rank must be a whole number, got 2.0"),
        ({"rank": True}, TypeError, "rank must be a whole number, got True"),
        ({"both_sides": 1}, TypeError, "both_sides must be True or False, got 1"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be greater than 0 with history='gradients'"),
    ],
)
def test_wrong_values(change, error, message):
    with pytest.raises(error, match=message):
        CLASSPOptimizer([nn.Parameter(torch.ones(2, 2))], history="gradients", **change)


@parametrize("value", [{"rank": 128}, {"both_sides": True}])
def test_a_value_without_effect_is_refused(value):
    (name, given), p = *value.items(), nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=f"{name}={given} has no effect with history='weights'"):
        CLASSPOptimizer([p], **value)


def test_a_kind_of_history_has_defaults_of_its_own():
    p = nn.Parameter(torch.ones(2, 2))
    plain, own = CLASSPOptimizer([p]), CLASSPOptimizer([p], history="gradients")
    assert plain.param_groups[0]["epsilon"] == 1e-8 and plain.param_groups[0]["rank"] is None
    assert own.param_groups[0]["epsilon"] == 0.02 and own.param_groups[0]["rank"] == 128
    mixed = CLASSPOptimizer([{"params": [p], "history": "gradients"}], lr=0.5, threshold=0.25)
    assert (mixed.param_groups[0]["lr"], mixed.param_groups[0]["threshold"]) == (0.02, 0.25)


@parametrize("size", [1e-5, 1e3])
@parametrize("dtype", [torch.float16, torch.bfloat16])
@parametrize("both_sides", [False, True])
def test_a_step_inside_autocast_is_the_one_outside(dtype, size, both_sides):
    found = []
    hyper = {"lr": 1e-3, "epsilon": 0.1, "history": "gradients", "rank": 3}
    for enabled in (False, True):
        w = nn.Parameter(torch.zeros(6, 5))
        optimizer = CLASSPOptimizer([w], both_sides=both_sides, **hyper)
        for _ in range(4):
            w.grad = torch.full((6, 5), size)
            with torch.autocast("cpu", dtype, enabled=enabled):
                optimizer.step()
                optimizer.consolidate(2.0)
        assert optimizer.state[w]["sketch"].dtype == torch.float32
        found.append(w.detach())
    assert torch.isfinite(found[0]).all() and torch.equal(*found)


def test_a_closure_inside_autocast_stays_inside():
    model, seen = nn.Linear(4, 3), []
    optimizer = CLASSPOptimizer(model.parameters(), history="gradients")

    def closure():
        optimizer.zero_grad()
        outputs = model(torch.ones(2, 4))
        seen.append(outputs.dtype)
        outputs.float().sum().backward()

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.bfloat16]


@parametrize("power", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_no_step_without_history_however_large_the_gradient(power):
    for exponent in range(0, 39):
        w = nn.Parameter(torch.zeros(16, 24))
        optimizer = CLASSPOptimizer([w], lr=0.1, epsilon=0.01, power=power, history="gradients")
        w.grad = torch.full((16, 24), 10.0**exponent)
        try:
            optimizer.step()
        except NonFiniteGradientError:
            assert torch.equal(w.detach(), torch.zeros(16, 24))
            continue
        assert optimizer.state[w]["sketch"].norm() > 0
        w.grad = torch.full((16, 24), 10.0**exponent)
        optimizer.step()
        assert torch.isfinite(w).all()


@parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 2)])
def test_a_parameter_without_entries_is_left_alone(shape):
    w = nn.Parameter(torch.zeros(shape))
    optimizer = CLASSPOptimizer([w], history="gradients", both_sides=True)
    w.grad = torch.zeros(shape)
    optimizer.step()
    optimizer.consolidate(3.0)


@parametrize("nonfinite", ["raise", "skip"])
@parametrize(
    "hyper",
    [
        {},
        {"threshold": 0.1},
        {"foreach": True},
        {"history": "gradients", "rank": 2},
        {"history": "gradients", "rank": 2, "both_sides": True},
    ],
)
def test_a_default_device_changes_nothing(hyper, nonfinite):
    """Meta shows it without a GPU: a number that is read there is an error."""
    found = []
    for device in ("cpu", "meta"):
        w = nn.Parameter(torch.zeros(20, 5))
        w.grad = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
        wider = nn.Parameter(torch.zeros(20, 6))
        wider.grad = torch.ones(20, 6)
        hyper = {"lr": 0.1, "epsilon": 0.1, "nonfinite": nonfinite} | hyper
        optimizer, new = (CLASSPOptimizer([p], **hyper) for p in (w, wider))
        cutoff.cache_clear()
        torch.set_default_device(device)
        try:
            for _ in range(2):
                optimizer.step()
                optimizer.consolidate(2.0)
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            carry_accumulators(optimizer, [("w", w)], new, [("w", wider)])
            new.step()
        finally:
            torch.set_default_device(None)
        found.append((w.detach(), wider.detach(), diagonal(new.state[wider], wider)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.any()


@parametrize(
    ("made_with", "changed", "message"),
    [
        ({}, {"history": "gradients"}, "history='gradients' with rank=None; a history is chosen"),
        ({}, {"rank": 4}, "history='weights' with rank=4"),
        ({}, {"history": "bogus"}, "history must be one of .*, got 'bogus'"),
        ({"history": "gradients"}, {"history": "weights"}, "history='weights' with rank=128"),
    ],
)
@parametrize("steps", [0, 2])
def test_a_group_cannot_change_its_kind_of_history(made_with, changed, message, steps):
    w = nn.Parameter(torch.zeros(3, 2))
    w.grad = torch.ones(3, 2)
    optimizer = CLASSPOptimizer([w], **made_with)
    for _ in range(steps):
        optimizer.step()
    before, state = w.detach().clone(), copy.deepcopy(dict(optimizer.state[w]))
    optimizer.param_groups[0].update(changed)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(w.detach(), before) and optimizer.state[w].keys() == state.keys()


def test_a_history_of_another_kind_is_refused_and_not_carried():
    old_w, w = (nn.Parameter(torch.zeros(3, 2)) for _ in range(2))
    old = CLASSPOptimizer([old_w], history="gradients", rank=2)
    old_w.grad, w.grad = torch.ones(3, 2), torch.ones(3, 2)
    old.step()
    new = CLASSPOptimizer([w])
    report = carry_accumulators(old, [("w", old_w)], new, [("w", w)])
    assert "another kind" in report.dropped["w"] and not new.state
    new.state[w] = dict(old.state[old_w])
    with pytest.raises(RuntimeError, match=r"a history of another kind \(sketch\)"):
        new.step()
    assert torch.equal(w.detach(), torch.zeros(3, 2))


@parametrize("history", ["weights", "gradients", "inputs"])
def test_what_keeps_a_history_of_weights_is_carried_with_the_others(history):
    models = [nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)) for _ in range(2)]
    old, new = (CLASSPOptimizer(m.parameters(), history=history) for m in models)
    for model, optimizer in zip(models, (old, new), strict=True):
        if history == "inputs":
            optimizer.watch(model)
    for optimizer, model in ((old, models[0]), (new, models[1])):
        model(torch.ones(2, 4)).square().sum().backward()
        if optimizer is old:
            old.step()
    report = carry_accumulators(
        old, models[0].named_parameters(), new, models[1].named_parameters()
    )
    assert not report.dropped and {"0.weight", "1.weight", "1.bias"} <= set(report.carried)
    new.step()


def test_a_step_refuses_what_has_no_matrix_and_changes_nothing():
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = CLASSPOptimizer([w], history="gradients", rank=2)
    w.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(
        RuntimeError, match="is one with a sparse gradient: give it history='weights'"
    ):
        optimizer.step()
    w.grad = torch.ones(2, 2)
    optimizer.param_groups[0]["epsilon"] = 0.0
    with pytest.raises(ValueError, match="epsilon must be greater than 0"):
        optimizer.step()
    assert torch.equal(w.detach(), torch.ones(2, 2))
    assert rule_of(optimizer.param_groups[0]).epsilon == 0.0
