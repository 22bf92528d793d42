"""The event log: one checksummed JSON line an event, append-only.

Format 1: ``{"seq","attempt","t","type",...,"crc"}``; `crc` is the CRC-32, in eight hex digits, over the bytes of the
line before ``,"crc":``. `seq` counts from 0 without gaps over the whole life of a run, `attempt` from 1 with each
start or resume, `t` is seconds since the epoch. Non-finite numbers are the words ``nan``, ``inf``, ``-inf``.
Readers skip what they do not know, so later versions may add types and fields.
"""

from __future__ import annotations

import errno
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from tune_magic import files

Event = dict[str, Any]
_CRC = b',"crc":'
_CHUNK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE_S, RETRY_S = 600.0, 0.5  # how long a full disk is waited for, and how often it is looked at
DURABLE = frozenset(
    {"state", "plan", "checkpoint", "vote"}
)  # flushed to the device; the rest costs 8 microseconds a line


def encode(event: Event) -> bytes:
    """Return the event's line, newline included."""
    body = files.to_json(event).encode()[:-1]
    return body + _CRC + b'"%08x"}\n' % zlib.crc32(body)


def decode(line: bytes) -> Event | None:
    """Return the event of a line without its newline, or None when a bit of it is wrong."""
    body, mark, crc = line.rpartition(_CRC)
    if not mark or crc != b'"%08x"}' % zlib.crc32(body):
        return None
    return dict(json.loads(body + b"}"))


class EventLog:
    """The writer. Only the holder of the run's lock may open one.

    Opening cuts a torn last line off, so that the next append starts on a line of its own.

    Args:
        path: The log; made when it is not there.
        attempt: Number of this start of the run. None: one more than the last in the log.
        patience_s: How long a full disk is waited for; None: ten minutes.
    """

    def __init__(self, path: Path, attempt: int | None = None, *, patience_s: float | None = None) -> None:
        reader = EventReader(path)
        last = None
        for event in reader.poll():
            last = event
        self._descriptor = files.open_append(path)
        if path.stat().st_size > reader.offset:
            files.truncate(self._descriptor, reader.offset)
        self._seq = reader.next_seq
        self._patience_s = patience_s
        self.attempt = attempt if attempt is not None else (last["attempt"] if last else 0) + 1

    def append(self, type: str, /, **fields: Any) -> Event:  # noqa: A002 - the field's name on disk
        """Append one event and return it.

        On a full disk the event is held and tried again, so that training waits and nothing is lost; when there is room
        again a warning says how long it took.

        Raises:
            OSError: Nothing was appended, not even half a line; a full disk had its time to become less so.
        """
        event = {"seq": self._seq, "attempt": self.attempt, "t": round(time.time(), 3), "type": type, **fields}
        line, waited_since = encode(event), None
        patience_s = PATIENCE_S if self._patience_s is None else self._patience_s
        while True:
            try:
                files.append(self._descriptor, line, durable=type in DURABLE)
                break
            except OSError as error:
                waited_since = waited_since or time.monotonic()
                if error.errno not in _FULL or time.monotonic() - waited_since >= patience_s:
                    raise
                time.sleep(RETRY_S)
        self._seq += 1
        if waited_since is not None:
            seconds = round(time.monotonic() - waited_since, 1)
            message = f"The disk was full for {seconds:.0f} s; the run waited and went on."
            self.append("warning", kind="disk_full", message=message, seconds=seconds)
        return event

    def close(self) -> None:
        """Close the file; the log takes no more events."""
        if self._descriptor >= 0:
            files.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EventReader:
    """Follows a log that may still be growing.

    `poll` yields each event once, in order, and never raises over content. A line that fails its checksum, or a gap in
    `seq`, is remembered in `damaged_line` (1-based) and skipped; an unfinished last line waits for the next poll.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.next_seq = 0
        self.damaged_line: int | None = None
        self._line = 0

    def poll(self) -> Iterator[Event]:
        """Yield what was appended since the last poll. Memory does not grow with the log."""
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            return
        with stream:
            stream.seek(self.offset)
            rest = b""
            while chunk := stream.read(_CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self.offset += len(line) + 1
                    self._line += 1
                    event = decode(line)
                    expected = self.next_seq
                    if event is not None:
                        self.next_seq = event["seq"] + 1
                    if event is None or event["seq"] != expected:
                        self.damaged_line = self.damaged_line or self._line
                    if event is not None:
                        yield event


def number(value: Any) -> float:
    """Read a number of an event: the words ``nan`` and ``inf`` are numbers there."""
    return float("nan") if value is None else float(value)
