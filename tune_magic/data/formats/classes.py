"""Rows of classes: texts, pairs of texts, words with tags, images and recordings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from tune_magic.data.content import Labelled, Measured, Media, MultiLabelled, Related, Sited, Tagged, Tasked
from tune_magic.data.formats.base import BadRow, Format, Values
from tune_magic.data.read import Row

_FIRST = ("premise", "question1", "text1")
_SECOND = ("hypothesis", "question2", "text2")


class TextLabel(Format):
    """A text of a class."""

    needs = ("text", "label")
    also: ClassVar = {
        "text": ("sentence", "review", "utterance", "content"),
        "label": ("category", "class", "intent", "sentiment", "label_text", "labels"),
    }
    rank = 70
    objective = "classify"

    def fits(self, rows: Sequence[Row]) -> bool:
        labels = [self.value(row.values, "label") for row in rows]
        return not (all(map(_is_number, labels)) and any(map(_is_measure, labels)))  # these are measures

    def content(self, values: Values) -> Labelled:
        return Labelled(self.text(values, "text"), self.label(values))


class TextDomain(Format):
    """A text of a domain, with its class where that is known."""

    needs = ("text", "domain")
    uses = ("label",)
    also: ClassVar = {"text": ("sentence", "review", "utterance", "content"), "label": ("category", "class", "intent")}
    rank = 72
    objective = "domain_adversarial"

    def content(self, values: Values) -> Sited:
        known = self.value(values, "label") not in (None, "")
        return Sited(self.text(values, "text"), self.label(values, "domain"), self.label(values) if known else None)


class TextTask(Format):
    """A text, the task it is for, and what the task is to make of it: a class or a number."""

    needs = ("text", "task", "label")
    uses = ("second",)
    also: ClassVar = {"label": ("answer", "score", "value", "target"), "second": ("text2", "sentence2")}
    rank = 73
    objective = "multi_task"

    def content(self, values: Values) -> Tasked:
        value = self.value(values, "label")
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        answer = float(value) if is_number else self.label(values)
        second = self.text_or_none(values, "second")
        return Tasked(self.text(values, "text"), self.label(values, "task"), answer, second)


class TextScore(Format):
    """A text and a number."""

    needs = ("text", "score")
    also: ClassVar = {
        "text": ("sentence", "review", "utterance", "content"),
        "score": ("value", "target", "rating", "stars", "label", "labels"),
    }
    rank = 71
    objective = "regression"
    advice = "columns: {label: score}"

    def fits(self, rows: Sequence[Row]) -> bool:
        return all(_is_number(self.value(row.values, "score")) for row in rows)

    def content(self, values: Values) -> Measured:
        return Measured(self.text(values, "text"), _number(self, values, "score"))


class TextLabels(Format):
    """A text of several classes at once."""

    needs = ("text", "labels")
    also: ClassVar = {"text": ("sentence", "review", "utterance", "content")}
    rank = 69
    objective = "multi_label"

    def fits(self, rows: Sequence[Row]) -> bool:
        return all(isinstance(self.value(row.values, "labels"), list) for row in rows)

    def content(self, values: Values) -> MultiLabelled:
        labels = self.value(values, "labels")
        if not isinstance(labels, list) or not all(isinstance(label, str | int) for label in labels):
            raise BadRow(f"column `{self.columns['labels']}` must be a list of classes", labels)
        return MultiLabelled(self.text(values, "text"), [str(label) for label in labels])


class PairLabel(Format):
    """Two texts and the class of how they relate, as in entailment and paraphrase data."""

    needs = ("sentence1", "sentence2", "label")
    also: ClassVar = {"sentence1": _FIRST, "sentence2": _SECOND, "label": ("is_duplicate", "class", "gold_label")}
    rank = 62
    objective = "classify"

    def fits(self, rows: Sequence[Row]) -> bool:
        return not any(_is_measure(self.value(row.values, "label")) for row in rows)

    def content(self, values: Values) -> Labelled:
        return Labelled(self.text(values, "sentence1"), self.label(values), self.text(values, "sentence2"))


class Pairs(Format):
    """Texts that belong together, with one that does not where there are triplets; what embeddings learn from."""

    needs = ("anchor", "positive")
    uses = ("negative",)
    also: ClassVar = {"anchor": ("query",), "positive": ("pos",), "negative": ("neg",)}
    rank = 35
    objective = "embed"

    def content(self, values: Values) -> Related:
        negative = self.text_or_none(values, "negative")
        return Related(self.text(values, "anchor"), self.text(values, "positive"), negative)


class ScoredPairs(Format):
    """Two texts, and how near they are as a number."""

    needs = ("sentence1", "sentence2", "score")
    also: ClassVar = {"sentence1": _FIRST, "sentence2": _SECOND, "score": ("similarity", "similarity_score", "label")}
    rank = 64
    objective = "embed"

    def content(self, values: Values) -> Related:
        score = _number(self, values, "score")
        return Related(self.text(values, "sentence1"), self.text(values, "sentence2"), score=score)


class TokensTags(Format):
    """Words, each with its tag: names, parts of speech."""

    needs = ("tokens", "tags")
    also: ClassVar = {"tokens": ("words",), "tags": ("ner_tags", "pos_tags", "labels")}
    rank = 15
    objective = "tag"

    def content(self, values: Values) -> Tagged:
        words, tags = self.value(values, "tokens"), self.value(values, "tags")
        if not isinstance(words, list) or not isinstance(tags, list) or not words:
            raise BadRow(f"columns `{self.columns['tokens']}` and `{self.columns['tags']}` must be lists", dict(values))
        if len(words) != len(tags):
            raise BadRow(f"{len(words)} words have {len(tags)} tags", dict(values))
        if not all(isinstance(word, str) for word in words):
            raise BadRow(f"column `{self.columns['tokens']}` must hold words", words)
        return Tagged(words, [str(tag) for tag in tags])


class ImageLabel(Format):
    """An image of a class."""

    needs = ("image", "label")
    also: ClassVar = {"image": ("img",), "label": ("category", "class")}
    rank = 16
    objective = "classify_image"
    _kind = "image"

    def content(self, values: Values) -> Media:
        source = self.value(values, self._kind)
        if isinstance(source, dict):  # how `datasets` keeps a file: its bytes, or its path
            source = source.get("bytes") or source.get("path") or (source if "array" in source else None)
        if not source:
            raise BadRow(f"column `{self.columns[self._kind]}` holds no {self._kind}", dict(values))
        return Media(self._kind, source, self.label(values))


class AudioLabel(ImageLabel):
    """A recording of a class."""

    needs = ("audio", "label")
    also: ClassVar = {"audio": ("speech",), "label": ("category", "class", "intent")}
    rank = 17
    objective = "classify_audio"
    _kind = "audio"


def _is_measure(value: Any) -> bool:
    """Whether a value is a number that no class would be called."""
    return isinstance(value, float) and not value.is_integer()


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _number(rows: Format, values: Values, name: str) -> float:
    """Return the number under a standard name.

    Raises:
        BadRow: There is none.
    """
    value = rows.value(values, name)
    if not _is_number(value):
        raise BadRow(f"column `{rows.columns[name]}` must be a number", value)
    return float(value)
