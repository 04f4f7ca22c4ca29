"""The process that trains a run: waits for its turn, turns events into files, and always has a last word.

`work` is the same in the foreground and in a background process of its own, `python -m llm_trainer.runs.worker`."""
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
from pathlib import Path

from llm_trainer import workspace
from llm_trainer.system import failpoints, locks, process
from llm_trainer.errors import BusyError, LLMTrainerError, UsageError
from llm_trainer.events import Emit, Event, Finished, Note, Stopping, Waiting, silent
from llm_trainer.runs import ranks
from llm_trainer.runs.launch import Queue, renamed
from llm_trainer.system.files import FULL, write_whole
from llm_trainer.system.process import out_of_memory, too_many_files
from llm_trainer.runs.run import Run
from llm_trainer.runs.state import TERMINAL
from llm_trainer.runs.writer import EVERY, RunWriter
from llm_trainer.workspace import Workspace

STOPS = tuple(getattr(signal, name) for name in (  # each of them ends a process that doesn't listen, so it is a request
    "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGVTALRM", "SIGPROF")
    if hasattr(signal, name))
AGAIN = 1.0  # seconds after which a second INT or TERM is meant: a terminal or a scheduler may send several at once
NOW = Finished("stopped", "signal", "ended at once by stop --now"), 143
LAST_WORD = 15.0  # seconds from the end of a training to that of its process
PREPARING = ("queued", "starting", "reading", "downloading", "tokenizing", "compiling")  # phases with nothing to save
HEARTBEAT = 5.0  # seconds


# -- The work --

def work(
    run: Run,  # its lock held: run.lock
    space: Workspace,
    show: Emit = silent,  # called with each event, for a terminal
    events: Callable[[RunWriter], Iterator] | None = None,  # in place of training, for tests
) -> int:
    """Trains a run to its end and gives the exit code. Takes over the signals that end a process meanwhile, and may end
    the process. Whatever is thrown, also while something is being reported, a reason is on disk when it returns."""
    try: return _work(run, space, show, events)
    except BaseException as e:
        traceback.print_exc()
        _bare_word(run, e)
        run.lock.release()
        return 1


def _work(run: Run, space: Workspace, show: Emit, events) -> int:
    attempt = (run.attempts() or [{}])[-1]
    devices = attempt.get("devices") or []
    writer, queue = RunWriter(run, run.lock), Queue(space.runs, run.config(), devices)
    together = len(devices) > 1 and events is None

    def see(event: Event) -> None:
        try: show(event)
        except Exception: pass  # showing is a viewer's: its troubles are not the run's

    def emit(event: Event) -> None:
        writer.log(event)
        see(event)

    with ranks.Signals(STOPS if together else ()) as signals:
        with Watch(writer, see) as watch:
            try:
                _wait_for_turn(run, queue, writer, emit)
                writer.update(status="running", phase="starting", waiting_for=[])
                ended = None
                if not together:
                    ended, code = follow(events(writer) if events else _training(run, space, writer, emit), watch, emit)
            except BaseException as e:
                watch.ends_within(LAST_WORD, Finished("failed", "error", f"{type(e).__name__}: {str(e)[:300]}"), 1)
                ended, code = failure(e, run, writer)
            if ended:
                watch.ends_within(LAST_WORD, ended, code)
                writer.finish(ended.status, ended.code, ended.message)
                see(ended)
            else: writer.close()
        if not ended: code = _launch(run, attempt, signals, see)
    failpoints.hit("lock.release")
    run.lock.release()
    queue.release()
    failpoints.hit("worker.exit")
    return code


def _launch(run: Run, attempt: dict, signals: ranks.Signals, see: Emit) -> int:
    "Trains with a process for each device, which this one watches over"
    launch = ranks.Launch(run, "llm_trainer.runs.rank", attempt["devices"], attempt.get("restarts") or 0, signals, see)
    ended, code = launch.until_gone()
    if ended:
        RunWriter(run, run.lock).finish(*ended)
        see(Finished(*ended))
    return code


def _bare_word(run: Run, e: BaseException) -> None:
    "The reason of an end, if the writer could not write it: the least that can go wrong"
    reason = {"code": "oom" if out_of_memory(e) else "error", "message": f"{type(e).__name__}: {str(e)[:300]}"}
    try:
        state = run.state()
        if state.status in TERMINAL: return
        write_whole(run.folder / "state.json", {**state.to_record(), "status": "failed", "phase": None,
                                                "reason": reason})
    except Exception: traceback.print_exc()


def _wait_for_turn(run: Run, queue: Queue, writer: RunWriter, emit: Emit) -> None:
    "Returns when the device is this run's; at once, saying so, for a run without a ticket"
    if not queue.has_ticket(run):
        if others := queue.take_now(run):
            emit(Note(f"This run doesn't wait for its turn: {', '.join(others)} came first, and "
                                                    "all that train at once are slower."))
        return
    writer.update(status="queued", phase=None)
    shown = None
    while not queue.try_acquire(run):
        if not queue.has_ticket(run): queue.take_ticket(run)  # somebody deleted the folder of the queue
        if (blockers := queue.blockers(run)) != shown: emit(Waiting(shown := blockers))
        time.sleep(0.25)


def take_device(name: str) -> str:
    """Makes a device, such as cuda:1, the one this process computes on; returns its kind. UsageError if it isn't there.
    That there are GPUs was guessed without torch: where torch can't use them, what the config says decides"""
    kind, _, index = name.partition(":")
    if kind == "cuda":
        import torch
        from llm_trainer.device import why_not
        if why_not("cuda"): return "cpu"
        there, number = torch.cuda.device_count(), int(index or 0)
        if number >= there:
            raise UsageError(f"GPU {number} is not there. {os.uname().nodename} shows {there}, numbered from 0.\n"
                             f"Take all of them: --devices {there} (under torchrun --nproc-per-node {there})")
        torch.cuda.set_device(number)  # also the first: a device mesh would choose one for who has not chosen
    return kind


def _training(run: Run, space: Workspace, writer: RunWriter, emit: Emit) -> Iterator[Event]:
    "The events of real training"
    from llm_trainer.config import Config
    from llm_trainer.training.recipe import train

    take_device(next(iter(run.attempts()[-1].get("devices") or []), ""))
    return train(run.id, Config.from_dict(run.config()), run.attempts()[-1], space, run.meta, writer.requests, emit)


def follow(events: Iterator[Event], watch: Watch, emit: Emit) -> tuple[Finished, int]:
    "Emits every event; returns how it ended, and the exit code for that"
    try:
        for event in events:
            if event.kind == "finished": break
            watch.trained |= event.kind == "step"
            emit(event)
        else: raise RuntimeError("the training ended without saying how")
    except BaseException as e:
        watch.ends_within(LAST_WORD, Finished("failed", "error", f"{type(e).__name__}: {str(e)[:300]}"), 1)
        raise
    finally:
        if hasattr(events, "close"): events.close()
    if watch.lost and event.status == "stopped": return watch.lost, 1
    if event.status == "completed": return Finished("completed", event.code, event.message), 0
    if event.status != "stopped": return Finished(event.status, event.code, event.message), 1
    why = event.message or watch.reason or "one of the ranks was asked to stop"
    return Finished("stopped", event.code or "signal", why), watch.exit_code


def failure(e: BaseException, run: Run, writer: RunWriter) -> tuple[Finished, int]:
    "The reason to store for an exception, in words that help, and the exit code"
    known, text = isinstance(e, LLMTrainerError), str(e)
    if not known: writer.say(traceback.format_exc())
    if isinstance(e, KeyboardInterrupt): return Finished("stopped", "signal", "interrupted"), 130
    if out_of_memory(e): return Finished("failed", "oom", _less_memory(run, text)), 1
    if isinstance(e, OSError) and e.errno in FULL:
        if known: return Finished("failed", "disk_full", text), 1
        where = f" ({e.filename})" if e.filename else ""
        return Finished("failed", "disk_full", f"No space is left on the disk{where}. What was saved is intact.\n"
                                            f"Make room, then: llm-trainer resume {run.id}"), 1
    if advice := too_many_files(e):
        return Finished("failed", "error", f"{advice}\nThen: llm-trainer resume {run.id}"), 1
    code = "data" if writer.state.phase in ("reading", "downloading", "tokenizing") else "error"
    if known: return Finished("failed", getattr(e, "code", code), text), e.exit_code
    code = "non_finite" if isinstance(e, FloatingPointError) else "error"
    what = f"{type(e).__name__}: {text[:500]}"
    return Finished("failed", code, f"{what}\nThe whole story: llm-trainer logs {run.id}"), 1


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
    yet the thread ends the process itself, as the main thread may not come back for minutes; so does a second signal, a
    run whose folder was deleted, and an end that doesn't come to its end.
    """

    def __init__(self, writer: RunWriter, show: Emit, deaf: Callable[[], bool] = lambda: False):
        self.writer, self.show = writer, show
        self.deaf = deaf  # is a signal that arrives now none of ours? torchrun sends some after it lost a rank
        self.trained = False  # has this attempt made a step?
        self.exit_code, self.reason = 0, None  # of a run that ends as stopped
        self.lost: Finished | None = None  # how a run ends whose folder went elsewhere, or whose lock is not ours
        self._stopping = self._woken = self._over = False
        self._first: tuple[int, float] | None = None  # the signal that asked to stop, and when
        self._strayed, self._deadline = 0, None

    def __enter__(self) -> Watch:
        global _watching
        self._read, self._write = os.pipe()
        for fd in (self._read, self._write): os.set_blocking(fd, False)
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            ours = [n for n in STOPS if n in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(n) == signal.SIG_DFL]
            self._handlers = {n: signal.signal(n, lambda *_: None) for n in ours}
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
            try:
                ready, _, _ = select.select([self._read], [], [], EVERY)
                if self._over: return
                for signum in os.read(self._read, 64) if ready else b"": self._signal(signum)
                if self._deadline and time.monotonic() > self._deadline[0]: self._leave(*self._deadline[1:])
                self._look_down()
                asked = self.writer.requests()
                if "end" in asked: self._leave(*NOW)
                if "stop" in asked: self._stop("asked to stop", 0)
                if time.monotonic() - beat > HEARTBEAT:
                    beat = time.monotonic()
                    self.writer.beat()
            except Exception:
                time.sleep(0.1)  # memory, descriptors: whatever is short now, somebody has to go on watching

    def ends_within(self, seconds: float, ended: Finished, code: int) -> None:
        "The training is over; a process that is not gone by then is ended, and this is its last word"
        self._deadline = (time.monotonic() + seconds if self._deadline is None else self._deadline[0], ended, code)

    def _signal(self, signum: int) -> None:
        if signum not in self._handlers or self.deaf(): return
        asked = self.writer.run.asked()
        if "end" in asked: self._leave(*NOW)
        if "stop" in asked and not self._woken:  # `stop` left a file, and this is only its wake-up
            self._woken = True
            return self._stop("asked to stop", 0)
        name, now = signal.Signals(signum).name, time.monotonic()
        if self._first:
            again = signum == self._first[0] and signum in (signal.SIGTERM,
                                                            signal.SIGINT) and now - self._first[1] >= AGAIN
            if again:
                self._leave(Finished("stopped", "signal", f"ended at once by a second signal ({name})"), 128 + signum)
            return
        self._first = signum, now
        self.writer.signals.add("stop")
        self._stop(f"{name} received", 128 + signum)

    def _look_down(self) -> None:
        "Ends a run that lost its lock or whose folder was moved, with a checkpoint; one that was deleted, at once"
        writer, before = self.writer, self.writer.run.folder
        if self.lost or writer.finished or not writer.lock.held or not writer.lock.stray:
            self._strayed = 0
            return
        self._strayed += 1
        if self._strayed < 2: return  # not in the middle of a move
        if writer.in_place: self.lost = self._lock_again()
        elif writer.follow_folder(): self.lost = self._moved(before)
        else:
            print(f"The folder of {before.name} was deleted while it trained ({before}); it ended.", file=sys.stderr)
            leave(1)
        if self.lost:
            writer.signals.add("stop")
            self._stop(self.lost.message.partition("\n")[0], 1)

    def _moved(self, before: Path) -> Finished:
        run = self.writer.run
        advice = f"Go on from where it is now: llm-trainer resume {run.id}" if run.id == before.name else \
            renamed(run, before.name)
        return Finished("failed", "moved", f"The folder of this run went from {before} to {run.folder} while it "
                                           f"trained. It was ended there.\n{advice}")

    def _lock_again(self) -> Finished | None:
        "Takes the lock whose file was removed or replaced; how the run ends where others have it, or might"
        lock, run = self.writer.lock, self.writer.run
        trouble, advice = "another process holds it", "When that has ended"
        try:
            if lock.path.is_symlink() or not lock.path.is_file(): lock.path.unlink(missing_ok=True)
            with locks.Lock(lock.path) as fresh:
                if fresh.acquire():
                    os.dup2(fresh.fileno(), lock.fileno(), inheritable=False)
                    return self.writer.say("The file of this run's lock was removed as it trained; it is there again.")
        except OSError as e: trouble, advice = f"{(e.strerror or str(e)).lower()}: {lock.path}", "Remove that"
        if (run.attempts() or [{}])[-1] != self.writer.attempt:
            print(f"{run.id} is being trained by another process now; this one ended.", file=sys.stderr)
            leave(BusyError.exit_code)
        return Finished("failed", "lock", f"The lock of this run was replaced while it trained ({trouble}). It was "
                                          f"ended, or two could train it at once.\n{advice}, then: "
                                          f"llm-trainer resume {run.id}")

    def _stop(self, reason: str, exit_code: int) -> None:
        if self._stopping: return
        self._stopping, self.reason, self.exit_code = True, reason, exit_code
        preparing = not self.trained and (self.writer.state.phase or "queued") in PREPARING
        self.writer.stopping(reason)
        if preparing:
            self._leave(self.lost or Finished("stopped", "signal", f"{reason} before the first step: nothing to save"),
                        exit_code)
        self.show(Stopping(reason))

    def _leave(self, ended: Finished, exit_code: int) -> None:
        run = self.writer.run.id
        go_on = f"\nGo on with it: llm-trainer resume {run}" if ended.status == "stopped" else ""
        try:
            self.writer.finish(ended.status, ended.code, ended.message)
            self.show(Note(f"Run {run} is {ended.status}: {ended.message}{go_on}"))  # nobody comes to say more
        finally: leave(exit_code)


def ignore_signals() -> None:
    "From here to its end the process ignores requests to end"
    for signum in STOPS: signal.signal(signum, signal.SIG_IGN)


def leave(code: int) -> None:
    "Ends the process, after flushing its streams"
    try:
        for stream in (sys.stdout, sys.stderr): getattr(stream, "drain", stream.flush)()
    finally: os._exit(code)


_watching = False


def _before_fork() -> None:
    if _watching: signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)


def _in_parent() -> None:
    if _watching: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _in_child() -> None:
    "A forked child must not write the signals it gets into its parent's pipe, and SIGTERM must be able to end it"
    if not _watching: return
    signal.set_wakeup_fd(-1)
    for signum in STOPS: signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.SIG_IGN)
    _in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


# -- The process --

def main(argv: list[str] | None = None) -> int:
    "`python -m llm_trainer.runs.worker RUN_FOLDER --lock-fd N`"
    process.prepare()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    parser = argparse.ArgumentParser(prog="llm_trainer.runs.worker",
                                     description="Trains one run; started by llm-trainer.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lock-fd", type=int, help="the run's lock, taken by the process that starts this one")
    args = parser.parse_args(argv)
    run = Run(args.folder.absolute())
    if args.lock_fd is not None: run.lock = locks.Lock.adopt(args.lock_fd, run.folder / "lock")
    else:
        run.lock = locks.Lock(run.folder / "lock")
        if not run.lock.acquire(wait=2): raise BusyError(f"{run.id} is being trained by another process.")
    return work(run, workspace.find())


if __name__ == "__main__":
    try: code = main()
    except LLMTrainerError as e:
        print(e, file=sys.stderr)
        code = e.exit_code
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)  # everything is on disk; what a library would still do at exit may never come to its end
