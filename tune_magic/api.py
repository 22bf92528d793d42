"""The three verbs in Python, and how to find runs again. The exact twins of the magics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_magic import checkup, display, explaining, launching, tables, trying
from tune_magic.ballot import RATER, Ballot, open_ballot
from tune_magic.chatting import Chat
from tune_magic.checkup import CheckUp
from tune_magic.comparing import ComparedRuns, names_of
from tune_magic.data.hub import is_hub
from tune_magic.errors import ModelError, RunFailed, TuneError
from tune_magic.evaluation.report import BASELINES
from tune_magic.executors import local
from tune_magic.explaining import Explanation, MethodList
from tune_magic.follow import follow, follow_in_background, follow_job
from tune_magic.handles import Export, Report, Run
from tune_magic.inspecting import DataReport
from tune_magic.models.find import find_model, installed
from tune_magic.recipe.build import build_launch, build_recipe, read_recipe_file
from tune_magic.recipe.combination import Combination
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import Recipe
from tune_magic.stacking import AdapterStack
from tune_magic.storage import places
from tune_magic.trying import TriedMethods
from tune_magic.view.html import note_bundle

last: Run | None = None


def finetune(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    name: str | None = None,
    background: bool = False,
    fresh: bool = False,
    now: bool = False,
    budget: str | None = None,
    dry_run: bool = False,
    find_lr: bool = False,
    executor: str = "worker",
    traceback: bool = False,
    output: str | None = None,
    **keys: Any,
) -> Run:
    """Fine-tune a model; the twin of ``%%finetune``.

    A recipe that was trained before is recognised: a live run is shown, a stopped one goes on, a finished one is
    returned at once.

    Args:
        recipe: A recipe file, a mapping, or a Recipe; None when `keys` say it all.
        name: Name of the run.
        background: Return at once.
        fresh: Train again although the same run is there.
        now: Start at once although another run holds the device; without it a run waits for those before it.
        budget: A time such as ``10m``: the run ends within it, evaluated and saved, and can be resumed.
        dry_run: Show the plan and train nothing.
        find_lr: Train a few steps at rising learning rates (Smith 2015, arXiv:1506.01186), show loss against rate, and keep
            nothing; ``.metrics["learning_rate"]`` of what is returned is the rate to take.
        executor: ``worker`` for a process of its own, ``inline`` for this one.
        traceback: Show the worker's whole traceback when it fails.
        output: Folder for runs; default: ``tune_runs`` beside the notebook.
        **keys: Keys of a recipe, which win over `recipe`; ``data`` may be a DataFrame or a list of dicts.

    Returns:
        The run, finished unless `background`.

    Raises:
        RecipeError: Every fault at once. Stopped: It was stopped. RunFailed: It failed; ``.run`` has its log.

    Example:
        >>> run = tune_magic.finetune(model="smollm2-135m-instruct", data="rows.jsonl")  # doctest: +SKIP
    """
    options = {
        "background": background, "fresh": fresh, "now": now, "budget": budget, "dry_run": dry_run, "find_lr": find_lr, "executor": executor,
        "traceback": traceback, "output": output,
    }  # fmt: skip
    plain, objects = tables.take_out(keys)
    return launch(_recipe(recipe, plain), build_launch(options), name=name, objects=objects)


def launch(
    recipe: Recipe,
    options: LaunchOptions,
    *,
    name: str | None = None,
    objects: Mapping[str, Any] | None = None,
    link: Mapping[str, Any] | None = None,
    recipe_text: str | None = None,
) -> Run:
    """Start, re-find or resume the run of a recipe and show it; what both `finetune` and the magics do.

    Args:
        recipe: What to train.
        options: How to start it.
        name: Name of the run.
        objects: Values of the recipe's ``$names``: DataFrames or lists of dicts.
        link: Facts about the notebook: path, cell id, source and its hash.
        recipe_text: The recipe as written.
    """
    about: dict[str, Any] = {"name": name, "link": link, "recipe_text": recipe_text}
    if options.trial is not None:
        return _show_trial(options.trial, recipe, options, objects or {}, about)
    run, note = begin(recipe, options, objects=objects, **about)
    if note == launching.FOUND:
        display.show(run.card(note), run=run)
        return run
    if note is not None:
        display.show(note_bundle(note))
    return _show(run, options)


def begin(recipe: Recipe, options: LaunchOptions, **about: Any) -> tuple[Run, str | None]:
    """Start, re-find or resume the run of a recipe, and show nothing: `launching.begin`, remembered as `last`."""

    def remember(run: Run) -> None:
        global last  # noqa: PLW0603 - `tune_magic.last` is part of the interface
        last = run

    return launching.begin(recipe, options, known=remember, **about)


def inspect(data: Any, *, model: str | None = None, **keys: Any) -> DataReport:
    """Look at rows before training on them and show the report; twin of ``%tune data``.

    Args:
        data: A file, a hub id, a DataFrame, a list of dicts, or a mapping with ``train`` and more.
        model: Whose tokenizer counts. Default: the last run's, else the first that is installed.
        **keys: Keys of a recipe: ``max_length``, ``objective``, ``data.columns`` ...

    Raises:
        DataError: The rows are none that can be trained on, with file, line and column.
    """
    plain, objects = tables.take_out({"model": model or _usual_model(), "data": data})
    with launching.scratch_job("data", build_recipe(plain, keys), build_launch({}), objects, name="data") as job:
        live = display.Live()
        try:
            follow_job(job, live)
        except RunFailed as error:
            raise _without_log(error) from None
        report = DataReport(job)
    live.update(report.card())
    display.mark_shown(report.path)
    return report


def explain(name: str, *, model: str | None = None, **keys: Any) -> Explanation:
    """Say what a method, an objective, or anything else with a name in a recipe does; twin of ``%tune explain``.

    Args:
        name: ``lora``, ``dora``, ``focal``, ``cosine``, ``messages``, ``learning_rate`` ...
        model: Whose parameters are counted. Default: the last run's, else the first that is installed, if any.
        **keys: Keys of a recipe, those of the method without `method.` too: ``r=8``, ``objective="classify"`` ...

    Raises:
        TuneError: There is nothing of this name, with the nearest.

    Example:
        >>> tune_magic.explain("lora", r=8).numbers["trained"]  # doctest: +SKIP
    """
    try:
        return explaining.explain(name, model or _model_if_any(), keys)
    except (ModelError, RunFailed):
        if model is not None:
            raise
        return explaining.explain(name, None, {})


def list_methods(*, model: str | None = None, **keys: Any) -> MethodList:
    """List every method, its variants, and what each trains of a model; twin of ``%tune methods``.

    Args:
        model: As for `explain`.
        **keys: Keys of a recipe, but for the method: ``objective="classify"`` ...
    """
    try:
        return explaining.list_methods(model or _model_if_any(), keys)
    except (ModelError, RunFailed):
        if model is not None:
            raise
        return explaining.list_methods(None, {})


def try_methods(
    methods: Sequence[str | Mapping[str, Any]],
    *,
    data: Any,
    model: str | None = None,
    budget: str | None = None,
    executor: str = "worker",
    output: str | None = None,
    link: Mapping[str, Any] | None = None,
    **keys: Any,
) -> TriedMethods:
    """Train several methods on the same rows, one after the other, and compare them; twin of ``%tune methods --try``.

    Each is a run of its own that is kept, at the usual learning rate of its method unless one is given for all.

    Args:
        methods: Names of methods and variants, or mappings with `name` and keys of a method.
        data: As for `finetune`.
        model: Default: the last run's, else the first that is installed.
        budget: Time for each, such as ``5m``. Runs are then new ones; without it, those that are there are taken.
        executor: ``worker`` for a process each, ``inline`` for this one.
        output: Folder for runs.
        link: Facts about the notebook.
        **keys: Keys of a recipe, the same for all: ``max_steps=50``, ``objective="classify"`` ...

    Raises:
        TuneError: There is no such method. A method that does not fit the model is a row with the reason.
    """
    plain, objects = tables.take_out({"model": model or _usual_model(), "data": data})
    recipes = trying.recipes_of(methods, plain, keys)
    options = {"executor": executor, "output": output, "budget": budget, "fresh": budget is not None}
    title = trying.title_of(plain["model"], data)
    return trying.try_methods(recipes, build_launch(options), begin, title, objects=objects, link=link)


def evaluate(
    run: Run | str,
    data: Any = None,
    metrics: Sequence[str] | str | None = None,
    against: Run | str | Sequence[Run | str] = "base",
    *,
    by: Sequence[str] | str | None = None,
    baselines: Sequence[str] | str | None = None,
    shots: int | None = None,
    probe: bool = False,
    max_new_tokens: int | None = None,
    limit: int | None = None,
) -> Report:
    """Score base and tuned, and other runs, over the same rows; the twin of ``%evaluate``.

    What a model said of rows is kept: a base is asked once, whichever of its runs is evaluated.

    Args:
        run: A run, or its name or id.
        data: Rows: a file, a DataFrame or a list of dicts. Default: the recipe's ``test``, else its held-out rows.
        metrics: Names, or one text with commas; README lists them. Default: loss, perplexity, exact_match and rouge_l of
            texts; accuracy, macro_f1 and loss of classes; else those of the objective.
        against: Other runs to compare with, beside the base, which always is.
        by: Columns of the rows, or one text with commas: rows are scored value by value, too; numbers in four parts,
            ``length`` is that of a row in tokens.
        baselines: What the base does without training when it is asked better: ``few`` puts some training rows before
            each question, ``rag`` those nearest to it; ``zero`` is the base as it is, which is always there.
        shots: Training rows before each question; default: 4, fewer where a row would be too long.
        probe: Also ask a general set, questions and prose that have nothing to do with the rows, to see what was forgotten.
        max_new_tokens: Longest answer; default: half as much again as the longest reference.
        limit: Only this many rows.

    Raises:
        Stopped: It was stopped. RunFailed: It failed, such as over runs that find other things.
    """
    run = resolve(run)
    named = [against] if isinstance(against, Run | str) else against
    others = [resolve(other) for other in named if other != "base"]
    asked = _names(baselines) or []
    unknown = [name for name in asked if name not in BASELINES]
    if unknown:
        raise TuneError(f"There is no baseline {unknown[0]!r}.", hint=f"There are: {', '.join(BASELINES)}.")
    for one in (run, *others):
        one.best_checkpoint  # noqa: B018 - without one, say so before a worker is started
    given = {}
    if data is not None and not isinstance(data, str | Path):
        given, data = tables.serialise({"data": data}), "$data"
    wanted = _names(metrics)
    options = {
        "data": None if data is None else _absolute(data), "metrics": wanted, "by": _names(by),
        "against": [str(other.path) for other in others], "baselines": asked, "shots": shots,
        "max_new_tokens": max_new_tokens, "limit": limit, **({"probe": True} if probe else {}),
    }  # fmt: skip
    plugged = [("metric", name) for name in wanted or ()]
    plugged += [(code["kind"], code["name"]) for other in others for code in other.info.get("cell_code", ())]
    job = launching.new_job(run, "evaluate", options, plugged)
    tables.write(job.path, given)
    local.start(job.path)
    live = display.Live(run)
    follow_job(job, live)
    report = Report(job.path)
    live.update(report.card())
    display.mark_shown(report.path)
    return report


def rate(
    of: Report | Run | str,
    against: Run | str = "base",
    *,
    limit: int | None = None,
    seed: int = 0,
    rater: str = RATER,
) -> Ballot:
    """Vote blind on pairs of answers, in a panel; the twin of ``%tune rate``.

    The answers are those of an evaluation. Which of the two is shown as A is drawn anew for each row and rater.

    Args:
        of: A report; or a run, its name or id, of which the newest evaluation is taken that holds both answers.
        against: Whose answers are beside the tuned model's: the base, another run, ``few-shot`` or ``retrieval``.
        limit: Rate so many rows; default: 100. Rows with two equal answers are ties, and not shown.
        seed: Of the rows, their order, and which answer is A.
        rater: Who votes. Opened again under this name, the rating goes on where it was.

    Raises:
        TuneError: There are no answers to rate, with the line that makes some.

    Example:
        >>> tune_magic.rate("support_bot", rater="ann")  # doctest: +SKIP
        >>> report.rating()  # doctest: +SKIP
    """
    if limit is not None and limit < 1:
        raise TuneError(f"`limit` must be at least 1, got {limit}.")
    return open_ballot(load_run(of) if isinstance(of, str) else of, against, limit=limit, seed=seed, rater=rater)


def export(
    run: Run | str,
    to: str,
    *,
    quantize: str | None = None,
    rows: int | None = None,
    tolerance: float | None = None,
    output: str | Path | None = None,
    beside: Sequence[Run | str] = (),
    device: str | None = None,
) -> Export:
    """Write the tuned model for other programs, and compare the files with the model; the twin of ``%export``.

    Args:
        run: A run, or its name or id.
        to: ``adapter`` (PEFT's format), ``merged`` (a plain Transformers model), ``onnx``, ``genai`` (ONNX Runtime
            GenAI), ``gguf`` (llama.cpp), ``onnx_adapters`` (an ONNX base with a file for each run), or a plug-in's name.
        quantize: Numbers of fewer bits, such as ``int8``; each format knows its own and says which.
        rows: Held-out rows to compare on; default: 200 to classify, 8 to answer.
        tolerance: Largest logit difference allowed, as a share of the largest logit; default: by format.
        output: A folder that does not exist yet; default: inside the run folder.
        beside: Other runs on the same base, written into the same folder; only ``onnx_adapters`` does that.
        device: Where an ONNX graph is to run: ``cpu``, ``cuda`` or ``npu``.

    Raises:
        TuneError: The run has no such form. RunFailed: It failed, or the files are not the model within tolerance;
            they are kept then, and ``tune_magic.last.exports`` has the receipt.
    """
    run = resolve(run)
    job = launching.begin_export(
        run, to, quantize=quantize, rows=rows, tolerance=tolerance, output=output, device=device,
        beside=[resolve(other) for other in beside],
    )  # fmt: skip
    live = display.Live(run)
    try:
        follow_job(job, live)
    finally:
        if (job.path / "receipt.json").is_file():
            exported = Export(job.path)
            live.update(exported.card())
            display.mark_shown(job.path)
    return exported


def stack(*runs: Run | str, **named: Run | str) -> AdapterStack:
    """Put the adapters of several runs on one base, to switch between them, mix them in a batch and combine them.

    Nothing is loaded before a model is needed; it is then loaded into this process.

    Args:
        *runs: Runs, or their names or ids; each is called by its name.
        **named: Runs by another name.

    Raises:
        TuneError: They cannot share a base, with what differs.

    Example:
        >>> tune_magic.stack("polite", "brief").generate("Hello", "brief")  # doctest: +SKIP
    """
    found = [resolve(run) for run in runs]
    chosen = dict(zip(names_of(found, ("base", *named), "-"), found, strict=True))
    chosen |= {name: resolve(run) for name, run in named.items()}
    if not chosen:
        raise TuneError("Which runs? A stack needs one or more.")
    return AdapterStack(chosen)


def merge_adapters(
    weights: Mapping[Run | str, float],
    how: str = "linear",
    *,
    name: str | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    fresh: bool = False,
    output: str | None = None,
    link: Mapping[str, Any] | None = None,
) -> Run:
    """Make one run of the LoRA adapters of several, without training; twin of ``%tune merge``.

    The result is a run like others: it can be evaluated, talked to, exported, stacked and merged again.

    Args:
        weights: By run, or name or id of one; negative weights take away.
        how: ``linear`` (rough: weighted sums of the matrices A and of B), ``cat`` (exactly the weighted sum of the
            updates), ``svd`` (its best approximation of a rank), ``ties``, ``dare_linear``, ``dare_ties``,
            ``magnitude_prune``, and these three with ``_svd``; see `tune_magic.recipe.combination.WAYS`.
        name: Of the new run; default: the names with + between.
        density: Share of entries that ties, dare and magnitude_prune keep; default: 0.5.
        rank: Of the result, for ways that end in svd; default: the largest.
        seed: Of what dare leaves out.
        fresh: Merge again although the same was merged before under this name.
        output: Folder for runs; default: ``tune_runs`` beside the notebook.
        link: Facts about the notebook.

    Raises:
        TuneError: They cannot be combined so, with every reason.
    """
    global last  # noqa: PLW0603 - as in `begin`
    chosen = [resolve(run) for run in weights]
    runs = dict(zip(names_of(chosen, joint="-"), chosen, strict=True))
    combination = Combination(dict(zip(runs, weights.values(), strict=True)), how, density, rank, seed)
    name = "+".join(runs) if name is None else name
    run, note = launching.begin_merge(runs, combination, name=name, fresh=fresh, output=output, link=link)
    last = run
    if note is not None:
        display.show(run.card(note), run=run)
        return run
    live = display.Live(run)
    follow_job(run, live)
    live.update(run.card())
    display.mark_shown(run.path)
    return run


def load_run(id_or_name: str) -> Run:
    """Return a run by id, beginning of an id, name or path; the newest when several fit.

    Raises:
        TuneError: There is none, with the nearest names.
    """
    return Run(places.find(id_or_name))


def runs() -> list[Run]:
    """Return every run known here, those of the working directory first, newest first."""
    return [Run(path) for path in places.folders()]


def compare(*runs: Run | str) -> ComparedRuns:
    """Put runs side by side: what differs in their recipes, how they score, their curves; twin of ``%tune compare``.

    Args:
        *runs: Two or more, or their names or ids.
    """
    return ComparedRuns([resolve(run) for run in runs])


def chat(run: Run | str, *others: Run | str, base: bool = True) -> Chat:
    """Talk to a tuned model, or to several at once, their base beside them; twin of ``%tune chat``.

    Args:
        run: A run with a checkpoint, or its name or id.
        *others: More, which answer beside it. Adapters of one base share it; others are each loaded.
        base: Whether the base model may be asked too; after full fine-tuning that takes memory for a second model.

    Raises:
        TuneError: There is no such run, it has no checkpoint, or some answer texts and others classify.
    """
    return Chat(*map(resolve, (run, *others)), base=base)


def doctor() -> CheckUp:
    """Check versions, device, memory, disk, plug-ins and front end; twin of ``%tune doctor``."""
    return checkup.check()


def load_model(name: str) -> tuple[Any, Any]:
    """Load a base model by name into this process and return (model, tokenizer)."""
    import torch

    from tune_magic.models.load import load_causal_lm, load_tokenizer, local_folder

    path = local_folder(find_model(name))
    return load_causal_lm(path, torch.float32).eval(), load_tokenizer(path)


def _recipe(recipe: Recipe | Mapping[str, Any] | str | Path | None, keys: Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, str | Path):
        return read_recipe_file(Path(recipe), keys)
    if isinstance(recipe, Recipe):
        return build_recipe(recipe.given(), keys) if keys else recipe
    return build_recipe(recipe or {}, keys)


def _show(run: Run, options: LaunchOptions) -> Run:
    if options.background:
        follow_in_background(run)
        return run
    try:
        return follow(run)
    except RunFailed:
        if options.traceback and run.log.exists():
            display.show_text(run.log.read_text(encoding="utf-8", errors="replace"))
        raise


def _show_trial(
    kind: str, recipe: Recipe, options: LaunchOptions, objects: Mapping[str, Any], about: Mapping[str, Any]
) -> Run:
    """Try a recipe out in a folder that goes, and show what was found."""
    with launching.scratch_job(kind, recipe, options, objects, **about) as job:
        live = display.Live(job)
        try:
            follow_job(job, live)
        except RunFailed as error:
            raise _without_log(error) from None
        live.update(job.card())
    return job


def _without_log(error: RunFailed) -> RunFailed:
    """Forget the log, which goes with the job's folder; cause and hint are in the error."""
    error.log = None
    return error


def _usual_model() -> str:
    """Return the model to count tokens with when none was named.

    Raises:
        TuneError: There is none.
    """
    if last is not None:
        return str(last.recipe["model"])
    known = installed()
    if not known:
        raise TuneError("Whose tokens? No model is installed.", hint="Name one: `model=...`, on a line `--model`.")
    return known[0]


def _model_if_any() -> str | None:
    """Return the usual model, None where there is none."""
    try:
        return _usual_model()
    except TuneError:
        return None


def _names(given: Sequence[str] | str | None) -> list[str] | None:
    names = given.split(",") if isinstance(given, str) else given or []
    return [_absolute_metric(name.strip()) for name in names if name.strip()] or None


def _absolute_metric(name: str) -> str:
    """Return a metric's name that means the same in the run's folder: `evaluate:FOLDER` may be relative."""
    prefix, _, folder = name.partition(":")
    is_folder = prefix == "evaluate" and Path(folder.partition("#")[0]).expanduser().exists()
    return f"evaluate:{Path(folder).expanduser().absolute()}" if is_folder else name


def _absolute(data: str | Path) -> str:
    """Return a reference that means the same in the run's folder: names and hub ids do anywhere."""
    is_path = not str(data).startswith("$") and not is_hub(str(data))
    return str(Path(data).expanduser().absolute()) if is_path else str(data)


def resolve(run: Run | str) -> Run:
    """Return a run itself, or the one of a name or id."""
    return load_run(run) if isinstance(run, str) else run
