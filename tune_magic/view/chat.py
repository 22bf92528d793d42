"""The card of a chat: what was said, the answers of tuned models and base beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tune_magic.view.html import (
    BLUE,
    GREEN,
    GREY,
    LINE,
    ORANGE,
    RED,
    Bundle,
    Html,
    box,
    bundle,
    clean,
    div,
    escape,
    grey,
    heading,
)  # fmt: skip

_COLOURS = (GREEN, BLUE, ORANGE, RED)  # of who answers beside the base, in turn
_DOTS = {"ended": GREY, "listening": GREEN}
_LONGEST = 4000
_SHOWN_TURNS = 20


def chat_card(name: str, turns: Sequence[Any], state: str) -> Bundle:
    """Return a conversation.

    Args:
        name: Of the run, or of the runs.
        turns: Each with ``text``, ``sides``, ``answers`` by side (``text``, ``is_whole``, ``tokens``, ``seconds``) and
            ``is_first``, see `chatting.Turn`.
        state: What the worker does.
    """
    colour = RED if state.startswith("failed") else _DOTS.get(state, BLUE)
    shown = turns[-_SHOWN_TURNS:]
    earlier = len(turns) - len(shown)
    body: list[Html] = [heading(colour, name, clean(f"chat · {state}", 300), "")]
    body += [grey(f"{earlier} earlier turns are in the run folder")] if earlier else []
    body += [_turn(turn) for turn in shown]
    return bundle(box(*body), [f"{name}: chat · {state}", *(line for turn in shown for line in _lines(turn))])


def _turn(turn: Any) -> Html:
    top = f"border-top:1px {'solid' if turn.is_first else 'dashed'} {LINE};margin-top:8px;padding-top:8px"
    said = div(escape(turn.text, _LONGEST), style="font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere")
    answers = [_answer(side, turn.answers, _COLOURS[i % len(_COLOURS)]) for i, side in enumerate(turn.sides)]
    return div(said, div(*answers, style="display:flex;flex-wrap:wrap;gap:8px 20px;margin-top:6px"), style=top)


def _answer(side: str, answers: Mapping[str, Any], colour: str) -> Html:
    answer = answers.get(side)
    colour = GREY if side == "base" else colour
    text = answer.text if answer is not None else ""
    waiting = answer is None or not answer.is_whole
    shown = escape(text or ("…" if waiting else "(an empty answer)"), _LONGEST)
    return div(
        div(grey(_about(side, answer), size=11)),
        div(shown, "▌" if waiting and text else None, style="white-space:pre-wrap;overflow-wrap:anywhere"),
        style=f"flex:1 1 320px;min-width:0;border-left:3px solid {colour};padding-left:10px",
    )


def _about(side: str, answer: Any) -> str:
    if answer is None or not answer.is_whole or not answer.tokens:
        return clean(side, 80)
    return f"{clean(side, 80)} · {answer.tokens} tokens, {answer.tokens / max(answer.seconds, 1e-3):.0f} a second"


def _lines(turn: Any) -> list[str]:
    lines = [f"> {clean(turn.text, 400)}"]
    for side in turn.sides:
        answer = turn.answers.get(side)
        text = " ".join(answer.text.split()) if answer is not None else ""
        lines.append(f"{clean(side, 80)}: {text or '…'}")
    return lines
