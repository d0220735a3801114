"""A fault that a user can mend is one line and an exit code; a fault of the program is a traceback."""

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
