"""Named places where the tests make this process fail. Nothing happens, at the price of one look into an empty dict,
unless `LLM_TRAINER_FAILPOINTS="name=action[:nth]"` is set: at the nth hit (default 1) of that place it is
killed or raises."""
from __future__ import annotations
#
#   LLM_TRAINER_FAILPOINTS="save.before-rename=kill:2" llm-trainer train --config tiny
#
# Actions: kill (SIGKILL to itself), term, int, stop (those signals), eio, enospc, raise. The name `*`: any place.

import errno
import os
import signal

NAMES = {
    "save.before-tmp": "before a checkpoint's temporary folder is made",
    "save.mid-file": "between two tensors of a file",
    "save.before-fsync": "a file is written, not yet synced",
    "save.after-fsync": "a file is on disk",
    "save.after-file": "a file is hashed and synced, others may follow",
    "save.before-manifest": "every file is on disk, the manifest is not",
    "save.after-manifest": "the temporary folder is whole",
    "save.before-rename": "the last moment without the new checkpoint",
    "save.after-rename": "the new checkpoint has its name, its parent is not synced",
    "save.before-index": "the new checkpoint is complete, index.json doesn't know it",
    "index.before-replace": "the new index is written beside the old one",
    "save.after-index": "index.json is replaced, pruning comes next",
    "prune.before": "an old checkpoint is about to go",
    "prune.middle": "an old checkpoint lost its name, its files are still there",
    "metrics.append": "before a line of metrics.jsonl is written",
    "state.write": "the new state.json is written beside the old one",
    "lock.taken": "a run's lock was just taken",
    "lock.release": "a run's lock is about to be given back",
    "worker.spawn": "the launcher is about to start the worker",
    "worker.exit": "the worker recorded its end and is about to exit",
}
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "stop": signal.SIGSTOP}
_ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}
_armed: dict[str, list] = {}


def arm(spec: str | None) -> None:
    "Set the places that fail, `name=action[:nth]` separated by commas; None or an empty text disarms all"
    _armed.clear()
    for part in filter(None, (spec or "").split(",")):
        name, _, rest = part.strip().partition("=")
        action, _, nth = rest.partition(":")
        known = (name == "*" or name in NAMES) and (action in _SIGNALS or action in _ERRORS or action == "raise")
        if not known or not (nth or "1").isdigit(): raise ValueError(f"no such failpoint: {part!r}")
        _armed[name] = [action, int(nth or 1)]


def hit(name: str) -> None:
    "Fail here if this place is armed"
    if _armed: _hit(name)


def _hit(name: str) -> None:
    for key in (name, "*"):
        if key not in _armed: continue
        _armed[key][1] -= 1
        if _armed[key][1] == 0: _fail(name, _armed[key][0])


def _fail(name: str, action: str) -> None:
    if action in _SIGNALS: return os.kill(os.getpid(), _SIGNALS[action])
    if action in _ERRORS: raise OSError(_ERRORS[action], os.strerror(_ERRORS[action]), f"failpoint {name}")
    raise RuntimeError(f"failpoint {name}")


arm(os.environ.get("LLM_TRAINER_FAILPOINTS"))
