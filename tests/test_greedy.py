"""Greedy answers written together: those of each prompt alone, in every family, whoever leaves and joins meanwhile."""

import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tune_magic.models import greedy
from tune_magic.models.generate import generate
from tune_magic.testing.models import make_model

BEGINNING = np.arange(70) % 200 + 20
WIDE = {"initializer_range": 0.4}  # so that texts differ
OWN = {"mistral": {"sliding_window": None}, "gptj": {"rotary_dim": 4}}


def prompts(count, seed=0):
    """Return prompts of 1 to 60 tokens; the latter half begin with the same ones."""
    draw = np.random.default_rng(seed)
    own = [draw.integers(5, 250, draw.integers(1, 61)) for _ in range(count)]
    return [prompt if place < count / 2 else np.concatenate([BEGINNING, prompt]) for place, prompt in enumerate(own)]


def load(folder, family="llama", **changes):
    """Return a model whose texts end at one in twelve of its tokens, and its tokenizer."""
    make_model(folder, family, **(WIDE | OWN.get(family, {}) | changes))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = list(range(2, model.config.vocab_size, 12))
    return model, tokenizer


def alone(model, tokenizer, prompt, count, **options):
    ids = torch.from_numpy(prompt)[None]
    whole = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    return tokenizer.decode(whole[0, len(prompt) :].tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("family", sorted(greedy._FAMILIES))
def test_answers_are_those_of_each_prompt_alone(tmp_path, family):
    model, tokenizer = load(tmp_path, family)
    assert greedy.fits(model)
    asked, counted = prompts(14), []
    found = generate(model, tokenizer, asked, max_new_tokens=30, batch_size=4, done=counted.append)
    assert found == [alone(model, tokenizer, prompt, 30) for prompt in asked]
    assert sum(counted) == 14
    assert len({len(text) for text in found}) > 4  # rows did leave at other times


def test_places_are_taken_again_and_no_more_is_kept_than_was_allowed(tmp_path, monkeypatch):
    model, _ = load(tmp_path)
    asked, forward, widths = prompts(40), type(model).forward, []

    @functools.wraps(forward)
    def watched(self, input_ids=None, **given):
        outputs = forward(self, input_ids=input_ids, **given)
        if input_ids.shape[1] == 1:
            widths.append((len(input_ids), given["attention_mask"].shape[1]))
        return outputs

    monkeypatch.setattr(type(model), "forward", watched)
    ends = set(model.generation_config.eos_token_id)
    answers = greedy.Greedy(model, asked, [40] * 40, ends, places=8, tokens=1000).write(
        lambda: None, lambda count: None
    )
    assert max(rows for rows, _ in widths) > 4
    assert all(rows <= 8 and rows * width <= 1000 for rows, width in widths)
    needed = sum(len(answer) - 1 for answer in answers)
    computed = sum(rows for rows, _ in widths)
    lengths = [len(answer) for answer in answers]
    in_batches = sum(max(lengths[start : start + 8]) * 8 for start in range(0, 40, 8))
    assert needed <= computed < 1.3 * needed < in_batches


def test_a_prompt_too_long_for_the_memory_is_written_by_itself(tmp_path):
    model, tokenizer = load(tmp_path)
    asked, ends = [BEGINNING, BEGINNING[:9], BEGINNING[:8]], set(model.generation_config.eos_token_id)
    answers = greedy.Greedy(model, asked, [12] * 3, ends, places=8, tokens=40).write(lambda: None, lambda count: None)
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    assert texts == [alone(model, tokenizer, prompt, 12) for prompt in asked]


def test_one_long_prompt_leaves_no_hole_behind(tmp_path, monkeypatch):
    """What all begin with is computed once; places that the long prompt alone needed are given back when it leaves."""
    model, tokenizer = load(tmp_path, max_position_embeddings=1200)
    draw, forward, computed, kept = np.random.default_rng(1), type(model).forward, [], []
    asked = [np.concatenate([BEGINNING, draw.integers(5, 250, size)]) for size in (900, *draw.integers(15, 35, 40))]

    @functools.wraps(forward)
    def watched(self, input_ids=None, **given):
        outputs = forward(self, input_ids=input_ids, **given)
        if input_ids.shape[1] > 1:
            computed.append(input_ids.numel())
        kept.append(len(input_ids) * outputs.past_key_values.get_seq_length())
        return outputs

    monkeypatch.setattr(type(model), "forward", watched)
    ends, rooms = set(model.generation_config.eos_token_id), [4, *[20] * 40]
    answers = greedy.Greedy(model, asked, rooms, ends, places=32, tokens=1600).write(lambda: None, lambda count: None)
    monkeypatch.undo()
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    assert texts == [alone(model, tokenizer, p, room) for p, room in zip(asked, rooms, strict=True)]
    assert max(kept) <= 1600
    assert computed.count(70) == 1
    assert sum(computed) <= 70 + 900 + 1.3 * 40 * 35


def test_an_empty_prompt_has_no_answer(tmp_path):
    model, tokenizer = load(tmp_path)
    asked = [np.array([], dtype=np.int32), BEGINNING]
    assert generate(model, tokenizer, asked, max_new_tokens=9) == ["", alone(model, tokenizer, BEGINNING, 9)]


def test_a_row_that_has_ended_never_goes_beyond_the_models_places(tmp_path):
    """Of five rows one ends at once, and stays until more have; the places of its longest prompt are few."""
    model, tokenizer = load(tmp_path, "gpt2", n_positions=32, max_position_embeddings=32)
    asked = [np.arange(length) % 60 + 40 for length in (28, 27, 5, 6, 7, 8, 9, 10, 32)]
    for end in range(5, 60, 9):
        model.generation_config.eos_token_id = end
        found = generate(model, tokenizer, asked, max_new_tokens=20)
        rooms = [min(20, 32 - len(prompt)) for prompt in asked]
        wanted = [alone(model, tokenizer, prompt, room) for prompt, room in zip(asked, rooms, strict=True) if room]
        assert found == [*wanted, ""]


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("llama", DYNAMIC), ("bloom", {}), ("mistral", {"sliding_window": 16})]
)
def test_what_does_not_fit_is_written_by_transformers(tmp_path, family, changes):
    """A model's own penalty, positions that depend on the longest row, a family that is not listed, a window."""
    model, tokenizer = load(tmp_path, family, **changes)
    if not changes and family == "llama":
        model.generation_config.repetition_penalty = 1.7
    assert not greedy.fits(model)
    asked = prompts(6)[:3]
    assert generate(model, tokenizer, asked, max_new_tokens=12) == [alone(model, tokenizer, p, 12) for p in asked]


def test_it_is_broken_off_between_tokens(tmp_path):
    model, tokenizer = load(tmp_path)
    calls = []

    def between():
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, prompts(6), max_new_tokens=30, between=between)
    assert len(calls) == 5
