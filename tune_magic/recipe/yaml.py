"""YAML 1.2 with line numbers, the one reader of recipes.

ruamel.yaml reads `1e-4` as a number and `no` as a word, refuses equal keys, and knows where each key stands.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scalarfloat import ScalarFloat
from ruamel.yaml.scalarint import ScalarInt

from tune_magic.errors import Fault, RecipeError

Lines = dict[str, int]
_SCALARS: tuple[tuple[type, Any], ...] = ((ScalarBoolean, bool), (ScalarFloat, float), (ScalarInt, int), (str, str))


def read(text: str, *, first_line: int = 1) -> tuple[dict[str, Any], Lines]:
    """Parse `text` and return its plain mapping and the line of each dotted key.

    Args:
        text: YAML 1.2.
        first_line: Line number of its first line in the cell or file.

    Raises:
        RecipeError: Not YAML, two equal keys, or no mapping at the top.
    """
    loader = YAML(typ="rt", pure=True)
    loader.version = (1, 2)
    try:
        tree = loader.load(text)
    except DuplicateKeyError as error:
        key = _parent(text, error) + str(error.problem).split('"')[1]
        line = _line(error, first_line)
        raise RecipeError([Fault(key, "is there twice.", "Keep one of the two.", line)]) from None
    except (ReaderError, RecursionError) as error:
        place = text[: getattr(error, "position", 0)].count("\n") + first_line
        problem = "nested too deep" if isinstance(error, RecursionError) else "a character that no text has"
        raise RecipeError([Fault("", f"is not YAML: {problem}.", None, place)]) from None
    except MarkedYAMLError as error:
        problem = str(error.problem or error.context or "not YAML").strip()
        advice = "A value with `: ` or a leading `{`, `[`, `%`, `@` needs quotes; indent with spaces."
        raise RecipeError([Fault("", f"is not YAML: {problem}.", advice, _line(error, first_line))]) from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, CommentedMap):
        raise RecipeError([Fault("", "A recipe is lines of `key: value`.", "For example `model: ...`.", first_line)])
    lines: Lines = {}
    return _plain(tree, "", lines, first_line), lines


def write(content: Mapping[str, Any]) -> str:
    r"""Return a mapping as YAML that `read` gives back: one line a key, mappings and lists in brackets.

    Example:
        >>> write({"model": "tiny", "method": {"name": "lora", "r": 8}})
        'model: tiny\nmethod: {name: lora, r: 8}\n'
    """
    dumper = YAML(typ="rt", pure=True)  # 1.2 unless told otherwise
    dumper.width = 10_000
    tree = CommentedMap()
    for key, value in content.items():
        tree[key] = _flowing(value)
    out = io.StringIO()
    dumper.dump(tree, out)
    return out.getvalue()


def write_for_others(content: Mapping[str, Any]) -> str:
    r"""Return a mapping as YAML that readers of version 1.1 understand too, such as PyYAML: `1.0e-4` and quoted `"no"`.

    Example:
        >>> write_for_others({"rate": 1e-4, "names": ["no"]})
        "rate: 0.0001\nnames:\n- 'no'\n"
    """
    dumper = YAML(typ="rt", pure=True)
    dumper.version = (1, 1)
    dumper.width = 10_000
    out = io.StringIO()
    dumper.dump(dict(content), out)
    return out.getvalue().partition("---\n")[2]  # what names the version is a word that some readers refuse


def _flowing(value: Any) -> Any:
    if not isinstance(value, Mapping | list):
        return value
    node: Any = CommentedMap(value) if isinstance(value, Mapping) else CommentedSeq(value)
    node.fa.set_flow_style()
    return node


def _plain(node: Any, path: str, lines: Lines, first_line: int) -> Any:
    if isinstance(node, CommentedMap):
        content = {}
        for key in node:
            name = f"{path}.{key}" if path else str(key)
            if key not in node.lc.data:
                line = node.lc.line + first_line
                raise RecipeError(
                    [Fault(name, "came by a merge key (`<<`), which is not read.", "Write it out.", line)]
                )
            lines[name] = node.lc.key(key)[0] + first_line
            content[str(key)] = _plain(node[key], name, lines, first_line)
        return content
    if isinstance(node, CommentedSeq):
        return [_plain(item, f"{path}.{i}", lines, first_line) for i, item in enumerate(node)]
    kind = next((kind for wrapper, kind in _SCALARS if isinstance(node, wrapper)), None)
    return node if kind is None else kind(node)


def _parent(text: str, error: DuplicateKeyError) -> str:
    """Return the dotted path, with its last dot, of the mapping that holds a key twice."""
    loader = YAML(typ="rt", pure=True)
    loader.allow_duplicate_keys = True
    start = error.context_mark

    def search(node: Any, path: str) -> str | None:
        if not isinstance(node, CommentedMap):
            return None
        if start is not None and (node.lc.line, node.lc.col) == (start.line, start.column):
            return path
        return next((found for key in node if (found := search(node[key], f"{path}{key}.")) is not None), None)

    return search(loader.load(text), "") or ""


def _line(error: MarkedYAMLError, first_line: int) -> int:
    mark = error.problem_mark or error.context_mark
    return int(mark.line) + first_line if mark else first_line
