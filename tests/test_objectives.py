"""Every objective of the menu trains, resumes exactly, evaluates, predicts, and minimises what its formula says."""

import itertools
import json
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from test_classify import COLOURS, make_encoder
from test_training import assert_same, stop_and_resume
from torch.nn import functional

from tune_magic import plugins
from tune_magic.data.content import Labelled, Located, MultiLabelled, Tagged, Tasked
from tune_magic.data.example import Example, Segment
from tune_magic.data.read import RowFaults
from tune_magic.data.render import Part, Renderer
from tune_magic.errors import DataError, RunFailed
from tune_magic.evaluation.output_metrics import SpanExactMatch
from tune_magic.executors import local
from tune_magic.objectives.classify import Classify
from tune_magic.objectives.domain_adversarial import DomainAdversarial
from tune_magic.objectives.embed import Embed, EmbedOptions, EmbedStates
from tune_magic.objectives.extractive_qa import ExtractiveQA
from tune_magic.objectives.media import ClassifyImage
from tune_magic.objectives.multi_label import MultiLabel, MultiLabelOptions
from tune_magic.objectives.multi_task import MultiTask
from tune_magic.objectives.tag import Tag
from tune_magic.recipe.build import build_recipe
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.training.loop import Loop
from tune_magic.training.outputs import OutputEngine, outputs_of
from tune_magic.training.prepare import prepare
from tune_magic.training.rows import RowStates
from tune_magic.training.tuned import load_tuned
from tune_magic.view.card import card

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


def make_vision(folder):
    """Save a two-layer image model with its processor."""
    from transformers import AutoConfig, AutoModel, ViTImageProcessor

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "vit", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def make_hearing(folder):
    """Save a small audio model with its processor."""
    from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "wav2vec2", hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 32), conv_kernel=(10, 8),
        conv_stride=(5, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, classifier_proj_size=16,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0,
        final_dropout=0.0, apply_spec_augment=False,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=2000).save_pretrained(folder)
    return folder


SHADES = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def picture(path, number):
    """Write an image of one colour with some noise."""
    from PIL import Image

    noise = np.random.default_rng(number).integers(-20, 20, (20, 20, 3))
    pixels = np.clip(np.array(SHADES[COLOURS[number % 3]]) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def tone(path, number):
    """Write a recording of one of three tones, at another rate than the model's."""
    import soundfile

    rate = 4000
    times = np.arange(int(rate * (0.2 + 0.01 * (number % 4)))) / rate
    noise = 0.02 * np.random.default_rng(number).standard_normal(len(times))
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * (80, 240, 640)[number % 3] * times) + noise, rate)


def colours(number):
    return [name for bit, name in enumerate(COLOURS) if number >> bit & 1]


def encoded(objective, contents, renderer):
    """Return the examples of rows; bad ones are an error."""
    faults = RowFaults("rows.jsonl")
    places = [f"row {number}" for number in range(1, len(contents) + 1)]
    examples = objective.examples(Part(contents, places, range(len(contents)), faults), renderer)
    faults.raise_if_any()
    return examples


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
    "domain_adversarial": lambda i: {
        "text": f"{COLOURS[i % 3]} {'thing' if i % 2 else 'item'} {i}", "domain": "shop" if i % 2 else "bank",
    } | ({} if i % 2 and i % 3 else {"label": COLOURS[i % 3]}),
    "multi_task": lambda i: {"text": "a " * (i % 5 + 1) + "end", "task": "length", "label": i % 5 + 0.5}
    if i % 2 else {"text": f"{COLOURS[i % 3]} thing", "task": "colour", "label": COLOURS[i % 3]},
    "classify_image": lambda i: {"image": "", "label": COLOURS[i % 3]},
    "classify_audio": lambda i: {"audio": "", "label": COLOURS[i % 3]},
    "embed": lambda i: {"anchor": f"{COLOURS[i % 3]} {i}", "positive": f"it is {COLOURS[i % 3]} {i}"},
}  # fmt: skip
BY_LORA = ("tag", "seq2seq", "extractive_qa", "domain_adversarial", "classify_image")
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
        made = [(row or ROWS[name])(i) for i in range(COUNT)]
        for number, values in enumerate(made):
            for column, write, suffix in (("image", picture, "png"), ("audio", tone, "wav")):
                if column in values:
                    values[column] = str(tmp_path / f"{number}.{suffix}")
                    write(values[column], number)
        path.write_text("".join(json.dumps(values) + "\n" for values in made))
        folder = tmp_path / f"model-{name}"
        if not folder.exists():
            makers = {
                "lm": make_model,
                "seq2seq": make_seq2seq,
                "classify_image": make_vision,
                "classify_audio": make_hearing,
            }
            make = makers.get(name, make_encoder)
            make(folder)
        return {
            "model": str(folder), "data": {"train": str(path), "held_out": 0.25}, "objective": {"name": name},
            "learning_rate": RATES.get(name, 5e-3), "method": {"name": "full"}, "batch_size": 8, "max_steps": 40, "max_length": 96,
            "eval": {"steps": 20, "max_new_tokens": 8}, "dtype": "float32",
        } | changes  # fmt: skip

    return made


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ROWS)
def test_each_objective_learns_resumes_evaluates_and_predicts(
    name, method, train, make_run, menu, monkeypatch, inline, full
):
    if method == "lora" and not full and name not in BY_LORA:
        pytest.skip("sampled: --full trains every objective by LoRA too")
    rate = RATES.get(name, 5e-3) * (1 if method == "full" else 4)
    rate = {("lm", "lora"): 0.1, ("classify_audio", "lora"): 5e-3, ("regression", "lora"): 5e-3}.get(
        (name, method), rate
    )
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


def trained(name, train, menu, **changes):
    run = train(**menu(name, **{"max_steps": 20} | changes))
    run.raise_for_state()
    return load_tuned(run)


def test_long_texts_are_learned_whole_in_pieces(train, menu):
    long = {"text": "one two three four five six seven eight nine ten " * 8}
    run = train(**menu("lm", row=lambda i: long, max_length=40, max_steps=1))
    run.raise_for_state()
    plan = run.summary().plan
    tokens = len(long["text"].encode()) + 1
    pieces = -(-tokens // 40)
    assert plan["train_rows"] == 36 * pieces and plan["cut_rows"] == 0
    assert plan["tokens_per_epoch"] == 36 * tokens
    assert plan["trained_tokens_per_epoch"] == 36 * (tokens - pieces)


def test_the_loss_of_tags_is_that_of_transformers(train, menu):
    tuned = trained("tag", train, menu)
    examples = tuned.rows().held_out()[:6]
    objective, engine = tuned.objective, tuned.engine()
    ours = sum(objective.loss_sum(engine.states(batch)) for batch in engine.microbatches(examples))
    theirs = 0.0
    for example in examples:
        labels = torch.full((1, len(example)), -100)
        tags = example.targets.astype(np.int64).reshape(3, -1)[0]
        labels[0, example.trunk.weights > 0] = torch.from_numpy(tags)
        ids = torch.from_numpy(example.trunk.tokens.astype(np.int64))[None]
        theirs += tuned.model(input_ids=ids, labels=labels).loss * len(tags)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def dropping():
    """A renderer whose tokenizer makes no token of a space of no width."""
    from tokenizers import normalizers

    tokenizer = make_tokenizer()
    tokenizer._tokenizer.normalizer = normalizers.Replace("\u200b", "")
    return Renderer(tokenizer, chat_template=False, max_length=64)


def test_each_tag_is_said_of_its_own_word(dropping):
    """Also where a word before it has no token, where one has a space inside, and where the last are cut off."""
    objective = Tag(tags=["O", "B-x", "I-x"])
    words = ["see", "\u200b", "New York", "and", "Rome", "x" * 80, "cut"]
    row = Tagged(words, ["O", "O", "B-x", "O", "I-x", "O", "B-x"])
    (example,) = encoded(objective, [row], dropping)
    tags = example.targets.reshape(3, -1)[0].astype(int)
    assert tags.tolist() == [0, 1, 0, 2, 0]
    outputs = [np.eye(3)[tags]]
    ((_, said),) = objective.spoken(outputs, [example])
    assert said == "New York/B-x Rome/I-x"
    frame = objective.frame(outputs, [example])
    assert frame["words"][0] == ["see", "New York", "and", "Rome", "x" * 80]
    assert frame["tags"][0] == ["O", "B-x", "O", "I-x", "O"]
    assert objective.judged(outputs, [example])[0] == objective.judged(outputs, [example])[1]


@pytest.mark.parametrize("question", ["which?", "which?\n", "one\n\ntwo?\n\n"])
@pytest.mark.parametrize("answers", [["red\ngreen"], ["red\ngreen", "red", "no answer"], []])
def test_an_answer_is_what_stands_in_the_text_whatever_line_breaks(question, answers, dropping):
    objective = ExtractiveQA()
    (example,) = encoded(objective, [Located(question, "it is red\ngreen now", answers, 6)], dropping)
    begin, end = example.targets[:2].astype(int)
    output = np.full((2, len(example)), -20.0)
    output[0, begin] = output[1, end] = 0.0
    found, given = objective.judged([output], [example])
    assert found == [answers[0] if answers else ""]
    assert given == [answers or [""]]
    assert SpanExactMatch().values(found, given).tolist() == [[1.0]]


def test_a_text_that_has_no_tokens_is_a_bad_row(dropping):
    with pytest.raises(DataError, match="row 2: the model's tokenizer makes no token of the text"):
        encoded(ExtractiveQA(), [Located("which?", "red", []), Located("which?", "\u200b", [])], dropping)


def test_the_loss_of_spans_is_that_of_transformers(train, menu):
    tuned = trained("extractive_qa", train, menu)
    examples = tuned.rows().held_out()[:4]
    objective, engine = tuned.objective, tuned.engine()
    ours, theirs = 0.0, 0.0
    for example in examples:
        ours += float(objective.loss_sum(engine.states([example])).detach())
        given = {name: torch.from_numpy(array) for name, array in objective.batch([example], 0).items()}
        out = tuned.model(**given)
        begin, end, first = (int(number) for number in example.targets[:3])
        allowed = torch.zeros(len(example), dtype=torch.bool)
        answers = int(example.targets[3])
        count = (len(example.targets) - 4 - answers) // 2  # tokens of the text, and what closes it is none
        allowed[first : first + count] = allowed[0] = True
        for logits, right in ((out.start_logits[0], begin), (out.end_logits[0], end)):
            theirs += float(-logits.detach().masked_fill(~allowed, -torch.inf).log_softmax(-1)[right]) / 2
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_spans_are_found_in_long_texts_whose_parts_overlap(train, menu):
    def row(i):
        context = f"{'filler ' * (i % 9)}it is {COLOURS[i % 3]} {'after ' * 9}"
        return {"question": "which?", "context": context, "answers": [COLOURS[i % 3]]}

    changes = menu(
        "extractive_qa", row=row, max_length=48, max_steps=120, objective={"name": "extractive_qa", "doc_stride": 16}
    )
    run = train(**changes)
    run.raise_for_state()
    tuned = load_tuned(run)
    examples = tuned.rows().held_out()[:]
    assert len(examples) > len({example.index for example in examples})
    for example in examples:  # wherever the answer is in a part, the part's targets are the answer
        begin, end = example.targets[:2].astype(int)
        if begin:
            first, answers = example.targets[2:4].astype(int)
            starts, ends = example.targets[4 + answers :].astype(int).reshape(2, -1)
            assert example.question[starts[begin - first] : ends[end - first]] == example.reference
    found = run.predict(
        [("which?", "filler it is green after after"), ("which?", "filler filler it is red " + "after " * 20)]
    )
    assert found["answer"].tolist() == ["green", "red"]


def test_the_loss_of_an_encoder_and_decoder_is_that_of_transformers(train, menu):
    tuned = trained("seq2seq", train, menu)
    examples = tuned.rows().held_out()[:6]
    objective, engine = tuned.objective, tuned.engine()
    ours = sum(objective.loss_sum(engine.states(batch)) for batch in engine.microbatches(examples))
    theirs = 0.0
    for example in examples:
        labels = torch.from_numpy(example.branches[0].tokens.astype(np.int64))[None]
        ids = torch.from_numpy(example.trunk.tokens.astype(np.int64))[None]
        theirs += tuned.model(input_ids=ids, labels=labels).loss * labels.numel()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "rate"), [("t5", 1e-2), ("bart", 2e-3)])
def test_an_encoder_and_decoder_answers(family, rate, train, menu, tmp_path):
    model = str(make_seq2seq(tmp_path / family, family))
    run = train(**menu("seq2seq", model=model, max_steps=160, learning_rate=rate, eval={"steps": 40, "samples": 0}))
    run.raise_for_state()
    assert run.generate(["say green", "say red"], max_new_tokens=8) == ["green", "red"]


@pytest.mark.parametrize("loss", ["contrastive", "triplet", "cosine"])
def test_the_losses_of_embeddings_are_their_formulas(loss, tmp_path):
    torch.manual_seed(0)
    vectors = functional.normalize(torch.randn(5, 3, 8), dim=-1)
    has_negative, scores = torch.tensor([True, False, True, True, False]), torch.rand(5)
    vectors[~has_negative, 2] = 0
    objective = Embed(EmbedOptions(loss=loss, temperature=0.1, margin=0.5))
    found = float(objective.loss_sum(EmbedStates(vectors, has_negative, scores)))
    a, p, n = vectors.double().unbind(1)
    expected = 0.0
    for i in range(5):
        near = float(a[i] @ p[i])
        if loss == "cosine":
            expected += (near - float(scores[i])) ** 2
        elif loss == "triplet":
            expected += max(0.0, float(a[i] @ n[i]) - near + 0.5) if has_negative[i] else 0.0
        else:
            others = [float(a[i] @ t) for t in p] + [float(a[i] @ n[j]) for j in range(5) if has_negative[j]]
            expected += -np.log(np.exp(near / 0.1) / sum(np.exp(other / 0.1) for other in others))
    assert found == pytest.approx(expected, rel=1e-5)


def test_rows_of_a_step_are_compared_whatever_the_microbatches(make_run, menu, tmp_path):
    """Microbatches of two rows give the gradients of one of eight, with dropout drawn."""
    model = str(make_encoder(tmp_path / "drops", hidden_dropout_prob=0.1))
    gradients = []
    for tokens in (2048, 150):
        run = make_run(**menu("embed", model=model, microbatch_tokens=tokens))
        with EventLog(run.path / "events.jsonl", attempt=1) as log:
            session = prepare(build_recipe(run.info["recipe"]), run.path, log, Control(run.path, attempt=1))
            loop = Loop(session, own_checkpoints=set())
            torch.manual_seed(5)
            examples = session.dataset.train[:8]
            assert (len(list(session.engine.microbatches(examples))) > 1) == (tokens < 2048)
            session.method.to_training(session.model)
            session.model.eval()  # dropout would be drawn in another order
            loop.session.method.to_training = lambda model: model.eval()
            result = loop.accumulate(examples)
        gradients.append((result.loss, [p.grad.clone() for p in session.model.parameters() if p.grad is not None]))
    (one, whole), (other, parts) = gradients
    assert one == pytest.approx(other, rel=1e-5)
    for ours, theirs in zip(whole, parts, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["embed", "seq2seq", "tag"])
def test_a_microbatch_is_as_large_as_what_the_model_computes(name):
    """A short text beside a long one is padded, and a long source beside a long target of another row."""
    objective = plugins.get("objective", name)()
    objective._start = 0
    draw = np.random.default_rng(0)

    def segment(length, weight):
        return Segment(draw.integers(1, 9, length).astype(np.int32), np.full(length, weight, dtype=np.float32))

    sizes = [tuple(pair) for pair in draw.integers(1, 30, (40, 1 if name == "tag" else 2)).tolist()]
    examples = [Example(segment(a, 0.0), tuple(segment(length, 1.0) for length in b)) for a, *b in sizes]
    engine = OutputEngine.__new__(OutputEngine)
    engine._objective, engine.max_tokens = objective, 128
    cut = list(engine.microbatches(examples))
    assert sorted(map(id, itertools.chain.from_iterable(cut))) == sorted(map(id, examples))
    assert max(map(len, cut)) > 1
    for group in cut:
        arrays = objective.batch(group, 0)
        computed = sum(arrays[key].size for key in ("input_ids", "decoder_input_ids") if key in arrays)
        assert engine.lay_out(group).input_ids.size == computed
        assert computed <= 128 or len(group) == 1


@pytest.mark.parametrize(("changes", "says"), [
    ({"batch_size": 1}, "`batch_size: 1` is too few.*Take 2 or more"),
    ({"retain": {"ewc": 1.0, "ewc_data": "DATA"}}, "`ewc` weighs weights.*l2_sp"),
    ({"data": {"train": "DATA", "held_out": "ONE"}}, r"too few held-out rows \(1\).*held_out: 0"),
    ({"data": {"train": "ONE", "held_out": 0}}, r"too few training rows \(1\)"),
])  # fmt: skip
def test_a_row_alone_is_nothing_to_compare(changes, says, train, menu, write):
    one = str(write("one.jsonl", json.dumps(ROWS["embed"](0)) + "\n"))
    given = menu("embed", max_steps=1)
    named = json.loads(json.dumps(changes).replace("DATA", given["data"]["train"]).replace("ONE", one))
    with pytest.raises(RunFailed, match=f"(?s){says}"):
        train(**given | named).raise_for_state()


def test_a_row_that_is_left_is_compared_with_the_group_before_it(make_run, menu):
    run = make_run(**menu("embed", batch_size=11))  # of twelve that are held out
    with EventLog(run.path / "events.jsonl", attempt=1) as log:
        session = prepare(build_recipe(run.info["recipe"]), run.path, log, Control(run.path, attempt=1))
        assert len(session.dataset.held_out) == 12
        loop = Loop(session, own_checkpoints=set())
        assert [len(states.vectors) for states in loop._held_out_states(session.dataset.held_out)] == [12]
    assert Embed(EmbedOptions(loss="cosine")).fewest_rows == Embed(EmbedOptions(loss="triplet")).fewest_rows == 1


def test_vectors_of_what_belongs_together_come_near(train, menu):
    run = train(**menu("embed", max_steps=80))
    run.raise_for_state()
    vectors = run.predict(["red 50", "it is red 50", "it is blue 51"]).to_numpy()
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


def test_scored_pairs_learn_the_scores(train, menu, inline):
    def row(i):
        return {
            "sentence1": f"{COLOURS[i % 3]} one", "sentence2": f"{COLOURS[i % 2]} two", "score": 5.0 * (i % 3 == i % 2),
        }  # fmt: skip

    run = train(**menu("embed", row=row, max_steps=60))
    run.raise_for_state()
    assert run.summary().plan["objective"] == {"name": "embed", "scored": True, "least": 0.0, "most": 5.0}
    assert run.evaluate().metrics["spearman"] > 0.7


def test_the_gradient_of_the_domain_is_reversed_below_its_head(tmp_path):
    torch.manual_seed(0)
    objective = DomainAdversarial(classes=["a", "b"], domains=["x", "y"])
    objective.progress = 0.4
    strength = 2 / (1 + np.exp(-4.0)) - 1
    head = torch.nn.Linear(6, 2)
    features = torch.randn(5, 6, requires_grad=True)
    logits = torch.randn(5, 2, requires_grad=True)
    targets = torch.tensor([[0, 0], [1, 1], [-1, 1], [0, 0], [-1, 1]]).float()
    states = RowStates(logits=logits, targets=targets, features=features, model=SimpleNamespace(domain_head=head))
    objective.loss_sum(states).backward()
    plain = features.detach().clone().requires_grad_()
    told = functional.cross_entropy(head(plain), targets[:, 1].long(), reduction="sum")
    expected = torch.autograd.grad(told, [plain, head.weight])
    is_told = head(plain).softmax(-1)[range(5), targets[:, 1].long()] > 0.5
    assert 0 < is_told.sum() < 5  # the others are hidden already
    torch.testing.assert_close(features.grad, -strength * expected[0] * is_told[:, None])
    torch.testing.assert_close(head.weight.grad, expected[1])
    factors = {name: objective.learning_rate_factor(name) for name in ("bert.domain_head.weight", "classifier.weight")}
    assert list(factors.values()) == [10.0, 1.0]
    known = logits.detach()[[0, 1, 3]]
    alone = objective.score_sum(RowStates(logits=logits.detach(), targets=targets))
    assert float(alone) == pytest.approx(
        float(functional.cross_entropy(known, torch.tensor([0, 1, 0]), reduction="sum"))
    )


def test_each_task_is_scored_by_its_own_head(train, menu, inline):
    tuned = trained("multi_task", train, menu, max_steps=60)
    assert tuned.objective.facts()["tasks"]["colour"] == {"classes": COLOURS}
    comparisons = tuned.run.evaluate().comparisons
    assert {"class_accuracy", "mean_absolute_error", "class_accuracy · colour", "mean_absolute_error · length"} <= set(
        comparisons
    )
    examples = tuned.rows().held_out()[:]
    outputs = outputs_of(tuned.engine(), tuned.objective, examples)
    expected = 0.0
    for example, output in zip(examples, outputs, strict=True):
        number, value = example.targets
        if number == 0:  # colour: the first three outputs
            expected += float(functional.cross_entropy(torch.from_numpy(output[:3])[None], torch.tensor([int(value)])))
        else:
            expected += (output[3] - value) ** 2
    loss = tuned.run.summary().best["loss"]
    assert loss == pytest.approx(expected / len(examples), rel=1e-4)
    predicted = tuned.run.predict(["a a a end", "red thing"])
    assert list(predicted.columns) == ["colour", "length"] and predicted["colour"].iloc[1] == "red"


def test_domains_are_scored_apart_and_unlabelled_rows_are_not_scored(train, menu, inline):
    tuned = trained("domain_adversarial", train, menu, max_steps=40)
    report = tuned.run.evaluate()
    assert {"class_accuracy", "class_accuracy · bank", "class_accuracy · shop"} <= set(report.comparisons)
    assert "domain accuracy" in tuned.run.summary().best
    assert "held-out domain accuracy: base" in card(tuned.run)["text/plain"]
    assert not [
        name for name in load_file(tuned.run.export("merged", rows=3).path / "model.safetensors") if "domain" in name
    ]


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("lm", "seq2seq")])
@pytest.mark.sampled(4)
def test_predictions_are_what_was_learned(name, train, menu):
    tuned = trained(name, train, menu, max_steps=10)
    held_out = tuned.rows().held_out()[0]
    inputs = {
        "extractive_qa": [("which?", "it is red now")], "classify_image": [held_out.question], "classify_audio": [held_out.question],
    }.get(name, ["red thing"])  # fmt: skip
    found = tuned.run.predict(inputs)
    assert len(found) == 1
    with pytest.raises(Exception, match="writes no texts"):
        tuned.run.generate("hello")


@pytest.mark.parametrize("name", ROWS)
def test_merged_and_adapter_exports_are_the_model(name, train, menu, inline, full):
    if not full and name not in (*BY_LORA, "classify_audio"):  # which has no embeddings of tokens
        pytest.skip("sampled: --full exports every objective")
    run = train(**menu(name, max_steps=6, method={"name": "lora"}))
    run.raise_for_state()
    assert run.export("merged", rows=3).ok is True
    if name != "domain_adversarial":
        assert run.export("adapter", rows=3).ok is True


def test_a_file_that_would_unpack_to_a_huge_image_is_a_bad_row(train, menu, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the images have 400, more than twice as many
    with pytest.raises(RunFailed, match="more pixels than an image should"):
        train(**menu("classify_image", max_steps=1)).raise_for_state()


def chunk(kind, content):
    """Return a part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_broken_image_is_a_bad_row(tmp_path, monkeypatch):
    from PIL import Image

    processor = SimpleNamespace(num_positions=4)
    picture(tmp_path / "whole.png", 0)
    whole = (tmp_path / "whole.png").read_bytes()
    at = whole.index(b"IDAT")
    (size,) = struct.unpack(">I", whole[at - 4 : at])
    half = chunk(b"IDAT", whole[at + 4 : at + 4 + size // 2])
    with pytest.raises(ValueError, match="damaged: broken PNG file"):
        ClassifyImage().prepared(whole[: at - 4] + half + b"\0\0\0\1\1\2\3\4" + bytes(20), processor)
    for error in (EOFError(), struct.error("unpack"), zlib.error("Error -3"), IndexError("out of range")):

        def fail(image, mode, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(ValueError, match=f"damaged: {error or type(error).__name__}"):
            ClassifyImage().prepared(whole, processor)


def test_a_class_that_every_row_has_is_learned_too():
    objective = MultiLabel(MultiLabelOptions(class_weights="balanced"))
    rows = [MultiLabelled("a", ["all", "half"]), MultiLabelled("b", ["all"])]
    objective.learn(rows, "rows.jsonl")
    assert objective.facts() == {"classes": ["all", "half"], "weights": [1.0, 1.0]}
    logits = torch.zeros(2, 2, requires_grad=True)
    objective.loss_sum(RowStates(logits, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))).backward()
    assert (logits.grad != 0).all()


@pytest.mark.parametrize(("name", "row"), [
    ("classify", {"text": "", "label": "a"}), ("regression", {"text": "", "score": 1.5}), ("multi_task", {"text": "", "task": "a", "label": "b"}),
])  # fmt: skip
def test_where_every_row_is_skipped_the_rows_are_named(name, row, train, menu, write):
    path = write("bad.jsonl", (json.dumps(row) + "\n") * 9)
    changes = menu("regression", objective={"name": name}, data={"train": str(path), "on_bad_rows": "skip"})
    with pytest.raises(RunFailed, match=r"9 bad rows, too many to skip.*\n.*line 1: column `text` is empty"):
        train(**changes).raise_for_state()
    if name != "multi_task":
        with pytest.raises(DataError, match=r"No row of rows.jsonl is left. `on_bad_rows: error`"):
            plugins.get("objective", name)().learn([], "rows.jsonl")


def test_a_name_that_is_nearly_a_number_is_a_name():
    objective = Classify()
    objective.learn([Labelled("a", name) for name in ("--5", "10", "9") * 2], "rows.jsonl")
    assert objective.classes == ["--5", "10", "9"]
    objective.learn([Labelled("a", name) for name in ("-5", "10", "9") * 2], "rows.jsonl")
    assert objective.classes == ["-5", "9", "10"]


@pytest.mark.parametrize(("answers", "says"), [
    ([float(i) for i in range(9)], "9 classes in 9 rows.*with a fraction, such as 3.5"),
    ([f"name {i}" for i in range(9)], "9 classes in 9 rows.*the right column"),
])  # fmt: skip
def test_a_task_of_next_to_as_many_classes_as_rows_is_refused(answers, says):
    colours = [Tasked("a", "colour", COLOURS[i % 3]) for i in range(9)]
    with pytest.raises(DataError, match=f"The task 'other' of rows.jsonl has {says}"):
        MultiTask().learn([*colours, *(Tasked("a", "other", answer) for answer in answers)], "rows.jsonl")
    MultiTask().learn([*colours, *(Tasked("a", "other", 0.5 * i) for i in range(9))], "rows.jsonl")


def test_metrics_agree_with_the_libraries():
    from scipy.stats import pearsonr, spearmanr
    from seqeval.metrics import f1_score as entities
    from sklearn.metrics import f1_score, r2_score

    generator = np.random.default_rng(0)
    found, given = generator.integers(0, 5, 40) + 0.5, generator.integers(0, 5, 40) + 0.0

    def metric(name, ours, theirs):
        one = plugins.get("metric", name)()
        return float(one.statistic(one.values(ours, theirs)))

    assert metric("pearson", found, given) == pytest.approx(pearsonr(found, given)[0])
    assert metric("spearman", found, given) == pytest.approx(spearmanr(found, given)[0])
    assert metric("r_squared", found, given) == pytest.approx(r2_score(given, found))
    assert metric("mean_absolute_error", found, given) == pytest.approx(np.abs(found - given).mean())
    sets = [[[name for name in "abc" if generator.random() < 0.5] for _ in range(30)] for _ in range(2)]
    flags = [[[name in row for name in "abc"] for row in side] for side in sets]
    assert metric("micro_f1", *sets) == pytest.approx(f1_score(np.array(flags[1]), np.array(flags[0]), average="micro"))
    tags = [[generator.choice(["O", "B-x", "I-x", "B-y"], 9).tolist() for _ in range(20)] for _ in range(2)]
    assert metric("entity_f1", *tags) == pytest.approx(entities(tags[1], tags[0]))
    assert metric("span_f1", ["the red car"], [["a red bus", "red"]]) == pytest.approx(2 / 3)
    assert metric("span_exact_match", ["The Car!"], [["car"]]) == 1.0
    assert metric("reciprocal_rank", [1, 2, 4], [1, 1, 1]) == pytest.approx((1 + 0.5 + 0.25) / 3)
    resampled = plugins.get("metric", "spearman")()
    values = resampled.values(found, given)
    rows = generator.integers(0, 40, (3, 40))
    assert resampled.statistic(values[rows])[1] == pytest.approx(spearmanr(found[rows[1]], given[rows[1]])[0])
