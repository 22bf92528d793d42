"""The models of an evaluation: the tuned one, its base, other runs, baselines, with the rows that all of them read whole."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic.data.locate import ensure, held_out_source, references, source_name
from tune_magic.data.table import Table
from tune_magic.errors import DataError, TuneError
from tune_magic.evaluation import baselines, kept
from tune_magic.evaluation.report import BASE, TUNED, ZERO
from tune_magic.storage import fingerprint
from tune_magic.storage.folder import RunFolder
from tune_magic.training.prepare import device
from tune_magic.training.tuned import Tuned, check_unchanged, with_weights, without_weights

_COLUMNS = ("row", "question", "prompt", "reference", "probability")  # no run may be called so in a table of rows


@dataclass
class Side:
    """One of the models that are compared.

    Attributes:
        name: As cards and columns call it.
        rows: The rows by its tokens, in the same order as those of all others.
        places: Of each of them, its place among the rows to score.
        loaded: Opens the model.
        facts: What the model is, so that what it said can be found again; None: it is asked each time.
        reads: Recipe and tokens of the model; its weights need not be there. None: it is another side, asked otherwise.
    """

    name: str
    rows: Table
    places: np.ndarray
    loaded: Callable[[], contextlib.AbstractContextManager[Tuned]]
    facts: list[Any] | None
    reads: Tuned | None


def sides_of(job: RunFolder, tuned: Tuned, rows: Table) -> tuple[list[Side], dict[str, int]]:
    """Return the tuned model, its base, baselines and other runs, with the rows that all of them read whole.

    Rows that one of them would have to cut are left out. Beside them, how many examples a row of each baseline has.

    Raises:
        TuneError: Another run gives something else, so that the two cannot be compared.
    """
    options, source = job.info["options"], source_of(job, tuned)
    found = [_itself(tuned, rows), _base(tuned, rows, source)]
    shots = {}
    for kind in dict.fromkeys(options.get("baselines") or ()):
        if kind != ZERO:
            own, places, count = baselines.rows_of(tuned, kind, options.get("shots") or baselines.SHOTS, source, rows)
            base = found[1]
            found.append(Side(baselines.NAMES[kind], own, places, base.loaded, base.facts, None))
            shots[baselines.NAMES[kind]] = count
    for path in options.get("against") or ():
        taken = {*_COLUMNS, *(side.name for side in found)}
        found.append(_other(RunFolder(Path(path)), tuned, rows, source, taken, named=options.get("data") is not None))
    _keep_common(found)
    return found, shots


def source_of(job: RunFolder, tuned: Tuned) -> tuple[str, Path]:
    """Return where the rows come from, and the job folder that holds them where they were given as an object."""
    named = job.info["options"].get("data")
    if named:
        return named, job.path
    return tuned.recipe.data.test or held_out_source(tuned.recipe), tuned.run.path


def _itself(tuned: Tuned, rows: Table) -> Side:
    @contextlib.contextmanager
    def loaded() -> Iterator[Tuned]:
        tuned.model.to(device())  # another may have had its place
        yield tuned

    return Side(TUNED, rows, np.arange(len(rows)), loaded, kept.facts_of_tuned(tuned), tuned)


def _base(tuned: Tuned, rows: Table, source: tuple[str, Path]) -> Side:
    @contextlib.contextmanager
    def loaded() -> Iterator[Tuned]:
        if tuned.holds_base:
            tuned.model.to(device())
            with tuned.without_tuning() as bare:
                yield bare
        else:
            tuned.model.cpu()  # both at once may not fit
            yield tuned.load_base()

    reads, places = replace(tuned, vocabulary=tuned.vocabulary.unextended()), np.arange(len(rows))
    if tuned.vocabulary.is_extended:
        rows, places = reads.rows(source[1]).read_again(source[0], rows)
    return Side(BASE, rows, places, loaded, kept.facts_of_base(tuned), reads)


def _other(
    run: RunFolder, tuned: Tuned, rows: Table, source: tuple[str, Path], taken: set[str], *, named: bool
) -> Side:
    """Return another run, with those rows that it was not trained on."""

    @contextlib.contextmanager
    def loaded() -> Iterator[Tuned]:
        tuned.model.cpu()
        yield with_weights(replace(theirs))

    theirs = without_weights(run)
    _check_comparable(tuned, theirs)
    own, places = theirs.rows(source[1]).read_again(source[0], rows)
    unseen = ~np.isin(rows.indices[places], _trained_on(tuned, theirs, named=named))
    name = run.name if run.name and run.name not in taken else run.id
    facts = kept.facts_of_tuned(theirs)
    return Side(name, own.take(np.flatnonzero(unseen)), places[unseen], loaded, facts, theirs)


def _keep_common(sides: list[Side]) -> None:
    """Leave each side those rows that all of them have.

    Raises:
        DataError: There is none.
    """
    common = functools.reduce(np.intersect1d, [side.places for side in sides])
    if not len(common):
        raise DataError(
            "No row is left that every model reads whole and none was trained on.",
            hint="Train with a larger `max_length`, or name other rows: `%evaluate NAME --data FILE`.",
        )
    for side in sides:
        at = {place: number for number, place in enumerate(side.places.tolist())}
        side.rows, side.places = side.rows.take([at[place] for place in common.tolist()]), common


def _trained_on(ours: Tuned, theirs: Tuned, *, named: bool) -> list[int]:
    """Return the numbers of rows of our file that another run was trained on, where both held out a share of the same file."""
    data = [tuned.recipe.data for tuned in (ours, theirs)]
    prints = [tuned.run.summary().plan["fingerprints"].get("train") for tuned in (ours, theirs)]
    if named or data[0].test or isinstance(data[0].held_out, str) or prints[0] != prints[1]:
        return []
    return theirs.rows().training_numbers()


def _check_comparable(ours: Tuned, theirs: Tuned) -> None:
    names = [tuned.run.name or tuned.run.id for tuned in (ours, theirs)]
    kinds = [type(tuned.objective) for tuned in (ours, theirs)]
    if ours.objective.gives != theirs.objective.gives or (ours.objective.gives == "outputs" and kinds[0] != kinds[1]):
        raise TuneError(f"{names[0]} and {names[1]} cannot be compared: one finds {ours.objective.gives}, the other "
                        f"{theirs.objective.gives}.")  # fmt: skip
    classes = [tuned.objective.facts().get("classes") for tuned in (ours, theirs)]
    if classes[0] != classes[1]:
        raise TuneError(f"{names[0]} and {names[1]} cannot be compared: they tell other classes apart.")


def rows_to_score(tuned: Tuned, folder: Path, named: str | None = None) -> tuple[Table, str]:
    """Return rows that were not trained on, and what they are: named by the user, test, or held-out.

    Args:
        tuned: The model they are for.
        folder: The job folder, with tables given as objects.
        named: The user's own rows.

    Raises:
        DataError: There are none. TuneError: The run's data has changed, so that the split would be another.
    """
    data, run = tuned.recipe.data, tuned.run
    if named:
        examples, split = tuned.rows(folder).examples(named), source_name(named)
    elif data.test:
        examples, split = tuned.rows().examples(data.test), "test"
    else:
        for role, reference in references(tuned.recipe).items():
            if role == "corpus":
                continue  # its words are with the run
            path = ensure(reference, run.path)
            if not path.is_file():
                raise DataError(f"The run's rows are gone: there is no file {source_name(reference)}.")
            check_unchanged(run, role, fingerprint.of_file(path))
        examples, split = tuned.rows().held_out(), "held-out"
    if not examples:
        raise DataError("There are no held-out rows to evaluate on.", hint="Name some: `%evaluate NAME --data FILE`.")
    return examples, split
