"""The evaluate job: base and tuned over the same rows, scored, compared, written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import files
from tune_magic.data.example import Example
from tune_magic.data.locate import ensure, held_out_source, references, source_name
from tune_magic.data.table import Table
from tune_magic.errors import DataError
from tune_magic.evaluation.answers import AnswerScorer
from tune_magic.evaluation.classes import ClassScorer
from tune_magic.evaluation.outputs import OutputScorer
from tune_magic.evaluation.report import FORMAT
from tune_magic.evaluation.scorer import Scorer
from tune_magic.storage import fingerprint
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.tuned import Tuned, check_unchanged, load_tuned

_SCORERS: dict[str, type[Scorer]] = {"texts": AnswerScorer, "classes": ClassScorer, "outputs": OutputScorer}


def evaluate(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Score, compare, write, and return the fields of the last state event."""
    log.append("state", state="running")
    options = job.info["options"]
    tuned = load_tuned(RunFolder(job.path.parent.parent))
    rows, split = rows_to_score(tuned, job.path, options.get("data"))
    rows = rows.take(range(min(len(rows), options.get("limit") or len(rows))))
    by_base = None
    if tuned.vocabulary.is_extended:
        by_base, places = _by_base(tuned, job.path, options.get("data"), rows)
        rows = rows.take(places)
    examples = rows[:]
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        control.check()
        done += count
        if count:
            log.append("progress", done=done, total=scorer.total)

    scorer = _SCORERS[tuned.objective.gives](tuned, examples, options, advance)
    scored = scorer.score(tuned, examples)
    base = _score_base(tuned, scorer, examples if by_base is None else by_base[:])
    scores = scorer.rows(base, scored)
    about = {
        "split": split,
        "rows": len(scores),
        "step": tuned.run.best_checkpoint.name.removeprefix("step-"),
        "chose_checkpoint": split == "held-out",
        **({"new_head": True} if tuned.objective.new_head else {}),
        **scorer.about(),
    }
    metrics = {name: comparison.to_dict() for name, comparison in scorer.compare(base, scored).items()}
    content = {"format": FORMAT, "about": about, "metrics": metrics, **scorer.tables(base, scored)}
    files.write_json_lines(job.path / "rows.jsonl", scores)
    files.write_json(job.path / "report.json", content)
    return {"state": "finished"}


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


def _by_base(tuned: Tuned, folder: Path, named: str | None, rows: Table) -> tuple[Table, np.ndarray]:
    """Return rows by the base's own tokens, and their places among `rows`; those that one of the two cuts are left out.

    Raises:
        DataError: None is left.
    """
    bare = replace(tuned, vocabulary=tuned.vocabulary.unextended())
    reference = named or tuned.recipe.data.test or held_out_source(tuned.recipe)
    found, places = bare.rows(folder if named else None).read_again(reference, rows)
    if not len(places):
        raise DataError(
            "Every row is cut at `max_length`, so base and tuned model cannot be compared on the same texts.",
            hint="Train with a larger `max_length`, or name shorter rows: `%evaluate NAME --data FILE`.",
        )
    return found, places


def _score_base(tuned: Tuned, scorer: Scorer, examples: Sequence[Example]) -> Any:
    """Score the base over the rows, by its own tokens."""
    if tuned.method.adds:
        with tuned.without_tuning() as base:
            return scorer.score(base, examples)
    tuned.model.cpu()  # both at once may not fit
    return scorer.score(tuned.load_base(), examples)
