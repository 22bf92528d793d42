"""What a recipe's `clean` does: rows mended before they are encoded, or left out after. The file stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tune_magic.data import duplicates, privacy
from tune_magic.data.content import Content, with_texts
from tune_magic.data.table import Table

LISTED = 200  # row numbers kept of each kind of finding


def mended_encoding(text: str) -> str:
    """Return a text with characters mended that were decoded by the wrong table (`cafÃ©`); all others stay."""
    import ftfy

    return ftfy.fix_encoding(text)


# in this order: what is garbled is mended before it is looked at
_MENDERS: dict[str, Callable[[str], str]] = {
    "encoding": mended_encoding,
    "secrets": privacy.without_secrets,
    "personal": privacy.without_personal,
}


class Mending:
    """Mends rows of one source, some at a time.

    Args:
        kinds: What to do, of a recipe's `clean`; what is no mending is ignored.

    Attributes:
        done: Numbers of the rows that were changed, by kind.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.done: dict[str, list[int]] = {kind: [] for kind in _MENDERS if kind in kinds}

    def mend(self, contents: list[Content | None], first: int) -> list[Content | None]:
        """Return rows mended; `first` is the number of the first of them."""
        if not self.done:
            return contents
        mended = list(contents)
        for kind, rows in self.done.items():
            for place, content in enumerate(mended):
                if content is not None:
                    changed = with_texts(content, _MENDERS[kind])
                    if changed != content:
                        mended[place] = changed
                        rows.append(first + place)
        return mended


def clean(
    train: Table, held_out: Table, kinds: Sequence[str], sources: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the places of the training rows that stay, and what was left out.

    Args:
        train: Training rows, of all sources.
        held_out: Rows that are only scored; they stay as they are.
        kinds: A recipe's `clean`.
        sources: Number of the source of each training row.
        names: What people call the sources.

    Returns:
        Places, (rows,) int64; and of each kind and source ``kind``, ``source``, ``count`` and the first ``rows``
        (numbers in their source, from 1).
    """
    stays = np.ones(len(train), dtype=bool)
    left_out: list[dict[str, Any]] = []
    for kind, find in _FINDERS.items():
        if kind not in kinds:
            continue
        drop = stays.copy()
        drop[stays] = find(train.take(np.flatnonzero(stays)), held_out)
        stays &= ~drop
        for number, name in enumerate(names):
            rows = train.indices[drop & (sources == number)]
            if len(rows):
                left_out.append(
                    {"kind": kind, "source": name, "count": len(rows), "rows": (rows[:LISTED] + 1).tolist()}
                )
    return np.flatnonzero(stays), left_out


def _overlong(train: Table, held_out: Table) -> np.ndarray:
    return train.num_cut > 0


def _duplicates(train: Table, held_out: Table) -> np.ndarray:
    return duplicates.copies(duplicates.prints(train))


def _leaks(train: Table, held_out: Table) -> np.ndarray:
    """Find training rows that are held out too, or nearly."""
    scored, trained = duplicates.near_copies([held_out, train])
    exact = duplicates.leaks(duplicates.prints(train), duplicates.prints(held_out))
    return exact | ((trained >= 0) & (trained < len(scored)))


def _contradictions(train: Table, held_out: Table) -> np.ndarray:
    return duplicates.contradictions(duplicates.prints(train))


def _near_duplicates(train: Table, held_out: Table) -> np.ndarray:
    return duplicates.near_copies([train])[0] >= 0


# cheap ones first, so that the others have fewer rows to look at
_FINDERS: dict[str, Callable[[Table, Table], np.ndarray]] = {
    "overlong": _overlong,
    "duplicates": _duplicates,
    "contradictions": _contradictions,
    "leaks": _leaks,
    "near_duplicates": _near_duplicates,
}
