"""Two processes on this machine, joined by gloo: data parallel and sharded training."""

import copy
import importlib
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import make_benchmark, seed_everything
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from avalanche_classp import CLASSPOptimizer, NonFiniteGradientError
from avalanche_classp.optim.backends import cpu_kernel as kernel

pytestmark = pytest.mark.slow
parametrize = pytest.mark.parametrize
WORLD = 2
HYPER = {"lr": 0.05, "threshold": 1e-6, "epsilon": 1e-3, "power": 1.0}
WAYS = {
    "default": {},
    "blocks": {"fused": False},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
    "kernel": {"fused": True},
    "power 1.5": {"power": 1.5},
    "skip": {"nonfinite": "skip"},
}


def network(inputs=6, hidden=5):
    """Return a model with an odd number of rows, so that two processes have different parts."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def batches(steps, rank=None):
    """Return inputs of each step: all of them, or every second sample for a process."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(steps, 8, 6, generator=generator)
    return whole if rank is None else whole[:, rank::WORLD]


def train(model, optimizer, inputs):
    for x in inputs:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()


def alone(steps, **hyper):
    """Return weights and accumulators that one process reaches on the joined batches."""
    model = network()
    optimizer = CLASSPOptimizer(model.parameters(), **HYPER | hyper)
    train(model, optimizer, batches(steps))
    return whole(model, optimizer)


def whole(model, optimizer):
    pairs = [(p.detach(), optimizer.state[p]["accumulator"]) for p in model.parameters()]
    full = [[t.full_tensor() if isinstance(t, DTensor) else t for t in pair] for pair in pairs]
    return copy.deepcopy(full)


def sharded(mesh):
    model = network()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.fixture(scope="module", autouse=True)
def kernel_folder(tmp_path_factory):
    """Build the kernel of `fused=True` once, for this process and those that it starts."""
    caches = (kernel._path, kernel._library, kernel._compile_once)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("kernel")))
        for cache in caches:
            cache.cache_clear()
        kernel.build()
        yield
    for cache in caches:
        cache.cache_clear()


# --- the processes --------------------------------------------------------------------------------


def process(rank, work, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    torch.save(work(rank, folder), f"{folder}/result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def in_processes(work, folder, start=process):
    """Return what `work(rank, folder)` returned in each of two processes."""
    torch.multiprocessing.spawn(start, (work, folder), nprocs=WORLD)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(WORLD)]


# --- DistributedDataParallel ----------------------------------------------------------------------


def work_data_parallel(rank, folder):
    found = {}
    for way, hyper in WAYS.items():
        model = DistributedDataParallel(network())
        optimizer = CLASSPOptimizer(model.parameters(), **HYPER | hyper)
        found[way] = []
        for x in batches(5, rank):
            train(model, optimizer, [x])
            found[way].append(whole(model.module, optimizer))
    found["raised"] = nonfinite_on_one_process(DistributedDataParallel(network()), rank)
    found["directions"] = with_directions(DistributedDataParallel(network()), batches(9, rank))
    found["inputs"] = with_a_history_of_inputs(rank)
    return found


class Branches(nn.Module):
    """Layers of which the second sees samples in one process only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 1)

    def forward(self, x, both):
        return self.head(torch.tanh(self.first(x) + (self.second(x) if both else 0)))


def with_a_history_of_inputs(rank):
    """Return the weights and the moments that training ends with, with a basis of 4 directions."""
    model = DistributedDataParallel(Branches(), find_unused_parameters=True)
    optimizer = CLASSPOptimizer(model.parameters(), history="inputs", epsilon=1.0, rank=4)
    optimizer.watch(model)
    for x in batches(20, rank):
        optimizer.zero_grad()
        model(x, both=rank == 1).pow(2).mean().backward()
        optimizer.step()
    weights = [p.detach() for p in model.parameters()]
    states = [optimizer.state[p] for p in model.parameters() if "basis" in optimizer.state[p]]
    common = [[s[key] for key in ("basis", "factor")] for s in states]
    return weights, common, [(s["moments"].trace() + s["rest"]).item() for s in states]


def with_directions(model, inputs):
    """Return the weights and the sketches that training ends with."""
    optimizer = CLASSPOptimizer(
        model.parameters(), lr=0.02, epsilon=0.1, power=1.5, history="gradients", rank=3
    )
    train(model, optimizer, inputs)
    sketches = [s["sketch"] for s in optimizer.state.values() if "sketch" in s]
    return [p.detach() for p in model.parameters()], [b @ b.T for b in sketches]


def nonfinite_on_one_process(model, rank):
    """Return what a NaN in the batch of process 1 leads to: error, and what has changed."""
    optimizer = CLASSPOptimizer(model.named_parameters(), **HYPER)
    train(model, optimizer, batches(2, rank))
    before = whole(model, optimizer)
    x = batches(1, rank)[0]
    try:
        train(model, optimizer, [x * (math.nan if rank == 1 else 1)])
    except NonFiniteGradientError as error:
        message = str(error)
    else:
        message = None
    unchanged = all(
        torch.equal(a, b)
        for old, new in zip(before, whole(model, optimizer), strict=True)
        for a, b in zip(old, new, strict=True)
    )
    train(model, optimizer, batches(3, rank)[2:])  # and on with the next batch
    return message, unchanged, whole(model, optimizer)


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory):
    return in_processes(work_data_parallel, tmp_path_factory.mktemp("data-parallel"))


@parametrize("way", WAYS)
def test_data_parallel_processes_agree_after_every_step_and_equal_one_process(data_parallel, way):
    first, second = (found[way] for found in data_parallel)
    for step, (here, there) in enumerate(zip(first, second, strict=True)):
        assert_close(here, there, rtol=0, atol=0)
        assert_close(here, alone(step + 1, **WAYS[way]), rtol=1e-4, atol=1e-6)


def test_data_parallel_processes_agree_on_the_inputs_that_some_of_them_saw(data_parallel):
    here, there = (found["inputs"] for found in data_parallel)
    assert_close(here[:2], there[:2], rtol=0, atol=0)
    x = batches(20)
    # The step of the last renewal is the sixteenth; what came later is not shared yet.
    seen = [x[:17, rank::WORLD].square().sum(2).mean(1).sum().item() + 17 for rank in range(WORLD)]
    later = [x[17:, rank::WORLD].square().sum(2).mean(1).sum().item() + 3 for rank in range(WORLD)]
    for rank, (first, second, _) in enumerate((here[2], there[2])):
        assert first == pytest.approx(sum(seen) / WORLD + later[rank], rel=1e-4)
        assert second == pytest.approx(seen[1] / WORLD + rank * later[rank], rel=1e-4)


def test_data_parallel_processes_agree_on_histories_of_directions(data_parallel):
    here, there = (found["directions"] for found in data_parallel)
    assert_close(here, there, rtol=0, atol=0)
    assert len(here[1]) == 2
    assert_close(here, with_directions(network(), batches(9)), rtol=1e-4, atol=1e-6)


def test_a_nan_in_one_data_parallel_process_is_refused_by_both(data_parallel):
    (message, unchanged, end), (other_message, other_unchanged, other_end) = (
        found["raised"] for found in data_parallel
    )
    assert message == other_message and "'module.0.weight'" in message
    assert unchanged and other_unchanged
    assert_close(end, other_end, rtol=0, atol=0)


# --- FSDP2 ----------------------------------------------------------------------------------------


def work_sharded(rank, folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    found = {}
    for way, hyper in WAYS.items():
        model = sharded(mesh)
        optimizer = CLASSPOptimizer(model.parameters(), **HYPER | hyper)
        train(model, optimizer, batches(5, rank))
        found[way] = whole(model, optimizer)
        states = [optimizer.state[p]["accumulator"] for p in model.parameters()]
        assert all(isinstance(a, DTensor) for a in states)
        found["memory"] = sum(a.to_local().numel() for a in states)
    model = sharded(mesh)
    optimizer = CLASSPOptimizer(model.named_parameters(), **HYPER)
    found["raised"] = nonfinite_on_one_process(model, rank)
    found["one shard"] = nan_in_one_shard(sharded(mesh), rank)
    found["hybrid"] = hybrid(rank)
    found["partial"] = partial_gradient(mesh, rank)
    for history in ("gradients", "inputs"):
        model = sharded(mesh)
        optimizer = CLASSPOptimizer(model.parameters(), history=history, rank=2)
        if history == "inputs":
            optimizer.watch(model)
        with pytest.raises(RuntimeError, match="is a DTensor: give it history='weights'"):
            train(model, optimizer, batches(1, rank))
    return found


def nan_in_one_shard(model, rank):
    """Put a NaN in one process's part of a gradient, after the processes have exchanged them."""
    optimizer = CLASSPOptimizer(model.named_parameters(), **HYPER)
    model(batches(1, rank)[0]).pow(2).mean().backward()
    bias = model[0].bias
    if rank == 1:
        bias.grad.to_local()[0] = math.nan
    with pytest.raises(NonFiniteGradientError) as caught:
        optimizer.step()
    return str(caught.value), len(optimizer.state)


def hybrid(rank):
    """Shard in one dimension of a mesh, replicate in the other."""
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(network(), mesh=mesh)
    optimizer = CLASSPOptimizer(model.parameters(), **HYPER)
    train(model, optimizer, batches(5, rank))
    return whole(model, optimizer)


def partial_gradient(mesh, rank):
    """A gradient that is a sum still to be made, as tensor parallelism leaves some."""
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    optimizer = CLASSPOptimizer([p], lr=0.1, epsilon=1.0, power=1.0)
    p.grad = DTensor.from_local(torch.full((4,), 0.5 + rank), mesh, [Partial()])
    with CommDebugMode() as exchanged:
        optimizer.step()
    sums = exchanged.get_comm_counts()[torch.ops.c10d_functional.all_reduce]
    return p.to_local().detach().tolist(), sums


@pytest.fixture(scope="module")
def sharded_results(tmp_path_factory):
    return in_processes(work_sharded, tmp_path_factory.mktemp("sharded"))


@parametrize("way", WAYS)
def test_sharded_parameters_equal_one_process(sharded_results, way):
    for found in sharded_results:
        assert_close(found[way], alone(5, **WAYS[way]), rtol=1e-4, atol=1e-6)


def test_each_process_holds_the_accumulators_of_its_own_part(sharded_results):
    assert [found["memory"] for found in sharded_results] == [3 * 6 + 3 + 5 + 1, 2 * 6 + 2]


def test_a_nan_in_one_sharded_process_is_refused_by_both(sharded_results):
    (message, unchanged, end), (other_message, other_unchanged, other_end) = (
        found["raised"] for found in sharded_results
    )
    assert message == other_message and "'0.weight'" in message
    assert unchanged and other_unchanged
    assert_close(end, other_end, rtol=0, atol=0)


def test_a_nan_in_one_process_part_is_refused_by_all_by_name(sharded_results):
    (message, states), (other_message, other_states) = (
        found["one shard"] for found in sharded_results
    )
    assert message == other_message and "parameter '0.bias' 1 of group 0" in message
    assert states == other_states == 0


def test_hybrid_sharding_equals_one_process(sharded_results):
    for found in sharded_results:
        assert_close(found["hybrid"], alone(5), rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_summed_yet_is_summed_before_the_rule(sharded_results):
    expected = 1 - 0.1 * 2.0 / (1.0 + 2.0)  # g = 0.5 + 1.5
    for found in sharded_results:
        weights, sums = found["partial"]
        assert weights == [pytest.approx(expected)] * 4
        assert sums == 1  # for the check and the rule together


# --- torch.distributed.checkpoint -----------------------------------------------------------------


def work_checkpoint(rank, folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    model = sharded(mesh)
    optimizer = CLASSPOptimizer(model.parameters(), **HYPER)
    train(model, optimizer, batches(3, rank))
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=f"{folder}/checkpoint")
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole_model = get_model_state_dict(model, options=gathered)
    whole_optimizer = get_optimizer_state_dict(model, optimizer, options=gathered)
    train(model, optimizer, batches(5, rank)[3:])

    resumed = sharded(mesh)
    other = CLASSPOptimizer(resumed.parameters(), lr=9.0)
    state = {
        "model": get_model_state_dict(resumed),
        "optimizer": get_optimizer_state_dict(resumed, other),
    }
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(resumed, state["model"])
    set_optimizer_state_dict(resumed, other, state["optimizer"])
    train(resumed, other, batches(5, rank)[3:])

    from_whole = sharded(mesh)
    third = CLASSPOptimizer(from_whole.parameters(), lr=9.0)
    spread = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(from_whole, whole_model, options=spread)
    set_optimizer_state_dict(from_whole, third, whole_optimizer, options=spread)
    train(from_whole, third, batches(5, rank)[3:])

    plain = network()
    unsharded = CLASSPOptimizer(plain.parameters(), **HYPER)
    train(plain, unsharded, batches(1))
    with pytest.raises(ValueError, match="is a Tensor, the parameter a DTensor; load it with"):
        third.load_state_dict(unsharded.state_dict())
    ends = [(model, optimizer), (resumed, other), (from_whole, third)]
    return [whole(*end) for end in ends], other.param_groups[0]["lr"]


def test_a_sharded_state_saves_and_loads_through_distributed_checkpoint(tmp_path):
    for (uninterrupted, resumed, from_whole), lr in in_processes(work_checkpoint, tmp_path):
        assert_close(resumed, uninterrupted, rtol=0, atol=0)
        assert_close(from_whole, uninterrupted, rtol=0, atol=0)
        assert lr == HYPER["lr"]


# --- Avalanche ------------------------------------------------------------------------------------


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))


def avalanche_run(model, batch):
    from avalanche.training import Naive

    from avalanche_classp import CLASSPPlugin

    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=batch,
        evaluator=None,
        plugins=[CLASSPPlugin(threshold=1e-6, epsilon=1e-3, phases=({"apply_decay": False}, {}))],
    )
    for experience in make_benchmark().train_stream:
        seed_everything(1)
        strategy.train(experience, shuffle=False, num_workers=0)
    optimizer = strategy.optimizer
    assert isinstance(optimizer, CLASSPOptimizer)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return whole(inner, optimizer)


def process_with_avalanche(rank, work, folder):
    # Avalanche 0.6.0 cannot be imported in the second of two processes that have met.
    importlib.import_module("avalanche.training")
    process(rank, work, folder)


def work_avalanche(rank, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end = avalanche_run(DistributedDataParallel(linear()), 4)
    return end, [str(w.message) for w in caught if "distributed" in str(w.message)]


def test_an_avalanche_strategy_in_two_processes_equals_one(tmp_path):
    (here, warned), (there, _) = in_processes(work_avalanche, tmp_path, process_with_avalanche)
    assert_close(here, there, rtol=0, atol=0)
    assert_close(here, avalanche_run(linear(), 8), rtol=1e-4, atol=1e-6)
    assert not warned
