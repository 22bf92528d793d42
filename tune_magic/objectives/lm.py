"""Continued pre-training: the likelihood of whole texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tune_magic.data.example import Example, Segment
from tune_magic.data.render import Part, Renderer
from tune_magic.objectives.sft import SFT

_NO_LIMIT = 1 << 30


class LM(SFT):
    """Minus the log-likelihood of every token of every text, prompts too; long texts are cut into pieces, not cut off.

    The first token of a piece is predicted from nothing, so it is no target. Pieces of one text are of nearly equal
    length, so that none is a few words without context.
    """

    summary = "The model learns to go on with your texts, every token of them, as in pre-training."
    formula = "L = − (1 / T) Σ_t log p(x_t | the tokens before it in its piece), t over all tokens"
    source = "Gururangan et al. 2020, Don't Stop Pretraining, arXiv:2004.10964."
    when = "To get a model used to a field's language before it is taught a task; take `sft` to teach answers."

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode texts, or the whole of prompts and chats as they are rendered, in pieces of at most `max_length`."""
        whole = Renderer(renderer.tokenizer, chat_template=renderer.uses_template, max_length=_NO_LIMIT)
        return [piece for example in whole.examples(part) for piece in _pieces(example, renderer.max_length)]


def _pieces(example: Example, longest: int) -> Iterator[Example]:
    tokens = example.trunk.tokens
    for piece in np.array_split(tokens, -(-len(tokens) // longest)):
        if len(piece) < 2:
            continue  # nothing comes before its only token
        weights = np.ones(len(piece), dtype=np.float32)
        weights[0] = 0.0
        yield replace(example, trunk=Segment(piece, weights), answer_start=0, question=None, reference=None)
