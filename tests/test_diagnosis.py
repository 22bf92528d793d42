"""Each kind of curve gets its words, and a healthy one gets none."""

import itertools

import numpy as np
import pytest
from test_view import plan

from tune_magic.diagnosis import diagnose
from tune_magic.recipe import build_recipe, yaml
from tune_magic.storage.summary import Summary


def recorded(losses, held_out, norms=None, state="finished", gap_s=0.0, **changes):
    """A summary as a run with these losses by step and held-out losses by step leaves it."""
    summary, clock = Summary(), itertools.count()
    time = 0.0

    def add(name, **content):
        summary.add({"seq": next(clock), "attempt": 1, "t": time, "type": name, **content})

    facts = {"train_rows": 400, "steps_per_epoch": max(1, len(losses) // 2), "cut_rows": 0}
    add("plan", **plan(len(losses), **{**facts, "engine_note": None, "packed": True, **changes}))
    add("state", state="running", from_step=0)
    if 0 in held_out:
        add("eval", step=0, loss=held_out[0], seconds=0.5)
    for step, loss in enumerate(losses, start=1):
        time += 1.0 + gap_s
        norm = norms[step - 1] if norms is not None else 0.5
        add("step", step=step, loss=loss, grad_norm=norm, learning_rate=2e-4, tokens=100, seconds=1.0)
        if step in held_out:
            time += 0.5
            add("eval", step=step, loss=held_out[step], seconds=0.5)
    add("state", state=state)
    return summary


def falling(start=2.0, end=0.5, steps=80, noise=0.05, seed=0):
    draw = np.random.default_rng(seed)
    curve = end + (start - end) * np.exp(-4 * np.arange(steps) / steps)
    return (curve * (1 + noise * draw.standard_normal(steps))).tolist()


def kinds(summary):
    return [diagnosis.kind for diagnosis in diagnose(summary)]


HEALTHY = {0: 2.1, 20: 1.1, 40: 0.75, 60: 0.66, 80: 0.655}


def with_spike(step, height):
    losses = falling()
    losses[step - 1] *= height
    return losses


def exploded():
    norms = [0.5] * 80
    norms[30] = 400.0
    return norms


CURVES = {
    "overfitting": recorded(falling(end=0.02), {0: 2.1, 20: 0.9, 40: 0.8, 60: 0.95, 80: 1.1}),
    "rate_too_high": recorded([2.0 + 0.05 * step for step in range(80)], {0: 2.0, 20: 2.9, 40: 3.8, 60: 5.0, 80: 6.0}),
    "rate_too_low": recorded(falling(2.1, 2.09, noise=0.002), {0: 2.1, 20: 2.1, 40: 2.098, 60: 2.095, 80: 2.09}),
    "underfitting": recorded(falling(2.1, 1.0), {0: 2.1, 20: 2.09, 40: 2.08, 60: 2.085, 80: 2.082}),
    "still_improving": recorded(falling(), {0: 2.1, 20: 1.6, 40: 1.3, 60: 1.0, 80: 0.8}),
    "spikes": recorded(with_spike(50, 9.0), HEALTHY),
    "exploding_gradients": recorded(falling(), HEALTHY, norms=exploded()),
    "masked_labels": recorded(falling(), HEALTHY, tokens_per_epoch=100_000, trained_tokens_per_epoch=900),
    "cut_rows": recorded(falling(), HEALTHY, cut_rows=90, max_length=300),
    "slow_input": recorded(falling(), HEALTHY, gap_s=2.0),
}


@pytest.mark.parametrize("kind", CURVES)
def test_each_kind_of_curve_is_named_first(kind):
    assert kinds(CURVES[kind])[0] == kind


@pytest.mark.parametrize("kind", CURVES)
def test_each_says_what_was_seen_and_what_to_change(kind):
    found = diagnose(CURVES[kind])[0]
    assert any(letter.isdigit() for letter in found.says)
    assert found.text.startswith(found.says)
    assert found.text.endswith(".")
    assert (found.change is None) == (kind == "masked_labels")
    if found.change:
        changed = build_recipe({"model": "m", "data": "rows.jsonl"}, yaml.read(found.change)[0])  # valid as it stands
        assert changed.normalised() != build_recipe({"model": "m", "data": "rows.jsonl"}).normalised()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [3, 12, 80, 1000])
def test_a_healthy_run_has_nothing_said_about_it(steps, seed):
    losses = falling(steps=steps, seed=seed, noise=0.15)
    held_out = {
        0: 2.1,
        **{round(steps * share): loss for share, loss in ((0.25, 1.1), (0.5, 0.75), (0.75, 0.66), (1, 0.655))},
    }
    assert kinds(recorded(losses, held_out)) == []


def test_a_small_set_learned_by_heart_is_called_small():
    found = kinds(recorded(falling(end=0.02), {0: 2.1, 20: 0.9, 40: 0.8, 60: 0.95, 80: 1.1}, train_rows=40))
    assert found[:2] == ["overfitting", "little_data"]


def test_a_rate_that_is_too_high_explains_its_spikes():
    losses = [2.0 + 0.05 * step for step in range(80)]
    losses[40] *= 9
    found = kinds(recorded(losses, {0: 2.0, 40: 3.9, 80: 6.0}, norms=exploded()))
    assert found == ["rate_too_high"]


def test_a_loss_that_is_no_number_is_named_with_its_step():
    (found, *_) = diagnose(recorded([*falling(steps=20), "nan"], {0: 2.1}, state="failed"))
    assert found.kind == "exploding_gradients"
    assert "step 21" in found.says
    assert found.change == "learning_rate: 2.0e-5"


def test_before_there_is_a_plan_or_a_step_nothing_is_said():
    assert diagnose(Summary()) == []
    assert kinds(recorded([], {0: 2.0}, state="running")) == []


def test_overfitting_names_the_epoch_to_end_at():
    (found, *_) = diagnose(CURVES["overfitting"])
    assert found.change == "num_train_epochs: 1"
    assert "step 40 (0.8)" in found.says
    (found, *_) = diagnose(
        recorded(
            falling(end=0.02), {0: 2.1, 20: 0.9, 40: 0.8, 60: 0.95, 80: 1.1},
            recipe={**plan(80)["recipe"], "max_steps": 80},
        )
    )  # fmt: skip
    assert found.change == "max_steps: 40"


def test_twice_of_nearly_nothing_is_no_spike():
    losses = falling(end=0.004)
    losses[70] *= 3
    assert "spikes" not in kinds(recorded(losses, HEALTHY))


def test_norms_that_fall_as_a_run_learns_are_no_explosion():
    norms = [4.0 * 0.8**step for step in range(80)]
    assert "exploding_gradients" not in kinds(recorded(falling(), HEALTHY, norms=norms))


@pytest.mark.parametrize(("method", "change"), [({"name": "lora", "r": 16}, "method.r: 4"), ({"name": "freeze"}, None)])
def test_few_rows_of_a_method_without_a_rank_get_no_rank(method, change):
    held_out = {0: 2.0, 20: 1.0, 40: 1.2, 60: 1.5, 80: 1.9}
    recipe = {**plan(80)["recipe"], "method": method}
    found = diagnose(recorded(falling(), held_out, train_rows=40, recipe=recipe))
    (little,) = [diagnosis for diagnosis in found if diagnosis.kind == "little_data"]
    assert little.change == change
    assert little.text.startswith(
        "There are 40 training rows. " + ("Try `method.r: 4`: so" if change else "So few rows")
    )
