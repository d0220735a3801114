"""The console command `storm`: embed, predict, export, evaluate, verify, doctor.

In: words. Out: files, and an exit code: 0 well, 1 some items failed (each is listed), 2 wrong usage or input. Libraries
are imported by the command that needs them.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storm import __version__
from storm.commands import guarded

if TYPE_CHECKING:
    import anndata

    from storm.export import Pretrained

INSTALL = "python -m pip install 'storm-tissue[{extra}]'"
EXTRAS = {  # extra -> modules that it brings
    "core": ("torch", "numpy", "safetensors", "pydantic", "yaml"),
    "prep": ("openslide", "tifffile", "imagecodecs", "zarr", "anndata", "h5py", "pyarrow", "simplejpeg", "cv2"),
    "train": ("deepspeed", "tensorboard", "webdataset", "simplejpeg"),
    "use": ("anndata", "matplotlib", "sklearn", "scipy", "zarr", "openslide"),
    "timm": ("timm",),
    "s3": ("s3fs",),
    "spatialdata": ("spatialdata",),
}


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    args = _parser().parse_args(words)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # for those who do not read Python
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        return int(args.run(args))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("storm", "data_prep"):
            raise
        raise ValueError(f"{error.name} is not installed; {INSTALL.format(extra='use')}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="storm", description="Use an exported STORM model.")
    parser.add_argument("--version", action="version", version=f"storm-tissue {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("embed", embed, "embeddings of a slide's profiles, or of a lattice over its tissue"),
        ("predict", predict, "expected expression from H&E"),
    ):
        command = commands.add_parser(name, help=text)
        _add_source(command)
        command.set_defaults(run=run)
        if name == "embed":
            command.add_argument("--adata", type=Path, help="your own h5ad of this slide, joined by obs_names")
            command.add_argument("--image-only", action="store_true", help="do not show the model the counts")
        else:
            command.add_argument("--genes", help="a file with one symbol or Ensembl id per line, or a list A,B,C")
            command.add_argument("--unit", default="lognorm", help="lognorm, raw, composition or mu")
            command.add_argument("--descriptors", type=Path, help="npz by which genes that the model lacks are known")
    command = commands.add_parser("export", help="checkpoint -> the folder that others load")
    command.add_argument("--run", dest="run_dir", type=Path, required=True, help="run folder")
    command.add_argument("--checkpoint", type=Path, help="instead of the newest complete one")
    command.add_argument("--out", type=Path, required=True, help="folder to write; an export there is replaced")
    command.add_argument("--license", type=Path, help="text file with the licence of the weights")
    command.set_defaults(run=export)
    command = commands.add_parser("evaluate", help="a model on the test slides of a shard set, beside its baselines")
    for name, needed, text in (
        ("--model", True, "export"), ("--store", True, "folder of the slide stores"), ("--out", True, "report folder"),
        ("--shards", True, "shard set: it says which slides were for training"), ("--run", False, "run folder"),
        ("--truth", False, "truth folder of a synthetic corpus"),
        ("--labels", False, "folder of <slide>.csv (profile_id, label): annotated domains"),
        ("--descriptors", False, "npz by which genes that the model lacks are known"),
        ("--within", False, "transfer: a second export, trained on the target platform by other donors"),
    ):  # fmt: skip
        command.add_argument(
            name, dest=name[2:] + ("_dir" if name == "--run" else ""), type=Path, required=needed, help=text
        )
    command.add_argument(
        "--within-shards", type=Path, nargs="+", default=[], help="shard sets of --within (default: --shards)"
    )
    command.add_argument(
        "--protocols", default="expression",
        help="a list of expression, imputation, domains, retrieval, transfer, probes, unseen, uncertainty, footprints "
        "(default: expression)",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="of baselines and bootstrap")
    _add_symmetries(command)
    command.set_defaults(run=evaluate)
    command = commands.add_parser("verify", help="check an export or a shard set against its hashes")
    command.add_argument("folder", type=Path, help="an export or a shard set")
    command.set_defaults(run=verify)
    command = commands.add_parser("doctor", help="versions, devices, extras, this machine, and cures")
    command.add_argument("--run-dir", type=Path, help="folder of runs: its file system is looked at too")
    command.add_argument("--shards", type=Path, help="shard set: likewise")
    command.set_defaults(run=doctor)
    return parser


def _add_symmetries(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--symmetries", type=int, default=1, choices=range(1, 9), metavar="N",
        help="1 to 8: answers are means over so many flips and quarter turns of the slide, and take so much longer",
    )  # fmt: skip


def _add_source(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=Path, required=True, help="export")
    command.add_argument("--store", type=Path, help="a slide store, or a folder of them")
    command.add_argument("--slide", nargs="+", help="of the folder: these slides alone")
    command.add_argument("--split", choices=("train", "val", "test"), help="of the folder: the slides of this split")
    command.add_argument("--image", type=Path, help="a slide that is in no store")
    command.add_argument("--visium", type=Path, help="the outs folder that was measured on --image")
    command.add_argument("--measurement", type=Path, help="what another platform measured on --image")
    command.add_argument("--platform", help="of --measurement: st, visium, visium_hd, xenium or cosmx")
    for name in ("format", "unit", "spots", "alignment"):
        option = "profile-unit" if name == "unit" else name  # predict has a --unit of its own
        command.add_argument(f"--{option}", help=f"of --measurement: as the manifest's column {name}")
    command.add_argument("--mpp", type=float, help="um per pixel of --image, where neither it nor the spots tell")
    command.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    _add_symmetries(command)
    command.add_argument("-o", "--out", type=Path, required=True, help="an .h5ad file for one slide, else a folder")


@dataclass(frozen=True)
class _Source:
    """A slide store, and the object of the user that goes with it."""

    path: Path
    own: "anndata.AnnData | None" = None


@contextlib.contextmanager
def _sources(args: argparse.Namespace, pretrained: "Pretrained") -> Iterator[list[_Source]]:
    """The stores that the arguments name; a slide without one is given a temporary one."""
    if (args.store is None) == (args.image is None):
        raise ValueError("name the input: --store, or --image (with --visium, where it was measured)")
    if args.image is None:
        if args.visium or args.mpp or args.measurement:
            raise ValueError("--visium, --measurement and --mpp go with --image")
        yield [_Source(path) for path in _stores(args)]
        return
    if args.slide or args.split:
        raise ValueError("--slide and --split go with --store")
    with tempfile.TemporaryDirectory(prefix="storm_") as folder:
        yield [_built(args, pretrained, Path(folder))]


def _stores(args: argparse.Namespace) -> list[Path]:
    from storm import store

    found = [args.store] if args.store.is_file() else store.paths(args.store)
    if args.store.is_dir() and not args.slide:
        _tell_missing(args.store)
    if args.slide:
        by_id = {path.name.removesuffix(store.SUFFIX): path for path in found}
        unknown = [name for name in args.slide if name not in by_id]
        if unknown:
            raise ValueError(f"{args.store}: holds no slide {unknown[0]!r}; it holds {', '.join(sorted(by_id)[:10])}")
        found = [by_id[name] for name in args.slide]
    if args.split:
        found = [path for path in found if store.SlideStore(path).info.split == args.split]
    if not found:
        raise ValueError(f"{args.store}: no slide is marked as split {args.split}; name slides with --slide")
    return found


def _tell_missing(folder: Path) -> None:
    """Say which slides a folder should hold by its records and manifests, and has no store of."""
    from data_prep.packing import sources
    from storm import store

    try:
        missing = sources.missing(folder, ())
    except ValueError as error:  # a damaged list says nothing of the stores that are there
        print(f"note: {error}", file=sys.stderr)
        return
    if gone := {name: why for name, why in missing.items() if not store.store_path(folder, name).is_file()}:
        print(f"{folder}: {sources.told(gone)}", file=sys.stderr)


def _built(args: argparse.Namespace, pretrained: "Pretrained", folder: Path) -> _Source:
    """A store made for this call from an image and, where given, what was measured on it."""
    from data_prep.one_slide import build_slide
    from storm import results
    from storm.prep_config import PrepConfig
    from storm.store import SlideStore

    path = build_slide(
        _row(args, pretrained),
        folder,
        PrepConfig(tile_px=pretrained.config.tile_px, tile_mpp=pretrained.config.tile_mpp),
    )
    info = SlideStore(path).info
    told = [f"{args.image}: {info.mpp:.4f} um per pixel ({info.mpp_source})", *info.facts["notes"]]
    print(*(line.replace("(manifest)", "(--mpp)") for line in told), sep="\n    ")  # the row is no user's manifest here
    if not args.visium:
        return _Source(path)
    own, left_out = results.in_store(results.visium_object(args.visium), path)
    if left_out:
        print(f"{args.visium}: left out {left_out} of {left_out + own.n_obs} barcodes: not in tissue, or off the image")
    return _Source(path, own)


def _row(args: argparse.Namespace, pretrained: "Pretrained") -> Any:
    """What a manifest would say of the slide that the arguments name."""
    from data_prep.manifest import IMAGE_ONLY, MPP_RANGE, ManifestRow
    from data_prep.platforms import VENDORS

    if args.mpp is not None and not MPP_RANGE[0] <= args.mpp <= MPP_RANGE[1]:
        raise ValueError(f"--mpp {args.mpp}: give um per pixel of {args.image}, {MPP_RANGE[0]} to {MPP_RANGE[1]}")
    if args.visium and args.measurement:
        raise ValueError("--visium and --measurement are two measurements; give one")
    if (args.measurement is None) != (args.platform is None) or args.platform not in (None, *VENDORS):
        raise ValueError(f"--measurement and --platform go together; platforms are {', '.join(VENDORS)}")
    species = "mouse" if pretrained.genes.ids[0].startswith("ENSMUS") else "human"
    name = re.sub(r"[^A-Za-z0-9_-]", "_", args.image.stem)[:64] or "slide"
    spots, alignment = (Path(text) if text else None for text in (args.spots, args.alignment))
    return ManifestRow(
        name, args.image, args.visium or args.measurement, "visium" if args.visium else args.platform or IMAGE_ONLY,
        species=species, mpp=args.mpp, spots=spots, alignment=alignment, format=args.format or "",
        unit=args.profile_unit or "",
    )  # fmt: skip


def _each(args: argparse.Namespace, make: "Callable[[Pretrained, _Source], anndata.AnnData]") -> int:
    """Make a result of every source; one that fails is listed, and the rest goes on."""
    from storm import results
    from storm.export import load
    from storm.store import SUFFIX

    pretrained = dataclasses.replace(load(args.model), symmetries=args.symmetries)
    failed = 0
    with _sources(args, pretrained) as sources:
        single = args.out.suffix == ".h5ad"
        if single and len(sources) > 1:
            raise ValueError(f"{args.out}: is one file, but {len(sources)} slides were named; give a folder")
        for source in sources:
            path = args.out if single else args.out / f"{source.path.name.removesuffix(SUFFIX)}.h5ad"
            try:
                result = make(pretrained, source)
            except ValueError as error:
                if len(sources) == 1:
                    raise
                print(f"{source.path.name}: FAILED: {error}", file=sys.stderr)
                failed += 1
                continue
            results.write(result, path)
            print(f"{path}: {result.n_obs} profiles, {result.uns['storm']['input']}")
    if failed:
        print(f"{failed} of {len(sources)} slides failed", file=sys.stderr)
    if pretrained.data["split_by"] == "section":
        print("trained with split_by: section (donors may lie on both sides of its split)")
    return 1 if failed else 0


def embed(args: argparse.Namespace) -> int:
    """`storm embed`."""

    def make(pretrained: "Pretrained", source: _Source) -> "anndata.AnnData":
        import anndata

        from storm import results

        own = anndata.read_h5ad(args.adata) if args.adata else source.own
        return results.embed(pretrained, source.path, False if args.image_only else None, own, args.device)

    return _each(args, make)


def _genes(told: str) -> list[str]:
    """The genes of --genes: those in the file of that name, else the list itself."""
    listed = Path(told)
    if os.path.isfile(told):  # Path.is_file fails where a list is longer than a file's name may be
        try:
            genes = listed.read_text(encoding="utf-8-sig").split()
        except UnicodeDecodeError as error:
            raise ValueError(f"--genes {listed}: is no UTF-8 text ({error.reason}); write a gene per line") from None
    elif len(listed.parts) > 1 or listed.suffix in (".txt", ".csv", ".tsv"):
        raise ValueError(f"--genes {listed}: no such file; give a file with a gene per line, or a list A,B,C")
    else:
        genes = [name for word in told.split(",") if (name := word.strip())]
    if not genes:
        raise ValueError(f"--genes {told!r}: names no gene; give some, or leave it out for the whole reference panel")
    return genes


def predict(args: argparse.Namespace) -> int:
    """`storm predict`."""
    genes = None if args.genes is None else _genes(args.genes)

    from storm import descriptors

    table = descriptors.read(args.descriptors) if args.descriptors else None

    def make(pretrained: "Pretrained", source: _Source) -> "anndata.AnnData":
        from storm import results

        return results.predict(pretrained, source.path, genes, args.unit, device=args.device, table=table)

    return _each(args, make)


def export(args: argparse.Namespace) -> int:
    """`storm export`."""
    from storm import checkpoints
    from storm import export as exporter

    if (args.run_dir / exporter.SUMS).is_file():
        raise ValueError(
            f"{args.run_dir}: is an export already, as {exporter.SUMS} tells; name its run folder, or use it by --model"
        )
    checkpoint = args.checkpoint or checkpoints.latest(args.run_dir)
    text = args.license.read_text(encoding="utf-8") if args.license else None
    exporter.export(checkpoint, args.out, text)
    pretrained = exporter.load(args.out)
    print(f"{args.out}: export of {checkpoint.name}, model hash {pretrained.hash[:16]}")
    if pretrained.data["split_by"] == "section":
        print("SPLIT BY SECTION: donors may lie on both sides of the split; the card says so")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """`storm evaluate`."""
    from storm.evaluate import protocols, report

    known = protocols.Known(args.truth, args.labels, args.descriptors, args.within, tuple(args.within_shards))
    sources = report.Sources(args.model, args.store, args.shards, known, args.run_dir, args.symmetries)
    print(report.write(sources, args.out, args.protocols.split(","), args.seed))
    return 0


def verify(args: argparse.Namespace) -> int:
    """`storm verify`: 0 where all hashes hold, 1 with a line per fault."""
    from storm import export as exporter
    from storm import shards

    if (args.folder / exporter.SUMS).is_file():
        faults = exporter.verify(args.folder)
    elif (args.folder / shards.MANIFEST).is_file():
        faults = shards.verify(args.folder)
    else:
        which = "is neither" if args.folder.is_dir() else "no such folder, so neither"
        raise ValueError(
            f"{args.folder}: {which} an export ({exporter.SUMS}) nor a shard set ({shards.MANIFEST}); slide stores are "
            "read by python -m data_prep.verify"
        )
    print("\n".join(faults) or f"{args.folder}: every hash holds")
    return 1 if faults else 0


def doctor(args: argparse.Namespace) -> int:
    """`storm doctor`: 0 where the core is complete and the machine has no fault."""
    from storm.train import node

    print(f"storm-tissue {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name in ("torch", "numpy", "safetensors", "pydantic", "zarr", "anndata", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            print(f"  {name} {importlib.metadata.version(name)}")
    missing = {extra: [m for m in modules if importlib.util.find_spec(m) is None] for extra, modules in EXTRAS.items()}
    for extra, modules in missing.items():
        cure = f"lacks {', '.join(modules)}; {INSTALL.format(extra=extra)}" if modules else "complete"
        print(f"{extra}: {cure.replace('[core]', '')}")
    if not missing["core"]:
        import torch

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        print(f"devices: {', '.join(devices) or 'CPU only (no CUDA device is visible to torch)'}, "
              f"{torch.get_num_threads()} CPU threads")  # fmt: skip
    folders = {"run_dir": args.run_dir, "shards": args.shards}
    facts = [node.look({name: folder for name, folder in folders.items() if folder})]
    faults = node.faults(facts, node.Needs())
    print(f"\n{node.table(facts)}")
    print("\n".join(f"FAULT {fault}" for fault in faults), end="\n" if faults else "")
    return 1 if missing["core"] or faults else 0


if __name__ == "__main__":
    sys.exit(main())
