"""Lay examples out in one row, with what they share computed once.

Shapes: S tokens of a packed row, T targets (tokens with a weight), B rows and L tokens of a padded batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tune_magic.data.example import Example, Segment


@dataclass(frozen=True)
class Batch:
    """Token ids with the places where something is predicted.

    Attributes:
        input_ids: (1, S) packed or (B, L) padded, int64.
        position_ids: The same shape: each token's distance from the start of its own sequence.
        attention: (S, S) bool, True where row may look at column, when packed; (B, L) bool, True at real tokens,
            when padded.
        sources: (T,) index into the flattened tokens of the position that predicts each target.
        targets: (T,) token ids.
        weights: (T,) float32.
        owners: (T,) number of the example in the batch that each target belongs to.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    attention: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    owners: np.ndarray


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

    def columns(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(getattr(self, name)) for name in ("sources", "targets", "weights", "owners")}


def shared_prefix_length(examples: Sequence[Example]) -> int:
    """Return how many first tokens all trunks have in common, none of them a target.

    The last token of every trunk stays out, so that each example keeps a token of its own.
    """
    if len(examples) < 2:
        return 0
    length = min(len(example.trunk) - 1 for example in examples)
    first = examples[0].trunk.tokens[:length]
    for example in examples:
        differs = (example.trunk.tokens[: len(first)] != first) | (example.trunk.weights[: len(first)] != 0)
        first = first[: int(differs.argmax())] if differs.any() else first
    return len(first)


def groups(examples: Sequence[Example], max_tokens: int, *, share: bool) -> Iterator[list[Example]]:
    """Cut a step's examples into microbatches of at most `max_tokens` computed tokens, in order.

    An example longer than that is a microbatch of its own.
    """
    shared = shared_prefix_length(examples) if share else 0
    group: list[Example] = []
    num_tokens = shared
    for example in examples:
        own = len(example) - shared
        if group and num_tokens + own > max_tokens:
            yield group
            group, num_tokens = [], shared
        group.append(example)
        num_tokens += own
    if group:
        yield group


def padded_groups(examples: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Cut a step's examples, in order, into microbatches of at most `max_tokens` tokens with their padding."""
    group: list[Example] = []
    for example in examples:
        longest = max(len(member) for member in [*group, example])
        if group and (len(group) + 1) * longest > max_tokens:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def pack(examples: Sequence[Example], *, share: bool) -> Batch:
    """Lay trees of segments out in one row of S tokens: shared prefix, then each trunk, then its branches.

    A token sees the earlier tokens of its own path and nothing else, at the position it would have alone, so every
    prediction is what it would be alone.

    Args:
        examples: At least one.
        share: Compute the prefix that all trunks have in common once.
    """
    shared = shared_prefix_length(examples) if share else 0
    nodes: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    parents: list[int] = []
    layout = _Layout()
    size = 0

    def add(tokens: np.ndarray, parent: int, position: int) -> int:
        nonlocal size
        nodes.append(tokens)
        positions.append(np.arange(position, position + len(tokens)))
        parents.append(parent)
        size += len(tokens)
        return len(nodes) - 1

    def before(length: int, last_of_parent: int) -> np.ndarray:
        return np.concatenate([[last_of_parent], np.arange(size - length, size - 1)]).astype(np.int64)

    root = add(examples[0].trunk.tokens[:shared], -1, 0) if shared else -1
    for owner, example in enumerate(examples):
        own = Segment(example.trunk.tokens[shared:], example.trunk.weights[shared:])
        trunk = add(own.tokens, root, shared)
        layout.add(own, before(len(own), shared - 1), owner)
        end_of_trunk = size - 1
        for branch in example.branches:
            add(branch.tokens, trunk, len(example.trunk))
            layout.add(branch, before(len(branch), end_of_trunk), owner)
    return Batch(
        input_ids=np.concatenate(nodes).astype(np.int64)[None],
        position_ids=np.concatenate(positions)[None],
        attention=_tree_mask([len(node) for node in nodes], parents),
        **layout.columns(),
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
    return Batch(input_ids=input_ids, position_ids=position_ids, attention=attention, **layout.columns())


def _paths(example: Example) -> Iterator[Segment]:
    """Yield each way from root to leaf; the trunk's own targets count once, however many branches repeat it."""
    trunk = example.trunk
    if not example.branches:
        yield trunk
    for number, branch in enumerate(example.branches):
        weights = trunk.weights if number == 0 else np.zeros_like(trunk.weights)
        tokens = np.concatenate([trunk.tokens, branch.tokens])
        yield Segment(tokens, np.concatenate([weights, branch.weights]))


def _tree_mask(lengths: list[int], parents: list[int]) -> np.ndarray:
    """Return (S, S) bool: causal, and only along the path from the root."""
    count = len(lengths)
    is_ancestor = np.eye(count, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            is_ancestor[node] |= is_ancestor[parent]
    node_of = np.repeat(np.arange(count), lengths)
    return np.tril(is_ancestor[node_of][:, node_of])
