"""Every format: recognised by its columns and values, brought to its normal form, refused in words."""

import json

import pytest
from conftest import encode, normalise

from tune_magic import plugins
from tune_magic.data.content import (
    Labelled,
    Located,
    Measured,
    Media,
    MultiLabelled,
    Preference,
    PromptCompletion,
    Rated,
    Related,
    Sited,
    Tagged,
    Tasked,
    Text,
    Turns,
    texts,
    with_texts,
)  # fmt: skip
from tune_magic.data.formats.base import BadRow
from tune_magic.data.locate import Slice, parse, read
from tune_magic.data.normalise import recognise
from tune_magic.data.read import Row, read_rows
from tune_magic.data.render import Renderer
from tune_magic.errors import DataError, RunFailed
from tune_magic.recipe import DataOptions
from tune_magic.tables import serialise, take_out
from tune_magic.tables import write as write_tables

OPTIONS = DataOptions(train="rows.jsonl")
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f"}}
ROWS = [
    # format, a row, what it becomes
    ("messages", {"messages": [USER, ANSWER]}, Turns([USER, ANSWER])),
    ("messages", {"messages": json.dumps([USER, ANSWER])}, Turns([USER, ANSWER])),
    (
        "messages",
        {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
        Turns([{"role": "system", "content": "s"}, USER, ANSWER]),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        Turns([USER, ANSWER]),
    ),
    (
        "messages",
        {"messages": [USER, ANSWER], "tools": [TOOL], "system": "s"},
        Turns([{"role": "system", "content": "s"}, USER, ANSWER], tools=[TOOL]),
    ),
    (
        "messages",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
            ]
        },
        Turns([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    ),
    (
        "conversations",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        Turns([USER, ANSWER]),
    ),
    (
        "conversations",
        {"system": "s", "conversation": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        Turns([{"role": "system", "content": "s"}, USER, ANSWER]),
    ),
    (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        Preference(PromptCompletion("q", "a"), PromptCompletion("q", "b")),
    ),
    (
        "preference",
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        Preference(
            PromptCompletion("\n\nHuman: q\n\nAssistant:", " a"), PromptCompletion("\n\nHuman: q\n\nAssistant:", " b")
        ),
    ),
    (
        "preference",
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        Preference(Turns([USER, ANSWER], 1), Turns([USER, WORSE], 1)),
    ),
    (
        "preference",
        {"prompt": "q", "chosen": [ANSWER], "rejected": [WORSE]},
        Preference(Turns([USER, ANSWER], 1), Turns([USER, WORSE], 1)),
    ),
    ("rated", {"prompt": "q", "completion": "a", "label": True}, Rated(PromptCompletion("q", "a"), True)),
    ("rated", {"prompt": "q", "completion": "a", "label": "false"}, Rated(PromptCompletion("q", "a"), False)),
    ("pairs", {"anchor": "a", "positive": "b"}, Related("a", "b")),
    ("pairs", {"query": "a", "pos": "b", "neg": "c"}, Related("a", "b", "c")),
    ("scored_pairs", {"sentence1": "a", "sentence2": "b", "score": "0.5"}, Related("a", "b", score=0.5)),
    ("scored_pairs", {"sentence1": "a", "sentence2": "b", "label": 0.5}, Related("a", "b", score=0.5)),
    ("pair_label", {"premise": "a", "hypothesis": "b", "label": 1}, Labelled("a", "1", "b")),
    ("tokens_tags", {"tokens": ["a", "b"], "ner_tags": ["O", "PER"]}, Tagged(["a", "b"], ["O", "PER"])),
    ("image_label", {"image": {"path": "a.png", "bytes": None}, "label": "cat"}, Media("image", "a.png", "cat")),
    ("audio_label", {"audio": b"RIFF", "label": 3}, Media("audio", b"RIFF", "3")),
    ("translation", {"translation": {"de": "eins", "en": "one"}}, PromptCompletion("eins", "one")),
    ("source_target", {"source": "a", "target": "b"}, PromptCompletion("a", "b")),
    ("source_target", {"document": "long", "summary": "short"}, PromptCompletion("long", "short")),
    (
        "instruction",
        {"instruction": "i", "context": "c", "response": "r", "category": "x"},
        PromptCompletion("i\n\nc", "r"),
    ),
    ("question_answer", {"question": "q", "answer": "a"}, PromptCompletion("q", "a")),
    (
        "question_answer",
        {"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
        PromptCompletion("c\n\nq", "a"),
    ),
    ("prompt_completion", {"query": "q", "response": "a"}, PromptCompletion("q", "a")),
    ("prompt_completion", {"input": "q", "output": "a"}, PromptCompletion("q", "a")),
    ("text_label", {"sentence": "t", "sentiment": "good"}, Labelled("t", "good")),
    ("text_label", {"text": "t", "labels": 2}, Labelled("t", "2")),
    ("text_labels", {"text": "t", "labels": ["a", "b"]}, MultiLabelled("t", ["a", "b"])),
    ("text_score", {"text": "t", "score": 0.5}, Measured("t", 0.5)),
    ("text_score", {"review": "t", "label": 3.5}, Measured("t", 3.5)),
    ("text_domain", {"text": "t", "domain": "shop"}, Sited("t", "shop")),
    ("text", {"content": "t"}, Text("t")),
]
TOLD = [
    ("extractive", {"question": "q", "context": "so it is red", "answers": {"text": ["red"], "answer_start": [9]}}, Located("q", "so it is red", ["red"], 9)),
    ("extractive", {"question": "q", "context": "so it is red", "answer": "red"}, Located("q", "so it is red", ["red"], 9)),
    ("extractive", {"question": "q", "context": "c", "answers": {"text": [], "answer_start": []}}, Located("q", "c", [])),
    ("text_task", {"text": "t", "task": "mood", "label": "good"}, Tasked("t", "mood", "good")),
    ("text_task", {"text": "t", "task": "stars", "label": 2.5}, Tasked("t", "stars", 2.5)),
    ("text_domain", {"text": "t", "domain": "shop", "label": "good"}, Sited("t", "shop", "good")),
    ("text_score", {"text": "t", "label": 3}, Measured("t", 3.0)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "content"), ROWS)
def test_a_row_of_each_format_is_recognised_and_normalised(name, row, content):
    found = recognise([Row(row, "line 1")], OPTIONS)
    assert found is not None
    assert found.name == name
    assert normalise([Row(row, "line 1")], OPTIONS, "rows.jsonl") == [content]
    for column in found.columns.values():
        assert column in found.why


@pytest.mark.parametrize(
    ("name", "row", "content"), [case for case in ROWS if isinstance(case[2], Turns | PromptCompletion | Text)]
)
def test_of_each_format_the_answers_are_trained(tokenizer, name, row, content):
    (example,) = encode(Renderer(tokenizer, chat_template=True, max_length=512), [content])
    trained = tokenizer.decode(example.trunk.tokens[example.trunk.weights > 0].tolist())
    match content:
        case Turns():
            assert trained.count("<|im_end|>") == len(list(content.trained()))
            assert trained.startswith(content.messages[next(content.trained())]["content"])
        case PromptCompletion():
            assert trained == f"{content.completion}<|im_end|>"
        case Text():
            assert trained == content.text[1:] + "<|im_end|>"  # nothing comes before the first token


def test_every_format_has_a_row_here():
    assert {name for name, *_ in [*ROWS, *TOLD]} | {"oasst"} == set(plugins.names("format"))


@pytest.mark.parametrize(("name", "row", "content"), TOLD)
def test_a_format_is_taken_where_its_objective_is_named(name, row, content):
    found = recognise([Row(row, "line 1")], OPTIONS, [name])
    assert found is not None and found.format.content(row) == content


def test_an_answer_that_does_not_stand_in_the_text_is_a_fault():
    row = {"question": "q", "context": "so it is red", "answers": {"text": ["blue"], "answer_start": [9]}}
    with pytest.raises(BadRow, match="does not stand in the text"):
        recognise([Row(row, "line 1")], OPTIONS, ["extractive"]).format.content(row)


@pytest.mark.parametrize(("row", "says"), [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]}, "a part of kind `image_url`, and only text is learned"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "a `weight` that is neither 0 nor 1"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "arguments are not JSON"),
    ({"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "system": "y"}, "are both system messages"),
    ({"messages": [USER, ANSWER], "tools": "run()"}, "column `tools` must be a list of functions"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "both answers are the same"),
    ({"prompt": "q", "chosen": "a", "rejected": [WORSE]}, "one answer is a text, the other is not"),
    ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
    ({"chosen": [USER, ANSWER], "rejected": [ANSWER, USER]}, "to different prompts"),
    ({"prompt": "q", "chosen": "a", "rejected": None}, "one answer is a text"),
    ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words have 1 tags"),
    ({"question": "q", "answers": {"text": [], "answer_start": []}}, "column `answers` holds no answer"),
    ({"translation": {"de": "eins"}}, "a text in each of two languages"),
    ({"image": None, "label": "cat"}, "column `image` holds no image"),
    ({"query": "q", "response": ""}, "column `response` is empty"),  # by the file's own name for it
])  # fmt: skip
def test_a_partial_or_conflicting_row_says_why(row, says):
    with pytest.raises(DataError) as caught:
        normalise([Row(row, "line 7")], OPTIONS, "rows.jsonl")
    assert f"line 7: {says}" in str(caught.value) or says in str(caught.value).split("line 7: ")[1]


def test_a_mapped_column_means_nothing_else():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    options = DataOptions(train="rows.jsonl", columns={"completion": "chosen"})
    assert normalise([Row(row, "line 1")], options, "rows.jsonl") == [PromptCompletion("q", "a")]


TREE = [
    # id, parent, who, text: a prompt with two answers, one of which is answered in turn
    ("1", None, "prompter", "q"), ("2", "1", "assistant", "a"), ("3", "1", "assistant", "b"),
    ("4", "2", "prompter", "and?"), ("5", "4", "assistant", "c"), ("6", "4", "assistant", "d"), ("7", "3", "prompter", "open"),
    ("8", None, "prompter", "alone"),
]  # fmt: skip


def oasst_rows(nodes=TREE):
    return [{"message_id": i, "parent_id": p, "role": r, "text": t} for i, p, r, t in nodes]


def test_a_tree_of_messages_becomes_chats_that_train_each_answer_once(train, write):
    rows = [Row(values, f"line {number}") for number, values in enumerate(oasst_rows(), start=1)]
    found = recognise(rows, OPTIONS)
    assert found.name == "oasst"
    chats = [found.format.content(row.values) for row in found.format.assemble(iter(rows))]
    said = [
        ([m["content"] for m in chat.messages], [chat.messages[i]["content"] for i in chat.trained()]) for chat in chats
    ]
    assert said == [(["q", "a", "and?", "c"], ["a", "c"]), (["q", "a", "and?", "d"], ["d"]), (["q", "b"], ["b"])]
    with pytest.raises(DataError, match="the message `2` is there twice"):
        list(found.format.assemble(iter([*rows, rows[1]])))


def test_chats_of_a_tree_are_never_split(train, write):
    nodes = [(f"{tree}-{i}", p and f"{tree}-{p}", r, f"{tree} {t}") for tree in range(12) for i, p, r, t in TREE]
    path = write("trees.jsonl", "".join(json.dumps(row) + "\n" for row in oasst_rows(nodes)))
    plan = train(data={"train": str(path), "held_out": 0.25}, max_steps=1).summary().plan
    assert plan["format"] == "oasst"
    assert plan["train_rows"] + plan["held_out_rows"] == 36
    assert plan["held_out_rows"] % 3 == 0
    assert plan["held_out_rows"] == 9


@pytest.mark.parametrize(("row", "says"), [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, r"recognised as `preference` \(columns chosen, rejected, prompt\).*`dpo`, which is not installed.*completion: chosen"),
    ({"prompt": "q", "completion": "a", "label": True}, "recognised as `rated`.*`kto`"),
])  # fmt: skip
def test_rows_that_nothing_learns_from_say_what_would(train, write, row, says):
    path = write("rows.jsonl", (json.dumps(row) + "\n") * 40)
    with pytest.raises(RunFailed, match=f"(?s){says}"):
        train(data=str(path)).raise_for_state()
    if "chosen" in row:
        data = {"train": str(path), "columns": {"prompt": "prompt", "completion": "chosen"}}
        assert train(data=data, max_steps=1).status == "finished"  # the line it offers helps


def test_an_objective_says_what_it_learns_from(train, write):
    path = write("rows.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 40)
    with pytest.raises(RunFailed, match=r"recognised as `preference`.*this objective learns from: messages,"):
        train(data=str(path), objective="sft").raise_for_state()


def test_pairs_of_texts_are_classified(train, write):
    rows = [
        {"premise": f"it is {i}", "hypothesis": f"it is {i + i % 2}", "label": "no" if i % 2 else "yes"}
        for i in range(40)
    ]
    path = write("pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    plan = train(data=str(path), max_steps=1).summary().plan
    assert plan["format"] == "pair_label"
    assert plan["objective"]["classes"] == ["no", "yes"]
    text = "".join(piece for piece, _ in plan["lens"][0]["spans"])
    assert text.count("it is") == 2


# --- bad rows skipped ------------------------------------------------------------------------------------------------


def test_bad_rows_are_skipped_and_listed(train, write):
    good = [json.dumps({"prompt": f"p {i}", "completion": f"c {i}"}) for i in range(40)]
    lines = [
        *good[:5],
        "{oops",
        json.dumps({"prompt": "p"}),
        *good[5:],
        "[1]",
        json.dumps({"prompt": "p " * 400, "completion": "c"}),
    ]
    path = write("rows.jsonl", "\n".join(lines))
    with pytest.raises(RunFailed, match="4 bad rows"):
        train(data=str(path), max_length=64).raise_for_state()
    run = train(data={"train": str(path), "on_bad_rows": "skip"}, max_length=64, max_steps=2)
    plan = run.summary().plan
    assert plan["train_rows"] + plan["held_out_rows"] == 40
    skipped = plan["skipped"]["rows.jsonl"]
    assert skipped["count"] == 4
    assert [(row["place"], row["problem"].split(":")[0][:23]) for row in skipped["rows"]] == [
        ("line 6, column 2", "not JSON (Expecting pro"), ("line 43", "must be an object with "), ("line 7", "column `completion` is "),
        ("line 44", "no trained token is lef"),
    ]  # fmt: skip
    assert "skipped: 4 bad rows of rows.jsonl (line 6, column 2: not JSON" in run.card()["text/plain"]


def test_too_many_bad_rows_are_no_slip(train, write):
    path = write("rows.jsonl", '{"prompt": "p"}\n' * 30 + '{"prompt": "p", "completion": "c"}\n' * 10)
    with pytest.raises(RunFailed, match="30 bad rows, too many to skip"):
        train(data={"train": str(path), "on_bad_rows": "skip"}).raise_for_state()


# --- kinds of files and parts of them --------------------------------------------------------------------------------


def test_texts_are_read_by_lines_or_by_paragraphs(write):
    assert [(r.values["text"], r.place) for r in read_rows(write("a.txt", "one\ntwo\r\n\n"))] == [
        ("one", "line 1"),
        ("two", "line 2"),
    ]
    paragraphs = write("b.txt", "\ufeffone\nmore\n\n \ntwo\n")
    assert [(r.values["text"], r.place) for r in read_rows(paragraphs)] == [("one\nmore", "line 1"), ("two", "line 5")]
    with pytest.raises(DataError, match="line 2: holds a null byte"):
        list(read_rows(write("c.txt", "one\nt\x00wo\n")))
    with pytest.raises(DataError, match=r"line 2: byte \d+ is not UTF-8.*looks like"):
        list(read_rows(write("d.txt", "one\nnaïve café, déjà vu\n".encode("latin-1"))))


@pytest.mark.parametrize("is_stream", [True, False])
def test_arrow_files_and_streams_give_their_rows(tmp_path, is_stream):
    import pyarrow as pa

    table = pa.table({"text": [f"row {i}" for i in range(5000)]})
    path = tmp_path / "a.arrow"
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table)
    rows = list(read_rows(path))
    assert len(rows) == 5000
    assert rows[4999] == Row({"text": "row 4999"}, "row 5000")
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"a\.arrow is not an Arrow file"):
        list(read_rows(path))


def test_what_datasets_keeps_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "kept")
    (arrow,) = (tmp_path / "kept").glob("*.arrow")
    assert [row.values for row in read_rows(arrow)] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"kept is a folder.*Name a file in it: data-00000-of-00001\.arrow, "):
        list(read_rows(tmp_path / "kept"))


def test_packed_text_files_are_read(tmp_path):
    import gzip

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\n'))
    assert [row.values["text"] for row in read_rows(tmp_path / "a.jsonl.gz")] == ["a", "b"]
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"text,label\na,b\n"))
    assert [row.values for row in read_rows(tmp_path / "b.csv.gz")] == [{"text": "a", "label": "b"}]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-9])
    with pytest.raises(DataError, match=r"c\.jsonl\.gz is damaged"):
        list(read_rows(tmp_path / "c.jsonl.gz"))


@pytest.mark.parametrize(("reference", "bare", "part"), [
    ("rows.jsonl", "rows.jsonl", None),
    ("rows.jsonl[:80%]", "rows.jsonl", Slice(0, 80, True)),
    ("$df[10:20]", "$df", Slice(10, 20)),
    ("a/b.csv[90%:]", "a/b.csv", Slice(90, None, True)),
    ("org/name:train[:80%]", "org/name:train[:80%]", None),  # the hub's own
])  # fmt: skip
def test_a_reference_may_name_a_part(reference, bare, part):
    assert parse(reference) == (bare, part)


@pytest.mark.parametrize("reference", ["a.csv[80%]", "a.csv[:80%:2]", "a.csv[10:20%]", "a.csv[x:]"])
def test_brackets_that_are_no_slice_are_told(reference):
    with pytest.raises(DataError, match=r"names no rows of a\.csv.*\[:80%\]"):
        parse(reference)


def test_parts_are_disjoint_and_whole(write, tmp_path):
    path = write("rows.jsonl", "".join(f'{{"text": "{i}"}}\n' for i in range(33)))
    first, second = (list(read(f"{path}{part}", tmp_path)) for part in ("[:80%]", "[80%:]"))
    assert [row.values["text"] for row in [*first, *second]] == [str(i) for i in range(33)]
    assert len(first) == 26
    assert [row.place for row in read(f"{path}[10:12]", tmp_path)] == ["line 11", "line 12"]
    with pytest.raises(DataError, match=r"has no rows"):
        list(read(f"{path}[50:]", tmp_path))


def test_a_part_is_trained_on(train, write):
    path = write("rows.jsonl", "".join(f'{{"text": "row {i}"}}\n' for i in range(40)))
    plan = train(data={"train": f"{path}[:50%]", "held_out": f"{path}[50%:]"}, max_steps=1).summary().plan
    assert (plan["train_rows"], plan["held_out_rows"]) == (20, 20)


def test_datasets_objects_become_files(tmp_path):
    import datasets

    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=names)
    both = datasets.DatasetDict({"train": rows, "validation": rows.select(range(1)), "unsupervised": rows})
    keys, objects = take_out({"model": "m", "data": both})
    assert keys["data"] == {"train": "$train", "held_out": "$held_out"}
    objects["stream"] = rows.to_iterable_dataset()
    write_tables(tmp_path, serialise(objects))
    for name, labels in (("train", ["yes", "no"]), ("held_out", ["yes"]), ("stream", ["yes", "no"])):
        assert [row.values["label"] for row in read(f"${name}", tmp_path)] == labels


def test_tables_of_a_mixture_are_taken_out():
    data = {
        "train": [{"text": "a"}],
        "mix": [{"data": [{"text": "b"}], "weight": 0.5}, "more.jsonl"],
        "replay": [{"text": "c"}],
    }
    keys, objects = take_out({"model": "m", "data": data})
    assert keys["data"]["mix"] == [{"data": "$mix_1", "weight": 0.5}, {"data": "more.jsonl"}]
    assert objects == {"train": [{"text": "a"}], "mix_1": [{"text": "b"}], "replay": [{"text": "c"}]}


def test_texts_of_a_row_are_seen_and_changed():
    for _, row, content in ROWS:
        found = recognise([Row(row, "line 1")], OPTIONS).format.content(row)
        assert found == content
        shouted = with_texts(content, str.upper)
        assert texts(shouted) == [text.upper() for text in texts(content)]
        assert type(shouted) is type(content)
    assert with_texts(Labelled("a", "good"), str.upper) == Labelled("A", "good")
