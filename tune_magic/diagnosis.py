"""What a run's curve means, in words: rules over its own events, each with a change to make and why.

A rule speaks only where the numbers leave little doubt; a healthy run has nothing said about it. Thresholds are shares of
the run's own values, so they hold for any loss.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tune_magic.storage.events import number
from tune_magic.storage.summary import Summary

_MOST = 3
_ENOUGH_STEPS = 8  # of which something may be said
_SMALL_DATA = 100
_LITTLE_TRAINED = 0.02  # of all tokens
_MANY_CUT = 0.05  # of all rows
_WORSE = 0.05  # of the best held-out loss
_RISEN = 0.2  # of the lowest smoothed train loss
_FLAT = 0.03  # of the base's loss
_STILL_FALLING = 0.02  # of the held-out loss, from one evaluation to the next
_SPIKE = 2.0  # times the steps around it
_SPIKE_SPREADS = 8.0  # and as many median deviations
_SMALL_RANK = 4
_NEIGHBOURS = 10
_EXPLODED = 20.0  # times the median gradient norm
_IDLE = 0.3  # of the time between steps


@dataclass(frozen=True)
class Diagnosis:
    """Something a run's events say.

    Attributes:
        kind: overfitting, underfitting, still_improving, rate_too_high, rate_too_low, spikes, exploding_gradients,
            masked_labels, cut_rows, little_data or slow_input.
        says: What is seen, with the run's numbers.
        change: A line of the recipe that would help; None where what helps is not in the recipe.
        why: Why it would, or what would.
    """

    kind: str
    says: str
    change: str | None
    why: str

    @property
    def text(self) -> str:
        """All of it in one line."""
        return f"{self.says} Try `{self.change}`: {self.why}" if self.change else f"{self.says} {self.why}"


class _Curves:
    """A summary's series as the rules read them; non-finite values are left out."""

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        self.plan = summary.plan
        self.recipe: dict[str, Any] = summary.plan.get("recipe", {})
        self.steps = sorted(summary.steps)
        self.losses = [number(summary.steps[step]["loss"]) for step in self.steps]
        self.norms = [number(summary.steps[step]["grad_norm"]) for step in self.steps]
        scored = {step: number(event["loss"]) for step, event in sorted(summary.evaluations.items())}
        scored = {step: loss for step, loss in scored.items() if math.isfinite(loss)}
        self.base = scored.pop(0, None)
        self.held_out = scored
        self.total: int = summary.plan.get("total_steps", 0)
        self.learning_rate = float(self.recipe.get("learning_rate", 0.0))

    @property
    def share_done(self) -> float:
        return self.steps[-1] / self.total if self.steps and self.total else 0.0

    def smoothed(self) -> list[float]:
        """Means of a tenth of the run each, or of a few steps."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        width = max(4, len(finite) // 10)
        return [statistics.fmean(finite[i : i + width]) for i in range(0, len(finite) - width + 1, width)]

    def epochs(self, step: int) -> float:
        return step / max(1, int(self.plan.get("steps_per_epoch", 1)))


def diagnose(summary: Summary) -> list[Diagnosis]:
    """Return what a run's events say so far, the most telling first; at most three things."""
    if not summary.plan:
        return []
    curves = _Curves(summary)
    found = [diagnosis for rule in _RULES for diagnosis in rule(curves)]
    kinds = {diagnosis.kind for diagnosis in found}
    hidden = {kind for first, others in _EXPLAINS.items() if first in kinds for kind in others}
    return [diagnosis for diagnosis in found if diagnosis.kind not in hidden][:_MOST]


def _labels(curves: _Curves) -> Iterator[Diagnosis]:
    plan = curves.plan
    if "classes" in plan.get("objective", {}) or not plan.get("tokens_per_epoch"):
        return
    share = plan["trained_tokens_per_epoch"] / plan["tokens_per_epoch"]
    if share < _LITTLE_TRAINED:
        yield Diagnosis(
            "masked_labels",
            f"Only {100 * share:.1f} % of the tokens are trained; the rest is prompt.",
            None,
            "Each step reads everything and learns from very little: shorten the prompts, or train more of each row.",
        )


def _cut(curves: _Curves) -> Iterator[Diagnosis]:
    plan = curves.plan
    cut, rows = plan.get("cut_rows", 0), plan.get("train_rows", 0)
    if rows and cut > _MANY_CUT * rows:
        yield Diagnosis(
            "cut_rows",
            f"{cut} of {rows} rows are cut at {plan.get('max_length', 'max_length')} tokens.",
            f"max_length: {2 * int(plan.get('max_length') or curves.recipe.get('max_length', 1024))}",
            "what is cut off is not learned, and a cut answer teaches to stop in the middle.",
        )


def _not_finite(curves: _Curves) -> Iterator[Diagnosis]:
    bad = [s for s, loss, norm in zip(curves.steps, curves.losses, curves.norms, strict=True)
           if not (math.isfinite(loss) and math.isfinite(norm))]  # fmt: skip
    error = str(curves.summary.outcome.get("error") or "")
    if bad or "not a number" in error or "not finite" in error:
        where = f" at step {bad[0]}" if bad else ""
        yield _rate_down(curves, "exploding_gradients", f"Loss or gradient became infinite{where}.", 10)


def _exploding(curves: _Curves) -> Iterator[Diagnosis]:
    norms = [norm for norm in curves.norms if math.isfinite(norm)]
    # against what came before: norms fall as a run learns, and its first ones are no explosion
    found = [(norm, statistics.median(norms[:place])) for place, norm in enumerate(norms) if place >= _NEIGHBOURS]
    if not found:
        return
    worst, usual = max(found, key=lambda pair: pair[0] / pair[1] if pair[1] > 0 else 0.0)
    if usual > 0 and worst > _EXPLODED * usual and worst > 1:
        step = curves.steps[curves.norms.index(worst)]
        says = f"The gradient's norm was {worst:.3g} at step {step}, {worst / usual:.0f} times its usual {usual:.2g}."
        limit = curves.recipe.get("max_grad_norm", 1.0)
        if limit:
            yield Diagnosis(
                "exploding_gradients", says, f"max_grad_norm: {min(limit / 2, 2 * usual):.2g}",
                "a lower limit lets one bad batch move the weights less.",
            )  # fmt: skip
        else:
            yield Diagnosis(
                "exploding_gradients", says, "max_grad_norm: 1.0", "nothing limits a bad batch's step as it is."
            )


def _too_high(curves: _Curves) -> Iterator[Diagnosis]:
    if curves.base is not None and curves.held_out:
        newest = curves.held_out[max(curves.held_out)]
        best = min(curves.held_out.values())
        if best > curves.base * (1 + _WORSE):
            says = f"Held-out loss rose from {curves.base:.3g} to {newest:.3g}: training makes the model worse."
            yield _rate_down(curves, "rate_too_high", says, 5)
            return
    means = curves.smoothed()
    if len(means) >= 3 and len(curves.losses) >= _ENOUGH_STEPS:
        lowest = min(means)
        at = means.index(lowest)
        if (
            at < len(means) - 1
            and means[-1] > lowest * (1 + _RISEN)
            and min(means[at + 1 :]) > lowest * (1 + _RISEN / 2)
        ):
            says = f"Train loss rose from {lowest:.3g} to {means[-1]:.3g}."
            yield _rate_down(curves, "rate_too_high", says, 3)


def _overfitting(curves: _Curves) -> Iterator[Diagnosis]:
    if len(curves.held_out) < 3:
        return
    steps = sorted(curves.held_out)
    best_step = min(steps, key=lambda step: (curves.held_out[step], step))
    best, last = curves.held_out[best_step], curves.held_out[steps[-1]]
    later = [step for step in steps if step > best_step]
    if len(later) < 2 or last <= best * (1 + _WORSE):
        return
    means = curves.smoothed()
    if len(means) >= 2 and means[-1] > means[0]:
        return  # train loss does not fall either: it is something else
    epochs = curves.epochs(best_step)
    change = f"num_train_epochs: {max(0.1, epochs):.2g}" if epochs else "eval.early_stopping_patience: 2"
    yield Diagnosis(
        "overfitting",
        f"Held-out loss was lowest at step {best_step} ({best:.3g}) and is {last:.3g} now, while train loss falls.",
        change if not curves.recipe.get("max_steps") else f"max_steps: {best_step}",
        "what comes after learns the training rows by heart; the best checkpoint is kept either way.",
    )


def _little(curves: _Curves) -> Iterator[Diagnosis]:
    rows = curves.plan.get("train_rows", 0)
    if rows and rows < _SMALL_DATA and any(_overfitting(curves)):
        has_rank = curves.recipe.get("method", {}).get("r", 0) > _SMALL_RANK
        why = "o few rows are soon learned by heart; more rows help most, fewer trained parameters a little."
        change, why = (f"method.r: {_SMALL_RANK}", f"s{why}") if has_rank else (None, f"S{why}")
        yield Diagnosis("little_data", f"There are {rows} training rows.", change, why)


def _learns_little(curves: _Curves) -> Iterator[Diagnosis]:
    if curves.base is None or not curves.held_out or curves.share_done < 0.5 or curves.base <= 0:
        return
    best, means = min(curves.held_out.values()), curves.smoothed()
    gained = (curves.base - best) / curves.base
    if not -_WORSE <= gained < _FLAT or len(means) < 2:
        return
    fell = (means[0] - means[-1]) / means[0] if means[0] > 0 else 0.0
    if fell < _FLAT:
        says = f"Held-out loss went from {curves.base:.3g} to {best:.3g}, and train loss hardly fell."
        yield Diagnosis(
            "rate_too_low", says, f"learning_rate: {_digits(5 * curves.learning_rate)}",
            "steps this small do not get anywhere in the time they have.",
        )  # fmt: skip
    else:
        yield Diagnosis(
            "underfitting",
            f"Train loss fell by {100 * fell:.0f} %, held-out loss by {100 * gained:.1f} %.",
            "method.r: 32" if "r" in curves.recipe.get("method", {}) else "num_train_epochs: 3",
            "what is learned does not carry over: held-out rows may ask for something else, or too little is trained.",
        )


def _unfinished(curves: _Curves) -> Iterator[Diagnosis]:
    steps = sorted(curves.held_out)
    if curves.summary.state != "finished" or len(steps) < 3:
        return
    before, last = curves.held_out[steps[-2]], curves.held_out[steps[-1]]
    if last == min(curves.held_out.values()) and before > 0 and (before - last) / before > _STILL_FALLING:
        epochs = float(curves.recipe.get("num_train_epochs", 1.0))
        longer = (
            f"max_steps: {2 * curves.total}" if curves.recipe.get("max_steps") else f"num_train_epochs: {2 * epochs:g}"
        )
        yield Diagnosis(
            "still_improving",
            f"Held-out loss was still falling at the end ({before:.3g} to {last:.3g}).",
            longer,
            "the run ended before it had learned what these rows teach.",
        )


def _spikes(curves: _Curves) -> Iterator[Diagnosis]:
    found = []
    losses = curves.losses
    whole = max((loss for loss in losses[:_ENOUGH_STEPS] if math.isfinite(loss)), default=0.0)
    for place in range(1, len(losses) - 1):
        loss = losses[place]
        # where a curve is steep, its neighbours are high too
        if not (math.isfinite(loss) and loss > _SPIKE * max(losses[place - 1], losses[place + 1])):
            continue
        around = losses[max(0, place - _NEIGHBOURS) : place] + losses[place + 1 : place + 1 + _NEIGHBOURS]
        around = [other for other in around if math.isfinite(other)]
        if len(around) < _NEIGHBOURS:
            continue
        usual = statistics.median(around)
        spread = statistics.median(abs(other - usual) for other in around)
        # on the scale of the whole curve: where the loss is nearly nothing, twice of it is nothing too
        if loss > _SPIKE * usual and loss - usual > max(_SPIKE_SPREADS * spread, _FLAT * whole):
            found.append((curves.steps[place], loss, usual))
    if found:
        step, loss, usual = max(found, key=lambda spike: spike[1] / spike[2])
        count = "once" if len(found) == 1 else f"{len(found)} times"
        yield Diagnosis(
            "spikes",
            f"The loss jumped {count}, to {loss:.3g} at step {step} from about {usual:.3g}.",
            f"batch_size: {2 * int(curves.recipe.get('batch_size', 8))}",
            "single rows that are unlike the others (broken, very long, another language) weigh less in a larger batch; "
            "look at them first.",
        )


def _slow(curves: _Curves) -> Iterator[Diagnosis]:
    """Time between steps that neither steps nor evaluations took."""
    summary, steps = curves.summary, curves.steps
    if len(steps) < _ENOUGH_STEPS:
        return
    first, last = summary.steps[steps[0]], summary.steps[steps[-1]]
    if first.get("attempt") != last.get("attempt"):
        return
    whole = last["t"] - first["t"]
    in_steps = sum(summary.steps[step]["seconds"] for step in steps[1:])
    scoring = sum(e["seconds"] for s, e in summary.evaluations.items() if steps[0] <= s < steps[-1])
    idle = whole - in_steps - scoring
    if whole > 10 and idle > _IDLE * whole:
        yield Diagnosis(
            "slow_input",
            f"{100 * idle / whole:.0f} % of the time went into neither steps nor evaluations.",
            "eval.samples: 0",
            "sample answers, checkpoints on a slow disk, or another program on this machine took it.",
        )


def _rate_down(curves: _Curves, kind: str, says: str, factor: int) -> Diagnosis:
    return Diagnosis(
        kind, says, f"learning_rate: {_digits(curves.learning_rate / factor)}", "smaller steps do not overshoot."
    )


def _digits(value: float) -> str:
    """Return a number as YAML reads it, to two digits."""
    return f"{value:.1e}".replace("e-0", "e-")


_RULES: tuple[Callable[[_Curves], Iterator[Diagnosis]], ...] = (
    _not_finite, _too_high, _exploding, _overfitting, _learns_little, _little, _labels, _cut, _spikes, _unfinished, _slow,
)  # fmt: skip
# what one explains, the others need not say
_EXPLAINS = {
    "rate_too_high": ("exploding_gradients", "spikes", "underfitting", "little_data"),
    "exploding_gradients": ("spikes",),
}
