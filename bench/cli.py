"""Cold start of the commands that are typed all day, as ratios to the bare import of what they need; one JSON object.

    python bench/cli.py [--repeats 15] [--runs 1000]
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llm_trainer import workspace
from llm_trainer.runs import run as runs

BASE = "import llm_trainer.cli.parser, llm_trainer.cli.render, llm_trainer.workspace"
NEEDS = {"--help": BASE, "runs": f"{BASE}, llm_trainer.runs.run, fire", "status": f"{BASE}, llm_trainer.runs.run, fire"}
LIMIT_SECONDS, LIMIT_RATIO = 0.35, 2.0


def seconds(cwd: Path, repeats: int, *programs: list[str]) -> list[float]:
    "Median wall time of fresh interpreters, run in turn so that a busy machine slows all alike"
    times = [[] for _ in programs]
    for _ in range(repeats):
        for argv, taken in zip(programs, times):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *argv], cwd=cwd, check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - begun)
    return [statistics.median(taken) for taken in times]


def loaded(command: str, cwd: Path) -> list[str]:
    "Which of the slow packages the command loads"
    code = (f"import sys; from llm_trainer.cli.commands import main; main([{command!r}])\n"
            "print(*{'torch', 'pydantic', 'numpy', 'rich', 'textual'} & set(sys.modules), file=sys.stderr)")
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True).stderr.split()


def main() -> dict:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--runs", type=int, default=1000, help="run folders in the workspace of the last figure")
    given = options.parse_args()
    found = {"python": sys.version.split()[0], "repeats": given.repeats, "commands": {}}
    with tempfile.TemporaryDirectory() as folder:
        space = workspace.init(folder)
        for i in range(3): runs.create_run(space.runs, {"training": {}}, name=f"run-{i}")
        for command, needs in NEEDS.items():
            took, bare = seconds(space.root, given.repeats, ["-m", "llm_trainer", command], ["-c", needs])
            found["commands"][command] = {
                "seconds": round(took, 4), "bare_import_seconds": round(bare, 4), "ratio": round(took / bare, 3),
                "within_limits": took <= LIMIT_SECONDS and took / bare <= LIMIT_RATIO,
                "loads": loaded(command, space.root)}
        for i in range(3, given.runs): runs.create_run(space.runs, {"training": {}}, name=f"run-{i}")
        took, = seconds(space.root, given.repeats, ["-m", "llm_trainer", "status"])
        found["status_with_many_runs"] = {"runs": given.runs, "seconds": round(took, 4),
                                          "ratio": round(took / found["commands"]["status"]["seconds"], 3)}
    return found


if __name__ == "__main__": print(json.dumps(main(), indent=2))
