"""A configuration for LLaMA-Factory, with the entry that its dataset_info.json needs."""

from __future__ import annotations

import json
from typing import Any

from tune_magic.data import hub
from tune_magic.errors import TuneError
from tune_magic.handover.source import Shape, Source, comment
from tune_magic.handover.trl import training_arguments
from tune_magic.recipe import yaml

VERSION = "0.9.5"
INFO = "dataset_info.json"
_USE = f"llamafactory-cli train FILE, in the folder that holds {INFO}; `--output` writes both"
_ASKED = {"instruction": ("instruction", "input", "output"), "question_answer": ("context", "question", "answer"),
          "source_target": ("source", "", "target"), "prompt_completion": ("prompt", "", "completion")}  # fmt: skip


def write(source: Source) -> str:
    """Return the configuration, with the content of dataset_info.json in its first comment.

    Raises:
        TuneError: The objective, the method or the rows are none that it knows.
    """
    source.need("llama-factory", ("sft", "lm"), ("lora", "full"))
    shape = source.shape()
    is_text = shape.kind == "text" or source.objective == "lm"
    if source.objective == "lm" and shape.kind != "text":
        raise TuneError("LLaMA-Factory pre-trains on rows of `text` alone.", hint="Save the rows so.")
    content: dict[str, Any] = {
        "model_name_or_path": source.model(),
        "stage": "pt" if is_text else "sft",
        "do_train": True,
    }
    info = {"train": _entry(source, shape, source.whole_rows())}
    content |= {"dataset": "train", "dataset_dir": ".", "cutoff_len": source.plan["max_length"]}
    source.take("max_length")
    source.take("data.chat_template")
    if not is_text and shape.kind != "chat" and not source.plan["chat_template"]:
        content["template"] = "empty"
    reference, _ = source.held_out(whole=True)
    if reference is not None:
        info["held_out"], content["eval_dataset"] = _entry(source, shape, reference), "held_out"
    else:
        content["val_size"] = source.held_out_share()
    content |= _adapter(source) | _arguments(source)
    lines = [*source.heading(f"LLaMA-Factory {VERSION}", _USE), f"{INFO}:", *json.dumps(info, indent=2).splitlines()]
    return f"{comment(lines)}\n{yaml.write_for_others(content)}"


def beside(text: str) -> dict[str, str]:
    """Return the files that belong beside a configuration, out of its comment."""
    lines = [line.removeprefix("# ").removeprefix("#") for line in text.splitlines() if line.startswith("#")]
    return {INFO: "\n".join(lines[lines.index(f"{INFO}:") + 1 :]) + "\n"}


def _entry(source: Source, shape: Shape, reference: str) -> dict[str, Any]:
    """Return what dataset_info.json says of rows."""
    columns, data = shape.columns, source.recipe.data
    if shape.kind == "other" or shape.turns or shape.format == "translation" or data.template is not None:
        raise TuneError("LLaMA-Factory cannot read these rows as tune_magic does.",
                        hint="Save them as chats (`messages`), or as prompt and completion.")  # fmt: skip
    rows = hub.parse(reference) if hub.is_hub(reference) else None
    found: dict[str, Any] = {"file_name": reference}
    if rows is not None:
        found = {"hf_hub_url": rows.id, "split": rows.split, **({"subset": rows.subset} if rows.subset else {})}
    system = {"system": columns["system"]} if "system" in columns else {}
    if shape.kind == "chat":
        tags = {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        }
        own = {"tags": tags} if shape.format == "messages" else {}
        return found | {"formatting": "sharegpt", "columns": {"messages": columns[shape.format], **system}, **own}
    if shape.kind == "text":
        return found | {"formatting": "alpaca", "columns": {"prompt": columns["text"]}}
    first, second, answer = _ASKED[shape.format]
    if second in columns and first in columns:
        source.notes.append("what is asked and what it is about are joined by one line break, not by two")
    asked = [columns[name] for name in (first, second) if name in columns]
    names = dict(zip(("prompt", "query"), asked, strict=False))
    return found | {"formatting": "alpaca", "columns": {**names, "response": columns[answer], **system}}


def _adapter(source: Source) -> dict[str, Any]:
    take, kind = source.take, source.take("quantization.kind")
    found: dict[str, Any] = {"finetuning_type": source.recipe.method.name}
    if kind == "int8":
        found["quantization_bit"] = 8
    elif kind != "none":
        found |= {
            "quantization_bit": 4,
            "quantization_type": kind,
            "double_quantization": take("quantization.double_quant") is not False,
        }
    if source.recipe.method.name == "full":
        return found
    targets, alpha, start = take("method.target_modules"), take("method.lora_alpha"), take("method.init_lora_weights")
    if alpha != int(alpha):
        source.notes.append(f"`lora_alpha: {alpha}` is a whole number there")
    names = "all" if targets == "all-linear" else targets if isinstance(targets, str) else ",".join(targets)
    found |= {
        "lora_rank": take("method.r"),
        "lora_alpha": round(alpha),
        "lora_dropout": take("method.lora_dropout"),
        "lora_target": names,
    }
    found |= {name: True for name in ("use_dora", "use_rslora") if take(f"method.{name}")}
    if start in ("pissa", "pissa_niter_16"):
        found |= {"pissa_init": True, "pissa_iter": 16 if start == "pissa_niter_16" else -1}
    elif start != "default":
        source.leave("method.init_lora_weights")
    ratio = take("method.loraplus_lr_ratio")
    return found | ({"loraplus_lr_ratio": ratio} if ratio is not None else {})


def _arguments(source: Source) -> dict[str, Any]:
    """Return Transformers' arguments, which it takes by their own names."""
    found = training_arguments(source)
    patience = source.take("eval.early_stopping_patience")
    return found | ({"early_stopping_steps": patience} if patience is not None else {})
