"""The process that trains a run: waits for its turn, turns events into files, and always has a last word.

`work` is the same in the foreground and in a background process of its own, `python -m llm_trainer.worker`."""
from __future__ import annotations
# It loads torch when its turn has come, so runs that wait cost next to nothing.

import argparse
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llm_trainer import failpoints, host, workspace
from llm_trainer.errors import BusyError, LLMTrainerError
from llm_trainer.launch import Queue
from llm_trainer.records import FULL
from llm_trainer.runs import Run, RunWriter
from llm_trainer.workspace import Workspace

PREPARING = ("queued", "starting", "downloading", "tokenizing", "compiling")  # phases with nothing to save
HEARTBEAT = 5.0  # seconds


# -- What a worker tells beside the trainer's own events --

@dataclass(frozen=True)
class Doing:
    "How far something long has come: `done` of `total`"
    what: str
    done: int
    total: int
    kind: ClassVar[str] = "progress"


@dataclass(frozen=True)
class Waiting:
    "The device is busy; these runs come first"
    runs: list[str]
    kind: ClassVar[str] = "waiting"


@dataclass(frozen=True)
class Remark:
    "Something worth a line"
    message: str
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Stopping:
    "A request to stop was seen; the run ends at its next step"
    message: str
    kind: ClassVar[str] = "stopping"


@dataclass(frozen=True)
class Ended:
    "The last word on a run"
    status: str
    code: str | None = None
    message: str | None = None
    kind: ClassVar[str] = "finished"


# -- The work --

def work(
    run: Run,  # its lock held: run.lock
    space: Workspace,
    show: Callable[[Any], None] = lambda event: None,  # called with each event, for a terminal
    events: Callable[[RunWriter], Iterator] | None = None,  # in place of training, for tests
) -> int:
    "Trains a run to its end and gives the exit code. Takes over SIGTERM and SIGINT meanwhile, and may end the process"
    writer, queue = RunWriter(run, run.lock), Queue(space.runs, run.config())
    with Watch(writer, show) as watch:
        try:
            _wait_for_turn(run, queue, writer, show)
            writer.update(status="running", phase="starting", waiting_for=[])
            training = events(writer) if events else _training(run, space, writer, show)
            ended, code = _follow(training, writer, watch, show)
        except BaseException as e: ended, code = _failure(e, run, writer)
        writer.finish(ended.status, ended.code, ended.message)
        show(ended)
    failpoints.hit("lock.release")
    run.lock.release()
    queue.lock.release()
    failpoints.hit("worker.exit")
    return code


def _wait_for_turn(run: Run, queue: Queue, writer: RunWriter, show) -> None:
    "Returns when the device is this run's; at once, saying so, for a run without a ticket"
    if not queue.waits(run):
        if others := queue.claim(run): _remark(f"This run doesn't wait for its turn: {', '.join(others)} came first, and all "
                                               "that train at once are slower.", writer, show)
        return
    writer.update(status="queued", phase=None)
    told = None
    while not queue.turn(run):
        if (before := queue.before(run)) != told:
            told = before
            writer.update(waiting_for=before)
            show(Waiting(before))
        time.sleep(0.25)


def _remark(message: str, writer: RunWriter, show) -> None:
    for tell in (writer.log, show): tell(Remark(message))


def _training(run: Run, space: Workspace, writer: RunWriter, show) -> Iterator:
    "The events of the real thing"
    from llm_trainer.config import Config
    from llm_trainer.train import train

    def progress(what: str, done: int, total: int) -> None:
        writer.log(Doing(what, done, total))
        show(Doing(what, done, total))

    return train(run.id, Config.from_dict(run.config()), run.attempts()[-1], space, run.meta, writer.requests, progress)


def _follow(events: Iterator, writer: RunWriter, watch: Watch, show) -> tuple[Ended, int]:
    "Logs and shows every event; how it ended, and the exit code of that"
    try:
        for event in events:
            if event.kind == "finished": break
            watch.trained |= event.kind == "step"
            writer.log(event)
            show(event)
        else: raise RuntimeError("the training ended without saying how")
    finally:
        if hasattr(events, "close"): events.close()
    if event.status == "completed": return Ended("completed", event.code, event.message), 0
    if event.status != "stopped": return Ended(event.status, event.code, event.message), 1
    return Ended("stopped", event.code or "signal", event.message or watch.reason), watch.exit_code


def _failure(e: BaseException, run: Run, writer: RunWriter) -> tuple[Ended, int]:
    "The reason that is stored for an exception, in words that help, and the exit code"
    known, text = isinstance(e, LLMTrainerError), str(e)
    if not known: writer.say(traceback.format_exc())
    if isinstance(e, KeyboardInterrupt): return Ended("stopped", "signal", "interrupted"), 130
    if out_of_memory(e): return Ended("failed", "oom", _less_memory(run, text)), 1
    if isinstance(e, OSError) and e.errno in FULL:
        if known: return Ended("failed", "disk_full", text), 1
        where = f" ({e.filename})" if e.filename else ""
        return Ended("failed", "disk_full", f"No space is left on the disk{where}. What was saved is intact.\n"
                                            f"Make room, then: llm-trainer resume {run.id}"), 1
    code = "data" if writer.state["phase"] in ("downloading", "tokenizing") else "error"
    if known: return Ended("failed", getattr(e, "code", code), text), e.exit_code
    code = "non_finite" if isinstance(e, FloatingPointError) else "error"
    what = f"{type(e).__name__}: {text[:500]}"
    return Ended("failed", code, f"{what}\nThe whole story: llm-trainer logs {run.id}"), 1


def out_of_memory(e: BaseException) -> bool:
    "Does `e` say that memory ran out: Python's, a GPU's, or that of torch's CPU allocator?"
    words = "out of memory", "can't allocate memory", "cannot allocate memory"
    said = isinstance(e, (RuntimeError, OSError)) and any(word in str(e).lower() for word in words)
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or said


def _less_memory(run: Run, text: str) -> str:
    training = run.config().get("training", {})
    batch, accum = training.get("batch_size") or 1, training.get("grad_accum_steps") or 1
    less = (f"--batch-size {batch // 2} --grad-accum-steps {accum * 2} (as many tokens a step)" if batch > 1 else
            "a smaller --seq-len, --n-layer or --n-embd")
    return f"Memory ran out. {text.partition(chr(10))[0][:200]}\nStart it again with {less}."


# -- Signals, requests and the heartbeat --

class Watch:
    """A thread that sees what the main thread may be too busy to see: signals (by `signal.set_wakeup_fd`, so also
    inside a long C call), files in control/, and time passing.

    A request to stop shows as phase `stopping` at once; the loop ends at its next step. Where there is nothing to save
    yet the thread ends the process itself, as the main thread may not come back for minutes; so does a second signal.
    """

    def __init__(self, writer: RunWriter, show: Callable[[Any], None]):
        self.writer, self.show = writer, show
        self.trained = False  # has this attempt made a step?
        self.exit_code, self.reason = 0, None  # of a run that ends as stopped
        self._stopping = self._signalled = self._woken = self._over = False

    def __enter__(self) -> Watch:
        global _watching
        self._read, self._write = os.pipe()
        for fd in (self._read, self._write): os.set_blocking(fd, False)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGTERM, signal.SIGINT)}
            self._wakeup, _watching = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False), True
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        global _watching
        self._over = True
        os.write(self._write, b"\0")
        self._thread.join()
        if self._handlers: signal.set_wakeup_fd(self._wakeup)
        for signum, handler in self._handlers.items(): signal.signal(signum, handler)
        for fd in (self._read, self._write): os.close(fd)
        _watching = False

    def _run(self) -> None:
        beat = time.monotonic()
        while True:
            ready, _, _ = select.select([self._read], [], [], self.writer.EVERY)
            if self._over: return
            for signum in os.read(self._read, 64) if ready else b"": self._signal(signum)
            if "stop" in self.writer.requests(): self._stop("asked to stop", 0)
            if time.monotonic() - beat > HEARTBEAT:
                beat = time.monotonic()
                self.writer.beat()

    def _signal(self, signum: int) -> None:
        if signum not in (signal.SIGTERM, signal.SIGINT): return
        if "stop" in self.writer.run.asked() and not self._woken:  # `stop` left a file, and this is only its wake-up
            self._woken = True
            return self._stop("asked to stop", 0)
        name = signal.Signals(signum).name
        if self._signalled: self._leave(128 + signum, f"ended at once by a second signal ({name})")
        self._signalled = True
        self.writer.signals.add("stop")
        self._stop(f"{name} received", 128 + signum)

    def _stop(self, reason: str, exit_code: int) -> None:
        if self._stopping: return
        self._stopping, self.reason, self.exit_code = True, reason, exit_code
        preparing = not self.trained and (self.writer.state["phase"] or "queued") in PREPARING
        self.writer.stopping(reason)
        if preparing: self._leave(exit_code, f"{reason} before the first step: nothing to save")
        self.show(Stopping(reason))

    def _leave(self, exit_code: int, message: str) -> None:
        self.writer.finish("stopped", "signal", message)
        self.show(Ended("stopped", "signal", message))
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(exit_code)


_watching = False


def _before_fork() -> None:
    if _watching: signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))


def _in_parent() -> None:
    if _watching: signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))


def _in_child() -> None:
    "A forked child must not write the signals it gets into its parent's pipe, and SIGTERM must be able to end it"
    if not _watching: return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


# -- The process --

def main(argv: list[str] | None = None) -> int:
    "`python -m llm_trainer.worker RUN_FOLDER --lock-fd N`"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    parser = argparse.ArgumentParser(prog="llm_trainer.worker", description="Trains one run; started by llm-trainer.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lock-fd", type=int, help="the run's lock, taken by the process that starts this one")
    args = parser.parse_args(argv)
    run = Run(args.folder.absolute())
    if args.lock_fd is not None: run.lock = host.Lock.adopt(args.lock_fd, run.folder / "lock")
    else:
        run.lock = host.Lock(run.folder / "lock")
        if not run.lock.acquire(wait=2): raise BusyError(f"{run.id} is being trained by another process.")
    return work(run, workspace.find())


if __name__ == "__main__":
    try: sys.exit(main())
    except LLMTrainerError as e: sys.exit(print(e, file=sys.stderr) or e.exit_code)
