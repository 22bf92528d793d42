"""Every example of docs/PLUGINS.md is executed, and what it defines is trained with."""

import json
import re
from pathlib import Path

import pytest

from tune_magic import plugins
from tune_magic.recipe import build_recipe
from tune_magic.recipe.build import load_recipe

TEXT = (Path(__file__).parent.parent / "docs" / "PLUGINS.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
RECIPES = re.findall(r"^    ((?:objective|callbacks): .*)$", TEXT, re.MULTILINE)


@pytest.fixture
def page(monkeypatch):
    """What the page's examples define, one after the other, as in one notebook."""
    monkeypatch.setattr(plugins, "_local", {})
    names = {"__name__": "a_page"}
    for block in BLOCKS:
        exec(compile(block, "PLUGINS.md", "exec"), names)
    return names


def test_the_examples_define_what_the_page_speaks_of(page):
    kinds = {kind for kind, _ in plugins._local}
    assert kinds == {"objective", "metric", "callback", "method", "format"}
    assert len(BLOCKS) == 9
    assert len(RECIPES) == 4
    for line in RECIPES:
        load_recipe(f"model: m\ndata: rows.jsonl\n{line}")


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "unsure", "callbacks": ["spikes", {"name": "plateau", "patience": 1}]},
        {"objective": {"name": "token_focal", "gamma": 1.5}, "method": {"name": "every_other", "first": 1}},
    ],
)
def test_the_examples_train(page, train, changes):
    run = train(max_steps=4, eval={"steps": 2, "samples": 0}, **changes)
    run.raise_for_state()
    assert run.summary().best["loss"] < run.summary().evaluations[0]["loss"]
    if "callbacks" in changes:
        assert run.history["spikes.excess"].notna().all()


def test_the_examples_of_rows_train(page, train, write):
    rows = "".join(json.dumps({"text": f"it is {c} {i}", "label": c}) + "\n" for i in range(8) for c in ("red", "blue"))
    train(objective="smooth", data={"train": str(write("labels.jsonl", rows))}, max_steps=2).raise_for_state()
    riddles = "".join(json.dumps({"riddle": f"what is {i}?", "solution": "a number"}) + "\n" for i in range(24))
    run = train(data={"train": str(write("riddles.jsonl", riddles)), "format": "riddle"}, max_steps=2)
    run.raise_for_state()
    assert run.summary().plan["train_rows"] > 0


def test_the_metric_of_the_page_scores(page):
    metric = plugins.get("metric", "same_first_word")()
    assert (metric.score("a b", "a c"), metric.score("b", "a")) == (1.0, 0.0)


def test_the_test_classes_of_the_page_pass(page, full):
    for name in ("TestEveryOther", "TestFocal", "TestPlateau"):
        case = page[name]
        case.setup_class()
        try:
            tests = [test for test in dir(case) if test.startswith("test_")]
            assert tests
            for test in tests if full else tests[:2]:
                if not (test == "test_it_says_what_it_is" and not case.plugin.summary):
                    getattr(case(), test)()
        except pytest.skip.Exception:
            pass
        finally:
            case.teardown_class()


def test_every_kind_has_its_row():
    for kind in plugins.KINDS:
        assert f"| {kind} | `@tune_magic." in TEXT
    assert build_recipe({"model": "m", "data": "rows.jsonl"}).callbacks == []
