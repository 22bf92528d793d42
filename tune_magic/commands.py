"""The commands, their flags and their help: one table for magics, command line, completion and README.

Light on purpose: loading the extension imports this and must cost nothing.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_HELP_WIDTH = 119  # characters of a line of help
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


class BadUsage(ValueError):
    """A line that cannot be understood; surfaces show it as their own kind of usage error."""


class HelpWanted(Exception):
    """Somebody asked for help; carries the text."""


@dataclass(frozen=True)
class Flag:
    """An option of a command.

    Attributes:
        name: Without dashes.
        help: One line.
        value: Placeholder of its value; None for a switch.
        choices: Allowed values; empty when any.
        kind: Type of the value.
    """

    name: str
    help: str
    value: str | None = None
    choices: tuple[str, ...] = ()
    kind: type = str

    @property
    def key(self) -> str:
        """Name of the keyword it becomes."""
        return self.name.replace("-", "_")


@dataclass(frozen=True)
class Command:
    """A command and what may follow it.

    Attributes:
        name: As typed, such as ``finetune`` or ``tune runs``.
        help: One line.
        positional: Placeholder of what comes first; None when nothing does.
        positional_help: One line about it.
        needed: Whether it must be there.
        more: Placeholder of the words that follow it; None when none may. In brackets, none need to.
        flags: The options.
        takes_keys: Whether ``key=value`` pairs of a recipe may follow.
    """

    name: str
    help: str
    positional: str | None = None
    positional_help: str = ""
    needed: bool = False
    flags: tuple[Flag, ...] = ()
    takes_keys: bool = False
    more: str | None = None

    def usage(self, prefix: str = "%") -> str:
        """Return the line that shows how to write it."""
        parts = [f"{prefix}{self.name}"]
        if self.positional:
            parts.append(self.positional if self.needed else f"[{self.positional}]")
        parts += [self.more] if self.more else []
        parts += [f"[--{flag.name}{' ' + flag.value if flag.value else ''}]" for flag in self.flags]
        return " ".join([*parts, "[key=value ...]"] if self.takes_keys else parts)

    def help_text(self, prefix: str = "%") -> str:
        """Return the whole help, plain text."""
        lines = [self.usage(prefix), "", self.help]
        rows = [(self.positional, self.positional_help)] if self.positional else []
        rows += [(f"--{f.name}{' ' + f.value if f.value else ''}", f.help + _choices(f)) for f in self.flags]
        rows += [
            ("key=value", "a key of the recipe, dotted where nested: learning_rate=1e-4 method.r=8")
        ] * self.takes_keys
        width = max((len(name or "") for name, _ in rows), default=0)
        filled = textwrap.TextWrapper(
            _HELP_WIDTH, subsequent_indent=" " * (width + 4), break_on_hyphens=False, break_long_words=False
        )
        return "\n".join(
            [*lines, "", *(filled.fill(f"  {name or '':{width}}  {text}") for name, text in rows)]
        ).rstrip()


@dataclass
class Parsed:
    """What a line said."""

    positional: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)


LAUNCH_FLAGS = (
    Flag("background", "return at once; the run goes on by itself"),
    Flag("fresh", "train again although the same run is there"),
    Flag("now", "start at once although another run holds the device"),
    Flag("budget", "end within this time, such as 10m, with a checkpoint and the line that goes on", "TIME"),
    Flag("dry-run", "show the plan and train nothing"),
    Flag("find-lr", "try rising learning rates, show the curve and a rate, keep nothing"),
    Flag("executor", "where to run", "WHERE", ("worker", "inline")),
    Flag("traceback", "show the worker's whole traceback when it fails"),
    Flag("output", "folder for runs; default: tune_runs beside the notebook", "FOLDER"),
)
SHOWN_RUNS = 50
_RUN = "name or id of a run; default: the last one"
QUANTIZATIONS = {  # by format: what `--quantize` may be; the exporters say the same, and a test compares them
    "adapter": (),
    "genai": ("int8", "int4"),
    "gguf": ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    "merged": ("fp16", "bf16"),
    "onnx": ("int8", "static", "int4"),
    "onnx_adapters": ("int8",),
}
_WAYS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
DESTINATIONS = ("hub", "mlflow")  # where an export can be pushed to
STAGES = ("candidate", "staging", "production", "archived")  # of a registered model
_SHOW_CODE = Flag("show-code", "print the Python twin and train nothing")
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "finetune", "Fine-tune a model by a recipe: the cell's body, or a file.", "NAME_OR_FILE",
            "in a cell: the name the run is bound to; on a line: a recipe file", False, (*LAUNCH_FLAGS, _SHOW_CODE), True,
        ),
        Command(
            "evaluate", "Score base and tuned model, and other runs, over the same rows.", "RUN", _RUN, False,
            (
                Flag("data", "rows to score: a file or $name; default: test, else the held-out rows", "DATA"),
                Flag("metrics", "comma-separated: loss,exact_match,evaluate:meteor ...; default: what suits the rows", "NAMES"),
                Flag("by", "columns, comma-separated: score the rows of each value too; length: in tokens", "COLUMNS"),
                Flag("baselines", "comma-separated: zero, few, rag; the base with training rows before each question", "NAMES"),
                Flag("shots", "training rows before each question; default: 4", "N", kind=int),
                Flag("probe", "score a general set too: questions and prose that have nothing to do with the rows"),
                Flag("max-new-tokens", "longest answer in tokens", "N", kind=int),
                Flag("limit", "only this many rows", "N", kind=int),
            ),
            more="[RUN ...]",
        ),
        Command(
            "export", "Write the tuned model for other programs.", "RUN", _RUN, False,
            (
                Flag("to", "format", "FORMAT", tuple(QUANTIZATIONS)),
                Flag("quantize", "numbers of fewer bits; which, depends on the format", "KIND", tuple(dict.fromkeys(kind for kinds in QUANTIZATIONS.values() for kind in kinds))),
                Flag("rows", "rows to compare with the trained model; default: 200 to classify, 8 to answer", "N", kind=int),
                Flag("tolerance", "largest logit difference, as a share of the largest logit", "SHARE", kind=float),
                Flag("device", "where an ONNX graph is to run; default: cpu", "DEVICE", ("cpu", "cuda", "npu")),
                Flag("output", "a folder that does not exist yet; default: inside the run folder", "FOLDER"),
            ),
            more="[RUN ...]",
        ),
        Command(
            "tune runs", "List the runs, newest first.",
            flags=(
                Flag("all", "those of other folders too"),
                Flag("here", "only those of this notebook"),
                Flag("limit", f"only this many; default: {SHOWN_RUNS}", "N", kind=int),
            ),
        ),
        Command(
            "tune data", "Look at rows before training: format, splits, faults, what the model sees and learns.", "FILE",
            "a file, hub id or $name", True,
            (Flag("model", "whose tokenizer counts; default: the last run's, else the first installed", "NAME"),), True,
        ),
        Command(
            "tune explain", "Say what a method, objective, schedule or key does, with numbers for your model.", "NAME",
            "lora, dora, focal, cosine, messages, learning_rate ...", True, takes_keys=True,
        ),
        Command(
            "tune methods", "List the methods with what they train of your model, or try several on your rows.",
            flags=(
                Flag("model", "whose parameters; default: the last run's, else the first installed", "NAME"),
                Flag("try", "train these, one after the other, and compare them", "NAMES"),
                Flag("data", "rows to try them on: a file, hub id or $name", "DATA"),
                Flag("steps", "optimizer steps of each", "N", kind=int),
                Flag("budget", "time of each, such as 5m", "TIME"),
            ),
            takes_keys=True,
        ),
        Command("tune exports", "Compare the exports of a run: size, latency, what is lost.", "RUN", _RUN),
        Command("tune show", "Show the card of a run.", "RUN", _RUN),
        Command(
            "tune watch", "Show a live run; Interrupt ends the watching, not the run.", "RUN", _RUN, False,
            (Flag("background", "return at once; the view stays live"),),
        ),
        Command("tune stop", "Stop a run after saving its last step; a second time kills it.", "RUN", _RUN),
        Command(
            "tune resume", "Go on with a stopped, lost or failed run; let a paused one continue, a queued one start now.",
            "RUN", _RUN, False,
            (
                Flag("background", "return at once; the run goes on by itself"),
                Flag("budget", "end within this time, such as 10m", "TIME"),
                Flag("now", "start at once although another run holds the device"),
            ),
        ),
        Command(
            "tune chat", "Talk to a tuned model, or to several, their base beside them.", "RUN", _RUN, more="[RUN ...]",
        ),
        Command(
            "tune rate", "Vote blind on the tuned model's answers and others, pair by pair, and see who wins.", "RUN", _RUN, False,
            (
                Flag("against", "whose answers are beside them: base, another run, few-shot, retrieval; default: base", "NAME"),
                Flag("rater", "who votes; under the same name the rating goes on; default: me", "NAME"),
                Flag("limit", "rate only this many rows; default: 100", "N", kind=int),
                Flag("seed", "of the rows, their order, and which answer is A; default: 0", "N", kind=int),
            ),
        ),
        Command(
            "tune serve", "Serve tuned models to programs that speak OpenAI's language, over HTTP.", "RUN", _RUN, False,
            (
                Flag("host", "address to listen on; default: 127.0.0.1, which this machine alone reaches", "ADDRESS"),
                Flag("port", "default: a free one", "N", kind=int),
                Flag("token-env", "the environment's variable that holds the token; default: one is made", "NAME"),
                Flag("no-token", "ask for none; only where no other machine can reach it"),
                Flag("keep", "go on after this notebook or terminal has ended"),
                Flag("max-concurrent", "texts written at the same time; default: 16", "N", kind=int),
                Flag("timeout", "longest that an answer may take; default: 10m", "TIME"),
                Flag("stop", "stop the servers of this run"),
            ),
            more="[RUN ...]",
        ),
        Command(
            "tune merge", "Make one run of the LoRA adapters of several, without training.", "NAME", "name of the new run", True,
            (
                Flag("how", "linear is rough, cat exactly the weighted sum, svd its best approximation; default: linear", "WAY", _WAYS),
                Flag("density", "share of entries that ties, dare and magnitude_prune keep; default: 0.5", "SHARE", kind=float),
                Flag("rank", "of the result, for ways that end in svd; default: the largest", "N", kind=int),
                Flag("seed", "of what dare leaves out; default: 0", "N", kind=int),
                Flag("fresh", "merge again although the same was merged before under this name"),
            ),
            more="RUN=WEIGHT ...",
        ),
        Command(
            "tune compare", "Compare runs: recipes, scores and curves side by side.", "RUN", "name or id of a run", True,
            more="RUN ...",
        ),
        Command(
            "tune rm", "Delete a run with its checkpoints, after asking.", "RUN", "name or id of a run", True,
            (Flag("yes", "do not ask"), Flag("registered", "also where it is a version of a registered model")),
        ),
        Command("tune rename", "Give a run another name.", "RUN", "name or id of a run", True, more="NAME"),
        Command("tune note", "Write a note on a run; `-` removes it.", "RUN", "name or id of a run", True, more="TEXT"),
        Command(
            "tune export-code", "Print the Python that trains a run again, or its recipe for another program.", "RUN", _RUN, False,
            (
                Flag("for", "for whom; default: python", "PROGRAM", ("python", "yaml", "script", "trl", "axolotl", "llama-factory", "olive")),
                Flag("output", "write it to this file", "FILE"),
            ),
        ),
        Command(
            "tune register", "Register a run as the next version of a named model.", "RUN", _RUN, False,
            (
                Flag("as", "name of the model, such as support-bot", "NAME"),
                Flag("stage", "where it stands; default: candidate", "STAGE", STAGES),
                Flag("note", "what people should know of it", "TEXT"),
                Flag("to", "not the run but its newest export in this format", "FORMAT"),
            ),
        ),
        Command(
            "tune models", "List the registered models with versions, stages and scores.", "NAME",
            "only this one, with where each version comes from",
        ),
        Command(
            "tune stage", "Move a version of a model to a stage; what was at production is archived then.", "NAME", "name of the model", True,
            (Flag("note", "why", "TEXT"),), more="VERSION STAGE",
        ),
        Command(
            "tune push", "Send an export of a run, with its model card, to the hub or to MLflow.", "RUN", _RUN, False,
            (
                Flag("to", "where", "WHERE", DESTINATIONS),
                Flag("repo", "name there: me/my-model on the hub, a model's name in MLflow", "NAME"),
                Flag("format", "the newest export in this format; default: the newest", "FORMAT"),
                Flag("private", "for you alone, hub only; one that is there stays as it is"),
                Flag("stage", "alias of the new version, mlflow only, such as production", "STAGE"),
                Flag("uri", "tracking server, mlflow only; default: as MLflow is set up", "URI"),
            ),
        ),
        Command(
            "tune model-card", "Print the model card of a run: how it was trained, its results, its limits.", "RUN", _RUN, False,
            (Flag("output", "write it to this file", "FILE"),),
        ),
        Command(
            "tune gpu", "Show what holds which memory, of the GPU and of the machine.",
            flags=(Flag("free", "first give back what nobody uses: the last error's frames, garbage, caches"),),
        ),
        Command("tune doctor", "Check the environment and say what to do."),
        Command("tune pause", "Let a run save and wait; its memory stays taken.", "RUN", _RUN),
        Command("tune checkpoint", "Let a run save after its current step.", "RUN", _RUN),
    )
}  # fmt: skip
VERBS = tuple(name.removeprefix("tune ") for name in COMMANDS if name.startswith("tune "))


def parse(command: Command, line: str | Sequence[str], prefix: str = "%") -> Parsed:
    """Understand what follows a command.

    Args:
        command: The command.
        line: The rest of the line, or its words when a shell has split it.
        prefix: How the command is written, for help.

    Raises:
        HelpWanted: ``-h`` or ``--help``. BadUsage: Anything unknown, missing or doubled, with the nearest name.

    Example:
        >>> parse(COMMANDS["finetune"], "bot --fresh method.r=8")
        Parsed(positional='bot', flags={'fresh': True}, keys={'method.r': '8'}, rest=[])
    """
    words = list(split(line)) if isinstance(line, str) else list(line)
    parsed = Parsed()
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            raise HelpWanted(command.help_text(prefix))
        if word.startswith("--"):
            _take_flag(command, word[2:], words, parsed, prefix)
        elif word.startswith("-") and len(word) > 1 and not word[1:2].isdigit():
            raise BadUsage(f"There is no option {word}. Options are written in full: {_flag_names(command)}.")
        elif command.takes_keys and "=" in word and _KEY.fullmatch(word.partition("=")[0]):
            key, _, value = word.partition("=")
            if key in parsed.keys:
                raise BadUsage(f"{key} is there twice.")
            parsed.keys[key] = value
        elif parsed.positional is not None and command.more is not None:
            parsed.rest.append(word)
        elif command.positional is None or parsed.positional is not None:
            raise BadUsage(f"What is `{word}`? Usage: {command.usage(prefix)}")
        else:
            parsed.positional = word
    if command.needed and parsed.positional is None:
        raise BadUsage(f"{command.positional} is missing. Usage: {command.usage(prefix)}")
    if command.more is not None and not command.more.startswith("[") and not parsed.rest:
        raise BadUsage(f"{command.more} is missing. Usage: {command.usage(prefix)}")
    return parsed


def split(line: str) -> list[str]:
    """Split a line into words, quotes taken off; a comment ends it."""
    for text in (line, re.split(r"(?:^|\s)#", line)[0]):  # a comment may hold half a pair of quotes
        try:
            words = shlex.split(text)
        except ValueError as error:
            problem = str(error)
            continue
        comment = next((i for i, word in enumerate(words) if word.startswith("#")), len(words))
        return words[:comment]
    raise BadUsage(f"The line cannot be read: {problem}.")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a did-you-mean sentence, or nothing."""
    names = list(known)
    near = [name for name in names if word and name.startswith(word)]
    near = near or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else ""


def _take_flag(command: Command, word: str, words: list[str], parsed: Parsed, prefix: str) -> None:
    name, has_value, value = word.partition("=")
    flag = next((flag for flag in command.flags if flag.name == name), None)
    if flag is None:
        known = [flag.name for flag in command.flags]
        advice = nearest(name, known).replace("mean ", "mean --")
        raise BadUsage(f"There is no option --{name}.{advice} Usage: {command.usage(prefix)}")
    if flag.key in parsed.flags:
        raise BadUsage(f"--{name} is there twice.")
    if flag.value is None:
        if has_value:
            raise BadUsage(f"--{name} takes no value.")
        parsed.flags[flag.key] = True
        return
    if not has_value and words and not words[0].startswith("--"):
        value = words.pop(0)
    if not value:
        raise BadUsage(f"--{name} needs a value: --{name} {flag.value}.")
    if flag.choices and value not in flag.choices and command.name != "export":  # exporters may be plug-ins
        raise BadUsage(f"--{name} must be {' or '.join(flag.choices)}, got {value!r}.{nearest(value, flag.choices)}")
    read = {str: lambda _, text: text, int: _whole_number, float: _share}[flag.kind]
    parsed.flags[flag.key] = read(name, value)


def _whole_number(name: str, value: str) -> int:
    if not re.fullmatch(r"[+-]?\d+", value):
        raise BadUsage(f"--{name} must be a whole number, got {value!r}.")
    if int(value) < 1:
        raise BadUsage(f"--{name} must be at least 1, got {value}.")
    return int(value)


def _share(name: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < math.inf:
        raise BadUsage(f"--{name} must be a number of at least 0, got {value!r}.")
    return share


def _flag_names(command: Command) -> str:
    return ", ".join(f"--{flag.name}" for flag in command.flags) or "none"


def _choices(flag: Flag) -> str:
    return f" ({', '.join(flag.choices)})" if flag.choices else ""
