"""Every objective of the menu trains, resumes exactly, evaluates, predicts, and minimises what its formula says."""

import json

import pytest
import torch
from conftest import make_model, make_tokenizer
from test_classify import COLOURS, make_encoder
from test_training import assert_same, stop_and_resume

from tune_magic.executors import local

COUNT = 48


def make_seq2seq(folder, family="t5"):
    """Save a two-layer encoder and decoder with its tokenizer, and return the folder."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)])
    sizes = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "bart": {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128, "decoder_start_token_id": 2,
        },
    }[family]  # fmt: skip
    torch.manual_seed(0)
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "dropout_rate": 0.0,
        "dropout": 0.0,
    }
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **common, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def colours(number):
    return [name for bit, name in enumerate(COLOURS) if number >> bit & 1]


ROWS = {
    "lm": lambda i: {"text": f"item {i} is {COLOURS[i % 3]} and {COLOURS[i % 3]} it stays"},
    "multi_label": lambda i: {"text": f"{' '.join(colours(i % 8))} thing {i}", "labels": colours(i % 8)},
    "regression": lambda i: {"text": "a " * (i % 5 + 1) + "end", "score": i % 5 + 0.5},
    "tag": lambda i: {"tokens": ["see", COLOURS[i % 3], "thing"], "ner_tags": ["O", f"B-{COLOURS[i % 3]}", "I-x" if i % 2 else "O"]},
    "extractive_qa": lambda i: {
        "question": "which?", "context": f"{'so ' * (i % 4)}it is {COLOURS[i % 3]} now",
        "answers": {"text": [COLOURS[i % 3]], "answer_start": [3 * (i % 4) + 6]},
    },
    "seq2seq": lambda i: {"source": f"say {COLOURS[i % 3]}", "target": COLOURS[i % 3]},
    "embed": lambda i: {"anchor": f"{COLOURS[i % 3]} {i}", "positive": f"it is {COLOURS[i % 3]} {i}"},
}  # fmt: skip
RATES = {"lm": 1e-2, "seq2seq": 1e-2, "extractive_qa": 5e-3}


@pytest.fixture
def inline(monkeypatch):
    """Export and evaluate in this process."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))


@pytest.fixture
def menu(tmp_path):
    """Return what makes the recipe of an objective."""

    def made(name, row=None, **changes):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps((row or ROWS[name])(i)) + "\n" for i in range(COUNT)))
        folder = tmp_path / f"model-{name}"
        if not folder.exists():
            make = {"lm": make_model, "seq2seq": make_seq2seq}.get(name, make_encoder)
            make(folder)
        return {
            "model": str(folder), "data": {"train": str(path), "held_out": 0.25}, "objective": {"name": name},
            "learning_rate": RATES.get(name, 5e-3), "method": {"name": "full"}, "batch_size": 8, "max_steps": 40, "max_length": 96,
            "eval": {"steps": 20, "max_new_tokens": 8},
        } | changes  # fmt: skip

    return made


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ROWS)
def test_each_objective_learns_resumes_evaluates_and_predicts(name, method, train, make_run, menu, monkeypatch, inline):
    rate = RATES.get(name, 5e-3) * (1 if method == "full" else 4)
    if (name, method) == ("lm", "lora"):
        rate = 0.1
    changes = menu(name, method={"name": method}, learning_rate=rate)
    whole = train(**changes)
    whole.raise_for_state()
    first, best = whole.summary().evaluations[0], whole.summary().best
    assert best["loss"] < (0.97 if (name, method) == ("lm", "lora") else 0.8) * first["loss"]
    assert whole.summary().plan["objective"]["name"] == name
    run = make_run(**changes)
    stop_and_resume(run, monkeypatch, 13)
    assert_same(run, whole)
    report = whole.evaluate()
    assert report.comparisons and report.rows
    for comparison in report.comparisons.values():
        gained = comparison.difference > 0
        assert gained == comparison.higher_is_better or comparison.difference == 0
    assert whole.card()["text/plain"]
    assert report.card()["text/html"]
