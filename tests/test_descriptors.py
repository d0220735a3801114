"""A user's table of gene descriptors: what is read, how it is standardised, what is refused."""

from pathlib import Path

import numpy as np
import pytest

from storm import descriptors
from storm.genes import GeneTable
from storm.presets import ModelConfig

GENES = GeneTable(("ENSG1", "ENSG2", "ENSG3"), ("a", "b", "c"))


def written(path: Path, **arrays: np.ndarray) -> Path:
    whole = {"gene_id": np.array(["ENSG3.7", "ENSG9", "ENSG1"]), "descriptor": np.arange(6.0).reshape(3, 2)}
    np.savez(path, **whole | arrays)  # type: ignore[arg-type]
    return path


def test_rows_are_standardised_over_the_genes_that_have_one(tmp_path: Path) -> None:
    table = descriptors.read(written(tmp_path / "d.npz"))
    assert table.ids == ("ENSG3", "ENSG9", "ENSG1") and table.columns == 2
    found = descriptors.rows_of(table, GENES)
    np.testing.assert_allclose(found.values, [[1, 1], [0, 0], [-1, -1]])
    np.testing.assert_allclose(found.centre, [2, 3])
    np.testing.assert_allclose(found.scale, [2, 2])
    assert found.missing == ("ENSG2",)


def test_a_constant_column_is_zero(tmp_path: Path) -> None:
    path = written(tmp_path / "d.npz", descriptor=np.array([[7, 1], [7, 2], [7, 3]]))
    found = descriptors.rows_of(descriptors.read(path), GENES)
    assert not found.values[:, 0].any() and found.values[:, 1].any()


@pytest.mark.parametrize(
    ("arrays", "fact"),
    [
        ({"gene_id": np.array([1, 2, 3])}, "not of strings"),
        ({"gene_id": np.array(["a", "b", "c"], object)}, "allow_pickle=False"),
        ({"descriptor": np.zeros((2, 2))}, r"shape \(2, 2\)"),
        ({"descriptor": np.zeros((3, 0))}, r"shape \(3, 0\)"),
        ({"descriptor": np.full((3, 2), "x")}, "not of numbers"),
        ({"descriptor": np.full((3, 2), np.nan)}, "of 'ENSG3' is not finite"),
        ({"gene_id": np.array(["ENSG1.1", "ENSG1.2", "x"])}, "'ENSG1' is there twice"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path: Path, arrays: dict, fact: str) -> None:
    with pytest.raises(ValueError, match=rf"d\.npz: .*{fact}"):
        descriptors.read(written(tmp_path / "d.npz", **arrays))


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    for name, data in (("torn.npz", written(tmp_path / "d.npz").read_bytes()[:200]), ("text.npz", b"gene,descriptor")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: not readable as a table of descriptors .*; give an npz of"):
            descriptors.read(tmp_path / name)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: not readable"):
        descriptors.read(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"absent\.npz: no such file; give an npz"):
        descriptors.read(tmp_path / "absent.npz")
    table = descriptors.read(written(tmp_path / "d.npz", gene_id=np.array(["x", "y", "z"])))
    with pytest.raises(ValueError, match=r"d\.npz: has none of the 3 genes \(as 'ENSG1'; it has 'x'\)"):
        descriptors.rows_of(table, GENES)


def test_the_model_takes_its_width_from_the_table(tmp_path: Path) -> None:
    path = str(written(tmp_path / "d.npz"))
    assert descriptors.fit(ModelConfig(), path)[0].descriptor_width == 2
    assert descriptors.fit(ModelConfig(), "") == (ModelConfig(), None)
    for model, words, fact in (
        (ModelConfig(descriptor_width=3), path, "has 2 columns, the config asks for 3"),
        (ModelConfig(descriptor_width=3), "", "names no table"),
    ):
        with pytest.raises(ValueError, match=fact):
            descriptors.fit(model, words)
