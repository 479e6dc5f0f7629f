"""What every command shares: atomic files and one-line errors."""

from __future__ import annotations

import os

import pytest

from groupvit_fast.console import UserError, run_command, write_bytes_atomically


def test_files_get_the_permissions_of_the_user(tmp_path):
    previous = os.umask(0o022)
    try:
        write_bytes_atomically(tmp_path / "new" / "file", b"1")
    finally:
        os.umask(previous)
    assert (tmp_path / "new" / "file").stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_bytes_atomically(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such thing; do this"), 1, "error: no such thing; do this\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.jpg"),
            1,
            "error: x.jpg: No such file or directory\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_faults_of_the_input_are_one_line(capsys, error, status, line):
    def main(_):
        raise error

    assert run_command(main, []) == status
    assert capsys.readouterr().err == line


def test_faults_of_the_program_stay_visible():
    def main(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(main, [])
