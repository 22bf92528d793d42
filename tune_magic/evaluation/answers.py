"""Score a language model: the likelihood of the references, and its own answers against them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tune_magic import secrets
from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.errors import TuneError
from tune_magic.evaluation.by_evaluate import metric_called
from tune_magic.evaluation.choices import LIKELIEST, RIGHT, Answers, chosen
from tune_magic.evaluation.likelihood import log_likelihoods, right_tokens
from tune_magic.evaluation.measures import Measure, measure_of, perplexity, weighted_mean
from tune_magic.evaluation.metrics import Metric, OutputMetric
from tune_magic.evaluation.scorer import Said, Scorer, known
from tune_magic.models.generate import generate
from tune_magic.training.tuned import Tuned

DEFAULT_METRICS = ("loss", "perplexity", "exact_match", "rouge_l")
_BY_ENGINE = {
    "loss": Measure("loss", weighted_mean, higher_is_better=False),
    "perplexity": Measure("perplexity", perplexity, higher_is_better=False),
}
_TOKENS = "token_accuracy"
_OWN = (*_BY_ENGINE, _TOKENS, LIKELIEST)  # that no plug-in gives
_MOST_NEW_TOKENS = 512


class AnswerScorer(Scorer):
    """Losses and the likeliest of several answers by the engine, answers by greedy generation."""

    def prepare(self, rows: Table) -> None:
        """Choose the metrics; texts without an answer have none that read answers."""
        wanted = self.options.get("metrics") or DEFAULT_METRICS
        self.metrics = self._metrics([name for name in wanted if name not in _OWN], rows)
        self.measures = {name: measure_of(metric) for name, metric in self.metrics.items()}
        self.measures |= {name: measure for name, measure in _BY_ENGINE.items() if name in wanted}
        if _TOKENS in wanted:
            self.measures[_TOKENS] = Measure("token accuracy", weighted_mean)
        self.max_new_tokens = 0
        if self.metrics:
            own = self.options.get("max_new_tokens")
            self.max_new_tokens = own or longest_answer(rows, self.tuned.vocabulary.base)
        self.answers = Answers(rows) if LIKELIEST in wanted else None
        if self.answers:
            self.measures[LIKELIEST] = RIGHT
        self.asked = {"max_new_tokens": self.max_new_tokens, "answers": self.answers and self.answers.texts}
        self.asked |= {"tokens": True} if _TOKENS in wanted else {}
        self.passes = 1 + bool(self.metrics) + bool(self.answers) + (_TOKENS in wanted)

    def meet(self, rows: Table) -> None:
        """Learn how the answers to choose among are written in a side's tokens."""
        if self.answers:
            self.answers.meet(rows)

    def ask(self, side: Tuned, examples: Sequence[Example]) -> list[Said]:
        """Return the loss of each row, summed over its trained tokens, and the answers where a metric reads them."""
        found: list[Said] = [{"loss": loss} for loss in self._losses(side, examples).tolist()]
        if _TOKENS in self.measures:
            hits = right_tokens(side, examples, self.advance).tolist()
            found = [
                {**row, "hits": hit, "tokens": e.weight} for row, hit, e in zip(found, hits, examples, strict=True)
            ]
        if self.metrics:
            texts = generate(
                side.model,
                side.tokenizer,
                [example.prompt for example in examples],
                max_new_tokens=self.max_new_tokens,
                between=lambda: self.advance(0),
                done=self.advance,
            )
            found = [{**row, "text": text} for row, text in zip(found, texts, strict=True)]
        if self.answers:
            offered = [self.answers.offered(example) for example in examples]
            found = [{**row, **own} for row, own in zip(found, chosen(side, offered, self.advance), strict=True)]
        return found

    def values(self, said: Sequence[Said], examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Return the loss as a mean over the tuned model's tokens, whose tokens ever it was summed over."""
        weights = np.array([example.weight for example in examples])
        losses = known([row["loss"] for row in said]) / weights
        found = {name: np.stack([losses, weights], axis=-1) for name in self.measures if name in _BY_ENGINE}
        for name, metric in self.metrics.items():
            pairs = [
                (row["text"], secrets.hide(example.reference or ""))  # as answers are on disk
                for row, example in zip(said, examples, strict=True)
            ]
            if isinstance(metric, OutputMetric):
                found[name] = metric.values([answer for answer, _ in pairs], [reference for _, reference in pairs])
            else:
                found[name] = np.array([[metric.score(answer, reference)] for answer, reference in pairs], dtype=float)
        if _TOKENS in self.measures:  # of a model's own tokens, since others are not more or less right
            found[_TOKENS] = np.array([[row["hits"] / row["tokens"], row["tokens"]] for row in said])
        if self.answers:
            found[LIKELIEST] = self.answers.right(said, examples)
        return found

    def columns(self, said: Said) -> dict[str, Any]:
        """Return the answer where one was written, else the likeliest where some were offered."""
        if "text" in said:
            return {"": said["text"]}
        return {"": self.answers.likeliest(said)} if self.answers else {}

    def unreadable(self, said: Iterable[Said]) -> dict[str, int]:
        """Return how many answers have no number, or are no JSON, where that is what a metric reads."""
        readers = {
            name: metric for name, metric in self.metrics.items()
            if isinstance(metric, Metric) and type(metric).parses is not Metric.parses
        }  # fmt: skip
        counts = dict.fromkeys(readers, 0)
        for row in said if readers else ():
            for name, metric in readers.items():
                counts[name] += not metric.parses(row["text"])
        return counts

    def about(self, rows: Table) -> dict[str, Any]:
        """The longest answer, where there are answers."""
        return {"max_new_tokens": self.max_new_tokens or None}

    def _metrics(self, wanted: Sequence[str], rows: Table) -> dict[str, Metric | OutputMetric]:
        chosen = {name: metric_called(name) for name in wanted}
        wrong = [name for name, metric in chosen.items() if not reads_answers(metric)]
        if wrong:
            raise TuneError(f"`{wrong[0]}` compares classes; this run answers texts.")
        if chosen and any(example.reference is None for example in rows):
            if self.options.get("metrics"):
                raise TuneError("These rows are plain texts: there is no answer to compare with.")
            return {}
        return chosen

    def _losses(self, side: Tuned, examples: Sequence[Example]) -> np.ndarray:
        """Return each row's loss, summed over its trained tokens, (rows,)."""
        return -log_likelihoods(side, examples, self.advance)


def reads_answers(metric: Any) -> bool:
    """Return whether a metric can be asked about texts."""
    return isinstance(metric, Metric) or (isinstance(metric, OutputMetric) and metric.reads_texts)


def longest_answer(examples: Iterable[Example], tokenizer: Any) -> int:
    """Leave room for half as much again as the longest reference, in tokens."""
    lengths = (len(tokenizer(example.reference or "")["input_ids"]) for example in examples)
    return min(_MOST_NEW_TOKENS, max(lengths) * 3 // 2 + 8)
