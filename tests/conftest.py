"""What several modules of tests need: a workspace, the program, a wait, and the site, which takes long to build."""
import fcntl
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from torture.battery import hear_interrupts

from llm_trainer import workspace
from llm_trainer.runs import launch
from llm_trainer.runs.run import list_runs

gc.disable()  # until all tests are collected: what collecting makes stays, and to go through it again takes long
hear_interrupts()
ROOT = Path(__file__).parent.parent

INSTEAD = {  # what may lie where a folder or a file belongs
    "pipe": os.mkfifo, "file": Path.touch, "loop": lambda at: at.symlink_to(at.name),
    "link": lambda at: at.symlink_to("nowhere"), "folder": lambda at: (at / "full").mkdir(parents=True)}
instead = pytest.mark.parametrize("instead", INSTEAD.values(), ids=INSTEAD)


def pytest_collection_finish():
    gc.enable()
    gc.freeze()


def until(condition, seconds=240):
    "What `condition` gives once it is true: asserted is that it comes, not when"
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found


def full_pipe():
    "The ends of a pipe that takes nothing more"
    read, write = os.pipe()
    os.set_blocking(write, False)
    for size in (4096, 1):
        try:
            while True: os.write(write, b"x" * size)
        except BlockingIOError: pass
    os.set_blocking(write, True)
    return read, write


def small_disk(kilobytes, *argv, cwd, home=None):
    "What `llm-trainer *argv` says where no file grows beyond some kB"
    words = ["sh", "-c", 'ulimit -f "$0"; exec "$@"', str(2 * kilobytes), sys.executable, "-m", "llm_trainer", *argv]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, cwd=cwd, env={
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LLM_TRAINER_HOME": str(home or "")})


def program(space, *argv, **how):
    "What `llm-trainer *argv` says in the workspace `space`, with its exit code"
    return warm.program(space.root, *argv, **how)


def end_runs(runs):
    "Ends what a failed test left training: it would slow the others, or have them wait for the device"
    for run in list_runs(runs):
        if run.locked and run.state().pid != os.getpid(): launch.stop(run, now=True, timeout=0)


@pytest.fixture
def space(tmp_path, monkeypatch):
    "An empty workspace, entered; a run that a failed test left is ended"
    monkeypatch.delenv("LLM_TRAINER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    space = workspace.init(tmp_path)
    yield space
    end_runs(space.runs)


@pytest.fixture(autouse=True)
def settings_of_this_process():
    "Threads, determinism, precision and kernels of torch: a test that applies a resolution doesn't decide for the next"
    if "torch" not in sys.modules:
        yield
        return
    from llm_trainer.device import settings_kept
    with settings_kept(): yield


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the site, under a sub-path: built once, whichever modules and processes ask for it"
    pytest.importorskip("smalldocs", reason="the site needs: pip install 'llm_trainer[docs]'")
    root = tmp_path_factory.getbasetemp()
    out = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "www" / "some" / "project"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / ".whole").exists():
            code = f"import runpy; runpy.run_path({str(ROOT / 'dev' / 'site.py')!r}, run_name='__main__')"
            done = warm.program(ROOT, str(out), code=code, timeout=800)
            assert done.returncode == 0, done.stderr[-3000:]
            (out / ".whole").touch()
    return out
