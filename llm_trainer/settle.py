"""What a person named, found: the texts, tokenizer and weights of a run that is to begin, as absolute paths, and checked.

Every face asks it before `launch.start`: a worker stands elsewhere. Loads torch only for `init_from`, to read a shape."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer import workspace
from llm_trainer.errors import CheckpointError, NotFoundError, UsageError
from llm_trainer.terminal import clean
from llm_trainer.workspace import Workspace

if TYPE_CHECKING: from llm_trainer.config import Config

WEIGHTS = lambda name: not name.startswith("state/")  # what generating reads of a checkpoint


def settle(
    config: Config,
    space: Workspace,
    given: Iterable[str] = (),  # the settings that were asked for, which those of `init_from` may not contradict
    notify: Callable[[str], None] = print,  # told of damaged checkpoints
) -> Config:
    "The config to start a run with. UsageError or NotFoundError for text, tokenizer or weights that can't be used"
    from llm_trainer.data import BUILTIN, first_look
    from llm_trainer.tokenizer import KINDS, prepare_tokenizer
    data, kept = config.data, ("dataset_config", "dataset_revision", "text_column")
    def place(name: str) -> str:
        found = None if name in (*BUILTIN, *KINDS) else workspace.located(name, space.root, space.data)
        return name if found is None else str(found.absolute())
    dataset = place(data.dataset) if isinstance(data.dataset, str) else [{**vars(part), "name": place(part.name)}
                                                                        for part in data.dataset]
    config = config.replace(dataset=dataset, tokenizer=place(data.tokenizer), **{name: getattr(data, name) for name in kept})
    first_look(config.data, space.data)
    if config.data.tokenizer not in KINDS: prepare_tokenizer(config.data, [], space.data)
    if config.training.init_from is None: return config
    from llm_trainer.train import shape_of
    folder = weights(config.training.init_from, notify=notify, space=space).absolute()
    taken, flat = {**shape_of(folder), "tokenizer": str(folder)}, config.flat()
    if odd := [name for name in (*taken, "vocab_size") if name in given and flat[name] != taken.get(name)]:
        raise UsageError(f"--{odd[0]} can't be chosen together with --init-from: shape and tokenizer are those of {folder}.\n"
                         f"Leave --{odd[0]} out, or start without --init-from.")
    return config.replace(init_from=str(folder), **taken)


def is_folder(text: str | None) -> bool:
    "Is this a model's folder, not the name of a run?"
    return text is not None and ("/" in text or text in (".", "..") or (Path(text) / "config.json").is_file())


def weights(
    text: str | None,  # a run, the unique beginning of its id, or a model's folder; None: the newest run
    checkpoint: str | None = None,  # of a run; None: best
    need=WEIGHTS,  # the files that are verified
    notify: Callable[[str], None] = print,  # told of damaged checkpoints
    space: Workspace | None = None,  # None: the one around the current folder; a folder needs none
) -> Path:
    "The folder that holds the model a run or a folder name means, verified where it is a checkpoint"
    if is_folder(text):
        folder = workspace.home(text)
        if checkpoint is not None: raise UsageError("--checkpoint chooses among the checkpoints of a run; "
                                                    f"{clean(text, '')!r} is a folder.")
        if not folder.is_dir(): raise NotFoundError(f"The folder {clean(text, '')} does not exist.")
        return _whole(folder, need)
    from llm_trainer.checkpoint import Checkpoints
    from llm_trainer.runs import find_run
    space = space or workspace.find()
    run = find_run(space.runs, text)
    return Checkpoints(space.checkpoints / run.id, run.id, notify=notify).select(checkpoint or "best", need=need)


def _whole(folder: Path, need) -> Path:
    "A folder that was named; where it is a checkpoint, its files are verified like those of a run"
    if (manifest := folder / "manifest.json").is_file() and folder.absolute().name.startswith("step-"):
        from llm_trainer.checkpoint import unsealed, verify
        if faults := verify(folder, need, unsealed(manifest).get("run_id")):
            raise CheckpointError(f"{clean(folder, '')} is damaged: {'; '.join(faults[:3])}.\n"
                                  "Name the run in place of the folder to use its newest good checkpoint.")
    return folder
