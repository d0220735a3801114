"""Withheld genes: no profile, share or panel of a shard set knows them, and everything else stays as it was."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import pack
from storm import files, shards
from tests.data_prep.test_pack import CONFIG, groups_of


def test_withheld_genes_are_in_no_profile_and_no_panel(tiny_shards: Path, tiny_store: Path, tmp_path: Path) -> None:
    whole = shards.ShardSet(tiny_shards)
    names = whole.genes.ids[3::7]
    files.write_bytes(tmp_path / "withheld.txt", "\n".join(f"{name}.5" for name in names).encode())
    config = CONFIG.model_copy(update={"withheld_genes": str(tmp_path / "withheld.txt")})
    manifest = pack.pack(tiny_store, tmp_path / "set", config)
    opened = shards.ShardSet(tmp_path / "set")
    kept = [i for i, name in enumerate(whole.genes.ids) if name not in names]
    assert opened.genes.ids == tuple(whole.genes.ids[i] for i in kept)
    assert opened.genes.share is not None and whole.genes.share is not None
    expected = whole.genes.share[kept] / whole.genes.share[kept].sum()
    np.testing.assert_allclose(opened.genes.share, expected, rtol=0.05)  # a mean over donors of another whole
    assert 0 < manifest["genes_left_out"] <= len(names)
    # What is told of the file is its content, and another content is another set.
    assert manifest["prep"]["withheld_genes"] == files.sha256_file(tmp_path / "withheld.txt")
    before = {key: group for _, key, group in groups_of(tiny_shards)}
    for _, key, group in groups_of(tmp_path / "set"):
        old, new = before[key].profiles, group.profiles
        place = np.searchsorted(kept, old.gene)
        known = np.isin(old.gene, kept)
        assert new.gene.tolist() == place[known].tolist() and new.count.tolist() == old.count[known].tolist()
    files.write_bytes(tmp_path / "withheld.txt", "\n".join(names[:-1]).encode())
    pack.pack(tiny_store, tmp_path / "set", config)
    assert len(shards.ShardSet(tmp_path / "set").genes) == len(kept) + 1


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "no such file"), ("", "holds no gene"), ("ACTB", "'ACTB' is no Ensembl id"),
     ("ENSG99999999999", "names no gene of these stores")],
)  # fmt: skip
def test_a_wrong_list_is_refused(tiny_store: Path, tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        files.write_bytes(tmp_path / "withheld.txt", text.encode())
    config = CONFIG.model_copy(update={"withheld_genes": str(tmp_path / "withheld.txt")})
    with pytest.raises(ValueError, match=f"withheld.txt: {said}"):
        pack.pack(tiny_store, tmp_path / "set", config)
    assert not (tmp_path / "set").exists()
