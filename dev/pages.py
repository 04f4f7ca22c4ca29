"""The pages of the site that are made from the program itself: commands, settings, evidence, changelog."""
from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path) -> list[dict]:
    "Write the generated pages into `folder`; returns their sections of the sidebar"
    for make in (commands, configuration, reliability, benchmarks, changelog):
        (folder / f"{make.__name__}.md").write_text(make(), encoding="utf-8")
    return [{"section": "Reference", "contents": ["commands.md", "configuration.md"]},
            {"section": "Evidence", "contents": ["reliability.md", "benchmarks.md", "changelog.md"]}]


def page(title: str, summary: str, *parts: str) -> str:
    "A page: title, one-sentence summary, body"
    return "\n\n".join((f'---\ntitle: "{title}"\ndescription: "{summary}"\n---', *(p for p in parts if p))) + "\n"


def cell(text: str) -> str:
    "Text for a table cell: Markdown and HTML in it mean nothing"
    def mark(m): return f"`{m[1]}`" if m[1] else "\\" + m[2]  # --flag would become a dash and a word
    return re.sub(r"(--[a-z][\w-]*)|([\\`*_|<>\[\]$#])", mark, text).replace("\n", " ")


def cards(table: str) -> str:
    "A table whose rows become cards on a narrow screen"
    return f"::: {{.cards}}\n{table}\n:::"


def body(path: Path) -> str:
    "A Markdown file without its title, its tables ready for a narrow screen"
    text = path.read_text(encoding="utf-8") if path.exists() else "*Nothing is recorded yet.*"
    text = re.sub(r"```.*?```|`[^`\n]*`|--[a-z][\w-]*", lambda m: m[0] if m[0][0] == "`" else f"`{m[0]}`", text,
                  flags=re.S) # else a dash
    return re.sub(r"(?:^\|.*\n)+", lambda table: f"::: {{.ledger}}\n{table.group()}:::\n",
                  re.sub(r"\A# .*\n+", "", text), flags=re.M)


# The command line, from the commands themselves

def commands() -> str:
    from llm_trainer.cli.commands import front
    parts = ["Flags may be written `--max-new-tokens 50`, `--max_new_tokens=50` or `--max-new-tokens=50`. A run is "
             "named by "
             "its id or any unique beginning of it; where the run may be left out, the newest is meant. Everything is "
             "checked before anything happens, so a mistyped flag changes nothing."]
    for group, names in front.groups.items():
        parts.append(f"## {group}")
        parts += [command(front, front.commands[name]) for name in names]
    parts.append(EXIT_CODES)
    return page("Command line", "Every command of llm-trainer, with all its flags", *parts)


def command(front, it) -> str:
    "One command: what it does, how it is called, its arguments and flags"
    from llm_trainer.config import all_settings
    summary, _, rest = (it.function.__doc__ or "").partition("\n")
    rest = re.sub(r"`[^`\n]*`|--[a-z][\w-]*", lambda m: m[0] if m[0][0] == "`" else f"`{m[0]}`", inspect.cleandoc(rest))
    parts = [f"### {it.name}", f"{summary}.", rest, f"```bash\n{front.usage(it)}\n```"]
    own = [f for f in it.flags.values() if not f.hidden and not f.note]
    if own:
        def label(f): return f.placeholder().replace("|", r"\|") if f.positional else f.spelling
        rows = [f"| `{label(f)}`{value(f)} | {default(f)} | {cell(f.description)} |" for f in own]
        parts.append(cards("\n".join(["| flag | default | what it is |", "|---|---|---|", *rows])))
    settings = [f.name for f in it.flags.values() if f.note and not f.hidden]
    where = "[configuration](configuration.md)"
    if len(settings) == len(all_settings()):
        parts.append(f"Every setting of the {where} is a flag too: `--n_layer 4`, `--lr 3e-4`.")
    elif settings:
        names = ", ".join(f"[`--{n}`](configuration.md#{n})" for n in settings)
        parts.append(f"::: {{.flags}}\nSettings of the {where} that are flags here: {names}.\n:::")
    return "\n\n".join(p for p in parts if p)


def value(flag) -> str:
    return "" if flag.positional or flag.is_switch else f" {cell(flag.placeholder())}"


def default(flag) -> str:
    "A default in a table cell; nothing where there is none to tell"
    if flag.default is inspect.Parameter.empty: return "*required*"
    return "" if flag.default is None or flag.default is False or flag.default in ("", [], ()) else f"`{flag.default}`"


EXIT_CODES = """## Exit codes

| code | meaning |
|---:|---|
| 0 | it worked; also when there was nothing to do |
| 1 | the work failed: the run failed or diverged, `verify` found damage |
| 2 | bad usage or configuration: nothing was started or changed |
| 3 | a run, checkpoint or file that was named does not exist |
| 75 | busy: another process owns the run |
| 130, 143 | ended by Ctrl-C, by SIGTERM |"""


# The configuration, from the fields' descriptions and bounds

TABLES = {"model": "The Transformer", "data": "Data and tokenizer", "training": "Training",
          "sampling": "Samples while training"}


def configuration() -> str:
    from llm_trainer.config import profiles, reference
    parts = ["A run is decided by its settings. They come from the defaults below, then from a profile "
             "(`--config NAME` or a TOML file), then from flags; names are unique, so a flag needs no prefix. "
             "The last column says what `resume` does with a new value: *fixed* refuses, *changeable* says what "
             "changes, *cosmetic* does not touch the result."]
    for group, title in TABLES.items():
        parts += [f"## {title}", f"In a profile under `[{group}]`.", cards(anchored(reference(group)))]
    parts += ["## Profiles", "A profile states only what differs from the defaults, and why."]
    for name, path in profiles(None).items():
        parts += [f"### {name}", f"```toml\n{path.read_text(encoding='utf-8').strip()}\n```"]
    return page("Configuration", "Every setting with its default, its bounds and what resume does with it", *parts)


def anchored(table: str) -> str:
    "A table of settings in which each has an address: `configuration.html#n_layer`"
    return re.sub(r"^\| `(\w+)`", r"| []{#\1}`\1`", table, flags=re.M)


# Evidence, from committed tables

def reliability() -> str:
    return page("Reliability", "What was done to break it, how often, and what happened", body(ROOT / "RELIABILITY.md"))


def benchmarks() -> str:
    tables = [body(path) for path in sorted((ROOT / "bench").glob("*.md"))]
    rows = []
    for path in sorted((ROOT / "bench").glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        about = " ".join(said.partition("\n\n")[0].split()).replace("|", r"\|")
        if about: rows.append(f"| `python bench/{path.name}` | {about} |")
    listed = "\n".join(["## Measure it yourself", "", "::: {.ledger}", "| command | what it measures |", "|---|---|",
                        *rows, ":::"])
    return page("Benchmarks", "What was measured, beside what, and how to measure it again", *tables, listed if rows
                else "")


def changelog() -> str:
    return page("Changelog", "What changed, newest first", body(ROOT / "CHANGELOG.md"))
