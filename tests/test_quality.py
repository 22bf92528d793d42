"""The report on rows: what it recognises and why, what it finds wrong, and that it is what is trained."""

import json

import pandas as pd
import pytest
from test_view import Page

import tune_magic
from tune_magic import api, cli
from tune_magic.errors import RunFailed


@pytest.fixture
def look(tiny, write, monkeypatch, tmp_path):
    """Look at rows, in this process, and return the report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tune_magic.launching.local.start", _inline(api.launching.local.start))

    def look_at(rows, **keys):
        data = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)) if isinstance(rows, list) else rows
        return tune_magic.inspect(data, model=str(tiny), **keys)

    return look_at


def _inline(start):
    return lambda folder, executor="worker": start(folder, "inline")


def sums(count, start=0):
    return [{"prompt": f"{i} and {i}?", "completion": f"it is {2 * i}"} for i in range(start, start + count)]


def kinds(report):
    return {finding["kind"]: finding for finding in report.facts["findings"]}


def test_good_rows_have_nothing_to_complain_of(look):
    report = look(sums(100), **{"data.held_out": 0.2})
    assert report.facts["findings"] == []
    text = report.card()["text/plain"]
    assert "nothing to complain of" in text
    assert "format: prompt_completion (columns prompt, completion)" in text
    assert "80 to train, 20 held out" in text
    assert repr(report) == "<DataReport 80 rows, 0 findings>"
    assert list(report.findings.columns) == ["kind", "says", "count", "rows", "change"]


def test_each_fault_is_found_with_its_rows(look, write):
    rows = sums(100)
    rows += [rows[6], {"prompt": "3 and 3?", "completion": "no idea"}, {"prompt": "long", "completion": "x" * 300}]
    held_out = write("held.jsonl", "".join(json.dumps(row) + "\n" for row in [*sums(20, 200), rows[0], rows[1]]))
    found = kinds(look(rows, **{"data.held_out": str(held_out), "max_length": 200}))
    assert set(found) == {"leak", "contradiction", "copy", "cut"}
    assert found["leak"]["rows"] == [21, 22]
    assert found["contradiction"]["rows"] == [4, 102]
    assert found["copy"]["rows"] == [101]
    assert found["cut"]["rows"] == [103]
    assert found["cut"]["change"] == "max_length: 384"
    cured = look(rows, **{"data.held_out": str(held_out), "max_length": 384})
    assert "cut" not in kinds(cured)  # the line it offers helps


@pytest.mark.parametrize(("counts", "kind", "says"), [
    ({"a": 90, "b": 3}, "rare_class", "b: fewer than 8 rows"),
    ({"a": 200, "b": 12}, "uneven_classes", "only"),
    ({"a": 60, "b": 40}, None, ""),
])  # fmt: skip
def test_classes_are_weighed(look, counts, kind, says):
    rows = [{"text": f"{label} {i}", "label": label} for label, count in counts.items() for i in range(count)]
    report = look(rows)
    assert report.facts["format"] == "text_label"
    assert set(kinds(report)) == ({kind} if kind else set())
    assert says in report.card()["text/plain"]
    assert f"2 classes: a {report.facts['class_rows']['a']}, b" in report.card()["text/plain"]


def test_the_same_text_of_two_classes_contradicts(look):
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(60)]
    found = kinds(look([*rows, {"text": "t0", "label": "b"}]))
    assert found["contradiction"]["rows"] == [1, 61]


def test_plain_texts_ask_nothing_so_nothing_contradicts(look):
    assert kinds(look([{"text": f"word {i % 70}"} for i in range(100)])).keys() <= {"copy", "leak"}


def test_it_is_what_a_run_trains(look, train, write):
    rows = sums(60)
    report = look(rows, max_length=64)
    run = train(
        data={"train": str(write("rows.jsonl", "".join(json.dumps(r) + "\n" for r in rows)))},
        max_length=64,
        max_steps=1,
    )
    plan = run.summary().plan
    shared = ("train_rows", "held_out_rows", "tokens_per_epoch", "trained_tokens_per_epoch", "lens", "max_length")
    assert {key: report.facts[key] for key in shared} == {key: plan[key] for key in shared}


def test_columns_are_mapped_and_the_reason_said(look):
    rows = [{"q": f"{i}?", "a": f"yes {i}", "id": i} for i in range(60)]
    report = look(rows, **{"data.columns": {"prompt": "q", "completion": "a"}})
    assert "prompt_completion (columns q as prompt, a as completion; also there: id)" in report.card()["text/plain"]
    with pytest.raises(RunFailed, match="the columns `q`, `a`, `id` are no format that is known"):
        look(rows)


def test_few_rows_are_said_to_be_few(look):
    assert "few" in kinds(look(sums(30)))


def test_a_frame_is_looked_at_too(look):
    assert look(pd.DataFrame(sums(80))).facts["train_rows"] == 64


def test_f30_hostile_rows_do_nothing(look):
    evil = "<script>alert(1)</script>\x1b[31m"
    rows = [{"text": f"{evil} {i}", "label": evil if i % 2 else "b"} for i in range(60)]
    card = look([*rows, rows[0]], max_length=24).card()
    assert "<script" not in card["text/html"]
    assert "\x1b" not in card["text/html"] + card["text/plain"]
    assert "<script>" in Page(card["text/html"]).text


def test_the_command_line_has_it(look, tiny, write, capsys):
    path = write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in sums(90)))
    assert cli.main(["data", str(path), "--model", str(tiny), "max_length=64"]) == 0
    assert "rows.jsonl: data · nothing to complain of" in capsys.readouterr().out
    assert cli.main(["data", str(path), "--model", str(tiny), "max_lenght=64"]) == 1
    assert "max_length" in capsys.readouterr().err


def test_the_report_shows_some_and_trains_none(look, tmp_path):
    (tmp_path / "words.tsv").write_text("quick\tfast, speedy\n")
    rows = [{"text": f"the quick order {i}", "label": "ab"[i % 2]} for i in range(60)]
    report = look(
        rows, **{"data.augment": [{"kind": "synonyms", "lexicon": "words.tsv"}, "noise"], "data.held_out": 0.2}
    )
    assert report.facts["train_rows"] == 48
    assert [(about["kind"], about["rows"], len(about["shown"])) for about in report.facts["augmented"]] == [
        ("synonyms", 24, 3),
        ("noise", 24, 3),
    ]
    text = report.card()["text/plain"]
    assert "to be made by synonyms: 24 rows (the quick order " in text
    assert " → " in text
