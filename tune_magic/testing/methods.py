"""What every method must do."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from tune_magic.evaluation.classes import ClassScorer
from tune_magic.evaluation.sides import rows_to_score
from tune_magic.handles import Run
from tune_magic.models.load import load_causal_lm
from tune_magic.testing.rows import rows_of
from tune_magic.testing.trial import Conformance, assert_explained, assert_learns, do
from tune_magic.training.job import finetune
from tune_magic.training.tuned import load_tuned


class MethodConformance(Conformance):
    """Tests of a `Method`: trains, stops and goes on exactly, keeps what it trains, shows its base, merges.

    Attributes:
        tolerance: Largest difference of logits between merged and trained model, as a share of the largest logit.
    """

    kind = "method"
    tolerance: ClassVar[float] = 1e-4

    @classmethod
    def new(cls, **changes: Any) -> Run:
        """Make a run with it."""
        return cls.make(cls.rows or rows_of(("messages",)), method=cls.named(), **changes)

    def test_it_says_what_it_is(self) -> None:
        """For `%tune explain`."""
        assert_explained(self.plugin)

    def test_a_model_learns(self) -> None:
        """Held-out loss becomes lower than the base's."""
        assert_learns(self.trained(self.new))

    def test_a_stopped_run_ends_as_if_unbroken(self) -> None:
        """Losses, parameters and optimizer are the same to the bit."""
        self.assert_stops_and_goes_on(self.new)

    def test_a_checkpoint_holds_exactly_what_is_trained(self) -> None:
        """No more, no less, and by the same names each time the method is applied."""
        run = self.trained(self.new)
        saved = load_file(run.best_checkpoint / "trainable.safetensors")
        model = load_tuned(run).model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert saved.keys() == trained.keys()
        assert sum(p.numel() for p in trained.values()) == run.summary().plan["trainable_parameters"] > 0
        assert all(torch.equal(saved[name], p) for name, p in trained.items())

    def test_a_step_does_not_depend_on_how_it_is_cut(self) -> None:
        """Loss and gradient are those of the step's rows, whatever fits at once."""
        found = []
        for tokens in (16, 4096):
            run = self.new(max_steps=1, microbatch_tokens=tokens, eval={"steps": 1, "samples": 0})
            do(finetune, run)
            found.append(run.summary().steps[1])
        for number in ("loss", "grad_norm"):
            one, other = (float(step[number]) for step in found)
            assert abs(one - other) <= 1e-3 * abs(other), f"{number} is {one} in small pieces, {other} in large ones"

    def test_the_base_is_still_in_there(self) -> None:
        """Where the method `adds`, `without` shows the base as it came, also after training."""
        tuned = load_tuned(self.trained(self.new))
        if not tuned.method.adds:
            pytest.skip("it changes the base model")
        base = load_causal_lm(tuned.base, torch.float32).eval()
        with tuned.method.without(tuned.model):
            shown = _logits(tuned.model)
        torch.testing.assert_close(shown, _logits(base), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(_logits(tuned.model), shown, atol=1e-6), "the tuned model is the base"

    def test_a_classifier_learns_with_its_head(self) -> None:
        """The new head is trained, too; where the method still `adds`, `without` shows it untrained."""
        run = self.make(
            rows_of(("text_label",)), encoder=True, method=self.named(), learning_rate=5e-3, max_steps=40, batch_size=8,
            eval={"steps": 20, "samples": 0},
        )  # fmt: skip
        do(finetune, run)
        assert_learns(run)
        saved, tuned = load_file(run.best_checkpoint / "trainable.safetensors"), load_tuned(run)
        base = tuned.objective.load(tuned.base, torch.float32)
        heads = [name for name, child in base.named_children() if child is not base.base_model]
        assert any(head in name.split(".") for name in saved for head in heads), f"{heads[0]} is not trained"
        if tuned.method.adds:
            rows = rows_to_score(tuned, run.path)[0]
            scorer = ClassScorer(tuned, rows, {}, lambda count: None)
            with tuned.without_tuning() as shown:
                found = scorer.score("loss", shown, rows[:])
            first = float(run.summary().evaluations[0]["loss"])
            assert abs(found - first) <= 1e-3 * first, f"`without` shows a loss of {found}, the base had {first}"

    def test_what_is_merged_is_the_model(self) -> None:
        """Where the method `merges`, the plain model gives the same logits."""
        tuned = load_tuned(self.trained(self.new))
        if not tuned.method.merges:
            pytest.skip("it cannot be folded into the model")
        trained = _logits(tuned.model)
        merged = tuned.method.merge(tuned.model)
        assert type(merged).__module__.startswith("transformers."), f"{type(merged)} is no plain Transformers model"
        difference = float((_logits(merged) - trained).abs().max() / trained.abs().max())
        assert difference <= self.tolerance, f"merged logits differ by {difference:.1e}"


def _logits(model: Any) -> torch.Tensor:
    """Return the logits of some tokens, on the CPU."""
    ids = torch.arange(5, 45)[None].to(next(model.parameters()).device)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return torch.Tensor(logits[:, -ids.shape[1] :].cpu())  # without those of virtual tokens
