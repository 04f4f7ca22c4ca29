"""Finds what a person named: the texts, tokenizer and weights of a run that is to begin, checked, as absolute paths.
Every face calls it before `launch.start`: a worker stands in another folder. Loads torch only for `init_from`."""
from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer import workspace
from llm_trainer.errors import CheckpointError, NotFoundError, UsageError
from llm_trainer.events import Emit, Note, print_notes
from llm_trainer.runs.run import RUN_ID
from llm_trainer.terminal import clean, quoted
from llm_trainer.workspace import Workspace

if TYPE_CHECKING: from llm_trainer.config import Config

def WEIGHTS(name): return not name.startswith("state/")  # what generating reads of a checkpoint


def resolve_inputs(
    config: Config,
    space: Workspace,
    given: Iterable[str] = (),  # the settings that were asked for, which those of `init_from` may not contradict
    emit: Emit = print_notes,  # called for what is fetched, and for damaged checkpoints
    whole: bool = True,  # False: of a model of the hub only what describes it is fetched
) -> Config:
    "The config to start a run with. UsageError or NotFoundError for text, tokenizer or weights that can't be used"
    from llm_trainer.data.pretrained import fetch_model, is_hub_name
    from llm_trainer.data.sources import first_look, local_paths
    from llm_trainer.data.tokenizer import KINDS, prepare_tokenizer
    data, kept = config.data, ("dataset_config", "dataset_revision", "text_column")

    def place(name: str) -> str:
        paths = local_paths(name, space.data)
        return name if paths is None else ",".join(str(path.absolute()) for path in paths)
    dataset = place(data.dataset) if isinstance(data.dataset, str) else [{**vars(part), "name": place(part.name)}
                                                                        for part in data.dataset]
    found = None if data.tokenizer in KINDS else workspace.located(data.tokenizer, space.root, space.data)
    tokenizer = data.tokenizer if found is None else str(found.absolute())
    if is_hub_name(tokenizer): tokenizer, _ = fetch_model(tokenizer, space.data, False, data.offline, emit)
    config = config.replace(dataset=dataset, tokenizer=tokenizer, **{name: getattr(data, name) for name in kept})
    first_look(config.data, space.data)
    if config.data.tokenizer not in KINDS: prepare_tokenizer(config.data, [], space.data, emit)
    return config if config.training.init_from is None else _begun(config, space, set(given), emit, whole)


WINDOW = 2048  # tokens: what a model reads at most in training unless --seq-len asks for more


def _begun(config: Config, space: Workspace, given: set[str], emit: Emit, whole: bool) -> Config:
    "The config of a run that begins with a model's weights: its shape and tokenizer, and its context or a shorter one"
    from llm_trainer.data.pretrained import fetch_model, is_hub_name
    from llm_trainer.data.tokenizer import Tokenizer, read_otherwise
    text, seq_len = str(config.training.init_from), config.model.seq_len
    if is_hub_name(text): name, folder = fetch_model(text, space.data, whole, config.data.offline, emit)
    else:
        folder = weights(text, emit=emit, space=space).absolute()
        name = str(folder)
    from llm_trainer.model.huggingface import load_model, model_from_config, read_config
    model = model_from_config(read_config(folder / "config.json"))
    shape = {k: v for k, v in model.config.model_dump().items() if k != "dropout"}
    reads = shape["seq_len"]
    if "seq_len" in given and seq_len > reads:
        raise UsageError(f"--seq-len {seq_len:,} is more than the model reads: {reads:,} tokens.\nChoose up to "
                         f"{reads:,}, or leave it out.")
    shape["seq_len"] = seq_len if "seq_len" in given else min(reads, WINDOW)
    taken, flat = {**shape, "tokenizer": str(name)}, config.flat()
    if odd := [setting for setting in (*taken, "vocab_size") if setting in given
               and flat[setting] != taken.get(setting)]:
        raise UsageError(f"--{odd[0]} can't be chosen together with --init-from: shape and tokenizer are those of "
                         f"{name}.\n"
                         f"Leave --{odd[0]} out, or start without --init-from.")
    if shape["seq_len"] < reads and "seq_len" not in given:
        emit(Note(f"This model reads up to {reads:,} tokens; the run trains windows of {WINDOW:,}, and so will the "
                  f"result read. "
                  "Others: --seq-len N"))
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.vocab_size: raise UsageError(
        f"The tokenizer in {folder} has {tokenizer.vocab_size:,} tokens, its model only {model.vocab_size:,}: they "
        f"don't belong together.\n"
        "Put the model's own tokenizer.json there.")
    if otherwise := read_otherwise(folder, tokenizer): raise otherwise
    if whole: load_model(folder, seq_len=shape["seq_len"], values=False)
    return config.replace(init_from=str(name), **taken)


def is_folder(text: str | None) -> bool:
    "Is this a model's folder (or a file in its place), not the name of a run?"
    if text is None: return False
    return "/" in text or text in (".", "..") or os.path.isfile(os.path.join(text, "config.json")) or (
        not RUN_ID.fullmatch(text) and os.path.isfile(text))


def _is_a_file(path: Path, text: str) -> UsageError:
    "The refusal of a file where a model's folder is expected"
    ways = {".gguf": "A GGUF file is made for llama.cpp and not read here; name the run or folder that it was made of.",
            ".onnx": "An ONNX file isn't read here; name the run or folder that it was made of."}
    folder = quoted(path.parent)
    there = f"Name its folder: {folder if '/' in folder else f'./{folder}'}"
    if not (path.parent / "config.json").is_file(): there = "Name a folder that holds both."
    return UsageError(f"{clean(text, '')} is a file, and a model is a folder with config.json and model.safetensors.\n"
                      f"{ways.get(path.suffix.lower(), there)}")


def weights(
    text: str | None,  # a run, the unique beginning of its id, or a model's folder; None: the newest run
    checkpoint: str | None = None,  # of a run; None: best
    need=WEIGHTS,  # the files that are verified
    emit: Emit = print_notes,  # called for damaged checkpoints
    space: Workspace | None = None,  # None: the one around the current folder; a folder needs none
) -> Path:
    "The folder that holds the model a run or a folder name means, verified where it is a checkpoint"
    if text is not None and is_folder(text):
        folder = workspace.home(text)
        if checkpoint is not None: raise UsageError("--checkpoint chooses among the checkpoints of a run; "
                                                    f"{clean(text, '')!r} is a folder.")
        if folder.is_file(): raise _is_a_file(folder, text)
        if not folder.is_dir(): raise NotFoundError(f"The folder {clean(text, '')} does not exist.")
        return _whole(folder, need)
    from llm_trainer.training.checkpoint import Checkpoints
    from llm_trainer.runs.run import find_run
    space = space or workspace.find()
    run = find_run(space.runs, text)
    return Checkpoints(space.checkpoints / run.id, run.id, emit=emit).select(checkpoint or "best", need=need)


def _whole(folder: Path, need) -> Path:
    "A folder that was named; where it is a checkpoint, its files are verified like those of a run"
    if (manifest := folder / "manifest.json").is_file() and folder.absolute().name.startswith("step-"):
        from llm_trainer.system.files import unsealed
        from llm_trainer.training.checkpoint import verify
        if faults := verify(folder, need, unsealed(manifest).get("run_id")):
            raise CheckpointError(f"{clean(str(folder), '')} is damaged: {'; '.join(faults[:3])}.\n"
                                  "Name the run in place of the folder to use its newest good checkpoint.")
    return folder
