"""What this machine offers to a training run, and what is missing."""
from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

from llm_trainer import __version__, workspace
from llm_trainer.errors import LLMTrainerError
from llm_trainer.terminal import quoted, size

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "pydantic", "fire", "rich")
OPTIONAL = {"textual": "the watcher", "datasets": "datasets from the hub", "transformers": "opening models elsewhere",
            "ipywidgets": "live notebooks", "matplotlib": "pictures in notebooks", "nbdev": "building the book"}


def _version(package: str) -> str | None:
    try: return version(package)
    except PackageNotFoundError: return None


def _workspace() -> dict:
    "The folders of the workspace, and how much room they have"
    try: space = workspace.find()
    except LLMTrainerError as error: return {"problem": str(error)}
    folders = {name: str(getattr(space, name)) for name in ("data", "checkpoints", "runs", "configs")}
    missing = [f for f in folders.values() if not os.path.isdir(f)]
    closed = [f for f in folders.values() if f not in missing and not os.access(f, os.W_OK)]
    problems = [*([f"not there: {', '.join(missing)}.\nMake them: llm-trainer init {quoted(space.root)}"]
                  if missing else []), *([f"you may not write to: {', '.join(closed)}"] if closed else [])]
    return {"root": str(space.root), **folders, "config": space.config, "device": space.device,
            "disk_free_bytes": shutil.disk_usage(space.root).free,
            **({"problem": "\n".join(problems)} if problems else {})}


def _device(prefer: str) -> dict:
    "What a run with the default settings would compute on"
    try:
        from llm_trainer.config import TrainConfig
        from llm_trainer.device import resolve
        return resolve(TrainConfig(), prefer).to_dict()
    except LLMTrainerError as error: return {"problem": str(error)}
    except (ImportError, OSError) as error: return {"problem": f"PyTorch does not load: {error}"}


def _devices(device: dict) -> list[dict]:
    "What `--devices auto` would take: the name, maker's name and memory of each"
    if device["device"] != "cuda":
        return [{"name": device["device"], "is": device["device_name"], "memory_bytes": device["memory_bytes"]}]
    import torch
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": f"cuda:{i}", "is": one.name, "memory_bytes": one.total_memory} for i, one in enumerate(every)]


def _ranks(device: dict, devices: list[dict]) -> str:
    "How a run on several devices would be laid out here"
    names = [f"{one['name']} {one['is']}, {size(one['memory_bytes'])}" for one in devices]
    if device["device"] == "cpu": return (f"--devices 2: 2 processes (gloo), {max(1, device['threads'] // 2)} of "
                                          f"{device['threads']} threads each; to try it, not to be faster")
    if len(devices) == 1: return f"one: {names[0]}"
    return "\n".join([f"--devices auto: {len(devices)} processes (NCCL), rank by rank on", *names])


def examine() -> dict:
    "Everything `doctor` tells, ready for JSON; `ready` says whether training can begin"
    space = _workspace()
    found = {"version": __version__, "python": platform.python_version(), "system": platform.platform(),
             "cpus": os.cpu_count(), "device": _device(space.get("device", "auto")), "workspace": space,
             "packages": {name: _version(name) for name in NEEDED},
             "optional": {name: _version(name) for name in OPTIONAL}}
    if "problem" not in found["device"]: found["devices"] = _devices(found["device"])
    found["ready"] = sys.version_info >= (3, 11) and all(found["packages"].values()) and \
        not any("problem" in found[part] for part in ("device", "workspace"))
    return found


def _measured(device: dict) -> str:
    "What the CPU was asked, and what it answered"
    speeds = ", ".join(f"{name} {speed:,.3g} GFLOP/s" for name, speed in device["probed"].items())
    return f"{speeds} on one thread\nkernels: {', '.join(filter(None, [device['kernels'], device['math']]))}"


def report(found: dict) -> str:
    "The same for people"
    def row(ok, label, text): return f"{'ok ' if ok else 'NO '} {label:<12} {text}".replace("\n", "\n" + " " * 17)
    device, space = found["device"], found["workspace"]
    lines = [row(True, "llm_trainer", found["version"]), row(True, "python", f"{found['python']} on {found['system']}")]
    missing = [name for name, is_there in found["packages"].items() if not is_there]
    lines.append(row(not missing, "packages", f"missing: {', '.join(missing)}\npip install llm_trainer" if missing else
                     ", ".join(f"{n} {v}" for n, v in found["packages"].items())))
    if "problem" in device: lines.append(row(False, "device", device["problem"]))
    else:
        lines += [row(True, "device", f"{device['device']} ({device['device_name']})\n{device['reason']}"),
                  row(True, "computes in", f"{device['dtype']}, {device['threads']} "
                                           f"thread{'s' * (device['threads'] != 1)}, "
                      f"{'compiled' if device['compile'] else 'not compiled'}"
                      f"{', deterministic' if device['deterministic'] else ''}"),
                  *([row(True, "measured", _measured(device))] if device["probed"] else []),
                  row(True, "memory", size(device["memory_bytes"])),
                  row(True, "several", _ranks(device, found["devices"]))]
    if "disk_free_bytes" in space:
        lines.append(row(space["disk_free_bytes"] > 2e9, "disk", f"{size(space['disk_free_bytes'])} free"))
    place = "\n".join(filter(None, [space.get("root"), space.get("problem")]))
    lines.append(row("problem" not in space, "workspace", place))
    lines += [f"{'ok ' if v else '-  '} {name:<12} {v or 'not installed'} ({OPTIONAL[name]})"
              for name, v in found["optional"].items()]
    return "\n".join([*lines, "", "Ready. Next: llm-trainer train --config quickstart" if found["ready"] else
                      "Not ready: see the lines that begin with NO."])
