"""Answers to a few held-out prompts while training, for people to read."""

from __future__ import annotations

import itertools
import time
from typing import Any

from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.models.generate import generate
from tune_magic.training.outputs import outputs_of
from tune_magic.training.prepare import Session

_SHARE_OF_TIME = 0.1


class Sampler:
    """Logs a `sample` event at evaluations; it is skipped while samples have taken more than a tenth of the time so far.

    Greedy, so it draws no random numbers and training goes on as if it were not there.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._started = time.monotonic()
        self._spent_s = 0.0
        self._examples = self._first(session.compared if len(session.compared) else session.dataset.held_out)
        self._base_examples = self._first(session.base_held_out)

    def _first(self, held_out: Table) -> list[Example]:
        answerable = (example for example in held_out if example.reference is not None)
        return list(itertools.islice(answerable, self._session.recipe.eval.samples))

    def sample(self, step: int) -> None:
        """Answer the prompts with the model as it stands after `step`; 0 is the base, by its own tokens."""
        session, started = self._session, time.monotonic()
        if not self._examples or (self._spent_s > _SHARE_OF_TIME * (started - self._started) and step > 0):
            return
        session.model.eval()
        vocabulary, examples = session.vocabulary, self._examples if step else self._base_examples
        tokenizer = vocabulary.tokenizer if step else vocabulary.base
        said = self._spoken(examples) if session.objective.scores_rows else self._answers(examples, tokenizer)
        items = [
            {"row": example.index, "question": example.question, "answer": answer, "reference": example.reference}
            for example, answer in said
        ]
        session.log.append("sample", step=step, items=items)
        self._spent_s += time.monotonic() - started

    def _answers(self, examples: list[Example], tokenizer: Any) -> list[tuple[Example, str]]:
        session = self._session
        with session.engine.autocast():  # what is trained may be in another precision than the rest
            answers = generate(
                session.model,
                tokenizer,
                [example.prompt for example in examples],
                max_new_tokens=session.recipe.eval.max_new_tokens,
                between=session.control.check,
            )
        return list(zip(examples, answers, strict=True))

    def _spoken(self, examples: list[Example]) -> list[tuple[Example, str]]:
        """Return what the model finds in each row, in words."""
        session = self._session
        outputs = outputs_of(session.engine, session.objective, examples)
        return session.objective.spoken(outputs, examples)
