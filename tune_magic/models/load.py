"""Load tokenizer and model. Safetensors only; code from a model's folder is never run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tune_magic import files
from tune_magic.errors import ModelError
from tune_magic.models.find import ModelSource, download
from tune_magic.storage import fingerprint, places


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While inside, Transformers shows no progress bars, and warnings meant for developers of libraries are dropped."""
    from transformers.utils import logging

    shows_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that a head is new is what was asked for
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def local_folder(source: ModelSource) -> Path:
    """Return a folder in Transformers' format: downloaded or converted when needed, once."""
    path = source.path or download(source)
    return convert_gguf(path) if path.suffix == ".gguf" else path


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer; one without a padding token pads with its end token.

    Raises:
        ModelError: The folder has none that Transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The tokenizer in {folder} cannot be loaded.") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(folder: Path, dtype: Any) -> Any:
    """Load a decoder language model in `dtype` (a torch dtype).

    Raises:
        ModelError: No safetensors, an unknown architecture, or not a language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The model in {folder} cannot be loaded as a language model.") from error


_HEADS = {
    "SequenceClassification": "as a classifier",
    "TokenClassification": "with a head on every token",
    "QuestionAnswering": "to find answers in texts",
    "Seq2SeqLM": "as an encoder and decoder",
    "ImageClassification": "as a classifier of images",
    "AudioClassification": "as a classifier of recordings",
    "": "as a backbone",
}


def load_classifier(folder: Path, dtype: Any, classes: Sequence[str]) -> Any:
    """Load an encoder or decoder with a head of one output a class; see `load_head`."""
    return load_head(folder, dtype, "SequenceClassification", classes, "single_label_classification")


def load_head(folder: Path, dtype: Any, kind: str, outputs: Sequence[str] = (), problem: str | None = None) -> Any:
    """Load a model with a head of a kind; the head is new unless the folder has such a one.

    Args:
        folder: The model.
        dtype: A torch dtype.
        kind: What follows `AutoModelFor` in Transformers; empty for none.
        outputs: Names of the head's outputs, where it has some of its own.
        problem: Transformers' `problem_type`.

    Raises:
        ModelError: No safetensors, or an architecture without such a head.
    """
    import transformers

    names = dict(enumerate(outputs))
    labels: dict[str, Any] = {"id2label": names, "label2id": {name: n for n, name in names.items()}} if names else {}
    auto = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **labels
            )
            if problem is not None:
                config.problem_type = problem
            if kind != "Seq2SeqLM":
                config.use_cache = False  # a row is read once
            if kind == "SequenceClassification" and config.pad_token_id is None:
                config.pad_token_id = load_tokenizer(folder).pad_token_id  # by it a decoder finds a row's last token
            return auto.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=False, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The model in {folder} cannot be loaded {_HEADS[kind]}.") from error


def convert_gguf(path: Path) -> Path:
    """Dequantise a GGUF file to float32 safetensors in the user's cache, once, and return the folder."""
    target = places.cache_folder() / "models" / f"{path.stem.lower()}-{fingerprint.of_file(path)[:12]}"
    if (target / "config.json").is_file():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    dequantised = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    config = dequantised.config
    del config.quantization_config  # Transformers refuses to save what it takes for quantised
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(dequantised.state_dict())
    files.make_folder(target.parent)
    with contextlib.suppress(FileExistsError), files.new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target
