"""Ask a model behind an address that speaks OpenAI's protocol. Its key comes from the environment and stays there."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tune_magic.errors import TuneError

_AT_ONCE = 4  # requests
_TRIES = 3
_SECONDS = 60
_SERVER_FAULT, _TOO_MANY, _NOT_ALLOWED = 500, 429, (401, 403)


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

    def answers(self, chats: Sequence[list[dict[str, Any]]], count: Callable[[int], None]) -> list[str]:
        """Return the likeliest answer to each chat, in their order.

        Args:
            chats: Messages with ``role`` and ``content``.
            count: Called with the number of answers that came; may raise to break off.

        Raises:
            TuneError: It refuses, or does not answer.
        """
        found = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for answer in pool.map(self._request, chats):
                    found.append(answer)
                    count(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what was not asked yet need not be
                raise
        return found

    def _request(self, chat: list[dict[str, Any]]) -> str:
        content = {"model": self.model, "temperature": 0, "max_tokens": self.max_new_tokens, "messages": chat}
        key = os.environ.get(self.api_key_env)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        address = f"{self.url.rstrip('/')}/chat/completions"
        reason: Any = None
        for _ in range(_TRIES):
            request = urllib.request.Request(address, json.dumps(content).encode(), headers)  # noqa: S310 - checked
            try:
                with urllib.request.urlopen(request, timeout=_SECONDS) as response:  # noqa: S310
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code < _SERVER_FAULT and error.code != _TOO_MANY:
                    hint = _hint(error.code, self.api_key_env)
                    raise TuneError(f"{address} refused: {reason}.", hint=hint) from None
            except OSError as error:
                reason = getattr(error, "reason", error)
            except (ValueError, KeyError, IndexError, TypeError):
                reason = "it answered something else than a chat completion"
        raise TuneError(f"{address} did not answer after {_TRIES} tries: {reason}.")


def _hint(code: int, variable: str) -> str | None:
    return f"Its key is taken from the environment's {variable}." if code in _NOT_ALLOWED else None
