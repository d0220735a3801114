"""Studies: plans, which runs are left, a real arm trained and judged, and tables of scores that are known."""

import subprocess
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch import study as driver
from storm import files
from storm.config import RunConfig, load
from storm.evaluate import study, study_table
from storm.evaluate.expression import MODEL
from tests import untrained

BASE = {"run_dir": "runs/x", "data": {"shards": "s", "workers": 0}, "model": {"preset": "tiny"}, "optim": {"steps": 2}}
ARMS = [
    {"name": "space_off", "overrides": ["model.space_depth=0"], "judged": "c"},
    {"name": "recut_off", "overrides": ["mask.recut=0"], "seeds": 1},
]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    return write(tmp_path, {"title": "A study", "base": "base.yaml", "arms": ARMS})


def write(folder: Path, values: dict) -> Path:
    (folder / "plan.yaml").write_text(yaml.safe_dump(values))
    return folder / "plan.yaml"


def shards(folder: Path, text: str = "{}") -> Path:
    """A shard set as far as its name goes."""
    (folder / text).mkdir(exist_ok=True)
    (folder / text / "manifest.json").write_text(text)
    return folder / text


def result(arm: str, seed: int, scores: np.ndarray, train_s: float | None = 120.0) -> study.Result:
    """As a run leaves it; `scores` [donors, classes]."""
    means = dict(zip("abcde", scores.mean(0).tolist(), strict=True))
    others = {"colour ridge": 0.1, "oracle": 0.6}
    return {
        "arm": arm, "seed": seed, "train_s": train_s, "methods": [MODEL, *others],
        "classes": {c: {"genes": 9, "scores": {MODEL: mean, **others}} for c, mean in means.items()},
        "model_by_donor": {c: scores[:, i].tolist() for i, c in enumerate("abcde")},
        "sections": {"train": 18, "test": 10}, "test_donors": len(scores), "split_by": "donor",
        "shards_sha256": "ab" * 32, "commit": "c0ffee", "model_code": "0.1.0+x", "hardware": "a CPU",
    }  # fmt: skip


def fakes(space_off: float) -> list[study.Result]:
    """Base and space_off with 3 seeds over 5 donors; class b and e are never learned, c falls by `space_off`."""
    rng = np.random.default_rng(0)
    donor = rng.normal(0, 0.03, (5, 1))
    base = np.array([0.4, 0.0, 0.2, 0.05, 0.0])
    learned = base > 0
    found = []
    for arm, fall in (("base", 0.0), ("space_off", space_off)):
        for seed in range(3):
            noise = rng.normal(0, 0.005, (5, 5))
            found.append(result(arm, seed, base - fall * (np.arange(5) == 2) + learned * donor + noise))
    return [*found, result("recut_off", 0, base + donor * learned, None)]


def test_the_plan_orders_first_seeds_first_and_names_runs_by_their_content(plan: Path, tmp_path: Path) -> None:
    def names(seeds: int | None = None, only: Collection[str] = (), data: str = "{}") -> list[str]:
        made = study.runs(plan, study.read_plan(plan), shards(tmp_path, data), tmp_path, seeds, only)
        return [run.name for run in made]

    found = names()
    arms = ["base-s0", "space_off-s0", "recut_off-s0", "base-s1", "space_off-s1", "base-s2", "space_off-s2"]
    assert [name.rpartition("-")[0] for name in found] == arms and len(set(found)) == 7
    assert names(seeds=1) == found[:3]
    assert names(only=["recut_off"]) == [found[i] for i in (0, 2, 3, 5)]
    with pytest.raises(ValueError, match=r"has no arm 'spice_off'; it has base, space_off, recut_off"):
        names(only=["spice_off"])
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE | {"optim": {"steps": 3}}))
    assert not set(names()) & set(found), "another base, other runs"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    assert names() == found
    assert not set(names(data="{ }")) & set(found), "other data, other runs"


@pytest.mark.parametrize("key", ["encoder.weights", "data.descriptors"])
def test_another_file_at_the_same_path_is_another_run(plan: Path, tmp_path: Path, key: str) -> None:
    def names() -> list[str]:
        made = study.runs(plan, study.read_plan(plan), shards(tmp_path), tmp_path, 1)
        return [run.name for run in made]

    plain, named = names(), [tmp_path / name for name in ("a.bin", "b.bin")]
    assert plain[0] == "base-s0-8b4152111253", "of a run that names no file the key stays as it was"
    arm = {"name": "given", "overrides": [f"{key}={named[0]}"]}
    write(tmp_path, {"title": "t", "base": "base.yaml", "arms": [arm]})
    with pytest.raises(ValueError, match=rf"{key}=.*a\.bin: does not read \(No such file .*give a local file"):
        names()
    named[0].write_bytes(b"one")
    first = names()
    assert first[0] == plain[0] and names() == first
    named[0].write_bytes(b"two")
    assert names()[0] == first[0] and names()[1] != first[1]
    named[1].write_bytes(b"one")
    write(tmp_path, {"title": "t", "base": "base.yaml", "arms": [arm | {"overrides": [f"{key}={named[1]}"]}]})
    assert names() == first, "the same file elsewhere is the same run"


@pytest.mark.parametrize(
    ("arm", "fault"),
    [
        ({"name": "a", "overrides": ["seed=7"]}, "the study sets seed, run_dir, data.shards itself"),
        ({"name": "x", "overrides": ["model.space_dept=0"]}, "arm x: .*nearest: space_depth"),
        ({"name": "base"}, "two arms are named 'base'"),
        ({"name": "x y"}, "name"),
        ({"name": "x", "judged": "f"}, "judged"),
    ],
)
def test_a_plan_at_fault_is_refused(tmp_path: Path, arm: dict, fault: str) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.raises(ValueError, match=fault):
        study.read_plan(write(tmp_path, {"title": "t", "base": "base.yaml", "arms": [arm]}))


def test_what_is_no_result_is_named(plan: Path, tmp_path: Path) -> None:
    wanted = study.runs(plan, study.read_plan(plan), shards(tmp_path), tmp_path)
    values: list[object] = [[], {}]
    for value in values:
        files.write_json(study.result_path(tmp_path, wanted[1]), value)
        with pytest.raises(ValueError, match=rf"{wanted[1].name}\.json: is no result of a run; remove it"):
            study.results(tmp_path, wanted)


@pytest.mark.parametrize("name", ["study_synthetic.yaml", "study_cells.yaml"])
def test_the_shipped_plans_are_valid(name: str) -> None:
    plan = study.read_plan(Path(__file__).resolve().parents[2] / "configs" / name)
    assert all(arm.overrides for arm in plan.arms)


def rows(text: str, table: int) -> dict[str, list[str]]:
    """First cell -> the others, of the n-th table of a study."""
    blocks = [block for block in text.split("\n\n") if block.startswith("| arm")]
    lines = [line.strip("| ").split(" | ") for line in blocks[table].splitlines()]
    return {first: rest for first, *rest in lines}


def test_the_table_finds_a_fall_that_is_there_and_none_that_is_not(plan: Path, tmp_path: Path) -> None:
    read = study.read_plan(plan)
    wanted = study.runs(plan, read, shards(tmp_path), tmp_path)
    text = study_table.text(read, wanted, fakes(0.15), {})
    scores = rows(text, 0)
    assert scores["base"][0] == "3" and scores["base"][-1] == "2.0" and scores["recut_off: `mask.recut=0`"][-1] == "-"
    assert scores["oracle"][1] == "0.600"
    value, skill = scores["space_off: `model.space_depth=0`"][3].split()
    assert float(skill.strip("()")) == pytest.approx((float(value) - 0.1) / 0.5, abs=0.006)
    fell = rows(text, 1)["space_off"][3]
    assert fell.startswith("**-0.1") and fell.endswith("**"), "judged on c"
    low, high = (float(x) for x in fell.strip("*").split("[")[1].rstrip("]").split(", "))
    assert -0.17 < low < high < -0.13
    assert rows(text, 1)["recut_off"][0] == "1 (exploratory)"
    same = rows(study_table.text(read, wanted, fakes(0.0), {}), 1)["space_off"][3].strip("*")
    low, high = (float(x) for x in same.split("[")[1].rstrip("]").split(", "))
    assert low <= 0 <= high


def test_the_table_says_where_the_base_leaves_nothing_to_judge(plan: Path, tmp_path: Path) -> None:
    read = study.read_plan(write(tmp_path, {
        "title": "A study", "base": "base.yaml",
        "arms": [{"name": "colour", "overrides": ["model.encoder=colour"], "judged": "b"}, *ARMS],
    }))  # fmt: skip
    wanted = study.runs(plan, read, shards(tmp_path), tmp_path)
    failed = {wanted[1].name: "training ended with exit code 1: no <disk>"}
    lines = study_table.text(read, wanted, fakes(0.1), failed).splitlines()
    by_class = {line[8]: line for line in lines if line.startswith("* Class")}
    assert "No power" in by_class["b"] and "so colour cannot be judged" in by_class["b"]
    assert "below colour ridge (0.100)" in by_class["b"] and "below" not in by_class["a"] + by_class["c"]
    assert "No power" in by_class["e"] and "No power" not in by_class["a"] + by_class["c"]
    assert "Not run yet: colour seed 1, colour seed 2." in lines
    assert "* colour seed 0: training ended with exit code 1: no &lt;disk>" in "\n".join(lines).replace("&gt;", ">")


def words(path: Path, out: Path, shards: Path, store: Path, truth: Path) -> list[str]:
    named = {"--out": out, "--shards": shards, "--store": store, "--truth": truth}
    return [str(path), *(str(word) for pair in named.items() for word in pair)]


def test_an_arm_is_trained_judged_and_left_alone_afterwards(
    tiny_shards: Path, tiny_store: Path, synthetic_tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = write(tmp_path, {"title": "t", "base": "base.yaml", "seeds": 1})
    command = words(path, tmp_path / "out", tiny_shards, tiny_store, synthetic_tiny / "truth")
    assert driver.main(command) == 0
    (found,) = (tmp_path / "out/results").iterdir()
    values, bytes_before = files.read_json(found), found.read_bytes()
    assert values["arm"] == "base" and sorted(values["model_by_donor"]) == list("abcde") and values["train_s"] > 0
    assert values["classes"]["a"]["scores"]["oracle"] > 0.2
    table = (tmp_path / "out" / driver.TABLE).read_text()
    assert "[-inf, inf]" in table, "of one test donor nothing follows for others"
    assert not any(word in table for word in ("d02s0", "donor02", str(tmp_path)))

    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is started any more
    monkeypatch.setattr(driver, "commit", lambda: "")
    assert driver.main(command) == 0
    assert "1 runs, 1 done" in capfd.readouterr().out and found.read_bytes() == bytes_before


def test_a_training_that_fails_is_listed_and_the_others_go_on(
    plan: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pretrain.py").write_text("print('error: it was not to be'); raise SystemExit(3)")
    monkeypatch.setattr(driver, "HERE", tmp_path)
    out = tmp_path / "out"
    assert driver.main([*words(plan, out, shards(tmp_path), tmp_path, tmp_path), "--jobs", "2"]) == 1
    failed = [line for line in capfd.readouterr().err.splitlines() if "FAILED" in line]
    assert len(failed) == 7 and all("exit code 3: error: it was not to be" in line for line in failed)
    assert "* space_off seed 2: training ended with exit code 3" in (out / driver.TABLE).read_text()
    assert not (out / "results").exists()


def test_a_training_that_was_asked_to_stop_is_not_judged(plan: Path, tmp_path: Path) -> None:
    """A file STOP ends a training with exit code 0, before its schedule's end."""
    run = study.runs(plan, study.read_plan(plan), shards(tmp_path), tmp_path, 1)[0]
    run_dir = tmp_path / "runs" / run.name
    untrained.write_checkpoint(run_dir)
    judge = study.Judge(tmp_path, shards(tmp_path), tmp_path)
    with pytest.raises(ValueError, match=rf"{run.name}: its training was stopped before its end; the same command"):
        judge.judge(run, tmp_path, None)
    assert not (run_dir / "export").exists() and not study.result_path(tmp_path, run).exists()


def test_a_folder_of_any_name_is_given_to_the_trainer_as_it_is(plan: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "study #1: [a]", shards(tmp_path, "{ }")
    run = study.runs(plan, study.read_plan(plan), data, out, 1)[0]
    given = load(RunConfig, tmp_path / "base.yaml", run.overrides)
    assert (given.run_dir, given.data.shards) == (str(out / "runs" / run.name), str(data))
