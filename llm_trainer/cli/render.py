"""How runs look in a terminal: the status card, the table, plain progress lines. Reads dictionaries, knows no files."""
from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from datetime import datetime

from llm_trainer.cli.parser import coloured
from llm_trainer.runs.state import (
    ENDED, HEARD, STATES, State, devices_of, is_elsewhere, look_of, slowest_of, unheard)
from llm_trainer.terminal import clean, count, duration, fixed, inert, number, quoted, size, sparkline

ANSI = {"success": 32, "primary": 34, "secondary": 36, "warning": 33, "error": 31}
ENDED_BADLY = tuple(name for name in ENDED if STATES[name].colour == "error")

HELPS = {
    "oom": "fewer sequences at once, the same tokens a step: llm-trainer train {config}--batch-size {half} "
           "--grad-accum-steps {double}",
    "disk_full": "make room, then: llm-trainer resume {id}",
    "data": "look at the message, mend the text, then: llm-trainer resume {id}",
    "non_finite": "the best checkpoint, a lower learning rate: llm-trainer resume {id} --checkpoint best --lr {lower}",
    "damaged": "see what is whole: llm-trainer verify {id}   then: llm-trainer resume {id}",
    "crashed": "nothing saved is lost: llm-trainer resume {id}",
    "stalled": "see what it does: llm-trainer logs {id}   or end it: llm-trainer stop {id} --now",
    "held": "a process of it still holds its lock; end it on {host}: llm-trainer stop {id} --now",
    "silent": "nothing is heard of {host}; if that machine is gone: llm-trainer resume {id}",
}


def unicode_ok() -> bool:
    "Whether standard output can show more than ASCII"
    return "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()


def paint(text: str, code: int) -> str:
    "`text` in an ANSI colour where the terminal wants colour"
    return f"\x1b[{code}m{text}\x1b[0m" if coloured() else text


def as_json(value, indent: int | None = 2) -> str:
    "`value` as JSON text; numbers that JSON can't hold become null"
    def finite(v):
        if is_dataclass(v): return finite(asdict(v))
        if isinstance(v, float): return v if v - v == 0 else None
        if isinstance(v, dict): return {str(k): finite(x) for k, x in v.items()}
        return [finite(x) for x in v] if isinstance(v, (list, tuple)) else v
    return inert(json.dumps(finite(value), indent=indent, ensure_ascii=False, default=str))


def say(*lines: str):
    "Print lines whose text may come from data: cleaned of control bytes, colours of our own kept out of it"
    print(*(clean(line) for line in lines), sep="\n", flush=True)


def facts(found: dict) -> str:
    "Names and values, one line each"
    def value(v): return fixed(v, 4, ",") if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
    return "\n".join(f"  {name.replace('_', ' '):<20} {value(v)}" for name, v in found.items())


def badge(status: str, phase: str | None = None) -> str:
    "`● running · training`"
    look = look_of(status)
    word = clean(status, "") + (f" · {clean(phase, '')}" if phase and status in ("running", "stalled") else "")
    return paint(f"{look.sign if unicode_ok() else look.ascii} {word if unicode_ok() else word.replace('·', '-')}",
                 ANSI[look.colour])


def bar(share: float, width: int = 32) -> str:
    "A progress bar of `width` columns"
    full, empty = ("━", "─") if unicode_ok() else ("#", ".")
    n = round(max(0.0, min(1.0, share)) * width)
    return paint(full * n, 32) + empty * (width - n)


def share(state: State) -> float | None:
    "How much of the run is done, 0 to 1; None while its length is unknown"
    return state.step / state.steps if state.steps and state.step is not None else None


def _age(moment) -> str:
    "How long ago `moment` (seconds, or ISO 8601) was"
    if moment is None: return "–"
    if isinstance(moment, str):
        try: moment = datetime.fromisoformat(moment).timestamp()
        except ValueError: return "–"
    return f"{duration(max(0.0, time.time() - moment))} ago"


def _pairs(state: State, process_state: str | None) -> Iterable[tuple[str, str]]:
    "The lines of the card, as (label, text); what is not known is left out"
    alive = state.status in ("queued", "running", "stalled")
    if state.loss is not None:
        curve = sparkline(state.loss_history or [], 24) if unicode_ok() else ""
        yield "loss", f"{number(state.loss)}   {curve}".rstrip()
    if state.val_loss is not None:
        yield "validation", f"{number(state.val_loss)} · best {number(state.best_val_loss)}"
    if state.tokens_per_second is not None:
        yield "speed", f"{count(state.tokens_per_second)} tokens/s · {count(state.tokens)} tokens so far"
    if state.elapsed_seconds is not None:
        left = f" · about {duration(state.eta_seconds)} left" if alive and state.eta_seconds is not None else ""
        yield "time", f"{duration(state.elapsed_seconds)} elapsed{left}"
    if state.device:
        yield "device", str(state.device) + (f" · {size(state.memory_bytes)} used" if state.memory_bytes else "")
    if devices := devices_of(state): yield "devices", devices
    if slowest := slowest_of(state): yield "", slowest
    if state.pid and (alive or state.status == "crashed"):
        how = process_state or ("" if alive else "gone")
        beat = f"sign of life {_age(state.heartbeat)}" if alive and state.heartbeat else ""
        yield "process", " · ".join(filter(None, [f"pid {state.pid} on {state.host}", how, beat]))
    if state.waiting_for: yield "waits for", ", ".join(map(str, state.waiting_for))
    if state.skipped: yield "skipped", f"{state.skipped:,} steps that were not finite"
    if state.write_errors: yield "disk", f"{state.write_errors:,} writes to the run folder failed"
    if state.checkpoint_step is not None: yield "checkpoint", f"step {state.checkpoint_step:,}"
    if state.attempt and state.attempt != 1: yield "attempt", str(state.attempt)


def position(state: State) -> str:
    "`step 4,700 of 10,000 · epoch 1.41 of 3`"
    def of(total): return f" of {total:,.10g}" if isinstance(total, int) else f" of {total:.2f}" if total else ""
    if state.status == "unknown": return ""
    parts = [f"step {state.step:,}{of(state.steps)}"] if state.step is not None else []
    if state.epoch is not None: parts.append(f"epoch {state.epoch:.2f}{of(state.epochs)}")
    return " · ".join(parts)


def helps(state: State, meta: dict) -> str | None:
    "The command that helps a run which failed, crashed or stalled"
    status, code = state.status, (state.reason or {}).get("code")
    if status not in (*ENDED_BADLY, "stalled") and code != "damaged": return None
    key = status if status in ("crashed", "stalled") else "non_finite" if status == "diverged" else code
    if is_elsewhere(state) and unheard(state) > HEARD:
        key = "held" if state.locked else "silent" if status == "stalled" else key
    def of(record, name, kind, default):
        return found if isinstance(found := record.get(name), kind) and found else default
    training, argv = of(of(meta, "config", dict, {}), "training", dict, {}), of(meta, "argv", list, [])
    config = next((f"--config {quoted(str(a))} " for flag, a in zip(argv, argv[1:]) if flag == "--config"), "")
    batch, accumulate = of(training, "batch_size", int, 2), of(training, "grad_accum_steps", int, 1)
    lr = of(training, "lr", float, 1e-3)
    return HELPS.get(key, "llm-trainer logs {id}   then: llm-trainer resume {id}").format(
        id=state.run_id, config=config, half=max(1, batch // 2), double=accumulate * 2, lower=f"{lr / 2:g}",
        host=state.host)


def card(state: State, meta: dict = {}, log: list[str] = [], process_state: str | None = None, notes: str = "") -> str:
    "The status of one run, readable at a glance; `log` is shown under a run that ended badly"
    lines = [f"{badge(state.status or '?', state.phase)}   {paint(clean(state.run_id, ''), 1)}"]
    done = share(state)
    if done is not None: lines.append(f"  {bar(done)} {done:4.0%}   {clean(position(state), '')}")
    elif position(state): lines.append(f"  {clean(position(state), '')}")
    lines += [f"  {label:<11} {clean(text, '')}" for label, text in _pairs(state, process_state)]
    said = [clean(text, "") for text in notes.splitlines() if text.strip()][-5:]
    lines += [f"  {'note' if i == 0 else '':<11} {text}" for i, text in enumerate(said)]
    reason = state.reason or {}
    if reason.get("message") or reason.get("code"):
        words = clean(reason.get("message") or "").splitlines() or [""]
        code = f"{clean(reason['code'], '')}: " if reason.get("code") else ""
        lines += [f"  {'reason':<11} {code}{words[0]}", *(f"  {'':<11} {w}" for w in words[1:])]
    if log and state.status in (*ENDED_BADLY, "stalled"):
        lines += ["", "  the end of its log:", *(f"    {clean(line, '')}" for line in log)]
    if help_ := helps(state, meta): lines += ["", f"  what helps: {clean(help_, '')}"]
    return "\n".join(lines)


def line(state: State) -> str:
    "One plain line of progress, for logs, pipes and `status --watch`"
    parts = [position(state)]
    if state.loss is not None: parts.append(f"loss {number(state.loss)}")
    if state.val_loss is not None: parts.append(f"val {number(state.val_loss)}")
    if state.tokens_per_second: parts.append(f"{count(state.tokens_per_second)} tok/s")
    running = state.status in ("running", "stalled")
    if running and state.eta_seconds is not None: parts.append(f"{duration(state.eta_seconds)} left")
    head = f"{datetime.now():%H:%M:%S} {badge(state.status or '?', state.phase)}"
    return f"{head}  {clean(' · '.join(filter(None, parts)), '')}"


COLUMNS = ("RUN", "STATUS", "STEP", "EPOCH", "LOSS", "VAL", "TOK/S", "ETA", "AGE", "CURVE")


def table(states: list[State]) -> str:
    "The table of runs, one line each"
    rows = []
    for s in states:
        running, known = s.status in ("running", "stalled"), s.status != "unknown"
        percent = f" {share(s):.0%}" if running and share(s) is not None else ""
        rows.append([clean(s.run_id, ""), badge(s.status or "?", s.phase),
                     f"{count(s.step)}{percent}" if known else "–", f"{s.epoch:.2f}" if known else "–",
                     number(s.loss, 3), number(s.val_loss, 3),
                     count(s.tokens_per_second) if s.tokens_per_second else "–",
                     duration(s.eta_seconds) if running else "–",
                     _age(s.created_at).removesuffix(" ago"),
                     sparkline(s.loss_history or [], 12) if unicode_ok() else ""])
    rows = [list(COLUMNS), *rows]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else _width(rows)
    for name in ("EPOCH", "AGE", "TOK/S", "CURVE", "ETA", "VAL"):  # what a narrow terminal does without
        if _width(rows) <= room: break
        at = rows[0].index(name)
        rows = [row[:at] + row[at + 1:] for row in rows]
    widest, over = max(len(row[0]) for row in rows), max(0, _width(rows) - room)
    most, dots = max(8, widest - over), "…" if unicode_ok() else "~"  # the beginning of an id names it, too
    return columns([[row[0] if len(row[0]) <= most else row[0][:most - 1] + dots, *row[1:]] for row in rows])


def _width(rows: list[list[str]]) -> int:
    return sum(max(len(clean(row[i], "")) for row in rows) + 2 for i in range(len(rows[0]))) - 2


def columns(rows: list[list[str]]) -> str:
    "Rows in aligned columns; the first row is the heading"
    def bare(cell): return clean(cell, "")  # colours take no room
    widths = [max(len(bare(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell + " " * (w - len(bare(cell))) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([paint(lines[0], 1), *lines[1:]])


def paint_curve(text: str, i: int) -> str:
    "What belongs to curve `i` of a picture, in its colour"
    return paint(text, (34, 33, 32, 35)[i % 4])


def side_by_side(found: dict) -> str:
    "What `runs.compare` found of some runs, a column each"
    def figure(name: str, v) -> str:
        if v is None: return "–"
        if name == "elapsed_seconds": return duration(v)
        if name in ("tokens", "parameters", "tokens_per_second"): return count(float(v) if isinstance(v, float) else v)
        if isinstance(v, float): return number(v, 2 if name in ("epoch", "perplexity") else 4)
        return f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else clean(str(v), "")[:40]
    def setting(v) -> str: return figure("", str(v) if isinstance(v, float) else v)
    rows = [["", *(f"{letter} {clean(run, '')}" for letter, run in zip("ABCDEFGH", found["runs"]))]]
    rows += [[name.replace("_", " "), *(figure(name, v) for v in values)]
             for name, values in found["figures"].items() if any(v is not None for v in values)]
    if not found["settings"]: return columns(rows) + "\n\nNo setting differs."
    rows += [[""] * len(rows[0]), ["Settings that differ", *[""] * len(found["runs"])]]
    return columns([*rows, *([clean(name, "")[:40], *map(setting, values)]
                             for name, values in found["settings"].items())])


def csv(rows: list[dict]) -> str:
    "Records as CSV, one column for every key that occurs"
    import csv as writer
    import io
    rows = [{clean(name, ""): clean(value, "") if isinstance(value, str | dict | list) else value for name,
             value in row.items()}
            for row in rows]
    out, names = io.StringIO(), list(dict.fromkeys(k for row in rows for k in row))
    w = writer.DictWriter(out, names, lineterminator="\n")
    w.writeheader()
    w.writerows(rows)
    return out.getvalue().rstrip("\n")
