"""What a run writes reaches TensorBoard and MLflow whole and once, from a process that the training never notices."""
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import INSTEAD, until

from llm_trainer import workspace
from llm_trainer.cli.commands import main
from llm_trainer.runs import loggers
from llm_trainer.runs.run import Run, create_run
from llm_trainer.system.files import Appender, encode, write_whole
from llm_trainer.system.locks import Lock

ROOT = Path(__file__).parent.parent
accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                  reason="needs: pip install tensorboard")


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run of 20 steps that is over"
    space = workspace.init(tmp_path / "space")
    monkeypatch.chdir(space.root)
    config = {"training": {"lr": 0.01, "optimizer": "muon"}, "data": {"dataset": "a|b *c*", "shuffle": True}}
    run = create_run(space.runs, config, "demo")
    write(run, range(1, 21))
    end(run, "completed")
    return run


def write(run, steps, attempt=1, off=0.0):
    "Rows of those steps, the way a worker writes them"
    metrics, samples = Appender(run.folder / "metrics.jsonl"), Appender(run.folder / "samples.jsonl")
    for step in steps:
        at = 1_700_000_000 + 1000 * attempt + step
        row = {"attempt": attempt, "step": step, "time": at, "epoch": step / 20, "tokens": 8 * step}
        metrics.write(encode({"kind": "train", **row, "loss": 4 - step / 10 + off, "lr": 0.01, "grad_norm": None}))
        if step % 10 == 0:
            metrics.write(encode({"kind": "val", **row, "loss": 5 - step / 10, "bits_per_byte": 2.0,
                                  "parts": [["a", 1.5]]}))
            text = {"prompt": "Once ", "text": "<b>upon</b>\n# a time\x1b[31m"}
            samples.write(encode({"attempt": attempt, "step": step, "time": at, **text}))
    metrics.close()
    samples.close()


def end(run, status): write_whole(run.folder / "state.json", {**run.state().to_record(), "status": status})


def read(run):
    found = accumulator.EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def curve(run, tag="train/loss"): return [(p.step, round(p.value, 4)) for p in read(run).Scalars(tag)]


def points(steps, off=0.0): return [(step, round(4 - step / 10 + off, 4)) for step in steps]


def test_tensorboard_gets_curves_texts_and_settings(run, capsys):
    assert main(["log-to", "demo", "tensorboard"]) == 0
    assert "22 rows" in (said := capsys.readouterr().out) and "tensorboard --logdir" in said
    found = read(run)
    assert set(found.Tags()["scalars"]) == {"train/loss", "train/lr", "train/epoch", "train/tokens", "val/loss",
                                            "val/bits_per_byte", "val/loss/a", "val/epoch", "val/tokens"}
    assert curve(run) == points(range(1, 21)) and [p.step for p in found.Scalars("val/loss/a")] == [10, 20]
    assert found.Scalars("train/loss")[4].wall_time == 1_700_001_005
    texts = [t.tensor_proto.string_val[0].decode() for t in found.Tensors("samples/text_summary")]
    assert texts == ["    Once <b>upon</b>\n    # a time"] * 2  # a block of code: no part of it is markup
    assert found.SummaryMetadata("samples/text_summary").plugin_data.plugin_name == "text"
    assert "    dataset = a|b *c*" in found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    from tensorboard.plugins.hparams import plugin_data_pb2
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["lr"].number_value == 0.01 and told["optimizer"].string_value == "muon"
    assert told["shuffle"].bool_value is True


def test_told_again_nothing_comes_twice(run):
    for _ in range(3): loggers.log_to(run, ["tensorboard"])
    assert curve(run) == points(range(1, 21))
    found = read(run)
    assert len(found.Tensors("samples/text_summary")) == 2 and len(found.Tensors("settings/text_summary")) == 1


def test_a_replay_replaces_what_was_told_before(run):
    loggers.log_to(run, ["tensorboard"])
    write(run, range(13, 25), attempt=2, off=0.5)  # killed at 20, resumed from 12, with other numbers
    loggers.log_to(run, ["tensorboard"])
    loggers.log_to(run, ["tensorboard"])
    assert curve(run) == [*points(range(1, 13)), *points(range(13, 25), 0.5)]
    assert [p.step for p in read(run).Scalars("val/loss")] == [10, 20]


def test_a_logger_that_is_killed_goes_on_where_it_was(run):
    (run.folder / "metrics.jsonl").unlink()
    end(run, "running")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    def start():
        return subprocess.Popen([sys.executable, "-m", "llm_trainer", "log-to", "demo", "tensorboard"], env=environment)
    with Lock(run.folder / "lock") as lock:
        assert lock.acquire()
        process = start()
        try:
            write(run, range(1, 8))
            until(lambda: list((run.folder / "tensorboard").glob("events*"))
                  and "train/loss" in read(run).Tags()["scalars"])
            until(lambda: len(curve(run)) == 7)
            process.send_signal(signal.SIGKILL)
            process.wait()
            events = max((run.folder / "tensorboard").glob("events*"))
            events.write_bytes(events.read_bytes()[:-5])  # the last record torn
            write(run, range(8, 15))
            process = start()
            write(run, range(15, 21))
            end(run, "stopped")
            assert process.wait(60) == 0
        finally: process.kill()
    assert curve(run) == points(range(1, 21))


def test_damaged_rows_and_strange_numbers_are_left_out(run):
    with open(run.folder / "metrics.jsonl", "ab") as f:
        f.write(b'{"kind": "train", "step": 21, "time": "then", "loss": 1}\n{"step": 22}\nnot json\n[]\n'
                b'{"kind": "train", "step": 1.5, "time": 1, "loss": 1}\n{"kind": "train", "step": 23, "time": 1e999, '
                b'"loss": 1}\n'
                b'{"kind": "train", "step": 24, "time": 1700001024, "loss": 1e999, "lr": 1e400, "deep": {"a": [1]}, '
                b'"on": true}\n'
                b'{"kind": "train", "step": 99999999999999999999999, "time": 1, "loss": 1}\n'
                b'{"kind": "a\\u001b[31m", "step": 25, "time": 1700001025, "loss": 1, "parts": [1, ["x"], ["y", 2]]}\n')
    loggers.log_to(run, ["tensorboard"])
    assert curve(run) == points(range(1, 21)) and "a/loss/y" in read(run).Tags()["scalars"]


def test_training_goes_on_whatever_becomes_of_the_logger(space):
    environment = {**os.environ, "LLM_TRAINER_HOME": str(space.root), "PYTHONPATH": str(ROOT)}
    command = ["train", "--config", str(ROOT / "configs" / "tiny.toml"), "--name", "real", "--max-steps", "12",
               "--log-every", "1", "--sample-every", "6", "--log-to", "tensorboard", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", "llm_trainer", *command], env=environment, capture_output=True,
                          text=True, cwd=space.root)
    run = Run(space.runs / "real")
    assert done.returncode == 0 and run.status().status == "completed", done.stderr
    until(lambda: Lock(run.folder / "tensorboard" / "lock").acquire()
          and "Sent" in (run.folder / "log-to.txt").read_text())
    assert [s for s, _ in curve(run)] == [r["step"] for r in run.metrics("train")] and len(curve(run)) == 12
    assert len(read(run).Tensors("samples/text_summary")) == len(run.samples()) > 0


@pytest.mark.parametrize("kind", ["nothing", "pipe", "link", "loop", "folder"])
def test_a_log_that_can_not_be_written_costs_the_logger_nothing_else(run, kind):
    log = run.folder / "log-to.txt"
    if kind != "nothing": INSTEAD[kind](log)
    assert loggers.start(run, workspace.find(), ["tensorboard"]).wait() == 0 and len(curve(run)) == 20
    if kind == "nothing": assert stat.S_IMODE(log.stat().st_mode) == 0o600 and "Sent" in log.read_text()
    assert not (run.folder / "nowhere").exists()


@pytest.mark.parametrize("words, says", [
    (["log-to", "demo", "tensorbored"], "tensorboard, wandb, trackio, mlflow"), (["log-to", "demo", ","], "name one"),
    (["train", "--log-to", "nothing"], "not to 'nothing'"),
    (["resume", "demo", "--log-to", "\x1b[31mred"], "not to 'red'")])
def test_what_is_no_logger_is_said_before_anything_begins(run, capsys, words, says):
    before = sorted(run.folder.parent.rglob("*"))
    assert main(words) == 2 and says in capsys.readouterr().err and sorted(run.folder.parent.rglob("*")) == before


def test_one_that_is_not_installed_comes_with_its_line(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(loggers.SINKS, "no_such_logger_package", loggers.Wandb)
    assert main(["log-to", "demo", "no_such_logger_package"]) == 2
    assert "pip install no_such_logger_package" in capsys.readouterr().err
    assert not (run.folder / "no_such_logger_package").exists()


def test_two_loggers_of_one_run_and_place_are_one_too_many(run, monkeypatch):
    (run.folder / "tensorboard").mkdir()
    with Lock(run.folder / "tensorboard" / "lock") as lock:
        assert lock.acquire() and main(["log-to", "demo", "tensorboard"]) == 75


def test_mlflow_gets_each_point_once(run, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs: pip install mlflow-skinny sqlalchemy alembic")
    pytest.importorskip("sqlalchemy", reason="needs: pip install mlflow-skinny sqlalchemy alembic")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    from mlflow.tracking import MlflowClient
    loggers.log_to(run, ["mlflow"])
    told = run.folder / "mlflow" / "told.json"
    # killed before it wrote how far it had come
    told.write_text(json.dumps({"id": json.loads(told.read_text())["id"]}))
    write(run, range(15, 24), attempt=2)
    loggers.log_to(run, ["mlflow"])
    client = MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("llm_trainer").experiment_id])
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(m.step, round(m.value, 4)) for m in losses] == points(range(1, 24))
    assert found.data.params["lr"] == "0.01" and found.info.status == "FINISHED"


def test_a_place_that_does_not_answer_is_named(run, capsys, monkeypatch):
    "It is somebody else's fault, and not an internal error of ours"
    pytest.importorskip("mlflow", reason="needs: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["log-to", "demo", "mlflow"]) == 1
    said = capsys.readouterr().err
    assert "mlflow does not take what demo writes: " in said and "llm-trainer log-to demo mlflow" in said
    assert "internal" not in said and len(said.splitlines()) == 2


TOLD = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("llm_trainer", "demo")
print(json.dumps([[r["step"], r["train/loss"]] for r in rows if "train/loss" in r]))
print(json.dumps([r["step"] for r in rows if "val/loss" in r]))
print(json.dumps(SQLiteStorage.get_run_config("llm_trainer", "demo")))
print(json.dumps(sorted({name for r in rows for name in r})))
"""


def test_trackio_gets_each_point_once_whenever_it_is_killed(run, tmp_path):
    "The real package, with its files in a folder of the test; it keeps points in memory before it writes them"
    pytest.importorskip("trackio", reason="needs: pip install trackio")
    (run.folder / "metrics.jsonl").unlink()
    end(run, "running")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "trackio"),
                   "HF_HOME": str(tmp_path / "hf")}
    def told():
        out = subprocess.run([sys.executable, "-c", TOLD], env=environment, capture_output=True, text=True).stdout
        return [json.loads(line) for line in out.splitlines() if line[0] in "[{n"]
    def start():
        return subprocess.Popen([sys.executable, "-m", "llm_trainer", "log-to", "demo", "trackio"], env=environment)
    with Lock(run.folder / "lock") as lock:
        assert lock.acquire()
        process = start()
        try:
            write(run, range(1, 8))
            until(lambda: (run.folder / "trackio" / "told.json").exists())
            process.send_signal(signal.SIGKILL)  # most likely before anything has arrived
            process.wait()
            process = start()
            until(lambda: len(told()[0]) == 7)
            write(run, range(8, 15))
            until(lambda: len(told()[0]) == 14)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process = start()
            write(run, range(15, 21))
            end(run, "stopped")
            assert process.wait(60) == 0
        finally: process.kill()
    losses, held_out, settings, names = told()
    assert [(step, round(loss, 4)) for step, loss in losses] == points(range(1, 21)) and held_out == [10, 20]
    assert settings["lr"] == 0.01 and settings["optimizer"] == "muon"
    assert not [name for name in names if "/" in name and name.partition("/")[0] not in ("train", "val")]
