"""Every bad file a user may have: one error, naming file, place and what to do, and nothing half-written left behind."""

import json
import os
import re

import pytest

from tune_magic.errors import RunFailed

GOOD = '{"prompt": "p", "completion": "c"}\n'
BAD = [
    # what it is, its name, its content, what the error says
    ("truncated JSON", "a.jsonl", GOOD * 40 + '{"prompt": "p", "comp', [r"a\.jsonl: 1 bad row", r"line 41, column \d+: not JSON", "Each line must be one JSON object"]),
    ("a truncated array", "a.json", "[" + GOOD.strip() + ',\n {"prompt": "p', [r"a\.json, line 2, column \d+: not JSON"]),
    ("an array called lines", "a.jsonl", json.dumps([{"prompt": "p", "completion": "c"}] * 3), [r"line 1: must be an object", "Each line must be one JSON object"]),
    ("lines called an array", "a.json", GOOD * 3, [r"a\.json, line 2, column 1: not JSON", r"One object per line\? Then call the file \.jsonl"]),
    ("latin-1", "a.jsonl", (GOOD * 5).encode() + '{"prompt": "café, déjà vu, à la carte", "completion": "ça va"}\n'.encode("latin-1"), ["line 6: byte 16 is not UTF-8", "It looks like ", "read_text"]),
    ("utf-16", "a.csv", "prompt,completion\np,c\n".encode("utf-16"), [r"a\.csv, line 1: byte 1 is not UTF-8", "looks like utf-16"]),
    ("a ragged table", "a.csv", "prompt,completion\n" + "p,c\n" * 9 + "p\nc,d,e\n", [r"a\.csv: 2 bad rows", "line 11: 1 cell for 2 columns", "line 12: 3 cells for 2 columns", "separated by commas"]),
    ("an open quote", "a.csv", 'prompt,completion\np,"c\n', ["line 2: a quote is not closed", "written twice"]),
    ("mixed types", "a.jsonl", GOOD * 9 + '{"prompt": 3, "completion": ["c"]}\n', ["line 10: column `prompt` must be text, got int: `3`"]),
    ("null bytes", "a.csv", "prompt,completion\np,c\np,\x00c\n", ["line 3: holds a null byte", "Is it a text at all"]),
    ("null bytes in lines", "a.jsonl", GOOD + "\x00\x00\x00\n", ["line 2, column 1: not JSON"]),
    ("columns named twice", "a.csv", "prompt,prompt,completion\n1,2,3\n", ["line 1: the column `prompt` is there twice"]),
    ("keys named twice", "a.jsonl", '{"prompt": "p", "prompt": "q", "completion": "c"}\n', ["line 1: the key `prompt` is there twice"]),
    ("a column without a name", "a.csv", ",prompt,completion\n0,p,c\n", ["column 1 has no name", "index=False"]),
    ("an empty file", "a.jsonl", "", [r"a\.jsonl has no rows"]),
    ("an empty table", "a.csv", "", [r"a\.csv is empty", "first line must name the columns"]),
    ("a table of names alone", "a.csv", "prompt,completion\n", [r"a\.csv has no rows, only the names of columns"]),
    ("an empty text", "a.txt", "\n \n", [r"a\.txt has no rows"]),
    ("no table at all", "a.parquet", "PAR1", [r"a\.parquet is not a Parquet file"]),
    ("no Arrow at all", "a.arrow", "ARROW1", [r"a\.arrow is not an Arrow file"]),
    ("a spreadsheet", "a.xlsx", "PK", [r"a\.xlsx is not a kind of file that can be read", r"\.jsonl, \.json, \.csv"]),
    ("unknown columns", "a.csv", "foo,bar\n1,2\n", ["the columns `foo`, `bar` are no format that is known", "columns: {prompt: YOURS"]),
    ("a partial row", "a.jsonl", GOOD * 9 + '{"prompt": "p"}\n', ["line 10: column `completion` is missing"]),
    ("one row", "a.jsonl", '{"text": "t", "label": "x"}\n', ["one class only"]),
]  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "content", "says"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_a_bad_file_is_one_error_in_words(train, write, name, content, says):
    path = write(name, content)
    before = path.read_bytes()
    with pytest.raises(RunFailed) as caught:
        train(data=str(path)).raise_for_state()
    message = str(caught.value)
    for part in says:
        assert re.search(part, message), message
    assert len(message) < 900
    assert path.read_bytes() == before
    run = caught.value.run
    assert not run.checkpoints
    assert not [p.name for p in run.path.rglob("*") if p.name.startswith((".tmp", ".trash"))]
    assert "Traceback" not in run.card()["text/plain"]


def test_a_cell_of_10_mb_is_read_and_cut(slow, train, write):
    rows = [{"prompt": "p", "completion": f"c {i}"} for i in range(20)] + [
        {"prompt": "big", "completion": "x" * 10_000_000}
    ]
    path = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    run = train(data={"train": str(path), "held_out": 0}, max_steps=1)
    assert run.status == "finished"
    assert run.summary().plan["cut_rows"] == 1
    assert (run.path / "events.jsonl").stat().st_size < 100_000  # nothing of it goes into the log


def test_folders_missing_and_forbidden_files(train, tmp_path, write, monkeypatch):
    write("rows.jsonl", GOOD)
    cases = [
        (tmp_path, r"is a folder\. Name a file in it: rows\.jsonl"),
        (tmp_path / "gone.jsonl", "There is no file"),
        (tmp_path / ("x" * 300 + ".jsonl"), "is no path: File name too long|There is no file"),
    ]
    if os.geteuid():  # root may read anything
        forbidden = write("mine.jsonl", GOOD)
        forbidden.chmod(0)
        cases.append((forbidden, r"mine\.jsonl cannot be read: Permission denied"))
    for path, says in cases:
        with pytest.raises(RunFailed, match=says):
            train(data=str(path)).raise_for_state()

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    path = write("b.jsonl", GOOD)
    monkeypatch.setattr("tune_magic.data.read._open_bytes", denied)
    with pytest.raises(RunFailed, match=r"b\.jsonl cannot be read: Permission denied"):
        train(data=str(path)).raise_for_state()


def test_a_hub_id_without_a_network_says_so(train, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RunFailed, match=r"data set `nobody/nothing` was not fetched yet: HF_HUB_OFFLINE is set.*Fetch it once"
    ):
        train(data="nobody/nothing").raise_for_state()
