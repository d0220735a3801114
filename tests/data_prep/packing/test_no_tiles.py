"""Slides of expression alone, as pack writes them: the stream and the model take them."""

from pathlib import Path

import pytest
import torch

from data_prep import pack
from storm import losses
from storm.config import MASK_MODES, DataConfig, MaskConfig
from storm.data.batch import spec_of
from storm.data.corpus import open_corpus
from storm.data.stream import GroupStream
from storm.model.storm import Storm
from storm.presets import ModelConfig
from tests.data_prep.test_pack import CONFIG, info, write_store


@pytest.mark.parametrize("mode", MASK_MODES)
def test_groups_without_a_tile_are_trained_on(tmp_path: Path, mode: str) -> None:
    """A batch of such groups alone: every loss is finite, and every parameter has a gradient."""
    stores = tmp_path / "stores"
    write_store(stores, info("dark", "d1"), 80, tiles=0)
    pack.pack(stores, tmp_path / "set", CONFIG)
    data = DataConfig(shards=str(tmp_path / "set"), global_batch_size=2, micro_batch_size=2)
    opened = open_corpus(data)
    model = ModelConfig(tile_px=CONFIG.tile_px, tile_mpp=CONFIG.tile_mpp, organs=("skin",))
    share = opened.genes.share
    assert share is not None
    spec = spec_of(model, opened.panels, share)
    own = {name: float(name == mode) for name in MASK_MODES}
    found = GroupStream(opened, spec, MaskConfig.model_validate(own | {"loss_genes": 3}), data, 0)[0]
    assert not found["tile_present"].any()
    assert found["tile_weight"].tolist() == [0.0]
    network = Storm(model, len(opened.genes))
    terms = losses.terms(network(found), found)
    total = torch.stack([value for value, _ in terms.values()]).sum()
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
