"""What every callback must do."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch

from tune_magic.handles import Run
from tune_magic.testing.rows import rows_of
from tune_magic.testing.trial import Conformance, do, tensors
from tune_magic.training.job import finetune


class CallbackConformance(Conformance):
    """Tests of a `Callback`: looking on changes nothing, and what it knows goes on where it was.

    Attributes:
        changes_training: Whether it is meant to change what is trained; it is then only stopped and resumed.
    """

    kind = "callback"
    changes_training: ClassVar[bool] = False

    @classmethod
    def new(cls, **changes: Any) -> Run:
        """Make a run that it looks at."""
        return cls.make(cls.rows or rows_of(("messages",)), **{"callbacks": [cls.named()], **changes})

    def test_it_changes_nothing(self) -> None:
        """A run with it is the run without it, as far as it lets it go."""
        if self.changes_training:
            return
        run = self.trained(self.new)
        plain = self.new(callbacks=[], max_steps=run.summary().step, lr_scheduler_type="constant")
        same = self.new(max_steps=run.summary().step, lr_scheduler_type="constant")
        do(finetune, plain)
        do(finetune, same)
        for name, tensor in tensors(plain).items():
            assert torch.equal(tensor, tensors(same)[name]), f"{name} is another while it looks on"

    def test_a_stopped_run_ends_as_if_unbroken(self) -> None:
        """Also in the numbers it logs, which needs its `state`."""
        run = self.assert_stops_and_goes_on(self.new)
        whole = self.trained(self.new)
        assert run.summary().notes == whole.summary().notes, "stopped and resumed, it logs other numbers"

    def test_its_state_is_json(self) -> None:
        """Each checkpoint keeps it."""
        run = self.trained(self.new)
        kept = json.loads((run.checkpoints[max(run.checkpoints)] / "state.json").read_text(encoding="utf-8"))
        state = kept["callbacks"][self.called()]
        again = self.plugin(self.plugin.Options.model_validate(self.named()))
        again.load_state(state)
        assert again.state() == state
