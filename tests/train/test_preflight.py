"""Facts of nodes, the faults among them, links: by hand, and by a job of two ranks and `storm doctor`."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from storm import cli
from storm.train import node, preflight
from storm.train.node import Disk, Facts, Needs
from tests.train import runs
from tests.train.jobs import REPO, environment, free_port

GOOD = Facts(
    0, "a", "H100", True, "550.1", "2.14", "nccl 2.27", frozenset(range(16)), 65536, int(1e11),
    (Disk("run_dir", "/runs", "lustre", int(1e13), 10**7, True), Disk("shards", "/data", "nfs4", 0, 0, False)),
)  # fmt: skip
NEEDS = Needs(workers=7, run_bytes=1e11, bf16=True)


def two_hosts(**changed: object) -> list[Facts]:
    """Two ranks on host a, two on host b whose facts are changed."""
    other = dataclasses.replace(GOOD, host="b", **changed)  # type: ignore[arg-type]
    return [dataclasses.replace(f, rank=r) for r, f in enumerate([GOOD, GOOD, other, other])]


def test_good_nodes_have_no_fault() -> None:
    assert node.faults(two_hosts(), NEEDS) == []
    text = node.table(two_hosts())
    assert text.splitlines()[0].split()[:2] == ["host", "ranks"] and "lustre" in text and len(text.splitlines()) == 9


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"torch": "2.13"}, "torch differs between ranks (2.14 on a; 2.13 on b): install one environment"),
        ({"collectives": "nccl 2.20"}, "collectives differs between ranks"),
        ({"driver": "535.2"}, "driver differs between ranks (550.1 on a; 535.2 on b)"),
        ({"device": "V100"}, "device differs between ranks (H100 on a; V100 on b)"),
        ({"bf16": False}, "b: H100 has no bf16: set engine.precision=fp32"),
        ({"cores": frozenset({0, 1})}, "b: 2 cores for 2 ranks with 7 loader processes each: give a task more cores"),
        ({"shm_bytes": 64_000_000}, "b: /dev/shm has 0.06 GB free, loaders may take 3.58: start the container"),
        ({"open_files": 256}, "b: only 256 files may be open, 960 are needed: ulimit -n 3840"),
        ({"skew_s": -7.5}, "b: the clock of rank 2 is -7.5 s off that of rank 0: have it synchronised"),
    ],
)  # fmt: skip
def test_a_fault_names_the_host_and_ends_with_its_cure(changed: dict, fault: str) -> None:
    (found,) = node.faults(two_hosts(**changed), NEEDS)
    assert found.startswith(fault) and ": " in found


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"writable": False}, "run_dir /runs: not writable: choose another run_dir"),
        ({"free_bytes": int(1e9)}, "run_dir /runs: 1.0 GB free, checkpoints take 100.0: free some, or lower"),
        ({"free_inodes": 12}, "run_dir /runs: 12 inodes free: remove files"),
    ],
)  # fmt: skip
def test_a_full_disk(changed: dict, fault: str) -> None:
    disks = (dataclasses.replace(GOOD.disks[0], **changed),)
    (found,) = node.faults(two_hosts(disks=disks), NEEDS)
    assert found.startswith(f"b: {fault}")


def test_the_file_system_of_a_folder(tmp_path: Path) -> None:
    mounts = "/dev/a / ext4 rw 0 0\nhost:/x /data nfs4 rw 0 0\nnone /data/fast\\040disk tmpfs rw 0 0\n"
    kinds = [node.mount_kind(Path(p), mounts) for p in ("/data/x", "/data/fast disk/y", "/datastore")]
    assert kinds == ["nfs4", "tmpfs", "ext4"]
    disk = node.look_at("run_dir", tmp_path / "not" / "yet")
    assert disk.folder == str(tmp_path) and disk.free_bytes > 0 and disk.writable
    gone = dataclasses.replace(GOOD, disks=(node.look_at("shards", tmp_path / "gone"),))
    assert node.faults([gone], NEEDS) == [
        f"{gone.host}: shards: no such folder (the nearest is {tmp_path}): name the folder of a shard set"
    ]


def test_every_rank_meets_both_neighbours() -> None:
    assert preflight.rounds(2) == [[(0, 1)], []]
    assert preflight.rounds(3) == [[(0, 1)], [(1, 2)]]
    assert preflight.rounds(4) == [[(0, 1), (2, 3)], [(1, 2), (3, 0)]]


def test_the_slow_host_is_named() -> None:
    hosts = [name for name in "abcd" for _ in range(2)]
    within = [(r, r + 1, 400e9) for r in (0, 2, 4, 6)]
    between = [(1, 2, 48e9), (3, 4, 9e9), (5, 6, 9e9), (7, 0, 47e9)]  # both links of host c are slow
    (fault,) = preflight.slow_hosts(within + between, hosts)
    assert fault.startswith("c: links to its neighbours carry 9.00 GB/s, others 28.00: leave the host out")
    (fault,) = preflight.slow_hosts([(0, 1, 90e9), *within[1:], (1, 2, 48e9), (7, 0, 47e9)], hosts)
    assert fault.startswith("a: links within the node carry 90.00 GB/s, others 400.00")
    assert preflight.slow_hosts([(0, 1, 1e9)], ["a", "b"]) == []  # one link has no other to be compared with


def test_a_job_of_two_ranks(tiny_shards: Path, tmp_path: Path) -> None:
    words = runs.words(tiny_shards, tmp_path / "run", 1, "data.workers=1")
    command = [sys.executable, str(REPO / "launch/pretrain.py"), *words, "--preflight"]
    port, jobs = free_port(), []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        jobs.append(subprocess.Popen(command, cwd=REPO, env=environment() | ranks, stdout=subprocess.PIPE, text=True))
    told = [job.communicate(timeout=240)[0] for job in jobs]
    cores = len(os.sched_getaffinity(0))
    fault = f"{cores} cores for 2 ranks with 1 loader processes each" if cores < 4 else "no fault found"
    assert [job.returncode for job in jobs] == ([2, 2] if cores < 4 else [0, 0]), told
    assert fault in told[0] and told[1] == ""
    for text in ("all-reduce over 2 ranks: ", "GB/s each way", "gloo", "run_dir", "/dev/shm"):
        assert text in told[0]
    assert not (tmp_path / "run").exists()


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["doctor", "--run-dir", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "core: complete" in printed and str(tmp_path) in printed and "FAULT" not in printed
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cli.main(["doctor", "--run-dir", str(tmp_path)]) == 1
    assert f"FAULT {socket.gethostname()}: run_dir {tmp_path}: not writable" in capsys.readouterr().out
