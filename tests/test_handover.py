"""Recipes for other programs: what is said there is what was trained, and what is not said is told."""

import ast
import contextlib
import io
import json
import re

import pytest
from transformers import TrainingArguments

from tune_magic import plugins
from tune_magic.errors import TuneError
from tune_magic.handover import targets
from tune_magic.recipe import build_recipe, load_recipe
from tune_magic.recipe.differences import flat
from tune_magic.storage.events import EventLog

OTHERS = [name for name in targets.TARGETS if name != "yaml"]
FACTS = {
    "train_rows": 18, "held_out_rows": 6, "total_steps": 12, "steps_per_epoch": 5, "eval_steps": 4, "save_steps": 4, "dtype": "float32",
    "chat_template": True, "max_length": 128, "format": "messages", "objective": {"name": "sft"},
}  # fmt: skip


@pytest.fixture
def planned(make_run):
    """Return a run whose rows were looked at and that was not trained."""

    def plan(facts=None, **changes):
        run = make_run(**changes)
        recipe = build_recipe(run.info["recipe"])
        about = {"name": recipe.model, "origin": "folder", "note": "a folder", "folder": recipe.model}
        content = {
            **FACTS,
            "model": about,
            "data_files": {recipe.data.train: recipe.data.train},
            "max_length": recipe.max_length,
            **(facts or {}),
        }
        with EventLog(run.path / "events.jsonl", 1) as log:
            log.append("plan", recipe=recipe.normalised(), **content)
        (run.path / "split.json").write_text(json.dumps({"format": 1, "held_out": [3, 5]}))
        return run

    return plan


# --- yaml ------------------------------------------------------------------------------------------------------------

RECIPES = [
    {},
    {"objective": "classify", "method": {"name": "freeze"}},
    {"method": {"name": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"], "use_dora": True}},
    {"data": {"train": "a b.jsonl[:80%]", "held_out": "h.csv", "template": {"prompt": "{x}: {y}", "completion": "{z}\nend"}}},
    {"data": {"train": "$df", "mix": [{"data": "m.jsonl", "weight": 0.3}], "augment": {"noise": 0.5}, "columns": {"prompt": "no"}}},
    {"data": {"train": "org/name@sub:train[:5%]", "template": "- {text} # not a comment"}},
    {"learning_rate": 1e-4, "adam_epsilon": 1e-30, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "eval": {"early_stopping_patience": 2}},
    {"vocabulary": {"tokens": ["<a>", "yes", "1e5"]}, "retain": {"kl_base": 0.1}, "quantization": {"kind": "nf4", "double_quant": False}},
    {"num_train_epochs": 0.5, "max_steps": None, "optim": "lion", "seed": 0, "neftune_noise_alpha": 5, "ema_decay": 0.99},
]  # fmt: skip


@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_a_recipe_file_is_the_same_recipe(make_run, changes):
    run = make_run(**changes)
    again = load_recipe(run.code("yaml"))
    assert again.normalised() == build_recipe(run.info["recipe"]).normalised()


def test_a_recipe_file_finds_the_run_again(train, recipe, tmp_path, monkeypatch):
    import tune_magic

    run = tune_magic.finetune(recipe, name="bot", executor="inline", output=str(tmp_path / "runs"))
    (tmp_path / "bot.yaml").write_text(run.code("yaml"))
    again = tune_magic.finetune(str(tmp_path / "bot.yaml"), executor="inline", output=str(tmp_path / "runs"))
    assert again.id == run.id


# --- a plain script --------------------------------------------------------------------------------------------------


def plain_rows(count=20):
    return [
        {"question": f"What is {i}?", "context": f"{i} is blue" if i % 2 else "", "answer": f"it is {i % 3}"}
        for i in range(count)
    ]


WAYS = [  # rows, what the recipe says of them and of all else
    ("messages", None, {"method": {"name": "lora", "r": 2, "loraplus_lr_ratio": 4, "use_rslora": True}, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}),
    ("question_answer", plain_rows(), {"method": "full", "learning_rate": 1e-3, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}}),
    ("question_answer", plain_rows(), {"data": {"chat_template": False, "held_out": 4 / 20}, "label_smoothing_factor": 0.1}),
    ("prompt_completion", plain_rows(), {"data": {"template": {"system": "Be brief.", "prompt": "{question}", "completion": "{answer}!"}}}),
    ("text", [{"text": f"line {i} of a text about {i % 3}"} for i in range(20)], {"objective": "lm", "max_length": 8, "optim": "sgd", "warmup_steps": 3}),
    ("conversations", [{"conversations": [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": str(i)}, {"from": "human", "value": "again"},
                                          {"from": "gpt", "value": f"{i}!"}]} for i in range(20)], {"lr_scheduler_type": "warmup_stable_decay"}),
]  # fmt: skip


def run_script(text):
    """Run a script in this process and return the losses of its steps and of the held-out rows."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(text, "script", "exec"), {"__name__": "__main__"})
    found = [dict(re.findall(rf"step (\d+) {word} (\S+)", said.getvalue())) for word in ("loss", "held-out loss")]
    return [{int(step): float(loss) for step, loss in losses.items()} for losses in found]


@pytest.mark.parametrize(("name", "rows", "changes"), WAYS, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(WAYS)])
def test_the_script_trains_the_same(train, recipe, write, tmp_path, monkeypatch, name, rows, changes):
    monkeypatch.chdir(tmp_path)
    data = recipe["data"]
    if rows is not None:
        data = {"train": str(write("own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))), "held_out": 0.25}
    run = train(**{"max_steps": 6, **changes, "data": data | changes.get("data", {})})
    assert run.status == "finished"
    assert run.summary().plan["format"] == name
    losses, held_out = run_script(run.code("script"))
    ours = {step: event["loss"] for step, event in run.summary().steps.items()}
    assert losses == pytest.approx(ours, abs=2e-4)
    scored = {step: event["loss"] for step, event in run.summary().evaluations.items() if step}
    assert held_out == pytest.approx(scored, abs=2e-4)
    assert "tune_magic." not in run.code("script").partition("import")[2]


# --- nothing is dropped in silence -----------------------------------------------------------------------------------

SET = [
    {"learning_rate": 3e-3}, {"num_train_epochs": 7, "max_steps": None}, {"batch_size": 6}, {"microbatch_tokens": 512}, {"gradient_checkpointing": True},
    {"max_length": 64}, {"lr_scheduler_type": "cosine"}, {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
    {"lr_scheduler_type": "reduce_lr_on_plateau"}, {"warmup_steps": 5}, {"weight_decay": 0.3}, {"optim": "lion"}, {"optim": "paged_adamw_8bit"}, {"adam_beta1": 0.8},
    {"adam_beta2": 0.9}, {"adam_epsilon": 1e-5}, {"label_smoothing_factor": 0.2}, {"neftune_noise_alpha": 5.0}, {"ema_decay": 0.9},
    {"max_grad_norm": 0.5}, {"share_prefixes": False}, {"torch_compile": True}, {"train_sampling_strategy": "group_by_length"},
    {"cache_frozen_layers": False}, {"seed": 7}, {"save_steps": 2}, {"save_total_limit": 5}, {"vocabulary": {"tokens": ["<x>"]}},
    {"retain": {"l2_sp": 0.5}}, {"quantization": "nf4"}, {"quantization": {"kind": "nf4", "double_quant": False}}, {"quantization": "int8"},
    {"method": {"name": "lora", "r": 3}}, {"method": {"name": "lora", "lora_alpha": 5}}, {"method": {"name": "lora", "lora_dropout": 0.1}},
    {"method": {"name": "lora", "target_modules": ["q_proj"]}}, {"method": {"name": "lora", "use_rslora": True}}, {"method": {"name": "lora", "use_dora": True}},
    {"method": {"name": "lora", "init_lora_weights": "pissa"}}, {"method": {"name": "lora", "loraplus_lr_ratio": 9}},
    {"method": {"name": "lora", "init_lora_weights": "gaussian"}}, {"method": "full"},
    {"data": {"clean": ["duplicates"]}}, {"data": {"mix": ["more.jsonl"]}}, {"data": {"augment": "noise"}}, {"data": {"held_out": "other.jsonl"}},
    {"data": {"test": "t.jsonl"}}, {"data": {"balance": "resample"}}, {"data": {"group_by": "topic"}},
    {"data": {"on_bad_rows": "skip"}}, {"data": {"replay": "old.jsonl"}}, {"data": {"template": {"prompt": "{a}", "completion": "{b}"}}},
    {"eval": {"early_stopping_patience": 3}}, {"eval": {"samples": 4}},
]  # fmt: skip


@pytest.mark.parametrize("target", OTHERS)
def test_every_key_is_carried_over_or_told(planned, recipe, target):
    bare = {"eval": {}, "method": "lora", "dtype": "auto"}
    plain = planned(**bare).code(target)
    missing = []
    for change in SET:
        whole = {key: recipe[key] | value if key == "data" else value for key, value in change.items()}
        facts = {"save_steps": change.get("save_steps", 4), "held_out_rows": 5 if "other" in str(change) else 6,
                 "total_steps": 35 if "num_train_epochs" in change else 12}  # fmt: skip
        try:
            changed = planned(facts, **{**bare, **whole}).code(target)
        except TuneError as error:
            assert error.hint
            continue
        if _without_ids(changed) == _without_ids(plain):
            missing.append(change)
    assert missing == []


def _without_ids(text):
    return re.sub(r"\d{8}-\d{6}-\w{4}", "ID", text)


def test_every_key_of_a_recipe_is_in_the_table():
    known = {key.split(".")[0] for change in SET for key in flat(change)}
    every = set(build_recipe({"model": "m", "data": "d"}).normalised())
    assert (
        every - known == {"model", "objective", "warmup_ratio", "dtype", "callbacks", "max_steps", "compress"} - known
    )


@pytest.mark.parametrize("target", OTHERS)
def test_what_another_program_has_no_word_for_is_refused(planned, target):
    with pytest.raises(TuneError, match=r"cannot say `objective: tag`.*It can say: sft"):
        planned({"objective": {"name": "tag"}}).code(target)
    with pytest.raises(TuneError, match="cannot say `method: bottleneck`"):
        planned(method="bottleneck").code(target)
    with pytest.raises(TuneError, match="cannot say `compress`"):
        planned(compress={"drop_layers": [0]}).code(target)


def test_without_a_plan_there_is_no_recipe_for_others(make_run):
    with pytest.raises(TuneError, match="rows were looked at"):
        make_run().code("trl")


def test_an_unknown_program_is_named_with_the_nearest(make_run):
    with pytest.raises(TuneError, match=r"'axolotle'.*There are: python, yaml"):
        make_run().code("axolotle")


@pytest.mark.parametrize("target", OTHERS)
def test_values_cannot_end_a_comment(planned, target):
    run = planned(data={"train": planned().recipe["data"]["train"], "test": "t\nimport os"})
    text = run.code(target)
    assert not re.search(r"^import os", text, re.MULTILINE)


@pytest.mark.parametrize("target", ["script", "trl"])
def test_scripts_are_python(planned, target):
    names = plugins.names("method")
    assert "lora" in names
    ast.parse(planned(quantization="nf4", gradient_checkpointing=True).code(target))


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_trl_trains_it(planned, tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    run = planned(max_steps=2, lr_scheduler_type="cosine", lr_scheduler_kwargs={"min_lr_rate": 0.1}, eval={"early_stopping_patience": 2},
                  save_steps=4, train_sampling_strategy="group_by_length")  # fmt: skip
    names = {"__name__": "script"}
    exec(compile(run.code("trl"), "script", "exec"), names)
    trainer = names["trainer"]
    assert isinstance(trainer.args, trl.SFTConfig)
    assert (trainer.args.learning_rate, trainer.args.max_steps, trainer.args.lr_scheduler_kwargs) == (
        1e-2,
        2,
        {"min_lr_rate": 0.1},
    )
    assert trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps == 4
    trainer.train()
    assert trainer.state.global_step == 2
    first = next(iter(trainer.get_train_dataloader()))
    trained = [
        trainer.processing_class.decode(ids[ids_labels != -100])
        for ids, ids_labels in zip(first["input_ids"], first["labels"], strict=True)
    ]
    assert all(text.strip().removesuffix("<|im_end|>") in ("red", "green", "blue", "black") for text in trained)


SFT_CONFIG = {  # names that the script may give SFTConfig, as TRL 1.16 and Transformers 5.23 have them
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "completion_only_loss",
    "dataset_num_proc",
    "eval_steps",
    "eval_strategy",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "greater_is_better",
    "label_smoothing_factor",
    "learning_rate",
    "load_best_model_at_end",
    "logging_steps",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_length",
    "max_steps",
    "metric_for_best_model",
    "neftune_noise_alpha",
    "num_train_epochs",
    "optim",
    "output_dir",
    "packing",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "report_to",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "seed",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
}


def test_the_names_of_trl(planned, recipe):
    said = set()
    for change in SET:
        whole = {key: recipe[key] | value if key == "data" else value for key, value in change.items()}
        said |= set(
            re.findall(
                r"^    (\w+)=",
                planned(**whole).code("trl").partition("SFTConfig(\n")[2].partition("\n)")[0],
                re.MULTILINE,
            )
        )
    assert said == SFT_CONFIG
    with contextlib.suppress(ImportError):
        import trl

        assert said <= {field.name for field in trl.SFTConfig.__dataclass_fields__.values()}


# --- Axolotl, LLaMA-Factory, Olive -----------------------------------------------------------------------------------

ROWS = {  # format -> a row of it
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    "prompt_completion": {"query": "a", "response": "b"},
    "instruction": {"instruction": "a", "input": "b", "output": "c"},
    "question_answer": {"question": "a", "context": "b", "answer": "c"},
    "text": {"text": "a b c"},
}  # fmt: skip
NAMES = {  # keys that each may write, by its version
    "axolotl": {  # 0.19.0
        "adam_beta1", "adam_beta2", "adam_epsilon", "adapter", "base_model", "bf16", "bnb_config_kwargs", "cosine_min_lr_ratio", "datasets",
        "early_stopping_patience", "eval_batch_size", "eval_steps", "excess_length_strategy", "gradient_accumulation_steps",
        "gradient_checkpointing", "greater_is_better", "group_by_length", "learning_rate", "load_best_model_at_end", "load_in_4bit", "load_in_8bit",
        "logging_steps", "lora_alpha", "lora_dropout", "lora_r", "lora_target_linear", "lora_target_modules", "loraplus_lr_ratio", "lr_scheduler",
        "lr_scheduler_kwargs", "max_grad_norm", "max_steps", "metric_for_best_model", "micro_batch_size", "neftune_noise_alpha", "num_epochs",
        "optimizer", "output_dir", "peft_init_lora_weights", "peft_use_dora", "peft_use_rslora", "sample_packing", "save_steps", "save_total_limit",
        "seed", "sequence_len", "test_datasets", "train_on_inputs", "val_set_size", "warmup_steps", "weight_decay",
    },
    "llama-factory": (SFT_CONFIG - {"max_length", "packing", "dataset_num_proc", "completion_only_loss"}) | {  # 0.9.5
        "cutoff_len", "dataset", "dataset_dir", "do_train", "double_quantization", "early_stopping_steps", "eval_dataset", "finetuning_type",
        "lora_alpha", "lora_dropout", "lora_rank", "lora_target", "loraplus_lr_ratio", "model_name_or_path", "pissa_init", "pissa_iter",
        "quantization_bit", "quantization_type", "stage", "template", "use_dora", "use_rslora", "val_size",
    },
    "olive": {"input_model", "systems", "data_configs", "passes", "host", "target", "output_dir"},  # 0.13.0
}  # fmt: skip


def load_axolotl(text, folder):
    config = pytest.importorskip("axolotl.utils.schemas.config")
    return config.AxolotlInputConfig(**_as_yaml_1_1(text))


def load_llama_factory(text, folder):
    from transformers import HfArgumentParser

    hparams = pytest.importorskip("llamafactory.hparams", exc_type=ImportError)
    parser = pytest.importorskip("llamafactory.data.parser")
    kinds = [hparams.ModelArguments, hparams.DataArguments, hparams.TrainingArguments, hparams.FinetuningArguments]
    loaded = HfArgumentParser(kinds).parse_dict(_as_yaml_1_1(text))
    for name, content in targets.beside(text, "llama-factory").items():
        (folder / name).write_text(content)
    assert parser.get_dataset_list(["train"], str(folder))[0].load_from == "file"
    return loaded


def load_olive(text, folder):
    config = pytest.importorskip("olive.workflows.run.config")
    return config.RunConfig.model_validate(_as_yaml_1_1(text))


LOADERS = {"axolotl": load_axolotl, "llama-factory": load_llama_factory, "olive": load_olive}


def _as_yaml_1_1(text):
    import yaml

    return yaml.safe_load(text)


def variants(planned, recipe, write):
    """Yield runs of all formats, and of all settings."""
    for name, row in ROWS.items():
        path = write(f"{name}.jsonl", (json.dumps(row) + "\n") * 4)
        data = {"train": str(path), "held_out": 0.25}
        yield planned({"format": name, "objective": {"name": "lm" if name == "text" else "sft"}}, data=data)
        if name == "prompt_completion":
            yield planned({"format": name, "chat_template": False}, data=data)
    for change in [*SET, {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}]:
        yield planned(**{key: recipe["data"] | value if key == "data" else value for key, value in change.items()})


@pytest.mark.parametrize("target", sorted(LOADERS))
def test_the_programs_own_loader_takes_it(planned, recipe, write, tmp_path, target):
    taken = 0
    for run in variants(planned, recipe, write):
        with contextlib.suppress(TuneError):
            text = run.code(target)
            LOADERS[target](text, tmp_path)
            taken += 1
    assert taken > len(SET) - 8


def test_olive_can_train_by_the_arguments(planned, recipe, write, tmp_path):
    """Its own check takes any; Transformers builds them when training starts, and wants rows for a rate that follows them."""
    taken = 0
    for run in variants(planned, recipe, write):
        with contextlib.suppress(TuneError):
            content = _as_yaml_1_1(run.code("olive"))["passes"]["finetune"]
            arguments = {"eval_strategy": "steps" if "eval_data_config" in content else "no"} | content["training_args"]
            del arguments["warmup_ratio"]  # a key of Olive's own, of which Transformers makes steps
            TrainingArguments(output_dir=str(tmp_path), **arguments)
            taken += 1
    assert taken > len(SET) - 8


@pytest.mark.parametrize("target", sorted(LOADERS))
def test_only_known_names_are_written(planned, recipe, write, target):
    said = set()
    for run in variants(planned, recipe, write):
        with contextlib.suppress(TuneError):
            content = _as_yaml_1_1(run.code(target))
            said |= content.keys()
            assert not [
                value for value in content.values() if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value)
            ]
    assert said == NAMES[target]


def test_numbers_are_numbers_to_readers_of_old_yaml(planned):
    content = _as_yaml_1_1(planned(learning_rate=1e-5).code("axolotl"))
    assert content["learning_rate"] == 1e-5
    assert content["adam_epsilon"] == 1e-8


def test_rows_are_named_by_their_own_columns(planned, write):
    path = write("own.jsonl", json.dumps({"instruction": "a", "context": "b", "response": "c", "system": "s"}) + "\n")
    run = planned({"format": "instruction", "chat_template": False}, data={"train": str(path), "held_out": 0.25})
    said = _as_yaml_1_1(run.code("axolotl"))["datasets"][0]["type"]
    assert said == {"field_instruction": "instruction", "field_input": "context", "field_output": "response", "field_system": "system",
                    "system_format": "{system}\n\n", "format": "{instruction}\n\n{input}", "no_input_format": "{instruction}"}  # fmt: skip
    text = run.code("llama-factory")
    info = json.loads(targets.beside(text, "llama-factory")["dataset_info.json"])
    assert info["train"]["columns"] == {
        "prompt": "instruction",
        "query": "context",
        "response": "response",
        "system": "system",
    }
    assert "by one line break" in text
    assert (
        "{system}\n{instruction}\n{context}\n{response}"
        in _as_yaml_1_1(run.code("olive"))["data_configs"][0]["pre_process_data_config"]["text_template"]
    )


def test_what_must_lie_beside_a_file_is_written_too(planned, tmp_path, monkeypatch):
    from tune_magic import commands
    from tune_magic.commands import BadUsage
    from tune_magic.magics.verbs import do_verb

    run = planned()
    monkeypatch.chdir(tmp_path)
    parsed = commands.parse(commands.COMMANDS["tune export-code"], "--for llama-factory --output train.yaml")
    do_verb("export-code", parsed, lambda _: run)
    assert json.loads((tmp_path / "dataset_info.json").read_text())["train"]["formatting"] == "sharegpt"
    (tmp_path / "train.yaml").unlink()
    with pytest.raises(BadUsage, match=r"dataset_info.json is there already"):
        do_verb("export-code", parsed, lambda _: run)
    assert not (tmp_path / "train.yaml").exists()


@pytest.mark.parametrize("target", OTHERS)
def test_a_part_of_a_file_is_read_or_refused(planned, data_file, target):
    run = planned(data={"train": f"{data_file}[:75%]", "held_out": f"{data_file}[75%:]"})
    if target in ("script", "trl"):
        assert run.code(target).count("rows.jsonl") == 2
    else:
        with pytest.raises(TuneError, match="is a part of a file"):
            run.code(target)
