"""Rows that say which answers are better: preferences, and answers rated good or bad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tune_magic.data.content import Answered, Preference, PromptCompletion, Rated, Turns, shared_beginning
from tune_magic.data.formats.base import BadRow, Format, Values
from tune_magic.data.formats.chats import messages_of
from tune_magic.data.read import Row

_MARK = "\n\nAssistant:"  # before each answer of a chat that was written down as one text
_GOOD = {True: True, False: False, "true": True, "false": False}


class PreferencePair(Format):
    """A better and a worse answer to the same prompt; without a prompt, what both begin with is it."""

    needs = ("chosen", "rejected")
    uses = ("prompt", "system")
    also: ClassVar = {"prompt": ("question", "instruction")}
    rank = 12
    objective = "dpo"
    advice = "columns: {prompt: prompt, completion: chosen}"

    def content(self, values: Values) -> Preference:
        chosen, rejected = self.value(values, "chosen"), self.value(values, "rejected")
        if type(chosen) is not type(rejected):
            raise BadRow("one answer is a text, the other is not", dict(values))
        found = self._chats(values) if isinstance(chosen, list) else self._texts(values)
        if found.chosen == found.rejected:
            raise BadRow("both answers are the same", chosen)
        return found

    def _chats(self, values: Values) -> Preference:
        chosen, rejected = (
            messages_of(self.value(values, name), self.columns[name], needs_assistant=True)
            for name in ("chosen", "rejected")
        )
        prompt = self.value(values, "prompt")
        if isinstance(prompt, list):
            before = messages_of(prompt, self.columns["prompt"], needs_assistant=False)
            if chosen[: len(before)] != before:
                chosen, rejected = before + chosen, before + rejected
        elif isinstance(prompt, str) and prompt.strip() and chosen[0]["role"] == "assistant":
            asked = [{"role": "user", "content": prompt}]
            chosen, rejected = asked + chosen, asked + rejected
        equal = [a == b for a, b in zip(chosen, rejected, strict=False)]
        shared = equal.index(False) if False in equal else len(equal)
        if not shared:
            raise BadRow("the two answers are to different prompts", self.value(values, "chosen"))
        return Preference(Turns(chosen, shared), Turns(rejected, shared))

    def _texts(self, values: Values) -> Preference:
        chosen, rejected = self.text(values, "chosen"), self.text(values, "rejected")
        prompt, system = self.text_or_none(values, "prompt"), self.text_or_none(values, "system")
        if prompt is None:
            shared = shared_beginning(chosen, rejected)
            start = shared.rfind(_MARK)
            if start < 0:
                raise BadRow("there is no prompt, and the answers do not begin with the same chat", chosen)
            prompt = shared[: start + len(_MARK)]
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return Preference(PromptCompletion(prompt, chosen, system), PromptCompletion(prompt, rejected, system))


class RatedCompletion(Format):
    """An answer rated good or bad, a row each, as KTO learns from."""

    needs = ("prompt", "completion", "label")
    uses = ("system",)
    rank = 14
    objective = "kto"

    def fits(self, rows: Sequence[Row]) -> bool:
        return all(_is_rating(self.value(row.values, "label")) for row in rows)

    def content(self, values: Values) -> Rated:
        label = self.value(values, "label")
        if not _is_rating(label):
            raise BadRow(f"column `{self.columns['label']}` must be true or false", label)
        prompt, completion = self.value(values, "prompt"), self.value(values, "completion")
        is_good = _GOOD[label.lower() if isinstance(label, str) else label]
        answer: Answered
        if isinstance(prompt, list) and isinstance(completion, list):
            before = messages_of(prompt, self.columns["prompt"], needs_assistant=False)
            answer = Turns(
                before + messages_of(completion, self.columns["completion"], needs_assistant=True), len(before)
            )
        else:
            system = self.text_or_none(values, "system")
            answer = PromptCompletion(self.text(values, "prompt"), self.text(values, "completion"), system)
        return Rated(answer, is_good)


def _is_rating(value: Any) -> bool:
    value = value.lower() if isinstance(value, str) else value
    return isinstance(value, bool | int | str) and value in _GOOD
