"""Whole rows without padding, and frozen layers computed once: both give what plain computing gives."""

import numpy as np
import pytest
import torch
from conftest import fast, plainly, table_of

from tune_magic.data.example import Example, Segment
from tune_magic.methods.freeze import Freeze, FreezeOptions
from tune_magic.methods.full import Full, FullOptions
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.methods.prompts import Prefix, PrefixOptions, Prompt, PromptOptions, PTuning, PTuningOptions
from tune_magic.models.layers import layers_of, output_of, skipped
from tune_magic.objectives.classify import Classify
from tune_magic.objectives.sft import SFT
from tune_magic.training import trunk
from tune_magic.training.engine import TokenEngine
from tune_magic.training.outputs import outputs_of
from tune_magic.training.rows import RowEngine
from tune_magic.training.trunk import Trunk

ENCODERS = ["bert", "distilbert", "electra", "roberta", "xlm-roberta", "camembert"]
DECODERS = ["llama", "qwen2", "gpt2"]
SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 90, "pad_token_id": 1, "num_labels": 3, "type_vocab_size": 2, "embedding_size": 32,
    "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "n_layer": 3, "n_head": 4, "n_embd": 32,
    "n_positions": 90,
}  # fmt: skip
NO_DROPOUT = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "seq_classif_dropout"), 0.0)  # fmt: skip


def classifier(family, seed=0, **changes):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    known = vars(AutoConfig.for_model(family)).keys() | {"num_labels"}
    attributes = AutoConfig.for_model(family).attribute_map
    wanted = {k: v for k, v in (SIZES | NO_DROPOUT | changes).items() if k in known or k in attributes}
    config = AutoConfig.for_model(family, **wanted)
    config.use_cache = False
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # away from zero, so that each part has a say
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def some_rows(count=12, longest=40, seed=0, prefix=()):
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        own = draw.integers(3, 290, draw.integers(2, longest))
        tokens = np.concatenate([np.array(prefix, dtype=np.int64), own]).astype(np.int32)
        rows.append(
            Example(
                Segment(tokens, np.zeros(len(tokens), np.float32)),
                label=int(draw.integers(3)),
                index=number,
            )
        )
    return rows


def engine_of(model, method=None, kind=RowEngine, task="SEQ_CLS", **options):
    method = method or Full(FullOptions())
    settings = {"dtype": torch.float32, "max_tokens": 100} | options
    return kind(method.apply(model, task), method, **settings)


def loss_and_gradient(engine, states, examples, objective=None):
    engine.model.zero_grad()
    loss = (objective or Classify(classes=["a", "b", "c"])).loss_sum(states(examples))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in engine.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", ENCODERS + DECODERS)
def test_rows_without_padding_are_exact_for_every_family(family):
    engine = engine_of(classifier(family))
    assert engine.packed, engine.reason
    assert engine.model.training
    for rows in (some_rows(), some_rows(1), some_rows(4, longest=3, prefix=range(3, 20))):
        ours = loss_and_gradient(engine, fast(engine), rows)
        theirs = loss_and_gradient(engine, plainly(engine), rows)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        assert (ours[1] - theirs[1]).norm() / theirs[1].norm() < 1e-5
    engine.self_check(some_rows(), Classify(classes=["a", "b", "c"]).loss_sum)
    assert engine.packed, engine.reason


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_activations_computed_twice_are_exact_too(family):
    engine = engine_of(classifier(family))
    once = loss_and_gradient(engine, engine.states, some_rows())
    engine.inner.activation_checkpointing_enable({"use_reentrant": False})
    twice = loss_and_gradient(engine, engine.states, some_rows())
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6)


def test_no_token_of_padding_is_computed():
    engine = engine_of(classifier("bert"))
    rows = some_rows()
    sizes = []
    with output_of(layers_of(engine.inner)[0]) as seen:
        for microbatch in engine.microbatches(rows):
            engine.states(microbatch)
            sizes.append(seen[-2].shape[1])  # the last time the head alone is computed
    assert sum(sizes) == sum(map(len, rows))
    assert max(sizes) <= 100


def test_decoders_share_what_rows_begin_with_and_encoders_do_not():
    rows = some_rows(4, longest=3, prefix=range(3, 30))
    for family, shares in (("llama", True), ("bert", False)):
        engine = engine_of(classifier(family), max_tokens=400)
        assert (engine.lay_out(rows).input_ids.size < sum(map(len, rows))) is shares


def test_attention_dropout_is_drawn_for_seen_tokens_alone():
    engine = engine_of(classifier("bert", attention_probs_dropout_prob=0.5))
    rows = some_rows(3)
    torch.manual_seed(0)
    first = engine.states(rows).logits
    assert not torch.allclose(first, engine.states(rows).logits)
    engine.model.eval()
    torch.testing.assert_close(engine.states(rows).logits, plainly(engine)(rows).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{"position_embedding_type": "relative_key"}])
def test_what_is_not_known_to_be_exact_is_padded(change):
    model = classifier("bert")
    for name, value in change.items():
        setattr(model.config, name, value)
    engine = engine_of(model)
    assert not engine.packed
    assert "relative" in engine.reason
    assert torch.isfinite(engine.states(some_rows()).logits).all()


def test_a_family_that_is_not_listed_is_padded():
    engine = engine_of(classifier("opt", word_embed_proj_dim=32, ffn_dim=64))
    assert "opt" in engine.reason
    assert engine.states(some_rows()).logits.shape == (12, 3)


def test_the_self_check_catches_a_head_that_reads_another_token():
    model = classifier("bert")
    pooler = model.bert.pooler
    plain = pooler.forward
    pooler.forward = lambda states: plain(states.mean(1, keepdim=True))
    engine = engine_of(model)
    engine.self_check(some_rows(), Classify(classes=["a", "b", "c"]).loss_sum)
    assert not engine.packed
    assert "differ" in engine.reason


BEFORE_ROWS = {
    "prompt": (Prompt, PromptOptions),
    "p_tuning": (PTuning, PTuningOptions),
    "prefix": (Prefix, PrefixOptions),
}


@pytest.mark.parametrize(("family", "name"), [
    *((family, "full") for family in ("bert", "llama", "deberta-v2", "modernbert", "albert")),
    *((family, name) for family in ("bert", "roberta", "llama") for name in BEFORE_ROWS),
])  # fmt: skip
def test_features_are_what_the_head_is_given(family, name):
    kind, options = BEFORE_ROWS.get(name, (Full, FullOptions))
    method = kind(options(**({"num_virtual_tokens": 3} if name in BEFORE_ROWS else {})))
    engine = engine_of(classifier(family).eval(), method, reads_features=True)
    engine.packed = False
    engine.model.eval()
    rows = some_rows(3) if family != "llama" else some_rows(1)
    with output_of(engine._layers[-1]) as found:
        states = engine.compute(engine.lay_out(rows), rows)
    given = found[-1] if torch.is_tensor(found[-1]) else found[-1][0]
    (gradient,) = torch.autograd.grad(states.logits.sum(), given)  # of what is read alone
    read = gradient.abs().sum(-1) > 0
    assert read.sum(1).tolist() == [1] * len(rows)
    assert torch.equal(states.features, given[read])


@pytest.mark.parametrize("family", ["deberta-v2", "mpnet"])
def test_a_family_whose_layers_give_tuples_is_computed_padded(family):
    engine = engine_of(classifier(family).eval())
    rows = some_rows(3)
    assert not engine.packed
    assert engine.states(rows).features is None
    assert engine.states(rows).logits.shape == (3, 3)


def test_logits_come_in_the_order_of_the_rows():
    for family in ("bert", "llama"):
        engine = engine_of(classifier(family).eval())
        rows = some_rows(9)
        alone = torch.cat([plainly(engine)([row]).logits.detach() for row in rows])
        found = torch.from_numpy(np.stack(outputs_of(engine, Classify(), rows)))
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_skipped_layers_compute_nothing_and_come_back(tiny):
    engine = engine_of(classifier("bert").eval())
    layers, rows = layers_of(engine.inner), some_rows(2)
    before = engine.states(rows).logits
    with skipped(layers), output_of(layers[-1]) as seen:
        plainly(engine)(rows)
        states = seen[0]
    with output_of(engine.inner.bert.embeddings) as embedded:
        plainly(engine)(rows)
    torch.testing.assert_close(states, embedded[0])
    assert not any("forward" in vars(layer) for layer in layers)
    torch.testing.assert_close(engine.states(rows).logits, before)


def freeze(layers=0):
    return Freeze(FreezeOptions(trainable_layers=layers))


def kept(engine, rows, folder):
    planned = trunk.plan(engine, [rows], folder)
    found = Trunk(engine, planned.depth)
    found.fill([rows], folder, lambda done: None)
    assert found._kept.numel() * 2 == planned.size_bytes
    assert list(folder.iterdir()) == []  # the file has no name any more
    return found


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama"])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("packed", [True, False])
def test_frozen_layers_computed_once_give_the_same_up_to_half_precision(family, layers, packed, tmp_path):
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1} if family == "bert" else {}
    engine = engine_of(classifier(family, **dropout), freeze(layers))
    engine.packed = packed
    rows = table_of(some_rows(), tmp_path)
    plan = trunk.plan(engine, [rows], tmp_path)
    assert plan.depth == 3 - layers
    one_a_row = packed and layers == 0
    assert plan.size_bytes == 2 * 32 * (len(rows) if one_a_row else sum(map(len, rows)))
    engine.trunk = kept(engine, rows, tmp_path)
    engine.model.eval()
    fresh = loss_and_gradient(engine, plainly(engine), rows)
    ours = loss_and_gradient(engine, engine.states, rows)
    torch.testing.assert_close(ours[0], fresh[0], rtol=2e-3, atol=1e-3)
    assert (ours[1] - fresh[1]).norm() / fresh[1].norm() < 5e-3
    for layer in layers_of(engine.inner)[: plan.depth]:
        layer.forward = None  # whatever called it would fail
    engine.states(rows[:3])


@pytest.mark.parametrize("share", [True, False])
def test_a_language_models_frozen_layers_are_kept_token_by_token(tiny, tmp_path, share):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    engine = engine_of(model, freeze(1), TokenEngine, "CAUSAL_LM", share_prefixes=share)
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(5):
        tokens = np.array([5, 6, 7, 8, 9, 10, 11, 12, 13, *draw.integers(3, 90, 6)], dtype=np.int32)
        branch = Segment(draw.integers(3, 90, 3).astype(np.int32), np.ones(3, np.float32))
        rows.append(Example(Segment(tokens, (np.arange(len(tokens)) > 11).astype(np.float32)), (branch, branch)))
    rows = table_of(rows, tmp_path)
    engine.trunk = kept(engine, rows, tmp_path)
    for some in (rows, rows[1:4]):
        ours, fresh = (loss_and_gradient(engine, way, some, SFT()) for way in (engine.states, plainly(engine)))
        torch.testing.assert_close(ours[0], fresh[0], rtol=1e-3, atol=1e-3)
        assert (ours[1] - fresh[1]).norm() / fresh[1].norm() < 5e-3


def test_layers_that_change_are_never_kept(tmp_path):
    rows = table_of(some_rows(), tmp_path)
    assert trunk.plan(engine_of(classifier("bert")), [rows], tmp_path).depth == 0
    lora = Lora(LoraOptions(target_modules=r".*layer\.2\..*query"))
    assert trunk.plan(engine_of(classifier("bert"), lora), [rows], tmp_path).depth == 2
    draws = engine_of(classifier("bert", hidden_dropout_prob=0.1), lora)
    assert trunk.plan(draws, [rows], tmp_path).depth == 0


@pytest.mark.parametrize("family", ["albert", "deberta-v2"])
def test_layers_that_are_run_often_or_give_more_than_states_are_not_kept(family, tmp_path):
    engine = engine_of(classifier(family), freeze())
    assert trunk.plan(engine, [table_of(some_rows(), tmp_path)], tmp_path) == (0, 0)


def test_nothing_is_kept_that_the_disk_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(trunk.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1500})())
    assert (
        trunk.plan(engine_of(classifier("bert"), freeze()), [table_of(some_rows(12), tmp_path)], tmp_path).depth == 0
    )  # 768 bytes, twice
    assert trunk.plan(engine_of(classifier("bert"), freeze()), [table_of(some_rows(11), tmp_path)], tmp_path).depth == 3


def test_numbers_too_large_for_float16_are_kept_in_bfloat16(tmp_path):
    engine = engine_of(classifier("llama"), freeze(1))
    with torch.no_grad():
        engine.inner.model.embed_tokens.weight.mul_(1e6)
    rows = table_of(some_rows(), tmp_path)
    engine.trunk = kept(engine, rows, tmp_path)
    assert engine.trunk._kept.dtype == torch.bfloat16
    torch.testing.assert_close(engine.states(rows).logits, plainly(engine)(rows).logits, rtol=0.05, atol=0.05)
