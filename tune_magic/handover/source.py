"""A run as a converter reads it: what it takes of the recipe is noted, so that nothing is dropped in silence."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_magic.data import hub, locate, normalise
from tune_magic.data.read import RowFaults, read_rows
from tune_magic.errors import DataError, TuneError
from tune_magic.recipe.build import build_recipe
from tune_magic.recipe.differences import flat
from tune_magic.recipe.schema import SourceOptions
from tune_magic.storage.folder import RunFolder

_SAME = "how tune_magic computes; the result is the same without it"
_OWN = "done by tune_magic; `%tune data` shows what it does to the rows"
_WHY = {
    "microbatch_tokens": _SAME, "share_prefixes": _SAME, "cache_frozen_layers": _SAME, "torch_compile": _SAME,
    "gradient_checkpointing": _SAME, "eval.samples": "answers to read while training", "eval.max_new_tokens": "answers to read while training",
    "data.test": "rows for `%evaluate`", "data.clean": _OWN, "data.augment": _OWN, "data.balance": _OWN, "data.mix": _OWN,
    "data.mix_temperature": _OWN, "data.replay": _OWN, "data.replay_share": _OWN, "data.on_bad_rows": _OWN,
    "data.min_trained_share": "a check that tune_magic makes before training", "data.format": "a name of tune_magic's",
    "callbacks": "plug-ins of tune_magic",
}  # fmt: skip
_CHATS = ("messages", "conversations")
_ANSWERS = ("prompt_completion", "instruction", "question_answer", "source_target", "translation")
_HEAD_ROWS = 50


@dataclass(frozen=True)
class Shape:
    """What the training rows look like.

    Attributes:
        kind: ``chat``, ``answer``, ``text`` or ``other``.
        format: Name of the format.
        columns: The file's column for each standard name it has.
        turns: Of ``answer``: whether prompt and completion are lists of messages.
    """

    kind: str
    format: str
    columns: Mapping[str, str]
    turns: bool = False


class Source:
    """The recipe and the plan of a run, for one converter.

    Args:
        run: A run that was trained, or began to be.

    Attributes:
        recipe: What was trained.
        plan: Every resolved value; empty where the run never came so far.
        notes: What is otherwise in the other program, in words.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.recipe = build_recipe(run.info["recipe"])
        self.plan: dict[str, Any] = run.summary().plan
        self.notes: list[str] = []
        self._values = flat(self.recipe.normalised())
        self._taken: set[str] = set()

    @property
    def name(self) -> str:
        """The run's name, or its id."""
        return str(self.run.name or self.run.id)

    @property
    def slug(self) -> str:
        """The run's name as a folder may be called."""
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in self.name)

    @property
    def objective(self) -> str:
        """What is minimised."""
        return str(self.plan["objective"]["name"])

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.plan["total_steps"])

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        ratio, steps = self.take("warmup_ratio"), self.take("warmup_steps")
        return int(steps) if steps is not None else math.ceil(ratio * self.total_steps)

    def need(self, tool: str, objectives: Sequence[str], methods: Sequence[str]) -> None:
        """Refuse what the other program has no word for.

        Raises:
            TuneError: The run has no plan yet, or its objective or method is not known there.
        """
        if not self.plan:
            raise TuneError(f"{self.name} has not come so far that its rows were looked at.",
                            hint="Run it first; `--for yaml` needs only the recipe.")  # fmt: skip
        for key, known, found in (
            ("objective", objectives, self.objective),
            ("method", methods, self.recipe.method.name),
        ):
            if found not in known:
                raise TuneError(f"A recipe for {tool} cannot say `{key}: {found}`.",
                                hint=f"It can say: {', '.join(known)}. `--for yaml` and `--for python` can say all.")  # fmt: skip
        if self.recipe.compress.is_on:
            raise TuneError(f"A recipe for {tool} cannot say `compress`: it would train another model.",
                            hint="`--for yaml` and `--for python` can say all.")  # fmt: skip
        self.take("objective.name")
        self.take("method.name")

    def take(self, key: str) -> Any:
        """Return the value of a dotted key, which is carried over; None where the recipe has no such key."""
        self._taken.add(key)
        return self._values.get(key)

    def take_part(self, part: str) -> None:
        """Note that all keys under a dotted one are carried over."""
        self._taken |= {key for key in self._values if key == part or key.startswith(f"{part}.")}

    def leave(self, *keys: str) -> None:
        """Note that keys which were taken are not carried over after all."""
        self._taken.difference_update(keys)

    def left(self) -> dict[str, Any]:
        """Return the keys that are set otherwise than by default and were not taken."""
        return {key: value for key, value in self.set_keys().items() if key not in self._taken}

    def set_keys(self) -> dict[str, Any]:
        """Return the keys that are set otherwise than by default."""
        given: dict[str, Any] = {
            "model": self.recipe.model,
            "data": self.recipe.data.train,
            "method": self.recipe.method.name,
        }
        if self.recipe.objective is not None:
            given["objective"] = self.recipe.objective.name
        default = flat(build_recipe(given).normalised())
        return {key: value for key, value in self._values.items() if value != default.get(key)}

    def heading(self, tool: str, use: str) -> list[str]:
        """Return the lines of a file's first comment: what it is, how it is used, what it does not say, what differs."""
        lines = [f"The recipe of the run {self.name} ({self.run.id}) for {tool}.", use]
        left = self.left()
        lines += ["Not carried over:"] * bool(left)
        lines += [f"  {key}: {_written(value)} ({_why(key, tool.partition(' ')[0])})" for key, value in left.items()]
        lines += ["Otherwise than in tune_magic:"] * bool(self.notes)
        return [*lines, *(f"  {note}" for note in self.notes)]

    def model(self) -> str:
        """Return the model as another program finds it: a hub id, or a folder in Transformers' format."""
        about, name = self.plan["model"], str(self.take("model"))
        if about["origin"] in ("hub", "cache") or (about["origin"] == "folder" and Path(name).suffix != ".gguf"):
            return name
        self.notes.append(
            f"`{name}` is a name of tune_magic's; the model is {about['note']}, and here the folder it was unpacked to"
        )
        return str(about["folder"])

    def rows(self) -> tuple[str, locate.Slice | None]:
        """Return the training rows, a file or a hub id, and the part of them that is meant."""
        bare, part = locate.parse(str(self.take("data.train")))
        if bare.startswith("$"):
            self.notes.append(f"`{bare}` was a table of the notebook; its rows lie in the run's folder")
            return str(locate.data_path(bare, self.run.path)), part
        return bare, part

    def whole_rows(self) -> str:
        """Return the training rows for a program that knows no part of a file."""
        reference, part = self.rows()
        if part is not None:
            self.notes.append(f"all rows of {reference} are read; `{self.recipe.data.train}` means a part of them")
        return reference

    def held_out(self, *, whole: bool = False) -> tuple[str | None, int]:
        """Return the file of the held-out rows, None where they are part of the training rows, and how many they are.

        Args:
            whole: The program knows no part of a file.

        Raises:
            TuneError: A part is meant, and it cannot be said.
        """
        value = self.take("data.held_out")
        if isinstance(value, str):
            bare, part = locate.parse(value)
            if part is not None and (whole or bare.startswith("$")):
                raise TuneError(f"`data.held_out: {value}` is a part of a file, which this program cannot read.",
                                hint="Save those rows as a file of their own.")  # fmt: skip
            return (str(locate.data_path(bare, self.run.path)) if bare.startswith("$") else value), int(
                self.plan["held_out_rows"]
            )
        return None, int(self.plan["held_out_rows"])

    def held_out_share(self) -> float:
        """Return the share of the rows that is held out, for programs that draw it anew."""
        count, train = int(self.plan["held_out_rows"]), int(self.plan["train_rows"])
        if not count:
            return 0.0
        self.notes.append(f"the {count} held-out rows are drawn anew, so they are others")
        return round(count / (count + train), 6)

    def shape(self) -> Shape:
        """Return what the training rows look like, by the file's own columns; by the usual ones where it is gone."""
        self.take_part("data.columns")
        self.take("data.format")
        name, options = str(self.plan["format"]), self.recipe.data
        kind = "chat" if name in _CHATS else "answer" if name in _ANSWERS else "text" if name == "text" else "other"
        head = self._head(options)
        if head is None:
            from tune_magic import plugins

            wanted = plugins.get("format", name)
            self.notes.append("the rows are not there any more; their columns are taken to have the usual names")
            return Shape(kind, name, {**{column: column for column in wanted.needs}, **options.columns})
        columns, first = head
        return Shape(kind, name, columns, kind == "answer" and isinstance(first.get(columns.get("prompt", "")), list))

    def _head(self, options: SourceOptions) -> tuple[dict[str, str], Mapping[str, Any]] | None:
        """Return the columns of the training file by their standard names, and its first row."""
        path = Path(self.plan["data_files"][self.recipe.data.train])
        with contextlib.suppress(DataError, OSError):
            rows = list(itertools.islice(read_rows(path, RowFaults(path.name, skips=True)), _HEAD_ROWS))
            found = normalise.recognise(rows, options) if rows else None
            if found is not None:
                return dict(found.columns), rows[0].values
        return None


def is_hub(reference: str) -> bool:
    """Return whether rows are on the hub."""
    return hub.is_hub(reference)


def comment(lines: Iterable[str]) -> str:
    """Return lines as a comment of Python or YAML; what a value holds can end none of them."""
    return "\n".join(f"# {' '.join(line.splitlines())}".rstrip() for line in lines)


def _why(key: str, tool: str) -> str:
    while key and key not in _WHY:
        key = key.rpartition(".")[0]
    return _WHY.get(key) or f"{tool} has nothing like it, or not in this form"


def _written(value: Any) -> str:
    """Return a value as YAML has it, on one line."""
    from tune_magic.recipe import yaml

    return yaml.write({"x": value}).removeprefix("x: ").strip()
