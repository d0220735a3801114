"""pack --append: new slides as a set of their own, over the genes and the splits of the older ones."""

import csv
from pathlib import Path

import numpy as np
import pytest

from data_prep import build, pack
from data_prep.packing.manifest import Options
from storm import files, shards, store
from tests.conftest import PREP_TINY
from tests.data_prep.test_pack import CONFIG, content, groups_of, info, write_store
from tests.data_prep.vendors import write_manifest


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A set of a training and a test slide, over G1 G2 G3; the stores lie beside it."""
    write_store(tmp_path / "stores", info("a", "d1", "train"), 20)
    write_store(tmp_path / "stores", info("b", "d2", "test"), 21)
    pack.pack(tmp_path / "stores", tmp_path / "old", CONFIG)
    return tmp_path / "old"


def append(old: Path, name: str, *chain: Path) -> dict:
    options = Options(append=(old, *chain))
    return pack.pack(old.parent / "stores", old.parent / name, CONFIG, options)


def test_only_new_slides_are_packed_over_the_old_genes(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(old)
    write_store(old.parent / "stores", info("c", "d1"), 22, ("G0", "G2", "G3", "G9"))
    manifest = append(old, "new")
    assert content(old) == before
    assert manifest["appended_to"] == [files.sha256_file(old / shards.MANIFEST)]
    assert set(manifest["slides"]) == {"c"}
    assert manifest["slides"]["c"]["split"] == "train"  # as its donor's older slide
    assert manifest["genes_left_out"] == 2
    assert "2 genes that the older set does not hold are left out" in capsys.readouterr().out
    opened, first = shards.ShardSet(old.parent / "new"), shards.ShardSet(old)
    assert (opened.folder / shards.GENES).read_bytes() == (old / shards.GENES).read_bytes()
    assert manifest["reference"] == first.manifest["reference"]
    (panel,) = opened.panels.values()
    assert panel.tolist() == [False, True, True]
    truth = store.SlideStore(store.store_path(old.parent / "stores", "c")).profiles()
    dense = np.zeros((22, 4), int)
    dense[np.repeat(np.arange(22), np.diff(truth.indptr)), truth.gene] = truth.count
    for _, _, group in groups_of(opened.folder):
        p = group.profiles
        for i, name in enumerate(p.ids):
            span = slice(p.indptr[i], p.indptr[i + 1])
            row = dense[int(name[1:])]
            assert dict(zip(p.gene[span].tolist(), p.count[span].tolist(), strict=True)) == {1: row[1], 2: row[2]}
    assert append(old, "new") == manifest
    assert "current, nothing to do" in capsys.readouterr().out


def test_a_manifest_that_says_other_than_the_older_set_is_asked_for_new_slides_alone(old: Path) -> None:
    write_store(old.parent / "stores", info("c", "d3"), 22)
    rows = [
        {"slide_id": name, "image": "x", "platform": "image", "donor": donor, "study": "t", "split": split}
        for name, donor, split in (("a", "d1", "test"), ("b", "d2", "test"), ("c", "d3", ""))
    ]
    words = ["--store", str(old.parent / "stores"), "--config", str(PREP_TINY)]
    words += ["--manifest", str(write_manifest(old.parent / "manifest.csv", rows))]
    assert pack.main([*words, "--out", str(old.parent / "new"), "--append", str(old)]) == 0
    assert pack.main([*words, "--out", str(old.parent / "whole")]) == 2


def test_a_chain_of_appends(old: Path) -> None:
    write_store(old.parent / "stores", info("c", "d3"), 22)
    append(old, "second")
    write_store(old.parent / "stores", info("d", "d3"), 23)
    manifest = append(old, "third", old.parent / "second")
    assert set(manifest["slides"]) == {"d"}
    folders = (old, old.parent / "second")
    assert manifest["appended_to"] == [files.sha256_file(folder / shards.MANIFEST) for folder in folders]
    with pytest.raises(ValueError, match="slide a is in an earlier set of the chain too; name each once"):
        append(old, "fourth", old)
    write_store(old.parent / "others", info("x", "d9"), 20, ("G7",))
    pack.pack(old.parent / "others", old.parent / "strange", CONFIG)
    with pytest.raises(ValueError, match=r"has other genes than .*old; append to sets of one chain"):
        append(old, "fourth", old.parent / "strange")


def test_a_known_donor_cannot_come_into_another_split(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(old.parent / "stores", info("c", "d2", "train"), 22)
    words = ["--store", str(old.parent / "stores"), "--config", str(PREP_TINY), "--append", str(old)]
    assert pack.main([*words, "--out", str(old.parent / "new")]) == 2
    assert "donor 'd2' of study 't' is in two splits: slide b in test, slide c in train" in capsys.readouterr().err


def test_nothing_new_and_the_old_set_itself_are_refused(old: Path) -> None:
    with pytest.raises(ValueError, match="no slide with profiles to pack that the older sets do not hold"):
        append(old, "new")
    with pytest.raises(ValueError, match="is a set that is appended to, which stays as it is; name a new folder"):
        append(old, "old")
    with pytest.raises(ValueError, match="no shard manifest"):
        append(old, "new", old.parent / "stores")


def test_slides_that_were_built_anew_stay_as_they_are_held(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(old.parent / "stores", info("a", "d1", "train"), 30)
    write_store(old.parent / "stores", info("c", "d4"), 22)
    assert set(append(old, "new")["slides"]) == {"c"}
    assert "1 slides were built anew since they were packed, and stay as the older set holds them: a" in (
        capsys.readouterr().out
    )


def test_one_section_as_two_donors_of_two_splits_is_refused(
    synthetic_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(csv.DictReader((synthetic_tiny / "manifest.csv").open()))
    first = rows[0] | {"split": "train"}
    twin = first | {"slide_id": "twin", "section": "twin", "donor": "another", "split": "test"}
    write_manifest(tmp_path / "manifest.csv", [first, twin])
    words = ["--store", str(tmp_path / "stores"), "--config", str(PREP_TINY)]
    manifest = [str(tmp_path / "manifest.csv"), "--root", str(synthetic_tiny), "--workers", "1"]
    assert build.main([*manifest, *words]) == 0
    words += ["--out", str(tmp_path / "out")]
    assert pack.main(words) == 2
    told = capsys.readouterr().err
    assert "twin in test; leave one out, or give both one donor and one split" in told
    assert "or pack them all the same by --allow-duplicates" in told
    assert pack.main([*words, "--allow-duplicates"]) == 0
    assert shards.verify(tmp_path / "out") == []
