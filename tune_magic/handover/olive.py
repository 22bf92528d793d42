"""A workflow for Olive: one pass that trains LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune_magic.data import hub
from tune_magic.data.read import kind_of
from tune_magic.errors import TuneError
from tune_magic.handover.source import Shape, Source, comment
from tune_magic.handover.trl import training_arguments
from tune_magic.recipe import yaml
from tune_magic.recipe.schema import ColumnTemplate

VERSION = "0.13"
_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_ASKED = {"instruction": ("instruction", "input", "output"), "question_answer": ("context", "question", "answer"),
          "source_target": ("source", "", "target"), "prompt_completion": ("prompt", "", "completion")}  # fmt: skip
_LEFT_OUT = ("output_dir",)


def write(source: Source) -> str:
    """Return the workflow.

    Raises:
        TuneError: The objective, the method or the rows are none that it knows.
    """
    source.need("olive", ("sft", "lm"), ("lora",))
    shape = source.shape()
    if source.objective == "sft" and shape.kind != "text":
        source.notes.append("the whole of each row is trained, questions too: Olive knows no other way")
    reference, _ = source.held_out(whole=True)
    data = [{"name": "train", "type": "HuggingfaceContainer", **_rows(source, shape, source.whole_rows())}]
    if reference is not None:
        data.append({"name": "held_out", "type": "HuggingfaceContainer", **_rows(source, shape, reference)})
    elif source.plan["held_out_rows"]:
        source.leave("data.held_out")
        source.notes.append(
            f"all rows are trained: the {source.plan['held_out_rows']} that are held out here have no file of their own"
        )
    is_gpu = str(source.plan.get("device", "cuda")).startswith("cuda")
    system = {
        "device": "gpu" if is_gpu else "cpu",
        "execution_providers": ["CUDAExecutionProvider" if is_gpu else "CPUExecutionProvider"],
    }
    content = {
        "input_model": {"type": "HfModel", "model_path": source.model()}, "systems": {"local": {"type": "LocalSystem", "accelerators": [system]}},
        "data_configs": data, "passes": {"finetune": _pass(source, has_held_out=reference is not None)}, "host": "local", "target": "local",
        "output_dir": f"{source.slug}-lora",
    }  # fmt: skip
    lines = source.heading(f"Olive {VERSION}", "olive run --config FILE")
    return f"{comment(lines)}\n{yaml.write_for_others(content)}"


def _rows(source: Source, shape: Shape, reference: str) -> dict[str, Any]:
    rows = hub.parse(reference) if hub.is_hub(reference) else None
    if rows is not None:
        load: dict[str, Any] = {
            "data_name": rows.id,
            "split": rows.split,
            **({"subset": rows.subset} if rows.subset else {}),
        }
    else:
        kind = _KINDS.get(kind_of(Path(reference)) or "")
        if kind is None:
            raise TuneError(f"Olive does not read {reference}.", hint="Save the rows as .jsonl and train on those.")
        load = {"data_name": kind, "data_files": reference, "split": "train"}
    text = {
        "type": "text_generation_huggingface_pre_process",
        "strategy": "line-by-line",
        "max_seq_len": source.plan["max_length"],
        "pad_to_max_len": False,
    }
    source.take("max_length")
    return {"load_dataset_config": load, "pre_process_data_config": text | _text(source, shape)}


def _text(source: Source, shape: Shape) -> dict[str, Any]:
    """Return what of a row is the text."""
    columns, template = shape.columns, source.recipe.data.template
    source.take_part("data.template")
    if isinstance(template, str):
        return {"text_template": template}
    if isinstance(template, ColumnTemplate):
        return {"text_template": "\n".join(filter(None, (template.system, template.prompt, template.completion)))}
    if shape.kind == "chat" and shape.format == "messages":
        return {"chat_template": True, "message_col": columns["messages"]}
    if shape.kind == "text":
        return {"text_cols": [columns["text"]]}
    if shape.kind != "answer" or shape.turns or shape.format == "translation":
        raise TuneError(
            f"Olive cannot read rows in the format `{shape.format}`.",
            hint="Save them as `messages`, or as prompt and completion.",
        )
    if source.plan["chat_template"]:
        source.notes.append("prompts are not wrapped in the chat template: Olive does so for `messages` alone")
    names = [columns[name] for name in ("system", *_ASKED[shape.format]) if name in columns]
    return {"text_template": "\n".join(f"{{{name}}}" for name in names)}


def _pass(source: Source, *, has_held_out: bool) -> dict[str, Any]:
    take, kind = source.take, source.take("quantization.kind")
    found: dict[str, Any] = {
        "type": "LoRA",
        "r": take("method.r"),
        "alpha": take("method.lora_alpha"),
        "lora_dropout": take("method.lora_dropout"),
    }
    if kind in ("nf4", "fp4"):
        found |= {"type": "QLoRA", "quant_type": kind, "double_quant": take("quantization.double_quant") is not False}
    elif kind != "none":
        source.leave("quantization.kind")
    elif take("method.use_dora"):
        found["type"] = "DoRA"
    targets = take("method.target_modules")
    if targets == "all-linear":
        source.notes.append(
            "`target_modules: all-linear`: Olive takes the layers that are usual for the architecture, unless it is told their names"
        )
    else:
        found["target_modules"] = [targets] if isinstance(targets, str) else targets
    if kind in ("none", "int8"):
        found["torch_dtype"] = source.plan["dtype"]
    else:
        found["compute_dtype"] = source.plan["dtype"]
    arguments = {key: value for key, value in training_arguments(source).items() if key not in _LEFT_OUT}
    if not has_held_out:
        for key in (
            "eval_strategy",
            "eval_steps",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
        ):
            arguments.pop(key, None)
        source.leave("eval.steps")
        if arguments["lr_scheduler_type"] == "reduce_lr_on_plateau":
            source.notes.append(
                "`lr_scheduler_type: reduce_lr_on_plateau` has no held-out rows to follow: the rate is constant"
            )
            arguments["lr_scheduler_type"] = "constant"
            del arguments["lr_scheduler_kwargs"]
    arguments["warmup_ratio"] = 0.0  # or Olive's own comes on top
    return {
        **found,
        "train_data_config": "train",
        **({"eval_data_config": "held_out"} if has_held_out else {}),
        "training_args": arguments,
    }
