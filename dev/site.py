"""Builds the documentation site with pip only: notebooks staged by nbdev, rendered by smalldocs.

`python dev/site.py [FOLDER]` writes `_docs/` (or FOLDER), a folder of static files that works under any path and asks
the network for nothing. Whatever of nbdev and smalldocs isn't their public face is called here and nowhere else.
"""
from __future__ import annotations

import argparse
import ast
import html
import importlib
import inspect
import itertools
import json
import os
import posixpath
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]


def source_name(path: str) -> str:
    "`05_transformer.ipynb` → `transformer.ipynb`: chapters lose their number, tutorials keep it"
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
        short = cell.source.count("\n") <= SHORT or re.search(r"^class \w+\(Group\)", cell.source, re.M)
        cell.source = f'#| code-fold: {"false" if short else "true"}\n#| code-summary: "Source"\n{cell.source}'


def say_once(nb) -> None:
    "The names of an export in the order of its source, then the source; above an open one no signature, which it shows"
    named = ((re.search(r"show_doc\((\w+)\)", cell.source or ""), cell) for cell in nb.cells
             if cell.cell_type == "code")
    documents = {found[1]: cell for found, cell in named if found}
    for source in [c for c in nb.cells if (c.source or "").startswith("#| code-fold")]:
        defined = re.findall(r"^(?:async )?(?:def|class) (\w+)", source.source, re.M)
        docs = [documents[name] for name in defined if name in documents]
        nb.cells[:] = [c for c in nb.cells if all(c is not doc for doc in docs)]
        at = next(i for i, c in enumerate(nb.cells) if c is source)
        nb.cells[at:at] = docs
        for out in (out for doc in docs for out in doc.outputs):
            text = "".join(out["data"]["text/markdown"]).removeprefix("---\n\n")
            if source.source.startswith("#| code-fold: false"):
                text = re.sub(r"```python\n.*?\n```\n*", "", text, count=1, flags=re.S)
            out["data"]["text/markdown"] = text


@lru_cache
def lines_of(path: str) -> dict[str, int]:
    "Where each name of a module is defined: `Run.status` → its line"
    found = {}
    for thing in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if not isinstance(thing, ast.FunctionDef | ast.ClassDef): continue
        found[thing.name] = thing.lineno
        for part in thing.body if isinstance(thing, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef): found[f"{thing.name}.{part.name}"] = part.lineno
    return found


def link_source(text: str) -> str:
    "nbdev's `source` links don't know their line; it is the one where the name that is explained is defined"
    def line(match):
        found = lines_of(match[1]).get(match[3])
        return f"{match[1]}{f'#L{found}' if found else ''}{match[2]}"
    return re.sub(r"(?<=blob/main/)(llm_trainer/[\w/]+\.py)#LNone(.*?\n#+ ([\w.]+))", line, text, flags=re.S)


def parameters(module: str, name: str) -> str:
    "The documented parameters of a function, or of a class's __init__, as a table; nothing where none is documented"
    from fastcore.docments import docments
    try:
        thing = getattr(importlib.import_module(f"llm_trainer.{module}"), name)
        rows = docments(thing.__init__ if inspect.isclass(thing) else thing, full=True,
                        returns=not inspect.isclass(thing))
    except (AttributeError, TypeError, OSError, ValueError): return ""
    rows = {name: row for name, row in rows.items() if name != "self" and row.docment}
    if not rows: return ""
    def code(text): return f"`{text}`".replace("|", r"\|") if text else ""
    def kind(row): return "" if row.anno is inspect.Parameter.empty else code(
            getattr(row.anno, "__name__", "") if inspect.isclass(row.anno) and "[" not in str(row.anno)
            else str(row.anno))
    def start(row):  # a function by its name: the address that repr gives is another in each build
        shown = row.default.__name__ if inspect.isfunction(row.default) else repr(row.default)
        return "" if row.default is inspect.Parameter.empty or name == "return" else code(shown[:40])
    def words(row): return " ".join(str(row.docment).split()).replace("|", r"\|")
    said = [f"| {'*returns*' if name == 'return' else code(name)} | {kind(row)} | "
            f"{'' if name == 'return' else start(row)} | {words(row)} |" for name, row in rows.items()]
    return "\n".join(["::: {.parameters}", "| parameter | type | default | what it is |", "|---|---|---|---|", *said,
                      ":::"])


def tabulate(nb, module: str | None) -> None:
    "Under each name that a page explains: where its source is, and its parameters as a table"
    for cell in nb.cells:
        found = re.search(r"show_doc\((\w+)\)", cell.source or "") if cell.cell_type == "code" else None
        for out in cell.outputs if found else ():
            text = "".join(out.get("data", {}).get("text/markdown", ""))
            if text: out["data"]["text/markdown"] = link_source(text) + "\n\n" + parameters(module, found[1]) + "\n"


def describe(cell, before: str) -> None:
    "What a picture shows, for readers who can't see it: the words in its code, else the sentence above it"
    if cell.cell_type != "code" or "fig-alt" in cell.source: return
    if not any("image/png" in out.get("data", {}) for out in cell.get("outputs", [])): return
    def said(name): return re.findall(r"(?<![a-z])" + name + r"""\(?\s*=?\s*f?["']([^"'{]{2,80})""", cell.source)
    x, y, title = (said(name)[:1] for name in ("xlabel", "ylabel", "title"))
    words = f"{y[0]} against {x[0]}" if x and y else (x or y or [""])[0]
    label = list(dict.fromkeys(text.strip(": ") for text in said("label") if len(text.strip(": ")) > 3
                               and "=" not in text))
    sentence = re.split(r"(?<=[.:])\s", " ".join(re.sub(r"[#*`|$\[\]]|\(\S+\)", "", before).split()))[-1:]
    whole = "; ".join(filter(None, [*title, words, ", ".join(label)])) or (sentence or [""])[0].rstrip(":")
    cell.source = f"#| fig-alt: {json.dumps(f'Plot: {whole}'[:200], ensure_ascii=False)}\n{cell.source}"


def name_pictures(nb) -> None:
    before = ""
    for cell in nb.cells:
        if cell.cell_type == "markdown": before = cell.source
        else: describe(cell, before)


@lru_cache
def shell():
    "The shell in which `show_doc` runs: one for all notebooks, as making one takes long"
    from nbdev import processors
    made = processors.CaptureShell()
    made.run_cell("from nbdev.showdoc import show_doc")
    return made


def process(nb) -> None:
    "Run nbdev's page processors over one notebook, in place"
    from nbdev import processors

    class FromPackage(processors.exec_show_docs):
        "Documents what the exported module holds, instead of running the notebook's cells once more"
        def begin(self):
            self.k = shell()
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
    tabulate(nb, module)
    say_once(nb)
    name_pictures(nb)


def relink(text: str, page: str, site: str) -> str:
    "Links of `page` to other notebooks and to the published site become links from this site's root"
    def fix(match):
        path = posixpath.normpath(posixpath.join("/", posixpath.dirname(page), match.group(1)))
        return f"](/{source_name(path[1:])}.ipynb"
    return re.sub(r"\]\(([^)\s:#]+)\.(?:ipynb|html)\b", fix, text.replace(f"]({site}/", "](/"))


def name_self() -> None:
    "traitlets imports the `Self` of its annotations for type checkers only; the inspect of Python 3.11.2 looks it up"
    import typing

    import traitlets.traitlets
    vars(traitlets.traitlets).setdefault("Self", typing.Self)


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
    name_self()
    for name in notebooks():
        target = folder / source_name(name)
        if target.exists():
            raise SystemExit(f"{name} would replace another page called {target.stem}: rename one of the notebooks")
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
            page.html, page.env["math"] = re.sub(r"<table.*?</table>", label, MATHS.sub(maths, page.html),
                                                 flags=re.S), False

    site = Book(load(folder), quiet=True)
    count = site.build()
    for css in (out / "site_libs" / "themes").glob("*.css"):
        css.write_text(re.sub(r'@import\s+url\([^)]*\)\s*;', "", css.read_text(encoding="utf-8")), encoding="utf-8")
    for copy in [*out.rglob("*.llms.md"), out / "llms.txt"]:  # under the names that nbdev's `Docs:` lines give
        text = copy.read_text(encoding="utf-8").replace(".llms.md", ".html.md")
        copy.rename(copy.with_name(copy.name.replace(".llms.md", ".html.md"))).write_text(text, encoding="utf-8")
    (out / ".nojekyll").touch()
    finish(folder, out)
    print(f"wrote {count} pages; look at them: python -m http.server -d {os.path.relpath(out)}")
    return [w for w in site.warnings if "output-file" not in w]


SKIP = '<a class="skip-link" href="#quarto-document-content">Skip to the text</a>'


def finish(folder: Path, out: Path) -> None:
    "What smalldocs leaves open: a way past the menus without a mouse, a search that works from a folder, llms.txt"
    index = (out / "search.json").read_text(encoding="utf-8")
    (out / "site_libs" / "search-index.js").write_text(SEARCH % index.replace("</", "<\\/"), encoding="utf-8")
    for path in out.rglob("*.html"):
        text, up = path.read_text(encoding="utf-8"), "../" * len(path.relative_to(out).parts[:-1])
        text = re.sub(r"(<body[^>]*>)", r"\1" + SKIP, text, count=1)
        text = text.replace(f'<script src="{up}site_libs/smalldocs.js"',
                            f'<script src="{up}site_libs/search-index.js" defer></script>'
                            f'<script src="{up}site_libs/smalldocs.js"', 1)
        path.write_text(text, encoding="utf-8")
    settings = yaml.safe_load((folder / "_quarto.yml").read_text(encoding="utf-8"))
    (out / "llms.txt").write_text(llms(folder, settings["website"]["sidebar"]["contents"]), encoding="utf-8")


# A browser fetches nothing for a page that it read from a folder, so there the index comes as a script.
SEARCH = """if (location.protocol === "file:") {
  const index = %s;
  const ask = window.fetch;
  window.fetch = (what, ...more) => String(what).endsWith("search.json")
    ? Promise.resolve(new Response(JSON.stringify(index))) : ask(what, ...more);
}
"""


def about(page: Path) -> tuple[str, str]:
    "Title and one-sentence summary of a staged page"
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        front = yaml.safe_load(text.split("---")[1])
        return front["title"], front.get("description", "")
    starts = (re.match(r"---\n(.*?)\n---", "".join(cell["source"]), re.S) for cell in json.loads(text)["cells"])
    front = next(filter(None, starts), None)
    said = yaml.safe_load(front[1]) if front else {}
    return said.get("title", page.stem), said.get("description", "")


def llms(folder: Path, contents: list) -> str:
    "llms.txt: every page in reading order, with what it is about"
    lines = ["# llm_trainer", "", "> Train a GPT-style Transformer on your own machine: detached runs, honest status, "
                                  "exact resume, "
             "verified checkpoints", ""]
    for entry in contents:
        pages_of = entry["contents"] if isinstance(entry, dict) else [entry]
        lines += [f"## {entry['section'] if isinstance(entry, dict) else 'Begin here'}", ""]
        for name in pages_of:
            title, words = about(folder / name)
            lines.append(f"- [{title}]({re.sub(r'[.](ipynb|md)$', '', name)}.html.md){f': {words}' if words else ''}")
        lines.append("")
    return "\n".join(lines)


def quicken() -> None:
    "Without these, half of a build goes into reading pyproject.toml, naming CSS classes and loading a grammar"
    import nbdev.config
    import smalldocs.highlight

    nbdev.config._load_toml = lru_cache(nbdev.config._load_toml)
    smalldocs.highlight.css_class = lru_cache(smalldocs.highlight.css_class)
    # nbformat loads jsonschema, that this: seconds, and no address is checked here
    sys.modules["rfc3987_syntax"] = None


def main(out: Path) -> int:
    quicken()
    folder = out.with_name("_proc")
    stage(folder, out)
    warnings = render(folder, out)
    for warning in warnings: print(f"warning: {warning}", file=sys.stderr)
    return 1 if any("broken link" in w for w in warnings) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_docs",
                        help="where the site goes (default: _docs)")
    sys.exit(main(parser.parse_args().folder.resolve()))
