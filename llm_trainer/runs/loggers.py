"""What a run writes about itself, handed to TensorBoard, wandb, trackio or MLflow by a process of its own. It reads the
run's folder as any viewer does, so it can neither slow nor stop training. Sends nothing unless asked to; no torch."""
from __future__ import annotations

import importlib
import inspect
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_trainer.errors import BusyError, LLMTrainerError, UsageError
from llm_trainer.runs.launch import environment
from llm_trainer.runs.run import Run
from llm_trainer.runs.state import TERMINAL
from llm_trainer.system.files import Follower, open_log, read_json, write_whole
from llm_trainer.system.locks import Lock
from llm_trainer.terminal import clean
from llm_trainer.workspace import Workspace

BAD = ("failed", "diverged", "crashed")
EVERY = 1.0  # Seconds between two looks into the run's folder
PLACE = ("kind", "attempt", "step", "time", "format_version", "parts")  # What of a row is no curve


def numbers(
    row: dict[str, Any],  # A row of metrics.jsonl
) -> dict[str, float]:  # Such as {"train/loss": 3.1}
    "The curves that a row has a point of"
    parts = [(f"loss/{p[0]}", p[1]) for p in row.get("parts") or () if isinstance(p, list) and len(p) == 2]
    values = [*((name, value) for name, value in row.items() if name not in PLACE), *parts]
    return {f"{kind_of(row)}/{clean(str(name), '')}": float(value) for name, value in values
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)}


def kind_of(row: dict[str, Any]) -> str:
    "train, val, or what else a row says of itself"
    return clean(str(row.get("kind")), "").replace("/", "-")


def placed(row: dict[str, Any]) -> bool:
    "Does a row have a step and a time, so that it can be sent?"
    step, at = row.get("step"), row.get("time")
    return isinstance(step, int) and 0 <= step < 1 << 53 and isinstance(at, (int, float)) and 0 <= at < 1 << 53


def settings(run: Run) -> dict[str, Any]:
    "The settings of a run by name, as plain values"
    return {name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in run.settings().items()}


# What can be logged to -----------------------------------------------------------------------------------------------

class Sink:
    """A place to log to. `last` is the newest step of each kind that it has; older ones are not sent again"""

    def __init__(self,
        run: Run,  # Whose folder is read
        folder: Path,  # The sink's own, inside it
        project: str,  # Where a sink groups runs
    ):
        self.run, self.folder, self.project, self.last = run, folder, project, {}
        self.open(settings(run))

    def open(self, config: dict[str, Any]) -> None: "Begins, or goes on with what was begun"
    def point(self, row: dict[str, Any], values: dict[str, float]) -> None: "Takes a point of each curve"
    def sample(self, row: dict[str, Any]) -> None: "Takes a text that the model wrote"
    def flush(self) -> None: "Brings what was taken to its place"
    def close(self, status: str) -> None: "The run has ended, so or so"

    def wants(self, row: dict[str, Any]) -> bool:
        "Whether this row is news"
        return row["step"] > self.last.get(kind_of(row), -1)

    def take(self, row: dict[str, Any]) -> None:
        "A row of metrics.jsonl"
        if not self.wants(row) or not (values := numbers(row)): return
        self.point(row, values)
        self.last[kind_of(row)] = row["step"]


class TensorBoard(Sink):
    """Event files beside the run's own: curves, sample texts, settings. They are read first, so nothing comes twice.
    Where a run was resumed from an earlier step, a mark makes TensorBoard forget the old points from there on"""

    def open(self, config):
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self.events, self.summary, self.tensor = event_pb2, summary_pb2, tensor_pb2
        self.shape, self.types = tensor_shape_pb2, types_pb2
        self.had = set(self._told())
        self.newest = max((step for _, step, _ in self.had), default=-1)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.writer = EventFileWriter(str(self.folder))
        if ("settings", 0, 0.0) not in self.had: self._settings(config)

    def _told(self) -> Iterator[tuple[str, int, float]]:
        "(kind, step, time) of all points that lie here already"
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        for path in sorted(self.folder.glob("events.out.tfevents.*")):
            for data in RawEventFileLoader(str(path)).Load():
                event = self.events.Event.FromString(data)
                for value in event.summary.value: yield value.tag.partition("/")[0], event.step, event.wall_time

    def wants(self, row): return (kind_of(row), row["step"], float(row["time"])) not in self.had

    def point(self, row, values):
        if row["step"] < self.newest:  # a replay
            self._add(row["step"], row["time"], session_log=self.events.SessionLog(status=self.events.SessionLog.START))
        self.newest = row["step"]
        Value = self.summary.Summary.Value
        self._summary(row["step"], row["time"], *(Value(tag=tag, simple_value=value) for tag, value in values.items()))

    def sample(self, row):
        if ("samples", row["step"], float(row["time"])) in self.had: return
        self._text("samples", row["step"], row["time"], f"{row.get('prompt', '')}{row.get('text', '')}")

    def flush(self): self.writer.flush()

    def close(self, status): self.writer.close()

    def _settings(self, config: dict[str, Any]) -> None:
        "As a table, and as TensorBoard's page for comparing settings wants them"
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2
        self._text("settings", 0, 0.0, "\n".join(f"{name} = {value}" for name, value in config.items()))
        start = plugin_data_pb2.SessionStartInfo(group_name=self.run.id)
        for name, value in config.items():
            number = "bool" if isinstance(value, bool) else "number"
            kind = number if isinstance(value, int | float) else "string"
            setattr(start.hparams[name], f"{kind}_value", value)
        data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, session_start_info=start)
        self._plugin(metadata.SESSION_START_INFO_TAG, 0, 0.0, metadata.PLUGIN_NAME, data.SerializeToString())

    def _text(self, tag: str, step: int, at: float, text: str) -> None:
        "A text; indented, so that no part of it is taken for markup"
        lines = "\n".join(f"    {line}" for line in clean(text).split("\n"))
        shape = self.shape.TensorShapeProto(dim=[self.shape.TensorShapeProto.Dim(size=1)])
        tensor = self.tensor.TensorProto(dtype=self.types.DT_STRING, string_val=[lines.encode()], tensor_shape=shape)
        self._plugin(f"{tag}/text_summary", step, at, "text", b"", tensor=tensor)

    def _plugin(self, tag: str, step: int, at: float, name: str, content: bytes, **more) -> None:
        data = self.summary.SummaryMetadata.PluginData(plugin_name=name, content=content)
        self._summary(step, at, self.summary.Summary.Value(tag=tag,
                                                           metadata=self.summary.SummaryMetadata(plugin_data=data),
                                                           **more))

    def _summary(self, step: int, at: float, *values) -> None:
        self._add(step, at, summary=self.summary.Summary(value=values))

    def _add(self, step: int, at: float, **what) -> None:
        self.writer.add_event(self.events.Event(step=step, wall_time=at, **what))


class Remembering(Sink):
    """A sink that can't be asked what it has: a small file keeps how far it came"""

    def open(self, config):
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.record = read_json(self.folder / "told.json")
        last = self.record.get("last")
        self.last = {k: v for k, v in last.items() if isinstance(v, int)} if isinstance(last, dict) else {}

    def flush(self):
        if self.record.get("last") == self.last: return
        self.record["last"] = dict(self.last)
        write_whole(self.folder / "told.json", self.record)


class Wandb(Remembering):
    "Weights & Biases: curves and settings; the run's id is wandb's"
    package = "wandb"

    def open(self, config):
        super().open(config)
        self.api = importlib.import_module(self.package)
        self.begin(config)

    def begin(self, config):
        self.api.init(project=self.project, id=self.run.id, name=self.run.id, config=config, resume="allow",
                      dir=str(self.folder))

    def point(self, row, values): self.api.log(values, step=row["step"])

    def close(self, status): self.api.finish(exit_code=int(status in BAD))


class Trackio(Wandb):
    "Trackio, which has wandb's interface and keeps everything on this machine, unless its own variables say otherwise"
    package = "trackio"

    def begin(self, config):
        unasked = ("embed", "auto_log_gpu", "auto_log_cpu")  # pages in notebooks, figures about this machine
        known = inspect.signature(self.api.init).parameters
        self.api.init(project=self.project, name=self.run.id, config=config, resume="allow",
                      **{name: False for name in unasked if name in known})
        if not (os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")):
            with suppress(ImportError, AttributeError, TypeError): self.last = self._there()

    def _there(self) -> dict[str, int]:
        "What has arrived: it takes points into memory first, so a process that was killed knew too much"
        from trackio.sqlite_storage import SQLiteStorage
        last: dict[str, int] = {}
        for row in SQLiteStorage.get_logs(self.project, self.run.id):
            for kind in {name.partition("/")[0] for name in row if "/" in name}:
                last[kind] = max(last.get(kind, -1), int(row["step"]))
        return last

    def close(self, status): self.api.finish()


class MLflow(Remembering):
    "MLflow, at $MLFLOW_TRACKING_URI or its own default: curves and settings"

    def open(self, config):
        super().open(config)
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient
        self.metric, self.client = Metric, MlflowClient()
        if not isinstance(self.record.get("id"), str):
            found = self.client.get_experiment_by_name(self.project)
            experiment = found.experiment_id if found else self.client.create_experiment(self.project)
            self.record["id"] = self.client.create_run(experiment, run_name=self.run.id).info.run_id
            write_whole(self.folder / "told.json", self.record)
            for name, value in config.items(): self.client.log_param(self.record["id"], name, str(value)[:500])
        for kind in ("train", "val"):  # what a killed process told last is known there
            with suppress(Exception):
                steps = [m.step for m in self.client.get_metric_history(self.record["id"], f"{kind}/loss")]
                self.last[kind] = max(steps, default=self.last.get(kind, -1))

    def point(self, row, values):
        at = int(1000 * row["time"])
        self.client.log_batch(self.record["id"], [self.metric(name, value, at, row["step"]) for name,
                                                  value in values.items()])

    def close(self, status): self.client.set_terminated(self.record["id"], "FAILED" if status in BAD else "FINISHED")


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}


# Reading and telling -------------------------------------------------------------------------------------------------

def named(
    text: str,  # Such as tensorboard,wandb
) -> list[str]:
    "The sinks that `text` names, each of them installed; UsageError otherwise"
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not names or (odd := [name for name in names if name not in SINKS]):
        raise UsageError(f"Logging goes to {', '.join(SINKS)} (one or several, with commas), not to "
                         f"{clean((odd or [text])[0], '')[:80]!r}."
                         if names else f"Logging goes to {', '.join(SINKS)}: name one or several, with commas.")
    for name in names:
        if find_spec(name) is None:
            extra = "'llm_trainer[log]'" if name == "tensorboard" else name
            raise UsageError(f"{name} is not installed.\nInstall it: pip install {extra}")
    return names


def _asked(name: str, run: Run, act: Callable[[Any], Any], what: Any) -> Any:
    "What a sink does with `what`; a fault of somebody else's program is said as that"
    if name == "tensorboard": return act(what)  # its files are written by ourselves
    try: return act(what)
    except LLMTrainerError: raise
    except Exception as e:
        why = clean(" ".join(str(e).split()), "")[:300] or type(e).__name__
        package = "\nPerhaps only a part of it is installed: pip install mlflow" if "unsupported URI" in why else ""
        raise LLMTrainerError(f"{name} does not take what {run.id} writes: {why}{package}\n"
                              f"Once that is mended it goes on where it was: llm-trainer log-to {run.id} {name}") from e


def log_to(
    run: Run,  # Whose folder is read
    names: list[str],  # From `named`
    project: str = "llm_trainer",  # Where wandb, trackio and MLflow group runs
    once: bool = False,  # Only what is there; else until the run has ended
) -> dict[str, int]:  # How many rows were read, of metrics and samples
    "Send a run to some sinks, from its beginning or from where they were left, until it has ended"
    with ExitStack() as held:
        for name in names:
            (run.folder / name).mkdir(mode=0o700, exist_ok=True)
            lock = held.enter_context(Lock(run.folder / name / "lock"))
            if not lock.acquire(wait=2): raise BusyError(f"{run.id} is being logged to {name} by another process.")
        sinks = [_asked(name, run, lambda name: SINKS[name](run, run.folder / name, project), name) for name in names]
        metrics, samples, read = run.follow(), Follower(run.folder / "samples.jsonl"), {"metrics": 0, "samples": 0}
        status = "unknown"
        try:
            while True:
                status = run.status().status  # looked at first: what is written after it is read below
                for rows in iter(metrics.poll, []):
                    read["metrics"] += len(rows)
                    for row in filter(placed, rows):
                        for name, sink in zip(names, sinks): _asked(name, run, sink.take, row)
                for rows in iter(samples.poll, []):
                    read["samples"] += len(rows)
                    for row in filter(placed, rows):
                        for sink in sinks: sink.sample(row)
                for sink in sinks: sink.flush()
                if once or status in (*TERMINAL, "crashed") or not run.folder.is_dir(): return read
                time.sleep(EVERY)
        finally:
            for name, sink in zip(names, sinks): _asked(name, run, sink.close, status)


def start(
    run: Run,  # Whose folder is read
    space: Workspace,
    names: list[str],  # From `named`
) -> subprocess.Popen:
    "A process of its own, at low priority, that sends a run to `names` until it has ended; it outlives this one"
    command = [sys.executable, "-P", "-m", "llm_trainer", "log-to", run.id, ",".join(names)]
    with open_log(run.folder / "log-to.txt") as out:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=space.root,
                                env=environment(space), start_new_session=True, preexec_fn=lambda: os.nice(10))
