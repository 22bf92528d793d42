"""From a normal form to tokens, with a weight for each.

Trained spans are found by construction, never by search: the chat template is rendered up to an assistant turn, then
with it, and the difference is what the model must learn. Prompt and answer are tokenised apart, as they are when the
model answers, so training and generation see the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tune_magic.data.example import Example, Segment
from tune_magic.data.formats import Content, Labelled, PromptCompletion, Text, Turns
from tune_magic.data.read import RowFaults
from tune_magic.errors import DataError


class Renderer:
    """Turns contents into examples for one tokenizer.

    Args:
        tokenizer: A Transformers tokenizer.
        chat_template: Wrap prompt and completion as turns where the tokenizer has a chat template.
        max_length: Longest example in tokens.
    """

    def __init__(self, tokenizer: Any, *, chat_template: bool, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.has_template = tokenizer.chat_template is not None
        self.uses_template = chat_template and self.has_template
        self.max_length = max_length

    def examples(self, contents: Sequence[Content], source: str, places: Sequence[str] | None = None) -> list[Example]:
        """Encode every content.

        Args:
            contents: One for each row.
            source: Name of the file or object.
            places: Where each row stands, for errors; default: row 1, row 2, ...

        Raises:
            DataError: Rows in which no trained token is left, or which the chat template refuses.
        """
        faults = RowFaults(source)
        examples = []
        was_cut = False
        for index, content in enumerate(contents):
            place = places[index] if places else f"row {index + 1}"
            try:
                example = self.encode(content, index)
            except ValueError as error:
                faults.add(place, str(error))
                continue
            if not example.weight:
                why = f" within max_length ({self.max_length})" if example.num_cut else ""
                faults.add(place, f"no trained token is left{why}")
                was_cut = was_cut or example.num_cut > 0
            examples.append(example)
        faults.raise_if_any("Raise `max_length`, or shorten the prompts." if was_cut else None)
        return examples

    def encode(self, content: Content, index: int = 0) -> Example:
        """Encode one content, cut to `max_length`.

        Raises:
            ValueError: The chat template cannot render it, or it has no tokens.
        """
        templated = self._is_templated(content)
        tokens: list[int] = []
        weights: list[float] = []
        starts: list[int] = []
        for number, (text, trained) in enumerate(self.pieces(content)):
            ids = self._tokenise(text, opens=number == 0 and not templated)
            if trained:
                starts.append(len(tokens))
            tokens += ids
            weights += [1.0 if trained else 0.0] * len(ids)
        if not templated and self.tokenizer.eos_token_id is not None:
            tokens.append(self.tokenizer.eos_token_id)
            weights.append(1.0)
        if not tokens:
            raise ValueError("it has no tokens")
        weights[0] = 0.0  # nothing comes before the first token, so nothing predicts it
        kept = max((i for i, start in enumerate(starts) if start < self.max_length), default=0)
        asked, answered = exchanges(content)[kept]
        return Example(
            trunk=Segment(
                np.asarray(tokens[: self.max_length], dtype=np.int32),
                np.asarray(weights[: self.max_length], dtype=np.float32),
            ),
            answer_start=starts[kept],
            question=asked,
            reference=answered,
            num_cut=max(0, len(tokens) - self.max_length),
            index=index,
        )

    def classified(self, content: Labelled, label: int, index: int = 0) -> Example:
        """Encode a text of a class, with the tokenizer's special tokens, cut to `max_length`."""
        whole = self.tokenizer(content.text)["input_ids"]
        kept = whole
        if len(whole) > self.max_length:
            kept = self.tokenizer(content.text, truncation=True, max_length=self.max_length)["input_ids"]
        tokens = np.asarray(kept, dtype=np.int32)
        return Example(
            trunk=Segment(tokens, np.zeros(len(tokens), dtype=np.float32)),
            question=content.text,
            reference=content.label,
            num_cut=len(whole) - len(kept),
            index=index,
            label=label,
        )

    def pieces(self, content: Content) -> list[tuple[str, bool]]:
        """Return the text in pieces, each with whether it is trained. Joined, they are what the model sees."""
        if isinstance(content, Text | Labelled):
            return [(content.text, True)]
        if isinstance(content, PromptCompletion) and not self.uses_template:
            prompt = f"{content.system}\n\n{content.prompt}" if content.system else content.prompt
            return [(prompt, False), (content.completion, True)]
        return self._chat_pieces(_as_turns(content))

    def _is_templated(self, content: Content) -> bool:
        """A rendered chat brings its own opening and closing tokens; other texts get the tokenizer's."""
        return isinstance(content, Turns) or (isinstance(content, PromptCompletion) and self.uses_template)

    def prompt_tokens(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Return the tokens up to where the model answers a user's message, or a chat that ends with one."""
        if isinstance(prompt, str) and not self.uses_template:
            return self._tokenise(prompt, opens=True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._tokenise(self._template(messages, add_generation_prompt=True), opens=False)

    def _chat_pieces(self, turns: Turns) -> list[tuple[str, bool]]:
        messages = turns.messages
        if not self.has_template:
            raise DataError(
                "The rows are chats, but the model's tokenizer has no chat template.",
                hint="Use an instruct model, or rows with prompt and completion.",
            )
        pieces: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < turns.trained_from:
                continue
            before = self._template(messages[:index], add_generation_prompt=True)
            after = self._template(messages[: index + 1], add_generation_prompt=False)
            if not before.startswith(done) or not after.startswith(before):
                raise ValueError("the chat template changes earlier turns; keep one assistant turn a row")
            answer = after[len(before) :]
            end = answer.rstrip()  # a line break after the end-of-turn mark is the next turn's, not the answer's
            pieces += [(before[len(done) :], False), (end, True)]
            done = before + end
        return pieces

    def _template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it ({error})") from None

    def _tokenise(self, text: str, *, opens: bool) -> list[int]:
        """Tokenise a piece, with the tokenizer's opening tokens when it opens a plain text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=opens)["input_ids"]
        if opens and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids


def exchanges(content: Content) -> list[tuple[str | None, str | None]]:
    """Return (question, answer) of each trained span, in order; a plain text has neither."""
    if isinstance(content, Text | Labelled):
        return [(None, None)]
    turns = _as_turns(content)
    found: list[tuple[str | None, str | None]] = []
    asked = None
    for index, message in enumerate(turns.messages):
        if message["role"] == "user":
            asked = message["content"]
        elif message["role"] == "assistant" and index >= turns.trained_from:
            found.append((asked, message["content"]))
    return found


def _as_turns(content: Turns | PromptCompletion) -> Turns:
    if isinstance(content, Turns):
        return content
    system = [{"role": "system", "content": content.system}] if content.system else []
    return Turns(
        [*system, {"role": "user", "content": content.prompt}, {"role": "assistant", "content": content.completion}]
    )
