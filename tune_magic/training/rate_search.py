"""The find_lr job: how the training loss answers to a learning rate that rises from step to step.

Smith 2015, arXiv:1506.01186. The rates are powers of one factor; the loss of a step is that before its update, smoothed
by an exponential moving average without the pull of its start. Nothing is kept: the weights go with the process.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tune_magic.recipe.build import build_recipe
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.loop import Loop, StepResult
from tune_magic.training.optimizer import set_learning_rate
from tune_magic.training.prepare import Session, prepare

_STEPS = 60
_BOUNDS = {
    "adamw": (1e-7, 1.0),
    "sgd": (1e-5, 10.0),
    "adafactor": (1e-6, 10.0),
    "lion": (1e-8, 0.1),
}  # rates that are tried
_SMOOTHING = 0.8
_DIVERGED = 4.0  # times the lowest smoothed loss
_FIRST = 5  # steps at rates too low to matter: the loss to begin with
_LEAST_FALL = 0.02  # of that loss; less is chance


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        learning_rate: A tenth of the rate where the loss was lowest, to two digits; None where it fell at no rate.
        steepest: The rate at which the loss fell fastest, None likewise.
        lowest: The rate where it was lowest, None likewise.
        diverged: Whether it ended early, since the loss had left all bounds.
        rates: Of each step.
        losses: Of each step.
        smoothed: The same, smoothed.
    """

    learning_rate: float | None
    steepest: float | None
    lowest: float | None
    diverged: bool
    rates: list[float]
    losses: list[float]
    smoothed: list[float]


def find_lr(run: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Train a few steps at rising rates and log what they tell; returns the fields of the last state event."""
    session = prepare(build_recipe(run.info["recipe"]), run.path, log, control, most_steps=_STEPS)
    log.append("state", state="running", from_step=0)
    log.append("result", **asdict(search(session)))
    return {"state": "finished"}


def rates_of(optim: str) -> list[float]:
    """Return the rates that are tried with an optimizer, each the one before times the same factor."""
    low, high = _BOUNDS[optim.removeprefix("paged_").removesuffix("_8bit")]
    return [float(rate) for rate in np.geomspace(low, high, _STEPS)]


def search(session: Session) -> Found:
    """Train the session's model at rising rates until the loss diverges; the model is spent afterwards."""
    loop, total = Loop(session, own_checkpoints=set()), session.plan["total_steps"]
    rates, losses = rates_of(session.recipe.optim), list[float]()
    for step, rate in enumerate(rates, start=1):
        started, rows = time.perf_counter(), session.order.rows(step)
        session.objective.progress = 1.0  # as at the end of a run, when all of the loss counts
        with session.method.at_step(session.model, total, total):
            result = loop.accumulate([session.dataset.train[row] for row in rows])
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            return _found(rates, losses, diverged=True)
        losses.append(result.loss)
        _log(session, step, rate, result, time.perf_counter() - started)
        smoothed = smooth(losses)
        if smoothed[-1] > _DIVERGED * min(smoothed):
            return _found(rates, losses, diverged=True)
        set_learning_rate(loop.optimizer, rate)
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)
    return _found(rates, losses, diverged=False)


def smooth(losses: list[float]) -> list[float]:
    """Return the exponential moving average, divided by the sum of its weights."""
    smoothed, average = [], 0.0
    for number, loss in enumerate(losses, start=1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smoothed.append(average / (1 - _SMOOTHING**number))
    return smoothed


def _found(rates: list[float], losses: list[float], *, diverged: bool) -> Found:
    """Read the curve: where it is lowest, and where on the way there it falls fastest."""
    tried, smoothed = rates[: len(losses)], smooth(losses)
    nothing = Found(None, None, None, diverged, tried, losses, smoothed)
    if len(losses) <= _FIRST:
        return nothing
    lowest = int(np.argmin(smoothed))
    level = float(np.median(losses[:_FIRST]))
    if lowest < _FIRST or level - smoothed[lowest] < _LEAST_FALL * abs(level):
        return nothing
    slopes = np.gradient(np.array(smoothed[: lowest + 1]))  # by step: the rates are evenly spaced in their logarithm
    steepest = _FIRST + int(np.argmin(slopes[_FIRST:]))
    suggested = float(f"{tried[lowest] / 10:.1e}")
    return Found(suggested, tried[steepest], tried[lowest], diverged, tried, losses, smoothed)


def _log(session: Session, step: int, rate: float, result: StepResult, seconds: float) -> None:
    session.log.append(
        "step", step=step, loss=result.loss, learning_rate=rate, grad_norm=result.grad_norm, tokens=result.tokens,
        targets=result.targets, epoch=round(step / session.order.steps_per_epoch, 4), seconds=round(seconds, 4),
    )  # fmt: skip
    session.log.append("progress", done=step, total=_STEPS)
