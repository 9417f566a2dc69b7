"""NCM, FeCAM, LFL, CWR*, PackNet and generative replay, against formulas that are not theirs.

For every break of Avalanche that experiments/avalanche_fixes.py mends there is a test of
Avalanche's own class, as in test_methods.py.
"""

from __future__ import annotations

import pytest
import torch
from avalanche.models import FeCAMClassifier, MlpVAE, NCMClassifier
from avalanche.models.packnet import PackNetModel, PackNetPlugin
from avalanche.models.utils import FeatureExtractorModel
from avalanche.training import GenerativeReplay
from avalanche.training.plugins import FeatureDistillationPlugin, LFLPlugin
from conftest import On, same, weights
from scipy.spatial.distance import mahalanobis
from sklearn.neighbors import NearestCentroid
from test_methods import (
    BODY,
    MLP,
    arguments,
    build,
    counted_bytes,
    fails_as_it_did,
    follow,
    images,
    learnt_once,
    mended,
    network,
    on_sgd,
)
from torch import nn
from torch.nn.functional import normalize

from experiments.protocol.avalanche_fixes import (
    FixedFeatureDistillationPlugin,
    FixedFeCAMClassifier,
    FixedGenerativeReplay,
    FixedLFLPlugin,
    FixedMlpVAE,
    FixedNCMClassifier,
    FixedPackNetModel,
    FixedPackNetPlugin,
)
from experiments.protocol.methods import METHODS
from experiments.protocol.prototypes import split

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own

NEW = ("ncm", "fecam", "lfl", "cwr", "packnet", "generative-replay")
PLACES = [(method, scenario) for method in NEW for scenario in METHODS[method].scenarios]
INPUTS, HIDDEN = 3 * 6 * 6, 16


@pytest.mark.parametrize(("method", "scenario"), PLACES)
def test_each_runs_in_its_scenarios_and_the_same_seed_gives_the_same_weights(method, scenario):
    rows, tensors = learnt_once(method, scenario, "mlp")
    assert [len(row) for row in rows] == [3] * 4
    assert rows[1][0] > 0.7
    assert all(t.isfinite().all() for t in tensors.values())
    again = build(method, network("mlp", scenario))
    assert follow(again, images(scenario)) == rows


def trained(method, scenario, after=lambda strategy: None, **hyper):
    strategy = build(method, network("mlp", scenario), hyper)
    follow(strategy, images(scenario, augment=False), after=after)
    return strategy


def samples(experience, scenario="class"):
    rows = images(scenario, augment=False).train_stream[experience].dataset.eval()
    return torch.stack([x for x, *_ in rows]), torch.tensor([y for _, y, *_ in rows])


# --- heads of class means -------------------------------------------------------------------------


def test_split_takes_the_head_off():
    x, task = torch.randn(4, 3, 6, 6), torch.zeros(4, dtype=torch.long)
    net = network("resnet", "class").eval()
    expected = net(x)
    features, head = split(net)
    torch.testing.assert_close(head(features(x)), expected)
    several = network("mlp", "task").eval()
    expected = several(x, task)
    features, heads = split(several)
    torch.testing.assert_close(heads(features(x), task), expected)


def test_ncm_answers_as_the_nearest_centroid_of_the_features():
    """Features and centroids on the unit sphere; the network hardly moves."""
    strategy = trained("ncm", "class", lr=1e-9)
    model = strategy.model.eval()
    x, y = (torch.cat(parts) for parts in zip(*(samples(i) for i in range(3)), strict=True))
    features = normalize(model.feature_extractor(x)).detach()
    theirs = NearestCentroid().fit(features.numpy(), y.numpy())
    on_sphere = normalize(torch.tensor(theirs.centroids_).float())
    nearest = torch.cdist(features, on_sphere).argmin(1)
    assert (model(x).argmax(1) == nearest).float().mean() > 0.99


def test_fecam_answers_with_the_least_mahalanobis_distance():
    strategy = trained("fecam", "class", lr=1e-9)
    model = strategy.model.eval()
    x, _ = samples(1)
    features = normalize(model.feature_extractor(x) ** 0.5).detach().double()
    head = model.eval_classifier
    expected = [
        [
            mahalanobis(row, normalize(mean, dim=0), torch.linalg.pinv(cov.double())) ** 2
            for mean, cov in zip(
                head.class_means_dict.values(), head.class_cov_dict.values(), strict=True
            )
        ]
        for row in features[:8]
    ]
    by_hand = -torch.tensor(expected)
    torch.testing.assert_close(model(x[:8]).detach().double(), by_hand, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("stock", "ours"),
    [(NCMClassifier, FixedNCMClassifier), (FeCAMClassifier, FixedFeCAMClassifier)],
)
def test_avalanches_class_means_answer_with_classes_never_seen(stock, ours):
    """An evaluation on later experiences makes means of 0 for their classes."""
    seen, unseen = images("class").train_stream[0], images("class").train_stream[1]
    x = torch.rand(20, 4)
    for kind in (stock, ours):
        head = kind()
        if kind in (NCMClassifier, FixedNCMClassifier):
            head.update_class_means_dict({0: -x[0], 1: -x[1]})  # farther away than 0 is
        else:
            head.update_class_means_dict({0: x[0], 1: x[1]})
            head.update_class_cov_dict({0: 0.01 * torch.eye(4), 1: 0.01 * torch.eye(4)})
        head.eval()
        head.adaptation(seen)
        head.adaptation(unseen)
        answers = head(x).argmax(1)
        assert (answers > 1).any() == (kind is stock), mended(ours)
    fails_as_it_did(AssertionError, lambda: stock()(x), ours)
    assert ours()(x).shape == (20, 0)


def test_avalanches_fecam_mixes_a_new_covariance_with_the_identity():
    for kind in (FeCAMClassifier, FixedFeCAMClassifier):
        head = kind()
        head.update_class_means_dict({0: torch.ones(4)})
        head.update_class_cov_dict({0: torch.eye(4)})
        head.eval()
        head.adaptation(images("class").train_stream[1])
        head.update_class_cov_dict({2: 3 * torch.eye(4)})
        whole = torch.equal(head.class_cov_dict[2], 3 * torch.eye(4))
        assert whole == (kind is FixedFeCAMClassifier), mended(FixedFeCAMClassifier)


def test_avalanches_feature_distillation_keeps_a_former_model_with_dropout():
    x = torch.randn(4, 3, 6, 6)
    for kind in (FeatureDistillationPlugin, FixedFeatureDistillationPlugin):
        net = FeatureExtractorModel(*split(network("resnet", "domain")))
        net.feature_extractor.classifier = nn.Dropout(0.5)
        plugin = kind(1.0)
        follow(on_sgd(net, plugin), images("domain"))
        former = plugin.prev_model
        steady = torch.equal(former(x), former(x))
        assert steady == (kind is not FeatureDistillationPlugin), mended(kind)


# --- less-forgetful learning ----------------------------------------------------------------------


class Named(FeatureExtractorModel):
    """What Avalanche's plugin wants; it would refuse a model that is no BaseModel."""

    def get_features(self, x):
        return self.feature_extractor(x)


def test_avalanches_lfl_trains_in_evaluation_mode(monkeypatch):
    monkeypatch.setattr(LFLPlugin, "before_training", lambda self, strategy: None)
    for kind, expected in ((LFLPlugin, {True, False}), (FixedLFLPlugin, {True})):
        net = Named(*split(network("resnet", "domain")))
        modes: set[bool] = set()
        watch = On(
            before_forward=lambda s, modes=modes: modes.add(s.model.training),
            before_training_exp=lambda s: setattr(s.model, "features", None),
            after_update=lambda s: setattr(s.model, "features", None),
        )
        follow(on_sgd(net, kind(0.1), plugins=[watch]), images("domain"))
        assert modes == expected, mended(FixedLFLPlugin)


def test_lfl_adds_the_mean_squared_way_of_the_features_and_keeps_the_head():
    added, former, heads = [], [], []

    def compare(s):
        if former:
            features, _ = split_of(s.model)
            way = features(s.mb_x) - former[-1](s.mb_x)
            added.append((s.loss - s.criterion()).item())
            assert added[-1] == pytest.approx(3 * way.square().mean().item(), rel=1e-3, abs=1e-6)

    def keep(s):
        net = network("mlp", "domain")
        features, _ = split(net)
        features.load_state_dict(s.model.feature_extractor.state_dict())
        former.append(features)
        heads.append(s.model.train_classifier.weight.clone())

    strategy = build("lfl", network("mlp", "domain"), {"lambda_e": 3.0})
    strategy.plugins.append(On(after_backward=compare))
    follow(strategy, images("domain"), after=keep)
    assert max(added) > 1e-3
    assert all(torch.equal(head, heads[0]) for head in heads)


def split_of(model):
    return model.feature_extractor, model.train_classifier


# --- CWR* -----------------------------------------------------------------------------------------


def test_cwr_keeps_each_classs_weights_less_their_mean():
    raw, bodies = [], []
    strategy = build("cwr", network("mlp", "class"))
    note = On(after_training_exp=lambda s: raw.append(s.model.classifier.weight.detach().clone()))
    strategy.plugins.insert(0, note)
    keep = On(after_training_exp=lambda s: bodies.append(weights(s.model.body)))
    strategy.plugins.append(keep)
    follow(strategy, images("class"))
    expected = torch.cat([raw[i][2 * i : 2 * i + 2] for i in range(3)])
    means = torch.stack([raw[i][2 * i : 2 * i + 2].mean() for i in range(3)])
    expected -= means.repeat_interleave(2)[:, None]
    torch.testing.assert_close(strategy.model.classifier.weight, nn.Parameter(expected))
    assert all(same(body, bodies[0]) for body in bodies)


# --- PackNet --------------------------------------------------------------------------------------


def test_packnet_never_changes_what_an_earlier_task_answers():
    answers = []
    x, _ = samples(0, "task")
    task = torch.zeros(len(x), dtype=torch.long)

    def ask(s):
        s.model.eval()
        answers.append(s.model(x, task).detach())

    strategy = trained("packnet", "task", after=ask, prune=0.75)
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    layer = strategy.model.wrappee.body[1]
    counts = layer.task_index.flatten().bincount(minlength=4)
    size = INPUTS * HIDDEN
    given_up = int(size * 0.75)
    assert counts.tolist()[:2] == [size - given_up, given_up - int(given_up * 0.75)]
    assert counts.sum() == size


def test_packnet_prunes_when_the_share_of_steps_is_left():
    states = []
    strategy = build("packnet", network("mlp", "task"), {"retrain": 0.25})
    note = On(before_forward=lambda s: states.append(s.model.state.name))
    strategy.plugins.append(note)
    strategy.train(images("task").train_stream[0], eval_streams=[])
    assert states == ["TRAINING"] * 9 + ["POST_PRUNE"] * 3


def test_avalanches_packnet_takes_no_heads_by_task_and_no_single_epoch():
    def forward():
        x = torch.randn(2, 3, 6, 6)
        return PackNetModel(network("mlp", "task"))(x, torch.zeros(2, dtype=torch.long))

    fails_as_it_did((TypeError, AttributeError), forward, FixedPackNetModel)

    def train():
        net = FixedPackNetModel(*split(network("mlp", "task")))
        strategy = on_sgd(net, PackNetPlugin(1, 0.5), train_epochs=1)
        strategy.train(images("task").train_stream[0], eval_streams=[])

    fails_as_it_did(ValueError, train, FixedPackNetPlugin)


# --- generative replay ----------------------------------------------------------------------------


def test_generative_replay_adds_as_many_samples_that_the_former_network_labels():
    batches, formers = [], []
    strategy = build("generative-replay", network("mlp", "class"))

    def check(s):
        old = s.mb_x[8:]
        batches.append((s.clock.train_exp_counter, len(s.mb_x)))
        if formers:
            assert torch.equal(s.mb_y[8:], formers[-1](old).argmax(1))
            assert old.shape[1:] == (3, 6, 6)

    def keep(s):
        net = network("mlp", "class")
        net.load_state_dict(s.model.state_dict())
        formers.append(net)

    strategy.plugins.append(On(before_forward=check))
    follow(strategy, images("class"), after=keep)
    assert {size for experience, size in batches if experience == 0} == {8}
    assert {size for experience, size in batches if experience > 0} == {16}


def test_a_generator_learns_what_samples_look_like():
    """Its answers come near to the data's mean and spread, below MNIST's darkest pixel, too."""
    torch.manual_seed(0)
    data = torch.randn(256, 3, 2) * 0.5 - 2
    vae = FixedMlpVAE(6, 4, "cpu")
    adam = torch.optim.Adam(vae.parameters(), lr=0.01)
    for _ in range(200):
        found, mean, logvar = vae(data)
        loss = (found - data).square().sum()
        loss = loss + 0.5 * (-1 - logvar + logvar.exp() + mean**2).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    made = vae.eval().generate(256)
    assert made.shape == data.shape
    assert made.mean().item() == pytest.approx(-2, abs=0.2)


def test_avalanches_generator_makes_images_alone_and_none_darker_than_mnist():
    fails_as_it_did((TypeError, ValueError), lambda: MlpVAE((64,))(torch.randn(4, 64)), FixedMlpVAE)
    darkest = MlpVAE((3, 6, 6)).eval().generate(50).min()
    assert darkest > -0.43, mended(FixedMlpVAE)


def test_avalanches_generator_does_not_follow_the_epochs():
    def epochs(strategy):
        seen = []
        plugin = On(after_training_epoch=lambda s: seen.append(1))
        strategy.generator_strategy.plugins.append(plugin)
        strategy.train_epochs = 3
        strategy.train(images("class").train_stream[0], eval_streams=[])
        return len(seen)

    net = network("mlp", "class")
    sgd = torch.optim.SGD(net.parameters(), lr=0.05)
    stock = GenerativeReplay(
        model=net,
        optimizer=sgd,
        generator_strategy=build("generative-replay", net, train_epochs=1).generator_strategy,
        **arguments(train_epochs=1),
    )
    assert epochs(stock) == 1, mended(FixedGenerativeReplay)
    ours = build("generative-replay", network("mlp", "class"), train_epochs=1)
    assert epochs(ours) == 3


# --- memory ---------------------------------------------------------------------------------------

FEATURES_ONLY = 4 * BODY


def vae_bytes(inputs, latent):
    """Return the bytes of the generator, and of the numbers that are trained, by hand."""
    layers = [(inputs, 400, True), (400, 128, True), (128, latent, False), (128, latent, False)]
    layers += [(128, 10, False), (latent, 64, True), (64, 128, True), (128, 256, True)]
    layers += [(256, inputs, False)]
    trained_numbers = sum(i * o + o + 2 * o * norm for i, o, norm in layers)
    statistics = sum(4 * 2 * o + 8 for _, o, norm in layers if norm)
    return 4 * trained_numbers + statistics, layers


def test_state_is_counted_to_the_byte():
    labels = [2, 4, 6]
    ncm = counted_bytes(build("ncm", network("mlp", "class")), images("class"))
    assert ncm == [FEATURES_ONLY + 4 * HIDDEN * n for n in labels]
    fecam = counted_bytes(build("fecam", network("mlp", "class")), images("class"))
    assert fecam == [FEATURES_ONLY + 4 * (HIDDEN + HIDDEN**2) * n for n in labels]
    lfl = counted_bytes(build("lfl", network("mlp", "class")), images("class"))
    assert lfl == [4 * MLP] * 3
    cwr = counted_bytes(build("cwr", network("mlp", "class")), images("class"))
    assert cwr == [4 * HIDDEN * n for n in labels]
    # Three masks of a byte for each weight; a code and three counters of four bytes.
    packnet = counted_bytes(build("packnet", network("mlp", "task")), images("task"))
    assert packnet == [3 * INPUTS * HIDDEN + 4 * 4 + 3 * 4] * 3


def test_the_state_of_generative_replay_is_a_generator_and_copies():
    """The generator, its moments; from the second experience on a former one twice, and a former
    network: Avalanche's two plugins each keep their own."""
    counted = counted_bytes(build("generative-replay", network("mlp", "class")), images("class"))
    generator, layers = vae_bytes(INPUTS, 16)
    # Adam has moments of what has a gradient: not of the label's head, which nothing trains.
    moved = [layer for layer in layers if layer[1] != 10]
    numbers = sum(i * o + o + 2 * o * norm for i, o, norm in moved)
    tensors = sum(2 + 2 * norm for *_, norm in moved)
    first = generator + 8 * numbers + 4 * tensors
    assert counted == [first, first + 2 * generator + 4 * MLP, first + 2 * generator + 4 * MLP]
