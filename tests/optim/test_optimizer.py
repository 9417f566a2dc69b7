"""The optimizer against its formula, against torch's optimizers, and against wrong use."""

import copy
import doctest
import io
import itertools
import math
import pickle
import re
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, lr_scheduler
from torch.testing import assert_close

import avalanche_classp
from avalanche_classp import CLASSP_optimizer, CLASSPOptimizer
from avalanche_classp.optim import optimizer as module

parametrize = pytest.mark.parametrize
assert_same = partial(assert_close, rtol=0, atol=0)

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float64, torch.float32, *HALVES]
TOLERANCES = [(torch.float64, 1e-9, 1e-12), (torch.float32, 1e-4, 1e-5)]
HYPER = {"lr": 0.05, "threshold": 0.01, "epsilon": 0.1, "power": 1.5}
OVERRIDES = [
    *({"lr": 0.3}, {"threshold": 0.5}, {"epsilon": 2.0}, {"power": 1.0}, {"power": 2.0}),
    *({"apply_decay": False}, {"maximize": True}),
]


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def weights(opt):
    return [p.detach().clone() for group in opt.param_groups for p in group["params"]]


def accumulators(opt):
    params = [p for group in opt.param_groups for p in group["params"]]
    return [copy.deepcopy(opt.state.get(p, {}).get("accumulator")) for p in params]


def run(w, grads, optimizer=CLASSPOptimizer, **hyper):
    """Return the weights and the accumulator after each step."""
    p = Parameter(w.clone())
    opt = optimizer([p], **hyper)
    history = []
    for g in grads:
        p.grad = g
        opt.step()
        history.append((*weights(opt), *accumulators(opt)))
    return history


def oracle(w, grads, *, lr, threshold, epsilon, power, apply_decay=True, maximize=False, limit):
    """Compute one weight by hand; a gradient whose |g|**power is above the limit is skipped."""
    a = 0.0
    for g in grads:
        if math.isfinite(g) and abs(g) ** power <= limit and Fraction(g) ** 2 > Fraction(threshold):
            a += abs(g) ** power
            g = -g if maximize else g
            w -= lr * g / (epsilon + a) ** (1 / power) if apply_decay else lr * g
    return w, a


def assert_follows_the_oracle(w, grads, rtol, atol, nonfinite="raise", **hyper):
    after, accumulator = run(w, grads, nonfinite=nonfinite, **hyper)[-1]
    hyper["limit"] = torch.finfo(accumulator.dtype).max
    series = zip(*(g.flatten().tolist() for g in grads), strict=True)
    start = w.flatten().tolist()
    pairs = [oracle(w0, gs, **hyper) for w0, gs in zip(start, series, strict=bool(start))]
    expected = torch.tensor(pairs, dtype=torch.float64).reshape(*w.shape, 2).unbind(-1)
    assert_close((after.double(), accumulator.double()), expected, rtol=rtol, atol=atol)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def train(model, opt, seeds, scheduler=None):
    """Take one step per seed, each on its own batch; return the learning rates used."""
    rates = []
    for seed in seeds:
        x = randn(16, 4, seed=seed, dtype=model[0].weight.dtype)
        opt.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        opt.step()
        rates.append(float(opt.param_groups[0]["lr"]))
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler:
            scheduler.step()
    return rates


# The update rule


@st.composite
def cases(draw, **fixed):
    """Draw weights, gradients and hyper-parameters that reach every part of the rule."""
    epsilon = draw(st.sampled_from([0.0, 1e-4]) | st.floats(1e-6, 10))
    special = [0.0, 0.5, -0.5, math.nextafter(0.5, 1)]
    # Without epsilon a tiny |g|**power has few digits: tests of their own are below.
    special += [1e-200, -1e-30, 5e-324] if epsilon else []
    element = st.sampled_from(special) | st.floats(1e-3, 10) | st.floats(-10, -1e-3)
    shape = draw(st.sampled_from([(), (0,), (3,), (2, 2), (1, 2, 2)]))
    values = st.lists(element, min_size=math.prod(shape), max_size=math.prod(shape))
    tensors = values.map(lambda x: torch.tensor(x, dtype=torch.float64).reshape(shape))
    hyper = {
        "lr": draw(st.sampled_from([0.0, 1.0]) | st.floats(1e-4, 1)),
        "threshold": draw(st.sampled_from([0.0, 0.25, 1e-6]) | st.floats(0, 4)),
        "epsilon": epsilon,
        "power": draw(st.sampled_from([1.0, 2.0, 3.0]) | st.floats(0.5, 4)),
        "apply_decay": draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }
    return draw(tensors), draw(st.lists(tensors, min_size=1, max_size=4)), hyper | fixed


@parametrize(("dtype", "rtol", "atol"), TOLERANCES)
@given(case=cases())
@settings(deadline=None, max_examples=200)
def test_update_is_the_formula(dtype, rtol, atol, case):
    w, grads, hyper = case
    assert_follows_the_oracle(w.to(dtype), [g.to(dtype) for g in grads], rtol, atol, **hyper)


@parametrize("dtype", DTYPES)
@given(threshold=st.sampled_from([0.0, 0.25, 1e-30, 0.1]) | st.floats(0, 1e4))
@settings(deadline=None, max_examples=50)
def test_threshold_is_strict_and_exact_to_the_last_bit(dtype, threshold):
    """Take the seven floats around √threshold; at threshold 0 their squares underflow."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    root = torch.tensor(math.sqrt(threshold), dtype=dtype).view(integer)
    g = (root + torch.arange(-3, 4)).clamp(min=0).to(integer).view(dtype)
    g = torch.cat([g, -g])
    w, a = run(torch.zeros_like(g), [g], lr=1.0, threshold=threshold, epsilon=0.0, power=1.0)[-1]
    moves = torch.tensor([Fraction(x) ** 2 > Fraction(threshold) for x in g.tolist()])
    assert_same(a, torch.where(moves, g.abs().to(a.dtype), 0.0))
    assert_same(w, torch.where(moves, -g.sign(), 0.0))


@parametrize("apply_decay", [True, False])
@parametrize("dtype", DTYPES)
def test_gradient_at_the_threshold_does_nothing_and_the_next_float_does(dtype, apply_decay):
    at = torch.tensor([0.5, -0.5], dtype=dtype)
    g = torch.cat([at, at * (1 + torch.finfo(dtype).eps)])
    w, a = run(torch.zeros_like(g), [g], threshold=0.25, apply_decay=apply_decay)[-1]
    assert (w != 0).tolist() == (a != 0).tolist() == [False, False, True, True]


@parametrize(
    ("dtype", "tiny"),
    [
        (torch.float64, 1e-200),
        (torch.float32, 1e-30),
        (torch.bfloat16, 1e-30),
        (torch.float16, 1e-4),
    ],
)
@parametrize(("power", "epsilon"), [(1.0, 0.0), (2.0, 1.0)])
def test_gradient_whose_square_underflows_still_moves_its_weight(dtype, tiny, power, epsilon):
    g = torch.tensor([tiny, -tiny], dtype=dtype)
    assert not (g * g).any()
    w, _ = run(torch.zeros_like(g), [g], lr=1.0, power=power, epsilon=epsilon)[-1]
    assert_same(w.sign(), -g.sign())


@parametrize("power", [0.5, 1.0, 2.0, 3.0])
@parametrize("epsilon", [0.0, 1e-46, 1e-44, 0.1])
def test_zero_gradient_changes_nothing_even_without_threshold_and_epsilon(power, epsilon):
    """1e-46 is zero in float32, 1e-44 subnormal."""
    w, g = randn(2, dtype=torch.float32), torch.tensor([0.0, -0.0])
    assert_same(run(w, [g], epsilon=epsilon, power=power), [(w, torch.zeros_like(w))])


def test_history_that_underflows_gives_no_step_and_no_nan():
    w, a = run(torch.ones(2), [torch.tensor([1e-30, 0.5])], lr=0.1, epsilon=0.0, power=2.0)[-1]
    assert_close((w, a), (torch.tensor([1.0, 0.9]), torch.tensor([0.0, 0.25])))


def test_without_decay_the_accumulator_still_grows():
    grads = [randn(5, seed=s) for s in range(3)]
    _, a = run(randn(5), grads, power=3.0, apply_decay=False)[-1]
    assert_close(a, sum(g.abs() ** 3 for g in grads))


@given(case=cases(apply_decay=True))
@settings(deadline=None, max_examples=100)
def test_no_weight_moves_by_more_than_lr_in_a_step(case):
    w, grads, hyper = case
    for after, _ in run(w, grads, **hyper):
        assert torch.all((after - w).abs() <= hyper["lr"] * (1 + 1e-9) + 1e-14)
        w = after


@parametrize("power", [1.0, 2.0, 3.0])
@parametrize("epsilon", [0.0, 1e-46])
@parametrize("dtype", DTYPES[:2])
def test_no_weight_moves_by_more_than_lr_where_its_history_has_few_digits(dtype, epsilon, power):
    """The root is inexact where epsilon + |g|**power is subnormal; the bound must hold still."""
    info = torch.finfo(dtype)
    g = torch.linspace(0.5, 20, 1000, dtype=torch.float64) * (info.tiny * info.eps) ** (1 / power)
    g = g.to(dtype)
    w, _ = run(torch.zeros_like(g), [g], lr=1.0, epsilon=epsilon, power=power)[-1]
    assert w.abs().max() <= 1 + 1e-5


@given(
    grads=st.lists(st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3), min_size=1, max_size=40),
    epsilon=st.just(0.0) | st.floats(1e-6, 10),
    threshold=st.just(0.0) | st.floats(0, 1),
)
@settings(deadline=None, max_examples=100)
def test_with_power_1_the_whole_travel_is_bounded_by_a_logarithm(grads, epsilon, threshold):
    """Both ends of the logarithm include epsilon: A_start = epsilon + the first |g| let through."""
    series = torch.tensor(grads, dtype=torch.float64)
    start = torch.zeros_like(series[0])
    history = run(start, series, lr=0.3, epsilon=epsilon, threshold=threshold, power=1.0)
    travel = sum(abs(b - a).item() for (a, _), (b, _) in itertools.pairwise([(start, 0), *history]))
    totals = [epsilon + a.item() for _, a in history if a > 0]
    bound = 0.3 * (1 + math.log(totals[-1] / totals[0])) if totals else 0.0
    assert travel <= bound * (1 + 1e-9)


# The limit cases


def ten_steps(on, dtype, optimizer):
    if on == "random tensors":
        grads = [randn(5, 4, seed=s, dtype=dtype) for s in range(1, 11)]
        return [state[0] for state in run(randn(5, 4, dtype=dtype), grads, optimizer)]
    model = network(dtype)
    opt = optimizer(model.parameters())
    train(model, opt, range(10))
    return weights(opt)


@parametrize(("dtype", "rtol", "atol"), TOLERANCES)
@parametrize("maximize", [False, True])
@parametrize("epsilon", [1e-3, 0.7])
@parametrize("on", ["random tensors", "network"])
def test_power_2_is_adagrad(on, epsilon, maximize, dtype, rtol, atol):
    """«power=2, threshold=0 is AdaGrad (torch's, eps=0, initial_accumulator_value=epsilon)»."""
    common = {"lr": 0.1, "maximize": maximize}
    adagrad = partial(Adagrad, eps=0, initial_accumulator_value=epsilon, **common)
    classp = partial(CLASSPOptimizer, power=2, threshold=0, epsilon=epsilon, **common)
    expected = ten_steps(on, dtype, adagrad)
    assert_close(ten_steps(on, dtype, classp), expected, rtol=rtol, atol=atol)


@parametrize("dtype", DTYPES[:2])
@parametrize("maximize", [False, True])
@parametrize("on", ["random tensors", "network"])
def test_without_decay_it_is_sgd_bit_for_bit(on, maximize, dtype):
    """«apply_decay=False, threshold=0 is SGD exactly»."""
    common = {"lr": 0.1, "maximize": maximize}
    classp = partial(CLASSPOptimizer, apply_decay=False, threshold=0, **common)
    assert_same(ten_steps(on, dtype, classp), ten_steps(on, dtype, partial(SGD, **common)))


SCHEDULERS = {
    "StepLR": partial(lr_scheduler.StepLR, step_size=2, gamma=0.3),
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda epoch: 1 / (1 + epoch)),
    "OneCycleLR": partial(
        lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=12, cycle_momentum=False
    ),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=10),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=1),
}


@parametrize("scheduler", SCHEDULERS)
def test_learning_rate_schedulers_work_as_with_sgd(scheduler):
    models = network(), network()
    sgd = SGD(models[0].parameters(), lr=0.1)
    classp = CLASSPOptimizer(models[1].parameters(), lr=0.1, apply_decay=False)
    rates = [
        train(model, opt, range(10), SCHEDULERS[scheduler](opt))
        for model, opt in zip(models, (sgd, classp), strict=True)
    ]
    assert rates[0] == rates[1] and len(set(rates[0])) > 1
    assert_same(weights(classp), weights(sgd))


# Parameters and gradients of every kind


@parametrize("dtype", DTYPES)
@parametrize("shape", [(), (0,), (3, 0), (1,), (7,), (2, 3, 4, 5)])
def test_any_shape_and_dtype(shape, dtype):
    grads = [randn(*shape, seed=s, dtype=dtype) for s in range(3)]
    w, a = run(randn(*shape, dtype=dtype), grads, **HYPER)[-1]
    expected, _ = run(randn(*shape), [g.double() for g in grads], **HYPER)[-1]
    assert (w.shape, w.dtype, a.shape) == (shape, dtype, shape)
    assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(w.double(), expected, rtol=0, atol=0.05 if dtype in HALVES else 1e-6)


@parametrize("dtype", HALVES)
@parametrize("override", OVERRIDES)
def test_half_precision_takes_the_float32_step_and_rounds_the_weight_once(dtype, override):
    half, full = Parameter(randn(50, dtype=dtype)), Parameter(randn(50, dtype=dtype).float())
    # The same operations: a kernel takes float32 alone.
    hyper = HYPER | override | {"fused": False}
    opt, reference = (CLASSPOptimizer([p], **hyper) for p in (half, full))
    for seed in range(5):
        half.grad = randn(50, seed=seed, dtype=dtype)
        full.grad = half.grad.float()
        opt.step()
        reference.step()
        full.data = full.data.to(dtype).float()
        assert_same(half.detach().float(), full.detach())
        assert_same(accumulators(opt), accumulators(reference))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@parametrize("of_grad", LAYOUTS)
@parametrize("of_weight", ["transposed", "channels last"])
def test_memory_layout_does_not_matter(of_weight, of_grad):
    w = LAYOUTS[of_weight](randn(2, 3, 4, 5))
    grads = [LAYOUTS[of_grad](randn(2, 3, 4, 5, seed=s)) for s in range(3)]
    assert not (w.is_contiguous() or grads[0].is_contiguous())
    dense = [g.contiguous() for g in grads]
    expected = run(w.contiguous(), dense, **HYPER)
    assert_close(run(w, grads, **HYPER), expected, rtol=1e-13, atol=1e-15)


def as_sparse(g):
    return g.to_sparse()


@parametrize("layout", [torch.clone, as_sparse])
@parametrize("override", OVERRIDES)
def test_grad_is_never_modified(override, layout):
    g = layout(torch.tensor([[0.0, 0.05, 1.0, math.nan], [2.0, -1.0, -0.05, math.inf]]))
    before, version = g.clone(), g._version
    run(torch.ones(2, 4), [g], nonfinite="skip", **HYPER | override)
    assert g._version == version
    assert_same(g.to_dense(), before.to_dense(), equal_nan=True)


def test_parameter_without_grad_is_left_alone_and_gets_no_state():
    used, unused = Parameter(randn(3)), Parameter(randn(3))
    opt = CLASSPOptimizer([unused, used])
    used.grad = randn(3, seed=1)
    opt.step()
    assert_same(unused.detach(), randn(3))
    assert unused not in opt.state and used in opt.state


def test_empty_state_of_a_parameter_is_filled():
    """Avalanche leaves ``state[p] == {}`` for the parameters of a new head."""
    p = Parameter(randn(3))
    opt = CLASSPOptimizer([p], **HYPER)
    opt.state[p] = {}
    p.grad = randn(3, seed=1)
    opt.step()
    assert_same((*weights(opt), *accumulators(opt)), run(randn(3), [p.grad], **HYPER)[-1])


@parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_complex_and_integer_parameters_give_one_clear_error(dtype):
    good, other, bad = Parameter(randn(2)), Parameter(randn(2)), torch.zeros(2, dtype=dtype)
    with pytest.raises(TypeError, match=f"floating-point.*{dtype}"):
        CLASSPOptimizer([good, bad])
    opt = CLASSPOptimizer([good])
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(TypeError, match=f"floating-point.*{dtype}"):
        opt.add_param_group({"params": [other, bad]})
    assert opt.state_dict() == before
    opt.add_param_group({"params": [other]})
    assert len(opt.param_groups) == 2


# Sparse gradients


@parametrize("dtype", DTYPES)
@parametrize("override", OVERRIDES[3:])
def test_sparse_embedding_equals_the_dense_one(dtype, override):
    """Repeated indices too; the gradients are multiples of 1/4, exact to sum in any order."""
    models = [nn.Embedding(11, 7, sparse=sparse, dtype=dtype) for sparse in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    hyper = HYPER | {"power": 1.0} | override
    optimizers = [CLASSPOptimizer(model.parameters(), **hyper) for model in models]
    for seed in range(4):
        indices = torch.tensor([3, 3, 9, seed, 3, 10, 9])
        factors = (4 * randn(7, 7, seed=seed, dtype=dtype)).round() / 4
        for model, opt in zip(models, optimizers, strict=True):
            opt.zero_grad()
            (model(indices) * factors).sum().backward()
            assert model.weight.grad.is_sparse == model.sparse
            opt.step()
        assert_same(*map(weights, optimizers))
        assert_same(*map(accumulators, optimizers))


SPARSE = [((), 0), ((0, 3), 1), ((0, 3), 2), ((4,), 1), ((4, 3), 1), ((4, 3), 2), ((2, 3, 2), 2)]


@parametrize(("power", "rtol"), [(0.5, 1e-13), (1.0, 0), (2.0, 0), (3.0, 1e-13)])
@parametrize(("shape", "sparse_dim"), SPARSE)
def test_sparse_gradient_of_any_shape_equals_the_dense_one(shape, sparse_dim, power, rtol):
    """Torch's pow differs in the last bit between vectorised and single elements, hence rtol."""
    grads = [randn(*shape, seed=s) for s in range(3)]
    sparse = [g.to_sparse(sparse_dim) for g in grads]
    hyper = HYPER | {"power": power}
    dense = run(randn(*shape), grads, **hyper)
    assert_close(run(randn(*shape), sparse, **hyper), dense, rtol=rtol, atol=0)


def uncoalesced(values, dtype=torch.float64):
    """Return a gradient of shape (3,) with all the values on entry 1."""
    values = torch.tensor(values, dtype=dtype)
    return torch.sparse_coo_tensor([[1] * len(values)], values, (3,), check_invariants=True)


@parametrize("threshold", [0.0, 1.0])
def test_uncoalesced_gradient_counts_as_its_sum(threshold):
    """0.75 + 0.75 is above the threshold 1, 0.75 is not, and 1.5 − 1.5 is no gradient."""
    hyper = HYPER | {"threshold": threshold}
    parts = [[0.75, 0.75], [1.5, -1.5], [2.0, -0.25]]
    dense = [torch.tensor([0.0, sum(values), 0.0]).double() for values in parts]
    assert_close(run(randn(3), map(uncoalesced, parts), **hyper), run(randn(3), dense, **hyper))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_csr_gradient_gives_one_clear_error_and_changes_nothing():
    """Only a CSR parameter can have one."""
    dense, csr = Parameter(randn(2, 3)), Parameter(randn(2, 3).to_sparse_csr())
    opt = CLASSPOptimizer([dense, csr])
    dense.grad, csr.grad = randn(2, 3), randn(2, 3).to_sparse_csr()
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*sparse_csr"):
        opt.step()
    assert_same(dense.detach(), randn(2, 3))
    assert not opt.state


# Non-finite gradients

BAD = [
    (dtype, bad, power)
    for dtype in DTYPES
    for bad, power in [(math.nan, 1), (math.inf, 1), (-math.inf, 2), (1e25, 2), (-1e20, 3)]
    if dtype != torch.float64 or not math.isfinite(bad)
]


@parametrize("layout", [torch.clone, as_sparse])
@parametrize(("dtype", "bad", "power"), BAD)
def test_nonfinite_gradient_raises_by_name_before_anything_has_changed(dtype, bad, power, layout):
    named = [(name, Parameter(randn(3, dtype=dtype))) for name in ("one", "two", "three", "four")]
    opt = CLASSPOptimizer([{"params": named[:1]}, {"params": named[1:]}], power=power)
    for _, p in named:
        p.grad = layout(randn(3, seed=1, dtype=dtype))
    opt.step()
    before = weights(opt), accumulators(opt)
    named[2][1].grad = layout(torch.tensor([0.5, bad, 0.5], dtype=dtype))
    with pytest.raises(RuntimeError, match=r"non-finite.*'three' 1 of group 1"):
        opt.step()
    assert_same((weights(opt), accumulators(opt)), before)


@parametrize("layout", [torch.clone, as_sparse])
@parametrize(("dtype", "bad", "power"), BAD)
@parametrize("apply_decay", [True, False])
def test_skip_leaves_exactly_the_bad_entries(apply_decay, dtype, bad, power, layout):
    w, grads = randn(2, 3, dtype=dtype), [randn(2, 3, seed=s, dtype=dtype) for s in range(3)]
    grads[0][1, 2] = grads[1][0, 1] = bad
    hyper = HYPER | {"power": power, "apply_decay": apply_decay, "nonfinite": "skip"}
    assert_follows_the_oracle(w, grads, 1e-5, 0.03 if dtype in HALVES else 1e-6, **hyper)
    assert_close(run(w, map(layout, grads), **hyper), run(w, grads, **hyper))


@parametrize("nonfinite", ["raise", "skip"])
def test_sum_of_finite_sparse_parts_that_overflows_is_nonfinite(nonfinite):
    p = Parameter(torch.ones(3))
    p.grad = uncoalesced([3e38, 3e38], torch.float32)
    opt = CLASSPOptimizer([p], nonfinite=nonfinite)
    if nonfinite == "skip":
        opt.step()
    else:
        with pytest.raises(RuntimeError, match="non-finite"):
            opt.step()
    assert_same(p.detach(), torch.ones(3))


def test_nonfinite_is_a_setting_of_each_group():
    lenient, strict = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    opt = CLASSPOptimizer([{"params": [lenient], "nonfinite": "skip"}, {"params": [strict]}])
    lenient.grad, strict.grad = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])
    opt.step()
    assert (lenient != 1).tolist() == [False, True] and (strict != 1).all()
    before = weights(opt), accumulators(opt)
    strict.grad = lenient.grad
    with pytest.raises(RuntimeError, match="parameter 0 of group 1"):
        opt.step()
    assert_same((weights(opt), accumulators(opt)), before)


@parametrize("nonfinite", ["raise", "skip"])
@given(
    grads=st.lists(st.floats(width=32) | st.floats(-10, 10, width=32), max_size=6),
    power=st.sampled_from([1.0, 2.0]) | st.floats(0.5, 4),
)
@example(grads=[math.inf, 1e25, math.nan, 1.0], power=2.0)
@example(grads=[1.8e19] * 3, power=2.0)
@settings(deadline=None, max_examples=100)
def test_weights_and_accumulators_are_always_finite(grads, power, nonfinite):
    """Whatever gradients come, one by one or summed up: an infinite A freezes its weight."""
    p = Parameter(torch.zeros(()))
    opt = CLASSPOptimizer([p], power=power, nonfinite=nonfinite)
    for g in grads:
        p.grad = torch.tensor(g)
        try:
            opt.step()
        except RuntimeError:
            assert nonfinite == "raise"
    assert all(x is None or x.isfinite() for x in weights(opt) + accumulators(opt))


# Consolidation


def test_consolidated_with_power_2_it_is_adagrad_with_its_sum_multiplied():
    w, grads = randn(5, 3), randn(8, 5, 3, seed=1)
    ours, theirs = Parameter(w.clone()), Parameter(w.clone())
    optimizer = CLASSPOptimizer([ours], lr=0.1, epsilon=0.0, power=2.0)
    adagrad = Adagrad([theirs], lr=0.1, eps=0.0)
    for i, g in enumerate(grads):
        if i in (3, 6):
            optimizer.consolidate(7)
            adagrad.state[theirs]["sum"] *= 7
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        adagrad.step()
    assert_close(ours, theirs)


@parametrize("dtype", DTYPES)
def test_however_often_it_is_called_accumulators_stay_finite_and_never_shrink(dtype):
    p, untouched = Parameter(randn(4, dtype=dtype)), Parameter(randn(2))
    optimizer = CLASSPOptimizer([p, untouched], lr=0.1)
    p.grad = torch.tensor([1.0, -0.1, 0.0, 2.0], dtype=dtype)
    optimizer.step()
    accumulator = optimizer.state[p]["accumulator"]
    ceiling = torch.finfo(accumulator.dtype).max ** 0.5
    accumulator[3] = high = 4 * ceiling
    before = accumulator.clone()
    optimizer.consolidate(1)
    assert_same(accumulator, before)
    for _ in range(200):
        optimizer.consolidate(1e3)
    assert accumulator.tolist() == pytest.approx([ceiling, ceiling, 0.0, high])
    assert optimizer.state[p]["accumulator"] is accumulator and not optimizer.state[untouched]
    optimizer.step()
    assert p.isfinite().all()


@parametrize(
    ("factor", "error"),
    [(0.5, ValueError), (math.nan, ValueError), ("2", TypeError)],
)
def test_a_wrong_factor_is_named_and_changes_nothing(factor, error):
    p = Parameter(randn(4))
    optimizer = CLASSPOptimizer([p])
    p.grad = randn(4, seed=1)
    optimizer.step()
    before = accumulators(optimizer)
    with pytest.raises(error, match=f"factor must be .*{str(factor)[:20]}"):
        optimizer.consolidate(factor)
    assert_same(accumulators(optimizer), before)


# The optimizer interface


@parametrize("added_later", [False, True])
@parametrize("override", OVERRIDES)
def test_every_keyword_is_a_setting_of_each_group(override, added_later):
    """The overriding group stands between two others, so that no value can leak unseen."""
    overrides = [{}, override, {}]
    groups = [{"params": [Parameter(randn(6))]} | o for o in overrides]
    opt = CLASSPOptimizer(groups[:1] if added_later else groups, **HYPER)
    for group in groups[1:] if added_later else []:
        opt.add_param_group(group)
    grads = [randn(6, seed=s) for s in range(1, 4)]
    for g in grads:
        for group in groups:
            group["params"][0].grad = g
        opt.step()
    alone = [run(randn(6), grads, **HYPER | o)[-1][0] for o in overrides]
    assert_same(weights(opt), alone)
    assert not torch.equal(alone[0], alone[1])


def test_step_returns_the_loss_of_the_closure_and_runs_it_with_grad_enabled():
    p = Parameter(torch.ones(2))
    opt = CLASSPOptimizer([p])

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert opt.step(closure).item() == 2.0
    assert (p < 1).all()
    assert opt.step() is None


@parametrize("set_to_none", [True, False])
def test_zero_grad_leaves_nothing_to_do(set_to_none):
    p = Parameter(randn(3))
    p.grad = randn(3, seed=1)
    opt = CLASSPOptimizer([p])
    opt.zero_grad(set_to_none=set_to_none)
    opt.step()
    assert (p.grad is None) == (p not in opt.state) == set_to_none
    assert_same(p.detach(), randn(3))


def via_state_dict(model, opt, transport=lambda state: state):
    model = copy.deepcopy(model)
    other = CLASSPOptimizer(model.parameters(), lr=9.0, power=7.0)
    other.load_state_dict(transport(opt.state_dict()))
    return model, other


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


CARRIERS = {
    "state_dict": via_state_dict,
    "torch.save": partial(via_state_dict, transport=through_a_file),
    "deepcopy": lambda *pair: copy.deepcopy(pair),
    "pickle": lambda *pair: pickle.loads(pickle.dumps(pair)),
}


@parametrize("carrier", CARRIERS)
@parametrize("dtype", DTYPES)
def test_copy_continues_bit_for_bit_and_shares_nothing(dtype, carrier):
    """The copy runs first: if it shared an accumulator, the original would feel it."""
    hyper = HYPER | {"threshold": 1e-8}
    whole, parted = network(dtype), network(dtype)
    uninterrupted = CLASSPOptimizer(whole.parameters(), **hyper)
    original = CLASSPOptimizer(parted.parameters(), **hyper)
    train(whole, uninterrupted, range(6))
    train(parted, original, range(3))
    for model, opt in (CARRIERS[carrier](parted, original), (parted, original)):
        train(model, opt, range(3, 6))
        assert_same(weights(opt), weights(uninterrupted))
        assert_same(accumulators(opt), accumulators(uninterrupted))


def test_load_state_dict_loads_what_a_pre_hook_returns():
    """As in torch's own optimizers, whose documentation recommends such hooks."""
    p, loaded = Parameter(randn(3)), torch.full((3,), 5.0, dtype=torch.float64)
    opt = CLASSPOptimizer([p])
    p.grad = randn(3, seed=1)
    opt.step()
    opt.register_load_state_dict_pre_hook(
        lambda _, state: state | {"state": {0: {"accumulator": loaded}}}
    )
    opt.load_state_dict(opt.state_dict())
    assert_same(accumulators(opt), [loaded])


@parametrize("value", [1, "text", [1, 2], {"x": 1}, None])
@parametrize("key", ["note", 7])
def test_entries_of_the_users_own_pass_through_a_state_dict(key, value):
    model, other = network(), network()
    opt, new = (CLASSPOptimizer(m.parameters(), **HYPER) for m in (model, other))
    train(model, opt, range(2))
    opt.state[key] = value
    opt.load_state_dict(opt.state_dict())
    new.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    other.load_state_dict(model.state_dict())
    assert opt.state[key] == new.state[key] == value
    for m, o in ((model, opt), (other, new)):
        train(m, o, range(2, 4))
    assert_same(accumulators(opt), accumulators(new))


def test_none_stands_for_the_default():
    nothing = dict.fromkeys(("lr", "threshold", "epsilon", "power", "apply_decay", "nonfinite"))
    given, plain = (CLASSPOptimizer([Parameter(randn(2))], **h) for h in (nothing, {}))
    assert given.defaults == plain.defaults
    assert plain.defaults["lr"] == 1e-3 and plain.defaults["nonfinite"] == "raise"


def test_authors_name_and_keywords_and_positional_lr():
    assert issubclass(CLASSP_optimizer, CLASSPOptimizer)
    by_keyword = CLASSP_optimizer([Parameter(randn(2))], lr=1, threshold=2, epsilon=3, power=4)
    by_place = CLASSPOptimizer([Parameter(randn(2))], 1, 2, 3, 4)
    assert by_keyword.defaults == by_place.defaults
    assert [by_place.defaults[k] for k in ("lr", "threshold", "epsilon", "power")] == [1, 2, 3, 4]


def test_lr_may_be_a_tensor_of_one_element():
    grads = [randn(3, seed=1)]
    assert_same(run(randn(3), grads, lr=torch.tensor(0.5)), run(randn(3), grads, lr=0.5))


NOT_NUMBERS = [-1, math.nan, math.inf, "x", [0.1], True, 1j]
WRONG = [
    *itertools.product(["lr", "threshold", "epsilon", "power"], NOT_NUMBERS),
    *[("lr", torch.tensor([0.25, 0.5])), ("lr", torch.tensor(-0.5)), ("power", 0), ("power", 0.0)],
    *itertools.product(["apply_decay", "maximize"], [1, 0, "yes", [True]]),
    *[("nonfinite", "bogus"), ("nonfinite", 3), ("nonfinite", True)],
]


@parametrize("place", ["constructor", "group", "add_param_group"])
@parametrize(("name", "value"), WRONG)
def test_wrong_value_raises_naming_the_argument_and_the_value(name, value, place):
    """Of a tensor with two elements the shape is what is wrong."""
    opt = CLASSPOptimizer([Parameter(randn(2))])
    group = {"params": [Parameter(randn(2))], name: value}
    build = {
        "constructor": lambda: CLASSPOptimizer(**group),
        "group": lambda: CLASSPOptimizer([group]),
        "add_param_group": lambda: opt.add_param_group(group),
    }
    if isinstance(value, torch.Tensor):
        value = value.item() if value.ndim == 0 else tuple(value.shape)
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b.*{re.escape(repr(value))}"):
        build[place]()
    assert len(opt.param_groups) == 1


@parametrize(("dtype", "goes_on"), [(torch.float32, False), (torch.float64, True)])
@parametrize("fused", [None, False])
def test_a_float32_accumulator_stops_at_2_to_the_24_and_its_weight_with_it(dtype, goes_on, fused):
    p = Parameter(torch.full((3,), 0.5, dtype=dtype))
    opt = CLASSPOptimizer([p], lr=0.01, power=1.0, fused=fused)
    p.grad = torch.ones_like(p)
    opt.step()
    opt.state[p]["accumulator"].fill_(2**24 - 2)
    opt.step()
    opt.step()
    assert_same(accumulators(opt), [torch.full((3,), 2.0**24, dtype=dtype)])
    before = weights(opt)
    opt.step()
    assert (accumulators(opt)[0] > 2**24).tolist() == [goes_on] * 3
    assert (weights(opt)[0] != before[0]).tolist() == [goes_on] * 3


# Models


class Last(nn.Module):
    """Classify the last output of a sequence model."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(8, 3)

    def forward(self, x):
        out = self.body(x)
        return self.head((out[0] if isinstance(out, tuple) else out)[:, -1])


ENCODER_LAYER = partial(nn.TransformerEncoderLayer, 8, 2, 16, dropout=0.0, batch_first=True)
MODELS = {
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)),
    "CNN": lambda: nn.Sequential(
        *(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 3)),
    ),
    "LSTM": lambda: Last(nn.LSTM(8, 8, batch_first=True)),
    "Transformer": lambda: Last(nn.TransformerEncoder(ENCODER_LAYER(), 2)),
}


@parametrize("override", [{"power": 1.0}, {"power": 2.0}, {"threshold": 1e-8}])
@parametrize("model", MODELS)
def test_every_kind_of_model_learns(model, override):
    torch.manual_seed(0)
    net = MODELS[model]()
    x, y = randn(48, 8, 8, dtype=torch.float32), torch.arange(48) % 3
    x[torch.arange(48), -1, y] += 3
    opt = CLASSPOptimizer(net.parameters(), lr=0.1, epsilon=1e-4, **override)
    losses = []
    for _ in range(60):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


# The module and the package


def test_docstring_example_runs():
    result = doctest.testmod(module)
    assert result.attempted >= 5 and result.failed == 0


@pytest.mark.slow
def test_import_does_not_import_avalanche():
    code = (
        "import sys, torch, avalanche_classp as ac;"
        "ac.CLASSPOptimizer([torch.nn.Parameter(torch.ones(1))]); dir(ac);"
        "assert 'avalanche' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_package_lists_its_public_names_and_no_others():
    names = {"CLASSPOptimizer", "CLASSP_optimizer", "CLASSPPlugin", "CLASSP", "PAPER_PHASES"}
    assert names <= set(dir(avalanche_classp)) == set(avalanche_classp.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = avalanche_classp.no_such_name
