"""The same profiles asked at different places of their region, and at different phases of the tile grid.

Whole tiles aside, what is read under a footprint and around it is the same to rounding. What remains is the context (a
region at another place holds other tissue) and, at another phase, the encoder, to which a tile is a world of its own.
Deviations are root mean squares, in units of the spread between profiles; two different profiles differ by 1.4.

The stated tolerances are those of an untrained model whose every weight was moved (`awake`), regions of 8 x 8 tiles and
profiles near the middle. Measured: at another place .16-.19 in embedding and composition; at another phase .33-.48 in
what is read, .59-.83 in the embedding, .62-.96 in the composition. Training with regions cut again starts from there.
"""

import numpy as np
import pytest
import torch

from storm.data.batch import BatchSpec, collate
from storm.data.view import plain_view
from storm.model.storm import Storm
from storm.schema import Group, GroupMeta, Profiles, RegionMeta
from tests.model.batches import CONFIG, N_GENES, awake

PX, SIDE = CONFIG.tile_px, 8
ANOTHER_PLACE, ANOTHER_PHASE, READ_THERE = 0.3, 1.1, 0.55


def picture(side_px: int = 400) -> np.ndarray:
    """Coloured clouds of about 20 um, a pixel being a um."""
    spectrum = np.fft.fft2(np.random.default_rng(0).normal(size=(side_px, side_px, 3)), axes=(0, 1))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side_px), np.fft.fftfreq(side_px)))
    clouds = np.fft.ifft2(spectrum * np.exp(-2 * (np.pi * frequency * 10) ** 2)[..., None], axes=(0, 1)).real
    return np.clip(150 + 45 * clouds / clouds.std(), 0, 255).astype(np.uint8)


PICTURE = picture()
MIDDLE_UM = np.random.default_rng(1).uniform(184, 216, (60, 2))


def ask(model: Storm, x_px: int, y_px: int) -> tuple[np.ndarray, ...]:
    """(what is read, embedding, log composition) of the profiles, in the region that begins at that pixel."""
    tiles = {
        (0, r, c): PICTURE[y_px + r * PX : y_px + (r + 1) * PX, x_px + c * PX : x_px + (c + 1) * PX]
        for r in range(SIDE)
        for c in range(SIDE)
    }
    n = len(MIDDLE_UM)
    discs = Profiles(
        [""] * n, MIDDLE_UM, np.full(n, 20, np.float32), np.zeros(n, np.uint8), np.zeros(n + 1, np.int64),
        np.zeros(0, np.int32), np.zeros(0, np.int32),
    )  # fmt: skip
    meta = GroupMeta(
        "s", "s", "d", "t", "breast", "human", "visium", "spot", "p", 0.0, 1.0, PX, CONFIG.tile_mpp,
        (RegionMeta((float(x_px), float(y_px)), SIDE, SIDE),),
    )  # fmt: skip
    group = Group(meta, discs, np.zeros(n, np.int32), tiles)
    everything = {"p": np.ones(N_GENES, bool)}
    spec = BatchSpec(PX, N_GENES, everything, CONFIG.organs, np.full(N_GENES, 1 / N_GENES))
    with torch.inference_mode():
        batch = collate([group], [plain_view(group, False)], spec)
        read, valid = model.footprint(model.morphology(batch["tiles"], batch["tile_weight"])[0], batch)
        outputs = model(batch)
    assert (valid > 0.999).all()
    return read[0].numpy(), outputs["embedding"][0].numpy(), outputs["log_composition"][0].numpy()


def deviation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a - b) ** 2).mean() / ((a - a.mean(0)) ** 2).mean()))


@pytest.fixture(scope="module")
def model() -> Storm:
    return awake(Storm(CONFIG, N_GENES))


@pytest.mark.parametrize("shift", [(PX, 0), (0, -PX), (PX, PX)])
def test_another_place_in_the_region(model: Storm, shift: tuple[int, int]) -> None:
    before, after = ask(model, 72, 72), ask(model, 72 + shift[0], 72 + shift[1])
    assert deviation(before[0], after[0]) < 1e-5
    assert all(0 < deviation(a, b) < ANOTHER_PLACE for a, b in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize("shift", [(9, 21), (16, 16), (-5, 11)])
def test_another_phase_of_the_grid(model: Storm, shift: tuple[int, int]) -> None:
    before, after = ask(model, 72, 72), ask(model, 72 + shift[0], 72 + shift[1])
    assert 0 < deviation(before[0], after[0]) < READ_THERE
    assert all(deviation(a, b) < ANOTHER_PHASE for a, b in zip(before[1:], after[1:], strict=True))
    for a, b in zip(before, after, strict=True):  # the measure tells other profiles apart
        assert deviation(a, np.roll(b, 7, axis=0)) > 1.3
