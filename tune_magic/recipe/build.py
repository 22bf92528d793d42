"""From a cell, a file or keywords to a Recipe, with every fault found at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

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
    "optimizer": "optim",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "gradient_clipping": "max_grad_norm",
    "label_smoothing": "label_smoothing_factor",
    "eval_steps": "eval.steps",
    "early_stopping_patience": "eval.early_stopping_patience",
    "precision": "dtype",
    "torch_dtype": "dtype",
    "bnb_4bit_quant_type": "quantization.kind",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
}
METHOD_ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "type": "name"}
BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SCHEDULES = {  # Transformers' names for what is a key here: `warmup_steps`, `lr_scheduler_kwargs.min_lr_rate`
    "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine",
}  # fmt: skip
LOADS = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}
_SHORT = {
    "data": "train",
    "method": "name",
    "eval": "",
    "retain": "",
    "compress": "",
    "vocabulary": "corpus",
    "objective": "name",
    "quantization": "kind",
}  # what a word in a part's place means
_UNION_MEMBERS = frozenset(
    {"str", "float", "int", "ColumnTemplate", "list[str]", "list[int]", "dict[str,float]", "literal['balanced']"}
)  # fmt: skip
_WANTED = {
    "data": "a path, `$name` or a mapping with `train`",
    "data.held_out": "a file, `$name` or a share such as 10%",
    "data.template": "a text with `{column}` places or {system:, prompt:, completion:}",
    "vocabulary": "a corpus or a mapping with `corpus` or `tokens`",
    "retain": "a mapping such as {kl_base: 0.1}",
    "compress": "a mapping such as {drop_layers: 0.2}",
    "compress.drop_layers": "a share such as 0.2, a count or a list of layers",
    "quantization": "nf4, fp4, int8, none or a mapping with `kind`",
    "method.target_modules": "all-linear, a name or a list of names",
    "objective.class_weights": "balanced or a weight for each class",
}
_SHARES = ("data.held_out", "data.replay_share")  # may be written as 10%
_EXAMPLES = {
    "model": "`model: smollm2-135m-instruct`",
    "data": "`data: rows.jsonl`",
    "data.train": "`data: rows.jsonl`",
    "learning_rate": "Try `learning_rate: 2e-4`.",
    "num_train_epochs": "Try `num_train_epochs: 3`.",
    "batch_size": "Try `batch_size: 8`.",
    "method": "Try `method: lora`.",
    "objective": "Try `objective: classify`.",
    "method.r": "Try `r: 8`.",
    "method.lora_alpha": "Try `lora_alpha: 16`.",
    "vocabulary": "Try `vocabulary: corpus.txt`.",
    "data.held_out": "Try `held_out: 10%`.",
    "quantization": "Try `quantization: nf4`.",
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
    body = _Canonical(lines or {})
    body.take(raw)
    line = _Canonical({})
    line.take(overrides or {})
    content = _merge(body.keys, line.keys)
    faults = [*body.faults, *line.faults]
    method = _plugged("method", {"name": "lora"}, content, faults)
    if content.get("objective") is not None:
        content["objective"] = _plugged("objective", {}, content, faults)
    data = content.get("data")
    name = data.get("format") if isinstance(data, dict) else None
    if name is not None and name not in plugins.names("format"):
        near = _nearest_name(str(name), plugins.names("format"))
        faults.append(Fault("data.format", f"there is no format {name!r}.", near))
    try:
        recipe = Recipe.model_validate({**content, "method": method or MethodOptions(name="none")})
    except ValidationError as error:
        faults += _faults(error, Recipe)
    else:
        faults += [] if method is None else [*_unquantizable(method, recipe), *_uncompressible(method, recipe)]
    if faults:
        raise RecipeError([_placed(fault, body.lines) for fault in faults])
    return recipe


def build_launch(options: Mapping[str, Any]) -> LaunchOptions:
    """Check launch options and return them.

    Raises:
        RecipeError: With all faults.
    """
    try:
        return LaunchOptions.model_validate(options)
    except ValidationError as error:
        raise RecipeError(_faults(error, LaunchOptions)) from None


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with the options of every installed method."""
    schema = Recipe.model_json_schema()
    for kind, default in (("method", "lora"), ("objective", None)):
        options = {name: plugins.get(kind, name).Options.model_json_schema() for name in plugins.names(kind)}
        schema["$defs"] |= {f"{kind}_{name}": content for name, content in options.items()}
        names = [*options, *([None] if default is None else [])]
        schema["properties"][kind] = {
            "description": Recipe.model_fields[kind].description,
            "default": default,
            "anyOf": [{"enum": names}, *({"$ref": f"#/$defs/{kind}_{name}"} for name in options)],
        }
    schema["properties"]["data"] = {
        "description": Recipe.model_fields["data"].description,
        "anyOf": [{"type": "string"}, {"$ref": "#/$defs/DataOptions"}],
    }
    schema["$defs"]["DataOptions"]["properties"]["format"] |= {
        "anyOf": [{"enum": plugins.names("format")}, {"type": "null"}]
    }
    schema["required"] = ["model", "data"]
    return schema


def flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was written as dotted keys under their own names, unchecked.

    Example:
        >>> flat({"lr": 1e-3, "data": "rows.jsonl", "method": {"name": "lora", "rank": 8}})
        {'learning_rate': 0.001, 'data.train': 'rows.jsonl', 'method.name': 'lora', 'method.r': 8}
    """
    body = _Canonical({})
    body.take(raw)
    return body.keys


def keys() -> Iterator[tuple[str, type[BaseModel], str]]:
    """Yield ``(dotted key, owner, field)`` of every key a recipe may have, methods included."""
    parts: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    for prefix, owner in parts:
        for name, field in owner.model_fields.items():
            yield f"{prefix}{name}", owner, name
            if (part := _part(field.annotation)) is not None:
                parts.append((f"{prefix}{name}.", part))
    for kind in ("method", "objective"):
        for plugged in plugins.names(kind):
            options = plugins.get(kind, plugged).Options
            yield from ((f"{kind}.{name}", options, name) for name in options.model_fields if name != "name")


def choices(key: str, owner: type[BaseModel], name: str) -> list[str]:
    """Return the values a key may have, or, of a list, its items; none where it is free.

    Args:
        key: Dotted, as `keys` yields it, with its owner and field.
        owner: See there.
        name: See there.
    """
    kind = {"method.name": "method", "objective.name": "objective", "data.format": "format"}.get(key)
    return plugins.names(kind) if kind else _choices(owner.model_fields[name].annotation)


def _part(annotation: Any) -> type[BaseModel] | None:
    """Return the part of a recipe that a field holds, or may leave out; None where it holds something else."""
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return _part(members[0]) if len(members) == 1 else None
    if get_origin(annotation) is Annotated:
        return _part(get_args(annotation)[0])
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _choices(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if _part(annotation) is not None:
        return []
    return [choice for part in get_args(annotation) for choice in _choices(part)]


class _Canonical:
    """The keys of a body, or of a line, under their own names.

    Aliases, short forms, dotted keys and nested mappings all end as one flat mapping of dotted keys, two levels deep;
    what says the same thing twice is a fault.

    Args:
        lines: Line of each key as it was written.
    """

    def __init__(self, lines: yaml.Lines) -> None:
        self.keys: dict[str, Any] = {}
        self.lines = dict(lines)
        self.faults: list[Fault] = []
        self._written: dict[str, str] = {}

    def take(self, raw: Mapping[str, Any]) -> None:
        """Take every key of a mapping."""
        batch = {key: value for key, value in raw.items() if key in BATCH_KEYS}
        for key, value in raw.items():
            if key in DTYPES:
                self._take_flag(key, value, "dtype", DTYPES[key])
            elif key in LOADS:
                is_named = key == "load_in_4bit" and "bnb_4bit_quant_type" in raw  # which says the kind by itself
                self._take_flag(key, value, "quantization.kind", None if is_named else LOADS[key])
            elif key not in batch:
                self._put(ALIASES.get(key, key), value, key)
        if batch:
            self._take_batch(batch)

    def _put(self, key: str, value: Any, written: str) -> None:
        part, dot, rest = key.partition(".")
        if part in _SHORT and not dot:
            if isinstance(value, str) and _SHORT[part]:
                value = {_SHORT[part]: value}
            if isinstance(value, Mapping):
                for name, item in value.items():
                    aliases = METHOD_ALIASES if part == "method" else {}
                    self._put(f"{part}.{aliases.get(name, name)}", item, f"{written}.{name}")
                if not value:
                    self.keys.setdefault(part, {})
                return
        elif part == "method":
            key = f"method.{METHOD_ALIASES.get(rest, rest)}"
        if key in self._written:
            said = f"says the same as `{self._written[key]}`."
            self.faults.append(Fault(written, said, "Keep one of the two.", self.lines.get(written)))
            return
        self._written[key] = written
        self.lines.setdefault(key, self.lines.get(written) or self.lines.get(written.partition(".")[0], 0))
        if key in _SHARES:
            value = self._share(value, key, written)
        elif key == "dtype" and isinstance(value, str):
            value = DTYPES.get(value, value)
        elif key == "lr_scheduler_type" and isinstance(value, str):
            value = SCHEDULES.get(value, value)
        self.keys[key] = value

    def _share(self, value: Any, key: str, written: str) -> Any:
        """Read `10%` and whole numbers as shares."""
        if isinstance(value, str) and value.strip().endswith("%"):
            try:
                return float(value.strip()[:-1]) / 100
            except ValueError:
                problem, example = f"`{value}` is no share.", f"Try `{key.rpartition('.')[2]}: 10%`."
                self.faults.append(Fault(key, problem, example, self.lines.get(written)))
                return None
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def _take_flag(self, written: str, value: Any, key: str, meaning: str | None) -> None:
        """Read a flag that stands for the value of a key; None where another key says which."""
        if not isinstance(value, bool):
            problem = f"must be true or false, got {value!r}."
            advice = f"Or `{key.partition('.')[0]}: {meaning or LOADS[written]}`."
            self.faults.append(Fault(written, problem, advice, self.lines.get(written)))
        elif value and meaning is not None:
            self._put(key, meaning, written)

    def _take_batch(self, batch: Mapping[str, Any]) -> None:
        """`per_device_train_batch_size` times `gradient_accumulation_steps` is the one number that matters."""
        product = 1
        for key, value in batch.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problem = f"must be a whole number of at least 1, got {value!r}."
                self.faults.append(Fault(key, problem, "Try `batch_size: 8`.", self.lines.get(key)))
                return
            product *= value
        self._put("batch_size", product, next(iter(batch)))


def _merge(body: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    """Let the line win over the body, and nest the dotted keys again."""
    merged = dict(body)
    for kind, default in (("method", "lora"), ("objective", None)):  # another one has other options
        if line.get(f"{kind}.name") not in (None, body.get(f"{kind}.name", default)):
            merged = {key: value for key, value in merged.items() if key.partition(".")[0] != kind}
    merged |= line
    nested: dict[str, Any] = {}
    for key, value in merged.items():
        part, dot, rest = key.partition(".")
        if not dot:
            nested.setdefault(part, value)
        elif isinstance(nested.setdefault(part, {}), dict):
            nested[part][rest] = value
    for deep in [key for key in nested.get("data", {}) if "." in key] if isinstance(nested.get("data"), dict) else []:
        part, _, rest = deep.partition(".")  # data.template.prompt on a line
        inner = nested["data"].get(part)
        nested["data"][part] = {**(inner if isinstance(inner, Mapping) else {}), rest: nested["data"].pop(deep)}
    return nested


def _plugged(kind: str, default: Mapping[str, Any], content: dict[str, Any], faults: list[Fault]) -> Any:
    """Take the options of a plug-in out of a recipe's content, checked by its own keys; None where they have faults."""
    raw = content.pop(kind, default)
    if not isinstance(raw, Mapping):
        faults.append(Fault(kind, f"must be a name or a mapping, got {raw!r}.", _EXAMPLES[kind]))
        return None
    options = {**default, **raw}
    if "name" not in options:
        faults.append(Fault(f"{kind}.name", "is needed.", _EXAMPLES[kind]))
        return None
    name = str(options["name"])
    if name not in plugins.names(kind):
        near = _nearest_name(name, plugins.names(kind))
        faults.append(Fault(kind, f"There is no {kind} `{name}`.", near))
        return None
    try:
        schema: type[BaseModel] = plugins.get(kind, name).Options
        return schema.model_validate(options)
    except TuneError as error:
        faults.append(Fault(kind, error.message, error.hint))
    except ValidationError as error:
        faults += _faults(error, schema, prefix=kind)
    return None


def _unquantizable(options: MethodOptions, recipe: Recipe) -> list[Fault]:
    """Return the fault of a method that cannot be trained on a base kept as the recipe says."""
    why = plugins.get("method", options.name)(options).why_not_on(recipe.quantization)
    if why is None:
        return []
    advice = (
        "Take `method: lora`, or leave `quantization` out." if recipe.quantization.is_on else _EXAMPLES["quantization"]
    )
    return [Fault("quantization", f"does not go with `method: {options.name}`: {why}.", advice)]


def _uncompressible(options: MethodOptions, recipe: Recipe) -> list[Fault]:
    """Return the faults of weights that are bound to some values beside a method that trains something else."""
    if plugins.get("method", options.name).in_place:
        return []
    why = f"binds the weights themselves, and `method: {options.name}` trains others beside them: folded in, they would not keep to it"
    return [
        Fault(f"compress.{key}", f"{why}.", "Take `method: full`, or `drop_layers`, `prune_neurons`, `prune_heads`.")
        for key in recipe.compress.constrains
    ]


def _faults(error: ValidationError, owner: type[BaseModel], prefix: str = "") -> list[Fault]:
    """Say pydantic's errors in the product's words, one for each key: the members of a union complain apart."""
    found: dict[str, Fault] = {}
    for entry in error.errors():
        fault = _fault(entry, owner, prefix)
        found.setdefault(fault.key, fault)
    return [fault for key, fault in found.items() if not any(other.startswith(f"{key}.") for other in found)]


def _fault(entry: Any, owner: type[BaseModel], prefix: str = "") -> Fault:
    """Say a pydantic error in the product's words."""
    names = [str(part) for part in entry["loc"] if part not in _UNION_MEMBERS]
    key = ".".join(filter(None, [prefix, *names]))
    value, context, kind = entry["input"], entry.get("ctx", {}), entry["type"]
    problem, advice = f"{entry['msg']}, got {value!r}.", _EXAMPLES.get(key)
    if kind == "extra_forbidden":
        problem, advice = "there is no such key.", _nearest(names, owner, prefix)
    elif kind == "missing":
        problem, advice = "is needed.", f"For example {advice}." if advice else None
    elif kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
        rule = next(
            f"{words[short]} {limit if isinstance(limit, int) else format(limit, 'g')}"
            for short, limit in context.items()
            if short in words
        )
        problem = f"must be {rule}, got {value!r}."
    elif kind == "literal_error" and key in _WANTED:
        problem = f"must be {_WANTED[key]}, got {value!r}."
    elif kind == "literal_error":
        problem, advice = f"must be {context['expected']}, got {value!r}.", _near_value(value, context["expected"])
    elif kind == "value_error":
        problem = str(context["error"])
    elif kind == "finite_number":
        problem = f"must be finite, got {value!r}."
    elif kind.endswith(("_parsing", "_type", "_from_float")):
        nouns = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
        noun = _WANTED.get(key) or nouns.get(kind.partition("_")[0], "a mapping")
        problem = f"must be {noun}, got {value!r}."
    return Fault(key, problem, advice)


def _nearest(names: list[str], owner: type[BaseModel], prefix: str) -> str | None:
    for name in names[:-1]:
        nested = owner.model_fields[name].annotation if name in owner.model_fields else None
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            return None
        owner = nested
    if owner is Recipe and (parts := _parts_with(names[-1])):
        return f"It belongs under {' or '.join(f'`{part}:`' for part in parts)}."
    known = list(owner.model_fields) + (list(ALIASES) if owner is Recipe else list(METHOD_ALIASES) if prefix else [])
    near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
    if near:
        return f"Did you mean `{near[0]}`?"
    return f"There are: {', '.join(owner.model_fields)}."


def _parts_with(name: str) -> list[str]:
    """Return the parts of a recipe that have a key; every plug-in has a name."""
    annotations = {part: field.annotation for part, field in Recipe.model_fields.items()}
    return [
        part
        for part, annotation in annotations.items()
        if isinstance(annotation, type)
        and issubclass(annotation, BaseModel)
        and name in annotation.model_fields.keys() - {"name"}
    ]


def _nearest_name(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{f'Did you mean `{near[0]}`? ' if near else ''}There are: {', '.join(known)}."


def _near_value(value: Any, expected: str) -> str | None:
    near = difflib.get_close_matches(str(value), expected.replace(" or ", ", ").replace("'", "").split(", "), n=1)
    return f"Did you mean `{near[0]}`?" if near else None


def _placed(fault: Fault, lines: yaml.Lines) -> Fault:
    """Give the fault the line of its key, or of the nearest key above it."""
    key = fault.key
    while key and not lines.get(key):
        key = key.rpartition(".")[0]
    return Fault(fault.key, fault.problem, fault.suggestion, fault.line or lines.get(key) or None)
