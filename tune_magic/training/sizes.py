"""The sizes job: what methods would train of a model, and what that takes, counted without its weights.

The model is built on torch's meta device, where tensors have shapes and no memory, and the method is put on it as in
training; so the numbers are those of a run's plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tune_magic import plugins
from tune_magic.errors import ModelError, TuneError
from tune_magic.methods.base import Method
from tune_magic.models import shrink
from tune_magic.models.find import ModelSource, find_model
from tune_magic.models.layers import heads_of
from tune_magic.models.load import quiet
from tune_magic.models.quantise import packed
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.schema import Recipe
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder
from tune_magic.training.optimizer import held_bytes
from tune_magic.training.prepare import resolve_dtype

_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "IMAGE_CLS": "AutoModelForImageClassification",
    "AUDIO_CLS": "AutoModelForAudioClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def sizes(run: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Count for each of the job's recipes, and log ``sizes``: one mapping each, with a ``problem`` where it cannot be.

    See `size` for what is in it. Returns the fields of the last state event.
    """
    recipes = [build_recipe(given) for given in run.info["options"]["recipes"]]
    found: list[dict[str, Any]] = []
    for recipe in recipes:
        control.check()
        log.append("progress", done=len(found), total=len(recipes))
        try:
            found.append(size(recipe, _config(find_model(recipe.model))))
        except ModelError:
            raise
        except TuneError as error:
            found.append({"problem": str(error)})
    log.append("result", sizes=found)
    return {"state": "finished"}


def size(recipe: Recipe, config: Any) -> dict[str, Any]:
    """Return what a recipe trains of a model and what that takes, JSON-ready.

    ``task`` and, of a classifier, ``classes`` (two, before rows tell); ``parameters`` in all, ``trained`` of them, and
    of these ``head`` in a head that is new; ``dtype``; bytes: ``weight_bytes`` with buffers, ``gradient_bytes``,
    ``optimizer_bytes``, ``checkpoint_bytes``. Activations are not among them: they depend on the rows.

    Args:
        recipe: Its data is not looked at.
        config: Transformers' configuration of the model.

    Raises:
        TuneError: The method trains nothing of this model, or the model has no such head.
    """
    task = task_of(recipe, config)
    method: Method = plugins.get("method", recipe.method.name)(recipe.method)
    dtype = resolve_dtype(recipe.dtype)
    precision = dtype if method.adds else torch.float32  # as a run loads it
    with torch.random.fork_rng(), torch.device("meta"):
        base = _empty(config, task, precision)
        shrink.shrink(base, shrink.first_of(base, recipe.compress))
        float_bytes, packed_bytes = packed(base, recipe.quantization) if recipe.quantization.is_on else (0, 0)
        model = method.apply(base, task)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    heads = {id(p) for head in heads_of(method.inner(model), task) for p in head.parameters()}
    trained_bytes, states = _bytes(trained), held_bytes(recipe, model)
    return {
        "task": task,
        **({"classes": config.num_labels} if task.endswith("_CLS") else {}),
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in trained),
        "head": sum(p.numel() for p in trained if id(p) in heads),
        "dtype": recipe.quantization.kind if packed_bytes else str(precision).removeprefix("torch."),
        "weight_bytes": _bytes([*parameters, *model.buffers()]) - float_bytes + packed_bytes,
        "gradient_bytes": trained_bytes,
        "optim": recipe.optim,
        "optimizer_bytes": states,
        "checkpoint_bytes": trained_bytes + states,
    }


def task_of(recipe: Recipe, config: Any) -> str:
    """Return PEFT's name of the task: the objective's, or, without one, what such models are trained for."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if recipe.objective is not None:
        return str(plugins.get("objective", recipe.objective.name).task)
    if any("CausalLM" in name or "LMHeadModel" in name for name in config.architectures or ()):
        return "CAUSAL_LM"
    writes = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return "CAUSAL_LM" if writes and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "SEQ_CLS"


def _config(source: ModelSource) -> Any:
    """Return a model's configuration; of one on the hub, it alone is fetched.

    Raises:
        ModelError: There is none, or Transformers does not know it.
    """
    from transformers import AutoConfig

    path = source.path
    try:
        if path is not None and path.suffix == ".gguf":
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        return AutoConfig.from_pretrained(path or source.name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The configuration of `{source.name}` cannot be read.") from error


def _empty(config: Any, task: str, dtype: torch.dtype) -> Any:
    """Return a model without weights, on the device that is current."""
    import transformers

    if task not in _HEADS:
        raise TuneError(f"What `{task}` trains is not counted before a run.", hint="`--dry-run` counts it.")
    try:
        with quiet():
            model = getattr(transformers, _HEADS[task]).from_config(config, dtype=dtype, trust_remote_code=False)
        if task == "FEATURE_EXTRACTION" and getattr(model, "pooler", None) is not None:
            model.pooler = None  # as `embed` has it
    except (ValueError, KeyError) as error:
        raise TuneError(f"A {config.model_type} model has no head for `{task}`.") from error
    return model


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
