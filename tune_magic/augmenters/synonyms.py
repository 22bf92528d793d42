"""Words replaced by their synonyms, from a lexicon that is installed or given."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from tune_magic.augmenters.base import Augmenter
from tune_magic.errors import DataError
from tune_magic.recipe.schema import AugmentOptions

_FOLDERS = (
    "/usr/share/mythes",
    "/usr/share/myspell/dicts",
    "/opt/homebrew/share/mythes",
)  # where systems keep thesauri
_WORD = re.compile(r"[^\W\d_]{3,}")


class SynonymsOptions(AugmentOptions):
    """Keys of `synonyms`."""

    strength: float = Field(0.2, gt=0, le=1, description="Share of the words with a synonym that are replaced.")
    lexicon: str = Field(
        "en_US",
        description="A language for which a MyThes thesaurus is installed, as LibreOffice's are, `wordnet` for that of NLTK, "
        "or a file: MyThes (.dat), or lines of a word, a tab, and its synonyms between commas.",
    )


class Synonyms(Augmenter):
    """Replaces some words of a text by synonyms of their most frequent sense."""

    Options = SynonymsOptions

    def change(self, texts: Sequence[str], draw: np.random.Generator, tell: Callable[[int], None]) -> list[str | None]:
        """Return each text with words replaced, None where the lexicon knows none of them."""
        lexicon = _lexicon(self.options.lexicon)
        found = []
        for number, text in enumerate(texts, start=1):
            found.append(self._replaced(text, lexicon, draw))
            tell(number)
        return found

    def _replaced(self, text: str, lexicon: Lexicon, draw: np.random.Generator) -> str | None:
        words = [(word, synonyms) for word in _WORD.finditer(text) if (synonyms := lexicon.synonyms(word[0].lower()))]
        if not words:
            return None
        chosen = draw.random(len(words)) < self.options.strength
        if not chosen.any():
            chosen[draw.integers(len(words))] = True
        parts, end = [], 0
        for word, synonyms in (pair for pair, replaced in zip(words, chosen, strict=True) if replaced):
            synonym = synonyms[int(draw.integers(len(synonyms)))]
            parts += [text[end : word.start()], _cased(synonym, word[0])]
            end = word.end()
        return "".join([*parts, text[end:]])


class Lexicon(abc.ABC):
    """Synonyms of words."""

    @abc.abstractmethod
    def synonyms(self, word: str) -> list[str]:
        """Return single words that mean what a word in lower case means most often."""


class _Lines(Lexicon):
    """A file of lines, each a word, a tab, and its synonyms between commas."""

    def __init__(self, path: Path) -> None:
        self._known: dict[str, list[str]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            word, tab, synonyms = line.partition("\t")
            if line.strip() and not tab:
                raise DataError(f"{path.name}, line {number}: no tab between a word and its synonyms: `{line[:80]}`.")
            self._known[word.strip().lower()] = [name.strip() for name in synonyms.split(",") if name.strip()]

    def synonyms(self, word: str) -> list[str]:
        return [name for name in self._known.get(word, []) if name.lower() != word]


class _MyThes(Lexicon):
    """A MyThes thesaurus: entries in one file, found by the index beside it."""

    def __init__(self, path: Path) -> None:
        index = path.with_suffix(".idx").read_bytes().splitlines()
        self._encoding = index[0].decode("ascii").strip()
        pairs = (line.decode(self._encoding).rpartition("|") for line in index[2:])
        self._places = {word: int(place) for word, _, place in pairs if place.isdecimal()}
        self._content = path.read_bytes()

    def synonyms(self, word: str) -> list[str]:
        place = self._places.get(word)
        if place is None:
            return []
        end = self._content.index(b"\n", self._content.index(b"\n", place) + 1)
        sense = self._content[place:end].decode(self._encoding).splitlines()[1]
        # a note in brackets marks what is no synonym: a wider term, an opposite
        names = [name.strip() for name in sense.split("|")[1:] if "(" not in name]
        return [name for name in names if name.isalpha() and name.lower() != word]


class _WordNet(Lexicon):
    """WordNet as NLTK keeps it."""

    def __init__(self) -> None:
        from nltk.corpus import wordnet

        wordnet.ensure_loaded()
        self._wordnet = wordnet

    def synonyms(self, word: str) -> list[str]:
        senses = self._wordnet.synsets(word)
        names = senses[0].lemma_names() if senses and word in senses[0].lemma_names() else []
        return [name for name in names if name.isalpha() and name.lower() != word]


def _lexicon(name: str) -> Lexicon:
    """Return the lexicon of a name.

    Raises:
        DataError: There is none; it says how to get one.
    """
    if name == "wordnet":
        try:
            return _WordNet()
        except LookupError:
            raise DataError("NLTK's WordNet is not installed.", hint="`python -m nltk.downloader wordnet`.") from None
    path = Path(name).expanduser()
    if not path.is_file():
        found = (Path(folder) / f"th_{name}_v2.dat" for folder in _FOLDERS)
        path = next((place for place in found if place.is_file()), path)
    try:
        return _MyThes(path) if path.suffix == ".dat" else _Lines(path)
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f"There is no thesaurus `{name}`.",
            hint="Install one, on Debian `apt install mythes-en-us`; or `lexicon: wordnet`, or `lexicon: FILE` of lines, "
            "each a word, a tab, and its synonyms between commas.",
        ) from None


def _cased(word: str, like: str) -> str:
    """Return a word in the case of another."""
    return word.upper() if like.isupper() else word[0].upper() + word[1:] if like[0].isupper() else word
