"""One run: low-rank adapters learn one kind of text after another.

A kind is learnt until the loss on its validation text has come down to a level that is the same for
all methods. So forgetting is compared where the newest kind is known equally well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_classp import CLASSPOptimizer

from .texts import KINDS, load

__all__ = ["ADAPTERS", "BASE", "NEW", "Run", "make_model", "pretrained", "tune"]

BASE, *NEW = KINDS
"""The kind that the model is trained on, and those that it is tuned on."""

ADAPTERS = ("both", "down")
"""Which matrices of an adapter learn: LoRA's two, of which the upper one begins at zero, or the
lower one alone, which then begins at zero while the upper one stays as drawn."""

LENGTH, TUNING_LENGTH = 128, 64
"""Bytes of a sequence, in pretraining and from then on."""

WIDTH, LAYERS, HIDDEN = 128, 3, 384
RANK, SCALE = 8, 16
"""Of the adapters; what they add is multiplied by SCALE / RANK."""

PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_RATE = 700, 12, 4e-3
PRETRAINING_SEED = 1000
HISTORY_STEPS = 25
"""Mini-batches of the first kind that CLASSP's history is taken of; no weight moves in them."""

BATCH, EVERY, MOST_STEPS = 8, 10, 150
"""Sequences of a mini-batch, steps between two looks at the validation text, and of one kind."""

VALIDATION_SEQUENCES, TEST_SEQUENCES = 32, 64


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        method: ``adamw``, ``sgd``, ``classp`` (the paper's rule) or ``classp-inputs``.
        adapter: one of :data:`ADAPTERS`.
        hyper: of the method.
        seed: seeds adapters and mini-batches; the pretrained model is one for all runs.
        levels: by kind, the validation loss in nats a byte at which its training ends.
        test: whether test text is looked at; else the losses are those on validation text.
    """

    method: str
    adapter: str
    hyper: dict[str, Any]
    seed: int
    levels: dict[str, float] = field(default_factory=dict)
    test: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as what JSON knows."""
        return asdict(self)


def make_model(seed: int) -> nn.Module:
    """Return an untrained Llama of 0.7 million parameters that reads bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def batches(
    text: Tensor, seed: int, size: int = BATCH, length: int = TUNING_LENGTH
) -> Iterator[Tensor]:
    """Yield mini-batches of sequences that begin anywhere, for ever."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length)
    while True:
        starts = torch.randint(len(text) - length, (size, 1), generator=generator)
        yield text[starts + offsets].long()


def loss_of(model: nn.Module, sequences: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next byte, in nats."""
    scores = model(input_ids=sequences, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(scores.flatten(0, 1), sequences[:, 1:].flatten())


@torch.no_grad()
def measure(model: nn.Module, text: Tensor, count: int) -> float:
    """Return the loss on so many sequences, spread evenly over a text."""
    starts = torch.linspace(0, len(text) - TUNING_LENGTH - 1, count).long()[:, None]
    sequences = text[starts + torch.arange(TUNING_LENGTH)].long()
    model.eval()
    losses = [loss_of(model, some).item() * len(some) for some in sequences.split(32)]
    model.train()
    return sum(losses) / count


def pretrained(folder: Path, tell: Callable[[str], None]) -> nn.Module:
    """Return the model trained on the first kind; it is kept in the folder."""
    model = make_model(PRETRAINING_SEED)
    file = folder / f"{BASE}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAINING_RATE, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PRETRAINING_RATE, total_steps=PRETRAINING_STEPS
    )
    model.train()
    text = batches(load(BASE).train, PRETRAINING_SEED, PRETRAINING_BATCH, LENGTH)
    for step, sequences in zip(range(PRETRAINING_STEPS), text, strict=False):
        loss = loss_of(model, sequences)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % 50 == 0:
            tell(f"{BASE}: step {step + 1} of {PRETRAINING_STEPS}, loss {loss:.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    torch.save(model.state_dict(), partial)
    partial.replace(file)
    return model


def with_adapters(model: nn.Module, adapter: str, seed: int) -> nn.Module:
    """Return the model with LoRA adapters at every linear layer of its blocks."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=SCALE, target_modules="all-linear")
    model = get_peft_model(model, config)
    if adapter == "down":
        for name, p in model.named_parameters():
            if "lora_A" in name:
                nn.init.zeros_(p)
            elif "lora_B" in name:
                nn.init.orthogonal_(p)
                p.requires_grad_(False)
    return model


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """Return the method's optimizer over what learns."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if run.method == "adamw":
        return torch.optim.AdamW(parameters, **run.hyper, weight_decay=0.0)
    if run.method == "sgd":
        return torch.optim.SGD(parameters, **run.hyper)
    if run.method == "classp":
        return CLASSPOptimizer(parameters, **run.hyper)
    optimizer = CLASSPOptimizer(parameters, history="inputs", **run.hyper)
    optimizer.watch(model)
    return optimizer


def take_history(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int) -> None:
    """Let CLASSP see the first kind of text, with lr 0: what was known before is to stay."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    text = batches(load(BASE).train, seed + 1)
    for _, sequences in zip(range(HISTORY_STEPS), text, strict=False):
        optimizer.zero_grad()
        loss_of(model, sequences).backward()
        optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def tune(
    run: Run,
    folder: Path,
    tell: Callable[[str], None],
    kinds: tuple[str, ...] = tuple(NEW),
    most_steps: int | None = None,
) -> dict[str, Any]:
    """Tune the pretrained model on one kind of text after another.

    Args:
        run: what is run.
        folder: keeps the pretrained model.
        tell: is given lines of progress.
        kinds: what it is tuned on.
        most_steps: of one kind; where they do not reach its level, the rest is left
            out. Default: :data:`MOST_STEPS`.

    Returns:
        ``losses``: in nats a byte, a row before tuning and one after each kind, a column for each
        kind of text. ``steps`` and ``reached``: by kind, the steps that were taken and whether
        the level was reached. ``curves``: by kind, the losses on its validation text, one before
        and one after every ten steps. ``seconds``: of tuning.
    """
    most_steps = MOST_STEPS if most_steps is None else most_steps
    model = with_adapters(pretrained(folder, tell), run.adapter, run.seed)
    model.train()
    optimizer = make_optimizer(run, model)
    begin = time.perf_counter()
    if isinstance(optimizer, CLASSPOptimizer):
        take_history(optimizer, model, run.seed)
    seen = [BASE, *kinds]

    def row() -> list[float]:
        texts = [load(kind) for kind in seen]
        count = TEST_SEQUENCES if run.test else VALIDATION_SEQUENCES
        return [measure(model, t.test if run.test else t.validation, count) for t in texts]

    result: dict[str, Any] = {"losses": [row()], "steps": {}, "reached": {}, "curves": {}}
    for number, kind in enumerate(kinds):
        text = load(kind)
        data = batches(text.train, 1000 * (number + 2) + run.seed)
        level = run.levels.get(kind, -math.inf)
        curve = [measure(model, text.validation, VALIDATION_SEQUENCES)]
        steps = 0
        while curve[-1] > level and steps < most_steps and math.isfinite(curve[-1]):
            for _ in range(EVERY):
                optimizer.zero_grad()
                loss = loss_of(model, next(data))
                if not loss.isfinite():
                    break
                loss.backward()
                optimizer.step()
            steps += EVERY
            curve.append(measure(model, text.validation, VALIDATION_SEQUENCES))
        result["curves"][kind] = curve
        result["steps"][kind] = steps
        result["reached"][kind] = curve[-1] <= level
        result["losses"].append(row())
        last = result["losses"][-1]
        tell(
            f"{run.method} {run.adapter} {run.hyper} seed {run.seed}: {kind} {curve[-1]:.3f} "
            f"(level {level:.3f}) in {steps} steps; "
            + ", ".join(f"{k} {x:.3f}" for k, x in zip(seen, last, strict=True))
        )
        if not result["reached"][kind]:
            break
    return result | {"seconds": time.perf_counter() - begin}


def forgetting(losses: list[list[float]]) -> float:
    """Return the mean rise of the loss, in nats a byte, since each kind was learnt.

    Args:
        losses: of :func:`tune`. The kind that was learnt last has forgotten nothing.
    """
    last = losses[-1]
    kinds = range(len(losses) - 1)
    return sum(last[k] - losses[k][k] for k in kinds) / len(kinds)
