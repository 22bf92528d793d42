"""Rows from tables of text, and from the hub: a small one that runs on this machine."""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import normalise

from tune_magic.data import hub
from tune_magic.data.content import PromptCompletion
from tune_magic.data.locate import data_path, ensure, source_name
from tune_magic.data.read import SUFFIXES, Row, read_rows
from tune_magic.errors import DataError
from tune_magic.recipe import DataOptions

# --- csv and tsv -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", "a,b\n1,2\nNA,x", [({"a": "1", "b": "2"}, "line 2"), ({"a": "NA", "b": "x"}, "line 3")]),
        ("a.csv", "a,b\r\n1,2\r\n", [({"a": "1", "b": "2"}, "line 2")]),
        ("a.csv", "a,b\r1,2\r3,4", [({"a": "1", "b": "2"}, "line 2"), ({"a": "3", "b": "4"}, "line 3")]),
        ("a.csv", "\ufeffa,b\n1,ü\n", [({"a": "1", "b": "ü"}, "line 2")]),
        ("a.csv", '\ufeff"a","b"\n1,2\n', [({"a": "1", "b": "2"}, "line 2")]),
        ("a.csv", " a , b\n 1 ,2\n", [({"a": " 1 ", "b": "2"}, "line 2")]),
        # a record is where it begins: line breaks in quotes, blank lines
        ("a.csv", 'a,b\n"1\r\n\n2",x\n3,4\n', [({"a": "1\r\n\n2", "b": "x"}, "line 2"), ({"a": "3", "b": "4"}, "line 5")]),
        ("a.csv", '\n\na,b\n\n  \n1,2\n', [({"a": "1", "b": "2"}, "line 6")]),
        ("a.csv", '"a\nb",c\n1,2\n', [({"a\nb": "1", "c": "2"}, "line 3")]),
        ("a.csv", 'a,b\n"say ""hi"", you",\'x\'\n', [({"a": 'say "hi", you', "b": "'x'"}, "line 2")]),
        ("a.csv", "a,b\nx\u2028y,\u0085\n", [({"a": "x\u2028y", "b": "\u0085"}, "line 2")]),
        # what separates: that which the first line has most of, outside quotes
        ("a.csv", "a;b\n1,5;2\n", [({"a": "1,5", "b": "2"}, "line 2")]),
        ("a.csv", "a\tb\n1\t2\n", [({"a": "1", "b": "2"}, "line 2")]),
        ("a.csv", "a|b|c,d\n1|2|3\n", [({"a": "1", "b": "2", "c,d": "3"}, "line 2")]),
        ("a.csv", '"a,b,c";d\n1,2,3,4;5\n', [({"a,b,c": "1,2,3,4", "d": "5"}, "line 2")]),
        ("a.csv", '"a,b,\n,c";d\n1,2;3\n', [({"a,b,\n,c": "1,2", "d": "3"}, "line 3")]),
        ("a.csv", "text\none; two\n", [({"text": "one; two"}, "line 2")]),
        ("a.tsv", "a,x\tb\n1,2\t3\n", [({"a,x": "1,2", "b": "3"}, "line 2")]),
        # an empty cell is a missing value
        ("a.csv", 'a,b,c\n,"",0\n', [({"c": "0"}, "line 2")]),
        ("a.tsv", "a\tb\n\t\n", [({}, "line 2")]),
        # a null byte is a character like any other
    ],
)  # fmt: skip
def test_a_table_gives_its_rows_with_their_lines(write, name, content, rows):
    assert list(read_rows(write(name, content))) == [Row(values, place) for values, place in rows]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "", ["a.csv is empty.", "Its first line must name the columns."]),
        ("a.csv", "\n \n", ["a.csv is empty."]),
        ("a.tsv", "\ufeff", ["a.tsv is empty."]),
        ("a.csv", "a;b\n", ["a.csv has no rows, only the names of columns: `a, b`."]),
        ("a.csv", "\n,a\n0,x\n", ["a.csv, line 2: column 1 has no name: `, a`.", "`to_csv(..., index=False)`"]),
        ("a.csv", "a,b,\n1,2,\n", ["line 1: column 3 has no name"]),
        ("a.csv", "a,b, a\n1,2,3\n", ["a.csv, line 1: the column `a` is there twice."]),
        # too many cells, too few: all of them, each with its line
        ("a.csv", 'a,b\n1,2,3\n1,2\n"x\ny"\n', ["2 bad rows", "line 2: 3 cells for 2 columns: `1,2,3`", "line 4: 1 cell for 2 columns: `x y`", "separated by commas"]),
        ("a.csv", "a;b\n1;2;3\n", ["line 2: 3 cells for 2 columns: `1;2;3`", "separated by semicolons"]),
        ("a.tsv", "a\tb\n1 2\n", ["line 2: 1 cell for 2 columns: `1 2`", "separated by tabs"]),
        # quotes
        ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', ["a.csv: 1 bad row.", 'line 3: a quote is not closed: `"3,4`', "written twice"]),
        ("a.csv", 'a,b\n"x" y,2\n3,4\n"z"z,5\n', ["2 bad rows", 'line 2: text after a closing quote: `"x" y,2`', "line 4"]),
        ("a.csv", 'a,"b\n1,2\n', ["line 1: a quote is not closed"]),
        # bytes
        ("a.csv", "a,b\n1,2\ncafé,x\n".encode("latin-1"), ["a.csv, line 3: byte 12 is not UTF-8", r"\xe9"]),
        ("a.tsv", "a\tb\n".encode("utf-16"), ["a.tsv, line 1: byte 1 is not UTF-8"]),
        ("a.csv", b"\x00" * 2000, ["a.csv has no rows"]),
        ("a.csv", b"PK\x03\x04" + b"\x00,\xff" * 99, ["a.csv, line 1: byte 7 is not UTF-8"]),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_read_says_where_and_what(write, name, content, says):
    with pytest.raises(DataError) as caught:
        list(read_rows(write(name, content)))
    for part in says:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 700


def test_cells_may_be_long_and_the_limit_of_others_stays(write):
    before = csv.field_size_limit()
    cell = "x" * 10_000_000
    assert list(read_rows(write("a.csv", f'a,b\n"{cell}",{cell}\n'))) == [Row({"a": cell, "b": cell}, "line 2")]
    with pytest.raises(DataError):
        list(read_rows(write("b.csv", 'a\n"')))
    assert csv.field_size_limit() == before


def test_an_empty_cell_is_told_only_where_it_is_needed(write):
    rows = list(read_rows(write("a.csv", "prompt,completion,system\np,c,\n")))
    assert normalise(rows, DataOptions(train="a.csv"), "a.csv") == [PromptCompletion("p", "c")]
    rows = list(read_rows(write("b.csv", "prompt,completion,system\np,c,s\np,,s\np,  ,s\n")))
    with pytest.raises(DataError, match=r"(?s)line 3: column `completion` is missing.*line 4: .* is empty"):
        normalise(rows, DataOptions(train="b.csv"), "b.csv")


# --- references to the hub -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "rows"),
    [
        ("org/name", hub.HubRows("org/name")),
        ("org/name.v2", hub.HubRows("org/name.v2")),
        ("org/name:test", hub.HubRows("org/name", None, "test")),
        ("org/name:train[:80%]", hub.HubRows("org/name", None, "train[:80%]")),
        ("org/name:train[10:20]+test", hub.HubRows("org/name", None, "train[10:20]+test")),
        ("nyu-mll/glue@sst2", hub.HubRows("nyu-mll/glue", "sst2")),
        ("nyu-mll/glue@sst2:validation", hub.HubRows("nyu-mll/glue", "sst2", "validation")),
        ("data/rows", hub.HubRows("data/rows")),
        *((f"data/rows{suffix}", None) for suffix in SUFFIXES),
        ("data/ROWS.CSV", None), ("data/rows.jsonl:train", None),
        ("imdb", None), ("a/b/c", None), ("./rows", None), ("../rows", None), ("~/rows", None), ("/tmp/rows", None),
        ("$df", None), ("org/name:", None), ("org/name@", None), ("org/", None), ("/name", None), ("org/my name", None),
        ("org/name@a/b", None), ("", None),
    ],
)  # fmt: skip
def test_a_hub_id_is_told_from_a_path(reference, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.parse(reference) == rows
    assert hub.is_hub(reference) == (rows is not None)


@pytest.mark.parametrize("reference", ["org/name", "org/name:test", "org/name@sub:test"])
def test_what_is_here_wins_over_the_hub(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub(reference)
    Path("org").mkdir()
    Path("org/name").touch()
    assert not hub.is_hub(reference)
    assert data_path(reference, tmp_path) == Path(reference)


def test_names_too_long_for_a_file_are_no_crash():
    assert hub.is_hub("org/" + "x" * 300)
    assert len(hub.cached_path("org/" + "x" * 300).name) < 130


def test_a_hub_id_has_one_file_however_it_is_written(tmp_path):
    assert hub.cached_path("org/name") == hub.cached_path("org/name:train") == data_path("org/name", tmp_path)
    different = [
        "org/name",
        "org/name:test",
        "org/name@train",
        "org/name:train[:5]",
        "org/name:train[5:]",
        "org-name/train",
    ]
    paths = [hub.cached_path(reference) for reference in different]
    assert len(set(paths)) == len(different)
    assert all(re.fullmatch(r"[\w.-]+\.parquet", path.name) for path in paths)
    assert source_name("org/name:test") == "org/name:test"
    assert [source_name("$df"), source_name("a/rows.csv")] == ["$df", "rows.csv"]


def test_a_path_of_a_known_kind_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^There is no file data/rows\.jsonl\."):
        list(read_rows(ensure("data/rows.jsonl", tmp_path)))


# --- the hub ---------------------------------------------------------------------------------------------------------

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': bad, '1': good}}}}
  - {name: tags, sequence: {class_label: {names: {'0': short, '1': long}}}}
---
"""
SUBSETS = """---
configs:
- {config_name: one, data_files: one.csv}
- {config_name: two, data_files: two.csv}
---
"""
COMMIT = "c" * 40


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


REPOSITORIES = {
    "org/name": {
        "README.md": CARD,
        "train.jsonl": lines(*({"text": f"t{i}", "label": i % 2, "tags": [0, 1][: i % 3]} for i in range(10))),
        "test.jsonl": lines({"text": "untold", "label": -1, "tags": None}),
    },
    "org/subsets": {"README.md": SUBSETS, "one.csv": "a,b\n1,2\n", "two.csv": "a,b\n3,4\n"},
    "org/code": {"README.md": "# Code", "code.py": "raise SystemExit('it was run')"},
    "org/broken": {"README.md": "# Broken", "train.jsonl": '{"a": 1}\n{"a": '},
    "org/nothing": {"README.md": "# Nothing"},
    "org/gated": None,
}


class _Answers(BaseHTTPRequestHandler):
    """What `datasets` asks of the hub: files by name, the tree of a repository, and facts about it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        status, content, headers = self.answer(unquote(urlsplit(self.path).path))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def answer(self, path):
        match = re.fullmatch(r"(?:/api)?/datasets/(\w+/\w+)(?:/(resolve|tree|revision)/\w+(?:/(.+))?)?", path)
        if match is None or match[1] not in REPOSITORIES:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        name, what, file = match.groups()
        files = REPOSITORIES[name]
        if files is None:
            return 403, b"", {"X-Error-Code": "GatedRepo"}
        if what == "resolve":
            if file not in files:
                return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            content = files[file].encode()
            return 200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        facts = {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": [], "downloads": 0, "likes": 0}
        tree = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path, content in files.items()
            if file is None
        ]
        return 200, json.dumps(tree if what == "tree" else facts).encode(), {"Content-Type": "application/json"}


SCRIPT = """
import json, sys
from pathlib import Path
from tune_magic.data import locate, read
from tune_magic.errors import DataError
from tune_magic.storage import places

places.cache_folder = lambda: Path(sys.argv[1])
if sys.argv[2] == "online":
    import datasets
    datasets.config.USE_PARQUET_EXPORT = False  # another server, which would be looked up by its name
for reference in sys.argv[3:]:
    try:
        path = locate.ensure(reference, Path("."))
        answer = {"path": str(path), "rows": [row.values for row in read.read_rows(path)]}
    except DataError as error:
        answer = {"error": str(error), "cause": str(error.__cause__)}
    print(json.dumps(answer | {"imported": "datasets" in sys.modules}))
"""
GOOD = {
    "org/name": [{"text": f"t{i}", "label": ["bad", "good"][i % 2], "tags": ["short", "long"][: i % 3]} for i in range(10)],
    "org/name:test": [{"text": "untold", "label": None, "tags": None}],
    "org/name:train[:30%]": [{"text": f"t{i}", "label": ["bad", "good"][i % 2], "tags": ["short", "long"][:i]} for i in range(3)],
    "org/subsets@two": [{"a": 3, "b": 4}],
}  # fmt: skip
GOOD["org/name:train[1:2]+test"] = [GOOD["org/name"][1], *GOOD["org/name:test"]]
BAD = {
    "org/name:validation": ["`org/name` has no split `validation`. Its splits: train, test.", "`train[:80%]`"],
    "org/name:train[": ["`org/name` has no split `train[`."],
    "org/name@sst2": ["`org/name` has no subset `sst2`. Its subsets: default."],
    "org/subsets": ["`org/subsets` has several subsets. Its subsets: one, two. Name one: `org/subsets@one`."],
    "org/subsets@three:test": ["has no subset `three`. Its subsets: one, two."],
    "org/code": ["`org/code` needs code of its own, which is never run."],
    "org/broken": ["`org/broken` could not be fetched: JSON parse error"],
    "org/nothing": ["`org/nothing` could not be fetched: ", "doesn't contain any data files"],
    "org/gated": ["`org/gated` that you may read.", "a gated one your consent"],
    "data/rows": ["There is no file data/rows, and the hub has no data set `data/rows` that you may read."],
    "no--such/name": ["the hub has no data set `no--such/name`"],
    "buckets/name": ["`buckets/name` could not be fetched"],
}


class Hub(ThreadingHTTPServer):
    """A hub of this machine, and what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked = []


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Ask for references in a process of its own, as a worker would; returns the answers and what was printed."""
    home = tmp_path_factory.mktemp("hub")

    def ask(references, endpoint=None):
        state = "online" if endpoint else "offline"
        kept = {name: value for name, value in os.environ.items() if "PROGRESS" not in name and "TQDM" not in name}
        hub_names = {"HF_HUB_OFFLINE": "0" if endpoint else "1", "HF_ENDPOINT": endpoint or "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(home / "cache"), state, *references],
            env={**kept, **hub_names, "HF_HOME": str(home / state), "NO_PROXY": "127.0.0.1"},
            cwd=home, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(zip(references, map(json.loads, done.stdout.splitlines()), strict=True)), done.stderr

    return ask


@pytest.fixture(scope="module")
def answers(ask):
    """What a hub on this machine answers to all that is asked here."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found, printed = ask([*GOOD, *BAD], f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert any(line.startswith("GET /datasets/org/name/resolve/") for line in server.asked)
    assert "Generating" not in printed  # a progress bar; there is one display only
    return found


@pytest.mark.parametrize("reference", GOOD)
def test_the_hub_gives_rows_with_classes_by_name(answers, reference):
    assert answers[reference]["rows"] == GOOD[reference]


@pytest.mark.parametrize("reference", BAD)
def test_what_the_hub_does_not_have_is_told(answers, reference):
    for part in BAD[reference]:
        assert part in answers[reference]["error"]
    assert answers[reference]["cause"] != "None"


def test_a_fetched_data_set_needs_no_hub(answers, ask):
    offline, _ = ask([*GOOD, "org/name:train[5:]", "org/other"])
    for reference in GOOD:
        assert offline[reference] == {**answers[reference], "imported": False}
    for reference in ["org/name:train[5:]", "org/other"]:
        says = offline[reference]["error"]
        name = reference.partition(":")[0]
        assert f"There is no file {name}, and the data set `{name}` was not fetched yet: HF_HUB_OFFLINE is set." in says
        assert str(Path(answers["org/name"]["path"]).parent) in says


def test_a_file_that_was_deleted_is_fetched_anew(answers, ask):
    path = Path(answers["org/subsets@two"]["path"])
    content = path.read_bytes()
    path.unlink()
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        again, _ = ask(["org/subsets@two"], f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert again["org/subsets@two"]["rows"] == GOOD["org/subsets@two"]
    assert server.asked
    assert path.read_bytes() == content  # the same rows are the same fingerprint, so the same run
    assert [p.name for p in path.parent.iterdir() if not p.name.endswith(".parquet")] == []


def test_of_many_runs_only_those_shown_are_read(tmp_path, monkeypatch, capsys, make_run):
    import shutil

    from tune_magic import commands
    from tune_magic.magics.verbs import do_verb
    from tune_magic.storage.folder import RunFolder

    first = make_run().path
    for number in range(70):
        shutil.copytree(first, first.parent / f"20200101-{number:06d}-abcd")
    monkeypatch.chdir(first.parent.parent)
    read, real = [], RunFolder.summary
    monkeypatch.setattr(RunFolder, "summary", lambda run: read.append(run.id) or real(run))
    command = commands.COMMANDS["tune runs"]
    do_verb("runs", commands.parse(command, ""), None)
    shown = capsys.readouterr().out
    assert len(set(read)) == commands.SHOWN_RUNS
    assert first.name in shown
    assert "and 21 older: `--limit N` shows more" in shown
    do_verb("runs", commands.parse(command, "--limit 100"), None)
    assert "older" not in capsys.readouterr().out
