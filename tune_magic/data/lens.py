"""The label lens: rows as the model sees them, with what it learns and what was cut off."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tune_magic.data.content import (
    Content,
    Labelled,
    Measured,
    MultiLabelled,
    PromptCompletion,
    Sited,
    Tasked,
    Text,
    Turns,
)
from tune_magic.data.example import Example
from tune_magic.data.read import RowFaults
from tune_magic.data.render import Part, Renderer, pair_of

ROWS = 3
_HEAD_TOKENS, _TAIL_TOKENS = 160, 60  # shown of a long span: a prompt's end is as telling as its beginning
_MOST_SPANS = 24
_NO_LIMIT = 1 << 30


def rows_to_show(examples: Sequence[Example]) -> list[Example]:
    """Return the first rows; where one was cut, it is among them."""
    shown = list(examples[:ROWS])
    cut = next((example for example in examples if example.num_cut), None)
    if cut is not None and not any(example.num_cut for example in shown):
        shown[-1] = cut
    return shown


def lens(example: Example, content: Content | None, renderer: Renderer) -> dict[str, Any]:
    """Return a row as the model sees it, JSON-ready.

    Args:
        example: The row as it is trained.
        content: The same row before it was encoded, for the text that was cut off; None when it is not at hand.
        renderer: What encoded it.

    Returns:
        ``spans`` of [text, is trained], ``cut_text`` beyond them, ``tokens``, ``trained`` and ``cut`` as numbers of
        tokens, and the ``label`` of a row that has one.
    """
    tokenizer, tokens = renderer.tokenizer, example.trunk.tokens
    trained = example.trunk.weights > 0
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    found = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    spans = [[_excerpt(tokens[a:b], tokenizer), bool(trained[a])] for a, b in found[:_MOST_SPANS]]
    spans += [[f" → {_excerpt(branch.tokens, tokenizer)}", bool(branch.weights.any())] for branch in example.branches]
    beyond: Sequence[int] | np.ndarray = ()
    if not getattr(tokenizer, "reads_texts", True):
        spans = [[example.question or "", False]]
    elif example.num_cut and content is not None:
        beyond = _beyond(example, content, renderer)
    is_whole = example.label is not None or (example.targets is not None and not trained.any())
    said = f"nearness {example.targets[0]:g}" if example.branches and example.targets is not None else example.reference
    label = {"label": said or "no label"} if is_whole else {}
    return {
        "spans": spans, "cut_text": _excerpt(beyond, tokenizer), "tokens": len(example),
        "trained": int(example.weight), "cut": example.num_cut, **label,
    }  # fmt: skip


def _beyond(example: Example, content: Content, renderer: Renderer) -> np.ndarray:
    """Return the tokens that were cut off."""
    whole_renderer = Renderer(renderer.tokenizer, chat_template=renderer.uses_template, max_length=_NO_LIMIT)
    if isinstance(content, Labelled | Measured | MultiLabelled | Sited | Tasked):
        whole = whole_renderer.whole([pair_of(content)], [0])[0].trunk.tokens
        has_end = example.trunk.tokens[-1] == whole[-1] and len(whole) > len(example) > 1  # a closing token stays
        start = len(example) - 1 if has_end else len(example)
        return whole[start : start + example.num_cut]
    if not isinstance(content, Turns | PromptCompletion | Text):
        return np.empty(0, dtype=np.int32)
    found = whole_renderer.examples(Part([content], ["row"], [0], RowFaults("row")))
    # a chat may be an example for each of its answers; the one it was cut from begins as it does
    wholes = (
        one.trunk.tokens for one in found if np.array_equal(one.trunk.tokens[: len(example)], example.trunk.tokens)
    )
    return next(wholes)[len(example) :]


def _excerpt(tokens: Sequence[int] | np.ndarray, tokenizer: Any) -> str:
    ids = list(map(int, tokens))
    if len(ids) <= _HEAD_TOKENS + _TAIL_TOKENS:
        return str(tokenizer.decode(ids))
    return f"{tokenizer.decode(ids[:_HEAD_TOKENS])} […] {tokenizer.decode(ids[-_TAIL_TOKENS:])}"
