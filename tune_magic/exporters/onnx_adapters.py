"""One ONNX base with an adapter file for each run: switched from call to call, the base loaded once.

GenAI's builder keeps the matrices of an adapter beside those of the model. They become inputs that may be left out, zero by
default, so that the graph alone is the base; a file holds what one run puts in their place. Ranks and trained layers may
differ: matrices are padded with zeros to the largest rank, and layers that a run did not train get zeros, both exactly.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tune_magic import files
from tune_magic.errors import TuneError
from tune_magic.exporters.limits import EIGHT_BITS
from tune_magic.exporters.onnx_build import agrees, build, is_installed
from tune_magic.exporters.onnx_quantize import quantize_decoder, save
from tune_magic.exporters.onnx_readers import ABOUT, MODEL, OnnxDecoder
from tune_magic.exporters.onnx_trace import cache_sizes
from tune_magic.exporters.parity import Reader
from tune_magic.exporters.together import TogetherExporter
from tune_magic.models.generate import end_tokens
from tune_magic.storage.folder import RunFolder
from tune_magic.training import alike
from tune_magic.training.tuned import Tuned

_ADAPTERS = "adapters"
_SUFFIX = ".onnx_adapter"
_MARK = "/lora_"  # of the nodes that the builder makes for an adapter


@dataclass(frozen=True)
class _Pair:
    """The two matrices of a layer as a graph multiplies with them: down (inputs, rank), up (rank, outputs), scaled."""

    down: np.ndarray
    up: np.ndarray

    def padded(self, rank: int) -> _Pair:
        """Return the same product with a larger rank."""
        more = rank - self.down.shape[1]
        return _Pair(np.pad(self.down, ((0, 0), (0, more))), np.pad(self.up, ((0, more), (0, 0))))


class OnnxAdaptersExporter(TogetherExporter):
    """`model.onnx` and `adapters/NAME.onnx_adapter`."""

    quantizations: ClassVar = {"int8": EIGHT_BITS}

    def __init__(self) -> None:
        self._adapters: dict[str, dict[str, _Pair]] = {}

    def check(self, runs: Mapping[str, RunFolder]) -> None:
        """Refuse runs that are no plain LoRA adapters of one language model."""
        alike.check_combinable(runs)
        if not is_installed():
            raise TuneError(
                "`--to onnx_adapters` needs onnxruntime-genai, which is not installed.",
                hint="pip install onnxruntime-genai",
            )

    def take(self, name: str, tuned: Tuned) -> dict[str, Any]:
        """Keep the matrices of a run."""
        pairs = dict(_pairs(tuned.model))
        self._adapters[name] = pairs
        return {
            "rank": max(pair.down.shape[1] for pair in pairs.values()), "layers": len(pairs),
            "file": f"{_ADAPTERS}/{name}{_SUFFIX}",
        }  # fmt: skip

    def write(self, folder: Path, tuned: Tuned, quantize: str | None) -> None:
        """Write the base with room for every adapter, and the adapters."""
        widest: dict[str, _Pair] = {}
        rank = max(pair.down.shape[1] for pairs in self._adapters.values() for pair in pairs.values())
        for pairs in self._adapters.values():
            widest |= pairs
        base = self._write_base(folder, tuned, sorted(widest), rank)
        inputs = _open_inputs(folder / MODEL)
        expected = {f"{_in_graph(layer)}.lora_{part}.MatMul.weight" for layer in widest for part in "AB"}
        if inputs != expected or not agrees(base, lambda: OnnxDecoder(folder)):
            raise TuneError(
                f"What ONNX Runtime GenAI's builder wrote of this `{base.config.model_type}` model is another model.",
                hint="Export each run with `--to onnx` or `--to adapter`.",
            )
        if quantize is not None:
            quantize_decoder(folder / MODEL, bits=8, but=_adapter_nodes(folder / MODEL))
        for name, pairs in self._adapters.items():
            _write_adapter(folder / _ADAPTERS / f"{name}{_SUFFIX}", pairs, widest, rank)
        tuned.tokenizer.save_pretrained(folder)

    def open(self, folder: Path, tuned: Tuned) -> Reader:
        """Run the graph with the first adapter on."""
        return self.open_adapter(folder, next(iter(self._adapters)))

    def open_adapter(self, folder: Path, name: str | None) -> Reader:
        """Run the graph with one adapter on, or as the base."""
        return OnnxDecoder(folder, None if name is None else folder / _ADAPTERS / f"{name}{_SUFFIX}")

    def _write_base(self, folder: Path, tuned: Tuned, layers: list[str], rank: int) -> Any:
        """Let the builder write the base with an adapter that has every layer and the largest rank; return the base."""
        import peft
        import torch

        base = tuned.objective.load(tuned.base, torch.float32)
        about = {"end_tokens": end_tokens(base, tuned.tokenizer), **cache_sizes(base)}
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, task_type="CAUSAL_LM")
        with tempfile.TemporaryDirectory() as name:
            room = peft.get_peft_model(base, config)
            room.save_pretrained(name)
            base = room.unload().eval()
            problem = build(base, tuned.tokenizer, folder, adapter=Path(name))
        if problem is not None:
            raise TuneError(
                f"ONNX Runtime GenAI's builder cannot write this `{base.config.model_type}` model: {problem}",
                hint="Export each run with `--to onnx` or `--to adapter`.",
            )
        files.write_json(folder / ABOUT, about)
        return base


def _pairs(model: Any) -> Iterator[tuple[str, _Pair]]:
    """Yield the matrices of each trained layer by the layer's name in the base."""
    import peft

    (active,) = model.active_adapters
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and active in module.lora_A:
            down = module.lora_A[active].weight.detach().float().cpu().numpy().T
            up = module.lora_B[active].weight.detach().float().cpu().numpy().T * module.scaling[active]
            yield name, _Pair(down, up.astype(np.float32))


def _in_graph(layer: str) -> str:
    """Return the builder's name of a layer."""
    return layer.replace("self_attn", "attn")


def _adapter_nodes(path: Path) -> list[str]:
    import onnx

    return [node.name for node in onnx.load(path, load_external_data=False).graph.node if _MARK in node.name]


def _open_inputs(path: Path) -> set[str]:
    """Make the adapter's matrices inputs that are zero where they are left out, and return their names."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    weights = {node.input[1] for node in model.graph.node if node.op_type == "MatMul" and _MARK in node.name}
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            shape = list(tensor.dims)
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(shape, dtype=np.float32), tensor.name))
    save(model, path)
    return weights


def _write_adapter(path: Path, pairs: Mapping[str, _Pair], widest: Mapping[str, _Pair], rank: int) -> None:
    import onnxruntime

    matrices = {}
    for layer, other in widest.items():
        pair = pairs.get(layer) or _Pair(np.zeros_like(other.down[:, :1]), np.zeros_like(other.up[:1]))
        pair = pair.padded(rank)
        for part, matrix in (("A", pair.down), ("B", pair.up)):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(matrix))
            matrices[f"{_in_graph(layer)}.lora_{part}.MatMul.weight"] = value
    written = onnxruntime.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters(matrices)
    files.make_folder(path.parent)
    written.export_adapter(str(path))
