"""A study: arms that differ from a base in a few keys, trained with several seeds, each judged on a class of genes.

In: a plan (YAML), a shard set of synthetic tissue, trained runs. Out: one JSON file per run, complete or absent, of
which storm.evaluate.study_table makes the tables. Nothing here trains: launch/study.py does.

    <out>/runs/<arm>-s<seed>-<key>/       the run folder
    <out>/runs/<arm>-s<seed>-<key>.log    what its training printed
    <out>/results/<arm>-s<seed>-<key>.json
    <out>/STUDY.md

The key is of the resolved config, of the shards, and of what lies in the files that the config names: after a change of
any of them the run has another name, and runs anew.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from storm import checkpoints, export, files
from storm.config import RunConfig, Section, dump, load
from storm.evaluate import classes
from storm.evaluate.expression import Cohort, open_cohort
from storm.shards import MANIFEST

BASE = "base"
_KEY_DIGITS = 12
_NAMED = (("encoder", "weights"), ("data", "descriptors"))  # keys that name a file
_OWN = ("seed", "run_dir", "data.shards")  # keys that the study sets itself
Result = dict[str, Any]


class Arm(Section):
    """One way to train."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    overrides: list[str] = Field(default=[], description="section.key=value, on top of the base")
    judged: Literal["a", "b", "c", "d", "e", ""] = Field(default="", description="class of genes; empty: all alike")
    seeds: int = Field(default=3, ge=1, description="trainings; with 1 the arm is exploratory")


class Plan(Section):
    """What a study compares."""

    title: str
    base: str = Field(description="config of the base, relative to the plan")
    seeds: int = Field(default=3, ge=1, description="trainings of the base")
    arms: list[Arm] = Field(default=[])

    @property
    def all_arms(self) -> list[Arm]:
        """The base, then the others."""
        return [Arm(name=BASE, seeds=self.seeds), *self.arms]


@dataclass(frozen=True)
class Run:
    """One training of one arm."""

    arm: Arm
    seed: int
    name: str
    overrides: list[str]  # as the trainer is given them, with run_dir and data.shards


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        ValueError: of its keys, two arms of one name, or an override that is no key of a run, or the study's own.
    """
    plan = load(Plan, path)
    names = [arm.name for arm in plan.all_arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: two arms are named {twice[0]!r}; name each arm once ({BASE!r} is the base's)")
    for arm in plan.all_arms:
        if own := [word for word in arm.overrides if word.partition("=")[0] in _OWN]:
            raise ValueError(
                f"{path}: arm {arm.name}: {own[0]!r}: the study sets {', '.join(_OWN)} itself; leave it out"
            )
        try:
            load(RunConfig, path.parent / plan.base, [*arm.overrides, "run_dir=x", "data.shards=x"])
        except ValueError as error:
            raise ValueError(f"{path}: arm {arm.name}: {error}") from None
    return plan


def runs(
    path: Path, plan: Plan, shards: Path, out: Path, seeds: int | None = None, only: Collection[str] = ()
) -> list[Run]:
    """The runs of a plan, the first seed of every arm first, so that a study that is cut short compares all of them.

    Args:
        seeds: at most so many per arm.
        only: names of arms; the base comes with them.

    Raises:
        ValueError: an arm that the plan has not, or a file that a config names and that does not read.
    """
    unknown = sorted(set(only) - {arm.name for arm in plan.all_arms})
    if unknown:
        raise ValueError(f"{path}: has no arm {unknown[0]!r}; it has {', '.join(a.name for a in plan.all_arms)}")
    chosen = [arm for arm in plan.all_arms if not only or arm.name in {*only, BASE}]
    data = files.sha256_file(shards / MANIFEST)
    digest = functools.cache(files.sha256_file)  # of one look at the plan: a file may change between two
    found = []
    for seed in range(max(arm.seeds for arm in chosen) if seeds is None else seeds):
        for arm in [arm for arm in chosen if seed < arm.seeds]:
            words = [*arm.overrides, f"seed={seed}"]
            name = f"{arm.name}-s{seed}-{_key(load_run(path, plan, words), data, digest)}"
            places = f"run_dir={_quoted(out / 'runs' / name)}", f"data.shards={_quoted(shards)}"
            found.append(Run(arm, seed, name, [*words, *places]))
    return found


def _quoted(path: Path) -> str:
    """A path as a value in YAML, in which a bare " #" would begin a comment."""
    return json.dumps(str(path), ensure_ascii=False)


def load_run(path: Path, plan: Plan, words: list[str]) -> RunConfig:
    """The config of a run, without the places that are of one machine."""
    return load(RunConfig, path.parent / plan.base, [*words, "run_dir=run", "data.shards=shards"])


def _key(config: RunConfig, data: str, digest: Callable[[Path], str]) -> str:
    """Of a config in which the hash of a file stands in place of its path."""
    for section, key in _NAMED:
        part = getattr(config, section)
        if named := getattr(part, key):
            try:
                part = part.model_copy(update={key: digest(Path(named))})
            except OSError as error:
                fact = f"{section}.{key}={named}: does not read ({error.strerror}); give a local file"
                raise ValueError(fact) from None
            config = config.model_copy(update={section: part})
    return files.sha256_of(f"{dump(config)}\n{data}".encode())[:_KEY_DIGITS]


def result_path(out: Path, run: Run) -> Path:
    """Where the result of a run is, or will be."""
    return out / "results" / f"{run.name}.json"


def results(out: Path, wanted: Sequence[Run]) -> list[Result]:
    """The results that are there, in the order of the runs. Raises ValueError where one is none."""
    paths = [path for run in wanted if (path := result_path(out, run)).is_file()]
    found = [files.read_json(path) for path in paths]
    for path, result in zip(paths, found, strict=True):
        if not isinstance(result, dict) or "arm" not in result:
            raise ValueError(f"{path}: is no result of a run; remove it, and the same command judges the run again")
    return found


class Judge:
    """Scores trained runs on one cohort; it and its baselines are made once, for the first run."""

    def __init__(self, stores: Path, shards: Path, truth: Path, commit: str = "") -> None:
        self.stores, self.shards, self.truth, self.commit = stores, shards, truth, commit
        self.known: tuple[Cohort, classes.References] | None = None

    def judge(self, run: Run, out: Path, train_s: float | None) -> None:
        """Export a finished run, score it by class and donor, and write its result.

        Args:
            train_s: of the training, where it ran at one go.

        Raises:
            ValueError: the run is not finished.
        """
        began, run_dir = time.perf_counter(), out / "runs" / run.name
        if not (run_dir / checkpoints.FINISHED).is_file():  # a training that a file STOP ended has exit code 0 too
            raise ValueError(f"{run_dir}: its training was stopped before its end; the same command goes on with it")
        pretrained = export.load(export.export(checkpoints.latest(run_dir), run_dir / "export"))
        if self.known is None:
            cohort = open_cohort(pretrained, self.stores, self.shards)
            self.known = cohort, classes.references(cohort, self.truth)
        cohort, references = self.known
        scored = classes.with_model(pretrained, cohort, references)
        files.write_json(
            result_path(out, run),
            scored | {
                "arm": run.arm.name, "seed": run.seed, "overrides": run.arm.overrides, "train_s": train_s,
                "evaluate_s": time.perf_counter() - began, "hardware": hardware(), "commit": self.commit,
                "code": checkpoints.code_version(), "model_code": pretrained.code_version,
                "model_hash": pretrained.hash, "shards_sha256": cohort.shards_hash, "split_by": cohort.split_by,
                "sections": {"train": len(cohort.train), "test": len(cohort.test)}, "test_donors": cohort.donors,
            },
        )  # fmt: skip


def hardware() -> str:
    """What a training on this machine runs on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {threads} threads per run"
