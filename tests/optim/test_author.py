"""Scripts of the author's released code run with one changed import."""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import linear_head, naive
from torch import nn
from torch.nn import Parameter

from avalanche_classp import CLASSP_optimizer, CLASSPOptimizer, CLASSPPlugin
from avalanche_classp.optim.accumulators import diagonal

parametrize = pytest.mark.parametrize

RELEASED = {"lr": 0.2, "threshold": 0.5, "epsilon": 1e-5, "power": 1}
DIFFERS = "follows the paper where the author's released code does not"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def loss_of(model, seed):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(x), torch.arange(8) % 3)


def gradients(model, seed):
    model.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    return loss


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def released_step(model, sums, lr, epsilon, apply_scaling):
    """The released rule with power 1 and a threshold below 1, which stops nothing."""
    for p in model.parameters():
        total = sums.setdefault(p, torch.zeros_like(p)).add_(p.grad.abs())
        p.data -= lr * p.grad / (total + epsilon) if apply_scaling else lr * p.grad


def test_the_schedule_of_experiment_cv():
    """Phase 1 without scaling, phase 2 with; step has the values, as in the author's loop."""
    model, reference, sums = network(), network(), {}
    optimizer = CLASSP_optimizer(model.parameters(), **RELEASED | {"threshold": 0})
    assert optimizer.average_grad_sum() == 0
    for count in range(10):
        apply_scaling = count >= 6
        optimizer.zero_grad()
        gradients(model, count)
        gradients(reference, count)
        optimizer.step(lr=0.2, threshold=0, epsilon=1e-5, power=1, apply_scaling=apply_scaling)
        released_step(reference, sums, 0.2, 1e-5, apply_scaling)
        torch.testing.assert_close(weights(model), weights(reference))
        mean = torch.cat([total.flatten() for total in sums.values()]).mean().item()
        assert optimizer.average_grad_sum() == pytest.approx(mean)


def test_the_threshold_is_the_papers_and_one_warning_says_so():
    p = Parameter(torch.zeros(2))
    optimizer = CLASSP_optimizer([p], **RELEASED)
    p.grad = torch.tensor([0.5, 1.0])
    with pytest.warns(UserWarning, match=DIFFERS) as caught:
        optimizer.step(lr=0.2, threshold=0.5, epsilon=1e-5, power=1, apply_scaling=False)
    assert caught[0].filename == __file__ and "threshold=0.5 stops" in str(caught[0].message)
    assert "power" not in str(caught[0].message).split("threshold=0 with")[0]
    optimizer.step(lr=0.2, threshold=0.5, apply_scaling=False)  # a second would be an error
    assert torch.equal(p.detach(), torch.tensor([0.0, -0.4]))


@parametrize(
    ("in_constructor", "in_step", "warned"),
    [
        ({}, {}, False),
        ({"lr": 0.1, "threshold": 0.5, "epsilon": 1.0, "power": 2.0}, {}, False),
        ({"apply_decay": False}, {}, False),
        ({"apply_scaling": True, "power": 1}, {}, False),
        ({"apply_scaling": True}, {}, True),
        ({"apply_scaling": True, "power": 1, "threshold": 0.1}, {}, True),
        ({}, {"lr": 0.1}, True),
        ({"power": 1}, {"lr": 0.1}, False),
        ({"power": 1}, {"power": 2}, True),
    ],
)
def test_only_a_script_of_the_released_code_is_warned(in_constructor, in_step, warned):
    p = Parameter(torch.zeros(2))
    optimizer = CLASSP_optimizer([p], **in_constructor)
    p.grad = torch.ones(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(**in_step)
    assert [DIFFERS in str(w.message) for w in caught] == [True] * warned


@parametrize("name", ["lr", "threshold", "epsilon", "power", "apply_scaling"])
def test_a_value_of_step_is_for_this_step_and_all_groups(name):
    value = {"lr": 0.3, "threshold": 0.4, "epsilon": 2.0, "power": 1, "apply_scaling": False}[name]
    plain_name = "apply_decay" if name == "apply_scaling" else name
    found = []
    for given in (True, False):
        params = [Parameter(torch.zeros(4)) for _ in range(2)]
        groups = [{"params": [params[0]], "lr": 0.1}, {"params": [params[1]], "lr": 0.2}]
        hyper = {"threshold": 0.1, "epsilon": 1.0, "power": 2.0}
        optimizer = CLASSP_optimizer(groups, **hyper)
        if not given:
            for group in optimizer.param_groups:
                group[plain_name] = value
        before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        for p in params:
            p.grad = torch.tensor([0.2, 0.5, 1.0, -2.0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            optimizer.step(**({name: value} if given else {}))
        after = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        assert before == after
        found.append([p.detach() for p in params])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_what_is_refused_leaves_groups_and_weights():
    p = Parameter(torch.zeros(2))
    optimizer = CLASSP_optimizer([p], lr=0.1, power=1)
    own = copy.deepcopy(optimizer.state_dict())
    p.grad = torch.tensor([float("nan"), 1.0])
    with pytest.raises(RuntimeError, match="non-finite gradient"):
        optimizer.step(lr=5.0, apply_scaling=False)
    p.grad = torch.ones(2)
    for values, error, message in [
        ({"lr": -1}, ValueError, "lr must be finite and at least 0, got -1"),
        ({"threshold": "x"}, TypeError, "threshold must be a number, got 'x'"),
        ({"power": 0}, ValueError, "power must be finite and greater than 0, got 0"),
        ({"apply_scaling": 1}, TypeError, "apply_scaling must be True or False, got 1"),
        ({"apply_decay": False}, TypeError, "apply_decay"),
    ]:
        with pytest.raises(error, match=message):
            optimizer.step(**values)
    assert torch.equal(p.detach(), torch.zeros(2)) and optimizer.state_dict() == own
    with pytest.raises(TypeError, match="apply_scaling must be True or False, got 'no'"):
        CLASSP_optimizer([p], apply_scaling="no")
    with pytest.raises(ValueError, match="apply_scaling=True and apply_decay=False are two names"):
        CLASSP_optimizer([p], apply_scaling=True, apply_decay=False)
    with pytest.raises(TypeError, match="scaling_factor"):
        CLASSP_optimizer([p], scaling_factor=1)


def test_groups_may_have_apply_scaling():
    a, b = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    groups = [{"params": [a], "apply_scaling": False}, {"params": [b]}]
    optimizer = CLASSP_optimizer(groups, lr=0.5, epsilon=1.0, power=1)
    assert "apply_scaling" in groups[0]  # the caller's own
    assert [g["apply_decay"] for g in optimizer.param_groups] == [False, True]
    optimizer.param_groups[1]["apply_scaling"] = False
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert torch.equal(a, b) and torch.equal(b.detach(), torch.full((2,), -0.5))
    assert not any("apply_scaling" in g for g in optimizer.param_groups)


def test_positions_are_the_released_ones():
    p = Parameter(torch.zeros(1))
    optimizer = CLASSP_optimizer([p], 0.1, 0.2, 0.3, 2, False)
    names = ("lr", "threshold", "epsilon", "power", "apply_decay")
    assert [optimizer.defaults[name] for name in names] == [0.1, 0.2, 0.3, 2, False]
    p.grad = torch.ones(1)
    optimizer.step(0.5, 0, 1.0, 1, True)
    assert p.item() == pytest.approx(-0.25)


@parametrize("how", ["first", "keyword", "last"])
def test_closures_as_torch_and_the_author_give_them(how):
    model = network()
    optimizer = CLASSP_optimizer(model.parameters(), power=1)
    closure = lambda: gradients(model, 0)  # noqa: E731
    given = {"first": (closure,), "keyword": (), "last": (0.1, 0, 1.0, 1, True, closure)}[how]
    loss = optimizer.step(*given, **({"closure": closure} if how == "keyword" else {}))
    assert loss.item() > 0 and optimizer.average_grad_sum() > 0


def test_hooks_schedulers_and_scalers_see_one_step():
    model = network()
    CLASSPOptimizer(model.parameters())  # torch hooks into each class when it is first made
    optimizer = CLASSP_optimizer(model.parameters(), lr=1.0, power=1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = torch.amp.GradScaler("cpu")
    for i in range(2):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, i)).backward()
        scaler.step(optimizer, threshold=0, apply_scaling=True)
        scaler.update()
        scheduler.step()
    assert seen == ["pre", "post"] * 2 and optimizer.param_groups[0]["lr"] == 0.25


def test_states_go_to_and_come_from_the_plain_optimizer():
    model, plain_model = network(), network()
    optimizer = CLASSP_optimizer(model.parameters(), lr=0.1, power=1, apply_scaling=False)
    plain = CLASSPOptimizer(plain_model.parameters(), lr=0.1, power=1, apply_decay=False)
    for i in range(2):
        for m, o in ((model, optimizer), (plain_model, plain)):
            gradients(m, i)
            o.step()
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    assert type(copied) is CLASSP_optimizer
    assert copied.average_grad_sum() == optimizer.average_grad_sum() > 0


def test_average_grad_sum_of_sparse_and_of_directions():
    p, q = Parameter(torch.zeros(4, 3)), Parameter(torch.zeros(2))
    optimizer = CLASSP_optimizer(
        [{"params": [p], "history": "gradients", "epsilon": 0.1}, {"params": [q]}], power=1
    )
    p.grad, q.grad = torch.ones(4, 3), torch.tensor([3.0, 0.0]).to_sparse()
    optimizer.step()
    total = diagonal(optimizer.state[p], p).sum() + 3
    assert optimizer.average_grad_sum() == pytest.approx(total.item() / 14)


def test_the_plugin_trains_with_it(tiny):
    model = linear_head()
    optimizer = CLASSP_optimizer(model.parameters(), lr=0.1, apply_scaling=False, power=1)
    strategy = naive(model, CLASSPPlugin(), optimizer=optimizer)
    strategy.train(tiny.train_stream[0])
    assert strategy.optimizer is optimizer and optimizer.average_grad_sum() > 0
