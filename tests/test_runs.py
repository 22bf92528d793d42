"""Runs as things to keep: compare, rename, note, delete, and what changed since the run before."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from test_view import Page

import tune_magic
from tune_magic import api, commands
from tune_magic.commands import BadUsage
from tune_magic.errors import TuneError
from tune_magic.handles import Run
from tune_magic.magics import verbs
from tune_magic.recipe.build import build_launch, build_recipe
from tune_magic.storage import places
from tune_magic.storage.cell import has_changed
from tune_magic.storage.folder import make_id
from tune_magic.view.listing import runs_table
from tune_magic.view.since import previous_run, since


@pytest.fixture
def launch(recipe, tmp_path, monkeypatch):
    """Start runs as a cell does, in this process, and return each."""
    monkeypatch.chdir(tmp_path)

    def start(name="bot", link=None, fresh=False, **changes):
        options = build_launch({"executor": "inline", "fresh": fresh, "output": str(tmp_path / "tune_runs")})
        run, _ = api.begin(build_recipe(recipe | {"max_steps": 4} | changes), options, name=name, link=link)
        return run

    return start


def do(line, notebook=None):
    verb, _, rest = line.partition(" ")
    parsed = commands.parse(commands.COMMANDS[f"tune {verb}"], rest)
    return verbs.do_verb(verb, parsed, api.load_run, notebook)


def test_ids_sort_by_when_they_were_made_and_two_of_one_moment_differ():
    second = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    moments = [second + timedelta(milliseconds=3 * i) for i in range(400)]
    ids = [make_id(moment) for moment in moments]
    assert ids == sorted(ids)
    assert len({run_id[:-2] for run_id in ids}) == 400
    assert ids[0].startswith("20260301-120000-22")
    assert make_id(second.replace(microsecond=999_999)).startswith("20260301-120000-zz")
    assert len({make_id(second) for _ in range(50)}) > 40


# --- compare ---------------------------------------------------------------------------------------------------------


def test_runs_side_by_side(slow, launch):
    first, second = launch("first"), launch("second", learning_rate=1e-3, method={"name": "lora", "r": 8})
    first.evaluate(metrics="loss")
    found = tune_magic.compare("first", second)
    assert found.differences == {"learning_rate": [1e-2, 1e-3], "method.r": [4, 8]}
    assert isinstance(found.recipes, pd.DataFrame)
    assert found.recipes.loc["method.r"].tolist() == [4, 8]
    metrics = found.metrics
    assert list(metrics.columns) == ["first", "second"]
    for run in (first, second):
        assert metrics.loc["held_out_loss", run.name] == run.metrics["held_out_loss"]
        assert metrics.loc["tokens", run.name] == sum(e["tokens"] for e in run.events("step"))
    assert pd.notna(metrics.loc["loss", "first"])
    assert pd.isna(metrics.loc["loss", "second"])  # it was not evaluated
    card = found.card()
    text = Page(card["text/html"]).text
    for part in ("learning_rate", "0.01", "0.001", "held-out loss", "peak memory", "first", "second"):
        assert part in text
    assert "method.r" in card["text/plain"]
    assert len(card["text/html"]) < 60_000
    assert card["text/html"].count("<img") == 1
    best = min((first, second), key=lambda run: run.metrics["held_out_loss"])
    assert f"{best.metrics['held_out_loss']:.3g}"[:3] in text


def test_equal_names_and_equal_recipes_are_told_apart(launch):
    first, second = launch("bot"), launch("bot", fresh=True)
    found = tune_magic.compare(first, second)
    assert found.names == [f"bot {first.id[-4:]}", f"bot {second.id[-4:]}"]
    assert found.differences == {}
    assert "The recipes are the same." in Page(found.card()["text/html"]).text


def test_other_rows_under_the_same_name_are_a_difference(launch, data_file):
    first = launch("bot")
    data_file.write_text(data_file.read_text().replace("item 1 ", "thing 1 "))
    found = tune_magic.compare(first, launch("bot"))
    ((key, values),) = found.differences.items()
    assert key == "content of train"
    assert values[0] != values[1]


def test_one_run_is_no_comparison(launch):
    run = launch()
    with pytest.raises(TuneError, match="two runs"):
        tune_magic.compare(run)
    with pytest.raises(BadUsage, match="is missing"):
        do("compare bot")


def test_many_steps_and_many_runs_stay_small(make_many):
    found = tune_magic.compare(*make_many)
    assert len(found.card()["text/html"]) < 60_000


@pytest.fixture
def make_many(tmp_path):
    from test_diagnosis import falling

    from tune_magic.storage import folder
    from tune_magic.storage.events import EventLog

    runs = []
    for number in range(8):
        path = folder.create(tmp_path / "tune_runs", "finetune", {"name": f"run{number}", "recipe": {}})
        with EventLog(path / "events.jsonl") as log:
            log.append("state", state="running", from_step=0)
            for step, loss in enumerate(falling(steps=2000, seed=number), start=1):
                log.append("step", step=step, loss=loss, grad_norm=1.0, learning_rate=1e-4, tokens=9, seconds=0.1)
                if step % 50 == 0:
                    log.append("eval", step=step, loss=loss, seconds=0.1)
            log.append("state", state="finished")
        runs.append(Run(path))
    return runs


# --- what changed in a cell ------------------------------------------------------------------------------------------


def cell(notebook, source, cell_id="c1"):
    return {"notebook": str(notebook), "cell_id": cell_id, "source": source}


def test_a_changed_cell_says_what_changed_and_what_came_of_it(launch, tmp_path):
    notebook = tmp_path / "n.ipynb"
    first = launch("bot", cell(notebook, "a"))
    other = launch("other", cell(notebook, "x", "c2"), seed=3)
    second = launch("bot", cell(notebook, "b"), learning_rate=1e-4)
    assert previous_run(first) is None
    assert since(first) is None
    assert previous_run(second).id == first.id
    assert previous_run(other) is None
    old, new = first.metrics["held_out_loss"], second.metrics["held_out_loss"]
    text = since(second)
    assert text.startswith(f"since {first.id}: learning_rate 0.01 → 0.0001 · held-out loss")
    assert text.endswith("better" if new < old else "worse")
    assert text in Page(second.card()["text/html"]).text
    assert text in second.card()["text/plain"]
    assert "learning_rate 0.01 → 0.0001" in runs_table([second, first])["text/plain"]
    first.delete()
    assert since(Run(second.path)) is None


def test_outside_a_notebook_the_run_before_has_the_same_name(launch):
    first, other, second = launch("bot"), launch("else", seed=4), launch("bot", seed=5)
    assert previous_run(second).id == first.id
    assert previous_run(other) is None


def test_a_card_tells_that_its_cell_has_changed(launch, tmp_path):
    path = tmp_path / "n.ipynb"
    body = "model: tiny\n"
    run = launch("bot", cell(path, body))

    def saved(text, cell_id="c1"):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"%%finetune bot\n{text}", id=cell_id)])
        path.write_text(nbformat.writes(notebook))

    assert not has_changed(run.link)  # not saved yet: nothing is known
    saved(body.strip())
    assert not has_changed(run.link)
    saved(body + "seed: 3\n")
    assert has_changed(run.link)
    assert "the cell has changed since this run" in run.card()["text/plain"]
    assert "the cell has changed" in runs_table([run])["text/plain"]
    saved(body + "seed: 3\n", cell_id="c9")
    assert not has_changed(run.link)  # the cell is gone
    path.write_text("{no json")
    assert not has_changed(run.link)
    path.write_text(json.dumps({"cells": [{"id": "c1", "source": None}]}))
    assert not has_changed(run.link)


def test_runs_of_this_notebook(launch, tmp_path, capsys):
    notebook = str(tmp_path / "n.ipynb")
    launch("mine", cell(notebook, "a"))
    launch("other", cell(tmp_path / "m.ipynb", "a"), seed=3)
    do("runs --here", notebook)
    shown = capsys.readouterr().out
    assert "mine" in shown
    assert "other" not in shown
    do("runs", notebook)
    assert "other" in capsys.readouterr().out
    with pytest.raises(BadUsage, match="which notebook"):
        do("runs --here")


# --- keep, name, delete ----------------------------------------------------------------------------------------------


def test_a_run_is_renamed_and_annotated(launch, capsys):
    run = launch("bot")
    do("rename bot helper")
    assert "bot is called helper now" in capsys.readouterr().out
    assert api.load_run("helper").id == run.id
    do("note helper the one with clean rows")
    assert Run(run.path).meta == {"name": "helper", "note": "the one with clean rows"}
    assert "the one with clean rows" in Run(run.path).card()["text/plain"]
    assert "helper · the one with clean rows" in runs_table([Run(run.path)])["text/plain"]
    do("note helper -")
    assert Run(run.path).meta == {"name": "helper"}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["", "two words", "a/b", "..\\x", "a\nb", "x" * 200, "'q'", "$x"])
def test_a_name_is_one_that_can_be_typed(launch, name):
    with pytest.raises(TuneError, match="cannot be a run's name"):
        launch().rename(name)


@pytest.mark.parametrize(("answer", "stays"), [("n", True), ("", True), ("yes", False), (" Y ", False)])
def test_rm_asks(launch, monkeypatch, capsys, answer, stays):
    run = launch("bot")
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    do("rm bot")
    assert "Delete bot (finished" in asked[0]
    assert run.path.exists() == stays
    assert ("stays" if stays else "is deleted") in capsys.readouterr().out
    assert [p.name for p in run.path.parent.iterdir() if p.name != run.id] == []  # nothing half-deleted


def test_rm_where_nobody_can_be_asked_needs_yes(launch, monkeypatch):
    run = launch("bot")

    def nobody(_question):
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    with pytest.raises(BadUsage, match=r"%tune rm bot --yes"):
        do("rm bot")
    assert run.path.exists()
    do("rm bot --yes")
    assert not run.path.exists()
    assert list(places.folders([run.path.parent])) == []


def test_a_run_that_is_worked_on_is_not_deleted(make_run):
    from tune_magic.storage.lock import Lock

    run = make_run()
    with Lock(run.path / "owner.lock"), pytest.raises(TuneError, match="Stop it first"):
        run.delete()
    assert run.path.exists()


def test_the_code_of_a_run_trains_it_again(launch, tmp_path, capsys):
    run = launch("bot", learning_rate=1e-3)
    do("export-code bot")
    code = capsys.readouterr().out
    assert code.startswith("import tune_magic\n")
    do("export-code bot --output again.py")
    assert (tmp_path / "again.py").read_text() == code
    with pytest.raises(BadUsage, match="there already"):
        do("export-code bot --output again.py")
    do("export-code bot --for yaml --output again.yaml")
    assert "learning_rate: 0.001" in (tmp_path / "again.yaml").read_text()
    names: dict = {}
    exec(Path("again.py").read_text(), names)
    assert names["bot"].id == run.id  # the same recipe is the same run
