"""Launch options: how a run is started. Line flags only, never in a file, never part of a run's identity."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LaunchOptions(BaseModel):
    """How a run is started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    background: bool = Field(False, description="Return at once; the run goes on by itself.")
    fresh: bool = Field(False, description="Train again although the same run is there.")
    dry_run: bool = Field(False, description="Show the plan and train nothing.")
    executor: Literal["worker", "inline"] = Field(
        "worker", description="worker: a process of its own. inline: this process, for debugging."
    )
    traceback: bool = Field(False, description="Show the worker's whole traceback when it fails.")
    output: str | None = Field(None, description="Folder for runs; default: tune_runs beside the notebook.")
