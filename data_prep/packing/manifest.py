"""What a shard manifest tells besides its shards, and the plan that carries it to the end.

In: the scanned stores, the config, what older sets hold. Out: a `Plan`; the checks of the set as a whole are made here.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import fingerprints, splits, vocabulary
from data_prep.packing import plan as planning
from data_prep.packing.plan import Plan, Scanned
from data_prep.packing.sources import Held, Source, named
from storm import files, genes, schema
from storm.index import VERSION
from storm.prep_config import PrepConfig
from storm.store import SlideInfo


@dataclass(frozen=True)
class Options:
    """What the user asks of a set besides the config."""

    allow_missing: bool = False
    allow_duplicates: bool = False
    append: tuple[Path, ...] = ()
    workers: int = 1


def prep(config: PrepConfig) -> dict[str, Any]:
    """The resolved config for the manifest, which may be shared: the sha256 of a file stands for its path."""
    values = config.model_dump()
    if config.aliases:
        genes.read_aliases(Path(config.aliases))
        values["aliases"] = files.sha256_file(Path(config.aliases))
    if config.withheld_genes:
        genes.read_ids(Path(config.withheld_genes))
        values["withheld_genes"] = files.sha256_file(Path(config.withheld_genes))
    return values


def digest(manifest: dict[str, Any]) -> str:
    """A hash of a shard manifest but for its entry `sha256`, which holds it."""
    return files.sha256_of(files.dump_json({key: value for key, value in manifest.items() if key != "sha256"}))


def fingerprint(sources: Sequence[Source], held: Held, config: PrepConfig, missing: int) -> str:
    """A hash of all that a shard set is a function of; it tells how many slides were `missing`."""
    facts = {
        "stores": {source.slide_id: source.sha256 for source in sources}, "prep": prep(config),
        "schema_version": schema.SCHEMA_VERSION, "index_version": VERSION, "appended_to": held.manifests,
        "missing": missing,
    }  # fmt: skip
    return files.sha256_of(files.dump_json(facts))


def make(
    name: str, sources: Sequence[Source], held: Held, config: PrepConfig, options: Options, missing: int
) -> tuple[Plan, bytes, list[str]]:
    """The plan, the gene table's bytes, and what the user should know.

    Args:
        name: the plan's fingerprint.
        missing: number of slides that there should be and that have no store.

    Raises:
        ValueError: naming fact and cure, where the stores cannot be one set.
    """
    scanned, tables = planning.scan(sources, config, options.workers)
    if not any(one.profiles and one.source.slide_id not in held.slides for one in scanned):
        raise ValueError("no slide with profiles to pack" + (" that the older sets do not hold" if held.slides else ""))
    split_of = _splits([one.info for one in scanned if one.profiles], held, config)
    twice = [] if options.allow_duplicates else fingerprints.across_splits((one.info for one in scanned), split_of)
    if twice:
        raise ValueError(f"{named(twice)}; or pack them all the same by --allow-duplicates")
    new = [one for one in scanned if one.source.slide_id not in held.slides]
    taken = [one for one in new if one.profiles]
    if not held.slides and "train" not in split_of.values():
        raise ValueError("no slide with profiles is in split train; correct the column split, and build and pack again")
    tables = {one.gene_list: tables[one.gene_list] for one in taken}
    found = vocabulary.over(tables, held.table or _kept(tables, config))
    train = [one for one in taken if split_of[one.source.slide_id] == "train"]
    if not held.slides:
        found = planning.with_shares(found, tables, train, options.workers)
    notes = _notes(scanned, held)
    table = found.table.to_tsv()
    manifest = _describe(taken, split_of, found, config, held) | {"genes_sha256": files.sha256_of(table)}
    manifest["left_out"] = {"missing": missing, "without_profiles": len(new) - len(taken)}
    manifest["reference"] = held.reference or _reference(train, found)
    return Plan(
        name, planning.pools(taken, split_of, config), {one.source.slide_id: list(one.bytes) for one in taken},
        {one.source.slide_id: one.counts for one in taken}, {one.source.slide_id: one.log_density for one in taken},
        manifest,
    ), table, notes  # fmt: skip


def _kept(tables: dict[str, genes.GeneTable], config: PrepConfig) -> genes.GeneTable | None:
    """The genes of a first set where some are withheld; None: all."""
    if not config.withheld_genes:
        return None
    path = Path(config.withheld_genes)
    withheld, union = genes.read_ids(path), genes.union(list(tables.values()))
    kept = genes.without(union, withheld)
    if not 0 < len(kept) < len(union):
        fact = "names every gene" if len(kept) == 0 else "names no gene"
        raise ValueError(f"{path}: {fact} of these stores; give some of their Ensembl ids, or leave withheld_genes out")
    return kept


def _splits(infos: Sequence[SlideInfo], held: Held, config: PrepConfig) -> dict[str, str]:
    """slide id -> split; what an older set holds stays where it is, and so do its donors."""
    by_id = {info.slide_id: info for info in infos}
    old = [
        dataclasses.replace(
            by_id.get(slide_id, infos[0]), slide_id=slide_id, split=entry["split"],
            **{key: entry[key] for key in ("study", "donor", "section")},
        )
        for slide_id, entry in held.slides.items()
    ]  # fmt: skip
    return splits.assign([*old, *(info for info in infos if info.slide_id not in held.slides)], config)


def _notes(scanned: Sequence[Scanned], held: Held) -> list[str]:
    imaged = [one.source.slide_id for one in scanned if not one.profiles]
    changed = [
        one.source.slide_id for one in scanned
        if one.source.slide_id in held.slides and held.slides[one.source.slide_id]["store_sha256"] != one.source.sha256
    ]  # fmt: skip
    notes = []
    if imaged:
        notes.append(f"{len(imaged)} slides have no profiles and are not packed: {named(imaged)}")
    if changed:
        notes.append(
            f"{len(changed)} slides were built anew since they were packed, and stay as the older set holds them: "
            f"{named(changed)}"
        )
    return notes


def _describe(
    taken: Sequence[Scanned], split_of: dict[str, str], found: vocabulary.Vocabulary, config: PrepConfig, held: Held
) -> dict[str, Any]:
    panels = {found.panel_of[one.gene_list] for one in taken}
    return {
        "schema_version": schema.SCHEMA_VERSION, "tile_px": config.tile_px, "tile_mpp": config.tile_mpp,
        "gene_hash": found.table.hash, "split_by": config.split_by, "seed": config.seed, "prep": prep(config),
        "panels": {name: {"mask": genes.pack_panel(mask), "genes": int(mask.sum())}
                   for name, mask in sorted(found.panels.items()) if name in panels},
        "slides": {one.source.slide_id: _slide(one, split_of, found) for one in taken},
        "organs": sorted({one.info.organ for one in taken}), "platforms": sorted({one.info.platform for one in taken}),
        "licenses": _licenses(taken), "appended_to": list(held.manifests),
        "genes_left_out": max(found.left_out.values()),
    }  # fmt: skip


def _slide(one: Scanned, split_of: dict[str, str], found: vocabulary.Vocabulary) -> dict[str, Any]:
    info = one.info
    return {
        "split": split_of[info.slide_id], "panel": found.panel_of[one.gene_list], "platform": info.platform,
        "organ": info.organ, "species": info.species, "study": info.study, "donor": info.donor,
        "section": info.section, "license": info.license, "use_terms": info.use_terms, "profiles": one.profiles,
        "store_sha256": one.source.sha256,
    }  # fmt: skip


def _most(values: Sequence[Any]) -> Any:
    """The most frequent value, the smallest of several."""
    return min(set(values), key=lambda v: (-values.count(v), v))


def _reference(train: Sequence[Scanned], found: vocabulary.Vocabulary) -> dict[str, Any]:
    """What an exported model assumes where a slide tells nothing: from the training slides."""
    # The footprint is the one that half of the profiles do not pass, each slide's being its median.
    by_size = sorted(train, key=lambda one: one.footprint_um)
    reached = np.cumsum([one.profiles for one in by_size])
    middle = by_size[int(np.searchsorted(reached, reached[-1] / 2))]
    panel = np.any([found.panels[found.panel_of[name]] for name in sorted({one.gene_list for one in train})], axis=0)
    return {
        "slide_log_density": float(np.mean([one.log_density for one in train])), "panel": genes.pack_panel(panel),
        "platform": _most([one.info.platform for one in train]), "footprint_um": middle.footprint_um,
        "footprint_kind": _most([one.footprint_kind for one in train]),
    }  # fmt: skip


def _licenses(taken: Sequence[Scanned]) -> dict[str, dict[str, Any]]:
    """Per study: its terms and its counts, for data and model cards."""
    studies: dict[str, dict[str, Any]] = {}
    for study in sorted({one.info.study for one in taken}):
        own = [one for one in taken if one.info.study == study]
        studies[study] = {
            "license": "; ".join(sorted({one.info.license for one in own if one.info.license})),
            "use_terms": "; ".join(sorted({one.info.use_terms for one in own if one.info.use_terms})),
            "slides": len(own),
            "profiles": sum(one.profiles for one in own),
        }
    return studies
