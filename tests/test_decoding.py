"""Texts written together: rows join and leave at any token, and each is what it would be alone."""

import threading
import time

import numpy as np
import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tune_magic.evaluation.speakers import Beside, Stacked
from tune_magic.models import decode
from tune_magic.models.decode import Decoding, Draw, Sampling, why_alone
from tune_magic.models.generate import generate, stream
from tune_magic.serving.scheduler import Failure, Look, Piece, Row, Scheduler
from tune_magic.serving.writing import Writing

FAMILIES = {
    "llama": {}, "gpt2": {"n_positions": 512}, "qwen2": {}, "mistral": {"sliding_window": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 16}, "bloom": {"n_head": 4}, "phi": {}, "opt": {"word_embed_proj_dim": 32},
}  # fmt: skip
PROMPTS = [np.arange(length) * 7 % 90 + 5 for length in (12, 3, 30, 7, 1)]
METHODS = {
    "lora": {"method": {"name": "lora", "r": 4}}, "prompt": {"method": {"name": "prompt", "num_virtual_tokens": 5}},
    "prefix": {"method": {"name": "prefix", "num_virtual_tokens": 5}}, "full": {"method": {"name": "full"}},
    "nf4": {"quantization": "nf4"}, "bottleneck": {"method": {"name": "bottleneck"}},
    "words": {"vocabulary": {"tokens": ["colour", "item"]}},
}  # fmt: skip
WAIT_S = 60


def load(tmp_path, family, **changes):
    path = make_model(tmp_path / family, family, **changes)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def written(model, prompts, count, **options):
    """Write greedily, a row joining every other token, each leaving when it is whole; returns the tokens of each."""
    decoding, texts, there, left = Decoding(model, **options), {}, [], list(enumerate(prompts))
    while left or there:
        if left:
            number, prompt = left.pop(0)
            texts[number] = [int(decoding.join(prompt).argmax())]
            there.append(number)
        for _ in range(2):
            stay = [place for place, number in enumerate(there) if len(texts[number]) < count + number]
            decoding.keep(stay)
            there = [there[place] for place in stay]
            if there:
                logits = decoding.step([texts[number][-1] for number in there])
                for number, own in zip(there, logits, strict=True):
                    texts[number].append(int(own.argmax()))
    return [texts[number] for number in range(len(prompts))]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_together_are_rows_alone(tmp_path, family):
    model, _ = load(tmp_path, family, **FAMILIES[family])
    assert why_alone(model) is None
    together = written(model, PROMPTS, 20)
    alone = [written(model, [prompt], 20 + number, pads=False)[0] for number, prompt in enumerate(PROMPTS)]
    assert together == alone
    for number, (prompt, tokens) in enumerate(zip(PROMPTS, together, strict=True)):
        ids = torch.from_numpy(prompt)[None]
        whole = model.generate(ids, max_new_tokens=20 + number, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens == whole[0, len(prompt) :].tolist()


def test_a_model_that_remembers_otherwise_writes_alone(tmp_path):
    model, _ = load(tmp_path, "mamba", state_size=8, num_heads=4)
    assert why_alone(model) is not None


def test_a_model_that_looks_at_others_writes_alone(tmp_path, monkeypatch):
    model, _ = load(tmp_path, "llama")
    forward = model.forward

    def blind(*args, attention_mask=None, **kwargs):
        return forward(*args, **kwargs)

    blind.__signature__ = decode.inspect.signature(forward)
    monkeypatch.setattr(model, "forward", blind)
    assert "logits differ" in why_alone(model)


@pytest.mark.parametrize(
    ("temperature", "top_p", "repetition"), [(0.7, 1.0, 1.0), (1.0, 0.8, 1.0), (2.0, 0.3, 1.4), (0.0, 1.0, 1.0), (0.0, 1.0, 1.4)]
)  # fmt: skip
def test_what_is_drawn_is_what_a_chat_draws(tmp_path, temperature, top_p, repetition):
    model, tokenizer = load(tmp_path, "llama")
    model.generation_config.repetition_penalty = repetition
    sampling = Sampling(30, temperature, top_p, seed=11)
    draw = Draw(sampling, repetition_penalty=repetition, prompt=PROMPTS[0].tolist())
    writing = Writing(tokenizer, draw, 30, ends=[2])
    decoding = Decoding(model)
    logits = decoding.join(PROMPTS[0])
    text = ""
    while writing.reason is None:
        text += writing.take(logits)[0]
        logits = decoding.step([writing.ids[-1]])[0]
    assert text == stream(model, tokenizer, PROMPTS[0], sampling)


def test_penalties_are_openais():
    """What was chosen loses the one once and the other each time; here 0.75 for the first, and 0.25 more for each again."""
    logits = torch.tensor([3.0, 2.9, 2.3, 0.0])
    draw = Draw(Sampling(9), presence_penalty=0.5, frequency_penalty=0.25)
    assert [draw.choose(logits) for _ in range(6)] == [0, 1, 2, 0, 1, 0]
    plain = Draw(Sampling(9))
    assert [plain.choose(logits) for _ in range(3)] == [0, 0, 0]
    assert (plain.is_plain, draw.is_plain) == (True, False)


def test_half_a_character_and_half_a_stop_word_are_held_back(tokenizer):
    ids = tokenizer("aé stop it")["input_ids"]
    writing = Writing(tokenizer, Draw(Sampling(99)), 99, ends=[2], stops=["stop"])
    told = [writing.take(torch.zeros(1), token)[0] for token in ids[:8]]
    assert "".join(told) == "aé "
    assert "\ufffd" not in "".join(told)
    assert told == ["a", "", "é", " ", "", "", "", ""]
    assert writing.reason == "stop"
    other = Writing(tokenizer, Draw(Sampling(99)), 9, ends=[2], stops=["stop"])
    assert (
        "".join(other.take(torch.zeros(1), token)[0] for token in tokenizer("a store")["input_ids"] + [2]) == "a store"
    )
    assert other.reason == "stop"
    short = Writing(tokenizer, Draw(Sampling(99)), 3, ends=[2], stops=["stop"])
    assert [short.take(torch.zeros(1), token)[0] for token in tokenizer("xst")["input_ids"]] == ["x", "", "st"]
    assert short.reason == "length"


# --- the scheduler ---------------------------------------------------------------------------------------------------


class Heard:
    """What is told of rows, and whether all is told."""

    def __init__(self, count):
        self.texts = dict.fromkeys(range(count), "")
        self.ends, self.failures, self.whole = {}, [], threading.Event()
        self.first = threading.Event()

    def __call__(self, told):
        self.first.set()
        if isinstance(told, Failure):
            self.failures.append(told)
        elif isinstance(told, Piece):
            self.texts[told.index] += told.text
            if told.reason:
                self.ends[told.index] = told.reason
        else:
            self.ends[len(self.ends)] = told
        if len(self.ends) + len(self.failures) == len(self.texts):
            self.whole.set()


def rows_of(speakers, asked, heard, *, room=16, until_s=WAIT_S):
    """Make rows of (side, text)."""
    found = []
    for index, (side, text) in enumerate(asked):
        tuned = speakers.tuned(side)
        prompt = np.asarray(tuned.objective.prompt_tokens(tuned.rows().renderer, text), dtype=np.int32)
        writing = Writing(tuned.tokenizer, Draw(Sampling(room)), room, ends=[2])
        found.append(Row(side, heard, time.monotonic() + until_s, index=index, prompt=prompt, writing=writing))
    return found


@pytest.fixture
def scheduled():
    """Start schedulers that end with the test."""
    started = []

    def start(speakers, max_rows=3):
        made = Scheduler(speakers, max_rows)
        made.start()
        started.append(made)
        return made

    yield start
    for made in started:
        made.close(0)
        assert not made._thread.is_alive()


TEXTS = ["item 3 is", "x", "what is item 7 of the whole list", "and", "item 12 is blue or black?"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_as_its_run_does(train, scheduled, method):
    run = train(max_steps=6, **METHODS[method])
    speakers = Beside({"tuned": run}, base=True)
    scheduler = scheduled(speakers)
    asked = [(side, text) for text in TEXTS for side in ("tuned", "base")]
    heard = Heard(len(asked))
    scheduler.submit(rows_of(speakers, asked, heard))
    assert heard.whole.wait(WAIT_S)
    assert heard.failures == []
    assert [heard.texts[index] for index in range(0, len(asked), 2)] == run.generate(TEXTS, max_new_tokens=16)
    with speakers.speaking("base") as base:
        prompts = [row.prompt for row in rows_of(speakers, [("base", text) for text in TEXTS], heard)]
        assert [heard.texts[index] for index in range(1, len(asked), 2)] == generate(
            base.model, base.tokenizer, prompts, max_new_tokens=16
        )
    assert scheduler.counts["written"] == len(asked)


def test_adapters_of_one_base_take_turns(train, scheduled):
    runs = {"first": train(max_steps=6), "second": train(max_steps=4, learning_rate=3e-2, seed=9)}
    speakers = Stacked(runs)
    scheduler = scheduled(speakers, max_rows=4)
    asked = [(side, text) for text in TEXTS for side in ("second", "base", "first")]
    heard = Heard(len(asked))
    for row in rows_of(speakers, asked, heard):
        scheduler.submit([row])
    assert heard.whole.wait(WAIT_S)
    for place, name in ((2, "first"), (0, "second")):
        assert [heard.texts[index] for index in range(place, len(asked), 3)] == runs[name].generate(
            TEXTS, max_new_tokens=16
        )
    assert len(set(heard.texts.values())) > len(TEXTS)


def test_who_leaves_is_late_or_comes_too_late(train, scheduled):
    run = train(max_steps=4)
    speakers = Beside({"tuned": run}, base=True)
    scheduler = scheduled(speakers, max_rows=2)
    gone, late, waits = Heard(1), Heard(1), Heard(1)
    (leaver,) = rows_of(speakers, [("base", TEXTS[0])], gone, room=400)
    scheduler.submit([leaver])
    assert gone.first.wait(WAIT_S)
    scheduler.submit(rows_of(speakers, [("base", TEXTS[1])], late, until_s=0.0))
    assert late.whole.wait(WAIT_S)
    assert late.failures == [Failure(504, "The answer took longer than this server allows.")]
    scheduler.submit(rows_of(speakers, [("tuned", TEXTS[2])], waits))
    assert waits.whole.wait(WAIT_S)  # beside the long one
    leaver.is_gone = True
    scheduler.wake()
    after = Heard(1)
    scheduler.submit(rows_of(speakers, [("base", TEXTS[2])], after))
    assert after.whole.wait(WAIT_S)  # by then it has left: rows leave before others go on
    assert not gone.whole.is_set()
    scheduler.close(0)
    assert (scheduler.counts["dropped"], scheduler.counts["timed_out"], scheduler.counts["written"]) == (1, 1, 2)
    assert scheduler.num_active == 0
    refused = Heard(1)
    scheduler.submit(rows_of(speakers, [("tuned", TEXTS[0])], refused))
    assert refused.failures == [Failure(503, "The server is shutting down.")]


def test_a_model_that_fails_fails_its_rows_and_goes_on(train, scheduled, monkeypatch, capfd):
    speakers = Beside({"tuned": train(max_steps=4)}, base=True)
    scheduler = scheduled(speakers)
    forward, secret = Decoding.step, "what somebody asked"

    def broken(self, tokens):
        raise RuntimeError(secret)

    monkeypatch.setattr(Decoding, "step", broken)
    heard = Heard(2)
    scheduler.submit(rows_of(speakers, [("tuned", text) for text in TEXTS[:2]], heard))
    assert heard.whole.wait(WAIT_S)
    assert {failure.status for failure in heard.failures} == {500}
    assert "RuntimeError" in scheduler.errors
    assert secret not in capfd.readouterr().err + str(heard.failures)
    monkeypatch.setattr(Decoding, "step", forward)
    again = Heard(1)
    scheduler.submit(rows_of(speakers, [("tuned", TEXTS[0])], again))
    assert again.whole.wait(WAIT_S)
    assert again.failures == []


def test_a_row_without_probabilities_fails_alone(train, scheduled, monkeypatch):
    speakers = Beside({"tuned": train(max_steps=4)}, base=True)
    scheduler = scheduled(speakers)
    broken, other = Heard(1), Heard(1)
    (wrong,) = rows_of(speakers, [("tuned", TEXTS[0])], broken)
    wrong.writing.draw = Draw(Sampling(9, temperature=1.0))
    monkeypatch.setattr(wrong.writing.draw, "_penalised", lambda logits: logits * float("nan"))
    scheduler.submit([wrong, *rows_of(speakers, [("tuned", TEXTS[1])], other)])
    assert broken.whole.wait(WAIT_S)
    assert other.whole.wait(WAIT_S)
    assert (broken.failures[0].status, other.failures) == (500, [])
    assert Draw(Sampling(5, 1e-30)).choose(torch.tensor([1.0, 2.0])) == 1


def test_what_is_found_in_texts(train, write, scheduled):
    lines = "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40))
    run = train(data={"train": str(write("rows.csv", f"text,label\n{lines}"))}, max_steps=2)
    scheduler = scheduled(Beside({"tuned": run}, base=False))
    heard = Heard(1)
    scheduler.submit([Look("tuned", heard, time.monotonic() + WAIT_S, inputs=["text number 3", "x"])])
    assert heard.whole.wait(WAIT_S)
    (found,) = heard.ends.values()
    expected = run.predict(["text number 3", "x"]).to_dict("records")
    for row, wanted in zip(found.rows, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)
    wrong = Heard(1)
    scheduler.submit([Look("tuned", wrong, time.monotonic() + WAIT_S, inputs=[("a", "b", "c")])])
    assert wrong.whole.wait(WAIT_S)
    assert wrong.failures[0].status == 400


class Pieces:
    """A tokenizer that, as SentencePiece's, writes a word's space only behind another token."""

    words = ("\u2581blue", "\u2581is", "!", "\u2581the", "<end>")

    def decode(self, ids, skip_special_tokens=False):
        shown = [self.words[i] for i in ids if not (skip_special_tokens and self.words[i] == "<end>")]
        return "".join(shown).replace("\u2581", " ").removeprefix(" ")


@pytest.mark.parametrize(("before", "text"), [((), "blue is!"), ((3,), " blue is!")])
def test_a_word_keeps_its_space_behind_a_prompt(before, text):
    writing = Writing(Pieces(), Draw(Sampling(9, 0.0)), 9, ends=[4], num_likely=1, before=before)
    said, likely = "", []
    for token in (0, 1, 2, 4):
        logits = torch.full((5,), -9.0)
        logits[token] = 9.0
        more, words = writing.take(logits)
        said += more
        likely += [word.text for word in words]
    assert said == text
    assert "".join(likely) == text
    assert writing.reason == "stop"


def test_a_stop_that_is_longer_than_the_text_costs_nothing():
    writing = Writing(Pieces(), Draw(Sampling(9, 0.0)), 9, ends=[4], stops=["is" + "x" * 1_000_000])
    logits = torch.zeros(5)
    logits[1] = 1.0
    assert writing.take(logits)[0] == ""  # it may be the beginning of it
    logits[2] = 2.0
    assert writing.take(logits)[0] == "is!"
