"""The workspace: where data/, checkpoints/, runs/ and configs/ are. Knows nothing of what lies in them."""
from __future__ import annotations

import configparser
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.errors import ConfigError, NotFoundError, UsageError
from llm_trainer.terminal import clean, quoted

SETTINGS = """\
# Marks the workspace root of llm_trainer: every command finds its folders by walking up to this file.
[llm_trainer]
data = data
checkpoints = checkpoints
runs = runs
configs = configs
# The profile that `llm-trainer train` uses when --config is not given.
config = default
# auto, cuda, mps or cpu; a profile or --device wins over this line.
device = auto
"""


@dataclass(frozen=True)
class Workspace:
    """The folders of one workspace, absolute, and its two preferences."""
    root: Path
    data: Path
    checkpoints: Path
    runs: Path
    configs: Path
    config: str = "default"
    device: str = "auto"


def home(path: Path | str) -> Path:
    "`path`, where ~ and ~user stand for a home folder; NotFoundError where there is no such user"
    try: return Path(path).expanduser()
    except RuntimeError:
        raise NotFoundError(f"There is no home folder for the beginning of {clean(str(path)[:200], '')}.\n"
                            "Write the path out; a name that really begins with ~ is given as ./~name.") from None


def located(name: Path | str, *folders: Path) -> Path | None:
    "Where `name` is: here, else in the first of `folders` that has it; None where it isn't"
    path = home(name)
    return next((base / path for base in (Path(), *folders) if os.path.exists(base / path)), None)


def _settings(root: Path, passing: bool = False) -> configparser.SectionProxy | None:
    """The `[llm_trainer]` section of `root/settings.ini`, or None; ConfigError where it can't be told if there is one,
    except, in `passing`, because it is no file or not ours to read"""
    path, parser, content = root / "settings.ini", configparser.ConfigParser(interpolation=None), b""
    if not os.path.lexists(path): return None
    try:
        if path.exists() and not path.is_file():
            if passing: return None
            raise OSError(errno.EINVAL, "it is no file")
        content = path.read_bytes()
        parser.read_string(content.decode().removeprefix("\ufeff"), path.name)
    except UnicodeDecodeError: why = "it is no text in UTF-8"
    except configparser.Error as e: why = " ".join(clean(str(e)[:200], "").split())
    except PermissionError as e:
        if passing: return None
        why = e.strerror
    except OSError as e: why = "it is a link that leads nowhere" if e.errno == errno.ENOENT else e.strerror
    else: return parser["llm_trainer"] if parser.has_section("llm_trainer") else None
    if content and b"llm_trainer" not in content: return None  # something else's
    there, aside = quoted(path), quoted(f"{path}.old")
    raise ConfigError(f"{path} can't be read: {why}.\nMend it, or put it aside and make a new one: "
                      f"mv {there} {aside} && llm-trainer init {quoted(root)}\n"
                      "or use another workspace: export LLM_TRAINER_HOME=/path/to/workspace")


def _unfit(root: Path) -> str | None:
    "What stands in the way of a workspace in `root`"
    there = next(path for path in (root, *root.parents) if os.path.lexists(path))
    if not there.is_dir(): return f"{there} is no folder"
    known = root / "settings.ini"
    if known.exists() and known.stat().st_size and _settings(root) is None:
        return f"{known} belongs to something else (it has no section [llm_trainer])"
    return None


def open_workspace(root: Path) -> Workspace:
    "The workspace whose settings.ini lies in `root`"
    s = _settings(root)
    if s is None:
        why, make = _unfit(root), f"Make one: llm-trainer init {quoted(root)}"
        raise NotFoundError(f"{root} is no workspace: {why or 'it has no settings.ini with a section [llm_trainer]'}.\n"
                            + ("Name another: export LLM_TRAINER_HOME=/path/to/workspace" if why else make))
    def folder(key): return (root / home(s.get(key, key) or key)).resolve()
    return Workspace(root, folder("data"), folder("checkpoints"), folder("runs"), folder("configs"),
                     s.get("config", "default"), s.get("device", "auto"))


def find(start: Path | str | None = None) -> Workspace:
    "The workspace around `start` (default: `$LLM_TRAINER_HOME`, else the current folder and those above it)"
    there = os.environ.get("LLM_TRAINER_HOME")
    if start is None and there: return open_workspace(home(there).resolve())
    here = Path(start or ".").resolve()
    for folder in (here, *here.parents):
        if _settings(folder, passing=folder != here) is not None: return open_workspace(folder)
    raise NotFoundError(f"No workspace here: neither {here} nor a folder above it has a settings.ini with a section "
                        "[llm_trainer].\nMake one with: llm-trainer init\n"
                        "or name one: export LLM_TRAINER_HOME=/path/to/workspace")


def preferred_device() -> str:
    "The device of settings.ini; a model folder is used outside a workspace, too"
    try: return find().device
    except NotFoundError: return "auto"


def refusal(folder: Path) -> str | None:
    "Why nothing can be made in `folder`, or in the nearest one above it that is there; None where something can"
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    new = there / f".tmp-{os.urandom(4).hex()}"
    try:
        new.mkdir(0o700)
        new.rmdir()
    except OSError as e: return f"nothing can be written in {there}: {e.strerror}"


def init(folder: Path | str = ".") -> Workspace:
    "Make `folder` a workspace; what is already there stays as it is"
    root = home(folder).resolve()
    if why := _unfit(root): raise UsageError(f"{why}.\nChoose another folder: llm-trainer init FOLDER")
    if _settings(root) is None:
        root.mkdir(parents=True, exist_ok=True)
        new = root / f".settings.ini.{os.getpid()}.tmp"  # whole or not there, also on a full disk
        try:
            new.write_text(SETTINGS, encoding="utf-8")
            new.replace(root / "settings.ini")
        except OSError as e: raise OSError(e.errno, e.strerror, str(root / "settings.ini")) from None
        finally: new.unlink(missing_ok=True)
    space = open_workspace(root)
    for folder in (space.data, space.checkpoints, space.runs, space.configs): folder.mkdir(parents=True, exist_ok=True)
    for folder in (space.checkpoints, space.runs):
        if why := refusal(folder): raise UsageError(f"This workspace can't be used: {why}.\nMake that folder writable, "
                                                    "or choose another workspace: llm-trainer init FOLDER")
    return space
