"""What keeps a model near where it started, so that less is forgotten: penalties beside the objective's loss.

Their gradients are added once a step, before the gradient is clipped; the loss that is logged stays the objective's own,
and each penalty is logged beside it without its factor. The start is always that of the whole run: a resumed one takes it
from the base, not from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tune_magic.data.locate import source_name
from tune_magic.data.table import Table
from tune_magic.errors import TuneError
from tune_magic.models.layers import heads_of
from tune_magic.objectives.base import Objective
from tune_magic.objectives.divergence import divergence
from tune_magic.recipe.schema import Recipe, RetainOptions
from tune_magic.training import fisher
from tune_magic.training.beside import BASE
from tune_magic.training.engine import Engine, TokenEngine

_ADAPTER = "default"  # PEFT's name of the only one


@dataclass
class _Weight:
    """A trained parameter, where it started, and what half its squared distance is multiplied by: a number of each weight."""

    parameter: torch.nn.Parameter
    start: torch.Tensor
    importance: torch.Tensor | None = None

    def pull(self, factor: float) -> float:
        """Add the gradient to the parameter's; returns half the squared distance."""
        distance = self.parameter.detach() - self.start
        weighted = distance if self.importance is None else distance * self.importance
        value = 0.5 * float((distance * weighted).sum(dtype=torch.float64))
        _add(self.parameter, factor * weighted)
        return value


@dataclass
class _Update:
    """A LoRA update s (B A - B0 A0), which is how far the layer's weights are from their start.

    Attributes:
        a: (r, inputs).
        b: (outputs, r).
        start: A0 and B0, None where their product is nothing.
        scale: s.
    """

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    start: tuple[torch.Tensor, torch.Tensor] | None
    scale: float

    def pull(self, factor: float) -> float:
        """Add the gradients; returns half the squared Frobenius norm, by products of the rank's size alone."""
        a, b, rank = self.a.detach().float(), self.b.detach().float(), len(self.a)
        if self.start is not None:
            a, b = torch.cat([a, self.start[0]]), torch.cat([b, -self.start[1]], dim=1)
        of_a, of_b = a @ a.T, b.T @ b
        value = 0.5 * self.scale**2 * float((of_a * of_b).sum(dtype=torch.float64))
        _add(self.a, factor * self.scale**2 * (of_b @ a)[:rank])
        _add(self.b, factor * self.scale**2 * (b @ of_a)[:, :rank])
        return value


class Retention:
    """The penalties of a run.

    Args:
        options: The recipe's, at least one of them asked for.
        engine: Of the model as it is before training.
        task: PEFT's name of the task.
        importance: The Fisher diagonal of each trained parameter by name, for `ewc`.
    """

    def __init__(
        self, options: RetainOptions, engine: Engine, task: str, importance: dict[str, torch.Tensor] | None = None
    ) -> None:
        self.options = options
        self._near: list[_Weight | _Update] = []
        self._important: list[_Weight] = []
        trained = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
        if options.l2_sp:
            updates = _updates(engine.model)
            heads = {id(p) for head in heads_of(engine.inner, task) for p in head.parameters()}
            known = heads | {id(p) for update in updates for p in (update.a, update.b)}
            self._near = [*updates, *(_Weight(p, p.detach().clone()) for p in trained.values() if id(p) not in known)]
        if importance is not None:
            self._important = [_Weight(p, p.detach().clone(), importance[name]) for name, p in trained.items()]

    def terms(self, states: Any) -> dict[str, torch.Tensor]:
        """Return the sums over a microbatch's targets of what depends on predictions, by name, without factors."""
        if not self.options.kl_base:
            return {}
        apart = states.compared(BASE, lambda logits, _, theirs: divergence(logits, theirs, "forward_kl"))
        return {"kl_base": (apart * states.weights).sum()}

    def factor(self, name: str) -> float:
        """Return the factor of a penalty."""
        return float(getattr(self.options, name))

    def pull(self) -> dict[str, float]:
        """Add the gradients of what depends on weights; returns their values by name, without factors."""
        parts = (("l2_sp", self._near), ("ewc", self._important))
        return {name: sum(one.pull(self.factor(name)) for one in ones) for name, ones in parts if ones}


def retain(
    recipe: Recipe, folder: Path, engine: Engine, objective: Objective, *, rows: Callable[[str], Table],
    look: Callable[[], None],
) -> Retention | None:  # fmt: skip
    """Return the penalties a recipe asks for, None where it asks for none; the model is as it is before training.

    Args:
        recipe: Asks for them.
        folder: The run folder, which keeps what `ewc` computed.
        engine: Of the model.
        objective: Says how likely rows are.
        rows: Reads and encodes the rows behind a reference.
        look: Called now and then; may raise to break off.

    Raises:
        TuneError: `kl_base` where there is no language model, `ewc` where the loss compares rows, or an earlier task
            without rows.
    """
    options = recipe.retain
    if not (options.l2_sp or options.ewc or options.kl_base):
        return None
    if options.kl_base and not isinstance(engine, TokenEngine):
        raise TuneError(
            "`kl_base` keeps predictions of tokens, and this objective predicts none.",
            hint="`retain: {l2_sp: 0.01}` keeps the weights near their start instead.",
        )
    if options.ewc and objective.fewest_rows > 1:
        raise TuneError(
            "`ewc` weighs weights by the loss of each row alone, and this loss compares rows: of one alone it is nothing.",
            hint="`retain: {l2_sp: 0.01}` keeps the weights near their start instead.",
        )
    importance = None
    if options.ewc:
        importance = fisher.read(folder, engine.device)
        if importance is None:
            assert options.ewc_data is not None
            earlier = fisher.draw(rows(options.ewc_data), options.ewc_rows, recipe.seed)
            importance = fisher.fisher(engine, objective, earlier, look)
            fisher.write(folder, importance)
    return Retention(options, engine, objective.task, importance)


def roles(options: RetainOptions) -> list[str]:
    """Return the models that penalties compare with."""
    return [BASE] if options.kl_base else []


def facts(options: RetainOptions) -> dict[str, Any]:
    """Return what a plan says of the penalties, JSON-ready; nothing where there are none."""
    found: dict[str, Any] = {
        name: getattr(options, name) for name in ("l2_sp", "ewc", "kl_base") if getattr(options, name)
    }
    if options.ewc and options.ewc_data is not None:
        found["ewc_data"] = source_name(options.ewc_data)
    return {"retain": found} if found else {}


def _updates(model: Any) -> list[_Update]:
    """Return the updates of a model's LoRA layers; DoRA's, which also scale columns, count weight by weight."""
    from tune_magic.models.lean_peft import peft

    layer = peft.tuners.lora.layer.LoraLayer
    found = []
    for module in model.modules():
        if isinstance(module, layer) and _ADAPTER in module.lora_A and not module.use_dora.get(_ADAPTER):
            a, b = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
            if a.ndim == b.ndim == 2 and a.requires_grad and b.requires_grad:
                start = (a.detach().float().clone(), b.detach().float().clone()) if bool(b.any()) else None
                found.append(_Update(a, b, start, float(module.scaling[_ADAPTER])))
    return found


def _add(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """Add to a parameter's gradient; what a step does not train gets none, or the optimizer would move it."""
    if not parameter.requires_grad:
        return
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
