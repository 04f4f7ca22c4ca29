"""Fail when an exported module differs from its notebook: exports into a copy and compares."""
import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

argparse.ArgumentParser(description=__doc__).parse_args()
root = Path(__file__).resolve().parent.parent
with tempfile.TemporaryDirectory() as tmp:
    copy = Path(tmp) / root.name
    copy.mkdir()
    for name in ("nbs", "llm_trainer"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", copy)
    subprocess.run(["nbdev-export"], cwd=copy, check=True)
    modules = sorted(p.relative_to(copy) for p in copy.glob("llm_trainer/**/*.py"))
    stale = [str(m) for m in modules if not (root / m).exists() or not filecmp.cmp(root / m, copy / m, shallow=False)]
if stale: sys.exit(f"These modules differ from their notebooks: {', '.join(stale)}\nBring them together: make export")
print(f"{len(modules)} modules equal their notebooks")
