"""From a normal form to tokens, with a weight for each.

Trained spans are found by construction, never by search: the chat template is rendered up to an assistant turn, then
with it, and the difference is what the model must learn. Prompt and answer are tokenised apart, as they are when the
model answers, so training and generation see the same tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tune_magic.data.content import (
    Content,
    Labelled,
    Measured,
    Message,
    MultiLabelled,
    PromptCompletion,
    Sited,
    Tasked,
    Text,
    Turns,
    shared_beginning,
)
from tune_magic.data.example import Example, Segment
from tune_magic.data.read import RowFaults
from tune_magic.errors import DataError

_AT_ONCE = 1024  # rows tokenised in one call
Pair = str | tuple[str, str]
_PROBES = ("0", "x")  # answers that share no beginning


class _Rewritten(Exception):
    """The chat template writes earlier turns differently once there are later ones."""


@dataclass
class Part:
    """Some rows of a source, behind each other.

    Attributes:
        contents: The rows in normal form.
        places: Where each stands, for people.
        numbers: Number of each in its source, from 0.
        faults: Takes rows that no example can be made of.
    """

    contents: Sequence[Content]
    places: Sequence[str]
    numbers: Sequence[int]
    faults: RowFaults


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

    def examples(self, part: Part) -> list[Example]:
        """Encode rows; those in which no trained token is left, or which the chat template refuses, become faults.

        A chat whose template rewrites earlier turns (dropping what the model thought, say) becomes an example for each
        answer, each as the model sees it when it gives that answer.
        """
        examples: list[Example] = []
        failed: dict[
            int, tuple[str, str | None, bool]
        ] = {}  # problem, advice, and whether other examples make up for it
        for number, example in self._encoded(part):
            if isinstance(example, ValueError):
                failed[number] = str(example), _hint_of(example), False
            elif example.weight:
                examples.append(example)
            elif example.num_cut:
                hint = "Raise `max_length`, or shorten the prompts."
                failed[number] = f"no trained token is left within max_length ({self.max_length})", hint, True
            else:
                failed[number] = "no trained token is left", None, True
        if failed:
            made = {example.index for example in examples}
            for number, (problem, advice, is_made_up_for) in failed.items():
                if not is_made_up_for or part.numbers[number] not in made:
                    part.faults.add(part.places[number], problem, hint=advice)
        return examples

    def _encoded(self, part: Part) -> Iterator[tuple[int, Example | ValueError]]:
        """Yield each example with the place of its content, or why there is none; many texts are tokenised in one call."""
        for first in range(0, len(part.contents), _AT_ONCE):
            some = [
                (number, *rendered)
                for number, content in enumerate(part.contents[first : first + _AT_ONCE], start=first)
                for rendered in self._rendered(content)
            ]
            found = [(parts, not self._is_templated(content)) for _, content, parts in some if isinstance(parts, list)]
            openers = iter(self._tokenise([parts[0][0] for parts, opening in found if opening], opens=True))
            others = iter(
                self._tokenise([text for parts, opening in found for text, _ in parts[opening:]], opens=False)
            )
            end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            laid_out: list[list[list[int]]] = []
            for known, opening in found:
                ids = [next(openers if opening and place == 0 else others) for place in range(len(known))]
                laid_out.append([*ids, end] if opening and end else ids)
            arrays = iter(_arrays(laid_out, [[trained for _, trained in parts] for parts, _ in found]))
            for number, content, parts in some:
                if isinstance(parts, ValueError):
                    yield number, parts
                else:
                    yield number, self._example(content, *next(arrays), part.numbers[number])

    def _rendered(self, content: Content) -> list[tuple[Content, list[tuple[str, bool]] | ValueError]]:
        """Return a content with its pieces, or why there are none; one for each answer where the template needs it."""
        try:
            return [(content, self.pieces(content))]
        except _Rewritten:
            assert isinstance(content, Turns)
            apart = [Turns(content.messages[: last + 1], last, content.tools) for last in content.trained()]
            return [rendered for one in apart for rendered in self._rendered(one)]
        except ValueError as error:
            return [(content, error)]

    def _example(
        self, content: Content, tokens: np.ndarray, weights: np.ndarray, starts: list[int], index: int
    ) -> Example | ValueError:
        if not len(tokens):
            return ValueError("it has no tokens")
        weights[0] = 0.0  # nothing comes before the first token, so nothing predicts it
        kept = max((i for i, start in enumerate(starts) if start < self.max_length), default=0)
        asked, answered = exchanges(content)[kept]
        return Example(
            trunk=Segment(tokens[: self.max_length], weights[: self.max_length]),
            answer_start=starts[kept],
            question=asked,
            reference=answered,
            num_cut=max(0, len(tokens) - self.max_length),
            index=index,
        )

    def classified(self, contents: Sequence[Labelled], labels: Sequence[int], indices: Sequence[int]) -> list[Example]:
        """Encode texts of classes; see `whole`.

        Args:
            contents: The texts.
            labels: Number of the class of each.
            indices: Number of each in its source.
        """
        examples = self.whole([pair_of(content) for content in contents], indices)
        return [
            replace(example, label=label, reference=content.label)
            for example, label, content in zip(examples, labels, contents, strict=True)
        ]

    def whole(self, texts: Sequence[Pair], indices: Sequence[int]) -> list[Example]:
        """Encode texts, or pairs of texts, with the tokenizer's special tokens, cut to `max_length`.

        Nothing of them is a target yet.

        Args:
            texts: The texts.
            indices: Number of each in its source.
        """
        examples = []
        for first in range(0, len(texts), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            found = self._token_ids(texts[some], add_special_tokens=True)
            for text, ids, index in zip(texts[some], found, indices[some], strict=True):
                kept = ids if len(ids) <= self.max_length else self._cut(text)
                tokens = np.asarray(kept, dtype=np.int32)
                example = Example(
                    trunk=Segment(tokens, np.zeros(len(tokens), dtype=np.float32)),
                    question=text if isinstance(text, str) else "\n\n".join(text),
                    num_cut=len(ids) - len(kept),
                    index=index,
                )
                examples.append(example)
        return examples

    def _cut(self, text: Pair) -> list[int]:
        """Return the tokens of a text, or of a pair, the longer part of it cut, special tokens kept."""
        parts = (text,) if isinstance(text, str) else text
        ids: list[int] = self.tokenizer(*parts, truncation=True, max_length=self.max_length)["input_ids"]
        return ids

    def encodings(self, texts: Sequence[Any], *, is_pretokenized: bool = False, **cut: Any) -> list[Any]:
        """Return the tokenizers library's encodings of texts, pairs, or lists of words: ids, words, offsets.

        Args:
            texts: What is encoded, with the tokenizer's special tokens.
            is_pretokenized: They are lists of words.
            cut: Keywords of the library's `enable_truncation`; nothing is cut by default.

        Raises:
            DataError: The tokenizer is not one of that library.
        """
        if not self.tokenizer.is_fast:
            raise DataError("The model's tokenizer does not tell where its tokens stand in a text.",
                            hint="Take a model with a fast tokenizer (`tokenizer.json`).")  # fmt: skip
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        if cut:
            backend.enable_truncation(**cut)
        try:
            with _all_cores():
                found: list[Any] = backend.encode_batch(list(texts), is_pretokenized=is_pretokenized)
        finally:
            backend.no_truncation()
        return found

    def pieces(self, content: Content) -> list[tuple[str, bool]]:
        """Return the text in pieces, each with whether it is trained. Joined, they are what the model sees.

        Raises:
            ValueError: The chat template refuses it.
            TypeError: It is no text that is answered.
        """
        if isinstance(content, Text):
            return [(content.text, True)]
        if isinstance(content, PromptCompletion) and not self.uses_template:
            prompt = f"{content.system}\n\n{content.prompt}" if content.system else content.prompt
            return [(prompt, False), (content.completion, True)]
        return self._chat_pieces(as_turns(content))

    def _is_templated(self, content: Content) -> bool:
        """A rendered chat brings its own opening and closing tokens; other texts get the tokenizer's."""
        return isinstance(content, Turns) or (isinstance(content, PromptCompletion) and self.uses_template)

    def prompt_tokens(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Return the tokens up to where the model answers a user's message, or a chat that ends with one."""
        if isinstance(prompt, str) and not self.uses_template:
            return self._tokenise([prompt], opens=True)[0]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._tokenise([self._template(messages, add_generation_prompt=True)], opens=False)[0]

    def opened(self, text: str) -> list[int]:
        """Return the tokens of a plain text that is gone on from, the tokenizer's opening ones first."""
        return self._tokenise([text], opens=True)[0]

    def _chat_pieces(self, turns: Turns) -> list[tuple[str, bool]]:
        messages = turns.messages
        if not self.has_template:
            raise DataError(
                "The rows are chats, but the model's tokenizer has no chat template.",
                hint="Use an instruct model, or rows with prompt and completion.",
            )
        pieces: list[tuple[str, bool]] = []
        done = ""
        for index in turns.trained():
            before, answer = self._answer(messages, index, turns.tools)
            if not before.startswith(done):
                raise _Rewritten
            end = answer.rstrip()  # a line break after the end-of-turn mark is the next turn's, not the answer's
            pieces += [(before[len(done) :], False), (end, True)]
            done = before + end
        return pieces

    def _answer(self, messages: Sequence[Message], index: int, tools: Any) -> tuple[str, str]:
        """Return what the model is given before it writes message `index`, and what it must write, its end mark too.

        Both follow from rendering: the chat up to the answer with the opening of an answer, and with the answer. Where
        the opening is more than what stands before an answer (an empty thought, say), the chat without it is where the
        answer's opening begins, and what two other answers have in common is where it ends.

        Raises:
            ValueError: The template is such that neither tells.
        """
        before = self._template(messages[:index], tools, add_generation_prompt=True)
        after = self._template(messages[: index + 1], tools, add_generation_prompt=False)
        if after.startswith(before):
            return before, after[len(before) :]
        probes = [
            self._template(
                [*messages[:index], {"role": "assistant", "content": text}], tools, add_generation_prompt=False
            )
            for text in _PROBES
        ]
        opening = shared_beginning(*probes)
        if not after.startswith(opening) or not opening:
            raise ValueError("the chat template changes what stands before an answer")
        return before, after[len(opening) :]

    def _template(self, messages: Sequence[Message], tools: Any = None, *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses it ({error})") from None

    def _tokenise(self, texts: list[str], *, opens: bool) -> list[list[int]]:
        """Tokenise pieces, with the tokenizer's opening tokens when they open a plain text."""
        found, eos = self._token_ids(texts, add_special_tokens=opens), self.tokenizer.eos_token_id
        return [ids[:-1] if opens and len(ids) > 1 and ids[-1] == eos else ids for ids in found]

    def _token_ids(self, texts: Sequence[Pair], *, add_special_tokens: bool) -> list[list[int]]:
        """Return the tokens of texts, or of pairs of texts."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            pairs = [(text, None) if isinstance(text, str) else text for text in texts]
            return [self.tokenizer(*pair, add_special_tokens=add_special_tokens)["input_ids"] for pair in pairs]
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()  # a tokenizer's file may ask for either
        backend.no_truncation()
        with _all_cores():
            return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


def _arrays(
    rows: list[list[list[int]]], trained: list[list[bool]]
) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """Yield tokens, weights, and where trained pieces start, of each row; a piece beyond those known is trained.

    The arrays of all rows are parts of two, which is faster to make and smaller to hold.
    """
    lengths = [[len(piece) for piece in pieces] for pieces in rows]
    flags = [[*known, *[True] * (len(pieces) - len(known))] for known, pieces in zip(trained, rows, strict=True)]
    flat = [piece for pieces in rows for piece in pieces]
    total = sum(map(sum, lengths))
    tokens = np.fromiter(itertools.chain.from_iterable(flat), dtype=np.int32, count=total)
    each = list(itertools.chain.from_iterable(lengths))
    weights = np.repeat(np.array(list(itertools.chain.from_iterable(flags)), dtype=np.float32), each)
    start = 0
    for sizes, known in zip(lengths, trained, strict=True):
        end, starts = start, []
        for number, size in enumerate(sizes):
            if number < len(known) and known[number]:
                starts.append(end - start)
            end += size
        yield tokens[start:end], weights[start:end], starts
        start = end


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer use every core; elsewhere it is told not to, since it warns at each fork after it has."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def pair_of(content: Labelled | Measured | MultiLabelled | Sited | Tasked) -> Pair:
    """Return the text of a row that is learned as a whole, or both of its texts."""
    second = None if isinstance(content, MultiLabelled) else content.second
    return content.text if second is None else (content.text, second)


def exchanges(content: Content) -> list[tuple[str | None, str | None]]:
    """Return (question, answer) of each trained span, in order; a plain text has neither."""
    if isinstance(content, Text):
        return [(None, None)]
    turns = as_turns(content)
    found: list[tuple[str | None, str | None]] = []
    asked, trained = None, set(turns.trained())
    for index, message in enumerate(turns.messages):
        if message["role"] == "user":
            asked = message["content"]
        elif index in trained:
            found.append((asked, message["content"]))
    return found


def as_turns(content: Content) -> Turns:
    """Return an answered text as a chat.

    Raises:
        TypeError: It is no text that is answered.
    """
    if isinstance(content, Turns):
        return content
    if not isinstance(content, PromptCompletion):
        raise TypeError(f"{type(content).__name__} is no text that is answered")
    system = [{"role": "system", "content": content.system}] if content.system else []
    return Turns(
        [*system, {"role": "user", "content": content.prompt}, {"role": "assistant", "content": content.completion}]
    )


def _hint_of(error: ValueError) -> str | None:
    """Say what to do about the refusals that templates of known families make."""
    said = str(error).lower()
    if "system" in said:
        return "Its template knows no system messages: put their text at the beginning of the first user message."
    if "alternate" in said:
        return "Join messages of the same role that follow each other into one."
    return None
