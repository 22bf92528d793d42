"""Embeddings: texts that belong together come near each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tune_magic.data.content import Content, Related
from tune_magic.data.example import Example, Segment
from tune_magic.data.render import Part, Renderer
from tune_magic.errors import DataError, TuneError
from tune_magic.models.load import load_head
from tune_magic.objectives.base import Objective
from tune_magic.objectives.padding import padded
from tune_magic.recipe.schema import ObjectiveOptions

if TYPE_CHECKING:
    import pandas as pd
    import torch

_MOST_TEXTS = 3  # anchor, positive, negative


class EmbedOptions(ObjectiveOptions):
    """Keys of `objective: embed`."""

    name: Literal["embed"] = Field("embed", description="Train vectors of texts: what belongs together comes near.")
    loss: Literal["contrastive", "triplet", "cosine"] | None = Field(
        None,
        description="`contrastive`: the right text among all of the step; `triplet`: nearer than the row's own negative by "
        "a margin; `cosine`: as near as the row's score says. Default: cosine for rows with scores, else contrastive.",
    )
    pooling: Literal["mean", "first", "last"] = Field(
        "mean",
        description="A text's vector: mean over its tokens, its first token (BERT's [CLS]), or its last (decoders).",
    )
    temperature: float = Field(0.05, gt=0, description="Of `contrastive`: cosines are divided by it.")
    margin: float = Field(0.3, gt=0, le=2, description="Of `triplet`, in cosine.")


@dataclass
class EmbedStates:
    """What is seen of B rows.

    Attributes:
        vectors: (B, 3, width) float32 of length 1: anchor, positive, negative; zeros where a row has none.
        has_negative: (B,) bool.
        scores: (B,) float32, how near anchor and positive are to be.
    """

    vectors: torch.Tensor
    has_negative: torch.Tensor
    scores: torch.Tensor


class Embed(Objective):
    """Contrastive loss over the texts of a whole step, triplet margin, or squared error of the cosine.

    Which rows a step has does not depend on what memory allows: see `training.together`.

    Args:
        options: Its keys in the recipe.
        scored: Whether rows have scores; learned from the training rows by `learn`.
        least: Lowest score of the training rows.
        most: Highest score; scores are brought to 0 to 1 by both.
    """

    Options = EmbedOptions
    learns = True
    formats = ("pairs", "scored_pairs")
    task = "FEATURE_EXTRACTION"
    engine = "outputs"
    gives = "outputs"
    compares_rows = True
    summary = (
        "The vectors of texts that belong together are drawn near each other, and apart from those of other texts."
    )
    formula = "contrastive: L = − (1 / n) Σ_i log [exp(cos(a_i, p_i) / t) / Σ_j exp(cos(a_i, p_j) / t)], j over all positives and negatives of the step;  triplet: L = (1 / n) Σ_i max(0, cos(a_i, n_i) − cos(a_i, p_i) + margin);  cosine: L = (1 / n) Σ_i (cos(a_i, p_i) − score_i)²"
    source = "van den Oord et al. 2018, arXiv:1807.03748; Reimers and Gurevych 2019, Sentence-BERT, arXiv:1908.10084; Gao et al. 2021, GradCache, arXiv:2101.06983."
    when = "For search, deduplication and retrieval in a field of your own: rows are pairs, triplets, or pairs with a score."

    def __init__(
        self, options: ObjectiveOptions | None = None, *, scored: bool = False, least: float = 0.0, most: float = 1.0
    ) -> None:
        super().__init__(options)
        self.scored = scored
        self.least = least
        self.most = most

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Whether cosines are in the order of scores; or whether the right text is found among all."""
        return ("spearman", "pearson") if self.scored else ("reciprocal_rank", "found_first")

    @property
    def loss(self) -> str:
        """The recipe's, or what the rows allow."""
        return str(self.options.loss or ("cosine" if self.scored else "contrastive"))

    @property
    def fewest_rows(self) -> int:
        """Two where a row's text is to be found among those of others."""
        return 2 if self.loss == "contrastive" else 1

    def learn(self, contents: Iterable[Content], source: str) -> None:
        """See whether rows have scores, and between which numbers, and negatives where the loss needs them.

        Raises:
            DataError: They are not what the loss needs.
        """
        scores: list[float] = []
        negatives = 0
        for content in contents:
            assert isinstance(content, Related)
            negatives += content.negative is not None
            if content.score is not None:
                scores.append(content.score)
        self.scored = bool(scores)
        if self.scored:
            self.least, self.most = min(0.0, *scores), max(1.0, *scores)
        if self.loss == "triplet" and not negatives:
            raise DataError(
                f"{source} has no negatives, which `triplet` needs.",
                hint="Add a column `negative`, or take `contrastive`.",
            )
        if self.loss == "cosine" and not scores:
            raise DataError(
                f"{source} has no scores, which `cosine` needs.", hint="Add a column `score`, or take `contrastive`."
            )

    def facts(self) -> dict[str, Any]:
        """Whether rows have scores, and between which numbers."""
        return {"scored": True, "least": self.least, "most": self.most} if self.scored else {}

    def examples(self, part: Part, renderer: Renderer) -> list[Example]:
        """Encode each text of a row by itself: the anchor is the trunk, positive and negative are branches."""
        rows = [_texts(content) for content in part.contents]
        encoded = iter(renderer.whole([text for texts in rows for text in texts], [0] * sum(map(len, rows))))
        found = []
        for texts, content, index in zip(rows, part.contents, part.numbers, strict=True):
            own = list(itertools.islice(encoded, len(texts)))
            found.append(
                replace(
                    own[0], branches=tuple(example.trunk for example in own[1:]), index=index,
                    reference=texts[1] if len(texts) > 1 else None, num_cut=sum(example.num_cut for example in own),
                    targets=np.array([self._score(content)], dtype=np.float32),
                )
            )  # fmt: skip
        return found

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the backbone; a pooler, which was trained for something else, is left out."""
        model = load_head(folder, dtype, "")
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        return model

    def batch(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, np.ndarray]:
        """All texts of the rows, one behind the other."""
        return padded([segment.tokens for example in examples for segment in _segments(example)], pad_token_id)

    def computed_tokens(self, examples: Sequence[Example]) -> int:
        """Each text is padded to the longest."""
        lengths = [len(segment) for example in examples for segment in _segments(example)]
        return len(lengths) * max(lengths)

    def states(self, outputs: Any, examples: Sequence[Example]) -> EmbedStates:
        """Pool the tokens of each text to a vector of length 1."""
        import torch
        from torch.nn import functional

        hidden = outputs.last_hidden_state.float()
        lengths = [[len(segment) for segment in _segments(example)] for example in examples]
        flat = torch.tensor(list(itertools.chain.from_iterable(lengths)), device=hidden.device)
        pooled = functional.normalize(self._pooled(hidden, flat), dim=-1)
        vectors = hidden.new_zeros(len(examples), _MOST_TEXTS, hidden.shape[-1])
        places = [row * _MOST_TEXTS + text for row, own in enumerate(lengths) for text in range(len(own))]
        chosen = torch.tensor(places, device=hidden.device)
        vectors = vectors.flatten(0, 1).index_copy(0, chosen, pooled).view_as(vectors)
        scores = np.concatenate([example.targets for example in examples])
        return EmbedStates(
            vectors=vectors,
            has_negative=torch.tensor([len(own) == _MOST_TEXTS for own in lengths], device=hidden.device),
            scores=torch.from_numpy(scores).to(hidden.device),
        )

    def joined(self, parts: Sequence[Any]) -> EmbedStates:
        """Put the rows of several microbatches behind each other."""
        import torch

        columns = ("vectors", "has_negative", "scores")
        return EmbedStates(*(torch.cat([getattr(part, name) for part in parts]) for name in columns))

    def loss_sum(self, states: EmbedStates) -> torch.Tensor:
        """Return the sum over rows."""
        import torch
        from torch.nn import functional

        loss: torch.Tensor
        anchors, positives, negatives = states.vectors.unbind(1)
        own = (anchors * positives).sum(-1)
        if self.loss == "cosine":
            loss = (own - states.scores).square().sum()
            return loss
        if self.loss == "triplet":
            other = (anchors * negatives).sum(-1)
            loss = ((other - own + self.options.margin).clamp_min(0) * states.has_negative).sum()
            return loss
        texts = torch.cat([positives, negatives[states.has_negative]])
        similar = anchors @ texts.T / self.options.temperature
        right = torch.arange(len(anchors), device=anchors.device)
        loss = functional.cross_entropy(similar, right, reduction="sum")
        return loss

    def tally(self, states: EmbedStates) -> dict[str, float]:
        """Sum the cosines of what belongs together."""
        anchors, positives, _ = states.vectors.unbind(1)
        return {"cosine": float((anchors * positives).sum())}

    def read(self, states: EmbedStates) -> list[np.ndarray]:
        """The vectors of each row's texts, (3, width)."""
        return list(states.vectors.cpu().numpy())

    def judged(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> tuple[list[Any], list[Any]]:
        """Cosines and scores; or the rank of each row's positive among those of all rows, and 1."""
        vectors = np.stack(outputs)
        anchors, positives = vectors[:, 0], vectors[:, 1]
        if self.scored:
            return list((anchors * positives).sum(-1)), [float(example.targets[0]) for example in examples]  # type: ignore[index]
        return list(_ranks(anchors, positives)), [1] * len(examples)

    def spoken(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> list[tuple[Example, str]]:
        """How near the two texts of each row are; of a text alone, the first numbers of its vector."""
        return [
            (example, f"cosine {float(output[0] @ output[1]):.3f}" if example.branches else _first_numbers(output[0]))
            for example, output in zip(examples, outputs, strict=True)
        ]

    def asked(self, inputs: Sequence[Any]) -> list[Content]:
        """Texts."""
        if not all(isinstance(given, str) and given.strip() for given in inputs):
            raise TuneError("A text, or a list of texts, is needed.")
        return [Related(text, "") for text in inputs]

    def frame(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> pd.DataFrame:
        """The vector of each text."""
        import pandas as pd

        return pd.DataFrame(np.stack([output[0] for output in outputs]))

    def _pooled(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        import torch

        if self.options.pooling == "first":
            return hidden[:, 0]
        if self.options.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        return (hidden * mask[..., None]).sum(1) / lengths[:, None]

    def _score(self, content: Content) -> float:
        score = content.score if isinstance(content, Related) else None
        return 1.0 if score is None else (score - self.least) / (self.most - self.least)


def _texts(content: Content) -> list[str]:
    assert isinstance(content, Related)
    return [text for text in (content.anchor, content.positive, content.negative) if text]


def _segments(example: Example) -> tuple[Segment, ...]:
    return (example.trunk, *example.branches)


def _ranks(anchors: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the rank of each anchor's own positive among all, from 1; equals count against it, but for equal texts."""
    ranks = np.empty(len(anchors), dtype=np.int64)
    for row, anchor in enumerate(anchors):
        similar = positives @ anchor
        ranks[row] = 1 + (similar > similar[row] + 1e-6).sum()
    return ranks


def _first_numbers(vector: np.ndarray) -> str:
    return f"[{', '.join(f'{number:.3f}' for number in vector[:6])}, …] of {len(vector)}"
