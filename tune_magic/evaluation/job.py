"""The evaluate job: the tuned model and others over the same rows, scored, compared, written down."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import files
from tune_magic.data.content import Message
from tune_magic.data.table import Table
from tune_magic.evaluation import kept, probe, slices
from tune_magic.evaluation.answers import AnswerScorer
from tune_magic.evaluation.classes import ClassScorer
from tune_magic.evaluation.compare import compare
from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.measures import weighted_mean
from tune_magic.evaluation.outputs import OutputScorer
from tune_magic.evaluation.prompts import MOST_ROWS, prompts_of
from tune_magic.evaluation.report import FORMAT
from tune_magic.evaluation.scorer import Scorer
from tune_magic.evaluation.sides import Side, rows_to_score, sides_of, source_of
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.tuned import Tuned, load_tuned

_SCORERS: dict[str, type[Scorer]] = {"texts": AnswerScorer, "classes": ClassScorer, "outputs": OutputScorer}
Values = dict[str, np.ndarray]


def evaluate(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Score, compare, write, and return the fields of the last state event."""
    log.append("state", state="running")
    options = job.info["options"]
    tuned = load_tuned(RunFolder(job.path.parent.parent))
    rows, split = rows_to_score(tuned, job.path, options.get("data"))
    rows = rows.take(range(min(len(rows), options.get("limit") or len(rows))))
    sides, shots = sides_of(job, tuned, rows)
    rows = sides[0].rows
    progress = _Progress(log, control)
    scorer = _SCORERS[tuned.objective.gives](tuned, rows, options, progress.advance)
    progress.expect(scorer, sides)
    halves = _probed(job, tuned, sides, progress) if options.get("probe") else []
    with kept.folder(job.path) as folder:
        said = [_ask(scorer, side, folder, job.path) for side in sides]
        values = [_values(scorer, path, rows) for path in said]
        parts = _parts(scorer, rows)
        about = {
            "split": split,
            "rows": len(next(iter(values[0].values()))),
            "step": str(tuned.step),
            "chose_checkpoint": split == "held-out",
            **({"new_head": True} if tuned.objective.new_head else {}),
            **({"shots": shots} if shots else {}),
            **({"prompts_left_out": True} if len(rows) > MOST_ROWS else {}),
            "unreadable": {
                side.name: scorer.unreadable(files.each_json_line(path)) for side, path in zip(sides, said, strict=True)
            },
            **scorer.about(rows),
        }
        content = {
            "format": FORMAT,
            "about": about,
            "metrics": _compared(scorer, values[1], values[0], parts),
            "against": _against(scorer, sides, values),
            "slices": slices.compare_slices(scorer.measures, values[1], values[0], _columns(job, tuned, rows, said[0])),
            **scorer.tables(files.each_json_line(said[0]), rows),
            **({"probe": [_forgotten(half, folder, job.path) for half in halves]} if halves else {}),
        }
        names = [side.name for side in sides]
        reference, folder_of_rows = source_of(job, tuned)
        prompts = prompts_of(tuned.rows(folder_of_rows), reference, rows) if tuned.objective.gives == "texts" else {}
        lines = _lines(scorer, rows, names, said, values, prompts=prompts)
        files.write_json_lines(job.path / "rows.jsonl", lines)
    files.write_json(job.path / "report.json", content)
    return {"state": "finished"}


class _Progress:
    """Says how far the job is, and looks whether it is to end.

    Args:
        log: Takes the `progress` events.
        control: Knows whether somebody asked for an end.
    """

    def __init__(self, log: EventLog, control: Control) -> None:
        self._log, self._control = log, control
        self._done = self._total = 0

    def expect(self, scorer: Scorer, sides: Sequence[Side]) -> None:
        """Count what is to be done."""
        self._total += sum(scorer.passes * len(side.rows) for side in sides)

    def advance(self, count: int) -> None:
        """Count what is done; may raise to break off."""
        self._control.check()
        self._done += count
        if count:
            self._log.append("progress", done=self._done, total=self._total)


@dataclass
class _Probe:
    """A half of the general set, and who is asked about it."""

    half: probe.Half
    scorer: Scorer
    sides: list[Side]


def _probed(job: RunFolder, tuned: Tuned, sides: Sequence[Side], progress: _Progress) -> list[_Probe]:
    """Return what the probe will ask."""
    probe.check(tuned)
    found = []
    for half in probe.HALVES:
        asked = probe.sides_of(half, sides, job.path)
        if len(asked[0].rows):
            scorer = half.scorer(tuned, asked[0].rows, {"metrics": half.metrics}, progress.advance)
            scorer.measures = {name: slices.titled(own, half.name) for name, own in scorer.measures.items()}
            progress.expect(scorer, asked)
            found.append(_Probe(half, scorer, asked))
    return found


def _forgotten(asked: _Probe, folder: Path, job: Path) -> dict[str, Any]:
    """Return how a half of the general set was scored; what was answered goes beside the report."""
    said = [_ask(asked.scorer, side, folder, job) for side in asked.sides]
    values = [_values(asked.scorer, path, asked.sides[0].rows) for path in said]
    if asked.half is probe.QUESTIONS:
        lines = [list(files.each_json_line(path)) for path in said]
        files.write_json_lines(job / "probe.jsonl", probe.told(asked.sides, lines))
    return {
        "of": asked.half.name,
        "rows": len(asked.sides[0].rows),
        "metrics": _compared(asked.scorer, values[1], values[0], {}),
        "against": _against(asked.scorer, asked.sides, values),
    }


def _against(scorer: Scorer, sides: Sequence[Side], values: Sequence[Values]) -> dict[str, dict[str, Any]]:
    """Return what the tuned model has more than each model but its base."""
    return {side.name: _compared(scorer, own, values[0], {}) for side, own in zip(sides[2:], values[2:], strict=True)}


def _ask(scorer: Scorer, side: Side, folder: Path, job: Path) -> Path:
    """Return the file with what a model says of every row: a line each, now or from before."""
    can_be_found = side.facts is not None and scorer.asked is not None
    path = kept.path_of(folder, [side.facts, scorer.asked] if can_be_found else None, side.rows, job)
    if kept.is_there(path):
        scorer.advance(scorer.passes * len(side.rows))
        return kept.held(path, job)
    scorer.meet(side.rows)
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
    reference, folder = source_of(job, tuned)
    scored = rows.take([row["place"] for row in files.each_json_line(said)])
    return tuned.rows(folder).columns(reference, names, scored)


def _lines(
    scorer: Scorer, rows: Table, names: list[str], said: list[Path], values: list[Values], *,
    prompts: Mapping[int, list[Message]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield every row with what each model said of it, and the measures that are one number a row; the base comes first.

    A row whose question does not stand alone has all messages before the answer as ``prompt``.
    """
    order = [1, 0, *range(2, len(names))]
    shown = [
        name for name, own in values[0].items()
        if (own.shape[1] == 1 or scorer.measures[name].statistic is weighted_mean)
        and scorer.measures[name].resamples is None  # else there is no number of a row
        and not np.isnan(own).any()
    ]  # fmt: skip
    for number, answers in enumerate(zip(*map(files.each_json_line, said), strict=True)):
        place = answers[0]["place"]
        example = rows[place]
        line: dict[str, Any] = {"row": example.index, "question": example.question, "reference": example.reference}
        if place in prompts:
            line["prompt"] = prompts[place]
        for which in order:
            side = names[which]
            for name, value in scorer.columns(answers[which]).items():
                line[f"{name}_{side}" if name else side] = value
            for name in shown:
                line[f"{name}_{side}"] = float(values[which][name][number, 0])
        yield line
