"""Make small models and rows for the notebooks on continual learning and distillation: all of it trains in seconds.

The language models are random at first and read bytes; the small encoder is the first two of MiniLM's six layers. Facts about capitals are common knowledge, written down here; the sums follow from their numbers.

    python make_small.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from tune_magic.models.find import find_model
from tune_magic.models.load import local_folder

logging.disable_progress_bar()
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Cuba": "Havana", "Peru": "Lima",
    "Japan": "Tokyo", "Egypt": "Cairo", "Kenya": "Nairobi", "Austria": "Vienna", "Ireland": "Dublin", "Greece": "Athens",
    "Poland": "Warsaw", "Chile": "Santiago", "Ghana": "Accra", "Iran": "Tehran", "Iraq": "Baghdad", "Nepal": "Kathmandu",
}  # fmt: skip
MODELS = {"model": (128, 3), "student": (64, 2)}  # width, layers


def rows() -> dict[str, list[dict[str, str]]]:
    """Return capitals, sums, and questions about capitals without answers."""
    questions = {f"Capital of {country}?": f" {city}" for country, city in CAPITALS.items()}
    return {
        "capitals": [{"prompt": question, "completion": answer} for question, answer in questions.items()],
        "sums": [{"prompt": f"{a} plus {b}?", "completion": f" {a + b}"} for a in range(1, 7) for b in range(1, 5)],
        "questions": [{"prompt": question, "completion": " ?"} for question in questions],
    }


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte."""
    special = ["<pad>", "<s>", "</s>"]
    vocab = {token: number for number, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    pad, start, end = special
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=pad, bos_token=start, eos_token=end)


def write(folder: Path) -> None:
    """Write rows and models into ``folder/small``."""
    target = folder / "small"
    target.mkdir(parents=True, exist_ok=True)
    for name, content in rows().items():
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        print(f"{target.name}/{name}.jsonl: {len(content)} rows")
    tokenizer = bytes_tokenizer()
    for name, (width, layers) in MODELS.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=4, tie_word_embeddings=True, max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        save(LlamaForCausalLM(config), tokenizer, target / name)
    minilm = local_folder(find_model("minilm-l6"))
    encoder = AutoModel.from_pretrained(minilm)
    encoder.encoder.layer = encoder.encoder.layer[:2]
    encoder.config.num_hidden_layers = 2
    save(encoder, AutoTokenizer.from_pretrained(minilm), target / "minilm_2")


def save(model, tokenizer, folder: Path) -> None:
    """Write a model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder.parent.name}/{folder.name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
