"""The training loop, top to bottom."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tune_magic import files
from tune_magic.data.example import Example
from tune_magic.data.table import Table
from tune_magic.errors import TuneError
from tune_magic.models import bound
from tune_magic.storage.control import StopRequested
from tune_magic.training import checkpoint, memory, together
from tune_magic.training.average import Average
from tune_magic.training.budget import Budget
from tune_magic.training.callbacks import Callbacks
from tune_magic.training.checkpoint import Progress
from tune_magic.training.optimizer import Plateau, held_bytes, learning_rate, make_optimizer, set_learning_rate
from tune_magic.training.order import starts
from tune_magic.training.prepare import Session
from tune_magic.training.samples import Sampler

_MEMORY_EVERY_S = 1.0
_STEPS_TO_CALIBRATE = 2
_SHARE_FOR_SAMPLES = 0.5  # of a budget, that must be left


class NonFiniteError(TuneError):
    """The loss or a gradient was not a number; the weights were not touched."""


@dataclass
class StepResult:
    """What one pass over a step's examples gave."""

    loss: float
    grad_norm: float
    tokens: int
    targets: int
    penalties: dict[str, float]


class Loop:
    """Trains a session from where its checkpoints stand to the end.

    When `run` returns or refuses a step, the newest checkpoint is the last completed step.

    Args:
        session: What `prepare` returned.
        own_checkpoints: Steps the run's log says it saved; nothing else is ever deleted.
        base_evaluated: Whether the log has the base's evaluation.
    """

    def __init__(self, session: Session, own_checkpoints: set[int], *, base_evaluated: bool = False) -> None:
        self.session = session
        self.checkpoints = session.folder / "checkpoints"
        self.optimizer = make_optimizer(session.model, session.recipe, session.method, session.objective)
        decay = session.recipe.ema_decay
        self.average = Average(session.model, decay) if decay is not None else None
        self.progress = Progress()
        self._masked = bound.masked_layers(session.model)
        self._own = own_checkpoints
        self._base_evaluated = base_evaluated
        self._whole: set[int] = set()  # steps whose checkpoint this attempt wrote or checked
        self.sampler = Sampler(session)
        self.callbacks = Callbacks(session)
        self._random_before_step = checkpoint.random_state()
        self._memory_due = 0.0
        self._held_out_tokens = session.engine.max_tokens
        self._budget = self._ask_for_budget()
        self._first_step: int | None = None  # of this attempt
        self.ended_by_budget = False

    def resume(self) -> None:
        """Go to the newest whole checkpoint; newer damaged ones are logged and left alone."""
        step, rejected = checkpoint.latest_valid(self.checkpoints)
        for bad_step, reason in rejected:
            self.session.log.append("checkpoint_rejected", step=bad_step, message=reason)
        if step is not None:
            path = self.checkpoints / checkpoint.name_of(step)
            self.progress = checkpoint.restore(path, self.session.model, self.optimizer, self.average)
            self.session.engine.max_tokens = self.progress.microbatch_tokens or self.session.engine.max_tokens
            self._whole.add(step)

    def run(self) -> str:
        """Train to the end and return the last state: finished or stopped."""
        self.callbacks.start(self.progress)
        state = self._train()
        self.callbacks.end(self.progress, state)
        return state

    def _train(self) -> str:
        session, plan = self.session, self.session.plan
        try:
            self._evaluate_if_due()
            while self.progress.step < plan["total_steps"] and not self._ends_early():
                if self._out_of_time():
                    self._end_in_time()
                    break
                self._random_before_step = checkpoint.random_state()
                self._step(self.progress.step + 1)
                self._random_before_step = checkpoint.random_state()
                self._evaluate_if_due()
                self._save_if_due()
                self._obey()
        except StopRequested:
            session.log.append("state", state="stopping")
            self.optimizer.zero_grad(set_to_none=True)
            checkpoint.set_random_state(self._random_before_step)  # a half-done step drew from it
            self._save()
            return "stopped"
        except NonFiniteError:
            checkpoint.set_random_state(self._random_before_step)
            self._save()
            raise
        self._save()
        if self.ended_by_budget:
            return "stopped"
        if self.progress.step not in self._whole:
            raise TuneError("The last checkpoint could not be saved.", hint="Free some space and resume the run.")
        self._retain(limit=1)
        return "finished"

    def _ask_for_budget(self) -> Budget | None:
        seconds = self.session.control.budget_s()
        if seconds is None:
            return None
        trained = sum(p.numel() * p.element_size() for p in self.session.model.parameters() if p.requires_grad)
        kept = trained + held_bytes(self.session.recipe, self.session.model)
        return Budget(seconds, int(self.session.dataset.held_out.lengths.sum()), kept)

    def _out_of_time(self) -> bool:
        """Whether another step would leave too little time to score and save; says once how far time will reach."""
        budget, step = self._budget, self.progress.step
        if budget is None:
            return False
        if self._first_step is None:
            self._first_step = step
        passes = self._passes_at_the_end
        if step == self._first_step + _STEPS_TO_CALIBRATE:
            reach = min(step + budget.steps_ahead(passes), self.session.plan["total_steps"])
            self.session.log.append("budget", steps=reach, until=round(time.time() + budget.left_s, 3))
        return not budget.pays_for_step(passes)

    @property
    def _passes_at_the_end(self) -> int:
        """How often the held-out rows are scored when the run ends after the next step."""
        return (1 + (not self._base_evaluated)) if self.session.dataset.held_out else 0

    def _end_in_time(self) -> None:
        """Score the held-out rows, if there is time for it and they were not scored at this step."""
        assert self._budget is not None
        self.ended_by_budget = True
        is_due = self.progress.step > 0 and self.progress.evaluated_step != self.progress.step
        passes = self._passes_at_the_end
        if is_due and passes and self._budget.pays_for_scoring(passes):
            self._evaluate_all()

    def _step(self, step: int) -> None:
        """One optimizer step; nothing is changed unless loss and gradients are finite."""
        session = self.session
        started = time.perf_counter()
        total = session.plan["total_steps"]
        rate = learning_rate(step, total, session.recipe, self.progress.plateau.get("reductions", 0))
        rows = session.order.rows(step)
        session.objective.progress = (step - 1) / total
        with session.method.at_step(session.model, step, total):
            result = self.accumulate([session.dataset.train[row] for row in rows])
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            self._refuse(step, rows, result)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        bound.mask_weights(self._masked)
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        self.progress.step = step
        self.progress.tokens += result.tokens
        numbers = {
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "targets": result.targets,
            "examples": len(rows),
            "epoch": round(step / session.order.steps_per_epoch, 4),
            "seconds": round(time.perf_counter() - started, 4),
            **result.penalties,
        }
        session.log.append("step", step=step, **numbers)
        self.callbacks.step(self.progress, numbers)
        if self._budget is not None:
            self._budget.note_step(time.perf_counter() - started, result.tokens)
        self._note_memory()

    def accumulate(self, examples: list[Example]) -> StepResult:
        """Sum gradients over the step's microbatches: the weighted mean over all its trained tokens.

        Out of memory, the same examples are computed again from the same random state in smaller microbatches.
        """
        while (result := self._try_to_accumulate(examples)) is None:
            self.optimizer.zero_grad(set_to_none=True)
            memory.give_back()
            checkpoint.set_random_state(self._random_before_step)
            self._shrink(examples)
        return result

    def _try_to_accumulate(self, examples: list[Example]) -> StepResult | None:
        """Return None when memory did not suffice; the error, which holds on to tensors, is gone by then."""
        session = self.session
        session.method.to_training(session.model)
        microbatches = list(session.engine.microbatches(examples))
        weight = sum(example.weight for example in examples)
        loss, look = 0.0, session.control.check
        penalties: defaultdict[str, float] = defaultdict(float)
        try:
            if session.objective.compares_rows:
                loss = together.add_gradients(session.engine, session.objective, microbatches, weight, look)
            else:
                for number, microbatch in enumerate(microbatches):
                    look(number, len(microbatches))
                    loss += self._add_gradients(microbatch, weight, penalties)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error):
                raise
            return None
        session.control.check(len(microbatches), len(microbatches))
        if session.retention is not None:
            penalties |= session.retention.pull()
        bound.mask_gradients(self._masked)
        parameters = [p for p in session.model.parameters() if p.grad is not None]
        limit = session.recipe.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        tokens = sum(map(len, examples))
        return StepResult(loss, float(norm), tokens, int(weight), dict(penalties))

    def _add_gradients(self, microbatch: list[Example], weight: float, penalties: dict[str, float]) -> float:
        """Add a microbatch's gradients and its penalties; return its part of the loss."""
        session = self.session
        states = session.engine.states(microbatch)
        part = session.objective.loss_sum(states) / weight
        loss = float(part.detach())
        if session.retention is not None:
            for name, total in session.retention.terms(states).items():
                part = part + session.retention.factor(name) * total / weight
                penalties[name] += float(total.detach()) / weight
        part.backward()  # type: ignore[no-untyped-call]
        return loss

    def _shrink(self, examples: list[Example]) -> None:
        """Compute fewer tokens at once from now on; the examples of a step stay the same."""
        engine, step = self.session.engine, self.progress.step + 1
        if not engine.shrink(examples):
            raise TuneError(
                f"Out of memory at step {step}, with one row at a time.",
                hint="Lower `max_length`, take a smaller model, or train fewer parameters (`method: lora`, a lower `r`).",
            )
        self.progress.microbatch_tokens = engine.max_tokens
        message = (
            f"Out of memory at step {step}: at most {engine.max_tokens} tokens are computed at once from now on. "
            "Which rows a step has stays the same."
        )
        self.session.log.append(
            "warning", kind="microbatch_changed", message=message, step=step, microbatch_tokens=engine.max_tokens
        )

    def _refuse(self, step: int, rows: list[int], result: StepResult) -> None:
        """Leave the weights as they are, and say where it happened."""
        self.optimizer.zero_grad(set_to_none=True)
        indices = [self.session.dataset.train[row].index for row in rows]
        what = "loss" if not math.isfinite(result.loss) else "gradient"
        message = f"The {what} was not finite at step {step}; the weights of step {step - 1} are kept."
        self.session.log.append(
            "warning", kind="non_finite", message=message, step=step, rows=indices, loss=result.loss,
            grad_norm=result.grad_norm,
        )  # fmt: skip
        raise NonFiniteError(message, hint="Lower `learning_rate`, or look at the rows named in the log.")

    def _evaluate_if_due(self) -> None:
        """Evaluate at the plan's steps: the base before the first of them, and before training where it must be."""
        session, progress = self.session, self.progress
        due = self._is_due or progress.ended_by is not None
        if not due or progress.evaluated_step == progress.step or not session.dataset.held_out:
            return
        if progress.step == 0 and session.method.adds:
            return  # the base stays in the model: its turn comes with the first evaluation, and training starts now
        self._evaluate_all()

    @property
    def _is_due(self) -> bool:
        """Whether the plan has an evaluation after this step; one that a budget's end brought is none of the schedule's."""
        step, plan = self.progress.step, self.session.plan
        return bool(step % plan["eval_steps"] == 0 or step == plan["total_steps"])

    def _evaluate_all(self) -> None:
        """Score the base unless that was done, and the model as it is now."""
        if not self._base_evaluated:
            self._evaluate_base()
        if self.progress.step > 0:
            self._evaluate()

    def _evaluate_base(self) -> None:
        """Score the model as it was before the first step, and let it answer the samples."""
        session = self.session
        if session.base_held_out:
            with session.as_base():
                scores = self.held_out(session.base_held_out, session.compared)
                session.log.append("eval", step=0, **scores, rows=len(session.compared), best=False)
                self._sample(0)
        self._base_evaluated = True
        if self.progress.step == 0:
            self.progress.evaluated_step = 0

    def _evaluate(self) -> None:
        """Score the held-out rows, and save when they were never better; with an average, by that."""
        with contextlib.nullcontext() if self.average is None else self.average.shown():
            better = self._score_and_sample()
        if better:
            self._save()

    def _score_and_sample(self) -> bool:
        """Score the held-out rows and answer the samples; return whether the loss was never lower."""
        session, progress = self.session, self.progress
        scores = self.held_out(session.dataset.held_out, session.dataset.held_out)
        loss = scores["loss"]
        limit = math.inf if progress.best_loss is None else progress.best_loss
        better = bool(loss < limit)  # false for a loss that is no number
        if self._is_due:
            self._note_for_schedule(loss)
        if better:
            progress.best_step, progress.best_loss = progress.step, loss
        progress.evaluated_step = progress.step
        session.log.append("eval", step=progress.step, **scores, rows=len(session.dataset.held_out), best=better)
        self.callbacks.evaluation(progress, scores)
        self._sample(progress.step)
        return better

    def _note_for_schedule(self, loss: float) -> None:
        """Count a scheduled evaluation for early stopping and for a rate that follows the loss."""
        recipe, progress = self.session.recipe, self.progress
        limit = progress.best_loss if progress.scheduled_best is None else progress.scheduled_best
        limit = math.inf if limit is None else limit
        gained = loss < limit - recipe.eval.early_stopping_threshold  # false for a loss that is no number
        progress.evaluations_without_gain = 0 if gained else progress.evaluations_without_gain + 1
        progress.scheduled_best = min(limit, loss) if math.isfinite(loss) else progress.scheduled_best
        if recipe.lr_scheduler_type == "reduce_lr_on_plateau":
            plateau = Plateau(**progress.plateau)
            plateau.note(loss, recipe.lr_scheduler_kwargs.patience)
            progress.plateau = vars(plateau)

    def _sample(self, step: int) -> None:
        """Answer the samples, unless a budget has little time left: how long answers take is not known."""
        if self._budget is None or self._budget.left_s > _SHARE_FOR_SAMPLES * self._budget.seconds:
            self.sampler.sample(step)

    def held_out(self, examples: Table, counted: Table) -> dict[str, Any]:
        """Return the weighted mean loss on the held-out rows, its weight, seconds, and what the objective tallies.

        Out of memory, the rows are computed again in smaller microbatches; those of training stay.

        Args:
            examples: The rows, by the tokens of the run or of the base.
            counted: The same rows by the run's tokens, over which the mean is: both say how likely the same texts are.
        """
        engine = self.session.engine
        tokens_in_training = engine.max_tokens
        engine.max_tokens = self._held_out_tokens = min(self._held_out_tokens, tokens_in_training)
        try:
            while (found := self._try_held_out(examples, counted)) is None:
                memory.give_back()
                if not engine.shrink(examples):
                    raise TuneError(
                        "Out of memory while scoring the held-out rows, one row at a time.",
                        hint="Lower `max_length` or take a smaller model.",
                    )
                self._held_out_tokens = engine.max_tokens
        finally:
            engine.max_tokens = tokens_in_training
        return found

    def _try_held_out(self, examples: Table, counted: Table) -> dict[str, Any] | None:
        session = self.session
        started = time.perf_counter()
        session.model.eval()
        weight = float(counted.weights.sum(dtype=np.float64))
        sums: defaultdict[str, float] = defaultdict(float)
        try:
            with torch.no_grad():
                for states in self._held_out_states(examples):
                    sums["loss"] += float(session.objective.score_sum(states))
                    for name, total in session.objective.tally(states).items():
                        sums[name] += total
                    if session.retention is not None:
                        for name, term in session.retention.terms(states).items():
                            sums[name] += float(term)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error):
                raise
            return None
        means = {name: total / weight for name, total in sums.items()}
        if self._budget is not None:
            self._budget.note_scoring(time.perf_counter() - started)
        return {**means, "targets": int(weight), "seconds": round(time.perf_counter() - started, 4)}

    def _held_out_states(self, examples: Table) -> Iterator[Any]:
        """Yield the states of held-out rows: of each microbatch, or of as many rows as a step compares."""
        session = self.session
        if session.objective.compares_rows:
            begins = starts(len(examples), session.recipe.batch_size, session.objective.fewest_rows)
            for start, end in itertools.pairwise([*begins, len(examples)]):
                session.control.check()
                group = examples[start:end]
                yield together.states_of_group(session.engine, session.objective, group)
            return
        for microbatch in session.engine.microbatches(examples):
            session.control.check()
            yield session.engine.states(microbatch)

    def _ends_early(self) -> bool:
        """Whether a callback has ended the run, or held-out loss got no better for long enough."""
        if self.progress.ended_by is not None:
            return True
        patience = self.session.recipe.eval.early_stopping_patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _save_if_due(self) -> None:
        if self.progress.step % self.session.plan["save_steps"] == 0:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint of the last completed step, then drop the oldest."""
        session, step = self.session, self.progress.step
        if step == 0 or step in self._whole:
            return
        target = self.checkpoints / checkpoint.name_of(step)
        started = time.perf_counter()
        try:
            if target.exists():  # left by an earlier attempt and found damaged
                files.discard(target)
            state = checkpoint.random_state()
            self.progress.callbacks = self.callbacks.state()
            checkpoint.save(self.checkpoints, session.model, self.optimizer, self.progress, state, average=self.average)
        except OSError as error:
            session.log.append(
                "warning", kind="checkpoint_failed", step=step, message=f"Checkpoint not saved: {error}."
            )
            return
        self._whole.add(step)
        best = step == self.progress.best_step
        seconds = round(time.perf_counter() - started, 4)
        if self._budget is not None:
            self._budget.note_save(seconds)
        session.log.append("checkpoint", step=step, name=target.name, best=best, seconds=seconds)
        self._retain(limit=session.recipe.save_total_limit)

    def _retain(self, limit: int) -> None:
        protected = {self.progress.best_step} if self.progress.best_step else set()
        checkpoint.retain(self.checkpoints, limit=limit, protected=protected, own=self._own | self._whole)

    def _obey(self) -> None:
        """Do what was asked between steps."""
        control, log = self.session.control, self.session.log
        if control.take("checkpoint"):
            self._save()
        if control.take("pause"):
            control.take("continue")  # one from before is no answer to this
            self._save()
            log.append("state", state="paused")
            while not control.take("continue"):
                control.check()
                time.sleep(0.2)
            log.append("state", state="running")

    def _note_memory(self) -> None:
        now = time.monotonic()
        if now >= self._memory_due:
            self._memory_due = now + _MEMORY_EVERY_S
            self.session.log.append("memory", **memory.snapshot())
