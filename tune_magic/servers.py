"""A server of tuned models: what users hold, how it is started, what its card shows."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import psutil

from tune_magic import cell_code, display, launching, secrets
from tune_magic.comparing import names_of
from tune_magic.errors import TuneError
from tune_magic.executors import local
from tune_magic.handles import Run
from tune_magic.storage.state import TERMINAL
from tune_magic.training import alike

BASE = "base"
_POLL_S = 0.05
_DRAW_S = 2.0
_LOAD_S = 600.0
_STOP_S = 30.0
_TOKEN_BYTES = 32
_LEAST_TOKEN = 8


class Token(str):
    """A token that a notebook does not show by accident: as a cell's value it is hidden, printed it is itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<token of {len(self)} characters; print(...) shows it>"


class Server:
    """A server that a worker of its own keeps up, with the models it loaded once.

    Args:
        path: Its folder.
        token: What it demands, where that is known here; it is never written down.

    Example:
        >>> with tune_magic.serve("support_bot") as server:  # doctest: +SKIP
        ...     client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token)
    """

    def __init__(self, path: Path, token: str | None = None) -> None:
        self.job = Run(path)
        self.token = None if token is None else Token(token)
        self._drawing: threading.Thread | None = None

    @property
    def run(self) -> Run:
        """The first run it serves."""
        return Run(self.job.path.parent.parent)

    @property
    def name(self) -> str:
        """What it is called: the names of the runs."""
        return ", ".join(self._options["names"].values())

    @property
    def models(self) -> list[str]:
        """The names to ask for: those of the runs, then the base's."""
        return list(dict.fromkeys([*self._options["names"].values(), *self._options["base_names"]]))

    @property
    def url(self) -> str:
        """Its address; waits until it listens, a moment after it was started. OpenAI's base URL is this and ``/v1``.

        Raises:
            TuneError: It ended before that.
        """
        self._wait(lambda: self.address is not None, _LOAD_S)
        assert self.address is not None
        return self.address

    @property
    def address(self) -> str | None:
        """Its address, None before it listens."""
        found = next(self.job.events("listening"), None)
        if found is None:
            return None
        asked = str(found["host"])
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(asked, asked)  # noqa: S104 - all of this machine's
        return f"http://[{host}]:{found['port']}" if ":" in host else f"http://{host}:{found['port']}"

    @property
    def is_ready(self) -> bool:
        """Whether the models are loaded. Requests that come before wait for them."""
        return self.job.status == "running"

    @property
    def has_ended(self) -> bool:
        """Whether nothing answers any more."""
        return self.job.status in TERMINAL and not local.is_starting(self.job.path)

    @property
    def status(self) -> str:
        """What it does, in words: ``starting``, ``loading the models``, ``ready``, ``ending``, ``ended``, or why it failed."""
        if self.has_ended:
            error = self.job.summary().outcome.get("error")
            return f"failed: {error}" if error else "ended"
        if self.is_ready:
            return "ready"
        if self.job.status == "stopping" or self.job.status in TERMINAL:  # its process has still to go
            return "ending"
        return "starting" if self.address is None else "loading the models"

    @property
    def requests(self) -> dict[str, Any]:
        """Numbers so far, told every few seconds: ``statuses`` of HTTP; texts ``written``, ``dropped``; ``tokens`` ..."""
        last: dict[str, Any] = {}
        for event in self.job.events("requests"):
            last = event
        return {key: value for key, value in last.items() if key not in ("seq", "attempt", "t", "type", "crc")}

    @property
    def facts(self) -> dict[str, Any]:
        """What its card shows beside its state: how it was started."""
        return dict(self._options)

    def wait(self, timeout_s: float = _LOAD_S) -> Server:
        """Wait until the models are loaded.

        Raises:
            TuneError: It failed, or takes longer.
        """
        self._wait(lambda: self.is_ready, timeout_s)
        return self

    def stop(self) -> None:
        """End it: answers that are being written are finished within some seconds, and its memory is free again."""
        if not self.has_ended:
            self.job.stop()
            try:
                self.job.wait(_STOP_S)
            except TimeoutError:
                self.job.kill()
                self.job.wait(_STOP_S)
        if self._drawing is not None:
            self._drawing.join(_STOP_S)  # the view says so before the cell ends

    def card(self) -> dict[str, str]:
        """Return address, models and how to ask them, as HTML and as text; never the token."""
        from tune_magic.view.server import server_card

        return server_card(self.name, self.status, self.address, self.models, facts=self.facts, requests=self.requests)

    def show(self) -> None:
        """Show the card: in a notebook as HTML, elsewhere as text."""
        display.show(self.card(), run=self.job)

    def show_live(self) -> None:
        """Show the card and keep it up to date until the server ends; returns at once."""
        own, live = Server(self.job.path), display.Live(self.job)  # two threads must not share a reader
        live.update(own.card())

        def draw() -> None:
            last = own.card()
            while not own.has_ended:
                time.sleep(_POLL_S if not own.is_ready else _DRAW_S)
                if (card := own.card()) != last:
                    live.update(last := card)
            live.update(own.card())

        self._drawing = threading.Thread(target=draw, name=f"view of {self.job.id}", daemon=True)
        self._drawing.start()

    @property
    def _options(self) -> dict[str, Any]:
        return dict(self.job.info["options"])

    def _wait(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            if self.has_ended:
                self.job.raise_for_state()
                raise TuneError("This server has ended.", hint="Start another.")
            if time.monotonic() > deadline:
                raise TuneError(f"The server is still {self.status} after {timeout_s:.0f} s.", log=self.job.log)
            time.sleep(_POLL_S)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self)} if display.was_shown(self.job.path) else self.card()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.address or ''} {self.status}>"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    runs: Sequence[Run], *, host: str, port: int, token: bool, token_env: str | None, keep: bool, max_concurrent: int,
    timeout_s: float, base: bool,
) -> Server:  # fmt: skip
    """Start a server; arguments as in `tune_magic.serve`.

    Raises:
        TuneError: It would be open to others without a token, or a run cannot be served.
    """
    from tune_magic.serving.hosts import is_loopback

    _check(host, port, token=token, token_env=token_env, max_concurrent=max_concurrent)
    if not token and not is_loopback(host):
        raise TuneError(
            f"Without a token, anybody who reaches {host} could ask this server.",
            hint="Leave out `--no-token`, or `--host`: it then listens to this machine alone.",
        )
    secret = _token(token_env) if token else None
    job = _new_job(
        runs, base=base, host=host, port=port, needs_token=token, token_env=token_env, max_concurrent=max_concurrent,
        timeout_s=timeout_s, owner=None if keep else _this_process(),
    )  # fmt: skip
    if secret is not None:
        secrets.keep(secret)
    local.start(job.path, token=secret)
    return Server(job.path, secret)


def of_run(run: Run) -> list[Server]:
    """Return the servers of a run that have not ended, the newest first; their tokens are not known here."""
    found = [Server(path.parent) for path in sorted(run.path.glob("servers/2*/run.json"), reverse=True)]
    return [server for server in found if not server.has_ended]


def _new_job(runs: Sequence[Run], *, base: bool, **options: Any) -> Run:
    """Make the folder of a server; its first run's names decide what the models are called."""
    for run in runs:
        run.best_checkpoint  # noqa: B018 - without one, say so before a worker is started
        cell_code.require(run)
    if len({run.path for run in runs}) < len(runs):
        raise TuneError("A run is there twice.", hint="Name each once.")
    named = dict(zip(names_of(runs, (BASE,), "-"), runs, strict=True))
    first, *others = runs
    has_base = base and _has_one_base(runs)
    options |= {"base": has_base, "base_names": _base_names(first) if has_base else []}
    if others:
        options |= {
            "runs": {name: str(run.path) for name, run in named.items()},
            "names": {name: name for name in named},
        }
    else:
        options |= {"names": {"tuned": next(iter(named))}}
    plugged = [(code["kind"], code["name"]) for run in others for code in run.info.get("cell_code", ())]
    return launching.new_job(first, "serve", options, plugged)


def _has_one_base(runs: Sequence[Run]) -> bool:
    """Return whether it is clear what the base is, and the first run's model can give it."""
    writers = [run for run in runs if alike.objective_of(run).gives == "texts"]
    if not writers or writers[0] is not runs[0] or len({alike.base_of(run) for run in writers}) > 1:
        return False
    return len(writers) == len(runs) or alike.holds_base(runs[0])


def _base_names(run: Run) -> list[str]:
    return [BASE, str(run.recipe["model"]).rstrip("/").rsplit("/", 1)[-1]]


def _check(host: str, port: int, *, token: bool, token_env: str | None, max_concurrent: int) -> None:
    if not host or any(character.isspace() or character == "/" for character in host):
        raise TuneError(f"`{host}` is no address to listen on.", hint="127.0.0.1, or an address of this machine.")
    if not 0 <= port < 1 << 16:
        raise TuneError(f"A port is a number from 1 to 65535, got {port}.", hint="Without one, a free one is found.")
    if max_concurrent < 1:
        raise TuneError(f"`max_concurrent` must be at least 1, got {max_concurrent}.")
    if token_env is not None and not token:
        raise TuneError("A token and no token: `token_env` names one.", hint="Leave one of the two out.")


def _token(name: str | None) -> str:
    """Return a new token, or the one that a variable of the environment holds.

    Raises:
        TuneError: There is no such variable, or it holds no token.
    """
    if name is None:
        return token_urlsafe(_TOKEN_BYTES)
    value = os.environ.get(name, "")
    if len(value) < _LEAST_TOKEN or not value.isascii() or not value.isprintable() or " " in value:
        raise TuneError(
            f"The environment's {name} holds no token: at least {_LEAST_TOKEN} letters, digits or signs, without spaces.",
            hint=f'`python -c "import secrets; print(secrets.token_urlsafe())"` makes one; put it into {name}.',
        )
    return value


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "started": psutil.Process().create_time()}
