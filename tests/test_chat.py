"""A chat: the tuned model beside its base, token by token, as Transformers would answer, and gone when nobody asks."""

import functools
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import make_model
from test_view import Page
from transformers import AutoModelForCausalLM, AutoTokenizer

import tune_magic
from tune_magic import cli
from tune_magic.chatting import Answer, Turn, _system_of
from tune_magic.errors import RunFailed, TuneError
from tune_magic.evaluation import chat as chat_job
from tune_magic.models.decode import Sampling
from tune_magic.models.generate import generate, stream
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.view.chat import chat_card


@pytest.fixture
def bot(train):
    return train(max_steps=30)


@pytest.fixture
def chat(bot):
    made = tune_magic.chat(bot)
    yield made
    made.close()
    made.job.wait(30)


def test_it_answers_as_the_models_do_and_remembers(chat, bot):
    first = chat.ask("item 3 is", max_new_tokens=12)
    assert list(first) == ["tuned", "base"]
    assert first["tuned"] == bot.generate("item 3 is", max_new_tokens=12)[0]
    assert first["base"] != first["tuned"]
    second = chat.ask("and 4", max_new_tokens=6, base=False)
    history = [
        {"role": "user", "content": "item 3 is"}, {"role": "assistant", "content": first["tuned"]},
        {"role": "user", "content": "and 4"},
    ]  # fmt: skip
    assert second == {"tuned": bot.generate([history], max_new_tokens=6)[0]}
    again = chat.ask("item 3 is", max_new_tokens=12, fresh=True)
    assert again == first
    with_system = chat.ask("item 3 is", max_new_tokens=12, fresh=True, system="Be brief.")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "item 3 is"}]
    assert with_system["tuned"] == bot.generate([asked], max_new_tokens=12)[0]
    assert [turn.is_first for turn in chat.turns] == [True, False, True, True]

    # drawn answers differ by seed alone
    drawn = [chat.ask("item", temperature=1.5, max_new_tokens=20, seed=s, base=False, fresh=True) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]

    # pieces add up to the answer, and the folder tells it to any reader
    pieces = "".join(e["text"] for e in chat.job.events("piece") if (e["turn"], e["side"]) == (1, "tuned"))
    assert first["tuned"].startswith(pieces)
    assert next(chat.job.events("answer"))["text"] == first["tuned"]
    text = chat.card()["text/plain"]
    assert "> item 3 is" in text
    assert f"tuned: {' '.join(first['tuned'].split())}" in text

    # enough is enough
    turn = chat.say("item 9 is", max_new_tokens=400, base=False, fresh=True)
    with pytest.raises(TuneError, match="It still answers"):
        chat.say("more")
    deadline = time.monotonic() + 30
    while not turn.answers and time.monotonic() < deadline:
        time.sleep(0.02)
        assert chat.turns
    chat.hush()
    while chat.is_answering and time.monotonic() < deadline:
        time.sleep(0.02)
    assert turn.answers["tuned"].is_whole

    chat.close()
    chat.job.wait(30)
    assert chat.has_ended
    with pytest.raises(TuneError):
        chat.say("hello?")
    assert bot.status == "finished"  # talking changes nothing of the run


def test_a_run_without_a_checkpoint_has_nobody_to_talk_to(make_run):
    with pytest.raises(TuneError, match="no checkpoint"):
        tune_magic.chat(make_run())


@pytest.fixture
def in_this_process(bot, monkeypatch):
    """Do a chat job here, with an owner and a clock of the test's; returns its last state and its log."""

    def do(owner, requests=(), run=bot):
        from tune_magic import launching

        job = launching.new_job(run, "chat", {"base": True, "owner": owner})
        for kind, content in requests:
            job.request(kind, **content)
        with EventLog(job.path / "events.jsonl", attempt=1) as log:
            state = chat_job.chat(job, log, Control(job.path, 1))
        return state, job

    return do


def said(**changes):
    content = {
        "turn": 1, "text": "item 3 is", "system": "", "max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 0,
        "base": True, "fresh": False,
    }  # fmt: skip
    return "say", content | changes


def test_it_ends_with_the_process_that_asks_and_after_silence(in_this_process, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert in_this_process(gone.pid)[0] == {"state": "finished", "reason": "owner"}
    monkeypatch.setattr(chat_job, "_IDLE_S", 0.5)
    state, job = in_this_process(os.getpid(), [said()])
    assert state == {"state": "finished", "reason": "idle"}
    assert [event["side"] for event in job.events("answer")] == ["tuned", "base"]


def test_after_full_fine_tuning_the_base_is_a_second_model(train, in_this_process, monkeypatch):
    monkeypatch.setattr(chat_job, "_IDLE_S", 0.5)
    run = train(method={"name": "full"}, max_steps=12)
    _, job = in_this_process(os.getpid(), [said(max_new_tokens=8)], run)
    tuned, base = (event["text"] for event in job.events("answer"))
    assert tuned == run.generate("item 3 is", max_new_tokens=8)[0]
    assert base != tuned


def test_a_classifier_answers_with_its_likeliest_classes(train, write, in_this_process, monkeypatch):
    monkeypatch.setattr(chat_job, "_IDLE_S", 0.5)
    rows = "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40))
    run = train(data={"train": str(write("rows.csv", f"text,label\n{rows}"))}, max_steps=2)
    _, job = in_this_process(os.getpid(), [said()], run)
    (answer,) = job.events("answer")
    shares = [float(line.split()[0]) for line in answer["text"].split("\n")]
    assert sum(shares) == pytest.approx(1, abs=0.002)
    expected = run.predict("item 3 is").iloc[0]
    assert answer["text"].split("\n")[0].split()[1] == expected.idxmax()


def test_a_long_conversation_forgets_its_beginning(in_this_process, monkeypatch):
    monkeypatch.setattr(chat_job, "_IDLE_S", 0.5)
    talk = []

    class Told(chat_job._Talk):
        def answer(self, said):
            for number in range(1, 6):
                super().answer(said | {"turn": number, "text": "word " * 30})
            talk.append(self._histories["tuned"])

    monkeypatch.setattr(chat_job, "_Talk", Told)
    _, job = in_this_process(os.getpid(), [said(base=False)])
    assert max(event["prompt_tokens"] for event in job.events("answer")) <= 512 - 4
    assert len(talk[0]) < 10


def test_half_a_character_is_never_told(bot):
    model, tokenizer = bot.load()
    prompt = np.asarray(tokenizer("item 3 is é")["input_ids"])
    heard = []
    drawn = Sampling(24, temperature=2.0, seed=3)
    whole = stream(model, tokenizer, prompt, drawn, tell=lambda text, count: heard.append((text, count)))
    assert all(not text.endswith("\ufffd") for text, _ in heard)
    assert [n for _, n in heard] == sorted(n for _, n in heard)
    assert heard == [] or whole.startswith(heard[0][0])
    assert len(whole) > 0


@pytest.mark.parametrize(("row", "system"), [
    ({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "x"}]}, "Be kind."),
    ({"messages": [{"role": "user", "content": "x"}]}, ""),
    ({"prompt": "a", "completion": "b", "system": "Be brief."}, "Be brief."),
    ({"prompt": "a", "completion": "b"}, ""), ({"messages": "odd"}, ""),
])  # fmt: skip
def test_the_system_message_that_was_trained_is_offered(row, system):
    assert _system_of(row) == system


def test_f30_the_card_shows_hostile_answers_and_does_nothing():
    evil = "<script>alert(1)</script>\x1b[31m"
    turns = [
        Turn(n, evil, ("tuned", "base"), {"tuned": Answer(evil, True, 3, 1.0), "base": Answer(evil)}, n == 1)
        for n in range(1, 30)
    ]
    bundle = chat_card(evil, turns, "answering")
    assert "<script" not in bundle["text/html"]
    assert "\x1b" not in bundle["text/html"] + bundle["text/plain"]
    text = Page(bundle["text/html"]).text
    assert "tuned · 3 tokens, 3 a second" in text
    assert "9 earlier turns" in text
    assert len(bundle["text/html"]) < 60_000


def test_a_terminal_talks_too(bot, monkeypatch, capsys):
    class Fake:
        def __init__(self, run, *, base=True):
            self.run = run

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def ask(self, text):
            return {"tuned": text.upper(), "base": text}

    lines = iter(["hello", ""])
    monkeypatch.setattr("tune_magic.api.Chat", Fake)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("tune_magic.cli._run", lambda name: bot)
    assert cli.main(["chat", "tiny_run"]) == 0
    assert "tuned: HELLO\nbase: hello\n" in capsys.readouterr().out


def test_a_worker_that_fails_says_so(bot):
    for checkpoint in bot.checkpoints.values():
        (checkpoint / "trainable.safetensors").write_bytes(b"broken")
    with tune_magic.chat(bot) as broken, pytest.raises(RunFailed):
        broken.ask("anybody there?")
    assert "chat · failed: " in broken.card()["text/plain"]
    assert "trainable.safetensors" in broken.card()["text/plain"]


def test_answers_end_where_the_model_has_no_more_places(tmp_path):
    """GPT-2 has a vector for each place, and none beyond; what one prompt leaves does not cut another's answer."""
    folder = make_model(tmp_path / "gpt2", "gpt2", n_positions=24, max_position_embeddings=24)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    prompts = [np.arange(length) % 7 + 5 for length in (24, 20, 6, 4)]
    counted = []
    together = generate(model, tokenizer, prompts, max_new_tokens=10, done=counted.append)
    assert together == [generate(model, tokenizer, [prompt], max_new_tokens=10)[0] for prompt in prompts]
    assert sum(counted) == 4
    assert together[0] == ""
    longer, shorter = (
        stream(model, tokenizer, prompts[1], Sampling(10)),
        stream(model, tokenizer, prompts[1], Sampling(4)),
    )
    assert longer == shorter == together[1]
    with pytest.raises(TuneError, match="24 tokens, and the model has 24 places"):
        stream(model, tokenizer, prompts[0], Sampling(10))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "bloom", "gpt_neo"])
def test_what_all_prompts_begin_with_is_computed_once(tmp_path, family, monkeypatch):
    """The answers stay those of each prompt alone; a window of attention counts padding in the middle, so it shares nothing."""
    windows = {"attention_types": [[["global", "local"], 1]], "window_size": 8} if family == "gpt_neo" else {}
    folder = make_model(tmp_path / family, family, **windows)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    beginning = np.arange(90) % 200 + 20
    prompts = [np.concatenate([beginning, np.arange(length) % 50 + 30 + length]) for length in (3, 30, 11, 12, 1)]
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    computed, forward = [], type(model).forward

    @functools.wraps(forward)  # whose signature says what it can be given
    def counted(self, input_ids, **given):
        computed.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **given)

    monkeypatch.setattr(type(model), "forward", counted)
    assert generate(model, tokenizer, prompts, max_new_tokens=8) == alone
    shares = family in ("llama", "gpt2")
    assert computed[0] == (90 if shares else 5 * 120)
    assert computed[1] == (5 * 30 if shares else 5)
