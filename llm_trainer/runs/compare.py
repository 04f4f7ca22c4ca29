"""Two or more runs side by side: their figures, where their settings differ, and their curves. Knows no screen."""
from __future__ import annotations

from typing import Any

from llm_trainer.runs.charts import Curve
from llm_trainer.runs.curves import Clock
from llm_trainer.runs.run import Run

LETTERS = "ABCDEFGH"
FIGURES = ("loss", "val_loss", "best_val_loss", "step", "epoch", "tokens", "elapsed_seconds", "tokens_per_second")


def curve(
    rows: list[dict],  # Metrics of one kind, by step
    name: str,  # What is drawn: loss, lr, …
    label: str,
    x: str = "step",  # step, tokens, or time: seconds of training
    marks: bool = False,  # Each point is shown
    tag: str = "",  # A letter at its end
) -> Curve:
    "One column of a run's metrics as a curve"
    clock = Clock()
    xs = [clock(row) for row in rows] if x == "time" else [row.get(x) for row in rows]
    return Curve(label, xs, [row.get(name) for row in rows], marks, tag)


def different(runs: list[Run]) -> dict[str, list]:  # Setting → its value in each run
    "The settings in which runs differ"
    each = [run.settings() for run in runs]
    names = dict.fromkeys(name for settings in each for name in settings)
    return {name: [settings.get(name) for settings in each] for name in names
            if len({repr(settings.get(name)) for settings in each}) > 1}


def same_tokens(runs: list[Run]) -> bool:
    "Are losses per token of these runs comparable? Only with one tokenizer"
    return len({str(run.meta.get("tokenizer_hash")) for run in runs}) == 1


def compare(
    runs: list[Run],
    x: str = "step",  # What the curves are drawn against: step, tokens or time
) -> dict[str, Any]:  # runs, figures, settings, measure, curves
    "Runs side by side; `measure` is what may be compared: loss, or bits_per_byte where their tokenizers differ"
    for run in runs: run.require("metrics.jsonl")
    states, vals = [run.status() for run in runs], [run.metrics("val") for run in runs]
    figures: dict[str, list] = {"status": [state.status for state in states]}
    figures |= {name: [None if state.status == "unknown" else getattr(state, name) for state in states]
                for name in FIGURES}
    for name in ("perplexity", "bits_per_byte"): figures[name] = [rows[-1].get(name) if rows else None for rows in vals]
    figures["parameters"] = [run.meta.get("parameters") for run in runs]
    measure = "loss" if same_tokens(runs) else "bits_per_byte"
    curves = [curve(rows, measure, run.id, x, len(rows) < 3, tag) for run, rows, tag in zip(runs, vals, LETTERS)]
    return {"runs": [run.id for run in runs], "figures": figures, "measure": measure, "curves": curves,
            "settings": different(runs)}
