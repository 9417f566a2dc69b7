"""Checkpoints of an Avalanche strategy; ``docs/checkpoints.md`` is the guide.

``resume`` has the loop and the hooks, ``values`` says what is kept, ``file`` has the file format.
``encoding`` makes plain containers of a strategy and ``decoding`` puts them back, both beside the
``initial_state`` that the script has built. ``settings`` compares two versions of a script.
``avalanche_internals`` names what is used of Avalanche without documentation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avalanche_classp.checkpoint.file import CheckpointError

if TYPE_CHECKING:
    from avalanche_classp.checkpoint.resume import checkpointed, mend_save_checkpoint

__all__ = ["CheckpointError", "checkpointed", "mend_save_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import Avalanche, which takes seconds, when a function that needs it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from avalanche_classp.checkpoint import resume

    return getattr(resume, name)
