"""The receipt of an export: the same rows through the trained model and through the files, compared.

File size, latency and "no exception" all look right for a model that quantisation has ruined; only its outputs tell.
"""

from __future__ import annotations

import abc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tune_magic.data.example import Example
from tune_magic.models.generate import end_tokens
from tune_magic.training.outputs import states_of
from tune_magic.training.tuned import Tuned

_MOST_POSITIONS = 16  # answered tokens of a row whose logits are kept: vocabularies are wide
_TIMED_TWICE = 3


@dataclass(frozen=True)
class Limits:
    """What an export may differ by and still be called the same model.

    Attributes:
        logit_share: Largest logit difference as a share of the largest logit.
        changed_share: Rows that may be answered otherwise, as a share of all rows.
        lost_share: Rows that may turn from right to wrong on balance, as a share of all rows.
        spare_rows: So many changed or lost rows are never held against it.
    """

    logit_share: float = 1e-3
    changed_share: float = 0.0
    lost_share: float = 0.0
    spare_rows: int = 0


class Reader(abc.ABC):
    """A model that can be asked: the trained one, or an exported one.

    Attributes:
        computed_by: What runs it, as the receipt says beside the latency.
        writes: Whether it answers in texts.
    """

    computed_by = "PyTorch"
    writes = False

    @abc.abstractmethod
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits after each token, (length, vocabulary), or of each class, (classes,)."""

    def found(self, example: Example) -> np.ndarray:
        """Return what a model that writes no texts gives for a row; by default its logits, (classes,)."""
        return self.logits(example.trunk.tokens)

    def predicted(self, example: Example) -> np.ndarray:
        """Return the logits that predict the first answered tokens of a row, (positions, vocabulary)."""
        return np.asarray(self.logits(example.trunk.tokens)[_predicting(example)])

    def generate(self, prompt: np.ndarray, max_new_tokens: int) -> list[int]:
        """Return the greedy answer's tokens, the one that ends it left out; only language models are asked."""
        raise TypeError(f"{type(self).__name__} classifies; it answers nothing")


class TorchReader(Reader):
    """A Transformers or PEFT model.

    Args:
        model: The model.
        tuned: Whose tokenizer and task it has.
        computed_by: What runs it.
    """

    def __init__(self, model: Any, tuned: Tuned, computed_by: str = "PyTorch") -> None:
        self.computed_by, self.writes = computed_by, not tuned.objective.scores_rows
        self.model = model.eval()
        self._objective, self._method = tuned.objective, tuned.method
        self._scores_rows = tuned.objective.scores_rows
        # what a method puts before a row is in the cache once the prompt was read
        self._inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.end_tokens = [] if tuned.objective.scores_rows else end_tokens(model, tuned.tokenizer)
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Run the model over one row."""
        ids = self._ids(tokens)
        found = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        if not self._scores_rows:
            found = found[-len(tokens) :]
        return np.asarray(found.float().cpu().numpy())

    @torch.no_grad()
    def found(self, example: Example) -> np.ndarray:
        """Run the model as the objective says; what is not finite is no finding."""
        if self._objective.engine != "outputs":
            return super().found(example)
        (output,) = self._objective.read(self._states(example))
        return np.asarray(np.nan_to_num(output, neginf=0.0, posinf=0.0))

    @torch.no_grad()
    def predicted(self, example: Example) -> np.ndarray:
        """Run the model over one row; an encoder and decoder as the objective says."""
        if self._objective.engine != "outputs":
            return super().predicted(example)
        return np.asarray(self._states(example).states[:_MOST_POSITIONS].float().cpu().numpy())

    def _states(self, example: Example) -> Any:
        return states_of(self.model, self._method, self._objective, [example])

    @torch.no_grad()
    def generate(self, prompt: np.ndarray, max_new_tokens: int) -> list[int]:
        """Answer greedily, token by token, with the keys and values kept."""
        answer: list[int] = []
        if self._inner.config.is_encoder_decoder:
            return self._decoded(prompt, max_new_tokens)
        out = self.model(input_ids=self._ids(prompt), use_cache=True)
        while len(answer) < max_new_tokens:
            token = int(out.logits[0, -1].argmax())
            if token in self.end_tokens:
                break
            answer.append(token)
            ids = self._ids(np.array([token]))
            out = self._inner(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
        return answer

    def _decoded(self, source: np.ndarray, max_new_tokens: int) -> list[int]:
        """Answer as a decoder that looks at an encoder's states."""
        ids, answer, token = self._ids(source), list[int](), int(self._inner.config.decoder_start_token_id)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        while len(answer) < max_new_tokens:
            out = self.model(**given, decoder_input_ids=self._ids(np.array([token])), use_cache=True)
            token = int(out.logits[0, -1].argmax())
            if token in self.end_tokens:
                break
            answer.append(token)
            encoded = (out.encoder_last_hidden_state,)
            given = {
                "encoder_outputs": encoded, "attention_mask": torch.ones_like(ids), "past_key_values": out.past_key_values
            }  # fmt: skip
        return answer

    def _ids(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(tokens.astype(np.int64))[None].to(self.device)


@dataclass
class Measured:
    """What a reader did with the rows.

    Attributes:
        logits: Of each row, (positions, vocabulary) where the answer is predicted, or what is found, (1, ...).
        answers: Greedy tokens of each row, or the class alone; nothing where what is found is no class.
        row_seconds: Median seconds a row; for language models, a token.
    """

    logits: list[np.ndarray] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    row_seconds: float = 0.0


def measure(
    reader: Reader, examples: Sequence[Example], max_new_tokens: int | None, done: Callable[[int], None]
) -> Measured:
    """Run a reader over rows, one at a time.

    Args:
        reader: The model.
        examples: Held-out rows.
        max_new_tokens: Longest answer; None for classifiers.
        done: Called with 1 after each row; may raise to break off.
    """
    found = Measured()
    seconds: list[float] = []
    for number, example in enumerate(examples):
        if max_new_tokens is None:
            for _ in range(2 if number < _TIMED_TWICE else 1):  # the first rows pay for set-up
                started = time.perf_counter()
                logits = reader.found(example)[None]
                seconds.append(time.perf_counter() - started)
            answer = [int(logits.argmax())] if example.label is not None else []
        else:
            logits = reader.predicted(example)
            started = time.perf_counter()
            answer = reader.generate(prompt_of(example), max_new_tokens)
            seconds.append((time.perf_counter() - started) / (len(answer) + 1))
        found.logits.append(logits)
        found.answers.append(answer)
        done(1)
    found.row_seconds = statistics.median(seconds)
    return found


def compare(
    trained: Measured,
    exported: Measured,
    examples: Sequence[Example],
    right: Callable[[Example, list[int]], bool] | None,
    wanted: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Return the receipt's figures.

    Args:
        trained: The model as it was trained.
        exported: The files.
        examples: The rows both were run over.
        right: Whether an answer is right; None for rows without references.
        wanted: What each row's logits should have chosen, see `targets`; None where that is no one token or class.
    """
    pairs = list(zip(trained.logits, exported.logits, strict=True))
    answers = list(zip(examples, trained.answers, exported.answers, strict=True))
    return {
        "rows": len(examples),
        "logit_difference": float(np.max([np.abs(a - b).max() for a, b in pairs])),  # also where one is no number
        "largest_logit": float(np.max([np.abs(a).max() for a, _ in pairs])),
        "same_answers": sum(a == b for _, a, b in answers),
        "trained_right": None if right is None else sum(right(e, a) for e, a, _ in answers),
        "exported_right": None if right is None else sum(right(e, b) for e, _, b in answers),
        "trained_loss": None if wanted is None else _loss(trained.logits, wanted),
        "exported_loss": None if wanted is None else _loss(exported.logits, wanted),
        "trained_seconds": trained.row_seconds,
        "exported_seconds": exported.row_seconds,
    }


def targets(example: Example) -> np.ndarray:
    """Return what a row's logits should choose, (positions,): its class, or the first answered tokens."""
    if example.label is not None:
        return np.array([example.label])
    return np.asarray(example.trunk.tokens[_predicting(example) + 1])


def _loss(logits: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float | None:
    """Return the mean negative log-likelihood of what was wanted, in nats; None where nothing was."""
    found = []
    for rows, places in zip(logits, wanted, strict=True):
        shifted = rows.astype(np.float64) - rows.max(-1, keepdims=True)
        chosen = shifted[np.arange(len(places)), places]
        found.append(np.log(np.exp(shifted).sum(-1)) - chosen)
    every = np.concatenate(found) if found else np.zeros(0)
    return float(every.mean()) if len(every) else None


def complaints(figures: dict[str, Any], limits: Limits) -> list[str]:
    """Return what is out of tolerance, in words; nothing when the export is the same model."""
    found = []
    rows = figures["rows"]
    share = figures["logit_difference"] / max(figures["largest_logit"], 1e-12)
    if not share <= limits.logit_share:
        found.append(
            f"the largest logit difference is {figures['logit_difference']:.2g}, {share:.1%} of the largest logit "
            f"(limit {limits.logit_share:.1%})"
        )
    changed = rows - figures["same_answers"]
    if changed > max(limits.spare_rows, limits.changed_share * rows):
        found.append(f"{changed} of {rows} rows are answered otherwise")
    if figures["trained_right"] is not None:
        lost = figures["trained_right"] - figures["exported_right"]
        if lost > max(limits.spare_rows, limits.lost_share * rows):
            found.append(f"{figures['exported_right']} rows are right, not {figures['trained_right']}")
    return found


def _predicting(example: Example) -> np.ndarray:
    """Return the positions that predict the first answered tokens."""
    return np.flatnonzero(example.trunk.weights)[:_MOST_POSITIONS] - 1


def prompt_of(example: Example) -> np.ndarray:
    """Return what is answered: the prompt, or the first half of a plain text."""
    return example.prompt if example.answer_start else example.trunk.tokens[: max(1, len(example.trunk) // 2)]
