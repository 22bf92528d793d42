"""A ballot: pairs of answers that people vote on blind."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from tune_magic import display, files
from tune_magic.errors import TuneError
from tune_magic.evaluation import opinions, votes
from tune_magic.evaluation.report import BASE, TUNED, each_report
from tune_magic.evaluation.votes import SKIP, Pair, Sides, Vote, VoteLog, VoteReader
from tune_magic.handles import Report, Run
from tune_magic.rating import Preferences, Rating
from tune_magic.view.html import Bundle, clean, note_bundle

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

LIMIT = 100  # rows, unless told otherwise: more are not rated in a sitting
RATER = "me"
BACK = "back"
KEYS = {
    "1": votes.A, "a": votes.A, "2": votes.B, "b": votes.B, "3": votes.EQUAL, "=": votes.EQUAL, "e": votes.EQUAL,
    "4": votes.BAD, "x": votes.BAD, "5": SKIP, "s": SKIP, "6": BACK, "z": BACK,
}  # fmt: skip
KEYS_TOLD = (
    "1 or a: A is better, 2 or b: B, 3 or =: equal, 4 or x: both bad, 5 or s: skip, 6 or z: back; a comment may follow."
)
_LONGEST_NAME = 60


class Ballot:
    """Pairs of answers that one rater votes on blind, in an order of their own.

    Every vote is on disk before the next pair is shown. Opened again, it goes on with the first pair without a vote.
    As the value of a notebook's cell it is a panel.

    Args:
        report: The evaluation whose answers are rated.
        against: The side that the tuned model is compared with.
        rater: Who rates.
        seed: Of the rows, their order and the sides.
        limit: So many rows.

    Attributes:
        pairs: What is rated, in order.
        num_equal: Rows whose two answers are equal: they are ties, and not shown.

    Raises:
        TuneError: There are no two answers to compare, or a name that is none.

    Example:
        >>> ballot = tune_magic.rate("support_bot", rater="ann")  # doctest: +SKIP
        >>> ballot.vote("A", "more polite")  # doctest: +SKIP
    """

    def __init__(
        self, report: Report, against: str = BASE, *, rater: str = RATER, seed: int = 0, limit: int = LIMIT
    ) -> None:
        if report.about.get("prompts_left_out"):
            raise TuneError(f"An evaluation of {report.about['rows']} rows does not keep what was said before each question.",
                            hint="Evaluate fewer: `%evaluate NAME --limit 1000`.")  # fmt: skip
        self.report, self.rater = report, _checked(rater)
        self._options = {
            "against": (against, BASE),
            "rater": (rater, RATER),
            "limit": (limit, LIMIT),
            "seed": (seed, 0),
        }
        self.sides: Sides = (TUNED, against)
        rows = report.path / "rows.jsonl"
        places, equal = votes.drawn(rows, self.sides, seed, limit)
        self.num_equal = len(equal)
        self.pairs = votes.pairs(rows, places, self.sides, rater, seed)
        self._reader = VoteReader(report.path)
        self._log = VoteLog(report.path, rater, self.sides, seed, limit)
        self._at = self._next_open()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.rater}: {self.num_voted} of {len(self.pairs)} rows>"

    @property
    def current(self) -> Pair | None:
        """The pair to vote on; None behind the last one."""
        return self.pairs[self._at] if self._at < len(self.pairs) else None

    @property
    def cast(self) -> dict[int, Vote]:
        """This rater's votes on these pairs so far, by place, also those of other tabs."""
        mine = {pair.place for pair in self.pairs}
        return {vote.place: vote for vote in self._all() if vote.place in mine}

    @property
    def num_voted(self) -> int:
        """How many pairs have a vote, or were skipped."""
        return len(self.cast)

    @property
    def is_done(self) -> bool:
        """Whether every pair has a vote, or was skipped."""
        return self.num_voted == len(self.pairs)

    def chosen(self, pair: Pair) -> tuple[str | None, str]:
        """Return what was chosen of a pair before, as it is shown now, and the comment."""
        vote = self.cast.get(pair.place)
        if vote is None:
            return None, ""
        letters = dict(zip(pair.sides, (votes.A, votes.B), strict=True))
        return letters[vote.better] if vote.better else vote.choice, vote.comment

    def vote(self, choice: str, comment: str = "", *, place: int | None = None) -> None:
        """Vote on the current pair and go on to the next without a vote.

        A pair that was voted on before gets this vote instead; to skip it leaves the vote.

        Args:
            choice: ``A``, ``B``, ``equal``, ``bad`` (both are) or ``skip``.
            comment: Why.
            place: Of the pair that was seen; a vote that comes late is still for that one.

        Raises:
            TuneError: There is no such choice, nothing to vote on, or the vote could not be written.
        """
        if choice not in votes.CHOICES:
            raise TuneError(f"There is no choice {choice!r}.", hint=f"There are: {', '.join(votes.CHOICES)}.")
        seen = self._at if place is None else [pair.place for pair in self.pairs].index(place)
        if seen >= len(self.pairs):
            raise TuneError("Every row has its vote.", hint="`ballot.back()` goes back.")
        pair = self.pairs[seen]
        if choice == SKIP and pair.place in self.cast:
            self._at = seen + 1
            return
        self._log.append(pair, choice, comment.strip())
        self._at = self._next_open(seen)

    def back(self) -> None:
        """Go back to the pair before."""
        self._at = max(0, self._at - 1)

    def close(self) -> None:
        """Close the log of the votes; another vote opens another."""
        self._log.close()

    @property
    def votes(self) -> pd.DataFrame:
        """This rater's votes; see `Report.votes`."""
        found = self.report.votes
        return found[(found["rater"] == self.rater) & (found["against"] == self.sides[1])].reset_index(drop=True)

    def rating(self) -> Rating:
        """Return what this rater's votes say."""
        return Rating(self.report, self.sides[1], self.rater)

    def preferences(self) -> Preferences:
        """Return this rater's votes as rows of preferences."""
        return Preferences(self.report, self.sides[1], self.rater)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Preferences:
        """Write this rater's votes as rows of preferences; see `Preferences.save`."""
        return self.preferences().save(path, overwrite=overwrite)

    def shown(self) -> Bundle:
        """Return what the rater sees now: the current pair, behind the last one how to go on."""
        from tune_magic.view.rating import pair_card

        pair, count = self.current, len(self.pairs)
        if pair is not None:
            done, chosen = self.num_voted, self.chosen(pair)[0]
            return pair_card(
                pair.prompt, pair.answers, done=done, total=count, equal=self.num_equal, chosen=chosen, rater=self.rater
            )
        if not count:
            return note_bundle("Every row has two equal answers: there is nothing to rate.")
        return note_bundle(f"Every row has its vote, {count} of {count}. Back changes one; Finish shows what they say.")

    def text(self) -> str:
        """Return the current pair, whole, for a terminal."""
        from tune_magic.view.rating import TITLES, pair_text

        pair = self.current
        if pair is None:
            return self.shown()["text/plain"]
        chosen = self.chosen(pair)[0]
        before = f" You said: {TITLES[chosen]}." if chosen else ""
        head = f"--- Which answer is better? {self.num_voted} of {len(self.pairs)} rated.{before}"
        return f"{head}\n\n{pair_text(pair.prompt, pair.answers)}\n\n{KEYS_TOLD}"

    def card(self) -> Bundle:
        """Return how far the rating is, without a word on who leads; once every row has its vote, what it says."""
        if self.is_done and opinions.majority(self._all()):
            return self.rating().card()
        from tune_magic.view.rating import progress_card

        name = self.report.run.name or self.report.run.id
        counts = opinions.choices(self.cast.values())
        return progress_card(
            name, self.rater, counts, total=len(self.pairs), equal=self.num_equal, again=self._again(name)
        )

    def _again(self, name: str) -> str:
        """Return the line that opens it again."""
        given = {flag: clean(value, _LONGEST_NAME) for flag, (value, usual) in self._options.items() if value != usual}
        return " ".join(
            [f"%tune rate {clean(name, 80)}", *(f"--{flag} {shlex.quote(text)}" for flag, text in given.items())]
        )

    def _all(self) -> list[Vote]:
        mine = (self.rater, self.sides)
        return [vote for key, vote in self._reader.votes().items() if key[:2] == mine]

    def _next_open(self, after: int = -1) -> int:
        """Return the number of the next pair without a vote, from the start where none follows."""
        cast, count = self.cast, len(self.pairs)
        order = [*range(after + 1, count), *range(after + 1)]
        return next((at for at in order if self.pairs[at].place not in cast), count)

    def show(self) -> None:
        """Show the card: in a notebook as HTML, elsewhere as text."""
        display.show(self.card())

    def _ipython_display_(self) -> None:
        """Be a panel in a notebook, text elsewhere."""
        if not display.in_kernel():
            self.show()
            return
        from tune_magic.widgets import RatePanel  # type: ignore[import-not-found]

        RatePanel(self)._ipython_display_()


def open_ballot(
    of: Report | Run, against: Run | str = BASE, *, rater: str = RATER, seed: int = 0, limit: int | None = None
) -> Ballot:
    """Return a ballot over a report, or over the newest evaluation of a run that holds both answers.

    Raises:
        TuneError: There is none, with the line that makes one.
    """
    against = (against.name or against.id) if isinstance(against, Run) else against
    reports = [of] if isinstance(of, Report) else list(map(Report, each_report(of.path)))
    run = of.run if isinstance(of, Report) else of
    found = next((report for report in reports if _holds(report, against)), None)
    if found is None:
        raise _nothing_to_rate(run, reports, against)
    return Ballot(found, against, rater=rater, seed=seed, limit=LIMIT if limit is None else limit)


def _holds(report: Report, against: str) -> bool:
    """Return whether an evaluation holds texts of both sides."""
    first: dict[str, object] = next(iter(files.each_json_line(report.path / "rows.jsonl")), {})
    return (
        against != TUNED and not report.classes and all(isinstance(first.get(side), str) for side in (TUNED, against))
    )


def _nothing_to_rate(run: Run, reports: list[Report], against: str) -> TuneError:
    name = run.name or run.id
    if any(report.classes for report in reports):
        return TuneError(f"{name} tells classes apart: an answer is right or wrong, and there is nothing to rate.")
    line = f"`%evaluate {name}{'' if against == BASE else f' {clean(against, 80)}'}` answers the rows"
    if not reports:
        return TuneError(f"{name} has no finished evaluation, so there are no answers to rate.", hint=f"{line}.")
    return TuneError(
        f"No evaluation of {name} holds answers of {clean(against, 80)} beside its own.",
        hint=f"{line}; with few-shot or retrieval, `--baselines few,rag`.",
    )


def _checked(rater: str) -> str:
    """Return a rater's name.

    Raises:
        TuneError: It is empty, too long, or holds what cannot be seen.
    """
    if not rater.strip() or rater != clean(rater, _LONGEST_NAME):
        raise TuneError(
            f"`{clean(rater, 20)}` cannot be a rater's name.", hint=f"A few words, {_LONGEST_NAME} letters at most."
        )
    return rater
