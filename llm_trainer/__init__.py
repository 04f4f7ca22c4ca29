"""Train a GPT-style Transformer on your own machine: detached runs, honest status, exact resume, verified checkpoints

The command line is `llm-trainer`. In Python, `import llm_trainer as lt`: `lt.train` trains here and yields what
happens, `lt.start` trains in the background, `lt.watch` shows a run in a notebook, `lt.list_runs` finds all of them,
`lt.generate` writes text, `lt.load_config` reads a profile. Importing it loads neither torch nor anything else slow.

Docs: https://llm-trainer.github.io/llm_trainer"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llm_trainer.config import Config
    from llm_trainer.events import Event
    from llm_trainer.notebook import Watch
    from llm_trainer.runs.run import Run

__version__ = "0.1.0"
__all__ = ["generate", "list_runs", "load_config", "start", "train", "watch"]


def load_config(
    name: str | Path = "default",  # A profile, or the path of a TOML file
    **settings: Any,  # Settings that differ from it, by name
) -> Config:
    "The settings of a run, validated. ConfigError names a setting that is wrong, NotFoundError a missing profile"
    from llm_trainer import workspace
    from llm_trainer.config import load_config
    return load_config(name, settings, workspace.find().configs)


def _resolved(config: Config | str | Path, settings: dict[str, Any]):
    "The workspace, and the config to start a run with: its texts, tokenizer and weights as absolute paths, looked at"
    from llm_trainer import workspace
    from llm_trainer.config import Config
    from llm_trainer.runs.resolve import resolve_inputs
    space = workspace.find()
    found = config.replace(**settings) if isinstance(config, Config) else load_config(config, **settings)
    return space, resolve_inputs(found, space, settings)


def train(
    config: Config | str | Path = "default",  # A config, a profile's name or the path of a TOML file
    *,
    name: str | None = None,  # Of the run; None: two words and four digits
    **settings: Any,  # Settings that differ, by name
) -> Iterator[Event]:
    "Trains a new run here and now, yielding what happens; leaving the loop saves a checkpoint and stops the run"
    from llm_trainer.runs import inline
    space, found = _resolved(config, settings)
    return inline.train(found, space, name)


def start(
    config: Config | str | Path = "default",  # A config, a profile's name or the path of a TOML file
    *,
    name: str | None = None,  # Of the run; None: two words and four digits
    note: str | None = None,  # A line to remember it by
    devices: int | str | None = None,  # How many train together, which ("0,2"), or "auto": all; None: one
    restarts: int = 0,  # With several devices: how often it goes on by itself after one was lost
    **settings: Any,  # Settings that differ, by name
) -> Run:
    "Trains a new run in the background: it outlives this process; `status()` of what is returned says how it is doing"
    from llm_trainer.runs import launch
    space, found = _resolved(config, settings)
    return launch.start(found, space, name, note, devices=None if devices is None else str(devices), restarts=restarts)


def generate(
    model: Run | str | Path | None = None,  # A run, the beginning of its id, or a model folder; None: the newest run
    prompt: str = "The ",
    *,
    checkpoint: str | None = None,  # best, latest or a step, of a run; None: best
    device: str = "auto",  # auto, cuda, mps or cpu
    **knobs: Any,  # As in `generation.sampling.Sampling`: temperature, top_k, max_new_tokens, seed …
) -> Iterator[str]:
    "Continues `prompt`, piece by piece; `''.join(…)` is the whole text"
    from llm_trainer import workspace
    from llm_trainer.generation.sampling import Sampling
    from llm_trainer.generation.sampler import generate, load_for_generation
    from llm_trainer.runs.resolve import weights
    from llm_trainer.runs.run import Run
    named = model.id if isinstance(model, Run) else None if model is None else str(model)
    loaded, tokenizer = load_for_generation(weights(named, checkpoint), device, workspace.preferred_device())
    return (piece.text for piece in generate(loaded, tokenizer, prompt, Sampling(**knobs)))


def watch(
    run: Run | str | None = None,  # A run, its id or a beginning of it; None: the newest
) -> Watch:
    "A live view of a run for a notebook: make it the last value of a cell"
    from llm_trainer.notebook import watch
    return watch(run)


def list_runs() -> list[Run]:
    "Every run of the workspace, newest first"
    from llm_trainer import workspace
    from llm_trainer.runs.run import list_runs
    return list_runs(workspace.find().runs)
