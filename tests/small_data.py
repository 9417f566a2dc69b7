"""What the tests of the experiments share."""

import pickle
import struct

import numpy as np

from experiments.protocol.benchmarks import BENCHMARKS
from experiments.protocol.config import RunConfig
from experiments.protocol.methods import METHODS


def small_config(method="classp", scenario="class", benchmark="split-digits", **fields):
    """Return the config of a short run; `fields` replace what is usual."""
    spec = BENCHMARKS[benchmark]
    usual = {
        "model": spec.model,
        "experiences": spec.experiences,
        "seed": 0,
        "epochs": 1,
        "batch_size": 64,
        "hyper": METHODS[method].defaults,
    }
    return RunConfig(benchmark=benchmark, scenario=scenario, method=method, **(usual | fields))


def in_this_process(function, tasks, jobs=None, **options):
    """Do what :func:`experiments.running.processes.in_processes` does, one task after the other."""
    for number, task in enumerate(tasks):
        yield number, function(*task, lambda message: None)


def without_times(result):
    """Return what two runs of one config must have in common."""
    return {k: v for k, v in result.items() if "seconds" not in k and "peak" not in k}


def write_mnist(root, folder="mnist", name="MNIST", per_class=20):
    """Write files as MNIST's and Fashion-MNIST's; in each image a bright row tells the class."""
    raw = root / folder / name / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(len(name))
    for part, count in (("train", per_class), ("t10k", per_class // 2)):
        labels = np.repeat(np.arange(10), count)
        images = rng.integers(0, 60, (len(labels), 28, 28))
        images[np.arange(len(labels)), labels * 2] += 150
        _write_idx(raw / f"{part}-images-idx3-ubyte", images)
        _write_idx(raw / f"{part}-labels-idx1-ubyte", labels)


def _write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim)
    header += struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_cifar(root, classes, per_class=10, monkeypatch=None):
    """Write files as CIFAR-10's or CIFAR-100's; in each image the colours of a row tell the class.

    torchvision knows the real files by their MD5 sums; with `monkeypatch` it takes these for them.
    """
    folder = (
        root / f"cifar{classes}" / {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    )
    folder.mkdir(parents=True)
    key = {10: "labels", 100: "fine_labels"}[classes]
    names = {10: [f"data_batch_{i}" for i in range(1, 6)], 100: ["train"]}[classes]
    test = {10: "test_batch", 100: "test"}[classes]
    rng = np.random.default_rng(classes)
    for name in (*names, test):
        count = per_class // len(names) if name != test else per_class // 2
        labels = np.repeat(np.arange(classes), max(1, count))
        images = rng.integers(0, 60, (len(labels), 3, 32, 32))
        images[np.arange(len(labels)), labels % 3, labels * 31 // classes] += 190
        content = {"data": images.reshape(len(labels), -1).astype(np.uint8), key: labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {10: ("batches.meta", "label_names"), 100: ("meta", "fine_label_names")}[classes]
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [str(i) for i in range(classes)]}))
    if monkeypatch is not None:
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
