"""All exports of a run: a table, a figure, a card."""

import json

import pytest

from tune_magic.commands import COMMANDS, parse
from tune_magic.errors import TuneError
from tune_magic.exported import ExportedForms
from tune_magic.magics import verbs

PARITY = {
    "rows": 8, "logit_difference": 0.5, "largest_logit": 10.0, "same_answers": 8, "trained_right": 7, "exported_right": 7,
    "trained_loss": 0.25, "exported_loss": 0.26, "trained_seconds": 0.02, "exported_seconds": 0.01, "unit": "token",
    "split": "held-out", "computed_by": "ONNX Runtime", "ok": True, "complaints": [],
}  # fmt: skip


@pytest.fixture
def exported(make_run):
    """A run with four receipts: whole, smaller, ruined, and one without rows."""

    def start(**changes):
        run = make_run()
        kinds = {
            "20260101-a": ("merged", None, 4_000_000, {}),
            "20260102-b": ("onnx", "int8", 1_000_000, {"logit_difference": 1.5}),
            "20260103-c": ("gguf", "q4_0", 600_000, {"same_answers": 2, "exported_right": 1, "ok": False}),
            "20260104-d": ("adapter", None, 50_000, None),
        }
        for name, (to, quantize, size, change) in kinds.items():
            job = run.path / "exports" / name
            job.mkdir(parents=True)
            parity = {"ok": None, "complaints": ["gone"]} if change is None else {**PARITY, **change, **changes}
            receipt = {"format": 1, "to": to, "quantize": quantize, "path": "files", "size_bytes": size, "files": {},
                       "step": 4, "parity": parity}  # fmt: skip
            (job / "receipt.json").write_text(json.dumps(receipt))
        return run

    return start


def test_the_table_has_a_line_for_each_export(exported):
    table = exported().export_table().set_index("to")
    assert list(table.index) == ["adapter", "gguf", "onnx", "merged"]  # newest first
    assert table.loc["onnx", ["quantize", "size_bytes", "logit_share", "right_share"]].tolist() == [
        "int8", 1_000_000, 0.15, 7 / 8,
    ]  # fmt: skip
    assert table.loc["gguf", "same_share"] == 0.25
    assert not table.loc["gguf", "ok"]
    assert table.loc["adapter", "rows"] != table.loc["adapter", "rows"]  # nothing was compared
    assert table.loc["merged", "exported_loss"] == 0.26


def test_quality_and_latency_stand_against_size(exported):
    quality, speed = exported().plot_exports().axes
    labels = {text.get_text(): text.xy for text in quality.texts}
    assert labels == {"merged": (4.0, 87.5), "onnx int8": (1.0, 87.5), "gguf q4_0": (0.6, 12.5)}
    assert quality.get_title(loc="left") == "right answers in %"
    assert speed.get_title(loc="left") == "ms a token"
    assert {text.xy[1] for text in speed.texts} == {10.0}


def test_where_nobody_knows_what_is_right_answers_are_compared(exported):
    quality, _ = exported(trained_right=None, exported_right=None).plot_exports().axes
    assert quality.get_title(loc="left") == "same answers in %"
    assert sorted(text.xy[1] for text in quality.texts) == [25.0, 100.0, 100.0]


def test_the_card_is_sorted_by_size_and_names_what_is_lost(exported):
    card = ExportedForms(exported()).card()
    lines = card["text/plain"].splitlines()
    assert lines[0].endswith("4 exports")
    assert [line.split(" · ")[0].strip() for line in lines[1:]] == ["adapter", "gguf q4_0", "onnx int8", "merged"]
    assert "2 of 8 · 7 → 1 · 5.00% · 0.250 → 0.260 · 10.0 ms a token · out of tolerance" in lines[2]
    assert "not compared" in lines[1]
    assert "quality and latency against size of 4 exports" in card["text/html"]


def test_the_verb_shows_them(exported, capsys):
    run = exported()
    verbs.do_verb("exports", parse(COMMANDS["tune exports"], "tiny_run"), lambda name: run)
    assert "tiny_run: 4 exports" in capsys.readouterr().out


def test_a_run_that_was_not_exported_says_how(make_run):
    with pytest.raises(TuneError, match=r"was not exported yet.*`%export tiny_run --to merged`"):
        ExportedForms(make_run())
