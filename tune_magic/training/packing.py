"""Lay examples out in one row, with what they begin with in common computed once.

Shapes: S tokens of a packed row, T targets (tokens with a weight), B rows and L tokens of a padded batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from tune_magic.data.example import Example, Segment

_BLOCK = 128  # tokens of FlexAttention's blocks
WORTH = 8  # tokens that a shared node must save, since it costs some calls in every layer


@dataclass(frozen=True)
class Batch:
    """Token ids with the places where something is predicted.

    Attributes:
        input_ids: (1, S) packed or (B, L) padded, int64.
        position_ids: The same shape: each token's distance from the start of its own sequence.
        sources: (T,) index into the flattened tokens of the position that predicts each target.
        targets: (T,) token ids.
        weights: (T,) float32.
        owners: (T,) number of the example in the batch that each target belongs to.
        attention: (B, L) bool, True at real tokens; None when packed.
        nodes: When packed: (start, end, stop) of every segment, in the order of the row. A token sees the earlier ones
            of its own segment, and those of each segment with end <= token < stop: its ancestors.
        places: For each example, the index into the flattened tokens of each of its own, in its order. Shared tokens
            are in several. Empty for padded trees, whose trunk lies in several rows.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    owners: np.ndarray
    attention: np.ndarray | None = None
    nodes: tuple[tuple[int, int, int], ...] = ()
    places: tuple[np.ndarray, ...] = ()


@dataclass
class _Layout:
    """Collects the targets of a batch."""

    sources: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    owners: list[np.ndarray] = field(default_factory=list)

    def add(self, segment: Segment, before: np.ndarray, owner: int) -> None:
        """Note the weighted tokens of `segment`; `before` is the index that precedes each of them."""
        chosen = np.flatnonzero(segment.weights)
        self.sources.append(before[chosen])
        self.targets.append(segment.tokens[chosen].astype(np.int64))
        self.weights.append(segment.weights[chosen])
        self.owners.append(np.full(len(chosen), owner))

    def columns(self) -> dict[str, Any]:
        return {name: np.concatenate(getattr(self, name)) for name in ("sources", "targets", "weights", "owners")}


def groups(examples: Sequence[Example], max_tokens: int, *, share: bool) -> Iterator[list[Example]]:
    """Cut a step's examples into microbatches of at most `max_tokens` computed tokens.

    Where prefixes are shared, examples that begin alike come together; otherwise they stay in order. An example longer
    than the budget is a microbatch of its own.
    """
    ordered = [examples[i] for i in alike_together(examples)] if share else list(examples)
    overlaps = _overlaps(ordered) if share else [0] * len(ordered)
    first = 0
    for last in range(1, len(ordered) + 1):
        if last == len(ordered) or _size(ordered[first : last + 1], overlaps[first + 1 : last + 1]) > max_tokens:
            yield ordered[first:last]
            first = last


def padded_groups(
    examples: Sequence[Example], max_tokens: int, size: Callable[[Sequence[Example]], int] | None = None
) -> Iterator[list[Example]]:
    """Cut a step's examples, in order, into microbatches of at most `max_tokens` tokens with their padding.

    Args:
        examples: At least one.
        max_tokens: Of a microbatch of more than one example.
        size: Returns the tokens of a microbatch; None: each example is padded to the longest.
    """
    size = size or _padded_size
    group: list[Example] = []
    for example in examples:
        if group and size([*group, example]) > max_tokens:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def _padded_size(examples: Sequence[Example]) -> int:
    return len(examples) * max(map(len, examples))


def pack(examples: Sequence[Example], *, share: bool, worth: int = WORTH) -> Batch:
    """Lay a forest of segments out in one row of S tokens, each node before its descendants.

    A token sees the earlier tokens of its own path and nothing else, at the position it would have alone, so every
    prediction is what it would be alone.

    Args:
        examples: At least one.
        share: Compute what trunks begin with in common once, at every depth where it saves enough.
        worth: Tokens that are enough.
    """
    row = _Row()
    order = alike_together(examples) if share else list(range(len(examples)))
    overlaps = _overlaps([examples[i] for i in order]) if share else [0] * len(order)
    places: list[Any] = [None] * len(examples)
    for part in _parts(overlaps, worth):
        owners = order[part.first : part.last]
        row.leave(part.depth)
        trunk = examples[owners[0]].trunk
        if len(owners) > 1:
            row.add(trunk.tokens[part.depth : part.end])
            continue
        example = examples[owners[0]]
        row.add_targets(Segment(trunk.tokens[part.depth :], trunk.weights[part.depth :]), owners[0])
        parts = [row.path()]
        for branch in example.branches:
            row.leave(len(trunk))
            row.add_targets(branch, owners[0])
            parts.append(row.path()[len(trunk) :])
        places[owners[0]] = np.concatenate(parts)
    return row.batch(places)


def rounded(batch: Batch) -> Batch:
    """Fill a packed row up, so that rows come in few sizes, each a number of blocks: at most an eighth more tokens.

    What is filled in sees itself alone, and nothing is predicted there.
    """
    size = batch.input_ids.size
    unit = max(_BLOCK, 2 ** (size.bit_length() - 1) // 8)
    missing = -size % unit
    if not missing:
        return batch
    added = np.zeros((1, missing), dtype=np.int64)
    return replace(
        batch,
        input_ids=np.concatenate([batch.input_ids, added], axis=1),
        position_ids=np.concatenate([batch.position_ids, added], axis=1),
        nodes=(*batch.nodes, (size, size + missing, size + missing)),
    )


def pad(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Lay every path of every tree out as a row of its own, padded on the right: the reference `pack` must equal."""
    paths = [(owner, path) for owner, example in enumerate(examples) for path in _paths(example)]
    width = max(len(path) for _, path in paths)
    input_ids = np.full((len(paths), width), pad_token_id, dtype=np.int64)
    attention = np.zeros((len(paths), width), dtype=bool)
    layout = _Layout()
    for row, (owner, path) in enumerate(paths):
        input_ids[row, : len(path)] = path.tokens
        attention[row, : len(path)] = True
        layout.add(path, np.arange(-1, len(path) - 1) + row * width, owner)
    position_ids = np.broadcast_to(np.arange(width), input_ids.shape)
    is_tree = len(paths) > len(examples)
    places = () if is_tree else tuple(row * width + np.arange(len(path)) for row, (_, path) in enumerate(paths))
    return Batch(input_ids, position_ids, attention=attention, places=places, **layout.columns())


def _paths(example: Example) -> Iterator[Segment]:
    """Yield each way from root to leaf; the trunk's own targets count once, however many branches repeat it."""
    trunk = example.trunk
    if not example.branches:
        yield trunk
    for number, branch in enumerate(example.branches):
        weights = trunk.weights if number == 0 else np.zeros_like(trunk.weights)
        tokens = np.concatenate([trunk.tokens, branch.tokens])
        yield Segment(tokens, np.concatenate([weights, branch.weights]))


class _Row:
    """Lays nodes behind each other. The open nodes are the path that the next one continues."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._nodes: list[list[int]] = []
        self._open: list[tuple[int, int]] = []  # (number of the node, depth where it ends)
        self._layout = _Layout()
        self._size = 0

    def leave(self, depth: int) -> None:
        """Close the nodes that end deeper than `depth`."""
        while self._open and self._open[-1][1] > depth:
            self._nodes[self._open.pop()[0]][2] = self._size

    def add(self, tokens: np.ndarray) -> None:
        """Continue the open path."""
        depth = self._open[-1][1] if self._open else 0
        self._open.append((len(self._nodes), depth + len(tokens)))
        self._nodes.append([self._size, self._size + len(tokens), 0])
        self._tokens.append(tokens)
        self._positions.append(np.arange(depth, depth + len(tokens)))
        self._size += len(tokens)

    def add_targets(self, segment: Segment, owner: int) -> None:
        """Continue the open path by a segment in which something may be predicted."""
        last = self._nodes[self._open[-1][0]][1] - 1 if self._open else -1
        before = np.concatenate([[last], np.arange(self._size, self._size + len(segment) - 1)])
        self._layout.add(segment, before.astype(np.int64), owner)
        self.add(segment.tokens)

    def path(self) -> np.ndarray:
        """Return the index of each token of the open path."""
        return np.concatenate([np.arange(*self._nodes[number][:2]) for number, _ in self._open])

    def batch(self, places: Sequence[np.ndarray]) -> Batch:
        self.leave(-1)
        return Batch(
            input_ids=np.concatenate(self._tokens).astype(np.int64)[None],
            position_ids=np.concatenate(self._positions)[None],
            nodes=tuple((start, end, stop) for start, end, stop in self._nodes),
            places=tuple(places),
            **self._layout.columns(),
        )


class _Part(NamedTuple):
    """Rows `first` to `last` - 1 share the tokens from `depth` to `end`; a single row is all that is left of it."""

    first: int
    last: int
    depth: int
    end: int


def _parts(overlaps: Sequence[int], worth: int) -> Iterator[_Part]:
    """Yield the forest over rows in their order, parents before children.

    Args:
        overlaps: How many first tokens each row shares with the one before it; the first number is not looked at.
        worth: Tokens that a shared part must save.
    """
    waiting = [(0, len(overlaps), 0)]
    while waiting:
        first, last, depth = waiting.pop()
        if last - first == 1:
            yield _Part(first, last, depth, depth)
            continue
        end = min(overlaps[first + 1 : last])
        cuts = [first, *(i for i in range(first + 1, last) if overlaps[i] == end), last]
        if (last - first - 1) * (end - depth) >= worth:
            yield _Part(first, last, depth, end)
            depth = end
        waiting += [(a, b, depth) for a, b in reversed(list(itertools.pairwise(cuts)))]


def alike_together(examples: Sequence[Example]) -> list[int]:
    """Return the numbers of the examples, sorted by what each may share."""
    keys = [_sharable(example.trunk).astype(">u4").tobytes() for example in examples]  # sorts as the tokens do
    return sorted(range(len(examples)), key=keys.__getitem__)


def _overlaps(ordered: Sequence[Example]) -> list[int]:
    """Return how many first tokens each trunk may share with the one before it."""
    parts = [_sharable(example.trunk) for example in ordered]
    overlaps = [0]
    for before, after in itertools.pairwise(parts):
        length = min(len(before), len(after))
        differs = before[:length] != after[:length]
        overlaps.append(int(differs.argmax()) if differs.any() else length)
    return overlaps


def _sharable(trunk: Segment) -> np.ndarray:
    """Return the first tokens up to a target, the last one left out, so that each example keeps one of its own."""
    trained = np.flatnonzero(trunk.weights[:-1])
    return trunk.tokens[: trained[0] if len(trained) else len(trunk) - 1]


def _size(ordered: Sequence[Example], overlaps: Sequence[int]) -> int:
    """Return the tokens of a packed row; `overlaps` are those of all examples but the first."""
    shared = sum((part.last - part.first - 1) * (part.end - part.depth) for part in _parts([0, *overlaps], WORTH))
    return sum(map(len, ordered)) - shared
