"""Load a tuned model: base, method, and a run's best checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tune_magic import plugins
from tune_magic.data.render import Renderer
from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.models.find import find_model
from tune_magic.models.generate import generate
from tune_magic.models.load import load_causal_lm, load_tokenizer, local_folder
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.schema import Recipe
from tune_magic.storage import fingerprint
from tune_magic.storage.folder import RunFolder
from tune_magic.training import checkpoint
from tune_magic.training.prepare import device

Chat = list[dict[str, str]]


def recipe_of(run: RunFolder) -> Recipe:
    """Return the recipe of a run."""
    return build_recipe(run.info["recipe"])


def check_unchanged(run: RunFolder, role: str, now: str) -> None:
    """Refuse to go on with other data or another model than the run was trained with.

    Raises:
        TuneError: The fingerprint of `role` is not the one in the run's plan.
    """
    if run.summary().plan["fingerprints"].get(role) != now:
        raise TuneError(f"The {role} of {run.name or run.id} has changed since it was trained.",
                        hint="Put it back as it was, or name other rows with `--data`." if role != "model" else None)  # fmt: skip


def base_folder(recipe: Recipe) -> Path:
    """Return the folder of a recipe's base model."""
    return local_folder(find_model(recipe.model))


def load_tuned(run: RunFolder, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Method]:
    """Return (model, tokenizer, method) of the run's best checkpoint, in evaluation mode.

    Raises:
        TuneError: The run has no whole checkpoint, or its base model is gone.
    """
    path = run.best_checkpoint
    checkpoint.verify(path)
    recipe = recipe_of(run)
    folder = base_folder(recipe)
    check_unchanged(run, "model", fingerprint.of_model(find_model(recipe.model).path or folder))
    method: Method = plugins.get("method", recipe.method.name)(recipe.method)
    base = load_causal_lm(folder, dtype)
    base.name_or_path = recipe.model  # what an exported adapter calls its base: the user's name, not a path of ours
    model = method.apply(base)
    checkpoint.restore(path, model)
    model.to(device()).eval()
    return model, load_tokenizer(folder), method


def answer(run: RunFolder, prompts: Sequence[str | Chat], max_new_tokens: int) -> list[str]:
    """Answer user messages, or chats that end with one, with the run's best checkpoint."""
    model, tokenizer, _ = load_tuned(run)
    recipe = recipe_of(run)
    renderer = Renderer(tokenizer, chat_template=recipe.data.chat_template, max_length=recipe.max_length)
    encoded = [np.asarray(renderer.prompt_tokens(prompt), dtype=np.int32) for prompt in prompts]
    return generate(model, tokenizer, encoded, max_new_tokens=max_new_tokens)
