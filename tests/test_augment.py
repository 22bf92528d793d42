"""Rows made of training rows: what is changed, what stays, that it is the same again, and never held out."""

import http.server
import json
import threading

import numpy as np
import pytest
from test_mixture import lines, numbered
from test_training import StopAt

from tune_magic import plugins
from tune_magic.augmenters.synonyms import _FOLDERS, _lexicon
from tune_magic.data.content import Labelled, PromptCompletion, Text, Turns, asked, from_plain, to_plain, with_asked
from tune_magic.errors import DataError, RecipeError, RunFailed, TuneError
from tune_magic.recipe import build_recipe
from tune_magic.training.augment import Made, draw
from tune_magic.training.augment import read as read_made
from tune_magic.training.augment import write as write_made

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Please cancel my order, it has not arrived.", "12 34", ""]


def change(kind, texts, seed=0, tell=lambda done: None, **options):
    plugin = plugins.get("augmenter", kind)
    augmenter = plugin(plugin.Options.model_validate({"kind": kind, **options}))
    return augmenter.change(texts, np.random.default_rng(seed), tell)


def distance(one, other):
    """Edits between two texts, a swap counted as two."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_a_slip_or_some(seed):
    first, second, none, empty = change("noise", TEXTS, seed)
    assert (none, empty) == (None, None)
    assert 1 <= distance(TEXTS[0], first) <= 2 * 8
    assert distance(TEXTS[1], second) <= 2 * 8
    assert change("noise", TEXTS, seed) == [first, second, None, None]
    many = change("noise", TEXTS[:1], seed, strength=1.0)[0]
    assert distance(TEXTS[0], many) >= 5


@pytest.fixture
def lexicon(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("quick\tfast, speedy\norder\tpurchase\nlazy\tlazy\ncancel\tcall off, revoke\n")
    return str(path)


def test_synonyms_come_from_the_lexicon(lexicon):
    seen = {change("synonyms", TEXTS, seed, lexicon=lexicon, strength=1.0)[0] for seed in range(20)}
    assert seen == {TEXTS[0].replace("quick", "fast"), TEXTS[0].replace("quick", "speedy")}
    assert change("synonyms", ["Quick! QUICK"], 1, lexicon=lexicon, strength=1.0)[0].lower() in (
        "fast! fast", "speedy! speedy", "fast! speedy", "speedy! fast",
    )  # fmt: skip
    assert change("synonyms", ["Order"], lexicon=lexicon) == ["Purchase"]
    assert change("synonyms", ["nothing known"], lexicon=lexicon) == [None]


def test_a_thesaurus_of_mythes_is_read_by_its_index(tmp_path):
    entries = {
        "big": ["(adj)|large|huge|small (antonym)|of size", "(adj)|bad|heavy"],
        "café": ["(noun)|coffeehouse|bar (generic term)"],
    }
    content, index = b"UTF-8\n", [b"UTF-8", b"2"]
    for word, senses in entries.items():
        index.append(f"{word}|{len(content)}".encode())
        content += "\n".join([f"{word}|{len(senses)}", *senses, ""]).encode()
    (tmp_path / "th.dat").write_bytes(content)
    (tmp_path / "th.idx").write_bytes(b"\n".join(index) + b"\n")
    found = _lexicon(str(tmp_path / "th.dat"))
    assert found.synonyms("big") == ["large", "huge"]
    assert found.synonyms("café") == ["coffeehouse"]
    assert found.synonyms("none") == []


def test_the_installed_thesaurus_is_found():
    from pathlib import Path

    if not any((Path(folder) / "th_en_US_v2.dat").is_file() for folder in _FOLDERS):
        pytest.skip("no thesaurus is installed here (Debian's mythes-en-us)")
    assert "large" in _lexicon("en_US").synonyms("big")


@pytest.mark.parametrize("name", ["xx_XX", "gone.tsv", "wordnet"])
def test_a_lexicon_that_is_not_there_says_how_to_get_one(name, monkeypatch, tmp_path):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    if name == "wordnet":
        from nltk import data

        monkeypatch.setattr(data, "path", [str(tmp_path)])
    with pytest.raises(DataError, match=r"apt install mythes-en-us|nltk\.downloader wordnet"):
        _lexicon(name)
    (tmp_path / "bad.tsv").write_text("quick fast\n")
    with pytest.raises(DataError, match=r"bad\.tsv, line 1: no tab"):
        _lexicon(str(tmp_path / "bad.tsv"))


# --- what of a row is changed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "said"), [
    (PromptCompletion("p", "c", "s"), ["p"]),
    (Labelled("t", "good", "u"), ["t", "u"]),
    (Text("t"), ["t"]),
    (Turns([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]), ["q"]),
])  # fmt: skip
def test_what_is_asked_changes_and_answers_stay(content, said):
    assert asked(content) == said
    shouted = with_asked(content, lambda text: text + "!")
    assert asked(shouted) == [text + "!" for text in said]
    assert with_asked(shouted, lambda text: text[:-1]) == content
    assert from_plain(json.loads(json.dumps(to_plain(content)))) == content


def test_each_row_is_drawn_as_often_as_the_others():
    recipe = build_recipe({"model": "m", "data": {"train": "a", "augment": {"noise": 2.5, "synonyms": 0.3}}})
    twice, some = draw(recipe.data.augment, np.arange(5, 15), 1)
    assert np.bincount(twice, minlength=15)[5:].tolist().count(3) == 5
    assert set(np.bincount(twice, minlength=15)[5:]) == {2, 3}
    assert len(some) == len(set(some)) == 3


@pytest.mark.parametrize(("augment", "says"), [
    ("noize", "there is no augmenter 'noize'. There are: back_translation, noise, paraphrase, synonyms."),
    ({"noise": 0}, "noise.share"),
    ([{"kind": "noise", "strenth": 1}], "noise.strenth"),
    ([{"kind": "paraphrase", "endpoint": "http://x"}], "needs the name of a `model` there"),
    ([{"kind": "paraphrase", "endpoint": "file:///x", "model": "m"}], "must begin with http:// or https://"),
])  # fmt: skip
def test_what_is_misspelt_is_told(augment, says):
    with pytest.raises(RecipeError) as caught:
        build_recipe({"model": "m", "data": {"train": "a", "augment": augment}})
    assert says in str(caught.value)


# --- in a run --------------------------------------------------------------------------------------------------------


def test_rows_are_made_of_training_rows_alone(train, write):
    rows = numbered(60)
    path = write("rows.jsonl", lines(rows))
    run = train(data={"train": str(path), "held_out": 0.25, "augment": {"noise": 1.0}}, max_steps=2)
    plan = run.summary().plan
    held_out = json.loads((run.path / "split.json").read_text())["held_out"]
    made = [json.loads(line) for line in (run.path / "augmented.jsonl").read_text().splitlines()]
    assert plan["held_out_rows"] == 15
    assert plan["train_rows"] == 90
    assert len(made) == plan["augmented"][0]["rows"] == 45
    assert {one["row"] for one in made} == set(range(1, 61)) - set(held_out)
    for one in made:
        assert one["completion"] == rows[one["row"] - 1]["completion"]
        assert 1 <= distance(one["prompt"], rows[one["row"] - 1]["prompt"]) <= 10
    assert "made by noise: 45 rows (" in run.card()["text/plain"]


def test_what_was_made_is_read_again_whatever_marks_it_holds(tmp_path):
    made = [Made(0, "noise", PromptCompletion("one\u2028two", "three\u0085four")), Made(1, "noise", Text("five"))]
    write_made(tmp_path, made)
    assert read_made(tmp_path) == made


def test_a_resumed_run_has_the_same_rows(make_run, write, train, monkeypatch):
    path = write("rows.jsonl", lines(numbered(40)))
    keys = {"data": {"train": str(path), "augment": {"noise": 0.5}}, "max_steps": 6, "save_steps": 2}
    whole = train(**keys)
    with monkeypatch.context() as patched:
        StopAt(patched, 40)
        part = train(**keys)
    assert part.status == "stopped"
    before = (part.path / "augmented.jsonl").read_text()
    with monkeypatch.context() as patched:  # what was made is read again, not made again
        patched.setattr("tune_magic.training.augment.make", None)
        part.resume("inline")
    assert part.status == "finished"
    assert (part.path / "augmented.jsonl").read_text() == before == (whole.path / "augmented.jsonl").read_text()
    losses = [{s["step"]: s["loss"] for s in run.events("step")} for run in (whole, part)]
    assert losses[0] == losses[1]


def test_classes_get_rows_too(train, write, lexicon):
    rows = [{"text": f"the quick order {i}", "label": "ab"[i % 2]} for i in range(40)]
    path = write("rows.jsonl", lines(rows))
    augment = [{"kind": "synonyms", "share": 0.5, "lexicon": lexicon, "strength": 1.0}]
    run = train(data={"train": str(path), "augment": augment}, max_steps=1)
    made = [json.loads(line) for line in (run.path / "augmented.jsonl").read_text().splitlines()]
    assert len(made) == 14
    assert all(one["label"] == rows[one["row"] - 1]["label"] for one in made)
    assert all("quick" not in one["text"] and "purchase" in one["text"] for one in made)


def test_a_local_model_rewords(train, write, tiny):
    path = write("rows.jsonl", lines(numbered(30)))
    augment = [{"kind": "back_translation", "share": 0.2, "max_new_tokens": 8}]
    run = train(data={"train": str(path), "augment": augment}, max_steps=1)
    assert run.status == "finished"  # what a random model says is not told apart from nothing
    assert (run.path / "augmented.jsonl").exists()


@pytest.fixture
def at_once(monkeypatch):
    """Nothing is waited for between tries, and nobody looks on between answers."""
    monkeypatch.setattr("tune_magic.models.address._PAUSE_S", 0.0)
    monkeypatch.setattr("tune_magic.models.address._LOOK_S", 60.0)


@pytest.fixture
def address(at_once):
    """An address that speaks OpenAI's protocol, what it was asked, and the codes it fails with first."""
    asked_of, failures = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked_of.append((self.path, self.headers.get("Authorization"), content))
            if failures:
                self.send_error(failures.pop())
                return
            said = content["messages"][0]["content"].partition("\n\n")[2]
            body = json.dumps({"choices": [{"message": {"content": f'"{said[::-1]}"'}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked_of, failures
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_address_rewords(address, monkeypatch):
    url, asked_of, failures = address
    monkeypatch.setenv("MY_KEY", "secret-of-mine")
    told = []
    options = {"endpoint": url, "model": "big", "api_key_env": "MY_KEY"}
    assert change("paraphrase", TEXTS[:2], tell=told.append, **options) == [text[::-1] for text in TEXTS[:2]]
    assert told == [1, 2]
    path, key, content = asked_of[0]
    assert path == "/v1/chat/completions"
    assert key == "Bearer secret-of-mine"
    assert (content["model"], content["temperature"]) == ("big", 0)
    assert change("back_translation", TEXTS[:1], **options) == [None]  # twice reversed is the same
    assert "to German" in asked_of[2][2]["messages"][0]["content"]
    assert "to English" in asked_of[3][2]["messages"][0]["content"]
    failures[:] = [503, 429]
    assert change("paraphrase", TEXTS[:1], **options) == [TEXTS[0][::-1]]  # it is asked again
    failures[:] = [401]
    with pytest.raises(TuneError, match=r"401.*MY_KEY"):
        change("paraphrase", TEXTS[:1], **options)
    failures[:] = [500] * 3
    with pytest.raises(TuneError, match="did not answer after 3 tries: 500"):
        change("paraphrase", TEXTS[:1], **options)
    with pytest.raises(TuneError, match="did not answer"):
        change("paraphrase", TEXTS[:1], **{**options, "endpoint": "http://127.0.0.1:9"})


def test_an_address_that_is_down_ends_the_run_in_words(train, write, at_once):
    path = write("rows.jsonl", lines(numbered(30)))
    augment = [{"kind": "paraphrase", "endpoint": "http://127.0.0.1:9/v1", "model": "m"}]
    with pytest.raises(RunFailed, match=r"127\.0\.0\.1:9/v1/chat/completions did not answer"):
        train(data={"train": str(path), "augment": augment}, max_steps=1).raise_for_state()
