"""Rows: read with their places, brought to a form, rendered with a loss mask, split."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, make_tokenizer, normalise

from tune_magic.data.content import PromptCompletion, Text, Turns
from tune_magic.data.locate import data_path, references
from tune_magic.data.normalise import fill, recognise
from tune_magic.data.read import Row, read_rows
from tune_magic.data.render import Renderer, exchanges
from tune_magic.data.split import split
from tune_magic.errors import DataError
from tune_magic.recipe import DataOptions, build_recipe


def known(reason, *values):
    """A fault that the product once had."""
    return pytest.param(*values, id=reason)


# --- read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": "ü"}\n', [({"a": 1}, "line 1"), ({"a": "ü"}, "line 2")]),
        ("a.jsonl", '{"a": 1}\r\n\r\n  \n{"a": 2}', [({"a": 1}, "line 1"), ({"a": 2}, "line 4")]),
        ("a.jsonl", '\ufeff{"a": 1}\n', [({"a": 1}, "line 1")]),
        (
            "a.jsonl",
            '{"a": "x\u2028y"}\n{"a": "\u0085"}\n',
            [({"a": "x\u2028y"}, "line 1"), ({"a": "\u0085"}, "line 2")],
        ),
        ("a.jsonl", "", []),
        ("a.jsonl", "\n\n", []),
        ("a.json", '[{"a": 1}, {"b": [1]}]', [({"a": 1}, "row 1"), ({"b": [1]}, "row 2")]),
        ("a.json", '\ufeff[{"a": 1}]', [({"a": 1}, "row 1")]),
        ("a.json", '{"version": 2, "data": [{"a": 1}]}', [({"a": 1}, "row 1")]),
        ("a.json", "[]", []),
    ],
)
def test_rows_come_with_their_places(write, name, content, rows):
    assert list(read_rows(write(name, content))) == [Row(values, place) for values, place in rows]


def test_parquet_gives_the_rows_that_went_in(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    table = pa.Table.from_pylist([{"messages": turns, "n": 1}, {"messages": turns[1:], "n": None}])
    pq.write_table(table, tmp_path / "a.parquet")
    assert (
        list(read_rows(tmp_path / "a.parquet"))
        == [
            Row({"messages": turns, "n": 1}, "row 1"),  # `name` is not given to the turn that had none
            Row({"messages": turns[1:], "n": None}, "row 2"),
        ]
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        # truncated and broken JSON: line, column and the text there
        ("a.jsonl", '{"a": 1}\n{"a": "cut', ["a.jsonl: 1 bad row.", "line 2, column 7: not JSON", '`{"a": "cut`']),
        ("a.jsonl", '{"a": 1}\n{"a": \n', ["line 2, column 7", '`{"a":`']),
        ("a.jsonl", '{"a": 1} x\n', ["line 1, column 10", "not JSON (Extra data)", '`{"a": 1} x`']),
        ("a.jsonl", "{'a': 1}", ["line 1, column 2", "`{'a': 1}`"]),
        ("a.jsonl", '{"a": "' + "x" * 500 + '" oops', ["line 1, column 510", 'xxx" oops`']),
        ("a.jsonl", '{"a": 1}\n\x00\x00\n', ["line 2, column 1"]),
        ("a.jsonl", '{"a": 1' + "0" * 5000 + "}", ["line 1: ", "digits"]),
        ("a.json", '[{"a": 1},\n {"b": }]', ["a.json, line 2, column 8: not JSON", "Then call the file .jsonl."]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', ["a.json, line 2, column 1", "One object per line? Then call the file .jsonl."]),
        ("a.json", "", ["a.json, line 1, column 1"]),
        # another encoding: the byte
        ("a.jsonl", '{"a": "ok"}\n{"a": "café"}\n'.encode("latin-1"), ["line 2: byte 11 is not UTF-8", r"\xe9"]),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), ["line 1: byte 1 is not UTF-8", r"\xff\xfe"]),
        ("a.json", '[{"a": "é"}]'.encode("latin-1"), ["a.json, line 1: byte 9 is not UTF-8"]),
        # rows that are no objects
        ("a.jsonl", '{"a": 1}\n[1, 2]\n"x"\n', ["2 bad rows", "line 2: must be an object with named columns: `[1, 2]`", 'line 3', '`"x"`']),
        ("a.json", '[1, {"a": 1}, "x"]', ["2 bad rows", "row 1: must be an object", "row 3: must be an object with named columns: `x`"]),
        ("a.json", '{"a": 1}', ["a.json must be a list of objects.", '[{"prompt": "...", ...}, ...]']),
        ("a.json", '{"train": [], "test": []}', ["a.json must be a list of objects."]),
        # files that are none
        ("a.xlsx", "a,b", ["a.xlsx is not a kind of file that can be read.", ".jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow, .feather"]),
        ("a", "{}", ["a is not a kind of file that can be read."]),
        ("a.parquet", "nope", ["a.parquet is not a Parquet file"]),
        ("a.parquet", "", ["a.parquet is not a Parquet file"]),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_where_and_what(write, name, content, says):
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    for part in says:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 700


def test_the_first_bad_rows_are_shown_and_the_rest_counted(write):
    path = write("a.jsonl", "".join('{"a": 1}\n' if i % 2 else f"bad {i}\n" for i in range(40)))
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    lines = str(caught.value).splitlines()
    assert lines[0] == "a.jsonl: 20 bad rows."
    assert [line.split(",")[0].strip() for line in lines[1:6]] == ["line 1", "line 3", "line 5", "line 7", "line 9"]
    assert lines[6].strip().startswith("and 15 more.")


def test_a_path_without_a_file_says_where_it_looked(tmp_path):
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / "gone.jsonl"))
    assert str(caught.value) == f"There is no file {tmp_path / 'gone.jsonl'}. The working directory is {Path.cwd()}."
    with pytest.raises(
        DataError,
        match=r"is a folder. Name a file in it: \.jsonl, \.json, \.csv, \.tsv, \.txt, \.parquet, \.arrow, \.feather\.",
    ):
        list(read_rows(tmp_path))


def test_a_disk_that_fails_is_told_as_such(write, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    path = write("a.jsonl", "{}")
    monkeypatch.setattr(type(path), "open", fail)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: Input/output error\."):
        list(read_rows(path))


def test_a_table_given_as_an_object_is_found_in_the_run(tmp_path):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "df.parquet").touch()
    assert data_path("$df", tmp_path) == tmp_path / "inputs" / "df.parquet"
    with pytest.raises(DataError, match=r"no table `\$other`"):
        data_path("$other", tmp_path)
    recipe = build_recipe({"model": "m", "data": {"train": "$df", "held_out": 0.2}})
    assert references(recipe) == {"train": "$df"}
    recipe = build_recipe({"model": "m", "data": {"train": "a.jsonl", "held_out": "b.jsonl", "test": "c.jsonl"}})
    assert references(recipe) == {"train": "a.jsonl", "held_out": "b.jsonl"}


# --- formats ---------------------------------------------------------------------------------------------------------


def normal(*values, **options):
    rows = [Row(value, f"line {i}") for i, value in enumerate(values, start=1)]
    return normalise(rows, DataOptions.model_validate({"train": "rows.jsonl", **options}), "rows.jsonl")


def chat(*turns):
    """Messages from texts that begin with their role's first letter."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[text[0]], "content": text[1:]} for text in turns]


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"messages": chat("ua", "ab")}, {}, Turns(chat("ua", "ab"))),
        ({"prompt": "p", "completion": "c"}, {}, PromptCompletion("p", "c")),
        ({"prompt": "p", "completion": "c", "system": "s", "id": 3}, {}, PromptCompletion("p", "c", "s")),
        ({"prompt": "p", "completion": "c", "system": ""}, {}, PromptCompletion("p", "c")),
        ({"prompt": chat("up"), "completion": chat("ac")}, {}, Turns(chat("up", "ac"), 1)),
        ({"instruction": "i", "output": "o"}, {}, PromptCompletion("i", "o")),
        ({"instruction": "i", "input": "x", "output": "o"}, {}, PromptCompletion("i\n\nx", "o")),
        ({"instruction": "i", "input": " ", "output": "o"}, {}, PromptCompletion("i", "o")),
        ({"instruction": "i", "input": None, "output": "o", "system": "s"}, {}, PromptCompletion("i", "o", "s")),
        ({"text": "t"}, {}, Text("t")),
        # the most specific columns win, unless the format is named
        ({"text": "t", "prompt": "p", "completion": "c"}, {}, PromptCompletion("p", "c")),
        ({"text": "t", "prompt": "p", "completion": "c"}, {"format": "text"}, Text("t")),
        ({"messages": chat("ua", "ab"), "prompt": "p", "completion": "c"}, {}, Turns(chat("ua", "ab"))),
        # your columns
        ({"q": "p", "r": "c"}, {"columns": {"prompt": "q", "completion": "r"}}, PromptCompletion("p", "c")),
        ({"prompt": "p", "answer": "c"}, {"columns": {"completion": "answer"}}, PromptCompletion("p", "c")),
        ({"text": "old", "body": "t"}, {"columns": {"text": "body"}}, Text("t")),
        ({"conversation": chat("ua", "ab")}, {"columns": {"messages": "conversation"}}, Turns(chat("ua", "ab"))),
        # templates
        ({"q": "p", "n": 3}, {"template": "Q {q}\nA {n}"}, Text("Q p\nA 3")),
        ({"q": "{n}", "n": 3}, {"template": "{q} {{n}}"}, Text("{n} {n}")),
        (
            {"q": "p", "n": 3},
            {"template": {"system": "S", "prompt": "{q}?", "completion": "{n}"}},
            PromptCompletion("p?", "3", "S"),
        ),
    ],
)
def test_a_row_is_brought_to_its_form(row, options, expected):
    assert normal(row, **options) == [expected]


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        ({"messages": chat("ua")}, {}, "no assistant turn, so nothing to learn"),
        ({"messages": chat("ua", "a ")}, {}, "no assistant turn, so nothing to learn"),
        ({"messages": []}, {}, "column `messages` must be a list of messages: `[]`"),
        ({"messages": "hello"}, {}, "column `messages` must be a list of messages: `hello`"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, {}, "message 1 has no known role (system, user, assistant, tool)"),
        ({"messages": [*chat("ua"), {"role": "assistant"}]}, {}, "message 2 must have `role` and a text `content`"),
        ({"messages": [{"role": "assistant", "content": ["x"]}]}, {}, "message 1 must have `role` and a text `content`"),
        ({"messages": ["x"]}, {}, "message 1 must have `role` and a text `content`: `x`"),
        ({"prompt": "p", "completion": None}, {}, "column `completion` is missing: `{'prompt': 'p', 'completion': None}`"),
        ({"prompt": "p", "completion": 3}, {}, "column `completion` must be text, got int: `3`"),
        ({"prompt": "p", "completion": " "}, {}, "column `completion` is empty"),
        ({"prompt": "", "completion": "c"}, {}, "column `prompt` is empty"),
        ({"prompt": chat("up"), "completion": "c"}, {}, "column `prompt` must be text, got list"),
        ({"prompt": chat("up"), "completion": chat("uc")}, {}, "no assistant turn, so nothing to learn"),
        ({"prompt": "p", "completion": "c", "system": 5}, {}, "column `system` must be text, got int: `5`"),
        ({"instruction": "i", "output": None}, {}, "column `output` is missing"),
        ({"text": ["t"]}, {}, "column `text` must be text, got list: `['t']`"),
        ({"q": "p"}, {"format": "text"}, "column `text` is missing"),
        ({"q": "p"}, {"template": "{q} {gone}"}, "the template's column `gone` is missing; there are q"),
        ({"q": None}, {"template": "{q}"}, "the template's column `q` is missing"),
        # a template reaches whole columns and nothing behind them
        ({"a": "x"}, {"template": "{a.__class__}"}, "the template's column `a.__class__` is missing"),
        ({"a": ["x"]}, {"template": "{a[0]}"}, "the template's column `a[0]` is missing"),
        ({"a": "x"}, {"template": "{0}"}, "the template's column `0` is missing"),
        ({"a": "x"}, {"template": {"prompt": "{a}", "completion": "{a.__init__.__globals__}"}}, "`a.__init__.__globals__` is missing"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_says_why(row, options, says):
    with pytest.raises(DataError) as caught:
        normal(row, **options)
    assert "rows.jsonl: 1 bad row.\n  line 1: " in str(caught.value)
    assert says in str(caught.value)


def test_all_bad_rows_are_counted_with_their_lines():
    good, bad = {"text": "t"}, {"text": 3}
    with pytest.raises(DataError) as caught:
        normal(good, bad, good, *[bad] * 8)
    message = str(caught.value)
    assert message.startswith("rows.jsonl: 9 bad rows.\n  line 2: column `text` must be text, got int: `3`\n  line 4:")
    assert message.endswith("and 4 more.")


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([], {}, "rows.jsonl has no rows."),
        ([{"q": "x", "r": "y"}], {}, "the columns `q`, `r` are no format that is known."),
        ([{"q": "x", "r": "y"}], {}, "Map yours with `columns: {prompt: YOURS, completion: YOURS}`"),
        ([{"q": "x"}], {"columns": {"prompt": "question"}}, "has no column `question`. Its columns: q."),
        ([{"q": "x"}], {"columns": {"prompt": "q"}}, "the columns `q` are no format that is known."),
    ],
)
def test_rows_of_no_format_say_what_there_is(rows, options, says):
    with pytest.raises(DataError) as caught:
        normal(*rows, **options)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (["messages"], "messages"), (["completion", "prompt", "x"], "prompt_completion"),
        (["instruction", "output"], "instruction"), (["text", "x"], "text"), (["prompt"], None), ([], None),
    ],
)  # fmt: skip
def test_a_format_is_known_by_its_columns(columns, found):
    found_now = recognise([Row(dict.fromkeys(columns, "x"), "line 1")], DataOptions(train="a.jsonl"))
    assert (found_now and found_now.name) == found


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ("no places", {}, "no places"),
        ("{a}{b}{a}", {"a": "1", "b": "2"}, "121"),
        ("{{a}}", {"a": "1"}, "{a}"),
        ("{a}", {"a": "{b}", "b": "no"}, "{b}"),
        ("{a}", {"a": 0}, "0"),
        ("{my column}", {"my column": "x"}, "x"),
    ],
)
def test_fill_puts_values_into_their_places(template, values, expected):
    assert fill(template, values) == expected


# --- the loss mask ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_tokenizer():
    """One without a chat template."""
    plain = make_tokenizer()
    plain.chat_template = None
    return plain


def render(tokenizer, content, *, chat_template=True, max_length=512):
    renderer = Renderer(tokenizer, chat_template=chat_template, max_length=max_length)
    (example,) = encode(renderer, [content])
    return example


def seen(tokenizer, example):
    return tokenizer.decode(example.trunk.tokens.tolist())


def spans(tokenizer, example):
    """The trained text, one string for each run of tokens with a weight."""
    trained = np.flatnonzero(example.trunk.weights > 0)
    runs = np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)
    return [tokenizer.decode(example.trunk.tokens[run].tolist()) for run in runs]


def turn(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>"


TEMPLATED = [
    # content, what the model sees, what it learns, what it is asked when it answers
    (
        Turns(chat("uhi", "ayo")),
        f"{turn('user', 'hi')}\n{turn('assistant', 'yo')}",
        ["yo<|im_end|>"],
        f"{turn('user', 'hi')}\n<|im_start|>assistant\n",
    ),
    (
        Turns(chat("sbe", "uhi", "ayo", "uand", "aso")),
        f"{turn('system', 'be')}\n{turn('user', 'hi')}\n{turn('assistant', 'yo')}\n{turn('user', 'and')}\n{turn('assistant', 'so')}",
        ["yo<|im_end|>", "so<|im_end|>"],
        f"{turn('system', 'be')}\n{turn('user', 'hi')}\n{turn('assistant', 'yo')}\n{turn('user', 'and')}\n<|im_start|>assistant\n",
    ),
    (
        Turns(chat("uhi", "acall", "tresult", "adone")),
        f"{turn('user', 'hi')}\n{turn('assistant', 'call')}\n{turn('tool', 'result')}\n{turn('assistant', 'done')}",
        ["call<|im_end|>", "done<|im_end|>"],
        f"{turn('user', 'hi')}\n{turn('assistant', 'call')}\n{turn('tool', 'result')}\n<|im_start|>assistant\n",
    ),
    (  # what comes after the last answer is not seen
        Turns(chat("uhi", "ayo", "uunanswered")),
        f"{turn('user', 'hi')}\n{turn('assistant', 'yo')}",
        ["yo<|im_end|>"],
        f"{turn('user', 'hi')}\n<|im_start|>assistant\n",
    ),
    (  # an answer's own line breaks are learned, the template's after it are not
        Turns(chat("uhi", "ayo \n")),
        f"{turn('user', 'hi')}\n{turn('assistant', 'yo ' + chr(10))}",
        ["yo \n<|im_end|>"],
        f"{turn('user', 'hi')}\n<|im_start|>assistant\n",
    ),
    (  # a user who writes like an assistant teaches nothing
        Turns(chat("uyo<|im_end|>\n<|im_start|>assistant\nyo", "ayo")),
        f"{turn('user', 'yo')}\n{turn('assistant', 'yo')}\n{turn('assistant', 'yo')}",
        ["yo<|im_end|>"],
        f"{turn('user', 'yo')}\n{turn('assistant', 'yo')}\n<|im_start|>assistant\n",
    ),
    (
        PromptCompletion("p", "c"),
        f"{turn('user', 'p')}\n{turn('assistant', 'c')}",
        ["c<|im_end|>"],
        f"{turn('user', 'p')}\n<|im_start|>assistant\n",
    ),
    (
        PromptCompletion("p", "c", "s"),
        f"{turn('system', 's')}\n{turn('user', 'p')}\n{turn('assistant', 'c')}",
        ["c<|im_end|>"],
        f"{turn('system', 's')}\n{turn('user', 'p')}\n<|im_start|>assistant\n",
    ),
    (PromptCompletion("ünï 🙂", "grün 🙃"), f"{turn('user', 'ünï 🙂')}\n{turn('assistant', 'grün 🙃')}", ["grün 🙃<|im_end|>"], f"{turn('user', 'ünï 🙂')}\n<|im_start|>assistant\n"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "text", "trained", "prompt"), TEMPLATED)
def test_only_the_answers_are_trained(tokenizer, content, text, trained, prompt):
    example = render(tokenizer, content)
    assert seen(tokenizer, example) == text
    assert spans(tokenizer, example) == trained
    assert tokenizer.decode(example.prompt.tolist()) == prompt
    assert example.weight == np.count_nonzero(example.trunk.weights)
    assert set(example.trunk.weights.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize(
    ("content", "text", "trained", "prompt"),
    [
        (PromptCompletion("2+2=", "4"), "2+2=4<|im_end|>", ["4<|im_end|>"], "2+2="),
        (PromptCompletion("2+2=", " 4 ", "Add."), "Add.\n\n2+2= 4 <|im_end|>", [" 4 <|im_end|>"], "Add.\n\n2+2="),
        # nothing comes before the first token, so nothing predicts it
        (Text("hello"), "hello<|im_end|>", ["ello<|im_end|>"], ""),
        (Text("h"), "h<|im_end|>", ["<|im_end|>"], ""),
    ],
)
def test_plain_rows_end_where_the_text_ends(tokenizer, plain_tokenizer, has_template, content, text, trained, prompt):
    chosen = tokenizer if has_template else plain_tokenizer
    example = render(chosen, content, chat_template=not has_template)  # either way no turns are put around it
    assert seen(chosen, example) == text
    assert spans(chosen, example) == trained
    assert chosen.decode(example.prompt.tolist()) == prompt


@pytest.mark.parametrize("content", [content for content, *_ in TEMPLATED])
def test_training_and_answering_see_the_same_tokens(tokenizer, content):
    example = render(tokenizer, content)
    renderer = Renderer(tokenizer, chat_template=True, max_length=512)
    if isinstance(content, PromptCompletion):
        messages = [
            *([{"role": "system", "content": content.system}] if content.system else []),
            *chat("u" + content.prompt),
        ]
    else:
        last = max(i for i, message in enumerate(content.messages) if message["role"] == "assistant")
        messages = content.messages[:last]
    assert renderer.prompt_tokens(messages) == example.prompt.tolist()


@pytest.mark.parametrize(
    ("content", "asked", "answer"),
    [
        (Turns(chat("sx", "uone", "atwo", "uthree", "afour", "ufive")), "three", "four"),
        (Turns(chat("sx", "atwo")), None, "two"),
        (PromptCompletion("p", "c", "s"), "p", "c"),
        (Text("t"), None, None),
    ],
)
def test_people_read_the_last_question_and_answer(content, asked, answer):
    assert exchanges(content)[-1] == (asked, answer)


def test_a_long_answer_is_cut_at_its_end(tokenizer):
    whole = render(tokenizer, PromptCompletion("p", "c" * 100))
    cut = render(tokenizer, PromptCompletion("p", "c" * 100), max_length=50)
    assert len(cut) == 50
    assert cut.num_cut == len(whole) - 50
    assert whole.num_cut == 0
    assert cut.trunk.tokens.tolist() == whole.trunk.tokens[:50].tolist()
    (learned,) = spans(tokenizer, cut)
    assert set(learned) == {"c"}


def test_rows_that_lose_all_they_teach_are_an_error(tokenizer):
    renderer = Renderer(tokenizer, chat_template=True, max_length=50)
    fits, long = PromptCompletion("p", "c"), PromptCompletion("p" * 60, "c")
    with pytest.raises(DataError) as caught:
        encode(renderer, [fits, long, fits, long])
    message = str(caught.value)
    assert "rows.jsonl: 2 bad rows.\n  row 2: no trained token is left within max_length (50)\n  row 4:" in message
    assert message.endswith("Raise `max_length`, or shorten the prompts.")


@pytest.mark.parametrize(
    ("template", "content", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", Turns(chat("uhi", "ayo")), "refuses it (roles must alternate)"),
        ("{{ oops", Turns(chat("uhi", "ayo")), "refuses it"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", Turns(chat("ux", "ay", "uz", "aw")), "changes what stands before an answer"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_followed_says_so(template, content, says):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError) as caught:
        render(tokenizer, content)
    assert "row 1: the chat template" in str(caught.value)
    assert says in str(caught.value)


def test_chats_need_a_chat_template(plain_tokenizer):
    with pytest.raises(DataError, match="Use an instruct model, or rows with prompt and completion"):
        render(plain_tokenizer, Turns(chat("uhi", "ayo")))


def test_examples_keep_the_order_and_number_of_their_rows(tokenizer):
    renderer = Renderer(tokenizer, chat_template=True, max_length=512)
    examples = encode(renderer, [PromptCompletion(f"p{i}", f"c{i}") for i in range(5)])
    assert [(e.index, e.question, e.reference) for e in examples] == [(i, f"p{i}", f"c{i}") for i in range(5)]
    assert all(e.trunk.tokens.dtype == np.int32 and e.trunk.weights.dtype == np.float32 for e in examples)


# --- the split -------------------------------------------------------------------------------------------------------


def drawn(*given, **options):
    train, kept = split(*given, **options)
    return train.tolist(), kept.tolist()


@pytest.mark.parametrize(
    ("num_rows", "share", "held_out"),
    [
        # 10 %, at least 16, at most 500, never more than a third
        (0, None, 0), (1, None, 0), (2, None, 0), (3, None, 1), (10, None, 3), (47, None, 15), (48, None, 16),
        (100, None, 16), (160, None, 16), (200, None, 20), (5000, None, 500), (100_000, None, 500),
        # a share is a share, of which a row is left on each side
        (10, 0.0, 0), (10, 0.1, 1), (100, 0.25, 25), (3, 0.001, 1), (10, 0.99, 9), (2, 0.5, 1), (1, 0.5, 0), (0, 0.0, 0),
    ],
)  # fmt: skip
def test_as_many_rows_are_held_out_as_promised(num_rows, share, held_out):
    train, kept = drawn(num_rows, share, seed=42)
    assert len(kept) == held_out
    assert sorted(train + kept) == list(range(num_rows))
    assert train == sorted(train)
    assert kept == sorted(kept)


def test_the_split_follows_from_the_seed_alone():
    assert drawn(100, 0.2, 1) == drawn(100, 0.2, 1)
    assert drawn(100, 0.2, 1) != drawn(100, 0.2, 2)
    assert drawn(12, 0.25, 42) == ([0, 1, 2, 3, 4, 6, 7, 9, 11], [5, 8, 10])  # a later version must draw the same
    np.random.seed(0)
    first = drawn(100, 0.2, 1)
    np.random.seed(1)
    assert drawn(100, 0.2, 1) == first


# --- hard cases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        known("JSON nested too deep is a RecursionError", "a.jsonl", "[" * 100_000, "line 1"),
        known("a .json nested too deep is a RecursionError", "a.json", "[" * 100_000, "a.json"),
        known("a .json error shows no text", "a.json", '[{"a": oops}]', "oops"),
        known("a .json in another encoding names no line", "a.json", b'[\n{"a": "\xe9"}]', "line 2"),
        known("half a character reaches the tokenizer", "a.jsonl", '{"text": "a\\ud800"}', "line 1"),
        known("a key that is there twice keeps the last", "a.jsonl", '{"text": "a", "text": "b"}', "line 1"),
    ],
)
def test_hard_files_are_refused_with_their_place(write, name, content, says):
    with pytest.raises(DataError) as caught:
        list(read_rows(write(name, content)))
    assert says in str(caught.value)


def test_text_where_a_path_belongs(tmp_path):
    with pytest.raises(DataError):
        list(read_rows(tmp_path / ("x" * 300 + ".jsonl")))


@pytest.mark.parametrize(
    ("row", "options"),
    [
        known("a template with an open brace: ValueError", {"a": "x"}, {"template": "{a"}),
        known("a template with a closing brace: ValueError", {"a": "x"}, {"template": "a}"}),
        known("a template may leave the answer empty", {"a": "x", "b": ""}, {"template": {"prompt": "{a}", "completion": "{b}"}}),
        known("a template may leave the text empty", {"a": ""}, {"template": "{a}"}),
        known("a format in a template is dropped silently", {"a": "x"}, {"template": "{a!r:>10}"}),
        known("a standard name that is none is dropped", {"q": "x", "text": "t"}, {"columns": {"promt": "q"}}),
        known("columns beside a template are dropped", {"q": "x"}, {"columns": {"prompt": "q"}, "template": "{q}"}),
    ],
)  # fmt: skip
def test_forms_that_would_lose_something_are_refused(row, options):
    with pytest.raises((DataError, ValueError)):
        normal(row, **options)


def test_a_column_may_come_late():
    assert len(normal(*[{"text": "t"}] * 100, {"text": "t", "about": "s"}, columns={"system": "about"})) == 101


@pytest.mark.parametrize(
    ("content", "options", "trained"),
    [
        known("plain text of an instruct model has no end", Text("hello"), {}, ["ello<|im_end|>"]),
        known("a chat with chat_template off ends twice", Turns(chat("uhi", "ayo")), {"chat_template": False}, ["yo<|im_end|>"]),
        known("one character of text is called too long", Text("h"), {}, ["<|im_end|>"]),
    ],
)  # fmt: skip
def test_every_kind_of_text_ends_once(tokenizer, content, options, trained):
    assert spans(tokenizer, render(tokenizer, content, **options)) == trained


def test_examples_in_a_prompt_are_not_trained(tokenizer):
    (content,) = normal({"prompt": chat("uone", "ashot", "utwo"), "completion": chat("aanswer")})
    assert spans(tokenizer, render(tokenizer, content)) == ["answer<|im_end|>"]


def test_a_chat_cut_before_its_last_answer_is_asked_the_one_before(tokenizer):
    example = render(tokenizer, Turns(chat("uhi", "ayo", "u" + "q" * 90, "alast")), max_length=100)
    assert seen(tokenizer, example).startswith(turn("user", "hi"))
    assert tokenizer.decode(example.prompt.tolist()).endswith("<|im_start|>assistant\n")


def test_a_row_is_named_as_the_reader_names_it(tokenizer, write):
    rows = list(read_rows(write("a.jsonl", "\n\n" + json.dumps({"prompt": "p" * 60, "completion": "c"}))))
    contents = normalise(rows, DataOptions(train="a.jsonl"), "a.jsonl")
    renderer = Renderer(tokenizer, chat_template=True, max_length=50)
    with pytest.raises(DataError, match="line 3"):
        encode(renderer, contents, "a.jsonl", [row.place for row in rows])


def test_the_advice_fits_the_fault():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError) as caught:
        render(tokenizer, Turns(chat("uhi", "ayo")))
    assert "max_length" not in str(caught.value)
