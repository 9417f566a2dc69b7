"""Every faster path against the rule's own loop, and the kernel's life on disk."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import warnings
from functools import lru_cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.testing import assert_close

from avalanche_classp import CLASSPOptimizer, NonFiniteGradientError, carry_accumulators
from avalanche_classp.optim import backends
from avalanche_classp.optim.accumulators import diagonal
from avalanche_classp.optim.backends import compiled, multi_tensor, single_tensor
from avalanche_classp.optim.backends import cpu_kernel as kernel
from avalanche_classp.optim.rule import Rule, classp_update_, largest_usable_gradient

parametrize = pytest.mark.parametrize
assert_same = partial(assert_close, rtol=0, atol=0)
PLAIN = Rule(lr=0.05, threshold=0.01, epsilon=0.1, power=1.0, apply_decay=True)
RULES = [
    PLAIN,
    PLAIN._replace(power=2.0),
    PLAIN._replace(power=1.5),
    PLAIN._replace(power=0.5),
    PLAIN._replace(power=3.0),
    PLAIN._replace(power=1.3),
    PLAIN._replace(threshold=0.0),
    PLAIN._replace(apply_decay=False),
    PLAIN._replace(maximize=True),
    PLAIN._replace(epsilon=0.0),
    PLAIN._replace(epsilon=0.0, power=2.0),
    PLAIN._replace(epsilon=0.0, power=1.5),
    PLAIN._replace(epsilon=0.0, power=1.3),
    PLAIN._replace(epsilon=1e-30, power=0.6),
    PLAIN._replace(skip_nonfinite=True),
    PLAIN._replace(skip_nonfinite=True, power=2.0, threshold=0.0),
]
HALVES = (torch.float16, torch.bfloat16)
BACKENDS = {
    "loop": single_tensor.update_,
    "blocks": single_tensor.update_in_blocks_,
    "foreach": multi_tensor.update_,
    "kernel": kernel.update_,
    "compiled": compiled.update_,
}
COMPILED = pytest.param("compiled", marks=pytest.mark.slow)


@lru_cache(maxsize=1)
def is_exact() -> bool:
    """Tell whether powers 1 and 2 of the kernel give the rule's own bits on this machine.

    They do where torch's vectorized operations fuse multiplication and addition, as on every
    x86-64 processor with AVX2.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    for dtype in kernel._SUFFIXES:
        for power in (1.0, 2.0):
            for epsilon in (1e-4, 0.0):
                rule = Rule(0.0137, 0.01, epsilon, power, apply_decay=True)
                p, g, a = torch.randn(
                    3, 1021, generator=generator, dtype=dtype, device="cpu"
                ).unbind()
                ours = (p.clone(), g, a.abs())
                theirs = (p.clone(), g, a.abs())
                kernel.update_([ours], rule)
                classp_update_(*theirs, rule)
                if not (torch.equal(ours[0], theirs[0]) and torch.equal(ours[2], theirs[2])):
                    return False
    return True


def forget_the_kernel():
    for cached in (kernel._path, kernel._library, kernel._compile_once, is_exact):
        cached.cache_clear()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Begin as on a machine without a kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_the_kernel()
    yield tmp_path / "avalanche_classp"
    monkeypatch.undo()
    forget_the_kernel()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the kernel once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        forget_the_kernel()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            there = kernel.build()
        yield there
    forget_the_kernel()


@pytest.fixture
def with_kernel(built):
    if not built:
        pytest.skip("no C++ compiler here")


@pytest.fixture(params=["blocks", "foreach", "kernel", COMPILED])
def path(request, monkeypatch):
    """A path that is to do what the loop does."""
    if request.param == "kernel":
        request.getfixturevalue("with_kernel")
    if request.param == "blocks":
        monkeypatch.setattr(single_tensor, "_BLOCK", 64)
        monkeypatch.setattr(single_tensor, "_SMALL", 1)
        monkeypatch.setattr(single_tensor, "_kept", type("Kept", (), {})())
    if request.param == "compiled":  # traced as for a GPU, but run by eager operations
        torch._dynamo.reset()
        traced = torch.compile(compiled.compilable_update_, backend="eager")
        monkeypatch.setattr(compiled, "_compiled", lambda: traced)
    return request.param


def take(path, triples, rule):
    with torch.no_grad():
        BACKENDS[path](triples, rule)


def a_triple(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, shape, generator=generator, dtype=torch.float64)
    g = torch.where(draw() < -1, 0.0, draw())
    history = torch.float64 if dtype == torch.float64 else torch.float32
    return draw().to(dtype), g.to(dtype), (draw().abs() * (draw() > 0)).to(history)


def copies(triples):
    return [tuple(t.clone() for t in triple) for triple in triples]


def after_the_loop(triples, rule):
    triples = copies(triples)
    take("loop", triples, rule)
    return triples


def assert_alike(path, some, others, rule):
    """Compare to the last bit, where the same operations are done, or else closely."""
    # torch's own pow rounds otherwise where a vector of entries ends.
    exact = rule.power in (1, 2) and (
        path in ("blocks", "foreach") or (path == "kernel" and is_exact())
    )
    for triple, other in zip(some, others, strict=True):
        half = triple[0].dtype in HALVES
        wide = triple[0].dtype == torch.float64
        rtol = 1e-2 if half else 1e-12 if wide else 1e-5
        tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": rtol, "atol": rtol / 10}
        assert_close(triple, other, **tolerances, equal_nan=True)


# Equal to the loop


@parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@parametrize("rule", RULES)
def test_path_does_what_the_loop_does(path, rule, dtype):
    shapes = [(), (0,), (1,), (63,), (64,), (65,), (3, 1), (5, 7, 11), (2, 130)]
    triples = [a_triple(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    expected = after_the_loop(triples, rule)
    grads = [g.clone() for _, g, _ in triples]
    take(path, triples, rule)
    assert_alike(path, triples, expected, rule)
    assert_same([g for _, g, _ in triples], grads)


@parametrize("dtype", [torch.float32, torch.float64])
@parametrize("power", [0.6, 1.3, 1.5, 2.7])
def test_weights_below_the_threshold_keep_every_bit(path, power, dtype):
    p, g, a = a_triple((200,), dtype)
    g = torch.where(g.abs() > 1, g, 0.05 * g)  # the threshold is 0.1², and many are 0
    triples = [(p, g, a)]
    (before,) = copies(triples)
    take(path, triples, PLAIN._replace(power=power))
    still = g.abs() < 0.1
    assert 50 < still.sum() < 190
    assert_same((p[still], a[still]), (before[0][still], before[2][still]))
    assert not torch.equal(a, before[2])


@parametrize("path", ["loop", "blocks", "foreach", "kernel", COMPILED], indirect=True)
@parametrize("power", [0.5, 1.5, 3.0])
def test_powers_with_a_short_way_differ_from_the_formula_by_rounding_alone(path, power):
    sizes = 10.0 ** torch.linspace(-28, 4, 4001, dtype=torch.float64)
    g = (sizes * (-1) ** torch.arange(4001)).float()
    p, a = torch.zeros(4001), torch.zeros(4001)
    take(path, [(p, g, a)], PLAIN._replace(threshold=0.0, power=power, epsilon=1e-8))
    A = g.double().abs() ** power
    moved = -PLAIN.lr * g.double() / (1e-8 + A) ** (1 / power)
    # Eight times what one operation may be off; and what float32 holds with fewer digits.
    assert_close(a.double(), A, rtol=8 * 2**-23, atol=1e-44)
    assert_close(p.double(), moved, rtol=8 * 2**-23, atol=1e-44)


@parametrize("rule", [r for r in RULES if r.skip_nonfinite])
def test_path_skips_what_the_loop_skips(path, rule):
    triples = [a_triple((200,)), a_triple((3,))]
    limit = largest_usable_gradient(torch.float32, rule.power)
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.01 * limit, -1.01 * limit, limit])
    triples[0][1][7:13] = bad
    expected = after_the_loop(triples, rule)
    take(path, triples, rule)
    assert_alike(path, triples, expected, rule)
    assert torch.isfinite(triples[0][0]).all() and torch.isfinite(triples[0][2]).all()


@given(
    data=st.data(),
    power=st.sampled_from([1.0, 2.0, 0.5, 1.5, 3.0]) | st.floats(0.3, 4),
    epsilon=st.sampled_from([0.0, 1e-45, 1e-30]) | st.floats(1e-8, 10),
    threshold=st.just(0.0) | st.floats(0, 2),
    apply_decay=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_kernel_and_blocks_do_what_the_loop_does(built, data, power, epsilon, threshold, **flags):
    element = st.floats(-30, 30, width=32) | st.sampled_from([0.0, -0.0, 1e-30, -1e-38, 3e-45])
    gradients = data.draw(st.lists(element, min_size=1, max_size=40))
    g = torch.tensor(gradients)
    triple = (torch.ones(len(g)), g, g.roll(1).abs())
    rule = Rule(0.1, threshold, epsilon, power, **flags)
    expected = after_the_loop([triple], rule)
    for name in ["blocks", "kernel"] if built else ["blocks"]:
        after = copies([triple])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(single_tensor, "_SMALL", 0)
            take(name, after, rule)
        assert_alike(name, after, expected, rule)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda t: torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[
        ..., ::2
    ].copy_(t),
}


@parametrize("rule", RULES[:3])
@parametrize("which", [(0, 1, 2), (0, 2), (1,)])
@parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(path, layout, which, rule):
    plain = a_triple((4, 6, 5, 3))
    expected = after_the_loop([plain], rule)
    triple = tuple(LAYOUTS[layout](t) if i in which else t for i, t in enumerate(plain))
    take(path, [triple], rule)
    assert_alike(path, [triple], expected, rule)


@parametrize("threads", [1, 2, 3])
@parametrize("rule", RULES[:3])
def test_large_parameters_on_several_threads(path, rule, threads, monkeypatch):
    monkeypatch.undo()  # blocks of their real size
    triples = [a_triple((n,), seed=n) for n in (70_001, 3, 600_011, 0, 31)]
    expected = after_the_loop(triples, rule)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if path == "compiled":
            path = "foreach"  # its tracing has nothing to do with threads
        take(path, triples, rule)
    finally:
        torch.set_num_threads(before)
    assert_alike(path, triples, expected, rule)


def test_powers_1_and_2_of_the_kernel_are_exact_where_torch_fuses(with_kernel):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch does not fuse multiplication and addition here")
    assert is_exact()


def test_compiled_path_traces_once_whatever_the_learning_rate(monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    traced = torch.compile(compiled.compilable_update_, backend=note, fullgraph=True)
    monkeypatch.setattr(compiled, "_compiled", lambda: traced)
    for lr in (0.1, 0.2, 0.3):
        take("compiled", [a_triple((5,)), a_triple((2, 3))], PLAIN._replace(lr=lr))
    assert len(graphs) == 1


# The optimizer


def mixed_parameters():
    """Make parameters of every kind, with gradients."""
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 3, 3])).sum().backward()
    params = [embedding.weight]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for p in (torch.randn(6, 4, dtype=dtype), torch.randn(4, 6, dtype=dtype).mT):
            params.append(Parameter(p))
            params[-1].grad = torch.randn(6, 4).to(dtype)
    params.append(Parameter(torch.randn(2)))  # without a gradient
    return params


@parametrize("choice", [{}, {"fused": True}, {"fused": False}, {"foreach": True}])
@parametrize("power", [1.0, 2.0, 1.3])
def test_optimizer_takes_the_same_steps_on_every_path(built, choice, power):
    some, others = mixed_parameters(), mixed_parameters()
    fast = CLASSPOptimizer(some, lr=0.1, power=power, threshold=1e-3, **choice)
    slow = CLASSPOptimizer(others, lr=0.1, power=power, threshold=1e-3, foreach=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not built else "error")
        for _ in range(3):
            fast.step()
            slow.step()
    assert_close(some, others, rtol=1e-6, atol=1e-7)


@parametrize(
    ("device", "foreach", "fused", "with_a_kernel", "expected"),
    [
        ("cpu", None, None, True, "kernel"),
        ("cpu", None, None, False, "blocks"),
        ("cpu", None, False, True, "blocks"),
        ("cpu", None, True, True, "kernel"),
        ("cpu", None, True, False, "blocks"),
        ("cpu", False, None, True, "loop"),
        ("cpu", True, None, True, "foreach"),
        ("cpu", False, True, True, "kernel"),
        ("cuda", None, None, True, "foreach"),
        ("cuda", None, False, True, "foreach"),
        ("cuda", False, None, True, "loop"),
        ("cuda", None, True, True, "compiled"),
        ("meta", None, None, True, "loop"),
    ],
)
def test_choice_of_the_path(monkeypatch, device, foreach, fused, with_a_kernel, expected):
    monkeypatch.setattr(kernel, "found", lambda: with_a_kernel)
    monkeypatch.setattr(kernel, "build", lambda: with_a_kernel)
    chosen = backends.choose_backend(torch.device(device), foreach, fused)
    assert chosen is BACKENDS[expected]


def test_fused_false_keeps_away_from_a_kernel_that_lies_ready(with_kernel, monkeypatch):
    monkeypatch.setattr(kernel, "_library", lambda: pytest.fail("takes the kernel"))
    CLASSPOptimizer(mixed_parameters(), fused=False).step()


def test_default_never_compiles(empty_cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiles"))
    CLASSPOptimizer(mixed_parameters()).step()
    assert not empty_cache.exists()


@parametrize("choice", [{}, {"fused": True}, {"fused": False}, {"foreach": True}])
@parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e35])
def test_unusable_gradient_changes_nothing_on_any_path(built, choice, bad):
    params = mixed_parameters()
    optimizer = CLASSPOptimizer(params, **choice)
    before = [p.detach().clone() for p in params]
    params[2].grad[3, 1] = bad
    params[3].grad[0, 0] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first_wide = 3 if bad == 1e35 else 2
        with pytest.raises(NonFiniteGradientError, match=r"parameter 2 of group 0.*of 7"):
            optimizer.step()
    assert first_wide and not optimizer.state
    assert_same(params, before)


@parametrize("fused", [None, False])
@parametrize("threads", [1, 2])
@parametrize("value", [torch.nan, torch.inf, -torch.inf, 11.0, -11.0])
@parametrize("dtype", [torch.float32, torch.float64])
def test_every_unusable_entry_is_found(built, dtype, value, threads, fused):
    find = partial(backends.find_nonfinite, limits=[10.0] * 3, fused=[fused] * 3)
    sizes = [3, 100_003, 40]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for k, size in enumerate(sizes):
            for place in {0, 1, size // 2, size - 1}:
                grads = [torch.full((n,), -10.0, dtype=dtype) for n in sizes]
                assert find(grads) == []
                grads[k][place] = value
                assert find(grads) == [k]
    finally:
        torch.set_num_threads(before)


def test_autograd_notices_a_step_between_forward_and_backward(with_kernel):
    p = Parameter(torch.tensor([2.0]))
    p.grad = torch.ones(1)
    loss = (p * p).sum()
    CLASSPOptimizer([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_step_on_a_gpu_does_not_wait_for_it():
    with FakeTensorMode():  # reading a value of a fake tensor is an error
        p = Parameter(torch.randn(4, 3, device="cuda"))
        p.grad = torch.randn(4, 3, device="cuda")
        CLASSPOptimizer([p], threshold=1e-3, nonfinite="skip").step()
        # What has no values cannot be checked, as with torch's own optimizers.
        CLASSPOptimizer([p]).step()


@parametrize("history", ["weights", "gradients"])
@parametrize("nonfinite", ["raise", "skip"])
def test_without_values_everything_but_the_check_of_values_runs(history, nonfinite):
    with FakeTensorMode():
        model, larger = nn.Linear(6, 5), nn.Linear(6, 7)
        optimizer, new = (
            CLASSPOptimizer(m.parameters(), nonfinite=nonfinite, history=history)
            for m in (model, larger)
        )
        for _ in range(2):
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
        optimizer.consolidate(2.0)
        optimizer.load_state_dict(optimizer.state_dict())
        carry_accumulators(optimizer, model.named_parameters(), new, larger.named_parameters())
        assert diagonal(new.state[larger.weight], larger.weight).shape == (7, 6)


@parametrize("choice", [{"fused": False}, {"fused": True}])
@parametrize("power", [1.0, 1.5])
def test_memory_of_a_step_does_not_grow_with_the_model(with_kernel, choice, power):
    def peak(entries):
        p = Parameter(torch.ones(entries))
        p.grad = torch.ones(entries)
        optimizer = CLASSPOptimizer([p], power=power, **choice)
        optimizer.step()  # makes the accumulators
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            optimizer.step()
        held = highest = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                highest = max(highest, held)
        return highest

    assert peak(4_000_000) <= peak(1_000_000) + 1024 <= 2**20


# The kernel on disk


@pytest.mark.slow
def test_kernel_is_built_once_announced_and_found_by_the_next_process(
    with_kernel, empty_cache, caplog
):
    with caplog.at_level(logging.WARNING):
        assert not kernel.found()
        assert kernel.build()
    assert "compiling the fused CLASSP step" in caplog.text
    (made,) = empty_cache.iterdir()
    assert made.stat().st_mode & 0o077 == 0
    script = (
        "import subprocess, sys\n"
        "subprocess.run = None\n"
        "from avalanche_classp.optim.backends import cpu_kernel as kernel\n"
        "sys.exit(not (kernel.found() and kernel.build()))"
    )
    assert subprocess.call([sys.executable, "-c", script]) == 0


@pytest.mark.slow
def test_kernel_can_be_built_ahead_of_time(with_kernel, empty_cache):
    command = [sys.executable, "-m", "avalanche_classp.build_kernel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert len(list(empty_cache.iterdir())) == 1


@pytest.mark.slow
@parametrize("missing", ["-DCLASSP_VECTOR_CBRT", "-fopenmp"])
def test_kernel_is_built_with_what_the_machine_has(with_kernel, empty_cache, monkeypatch, missing):
    compiler = os.environ.get("CXX") or next(filter(shutil.which, kernel._COMPILERS))
    poorer = empty_cache.parent / "poorer"
    poorer.write_text(
        f'#!/bin/sh\ncase " $* " in *" {missing} "*) exit 1;; esac\nexec {compiler} "$@"\n'
    )
    poorer.chmod(0o700)
    monkeypatch.setenv("CXX", str(poorer))
    assert kernel.build()
    for power in (1.3, 1.5):
        rule = PLAIN._replace(power=power)
        triples = [a_triple((1000,))]
        expected = after_the_loop(triples, rule)
        take("kernel", triples, rule)
        assert_alike("kernel", triples, expected, rule)


@parametrize("compiler", [None, "false", "/does/not/exist"])
def test_without_a_working_compiler_one_warning_says_why(
    empty_cache, monkeypatch, compiler, caplog
):
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
    params, others = mixed_parameters(), mixed_parameters()
    optimizer = CLASSPOptimizer(params, fused=True)
    with pytest.warns(UserWarning, match="fused=True has no compiled kernel, because") as caught:
        optimizer.step()
        optimizer.step()
    assert len(caught) == 1
    slow = CLASSPOptimizer(others, foreach=False)
    slow.step()
    slow.step()
    assert_same(params, others)
    assert not any(p.suffix == ".so" for p in empty_cache.glob("*"))


def test_cache_that_cannot_be_written_gives_one_warning(empty_cache):
    empty_cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="no compiled kernel, because"):
        assert not kernel.build()


@parametrize("content", [b"", b"hello", b"\x7fELF" + bytes(60)])
def test_damaged_kernel_is_not_used(empty_cache, content, caplog):
    kernel._path().parent.mkdir()
    kernel._path().write_bytes(content)
    kernel._path().chmod(0o700)
    assert not kernel.found()
    assert "cannot be loaded" in caplog.text


def test_kernel_that_others_may_change_is_not_loaded(with_kernel, empty_cache, caplog):
    kernel.build()
    (made,) = empty_cache.iterdir()
    made.chmod(0o777)
    forget_the_kernel()
    assert not kernel.found()
    assert "another user" in caplog.text


def test_source_belongs_to_the_package():
    assert kernel._SOURCE.is_file()


def test_update_is_the_plain_rule_for_one_weight():
    # By hand: A = 0.25 + 0.5, w = 1 - 0.1 * 0.5 / (0.25 + 0.75)
    p, g, a = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.25])
    classp_update_(p, g, a, Rule(0.1, 0.2, 0.25, 1.0, True))
    assert_same((p, a), (torch.tensor([0.95]), torch.tensor([0.75])))


def test_library_functions_have_their_types(with_kernel):
    library = kernel._library()
    assert library.classp_first_outside_float32.restype is ctypes.c_int64
    assert os.path.exists(library._name)
