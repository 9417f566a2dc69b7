"""CLASSP for PyTorch and Avalanche: continual learning with one number of memory per weight.

``CLASSPOptimizer`` needs torch alone; the names that need Avalanche, whose import takes seconds,
are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from avalanche_classp.checkpoint.file import CheckpointError
from avalanche_classp.optim.author import CLASSP_optimizer
from avalanche_classp.optim.optimizer import CLASSPOptimizer, NonFiniteGradientError
from avalanche_classp.optim.transfer import CarryReport, carry_accumulators

if TYPE_CHECKING:
    from avalanche_classp.checkpoint import checkpointed, mend_save_checkpoint
    from avalanche_classp.csv_logger import CSVValueLogger
    from avalanche_classp.data.in_memory import in_memory
    from avalanche_classp.metrics import classp_metrics
    from avalanche_classp.plugin import PAPER_PHASES, CLASSPPlugin
    from avalanche_classp.strategy import CLASSP
    from avalanche_classp.suggest import suggest_lr

__all__ = [
    "CLASSP",
    "PAPER_PHASES",
    "CLASSPOptimizer",
    "CLASSPPlugin",
    "CLASSP_optimizer",
    "CSVValueLogger",
    "CarryReport",
    "CheckpointError",
    "NonFiniteGradientError",
    "carry_accumulators",
    "checkpointed",
    "classp_metrics",
    "in_memory",
    "mend_save_checkpoint",
    "suggest_lr",
]
__version__ = "1.0.0"

_NEEDS_AVALANCHE = {
    "CLASSP": "strategy",
    "CLASSPPlugin": "plugin",
    "CSVValueLogger": "csv_logger",
    "PAPER_PHASES": "plugin",
    "checkpointed": "checkpoint",
    "classp_metrics": "metrics",
    "in_memory": "data.in_memory",
    "mend_save_checkpoint": "checkpoint",
    "suggest_lr": "suggest",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_AVALANCHE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NEEDS_AVALANCHE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
