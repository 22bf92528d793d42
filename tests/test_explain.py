"""Explanations with numbers for a model, the list of methods, and methods tried side by side."""

import json
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, rows
from test_classify import labelled, make_encoder
from test_methods import METHODS

import tune_magic
from tune_magic import api, plugins
from tune_magic.cli import main
from tune_magic.commands import COMMANDS, BadUsage, parse
from tune_magic.errors import RecipeError, TuneError
from tune_magic.executors import local
from tune_magic.magics.complete import complete
from tune_magic.magics.verbs import do_verb
from tune_magic.recipe import build_recipe, topics
from tune_magic.recipe.schema import Recipe
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.training.optimizer import learning_rate
from tune_magic.training.prepare import prepare
from tune_magic.view.explain import explanation_card

EXPLAINED = [(kind, name) for kind in ("method", "objective") for name in plugins.names(kind)]
VARIANTS = [
    (kind, owner, name)
    for kind, owner in EXPLAINED
    for name, variant in vars(plugins.get(kind, owner)).get("variants", {}).items()
    if set(variant.recipe) <= set(Recipe.model_fields)
]
OTHERS = [
    "lion",
    "reduce_lr_on_plateau",
    "nf4",
    "cosine",
    "warmup_stable_decay",
    "adafactor",
    "messages",
    "noise",
    "onnx",
    "macro_f1",
    "learning_rate",
    "r",
    "ties",
    "preference",
    "target_modules",
]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Jobs run in this process; runs go to the test's folder; no run came before."""
    start = local.start
    monkeypatch.setattr(local, "start", lambda folder, executor="inline": start(folder, "inline"))
    monkeypatch.setattr(api, "last", None)
    monkeypatch.setattr(api, "installed", list)  # nothing is counted unless a model is named
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def plan_of(make_run):
    """Return a function that gives the plan a run would begin with."""

    def plan(**changes):
        run = make_run(**changes)
        with EventLog(run.path / "events.jsonl") as log:
            return prepare(build_recipe(run.info["recipe"]), run.path, log, Control(run.path, 1)).plan

    return plan


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), EXPLAINED)
def test_every_method_and_objective_explains_itself(kind, name):
    plugin, topic = plugins.get(kind, name), topics.find(name)
    assert all((plugin.summary, plugin.formula, plugin.source, plugin.when))
    assert (topic.kind, topic.summary, topic.line) == (kind, plugin.summary, f"{kind}: {name}")
    assert [key.name for key in topic.keys] == [key for key in plugin.Options.model_fields if key != "name"]
    if kind == "method":
        assert 0 < topic.learning_rate < 1
    card = explanation_card(topic, None, {}, {})
    assert all(part in card["text/plain"] for part in (plugin.summary, plugin.formula, plugin.source, topic.line))


@pytest.mark.parametrize(("kind", "owner", "name"), VARIANTS)
def test_a_variant_is_its_plugin_with_keys_that_a_recipe_takes(kind, owner, name):
    topic = topics.find(name)
    assert all((topic.summary, topic.formula, topic.source, topic.when))
    assert (topic.kind, topic.of) == (kind, owner)
    built = build_recipe({"model": "m", "data": "rows.jsonl", **topic.recipe})
    assert getattr(built, kind).name == owner
    pasted = build_recipe({"model": "m", "data": "rows.jsonl", **_read(topic.line)})
    assert pasted == built
    assert name in dict(topics.find(owner).variants)


def _read(line):
    from tune_magic.recipe import yaml

    return yaml.read(line)[0]


@pytest.mark.parametrize("name", [name for _, name in EXPLAINED] + [name for *_, name in VARIANTS] + OTHERS)
def test_cards_are_plain_html_that_says_what_to_paste(name):
    card = tune_magic.explain(name).card()
    assert not re.search(r"<(script|style|svg|iframe|link)|\son\w+=|javascript:", card["text/html"], re.IGNORECASE)
    assert topics.find(name).line.split("\n")[0] in card["text/plain"]
    assert topics.find(name).summary.split("`")[0] in card["text/plain"]


def test_no_name_is_explained_twice_by_different_kinds_that_train():
    names = [name for _, name in EXPLAINED] + [name for *_, name in VARIANTS]
    assert len(set(names)) == len(names)


def test_the_nearest_name_is_offered():
    for typed, meant in (("dorra", "dora"), ("lorra", "lora"), ("focall", "focal"), ("cosin", "cosine")):
        with pytest.raises(TuneError, match=f"nothing called `{typed}` to explain. Did you mean `{meant}`"):
            tune_magic.explain(typed)
    with pytest.raises(TuneError, match=r"There is no method `dorra`. Did you mean `dora`"):
        tune_magic.try_methods(["lora", "dorra"], model="m", data="rows.jsonl")


def test_every_name_that_is_offered_is_explained():
    names = topics.names()
    assert {"lora", "dora", "focal", "cosine", "messages", "learning_rate", "method.r"} <= set(names)
    for name in names[::7]:
        assert topics.find(name).summary, name
    assert complete(SimpleNamespace(user_ns={}), "%tune explain rs") == ("rs", ["rslora"])
    assert complete(SimpleNamespace(user_ns={}), "%tune methods --try lora,do") == ("lora,do", ["lora,dora"])


def test_a_key_of_several_plug_ins_is_explained_for_each():
    for name, owners in {
        "target_modules": ["lora", "ia3", "oft"], "temperature": ["distill", "embed"], "loss": ["embed", "regression"],
        "num_virtual_tokens": ["prompt", "p_tuning", "prefix"], "method.target_modules": ["lora", "ia3", "oft"],
    }.items():  # fmt: skip
        topic = topics.find(name)
        for owner in owners:
            kind = "method" if owner in plugins.names("method") else "objective"
            field = plugins.get(kind, owner).Options.model_fields[name.rpartition(".")[2]]
            assert field.description in topic.summary, (name, owner)
            assert f"`{owner}`" in topic.summary
    assert topics.find("layer_lr_decay").summary.startswith("Learning rate of a layer")  # the same in both
    assert "Of `lora`: Default: all-linear." in topics.find("target_modules").when
    assert topics.find("target_modules").line == "method: {name: lora, target_modules: all-linear}"
    assert (
        topics.find("lora_alpha").summary
        == plugins.get("method", "lora").Options.model_fields["lora_alpha"].description
    )


def test_other_names_that_recipes_take_are_explained():
    for name, meant in {
        "rank": "method.r", "method.alpha": "method.lora_alpha", "dropout": "method.lora_dropout", "lr": "learning_rate",
        "epochs": "num_train_epochs", "method.rank": "method.r", "bf16": "dtype", "load_in_4bit": "quantization.kind",
        "bnb_4bit_quant_type": "quantization.kind", "gradient_accumulation_steps": "batch_size",
        "constant_with_warmup": "constant", "mrr": "reciprocal_rank",
    }.items():  # fmt: skip
        assert topics.find(name).name == meant
    from tune_magic.recipe.build import ALIASES, METHOD_ALIASES

    for name in (*ALIASES, *METHOD_ALIASES):
        assert topics.find(name).summary, name
        assert name in topics.names()
    assert topics.find("alpha").name == "objective.alpha"  # a key's own name comes first


def test_ways_to_merge_are_explained():
    from tune_magic.recipe.combination import WAYS

    assert topics.find("linear").of == "lr_scheduler_type"
    for name in WAYS:
        topic = topics.find(name)
        if name != "linear":
            assert (topic.kind, topic.of) == ("way", "%tune merge")
            assert parse(COMMANDS["tune merge"], topic.line.removeprefix("%tune merge ")).flags["how"] == name
    assert topics.find("ties").source == "Yadav et al. 2023, arXiv:2306.01708."
    assert "ties: way of %tune merge" in tune_magic.explain("ties").card()["text/plain"]


def test_formats_say_what_learns_from_them():
    assert topics.find("messages").when.endswith("sft learns from them by default.")
    for name in ("preference", "rated"):
        topic = topics.find(name)
        assert topic.line == ""
        assert "nothing that is installed learns from them." in topic.when
        assert "by default" not in topic.when
    assert "`columns: {prompt: prompt, completion: chosen}`" in topics.find("preference").when
    for name, objective, first in (
        ("extractive", "extractive_qa", "question_answer"), ("text_domain", "domain_adversarial", "text_label"),
        ("text_task", "multi_task", "text_label"),
    ):  # fmt: skip
        said = topics.find(name).when
        assert f"`objective: {objective}`" in said
        assert f"`{first}`" in said
        assert "by default" not in said


def test_a_method_without_words_of_its_own_is_told_by_its_docstring():
    class Plain(plugins.get("method", "full")):
        """Trains what it likes, since nobody looks."""

        summary = formula = source = when = ""

    topic = topics.of_plugin("method", "plain", Plain)
    assert topic.summary == "Trains what it likes, since nobody looks."
    assert "formula" not in explanation_card(topic, None, {}, {})["text/plain"]


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "constant", "warmup_stable_decay"])
def test_the_formulas_of_the_schedules_are_those_that_train(name):
    options = {"num_cycles": 1, "power": 2.0, "decay_ratio": 0.25, "min_lr_rate": 0.1}
    recipe = build_recipe(
        {"model": "m", "data": "r.jsonl", **topics.find(name).recipe, "warmup_steps": 0, "learning_rate": 1.0,
         "lr_scheduler_kwargs": options}
    )  # fmt: skip
    formula = topics.find(name).formula.split(";")[0].partition("= ")[2]
    for old, new in (
        ("½ (1 + cos π p)", "0.5 * (1 + cos(pi * p))"), ("^", "**"), ("−", "-"), ("η · ", "1 * "), ("η", "1"), (" · ", " * "),
    ):  # fmt: skip
        formula = formula.replace(old, new)
    from math import cos, pi

    known = {"cos": cos, "pi": pi, "min": min, "m": 0.1, **options}
    for step in range(1, 21):
        assert eval(formula, {**known, "p": (step - 1) / 20}) == pytest.approx(learning_rate(step, 20, recipe))


# --- numbers ---------------------------------------------------------------------------------------------------------


DEFAULTS = {name: {"name": name} for name in plugins.names("method") if name != "freeze"}
COUNTED = METHODS | DEFAULTS | {"freeze": {"name": "freeze", "trainable_layers": 1}}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.sampled(10)
def test_as_many_parameters_are_told_as_a_run_trains(name, plan_of, tiny):
    options = dict(COUNTED[name])
    told = tune_magic.explain(options.pop("name"), model=str(tiny), **options).numbers
    plan = plan_of(method=COUNTED[name])
    assert (told["trained"], told["parameters"]) == (plan["trainable_parameters"], plan["parameters"])
    assert (told["task"], told["head"]) == ("CAUSAL_LM", 0)


@pytest.mark.parametrize("name", ["lora", "full", "freeze", "pfeiffer", "prefix", "ia3"])
def test_a_classifiers_head_is_counted_apart(name, plan_of, tmp_path, write):
    encoder = make_encoder(tmp_path / "bert", num_key_value_heads=4)
    data = str(write("labelled.jsonl", "".join(json.dumps(row) + "\n" for row in labelled(names=["a", "b"]))))
    options = {"name": "freeze"} if name == "freeze" else dict(COUNTED[name])
    plan = plan_of(method=options, model=str(encoder), data={"train": data, "held_out": 0.25})
    told = tune_magic.explain(options.pop("name"), model=str(encoder), **options).numbers
    assert (told["trained"], told["parameters"]) == (plan["trainable_parameters"], plan["parameters"])
    assert (told["task"], told["classes"], told["head"]) == ("SEQ_CLS", 2, 32 * 2 + 2)


@pytest.fixture(scope="module")
def bert_base(tmp_path_factory):
    """A folder with the configuration of BERT-base, and no weights."""
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("models") / "bert-base"
    BertConfig().save_pretrained(folder)
    return str(folder)


def test_lora_on_queries_and_values_of_bert_base(bert_base):
    keys = {"r": 8, "target_modules": ["query", "value"]}
    found = tune_magic.explain("lora", model=bert_base, dtype="float32", **keys)
    assert found.numbers["trained"] - found.numbers["head"] == 294_912
    assert found.numbers["head"] == 768 * 2 + 2
    text = found.card()["text/plain"]
    assert "294,912 + 1,538 of the new head for 2 classes, 0.27 % of" in text
    assert "method: {name: lora, r: 8, target_modules: [query, value]}" in text
    # the head is there twice, as it came and as it is trained
    base = 109_482_240
    assert found.numbers["parameters"] == base + 294_912 + 2 * 1538
    trained_bytes = 4 * (294_912 + 1538)
    assert found.numbers["gradient_bytes"] == trained_bytes
    assert found.numbers["optimizer_bytes"] == 2 * trained_bytes
    buffers = 2 * 512 * 8  # positions and kinds of tokens, as whole numbers
    assert found.numbers["weight_bytes"] == 4 * found.numbers["parameters"] + buffers


def test_the_command_line_says_it_too(bert_base, capsys):
    line = ["explain", "lora", f"model={bert_base}", "r=8", "method.target_modules=[query, value]"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "294,912 + 1,538 of the new head" in out
    assert bert_base not in out.replace(f"model={bert_base}", "")


def test_memory_is_that_of_the_parameters_and_states_in_their_precision(tiny, train):
    told = tune_magic.explain("lora", model=str(tiny), r=4, dtype="bfloat16").numbers
    assert told["dtype"] == "bfloat16"
    base = 35_168 * 2
    assert told["gradient_bytes"] == 4 * told["trained"]  # what is trained stays in float32
    assert told["weight_bytes"] - base - 4 * told["trained"] in range(200)  # buffers of the positions
    for optim, states in (("adamw", 2), ("sgd", 1), ("adafactor", 0)):
        found = tune_magic.explain("full", model=str(tiny), optim=optim).numbers
        assert found["optimizer_bytes"] == states * 4 * 35_168
        assert found["dtype"] == "float32"
    run = train(max_steps=1, eval={"steps": 1, "samples": 0})
    written = sum(path.stat().st_size for path in run.path.glob("checkpoints/step-1/[to]*.safetensors"))
    assert written == pytest.approx(told["checkpoint_bytes"], rel=0.35)  # names and numbers of steps beside it
    assert written > told["checkpoint_bytes"]


def test_time_is_that_of_an_own_run_or_none(tiny, train, tmp_path):
    from tune_magic.storage import places

    assert "measured" not in tune_magic.explain("lora", model=str(tiny)).card()["text/plain"]
    run = train(max_steps=3, method={"name": "lora", "r": 4, "use_dora": True}, eval={"steps": 3, "samples": 0})
    places.remember_root(tmp_path / "tune_runs")
    seconds = sorted(event["seconds"] for event in run.summary().steps.values())[1]
    for name in ("lora", "dora"):
        found = tune_magic.explain(name, model=str(tiny))
        assert found.measured["step_seconds"] == seconds
        assert "in your run tiny_run (method: {name: lora, r: 4, use_dora: true})" in found.card()["text/plain"].replace("`", "")  # fmt: skip
    for name in ("rslora", "ia3"):
        assert tune_magic.explain(name, model=str(tiny)).measured == {}
    train(max_steps=1, method={"name": "lora", "r": 4}, eval={"steps": 1, "samples": 0})
    assert tune_magic.explain("lora", model=str(tiny), r=4).measured["method"] == "method: {name: lora, r: 4}"


def test_a_method_that_does_not_fit_says_why_and_the_rest_is_said(tiny, tmp_path):
    text = tune_magic.explain("freeze", model=str(tiny)).card()["text/plain"]
    assert "no numbers: A language model has no head of its own to train." in text
    assert "method: freeze" in text
    bert = make_encoder(tmp_path / "bert")
    found = tune_magic.explain("sft", model=str(bert)).card()["text/plain"]
    assert "what is minimised" in found


def test_the_model_is_the_one_named_or_the_last_runs(tiny, train, tmp_path, monkeypatch):
    other = make_model(tmp_path / "other", hidden_size=64)
    monkeypatch.setattr(api, "last", train(max_steps=1))
    mine = tune_magic.explain("ia3").numbers["trained"]
    assert mine == 2 * (2 * 16 + 64)
    assert tune_magic.explain("ia3", model=str(other)).numbers["trained"] == 2 * (2 * 32 + 64)
    with pytest.raises(TuneError, match="no_such_model"):
        tune_magic.explain("lora", model="no_such_model")
    with pytest.raises(RecipeError, match="must be at least 1"):
        tune_magic.explain("lora", r=0)


def test_counting_leaves_the_random_state_alone(tiny):
    before = torch.random.get_rng_state()
    tune_magic.explain("prefix", model=str(tiny))
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_list_has_every_method_with_its_numbers(tiny):
    found = tune_magic.list_methods(model=str(tiny))
    frame = found.frame()
    assert set(plugins.names("method")) <= set(frame.index)
    assert {"dora", "houlsby"} <= set(frame.index)
    assert frame.loc["ia3", "trained"] == 2 * (2 * 16 + 64)
    assert frame.loc["dora", "variant_of"] == "lora"
    assert "no head of its own" in frame.loc["freeze", "problem"]
    text = found.card()["text/plain"]
    assert all(name in text for name in frame.index)
    assert "<script" not in found.card()["text/html"]


# --- trying ----------------------------------------------------------------------------------------------------------

TRIAL = {"max_steps": 6, "batch_size": 8, "max_length": 128, "eval": {"steps": 3, "samples": 0}, "dtype": "float32"}


def test_methods_are_tried_at_rates_of_their_own_and_kept(tiny, data_file):
    tried = tune_magic.try_methods(["dora", "ia3", "freeze", "prefix"], model=str(tiny), data=str(data_file), **TRIAL)
    frame = tried.frame()
    assert list(frame.index) == ["dora", "ia3", "freeze", "prefix"]
    assert [run.status for run in tried.runs] == ["finished", "finished", "failed", "finished"]
    assert [run.recipe["learning_rate"] for run in tried.runs] == [2e-4, 3e-3, 1e-3, 1e-2]
    assert tried.runs[0].recipe["method"] == {"name": "lora", "use_dora": True}
    for run in tried.runs:
        assert re.fullmatch(r"try-\w+-\w{4}", run.name)
        assert tune_magic.load_run(run.name).id == run.id
    assert frame.loc["freeze", "problem"].startswith("A language model has no head of its own")
    assert frame["problem"].notna().sum() == 1
    for name, run in zip(frame.index, tried.runs, strict=True):
        if name != "freeze":
            assert frame.loc[name, "trained"] == run.summary().plan["trainable_parameters"]
            assert (
                frame.loc[name, "held_out_loss"] == run.metrics["held_out_loss"] < frame.loc[name, "base_held_out_loss"]
            )
            assert frame.loc[name, "steps"] == 6
            assert 0 < frame.loc[name, "step_seconds"] < frame.loc[name, "seconds"]
            assert frame.loc[name, "peak_bytes"] > 1e7
    card = tried.card()
    assert "<script" not in card["text/html"]
    assert 'src="data:image/svg+xml;base64,' in card["text/html"]
    assert "freeze: A language model has no head" in card["text/plain"]
    assert "2.0e-4" in card["text/plain"]
    assert str(tiny) not in card["text/plain"]
    again = tune_magic.try_methods(["ia3"], model=str(tiny), data=str(data_file), **TRIAL)
    assert [run.id for run in again.runs] == [tried.runs[1].id]  # the same recipe is the same run


def test_classifiers_are_tried_by_accuracy_from_a_table(tmp_path):
    import pandas as pd

    encoder = make_encoder(tmp_path / "bert", num_key_value_heads=4)
    keys = TRIAL | {"max_steps": 24, "eval": {"steps": 12}}
    lora = {"name": "lora", "r": 4}
    tried = tune_magic.try_methods(
        [lora, "full", "freeze"], model=str(encoder), data=pd.DataFrame(labelled()), learning_rate=1e-2, **keys
    )
    frame = tried.frame()
    assert list(frame.index) == ["lora r=4", "full", "freeze"]
    assert set(frame["learning_rate"]) == {1e-2}  # one for all, as it was given
    assert (frame["state"] == "finished").all()
    assert frame.loc["lora r=4", "accuracy"] > frame.loc["lora r=4", "base_accuracy"]
    assert frame.loc["full", "accuracy"] == tried.runs[1].summary().best["accuracy"]
    assert tried.plot().axes[0].get_title(loc="left") == "accuracy"
    assert tried.plot().axes[0].get_xscale() == "log"
    assert "base accuracy" in tried.card()["text/plain"]
    assert tried.runs[0].name.startswith("try-lora-r-4-")


def test_an_interrupt_ends_the_trial_and_tabulates_what_is_there(tiny, data_file, monkeypatch):
    inline, started = local.start, []

    def start(folder, executor="inline"):
        started.append(folder)
        if len(started) == 2:
            signal.raise_signal(signal.SIGINT)
        return inline(folder, "inline")

    monkeypatch.setattr(local, "start", start)
    before = signal.getsignal(signal.SIGINT)
    tried = tune_magic.try_methods(["lora", "ia3", "vera", "oft"], model=str(tiny), data=str(data_file), **TRIAL)
    assert signal.getsignal(signal.SIGINT) is before
    assert list(tried.frame().index) == ["lora", "ia3"]
    assert len(started) == 2
    assert "not tried: vera, oft" in tried.card()["text/plain"]


def test_a_budget_is_each_ones_own_and_its_end_is_no_fault(tiny, data_file):
    keys = TRIAL | {"max_steps": 100_000, "eval": {"steps": 100_000, "samples": 0}}
    tried = tune_magic.try_methods(["ia3"], model=str(tiny), data=str(data_file), budget="4s", **keys)
    row = tried.rows[0]
    assert (row["state"], row["problem"]) == ("its time was up", None)
    assert 0 < row["steps"] < 100_000
    again = tune_magic.try_methods(["ia3"], model=str(tiny), data=str(data_file), budget="1s", **keys)
    assert again.runs[0].id != tried.runs[0].id  # going on with the first would be more time than it was given


def test_a_key_that_one_method_lacks_is_its_own_fault(tiny, data_file):
    keys = TRIAL | {"max_steps": 2, "method.r": 4}
    tried = tune_magic.try_methods(["lora", "ia3"], model=str(tiny), data=str(data_file), **keys)
    assert tried.rows[0]["state"] == "finished"
    assert "method.r" in tried.rows[1]["problem"]
    assert len(tried.runs) == 1
    with pytest.raises(RecipeError, match="batch_size"):
        tune_magic.try_methods(["lora", "ia3"], model=str(tiny), data=str(data_file), batch_size=0)


def test_the_line_tries_methods(tiny, data_file, capsys):
    line = f"--try ia3,ln_tuning --data {data_file} --model {tiny} --steps 3 batch_size=4 eval.samples=0"
    assert do_verb("methods", parse(COMMANDS["tune methods"], line), None) is None
    out = capsys.readouterr().out
    assert "tiny on rows.jsonl" in out
    assert re.search(r"^ia3 +finished · 3 steps", out, re.MULTILINE)
    assert re.search(r"^ln_tuning +finished · 3 steps", out, re.MULTILINE)
    do_verb("methods", parse(COMMANDS["tune methods"], f"--model {tiny}"), None)
    assert "houlsby" in capsys.readouterr().out
    with pytest.raises(BadUsage, match="--try needs rows"):
        do_verb("methods", parse(COMMANDS["tune methods"], "--try lora"), None)
    with pytest.raises(BadUsage, match="--steps is for --try"):
        do_verb("methods", parse(COMMANDS["tune methods"], "--steps 3"), None)


def test_rows_given_as_a_list_can_be_tried(tiny):
    tried = tune_magic.try_methods(["ia3"], model=str(tiny), data=rows(24), **TRIAL | {"max_steps": 1})
    assert tried.title == "tiny on your rows"
    assert tried.rows[0]["state"] == "finished"


@pytest.mark.parametrize(
    "options", [{"kind": "nf4"}, {"kind": "nf4", "double_quant": False}, {"kind": "fp4"}, {"kind": "int8"}]
)
def test_a_quantised_base_is_told_as_it_is_kept(options, tmp_path):
    from tune_magic.models.load import load_causal_lm
    from tune_magic.models.quantise import packed, quantise, rounded_layers
    from tune_magic.recipe.schema import QuantizationOptions

    folder, kept = make_model(tmp_path / "m", hidden_size=64, intermediate_size=1280), QuantizationOptions(**options)
    before, told = packed(load_causal_lm(folder, torch.float32), kept)
    model = quantise(load_causal_lm(folder, torch.float32), kept, torch.float32, torch.device("cpu"))
    layers = [layer for _, layer in rounded_layers(model)]
    assert told == sum(layer.weight.nbytes + layer.scale_bytes() for layer in layers)
    assert before == 4 * sum(layer.in_features * layer.out_features for layer in layers)


def test_qlora_is_lora_on_a_base_in_4_bits(tiny):
    lora, qlora = (tune_magic.explain(name, model=str(tiny), dtype="float32") for name in ("lora", "qlora"))
    assert qlora.numbers["trained"] == lora.numbers["trained"]
    assert qlora.numbers["weight_bytes"] < lora.numbers["weight_bytes"]
    assert qlora.numbers["dtype"] == "nf4"
    assert build_recipe({"model": "m", "data": "rows.jsonl", **_read(qlora.topic.line)}).quantization.kind == "nf4"


@pytest.mark.parametrize("name", plugins.names("objective"))
@pytest.mark.sampled(3)
def test_every_objective_counts_or_says_why_not(name, tmp_path):
    model = make_encoder(tmp_path / "bert", num_key_value_heads=4)
    found = tune_magic.explain(name, model=str(model))
    assert found.numbers.get("problem") or 0 < found.numbers["trained"] < found.numbers["parameters"]
    text = found.card()["text/plain"]
    assert "trained parameters:" in text or "no numbers:" in text
    if name in ("tag", "regression", "extractive_qa"):
        assert found.numbers["head"] == 2 * 33
    if name == "distill":
        assert "`teacher` is needed" in text


def test_a_callback_is_told_by_what_it_says_of_itself():
    from tune_magic.training.callbacks import Callback

    class Bell(Callback):
        """Rings at the end of a run."""

    topic = topics.of_plugin("callback", "bell", Bell)
    assert (topic.summary, topic.line) == ("Rings at the end of a run.", "callbacks: [bell]")


def test_a_key_that_only_some_methods_have_is_told_in_the_list(tiny):
    frame = tune_magic.list_methods(model=str(tiny), **{"method.r": 2}).frame()
    assert frame.loc["lora", "trained"] == 16_384 / 8
    assert "method.r" in frame.loc["ia3", "problem"]
    with pytest.raises(RecipeError, match="batch_size"):
        tune_magic.list_methods(model=str(tiny), batch_size=0)
