"""Baselines: the base asked better instead of trained, so that "should I fine-tune at all?" has a number.

``few``: the same few training rows stand before every question, as earlier turns of the chat (Brown et al. 2020).
``rag``: for each question those training rows whose questions share most words with it (retrieval by TF-IDF, on this
machine). ``zero`` is the base as it is, which every report has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic.data.content import Content, PromptCompletion, Turns
from tune_magic.data.locate import ensure
from tune_magic.data.render import as_turns, exchanges
from tune_magic.data.table import Table
from tune_magic.errors import TuneError
from tune_magic.evaluation.report import FEW, RAG
from tune_magic.storage import fingerprint
from tune_magic.training.dataset import Rows
from tune_magic.training.tuned import Tuned, check_unchanged

NAMES = {FEW: "few-shot", RAG: "retrieval"}  # what columns and cards call them
SHOTS = 4
_MOST_TOKENS = 2048  # of a row with its examples, unless its run allowed more: answers come in batches
_MOST_ROWS = 20_000  # training rows that are looked through
Shot = tuple[str, str]


def rows_of(
    tuned: Tuned, kind: str, shots: int, source: tuple[str, Path], rows: Table
) -> tuple[Table, np.ndarray, int]:
    """Return rows with examples before each question, by the base's tokens.

    Where a row would be too long for the model, all have half as many examples, and so on.

    Args:
        tuned: Whose base is asked, and whose training rows are the examples.
        kind: ``few`` or ``rag``.
        shots: Examples of each row.
        source: Names the rows, and the job folder that holds them where they were given as an object.
        rows: The rows, by the tuned model's tokens.

    Returns:
        The rows, the place of each among `rows`, and how many examples they have.

    Raises:
        TuneError: The run does not answer questions, or its training rows have changed.
    """
    if tuned.objective.gives != "texts":
        raise TuneError(f"{tuned.run.name or tuned.run.id} writes no texts, so its base cannot be shown examples.",
                        hint="The report says what always guessing the most frequent class would score.")  # fmt: skip
    known = _shots(tuned)
    if len(known) < shots:
        raise TuneError(f"`--baselines {kind}` needs {shots} training rows with a question and an answer, "
                        f"there are {len(known)}.")  # fmt: skip
    choose = _nearest(known, shots) if kind == RAG else _same(known, shots, tuned.recipe.seed)
    reader = _reader(tuned, source[1])
    whole = len(reader.read_again(source[0], rows)[1])  # the others are cut without examples, too
    while True:
        found, places = reader.read_again(source[0], rows, _before(choose, shots, reader.renderer.uses_template))
        if shots == 0 or len(places) == whole:
            return found, places, shots
        shots //= 2


def _reader(tuned: Tuned, folder: Path) -> Rows:
    """Return a reader of rows by the base's tokens, as long as the base can read them."""
    return replace(tuned, vocabulary=tuned.vocabulary.unextended()).rows(folder, room=_MOST_TOKENS)


def _shots(tuned: Tuned) -> list[Shot]:
    """Return question and answer of training rows, the last ones of each chat."""
    train = tuned.recipe.data.train
    check_unchanged(tuned.run, "train", fingerprint.of_file(ensure(train, tuned.run.path)))  # else the split is another
    numbers = tuned.rows().training_numbers()[:_MOST_ROWS]
    contents = _reader(tuned, tuned.run.path).contents(train, numbers)
    found = []
    for number in sorted(contents):
        if isinstance(contents[number], Turns | PromptCompletion):
            question, answer = (exchanges(contents[number]) or [(None, None)])[-1]
            if isinstance(question, str) and isinstance(answer, str):
                found.append((question, answer))
    return found


def _same(known: Sequence[Shot], shots: int, seed: int) -> Callable[[str, int], list[Shot]]:
    """Return what chooses the same rows for every question."""
    chosen = np.random.default_rng(seed).choice(len(known), shots, replace=False)
    return lambda question, count: [known[number] for number in chosen[:count].tolist()]


def _nearest(known: Sequence[Shot], shots: int) -> Callable[[str, int], list[Shot]]:
    """Return what chooses the rows whose questions are nearest to a question, the nearest one last."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")  # noqa: S106 - of words
    matrix = vectorizer.fit_transform([question for question, _ in known])

    def choose(question: str, count: int) -> list[Shot]:
        near = (matrix @ vectorizer.transform([question]).T).toarray()[:, 0]
        order = np.argsort(-near, kind="stable")[:count]
        return [known[number] for number in order[::-1].tolist()]

    return choose


def _before(choose: Callable[[str, int], list[Shot]], count: int, uses_template: bool) -> Callable[[Content], Content]:
    """Return what puts examples before the question of a row."""

    def change(content: Content) -> Content:
        if not isinstance(content, Turns | PromptCompletion):
            return content
        question = exchanges(content)[-1][0] or ""
        return with_shots(content, choose(question, count), uses_template)

    return change


def with_shots(content: Turns | PromptCompletion, shots: Sequence[Shot], uses_template: bool) -> Content:
    """Return a row with examples before its question: as turns behind the system message, or as text."""
    if isinstance(content, PromptCompletion) and not uses_template:
        said = "".join(f"{question}{_gap(question, answer)}{answer}\n\n" for question, answer in shots)
        return replace(content, prompt=f"{said}{content.prompt}")
    turns = as_turns(content)
    head = next((place for place, message in enumerate(turns.messages) if message["role"] != "system"), 0)
    added: list[Mapping[str, Any]] = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in zip(("user", "assistant"), shot, strict=True)
    ]
    messages = [*turns.messages[:head], *map(dict, added), *turns.messages[head:]]
    return replace(turns, messages=messages, trained_from=max(turns.trained_from, head) + len(added))


def _gap(question: str, answer: str) -> str:
    return "" if question[-1:].isspace() or answer[:1].isspace() else " "
