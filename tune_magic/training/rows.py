"""The engine for whole rows: batches of similar length, padded, one output a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tune_magic.data.example import Example
from tune_magic.training import packing
from tune_magic.training.engine import Engine


@dataclass
class RowStates:
    """What an objective sees of a microbatch of B rows.

    Attributes:
        logits: (B, classes) float32.
        targets: (B,) class numbers.
    """

    logits: torch.Tensor
    targets: torch.Tensor


class RowEngine(Engine):
    """Runs an encoder, or a decoder with a head on its last token, over padded rows."""

    def microbatches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Cut the examples into microbatches, the longest first, so that little is padding.

        Rows of one length keep their order, and a sorted sequence is cut as it is.
        """
        return packing.padded_groups(sorted(examples, key=len, reverse=True), self.max_tokens)

    def states(self, examples: Sequence[Example]) -> RowStates:
        """Run the model over one microbatch."""
        batch = packing.pad(examples, pad_token_id=self.inner.config.pad_token_id or 0)
        with self.autocast():
            logits = self.model(
                input_ids=self.tensor(batch.input_ids), attention_mask=self.tensor(batch.attention).long()
            ).logits
        labels = np.array([example.label for example in examples])
        return RowStates(logits=logits.float(), targets=self.tensor(labels))


def row_logits(engine: Engine, examples: Sequence[Example], done: Callable[[int], None] | None = None) -> torch.Tensor:
    """Return the logits of each example, in their order, shape (rows, classes), float32.

    Args:
        engine: A `RowEngine`.
        examples: At least one.
        done: Called with the number of rows of each batch; may raise to break off.
    """
    order = sorted(range(len(examples)), key=lambda number: len(examples[number]), reverse=True)
    parts = []
    with torch.no_grad():
        for batch in engine.microbatches([examples[number] for number in order]):
            parts.append(engine.states(batch).logits.cpu())
            if done is not None:
                done(len(batch))
    logits = torch.cat(parts)
    return logits[torch.tensor(order).argsort()]
