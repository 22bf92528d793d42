"""Start jobs: a run or the one that is there already, a dry run, a job over a run. Shows nothing."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune_magic import cell_code, files, plugins, tables
from tune_magic.comparing import names_of
from tune_magic.data.hub import is_hub
from tune_magic.data.locate import data_path, fingerprints, identity, parse, references
from tune_magic.data.read import SUFFIXES
from tune_magic.errors import DataError, TuneError
from tune_magic.executors import local
from tune_magic.handles import Run, check_name
from tune_magic.models.find import find_model
from tune_magic.models.teacher import find_teacher, teacher_prints
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.combination import Combination, merged_recipe
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import Recipe
from tune_magic.storage import fingerprint, folder, places
from tune_magic.storage.folder import RunFolder
from tune_magic.training import alike

ATTACHED = "The same recipe is training already; this is its live view."
RESUMED = "The same recipe was stopped before its end; it goes on from its last checkpoint."
FOUND = "The same recipe, data and model were trained before; this is that run. `--fresh` trains again."
MERGED = "The same runs were merged so before; this is that run. `--fresh` merges them again."
_JOB_FOLDERS = {"evaluate": "evals", "export": "exports", "chat": "chats", "serve": "servers"}
_LOOKED_AT = 200  # newest runs among which a cell's own is looked for


def begin(
    recipe: Recipe,
    options: LaunchOptions,
    *,
    name: str | None = None,
    objects: Mapping[str, Any] | None = None,
    link: Mapping[str, Any] | None = None,
    recipe_text: str | None = None,
    known: Callable[[Run], None] = lambda run: None,
) -> tuple[Run, str | None]:
    """Start, re-find or resume the run of a recipe, and show nothing; arguments as in `api.launch`.

    `known` is called with the run as soon as there is one, before its worker starts.

    Returns:
        The run, and why it is not a new one: `ATTACHED`, `RESUMED`, `FOUND`, else None.
    """
    given = tables.serialise(objects)
    content = _content(recipe, options, name=name, link=link, recipe_text=recipe_text)
    root = Path(options.output) if options.output else places.default_root(content["link"].get("notebook"))
    with tempfile.TemporaryDirectory() as scratch:
        content["identity"] = _identity(recipe, given, Path(scratch), root)
    found = None if options.fresh else _same_run(root, content["identity"])
    if found is not None:
        known(found)
        if found.status == "finished":
            return found, FOUND
        if found.is_live:
            if options.now and found.status == "queued":
                found.skip_line()
            return found, ATTACHED
        return found.resume(options.executor, options.budget, now=options.now), RESUMED
    previous = _previous_run(root, content)
    run = Run(folder.create(root, "finetune", content | ({"previous": previous} if previous else {})))
    tables.write(run.path, given)
    places.remember_root(root)
    known(run)
    run.limit(options.budget)
    if options.now:
        run.skip_line()
    local.start(run.path, options.executor)
    return run, None


@contextlib.contextmanager
def scratch_job(
    kind: str, recipe: Recipe, options: LaunchOptions, objects: Mapping[str, Any], *, measure: bool = True, **about: Any
) -> Iterator[Run]:
    """Start a job in a folder that is gone when the block ends; one that is still at work is killed then.

    Args:
        kind: ``plan`` for a dry run, ``find_lr`` to search the learning rate, ``data`` to look at the rows alone.
        recipe: What would be trained.
        options: How to start it.
        objects: Values of the recipe's ``$names``.
        measure: Whether a dry run tries the heaviest step, to predict time and memory.
        **about: As in `begin`.
    """
    find_model(recipe.model)
    find_teacher(recipe)
    content = _content(recipe, options, **about) | {"options": {"measure": measure}}
    with _in_scratch(kind, content, options.executor, tables.serialise(objects)) as job:
        yield job


@contextlib.contextmanager
def sizes_job(recipes: Sequence[Recipe], name: str) -> Iterator[Run]:
    """Start a job that counts what recipes would train; its folder is gone when the block ends.

    Raises:
        ModelError: There is no such model.
    """
    for model in {recipe.model for recipe in recipes}:
        find_model(model)
    content = {"name": name, "options": {"recipes": [recipe.given() for recipe in recipes]}, "cwd": str(Path.cwd())}
    with _in_scratch("sizes", content, "worker", {}) as job:
        yield job


@contextlib.contextmanager
def _in_scratch(
    kind: str, content: dict[str, Any], executor: str, given: Mapping[str, tables.Content]
) -> Iterator[Run]:
    """Start a job in a folder of its own; leaving ends the job and removes the folder."""
    scratch = Path(tempfile.mkdtemp(prefix=f"tune_magic-{kind}-"))
    job = None
    try:
        job = Run(folder.create(scratch, kind, content))
        tables.write(job.path, given)
        local.start(job.path, executor)
        yield job
    finally:
        if job is not None:
            job.kill()
            local.job_ended()
        shutil.rmtree(scratch, ignore_errors=True)


def begin_export(
    run: Run,
    to: str,
    *,
    quantize: str | None = None,
    rows: int | None = None,
    tolerance: float | None = None,
    output: str | Path | None = None,
    beside: Sequence[Run] = (),
    device: str | None = None,
) -> Run:
    """Start an export and return its job; arguments as in `tune_magic.export`.

    Raises:
        TuneError: There is no such format, a run has no checkpoint, or the runs cannot share a base.
    """
    if to not in plugins.names("exporter"):
        plugins.get("exporter", to)  # raises, with the nearest name; one that is there is imported by the worker alone
    run.best_checkpoint  # noqa: B018 - without one, say so before a worker is started
    if output and not Path(output).absolute().parent.is_dir():
        raise TuneError(f"{output} cannot be made: there is no folder {Path(output).parent}.", hint="Make it first.")
    options: dict[str, Any] = {
        "to": to, "quantize": quantize, "rows": rows, "tolerance": tolerance,
        "output": str(Path(output).absolute()) if output else None, "device": device,
    }  # fmt: skip
    if beside:
        together = [run, *beside]
        named = dict(zip(names_of(together, ("base",), "-"), together, strict=True))
        alike.check(named)
        options["runs"] = {name: str(one.path.absolute()) for name, one in named.items()}
    job = new_job(run, "export", options, [("exporter", to)])
    local.start(job.path)
    return job


def begin_merge(
    runs: Mapping[str, Run],
    combination: Combination,
    *,
    name: str,
    fresh: bool = False,
    output: str | Path | None = None,
    link: Mapping[str, Any] | None = None,
) -> tuple[Run, str | None]:
    """Start the merge of runs, or find it again, and show nothing; arguments as in `tune_magic.merge_adapters`.

    Args:
        runs: By the names that `combination` has.
        combination: How they become one.
        name: Of the new run.
        fresh: Merge again although the same was merged before.
        output: Folder for runs.
        link: Facts about the notebook.

    Returns:
        The new run, and why it is none: `MERGED`, else None.

    Raises:
        TuneError: They cannot be combined so, with every reason.
    """
    check_name(name)
    combination.check(alike.check_combinable(runs))
    recipe = merged_recipe({one: build_recipe(run.info["recipe"]) for one, run in runs.items()}, combination)
    first = next(iter(runs.values()))
    about = {"combination": combination.to_dict(), "sources": [_source(one, run) for one, run in runs.items()]}
    content: dict[str, Any] = {
        "name": name, "recipe": recipe.given(), "link": dict(link or {}), "launch": {}, "seed": recipe.seed,
        "cwd": first.info.get("cwd"), "merge": about, "identity": _identity_of_merge(about, name),
    }  # fmt: skip
    root = Path(output) if output else places.default_root(content["link"].get("notebook"))
    found = None if fresh else _same_run(root, content["identity"])
    if found is not None and found.status == "finished":
        return found, MERGED
    run = Run(folder.create(root, "merge", content))
    for path in (first.path / "inputs").glob("[!.]*"):  # tables given as objects, whose held-out rows are evaluated
        files.write_bytes(run.path / "inputs" / path.name, path.read_bytes())
    places.remember_root(root)
    local.start(run.path)
    return run, None


def _source(name: str, run: Run) -> dict[str, Any]:
    """Return what a merged run says of one it is made of; its path is a hint, its id and identity say which it was."""
    plan = run.summary().plan
    return {
        "name": name, "id": run.id, "path": str(run.path), "identity": plan.get("identity"),
        "step": int(run.best_checkpoint.name.removeprefix("step-")), "data": plan.get("fingerprints", {}).get("train"),
    }  # fmt: skip


def _identity_of_merge(about: Mapping[str, Any], name: str) -> str:
    sources = [[source["name"], source["identity"] or source["id"], source["step"]] for source in about["sources"]]
    return fingerprint.of_text(files.to_json([name, about["combination"], sources]))


def new_job(run: Run, kind: str, options: dict[str, Any], plugged: Iterable[tuple[str, str]] = ()) -> Run:
    """Make the folder of a job over a run; relative paths in the recipe mean what they meant when it was trained.

    Args:
        run: The run.
        kind: Of the job.
        options: Of the job.
        plugged: Kind and name of the plug-ins it uses beside the run's.

    Raises:
        TuneError: The run needs a plug-in of a cell that is not here.
    """
    cell_code.require(run)
    codes = cell_code.kept(cell_code.of_names(plugged))
    content = {"name": run.name or run.id, "options": options, "cwd": run.info.get("cwd"), **codes}
    return Run(folder.create(run.path / _JOB_FOLDERS[kind], kind, content))


def _content(recipe: Recipe, options: LaunchOptions, *, link: Mapping[str, Any] | None = None, **about: Any) -> Any:
    """Return what ``run.json`` says of a run."""
    return {
        **about, "recipe": recipe.given(), "link": dict(link or {}), "launch": options.model_dump(),
        "seed": recipe.seed, "cwd": str(Path.cwd()), **cell_code.kept(cell_code.of_recipe(recipe)),
    }  # fmt: skip


def _identity(recipe: Recipe, given: Mapping[str, tables.Content], scratch: Path, root: Path) -> str | None:
    """Return the run's identity as the worker will compute it, or None when something it reads is not here yet."""
    tables.write(scratch, given)
    source, teacher = find_model(recipe.model), find_teacher(recipe, root)
    if source.path is None or (teacher is not None and teacher.kind == "model" and teacher.path is None):
        return None
    for reference in (*references(recipe).values(), recipe.data.test):
        if isinstance(reference, str) and not is_hub(parse(reference)[0]):
            path = data_path(reference, scratch)
            if not path.is_file():
                raise DataError(
                    f"There is no file {reference}.", hint=f"Looked in {Path.cwd()}. Kinds: {', '.join(SUFFIXES)}."
                )
    if not all(data_path(reference, scratch).is_file() for reference in references(recipe).values()):
        return None  # still on the hub
    prints = fingerprints(recipe, source.path, lambda reference: data_path(reference, scratch))
    return identity(recipe, prints | teacher_prints(teacher))


def _previous_run(root: Path, content: Mapping[str, Any]) -> str | None:
    """Return the id of the newest run of the same cell, or, outside a notebook, of the same name."""
    link, name = content["link"], content["name"]
    cell = (link.get("notebook"), link.get("cell_id"))
    for path in itertools.islice(places.folders([root]), _LOOKED_AT):
        with contextlib.suppress(TuneError):
            run = RunFolder(path)
            same_cell = all(cell) and (run.link.get("notebook"), run.link.get("cell_id")) == cell
            if same_cell or (not all(cell) and name is not None and run.name == name):
                return run.id
    return None


def _same_run(root: Path, identity: str | None) -> Run | None:
    if identity is None:
        return None
    for path in places.folders([root]):
        with contextlib.suppress(TuneError):  # a damaged neighbour, or one from a newer version
            run = Run(path)
            known = run.info.get("identity") or run.summary().plan.get("identity")
            if known == identity and run.status not in ("failed", "damaged"):
                return run
    return None
