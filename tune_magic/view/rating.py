"""Cards of a rating: the pair to vote on, how far it is, and what the votes say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tune_magic.evaluation.votes import BAD, EQUAL, SKIP, A, B
from tune_magic.view import words
from tune_magic.view.card import VERDICTS
from tune_magic.view.html import (
    BLUE,
    GREEN,
    GREY,
    LINE,
    Bundle,
    Html,
    bar,
    box,
    bundle,
    clean,
    div,
    escape,
    grey,
    heading,
    rule,
    span,
    table,
    tag,
    ticked,
)

TITLES = {A: "A is better", B: "B is better", EQUAL: "Equal", BAD: "Both bad", SKIP: "Skip"}
_EMPTY = "(an empty answer)"
_LONGEST = 8000  # characters of an answer; both are cut alike
_LONGEST_TURN = 2000
_SHOWN_TURNS = 8


def pair_card(
    prompt: Sequence[Mapping[str, Any]], answers: tuple[str, str], *,
    done: int, total: int, equal: int, chosen: str | None, rater: str,
) -> Bundle:  # fmt: skip
    """Return a pair as the rater sees it: nothing tells which answer is whose.

    Args:
        prompt: The messages that are answered.
        answers: A and B.
        done: Pairs with a vote.
        total: Pairs.
        equal: Rows with equal answers, which are not shown.
        chosen: What this rater chose before, when going back.
        rater: Who rates.
    """
    notes = [
        _equal(equal) if not done else None,
        f"You said: {TITLES[chosen]}. Another vote changes it; Skip leaves it." if chosen else None,
    ]
    body = [
        heading(BLUE, "Which answer is better?", f"{done} of {total} rated", clean(rater, 60)),
        bar(done / max(1, total), BLUE),
        *_turns(prompt),
        div(*map(_answer, (A, B), answers), style="display:flex;flex-wrap:wrap;gap:10px 20px;margin-top:10px"),
        *(rule(grey(note)) for note in notes if note),
    ]
    lines = [f"Which answer is better? {done} of {total} rated"]
    lines += [f"{message['role']}: {_content(message)}" for message in prompt[-_SHOWN_TURNS:]]
    lines += [f"{letter}: {text.strip() or _EMPTY}" for letter, text in zip((A, B), answers, strict=True)]
    return bundle(box(*body), [*lines, *(note for note in notes if note)])


def pair_text(prompt: Sequence[Mapping[str, Any]], answers: tuple[str, str]) -> str:
    """Return a pair for a terminal, whole: what stands for a card in a saved notebook is cut to few lines."""
    parts = [f"{message['role']}: {_content(message)}" for message in prompt[-_SHOWN_TURNS:]]
    parts += [f"{letter}: {text.strip() or _EMPTY}" for letter, text in zip((A, B), answers, strict=True)]
    return "\n\n".join(clean(part, _LONGEST) for part in parts)


def progress_card(name: str, rater: str, counts: Mapping[str, int], *, total: int, equal: int, again: str) -> Bundle:
    """Return how far a rating is, without a word on who leads.

    Args:
        name: Of the run.
        rater: Who rates.
        counts: How often each was chosen.
        total: Pairs to rate.
        equal: Rows with equal answers.
        again: The line that opens it again.
    """
    done = sum(counts.values())
    subject = f"rated by {clean(rater, 60)} · {done} of {total} rows"
    said = ", ".join(f"{title} {counts[choice]}" for choice, title in TITLES.items() if counts.get(choice))
    notes = [said, _equal(equal), f"`{again}` goes on where this ended." if done < total else ""]
    body = [
        heading(GREEN if done == total else BLUE, name, subject, ""),
        bar(done / total if total else 1.0, BLUE),
        *(div(grey(ticked(note)), style="margin-top:4px") for note in notes if note),
    ]
    return bundle(box(*body), [f"{clean(name, 80)}: {subject}", *(f"  {note}" for note in notes if note)])


def rating_card(rating: Any, name: str) -> Bundle:
    """Return what votes say.

    Args:
        rating: A `rating.Rating`.
        name: Of the run.
    """
    against = clean(rating.against, 60)
    people = ", ".join(clean(rater, 60) for rater in rating.raters)
    subject = f"rated against {against} on {rating.num_rows} rows"
    outcome = f"better on {rating.wins}, worse on {rating.losses}, neither on {rating.ties}"
    facts = _facts(rating)
    notes = [_equal(rating.num_equal), _how(rating), *rating.damage]
    colour = VERDICTS[rating.verdict]
    body = [
        heading(GREEN, name, subject, f"by {people}"),
        div(tag("b", "tuned "), span(outcome, style=f"color:{colour}"), style="margin-top:4px"),
        _bar(rating.wins, rating.ties, rating.losses),
        table([[grey(title), text] for title, text in facts]),
        *(div(grey(note), style="margin-top:4px") for note in notes if note),
        _raters(rating) if len(rating.raters) > 1 else None,
    ]
    lines = [f"{clean(name, 80)}: {subject} by {people}", f"  tuned {outcome}"]
    lines += [f"  {title}: {text}" for title, text in facts]
    return bundle(box(*body), [*lines, *(f"  {note}" for note in notes if note)])


def _turns(prompt: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Return the messages that are answered, the last one in bold, earlier ones quiet."""
    shown = prompt[-_SHOWN_TURNS:]
    wrap = "white-space:pre-wrap;overflow-wrap:anywhere"
    earlier = len(prompt) - len(shown)
    found = [div(grey(f"{earlier} earlier messages"), style="margin-top:8px")] if earlier else []
    for number, message in enumerate(shown, start=1):
        is_last = number == len(shown)
        role = None if is_last and message["role"] == "user" else grey(f"{clean(message['role'], 20)}: ")
        text = escape(_content(message), _LONGEST_TURN)
        weight = "font-weight:600;margin-top:8px" if is_last else f"color:{GREY};margin-top:6px"
        found.append(div(role, text, style=f"{wrap};{weight}"))
    return found


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else str(content or "")


def _answer(letter: str, text: str) -> Html:
    body = escape(text, _LONGEST) if text.strip() else grey(_EMPTY, size=13)
    cut = div(grey(f"cut: {len(text)} characters")) if len(text) > _LONGEST else None
    return div(
        div(tag("b", letter), style=f"border-bottom:1px solid {LINE};padding-bottom:2px;margin-bottom:6px"),
        div(body, style="white-space:pre-wrap;overflow-wrap:anywhere"),
        cut,
        style=f"flex:1 1 320px;min-width:0;border:1px solid {LINE};border-radius:6px;padding:8px 12px",
    )


def _facts(rating: Any) -> list[tuple[str, str]]:
    rate, first = rating.win_rate, rating.first
    found = []
    if rate.total:
        chance = f"sign test p {words.chance(rate.p)}"
        found.append(("win rate without ties", f"{_share(rate)}, {chance}"))
    if first.total:
        leaning = "no sign that a place was preferred" if first.p > 0.05 else "the place of an answer had a say"
        found.append(("A chosen over B", f"{_share(first)}, p {words.chance(first.p)}: {leaning}"))
    agreed = rating.agreement
    if agreed is not None:
        beyond = "" if agreed.beyond_chance is None else f", {agreed.measure} {words.value(agreed.beyond_chance)}"
        found.append(
            (f"agreement of {agreed.raters} raters", f"{_percent(agreed.same)} of votes on {agreed.rows} rows{beyond}")
        )
    found += [
        (f"{clean(_title(rating, metric), 60)} prefers the same", f"{share.count} of {share.total} rows")
        for metric, share in rating.by_metric.items()
    ]
    return found


def _how(rating: Any) -> str:
    once = "; a row counts once, by the majority of its raters" if len(rating.raters) > 1 else ""
    return f"95 % intervals by Wilson's formula, p by the binomial test{once}"


def _title(rating: Any, metric: str) -> str:
    return str(rating.report.comparisons[metric].title) if metric in rating.report.comparisons else metric


def _raters(rating: Any) -> Html:
    rows: list[list[object]] = [[grey(text) for text in ("rater", *TITLES.values())]]
    rows += [[escape(name, 60), *(str(counts[choice]) for choice in TITLES)] for name, counts in rating.choices.items()]
    return rule(table(rows, align="lrrrrr"))


def _bar(wins: int, ties: int, losses: int) -> Html:
    """Return wins, ties and losses as parts of one bar."""
    parts = [(wins, VERDICTS["better"]), (ties, LINE), (losses, VERDICTS["worse"])]
    total = max(1, wins + ties + losses)
    shown = [div(style=f"width:{100 * count / total:.1f}%;background:{colour};height:6px") for count, colour in parts]
    return div(*shown, style="display:flex;max-width:420px;border-radius:3px;overflow:hidden;margin:4px 0")


def _share(share: Any) -> str:
    return f"{_percent(share.value)} ({_percent(share.low)} to {_percent(share.high)}, {share.count} of {share.total})"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def _equal(count: int) -> str:
    rows, count_as, are = ("row has", "counts as a tie", "is") if count == 1 else ("rows have", "count as ties", "are")
    return f"{count} {rows} equal answers: they {count_as} and {are} not shown." if count else ""
