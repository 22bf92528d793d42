"""A server: OpenAI's own client is answered as the runs answer, together as alone, and nothing of it is kept on disk."""

import concurrent.futures
import contextlib
import json
import os
import select
import signal
import subprocess
import sys

import httpx
import numpy as np
import openai
import psutil
import pytest
from conftest import rows
from test_view import Page

import tune_magic
from tune_magic import cli, servers
from tune_magic.errors import TuneError
from tune_magic.executors import local
from tune_magic.handles import Run
from tune_magic.models.decode import Sampling
from tune_magic.models.generate import stream
from tune_magic.recipe import build_recipe
from tune_magic.servers import Server, Token
from tune_magic.storage import folder
from tune_magic.view.server import server_card

PROMPTS = ["item 3 is", "item 12 is", "and", "what is item 7 of the whole list", "x", "blue or red, which of the two?"]
RUNS = {
    "first": {"max_steps": 6, "method": {"name": "lora", "r": 4, "lora_alpha": 16}},
    "second": {"max_steps": 5, "seed": 7, "learning_rate": 2e-2, "method": {"name": "lora", "r": 2}},
    "letters": {"max_steps": 4, "method": {"name": "lora", "r": 2}, "data": "letters.csv"},
}
CONCURRENT = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def runs(tiny, home):
    """Two runs that answer and one that classifies, on one base."""
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (home / "letters.csv").write_text("text,label\n" + "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40)))
    shared = {"model": str(tiny), "learning_rate": 1e-2, "batch_size": 4, "eval": {"steps": 50, "samples": 0}}
    found = {}
    for name, own in RUNS.items():
        data = {"train": str(home / own.get("data", "rows.jsonl")), "held_out": 0.25}
        recipe = build_recipe(shared | own | {"data": data})
        path = folder.create(home / "tune_runs", "finetune", {"name": name, "recipe": recipe.given()})
        local.start(path, "inline")
        found[name] = Run(path)
        found[name].raise_for_state()
    return found


@pytest.fixture(scope="module")
def kept(runs):
    """Where the one server is, that all tests ask; it ends with them."""
    found = []
    yield found
    for server in found:
        server.stop()


@pytest.fixture
def server(kept, runs):
    """A server of all runs; another one only where a test has ended it."""
    if not kept or kept[-1].has_ended:
        kept.append(tune_magic.serve(*runs.values(), max_concurrent=CONCURRENT))
    return kept[-1].wait(300)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token, max_retries=0) as made:
        yield made


@pytest.fixture
def post(server):
    """Post a body and return the response, with another header where one is given."""
    with httpx.Client(base_url=server.url, timeout=60) as session:

        def post(path, body, **headers):
            known = {"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"}
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return session.post(
                path, content=content, headers=known | {k.replace("_", "-"): v for k, v in headers.items()}
            )

        yield post


def ask(client, text, model="first", **options):
    settings = {"temperature": 0, "max_tokens": 12} | options
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **settings)


def said(client, text, model="first", **options):
    return ask(client, text, model, **options).choices[0].message.content


# --- answers ---------------------------------------------------------------------------------------------------------


def test_the_models_are_the_runs_and_their_base(client, server, tiny):
    names = ["first", "second", "letters", "base", tiny.name]
    assert [model.id for model in client.models.list()] == names == server.models
    found = client.models.retrieve("base")
    assert (found.id, found.object, found.owned_by) == ("base", "model", "tune_magic")


def test_a_chat_is_answered_as_the_run_answers(client, runs):
    done = ask(client, PROMPTS[0])
    expected = runs["first"].generate(PROMPTS[0], max_new_tokens=12)[0]
    assert done.choices[0].message.content == expected
    assert (done.object, done.model, done.choices[0].message.role) == ("chat.completion", "first", "assistant")
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    _, tokenizer = runs["first"].load()
    asked = [{"role": "user", "content": PROMPTS[0]}]
    assert done.usage.prompt_tokens == len(
        tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    )
    history = [
        *asked,
        done.choices[0].message.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "on"}]},
    ]
    again = client.chat.completions.create(model="first", messages=history, temperature=0, max_completion_tokens=6)
    plain = [*asked, {"role": "assistant", "content": expected}, {"role": "user", "content": "on"}]
    assert again.choices[0].message.content == runs["first"].generate([plain], max_new_tokens=6)[0]


def test_each_name_is_another_model(client, runs, tiny):
    from tune_magic.evaluation.speakers import Beside

    found = {name: said(client, PROMPTS[1], name) for name in ("first", "second", "base", tiny.name)}
    assert found["second"] == runs["second"].generate(PROMPTS[1], max_new_tokens=12)[0]
    assert found["base"] == found[tiny.name]
    assert len(set(found.values())) == 3
    with Beside({"tuned": runs["first"]}, base=True).speaking("base") as base:
        renderer = base.rows().renderer
        prompt = np.asarray(renderer.prompt_tokens(PROMPTS[1]))
        assert found["base"] == stream(base.model, base.tokenizer, prompt, Sampling(12))


def test_a_text_goes_on_from_text_texts_or_tokens(client, runs):
    model, tokenizer = runs["first"].load()
    ids = tokenizer(PROMPTS[0])["input_ids"]
    expected = stream(model, tokenizer, np.asarray(ids), Sampling(16))
    settings = {"model": "first", "temperature": 0}
    one = client.completions.create(prompt=PROMPTS[0], **settings)
    assert (one.choices[0].text, one.object, one.usage.prompt_tokens) == (expected, "text_completion", len(ids))
    assert client.completions.create(prompt=ids, **settings).choices[0].text == expected
    several = client.completions.create(prompt=[PROMPTS[0], PROMPTS[1]], n=2, **settings)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == expected
    assert texts[2] == texts[3] == client.completions.create(prompt=PROMPTS[1], **settings).choices[0].text
    assert several.usage.completion_tokens == sum(16 if c.finish_reason == "length" else c.finish_reason == "stop" and
                                                  len(tokenizer(c.text)["input_ids"]) + 1 for c in several.choices)  # fmt: skip


def test_a_stream_is_the_answer_in_pieces(client):
    whole = ask(client, PROMPTS[3], "base", max_tokens=30, n=2, seed=5, temperature=1.2)
    pieces, ends, usage = {0: "", 1: ""}, {}, None
    roles = set()
    for chunk in ask(
        client, PROMPTS[3], "base", max_tokens=30, n=2, seed=5, temperature=1.2, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles.add((choice.index, choice.delta.role))
            pieces[choice.index] += choice.delta.content or ""
            ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert pieces == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    assert {(0, "assistant"), (1, "assistant")} <= roles
    assert pieces[0] != pieces[1]  # the second has the next seed


def test_a_stream_ends_with_done(post):
    body = {"model": "first", "prompt": "item", "stream": True, "temperature": 0}
    lines = [line for line in post("/v1/completions", body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(texts) == post("/v1/completions", body | {"stream": False}).json()["choices"][0]["text"]


def test_seeds_repeat_and_draw_as_a_chat_does(client, runs):
    settings = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 20}
    first, again, other = (said(client, PROMPTS[2], "first", seed=seed, **settings) for seed in (3, 3, 4))
    assert first == again != other
    model, tokenizer = runs["first"].load()
    asked = tokenizer.apply_chat_template([{"role": "user", "content": PROMPTS[2]}], add_generation_prompt=True)
    assert first == stream(model, tokenizer, np.asarray(asked["input_ids"]), Sampling(20, 1.3, 0.9, 3))
    drawn = {said(client, PROMPTS[2], "first", **settings) for _ in range(4)}
    assert len(drawn) > 1  # without a seed, another each time


def test_it_stops_at_words_and_says_why(client):
    whole = ask(client, PROMPTS[3], "base", max_tokens=40)
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    word = text[8:11]
    for stop in (word, ["nowhere in it", word]):
        cut = ask(client, PROMPTS[3], "base", max_tokens=40, stop=stop)
        assert cut.choices[0].message.content == text[: text.find(word)]
        assert cut.choices[0].finish_reason == "stop"
        streamed = "".join(
            choice.delta.content or ""
            for chunk in ask(client, PROMPTS[3], "base", max_tokens=40, stop=stop, stream=True)
            for choice in chunk.choices
        )
        assert streamed == text[: text.find(word)]


def test_penalties_and_probabilities(client):
    def words(**options):
        answer = ask(client, PROMPTS[3], "base", max_tokens=30, logprobs=True, top_logprobs=3, **options)
        return answer.choices[0].logprobs.content

    plain = words()
    assert all(word.logprob == pytest.approx(word.top_logprobs[0].logprob) for word in plain)  # greedy: the likeliest
    assert all(word.top_logprobs[0].token == word.token for word in plain)
    apart = words(presence_penalty=2.0, frequency_penalty=2.0)
    assert len({word.token for word in apart}) > len({word.token for word in plain})
    text = client.completions.create(model="base", prompt="item", temperature=0, logprobs=2).choices[0]
    assert "".join(text.logprobs.tokens) == text.text
    assert text.logprobs.text_offset[:2] == [0, len(text.logprobs.tokens[0])]


def test_classes_with_their_probabilities(post, runs):
    found = post("/v1/classify", {"model": "letters", "input": ["text number 3", "text number 4, and longer"]}).json()
    expected = runs["letters"].predict(["text number 3", "text number 4, and longer"])
    assert [row["label"] for row in found["data"]] == list(expected.idxmax(axis=1))
    for row, wanted in zip(found["data"], expected.to_dict("records"), strict=True):
        assert row["probabilities"] == pytest.approx(wanted, abs=1e-5)
    assert found["usage"]["prompt_tokens"] > 20
    one = post("/v1/classify", {"model": "letters", "input": "text number 3"}).json()
    assert one["data"][0]["probabilities"] == pytest.approx(found["data"][0]["probabilities"], abs=1e-5)


def test_answers_together_are_those_alone(client):
    asked = [(text, name) for text in PROMPTS for name in ("first", "second", "base")]
    alone = [said(client, *one, max_tokens=24) for one in asked]
    with concurrent.futures.ThreadPoolExecutor(2 * CONCURRENT) as pool:
        together = list(pool.map(lambda one: said(client, *one, max_tokens=24), asked))
    assert together == alone


# --- what is not answered --------------------------------------------------------------------------------------------

CHAT = {"model": "first", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "first", "prompt": "hi"}


@pytest.mark.parametrize(("path", "body", "status", "param", "says"), [
    ("/v1/chat/completions", CHAT | {"model": "gpt-9"}, 404, "model", "There are: first, second, letters, base"),
    ("/v1/chat/completions", CHAT | {"model": "letters"}, 400, "model", "writes no texts; ask `/v1/classify`"),
    ("/v1/classify", {"model": "first", "input": "x"}, 400, "model", "writes texts; ask `/v1/chat/completions`"),
    ("/v1/classify", {"model": "letters", "input": []}, 400, "input", "at least 1 item"),
    ("/v1/classify", {"model": "letters", "input": ["x"] * 257}, 400, "input", "at most 256 items"),
    ("/v1/chat/completions", {"model": "first"}, 400, "messages", "`messages` is missing"),
    ("/v1/chat/completions", CHAT | {"messages": []}, 400, "messages", "at least 1 item"),
    ("/v1/chat/completions", CHAT | {"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ("/v1/chat/completions", CHAT | {"temperature": "warm"}, 400, "temperature", "valid number"),
    ("/v1/chat/completions", CHAT | {"max_tokens": "5"}, 400, "max_tokens", "valid integer"),
    ("/v1/chat/completions", CHAT | {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ("/v1/chat/completions", CHAT | {"stream": 1}, 400, "stream", "valid boolean"),
    ("/v1/chat/completions", CHAT | {"logit_bias": {"5": 3}}, 400, "logit_bias", "not supported"),
    ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ("/v1/chat/completions", CHAT | {"top_k": 5}, 400, "top_k", "not known to this server"),
    ("/v1/chat/completions", CHAT | {"n": 100}, 400, "n", "64 answers"),
    ("/v1/chat/completions", CHAT | {"max_tokens": 600}, 400, "messages", "This model has 512 places"),
    ("/v1/completions", TEXT | {"prompt": "word " * 200}, 400, "prompt", "This model has 512 places"),
    ("/v1/completions", TEXT | {"prompt": ""}, 400, "prompt", "no token to go on from"),
    ("/v1/completions", TEXT | {"prompt": [1, 99999]}, 400, "prompt", "Tokens are numbers from 0 to"),
    ("/v1/completions", TEXT | {"prompt": ["a"] * 65}, 400, "prompt", "64 prompts"),
    ("/v1/completions", TEXT | {"best_of": 4}, 400, "best_of", "not supported"),
    ("/v1/completions", TEXT | {"stream_options": {"include_usage": True}}, 400, "stream_options", "`stream: true`"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     400, "messages", "messages.0.content"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "king", "content": "x"}]}, 400, "messages", "'system'"),
    ("/v1/chat/completions", b"{not json", 400, None, "not valid JSON"),
    ("/v1/chat/completions", b"\xff\xfe", 400, None, "not valid JSON"),
    ("/v1/chat/completions", b'{"model": "\\ud800", "messages": []}', 400, None, "not valid JSON"),
    ("/v1/chat/completions", b"[" * 100_000, 400, None, "not valid JSON"),
    ("/v1/chat/completions", b"[]", 400, None, "must be a JSON object"),
    ("/v1/chat/completions", b" " * ((2 << 20) + 1), 413, None, "2097152 bytes"),
    ("/v1/embeddings", {}, 404, None, "Not Found"),
    ("/docs", {}, 404, None, "Not Found"),
    ("/v1/models", {}, 405, None, "Method Not Allowed"),
])  # fmt: skip
def test_a_wrong_request_is_refused_by_name(post, path, body, status, param, says):
    response = post(path, body)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert says in error["message"]
    assert "Traceback" not in response.text


@pytest.mark.parametrize(("headers", "status"), [
    ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": ""}, 401), ({"Authorization": "Basic {token}"}, 401),
    ({"Authorization": "{token}"}, 401), ({"Host": "evil.example"}, 403), ({"Host": "localhost:80"}, 200),
    ({"Content_Type": "text/plain"}, 415), ({"Authorization": "bearer {token}"}, 200), ({"Origin": "http://evil.example"}, 200),
])  # fmt: skip
def test_the_door(post, server, headers, status):
    given = {key: value.format(token=server.token) for key, value in headers.items()}
    response = post("/v1/completions", TEXT | {"max_tokens": 1}, **given)
    assert response.status_code == status
    assert not [name for name in response.headers if name.startswith("access-control")]  # no page may read it
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_openais_client_raises_its_own_errors(server, client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        said(client, "hi", "nobody")
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        said(client, "hi", logit_bias={"1": 5})
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="guessed", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_health_is_open_and_nothing_else_is(server):
    with httpx.Client(base_url=server.url) as session:
        assert session.get("/health").json() == {"status": "ok"}
        assert session.get("/v1/models").status_code == 401


def long(client, **options):
    return ask(client, PROMPTS[3], "base", stream=True, **({"max_tokens": 400} | options))


def test_a_client_that_stops_waiting_is_noticed(server, client, wait_for):
    """Of a whole answer too, which nobody else would be told of."""
    with pytest.raises(openai.APITimeoutError):
        ask(client, PROMPTS[3], "base", max_tokens=450, timeout=0.3)
    wait_for(server.job, lambda event: event["type"] == "requests" and event.get("dropped", 0) >= 1)


def test_too_many_are_sent_away_and_a_client_that_leaves_makes_room(server, client):
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(long(client)) for _ in range(CONCURRENT)]
        for answers in opened:  # each is being written
            next(iter(answers))
        with concurrent.futures.ThreadPoolExecutor(4 * CONCURRENT + 2) as pool:
            futures = [
                pool.submit(lambda: ask(client, PROMPTS[3], "base", max_tokens=4)) for _ in range(3 * CONCURRENT + 8)
            ]
            errors = [future.exception() for future in concurrent.futures.as_completed(futures)]
    refused = [error for error in errors if error is not None]
    assert refused
    assert all(isinstance(error, openai.RateLimitError) for error in refused)
    assert refused[0].response.headers["retry-after"] == "1"
    assert errors.count(None) >= 3 * CONCURRENT
    said(client, "hi")  # those who left have made room


# --- beginning and end -----------------------------------------------------------------------------------------------


def texts_under(path):
    return b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_f31_neither_token_nor_what_was_asked_is_kept(server, client, home, post):
    secret = "the parcel of Anna Karenina"
    said(client, secret)
    post("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": secret}], "tools": [secret]})
    post("/v1/classify", {"model": "letters", "input": secret})
    kept = texts_under(home / "tune_runs")
    assert server.token.encode() not in kept
    assert b"Karenina" not in kept
    assert b'"listening"' in kept
    arguments = subprocess.run(["ps", "-eo", "args"], capture_output=True).stdout
    assert server.token.encode() not in arguments
    shown = [repr(server), repr(server.token), json.dumps(server.card()), str(server.facts)]
    assert server.token not in "".join(shown)
    assert f"{server.token}" == server.token  # but whoever asks for it has it


def test_its_card_says_how_to_ask(server, wait_for):
    text = Page(server.card()["text/html"]).text
    for part in (server.url, "first, second, letters, base", "server · ready", "openai.OpenAI", "curl", "server.token"):
        assert part in text
    wait_for(server.job, lambda event: event["type"] == "requests" and "200" in event["statuses"])
    assert server.requests["statuses"]["200"] > 0
    assert server.requests["tokens"] > 0


def test_f30_a_card_shows_hostile_names_and_does_nothing():
    evil = "<script>alert(1)</script>"
    facts = {"needs_token": True, "token_env": evil, "owner": None}
    bundle = server_card(
        evil, f"failed: {evil}", "http://127.0.0.1:1", [evil], facts=facts, requests={"statuses": {evil: 1}}
    )
    assert "<script" not in bundle["text/html"]


OWNER = """
import sys, tune_magic
server = tune_magic.serve(sys.argv[1], token_env="OF_THE_USER")
print(server.job.path, server.wait(120).url, flush=True)
sys.stdin.readline()
"""


def test_it_ends_with_whoever_asked_and_gives_its_memory_back(runs, tmp_path, wait_for):
    """A server of another process: its token from the environment, its end with that process, while it is answering."""
    environment = {**os.environ, "OF_THE_USER": "a-token-of-my-own"}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(runs["second"].path)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with owner:
        path, url = owner.stdout.readline().split()
        other = Server(path)
        assert other.token is None  # of another process
        assert other.is_ready
        with openai.OpenAI(base_url=f"{url}/v1", api_key=environment["OF_THE_USER"], max_retries=0) as client:
            with long(client, max_tokens=100) as answers:
                next(iter(answers))
                worker = os.pidfd_open(other.job.holder().pid)
                owner.kill()
                owner.wait()
                rest = list(answers)  # what was being written is finished within the grace
            assert rest[-1].choices[0].finish_reason == "length"
            event = wait_for(other.job, lambda event: event["type"] == "state" and event["state"] == "finished")
            assert event["reason"] == "owner"
            other.job.wait(30)
            with pytest.raises(openai.APIConnectionError):
                client.models.list()
    assert other.has_ended
    assert other.status == "ended"
    assert select.select([worker], [], [], 60)[0]  # the process itself is gone
    os.close(worker)
    assert environment["OF_THE_USER"].encode() not in texts_under(other.job.path)


def test_a_terminal_stays_until_ctrl_c(runs, monkeypatch, capsys):
    done = []

    class Fake:
        name, url, models, token = "first", "http://127.0.0.1:1", ["first", "base"], Token("a-token-of-my-own")

        class job:
            status = "stopped"

            @staticmethod
            def wait(each):
                each()
                assert done == ["loaded"]  # nobody has asked yet
                os.kill(os.getpid(), signal.SIGINT)
                each()

        def wait(self):
            done.append("loaded")

        def stop(self):
            done.append("stopped")

    monkeypatch.setattr("tune_magic.deploying.serve", lambda *runs, **options: Fake())
    assert cli.main(["serve", str(runs["first"].path)]) == 0
    assert done == ["loaded", "stopped"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["models: first, base", "token: a-token-of-my-own", "Ctrl-C ends it."]
    assert "http://127.0.0.1:1/v1" in lines[0]
    done.clear()
    assert cli.main(["serve", str(runs["first"].path), "--keep", "--token-env", "X"]) == 0
    assert done == ["loaded"]
    assert "a-token" not in capsys.readouterr().out  # it is known where it came from


@pytest.mark.parametrize(("options", "says"), [
    ({"token": False, "host": "0.0.0.0"}, "anybody who reaches 0.0.0.0"),
    ({"token": False, "host": "example.org"}, "anybody who reaches example.org"),
    ({"token": False, "token_env": "X"}, "A token and no token"),
    ({"token_env": "NOT_THERE"}, "NOT_THERE holds no token"),
    ({"token_env": "SHORT"}, "SHORT holds no token"), ({"port": 70_000}, "from 1 to 65535, got 70000"),
    ({"host": "my host"}, "no address to listen on"), ({"max_concurrent": 0}, "at least 1"),
    ({"timeout": "soon"}, "must be a time such as"),
])  # fmt: skip
def test_what_would_be_wrong_is_said_before_anything_starts(runs, monkeypatch, options, says):
    monkeypatch.setenv("SHORT", "abc")
    monkeypatch.setattr(local, "start", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(TuneError, match=says):
        tune_magic.serve(runs["first"], **options)


def test_runs_that_cannot_be_served(runs, make_run):
    with pytest.raises(TuneError, match="no checkpoint"):
        tune_magic.serve(make_run())
    with pytest.raises(TuneError, match="twice"):
        tune_magic.serve(runs["first"], runs["first"])


def test_the_line_of_a_notebook(runs, monkeypatch):
    """Flags become what Python is called with; the card is shown, and the handle is the value."""
    from tune_magic.commands import COMMANDS, parse
    from tune_magic.magics import verbs

    called = {}

    class Fake:
        def show_live(self):
            called["shown"] = True

    monkeypatch.setattr(
        "tune_magic.deploying.serve", lambda *runs, **options: called.update(runs=runs, **options) or Fake()
    )
    monkeypatch.setattr("tune_magic.display.in_kernel", lambda: True)
    parsed = parse(
        COMMANDS["tune serve"], "first second --no-token --port 8080 --max-concurrent 3 --keep --timeout 30s"
    )
    found = verbs.do_verb("serve", parsed, lambda name: runs[name])
    assert isinstance(found, Fake)
    assert called == {
        "runs": (runs["first"], runs["second"]), "token": False, "port": 8080, "max_concurrent": 3, "keep": True,
        "timeout": "30s", "shown": True,
    }  # fmt: skip
    assert servers.of_run(runs["second"]) == []


def test_a_token_is_hidden_as_a_value_alone():
    token = Token("s3cret-s3cret")
    assert "s3cret" not in repr(token)
    assert (f"Bearer {token}", token == "s3cret-s3cret") == ("Bearer s3cret-s3cret", True)


def test_the_last_one_turns_off_the_light(server, client, capsys):
    """`--stop` ends it, whoever started it; what is being written is finished, what waits or comes later is sent away."""
    pid = server.job.holder().pid
    with long(client, max_tokens=60) as answers, concurrent.futures.ThreadPoolExecutor(1) as pool:
        next(iter(answers))
        stopping = pool.submit(cli.main, ["serve", str(server.run.path), "--stop"])
        rest = list(answers)
        assert stopping.result(60) == 0
    assert rest[-1].choices[0].finish_reason == "length"
    assert "first: 1 server stopped." in capsys.readouterr().out
    assert (server.status, server.job.status, server.has_ended) == ("ended", "stopped", True)
    assert not psutil.pid_exists(pid)  # no zombie of ours
    assert local.exit_code(server.job.path) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    assert "ended" in server.card()["text/plain"]
    assert cli.main(["serve", str(server.run.path), "--stop"]) == 0
    assert "no server is up" in capsys.readouterr().out
