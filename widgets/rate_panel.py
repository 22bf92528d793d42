"""Vote on two answers without knowing whose they are."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import ipywidgets
from tune_magic.widgets.panel import Panel, button

from tune_magic.ballot import BACK, KEYS, Ballot, open_ballot
from tune_magic.errors import TuneError
from tune_magic.evaluation.votes import BAD, EQUAL, SKIP, A, B
from tune_magic.handles import Report, Run
from tune_magic.storage import places
from tune_magic.view.html import Bundle, note_bundle, stacked
from tune_magic.view.rating import TITLES

_PERIOD_S = 5.0  # votes of another tab are seen as late as this
_STILL_TYPING_S = 0.5
_FINISH = "finish"
_TOLD = {
    A: "Answer A is better: 1 or a", B: "Answer B is better: 2 or b", EQUAL: "Both are as good: 3 or =",
    BAD: "Neither is any good: 4 or x", SKIP: "Say nothing of this pair: 5 or s",
}  # fmt: skip


class RatePanel(Panel):
    """Two answers, A and B; buttons and keys to vote, a field for a comment.

    Nothing in the widgets or the page tells which answer is whose. A key is a letter typed into the field for it, where
    the notebook's own shortcuts do not reach; after a click the cursor is in that field. The view that stays is the pair
    that is open, and after `finish` how far the rating is; once every row has its vote, what the votes say.

    Args:
        of: A ballot; or a run, its name or id, or a report, to open one of.
        **options: Of the ballot: against, rater, seed, limit.

    Attributes:
        ballot: What is voted on.

    Raises:
        TuneError: There are no answers to rate.

    Example:
        >>> RatePanel("support_bot", rater="ann")  # doctest: +SKIP
    """

    def __init__(self, of: Ballot | Report | Run | str, **options: Any) -> None:
        found = Run(places.find(of)) if isinstance(of, str) else of
        self.ballot = found if isinstance(found, Ballot) else open_ballot(found, **options)
        self._asked: deque[tuple[int | None, str]] = deque()
        self._problem: str | None = None
        self._commented = -_STILL_TYPING_S
        self._is_finished = self._is_setting = False
        self.buttons = {
            choice: button(title, _TOLD[choice], lambda choice=choice: self._click(choice))
            for choice, title in TITLES.items()
        }
        self.buttons[BACK] = button("Back", "To the pair before: 6 or z", lambda: self._click(BACK))
        self.finish = button(
            "Finish", "Take the panel away and leave a card; votes are kept", lambda: self._ask(_FINISH)
        )
        self.keys = ipywidgets.Text(
            placeholder="type a vote here: 1 A · 2 B · 3 equal · 4 both bad · 5 skip · 6 back", tooltip="Vote by key",
            layout=ipywidgets.Layout(flex="1 1 300px", width="auto"),
        )  # fmt: skip
        self.comment = ipywidgets.Textarea(
            placeholder="comment, saved with the vote", rows=1, tooltip="Comment on this pair",
            layout=ipywidgets.Layout(flex="1 1 300px", width="auto"),
        )  # fmt: skip
        wrap = ipywidgets.Layout(flex_flow="row wrap", max_width="980px")
        rows = [[*self.buttons.values(), self.finish], [self.keys, self.comment]]
        super().__init__(ipywidgets.VBox([ipywidgets.HBox(row, layout=wrap) for row in rows]), _PERIOD_S)
        self.keys.observe(self._press, "value")
        self.comment.observe(self._note_comment, "value")
        self._set_up()

    def bundle(self) -> Bundle:
        """Return the pair that is open; behind the last one, and at the end, the card."""
        if self._is_finished:
            return self.ballot.card()
        shown = self.ballot.shown()
        return stacked(note_bundle(self._problem), shown) if self._problem else shown

    def act(self) -> None:
        """Write the votes that were asked for, each for the pair that was shown then."""
        while self._asked:
            place, choice = self._asked.popleft()
            if time.monotonic() - self._commented < _STILL_TYPING_S:
                self.settle()
            self._do(place, choice)

    @property
    def is_over(self) -> bool:
        """Whether the rater is done here."""
        return self._is_finished

    def close(self) -> None:
        """Take the controls away; what stays tells how far the rating is."""
        self._asked.append((None, _FINISH))
        super().close()
        self.act()  # what the thread did not come to
        if self._view is not None and not self._has_failed:
            self._draw()

    def _do(self, place: int | None, choice: str) -> None:
        self._problem = None
        try:
            if choice == _FINISH:
                self._is_finished = True
                self.ballot.close()
            elif choice == BACK:
                self.ballot.back()
            elif place is not None:
                self.ballot.vote(choice, self.comment.value, place=place)
        except TuneError as error:
            self._problem = str(error)
            return
        self._set_up()

    def _set_up(self) -> None:
        """Show the comment of the pair that is open, and which buttons make sense."""
        pair = self.ballot.current
        self._is_setting = True
        self.comment.value = self.ballot.chosen(pair)[1] if pair is not None else ""
        self._is_setting = False
        for choice in TITLES:
            self.buttons[choice].disabled = pair is None
        self.buttons[BACK].disabled = pair is not None and pair is self.ballot.pairs[0]

    def _ask(self, choice: str) -> None:
        pair = self.ballot.current
        self._asked.append((None if pair is None else pair.place, choice))
        self.wake()

    def _click(self, choice: str) -> None:
        self._ask(choice)
        self.keys.focus()  # else the next key would be one of the notebook's shortcuts

    def _press(self, change: Any) -> None:
        typed = [KEYS[letter] for letter in change["new"].lower() if letter in KEYS]
        if typed:
            self._ask(typed[-1])  # of several that came at once, all were typed at the same pair
        if change["new"]:
            self.keys.value = ""

    def _note_comment(self, _: Any) -> None:
        if not self._is_setting:
            self._commented = time.monotonic()
            self.wake()
