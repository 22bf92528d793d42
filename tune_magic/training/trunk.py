"""What the frozen layers make of each row, computed once and kept on disk for every later epoch.

Below the first layer that is trained nothing changes from step to step, as long as no dropout is drawn there. The
outputs are kept in half precision, in a file without a name that the system removes with the process. They are computed
before the first step, in batches that follow from the rows alone, so a run that is resumed computes the same numbers.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tune_magic import files
from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.models.layers import before, layers_of, output_of, skipped, stacks_of
from tune_magic.training.engine import Engine

_ROWS_AT_ONCE = 4096
_SHARE_OF_DISK = 0.5  # of what is free


class Trunk:
    """The kept outputs of an engine's frozen layers.

    Args:
        engine: Computes them, and is given them afterwards.
        depth: How many layers, from the first, are kept.
    """

    def __init__(self, engine: Engine, depth: int) -> None:
        self.engine = engine
        self.depth = depth
        self._layers = layers_of(engine.inner)
        self._kept = torch.empty(0)
        self._starts = self._ends = np.empty(0, dtype=np.int64)  # by the example's number

    def knows(self, examples: Sequence[Example]) -> bool:
        """Return whether the outputs for all of these are kept."""
        return all(example.number < len(self._ends) and self._ends[example.number] for example in examples)

    def states(self, examples: Sequence[Example]) -> Any:
        """Compute what the objective sees of a microbatch from the kept outputs."""
        if _keeps_one_token(self.engine, self.depth):
            return self.engine.above(torch.cat([self._read(example) for example in examples]), examples)
        batch = self.engine.lay_out(examples)
        shape = batch.input_ids.shape
        given = torch.zeros(batch.input_ids.size, self._kept.shape[1], device=self.engine.device)
        for places, example in zip(batch.places, examples, strict=True):
            given[self.engine.tensor(places)] = self._read(example)
        with skipped(self._layers[: self.depth], given.view(*shape, -1)):
            return self.engine.compute(batch, examples)

    def fill(self, sources: Sequence[Sequence[Example]], folder: Path, look: Callable[[int], None]) -> None:
        """Compute and keep the outputs for examples.

        Args:
            sources: All that will be asked for.
            folder: On a disk with room for them.
            look: Called with the number of examples done after each batch; may raise to break off.

        Raises:
            OSError: The disk is full.
        """
        self.engine.model.eval()
        for dtype in (torch.bfloat16,) if self.engine.dtype == torch.bfloat16 else (torch.float16, torch.bfloat16):
            if self._try_to_fill(sources, folder, dtype, look):
                return
        raise OSError("the outputs of the frozen layers are not finite")

    def _try_to_fill(
        self, sources: Sequence[Sequence[Example]], folder: Path, dtype: torch.dtype, look: Callable[[int], None]
    ) -> bool:
        """Return False when a number does not fit the precision."""
        size = 1 + max(example.number for source in sources for example in source)
        starts, ends = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        done, end, width = 0, 0, 0
        with files.scratch(folder) as scratch:
            for microbatch, states in self._outputs(sources):
                rounded = [kept.to("cpu", dtype).contiguous() for kept in states]
                if not all(bool(kept.isfinite().all()) for kept in rounded):
                    return False
                for example, kept in zip(microbatch, rounded, strict=True):
                    scratch.append(kept.view(torch.int16).numpy().tobytes())
                    starts[example.number], ends[example.number] = end, end + len(kept)
                    end, width = end + len(kept), kept.shape[1]
                done += len(microbatch)
                look(done)
            self._kept = torch.frombuffer(scratch.map(), dtype=dtype).view(end, width)
        self._starts, self._ends = starts, ends
        return True

    def _outputs(self, sources: Sequence[Sequence[Example]]) -> Iterator[tuple[list[Example], list[torch.Tensor]]]:
        """Yield microbatches with the states that matter of each example, (tokens, width)."""
        engine, rest = self.engine, self._layers[self.depth :]
        for microbatch in itertools.chain.from_iterable(map(self._microbatches, sources)):
            batch = engine.lay_out(microbatch)
            with torch.no_grad(), output_of(self._layers[self.depth - 1]) as found, skipped(rest):
                engine.compute(batch, microbatch)
            states = found[0].flatten(0, 1)
            yield microbatch, [states[engine.tensor(places)] for places in engine.kept(batch, self.depth)]

    def _microbatches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Cut a source into microbatches, some of its rows at a time, so that not all of them are held at once."""
        for start in range(0, len(examples), _ROWS_AT_ONCE):
            yield from self.engine.microbatches(examples[start : start + _ROWS_AT_ONCE])

    def _read(self, example: Example) -> torch.Tensor:
        start, end = self._starts[example.number], self._ends[example.number]
        return self._kept[start:end].to(self.engine.device, torch.float32)


class Plan(NamedTuple):
    """What would be kept: the outputs of the first `depth` layers, 0 for none, in `size_bytes` on disk."""

    depth: int
    size_bytes: int


def plan(engine: Engine, sources: Sequence[Table], folder: Path) -> Plan:
    """Return what can be kept of these examples on the disk of a folder."""
    depth = _frozen_depth(engine)
    if not depth or (not engine.packed and any(source.has_branches for source in sources)):
        return Plan(0, 0)
    if not engine.packed and not _give_their_states(
        engine, depth, next(source[0] for source in sources if len(source))
    ):
        return Plan(0, 0)
    keeps_one = _keeps_one_token(engine, depth)
    tokens = sum(len(source) if keeps_one else int(source.lengths.sum(dtype=np.int64)) for source in sources)
    size_bytes = 2 * tokens * int(engine.inner.config.get_text_config().hidden_size)
    return Plan(depth, size_bytes) if size_bytes <= _SHARE_OF_DISK * shutil.disk_usage(folder).free else Plan(0, 0)


def _keeps_one_token(engine: Engine, depth: int) -> bool:
    """Whether of each example one token's state is kept, since only the head reads it."""
    return engine.packed and engine.reads_one_token and depth == len(layers_of(engine.inner))


def _give_their_states(engine: Engine, depth: int, example: Example) -> bool:
    """Whether each of the first layers gives its states once for an example: a model may run one often, or give more.

    Families that are packed are known to.
    """
    engine.model.eval()
    with contextlib.ExitStack() as stack, torch.no_grad():
        given = [stack.enter_context(output_of(layer)) for layer in layers_of(engine.inner)[:depth]]
        engine.compute(engine.lay_out([example]), [example])
    engine.method.to_training(engine.model)
    return all(len(found) == 1 and torch.is_tensor(found[0]) for found in given)


def _frozen_depth(engine: Engine) -> int:
    """Return how many layers, from the first, give the same for a row in every step of training."""
    if not (engine.method.packs and engine.keeps_layers) or engine.noise_alpha or len(stacks_of(engine.inner)) > 1:
        return 0  # what they read changes, or is not known
    layers = layers_of(engine.inner)
    engine.method.to_training(engine.model)

    def changes(module: torch.nn.Module) -> bool:
        draws = engine.has_dropout and module.training
        return draws or any(parameter.requires_grad for parameter in module.parameters())

    if any(map(changes, before(engine.inner, layers))):
        return 0
    return next((number for number, layer in enumerate(layers) if changes(layer)), len(layers))
