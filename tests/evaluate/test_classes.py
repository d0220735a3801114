"""The truth of synthetic tissue as it is read: by name, and one table of classes for all sections."""

from pathlib import Path

import numpy as np
import pytest

from storm.evaluate import classes, domains
from storm.evaluate.sections import Section
from tests.evaluate import cohorts

GENES = ["g0", "g1", "g2"]


def sections() -> list[Section]:
    rng = np.random.default_rng(0)
    return [cohorts.section(name, name, rng.normal(size=(9, 3)), rng) for name in ("x", "y")]


def write(folder: Path, section: Section, genes: list[str], kinds: list[str]) -> np.ndarray:
    """The truth of a section, its profiles in another order; what is expected of each, in the section's."""
    expected = np.random.default_rng(len(genes)).random((9, len(genes)))
    np.savez(
        folder / f"{section.slide_id}.npz", gene_id=genes, gene_class=kinds,
        profile_id=section.ids[::-1], expected=expected[::-1],
    )  # fmt: skip
    return expected


def test_truth_is_read_by_the_names_of_profiles_and_genes(tmp_path: Path) -> None:
    made = sections()
    expected = [write(tmp_path, section, ["g2", "other", "g0"], ["a", "b", "e"]) for section in made]
    kind, values = classes.read_truths(tmp_path, made, GENES)
    assert kind.tolist() == ["e", "", "a"]
    for found, truth in zip(values, expected, strict=True):
        np.testing.assert_allclose(found, np.stack([truth[:, 2], np.zeros(9), truth[:, 0]], 1))


def test_sections_whose_truths_know_other_genes_are_refused(tmp_path: Path) -> None:
    made = sections()
    write(tmp_path, made[0], GENES, ["a", "b", "c"])
    write(tmp_path, made[1], GENES[:2], ["a", "b"])
    with pytest.raises(ValueError, match=r"y\.npz: 1 genes have another class than in x\.npz, or none; give"):
        classes.read_truths(tmp_path, made, GENES)


def test_what_is_no_truth_of_these_genes_is_named(tmp_path: Path) -> None:
    """A study lists it, and goes on with its other runs."""
    made = sections()
    write(tmp_path, made[0], ["other"], ["a"])
    with pytest.raises(ValueError, match=r"x\.npz: knows none of the 3 genes .* \(as g0\)"):
        classes.read_truths(tmp_path, made[:1], GENES)
    whole = (tmp_path / "x.npz").read_bytes()
    np.savez(tmp_path / "lacks.npz", gene_id=GENES)
    for data in (b"", b"text", whole[:200], (tmp_path / "lacks.npz").read_bytes()):
        (tmp_path / "x.npz").write_bytes(data)
        with pytest.raises(ValueError, match=r"x\.npz: not readable as the truth of a slide"):
            classes.read_truths(tmp_path, made[:1], GENES)
        with pytest.raises(ValueError, match=r"x\.npz: not readable as the truth of a slide"):
            domains.read_labels(made[0], tmp_path, None)
