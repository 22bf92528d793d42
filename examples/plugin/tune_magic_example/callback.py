"""A callback: logs the loss smoothed over steps, and ends the run once it is low enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from tune_magic.recipe.schema import CallbackOptions
from tune_magic.training.callbacks import Callback


class SmoothedLossOptions(CallbackOptions):
    """Keys of `callbacks: {smoothed_loss: {...}}`."""

    name: Literal["smoothed_loss"] = Field("smoothed_loss", description="The loss, smoothed over steps.")
    decay: float = Field(0.9, ge=0, lt=1, description="Share of the old value in the new one.")
    enough: float | None = Field(None, gt=0, description="End the run when it is lower.")


class SmoothedLoss(Callback):
    """An exponential mean of the loss; `run.history` has it as `smoothed_loss.loss`."""

    Options = SmoothedLossOptions
    summary = "Logs the loss smoothed over steps, and ends the run once it is low enough."
    mean: float | None = None

    def on_start(self) -> None:
        """Begin quietly; `state` was given back already when the run goes on."""

    def on_step(self, step: int, numbers: Mapping[str, Any]) -> Mapping[str, float] | bool:
        """Return a number to log, or True: that is the end."""
        loss, decay = float(numbers["loss"]), self.options.decay
        self.mean = loss if self.mean is None else decay * self.mean + (1 - decay) * loss
        if self.options.enough is not None and self.mean < self.options.enough:
            return True
        return {"loss": self.mean}

    def state(self) -> dict[str, Any]:
        """What a run that goes on must know."""
        return {"mean": self.mean}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.mean = state["mean"]
