"""Score a language model: the likelihood of the references, and its own answers against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tune_magic import plugins
from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.evaluation.compare import compare, perplexity, weighted_mean
from tune_magic.evaluation.comparison import Comparison
from tune_magic.evaluation.metrics import Metric
from tune_magic.evaluation.scorer import ExampleScorer
from tune_magic.models.generate import generate
from tune_magic.training.tuned import Tuned

DEFAULT_METRICS = ("loss", "perplexity", "exact_match", "rouge_l")
_BY_ENGINE = {"loss": weighted_mean, "perplexity": perplexity}
_MOST_NEW_TOKENS = 512


@dataclass
class Answers:
    """One model over all rows.

    Attributes:
        losses: Mean loss of each row, shape (rows,).
        texts: Generated answers, None when no metric needs them.
    """

    losses: np.ndarray
    texts: list[str] | None


class AnswerScorer(ExampleScorer):
    """Losses by the engine, answers by greedy generation."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.wanted = self.options.get("metrics") or DEFAULT_METRICS
        self.metrics = self._metrics()
        self.max_new_tokens = self.options.get("max_new_tokens") or longest_answer(
            self.examples, self.tuned.vocabulary.base
        )
        self.total = 2 * len(self.examples) * (2 if self.metrics else 1)

    def score(self, side: Tuned, examples: Sequence[Example]) -> Answers:
        """Return losses and, where a metric reads them, answers."""
        texts = None
        losses = self._losses(side, examples)
        if self.metrics:
            texts = generate(
                side.model,
                side.tokenizer,
                [example.prompt for example in examples],
                max_new_tokens=self.max_new_tokens,
                between=lambda: self.advance(0),
                done=self.advance,
            )
        return Answers(losses, texts)

    def row(self, number: int, base: Answers, tuned: Answers) -> dict[str, Any]:
        """Return loss, answer and each metric, for both."""
        reference = self.examples[number].reference or ""
        columns: dict[str, Any] = {}
        for side, scored in (("base", base), ("tuned", tuned)):
            columns[f"loss_{side}"] = float(scored.losses[number])
            if scored.texts is not None:
                columns[side] = scored.texts[number]
                for name, metric in self.metrics.items():
                    columns[f"{name}_{side}"] = metric.score(scored.texts[number], reference)
        return columns

    def compare(self, base: Answers, tuned: Answers) -> dict[str, Comparison]:
        """Compare every metric that was asked for."""
        found = {
            name: compare(
                metric.title,
                self._scores(metric, base),
                self._scores(metric, tuned),
                higher_is_better=metric.higher_is_better,
            )
            for name, metric in self.metrics.items()
        }
        weights = np.array([example.weight for example in self.examples])
        for name, statistic in _BY_ENGINE.items():
            if name in self.wanted:
                found[name] = compare(
                    name, base.losses, tuned.losses, shared=weights, statistic=statistic, higher_is_better=False
                )
        return found

    def about(self) -> dict[str, Any]:
        """The longest answer, where there are answers."""
        return {"max_new_tokens": self.max_new_tokens if self.metrics else None}

    def _scores(self, metric: Metric, scored: Answers) -> np.ndarray:
        pairs = zip(scored.texts or [], self.examples, strict=True)
        return np.array([metric.score(text, example.reference or "") for text, example in pairs])

    def _metrics(self) -> dict[str, Metric]:
        """Return the metrics that read answers; texts without an answer have none."""
        chosen = {name: plugins.get("metric", name)() for name in self.wanted if name not in _BY_ENGINE}
        wrong = [name for name, metric in chosen.items() if not isinstance(metric, Metric)]
        if wrong:
            raise TuneError(f"`{wrong[0]}` compares classes; this run answers texts.")
        if chosen and any(example.reference is None for example in self.examples):
            if self.options.get("metrics"):
                raise TuneError("These rows are plain texts: there is no answer to compare with.")
            return {}
        return chosen

    def _losses(self, side: Tuned, examples: Sequence[Example]) -> np.ndarray:
        """Return each row's loss as a mean over the tuned model's tokens: both sides are scored on the same texts."""
        engine = side.engine()
        engine.self_check(examples[:8], side.objective.score_sum)
        places = {id(example): place for place, example in enumerate(examples)}
        losses, weights = np.zeros(len(examples)), np.array([example.weight for example in self.examples])
        with torch.no_grad():
            for microbatch in engine.microbatches(examples):
                states = engine.states(microbatch)
                sums = torch.zeros(len(microbatch)).index_add(
                    0, states.owners.cpu(), -(states.log_probs() * states.weights).cpu()
                )
                own = [places[id(example)] for example in microbatch]  # they come in the engine's order
                losses[own] = sums.numpy() / weights[own]
                self.advance(len(microbatch))
        return losses


def longest_answer(examples: Any, tokenizer: Any) -> int:
    """Leave room for half as much again as the longest reference, in tokens."""
    lengths = [len(tokenizer(example.reference or "")["input_ids"]) for example in examples]
    return min(_MOST_NEW_TOKENS, max(lengths) * 3 // 2 + 8)
