"""The card of a data report: what the rows are, what is wrong with them, how the model sees them."""

from __future__ import annotations

import re
from typing import Any

from tune_magic.storage.folder import RunFolder
from tune_magic.view import words
from tune_magic.view.figure import lengths_figure, svg
from tune_magic.view.html import (
    BLUE,
    GREEN,
    ORANGE,
    Bundle,
    Html,
    box,
    bundle,
    code,
    div,
    escape,
    grey,
    heading,
    image,
    rule,
    span,
    table,
)  # fmt: skip
from tune_magic.view.lens import lens, lens_lines
from tune_magic.view.rows import made_of, rows_named

_MOST_CLASSES = 12
_MOST_LANGUAGES = 5
_SERIOUS = ("leak", "near_leak", "contradiction", "cut", "rare_class", "secret", "encoding")


def data_card(run: RunFolder) -> Bundle:
    """Return the card of a data job."""
    found = run.summary().result
    facts, problems = data_facts(found), found["findings"]
    name = str(found["data"]).rsplit("/", 1)[-1]
    verdict = f"data · {_counted(len(problems))}" if problems else "data · nothing to complain of"
    left = div(table([[grey(key), value] for key, value in facts]), style="flex:1 1 380px;min-width:0")
    right = div(_lengths(found), style="flex:1 1 300px;min-width:0")
    body = [
        heading(ORANGE if problems else GREEN, name, verdict, ""),
        div(left, right, style="display:flex;flex-wrap:wrap;gap:4px 20px"),
        *map(_finding, problems),
        rule(lens(found["lens"])),
    ]
    lines = [f"{name}: {verdict}", *(f"  {key}: {value}" for key, value in facts)]
    lines += [f"  ! {finding['says']}{rows_named(finding)}{_then(finding)}" for finding in problems]
    return bundle(box(*body), [*lines, *lens_lines(found["lens"])])


def data_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of what the rows are."""
    tokens = found["tokens_per_epoch"]
    trained = "" if found["scores_rows"] else f", {100 * found['trained_tokens_per_epoch'] / tokens:.0f} % trained"
    cut = f", {found['cut_rows']} rows cut at {found['max_length']}" if found["cut_rows"] else ""
    rows = [
        ("format", _format(found)),
        ("objective", found["objective"]["name"]),
        ("rows", f"{found['train_rows']} to train, {found['held_out_rows']} held out"),
        ("tokens", f"{words.count(tokens)}{trained}{cut}, as {str(found['model']).rstrip('/').rsplit('/', 1)[-1]} counts them"),
        ("longest row", f"{found['longest_row_tokens']} tokens of {found['max_length']}"),
    ]  # fmt: skip
    if not found["scores_rows"]:
        rows.append(("chat template", "the model's own" if found["chat_template"] else "none"))
    if found.get("languages"):
        shares = [f"{name} {100 * share:.0f} %" for name, share in list(found["languages"].items())[:_MOST_LANGUAGES]]
        rows.append(("languages", ", ".join(shares)))
    rows += made_of(found)
    classes = found.get("class_rows", {})
    if classes:
        shown = [f"{name} {count}" for name, count in list(classes.items())[:_MOST_CLASSES]]
        more = f" and {len(classes) - _MOST_CLASSES} more" if len(classes) > _MOST_CLASSES else ""
        rows.append((f"{len(classes)} classes", ", ".join(shown) + more))
    return rows


def _format(found: dict[str, Any]) -> str:
    """Say what was recognised, and why."""
    why = found["recognised_by"]
    unused = [column for column in found["columns"] if column not in re.findall(r"[^\s,]+", why)]
    rest = f"; also there: {', '.join(unused[:6])}" if unused and why.startswith("column") else ""
    return f"{found['format']} ({why}{rest})"


def _lengths(found: dict[str, Any]) -> Html:
    edges, counts = found["lengths"]["edges"], found["lengths"]["counts"]
    most = counts.index(max(counts))
    alt = f"rows by length: most have {edges[most]} to {edges[most + 1] - 1} tokens, the longest {edges[-1] - 1}"
    return image(svg(lengths_figure(found["lengths"], found["max_length"])), alt)


def _finding(finding: dict[str, Any]) -> Html:
    colour = ORANGE if finding["kind"] in _SERIOUS else BLUE
    then = [" Try ", code(finding["change"])] if finding["change"] else []
    return rule(
        span("▲ ", style=f"color:{colour}"), escape(finding["says"], 300), grey(rows_named(finding), size=12), *then
    )


def _then(finding: dict[str, Any]) -> str:
    return f" Try `{finding['change']}`" if finding["change"] else ""


def _counted(count: int) -> str:
    return "one thing to look at" if count == 1 else f"{count} things to look at"
