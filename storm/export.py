"""Checkpoint -> export: the folder that other people load, and its loading.

In: a complete checkpoint. Out: a folder of plain files, complete or absent:

    model.safetensors           weights, names of Storm.state_dict()
    config.json                 ModelConfig, reference constants, training data, code version
    preprocessor_config.json    tile_px, tile_mpp, pixel mean and sd
    genes.tsv                   the vocabulary: Ensembl id, symbol, expected share of counts
    README.md LICENSE           the card; the licence, or the notice that one must be chosen
    SHA256SUMS                  of all files above

DeepSpeed's files are never read. `load` needs torch, safetensors and numpy alone.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from storm import card, checkpoints, files
from storm.genes import GeneTable, unpack_panel
from storm.model import encoders
from storm.model.storm import Storm
from storm.presets import ModelConfig, resolve_model
from storm.schema import DISC, PLATFORMS, SQUARE

WEIGHTS, CONFIG, PREPROCESSOR, GENES, SUMS = (
    "model.safetensors", "config.json", "preprocessor_config.json", "genes.tsv", "SHA256SUMS",
)  # fmt: skip
EXPORT_VERSION = 2  # 1: expression was not centred, the same weights answer otherwise
_READ = ["model.safetensors", "model.json", "genes.tsv", "reference.json", "config.yaml"]  # of the checkpoint
_IDENTITY = (CONFIG, PREPROCESSOR, GENES, WEIGHTS)  # what a prediction depends on
_ANCHOR = "morphology.anchor."  # the frozen copy that the term anchor compares with: of training alone
_LARGEST_TILE_PX = 4096  # no weight has this size, but the patches of a tile are held in memory
_LARGEST_SIDE = 1000  # spots of a region; likewise
_LARGEST = 1e9  # a number that a prediction is made with
# What config.json must hold for a prediction; float: a number within _LARGEST, or a whole one.
_FIELDS: dict[str, type] = {
    "model": dict, "n_genes": int, "code_version": str, "reference.slide_log_density": float,
    "reference.platform": str, "reference.panel": str, "reference.footprint_um": float, "reference.footprint_kind": int,
    "data.shards_hash": str, "data.gene_hash": str, "data.split_by": str, "data.spots_side": int,
    "data.platforms": dict,
}  # fmt: skip
_REFERENCE = ("slide_log_density", "platform", "panel", "footprint_um", "footprint_kind")
# A whitelist: whatever else a run remembers of its data (slides, donors) stays in the run.
_DATA = (
    "shards_hash", "gene_hash", "split_by", "seed", "spots_side", "licenses", "studies", "organs", "platforms",
)  # fmt: skip


@dataclass(frozen=True)
class Pretrained:
    """An exported model, loaded: weights in eval mode on the CPU, and what they were made from."""

    model: Storm
    config: ModelConfig
    genes: GeneTable
    reference: dict[str, Any]  # slide_log_density, platform, panel (hex), footprint_um, footprint_kind
    data: dict[str, Any]  # shards_hash, gene_hash, split_by, seed, licences, counts per study, organ, platform
    code_version: str
    hash: str  # of weights, genes and configs: two exports with one hash predict alike
    symmetries: int = 1  # of the 8 flips and quarter turns: an answer is the mean over so many of them
    name: str = ""  # of the folder

    def __repr__(self) -> str:
        tile = f"tiles of {self.config.tile_px} px at {self.config.tile_mpp:g} um/px"
        return f"<STORM {self.name}: {len(self.genes)} genes, {tile}, hash {self.hash[:16]}, code {self.code_version}>"

    @property
    def panel(self) -> npt.NDArray[np.bool_]:
        """[G] the reference panel: the genes over which a predicted composition sums to 1."""
        return unpack_panel(self.reference["panel"], len(self.genes))


def export(checkpoint: Path, out: Path, license_text: str | None = None) -> Path:
    """Write the export of a complete checkpoint, replacing a folder `out` that is itself an export.

    Raises:
        ValueError: the checkpoint is incomplete or damaged, or `out` is something else than an export.
    """
    if out.exists() and not (out / SUMS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is no export ({SUMS} is absent); choose another folder")
    marker = checkpoints.verify(checkpoint, _READ)
    config = _config(checkpoint, marker)
    genes = GeneTable.read(checkpoint / GENES)
    if genes.hash != config["data"]["gene_hash"] or len(genes) != config["n_genes"]:
        raise ValueError(f"{checkpoint / GENES}: not the genes of this checkpoint; use another one")
    weights = {name: w for name, w in load_file(checkpoint / WEIGHTS).items() if not name.startswith(_ANCHOR)}
    _build(config, len(genes), weights, checkpoint / WEIGHTS)
    panel_genes = int(unpack_panel(config["reference"]["panel"], len(genes)).sum())
    parameters = sum(tensor.numel() for tensor in weights.values())
    with files.replacing_folder(out) as folder:
        save_file(weights, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)  # safetensors makes it private
        (folder / GENES).write_bytes((checkpoint / GENES).read_bytes())
        (folder / CONFIG).write_bytes(files.dump_json(config))
        (folder / PREPROCESSOR).write_bytes(files.dump_json(_preprocessor(config["model"])))
        (folder / "README.md").write_text(card.model_card(out.name, config, parameters, panel_genes), encoding="utf-8")
        (folder / "LICENSE").write_text(
            license_text or card.license_notice(config["data"]["licenses"]), encoding="utf-8"
        )
        (folder / SUMS).write_text(_sums(folder), encoding="utf-8")
    return out


def _config(checkpoint: Path, marker: dict[str, Any]) -> dict[str, Any]:
    """The export's config.json: model, reference, data and versions of a checkpoint."""
    model = files.read_json(checkpoint / "model.json")
    reference: dict[str, Any] = files.read_json(checkpoint / "reference.json")
    return {
        "export_version": EXPORT_VERSION, "model": model["model"], "n_genes": model["n_genes"],
        "step": marker["step"], "code_version": marker["code_version"],
        "reference": {key: reference[key] for key in _REFERENCE},
        "data": {key: reference[key] for key in _DATA},
    }  # fmt: skip


def _preprocessor(model: dict[str, Any]) -> dict[str, Any]:
    mean, sd = encoders.pixel_statistics(resolve_model(model))
    return {
        "tile_px": model["tile_px"], "tile_mpp": model["tile_mpp"], "channels": "RGB", "dtype": "uint8",
        "pixel_mean": list(mean), "pixel_sd": list(sd),
    }  # fmt: skip


def _sums(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{files.sha256_file(folder / name)}  {name}\n" for name in names)


def _build(config: dict[str, Any], n_genes: int, weights: dict[str, torch.Tensor], source: Path) -> Storm:
    """The model with these weights, in eval mode. Raises ValueError where names or shapes do not fit."""
    cure = "export it again with the code that trained it"
    try:
        sizes = resolve_model(config["model"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source.parent}: its model config is not valid ({error}); {cure}") from None
    try:
        least, held = _least(sizes, n_genes), sum(tensor.numel() for tensor in weights.values())
    except ValueError as error:  # of its encoder: timm is missing, or knows no such model
        raise ValueError(f"{source.parent}: {error}") from None
    if least > held or sizes.tile_px > _LARGEST_TILE_PX:
        fact = f"model config: tiles of {sizes.tile_px} px and more than {least} weights; it holds {held}"
        raise ValueError(f"{source}: weights of another model ({fact}); {cure}")
    model = Storm(sizes, n_genes)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        fact = str(error).splitlines()[1].strip()
        raise ValueError(f"{source}: weights of another model ({fact}); {cure}") from None
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{source}: {name} holds what is no number; export another checkpoint")
    return model.eval().requires_grad_(False)


def _token_weights(sizes: ModelConfig) -> int:
    return sizes.expression_depth * sizes.expression_width**2 if sizes.expression == "tokens" else 0


def _least(sizes: ModelConfig, n_genes: int) -> int:
    """A number of weights that such a model surely exceeds: what is loaded bounds what is built."""
    own = sizes.encoder == "vit"
    return max(
        sizes.image_depth * sizes.image_width**2 if own else encoders.parameters(sizes),
        sizes.fusion_depth * sizes.fusion_width**2, sizes.space_depth * sizes.space_width**2, _token_weights(sizes),
        sizes.space_width * sizes.fusion_width, sizes.align_width * sizes.fusion_width,
        3 * sizes.patch_px**2 * sizes.image_width if own else 0,
        n_genes * (sizes.gene_width + sizes.descriptor_width), sizes.registers * sizes.space_width,
    )  # fmt: skip


def _check(config: dict[str, Any], genes: GeneTable, path: Path) -> None:
    """Raise ValueError where config.json at `path` lacks what a prediction needs, or says what cannot be."""
    for key, kind in _FIELDS.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        number = type(value) in (int, float) and -_LARGEST <= value <= _LARGEST  # a bool is none, and no NaN
        if not (number if kind is float else type(value) is kind):
            raise ValueError(f"{path}: {key} is {value!r}, not of type {kind.__name__}; export the checkpoint again")
    reference, data = config["reference"], config["data"]
    faults = {
        f"n_genes is {config['n_genes']}, {GENES} holds {len(genes)}": config["n_genes"] != len(genes),
        f"data.gene_hash is not that of {GENES}": data["gene_hash"] != genes.hash,
        f"reference.platform {reference['platform']!r} is unknown": reference["platform"] not in PLATFORMS,
        f"reference.footprint_um is {reference['footprint_um']}": reference["footprint_um"] <= 0,
        "reference.footprint_kind is neither disc nor square": reference["footprint_kind"] not in (DISC, SQUARE),
        f"data.spots_side is {data['spots_side']}": not 1 <= data["spots_side"] <= _LARGEST_SIDE,
        "data.platforms does not count slides per platform": not _counts_slides(data["platforms"]),
        f"data.split_by is {data['split_by']!r}": data["split_by"] not in ("donor", "section"),
        "reference.panel is no mask over the genes": not _is_panel(reference["panel"], len(genes)),
        f"{GENES} has no column share": genes.share is None,
    }
    for fact, wrong in faults.items():
        if wrong:
            raise ValueError(f"{path}: {fact}; export the checkpoint again")


def _counts_slides(platforms: dict[str, Any]) -> bool:
    return all(isinstance(of, dict) and type(of.get("slides")) is int for of in platforms.values())


def _is_panel(text: str, n_genes: int) -> bool:
    """A mask that holds some gene: over an empty one nothing sums to 1."""
    well_formed = re.fullmatch(r"([0-9a-f]{2})+", text) is not None and len(text) == 2 * -(-n_genes // 8)
    return well_formed and bool(unpack_panel(text, n_genes).any())


def _instead(folder: Path) -> str:
    """What a folder is that is no export, and what to do."""
    if not folder.is_dir():
        return "there is no such folder; name the one that launch/export.py wrote"
    in_run = (folder / checkpoints.MARKER).is_file()  # a checkpoint
    if in_run or (folder / checkpoints.FOLDER).is_dir():
        run = folder.resolve().parent.parent if in_run else folder
        return f"this belongs to a run, make an export of it: python launch/export.py --run {run} --out EXPORT"
    return "this is no complete export; name the folder that launch/export.py wrote, or export again"


def verify(folder: Path) -> list[str]:
    """Check an export against its SHA256SUMS; one line per fault, none where all is well."""
    path = folder / SUMS
    if not path.is_file():
        return [f"{path}: is missing; {_instead(folder)}"]
    try:
        lines = [line.partition("  ") for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        return [f"{path}: is no UTF-8 text; fetch it again or export again"]
    listed = {name: digest for digest, _, name in lines}
    faults = [f"{path}: does not list {name}; export again" for name in _IDENTITY if name not in listed]
    for name, digest in sorted(listed.items()):
        file = files.inside(folder, name)
        if not file.is_file():
            faults.append(f"{file}: is missing; fetch it or export again")
        elif files.sha256_file(file) != digest:
            faults.append(f"{file}: its sha256 is not that of {SUMS}; fetch it again or export again")
    return faults


def load(folder: str | Path) -> Pretrained:
    """Load an export; every file is checked against SHA256SUMS first.

    Raises:
        ValueError: a file is missing or changed (it is named), or the export is of another version.
    """
    folder = Path(folder)
    if faults := verify(folder):
        raise ValueError("\n".join(faults))
    config: dict[str, Any] = files.read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG}: holds no object; export the checkpoint again")
    if config.get("export_version") != EXPORT_VERSION:
        raise ValueError(
            f"{folder / CONFIG}: export version {config.get('export_version')}, this code reads {EXPORT_VERSION}; "
            "use the code that wrote it, or train and export again"
        )
    genes = GeneTable.read(folder / GENES)
    _check(config, genes, folder / CONFIG)
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not readable as safetensors ({error}); export again") from None
    model = _build(config, len(genes), weights, folder / WEIGHTS)
    identity = "".join(f"{name} {files.sha256_file(folder / name)}\n" for name in _IDENTITY)
    return Pretrained(
        model, model.config, genes, config["reference"], config["data"], config["code_version"],
        files.sha256_of(identity.encode()), name=folder.resolve().name,
    )  # fmt: skip
