"""Runs as processes: detached, queued, stopped, killed, resumed and deleted, with real signals and real kills.

Where a test needs a moment that real training passes too quickly, a stand-in yields the events of a trainer slowly; it
is driven by the same `worker.work`."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import instead, program, until

from hearing import Heard
from llm_trainer import workspace
from llm_trainer.runs import launch, worker
from llm_trainer.system import failpoints, locks, process
from llm_trainer.training.checkpoint import Checkpoints
from llm_trainer.config import load_config
from llm_trainer.errors import BusyError, CheckpointError, DataError, NotFoundError, RunFailed, UsageError
from llm_trainer.runs.run import Run, create_run, find_run, list_runs
from llm_trainer.runs.writer import RunWriter
from llm_trainer.system.files import remove

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "One workspace for the tests that really train, so that the text is prepared once"
    return workspace.init(tmp_path_factory.mktemp("shared"))


def tiny(**kw): return load_config("tiny").replace(**{"threads": 1, "sample_every": 0, **kw})



def ended(run): return until(lambda: not run.locked and run.status())


def event(kind, **kw): return SimpleNamespace(kind=kind, **kw)


def step(n, epoch=None):
    return event("step", step=n, epoch=epoch or n / 100, tokens=n, loss=1.0, lr=0.1, grad_norm=1.0,
                 tokens_per_second=1.0, memory_bytes=1, eta_seconds=1.0)


# -- The whole life, with the real thing --

def test_a_run_lives_on_its_own_and_survives_stop_and_kill(shared):
    run = launch.start(tiny(epochs=1000, save_every=5, eval_every=0), shared, "life", "a note")
    state = run.status()
    assert run.lock is None and run.locked and state.pid != os.getpid()
    until(lambda: run.state().step >= 3)
    state = run.state()
    assert os.getsid(state.pid) == state.pid and process.same_process(state.to_record())
    os.kill(state.pid, signal.SIGHUP)  # the terminal is gone
    assert os.readlink(f"/proc/{state.pid}/fd/0") == "/dev/null" if process.LINUX else True

    with pytest.raises(BusyError): launch.resume(run, shared)
    with pytest.raises(BusyError): launch.delete(run, shared)
    seen = []
    stopped = launch.stop(run, show=seen.append)
    assert stopped.status == "stopped" and stopped.checkpoint_step == stopped.step > 0
    assert stopped.reason["code"] == "signal" and launch.stop(run) == stopped and run.asked() == set()

    launch.resume(run, shared)
    until(lambda: run.state().attempt == 2 and run.state().step > stopped.step + 5)
    os.kill(run.state().pid, signal.SIGKILL)
    until(lambda: run.status().status == "crashed")
    assert run.status().stored_status == "running"

    saved = launch.saved_steps(shared.checkpoints / run.id)[-1]
    launch.resume(run, shared)
    until(lambda: run.state().attempt == 3 and run.state().step > saved)
    assert [a["from_step"] for a in run.attempts()] == [0, stopped.step, saved]
    assert launch.stop(run, now=True).status == "stopped"
    assert [r["step"] for r in run.metrics("train")] == list(range(1, run.metrics("train")[-1]["step"] + 1))
    launch.delete(run, shared)
    assert not run.folder.exists() and not (shared.checkpoints / run.id).exists()


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_own_exit_code(shared, signum, code):
    run = launch.start(tiny(epochs=1000, save_every=0, eval_every=0), shared, background=False)
    process = spawn(run, shared)
    until(lambda: run.state().step >= 2)
    process.send_signal(signum)
    assert process.wait() == code
    state = run.status()
    assert state.status == "stopped" and state.checkpoint_step == state.step


def test_a_completed_run_exits_0_and_has_nothing_left_to_do_until_epochs_are_added(shared):
    run = launch.start(tiny(epochs=1, max_steps=3, eval_every=0), shared, background=False)
    shown = []
    assert worker.work(run, shared, shown.append) == 0
    assert run.status().status == "completed" and run.meta["parameters"] > 0 and not run.locked
    kinds = [e.kind for e in shown]
    assert kinds[-1] == "finished" and {"phase", "prepared", "step", "saved"} <= set(kinds)
    assert launch.plan_resume(run, shared).nothing_to_do
    attempts = run.attempts()
    assert launch.resume(run, shared).lock is None and run.attempts() == attempts

    plan = launch.plan_resume(run, shared, more_epochs=1)
    assert plan.target_epochs == pytest.approx(run.state().epoch + 1) and plan.target_steps is None
    again = launch.resume(run, shared, more_epochs=1, changes={"lr": 1e-3}, background=False)
    assert again.lock.held and run.status().status == "queued"
    assert run.attempts()[-1]["changed"] == {"lr": [5e-3, 1e-3]}
    assert worker.work(again, shared) == 0
    assert run.state().epoch == pytest.approx(plan.target_epochs, abs=0.02)


def spawn(run, space):
    "The real worker as a child of ours, so that its exit code can be seen"
    process = launch._spawn(run, space)
    run.lock.release()
    return process


# -- What the worker does with signals and requests, at chosen moments --

STAND_IN = """
import hashlib, os, sys, time
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from tests.test_launch import Run, event, locks, step, worker, workspace
from pathlib import Path
from llm_trainer.events import print_notes
run, phase, rounds = Run(Path(sys.argv[2])), sys.argv[3], int(sys.argv[4])
run.lock = locks.Lock(run.folder / "lock")
run.lock.acquire(2)

def events(writer):
    "One step, unless the phase comes before it; then a long C call in the phase, which nothing can interrupt"
    if phase in ("training", "evaluating", "saving", "sampling"): yield step(1)
    yield event("phase", name=phase)
    Path(run.folder / "busy").touch()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", rounds)
    while "stop" not in writer.requests(): time.sleep(0.01)
    yield event("saved", step=1, path="p", bytes=1, seconds=0.1)
    yield event("finished", status="stopped", code=None, message=None)

sys.exit(worker.work(run, workspace.find(run.folder), print_notes, events))
"""


def stand_in(space, phase, rounds=10**9, code=STAND_IN, **streams):
    run = create_run(space.runs, tiny().to_dict())
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(run.folder), phase, str(rounds)],
                               preexec_fn=hears_signals, **streams)
    until(lambda: (run.folder / "busy").exists())
    return run, process


def hears_signals():
    "For a child: as in a terminal, also where the tests run under nohup or in the background of a script"
    for signum in worker.STOPS: signal.signal(signum, signal.SIG_DFL)


@pytest.mark.parametrize("phase", ["downloading", "tokenizing", "compiling"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step_a_signal_ends_the_run_inside_a_long_c_call(space, phase, signum):
    run, process = stand_in(space, phase, stderr=subprocess.PIPE, text=True)
    process.send_signal(signum)
    said = process.communicate()[1]
    assert process.returncode == 128 + signum and said.endswith(f"Go on with it: llm-trainer resume {run.id}\n")
    why = run.state().reason["message"]
    assert run.status().status == "stopped" and "nothing to save" in why and why in said
    assert run.state().checkpoint_step is None


@pytest.mark.parametrize("phase", ["training", "evaluating", "saving", "sampling"])
def test_a_signal_shows_at_once_and_the_loop_ends_when_it_can(space, phase):
    run, process = stand_in(space, phase, 10**6)
    process.send_signal(signal.SIGTERM)
    until(lambda: run.state().phase == "stopping" or run.state().status == "stopped")
    assert process.wait() == 143 and run.status().status == "stopped" and run.state().checkpoint_step == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_of_the_same_kind_ends_the_run_at_once(space, signum):
    run, process = stand_in(space, "training")
    process.send_signal(signum)
    until(lambda: run.state().phase == "stopping")
    time.sleep(worker.AGAIN + 0.1)
    process.send_signal(signum)
    assert process.wait() == 128 + signum
    assert run.status().status == "stopped" and "second signal" in run.state().reason["message"]


def test_a_file_in_control_is_enough_and_ends_with_0(space):
    run, process = stand_in(space, "training", 1)
    run.request("stop")
    assert process.wait() == 0 and run.status().status == "stopped" and run.state().checkpoint_step == 1


def test_stop_asked_twice_is_no_second_signal(space):
    run, process = stand_in(space, "training", 10**6)
    launch.stop(run, timeout=0)
    launch.stop(run, timeout=0)
    assert process.wait() == 0 and run.state().checkpoint_step == 1 and run.state().acknowledged["stop"]


def test_who_waits_for_a_stop_sees_one_line_that_fits_and_goes(space):
    code = STAND_IN.replace('while "stop" not in writer.requests()', 'while not Path(run.folder / "seen").exists()')
    run, process = stand_in(space, "training", 1, code)
    screen, terminal = os.openpty()
    with subprocess.Popen([sys.executable, "-m", "llm_trainer", "stop", run.id], stdout=terminal, stderr=terminal,
                          env={**os.environ, "NO_COLOR": "1", "PYTHONUTF8": "1"}) as stop:
        os.close(terminal)
        said = b""
        while b"step 1" not in said: said += os.read(screen, 9999)
        (run.folder / "seen").touch()
        while not said.endswith(f"llm-trainer resume {run.id}\r\n".encode()): said += os.read(screen, 9999)
    os.close(screen)
    assert stop.returncode == 0 and process.wait() == 0
    before, *lines, end = said.decode().split("\r\x1b[K")
    assert before == "" and lines and not any("\n" in line for line in lines)
    for line in lines: assert line.startswith("\x1b[?7l") and "step 1" in line and line.endswith("\x1b[?7h")
    assert end.startswith(f"Run {run.id} is stopped at step 1.")


def test_stop_now_waits_for_nothing(space):
    run, process = stand_in(space, "training")
    os.kill(process.pid, signal.SIGSTOP)  # it can't even hear us
    assert launch.stop(run, now=True).status == "stopped"
    assert process.wait() == -signal.SIGKILL and not run.locked


def test_a_signal_to_a_forked_child_does_not_stop_the_run(space):
    run = launch.start(tiny(), space, background=False)

    def events(writer):
        yield step(1)
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
        os.kill(pid, signal.SIGTERM)
        assert os.waitpid(pid, 0)[1] == signal.SIGTERM
        time.sleep(0.2)
        assert not writer.requests()
        yield event("finished", status="completed", code=None, message=None)

    assert worker.work(run, space, events=events) == 0
    assert run.status().status == "completed"


def test_the_signal_handlers_are_given_back(space):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = launch.start(tiny(), space, background=False)
    last = event("finished", status="completed", code=None, message=None)
    assert worker.work(run, space, events=lambda writer: iter([last])) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# -- How runs fail --

class OutOfMemoryError(RuntimeError): "As torch names it"


@pytest.mark.parametrize("error, code, exit_code, says", [
    (OutOfMemoryError("CUDA out of memory. Tried"), "oom", 1, "--batch-size 4 --grad-accum-steps 2"),
    (MemoryError(), "oom", 1, "--batch-size 4"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom", 1, "--batch-size 4"),
    (OSError(28, "No space left on device", "/x"), "disk_full", 1, "llm-trainer resume"),
    (DataError("The corpus is empty."), "data", 2, "The corpus is empty."),
    (UsageError("Another tokenizer."), "error", 2, "Another tokenizer."),
    (CheckpointError("Damaged."), "error", 1, "Damaged."),
    (RunFailed("disk_full", "No room."), "disk_full", 1, "No room."),
    (FloatingPointError("nan"), "non_finite", 1, "nan"),
    (KeyError("x"), "error", 1, "llm-trainer logs"),
])
def test_a_failure_is_stored_with_its_reason_and_what_helps(space, error, code, exit_code, says):
    run = launch.start(tiny(), space, background=False)

    def events(writer):
        yield step(1)
        raise error

    assert worker.work(run, space, events=events) == exit_code
    state = run.status()
    assert (state.status, state.reason["code"]) == ("failed", code) and says in state.reason["message"]
    assert not run.locked and state.step == 1


def test_a_record_that_can_not_be_completed_ends_the_run(space):
    run = launch.start(tiny(), space, background=False)
    os.rename(run.folder / "meta.json", run.folder / "moved")
    (run.folder / "meta.json").mkdir()
    last = event("finished", status="completed", code=None, message=None)
    assert worker.work(run, space, events=lambda writer: iter([event("prepared", meta={"steps": 1}), last])) == 1
    assert run.status().status == "failed"


def test_training_that_ends_without_a_word_has_failed(space):
    run = launch.start(tiny(), space, background=False)
    assert worker.work(run, space, events=lambda writer: iter([step(1)])) == 1
    assert run.status().status == "failed"


def test_divergence_is_an_ending_of_its_own(space):
    run = launch.start(tiny(), space, background=False)
    last = event("finished", status="diverged", code="non_finite", message="ten in a row")
    assert worker.work(run, space, events=lambda writer: iter([last])) == 1
    assert run.status().status == "diverged" and run.state().reason["code"] == "non_finite"


def test_a_start_that_fails_holds_no_lock(space):
    for name, point in (("a", "worker.spawn=eio"), ("b", "state.write=enospc:2"), ("c", "worker.spawn=raise")):
        failpoints.arm(point)
        with pytest.raises((OSError, RuntimeError)): launch.start(tiny(), space, name)
        failpoints.arm(None)
        assert find_run(space.runs, name).status().status == "failed" and not find_run(space.runs, name).locked


def test_a_worker_that_cannot_start_leaves_a_failed_run(space, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(OSError): launch.start(tiny(), space, "a")
    assert find_run(space.runs, "a").status().status == "failed" and not find_run(space.runs, "a").locked


# -- The queue --

@pytest.fixture
def busy(request):
    "A run of ours that has the device, and the device's queue"
    space = request.getfixturevalue("shared" if "shared" in request.fixturenames else "space")
    run = create_run(space.runs, tiny().to_dict(), "busy", locked=True)
    device = launch.Queue(space.runs, tiny().to_dict())
    assert device.take_now(run) == []
    yield run, device
    for held in (device, run.lock): held.release()


def test_background_runs_wait_in_order_of_creation_without_torch(shared, busy):
    _, device = busy
    config = tiny(epochs=1, max_steps=1, eval_every=0)
    first, gone, third = (launch.start(config, shared, name) for name in ("q1", "q2", "q3"))
    until(lambda: third.state().waiting_for == ["busy", "q1", "q2"])
    assert first.state().waiting_for == ["busy"]
    assert [run.status().status for run in (first, gone, third)] == ["queued"] * 3
    if process.LINUX: assert "torch" not in Path(f"/proc/{third.state().pid}/maps").read_text()
    stopped = launch.stop(gone)
    assert stopped.status == "stopped" and stopped.elapsed_seconds == 0
    until(lambda: third.state().waiting_for == ["busy", "q1"])
    device.release()
    assert [ended(run).status for run in (first, third)] == ["completed"] * 2
    assert first.meta["prepared_at"] < third.meta["prepared_at"] and "prepared_at" not in gone.meta
    assert sorted(os.listdir(device.lines[0].folder)) == ["lock"]
    folder = device.lines[0].folder
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700


COMPLETED = event("finished", status="completed", code=None, message=None)


def test_a_run_without_a_ticket_does_not_wait_and_says_so(space, busy):
    shown, run = [], launch.start(tiny(), space, background=False)
    assert worker.work(run, space, shown.append, events=lambda writer: iter([COMPLETED])) == 0
    assert "busy came first" in shown[0].message and any("busy came first" in line for line in run.log_tail())


def test_the_ticket_of_a_run_stopped_in_the_queue_is_worth_nothing(space, busy):
    _, device = busy
    last = launch.start(tiny(), space, "last")
    until(lambda: last.state().waiting_for)
    launch.stop(last)
    next_ = launch.start(tiny(), space, "next")
    again = launch.resume(last, space, background=False)
    assert not device.has_ticket(again) and device.lines[0].earlier(again) == ["next"]
    assert worker.work(again, space, events=lambda writer: iter([COMPLETED])) == 0
    launch.stop(next_)


@pytest.mark.parametrize("damage", ["", "gone", "../busy", "\n" * 10**6, "\ufffd"])
def test_a_device_lock_that_names_nobody_is_still_held(space, busy, damage):
    _, device = busy
    device.lines[0].lock.path.write_text(damage)
    other = create_run(space.runs, tiny().to_dict(), "other", locked=True)
    device.take_ticket(other)
    assert device.blockers(other) == [] and not launch.Queue(space.runs, tiny().to_dict()).try_acquire(other)
    other.lock.release()


@instead
@pytest.mark.parametrize("place", ["the queue", "the device", "its lock"])
def test_what_lies_in_the_place_of_the_queue_keeps_no_run_from_its_device(space, place, instead):
    one, two = (create_run(space.runs, tiny().to_dict(), name, locked=True) for name in ("one", "two"))
    device = launch.Queue(space.runs, tiny().to_dict())
    lock = device.lines[0].lock.path
    at = {"the queue": lock.parents[1], "the device": lock.parent, "its lock": lock}[place]
    at.parent.mkdir(parents=True, exist_ok=True)
    instead(at)
    device.take_ticket(one)
    assert device.try_acquire(one) and launch.Queue(space.runs, tiny().to_dict()).take_now(two) == ["one"]
    for held in (device, one.lock, two.lock): held.release()
    late = launch.start(tiny(), space, background=False)
    remove(at)
    instead(at)
    assert worker.work(late, space, events=lambda writer: iter([COMPLETED])) == 0


def test_a_log_that_can_not_be_written_costs_only_the_log(shared):
    run = launch.start(tiny(epochs=1, max_steps=1, eval_every=0), shared, "unheard", background=False)
    run.lock.release()
    (run.folder / "train.log").unlink(missing_ok=True)
    os.mkfifo(run.folder / "train.log")
    assert ended(launch.resume(run, shared)).status == "completed"
    with pytest.raises(CheckpointError, match="not a regular file"): run.require("train.log")


def test_text_that_is_missing_is_a_matter_of_data(space):
    run = launch.start(tiny(), space, background=False)

    def events(writer):
        yield event("phase", name="downloading")
        raise NotFoundError("There is no such file.")

    assert worker.work(run, space, events=events) == 3 and run.state().reason["code"] == "data"


def test_a_killed_waiter_holds_nobody_up(space, busy):
    _, device = busy
    run = launch.start(tiny(), space, "waits")
    until(lambda: run.state().pid)
    os.kill(run.state().pid, signal.SIGKILL)
    until(lambda: run.status().status == "crashed")
    heir = create_run(space.runs, tiny().to_dict(), "next", locked=True)
    device.take_ticket(heir)
    assert device.lines[0].earlier(heir) == []
    device.release()
    assert device.try_acquire(heir) and not device.has_ticket(heir)


# -- Plans --

@pytest.fixture
def trained(space):
    "A stopped run at step 20 of 100, half an epoch of 2, with checkpoints of steps 10 and 20"
    run = create_run(space.runs, tiny().to_dict(), "trained", locked=True)
    run.add_attempt(from_step=0, target_epochs=2, target_steps=None, changed={}, lr_plan=None, argv=[])
    run.complete_meta(data={"fingerprint": "f"}, tokenizer_hash="t", resolution={"dtype": "float32"})
    writer = RunWriter(run, run.lock)
    writer.log(event("phase", name="training"))
    writer.log(step(20, epoch=0.5))
    writer.finish("stopped")
    run.lock.release()
    store = Checkpoints(space.checkpoints / run.id, run.id)
    for n in (10, 20): store.save(n, lambda folder: (folder / "weights").write_bytes(b"w") and None, val_loss=n)
    return Run(run.folder)


def test_plain_resume_continues_the_last_target(trained, space):
    plan = launch.plan_resume(trained, space)
    assert (plan.from_step, plan.target_epochs, plan.target_steps, plan.fork) == (20, 2, None, False)
    trained.add_attempt(from_step=20, target_epochs=7, target_steps=None, changed={}, lr_plan="hold", argv=[])
    assert launch.plan_resume(trained, space).target_epochs == 7


def test_a_plan_of_learning_rates_lasts_until_another_is_asked_for(trained, space):
    trained.add_attempt(from_step=20, target_epochs=7, target_steps=None, changed={}, lr_plan="hold", argv=[])
    def plan(**asked): return launch.plan_resume(trained, space, **asked).lr_plan
    assert plan() == plan(changes=dict(save_every=7)) == "hold"
    assert plan(more_epochs=1) is plan(changes=dict(lr=1e-4)) is plan(changes=dict(epochs=9)) is None
    assert plan(lr_plan="rewarm") == "rewarm"


@pytest.mark.parametrize("status, epoch, limit, expected", [
    ("stopped", 0.5, None, 5), ("running", 0.5, None, 5), ("completed", 2.0, None, 5),
    ("completed", 1.5, None, 4.5),  # ended early, by patience
    ("stopped", 0.5, 40, 4)])  # 40 steps are one epoch
def test_more_epochs_count_from_those_reached_or_planned(trained, space, status, epoch, limit, expected):
    lock = locks.Lock(trained.folder / "lock")
    lock.acquire()
    trained.add_attempt(from_step=20, target_epochs=2, target_steps=limit, changed={}, lr_plan=None, argv=[])
    RunWriter(trained, lock).update(status=status, epoch=epoch)
    lock.release()
    assert launch.plan_resume(trained, space, more_epochs=3).target_epochs == expected


def test_more_epochs_are_on_disk_before_anything_starts(trained, space):
    launch.resume(trained, space, more_epochs=3, background=False).lock.release()  # as a kill -9 would
    assert trained.status().status == "crashed"
    assert launch.plan_resume(trained, space).target_epochs == 5


def test_an_older_step_makes_a_new_run_with_a_parent(trained, space):
    plan = launch.plan_resume(trained, space, checkpoint="best")
    assert plan.fork and plan.from_step == 10 and "a new run" in str(plan)
    heir = launch.resume(trained, space, checkpoint=10, background=False)
    assert heir.id != trained.id and heir.meta["parent"] == {"run_id": "trained", "step": 10}
    assert heir.meta["tokenizer_hash"] == "t" and heir.config() == trained.config() and heir.lock.held
    assert heir.attempts()[0]["from_step"] == 10 and len(trained.attempts()) == 1 and not trained.locked


def test_the_best_is_the_latest_before_an_evaluation_and_the_start_before_a_checkpoint(trained, space):
    "What is suggested to a run that diverged early works"
    index = space.checkpoints / "trained" / "index.json"
    said = Heard()
    def again(): return launch.plan_resume(trained, space, checkpoint="best", changes={"lr": 1e-4}, emit=said)
    content = json.loads(index.read_bytes())
    content["checkpoints"]["20"]["pins"] = ["best", "latest"]
    index.write_text(json.dumps(content))  # damaged: its digest is not this content's
    assert (again().from_step, again().fork, "index.json" in said[0]) == (20, False, True)
    index.unlink()
    assert (again().from_step, again().fork) == (20, False)
    shutil.rmtree(index.parent)
    assert again().from_step == 0 and again().changed == {"lr": [tiny().training.lr, 1e-4]}
    with pytest.raises(NotFoundError, match="no checkpoint"): launch.plan_resume(trained, space, checkpoint="20")


def test_what_cannot_change_is_refused_and_nothing_is_written(trained, space):
    before = trained.attempts(), trained.state()
    for kw, error in ((dict(changes={"n_layer": 9}), UsageError), (dict(changes={"lr": -1}), UsageError),
                      *((dict(checkpoint=which), NotFoundError) for which in (15, "²", "worst")),
                      (dict(more_epochs=0), UsageError), (dict(lr_plan="up"), UsageError)):
        with pytest.raises(error): launch.resume(trained, space, background=False, **kw)
    assert (trained.attempts(), trained.state()) == before and not trained.locked


def test_a_change_that_changes_nothing_is_none(trained, space):
    assert launch.plan_resume(trained, space, changes={"n_layer": tiny().model.n_layer}).changed == {}


def test_a_run_without_its_settings_is_not_resumed_with_other_ones(trained, space):
    (trained.folder / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match="--init-from trained"): launch.plan_resume(trained, space)


# -- Whose process is it? --

def test_a_stranger_is_never_signalled(trained, space):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    record = process.identity(stranger.pid)
    holder = locks.Lock(trained.folder / "lock")
    forged = [dict(boot_id="yesterday's"), dict(process_start_ticks=1), dict(host="elsewhere"),
              dict(pid_namespace="pid:[1]"), dict(pid=-1), dict(pid=0), dict(pid=1)]
    for change in forged:
        write(trained, {**record, "status": "running", "phase": "training", **change})
        for now in (False, True):
            assert launch.stop(trained, now, timeout=0).status in ("crashed", "stopped")
            holder.acquire()
            launch.stop(trained, now, timeout=0)
            trained.withdraw()
            holder.release()
    write(trained, {**record, "status": "running"})  # every mark is right, but nobody holds the lock
    assert launch.stop(trained).status == "crashed"
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_run_that_is_heard_of_from_another_machine_is_busy(trained, space, monkeypatch):
    far = dict(host="far-away", boot_id="another", pid=7, status="running", heartbeat=time.time())
    write(trained, far)
    over = threading.Event()
    def live():
        while not over.wait(0.05): write(trained, dict(heartbeat=time.time()))
    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(BusyError, match="pid 7 on far-away, last heard(.|\n)*stop trained"):
            launch.resume(trained, space)
        launch.stop(trained, timeout=0)  # it sees the file
        assert trained.asked() == {"stop"}
    finally:
        over.set()
        other.join()
    monkeypatch.setattr(launch, "LISTEN", 0.5)
    with launch.own(trained): pass  # silent by now
    holder = locks.Lock(trained.folder / "lock")
    holder.acquire()
    write(trained, dict(status="failed", heartbeat=time.time() - 100))
    with pytest.raises(BusyError, match="has ended (.|\n)*on far-away: llm-trainer stop trained --now"):
        launch.resume(trained, space)
    for now in (False, True):
        with pytest.raises(BusyError, match="on far-away"): launch.stop(trained, now)
    holder.release()


def write(run, state):
    from llm_trainer.system.files import write_whole
    write_whole(run.folder / "state.json", {**run.state().to_record(), **state})


def _start_same(space): return launch.start(tiny(), space, "same", background=False)
def _resume_same(space): return launch.resume(find_run(space.runs, "trained"), space, background=False)


def _contend(act, space, all_tried):
    "Exits with 0 where `act` got the run, which is held until everyone has tried"
    try: run = act(space)
    except (UsageError, BusyError) as e: code = e.exit_code
    else: code = 0 if run.lock.held else 1
    all_tried.wait()
    sys.exit(code)


@pytest.mark.parametrize("act", [_start_same, _resume_same])
def test_of_several_writers_one_wins(trained, space, act):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_contend, args=(act, space, all_tried)) for all_tried in [fork.Barrier(4)]
               for _ in range(4)]
    for writer in writers: writer.start()
    for writer in writers: writer.join()
    assert sorted(writer.exitcode for writer in writers) == [0, 75, 75, 75]
    assert len(trained.attempts()) == (2 if act is _resume_same else 1)


# -- Deleting --

def test_delete_frees_checkpoints_and_follows_no_link(trained, space, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (trained.folder / "link").symlink_to(tmp_path / "precious")
    (space.checkpoints / trained.id / "link").symlink_to(tmp_path / "precious")
    (space.checkpoints / trained.id / "step-00000010" / "weights").write_bytes(b"x" * 5000)
    assert launch.delete(trained, space) > 5000
    assert os.listdir(space.runs) == os.listdir(space.checkpoints) == [] and (tmp_path / "precious" / "file").exists()
    with pytest.raises(NotFoundError): launch.delete(trained, space)


def test_checkpoints_that_are_a_link_lose_only_the_link(space, tmp_path):
    run = create_run(space.runs, tiny().to_dict(), "linked")
    (tmp_path / "precious").mkdir()
    (space.checkpoints / "linked").symlink_to(tmp_path / "precious")
    launch.delete(run, space)
    assert (tmp_path / "precious").is_dir() and not os.path.lexists(space.checkpoints / "linked")


def test_a_name_whose_old_checkpoints_are_there_is_refused(space):
    (space.checkpoints / "old" / "step-00000001").mkdir(parents=True)
    with pytest.raises(UsageError, match="earlier run old"): launch.start(tiny(), space, "old")
    assert list_runs(space.runs) == []


def test_launching_loads_no_torch():
    code = ("import sys; import llm_trainer.runs.launch, llm_trainer.runs.worker, llm_trainer.runs.run, "
            "llm_trainer.system.locks;"
            "print({'torch', 'numpy', 'pydantic'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_resume_looks_at_the_checkpoints_before_it_promises(space):
    "Damage is found while planning: nothing is recorded, and what can't be reached is refused"
    assert program(space, "train", "--config", "tiny", "--name", "one", "--epochs", "1").returncode == 0
    run = find_run(space.runs, "one")
    before, steps = run.attempts(), launch.saved_steps(space.checkpoints / "one")
    for flags in (["--epochs", "0.1"], ["--max-steps", "3"], ["--more-epochs", "999999999999"], ["--device", "mps"]):
        assert program(space, "resume", "one", *flags).returncode == 2
    def damage(step): return (space.checkpoints / "one" / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    damage(steps[-1])
    plan = program(space, "resume", "one", "--more-epochs", "1", "--dry-run")
    assert plan.returncode == 0 and f"from       step {steps[-2]} of one\n" in plan.stdout
    assert program(space, "resume", "one", "--checkpoint", str(steps[-1])).returncode == 1
    for step in steps: damage(step)
    assert program(space, "resume", "one", "--more-epochs", "1").returncode == 1
    os.rename(space.checkpoints / "one", space.checkpoints / "two")
    os.mkfifo(space.checkpoints / "one")
    for words in (["resume", "one"], ["resume", "one", "--more-epochs", "1"], ["verify", "one"],
                  ["generate", "one", "--prompt", "The"]):
        refused = program(space, *words)
        assert refused.returncode == 1 and "one is no folder" in refused.stderr and "mv " in refused.stderr
    assert run.attempts() == before and run.status().status == "completed"
    assert program(space, "delete", "one", "--yes").returncode == 0 and os.listdir(space.checkpoints) == ["two"]
