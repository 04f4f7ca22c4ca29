"""Locks that die with their holder, and signals that reach only the process they are meant for."""
import errno
import inspect
import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import until

from llm_trainer.system import locks, process

HOLD = ("import sys, time; from llm_trainer.system import locks; lock = locks.Lock(sys.argv[1]);"
        "print(lock.acquire(), flush=True); time.sleep(60)")


def child(code, *args, **kw):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True, **kw)


def test_a_lock_has_one_holder_and_probes_do_not_take_it(tmp_path):
    path = tmp_path / "lock"
    assert not locks.is_locked(path)
    with locks.Lock(path) as lock:
        assert lock.acquire() and lock.acquire()
        assert locks.is_locked(path) and not locks.Lock(path).acquire()
        assert path.stat().st_mode & 0o777 == 0o600
    assert not locks.is_locked(path) and locks.Lock(path).acquire()


def test_a_lock_is_waited_for_as_long_as_one_asks(tmp_path):
    first, second = locks.Lock(tmp_path / "lock"), locks.Lock(tmp_path / "lock")
    assert first.acquire() and second.acquire() is False
    assert inspect.signature(locks.Lock.acquire).parameters["wait"].default == 0
    timer = threading.Timer(0.2, first.release)
    timer.start()
    assert second.acquire(60)
    timer.join()


def test_a_disk_without_locks_is_told_and_one_that_does_not_answer_is_no_move(tmp_path, monkeypatch):
    lock = locks.Lock(tmp_path / "lock")
    def refuse(number):
        def call(*_, **__): raise OSError(number, os.strerror(number))
        return call
    with monkeypatch.context() as broken:
        broken.setattr(locks.fcntl, "flock", refuse(errno.ENOLCK))
        with pytest.raises(OSError, match="locks"): lock.acquire()
    assert lock.acquire()
    with monkeypatch.context() as silent:
        silent.setattr(locks.os, "lstat", refuse(errno.EIO))
        assert lock.stray is False


def test_a_lock_that_was_handed_over_goes_no_further(tmp_path):
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(fd, True)
    with locks.Lock.adopt(fd, tmp_path / "lock") as lock: assert not os.get_inheritable(lock.fileno())


def test_kill_9_frees_the_lock(tmp_path):
    holder = child(HOLD, tmp_path / "lock")
    assert holder.stdout.readline() == "True\n"
    assert locks.is_locked(tmp_path / "lock")
    holder.kill()
    holder.wait()
    assert not locks.is_locked(tmp_path / "lock")


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    lock = locks.Lock(tmp_path / "lock")
    lock.acquire()
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    assert locks.is_locked(lock.path)  # the child closed its copy, ours holds
    lock.release()
    assert not locks.is_locked(lock.path)
    os.write(go[1], b"x")
    os.waitpid(pid, 0)


def test_a_lock_can_be_handed_to_a_new_program_without_a_gap(tmp_path):
    lock = locks.Lock(tmp_path / "lock")
    lock.acquire()
    code = ("import sys; from llm_trainer.system import locks; l = locks.Lock.adopt(int(sys.argv[2]), sys.argv[1]);"
            "print(l.held, flush=True); sys.stdin.read()")
    heir = child(code, lock.path, lock.fileno(), pass_fds=[lock.fileno()], stdin=subprocess.PIPE)
    lock.release()
    assert locks.is_locked(lock.path)
    assert heir.stdout.readline() == "True\n"
    heir.communicate("")
    assert not locks.is_locked(lock.path)


def test_a_descriptor_of_another_file_is_not_adopted(tmp_path):
    (tmp_path / "other").touch()
    with open(tmp_path / "other") as f, pytest.raises(ValueError): locks.Lock.adopt(f.fileno(), tmp_path / "lock")


def test_a_lock_whose_file_was_replaced_is_not_mistaken_for_the_new_one(tmp_path):
    old, new = locks.Lock(tmp_path / "lock"), locks.Lock(tmp_path / "lock")
    old.acquire()
    os.unlink(old.path)
    assert new.acquire() and locks.is_locked(new.path)


def test_links_and_pipes_are_no_locks(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError): locks.Lock(tmp_path / "link").acquire()
    assert not (tmp_path / "elsewhere").exists()
    assert not locks.is_locked(tmp_path / "link") and not locks.is_locked(tmp_path / "pipe")


def test_an_identity_fits_one_process_only():
    me = process.identity()
    assert process.same_process(me)
    stranger = child("import time; print('up', flush=True); time.sleep(60)")  # born in another tick of the clock
    stranger.stdout.readline()
    other = {"host": "elsewhere", "boot_id": "0", "process_start_ticks": me["process_start_ticks"] + 1,
             "pid": stranger.pid, "pid_namespace": "pid:[1]"}
    for key, value in other.items(): assert not process.same_process({**me, key: value}), key
    stranger.kill()
    for pid in (None, 0, 1, -1, True, "1", 2**40): assert not process.same_process({**me, "pid": pid})


@pytest.mark.skipif(not process.LINUX, reason="Linux's prctl")
def test_a_process_can_outlive_the_thread_that_started_it():
    ask = ("import ctypes; c = ctypes.CDLL(None); told = ctypes.c_int(); c.prctl(1, 2)\n"
           "from llm_trainer.system import process\n"
           "def now(): return c.prctl(2, ctypes.byref(told)) or told.value\n"
           "before = now(); process.outlive_parent(); print(before, now())")
    assert child(ask).communicate()[0].split() == ["2", "0"]


def test_a_signal_reaches_the_process_that_was_recorded_and_no_other():
    other = child("import time; print('up', flush=True); time.sleep(60)")
    other.stdout.readline()
    record = process.identity(other.pid)
    assert not process.send({**record, "process_start_ticks": 1}, signal.SIGTERM)
    assert not process.send_group({**record, "boot_id": "of yesterday"}, signal.SIGKILL)
    assert other.poll() is None
    assert process.process_state(other.pid) in ("sleeping", "running")
    assert process.send(record, signal.SIGTERM)
    assert other.wait() == -signal.SIGTERM
    assert not process.send(record, signal.SIGTERM) and process.process_state(other.pid) is None


def test_a_group_ends_only_where_the_process_leads_it():
    code = ("import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
            "print(p.pid, flush=True); time.sleep(60)")
    leader = child(code, start_new_session=True)
    grandchild = int(leader.stdout.readline())
    assert process.send_group(process.identity(leader.pid), signal.SIGKILL)
    leader.wait()
    until(lambda: process.process_state(grandchild) in (None, "zombie"))

    member = child(code)  # in our own session: only it may be signalled, or pytest would end here
    grandchild = int(member.stdout.readline())
    assert process.send_group(process.identity(member.pid), signal.SIGKILL)
    member.wait()
    assert process.process_state(grandchild) in ("sleeping", "running")
    os.kill(grandchild, signal.SIGKILL)
