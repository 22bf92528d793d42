"""The card of a server: where it is, what it has, how to ask it. It never holds a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tune_magic.view.html import (  # fmt: skip
    BLUE,
    GREEN,
    GREY,
    RED,
    Bundle,
    Html,
    box,
    bundle,
    clean,
    code,
    details,
    div,
    grey,
    heading,
    table,
    ticked,
    word,
)

_DOTS = {"ready": GREEN, "ended": GREY}
TOKEN = "TUNE_MAGIC_TOKEN"  # noqa: S105 - the variable's name


def server_card(
    name: str, status: str, address: str | None, models: Sequence[str], *, facts: Mapping[str, Any],
    requests: Mapping[str, Any],
) -> Bundle:  # fmt: skip
    """Return a server.

    Args:
        name: Of the runs.
        status: What it does, in words.
        address: Where it listens; None before it does.
        models: The names to ask for.
        facts: How it was started: ``needs_token``, ``token_env``, ``owner``, ``host``.
        requests: Numbers so far: ``statuses``, ``written``, ``tokens`` ...
    """
    colour = RED if status.startswith("failed") else _DOTS.get(status, BLUE)
    rows = _rows(address, models, facts, requests)
    is_up = address is not None and status in ("ready", "loading the models")
    body: list[Html] = [
        heading(colour, name, clean(f"server · {status}", 300), ""),
        table([[grey(key), word(text) if key == "address" else ticked(text)] for key, text in rows], align="ll"),
    ]
    lines = [f"{name}: server · {status}", *(f"{key}: {text}" for key, text in rows)]
    if is_up and address is not None:
        python, shell = _python(address, models[0], facts), _shell(address, models[0], facts)
        body += [details("how to ask it", *(div(code(line)) for line in (*python, " ", *shell)))]
        lines += [*python, *shell]
    return bundle(box(*body), lines)


def _rows(
    address: str | None, models: Sequence[str], facts: Mapping[str, Any], requests: Mapping[str, Any]
) -> list[tuple[str, str]]:
    rows = [("address", address or "…"), ("models", ", ".join(clean(model, 80) for model in models))]
    rows.append(("token", _about_token(facts)))
    rows.append(
        ("ends", "by itself never: `%tune serve RUN --stop`" if facts["owner"] is None else "with this process")
    )
    if requests:
        counted = ", ".join(f"{count} × {status}" for status, count in requests.get("statuses", {}).items())
        rows.append(("requests", f"{counted or 'none'} · {requests.get('tokens', 0)} tokens written"))
    return rows


def _about_token(facts: Mapping[str, Any]) -> str:
    if not facts["needs_token"]:
        return "none is asked for"
    if facts["token_env"]:
        return f"what the environment's {facts['token_env']} held"
    return "`server.token` of what `server = %tune serve ...` or `tune_magic.serve(...)` gave; it is kept nowhere else"


def _python(address: str, model: str, facts: Mapping[str, Any]) -> list[str]:
    key = f'os.environ["{facts["token_env"]}"]' if facts["token_env"] else "server.token"
    key = key if facts["needs_token"] else '"none"'
    return [
        f'client = openai.OpenAI(base_url="{address}/v1", api_key={key})',
        f'client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello"}}])',
    ]


def _shell(address: str, model: str, facts: Mapping[str, Any]) -> list[str]:
    variable = facts["token_env"] or TOKEN
    given = f' -H "Authorization: Bearer ${variable}"' if facts["needs_token"] else ""
    first = [f'os.environ["{TOKEN}"] = server.token'] if facts["needs_token"] and not facts["token_env"] else []
    return [
        *first,
        f'curl {address}/v1/completions{given} -H "Content-Type: application/json"'
        f' -d \'{{"model": "{model}", "prompt": "Hello"}}\'',
    ]
