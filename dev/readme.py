"""Writes README.md from nbs/index.ipynb: its prose and code, with links that are right at the repository's root."""
from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


SITE = "https://llm-trainer.github.io/llm_trainer/"
HERE = {"commands": "llm_trainer/cli/commands.py", "configuration": "nbs/00_config.ipynb",
        "reliability": "RELIABILITY.md",
        "benchmarks": "bench/results.md", "changelog": "CHANGELOG.md"}  # what a page of the site is made from


def relink(text: str) -> str:
    "Links to notebooks are right from the root; links to pages of the site lead to what those are made from"
    text = re.sub(r"\]\((?=[^)\s:]+\))", "](nbs/", text)
    return re.sub(rf"\]\({SITE}(\w+)\.html[^)]*\)", lambda m: f"]({HERE[m[1]]})" if m[1] in HERE else m[0], text)


def shown(cell: dict) -> list[str]:
    "What a cell of the notebook shows: its picture, kept as a file beside the others, or its value"
    parts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        if png := data.get("image/png"):
            path = ROOT / "nbs" / "images" / f"index-{cell['id']}.png"
            path.write_bytes(base64.b64decode(png))
            parts.append(f"![What the code above draws](nbs/images/{path.name})")
        elif text := "".join(data.get("text/plain", [])): parts.append(f"```text\n{text}\n```")
    return parts


def readme() -> str:
    "The text of README.md"
    parts = []
    for cell in json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown": parts.append(relink(source))
        elif not source.startswith("#| hide"): parts += [f"```python\n{source}\n```", *shown(cell)]
    return "<!-- made from nbs/index.ipynb by make readme -->\n\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when README.md is old")
    asked, path, text = parser.parse_args(), ROOT / "README.md", readme()
    if asked.check: sys.exit(path.read_text(encoding="utf-8") != text and "README.md is old: make readme")
    path.write_text(text, encoding="utf-8")
