"""Launch options: how a run is started. Line flags only, never in a file, never part of a run's identity."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0}
_TIME = re.compile(r"(?:\d+(?:\.\d+)?[hms])+")


class LaunchOptions(BaseModel):
    """How a run is started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    background: bool = Field(False, description="Return at once; the run goes on by itself.")
    fresh: bool = Field(False, description="Train again although the same run is there.")
    dry_run: bool = Field(False, description="Show the plan and train nothing.")
    find_lr: bool = Field(False, description="Try rising learning rates, show a curve and a rate, and keep nothing.")
    executor: Literal["worker", "inline"] = Field(
        "worker", description="worker: a process of its own. inline: this process, for debugging."
    )
    traceback: bool = Field(False, description="Show the worker's whole traceback when it fails.")
    now: bool = Field(False, description="Start at once although another run holds the device.")
    budget: str | None = Field(None, description="End within this time, such as 10m, with a checkpoint.")
    output: str | None = Field(None, description="Folder for runs; default: tune_runs beside the notebook.")

    @field_validator("budget")
    @classmethod
    def _time(cls, value: str | None) -> str | None:
        if value is not None:
            seconds_of(value)
        return value

    @model_validator(mode="after")
    def _one_trial(self) -> LaunchOptions:
        if self.dry_run and self.find_lr:
            raise ValueError("`dry_run` and `find_lr` are two trials; take one at a time.")
        return self

    @property
    def trial(self) -> str | None:
        """Kind of the job that tries the recipe out and leaves no run, None where a run is wanted."""
        return "plan" if self.dry_run else "find_lr" if self.find_lr else None


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as 90s, 10m or 1h30m.

    Raises:
        ValueError: It is no such time, or none at all.
    """
    plain = text.replace(" ", "")
    parts = re.findall(r"[\d.]+[hms]", plain) if _TIME.fullmatch(plain) else []
    seconds = sum(float(part[:-1]) * _UNITS_S[part[-1]] for part in parts)
    if not seconds:
        raise ValueError(f"must be a time such as 90s, 10m or 1h30m, got {text!r}.")
    return seconds
