"""The evaluate job: base and tuned over the same rows, scored, compared, written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tune_magic import files, plugins
from tune_magic.data.example import Example
from tune_magic.data.locate import data_path, references
from tune_magic.data.render import Renderer
from tune_magic.errors import DataError, TuneError
from tune_magic.evaluation.compare import Comparison, compare, perplexity, weighted_mean
from tune_magic.evaluation.metrics import Metric
from tune_magic.evaluation.report import FORMAT
from tune_magic.methods.base import Method
from tune_magic.models.generate import generate
from tune_magic.models.load import load_causal_lm
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import Recipe
from tune_magic.storage import fingerprint
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.engine import Engine
from tune_magic.training.prepare import load_examples, prepare_data
from tune_magic.training.tuned import base_folder, check_unchanged, load_tuned, recipe_of

DEFAULT_METRICS = ("loss", "perplexity", "exact_match", "rouge_l")
_BY_ENGINE = {"loss": weighted_mean, "perplexity": perplexity}
_MOST_NEW_TOKENS = 512


@dataclass
class Scored:
    """One model over all rows.

    Attributes:
        losses: Mean loss of each row, shape (rows,).
        answers: Generated texts, None when no metric needs them.
    """

    losses: np.ndarray
    answers: list[str] | None


class Evaluation:
    """One evaluation at work."""

    def __init__(self, job: RunFolder, log: EventLog, control: Control) -> None:
        self.run = RunFolder(job.path.parent.parent)
        self.job, self.log, self.control = job, log, control
        self.options: dict[str, Any] = job.info["options"]
        self.recipe: Recipe = recipe_of(self.run)
        self.objective: Objective = plugins.get("objective", self.recipe.objective)()
        self.done = 0
        self.total = 0

    def evaluate(self) -> dict[str, Any]:
        """Score, compare, write, and return the fields of the last state event."""
        self.log.append("state", state="running")
        model, tokenizer, method = load_tuned(self.run)
        data = self.recipe.data
        renderer = Renderer(tokenizer, chat_template=data.chat_template, max_length=self.recipe.max_length)
        examples, split = self._examples(renderer)
        metrics = self._metrics(examples)
        new_tokens = self.options.get("max_new_tokens") or _longest_answer(examples, tokenizer)
        self.total = 2 * len(examples) * (2 if metrics else 1)

        def score(a_model: Any, a_method: Method) -> Scored:
            answers = None
            losses = self._losses(a_model, a_method, examples)
            if metrics:
                answers = self._answers(a_model, tokenizer, examples, new_tokens)
            return Scored(losses, answers)

        tuned = score(model, method)
        base = self._score_base(model, method, score)
        rows = self._rows(examples, base, tuned, metrics)
        weights = np.array([example.weight for example in examples])
        comparisons = self._compare(rows, metrics, weights)
        about = {
            "split": split,
            "rows": len(examples),
            "step": self.run.best_checkpoint.name.removeprefix("step-"),
            "max_new_tokens": new_tokens if metrics else None,
            "chose_checkpoint": split == "held-out",
        }
        self._write(about, comparisons, rows)
        return {"state": "finished"}

    def _examples(self, renderer: Renderer) -> tuple[list[Example], str]:
        """Return the rows to score and what they are: given, test, or held-out."""
        data, named = self.recipe.data, self.options.get("data")
        if named:
            examples, split = (
                load_examples(named, self.recipe, self.job.path, renderer, self.objective),
                Path(named).name,
            )
        elif data.test:
            examples, split = load_examples(data.test, self.recipe, self.run.path, renderer, self.objective), "test"
        else:
            for role, reference in references(self.recipe).items():
                check_unchanged(self.run, role, fingerprint.of_file(data_path(reference, self.run.path)))
            examples, split = prepare_data(self.recipe, self.run.path, renderer, self.objective).held_out, "held-out"
        if not examples:
            raise DataError(
                "There are no held-out rows to evaluate on.", hint="Name some: `%evaluate NAME --data FILE`."
            )
        return examples[: self.options.get("limit")], split

    def _metrics(self, examples: list[Example]) -> dict[str, Metric]:
        """Return the metrics that read answers; texts without an answer have none."""
        wanted = self.options.get("metrics") or DEFAULT_METRICS
        chosen = {name: plugins.get("metric", name)() for name in wanted if name not in _BY_ENGINE}
        if chosen and any(example.reference is None for example in examples):
            if self.options.get("metrics"):
                raise TuneError("These rows are plain texts: there is no answer to compare with.")
            return {}
        return chosen

    def _score_base(self, model: Any, method: Method, score: Callable[[Any, Method], Scored]) -> Scored:
        if method.adds:
            with method.without(model):
                return score(model, method)
        place = next(model.parameters()).device
        model.cpu()  # both at once may not fit
        base = load_causal_lm(base_folder(self.recipe), torch.float32)
        base.to(place).eval()
        return score(base, method)

    def _losses(self, model: Any, method: Method, examples: list[Example]) -> np.ndarray:
        engine = Engine(
            model, method, dtype=torch.float32, share_prefixes=True, max_tokens=self.recipe.microbatch_tokens
        )  # fmt: skip
        engine.self_check(examples[:8], self.objective.loss_sum)
        losses: list[float] = []
        with torch.no_grad():
            for microbatch in engine.microbatches(examples):
                self.control.check()
                states = engine.states(microbatch)
                sums = torch.zeros(len(microbatch)).index_add(
                    0, states.owners.cpu(), -(states.log_probs() * states.weights).cpu()
                )
                weights = torch.tensor([example.weight for example in microbatch])
                losses += (sums / weights).tolist()
                self._advance(len(microbatch))
        return np.array(losses)

    def _answers(self, model: Any, tokenizer: Any, examples: list[Example], new_tokens: int) -> list[str]:
        prompts = [example.prompt for example in examples]
        return generate(
            model, tokenizer, prompts, max_new_tokens=new_tokens, between=self.control.check, done=self._advance
        )

    def _rows(
        self, examples: list[Example], base: Scored, tuned: Scored, metrics: dict[str, Metric]
    ) -> list[dict[str, Any]]:
        rows = []
        for i, example in enumerate(examples):
            row: dict[str, Any] = {"row": example.index, "question": example.question, "reference": example.reference}
            for side, scored in (("base", base), ("tuned", tuned)):
                row[f"loss_{side}"] = float(scored.losses[i])
                if scored.answers is not None:
                    row[side] = scored.answers[i]
                    for name, metric in metrics.items():
                        row[f"{name}_{side}"] = metric.score(scored.answers[i], example.reference or "")
            rows.append(row)
        return rows

    def _compare(
        self, rows: list[dict[str, Any]], metrics: dict[str, Metric], weights: np.ndarray
    ) -> dict[str, Comparison]:
        def columns(name: str) -> tuple[np.ndarray, np.ndarray]:
            base, tuned = ([row[f"{name}_{side}"] for row in rows] for side in ("base", "tuned"))
            return np.array(base), np.array(tuned)

        wanted = self.options.get("metrics") or DEFAULT_METRICS
        found = {
            name: compare(metric.title, *columns(name), higher_is_better=metric.higher_is_better)
            for name, metric in metrics.items()
        }
        for name, statistic in _BY_ENGINE.items():
            if name in wanted:
                losses = columns("loss")
                found[name] = compare(name, *losses, weights=weights, statistic=statistic, higher_is_better=False)
        return found

    def _advance(self, count: int) -> None:
        self.done += count
        self.log.append("progress", done=self.done, total=self.total)

    def _write(self, about: dict[str, Any], comparisons: dict[str, Comparison], rows: list[dict[str, Any]]) -> None:
        files.write_text(self.job.path / "rows.jsonl", "".join(files.to_json(row) + "\n" for row in rows))
        metrics = {name: comparison.to_dict() for name, comparison in comparisons.items()}
        files.write_json(self.job.path / "report.json", {"format": FORMAT, "about": about, "metrics": metrics})


def evaluate(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Do the evaluate job of a folder."""
    return Evaluation(job, log, control).evaluate()


def _longest_answer(examples: list[Example], tokenizer: Any) -> int:
    """Leave room for half as much again as the longest reference."""
    lengths = [len(tokenizer(example.reference or "")["input_ids"]) for example in examples]
    return min(_MOST_NEW_TOKENS, max(lengths) * 3 // 2 + 8)
