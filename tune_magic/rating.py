"""What people's votes say, and the rows of preferences that they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_magic import display, files
from tune_magic.errors import TuneError
from tune_magic.evaluation import opinions, votes
from tune_magic.evaluation.opinions import Agreement, Share
from tune_magic.evaluation.report import BASE, TUNED
from tune_magic.evaluation.votes import Sides, Vote, VoteReader
from tune_magic.handles import Report
from tune_magic.storage.events import number
from tune_magic.view.html import Bundle, clean

if TYPE_CHECKING:
    import pandas as pd

_LONGEST_NAME = 60


class Rating:
    """What the votes on an evaluation say: who wins, how sure, and whether raters agree.

    Args:
        report: The evaluation.
        against: The side that the tuned model is compared with; None: the one that was voted on.
        rater: Only this one's votes; None: all, each row once, by the majority.

    Attributes:
        wins: Rows of which the tuned model's answer is better.
        losses: Rows of which the other's is.
        ties: Rows of which neither is, those with equal answers among them.
        num_equal: Rows with equal answers, which nobody was shown, where all the others drawn with them have a vote.
        win_rate: Wins among wins and losses, with interval and sign test.
        first: How often A was chosen among votes for A or B: far from half, raters preferred a place.
        agreement: Of raters who saw the same rows; None where no row was rated by two.
        choices: By rater, how often each was chosen.
        by_metric: By metric, how often it prefers what people prefer, of the rows where both prefer something.

    Raises:
        TuneError: Nobody has voted.
    """

    def __init__(self, report: Report, against: str | None = None, rater: str | None = None) -> None:
        self.report = report
        reader = VoteReader(report.path)
        self.against, self._votes = _votes_on(reader, against, rater)
        self.damage = reader.damage
        self.raters = sorted({vote.rater for vote in self._votes})
        self.choices = {
            name: opinions.choices(vote for vote in self._votes if vote.rater == name) for name in self.raters
        }
        self._majority = opinions.majority(self._votes)
        outcomes = Counter(self._majority.values())
        sides = (TUNED, self.against)
        drawn = {(h["seed"], h["limit"]) for h in reader.heads.values() if _is_of(h, sides, self.raters)}
        rows = report.path / "rows.jsonl"
        voted = {vote.place for vote in self._votes}
        draws = [votes.drawn(rows, sides, *head) for head in drawn]
        # those of a draw that is not yet voted on would be counted against a sample of the others
        self.num_equal = len({place for places, equal in draws if voted.issuperset(places) for place in equal})
        self.wins, self.losses = outcomes[1], outcomes[-1]
        self.ties = outcomes[0] + self.num_equal
        self.win_rate: Share = opinions.share(self.wins, self.wins + self.losses)
        chosen = opinions.choices(self._votes)
        self.first: Share = opinions.share(chosen[votes.A], chosen[votes.A] + chosen[votes.B])
        self.agreement: Agreement | None = opinions.agreement(self._votes)
        self.by_metric = self._by_metric()

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} against {self.against}: {self.wins} wins, {self.ties} ties, {self.losses} losses>"
        )

    @property
    def num_rows(self) -> int:
        """Rows with a vote that is no skip."""
        return len(self._majority)

    @property
    def verdict(self) -> str:
        """better, worse, or unclear where a coin does as well once in twenty times."""
        if self.win_rate.p > 1 - opinions.CONFIDENCE:
            return "unclear"
        return "better" if self.wins > self.losses else "worse"

    def card(self) -> Bundle:
        """Return the card as HTML and as text."""
        from tune_magic.view.rating import rating_card

        return rating_card(self, self.report.run.name or self.report.run.id)

    def show(self) -> None:
        """Show the card: in a notebook as HTML, elsewhere as text."""
        display.show(self.card())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Bundle:
        return self.card()

    def _by_metric(self) -> dict[str, Share]:
        """Return how often each metric prefers what people prefer."""
        known = {
            **self.report.comparisons,
            **(self.report.against.get(self.against, {})),
        }
        same: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for place, row in enumerate(files.each_json_line(self.report.path / "rows.jsonl")):
            people = self._majority.get(place, 0)
            if not people:
                continue
            for name, comparison in known.items():
                if f"{name}_{TUNED}" not in row or f"{name}_{self.against}" not in row:
                    continue
                pair = [number(row[f"{name}_{side}"]) for side in (TUNED, self.against)]
                metric = opinions.prefers(*pair, higher_is_better=comparison.higher_is_better)
                total[name] += metric != 0
                same[name] += metric == people
        return {name: opinions.share(same[name], count) for name, count in total.items() if count}


class Preferences:
    """Votes as rows of preferences: a prompt, the answer people prefer, the one they do not.

    Args:
        report: The evaluation.
        against: The side that the tuned model is compared with; None: the one that was voted on.
        rater: Only this one's votes; None: all, each row once, by the majority.

    Attributes:
        rows: With ``prompt``, ``chosen``, ``rejected``, and ``row``, its number in the rows of the evaluation. Texts;
            messages where a row has a system message or earlier turns.
        left_out: How many rows are no preference, by why: ``tie``, ``skipped``, ``empty`` (one answer is).

    Raises:
        TuneError: Nobody has voted.
    """

    def __init__(self, report: Report, against: str | None = None, rater: str | None = None) -> None:
        self.against, cast = _votes_on(VoteReader(report.path), against, rater)
        preferred = opinions.majority(cast)
        skipped = {vote.place for vote in cast} - preferred.keys()
        self.left_out = {"tie": 0, "skipped": len(skipped), "empty": 0}
        found: list[tuple[list[dict[str, Any]], str, str, int]] = []
        for place, row in enumerate(files.each_json_line(report.path / "rows.jsonl")):
            if place not in preferred:
                continue
            tuned, other = row[TUNED], row[self.against]
            if not preferred[place]:
                self.left_out["tie"] += 1
            elif not (tuned.strip() and other.strip()):
                self.left_out["empty"] += 1
            else:
                chosen, rejected = (tuned, other) if preferred[place] > 0 else (other, tuned)
                found.append((votes.prompt_of(row), chosen, rejected, row["row"]))
        self.rows = _preference_rows(found)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        why = ", ".join(f"{count} {name}" for name, count in self.left_out.items() if count)
        return f"<{type(self).__name__} {len(self)} rows{f'; left out: {why}' if why else ''}>"

    def frame(self) -> pd.DataFrame:
        """Return `rows` as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["prompt", "chosen", "rejected", "row"])

    def save(self, path: str | Path, *, overwrite: bool = False) -> Preferences:
        """Write the rows as JSON lines, which `data:` of a recipe reads.

        Args:
            path: A file that does not exist yet.
            overwrite: It may.

        Raises:
            TuneError: There is no row, the file exists, or it cannot be written.
        """
        target = Path(path).expanduser()
        if not self.rows:
            raise TuneError("No vote prefers an answer yet, so there is nothing to write.", hint=repr(self))
        if target.exists() and not overwrite:
            raise TuneError(f"{path} is there already.", hint="`overwrite=True` writes it anew.")
        try:
            files.write_json_lines(target, self.rows)
        except OSError as error:
            raise TuneError(f"{path} cannot be written: {error.strerror}.") from error
        return self


def votes_frame(report: Report) -> pd.DataFrame:
    """Return the last vote of each rater on each row: rater, row, against, choice, better, comment, time."""
    import pandas as pd

    numbers = [row["row"] for row in files.each_json_line(report.path / "rows.jsonl")]
    lines = [
        [vote.rater, numbers[vote.place], vote.sides[1], vote.choice, vote.better, vote.comment,
         pd.Timestamp(round(1000 * vote.time), unit="ms", tz="UTC")]
        for vote in VoteReader(report.path).votes().values()
    ]  # fmt: skip
    return pd.DataFrame(lines, columns=["rater", "row", "against", "choice", "better", "comment", "time"])


def _votes_on(reader: VoteReader, against: str | None, rater: str | None) -> tuple[str, list[Vote]]:
    """Return what was compared, and the votes on it.

    Raises:
        TuneError: There are none, or more than one thing was compared and none is named.
    """
    cast = [vote for vote in reader.votes().values() if rater in (None, vote.rater)]
    others = sorted({vote.sides[1] for vote in cast})
    chosen = against or (others[0] if len(others) == 1 else BASE)
    found = [vote for vote in cast if vote.sides[1] == chosen]
    if not found:
        who = "Nobody" if rater is None else clean(rater, _LONGEST_NAME)
        more = f" Voted on: {', '.join(others)}." if others else ""
        raise TuneError(f"{who} has not voted on answers of {clean(chosen, 80)} yet.{more}", hint="`%tune rate RUN`.")
    return chosen, found


def _is_of(head: Mapping[str, Any], sides: Sides, raters: list[str]) -> bool:
    return tuple(head["sides"]) == sides and head["rater"] in raters


def _preference_rows(found: list[tuple[list[dict[str, Any]], str, str, int]]) -> list[dict[str, Any]]:
    """Return rows of one form: texts, or messages where one of them needs those."""
    if all(len(prompt) == 1 for prompt, *_ in found):
        return [
            {"prompt": prompt[0]["content"], "chosen": chosen, "rejected": rejected, "row": row}
            for prompt, chosen, rejected, row in found
        ]
    return [
        {"prompt": prompt, "chosen": [_said(chosen)], "rejected": [_said(rejected)], "row": row}
        for prompt, chosen, rejected, row in found
    ]


def _said(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}
