"""What is wrong with rows that are each well formed, with the line of a recipe that mends it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tune_magic.data import cleaning, duplicates, privacy
from tune_magic.data.content import Content, texts
from tune_magic.data.table import Table

_SHOWN_ROWS = 8
_FEW_ROWS = 50
_FEW_OF_A_CLASS = 8
_UNEVEN = 10.0
_BINS = 24
_LANGUAGE_ROWS = 2000  # whose language is guessed
_LEAST_LETTERS = 20  # of a text whose language can be told
_RARE_LANGUAGE = 0.01


def findings(
    train: Table, held_out: Table, classes: Sequence[str] = (), seen: TextScan | None = None
) -> list[dict[str, Any]]:
    """Return what should be known before training, the most harmful first, JSON-ready.

    Args:
        train: The training rows.
        held_out: Those that are only scored; of the same source or not.
        classes: Names of the classes, where rows have them.
        seen: What their texts were found to hold.

    Returns:
        Each with ``kind``, ``says``, ``count`` of rows, the first ``rows`` (numbers in their source, from 1), and
        ``change``, a line of the recipe that would help, or None.
    """
    trained, scored = duplicates.prints(train), duplicates.prints(held_out)
    both = duplicates.Prints(
        np.concatenate([trained.whole, scored.whole]), np.concatenate([trained.question, scored.question])
    )
    numbers, others = train.indices + 1, held_out.indices + 1
    leaked, copied = duplicates.leaks(scored, trained), duplicates.copies(trained)
    _, near_trained = duplicates.near_copies([held_out, train])
    is_near_leak = (near_trained >= 0) & (near_trained < len(held_out)) & ~duplicates.leaks(trained, scored)
    is_near_copy = (near_trained >= len(held_out)) & ~copied
    found = [
        _leaks(others[leaked]),
        _near_leaks(numbers[is_near_leak]),
        _contradictions(np.sort(np.concatenate([numbers, others])[duplicates.contradictions(both)])),
        *(seen.findings() if seen else []),
        _copies(numbers[copied]),
        _near_copies(numbers[is_near_copy]),
        _cuts([train, held_out]),
        *_classes(train, classes),
        _few(train),
    ]
    return [finding for finding in found if finding is not None]


def lengths(table: Table) -> dict[str, list[int]]:
    """Return how many rows have how many tokens, cut ones counted: ``edges`` of the bins and ``counts`` in them."""
    found = table.lengths + table.num_cut
    longest = int(found.max()) if len(found) else 1
    edges = np.unique(np.linspace(0, longest + 1, min(_BINS, longest + 1) + 1).round().astype(int))
    counts, _ = np.histogram(found, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


class TextScan:
    """Looks at the texts of rows, some at a time: languages, garbled characters, personal data, secrets.

    Attributes:
        languages: How many of the rows that were asked are in which language, by ISO 639-1 code.
    """

    def __init__(self) -> None:
        self.languages: Counter[str] = Counter()
        self._garbled: list[int] = []
        self._personal: list[int] = []
        self._secret: list[int] = []
        self._kinds: Counter[str] = Counter()

    def look(self, contents: Sequence[Content], numbers: Sequence[int]) -> None:
        """Look at rows; `numbers` are theirs in their source, from 0."""
        for content, number in zip(contents, numbers, strict=True):
            said = texts(content)
            if any(cleaning.mended_encoding(text) != text for text in said if not text.isascii()):
                self._garbled.append(number + 1)
            kinds = {kind for text in said for kind in privacy.personal(text)}
            if kinds:
                self._personal.append(number + 1)
                self._kinds.update(kinds)
            if any(privacy.secrets(text) for text in said):
                self._secret.append(number + 1)
            if sum(self.languages.values()) < _LANGUAGE_ROWS:
                self._guess_language(" ".join(said))

    def _guess_language(self, text: str) -> None:
        if sum(c.isalpha() for c in text[:400]) >= _LEAST_LETTERS:
            import py3langid

            self.languages[py3langid.classify(text[:400])[0]] += 1

    def language_shares(self) -> dict[str, float]:
        """Return the share of each language among the rows that were asked, the largest first; rare ones left out."""
        total = self.languages.total()
        return {name: count / total for name, count in self.languages.most_common() if count / total >= _RARE_LANGUAGE}

    def findings(self) -> list[dict[str, Any] | None]:
        """Return what texts hold that they should not."""
        kinds = ", ".join(kind for kind, _ in self._kinds.most_common())
        return [
            _finding(
                "secret", f"{_rows(len(self._secret), 'row holds', 'rows hold')} what looks like a key or token.",
                self._secret, change="clean: [secrets]",
            ),
            _finding(
                "personal", f"{_rows(len(self._personal), 'row holds', 'rows hold')} personal data: {kinds}.",
                self._personal, change="clean: [personal]",
            ),
            _finding(
                "encoding",
                f"{_rows(len(self._garbled), 'row has', 'rows have')} garbled characters: decoded by the wrong table once.",
                self._garbled, change="clean: [encoding]",
            ),
        ]  # fmt: skip


def _finding(
    kind: str, says: str, rows: Sequence[int] | np.ndarray, *, change: str | None = None
) -> dict[str, Any] | None:
    shown = [int(row) for row in rows[:_SHOWN_ROWS]]
    return {"kind": kind, "says": says, "count": len(rows), "rows": shown, "change": change} if len(rows) else None


def _leaks(rows: np.ndarray) -> dict[str, Any] | None:
    says = (
        f"{_rows(len(rows), 'held-out row is', 'held-out rows are')} also in the training rows: scores on them flatter."
    )
    return _finding("leak", says, rows, change="clean: [leaks]")


def _near_leaks(rows: np.ndarray) -> dict[str, Any] | None:
    says = f"{_rows(len(rows), 'training row is', 'training rows are')} nearly the same as a held-out one."
    return _finding("near_leak", says, rows, change="clean: [leaks]")


def _contradictions(rows: np.ndarray) -> dict[str, Any] | None:
    says = f"{_rows(len(rows), 'row asks', 'rows ask')} what another asks, and the answers differ."
    return _finding("contradiction", says, rows, change="clean: [contradictions]")


def _copies(rows: np.ndarray) -> dict[str, Any] | None:
    says = f"{_rows(len(rows), 'row is a copy', 'rows are copies')} of an earlier one; what is repeated is learned by heart."
    return _finding("copy", says, rows, change="clean: [duplicates]")


def _near_copies(rows: np.ndarray) -> dict[str, Any] | None:
    says = f"{_rows(len(rows), 'row is', 'rows are')} nearly the same as an earlier one."
    return _finding("near_copy", says, rows, change="clean: [near_duplicates]")


def _cuts(tables: Sequence[Table]) -> dict[str, Any] | None:
    rows = np.sort(np.concatenate([table.indices[table.num_cut > 0] + 1 for table in tables]))
    longest = max(int((table.lengths + table.num_cut).max(initial=0)) for table in tables)
    says = f"{_rows(len(rows), 'row is', 'rows are')} cut at the end; the longest has {longest} tokens."
    return _finding("cut", says, rows, change=f"max_length: {64 * math.ceil(longest / 64)}")


def _classes(table: Table, classes: Sequence[str]) -> list[dict[str, Any] | None]:
    if table.labels is None:
        return []
    counts = Counter(table.labels.tolist())
    names = {number: classes[number] if number < len(classes) else str(number) for number in counts}
    (most, most_rows), (least, least_rows) = counts.most_common()[0], counts.most_common()[-1]
    rows = table.indices[table.labels == least] + 1
    if least_rows < _FEW_OF_A_CLASS:
        few = [names[number] for number, count in counts.items() if count < _FEW_OF_A_CLASS]
        says = f"{', '.join(few[:5])}: fewer than {_FEW_OF_A_CLASS} rows to learn a class from."
        return [_finding("rare_class", says, rows)]
    if most_rows > _UNEVEN * least_rows:
        says = f"{names[most]} has {most_rows} rows, {names[least]} only {least_rows}: accuracy alone will flatter."
        return [_finding("uneven_classes", says, rows, change="balance: resample")]
    return []


def _few(table: Table) -> dict[str, Any] | None:
    if len(table) >= _FEW_ROWS:
        return None
    says = f"{len(table)} rows are few; expect them to be learned by heart. A hundred or more is a start."
    return {"kind": "few", "says": says, "count": len(table), "rows": [], "change": None}


def _rows(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
