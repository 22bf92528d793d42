"""Put the magics into a shell, and take them out again."""

from __future__ import annotations

import functools
from typing import Any

from tune_magic import commands
from tune_magic.magics.complete import make_matcher

_MATCHER = "_tune_magic_matcher"
LINE = ("finetune", "evaluate", "export", "tune")
CELL = ("finetune",)


def load(shell: Any) -> None:
    """Register the magics and the completer; a second time changes nothing."""
    unload(shell)
    for name in LINE:
        shell.register_magic_function(_magic(shell, name, cell=False), "line", name)
    for name in CELL:
        shell.register_magic_function(_magic(shell, name, cell=True), "cell", name)
    matchers = getattr(shell.Completer, "custom_matchers", None)
    if matchers is not None:  # IPython 8.6 and later
        matcher = make_matcher(shell)
        setattr(shell, _MATCHER, matcher)
        matchers.append(matcher)
    if hasattr(shell, "kernel"):
        _tell_of_live_run(shell)
        from tune_magic.executors import standby

        standby.warm_up()


def _tell_of_live_run(shell: Any) -> None:
    """Say in one line when a run of this notebook has outlived its kernel; silent otherwise."""
    from tune_magic.magics.link import live_run

    name = live_run(shell)
    if name is not None:
        print(f"{name} of this notebook is still training: %tune watch {name} shows it.")  # noqa: T201


def unload(shell: Any) -> None:
    """Remove everything `load` added."""
    for kind, names in (("line", LINE), ("cell", CELL)):
        for name in names:
            shell.magics_manager.magics[kind].pop(name, None)
    matcher = shell.__dict__.pop(_MATCHER, None)
    if matcher is not None and matcher in shell.Completer.custom_matchers:
        shell.Completer.custom_matchers.remove(matcher)
    if hasattr(shell, "kernel"):
        from tune_magic.executors import standby

        standby.dismiss()


def _magic(shell: Any, name: str, *, cell: bool) -> Any:
    """Return the function IPython calls. It imports the verbs only when called, and expands no `{}` in templates."""
    from IPython.core.magic import no_var_expand

    @no_var_expand
    def call(line: str, body: str | None = None) -> Any:
        from tune_magic.magics import verbs

        return verbs.run(shell, name, line, body)

    @functools.wraps(call)
    def line_only(line: str) -> Any:
        return call(line)

    function = call if cell else line_only
    function.__name__ = name
    function.__doc__ = _help(name)
    return no_var_expand(function)


def _help(name: str) -> str:
    if name == "tune":
        verbs = [command for full, command in commands.COMMANDS.items() if full.startswith("tune ")]
        width = max(len(command.name) for command in verbs)
        return "%tune VERB\n\n" + "\n".join(f"  %{command.name:{width}}  {command.help}" for command in verbs)
    return commands.COMMANDS[name].help_text("%%" if name in CELL else "%")
