"""The line of a command, its help, and completion: tables of what is typed and what comes of it."""

import re
from types import SimpleNamespace

import pandas as pd
import pytest

from tune_magic import plugins
from tune_magic.commands import COMMANDS, QUANTIZATIONS, VERBS, BadUsage, HelpWanted, Parsed, nearest, parse, split
from tune_magic.handles import Run
from tune_magic.magics import complete as completion
from tune_magic.magics.complete import complete
from tune_magic.models.find import installed
from tune_magic.recipe.build import keys
from tune_magic.recipe.combination import WAYS
from tune_magic.storage import folder


def known(reason, *values):
    """A hard case, named by what once went wrong."""
    return pytest.param(*values, id=reason)


# --- parse -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line", "positional", "flags", "given"),
    [
        ("finetune", "", None, {}, {}),
        ("finetune", "bot", "bot", {}, {}),
        ("finetune", "  bot  ", "bot", {}, {}),
        ("finetune", "bot --fresh", "bot", {"fresh": True}, {}),
        ("finetune", "--fresh bot", "bot", {"fresh": True}, {}),
        ("finetune", "bot --dry-run --background", "bot", {"dry_run": True, "background": True}, {}),
        ("finetune", "bot --executor inline", "bot", {"executor": "inline"}, {}),
        ("finetune", "bot --executor=inline", "bot", {"executor": "inline"}, {}),
        ("finetune", "bot lr=1e-3 method.r=8", "bot", {}, {"lr": "1e-3", "method.r": "8"}),
        ("finetune", "lr=1e-3 bot --fresh", "bot", {"fresh": True}, {"lr": "1e-3"}),
        ("finetune", "recipe.yaml", "recipe.yaml", {}, {}),
        ("finetune", "data=$rows model=a/b", None, {}, {"data": "$rows", "model": "a/b"}),
        ("finetune", "a=b=c", None, {}, {"a": "b=c"}),
        ("finetune", "bot # and why", "bot", {}, {}),
        # quotes are taken off, as a shell does
        ("finetune", "'my recipe.yaml'", "my recipe.yaml", {}, {}),
        ("finetune", 'bot --output "a b"', "bot", {"output": "a b"}, {}),
        ("finetune", "bot --output='a b'", "bot", {"output": "a b"}, {}),
        ("finetune", "bot data='a b.jsonl'", "bot", {}, {"data": "a b.jsonl"}),
        ("finetune", "bot 'data=a b.jsonl'", "bot", {}, {"data": "a b.jsonl"}),
        ("finetune", "bot data=''", "bot", {}, {"data": ""}),
        ("finetune", ["bot", "--output", "a b", "data=it's"], "bot", {"output": "a b"}, {"data": "it's"}),
        ("evaluate", "bot --limit 5 --metrics loss,rouge_l", "bot", {"limit": 5, "metrics": "loss,rouge_l"}, {}),
        ("evaluate", "--max-new-tokens=7", None, {"max_new_tokens": 7}, {}),
        ("evaluate", "bot --by kind,length", "bot", {"by": "kind,length"}, {}),
        ("export", "bot --to merged", "bot", {"to": "merged"}, {}),
        ("tune exports", "bot", "bot", {}, {}),
        ("export", "bot --to of_a_plugin", "bot", {"to": "of_a_plugin"}, {}),
        ("tune runs", "--all", None, {"all": True}, {}),
        ("tune show", "", None, {}, {}),
        ("tune chat", "bot", "bot", {}, {}),
        ("tune resume", "bot --background", "bot", {"background": True}, {}),
    ],
)
def test_a_line_is_understood(name, line, positional, flags, given):
    assert parse(COMMANDS[name], line) == Parsed(positional, flags, given)


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        # unknown, with the nearest
        ("finetune", "--bakground", "There is no option --bakground. Did you mean --background?"),
        ("finetune", "--dry_run", "Did you mean --dry-run?"),
        ("evaluate", "--max_new_tokens 5", "Did you mean --max-new-tokens?"),
        ("export", "--too merged", "Did you mean --to?"),
        ("finetune", "--executor inlin", "must be worker or inline, got 'inlin'. Did you mean inline?"),
        ("finetune", "--zzz", "There is no option --zzz. Usage: %finetune"),
        ("finetune", "--", "There is no option --."),
        # no abbreviations, long or short
        ("finetune", "--fres", "There is no option --fres. Did you mean --fresh?"),
        ("finetune", "--exec inline", "There is no option --exec. Did you mean --executor?"),
        ("finetune", "-b", "There is no option -b. Options are written in full: --background, --fresh,"),
        ("tune show", "-x", "There is no option -x. Options are written in full: none."),
        # twice
        ("finetune", "--fresh --fresh", "--fresh is there twice."),
        ("finetune", "--executor inline --executor=worker", "--executor is there twice."),
        ("finetune", "lr=1 lr=2", "lr is there twice."),
        # values
        ("finetune", "--executor", "--executor needs a value: --executor WHERE."),
        ("finetune", "--executor=", "--executor needs a value"),
        ("finetune", "--fresh=yes", "--fresh takes no value."),
        ("evaluate", "--limit many", "--limit must be a whole number, got 'many'."),
        ("evaluate", "--limit 5.5", "--limit must be a whole number, got '5.5'."),
        # too much
        ("finetune", "bot other", "What is `other`? Usage: %finetune [NAME_OR_FILE]"),
        ("tune runs", "bot", "What is `bot`? Usage: %tune runs [--all]"),
        ("tune merge", "both", "RUN=WEIGHT ... is missing. Usage: %tune merge NAME RUN=WEIGHT ... [--how WAY]"),
        ("tune merge", "both a=1 --how tie", "Did you mean ties?"),
        ("tune show", "bot lr=1", "What is `lr=1`?"),
        ("finetune", "bot 'unclosed", "The line cannot be read: No closing quotation."),
    ],
)
def test_a_line_that_cannot_be_understood_says_why(name, line, says):
    with pytest.raises(BadUsage) as caught:
        parse(COMMANDS[name], line)
    assert says in str(caught.value)


def test_usage_is_shown_as_it_was_typed():
    with pytest.raises(BadUsage, match="Usage: tune-magic tune show"):
        parse(COMMANDS["tune show"], "a b", prefix="tune-magic ")
    with pytest.raises(HelpWanted, match=r"^%%finetune"):
        parse(COMMANDS["finetune"], "-h", prefix="%%")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("line", ["-h", "--help", "--help --zzz"])
def test_help_tells_every_flag_in_plain_text(name, line):
    command = COMMANDS[name]
    with pytest.raises(HelpWanted) as caught:
        parse(command, line)
    text = str(caught.value)
    assert text.startswith(f"%{name}")
    assert command.help in text
    for flag in command.flags:
        assert re.search(rf"^  --{flag.name}\b.*{re.escape(flag.help)}", text, re.MULTILINE)
        assert all(choice in text for choice in flag.choices)
    assert ("key=value" in text) == command.takes_keys
    assert all(line.isprintable() for line in text.splitlines())
    assert max(map(len, text.splitlines()[1:])) < 120


def test_no_flag_is_the_beginning_of_a_mistake():
    """Every flag can be written and is told apart from the others."""
    for command in COMMANDS.values():
        for flag in command.flags:
            value = {int: "3", float: "0.5"}.get(flag.kind, flag.choices[0] if flag.choices else "x")
            words = ["x"] * command.needed + ["y"] * (command.more is not None)
            words += [f"--{flag.name}"] + ([value] if flag.value else [])
            assert set(parse(command, words).flags) == {flag.key}


@pytest.mark.parametrize("value", ["x", "-1", "nan", "inf", "1e999"])
def test_a_share_is_a_number_of_at_least_0(value):
    with pytest.raises(BadUsage, match=rf"--tolerance must be a number of at least 0, got '{value}'"):
        parse(COMMANDS["export"], ["--tolerance", value])


def test_the_ways_told_in_help_are_the_ones_there_are():
    (how,) = (flag for flag in COMMANDS["tune merge"].flags if flag.name == "how")
    assert how.choices == tuple(WAYS)
    assert parse(COMMANDS["tune merge"], "both a=0.7 b=-0.3").rest == ["a=0.7", "b=-0.3"]


def test_the_formats_told_in_help_are_the_ones_installed():
    (to,) = (flag for flag in COMMANDS["export"].flags if flag.name == "to")
    assert list(to.choices) == plugins.names("exporter")
    assert {name: tuple(plugins.get("exporter", name).quantizations) for name in to.choices} == QUANTIZATIONS


def test_runs_that_are_exported_together_follow_the_first():
    parsed = parse(COMMANDS["export"], "a b c --to onnx_adapters")
    assert (parsed.positional, parsed.rest) == ("a", ["b", "c"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a 'b c' d", ["a", "b c", "d"]),
        ('"a"', ["a"]),
        ("a # b", ["a"]),
        ("", []),
        (r"a\ b", ["a b"]),
        ("ü=1", ["ü=1"]),
    ],
)
def test_split_takes_quotes_and_comments_off(line, words):
    assert split(line) == words


@pytest.mark.parametrize(
    ("word", "says"), [("shwo", " Did you mean show?"), ("stopp", " Did you mean stop?"), ("zzzz", "")]
)
def test_the_nearest_verb_is_offered(word, says):
    assert nearest(word, VERBS) == says


# --- complete --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A shell with one run in a variable and another on disk."""
    monkeypatch.chdir(tmp_path)
    stored = folder.create(tmp_path / "tune_runs", "finetune", {"name": "stored_bot"})
    bound = Run(folder.create(tmp_path / "elsewhere", "finetune", {"name": "bound_bot"}))
    assert stored.is_dir()
    (tmp_path / "rows.csv").write_text("question,answer\n1,2\n")
    table = pd.DataFrame({"q": [1], "a": [2]})
    return SimpleNamespace(user_ns={"bot": bound, "_hidden": bound, "number": 3, "table": table})


SCHEDULES = [
    "linear",
    "cosine",
    "constant",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
]
OBJECTIVES = [
    "classify", "classify_audio", "classify_image", "distill", "distill_classes", "domain_adversarial", "embed", "extractive_qa", "lm", "multi_label",
    "multi_task", "regression", "seq2seq", "sft", "tag",
]  # fmt: skip
METHODS = [
    "bottleneck",
    "freeze",
    "full",
    "ia3",
    "ln_tuning",
    "lora",
    "oft",
    "p_tuning",
    "prefix",
    "prompt",
    "unfreeze",
    "vera",
]
CELL = "%%finetune bot\n"
FLAGS = [
    "--background",
    "--fresh",
    "--now",
    "--budget",
    "--dry-run",
    "--find-lr",
    "--executor",
    "--traceback",
    "--output",
    "--show-code",
]


@pytest.mark.parametrize(
    ("before", "fragment", "found"),
    [
        # verbs, runs, flags and their values
        (
            "%tune ",
            "",
            [
                "runs",
                "data",
                "explain",
                "methods",
                "exports",
                "show",
                "watch",
                "stop",
                "resume",
                "chat",
                "rate",
                "serve",
                "merge",
                "compare",
                "rm",
                "rename",
                "note",
                "export-code",
                "register",
                "models",
                "stage",
                "push",
                "model-card",
                "gpu",
                "doctor",
                "pause",
                "checkpoint",
            ],
        ),
        ("%tune s", "s", ["show", "stop", "serve", "stage"]),
        ("  %tune  w", "w", ["watch"]),
        ("import os\n%tune s", "s", ["show", "stop", "serve", "stage"]),
        ("%tune show ", "", ["bot", "stored_bot"]),
        ("%tune stop sto", "sto", ["stored_bot"]),
        ("%evaluate ", "", ["bot", "stored_bot"]),
        ("%export b", "b", ["bot"]),
        ("%tune runs ", "", []),
        ("%tune rate ", "", ["bot", "stored_bot"]),
        ("%tune rate bot --against ", "", ["bot", "stored_bot", "base", "few-shot", "retrieval"]),
        ("%tune rate bot --against f", "f", ["few-shot"]),
        ("%tune r", "r", ["runs", "resume", "rate", "rm", "rename", "register"]),
        ("%tune chat bot ", "", ["bot", "stored_bot"]),
        ("%tune merge ", "", []),
        ("%tune merge both ", "", ["bot=", "stored_bot="]),
        ("%tune merge both bot=0.5 s", "s", ["stored_bot="]),
        ("%tune merge both bot=0.5 --how ti", "ti", ["ties", "ties_svd"]),
        ("%tune runs --", "--", ["--all", "--here", "--limit"]),
        ("%tune zzz ", "", []),
        ("%export bot --t", "--t", ["--to", "--tolerance"]),
        ("%export bot --to ", "", plugins.names("exporter")),
        ("%export bot --to m", "m", ["merged"]),
        ("%export bot --to merged --quantize ", "", ["fp16", "bf16"]),
        ("%export bot --quantize in", "in", ["int8", "int4"]),
        ("%export bot other --dev", "--dev", ["--device"]),
        ("%tune ex", "ex", ["explain", "exports", "export-code"]),
        ("%evaluate bot --limit ", "", []),
        (CELL[:-1] + " --", "--", FLAGS),
        ("%%finetune bot --f", "--f", ["--fresh", "--find-lr"]),
        ("%%finetune bot --fresh --", "--", [flag for flag in FLAGS if flag != "--fresh"]),
        ("%%finetune bot --executor=inline --", "--", [flag for flag in FLAGS if flag != "--executor"]),
        ("%%finetune bot --executor ", "", ["worker", "inline"]),
        ("%%finetune bot --executor i", "i", ["inline"]),
        # keys of the recipe on the line
        ("%%finetune bot lea", "lea", ["learning_rate="]),
        ("%%finetune bot --dry-run warm", "warm", ["warmup_ratio=", "warmup_steps="]),
        ("%%finetune bot eval.s", "eval.s", ["eval.steps=", "eval.samples="]),
        # keys and values in the body
        (CELL + "warm", "warm", ["warmup_ratio: ", "warmup_steps: "]),
        (CELL + "model: x\nlr", "lr", ["lr_scheduler_kwargs: ", "lr_scheduler_type: "]),
        (CELL + "lr_scheduler_type: ", "", SCHEDULES),
        (CELL + "lr_scheduler_type: co", "co", ["cosine", "constant", "cosine_with_restarts"]),
        (CELL + "dtype: ", "", ["auto", "float32", "bfloat16"]),
        (CELL + "share_prefixes: t", "t", ["true"]),
        (CELL + "method: ", "", METHODS),
        (CELL + "objective: ", "", OBJECTIVES),
        (CELL + "model: ", "", installed()),
        (CELL + "max_steps: ", "", []),
        (CELL + "no_such_key: ", "", []),
        (CELL + "method:\n  r", "r", ["r: "]),
        (CELL + "method:\n  lora_", "lora_", ["lora_alpha: ", "lora_dropout: "]),
        (CELL + "method:\n  name: ", "", METHODS),
        (CELL + "method:\n  name: lora\n  use_rslora: ", "", ["true", "false"]),
        (CELL + "eval:\n  steps: 3\n\n  s", "s", ["samples: ", "steps: "]),
        (CELL + "data: ro", "ro", ["rows.csv"]),
        (CELL + "data:\n  train: $", "$", ["$table"]),
        (CELL + "data:\n  train: rows.csv\n  columns:\n    prompt: ", "", ["question", "answer"]),
        (CELL + "data:\n  train: $table\n  columns:\n    prompt: q", "q", ["q"]),
        (CELL + "data:\n  train: rows.csv\n  columns:\n    pro", "pro", ["prompt: "]),
        (CELL + "data:\n  train: rows.csv  # mine\n  template: 'Q: {qu", "qu", ["question}"]),
        (CELL + "data:\n  train: gone.csv\n  columns:\n    prompt: ", "", []),
        (CELL + "data:\n  columns:\n    prompt: ", "", []),
        ("%tune data r", "r", ["rows.csv"]),
        ("%tune data rows.csv data.columns.prompt=a", "data.columns.prompt=a", ["data.columns.prompt=answer"]),
        ("%tune data rows.csv max_l", "max_l", ["max_length="]),
        (CELL + "data:\n  format: ", "", plugins.names("format")),
        (CELL + "eval:\n  steps: 3\nse", "se", ["seed: "]),
        # nothing of ours
        ("", "", []),
        ("x = 1", "", []),
        ("%tun", "", []),
        ("%tuner s", "", []),
        ("%%finetunes b", "", []),
        ("x = '%tune s", "", []),
        ("%finetune recipe.yaml\nlea", "", []),
    ],
)
def test_what_is_offered_before_the_cursor(shell, before, fragment, found):
    assert complete(shell, before) == (fragment, found) if found else complete(shell, before)[1] == []


def test_a_body_offers_every_key_there_is(shell):
    tops = {key.partition(".")[0] for key, _, _ in keys()}
    assert {name.removesuffix(": ") for name in complete(shell, CELL)[1]} == tops
    assert {name.removesuffix("=") for name in complete(shell, "%%finetune bot ")[1]} == {key for key, _, _ in keys()}
    for part in ("method", "eval", "data"):
        below = {key.partition(".")[2] for key, _, _ in keys() if key.startswith(f"{part}.")}
        assert {name.removesuffix(": ") for name in complete(shell, f"{CELL}{part}:\n  ")[1]} == below


def context(text):
    """What IPython's completer hands over, with the cursor at the end."""
    lines = text.split("\n")
    return SimpleNamespace(full_text=text, cursor_line=len(lines) - 1, cursor_position=len(lines[-1]))


def test_the_matcher_looks_only_at_what_is_before_the_cursor(shell):
    matcher = completion.make_matcher(shell)
    place = SimpleNamespace(full_text=CELL + "dtype: b\nmodel: x", cursor_line=1, cursor_position=8)
    answer = matcher(place)
    assert [c.text for c in answer["completions"]] == ["bfloat16"]
    assert answer["matched_fragment"] == "b"
    assert answer["suppress"] is True
    assert matcher(context("x = 1")) == {"completions": []}


def test_a_matcher_that_fails_stays_quiet(shell, monkeypatch, capsys):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(completion, "_run_names", fail)
    assert completion.make_matcher(shell)(context("%tune show ")) == {"completions": []}
    assert capsys.readouterr() == ("", "")


# --- found while writing these, not mended yet -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        known("a # inside a word cuts it", "finetune", "data=rows#1.jsonl", Parsed(keys={"data": "rows#1.jsonl"})),
    ],
)
def test_a_hash_inside_a_word_is_no_comment(name, line, expected):
    assert parse(COMMANDS[name], line) == expected


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        known("a flag is taken for the value of another", "finetune", "--output --fresh", "--output needs a value"),
        known("an empty value is taken", "finetune", "--output=", "--output needs a value"),
        known("the flag that begins so is not the one offered", "finetune", "--back", "Did you mean --background?"),
        known("a negative limit drops rows from the end", "evaluate", "--limit -3", "must be at least 1"),
        known("a limit of no rows divides by zero later", "evaluate", "--limit 0", "must be at least 1"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(name, line, says):
    with pytest.raises(BadUsage) as caught:
        parse(COMMANDS[name], line)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("before", "found"),
    [
        known("values of a key on the line", "%%finetune bot dtype=b", ["dtype=bfloat16"]),
        known("values of a flag after =", "%%finetune bot --executor=i", ["--executor=inline"]),
        known("a key is offered again", "%%finetune bot seed=1 see", []),
        known("keys of a template", CELL + "data:\n  template:\n    p", ["prompt: "]),
    ],
)
def test_values_and_nested_keys_are_completed(shell, before, found):
    assert complete(shell, before)[1] == found
