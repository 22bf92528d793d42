"""From a cell, a file or keywords to a Recipe, with every fault found at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tune_magic import plugins
from tune_magic.errors import Fault, RecipeError, TuneError
from tune_magic.recipe import yaml
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import MethodOptions, Recipe

# What people type -> the key. A dotted target is a key of a part.
ALIASES = {
    "base_model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "dataset": "data",
    "train_data": "data",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "warmup": "warmup_ratio",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "gradient_clipping": "max_grad_norm",
    "eval_steps": "eval.steps",
    "early_stopping_patience": "eval.early_stopping_patience",
    "precision": "dtype",
    "torch_dtype": "dtype",
}
METHOD_ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "type": "name"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_EXAMPLES = {
    "model": "`model: smollm2-135m-instruct`",
    "data": "`data: rows.jsonl`",
    "data.train": "`data: rows.jsonl`",
    "learning_rate": "Try `learning_rate: 2e-4`.",
    "num_train_epochs": "Try `num_train_epochs: 3`.",
    "batch_size": "Try `batch_size: 8`.",
    "method.r": "Try `r: 8`.",
    "method.lora_alpha": "Try `lora_alpha: 16`.",
    "data.held_out": "Try `held_out: 10%`.",
}


def load_recipe(text: str, overrides: Mapping[str, Any] | None = None, *, first_line: int = 1) -> Recipe:
    r"""Read a recipe from YAML.

    Args:
        text: The body of a cell or a file.
        overrides: Dotted keys from the line, which win: ``{"method.r": 8}``.
        first_line: Line number of the text's first line.

    Raises:
        RecipeError: With all faults, each with its line.

    Example:
        >>> load_recipe("model: tiny\ndata: rows.jsonl\nlr: 1e-3").learning_rate
        0.001
    """
    raw, lines = yaml.read(text, first_line=first_line)
    return build_recipe(raw, overrides, lines=lines)


def read_recipe_file(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe file.

    Raises:
        TuneError: No such file. RecipeError: faults in it.
    """
    try:
        return load_recipe(path.read_text(encoding="utf-8"), overrides)
    except OSError as error:
        raise TuneError(f"The recipe {path} cannot be read.", hint="Is the path right?") from error


def build_recipe(
    raw: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, lines: yaml.Lines | None = None
) -> Recipe:
    """Check a mapping and return the Recipe.

    Raises:
        RecipeError: With all faults.
    """
    faults: list[Fault] = []
    lines = dict(lines or {})
    content = _canonical(_with_overrides(raw, overrides or {}), faults, lines)
    method = _method(content.pop("method", "lora"), faults)
    try:
        recipe = Recipe.model_validate({**content, "method": method or MethodOptions(name="none")})
    except ValidationError as error:
        faults += [_fault(entry, Recipe) for entry in error.errors()]
    if faults:
        raise RecipeError([_placed(fault, lines) for fault in faults])
    return recipe


def build_launch(options: Mapping[str, Any]) -> LaunchOptions:
    """Check launch options and return them.

    Raises:
        RecipeError: With all faults.
    """
    try:
        return LaunchOptions.model_validate(options)
    except ValidationError as error:
        raise RecipeError([_fault(entry, LaunchOptions) for entry in error.errors()]) from None


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with the options of every installed method."""
    schema = Recipe.model_json_schema()
    options = {name: plugins.get("method", name).Options.model_json_schema() for name in plugins.names("method")}
    schema["$defs"] |= {f"method_{name}": content for name, content in options.items()}
    schema["properties"]["method"] = {
        "description": Recipe.model_fields["method"].description,
        "default": "lora",
        "anyOf": [{"enum": list(options)}, *({"$ref": f"#/$defs/method_{name}"} for name in options)],
    }
    schema["properties"]["data"] = {
        "description": Recipe.model_fields["data"].description,
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/DataOptions"}],
    }
    schema["properties"]["objective"]["enum"] = plugins.names("objective")
    schema["required"] = ["model", "data"]
    return schema


def keys() -> Iterator[tuple[str, type[BaseModel], str]]:
    """Yield ``(dotted key, owner, field)`` of every key a recipe may have, methods included."""
    parts: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    for prefix, owner in parts:
        for name, field in owner.model_fields.items():
            yield f"{prefix}{name}", owner, name
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                parts.append((f"{prefix}{name}.", field.annotation))
    for method in plugins.names("method"):
        options = plugins.get("method", method).Options
        yield from ((f"method.{name}", options, name) for name in options.model_fields if name != "name")


def _with_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    content = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    main = {"data": "train", "method": "name"}  # a word there is short for a mapping
    for key, value in overrides.items():
        head, _, rest = key.partition(".")
        if rest:
            part = content.get(head)
            content[head] = {**(part if isinstance(part, dict) else {main.get(head, "name"): part} if part else {})}
            content[head][rest] = value
        else:
            content[key] = value
    return content


def _canonical(raw: dict[str, Any], faults: list[Fault], lines: yaml.Lines) -> dict[str, Any]:
    """Replace aliases and short forms by the keys themselves."""
    content: dict[str, Any] = {}
    for key, value in raw.items():
        target = ALIASES.get(key, key)
        lines.setdefault(target, lines.get(key, 0))
        part, _, rest = target.partition(".")
        if rest:
            content[part] = {**(content.get(part) or {}), rest: value}
        elif target in content and target != "eval":
            faults.append(Fault(key, f"says the same as `{target}`.", "Keep one of the two.", lines.get(key) or None))
        elif target == "eval" and isinstance(value, Mapping):
            content["eval"] = {**(content.get("eval") or {}), **value}
        else:
            content[target] = value
    if isinstance(content.get("data"), str):
        content["data"] = {"train": content["data"]}
    if isinstance(content.get("data"), Mapping):
        content["data"] = _canonical_data(dict(content["data"]))
    _merge_batch(content, faults)
    for name, dtype in DTYPES.items():
        if name in content:
            if content.pop(name) is True:
                content["dtype"] = dtype
        elif content.get("dtype") == name:
            content["dtype"] = dtype
    return content


def _canonical_data(data: dict[str, Any]) -> dict[str, Any]:
    share = data.get("held_out")
    if isinstance(share, str) and share.strip().endswith("%"):
        try:
            data["held_out"] = float(share.strip()[:-1]) / 100
        except ValueError:
            return data
    elif isinstance(share, int) and not isinstance(share, bool):
        data["held_out"] = float(share)
    return data


def _merge_batch(content: dict[str, Any], faults: list[Fault]) -> None:
    """`per_device_train_batch_size` times `gradient_accumulation_steps` is the one number that matters."""
    per_device = content.pop("per_device_train_batch_size", None)
    accumulation = content.pop("gradient_accumulation_steps", None)
    if per_device is None and accumulation is None:
        return
    if "batch_size" in content:
        faults.append(Fault("batch_size", "already says the examples per step.", "Drop the other batch keys."))
    elif not all(isinstance(n, int) for n in (per_device or 1, accumulation or 1)):
        faults.append(Fault("per_device_train_batch_size", "must be a whole number.", "Try `batch_size: 8`."))
    else:
        content["batch_size"] = (per_device or 1) * (accumulation or 1)


def _method(raw: Any, faults: list[Fault]) -> MethodOptions | None:
    options = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(options, Mapping):
        faults.append(Fault("method", f"must be a name or a mapping, got {raw!r}.", "Try `method: lora`."))
        return None
    options = {METHOD_ALIASES.get(key, key): value for key, value in options.items()}
    name = options.setdefault("name", "lora")
    try:
        schema: type[MethodOptions] = plugins.get("method", str(name)).Options
    except TuneError as error:
        faults.append(Fault("method", error.message, error.hint))
        return None
    try:
        return schema.model_validate(options)
    except ValidationError as error:
        faults += [_fault(entry, schema, prefix="method") for entry in error.errors()]
        return None


def _fault(entry: Any, owner: type[BaseModel], prefix: str = "") -> Fault:
    """Say a pydantic error in the product's words."""
    names = [str(part) for part in entry["loc"] if part not in ("str", "float", "ColumnTemplate")]
    key = ".".join(filter(None, [prefix, *names]))
    value, context, kind = entry["input"], entry.get("ctx", {}), entry["type"]
    problem, advice = f"{entry['msg']}, got {value!r}.", _EXAMPLES.get(key)
    if kind == "extra_forbidden":
        problem, advice = "there is no such key.", _nearest(names, owner, prefix)
    elif kind == "missing":
        problem, advice = "is needed.", f"For example {advice}." if advice else None
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
        rule = next(f"{words[short]} {limit:g}" for short, limit in context.items() if short in words)
        problem = f"must be {rule}, got {value!r}."
    elif kind == "literal_error":
        problem, advice = f"must be {context['expected']}, got {value!r}.", _near_value(value, context["expected"])
    elif kind == "value_error":
        problem = str(context["error"])
    elif kind.endswith(("_parsing", "_type", "_from_float")):
        nouns = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
        problem = f"must be {nouns.get(kind.partition('_')[0], 'a mapping')}, got {value!r}."
    return Fault(key, problem, advice)


def _nearest(names: list[str], owner: type[BaseModel], prefix: str) -> str | None:
    for name in names[:-1]:
        nested = owner.model_fields[name].annotation if name in owner.model_fields else None
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            return None
        owner = nested
    known = list(owner.model_fields) + (list(ALIASES) if owner is Recipe else list(METHOD_ALIASES) if prefix else [])
    near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
    if near:
        return f"Did you mean `{near[0]}`?"
    return f"There are: {', '.join(owner.model_fields)}."


def _near_value(value: Any, expected: str) -> str | None:
    near = difflib.get_close_matches(str(value), expected.replace(" or ", ", ").replace("'", "").split(", "), n=1)
    return f"Did you mean `{near[0]}`?" if near else None


def _placed(fault: Fault, lines: yaml.Lines) -> Fault:
    """Give the fault the line of its key, or of the nearest key above it."""
    key = fault.key
    while key and not lines.get(key):
        key = key.rpartition(".")[0]
    return Fault(fault.key, fault.problem, fault.suggestion, fault.line or lines.get(key) or None)
