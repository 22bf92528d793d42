"""A script for TRL: SFTConfig and SFTTrainer, over rows of prompt and completion."""

from __future__ import annotations

from typing import Any

from tune_magic.errors import TuneError
from tune_magic.handover import reading, script_parts
from tune_magic.handover.script import quantization
from tune_magic.handover.source import Shape, Source, comment

SCHEDULES = {  # ours -> Transformers'
    "linear": "linear", "cosine": "cosine", "polynomial": "polynomial", "constant": "constant_with_warmup",
    "cosine_with_restarts": "cosine_with_restarts", "inverse_sqrt": "inverse_sqrt",
    "warmup_stable_decay": "warmup_stable_decay", "reduce_lr_on_plateau": "reduce_lr_on_plateau",
}  # fmt: skip
OPTIMIZERS = {
    "adamw": "adamw_torch_fused", "sgd": "sgd", "adafactor": "adafactor", "lion": "lion_32bit", "adamw_8bit": "adamw_bnb_8bit",
    "lion_8bit": "lion_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip


def write(source: Source) -> str:
    """Return the script.

    Raises:
        TuneError: The objective, the method or the rows are none that SFTTrainer could train.
    """
    source.need("trl", ("sft", "lm"), ("lora", "full"))
    shape = source.shape()
    if shape.kind == "other":
        raise TuneError(f"TRL's SFTTrainer reads no rows in the format `{shape.format}`.",
                        hint="It reads chats, prompts with answers, and texts.")  # fmt: skip
    rows = reading.reader(source)
    turner = reading.turner(source, shape)
    examples = _examples(source, shape)
    held_out = _held_out(source)
    config = training_arguments(source) | _own(source, shape)
    model, peft = source.model(), _peft(source)
    source.notes += [
        "rows come in another order, so losses are near, not the same",
        "the first step of a warm-up has no learning rate in Transformers, and has one here",
    ]
    arguments = "\n".join(f"    {key}={value!r}," for key, value in config.items())
    load = _model_init(source)
    code = "\n\n".join([
        f"MODEL = {model!r}\n", rows, turner, examples, f"config = SFTConfig(\n{arguments}\n){load}\n{peft}",
        _DATASETS.format(held_out=held_out), _TRAINER.format(callbacks=_callbacks(source)),
    ])  # fmt: skip
    return f"{comment(source.heading('TRL 1.16', _USE))}\n\n{script_parts.imports(code)}\n\n{code}"


def training_arguments(source: Source) -> dict[str, Any]:
    """Return what Transformers' TrainingArguments have by the same name or another, for all programs that stand on them."""
    take, recipe = source.take, source.recipe
    schedule = take("lr_scheduler_type")
    found: dict[str, Any] = {
        "output_dir": f"{source.slug}-{recipe.method.name}", "seed": take("seed"), "learning_rate": take("learning_rate"),
        "lr_scheduler_type": SCHEDULES[schedule], **_schedule_options(source, schedule), "warmup_steps": source.warmup_steps,
        "weight_decay": take("weight_decay"), "optim": OPTIMIZERS[take("optim")], "adam_beta1": take("adam_beta1"),
        "adam_beta2": take("adam_beta2"), "adam_epsilon": take("adam_epsilon"), "max_grad_norm": take("max_grad_norm"),
        "label_smoothing_factor": take("label_smoothing_factor"), "neftune_noise_alpha": take("neftune_noise_alpha"),
        "bf16": source.plan["dtype"] == "bfloat16", "gradient_checkpointing": bool(recipe.gradient_checkpointing),
        **_batch(source), **_length(source), **_evaluations(source),
    }  # fmt: skip
    take("dtype")
    if recipe.optim == "sgd":
        found["optim_args"] = f"momentum={recipe.adam_beta1}"
    if recipe.optim == "adafactor":
        source.notes.append(
            "Adafactor of Transformers scales its steps otherwise: the learning rate will have to be another"
        )
    if recipe.gradient_checkpointing:
        take("gradient_checkpointing")
    if recipe.train_sampling_strategy == "group_by_length":
        take("train_sampling_strategy")
        found["train_sampling_strategy"] = "group_by_length"
    return {key: value for key, value in found.items() if value is not None}


def _batch(source: Source) -> dict[str, int]:
    """Return the rows of a step as so many at once, so many times."""
    size = int(source.take("batch_size"))
    at_once = max(part for part in range(1, min(8, size) + 1) if size % part == 0)
    return {
        "per_device_train_batch_size": at_once,
        "per_device_eval_batch_size": at_once,
        "gradient_accumulation_steps": size // at_once,
    }


def _length(source: Source) -> dict[str, Any]:
    epochs, steps = source.take("num_train_epochs"), source.take("max_steps")
    return {"num_train_epochs": epochs} if steps is None else {"max_steps": steps}


def _evaluations(source: Source) -> dict[str, Any]:
    take, plan = source.take, source.plan
    take("eval.steps")
    found: dict[str, Any] = {
        "logging_steps": 1, "save_strategy": "steps", "save_steps": plan["save_steps"], "save_total_limit": take("save_total_limit"), "report_to": "none",
    }  # fmt: skip
    take("save_steps")
    if plan["held_out_rows"]:
        found |= {"eval_strategy": "steps", "eval_steps": plan["eval_steps"]}
        found |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}  # stopping early needs them, too
        if plan["save_steps"] % plan["eval_steps"] == 0:
            found |= {"load_best_model_at_end": True}
    return found


def _schedule_options(source: Source, schedule: str) -> dict[str, Any]:
    """Return what Transformers call the options of a schedule."""
    options = source.recipe.lr_scheduler_kwargs
    source.take_part("lr_scheduler_kwargs")
    least = options.min_lr_rate
    found: dict[str, Any] = {}
    match schedule:
        case "cosine" if least:
            return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": least}}
        case "inverse_sqrt":
            found = {"timescale": max(1, source.warmup_steps)}
        case "cosine_with_restarts":
            found = {"num_cycles": options.num_cycles}
        case "polynomial":
            found = {"power": options.power, "lr_end": least * source.recipe.learning_rate}
            least = 0.0
        case "warmup_stable_decay":
            decay = round(options.decay_ratio * source.total_steps)
            found, least = {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": least}, 0.0
        case "reduce_lr_on_plateau":
            found = {
                "factor": options.factor,
                "patience": options.patience,
                "min_lr": least * source.recipe.learning_rate,
            }
            least = 0.0
    if least:
        source.notes.append(
            f"`min_lr_rate: {least}` is not known to the schedule `{schedule}` there; the rate falls to 0"
        )
    return {"lr_scheduler_kwargs": found} if found else {}


def _own(source: Source, shape: Shape) -> dict[str, Any]:
    """Return what SFTConfig adds."""
    source.take("data.chat_template")
    source.take("max_length")
    return {"max_length": source.plan["max_length"], "packing": False, "dataset_num_proc": None,
            **({"completion_only_loss": True} if _is_answered(source, shape) else {})}  # fmt: skip


def _is_answered(source: Source, shape: Shape) -> bool:
    template = source.recipe.data.template
    return source.objective == "sft" and shape.kind != "text" and not isinstance(template, str)


def _examples(source: Source, shape: Shape) -> str:
    """Return `def examples(rows)`: the rows as TRL reads them."""
    if shape.kind == "chat" or shape.turns:
        if source.objective == "lm":
            return _CHATS
        source.notes.append(
            "a chat with several answers is a row for each, so that all of them are trained, and no question is"
        )
        return _ANSWERS_OF_CHATS
    if not _is_answered(source, shape):
        if shape.kind == "text" or isinstance(source.recipe.data.template, str):
            return _TEXTS
        source.notes.append("prompts and answers are joined as one text, all of which is trained")
        return _JOINED
    return _TURNED if source.plan["chat_template"] else _PLAIN


def _held_out(source: Source) -> str:
    reference, _ = source.held_out()
    if reference is None:
        share = source.held_out_share()
        if not share:
            return "train, held_out = rows, None"
        return f"train, held_out = rows.train_test_split({share!r}, seed=config.seed).values()"
    source.notes.append("the held-out rows are read as the training rows are")
    code = reading.held_out_reader(source, reference)
    return f"{code}\n\ntrain, held_out = rows, datasets.Dataset.from_list(examples(read_held_out()))"


def _model_init(source: Source) -> str:
    kind, double = source.take("quantization.kind"), source.take("quantization.double_quant")
    dtype = source.plan["dtype"] if source.recipe.method.name == "lora" else "float32"
    extra = "" if kind == "none" else f', "quantization_config": {quantization(kind, double)}'
    return f'\nconfig.model_init_kwargs = {{"dtype": "{dtype}"{extra}}}'


def _peft(source: Source) -> str:
    if source.recipe.method.name != "lora":
        return "peft_config = None"
    take = source.take
    start = take("method.init_lora_weights")
    if start == "loftq":
        source.notes.append("`init_lora_weights: loftq` is tune_magic's own; the matrices start as usual")
    options = {
        name: take(f"method.{name}")
        for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    }
    options["init_lora_weights"] = True if start in ("default", "loftq") else start
    lines = "\n".join(f"    {name}={value!r}," for name, value in options.items())
    return f'peft_config = LoraConfig(\n{lines}\n    task_type="CAUSAL_LM",\n)'


def _callbacks(source: Source) -> str:
    patience, threshold = source.take("eval.early_stopping_patience"), source.take("eval.early_stopping_threshold")
    if patience is None:
        return "[]"
    return f"[EarlyStoppingCallback({patience}, {threshold})]"


_USE = "python FILE; what it needs: pip install 'trl>=1.16' peft"
_CHATS = '''def examples(rows):
    """Return the chats; every turn is trained."""
    return [{"messages": chat(row)[0]} for row in rows]
'''
_ANSWERS_OF_CHATS = '''def examples(rows):
    """Return each answer with all that was said before it; the answers alone are trained."""
    found = []
    for row in rows:
        turns, answers = chat(row)
        plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        found += [{"prompt": plain[:place], "completion": [plain[place]]} for place in answers]
    return found
'''
_TEXTS = '''def examples(rows):
    """Return the texts; all of them is trained."""
    return [{"text": text(row)} for row in rows]
'''
_JOINED = '''def examples(rows):
    """Return prompts and answers as texts."""
    return [{"text": "\\n".join(question_and_answer(row)[:2])} for row in rows]
'''
_TURNED = '''def examples(rows):
    """Return prompts and answers as turns of a chat; the answers alone are trained."""
    found = []
    for asked, answer, system in map(question_and_answer, rows):
        before = [{"role": "system", "content": system}] if system else []
        turn = {"role": "assistant", "content": answer}
        found.append({"prompt": [*before, {"role": "user", "content": asked}], "completion": [turn]})
    return found
'''
_PLAIN = '''def examples(rows):
    """Return prompts and answers; the answers alone are trained."""
    found = []
    for asked, answer, system in map(question_and_answer, rows):
        found.append({"prompt": f"{system}\\n\\n{asked}" if system else asked, "completion": answer})
    return found
'''
_DATASETS = """rows = datasets.Dataset.from_list(examples(read_rows()))
{held_out}"""
_TRAINER = """trainer = SFTTrainer(
    model=MODEL, args=config, train_dataset=train, eval_dataset=held_out, peft_config=peft_config, callbacks={callbacks}
)

if __name__ == "__main__":
    trainer.train()
    trainer.save_model()
"""
