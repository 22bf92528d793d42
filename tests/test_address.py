"""A model behind an address: what is asked again, what is kept, who is sent the key, and that it lets go at once."""

import http.server
import json
import threading
from email.utils import formatdate
from types import SimpleNamespace

import pytest

from tune_magic.errors import TuneError
from tune_magic.models import address as module
from tune_magic.models.address import Address
from tune_magic.models.answers import cached
from tune_magic.storage.control import StopRequested


@pytest.fixture
def serve():
    """Start addresses whose answers to a chat are a function's: a text, or a code with headers and a body."""
    servers = []

    def start(answer):
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
                asked.append((said, self.headers.get("Authorization")))
                found = answer(said)
                if isinstance(found, str):
                    found = 200, {}, json.dumps({"choices": [{"message": {"content": found}}]}).encode()
                code, headers, body = found
                self.send_response(code)
                for name, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/v1", asked

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


class Waits:
    """Stands for the event that ends requests: notes how long they would wait for it."""

    def __init__(self):
        self.seconds = []

    def wait(self, seconds):
        self.seconds.append(seconds)
        return False


def at(url):
    return Address(url, "large", "MY_KEY", 9)


def chats(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def nothing(count):
    pass


def test_pauses_grow_and_what_the_server_asks_for_is_kept_to_within_bounds(serve):
    wishes = [None, None, None, None, "7", "86400", "soon"]
    url, asked = serve(
        lambda said: (429, {"Retry-After": wish} if (wish := wishes.pop(0)) else {}, b"") if wishes else "yes"
    )
    waits = Waits()
    assert at(url)._answer(chats("a")[0], waits) == "yes"
    assert len(asked) == 8
    for number, seconds in enumerate(waits.seconds[:4]):
        assert 0.5 * 2**number <= seconds <= 2**number
    assert waits.seconds[4] == pytest.approx(16, rel=0.5)
    assert waits.seconds[5] == module._LONGEST_PAUSE_S
    assert waits.seconds[6] == pytest.approx(64, rel=0.5)


def test_a_wish_may_be_a_date(monkeypatch):
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: 1_000_000.0))
    assert module._wish_s(formatdate(1_000_030.0, usegmt=True)) == 30.0
    assert module._wish_s(formatdate(999_000.0, usegmt=True)) == 0.0
    assert [module._wish_s(given) for given in (None, "", "soon", " 5 ")] == [None, None, None, 5.0]


def test_answers_are_kept_as_they_come_and_not_asked_again(serve, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    url, asked = serve(lambda said: (400, {}, b"") if said == "d" and len(asked) < 5 else said.upper())
    path = tmp_path / "kept.jsonl"
    with pytest.raises(TuneError, match="refused: 400"):
        at(url).answers(chats(*"abcde"), nothing, path)
    path.write_bytes(path.read_bytes() + b'{"chat": "cut o')
    counts = []
    assert at(url).answers(chats(*"abcde"), counts.append, path) == list("ABCDE")
    assert [said for said, _ in asked] == list("abcdde")
    assert at(url).answers(chats(*"edcba"), nothing, path) == list("EDCBA")
    assert len(asked) == 6
    assert sum(counts) == 5


def test_answers_that_nobody_asked_for_in_a_week_are_thrown_away():
    import os

    path = cached("http://a", "large", 9)
    path.write_text("")
    assert cached("http://a", "large", 9) == path
    assert path.exists()
    os.utime(path, (0, 0))
    assert cached("http://b", "large", 9) != path
    assert not path.exists()


def test_a_stop_does_not_wait_for_an_answer(serve, monkeypatch):
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    hangs = threading.Event()
    url, asked = serve(lambda said: "late" if hangs.wait(60) else "never")

    def look(count):
        assert count == 0
        raise StopRequested

    try:
        with pytest.raises(StopRequested):
            at(url).answers(chats(*"abcdefgh"), look)
        assert not hangs.is_set()
    finally:
        hangs.set()
    assert len(asked) <= module._AT_ONCE


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_no_redirect_takes_the_key_elsewhere(code, serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "of-mine-alone")
    other, strangers = serve(lambda said: "yes")
    url, asked = serve(lambda said: (code, {"Location": f"{other}/chat/completions"}, b""))
    with pytest.raises(TuneError, match=f"refused: {code}") as caught:
        at(url).answers(chats("a"), nothing)
    assert other in caught.value.hint
    assert [key for _, key in asked] == ["Bearer of-mine-alone"]
    assert strangers == []


def test_an_answer_that_breaks_off_is_asked_again(serve, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    broken = [2, 1]
    url, _ = serve(lambda said: (200, {"Content-Length": 999}, b"{") if broken and broken.pop() else "yes")
    assert at(url).answers(chats("a"), nothing) == ["yes"]
    broken[:] = [1, 1, 1]
    with pytest.raises(TuneError, match="did not answer after 3 tries: IncompleteRead"):
        at(url).answers(chats("a"), nothing)
    with pytest.raises(TuneError, match="did not answer"):
        at("http://127.0.0.1:x y").answers(chats("a"), nothing)
