"""What is wrong with rows that are each well formed: copies, contradictions, leaks, cuts, rare classes."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune_magic.data.table import Table

_SHOWN_ROWS = 8
_FEW_ROWS = 50
_FEW_OF_A_CLASS = 8
_UNEVEN = 10.0
_BINS = 24


def findings(train: Table, held_out: Table, classes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return what should be known before training, the most harmful first, JSON-ready.

    Args:
        train: The training rows.
        held_out: Those that are only scored; of the same source or not.
        classes: Names of the classes, where rows have them.

    Returns:
        Each with ``kind``, ``says``, ``count`` of rows, the first ``rows`` (numbers in their source, from 1), and
        ``change``, a line of the recipe that would help, or None.
    """
    trained, scored = _prints(train), _prints(held_out)
    found = [
        _leaks(trained, scored),
        _contradictions([*trained, *scored]),
        _copies(trained),
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


@dataclass(frozen=True, slots=True)
class _Print:
    """What tells a row from others: its number from 1, its question (None where nothing is asked), all of it."""

    number: int
    question: bytes | None
    whole: bytes


def _prints(table: Table) -> list[_Print]:
    found = []
    for example in table:
        is_labelled = example.label is not None
        question = example.trunk.tokens if is_labelled else example.prompt
        whole = hashlib.blake2b(example.trunk.tokens.tobytes(), digest_size=12)
        whole.update(str(example.label).encode())
        asked = hashlib.blake2b(question.tobytes(), digest_size=12).digest() if len(question) else None
        found.append(_Print(example.index + 1, asked, whole.digest()))
    return found


def _finding(kind: str, says: str, rows: Sequence[int], *, change: str | None = None) -> dict[str, Any] | None:
    shown = list(rows[:_SHOWN_ROWS])
    return {"kind": kind, "says": says, "count": len(rows), "rows": shown, "change": change} if rows else None


def _leaks(trained: Sequence[_Print], scored: Sequence[_Print]) -> dict[str, Any] | None:
    known = {row.whole for row in trained}
    rows = [row.number for row in scored if row.whole in known]
    says = (
        f"{_rows(len(rows), 'held-out row is', 'held-out rows are')} also in the training rows: scores on them flatter."
    )
    return _finding("leak", says, rows)


def _contradictions(prints: Sequence[_Print]) -> dict[str, Any] | None:
    """Find rows that ask the same and are answered differently."""
    answers: dict[bytes, set[bytes]] = {}
    for row in prints:
        if row.question is not None:
            answers.setdefault(row.question, set()).add(row.whole)
    rows = sorted(row.number for row in prints if row.question is not None and len(answers[row.question]) > 1)
    says = f"{_rows(len(rows), 'row asks', 'rows ask')} what another asks, and the answers differ."
    return _finding("contradiction", says, rows)


def _copies(prints: Sequence[_Print]) -> dict[str, Any] | None:
    seen: set[bytes] = set()
    rows = []
    for row in prints:
        if row.whole in seen:
            rows.append(row.number)
        seen.add(row.whole)
    says = f"{_rows(len(rows), 'row is a copy', 'rows are copies')} of an earlier one; what is repeated is learned by heart."
    return _finding("copy", says, rows)


def _cuts(tables: Sequence[Table]) -> dict[str, Any] | None:
    rows, longest = [], 0
    for table in tables:
        places = np.flatnonzero(table.num_cut > 0)
        rows += [table[int(place)].index + 1 for place in places]
        longest = max(longest, int((table.lengths + table.num_cut).max(initial=0)))
    says = f"{_rows(len(rows), 'row is', 'rows are')} cut at the end; the longest has {longest} tokens."
    return _finding("cut", says, sorted(rows), change=f"max_length: {64 * math.ceil(longest / 64)}")


def _classes(table: Table, classes: Sequence[str]) -> list[dict[str, Any] | None]:
    if table.labels is None:
        return []
    counts = Counter(table.labels.tolist())
    names = {number: classes[number] if number < len(classes) else str(number) for number in counts}
    (most, most_rows), (least, least_rows) = counts.most_common()[0], counts.most_common()[-1]
    rows = [table[int(place)].index + 1 for place in np.flatnonzero(table.labels == least)]
    if least_rows < _FEW_OF_A_CLASS:
        few = [names[number] for number, count in counts.items() if count < _FEW_OF_A_CLASS]
        says = f"{', '.join(few[:5])}: fewer than {_FEW_OF_A_CLASS} rows to learn a class from."
        return [_finding("rare_class", says, rows)]
    if most_rows > _UNEVEN * least_rows:
        says = f"{names[most]} has {most_rows} rows, {names[least]} only {least_rows}: accuracy alone will flatter."
        return [_finding("uneven_classes", says, rows)]
    return []


def _few(table: Table) -> dict[str, Any] | None:
    if len(table) >= _FEW_ROWS:
        return None
    says = f"{len(table)} rows are few; expect them to be learned by heart. A hundred or more is a start."
    return {"kind": "few", "says": says, "count": len(table), "rows": [], "change": None}


def _rows(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
