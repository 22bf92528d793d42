"""What people see: safe, small, true to the events, readable as text."""

import base64
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tune_magic import files
from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.report import Scores
from tune_magic.recipe import build_recipe
from tune_magic.storage import folder
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.view import words
from tune_magic.view.card import card, comparison_line
from tune_magic.view.export import export_card
from tune_magic.view.figure import loss_figure, smooth, thin
from tune_magic.view.frame import curve, frame, latest_numbers, line
from tune_magic.view.html import clean, escape, note_bundle, tag
from tune_magic.view.listing import runs_table
from tune_magic.view.plan import plan_card, plan_facts
from tune_magic.view.report import report_card

TAGS = {"div", "span", "b", "code", "table", "tbody", "tr", "td", "img", "br", "details", "summary"}
ATTRIBUTES = {"style", "src", "alt"}
FRAME_BYTES, CARD_BYTES = 32_000, 60_000


def known(reason, *values):
    """A fault that the product once had."""
    return pytest.param(*values, id=reason)


class Page(HTMLParser):
    """Takes HTML apart as a browser does and refuses what an untrusted notebook would lose or must not have."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.texts, self.images = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS
        assert {name for name, _ in attrs} <= ATTRIBUTES
        assert not any(name.startswith("on") for name, _ in attrs)
        given = dict(attrs)
        assert not re.search(r"url\(|expression|javascript|@import", given.get("style", ""))
        if tag == "img":
            self.images.append(base64.b64decode(given["src"].removeprefix("data:image/svg+xml;base64,"), validate=True))
        elif tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment

    @property
    def text(self):
        return "".join(self.texts)

    def handle_data(self, data):
        self.texts.append(data)


def plan(total_steps, text="rows", **changes):
    recipe = build_recipe({"model": text, "data": text}).normalised()
    return {
        "recipe": recipe, "model": {"name": text, "origin": "folder", "note": text}, "device": "cpu", "dtype": "float32",
        "parameters": 2_000_000, "trainable_parameters": 50_000, "train_rows": 30, "held_out_rows": 10,
        "tokens_per_epoch": 61_234, "trained_tokens_per_epoch": 6_123, "longest_row_tokens": 99, "cut_rows": 2,
        "total_steps": total_steps, "steps_per_epoch": 4, "eval_steps": max(1, total_steps // 8), "packed": False,
        "engine_note": text, "lens": [{"spans": [[text, False], [text, True]], "cut_text": text, "tokens": 9, "trained": 4, "cut": 1}],
        "mixture": [{"name": text, "class": text, "rows": 20, "per_epoch": 10, "share": 1.0}],
        "augmented": [{"kind": "noise", "rows": 5, "shown": [[text, text]]}],
        "cleaned": [{"kind": "duplicates", "source": text, "count": 9, "rows": list(range(1, 10))}],
        "skipped": {text: {"count": 1, "rows": [{"place": "line 3", "problem": text}]}},
    } | changes  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """Make a run folder by its events, as a worker would have left it."""

    def make(
        steps=4, evaluations=None, name="bot", text="words", state="finished", loss=lambda step: 2.0 + 1 / step, total=None
    ):  # fmt: skip
        path = folder.create(tmp_path / "tune_runs", "finetune", {"name": name, "recipe": {}})
        with EventLog(path / "events.jsonl") as log:
            log.append("state", state="starting")
            log.append("state", state="running", from_step=0)
            log.append("plan", **plan(total or max(steps, 1), text))
            evaluations = {0: 3.0, 2: 1.5, 4: 1.75} if evaluations is None else evaluations
            for step in range(steps + 1):
                if step:
                    log.append(
                        "step",
                        step=step,
                        epoch=step / 4,
                        loss=loss(step),
                        learning_rate=2e-4,
                        grad_norm=0.5,
                        tokens=100,
                        seconds=0.05,
                    )
                if step in evaluations:
                    log.append("eval", step=step, loss=evaluations[step], seconds=0.1)
            items = [{"row": 3, "question": text, "answer": text, "reference": text}]
            log.append("sample", step=0, items=items)
            if steps:
                log.append("sample", step=steps, items=items)
            log.append("checkpoint", step=steps, name=f"step-{steps}", best=False, seconds=0.1)
            log.append(
                "memory",
                rss=1e9,
                peak=2e9,
                system_used=3e9,
                system_total=8e9,
                gpu_used=1e9,
                gpu_peak=2.5e9,
                gpu_total=9e9,
            )
            for _ in range(5):
                log.append("warning", message=text)
            log.append("diagnosis", message=text)
            log.append("result", seconds=60, step_tokens=64, step_seconds=0.5, peak_bytes=2e9, base_loss=3.0)
            if state != "running":
                log.append("state", state=state, error=text, cause=text, hint=text)
        run = RunFolder(path)
        assert run.summary().step == steps
        return run

    return make


@pytest.fixture
def make_report(tmp_path):
    def make(text="words", rows=8, chose_checkpoint=True, losses=lambda i: (2.0, 1.0 + i / 8)):
        path = tmp_path / "report"
        path.mkdir()
        comparison = Comparison(text, 2.0, 1.5, -0.5, -0.75, -0.25, higher_is_better=False).to_dict()
        about = {"rows": rows, "split": "held-out", "step": 4, "chose_checkpoint": chose_checkpoint, "data": text}
        (path / "report.json").write_text(json.dumps({"format": 1, "about": about, "metrics": {"loss": comparison}}))
        lines = []
        for i in range(rows):
            base, tuned = losses(i)
            row = {
                "row": i,
                "question": text,
                "reference": text,
                "base": text,
                "tuned": text,
                "loss_base": base,
                "loss_tuned": tuned,
            }
            lines.append(files.to_json(row) + "\n")
        (path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        return Scores(path)

    return make


# --- hostile text ----------------------------------------------------------------------------------------------------

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "end of script": "</script></style></td></table></div><b>bold",
    "handler": "<img src=x onerror=alert(1)>",
    "attribute": '" onerror="alert(1)" x="\' onload=\'alert(1)',
    "picture": "<svg onload=alert(1)><style>*{display:none}</style>",
    "entities": "&lt;script&gt; &amp; &#60;b&#62;",
    "comment": "<!-- <![CDATA[ <?php",
    "terminal": "\x1b[31mred\x1b[0m \x1b[2J\x07\x00back\x08space",
    "direction": "invoice\u202egnp.exe \u2066x\u2069",
    "format": "{} {0.__class__} %s %(x)s $x",
    "long line": "<b>" * 350_000,
    "emoji": "\U0001f469\u200d\U0001f4bb ünï " * 3,
}


def surfaces(make, make_report, text):
    run = make(name=text, text=text, state="failed")
    report = make_report(text)
    receipt = {"to": "adapter", "size_bytes": 4_600, "step": 4, "path": text, "files": {text: 4_600}}
    return {
        "frame": frame(run, "running", curve(run.summary())),
        "card": card(run, report.comparisons, banner=text),
        "report": report_card(report, text),
        "runs": runs_table([run, run]),
        "plan": plan_card(run),
        "export": export_card(receipt, text),
        "note": note_bundle(text),
    }


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", HOSTILE)
def test_f30_hostile_text_is_shown_and_does_nothing(make, make_report, kind):
    text = HOSTILE[kind]
    for surface, bundle in surfaces(make, make_report, text).items():
        page = Page(bundle["text/html"])
        shown = page.text
        assert clean(text, 60)[:59] in shown, surface
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown), surface
        for picture in page.images:
            assert b"<script" not in picture
            assert b"alert" not in picture
        assert set(bundle) == {"text/html", "text/plain"}


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("<b> & \"q\" 'a'", "&lt;b&gt; &amp; &quot;q&quot; &#x27;a&#x27;"),
        ("a\x1b[1;31mb\x1b[0mc", "abc"),
        ("a\u202eb\u2066c\x00d\x7f", "abcd"),
        ("tab\tline\n", "tab\tline\n"),
        (None, "None"),
        (3.5, "3.5"),
        ("x" * 3000, "x" * 1999 + "…"),
    ],
)
def test_there_is_one_escaper(text, html):
    assert escape(text) == html
    assert tag("div", text) == (f"<div>{html}</div>" if text is not None else "<div></div>")


def test_text_is_escaped_once_however_often_it_is_wrapped():
    assert tag("div", tag("b", "<"), "<") == "<div><b>&lt;</b>&lt;</div>"
    assert tag("img", src='"><script>', alt="<") == '<img src="&quot;&gt;&lt;script&gt;" alt="&lt;">'


# --- size ------------------------------------------------------------------------------------------------------------


def spiky(step):
    return 2 + math.sin(step * 7.7) / 3 + (step % 997 == 0) * 5


def test_a_long_run_with_long_names_stays_small(make):
    run = make(
        steps=20_000, name="n" * 200, text="w" * 300, loss=spiky, evaluations={s: 2 + (s / 1e4 - 1) ** 2 for s in range(0, 20_001, 2500)}
    )  # fmt: skip
    live = frame(run, "running", curve(run.summary()))
    assert len(live["text/html"].encode()) < FRAME_BYTES
    assert len(live["text/plain"]) < 500
    done = card(run, banner="b" * 200)
    assert len(done["text/html"].encode()) < CARD_BYTES
    assert Page(done["text/html"]).images


@pytest.mark.parametrize("at", [1, 5000])
def test_size_hardly_depends_on_length(make, at):
    assert len(card(make(steps=at, evaluations={}, loss=spiky))["text/html"].encode()) < CARD_BYTES / 2


def test_every_picture_has_words_for_those_who_do_not_see_it(make):
    assert 'alt="loss by step: train loss 2.' in card(make())["text/html"]


# --- true to the events ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluations", "best"),
    [
        ({0: 3.0, 2: 1.5, 4: 1.75}, 2),
        ({0: 1.0, 2: 1.75, 4: 1.5}, 4),  # the base is not a checkpoint
        ({0: 3.0, 1: 1.5, 2: 1.5, 3: 1.5, 4: 2.0}, 1),  # of equals the first
        ({0: 3.0, 1: math.nan, 2: 2.5, 3: math.inf, 4: 2.75}, 2),
        ({0: 3.0}, None),
        ({}, None),
    ],
)
def test_the_card_agrees_with_the_events_about_the_best_step(make, evaluations, best):
    run = make(evaluations=evaluations)
    events = [e for e in run.events("eval") if e["step"] > 0 and isinstance(e["loss"], float)]
    lowest = min(events, key=lambda e: e["loss"], default=None)
    assert (lowest["step"] if lowest else None) == best
    bundle = card(run)
    page = Page(bundle["text/html"])
    for text in (bundle["text/plain"], page.text):
        assert (f"the best kept (step {best})" in text) == (best not in (None, 4))
        assert "finished · 4 steps" in text
    if best is not None:
        change = words.signed(lowest["loss"] - evaluations[0])
        expected = f"held-out loss: base {words.value(evaluations[0])}, tuned {words.value(lowest['loss'])}, {change}"
        assert expected in bundle["text/plain"]
        assert change in page.text
    marked = re.findall("best · step (\\d+)", page.images[0].decode())
    assert marked == ([str(best)] if len(evaluations) > 2 and best else [])


def test_a_resumed_run_is_one_run_not_two(make):
    run = make(steps=8, evaluations={0: 3.0, 4: 2.0, 8: 0.5}, state="stopped")
    with EventLog(run.path / "events.jsonl") as log:
        log.append("state", state="starting")
        log.append("state", state="running", from_step=5)
        log.append("step", step=6, epoch=1.5, loss=1.0, learning_rate=1e-4, grad_norm=0.5, tokens=100, seconds=0.05)
        log.append("eval", step=6, loss=1.25, seconds=0.1)
        log.append("state", state="finished")
    text = card(run)["text/plain"]
    assert "finished · 6 steps" in text
    assert "tuned 1.25" in text  # not the 0.5 of the steps that were left behind


def test_a_card_is_the_same_on_any_later_day(make):
    run = make()
    assert card(run) == card(RunFolder(run.path))


@pytest.mark.parametrize(
    ("state", "steps", "says", "then"),
    [
        ("finished", 4, "finished · 4 steps, the best kept (step 2)", ["%evaluate bot", "%export bot --to merged"]),
        ("stopped", 4, "stopped at step 4 of 9 · checkpoint of step 4", ["%tune resume bot", "%evaluate bot"]),
        ("failed", 4, "failed at step 4 of 9 · checkpoint of step 4", ["%tune resume bot"]),
        ("running", 4, "lost at step 4 of 9 · checkpoint of step 4", ["%tune resume bot"]),  # its worker is gone
        ("failed", 0, "failed", ["%tune resume bot"]),
    ],
)
def test_a_card_says_how_it_ended_and_what_is_next(make, state, steps, says, then):
    bundle = card(make(steps=steps, total=9, state=state, text="the reason"), banner="why it is shown")
    page = Page(bundle["text/html"])
    for text in (bundle["text/plain"], page.text):
        assert says in text
        assert all(command in text for command in then)
        assert "why it is shown" in text
    failed = re.search(r"^  the reason$", bundle["text/plain"], re.MULTILINE)
    assert (failed is not None) == (state == "failed")


def test_a_frame_says_state_first_then_the_numbers(make):
    run = make(state="running", total=9)
    bundle = frame(run, "running", None)
    text = Page(bundle["text/html"]).text
    assert "bot training · step 4 of 9 · epoch 1.00" in text
    shown = latest_numbers(run.summary())
    assert [name for name, _ in shown] == [
        "train loss",
        "held-out loss",
        "learning rate",
        "gradient norm",
        "tokens / s",
    ]
    assert dict(shown) | {"train loss": ""} == {
        "train loss": "", "held-out loss": "1.75", "learning rate": "2.0e-4", "gradient norm": "0.500", "tokens / s": "2000",
    }  # fmt: skip
    assert all(name in text and value in text for name, value in shown)
    assert "%tune stop bot" in text
    assert "1.0 / 8 GB" in text
    assert "GPU peak2.5 / 9 GB" in text
    assert bundle["text/plain"].startswith("bot: training · step 4 of 9 · epoch 1.00 · train loss 2.")
    # five steps of 0.05 s, and five evaluations of 0.1 s
    assert run.summary().seconds_left() == pytest.approx(5 * 0.05 + 5 * 0.1)
    assert "0.8 s left" in text


@pytest.mark.parametrize(
    ("steps", "state", "says"),
    [
        (0, "starting", "bot: starting · loading data and model"),
        (0, "running", "bot: training · first step"),
        (0, "stopping", "bot: stopping"),
        (4, "paused", "bot: paused · step 4 of 4 · epoch 1.00 · train loss"),
        (4, "stopping", "bot: stopping · step 4 of 4 · epoch 1.00 · train loss"),
    ],
)
def test_a_line_of_text_for_each_state(make, steps, state, says):
    run = make(steps=steps, state="running")
    assert line(run, state).startswith(says)
    Page(frame(run, state, None)["text/html"])


@pytest.mark.parametrize(("progress", "says"), [
    ({"stage": "reading rows", "done": 200_000, "total": None}, "bot: reading rows · 200,000 so far"),
    ({"stage": "making rows", "done": 3, "total": 1_500}, "bot: making rows · 3 of 1,500"),
    ({"done": 3, "total": 9}, "bot: computing the frozen layers once · 3 of 9 rows"),
])  # fmt: skip
def test_what_is_done_before_the_first_step_is_seen(tmp_path, progress, says):
    run = RunFolder(folder.create(tmp_path, "finetune", {"name": "bot", "recipe": {}}))
    with EventLog(run.path / "events.jsonl") as log:
        log.append("state", state="starting")
        log.append("progress", **progress)
    assert line(run, "starting").startswith(says)
    assert says.removeprefix("bot: ") in Page(frame(run, "starting", None)["text/html"]).text


def test_a_run_without_a_single_event_still_has_every_view(tmp_path):
    run = RunFolder(folder.create(tmp_path, "finetune", {"name": None, "recipe": {}}))
    assert curve(run.summary()) is None
    for bundle in (card(run), frame(run, "starting", None), runs_table([run])):
        Page(bundle["text/html"])
        assert run.id in bundle["text/plain"]
        assert "starting" in bundle["text/plain"]


def test_a_report_tells_scores_interval_and_rows_to_read(make_report):
    bundle = report_card(make_report("loss"), "bot")
    page = Page(bundle["text/html"])
    for text in (bundle["text/plain"], page.text):
        assert "evaluated on 8 held-out rows" in text
        assert "checkpoint of step 4" in text
        assert "−0.500 (−0.750 to −0.250)" in text
        assert "These rows also chose the checkpoint" in text
    assert all(title in page.text for title in ("gained most", "scored lowest", "2.00 → 1.00"))
    assert "got worse" not in page.text


def test_a_report_over_other_rows_has_no_caution(make_report):
    assert "chose the checkpoint" not in report_card(make_report(chose_checkpoint=False), "bot")["text/plain"]


def test_the_rows_that_got_worse_are_shown(make_report):
    report = make_report(losses=lambda i: (2.0, 1.0 + i / 4))
    assert [row["row"] for row in report.notable()["best"]] == [0, 1, 2]
    assert [row["row"] for row in report.notable()["regressed"]] == [7, 6, 5]
    assert "got worse" in report_card(report, "bot")["text/html"]


def test_a_plan_promises_in_numbers(make):
    run = make(steps=0, evaluations={}, total=12)
    bundle = plan_card(run)
    facts = dict(plan_facts(run.summary().plan, run.summary().result))
    assert facts == {
        "steps": "12 of 8 examples, 4 an epoch",
        "rows": "30 to train, 10 held out",
        "tokens": "61 k an epoch, 10 % trained, 2 rows cut at max_length",
        "longest row": "99 tokens",
        "an epoch": "words, words 100 % (10 drawn of 20 rows)",
        "made by noise": "5 rows (words → words)",
        "cleaned: duplicates": "9 rows left out (rows 1, 2, 3, 4, 5, 6, 7, 8, …)",
        "skipped": "1 bad row of words (line 3: words)",
        "precision": "float32 on cpu",
        "predicted time": "1 min 00 s (a step of 64 tokens took 0.5 s)",
        "predicted peak memory": "2.0 GB",
        "held-out loss of the base": "3.00",
    }
    text = Page(bundle["text/html"]).text
    for name, value in facts.items():
        assert f"{name}: {value}" in bundle["text/plain"]
        assert f"{name}{value}" in text
    assert "nothing was trained" in bundle["text/plain"]
    assert "9 tokens, 4 trained (44 %), 1 cut off" in text


def test_the_runs_as_a_table(make):
    first, second = make(name="a"), make(name="longer", state="stopped", evaluations={})
    bundle = runs_table([second, first])
    head, *rows = bundle["text/plain"].splitlines()
    assert head.split("  ")[0] == "name"
    assert " ".join(head.split()) == "name state step held-out loss time started size since the run before id"
    assert rows[0].split()[:5] == ["longer", "stopped", "4", "/", "4"]
    assert rows[1].split()[:6] == ["a", "finished", "4", "/", "4", "1.50"]
    assert [row.split()[-1] for row in rows] == [second.id, first.id]
    assert {row.index(run.id) for row, run in zip(rows, (second, first), strict=True)} == {head.index("id")}
    assert first.id in Page(bundle["text/html"]).text
    assert "`%%finetune NAME` starts one" in runs_table([])["text/plain"]


@pytest.mark.parametrize("surface", ["frame", "card", "report", "runs", "plan", "export", "note"])
def test_text_is_a_text_not_a_page(make, make_report, surface):
    plain = surfaces(make, make_report, "an ordinary name")[surface]["text/plain"]
    assert "an ordinary name" in plain
    assert "<" not in plain
    assert "None" not in plain
    assert len(plain.splitlines()) < 20


def test_a_loss_without_interval_shows_none():
    single = Comparison("held-out loss", 2.0, 1.5, -0.5, math.nan, math.nan, higher_is_better=False)
    assert comparison_line(single) == "held-out loss: base 2.00, tuned 1.50, −0.500"


# --- the curve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spike", [0, 1, 4321, 9_998, 9_999])
@pytest.mark.parametrize("height", [-50.0, 50.0])
def test_thinning_keeps_spikes(spike, height):
    points = [(float(x), math.sin(x)) for x in range(10_000)]
    points[spike] = (float(spike), height)
    kept = thin(points)
    assert points[spike] in kept
    assert len(kept) <= 160
    assert kept == sorted(set(kept))
    assert set(kept) <= set(points)


@pytest.mark.parametrize("count", [0, 1, 2, 159, 160])
def test_few_points_are_all_kept(count):
    points = [(float(x), 0.0) for x in range(count)]
    assert thin(points) == points


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([3.0], [3.0]),
        ([3.0] * 50, [3.0] * 50),  # no pull of the start
        ([2.0, math.nan, 2.0], [2.0, 2.0, 2.0]),
        ([2.0, math.inf, -math.inf, 2.0], [2.0] * 4),
        ([math.nan, math.nan, 5.0], [math.nan, math.nan, 5.0]),
        ([1.0, 2.0], [1.0, 11 / 7]),  # a window of four: weights 3/16 and 1/4
    ],
)
def test_smoothing_passes_over_what_is_not_a_number(values, expected):
    assert smooth(values) == pytest.approx(expected, nan_ok=True)


def test_smoothing_follows_and_calms():
    noisy = [10 - step / 100 + (-1) ** step for step in range(1000)]
    even = smooth(noisy)
    assert max(abs(even[step] - (10 - step / 100)) for step in range(200, 1000)) < 0.5
    assert max(abs(b - a) for a, b in itertools.pairwise(even[200:])) < 0.1


def test_a_spike_and_both_curves_are_in_the_picture(make):
    run = make(steps=2000, loss=lambda step: 50.0 if step == 777 else 2.0, evaluations={0: 3.0, 1000: 1.0, 2000: 1.5})
    axes = loss_figure(run.summary()).axes[0]
    raw, even, held_out = axes.lines[:3]
    assert (777.0, 50.0) in list(zip(*raw.get_data(), strict=True))
    assert max(even.get_data()[1]) < 5
    assert list(held_out.get_data()[0]) == [0, 1000, 2000]
    assert {text.get_text() for text in axes.texts} == {"train", "held-out", "best · step 1000"}


def test_drawing_does_not_import_pyplot():
    code = (
        "import sys\n"
        "from tune_magic.storage.summary import Summary\n"
        "from tune_magic.view.figure import loss_figure, svg\n"
        "summary = Summary()\n"
        "summary.add({'t': 0, 'type': 'step', 'step': 1, 'loss': 2.0})\n"
        "assert svg(loss_figure(summary)).startswith(b'<?xml')\n"
        "assert 'matplotlib.figure' in sys.modules\n"
        "assert not {'matplotlib.pyplot', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("say", "value", "expected"),
    [
        (words.duration, 0, "0.0 s"), (words.duration, 0.042, "42 ms"), (words.duration, 7.25, "7.2 s"), (words.duration, 10, "10 s"),
        (words.duration, 59.6, "1 min 00 s"), (words.duration, 309, "5 min 09 s"), (words.duration, 3599.6, "1 h 00 min"),
        (words.duration, 7400, "2 h 03 min"), (words.duration, 90_000, "25 h 00 min"),
        (words.size, 0, "0 bytes"), (words.size, 999, "999 bytes"), (words.size, 1000, "1.0 kB"),
        (words.size, 9_800_000, "9.8 MB"), (words.size, 4_600_000_000, "4.6 GB"),
        (words.count, 0, "0"), (words.count, 480, "480"), (words.count, 9999, "9999"), (words.count, 61_234, "61 k"),
        (words.count, 4_880_000, "4.9 M"), (words.count, 1_500_000_000, "1.5 B"),
        (words.value, 0, "0.000"), (words.value, 0.2412, "0.241"), (words.value, 1.9376, "1.94"), (words.value, -0.5, "-0.500"),
        (words.value, 360, "360"), (words.value, 12_345, "1.23e+04"), (words.value, math.nan, "not a number"),
        (words.value, math.inf, "infinite"),
        (words.signed, 0.5, "+0.500"), (words.signed, -0.5, "−0.500"), (words.signed, 0, "+0.000"), (words.signed, -12, "−12.00"),
        (words.rate, 2e-4, "2.0e-4"), (words.rate, 1e-10, "1.0e-10"), (words.rate, 0.5, "5.0e-1"), (words.rate, 0, "0.0e+00"),
        (words.ago, 0, "just now"), (words.ago, -5, "just now"), (words.ago, 300, "5 min ago"), (words.ago, 7200, "2 h ago"),
        (words.ago, 90_000, "25 h ago"), (words.ago, 200_000, "2 d ago"),
    ],
)  # fmt: skip
def test_numbers_in_words(say, value, expected):
    assert say(value) == expected


def test_clock_tells_the_day_when_asked():
    assert re.fullmatch(r"\d\d:\d\d", words.clock(0))
    assert re.fullmatch(r"\d\d \w+ \d{4} \d\d:\d\d", words.clock(0, day=True))


# --- hard cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        known("an evaluation a step: 350 bytes a point", {"steps": 400, "evaluations": {s: 2.0 + math.sin(s) for s in range(401)}}),
        known("a thousand characters in each name", {"steps": 3000, "loss": spiky, "text": "w" * 1000, "name": "w" * 1000}),
        known("text of characters that escape to six", {"text": "'" * 3000, "name": "'" * 3000, "state": "failed"}),
    ],
)  # fmt: skip
def test_hard_cases_stay_within_the_budget(make, changes):
    run = make(**changes)
    assert len(frame(run, "running", curve(run.summary()))["text/html"].encode()) < FRAME_BYTES
    assert len(card(run)["text/html"].encode()) < CARD_BYTES


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        known("terminal codes reach text/plain", HOSTILE["terminal"], "[\x00-\x08\x1b]"),
        known("marks of direction reach text/plain", HOSTILE["direction"], "[\u202a-\u202e\u2066-\u2069]"),
        known("a line of 60 kB is in text/plain, several times", HOSTILE["long line"][:60_000], ".{50000}"),
    ],
)
def test_plain_text_is_cleaned_and_cut_too(make, make_report, text, forbidden):
    for surface, bundle in surfaces(make, make_report, text).items():
        assert not re.search(forbidden, bundle["text/plain"], re.DOTALL), surface


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        known("C1 controls are kept", "a\x9b31mb\x85", "ab"),
        known("a window title's text is left over", "a\x1b]0;title\x07b", "ab"),
        known("marks of direction of their own", "a\u200e\u200f\u061cb", "ab"),
    ],
)
def test_what_terminals_obey_is_removed(text, shown):
    assert clean(text) == shown


def test_a_damaged_run_beside_good_ones(make):
    good, damaged = make(name="good"), make(name="other")
    (damaged.path / "run.json").write_text("")
    assert "good" in runs_table([good, RunFolder(damaged.path)])["text/plain"]


@pytest.mark.parametrize(
    ("text", "losses"),
    [
        known("a line separator in an answer splits its row: JSONDecodeError", "a\u2028b", lambda i: (2.0, 1.0)),
        known("a loss that is not finite is a word: TypeError", "words", lambda i: (math.inf, 1.0)),
    ],
)
def test_reports_with_odd_rows_are_shown(make_report, text, losses):
    assert "evaluated on 8" in report_card(make_report(text, losses=losses), "bot")["text/plain"]


@pytest.mark.parametrize(
    ("say", "value", "expected"),
    [
        known("a difference that is none has a minus", words.signed, math.nan, "not a number"),
        known("no time is an error: ValueError", words.duration, math.nan, "–"),
        known("1000 kB", words.size, 999_999, "1.0 MB"),
        known("1000 k", words.count, 999_999, "1.0 M"),
        known("123.4 has four digits, its docstring says 123", words.value, 123.4, "123"),
        known("four digits below 1", words.value, 0.9996, "1.00"),
    ],
)
def test_numbers_at_the_edges(say, value, expected):
    assert say(value) == expected
