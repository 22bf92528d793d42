"""The evaluate job: the tuned model and others over the same rows, scored, compared, written down."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import files
from tune_magic.data.locate import ensure, held_out_source, references, source_name
from tune_magic.data.table import Table
from tune_magic.errors import DataError, TuneError
from tune_magic.evaluation import baselines, kept, slices
from tune_magic.evaluation.answers import AnswerScorer
from tune_magic.evaluation.classes import ClassScorer
from tune_magic.evaluation.compare import compare
from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.measures import weighted_mean
from tune_magic.evaluation.outputs import OutputScorer
from tune_magic.evaluation.report import BASE, FORMAT, TUNED, ZERO
from tune_magic.evaluation.scorer import Scorer
from tune_magic.storage import fingerprint
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.tuned import Tuned, check_unchanged, load_tuned, without_weights

_SCORERS: dict[str, type[Scorer]] = {"texts": AnswerScorer, "classes": ClassScorer, "outputs": OutputScorer}
_COLUMNS = ("row", "question", "reference", "probability")  # no run may be called so in a table of rows
Values = dict[str, np.ndarray]


@dataclass
class Side:
    """One of the models that are compared.

    Attributes:
        name: As cards and columns call it.
        rows: The rows by its tokens, in the same order as those of all others.
        loaded: Opens the model.
        facts: What the model is, so that what it said can be found again; None: it is asked each time.
    """

    name: str
    rows: Table
    loaded: Callable[[], contextlib.AbstractContextManager[Tuned]]
    facts: list[Any] | None = None


def evaluate(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Score, compare, write, and return the fields of the last state event."""
    log.append("state", state="running")
    options = job.info["options"]
    tuned = load_tuned(RunFolder(job.path.parent.parent))
    rows, split = rows_to_score(tuned, job.path, options.get("data"))
    rows = rows.take(range(min(len(rows), options.get("limit") or len(rows))))
    sides, shots = _sides(job, tuned, rows)
    rows = sides[0].rows
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        control.check()
        done += count
        if count:
            log.append("progress", done=done, total=len(sides) * scorer.passes * len(rows))

    scorer = _SCORERS[tuned.objective.gives](tuned, rows, options, advance)
    with kept.folder(job.path) as folder:
        said = [_ask(scorer, side, folder, job.path) for side in sides]
        values = [_values(scorer, path, rows) for path in said]
        tuned_values, base_values, *others = values
        parts = _parts(scorer, rows)
        about = {
            "split": split,
            "rows": len(next(iter(tuned_values.values()))),
            "step": tuned.run.best_checkpoint.name.removeprefix("step-"),
            "chose_checkpoint": split == "held-out",
            **({"new_head": True} if tuned.objective.new_head else {}),
            **({"shots": shots} if shots else {}),
            "unreadable": {
                side.name: scorer.unreadable(files.each_json_line(path)) for side, path in zip(sides, said, strict=True)
            },
            **scorer.about(rows),
        }
        content = {
            "format": FORMAT,
            "about": about,
            "metrics": _compared(scorer, base_values, tuned_values, parts),
            "against": {
                side.name: _compared(scorer, own, tuned_values, {}) for side, own in zip(sides[2:], others, strict=True)
            },
            "slices": slices.compare_slices(
                scorer.measures, base_values, tuned_values, _columns(job, tuned, rows, said[0])
            ),
            **scorer.tables(files.each_json_line(said[0]), rows),
        }
        names = [side.name for side in sides]
        files.write_json_lines(job.path / "rows.jsonl", _lines(scorer, rows, names, said, values))
    files.write_json(job.path / "report.json", content)
    return {"state": "finished"}


def _sides(job: RunFolder, tuned: Tuned, rows: Table) -> tuple[list[Side], dict[str, int]]:
    """Return the tuned model, its base, other runs and baselines, with the rows that all of them read whole.

    Rows that one of them would have to cut are left out. Beside them, how many examples a row of each baseline has.

    Raises:
        TuneError: Another run gives something else, so that the two cannot be compared.
    """
    reference, folder = _source(job, tuned)

    @contextlib.contextmanager
    def itself() -> Iterator[Tuned]:
        yield tuned

    @contextlib.contextmanager
    def base() -> Iterator[Tuned]:
        if tuned.holds_base:
            with tuned.without_tuning() as bare:
                yield bare
        else:
            tuned.model.cpu()  # both at once may not fit
            yield tuned.load_base()

    def other(run: RunFolder) -> Callable[[], contextlib.AbstractContextManager[Tuned]]:
        @contextlib.contextmanager
        def loaded() -> Iterator[Tuned]:
            tuned.model.cpu()
            yield load_tuned(run)

        return loaded

    everything = np.arange(len(rows))
    found = [(Side(TUNED, rows, itself, kept.facts_of_tuned(tuned)), everything)]
    bare, places = rows, everything
    if tuned.vocabulary.is_extended:
        unextended = replace(tuned, vocabulary=tuned.vocabulary.unextended())
        bare, places = unextended.rows(folder).read_again(reference, rows)
    found.append((Side(BASE, bare, base, kept.facts_of_base(tuned)), places))
    shots = {}
    for kind in dict.fromkeys(job.info["options"].get("baselines") or ()):
        if kind != ZERO:
            wanted = job.info["options"].get("shots") or baselines.SHOTS
            own, places, shots[kind] = baselines.rows_of(tuned, kind, wanted, (reference, folder), rows)
            found.append((Side(baselines.NAMES[kind], own, base, kept.facts_of_base(tuned)), places))
    for path in job.info["options"].get("against") or ():
        run = RunFolder(Path(path))
        theirs = without_weights(run)
        _check_comparable(tuned, theirs)
        own, places = theirs.rows(folder).read_again(reference, rows)
        unseen = ~np.isin(
            rows.indices[places], _trained_on(tuned, theirs, named=job.info["options"].get("data") is not None)
        )
        own, places = own.take(np.flatnonzero(unseen)), places[unseen]
        is_free = run.name not in {*_COLUMNS, *(side.name for side, _ in found)}
        found.append(
            (Side(run.name if run.name and is_free else run.id, own, other(run), kept.facts_of_tuned(theirs)), places)
        )
    common = everything
    for _, places in found:
        common = np.intersect1d(common, places)
    if not len(common):
        raise DataError(
            "No row is left that every model reads whole and none was trained on.",
            hint="Train with a larger `max_length`, or name other rows: `%evaluate NAME --data FILE`.",
        )
    for side, places in found:
        at = {place: number for number, place in enumerate(places.tolist())}
        side.rows = side.rows.take([at[place] for place in common.tolist()])
    return [side for side, _ in found], {baselines.NAMES[kind]: count for kind, count in shots.items()}


def _source(job: RunFolder, tuned: Tuned) -> tuple[str, Path]:
    """Return where the rows come from, and the job folder that holds them where they were given as an object."""
    named = job.info["options"].get("data")
    if named:
        return named, job.path
    return tuned.recipe.data.test or held_out_source(tuned.recipe), tuned.run.path


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


def _ask(scorer: Scorer, side: Side, folder: Path, job: Path) -> Path:
    """Return the file with what a model says of every row: a line each, now or from before."""
    can_be_found = side.facts is not None and scorer.asked is not None
    path = kept.path_of(folder, [side.facts, scorer.asked] if can_be_found else None, side.rows, job)
    if kept.is_there(path):
        scorer.advance(scorer.passes * len(side.rows))
        return kept.held(path, job)
    with side.loaded() as model:
        lines = (
            {**said, "place": said.get("place", number) + start}
            for start, examples in _chunks(side.rows, scorer.at_once)
            for number, said in enumerate(scorer.ask(model, examples))
        )
        files.write_json_lines(path, lines)
    return kept.held(path, job)


def _chunks(rows: Table, size: int | None) -> Iterator[tuple[int, list[Any]]]:
    size = size or len(rows)
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def _values(scorer: Scorer, path: Path, rows: Table) -> Values:
    """Return the numbers of all rows for each measure."""
    lines, found = files.each_json_line(path), []
    for _, examples in _chunks(rows, scorer.at_once):
        said = list(itertools.islice(lines, len(examples)))
        found.append(scorer.values(said, examples))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _parts(scorer: Scorer, rows: Table) -> dict[str, np.ndarray]:
    """Return which rows are of which part, where the objective has parts that are scored apart."""
    groups = scorer.parts(rows[:]) if scorer.at_once is None else None
    if groups is None or len(set(groups)) < 2:
        return {}
    return {part: np.array(groups) == part for part in sorted(set(groups))}


def _compared(scorer: Scorer, base: Values, tuned: Values, parts: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return each measure of both, over all rows and over each part of them."""
    found: dict[str, Comparison] = {}
    for name, own in tuned.items():
        measure = scorer.measures[name]
        found[name] = compare(measure, base[name], own)
        for part, within in parts.items():
            if not np.isnan(own[within]).any(-1).all():
                found[f"{name} · {part}"] = compare(slices.titled(measure, part), base[name][within], own[within])
    return {name: comparison.to_dict() for name, comparison in found.items()}


def _columns(job: RunFolder, tuned: Tuned, rows: Table, said: Path) -> dict[str, list[Any]]:
    """Return the values of the columns by which rows are sliced, one for each row that was scored."""
    names = job.info["options"].get("by")
    if not names:
        return {}
    reference, folder = _source(job, tuned)
    scored = rows.take([row["place"] for row in files.each_json_line(said)])
    return tuned.rows(folder).columns(reference, names, scored)


def _lines(
    scorer: Scorer, rows: Table, names: list[str], said: list[Path], values: list[Values]
) -> Iterator[dict[str, Any]]:
    """Yield every row with what each model said of it, and the measures that are one number a row; the base comes first."""
    order = [1, 0, *range(2, len(names))]
    shown = [
        name for name, own in values[0].items()
        if (own.shape[1] == 1 or scorer.measures[name].statistic is weighted_mean) and not np.isnan(own).any()
    ]  # fmt: skip
    for number, answers in enumerate(zip(*map(files.each_json_line, said), strict=True)):
        example = rows[answers[0]["place"]]
        line: dict[str, Any] = {"row": example.index, "question": example.question, "reference": example.reference}
        for which in order:
            side = names[which]
            for name, value in scorer.columns(answers[which]).items():
                line[f"{name}_{side}" if name else side] = value
            for name in shown:
                line[f"{name}_{side}"] = float(values[which][name][number, 0])
        yield line


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
                raise DataError(f"The run's rows are gone: there is no file {path}.")
            check_unchanged(run, role, fingerprint.of_file(path))
        examples, split = tuned.rows().held_out(), "held-out"
    if not examples:
        raise DataError("There are no held-out rows to evaluate on.", hint="Name some: `%evaluate NAME --data FILE`.")
    return examples, split
