"""Methods of Avalanche 0.6.0 that break in these experiments, each mended by a small subclass.

``tests/test_methods.py`` shows every break on Avalanche's own class; the test that fails there
after an update of Avalanche names the class here that can go.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import SingleDatasetDataLoader
from avalanche.training import JointTraining
from avalanche.training.losses import MaskedCrossEntropy
from avalanche.training.plugins import (
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    RWalkPlugin,
    SynapticIntelligencePlugin,
)
from torch import Tensor


class FixedSIPlugin(SynapticIntelligencePlugin):
    """Synaptic intelligence with importances above zero on a CPU.

    Break: ``extract_weights`` copies only where the weights are on another device. On a CPU the
    weights "before the step" are the model's own memory and change with it, the step's length is
    always 0, and so are all importances: the method trains as plain SGD.
    """

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        _copy_all(self.ewc_data[0])

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_iteration(strategy, **kwargs)
        _copy_all(self.syn_data["old_theta"])


def _copy_all(held: dict[str, Any]) -> None:
    for entry in held.values():
        entry.data = entry.data.clone()


class FixedMASPlugin(MASPlugin):
    """Memory aware synapses that train on where a mini-batch is fitted perfectly.

    Break: ``before_backward`` takes a loss of exactly 0 for a missing one and raises ValueError.
    """

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.loss == 0:
            # The least value that is not zero; the gradient stays as it is.
            strategy.loss = strategy.loss + torch.finfo(strategy.loss.dtype).tiny
        super().before_backward(strategy, **kwargs)


class FixedLwFPlugin(LwFPlugin):
    """Learning without forgetting whose former model answers as it does in an evaluation.

    Break: ``LearningWithoutForgetting.post_adapt`` copies the model in training mode and leaves the
    copy there. Its dropout makes the soft targets noise, its batch norm normalises by the
    mini-batch and goes on changing.
    """

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().after_training_exp(strategy, **kwargs)
        self.lwf.prev_model.eval()


class FixedRWalkPlugin(RWalkPlugin):
    """Riemannian walk that trains in training mode, with any number of steps and of heads.

    Breaks:
        ``before_training_iteration`` (by ``_update_grad``) leaves the model in evaluation mode:
        it is trained without dropout, and batch norm never learns its statistics.
        ``before_training`` lists the parameters before the experience's head is made: KeyError,
        unless an evaluation has made all heads before.
        ``after_training_exp`` divides by the largest score and the largest importance also where
        these are 0, as the score is before the first ``delta_t`` iterations are over: from the
        next experience on the weights are NaN.
    """

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        self.before_training(strategy)

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        training = strategy.model.training
        super().before_training_iteration(strategy, *args, **kwargs)
        strategy.model.train(training)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        super().after_training_exp(strategy, *args, **kwargs)
        scores, importances = _largest(self.exp_scores), _largest(self.exp_importance)
        if scores != 0 and importances != 0:
            return
        for name, penalty in self.exp_penalties.items():
            score = self.exp_scores[name].expand(penalty.shape).relu()
            penalty.data = _share(self.exp_importance[name].data, importances) + _share(
                score, scores
            )


def _largest(held: dict[str, Any]) -> Tensor:
    return torch.stack([entry.data.max() for entry in held.values()]).max()


def _share(values: Tensor, largest: Tensor) -> Tensor:
    return torch.zeros_like(values) if largest == 0 else values / largest


class FixedReplayPlugin(ReplayPlugin):
    """Replay without a warning for every experience, and with a buffer of any size.

    Breaks:
        ``after_training_exp`` calls a method that Avalanche deprecates, and its warning passes
        every filter.
        A buffer with fewer samples than there are experiences holds empty groups, and
        ``AvalancheDataset`` cannot concatenate several that have task labels: AttributeError.
    """

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.storage_policy.post_adapt(strategy, strategy.experience)
        groups = self.storage_policy.buffer_groups
        for key in [key for key, group in groups.items() if not len(group.buffer)]:
            del groups[key]


class FixedJointTraining(JointTraining):
    """Joint training that can be evaluated first, with mini-batches of any size.

    Breaks:
        ``model_adaptation`` makes heads for the experiences of the training alone: an evaluation
        before it finds no head (KeyError).
        ``make_train_dataloader`` takes as many samples of each task, and refuses mini-batches
        that are smaller than the number of tasks (AssertionError without a text).
    """

    def model_adaptation(self, model: Any = None) -> Any:
        if self.is_training:
            return super().model_adaptation(model)
        return super(JointTraining, self).model_adaptation(model)

    def make_train_dataloader(self, shuffle: bool = True, **kwargs: Any) -> None:
        if self.train_mb_size >= len(self.adapted_dataset.targets_task_labels.uniques):
            super().make_train_dataloader(shuffle=shuffle, **kwargs)
            return
        self.dataloader = SingleDatasetDataLoader(
            self.adapted_dataset, batch_size=self.train_mb_size, shuffle=shuffle
        )


class FixedMaskedCrossEntropy(MaskedCrossEntropy):
    """Cross-entropy over some of the classes, finite for all outputs, and before any training.

    Breaks:
        ``__call__`` takes the logarithm of a softmax, which is NaN where outputs are more than 104
        apart, and fails in an evaluation before training (IndexError: no class is known).
        ``before_training_exp`` is deprecated, and warns in every experience.
    """

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        known = self.current_mask(logits.shape[1]) or list(range(logits.shape[1]))
        targets = torch.nn.functional.one_hot(targets, logits.shape[1])[:, known]
        return -(targets * logits[:, known].log_softmax(1)).sum(1).mean()

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._adaptation(strategy.experience.classes_in_this_experience)
