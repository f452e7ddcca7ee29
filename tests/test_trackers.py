"""Where a run is followed (`--track`): real runs, read back by each library or by its
own format. No test needs a network.
"""

import json
import os
import re
import signal
import sys

import pytest
from many_processes import end, one_process, start, two_processes
from refusals import refused, user_reads
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import as_flags, finetuning_flags, kill_after, log_lines

import run_class_finetuning
from engine_for_finetuning import FinetuningStage
from monitoring import trackers
from monitoring.tracked_run import TrackedRun

SERVICES = ("wandb", "mlflow", "trackio")
TRAINING = as_flags(print_freq=1, image_freq=1, save_ckpt_steps=2)
STEPS = list(range(1, 9))  # of two epochs


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    """Each library keeps what it is told in this test's folder."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)


def wandb_records(path):
    """Of a .wandb file: LevelDB's log format, whose records are wandb's protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block is empty
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


def read_wandb(out):
    """({name: [(step, value)]}, pictures, ids, exit codes, flags) of all parts of the
    run.
    """
    scalars, shown, ids, exits, config = {}, [], set(), [], {}
    for path in sorted(out.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add((record.run.project, record.run.display_name, record.run.run_id))
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if kind == "exit":
                exits.append(record.exit.exit_code)
            if kind != "history":
                continue
            for item in record.history.item:
                name, value = "/".join(item.nested_key) or item.key, json.loads(item.value_json)
                if isinstance(value, float | int) and not name.startswith("_"):
                    scalars.setdefault(name, []).append((record.history.step.num, value))
                elif isinstance(value, dict):
                    shown.append((name, record.history.step.num))
    return scalars, shown, ids, exits, config


def read_mlflow(tmp_path):
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("beit2")
    (run,) = client.search_runs([experiment.experiment_id])
    scalars = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    return scalars, images, run


def read_tensorboard(folder):
    """{name: [(step, value)]} of one run of TensorBoard's."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def steps(points):
    return [step for step, _ in points]


def train_killed_once(data, out, monkeypatch, *more):
    """Killed after step 7, one behind the checkpoint, and started again."""
    flags = finetuning_flags(data, out, *TRAINING, *more)
    with monkeypatch.context() as patched:
        kill_after(7, patched)
        with pytest.raises(KeyboardInterrupt):
            run_class_finetuning.main(flags)
    run_class_finetuning.main(flags)


def test_wandb_goes_on_in_the_same_run(data, tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    taken_over = []

    def evaluate(stage, model):
        handlers = {signal.getsignal(number).__qualname__ for number in (signal.SIGINT, signal.SIGTERM)}
        taken_over.append((handlers - {"StopSignal.note"}, sys.excepthook.__module__))
        return stage.measure(model)[0]

    monkeypatch.setattr(FinetuningStage, "evaluate", evaluate)
    train_killed_once(data, tmp_path / "out", monkeypatch, "--track", "wandb")
    assert {(frozenset(handlers), hook) for handlers, hook in taken_over} == {(frozenset(), "errors")}
    scalars, _, ids, exits, config = read_wandb(tmp_path / "out")
    # the second part tells again, with the same value, what came after the checkpoint
    assert steps(scalars["train/loss"]) == [*STEPS[:7], *STEPS[6:]]
    assert scalars["train/loss"][6] == scalars["train/loss"][7]
    assert steps(scalars["test/loss"]) == steps(scalars["test/acc1"]) == [4, 8]
    assert scalars["test/loss"][1][1] == pytest.approx(log_lines(tmp_path / "out")[1]["test_loss"])
    ((project, name, known),) = ids
    assert (project, name) == ("beit2", "out")
    assert known == json.loads((tmp_path / "out/trackers.json").read_text())["wandb"]
    assert exits == [1, 0]
    assert config["lr"] == 1e-3
    assert "wandb" not in capfd.readouterr().err  # no banner between the lines of progress
    assert not (tmp_path / "out/train").exists()  # TensorBoard was not asked for


@pytest.mark.slow
def test_mlflow_goes_on_in_the_same_run(data, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    train_killed_once(data, tmp_path / "out", monkeypatch, "--track", "mlflow")
    scalars, _, run = read_mlflow(tmp_path)
    assert steps(scalars["train/loss"]) == STEPS
    assert steps(scalars["test/acc1"]) == [4, 8]
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    assert run.data.params["lr"] == "0.001"
    assert run.data.params["track"] == "mlflow"


def test_trackio_goes_on_in_the_same_run(data, tmp_path, monkeypatch, capfd):
    pytest.importorskip("trackio")
    train_killed_once(data, tmp_path / "out", monkeypatch, "--track", "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("beit2")
    assert name == json.loads((tmp_path / "out/trackers.json").read_text())["trackio"]
    logs = SQLiteStorage.get_logs("beit2", name)
    assert [entry["step"] for entry in logs if "train/loss" in entry] == STEPS
    assert [entry["step"] for entry in logs if "test/acc1" in entry] == [4, 8]
    assert not re.search(r"^\* ", "".join(capfd.readouterr()), re.MULTILINE)  # what trackio says


def test_each_step_is_once_in_tensorboard(data, tmp_path, monkeypatch):
    train_killed_once(data, tmp_path / "out", monkeypatch)
    train, test = (read_tensorboard(tmp_path / "out" / curve) for curve in ("train", "test"))
    assert steps(train["learning/loss"]) == steps(train["optimizer/lr"]) == STEPS
    assert steps(train["speed/data_wait"]) == STEPS
    assert steps(test["learning/loss"]) == [4, 8]  # the same name, so on the same chart
    assert train["learning/acc1"][-1][1] == pytest.approx(
        100 * tiny_runs_metrics(tmp_path / "out")[-1]["class_acc"]
    )
    assert steps(test["learning/acc1"]) == [4, 8]
    assert not [name for name in train | test if "epoch" in name or name.endswith("/images")]
    events = EventAccumulator(str(tmp_path / "out")).Reload()
    texts = {name: events.Tensors(name)[0].tensor_proto.string_val[0] for name in events.Tags()["tensors"]}
    assert b"| lr | 0.001 |" in texts["flags/text_summary"]
    assert texts["command/text_summary"]


def tiny_runs_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_another_run_in_the_folder_starts_anew(data, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    flags = finetuning_flags(data, tmp_path / "out", "--track", "tensorboard", "wandb")
    run_class_finetuning.main([*flags, "--print_freq", "1"])
    run_class_finetuning.main([*flags, "--no_auto_resume", "--print_freq", "2"])
    assert steps(read_tensorboard(tmp_path / "out/train")["learning/loss"]) == [2, 4, 6, 8]
    assert len(read_wandb(tmp_path / "out")[2]) == 2


def test_none_tracks_nothing(data, tmp_path):
    run_class_finetuning.main(finetuning_flags(data, tmp_path / "out", "--track", "none"))
    assert not list((tmp_path / "out").rglob("*tfevents*"))
    assert (tmp_path / "out/metrics.jsonl").exists()
    assert not (tmp_path / "out/trackers.json").exists()


@pytest.mark.parametrize("name", SERVICES)
def test_a_missing_package_is_said_before_images_are_searched(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    flags = finetuning_flags(tmp_path / "no-images", tmp_path / "out", "--track", "tensorboard", name)
    error = refused(run_class_finetuning.main, flags, capsys)
    assert f"--track {name}: the package {name} is not installed: pip install {name}" in error


def test_names_that_do_not_go_are_refused(tmp_path, capsys):
    flags = finetuning_flags(tmp_path / "no-images", tmp_path / "out")
    error = refused(run_class_finetuning.main, [*flags, "--track", "wandb", "none"], capsys)
    assert "none goes with no other name" in error
    assert "invalid choice: 'comet'" in refused(
        run_class_finetuning.main, [*flags, "--track", "comet"], capsys
    )
    with user_reads("--track comet: choose from tensorboard"):
        trackers.check_trackers(["comet"])


def test_wandb_without_a_key_never_asks(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it keeps the settings of the tests before
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    flags = finetuning_flags(tmp_path / "no-images", tmp_path / "out", "--track", "wandb")
    assert "run `wandb login` once, or set WANDB_MODE=offline" in refused(
        run_class_finetuning.main, flags, capsys
    )


class Failing:
    """A tracker that fails from its n-th figure to its m-th."""

    def __init__(self, first, last):
        self.calls, self.first, self.last, self.told, self.status = 0, first, last, [], None

    def scalars(self, values, step):
        self.calls += 1
        if self.first <= self.calls <= self.last:
            raise OSError(28, "No space left on device")
        self.told.append(step)

    def pictures(self, images, step): ...
    def flush(self): ...

    def close(self, status):
        self.status = status


def test_a_tracker_that_fails_does_not_end_the_run(data, tmp_path, monkeypatch, capsys):
    failing = Failing(3, 3)
    monkeypatch.setattr(trackers, "TensorBoard", lambda run: failing)
    run_class_finetuning.main(finetuning_flags(data, tmp_path / "out", "--print_freq", "1"))
    said = capsys.readouterr().out
    assert said.count("warning: tensorboard failed") == 1
    assert "No space left on device" in said
    assert failing.told == [1, 2, 5, 6, 7, 8, 8]  # again from the next epoch on
    assert failing.status == "finished"
    assert len(log_lines(tmp_path / "out")) == 2


def test_a_service_that_does_not_open_ends_a_new_run_alone(tmp_path, monkeypatch, caplog):
    def fail(run, known):
        raise ConnectionError("no route to wandb")

    monkeypatch.setitem(trackers.SERVICES, "wandb", fail)
    with user_reads(r"--track wandb: it cannot be opened \(no route to wandb\)"):
        trackers.open_trackers(["wandb"], TrackedRun(str(tmp_path)))
    monkeypatch.setattr(trackers.log, "propagate", True)
    assert trackers.open_trackers(["wandb"], TrackedRun(str(tmp_path), first_step=4)).trackers == {}
    assert "the run goes on without it" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_run_that_goes_on(name, data, tmp_path):
    """To all processes of the group, as a terminal or a cluster sends it."""
    pytest.importorskip("wandb")
    out = tmp_path / "out"
    flags = finetuning_flags(data, out, *TRAINING, *as_flags(epochs=40, track="wandb"))
    process = start([sys.executable, "run_class_finetuning.py", *flags])
    for line in process.stdout:
        if "epoch 2/40 done" in line:
            os.killpg(process.pid, name)
            break
    status, said = end(process, timeout=60)
    assert status == (-name if name == signal.SIGKILL else 0), said
    assert "wandb" not in said
    one_process("run_class_finetuning.py", [*flags, "--epochs", "4"])
    scalars, _, ids, exits, _ = read_wandb(out)
    assert len(ids) == 1
    assert set(steps(scalars["train/loss"])) >= set(range(9, 17))
    assert exits[-1] == 0


@pytest.mark.slow
def test_of_two_processes_one_tracks(data, tmp_path):
    pytest.importorskip("wandb")
    flags = finetuning_flags(data, tmp_path / "out", *TRAINING, "--track", "tensorboard", "wandb")
    two_processes("run_class_finetuning.py", [*flags, "--batch_size", "2"])
    scalars, _, ids, exits, _ = read_wandb(tmp_path / "out")
    assert (steps(scalars["train/loss"]), len(ids), exits) == (STEPS, 1, [0])
    assert len(list((tmp_path / "out/train").iterdir())) == 1
    assert steps(read_tensorboard(tmp_path / "out/train")["learning/loss"]) == STEPS
