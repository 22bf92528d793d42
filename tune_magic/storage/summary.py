"""Fold a run's events into what readers ask for: curves, latest values, outcome.

A resumed run repeats the steps after its checkpoint. The later attempt wins, and what the earlier one did beyond the
checkpoint is forgotten, so that every reader sees one run, not two.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tune_magic.storage.events import Event, number
from tune_magic.storage.state import TABLE

_NO_SCORES = ("seq", "attempt", "t", "type", "crc", "step", "targets", "seconds", "rows", "best")  # of an evaluation


@dataclass
class Summary:
    """Everything the events of one job say, kept up to date by `add`.

    Attributes:
        state: Value of the last `state` event this version knows.
        started: Seconds since the epoch at which the current attempt began.
        ended: Seconds since the epoch of the last terminal state, else None.
        plan: The latest `plan` event: every resolved value.
        steps: Training steps by number.
        evaluations: Held-out evaluations by step; step 0 is the base model.
        budget: What this attempt's time allows: ``steps`` it will reach, ``until`` it ends at the latest.
        notes: What callbacks logged, by step: numbers under ``callback.number``.
        progress: The latest event with ``done`` and ``total``, for jobs that count something else than steps.
    """

    state: str | None = None
    attempt: int = 0
    started: float | None = None
    ended: float | None = None
    last_t: float | None = None
    outcome: Event = field(default_factory=dict)
    plan: Event = field(default_factory=dict)
    steps: dict[int, Event] = field(default_factory=dict)
    evaluations: dict[int, Event] = field(default_factory=dict)
    samples: dict[int, Event] = field(default_factory=dict)
    checkpoints: dict[int, Event] = field(default_factory=dict)
    notes: dict[int, dict[str, Any]] = field(default_factory=dict)
    memory: Event = field(default_factory=dict)
    progress: Event = field(default_factory=dict)
    budget: Event = field(default_factory=dict)
    warnings: list[Event] = field(default_factory=list)
    diagnoses: list[Event] = field(default_factory=list)
    result: Event = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Take one more event; unknown types only move the clock."""
        self.last_t = event["t"]
        match event["type"]:
            case "state":
                self._add_state(event)
            case "plan":
                self.plan = event
            case "step":
                self.steps[event["step"]] = event
            case "eval":
                self.evaluations[event["step"]] = event
            case "sample":
                self.samples[event["step"]] = event
            case "checkpoint":
                self.checkpoints[event["step"]] = event
            case "note":
                numbers = {f"{event['by']}.{name}": value for name, value in event["numbers"].items()}
                self.notes.setdefault(event["step"], {}).update(numbers)
            case "memory" | "budget" as name:
                setattr(self, name, event)
            case "progress":
                self.progress = event
            case "warning" | "checkpoint_rejected":
                self.warnings.append(event)
            case "diagnosis":
                self.diagnoses.append(event)
            case "result":
                self.result = event

    def _add_state(self, event: Event) -> None:
        if event["state"] not in TABLE:
            return  # a later version's state
        self.state = event["state"]
        self.attempt = event["attempt"]
        self.outcome = event
        self.ended = event["t"] if self.state in ("stopped", "finished", "failed") else None
        if self.state == "starting":
            self.started, self.progress, self.budget = event["t"], {}, {}
        if "from_step" in event:
            series: dict[int, Any]
            for series in (self.steps, self.evaluations, self.samples, self.checkpoints, self.notes):
                for step in [step for step in series if step > event["from_step"]]:
                    del series[step]

    @property
    def step(self) -> int:
        """Number of the last completed step."""
        return max(self.steps, default=0)

    @property
    def best(self) -> Event | None:
        """The evaluation with the lowest finite held-out loss after step 0, else None."""
        return best_of(self.evaluations)

    def seconds_left(self) -> float | None:
        """Estimate what remains from the latest steps' durations and the evaluations to come; None before a step."""
        total = self.plan.get("total_steps")
        if not total or not self.steps:
            return None
        latest: list[float] = [self.steps[step]["seconds"] for step in sorted(self.steps)[-20:]]
        remaining = int(total) - self.step
        evaluations: list[float] = [event["seconds"] for event in self.evaluations.values()]
        to_come = remaining / self.plan["eval_steps"] if evaluations else 0.0
        each = sum(evaluations) / len(evaluations) if evaluations else 0.0
        seconds = remaining * sum(latest) / len(latest) + to_come * each
        return min(seconds, max(0.0, self.budget["until"] - time.time())) if self.budget else seconds


def scores_of(evaluation: Event) -> dict[str, float]:
    """Return what an evaluation scored: the loss, and what the objective tallies beside it, by name."""
    return {name: number(value) for name, value in evaluation.items() if name not in _NO_SCORES}


def best_of(evaluations: Mapping[int, Event]) -> Event | None:
    """Return the evaluation with the lowest finite loss after step 0, else None."""
    trained = [e for step, e in evaluations.items() if step > 0 and isinstance(e["loss"], int | float)]
    return min(trained, key=lambda e: (e["loss"], e["step"]), default=None)
