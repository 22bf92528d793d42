"""Verbs that wait for people or programs: panels and cards in a notebook, typed lines in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tune_magic import api, deploying, display, servers
from tune_magic.ballot import BACK, KEYS, Ballot
from tune_magic.commands import BadUsage
from tune_magic.follow import Interrupts
from tune_magic.handles import Run
from tune_magic.view.html import clean


def chat(runs: list[Run]) -> Any:
    """Show a panel in a notebook; in a terminal ask for lines until there is none."""
    if display.in_kernel():
        from tune_magic.widgets import ChatPanel  # type: ignore[import-not-found]

        return ChatPanel(*runs)
    with api.chat(*runs) as chat:
        display.show_text("An empty line ends it. The model is loading.")
        while text := _line():
            for side, answer in chat.ask(text).items():
                display.show_text(f"{side}: {answer}")
    return None


def rate(ballot: Ballot) -> Ballot | None:
    """Return a ballot, which is a panel in a notebook; in a terminal ask for votes until there is none."""
    if display.in_kernel():
        return ballot
    while ballot.current is not None:
        pair = ballot.current
        display.show_text(ballot.text())
        letter, _, comment = _line("vote> ").partition(" ")
        choice = KEYS.get(letter.lower())
        if not letter:
            break
        if choice is None:
            display.show_text(f"`{clean(letter, 20)}` is no vote.")
        elif choice == BACK:
            ballot.back()
        else:
            ballot.vote(choice, comment, place=pair.place)
    ballot.close()
    ballot.show()
    return None


def _line(prompt: str = "> ") -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def serve(runs: list[Run], flags: Mapping[str, Any]) -> Any:
    """Start a server and show its card in a notebook; in a terminal stay until Ctrl-C, with the token on the screen."""
    if flags.get("stop"):
        return _stop_servers(runs, flags)
    options = {key: value for key, value in flags.items() if key != "no_token"}
    server = deploying.serve(*runs, token=not flags.get("no_token", False), **options)
    if display.in_kernel():
        server.show_live()
        return server
    interrupts = Interrupts()
    with interrupts.counted():
        display.show_text(f"{server.name} at {server.url}/v1; the models are loading.")
        server.wait()
        display.show_text(f"models: {', '.join(server.models)}")
        if server.token is not None and flags.get("token_env") is None:
            display.show_text(f"token: {server.token}")
        if flags.get("keep"):
            return None
        display.show_text("Ctrl-C ends it.")
        server.job.wait(each=lambda: server.stop() if interrupts.count else None)
    if server.job.status != "stopped":
        server.job.raise_for_state()
    return None


def _stop_servers(runs: list[Run], flags: Mapping[str, Any]) -> None:
    if len(flags) > 1:
        raise BadUsage("--stop goes alone.")
    for run in runs:
        live = servers.of_run(run)
        for server in live:
            server.stop()
        count = f"{len(live)} server{'' if len(live) == 1 else 's'}"
        display.show_text(f"{run.name or run.id}: {f'{count} stopped' if live else 'no server is up'}.")
