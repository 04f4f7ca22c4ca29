"""Locks that die with their holder: flock on an open file, handed from process to process. Knows nothing of runs."""
from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from pathlib import Path

_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """An exclusive lock on a file, held by an open descriptor and so gone the moment its last holder dies.

    The descriptor can be handed to a new program (`pass_fds=[lock.fileno()]`, then `Lock.adopt`); forked children
    close it, or a loader worker would keep a killed run looking alive."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._fd: int | None = None

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

    @property
    def stray(self) -> bool:
        "Does the name of this lock no longer mean the file we hold? So it is when its folder was moved or deleted"
        try: return not os.path.samestat(os.fstat(self.fileno()), os.lstat(self.path))
        except (FileNotFoundError, NotADirectoryError): return True
        except OSError: return False  # not known: a disk that doesn't answer is no move

    def _keep(self, fd: int) -> None:
        if fd < 3:  # never one of the standard streams, which a child process would put something else on
            low, fd = fd, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
            os.close(low)
        self._fd = fd
        _held.add(self)

    def __enter__(self) -> Lock: return self
    def __exit__(self, *_) -> None: self.release()


def is_locked(path: Path | str) -> bool:
    "Does any process hold the lock on `path`, as far as we may know?"
    return bool(probe(path))


def probe(path: Path | str) -> bool | None:
    "The same, None where it may not be known. A shared, non-blocking probe that keeps nothing"
    try: fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError: return None
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
