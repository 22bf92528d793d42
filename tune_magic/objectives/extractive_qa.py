"""Extractive question answering: where in a text a question is answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tune_magic.data.content import Content, Located
from tune_magic.data.example import Example, Segment
from tune_magic.data.render import Part, Renderer
from tune_magic.errors import TuneError
from tune_magic.models.load import load_head
from tune_magic.objectives.base import Objective
from tune_magic.objectives.padding import padded
from tune_magic.recipe.schema import ObjectiveOptions

if TYPE_CHECKING:
    import pandas as pd
    import torch

_CONTEXT = 1  # which of a pair the tokens of the text belong to
_NOTHING = "no answer"
_BETWEEN = "\n\n"
_OR = "\n"  # between right answers


class ExtractiveQAOptions(ObjectiveOptions):
    """Keys of `objective: extractive_qa`."""

    name: Literal["extractive_qa"] = Field("extractive_qa", description="Train a head that finds answers in texts.")
    doc_stride: int = Field(128, ge=0, description="Tokens that neighbouring parts of a long text have in common.")
    max_answer_length: int = Field(30, ge=1, description="Longest answer that is looked for, in tokens.")


@dataclass
class SpanStates:
    """What is seen of a microbatch of B parts of texts, L tokens the longest.

    Attributes:
        logits: (B, 2, L) float32, of beginning and end, -inf where no answer may begin or end.
        targets: (B, 2) the right tokens; the first token where the answer is not in this part.
    """

    logits: torch.Tensor
    targets: torch.Tensor


class ExtractiveQA(Objective):
    """Minus the log-likelihood of the answer's first and last token, halved; the first token of all says "not here".

    Long texts are cut into parts that overlap, an example each; of a row's parts the surest answer counts.
    """

    Options = ExtractiveQAOptions
    formats = ("extractive",)
    task = "QUESTION_ANS"
    engine = "outputs"
    gives = "outputs"
    new_head = True
    metrics = ("span_exact_match", "span_f1")
    summary = "A head learns at which token of a text the answer to a question begins and at which it ends."
    formula = "L = − (1 / 2n) Σ_i [log p(first token of the answer | question, part i) + log p(last token of the answer | question, part i)], i over parts of texts"
    source = (
        "Devlin et al. 2019, BERT, arXiv:1810.04805, section 4.2; Rajpurkar et al. 2018, SQuAD 2, arXiv:1806.03822."
    )
    when = (
        "When answers stand word for word in a text that is given with the question; otherwise teach answers by `sft`."
    )

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode question and text, in parts where they are too long; each part says where the answer is in it."""
        found: list[Example] = []
        for content, place, index in zip(part.contents, part.places, part.numbers, strict=True):
            assert isinstance(content, Located)
            parts = self._parts(content, renderer)
            if parts is None:
                hint = "Raise `max_length`, or shorten the questions."
                part.faults.add(place, "the question alone is longer than max_length", content.question, hint=hint)
            elif not all(len(_own(encoding)) for encoding in parts):
                part.faults.add(place, "the model's tokenizer makes no token of the text", content.text)
            else:
                found += [_example(encoding, content, index) for encoding in parts]
        return found

    def _parts(self, content: Located, renderer: Renderer) -> list[Any] | None:
        """Return the encodings of a row's parts; None where the question leaves no room."""
        question = len(renderer.encodings([content.question])[0].ids) + 1
        room = renderer.max_length - question
        if room < 1:
            return None
        (whole,) = renderer.encodings(
            [(content.question, content.text)], max_length=renderer.max_length, strategy="only_second",
            stride=min(self.options.doc_stride, room // 2),
        )  # fmt: skip
        return [whole, *whole.overflowing]

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model with a new head of two outputs a token."""
        return load_head(folder, dtype, "QuestionAnswering")

    def batch(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, np.ndarray]:
        """Padded rows, with the kind of each token for models that tell question and text apart."""
        given = padded([example.trunk.tokens for example in examples], pad_token_id)
        kinds = np.zeros_like(given["input_ids"])
        for row, example in enumerate(examples):
            kinds[row, _Span.of(example).first : len(example)] = 1
        return {**given, "token_type_ids": kinds}

    def states(self, outputs: Any, examples: Sequence[Example]) -> SpanStates:
        """Take the logits of beginning and end, of tokens of the text and of the first token alone."""
        import torch

        logits = torch.stack([outputs.start_logits, outputs.end_logits], 1).float()
        allowed = np.zeros((len(examples), logits.shape[-1]), dtype=bool)
        for row, example in enumerate(examples):
            span = _Span.of(example)
            allowed[row, span.first : span.first + len(span.starts)] = True
        allowed[:, 0] = True
        mask = torch.from_numpy(allowed).to(logits.device)[:, None]
        targets = np.array([[_Span.of(example).begin, _Span.of(example).end] for example in examples])
        return SpanStates(logits.masked_fill(~mask, -torch.inf), torch.from_numpy(targets).to(logits.device))

    def loss_sum(self, states: SpanStates) -> torch.Tensor:
        """Return the sum of the mean of both."""
        from torch.nn import functional

        losses = functional.cross_entropy(states.logits.flatten(0, 1), states.targets.flatten(), reduction="sum")
        return losses / 2

    def tally(self, states: SpanStates) -> dict[str, float]:
        """Count the parts of which both ends are right."""
        return {"accuracy": float((states.logits.argmax(-1) == states.targets).all(-1).sum())}

    def read(self, states: SpanStates) -> list[np.ndarray]:
        """The log-probabilities of beginning and end, (2, L)."""
        return list(states.logits.log_softmax(-1).cpu().numpy())

    def judged(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
        """The answer found, empty where there is none, and the right ones."""
        found = list(self._answers(outputs, examples))
        return [text for _, text, _ in found], [_right_answers(example) or [""] for example, _, _ in found]

    def spoken(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """The answer to each question."""
        return [(example, text or _NOTHING) for example, text, _ in self._answers(outputs, examples)]

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Pairs of question and text."""
        found: list[Content] = []
        for given in inputs:
            if isinstance(given, str) or len(given) != 2 or not all(isinstance(part, str) for part in given):
                raise TuneError(f"A pair of question and text is needed, got {given!r}.",
                                hint='For example `run.predict([("Who came?", "Anna came late.")])`.')  # fmt: skip
            found.append(Located(given[0], given[1], []))
        return found

    def frame(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> pd.DataFrame:
        """The answer to each question, and how likely it is."""
        import pandas as pd

        found = list(self._answers(outputs, examples))
        return pd.DataFrame({"answer": [text for _, text, _ in found], "probability": [sure for _, _, sure in found]})

    def _answers(
        self, outputs: Sequence[np.ndarray], examples: Sequence[Example]
    ) -> Iterator[tuple[Example, str, float]]:
        """Yield each row's first part, its answer (empty: none) and the probability of both ends."""
        rows: dict[int, list[int]] = {}
        for place, example in enumerate(examples):
            rows.setdefault(example.index, []).append(place)
        for places in rows.values():
            answers = [self._answer(outputs[place], examples[place]) for place in places]
            sure, text = max(answers)
            nothing = min(float(outputs[place][0, 0] + outputs[place][1, 0]) for place in places)
            yield (
                (examples[places[0]], "", float(np.exp(nothing)))
                if nothing > sure
                else (examples[places[0]], text, float(np.exp(sure)))
            )

    def _answer(self, output: np.ndarray, example: Example) -> tuple[float, str]:
        """Return the likeliest span of a part: the log-probability of both ends, and its text."""
        span, count = _Span.of(example), len(_Span.of(example).starts)
        begin, end = output[:, span.first : span.first + count]
        both = begin[:, None] + end[None, :]
        too_far = np.tril(np.ones((count, count), dtype=bool), -1) | np.triu(
            np.ones((count, count), dtype=bool), self.options.max_answer_length
        )
        both = np.where(too_far, -np.inf, both)
        first, last = np.unravel_index(int(both.argmax()), both.shape)
        text = (example.question or "")[int(span.starts[first]) : int(span.ends[last])]
        return float(both[first, last]), text


@dataclass(frozen=True)
class _Span:
    """What an example's targets hold.

    Attributes:
        begin: The answer's first token, 0 where it is not in this part.
        end: Its last.
        first: First token of the text.
        answers: Characters of each right answer; the reference holds one behind the other.
        starts: Character of the example's question, with the text in it, at which each of the text's tokens begins, (tokens,).
        ends: Character at which each ends, (tokens,).
    """

    begin: int
    end: int
    first: int
    answers: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, example: Example) -> _Span:
        assert example.targets is not None
        numbers = example.targets.astype(np.int64)
        begin, end, first, count = numbers[:4].tolist()
        starts, ends = numbers[4 + count :].reshape(2, -1)
        return cls(begin, end, first, numbers[4 : 4 + count], starts, ends)

    def targets(self) -> np.ndarray:
        head = [self.begin, self.end, self.first, len(self.answers)]
        return np.concatenate([head, self.answers, self.starts, self.ends]).astype(np.float32)


def _own(encoding: Any) -> np.ndarray:
    """Return the places of the text's tokens."""
    return np.flatnonzero(np.array(encoding.sequence_ids) == _CONTEXT)  # None, an object, is never 1


def _right_answers(example: Example) -> list[str]:
    """Return the right answers of a row, which may have line breaks in them; none where it is not answered."""
    found, start = [], 0
    for size in _Span.of(example).answers.tolist():
        found.append((example.reference or "")[start : start + size])
        start += size + len(_OR)
    return found


def _example(encoding: Any, content: Located, index: int) -> Example:
    own = _own(encoding)
    offsets = np.array(encoding.offsets, dtype=np.int64)[own]
    tokens = np.asarray(encoding.ids, dtype=np.int32)
    begin = end = 0
    if content.answers:
        start, stop = content.start, content.start + len(content.answers[0])
        inside = np.flatnonzero((offsets[:, 0] < stop) & (offsets[:, 1] > start))
        if len(inside) and offsets[inside[0], 0] <= start and offsets[inside[-1], 1] >= stop:
            begin, end = int(own[inside[0]]), int(own[inside[-1]])
    before = len(content.question) + len(_BETWEEN)
    sizes = np.array([len(answer) for answer in content.answers], dtype=np.int64)
    span = _Span(begin, end, int(own[0]), sizes, before + offsets[:, 0], before + offsets[:, 1])
    return Example(
        trunk=Segment(tokens, np.zeros(len(tokens), dtype=np.float32)),
        question=f"{content.question}{_BETWEEN}{content.text}",
        reference=_OR.join(content.answers) or _NOTHING,
        index=index,
        targets=span.targets(),
    )
