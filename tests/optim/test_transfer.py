"""The optimizer's state where it goes: files, devices, dtypes, other models, other releases."""

import copy
import doctest
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    CLASSES,
    accumulators,
    fit,
    linear_head,
    make_data,
    naive,
    same,
    weights,
)
from torch import nn
from torch.nn.utils import parametrize as parametrization
from torch.testing import assert_close

from avalanche_classp import CLASSP, CarryReport, CLASSPOptimizer, CLASSPPlugin, carry_accumulators

parametrize = pytest.mark.parametrize
HYPER = {"lr": 0.05, "threshold": 1e-5, "epsilon": 1e-3, "power": 1.0}
X, Y = make_data(CLASSES[0])
DATA = Path(__file__).parents[1] / "data"


def train(model, optimizer, steps=3, *, x=X, y=Y):
    for i in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i::3]).float(), y[i::3]).backward()
        optimizer.step()


def trained(model=None, steps=3, **hyper):
    model = linear_head() if model is None else model
    optimizer = CLASSPOptimizer(model.named_parameters(), **HYPER | hyper)
    train(model, optimizer, steps)
    return model, optimizer


def histories(optimizer):
    return [state["accumulator"] for state in optimizer.state.values()]


# --- releases -------------------------------------------------------------------------------------


def test_a_stored_state_of_version_1_loads_and_goes_on():
    """The file has both kinds of history, and the weights two steps later."""
    saved = torch.load(DATA / "state-version-1.pt", weights_only=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.load_state_dict(saved["model"])
    groups = [{"params": model[i].parameters()} for i in (0, 2)]
    groups[1] |= {"history": "gradients"}
    optimizer = CLASSPOptimizer(groups, lr=9.0)
    optimizer.load_state_dict(saved["optimizer"])
    for i, history in enumerate(optimizer.state.values()):
        assert_close(history, saved["optimizer"]["state"][i], rtol=0, atol=0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
    for i in (3, 4):
        x = torch.arange(15, dtype=torch.float32).view(5, 3).mul(0.1 * (i + 1)).sin()
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    assert_close(model.state_dict(), saved["after_two_more_steps"])


@parametrize(
    ("change", "error", "message"),
    [
        (
            lambda s: s | {"version": 2},
            ValueError,
            "has version 2, .* reads version 1; load it with",
        ),
        (lambda s: s | {"version": "x"}, ValueError, "has version 'x'"),
        (lambda s: None, TypeError, "state_dict must be a dict, got NoneType"),
        (lambda s: {}, ValueError, "has no 'state'"),
        (lambda s: {"state": {}}, ValueError, "has no 'param_groups'"),
        (
            lambda s: torch.optim.Adam(linear_head().parameters()).state_dict(),
            ValueError,
            r"no CLASSPOptimizer's: its param_groups\[0\] has no 'threshold'",
        ),
        (
            lambda s: s | {"param_groups": [s["param_groups"][0] | {"power": -1}]},
            ValueError,
            r"param_groups\[0\]: power must be .*, got -1",
        ),
        (
            lambda s: s | {"state": s["state"] | {1: {"accumulator": torch.zeros(7)}}},
            ValueError,
            r"accumulator of parameter 1 has the shape \(7,\), .* \(5,\); .*carry_accumulators",
        ),
        (lambda s: s | {"param_groups": []}, ValueError, "different number of parameter groups"),
    ],
)
def test_a_state_that_cannot_be_loaded_gives_one_error_and_changes_nothing(change, error, message):
    _, optimizer = trained()
    bad = change(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message) as caught:
        optimizer.load_state_dict(bad)
    assert "\n" not in str(caught.value)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


# --- devices and dtypes ---------------------------------------------------------------------------


def test_a_state_goes_to_the_device_of_the_parameters_and_back(tmp_path):
    """The meta device stands in for another device: it has dtypes, shapes and no numbers."""
    model, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    elsewhere = CLASSPOptimizer(copy.deepcopy(model).to("meta").parameters())
    elsewhere.load_state_dict(saved)
    assert [a.device.type for a in histories(elsewhere)] == ["meta"] * 4
    assert [a.dtype for a in histories(elsewhere)] == [torch.float32] * 4
    elsewhere.load_state_dict(elsewhere.state_dict())
    back = CLASSPOptimizer(model.parameters())
    back.load_state_dict(saved)
    assert_close(histories(back), histories(optimizer), rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_goes_to_a_gpu_and_back():
    model, optimizer = trained()
    on_gpu = copy.deepcopy(model).cuda()
    other = CLASSPOptimizer(on_gpu.parameters())
    other.load_state_dict(optimizer.state_dict())
    train(on_gpu, other, x=X.cuda(), y=Y.cuda())
    other_back = CLASSPOptimizer(on_gpu.cpu().parameters())
    other_back.load_state_dict(other.state_dict())
    train(model, optimizer)
    assert_close(histories(other_back), histories(optimizer), rtol=1e-4, atol=1e-6)
    train(on_gpu, other)  # the model has left the GPU, and its optimizer stays


def test_accumulators_follow_a_model_to_another_device():
    """Only the bookkeeping: parameters on the meta device have no numbers."""
    p = nn.Parameter(torch.ones(3))
    optimizer = CLASSPOptimizer([p], nonfinite="skip")
    p.grad = torch.ones(3)
    optimizer.step()
    moved = nn.Parameter(torch.ones(3, device="meta"))
    moved.grad = torch.ones(3, device="meta")
    optimizer.param_groups[0]["params"] = [moved]
    optimizer.state[moved] = optimizer.state.pop(p)
    optimizer.step()
    assert optimizer.state[moved]["accumulator"].device.type == "meta"


@parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@parametrize("foreach", [None, True, False])
def test_a_model_may_change_its_dtype_after_some_steps(dtype, kept, foreach):
    model, optimizer = trained(foreach=foreach)
    before = [a.clone() for a in histories(optimizer)]
    model.to(dtype)
    train(model, optimizer, x=X.to(dtype))
    assert [a.dtype for a in histories(optimizer)] == [kept] * 4
    assert all((new >= old).all() for new, old in zip(histories(optimizer), before, strict=True))
    model.float()
    train(model, optimizer)
    assert [a.dtype for a in histories(optimizer)] == [torch.float32] * 4


def test_to_a_memory_format_after_some_steps_changes_no_number():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(24, 2, 5, 5)
    model(x)
    other = copy.deepcopy(model)
    optimizers = [CLASSPOptimizer(m.parameters(), **HYPER) for m in (model, other)]
    for i in range(2):
        train(model, optimizers[0], x=x)
        train(other, optimizers[1], x=x)
        if i == 0:
            other.to(memory_format=torch.channels_last)
    assert_close(weights(other), weights(model))
    assert_close(histories(optimizers[1]), histories(optimizers[0]))


# --- mixed precision, accumulation, clipping ------------------------------------------------------


@parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_threshold_sees_unscaled_gradients(dtype):
    """With a scale of 2**16 all scaled gradients are above the threshold, some true ones below."""
    plain, scaled = linear_head(), linear_head()
    hyper = HYPER | {"threshold": 0.05**2}
    optimizers = [CLASSPOptimizer(m.parameters(), **hyper) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for model, optimizer in zip((plain, scaled), optimizers, strict=True):
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(X), Y)
        if model is plain:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    left_alone = [(a == 0).sum().item() for a in histories(optimizers[0])]
    assert 0 < sum(left_alone) < sum(p.numel() for p in plain.parameters())
    # Powers of two scale without rounding, but half-precision gradients may underflow unscaled.
    assert_close(weights(scaled), weights(plain), rtol=1e-3, atol=1e-4)
    assert [(a == 0).sum().item() for a in histories(optimizers[1])] == left_alone


def test_a_batch_that_overflows_is_dropped_by_the_scaler_and_the_next_one_counts():
    model, optimizer = trained(steps=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = weights(model)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * nn.functional.cross_entropy(model(X), Y)).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != 1:
            assert same(weights(model), before) and not optimizer.state
    assert scaler.get_scale() == 2.0**9
    assert len(optimizer.state) == 4


def recipe_for_mixed_precision():
    """Return the class that docs/training_loops.md shows, on the CPU."""
    page = (Path(__file__).parents[2] / "docs" / "training_loops.md").read_text()
    (code,) = re.findall(r"```python\n(import functools\n.*?)```", page, re.DOTALL)
    names = {"torch": torch}
    exec(code.replace('"cuda"', '"cpu"'), names)
    return names["MixedPrecision"]


def test_the_recipe_for_avalanche_trains_in_half_precision_with_true_gradients(tiny):
    class Half(recipe_for_mixed_precision()):
        def forward(self):
            output = super().forward()
            dtypes.add(output.dtype)
            return output

    dtypes = set()
    runs = []
    for strategy_class in (CLASSP, Half):
        seen = []
        strategy = strategy_class(
            model=linear_head(), train_mb_size=8, evaluator=None, **HYPER | {"threshold": 1e-4}
        )
        step = strategy.optimizer.step
        largest = functools.partial(
            lambda s, seen: seen.append(max(p.grad.abs().max() for p in s.model.parameters())),
            strategy,
            seen,
        )
        strategy.optimizer.step = lambda step=step, note=largest: (note(), step())[1]
        fit(strategy, tiny.train_stream)
        runs.append((strategy, seen))
    (plain, true), (half, seen) = runs
    assert dtypes == {torch.float16}
    assert half.scaler.get_scale() == 2.0**16  # nothing overflowed, so every step counted
    assert len(seen) == len(true) == 9
    assert max(seen) < 10 * max(true)  # not 2**16 times
    assert_close(weights(half.model), weights(plain.model), rtol=0.05, atol=0.05)


def test_accumulated_gradients_count_as_one():
    whole, parted = linear_head(), linear_head()
    _, optimizer = trained(whole, steps=0)
    _, other = trained(parted, steps=0)
    nn.functional.cross_entropy(whole(X), Y).backward()
    for part in range(3):
        (nn.functional.cross_entropy(parted(X[part::3]), Y[part::3]) / 3).backward()
    optimizer.step()
    other.step()
    assert_close(weights(parted), weights(whole))
    assert_close(histories(other), histories(optimizer))


def test_clipped_gradients_are_what_is_accumulated():
    model, optimizer = trained(steps=0, threshold=0.0)
    (100 * nn.functional.cross_entropy(model(X), Y)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    norm = torch.cat([a.flatten() for a in histories(optimizer)]).norm()  # power 1: Σ|g|
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


# --- layers that freeze, are shared, parametrized -------------------------------------------------


def test_frozen_layers_keep_weights_and_history_and_go_on_when_unfrozen():
    model, optimizer = trained()
    frozen = {name: p for name, p in model.named_parameters() if name.startswith("0.")}
    before = {n: (p.clone(), optimizer.state[p]["accumulator"].clone()) for n, p in frozen.items()}
    model[0].requires_grad_(False)
    head = model[2].weight.clone()
    train(model, optimizer)
    for name, p in frozen.items():
        assert torch.equal(p, before[name][0])
        assert torch.equal(optimizer.state[p]["accumulator"], before[name][1])
    assert not torch.equal(model[2].weight, head)
    model[0].requires_grad_(True)
    train(model, optimizer)
    for name, p in frozen.items():
        assert not torch.equal(p, before[name][0])
        history = optimizer.state[p]["accumulator"]
        assert (history >= before[name][1]).all() and (history > before[name][1]).any()


def test_a_layer_frozen_from_the_start_has_no_history_until_it_is_unfrozen(tmp_path):
    model = linear_head()
    model[0].requires_grad_(False)
    _, optimizer = trained(model)
    assert len(optimizer.state) == 2
    other = CLASSPOptimizer(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    model[0].requires_grad_(True)
    train(model, other)
    assert len(other.state) == 4


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_shared_weights_have_one_history_of_the_summed_gradient():
    model, optimizer = trained(Tied(), steps=1, threshold=0.0)
    assert len(optimizer.state) == 1
    other = Tied()
    other.load_state_dict(model.state_dict())
    second = CLASSPOptimizer(other.named_parameters(), **HYPER)
    second.load_state_dict(optimizer.state_dict())
    train(model, optimizer)
    train(other, second)
    assert other.second.weight is other.first.weight
    assert same(weights(other), weights(model))
    report = carry_accumulators(
        optimizer, model.named_parameters(), second, other.named_parameters()
    )
    assert report == CarryReport(carried=["first.weight"])


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w

    def right_inverse(self, w):
        return w / 2


def test_a_parametrized_weight_keeps_its_history_and_so_when_it_is_removed():
    model, optimizer = trained()
    weight = model[0].weight
    before = optimizer.state[weight]["accumulator"].clone()
    parametrization.register_parametrization(model[0], "weight", Doubled())
    train(model, optimizer)
    assert model[0].parametrizations.weight.original is weight
    during = optimizer.state[weight]["accumulator"].clone()
    assert (during >= before).all() and (during > before).any()
    parametrization.remove_parametrizations(model[0], "weight")
    assert model[0].weight is weight
    train(model, optimizer)
    assert (optimizer.state[weight]["accumulator"] >= during).all()


def test_avalanche_keeps_the_history_of_a_weight_that_becomes_parametrized(tiny):
    strategy = naive(linear_head(), CLASSPPlugin(threshold=1e-6))
    fit(strategy, tiny.train_stream[:1])
    before = accumulators(strategy)["0.weight"]
    parametrization.register_parametrization(strategy.model[0], "weight", Doubled())
    fit(strategy, tiny.train_stream[1:2])
    after = accumulators(strategy)["0.parametrizations.weight.original"]
    assert (after >= before).all() and (after > before).any()


def test_avalanche_keeps_frozen_and_later_unfrozen_layers(tiny):
    strategy = naive(linear_head(), CLASSPPlugin(threshold=1e-6))
    fit(strategy, tiny.train_stream[:1])
    before, body = accumulators(strategy), weights(strategy.model)["0.weight"]
    strategy.model[0].requires_grad_(False)
    fit(strategy, tiny.train_stream[1:2])
    assert torch.equal(weights(strategy.model)["0.weight"], body)
    assert torch.equal(accumulators(strategy)["0.weight"], before["0.weight"])
    strategy.model[0].requires_grad_(True)
    fit(strategy, tiny.train_stream[2:])
    assert (accumulators(strategy)["0.weight"] > before["0.weight"]).any()


def test_avalanche_trains_on_with_a_dtype_changed_between_experiences(tiny):
    strategy = naive(linear_head(), CLASSPPlugin(threshold=1e-6))
    fit(strategy, tiny.train_stream[:1])
    before = accumulators(strategy)
    strategy.model.double()
    strategy._criterion = lambda out, y: nn.functional.cross_entropy(out.float(), y)
    strategy.model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    fit(strategy, tiny.train_stream[1:2])
    for name, history in accumulators(strategy).items():
        assert history.dtype == torch.float64
        assert (history >= before[name].double()).all()


# --- a bigger model -------------------------------------------------------------------------------


def test_a_bigger_model_takes_the_histories_by_name_and_says_which():
    small, old = trained()
    big = nn.ModuleDict({"0": nn.Linear(6, 9), "2": nn.Linear(5, 6), "3": nn.Linear(6, 6)})
    big["2"].bias = nn.Parameter(torch.zeros(3))  # smaller than before
    new = CLASSPOptimizer(big.parameters(), **HYPER)
    saved = copy.deepcopy(old.state_dict())
    renamed = [(name, p) for name, p in small.named_parameters() if name != "0.bias"]
    renamed.append(("4.bias", small[0].bias))
    report = carry_accumulators(old, renamed, new, big.named_parameters())
    assert report.carried == ["2.weight"]
    assert report.grown == {"0.weight": ((5, 6), (9, 6))}
    assert report.dropped == {
        "2.bias": "(6,) → (3,) is not growth",
        "4.bias": "the new model has no such parameter",
    }
    assert report.new == ["0.bias", "3.weight", "3.bias"]
    assert str(report).splitlines()[:3] == [
        "CLASSP histories: 1 carried, 1 grown, 2 dropped; 3 parameters begin without",
        "  carried 2.weight",
        "  grown   0.weight: (5, 6) → (9, 6)",
    ]
    grown = new.state[big["0"].weight]["accumulator"]
    assert torch.equal(grown[:5], old.state[small[0].weight]["accumulator"])
    assert not grown[5:].any()
    new.state[big["2"].weight]["accumulator"].add_(1)  # shares nothing with the old one
    assert_close(old.state_dict()["state"], saved["state"], rtol=0, atol=0)


def test_the_same_model_anew_goes_on_bit_for_bit():
    model, optimizer = trained()
    other = copy.deepcopy(model)
    new = CLASSPOptimizer(other.parameters(), **HYPER)
    report = carry_accumulators(optimizer, model.named_parameters(), new, other.named_parameters())
    assert len(report.carried) == 4 and not (report.grown or report.dropped or report.new)
    train(model, optimizer)
    train(other, new)
    assert same(weights(other), weights(model))


def test_carrying_refuses_other_optimizers_and_parameters():
    model, optimizer = trained()
    named = dict(model.named_parameters())
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(TypeError, match="old_optimizer must be a CLASSPOptimizer, got Adam"):
        carry_accumulators(adam, named.items(), optimizer, named.items())
    with pytest.raises(TypeError, match="new_optimizer must be a CLASSPOptimizer, got Adam"):
        carry_accumulators(optimizer, named.items(), adam, named.items())
    strange = {"x.weight": nn.Parameter(torch.zeros(2))}
    with pytest.raises(ValueError, match=r"'x.weight', which is not in new_optimizer"):
        carry_accumulators(optimizer, named.items(), optimizer, strange.items())


def test_the_docstrings_example_prints_what_it_says():
    result = doctest.testmod(sys.modules["avalanche_classp.optim.transfer"])
    assert result.attempted >= 6 and result.failed == 0
