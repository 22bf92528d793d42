"""What a model reads that is no text: images and recordings, brought to the form it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune_magic.errors import ModelError

_FILE = "preprocessor_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
_POSITIONS = 256  # that an image counts for where the model does not say


class Processor:
    """Stands where a tokenizer stands for other models; a model of images or sound has none.

    Args:
        folder: The model.

    Attributes:
        own: Transformers' image processor or feature extractor.
        num_positions: Positions of the model that an image takes.

    Raises:
        ModelError: The folder's own cannot be loaded.
    """

    reads_texts = False
    chat_template = None
    is_fast = False
    eos_token_id = pad_token_id = bos_token_id = None
    special_tokens_map: dict[str, str] = {}  # noqa: RUF012 - as tokenizers have it

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor

        self.about = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        kind = AutoFeatureExtractor if "feature_extractor_type" in self.about else AutoImageProcessor
        try:
            self.own: Any = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"What prepares images or sound for the model in {folder} cannot be loaded.") from error
        size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        is_known = isinstance(size, int) and isinstance(patch, int)
        self.num_positions: int = (size // patch) ** 2 + 1 if is_known else _POSITIONS  # type: ignore[operator]

    def __len__(self) -> int:
        return 0

    def __call__(self, *texts: Any, **options: Any) -> Any:
        """Refuse texts.

        Raises:
            ModelError: Always.
        """
        raise ModelError("The model has no tokenizer: it reads images or recordings.", hint="Take a model of language.")

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        """Return what stands for an image or a recording where texts are shown."""
        return "[not a text]" if len(tokens) else ""

    def get_vocab(self) -> dict[str, Any]:
        """Return what tells this processor from another."""
        return {"processor": json.dumps(self.about, sort_keys=True)}

    def save_pretrained(self, folder: Path) -> None:
        """Write it as Transformers does."""
        self.own.save_pretrained(folder)


def reads_texts(folder: Path) -> bool:
    """Return whether a model has a tokenizer, or at least nothing else that prepares what it reads."""
    return not (folder / _FILE).is_file() or any((folder / name).is_file() for name in _TOKENIZER_FILES)
