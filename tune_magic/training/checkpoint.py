"""Checkpoints: written whole or not at all, checked before they are trusted, never pickled.

step-N/
  trainable.safetensors   the trained parameters by name; their average, where one is kept
  optimizer.safetensors   <state>/<parameter>; beside an average, raw/<parameter> is what training goes on with
  random.safetensors      state of each random number generator
  state.json              step, best evaluation, early stopping
  manifest.json           SHA-256 and size of each file above
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tune_magic import files
from tune_magic.errors import CheckpointError
from tune_magic.training import optimizer as optim
from tune_magic.training.average import Average

FORMAT = 1
_ROOM_BYTES = 64 << 20  # that a checkpoint leaves free: the log must go on
_PREFIX = "step-"
_RAW = "raw/"
_MEMBERS = frozenset({"trainable.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"})


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint.

    Attributes:
        step: Last completed optimizer step.
        evaluated_step: Last step after which held-out rows were evaluated, -1 before the first.
        best_step: Step with the lowest held-out loss, None before the first evaluation after training began.
        best_loss: That loss.
        evaluations_without_gain: For early stopping: scheduled ones, since the loss was last lower by its threshold.
        scheduled_best: The lowest loss of scheduled evaluations, which a budget's end adds none to.
        tokens: Tokens computed so far.
        microbatch_tokens: Most tokens computed at once, when memory did not suffice for what the plan says; else None.
        plateau: For `reduce_lr_on_plateau`, the fields of `optimizer.Plateau`; empty before the first evaluation.
        callbacks: State of each callback by name.
        ended_by: Name of the callback that ended the run at this step, None where none did.
    """

    step: int = 0
    evaluated_step: int = -1
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_gain: int = 0
    scheduled_best: float | None = None
    tokens: int = 0
    microbatch_tokens: int | None = None
    plateau: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    ended_by: str | None = None


def name_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"{_PREFIX}{step}"


def save(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    random_state: Any,
    *,
    average: Average | None = None,
) -> Path:
    """Write ``folder/step-N`` and return it.

    Args:
        folder: The run's checkpoints.
        model: With the trained parameters.
        optimizer: Its state is saved too.
        progress: Where the run stands.
        random_state: What `random_state` returned.
        average: Of the trained parameters, where one is kept: what readers take for the model.

    Raises:
        CheckpointError: A parameter is not finite: such a state is never saved.
        OSError: Nothing was left behind.
    """
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    raw = {} if average is None else {f"{_RAW}{name}": tensor for name, tensor in trainable.items()}
    for name, parameter in trainable.items():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"The parameter {name} is not finite after step {progress.step}.")
    names = {id(p): name for name, p in model.named_parameters()}
    state = optim.state_tensors(optimizer, names) | raw
    if average is not None:
        trainable = average.tensors
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*trainable.values(), *state.values()))
    files.ensure_room(folder.parent, size_bytes + _ROOM_BYTES)
    target = folder / name_of(progress.step)
    with files.new_folder(target) as temporary:
        _save_tensors(temporary / "trainable.safetensors", trainable)
        _save_tensors(temporary / "optimizer.safetensors", state)
        _save_tensors(temporary / "random.safetensors", random_state)
        files.write_json(temporary / "state.json", vars(progress))
        members = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
        files.write_json(temporary / "manifest.json", {"format": FORMAT, "step": progress.step, "files": members})
    return target


def restore(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    average: Average | None = None,
) -> Progress:
    """Put a checkpoint's parameters (and, for training, optimizer, random state and average) back.

    With an optimizer and an average, the parameters are those that training goes on with; otherwise the average, if the
    run kept one.

    Raises:
        CheckpointError: It is damaged, or was made by another recipe.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    restore_parameters(path, parameters if average is None else average.tensors)
    if optimizer is not None:
        state = _load_tensors(path / "optimizer.safetensors")
        raw = {name.removeprefix(_RAW): state.pop(name) for name in list(state) if name.startswith(_RAW)}
        if average is not None:
            if raw.keys() != parameters.keys():
                raise CheckpointError(f"{path.name} holds no average of this recipe's parameters.")
            _copy(raw, parameters)
        optim.load_state_tensors(optimizer, model, state)
        set_random_state(_load_tensors(path / "random.safetensors"))
    return Progress(**json.loads((path / "state.json").read_text(encoding="utf-8")))


def restore_parameters(path: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Put a checkpoint's parameters into those of a model, by the names they were trained under.

    Raises:
        CheckpointError: It is damaged, or holds others.
    """
    verify(path)
    saved = _load_tensors(path / "trainable.safetensors")
    if saved.keys() != parameters.keys():
        raise CheckpointError(f"{path.name} holds other parameters than this recipe trains.")
    _copy(saved, parameters)


@torch.no_grad()
def _copy(tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: Saying which file is missing, cut, changed, or leads out of the folder.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        members = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} has no readable manifest.") from error
    if members.keys() != _MEMBERS:
        raise CheckpointError(f"{path.name} does not list the files of a checkpoint.")
    for name, described in members.items():
        try:
            member = files.inside(path, name)
            if member.is_symlink() or _describe(member) != described:
                raise CheckpointError(f"{path.name}: {name} is not what was written.")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path.name}: {name} cannot be read ({error}).") from error


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint with a manifest, in order, without reading the files."""
    names = [path.name for path in folder.glob(f"{_PREFIX}*") if (path / "manifest.json").is_file()]
    return sorted(int(name[len(_PREFIX) :]) for name in names if name[len(_PREFIX) :].isdigit())


def latest_valid(folder: Path) -> tuple[int | None, list[tuple[int, str]]]:
    """Return the newest step whose checkpoint is whole, and ``(step, reason)`` of the newer ones that are not."""
    rejected = []
    for step in reversed(steps(folder)):
        try:
            verify(folder / name_of(step))
        except CheckpointError as error:
            rejected.append((step, error.message))
        else:
            return step, rejected
    return None, rejected


def retain(folder: Path, *, limit: int, protected: set[int], own: set[int]) -> list[int]:
    """Delete the oldest checkpoints beyond the `limit` newest and return their steps.

    Args:
        folder: The run's checkpoints.
        limit: How many of the newest to keep.
        protected: Steps that stay: the best, and those another run started from.
        own: Steps this run's log says it saved; nothing else is ever touched.
    """
    candidates = steps(folder)[:-limit]
    removed = [step for step in candidates if step in own and step not in protected]
    for step in removed:
        files.discard(folder / name_of(step))
    return removed


def random_state() -> dict[str, torch.Tensor]:
    """Return the state of Python's, NumPy's and torch's generators as tensors."""
    python = random.getstate()
    numpy = np.random.get_state()
    state = {
        "python": torch.tensor(python[1], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if python[2] is None else python[2]], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy[1].astype(np.int64)),  # type: ignore[index, union-attr, unused-ignore]
        "numpy_rest": torch.tensor([numpy[2], numpy[3], numpy[4]], dtype=torch.float64),  # type: ignore[index, unused-ignore]
        "torch": torch.get_rng_state(),
    }
    for index in range(torch.cuda.device_count()):
        state[f"cuda_{index}"] = torch.cuda.get_rng_state(index)
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `random_state` returned; what it says of devices that are not here is passed over."""
    gauss = float(state["python_gauss"][0])
    random.setstate((3, tuple(state["python"].tolist()), None if math.isnan(gauss) else gauss))
    place, has_gauss, cached = state["numpy_rest"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(place), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda_{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda_{index}"], index)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        files.produce(path, lambda temporary: save_file(plain, temporary))
    except SafetensorError as error:  # the library's word for a full disk
        raise OSError(f"{path.name}: {error}") from error


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.parent.name}: {path.name} cannot be read.") from error


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "size_bytes": path.stat().st_size}
