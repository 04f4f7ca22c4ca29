"""A run trained in the process that asks for it, as an iterator of events: for notebooks, scripts and tests. It is a
real run, with a folder and a lock, so every viewer sees it and `resume` goes on with it. Loads torch when it begins."""
from __future__ import annotations

from collections.abc import Iterator

from llm_trainer.config import Config
from llm_trainer.events import Event, Finished
from llm_trainer.runs import launch
from llm_trainer.runs.run import Run
from llm_trainer.runs.worker import failure
from llm_trainer.runs.writer import RunWriter
from llm_trainer.workspace import Workspace


def train(
    config: Config,  # with its inputs resolved
    space: Workspace,
    name: str | None = None,  # None: two words and four digits
) -> Iterator[Event]:
    """Trains a new run and yields what happens, to `Finished`. When the caller takes no more events, the run ends as by
    `stop`, with a checkpoint to resume from. An error of the training is raised, and its reason is on record."""
    run = launch.start(config, space, name, background=False)
    lock = run.lock
    assert lock, "a run that is started here comes with its lock"
    writer = RunWriter(run, lock)
    try:
        writer.update(status="running", phase="starting")
        yield from _logged(_events(run, space, writer), writer)
    except GeneratorExit: raise
    except BaseException as e:
        ended, _ = failure(e, run, writer)
        writer.finish(ended.status, ended.code, ended.message)
        raise
    finally: lock.release()


def _events(run: Run, space: Workspace, writer: RunWriter) -> Iterator[Event]:
    from llm_trainer.training import recipe
    config = Config.from_dict(run.config())
    return recipe.train(run.id, config, run.attempts()[-1], space, run.meta, writer.requests, writer.log)


def _logged(events: Iterator[Event], writer: RunWriter) -> Iterator[Event]:
    "Each event, logged before the caller has it; after the caller left, the rest up to the checkpoint"
    try:
        for event in events:
            writer.log(event)
            yield event
    except GeneratorExit:
        writer.signals.add("stop")
        for event in events:
            if isinstance(event, Finished):
                event = Finished(event.status, event.code or "signal", "its caller took no more events")
            writer.log(event)
