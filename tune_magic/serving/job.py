"""The serve job: it listens at once, loads the models, and answers until a stop or the end of whoever asked for it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from typing import Any

import psutil
import uvicorn

from tune_magic import secrets
from tune_magic.errors import TuneError
from tune_magic.evaluation.speakers import speakers_of
from tune_magic.serving.app import make_app
from tune_magic.serving.hosts import NAMES_OF_LOOPBACK, is_loopback, listen
from tune_magic.serving.scheduler import Scheduler
from tune_magic.serving.served import Served
from tune_magic.serving.service import Limits, Service
from tune_magic.storage.control import Control
from tune_magic.storage.events import EventLog
from tune_magic.storage.folder import RunFolder

_LOOK_S = 0.1
_CLOCK_S = 2.0  # that a start may seem apart
_TELL_S = 1.0  # numbers of requests are told no more often
_GRACE_S = 5.0  # for answers that are being written when it ends
_FLUSH_S = 3  # for what is still to be sent then


def serve(job: RunFolder, log: EventLog, control: Control) -> dict[str, Any]:
    """Answer requests until a stop, or the end of the process that asked for the server."""
    options = job.info["options"]
    token = secrets.received() if options["needs_token"] else None
    if options["needs_token"] and not token:
        raise TuneError("This server was not sent its token.", hint="Start it again; whoever started it has ended.")
    service = Service(Limits(options["max_concurrent"], options["timeout_s"], 4 * options["max_concurrent"]))
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(options["host"], options["port"]))
        stack.enter_context(_Web(service, token, listener, options["host"]))
        log.append("listening", host=options["host"], port=listener.getsockname()[1])
        speakers = speakers_of(job)
        served = Served(speakers, options["names"], options["base_names"])
        scheduler = Scheduler(speakers, options["max_concurrent"])
        for side, reason in scheduler.alone.items():
            log.append("warning", message=f"{side} writes one text at a time: {reason}.")
        scheduler.start()
        service.open(served, scheduler)
        log.append("state", state="running", models=list(served.models))
        told = _Told(log, service, scheduler)
        stack.callback(told.tell)
        stack.callback(service.close, _GRACE_S)
        owner = _process(options["owner"])
        while options["owner"] is None or (owner is not None and owner.is_running()):
            control.check()
            told.tell_now_and_then()
            time.sleep(_LOOK_S)
    return {"state": "finished", "reason": "owner"}


class _Told:
    """Writes down how many requests there were; never what was in them."""

    def __init__(self, log: EventLog, service: Service, scheduler: Scheduler) -> None:
        self._log = log
        self._service = service
        self._scheduler = scheduler
        self._last: dict[str, Any] = {}
        self._due = 0.0

    def tell_now_and_then(self) -> None:
        """Write them if they have changed and it is time."""
        while self._scheduler.errors:
            self._log.append("error", error=self._scheduler.errors.popleft())
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _TELL_S
            self.tell()

    def tell(self) -> None:
        """Write them if they have changed."""
        now = self._numbers()
        if now != self._last:
            self._last = now
            self._log.append("requests", **now)

    def _numbers(self) -> dict[str, Any]:
        statuses = {str(status): count for status, count in sorted(self._service.statuses.items())}
        return {"statuses": statuses, **dict(self._scheduler.counts)}


class _Web:
    """The server in a thread of its own, while inside."""

    def __init__(self, service: Service, token: str | None, listener: socket.socket, host: str) -> None:
        hosts = NAMES_OF_LOOPBACK | {host.lower()} if is_loopback(host) else None
        self._service = service
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(service, token, hosts), loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None,
                log_level="critical", access_log=False, server_header=False, proxy_headers=False,
                timeout_graceful_shutdown=_FLUSH_S,
            )
        )  # fmt: skip
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[listener])), name="tune_magic-web", daemon=True
        )

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._service.close(0.0)  # where the models were never loaded
        self._server.should_exit = True
        self._thread.join(_FLUSH_S + _GRACE_S)


def _process(owner: dict[str, Any] | None) -> psutil.Process | None:
    """Return the process that asked, if it is there; None too for a server that goes on by itself.

    When it was started is compared once, since that is reckoned from the clock, which may be set.
    """
    if owner is None:
        return None
    try:
        process = psutil.Process(owner["pid"])
        return process if abs(process.create_time() - owner["started"]) < _CLOCK_S else None
    except psutil.NoSuchProcess:
        return None
