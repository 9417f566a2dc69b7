"""Methods of Avalanche 0.6.0 that break in these experiments, each mended by a small subclass.

``tests/test_methods.py`` shows every break on Avalanche's own class; the test that fails there
after an update of Avalanche names the class here that can go.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks.utils.data_loader import SingleDatasetDataLoader
from avalanche.models import FeCAMClassifier, MlpVAE, NCMClassifier
from avalanche.models.packnet import PackNetModel, PackNetPlugin
from avalanche.models.utils import FeatureExtractorModel
from avalanche.training import GenerativeReplay, JointTraining, VAETraining
from avalanche.training.losses import MaskedCrossEntropy
from avalanche.training.plugins import (
    EvaluationPlugin,
    FeatureDistillationPlugin,
    GenerativeReplayPlugin,
    LFLPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    RWalkPlugin,
    SynapticIntelligencePlugin,
)
from torch import Tensor, nn
from torch.nn.functional import normalize


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
        targets = nn.functional.one_hot(targets, logits.shape[1])[:, known]
        return -(targets * logits[:, known].log_softmax(1)).sum(1).mean()

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._adaptation(strategy.experience.classes_in_this_experience)


class FixedFeatureDistillationPlugin(FeatureDistillationPlugin):
    """Feature distillation from a former network that answers as it does in an evaluation.

    Break: ``after_training_exp`` copies the model in training mode, with the faults of
    :class:`FixedLwFPlugin`'s, and the classifiers with it, which nobody asks.
    """

    prev_model: Any

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().after_training_exp(strategy, **kwargs)
        features = self.prev_model.feature_extractor
        self.prev_model = FeatureExtractorModel(features, nn.Identity()).eval()


class FixedLFLPlugin(LFLPlugin):
    """Less-forgetful learning in training mode, of any ``FeatureExtractorModel``.

    Breaks:
        ``compute_features`` leaves the model in evaluation mode: from the second experience on it
        is trained without dropout, and batch norm never learns on.
        ``before_training`` takes subclasses of ``BaseModel`` alone.
    """

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        pass

    def compute_features(self, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        self.prev_model(x)
        return model.features, self.prev_model.features

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        strategy.model.features = None  # a tensor with a gradient cannot be copied
        super().after_training_exp(strategy, **kwargs)


UNSEEN = -1e30
"""The score of a class without samples: it is never the answer, and a loss stays finite."""


class FixedNCMClassifier(NCMClassifier):
    """Nearest class means that never answer with a class they have not seen.

    Breaks:
        ``init_missing_classes``, which an evaluation calls, gives a class without samples the mean
        0, which is nearer than the others to what is far from all of them.
        ``forward`` fails before any class is known (AssertionError).
    """

    def init_missing_classes(self, *args: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        scores = x.new_full((len(x), self.max_class + 1), UNSEEN)
        if seen := list(self.class_means_dict):
            scores[:, seen] = super().forward(x)[:, seen]
        return scores


class FixedFeCAMClassifier(FeCAMClassifier):
    """FeCAM that never answers with a class it has not seen.

    Breaks:
        ``init_missing_classes``, which an evaluation calls, gives a class without samples the mean
        0 and the covariance I. With these it is nearer than the others, and its covariance is
        averaged with I when it comes.
        ``forward`` inverts every covariance for every mini-batch, makes a matrix of samples ×
        samples of which it takes the diagonal, and fails before any class is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inverses: dict[int, Tensor] = {}

    def init_missing_classes(self, *args: Any) -> None:
        pass

    def _vectorize_cov_dict(self) -> None:
        """Invert the covariances, instead of copying them to a buffer that nobody reads."""
        self.inverses = {label: torch.linalg.pinv(c) for label, c in self.class_cov_dict.items()}

    def _tukey_transforms(self, x: Tensor) -> Tensor:
        return x**self.tukey1  # Avalanche copies x as no tensor should be, with a warning

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        scores = x.new_full((len(x), self.max_class + 1), UNSEEN)
        x = normalize(self.apply_transforms(x))
        for label, mean in self.class_means_dict.items():
            away = x - normalize(mean, dim=0)
            scores[:, label] = -((away @ self.inverses[label]) * away).sum(1)
        return scores


class FixedPackNetModel(PackNetModel):
    """PackNet whose tasks have heads of their own, as in the paper.

    Break: ``forward`` gives a model with several heads no task labels (TypeError), and ``wrap``
    cannot pack heads that come later.

    Args:
        features: what is packed.
        heads: the heads, which are not.
    """

    def __init__(self, features: nn.Module, heads: nn.Module) -> None:
        super().__init__(features)
        self.heads = heads

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        return self.heads(super().forward(x, task_labels).flatten(1), task_labels)


class FixedPackNetPlugin(PackNetPlugin):
    """PackNet that prunes after a share of the steps.

    Break: it prunes between epochs, so ``before_training`` refuses a single one.

    Args:
        prune_proportion: share of a layer's free weights that is given up.
        retrain: share of an experience's steps that is left for the others.
    """

    def __init__(self, prune_proportion: float, retrain: float) -> None:
        super().__init__(0, prune_proportion)
        self.retrain = retrain

    def before_training(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def before_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def before_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        steps = strategy.train_epochs * len(strategy.dataloader)
        if strategy.clock.train_exp_iterations == min(round((1 - self.retrain) * steps), steps - 1):
            strategy.model.activate_task(strategy.model.task_count)
            strategy.model.prune(self.prune_proportion(strategy.clock.train_exp_counter))


class FixedMlpVAE(MlpVAE):
    """The autoencoder of generative replay for samples of any shape and range.

    Break: the decoder's answers are images, and lie between MNIST's darkest and lightest pixel.
    """

    def __init__(self, inputs: int, latent: int, device: Any) -> None:
        super().__init__((inputs,), nhid=latent, device=device)
        self.decoder.decode = self.decoder.decode[0]  # without the logistic function
        self.decoder.invTrans = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        self.decoder.shape = x.shape[1:]
        return super().forward(x)


class FixedGenerativeReplay(GenerativeReplay):
    """Generative replay whose generator is trained for as many epochs as the network.

    Break: the epochs are those that the strategy was made with; ``train_epochs`` set later do not
    count. What a default generator measures is printed.

    Args:
        inputs: numbers in a sample.
        latent: numbers that a sample is made from.
        generator_lr: Adam's learning rate for the generator; the rest of Adam is Avalanche's.
        **common: further arguments of Avalanche's ``GenerativeReplay``.
    """

    def __init__(self, *, inputs: int, latent: int, generator_lr: float, **common: Any) -> None:
        device = common.get("device", "cpu")
        generator = FixedMlpVAE(inputs, latent, device)
        adam = torch.optim.Adam(generator.parameters(), lr=generator_lr, weight_decay=1e-4)
        super().__init__(
            generator_strategy=VAETraining(
                model=generator,
                optimizer=adam,
                train_mb_size=common.get("train_mb_size", 1),
                device=device,
                plugins=[GenerativeReplayPlugin()],
                evaluator=EvaluationPlugin(loggers=[]),
            ),
            **common,
        )

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.generator_strategy.train_epochs = self.train_epochs
        super()._before_training_exp(**kwargs)
