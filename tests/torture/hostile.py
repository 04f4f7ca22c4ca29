"""Files, names and settings from a stranger.

Nothing in them executes, nothing is allocated on a file's word, nothing leaves its folder, and every refusal is one
of our own messages.
"""
from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import string
import sys
import tarfile
import tempfile
import time
import zipfile
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import torch

from llm_trainer import terminal
from llm_trainer.cli import render as show
from llm_trainer.model.safetensors import read_tensors
from llm_trainer.training.checkpoint import verify
from llm_trainer.config import Config, DataConfig, all_settings, load_config
from llm_trainer.data.sources import open_corpus
from llm_trainer.events import silent
from llm_trainer.errors import LLMTrainerError
from llm_trainer.model.transformer import GPT
from llm_trainer.runs.state import State
from llm_trainer.runs.run import RUN_ID, create_run, find_run, list_runs
from llm_trainer.data.tokenizer import Tokenizer, read_otherwise, train_tokenizer
from llm_trainer.data.pretrained import fetch_model
from llm_trainer.model.gguf import gguf_tokens, special_ids
from llm_trainer.model.huggingface import load_model, plain_config, save_weights, write_config
from llm_trainer.runs.export import model_card, origin

from .battery import cases, kept_folder, trial
from .children import in_child
from .store import small_store

TINY = dict(n_layer=1, n_head=2, n_embd=16, seq_len=16)
_kept: dict[str, Path] = {}


def _pattern() -> Path:
    "One of each file that we load, made once per process: a store, a model folder, a tokenizer, corpora, a profile"
    if "files" in _kept and _kept["files"].exists(): return _kept["files"]
    root = _kept["files"] = kept_folder("torture-files-")
    small_store(root, steps=(10, 20))
    tokenizer = train_tokenizer("bpe", 300, ["a small text about nothing, " * 20])
    config = Config.from_dict({"model": TINY}).model
    (root / "model").mkdir()
    save_weights(GPT(config, tokenizer.vocab_size), root / "model", tokenizer.eot_id)
    tokenizer.save(root / "model")
    corpus = root / "corpus"
    corpus.mkdir()
    documents = [f"Document {i} says something of its own." for i in range(40)]
    (corpus / "a.txt").write_text("\n\n".join(documents))
    (corpus / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    (corpus / "a.json").write_text(json.dumps([{"text": d, "n": {"m": i}} for i, d in enumerate(documents)]))
    (corpus / "a.csv").write_text("id,text\n" + "".join(f'{i},"{d}, ""quoted"""\n' for i, d in enumerate(documents)))
    (corpus / "a.tsv").write_text("id\ttext\n" + "".join(f"{i}\t{d}\n" for i, d in enumerate(documents)))
    (corpus / "a.jsonl.gz").write_bytes(gzip.compress((corpus / "a.jsonl").read_bytes()))
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
    table = pyarrow.table({"text": documents, "doc": [{"n": i} for i in range(40)]})
    pyarrow.parquet.write_table(table, corpus / "a.parquet")
    with pyarrow.ipc.new_stream(str(corpus / "a.arrow"), table.schema) as f: f.write_table(table, 16)
    with pyarrow.ipc.new_file(str(corpus / "a.feather"), table.schema) as f: f.write_table(table, 16)
    with pyarrow.output_stream(str(corpus / "a.txt.zst"), compression="zstd") as f:
        f.write("\n\n".join(documents).encode())
    (corpus / "packed.md").write_bytes((corpus / "a.txt.zst").read_bytes())  # known by its first bytes
    (corpus / "excel.csv").write_text("sep=;\n\n;text;text\n" + "".join(f"{i};{d};\n" for i, d in enumerate(documents)))
    (named := root / "model" / "additional_chat_templates").mkdir()
    (named / "rag.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    for place in "runs", f"data/model-a-b-{'0' * 12}": (root / place).mkdir(parents=True)
    load_model(root / "model")  # what this imports, children needn't
    read_otherwise(root / "model", Tokenizer.load(root / "model"))
    from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer  # noqa: F401
    for kind in "gpt2", "qwen3": plain_config({"model_type": kind})
    (root / "profile.toml").write_text("[model]\nn_layer = 2\n[training]\nlr = 1e-3\n")
    return root


# Bytes that want to run, or to be big ---------------------------------------------------------------------------------

class Bomb:
    "Unpickling it runs a command"
    def __init__(self, sentinel: Path): self.sentinel = sentinel
    def __reduce__(self): return os.system, (f"touch {self.sentinel}",)


def pickles(sentinel: Path) -> dict[str, bytes]:
    "Every way a pickle gets at code, and the containers torch reads them from"
    bomb = Bomb(sentinel)
    found = {f"pickle {p}": pickle.dumps(bomb, protocol=p) for p in range(6)}
    found["global"] = b"cposix\nsystem\n(S'touch %s'\ntR." % str(sentinel).encode()
    found["build"] = (b"\x80\x02ccopyreg\n_reconstructor\n(cbuiltins\nobject\nh\x01NtR}X\x01\x00\x00\x00ac"
                      + found["global"][1:] + b"sb.")
    found["inst"] = b"(S'touch %s'\niposix\nsystem\n." % str(sentinel).encode()
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"model": bomb, "w": torch.ones(2)}, buffer, _use_new_zipfile_serialization=zipped)
        found[f"torch zip {zipped}"] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(found["pickle 2"])
            tar.addfile(info, io.BytesIO(found["pickle 2"]))
    found["legacy tar"] = buffer.getvalue()
    code = f"import os; os.system('touch {sentinel}')".encode()
    npy = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128)
    script = b"#!/bin/sh\ntouch %s\n"
    return {**found, "python": code, "npy": npy + found["pickle 4"], "shebang": script % str(sentinel).encode()}


@lru_cache(maxsize=1)
def bombs() -> dict[str, bytes]:
    "Small files that want to be big"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("data.pkl", bytes(200 << 20))
    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("inner.zip", buffer.getvalue())
    def claim(length, text=b"{}"): return length.to_bytes(8, "little") + text
    def tensor(shape, end):
        return json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    def lie(shape, end): return claim(len(tensor(shape, end)), tensor(shape, end))
    many = json.dumps({f"w{i}": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]} for i in range(100_000)}).encode()
    def config(**more):
        return json.dumps({"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16,
                                            "vocab_size": 300, **more}).encode()
    big = 10**12
    regex = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(a*)*" * 50 + "$"},
                                                    "behavior": "Isolated",
                                                    "invert": False}, {"type": "ByteLevel", "add_prefix_space": False}]}
    model = {"type": "BPE", "vocab": {chr(97 + i): i for i in range(26)}, "merges": []}
    def tokenizer(**more):
        return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "normalizer": None, "pre_tokenizer": regex, "post_processor": None, "decoder": None, "model": model,
                           **more}).encode()
    return {
        "zip bomb": buffer.getvalue(), "nested zip": nested.getvalue(), "header 2^63": claim(2**63),
        "header 2^64-1": claim(2**64 - 1),
        "header to the end": claim(10, b"{" + b" " * 9), "deep list": b"[" * 1_000_000, "deep object": b'{"a":'
        * 200_000, "deep header": claim(500_000, b"[" * 500_000), "huge tensor": lie([10**9, 10**9], 4 * 10**18),
        "huge shape": lie([2**62, 4], 0), "empty huge": lie([0, 2**62], 0), "many dimensions": lie([1] * 100_000, 4),
        "many tensors": claim(len(many), many) + bytes(4),
        "long number": b'{"n_layer": ' + b"9" * 1_000_000 + b"}", "NaN": b'{"step": NaN, "n_embd": Infinity}',
        "empty": b"",
        "zeros": bytes(1 << 20), "noise": random.Random(1).randbytes(1 << 16), "no end": b'{"a": "' + b"x" * (1 << 20),
        "surrogates": b'{"\\ud800": "\\udfff"}', "utf16": '{"a": 1}'.encode("utf-16"), "null name": b'{"\\u0000": 1}',
        "wide": config(n_embd=big, n_head=1), "deep": config(n_layer=big), "long": config(n_positions=big),
        "words": config(vocab_size=big),
        "negative": config(n_layer=-1), "zero": config(n_embd=0), "text": config(n_layer="2"),
        "float": config(n_layer=2.5),
        "remote code": config(auto_map={"AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True),
        "qwen": json.dumps({"model_type": "qwen3", "hidden_size": big, "num_hidden_layers": big}).encode(),
        "shards": json.dumps({"weight_map": {"wte.weight": "../../../../etc/passwd"}}).encode(), "regex": tokenizer(),
        "normalizer": tokenizer(normalizer={"type": "Replace", "pattern": {"Regex": "(a|a)*" * 40}, "content": "aa"
                                            * 1000}),
        "template": tokenizer(chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "id gap": tokenizer(model={**model, "vocab": {"a": 0, "b": 2**31}}),
        "id far": tokenizer(model={**model, "vocab": {"a": 2**62}}),
        "merges": tokenizer(model={**model, "merges": [["zz", "qq"]] * 1000}), "yaml": b"a: &a [x,x]\nb: &b [*a,*a]\n"
        * 1000, "gz of zeros": gzip.compress(bytes(100 << 20)), "gz of letters": gzip.compress(b"a" * (100 << 20)),
        "gz in gz": gzip.compress(
            gzip.compress(bytes(50 << 20))), "huge cell": b'id,text\n1,"' + b"x" * (3 << 20),
        "quotes": b'"' * 1_000_001, "commas": b"," * 1_000_000,
        "many columns": b",".join(b"c%d" % i for i in range(100_000)) + b"\n" + b"," * 99_999 + b"\n",
        "carriage returns": b"a,b\r" * 100_000,
        "list of lists": b"[" + b"[1]," * 200_000 + b"[1]]", "deep row": b'{"text": ' + b'{"a": ' * 900 + b"1" + b"}"
        * 900 + b"}", "toml": b"[" + b"a." * 20_000 + b"b]\n", "toml list": b"n_layer = " + b"[" * 20_000,
    }


TARGETS = {
    "tensors": ("calm-heron-0001/step-00000020/state/optimizer.safetensors", lambda root, path: read_tensors(path)),
    "manifest": ("calm-heron-0001/step-00000020/manifest.json", lambda root, path: verify(path.parent)),
    "index": ("calm-heron-0001/index.json", lambda root, path: small_store(root, steps=()).select("best")),
    "weights": ("model/model.safetensors", lambda root, path: load_model(path.parent)),
    "shards": ("model/model.safetensors.index.json", lambda root, path: load_model(path.parent)),
    "model config": ("model/config.json", lambda root, path: load_model(path.parent)),
    "foreign weights": ("model/pytorch_model.bin", lambda root, path: (path.with_name("model.safetensors").unlink(),
                                                                      load_model(path.parent))),
    "tokenizer": ("model/tokenizer.json", lambda root, path: Tokenizer.load(path.parent).encode("aaaa aaaa " * 500)),
    "tokenizer config": ("model/tokenizer_config.json", lambda root, path: _keep_tokens(path.parent)),
    "special tokens": ("model/special_tokens_map.json", lambda root, path: _keep_tokens(path.parent)),
    "chat template": ("model/chat_template.jinja", lambda root, path: _keep_tokens(path.parent)),
    "named template": ("model/additional_chat_templates/rag.jinja", lambda root, path: _keep_tokens(path.parents[1])),
    "generation config": ("model/generation_config.json", lambda root, path: _keep_tokens(path.parent)),
    "model card": ("model/manifest.json", lambda root, path: model_card("x", path.parent,
                                                                        *origin(path.parent, root / "runs"))),
    "hub record": (f"data/model-a-b-{'0' * 12}/record.json", lambda root,
                   path: fetch_model("a/b", root / "data", offline=True)),
    "text": ("corpus/a.txt", lambda root, path: _read_corpus(path, root)),
    "jsonl": ("corpus/a.jsonl", lambda root, path: _read_corpus(path, root)),
    "parquet": ("corpus/a.parquet", lambda root, path: _read_corpus(path, root)),
    **{kind: (f"corpus/a.{kind}", lambda root, path: _read_corpus(path, root))
       for kind in ("json", "csv", "tsv", "jsonl.gz", "arrow", "feather", "txt.zst")},
    **{name: (f"corpus/{name}", lambda root, path: _read_corpus(path, root)) for name in ("packed.md", "excel.csv")},
    "script": ("corpus/corpus.py", lambda root, path: _read_corpus(path.parent, root)),
    "profile": ("profile.toml", lambda root, path: load_config(str(path), configs=root)),
}


def _keep_tokens(folder: Path) -> None:
    "What a run that begins with a model does with what it says of its tokens"
    tokenizer = Tokenizer.load(folder)
    tokenizer.encode_marked(f"aaaa {tokenizer.ends} {tokenizer.chat_templates}"[:1000])
    read_otherwise(folder, tokenizer)
    tokenizer.save(folder / "again", 16)
    write_config(load_model(folder), folder / "again", ids=tokenizer.ids, generation=tokenizer.generation)
    gguf_tokens(tokenizer, 400), special_ids(tokenizer)


def _read_corpus(path: Path, root: Path) -> None:
    corpus = open_corpus(DataConfig(dataset=str(path)), root / "data", silent)
    for split in ("train", "val"): sum(map(len, corpus.documents(split)))


def _mutate(rng: random.Random, data: bytes) -> bytes:
    "Damage that keeps most of a file: bytes changed, cut, doubled, numbers blown up"
    data = bytearray(data)
    for _ in range(rng.randrange(1, 8)):
        spot, n = rng.randrange(len(data) + 1), rng.randrange(1, 40)
        match rng.randrange(5):
            case 0: data[spot:spot + n] = rng.randbytes(n)
            case 1: del data[spot:spot + n]
            case 2: data[spot:spot] = data[max(0, spot - n):spot]
            case 3: data[spot:spot + 1] = rng.choice([b"9" * 19, b"-1", b"null", b"[]", b'"', b"}", b"\xff\xfe", b"\0",
                                                      b"1e999", b"{"])
            case 4: data = data[:spot] if rng.random() < .2 and spot else data
    return bytes(data)


@trial("T14", goal=6000, slice=56, chunk=56)
@cases
def malicious(case: int) -> str | None:
    """malicious and mutated files (pickles, zips, bombs, lying headers, regexes, scripts) on every load path: nothing
    executed, < 500 MB, refused by one of our messages"""
    rng = random.Random(f"malicious {case}")
    target = list(TARGETS)[case % len(TARGETS)]
    name, load = TARGETS[target]
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        root, sentinel = Path(tmp) / "files", Path(tmp) / "sentinel"
        shutil.copytree(_pattern(), root)
        path = root / name
        whole = path.read_bytes() if path.exists() else b"{}"
        payloads = {**pickles(sentinel), **bombs()}
        kind = list(payloads)[case // len(TARGETS)] if case < len(TARGETS) * len(payloads) else "mutated"
        path.write_bytes(_mutate(rng, whole) if kind == "mutated" else payloads[kind])

        def act():
            try: load(root, path)
            except LLMTrainerError as e: return e
        ended = in_child(act, limit=60)
        if sentinel.exists(): return f"{target} from {kind}: EXECUTED"
        if ended.code:
            return f"{target} from {kind}: ended {ended.code} after {ended.seconds:.1f} s: {ended.said[-600:]}"
        if ended.grew > 500 << 20: return f"{target} from {kind}: took {ended.grew >> 20} MB"


# Names and paths ------------------------------------------------------------------------------------------------------

NAMES = ["../x", "..", ".", "/etc/passwd", "a/../../x", "a\0b", "CON", "nul", "a" * 300, "12e4567", "0x1f",
         "20260802", "-rf", "--help", "a b", "a\nb", "\u202eabc", "a\u200fb", "é", "A", "a/b", "a//", "~", "$HOME",
         "`id`", "a;rm", "a*", "a?", "[a]", "", " ", "a.b", "link", "outside", "a\\b", "%2e%2e", "..%2f", "\ud800",
         "a\r", "\x1b[2J"]
_WATCHED = {"open": (), "os.mkdir": (2,), "os.rename": (2, 3), "os.remove": (1,), "os.rmdir": (1,), "os.symlink": (),
            "os.link": (2, 3),
            "os.chmod": (2,), "os.truncate": ()}  # event → where its folder descriptors are among the arguments


def _watch_writes(root: Path) -> list[str]:
    "From now on, note every write of this process outside `root`"
    outside: list[str] = []
    os.chdir(root)

    def hook(event, args):
        if event not in _WATCHED or not isinstance(args[0], (str, bytes, os.PathLike)): return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): return
        for n, place in enumerate(args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]):
            if event == "os.symlink" and n == 0: continue
            fd = args[_WATCHED[event][n]] if _WATCHED[event] else -1
            place = Path(os.readlink(f"/proc/self/fd/{fd}") if isinstance(fd, int) and fd >= 0
                         else root) / os.fsdecode(place)
            real = os.path.realpath(place) if event == "open" else os.path.join(os.path.realpath(place.parent),
                                                                                place.name)
            if not Path(real).is_relative_to(root) and real != os.devnull: outside.append(f"{event} {real}")
    sys.addaudithook(hook)
    return outside


@trial("T13", goal=5000, slice=100, chunk=100)
@cases
def names(case: int) -> str | None:
    """run names and paths (.., absolute, NUL, links, CON, 300 characters, bidi, numbers): refused or found, never a
    write outside the folder (audited)"""
    rng = random.Random(f"names {case}")
    name = NAMES[case] if case < len(NAMES) else "".join(rng.choice("./\\~$a-zé\0\u202e" + string.printable)
                                                         for _ in range(rng.choice([1, 2, 5, 20, 70])))
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        root = Path(tmp).resolve() / "runs"
        root.mkdir()
        secret = root.parent / "outside"
        secret.mkdir()
        (secret / "meta.json").write_text("{}")
        (root / "link").symlink_to(secret)
        try: (root / name).symlink_to(secret)
        except (OSError, ValueError): pass

        def act():
            outside = _watch_writes(root)
            for attempt in (lambda: find_run(root, name), lambda: create_run(root, {}, name=name),
                            lambda: list_runs(root)):
                try: made = attempt()
                except LLMTrainerError: continue
                for run in made if isinstance(made, list) else [made]:
                    if run.folder.is_symlink() or run.folder.parent != root or not RUN_ID.fullmatch(run.id):
                        return f"{name!r} became {run.folder}"
                    try: run.request("stop")
                    except OSError: pass
                    run.state(), run.metrics(), run.log_tail()
            return f"{name!r} wrote outside: {outside}" if outside else ""
        ended = in_child(act)
        if ended.code or ended.said: return f"{name!r}: {ended.said[-500:]}"
        if sorted(os.listdir(secret)) != ["meta.json"]: return f"{name!r} left something outside"


# Settings -------------------------------------------------------------------------------------------------------------

ODD = ["nan", "inf", "-inf", "1e308", "-1e308", "1e-320", "0", "-1", "-0.0", str(2**63), str(10**30), "1_000",
       "0x10", "true", "false", '""', '"auto"', '"' + "x" * 5000 + '"', '"\\u0000"', '"../.."', "[]", "[1]", "{}",
       "{a = 1}", "[[[[[[]]]]]]", "1979-05-27", "'''a\nb'''", '"nan"', '"1"', '"🙂"', "2.5", "3.0"]


@trial("T12", goal=20000, slice=300, chunk=500)
@cases
def settings(case: int) -> str | None:
    """settings of odd type, range and nesting, in profiles and as flags: rejected with the key named (< 1 s of work, <
    200 MB), or a config that survives its own round trip"""
    rng, knobs = random.Random(f"settings {case}"), list(all_settings().values())
    lines: dict[str, list[str]] = {}
    touched = []
    for _ in range(rng.randrange(1, 4)):
        knob = rng.choice(knobs)
        name = knob.name if rng.random() < .8 else rng.choice([knob.name.upper(), knob.name[:-1], "x" * 100, '"é"',
                                                               '"\\u001b[2J"'])
        value = rng.choice(ODD) if rng.random() < .8 else str(rng.uniform(-1e6, 1e6))
        table = knob.group if rng.random() < .9 else rng.choice(["model", "train", "data.x", '"\\u202e"'])
        lines.setdefault(table, []).append(f"{name} = {value}")
        touched.append(knob)
    text = "\n".join(f"[{table}]\n" + "\n".join(rows) for table, rows in lines.items())
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        path = Path(tmp) / "odd.toml"
        path.write_text(text)
        odd = [None, -1, 0, 10**20, 1e308, float("nan"), "", "x", True, [], {}]
        flags = {k.name: rng.choice(odd) for k in touched if rng.random() < .3}
        started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try: config, e = load_config(str(path), flags, Path(tmp)), None
        except LLMTrainerError as refusal: config, e = None, refusal
        worked, grew = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        if worked > 1 or grew > 200_000: return f"{worked:.1f} s of work and {grew} kB for {text!r:.300}"
        if e:
            message = str(e)
            if terminal.clean(message) != message: return f"control bytes in the message for {text!r}"
            if "odd.toml" not in message and not any(f"--{name}" in message for name in flags):
                return f"no file named: {message}"
            return None
        if Config.from_dict(json.loads(json.dumps(config.to_dict()))) != config:
            return f"no round trip: {text!r} {flags}"


# Text for a terminal --------------------------------------------------------------------------------------------------

EVIL = ["\x1b[2J", "\x1b]0;title\x07", "\x1b]52;c;aGk=\x07", "\x1bP1$r\x1b\\", "\x9b31m", "\x9d8;;http://x\x9c",
        "\u202e", "\u2066", "\u200f", "\x07", "\x08" * 9, "\r", "\x00", "\x7f", "\ud800", "[/]", "[bold]",
        "[@click=app.quit]x[/]", "\x1b", "\x1b[", "\x1b]8;;", "\x85", "\u2028"]


def unclean(text: str) -> list[str]:
    "Characters that a terminal acts on, or that reorder text"
    return sorted({hex(ord(c)) for c in text if c not in "\n\t" and
                   (ord(c) < 32 or 0x7f <= ord(c) < 0xa0 or 0x2028 <= ord(c) <= 0x202e or 0x2066 <= ord(c) <= 0x2069
                    or ord(c) in (0x61c, 0x200e, 0x200f) or 0xd800 <= ord(c) < 0xe000)})


@trial("T15", goal=5000, slice=150, chunk=100)
@cases
def escapes(case: int) -> str | None:
    """control bytes in run records, logs, errors and generated text: none reaches the lines that `status`, `runs` and
    `logs` print"""
    rng = random.Random(f"escapes {case}")
    def word():
        return "".join(rng.choice([*EVIL, "plain ", "é", "🙂", "x" * rng.randrange(40)])
                       for _ in range(rng.randrange(1, 6)))
    if left := unclean(terminal.clean(word())): return f"clean() left {left}"
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        run = create_run(Path(tmp), {"data": {"dataset": word()}}, name="evil", note=word(), argv=[word()])
        state = {**json.loads((run.folder / "state.json").read_text()),
                 "status": rng.choice(["failed", "running", word()]),
                 "phase": word(), "device": word(), "host": word(), "reason": {"code": word(), "message": word()},
                 "acknowledged": {word(): word()}, "loss_history": [word(), 1.0], "run_id": word(),
                 "waiting_for": [word()]}
        odd = [None, True, -1, 2**70, 1e308, word(), [], [word()], {}, [{}]]
        for key in rng.sample(sorted(state), rng.randrange(6)): state[key] = rng.choice(odd)
        (run.folder / "state.json").write_text(json.dumps(state))
        log = "\n".join(word() for _ in range(5)).encode("utf-8", "surrogatepass")
        (run.folder / "train.log").write_bytes(log + rng.randbytes(40))
        (run.folder / "metrics.jsonl").write_text(json.dumps({"kind": word(), "step": 1, word(): 2}) + "\n")
        status, log = run.status(), run.log_tail(20)
        shown = "\n".join([show.card(status, run.meta, log), show.line(status), show.table([status]), *log,
                           run.notes()])
        if left := unclean(shown): return f"{left} in {shown!r:.600}"


# HTML -----------------------------------------------------------------------------------------------------------------

HTML = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</pre><script>1</script>", '" onmouseover="x',
        "' onfocus='x", "<svg/onload=1>", "javascript:alert(1)", "<a href=javascript:1>x</a>", "</script>", "<!--",
        "]]>", "<style>*{}</style>", "<iframe src=//x>", "&lt;script&gt;", "<scr\0ipt>", "<ScRiPt >",
        "<x onclick\n=1>", "\u2028<b>", "<math><mi//xlink:href='data:x'>", "<form action=x><button>", "%3Cscript%3E",
        "<base href=//x>"]


class Obedient(HTMLParser):
    "A parser that notes everything a browser would obey"
    fine = {"div", "b", "br", "pre", "span"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.faults, self.text = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.fine: self.faults.append(f"<{tag}>")
        for name, value in attributes:
            if name != "style" or "url(" in (value or "") or "expression" in (value or ""):
                self.faults.append(f"{name}={value}")

    def handle_data(self, data): self.text.append(data)
    def handle_comment(self, data): self.faults.append("<!-- -->")
    def handle_decl(self, data): self.faults.append("<!>")
    def handle_pi(self, data): self.faults.append("<?>")


class Report(Obedient):
    "The tags and attributes of our own report are no faults, anything beside them is"
    fine = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "section", "div", "table", "thead",
            "tbody", "tr", "th", "td", "p", "pre", "figure", "figcaption", "footer", "svg", "path", "text", "circle"}
    ours = re.compile(r"(lang|charset|http-equiv|content|name|scope|class|role|aria-label|viewbox|xmlns"
                      r"|d|x|y|cx|cy|r|fill|stroke|stroke-width|text-anchor)")

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, [(name, value) for name, value in attributes if not self.ours.fullmatch(name)])
        self.styles = getattr(self, "styles", 0) + (tag == "style")

    def handle_decl(self, data):
        if data != "doctype html": super().handle_decl(data)


def hostile_run(runs: Path, word, rng: random.Random):
    "A run whose every text is `word()`"
    run = create_run(runs, {"model": {"arch": word(), "n_layer": 2},
                            "data": {"dataset": rng.choice([word(), [{"name": word()}]])},
                            word(): {word(): word()}}, name="evil", note=word(), argv=["train", word(), f"--{word()}"])
    run.add_attempt(from_step=0, target_epochs=2, changed={word(): [word(), 1]}, argv=[word()], lr_plan=word())
    run.complete_meta(device={"type": word(), "name": word()}, versions={word(): word()}, tokenizer_hash=word(),
                      resolution={"reason": word(), "dtype": word()}, parameters=word(),
                      data={"fingerprint": word(), "train_tokens": word()})
    def row(kind, step):
        return json.dumps({"kind": kind, "step": step, "time": 1.0, "loss": rng.choice([2.5, word()]),
                           "attempt": word(),
                                             "lr": 1e-3, "tokens": word(), "perplexity": word(),
                           "cpu_joules": rng.choice([word(), 1e5])})
    (run.folder / "metrics.jsonl").write_text("\n".join(row(kind, step) for step in (1, 2, 3)
                                                        for kind in ("train", "val")) + "\n")
    (run.folder / "samples.jsonl").write_text(json.dumps({"step": 2, "prompt": word(), "text": word()}) + "\n")
    (run.folder / "train.log").write_text(word(), errors="replace")
    state = json.loads((run.folder / "state.json").read_text())
    state |= {"status": rng.choice(["failed", word()]), "phase": word(), "reason": {"code": word(), "message": word()}}
    (run.folder / "state.json").write_text(json.dumps(state))
    return run


def report_faults(word, rng: random.Random) -> str:
    "What a browser would obey, or a terminal, in the report of a hostile run"
    from llm_trainer import workspace
    from llm_trainer.runs.report import report
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        space = workspace.init(Path(tmp))
        run = hostile_run(space.runs, word, rng)
        page, text = Report(), report(run, space)
        page.feed(text)
        page.close()
        plain = report(run, space, "md")
    if page.faults or page.styles != 1: return f"{page.faults}, {page.styles} styles in the report"
    prose = re.sub(r"^(`{3,}).*?^\1$", "", plain, flags=re.S | re.M)
    if open_tags := re.findall(r"(?<!\\)<[a-z/!]", prose): return f"{open_tags} in the report's Markdown"
    return f"{left} in the report" if (left := unclean(text + plain)) else ""


@trial("T16", goal=2200, slice=200, chunk=200)
@cases
def markup(case: int) -> str | None:
    """HTML and script in run names, errors, settings, prompts and generated text: neither the notebook's view nor a
    report holds any of it as markup"""
    from llm_trainer import notebook as live
    rng = random.Random(f"markup {case}")
    def word(): return "".join(rng.choice([*HTML, *EVIL, "text "]) for _ in range(rng.randrange(1, 5)))
    def mutated(): return "".join(c for c in word() if rng.random() < .95)
    page = Obedient()
    state = State(run_id=mutated(), status=rng.choice(["running", "failed", mutated()]), phase=mutated(),
                  reason={"code": "x", "message": mutated()})
    page.feed(live.headline(state) + live.quote([{"step": mutated(), "prompt": mutated(), "text": mutated()}
                                                 for _ in range(3)]))
    page.close()
    if page.faults: return f"{page.faults}"
    if left := unclean("".join(page.text)): return f"{left} in the text"
    if case % 8 == 0: return report_faults(mutated, rng)
