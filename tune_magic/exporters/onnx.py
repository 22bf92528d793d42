"""ONNX: classifiers, and decoders with a cache of keys and values, run by onnxruntime without torch.

Decoders go through ONNX Runtime GenAI's builder, whose files run in onnxruntime-genai and in plain onnxruntime; families
it does not know are traced by torch.onnx and run in plain onnxruntime. Classifiers are always traced.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from tune_magic import files
from tune_magic.errors import TuneError
from tune_magic.exporters.base import Exporter
from tune_magic.exporters.limits import EIGHT_BITS
from tune_magic.exporters.parity import Reader
from tune_magic.models.generate import end_tokens
from tune_magic.training.tuned import Tuned

_MODEL = "model.onnx"
_FED = ("input_ids", "attention_mask")
_OPSET = 20
_BLOCK = 32
_TRIED_TOKENS = 24
_ABOUT = "decoder.json"  # what a program needs to know to feed the cache and to stop


class OnnxExporter(Exporter):
    """A graph with its weights, and the tokenizer beside it."""

    quantizations: ClassVar = {"int8": EIGHT_BITS}

    def write(self, folder: Path, tuned: Tuned, quantize: str | None) -> None:
        """Write graph, weights, configuration and tokenizer."""
        if tuned.objective.engine == "outputs":
            raise TuneError(f"Runs of `{tuned.recipe.objective.name if tuned.recipe.objective else 'this objective'}` are not written as ONNX.",
                            hint="Export it with `--to merged`.")  # fmt: skip
        model = tuned.method.merge(tuned.model).cpu().eval()
        if tuned.objective.scores_rows:
            _trace_classifier(model, folder / _MODEL)
            tuned.tokenizer.model_input_names = list(_FED)  # what it gives is what the graph takes
            tuned.tokenizer.init_kwargs["model_input_names"] = list(_FED)
            model.config.save_pretrained(folder)
            if quantize is not None:
                _quantize_products(folder / _MODEL)
        else:
            _write_decoder(model, tuned.tokenizer, folder)
            if quantize is not None:
                _quantize_decoder(folder / _MODEL)
        tuned.tokenizer.save_pretrained(folder)

    def open(self, folder: Path, tuned: Tuned) -> Reader:
        """Run the graph by onnxruntime."""
        return OnnxClassifier(folder) if tuned.objective.scores_rows else OnnxDecoder(folder)


class OnnxClassifier(Reader):
    """A classifier in ONNX."""

    computed_by = "ONNX Runtime"

    def __init__(self, folder: Path) -> None:
        self.session = _session(folder)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return (classes,)."""
        ids = tokens.astype(np.int64)[None]
        found = self.session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        return np.asarray(found[0])


class OnnxDecoder(Reader):
    """A language model in ONNX with its cache: fed by ``past_key_values.N.key``, returned as ``present.N.key``."""

    computed_by = "ONNX Runtime"

    def __init__(self, folder: Path) -> None:
        self.session = _session(folder)
        self.about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        self._inputs = {node.name: node for node in self.session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._past)]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return (length, vocabulary)."""
        return self._run(tokens, self._empty(), 0)[0]

    def generate(self, prompt: np.ndarray, max_new_tokens: int) -> list[int]:
        """Answer greedily with the cache."""
        past, done, tokens, answer = self._empty(), 0, prompt, list[int]()
        while len(answer) < max_new_tokens:
            logits, past = self._run(tokens, past, done)
            done += len(tokens)
            token = int(logits[-1].argmax())
            if token in self.about["end_tokens"]:
                break
            answer.append(token)
            tokens = np.array([token])
        return answer

    def _run(
        self, tokens: np.ndarray, past: dict[str, np.ndarray], done: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        ids = tokens.astype(np.int64)[None]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, done + len(tokens)), dtype=np.int64), **past}
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.arange(done, done + len(tokens), dtype=np.int64)[None]
        logits, *present = self.session.run(self._outputs, feeds)
        return logits[0], dict(zip(self._past, present, strict=True))

    def _empty(self) -> dict[str, np.ndarray]:
        shape = (1, self.about["num_key_value_heads"], 0, self.about["head_size"])
        return {name: np.zeros(shape, dtype=np.float32) for name in self._past}


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


def _trace_classifier(model: Any, path: Path) -> None:
    ids = torch.ones((2, 7), dtype=torch.long)  # no example size may be 0 or 1: the graph would keep it
    _trace(
        _Classifier(model), (ids, torch.ones_like(ids)), ({0: _any(), 1: _any()},) * 2, path,
        input_names=list(_FED), output_names=["logits"],
    )  # fmt: skip


def _trace_decoder(model: Any, path: Path) -> None:
    """Trace a decoder: 2 rows, 3 new tokens, 4 tokens in the cache."""
    heads, size = _cache_sizes(model).values()
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

    with _quiet():
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, opset_version=_OPSET, dynamic_shapes=shapes, verbose=False, **names
        )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # it would tell where each line of code lies on this machine
        program.save(str(path), external_data=True)


def _cache_sizes(model: Any) -> dict[str, int]:
    """Return the sizes of a layer's keys and values, as a run of the model makes them: configurations name them oddly."""
    with torch.no_grad():
        cache = model(input_ids=torch.ones((1, 1), dtype=torch.long), use_cache=True).past_key_values
    _, heads, _, size = cache.layers[0].keys.shape
    return {"num_key_value_heads": heads, "head_size": size}


def _any() -> Any:
    return torch.export.Dim.DYNAMIC


def _write_decoder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Let the builder write the graph, or trace the model where that cannot be, or is not the same model.

    The builder does not know every family, fails for some shapes only when the graph runs (heads whose size is no
    multiple of 16, sliding windows), and writes some wrongly without a word (OLMo).
    """
    about = {"end_tokens": end_tokens(model, tokenizer), **_cache_sizes(model)}
    files.write_json(folder / _ABOUT, about)
    if _build(model, tokenizer, folder):
        return
    for left in folder.glob("[!.]*"):
        if left.name != _ABOUT:
            files.discard(left)
    _trace_decoder(model, folder / _MODEL)
    model.config.save_pretrained(folder)


def _build(model: Any, tokenizer: Any, folder: Path) -> bool:
    """Run the builder on a merged copy and return whether its graph computes what the model does."""
    if importlib.util.find_spec("onnxruntime_genai") is None:  # not every machine has a wheel of it
        return False
    with tempfile.TemporaryDirectory() as name:
        merged, cache = Path(name) / "merged", Path(name) / "cache"
        model.save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder"]
        options = ["-i", str(merged), "-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", str(cache)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*command, *options], capture_output=True, check=False, env=environment)
    return done.returncode == 0 and _agrees(model, folder)


def _agrees(model: Any, folder: Path) -> bool:
    """Return whether a graph gives the model's logits for a few tokens."""
    tokens = (7 * np.arange(_TRIED_TOKENS) + 3) % model.config.vocab_size
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    try:
        found = OnnxDecoder(folder).logits(tokens)
    except Exception:  # noqa: BLE001 - onnxruntime has an exception for each code
        return False
    return bool(np.abs(found - wanted).max() <= OnnxExporter.limits.logit_share * np.abs(wanted).max())


def _quantize_products(path: Path) -> None:
    """Make weights and activations of matrix products int8, the scales of activations found as it runs.

    One scale a column of weights: with one a matrix, a LoRA-tuned MiniLM chose another class for every ninth text.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as name, _quiet():
        plain = Path(name) / _MODEL
        graph = onnx.load(path)
        del graph.graph.value_info[:]  # shapes of the traced example contradict those the quantiser infers
        onnx.save(graph, plain, save_as_external_data=True, location="plain.data")
        _remove(path)
        quantize_dynamic(plain, path, weight_type=QuantType.QInt8, per_channel=True)


def _quantize_decoder(path: Path) -> None:
    """Make weights int8 in blocks of 32 with one scale each; level 4 computes in int8, thirty times as fast as without.

    Graphs whose products are not plain MatMul (GPT-2's are Gemm) have their products quantised as classifiers have.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with _quiet():
        quantizer = MatMulNBitsQuantizer(
            onnx.load(path), bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=4
        )
        quantizer.process()
    if not any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node):
        _quantize_products(path)
        return
    with _quiet():
        _remove(path)
        onnx.save(
            quantizer.model.model, path, save_as_external_data=True, location=f"{_MODEL}.data", convert_attribute=True
        )


def _remove(path: Path) -> None:
    """Take away a graph that a smaller one replaces; the folder is not an export yet."""
    for member in (path, path.with_name(f"{path.name}.data")):
        files.discard(member)


def _session(folder: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder / _MODEL), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
