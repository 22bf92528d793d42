"""Training prompts answered by a teacher, for a student that learns whole answers. They are kept in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tune_magic import files
from tune_magic.data.content import Content, Message, PromptCompletion, Turns, from_plain, to_plain
from tune_magic.data.render import Renderer
from tune_magic.data.table import Table
from tune_magic.errors import DataError, TuneError
from tune_magic.models.address import Address
from tune_magic.models.answers import cached
from tune_magic.models.find import find_model
from tune_magic.models.generate import generate
from tune_magic.models.load import load_causal_lm, load_tokenizer, local_folder
from tune_magic.models.teacher import Teacher
from tune_magic.recipe.schema import Recipe
from tune_magic.storage.folder import RunFolder

FILE = "taught.jsonl"
PART_FILE = "taught.part.jsonl"  # answers so far, of a run that asks everything anew
_SHOWN = 3
_STREAM = 49_979_687  # keeps these random numbers apart from those of order and split


@dataclass(frozen=True)
class Answered:
    """A row with the teacher's answer.

    Attributes:
        row: Its number in the training file, from 0.
        content: Its normal form; None where the teacher said nothing.
    """

    row: int
    content: Content | None


@dataclass(frozen=True)
class Asking:
    """Who is asked, and how.

    Attributes:
        teacher: Who.
        recipe: Its `objective` says how long answers may be.
        folder: The job folder.
        look: Called now and then; may raise to break off.
        tell: Called with what is done, how much of it, and the whole.
    """

    teacher: Teacher
    recipe: Recipe
    folder: Path
    look: Callable[[], None]
    tell: Callable[[str, int, int | None], None]


def drawn(rows: Table, most: int | None, seed: int) -> Table:
    """Return at most so many rows, drawn by the seed, in their order; None: all."""
    if most is None or len(rows) <= most:
        return rows
    return rows.take(np.sort(np.random.default_rng([seed, _STREAM]).permutation(len(rows))[:most]))


def answered(asking: Asking, contents: Mapping[int, Content], source: str) -> list[Answered]:
    """Return rows with the teacher's likeliest answer in the place of the last one that was trained.

    Args:
        asking: Who is asked.
        contents: The rows in normal form, by number.
        source: What messages call them.

    Raises:
        DataError: A row has no prompt. TuneError: The teacher does not answer.
    """
    numbers = sorted(contents)
    chats = [_chat(contents[number], source, number) for number in numbers]
    done = 0

    def count(answers: int) -> None:
        nonlocal done
        done += answers
        asking.look()
        asking.tell("asking the teacher", done, len(chats))

    options: Any = asking.recipe.objective
    if asking.teacher.kind == "address":
        address = Address(asking.teacher.name, options.teacher_model, options.api_key_env, options.max_new_tokens)
        answers = address.answers(chats, count, _kept(asking, address))
    else:
        answers = _here(asking, chats, options.max_new_tokens, count)
    pairs = zip(numbers, answers, strict=True)
    return [Answered(number, _with(contents[number], answer.rstrip())) for number, answer in pairs]


def _kept(asking: Asking, address: Address) -> Path:
    """Return the file of answers that came already: the user's, or the run's own where it was started with `--fresh`."""
    if RunFolder(asking.folder).info.get("launch", {}).get("fresh"):
        return asking.folder / PART_FILE
    return cached(address.url, address.model, address.max_new_tokens)


def _chat(content: Content, source: str, number: int) -> list[Message]:
    """Return the messages before the last answer that is trained."""
    if isinstance(content, PromptCompletion):
        system = [{"role": "system", "content": content.system}] if content.system else []
        return [*system, {"role": "user", "content": content.prompt}]
    last = max(content.trained(), default=None) if isinstance(content, Turns) else None
    if last is None:
        raise DataError(
            f"{source}, row {number + 1} has no prompt that a teacher could answer.",
            hint="`level: token` learns from the teacher's probabilities of plain texts.",
        )
    return list(content.messages[:last])  # type: ignore[union-attr]


def _with(content: Content, answer: str) -> Content | None:
    """Return a row with another answer, which alone is trained; None where it is empty. A space it begins with is its own."""
    if not answer.strip():
        return None
    if isinstance(content, PromptCompletion):
        return replace(content, completion=answer)
    assert isinstance(content, Turns)
    last = max(content.trained())
    return Turns([*content.messages[:last], {"role": "assistant", "content": answer}], last, content.tools)


def _here(asking: Asking, chats: Sequence[list[Message]], longest: int, count: Callable[[int], None]) -> list[str]:
    """Return the answers of a model on this machine, by its own tokens and chat template."""
    from tune_magic.training.prepare import device

    teacher, recipe = asking.teacher, asking.recipe
    if teacher.kind == "run":
        from tune_magic.training.tuned import load_tuned

        tuned = load_tuned(teacher.run)
        if tuned.objective.scores_rows:
            raise TuneError(f"The teacher {teacher.name} classifies texts; it gives no answers.")
        model, tokenizer = tuned.model, tuned.tokenizer
    else:
        folder = local_folder(find_model(teacher.name))
        tokenizer = load_tokenizer(folder)
        model = load_causal_lm(folder, torch.float32).to(device()).eval()
    renderer = Renderer(tokenizer, chat_template=recipe.data.chat_template, max_length=recipe.max_length)
    prompts = [np.asarray(renderer.prompt_tokens(_prompt(chat, renderer)), dtype=np.int32) for chat in chats]
    return generate(model, tokenizer, prompts, max_new_tokens=longest, between=asking.look, done=count)


def _prompt(chat: list[Message], renderer: Renderer) -> str | list[Message]:
    """Return what the teacher is given: a chat, or plain text where it has no template or shall use none.

    Raises:
        TuneError: It would need a template for a chat of several turns.
    """
    if renderer.uses_template:
        return chat
    if any(message["role"] == "assistant" for message in chat):
        raise TuneError(
            "The rows are chats, but the teacher's tokenizer has no chat template.", hint="Take an instruct model."
        )
    return "\n\n".join(str(message["content"]) for message in chat)


def write(folder: Path, made: Sequence[Answered]) -> None:
    """Keep the answers in the run folder."""
    rows = ({"row": one.row + 1, **({} if one.content is None else to_plain(one.content))} for one in made)
    files.write_json_lines(folder / FILE, rows)
    files.discard(folder / PART_FILE)


def read(folder: Path) -> list[Answered] | None:
    """Return the answers of an earlier start, None where there was none."""
    try:
        rows = files.read_json_lines(folder / FILE)
    except OSError:
        return None
    return [Answered(row.pop("row") - 1, from_plain(row) if "kind" in row else None) for row in rows]


def facts(made: Sequence[Answered]) -> dict[str, Any]:
    """Return how many rows were answered, how many were not, and the first answers, JSON-ready."""
    contents = [one.content for one in made if one.content is not None]
    shown = [_answer(content)[:300] for content in contents[:_SHOWN]]
    return {"rows": len(contents), "left_out": len(made) - len(contents), "shown": shown}


def _answer(content: Content) -> str:
    if isinstance(content, PromptCompletion):
        return content.completion
    assert isinstance(content, Turns)
    return str(content.messages[-1]["content"])
