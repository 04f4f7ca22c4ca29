"""What differs between platforms: locks, boot ids, process start times, signals. Knows nothing of runs or torch."""
from __future__ import annotations

import errno
import os
import signal
import sys
import time
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm_trainer.errors import UsageError

LINUX, MACOS = sys.platform.startswith("linux"), sys.platform == "darwin"
if not (LINUX or MACOS):
    raise UsageError(f"llm_trainer runs on Linux and macOS, not on {sys.platform}: it needs flock and process groups.\n"
                     "On Windows, install WSL2 (wsl --install) and run it there.")

import fcntl  # noqa: E402  (absent on Windows)


# -- Who is this process? --

@lru_cache(maxsize=1)
def boot_id() -> str:
    "A text that changes with every boot of this machine"
    if MACOS: return _sysctl("kern.bootsessionuuid")
    try: return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError: return next(s for s in Path("/proc/stat").read_text().splitlines() if s.startswith("btime"))


def start_ticks(pid: int) -> int | None:
    "When process `pid` started, in clock ticks since boot (macOS: microseconds); None when there is no such process"
    if MACOS: return _macos_start(pid)
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def process_state(pid: int) -> str | None:
    "What `pid` is doing: running, sleeping, waiting (for a disk), stopped or zombie; None when it is gone"
    if MACOS: return "running" if _macos_start(pid) is not None else None
    names = {"R": "running", "S": "sleeping", "D": "waiting", "T": "stopped", "t": "stopped", "Z": "zombie"}
    fields = _stat(pid)
    return names.get(fields[0], "sleeping") if fields else None


def identity(pid: int | None = None) -> dict[str, Any]:
    "What tells this process (or `pid`) from every other one, also after a reboot or in another container"
    pid = pid or os.getpid()
    return {"host": os.uname().nodename, "pid": pid, "process_start_ticks": start_ticks(pid), "boot_id": boot_id(),
            "pid_namespace": _pid_namespace()}


def same_process(record: dict[str, Any]) -> bool:
    "Does the process that `record` (an `identity()`) describes still live on this machine?"
    pid = record.get("pid")
    if type(pid) is not int or pid < 2 or type(record.get("process_start_ticks")) is not int: return False
    return all(record.get(key) == value for key, value in identity(pid).items())


def send(record: dict[str, Any], signum: int) -> bool:
    "Signals the process that `record` describes, and only that one; False when it is gone or another"
    if not LINUX or not hasattr(os, "pidfd_open"): return same_process(record) and _kill(os.kill, record["pid"], signum)
    if not same_process(record): return False
    try: fd = os.pidfd_open(record["pid"])
    except OSError: return False
    try: return same_process(record) and _kill(signal.pidfd_send_signal, fd, signum)  # fd can't come to mean another
    finally: os.close(fd)


def send_group(record: dict[str, Any], signum: int) -> bool:
    "Signals the whole session that `record`'s process leads; the process alone where it leads none"
    if not same_process(record): return False
    try: leads = os.getsid(record["pid"]) == record["pid"]
    except ProcessLookupError: return False
    return _kill(os.killpg, record["pid"], signum) if leads else send(record, signum)


def _kill(how, target: int, signum: int) -> bool:
    try: how(target, signum)
    except (ProcessLookupError, PermissionError): return False
    return True


def _stat(pid: int) -> list[str] | None:
    "The fields of /proc/PID/stat after the name, which may hold spaces and brackets itself"
    try: return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError: return None


def _pid_namespace() -> str | None:
    try: return os.readlink("/proc/self/ns/pid")
    except OSError: return None


def _sysctl(name: str) -> str:
    import ctypes
    libc, size = ctypes.CDLL(None), ctypes.c_size_t(128)
    buffer = ctypes.create_string_buffer(size.value)
    if libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, 0): raise OSError(f"sysctl {name}")
    return buffer.value.decode()


def _macos_start(pid: int) -> int | None:
    "`pbi_start_tvsec` and `_tvusec` of struct proc_bsdinfo (136 bytes, flavour 3 of proc_pidinfo)"
    import ctypes
    buffer = ctypes.create_string_buffer(136)
    if ctypes.CDLL(None).proc_pidinfo(pid, 3, ctypes.c_uint64(0), buffer, 136) != 136: return None
    number = lambda at: int.from_bytes(buffer.raw[at:at + 8], sys.byteorder)
    return number(120) * 1_000_000 + number(128)


def accelerator() -> str:
    "The device that `auto` will mean here, guessed without torch: cuda, mps or cpu"
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and os.path.exists("/dev/nvidiactl"): return "cuda"
    return "mps" if MACOS and os.uname().machine == "arm64" else "cpu"


# -- Locks --

_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """An exclusive lock on a file, held by an open descriptor and so gone the moment its last holder dies.

    The descriptor can be handed to a new program (`pass_fds=[lock.fileno()]`, then `Lock.adopt`); forked children
    close it, or a loader worker would keep a killed run looking alive."""

    def __init__(self, path: Path | str):
        self.path, self._fd = Path(path), None

    @classmethod
    def adopt(cls, fd: int, path: Path | str) -> Lock:
        "The lock on `path` that the parent process took and handed over as descriptor `fd`"
        lock = cls(path)
        if not _same_file(fd, lock.path): raise ValueError(f"descriptor {fd} is not open on {path}")
        os.set_inheritable(fd, False)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock._keep(fd)
        return lock

    @property
    def held(self) -> bool: return self._fd is not None

    def acquire(self, wait: float = 0) -> bool:
        "Takes the lock, trying for `wait` seconds; False when another process has it. OSError when it can't be opened"
        deadline = time.monotonic() + wait
        while not self.held:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            try: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                os.close(fd)
                if e.errno not in (errno.EWOULDBLOCK, errno.EACCES): raise
                if time.monotonic() >= deadline: return False
                time.sleep(0.02)
                continue
            if _same_file(fd, self.path): self._keep(fd)
            else: os.close(fd)  # the file was replaced while we waited: what we hold is nobody's lock
        return True

    def fileno(self) -> int:
        assert self._fd is not None, f"{self.path} is not held"
        return self._fd

    def release(self) -> None:
        "Closes this process's descriptor; one that was handed on keeps the lock (so no LOCK_UN)"
        if self._fd is not None: os.close(self._fd)
        self._fd = None
        _held.discard(self)

    def _keep(self, fd: int) -> None:
        self._fd = fd
        _held.add(self)

    def __enter__(self) -> Lock: return self
    def __exit__(self, *_) -> None: self.release()


def is_locked(path: Path | str) -> bool:
    "Does any process hold the lock on `path`? A shared, non-blocking probe that keeps nothing"
    try: fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError: return False
    try: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError: return True
    finally: os.close(fd)
    return False


def _same_file(fd: int, path: Path) -> bool:
    try: return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError: return False


def _forget_locks() -> None:
    for lock in list(_held): lock.release()


os.register_at_fork(after_in_child=_forget_locks)
