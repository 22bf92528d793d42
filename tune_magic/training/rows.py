"""The engine for whole rows: one output a row, by an encoder, or by a decoder with a head on its last token.

Rows lie behind each other without padding. Of each, the head is given one token's state: the first of an encoder's, the
last of a decoder's. Where a layer is attention and then a part that works token by token, that part of the last layer is
computed for these tokens alone. Families whose heads do that are on a list, and the self-check compares with padded rows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tune_magic.data.example import Example
from tune_magic.methods.base import Method
from tune_magic.models.layers import layers_of, output_of, skipped
from tune_magic.training import packing, row_attention, tree_attention
from tune_magic.training.engine import PACKABLE, Engine
from tune_magic.training.packing import Batch

# Encoders with full attention whose head reads the first token; with how positions are counted.
_FIRST_POSITIONS: dict[str, Callable[[Any], int]] = {
    "bert": lambda config: 0,
    "distilbert": lambda config: 0,
    "electra": lambda config: 0,
    "roberta": lambda config: int(config.pad_token_id) + 1,
    "xlm-roberta": lambda config: int(config.pad_token_id) + 1,
    "camembert": lambda config: int(config.pad_token_id) + 1,
}
# Of these, the module of a layer after which everything works token by token.
_ATTENTION = dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta", "camembert"), "attention")


@dataclass
class RowStates:
    """What an objective sees of a microbatch of B rows.

    Attributes:
        logits: (B, classes) float32.
        targets: (B,) class numbers, or (B, k) what each row was given, float32.
        label_smoothing: Share of a row's loss that is the mean over the classes; 0 but in training.
        features: (B, width) what the last layer makes of the token the head reads, where an objective `reads_features`.
        model: The Transformers model, with the heads that an objective gave it.
        beside: What other models make of the same rows, by role; without gradients.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    label_smoothing: float = 0.0
    features: torch.Tensor | None = None
    model: Any = None
    beside: dict[str, RowStates] = field(default_factory=dict)

    def compared(self, role: str, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return (B,) float32: `function(logits, targets, logits of the model beside)`."""
        return function(self.logits, self.targets, self.beside[role].logits)

    def ordered_as(self, other: RowStates) -> RowStates:
        """Return the same rows in another engine's order: every engine keeps that of the microbatch."""
        return self


class RowEngine(Engine):
    """Logits of whole rows.

    Args:
        model: What `Method.apply` returned, on its device.
        method: The method.
        dtype: Compute precision.
        max_tokens: Most tokens of a microbatch.
        share_prefixes: Compute a prefix that the rows of a microbatch share once; decoders only, since an encoder's
            first tokens see the last.
        reads_features: The objective reads what the head is given.
    """

    def __init__(
        self, model: Any, method: Method, *, dtype: torch.dtype, max_tokens: int, share_prefixes: bool = True,
        reads_features: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, method, dtype=dtype, max_tokens=max_tokens)
        config = self.inner.config
        self._is_encoder = config.model_type in _FIRST_POSITIONS
        self._share_prefixes = share_prefixes
        self._reads_features = reads_features
        self.reason = self._why_not_packed()
        self.packed = self.reason is None
        self.reads_one_token = True
        if self._is_encoder:
            self.attention = "dense"
        self._layers = layers_of(self.inner)
        if self.packed:
            attention = row_attention if self._is_encoder else tree_attention
            attention.install()
            self.inner.set_attn_implementation(attention.NAME)

    def _why_not_packed(self) -> str | None:
        config = self.inner.config
        if not self.method.packs:
            return "the method changes what the model reads"
        if not self._is_encoder and config.model_type not in PACKABLE:
            return f"{config.model_type} models are not known to be exact with packed rows"
        if config._attn_implementation != "sdpa":
            return f"its attention is {config._attn_implementation}, not sdpa"
        if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
            return "it has a sliding attention window"
        if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
            return "its positions are relative"
        return None

    @property
    def shares(self) -> bool:  # type: ignore[override]
        """Whether prefixes are shared now: with dropout drawn, each row needs its own."""
        draws = self.has_dropout and self.model.training
        return self.packed and self._share_prefixes and not self._is_encoder and not draws

    def microbatches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Cut the examples into microbatches, the longest first, so that little is padding.

        Rows of one length keep their order, and a sorted sequence is cut as it is.
        """
        ordered = sorted(examples, key=len, reverse=True)
        if self.packed:
            return packing.groups(ordered, self.max_tokens, share=self.shares)
        if self.method.num_virtual_tokens and not self._is_encoder:
            # given embeddings, Transformers' decoders read the last token of a row, be it padding
            alike = [list(rows) for _, rows in itertools.groupby(ordered, key=len)]
            return itertools.chain.from_iterable(packing.padded_groups(rows, self.max_tokens) for rows in alike)
        return packing.padded_groups(ordered, self.max_tokens)

    def compute(self, batch: Batch, examples: Sequence[Example]) -> RowStates:
        """Run the model over a batch."""
        if batch.attention is None:
            return self.above(self._anchor_states(batch), examples)
        if not self._reads_features:
            return self._states(self._padded_logits(batch), examples, None)
        with output_of(self._layers[-1]) as found:
            logits = self._padded_logits(batch)
        last: Any = found[-1]  # some families give a tuple, and some run one layer several times
        return self._states(logits, examples, self._padded_features(last if torch.is_tensor(last) else last[0], batch))

    def above(self, states: torch.Tensor, examples: Sequence[Example]) -> RowStates:
        """Run what comes after the last layer over the state it reads of each example, (B, width)."""
        return self._states(self._logits_of(states, self._anchor_tokens(examples)), examples, states)

    def kept(self, batch: Batch, num_layers: int) -> list[np.ndarray]:
        """Return the places that matter above the first `num_layers` layers: one a row when there is no other layer."""
        if batch.attention is None and num_layers == len(self._layers):
            return [np.array([place]) for place in self._anchors(batch)]
        return list(batch.places)

    @property
    def _anchor(self) -> int:
        """The token that the head reads."""
        return 0 if self._is_encoder else -1

    def _anchor_tokens(self, examples: Sequence[Example]) -> torch.Tensor:
        return self.tensor(np.array([example.trunk.tokens[self._anchor] for example in examples], dtype=np.int64))

    def _anchor_states(self, batch: Batch) -> torch.Tensor:
        """Return what the last layer makes of the token each head reads, (B, width)."""
        if self._is_encoder:
            mask = row_attention.Rows(batch.nodes, self.device).as_mask()
            first = _FIRST_POSITIONS[self.inner.config.model_type](self.inner.config)
        else:
            mask, first = tree_attention.Tree(batch.nodes, self.device, self.attention).as_mask(), 0
        ids = self.tensor(batch.input_ids)
        has_types = hasattr(self.inner.config, "type_vocab_size")  # GPT-2 takes them too, for words of the vocabulary
        options: dict[str, Any] = {"token_type_ids": torch.zeros_like(ids)} if has_types else {}
        with self.autocast(), self.noise(batch), self._narrowed(batch), output_of(self._layers[-1]) as found:
            self.inner.base_model(
                input_ids=ids, position_ids=self.tensor(batch.position_ids + first), attention_mask=mask, **options
            )
        return found[0][0].index_select(0, self.tensor(self._anchors(batch)))

    @property
    def _narrows(self) -> bool:
        """Whether the last layer is cut short; computed again in the backward pass, it would no longer be."""
        return self.inner.config.model_type in _ATTENTION and not self.inner.is_activation_checkpointing

    def _anchors(self, batch: Batch) -> np.ndarray:
        """Return where the token that the head reads of each row is in what the last layer gives."""
        if self._narrows:
            return np.arange(len(batch.places))
        return np.array([places[self._anchor] for places in batch.places])

    @contextlib.contextmanager
    def _narrowed(self, batch: Batch) -> Iterator[None]:
        """While inside, the last layer goes on after its attention with the tokens that the head reads."""
        if not self._narrows:
            yield
            return
        chosen = self.tensor(np.array([places[self._anchor] for places in batch.places]))

        def narrow(_module: Any, _given: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (output[0].index_select(1, chosen), *output[1:])

        attention = getattr(self._layers[-1], _ATTENTION[self.inner.config.model_type])
        handle = attention.register_forward_hook(narrow)
        try:
            yield
        finally:
            handle.remove()

    def _logits_of(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Run what comes after the last layer, by giving the whole model rows of one token."""
        ids = tokens[:, None]
        with self.autocast(), skipped(self._layers, states[:, None]):
            logits: torch.Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits

    def _padded_logits(self, batch: Batch) -> torch.Tensor:
        """The reference: the whole model over padded rows."""
        with self.autocast(), self.noise(batch):
            logits: torch.Tensor = self.model(
                input_ids=self.tensor(batch.input_ids), attention_mask=self.tensor(batch.attention).long()
            ).logits
        return logits

    def _padded_features(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return what the last layer gives at the token that the head reads of each row.

        An encoder's head reads the first there is, even where that is one that a method put before the row.
        """
        if self._reads_first:
            return states[:, 0]
        own = states[:, -batch.input_ids.shape[1] :]
        anchors = self.tensor(np.array([places[self._anchor] for places in batch.places]))
        return own.flatten(0, 1).index_select(0, anchors)

    @property
    def _reads_first(self) -> bool:
        """Whether the head reads a row's first token, also of families that are not packed: those that fill in blanks."""
        config = self.inner.config
        fills_in = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_encoder_decoder
        return self._is_encoder or fills_in

    def _states(self, logits: torch.Tensor, examples: Sequence[Example], features: torch.Tensor | None) -> RowStates:
        if examples[0].targets is None:
            given = np.array([example.label for example in examples])
        else:
            given = np.stack([example.targets for example in examples])  # type: ignore[misc]
        smoothing = self.label_smoothing if self.model.training else 0.0
        states = RowStates(logits.float(), self.tensor(given), smoothing)
        if features is not None and self._reads_features:
            states.features, states.model = features.float(), self.inner
        return states
