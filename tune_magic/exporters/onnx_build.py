"""ONNX Runtime GenAI's builder: a language model's graph in seconds, for onnxruntime-genai and for plain onnxruntime.

It does not know every family, fails for some shapes only when the graph runs (heads whose size is no multiple of 16, sliding
windows), and writes some wrongly without a word (OLMo): what it wrote is asked before it is trusted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tune_magic import files
from tune_magic.exporters.parity import Limits, Reader
from tune_magic.models.generate import end_tokens

CONFIG = "genai_config.json"
_TRIED_TOKENS = 24
_LAST_LINES = 3


def is_installed() -> bool:
    """Return whether the builder is there; not every machine has a wheel of it."""
    return importlib.util.find_spec("onnxruntime_genai") is not None


def build(
    model: Any, tokenizer: Any, folder: Path, precision: str = "fp32", *, adapter: Path | None = None, device: str = "cpu"
) -> str | None:  # fmt: skip
    """Run the builder on a copy of a model, in a process of its own.

    Args:
        model: A language model of Transformers, without anything of PEFT's.
        tokenizer: Its tokenizer.
        folder: Where the graph goes.
        precision: ``fp32``, ``fp16``, ``int8`` or ``int4``, the last two of weights alone.
        adapter: An adapter in PEFT's format whose matrices stay beside those of the model.
        device: ``cpu`` or ``cuda``, for which operators are chosen.

    Returns:
        The last lines of what went wrong; None when it is done.
    """
    with tempfile.TemporaryDirectory() as name:
        plain, cache = Path(name) / "model", Path(name) / "cache"
        model.save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder"]
        options = ["-i", str(plain), "-o", str(folder), "-p", precision, "-e", device, "-c", str(cache)]
        extra = [] if adapter is None else ["--extra_options", f"adapter_path={adapter}"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([*command, *options, *extra], capture_output=True, check=False, env=environment)
    if done.returncode != 0:
        return " ".join(done.stderr.decode(errors="replace").strip().splitlines()[-_LAST_LINES:])
    _name_ends(folder / CONFIG, end_tokens(model, tokenizer))
    return None


def agrees(model: Any, open_it: Callable[[], Reader], share: float = Limits.logit_share) -> bool:
    """Return whether what was written runs, and gives the model's logits for a few tokens within a share of the largest."""
    tokens = (7 * np.arange(_TRIED_TOKENS) + 3) % model.config.vocab_size
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    try:
        found = open_it().logits(tokens)
    except Exception:  # noqa: BLE001 - onnxruntime has an exception for each code
        return False
    return bool(np.abs(found - wanted).max() <= share * np.abs(wanted).max())


def _name_ends(path: Path, ends: list[int]) -> None:
    """Let answers end where those of the tuned model do; the builder looks at the base's configuration alone."""
    about = json.loads(path.read_text(encoding="utf-8"))
    about["model"]["eos_token_id"] = ends
    files.write_json(path, about)
