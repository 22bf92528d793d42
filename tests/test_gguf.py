"""GGUF: what is written is the trained model, to Transformers and to llama.cpp, and its tokenizer splits texts alike."""

import json

import pytest
from conftest import make_model
from test_exports import inline  # noqa: F401 - a fixture

from tune_magic.errors import RunFailed, TuneError
from tune_magic.exporters import gguf_tokens
from tune_magic.exporters.gguf import FILE
from tune_magic.testing.models import CHAT as TEMPLATE
from tune_magic.testing.models import make_tokenizer
from tune_magic.view.export import usage

FAMILIES = {
    "llama": {"hidden_size": 64},
    "tied": {"hidden_size": 64, "tie_word_embeddings": True},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}  # fmt: skip


@pytest.fixture
def tuned(train, tmp_path):
    def start(name="llama", **changes):
        family = {"tied": "llama", "llama3": "llama"}.get(name, name)
        return train(model=str(make_model(tmp_path / name, family, **FAMILIES[name])), max_steps=4, **changes)

    return start


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_holds_the_trained_model(name, tuned, inline):  # noqa: F811
    run = tuned(name)
    exported = run.export("gguf", rows=2)
    found = exported.receipt["parity"]
    assert exported.ok is True
    assert found["logit_difference"] < 1e-4
    assert list(exported.receipt["files"]) == [FILE, "README.md"]
    assert found["computed_by"] == "Transformers"


@pytest.mark.parametrize(
    ("quantize", "least", "most"),
    [("f16", 1e-6, 0.01), ("bf16", 1e-5, 0.05), ("q8_0", 1e-5, 0.1), ("q5_1", 1e-4, 0.25), ("q4_0", 1e-3, 0.5)],
)
def test_fewer_bits_are_smaller_and_told(quantize, least, most, tuned, inline):  # noqa: F811
    run = tuned()
    whole = run.export("gguf", rows=2)
    small = run.export("gguf", quantize=quantize, rows=2, tolerance=1.0)
    assert small.receipt["size_bytes"] < 0.75 * whole.receipt["size_bytes"]
    found = small.receipt["parity"]
    assert least < found["logit_difference"] / found["largest_logit"] < most
    assert quantize in small.card()["text/plain"]


def test_rows_of_no_whole_blocks_keep_half_precision(train, inline, tmp_path):  # noqa: F811
    """Blocks have 32 numbers; rows that hold no whole number of them stay in float16, as llama.cpp has it."""
    from gguf import GGUFReader

    run = train(model=str(make_model(tmp_path / "m", hidden_size=48)), max_steps=1)
    exported = run.export("gguf", quantize="q4_0", rows=1, tolerance=1.0)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(exported.path / FILE).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0"
    assert kinds["blk.0.attn_q.weight"] == kinds["output.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


class LlamaCpp:
    """llama.cpp itself, asked greedily."""

    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp")
        options = xllamacpp.CommonParams()
        options.model.path, options.n_ctx, options.n_parallel = str(path), 256, 1
        options.warmup, options.verbosity = False, -1
        self.server = xllamacpp.Server(options)

    def ask(self, prompt):
        options = {"prompt": prompt, "n_predict": 8, "temperature": 0, "top_k": 1, "n_probs": 3, "cache_prompt": False}
        return self.server.handle_completions(options)


CHAT = [{"role": "system", "content": "Name the colour."}, {"role": "user", "content": "item 7 is black"}]


def agrees_with(llama, model, tokenizer, text, expected):
    """Check tokens of the prompt, probabilities after it, and the greedy answer."""
    import torch

    found = llama.ask(text)
    ids = tokenizer(text)["input_ids"]
    assert found["usage"]["prompt_tokens"] == len(ids)
    with torch.no_grad():
        shares = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    for one in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        assert one["logprob"] == pytest.approx(float(shares[one["id"]]), abs=0.02)
    assert found["choices"][0]["text"].strip() == expected.strip()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.sampled(3)
def test_llama_cpp_answers_as_the_model_does(name, tuned, inline):  # noqa: F811
    run = tuned(name, **{"method": {"name": "full"}})
    path = run.export("gguf", rows=1).path / FILE
    model, tokenizer = run.load()
    text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    agrees_with(LlamaCpp(path), model, tokenizer, text, run.generate([CHAT], 8)[0])


def pieces():
    """Return a tokenizer of pieces with bytes to fall back on, as those of Llama 2 and Mistral."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [f"user item {i} is {colour}" for i in range(24) for colour in ("red", "green", "blue", "black")]
    words = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    first = Tokenizer(models.BPE(unk_token="<unk>"))
    first.normalizer = words
    first.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False))
    learned = json.loads(first.to_str())["model"]
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*marks, *(token for token in learned["vocab"] if token != "<unk>")]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in learned["merges"]]
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = words
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    made.chat_template = TEMPLATE.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    return made


def test_pieces_are_joined_as_the_tokenizer_does(train, inline, tmp_path):  # noqa: F811
    folder, tokenizer = tmp_path / "pieces", pieces()
    make_model(folder, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    tokenizer.save_pretrained(folder)
    run = train(model=str(folder), max_steps=3, method={"name": "full"})
    llama = LlamaCpp(run.export("gguf", rows=1).path / FILE)
    model, tokenizer = run.load()
    for text in ("user item 3 is green", "Grüße, item 12  is\nblack"):  # two spaces; letters that only bytes have
        ids = tokenizer(text)["input_ids"]
        assert len(ids) < len(text.encode())
        agrees_with(llama, model, tokenizer, text, tokenizer.decode(answered(model, ids, tokenizer)))


def answered(model, ids, tokenizer):
    import torch

    answer = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    return [token for token in answer[0, len(ids) :].tolist() if token != tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, r"family `gpt2` are not written as GGUF; only llama, mistral, qwen2, qwen3 are.*`--to merged`"),
        ("llama", {"attention_bias": True}, r"has biases beside its matrices"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, r"of kind `linear`"),
        ("llama", {"hidden_act": "gelu"}, r"the activation `gelu`"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, changes, message, train, inline, tmp_path):  # noqa: F811
    run = train(model=str(make_model(tmp_path / "m", family, **changes)), max_steps=1)
    with pytest.raises(RunFailed, match=message):
        run.export("gguf", rows=1)


def with_splits(*parts, **model):
    """Return a tokenizer's description with another rule."""
    about = json.loads(make_tokenizer().backend_tokenizer.to_str())
    about["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(parts)}
    about["model"] |= model
    return about


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (with_splits({**BYTES, "use_regex": True}), "gpt-2"),
        (with_splits({"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}), "smollm"),
        (with_splits(split_by(QWEN), BYTES), "qwen2"),
        (with_splits(split_by(QWEN.replace(r"\p{N}| ", r"\p{N}{1,3}| ")), BYTES, ignore_merges=True), "llama-bpe"),
        (with_splits(split_by(QWEN), BYTES, ignore_merges=True), None),
        (with_splits(split_by(r"\s+"), BYTES), None),
        (with_splits(BYTES), None),
        (with_splits({**BYTES, "use_regex": True}, type="WordPiece"), None),
    ],
)
def test_a_rule_of_splitting_has_llama_cpps_name_or_is_refused(about, expected):
    if expected is None:
        with pytest.raises(TuneError, match=r"not written as GGUF|no name for how"):
            gguf_tokens._kind(about)
    else:
        assert gguf_tokens._kind(about).splits == expected


def test_the_card_says_how_to_use_it(tuned, inline, monkeypatch):  # noqa: F811
    run = tuned()
    exported = run.export("gguf", quantize="q8_0", rows=2)
    assert f"llama-server -m {exported.path}/model.gguf" in usage(exported.receipt, str(exported.path))
    text = exported.card()["text/plain"]
    assert "measured by: Transformers, its numbers unpacked" in text
