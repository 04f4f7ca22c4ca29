"""Writes README.md from nbs/index.ipynb: its prose and code, with links that are right at the repository's root."""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "The text of README.md"
    parts = []
    for cell in json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown": parts.append(re.sub(r"\]\((?=[^)\s:]+\))", "](nbs/", source))
        elif not source.startswith("#| hide"): parts.append(f"```python\n{source}\n```")
    return "<!-- made from nbs/index.ipynb by make readme -->\n\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    path, text = ROOT / "README.md", readme()
    if "--check" in sys.argv: sys.exit(path.read_text(encoding="utf-8") != text and "README.md is old: make readme")
    path.write_text(text, encoding="utf-8")
