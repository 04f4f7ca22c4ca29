"""Every form that text comes in: read, or named as left out, or refused with the line that mends it."""
from __future__ import annotations

import base64
import csv
import gzip
import json
import os
import random
import socket
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hearing import Heard

from llm_trainer.data.batches import prepare_tokens
from llm_trainer.data.sources import first_look, local_paths, open_corpus, open_files, open_mix
from llm_trainer.data.tables import choose_column, look, rows_of, text_of, texts_of
from llm_trainer.data.tokenizer import Tokenizer, bpe_backend, broken, prepare_tokenizer, train_tokenizer
from llm_trainer.errors import DataError, NotFoundError, UsageError
from llm_trainer.events import silent
from llm_trainer.terminal import clean

TALES = [f"Tale {i}: «é», \"quotes\", a comma\nand a second line; {'x' * (i % 50)}" for i in range(300)]


def wish(dataset, **more):
    return SimpleNamespace(**{"dataset": str(dataset), "text_column": None, "val_fraction": 0.1, **more})
def opened(path, tmp_path, emit=silent, **more): return open_corpus(wish(path, **more), tmp_path / "data", emit)
def texts(corpus): return [text for split in ("train", "val") for text in corpus.documents(split)]


def whole(corpus): return list(corpus.whole().documents("train"))


def zst(path, data: bytes):
    with pa.output_stream(str(path), compression="zstd") as f: f.write(data)


def write_table(path, rows: list[dict]) -> None:
    "The same rows in whatever kind of table the name asks for"
    names, kind = list(rows[0]), path.name.split(".")[1]
    if kind == "parquet": return pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    if kind in ("arrow", "feather"):
        table = pa.Table.from_pylist(rows)
        make = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
        with make(str(path), table.schema) as f: f.write_table(table, 64)
        return None
    if kind == "json": text = json.dumps(rows)
    elif kind in ("jsonl", "ndjson"): text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        import io
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, names, delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    if path.suffix == ".gz": path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zst": zst(path, text.encode())
    else: path.write_bytes(text.encode())


# -- tables

@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow",
                                  "a.feather", "a.jsonl.gz", "a.csv.zst", "a.json.gz", "a.tsv.zst"])
def test_every_kind_of_table_gives_the_same_documents(tmp_path, name):
    rows = [{"id": i, "body": tale.replace("\n", "\r\n") if "csv" in name else tale} for i, tale in enumerate(TALES)]
    write_table(tmp_path / name, rows)
    said = Heard()
    corpus = opened(tmp_path / name, tmp_path, said)
    assert whole(corpus) == [row["body"] for row in rows] and corpus.column == "body"
    assert any("'body'" in message for message in said)


def test_a_null_in_the_first_rows_does_not_choose_the_column(tmp_path):
    rows = [{"id": i, "title": "x", "text": None if i < 1500 else "a longer text"} for i in range(1600)]
    for name in ("a.jsonl", "a.parquet"):
        write_table(tmp_path / name, rows)
        assert opened(tmp_path / name, tmp_path).column == "text"
    late = [{"title": "x", "body": None if i < 1500 else "a longer text " * 30} for i in range(1600)]
    assert choose_column(look(late), "x") == "body"


def test_nested_columns_and_templates(tmp_path):
    rows = [{"doc": {"text": f"text {i}", "title": f"title {i}"}, "year": 1900 + i} for i in range(40)]
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        write_table(tmp_path / name, rows)
        assert list(texts_of(tmp_path / name, "doc.text"))[3] == "text 3"
        assert list(texts_of(tmp_path / name, "{doc.title}\\n{{{year}}} {doc.text}"))[3] == "title 3\n{1903} text 3"
        assert whole(opened(tmp_path / name, tmp_path, text_column="doc.text"))[0] == "text 0"
        with pytest.raises(DataError, match="it has: doc.text, doc.title, year"):
            opened(tmp_path / name, tmp_path, text_column="doc.body")
    assert text_of("{a}{b}")({"a": None, "b": "x"}, "row") == "x"
    with pytest.raises(DataError, match="holds"): text_of("{a}")({"a": ["list"]}, "row 7")


@pytest.mark.parametrize("content, text", [
    (b"text\nHello, world\n", "Hello, world"), (b"id;text\n1;x, y\n", "x, y"),
    (b"text\tid\nsome \"quoted\" words\t1\n", 'some "quoted" words')])
def test_csv_as_people_write_it(tmp_path, content, text):
    path = tmp_path / ("a.tsv" if b"\t" in content else "a.csv")
    path.write_bytes(content)
    assert whole(opened(path, tmp_path)) == [text]


@pytest.mark.parametrize("content, rows", [
    ("sep=;\r\nid;text\r\n1;x, y\r\n", [{"id": "1", "text": "x, y"}]),
    ("\"sep=|\"\nid|text\n1|x; y\n", [{"id": "1", "text": "x; y"}]),
    ("\n  \n,,\nid,text\n\n1,x\n   \n2,y\n", [{"id": "1", "text": "x"}, {"id": "2", "text": "y"}]),
    ("text,text,n\na,b,1\n", [{"text (1)": "a", "text (2)": "b", "n": "1"}]),
    (",text,,\n0,a,b,\n", [{"column 1": "0", "text": "a", "column 3": "b", "column 4": ""}]),
    ("id, text\n1, \"a, b\"\n2, c\n", [{"id": "1", "text": "a, b"}, {"id": "2", "text": "c"}]),
    ("text\nOne line, with a comma\n", [{"text": "One line, with a comma"}])])
def test_headers_as_people_write_them(tmp_path, content, rows):
    "What Excel says of the divider, blank lines, a name that is there twice or not at all"
    (tmp_path / "a.csv").write_text(content)
    assert [row for _, row in rows_of(tmp_path / "a.csv")] == rows


def test_a_column_that_is_there_twice_is_never_chosen_in_silence(tmp_path):
    (tmp_path / "a.csv").write_text("id,text,text\n" + "".join(f"{i},one {i},two {i}\n" for i in range(9)))
    with pytest.raises(DataError, match=r"it has: id, text \(1\), text \(2\)"): opened(tmp_path / "a.csv", tmp_path)
    with pytest.raises(DataError, match="no column 'text'"): opened(tmp_path / "a.csv", tmp_path, text_column="text")
    assert whole(opened(tmp_path / "a.csv", tmp_path, text_column="text (2)"))[3] == "two 3"


@pytest.mark.parametrize("content", [
    "1,Once upon a time there was\n2,a king\n3,and a queen\n", "spam;Buy now\nham;See you\nspam;Win a prize\n",
    "Once upon a time long ago\nthere was a king, and a queen\nand they had three sons\n",
    "\n\n7,\"He said \"\"no\"\",\nand went\"\n8,She stayed\n", "sep=;\n7;He, who said no\n8;She stayed\n"])
@pytest.mark.parametrize("kind", ["csv", "csv.gz"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_table_that_begins_with_data_is_refused_with_the_line_that_mends_it(tmp_path, content, kind, inside):
    (tmp_path / "t a").mkdir()
    path = tmp_path / "t a" / f"a.{kind}"
    path.write_bytes(gzip.compress(content.encode()) if kind == "csv.gz" else content.encode())
    given = path.parent if inside else path
    with pytest.raises(DataError, match="looks like a row") as e: opened(given, tmp_path)
    subprocess.run(str(e.value).split("before it: ")[1].split("\n")[0], shell=True, check=True)
    mended = given if inside else path.with_name(f"named-a.{kind}")
    found = whole(opened(mended, tmp_path))
    assert len(found) == (2 if "7" in content else 3) and all(text.split("\n")[-1] in content for text in found)


@pytest.mark.parametrize("header", ["id,story", "First Name", "Tweet content", "id,What is it?",
                                    "rank,body of the mail"])
def test_names_of_columns_are_not_taken_for_data(tmp_path, header):
    before = "1," * (header.count(","))
    rows = "".join(f"{before}Some longer text {i} of a mail\n" for i in range(9))
    (tmp_path / "a.csv").write_text(f"{header}\n{rows}")
    assert len(whole(opened(tmp_path / "a.csv", tmp_path))) == 9


def test_data_in_the_place_of_names_can_be_named(tmp_path):
    "What looks like data may be a header after all: one that asks a question"
    header = "How did you come to know about the place where we met?"
    (tmp_path / "a.csv").write_text(f"{header}\n" + "By chance and by train, as ever\n" * 9)
    with pytest.raises(DataError, match="--text-column"): opened(tmp_path / "a.csv", tmp_path)
    assert len(whole(opened(tmp_path / "a.csv", tmp_path, text_column=header))) == 9


@pytest.mark.parametrize("content, says", [
    (b'a,text\n1,"x"\n2,y,z\n', "a.csv:3 has 3 cells"), (b'a,text\n1,"never ends\n2,y\n', "is not CSV"),
    (b"id,text\n1,one\ntwo\n3,four\n", "a.csv:3 has 1 cell, and the header has 2: id, text"),
    (b"\n\nid,text,n\n1,one,2\n3,two\n", "a.csv:5 has 2 cells"), (b"id,text\n", "no rows below its first line"),
    (b"text (1),text,text\na,b,c\n", "calls several columns alike")])
def test_csv_that_means_nothing_is_refused(tmp_path, content, says):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=says): opened(tmp_path / "a.csv", tmp_path)


def test_quotes_of_a_tsv_join_no_rows_in_silence(tmp_path):
    "A text that begins with a quote, and a later one that ends with one; a whole text in quotes stays whole"
    rows = ['"Hi, he said.', *(f"{i}'s words" for i in range(18)), 'and left."']
    def read(*lines, name="a.tsv"):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        return [row["text"] for _, row in rows_of(tmp_path / name)]
    def mended(error, line):
        subprocess.run(["bash", "-c", str(error.value).splitlines()[line].partition(": ")[2]], cwd=tmp_path, check=True)
    assert read("text\tn", *(f"{row}\t1" for row in rows)) == rows == [
        *read("n\ttext", *(f"1\t{row}" for row in rows))]
    assert read("text\tn", *['"One\nor ""two""\nlines"\t1'] * 2000) == ['One\nor "two"\nlines'] * 2000
    for before, header, end in ((1500, "text\tn", "\t1"), (0, "text", "")):  # behind what is looked at; one column
        with pytest.raises(DataError, match=rf":{before + 2}-{before + 21} is one text in quotes, or 20 rows") as e:
            read(header, *[f"x{end}"] * before, *(row + end for row in rows))
        mended(e, 2)
        assert [row["text"] for _, row in rows_of(tmp_path / "rows-a.tsv")] == ["x"] * before + rows
        mended(e, 1)
        assert [row["text"] for _, row in rows_of(tmp_path / "a.csv")][before:] == [f"{end}\n".join(rows)[1:-1]]


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", '{"text": "one"}\n{"text": "two", "text": "lost"}\n'),
    ("a.json", '[{"text": "one"}, {"m": {"a": 1, "a": 2}}]'),
    ("b.json", '{"text": "one", "text": "lost"}' + " \n" * 40_000)], ids=["a.jsonl", "a.json", "b.json"])
def test_a_name_that_a_row_has_twice_loses_no_text(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}(:2|, row [12]) has '(text|a)' twice"): list(rows_of(tmp_path / name))


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_that_were_joined_are_read_whole_or_refused(tmp_path, make):
    def table(sign): return pa.table({"text": pa.array([f"{sign}{i % 9}" for i in range(300)]).dictionary_encode()})
    for sign in "ab":
        with make(str(tmp_path / f"{sign}.arrow"), table(sign).schema) as f: f.write_table(table(sign), 100)
    joined = tmp_path / "ab.arrow"
    joined.write_bytes((tmp_path / "a.arrow").read_bytes() + (tmp_path / "b.arrow").read_bytes())
    assert len(list(texts_of(tmp_path / "a.arrow", "text"))) == 300
    if make is pa.ipc.new_stream: assert list(texts_of(joined, "text"))[299:301] == ["a2", "b0"]
    else:
        with pytest.raises(DataError, match="several files, one behind the other"): opened(joined, tmp_path)
    with open(joined, "ab") as f: f.write(b"and more")
    with pytest.raises(DataError): list(texts_of(joined, "text"))


def test_empty_rows_are_counted_aloud(tmp_path):
    write_table(tmp_path / "a.jsonl", [{"text": "a tale" if i % 50 == 0 else None, "content": "c"} for i in range(500)])
    open_mix(wish(tmp_path / "a.jsonl"), tmp_path / "data", said := Heard())
    assert any("490 of the 500 documents" in note and "--text-column" in note for note in said)


def test_json_of_every_shape(tmp_path):
    path = tmp_path / "a.json"
    (tmp_path / "a.jsonl").write_text('"one"\n{"text": "two"}\n')
    assert [row["text"] for _, row in rows_of(tmp_path / "a.jsonl")] == ["one", "two"]
    for content in ('[{"text": "one"}, {"text": "two"}]', '{"text": "one"}\n{"text": "two"}', '["one", "two"]',
                    '{"text":"one"} {"text":"two"}'):
        path.write_text(content)
        assert [row["text"] for _, row in rows_of(path)] == ["one", "two"]
    for content, says in (("[1, 2]", "not a JSON object"), ('[{"text": "a"}, {"te', "not JSON|cut off"),
                          ("[" * 100_000, "not JSON"),
                          ('[{"text": "a"} oops]', "not JSON"), ('[{"text": "a"}', "cut off"), ("", "holds no text")):
        path.write_text(content)
        with pytest.raises(DataError, match=says): opened(path, tmp_path)


TURNS = [dict(role="user", content="Who «goes» there?"), dict(role="assistant", content='"I", it said\nand left')]


@pytest.mark.parametrize("name, content, texts_in_it", [
    ("a.json", json.dumps({"version": 1, "tags": ["x"], "it's \"data\"": [{"text": "one"}, {"text": "two"}]}),
     ["one", "two"]),
    ("a.json", json.dumps({"id": [1, 2], "text": ["one", "two"]}), ["one", "two"]),
    ("a.json.gz", json.dumps({"data": [{"text": "one"}]}), ["one"]),
    ("a.jsonl", json.dumps({"tags": ["t"], "messages": TURNS}), ["\n\n".join(turn["content"] for turn in TURNS)]),
    ("a.jsonl", json.dumps({"text": ["one", "two"]}), ["one\n\ntwo"]),
    ("a.csv", "id,text\r1,one\r2,two\r", ["one", "two"]),
    ("a.csv", 'id,text\n1,"\\"one\\", it said"\n', ['"one", it said'])])
def test_what_other_programs_write_is_refused_with_the_line_that_mends_it(tmp_path, name, content, texts_in_it):
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    with pytest.raises(DataError, match="Take the texts out of the list: |Convert it: ") as e:
        opened(tmp_path / name, tmp_path)
    command = str(e.value).splitlines()[1].split(": ", 1)[1].replace("python -c", f"{sys.executable} -c", 1)
    subprocess.run(command, shell=True, check=True)
    new, = [path for path in tmp_path.iterdir() if path.name.endswith(f"-{name}")]
    assert whole(opened(new, tmp_path)) == texts_in_it


def test_arrow_columns_are_named_with_what_they_hold(tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"x"]), "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column of text; it has: n \(int64\), text \(binary\)"):
        opened(tmp_path / "a.parquet", tmp_path)
    twice = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pa.ipc.new_file(str(tmp_path / "b.arrow"), twice.schema) as f: f.write_table(twice)
    for name in ("b.parquet", "b.arrow"):
        with pytest.raises(DataError, match="several columns called 'text'"): opened(tmp_path / name, tmp_path)


def test_a_large_list_is_read_piece_by_piece(tmp_path):
    rows = [{"text": f"{i} é " * 50} for i in range(3000)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert [row for _, row in rows_of(tmp_path / "a.json")] == rows


# -- folders

def test_a_folder_of_everything(tmp_path):
    folder = tmp_path / "notes"
    (folder / "code" / "deep").mkdir(parents=True)
    for name, content in {"a.txt": "plain", "b.md": "# marked", "c.rst": "down", "LICENSE": "free",
                          "code/x.py": "print()", "code/deep/y.c": "int",
                          "code/package.json": '{"name": "x", "version": "1"}',
                          "t.csv": "id,text\n1,cell\n", "numbers.csv": "a,b\n1,2\n"}.items():
        (folder / name).write_text(content)
    (folder / "p.txt.gz").write_bytes(gzip.compress(b"packed"))
    (folder / "cover.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4\n\xe2\xe3\0")
    (folder / "empty.txt").touch()
    (folder / ".hidden").write_text("no")
    (folder / "link.txt").symlink_to("a.txt")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    server = socket.socket(socket.AF_UNIX)
    os.chdir(folder)
    server.bind("sock")
    os.chdir("/")
    said = Heard()
    corpus = opened(folder, tmp_path, said)
    assert sorted(whole(corpus)) == sorted(["plain", "# marked", "down", "free", "print()", "int", "cell", "packed"])
    assert corpus.left_out == {"png": 1, "pdf": 1, "empty": 1, "hidden": 1, "link": 2, "dangling link": 1,
                               "named pipe": 1, "socket": 1, "json without text": 1, "csv without text": 1}
    assert any("Left out of " in message and "1 png" in message for message in said)
    server.close()


def test_a_named_pipe_or_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(DataError, match="must be a file"): first_look(wish(path), tmp_path)


def test_links_are_followed_where_the_user_named_them_and_nowhere_else(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").write_text("public")
    (tmp_path / "f" / "b.txt").symlink_to(secret)
    (tmp_path / "to-f").symlink_to(tmp_path / "f")
    assert whole(opened(tmp_path / "to-f", tmp_path)) == ["public"]
    assert whole(opened(tmp_path / "f" / "b.txt", tmp_path)) == ["secret"]


def test_several_paths_are_one_corpus(tmp_path, monkeypatch):
    for name in ("a.txt", "with,comma.txt", "d/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    found = local_paths("a.txt,with,comma.txt, d/", tmp_path / "data")
    assert [str(p) for p in found] == ["a.txt", "with,comma.txt", "d"]
    assert sorted(whole(opened("a.txt,d,with,comma.txt", tmp_path))) == ["a.txt", "d/c.md", "with,comma.txt"]
    with pytest.raises(NotFoundError, match="b.txt"): local_paths("a.txt,b.txt", tmp_path / "data")
    with pytest.raises(DataError, match="A mix is a list"): local_paths("a.txt,python-docs", tmp_path / "data")


def test_a_mistyped_name_is_refused_without_a_network(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "books").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, says in (("note.txt", "Did you mean notes.txt"), ("boks", "Did you mean books"),
                       ("books/x", "no file or folder"), ("imdb", "owner/imdb"),
                       ("python-dosc", "python-docs"), ("./x/y", "no file"), ("a/b/c", "no file")):
        with pytest.raises(NotFoundError, match=says): first_look(wish(name), tmp_path / "data")
    assert local_paths("someone/tales", tmp_path) is None and local_paths("wikitext-2", tmp_path) is None


@pytest.mark.parametrize("name, says", [
    ("two\nlines.txt", "--dataset holds a line break: two\\nlines.txt"),
    (os.fsdecode(b"caf\xe9.txt"), "--dataset holds a byte that is not UTF-8: caf\\xe9.txt"),
    ("red\x1b[31m.txt", "--dataset holds a control character: red\\x1b[31m.txt"),
    (",".join(f"{i}.txt" for i in range(300)), "--dataset is longer than 1,000 characters: 0.txt,1.txt")])
def test_a_path_that_no_record_can_hold_is_one_message(space, capsys, name, says):
    "What is in a folder is read, whatever it is called"
    from llm_trainer.cli import commands
    (space.root / "f").mkdir()
    if len(name) < 200:
        for place in ("f", "."): (space.root / place / name).write_text("Some words, once and again. " * 200)
    for command in ("prepare", "train"):
        assert commands.main([command, "--config", "tiny", "--dataset", name]) == 2
        said = capsys.readouterr().err
        assert says in said and "name the folder that it lies in" in said and len(said.splitlines()) == 3
    if len(name) < 200: assert len(whole(opened(space.root / "f", space.root))) == 1
    assert not list(space.runs.iterdir())


# -- encodings

@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp1251", "utf-16", "utf-16-le", "shift_jis", "gb18030"])
def test_another_encoding_is_refused_with_the_line_that_mends_it(tmp_path, encoding):
    language = {"cp1251": "Все счастливые семьи похожи друг на друга. ",
                "shift_jis": "吾輩は猫である。名前はまだ無い。どこで生れたか。",
                "gb18030": "这是一个很长的故事，他在中国的时候说的。"}.get(
                    encoding, "Où est passé le garçon ? « Là-bas », dit-elle. ")
    (tmp_path / "a b.txt").write_bytes((language * 200).encode(encoding))
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "x.md").write_bytes((language * 200).encode(encoding))
    for path, mended in ((tmp_path / "a b.txt", tmp_path / "utf8-a b.txt"), (tmp_path / "n", tmp_path / "n")):
        with pytest.raises(DataError, match="is not UTF-8") as e: opened(path, tmp_path)
        subprocess.run(str(e.value).split("Convert it: ")[1], shell=True, check=True)
        assert "".join(text for _, text, _ in opened(mended, tmp_path).pieces()) == language * 200


@pytest.mark.parametrize("name", [b"\x1b[31mred.txt", b"it's \\ a\n\tline.txt", b"\xff\xfe \xe2\x80\xaed\xc3\xa9.txt"])
def test_a_command_names_the_file_whatever_it_is_called(tmp_path, name):
    (folder := tmp_path / "f").mkdir()
    path = folder / os.fsdecode(name)
    path.write_bytes("déjà vu, là-bas ".encode("latin-1") * 50)
    with pytest.raises(DataError) as e: opened(folder, tmp_path)
    shown = clean(str(e.value).partition("Convert it: ")[2])
    subprocess.run(["bash", "-c", shown], check=True)
    assert os.listdir(os.fsencode(folder)) == [name] and path.read_text() == "déjà vu, là-bas " * 50


def test_latin_1_behind_a_long_ascii_beginning_is_refused_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"plain words " * 20_000 + "é à ç".encode("latin-1"))
    with pytest.raises(DataError, match="CP1252"): opened(tmp_path / "a.txt", tmp_path)
    (tmp_path / "b.csv").write_bytes("id,text\n1,été\n".encode("latin-1"))
    with pytest.raises(DataError, match="CP1252"): opened(tmp_path / "b.csv", tmp_path)


# -- text that changes

@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv.gz", "a.tsv", "a.parquet", "a.arrow"])
def test_text_that_changed_since_it_was_opened_is_never_cached_as_the_old_one(tmp_path, name):
    def write(rows):
        if name == "a.txt": (tmp_path / name).write_text("".join(rows))
        else: write_table(tmp_path / name, [{"id": 1, "text": row} for row in rows])
    write(TALES)
    corpus, tokenizer = opened(tmp_path / name, tmp_path), train_tokenizer("byte", 257, ())
    write([tale.upper() for tale in TALES])
    with pytest.raises(DataError, match=f"{name} changed while it was read"):
        prepare_tokens(corpus, tokenizer, tmp_path / "data", silent)
    assert not os.path.exists(tmp_path / "data") or not os.listdir(tmp_path / "data")
    write(TALES)
    assert prepare_tokens(corpus, tokenizer, tmp_path / "data", silent).meta["train_bytes"] > 1000


@pytest.mark.parametrize("stage", ["counting", "learning", "tokenizing"])
@pytest.mark.parametrize("longer", [False, True])
def test_text_that_changes_under_the_reader_is_refused(tmp_path, stage, longer):
    (path := tmp_path / "a.txt").write_text("All work and no play. " * 300_000)
    seen, changed = [], []

    def emit(event):
        if event.kind != "progress": return
        if event.what.startswith(stage) and not changed:
            changed.append(event)
            with open(path, "ab" if longer else "r+b") as f:
                f.seek(-1_000_000, 2)
                f.write(b"Some other text. " * 58_000)
        seen.append(event.done <= event.total)
    with pytest.raises(DataError, match="a.txt changed while it was read"):
        corpus = opened(path, tmp_path, emit)
        settings = SimpleNamespace(tokenizer="char", vocab_size=0)
        tokenizer = prepare_tokenizer(settings, [corpus], tmp_path / "data", emit)
        prepare_tokens(corpus, tokenizer, tmp_path / "data", emit)
    kept = {"counting": "", "learning": "a-", "tokenizing": "a- tokenizer-"}[stage].split()
    assert all(seen) and len(kept) == len(os.listdir(tmp_path / "data"))
    assert all(any(name.startswith(k) for k in kept) for name in os.listdir(tmp_path / "data"))


# -- the share held out

def sizes(corpus):
    return {split: sum(len(t.encode()) for _, t, _ in corpus.pieces(split)) for split in ("train", "val")}


@pytest.mark.parametrize("lengths", [[200_000, 900], [40_000] * 5, [30_000] * 6 + [100], [10] * 3000, [1] * 500
                                     + [100_000, 50]])
def test_the_share_is_one_of_bytes(tmp_path, lengths):
    folder = tmp_path / "f"
    folder.mkdir()
    rng = random.Random(1)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": "".join(rng.choices("abcdé ", k=n))}) + "\n"
                                            for n in lengths))
    corpus = opened(folder, tmp_path)
    size = sizes(corpus)
    assert sum(size.values()) == corpus.count["bytes"] and abs(size["val"] / corpus.count["bytes"] - 0.1) < 0.02


def test_documents_that_are_all_the_same_are_called_so(tmp_path):
    write_table(tmp_path / "a.jsonl", [{"text": "The same tale."}] * 200)
    corpus = opened(tmp_path / "a.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"All 200 documents of .*a\.jsonl are the same text"): list(corpus.pieces())
    assert len(whole(corpus)) == 200  # to be measured, not trained on


def test_documents_stay_on_their_side_as_the_corpus_grows(tmp_path):
    path = tmp_path / "a.jsonl"
    documents = [f"document {i} of many" for i in range(2000)]
    write_table(path, [{"text": d} for d in documents])
    before = set(opened(path, tmp_path).documents("val"))
    write_table(path, [{"text": d} for d in documents + [f"a new one {i}" for i in range(500)]])
    after = opened(path, tmp_path)
    assert before == set(after.documents("val")) & set(documents) and len(before) > 100
    assert after.rule == "share 0.1"


def test_parts_of_large_documents_are_divided_by_the_end_of_a_document(tmp_path):
    for name in "abc": (tmp_path / f"{name}.txt").write_text(f"{name} " * 5000)
    pieces = list(opened(f"{tmp_path}/a.txt,{tmp_path}/b.txt,{tmp_path}/c.txt", tmp_path).pieces())
    assert [sum(last for split, _, last in pieces if split == s) for s in ("train", "val")] == [3, 3]


def test_the_first_rule_still_splits_as_it_did(tmp_path):
    "Fingerprints taken with version 0.1.0, of a book, a folder and a table"
    (tmp_path / "f").mkdir()
    (tmp_path / "book.txt").write_text("".join(f"line {i}, ünïcödé\n" for i in range(3000)), encoding="utf-8")
    for i in range(30): (tmp_path / "f" / f"{i}.txt").write_text(f"note {i} " * (i + 1))
    (tmp_path / "f" / "new.md").write_text("the first rule knows no .md")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"id": i, "story": f"tale {i}"}) + "\n"
                                                 for i in range(200)))
    found = {}
    for name in ("book.txt", "f", "rows.jsonl"):
        corpus = open_files(tmp_path / name, tmp_path / "data", val_fraction=0.1, emit=silent, version=1)
        found[name] = corpus.rule, corpus.fingerprint[:16], sizes(corpus)["val"]
    assert found == FIRST


FIRST = {'book.txt': ('tail 0.1', '4fc626ad3709979c', 6789), 'f': ('hash 0.1', 'd8c928002b537860', 312),
         'rows.jsonl': ('hash 0.1', 'ca83159f40d98f90', 144)}


# -- learning a tokenizer

def drawn(signs): return lambda rng, n: "".join(rng.choices(signs, k=n))
def signs(first, last): return "".join(map(chr, range(first, last)))


WITHOUT_BREAKS = {
    "chinese": drawn(signs(0x4e00, 0x5000)), "thai": drawn(signs(0xe01, 0xe4f)),
    "emoji": drawn(signs(0x1f600, 0x1f640)),
    "base64": lambda rng, n: base64.b64encode(rng.randbytes(n * 3 // 4)).decode(), "hex": drawn("0123456789abcdef"),
    "dna": drawn("ACGT"),
    "digits": drawn("0123456789"), "fractions": drawn("1½"), "dashes": drawn("-"), "underscores": drawn("_"),
    "control": drawn("-\x1c\x1f"), "marks": drawn("e\u0301"), "blanks": drawn(" \t\u3000")}


@pytest.mark.parametrize("kind", WITHOUT_BREAKS)
def test_learning_is_linear_on_text_without_breaks(kind):
    "A merge reads a word from end to end, so the work is the square of a word's bytes: it grows as the text does"
    words = bpe_backend([], 257).pre_tokenizer

    def work(n: int) -> tuple[int, int]:
        text = WITHOUT_BREAKS[kind](random.Random(0), n)
        assert "".join(parts := list(broken(text))) == text
        lengths = [len(word) for part in parts for word,
                   _ in words.pre_tokenize_str(part)]  # a byte is a character there
        return sum(length ** 2 for length in lengths), max(lengths)
    (short, _), (long, longest) = work(10_000), work(80_000)
    assert long < 9 * short and longest <= 1024


def test_ordinary_text_is_not_cut():
    for text in ("Donaudampfschifffahrtsgesellschaftskapitän " * 9, "-" * 80, "https://example.org/" + "a/" * 200,
                 " " * 200): assert list(broken(text)) == [text]


# -- what other programs keep

def test_token_files_are_refused_with_a_way_that_works(tmp_path):
    import numpy as np
    tokenizer = train_tokenizer("bpe", 300, ["the way there and back again " * 20])
    tokenizer.save(tmp_path)
    ids = tokenizer.encode("the way there") + [tokenizer.eot_id] + tokenizer.encode("and back") + [tokenizer.eot_id]
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "nano.bin").write_bytes(np.array(ids, np.uint16).tobytes())
    (tmp_path / "llmc.bin").write_bytes(header.tobytes() + np.array(ids, np.uint16).tobytes())
    for name in ("nano", "llmc"):
        with pytest.raises(DataError, match="token numbers") as e: first_look(wish(tmp_path / f"{name}.bin"), tmp_path)
        command = str(e.value).split(":\n", 1)[1].replace("python -c", f"{sys.executable} -c", 1)
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
        assert [row["text"] for _, row in rows_of(tmp_path / f"{name}.jsonl")] == ["the way there", "and back"]
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "train.bin").write_bytes((tmp_path / "nano.bin").read_bytes())
    with pytest.raises(DataError, match="train.bin holds token numbers"): first_look(wish(tmp_path / "nano"), tmp_path)


def test_tokenizers_of_other_programs_are_refused_with_the_way(tmp_path):
    (tmp_path / "x.tiktoken").write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0")
    with pytest.raises(UsageError, match="tiktoken"): Tokenizer.load(tmp_path / "x.tiktoken")
    with pytest.raises(UsageError, match="sentencepiece"): Tokenizer.load(tmp_path / "tokenizer.model")
    with pytest.raises(UsageError, match="sentencepiece"): Tokenizer.load(tmp_path)


# -- bombs and damage

def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_trainer.data.readers.SMALL_BOMB", 1 << 20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * (8 << 20), 9))
    with pytest.raises(DataError, match="unpack"): opened(tmp_path / "a.txt.gz", tmp_path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.feather", "a.csv.gz"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, name):
    rows = [{"text": tale} for tale in TALES]
    if name == "a.txt.gz": (tmp_path / name).write_bytes(gzip.compress("".join(TALES).encode()))
    else: write_table(tmp_path / name, rows)
    data = (tmp_path / name).read_bytes()
    for damaged in (data[:len(data) * 2 // 3], data[:40], b"garbage"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match="damaged|cut off|not JSON"): opened(tmp_path / name, tmp_path)


def test_a_packed_file_is_known_by_its_first_bytes(tmp_path):
    data = "\n\n".join(TALES).encode()
    (tmp_path / "a.txt").write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]))  # cat a.gz b.gz
    zst(tmp_path / "b.txt", data)
    zst(tmp_path / "c.txt.gz", data)
    (tmp_path / "d.txt.zst").write_bytes(gzip.compress(data))
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"pzst"
    (tmp_path / "e.txt.zst").write_bytes(skipped + (tmp_path / "b.txt").read_bytes())
    for name in ("a.txt", "b.txt", "c.txt.gz", "d.txt.zst", "e.txt.zst"):
        assert whole(opened(tmp_path / name, tmp_path)) == [data.decode()], name
    (tmp_path / "f.jsonl.gz").write_text('{"text": "plain"}\n')  # unpacked by a browser on its way
    with pytest.raises(DataError, match="is not packed, though its name says so") as e:
        opened(tmp_path / "f.jsonl.gz", tmp_path)
    subprocess.run(str(e.value).split("what it is: ")[1], shell=True, check=True)
    assert whole(opened(tmp_path / "f.jsonl", tmp_path)) == ["plain"]


@pytest.mark.parametrize("pack", ["gz", "zst"])
def test_a_packed_text_that_is_cut_off_anywhere_is_refused(tmp_path, pack):
    "Never the beginning of it in silence: text has no end of its own that could be missed"
    path, data = tmp_path / f"a.txt.{pack}", random.Random(0).randbytes(200_000).hex().encode()
    if pack == "gz": path.write_bytes(gzip.compress(data))
    else: zst(path, data)
    whole_file = path.read_bytes()
    for size in (5, 50, len(whole_file) // 3, len(whole_file) - 9, len(whole_file) - 1):
        path.write_bytes(whole_file[:size])
        with pytest.raises(DataError, match="damaged or cut off"): opened(path, tmp_path)
        with pytest.raises(DataError, match="damaged or cut off"): opened(path.parent, tmp_path / "out")


def test_nul_bytes_are_a_kind_of_their_own(tmp_path):
    (tmp_path / "f").mkdir()
    early, late = b"some text\0\0 and more of it " * 9, b"plain words " * 20_000 + "é\0 à".encode()
    for name, data in {"good.txt": b"good", "early.txt": early, "late.md": late, "table.csv": b"id,text\n1,a\0b\n",
                       "packed.txt.gz": gzip.compress(late), "picture.txt": b"\x89PNG\r\n\x1a\n\0\0\xff\xfe",
                       "real.pdf": b"%PDF-1.7 plain words at first\0 and again",
                       "real.png": b"\x89PNG\r\n\x1a\n\0\0\xff\xfe"}.items():
        (tmp_path / "f" / name).write_bytes(data)
    corpus = opened(tmp_path / "f", tmp_path)
    assert whole(corpus) == ["good"]
    assert corpus.left_out == {"txt with NUL bytes": 1, "md with NUL bytes": 1, "csv with NUL bytes": 1,
                               "txt.gz with NUL bytes": 1, "txt that is no text": 1, "png": 1,
                               "pdf": 1}
    for name, before in {"early.txt": "after 9 bytes", "late.md": "after 240,002 bytes",
                         "packed.txt.gz": "after 240,002 bytes"}.items():
        with pytest.raises(DataError, match=f"{name} is not text: it holds NUL bytes, .*{before}") as e:
            opened(tmp_path / "f" / name, tmp_path)
        subprocess.run(str(e.value).split("take them out: ")[1], shell=True, check=True)
        assert "".join(whole(opened(tmp_path / "f" / f"clean-{name}", tmp_path))) == (
            early if name == "early.txt" else late).decode().replace("\0", "")


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_trainer.data.readers.LONGEST", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * (3 << 20))
    with pytest.raises(DataError, match="line of more than"): opened(tmp_path / "a.jsonl", tmp_path)


# -- on the command line

def test_prepare_says_what_became_of_the_text(space, tmp_path, capsys, monkeypatch):
    from llm_trainer.cli import commands
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.md").write_text("Grüße aus 東京 und anderswo. " * 100)
    (folder / "b.txt").write_text("plain words, again and again. " * 400)
    (folder / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    assert commands.main(["prepare", "--config", "tiny", "--dataset", str(folder), "--json", "--show", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"] == {"png": 1} and abs(found["val_share"] - 0.1) < 0.01
    assert found["val_tokens"] < found["train_tokens"]
    assert "".join(found["documents"][0]["text"]).startswith("Grüße aus 東京 und")
    assert found["lengths"]["documents"] == 2
    monkeypatch.setattr("llm_trainer.cli.render.coloured", lambda: True)
    assert commands.main(["prepare", "--config", "tiny", "--dataset", str(folder), "--show", "5"]) == 0
    out = capsys.readouterr().out
    assert "bytes per token" in out and "left out   1 png" in out and "2 documents, from" in out
    assert out.count("\x1b[44;97m") > 5


def shown(path, capsys, n=99):
    from llm_trainer.cli import commands
    assert commands.main(["prepare", "--config", "tiny", "--dataset", str(path), "--json", "--show", str(n)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("documents", [
    ["Grüße aus 東京. " * 900], ["one " * 3000, "", "two " * 3000, "three"], ["a" * 1_200_000 + "z", "b " * 900],
    [f"tale {i} with ünïcödé" for i in range(40)] + ["", None] + ["the last one"],
    ["", "東京 " * 500, "", "京都 " * 500, ""]])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_what_is_shown_are_the_documents(space, tmp_path, capsys, documents, kind):
    "Each once and whole, on either side; no empty one, no second half of a long one"
    if kind == "txt":
        (path := tmp_path / "texts").mkdir()
        for i, text in enumerate(documents): (path / f"{i:03}.txt").write_text(text or "")
        if len(documents) == 1: path = path / "000.txt"  # a single file, not a folder
    else: write_table(path := tmp_path / "a.jsonl", [{"text": text} for text in documents])
    found, there = shown(path, capsys), [text for text in documents if text]
    assert [d["bytes"] for d in found["documents"]] == [len(text.encode()) for text in there]
    assert sum(d["train_bytes"] for d in found["documents"]) < sum(d["bytes"] for d in found["documents"])
    for text, document in zip(there, found["documents"]):
        seen = "".join(document["text"])
        assert text.startswith(seen) and len(seen) >= min(len(text), 600) and "" not in document["text"]
        assert document["whole"] is (len(text) < 1_000_000) and document["tokens"] > 0
    assert found["lengths"]["documents"] == len(there)
    assert len(shown(path, capsys, 1)["documents"]) == 1


def test_evaluate_reads_the_whole_of_a_text_in_its_column(space, tmp_path):
    from llm_trainer.config import Config
    from llm_trainer.model.huggingface import save_weights
    from llm_trainer.model.transformer import GPT
    from llm_trainer.training.evaluate import measure
    tokenizer = train_tokenizer("bpe", 300, ["Tale after tale after tale. " * 20])
    (tmp_path / "m").mkdir()
    shape = Config.from_dict({"model": dict(n_layer=1, n_head=2, n_embd=16, seq_len=16)}).model
    save_weights(GPT(shape, tokenizer.vocab_size), tmp_path / "m", tokenizer.eot_id)
    tokenizer.save(tmp_path / "m")
    write_table(tmp_path / "a.jsonl", [{"one": tale, "two": "x" * len(tale)} for tale in TALES[:40]])
    asked = dict(data=str(tmp_path / "a.jsonl"), device="cpu", emit=silent)
    with pytest.raises(DataError, match="--text-column"): measure(tmp_path / "m", space, {}, **asked)
    found = measure(tmp_path / "m", space, {}, **asked, text_column="one")
    assert found["tokens"] == sum(len(tokenizer.encode(tale)) + 1 for tale in TALES[:40])
    assert found["bytes"] == sum(len(tale.encode()) for tale in TALES[:40])
