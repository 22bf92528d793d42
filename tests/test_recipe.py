"""Recipes: what people write, what it means, and every fault at once with its line and a way out."""

import json
import re
import sys
import types
from typing import get_args

import jsonschema
import pytest

from tune_magic.commands import LAUNCH_FLAGS
from tune_magic.errors import RecipeError
from tune_magic.recipe import LaunchOptions, build_recipe, load_recipe, recipe_schema, yaml
from tune_magic.recipe.build import ALIASES, METHOD_ALIASES, build_launch, keys
from tune_magic.recipe.twin import twin_code

HEAD = "model: tiny\ndata: rows.jsonl\n"  # lines 2 and 3 of a cell; the case starts on line 4
BASE = {"model": "tiny", "data": "rows.jsonl"}
CELL = 2


def faults(text, overrides=None):
    with pytest.raises(RecipeError) as caught:
        load_recipe(text, overrides, first_line=CELL)
    return caught.value.faults


def read(text, overrides=None):
    return load_recipe(HEAD + text, overrides, first_line=CELL)


def at(recipe, dotted):
    value = recipe.normalised()
    for name in dotted.split("."):
        value = value[name]
    return value


# --- what may be written ---------------------------------------------------------------------------------------------

EQUAL = [
    # what people type, a dotted key of the recipe, its value
    ("lr: 1e-3", "learning_rate", 1e-3),
    ("learning_rate: 1e-3", "learning_rate", 1e-3),
    ("epochs: 2", "num_train_epochs", 2.0),
    ("num_epochs: 2", "num_train_epochs", 2.0),
    ("scheduler: cosine", "lr_scheduler_type", "cosine"),
    ("lr_scheduler: cosine", "lr_scheduler_type", "cosine"),
    ("lr_scheduler: constant_with_warmup", "lr_scheduler_type", "constant"),
    ("lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_type", "cosine"),
    ("warmup: 0.1", "warmup_ratio", 0.1),
    ("max_seq_length: 64", "max_length", 64),
    ("cutoff_len: 64", "max_length", 64),
    ("gradient_clipping: 0", "max_grad_norm", 0.0),
    ("eval_steps: 5", "eval.steps", 5),
    ("eval: {steps: 5}", "eval.steps", 5),
    ("early_stopping_patience: 2", "eval.early_stopping_patience", 2),
    ("eval_steps: 5\neval: {samples: 0}", "eval.steps", 5),
    ("eval: {samples: 0}\neval_steps: 5", "eval.samples", 0),
    ("precision: bfloat16", "dtype", "bfloat16"),
    ("dtype: bf16", "dtype", "bfloat16"),
    ("torch_dtype: fp32", "dtype", "float32"),
    ("bf16: true", "dtype", "bfloat16"),
    ("bf16: false", "dtype", "auto"),
    ("", "method.name", "lora"),
    ("method: lora", "method.r", 16),
    ("method: full", "method.name", "full"),
    ("method: {r: 4}", "method.name", "lora"),
    ("method: {type: full}", "method.name", "full"),
    ("method: {rank: 4}", "method.r", 4),
    ("method: {alpha: 8}", "method.lora_alpha", 8.0),
    ("method: {dropout: 0.1}", "method.lora_dropout", 0.1),
    ("method:\n  target_modules: [q_proj, v_proj]", "method.target_modules", ["q_proj", "v_proj"]),
    ("batch_size: 6", "batch_size", 6),
    ("per_device_train_batch_size: 4\ngradient_accumulation_steps: 3", "batch_size", 12),
    ("per_device_train_batch_size: 4", "batch_size", 4),
    ("gradient_accumulation_steps: 3", "batch_size", 3),
    ("share_prefixes: no", "share_prefixes", False),
    ("lr: 1e-3 # a comment", "learning_rate", 1e-3),
]


@pytest.mark.parametrize(("text", "key", "value"), EQUAL)
def test_what_people_type_means_the_key(text, key, value):
    assert at(read(text), key) == value


@pytest.mark.parametrize(
    ("alias", "target"), [*ALIASES.items(), *((f"method.{a}", f"method.{t}") for a, t in METHOD_ALIASES.items())]
)
def test_every_alias_points_at_a_key_that_exists(alias, target):
    known = {key for key, _, _ in keys()}
    assert target in known
    assert alias not in known


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("rows.jsonl", {"train": "rows.jsonl"}),
        ("$df", {"train": "$df"}),
        ("{train: a.json, held_out: 10%}", {"train": "a.json", "held_out": 0.1}),
        ("{train: a.json, held_out: ' 12.5 %'}", {"train": "a.json", "held_out": 0.125}),
        ("{train: a.json, held_out: 0.2}", {"train": "a.json", "held_out": 0.2}),
        ("{train: a.json, held_out: 0}", {"train": "a.json", "held_out": 0.0}),
        ("{train: a.json, held_out: other.jsonl}", {"train": "a.json", "held_out": "other.jsonl"}),
        ("{train: a, columns: {prompt: q}}", {"train": "a", "columns": {"prompt": "q"}}),
        ("{train: a, template: 'Q: {q}'}", {"train": "a", "template": "Q: {q}"}),
        (
            "{train: a, template: {prompt: '{q}', completion: '{a}'}}",
            {"train": "a", "template": {"prompt": "{q}", "completion": "{a}"}},
        ),
    ],
)
def test_data_has_a_short_and_a_long_form(data, expected):
    recipe = load_recipe(f"model: tiny\ndata: {data}")
    assert recipe.given()["data"] == expected


# --- YAML 1.2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-1.5e-3", -1.5e-3), (".5", 0.5), ("1", 1), ("0x10", 16), ("0o17", 15), ("017", 17),
        ("true", True), ("FALSE", False), ("no", "no"), ("yes", "yes"), ("on", "on"), ("Off", "Off"), ("y", "y"),
        ("12:30", "12:30"), ("null", None), ("~", None), ("", None), ("'1e-4'", "1e-4"), ('"no"', "no"),
        ("10%", "10%"), ("$df", "$df"), ("[1, a, {b: 2}]", [1, "a", {"b": 2}]), ("ünï", "ünï"),
    ],
)  # fmt: skip
def test_a_value_is_what_yaml_1_2_says(written, value):
    found = yaml.read(f"key: {written}")[0]["key"]
    assert found == value
    assert type(found) is type(value)


def test_keys_know_their_lines_in_the_cell():
    content, lines = yaml.read(
        "# about\nmodel: a\n\nmethod:\n  r: 4\n  list: [1, 2]\ndata: {train: b}\r\n", first_line=2
    )
    assert content == {"model": "a", "method": {"r": 4, "list": [1, 2]}, "data": {"train": "b"}}
    assert lines == {"model": 3, "method": 5, "method.r": 6, "method.list": 7, "data": 8, "data.train": 8}


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "---\n"])
def test_nothing_written_is_an_empty_recipe(text):
    assert yaml.read(text) == ({}, {})
    assert {fault.key for fault in faults(text)} == {"model", "data"}


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("lr: 1\nlr: 2", 5, "`lr`: is there twice. Keep one of the two."),
        ("eval:\n  steps: 1\n  steps: 1", 6, "`eval.steps`: is there twice"),
        ("model: other", 4, "`model`: is there twice"),
        ("prompt: Q: {q}", 4, "needs quotes"),
        ("path: @x", 4, "needs quotes"),
        ("eval:\n\tsteps: 1", 5, "indent with spaces"),
        ("x: [1, 2", 4, "is not YAML"),
    ],
)
def test_text_that_is_not_yaml_names_its_line(text, line, says):
    (fault,) = faults(HEAD + text)
    assert fault.line == line
    assert says in str(fault)


@pytest.mark.parametrize("text", ["just words", "- a\n- b", "42"])
def test_text_without_keys_shows_how_to_write_one(text):
    (fault,) = faults(text)
    assert fault.line == CELL
    assert "key: value" in fault.problem


def test_a_tag_runs_nothing():
    assert [fault.key for fault in faults(HEAD + "x: !!python/object/apply:os.system [exit 1]")] == ["x"]


@pytest.mark.parametrize(
    "content",
    [
        {"a": 1e-4, "b": "1e-4", "c": "no", "d": False, "e": None, "f": "12:30", "g": "$df", "h": 1e-8, "i": 10**20},
        {"t": "Q: {q}\nA: {a}\n", "u": "  spaces  ", "v": "# no comment", "w": "{", "x": "ü \U0001f600", "y": ""},
        {"nested": {"z": 1, "a": [1, {"b": ["c", []]}], "empty": {}}},
        build_recipe(BASE).normalised(),
    ],
)
def test_json_is_yaml_and_is_read_as_it_stands(content):
    assert yaml.read(json.dumps(content, ensure_ascii=False))[0] == content


# --- faults ----------------------------------------------------------------------------------------------------------

FAULTS = [
    # the fourth line of a cell, the key, what is said, what to do
    ("learning_rate: 0", "learning_rate", "must be greater than 0, got 0.", "Try `learning_rate: 2e-4`."),
    ("lr: 11", "learning_rate", "must be at most 10, got 11.", "Try `learning_rate: 2e-4`."),
    ("lr: fast", "learning_rate", "must be a number, got 'fast'.", "Try `learning_rate: 2e-4`."),
    ("lr: .nan", "learning_rate", "got nan.", "Try `learning_rate: 2e-4`."),
    ("weight_decay: .nan", "weight_decay", "must be finite, got nan.", None),
    ("epochs: 0", "num_train_epochs", "must be greater than 0, got 0.", "Try `num_train_epochs: 3`."),
    ("warmup: 1", "warmup_ratio", "must be less than 1, got 1.", None),
    ("max_length: 12:30", "max_length", "must be a whole number, got '12:30'.", None),
    ("max_steps: 2.5", "max_steps", "must be a whole number, got 2.5.", None),
    ("batch_size: 0", "batch_size", "must be at least 1, got 0.", "Try `batch_size: 8`."),
    ("share_prefixes: maybe", "share_prefixes", "must be true or false, got 'maybe'.", None),
    ("lr_scheduler: cosin", "lr_scheduler_type", "must be 'linear', 'cosine', 'constant', 'cosine_with_restarts', 'polynomial', 'inverse_sqrt', 'warmup_stable_decay' or 'reduce_lr_on_plateau'", "Did you mean `cosine`?"),
    ("dtype: fp16", "dtype", "got 'fp16'.", None),
    ("leraning_rate: 1", "leraning_rate", "there is no such key.", "Did you mean `learning_rate`?"),
    ("learning-rate: 1", "learning-rate", "there is no such key.", "Did you mean `learning_rate`?"),
    ("epoch: 1", "epoch", "there is no such key.", "Did you mean `epochs`?"),
    ("zzz: 1", "zzz", "there is no such key.", "There are: model, data,"),
    ("method: lorra", "method", "There is no method `lorra`.", "Did you mean `lora`? There are: bottleneck, freeze, full, ia3,"),
    ("method: 3", "method", "must be a name or a mapping, got 3.", "Try `method: lora`."),
    ("method: {r: 0}", "method.r", "must be at least 1, got 0.", "Try `r: 8`."),
    ("method: {alpha: 0}", "method.lora_alpha", "must be greater than 0, got 0.", "Try `lora_alpha: 16`."),
    ("clean: [duplicates]", "clean", "there is no such key.", "It belongs under `data:`."),
    ("method: {rnak: 4}", "method.rnak", "there is no such key.", "Did you mean `rank`?"),
    ("method: {name: full, r: 4}", "method.r", "there is no such key.", "There are: name, layer_lr_decay."),
    ("eval: {stepz: 3}", "eval.stepz", "there is no such key.", "Did you mean `steps`?"),
    ("eval: 3", "eval", "must be a mapping, got 3.", None),
    ("eval_steps: 0", "eval.steps", "must be at least 1, got 0.", None),
    ("save_total_limit: 1", "save_total_limit", "must be at least 2, got 1.", None),
    ("per_device_train_batch_size: x", "per_device_train_batch_size", "must be a whole number of at least 1, got 'x'.", "Try `batch_size: 8`."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key", "problem", "suggestion"), FAULTS)
def test_a_fault_names_line_rule_value_and_fix(text, key, problem, suggestion):
    (fault,) = faults(HEAD + text)
    assert (fault.key, fault.line) == (key, 4)
    assert problem in fault.problem
    assert (fault.suggestion or "").startswith(suggestion or "")
    assert (fault.suggestion is None) == (suggestion is None)


@pytest.mark.parametrize(
    ("data", "key", "says"),
    [
        ("{}", "data.train", "is needed. For example `data: rows.jsonl`."),
        ("{train: 5}", "data.train", "must be text, got 5."),
        ("{train: a, held_out: 100%}", "data.held_out", "at least 0 and below 1, got 1."),
        ("{train: a, held_out: 1}", "data.held_out", "at least 0 and below 1, got 1."),
        ("{train: a, held_out: -0.1}", "data.held_out", "at least 0 and below 1, got -0.1."),
        ("{train: a, format: mesages}", "data.format", "Did you mean `messages`?"),
        ("{train: a, columns: {prompt: 5}}", "data.columns.prompt", "must be text, got 5."),
        ("{train: a, tests: b}", "data.tests", "Did you mean `test`?"),
    ],
)
def test_a_fault_in_data_is_placed_in_data(data, key, says):
    (fault,) = faults(f"model: tiny\n\ndata: {data}\n")
    assert (fault.key, fault.line) == (key, 4)
    assert says in str(fault)


def test_all_faults_are_told_at_once():
    text = "learning_rate: -1\nmethod:\n  r: 0\n  colour: red\neval:\n  samples: 9\nbogus: 1\ndata:\n  held_out: 0.5\n"
    found = faults(text)
    assert {(fault.key, fault.line) for fault in found} == {
        ("learning_rate", 2), ("method.r", 4), ("method.colour", 5), ("eval.samples", 7), ("bogus", 8),
        ("data.train", 9), ("model", None),
    }  # fmt: skip
    message = str(RecipeError(found))
    assert message.startswith("7 faults in the recipe:\n")
    assert "line 4, `method.r`: must be at least 1, got 0. Try `r: 8`." in message
    assert message.count("\n") == 7


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("epochs: 1\nnum_train_epochs: 2", 5, "says the same as `epochs`. Keep one of the two."),
        ("epochs: 1\nnum_epochs: 2", 5, "`num_epochs`: says the same as `epochs`."),
        ("dataset: other.jsonl", 4, "`dataset.train`: says the same as `data.train`."),
        (
            "batch_size: 8\nper_device_train_batch_size: 4",
            5,
            "`per_device_train_batch_size`: says the same as `batch_size`.",
        ),
    ],
)
def test_two_keys_that_say_the_same_are_a_fault(text, line, says):
    (fault,) = faults(HEAD + text)
    assert fault.line == line
    assert says in str(fault)


# --- the line wins over the body -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "overrides", "key", "value"),
    [
        ("lr: 1e-3", {"lr": 1e-5}, "learning_rate", 1e-5),
        ("", {"learning_rate": 1e-5}, "learning_rate", 1e-5),
        ("method: {r: 4, lora_alpha: 8}", {"method.r": 2}, "method.r", 2),
        ("method: {r: 4, lora_alpha: 8}", {"method.r": 2}, "method.lora_alpha", 8.0),
        ("method: lora", {"method.r": 2}, "method.r", 2),
        ("", {"method.rank": 2}, "method.r", 2),
        ("method: {r: 4}", {"method": "full"}, "method.name", "full"),
        ("", {"data": "other.jsonl"}, "data.train", "other.jsonl"),
        ("", {"data.held_out": "20%"}, "data.held_out", 0.2),
        ("", {"data.held_out": "20%"}, "data.train", "rows.jsonl"),
        ("eval_steps: 9", {"eval.steps": 3}, "eval.steps", 3),
        ("eval: {steps: 9}", {"eval_steps": 3}, "eval.steps", 3),
        ("eval: {steps: 9, samples: 0}", {"eval_steps": 3}, "eval.samples", 0),
        ("dtype: float32", {"bf16": True}, "dtype", "bfloat16"),
    ],
)
def test_the_line_wins_over_the_body(body, overrides, key, value):
    assert at(read(body, overrides), key) == value


def test_a_fault_on_the_line_has_no_cell_line():
    (fault,) = faults(HEAD, {"sede": 1})
    assert (fault.key, fault.line, fault.suggestion) == ("sede", None, "Did you mean `seed`?")


def test_overrides_leave_what_they_are_given_alone():
    raw, overrides = {**BASE, "method": {"r": 4}}, {"method.r": 2, "data.held_out": "10%"}
    build_recipe(raw, overrides)
    assert raw == {**BASE, "method": {"r": 4}}
    assert overrides == {"method.r": 2, "data.held_out": "10%"}


# --- the same recipe again -------------------------------------------------------------------------------------------

RECIPES = [
    BASE,
    {**BASE, "method": "full", "learning_rate": 1e-5},
    {**BASE, "method": {"name": "lora", "r": 4, "target_modules": ["q_proj"]}},
    {**BASE, "data": {"train": "$df", "held_out": 0.25, "test": "$other"}},
    {**BASE, "data": {"train": "a", "template": "Q: {q}", "chat_template": False}},
    {**BASE, "data": {"train": "a", "template": {"system": "s", "prompt": "{q}", "completion": "'{a}'\n"}}},
    {**BASE, "data": {"train": "a", "columns": {"prompt": "q", "completion": "a"}, "format": "prompt_completion"}},
    {**BASE, "eval": {"steps": 5, "early_stopping_patience": 2}, "max_steps": 7, "dtype": "bfloat16", "seed": 0},
]


@pytest.mark.parametrize("raw", RECIPES)
def test_given_builds_the_same_recipe(raw):
    recipe = build_recipe(raw)
    assert build_recipe(recipe.given()) == recipe
    assert build_recipe(recipe.given()).given() == recipe.given()
    assert build_recipe(recipe.normalised()).normalised() == recipe.normalised()
    assert load_recipe(json.dumps(recipe.given())) == recipe


def test_given_tells_what_was_given_and_no_defaults():
    assert build_recipe({"base_model": "m", "data": "d", "lr": 1e-3}).given() == {
        "model": "m", "data": {"train": "d"}, "method": {"name": "lora"}, "learning_rate": 1e-3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def schema():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("raw", RECIPES)
def test_the_schema_takes_what_build_recipe_takes(schema, raw):
    recipe = build_recipe(raw)
    for form in (raw, recipe.given(), recipe.normalised()):
        schema.validate(form)


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5}, {"learning_rate": 0}, {"learning_rate": "fast"}, {"zzz": 1}, {"method": "lorra"}, {"method": {"r": 0}},
        {"method": {"name": "full", "r": 4}}, {"data": {}}, {"data": {"train": "a", "format": "x"}}, {"eval": {"samples": 9}},
        {"dtype": "fp16"}, {"seed": -1}, {"eval": 3},
    ],
)  # fmt: skip
def test_the_schema_refuses_what_build_recipe_refuses(schema, change):
    raw = {**BASE, **change}
    assert not schema.is_valid(raw)
    with pytest.raises(RecipeError):
        build_recipe(raw)


def test_every_key_is_described():
    for key, owner, name in keys():
        assert (owner.model_fields[name].description or "").endswith((".", "?")), key


# --- launch options and the Python twin ------------------------------------------------------------------------------


def test_launch_options_are_the_flags_of_finetune():
    fields = LaunchOptions.model_fields
    assert set(fields) == {flag.key for flag in LAUNCH_FLAGS}
    for flag in LAUNCH_FLAGS:
        field = fields[flag.key]
        assert (flag.value is None) == (field.annotation is bool)
        assert set(flag.choices) <= set(get_args(field.annotation))
        assert not field.is_required()


def test_launch_faults_are_told_at_once():
    with pytest.raises(RecipeError) as caught:
        build_launch({"backgroun": True, "executor": "thread", "dry_run": "maybe"})
    message = str(caught.value)
    assert message.startswith("3 faults")
    assert "Did you mean `background`?" in message
    assert "must be 'worker' or 'inline', got 'thread'." in message


@pytest.mark.parametrize("raw", RECIPES)
@pytest.mark.parametrize(("name", "launch"), [(None, {}), ("bot", {"background": True, "output": "it's here"})])
def test_the_twin_starts_the_same_run(monkeypatch, raw, name, launch):
    calls = []
    fake = types.ModuleType("tune_magic")
    fake.finetune = lambda **keywords: calls.append(keywords) or "the run"
    monkeypatch.setitem(sys.modules, "tune_magic", fake)
    recipe = build_recipe(raw)
    scope = {"df": "$df", "other": "$other"}  # stand for tables; `finetune` puts their names back
    exec(twin_code(recipe.given(), name, launch), scope)
    (keywords,) = calls
    assert scope[name or "run"] == "the run"
    assert keywords.pop("name", None) == name
    assert {key: keywords.pop(key) for key in launch} == launch
    assert build_recipe(keywords) == recipe


def test_the_twin_passes_a_variable_not_its_name():
    code = twin_code(build_recipe({"model": "tiny", "data": "$df"}).given(), "bot", {})
    assert "'train': df" in code
    assert "$" not in code
    assert re.search(r"^bot = tune_magic\.finetune\(", code, re.MULTILINE)


# --- hard cases -------------------------------------------------------------------------------------------------------


def known(reason, *values):
    return pytest.param(*values, id=reason)


@pytest.mark.parametrize(
    "text",
    [
        known("eval that is no mapping beside eval_steps: TypeError", "eval: 5\neval_steps: 3"),
        known("a dotted key beside a short form: TypeError", "method: lora\nmethod.r: 0"),
        known("a merge key: KeyError", "<<: {lr: 1}"),
        known("a null character: ReaderError", "lr: 1\x00"),
        known("bf16 that is neither true nor false is dropped", "bf16: maybe"),
        known("bf16 and fp32 at once, the last wins", "bf16: true\nfp32: true"),
        known("bf16 beside another dtype wins silently", "bf16: true\ndtype: float32"),
        known("r and rank at once, the last wins", "method: {r: 8, rank: 4}"),
        known("eval.steps and eval_steps at once, the last wins", "eval: {steps: 5}\neval_steps: 7"),
        known("a batch of 0 becomes 1", "per_device_train_batch_size: 0"),
        known("a batch made of two keys has no line", "per_device_train_batch_size: -2"),
        known("true is 1 example", "per_device_train_batch_size: true"),
        known("-2 times -2 is 4", "per_device_train_batch_size: -2\ngradient_accumulation_steps: -2"),
        known("true is a learning rate of 1", "learning_rate: true"),
        known("epochs without end overflow in the worker", "num_train_epochs: .inf"),
        known("an objective that is not there fails in the worker", "objective: dpo"),
    ],
)
def test_hard_cases_are_faults_with_a_line(text):
    assert all(fault.line for fault in faults(HEAD + text))


@pytest.mark.parametrize(
    ("body", "overrides", "key", "value"),
    [
        known("another name on the line is a clash", "lr: 1e-3", {"learning_rate": 1e-5}, "learning_rate", 1e-5),
        known("an alias on the line is a clash", "learning_rate: 1e-3", {"lr": 1e-5}, "learning_rate", 1e-5),
        known(
            "a batch key on the line is a clash", "batch_size: 2", {"per_device_train_batch_size": 4}, "batch_size", 4
        ),
        known(
            "method.name keeps the other method's keys",
            "method: {r: 4}",
            {"method.name": "full"},
            "method.name",
            "full",
        ),
    ],
)
def test_the_line_wins(body, overrides, key, value):
    assert at(read(body, overrides), key) == value


@pytest.mark.parametrize(
    ("text", "count", "says"),
    [
        known("two faults for one wrong union", "model: m\ndata: {train: a, held_out: [1]}", 1, "held_out"),
        known(
            "a template's missing part says must be text",
            "model: m\ndata: {train: a, template: {prompt: x}}",
            1,
            "completion",
        ),
        known(
            "a wrong list names pydantic's list[str]",
            "model: m\ndata: d\nmethod: {target_modules: 5}",
            1,
            "target_modules",
        ),
        known("data must be a path, not only a mapping", "model: m\ndata: 5", 1, "path"),
        known(
            "a share that is no number is taken for a file", "model: m\ndata: {train: a, held_out: x%}", 1, "held_out"
        ),
        known(
            "the advice for held_out is about data", "model: m\ndata: {train: a, held_out: 1}", 1, "Try `held_out: 10%`"
        ),
        known("a bound is rounded", "model: m\ndata: d\nseed: 4294967296", 1, "4294967295"),
        known(
            "a nested double is named without its parent",
            "model: m\ndata: d\neval: {steps: 1, steps: 2}",
            1,
            "eval.steps",
        ),
    ],
)
def test_one_fault_says_what_is_meant(text, count, says):
    found = faults(text)
    assert len(found) == count
    assert says in str(found[0])
