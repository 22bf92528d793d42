"""Rows that are told apart, and those that are not: copies, near copies, leaks, contradictions.

All by the tokens of the rows, so nothing but what the model sees counts, and the rows themselves may stay on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tune_magic.data.table import Table

SIMILAR = 0.8  # estimated Jaccard similarity of the token triples of two rows, from which on they are near copies
_SHINGLE = 3
_PERMUTATIONS = 64
_LEAST_TOKENS = 12  # shorter rows are alike by chance
_SEED = 1
_FACTORS = tuple(np.uint64(odd) for odd in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


@dataclass(frozen=True)
class Prints:
    """What tells rows from others, 64 bits each.

    Attributes:
        whole: Of everything in a row, its class too, (rows,) uint64.
        question: Of what is asked, (rows,) uint64; 0 where nothing is.
    """

    whole: np.ndarray
    question: np.ndarray


def prints(table: Table) -> Prints:
    """Return the prints of rows."""
    whole, question = np.zeros(len(table), dtype=np.uint64), np.zeros(len(table), dtype=np.uint64)
    for place, example in enumerate(table):
        asked = example.trunk.tokens if example.label is not None else example.prompt
        whole[place] = _hash(example.trunk.tokens.tobytes() + str(example.label).encode())
        question[place] = _hash(asked.tobytes()) if len(asked) else 0
    return Prints(whole, question)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def copies(found: Prints) -> np.ndarray:
    """Return whether each row is a copy of an earlier one, (rows,) bool."""
    first = np.unique(found.whole, return_index=True)[1]
    is_copy = np.ones(len(found.whole), dtype=bool)
    is_copy[first] = False
    return is_copy


def leaks(found: Prints, others: Prints) -> np.ndarray:
    """Return whether each row is also among others, (rows,) bool."""
    return np.isin(found.whole, others.whole)


def contradictions(found: Prints) -> np.ndarray:
    """Return whether each row asks what another asks, and is answered differently, (rows,) bool."""
    pairs = np.unique(np.stack([found.question, found.whole]), axis=1)
    questions, answers = np.unique(pairs[0], return_counts=True)
    return np.isin(found.question, questions[(answers > 1) & (questions != 0)])


def near_copies(tables: Sequence[Table]) -> list[np.ndarray]:
    """Return, for each table, of which row each one is a near copy: (rows,) int64, -1 where it is none.

    Rows are numbered through all tables, and an earlier row is the original. What all rows begin with is left out. MinHash signatures of token triples are
    compared by locality-sensitive hashing; a pair it proposes counts when its signatures agree well enough.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=SIMILAR, num_perm=_PERMUTATIONS)
    blank = MinHash(num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=int)
    signatures: list[np.ndarray] = []
    found, number = [], 0
    shared = _shared_beginning(tables)
    for table in tables:
        originals = np.full(len(table), -1, dtype=np.int64)
        for place, example in enumerate(table):
            own = example.trunk.tokens[shared:]
            signature = blank.copy()
            signature.update_batch(_shingles(own))
            signatures.append(signature.hashvalues.astype(np.uint32))
            if len(own) >= _LEAST_TOKENS:
                like = [other for other in index.query(signature) if _agree(signatures[other], signatures[-1])]
                if like:
                    originals[place] = min(like)
                else:
                    index.insert(number, signature, check_duplication=False)
            number += 1
        found.append(originals)
    return found


def _shared_beginning(tables: Sequence[Table]) -> int:
    """Return the number of tokens that all rows begin with, a system prompt say: what does not tell them apart."""
    first: np.ndarray | None = None
    for example in (example for table in tables for example in table):
        tokens = example.trunk.tokens
        if first is None:
            first = tokens
        differs = np.flatnonzero(first[: len(tokens)] != tokens[: len(first)])
        first = first[: differs[0] if len(differs) else min(len(first), len(tokens))]
        if not len(first):
            break
    return 0 if first is None else len(first)


def _shingles(tokens: np.ndarray) -> list[int]:
    """Return a 32-bit hash of each triple of neighbouring tokens."""
    ids = tokens.astype(np.uint64)
    triples = [ids[start : len(ids) - _SHINGLE + 1 + start] for start in range(_SHINGLE)]
    mixed = sum((part * factor for part, factor in zip(triples, _FACTORS, strict=True)), np.zeros_like(triples[0]))
    hashes: list[int] = (mixed >> np.uint64(32)).tolist()
    return hashes


def _agree(one: np.ndarray, other: np.ndarray) -> bool:
    return float((one == other).mean()) >= SIMILAR
