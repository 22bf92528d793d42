"""The merge job: a run that was not trained but made of the adapters of runs."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tune_magic.errors import TuneError
from tune_magic.recipe.combination import Combination
from tune_magic.storage import fingerprint
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training import checkpoint
from tune_magic.training.prepare import build_model, device
from tune_magic.training.stack import Stack
from tune_magic.training.tuned import Tuned, recipe_of

STEP = 0  # of the checkpoint: nothing was trained
_NAME = "merged"
_TRIED_TOKENS = 16
_TOLERANCE = 1e-3  # of the largest logit


def merge(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Combine, write a checkpoint like any run's, check that it computes what was combined; return the last state.

    Raises:
        TuneError: The runs cannot be combined, or what the recipe says is not what came out.
    """
    log.append("state", state="running")
    about = job.info["merge"]
    sources = {source["name"]: RunFolder(source["path"]) for source in about["sources"]}
    stack = Stack(sources)
    for source in about["sources"]:
        if stack.tuned(source["name"]).step != source["step"]:
            raise TuneError(
                f"{source['name']} has a better checkpoint than when the merge was asked for.",
                hint="Merge again, best when it has finished.",
            )
    control.check()
    name = _NAME + "_" * max(map(len, sources))  # no source is called so
    facts = stack.combine(name, Combination(**about["combination"]))
    tuned = stack.switch(name)
    made = {key: parameter.detach().clone() for key, parameter in stack.parameters(name).items()}
    wanted = _logits(tuned)
    first = stack.tuned(stack.first)
    plan = sources[stack.first].summary().plan
    del stack, tuned
    first.model = None
    gc.collect()
    control.check()
    model = _model(job, first, made)
    _compare(wanted, _logits(replace(first, run=job, recipe=recipe_of(job), model=model)))
    if STEP not in checkpoint.steps(job.path / "checkpoints"):
        checkpoint.save(
            job.path / "checkpoints", model, torch.optim.AdamW(model.parameters()), checkpoint.Progress(STEP),
            checkpoint.random_state(),
        )  # fmt: skip
    parameters = list(model.parameters())
    kept = ("model", "fingerprints", "data_files", "objective")
    log.append(
        "plan",
        **{key: plan[key] for key in kept if key in plan},
        recipe=recipe_of(job).normalised(),
        versions=fingerprint.versions(),
        identity=job.info.get("identity"),
        parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
    )
    log.append("checkpoint", step=STEP, name=checkpoint.name_of(STEP), best=True, seconds=0.0)
    log.append("result", **facts)
    return {"state": "finished", "step": STEP}


def _model(job: RunFolder, first: Tuned, made: dict[str, torch.Tensor]) -> Any:
    """Return the model as whoever loads the run will build it, with what was combined in it.

    Raises:
        TuneError: The recipe trains other parameters.
    """
    recipe = recipe_of(job)
    method = type(first.method)(recipe.method)
    model = build_model(recipe, first.base, first.objective, method, torch.float32, vocabulary=first.vocabulary)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in own.items()} != {name: tensor.shape for name, tensor in made.items()}:
        raise TuneError(
            "The layers of these adapters cannot be named by one recipe.",
            hint="Train them with the same `target_modules`; `tune_magic.stack(...).combine(...)` works as they are.",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(made[name])
    return model.to(device()).eval()


@torch.no_grad()
def _logits(tuned: Tuned) -> torch.Tensor:
    """Return a language model's logits for a few tokens."""
    size = len(tuned.model.get_input_embeddings().weight)
    tokens = torch.from_numpy((7 * np.arange(_TRIED_TOKENS) + 3) % size)[None].to(device())
    found: torch.Tensor = tuned.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return found.cpu()


def _compare(wanted: torch.Tensor, found: torch.Tensor) -> None:
    apart, largest = float((wanted - found).abs().max()), float(wanted.abs().max())
    if not apart <= _TOLERANCE * largest:
        raise TuneError(
            f"The merged run would not be what was combined: logits differ by {apart:.2g}, the largest is {largest:.2g}."
        )
