"""Embeddings and predictions as AnnData, the way its users expect it.

In: `Pretrained` and a slide store. Out: AnnData that opens in scanpy and squidpy without us:

    embed       the measured object (or the user's own), unchanged, plus obsm["X_storm"]
    predict     a new object: X = prediction, dense, var_names unique symbols, var["gene_ids"] Ensembl ids
    both        obsm["spatial"] (full-resolution px), obsm["spatial_um"], uns["spatial"][slide] with an image and scale
                factors, uns["storm"] with hashes, versions, unit, what the model saw, and the genes it cannot know
"""

import warnings
from pathlib import Path
from typing import Any

import anndata
import cv2
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from storm import checkpoints, files, inference
from storm.data.tile import decode_tile
from storm.descriptors import Descriptors
from storm.export import Pretrained
from storm.inference import Slide
from storm.prediction import Prediction
from storm.store import SlideStore

HIRES_PX = 2000  # longest side of the image in uns["spatial"]
UNITS = {
    "lognorm": "expected log1p(count / depth * 1e4), depth and noise as predicted",
    "raw": "expected log1p(count); its level rests on a constant of the training data",
    "composition": "expected share of the counts of the model's reference panel",
    "mu": "expected count; its level rests on a constant of the training data",
}


def embed(
    pretrained: Pretrained, store: SlideStore | str | Path, use_counts: bool | None = None,
    adata: anndata.AnnData | None = None, device: str | None = None,
) -> anndata.AnnData:  # fmt: skip
    """A slide's profiles with obsm["X_storm"] [N, D].

    Args:
        use_counts: let the model see the counts as well as the image; None = where there are any.
        adata: the user's own object of this slide, joined by obs_names and returned as a copy in which nothing is
            changed but what is added; None = the counts as the store holds them.

    Raises:
        ValueError: `adata` holds profiles that the store does not, or one twice.
    """
    slide = inference.prepare(pretrained, _opened(store))
    use_counts = slide.measured if use_counts is None else use_counts
    result = _measured(slide) if adata is None else adata.copy()
    rows = _rows_of(slide, list(result.obs_names))
    result.obsm["X_storm"] = inference.embed(pretrained, slide, use_counts, rows, device)
    _place(result, slide, rows)
    result.uns["storm"] = provenance(pretrained, slide, use_counts) | {"unit": "embedding (obsm['X_storm'])"}
    return result


def predict(
    pretrained: Pretrained, store: SlideStore | str | Path, genes: list[str] | None = None, unit: str = "lognorm",
    use_counts: bool = False, device: str | None = None, table: Descriptors | None = None,
) -> anndata.AnnData:  # fmt: skip
    """Expected expression of a slide's profiles, or of a lattice over its tissue where it has none, from H&E.

    Args:
        genes: symbols or Ensembl ids; those that the model cannot know are left out, with a warning, and listed in
            uns["storm"]. None = its reference panel.
        unit: one of UNITS.
        use_counts: let the model see the measured counts too: a reconstruction, no prediction.
        table: descriptors, from which genes outside the reference panel are predicted; var["unseen"] marks them.

    Raises:
        ValueError: unknown unit, or none of the genes is known.
    """
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r} is unknown; choose one of {', '.join(UNITS)}")
    slide = inference.prepare(pretrained, _opened(store))
    indices, left_out = inference.gene_indices(pretrained, genes, table)
    unseen, rows = inference.unseen_rows(pretrained, table, left_out) if table else ({}, None)
    predicted = inference.predict(pretrained, slide, indices, None, use_counts, device, rows)
    obs = pd.DataFrame(
        {"predicted_log_depth": predicted.log_depth, "footprint_um": slide.profiles.footprint_um},
        index=pd.Index(slide.profiles.ids),
    )
    var = pd.DataFrame(
        {"gene_ids": [*(pretrained.genes.ids[i] for i in indices), *unseen.values()]},
        index=[*(pretrained.genes.symbols[i] for i in indices), *unseen],
    )
    if table:
        var["unseen"] = np.arange(len(var)) >= len(indices)
    result = anndata.AnnData(np.asarray(_values(predicted, unit), np.float32), obs, var)
    result.var_names_make_unique()
    _place(result, slide, np.arange(len(obs)))
    unknown = [gene for gene in left_out if gene not in unseen] if genes is not None else list(slide.unknown)
    if genes is not None and unknown:
        fact = f"{len(unknown)} of {len(genes)} genes are left out (as {unknown[0]!r})"
        warnings.warn(f"{fact}: {inference.refusal(pretrained)}", stacklevel=2)
    result.uns["storm"] = provenance(pretrained, slide, use_counts) | {
        "unit": f"{unit}: {UNITS[unit]}", "genes_left_out": np.array(unknown, dtype=object),
        "genes_left_out_why": inference.refusal(pretrained) if unknown else "",
    }  # fmt: skip
    return result


def visium_object(outs: Path) -> anndata.AnnData:
    """What the matrix of a Space Ranger `outs` folder holds: all barcodes, all features of all types, raw counts."""
    from data_prep.platforms.visium import read_matrix

    matrix = read_matrix(outs)
    counts = sparse.csr_matrix(
        (matrix.count.astype(np.float32), matrix.column, matrix.indptr), shape=(len(matrix.barcodes), len(matrix.names))
    )
    var = pd.DataFrame({"gene_ids": matrix.names, "feature_types": matrix.types}, index=matrix.symbols)
    result = anndata.AnnData(counts, pd.DataFrame(index=pd.Index(matrix.barcodes)), var)
    result.var_names_make_unique()
    return result


def in_store(adata: anndata.AnnData, store: SlideStore | str | Path) -> tuple[anndata.AnnData, int]:
    """(the rows that the store has as profiles, how many it has not): a matrix may hold barcodes outside the tissue."""
    known = adata.obs_names.isin(_opened(store).profiles().ids)
    return adata[known].copy(), int((~known).sum())


def _opened(store: SlideStore | str | Path) -> SlideStore:
    return store if isinstance(store, SlideStore) else SlideStore(Path(store))


def _values(predicted: Prediction, unit: str) -> npt.NDArray[np.float32]:
    if unit == "lognorm":
        return predicted.lognorm()
    if unit == "raw":
        return predicted.raw()
    return predicted.composition if unit == "composition" else predicted.mu


def _measured(slide: Slide) -> anndata.AnnData:
    """The counts as the store holds them; without a measurement no genes."""
    profiles, table = slide.store.profiles(), slide.store.genes()
    obs = pd.DataFrame(index=pd.Index(slide.profiles.ids))
    if not slide.measured:
        return anndata.AnnData(obs=obs)
    counts = sparse.csr_matrix(
        (profiles.count.astype(np.float32), profiles.gene, profiles.indptr), shape=(len(profiles), len(table))
    )
    result = anndata.AnnData(counts, obs, pd.DataFrame({"gene_ids": list(table.ids)}, index=list(table.symbols)))
    result.var_names_make_unique()
    return result


def _rows_of(slide: Slide, names: list[str]) -> npt.NDArray[np.int64]:
    """Row of each obs_name among the slide's profiles."""
    row = {name: i for i, name in enumerate(slide.profiles.ids)}
    strangers = [name for name in names if name not in row]
    if strangers:
        raise ValueError(
            f"{len(strangers)} of {len(names)} obs_names (as {strangers[0]!r}) are no profiles of slide "
            f"{slide.store.info.slide_id} (as {slide.profiles.ids[0]!r}); give the object of that slide, "
            "with the vendor's barcodes"
        )
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(
            f"obs_names: {twice!r} is there twice; give the object of slide {slide.store.info.slide_id} alone, each "
            "barcode once"
        )
    return np.array([row[name] for name in names], dtype=np.int64)


def _place(result: anndata.AnnData, slide: Slide, rows: npt.NDArray[np.int64]) -> None:
    """Coordinates, image and scale factors, each where the object does not bring its own; no image where its own
    coordinates are of another frame, under which it would not lie."""
    info = slide.store.info
    xy_um = slide.profiles.xy_um[rows]
    result.obsm["spatial_um"] = xy_um
    places_px = np.asarray(result.obsm.setdefault("spatial", xy_um / info.mpp))
    same = places_px.shape == xy_um.shape and np.allclose(places_px, xy_um / info.mpp, atol=1)
    if "spatial" in result.uns or not same:
        return
    image, px_per_um = thumbnail(slide.store)
    footprint_um = float(np.median(slide.profiles.footprint_um)) if len(rows) else 0.0
    result.uns["spatial"] = {
        info.slide_id: {
            "images": {"hires": image},
            "scalefactors": {
                "tissue_hires_scalef": px_per_um * info.mpp, "spot_diameter_fullres": footprint_um / info.mpp,
            },
            "metadata": {"mpp": info.mpp, "spot_diameter_um": footprint_um},
        }
    }  # fmt: skip


def thumbnail(store: SlideStore, longest_px: int = HIRES_PX) -> tuple[npt.NDArray[np.uint8], float]:
    """(RGB image of the slide from its stored tiles, white where there is none; its px per um)."""
    info = store.info
    width_um, height_um = info.width_px0 * info.mpp, info.height_px0 * info.mpp
    scale = min(longest_px / max(width_um, height_um), 1 / info.tile_mpp)
    image = np.full((max(1, round(height_um * scale)), max(1, round(width_um * scale)), 3), 255, np.uint8)
    side = info.tile_um * scale
    for i, (row, col) in enumerate(store.place.tolist()):
        top, left = round(row * side), round(col * side)
        bottom, right = round((row + 1) * side), round((col + 1) * side)
        size = max(1, right - left), max(1, bottom - top)
        source = f"{store.path}: tile ({row}, {col})"
        tile = decode_tile(store.jpeg(i), info.tile_px, source, least_px=(2 * size[0], 2 * size[1]))
        part = image[top:bottom, left:right]
        part[...] = cv2.resize(tile, size, interpolation=cv2.INTER_AREA)[: part.shape[0], : part.shape[1]]
    return image, scale


def provenance(pretrained: Pretrained, slide: Slide, use_counts: bool) -> dict[str, Any]:
    """What made a result: hashes and versions, and what the model was shown."""
    seen = "H&E and counts" if use_counts else "H&E only"
    return {
        "input": seen, "symmetries": pretrained.symmetries,
        "model_hash": pretrained.hash, "model_code": pretrained.code_version,
        "training_data_hash": pretrained.data["shards_hash"], "split_by": pretrained.data["split_by"],
        "store_sha256": files.sha256_file(slide.store.path), "code": checkpoints.code_version(),
        "platform_told": inference.platform_told(pretrained, slide),
    }  # fmt: skip


def write(result: anndata.AnnData, path: Path) -> None:
    """Write an h5ad, complete or not at all."""
    with files.replacing(path) as temporary:
        result.write_h5ad(temporary, compression="gzip")
