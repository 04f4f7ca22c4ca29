"""From `llm-trainer resume` to the first resumed step, beside the bare import of torch; one JSON object.

    python bench/resume.py [--config quickstart] [--repeats 3]

Real processes in a workspace of their own, the data prepared by the run that is resumed.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from llm_trainer import workspace
from llm_trainer.runs import run as runs

LIMIT_SECONDS, LIMIT_RATIO = 5.0, 2.0
STEPS = 2  # of each attempt


def cli(space: workspace.Workspace, *argv) -> float:
    "When the process began, by the clock on the wall"
    began = time.time()
    environment = {**os.environ, "LLM_TRAINER_HOME": str(space.root)}
    done = subprocess.run([sys.executable, "-m", "llm_trainer", *map(str, argv)], env=environment, capture_output=True,
                          text=True)
    if done.returncode: sys.exit(f"llm-trainer {' '.join(map(str, argv))} ended with {done.returncode}:\n{done.stderr}")
    return began


def measure(config: str = "quickstart", repeats: int = 3) -> dict:
    with tempfile.TemporaryDirectory() as root:
        space = workspace.init(root)
        cli(space, "train", "--config", config, "--name", "bench", "--max-steps", STEPS, "--log-every", 1,
            "--eval-batches", 1)
        run, took, bare = runs.find_run(space.runs, "bench"), [], []
        for attempt in range(2, repeats + 2):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch"], check=True)
            bare.append(time.perf_counter() - began)
            began = cli(space, "resume", "bench", "--max-steps", attempt * STEPS)
            first = next(m for m in run.metrics("train") if m["attempt"] == attempt)
            took.append(first["time"] - began)
        step = run.state().tokens_per_second
    seconds, ratio = statistics.median(took), statistics.median(t / b for t, b in zip(took, bare))
    return dict(config=config, repeats=repeats, seconds_to_first_step=round(seconds, 2), slowest=round(max(took), 2),
                torch_import_seconds=round(statistics.median(bare), 2), ratio=round(ratio, 2), tokens_per_second=step,
                within_limits=seconds <= LIMIT_SECONDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--repeats", type=int, default=3)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=1))
