"""The one module that writes to disk.

Every write is atomic: bytes go to a temporary name in the same folder, are flushed to the device, and only then take
their final name. A crash at any instant leaves the old file, the new file, or a temporary name that `sweep` removes.
All calls into the operating system go through the module attribute ``os``, so that a test can make each of them fail.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

from tune_magic import secrets

TEMPORARY = ".tmp-"
TRASH = ".trash-"
_COPIED_BYTES = 1 << 18  # at once
_counter = itertools.count()


def plain(value: Any) -> Any:
    """Make `value` valid JSON without secrets: non-finite floats become the words ``nan``, ``inf`` and ``-inf``."""
    if isinstance(value, str):
        return secrets.hide(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _field(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _field(key: Any, value: Any) -> Any:
    if isinstance(value, str) and value and secrets.is_secret_name(key):
        return secrets.HIDDEN
    return plain(value)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Serialise `value` as strict JSON (no bare NaN, which browsers reject)."""
    separators = (",", ": ") if indent else (",", ":")
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_bytes(path, (to_json(value, indent=1) + "\n").encode(), durable=durable)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_bytes(path, secrets.hide(text).encode(), durable=durable)


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write each of `rows` to `path` as a line of JSON, as they come, atomically; `each_json_line` reads them."""

    def write(temporary: Path) -> None:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for row in rows:
                write_all(descriptor, f"{to_json(row)}\n".encode())
        finally:
            os.close(descriptor)

    produce(path, write)


def each_json_line(path: Path) -> Iterator[Any]:
    """Yield what `write_json_lines` wrote; a text may hold every mark of a line's end but the one between rows.

    Raises:
        OSError: There is no such file.
    """
    with path.open("rb") as lines:  # in bytes: only \n ends a line
        for line in lines:
            yield json.loads(line)


def read_json_lines(path: Path) -> list[Any]:
    """Return all that `each_json_line` yields."""
    return list(each_json_line(path))


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to `path`, atomically.

    Args:
        path: Its folder must exist.
        data: The whole content.
        durable: Flush file and folder to the device. False for hints such as the heartbeat.

    Raises:
        OSError: Nothing has changed on disk.
    """

    def write(temporary: Path) -> None:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)

    produce(path, write, durable=durable)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`: a single `write` may take only part of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def produce(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Let `write` (a library's own save function, say) fill a temporary file that then becomes `path`."""
    temporary = _temporary(path)
    try:
        write(temporary)
        if durable:
            _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        _flush(path.parent)


@contextlib.contextmanager
def new_folder(target: Path, mode: int = 0o700) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends without an error.

    Raises:
        FileExistsError: `target` is already there with content; nothing was changed.
    """
    temporary = _temporary(target)
    os.mkdir(temporary, mode)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _flush(Path(folder) / name)
            _flush(Path(folder))
        _claim(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(target.parent)


def make_folder(path: Path) -> None:
    """Create `path` and its parents, readable by its owner alone, unless it is there."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def claim(path: Path) -> bool:
    """Create a folder, readable by its owner alone, and return whether this process is the one that did."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return False
    return True


def ensure_room(folder: Path, needed_bytes: int) -> None:
    """Check that a folder's disk has room.

    Raises:
        OSError: ENOSPC, saying what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        reason = f"{needed_bytes / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {reason}")


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there; no reader ever sees half a folder: it is renamed away first."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    trash = path.with_name(f"{TRASH}{path.name}-{_token()}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path) -> list[str]:
    """Remove what earlier crashes left in `folder` and return the names. Only its single writer may call this."""
    leftovers = [p for p in folder.iterdir() if p.name.startswith((TEMPORARY, TRASH))] if folder.is_dir() else []
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


class Scratch:
    """A file that has lost its name: the system frees its space with the last that has it open or mapped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def append(self, data: bytes) -> None:
        """Write behind what is there.

        Raises:
            OSError: When the disk is full.
        """
        write_all(self._descriptor, data)

    def copy_to(self, path: Path) -> None:
        """Write the content to a new file.

        Raises:
            OSError: When the disk is full.
        """
        size = os.fstat(self._descriptor).st_size
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            start = 0
            while start < size:
                part = os.pread(self._descriptor, _COPIED_BYTES, start)
                write_all(target, part)
                start += len(part)
        finally:
            os.close(target)

    def map(self) -> mmap.mmap | bytearray:
        """Return the content, as writable memory whose changes stay this process's own."""
        size = os.fstat(self._descriptor).st_size
        if not size:
            return bytearray()  # nothing cannot be mapped
        return mmap.mmap(self._descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Scratch]:
    """Yield a new file on the disk of `folder`; who maps it inside keeps its content."""
    path = _temporary(folder / "scratch")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    try:
        yield Scratch(descriptor)
    finally:
        os.close(descriptor)


def link(source: Path, target: Path) -> bool:
    """Give a file a second name, so that it stays when the first is removed; False where the disk knows no such names."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def touch(path: Path) -> None:
    """Give a file the time of now."""
    os.utime(path)


def tell_system(path: Path, text: str) -> None:
    """Write to one of the system's own files, such as those in /proc: nothing comes to rest on a disk.

    Raises:
        OSError: It is not there, or takes no such text.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def open_append(path: Path) -> int:
    """Open `path` for appending whole lines and return the descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def append(descriptor: int, data: bytes, *, durable: bool) -> None:
    """Append `data` as one piece: on an error the file is cut back to what it held before."""
    size = os.fstat(descriptor).st_size
    try:
        write_all(descriptor, data)
        if durable:
            os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def close(descriptor: int) -> None:
    """Close what `open_append` opened."""
    os.close(descriptor)


def truncate(descriptor: int, size_bytes: int) -> None:
    """Cut an open file to `size_bytes` and flush it."""
    os.ftruncate(descriptor, size_bytes)
    os.fsync(descriptor)


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`, refusing every way out of the folder.

    Raises:
        ValueError: `name` is absolute, climbs out, or passes through a link that leads out.

    Example:
        >>> inside(Path("/runs/a"), "../b")
        Traceback (most recent call last):
        ValueError: '../b' leads out of /runs/a
    """
    root = folder.resolve()
    path = (root / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(root) or path == root:
        raise ValueError(f"{name!r} leads out of {folder}")
    return path


def _claim(temporary: Path, target: Path) -> None:
    """Give a finished folder its name; a rename alone would replace an empty folder."""
    if target.exists():
        raise FileExistsError(f"{target} already exists")
    os.rename(temporary, target)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY}{path.name}-{_token()}")


def _token() -> str:
    """Differ between processes, calls and containers, so that two writers never share a temporary name."""
    return f"{os.getpid()}-{next(_counter)}-{token_hex(3)}"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
