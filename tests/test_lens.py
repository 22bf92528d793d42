"""The label lens: every token a row has, with what is learned of it and what was cut; and the refusal of no labels."""

import json

import pytest
from conftest import make_tokenizer
from test_view import Page

from tune_magic.data import lens
from tune_magic.data.content import Labelled, PromptCompletion, Text, Turns
from tune_magic.data.read import RowFaults
from tune_magic.data.render import Part, Renderer
from tune_magic.view.html import clean
from tune_magic.view.lens import lens as shown
from tune_magic.view.lens import lens_lines


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def look(tokenizer, content, max_length=1000):
    renderer = Renderer(tokenizer, chat_template=True, max_length=max_length)
    if isinstance(content, Labelled):
        example = renderer.classified([content], [0], [0])[0]
    else:
        example = renderer.examples(Part([content], ["row 1"], [0], RowFaults("x")))[0]
    return lens.lens(example, content, renderer)


CHAT_ROW = Turns([
    {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"},
])  # fmt: skip


def test_a_chat_shows_each_answer_as_trained(tokenizer):
    row = look(tokenizer, CHAT_ROW)
    assert [text for text, trained in row["spans"] if trained] == ["yes<|im_end|>", "no<|im_end|>"]
    whole = tokenizer.apply_chat_template(CHAT_ROW.messages, tokenize=False)
    assert "".join(text for text, _ in row["spans"]) == whole.rstrip()
    assert (row["trained"], row["cut"], row["cut_text"]) == (7, 0, "")


@pytest.mark.parametrize("content", [CHAT_ROW, PromptCompletion("ask", "answer " * 30), Text("word " * 40)])
def test_kept_and_cut_are_the_whole_row(tokenizer, content):
    whole, short = look(tokenizer, content), look(tokenizer, content, 60)
    assert short["tokens"] == 60
    assert short["tokens"] + short["cut"] == whole["tokens"]
    text = "".join(piece for piece, _ in whole["spans"])
    assert "".join(piece for piece, _ in short["spans"]) + short["cut_text"] == text


def test_a_class_is_named_and_a_cut_text_struck(tokenizer):
    row = look(tokenizer, Labelled("x" * 100, "<b>spam"), 40)
    assert (row["label"], row["tokens"], row["cut"]) == ("<b>spam", 40, 60)
    assert row["cut_text"] == "x" * 60
    html = shown([row])
    assert "line-through" in html
    assert "&lt;b&gt;spam</span>" in html  # the class is what is learned


def test_a_long_prompt_shows_both_its_ends(tokenizer):
    row = look(tokenizer, PromptCompletion("start" + "." * 900 + "finish", "done"))
    prompt, answer = row["spans"]
    assert "start" in prompt[0]
    assert "finish" in prompt[0]
    assert "[…]" in prompt[0]
    assert len(prompt[0]) < 400
    assert answer == ["done<|im_end|>", True]


def test_a_row_that_was_cut_is_among_those_shown(tokenizer):
    renderer = Renderer(tokenizer, chat_template=True, max_length=60)
    contents = [PromptCompletion("a", "b")] * 9 + [PromptCompletion("a", "long " * 30)] + [PromptCompletion("a", "b")]
    examples = renderer.examples(Part(contents, ["row"] * 11, range(11), RowFaults("x")))
    assert [example.index for example in lens.rows_to_show(examples)] == [0, 1, 9]
    assert [example.index for example in lens.rows_to_show(examples[:9])] == [0, 1, 2]


def test_the_same_as_text_and_nothing_in_it_runs(tokenizer):
    row = look(tokenizer, PromptCompletion("<script>alert(1)</script>\x1b[31m", "ok " * 50), 80)
    page = Page(shown([row]))
    assert "<script>alert(1)" in page.text
    assert "<script" not in shown([row])
    line = lens_lines([row])[1]
    assert "«ok" in line
    assert "~~" in line
    assert "\x1b" not in clean(line)
    assert f"({80} tokens, {row['trained']} trained ({100 * row['trained'] / 80:.0f} %), {row['cut']} cut off)" in line


LONG = [{"prompt": "p" * 400, "completion": "y"} for _ in range(40)]
SHORT = [{"prompt": "p" * 100, "completion": "yes"} for _ in range(40)]
FIRST_OF_ANSWER = 100 + len("<user\n") + len(">\n<assistant\n") + 1  # tokens, a mark being one


@pytest.mark.parametrize(("rows", "changes", "says"), [
    (LONG, {"min_trained_share": 0.01}, r"learned: 80 of 16840 tokens are trained \(0\.48 %, 2\.0 a row\)"),
    (SHORT, {}, r"learned: 40 of 4800 tokens are trained \(0\.83 %, 1\.0 a row\)"),
])  # fmt: skip
def test_rows_that_teach_nothing_are_refused(train, write, rows, changes, says):
    from tune_magic.errors import RunFailed

    data = write("thin.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    run = train(data={"train": str(data)} | changes, max_length=512 if rows is LONG else FIRST_OF_ANSWER)
    with pytest.raises(RunFailed, match=says) as error:
        run.raise_for_state()
    assert "min_trained_share: 0" in error.value.hint
    assert ("40 of 40 rows are cut at max_length" in error.value.hint) == (rows is SHORT)
    assert not run.summary().steps


def test_who_insists_trains_all_the_same(train, write):
    data = write("thin.jsonl", "".join(json.dumps(row) + "\n" for row in SHORT))
    run = train(data={"train": str(data), "min_trained_share": 0}, max_length=FIRST_OF_ANSWER, max_steps=1)
    assert run.status == "finished"
