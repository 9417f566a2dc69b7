"""The ways to choose values, and what is said of where they come from."""

import json
import pickle

import optuna
import pytest
import torch

from experiments.cli import main
from experiments.errors import UserError
from experiments.protocol import tuned_settings
from experiments.protocol.benchmarks import BENCHMARKS, make_benchmark
from experiments.protocol.config import RunConfig
from experiments.protocol.methods import CLOSED_FORM, METHODS
from experiments.protocol.tuned_settings import (
    SETTINGS_FILE,
    Setting,
    adopted,
    make_config,
    read_settings,
    searched_setting,
    settings_json,
    source_of,
)
from experiments.running.run import run


@pytest.fixture(autouse=True)
def nothing_cached():
    yield
    read_settings.cache_clear()


@pytest.fixture
def first_experience(tmp_path, monkeypatch):
    """Make the file of first experiences hold what is returned."""
    path = tmp_path / "first.json"
    monkeypatch.setattr(tuned_settings, "FIRST_EXPERIENCE_FILE", path)
    chosen = Setting(3, 32, {"lr": 0.25}, "first-experience")
    path.write_text(settings_json({"split-digits/class": {"ewc": chosen}}))
    return chosen


def test_defaults_are_the_methods_own():
    config = make_config("split-digits", "class", "ewc", settings="defaults")
    assert dict(config.hyper) == METHODS["ewc"].defaults
    assert (config.epochs, config.batch_size) == (10, 32)
    assert set(config.sources.values()) == {"default"}
    assert source_of(config) == "default"
    papers = make_config("mnist-fmnist", "domain", "classp", settings="defaults")
    assert dict(papers.hyper) == METHODS["classp"].defaults


def test_oracle_is_what_was_searched_on_the_stream():
    config = make_config("split-mnist", "class", "adam", settings="oracle")
    chosen = json.loads(SETTINGS_FILE.read_text())["split-mnist/class"]["adam"]
    assert config.hyper["lr"] == chosen["hyper"]["lr"]
    assert config.sources["lr"] == config.sources["epochs"] == "searched split-mnist/class"
    assert config.sources["beta1"] == "default"
    with pytest.raises(UserError, match="nothing was searched for classp-inputs on split-mnist"):
        make_config("split-mnist", "class", "classp-inputs", settings="oracle")
    with pytest.raises(UserError, match="split-mnist/class/mlp-1000"):
        make_config("split-mnist", "class", "ewc", settings="oracle", model="mlp-1000")


@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_transfer_takes_the_partners_values(scenario):
    for own, partner in (("split-mnist", "split-fmnist"), ("split-fmnist", "split-mnist")):
        config = make_config(own, scenario, "ewc", settings="transfer")
        theirs = searched_setting(partner, scenario, "ewc")
        assert theirs.hyper.items() <= config.hyper.items()
        assert config.epochs == theirs.epochs
        assert config.sources["lr"] == f"transferred {partner}/{scenario}"
    with pytest.raises(UserError, match=r"no partner stream; split-mnist, split-fmnist"):
        make_config("permuted-mnist", "domain", "ewc", settings="transfer")


def test_first_experience_has_a_file_of_its_own(first_experience):
    config = make_config("split-digits", "class", "ewc", settings="first-experience")
    assert (config.hyper["lr"], config.epochs) == (0.25, 3)
    assert config.sources["lr"] == "first-experience split-digits/class"
    assert config.sources["ewc_lambda"] == "default"
    assert source_of(config) == "first-experience"
    assert make_config("split-digits", "class", "ewc").hyper["lr"] != 0.25
    path, content = adopted("split-digits", "domain", {"si": first_experience})
    assert path == tuned_settings.FIRST_EXPERIENCE_FILE
    held = json.loads(content)
    assert held["split-digits/class"]["ewc"] == held["split-digits/domain"]["si"]


def test_a_searchs_folder_and_its_file_can_be_named(tmp_path):
    path = tmp_path / "search" / "settings.json"
    path.parent.mkdir()
    path.write_text(settings_json({"split-digits/class": {"ewc": Setting(2, 16, {"lr": 0.5})}}))
    for way in (tmp_path, path.parent, path):
        config = make_config("split-digits", "class", "ewc", settings=str(way))
        assert (config.hyper["lr"], config.epochs, config.batch_size) == (0.5, 2, 16)
        assert config.sources["lr"] == "searched split-digits/class"
    other = make_config("split-digits", "task", "ewc", settings=str(path))  # the only one there
    assert other.hyper == config.hyper
    assert other.sources["lr"] == "transferred split-digits/class"
    with pytest.raises(UserError, match="for si, mas on split-digits"):
        tuned_settings.require_settings(str(path), "split-digits", "class", ["ewc", "si", "mas"])
    for way, message in ((tmp_path / "no", "neither defaults"), (tmp_path / "x", "settings.json")):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            make_config("split-digits", "class", "ewc", settings=str(way))


def test_what_the_user_gives_is_above_every_way():
    config = make_config("split-mnist", "class", "ewc", 0, {"lr": 0.5}, "oracle", epochs=7)
    assert (config.hyper["lr"], config.epochs) == (0.5, 7)
    assert config.sources["lr"] == config.sources["epochs"] == "given"
    assert config.sources["ewc_lambda"] == "searched split-mnist/class"
    assert source_of(config) == "given"


def test_sources_travel_but_make_no_two_configs_differ():
    config = make_config("split-digits", "class", "ewc")
    bare = RunConfig.from_dict(config.as_dict())
    assert not bare.sources
    assert (bare, bare.key()) == (config, config.key())
    assert pickle.loads(pickle.dumps(config)).sources == config.sources


def test_methods_without_values_have_every_way():
    assert not METHODS["class-means"].defaults
    for way in ("oracle", "first-experience", "transfer"):
        config = make_config("split-mnist", "class", "class-means", settings=way)
        assert source_of(config) == "default"


def test_partners_are_each_others():
    for name, spec in BENCHMARKS.items():
        if spec.partner is not None:
            assert BENCHMARKS[spec.partner].partner == name


def test_a_first_experience_is_split_as_in_the_whole_stream():
    whole = make_benchmark("split-digits", "class", validation=True)
    alone = make_benchmark("split-digits", "class", validation=True, first_only=True)
    for stream in ("train_stream", "test_stream"):
        (only,), first = getattr(alone, stream), getattr(whole, stream)[0]
        assert only.classes_in_this_experience == first.classes_in_this_experience
        for a, b in zip(only.dataset, first.dataset, strict=True):
            assert torch.equal(a[0], b[0])
            assert a[1] == b[1]
    with pytest.raises(UserError, match="first_only"):
        make_config("split-digits", "class", "ewc", first_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m, s in METHODS.items() if s.family != CLOSED_FORM])
def test_what_a_first_experience_cannot_see_changes_nothing_of_it(method, monkeypatch):
    """Weights are the same, bit for bit; every other value that is searched changes them."""
    trained = []
    monkeypatch.setattr(
        "experiments.running.run._require_finite",
        lambda model: trained.append([p.detach().clone() for p in model.parameters()]),
    )

    def weights(hyper):
        options = {"epochs": 1, "validation": True, "first_only": True}
        scenario = spec.scenarios[0]
        run(make_config("split-digits", scenario, method, 0, hyper, "defaults", **options))
        return trained.pop()

    def other(key):
        value = METHODS[method].defaults[key]
        if isinstance(value, bool):
            return not value
        return type(value)(value * 0.9 + (value >= 1)) or 1e-4

    spec = METHODS[method]
    searched = spec.space(optuna.create_study().ask())
    usual = weights({})
    # The generator's size changes nothing but the random numbers that are left.
    unseen = set(spec.unseen) - {"latent"}
    assert all(map(torch.equal, usual, weights({key: other(key) for key in unseen})))
    for key in set(searched) - set(spec.unseen):
        assert not all(map(torch.equal, usual, weights({key: other(key)}))), key


def test_commands_say_where_each_value_comes_from(tmp_path, capsys):
    words = ["run", "--method", "ewc", "--set", "lr=0.05", "--epochs", "1", "--no-tensorboard"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "lr=0.05, epochs=1 (given)" in printed
    assert "ewc_lambda=17.24, batch_size=32 (searched on split-digits/class)" in printed
    assert main(["report", str(tmp_path)]) == 0
    said = "lr and epochs given by the user, the rest searched on validation data"
    assert said in capsys.readouterr().out
    assert main(["list", "--settings", "oracle"]) == 0
    listed = capsys.readouterr().out
    assert "ewc_lambda=17.24, lr=0.005302, epochs=3, batch_size=32 (searched on" in listed
    assert "nothing for --settings oracle" in listed


def test_by_default_only_methods_that_were_searched_are_compared(tmp_path, capsys, monkeypatch):
    words = ["compare", "--dry-run", "--output", str(tmp_path / "none")]
    one = {"split-digits/class": {"ewc": Setting(1, 32, {"lr": 0.5})}}
    monkeypatch.setattr(tuned_settings, "SETTINGS_FILE", tmp_path / "settings.json")
    (tmp_path / "settings.json").write_text(settings_json(one))
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "left out: naive, adagrad, adam, ewc-online, si" in printed
    assert "3 runs, 0 of them finished" in printed
    assert main([*words, "--methods", "ewc", "si", "--seeds", "2"]) == 0
    assert "4 runs, 0 of them finished" in capsys.readouterr().out
    (tmp_path / "settings.json").write_text("{}")
    read_settings.cache_clear()
    usual = sum(spec.usual for spec in METHODS.values())
    assert main(words) == 0
    assert f"{3 * usual} runs" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_one_value_for_all_methods_is_refused_where_one_lacks_it(tmp_path, capsys):
    words = ["compare", "--dry-run", "--output", str(tmp_path), "--methods", "ewc", "si"]
    assert main([*words, "--set", "si.lr=0.3", "--set", "lr=0.2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("lr=0.2 (given)") == printed.count("lr=0.3 (given)") == 1
    assert main([*words, "--set", "si_lambda=1"]) == 2
    assert "ewc has no si_lambda" in capsys.readouterr().err
