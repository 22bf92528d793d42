"""What `compress` takes away is chosen once for a run, written into its folder, and read by whoever loads the run.

compression.json          format, options, numbers of what stays, figures, SHA-256 of the other file
compression.safetensors   masks as bits, which weight has which value, values at the start; only where weights are bound
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tune_magic import files
from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.errors import TuneError
from tune_magic.models import bound, shrink
from tune_magic.models.compression import MASK, PLACES, VALUES, Compression, bindable, pack, sizes
from tune_magic.models.layers import layers_of
from tune_magic.models.quantise import matrix_of
from tune_magic.recipe.schema import CompressOptions, Recipe
from tune_magic.storage import fingerprint
from tune_magic.training import fisher
from tune_magic.training.engine import Engine

FORMAT = 1
FILE, TENSORS = "compression.json", "compression.safetensors"
_GROUP, _KEPT_OF_GROUP = 4, 2  # 2:4


def read(recipe: Recipe, folder: Path, plan: dict[str, Any] | None = None) -> Compression | None:
    """Return what was chosen for a run; None where nothing is compressed, or nothing was chosen yet.

    Args:
        recipe: The run's.
        folder: The run folder.
        plan: The run's, when it has one: its folder must hold what that was made with.

    Raises:
        TuneError: The files are gone or changed.
    """
    if not recipe.compress.is_on:
        return None
    planned = (plan or {}).get("compress", {}).get("print")
    if planned is None and not (folder / FILE).is_file():
        return None
    try:
        own = fingerprint.of_file(folder / FILE)
        _check_print(FILE, own, planned or own)
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        _check_print("its format", found["format"], FORMAT)
        tensors: dict[str, torch.Tensor] = {}
        if found["tensors"] is not None:
            _check_print(TENSORS, fingerprint.of_file(folder / TENSORS), found["tensors"])
            tensors = dict(load_file(folder / TENSORS))
        return Compression(recipe.compress, found["kept"], tensors, {**found["facts"], "print": own})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TuneError(
            f"What was compressed in this run cannot be read: {error}.",
            hint="Put the files back, or train it again with `--fresh`.",
        ) from error


def _check_print(what: str, now: object, wanted: object) -> None:
    if now != wanted:
        raise ValueError(f"{what} is {now}, not {wanted}")


def choose(
    recipe: Recipe, folder: Path, rows: Table, *, load: Callable[[], Any], engine_of: Callable[[Any], Engine],
    look: Callable[[], None],
) -> Compression:  # fmt: skip
    """Choose what to compress, write it into the run folder, and return it.

    Layers, neurons and heads are measured on the whole model, all at once; zeros and shared values follow from what is
    left of it.

    Args:
        recipe: With `compress`.
        folder: The run folder.
        rows: The training rows.
        load: Loads the model in float32, on its device.
        engine_of: Returns what computes examples with a model.
        look: Called now and then; may raise to break off.

    Raises:
        TuneError: The model cannot be compressed so.
    """
    options = recipe.compress
    rows = fisher.draw(rows, options.calibration_rows, recipe.seed)
    model = load()
    found = Compression(options, facts={"before": {**_shape(model), "parameters": _count(model)}})
    if options.reshapes:
        shrink.check_one_stack(model)
        found.kept = _stays(model, options, lambda: _measured(engine_of(model), model, options, rows, look))
    found.reshape(model)
    if options.prunes_weights or options.share_weights is not None:
        norms = _norms(engine_of(model), model, rows, look) if options.prune_by == "wanda" else {}
        for path, layer in bindable(model, options):
            look()
            found.tensors |= _bound(path, layer, options, norms.get(path))
    del model
    model = load()  # as everybody will
    found.apply(model)
    found.facts |= {"after": {**_shape(model), **sizes(model, options)}}
    _write(folder, found)
    found.facts["print"] = fingerprint.of_file(folder / FILE)
    return found


def _write(folder: Path, found: Compression) -> None:
    if found.tensors:
        plain = {name: tensor.cpu().contiguous() for name, tensor in found.tensors.items()}
        files.ensure_room(folder, sum(tensor.nbytes for tensor in plain.values()))
        files.produce(folder / TENSORS, lambda temporary: save_file(plain, temporary))
    content = {
        "format": FORMAT, "options": found.options.model_dump(mode="json"), "kept": found.kept, "facts": found.facts,
        "tensors": fingerprint.of_file(folder / TENSORS) if found.tensors else None,
    }  # fmt: skip
    files.write_json(folder / FILE, content)


def _shape(model: Any) -> dict[str, Any]:
    """Return what a configuration says of sizes, JSON-ready."""
    config = model.config
    names = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {name: value for name in names if isinstance(value := getattr(config, name, None), int)}


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _stays(model: Any, options: CompressOptions, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of layers, neurons and heads that stay, see `shrink.shrink`."""
    kept = shrink.first_of(model, options)
    total = len(layers_of(model))
    named = options.drop_layers if isinstance(options.drop_layers, list) else None
    needs = bool(options.prune_neurons or options.prune_heads or (options.drop_layers and named is None))
    found = measure() if needs else {}
    stays = list(range(total))
    if named is not None:
        stays = [number for number in stays if number not in named]
    elif "layers" in kept:
        stays = _largest(torch.tensor(found["layers"]), len(kept["layers"]))
    if "layers" in kept:
        kept["layers"] = stays
    for what in ("neurons", "heads"):
        if what in kept:
            kept[what] = [_largest(found[what][number], len(kept[what][0])) for number in stays]
    return kept


def _largest(scores: torch.Tensor, count: int) -> list[int]:
    """Return the places of the largest numbers, ascending; of equals the first."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return sorted(order.tolist())


def _measured(
    engine: Engine, model: Any, options: CompressOptions, rows: Table, look: Callable[[], None]
) -> dict[str, list[Any]]:
    """Return for each layer 1 - the mean cosine of what it is given and gives, and what its neurons and heads weigh."""
    layers = list(layers_of(model))
    feeds = [shrink.feed_of(layer) for layer in layers] if options.prune_neurons else []
    heads = [shrink.heads_of_layer(layer, model.config) for layer in layers] if options.prune_heads else []
    readers = [*(feed.reader for feed in feeds), *(part.reader for part in heads)]
    with _changes_of(layers) as changes, _inputs_of(readers, torch.abs) as given:
        _run(engine, rows, look)
    weighs = [given[reader] * matrix_of(reader).norm(dim=0) for reader in readers]
    found: dict[str, list[Any]] = {"layers": [1 - total / count for total, count in changes.values()]}
    found["neurons"], of_heads = weighs[: len(feeds)], weighs[len(feeds) :]
    found["heads"] = [scores.view(part.groups, -1).sum(1) for scores, part in zip(of_heads, heads, strict=True)]
    return found


def _norms(engine: Engine, model: Any, rows: Table, look: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Return the root of the summed squares of each input of each linear layer, by the layer's name."""
    layers = dict(bindable(model, CompressOptions.model_validate({})))
    with _inputs_of(list(layers.values()), torch.square) as given:
        _run(engine, rows, look)
    return {path: given[layer].sqrt() for path, layer in layers.items()}


@torch.no_grad()
def _run(engine: Engine, rows: Sequence[Example], look: Callable[[], None]) -> None:
    """Compute rows one by one, whole and without padding."""
    engine.packed = False
    engine.model.eval()
    for row in rows:
        look()
        engine.own_states([row])


@contextlib.contextmanager
def _changes_of(layers: Sequence[Any]) -> Iterator[dict[Any, list[float]]]:
    """While inside, add up for each layer the cosines of what it is given and gives, and count them."""
    found = {layer: [0.0, 0.0] for layer in layers}

    def note(layer: Any, given: Any, named: Any, gives: Any) -> None:
        before = given[0] if given else named["hidden_states"]
        after = gives if torch.is_tensor(gives) else gives[0]
        cosines = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        found[layer][0] += float(cosines.sum())
        found[layer][1] += cosines.numel()

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _inputs_of(modules: Sequence[Any], of: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[dict[Any, torch.Tensor]]:
    """While inside, add up a function of what each module is given, over all tokens: (inputs,) each."""
    found: dict[Any, torch.Tensor] = defaultdict(lambda: torch.zeros(()))

    def note(module: Any, given: Any) -> None:
        found[module] = found[module].to(given[0].device) + of(given[0].float()).flatten(0, -2).sum(0)

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _bound(path: str, layer: Any, options: CompressOptions, norms: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the mask of a layer, or which of its weights has which value."""
    weight, kept = layer.weight.detach().float(), None
    if options.prunes_weights:
        kept = _kept(weight, layer, options.prune_weights, norms)
    if options.share_weights is None:
        return {f"{MASK}{path}": pack(kept)} if kept is not None else {}
    if kept is None:
        values, places = bound.k_means(weight, options.share_weights)
        return {f"{VALUES}{path}": values, f"{PLACES}{path}": places.to(torch.uint8)}
    values, of_kept = bound.k_means(weight[kept], options.share_weights - 1)
    places = torch.zeros_like(kept, dtype=torch.uint8)
    places[kept] = (of_kept + 1).to(torch.uint8)
    return {f"{VALUES}{path}": values, f"{PLACES}{path}": places}


def _kept(weight: torch.Tensor, layer: Any, share: float | str, norms: torch.Tensor | None) -> torch.Tensor:
    """Return which weights of a layer stay, of the shape of its weight.

    Raises:
        TuneError: Its inputs are no multiple of four, for `2:4`.
    """
    is_turned = not isinstance(layer, torch.nn.Linear)
    scores = (weight.t() if is_turned else weight).abs()  # (outputs, inputs)
    outputs, inputs = scores.shape
    if norms is not None:
        scores = scores * norms.to(scores.device)
    if share == "2:4":
        if inputs % _GROUP:
            raise TuneError(f"`prune_weights: 2:4` needs matrices with a multiple of four inputs, and one has {inputs}.",
                            hint="Try `prune_weights: 0.5`.")  # fmt: skip
        groups = scores.reshape(-1, _GROUP)
        kept = _all_but_least(groups, _GROUP - _KEPT_OF_GROUP)
    else:
        groups = scores if norms is not None else scores.reshape(1, -1)
        kept = _all_but_least(groups, round(float(share) * groups.shape[1]))
    kept = kept.view(outputs, inputs)
    return kept.t().contiguous() if is_turned else kept


def _all_but_least(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return for each row of scores which are not among its `count` least; of equals the first are."""
    order = torch.sort(scores, dim=1, stable=True).indices[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)
