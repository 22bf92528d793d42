"""Ask a model behind an address that speaks OpenAI's protocol. Its key comes from the environment and stays there."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_magic.errors import TuneError
from tune_magic.models.answers import KeptAnswers

_AT_ONCE = 4  # requests
_TRIES, _TRIES_WHEN_BUSY = 3, 8
_SECONDS = 60
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 120.0  # after the first try, and at most; each is twice the one before
_LOOK_S = 0.2  # between looks at whether somebody wants it to end
_SERVER_FAULT, _NOT_ALLOWED, _BUSY = 500, (401, 403), (429, 503)
_ELSEWHERE = range(300, 400)


class _StaysHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key is for the address that was given."""

    def redirect_request(self, *_: Any) -> None:
        """Name no other request, so that the answer counts as a refusal."""


class _Retry(Exception):
    """No answer this time.

    Args:
        reason: Why.
        tries: How often it is worth asking.
        wish_s: Seconds that the server asks to wait, None where it does not say.
    """

    def __init__(self, reason: str, tries: int = _TRIES, wish_s: float | None = None) -> None:
        super().__init__(reason)
        self.tries = tries
        self.wish_s = wish_s


@dataclass(frozen=True)
class Address:
    """A model behind an address.

    Attributes:
        url: Up to the version, such as http://127.0.0.1:8000/v1.
        model: The model's name there.
        api_key_env: Variable of the environment that holds the key.
        max_new_tokens: Longest answer in tokens.
    """

    url: str
    model: str
    api_key_env: str
    max_new_tokens: int

    def answers(
        self, chats: Sequence[list[dict[str, Any]]], count: Callable[[int], None], kept: Path | None = None
    ) -> list[str]:
        """Return the likeliest answer to each chat, in their order.

        Args:
            chats: Messages with ``role`` and ``content``.
            count: Called with the number of answers that came, also with 0 while none comes; may raise to break off.
            kept: A file that answers are added to as they come. What it holds already is not asked again.

        Raises:
            TuneError: It refuses, or does not answer.
        """
        numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        came: queue.SimpleQueue[tuple[int, str | Exception]] = queue.SimpleQueue()
        ended = threading.Event()
        with contextlib.closing(KeptAnswers(kept)) as earlier:
            known = ((number, earlier.of(chat)) for number, chat in enumerate(chats))
            found = {number: text for number, text in known if text is not None}
            for number in range(len(chats)):
                if number not in found:
                    numbers.put(number)
            for _ in range(min(_AT_ONCE, numbers.qsize())):  # nobody waits for them when it has to end
                threading.Thread(target=self._ask, args=(chats, numbers, came, ended), daemon=True).start()
            try:
                if found:
                    count(len(found))
                while len(found) < len(chats):
                    try:
                        number, answer = came.get(timeout=_LOOK_S)
                    except queue.Empty:
                        count(0)
                        continue
                    if isinstance(answer, Exception):
                        raise answer
                    found[number] = answer
                    earlier.add(chats[number], answer)
                    count(1)
            finally:
                ended.set()
        return [found[number] for number in range(len(chats))]

    def _ask(
        self, chats: Sequence[list[dict[str, Any]]], numbers: queue.SimpleQueue[int],
        came: queue.SimpleQueue[tuple[int, str | Exception]], ended: threading.Event,
    ) -> None:  # fmt: skip
        """Ask one chat after the other until there is none left, or one fails."""
        while not ended.is_set():
            try:
                number = numbers.get_nowait()
            except queue.Empty:
                return
            try:
                came.put((number, self._answer(chats[number], ended)))
            except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits must hear of it
                came.put((number, error))
                return

    def _answer(self, chat: list[dict[str, Any]], ended: threading.Event) -> str:
        """Return the answer to a chat, asking again after a pause where that may help."""
        done = 0
        while True:
            try:
                return self._request(chat)
            except _Retry as error:
                done += 1
                if done >= error.tries:
                    message = f"{self._chats_url} did not answer after {done} tries: {error}."
                    raise TuneError(message) from None
                pause_s = min(_LONGEST_PAUSE_S, _PAUSE_S * 2 ** (done - 1)) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
                if error.wish_s is not None:
                    pause_s = max(pause_s, min(_LONGEST_PAUSE_S, error.wish_s))
                if ended.wait(pause_s):
                    raise

    def _request(self, chat: list[dict[str, Any]]) -> str:
        """Ask once.

        Raises:
            _Retry: It may answer another time.
            TuneError: It refuses.
        """
        content = {"model": self.model, "temperature": 0, "max_tokens": self.max_new_tokens, "messages": chat}
        key = os.environ.get(self.api_key_env)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        try:
            request = urllib.request.Request(self._chats_url, json.dumps(content).encode(), headers)  # noqa: S310 - checked
            with urllib.request.build_opener(_StaysHere).open(request, timeout=_SECONDS) as response:
                return str(json.load(response)["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"{error.code} {error.reason}"
            if error.code in _BUSY:
                raise _Retry(reason, _TRIES_WHEN_BUSY, _wish_s(error.headers.get("Retry-After"))) from None
            if error.code < _SERVER_FAULT:
                raise TuneError(f"{self._chats_url} refused: {reason}.", hint=self._hint(error)) from None
            raise _Retry(reason) from None
        except (OSError, http.client.HTTPException) as error:
            raise _Retry(str(getattr(error, "reason", error)) or type(error).__name__) from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise _Retry("it answered something else than a chat completion") from None

    @property
    def _chats_url(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def _hint(self, error: urllib.error.HTTPError) -> str | None:
        if error.code in _ELSEWHERE:
            leads = f"It leads to {error.headers.get('Location', 'another address')}"
            return f"{leads}, which is not asked: it would be sent the key. Give that address if it is meant."
        return f"Its key is taken from the environment's {self.api_key_env}." if error.code in _NOT_ALLOWED else None


def _wish_s(given: str | None) -> float | None:
    """Return the seconds that `Retry-After` asks for, as a number or a date; None where it says neither.

    Example:
        >>> _wish_s("7")
        7.0
    """
    if given is None:
        return None
    if given.strip().isdecimal():
        return float(given)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    return None
