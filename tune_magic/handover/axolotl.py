"""A configuration for Axolotl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune_magic.data import hub
from tune_magic.data.read import kind_of
from tune_magic.errors import TuneError
from tune_magic.handover.source import Shape, Source, comment
from tune_magic.handover.trl import training_arguments
from tune_magic.recipe import yaml

VERSION = "0.19"
_NAMES = {  # Transformers' name -> Axolotl's, where it is another
    "per_device_train_batch_size": "micro_batch_size", "per_device_eval_batch_size": "eval_batch_size", "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler", "optim": "optimizer",
}  # fmt: skip
_UNKNOWN = ("label_smoothing_factor", "report_to", "save_strategy", "eval_strategy", "train_sampling_strategy")
_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
_ASKED = {"instruction": ("instruction", "input", "output"), "question_answer": ("question", "context", "answer"),
          "source_target": ("source", "", "target"), "prompt_completion": ("prompt", "", "completion")}  # fmt: skip


def write(source: Source) -> str:
    """Return the configuration.

    Raises:
        TuneError: The objective, the method or the rows are none that it knows.
    """
    source.need("axolotl", ("sft", "lm"), ("lora", "full"))
    shape = source.shape()
    content: dict[str, Any] = {"base_model": source.model(), "datasets": [_dataset(source, shape, source.whole_rows())]}
    reference, _ = source.held_out(whole=True)
    share = 0.0
    if reference is not None:
        content["test_datasets"] = [_dataset(source, shape, reference) | {"split": "train"}]
    else:
        share = source.held_out_share()
    content |= {
        "val_set_size": share,
        "train_on_inputs": False,
        "sequence_len": source.plan["max_length"],
        "excess_length_strategy": "truncate",
        "sample_packing": False,
    }
    source.take("max_length")
    content |= _adapter(source) | _arguments(source)
    lines = source.heading(f"Axolotl {VERSION}", "axolotl train FILE")
    return f"{comment(lines)}\n{yaml.write_for_others(content)}"


def _dataset(source: Source, shape: Shape, reference: str) -> dict[str, Any]:
    rows = hub.parse(reference) if hub.is_hub(reference) else None
    if rows is not None:
        found: dict[str, Any] = {"path": rows.id, "split": rows.split, **({"name": rows.subset} if rows.subset else {})}
    else:
        kind = _KINDS.get(kind_of(Path(reference)) or "")
        if kind is None:
            raise TuneError(f"Axolotl does not read {reference}.", hint="Save the rows as .jsonl and train on those.")
        found = {"path": reference, "ds_type": kind}
    return found | _type(source, shape)


def _type(source: Source, shape: Shape) -> dict[str, Any]:
    """Return how a row is read: as a chat, as a text, or as what is asked and what is answered."""
    columns, data = shape.columns, source.recipe.data
    if shape.kind == "other" or shape.turns or shape.format == "translation" or data.template is not None:
        raise TuneError(
            "Axolotl cannot read these rows as tune_magic does.",
            hint="Save them as chats (`messages`), or as prompt and completion.",
        )
    if shape.kind == "chat":
        column = columns[shape.format]
        names = (
            {"role": "from", "content": "value"}
            if shape.format == "conversations"
            else {"role": "role", "content": "content"}
        )
        roles = [] if source.objective == "sft" else ["user", "system"]
        return {
            "type": "chat_template",
            "field_messages": column,
            "message_property_mappings": names,
            "roles_to_train": ["assistant", *roles],
        }
    if shape.kind == "text":
        return {"type": "completion", "field": columns["text"]}
    if source.objective == "lm":
        raise TuneError("Axolotl cannot train prompts and answers as one text.", hint="Save them as rows of `text`.")
    if source.plan["chat_template"]:
        source.notes.append(
            "prompts are not wrapped in the chat template: Axolotl does so for chats alone; save the rows as `messages` to keep it"
        )
    asked, more, answer = _ASKED[shape.format]
    form = "{input}\n\n{instruction}" if shape.format == "question_answer" else "{instruction}\n\n{input}"
    found = {"field_instruction": columns[asked], "field_output": columns[answer], "format": form if more in columns else "{instruction}",
             "no_input_format": "{instruction}"}  # fmt: skip
    found |= {"field_input": columns[more]} if more in columns else {}
    found |= {"field_system": columns["system"], "system_format": "{system}\n\n"} if "system" in columns else {}
    return {"type": found}


def _adapter(source: Source) -> dict[str, Any]:
    take, kind = source.take, source.take("quantization.kind")
    found: dict[str, Any] = {}
    if kind == "int8":
        found["load_in_8bit"] = True
    elif kind != "none":
        double = take("quantization.double_quant") is not False
        found |= {
            "load_in_4bit": True,
            "bnb_config_kwargs": {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double},
        }
    if source.recipe.method.name == "full":
        return found
    targets, alpha, start = take("method.target_modules"), take("method.lora_alpha"), take("method.init_lora_weights")
    if alpha != int(alpha):
        source.notes.append(f"`lora_alpha: {alpha}` is a whole number there")
    found |= {
        "adapter": "qlora" if kind in ("nf4", "fp4") else "lora",
        "lora_r": take("method.r"),
        "lora_alpha": round(alpha),
        "lora_dropout": take("method.lora_dropout"),
    }
    found |= {"lora_target_linear": True} if targets == "all-linear" else {"lora_target_modules": targets}
    found |= {"peft_use_dora": True} if take("method.use_dora") else {}
    found |= {"peft_use_rslora": True} if take("method.use_rslora") else {}
    if start == "loftq":
        source.leave("method.init_lora_weights")
    elif start != "default":
        found["peft_init_lora_weights"] = start
    ratio = take("method.loraplus_lr_ratio")
    return found | ({"loraplus_lr_ratio": ratio} if ratio is not None else {})


def _arguments(source: Source) -> dict[str, Any]:
    arguments = training_arguments(source)
    source.leave("label_smoothing_factor")
    grouped = arguments.get("train_sampling_strategy") == "group_by_length"
    if arguments["lr_scheduler_type"] == "cosine_with_min_lr":
        least = arguments.pop("lr_scheduler_kwargs")["min_lr_rate"]
        arguments |= {"lr_scheduler_type": "cosine", "cosine_min_lr_ratio": least}
    patience = source.take("eval.early_stopping_patience")
    found = {_NAMES.get(key, key): value for key, value in arguments.items() if key not in _UNKNOWN}
    found |= {"group_by_length": True} if grouped else {}
    return found | ({"early_stopping_patience": patience} if patience is not None else {})
