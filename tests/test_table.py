"""Examples on disk: what comes out is what went in, and memory does not grow with the rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import table_of
from test_tree_attention import random_examples

from tune_magic import files
from tune_magic.data.example import Example, Segment
from tune_magic.data.table import TableWriter
from tune_magic.errors import RunFailed
from tune_magic.training import source


def flat(example):
    """Return what an example holds, comparable."""
    segments = [(s.tokens.tolist(), s.weights.tolist()) for s in (example.trunk, *example.branches)]
    names = ("answer_start", "question", "reference", "num_cut", "index", "label")
    return segments, [getattr(example, name) for name in names]


def with_texts(count=40):
    """Examples with every combination of fields, umlauts and empty texts among them."""
    texts = [None, "", "ä" * 3, "plain", "\x00 and \n"]
    found = []
    for number, example in enumerate(random_examples(3, count=count)):
        own = {"question": texts[number % 5], "reference": texts[number // 5 % 5], "answer_start": number % 3}
        found.append(Example(example.trunk, example.branches, num_cut=number % 4, index=7 * number, **own))
    return found


def test_examples_come_out_as_they_went_in(tmp_path):
    rows = with_texts()
    with TableWriter(tmp_path) as writer:
        writer.add(rows[:11])
        writer.add([])
        writer.add(rows[11:])
        table = writer.table()
    assert list(tmp_path.iterdir()) == []  # the files have no names, and the table outlives its writer
    assert [flat(example) for example in table] == [flat(example) for example in rows]
    assert [flat(example) for example in table[3:9:2]] == [flat(example) for example in rows[3:9:2]]
    assert flat(table[-1]) == flat(rows[-1])
    assert table.lengths.tolist() == [len(example) for example in rows]
    assert table.weights.tolist() == [example.weight for example in rows]
    assert table.num_cut.tolist() == [example.num_cut for example in rows]
    assert table.labels is None
    assert table.has_branches
    for place in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            table[place]


def test_some_rows_of_a_table_are_a_table(tmp_path):
    table = table_of(with_texts(), tmp_path)
    some = table.take([5, 3, 30]).take([2, 0])
    assert [flat(example) for example in some] == [flat(table[30]), flat(table[5])]
    assert some.lengths.tolist() == [len(table[30]), len(table[5])]
    assert [example.number for example in some] == [30, 5]


def test_a_table_without_rows_or_texts(tmp_path):
    empty = table_of([], tmp_path)
    assert (len(empty), list(empty), empty.labels, empty.has_branches) == (0, [], None, False)
    labelled = [Example(Segment(np.array([n], np.int32), np.zeros(1, np.float32)), label=n) for n in (2, 0)]
    table = table_of(labelled, tmp_path)
    assert table.labels.tolist() == [2, 0]
    assert [example.label for example in table] == [2, 0]
    assert table.weights.tolist() == [1.0, 1.0]


def test_examples_of_two_tables_are_told_apart(tmp_path):
    with TableWriter(tmp_path, offset=3) as writer:
        writer.add(random_examples(0, count=2))
        assert [example.number for example in writer.table()] == [3, 4]


# --- rows in parts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(source, "_PART_ROWS", 5)


def test_rows_read_in_parts_train_as_rows_read_at_once(train, small_parts, monkeypatch):
    from test_training import losses

    in_parts = train()
    monkeypatch.setattr(source, "_PART_ROWS", 1000)
    at_once = train()
    assert losses(in_parts) == losses(at_once)
    plans = [run.summary().plan for run in (in_parts, at_once)]
    for key in ("train_rows", "held_out_rows", "tokens_per_epoch", "trained_tokens_per_epoch", "lens"):
        assert plans[0][key] == plans[1][key]


def test_faults_of_all_parts_are_told_at_once(train, write, small_parts):
    good = json.dumps({"prompt": "p", "completion": "c"})
    bad = json.dumps({"prompt": "p"})
    with pytest.raises(RunFailed, match=r"(?s)2 bad rows\..*line 3: column `completion` is missing.*line 14"):
        train(
            data={"train": str(write("a.jsonl", "\n".join([good, good, bad] + [good] * 10 + [bad])))}
        ).raise_for_state()
    long = json.dumps({"prompt": "p " * 300, "completion": "c"})
    with pytest.raises(RunFailed, match=r"(?s)2 bad rows\..*line 2: no trained token.*line 8.*Raise `max_length`"):
        train(
            data={"train": str(write("b.jsonl", "\n".join([good, long] + [good] * 5 + [long])))}, max_length=64
        ).raise_for_state()


def test_a_column_may_first_come_late_but_must_come(train, write, small_parts):
    rows = [{"q": f"p{i}", "completion": "c"} | ({"s": "be brief"} if i == 11 else {}) for i in range(12)]
    data = {"train": str(write("a.jsonl", "\n".join(map(json.dumps, rows)))), "columns": {"prompt": "q", "system": "s"}}
    assert train(data=data | {"held_out": 0}, max_steps=1).summary().plan["train_rows"] == 12
    data["columns"]["system"] = "t"
    with pytest.raises(RunFailed, match="no column `t`"):
        train(data=data).raise_for_state()


def test_classes_are_learned_from_all_parts(train, write, small_parts):
    rows = [{"text": f"text {i}", "label": "late" if i > 20 else "early"} for i in range(30)]
    plan = (
        train(data={"train": str(write("a.jsonl", "\n".join(map(json.dumps, rows)))), "held_out": 0}, max_steps=1)
        .summary()
        .plan
    )
    assert plan["objective"]["classes"] == ["early", "late"]
    assert plan["class_rows"] == {"early": 21, "late": 9}


def test_f23_a_disk_without_room_for_the_tokens_says_so(train, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.Scratch, "append", full)
    with pytest.raises(RunFailed, match=r"cannot be kept as tokens.*No space left"):
        train().raise_for_state()


_GROWTH = """
import json, sys
from pathlib import Path
from conftest import make_tokenizer
from tune_magic.recipe import build_recipe
from tune_magic.training.dataset import Rows
from tune_magic.training.memory import peak_rss
tokenizer = make_tokenizer()
def read(path):
    data = {"train": path, "held_out": 0.1, "chat_template": False}
    found = Rows(build_recipe({"model": "m", "data": data}), Path(path).parent, tokenizer, 256).dataset()
    return sum(len(example) for example in found.train[::5000])
read(sys.argv[1])
before = peak_rss()
read(sys.argv[2])
print(peak_rss() - before)
"""


def test_memory_does_not_grow_with_the_rows(write, own_home):
    """The content of 54,000 more rows is on disk; in memory, each costs its facts and its place in the split."""
    line = json.dumps({"prompt": "p " * 50, "completion": "c " * 10}) + "\n"
    small, large = write("small.jsonl", line * 20_000), write("large.jsonl", line * 74_000)
    command = [sys.executable, "-c", _GROWTH, str(small), str(large)]
    # with an arena for each thread, what glibc keeps of freed memory differs by several megabytes from run to run
    surroundings = os.environ | {"MALLOC_ARENA_MAX": "1", "XDG_CACHE_HOME": str(own_home)}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, env=surroundings, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10e6  # as Python objects 54,000 rows of 120 tokens were 75 MB
