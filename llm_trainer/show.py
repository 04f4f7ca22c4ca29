"""How runs look in a terminal: the status card, the table, plain progress lines. Reads dictionaries, knows no files."""
from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable
from datetime import datetime

from llm_trainer.frontend import coloured
from llm_trainer.terminal import clean, count, duration, size, sparkline

# status → (symbol, ASCII symbol, ANSI colour); the word is always printed beside it, so colour is never alone
LOOK = {"queued": ("◷", "o", 36), "running": ("▶", ">", 32), "completed": ("✓", "+", 32), "stopped": ("■", "#", 33),
        "failed": ("✗", "x", 31), "diverged": ("✗", "x", 31), "crashed": ("✗", "x", 31), "stalled": ("!", "!", 33)}
ENDED_BADLY = ("failed", "diverged", "crashed")

HELPS = {
    "oom": "fewer sequences at once, the same tokens a step: llm-trainer train {config}--batch-size {half} "
           "--grad-accum-steps {double}",
    "disk_full": "make room, then: llm-trainer resume {id}",
    "data": "look at the message, mend the text, then: llm-trainer resume {id}",
    "non_finite": "the best checkpoint, a lower learning rate: llm-trainer resume {id} --checkpoint best --lr {lower}",
    "crashed": "nothing saved is lost: llm-trainer resume {id}",
    "stalled": "see what it does: llm-trainer logs {id}   or end it: llm-trainer stop {id} --now",
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
        if isinstance(v, float): return v if v - v == 0 else None
        if isinstance(v, dict): return {str(k): finite(x) for k, x in v.items()}
        return [finite(x) for x in v] if isinstance(v, (list, tuple)) else v
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


def say(*lines: str):
    "Print lines whose text may come from data: cleaned of control bytes, colours of our own kept out of it"
    print(*(clean(line) for line in lines), sep="\n", flush=True)


def facts(found: dict) -> str:
    "Names and values, one line each"
    value = lambda v: f"{v:,.4f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
    return "\n".join(f"  {name.replace('_', ' '):<20} {value(v)}" for name, v in found.items())


def badge(status: str, phase: str | None = None) -> str:
    "`▶ running · training`"
    symbol, plain, colour = LOOK.get(status, ("?", "?", 35))
    word = clean(status, "") + (f" · {clean(phase, '')}" if phase and status in ("running", "stalled") else "")
    return paint(f"{symbol if unicode_ok() else plain} {word if unicode_ok() else word.replace('·', '-')}", colour)


def bar(share: float, width: int = 32) -> str:
    "A progress bar of `width` columns"
    full, empty = ("━", "─") if unicode_ok() else ("#", ".")
    n = round(max(0.0, min(1.0, share)) * width)
    return paint(full * n, 32) + empty * (width - n)


def share(state: dict) -> float | None:
    "How much of the run is done, 0 to 1; None while its length is unknown"
    return state["step"] / state["steps"] if state.get("steps") and state.get("step") is not None else None


def number(value, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else "–"


def _age(moment) -> str:
    "How long ago `moment` (seconds, or ISO 8601) was"
    if moment is None: return "–"
    if isinstance(moment, str):
        try: moment = datetime.fromisoformat(moment).timestamp()
        except ValueError: return "–"
    return f"{duration(max(0.0, time.time() - moment))} ago"


def _pairs(state: dict) -> Iterable[tuple[str, str]]:
    "The lines of the card, as (label, text); what is not known is left out"
    get = state.get
    alive = get("status") in ("queued", "running", "stalled")
    if get("loss") is not None:
        curve = sparkline(get("loss_history") or [], 24) if unicode_ok() else ""
        yield "loss", f"{number(get('loss'))}   {curve}".rstrip()
    if get("val_loss") is not None:
        yield "validation", f"{number(get('val_loss'))} · best {number(get('best_val_loss'))}"
    if get("tokens_per_second") is not None:
        yield "speed", f"{count(round(get('tokens_per_second')))} tokens/s · {count(get('tokens'))} tokens so far"
    if get("elapsed_seconds") is not None:
        left = f" · about {duration(get('eta_seconds'))} left" if alive and get("eta_seconds") is not None else ""
        yield "time", f"{duration(get('elapsed_seconds'))} elapsed{left}"
    if get("device"):
        yield "device", str(get("device")) + (f" · {size(get('memory_bytes'))} used" if get("memory_bytes") else "")
    if get("pid") and (alive or get("status") == "crashed"):
        how = get("process_state") or ("" if alive else "gone")
        beat = f"sign of life {_age(get('heartbeat'))}" if alive and get("heartbeat") else ""
        yield "process", " · ".join(filter(None, [f"pid {get('pid')} on {get('host')}", how, beat]))
    if get("waiting_for"): yield "waits for", ", ".join(map(str, get("waiting_for")))
    if get("skipped"): yield "skipped", f"{get('skipped'):,} steps that were not finite"
    if get("write_errors"): yield "disk", f"{get('write_errors'):,} writes to the run folder failed"
    if get("checkpoint_step") is not None: yield "checkpoint", f"step {get('checkpoint_step'):,}"
    if get("attempt") and get("attempt") != 1: yield "attempt", str(get("attempt"))


def position(state: dict) -> str:
    "`step 4,700 of 10,000 · epoch 1.41 of 3`"
    of = lambda total: f" of {total:,.10g}" if isinstance(total, int) else f" of {total:.2f}" if total else ""
    parts = [f"step {state['step']:,}{of(state.get('steps'))}"] if state.get("step") is not None else []
    if state.get("epoch") is not None: parts.append(f"epoch {state['epoch']:.2f}{of(state.get('epochs'))}")
    return " · ".join(parts)


def helps(state: dict, meta: dict) -> str | None:
    "The command that helps a run which failed, crashed or stalled"
    status, code = state.get("status"), (state.get("reason") or {}).get("code")
    if status not in (*ENDED_BADLY, "stalled"): return None
    key = status if status in ("crashed", "stalled") else "non_finite" if status == "diverged" else code
    training = ((meta.get("config") or {}).get("training") or {})
    config = next((f"--config {a} " for flag, a in zip(meta.get("argv") or [], (meta.get("argv") or [])[1:])
                   if flag == "--config"), "")
    batch, accumulate = training.get("batch_size") or 2, training.get("grad_accum_steps") or 1
    lr = training.get("lr") or 1e-3
    return HELPS.get(key, "llm-trainer logs {id}   then: llm-trainer resume {id}").format(
        id=state.get("run_id"), config=config, half=max(1, batch // 2), double=accumulate * 2, lower=f"{lr / 2:g}")


def card(state: dict, meta: dict = {}, log: list[str] = []) -> str:
    "The status of one run, readable at a glance; `log` is shown under a run that ended badly"
    lines = [f"{badge(state.get('status') or '?', state.get('phase'))}   {paint(clean(state.get('run_id'), ''), 1)}"]
    done = share(state)
    if done is not None: lines.append(f"  {bar(done)} {done:4.0%}   {clean(position(state), '')}")
    elif position(state): lines.append(f"  {clean(position(state), '')}")
    lines += [f"  {label:<11} {clean(text, '')}" for label, text in _pairs(state)]
    reason = state.get("reason") or {}
    if reason.get("message") or reason.get("code"):
        words = clean(reason.get("message") or "").splitlines() or [""]
        code = f"{clean(reason['code'], '')}: " if reason.get("code") else ""
        lines += [f"  {'reason':<11} {code}{words[0]}", *(f"  {'':<11} {w}" for w in words[1:])]
    if log and state.get("status") in (*ENDED_BADLY, "stalled"):
        lines += ["", "  the end of its log:", *(f"    {clean(line, '')}" for line in log)]
    if help_ := helps(state, meta): lines += ["", f"  what helps: {clean(help_, '')}"]
    return "\n".join(lines)


def line(state: dict) -> str:
    "One plain line of progress, for logs, pipes and `status --watch`"
    parts = [position(state)]
    if state.get("loss") is not None: parts.append(f"loss {number(state['loss'])}")
    if state.get("val_loss") is not None: parts.append(f"val {number(state['val_loss'])}")
    if state.get("tokens_per_second"): parts.append(f"{count(round(state['tokens_per_second']))} tok/s")
    running = state.get("status") in ("running", "stalled")
    if running and state.get("eta_seconds") is not None: parts.append(f"{duration(state['eta_seconds'])} left")
    head = f"{datetime.now():%H:%M:%S} {badge(state.get('status') or '?', state.get('phase'))}"
    return f"{head}  {clean(' · '.join(filter(None, parts)), '')}"


COLUMNS = ("RUN", "STATUS", "STEP", "EPOCH", "LOSS", "VAL", "TOK/S", "ETA", "AGE", "CURVE")


def table(states: list[dict]) -> str:
    "The table of runs, one line each"
    rows = []
    for s in states:
        running = s.get("status") in ("running", "stalled")
        percent = f" {share(s):.0%}" if running and share(s) is not None else ""
        rows.append([clean(s.get("run_id"), ""), badge(s.get("status") or "?", s.get("phase")),
                     f"{count(s.get('step'))}{percent}", number(s.get("epoch"), 2), number(s.get("loss"), 3),
                     number(s.get("val_loss"), 3),
                     count(round(s["tokens_per_second"])) if s.get("tokens_per_second") else "–",
                     duration(s.get("eta_seconds")) if running else "–",
                     _age(s.get("created_at")).removesuffix(" ago"),
                     sparkline(s.get("loss_history") or [], 12) if unicode_ok() else ""])
    rows = [list(COLUMNS), *rows]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else _width(rows)
    for name in ("EPOCH", "AGE", "TOK/S", "CURVE", "ETA", "VAL"):  # what a narrow terminal does without
        if _width(rows) <= room: break
        at = rows[0].index(name)
        rows = [row[:at] + row[at + 1:] for row in rows]
    most = max(8, max(len(row[0]) for row in rows) - max(0, _width(rows) - room))  # the beginning of an id names it, too
    return columns([[row[0] if len(row[0]) <= most else row[0][:most - 1] + ("…" if unicode_ok() else "~"), *row[1:]]
                    for row in rows])


def _width(rows: list[list[str]]) -> int:
    return sum(max(len(clean(row[i], "")) for row in rows) + 2 for i in range(len(rows[0]))) - 2


def columns(rows: list[list[str]]) -> str:
    "Rows in aligned columns; the first row is the heading"
    bare = lambda cell: clean(cell, "")  # colours take no room
    widths = [max(len(bare(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell + " " * (w - len(bare(cell))) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([paint(lines[0], 1), *lines[1:]])


def csv(rows: list[dict]) -> str:
    "Records as CSV, one column for every key that occurs"
    import csv as writer
    import io
    out, names = io.StringIO(), list(dict.fromkeys(k for row in rows for k in row))
    w = writer.DictWriter(out, names, lineterminator="\n")
    w.writeheader()
    w.writerows(rows)
    return out.getvalue().rstrip("\n")
