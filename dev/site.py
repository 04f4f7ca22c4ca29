"""Builds the documentation site with pip only: notebooks staged by nbdev, rendered by smalldocs.

`python dev/site.py [FOLDER]` writes `_docs/` (or FOLDER), a folder of static files that works under any path and asks the network for
nothing. Everything of nbdev and smalldocs that is not their public face is called here and nowhere else.
"""
from __future__ import annotations

import html
import itertools
import os
import posixpath
import re
import shutil
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]


def source_name(path: str) -> str:
    "`tutorials/02_reading.ipynb` → `tutorials/02_reading.ipynb`; `05_model.ipynb` → `model.ipynb`: chapters lose their number"
    return re.sub(r"^\d+[a-z]?_", "", path)


def notebooks() -> list[str]:
    "Every notebook of the site, relative to nbs/, in reading order"
    return sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb")
                  if not any(part[0] in "._" for part in p.relative_to(NBS).parts))


# Staging: nbdev's processors, with the source of each export kept under its name

SHORT = 30  # lines of source that stay open on a page; a longer cell shows its signature and folds away


def tidy(nb) -> None:
    "Drop what has a meaning in a notebook only: the heading of its last cell, output that shows nothing"
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = re.sub(r"\n*^## Export -\s*\Z", "", cell.source, flags=re.M)
        for out in list(cell.get("outputs", [])):
            if not re.sub(r"\x1b\[[\d;]*\w|\s", "", "".join(out.get("text", "shown"))): cell.outputs.remove(out)


def split_opening(nb) -> None:
    "Move what follows the title and its `>` summary into a cell of its own: nbdev drops the rest of that cell"
    from fastcore.nbio import mk_cell
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "markdown" or not cell.source.startswith("# "): continue
        title, rest = re.match(r"(# [^\n]*\n+(?:>[^\n]*\n)*)(.*)", cell.source + "\n", re.S).groups()
        if rest.strip():
            cell.source = title
            nb.cells.insert(i + 1, mk_cell(rest.strip(), "markdown"))
        return


def keep_source(nb) -> None:
    "Turn `#| export` into `#| exports` where the cell defines something, so that the chapter shows it"
    for cell in nb.cells:
        if cell.cell_type == "code" and re.search(r"^(class|def|async def) ", cell.source, re.M):
            cell.source = re.sub(r"^#\|\s*export\s*$", "#| exports", cell.source, count=1, flags=re.M)


def fold(cell) -> None:
    "Show the source of an export as it is when it is short or a table of settings, folded when it is long"
    if cell.cell_type == "code" and "exports" in cell.directives_:
        shown = "false" if cell.source.count("\n") <= SHORT or re.search(r"^class \w+\(Group\)", cell.source, re.M) else "true"
        cell.source = f'#| code-fold: {shown}\n#| code-summary: "Source"\n{cell.source}'


def say_once(nb) -> None:
    "All names of an export in the order of its source, then the source; no signature above an open one, which shows the same"
    named = ((re.search(r"show_doc\((\w+)\)", cell.source or ""), cell) for cell in nb.cells if cell.cell_type == "code")
    documents = {found[1]: cell for found, cell in named if found}
    for source in [c for c in nb.cells if (c.source or "").startswith("#| code-fold")]:
        defined = re.findall(r"^(?:async )?(?:def|class) (\w+)", source.source, re.M)
        docs = [documents[name] for name in defined if name in documents]
        nb.cells[:] = [c for c in nb.cells if all(c is not doc for doc in docs)]
        at = next(i for i, c in enumerate(nb.cells) if c is source)
        nb.cells[at:at] = docs
        for out in (out for doc in docs for out in doc.outputs):
            text = "".join(out["data"]["text/markdown"]).removeprefix("---\n\n")
            if source.source.startswith("#| code-fold: false"): text = re.sub(r"```python\n.*?\n```\n*", "", text, count=1, flags=re.S)
            out["data"]["text/markdown"] = text


def process(nb) -> None:
    "Run nbdev's page processors over one notebook, in place"
    from nbdev import processors

    class FromPackage(processors.exec_show_docs):
        "Documents what the exported module holds, instead of running the notebook's cells once more"
        def begin(self):
            super().begin()
            self.k.run_cell(f"import llm_trainer.{module} as module; globals().update(vars(module))" if module else "")

        def __call__(self, cell):
            if re.search(r"^show_doc\(", cell.source or "", re.M): super().__call__(cell)

    replaced = {processors.add_fold: fold, processors.exec_show_docs: FromPackage}

    class Chapter(processors.FilterDefaults):
        def base_procs(self):
            return [replaced.get(p, p) for p in super().base_procs()]

    module = processors._default_exp(nb)
    tidy(nb)
    split_opening(nb)
    keep_source(nb)
    Chapter()(nb)
    say_once(nb)


def relink(text: str, page: str, site: str) -> str:
    "Links of `page` to other notebooks and to the published site become links from this site's root"
    def fix(match):
        path = posixpath.normpath(posixpath.join("/", posixpath.dirname(page), match.group(1)))
        return f"](/{source_name(path[1:])}.ipynb"
    return re.sub(r"\]\(([^)\s:#]+)\.(?:ipynb|html)\b", fix, text.replace(f"]({site}/", "](/"))


def stage(folder: Path, out: Path) -> None:
    "Fill `folder` with what smalldocs reads: processed notebooks without their numbers, generated pages, settings"
    from fastcore.nbio import read_nb, write_nb
    from nbdev.config import get_config

    import pages

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cfg = get_config(ROOT)
    site = f"{cfg.doc_host}{cfg.doc_baseurl}".rstrip("/")
    os.environ["IN_TEST"] = "1"
    for name in notebooks():
        target = folder / source_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        nb = read_nb(NBS / name)
        process(nb)
        write_nb(nb, target)
        target.write_text(relink(target.read_text(encoding="utf-8"), name, site), encoding="utf-8")
    for path in NBS.rglob("*"):
        if path.suffix not in (".css", ".svg", ".png"): continue
        (folder / path.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / path.relative_to(NBS))
    extra = pages.write(folder)
    settings = yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    settings["project"]["output-dir"] = str(out)
    settings.pop("metadata-files")
    settings["website"]["sidebar"] = sidebar(extra)
    for entry in settings["website"]["navbar"]["left"]: entry["href"] = source_name(entry["href"])
    (folder / "_quarto.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def sidebar(extra: list[dict]) -> dict:
    "nbs/sidebar.yml with its patterns written out and the generated pages after them"
    entries = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    for section in entries["contents"]:
        if not isinstance(section, dict): continue
        section["contents"] = [source_name(p.relative_to(NBS).as_posix())
                               for each in section["contents"] for p in sorted(NBS.glob(each["auto"]))]
    return {"style": "floating", "contents": [*entries["contents"], *extra]}


# Rendering: smalldocs, with maths as MathML and no outside fonts

MATHS = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)


def maths(match: re.Match) -> str:
    "TeX → MathML, which browsers draw without a script"
    from latex2mathml.converter import convert
    kind, tex = match.group(1), html.unescape(match.group(2))
    return f'<span class="math {kind}">{convert(tex, display="block" if kind == "display" else "inline")}</span>'


def label(match: re.Match) -> str:
    "Each cell of a table knows its column's name, for screens too narrow for columns"
    table = match.group()
    names = [html.escape(re.sub(r"<[^>]*>", "", name)) for name in re.findall(r"<th\b[^>]*>(.*?)</th>", table, re.S)]
    cells = itertools.cycle(names)
    return re.sub(r"<td\b", lambda _: f'<td data-label="{next(cells)}"', table) if names else table


def render(folder: Path, out: Path) -> list[str]:
    "Write `out` from the staged `folder`; returns what smalldocs warns about: broken links, unknown settings"
    from smalldocs.config import load
    from smalldocs.site import Site

    class Book(Site):
        def render_page(self, page):
            super().render_page(page)
            page.html, page.env["math"] = re.sub(r"<table.*?</table>", label, MATHS.sub(maths, page.html), flags=re.S), False

    site = Book(load(folder), quiet=True)
    count = site.build()
    for css in (out / "site_libs" / "themes").glob("*.css"):
        css.write_text(re.sub(r'@import\s+url\([^)]*\)\s*;', "", css.read_text(encoding="utf-8")), encoding="utf-8")
    for copy in [*out.rglob("*.llms.md"), out / "llms.txt"]:  # under the names that nbdev's `Docs:` lines give
        text = copy.read_text(encoding="utf-8").replace(".llms.md", ".html.md")
        copy.rename(copy.with_name(copy.name.replace(".llms.md", ".html.md"))).write_text(text, encoding="utf-8")
    (out / ".nojekyll").touch()
    print(f"wrote {count} pages; look at them: python -m http.server -d {os.path.relpath(out)}")
    return [w for w in site.warnings if "output-file" not in w]


def main(out: Path) -> int:
    folder = out.with_name("_proc")
    stage(folder, out)
    warnings = render(folder, out)
    for warning in warnings: print(f"warning: {warning}", file=sys.stderr)
    return 1 if any("broken link" in w for w in warnings) else 0


if __name__ == "__main__": sys.exit(main(Path(*sys.argv[1:2] or [ROOT / "_docs"]).resolve()))
