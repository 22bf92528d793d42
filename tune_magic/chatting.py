"""A chat with tuned models and their base: what users hold, what was said, who answers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tune_magic import cell_code, display, launching
from tune_magic.comparing import names_of
from tune_magic.data import preview
from tune_magic.errors import DataError, TuneError
from tune_magic.executors import local
from tune_magic.handles import Run
from tune_magic.storage.events import EventReader
from tune_magic.storage.state import TERMINAL
from tune_magic.training import alike

MAX_NEW_TOKENS = 128
_POLL_S = 0.05
_DOES = {"texts": "answers", "classes": "classifies", "outputs": "finds something"}


@dataclass
class Answer:
    """What one side says.

    Attributes:
        text: So far.
        is_whole: Whether nothing more comes.
        tokens: Of the answer.
        seconds: It took.
    """

    text: str = ""
    is_whole: bool = False
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Turn:
    """What was said, and the answer of each side: ``tuned`` and ``base``; of several runs their names and ``base``.

    Attributes:
        number: From 1.
        text: What the user said.
        sides: Who was asked, in order.
        answers: By side.
        is_first: Whether a new conversation begins with it.
    """

    number: int
    text: str
    sides: tuple[str, ...]
    answers: dict[str, Answer] = field(default_factory=dict)
    is_first: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether everybody who was asked has answered."""
        return all(side in self.answers and self.answers[side].is_whole for side in self.sides)


class Chat:
    """A conversation, answered by a worker of its own that loads the model once.

    The worker ends with `close`, with this process, or after a quarter of an hour of silence; what was said stays in
    the run folder.

    Args:
        run: A run with a checkpoint.
        *others: More, which answer beside it. Adapters that can share one base do; others are each loaded.
        base: Whether the base model may be asked too, where all have the same; after full fine-tuning that takes memory
            for a second model.

    Attributes:
        speakers: Who answers beside the base, by side: ``tuned``, or the names of several runs.

    Raises:
        TuneError: A run has no checkpoint, or some write texts and others do not.

    Example:
        >>> chat = tune_magic.chat("support_bot")  # doctest: +SKIP
        >>> chat.ask("Where is my parcel?")  # doctest: +SKIP
        {'tuned': '{"intent": ...}', 'base': 'I am sorry to hear ...'}
    """

    def __init__(self, run: Run, *others: Run, base: bool = True) -> None:
        self.run = run
        self.speakers = _sides([run, *others])
        finds = _all_find(self.speakers)
        have_one_base = len({alike.base_of(one) for one in self.speakers.values()}) == 1
        self.has_base = base and not finds and have_one_base
        options: dict[str, Any] = {"base": self.has_base, "owner": os.getpid()}
        for one in others:
            cell_code.require(one)
        if others:
            options["runs"] = {side: str(one.path) for side, one in self.speakers.items()}
        self.job = launching.new_job(run, "chat", options)
        self._turns: dict[int, Turn] = {}
        self._reader = EventReader(self.job.path / "events.jsonl")
        local.start(self.job.path)

    @property
    def name(self) -> str:
        """What the conversation is called: the names of the runs."""
        return ", ".join(one.name or one.id for one in self.speakers.values())

    @property
    def turns(self) -> list[Turn]:
        """Everything that was said so far, the answers as far as they have come."""
        for event in self._reader.poll():
            if event["type"] in ("piece", "answer") and event["turn"] in self._turns:
                self._take(event)
        return list(self._turns.values())

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        return self.job.status == "running"

    @property
    def is_answering(self) -> bool:
        """Whether an answer is still coming."""
        return any(not turn.is_whole for turn in self.turns) and not self.has_ended

    @property
    def has_ended(self) -> bool:
        """Whether the worker is gone, so that nothing more is answered."""
        return self.job.status in TERMINAL and not local.is_starting(self.job.path)

    @property
    def state(self) -> str:
        """What the worker does, in words."""
        if self.has_ended:
            error = self.job.summary().outcome.get("error")
            return f"failed: {error}" if error else "ended"
        if not self.is_ready:
            return "loading the model"
        return "answering" if self.is_answering else "listening"

    def say(
        self, text: str, *, system: str = "", max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0,
        top_p: float = 1.0, seed: int = 0, base: bool = True, fresh: bool = False,
    ) -> Turn:  # fmt: skip
        """Say something; the answers come into the turn that is returned, see `turns`.

        Args:
            text: A user's message.
            system: System message of the conversation.
            max_new_tokens: Longest answer in tokens.
            temperature: 0 takes the likeliest token; higher ones draw more freely.
            top_p: Share of probability, from the likeliest down, that is drawn from.
            seed: Of what is drawn.
            base: Whether the base model answers too.
            fresh: Forget what was said before.

        Raises:
            TuneError: The worker is gone, or still answers.
        """
        if self.has_ended:
            self.job.raise_for_state()
            raise TuneError("This chat has ended.", hint="Begin another.")
        if self.is_answering:
            raise TuneError("It still answers.", hint="Wait for it, or `chat.hush()`.")
        is_with_base = base and self.has_base
        sides = (*self.speakers, *(["base"] if is_with_base else []))
        turn = Turn(len(self._turns) + 1, text, sides, is_first=fresh or not self._turns)
        self._turns[turn.number] = turn
        self.job.request(
            "say", turn=turn.number, text=text, system=system, max_new_tokens=max_new_tokens, temperature=temperature,
            top_p=top_p, seed=seed, base=is_with_base, fresh=fresh,
        )  # fmt: skip
        return turn

    def ask(self, text: str, *, each: Callable[[], None] | None = None, **parameters: Any) -> dict[str, str]:
        """Say something, wait, and return each side's answer; parameters as in `say`.

        Args:
            text: A user's message.
            each: Called several times a second while waiting.
            **parameters: See `say`.

        Raises:
            TuneError: The worker failed.
        """
        turn = self.say(text, **parameters)
        while self.is_answering:
            if each is not None:
                each()
            time.sleep(_POLL_S)
        if not turn.is_whole:
            self.job.raise_for_state()
            raise TuneError("The chat ended before the answer.", hint="`chat.job.log` may tell why.")
        return {side: turn.answers[side].text for side in turn.sides}

    def hush(self) -> None:
        """End the answer that is coming where it is; safe from any thread."""
        Run(self.job.path).request("hush")

    def close(self) -> None:
        """Let the worker go; its memory is free again. Safe from any thread."""
        job = Run(self.job.path)  # a reader of its own: two threads must not share one
        if job.is_live or local.is_starting(job.path):
            job.stop()

    def usual_system(self) -> str:
        """Return the system message of the first training row, which the model expects; empty where it has none."""
        source = self.run.recipe.get("data", {}).get("train", "")
        try:
            found = None if source.startswith("$") else preview.head(source, 1)
        except (DataError, OSError):
            return ""
        return _system_of(found.rows[0]) if found is not None and found.rows else ""

    def card(self) -> dict[str, str]:
        """Return the conversation as HTML and as text."""
        from tune_magic.view.chat import chat_card

        return chat_card(self.name, self.turns, self.state)

    def show(self) -> None:
        """Show the conversation: in a notebook as HTML, elsewhere as text."""
        display.show(self.card(), run=self.run)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return self.card()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, event: Mapping[str, Any]) -> None:
        answer = self._turns[event["turn"]].answers.setdefault(event["side"], Answer())
        if event["type"] == "piece":
            answer.text += event["text"]
        else:
            answer.text, answer.is_whole = event["text"], True
            answer.tokens, answer.seconds = event["tokens"], event["seconds"]


def _sides(runs: Sequence[Run]) -> dict[str, Run]:
    """Return who answers, by side.

    Raises:
        TuneError: A run has no checkpoint, or is there twice.
    """
    for run in runs:
        run.best_checkpoint  # noqa: B018 - without one, say so before a worker is started
    if len(runs) == 1:
        return {"tuned": runs[0]}
    if len({run.path for run in runs}) < len(runs):
        raise TuneError("A run cannot answer beside itself.", hint="Name each run once; the base answers beside them.")
    return dict(zip(names_of(runs, ("base",), "-"), runs, strict=True))


def _all_find(speakers: Mapping[str, Run]) -> bool:
    """Return whether the runs find something in texts, and write none.

    Raises:
        TuneError: Some do and some do not.
    """
    gives = {side: alike.objective_of(run).gives for side, run in speakers.items()}
    if "texts" in gives.values() and set(gives.values()) != {"texts"}:
        each = ", ".join(f"{side} {_DOES[what]}" for side, what in gives.items())
        raise TuneError(f"Models that answer and models that do not have nothing to say to each other: {each}.")
    return "texts" not in gives.values()


def _system_of(row: Mapping[str, Any]) -> str:
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        return str(messages[0].get("content", "")) if messages[0].get("role") == "system" else ""
    return str(row.get("system") or "")
