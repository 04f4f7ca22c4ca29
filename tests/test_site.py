"""The site: built from the notebooks with pip only, whole, and asking the network for nothing."""
import ast
import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from llm_trainer.cli.commands import front
from llm_trainer.config import all_settings, profiles

ROOT = Path(__file__).parent.parent
SITE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Documentation"]
pytest.importorskip("smalldocs", reason="the site needs: pip install 'llm_trainer[docs]'")
pytestmark = pytest.mark.xdist_group("site")


class Page(HTMLParser):
    "Links, resources and ids of one page"
    def __init__(self, text):
        super().__init__()
        self.links, self.resources, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag == "link" and attrs.get("href") and attrs.get("rel") != "canonical": self.resources.append(attrs["href"])
        if tag in ("script", "img", "iframe", "source") and attrs.get("src"): self.resources.append(attrs["src"])


@pytest.fixture(scope="module")
def pages(site): return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def target(page: Path, link: str, site: Path) -> Path | None:
    "The file that a link inside the site means, None for a link that leaves it"
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return None
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    assert site in (path, *path.parents), f"{page.name}: {link} leaves the folder, so it breaks under a sub-path"
    return path / "index.html" if path.is_dir() else path


@pytest.mark.parametrize("asked, code", [("--help", 0), ("--no-such-flag", 2)])
@pytest.mark.parametrize("script", ["check_export", "picture", "readme", "site"])
def test_a_script_that_is_asked_for_help_or_nonsense_makes_nothing(script, asked, code, tmp_path):
    def made(): return {path: path.stat().st_mtime_ns for path in [ROOT / "README.md", *(ROOT / "nbs").rglob("*.*")]}
    before = made()
    done = subprocess.run([sys.executable, ROOT / "dev" / f"{script}.py", asked], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == code and "usage" in done.stdout + done.stderr
    assert made() == before and not any(tmp_path.iterdir())


def test_every_notebook_has_a_page(site):
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in notebook.parts: continue
        chapter = notebook.parent.name == "nbs"
        name = re.sub(r"^\d+[a-z]?_", "", notebook.stem) if chapter else f"tutorials/{notebook.stem}"
        assert (site / f"{name}.html").is_file(), notebook


def test_every_internal_link_and_anchor_resolves(site, pages):
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            found = target(path, link, site)
            if found is None: continue
            fragment = unquote(urlsplit(link).fragment)
            if not found.is_file(): wrong.append(f"{path.name}: {link}")
            elif fragment and found.suffix == ".html" and fragment not in pages[found].ids:
                wrong.append(f"{path.name}: no anchor {link}")
    assert not wrong


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for path, page in pages.items():
        for link in page.resources:
            found = None if link.startswith("data:") else target(path, link, site)
            assert link.startswith("data:") or (found and found.is_file()), f"{path.name}: {link}"
    for css in site.rglob("*.css"):
        urls = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", css.read_text(encoding="utf-8"))
        assert not [u for pair in urls for u in pair if re.match(r"(https?:)?//", u)], css


def test_the_docs_line_of_each_module_leads_to_its_page(site):
    "`help(llm_trainer.model.transformer)` ends with an address: a page of this site, or its Markdown copy"
    found = {}
    for path in (ROOT / "llm_trainer").rglob("*.py"):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for link in re.findall(r"^Docs: (\S+)", said, re.M):
            found[path.stem] = link.removeprefix(SITE).lstrip("/") or "index.html"
    assert len(found) > 20 and not [f"{module}: {page}" for module, page in found.items()
                                    if not (site / page).is_file()]
    assert "](transformer.html.md)" in (site / "llms.txt").read_text(encoding="utf-8")


def test_chapters_keep_their_opening_and_their_source(site):
    text = (site / "transformer.html").read_text(encoding="utf-8")
    assert "letters mean the same sizes" in re.sub(r"\s+", " ", text)
    assert "scaled_dot_product_attention" in text and "Export -" not in text
    assert text.index('id="embedding"') < text.index('id="gpt2"')  # names in the order of their source


def test_maths_needs_no_script(site, pages):
    assert "<math" in (site / "transformer.html").read_text(encoding="utf-8")
    assert not any("katex" in link.lower() for page in pages.values() for link in page.resources)


def test_every_command_and_flag_is_explained(site):
    text = (site / "commands.html").read_text(encoding="utf-8")
    for name, command in front.commands.items():
        assert f'id="{name}"' in text, name
        for flag in command.flags.values():
            if flag.positional: assert f"<code>{flag.placeholder()}</code>" in text, f"{name} {flag.placeholder()}"
            elif not flag.hidden and not flag.note: assert flag.spelling in text, f"{name} {flag.spelling}"


def test_the_settings_named_at_a_command_are_its_flags(site):
    text = (site / "commands.html").read_text(encoding="utf-8")
    about = {re.match("[^>]*>([^<]*)", part)[1]: part for part in text.split("<h3")}
    assert "Every setting" in about["train"] and "Every setting" not in about["resume"]
    for flag in front.commands["resume"].flags.values():
        assert not flag.note or flag.hidden or f"--{flag.name}" in about["resume"]
    assert "--n_layer" not in about["resume"]


def test_the_dashes_of_a_flag_stay_two(site):
    for path in site.rglob("*.html"):
        assert not re.findall(r".{20}–[a-z][\w-]*", path.read_text(encoding="utf-8")), path.name


def test_every_setting_and_profile_is_explained(site):
    text = (site / "configuration.html").read_text(encoding="utf-8")
    for knob in all_settings().values(): assert f"<code>{knob.name}</code>" in text, knob.name
    for name in profiles(ROOT / "configs"): assert f'id="{name}"' in text, name


def test_search_knows_the_functions(site):
    entries = json.loads((site / "search.json").read_text(encoding="utf-8"))
    assert any("generate" in (e["title"] + e["section"]).lower() for e in entries)
    wanted = {"index.html", "transformer.html", "commands.html", "configuration.html"}
    assert {e["href"].split("#")[0] for e in entries} >= wanted


def test_sidebar_lists_every_page(site, pages):
    listed = {target(site / "index.html", link, site) for link in pages[site / "index.html"].links}
    assert set(pages) <= listed


def test_saved_outputs_stay_small():
    "The repository stays below 5 MB: no notebook outweighs a chapter with its pictures, and no output is an error"
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts: continue
        assert path.stat().st_size < 300_000, path
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not [out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"], path


def test_readme_is_made_from_the_index():
    assert subprocess.run([sys.executable, ROOT / "dev" / "readme.py", "--check"]).returncode == 0


def test_readme_links_exist():
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        if not urlsplit(link).scheme: assert (ROOT / link.split("#")[0]).exists(), link


def test_the_picture_is_the_one_its_program_draws(tmp_path):
    sys.path.insert(0, str(ROOT / "dev"))
    try: import picture
    finally: sys.path.pop(0)
    assert picture.draw() == (ROOT / "nbs" / "overview.svg").read_text(encoding="utf-8")


def test_every_export_says_what_it_is_and_what_it_takes():
    wrong = []
    for path in (ROOT / "llm_trainer").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "AUTOGENERATED" not in text: continue
        lines = text.splitlines()
        for thing in ast.parse(text).body:
            if not isinstance(thing, (ast.FunctionDef, ast.ClassDef)) or thing.name.startswith("_"): continue
            said = ast.get_docstring(thing) or ""
            if not said: wrong.append(f"{path.stem}.{thing.name}")
            own = [thing] if isinstance(thing, ast.FunctionDef) else thing.body
            for call in [f for f in own if f is thing or getattr(f, "name", "") == "__init__"]:
                for arg in (*call.args.posonlyargs, *call.args.args, *call.args.kwonlyargs):
                    explained = "#" in lines[arg.end_lineno - 1][arg.end_col_offset:] or f"`{arg.arg}`" in said
                    if arg.arg not in ("self", "cls") and not explained:
                        wrong.append(f"{path.stem}.{thing.name}({arg.arg})")
    assert not wrong


def test_each_source_link_has_its_line_and_each_picture_its_words(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "#LNone" not in text, path.name
        assert not [image for image in re.findall(r"<img[^>]*>", text) if not re.search(r'alt="[^"]', image)], path.name


def test_each_setting_has_an_address(site, pages):
    assert set(all_settings()) <= pages[site / "configuration.html"].ids


def test_the_map_for_machines_goes_in_reading_order(site):
    listed = re.findall(r"^- \[[^]]*\]\((\S+?)\.html\.md\): \S", (site / "llms.txt").read_text(encoding="utf-8"), re.M)
    order = [listed.index(name) for name in ("config", "tokenizer", "transformer", "trainer", "recipe")]
    assert order == sorted(order)
    assert listed[0] == "index"
    assert {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")} == set(listed)
