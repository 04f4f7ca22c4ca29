"""What happens around a run: viewers that go away, signals of others, a ground that moves, records of strangers."""
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import full_pipe, program
from test_launch import STAND_IN, ROOT, ended, event, hears_signals, stand_in, step, tiny, until  # noqa: F401

from llm_trainer import workspace
from llm_trainer.cli import commands
from llm_trainer.errors import BusyError, LLMTrainerError, UsageError
from llm_trainer.runs import launch, worker
from llm_trainer.runs.run import Run, create_run, find_run, list_runs
from llm_trainer.runs.writer import RunWriter
from llm_trainer.system import locks, process


# Signals

@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, *(
    pytest.param(signum, marks=pytest.mark.slow) for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM))])
def test_a_signal_that_would_end_a_process_saves_and_stops(space, signum):  # noqa: F811
    run, process = stand_in(space, "training", 1)
    process.send_signal(signum)
    assert process.wait() == 128 + signum
    assert run.status().status == "stopped" and run.state().checkpoint_step == 1


def test_a_background_run_does_not_hear_that_the_terminal_closed(space):  # noqa: F811
    code = STAND_IN.replace("import hashlib,", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\nimport "
                                               "hashlib,")
    run = create_run(space.runs, tiny().to_dict())
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(run.folder), "training", "1"])
    until(lambda: (run.folder / "busy").exists())
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTSTP)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.3)
    assert run.status().status == "running"
    run.request("stop")
    assert process.wait() == 0


def test_several_signals_at_once_are_one_request(space):  # noqa: F811
    run, process = stand_in(space, "training", 10**6)
    for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1): process.send_signal(signum)
    assert process.wait() in (143, 130, 138) and run.state().checkpoint_step == 1


def test_stop_wakes_a_suspended_run(space):  # noqa: F811
    run, child = stand_in(space, "training", 1)
    child.send_signal(signal.SIGSTOP)
    until(lambda: process.process_state(child.pid) == "stopped")
    assert launch.stop(run).status == "stopped" and child.wait() == 0 and run.state().checkpoint_step == 1


@pytest.mark.parametrize("way", [Path.touch, os.mkfifo, lambda path: path.symlink_to("."), lambda path: None])
def test_a_run_that_cannot_be_asked_ends_by_the_command_of_the_message(space, way):  # noqa: F811
    run, child = stand_in(space, "training", 10**6)
    (run.folder / "control").rmdir()
    way(run.folder / "control")
    said = program(space, "stop", run.id)
    assert said.returncode == 1 and f"{run.folder / 'control'} is no folder" in said.stderr
    with pytest.raises(LLMTrainerError, match="is no folder"): run.request("save")  # as the buttons ask
    subprocess.run(["sh", "-c", said.stderr.rpartition(": ")[2]], check=True)
    assert child.wait(60) == 143 and run.status().status == "stopped" and run.state().checkpoint_step == 1


# Viewers

def test_what_a_viewer_throws_is_not_the_runs(space):  # noqa: F811
    run = launch.start(tiny(), space, background=False)
    def broken(shown): raise BrokenPipeError
    last = event("finished", status="completed", code=None, message=None)
    assert worker.work(run, space, broken, events=lambda writer: iter([step(1), last])) == 0
    assert run.status().status == "completed"


TALKS = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from llm_trainer.cli import viewer
from llm_trainer.system import process
process.prepare()
with viewer.attached():
    for i in range(50_000): print("line", i, "of a long story that nobody reads")
open(sys.argv[2], "w").write("told")
"""


@pytest.mark.parametrize("how", ["closed", "nobody reads", "reader left", "full disk"])
def test_nobody_has_to_listen(tmp_path, how):
    if how == "full disk" and not os.path.exists("/dev/full"): pytest.skip("needs /dev/full")
    words = [sys.executable, "-c", TALKS, str(ROOT), str(tmp_path / "done")]
    if how == "closed": child = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words])
    elif how == "full disk": child = subprocess.Popen(words, stdout=open("/dev/full", "w"), stderr=subprocess.STDOUT)
    else:
        child = subprocess.Popen(words, stdout=subprocess.PIPE)
        if how == "reader left": child.stdout.close()
    assert child.wait(60) == 0 and (tmp_path / "done").read_text() == "told"


def test_a_reader_gets_every_line(tmp_path):
    words = [sys.executable, "-c", TALKS.replace("50_000", "2_000"), str(ROOT), str(tmp_path / "done")]
    found = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    assert len(found) == 2000 and found[-1].startswith("line 1999 ")


def test_ctrl_c_ends_a_command_whose_output_nobody_takes(space):  # noqa: F811
    "As when its pager is not read, or Ctrl-S was pressed"
    run = create_run(space.runs, tiny().to_dict(), name="one", locked=True)
    (run.folder / "train.log").write_text("a line of the log\n" * 20000)
    commands = "logs one --lines 20000", "logs one --follow", "status --watch", "prepare --config tiny --show 2"
    reads, children = [], {}
    try:
        for words in commands:
            read, write = full_pipe()
            reads.append(read)
            children[words] = subprocess.Popen(
                [sys.executable, "-m", "llm_trainer", *words.split()], cwd=space.root, stdin=subprocess.DEVNULL,
                stdout=write, stderr=write, env={**os.environ, "PYTHONPATH": str(ROOT)})
            os.close(write)
        until(lambda: stand_still(child.pid for child in children.values() if child.poll() is None))
        for child in children.values(): child.send_signal(signal.SIGINT)
        assert {words: child.wait(60) for words, child in children.items()} == dict.fromkeys(commands, 130)
    finally:
        for child in children.values(): child.kill()
        run.lock.release()
        for read in reads: os.close(read)


@pytest.mark.parametrize("then, code, says", [("hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)", 130, "interrupted"),
                                              ("time.sleep(60)", 0, "")], ids=["a long C call", "it goes on"])
def test_ctrl_c_ends_what_does_not_hear_it_and_nothing_else(then, code, says):
    words = ("import hashlib, threading, time; from llm_trainer.cli import viewer; viewer.let_go()\n"
             "threading.Timer(0.5, print, ['it has begun'], dict(flush=True)).start()\n"
             "try: {}\nexcept KeyboardInterrupt: time.sleep(2)")
    with subprocess.Popen([sys.executable, "-c", words.format(then)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, preexec_fn=hears_signals, env={**os.environ, "PYTHONPATH": str(ROOT)}) as child:
        try:
            child.stdout.readline()
            child.send_signal(signal.SIGINT)
            assert child.wait(60) == code and says in child.stderr.read()
        finally: child.kill()


def test_a_prompt_from_a_pipe_is_waited_for_aloud_and_one_without_end_is_refused(space):  # noqa: F811
    os.mkfifo(space.root / "pipe")
    words = [sys.executable, "-m", "llm_trainer", "generate", "x", "--prompt-file"]
    how = dict(cwd=space.root, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    child = subprocess.Popen([*words, "pipe"], **how)
    try:
        assert "Waiting for somebody to write into pipe" in child.stderr.readline()
        (space.root / "pipe").write_text("a prompt")
        assert "There is no run x" in child.communicate(timeout=60)[1] and child.returncode == 3
    finally: child.kill()
    for endless in (["/dev/zero"], ["-"]):
        with open("/dev/zero") as zeros: done = subprocess.run([*words, *endless], stdin=zeros, **how)
        assert done.returncode == 2 and "no prompt is that long" in done.stderr


def test_a_link_to_itself_is_no_fault_of_the_program(space, capsys):  # noqa: F811
    (space.root / "x").symlink_to("x")
    assert commands.main(["init", "x"]) == 1
    assert "link" in (said := capsys.readouterr().err) and "internal error" not in said


def test_the_next_command_is_quoted(tmp_path, capsys):
    assert commands.main(["init", str(tmp_path / "my models")]) == 0
    assert f"cd '{tmp_path}/my models'" in capsys.readouterr().out


def test_memory_that_runs_out_is_no_fault_of_the_program(space):  # noqa: F811
    limited = ["sh", "-c", 'ulimit -v 300000; exec "$@"', "sh", sys.executable, "-m", "llm_trainer", "doctor"]
    done = subprocess.run(limited, cwd=space.root, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "internal error" not in said and "Traceback" not in said
    assert "ulimit -v" in said or "PyTorch does not load" in said


def stand_still(pids):
    "Do processes sleep, and compute nothing for a second?"
    before = [*map(process._stat, pids := [*pids])]
    time.sleep(1)
    after = [*map(process._stat, pids)]
    return all(a and b and a[0] == b[0] == "S" and a[11:13] == b[11:13] for a, b in zip(before, after))


def test_training_goes_on_to_its_end_without_its_pipe(space):  # noqa: F811
    "The real program, its output a pipe that is full from the beginning and that nobody reads"
    read, write = full_pipe()
    words = [sys.executable, "-m", "llm_trainer", "train", "--config", "tiny", "--max-steps", "3", "--name", "unread",
             "--eval-every", "0", "--sample-every", "0"]
    child = subprocess.Popen(words, cwd=space.root, stdout=write, stderr=write,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
    os.close(write)
    assert child.wait(300) == 0 and find_run(space.runs, "unread").status().status == "completed"
    os.close(read)


def test_a_lock_is_never_a_standard_stream(tmp_path):
    code = ("import os,sys; sys.path.insert(0, sys.argv[1]); from llm_trainer.system.locks import Lock; os.close(0)\n"
            "lock = Lock(sys.argv[2]); lock.acquire(); sys.exit(lock.fileno() < 3)")
    assert subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path / "lock")]).returncode == 0


# The ground

def test_a_moved_workspace_takes_its_run_along(space):  # noqa: F811
    run, process = stand_in(space, "training", 1)
    there = space.root.with_name("elsewhere")
    space.root.rename(there)
    assert process.wait() == 1 and not space.root.exists()
    state = find_run(workspace.open_workspace(there).runs, run.id).status()
    assert (state.status, state.reason["code"]) == ("failed", "moved") and str(there) in state.reason["message"]


def test_a_run_that_got_another_name_is_not_begun_again(space):  # noqa: F811
    "Its checkpoints go by the old one"
    run, process = stand_in(space, "training", 1)
    (space.runs / run.id).rename(space.runs / "other")
    assert process.wait() == 1
    moved = find_run(space.runs, "other")
    advice = f"mv {space.runs / 'other'} {space.runs / run.id}\nThen: llm-trainer resume {run.id}"
    assert moved.status().reason["code"] == "moved" and advice in moved.status().reason["message"]
    with pytest.raises(UsageError) as refused: launch.plan_resume(moved, space)
    assert advice in str(refused.value)


@pytest.mark.parametrize("copied", [True, False])
def test_a_folder_goes_back_to_its_name_by_the_command_of_the_message_and_a_copy_into_none(space, copied):  # noqa: F811
    run = create_run(space.runs, tiny().to_dict(), name="one")
    shutil.copytree(run.folder, space.runs / "copy")
    if not copied:
        shutil.rmtree(run.folder)
        (run.folder / "full").mkdir(parents=True)
    said = program(space, "resume", "copy")
    assert said.returncode == 2 and ("It is a copy" in said.stderr) == copied
    if copied:
        *_, remove = said.stderr.splitlines()
        assert program(space, *remove.partition("llm-trainer ")[2].split(), "--yes").returncode == 0
    else: subprocess.run(["sh", "-c", said.stderr.partition("name: ")[2].partition("\n")[0]], check=True)
    assert [found.id for found in list_runs(space.runs)] == ["one"] and not (run.folder / "copy").exists()
    assert launch.plan_resume(find_run(space.runs, "one"), space).from_step == 0


def test_a_run_whose_lock_is_removed_goes_on_and_keeps_others_out(space):  # noqa: F811
    run, process = stand_in(space, "training", 10**6)
    (run.folder / "lock").unlink()
    until(lambda: run.locked)
    with pytest.raises(BusyError): launch.resume(run, space)
    assert launch.stop(run).status == "stopped" and process.wait() == 0 and run.state().checkpoint_step == 1
    assert not run.locked


def test_what_took_the_place_of_a_lock_keeps_no_run_from_it(space):  # noqa: F811
    ways = os.mkfifo, lambda lock: lock.symlink_to("lock"), lambda lock: lock.symlink_to("/dev/null")
    begun = [stand_in(space, "training", 10**6) for _ in ways]
    for (run, _), replace in zip(begun, ways):
        (lock := run.folder / "lock").unlink()
        replace(lock)
    def locked(run): return run.locked and (lock := run.folder / "lock").is_file() and not lock.is_symlink()
    until(lambda: all(locked(run) for run, _ in begun))
    for run, child in begun:
        assert launch.stop(run).status == "stopped" and child.wait() == 0 and run.state().checkpoint_step == 1


def test_a_run_whose_lock_others_have_ends_with_a_checkpoint(space):  # noqa: F811
    begun = [stand_in(space, "training", 10**6) for _ in range(2)]
    held, folder = (run.folder / "lock" for run, _ in begun)
    for lock in held, folder: lock.unlink()
    folder.mkdir()
    with locks.Lock(held) as other:
        assert other.acquire()
        for run, child in begun:
            assert child.wait() == 1
            state = run.status()
            assert (state.status, state.reason["code"], state.checkpoint_step) == ("failed", "lock", 1)
    folder.rmdir()
    for run, _ in begun:
        assert f"llm-trainer resume {run.id}" in run.status().reason["message"] and launch.plan_resume(run, space)


def test_a_run_that_another_process_trains_by_now_writes_no_more(space):  # noqa: F811
    run, process = stand_in(space, "training", 10**6)
    run.add_attempt(from_step=0)
    (run.folder / "lock").unlink()
    with locks.Lock(run.folder / "lock") as other:
        assert other.acquire() and process.wait() == 75
        assert run.state().status == "running"


def test_a_viewer_is_told_that_its_run_was_deleted(space):  # noqa: F811
    run, process = stand_in(space, "training", 10**6)
    viewer = subprocess.Popen([sys.executable, "-m", "llm_trainer", "status", run.id, "--watch"], cwd=space.root,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    assert "running" in viewer.stdout.readline()
    shutil.rmtree(run.folder)
    said, why = viewer.communicate()
    assert process.wait() == 1 and viewer.returncode == 3 and "was deleted" in why and "unknown" not in said


def test_checkpoints_go_where_their_folder_went(tmp_path):
    from llm_trainer.training.checkpoint import Checkpoints
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    store = Checkpoints(tmp_path / "a/checkpoints/x", "x")
    store.hold()
    (tmp_path / "a").rename(tmp_path / "b")
    def write(folder): (folder / "model.safetensors").write_bytes(b"weights")
    assert store.save(1, write).path == tmp_path / "b/checkpoints/x/step-00000001" and not (tmp_path / "a").exists()
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(OSError): store.save(2, write)
    assert not (tmp_path / "b").exists()


def test_a_deleted_run_ends_and_makes_nothing(space):  # noqa: F811
    run = create_run(space.runs, tiny().to_dict())
    words = [sys.executable, "-c", STAND_IN, str(ROOT), str(run.folder), "training", "1"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    until(lambda: (run.folder / "busy").exists())
    shutil.rmtree(run.folder)
    said = process.communicate()[1]
    assert process.returncode == 1 and "was deleted" in said and run.id in said and not run.folder.exists()


def test_a_queue_whose_folder_is_deleted_is_made_again(space):  # noqa: F811
    run = launch.start(tiny(), space, background=False)
    launch.Queue(space.runs, run.config()).take_ticket(run)
    blocked = iter([True, False])
    def stolen(self, asked):
        if next(blocked): return bool(shutil.rmtree(space.runs / ".queue"))
        return original(self, asked)
    original, launch.Queue.try_acquire = launch.Queue.try_acquire, stolen
    try:
        last = event("finished", status="completed", code=None, message=None)
        assert worker.work(run, space, events=lambda w: iter([last])) == 0
    finally: launch.Queue.try_acquire = original
    assert (space.runs / ".queue").is_dir() and run.status().status == "completed"


# The last word

@pytest.mark.parametrize("broken", ["say", "finish", "update"])
def test_an_error_while_an_error_is_told_leaves_a_reason(space, monkeypatch, broken):  # noqa: F811
    run = launch.start(tiny(), space, background=False)
    def fail(*_, **__): raise MemoryError("not even this")
    def events(writer):
        yield step(1)
        monkeypatch.setattr(RunWriter, broken, fail)
        raise ValueError("the first trouble")
    assert worker.work(run, space, events=events) == 1
    state = Run(run.folder).status()
    assert state.status == "failed" and state.reason["message"]


def test_an_end_that_does_not_come_is_made(space):  # noqa: F811
    code = STAND_IN.replace('while "stop" not in writer.requests(): time.sleep(0.01)',
                            "raise ValueError('stuck')").replace(
        "def events(writer):", "def hang(*_):\n    while True: time.sleep(1)\n"
        "worker.failure = hang\nworker.LAST_WORD = 1\n\ndef events(writer):")
    run = create_run(space.runs, tiny().to_dict())
    child = subprocess.run([sys.executable, "-c", code, str(ROOT), str(run.folder), "training", "1"],
                           stderr=subprocess.DEVNULL)
    state = run.status()
    assert child.returncode == 1 and state.status == "failed" and "stuck" in state.reason["message"]


# Records

def test_a_run_of_a_newer_version_is_unknown(space):  # noqa: F811
    run = create_run(space.runs, tiny().to_dict(), name="newer")
    path = run.folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99, "status": "hibernating"}))
    state = run.status()
    assert state.status == "unknown" and "newer version" in state.reason["message"]
    with pytest.raises(Exception, match="newer version"): launch.plan_resume(run, space)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_run_that_may_not_be_read_is_unknown(space):  # noqa: F811
    run = create_run(space.runs, tiny().to_dict(), name="private")
    run.folder.chmod(0)
    try: assert find_run(space.runs, "private").status().status == "unknown"
    finally: run.folder.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_what_belongs_to_another_user_is_said_to():
    "Not that it ended, nor that it is empty, nor that its lock should be removed"
    code = ("import os, sys; os.setgid(54321); os.setuid(54321)\n"
            "from llm_trainer.cli.commands import main; sys.exit(main())")
    with tempfile.TemporaryDirectory() as root:  # a folder that pytest doesn't close to others
        os.chmod(root, 0o755)
        space = workspace.init(root)
        run = create_run(space.runs, tiny().to_dict(), name="private")
        (run.folder / "train.log").write_text("a line")
        for words in (["stop", "private"], ["logs", "private"], ["resume", "private"], ["delete", "private", "--yes"]):
            said = program(space, *words, code=code)
            assert said.returncode == 1 and "permission denied" in said.stderr.lower(), said
            assert "Remove" not in said.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("words, closed", [(["train", "--config", "tiny"], ""), (["resume", "mine"], "mine"),
                                           (["train", "--config", "tiny", "--background"], ""), (["init"], "")])
def test_a_run_that_could_never_be_saved_is_not_begun(words, closed):
    code = ("import os, sys; os.setgid(54321); os.setuid(54321)\n"
            "from llm_trainer.cli.commands import main; sys.exit(main())")
    with tempfile.TemporaryDirectory() as root:
        space = workspace.init(root)
        create_run(space.runs, tiny().to_dict(), name="mine")
        for at, _, names in os.walk(root):
            for path in [at, *(os.path.join(at, name) for name in names)]: os.chown(path, 54321, 54321)
        os.makedirs(space.checkpoints / closed, exist_ok=True)
        os.chown(space.checkpoints / closed, 0, 0)
        before = {str(path) for path in space.root.rglob("*") if ".locks" not in str(path)}
        said = program(space, *words, code=code)
        assert said.returncode in (1, 2) and f"in {space.checkpoints / closed}: Permission denied" in said.stderr
        assert {str(path) for path in space.root.rglob("*") if ".locks" not in str(path)} == before
        assert find_run(space.runs, "mine").attempts() == []


def test_a_lock_that_another_process_keeps_too_long_costs_an_index_not_the_training(tmp_path, monkeypatch):
    from llm_trainer.training import checkpoint
    (tmp_path / "x").mkdir()
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    at = iter(range(0, 10**6, 4))
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(at))
    told = []
    checkpoint.Checkpoints(tmp_path / "x", "x", emit=told.append).record(1, 0.5)
    os.close(fd)
    assert "could not be written" in told[0].message


def test_without_proc_there_is_still_an_identity(monkeypatch):
    def nothing(*_, **__): raise FileNotFoundError
    process.boot_id.cache_clear()
    monkeypatch.setattr(process.Path, "read_text", nothing)
    monkeypatch.setattr(process, "_stat", lambda pid: None)
    try: found = process.identity()
    finally: process.boot_id.cache_clear()
    assert found["pid"] == os.getpid() and not process.same_process({**found, "process_start_ticks": None})


def test_what_is_not_known_of_a_lock_is_not_guessed(tmp_path):
    lock = locks.Lock(tmp_path / "lock")
    assert locks.probe(lock.path) is False
    lock.acquire()
    assert locks.probe(lock.path) is True and not lock.stray
    (tmp_path / "lock").unlink()
    assert lock.stray


# Data

def stream(tmp_path, told, **more):
    "Token files of 40 windows, and the stream over them"
    import numpy as np

    from llm_trainer.data.batches import Stream, Windows
    np.arange(40 * 8 + 1, dtype="<u2").tofile(tmp_path / "train.bin")
    return Stream(Windows(np.memmap(tmp_path / "train.bin", "<u2", "r"), 8), 4, seed=3, emit=told.append, **more)


def first(batches, n): return [next(batches)[0].tolist() for _ in range(n)]


@pytest.mark.parametrize("trouble", ["killed", "no room"])
def test_a_loader_that_fails_costs_its_help_and_no_batch(tmp_path, monkeypatch, trouble):
    from llm_trainer.data import batches
    told = []
    alone, helped = stream(tmp_path, told).iterate(8), stream(tmp_path, told, num_workers=1).iterate(8)
    wanted = first(alone, 30)
    if trouble == "no room":
        def full(*_, **__): raise OSError(28, "No space left on device")
        monkeypatch.setattr(batches, "DataLoader", full)
        assert first(helped, 30) == wanted
    else:
        import multiprocessing
        found = first(helped, 3)
        for child in multiprocessing.active_children(): os.kill(child.pid, signal.SIGKILL)
        assert found + first(helped, 27) == wanted
    assert len(told) == 1 and "the same batches" in told[0].message


SHUT = "mount -t tmpfs -o ro,size=64k tmpfs /dev/shm && exec"


@pytest.mark.skipif(subprocess.run(["unshare", "-m", "sh", "-c", f"{SHUT} true"], capture_output=True).returncode != 0
                    if shutil.which("unshare") else True, reason="needs to mount")
def test_without_shared_memory_the_same_is_trained_and_one_line_says_so(space):  # noqa: F811
    words = [sys.executable, "-m", "llm_trainer", "train", "--config", "tiny", "--max-steps", "2", "--num-workers", "2",
             "--threads", "1"]
    said = subprocess.run(["unshare", "-m", "sh", "-c", f'{SHUT} "$@"', "sh", *words], cwd=space.root, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    told = said.stdout + said.stderr
    assert said.returncode == 0 and "Traceback" not in told and told.count("are given up") == 1


def test_memory_is_counted_in_bytes_without_proc(monkeypatch):
    from llm_trainer import device
    whole = device.memory_used("cpu")
    monkeypatch.setattr(device, "_read", lambda path: None)
    assert whole / 2 < device.memory_used("cpu") < whole * 20


def test_damaged_tokens_are_named_and_made_again(space):  # noqa: F811
    from llm_trainer.data.batches import open_tokens
    from llm_trainer.errors import DataError
    from llm_trainer.training.recipe import prepare
    told = []
    cache = prepare(tiny(), space, emit=told.append).caches[0]
    path = cache.folder / "train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(DataError, match="train.bin is damaged"): open_tokens(cache.folder)
    assert prepare(tiny(), space, emit=told.append).caches[0].folder == cache.folder and path.read_bytes() == whole
    assert any("train.bin is damaged" in getattr(e, "message", "") for e in told)


# Knobs

@pytest.mark.parametrize("knobs", [dict(temperature=1e-40), dict(frequency_penalty=1e39),
                                   dict(repetition_penalty=1e-300, temperature=1e308),
                                   dict(no_repeat_ngram=1, ignore_eot=True),
                                   dict(no_repeat_ngram=1, ignore_eot=True, beams=3)], ids=str)
def test_no_value_of_a_knob_loses_the_text(knobs):
    from torture.knobs import Letters, model
    from llm_trainer.generation.sampler import Sampling, generate
    longest = 28 if "beams" in knobs else 200
    *pieces, last = generate(model(), Letters(), "abc", Sampling(max_new_tokens=longest, seed=1, **knobs))
    assert last.finish in ("eot", "length") and pieces
    if knobs.get("no_repeat_ngram") and "beams" not in knobs:
        assert last.finish == "eot" and len({p.token for p in pieces}) == len(pieces)


def test_a_wait_names_who_is_waited_for(tmp_path):
    from llm_trainer.data.cache import locked
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from llm_trainer.data.cache import locked; from "
            "pathlib import Path\n"
            "with locked(Path(sys.argv[2]), print, 'x'): print('has it', flush=True); time.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(tmp_path / "lock")], stdout=subprocess.PIPE,
                             text=True)
    assert child.stdout.readline() == "has it\n"
    child.send_signal(signal.SIGSTOP)
    until(lambda: process.process_state(child.pid) == "stopped")
    told = []
    def tell(event):
        told.append(event.message)
        child.kill()
    with locked(tmp_path / "lock", tell, "x"): assert f"kill -CONT {child.pid}" in told[0]
    child.wait()


@pytest.mark.parametrize("wish, kept", [("3,2", "3,2"), ("4096", "4096"), ("4097", None), (f"{2**64 + 1}", None)])
def test_a_wish_for_more_threads_than_openmp_survives_is_left_out_before_torch_loads(wish, kept):
    code = ("import os, sys\nfrom llm_trainer.system import process\nprocess.prepare()\n"
            "print(os.environ.get('OMP_NUM_THREADS'), 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": wish})
    assert done.stdout.split() == [str(kept), "False"] and ("unset OMP_NUM_THREADS" in done.stderr) == (kept is None)


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_do_not_spin_without_end_unless_the_user_says_how(own):
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    code = ("import os\nfrom llm_trainer.system import process\nprocess.prepare()\n"
            f"print({{name: os.environ[name] for name in {names} if name in os.environ}})")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    found = subprocess.run([sys.executable, "-c", code], env=environment | own, capture_output=True, text=True)
    ours = {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "2000"}
    assert found.stdout.strip() in map(str, [own] if own else ours)
