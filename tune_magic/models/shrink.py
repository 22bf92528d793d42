"""Fewer layers, neurons and heads: a smaller model of the same family, which Transformers' configuration can say.

Every layer keeps as many neurons and heads as any other, since a configuration has one number for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tune_magic.errors import TuneError
from tune_magic.models.layers import layers_of, stacks_of
from tune_magic.models.quantise import matrix_of
from tune_magic.recipe.schema import CompressOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

# Of a feed-forward layer: matrices that make its neurons, and the one that reads them.
_FEEDS = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.up_proj",), "mlp.down_proj"),
    (("mlp.fc1",), "mlp.fc2"),
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    (("mlp.c_fc",), "mlp.c_proj"),
    (("intermediate.dense",), "output.dense"),
    (("ffn.lin1",), "ffn.lin2"),
)
_READERS = ("o_proj", "dense", "out_proj")  # of what heads give
_WIDTHS = ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim")  # what configurations call the neurons
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads")  # what attention layers may call their heads
_WIDE, _EVEN = 32, 8  # kept neurons are a multiple: exported formats round and store blocks of so many


@dataclass(frozen=True)
class Feed:
    """The feed-forward part of a layer: `makers` (neurons, width) each, `reader` (width, neurons)."""

    makers: list[Any]
    reader: Any

    @property
    def size(self) -> int:
        """How many neurons there are."""
        return int(matrix_of(self.reader).shape[1])


@dataclass(frozen=True)
class Heads:
    """The attention part of a layer, in groups of query heads that read the same keys and values.

    Attributes:
        module: The attention layer.
        query: (groups * readers * size, width).
        key: (groups * size, width).
        value: (groups * size, width).
        reader: (width, groups * readers * size).
        groups: Key-value heads.
        size: Numbers of a head.
    """

    module: Any
    query: Any
    key: Any
    value: Any
    reader: Any
    groups: int
    size: int


def feed_of(layer: nn.Module) -> Feed:
    """Return the feed-forward part of a layer.

    Raises:
        TuneError: It is of no known form.
    """
    for makers, reader in _FEEDS:
        if all(_has(layer, path) for path in (*makers, reader)):
            return Feed([layer.get_submodule(path) for path in makers], layer.get_submodule(reader))
    raise TuneError(
        f"`prune_neurons` does not know the feed-forward part of a {type(layer).__name__}.",
        hint="`drop_layers` and `prune_weights` need not know it.",
    )


def heads_of_layer(layer: nn.Module, config: Any) -> Heads:
    """Return the attention part of a layer.

    Raises:
        TuneError: It is of no known form: queries, keys and values are no matrices of their own.
    """
    module = getattr(layer, "self_attn", None)
    names = [name for name in _READERS if _has(module, name)]
    if not names or not all(_has(module, name) for name in ("q_proj", "k_proj", "v_proj")):
        raise TuneError(
            f"`prune_heads` does not know the attention of a {type(layer).__name__}, or its configuration cannot say fewer heads.",
            hint="It is for decoders such as Llama, Qwen and Mistral. `prune_neurons` and `drop_layers` are for encoders too.",
        )
    parts: Any = module
    groups = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    size = int(matrix_of(parts.k_proj).shape[0]) // groups
    return Heads(parts, parts.q_proj, parts.k_proj, parts.v_proj, getattr(parts, names[0]), groups, size)


def shrink(model: Any, kept: Mapping[str, Any]) -> None:
    """Take layers, neurons and heads out of a model in place, and let its configuration say so.

    Args:
        model: As it was loaded.
        kept: What stays, by numbers from 0 in ascending order: ``layers``; ``neurons`` and ``heads``, a list for each
            layer that stays. What is missing stays whole.

    Raises:
        TuneError: The configuration of this family cannot say it.
    """
    if not kept:
        return
    if "layers" in kept:
        _keep_layers(model, kept["layers"])
    width = _width_name(model.config, feed_of(layers_of(model)[0]).size) if "neurons" in kept else ""
    for layer, neurons in zip(layers_of(model), kept.get("neurons", ()), strict=False):
        _keep_neurons(feed_of(layer), neurons)
    for layer, groups in zip(layers_of(model), kept.get("heads", ()), strict=False):
        _keep_heads(heads_of_layer(layer, model.config), groups)
    if "neurons" in kept:
        setattr(model.config, width, len(kept["neurons"][0]))
    if "heads" in kept:
        _say_heads(model.config, len(kept["heads"][0]))
    _check_said(model)


def first_of(model: Any, options: CompressOptions) -> dict[str, Any]:
    """Return as many layers, neurons and heads as would stay, the first of each: their number is known before any rows."""
    if not options.reshapes:
        return {}
    check_one_stack(model)
    layers, kept = layers_of(model), dict[str, Any]()
    stays = len(layers) - (count_of_layers(options.drop_layers, len(layers)) if options.drop_layers else 0)
    if options.drop_layers:
        kept["layers"] = list(range(stays))
    if options.prune_neurons:
        size = count_of_neurons(options.prune_neurons, feed_of(layers[0]).size)
        kept["neurons"] = [list(range(size))] * stays
    if options.prune_heads:
        size = count_of_heads(options.prune_heads, heads_of_layer(layers[0], model.config).groups)
        kept["heads"] = [list(range(size))] * stays
    return kept


def count_of_layers(wanted: float | list[int], total: int) -> int:
    """Return how many layers `drop_layers` takes away.

    Raises:
        TuneError: None would be left, none would go, or there is no such layer.
    """
    if isinstance(wanted, list):
        beyond = [number for number in wanted if number >= total]
        if beyond:
            raise TuneError(f"`drop_layers` names layer {beyond[0]}, and the model has layers 0 to {total - 1}.")
        count = len(wanted)
    else:
        count = wanted if isinstance(wanted, int) else round(wanted * total)
    if count >= total:
        raise TuneError(f"`drop_layers: {wanted}` leaves none of the model's {total} layers.")
    if not count and wanted:
        raise TuneError(
            f"`drop_layers: {wanted}` of {total} layers is less than half a layer.", hint="Try `drop_layers: 1`."
        )
    return count


def count_of_neurons(share: float, total: int) -> int:
    """Return how many neurons are kept: a multiple of 32, of 8 in small models, so that exported blocks stay whole."""
    step = next((size for size in (_WIDE, _EVEN) if total % size == 0 and total >= 4 * size), 1)
    kept = max(step, round(total * (1 - share) / step) * step)
    if kept == total:
        raise TuneError(
            f"`prune_neurons: {share:g}` leaves all {total} neurons of a layer: multiples of {step} are kept.",
            hint=f"Try `prune_neurons: {max(share, step / total):.2g}`.",
        )
    return kept


def count_of_heads(share: float, total: int) -> int:
    """Return how many key-value heads are kept.

    Raises:
        TuneError: All of them.
    """
    kept = max(1, round(total * (1 - share)))
    if kept == total:
        raise TuneError(
            f"`prune_heads: {share:g}` leaves all {total} key-value heads of a layer.",
            hint=f"Try `prune_heads: {1 / total:.2g}`." if total > 1 else "A layer with one has none to spare.",
        )
    return kept


def check_one_stack(model: Any) -> None:
    """Refuse models whose layers stand in two stacks.

    Raises:
        TuneError: An encoder with a decoder.
    """
    if len(stacks_of(model)) > 1:
        raise TuneError(
            "`drop_layers`, `prune_neurons`, `prune_heads` and `tie_layers` are for models that are one stack of layers; "
            "this one has an encoder and a decoder.",
            hint="`prune_weights`, `share_weights` and `quantize_aware` go to both.",
        )


def _has(module: Any, path: str) -> bool:
    try:
        return module is not None and module.get_submodule(path) is not None
    except AttributeError:
        return False


def _width_name(config: Any, size: int) -> str:
    """Return what a configuration calls its number of neurons; GPT-2's may leave it open."""
    return next((name for name in _WIDTHS if vars(config).get(name) == size), "n_inner")


def _keep_layers(model: Any, kept: Sequence[int]) -> None:
    layers, config = layers_of(model), model.config
    total = len(layers)
    for number in sorted(set(range(total)) - set(kept), reverse=True):
        del layers[number]
    for name, value in list(vars(config).items()):
        is_of_layers = isinstance(value, list) and len(value) == total  # layer_types and their kin
        if is_of_layers and name != "architectures" and not name.endswith("token_id"):
            setattr(config, name, [value[number] for number in kept])
    config.num_hidden_layers = len(kept)
    for number, layer in enumerate(layers):
        parts: list[Any] = [*layer.modules()]
        for module in parts:
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number


def _keep_neurons(feed: Feed, kept: Sequence[int]) -> None:
    for maker in feed.makers:
        _keep(maker, kept, outputs=True)
    _keep(feed.reader, kept, outputs=False)


def _keep_heads(heads: Heads, kept: Sequence[int]) -> None:
    readers = int(matrix_of(heads.query).shape[0]) // (heads.groups * heads.size)
    of_group = heads.size * readers
    for module in (heads.key, heads.value):
        _keep(module, _spread(kept, heads.size), outputs=True)
    _keep(heads.query, _spread(kept, of_group), outputs=True)
    _keep(heads.reader, _spread(kept, of_group), outputs=False)
    for name in _COUNTS:
        if isinstance(getattr(heads.module, name, None), int):
            setattr(heads.module, name, len(kept) * (1 if "key_value" in name else readers))


def _spread(groups: Sequence[int], size: int) -> list[int]:
    return [group * size + place for group in groups for place in range(size)]


def _keep(module: Any, kept: Sequence[int], *, outputs: bool) -> None:
    """Keep some outputs, or inputs, of a linear layer; GPT-2's Conv1D has its matrix on its side."""
    import torch
    from torch import nn

    plain = isinstance(module, nn.Linear)
    index = torch.tensor(kept, device=module.weight.device)
    module.weight = nn.Parameter(module.weight.detach().index_select(0 if plain == outputs else 1, index))
    if outputs and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach().index_select(0, index))
    names = {True: ("out_features", "nf"), False: ("in_features", "nx")}[outputs]
    setattr(module, names[0] if plain else names[1], len(kept))


def _say_heads(config: Any, groups: int) -> None:
    readers = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.head_dim = size
    config.num_attention_heads = groups * readers
    config.num_key_value_heads = groups


def _check_said(model: Any) -> None:
    """Make the model that its configuration says, without weights, and compare their shapes."""
    import torch

    config = model.config
    try:
        with torch.device("meta"):
            fresh = dict(_shapes(type(model.base_model)(type(config).from_dict(config.to_dict()))))
        wrong = [name for name, shape in _shapes(model.base_model) if fresh.get(name, shape) != shape]
        why = f"its {wrong[0]} would have another shape" if wrong else None
    except Exception as error:  # noqa: BLE001 - each family checks its configuration in its own way
        why = " ".join(str(error).split())[:200]
    if why is not None:
        raise TuneError(
            f"The configuration of {config.model_type} models cannot say what `compress` would leave: {why}.",
            hint="Take another share, or another way to compress: `drop_layers` changes the fewest shapes.",
        )


def _shapes(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter.shape
