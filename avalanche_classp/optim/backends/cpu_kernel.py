"""The compiled CPU kernel behind ``fused=True``: built once a machine, kept on disk.

``kernel.cpp`` is compiled by the C++ compiler at hand for the processor at hand, in about two
seconds, and kept in ``$XDG_CACHE_HOME/avalanche_classp`` (default ``~/.cache/avalanche_classp``).
``python -m avalanche_classp.build_kernel`` does that ahead of time.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from avalanche_classp.optim.backends.single_tensor import Triple, is_dense, update_in_blocks_
from avalanche_classp.optim.rule import (
    Rule,
    cutoff,
    denominator_underflows,
    largest_usable_gradient,
)

__all__ = ["build", "found", "takes", "update_", "usable"]

_SOURCE = Path(__file__).with_name("kernel.cpp")
_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"),
    "-ffp-contract=off",  # or the bits would not be those of the tensor operations
    *("-fno-math-errno", "-fno-trapping-math"),  # or the loops would not be vectorized
)
_VECTOR_POW = ("-fopenmp", "-DCLASSP_VECTOR_POW", "-lmvec", "-lm")
_BEST_FIRST = (
    # -z,defs: what this glibc has not is an error now and not when the kernel is loaded.
    (*_VECTOR_POW, "-DCLASSP_VECTOR_CBRT", "-Wl,-z,defs"),
    (*_VECTOR_POW, "-Wl,-z,defs"),
    ("-fopenmp", "-lm"),
    ("-lm",),
)
_SUFFIXES = {torch.float32: "float32", torch.float64: "float64"}
_PLAIN = (Tensor, Parameter)

_logger = logging.getLogger(__name__)


def build() -> bool:
    """Load the kernel, and compile it first if it is not on disk; tell whether it is there.

    Compiling is announced on the logger ``avalanche_classp.optim.kernel`` (a warning, so that it is
    seen). Where it fails a UserWarning says why, once; later calls return False at once.
    """
    return found() or _compile_once()


def found() -> bool:
    """Tell whether the kernel is loaded, or on disk and can be loaded; never compile."""
    return _library() is not None


def takes(*tensors: Tensor) -> bool:
    """Tell whether the kernel can take these: plain, on the CPU, alike in dtype and layout."""
    first = tensors[0]
    for t in tensors:
        plain = type(t) in _PLAIN and t.is_cpu and t.layout == torch.strided and not t.is_neg()
        if not plain or t.dtype != first.dtype or t.dtype not in _SUFFIXES:
            return False
    if all(t.is_contiguous() for t in tensors):
        return True
    same = all(t.stride() == first.stride() for t in tensors)
    return same and is_dense(tuple(first.shape), first.stride())


def usable(grads: Sequence[Tensor], limit: float) -> bool:
    """Tell whether no entry of these gradients, of one dtype, is NaN or above the limit."""
    first_outside = getattr(_library(), f"classp_first_outside_{_SUFFIXES[grads[0].dtype]}")
    threads = torch.get_num_threads()
    return first_outside(len(grads), _pointers(grads), _sizes(grads), threads, limit) == len(grads)


def update_(triples: Sequence[Triple], rule: Rule) -> None:
    """Apply the rule to parameters on the CPU; what the kernel does not take goes in blocks."""
    by_dtype: dict[torch.dtype, list[Triple]] = {}
    others = []
    for triple in triples:
        if takes(*triple):
            by_dtype.setdefault(triple[0].dtype, []).append(triple)
        else:
            others.append(triple)
    for dtype, some in by_dtype.items():
        _step_(some, dtype, rule)
    update_in_blocks_(others, rule)


def _step_(triples: Sequence[Triple], dtype: torch.dtype, rule: Rule) -> None:
    params, grads, accumulators = zip(*triples, strict=True)
    getattr(_library(), f"classp_step_{_SUFFIXES[dtype]}")(
        len(params),
        _pointers(params),
        _pointers(grads),
        _pointers(accumulators),
        _sizes(params),
        torch.get_num_threads(),
        rule.step,
        cutoff(rule.threshold, dtype),
        largest_usable_gradient(dtype, rule.power) if rule.skip_nonfinite else float("inf"),
        rule.epsilon,
        rule.power,
        rule.apply_decay,
        denominator_underflows(dtype, rule.epsilon, rule.power),
    )
    # Autograd notices when a tensor that it has saved was changed.
    torch.autograd.graph.increment_version((*params, *accumulators))


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_int64 * len(tensors))(*[t.numel() for t in tensors])


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    path = _path()
    try:
        status = path.stat()
    except OSError:
        return None
    # What another user may have put there is not run.
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        _logger.warning("%s belongs to, or may be changed by, another user: not loaded", path)
        return None
    return _load(path)


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        _logger.warning("%s cannot be loaded (%s); delete it to have it built again", path, error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_double
    for suffix in _SUFFIXES.values():
        step = getattr(library, f"classp_step_{suffix}")
        step.restype = None
        step.argtypes = [ctypes.c_int64, *[pointer] * 4, ctypes.c_int, *[number] * 5]
        step.argtypes += [ctypes.c_int, ctypes.c_int]
        first_outside = getattr(library, f"classp_first_outside_{suffix}")
        first_outside.restype = ctypes.c_int64
        first_outside.argtypes = [ctypes.c_int64, pointer, pointer, ctypes.c_int, number]
    return library


@lru_cache(maxsize=1)
def _path() -> Path:
    """Return where the kernel for this source, these flags and this processor is kept."""
    made_of = (_SOURCE.read_text(), str((_FLAGS, _BEST_FIRST)), sys.platform, _cpu())
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "avalanche_classp" / f"kernel-{name}.so"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            abilities = [line for line in info if line.startswith(("flags", "Features"))]
    except OSError:
        abilities = []
    return abilities[0] if abilities else platform.machine()


@lru_cache(maxsize=1)
def _compile_once() -> bool:
    path = _path()
    given = shlex.split(os.environ.get("CXX", ""))
    compiler = given or [c for c in _COMPILERS if shutil.which(c)][:1]
    if not compiler:
        return _failed(f"no C++ compiler is found (none of {', '.join(_COMPILERS)}; CXX not set)")
    _logger.warning(
        "compiling the fused CLASSP step with %s, once for this machine (about two seconds)",
        compiler[0],
    )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            for extra in _BEST_FIRST:
                command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(made), *extra]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    break
            else:
                return _failed(f"{shlex.join(command)} fails: {done.stderr.strip()[-500:]}")
            made.chmod(0o700)
            made.replace(path)  # at once: other processes see all of it or nothing
    except OSError as error:
        return _failed(str(error))
    _library.cache_clear()
    return found() or _failed(f"{path} cannot be loaded")


def _failed(reason: str) -> bool:
    warnings.warn(
        f"fused=True has no compiled kernel, because {reason}; the default path is used",
        stacklevel=2,
    )
    return False
