"""ONNX Runtime GenAI: a folder with graph, tokenizer and how to generate, run and measured by onnxruntime-genai itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.exporters.base import Exporter
from tune_magic.exporters.limits import EIGHT_BITS, FOUR_BITS
from tune_magic.exporters.onnx_build import CONFIG, agrees, build, is_installed
from tune_magic.exporters.parity import Reader
from tune_magic.training.tuned import Tuned


class GenaiExporter(Exporter):
    """What `onnxruntime_genai.Model(folder)` loads."""

    quantizations: ClassVar = {"int8": EIGHT_BITS, "int4": FOUR_BITS}
    devices: ClassVar = ("cpu", "cuda")

    def write(self, folder: Path, tuned: Tuned, quantize: str | None) -> None:
        """Let the builder write the folder, weights in blocks of 32 when they have fewer bits."""
        if tuned.objective.engine != "tokens" or tuned.objective.scores_rows:
            raise TuneError(
                "Only runs that write texts are written for ONNX Runtime GenAI.", hint="Export it with `--to onnx`."
            )
        if not is_installed():
            raise TuneError(
                "`--to genai` needs onnxruntime-genai, which is not installed.", hint="pip install onnxruntime-genai"
            )
        self._check_device()
        model = tuned.method.merge(tuned.model).cpu().eval()
        problem = build(model, tuned.tokenizer, folder, quantize or "fp32", device=self.device or "cpu")
        family = model.config.model_type
        if problem is not None:
            raise TuneError(
                f"ONNX Runtime GenAI's builder cannot write this `{family}` model: {problem}",
                hint="Export it with `--to onnx`, which traces it.",
            )
        if quantize is None and not agrees(model, lambda: GenaiReader(folder)):
            raise TuneError(
                f"What ONNX Runtime GenAI's builder wrote of this `{family}` model does not run, or is another model.",
                hint="Export it with `--to onnx`, which traces it.",
            )

    def open(self, folder: Path, tuned: Tuned) -> Reader:
        """Run the folder by onnxruntime-genai."""
        return GenaiReader(folder)

    def tune_session(self, folder: Path, tuned: Tuned, examples: Sequence[Example]) -> dict[str, Any]:
        """Say what computes; the folder's own configuration says how."""
        why = "no device was named" if self.device is None else f"`{self.device}` was asked for"
        offered = ["cpu", *(["cuda"] if _has_cuda() else [])]
        return {"provider": self.device or "cpu", "why": why, "offered": offered, "tried": []}

    def _check_device(self) -> None:
        if self.device == "cuda" and not _has_cuda():
            raise TuneError(
                "onnxruntime-genai has no CUDA here.", hint="pip install onnxruntime-genai-cuda brings it, with a GPU."
            )


def _has_cuda() -> bool:
    import onnxruntime_genai as og

    return bool(og.is_cuda_available())


class GenaiReader(Reader):
    """A folder of ONNX Runtime GenAI, asked through its own generator."""

    computed_by = "ONNX Runtime GenAI"
    writes = True

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai as og

        self.model = og.Model(str(folder))
        self.end_tokens = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]["eos_token_id"]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return (length, vocabulary)."""
        generator = self._generator(len(tokens) + 1)
        generator.append_tokens(tokens.astype(np.int32))
        return np.asarray(generator.get_output("logits")[0], dtype=np.float32)

    def generate(self, prompt: np.ndarray, max_new_tokens: int) -> list[int]:
        """Answer greedily."""
        generator = self._generator(len(prompt) + max_new_tokens)
        generator.append_tokens(prompt.astype(np.int32))
        answer: list[int] = []
        while not generator.is_done() and len(answer) < max_new_tokens:
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self.end_tokens:
                break
            answer.append(token)
        return answer

    def _generator(self, max_length: int) -> Any:
        import onnxruntime_genai as og

        options = og.GeneratorParams(self.model)
        options.set_search_options(max_length=max_length, do_sample=False)
        return og.Generator(self.model, options)
