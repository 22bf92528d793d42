"""Rows of tokens as one padded array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def padded(rows: Sequence[np.ndarray], pad_token_id: int) -> dict[str, np.ndarray]:
    """Return `input_ids` and `attention_mask` of rows, each (rows, longest) int64, padded on the right."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
