"""Tagging: each word has a tag, as in named entities and parts of speech."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tune_magic.data.content import Content, Tagged
from tune_magic.data.example import Example, Segment
from tune_magic.data.render import Part, Renderer
from tune_magic.errors import DataError, TuneError
from tune_magic.models.load import load_head
from tune_magic.objectives.base import Objective
from tune_magic.objectives.padding import padded
from tune_magic.recipe.schema import ObjectiveOptions

if TYPE_CHECKING:
    import pandas as pd
    import torch

_OUTSIDE = "O"  # the tag of words that belong to nothing
_STARTS = ("B-", "I-", "S-", "E-", "L-", "U-")


@dataclass
class TagStates:
    """What is seen of a microbatch with W words in B rows.

    Attributes:
        logits: (W, tags) float32, row behind row.
        targets: (W,) numbers of the tags.
        counts: Words of each row.
        label_smoothing: Share of a word's loss that is the mean over the tags; 0 but in training.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    counts: list[int]
    label_smoothing: float = 0.0


class Tag(Objective):
    """Minus the log-likelihood of each word's tag, by a head on the first token of each word.

    Args:
        options: Its keys in the recipe.
        tags: Names of the tags in the order of the head's outputs; learned from the training rows by `learn`.
    """

    learns = True
    formats = ("tokens_tags",)
    task = "TOKEN_CLS"
    engine = "outputs"
    gives = "outputs"
    smooths = True
    new_head = True
    summary = "A head learns the tag of each word, read off the word's first token."
    formula = "L = − (1 / W) Σ_w log p(tag of w | text), w over words"
    source = "Devlin et al. 2019, BERT, arXiv:1810.04805, section 5.3."
    when = "To find names, places or parts of speech in texts whose words are tagged; an encoder sees both sides of a word."

    def __init__(self, options: ObjectiveOptions | None = None, *, tags: Sequence[str] = ()) -> None:
        super().__init__(options)
        self.tags = list(tags)

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Whole entities count where tags say where they begin; single words otherwise."""
        has_entities = any(tag.startswith(_STARTS) for tag in self.tags)
        return ("entity_f1", "tag_accuracy") if has_entities else ("tag_accuracy",)

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """Take the tags of the training rows, by the alphabet.

        Raises:
            DataError: All words have the same.
        """
        found = {tag for content in contents if isinstance(content, Tagged) for tag in content.tags}
        if len(found) < 2:
            raise DataError(f"All words of {source} have the tag {next(iter(found), '')!r}: there is nothing to learn.")
        is_numbered = all(name.isdecimal() for name in found)
        self.tags = sorted(found, key=int) if is_numbered else sorted(found)

    def facts(self) -> dict[str, Any]:
        """The names of the tags."""
        return {"tags": self.tags}

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode words; each word's first token has weight 1 and its tag. Words beyond `max_length` are cut off."""
        numbers = {name: number for number, name in enumerate(self.tags)}
        known: list[tuple[int, Tagged]] = []
        for content, place, index in zip(part.contents, part.places, part.numbers, strict=True):
            assert isinstance(content, Tagged)
            unknown = [tag for tag in content.tags if tag not in numbers]
            if unknown:
                part.faults.add(
                    place, "no training row has this tag", unknown[0], hint=f"Tags: {', '.join(self.tags)}."
                )
            else:
                known.append((index, content))
        words = [content.words for _, content in known]
        encoded = renderer.encodings(words, is_pretokenized=True, max_length=renderer.max_length)
        return [
            _example(encoding, content, [numbers[tag] for tag in content.tags], index)
            for encoding, (index, content) in zip(encoded, known, strict=True)
        ]

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model with a new head of one output a tag."""
        return load_head(folder, dtype, "TokenClassification", self.tags)

    def batch(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, np.ndarray]:
        """Padded rows."""
        return padded([example.trunk.tokens for example in examples], pad_token_id)

    def states(self, outputs: Any, examples: Sequence[Example]) -> TagStates:
        """Take the logits of the words."""
        import torch

        logits = outputs.logits.float()
        width = logits.shape[1]
        places = [row * width + np.flatnonzero(example.trunk.weights) for row, example in enumerate(examples)]
        targets = np.concatenate([_tags(example) for example in examples])
        chosen = torch.from_numpy(np.concatenate(places)).to(logits.device)
        return TagStates(
            logits=logits.flatten(0, 1).index_select(0, chosen),
            targets=torch.from_numpy(targets).to(logits.device),
            counts=[len(found) for found in places],
        )

    def loss_sum(self, states: TagStates) -> torch.Tensor:
        """Return the sum of -log p(tag)."""
        from torch.nn import functional

        return functional.cross_entropy(
            states.logits, states.targets, reduction="sum", label_smoothing=states.label_smoothing
        )

    def tally(self, states: TagStates) -> dict[str, float]:
        """Count the words whose likeliest tag is right."""
        return {"accuracy": float((states.logits.argmax(-1) == states.targets).sum())}

    def read(self, states: TagStates) -> list[np.ndarray]:
        """The logits of each row's words, (words, tags)."""
        return np.split(states.logits.cpu().numpy(), np.cumsum(states.counts)[:-1])

    def judged(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
        """The tags found and given."""
        given = [[self.tags[number] for number in _tags(example)] for example in examples]
        return [self._chosen(output) for output in outputs], given

    def spoken(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """The words that are tagged as something, each with its tag."""
        return [
            (example, _said(_words(example), self._chosen(output)))
            for example, output in zip(examples, outputs, strict=True)
        ]

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Lists of words, or texts that are split at spaces."""
        found: list[Content] = []
        for given in inputs:
            words = given.split() if isinstance(given, str) else list(given)
            if not words or not all(isinstance(word, str) for word in words):
                raise TuneError(f"A text or a list of words is needed, got {given!r}.")
            found.append(Tagged(words, [self.tags[0]] * len(words)))
        return found

    def frame(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> pd.DataFrame:
        """Words and tags of each text, as lists; words that are cut off or have no token have no tag, and are left out."""
        import pandas as pd

        tags = [self._chosen(output) for output in outputs]
        return pd.DataFrame({"words": [_words(example) for example in examples], "tags": tags})

    def _chosen(self, output: np.ndarray) -> list[str]:
        return [self.tags[number] for number in output.argmax(-1)]


def _example(encoding: Any, content: Tagged, tags: Sequence[int], index: int) -> Example:
    tokens = np.asarray(encoding.ids, dtype=np.int32)
    words = encoding.word_ids
    weights = np.zeros(len(tokens), dtype=np.float32)
    ends = np.cumsum([len(word) + 1 for word in content.words]) - 1  # in the words joined by spaces
    targets, chosen, seen = [], [], 0
    for place, word in enumerate(words):
        if word is not None and (place == 0 or words[place - 1] != word):
            weights[place] = 1.0
            targets.append(tags[word])
            chosen.append(word)
            seen = word + 1
    return Example(
        trunk=Segment(tokens, weights),
        question=" ".join(content.words),
        reference=_said(content.words, content.tags),
        num_cut=len(content.words) - seen,
        index=index,
        targets=np.array(
            [targets, [ends[w] - len(content.words[w]) for w in chosen], ends[chosen]], np.float32
        ).ravel(),
    )


def _tags(example: Example) -> np.ndarray:
    tags: np.ndarray = _columns(example)[0]
    return tags


def _words(example: Example) -> list[str]:
    """Return the words that have a tag."""
    _, starts, ends = _columns(example)
    return [(example.question or "")[start:end] for start, end in zip(starts, ends, strict=True)]


def _columns(example: Example) -> np.ndarray:
    """Return of each word that has a tag the tag's number, and where in the question the word begins and ends, (3, words)."""
    assert example.targets is not None
    columns: np.ndarray = example.targets.astype(np.int64).reshape(3, -1)
    return columns


def _said(words: Sequence[str], tags: Sequence[str]) -> str:
    said = [f"{word}/{tag}" for word, tag in zip(words, tags, strict=True) if tag != _OUTSIDE]
    return " ".join(said) or "nothing"
