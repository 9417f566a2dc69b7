"""The Kronecker-factored penalty against the whole Fisher information, by autograd."""

from __future__ import annotations

import pytest
import torch
from conftest import On, weights
from test_methods import (
    SIZE,
    build,
    counted_bytes,
    follow,
    images,
    learnt_once,
    network,
    on_sgd,
    same,
)
from torch import nn
from torch.func import functional_call, jacrev

from experiments.protocol.laplace import KroneckerLaplacePlugin, _recorded
from experiments.protocol.projections import kernel_of

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def trained(net, **changes):
    plugin = KroneckerLaplacePlugin(1.0)
    strategy = on_sgd(net, plugin, **changes)
    strategy.train(images("class", augment=False).train_stream[0], eval_streams=[])
    return plugin, strategy


def test_with_one_input_the_factors_are_the_fisher_information():
    """All samples the same: then E[x xᵀ ⊗ g gᵀ] is a product. Labels are drawn, so on average."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 6))
    plugin, strategy = trained(net, train_epochs=1)
    x = torch.randn(1, 3, SIZE, SIZE)
    strategy.dataloader = [[x.expand(4000, -1, -1, -1), torch.zeros(4000), torch.zeros(4000)]]
    plugin.factors.clear()
    plugin.after_training_exp(strategy)
    ((A, G),) = plugin.factors["1"]
    names = dict(net.named_parameters())
    p = net(x).softmax(1)[0].detach()
    jacobian = jacrev(lambda v: functional_call(net, v, (x,)).log_softmax(1)[0])(names)
    rows = torch.cat([jacobian["1.weight"].flatten(1), jacobian["1.bias"].flatten(1)], 1)
    whole = (rows.T * p) @ rows
    columns = 3 * SIZE * SIZE
    ours = torch.einsum("ab,cd->acbd", G, A[:-1, :-1]).reshape(6 * columns, 6 * columns)
    theirs = whole[: 6 * columns, : 6 * columns]
    assert (ours - theirs).norm() < 0.1 * theirs.norm()
    torch.testing.assert_close(ours.trace(), theirs.trace(), rtol=0.1, atol=0)


def test_the_pull_is_the_gradient_of_the_penalty():
    net = network("resnet", "class")
    plugin, strategy = trained(net)
    layer = net.block[0]
    with torch.no_grad():
        layer.weight += 0.1
    ((A, G),) = plugin.factors["block.0"]
    start = plugin.ends["block.0"]
    kernel = kernel_of(layer).requires_grad_()
    penalty = ((kernel - start).T @ G @ (kernel - start) @ A).trace() / 2
    (expected,) = torch.autograd.grad(penalty, kernel)
    layer.weight.grad, layer.bias.grad = torch.zeros_like(layer.weight), torch.zeros(8)
    for other in net.modules():
        if other is not layer and getattr(other, "weight", None) is not None:
            other.weight.grad = None
    plugin.before_update(strategy)
    found = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_convolutions_rows_give_its_weights_gradient():
    """Σ g xᵀ over the rows is the gradient of the kernel: rows of both go together."""
    net = network("resnet", "class").eval()
    with _recorded(net) as recorded:
        net(torch.randn(5, 3, SIZE, SIZE)).square().sum().backward()
    for name, layer in (("stem.0", net.stem[0]), ("block.0", net.block[0])):
        x, g = recorded[name]
        whole = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
        torch.testing.assert_close(g.T @ x, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_without_strength_it_is_plain_sgd(scenario):
    free = build("kfac-laplace", network("mlp", scenario), {"strength": 0.0})
    follow(free, images(scenario))
    assert same(dict(free.model.state_dict()), learnt_once("naive", scenario, "mlp")[1])


def test_with_strength_weights_stay_nearer():
    way = {}
    for strength in (0.0, 10.0):
        ends = []
        strategy = build("kfac-laplace", network("mlp", "class"), {"strength": strength})
        note = On(after_training_exp=lambda s, ends=ends: ends.append(weights(s.model)))
        strategy.plugins.append(note)
        follow(strategy, images("class"))
        way[strength] = sum((ends[1][n] - ends[0][n]).norm().item() for n in ends[0])
    assert way[10.0] < way[0.0]


@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_it_learns_and_the_same_seed_gives_the_same_weights(scenario):
    rows, tensors = learnt_once("kfac-laplace", scenario, "mlp")
    assert rows[1][0] > 0.7
    again = build("kfac-laplace", network("mlp", scenario))
    assert follow(again, images(scenario)) == rows
    # Products of small matrices round by where the memory lies.
    torch.testing.assert_close(dict(again.model.state_dict()), dict(tensors))


def test_state_is_counted_to_the_byte():
    counted = counted_bytes(build("kfac-laplace", network("mlp", "class")), images("class"))
    sizes = [(3 * SIZE * SIZE + 1, 16), (17, 6)]
    factors = sum(k * k + o * o for k, o in sizes)
    ends = sum(k * o for k, o in sizes)
    assert counted == [4 * (n * factors + ends) for n in (1, 2, 3)]
