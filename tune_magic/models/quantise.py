"""Quantised bases: the matrices of a model's stacks of layers in 4 or 8 bits, by bitsandbytes.

Embeddings, norms and what lies outside the stacks, heads among them, stay as they are. A product multiplies by the
matrix as it is after rounding, in the precision of its input: activations are not rounded, so a row's result does not
depend on what is computed beside it, and training and evaluation see the same model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_magic.errors import TuneError
from tune_magic.recipe.schema import QuantizationOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

_BLOCK, _SCALES = 64, 256  # numbers that share a scale; scales that share one of their own
_ROUNDED = "rounded"  # mark of our layers, so that looking for them does not import bitsandbytes


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the precision of a folder's weights, in which they can be read without a copy; float32 where it is not told."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    dtype = getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def quantise(
    model: Any, options: QuantizationOptions, dtype: torch.dtype, device: torch.device, *, keep_originals: bool = False
) -> Any:
    """Quantise the linear layers of a model's stacks in place, one after the other, and return the model.

    Args:
        model: As it was loaded, not on the device yet.
        options: How.
        dtype: What is not quantised is brought to this precision.
        device: Where the quantised matrices go.
        keep_originals: Leave each layer its matrix before rounding, as `original`.

    Raises:
        TuneError: There is nothing to quantise.
    """
    from tune_magic.models.lean_peft import know_bitsandbytes
    from tune_magic.models.rounded_linear import rounded

    know_bitsandbytes()
    found = linear_layers(model)
    if not found:
        raise TuneError(
            "This model's layers have no linear layers of the kind that bitsandbytes quantises.",
            hint="Leave `quantization` out.",
        )
    for path, module in found:
        matrix = matrix_of(module)
        layer = rounded(matrix, module.bias, options, dtype, device)
        layer.original = matrix if keep_originals else None
        model.set_submodule(path, layer.train(module.training))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    name = "is_loaded_in_4bit" if options.is_4bit else "is_loaded_in_8bit"
    setattr(model, name, True)  # by which PEFT chooses its layers
    return model


def dequantise(model: Any) -> Any:
    """Put plain linear layers with the same, rounded matrices in place of the quantised ones; returns the model."""
    import torch
    from torch import nn

    for path, layer in rounded_layers(model):
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(layer.dense(torch.float32), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(path, plain.train(layer.training))
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    return model


def rounded_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the quantised layers of a model with their names."""
    return [(path, module) for path, module in model.named_modules() if getattr(module, _ROUNDED, False)]


def num_parameters(model: nn.Module) -> int:
    """Return how many numbers a model has, those of quantised matrices before they were packed, and of shared values each."""
    packed = {id(layer.weight): layer.in_features * layer.out_features for _, layer in rounded_layers(model)}
    shared: list[Any] = [module for module in model.modules() if hasattr(module, "codebook")]  # models/bound.py
    packed |= {id(layer.codebook): layer.places.numel() for layer in shared}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def footprint(model: nn.Module) -> dict[str, int]:
    """Return what the weights take: ``bytes`` as they are, scales included, and ``float32_bytes`` as they would be."""
    scales = sum(layer.scale_bytes() for _, layer in rounded_layers(model))
    held = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"bytes": held + scales, "float32_bytes": 4 * (num_parameters(model) - trained)}


def packed(model: Any, options: QuantizationOptions) -> tuple[int, int]:
    """Return the bytes of what `quantise` would quantise, as it is and as it would be with its scales; computes nothing."""
    before = after = 0
    for _, module in linear_layers(model):
        matrix = matrix_of(module)
        count, blocks = matrix.numel(), -(-matrix.numel() // _BLOCK)
        before += matrix.nbytes
        if not options.is_4bit:
            after += count + 4 * matrix.shape[0]
        elif options.quantizes_scales:  # a byte each, a float for 256 of them, and their mean
            after += -(-count // 2) + blocks + 4 * -(-blocks // _SCALES) + 4
        else:
            after += -(-count // 2) + 4 * blocks
    return before, after


def workspace_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return what the largest matrix takes while a product is computed by it; 0 where none is made for that."""
    modules: list[Any] = [*model.modules()]
    made = [m for m in modules if getattr(m, _ROUNDED, False) or getattr(m, "rebuilds_matrix", False)]
    return max((layer.in_features * layer.out_features for layer in made), default=0) * dtype.itemsize


def linear_layers(model: Any) -> list[tuple[str, Any]]:
    """Return the linear layers inside the backbone's stacks with their names; those kept in float32 are left out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    stacks = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(module) for stack in stacks for module in stack.modules()}
    return [
        (path, module)
        for path, module in model.named_modules()
        if id(module) in inside and type(module) in (nn.Linear, Conv1D) and path.rpartition(".")[2] not in kept
    ]


def matrix_of(module: Any) -> torch.Tensor:
    """Return a linear layer's matrix, (outputs, inputs); that of GPT-2's Conv1D lies on its side."""
    from torch import nn

    weight: torch.Tensor = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.t()
