"""The optimizer, and the learning rate, a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tune_magic.methods.base import Method
from tune_magic.objectives.base import Objective
from tune_magic.recipe.schema import Recipe
from tune_magic.training.lion import Lion

_FACTOR = "factor"  # of the learning rate, in a parameter group
_PLATEAU_THRESHOLD = 1e-4  # share by which a loss must be lower to be better, as in torch
_STATES = {
    "adamw": 2, "sgd": 1, "adafactor": 0, "lion": 1, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1,
}  # fmt: skip
_LEAST_8BIT = 4096  # bitsandbytes keeps the states of smaller parameters in float32
_BLOCK = 256  # numbers of an 8-bit state that share a scale
_CONSTANT = ("qmap1", "qmap2")  # what 8 bits stand for; the same for all


def make_optimizer(
    model: torch.nn.Module, recipe: Recipe, method: Method, objective: Objective | None = None
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the trainable parameters.

    That is AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), SGD with momentum, Adafactor (Shazeer and Stern 2018,
    arXiv:1804.04235), Lion, or AdamW or Lion with 8-bit states (Dettmers et al. 2022, arXiv:2110.02861). Biases and
    norms are not decayed. Parameters whose learning rates method or objective tell apart are groups of their own.
    """
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            beside = 1.0 if objective is None else objective.learning_rate_factor(name)
            key = (
                parameter.ndim < 2 and not getattr(parameter, "is_matrix", False),
                method.learning_rate_factor(name) * beside,
            )
            groups.setdefault(key, []).append(parameter)
    ordered = [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else recipe.weight_decay, _FACTOR: key[1]}
        for key in sorted(groups)
    ]
    rate, betas = recipe.learning_rate, (recipe.adam_beta1, recipe.adam_beta2)
    match recipe.optim:
        case "sgd":
            return torch.optim.SGD(ordered, lr=rate, momentum=recipe.adam_beta1, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(ordered, lr=rate)
        case "lion":
            return Lion(ordered, lr=rate, betas=betas)
        case "lion_8bit" | "adamw_8bit" | "paged_adamw_8bit":
            return _by_bitsandbytes(ordered, recipe)
        case _:
            return torch.optim.AdamW(ordered, lr=rate, betas=betas, eps=recipe.adam_epsilon, fused=True)


def _by_bitsandbytes(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """Return an optimizer with 8-bit states; on a CPU there is nothing to page to, so those stay where they are."""
    from bitsandbytes import optim

    rate, betas = recipe.learning_rate, (recipe.adam_beta1, recipe.adam_beta2)
    found: torch.optim.Optimizer
    if recipe.optim == "lion_8bit":
        found = optim.Lion8bit(groups, lr=rate, betas=betas)
    else:
        is_paged = recipe.optim.startswith("paged") and all(p.is_cuda for group in groups for p in group["params"])
        found = optim.AdamW8bit(groups, lr=rate, betas=betas, eps=recipe.adam_epsilon, is_paged=is_paged)
    return found


def state_sizes(recipe: Recipe, model: torch.nn.Module) -> list[int]:
    """Return the bytes of each tensor that the recipe's optimizer will hold beside a model's trainable parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [_state_size(parameter, recipe.optim) for parameter in trained for _ in range(_STATES[recipe.optim])]


def held_bytes(recipe: Recipe, model: torch.nn.Module) -> int:
    """Return the bytes held beside a model's trainable parameters: the optimizer's states, and an average."""
    averages = (p.nbytes for p in model.parameters() if p.requires_grad and recipe.ema_decay is not None)
    return sum(state_sizes(recipe, model)) + sum(averages)


def _state_size(parameter: torch.nn.Parameter, name: str) -> int:
    count = parameter.numel()
    if not name.endswith("_8bit"):
        return parameter.nbytes
    return 4 * count if count < _LEAST_8BIT else count + 4 * math.ceil(count / _BLOCK)


def learning_rate(step: int, total_steps: int, recipe: Recipe, reductions: int = 0) -> float:
    """Return the learning rate of a step, counted from 1.

    It rises linearly over the warm-up, reaching the peak at its last step, then follows the schedule, as in Transformers;
    where it falls, it would reach its end one step after the last, so that no step is wasted. Only `reduce_lr_on_plateau`
    looks at more than the step: at how often the rate was reduced, see `Plateau`.
    """
    warmup = recipe.warmup_steps if recipe.warmup_steps is not None else math.ceil(recipe.warmup_ratio * total_steps)
    if step <= warmup:
        return recipe.learning_rate * step / warmup
    progress = (step - warmup - 1) / max(1, total_steps - warmup)
    options = recipe.lr_scheduler_kwargs
    match recipe.lr_scheduler_type:
        case "linear":
            factor = 1 - progress
        case "cosine":
            factor = _cosine(progress)
        case "cosine_with_restarts":
            factor = _cosine(progress * options.num_cycles % 1)
        case "polynomial":
            factor = (1 - progress) ** options.power
        case "warmup_stable_decay":
            factor = min(1.0, (1 - progress) / options.decay_ratio)
        case "inverse_sqrt":  # its end is open
            return recipe.learning_rate * math.sqrt(max(1, warmup) / (max(1, warmup) + step - warmup - 1))
        case "constant":
            return recipe.learning_rate
        case "reduce_lr_on_plateau":
            return recipe.learning_rate * max(options.factor**reductions, options.min_lr_rate)
    return recipe.learning_rate * (options.min_lr_rate + (1 - options.min_lr_rate) * factor)


@dataclass
class Plateau:
    """Counts how often the learning rate is reduced since held-out loss falls no more, as torch's ReduceLROnPlateau.

    Attributes:
        best: Lowest loss so far, None before the first; one that is lower by less than a ten-thousandth does not count.
        bad: Evaluations since then, or since the last reduction.
        reductions: How often the rate was reduced.
    """

    best: float | None = None
    bad: int = 0
    reductions: int = 0

    def note(self, loss: float, patience: int) -> None:
        """Take the loss of one more evaluation; one that is no number is not better."""
        if loss < (math.inf if self.best is None else self.best * (1 - _PLATEAU_THRESHOLD)):
            self.best, self.bad = loss, 0
        else:
            self.bad += 1
        if self.bad > patience:
            self.bad, self.reductions = 0, self.reductions + 1


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value * group[_FACTOR]


def state_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as flat tensors named ``<state>/<parameter>``; `names` is by `id(parameter)`."""
    return {
        f"{key}/{names[id(parameter)]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None and key not in _CONSTANT
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `state_tensors` returned, to the bit."""
    parameters = dict(model.named_parameters())
    if hasattr(optimizer, "init_state"):
        _prepare_states(optimizer, {parameters[name.partition("/")[2]] for name in tensors})
    for name, tensor in tensors.items():
        key, _, parameter_name = name.partition("/")
        parameter = parameters[parameter_name]
        state = optimizer.state[parameter]
        if isinstance(state.get(key), torch.Tensor):
            state[key].copy_(tensor)  # where it lies: paged memory stays paged
        elif isinstance(state.get(key), int):
            state[key] = int(tensor)
        else:
            place = "cpu" if key == "step" and parameter.device.type == "cpu" else parameter.device
            state[key] = tensor.to(place)


def _prepare_states(optimizer: Any, parameters: set[torch.nn.Parameter]) -> None:
    """Let bitsandbytes make the states of parameters, as it does at their first step."""
    for group_number, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            if parameter in parameters:
                optimizer.init_state(group, parameter, group_number, number)
