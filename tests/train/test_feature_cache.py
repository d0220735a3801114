"""A frozen encoder's cached features: those of a live one, nothing of a hidden tile, a run and its export."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from storm import export, files
from storm.config import RunConfig
from storm.data.batch import BatchSpec, collate
from storm.data.corpus import Corpus, open_corpus
from storm.data.features import FeatureStore, touched
from storm.data.view import plain_view
from storm.model.encoders import fingerprint
from storm.model.storm import Standard, Storm
from storm.train import engine, feature_cache, trainer
from tests.train import encoder, runs

VARIANTS = 3
Opened = tuple[Corpus, Storm, BatchSpec, FeatureStore]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder.write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", 3)


@pytest.fixture(scope="module")
def cached(tiny_shards: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache beside the tiny shards."""
    run = encoder.config(tiny_shards, tmp_path_factory.mktemp("none"), weights, "frozen")
    (folder,) = trainer.cache_features(run, VARIANTS, ["train"])
    assert trainer.cache_features(run, VARIANTS, ["train"]) == [folder]
    return folder


@pytest.fixture
def opened(tiny_shards: Path, weights: Path, cached: Path) -> Opened:
    """The corpus, the model of a run on the cache, what its batches are made with, and the cache."""
    run = encoder.config(tiny_shards, Path("none"), weights, "frozen", "data.features=auto")
    corpus = open_corpus(run.data)
    run = trainer.fitted(run, corpus)
    model, spec = trainer.build(run, corpus)
    store = feature_cache.find(corpus, run, fingerprint(model.morphology, run.model))
    assert isinstance(model.standard, Standard)
    model.standard.mean, model.standard.sd = torch.from_numpy(store.sets[0].statistics).clone()
    return corpus, model, spec, store


def test_cached_features_are_those_of_the_live_encoder(opened: Opened) -> None:
    corpus, model, spec, store = opened
    (group,) = corpus.groups.read([1])
    turned = set()
    for variant in range(VARIANTS):
        view, shown = store.show(plain_view(group, use_counts=True), 1, variant)
        turned.add((view.flip, view.turns))
        with torch.no_grad():
            live = collate([group], [view], spec)
            quick = collate([group], [view], spec, cached=[shown])
            feature, valid, summary = model._morphology(live)
            assert "tiles" not in quick and live.keys() - {"tiles"} <= quick.keys()
            some = live["profile"]  # what stands at padded places nobody reads
            torch.testing.assert_close(quick["profile_feature"][some], feature[some], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(quick["profile_valid"][some], valid[some], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(quick["tile_feature"], summary, rtol=2e-2, atol=2e-2)
            found, expected = model(quick), model(live)
            for name in ("embedding", "log_composition", "depth_mean"):
                torch.testing.assert_close(found[name][some], expected[name][some], rtol=1e-2, atol=1e-2)
    assert len(turned) > 1 and feature.std() > 0.05


def test_columns_are_left_out_by_key_and_the_target_is_whole(opened: Opened) -> None:
    corpus, _, spec, store = opened
    (group,) = corpus.groups.read([1])
    view, shown = store.show(plain_view(group, use_counts=False), 1, 0)
    view = dataclasses.replace(view, hidden_tiles=frozenset(list(group.tiles)[:1]))
    whole, some, again, other = (
        collate([group], [view], spec, cached=[one])
        for one in (shown, *(shown.dropped(0.75, store.drop_rng(0, 0, i)) for i in (5, 5, 6)))
    )
    for name in ("profile_feature", "tile_feature"):
        kept = some[name] != 0
        torch.testing.assert_close(some[name][kept], 4 * whole[name][kept])
        assert 0.2 < kept.sum() / (whole[name] != 0).sum() < 0.3
        assert torch.equal(some[name], again[name]) and not torch.equal(some[name], other[name])
    assert torch.equal(some["tile_feature_target"], whole["tile_feature_target"])


def test_nothing_of_a_hidden_tile_is_shown(opened: Opened) -> None:
    """What is shown of profiles does not move with the maps of the hidden tiles; what is left out is what would."""
    corpus, model, spec, store = opened
    (group,) = corpus.groups.read([0])
    plain = plain_view(group, use_counts=True)
    hidden = frozenset(place for place in group.tiles if place[1] == 0)
    batch = collate([group], [plain], spec)
    place_of = {place: i for i, place in enumerate(sorted(group.tiles))}
    with torch.no_grad():
        maps, _ = model.morphology(batch["tiles"], batch["tile_weight"])
        noisy = maps.clone()
        noisy[[place_of[place] for place in hidden]] += 10
        before, after = (model.footprint(m, batch)[0][batch["profile"]] for m in (maps, noisy))
    order = np.argsort(group.region, kind="stable")
    moved = np.empty((len(order), 2), bool)
    moved[order] = ((before - after).abs() > 1e-6).any(-1).numpy()
    found = touched(group, dataclasses.replace(plain, hidden_tiles=hidden), model.config.patch_um)
    assert not (moved & ~found).any()
    assert 0.5 < moved.sum() / found.sum() <= 1 and not found.all()
    view, shown = store.show(dataclasses.replace(plain, hidden_tiles=hidden), 0, 0)
    quick = collate([group], [view], spec, cached=[shown])
    back = quick["profile_valid"][quick["profile"]].numpy()
    assert (back[found[order]] == 0).all() and not quick["profile_feature"][quick["profile_valid"] == 0].any()
    target = quick["tile_feature_target"]
    assert target[quick["tile_hidden"]].any(-1).all() and not target[~quick["tile_hidden"]].any()


def test_a_run_on_the_cache_and_its_export(
    tiny_shards: Path, weights: Path, cached: Path, world: engine.World, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    shown = ["mask.image_only=0", "mask.in_context=0", "mask.gene_level=0"]
    more = ["data.features=auto", "model.image_target=feature", "mask.feature_dropout=0.5", *shown]
    run = encoder.config(tiny_shards, tmp_path / "run", weights, "frozen", *more)
    done = trainer.Trainer(run, world)
    done.start("never")
    done.train(2)
    assert "cached variants of each group in place of tiles" in capfd.readouterr().out
    again = trainer.Trainer(run, world)
    again.start("auto")
    again.train()
    assert [line["step"] for line in runs.log(tmp_path / "run")] == [1, 2, 3]
    assert runs.log(tmp_path / "run")[-1]["train/loss/image"] is not None
    first, last = load_file(weights), again.engine.weights()
    assert all(torch.equal(last[f"morphology.model.{name}"], tensor) for name, tensor in first.items())
    assert not [name for name in again.engine.moments() if "morphology" in name]
    found = export.load(export.export(tmp_path / "run" / "checkpoints" / "step_0000003", tmp_path / "out"))
    assert found.config.encoder_sha256 in (tmp_path / "out" / "README.md").read_text()
    told = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert told["pixel_mean"] == [0.5, 0.5, 0.5]


def _find(run: RunConfig) -> FeatureStore:
    corpus = open_corpus(run.data)
    run = trainer.fitted(run, corpus)
    model, _ = trainer.build(run, corpus)
    return feature_cache.find(corpus, run, fingerprint(model.morphology, run.model))


def _changed(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


def _aged(marker: Path) -> None:
    told = files.read_json(marker)
    files.write_json(marker, told | {"recipe": told["recipe"] | {"version": 0}})


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("features.json", lambda p: files.write_json(p, files.read_json(p) | {"index_sha256": "0"}), "of other shards"),
    ("features.json", lambda p: files.write_json(p, []), "is no marker of features"),
    ("features.json", lambda p: _aged(p), "is of version 0 of the cache"),
    ("profile.npy", lambda p: os.truncate(p, 1000), r"profile\.npy: is missing or damaged"),
    ("stain.npy", Path.unlink, r"stain\.npy: is missing or damaged"),
    ("tile.npy", lambda p: _changed(p, lambda a: a[:, :1]), r"tile\.npy: holds float16 .*, not float16"),
    ("statistics.npy", lambda p: _changed(p, lambda a: a * np.nan), "is no mean and sd"),
]


@pytest.mark.parametrize(("name", "damage", "fact"), DAMAGES)
def test_a_cache_that_will_not_do_is_named_and_made_anew(
    name: str, damage: Callable, fact: str, tiny_shards: Path, weights: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards, ignore=shutil.ignore_patterns("features"))
    run = encoder.config(shards, tmp_path, weights, "frozen", "data.features=auto")
    (folder,) = trainer.cache_features(run, 1, ["train"])
    before = (folder / "train" / "tile.npy").read_bytes()
    damage(folder / "train" / name)
    named = encoder.config(shards, tmp_path, weights, "frozen", f"data.features={folder}")
    with pytest.raises(ValueError, match=f"{fact}.*launch/features.py"):
        _find(named)
    trainer.cache_features(run, 1, ["train"])
    assert "made anew" in capsys.readouterr().out
    assert (folder / "train" / "tile.npy").read_bytes() == before
    assert _find(run).recipe == _find(named).recipe


def test_features_beyond_half_precision_are_refused_and_nothing_is_written(
    tiny_shards: Path, weights: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards, ignore=shutil.ignore_patterns("features"))
    large = {name: tensor * (1e9 if tensor.ndim == 1 else 1) for name, tensor in load_file(weights).items()}
    save_file(large, tmp_path / "large.safetensors")
    run = encoder.config(shards, tmp_path, tmp_path / "large.safetensors", "frozen")
    with pytest.raises(ValueError, match="go beyond half precision"):
        trainer.cache_features(run, 1, ["train"])
    assert not [path for path in (shards / "features").rglob("*") if path.is_file()]


def test_features_of_another_encoder_are_refused(tiny_shards: Path, cached: Path, tmp_path: Path) -> None:
    other = encoder.write_weights(tmp_path / "o.safetensors", 4)
    for named, fact in (("auto", "hold no features of this encoder"), (str(cached), "features of another encoder")):
        run = encoder.config(tiny_shards, tmp_path, other, "frozen", f"data.features={named}")
        with pytest.raises(ValueError, match=fact):
            _find(run)
