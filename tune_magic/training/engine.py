"""The engine: hidden states at the weighted positions, computed once where rows share tokens.

Packed rows need a model whose attention takes a mask of our own. Families are on an allow-list, since some ignore such
a mask silently; beyond that, a self-check on the run's own rows compares packed with padded, loss and gradients, before
training starts, and falls back to padding with the reason in the plan.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tune_magic.data.example import Example, Segment
from tune_magic.methods.base import Method
from tune_magic.models.layers import layers_of
from tune_magic.training import memory, noise, packing, tree_attention
from tune_magic.training.compiled import CompiledLayers
from tune_magic.training.packing import Batch
from tune_magic.training.target_states import TargetStates
from tune_magic.training.tree_attention import Tree

if TYPE_CHECKING:
    from tune_magic.training.beside import Beside
    from tune_magic.training.trunk import Trunk

# Families checked to be exact with a boolean 4-D mask under scaled_dot_product_attention, whose head is one matrix.
PACKABLE = frozenset(
    {"llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "smollm3", "olmo2", "stablelm", "gpt_neox", "gpt2"}
)
_CHECK_FIRST, _CHECK_LAST = 8, 12  # tokens of a row in the self-check: it delays every start
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


class Engine(abc.ABC):
    """Runs a model made trainable by a method over microbatches of examples.

    Args:
        model: What `Method.apply` returned, on its device.
        method: The method.
        dtype: Compute precision.
        max_tokens: Most tokens of a microbatch.

    Attributes:
        packed: Whether rows lie behind each other in one row without padding.
        reason: Why not, where they could have been, or not in the best way; None where nothing is lost.
        shares: Whether prefixes are computed once.
        keeps_layers: Whether what frozen layers give can be kept.
        reads_one_token: Whether what comes after the last layer reads one token of an example, so that `above` can.
        attention: How attention over a packed row is computed, where that is a tree.
        compiled: Whether the layers are compiled.
        saved_bytes_per_token: What autograd keeps of a token for the backward pass, by the self-check's count.
        unseen_bytes: What this process will hold once it has computed something, and does not yet: weights are mapped.
        trunk: What the frozen layers give, where that is kept; None where they are computed each time.
        label_smoothing: Of the losses in training, see `TargetStates.losses`.
        noise_alpha: Noise on embeddings in training, see `training.noise`; 0 for none.
        beside: Models that are computed over the same examples, by role, for whoever compares with them.
    """

    packed = False
    reason: str | None = None
    shares = False
    keeps_layers = True
    reads_one_token = False
    compiled = False
    saved_bytes_per_token = 0.0
    unseen_bytes = 0
    trunk: Trunk | None = None
    label_smoothing = 0.0
    noise_alpha = 0.0

    def __init__(self, model: Any, method: Method, *, dtype: torch.dtype, max_tokens: int) -> None:
        self.model = model
        self.method = method
        self.inner = method.inner(model)
        self.device = next(model.parameters()).device
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.attention = tree_attention.way_on(self.device)
        self.beside: dict[str, Beside] = {}
        self.has_dropout = method.has_active_dropout() or _has_dropout(model)  # or other random numbers in training

    def regularise(self, *, label_smoothing: float, noise_alpha: float) -> None:
        """Smooth labels and add noise to embeddings in training from now on."""
        self.label_smoothing, self.noise_alpha = label_smoothing, noise_alpha
        self.has_dropout = self.has_dropout or noise_alpha > 0

    @abc.abstractmethod
    def microbatches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Cut a step's examples into microbatches, in an order that suits the engine."""

    def shrink(self, examples: Sequence[Example]) -> bool:
        """Halve `max_tokens` until these examples are cut into more microbatches; False when that cannot be."""
        before, planned = len(list(self.microbatches(examples))), self.max_tokens
        while self.max_tokens > 1:
            self.max_tokens //= 2
            if len(list(self.microbatches(examples))) > before:
                return True
        self.max_tokens = planned
        return False

    def lay_out(self, examples: Sequence[Example]) -> Batch:
        """Lay out a microbatch, packed or padded."""
        return self._packed(examples) if self.packed else self._padded(examples)

    @abc.abstractmethod
    def compute(self, batch: Batch, examples: Sequence[Example]) -> Any:
        """Run the model over what `lay_out` returned for these examples."""

    def states(self, examples: Sequence[Example]) -> Any:
        """Run the model over one microbatch and return what the objective sees of it, and of the models beside."""
        # these first: they leave little behind, and what the backward pass needs is not there yet
        found = {one: one.states(examples) for one in dict.fromkeys(self.beside.values())}
        states = self.own_states(examples)
        if found:
            states.beside = {role: found[one].ordered_as(states) for role, one in self.beside.items()}
        return states

    def own_states(self, examples: Sequence[Example]) -> Any:
        """Run the model alone over one microbatch."""
        if self.trunk is not None and self.trunk.knows(examples):
            return self.trunk.states(examples)
        return self.compute(self.lay_out(examples), examples)

    def above(self, states: torch.Tensor, examples: Sequence[Example]) -> Any:
        """Run what comes after the last layer over the state it reads of each example, (B, width)."""
        raise TypeError("a head that reads every token needs the batch")

    def kept(self, batch: Batch, num_layers: int) -> list[np.ndarray]:
        """Return for each example the places of a batch whose states matter above the first `num_layers` layers."""
        return list(batch.places)

    def _packed(self, examples: Sequence[Example], worth: int = packing.WORTH) -> Batch:
        batch = packing.pack(examples, share=self.shares, worth=worth)
        return packing.rounded(batch) if self.attention == "flex" else batch

    def _padded(self, examples: Sequence[Example]) -> Batch:
        return packing.pad(examples, pad_token_id=self.inner.config.pad_token_id or 0)

    def self_check(self, examples: Sequence[Example], loss_sum: Callable[[Any], torch.Tensor]) -> None:
        """Compare packed with padded on a few short rows; on a difference, pad from now on and say why in `reason`.

        What autograd saves of each token is counted on the way.
        """
        rows = [row for row in self._rows_to_check(examples) if row.weight]
        if not rows:
            return
        was_training = self.model.training
        self.model.eval()
        reference = self._loss_and_gradients(rows, self._padded(rows), loss_sum)
        if self.packed:
            saved_when_padded = self.saved_bytes_per_token
            self.reason = self._why_not_right(rows, loss_sum, reference)
            self.packed = self.reason is None
            if not self.packed and self.attention == "flex":
                flex, self.attention = self.reason, "dense"
                self.packed = self._why_not_right(rows, loss_sum, reference) is None
                self.reason = f"a dense mask instead of FlexAttention: {flex}" if self.packed else flex
            if not self.packed:
                self.saved_bytes_per_token = saved_when_padded
        if self.has_dropout:  # its masks are saved too
            self._count_in_training(rows, loss_sum)
        self.model.train(was_training)

    def _rows_to_check(self, examples: Sequence[Example]) -> list[Example]:
        return [_shortened(e) for e in sorted(examples, key=len)[:2]]

    def compile(self, examples: Sequence[Example], loss_sum: Callable[[Any], torch.Tensor]) -> str | None:
        """Compute with compiled layers from now on; return why not where that cannot be."""
        return "torch_compile is for packed rows of language models"

    def _why_apart(self, ours: list[torch.Tensor], reference: list[torch.Tensor]) -> str | None:
        difference = max(_difference(ours[:1], reference[:1]), _difference(ours[1:], reference[1:]))
        return None if difference <= _TOLERANCE[self.dtype] else f"loss or gradients differ by {difference:.1e}"

    def _count_in_training(self, rows: list[Example], loss_sum: Any) -> None:
        self.method.to_training(self.model)
        batch = self.lay_out(rows)
        with torch.random.fork_rng(), memory.count_saved(self.model) as saved:
            loss_sum(self.compute(batch, rows))
        self.saved_bytes_per_token = saved.total_bytes / batch.input_ids.size

    def _why_not_right(self, rows: list[Example], loss_sum: Any, reference: list[torch.Tensor]) -> str | None:
        try:
            ours = self._loss_and_gradients(rows, self._packed(rows, worth=1), loss_sum)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # whatever a model makes of the mask
            return f"packed rows cannot be computed by this model: {str(error)[:200]}"
        apart = self._why_apart(ours, reference)
        return apart and f"packed rows are not as padded ones on this model: {apart}"

    def _loss_and_gradients(self, rows: list[Example], batch: Batch, loss_sum: Any) -> list[torch.Tensor]:
        with memory.count_saved(self.model) as saved:
            loss = loss_sum(self.compute(batch, rows)) / sum(row.weight for row in rows)
        self.saved_bytes_per_token = saved.total_bytes / batch.input_ids.size
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
        return [loss.detach(), *(g for g in gradients if g is not None)]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the engine's precision while inside."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def noise(self, batch: Batch) -> contextlib.AbstractContextManager[Any]:
        """Add noise to the embeddings of a batch while inside, if there is to be any now."""
        if not (self.noise_alpha and self.model.training):
            return contextlib.nullcontext()
        return noise.on_embeddings(self.inner.get_input_embeddings(), batch, self.noise_alpha)

    def tensor(self, array: Any) -> torch.Tensor:
        """Return an array as a tensor on the device."""
        return torch.from_numpy(array.copy()).to(self.device)


class TokenEngine(Engine):
    """Hidden states at the weighted tokens of a language model.

    Args:
        model: What `Method.apply` returned, on its device.
        method: The method.
        dtype: Compute precision.
        max_tokens: Most tokens of a microbatch.
        share_prefixes: Compute a prefix that the rows of a microbatch share once.
    """

    def __init__(
        self, model: Any, method: Method, *, dtype: torch.dtype, max_tokens: int, share_prefixes: bool = True
    ) -> None:
        super().__init__(model, method, dtype=dtype, max_tokens=max_tokens)
        self.share_prefixes = share_prefixes
        self._layers = CompiledLayers()
        head = self.inner.get_output_embeddings()
        self._vocabulary = self.inner.config.get_text_config().vocab_size
        self._head_is_trained = head is None or any(p.requires_grad for p in head.parameters())
        self.reason = _why_not_packed(self.inner, method)
        self.packed = self.reason is None
        if self.packed:
            tree_attention.install()
            self.inner.set_attn_implementation(tree_attention.NAME)

    def microbatches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Cut a step's examples into microbatches."""
        if not self.packed:
            return packing.padded_groups(examples, self.max_tokens)
        return packing.groups(examples, self.max_tokens, share=self.shares)

    @property
    def shares(self) -> bool:  # type: ignore[override]
        """Whether prefixes are shared now: with dropout drawn, each row needs its own."""
        return self.packed and self.share_prefixes and not (self.has_dropout and self.model.training)

    def compute(self, batch: Batch, examples: Sequence[Example]) -> TargetStates:
        """Run the model over a batch; a padded one by the whole model and with every logit."""
        if batch.attention is None:
            with self.autocast(), self._layers.on(), self.noise(batch):
                hidden = self.inner.base_model(
                    input_ids=self.tensor(batch.input_ids),
                    position_ids=self.tensor(batch.position_ids),
                    attention_mask=Tree(batch.nodes, self.device, self.attention).as_mask(),
                    use_cache=False,
                ).last_hidden_state[0]
            return self._gather(batch, hidden, self._head)
        with self.autocast(), self.noise(batch):
            logits = self.model(
                input_ids=self.tensor(batch.input_ids),
                attention_mask=self.tensor(batch.attention).long(),
                use_cache=False,
            ).logits
        own = logits[:, -batch.input_ids.shape[1] :]  # a method's tokens stand before them
        return self._gather(batch, own.flatten(0, 1), None)

    def compile(self, examples: Sequence[Example], loss_sum: Callable[[Any], torch.Tensor]) -> str | None:
        """Compile the layers; where that fails, or loss or gradients change, leave them as they are and return why."""
        if not self.packed:
            return super().compile(examples, loss_sum)
        rows, was_training = [_shortened(e) for e in examples], self.model.training
        self.model.eval()
        reference = self._loss_and_gradients(rows, self.lay_out(rows), loss_sum)
        self._layers = CompiledLayers(layers_of(self.inner))
        try:
            reason = self._why_apart(self._loss_and_gradients(rows, self.lay_out(rows), loss_sum), reference)
            self._count_in_training(rows, loss_sum)
        except (RuntimeError, OSError) as error:  # no compiler, or something it does not know
            reason = str(error).strip().splitlines()[0][:200]
        self.compiled = reason is None
        if not self.compiled:
            self._layers = CompiledLayers()
        self.model.train(was_training)
        return reason and f"the layers are not compiled: {reason}"

    def _gather(self, batch: Batch, states: torch.Tensor, head: Any) -> TargetStates:
        # index_select, not states[sources]: its backward adds in a fixed order
        return TargetStates(
            states=states.index_select(0, self.tensor(batch.sources)),
            head=head,
            targets=self.tensor(batch.targets),
            weights=self.tensor(batch.weights),
            owners=self.tensor(batch.owners),
            vocabulary=self._vocabulary,
            head_is_trained=self._head_is_trained,
            label_smoothing=self.label_smoothing if self.model.training else 0.0,
        )

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            logits: torch.Tensor = self.inner.get_output_embeddings()(hidden)
        return logits


def _why_not_packed(model: Any, method: Method) -> str | None:
    config = model.config
    if not method.packs:
        return "the method changes what the model reads"
    if config.model_type not in PACKABLE:
        return f"{config.model_type} models are not known to be exact with packed rows"
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation}, not sdpa"
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        return "it has a sliding attention window"
    if model.get_output_embeddings() is None:
        return "it has no output head"
    return None


def _has_dropout(model: torch.nn.Module) -> bool:
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    return bool(getattr(getattr(model, "config", None), "attention_dropout", 0.0))


def _shortened(example: Example) -> Example:
    """Keep a trunk's first tokens, which rows may share, and its last, which are learned: enough to test the mask."""
    trunk = example.trunk
    if len(trunk) <= _CHECK_FIRST + _CHECK_LAST:
        return example
    kept = np.r_[:_CHECK_FIRST, len(trunk) - _CHECK_LAST : len(trunk)]
    return replace(example, trunk=Segment(trunk.tokens[kept], trunk.weights[kept]))


def _difference(ours: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Return the norm of the difference, as a share of the reference's; infinity where one is not a number."""
    pairs = list(zip(ours, reference, strict=True))
    apart = math.fsum(float((a.float() - b.float()).norm()) ** 2 for a, b in pairs)
    whole = math.fsum(float(b.float().norm()) ** 2 for _, b in pairs)
    share = math.sqrt(apart) / max(math.sqrt(whole), 1e-12)
    return share if math.isfinite(share) else math.inf
