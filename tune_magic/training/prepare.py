"""From a recipe to everything the loop needs, with each resolved value in the plan."""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tune_magic import collector, files, plugins
from tune_magic.data.example import Example
from tune_magic.data.locate import data_path, fingerprints, held_out_source, identity, references
from tune_magic.data.table import Table
from tune_magic.errors import TuneError
from tune_magic.methods.base import Method
from tune_magic.models.compression import Compression
from tune_magic.models.find import ModelSource, find_model
from tune_magic.models.load import local_folder
from tune_magic.models.quantise import dequantise, footprint, num_parameters, quantise, stored_dtype
from tune_magic.models.teacher import Teacher, find_teacher, teacher_prints
from tune_magic.objectives.base import Objective
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.schema import MethodOptions, Recipe
from tune_magic.storage import fingerprint
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import FORMAT
from tune_magic.training import beside, checked, compress, memory, packing, retention, trunk
from tune_magic.training.dataset import Dataset, Rows
from tune_magic.training.engine import Engine, TokenEngine
from tune_magic.training.order import Order
from tune_magic.training.outputs import OutputEngine
from tune_magic.training.planner import Planner
from tune_magic.training.retention import Retention
from tune_magic.training.rows import RowEngine
from tune_magic.training.source import Progress
from tune_magic.training.vocabulary import Vocabulary, vocabulary_of

_EVALUATIONS = 8
_SAMPLED_STEPS = 8  # of which memory is planned
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")  # their first positions stand for padding
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Session:
    """All that one attempt at a run works with."""

    recipe: Recipe
    folder: Path
    log: EventLog
    control: Control
    plan: dict[str, Any]
    dataset: Dataset
    vocabulary: Vocabulary
    method: Method
    objective: Objective
    model: Any
    engine: Engine
    order: Order
    compared: Table  # held-out rows that base and run are both scored on
    base_held_out: Table  # the same by the base's tokens
    retention: Retention | None = None  # what keeps the model near its start

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """While inside, the model is the base, with the tokens it had; before the first step, or where it was added to."""
        was_base = self.method.without(self.model) if self.method.adds else contextlib.nullcontext()
        with was_base, self.vocabulary.hidden(self.method.inner(self.model)), beside.base_shown(self.engine):
            yield


def longest_example(recipe: Recipe, model_folder: Path, method: Method, vocabulary: Vocabulary) -> int:
    """Return the most tokens a row may have: the recipe's number, or fewer where the model has fewer positions left."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    wanted = recipe.max_length * vocabulary.stretch
    positions = getattr(config, "max_position_embeddings", None) or wanted + method.num_virtual_tokens
    positions -= method.num_virtual_tokens
    if config.model_type in _OFFSET_POSITIONS:
        positions -= config.pad_token_id + 1
    return min(wanted, int(positions))


def build_model(
    recipe: Recipe, model_folder: Path, objective: Objective, method: Method, dtype: torch.dtype, *,
    vocabulary: Vocabulary, compression: Compression | None = None, unpacked: bool = False,
) -> Any:  # fmt: skip
    """Load the base and let the method make it trainable; new parameters follow from the recipe's seed alone.

    Args:
        recipe: What is trained.
        model_folder: Of the base model.
        objective: Knows the form of the model.
        method: Applied to it.
        dtype: Precision of what is neither quantised nor trained; what is trained is in float32.
        vocabulary: Its tokens.
        compression: What was taken from the base; None: nothing.
        unpacked: Put the matrices of a quantised base back into plain layers, rounded as they are.
    """
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        base = load_base(
            recipe, model_folder, objective, dtype, compression=compression,
            keep_originals=method.makes_up_for_rounding,
        )  # fmt: skip
        base = dequantise(base) if unpacked else base
        vocabulary.extend(base)
        method.new_tokens = vocabulary.ids
        base.name_or_path = recipe.model  # what an adapter calls its base: the user's name, not a path of ours
        model = method.apply(base, objective.task)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()  # small steps would be lost in rounding
    return model


def load_base(
    recipe: Recipe, model_folder: Path, objective: Objective, dtype: torch.dtype, *,
    compression: Compression | None = None, keep_originals: bool = False,
) -> Any:  # fmt: skip
    """Load the model in the form that is trained: compressed, then quantised where the recipe says so, on its device.

    Args:
        recipe: Says how.
        model_folder: Of the base model.
        objective: Knows the form.
        dtype: Precision of what is not quantised.
        compression: What is taken from it.
        keep_originals: Leave quantised layers their matrices before rounding, as `original`.
    """
    quantised = recipe.quantization.is_on
    model = objective.load(model_folder, stored_dtype(model_folder) if quantised else dtype)
    if compression is not None:
        compression.apply(model)
    if not quantised:
        return model
    return quantise(model, recipe.quantization, dtype, device(), keep_originals=keep_originals)


def make_engine(recipe: Recipe, model: Any, method: Method, objective: Objective, dtype: torch.dtype) -> Engine:
    """Return the engine the objective computes with."""
    options: dict[str, Any] = {"dtype": dtype, "max_tokens": recipe.microbatch_tokens}
    engine: Engine
    match objective.engine:
        case "tokens":
            engine = TokenEngine(model, method, share_prefixes=recipe.share_prefixes, **options)
        case "rows":
            reads = objective.reads_features
            engine = RowEngine(model, method, share_prefixes=recipe.share_prefixes, reads_features=reads, **options)
        case "outputs":
            engine = OutputEngine(model, method, objective=objective, **options)
    engine.regularise(label_smoothing=recipe.label_smoothing_factor, noise_alpha=recipe.neftune_noise_alpha or 0.0)
    return engine


@collector.off()
def prepare(
    recipe: Recipe,
    folder: Path,
    log: EventLog,
    control: Control,
    inherited: dict[str, Any] | None = None,
    *,
    measure: bool = False,
    is_trial: bool = False,
    most_steps: int | None = None,
) -> Session:
    """Load data and model and log the plan.

    Everything that can be wrong with the data is found before the model's weights are read.

    Args:
        recipe: What to train.
        folder: The run folder.
        log: Takes the plan event.
        control: Checked between the slow parts.
        inherited: The plan of an earlier attempt, whose resolved values a resumed run keeps.
        measure: Take two dry steps to correct the forecast of memory, however much room there is.
        is_trial: Nothing will be trained: a teacher that would answer all rows is not asked.
        most_steps: Only so many steps will be trained: a teacher is asked for the rows of these alone.

    Raises:
        TuneError: Data or model are not those of the earlier attempt; no plan is logged then.
    """
    at_start = memory.level(device())
    source, teacher = find_model(recipe.model), find_teacher(recipe, folder.parent)
    model_folder = local_folder(source)
    method: Method = plugins.get("method", recipe.method.name)(recipe.method)
    vocabulary = vocabulary_of(recipe, folder, model_folder, method, control.check)
    rows = Rows(
        recipe, folder, vocabulary.tokenizer, longest_example(recipe, model_folder, method, vocabulary),
        look=control.check, tell=Progress(log).tell, teacher=None if is_trial else teacher,
        most_taught=most_steps and most_steps * recipe.batch_size,
    )  # fmt: skip
    dataset, objective = rows.dataset(), rows.objective
    _check_knobs(recipe, objective, dataset)
    beside.check_teacher(teacher, objective, vocabulary)
    base_held_out, compared = dataset.held_out, dataset.held_out
    if vocabulary.is_extended:
        longest = longest_example(recipe, model_folder, method, vocabulary.unextended())
        own = Rows(recipe, folder, vocabulary.base, longest, objective, look=control.check)
        base_held_out, places = own.read_again(held_out_source(recipe), compared)
        compared = compared.take(places)
    _keep_split(rows, folder)
    control.check()

    compression = _compression(
        recipe,
        folder,
        model_folder,
        objective,
        train=dataset.train,
        vocabulary=vocabulary,
        inherited=inherited,
        control=control,
    )
    model, dtype = _load(
        recipe, model_folder, objective, method, vocabulary=vocabulary, compression=compression, inherited=inherited
    )
    control.check()

    engine = make_engine(recipe, model, method, objective, dtype)
    paths = {reference: data_path(reference, folder) for reference in references(recipe).values()}
    prints = fingerprints(recipe, source.path or model_folder, paths.__getitem__) | _teacher_prints(teacher)
    own_model = [prints["model"], *([compression.facts["print"]] if compression else [])]
    checked.self_check(engine, recipe, objective, dataset.train, "+".join(own_model))
    kept_near = retention.retain(recipe, folder, engine, objective, rows=rows.earlier, look=control.check)
    beside.attach(
        engine, objective, vocabulary, also=retention.roles(recipe.retain), teacher=teacher, base=model_folder,
        load_base=lambda: _load_base(objective, model_folder, dtype), train=dataset.train,
        holds_base=method.adds and compression is None,
    )  # fmt: skip
    order = Order(
        len(dataset.train), recipe.batch_size, recipe.seed, _ranks(recipe, dataset.train), dataset.draws,
        fewest=objective.fewest_rows,
    )  # fmt: skip
    session = Session(
        recipe, folder, log, control, {}, dataset, vocabulary, method, objective, model, engine, order, compared,
        base_held_out, kept_near,
    )  # fmt: skip
    forecast = _plan_memory(session, inherited, measure=measure)
    forecast["memory"]["at_start"] = at_start
    session.plan = {
        **_facts_of_inputs(session, source, model_folder),
        "fingerprints": prints,
        "data_files": {reference: str(path) for reference, path in paths.items()},
        "identity": identity(recipe, prints),
        **rows.facts(dataset),
        **vocabulary.facts(),
        **beside.facts(engine, teacher),
        **retention.facts(recipe.retain),
        **({"compress": compression.facts} if compression else {}),
        **_facts_of_training(session),
        **forecast,
    }
    if inherited is not None:
        _refuse_changes(inherited, session.plan)
    log.append("plan", **session.plan)
    return session


def _compression(
    recipe: Recipe, folder: Path, model_folder: Path, objective: Objective, *, train: Table, vocabulary: Vocabulary,
    inherited: dict[str, Any] | None, control: Control,
) -> Compression | None:  # fmt: skip
    """Return what the run's model is made smaller by: what its folder says, or, at its first start, what is chosen now."""
    if not recipe.compress.is_on:
        return None
    found = compress.read(recipe, folder, inherited)
    if found is not None:
        return found
    bare = beside.AsLoaded(MethodOptions(name="none"))

    def loaded() -> Any:
        model = _load_base(objective, model_folder, torch.float32)
        vocabulary.extend(model)  # the rows have its tokens
        return model.to(device())

    found = compress.choose(
        recipe, folder, train, look=control.check,
        load=loaded,
        engine_of=lambda model: make_engine(recipe, model, bare, objective, torch.float32),
    )  # fmt: skip
    memory.give_back()
    return found


def _load(
    recipe: Recipe, folder: Path, objective: Objective, method: Method, *, vocabulary: Vocabulary,
    compression: Compression | None, inherited: dict[str, Any] | None,
) -> tuple[Any, torch.dtype]:  # fmt: skip
    """Return the model that the method was applied to, on its device, and the precision it is computed in."""
    dtype = resolve_dtype(recipe.dtype) if inherited is None else _DTYPES[inherited["dtype"]]
    if inherited is not None:
        torch.set_num_threads(inherited["threads"])  # another number of threads adds in another order
    torch.manual_seed(recipe.seed)
    np.random.seed(recipe.seed)
    precision = dtype if method.adds else torch.float32
    model = build_model(recipe, folder, objective, method, precision, vocabulary=vocabulary, compression=compression)
    model.to(device())
    return model, dtype


def _keep_split(rows: Rows, folder: Path) -> None:
    """Write down which rows a share held out of the training file."""
    if rows.held_out_rows is not None:
        split = {"format": FORMAT, "held_out": rows.held_out_rows.tolist()}
        files.write_json(folder / "split.json", split, durable=False)


def _check_knobs(recipe: Recipe, objective: Objective, dataset: Dataset) -> None:
    """Refuse keys that would change nothing, or with which nothing would be learned.

    Raises:
        TuneError: The objective's loss has no labels to smooth, or no rows to compare; or a rate that follows held-out
            loss has none to follow.
    """
    fewest = objective.fewest_rows
    if recipe.batch_size < fewest:
        raise TuneError(f"`batch_size: {recipe.batch_size}` is too few: this loss compares the rows of a step.",
                        hint=f"Take {fewest} or more; the more, the better it learns.")  # fmt: skip
    for rows, what, hint in ((dataset.train, "training", "Add rows."),
                             (dataset.held_out, "held-out", "Hold out more, or none: `data: {held_out: 0}`.")):  # fmt: skip
        if 0 < len(rows) < fewest:
            raise TuneError(f"This loss compares rows, and there are too few {what} rows ({len(rows)}).", hint=hint)
    if recipe.label_smoothing_factor and not objective.smooths:
        raise TuneError("`label_smoothing_factor` means nothing to this objective.", hint="Leave it out.")
    if recipe.lr_scheduler_type == "reduce_lr_on_plateau" and not dataset.held_out:
        raise TuneError("`reduce_lr_on_plateau` follows the held-out loss, and there are no held-out rows.",
                        hint="Hold some out, `data: {held_out: 10%}`, or take `cosine`.")  # fmt: skip


def _load_base(objective: Objective, folder: Path, dtype: torch.dtype) -> Any:
    """Load the model as it was before training, and before it was compressed."""
    with torch.random.fork_rng():
        return objective.load(folder, dtype)


def _teacher_prints(teacher: Teacher | None) -> dict[str, str]:
    """Return the teacher's fingerprint by its role, once it is fetched."""
    is_on_hub = teacher is not None and teacher.kind == "model" and teacher.path is None
    return teacher_prints(teacher, local_folder(find_model(teacher.name)) if is_on_hub and teacher else None)


def _refuse_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A resumed run must go on with the same recipe, data and model.

    Raises:
        TuneError: Naming each difference.
    """
    earlier = {**before, "recipe": build_recipe(before["recipe"]).normalised()}  # keys that came since, filled in
    differences = [
        f"{part}.{key} was {earlier[part].get(key)!r}, is {now[part].get(key)!r}"
        for part in ("recipe", "fingerprints")
        for key in sorted(earlier[part].keys() | now[part].keys())
        if earlier[part].get(key) != now[part].get(key)
    ]
    if differences:
        raise TuneError(
            f"This run cannot go on: {'; '.join(differences)}.",
            hint="Put the file back as it was, or start a new run.",
        )


def _ranks(recipe: Recipe, examples: Table) -> np.ndarray | None:
    """Return a number for each row by which rows of a step are alike; None where any rows may meet."""
    match recipe.train_sampling_strategy:
        case "group_by_length":
            return examples.lengths
        case "group_by_prefix":
            return np.argsort(packing.alike_together(examples))
        case _:
            return None


def device() -> torch.device:
    """Return the accelerator of this machine, else the CPU, as accelerate chooses it."""
    from accelerate import PartialState

    return torch.device(PartialState().device)


def resolve_dtype(name: str) -> torch.dtype:
    """Return the compute precision; auto is bfloat16 only where the hardware multiplies it faster than float32."""
    if name != "auto":
        return _DTYPES[name]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def total_steps(recipe: Recipe, order: Order) -> int:
    """Return the number of optimizer steps."""
    return recipe.max_steps or max(1, math.ceil(recipe.num_train_epochs * order.steps_per_epoch))


def _plan_memory(session: Session, inherited: dict[str, Any] | None, *, measure: bool) -> dict[str, Any]:
    """Choose how a step is computed and return what the plan says of it; a resumed run goes on as it was."""
    planner = Planner(session.engine, session.recipe, _heaviest_steps(session))
    if inherited is not None:
        tokens, twice = inherited["microbatch_tokens"], inherited.get("gradient_checkpointing", False)
        option = planner.option(tokens, gradient_checkpointing=twice)
    else:
        option = planner.choose()
        if measure or planner.is_tight(option):
            planner.measure(option, session.objective.loss_sum, session.control.check)
            option = planner.choose()
    planner.apply(option)
    return {
        "microbatch_tokens": option.microbatch_tokens,
        "gradient_checkpointing": option.gradient_checkpointing,
        "memory": planner.facts(option),
    }


def _heaviest_steps(session: Session) -> list[list[Example]]:
    """Return the examples of the steps of an epoch with the most tokens."""
    order, train = session.order, session.dataset.train
    lengths = train.lengths
    steps = range(1, min(order.steps_per_epoch, total_steps(session.recipe, order)) + 1)
    heaviest = heapq.nlargest(_SAMPLED_STEPS, steps, key=lambda step: int(lengths[order.rows(step)].sum()))
    return [[train[row] for row in order.rows(step)] for step in heaviest]


def _facts_of_inputs(session: Session, source: ModelSource, model_folder: Path) -> dict[str, Any]:
    """What goes in: recipe, versions, model."""
    recipe, model = session.recipe, session.model
    kept = recipe.quantization
    quantized = {"kind": kept.kind, "double_quant": kept.quantizes_scales, **footprint(model)} if kept.is_on else None
    return {
        "recipe": recipe.normalised(),
        "versions": fingerprint.versions(),
        "model": {"name": source.name, "origin": source.origin, "note": source.note, "folder": str(model_folder)},
        "parameters": num_parameters(model),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **({"quantization": quantized} if quantized else {}),
    }


def _facts_of_training(session: Session) -> dict[str, Any]:
    """Every resolved value of the training itself."""
    recipe, engine = session.recipe, session.engine
    steps = total_steps(recipe, session.order)
    kept = trunk.plan(engine, [session.dataset.train, session.dataset.held_out], session.folder)
    pays = recipe.cache_frozen_layers and steps > session.order.steps_per_epoch
    evaluations = recipe.eval.steps or max(1, math.ceil(steps / _EVALUATIONS))
    return {
        "device": str(engine.device),
        "threads": torch.get_num_threads(),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "total_steps": steps,
        "steps_per_epoch": session.order.steps_per_epoch,
        "eval_steps": evaluations,
        "save_steps": recipe.save_steps or evaluations,
        "base_first": not session.method.adds,
        "packed": engine.packed,
        "attention": engine.attention if engine.packed else "padded",
        "compiled": engine.compiled,
        "shares_prefixes": engine.packed and recipe.share_prefixes and not engine.has_dropout,
        "engine_note": engine.reason,
        "kept_layers": kept.depth if pays else 0,
        "kept_bytes": kept.size_bytes if pays else 0,
    }
