"""Pictures for the README and the site, of the watcher and of the notebook's view: `tests/make_pictures.py [notebook]`.

The watcher's are the screens that the tests compare, without the web fonts that Rich's SVG asks the network for. The
notebook's are taken where the test of a newcomer in JupyterLab ends, a run of its own; it needs a Chromium."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN = ["runs", "running", "compare", "samples", "checkpoints", "resume", "start", "generate"]
FONT = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace'


def picture(svg: str) -> str:
    "The same picture with the reader's own fonts, and plain spaces"
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    svg = re.sub(r"font-family: (?:Fira Code|arial)[^;]*;", f"font-family: {FONT};", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    # Rich cuts the last line short
    svg = re.sub(r'(-clip-terminal">\s*<rect x="0" y="0" width="[\d.]+" height=")([\d.]+)',
                 lambda found: f"{found[1]}{float(found[2]) + 4:.1f}", svg)
    return re.sub(r"[ \t]+\n", "\n", svg.replace("&#160;", "\u00a0"))


def notebook(folder: Path) -> None:
    "The view of a run, light and dark"
    story = ROOT / "tests" / "test_browser.py"
    subprocess.run([sys.executable, "-m", "pytest", f"{story}::test_a_newcomer_watches_a_model_learn"], check=True,
                   env={**os.environ, "SCREENSHOTS": str(folder)})
    (folder / "lab.png").unlink()
    for theme in "light", "dark": assert (folder / f"notebook-{theme}.png").stat().st_size < 150_000


def main() -> None:
    folder = ROOT / "nbs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[1:] == ["notebook"]: return notebook(folder)
    for name in SHOWN:
        svg = picture((ROOT / "tests" / "__snapshots__" / "test_tui" / f"test_picture[{name}].svg").read_text())
        assert "http" not in svg.replace("http://www.w3.org/", "") and len(svg.encode()) < 60_000, name
        (folder / f"tui-{name}.svg").write_text(svg)


if __name__ == "__main__": main()
