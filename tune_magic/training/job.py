"""The finetune job: one attempt at a run, from lock to last state."""

from __future__ import annotations

import heapq
import time
from typing import Any

import torch

from tune_magic import files
from tune_magic.recipe.build import build_recipe
from tune_magic.storage.control import Control, StopRequested
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training import memory
from tune_magic.training.loop import Loop
from tune_magic.training.optimizer import state_sizes
from tune_magic.training.prepare import Session, prepare
from tune_magic.training.trunk import Trunk


def finetune(run: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Train, or train on, and return the fields of the last state event.

    Raises:
        TuneError: With what a user can do; the log has everything up to it.
    """
    files.sweep(run.path / "checkpoints")
    earlier = run.summary()
    recipe = build_recipe(run.info["recipe"])
    try:
        session = prepare(recipe, run.path, log, control, inherited=earlier.plan or None)
        _keep_frozen_outputs(session)
    except StopRequested:
        return {"state": "stopped", "step": earlier.step}
    loop = Loop(session, own_checkpoints=set(earlier.checkpoints), base_evaluated=0 in earlier.evaluations)
    loop.resume()
    log.append("state", state="running", from_step=loop.progress.step)
    state = loop.run()
    progress = loop.progress
    reason = {"reason": "budget"} if loop.ended_by_budget else {}
    if state == "finished" and progress.ended_by is not None:
        reason = {"reason": "callback", "by": progress.ended_by}
    return {
        **reason,
        "state": state,
        "step": progress.step,
        "best_step": progress.best_step,
        "best_loss": progress.best_loss,
    }


def _keep_frozen_outputs(session: Session) -> None:
    """Compute what frozen layers make of all rows, if the plan says so; without room for it they stay as they are."""
    depth = session.plan["kept_layers"]
    if not depth:
        return
    sources = [session.dataset.train, session.dataset.held_out]
    total = sum(map(len, sources))

    def look(done: int) -> None:
        session.control.check()
        session.log.append("progress", done=done, total=total)

    kept = Trunk(session.engine, depth)
    try:
        kept.fill(sources, session.folder, look)
    except (OSError, MemoryError, RuntimeError) as error:
        if not isinstance(error, OSError) and not memory.is_exhausted(error):
            raise
        message = f"Outputs of the frozen layers are not kept: {error}. They are computed anew in each epoch."
        session.log.append("warning", kind="trunk_not_kept", message=message)
        return
    session.engine.trunk = kept


def dry_run(run: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Prepare everything and, unless told not to, try the heaviest step without touching the weights.

    The trial predicts memory and time.
    """
    measure = run.info.get("options", {}).get("measure", True)
    session = prepare(build_recipe(run.info["recipe"]), run.path, log, control, measure=measure, is_trial=True)
    log.append("state", state="running", from_step=0)
    if measure:
        log.append("result", **_measure(session))
    return {"state": "finished"}


def _measure(session: Session) -> dict[str, Any]:
    """Compute the step with the most tokens, update nothing, and predict the run's peak memory and time."""
    plan, train, order = session.plan, session.dataset.train, session.order
    loop = Loop(session, own_checkpoints=set())
    steps, lengths = range(1, min(plan["steps_per_epoch"], plan["total_steps"]) + 1), train.lengths
    tokens = {step: int(lengths[order.rows(step)].sum()) for step in steps}
    heaviest, *others = heapq.nlargest(2, tokens, key=lambda step: tokens[step])
    seconds, peak_bytes, states = _dry_steps(loop, [heaviest, *others, heaviest])
    memory.forget_peak(session.engine.device)
    held_out: dict[str, Any] = {"loss": None, "seconds": 0.0}
    if session.base_held_out:
        with session.as_base():
            held_out = loop.held_out(session.base_held_out, session.compared)
    del states
    mean_tokens = sum(tokens.values()) / len(tokens)
    evaluations = 1 + plan["total_steps"] // plan["eval_steps"]
    training = plan["total_steps"] * seconds * mean_tokens / tokens[heaviest]
    return {
        "base_loss": held_out["loss"],
        "step_seconds": round(seconds, 4),
        "step_tokens": tokens[heaviest],
        "peak_bytes": max(peak_bytes, memory.peak(session.engine.device)),
        "seconds": round(training + evaluations * held_out["seconds"], 2),
    }


def _dry_steps(loop: Loop, steps: list[int]) -> tuple[float, int, list[torch.Tensor]]:
    """Compute steps without an update, the last one beside what an optimizer would hold.

    The first one pays for set-up; other rows leave other holes in memory, which the heaviest may not fit into.

    Returns:
        Seconds of the last, the peak of memory in bytes, and the tensors that stand for the optimizer's states.
    """
    session = loop.session
    device, train, order = session.engine.device, session.dataset.train, session.order
    seconds, peaks, states = 0.0, [], []
    for number, step in enumerate(steps, start=1):
        examples = [train[row] for row in order.rows(step)]
        memory.forget_peak(device)
        started = time.perf_counter()
        loop.accumulate(examples)
        seconds = time.perf_counter() - started
        peaks.append(memory.peak(device))
        if number == len(steps) - 1:  # as an optimizer does at its first step, beside the gradients
            sizes = state_sizes(session.recipe, session.model)
            states = [torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes]
        session.model.zero_grad(set_to_none=True)
    *bare, with_states = peaks
    # what one bare step took more than another were holes; states may fill them, or come to lie between
    return seconds, max(with_states, min(bare) + sum(state.nbytes for state in states)), states
