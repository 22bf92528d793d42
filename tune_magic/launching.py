"""Start jobs: a run or the one that is there already, a dry run, a job over a run. Shows nothing."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tune_magic import cell_code, plugins, tables
from tune_magic.data.hub import is_hub
from tune_magic.data.locate import data_path, fingerprints, identity, parse, references
from tune_magic.data.read import SUFFIXES
from tune_magic.errors import DataError, TuneError
from tune_magic.executors import local
from tune_magic.handles import Run
from tune_magic.models.find import find_model
from tune_magic.recipe.launch import LaunchOptions
from tune_magic.recipe.schema import Recipe
from tune_magic.storage import folder, places
from tune_magic.storage.folder import RunFolder

ATTACHED = "The same recipe is training already; this is its live view."
RESUMED = "The same recipe was stopped before its end; it goes on from its last checkpoint."
FOUND = "The same recipe, data and model were trained before; this is that run. `--fresh` trains again."
_JOB_FOLDERS = {"evaluate": "evals", "export": "exports", "chat": "chats"}
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
        content["identity"] = _identity(recipe, given, Path(scratch))
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
        kind: ``plan`` for a dry run, ``data`` to look at the rows alone.
        recipe: What would be trained.
        options: How to start it.
        objects: Values of the recipe's ``$names``.
        measure: Whether a dry run tries the heaviest step, to predict time and memory.
        **about: As in `begin`.
    """
    find_model(recipe.model)
    given = tables.serialise(objects)
    scratch = Path(tempfile.mkdtemp(prefix=f"tune_magic-{kind}-"))
    job = None
    try:
        content = _content(recipe, options, **about) | {"options": {"measure": measure}}
        job = Run(folder.create(scratch, kind, content))
        tables.write(job.path, given)
        local.start(job.path, options.executor)
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
) -> Run:
    """Start an export and return its job; arguments as in `tune_magic.export`.

    Raises:
        TuneError: There is no such format, or the run has no checkpoint.
    """
    if to not in plugins.names("exporter"):
        plugins.get("exporter", to)  # raises, with the nearest name; one that is there is imported by the worker alone
    run.best_checkpoint  # noqa: B018 - without one, say so before a worker is started
    options = {
        "to": to, "quantize": quantize, "rows": rows, "tolerance": tolerance,
        "output": str(Path(output).absolute()) if output else None,
    }  # fmt: skip
    job = new_job(run, "export", options, [("exporter", to)])
    local.start(job.path)
    return job


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


def _identity(recipe: Recipe, given: Mapping[str, tables.Content], scratch: Path) -> str | None:
    """Return the run's identity as the worker will compute it, or None when something it reads is not here yet."""
    tables.write(scratch, given)
    source = find_model(recipe.model)
    if source.path is None:
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
    return identity(recipe, prints)


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
