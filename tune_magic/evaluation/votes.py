"""Votes of people on pairs of answers: drawn blind, appended to disk as they come, read back. No torch in here.

Whoever rates sees answers A and B. Which is which, and the order of the rows, follow from the seed, the rater and the
SHA-256 of all rows: opened again, a rating goes on in the same order, and a notebook that holds seed and rater does not
tell which is which, since the rows are not in it. Which rows are drawn does not depend on the rater, so that raters
can agree. Every opening has a log of its own, so that two raters, or two tabs, never write to one file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

from tune_magic import files
from tune_magic.errors import TuneError
from tune_magic.storage.events import Event, EventLog, EventReader
from tune_magic.storage.folder import make_id

FORMAT = 1
FOLDER = "votes"
A, B, EQUAL, BAD, SKIP = CHOICES = ("A", "B", "equal", "bad", "skip")
Sides = tuple[str, str]  # the tuned model, and the one it is compared with
Key = tuple[str, Sides, int]  # rater, sides, place of the row


@dataclass(frozen=True)
class Vote:
    """What somebody said of a pair.

    Attributes:
        rater: Who.
        sides: What was compared: the tuned model, and the other.
        place: Number of the row among those of the evaluation, from 0.
        choice: ``A``, ``B``, ``equal``, ``bad`` (both are) or ``skip``.
        better: The side that was chosen, None where none was.
        left: The side that was shown as A.
        comment: What was written beside it.
        time: When, in seconds since the epoch.
    """

    rater: str
    sides: Sides
    place: int
    choice: str
    better: str | None
    left: str
    comment: str
    time: float


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers, as a rater sees them.

    Attributes:
        place: Number of the row among those of the evaluation, from 0.
        prompt: The messages that are answered, each with ``role`` and ``content``.
        answers: A and B.
        sides: Of which side each is; not shown by `repr`, nor by anything else before the vote.
    """

    place: int
    prompt: list[dict[str, Any]]
    answers: tuple[str, str]
    sides: Sides = field(repr=False)

    def better(self, choice: str) -> str | None:
        """Return the side that a choice prefers, if any."""
        return dict(zip((A, B), self.sides, strict=True)).get(choice)


def drawn(rows: Path, sides: Sides, seed: int, limit: int | None) -> tuple[list[int], list[int]]:
    """Return the places of the rows that are rated, and of those on the way whose two answers are equal.

    Args:
        rows: The evaluation's rows.
        sides: Whose answers.
        seed: Of the draw, which is the same for every rater.
        limit: So many rows are rated; None: all that differ.
    """
    salt = f"{_print(rows)}|{seed}"
    differs = [row[sides[0]].strip() != row[sides[1]].strip() for row in files.each_json_line(rows)]
    rated: list[int] = []
    equal: list[int] = []
    for place in sorted(range(len(differs)), key=lambda place: _drawn_number(salt, place)):
        if limit is not None and len(rated) == limit:
            break
        (rated if differs[place] else equal).append(place)
    return rated, equal


def pairs(rows: Path, places: Sequence[int], sides: Sides, rater: str, seed: int) -> list[Pair]:
    """Return the pairs of some rows in a rater's own order, the answers shuffled.

    Args:
        rows: The evaluation's rows.
        places: Numbers of the rows, as `drawn` gives them.
        sides: Whose answers.
        rater: Who rates.
        seed: Of order and sides.
    """
    salt = f"{_print(rows)}|{seed}|{sides}|{rater}"
    wanted = set(places)
    found = {
        place: _pair(place, row, sides if _drawn_number(f"{salt}|sides", place) % 2 else (sides[1], sides[0]))
        for place, row in enumerate(files.each_json_line(rows))
        if place in wanted
    }
    return [found[place] for place in sorted(wanted, key=lambda place: _drawn_number(f"{salt}|order", place))]


def prompt_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages that a row's answers reply to; rows without earlier ones have the question alone."""
    earlier: list[dict[str, Any]] | None = row.get("prompt")
    return earlier or [{"role": "user", "content": row["question"] or ""}]


def _pair(place: int, row: Mapping[str, Any], sides: Sides) -> Pair:
    return Pair(place, prompt_of(row), (row[sides[0]], row[sides[1]]), sides)


def _drawn_number(salt: str, place: int) -> int:
    """Return a number drawn for a row, the same on every machine and in every version of Python."""
    return int.from_bytes(hashlib.sha256(f"{salt}|{place}".encode()).digest()[:8])


def _print(rows: Path) -> str:
    with rows.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class VoteLog:
    """Appends the votes of one opening of a rating; the file is made with the first.

    Args:
        evaluation: Folder of the evaluation.
        rater: Who votes.
        sides: What is compared.
        seed: Of the draw.
        limit: How many rows were to be rated.
    """

    def __init__(self, evaluation: Path, rater: str, sides: Sides, seed: int, limit: int | None) -> None:
        self._folder = evaluation / FOLDER
        self._head = {"format": FORMAT, "rater": rater, "sides": list(sides), "seed": seed, "limit": limit}
        self._log: EventLog | None = None

    def append(self, pair: Pair, choice: str, comment: str) -> None:
        """Write a vote to the device.

        Raises:
            TuneError: It could not be written, and was not counted.
        """
        vote = {"row": pair.place, "choice": choice, "better": pair.better(choice), "left": pair.sides[0]}
        try:
            if self._log is None:
                self._log = self._opened()
            self._log.append("vote", **vote, comment=comment)
        except OSError as error:
            raise TuneError(
                f"The vote could not be written: {error.strerror}.", hint="It was not counted; vote again."
            ) from error

    def close(self) -> None:
        """Close the file; another vote opens another."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _opened(self) -> EventLog:
        files.make_folder(self._folder)
        log = EventLog(self._folder / f"{make_id(datetime.now(UTC))}-{token_hex(4)}.jsonl", 1, patience_s=0.0)
        try:
            log.append("rating", **self._head)
        except OSError:
            log.close()
            raise
        return log


class VoteReader:
    """Follows the logs of an evaluation, whoever writes them.

    Args:
        evaluation: Folder of the evaluation.

    Attributes:
        heads: What each log says of its opening: rater, sides, seed, limit; by the file's name.
    """

    def __init__(self, evaluation: Path) -> None:
        self._folder = evaluation / FOLDER
        self._readers: dict[str, EventReader] = {}
        self._votes: dict[Key, tuple[tuple[float, str, int], Vote]] = {}
        self.heads: dict[str, Event] = {}

    def votes(self) -> dict[Key, Vote]:
        """Return the last vote of each rater on each row so far, in the order in which they were cast.

        Raises:
            TuneError: A newer version wrote them.
        """
        for path in sorted(self._folder.glob("*.jsonl")):
            reader = self._readers.setdefault(path.name, EventReader(path))
            for event in reader.poll():
                self._take(path.name, event)
        return {key: vote for key, (_, vote) in sorted(self._votes.items(), key=lambda item: item[1][0])}

    @property
    def damage(self) -> list[str]:
        """Which line of which log is damaged, in words; such votes are not counted."""
        lines = {name: reader.damaged_line for name, reader in self._readers.items()}
        return [f"{FOLDER}/{name} is damaged at line {line}" for name, line in lines.items() if line]

    def _take(self, name: str, event: Event) -> None:
        if event["type"] == "rating":
            if event["format"] > FORMAT:
                raise TuneError(f"{FOLDER}/{name} was written by a newer tune_magic.", hint="pip install -U tune-magic")
            self.heads[name] = event
        elif event["type"] == "vote" and name in self.heads:
            head = self.heads[name]
            sides = (head["sides"][0], head["sides"][1])
            vote = Vote(
                head["rater"], sides, event["row"], event["choice"], event["better"], event["left"], event["comment"],
                event["t"],
            )  # fmt: skip
            key, when = (vote.rater, sides, vote.place), (vote.time, name, event["seq"])
            if key not in self._votes or self._votes[key][0] < when:
                self._votes[key] = (when, vote)
