"""The report of an evaluation, read from its folder. No torch in here."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_magic import files
from tune_magic.evaluation.comparison import Comparison
from tune_magic.storage.events import number

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
TUNED, BASE = "tuned", "base"
BASELINES = ZERO, FEW, RAG = "zero", "few", "rag"
_SHOWN = 3
_SHOWN_WRONG = 6
PER_CLASS = ("precision", "recall", "f1", "rows")
_ORDER = ("exact_match", "rouge_l")  # what ranks rows, most telling first; the loss decides ties


class Scores:
    """Scores of base and tuned over the same rows.

    Attributes:
        comparisons: By metric name, base and tuned with their paired difference and its 95% interval.
        against: The same with another run or a baseline in the base's place, by its name.
        probe: Measures of a general set, where it was asked: ``likeliest`` of questions, ``loss`` and ``perplexity`` of prose.
        probe_against: The same with another run in the base's place, by its name.
        by_slice: Of each slice of the rows its column, value and number of rows, and its comparisons; see `slices`.
        rows: One mapping a row: row, question, reference, base, tuned, and each metric for both.
        about: What was scored: data, split, number of rows, checkpoint step.
        classes: Names of the classes, empty where texts are answered.
        curves: Of a classifier whose probabilities a metric reads: ROC, precision and recall, calibration; see `curves_of`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads((path / "report.json").read_text(encoding="utf-8"))
        self.about: dict[str, Any] = content["about"]
        self.classes: list[str] = content.get("classes", [])
        self.curves: dict[str, Any] = content.get("curves", {})
        self._per_class: list[dict[str, Any]] = content.get("per_class", [])
        self._confusion: list[list[int]] = content.get("confusion", [])
        self.comparisons = _comparisons(content["metrics"])
        self.against = {name: _comparisons(metrics) for name, metrics in content.get("against", {}).items()}
        halves = content.get("probe", [])
        self.probe_sizes = {half["of"]: int(half["rows"]) for half in halves}
        self.probe = _comparisons({name: own for half in halves for name, own in half["metrics"].items()})
        self.probe_against = {
            name: _comparisons({metric: own for half in halves for metric, own in half["against"][name].items()})
            for name in (halves[0]["against"] if halves else ())
        }
        self.by_slice = [(own, _comparisons(own.pop("metrics"))) for own in content.get("slices", [])]

    def __repr__(self) -> str:
        scores = ", ".join(f"{c.title} {c.base:.2f} → {c.tuned:.2f}" for c in self.comparisons.values())
        return f"<{type(self).__name__} over {self.about['rows']} rows: {scores}>"

    @property
    def metrics(self) -> dict[str, float]:
        """The tuned model's scores."""
        return {name: comparison.tuned for name, comparison in self.comparisons.items()}

    @property
    def base(self) -> dict[str, float]:
        """The base model's scores."""
        return {name: comparison.base for name, comparison in self.comparisons.items()}

    @property
    def difference(self) -> dict[str, float]:
        """Tuned minus base."""
        return {name: comparison.difference for name, comparison in self.comparisons.items()}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every row with both answers and scores."""
        rows: list[dict[str, Any]] = files.read_json_lines(self.path / "rows.jsonl")
        return rows

    def frame(self) -> pd.DataFrame:
        """Return `rows` as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    @property
    def probe_frame(self) -> pd.DataFrame:
        """Each general question with what base, tuned and other runs find likeliest; empty where none was asked."""
        import pandas as pd

        path = self.path / "probe.jsonl"
        return pd.DataFrame(files.read_json_lines(path) if path.is_file() else [])

    @property
    def per_class(self) -> pd.DataFrame:
        """Precision, recall, F1 and number of rows of each class, by the tuned model."""
        import pandas as pd

        return pd.DataFrame(self._per_class, columns=["class", *PER_CLASS]).set_index("class").astype({"rows": int})

    @property
    def slices(self) -> pd.DataFrame:
        """Each measure over the rows of each slice: column, value, rows, metric, base, tuned, difference, low, high, p."""
        import pandas as pd

        names = ("base", "tuned", "difference", "low", "high", "p")
        lines = [
            {**own, "metric": metric,
             **{name: getattr(comparison, name) for name in names}}
            for own, comparisons in self.by_slice
            for metric, comparison in comparisons.items()
        ]  # fmt: skip
        return pd.DataFrame(lines, columns=["column", "value", "rows", "metric", *names])

    @property
    def confusion(self) -> pd.DataFrame:
        """How often rows of a class (row) were given a class (column) by the tuned model."""
        import pandas as pd

        return pd.DataFrame(self._confusion, index=self.classes, columns=self.classes)

    def notable(self) -> dict[str, list[dict[str, Any]]]:
        """Return the rows that gained most, those scored lowest, and those that got worse, a few of each.

        The base of a classifier guesses, so only the wrong ones are told of it, the surest first.
        """
        if self.classes:
            wrong = [row for row in self.rows if row["tuned"] != row["reference"]]
            return {"wrong": sorted(wrong, key=lambda row: -row["probability_tuned"])[:_SHOWN_WRONG]}
        rows = self.rows
        others = [name for name in self.comparisons if name not in (*_ORDER, "loss")]
        known = [name for name in (*_ORDER, "loss", *others) if rows and f"{name}_tuned" in rows[0]]

        def score(row: dict[str, Any], side: str) -> tuple[float, ...]:
            signs = (1.0 if self.comparisons[name].higher_is_better else -1.0 for name in known)
            return tuple(sign * number(row[f"{name}_{side}"]) for sign, name in zip(signs, known, strict=True))

        def gain(row: dict[str, Any]) -> tuple[float, ...]:
            return tuple(t - b for t, b in zip(score(row, "tuned"), score(row, "base"), strict=True))

        by_gain = sorted(rows, key=gain, reverse=True)
        by_score = sorted(rows, key=lambda row: score(row, "tuned"))
        none = (0.0,) * len(known)
        return {
            "best": [row for row in by_gain[:_SHOWN] if gain(row) > none],
            "worst": [row for row in by_score[:_SHOWN] if known and row.get(f"{known[0]}_tuned") != 1.0],
            "regressed": [row for row in reversed(by_gain[-_SHOWN:]) if gain(row) < none],
        }


def newest_report(run: Path) -> Path | None:
    """Return the folder of a run's newest finished evaluation, if any."""
    return next(iter(each_report(run)), None)


def each_report(run: Path) -> list[Path]:
    """Return the folders of a run's finished evaluations, the newest first."""
    return sorted((path.parent for path in (run / "evals").glob("*/report.json")), reverse=True)


def _comparisons(metrics: dict[str, dict[str, Any]]) -> dict[str, Comparison]:
    """Return what `Comparison.to_dict` wrote, also what earlier versions did."""
    known = [field.name for field in fields(Comparison)]
    return {name: Comparison(**{key: _read(own[key]) for key in known if key in own}) for name, own in metrics.items()}


def _read(value: Any) -> Any:
    """Numbers that are none are words on disk."""
    return float(value) if value in ("nan", "inf", "-inf") else value
