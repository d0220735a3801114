"""Inference: what is asked, in which company and in how many chunks changes no answer; neither do hidden counts."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from storm import descriptors, export, genes, inference, results, schema, store
from storm.inference import Slide
from tests import untrained


def close(found: np.ndarray, expected: np.ndarray | float) -> None:
    """Equal within 1e-5."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> export.Pretrained:
    folder = tmp_path_factory.mktemp("model")
    return export.load(export.export(untrained.write_checkpoint(folder / "run"), folder / "model"))


@pytest.fixture(scope="module")
def slide(pretrained: export.Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Slide:
    return inference.prepare(pretrained, store.SlideStore(untrained.write_store(tmp_path_factory.mktemp("store"))))


def test_counts_are_mapped_to_the_models_genes(slide: Slide, pretrained: export.Pretrained) -> None:
    own, table = slide.store.profiles(), slide.store.genes()
    expected = np.zeros((len(own), 40), int)
    for i in range(len(own)):
        for g, c in zip(
            own.gene[own.indptr[i] : own.indptr[i + 1]], own.count[own.indptr[i] : own.indptr[i + 1]], strict=True
        ):
            if table.ids[g] in pretrained.genes.index:
                expected[i, pretrained.genes.index[table.ids[g]]] = c
    found = np.zeros_like(expected)
    p = slide.profiles
    found[np.repeat(np.arange(len(p)), np.diff(p.indptr)), p.gene] = p.count
    np.testing.assert_array_equal(found, expected)
    assert slide.unknown == ("ENSG99999999999",)
    assert slide.panel.sum() == 29
    assert all(np.all(np.diff(p.gene[a:b]) > 0) for a, b in zip(p.indptr[:-1], p.indptr[1:], strict=True))


def test_a_prediction_sums_to_its_depth_over_the_reference_panel(slide: Slide, pretrained: export.Pretrained) -> None:
    whole = inference.predict(pretrained, slide)
    assert whole.composition.shape == (len(slide.profiles), 32)
    close(whole.composition.sum(1), 1)
    close(whole.mu.sum(1) / np.exp(whole.log_depth), 1)
    assert whole.composition.std(0).max() > 1e-4  # the pixels matter, so the tests below can fail
    assert np.isfinite(whole.lognorm()).all() and np.isfinite(whole.raw()).all()


def test_a_prediction_follows_the_likelihood(pretrained: export.Pretrained, slide: Slide, tmp_path: Path) -> None:
    """The noise that a model has not learned is not made up: Poisson, or none."""
    found = {"nb": inference.predict(pretrained, slide)}
    for likelihood in ("poisson", "zinb", "lognorm"):
        run = untrained.write_checkpoint(
            tmp_path / likelihood, config=dataclasses.replace(untrained.MODEL, likelihood=likelihood)
        )
        other = export.load(export.export(run, tmp_path / f"{likelihood}_model"))
        found[likelihood] = inference.predict(other, slide)
    assert all(np.isfinite(p.lognorm()).all() and np.isfinite(p.raw()).all() for p in found.values())
    assert np.isfinite(found["nb"].dispersion).all() and not found["nb"].zeros.any()
    poisson = found["poisson"]
    assert np.isinf(poisson.dispersion).all()
    counts, mu = np.arange(400.0), float(poisson.mu[0, 0])
    log_p = counts * np.log(mu) - mu - np.array([math.lgamma(k + 1) for k in counts])
    assert poisson.raw()[0, 0] == pytest.approx((np.exp(log_p) * np.log1p(counts)).sum(), rel=1e-4)
    lognorm = found["lognorm"]
    assert np.isnan(lognorm.dispersion).all()
    np.testing.assert_array_equal(lognorm.lognorm(), np.log1p(np.float32(1e4) * lognorm.composition))
    np.testing.assert_array_equal(lognorm.raw(), np.log1p(lognorm.mu))
    zinb = found["zinb"]
    assert (zinb.zeros > 0.01).all() and np.isfinite(zinb.dispersion).all()
    close(
        zinb.mu / (np.exp(zinb.log_depth)[:, None] * zinb.composition), np.broadcast_to(1 - zinb.zeros, zinb.mu.shape)
    )
    one = dataclasses.replace(zinb, zeros=0 * zinb.zeros)
    close(zinb.raw(), one.raw() * (1 - zinb.zeros))


def test_one_gene_alone_is_itself_among_all(slide: Slide, pretrained: export.Pretrained) -> None:
    whole = inference.predict(pretrained, slide)
    one = inference.predict(pretrained, slide, genes=np.array([7]))
    np.testing.assert_array_equal(one.composition[:, 0], whole.composition[:, 7])
    np.testing.assert_array_equal(one.lognorm()[:, 0], whole.lognorm()[:, 7])
    turned = inference.predict(pretrained, slide, genes=np.array([9, 2]))
    np.testing.assert_array_equal(turned.dispersion, whole.dispersion[:, [9, 2]])


def test_a_footprint_asked_alone_is_itself_among_all(
    slide: Slide, pretrained: export.Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inference.predict(pretrained, slide)
    embedded = inference.embed(pretrained, slide, use_counts=False)
    rows = np.array([60, 3, 35])
    for some in (rows, rows[:1], np.arange(36)):
        alone = inference.predict(pretrained, slide, rows=some)
        close(alone.composition, whole.composition[some])
        close(alone.log_depth, whole.log_depth[some])
        close(inference.embed(pretrained, slide, False, some), embedded[some])
    monkeypatch.setattr(inference, "_CHUNK", 3)
    monkeypatch.setattr(inference, "_REGIONS", 3)
    close(inference.predict(pretrained, slide).composition, whole.composition)


def test_with_counts_a_footprint_keeps_its_neighbours(slide: Slide, pretrained: export.Pretrained) -> None:
    whole = inference.embed(pretrained, slide, use_counts=True)
    close(inference.embed(pretrained, slide, True, np.array([40])), whole[[40]])
    assert np.abs(whole - inference.embed(pretrained, slide, use_counts=False)).max() > 1e-3


def test_counts_do_not_reach_a_prediction_from_the_image(slide: Slide, pretrained: export.Pretrained) -> None:
    p = slide.profiles
    other = schema.Profiles(
        p.ids, p.xy_um, p.footprint_um, p.footprint_kind, p.indptr, p.gene, np.flip(p.count).copy() + 3
    )
    changed = Slide(slide.store, other, slide.panel, True, slide.unknown, slide.read)
    np.testing.assert_array_equal(
        inference.predict(pretrained, changed).composition, inference.predict(pretrained, slide).composition
    )
    assert np.abs(inference.embed(pretrained, changed, True) - inference.embed(pretrained, slide, True)).max() > 1e-3


def test_outlines_reach_the_model(slide: Slide, pretrained: export.Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store's polygons are kept, and read as such: a sliver sees another part of the tissue than its disc."""
    drawn = dataclasses.replace(
        slide.store.profiles(), footprint_kind=np.full(len(slide.profiles), schema.POLYGON, np.uint8),
        polygon_indptr=np.arange(len(slide.profiles) + 1) * 3,
        polygon_um=np.tile(np.array([[40, 5], [-40, 5], [0, -8]], np.float32), (len(slide.profiles), 1)),
    )  # fmt: skip
    monkeypatch.setattr(store.SlideStore, "profiles", lambda self: drawn)
    outlined = inference.prepare(pretrained, slide.store)
    np.testing.assert_array_equal(outlined.profiles.polygon_um, drawn.polygon_um)
    np.testing.assert_array_equal(outlined.profiles.count, slide.profiles.count)
    rows = np.arange(5)
    apart = inference.embed(pretrained, outlined, False, rows) - inference.embed(pretrained, slide, False, rows)
    assert np.abs(apart).max() > 1e-3


def test_the_counts_of_some_profiles_are_context_for_the_others(
    slide: Slide, pretrained: export.Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = np.arange(len(slide.profiles)) % 3 == 0
    hidden = np.flatnonzero(~visible)
    found = inference.predict(pretrained, slide, rows=hidden, use_counts=visible)
    assert np.abs(found.composition - inference.predict(pretrained, slide, rows=hidden).composition).max() > 1e-4
    alone = inference.predict(pretrained, slide, rows=hidden[[7]], use_counts=visible)
    close(alone.composition, found.composition[[7]])
    p = slide.profiles
    owner = np.repeat(np.arange(len(p)), np.diff(p.indptr))
    for part, moves in ((~visible, False), (visible, True)):
        count = np.where(part[owner], p.count * 2 + 1, p.count)
        other = schema.Profiles(p.ids, p.xy_um, p.footprint_um, p.footprint_kind, p.indptr, p.gene, count)
        changed = Slide(slide.store, other, slide.panel, True, slide.unknown, slide.read)
        again = inference.predict(pretrained, changed, rows=hidden, use_counts=visible).composition
        assert np.array_equal(again, found.composition) != moves
    every = np.ones_like(visible)
    np.testing.assert_array_equal(
        inference.embed(pretrained, slide, every), inference.embed(pretrained, slide, use_counts=True)
    )
    monkeypatch.setattr(inference, "_CHUNK", 5)
    close(inference.predict(pretrained, slide, rows=hidden, use_counts=visible).composition, found.composition)


def test_context_is_bounded(slide: Slide, pretrained: export.Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_CONTEXT", 6)
    every, rows = np.ones(len(slide.profiles), bool), np.arange(len(slide.profiles))
    asks = list(inference._asks(pretrained, slide, rows, every))
    assert all(len(ask.rows) <= 6 + ask.wanted.sum() for ask in asks)
    assert np.array_equal(np.sort(np.concatenate([ask.rows[ask.wanted] for ask in asks])), rows)
    np.testing.assert_array_equal(inference._spread(rows)[:2], [0, len(rows) // 6])


def test_beside_a_bounded_context_an_answer_hangs_on_the_slide_alone(
    slide: Slide, pretrained: export.Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_CONTEXT", 4)
    monkeypatch.setattr(inference, "_CHUNK", 7)
    whole, rows = inference.embed(pretrained, slide, use_counts=True), np.array([40, 3, 35])
    for some in (rows, rows[:1]):
        close(inference.embed(pretrained, slide, True, some), whole[some])


def test_pixels_can_be_withheld(slide: Slide, pretrained: export.Pretrained, tmp_path: Path) -> None:
    found = inference.vectors(pretrained, slide, ("embedding",), use_counts=True, use_image=False)["embedding"]
    repainted = store.SlideStore(untrained.write_store(tmp_path, seed=0))
    repainted.jpeg = lambda i, own=repainted.jpeg: own(0)  # type: ignore[method-assign, misc]
    other = Slide(repainted, slide.profiles, slide.panel, True, slide.unknown, slide.read)
    np.testing.assert_array_equal(inference.vectors(pretrained, other, ("embedding",), True, False)["embedding"], found)
    assert np.abs(inference.embed(pretrained, other, True) - inference.embed(pretrained, slide, True)).max() > 1e-3
    with pytest.raises(ValueError, match="neither pixels nor counts"):
        inference.vectors(pretrained, slide, ("embedding",), use_image=False)["embedding"]


def test_an_answer_can_be_the_mean_over_the_symmetries(
    slide: Slide, pretrained: export.Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight = dataclasses.replace(pretrained, symmetries=8)
    rows = np.arange(3)
    found = inference.predict(eight, slide, rows=rows)
    several = inference.vectors(eight, slide, ("embedding",), rows=rows)["embedding"]
    close(found.composition.sum(1), np.ones(3))
    each = []
    for one in list(inference.SYMMETRIES):
        monkeypatch.setattr(inference, "SYMMETRIES", [one])
        each.append(
            (inference.predict(pretrained, slide, rows=rows), inference.embed(pretrained, slide, False, rows))
        )  # fmt: skip
    close(found.composition, np.mean([one.composition for one, _ in each], axis=0))
    close(found.log_depth, np.mean([one.log_depth for one, _ in each], axis=0))
    close(several, np.mean([vector for _, vector in each], axis=0))
    assert np.abs(each[3][1] - each[0][1]).max() > 1e-3


def test_features_are_of_the_image_encoder_alone(slide: Slide, pretrained: export.Pretrained) -> None:
    assert not inference.vectors(pretrained, slide, ("align_image",))  # the model has none
    found = inference.vectors(pretrained, slide, ("feature",))["feature"]
    assert found.shape == (len(slide.profiles), 2, 32) and found.std(0).min() > 1e-4
    close(inference.vectors(pretrained, slide, ("feature",), use_counts=True)["feature"], found)
    close(inference.vectors(pretrained, slide, ("feature",), rows=np.array([9, 4]))["feature"], found[[9, 4]])


def test_without_counts_a_lattice_is_asked(pretrained: export.Pretrained, tmp_path: Path) -> None:
    bare = inference.prepare(pretrained, store.SlideStore(untrained.write_store(tmp_path, measured=False)))
    assert not bare.measured
    assert "lattice_0_0" in bare.profiles.ids
    places = np.floor(bare.profiles.xy_um / 112).astype(int)
    assert not ((places == 1).all(1)).any()  # no tile there, so nothing is asked there
    assert inference.embed(pretrained, bare, use_counts=False).shape == (len(bare.profiles), 32)
    assert (bare.profiles.footprint_um == 55).all()
    with pytest.raises(ValueError, match="has no counts"):
        inference.embed(pretrained, bare, use_counts=True)


def test_genes_by_id_or_symbol(pretrained: export.Pretrained) -> None:
    found, unknown = inference.gene_indices(pretrained, ["GENE5", "ENSG00000000003", "GENE35", "ENSG00000000005"])
    assert (found.tolist(), unknown) == ([5, 3], ["GENE35"])
    assert len(inference.gene_indices(pretrained, None)[0]) == 32
    with pytest.raises(ValueError, match=r"none of the 1 genes \(as 'GENE35'\)"):
        inference.gene_indices(pretrained, ["GENE35"])
    with pytest.raises(ValueError, match=r"the list of genes is empty; give a list"):
        inference.gene_indices(pretrained, [])
    with pytest.raises(ValueError, match=r"genes='GENE5' is one word; give a list"):
        inference.gene_indices(pretrained, "GENE5")


def test_tiles_of_another_size_and_foreign_genes_are_refused(pretrained: export.Pretrained, tmp_path: Path) -> None:
    path = untrained.write_store(tmp_path)
    found = store.SlideStore(path)
    object.__setattr__(found.info, "tile_mpp", 0.5)
    with pytest.raises(ValueError, match=r"tile_px=32 tile_mpp=3\.5"):
        inference.prepare(pretrained, found)
    found = store.SlideStore(path)
    mouse = genes.GeneTable(tuple(f"ENSMUSG{i:011d}" for i in range(30)), ("x",) * 30)
    found.genes = lambda: mouse  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="none of its 30 genes"):
        inference.prepare(pretrained, found)


def test_genes_outside_the_vocabulary_by_their_descriptors(slide: Slide, tmp_path: Path) -> None:
    """The table travels with the export; what else is asked changes no answer; the rest is refused with the reason."""
    config = dataclasses.replace(untrained.MODEL, descriptor_width=3, expression="tokens", expression_width=16)
    checkpoint = untrained.write_checkpoint(tmp_path / "run", config=config)
    described = export.load(export.export(checkpoint, tmp_path / "model"))
    assert described.model.genes.descriptor.abs().sum() > 0
    assert "predicted from its row in a table of descriptors" in (tmp_path / "model" / "README.md").read_text()
    np.savez(tmp_path / "d.npz", gene_id=np.array(["ENSG00000099999.2", "ENSG00000088888"]),
             descriptor=np.array([[1, 2, 3], [0, 1, -1.0]]))  # fmt: skip
    table = descriptors.read(tmp_path / "d.npz")
    asked = ["GENE5", "ENSG00000099999", "NOWHERE", "ENSG00000088888"]
    found, absent = inference.gene_indices(described, asked, table)
    unseen, rows = inference.unseen_rows(described, table, absent)
    assert found.tolist() == [5] and list(unseen) == ["ENSG00000099999", "ENSG00000088888"]
    both = inference.predict(described, slide, found, unseen=rows)
    assert both.genes.tolist() == [5, 40, 41] and np.isfinite(both.lognorm()).all()
    close(both.composition[:, :1], inference.predict(described, slide, found).composition)
    assert (both.composition[:, 1:].std(0) / both.composition[:, 1:].mean(0) > 1e-5).all()
    only, _ = inference.gene_indices(described, asked[3:], table)
    lone = inference.predict(described, slide, only, unseen=rows[1:])
    close(lone.composition[:, 0], both.composition[:, 2])
    result = results.predict(described, slide.store, asked, table=table)
    assert list(result.var["unseen"]) == [False, True, True]
    assert list(result.uns["storm"]["genes_left_out"]) == ["NOWHERE"]
    assert "needs a row in a table" in result.uns["storm"]["genes_left_out_why"]


def test_a_column_that_the_vocabulary_does_not_vary_in_says_nothing_of_an_unseen_gene(
    slide: Slide, tmp_path: Path
) -> None:
    """What the model holds for it is as it was drawn at its start: no gene may be told by that."""
    config = dataclasses.replace(untrained.MODEL, descriptor_width=3)
    described = export.load(export.export(untrained.write_checkpoint(tmp_path / "run", config=config), tmp_path / "m"))
    described.model.genes.descriptor[:, 2] = 1e-7  # of a constant column only rounding is left
    some = np.arange(4)

    def told(*row: float) -> np.ndarray:
        rows = np.array([row], np.float32)
        return inference.predict(described, slide, np.zeros(0, np.int64), some, unseen=rows).composition

    assert np.isfinite(told(1, 2, 3)).all()
    close(told(1, 2, 3), told(1, 2, 50))
    assert np.abs(told(1, 2, 3) / told(1, 3, 3) - 1).max() > 1e-3


def test_without_descriptors_an_unseen_gene_is_refused_with_the_reason(
    pretrained: export.Pretrained, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="trained without descriptors of genes"):
        inference.gene_indices(pretrained, ["ENSG00000099999"])
    np.savez(tmp_path / "d.npz", gene_id=np.array(["ENSG00000099999"]), descriptor=np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"d\.npz: has 3 columns, the model was trained without descriptors"):
        inference.unseen_rows(pretrained, descriptors.read(tmp_path / "d.npz"), ["ENSG00000099999"])
