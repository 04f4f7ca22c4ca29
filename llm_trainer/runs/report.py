"""A report of one run: what it was asked, what it did and how to do it again, as one page to keep or to send. Loads no
torch and needs no network. The page holds no script and fetches nothing; whatever came from a file is text in it, never
markup."""
from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from llm_trainer.config import Config, all_settings, differences, profiles
from llm_trainer.errors import LLMTrainerError
from llm_trainer.runs.charts import Curve, plot, svg
from llm_trainer.runs.compare import curve
from llm_trainer.runs.run import Run
from llm_trainer.runs.state import State
from llm_trainer.system.files import open_regular, read_json, timestamp
from llm_trainer.terminal import clean, count, duration, fixed, size
from llm_trainer.workspace import Workspace

SAMPLES = 6  # texts that are shown
LONG = 4000  # characters of one text


# What a report is made of --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Table:
    "Rows under a heading; cells are plain text"
    head: tuple[str, ...]
    rows: list[tuple]


@dataclass(frozen=True)
class Picture:
    "Curves"
    title: str
    curves: list[Curve]
    x: str = "step"
    y: str = "loss"
    log: bool = False


@dataclass(frozen=True)
class Code:
    "Text as it is, line by line"
    text: str
    language: str = ""


@dataclass(frozen=True)
class Part:
    "A heading with what stands below it: sentences (str), tables, pictures, code"
    title: str
    blocks: list


def _dict(value) -> dict: return value if isinstance(value, dict) else {}
def _line(value, most: int = 300) -> str: return " ".join(clean(str(value), "").split())[:most]
def _number(value, digits: int = 4) -> str | None: return fixed(value, digits) if _is_number(value) else None
def _whole(value) -> str | None: return f"{value:,.0f}" if _is_number(value) else None
def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _facts(rows: dict[str, Any]) -> Table:
    "Names and values; what is not known is left out"
    return Table((), [(name, _line(value)) for name, value in rows.items() if value not in (None, "", {}, [])])


# What it says --------------------------------------------------------------------------------------------------------

def parts(
    run: Run,  # The run to tell of
    space: Workspace,  # Its workspace: checkpoints and profiles are looked up there
) -> Iterator[Part]:
    "Everything a report says, in order"
    state, meta, attempts = run.status(), run.meta, run.attempts()
    train, val = run.metrics("train"), run.metrics("val")
    yield Part("In short", [_short(state, meta, val), *_notes(run)])
    yield Part("Curves", list(_curves(train, val)) or ["Nothing was measured yet."])
    yield Part("Best figures", list(_best(val, space.checkpoints / run.id)))
    yield Part("Settings that differ from the defaults", list(_settings(run, meta, attempts, space)))
    yield Part("Text and tokenizer", [_text(meta)])
    silent = ["It was not asked for a text while it trained (sample_every = 0)."]
    yield Part("What it wrote", list(_samples(run)) or silent)
    yield Part("Machine, speed and cost", list(_machine(state, meta, train, val, attempts)))
    yield Part("Attempts", list(_attempts(attempts)))
    if state.status not in ("completed", "running", "queued") and (log := run.log_tail(20)):
        yield Part("The end of its log", [Code("\n".join(log))])
    yield Part("The same again", list(_again(run, meta, attempts)))


def _short(state: State, meta: dict, val: list[dict]) -> Table:
    reason = _dict(state.reason)
    def of(n): return f" of {n:,}" if isinstance(n, int) else ""
    last = val[-1] if val else {}
    return _facts({
        "run": state.run_id, "status": state.status + (f" ({state.phase})" if state.phase else ""),
        "why it ended": ": ".join(str(reason[k]) for k in ("code", "message") if reason.get(k)),
        "begun": str(state.created_at or meta.get("created_at") or "")[:19].replace("T", " "),
        "model": _model(meta), "steps": f"{state.step:,}{of(state.steps)}",
        "epochs": f"{state.epoch:.2f}" + (f" of {state.epochs:g}" if state.epochs else ""),
        "tokens trained on": count(state.tokens), "time": duration(state.elapsed_seconds),
        "validation loss": _number(state.val_loss), "best validation loss": _number(state.best_val_loss),
        "perplexity": _number(last.get("perplexity"), 2), "bits per byte": _number(last.get("bits_per_byte"))})


def _model(meta: dict) -> str:
    model = _dict(_dict(meta.get("config")).get("model"))
    sizes = [f"{model[k]} {word}" for k, word in (("n_layer", "layers"), ("n_embd", "wide"), ("n_head", "heads"),
                                                  ("seq_len", "tokens of context")) if k in model]
    parameters = meta.get("parameters")
    return ", ".join([f"{model.get('arch', '?')}, {parameters:,} parameters" if isinstance(parameters, int)
                      else str(model.get("arch", "?")), *sizes])


def _notes(run: Run) -> list:
    return ["Notes:", Code(run.notes().strip()[:LONG])] if run.notes().strip() else []


def _curves(train: list[dict], val: list[dict]) -> Iterator:
    if train or val:
        yield Picture("Loss, in nats per token", [curve(train, "loss", "training"),
                                                  curve(val, "loss", "validation", marks=True)])
    for name, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm"),
                        ("tokens_per_second", "Tokens per second")):
        if any(_is_number(row.get(name)) for row in train):
            yield Picture(title, [curve(train, name, title.lower())], y=title.lower(), log=name == "grad_norm")


def _best(val: list[dict], checkpoints: Path) -> Iterator:
    kept = _dict(read_json(checkpoints / "index.json").get("checkpoints"))
    good = sorted((row for row in val if _is_number(row.get("loss"))), key=lambda row: row["loss"])
    if not good:
        yield "No evaluation yet."
        return
    def pins(step):
        return ", ".join(map(str, pins)) if isinstance(pins := _dict(kept.get(str(step))).get("pins"), list) else ""
    def where(step): return f"kept{' as ' + pins(step) if pins(step) else ''}" if str(step) in kept else "pruned"
    yield Table(("step", "validation loss", "perplexity", "bits per byte", "tokens", "checkpoint"),
                [(f"{row['step']:,}", _number(row["loss"]), _number(row.get("perplexity"), 2) or "–",
                  _number(row.get("bits_per_byte")) or "–", count(row["tokens"]) if _is_number(row.get("tokens"))
                  else "–", where(row["step"])) for row in good[:5]])
    if len(good) > 5: yield f"The best five of {len(good)} evaluations."


def _settings(run: Run, meta: dict, attempts: list[dict], space: Workspace) -> Iterator:
    try: config, known = Config.from_dict(run.config()), all_settings()
    except (LLMTrainerError, AttributeError, TypeError, ValueError):
        yield "This run's settings are not those of this version; as they are stored:"
        yield Code(json.dumps(_dict(meta.get("config")), indent=1, default=str)[:LONG])
        return
    changed = {name: attempt.get("attempt") for attempt in attempts for name in _dict(attempt.get("changed"))}
    profile, file = profile_of(meta, space)
    given, reasons = _flags(attempts), _reasons(file)
    rows = []
    for name, (default, value) in differences(config).items():
        if name in changed: source = f"changed at attempt {changed[name]}"
        elif name in given: source = "a flag"
        else: source = f"profile {profile}" if profile else "the caller"
        why = reasons.get(name, "") if source.startswith("profile") else ""
        rows.append((name, shown(value), shown(default), source, why or known[name].description.partition(";")[0]))
    yield Table(("setting", "value", "default", "from", "why, or what it is"),
                rows) if rows else "None: everything is at its default."


def shown(value) -> str:
    "A setting's value for a reader; of a path only the last part"
    if isinstance(value, list | tuple): return " + ".join(shown(part) for part in value)[:300]
    if hasattr(value, "weight"): return f"{shown(value.name)} × {value.weight:g}"
    if isinstance(value, bool) or value is None: return {True: "yes", False: "no", None: "–"}[value]
    text = _line(value)
    return os.path.basename(text.rstrip("/")) or text if os.path.isabs(text) else text


def profile_of(meta: dict, space: Workspace) -> tuple[str, Path | None]:
    "The name of the profile that a run was begun with, and its file where that is still there"
    argv = [str(word) for word in meta.get("argv") or [] if isinstance(word, str)]
    words = " ".join(argv).replace("--config=", "--config ").split()
    name = next((b for a, b in zip(words, words[1:]) if a == "--config"), space.config if argv else "")
    known = profiles(space.configs)
    return Path(_line(name, 80)).name.removesuffix(".toml"), known.get(name)


def _flags(attempts: list[dict]) -> set[str]:
    "The settings that were given on the command line"
    words = [str(word) for attempt in attempts[:1] for word in attempt.get("argv") or []]
    return {word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for word in words if word.startswith("--")}


def _reasons(file: Path | None) -> dict[str, str]:
    "The remarks that a profile has behind its settings"
    if not file: return {}
    try:
        with open_regular(file, follow=True) as f: text = f.read(65_536).decode(errors="replace")
    except OSError: return {}
    found = re.findall(r"^(\w+)[ \t]*=[^#\n]*#[ \t]*(.+)$", text, re.M)
    return {name: _line(remark) for name, remark in found}


def _text(meta: dict) -> Table:
    data, wanted = _dict(meta.get("data")), _dict(_dict(meta.get("config")).get("data"))
    texts = wanted.get("dataset")
    names = " + ".join(f"{shown(_dict(t).get('name', '?'))} × {_dict(t).get('weight', 1)}"
                       for t in texts) if isinstance(texts, list) \
        else shown(texts) if texts else None
    return _facts({"text": names, "training tokens": _whole(data.get("train_tokens")),
                   "validation tokens": _whole(data.get("val_tokens")),
                   "fingerprint of the text": data.get("fingerprint"),
                   "tokenizer": shown(wanted["tokenizer"]) if "tokenizer" in wanted else None,
                   "vocabulary": _whole(meta.get("vocab_size")),
                   "SHA-256 of tokenizer.json": meta.get("tokenizer_hash")})


def _samples(run: Run) -> Iterator:
    found = run.samples()
    keep = sorted({round(i * (len(found) - 1) / (SAMPLES - 1))
                   for i in range(SAMPLES)}) if len(found) > SAMPLES else range(len(found))
    for sample in (found[i] for i in keep):
        yield f"Step {sample['step']:,}:"
        yield Code((str(sample.get("prompt", "")) + str(sample.get("text", "")))[:LONG])


def _machine(state: State, meta: dict, train: list[dict], val: list[dict], attempts: list[dict]) -> Iterator:
    device, terms, versions = _dict(meta.get("device")), _dict(meta.get("resolution")), _dict(meta.get("versions"))
    used, seconds = state.tokens, state.elapsed_seconds
    memory = max((row["memory_bytes"] for row in train if _is_number(row.get("memory_bytes"))), default=None)
    world = max((a["world_size"] for a in attempts if isinstance(a.get("world_size"), int)), default=1)
    yield _facts({
        "device": f"{device.get('name')} ({device.get('type')})" if device.get("name") else device.get("type"),
        "processes": world if world > 1 else None, "why this device": terms.get("reason"),
        "number format": terms.get("dtype"),
        "compiled": shown(terms["compile"]) if isinstance(terms.get("compile"), bool) else None,
        "threads": terms.get("threads") or None, "software": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "speed, mean over the run": f"{count(used / seconds)} tokens/s" if seconds and used else None,
        "memory at most": size(memory) if memory else None, "time": duration(seconds),
        "device-hours": f"{seconds * world / 3600:.3f}" if seconds else None, "energy": energy(train + val)})


def energy(
    rows: list[dict],  # Metrics of all kinds
) -> str:
    "What the device counted while the run trained, in kWh; each attempt's last figure counts"
    total = {}
    for name in ("cpu_joules", "gpu_joules"):
        most: dict[Any, float] = {}
        for row in rows:
            attempt = row.get("attempt") if isinstance(row.get("attempt"), int) else 0
            if _is_number(row.get(name)): most[attempt] = max(most.get(attempt, 0.0), row[name])
        if most: total[name] = sum(most.values())
    if not total: return "not known: this machine doesn't tell (RAPL is not readable, and no NVIDIA GPU counts)"
    words = {"cpu_joules": "CPU package, by RAPL", "gpu_joules": "GPU, by NVML"}
    each = ", ".join(f"{joules / 3.6e6:.4g} kWh ({words[name]})" for name, joules in total.items())
    return f"{each}; the chips' counters, whoever else used them included"


def _attempts(attempts: list[dict]) -> Iterator:
    if not attempts:
        yield "None is recorded."
        return
    rows = []
    for attempt in attempts:
        pairs = [(name, *pair) for name, pair in _dict(attempt.get("changed")).items() if isinstance(pair, list)
                 and len(pair) == 2]
        changed = "; ".join(f"{_line(name, 40)}: {shown(old)} → {shown(new)}" for name, old, new in pairs)
        target = attempt.get("target_steps") or attempt.get("target_epochs")
        unit = "steps" if attempt.get("target_steps") else "epochs"
        rows.append((_line(attempt.get("attempt", "?"), 10), _line(attempt.get("started_at", ""), 19).replace("T", " "),
                     _line(attempt.get("from_step", "?"), 20), f"{_line(target, 20)} {unit}" if target else "–",
                     _line(attempt.get("lr_plan") or "–", 60), changed or "–"))
    yield Table(("attempt", "started (UTC)", "from step", "to", "learning-rate plan", "changed"), rows)


def _again(run: Run, meta: dict, attempts: list[dict]) -> Iterator:
    lines = [command(a["argv"]) for a in attempts if isinstance(a.get("argv"), list) and a["argv"]]
    if not lines and isinstance(meta.get("argv"), list) and meta["argv"]: lines = [command(meta["argv"])]
    changed = len(attempts) > 1 and any(a.get("changed") or a.get("lr_plan") for a in attempts)
    if lines:
        yield "The commands as they were typed, in their order:"
        yield Code("\n".join(lines), "bash")
        yield "The same from this page alone: save what follows as again.toml, then"
    else: yield "It was started from Python. The same from a shell: save what follows as again.toml, then"
    yield Code("llm-trainer train --config ./again.toml", "bash")
    yield Code(toml(_dict(meta.get("config"))), "toml")
    yield ("That is the run as it began; what later attempts changed is in the table above." if changed else
           "With the text, the tokenizer and the versions named above, on the same kind of device, the losses are the "
           "same to the "
           "last bit; elsewhere they are close.")


def command(argv: list) -> str:
    "What was typed"
    return clean(f"llm-trainer {shlex.join(str(word) for word in argv)}", "")


def toml(config: dict) -> str:
    "A whole configuration as a profile"
    lines = []
    for group, values in config.items():
        if not isinstance(values, dict): continue
        known = {_line(name, 80): value for name, value in values.items() if value is not None}
        lines += [f"[{_line(group, 40)}]", *(f"{name} = {_toml(value)}" for name, value in known.items()), ""]
    return "\n".join(lines)


def _toml(value) -> str:
    if isinstance(value, bool): return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_line(k, 80)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list): return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if isinstance(value, int | float) else json.dumps(clean(str(value)))


# How it is written ---------------------------------------------------------------------------------------------------

def as_markdown(
    title: str,
    content: list[Part],
) -> str:
    "The report for a repository or a mail; its pictures are made of characters"
    lines = [f"# {_mark(title)}", ""]
    for part in content:
        lines += [f"## {part.title}", ""]
        for block in part.blocks: lines += [_markdown(block), ""]
    return clean("\n".join(lines)).rstrip() + "\n"


def _markdown(block) -> str:
    if isinstance(block, Table):
        head = block.head or ("", "") # a table needs one
        lines = [f"| {' | '.join(map(_mark, head))} |", f"|{'---|' * len(head)}"]
        return "\n".join([*lines, *(f"| {' | '.join(_mark(cell) for cell in row)} |" for row in block.rows)])
    if isinstance(block, Picture):
        return _fenced(block.title + "\n\n" + plot(block.curves, block.x, block.y, block.log, width=90))
    if isinstance(block, Code): return _fenced(block.text, block.language)
    return _mark(block)


def _mark(text) -> str:
    "Text with Markdown and HTML escaped"
    return re.sub(r"([\\`*_\[\]<>|#&~$])", r"\\\1", _line(text, 2000))


def _fenced(text: str, language: str = "") -> str:
    text = clean(text)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"


STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #57606a; --back: #fff; --text: #1f2328; --code: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d444d; --soft: #9198a1; --back: #0d1117; --text: #e6edf3; --code: #161b22 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem;
       background: var(--back); color: var(--text) }
h1 { font-size: 1.6rem }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem }
table { border-collapse: collapse; font-size: .9rem }
td, th { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top }
th { color: var(--soft); font-weight: 600 } tr + tr td, tbody td { border-top: 1px solid var(--line) }
td { overflow-wrap: break-word } .scroll { overflow-x: auto }
.facts td { overflow-wrap: anywhere } .facts td:first-child { color: var(--soft); white-space: nowrap }
pre { background: var(--code); padding: .7rem .9rem; border-radius: .4rem; overflow-x: auto; white-space: pre-wrap;
      font-size: .85rem }
figure { margin: 1rem 0; background: #fff; border-radius: .4rem; padding: .4rem }
figcaption { color: #57606a; font-size: .85rem }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif }
svg text:not([fill]) { fill: #57606a } svg .grid { stroke: #e4e8ec }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem }
@media print { body { margin: 0; max-width: none } pre, figure { break-inside: avoid } }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def as_html(
    title: str,
    content: list[Part],
) -> str:
    "The report as one page that needs nothing else"
    body = "\n".join(f"<section><h2>{_text_of(part.title)}</h2>\n{''.join(map(_html, part.blocks))}</section>"
                     for part in content)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<meta name="referrer" '
            f'content="no-referrer">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text_of(title)}</title>\n'
            f"<style>{STYLE}</style></head>\n<body><main><h1>{_text_of(title)}</h1>\n{body}\n</main>\n"
            f"<footer>Made by llm_trainer on {timestamp()[:10]} from the run's own files.</footer></body></html>\n")


def _text_of(value, keep: str = "") -> str: return escape(clean(str(value), keep), quote=True)


def _html(block) -> str:
    if isinstance(block, Table):
        head = "".join(f'<th scope="col">{_text_of(name)}</th>' for name in block.head)
        rows = "".join(f"<tr>{''.join(f'<td>{_text_of(cell)}</td>' for cell in row)}</tr>\n" for row in block.rows)
        head, kind = (f"<thead><tr>{head}</tr></thead>", "") if head else ("", ' class="facts"')
        return f'<div class="scroll"><table{kind}>{head}<tbody>\n{rows}</tbody></table></div>\n'
    if isinstance(block, Picture):
        picture = svg(block.curves, block.title, block.x, block.y, block.log)
        return f"<figure>{picture}<figcaption>{_text_of(block.title)}</figcaption></figure>\n" if picture else ""
    if isinstance(block, Code): return f"<pre>{_text_of(block.text, keep=chr(10) + chr(9))}</pre>\n"
    return f"<p>{_text_of(block)}</p>\n"


def report(
    run: Run,  # The run to tell of
    space: Workspace,  # Its workspace
    kind: str = "html",  # html or md
) -> str:
    "The whole report as text"
    title, content = f"Run {run.id}", list(parts(run, space))
    return as_markdown(title, content) if kind == "md" else as_html(title, content)
