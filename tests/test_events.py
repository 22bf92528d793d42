"""The event log: torn tails, flipped bits, racing readers (fault matrix F1, F2, F3)."""

import random
import re
import threading

import pytest

from tune_magic import files
from tune_magic.storage import events
from tune_magic.storage.events import EventLog, EventReader, decode, encode


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as writer:
        for step in range(200):
            writer.append("step", step=step, loss=float("nan") if step == 7 else step / 3, text='quote " and ü')
    return path


def test_a_line_is_the_published_format(log):
    first = log.read_bytes().split(b"\n")[0]
    assert first.startswith(b'{"seq":0,"attempt":1,"t":')
    assert re.fullmatch(rb'.*,"crc":"[0-9a-f]{8}"}', first)
    assert decode(first)["type"] == "step"
    assert b'"loss":"nan"' in log.read_bytes()


def test_f1_a_log_cut_at_any_byte_keeps_its_prefix_and_takes_more(log, tmp_path, full):
    whole = log.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(0, len(whole) + 1, 1 if full else 37):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        expected = sum(end <= cut for end in ends)
        reader = EventReader(path)
        assert [e["seq"] for e in reader.poll()] == list(range(expected))
        assert reader.damaged_line is None
        with EventLog(path) as writer:
            assert writer.append("state", state="starting")["seq"] == expected
        again = EventReader(path)
        assert [e["seq"] for e in again.poll()] == list(range(expected + 1))
        assert again.damaged_line is None


def test_f2_no_flipped_bit_makes_a_wrong_event(log, tmp_path, full):
    whole = log.read_bytes()
    truth = list(EventReader(log).poll())
    generator = random.Random(0)
    for _ in range(3000 if full else 300):
        place = generator.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << generator.randrange(8)
        path = tmp_path / "flipped.jsonl"
        path.write_bytes(bytes(flipped))
        reader = EventReader(path)
        events = list(reader.poll())
        assert all(event == truth[event["seq"]] for event in events)
        line = whole[:place].count(b"\n") + 1
        is_last = line == len(truth)
        assert len(events) == len(truth) or reader.damaged_line == line or is_last
        assert is_last or reader.damaged_line == line


def test_f2_a_damaged_run_says_where_and_still_renders(make_run):
    run = make_run()
    with EventLog(run.path / "events.jsonl") as writer:
        for state in ("starting", "running", "finished"):
            writer.append("state", state=state)
    path = run.path / "events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"running"', b'"rvnning"'))
    assert run.status == "damaged"
    assert run.damage == "log damaged at line 2"
    card = run.card()
    assert "log damaged at line 2" in card["text/plain"]
    assert "log damaged at line 2" in card["text/html"]


def test_a_missing_line_is_damage(log):
    lines = log.read_bytes().split(b"\n")
    del lines[50]
    log.write_bytes(b"\n".join(lines))
    reader = EventReader(log)
    assert len(list(reader.poll())) == 199
    assert reader.damaged_line == 51


def test_f3_a_reader_sees_a_racing_writer_once_and_in_order(tmp_path):
    path = tmp_path / "events.jsonl"
    count = 10_000
    lines = b"".join(encode({"seq": i, "attempt": 1, "t": 0.0, "type": "step", "step": i}) for i in range(count))
    generator = random.Random(1)
    done = threading.Event()

    def write():
        with path.open("ab", buffering=0) as stream:
            place = 0
            while place < len(lines):
                size = generator.randrange(1, 997)
                stream.write(lines[place : place + size])
                place += size
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    reader = EventReader(path)
    seen = []
    while not done.is_set() or len(seen) < count:
        seen += [event["step"] for event in reader.poll()]
    thread.join()
    assert seen == list(range(count))
    assert reader.damaged_line is None


def test_a_later_version_may_add_types_states_and_fields(make_run):
    run = make_run()
    with EventLog(run.path / "events.jsonl") as writer:
        writer.append("state", state="running", mood="new")
        writer.append("aurora", colour="green")
        writer.append("state", state="levitating")
    assert run.summary().state == "running"


def test_the_later_attempt_wins_and_what_was_not_saved_is_forgotten(make_run):
    run = make_run()
    path = run.path / "events.jsonl"
    with EventLog(path) as writer:
        writer.append("state", state="running", from_step=0)
        for step in range(1, 6):
            writer.append("step", step=step, loss=1.0)
    with EventLog(path) as writer:
        assert writer.attempt == 2
        writer.append("state", state="running", from_step=3)
        writer.append("step", step=4, loss=2.0)
    assert {step: e["loss"] for step, e in run.summary().steps.items()} == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0}


def test_an_append_that_fails_leaves_no_half_line(log, monkeypatch):
    before = log.read_bytes()
    with EventLog(log) as writer:
        real = files.os.write
        monkeypatch.setattr(events, "PATIENCE_S", 0.0)
        monkeypatch.setattr(files.os, "write", lambda fd, data: real(fd, bytes(data)[:10]) and _full())
        with pytest.raises(OSError, match="space"):
            writer.append("step", step=200)
        assert log.read_bytes() == before
        monkeypatch.undo()
        assert writer.append("step", step=200)["seq"] == 200


def _full():
    raise OSError(28, "No space left on device")
