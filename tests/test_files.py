"""The one module that writes: failing calls and ways out of a folder (fault matrix F10, F29)."""

import ast
import errno
import os
from pathlib import Path

import pytest

from tune_magic import files

PACKAGE = Path(files.__file__).parent


class FailingOs:
    """`os` in which the n-th call of the kinds that touch the disk raises."""

    CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "ftruncate")

    def __init__(self, fail_at, code):
        self.fail_at, self.code, self.count = fail_at, code, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.fail_at:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call


def until_clean(monkeypatch, action, code, check):
    """Fail the first call, then the second, and so on, until nothing fails."""
    for n in range(1, 500):
        fake = FailingOs(n, code)
        monkeypatch.setattr(files, "os", fake)
        try:
            action()
        except OSError as error:
            assert error.errno == code
            failed = True
        else:
            failed = False
        monkeypatch.setattr(files, "os", os)
        check(failed)
        if fake.count < n:
            return n - 1
    raise AssertionError("never ran clean")


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_f10_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, code):
    path = tmp_path / "meta.json"
    path.write_text("old")

    def check(failed):
        assert path.read_text() in ("old", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["meta.json"]

    calls = until_clean(monkeypatch, lambda: files.write_text(path, "new"), code, check)
    assert calls >= 4  # open, write, fsync, replace at the least
    assert path.read_text() == "new"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOTEMPTY, errno.ENOSPC])
def test_f10_a_failed_folder_never_takes_its_name(tmp_path, monkeypatch, code):
    target = tmp_path / "step-1"

    def action():
        with files.new_folder(target) as folder:
            files.write_text(folder / "a", "1")
            files.write_text(folder / "b", "2")

    def check(failed):
        if target.exists():
            assert sorted(p.name for p in target.iterdir()) == ["a", "b"]
            files.shutil.rmtree(target)
        assert list(tmp_path.iterdir()) == []

    until_clean(monkeypatch, action, code, check)


def test_a_folder_never_replaces_another(tmp_path):
    target = tmp_path / "step-1"
    target.mkdir()
    (target / "kept").touch()
    with pytest.raises(FileExistsError), files.new_folder(target):
        pass
    assert (target / "kept").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_sweep_removes_what_crashes_left_and_nothing_else(tmp_path):
    for name in (".tmp-step-3-1-0", ".trash-step-1-1-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    (tmp_path / ".tmp-run.json-9-9").touch()
    (tmp_path / "step-2").mkdir()
    assert len(files.sweep(tmp_path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]


def test_a_file_a_folder_or_nothing_is_discarded_and_what_a_link_leads_to_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    for name in ("folder", "file", "link", "nothing"):
        files.discard(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "link/secret", ".", ""])
def test_f29_no_name_leads_out_of_a_folder(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret").touch()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out"):
        files.inside(folder, name)


def test_names_inside_are_allowed(tmp_path):
    assert files.inside(tmp_path, "a/b") == (tmp_path / "a" / "b").resolve()


def test_only_one_module_writes_to_disk():
    """Everything else goes through files.py; libraries are aimed at its temporary names."""
    writers = {"write_text", "write_bytes", "unlink", "rename", "replace", "rmdir", "touch", "symlink_to"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            if isinstance(function, ast.Name) and function.id == "open":
                found.append(f"{path.name}:{node.lineno} open")
            if not isinstance(function, ast.Attribute) or function.attr not in writers:
                continue
            owner = function.value
            is_ours = isinstance(owner, ast.Name) and owner.id in ("files", "run")  # `Run.rename` goes through files
            is_text = function.attr == "replace" and len(node.args) == 2
            if not (is_ours or is_text):
                found.append(f"{path.name}:{node.lineno} {function.attr}")
    assert found == []


def test_json_is_strict():
    assert files.to_json({"a": float("nan"), "b": [float("inf")], "c": 1.5}) == '{"a":"nan","b":["inf"],"c":1.5}'


@pytest.mark.parametrize("text", ["one\u2028two", "one\u0085two", "one\x0btwo\x1cthree\r\nfour\n", ""])
def test_rows_come_back_whatever_marks_of_a_line_their_texts_hold(text, tmp_path):
    rows = [{"text": text, "number": 1}, {"text": "after", "number": None}]
    files.write_json_lines(tmp_path / "rows.jsonl", rows)
    assert files.read_json_lines(tmp_path / "rows.jsonl") == rows


def test_what_is_hidden_is_part_of_one_text_and_not_of_the_line(tmp_path):
    rows = [{"prompt": "http://example.org", "completion": "me@example.org"}, {"text": "http://me:mine@example.org"}]
    files.write_json_lines(tmp_path / "rows.jsonl", rows)
    assert files.read_json_lines(tmp_path / "rows.jsonl") == [rows[0], {"text": "http://[hidden]@example.org"}]
