"""Panels without a browser: the form is the schema, callbacks only leave requests, views are plain HTML."""

import json
import threading

import ipywidgets
import pandas as pd
import pytest
from test_view import Page
from tune_magic.widgets import FinetunePanel, MemoryGauge, RunPanel
from tune_magic.widgets import panel as panel_module
from tune_magic.widgets.memory_gauge import gauges
from tune_magic.widgets.panel import Panel

import tune_magic
from tune_magic.errors import TuneError
from tune_magic.recipe import build_recipe
from tune_magic.recipe.build import keys
from tune_magic.view.form import form_bundle
from tune_magic.view.html import note_bundle
from tune_magic.view.memory import Gauge, gauges_bundle


def set_all(panel, **values):
    for key, value in values.items():
        panel.fields[key.replace("__", ".")].value = value


def test_the_form_has_a_field_with_help_for_every_key():
    panel = FinetunePanel()
    every = {key for key, _, _ in keys()}
    parts = {key.rpartition(".")[0] for key in every}
    assert set(panel.fields) == every - parts
    shown = {field for box in panel.controls.children for field in walk(box)}
    method_keys = {
        key
        for key in panel.fields
        if key.startswith("method.") and key not in ("method.name", *panel._form.method_keys())
    }
    assert {key for key, field in panel.fields.items() if field not in shown} == method_keys
    for key, field in panel.fields.items():
        assert field.tooltip, key


def walk(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


def test_what_is_typed_is_the_recipe_a_cell_would_give():
    panel = FinetunePanel("bot", model="tiny", data="rows.jsonl", method={"name": "lora", "rank": 8}, lr=1e-3)
    set_all(
        panel,
        batch_size="4",
        eval__steps="10",
        data__held_out="20%",
        data__columns="{prompt: q, completion: a}",
        lr_scheduler_type="cosine",
    )
    expected = build_recipe(
        {"model": "tiny", "data": {"train": "rows.jsonl", "held_out": "20%", "columns": {"prompt": "q", "completion": "a"}},
         "method": {"name": "lora", "r": 8}, "learning_rate": 1e-3, "batch_size": 4, "eval": {"steps": 10}, "lr_scheduler_type": "cosine"}
    )  # fmt: skip
    assert panel.recipe == expected
    text = panel.bundle()["text/plain"]
    assert text.startswith("%%finetune bot\nmodel: tiny\n")
    from tune_magic.recipe.build import load_recipe

    assert load_recipe(text.partition("\n")[2]) == expected  # pasted into a cell, it is the same recipe


def test_faults_are_told_while_they_are_typed_and_go_with_their_cause():
    panel = FinetunePanel(model="tiny", data="rows.jsonl")
    set_all(panel, batch_size="none", learning_rate="-1", data__template="{a")
    assert panel.recipe is None
    text = panel.bundle()["text/plain"]
    for part in (
        "`batch_size`: must be a whole number, got 'none'.",
        "`learning_rate`: must be greater than 0",
        "brace",
    ):
        assert part in text
    panel.act()
    assert panel.start.disabled
    set_all(panel, batch_size="", learning_rate="", data__template="")
    assert panel.recipe is not None
    assert "!" not in panel.bundle()["text/plain"]


def test_another_method_brings_its_own_fields_and_forgets_the_others():
    panel = FinetunePanel(model="tiny", data="rows.jsonl", method={"name": "lora", "r": 8})
    panel.fields["method.name"].value = "freeze"
    assert panel.recipe.given()["method"] == {"name": "freeze"}
    assert [field.description for field in panel._method_box.children] == ["trainable_layers"]
    panel.fields["method.name"].value = "lora"
    assert panel.recipe.method.r == 8


def test_a_start_is_done_by_the_panels_thread_not_by_the_callback(tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = []
    begin = tune_magic.api.begin
    monkeypatch.setattr(
        "tune_magic.api.begin", lambda *a, **k: where.append(threading.current_thread()) or begin(*a, **k)
    )
    panel = FinetunePanel("bot", model=str(tiny), data=data_file.name, max_steps=3)
    panel.start.click()
    assert where == []
    assert panel.run is None
    thread = threading.Thread(target=panel.act)
    thread.start()
    thread.join()
    assert where == [thread]
    panel.run.wait(timeout_s=120)
    assert panel.run.status == "finished"
    assert panel.is_over
    assert "finished · 3 steps" in panel.bundle()["text/plain"]

    again = FinetunePanel("bot", model=str(tiny), data=data_file.name, max_steps=3)
    again.start.click()
    again.act()
    assert again.run.id == panel.run.id
    assert "were trained before" in again.bundle()["text/plain"]


def test_a_table_can_be_given_to_the_form(slow, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = pd.DataFrame({"prompt": [f"q {i}" for i in range(12)], "completion": ["a"] * 12})
    panel = FinetunePanel("bot", model=str(tiny), data=table, max_steps=1)
    panel.start.click()
    panel.act()
    panel.run.wait(timeout_s=120)
    assert panel.run.status == "finished"
    assert panel.run.summary().plan["train_rows"] == 8


def test_a_plan_that_fails_is_a_fault_of_the_form(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tune_magic.widgets.finetune_panel._QUIET_S", 0.01)
    panel = FinetunePanel(model=str(tiny), data="gone.jsonl")
    panel.act()
    assert "There is no file gone.jsonl" in panel.bundle()["text/plain"]
    panel.start.click()
    panel.act()
    assert panel.run is None
    assert "There is no file gone.jsonl" in panel.bundle()["text/plain"]


def test_the_buttons_of_a_run_leave_requests(make_run):
    run = make_run()
    panel = RunPanel(run)
    panel.stop.click()
    panel.checkpoint.click()
    requests = [json.loads(path.read_text())["request"] for path in sorted((run.path / "control").glob("*.json"))]
    assert requests == ["stop", "checkpoint"]
    panel.refresh()
    assert panel.resume.disabled
    assert not panel.stop.disabled
    assert not panel.is_over


def test_a_panel_on_an_ended_run_shows_its_card(train):
    run = train(max_steps=2)
    panel = RunPanel(run)
    panel.act()
    assert panel.is_over
    assert panel.stop.disabled and panel.checkpoint.disabled and panel.resume.disabled
    assert panel.bundle() == run.card()


def test_what_ends_right_after_a_look_is_still_shown_ended(capsys):
    class EndsUnseen(MemoryGauge):
        state, is_over = "running", False

        def bundle(self):
            found, type(self).state = self.state, "finished"
            type(self).is_over = True
            return {"text/html": f"<div>{found}</div>", "text/plain": found}

    panel = EndsUnseen()
    panel._ipython_display_()
    panel._thread.join(10)
    assert capsys.readouterr().out.split()[-1] == "finished"


def test_a_resume_that_makes_no_sense_is_not_tried(train):
    run = train(max_steps=2)
    panel = RunPanel(run)
    panel.resume.click()
    panel.act()
    assert run.status == "finished"
    with pytest.raises(TuneError, match=r"nothing to resume"):
        run.resume()


def test_the_gauge_knows_machine_and_kernel_and_lasts_its_time():
    found = {gauge.name: gauge for gauge in gauges()}
    assert 0 < found["this kernel"].used < found["machine"].used < found["machine"].total
    panel = MemoryGauge(minutes=0)
    assert panel.is_over
    text = panel.bundle()["text/plain"]
    assert "machine:" in text and "this kernel:" in text
    first = panel.bundle()
    assert panel.bundle() == first  # a quiet machine leaves the notebook alone


def test_f30_hostile_names_are_harmless_in_every_view():
    evil = "<script>alert(1)</script>\x1b[31m"
    shown = [
        form_bundle(evil, f"model: {evil}\n", [evil], None),
        gauges_bundle([Gauge(evil, 1, 2)], "now"),
    ]
    for bundle in shown:
        assert "<script" not in bundle["text/html"]
        assert "\x1b" not in bundle["text/html"] + bundle["text/plain"]


# --- compare ---------------------------------------------------------------------------------------------------------


def test_chosen_runs_are_compared_and_the_list_follows_the_disk(train, monkeypatch):
    from tune_magic.widgets import ComparePanel

    first = train(max_steps=4).rename("first")
    monkeypatch.setattr("tune_magic.storage.places.folders", lambda: sorted(first.path.parent.iterdir(), reverse=True))
    panel = ComparePanel()
    assert "Choose two" in panel.bundle()["text/plain"]
    second = train(max_steps=4, learning_rate=1e-3).rename("second")
    panel.act()
    assert [run_id for _, run_id in panel.choice.options] == [second.id, first.id]
    assert panel.choice.options[0][0].startswith("second · finished · held-out loss ")
    panel.choice.value = (second.id, first.id)
    text = panel.bundle()["text/plain"]
    assert "learning_rate" in text
    assert "second" in text
    panel.act()
    assert panel.choice.value == (second.id, first.id)  # what is chosen stays chosen
    second.delete()
    panel.act()
    assert panel.choice.value == (first.id,)
    assert "Choose two" in panel.bundle()["text/plain"]


def test_runs_can_be_chosen_by_name_at_the_start(train, monkeypatch):
    from tune_magic.widgets import ComparePanel

    runs = [train(max_steps=2, seed=seed).rename(f"run{seed}") for seed in (1, 2)]
    monkeypatch.setattr("tune_magic.storage.places.folders", lambda *_: [run.path for run in runs])
    panel = ComparePanel("run1", runs[1])
    assert set(panel.choice.value) == {run.id for run in runs}
    assert "seed" in panel.bundle()["text/plain"]
    with pytest.raises(TuneError, match="no run"):
        ComparePanel("nobody")


def test_a_run_that_trains_is_compared_live(make_run):
    from tune_magic.widgets import ComparePanel

    from tune_magic.storage.events import EventLog

    runs = [make_run(), make_run()]
    panel = ComparePanel(*runs)
    assert "queued" in panel.bundle()["text/plain"] or "starting" in panel.bundle()["text/plain"]
    with EventLog(runs[0].path / "events.jsonl") as log:
        log.append("state", state="running", from_step=0)
        log.append("step", step=1, loss=2.5, grad_norm=1.0, learning_rate=1e-4, tokens=9, seconds=0.1)
        assert "2.50" in panel.bundle()["text/plain"]


# --- data, chat, export ----------------------------------------------------------------------------------------------


@pytest.fixture
def inline(monkeypatch):
    """Jobs are done in this process."""
    from tune_magic.executors import local

    start = local.start
    monkeypatch.setattr("tune_magic.launching.local.start", lambda folder, executor="worker": start(folder, "inline"))


def test_columns_can_be_mapped_and_rows_are_seen_as_they_are(tiny, write, inline, tmp_path, monkeypatch):
    from tune_magic.widgets import DataPanel

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tune_magic.widgets.data_panel._QUIET_S", 0.01)
    write("rows.csv", "enquiry,reply,id\n" + "".join(f"what is {i}?,it is {i},{i}\n" for i in range(60)))
    panel = DataPanel("rows.csv", model=str(tiny))
    panel.act()
    text = panel.bundle()["text/plain"]
    assert "columns: enquiry, reply, id" in text
    assert "are no format that is known" in text
    choices = {choice.description: choice for choice in panel._form.columns.children}
    assert list(choices) == ["messages is", "prompt is", "completion is", "system is", "text is", "label is"]
    choices["prompt is"].value = "enquiry"
    choices["completion is"].value = "reply"
    assert panel.fields["data.columns"].value == "{prompt: enquiry, completion: reply}"
    panel._changed.clear()  # as the panel's thread does before it looks
    panel.act()
    assert panel.recipe.data.columns == {"prompt": "enquiry", "completion": "reply"}
    bundle = panel.bundle()
    assert "prompt_completion (columns enquiry as prompt, reply as completion; also there: id)" in bundle["text/plain"]
    assert "«it is 0<|im_end|>»" in bundle["text/plain"]
    assert "what is 2?" in Page(bundle["text/html"]).text  # the third row as it is
    choices["prompt is"].value = ""
    assert panel.fields["data.columns"].value == "{completion: reply}"
    panel.fields["data.train"].value = "gone.csv"
    panel._changed.clear()
    panel.act()
    assert "There is no file" in panel.bundle()["text/plain"]
    assert panel._form.columns.children == ()


def test_a_table_in_memory_is_looked_at_by_form(tiny, inline, monkeypatch):
    from tune_magic.widgets import DataPanel

    monkeypatch.setattr("tune_magic.widgets.data_panel._QUIET_S", 0.01)
    table = pd.DataFrame({"text": [f"t {i}" for i in range(60)], "label": ["a", "b"] * 30})
    panel = DataPanel(table, model=str(tiny))
    panel.act()
    assert "2 classes: a 22, b 22" in panel.bundle()["text/plain"]
    DataPanel().act()  # nothing chosen yet is no error


def test_a_button_writes_what_would_mend_the_rows(tiny, write, inline, tmp_path, monkeypatch):
    from tune_magic.widgets import DataPanel

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tune_magic.widgets.data_panel._QUIET_S", 0.01)
    rows = [f"what is {i}?,it is {i}\n" for i in range(60)]
    write("rows.csv", "prompt,completion\n" + "".join([*rows, *rows[:12], "who?,ask ada@example.org\n"]))
    panel = DataPanel("rows.csv", model=str(tiny))
    panel.act()
    offered = {each.description: each for each in panel.changes.children}
    assert {"clean: [duplicates]", "clean: [personal]"} <= offered.keys()
    offered["clean: [duplicates]"].click()
    offered["clean: [personal]"].click()
    offered["clean: [personal]"].click()
    assert panel.fields["data.clean"].value == "[duplicates, personal]"
    panel._changed.clear()
    panel.act()
    assert panel.recipe.data.clean == ["duplicates", "personal"]
    assert not {"clean: [duplicates]", "clean: [personal]"} & {each.description for each in panel.changes.children}
    assert "cleaned: duplicates: " in panel.bundle()["text/plain"]
    panel.fields["data.train"].value = ""
    panel._changed.clear()
    panel.act()
    assert panel.changes.children == ()


def test_an_export_is_written_and_its_receipt_shown(train, inline, monkeypatch, tmp_path):
    from tune_magic.widgets import ExportPanel

    panel = ExportPanel(train(max_steps=4))
    assert "nothing was exported here yet" in panel.bundle()["text/plain"]
    panel.to.value, panel.rows.value = "adapter", 2
    panel.start.click()
    assert panel.export is None  # the callback only asks
    panel.act()
    assert panel.export.receipt["to"] == "adapter"
    assert panel.export.ok
    assert "exported as adapter" in panel.bundle()["text/plain"]
    assert [kind for _, kind in panel.quantize.options] == [""]  # an adapter has none
    panel.to.value, panel.quantize.value = "gguf", "f16"
    panel.to.value = "onnx"
    assert panel.quantize.value == ""
    assert "int8" in [kind for _, kind in panel.quantize.options]
    panel.to.value, panel.device.value = "adapter", "cuda"
    panel.start.click()
    panel.act()
    assert "is not written for the device 'cuda'" in panel.bundle()["text/plain"]
    panel.device.value = ""
    panel.quantize.value, panel.output.value = "", str(tmp_path)
    panel.start.click()
    panel.act()
    assert "is already there" in panel.bundle()["text/plain"]


def test_a_chat_begins_when_shown_and_another_after_silence(train, monkeypatch):
    from tune_magic.widgets import ChatPanel

    from tune_magic.chatting import Answer, Turn

    made = []

    class Fake:
        """A chat that answers at once and then ends."""

        def __init__(self, run, *, base=True):
            self.turns, self.is_answering, self.has_ended, self.state = [], False, False, "listening"
            self.asked, self.closed = [], False
            made.append(self)

        def usual_system(self):
            return "Be kind."

        def say(self, text, **parameters):
            self.asked.append((text, parameters))
            self.turns.append(
                Turn(len(self.turns) + 1, text, ("tuned",), {"tuned": Answer(text.upper(), True, 1, 1.0)})
            )
            self.has_ended = True

        def close(self):
            self.closed = True

    monkeypatch.setattr("tune_magic.widgets.chat_panel.Chat", Fake)
    panel = ChatPanel(train(max_steps=4))
    assert made == []
    panel.act()
    assert panel.system.value == "Be kind."
    panel.text.value, panel.temperature.value = "hello", 0.5
    panel.send.click()
    assert panel.text.value == "hello"  # the callback only asks: the rest of the text may still be on its way
    threading.Timer(0.1, lambda: setattr(panel.text, "value", "hello there")).start()
    panel.act()
    assert panel.text.value == ""
    panel.text.value = "and you"
    panel.forget.click()
    panel.send.click()
    panel.act()
    panel.send.click()
    panel.act()  # nothing is there to be said
    first, second = made
    assert [text for text, _ in first.asked] == ["hello there"]
    assert first.asked[0][1] | {"temperature": 0.5, "system": "Be kind.", "fresh": False} == first.asked[0][1]
    assert second.asked[0][1]["fresh"]
    text = panel.bundle()["text/plain"]
    assert "tuned: HELLO THERE" in text
    assert "tuned: AND YOU" in text
    panel.close()
    assert second.closed


def test_what_came_last_is_shown_when_a_panel_is_closed(monkeypatch, capsys):
    """Its thread may be waiting for something else, and the next cell may be the last."""
    let_go = threading.Event()

    class Busy(Panel):
        said = "before"

        def act(self):
            let_go.wait(60)

        def bundle(self):
            return note_bundle(self.said)

    monkeypatch.setattr(panel_module, "_CLOSING_S", 0.05)
    panel = Busy(ipywidgets.VBox(), 60.0)
    panel._ipython_display_()
    panel.said = "after"
    panel.close()
    assert capsys.readouterr().out.split("\n")[-2] == "after"
    let_go.set()
    panel._thread.join(20)


def test_a_panel_that_failed_is_closed_without_another_error(capsys):
    class Broken(Panel):
        def bundle(self):
            if threading.current_thread() is self._thread or self._has_failed:
                raise ValueError("no view")
            return note_bundle("a view")

    panel = Broken(ipywidgets.VBox(), 0.01)
    panel._ipython_display_()
    panel._thread.join(20)
    panel.close()
    assert "Broken stopped: ValueError: no view" in capsys.readouterr().out
