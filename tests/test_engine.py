"""The engine is exact: packed and shared rows give the loss and gradients of padded, separate ones."""

import numpy as np
import pytest
import torch
from conftest import fast, make_model, plainly

from tune_magic.data.example import Example, Segment
from tune_magic.methods.base import Method, MethodOptions
from tune_magic.methods.full import Full, FullOptions
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.objectives.sft import SFT
from tune_magic.training import packing
from tune_magic.training.engine import TokenEngine

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi", "phi3", "smollm3", "olmo2", "stablelm", "gpt_neox", "gpt2"]


def segment(tokens, trained):
    return Segment(np.array(tokens, dtype=np.int32), np.array([float(t) for t in trained], dtype=np.float32))


def example(seed, prefix=(5, 6, 7, 8), length=9, branches=0):
    draw = np.random.default_rng(seed)
    tokens = [*prefix, *draw.integers(3, 90, length).tolist()]
    trained = [0] * (len(prefix) + length // 2) + [1] * (length - length // 2)
    tails = tuple(segment(draw.integers(3, 90, 4 + i), [1] * (4 + i)) for i in range(branches))
    return Example(segment(tokens, trained), tails)


CASES = {
    "one row": [example(0)],
    "shared prefix": [example(i, length=5 + i) for i in range(4)],
    "nothing shared": [example(i, prefix=(i + 10,)) for i in range(3)],
    "equal prompts": [Example(segment([5, 6, 7, 8, t], [0, 0, 0, 0, 1])) for t in (9, 10, 11)],
    "one row is a prefix of another": [Example(segment([5, 6, 7], [0, 0, 1])), Example(segment([5, 6, 7, 8], [0, 0, 0, 1]))],
    "branches": [example(1, branches=2), example(2, branches=3)],
    "trained from the second token": [Example(segment([5, 6, 7], [0, 1, 1])), Example(segment([5, 6, 9], [0, 1, 1]))],
}  # fmt: skip


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def engine_of(model, method=None, **options):
    method = method or Full(FullOptions())
    settings = {"dtype": torch.float32, "share_prefixes": True, "max_tokens": 4096} | options
    return TokenEngine(method.apply(model, "CAUSAL_LM"), method, **settings)


def loss_and_gradient(engine, states, examples, objective=None):
    engine.model.zero_grad()
    loss = (objective or SFT()).loss_sum(states(examples))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in engine.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_exact_for_every_family_on_the_list(family, tmp_path):
    changes = {"sliding_window": None} if family == "mistral" else {}
    engine = engine_of(load(make_model(tmp_path / family, family, **changes)).eval())
    assert engine.packed, engine.reason
    for name, examples in CASES.items():
        ours = loss_and_gradient(engine, fast(engine), examples)
        theirs = loss_and_gradient(engine, plainly(engine), examples)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        error = (ours[1] - theirs[1]).norm() / theirs[1].norm()
        assert error < 1e-5, name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("method", [Full(FullOptions()), Lora(LoraOptions(r=4))])
def test_rows_are_packed_in_half_precision_too(family, method, tmp_path):
    """Weights of `full` stay float32 under autocast, so queries and values reach attention in two precisions."""
    engine = engine_of(load(make_model(tmp_path / family, family)).eval(), method, dtype=torch.bfloat16)
    engine.model.eval()
    engine.self_check(CASES["shared prefix"], SFT().loss_sum)
    assert engine.packed, engine.reason
    loss, gradient = loss_and_gradient(engine, fast(engine), CASES["shared prefix"])
    reference = loss_and_gradient(engine, plainly(engine), CASES["shared prefix"])
    torch.testing.assert_close(loss, reference[0], rtol=2e-2, atol=2e-2)
    assert (gradient - reference[1]).norm() < 5e-2 * reference[1].norm()


def test_sharing_saves_tokens_and_changes_nothing(tiny):
    examples = CASES["shared prefix"]
    shared, apart = packing.pack(examples, share=True), packing.pack(examples, share=False)
    assert shared.input_ids.size == apart.input_ids.size - 3 * 4  # four tokens, once instead of four times
    engine = engine_of(load(tiny))
    with_sharing = loss_and_gradient(engine, engine.states, examples)[0]
    engine.share_prefixes = False
    torch.testing.assert_close(
        loss_and_gradient(engine, engine.states, examples)[0], with_sharing, rtol=1e-6, atol=1e-6
    )


def test_dropout_turns_sharing_off_but_not_packing(tiny):
    method = Lora(LoraOptions(lora_dropout=0.1))
    engine = engine_of(load(tiny), method)
    engine.model.train()
    assert engine.packed
    assert not engine.shares
    engine.model.eval()
    assert engine.shares  # nothing is drawn in evaluation


@pytest.mark.parametrize(("family", "word"), [("opt", "opt"), ("falcon", "falcon"), ("bloom", "bloom")])
def test_other_families_are_padded_and_the_plan_says_so(family, word, tmp_path):
    changes = {"n_head": 4, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32, "n_layer": 2}
    engine = engine_of(load(make_model(tmp_path / family, family, **changes)).eval())
    assert not engine.packed
    assert word in engine.reason
    loss = SFT().loss_sum(engine.states(CASES["shared prefix"]))
    assert torch.isfinite(loss)


def test_a_sliding_window_is_padded(tmp_path):
    engine = engine_of(load(make_model(tmp_path / "m", "mistral", sliding_window=8)))
    assert "sliding" in engine.reason


def test_the_self_check_catches_a_model_that_ignores_the_mask(tiny):
    model = load(tiny)
    forward = model.base_model.forward
    model.base_model.forward = lambda *a, attention_mask=None, **k: forward(
        *a, attention_mask=None if attention_mask is not None and attention_mask.ndim == 4 else attention_mask, **k
    )
    engine = engine_of(model)
    engine.self_check(CASES["shared prefix"], SFT().loss_sum)
    assert not engine.packed
    assert "differ" in engine.reason


def test_the_self_check_catches_a_model_that_cannot_take_the_mask(tiny):
    model = load(tiny)
    forward = model.base_model.forward

    def refuse(*args, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.ndim == 4:
            raise ValueError("what is this?")
        return forward(*args, attention_mask=attention_mask, **options)

    model.base_model.forward = refuse
    engine = engine_of(model)
    engine.self_check(CASES["shared prefix"], SFT().loss_sum)
    assert not engine.packed
    assert "what is this?" in engine.reason
    assert torch.isfinite(SFT().loss_sum(engine.states(CASES["shared prefix"])))


def test_the_self_check_passes_an_honest_model(tiny):
    engine = engine_of(load(tiny), Lora(LoraOptions(r=2)))
    engine.self_check(CASES["shared prefix"], SFT().loss_sum)
    assert engine.packed


def test_microbatches_keep_the_budget_and_every_example():
    examples = [example(i, length=5 + i) for i in range(7)]
    for share in (True, False):
        cut = list(packing.groups(examples, 24, share=share))
        assert sorted(e.trunk.tokens.tolist() for group in cut for e in group) == sorted(
            e.trunk.tokens.tolist() for e in examples
        )
        assert all(packing.pack(group, share=share).input_ids.size <= 24 for group in cut)
        assert len(cut) > 1
        if not share:
            assert [id(e) for group in cut for e in group] == [id(e) for e in examples]


class Squared(SFT):
    """An objective that is not linear in the log-probabilities."""

    def loss_sum(self, states):
        return (states.log_probs().square() * states.weights).sum()


@pytest.mark.parametrize("objective", [SFT(), Squared()], ids=["sft", "squared"])
@pytest.mark.parametrize("frozen", [False, True])
def test_log_probs_in_chunks_are_the_same(tiny, monkeypatch, frozen, objective):
    from tune_magic.training import target_states

    torch.manual_seed(0)
    engine = engine_of(load(tiny), Lora(LoraOptions(r=2)) if frozen else None)
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # also where LoRA begins with zeros
    reference = loss_and_gradient(engine, plainly(engine), CASES["branches"], objective)
    for smallest in (100, 3):
        monkeypatch.setattr(target_states, "_CHUNK_LOGITS", {"cpu": 0})
        monkeypatch.setattr(target_states, "_LEAST_CHUNK", smallest)
        assert engine.states(CASES["branches"]).head_is_trained is not frozen
        pieces = loss_and_gradient(engine, engine.states, CASES["branches"], objective)
        for expected, found in zip(reference, pieces, strict=True):
            assert (found - expected).norm() < 1e-5 * expected.norm()
        with torch.no_grad():
            assert not engine.states(CASES["branches"]).log_probs().requires_grad


def test_a_method_that_changes_the_input_is_padded(tiny):
    class Prompting(Method):
        packs = False

        def apply(self, model, task):
            return model

    engine = engine_of(load(tiny), Prompting(MethodOptions(name="prompting")))
    assert "changes what the model reads" in engine.reason


def test_lora_trains_the_parameters_the_paper_counts(tmp_path):
    """BERT-base: rank 8 on query and value trains 294,912 parameters; the same arithmetic on a decoder of its size."""
    model = make_model(
        tmp_path / "m", "llama", hidden_size=768, num_attention_heads=12, num_key_value_heads=12, num_hidden_layers=12,
        intermediate_size=32,
    )  # fmt: skip
    lora = Lora(LoraOptions(r=8, target_modules=["q_proj", "v_proj"])).apply(load(model), "CAUSAL_LM")
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == 294_912
