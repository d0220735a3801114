"""prep.sbatch and pack.sbatch on a real SLURM: arrays, faults, resubmission, kills, requeues, other machines' rests."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_prep import build, pack, plan, records, wanted
from storm import files, store
from tests.data_prep.vendors import tissue, write_manifest, write_tiff, write_visium
from tests.slurm.cluster import MAX_ARRAY, Cluster, until

REPO = Path(__file__).resolve().parents[2]
SUBMIT = REPO / "slurm" / "submit"
TILES = ("tile_px=112", "tile_mpp=1.0")
SMALL = [f"s{i}" for i in range(5)]
BIG = "big"  # takes long enough to be killed on the way
CPU = "--cpus-per-task=1"


@pytest.fixture(scope="session")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with manifest.csv: five small Visium slides, and a big image."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for i, name in enumerate(SMALL):
        write_tiff(folder / f"{name}.tif", tissue(500, 600 + 10 * i))
        write_visium(folder / name, side=4)
        rows.append({"slide_id": name, "image": f"{name}.tif", "measurement": name, "platform": "visium",
                     "donor": f"d{i}", "split": "test" if i == 4 else "train"})  # fmt: skip
    write_tiff(folder / f"{BIG}.tif", np.tile(tissue(500, 600)[:, :250], (6, 12, 1)))
    rows.append({"slide_id": BIG, "image": f"{BIG}.tif", "platform": "image", "donor": "d9"})
    write_manifest(folder / "manifest.csv", rows)
    return folder


@pytest.fixture(scope="session")
def undisturbed(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stores as a plain build writes them."""
    folder = tmp_path_factory.mktemp("stores")
    assert build.main([str(slides / "manifest.csv"), "--store", str(folder), "--workers", "1", *TILES]) == 0
    return folder


def check(folder: Path, truth: Path, names: Sequence[str]) -> None:
    """A folder holds the stores of these slides as they should be, their records, a list, and nothing else."""
    names_of = [f"{name}{suffix}" for name in names for suffix in (store.SUFFIX, records.SUFFIX)]
    found = [p.name for p in folder.iterdir()]
    assert sorted(name for name in found if not name.endswith(wanted.SUFFIX)) == sorted(names_of)
    assert len(found) == len(names_of) + 1
    for name in names:
        assert (folder / f"{name}{store.SUFFIX}").read_bytes() == (truth / f"{name}{store.SUFFIX}").read_bytes(), name
        assert records.is_complete(folder, records.read(folder, name))


def write_plan(path: Path, manifest: Path, tasks: list[list[str]]) -> Path:
    files.write_json(path, {"tasks": tasks, "manifest_sha256": files.sha256_file(manifest)})
    return path


def submitted(cluster: Cluster, cwd: Path, job: str, *words: object, **env: str) -> str:
    """The id that slurm/submit prints."""
    cwd.mkdir(exist_ok=True)
    done = cluster.run(SUBMIT, job, *words, cwd=cwd, **env)
    assert re.fullmatch(r"\d+\n", done.stdout), done
    return done.stdout.strip()


def test_a_damaged_slide_fails_its_task_and_is_all_that_is_built_again(
    cluster: Cluster, slides: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(slides, tmp_path / "data")
    table, image = tmp_path / "data" / "manifest.csv", tmp_path / "data" / "s2.tif"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.startswith(BIG)))
    planning = [str(table), "--store", str(tmp_path / "stores"), "--out", str(tmp_path / "plan.json"), *TILES]
    assert plan.main([*planning, "--tasks", "5"]) == 0
    image.write_bytes(image.read_bytes()[:1000])
    (task,) = [k for k, names in enumerate(files.read_json(tmp_path / "plan.json")["tasks"]) if names == ["s2"]]
    elsewhere = tmp_path / "elsewhere"  # paths among the words start here
    words = ("--", "../data/manifest.csv", "--store", "../stores", "--plan", "../plan.json", *TILES)
    job = submitted(cluster, elsewhere, "prep.sbatch", CPU, *words, STORM_THROTTLE="3")
    assert "ArrayTaskThrottle=3" in cluster.run("scontrol", "show", "job", job, cwd=elsewhere).stdout
    after, packing = f"--dependency=afterany:{job}", ("--store", "../stores", "--manifest", table, *TILES)
    refused = submitted(cluster, elsewhere, "pack.sbatch", CPU, after, "--", *packing, "--out", "../no")
    packed = submitted(
        cluster,
        elsewhere,
        "pack.sbatch",
        after,
        "--",
        *packing,
        "--out",
        "../shards",
        "--tasks",
        "2",
        "--allow-missing",
    )
    assert len(SMALL) > MAX_ARRAY  # so an element has two tasks: it goes on after s2, and its code is the higher one
    states = {str(element): "COMPLETED:0" for element in range(3)}
    assert cluster.waited(job) == states | {str(task // 2): "FAILED:1"}
    log = (elsewhere / "logs" / f"storm-prep_{job}_{task // 2}.out").read_text()
    assert re.search(r"s2: FAILED: .*s2\.tif", log)
    assert records.failures(tmp_path / "stores").keys() == {"s2"}
    assert cluster.waited(refused) == {"": "FAILED:2"}
    assert "s2" in (elsewhere / "logs" / f"storm-pack_{refused}.out").read_text()
    assert cluster.waited(packed) == {"": "COMPLETED:0"}
    whole = ["--store", str(tmp_path / "stores"), "--out", str(tmp_path / "whole"), "--allow-missing", *TILES]
    assert pack.main(whole) == 0
    assert content(tmp_path / "shards") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "elsewhere", "plan.json", "shards", "stores", "whole"]

    shutil.copy(slides / "s2.tif", image)
    assert plan.main(planning) == 0
    assert files.read_json(tmp_path / "plan.json")["tasks"] == [["s2"]]
    again = submitted(cluster, elsewhere, "prep.sbatch", CPU, *words)
    assert cluster.waited(again) == {"0": "COMPLETED:0"}
    check(tmp_path / "stores", undisturbed, SMALL)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_work(folder: Path) -> list[int]:
    """The processes that are writing a slide's store: their temporary folders carry their numbers."""
    return [int(path.name.split(".")[-4]) for path in folder.glob(f".{BIG}.*.tmp")]


def test_a_task_that_was_killed_or_requeued_half_way(
    cluster: Cluster, slides: Path, undisturbed: Path, tmp_path: Path
) -> None:
    tasks = write_plan(tmp_path / "plan.json", slides / "manifest.csv", [[BIG]])
    stores = [tmp_path / "killed", tmp_path / "requeued"]
    killed, requeued = (
        submitted(cluster, tmp_path, "prep.sbatch", CPU, "--", slides / "manifest.csv", "--store", folder, "--plan",
                  tasks, *TILES)
        for folder in stores
    )  # fmt: skip
    until(lambda: in_work(stores[0]), "a build to kill", pause=0.01)
    os.kill(in_work(stores[0])[0], signal.SIGKILL)
    until(lambda: in_work(stores[1]), "a build to requeue", pause=0.01)
    assert cluster.run("scontrol", "requeue", f"{requeued}_0", cwd=tmp_path).returncode == 0
    assert cluster.waited(killed) == {"0": "FAILED:137"}
    assert len(in_work(stores[0])) == 1  # what it left
    assert cluster.run("scontrol", "requeue", f"{killed}_0", cwd=tmp_path).returncode == 0
    for job, folder in zip((killed, requeued), stores, strict=True):
        assert cluster.waited(job) == {"0": "COMPLETED:0"}
        check(folder, undisturbed, [BIG])
        log = (tmp_path / "logs" / f"storm-prep_{job}_0.out").read_text()
        assert log.count("start 1") == log.count("start 2") == 1


def test_two_tasks_on_one_slide_at_once(cluster: Cluster, slides: Path, undisturbed: Path, tmp_path: Path) -> None:
    tasks = write_plan(tmp_path / "plan.json", slides / "manifest.csv", [[BIG], [BIG]])
    stores = tmp_path / "stores"
    words = ("--", slides / "manifest.csv", "--store", stores, "--plan", tasks, *TILES)
    job = submitted(cluster, tmp_path, "prep.sbatch", CPU, "--array=0-2", *words, STORM_LOGS=str(tmp_path / "told"))
    until(lambda: len(in_work(stores)) == 2, "two builds of one slide", pause=0.01)
    assert cluster.waited(job) == {"0": "COMPLETED:0", "1": "COMPLETED:0", "2": "FAILED:2"}
    check(stores, undisturbed, [BIG])
    assert (
        "element 2 has no task: 2 tasks, 1 to an element" in (tmp_path / "told" / f"storm-prep_{job}_2.out").read_text()
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project of our own: the code is this one's, slurm/ is a copy that may be changed."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("storm", "data_prep"):
        (folder / name).symlink_to(REPO / name)
    shutil.copytree(REPO / "slurm", folder / "slurm")
    return folder


def test_a_bare_sbatch_from_the_root_uses_setup_and_run(
    cluster: Cluster, slides: Path, undisturbed: Path, tmp_path: Path, root: Path
) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$BY_SETUP $STORM_ROOT $TMPDIR $*" >> {tmp_path}/told\nexec "$@"\n')
    wrapper.chmod(0o755)
    env = {"STORM_SETUP": "export BY_SETUP=prepared", "STORM_RUN": f"{wrapper} env", "SLURM_TMPDIR": str(tmp_path)}
    stores, tasks = tmp_path / "stores", write_plan(tmp_path / "plan.json", slides / "manifest.csv", [["s0"], ["s1"]])
    words = ("slurm/prep.sbatch", slides / "manifest.csv", "--store", stores, "--plan", tasks, *TILES)
    job = cluster.run("sbatch", "--parsable", CPU, "--array=1", *words, cwd=root, **env).stdout.strip()
    assert cluster.waited(job) == {"1": "COMPLETED:0"}
    check(stores, undisturbed, ["s1"])
    said = (tmp_path / "told").read_text()
    own = f"{tmp_path}/storm-{os.getuid()}"  # on the node's own disk
    assert said.startswith(f"prepared {root} {own} env python -m data_prep.build --workers 1 {slides}/manifest.csv")
    assert said.endswith("--task 1\n")
    assert "s1: built" in (root / f"slurm-{job}_1.out").read_text()


def test_a_node_without_python_is_told_the_cure(tmp_path: Path) -> None:
    for name in ("bash", "uname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    line = f'. "{REPO}/slurm/job.sh"; storm_python -c 1'
    env = {"PATH": str(tmp_path), "STORM_ROOT": str(REPO)}
    done = subprocess.run(["bash", "-euc", line], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "as STORM_SETUP in slurm/env.sh" in done.stderr
    env |= {"STORM_SETUP": f"PATH={Path(sys.executable).parent}"}
    assert subprocess.run(["bash", "-euc", line], env=env, check=False).returncode == 0


def test_what_ended_jobs_left_on_other_machines_is_removed(
    cluster: Cluster, slides: Path, undisturbed: Path, tmp_path: Path, root: Path
) -> None:
    ended, running = (
        cluster.run("sbatch", "--parsable", "--output=/dev/null", f"--wrap=sleep {time}", cwd=root).stdout.strip()
        for time in ("0", "1000")
    )
    cluster.waited(ended)
    stores = tmp_path / "stores"
    stores.mkdir()
    left = {job: stores / f".s9{store.SUFFIX}.far-away.{job}r0.42.99.0123abcd.tmp"
            for job in (f"lab-{ended}", f"lab-{running}", f"west-{ended}", "lab-987654")}  # fmt: skip
    for path in left.values():
        path.write_bytes(b"half")
    lone = write_manifest(tmp_path / "one.csv", [{"slide_id": "s0", "image": slides / "s0.tif", "platform": "image"}])
    words = ("slurm/prep.sbatch", lone, "--store", stores, *TILES)
    job = cluster.run("sbatch", "--parsable", CPU, *words, cwd=root).stdout.strip()
    assert cluster.waited(job) == {"": "COMPLETED:0"}
    cluster.run("scancel", running, cwd=root)
    assert {job for job, path in left.items() if path.exists()} == {f"lab-{running}", f"west-{ended}"}


def test_a_dependency_on_no_job_is_dropped(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"tasks": []}')
    done = cluster.run(SUBMIT, "prep.sbatch", "--", "--plan", "plan.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    words = ("--", "--store", tmp_path / "stores", "--out", tmp_path / "out")
    for options in ([f"--dependency=afterany:{done.stdout}"], ["--dependency", "afterok:"], ["-d", "afterany:"]):
        job = submitted(cluster, tmp_path, "pack.sbatch", "--hold", *options, *words)
        assert " Dependency=(null) " in cluster.tell("scontrol", "--oneliner", "show", "job", job)
        after = submitted(cluster, tmp_path, "pack.sbatch", f"--dependency=afterany:{job}", *words)
        assert f" Dependency=afterany:{job}(" in cluster.tell("scontrol", "--oneliner", "show", "job", after)
        cluster.tell("scancel", job, after)


def test_a_refusal_is_once_in_the_log_of_an_element(cluster: Cluster, tmp_path: Path) -> None:
    words = ("--", "--store", tmp_path / "nowhere", "--out", tmp_path / "out", "--tasks", str(2 * MAX_ARRAY))
    job = submitted(cluster, tmp_path, "pack.sbatch", CPU, "--array=0", *words)
    assert cluster.waited(job) == {"0": "FAILED:2"}
    log = (tmp_path / "logs" / f"storm-pack_{job}_0.out").read_text()
    assert log.count("nowhere: no such folder; name the one that data_prep.build wrote to") == 1


def test_submit_tells_what_is_wrong(cluster: Cluster, tmp_path: Path, root: Path) -> None:
    def said(*words: object, **env: str) -> str:
        done = cluster.run(root / "slurm" / "submit", *words, cwd=tmp_path, **env)
        assert done.stdout == ""
        return done.stderr

    assert "none.sbatch is none of: embed.sbatch pack.sbatch prep.sbatch pretrain.sbatch" in said("none.sbatch")
    assert "absent.json: no such plan; write it with" in said("prep.sbatch", "--", "--plan", "absent.json")
    assert "--tasks many: give a number" in said("pack.sbatch", "--", "--tasks=many")
    (tmp_path / "plan.json").write_text('{"tasks": []}')
    assert said("prep.sbatch", "--", "--plan=plan.json") == "nothing is left to do\n"
    assert "invalid partition" in said("prep.sbatch", SBATCH_PARTITION="nowhere")
    site = root / "slurm" / "env.sh"
    site.write_text(site.read_text().replace('SBATCH_PARTITION ""', 'SBATCH_PARTITION "nowhere"'))
    assert "invalid partition" in said("prep.sbatch")
    job = cluster.run("sbatch", "--parsable", "--output=out", root / "slurm" / "prep.sbatch", cwd=tmp_path)
    assert cluster.waited(job.stdout.strip()) == {"": "FAILED:2"}
    assert f"{tmp_path}: not the project's root; submit from there" in (tmp_path / "out").read_text()
