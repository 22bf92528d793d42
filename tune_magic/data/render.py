"""From a normal form to tokens, with a weight for each.

Trained spans are found by construction, never by search: the chat template is rendered up to an assistant turn, then
with it, and the difference is what the model must learn. Prompt and answer are tokenised apart, as they are when the
model answers, so training and generation see the same tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tune_magic.data.example import Example, Segment
from tune_magic.data.formats import Content, PromptCompletion, Text, Turns
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

    def examples(self, contents: list[Content], source: str) -> list[Example]:
        """Encode every content.

        Raises:
            DataError: Rows in which no trained token is left, or which the chat template refuses.
        """
        faults = RowFaults(source)
        examples = []
        for number, content in enumerate(contents, start=1):
            try:
                example = self.encode(content, index=number - 1)
            except ValueError as error:
                faults.add(f"row {number}", str(error))
                continue
            if not example.weight:
                faults.add(f"row {number}", f"no trained token is left within max_length ({self.max_length})")
            examples.append(example)
        faults.raise_if_any("Raise `max_length`, or shorten the prompts.")
        return examples

    def encode(self, content: Content, index: int = 0) -> Example:
        """Encode one content, cut to `max_length`.

        Raises:
            ValueError: The chat template cannot render it.
        """
        pieces = self.pieces(content)
        tokens: list[int] = []
        weights: list[float] = []
        answer_start = 0
        for number, (text, trained) in enumerate(pieces):
            ids = self._tokenise(text, first=number == 0)
            if trained:
                answer_start = len(tokens)
            tokens += ids
            weights += [1.0 if trained else 0.0] * len(ids)
        if not self.uses_template and self.tokenizer.eos_token_id is not None:
            tokens.append(self.tokenizer.eos_token_id)
            weights.append(1.0)
        weights[0] = 0.0  # nothing comes before the first token, so nothing predicts it
        return Example(
            trunk=Segment(
                np.asarray(tokens[: self.max_length], dtype=np.int32),
                np.asarray(weights[: self.max_length], dtype=np.float32),
            ),
            answer_start=answer_start,
            question=question(content),
            reference=reference(content),
            num_cut=max(0, len(tokens) - self.max_length),
            index=index,
        )

    def pieces(self, content: Content) -> list[tuple[str, bool]]:
        """Return the text in pieces, each with whether it is trained. Joined, they are what the model sees."""
        if isinstance(content, Text):
            return [(content.text, True)]
        if isinstance(content, PromptCompletion) and not self.uses_template:
            prompt = f"{content.system}\n\n{content.prompt}" if content.system else content.prompt
            return [(prompt, False), (content.completion, True)]
        return self._chat_pieces(_as_messages(content))

    def prompt_tokens(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Return the tokens up to where the model answers a user's message, or a chat that ends with one."""
        if isinstance(prompt, str) and not self.uses_template:
            return self._tokenise(prompt, first=True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._tokenise(self._template(messages, add_generation_prompt=True), first=True)

    def _chat_pieces(self, messages: list[dict[str, str]]) -> list[tuple[str, bool]]:
        if not self.has_template:
            raise DataError(
                "The rows are chats, but the model's tokenizer has no chat template.",
                hint="Use an instruct model, or rows with prompt and completion.",
            )
        pieces: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
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

    def _tokenise(self, text: str, *, first: bool) -> list[int]:
        """A rendered chat brings its own special tokens; plain text gets the tokenizer's opening ones."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=first and not self.uses_template)["input_ids"]
        if first and not self.uses_template and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids


def reference(content: Content) -> str | None:
    """Return the answer a generated text is compared with: the last assistant turn."""
    if isinstance(content, Turns):
        return next(m["content"] for m in reversed(content.messages) if m["role"] == "assistant")
    return content.completion if isinstance(content, PromptCompletion) else None


def question(content: Content) -> str | None:
    """Return what the last answer replies to: the user's turn before it, or the prompt."""
    if isinstance(content, Turns):
        answered = max(i for i, m in enumerate(content.messages) if m["role"] == "assistant")
        before = [m["content"] for m in content.messages[:answered] if m["role"] == "user"]
        return before[-1] if before else None
    return content.prompt if isinstance(content, PromptCompletion) else None


def _as_messages(content: Turns | PromptCompletion) -> list[dict[str, str]]:
    if isinstance(content, Turns):
        return content.messages
    system = [{"role": "system", "content": content.system}] if content.system else []
    return [
        *system,
        {"role": "user", "content": content.prompt},
        {"role": "assistant", "content": content.completion},
    ]
