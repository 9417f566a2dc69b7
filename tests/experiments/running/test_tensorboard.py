"""TensorBoard's log directories, read with TensorBoard's own reader."""

import pytest
import torch
from avalanche.training.plugins import EvaluationPlugin
from conftest import build, fit, linear_head
from small_data import small_config, without_times
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import experiments.running.run
from avalanche_classp import CLASSP
from experiments.cli import main
from experiments.errors import UserError
from experiments.running.compare import attempt, attempt_afar, run_all
from experiments.running.engines import LocalEngine
from experiments.running.records import Results
from experiments.running.run import run
from experiments.running.tensorboard import open_board

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own


def read(folder):
    everything = {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(folder), size_guidance=everything)
    events.Reload()
    return events


def last(events, tag):
    return events.Scalars(tag)[-1].value


def hparams(events):
    data = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    info = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info
    return {key: getattr(v, v.WhichOneof("kind")) for key, v in info.hparams.items()}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run of CLASSP on the digits: its result and its log directory."""
    folder = tmp_path_factory.mktemp("board") / "log"
    return run(small_config(epochs=2), logs=folder), folder


def test_the_histograms_are_of_the_optimizers_state(tmp_path, tiny):
    with open_board(tmp_path / "log", small_config()) as board:
        evaluator = EvaluationPlugin(*board.metrics, loggers=board.loggers)
        hyper = {"lr": 0.1, "epsilon": 0.01, "power": 1.5, "threshold": 1e-3}
        strategy = build(CLASSP, linear_head(), optimizer=None, evaluator=evaluator, **hyper)
        expected = []
        for experience in tiny.train_stream:
            fit(strategy, [experience])
            board.after_experience(strategy)
            expected.append(
                {
                    name: strategy.optimizer.state[p]["accumulator"].double().clone()
                    for name, p in strategy.model.named_parameters()
                }
            )
    events = read(tmp_path / "log")
    for name in expected[0]:
        drawn = events.Histograms(f"CLASSP_log10_A/{name}")
        rates = events.Histograms(f"CLASSP_log10_effective_rate/{name}")
        assert [h.step for h in drawn] == [h.step for h in rates] == [3, 6, 9]
        for found, rate, state in zip(drawn, rates, expected, strict=True):
            A = state[name][state[name] > 0].log10()
            assert found.histogram_value.num == len(A)
            assert found.histogram_value.sum == pytest.approx(A.sum().item(), 1e-4)
            assert found.histogram_value.min == pytest.approx(A.min().item(), abs=1e-4)
            by_hand = (0.1 / (0.01 + state[name]) ** (1 / 1.5)).log10()
            assert rate.histogram_value.num == state[name].numel()
            assert rate.histogram_value.sum == pytest.approx(by_hand.sum().item(), 1e-4)
    flat = torch.cat([a.flatten() for a in expected[-1].values()])
    mean = last(events, "CLASSP_Accumulator_Epoch/train_phase/train_stream/mean")
    assert mean == pytest.approx(flat.mean().item(), 1e-5)


def test_scalars_images_and_hparams_are_those_of_the_result(logged):
    result, folder = logged
    events = read(folder)
    for i, accuracy in enumerate(result["accuracy_matrix"][-1]):
        tag = f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{i:03d}"
        assert last(events, tag) == pytest.approx(accuracy)
        assert len(events.Scalars(tag)) == 6  # before training, too
    for key in ("average_accuracy", "forgetting", "learning_accuracy"):
        assert last(events, f"Final/{key}") == pytest.approx(result[key])
    losses = events.Scalars("Loss_Epoch/train_phase/train_stream/Task000")
    assert len(losses) == 10 and losses[-2].value > losses[-1].value
    assert len(events.Scalars("CLASSP_Free_Epoch/train_phase/train_stream")) == 10
    for name in ("accuracy_matrix", "confusion_matrix"):
        (image,) = events.Images(f"Matrices/{name}")
        assert image.encoded_image_string.startswith(b"\x89PNG") and image.width > 300
    shown = hparams(events)
    config = result["config"]
    assert shown["method"] == "classp" and shown["seed"] == 0 and shown["epochs"] == 2
    assert shown["lr"] == config["hyper"]["lr"] and shown["paper_phases"] == "False"
    assert set(shown) == set(config) - {"hyper"} | set(config["hyper"])


def test_a_run_gives_the_same_numbers_without(logged):
    result, _ = logged
    assert without_times(run(small_config(epochs=2))) == without_times(result)


@pytest.mark.parametrize("method", ["ewc", "joint"])
def test_other_methods_use_the_same_names(logged, method, tmp_path):
    run(small_config(method), logs=tmp_path)
    theirs, ours = (read(folder).Tags() for folder in (tmp_path, logged[1]))
    assert theirs["images"] == ours["images"] and not theirs["histograms"]
    own = set(theirs["scalars"]) - set(ours["scalars"])
    assert not own and {tag.split("/")[0] for tag in theirs["scalars"]} >= {"Loss_Epoch", "Final"}


def test_what_was_shown_before_an_error_is_on_disk_with_the_error(tmp_path, monkeypatch):
    def stop(strategy):
        if strategy.clock.train_exp_counter == 2:
            raise ZeroDivisionError("so it ends")
        return 0

    monkeypatch.setattr(experiments.running.run, "method_state_bytes", stop)
    result = attempt(small_config(), None, lambda: None, lambda config: tmp_path / "log")
    assert result["error"] == "ZeroDivisionError: so it ends"
    events = read(tmp_path / "log")
    assert len(events.Scalars("CLASSP_Free_Exp/train_phase/train_stream")) == 2
    (text,) = events.Tensors("Failed/text_summary")
    assert text.tensor_proto.string_val[0] == b"ZeroDivisionError: so it ends"


def test_a_directory_holds_one_run_alone(tmp_path):
    (tmp_path / "log").mkdir()
    old = tmp_path / "log" / "events.out.tfevents.1.old"
    old.write_bytes(b"")
    run(small_config("naive"), logs=tmp_path / "log")
    assert not old.exists() and len(list((tmp_path / "log").iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/log: Not a directory"):
        run(small_config("naive"), logs=tmp_path / "file" / "log")


def test_directories_come_back_from_other_machines(tmp_path, monkeypatch):
    """As on a cluster: nothing is written to the output but by the program that asked."""
    monkeypatch.setattr("experiments.running.compare.make_engine", lambda *args: LocalEngine(1))
    results, config = Results(tmp_path), small_config("naive")
    stale = results.logs(config) / "events.out.tfevents.1.old"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    assert run_all([config], results, engine="ray", tensorboard=True) == []
    assert not stale.exists()
    (result,) = results.finished([config]).values()
    assert "logs" not in result
    final = last(read(results.logs(config)), "Final/average_accuracy")
    assert final == pytest.approx(result["average_accuracy"])
    assert "logs" not in attempt_afar(config, None, lambda: None)


def test_the_command_line_writes_one_directory_a_run_unless_told_not_to(tmp_path, capsys):
    words = ["--epochs", "1", "--output"]
    main(["compare", "--methods", "naive", "classp", "--seeds", "2", *words, str(tmp_path / "a")])
    folders = sorted((tmp_path / "a" / "tensorboard").iterdir())
    assert [f.name.rsplit("-", 1)[0] for f in folders] == [
        "classp-0",
        "classp-1",
        "naive-0",
        "naive-1",
    ]
    assert f"tensorboard --logdir {tmp_path / 'a' / 'tensorboard'}" in capsys.readouterr().out
    for folder in folders:
        method, seed = folder.name.split("-")[:2]
        (accuracy,) = (
            record["average_accuracy"]
            for record in Results(tmp_path / "a").load()
            if (record["config"]["method"], record["config"]["seed"]) == (method, int(seed))
        )
        assert last(read(folder), "Final/average_accuracy") == pytest.approx(accuracy)
    config = tmp_path / "off.toml"
    config.write_text("tensorboard = false\n")
    assert main(["run", "--no-tensorboard", *words, str(tmp_path / "b")]) == 0
    assert main(["run", "--config", str(config), *words, str(tmp_path / "c")]) == 0
    assert not list(tmp_path.glob("[bc]/tensorboard"))
    assert main(["run", "--config", str(config), "--tensorboard", *words, str(tmp_path / "c")]) == 0
    assert len(list((tmp_path / "c" / "tensorboard").iterdir())) == 1
    config.write_text("tensorboard = 1\n")
    assert main(["run", "--config", str(config)]) == 2
    assert "tensorboard must be true or false, got 1" in capsys.readouterr().err
