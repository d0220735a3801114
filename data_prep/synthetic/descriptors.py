"""Gene descriptors of known value, for the proof on genes that a model has not seen.

In: the genes and what they answer to. Out: one npz per R2 with gene_id [G] and descriptor float32 [G, WIDTH]. The first
columns are the genes' standardised loadings to the share R2 and noise to the rest; the other columns are noise alone.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.synthetic.expression import GenePanel
from storm import files

WIDTH = 32
SHARES = (0.0, 0.3, 0.7)  # R2


def describe(panel: GenePanel, r2: float, seed: int) -> npt.NDArray[np.float32]:
    """[G, WIDTH], every column of about mean 0 and sd 1. The noise is the same for every R2."""
    noise = np.random.default_rng([seed, 107]).standard_normal((len(panel.ids), WIDTH))
    code = panel.loading.T
    code = code[:, code.any(0)]  # no gene answers to some latents
    code = (code - code.mean(0)) / code.std(0)
    wide = np.sqrt(1 - r2) * noise
    wide[:, : code.shape[1]] += np.sqrt(r2) * code
    wide[:, code.shape[1] :] = noise[:, code.shape[1] :]
    return wide.astype(np.float32)


def write_descriptors(folder: Path, panel: GenePanel, seed: int) -> list[Path]:
    """`descriptors_r2_0.npz`, `descriptors_r2_30.npz` and `descriptors_r2_70.npz` under `folder`."""
    paths = [folder / f"descriptors_r2_{round(100 * r2)}.npz" for r2 in SHARES]
    for path, r2 in zip(paths, SHARES, strict=True):
        with files.replacing(path) as temporary, temporary.open("wb") as handle:
            arrays = {"gene_id": panel.ids, "descriptor": describe(panel, r2, seed)}
            np.savez_compressed(handle, allow_pickle=False, **arrays)
    return paths
