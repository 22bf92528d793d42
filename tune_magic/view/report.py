"""The card of an evaluation: scores, and the rows worth reading."""

from __future__ import annotations

import itertools
from typing import Any

from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.report import PER_CLASS, Scores
from tune_magic.storage.events import number
from tune_magic.view import words
from tune_magic.view.card import VERDICTS, comparison_line, scores_table
from tune_magic.view.curves import curves_figure
from tune_magic.view.figure import confusion_figure, svg
from tune_magic.view.html import (
    GREEN,
    GREY,
    Bundle,
    Html,
    box,
    bundle,
    clean,
    code,
    details,
    div,
    escape,
    grey,
    heading,
    image,
    rule,
    span,
    table,
    tag,
    ticked,
)

_TITLES = {"best": "gained most", "worst": "scored lowest", "regressed": "got worse"}
_CHARACTERS = 240
_MOST_CLASSES = 25


def report_card(report: Scores, name: str) -> Bundle:
    """Return the card of a report."""
    about = report.about
    subject = f"evaluated on {about['rows']} {about['split']} rows"
    caution = (
        "These rows also chose the checkpoint; a `test` file would not flatter." if about["chose_checkpoint"] else None
    )
    guess = about.get("most_frequent")
    guessing = f"Always answering “{guess['class']}” would score {words.value(guess['accuracy'])}." if guess else None
    wrong = _wrong(report) if report.classes else None
    notes = [text for text in (guessing, *_unreadable(report), caution) if text]
    body = [
        heading(GREEN, name, subject, f"checkpoint of step {about['step']}"),
        scores_table(report.comparisons, "untrained head" if report.classes or about.get("new_head") else "base"),
        div(grey(_how(report)), style="margin-top:4px"),
        *(div(grey(ticked(text))) for text in notes),
        _against(report),
        _probe(report),
        *_slices(report),
        *_classes(report),
        wrong,
        *(_examples(_TITLES[kind], rows) for kind, rows in report.notable().items() if rows and not report.classes),
    ]
    lines = [f"{name}: {subject} (checkpoint of step {about['step']})"]
    lines += [f"  {comparison_line(comparison)}" for comparison in report.comparisons.values()]
    lines += [f"  {text}" for text in notes]
    lines += [
        f"  {clean(other, 60)} · {comparison_line(comparison, clean(other, 60))}"
        for other, comparisons in report.against.items()
        for comparison in comparisons.values()
    ]
    lines += [f"  {text}" for text in _shots(report)]
    lines += [f"  general set · {comparison_line(comparison)}" for comparison in report.probe.values()]
    lines += [f"  {text}" for text in _forgotten(report)]
    lines += [
        f"  {column} {value} ({rows} rows) · {comparison_line(comparison)}"
        for column, value, rows, comparison in _sliced(report)
    ]
    return bundle(box(*(part for part in body if part)), lines)


def _how(report: Scores) -> str:
    tests = sorted({comparison.test for comparison in report.comparisons.values() if comparison.test})
    by = f"; p by {' and '.join(f'{test} test' for test in tests)}" if tests else ""
    return f"difference with its 95 % interval, paired bootstrap over the rows{by}"


def _unreadable(report: Scores) -> list[str]:
    """Say how many answers could not be read, metric by metric, where there are some."""
    found = []
    counts: dict[str, dict[str, int]] = report.about.get("unreadable", {})
    for name, comparison in report.comparisons.items():
        own = {side: numbers[name] for side, numbers in counts.items() if numbers.get(name)}
        if own:
            said = ", ".join(f"{clean(side, 60)} {count}" for side, count in own.items())
            found.append(f"Answers that {comparison.title} cannot read, of {report.about['rows']}: {said}.")
    return found


def _against(report: Scores) -> Html | None:
    """Return the scores of other runs and of baselines, each with what the tuned model has more."""
    if not report.against:
        return None
    rows: list[list[object]] = [[grey(text) for text in ("", "", "its score", "tuned − it", "p")]]
    for name, comparisons in report.against.items():
        for number_of, comparison in enumerate(comparisons.values()):
            first = tag("b", escape(name, 60)) if number_of == 0 else ""
            rows.append([first, grey(comparison.title), words.value(comparison.base), *_change(comparison)])
    return rule(tag("b", "against others"), table(rows, align="llrlr"), *(div(grey(text)) for text in _shots(report)))


def _probe(report: Scores) -> Html | None:
    """Return how a general set was scored before and after, and whether anything was forgotten."""
    if not report.probe:
        return None
    head = ["", "base", "tuned", "difference", "p", *(clean(name, 40) for name in report.probe_against)]
    rows: list[list[object]] = [[grey(text) for text in head]]
    for name, comparison in report.probe.items():
        scores = [words.value(comparison.base), tag("b", words.value(comparison.tuned))]
        others = [words.value(own[name].base) for own in report.probe_against.values()]
        rows.append([grey(comparison.title), *scores, *_change(comparison), *others])
    sizes = ", ".join(
        f"{count} {'paragraphs of ' if of == 'prose' else ''}{of}" for of, count in report.probe_sizes.items()
    )
    said = (div(grey(ticked(text))) for text in _forgotten(report))
    return rule(tag("b", "a general set"), grey(f" {sizes}"), table(rows, align="lrrlr" + "r" * (len(head) - 5)), *said)


def _forgotten(report: Scores) -> list[str]:
    """Say whether something was forgotten."""
    if not report.probe:
        return []
    worse = [c.title for name, c in report.probe.items() if c.verdict == "worse" and name != "perplexity"]
    if worse:
        advice = "A lower learning rate, fewer steps, or `retain` keep more."
        return [f"Something was forgotten: {' and '.join(worse)} got worse. {advice}"]
    return ["No sign that anything was forgotten."]


def _shots(report: Scores) -> list[str]:
    """Say what baselines are."""
    counts: dict[str, int] = report.about.get("shots", {})
    return [f"{name}: the base with {count} training rows before each question" for name, count in counts.items()]


def _change(comparison: Comparison) -> list[object]:
    """Return the difference with its interval, in the colour of its verdict, and p."""
    interval = (
        f"{words.signed(comparison.difference)} ({words.signed(comparison.low)} to {words.signed(comparison.high)})"
    )
    p = "" if comparison.p is None else words.chance(comparison.p)
    return [span(interval, style=f"color:{VERDICTS[comparison.verdict]}"), grey(p)]


def _sliced(report: Scores) -> list[tuple[str, str, int, Comparison]]:
    """Return column, value, number of rows and the first measure of each slice."""
    return [
        (own["column"], clean(own["value"], 60), own["rows"], comparison)
        for own, comparisons in report.by_slice
        for comparison in list(comparisons.values())[:1]
    ]


def _slices(report: Scores) -> list[Html]:
    """Return a table for each column by which rows were sliced: the first measure, slice by slice."""
    found = []
    for column, lines in itertools.groupby(_sliced(report), key=lambda line: line[0]):
        rows: list[list[object]] = [[grey(text) for text in (column, "rows", "base", "tuned", "difference", "p")]]
        title = ""
        for _, value, count, comparison in lines:
            title = comparison.title
            scores = [words.value(comparison.base), tag("b", words.value(comparison.tuned))]
            rows.append([escape(value, 60), str(count), *scores, *_change(comparison)])
        found.append(rule(tag("b", f"{title} by {clean(column, 60)}"), table(rows, align="lrrrlr")))
    return found


def _classes(report: Scores) -> list[Html]:
    """Return the confusion matrix as a picture, and the scores of each class, the weakest first."""
    if not report.classes:
        return []
    picture = image(svg(confusion_figure(report.confusion.to_numpy(), report.classes)), _spoken(report))
    frame = report.per_class.sort_values("f1", kind="stable")
    rows: list[list[object]] = [[grey(name) for name in ("class", *PER_CLASS)]]
    rows += [
        [escape(name, 60), *(words.value(value) for value in scores[:-1]), str(int(scores[-1]))]
        for name, scores in zip(frame.index, frame.to_numpy(dtype=float).tolist(), strict=True)
    ]
    width = min(640, 200 + 36 * len(report.classes))
    curves = []
    if report.curves:
        said = "ROC, precision and recall, and calibration; the numbers are in report.curves"
        curves = [div(image(svg(curves_figure(report.curves)), said), style="max-width:640px;margin-top:8px")]
    return [
        div(picture, style=f"max-width:{width}px;margin-top:8px"),
        *curves,
        details(
            f"{'each class' if len(rows) <= _MOST_CLASSES + 1 else f'{_MOST_CLASSES} classes'}, the weakest first",
            table(rows[: _MOST_CLASSES + 1], align="lrrrr"),
        ),
    ]


def _spoken(report: Scores) -> str:
    matrix = report.confusion.to_numpy()
    return f"confusion matrix: {matrix.trace()} of {matrix.sum()} rows on the diagonal"


def _wrong(report: Scores) -> Html | None:
    rows = report.notable()["wrong"]
    if not rows:
        return None
    cells: list[list[object]] = [[grey(name) for name in ("given", "chosen", "sure", "text")]]
    cells += [
        [
            escape(row["reference"], 60),
            escape(row["tuned"], 60),
            words.value(number(row["probability_tuned"])),
            span(escape(row["question"], _CHARACTERS), style=f"color:{GREY}"),
        ]
        for row in rows
    ]
    return rule(tag("b", "wrong, the surest first"), table(cells, align="llrl"))


def _examples(title: str, rows: list[dict[str, Any]]) -> Html:
    parts: list[object] = [tag("b", title)]
    for row in rows:
        if row["question"]:
            parts.append(div("“", escape(row["question"], _CHARACTERS), "”", style=f"color:{GREY};margin-top:4px"))
        cells: list[list[object]] = [
            [grey(side), code(escape(row[key], _CHARACTERS))]
            for side, key in (("expected", "reference"), ("base", "base"), ("tuned", "tuned"))
            if row.get(key) is not None
        ]
        if "loss_base" in row:
            losses = f"{words.value(number(row['loss_base']))} → {words.value(number(row['loss_tuned']))}"
            cells.append([grey("loss"), span(losses, style=f"color:{GREY}")])
        parts.append(table(cells))
    return rule(*parts)
