"""Combine LoRA adapters of one model into another by PEFT, and measure what came out.

An adapter adds s B A to a layer's weights, with A (r, inputs), B (outputs, r) and s its scale. Updates are compared by
their inner product over all layers, <s B A, s' B' A'> = s s' sum((B' B') * (A A'')), which never makes a full matrix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from tune_magic.errors import TuneError
from tune_magic.models.lean_peft import peft
from tune_magic.recipe.combination import Combination


def combine(model: Any, name: str, sources: Sequence[str], combination: Combination) -> None:
    """Add an adapter called `name`, whose scale is 1, to a model.

    Args:
        model: PEFT's, with the sources on it.
        name: Of the new one, as PEFT calls it.
        sources: The adapters, in the order of the weights.
        combination: How; must have been checked.

    Raises:
        TuneError: PEFT refuses, with its words.
    """
    config = model.peft_config[sources[0]]
    # PEFT copies the first adapter's configuration: with rsLoRA's scale, or a start out of the base, it would be another
    model.peft_config[sources[0]] = replace(config, use_rslora=False, init_lora_weights=True)
    options: dict[str, Any] = {"density": combination.share_kept} if combination.prunes else {}
    if combination.approximates:
        options |= {"svd_rank": combination.rank, "svd_full_matrices": False}
    try:
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density")  # of 1: nothing is left out, as asked
            torch.manual_seed(combination.seed)
            model.base_model.add_weighted_adapter(
                list(sources), list(combination.weights.values()), name, combination_type=combination.how, **options
            )
    except (ValueError, TypeError) as error:
        raise TuneError(f"These adapters cannot be combined: {error}") from error
    finally:
        model.peft_config[sources[0]] = config
    if combination.approximates:
        _fill_up(model, name)
    from tune_magic.methods import lora_linear

    lora_linear.fuse(model)
    model.eval()


def geometry(model: Any, name: str, sources: Mapping[str, str], combination: Combination) -> dict[str, Any]:
    """Measure a combined adapter's update of the weights against those it was made of, over all layers as one vector.

    Args:
        model: PEFT's, with all of them on it.
        name: Of the combined one, as PEFT calls it.
        sources: PEFT's name of each source by its own.
        combination: How they were combined.

    Returns:
        ``size``: length of the update; ``sources``: of each its ``weight``, ``size``, ``cosine`` to the combined one and
        relative ``distance`` of the combined one from it; ``between``: the cosine of each pair of sources;
        ``from_sum``: distance from the weighted sum of the updates, as a share of that sum's length.
    """
    names = [*sources.values(), name]
    products = _products(model, names)
    sizes = products.diagonal().clamp_min(0).sqrt().tolist()
    weights = torch.tensor([*combination.weights.values(), -1.0], dtype=torch.float64)
    short = weights[:-1]
    total = math.sqrt(max(0.0, float(short @ products[:-1, :-1] @ short)))
    missed = math.sqrt(max(0.0, float(weights @ products @ weights)))
    last = len(names) - 1

    def cosine(i: int, j: int) -> float | None:
        return round(float(products[i, j]) / (sizes[i] * sizes[j]), 6) if sizes[i] * sizes[j] else None

    def distance(i: int) -> float | None:
        apart = float(products[i, i] + products[last, last] - 2 * products[i, last])
        return round(math.sqrt(max(0.0, apart)) / sizes[i], 6) if sizes[i] else None

    own = list(sources)
    return {
        "size": sizes[last],
        "sources": {
            source: {"weight": weight, "size": sizes[i], "cosine": cosine(i, last), "distance": distance(i)}
            for i, (source, weight) in enumerate(combination.weights.items())
        },
        "between": [[own[i], own[j], cosine(i, j)] for i in range(last) for j in range(i + 1, last)],
        "from_sum": round(missed / total, 6) if total else None,
    }


@torch.no_grad()
def _fill_up(model: Any, name: str) -> None:
    """Give matrices as many ranks as the adapter has: of a layer with a smaller side there are fewer, the others are 0."""
    rank = model.peft_config[name].r
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and name in module.lora_A:
            down, up = module.lora_A[name].weight, module.lora_B[name].weight
        elif isinstance(module, peft.tuners.lora.LoraLayer) and name in module.lora_embedding_A:
            down, up = module.lora_embedding_A[name], module.lora_embedding_B[name]
        else:
            continue
        missing = rank - len(down)
        down.data = functional.pad(down, (0, 0, 0, missing))
        up.data = functional.pad(up, (0, missing))


def _products(model: Any, names: Sequence[str]) -> torch.Tensor:
    """Return the inner products of adapters' updates, float64 of shape (names, names)."""
    found = torch.zeros((len(names), len(names)), dtype=torch.float64)
    for module in model.modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        parts = [_matrices(module, name) for name in names]
        for i, mine in enumerate(parts):
            for j, other in enumerate(parts[: i + 1]):
                if mine is not None and other is not None:
                    inner = float(((mine[1].T @ other[1]) * (mine[0] @ other[0].T)).sum())
                    found[i, j] += inner
                    found[j, i] += inner if i != j else 0.0
    return found


def _matrices(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return A times the scale, and B, in float64; None where the layer has no such adapter."""
    if name in module.lora_A:
        down, up = module.lora_A[name].weight, module.lora_B[name].weight
    elif name in module.lora_embedding_A:
        down, up = module.lora_embedding_A[name], module.lora_embedding_B[name]
    else:
        return None
    return down.detach().double() * module.scaling[name], up.detach().double()
