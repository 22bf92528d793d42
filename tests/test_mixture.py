"""Several sources, rarer classes, replay, cleaning, groups, and rows that were encoded before."""

import json

import numpy as np
import pytest

from tune_magic.data import duplicates, kept, mixture, privacy
from tune_magic.data.split import split
from tune_magic.errors import DataError, RecipeError, RunFailed
from tune_magic.recipe import build_recipe
from tune_magic.recipe.schema import DataOptions
from tune_magic.training.order import Order


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbered(count, start=0, word="row"):
    """Rows that have little in common."""
    draw = np.random.default_rng(start)
    words = ["".join(map(chr, draw.integers(97, 123, 6))) for _ in range(count * 5)]
    return [
        {"prompt": f"{word} {' '.join(words[5 * i : 5 * i + 4])}", "completion": words[5 * i + 4]} for i in range(count)
    ]


# --- how often rows come ---------------------------------------------------------------------------------------------


def test_an_epoch_has_as_many_rows_of_each_part_as_said():
    parts = [
        mixture.Draw("a", np.arange(10), 10),
        mixture.Draw("b", np.arange(10, 17), 3),
        mixture.Draw("c", np.arange(17, 19), 5),
    ]
    order = Order(19, 4, 7, draws=parts)
    assert order.steps_per_epoch == 5
    epochs = [[row for step in range(1 + 5 * e, 6 + 5 * e) for row in order.rows(step)] for e in range(7)]
    for rows in epochs:
        assert [sum(row in part.rows for row in rows) for part in parts] == [10, 3, 5]
    every = [row for rows in epochs for row in rows]
    assert {every.count(row) for row in range(10)} == {7}  # the main source once an epoch
    assert {every.count(row) for row in range(10, 17)} == {3}  # 3 of 7 in each of 7 epochs: every row as often
    assert max(every.count(row) for row in (17, 18)) - min(every.count(row) for row in (17, 18)) <= 1
    again = Order(19, 4, 7, draws=parts)
    assert again.rows(23) == order.rows(23)  # a pure function of seed and step
    assert Order(19, 4, 8, draws=parts).rows(1) != order.rows(1)


@pytest.mark.parametrize(("mix", "temperature", "counts"), [
    ({"b.jsonl": 0.5}, 1.0, [40, 20]),
    (["b.jsonl"], 1.0, [40, 10]),
    (["b.jsonl"], 2.0, [40, 20]),  # (10 / 40) ** (1 / 2) of 40
    ("b.jsonl", 1.0, [40, 10]),
    ([{"data": "b.jsonl", "weight": 2}], 1.0, [40, 80]),
])  # fmt: skip
def test_weights_and_temperature_say_how_many(mix, temperature, counts):
    data = DataOptions(train="a.jsonl", mix=mix, mix_temperature=temperature)
    drawn = mixture.draws(data, mixture.more_sources(data), np.repeat([0, 1], [40, 10]), None)
    assert [draw.count for draw in drawn] == counts
    assert mixture.epoch_weights(drawn, 50).sum() == pytest.approx(sum(counts))


def test_replayed_rows_have_their_share():
    data = DataOptions(train="a.jsonl", mix={"b.jsonl": 1.0}, replay="old.jsonl", replay_share=0.2)
    drawn = mixture.draws(data, mixture.more_sources(data), np.repeat([0, 1, 2], [40, 40, 500]), None)
    assert [draw.count for draw in drawn] == [40, 40, 20]
    assert mixture.facts(drawn)[2] == {
        "name": "old.jsonl", "rows": 500, "per_epoch": 20, "share": 0.2, "replay": True,
    }  # fmt: skip


def test_a_mixture_is_trained_and_told(train, write):
    main, chat = (
        write("main.jsonl", lines(numbered(40))),
        [
            {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yo"}]}
            for i in range(30)
        ],
    )
    other = write("chat.jsonl", lines(chat))
    run = train(
        data={"train": str(main), "held_out": 0.1, "mix": {str(other): 0.5}},
        num_train_epochs=2,
        max_steps=None,
        batch_size=6,
    )
    plan = run.summary().plan
    assert [(part["rows"], part["per_epoch"]) for part in plan["mixture"]] == [(36, 36), (30, 18)]
    assert plan["steps_per_epoch"] == 9
    assert run.summary().step == 18
    assert set(plan["fingerprints"]) >= {"train", "mix_1"}
    assert "an epoch: main.jsonl 67 % (36 rows), chat.jsonl 33 % (18 drawn of 30 rows)" in run.card()["text/plain"]


def test_rarer_classes_come_again(train, write):
    rows = [{"text": f"{'good' if i % 8 else 'bad'} {i}", "label": "a" if i % 8 else "b"} for i in range(64)]
    path = write("rows.jsonl", lines(rows))
    plan = train(data={"train": str(path), "balance": "resample", "held_out": 0.25}, max_steps=1).summary().plan
    assert [part["per_epoch"] for part in plan["mixture"]] == [42, 42]
    with pytest.raises(RunFailed, match="these rows have none"):
        train(data={"train": str(write("b.jsonl", lines(numbered(40)))), "balance": "resample"}).raise_for_state()


@pytest.mark.parametrize(("data", "says"), [
    ({"mix": {"b.jsonl": -1}}, "data.mix"),
    ({"mix": {"b.jsonl": "much"}}, "data.mix"),
    ({"mix": [{"data": "b.jsonl", "wieght": 1}]}, "data.mix"),
    ({"clean": "everything"}, "data.clean"),
    ({"on_bad_rows": "ignore"}, "data.on_bad_rows"),
    ({"format": "massages"}, "there is no format 'massages'. Did you mean `messages`?"),
])  # fmt: skip
def test_what_is_misspelt_is_told(data, says):
    with pytest.raises(RecipeError) as caught:
        build_recipe({"model": "m", "data": {"train": "a.jsonl", **data}})
    assert says in str(caught.value)


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_held_out_whole(seed):
    draw = np.random.default_rng(seed)
    groups = draw.integers(0, 40, 400)
    labels = groups % 2
    train_rows, held_out = split(400, 0.2, seed, labels, groups)
    assert not set(groups[train_rows]) & set(groups[held_out])
    assert sorted([*train_rows, *held_out]) == list(range(400))
    assert 50 <= len(held_out) <= 110
    assert abs(labels[held_out].mean() - labels.mean()) < 0.15
    assert np.array_equal(split(400, 0.2, seed, labels, groups)[1], held_out)


def test_few_groups_leave_one_on_each_side():
    for groups in ([0] * 9 + [1], [0, 1], [0] * 5 + [1] * 5):
        train_rows, held_out = split(len(groups), 0.1, 0, None, groups)
        assert len(train_rows)
        assert len(held_out)
    train_rows, held_out = split(10, 0.1, 0, None, [0] * 10)
    assert (len(train_rows), len(held_out)) == (10, 0)


def test_rows_of_a_user_stay_together(train, write):
    rows = [{**row, "user": i // 4} for i, row in enumerate(numbered(80))]
    path = write("rows.jsonl", lines(rows))
    run = train(data={"train": str(path), "held_out": 0.25, "group_by": "user"}, max_steps=1)
    held_out = json.loads((run.path / "split.json").read_text())["held_out"]
    assert len(held_out) == run.summary().plan["held_out_rows"] == 20
    users = {(number - 1) // 4 for number in held_out}
    assert len(users) == 5
    with pytest.raises(RunFailed, match="has no column `usr`"):
        train(data={"train": str(path), "group_by": "usr"}).raise_for_state()


# --- cleaning --------------------------------------------------------------------------------------------------------


def test_each_cleaning_does_what_it_says_and_is_told(train, write):
    rows = numbered(60)
    text = rows[10]["prompt"]
    rows += [
        rows[3], {**rows[4], "completion": "otherwise"},  # 61 a copy, 62 (and 5) contradict
        {"prompt": text + " s", "completion": rows[10]["completion"]},  # 63 nearly row 11
        {"prompt": "long", "completion": "so it goes " * 30},  # 64 too long
        {"prompt": "mail ada@example.org or call +49 30 901820 about it", "completion": "done so"},  # 65
        {"prompt": "the key is sk-abcdefghijklmnop1234567890abcd is it", "completion": "never tell"},  # 66
        {"prompt": "garbled cafÃ© naÃ¯ve letters here", "completion": "were mended"},  # 67
    ]  # fmt: skip
    held_out = write("held.jsonl", lines([rows[7], rows[8]]))
    path = write("rows.jsonl", lines(rows))
    kinds = ["duplicates", "near_duplicates", "leaks", "contradictions", "overlong", "encoding", "personal", "secrets"]
    run = train(data={"train": str(path), "held_out": str(held_out), "clean": kinds}, max_steps=1, max_length=200)
    plan = run.summary().plan
    found = {entry["kind"]: entry["rows"] for entry in plan["cleaned"]}
    assert found == {
        "encoding": [67], "secrets": [66], "personal": [65], "overlong": [64], "duplicates": [61],
        "contradictions": [5, 62], "leaks": [8, 9], "near_duplicates": [63],
    }  # fmt: skip
    assert plan["train_rows"] == 67 - 7
    assert path.read_text() == lines(rows)  # the file stays as it is
    text = run.card()["text/plain"]
    assert "cleaned: duplicates: 1 row left out (rows 61)" in text
    before = train(data={"train": str(path), "held_out": str(held_out)}, max_steps=1, max_length=200).summary().plan
    assert before["identity"] != plan["identity"]
    assert before["train_rows"] == 67


def test_a_mended_text_is_what_is_trained(train, write):
    row = {"prompt": "mail ada@example.org now", "completion": "the key sk-abcdefghijklmnop1234567890abcd cafÃ©"}
    path = write("rows.jsonl", lines([row] * 20))
    plan = train(data={"train": str(path), "clean": ["encoding", "personal", "secrets"]}, max_steps=1).summary().plan
    text = "".join(piece for piece, _ in plan["lens"][0]["spans"])
    assert "mail [email] now" in text
    assert "the key [secret] café" in text


@pytest.mark.parametrize(("text", "found"), [
    ("write to ada@example.org, bob.b+x@mail.co.uk", {"email": ["ada@example.org", "bob.b+x@mail.co.uk"]}),
    ("call +49 30 901820 or (212) 555-0123", {"telephone": ["+49 30 901820", "(212) 555-0123"]}),
    ("card 4111 1111 1111 1111", {"card": ["4111 1111 1111 1111"]}),
    ("IBAN DE89 3704 0044 0532 0130 00.", {"iban": ["DE89 3704 0044 0532 0130 00"]}),
    ("from 192.168.0.17", {"address": ["192.168.0.17"]}),
    ("SSN 536-22-8726", {"social": ["536-22-8726"]}),
    # and what only looks like it
    ("a @ b, x@y, @handle", {}),
    ("4111 1111 1111 1112, order 1234567890123", {}),
    ("version 1.2.3.4.5, 2024-01-15 10:00:00, 3.14159265358979, 1,000,000,000", {}),
    ("room 300-400, ISBN 978-3-16-148410-0", {}),
])  # fmt: skip
def test_personal_data_is_told_from_other_numbers(text, found):
    assert privacy.personal(text) == found


@pytest.mark.parametrize("secret", [
    "sk-abcdefghijklmnop1234567890abcd", "ghp_" + "a1B2" * 9, "hf_" + "a1B2" * 8, "AKIA" + "ABCDEFGH12345678"[:16], "xoxb-123456789012-abcdefghijkl",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIB\nabc=\n-----END RSA PRIVATE KEY-----",
])  # fmt: skip
def test_secrets_are_found_and_taken_out(secret):
    text = f"use {secret} please"
    assert privacy.secrets(text)
    assert privacy.without_secrets(text) == "use [secret] please"
    assert (
        privacy.secrets(
            "The quick brown fox, https://example.org/a/b?c=d and sha 0123456789abcdef0123456789abcdef01234567"
        )
        == []
    )


def test_near_copies_are_told_from_rows_of_one_template(table_from):
    rows = [
        f"You are a helpful bot. Answer in one word. The order number {i * 7919} came late, what now? {w} {w * 2}"
        for i, w in enumerate("abcdefgh")
    ]
    table = table_from([*rows, rows[2] + "!", rows[5].replace("late", "late,")])
    (found,) = duplicates.near_copies([table])
    assert found.tolist() == [-1] * 8 + [2, 5]


@pytest.fixture
def table_from(tokenizer, tmp_path):
    from conftest import encode, table_of

    from tune_magic.data.content import Text
    from tune_magic.data.render import Renderer

    def make(texts):
        renderer = Renderer(tokenizer, chat_template=True, max_length=2048)
        return table_of(encode(renderer, [Text(text) for text in texts]), tmp_path)

    return make


# --- rows encoded before ---------------------------------------------------------------------------------------------


@pytest.fixture
def keep_all(monkeypatch):
    """Keep small sources too, and count how many were found again."""
    monkeypatch.setattr(kept, "_LEAST_BYTES", 0)
    monkeypatch.setattr(kept, "_LEAST_FILE_BYTES", 0)
    found, load = [], kept.load

    def counted(*given):
        result = load(*given)
        found.append(result is not None)
        return result

    monkeypatch.setattr(kept, "load", counted)
    return found


def test_rows_encoded_before_are_the_same_run(train, write, keep_all):
    rows = [*numbered(60), {"prompt": "p " * 300, "completion": "c"}]
    path = write("rows.jsonl", lines(rows) + "{oops\n")
    keys = {"data": {"train": str(path), "on_bad_rows": "skip"}, "max_steps": 3, "max_length": 100}
    first, second = train(**keys), train(**keys)
    assert keep_all == [False, True]
    facts = [
        {k: v for k, v in run.summary().plan.items() if k not in ("memory", "saved_bytes")} for run in (first, second)
    ]
    assert facts[0]["skipped"] == facts[1]["skipped"]
    assert facts[0]["lens"] == facts[1]["lens"]
    assert [s["loss"] for s in first.events("step")] == [s["loss"] for s in second.events("step")]


def test_anything_that_matters_encodes_anew(slow, train, write, keep_all):
    path = write("rows.jsonl", lines([{**row, "text": "a longer text", "user": 1} for row in numbered(40)]))
    changes = [
        {}, {"max_length": 64}, {"data": {"train": str(path), "format": "text"}}, {"data": {"train": str(path), "chat_template": False}},
        {"data": {"train": str(path), "clean": ["encoding"]}}, {"data": {"train": f"{path}[:30]"}},
        {"data": {"train": str(path), "template": "{prompt}"}}, {"data": {"train": str(path), "group_by": "user", "held_out": 0}},
    ]  # fmt: skip
    for change in changes:
        train(**{"data": str(path), "max_steps": 1, **change}).raise_for_state()
    assert keep_all == [False] * len(changes)
    train(data=str(path), max_steps=1, learning_rate=1e-5)  # what rows do not depend on
    assert keep_all[-1]
    path.write_text(lines(numbered(41)))
    train(data=str(path), max_steps=1)
    assert not keep_all[-1]


def test_damaged_or_full_they_are_encoded_again(train, write, keep_all, monkeypatch):
    path = write("rows.jsonl", lines(numbered(40)))
    train(data=str(path), max_steps=1)
    (folder,) = kept.folder().iterdir()
    (folder / "tokens").write_bytes(b"")
    assert train(data=str(path), max_steps=1).status == "finished"
    assert keep_all == [False, False]
    monkeypatch.setattr(kept, "_MOST_BYTES", 0)
    train(data=str(path), max_steps=1, max_length=64)
    assert list(kept.folder().iterdir()) == []  # the oldest went, which was all


def test_groups_survive_being_kept(train, write, keep_all):
    path = write("rows.jsonl", lines([{**row, "user": i // 4} for i, row in enumerate(numbered(80))]))
    keys = {"data": {"train": str(path), "held_out": 0.25, "group_by": "user"}, "max_steps": 1}
    one, two = ((train(**keys).path / "split.json").read_text() for _ in range(2))
    assert keep_all == [False, True]
    assert one == two


def test_a_column_that_balances_nothing_is_an_error():
    with pytest.raises(DataError, match="evens out classes"):
        mixture.draws(DataOptions(train="a", balance="resample"), [], np.zeros(4, dtype=int), None)


def test_a_held_out_file_needs_no_group(train, write):
    path = write("rows.jsonl", lines([{**row, "user": i} for i, row in enumerate(numbered(40))]))
    held_out = write("held.jsonl", lines(numbered(4, start=9)))
    run = train(data={"train": str(path), "held_out": str(held_out), "group_by": "user"}, max_steps=1)
    assert run.summary().plan["held_out_rows"] == 4


def test_reading_many_rows_is_seen(train, write, monkeypatch):
    from tune_magic.training import source

    monkeypatch.setattr(source, "_SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(source, "_PART_ROWS", 20)
    run = train(data={"train": str(write("rows.jsonl", lines(numbered(60)))), "augment": "noise"}, max_steps=1)
    told = [(event["stage"], event["done"], event["total"]) for event in run.events("progress")]
    assert told[:3] == [("reading rows", 20, None), ("reading rows", 40, None), ("reading rows", 60, None)]
    assert told[-1][0] == "making rows"
    assert told[-1][1] == told[-1][2]
