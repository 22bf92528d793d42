"""What every objective must do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from tune_magic.handles import Run
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.testing.rows import rows_of
from tune_magic.testing.trial import Conformance, assert_explained, assert_learns
from tune_magic.training.prepare import Session, prepare
from tune_magic.training.tuned import recipe_of

_ROWS = 6
_STEP = 2e-3  # of the loss, each way


class ObjectiveConformance(Conformance):
    """Tests of an `Objective`: its loss is a sum with the right gradient, it learns, stops and goes on exactly.

    Attributes:
        tolerance: Largest difference between the gradient and finite differences, as a share.
    """

    kind = "objective"
    tolerance: ClassVar[float] = 0.02

    @classmethod
    def new(cls, **changes: Any) -> Run:
        """Make a run with it, on an encoder where whole rows are scored."""
        rows = cls.rows or rows_of(cls.plugin.formats)
        return cls.make(rows, encoder=cls.plugin.task != "CAUSAL_LM", objective=cls.named(), **changes)

    @classmethod
    def session(cls) -> Session:
        """Return all that a run of it would work with, every parameter trained, nothing drawn."""
        if "session" not in cls._kept:
            run = cls.new(method="full")
            with EventLog(run.path / "events.jsonl") as log:
                cls._kept["session"] = prepare(recipe_of(run), run.path, log, Control(run.path, 1))
            cls._kept["session"].model.eval()
        found: Session = cls._kept["session"]
        return found

    def test_it_says_what_it_is(self) -> None:
        """For `%tune explain`."""
        assert_explained(self.plugin)

    def test_what_it_learned_is_json_and_makes_it_again(self) -> None:
        """The plan keeps `facts`; an evaluation makes the objective of them."""
        objective = self.session().objective
        facts = objective.facts()
        again = json.loads(json.dumps(facts))
        assert again == facts
        assert type(objective)(objective.options, **again).facts() == facts

    def test_the_loss_is_a_sum_over_rows(self) -> None:
        """What rows are computed together must not matter."""
        session = self.session()
        examples = session.dataset.train[:_ROWS]
        with torch.no_grad():
            together = _total(session, session.engine.microbatches(examples))
            alone = _total(session, ([example] for example in examples))
        assert together.ndim == 0, f"a scalar is wanted, got the shape {tuple(together.shape)}"
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)

    def test_its_gradient_is_that_of_its_loss(self) -> None:
        """Along the gradient, the loss changes as fast as the gradient is long."""
        session = self.session()
        examples = session.dataset.train[:_ROWS]
        parameters = [p for p in session.model.parameters() if p.requires_grad]

        def loss() -> torch.Tensor:
            return _total(session, session.engine.microbatches(examples))

        value = loss()
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        size = abs(float(value.detach()))
        pairs = [(p, g.clone()) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        length = float(torch.sqrt(sum((g.double() ** 2).sum() for _, g in pairs)))  # type: ignore[arg-type]
        assert length > 0, "the loss has no gradient"
        measured = _slope(loss, pairs, _STEP * max(size, 0.1) / length, length)
        assert abs(measured - length) <= self.tolerance * length, f"the gradient is {length}, differences {measured}"

    def test_what_it_tallies_are_sums(self) -> None:
        """Evaluations add them up over microbatches."""
        session = self.session()
        examples = session.dataset.train[:_ROWS]
        with torch.no_grad():
            together: dict[str, float] = {}
            for microbatch in session.engine.microbatches(examples):
                for name, total in session.objective.tally(session.engine.states(microbatch)).items():
                    together[name] = together.get(name, 0.0) + total
            alone = [session.objective.tally(session.engine.states([example])) for example in examples]
        for name, total in together.items():
            expected = sum(found[name] for found in alone)
            assert abs(total - expected) <= 1e-3 * max(1.0, abs(expected)), (
                f"`{name}` is {total}, row by row {expected}"
            )

    def test_a_model_learns(self) -> None:
        """Held-out loss becomes lower than the base's."""
        assert_learns(self.trained(self.new))

    def test_a_stopped_run_ends_as_if_unbroken(self) -> None:
        """Losses, parameters and optimizer are the same to the bit."""
        self.assert_stops_and_goes_on(self.new)


def _total(session: Session, microbatches: Any) -> torch.Tensor:
    parts = [session.objective.loss_sum(session.engine.states(microbatch)) for microbatch in microbatches]
    return torch.stack(parts).sum()


def _slope(
    loss: Callable[[], torch.Tensor], pairs: list[tuple[Any, torch.Tensor]], step: float, length: float
) -> float:
    """Return the slope of a loss along its gradient, by differences of `step` each way."""
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):  # there, to the other side, and back
            for parameter, gradient in pairs:
                parameter.add_(gradient, alpha=sign * step / length)
            values.append(float(loss()))
    return (values[0] - values[1]) / (2 * step)
