"""Graphs of ONNX with fewer bits, rounded by onnxruntime's own quantisers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic import files
from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.exporters.onnx_readers import MODEL
from tune_magic.exporters.onnx_trace import quietly

_BLOCK = 32


def quantize_products(path: Path) -> None:
    """Make weights and activations of matrix products int8, the scales of activations found as it runs.

    One scale a column of weights: with one a matrix, a LoRA-tuned MiniLM chose another class for every ninth text.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _without_shapes(path) as plain:
        quantize_dynamic(plain, path, weight_type=QuantType.QInt8, per_channel=True)


def calibrated(path: Path, examples: Sequence[Example]) -> None:
    """Make weights and activations of matrix products int8, the scales of activations set by what rows make of them.

    Products and embeddings alone: a scale that also covers the huge negative numbers of masked attention leaves nothing of the
    others, and a classifier whose additions or Softmax were rounded chose at random.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(examples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            example = next(self.left, None)
            if example is None:
                return None
            ids = example.trunk.tokens.astype(np.int64)[None]
            return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    with _without_shapes(path) as plain:
        quantize_static(
            plain, path, Rows(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        )  # fmt: skip


def quantize_decoder(path: Path, *, bits: int, but: Sequence[str] = ()) -> None:
    """Make weights int8 or int4 in blocks of 32 with one scale each; level 4 computes in int8, thirty times as fast as without.

    Graphs whose products are not plain MatMul (GPT-2's are Gemm) have their products quantised as classifiers have.

    Args:
        path: The graph.
        bits: 8 or 4.
        but: Names of nodes that stay as they are.

    Raises:
        TuneError: 4 bits, and a graph without such products.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with quietly():
        quantizer = MatMulNBitsQuantizer(
            onnx.load(path), bits=bits, block_size=_BLOCK, is_symmetric=True, accuracy_level=4,
            nodes_to_exclude=list(but),
        )  # fmt: skip
        quantizer.process()
    if not any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node):
        if bits < 8:
            raise TuneError("This model's products are none that onnxruntime has in 4 bits.", hint="Use int8.")
        quantize_products(path)
        return
    with quietly():
        save(quantizer.model.model, path)


def save(graph: Any, path: Path) -> None:
    """Put a graph in the place of one; the folder is not an export yet."""
    import onnx

    for member in (path, path.with_name(f"{path.name}.data")):
        files.discard(member)
    onnx.save(graph, path, save_as_external_data=True, location=f"{path.name}.data", convert_attribute=True)


@contextlib.contextmanager
def _without_shapes(path: Path) -> Iterator[Path]:
    """Move a graph away and yield where, without the shapes of the traced example, which contradict those that quantisers infer."""
    import onnx

    with tempfile.TemporaryDirectory() as name, quietly():
        plain = Path(name) / MODEL
        graph = onnx.load(path)
        del graph.graph.value_info[:]
        onnx.save(graph, plain, save_as_external_data=True, location="plain.data")
        for member in (path, path.with_name(f"{path.name}.data")):
            files.discard(member)
        yield plain
