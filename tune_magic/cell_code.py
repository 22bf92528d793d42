"""Plug-ins that a notebook's cells define: what they say, its hash, and their way to a worker.

A recipe names them as it names installed ones. They travel by value over the worker's standard input and are never
written to disk; the run folder keeps their source, to read, and its hash, by which a run is recognised. Whoever goes on
with a run runs the cell again.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import dis
import functools
import hashlib
import inspect
import json
import linecache
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle

from tune_magic import plugins
from tune_magic.errors import TuneError
from tune_magic.storage.folder import RunFolder

if TYPE_CHECKING:
    from pydantic import BaseModel

    from tune_magic.recipe.schema import Recipe

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_OVER_A_RUN = ("evaluate", "export", "chat", "serve")  # jobs that need what their run needed
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
_UNSAID = ("_abc_impl", "__annotate__", "__annotate_func__")  # of a class: Python's own
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)


@dataclass(frozen=True)
class CellCode:
    """What a run folder keeps of a plug-in that a cell defined.

    Attributes:
        kind: objective, method, ...
        name: As the recipe calls it.
        source: Its text; empty where it cannot be had.
        hash: SHA-256 of what it says: its text without comments, that of the functions and classes it uses, and the
            values of its globals and of what stands in its classes.
    """

    kind: str
    name: str
    source: str
    hash: str

    def __str__(self) -> str:
        return f"the {self.kind} `{self.name}`"


_received: dict[tuple[str, str], CellCode] = {}  # in a worker


def of_recipe(recipe: Recipe) -> list[CellCode]:
    """Return what a recipe names that cells of this process define."""
    wanted = [("method", recipe.method.name), ("format", recipe.data.format or "")]
    own_format: Any = plugins.local("format", recipe.data.format or "")
    objective = recipe.objective.name if recipe.objective else getattr(own_format, "objective", "")
    wanted += [("objective", objective)]
    wanted += [("augmenter", options.kind) for options in recipe.data.augment]
    wanted += [("callback", options.name) for options in recipe.callbacks]
    return of_names(wanted)


def of_names(wanted: Iterable[tuple[str, str]]) -> list[CellCode]:
    """Return those of some plug-ins, by kind and name, that cells of this process define."""
    return [_record(kind, name) for kind, name in wanted if plugins.local(kind, name) is not None]


def prints(recipe: Recipe) -> dict[str, str]:
    """Return the hash of each, as fingerprints of a run."""
    return {f"{code.kind} {code.name}": code.hash for code in of_recipe(recipe)}


def kept(codes: Iterable[CellCode]) -> dict[str, Any]:
    """Return what ``run.json`` says of them; nothing where there are none.

    Raises:
        TuneError: One uses what cannot be sent to a worker.
    """
    entries = [asdict(code) for code in codes if _pickled(code)]
    return {"cell_code": entries} if entries else {}


def needed(job: RunFolder) -> list[CellCode]:
    """Return what a job needs of cells: its own, and that of the run it is over."""
    infos = [job.info]
    if job.kind in _OVER_A_RUN:
        infos.append(RunFolder(job.path.parent.parent).info)
    return [CellCode(**entry) for info in infos for entry in info.get("cell_code", [])]


def require(job: RunFolder) -> list[CellCode]:
    """Return what a job needs of cells, after looking that it is there as it was.

    Raises:
        TuneError: Naming the plug-in whose cell must be run.
    """
    codes = needed(job)
    for code in codes:
        if plugins.local(code.kind, code.name) is None:
            problem = f"{job.name or job.id} needs {code}, which a notebook cell defined and which is not here."
            hint = "Run the cell that defines it."
        elif _record(code.kind, code.name).hash != code.hash:
            problem = f"{job.name or job.id} was made with other code of {code} than there is now."
            hint = "Run the cell that defines it as it was, with the helpers and values it used."
        else:
            continue
        raise TuneError(problem, hint=f"{hint} Its source is kept: `run.cell_code[{f'{code.kind} {code.name}'!r}]`.")
    return codes


def parcel(job: RunFolder) -> bytes:
    """Return what the worker of a job is sent: the plug-ins by value; empty where it needs none.

    Raises:
        TuneError: One is not here, has changed, or uses what cannot be sent; it is named.
    """
    codes = require(job)
    if not codes:
        return b""
    entries = [asdict(code) | {"code": base64.b64encode(_pickled(code)).decode()} for code in codes]
    return json.dumps(entries).encode()


def receive(job: RunFolder, content: bytes) -> None:
    """Register what was sent; the other end of `parcel`.

    Raises:
        TuneError: Something is missing, or cannot be unpickled here; it is named.
    """
    codes = needed(job)
    if not codes:
        return
    try:
        entries = {(entry["kind"], entry["name"]): entry for entry in json.loads(content)}
    except ValueError:  # its sender has ended, or never was
        entries = {}
    for code in codes:
        if (code.kind, code.name) not in entries:
            raise TuneError(
                f"The worker was not sent {code}, which a notebook cell defines.", hint="Start the job from there."
            )
        try:
            plugin = cloudpickle.loads(base64.b64decode(entries[code.kind, code.name]["code"]))
        except Exception as error:
            raise TuneError(
                f"The worker cannot read {code}, which a notebook cell defines.",
                hint="Does it import a file beside the notebook? A worker has installed packages alone.",
            ) from error
        _received[code.kind, code.name] = code
        plugins.register(code.kind, code.name)(plugin)


def source_of(value: Any) -> str:
    """Return the text of a function or class, also of a class in a cell; empty where it cannot be had."""
    function = vars(value).get("function") if isinstance(value, type) else None
    if isinstance(function, staticmethod):  # a class around a function of the user's
        return source_of(function.__func__)
    try:
        lines = _class_text(value) if isinstance(value, type) else inspect.getsource(value)
    except (OSError, TypeError):
        return ""
    return textwrap.dedent(lines).rstrip() + "\n" if lines else ""


def _class_text(kind: type) -> str:
    """Return a class's text; `inspect` finds none of a class in a cell before Python 3.13."""
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(kind)
    functions = [getattr(value, "__func__", value) for value in vars(kind).values()]
    files = [f.__code__.co_filename for f in functions if isinstance(f, types.FunctionType)]
    for name in dict.fromkeys([*files, *reversed(list(linecache.cache))]):
        lines = linecache.getlines(name)
        text = "".join(lines)
        if f"class {kind.__name__}" not in text:
            continue
        with contextlib.suppress(SyntaxError):
            found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef) and n.name == kind.__name__]
            if found:
                first = min([found[-1].lineno, *(decorator.lineno for decorator in found[-1].decorator_list)])
                return "".join(lines[first - 1 : found[-1].end_lineno])
    return ""


def _record(kind: str, name: str) -> CellCode:
    if (kind, name) in _received:
        return _received[kind, name]
    plugin = plugins.local(kind, name)
    assert plugin is not None
    said = _Says({"__main__", plugin.__module__}).says(plugin)
    return CellCode(kind, name, source_of(plugin), hashlib.sha256(said.encode()).hexdigest())


class _Says:
    """Says what code is: the same text for the same code, whichever process it is in.

    Args:
        own: Modules whose code is said in full; what other modules define is said by its name.
    """

    def __init__(self, own: set[str]) -> None:
        self._own = own
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no number of an object is given to another
        self._ways: list[tuple[Any, Callable[[Any], str]]] = [
            (types.ModuleType, lambda module: f"module {module.__name__}"),
            ((list, tuple), lambda items: f"{type(items).__name__}({', '.join(map(self.says, items))})"),
            ((set, frozenset), lambda items: f"{type(items).__name__}({', '.join(sorted(map(self.says, items)))})"),
            (dict, self._pairs),
            ((staticmethod, classmethod), lambda method: self.says(method.__func__)),
            (types.MethodType, lambda method: self.says([method.__func__, method.__self__])),
            (property, lambda found: self.says([found.fget, found.fset])),
            (functools.partial, lambda part: self.says([part.func, part.args, part.keywords])),
            (types.FunctionType, self._function),
            (type, self._class),
        ]

    def says(self, value: Any) -> str:
        """Return a text for a value, a function or a class, with all it refers to."""
        if isinstance(value, _PLAIN):
            return repr(value)
        if id(value) in self._seen:
            return f"again {self._seen[id(value)]}"
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        say = next((say for kinds, say in self._ways if isinstance(value, kinds)), self._instance)
        return say(value)

    def _pairs(self, pairs: Mapping[Any, Any]) -> str:
        return f"{{{', '.join(f'{self.says(key)}: {self.says(item)}' for key, item in pairs.items())}}}"

    def _function(self, function: types.FunctionType) -> str:
        name = f"{function.__module__}.{function.__qualname__}"
        if function.__module__ not in self._own:
            return name
        text = source_of(function)
        return f"{_plain_text(text) if text else _code_text(function.__code__)} with {self._uses(function)}"

    def _uses(self, function: types.FunctionType) -> str:
        """Say the globals, the names of enclosing functions and the defaults that a function uses."""
        found = {
            name: function.__globals__[name] for name in _global_names(function.__code__) & {*function.__globals__}
        }
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not filled yet
                found[name] = cell.cell_contents
        found |= {"defaults": [function.__defaults__, function.__kwdefaults__]}
        return self._pairs(dict(sorted(found.items())))

    def _class(self, kind: type) -> str:
        from pydantic import BaseModel  # late: a kernel that loads the extension reads no recipe yet

        if kind.__module__ not in self._own:
            return f"{kind.__module__}.{kind.__qualname__}"
        members = {
            name: value for name, value in vars(kind).items() if name not in _UNSAID and not isinstance(value, _SLOTS)
        }
        functions = {name: value for name, value in members.items() if self._is_own(_function_of(value))}
        values = {name: value for name, value in members.items() if name not in functions and not name.startswith("__")}
        text = _class_text(kind)
        said = ""
        if text:
            uses = {name: self._uses(_function_of(value)) for name, value in functions.items()}  # type: ignore[arg-type]
            said = f"{_plain_text(textwrap.dedent(text))} with {sorted(uses.items())} and "
        else:
            values |= functions
        said += self._pairs(dict(sorted(values.items())))
        if issubclass(kind, BaseModel):
            said += f" keys {self._fields(kind)}"
        return f"class {kind.__qualname__} of {', '.join(map(self.says, kind.__bases__))}: {said}"

    def _is_own(self, function: types.FunctionType | None) -> bool:
        return function is not None and function.__module__ in self._own

    def _fields(self, kind: type[BaseModel]) -> str:
        """Say the keys of options: their bounds and words, and their defaults, which a schema has not all of."""
        from pydantic.errors import PydanticUserError

        defaults = {
            name: None if field.is_required() else [field.default, field.default_factory]
            for name, field in kind.model_fields.items()
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of defaults that JSON does not know
                schema = json.dumps(_without_defaults(kind.model_json_schema()), sort_keys=True)
        except PydanticUserError:  # a type that JSON does not know
            schema = ""
        return f"{self._pairs(defaults)} {schema}"

    def _instance(self, value: Any) -> str:
        if type(value).__module__ in self._own:
            return f"{self.says(type(value))} {self._pairs(getattr(value, '__dict__', {}))}"
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        around = getattr(value, "__wrapped__", None) or getattr(value, "func", None)  # a cache of a function, say
        if isinstance(around, types.FunctionType):
            return f"{name} of {self.says(around)}"
        try:
            return f"{name} {hashlib.sha256(cloudpickle.dumps(value)).hexdigest()}"
        except Exception:  # noqa: BLE001 - whatever cannot be pickled cannot be sent either, and is named then
            return name


def _function_of(value: Any) -> types.FunctionType | None:
    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return function if isinstance(function, types.FunctionType) else None


def _without_defaults(schema: Any) -> Any:
    """Return a JSON schema without its defaults: those that are sets have another order in each process."""
    if isinstance(schema, dict):
        return {name: _without_defaults(part) for name, part in schema.items() if name != "default"}
    return [_without_defaults(part) for part in schema] if isinstance(schema, list) else schema


def _global_names(code: types.CodeType) -> set[str]:
    """Return the names that code, and code inside it, looks up in its module."""
    names = {str(i.argval) for i in dis.get_instructions(code) if i.opname in _LOADS}
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return names.union(*map(_global_names, inner))


def _plain_text(source: str) -> str:
    """Return source without comments and spacing, which do not make it other code."""
    try:
        return ast.unparse(ast.parse(source))
    except SyntaxError:  # a lambda in the middle of a line
        return source


def _code_text(code: types.CodeType) -> str:
    """Return what stands for a function whose text cannot be had."""
    constants = [_code_text(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _pickled(code: CellCode) -> bytes:
    """Return a plug-in by value, with what it uses of its own module.

    Raises:
        TuneError: It uses something that cannot be pickled.
    """
    plugin = plugins.local(code.kind, code.name)
    assert plugin is not None
    try:
        with _by_value(plugin.__module__):
            return bytes(cloudpickle.dumps(plugin))
    except Exception as error:
        raise TuneError(
            f"{str(code).capitalize()} cannot be sent to the worker: it uses something that cannot be copied.",
            hint="Open files, locks and the like belong inside its functions, not into the notebook's variables.",
        ) from error


@contextlib.contextmanager
def _by_value(module: str) -> Iterator[None]:
    """While inside, what a module defines is pickled whole: a worker could not import a file beside a notebook."""
    found = sys.modules.get(module)
    if found is None or module == "__main__" or module in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    cloudpickle.register_pickle_by_value(found)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(found)
