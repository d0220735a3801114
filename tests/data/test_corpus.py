"""Several shard sets as one corpus, and which of them cannot be one."""

from pathlib import Path

import pytest

from storm import files
from storm.data import places
from storm.data.corpus import open_corpus, window_shards
from storm.data.stream import batches
from storm.genes import GeneTable
from storm.shards import GENES, MANIFEST
from tests.data import samples
from tests.data.corpora import config, slide, stream, write


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A shard set, and one with other slides and one more panel and organ."""
    first = write(tmp_path / "a", [("s0", i) for i in range(3)])
    more: dict = {"slides": {"s1": slide(1), "s2": slide(2)}, "organs": ["lung"], "platforms": ["visium"]}
    return first, write(tmp_path / "b", [(f"s{1 + i % 2}", i) for i in range(5)], per_shard=2, **more)


def test_two_sets_are_one_row_of_groups(two: tuple[Path, Path]) -> None:
    corpus = open_corpus(config([str(path) for path in two]))
    assert len(corpus.groups) == 8 and corpus.shard_groups.tolist() == [3, 2, 2, 1]
    assert [corpus.groups.key(i) for i in (0, 2, 3, 7)] == ["s0_00000", "s0_00002", "s1_00000", "s1_00004"]
    found = corpus.groups.read([7, 0, 3])
    assert [group.meta.slide for group in found] == ["s1", "s0", "s1"]
    assert corpus.manifest["organs"] == ["breast", "lung"] and set(corpus.manifest["slides"]) == {"s0", "s1", "s2"}
    assert corpus.manifest["licenses"]["t0"]["slides"] == 2
    assert sum(corpus.profiles_of_slides().values()) == sum(len(corpus.groups.read([i])[0].profiles) for i in range(8))
    single = [open_corpus(config(path)) for path in two]
    assert len({corpus.hash, *(one.hash for one in single)}) == 3
    assert corpus.groups_hash.split() == [one.groups_hash for one in single]


def test_an_appended_set_changes_the_order_hash(two: tuple[Path, Path]) -> None:
    alone, both = stream(two[0]), stream(open_corpus(config([str(path) for path in two])))
    assert alone.order_hash != both.order_hash
    list(batches(both, 0, 2, workers=0))
    with pytest.raises(ValueError, match="order_hash"):
        both.step_at(alone.position(1))


def spoil(folder: Path, **changes) -> None:
    """Change a manifest."""
    files.write_json(folder / MANIFEST, files.read_json(folder / MANIFEST) | changes)


def test_sets_that_are_not_one_corpus_are_refused(two: tuple[Path, Path]) -> None:
    names = [str(path) for path in two]
    spoil(two[1], tile_mpp=0.5)
    with pytest.raises(ValueError, match=r"b: tile_mpp is 0\.5, that of .*a is 1\.0; pack both with one config"):
        open_corpus(config(names))
    spoil(two[1], tile_mpp=1.0, slides={"s1": slide(1), "s2": slide(2, study="t0", donor="d0", split="test")})
    with pytest.raises(ValueError, match="a donor of study t0 is in split test, and in train of another set"):
        open_corpus(config(names))
    ids = tuple(f"ENSG{i:011d}" for i in range(1, samples.GENES + 1))
    table = GeneTable(ids, ids, samples.SHARE)
    files.write_bytes(two[1] / GENES, table.to_tsv())
    spoil(two[1], gene_hash=table.hash, genes_sha256=files.sha256_file(two[1] / GENES))
    with pytest.raises(ValueError, match=r"b: has other genes than .*a; pack it anew with --append"):
        open_corpus(config(names))
    with pytest.raises(ValueError, match=r"slide s0 is in .*a too; pack it anew with --append"):
        open_corpus(config([names[0], names[0]]))
    with pytest.raises(ValueError, match="name at least one shard set"):
        open_corpus(config([]))


def test_where_shards_lie_decides_the_window(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert window_shards(config(two[0])) == 0 and window_shards(config(two[0], window_shards=5)) == 5
    assert window_shards(config(f"file://{two[0]}")) == 0 and window_shards(config("s3://bucket/set")) == 32
    monkeypatch.setattr(places, "file_system", lambda path: "lustre")
    assert window_shards(config(two[0])) == 32


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    told = tmp_path / "mountinfo"
    told.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "30 22 0:50 / /scratch rw shared:1 - lustre mgs:/scratch rw\n"
        "31 30 0:51 / /scratch/my\\040own rw - fuse.sshfs host: rw\n"
        "32 22 0:52 / /home rw - nfs4 filer:/home rw\n"
    )
    kinds = {p: places.file_system(Path(p), told) for p in ("/data/x", "/scratch/x", "/scratch/my own/x", "/home")}
    assert list(kinds.values()) == ["ext4", "lustre", "fuse.sshfs", "nfs4"]
    assert places.file_system(tmp_path, tmp_path / "absent") == ""
    shared = [
        name for name in ("ext4", "xfs", "overlay", "tmpfs", "nfs", "beegfs", "ceph") if places._SHARED.fullmatch(name)
    ]
    assert shared == ["nfs", "beegfs", "ceph"]


def test_loader_processes_come_from_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert [places.loader_processes(asked) for asked in ("auto", 0, 3)] == [11, 0, 3]
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):  # of the deepspeed launcher, of torchrun
        monkeypatch.setenv(name, "4")
        assert places.loader_processes("auto") == 2
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert places.loader_processes("auto") == 11
