"""Rows with something asked and something answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tune_magic.data.content import Answered, Located, PromptCompletion, Text, Turns
from tune_magic.data.formats.base import BadRow, Format, Values
from tune_magic.data.formats.chats import messages_of
from tune_magic.data.read import Row


class PromptAndCompletion(Format):
    """A prompt and its completion; both texts, or both lists of messages."""

    needs = ("prompt", "completion")
    uses = ("system",)
    also: ClassVar = {"prompt": ("query", "problem", "input"), "completion": ("response", "solution", "output")}
    rank = 60

    def content(self, values: Values) -> Answered:
        prompt, completion = self.value(values, "prompt"), self.value(values, "completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            before = messages_of(prompt, self.columns["prompt"], needs_assistant=False)
            after = messages_of(completion, self.columns["completion"], needs_assistant=True)
            return Turns(before + after, len(before))
        system = self.text_or_none(values, "system")
        return PromptCompletion(self.text(values, "prompt"), self.text(values, "completion"), system)


class Instruction(Format):
    """Alpaca's and Dolly's rows: an instruction, sometimes with an input it is about, and an output."""

    needs = ("instruction", "output")
    uses = ("input", "system")
    also: ClassVar = {"output": ("response", "completion"), "input": ("context",)}
    rank = 40

    def content(self, values: Values) -> PromptCompletion:
        instruction, context = self.text(values, "instruction"), self.text_or_none(values, "input")
        prompt = f"{instruction}\n\n{context}" if context else instruction
        return PromptCompletion(prompt, self.text(values, "output"), self.text_or_none(values, "system"))


class QuestionAnswer(Format):
    """A question and its answer, sometimes with a text that holds the answer, as in SQuAD."""

    needs = ("question", "answer")
    uses = ("context", "system")
    also: ClassVar = {"answer": ("answers",), "context": ("passage",)}
    rank = 50

    def content(self, values: Values) -> PromptCompletion:
        question, context = self.text(values, "question"), self.text_or_none(values, "context")
        prompt = f"{context}\n\n{question}" if context else question
        return PromptCompletion(prompt, self._answer(values), self.text_or_none(values, "system"))

    def _answer(self, values: Values) -> str:
        """Return the answer, the first where there are several."""
        value = self.value(values, "answer")
        if isinstance(value, dict) and isinstance(value.get("text"), list | str):
            value = value["text"]
        if isinstance(value, str):
            return self.text(values, "answer")
        if isinstance(value, list) and value and isinstance(value[0], str) and value[0].strip():
            return str(value[0])
        raise BadRow(f"column `{self.columns['answer']}` holds no answer", value)


class Extractive(Format):
    """A question, a text, and the answers that stand in the text, as in SQuAD: `{text: [...], answer_start: [...]}`."""

    needs = ("question", "context", "answers")
    also: ClassVar = {"answers": ("answer",), "context": ("passage",)}
    rank = 51
    objective = "extractive_qa"

    def content(self, values: Values) -> Located:
        question, text, given = (
            self.text(values, "question"),
            self.text(values, "context"),
            self.value(values, "answers"),
        )
        starts: list[Any] = []
        if isinstance(given, dict):
            starts, given = _listed(given.get("answer_start")), given.get("text")
        answers = [answer for answer in _listed(given) if _is_said(answer)]
        if not answers:
            return Located(question, text, [])
        start = starts[0] if starts and isinstance(starts[0], int) else text.find(answers[0])
        if text[start : start + len(answers[0])] != answers[0] or start < 0:
            raise BadRow("the answer does not stand in the text", answers[0])
        return Located(question, text, answers, start)


class SourceTarget(Format):
    """A text and what it becomes: a translation, a summary."""

    needs = ("source", "target")
    uses = ("system",)
    also: ClassVar = {"source": ("document", "article"), "target": ("summary", "highlights")}
    rank = 45

    def content(self, values: Values) -> PromptCompletion:
        return PromptCompletion(
            self.text(values, "source"), self.text(values, "target"), self.text_or_none(values, "system")
        )


class Translation(Format):
    """A text in two languages under one column, `{de: ..., en: ...}`; from the first to the second."""

    needs = ("translation",)
    rank = 30

    def fits(self, rows: Sequence[Row]) -> bool:
        return all(isinstance(self.value(row.values, "translation"), dict) for row in rows[:1])

    def content(self, values: Values) -> PromptCompletion:
        pair = self.value(values, "translation")
        if not isinstance(pair, dict) or len(pair) != 2 or not all(_is_said(text) for text in pair.values()):
            raise BadRow(f"column `{self.columns['translation']}` must hold a text in each of two languages", pair)
        source, target = pair.values()
        return PromptCompletion(source, target)


class PlainText(Format):
    """Texts, all of which is learned."""

    needs = ("text",)
    also: ClassVar = {"text": ("content",)}
    rank = 90

    def content(self, values: Values) -> Text:
        return Text(self.text(values, "text"))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_said(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
