"""What each process of a run on several devices does: it joins the others and trains with them.

Rank 0 does what the only worker does elsewhere. `ranks` starts these processes; `torchrun` has its own way."""
from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from llm_trainer import workspace
from llm_trainer.events import Emit, Event, Joined, silent
from llm_trainer.runs.ranks import Hand, Pulse, is_echo
from llm_trainer.runs.run import Run
from llm_trainer.runs.state import TERMINAL
from llm_trainer.runs.worker import STOPS, Watch, failure, follow, take_device
from llm_trainer.runs.writer import RunWriter
from llm_trainer.system import process
from llm_trainer.system.locks import Lock
from llm_trainer.workspace import Workspace


# -- Started by this package --

def main(hand: Hand) -> int:
    "A rank that `ranks.Launch` started; its exit code"
    rank = int(os.environ["RANK"])
    process.outlive_parent()  # a rank looks after its launcher itself, and says so
    os.setpgid(0, 0)  # what a terminal sends goes to the launcher, which passes it on once
    os.umask(0o077)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run = Run(Path(hand.folder))
    run.lock = Lock.adopt(hand.lock.fd, run.folder / "lock")
    if run.state().status in TERMINAL: return 0  # it ended in good order while torchrun was starting it again
    try: code = _lead(run, hand) if rank == 0 else _join_in(run, hand, rank)
    except BaseException as e:
        teller = SimpleNamespace(say=lambda text: print(text, file=sys.stderr, flush=True), state=run.state())
        ended, code = failure(e, run, teller)
        hand.last_words(rank, ended.code, ended.message, code, is_echo(e))
        os._exit(code or 1)  # threads of torch may wait for ranks that are gone
    hand.board.write(rank, done=True)
    return code


def _lead(run: Run, hand: Hand) -> int:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0": _note_restart(run)
    writer = RunWriter(run, run.lock, identity=process.identity(hand.launcher))
    def orphaned():
        writer.finish("failed", "rank_lost", f"The process that launched the ranks (pid {hand.launcher}) is gone.\n"
                                             f"Go on from the newest checkpoint: llm-trainer resume {run.id}")
    def orphan(): return os.getppid() != hand.launcher
    with Watch(writer, hand.show, deaf=lambda: orphan() or bool(hand.board.lost())) as watch:
        pulse = Pulse(hand, 0, orphaned)
        try:
            def emit(event: Event) -> None:
                writer.log(event)
                hand.show(event)
                pulse.further()
            ended, code = follow(take_part(run, workspace.find(), hand.devices, writer.requests, emit), watch, emit)
            writer.finish(ended.status, ended.code, ended.message)
            hand.show(ended)
        except BaseException:
            if orphan(): orphaned()
            writer.close()
            raise
    return code


def _join_in(run: Run, hand: Hand, rank: int) -> int:
    with asked_by_signal() as requests:
        pulse = Pulse(hand, rank)
        for _ in take_part(run, workspace.find(), hand.devices, requests): pulse.further()
    return 0


@contextmanager
def asked_by_signal(note: Callable[[int], None] = lambda signum: None) -> Iterator[Callable[[], set[str]]]:
    "Any signal is a request to stop, passed to `note`; at the next step all ranks agree to it"
    asked: set[str] = set()
    def heard(signum: int, frame) -> None:
        asked.add("stop")
        note(signum)
    before = {n: signal.signal(n, heard) for n in STOPS}
    try: yield lambda: set(asked)
    finally:
        for signum, handler in before.items(): signal.signal(signum, handler)


def _note_restart(run: Run) -> None:
    "A new attempt with the target of the last one"
    from llm_trainer.runs.launch import saved_steps
    last = {key: value for key, value in run.attempts()[-1].items()
            if key not in ("attempt", "started_at", "format_version")}
    steps = saved_steps(workspace.find().checkpoints / run.id)
    run.add_attempt(**{**last, "changed": {}, "from_step": max(steps, default=0),
                       "restart": int(os.environ["TORCHELASTIC_RESTART_COUNT"])})


# -- Any rank --

def take_part(
    run: Run,
    space: Workspace,
    devices: list[str],  # of this machine's ranks, such as cuda:0
    requests: Callable[[], set[str]],
    emit: Emit = silent,  # rank 0's listener for what happens beside the steps
) -> Iterator[Event]:
    "The events of training together; every rank calls it"
    from llm_trainer.config import Config
    from llm_trainer.training.distributed import join
    from llm_trainer.training.recipe import train
    name = devices[int(os.environ["LOCAL_RANK"])]
    group = join(kind := take_device(name))
    what = group.share({"config": run.config(), "attempt": run.attempts()[-1], "meta": run.meta} if group.first
                       else None)
    here = {"rank": group.rank, "host": os.uname().nodename, "pid": os.getpid(),
            "device": name if name.startswith(kind) else kind, "step_seconds": None}
    for event in train(run.id, Config.from_dict(what["config"]), what["attempt"], space, what["meta"], requests, emit,
                       group):
        if event.kind == "prepared": yield Joined(group.gather(here))
        if event.kind == "finished": group.leave()
        yield event
