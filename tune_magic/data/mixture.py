"""How often which rows come in an epoch: several sources, rarer classes, rows of an earlier training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tune_magic.errors import DataError
from tune_magic.recipe.schema import DataOptions, MixedSource


@dataclass(frozen=True)
class Draw:
    """Rows that are drawn from together.

    Attributes:
        name: Their source.
        rows: Their numbers among the training rows, (rows,) int64.
        count: How many of them an epoch has: fewer than there are, and each epoch has others; more, and they come again.
        label: Number of their class, where the classes of a source are drawn apart.
        is_replay: They are of an earlier training.
    """

    name: str
    rows: np.ndarray
    count: int
    label: int | None = None
    is_replay: bool = False


def more_sources(data: DataOptions) -> list[MixedSource]:
    """Return what is trained on beside `train`; replayed rows come last, with their weight still to be computed."""
    replay = [] if data.replay is None else [MixedSource.model_validate({"data": data.replay})]
    return [*data.mix, *replay]


def draws(data: DataOptions, more: Sequence[MixedSource], sources: np.ndarray, labels: np.ndarray | None) -> list[Draw]:
    """Return how an epoch is drawn; empty where every row comes once.

    Args:
        data: The recipe's word.
        more: Sources beside `train`, as `more_sources` gives them.
        sources: Number of the source of each training row: 0 is `train`.
        labels: Class of each, None where rows have none.

    Raises:
        DataError: There is nothing to balance.
    """
    if data.balance == "resample" and labels is None:
        raise DataError("`balance: resample` evens out classes, and these rows have none.", hint="Leave `balance` out.")
    if not more and data.balance == "none":
        return []
    main = np.flatnonzero(sources == 0)
    found = [Draw(data.train, main, len(main))]
    if data.balance == "resample" and labels is not None:
        classes = [main[labels[main] == number] for number in np.unique(labels[main])]
        most = max(map(len, classes))
        found = [Draw(data.train, rows, most, label=int(labels[rows[0]])) for rows in classes]
    base = sum(draw.count for draw in found)
    mixed = len(data.mix)
    for number, source in enumerate(more, start=1):
        rows = np.flatnonzero(sources == number)
        if len(rows) and number <= mixed:
            ratio = (len(rows) / len(main)) ** (1 / data.mix_temperature) if source.weight is None else source.weight
            found.append(Draw(source.data, rows, max(1, round(ratio * base))))
        elif len(rows):
            others = sum(draw.count for draw in found)
            count = max(1, round(others * data.replay_share / (1 - data.replay_share)))
            found.append(Draw(source.data, rows, count, is_replay=True))
    return found


def epoch_weights(drawn: Sequence[Draw], num_rows: int) -> np.ndarray:
    """Return how often each row comes in an epoch, on average, (rows,) float32."""
    weights = np.ones(num_rows, dtype=np.float32) if not drawn else np.zeros(num_rows, dtype=np.float32)
    for draw in drawn:
        weights[draw.rows] = draw.count / len(draw.rows)
    return weights


def facts(drawn: Sequence[Draw], classes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return each part of an epoch in numbers, JSON-ready; `classes` are the names of the classes."""
    total = sum(draw.count for draw in drawn)
    return [
        {
            "name": draw.name, "rows": len(draw.rows), "per_epoch": draw.count, "share": round(draw.count / total, 4),
            **({} if draw.label is None else {"class": classes[draw.label]}),
            **({"replay": True} if draw.is_replay else {}),
        }
        for draw in drawn
    ]  # fmt: skip
