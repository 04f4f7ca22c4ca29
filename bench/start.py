"""From the command to the first step, and on to a loss: a run in a new workspace with nothing compiled, and again.

    python bench/start.py [--config tiny] [--copy FILE …] [--loss X] [--runs 2] [flags of `llm-trainer train` …]

`--copy` puts files into the workspace's data/ first. The tokens are prepared before the clock starts; what PyTorch
compiles is kept in the workspace, so the first run is the cold one and the others are warm. For each it gives the
seconds from the command to the first step, to the first validation loss of at most `--loss` and to the end, and the
milliseconds of a step in the middle of the run. Prints one JSON object.

    python bench/start.py --config shakespeare-char --copy tinyshakespeare.txt --loss 1.466
    python bench/start.py --config gpt2-124m --dataset python-code --vocab-size 16384 --max-steps 20 --eval-every 0
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from llm_trainer import workspace
from llm_trainer.config import all_settings


def of_data(flags: list[str]) -> list[str]:
    "Those that `prepare` knows too, with their values"
    chosen, kept = False, []
    for word in flags:
        if word.startswith("--"):
            knob = all_settings().get(word[2:].partition("=")[0].replace("-", "_"))
            chosen = bool(knob) and knob.group == "data"
        if chosen: kept.append(word)
    return kept


def command(*words: str) -> list[str]: return [sys.executable, "-m", "llm_trainer", *words]


def seconds_of(record: dict, began: float) -> float:
    "When a line of the metrics was written, from the start of the command on"
    at = record["time"]
    at = at if isinstance(at, (int, float)) else datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp()
    return round(at - began, 1)


def told(rows: list[dict], began: float, loss: float) -> dict:
    "What the metrics of a run say about it"
    train, val = ([row for row in rows if row["kind"] == kind] for kind in ("train", "val"))
    middle = train[len(train) // 4:]
    steps = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in zip(middle, middle[1:])
             if isinstance(a["time"], (int, float)) and b["step"] > a["step"]]
    reached = [seconds_of(row, began) for row in val if row["loss"] is not None and row["loss"] <= loss]
    losses = [row["loss"] for row in val if row["loss"] is not None]
    return dict(first_logged_step=train[0]["step"], first_logged_step_s=seconds_of(train[0], began),
                best=min(losses, default=None),
                reached_s=min(reached, default=None), step_ms=round(1e3 * statistics.median(steps), 2) if steps
                else None)


def run(name: str, space: workspace.Workspace, env: dict, flags: list[str], loss: float) -> dict:
    "One run, watched from outside"
    began = time.time()
    done = subprocess.run(command("train", "--name", name, *flags), env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    ended = round(time.time() - began, 1)
    if done.returncode: sys.exit(done.stdout[-3000:])
    rows = [json.loads(line) for line in (space.runs / name / "metrics.jsonl").read_text().splitlines()]
    return told(rows, began, loss) | dict(ended_s=ended)


def measure(config: str, copy: list[Path], loss: float, runs: int, flags: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        space = workspace.init(Path(folder))
        for file in copy: shutil.copy(file, space.data)
        env = {**os.environ, "LLM_TRAINER_HOME": folder}
        env.pop("TORCHINDUCTOR_CACHE_DIR", None)
        subprocess.run(command("prepare", "--config", config, *of_data(flags)), env=env, check=True,
                       stdout=subprocess.DEVNULL)
        flags = ["--config", config, *flags]
        return {f"{'warm' if i else 'cold'}{i or ''}": run(f"run-{i}", space, env, flags, loss) for i in range(runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--copy", type=Path, nargs="*", default=[])
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=2)
    args, flags = parser.parse_known_args()
    print(json.dumps(measure(args.config, args.copy, args.loss, args.runs, flags)))


if __name__ == "__main__": main()
