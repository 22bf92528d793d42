"""Chats: OpenAI's messages, ShareGPT's conversations, OASST's trees of messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from tune_magic.data.content import Message, Turns
from tune_magic.data.formats.base import BadRow, Format, Values
from tune_magic.data.read import Row
from tune_magic.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
ROLE_OF = {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "function_call": "assistant", "developer": "system", "function": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
_KINDS_OF_PARTS = ("text", "input_text", "output_text")


def messages_of(value: Any, column: str, *, needs_assistant: bool) -> list[Message]:
    """Return checked messages, each with ``role`` and ``content``, from ``role, content`` or ``from, value``.

    Raises:
        BadRow: Naming the first message that is none.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list that went through a table of texts
        value = _decoded(value)
    if not isinstance(value, list) or not value:
        raise BadRow(f"column `{column}` must be a list of messages", value)
    found = [_message(message, number) for number, message in enumerate(value, start=1)]
    if needs_assistant and not any(m["role"] == "assistant" and _says_something(m) for m in found):
        raise BadRow("no assistant turn, so nothing to learn", value)
    return found


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        raise BadRow(f"message {number} must have `role` and a text `content`", message)
    kept = {key: value for key, value in message.items() if value is not None}
    if "from" in kept and "value" in kept and "role" not in kept:
        kept |= {"role": kept.pop("from"), "content": kept.pop("value")}
    kept["role"] = ROLE_OF.get(str(kept.get("role")), kept.get("role"))
    if kept["role"] not in ROLES:
        raise BadRow(f"message {number} has no known role ({', '.join(ROLES)})", message)
    if isinstance(kept.get("content"), list):
        kept["content"] = _joined(kept["content"], number, message)
    if kept.get("tool_calls") and kept["role"] == "assistant":
        kept["tool_calls"] = [_tool_call(call, number) for call in kept["tool_calls"]]
        kept.setdefault("content", "")
    if not isinstance(kept.get("content"), str):
        raise BadRow(f"message {number} must have `role` and a text `content`", message)
    if kept.get("weight") not in (None, 0, 1):
        raise BadRow(f"message {number} has a `weight` that is neither 0 nor 1", kept["weight"])
    return kept


def _joined(parts: Sequence[Any], number: int, message: Any) -> str:
    """Return the text of a content in parts."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind and kind not in _KINDS_OF_PARTS:
                raise BadRow(f"message {number} has a part of kind `{kind}`, and only text is learned", message)
            raise BadRow(f"message {number} must have `role` and a text `content`", message)
    return "".join(part["text"] for part in parts)


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    """Return a call with its arguments as an object, which is what chat templates write down."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"message {number} has a tool call without a name", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise BadRow(f"message {number} has a tool call whose arguments are not JSON", arguments) from None
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Chat(Format):
    """A row is a chat, with the functions it may call and a system message of its own, where it has them."""

    rank = 20
    _column = "messages"

    def content(self, values: Values) -> Turns:
        messages = messages_of(self.value(values, self._column), self.columns[self._column], needs_assistant=True)
        system = self.text_or_none(values, "system")
        if system is not None:
            if messages[0]["role"] == "system":
                raise BadRow(f"column `{self.columns['system']}` and the first message are both system messages")
            messages = [{"role": "system", "content": system}, *messages]
        return Turns(messages, tools=self._tools(values))

    def _tools(self, values: Values) -> list[dict[str, Any]] | None:
        tools = self.value(values, "tools")
        if isinstance(tools, str) and tools.strip():
            tools = _decoded(tools)
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise BadRow(f"column `{self.columns['tools']}` must be a list of functions' JSON schemas", tools)
        return tools


class Messages(_Chat):
    """OpenAI's chat: a list of messages with role and content."""

    needs = ("messages",)
    uses = ("system", "tools")
    also: ClassVar = {"tools": ("functions",)}


class Conversations(_Chat):
    """ShareGPT's chat: a list of turns, each with `from` and `value`."""

    needs = ("conversations",)
    uses = ("system", "tools")
    also: ClassVar = {"conversations": ("conversation",), "tools": ("functions",)}
    rank = 21
    _column = "conversations"


class Oasst(Format):
    """OASST's trees: a message a row, with the message it replies to. Each path to a leaf becomes a chat.

    A message on several paths is trained on the first alone, so that every answer is learned once.
    """

    needs = ("message_id", "parent_id", "role", "text")
    uses = ("deleted",)
    rank = 10
    group = "tree"

    def assemble(self, rows: Iterable[Row]) -> Iterator[Row]:
        nodes: dict[str, Row] = {}
        children: dict[str | None, list[str]] = {}
        for row in rows:
            if self.value(row.values, "deleted") is True:
                continue
            key, parent = self.value(row.values, "message_id"), self.value(row.values, "parent_id") or None
            if key in nodes:
                raise DataError(f"{row.place}: the message `{key}` is there twice; {nodes[key].place} has it too.")
            nodes[key] = row
            children.setdefault(parent, []).append(key)
        orphans = [parent for parent in children if parent is not None and parent not in nodes]
        for root in [key for parent in (None, *orphans) for key in children.get(parent, [])]:
            yield from self._paths(root, nodes, children)

    def _paths(self, root: str, nodes: dict[str, Row], children: dict[str | None, list[str]]) -> Iterator[Row]:
        stack: list[tuple[list[str], int]] = [([root], 0)]
        while stack:
            path, trained_from = stack.pop()
            replies = children.get(path[-1], [])
            # the first reply goes on with what is not trained yet; the others begin at themselves
            stack += [([*path, key], trained_from if number == 0 else len(path)) for number, key in enumerate(replies)][
                ::-1
            ]
            if not replies:
                yield from self._chat([nodes[key] for key in path], trained_from)

    def _chat(self, path: list[Row], trained_from: int) -> Iterator[Row]:
        """Yield the chat of a path, up to its last answer; none where every answer of it is trained elsewhere."""
        turns = [self.value(row.values, "role") for row in path]
        answers = [number for number, role in enumerate(turns) if ROLE_OF.get(str(role), role) == "assistant"]
        if answers and answers[-1] >= trained_from:
            kept = path[: answers[-1] + 1]
            said = [{"role": self.value(row.values, "role"), "content": self.value(row.values, "text")} for row in kept]
            tree = self.value(path[0].values, "message_id")
            yield Row({"messages": said, "trained_from": trained_from, "tree": tree}, kept[-1].place)

    def content(self, values: Values) -> Turns:
        return Turns(messages_of(values["messages"], "text", needs_assistant=False), values["trained_from"])
