"""Projected gradients against the formulas by hand in float64."""

from __future__ import annotations

import torch
from conftest import FEATURES, HIDDEN, fit, many_heads, naive
from torch import nn

from experiments.protocol.projections import GPMPlugin, OWMPlugin, layers, rows_of


def inputs_of(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(x, (0, 1), value=1.0)


def test_owm_is_recursive_least_squares_over_mean_inputs() -> None:
    plugin, x = OWMPlugin(alpha=0.5), torch.randn(9, 4, dtype=torch.float64)
    plugin.projections["layer"] = torch.eye(4, dtype=torch.float64)
    for row in x:
        plugin._renew("layer", row)
    by_hand = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + x.T @ x / 0.5)
    torch.testing.assert_close(plugin.projections["layer"], by_hand)


def test_gpm_keeps_the_share_and_projects_it_away() -> None:
    plugin = GPMPlugin(threshold=0.9)
    rows = torch.randn(30, 3) @ torch.randn(3, 6) + 0.01 * torch.randn(30, 6)
    plugin._add("layer", rows)
    basis = plugin.projections["layer"]
    values = torch.linalg.svdvals(rows).square()
    needed = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    assert basis.shape == (6, needed)
    torch.testing.assert_close(basis.T @ basis, torch.eye(needed), atol=1e-5, rtol=0)
    gradient = plugin._projected(torch.randn(2, 6), basis)
    torch.testing.assert_close(gradient @ basis, torch.zeros(2, needed), atol=1e-5, rtol=0)
    plugin._add("layer", rows)  # nothing new in it
    assert plugin.projections["layer"].shape == basis.shape


def test_what_earlier_inputs_get_out_of_a_layer_stays(tiny) -> None:
    """With all directions kept a layer's answers to the first experience's inputs stay."""
    model = naive_model()
    plugin = GPMPlugin(threshold=0.999999)
    strategy = naive(model, plugin)
    fit(strategy, [tiny.train_stream[0]])
    first = [sample[0] for sample in tiny.train_stream[0].dataset]
    assert plugin.projections["0"].shape[0] == FEATURES + 1
    x = inputs_of(torch.stack(first)).double()
    layer = model[0]
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone()
    fit(strategy, [tiny.train_stream[1]])
    moved = torch.cat([layer.weight, layer.bias[:, None]], 1).detach() - before
    assert (x @ moved.double().T).abs().max() < 1e-4


def naive_model() -> nn.Module:
    """A hidden layer of more inputs than the first experience has samples: some stay free."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 6))


def test_an_experience_changes_less_of_what_was_learnt(tiny) -> None:
    drift = {}
    for name, plugins in {"sgd": [], "owm": [OWMPlugin(alpha=0.01)]}.items():
        model = naive_model()
        strategy = naive(model, *plugins)
        fit(strategy, [tiny.train_stream[0]])
        x = torch.stack([sample[0] for sample in tiny.train_stream[0].dataset])
        before = model(x).detach()
        fit(strategy, [tiny.train_stream[1]])
        drift[name] = (model(x).detach() - before).abs().mean().item()
    assert drift["owm"] < drift["sgd"] / 2


def test_convolutions_are_projected_by_their_patches() -> None:
    layer = nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2)
    x = torch.randn(2, 3, 9, 9)
    rows = rows_of(layer, x)
    kernel = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1)
    by_hand = (rows @ kernel.T).view(2, -1, 4).transpose(1, 2)
    torch.testing.assert_close(by_hand.reshape(layer(x).shape), layer(x))


def test_heads_of_one_task_are_left_alone() -> None:
    names = [name for name, _ in layers(many_heads())]
    assert names and not any("classifier" in name for name in names)
