"""Train and compare the arms of a study: `python launch/study.py PLAN --shards DIR --store DIR --truth DIR --out DIR`.

Each run is one process of launch/pretrain.py. A run that has its result is left out, so the same command goes on where
it was stopped; one that fails is listed, and the others go on. OUT/STUDY.md is written anew after each run, and alone
with --table. Exit codes: 0 all runs have results, 1 some failed, 2 wrong usage or input.
"""

import argparse
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from storm import files
from storm.commands import guarded
from storm.evaluate import study, study_table

HERE = Path(__file__).resolve().parent
TABLE = "STUDY.md"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train and compare the arms of a study on synthetic tissue.")
    parser.add_argument("plan", type=Path, help="YAML: title, base (a config), arms")
    parser.add_argument("--shards", type=Path, required=True, help="shard set with test donors")
    parser.add_argument("--store", type=Path, required=True, help="folder of the slide stores it was packed from")
    parser.add_argument("--truth", type=Path, required=True, help="truth folder of the synthetic corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs, results and table")
    parser.add_argument("--seeds", type=int, metavar="N", help="at most so many per arm (default: as the plan has it)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: 1)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms, and the base")
    parser.add_argument("--table", action="store_true", help="write the table of the results that are there, and stop")
    args = parser.parse_args(words)
    if args.jobs < 1 or (args.seeds is not None and args.seeds < 1):
        parser.error("--jobs and --seeds are 1 or more")
    return args


def commit() -> str:
    """The commit of the checkout, with a + where tracked files differ from it; empty outside of one."""
    told = [
        subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False)
        for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    ]
    if told[0].returncode:
        return ""
    return told[0].stdout.strip() + ("+" if told[1].stdout.strip() else "")


class Study:
    """The runs of a plan, trained and judged a few at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.plan = args, study.read_plan(args.plan)
        self.wanted = study.runs(args.plan, self.plan, args.shards, args.out, args.seeds, args.only)
        self.judge = study.Judge(args.store, args.shards, args.truth, commit())
        self.failed: dict[str, str] = {}
        self.lock = threading.Lock()  # one evaluation and one table at a time
        self.training: set[subprocess.Popen[bytes]] = set()
        self.ends = False

    def run_all(self) -> None:
        """Train and judge what has no result yet."""
        todo = [run for run in self.wanted if not study.result_path(self.args.out, run).is_file()]
        print(f"{self.args.plan}: {len(self.wanted)} runs, {len(self.wanted) - len(todo)} done", flush=True)
        with ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                for _ in pool.map(self._run, todo):
                    pass
            except BaseException:
                self.ends = True
                for process in list(self.training):
                    process.terminate()  # it saves, and the same command goes on from there
                raise

    def _run(self, run: study.Run) -> None:
        if self.ends:
            return
        try:
            train_s = self._train(run)
            with self.lock:
                self.judge.judge(run, self.args.out, train_s)
        except (ValueError, OSError) as error:
            self.failed[run.name] = str(error)
            print(f"{run.name}: FAILED: {error}", file=sys.stderr, flush=True)
        else:
            print(f"{run.name}: done", flush=True)
        with self.lock:
            self.write_table()

    def _train(self, run: study.Run) -> float | None:
        """Seconds of the training; None where it went on from an earlier start, or was over."""
        run_dir = self.args.out / "runs" / run.name
        anew, log = not run_dir.exists(), run_dir.with_name(f"{run.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        base = self.args.plan.parent / self.plan.base
        command = [sys.executable, str(HERE / "pretrain.py"), "--config", str(base), *run.overrides]
        began = time.perf_counter()
        with log.open("ab") as told, subprocess.Popen(command, stdout=told, stderr=told) as process:
            self.training.add(process)
            code = process.wait()
            self.training.discard(process)
        if code:
            last = (log.read_text(encoding="utf-8", errors="replace").strip() or "no word").splitlines()[-1]
            raise ValueError(f"training ended with exit code {code}: {last} (see {log})")
        return time.perf_counter() - began if anew else None

    def write_table(self) -> str:
        """Write the table of what is there; its text."""
        found = study.results(self.args.out, self.wanted)
        text = study_table.text(self.plan, self.wanted, found, self.failed)
        files.write_bytes(self.args.out / TABLE, text.encode())
        return text


def act(args: argparse.Namespace) -> int:
    """Run the study, or write its table; the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no training is left behind
    found = Study(args)
    if not args.table:
        found.run_all()
    print(found.write_table())
    return 1 if found.failed else 0


def main(words: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    args = arguments(words)
    return guarded(lambda: act(args))


if __name__ == "__main__":
    sys.exit(main())
