"""New tokens: chosen for what they save, started from their pieces, trained, and with the run wherever it goes."""

import copy
import json

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from test_classify import labelled, make_encoder
from test_engine import load
from test_training import SHORT, assert_same, stop_and_resume

from tune_magic.data import vocabulary
from tune_magic.data.vocabulary import NewToken, NewTokens, extended
from tune_magic.errors import DataError, RunFailed, TuneError
from tune_magic.executors import local
from tune_magic.methods.lora import Lora, LoraOptions
from tune_magic.methods.token_rows import FusedTokenRows
from tune_magic.models import embeddings
from tune_magic.recipe import build_recipe
from tune_magic.storage.folder import RunFolder
from tune_magic.training.tuned import load_tuned

TEXTS = [
    "the enzyme chitinase digests chitin",
    "a chitinase, and more chitinases: chitinase!",
    "protocol of chitin",
] * 9
CORPUS = {"vocabulary": {"corpus": "train", "min_count": 3, "size": 6}}


@pytest.fixture
def inline(monkeypatch):
    """Export and evaluate in this process."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))


def metaspace_tokenizer(scheme):
    """A tokenizer in the manner of SentencePiece, which writes a space as a letter of its own."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", *sorted({letter for text in TEXTS for letter in text.replace(" ", "▁")} | {"▁"})]
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token="<unk>"))
    if scheme == "prepend":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0),
        ])  # fmt: skip
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        raw.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def wordpiece_tokenizer():
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for text in TEXTS for letter in text.lower() if letter.strip()})
    names = ["[UNK]", "[SEP]", "[CLS]", "[PAD]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    raw = BertWordPieceTokenizer(vocab={name: i for i, name in enumerate(names)}, lowercase=True)
    return PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("make", "whole_word"),
    [(make_tokenizer, False), (lambda: metaspace_tokenizer("first"), False), (wordpiece_tokenizer, True)],
    ids=["bytes", "metaspace", "wordpiece"],
)
def test_words_that_save_most_become_tokens_and_texts_come_back(make, whole_word):
    tokenizer = make()
    new = vocabulary.choose(tokenizer, TEXTS, ["<gene>"], size=2, min_count=5)
    assert {token.whole_word for token in new.tokens[1:]} == {whole_word}
    assert new.tokens[0].content == "<gene>"
    assert {token.content.strip() for token in new.tokens[1:]} == {"chitinase", "chitin"}
    after = extended(tokenizer, new.tokens)
    assert len(after) == len(tokenizer) + len(new.tokens)
    words = sum(len(text.split()) for text in TEXTS)
    for key, each in (("fertility_before", tokenizer), ("fertility_after", after)):
        tokens = sum(len(each(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
        assert new.facts[key] == pytest.approx(tokens / words, abs=1e-4)
    assert new.facts["fertility_after"] < 0.8 * new.facts["fertility_before"]
    for text in [*TEXTS, "chitinase digests chitinases", "a  chitinase"]:
        assert after.decode(after(text, add_special_tokens=False)["input_ids"]) == tokenizer.decode(
            tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_a_tokenizer_that_would_change_texts_is_refused():
    with pytest.raises(TuneError, match="cannot be extended"):
        vocabulary.choose(metaspace_tokenizer("prepend"), TEXTS, [], size=2, min_count=5)


def test_a_word_counts_by_all_words_that_begin_with_it():
    """`proto` saves a little by itself, and would break `protocol`, which is one token already: so whole words it is."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([" protocol"])
    found = vocabulary.choose(tokenizer, ["x proto"] * 6 + ["x protocol"] * 60, [], size=5, min_count=5)
    assert found.tokens == (NewToken("proto", whole_word=True),)
    assert len(extended(tokenizer, found.tokens)("x protocol")["input_ids"]) == 2
    found = vocabulary.choose(tokenizer, ["x proto"] * 60 + ["x protocol"] * 6, [], size=5, min_count=5)
    assert found.tokens == (NewToken(" proto"),)


def test_what_is_a_token_already_is_not_added(tokenizer):
    known = extended(tokenizer, [NewToken(" chitin"), NewToken(" gene")])
    with pytest.raises(DataError, match=r"No word comes(?s:.)*min_count"):
        vocabulary.choose(known, ["a gene: chitin"] * 50, ["gene"], size=5, min_count=5)


def test_new_tokens_are_saved_with_the_run(tmp_path):
    new = NewTokens((NewToken(" chitin"), NewToken("gene", whole_word=True)), {"added": 2})
    new.save(tmp_path)
    assert NewTokens.load(tmp_path) == new
    (tmp_path / vocabulary.FILE).write_text("{")
    with pytest.raises(TuneError, match="cannot be read"):
        NewTokens.load(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}], ids=["own head", "tied"])
@pytest.mark.parametrize("spare", [0, 8])
def test_new_rows_are_means_of_pieces_and_the_base_is_as_it_was(tmp_path, changes, spare):
    size = len(make_tokenizer())
    changes = changes or {"tie_word_embeddings": True}
    folder = make_model(tmp_path / "m", vocab_size=size + spare, **changes)
    before, after = load(folder), load(folder)
    pieces = [[5, 6, 7], [9], [size - 1, 8]]
    embeddings.extend(after, size, pieces)
    assert after.config.vocab_size == max(size + spare, size + 3)
    for mine, old in (
        (after.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (after.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ):
        assert torch.equal(mine[:size], old[:size])
        for number, ids in enumerate(pieces):
            torch.testing.assert_close(mine[size + number], old[ids].mean(0))
    tied = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert tied == changes["tie_word_embeddings"]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), embeddings.hidden(after, size):
        found = after(ids).logits
    assert torch.equal(found[..., :size], before(ids).logits[..., :size])
    assert torch.isneginf(found[..., size:]).all()
    assert torch.isfinite(after(ids).logits).all()


def wrapped(tmp_path, **changes):
    """A tiny model with rows for four new tokens and LoRA beside it, ours and PEFT's own."""
    size = len(make_tokenizer())
    model = load(make_model(tmp_path / "m", **changes))
    embeddings.extend(model, size, [[5, 6], [7, 8], [9, 10], [11, 12]])
    method = Lora(LoraOptions(r=4))
    method.new_tokens = range(size, size + 4)
    ours = method.apply(model, "CAUSAL_LM")
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        if type(module) is FusedTokenRows:
            module.__class__ = TrainableTokensLayer
    return method, ours, theirs, size


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_are_computed_as_pefts(tmp_path, tied):
    _, ours, theirs, size = wrapped(tmp_path, tie_word_embeddings=tied)
    ids = torch.tensor([[5, size, 9, size + 3, size + 1, 30], [size + 2, 4, 4, size, size, 7]])
    assert sum(type(module) is FusedTokenRows for module in ours.modules()) == 2
    results = []
    for model in (ours, theirs):
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        results.append([logits.detach(), *(p.grad for p in trained.values() if p.grad is not None)])
    rows = [name for name in trained if "trainable_tokens_delta" in name]
    assert len(rows) == (1 if tied else 2)
    for name in rows:
        assert trained[name].shape == (4, 32)
        assert trained[name].grad.abs().sum() > 0
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


def test_without_the_adapter_and_merged_it_is_pefts_own(tmp_path):
    method, ours, _, size = wrapped(tmp_path, tie_word_embeddings=True)
    with torch.no_grad():
        [rows] = [parameter for name, parameter in ours.named_parameters() if "trainable_tokens_delta" in name]
        rows.add_(1.0)
    ids = torch.tensor([[5, size, 9, size + 3]])
    with torch.no_grad():
        tuned = ours(input_ids=ids).logits
        with method.without(ours):
            base = ours(input_ids=ids).logits
        merged = method.merge(ours)
        torch.testing.assert_close(merged(input_ids=ids).logits, tuned, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, tuned)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_with_new_words_learns_them_and_says_what_they_save(method, train, recipe):
    run = train(**CORPUS, method={"name": method}, max_steps=24)
    run.raise_for_state()
    plan = run.summary().plan
    assert plan["vocabulary"]["added"] == len(json.loads((run.path / "vocabulary.json").read_text())["tokens"]) > 2
    assert plan["vocabulary"]["corpus"] == "rows.jsonl"
    assert plan["vocabulary"]["fertility_after"] < plan["vocabulary"]["fertility_before"]
    plain_run = train(method={"name": method}, max_steps=24)
    plain = plain_run.summary()
    assert plan["tokens_per_epoch"] < plain.plan["tokens_per_epoch"]
    evaluations, reference = run.summary().evaluations, plain.evaluations
    assert evaluations[24]["loss"] < evaluations[0]["loss"] - 0.2
    # the base in the curve is the base itself: the same texts, by the tokens it knows
    nats = [each[0]["loss"] * each[0]["targets"] for each in (evaluations, reference)]
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)
    assert samples(run)[0] == samples(plain_run)[0]


def samples(run):
    return {
        event["step"]: [item["answer"] for item in event["items"]]
        for event in run.events()
        if event["type"] == "sample"
    }


def test_stopped_anywhere_a_run_with_new_words_ends_as_if_unbroken(train, make_run, monkeypatch):
    whole = train(**CORPUS, **SHORT)
    for n in (9, 30):
        run = make_run(**CORPUS, **SHORT)
        stop_and_resume(run, monkeypatch, n)
        assert_same(run, whole)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_evaluation_compares_with_the_real_base(method, train, inline):
    """Exactly what an unextended run says of the base, text by text."""
    changes = {"method": {"name": method}, "max_steps": 24}
    run, plain = train(**CORPUS, **changes), train(**changes)
    reports = [each.evaluate(max_new_tokens=12) for each in (run, plain)]
    found, reference = (report.rows for report in reports)
    assert [row["base"] for row in found] == [row["base"] for row in reference]
    assert [row["row"] for row in found] == [row["row"] for row in reference]
    tuned = load_tuned(RunFolder(run.path))
    rows = [tuned.rows().held_out(), load_tuned(RunFolder(plain.path)).rows().held_out()]
    for mine, theirs, new, old in zip(found, reference, *rows, strict=True):
        assert mine["loss_base"] * new.weight == pytest.approx(theirs["loss_base"] * old.weight, rel=1e-4)
    assert reports[0].comparisons["loss"].tuned < reports[0].comparisons["loss"].base


def test_rows_the_base_needs_more_tokens_for_are_scored_whole(train, inline, write):
    """By the run's tokens nothing is cut; by the base's, the same rows would be longer than `max_length`."""
    row = {"prompt": "say " + "colouredstone " * 5, "completion": "blue"}
    path = write("long.jsonl", (json.dumps(row) + "\n") * 24)
    data = {"train": str(path), "held_out": 0.25, "chat_template": False}
    run = train(data=data, vocabulary={"tokens": ["colouredstone"]}, max_length=24, max_steps=4)
    whole = train(data=data, max_length=128, max_steps=4)
    run.raise_for_state()
    nats = [each.summary().evaluations[0]["loss"] * each.summary().evaluations[0]["targets"] for each in (run, whole)]
    assert run.summary().plan["cut_rows"] == 0
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)
    reports = [each.evaluate(metrics=["loss"]).rows for each in (run, whole)]
    assert reports[0][0]["loss_base"] == pytest.approx(reports[1][0]["loss_base"], rel=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("on_bad_rows", ["skip", "error"])
def test_base_and_run_are_compared_on_rows_that_both_read_whole(train, inline, write, on_bad_rows):
    """Cut rows say nothing of the same texts; a row that only one of the two drops must not shift the others."""
    texts = [{"text": f"row {i} " + "the blue house " * (40 if i % 3 == 0 else 2)} for i in range(30)]
    path = write("texts.jsonl", "".join(json.dumps(row) + "\n" for row in texts))
    data = {"train": str(path), "held_out": 0.4, "on_bad_rows": on_bad_rows}
    run = train(data=data, vocabulary={"tokens": ["house", "blue"]}, max_length=96, max_steps=2, eval={"steps": 1})
    whole = train(data=data, max_length=96, max_steps=2, eval={"steps": 1})
    run.raise_for_state()
    assert run.summary().plan["cut_rows"] > 0
    first = run.summary().evaluations[0]
    report, reference = (each.evaluate(metrics=["loss"]) for each in (run, whole))
    short = {row["row"]: row for row in reference.rows if row["row"] % 3}
    assert {row["row"] for row in report.rows} == short.keys()
    assert first["rows"] == len(short) < run.summary().evaluations[2]["rows"]
    tokens = load_tuned(RunFolder(run.path)), load_tuned(RunFolder(whole.path))
    new, old = ({e.index: e.weight for e in each.rows().held_out()} for each in tokens)
    nats = 0.0
    for row in report.rows:
        assert row["loss_base"] * new[row["row"]] == pytest.approx(
            short[row["row"]]["loss_base"] * old[row["row"]], rel=1e-4
        )
        nats += row["loss_base"] * new[row["row"]]
    assert first["loss"] * first["targets"] == pytest.approx(nats, rel=1e-4)


def test_a_run_does_not_need_its_corpus_any_more(train, tmp_path, inline):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS))
    run = train(vocabulary={"corpus": str(corpus), "min_count": 3, "tokens": ["<gene>"]}, max_steps=6)
    run.raise_for_state()
    assert run.summary().plan["vocabulary"]["corpus"] == "corpus.txt"
    assert run.summary().plan["vocabulary"]["examples"][:3] == ["<gene>", "chitin", "chitinase"]
    corpus.unlink()
    model, tokenizer = run.load()
    assert len(tokenizer(" chitinase<gene>")["input_ids"]) == 2
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    run.evaluate(limit=2, max_new_tokens=4)
    assert isinstance(run.generate(["item 1 is red"], max_new_tokens=4)[0], str)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("to", ["adapter", "merged", "onnx"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_has_the_new_words(to, tied, train, inline, tmp_path):
    folder = make_model(tmp_path / "wide", hidden_size=64, tie_word_embeddings=tied)
    run = train(**CORPUS, model=str(folder))
    exported = run.export(to, rows=4)
    found = exported.receipt["parity"]
    assert exported.ok is True
    assert found["same_answers"] == 4
    from transformers import AutoTokenizer

    saved, own = AutoTokenizer.from_pretrained(exported.path), load_tuned(RunFolder(run.path)).tokenizer
    assert len(saved) == len(own) > len(make_tokenizer())
    assert saved(" item 3 is red")["input_ids"] == own(" item 3 is red")["input_ids"]
    if to == "adapter":
        assert sum(path.stat().st_size for path in exported.path.glob("*.safetensors")) < 400_000
        size = run.load()[0].get_input_embeddings().weight.shape[0]
        assert f"base_model.resize_token_embeddings({size}, mean" in exported.card()["text/html"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_classifier_learns_new_words_too(method, train, tmp_path, inline):
    path = tmp_path / "labelled.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"a {row['text']}", "label": row["label"]}) + "\n" for row in labelled())
    )
    run = train(
        vocabulary={"tokens": ["red", "green", "blue"]}, model=str(make_encoder(tmp_path / "bert")),
        data={"train": str(path), "held_out": 0.25}, method={"name": method}, learning_rate=5e-3, max_steps=60,
        eval={"steps": 30}, batch_size=8,
    )  # fmt: skip
    run.raise_for_state()
    assert run.summary().evaluations[60]["accuracy"] > 0.9
    assert run.evaluate().comparisons["accuracy"].tuned > 0.9
    assert run.export("onnx").ok is True
    model, tokenizer = run.load()
    assert tokenizer.convert_ids_to_tokens([len(tokenizer) - 3])[0].strip() == "red"
    rows = model.get_input_embeddings().weight[-3:]
    tuned = load_tuned(RunFolder(run.path))
    start = tuned.objective.load(tuned.base, torch.float32)
    tuned.vocabulary.extend(start)
    assert (rows - start.get_input_embeddings().weight[-3:]).abs().min(-1).values.min() > 1e-4


def test_what_cannot_learn_new_words_is_refused(train, tmp_path):
    with pytest.raises(RunFailed, match=r"`freeze` trains no embeddings(?s:.)*lora"):
        train(**CORPUS, method={"name": "freeze", "trainable_layers": 1}).raise_for_state()
    with pytest.raises(RunFailed, match="There is no file"):
        train(vocabulary="missing.txt").raise_for_state()


def test_the_recipe_takes_a_corpus_or_words():
    given = {"model": "m", "data": "rows.jsonl"}
    assert build_recipe(given | {"vocabulary": "corpus.txt"}).vocabulary.corpus == "corpus.txt"
    assert build_recipe(given | {"vocabulary.tokens": "<gene>"}).vocabulary.tokens == ["<gene>"]
    assert not build_recipe(given).vocabulary.extends
    for wrong, told in (
        ({"tokens": [" gene"]}, "without spaces"),
        ({"size": 0}, "at least 1"),
        ({"words": ["a"]}, "no such key"),
        (3, "a corpus or a mapping"),
    ):
        with pytest.raises(TuneError, match=told):
            build_recipe(given | {"vocabulary": wrong})
