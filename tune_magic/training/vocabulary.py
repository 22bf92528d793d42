"""The tokenizer of a run: the model's own, or that and new words, for which the model is given embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune_magic.data.locate import TRAINING_ROWS, read, source_name
from tune_magic.data.read import RowFaults
from tune_magic.data.vocabulary import NewTokens, choose, extended
from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.models import embeddings
from tune_magic.models.load import load_tokenizer
from tune_magic.models.processor import Processor, reads_texts
from tune_magic.recipe.schema import Recipe

_LOOK_EVERY = 4096  # rows of a corpus


@dataclass(frozen=True)
class Vocabulary:
    """What a run's tokens are.

    Attributes:
        base: The model's own tokenizer.
        tokenizer: What the run's texts are encoded by.
        new: What the second has beside the first.
        stretch: How many of these tokens one of the run's may be: more than 1 for the base of a run with new tokens.
    """

    base: Any
    tokenizer: Any
    new: NewTokens = field(default_factory=NewTokens)
    stretch: int = 1

    @property
    def is_extended(self) -> bool:
        """Whether there are new tokens."""
        return bool(self.new.tokens)

    @property
    def ids(self) -> range:
        """Numbers of the new tokens."""
        return range(len(self.base), len(self.tokenizer))

    def facts(self) -> dict[str, Any]:
        """Return what a plan says of the new tokens, JSON-ready; nothing where there are none."""
        return {"vocabulary": self.new.facts} if self.is_extended else {}

    def unextended(self) -> Vocabulary:
        """Return the tokens the model had before."""
        return Vocabulary(self.base, self.base, stretch=max(map(len, self._pieces), default=1))

    @property
    def _pieces(self) -> list[list[int]]:
        """What the base has for each new token."""
        contents = [token.content for token in self.new.tokens]
        found: list[list[int]] = self.base(contents, add_special_tokens=False)["input_ids"] if contents else []
        return found

    def extend(self, model: Any) -> None:
        """Give a model, as it was loaded, embeddings of the new tokens."""
        if self.is_extended:
            embeddings.extend(model, len(self.base), self._pieces)

    def num_embeddings(self, model: Any) -> int:
        """Return the rows of a model's embeddings once `extend` has extended it."""
        return max(len(model.get_input_embeddings().weight), len(self.tokenizer))

    def hidden(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a model that `extend` extended has only the tokens of the base tokenizer."""
        return embeddings.hidden(model, len(self.base)) if self.is_extended else contextlib.nullcontext()


def vocabulary_of(
    recipe: Recipe, folder: Path, model_folder: Path, method: Method, look: Callable[[], None] = lambda: None
) -> Vocabulary:
    """Return the tokens of a run: those its folder says, else chosen by its recipe and written there.

    Every text in the rows of a corpus counts, whatever its column; rows that cannot be read are passed over.

    Args:
        recipe: Says what is added.
        folder: The run or job folder.
        model_folder: Of the base model.
        method: Which must be able to train what is added.
        look: Called now and then; may raise to break off.

    Raises:
        DataError: The corpus cannot be read, or has no word to add. TuneError: The method cannot train new tokens.
    """
    if not reads_texts(model_folder):
        processor = Processor(model_folder)
        return Vocabulary(processor, processor)
    base, options = load_tokenizer(model_folder), recipe.vocabulary
    if not options.extends:
        return Vocabulary(base, base)
    if not method.trains_new_tokens:
        raise TuneError(
            f"`{recipe.method.name}` trains no embeddings, so new tokens would never learn what they mean.",
            hint="Take `method: lora` or `full` with `vocabulary:`.",
        )
    new = NewTokens.load(folder)
    if new is None:
        named = options.corpus or TRAINING_ROWS
        reference = recipe.data.train if named == TRAINING_ROWS else named
        size = options.size if options.corpus else 0
        texts = _texts(reference, folder, look)
        new = choose(base, texts, options.tokens, size=size, min_count=options.min_count)
        new.facts["corpus"] = source_name(reference)
        new.save(folder)
    return Vocabulary(base, extended(base, new.tokens), new)


def _texts(reference: str, folder: Path, look: Callable[[], None]) -> Iterator[str]:
    for number, row in enumerate(read(reference, folder, RowFaults(source_name(reference), skips=True))):
        if number % _LOOK_EVERY == 0:
            look()
        yield from _strings(row.values)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
