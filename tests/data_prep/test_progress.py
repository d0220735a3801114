"""Progress: plain lines in a log, a bar on a terminal, aligned tables."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from data_prep import progress

WORK = """
from data_prep.progress import Progress
with Progress(3) as shown:
    shown.step("one\\n    a note")
    shown.step()
    shown.step("three")
"""


def test_a_log_has_a_line_for_each_text_with_counts_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress(3) as shown:
        shown.step("one\n    a note")
        shown.step()
        shown.step("three")
    assert capsys.readouterr() == ("one [1/3, 0:00]\n    a note\nthree [3/3, 0:00]\n", "")


def test_steps_without_a_text_are_told_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("data_prep.progress.time.monotonic", lambda: now[0])
    shown = progress.Progress(4_000_000, unit="B", scaled=True)
    for seconds in (1, 30, 31, 3700):
        now[0] = 100.0 + seconds
        shown.step(amount=1_000_000)
    assert capsys.readouterr().out == "[2.0 MB/4.0 MB, 0:30]\n[4.0 MB/4.0 MB, 1:01:40]\n"


def test_a_terminal_has_a_bar_and_clean_lines() -> None:
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    done = subprocess.run([sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=slave, check=True, text=True,
                          cwd=Path(__file__).parents[2])  # fmt: skip
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert done.stdout == "one\n    a note\nthree\n"
    assert "3/3" in shown and "slide/s" in shown


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (99_960, "100 kB"), (999_600, "1.0 MB"), (2.5e18, "2500 PB")],
)
def test_sizes(count: float, text: str) -> None:
    assert progress.size(count) == text


def test_a_table_is_aligned() -> None:
    assert progress.table(["name", "n"], [["a", 1], ["longer", 1000]]) == "name       n\na          1\nlonger  1000"
