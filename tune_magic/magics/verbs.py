"""What each magic does, once it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tune_magic import api, commands, deploying, display, files, holding
from tune_magic.commands import BadUsage, HelpWanted, Parsed
from tune_magic.comparing import ComparedRuns
from tune_magic.errors import Fault, RecipeError, TuneError
from tune_magic.exported import ExportedForms
from tune_magic.follow import follow, follow_in_background
from tune_magic.handles import Run
from tune_magic.handover import targets
from tune_magic.magics import answering, registry
from tune_magic.magics.link import notebook_link, notebook_path
from tune_magic.recipe import yaml
from tune_magic.recipe.build import build_launch, build_recipe, read_recipe_file
from tune_magic.recipe.schema import Recipe
from tune_magic.recipe.twin import twin_code
from tune_magic.storage import places
from tune_magic.storage.versions import registered_as
from tune_magic.view.listing import runs_table
from tune_magic.view.words import size

_BODY_LINE = 2  # the first line of a cell is the magic's own


def run(shell: Any, name: str, line: str, body: str | None) -> Any:
    """Do what a magic's line and body say.

    Raises:
        UsageError: Exactly IPython's own, since a subclass prints a whole traceback. TuneError: Everything else.
    """
    try:
        if name == "tune":
            return _tune(shell, line)
        parsed = commands.parse(commands.COMMANDS[name], line, "%%" if body is not None else "%")
        return {"finetune": _finetune, "evaluate": _evaluate, "export": _export}[name](shell, parsed, body)
    except HelpWanted as wanted:
        display.show_text(str(wanted))
        return None
    except BadUsage as error:
        _usage_error(str(error))


def _usage_error(message: str) -> NoReturn:
    from IPython.core.error import UsageError

    raise UsageError(message) from None


def _finetune(shell: Any, parsed: Parsed, body: str | None) -> Run | None:
    overrides = _values(parsed.keys)
    show_code = parsed.flags.pop("show_code", False)
    name = parsed.positional
    objects: dict[str, Any] = {}
    if body is None:
        if name is None:
            raise BadUsage("A recipe is missing: %finetune FILE, or %%finetune NAME with the recipe below it.")
        recipe, text, name = read_recipe_file(Path(name), overrides), None, None
    else:
        if name is not None and not name.isidentifier():
            raise BadUsage(f"`{name}` cannot be the name of a variable; %%finetune NAME binds the run to it.")
        raw, lines = yaml.read(body, first_line=_BODY_LINE)
        text = body
        recipe = build_recipe(
            _resolve_names(shell, raw, lines, objects), _resolve_names(shell, overrides, {}, objects), lines=lines
        )
    if show_code:
        changed = {key: value for key, value in parsed.flags.items() if value}
        display.show_text(twin_code(recipe.given(), name, changed))
        return None
    return _launch(shell, recipe, parsed, name, objects=objects, recipe_text=text)


def _launch(shell: Any, recipe: Recipe, parsed: Parsed, name: str | None, **content: Any) -> Run | None:
    """Start the recipe and bind the run, also when it ends with an error."""
    options = build_launch(parsed.flags)
    text = content["recipe_text"]
    try:
        done = api.launch(recipe, options, name=name, link=notebook_link(shell, text), **content)
    except TuneError as error:
        if name and error.run is not None:
            shell.user_ns[name] = error.run
        raise
    if name and options.trial is None:
        shell.user_ns[name] = done
    return done if text is None and options.trial is None else None


def _evaluate(shell: Any, parsed: Parsed, body: str | None) -> Any:
    options = dict(parsed.flags)
    data = options.get("data")
    if data is not None and data.startswith("$"):
        options["data"] = _object(shell, data, None)
    against = [_run(shell, name) for name in parsed.rest]
    return api.evaluate(_run(shell, parsed.positional), against=against, **options)


def _export(shell: Any, parsed: Parsed, body: str | None) -> Any:
    if "to" not in parsed.flags:
        raise BadUsage(f"--to is missing. Usage: {commands.COMMANDS['export'].usage()}")
    beside = [_run(shell, name) for name in parsed.rest]
    return api.export(_run(shell, parsed.positional), beside=beside, **parsed.flags)


def _tune(shell: Any, line: str) -> Any:
    verb, _, rest = line.strip().partition(" ")
    if verb in ("", "-h", "--help"):
        raise HelpWanted(str(shell.magics_manager.magics["line"]["tune"].__doc__))
    command = commands.COMMANDS.get(f"tune {verb}")
    if command is None:
        raise BadUsage(
            f"There is no %tune {verb}.{commands.nearest(verb, commands.VERBS)} Verbs: {', '.join(commands.VERBS)}."
        )
    parsed = commands.parse(command, rest)
    if verb == "data":
        return _data(parsed, lambda name: _object(shell, name, None))
    if verb == "merge":
        merged = _merge(parsed, lambda name: _run(shell, name), notebook_path(shell))
        if str(parsed.positional).isidentifier():
            shell.user_ns[parsed.positional] = merged
        return None
    if verb == "methods":
        return _methods(parsed, lambda name: _object(shell, name, None), notebook_link(shell, None))
    if verb == "gpu":
        return _shown(holding.look(shell.user_ns, free=parsed.flags.get("free", False)))
    return do_verb(verb, parsed, lambda name: _run(shell, name), notebook_path(shell))


_ANSWERS = {
    "pause": "{0} saves its last step and waits; `%tune resume {0}` lets it continue.",
    "checkpoint": "{0} saves after its current step.",
}


def do_verb(verb: str, parsed: Parsed, find: Callable[[str | None], Run], notebook: str | None = None) -> Any:
    """Do a verb of ``%tune`` or of the command line.

    Args:
        verb: One of `commands.VERBS`.
        parsed: Its options.
        find: Returns the run of a name, or the last one.
        notebook: Path of the notebook it is done in, as far as that is known.
    """
    of_no_run: dict[str, Callable[[], Any]] = {
        "runs": lambda: _list(parsed, notebook),
        "data": lambda: _data(parsed),
        "explain": lambda: _shown(api.explain(str(parsed.positional), **_values(parsed.keys))),
        "methods": lambda: _methods(parsed),
        "doctor": lambda: _shown(api.doctor()),
        "models": lambda: _shown(deploying.list_models(parsed.positional)),
        "stage": lambda: registry.stage(parsed),
    }
    if verb in of_no_run:
        return of_no_run[verb]()
    if verb == "gpu":
        if parsed.flags.get("free"):
            raise BadUsage("--free is for a notebook, whose kernel holds something.")
        return _shown(holding.look())
    if verb == "merge":
        _merge(parsed, find, notebook)
        return None
    run = find(parsed.positional)
    flags, rest = parsed.flags, parsed.rest
    actions: dict[str, Callable[[], Any]] = {
        "show": run.show,
        "exports": lambda: _shown(ExportedForms(run)),
        "watch": lambda: _watch(run, parsed),
        "stop": lambda: _stop(run),
        "resume": lambda: _watch(_resumed(run, parsed), parsed, stops=True),
        "chat": lambda: answering.chat([run, *map(find, rest)]),
        "rate": lambda: answering.rate(api.rate(run, **flags)),
        "serve": lambda: answering.serve([run, *map(find, rest)], flags),
        "pause": lambda: _ask(run, verb),
        "checkpoint": lambda: _ask(run, verb),
        "compare": lambda: _compare([run, *map(find, rest)]),
        "rm": lambda: _remove(run, is_sure=flags.get("yes", False), registered=flags.get("registered", False)),
        "push": lambda: registry.push(run, parsed),
        "register": lambda: registry.register(run, parsed),
        "rename": lambda: _rename(run, rest),
        "note": lambda: _note(run, " ".join(rest)),
        "export-code": lambda: _export_code(run, flags.get("for", "python"), flags.get("output")),
        "model-card": lambda: _text(run.model_card(), flags.get("output")),
    }
    return actions[verb]()


def _data(parsed: Parsed, value_of: Callable[[str], Any] = str) -> Any:
    """Look at rows; `value_of` gives the value of a ``$name``."""
    data = str(parsed.positional)
    overrides = _values(parsed.keys)
    found = value_of(data) if data.startswith("$") else data
    report = api.inspect(found, model=parsed.flags.get("model"), **overrides)
    return report if display.in_kernel() else None


def _values(keys: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys of a line with their values, read as YAML reads them."""
    return {key: yaml.read(f"value: {value}")[0]["value"] for key, value in keys.items()}


def _methods(parsed: Parsed, value_of: Callable[[str], Any] = str, link: Mapping[str, Any] | None = None) -> Any:
    """List the methods, or try some; `value_of` gives the value of a ``$name``."""
    flags, keys = dict(parsed.flags), _values(parsed.keys)
    model = flags.pop("model", None) or keys.pop("model", None)
    names = [name.strip() for name in str(flags.pop("try", "")).split(",") if name.strip()]
    if not names:
        if flags:
            raise BadUsage(f"--{next(iter(flags))} is for --try: which methods?")
        return _shown(api.list_methods(model=model, **keys))
    data = flags.pop("data", None) or keys.pop("data", None)
    if data is None:
        raise BadUsage("--try needs rows: --data FILE.")
    if "steps" in flags:
        keys["max_steps"] = flags.pop("steps")
    found = value_of(data) if isinstance(data, str) and data.startswith("$") else data
    tried = api.try_methods(names, data=found, model=model, link=link, **flags, **keys)
    return tried if display.in_kernel() else None


def _list(parsed: Parsed, notebook: str | None) -> None:
    here = parsed.flags.get("here", False)
    if here and notebook is None:
        raise BadUsage("--here: which notebook this is, is not known. Without it, the folder's runs are listed.")
    roots = None if parsed.flags.get("all") else [places.default_root(notebook if here else None)]
    paths = list(places.folders(roots))
    if here:
        paths = [path for path in paths if _is_of(path, notebook)]
    shown = paths[: parsed.flags.get("limit", commands.SHOWN_RUNS)]
    display.show(runs_table([Run(path) for path in shown], num_more=len(paths) - len(shown)))


def _is_of(path: Path, notebook: str | None) -> bool:
    try:
        return Run(path).link.get("notebook") == notebook
    except TuneError:  # its run.json is damaged
        return False


def _compare(runs: list[Run]) -> Any:
    return _shown(ComparedRuns(runs))


def _merge(parsed: Parsed, find: Callable[[str | None], Run], notebook: str | None) -> Run:
    """Merge runs; each is followed by its weight, which is 1 where none is given."""
    weights: dict[Run | str, float] = {}
    named = [word.rpartition("=") if "=" in word else (word, "", "1") for word in parsed.rest]
    for name, _, text in named:
        run = find(name)
        if any(run.path == other.path for other in weights if isinstance(other, Run)):
            raise BadUsage(f"{name} is there twice.")
        try:
            weights[run] = float(text)
        except ValueError:
            raise BadUsage(f"The weight of {name} must be a number, got {text!r}.") from None
    link = {"notebook": notebook} if notebook else None
    return api.merge_adapters(weights, name=parsed.positional, link=link, **parsed.flags)


def _shown(found: Any) -> Any:
    """Return what a notebook's cell shows as its value; elsewhere, show it."""
    if display.in_kernel():
        return found
    found.show()
    return None


def _remove(run: Run, *, is_sure: bool, registered: bool) -> None:
    """Delete a run after asking; where nobody can be asked, ``--yes`` says so."""
    name = run.name or run.id
    known = [f"{one.reference} ({one.stage})" for one in registered_as(run.path)]
    if known and not registered:
        raise BadUsage(
            f"{name} is registered as {', '.join(known)}. `%tune rm {name} --registered` deletes it all the same."
        )
    if not is_sure:
        count = len(run.checkpoints)
        kept = f"{count} checkpoint{'' if count == 1 else 's'}"
        question = f"Delete {name} ({run.status}, {size(run.size_bytes())}, {kept})? [y/N] "
        try:
            answer = input(question)
        except Exception as error:  # noqa: BLE001 - no standard input: each front end has its own error
            raise BadUsage(
                f"Nobody can be asked here ({type(error).__name__}). `%tune rm {name} --yes` deletes it."
            ) from None
        if answer.strip().lower() not in ("y", "yes"):
            display.show_text(f"{name} stays.")
            return
    run.delete(registered=registered)
    display.show_text(f"{name} is deleted{f'; it was {chr(44).join(known)}' if known else ''}.")


def _rename(run: Run, words: list[str]) -> None:
    if len(words) != 1:
        raise BadUsage("A name is one word: %tune rename RUN NAME")
    before = run.name or run.id
    display.show_text(f"{before} is called {run.rename(words[0]).name} now.")


def _note(run: Run, text: str) -> None:
    run.note(None if text == "-" else text)
    display.show_text(f"{run.name or run.id}: {'no note' if text == '-' else text}")


def _export_code(run: Run, target: str, output: str | None) -> None:
    text = run.code(target)
    _text(text, output, targets.beside(text, target))


def _text(text: str, output: str | None, beside: Mapping[str, str] | None = None) -> None:
    """Show a text, or write it to a new file, with the files that belong beside it."""
    if output is None:
        display.show_text(text)
        return
    path = Path(output).expanduser()
    contents = {path: text} | {path.parent / name: content for name, content in (beside or {}).items()}
    for there in contents:
        if there.exists():
            raise BadUsage(f"{output if there == path else there.name} is there already.")
    for new, content in contents.items():
        files.write_text(new, f"{content.rstrip()}\n")
    display.show_text(f"written to {output}{''.join(f' and {name}' for name in beside or ())}")


def _watch(run: Run, parsed: Parsed, *, stops: bool = False) -> Run:
    if parsed.flags.get("background"):
        follow_in_background(run)
        return run
    return follow(run, stops=stops)


def _resumed(run: Run, parsed: Parsed) -> Run:
    try:
        return run.resume(budget=parsed.flags.get("budget"), now=parsed.flags.get("now", False))
    except ValueError as error:
        raise BadUsage(f"--budget {error}") from None


def _ask(run: Run, request: str) -> Run:
    """Leave a request for a live run, and say what comes of it."""
    name = run.name or run.id
    if not (run.is_live or run.is_coming_up):
        display.show_text(f"{name} is {run.status}; nothing works on it.")
        return run
    run.request(request)
    display.show_text(_ANSWERS[request].format(name))
    return run


def _stop(wanted: Run) -> Run:
    name = wanted.name or wanted.id
    if not (wanted.is_live or wanted.is_coming_up):
        display.show_text(f"{name} is {wanted.status} already.")
        return wanted
    if wanted.stop_requested:
        killed = wanted.kill()
        display.show_text(
            f"{name} was killed; its last checkpoint stands." if killed else f"{name} is {wanted.status}."
        )
        return wanted
    wanted.stop()
    display.show_text(f"{name} was asked to stop. It saves its last completed step first; the same again kills it.")
    return wanted


def _run(shell: Any, name: str | None) -> Run:
    """Return the run a name means: a variable that holds one, or one on disk; without a name the last."""
    if name is None:
        if api.last is None:
            raise BadUsage("Which run? None was started here yet; `%tune runs` lists them.")
        return api.last
    value = shell.user_ns.get(name)
    return value if isinstance(value, Run) else api.load_run(name)


def _resolve_names(
    shell: Any, content: Mapping[str, Any], lines: yaml.Lines, objects: dict[str, Any], path: str = ""
) -> dict[str, Any]:
    """Put variables in the place of values that are exactly ``$name``; tables stay names and travel as data."""
    resolved: dict[str, Any] = {}
    for key, value in content.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            resolved[key] = _resolve_names(shell, value, lines, objects, here)
        elif isinstance(value, str) and value.startswith("$") and value[1:].isidentifier():
            found = _object(shell, value, Fault(here, "", line=lines.get(here)))
            if isinstance(found, str | int | float | bool):
                resolved[key] = found
            else:
                objects[value[1:]] = found
                resolved[key] = value
        else:
            resolved[key] = value
    return resolved


def _object(shell: Any, reference: str, place: Fault | None) -> Any:
    name = reference[1:]
    if name in shell.user_ns:
        return shell.user_ns[name]
    problem = f"there is no variable `{name}`.{commands.nearest(name, shell.user_ns)}"
    raise RecipeError([Fault(place.key if place else "data", problem, line=place.line if place else None)])
