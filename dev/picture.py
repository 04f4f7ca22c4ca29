"""Draws nbs/overview.svg, the picture of the front page: python dev/picture.py"""
from __future__ import annotations

import argparse
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "nbs" / "overview.svg"
WIDTH, HEIGHT = 960, 400

STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #24323a; font-size: 14.5px; }
.small { font-size: 12.5px; fill: #5b6b74; }
.mono { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12.5px; }
.card { fill: #fbfaf6; }
.box { fill: #fff; stroke: #b9c4c9; stroke-width: 1.3; }
.store { fill: #eaf3f6; stroke: #6fa3b5; stroke-width: 1.3; }
.train { fill: #fff4da; stroke: #d9a93a; stroke-width: 1.3; }
.line { fill: none; stroke: #7d8d95; stroke-width: 1.6; marker-end: url(#tip); }
.read { stroke-dasharray: 4 4; } .tip { fill: #7d8d95; } .curve { fill: none; stroke: #d98a1f; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e3e9ec; } .small { fill: #a4b2b9; } .card { fill: #20272b; } .box { fill: #2b3439; stroke: #56656d; }
  .store { fill: #1f3640; stroke: #4c8296; } .train { fill: #3d3420; stroke: #b08a35; }
}
"""


def box(x: int, y: int, w: int, h: int, title: str, lines: tuple[str, ...] = (), kind: str = "box",
        mono: bool = True) -> str:
    "A rounded box with a title and smaller lines under it, all centred"
    top = y + h / 2 + 5 - 9 * len(lines)
    text = [f'<text x="{x + w / 2}" y="{top:g}" text-anchor="middle" font-weight="600">{title}</text>']
    text += [f'<text class="small{" mono" if mono else ""}" x="{x + w / 2}" y="{top + 19 * (i + 1):g}" '
             f'text-anchor="middle">{line}</text>'
             for i, line in enumerate(lines)]
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="9"/>' + "".join(text)


def arrow(path: str, label: str = "", at: tuple[int, int] = (0, 0), read: bool = False) -> str:
    said = f'<text class="small" x="{at[0]}" y="{at[1]}" text-anchor="middle">{label}</text>' if label else ""
    return f'<path class="line{" read" if read else ""}" d="{path}"/>{said}'


def draw() -> str:
    "Text becomes tokens, a worker trains, two folders keep everything, and the views only read"
    loss = " ".join(f"{568 + 2.6 * i:.1f},{110 - 46 * 2.718 ** (-i / 8) + (i * 7919 % 5 - 2) * .7:.1f}"
                    for i in range(36))
    parts = [
        box(30, 40, 120, 84, "your text", ("txt · jsonl", "parquet · hub")),
        box(196, 40, 120, 84, "tokens", ("tokenizer.json", "data/")),
        box(362, 40, 130, 84, "model", ("gpt2 · qwen3", "configs/*.toml")),
        '<rect class="train" x="538" y="26" width="150" height="112" rx="9"/>',
        '<text x="613" y="50" text-anchor="middle" font-weight="600">trainer</text>',
        f'<polyline class="curve" points="{loss}"/>',
        '<text class="small" x="613" y="129" text-anchor="middle">in the background</text>',
        arrow("M150 82 H192"), arrow("M316 82 H358"), arrow("M492 82 H534"),
        box(360, 214, 220, 76, "runs/quiet-otter-3fa9/", ("state.json · metrics.jsonl",), "store"),
        box(630, 214, 286, 76, "checkpoints/quiet-otter-3fa9/", ("model.safetensors · manifest.json",), "store"),
        arrow("M590 138 C590 180 480 170 475 210", "events", (500, 172)),
        arrow("M640 138 C642 180 765 170 770 210", "verified saves", (772, 172)),
        arrow("M890 214 C925 110 800 82 692 82", "resume, bit for bit", (842, 84)),
        box(60, 326, 116, 52, "terminal", ("status · logs",)), box(196, 326, 116, 52, "full screen", ("watch",)),
        box(332, 326, 116, 52, "notebook", ("watch(run)",)),
        arrow("M390 290 C370 306 140 296 122 322", read=True), arrow("M420 290 C410 308 275 300 258 322", read=True),
        arrow("M450 290 C446 304 396 304 392 322", read=True),
        '<text class="small" x="190" y="280" text-anchor="middle">views only read files:</text>',
        '<text class="small" x="190" y="297" text-anchor="middle">close them, training goes on</text>',
        box(546, 326, 130, 52, "generate", ("text that it wrote",), mono=False),
        box(692, 326, 240, 52, "Hugging Face, llama.cpp", ("the folder as it is",), mono=False),
        arrow("M720 290 C712 308 622 300 614 322"), arrow("M800 290 C804 302 810 306 812 322"),
    ]
    tip = ('<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
           '<path class="tip" d="M0 0L8 4L0 8z"/></marker>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="How a text '
            f'becomes a model">'
            f"<style>{STYLE}</style><defs>{tip}</defs><rect class=\"card\" width=\"{WIDTH}\" height=\"{HEIGHT}\" "
            f"rx=\"14\"/>"
            + "\n".join(parts) + "</svg>\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    OUT.write_text(draw(), encoding="utf-8")
