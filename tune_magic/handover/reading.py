"""Python that reads a run's rows, for scripts that know nothing of tune_magic."""

from __future__ import annotations

from pathlib import Path

from tune_magic.data import hub, locate
from tune_magic.data.formats.chats import ROLE_OF
from tune_magic.data.read import kind_of
from tune_magic.errors import TuneError
from tune_magic.handover.source import Shape, Source
from tune_magic.recipe.schema import ColumnTemplate

_LOADERS = {
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}


def reader(source: Source) -> str:
    """Return `def read_rows()`: the training rows as a list of dicts.

    Raises:
        TuneError: Nothing but tune_magic reads such a file.
    """
    reference, part = source.rows()
    body = _hub_body(reference) if hub.is_hub(reference) else _file_body(reference)
    return f'def read_rows():\n    """Return the rows, each a dict."""\n{body}    return rows{_slice(part)}\n'


def held_out_reader(source: Source, reference: str) -> str:
    """Return `def read_held_out()`, for held-out rows with a file of their own."""
    bare, part = locate.parse(reference)
    body = _hub_body(bare) if hub.is_hub(bare) else _file_body(bare)
    return (
        f'def read_held_out():\n    """Return the held-out rows, each a dict."""\n{body}    return rows{_slice(part)}\n'
    )


def _file_body(name: str) -> str:
    kind = kind_of(Path(name))
    if kind == ".jsonl" and not name.endswith(".gz"):
        return f'    with open({name!r}, encoding="utf-8") as lines:\n        rows = [json.loads(line) for line in lines if line.strip()]\n'
    if kind not in _LOADERS:
        raise TuneError(f"The script could not read {locate.source_name(name)} as tune_magic does.",
                        hint="Save the rows as .jsonl and train on those.")  # fmt: skip
    more = ', delimiter="\\t"' if kind == ".tsv" else ""
    return f'    rows = list(datasets.load_dataset({_LOADERS[kind]!r}, data_files={name!r}, split="train"{more}))\n'


def _hub_body(reference: str) -> str:
    rows = hub.parse(reference)
    assert rows is not None
    subset = f", {rows.subset!r}" if rows.subset is not None else ""
    return f"    rows = list(datasets.load_dataset({rows.id!r}{subset}, split={rows.split!r}))\n"


def _slice(part: locate.Slice | None) -> str:
    if part is None:
        return ""
    if not part.is_share:
        return f"[{part.start}:{'' if part.stop is None else part.stop}]"
    stop = "" if part.stop is None else f"round(len(rows) * {part.stop} / 100)"
    return f"[round(len(rows) * {part.start} / 100):{stop}]"


def turner(source: Source, shape: Shape) -> str:
    """Return the function that brings a row to one form: `chat(row)`, `question_and_answer(row)` or `text(row)`."""
    template = source.recipe.data.template
    source.take_part("data.template")
    if template is not None:
        return _templated(template)
    columns = shape.columns
    match shape.kind:
        case "chat":
            if "tools" in columns:
                source.notes.append("the `tools` of a row are not shown to the chat template")
            system = columns.get("system")
            before = (
                f'    system = row.get({system!r})\n    found = [{{"role": "system", "content": system}}] if system else []\n'
                if system
                else "    found = []\n"
            )
            return _CHAT.format(roles=ROLE_OF, before=before, column=columns[shape.format])
        case "text":
            return f'def text(row):\n    """Return the text of a row."""\n    return row[{columns["text"]!r}]\n'
    if shape.turns:
        return _TURNS.format(prompt=columns["prompt"], completion=columns["completion"])
    return _answered(shape)


def _answered(shape: Shape) -> str:
    columns = shape.columns
    names = {"instruction": ("instruction", "input", "output"), "question_answer": ("question", "context", "answer"),
             "source_target": ("source", "", "target"), "prompt_completion": ("prompt", "", "completion")}  # fmt: skip
    if shape.format == "translation":
        body = f"    asked, answer = row[{columns['translation']!r}].values()\n    system = None\n"
        return _QUESTION.format(body=body)
    asked, more, answer = names[shape.format]
    body = f"    asked, answer = row[{columns[asked]!r}], row[{columns[answer]!r}]\n"
    if shape.format == "question_answer":
        body += '    answer = answer["text"] if isinstance(answer, dict) else answer\n    answer = answer[0] if isinstance(answer, list) else answer\n'
    if more in columns:
        first, second = ("asked", "more") if shape.format == "instruction" else ("more", "asked")
        body += (
            f'    more = row.get({columns[more]!r})\n    asked = f"{{{first}}}\\n\\n{{{second}}}" if more else asked\n'
        )
    body += f"    system = row.get({columns['system']!r})\n" if "system" in columns else "    system = None\n"
    return _QUESTION.format(body=body)


def _templated(template: str | ColumnTemplate) -> str:
    if isinstance(template, str):
        return f'def text(row):\n    """Return the text of a row."""\n    return {template!r}.format(**row)\n'
    body = f"    asked, answer = {template.prompt!r}.format(**row), {template.completion!r}.format(**row)\n"
    body += f"    system = {template.system!r}.format(**row)\n" if template.system else "    system = None\n"
    return _QUESTION.format(body=body)


_CHAT = '''ROLES = {roles!r}


def chat(row):
    """Return the messages of a row; of each answer that is trained, the place."""
{before}    for turn in row[{column!r}]:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        found.append({{**turn, "role": ROLES.get(role, role), "content": content or ""}})
    answers = [i for i, turn in enumerate(found) if turn["role"] == "assistant" and turn.get("weight") != 0]
    return found, answers
'''
_TURNS = '''def chat(row):
    """Return the messages of a row; of each answer that is trained, the place."""
    found = row[{prompt!r}] + row[{completion!r}]
    answers = [i for i, turn in enumerate(found) if turn["role"] == "assistant" and i >= len(row[{prompt!r}])]
    return found, answers
'''
_QUESTION = '''def question_and_answer(row):
    """Return what is asked in a row, the answer, and the system message, if there is one."""
{body}    return asked, answer, system
'''
