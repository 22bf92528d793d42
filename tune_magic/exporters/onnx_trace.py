"""Models traced by torch.onnx: every classifier, and decoders that GenAI's builder does not know."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FED = ("input_ids", "attention_mask")
_OPSET = 20


class _Classifier(torch.nn.Module):
    """What is traced: tokens and mask to logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


class _Decoder(torch.nn.Module):
    """What is traced: tokens, mask, positions (a list of one, or of none) and cache to logits and the longer cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, positions: Any, past: Any) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        known = {"position_ids": positions[0]} if positions else {}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **known
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def trace_classifier(model: Any, path: Path) -> None:
    """Trace a classifier: 2 rows of 7 tokens."""
    ids = torch.ones((2, 7), dtype=torch.long)  # no example size may be 0 or 1: the graph would keep it
    _trace(
        _Classifier(model), (ids, torch.ones_like(ids)), ({0: _any(), 1: _any()},) * 2, path,
        input_names=list(FED), output_names=["logits"],
    )  # fmt: skip


def trace_decoder(model: Any, path: Path) -> None:
    """Trace a decoder: 2 rows, 3 new tokens, 4 tokens in the cache."""
    heads, size = cache_sizes(model).values()
    layers = range(model.config.num_hidden_layers)
    counts = "position_ids" not in inspect.signature(model.forward).parameters  # Bloom counts by the mask
    positions = [] if counts else [torch.arange(4, 7)[None].repeat(2, 1)]
    example = (
        torch.ones((2, 3), dtype=torch.long),
        torch.ones((2, 7), dtype=torch.long),
        positions,
        [(torch.zeros(2, heads, 4, size), torch.zeros(2, heads, 4, size)) for _ in layers],
    )
    two = {0: _any(), 1: _any()}
    cache = [({0: _any(), 2: _any()}, {0: _any(), 2: _any()}) for _ in layers]
    members = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    _trace(
        _Decoder(model), example, (two, two, [two] * len(positions), cache), path,
        input_names=[
            "input_ids", "attention_mask", *["position_ids"] * len(positions),
            *(f"past_key_values.{name}" for name in members),
        ],
        output_names=["logits", *(f"present.{name}" for name in members)],
    )  # fmt: skip


def _trace(module: torch.nn.Module, example: Any, shapes: Any, path: Path, **names: Any) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with quietly():
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, opset_version=_OPSET, dynamic_shapes=shapes, verbose=False, **names
        )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # it would tell where each line of code lies on this machine
        program.save(str(path), external_data=True)


def cache_sizes(model: Any) -> dict[str, int]:
    """Return the sizes of a layer's keys and values, as a run of the model makes them: configurations name them oddly."""
    with torch.no_grad():
        cache = model(input_ids=torch.ones((1, 1), dtype=torch.long), use_cache=True).past_key_values
    _, heads, _, size = cache.layers[0].keys.shape
    return {"num_key_value_heads": heads, "head_size": size}


def _any() -> Any:
    return torch.export.Dim.DYNAMIC


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """While inside, the exporters' advice to their own developers is dropped."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "root", "onnxruntime")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
