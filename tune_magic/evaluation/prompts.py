"""What was said before the question of a row: people who read answers must know it, and so must who learns from them."""

from __future__ import annotations

from tune_magic.data.content import Content, Message, PromptCompletion, Turns
from tune_magic.data.example import Example
from tune_magic.data.render import as_turns
from tune_magic.data.table import Table
from tune_magic.training.dataset import Rows

MOST_ROWS = 20_000


def prompts_of(reader: Rows, reference: str, rows: Table) -> dict[int, list[Message]]:
    """Return the messages before the answer of those rows whose question does not stand alone, by place.

    Of very many rows none: nobody reads them all, and they would have to be held in memory.

    Args:
        reader: Reads the rows.
        reference: Their source.
        rows: As they were encoded.
    """
    if len(rows) > MOST_ROWS:
        return {}
    contents = reader.contents(reference, rows.indices.tolist())
    found = {place: _before(contents.get(example.index), example) for place, example in enumerate(rows)}
    return {place: messages for place, messages in found.items() if len(messages) > 1}


def _before(content: Content | None, example: Example) -> list[Message]:
    """Return the messages before the answer that an example ends with."""
    if not isinstance(content, Turns | PromptCompletion):
        return []
    turns = as_turns(content)
    messages = turns.messages
    for index in reversed(list(turns.trained())):
        asked = [message["content"] for message in messages[:index] if message["role"] == "user"]
        if messages[index]["content"] == example.reference and (asked or [None])[-1] == example.question:
            return messages[:index]
    return []
