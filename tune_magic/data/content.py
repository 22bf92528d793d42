"""Normal forms of a row: what every reader's rows become, whatever they were called in the file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turns:
    """A chat; the assistant's turns are trained.

    Attributes:
        messages: Each with ``role`` and ``content``; an assistant's may have ``tool_calls``, and ``weight: 0`` where it
            is not trained.
        trained_from: Number of the first message that may be trained.
        tools: JSON schemas of the functions the assistant may call, for the chat template.
    """

    messages: list[Message]
    trained_from: int = 0
    tools: list[dict[str, Any]] | None = None

    def trained(self) -> Iterator[int]:
        """Yield the numbers of the messages that are trained."""
        for index, message in enumerate(self.messages):
            if index >= self.trained_from and message["role"] == "assistant" and message.get("weight") != 0:
                yield index


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and its answer; the answer is trained."""

    prompt: str
    completion: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A text; all of it is trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text of a class, or a pair of texts; the class is trained."""

    text: str
    label: str
    second: str | None = None


@dataclass(frozen=True, slots=True)
class MultiLabelled:
    """A text of several classes, or of none; they are trained."""

    text: str
    labels: list[str]


@dataclass(frozen=True, slots=True)
class Measured:
    """A text, or a pair of texts, and a number; the number is trained."""

    text: str
    value: float
    second: str | None = None


@dataclass(frozen=True, slots=True)
class Sited:
    """A text of a domain, and its class where that is known; both are trained."""

    text: str
    domain: str
    label: str | None = None
    second: str | None = None


@dataclass(frozen=True, slots=True)
class Tasked:
    """A text and what one of several tasks is to make of it: a class, or a number."""

    text: str
    task: str
    answer: str | float
    second: str | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """A question, a text, and where in the text it is answered; the place is trained.

    Attributes:
        question: The question.
        text: What is read to answer it.
        answers: The right answers as they stand in the text; none where it is not answered there.
        start: Character of the text at which the first of them begins.
    """

    question: str
    text: str
    answers: list[str]
    start: int = 0


Answered = Turns | PromptCompletion


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to the same prompt, the better one first."""

    chosen: Answered
    rejected: Answered


@dataclass(frozen=True, slots=True)
class Rated:
    """An answer, and whether it is a good one."""

    answer: Answered
    is_good: bool


@dataclass(frozen=True, slots=True)
class Related:
    """Texts that belong together, one that does not, or how near two are."""

    anchor: str
    positive: str
    negative: str | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, each with its tag."""

    words: list[str]
    tags: list[str]


@dataclass(frozen=True, slots=True)
class Media:
    """An image or a recording of a class.

    Attributes:
        kind: ``image`` or ``audio``.
        source: A path, the bytes of a file, or for audio an array of samples with its ``sampling_rate``.
        label: Its class.
    """

    kind: str
    source: Any
    label: str


Content = (
    Turns | PromptCompletion | Text | Labelled | MultiLabelled | Measured | Sited | Tasked | Located | Preference | Rated | Related
    | Tagged | Media
)  # fmt: skip


def texts(content: Content) -> list[str]:
    """Return every text of a row, classes and tags left out."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    with_texts(content, note)
    return found


def with_texts(content: Content, change: Callable[[str], str]) -> Content:
    """Return a row with each of its texts changed; classes, tags and roles stay."""
    match content:
        case Turns():
            said = [{**m, "content": change(m["content"])} if m.get("content") else m for m in content.messages]
            return replace(content, messages=said)
        case Preference():
            return Preference(with_texts(content.chosen, change), with_texts(content.rejected, change))  # type: ignore[arg-type]
        case Rated():
            return replace(content, answer=with_texts(content.answer, change))  # type: ignore[arg-type]
        case Tagged() | Media() | Located():
            return content
        case _:
            found = {name: getattr(content, name, None) for name in _TEXT_FIELDS}
            changed: dict[str, Any] = {name: change(text) for name, text in found.items() if isinstance(text, str)}
            return replace(content, **changed)


def asked(content: Content) -> list[str]:
    """Return what of a row may be said otherwise: what is asked, or the text that has a class, or all of a plain text."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    with_asked(content, note)
    return found


def with_asked(content: Content, change: Callable[[str], str]) -> Content:
    """Return a row with what is asked changed, and its answers and classes as they are."""
    match content:
        case Turns():
            said = [{**m, "content": change(m["content"])} if m["role"] == "user" else m for m in content.messages]
            return replace(content, messages=said)
        case PromptCompletion():
            return replace(content, prompt=change(content.prompt))
        case Text() | MultiLabelled():
            return replace(content, text=change(content.text))
        case Labelled():
            text = change(content.text)
            return replace(content, text=text, second=None if content.second is None else change(content.second))
        case _:
            return content


def to_plain(content: Content) -> dict[str, Any]:
    """Return a row of text as what JSON can say; see `from_plain`."""
    return {"kind": type(content).__name__, **asdict(content)}


def from_plain(plain: Mapping[str, Any]) -> Content:
    """Return the row that `to_plain` was given.

    Raises:
        KeyError, TypeError: It is none.
    """
    found: Content = _KINDS[plain["kind"]](**{name: value for name, value in plain.items() if name != "kind"})
    return found


_KINDS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind
    for kind in (
        Turns,
        PromptCompletion,
        Text,
        Labelled,
        MultiLabelled,
        Measured,
        Sited,
        Tasked,
        Located,
        Related,
        Tagged,
    )
}
_TEXT_FIELDS = ("system", "prompt", "completion", "text", "second", "anchor", "positive", "negative")


def shared_beginning(one: str, other: str) -> str:
    """Return what two texts begin with alike."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in same)]
