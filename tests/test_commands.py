"""A fault that a user can mend is one line and an exit code; a fault of the program is a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storm.commands import INTERRUPTED, guarded


def _raise(error: BaseException) -> int:
    raise error


def test_a_body_gives_its_own_code() -> None:
    assert guarded(lambda: 0) == 0 and guarded(lambda: 1) == 1


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("m.csv: no column image; add it"), 2, ["m.csv: no column image; add it"]),
        (PermissionError(13, "Permission denied", "out/store"), 2, ["out/store", "Permission denied", "you may write"]),
        (OSError(28, "No space left on device", "out/store"), 2, ["out/store", "No space left", "free space"]),
        (KeyboardInterrupt(), INTERRUPTED, ["interrupted", "goes on"]),
    ],
)
def test_one_line(error: BaseException, code: int, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: _raise(error)) == code
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and all(part in text for part in told)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: len((tmp_path / "absent.csv").read_bytes())) == 2
    assert "absent.csv" in capsys.readouterr().err


def test_our_own_faults_keep_their_traceback() -> None:
    with pytest.raises(AssertionError):
        guarded(lambda: _raise(AssertionError("ours")))


def test_a_name_that_the_terminal_cannot_show_stops_nothing() -> None:
    code = "from storm.commands import guarded; guarded(lambda: print('Zo\\u00eb') or 0)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "Zo\\xeb\n"


@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_ends_a_command_without_a_word(lines: int, unbuffered: str) -> None:
    code = f"""
import sys
from storm.commands import guarded
sys.stdin.read()
sys.exit(guarded(lambda: [print("a line") for _ in range({lines})] and 0))
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as running:
        assert running.stdin and running.stdout and running.stderr
        running.stdout.close()
        running.stdin.close()
        assert (running.wait(60), running.stderr.read()) == (141, b"")
