"""A plain script on transformers and peft that trains the same: the same rows in the same order, the same steps."""

from __future__ import annotations

import json
from typing import Any

from tune_magic.errors import TuneError
from tune_magic.handover import reading, script_parts
from tune_magic.handover.source import Shape, Source, comment

_MICROBATCH = 8  # rows computed at once; the result is the same for any number
_MARGIN = {"linear": "1 - progress", "cosine": "cosine(progress)", "cosine_with_restarts": "cosine(progress * {cycles} % 1)",
           "polynomial": "(1 - progress) ** {power}", "warmup_stable_decay": "min(1.0, (1 - progress) / {decay})"}  # fmt: skip
_OPTIMIZERS = {"adamw": "torch.optim.AdamW(groups, lr=RATE, betas={betas}, eps={eps})",
               "sgd": "torch.optim.SGD(groups, lr=RATE, momentum={beta1})",
               "adafactor": "torch.optim.Adafactor(groups, lr=RATE)"}  # fmt: skip


def write(source: Source) -> str:
    """Return the script.

    Raises:
        TuneError: The objective, the method or the rows are none that it could train.
    """
    source.need("script", ("sft", "lm"), ("lora", "full"))
    shape = source.shape()
    if shape.kind == "other":
        raise TuneError(f"The script could not read rows in the format `{shape.format}`.",
                        hint="It reads chats, prompts with answers, and texts.")  # fmt: skip
    if source.objective == "lm" and shape.kind != "text":
        source.notes.append("prompts and answers are joined as texts are, without a chat template")
    parts = [
        *_constants(source), reading.reader(source), *_held_out(source), reading.turner(source, shape), _pieces(source, shape),
        script_parts.ENCODE if source.objective == "sft" else script_parts.ENCODE_WHOLE,
        _model(source), _optimizer(source), _rate(source), script_parts.LOSS, _training(source),
    ]  # fmt: skip
    lines = source.heading(
        "a plain script: torch, transformers, peft, datasets",
        "python FILE; what it needs: pip install torch transformers peft datasets",
    )
    code = "\n\n".join(part.strip("\n") + "\n" for part in parts)
    return f"{comment(lines)}\n\n{script_parts.imports(code)}\n\n{code}"


def _constants(source: Source) -> list[str]:
    take = source.take
    values: dict[str, Any] = {
        "MODEL": source.model(), "OUTPUT": f"{source.slug}-{source.recipe.method.name}", "SEED": take("seed"), "BATCH_SIZE": take("batch_size"),
        "MICROBATCH": min(_MICROBATCH, source.recipe.batch_size), "MAX_LENGTH": take("max_length"),
        "TOTAL_STEPS": source.total_steps, "WARMUP_STEPS": source.warmup_steps, "RATE": take("learning_rate"),
        "WEIGHT_DECAY": take("weight_decay"), "MAX_GRAD_NORM": take("max_grad_norm"), "LABEL_SMOOTHING": take("label_smoothing_factor"),
        "EVAL_STEPS": source.plan["eval_steps"], "PATIENCE": take("eval.early_stopping_patience"), "THRESHOLD": take("eval.early_stopping_threshold"),
    }  # fmt: skip
    source.take_part("eval.steps")
    for key in ("num_train_epochs", "max_steps"):  # both are in the plan's number of steps
        take(key)
    for key in ("save_steps", "save_total_limit"):
        if key in source.set_keys():
            take(key)
            source.notes.append(f"`{key}`: the best model is kept, and nothing else")
    values["MAX_LENGTH"] = source.plan["max_length"]
    helps = {"MICROBATCH": "rows computed at once; any number gives the same", "PATIENCE": "evaluations without a better loss; None: all steps",
             "RATE": "peak learning rate", "BATCH_SIZE": "rows of an optimizer step"}  # fmt: skip
    return [
        "\n".join(
            f"{name} = {value!r}{'  # ' + helps[name] if name in helps else ''}" for name, value in values.items()
        )
    ]


def _held_out(source: Source) -> list[str]:
    """Return what tells the held-out rows from the others: a file, the same draw, or their numbers."""
    reference, count = source.held_out()
    source.take("data.group_by")
    if reference is not None:
        return [reading.held_out_reader(source, reference), script_parts.SPLIT_BY_FILE]
    drawn = source.objective == "sft" and source.recipe.data.group_by is None
    if drawn or not count:
        return [script_parts.SPLIT_BY_DRAW.format(count=count)]
    held = json.loads((source.run.path / "split.json").read_text(encoding="utf-8"))["held_out"]
    return [script_parts.SPLIT_BY_NUMBER.format(numbers=held)]


def _pieces(source: Source, shape: Shape) -> str:
    """Return `def pieces(row)`: the texts of a row, each with whether it is trained."""
    source.take("data.chat_template")
    if (
        source.objective == "lm"
        or (shape.kind == "text" and source.recipe.data.template is None)
        or isinstance(source.recipe.data.template, str)
    ):
        texts = {
            "chat": '"\\n".join(turn["content"] for turn in chat(row)[0])',
            "answer": '"\\n".join(question_and_answer(row)[:2])',
        }
        return f'def pieces(row):\n    """Return the text of a row; all of it is trained."""\n    return [({texts.get(shape.kind, "text(row)")}, True)]\n\n\nOPENS = True'
    if shape.kind == "chat" or shape.turns:
        return script_parts.CHAT_PIECES
    return (
        script_parts.ANSWER_AS_CHAT + script_parts.CHAT_PIECES
        if source.plan["chat_template"]
        else script_parts.PLAIN_PIECES
    )


def _model(source: Source) -> str:
    take, method = source.take, source.recipe.method
    dtype = source.plan["dtype"]
    take("dtype")
    quantized = take("quantization.kind")
    double = take("quantization.double_quant")
    options = [] if quantized == "none" else [f"quantization_config={quantization(quantized, double)}"]
    is_lora = method.name == "lora"
    loaded = dtype if is_lora else "float32"
    text = script_parts.MODEL.format(dtype=loaded, options="".join(f", {option}" for option in options))
    if source.recipe.gradient_checkpointing:
        take("gradient_checkpointing")
        text += "    model.gradient_checkpointing_enable()\n" + (
            "    model.enable_input_require_grads()\n" if is_lora else ""
        )
    if is_lora:
        text += _lora(source)
    return text + script_parts.MODEL_END.format(autocast=dtype == "bfloat16")


def _lora(source: Source) -> str:
    take = source.take
    start = take("method.init_lora_weights")
    if start == "loftq":
        source.notes.append("`init_lora_weights: loftq` is tune_magic's own; the matrices start as usual")
    options = {
        name: take(f"method.{name}")
        for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    }
    options["init_lora_weights"] = True if start in ("default", "loftq") else start
    return script_parts.LORA.format(options=", ".join(f"{name}={value!r}" for name, value in options.items()))


def quantization(kind: str, double: bool | None) -> str:
    """Return the code of bitsandbytes' configuration."""
    if kind == "int8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    return (f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={kind!r}, bnb_4bit_use_double_quant={double is not False}, "
            "bnb_4bit_compute_dtype=torch.bfloat16)")  # fmt: skip


def _optimizer(source: Source) -> str:
    take = source.take
    name, beta1, beta2, eps = take("optim"), take("adam_beta1"), take("adam_beta2"), take("adam_epsilon")
    if name not in _OPTIMIZERS:
        source.notes.append(f"`optim: {name}` is AdamW in the script")
    made = _OPTIMIZERS.get(name, _OPTIMIZERS["adamw"]).format(betas=(beta1, beta2), eps=eps, beta1=beta1)
    ratio = take("method.loraplus_lr_ratio") or 1.0
    return script_parts.OPTIMIZER.format(made=made, ratio=ratio)


def _rate(source: Source) -> str:
    """Return `def learning_rate(step)`, the schedule as `training/optimizer.py` has it."""
    name = source.take("lr_scheduler_type")
    options = source.recipe.lr_scheduler_kwargs
    source.take_part("lr_scheduler_kwargs")
    if name == "reduce_lr_on_plateau":
        source.notes.append("`lr_scheduler_type: reduce_lr_on_plateau` is constant in the script")
    if name in ("constant", "reduce_lr_on_plateau"):
        return script_parts.RATE.format(body="    return RATE")
    if name == "inverse_sqrt":
        return script_parts.RATE.format(
            body="    return RATE * math.sqrt(max(1, WARMUP_STEPS) / (max(1, WARMUP_STEPS) + step - WARMUP_STEPS - 1))"
        )
    factor = _MARGIN[name].format(cycles=options.num_cycles, power=options.power, decay=options.decay_ratio)
    least = options.min_lr_rate
    scaled = f"({factor})" if not least else f"({least} + {1 - least} * ({factor}))"
    body = f"    progress = (step - WARMUP_STEPS - 1) / max(1, TOTAL_STEPS - WARMUP_STEPS)\n    return RATE * {scaled}"
    cosine = script_parts.COSINE if "cosine" in name else ""
    return cosine + script_parts.RATE.format(body=body)


def _training(source: Source) -> str:
    if source.recipe.train_sampling_strategy != "random":
        source.take("train_sampling_strategy")
        source.notes.append("`train_sampling_strategy`: any rows meet in a step")
    return script_parts.TRAINING
