"""The forgetting probe: a general set, asked of the model before and after it was tuned.

What a model could do before and no longer can is seen by neither the training rows nor the held-out ones, which are of one
kind (catastrophic forgetting: McCloskey and Cohen 1989; of language models Luo et al. 2023, arXiv:2308.08747).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic.data.content import Content, PromptCompletion, Text
from tune_magic.data.example import Example, Segment
from tune_magic.data.read import RowFaults
from tune_magic.data.render import Part, Renderer
from tune_magic.data.table import Table, TableWriter
from tune_magic.errors import TuneError
from tune_magic.evaluation import general
from tune_magic.evaluation.answers import AnswerScorer
from tune_magic.evaluation.choices import ChoiceScorer
from tune_magic.evaluation.scorer import Scorer
from tune_magic.evaluation.sides import Side
from tune_magic.objectives.lm import LM
from tune_magic.training.tuned import Tuned

_ROOM = 512  # tokens of a row, where the model can read them


@dataclass(frozen=True)
class Half:
    """One half of the general set.

    Attributes:
        name: As the report calls it.
        scorer: What scores it.
        metrics: Which of its measures.
        encode: Returns its rows by a tokenizer; rows that are too long for it are not there.
    """

    name: str
    scorer: type[Scorer]
    metrics: tuple[str, ...]
    encode: Callable[[Renderer], list[Example]]


def check(tuned: Tuned) -> None:
    """Refuse a run whose base does not go on with texts.

    Raises:
        TuneError: It is no such language model.
    """
    if tuned.objective.gives != "texts" or tuned.objective.engine != "tokens":
        raise TuneError(
            f"{tuned.run.name or tuned.run.id} is no language model that goes on with a text, so there is no general knowledge "
            "to probe.",
            hint="Leave out `--probe`.",
        )


def sides_of(half: Half, sides: Sequence[Side], folder: Path) -> list[Side]:
    """Return the models, without baselines, with those rows of a half that all of them read whole."""
    asked = [(side, side.reads) for side in sides if side.reads is not None]
    made = [half.encode(reads.rows(folder, room=_ROOM).renderer) for _, reads in asked]
    common = set.intersection(*({example.index for example in examples} for examples in made))
    tables = [_table([example for example in examples if example.index in common], folder) for examples in made]
    places = np.array(sorted(common))
    return [replace(side, rows=table, places=places) for (side, _), table in zip(asked, tables, strict=True)]


def _questions(renderer: Renderer) -> list[Example]:
    """Return each question with its answers as branches, the number of the right one as its label."""
    asked = general.questions()
    contents = [_content(question, choice, renderer) for question in asked for choice in question.choices]
    made = {example.index: example for example in renderer.examples(_part(contents)) if not example.num_cut}
    found, number = [], 0
    for index, question in enumerate(asked):
        own = [made[place] for place in range(number, number + len(question.choices)) if place in made]
        number += len(question.choices)
        if len(own) == len(question.choices):
            prompt = Segment(own[0].prompt, np.zeros(own[0].answer_start, dtype=np.float32))
            tails = [example.trunk.tokens[example.answer_start :] for example in own]
            branches = tuple(Segment(tail, np.ones(len(tail), dtype=np.float32)) for tail in tails)
            right = question.choices[question.right]
            found.append(
                Example(prompt, branches, question=question.text, reference=right, index=index, label=question.right)
            )
    return found


def _content(question: general.Question, choice: str, renderer: Renderer) -> Content:
    if renderer.uses_template:
        return PromptCompletion(question.text, choice)
    return PromptCompletion(f"Question: {question.text}\nAnswer:", f" {choice}")


def _prose(renderer: Renderer) -> list[Example]:
    """Return paragraphs, every token of them to be predicted."""
    made = LM().examples(_part([Text(text) for text in general.paragraphs()]), renderer)
    pieces = [example.index for example in made]
    return [example for example in made if pieces.count(example.index) == 1]


def _part(contents: Sequence[Content]) -> Part:
    return Part(contents, [""] * len(contents), range(len(contents)), RowFaults("the general set", skips=True))


def _table(examples: Sequence[Example], folder: Path) -> Table:
    with TableWriter(folder) as writer:
        writer.add([replace(example, number=number) for number, example in enumerate(examples)])
        return writer.table()


def told(sides: Sequence[Side], said: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a line for each question: its kind, the answers, which is right, and what each model finds likeliest."""
    asked, found = general.questions(), []
    for number, index in enumerate(sides[0].rows.indices.tolist()):
        question = asked[index]
        line: dict[str, Any] = {
            "kind": question.kind,
            "question": question.text,
            "reference": question.choices[question.right],
        }
        for side, own in zip(sides, said, strict=True):
            line[side.name] = question.choices[int(np.argmax(own[number]["choices"]))]
        found.append(line)
    return found


QUESTIONS = Half("questions", ChoiceScorer, ("likeliest",), _questions)
PROSE = Half("prose", AnswerScorer, ("loss", "perplexity"), _prose)
HALVES = (QUESTIONS, PROSE)
