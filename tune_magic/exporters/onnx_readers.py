"""Graphs of ONNX, asked as the models they were written from: by onnxruntime, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tune_magic.exporters.onnx_session import Settings
from tune_magic.exporters.parity import Reader

MODEL = "model.onnx"
ABOUT = "decoder.json"  # what a program needs to know to feed the cache and to stop


class OnnxClassifier(Reader):
    """A classifier in ONNX."""

    computed_by = "ONNX Runtime"

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        self.session = (settings or Settings.of(folder)).open(folder / MODEL)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return (classes,)."""
        ids = tokens.astype(np.int64)[None]
        found = self.session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        return np.asarray(found[0])


class OnnxDecoder(Reader):
    """A language model in ONNX with its cache: fed by ``past_key_values.N.key``, returned as ``present.N.key``.

    Args:
        folder: Graph, weights, and what feeds the cache.
        adapter: A file of one run's matrices, put on in every call.
        settings: How the session is opened; default: as the folder says.
    """

    computed_by = "ONNX Runtime"
    writes = True

    def __init__(self, folder: Path, adapter: Path | None = None, settings: Settings | None = None) -> None:
        self.session = (settings or Settings.of(folder)).open(folder / MODEL)
        self._options: Any = None
        if adapter is not None:
            self._options, self._adapter = _with_adapter(adapter)
        self.about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
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
        logits, *present = self.session.run(self._outputs, feeds, self._options)
        return logits[0], dict(zip(self._past, present, strict=True))

    def _empty(self) -> dict[str, np.ndarray]:
        shape = (1, self.about["num_key_value_heads"], 0, self.about["head_size"])
        return {name: np.zeros(shape, dtype=np.float32) for name in self._past}


def _with_adapter(path: Path) -> tuple[Any, Any]:
    """Return options of a call that puts an adapter on, and the adapter, which must live as long."""
    import onnxruntime

    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(path))
    options.add_active_adapter(adapter)
    return options, adapter
