"""Protocol 2, H&E -> expression on held-out sections: a model beside its baselines, four targets, intervals.

In: an export, slide stores, and the shard manifest that says who trained. Out: a table (plain values, for JSON).

Pearson within a section per gene, mean over genes, mean over sections; a constant prediction counts as 0. Intervals:
bootstrap of spatial blocks. What the model is shown: pixels, platform and organ of a section, never a count. Its
predictions per target:

    lognorm    E[log1p(count / depth * 1e4)] under its negative binomial, at its own predicted depth
    raw        E[log1p(count)], likewise
    residual   log1p(1e4 * composition): no depth, measured or predicted, enters
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storm import checkpoints, files, inference
from storm.evaluate import statistics, targets
from storm.evaluate.baselines import METHODS, Inputs, ridge_predict
from storm.evaluate.sections import Section, open_section, with_neighbours
from storm.export import Pretrained
from storm.schema import LOGNORM_SCALE
from storm.shards import MANIFEST, ShardSet
from storm.store import SUFFIX, SlideStore

Floats = npt.NDArray[np.float64]
PROTOCOL = "2, H&E to expression on held-out sections"
MODEL = "STORM (this project), H&E only"
PROBE = "ridge on STORM's embedding (H&E only)"


@dataclass(frozen=True)
class Cohort:
    """The training and test sections of a shard set, over the genes that all of them and the model share."""

    train: list[Section]
    test: list[Section]
    stores: dict[str, SlideStore]
    gene_ids: list[str]
    split_by: str
    shards_hash: str
    val: list[Section] = field(default_factory=list)  # where a protocol asked for them
    val_left_out: int = 0  # those that do not measure the genes

    @property
    def donors(self) -> int:
        """Donors among the test sections."""
        return len({section.donor for section in self.test})


def open_cohort(pretrained: Pretrained, store_dir: Path, shards_dir: Path) -> Cohort:
    """Open the stores that a shard set was packed from, as it split them.

    Raises:
        ValueError: a store is missing or is not the one that was packed, no test section, no common gene.
    """
    manifest = ShardSet(shards_dir).manifest
    names = {
        split: [n for n, e in sorted(manifest["slides"].items()) if e["split"] == split] for split in ("train", "test")
    }
    if not names["test"]:
        raise ValueError(
            f"{shards_dir / MANIFEST}: no slide is in split test; name test donors in the manifest's column split, "
            "and build and pack again (or give pack test_share)"
        )
    stores = {name: _store(store_dir, name, shards_dir, manifest) for name in names["train"] + names["test"]}
    common = {pretrained.genes.ids[i] for i in np.flatnonzero(pretrained.panel)}
    for store in stores.values():
        common &= set(store.genes().ids)
    if not common:
        raise ValueError(f"{store_dir}: its slides and the model have no gene in common; they need one species")
    gene_ids = sorted(common)
    train, test = ([open_section(stores[name], gene_ids) for name in names[split]] for split in ("train", "test"))
    return Cohort(train, test, stores, gene_ids, manifest["split_by"], files.sha256_file(shards_dir / MANIFEST))


def with_val(cohort: Cohort, store_dir: Path, shards_dir: Path) -> Cohort:
    """The cohort with its validation sections, over the genes that it has; those that lack one are left out.

    Raises:
        ValueError: a store is missing or is not the one that was packed.
    """
    manifest = ShardSet(shards_dir).manifest
    names = [name for name, entry in sorted(manifest["slides"].items()) if entry["split"] == "val"]
    stores = {name: _store(store_dir, name, shards_dir, manifest) for name in names}
    fit = [store for store in stores.values() if set(cohort.gene_ids) <= set(store.genes().ids)]
    val = [open_section(store, cohort.gene_ids) for store in fit]
    return dataclasses.replace(
        cohort, stores=cohort.stores | stores, val=val, val_left_out=len(stores) - len(fit)
    )  # fmt: skip


def _store(store_dir: Path, name: str, shards_dir: Path, manifest: Mapping[str, Any]) -> SlideStore:
    path = store_dir / f"{name}{SUFFIX}"
    if path.is_file() and files.sha256_file(path) != manifest["slides"][name]["store_sha256"]:
        raise ValueError(
            f"{path}: not the store that was packed into {shards_dir} (sha256); name stores and shards of one corpus, "
            "or pack again"
        )
    return SlideStore(path)


def inputs(sections: list[Section], image: list[Floats] | None = None) -> Inputs:
    """The sections end to end, as the baselines see them; `image` [N, F] of each: features of an image encoder."""
    number = np.repeat(np.arange(len(sections)), [len(s.rows) for s in sections])
    donors = sorted({section.donor for section in sections})
    fold = np.array([donors.index(section.donor) for section in sections])[number] if len(donors) > 1 else number
    joined = {name: np.concatenate([getattr(s, name) for s in sections]) for name in ("colour", "around", "log_depth")}
    found = Inputs(**joined, section=number, fold=fold)
    if image is None:
        return found
    around = [with_neighbours(x, section.xy_um) for x, section in zip(image, sections, strict=True)]
    return dataclasses.replace(found, image=np.concatenate(image), image_around=np.concatenate(around))


def model_predictions(pretrained: Pretrained, cohort: Cohort, gene_ids: list[str]) -> dict[str, list[Floats]]:
    """Target -> prediction [N, K] of each test section, from pixels alone."""
    genes = np.array([pretrained.genes.index[gene_id] for gene_id in gene_ids], dtype=np.int64)
    found: dict[str, list[Floats]] = {name: [] for name in targets.TARGETS}
    for section in cohort.test:
        slide = inference.prepare(pretrained, cohort.stores[section.slide_id])
        asked = inference.predict(pretrained, slide, genes=genes, rows=section.rows)
        found["lognorm"].append(asked.lognorm().astype(np.float64))
        found["raw"].append(asked.raw().astype(np.float64))
        found["residual"].append(np.log1p(LOGNORM_SCALE * asked.composition.astype(np.float64)))
    return found


@dataclass(frozen=True)
class Score:
    """One method in one column: the mean over genes and sections, its bootstrap replicates [R], and [S, K] each."""

    value: float
    replicates: Floats
    each: Floats

    @property
    def genes(self) -> Floats:
        """[K] means over the sections."""
        return np.asarray(self.each.mean(0))

    def minus(self, other: "Score") -> "Score":
        """The difference, paired over genes, sections and drawn blocks."""
        return Score(self.value - other.value, self.replicates - other.replicates, self.each - other.each)

    def json(self) -> dict[str, float]:
        """Value and 95 % interval."""
        return statistics.interval(self.value, self.replicates).json()


def score(predicted: list[list[Floats]], measured: list[Floats], sections: list[Section], seed: int) -> Score:
    """Score predictions [draws][sections] of [N, K]; several draws (of a control) are averaged."""
    each, replicates = [], []
    for draw in predicted:
        for values, truth, section in zip(draw, measured, sections, strict=True):
            each.append(statistics.pearson(values, truth))
            replicates.append(statistics.bootstrap(values, truth, statistics.blocks(section.xy_um), seed).mean(1))
    per_section = np.reshape(each, (len(predicted), len(sections), -1)).mean(0)
    return Score(float(per_section.mean()), np.mean(replicates, axis=0), per_section)


@dataclass(frozen=True)
class Seen:
    """What a model sees of the sections of a cohort, from pixels alone: (train, test) [N, D] of each section."""

    embedding: tuple[list[Floats], list[Floats]]
    image: tuple[list[Floats], list[Floats]]  # its image encoder's features of footprint and window


def see(pretrained: Pretrained, cohort: Cohort) -> Seen:
    """Embeddings and image features of a cohort."""
    names = ("embedding", "feature")
    train, test = (read(pretrained, cohort, names, sections) for sections in (cohort.train, cohort.test))
    return Seen(*((train[name], test[name]) for name in names))


def read(
    pretrained: Pretrained, cohort: Cohort, names: tuple[str, ...], sections: list[Section], use_counts: bool = False,
    use_image: bool = True,
) -> dict[str, list[Floats]]:  # fmt: skip
    """Some of the model's outputs for the profiles of each section, [N, D]; see `inference.vectors`."""
    found: dict[str, list[Floats]] = {name: [] for name in names}
    for section in sections:
        slide = inference.prepare(pretrained, cohort.stores[section.slide_id])
        for name, values in inference.vectors(pretrained, slide, names, use_counts, use_image, section.rows).items():
            found[name].append(values.reshape(len(values), -1).astype(np.float64))
    return found


def baseline_scores(
    cohort: Cohort, name: str, columns: npt.NDArray[np.int64], seed: int, seen: Seen | None = None,
    only: Collection[str] = (),
) -> dict[str, Score]:  # fmt: skip
    """Every baseline of METHODS (or `only` those named) on one target and one choice of genes; with `seen` those on
    what a model sees too."""
    images = seen.image if seen else (None, None)
    train, test = inputs(cohort.train, images[0]), inputs(cohort.test, images[1])
    truth = {id(s): targets.target(name, s.counts[:, columns], s.depth) for s in cohort.train + cohort.test}
    y = np.concatenate([truth[id(section)] for section in cohort.train])
    measured = [truth[id(section)] for section in cohort.test]
    ends = np.cumsum([len(section.rows) for section in cohort.test])[:-1]
    found = {}
    for i, method in enumerate(METHODS):
        if (method.of_image and not seen) or (only and method.name not in only):
            continue
        draws = method.predict(train, y, test, np.random.default_rng([seed, i]))
        found[method.name] = score([np.split(d, ends) for d in draws], measured, cohort.test, seed)
    if seen:
        embedded, asked = (np.concatenate(part) for part in seen.embedding)
        probed = ridge_predict(embedded, y, asked, train.fold)
        found[PROBE] = score([np.split(probed, ends)], measured, cohort.test, seed)
    return found


def gene_rules(cohort: Cohort) -> dict[str, npt.NDArray[np.int64]]:
    """Rule -> columns of the genes it chooses on the training sections."""
    moments = targets.moments([s.counts for s in cohort.train], [s.depth for s in cohort.train])
    return {name: rule(moments) for name, rule in targets.RULES.items()}


def evaluate(pretrained: Pretrained, cohort: Cohort, seed: int = 0) -> dict[str, Any]:
    """The table of protocol 2 as plain values."""
    rules = gene_rules(cohort)
    asked = np.unique(np.concatenate(list(rules.values())))  # one forward pass serves both rules
    predicted = model_predictions(pretrained, cohort, [cohort.gene_ids[i] for i in asked])
    seen = see(pretrained, cohort)
    roles = {MODEL: "model", PROBE: "reading"} | {method.name: method.role for method in METHODS}
    scores: dict[str, dict[str, Any]] = {}
    versus: dict[str, dict[str, Any]] = {}
    own: dict[str, dict[str, Any]] = {}  # against a ridge on the model's own embedding
    for name, rule in targets.COLUMNS:
        column = f"{name}/{rule}"
        found = baseline_scores(cohort, name, rules[rule], seed, seen)
        measured = [targets.target(name, s.counts[:, rules[rule]], s.depth) for s in cohort.test]
        place = np.searchsorted(asked, rules[rule])
        model = score([[values[:, place] for values in predicted[name]]], measured, cohort.test, seed)
        for method, entry in [(MODEL, model), *found.items()]:
            scores.setdefault(method, {})[column] = entry.json()
        best = max((method for method in found if roles[method] == "baseline"), key=lambda m: found[m].value)
        for told, other in ((versus, best), (own, PROBE)):
            told[column] = {"baseline": other, **model.minus(found[other]).json()}
    return {
        **provenance(pretrained, cohort, seed),
        "columns": [f"{name}/{rule}" for name, rule in targets.COLUMNS],
        "genes": {rule: len(genes) for rule, genes in rules.items()},
        "methods": [{"name": name, "role": roles[name], "scores": values} for name, values in scores.items()],
        "versus_best_baseline": versus,
        "versus_own_embedding": own,
    }


def provenance(
    pretrained: Pretrained, cohort: Cohort, seed: int, protocol: str = PROTOCOL, shown: str = "H&E only"
) -> dict[str, Any]:
    """What every figure of a protocol carries with it; counts, never a donor or a slide."""
    sides = {name: _sizes(sections) for name, sections in (("train", cohort.train), ("test", cohort.test))}
    return {
        "protocol": protocol, "input": shown, "symmetries": pretrained.symmetries,
        "split_by": cohort.split_by, "seed": seed, "data": sides,
        "shards_sha256": cohort.shards_hash, "model_hash": pretrained.hash,
        "model_trained_on_these_shards": pretrained.data["shards_hash"] == cohort.shards_hash,
        "model_code": pretrained.code_version, "code": checkpoints.code_version(),
        "bootstrap": {"replicates": statistics.REPLICATES, "block_um": statistics.BLOCK_UM},
    }  # fmt: skip


def _sizes(sections: list[Section]) -> dict[str, int]:
    return {
        "sections": len(sections), "donors": len({section.donor for section in sections}),
        "profiles": sum(len(section.rows) for section in sections),
    }  # fmt: skip
