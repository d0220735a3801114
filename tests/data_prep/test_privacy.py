"""No trace of people and machines: a marker in every field that may name them reaches no output.

It is planted in each unlisted tag, property and table of the slides and measurements that are read, in paths, and in
what the machine tells of its user. Donors and slides may be named in stores and shards, and in no card.
"""

import json
import os
import socket
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import openslide
import pandas as pd
import pytest
import tifffile
import zarr
from PIL import Image, PngImagePlugin
from zarr.storage import ZipStore

from data_prep import pack
from data_prep.synthetic.cells import draw_cells
from data_prep.synthetic.cosmx import CONTROLS, write_cosmx
from data_prep.synthetic.xenium import write_xenium
from storm import genes, store
from tests.data_prep.platforms.xenium_files import drawn_section
from tests.data_prep.vendors import MPP, tissue, write_manifest, write_st, write_tiff, write_visium

Built = Callable[..., tuple[int, Path]]
MARK = "mArKeR"
DONOR, SLIDE = "dOnOr", "sLiDe"
# ASCII tags: document, maker, model, page, software, time, artist, host, target printer, copyright
TAGS = (269, 271, 272, 285, 305, 306, 315, 316, 337, 33432)
PICTURE = tissue(500, 520)


def tags() -> list[tuple[int, str, int, str, bool]]:
    return [(code, "s", 0, f"{MARK} /ho" + f"me/{MARK}/x", True) for code in TAGS if code not in (305, 306)]


def aperio(path: Path) -> Path:
    """Marked in its description and its tags, with a marked label and macro behind it."""
    description = f"Aperio Image Library v1 {MARK}\r\n2000x1900|User = {MARK}|MPP = {MPP}|AppMag = 20|Host = {MARK}"
    description += f"|Filename = {MARK}|Title = {MARK}|ImageID = {MARK}|ScanScope ID = {MARK}|Date = {MARK}"
    write_tiff(path, tissue(950, 1000), levels=1, description=description, software=MARK, extratags=tags())
    for name in ("label", "macro"):
        tifffile.imwrite(
            path, PICTURE[:64, :64], append=True, description=f"Aperio\r\n{name} 64x64 {MARK}", metadata=None
        )
    slide = openslide.OpenSlide(path)
    planted = [value for value in slide.properties.values() if MARK in value]
    assert (slide.properties["openslide.vendor"], len(planted) > 8) == ("aperio", True)
    return path


def plain_tiff(path: Path) -> Path:
    return write_tiff(path, PICTURE, description=f"{MARK} by {MARK}", software=MARK, extratags=tags())


def ome(path: Path) -> Path:
    """An OME-TIFF that names experimenter, group, microscope, project and file."""
    sizes = {"PhysicalSizeX": MPP, "PhysicalSizeXUnit": "\u00b5m", "PhysicalSizeY": MPP, "PhysicalSizeYUnit": "\u00b5m"}
    metadata = {"axes": "YXS", "Name": MARK, "Description": MARK} | sizes
    tifffile.imwrite(path, PICTURE, ome=True, tile=(64, 64), photometric="rgb", metadata=metadata)
    who = f'<Experimenter ID="Experimenter:0" FirstName="{MARK}" LastName="{MARK}" UserName="{MARK}" Email="{MARK}"/>'
    what = f'<Project ID="Project:0" Name="{MARK}"/><Instrument ID="I:0"><Microscope Model="{MARK}"/></Instrument>'
    xml = str(tifffile.tiffcomment(path)).replace("<Image ", f"{what}{who}<Image ", 1)
    tifffile.tiffcomment(path, xml.encode())
    assert str(tifffile.tiffcomment(path)).count(MARK) > 7
    return path


def jpeg(path: Path) -> Path:
    exif = Image.Exif()
    exif.update(dict.fromkeys((0x010E, 0x010F, 0x0110, 0x0131, 0x013B, 0x013C, 0x8298), MARK))
    Image.fromarray(PICTURE).save(path, quality=95, exif=exif, comment=MARK)
    assert path.read_bytes().count(MARK.encode()) > 7
    return path


def png(path: Path) -> Path:
    notes = PngImagePlugin.PngInfo()
    for key in ("Author", "Source", "Software", MARK):
        notes.add_text(key, MARK)
    Image.fromarray(PICTURE).save(path, pnginfo=notes)
    return path


def visium(folder: Path) -> dict[str, str]:
    outs = write_visium(folder / "outs")
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "a") as root:
        root.attrs.update({"library_ids": [MARK], "original_gem_groups": [1], "user": MARK, "path": MARK})
    (outs / "web_summary.html").write_text(MARK)
    (outs / "metrics_summary.csv").write_text(f"Sample ID\n{MARK}\n")
    return {"measurement": str(outs), "platform": "visium"}


def st(folder: Path) -> dict[str, str]:
    counts, spots = write_st(folder)
    return {"measurement": str(counts), "spots": str(spots), "platform": "st"}


def xenium(folder: Path) -> dict[str, str]:
    """All words of experiment.xenium are marked but the two that are kept."""
    write_xenium(folder, drawn_section())
    path = folder / "experiment.xenium"
    kept = ("analysis_sw_version", "panel_name")
    told = {k: MARK if isinstance(v, str) and k not in kept else v for k, v in json.loads(path.read_text()).items()}
    told |= dict.fromkeys(("run_name", "region_name", "preservation_method", "cassette_name", "instrument_sn"), MARK)
    path.write_text(json.dumps(told | {"images": {"morphology_filepath": MARK}, MARK: MARK}))
    return {"measurement": str(folder), "platform": "xenium"}


def cosmx(folder: Path) -> dict[str, str]:
    known = genes.shipped("human")
    section = draw_cells(2116, list(known.ids[:30]), list(known.symbols[:30]), CONTROLS["1.3.2"], 0, genes_per_cell=4,
                         vertices=6)  # fmt: skip
    write_cosmx(folder, section, "1.3.2", ".csv")
    path = next(folder.glob("*metadata_file.csv"))
    pd.read_csv(path).assign(Run_Tissue_name=MARK, slide_ID_user=MARK).to_csv(path, index=False)
    return {"measurement": str(folder), "platform": "cosmx"}


def annotated(path: Path) -> dict[str, str]:
    rng = np.random.default_rng(0)
    data = anndata.AnnData(
        rng.poisson(3.0, (80, 4)).astype(np.float32),
        pd.DataFrame({"operator": MARK, "in_tissue": 1}, index=[f"AC{i}-1" for i in range(80)]),
        pd.DataFrame({"gene_ids": list(genes.shipped("human").ids[:4]), "curator": MARK},
                     index=list(genes.shipped("human").symbols[:4])),
        obsm={"spatial": rng.uniform(10, 400, (80, 2))},
        uns={"user": MARK, MARK: MARK, "spatial": {MARK: {"metadata": {"source_image_path": MARK}}}},
    )  # fmt: skip
    data.write_h5ad(path)
    return {"measurement": str(path), "platform": "visium", "format": "h5ad", "unit": "disc55um"}


def arrays_of(path: Path) -> bytes:
    """The bytes of all arrays of a zarr in a zip."""
    found = zarr.open_group(ZipStore(path, mode="r"), mode="r").members(max_depth=None)
    return b"".join(np.asarray(item[...]).tobytes() for _, item in found if isinstance(item, zarr.Array))


def everything_in(path: Path) -> bytes:
    """All bytes of a file; of an archive those of its members and names, of a store those of its arrays too."""
    data = path.read_bytes()
    if path.name.endswith(store.SUFFIX):
        data += arrays_of(path) + repr(store.SlideStore(path).info).encode()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            data += b"".join(archive.read(name) + name.encode() for name in archive.namelist())
    if path.suffix == ".tar":
        with tarfile.open(path) as archive:
            data += b"".join(repr(member.get_info()).encode() for member in archive)
    return data


@pytest.fixture
def marked_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine and its user are named by the marker (tmp_path was named before); nobody opens a label or macro."""
    unseen = property(lambda self: pytest.fail("label or macro was read"))
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", unseen)
    monkeypatch.setattr(socket, "gethostname", lambda: MARK)
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(nodename=MARK))
    for variable in ("USER", "LOGNAME", "HOSTNAME", "SLURM_JOB_USER", "SLURM_JOB_NAME"):
        monkeypatch.setenv(variable, MARK)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A slide for each image reader and each platform, with absolute paths that name the user."""
    images = [plain_tiff(folder / "a.tif"), ome(folder / "a.ome.tif"), jpeg(folder / "a.jpg"), png(folder / "a.png")]
    outlines = folder / f"{MARK}.geojson"
    ring = [[0, 0], [400, 0], [400, 400], [0, 400], [0, 0]]
    area = {"type": "Feature", "id": MARK, "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"name": MARK, "metadata": {"author": MARK}, "classification": {"name": MARK}}}  # fmt: skip
    outlines.write_text(json.dumps(area))
    measured = [visium(folder / "visium"), st(folder / "st"), xenium(folder / "xenium"), cosmx(folder / "cosmx"),
                annotated(folder / "a.h5ad")]  # fmt: skip
    measured[0] |= {"image": str(aperio(folder / f"{MARK}.svs"))}
    measured[1] |= {"image": str(write_tiff(folder / "st.tif", tissue(950, 1000, 1)))}
    measured[4] |= {"mpp": str(MPP)}
    rows = [{"image": str(image), "platform": "image", "mpp": str(MPP)} for image in images]
    rows[0] |= {"tissue": str(outlines)}
    rows += [*measured, {"image": str(folder / "absent.svs"), "platform": "image"}]
    (folder / "words.tif").write_text(MARK)  # a record names a file that failed, and no folder
    rows += [{"image": str(folder / "words.tif"), "platform": "image", "mpp": "1"}]
    return [{"slide_id": f"{SLIDE}{i}", "donor": f"{DONOR}{i}", "image": ""} | row for i, row in enumerate(rows)]


@pytest.mark.usefixtures("marked_machine")
def test_no_trace_of_people_and_machines(built: Built, tmp_path: Path) -> None:
    folder = tmp_path / f"{MARK}_folder"
    folder.mkdir()
    rows = rows_of(folder)
    code, stores = built(manifest=write_manifest(tmp_path / "m.csv", rows))
    made = {path.name.removesuffix(store.SUFFIX) for path in store.paths(stores)}
    assert (code, made) == (1, {row["slide_id"] for row in rows[:-2]})
    readers = {store.SlideStore(path).info.facts["slide"].get("reader") for path in store.paths(stores)}
    assert readers >= {"tiff", "ome-tiff", "plain", None}
    out = tmp_path / "shards"
    words = ["--store", str(stores), "--out", str(out), "--allow-missing", "tile_px=112", "tile_mpp=1.0"]
    assert pack.main(words) == 0
    outputs = [path for top in (stores, out) for path in top.rglob("*") if path.is_file()]
    assert {path.suffix for path in outputs} >= {".zip", ".json", ".tar", ".npy", ".md", ".tsv"}
    for path in outputs:
        data = everything_in(path)
        for secret in (MARK, str(tmp_path), tmp_path.name, "/ho" + "me/", "ImageDescription", "Experimenter"):
            assert secret.encode() not in data, f"{secret} in {path.name}"
            assert secret not in str(path.relative_to(tmp_path))
    cards = [path for path in outputs if path.suffix == ".md"]
    assert cards
    for card in cards:
        assert not any(name in card.read_text() for name in (DONOR, SLIDE)), card.name


@pytest.mark.parametrize("word", [MARK, MARK[::-1]])
def test_the_search_finds_a_trace_in_a_store(word: str, tmp_path: Path) -> None:
    """Also in an array, which is compressed."""
    zarr.create_group(tmp_path / "group").create_array("tissue", data=np.frombuffer(word.encode() * 400, np.uint8))
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for part in (tmp_path / "group").rglob("*"):
            archive.write(part, part.relative_to(tmp_path / "group"))
    assert (MARK.encode() in arrays_of(path)) == (word == MARK)
