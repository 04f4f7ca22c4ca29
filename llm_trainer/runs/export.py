"""A checkpoint on its way out: a folder that other programs open, its card, the push to the hub. Loads no torch."""
from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_trainer.config import Config, differences
from llm_trainer.data.pretrained import TEMPLATES
from llm_trainer.errors import LLMTrainerError, NotFoundError, UsageError
from llm_trainer.model.safetensors import weight_files
from llm_trainer.runs.run import Run
from llm_trainer.system.files import read_json, remove
from llm_trainer.terminal import clean, count

STAYS = ("state", "manifest.json")  # what of a checkpoint only this program reads
READ = (".json", ".jinja", ".txt")  # what of a model folder anyone reads beside its weights: no pickles, no code
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


# The folder ----------------------------------------------------------------------------------------------------------

@contextmanager
def written(
    out: Path,  # A file or folder that is to be; it must not exist yet
) -> Iterator[Path]:  # What to write in place of it
    "Only what was written as a whole gets its name; leftovers of a killed export are removed"
    if os.path.lexists(out): raise UsageError(f"{clean(str(out), '')} exists already; export writes a new one.\n"
                                              "Choose another name, or remove it first.")
    if not out.absolute().parent.is_dir():
        raise NotFoundError(f"The folder {clean(str(out.absolute().parent), '')} does not exist.")
    for old in out.absolute().parent.glob(f".{_literal(out.name)}.*.tmp"):
        pid = old.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)): remove(old)
    hidden = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        yield hidden
        hidden.rename(out)
    finally: remove(hidden)


@contextmanager
def room(
    out: Path | None,  # Where a person wants it; None: only to push it
    repo: str | None,  # USER/NAME, where it is pushed to
    format: str,  # hf or gguf
) -> Iterator[Path]:
    "The path to write to: the one that was named, or one of the same name as the repository that is gone afterwards"
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / (repo.rpartition("/")[2] + (".gguf" if format == "gguf" else ""))


def bytes_of(path: Path) -> int:
    return sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size


def _literal(name: str) -> str: return re.sub(r"([*?[])", r"[\1]", name)


def _alive(pid: int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    except OSError: pass
    return True


def copy_folder(
    folder: Path,  # A checkpoint, or a model folder
    target: Path,  # To be made, with the modes that the umask gives
    card: str,  # Becomes README.md
) -> None:
    "Copy the files of a model, without what is only of use for resuming"
    weights = weight_files(folder)
    stays = (*STAYS, f"{weights[0].name}.index.json")  # of shards that are left behind, where one file is the model
    files = [f for f in sorted(folder.iterdir()) if f.suffix in READ and f.name not in stays and f.is_file()]
    target.mkdir()
    files += [*weights, *sorted((folder / TEMPLATES).glob("*.jinja"))]
    for file in files:
        (target / file.relative_to(folder)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.relative_to(folder))
    (target / "README.md").write_text(card, encoding="utf-8")


# The card ------------------------------------------------------------------------------------------------------------

def plain(value) -> str:
    "A value as a table cell: cleaned, without markup; of a path only the last part"
    text = " ".join(clean(str(value), "").split())
    if os.path.isabs(text): text = os.path.basename(text.rstrip("/"))
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text[:300])


def table(rows: dict) -> str:
    "Names and values in Markdown; what has no value is left out"
    lines = [f"| {plain(name)} | {plain(value)} |" for name, value in rows.items() if value not in (None, "", {})]
    return "\n".join(["| | |", "|---|---|", *lines])


def origin(
    folder: Path,  # A checkpoint, or a model folder
    runs: Path | None,  # The workspace's runs/ folder
) -> tuple[dict, dict]:  # meta.json, and the figures at this step; both empty where the run is not known
    "The record of the run that a checkpoint belongs to"
    seal = read_json(folder / "manifest.json")
    name, step = seal.get("run_id"), seal.get("step")
    if runs is None or not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9-]{0,62}", name): return {}, {}
    run = Run(runs / name)
    if not (run.folder / "meta.json").is_file(): return {}, {}
    return run.meta, next((row for row in run.metrics("val") if row.get("step") == step), {"step": step})


def settings_of(
    meta: dict,  # A run's record
) -> dict:  # Name -> value
    "The settings that differ from their defaults, without those that only name files"
    try: changed = differences(Config.from_dict(meta["config"]))
    except (KeyError, LLMTrainerError): return {}
    return {name: new for name, (_, new) in changed.items()
            if name not in ("dataset", "tokenizer", "init_from", "sample_prompt")}


def base_of(config: dict) -> str | None:
    "The hub's name of the model that a run began with, if it has one"
    name, _, _ = str((config.get("training") or {}).get("init_from") or "").partition("@")
    return name if HUB_NAME.fullmatch(name) else None


def model_card(
    name: str,  # What the export is called
    folder: Path,  # A checkpoint, or a model folder: its config.json is read
    meta: dict,  # meta.json of the run it comes from; {}: a folder of unknown origin
    figures: dict,  # step, tokens, loss, perplexity, bits_per_byte: those at the checkpoint
) -> str:  # Markdown
    "The README.md of an export: what the model was trained on, how well it does, how it was made and how to use it"
    model, config = read_json(folder / "config.json"), meta.get("config") or {}
    begun, base = (config.get("training") or {}).get("init_from"), base_of(config)
    if begun: origin = f"trained further from {plain(base or begun)}"
    else: origin = "trained from scratch" if config else "of unknown origin"
    size = f" with {count(meta['parameters'])} parameters" if isinstance(meta.get("parameters"), int) else ""
    parts = [_front(base), f"# {plain(name)}",
             f"A {plain(model.get('model_type'))} language model{size}, {origin} with llm_trainer. It continues text."]
    if config:
        parts += ["## Data", table(_data(meta, model)),
                  "Whatever that text gets wrong, or leaves out, the model does too.",
                  "## Figures", table(_figures(figures)), "Measured on text of the same source that was held out.",
                  "## Settings", table(settings_of(meta) | _made(meta)), "Every other setting has its default."]
    return "\n\n".join([*parts, "## How to use", USAGE.format(name=re.sub(r"[^\w./-]", "-", name))])


def _front(base: str | None) -> str:
    "The part of a card that the hub reads"
    return "\n".join(["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- llm_trainer",
                      *([f"base_model: {base}"] if base else []), "---"])


def _data(meta: dict, model: dict) -> dict:
    data, counted = meta["config"].get("data") or {}, meta.get("data") or {}
    return {"text": _texts(data.get("dataset")), "training tokens": _int(counted.get("train_tokens")),
            "validation tokens": _int(counted.get("val_tokens")), "tokenizer": data.get("tokenizer"),
            "vocabulary": _int(model.get("vocab_size")), "fingerprint": str(counted.get("fingerprint") or "")[:16]}


def _figures(figures: dict) -> dict:
    return {"step": _int(figures.get("step")), "tokens seen": _int(figures.get("tokens")),
            "validation loss (nats per token)": _float(figures.get("loss")),
            "perplexity": _float(figures.get("perplexity")), "bits per byte": _float(figures.get("bits_per_byte"))}


def _made(meta: dict) -> dict:
    versions, device = meta.get("versions") or {}, meta.get("device") or {}
    return {"trained with": ", ".join(f"{k} {v}" for k, v in versions.items()), "on": device.get("name")}


USAGE = """\
```python
from transformers import pipeline

write = pipeline("text-generation", model="./{name}")
print(write("The ", max_new_tokens=50)[0]["generated_text"])
```

```bash
llm-trainer generate ./{name} --prompt "The "
llm-trainer export ./{name} --format gguf --out model.gguf     # for llama.cpp, Ollama and LM Studio
```
"""


def _texts(dataset) -> str:
    "The texts by name; of a file on this machine only its own name"
    def last(name): return os.path.basename(name) if os.path.isabs(name) else name
    if not isinstance(dataset, list): return last(str(dataset or ""))
    return ", ".join(f"{last(str(part.get('name')))} × {part.get('weight', 1):g}" for part in dataset
                     if isinstance(part, dict))


def _int(value): return f"{value:,}" if isinstance(value, int) else None
def _float(value): return f"{value:.4f}" if isinstance(value, float) else None


# The hub -------------------------------------------------------------------------------------------------------------

def check_push(
    repo: str,  # USER/NAME
) -> None:
    "Refuse a name or a login with which no push can work, before anything is written"
    if not HUB_NAME.fullmatch(repo): raise UsageError(f"--push takes USER/NAME, not {clean(repo, '')[:100]!r}.")
    from huggingface_hub import get_token
    if not get_token(): raise UsageError(f"Pushing to {repo} needs a login that may write: hf auth login\n"
                                         "or set HF_TOKEN to a token of the hub's settings page.")


def push(
    path: Path,  # A folder that was exported, or one file
    repo: str,  # USER/NAME; made if it does not exist, private unless `public`
    public: bool = False,  # Everyone may see a repository that is made
) -> str:  # Its address
    "Send an export to the hub"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars
    huggingface_hub.logging.set_verbosity_error()
    disable_progress_bars()
    hub = huggingface_hub.HfApi()
    try:
        address = hub.create_repo(repo, private=not public, exist_ok=True)
        if path.is_dir(): hub.upload_folder(repo_id=repo, folder_path=path, commit_message="Export of llm_trainer")
        else:
            hub.upload_file(repo_id=repo, path_or_fileobj=path, path_in_repo=path.name,
                            commit_message="Export of llm_trainer")
    except Exception as e:
        raise LLMTrainerError(f"{clean(str(path), '')} is written, but not pushed: {_why(e)}.\n"
                              f"Once that is mended: hf upload {repo} {clean(str(path), '')}") from None
    return str(address)


def _why(error: Exception) -> str:
    "What the hub's library reports, in a line"
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code in (401, 403): return "the hub refused the login; renew it with hf auth login"
    if code: return f"the hub answered with an error ({code})"
    if isinstance(error, OSError) or "Connect" in type(error).__name__: return "the hub can't be reached"
    return " ".join(clean(str(error), "").split())[:200]
