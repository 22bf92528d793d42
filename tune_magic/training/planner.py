"""The memory planner: what a step will take, and the fastest way of computing it that fits.

A forecast is what the process holds now, gradients and optimizer state of what is trained, and what the backward pass
keeps of each token. The last is counted on the self-check's rows, tensor by tensor as autograd saves them, so it holds
for any architecture. Two dry steps on the heaviest microbatch then say how far the forecast is from this machine's
peak. What changes nothing about the result may be changed to fit: smaller microbatches first, then computing
activations twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tune_magic.data.example import Example
from tune_magic.errors import TuneError
from tune_magic.models.layers import stacks_of
from tune_magic.models.quantise import workspace_bytes
from tune_magic.recipe.schema import Recipe
from tune_magic.training import checkpoint, memory
from tune_magic.training.engine import Engine
from tune_magic.training.optimizer import held_bytes

_MARGIN = 0.9  # of what is free
_TIGHT = 0.6  # a forecast above this share of what is free is worth two dry steps
_TWICE = 4 / 3  # a forward pass more, beside one forward and one backward pass of twice its work
_LEAST_CORRECTION = 0.5  # what is saved must lie somewhere, be it where something else was


@dataclass(frozen=True)
class Option:
    """A way to compute a step.

    Attributes:
        microbatch_tokens: Most tokens computed at once.
        gradient_checkpointing: Whether activations are computed twice instead of kept.
        peak_bytes: Forecast of the process's peak, on the GPU of what is allocated there.
        slowdown: Forecast of a step's time against the first option's.
    """

    microbatch_tokens: int
    gradient_checkpointing: bool
    peak_bytes: int
    slowdown: float


class Planner:
    """Forecasts the memory of an engine's steps.

    Args:
        engine: After its self-check.
        recipe: Says what may be changed.
        steps: The examples of the heaviest steps of an epoch.
    """

    def __init__(self, engine: Engine, recipe: Recipe, steps: Sequence[Sequence[Example]]) -> None:
        self.engine = engine
        self.recipe = recipe
        self.steps = steps
        self.level = memory.level(engine.device) + engine.unseen_bytes
        self.free = max(0, memory.free(engine.device) - engine.unseen_bytes)
        self._known_tokens: dict[int, tuple[int, int]] = {}  # by microbatch size, see `_tokens`
        self._workspace = workspace_bytes(engine.inner, engine.dtype)
        self._state_bytes = held_bytes(recipe, engine.model)
        self._correction = 1.0  # measured growth over forecast growth

    def options(self, *, checkpointing: bool | None = None) -> list[Option]:
        """Return ways to compute, the fastest first; `checkpointing` leaves only those with it, or without it."""
        longest = max(len(example) for step in self.steps for example in step)
        sizes = [self.recipe.microbatch_tokens]
        while sizes[-1] > longest:
            sizes.append(max(sizes[-1] // 2, longest))
        free_choice = (False, True) if self.engine.method.recomputes else (False,)
        twice = free_choice if checkpointing is None else (checkpointing,)
        found = [self.option(size, gradient_checkpointing=choice) for choice in twice for size in sizes]
        return sorted(found, key=lambda option: option.slowdown)

    def option(self, microbatch_tokens: int, *, gradient_checkpointing: bool) -> Option:
        """Return the forecast of one way to compute."""
        most, computed = self._tokens(microbatch_tokens)
        _, fastest = self._tokens(self.recipe.microbatch_tokens)
        slowdown = computed / fastest * (_TWICE if gradient_checkpointing else 1.0)
        peak_bytes = self._peak(most, gradient_checkpointing)
        return Option(microbatch_tokens, gradient_checkpointing, peak_bytes, round(slowdown, 3))

    def fits(self, option: Option) -> bool:
        """Return whether the forecast leaves some room."""
        return option.peak_bytes <= self.level + _MARGIN * self.free

    def is_tight(self, option: Option) -> bool:
        """Return whether the forecast is close enough to what is free for measuring to be worth its time."""
        return option.peak_bytes > self.level + _TIGHT * self.free

    def choose(self) -> Option:
        """Return the fastest option of the recipe's that fits, or the smallest where none does."""
        pinned = self.recipe.gradient_checkpointing
        if pinned and not self.engine.method.recomputes:
            raise TuneError(
                f"`{self.recipe.method.name}` cannot be trained with `gradient_checkpointing`.",
                hint="Leave it out; a smaller `microbatch_tokens` takes less memory too.",
            )
        first = self.option(self.recipe.microbatch_tokens, gradient_checkpointing=bool(pinned))
        if self.fits(first):
            return first
        options = self.options(checkpointing=pinned)
        fitting = [option for option in options if self.fits(option)]
        return fitting[0] if fitting else min(options, key=lambda option: option.peak_bytes)

    def measure(self, option: Option, loss_sum: Callable[[Any], torch.Tensor], look: Callable[[], None]) -> None:
        """Compute the heaviest microbatch twice, change nothing, and correct the forecasts by what it took.

        Args:
            option: How to compute.
            loss_sum: The objective's.
            look: Called before each pass; may raise to break off.
        """
        engine, random = self.engine, checkpoint.random_state()
        self.apply(option)
        engine.method.to_training(engine.model)
        microbatches = [part for step in self.steps for part in engine.microbatches(step)]
        heaviest = max(microbatches, key=lambda part: engine.lay_out(part).input_ids.size)
        adds_up = len(microbatches) > len(self.steps)  # then gradients are there from the second pass on
        memory.give_back()
        memory.forget_peak(engine.device)
        try:
            for _ in range(2):
                look()
                loss_sum(engine.states(heaviest)).backward()  # type: ignore[no-untyped-call]
                if not adds_up:
                    engine.model.zero_grad(set_to_none=True)
            peak_bytes = memory.peak(engine.device)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error):
                raise
            peak_bytes = self.level + self.free
        finally:
            engine.model.zero_grad(set_to_none=True)
            checkpoint.set_random_state(random)
        forecast = self._peak(engine.lay_out(heaviest).input_ids.size, option.gradient_checkpointing)
        forecast -= self.level + self._state_bytes
        measured = (peak_bytes - self.level) / max(1, forecast)
        self._correction *= max(_LEAST_CORRECTION, measured)
        memory.give_back()

    def apply(self, option: Option) -> None:
        """Let the engine compute this way."""
        self.engine.max_tokens = option.microbatch_tokens
        if option.gradient_checkpointing:
            self.engine.inner.activation_checkpointing_enable({"use_reentrant": False})
        elif self.engine.inner.is_activation_checkpointing:
            self.engine.inner.activation_checkpointing_disable()

    def facts(self, option: Option) -> dict[str, Any]:
        """Return the plan's part on memory, JSON-ready.

        ``room`` is what the process may hold in all, in bytes; ``cheapest`` the fastest option of all that fits.
        """
        fits = self.fits(option)
        cheapest: Option | None = option
        if not fits:
            cheapest = next(filter(self.fits, self.options()), None)
        room = self.level + self.free
        return {"room": room, "fits": fits, "cheapest": cheapest and asdict(cheapest), **asdict(option)}

    def _tokens(self, size: int) -> tuple[int, int]:
        """Return (most tokens of a microbatch, all tokens computed) in the heaviest steps."""
        if size not in self._known_tokens:
            self._known_tokens[size] = self._count_tokens(size)
        return self._known_tokens[size]

    def _count_tokens(self, size: int) -> tuple[int, int]:
        engine, before = self.engine, self.engine.max_tokens
        engine.max_tokens = size
        try:
            sizes = [engine.lay_out(part).input_ids.size for step in self.steps for part in engine.microbatches(step)]
        finally:
            engine.max_tokens = before
        return max(sizes), sum(sizes)

    def _peak(self, tokens: int, checkpointing: bool) -> int:
        """Forecast the peak of a microbatch."""
        engine, per_token = self.engine, self.engine.saved_bytes_per_token
        layers = sum(map(len, stacks_of(engine.inner)))
        one_layer = per_token / layers
        if checkpointing:
            per_token = layers * engine.inner.config.get_text_config().hidden_size * engine.dtype.itemsize + one_layer
        trained = self._trained_bytes()
        growth = (
            self._workspace + trained + tokens * (per_token + one_layer)
        )  # its gradients come and go layer by layer
        return int(self.level + self._correction * growth + self._state_bytes)

    def _trained_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.engine.model.parameters() if p.requires_grad)
