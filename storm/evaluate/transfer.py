"""Protocol 6, transfer between platforms: H&E -> expression where the model was not trained on the platform.

In: an export, which says on which platforms it was trained; a cohort with sections of these and of others. Out: a table
(plain values, for JSON).

A test section is `within` where its platform was trained on; else `technical` where the training sections hold its
donor on a trained platform, and `new donor` where they do not: the two say different things and are never joined. Genes
are those that all sections share (rule var on training sections of trained platforms). Counts of all sections are
thinned to the least of their median depths, so that no platform wins by its depth. Target lognorm, Pearson within a
section.

Beside the model: a ridge on colour trained on the trained platforms (`source`), with the image read under the target's
footprint and about it on both sides; the same trained on training sections of the target platform, where there are any.
The ratio to `within` compares platforms whose ceilings differ: it is a figure, no verdict on consistency. The verdict
needs a second export, trained on the target by other donors (`storm.evaluate.within`): both are scored on the same
sections and genes, and the ratio transfer / within is taken draw by draw of the same blocks. Consistent: its lower
bound is at least CONSISTENT.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from storm import inference
from storm.evaluate import statistics, targets, within
from storm.evaluate.baselines import colour_features, ridge_predict
from storm.evaluate.expression import Cohort, Score, inputs, provenance, score
from storm.evaluate.sections import Section, patches, take
from storm.evaluate.statistics import told
from storm.evaluate.within import Within
from storm.export import Pretrained
from storm.markdown import table
from storm.regions import slide_key

Floats = npt.NDArray[np.float64]
Columns = npt.NDArray[np.int64]
PROTOCOL = "6, transfer between platforms"
WITHIN, TECHNICAL, NEW_DONOR = "within", "technical", "new donor"
MODEL, SOURCE, TARGET = "STORM (this project), H&E only", "colour ridge, source", "colour ridge, target platform"
TRAINED = "STORM (this project), trained on the target"
CONSISTENT = 0.8
CONSISTENT_TOLD, NOT_SHOWN = "consistent", "not shown to be consistent"
_AT_ONCE = 64  # patches


def platform(cohort: Cohort, section: Section) -> str:
    """Of the section's store."""
    return cohort.stores[section.slide_id].info.platform


def groups(cohort: Cohort, trained: set[str]) -> dict[tuple[str, str], list[Section]]:
    """(platform, WITHIN | TECHNICAL | NEW_DONOR) -> test sections."""
    seen = {s.donor for s in cohort.train if platform(cohort, s) in trained}
    found: dict[tuple[str, str], list[Section]] = {}
    for section in cohort.test:
        own = platform(cohort, section)
        relation = WITHIN if own in trained else TECHNICAL if section.donor in seen else NEW_DONOR
        found.setdefault((own, relation), []).append(section)
    return dict(sorted(found.items()))


def thinned(section: Section, depth: float, seed: int) -> Section:
    """Each molecule kept at one rate, so that the median depth over the shared genes is `depth`; empty profiles go.

    Depth is that of the shared genes from then on: the genes that only one platform measures say nothing here.
    """
    own = np.asarray(section.counts.sum(1))
    rate = min(1.0, depth / max(float(np.median(own)), 1e-12))
    rng = np.random.default_rng([seed, slide_key(section.slide_id)])
    counts = section.counts.copy()  # zeros are taken out in place
    counts.data = rng.binomial(counts.data.astype(np.int64), rate).astype(np.float64)
    counts.eliminate_zeros()
    left = np.asarray(counts.sum(1)).astype(np.int64)
    return take(dataclasses.replace(section, counts=counts, depth=left), left > 0)


def equal_depth(cohort: Cohort, seed: int) -> Cohort:
    """All sections thinned to the least of their median depths over the shared genes."""
    every = cohort.train + cohort.test
    depth = min(float(np.median(np.asarray(s.counts.sum(1)))) for s in every)
    train, test = ([thinned(s, max(depth, 1.0), seed) for s in part] for part in (cohort.train, cohort.test))
    return dataclasses.replace(cohort, train=[s for s in train if len(s.rows)], test=[s for s in test if len(s.rows)])


def _colour(cohort: Cohort, section: Section, side_um: float) -> Floats:
    """[N, 30] colour of a square of `side_um` and of the patch about it."""
    store, xy = cohort.stores[section.slide_id], section.xy_um
    side_um = max(side_um, 2 * store.info.tile_mpp)
    own = [
        colour_features(patches(store, xy[i : i + _AT_ONCE], side_um)) for i in range(0, len(xy), _AT_ONCE)
    ]  # fmt: skip
    return np.concatenate([np.concatenate(own), section.colour], axis=1)


def _ridge(cohort: Cohort, train: list[Section], test: list[Section], columns: Columns, seed: int) -> Score:
    """A colour ridge between two sets of sections, the image read at the test sections' footprint on both sides."""
    side_um = float(np.median(np.concatenate([_footprints(cohort, s) for s in test])))
    x, asked = (np.concatenate([_colour(cohort, s, side_um) for s in part]) for part in (train, test))
    y, measured = ([targets.lognorm(s.counts[:, columns], s.depth) for s in part] for part in (train, test))
    predicted = ridge_predict(x, np.concatenate(y), asked, inputs(train).fold)
    return score([np.split(predicted, np.cumsum([len(s.rows) for s in test])[:-1])], measured, test, seed)


def _footprints(cohort: Cohort, section: Section) -> Floats:
    return cohort.stores[section.slide_id].places(bare=True).footprint_um[section.rows].astype(np.float64)


def _model(pretrained: Pretrained, cohort: Cohort, test: list[Section], columns: Columns, seed: int) -> Score:
    genes = np.array([pretrained.genes.index[cohort.gene_ids[i]] for i in columns], dtype=np.int64)
    predicted, measured = [], []
    for section in test:
        slide = inference.prepare(pretrained, cohort.stores[section.slide_id])
        asked = inference.predict(pretrained, slide, genes, section.rows)
        predicted.append(asked.lognorm().astype(np.float64))
        measured.append(targets.lognorm(section.counts[:, columns], section.depth))
    return score([predicted], measured, test, seed)


def ratio(transfer: Score, within: Score, paired: bool = False) -> dict[str, float] | None:
    """transfer / within with its interval; None where `within` is not above 0.

    Paired: both are of the same sections, and drawn together. Else the two are resampled apart.
    """
    if np.percentile(within.replicates, 2.5) <= 0:
        return None
    shift = 0 if paired else len(transfer.replicates) // 2  # draws of two sets of sections must not go together
    drawn = transfer.replicates / np.roll(within.replicates, shift)
    return statistics.interval(transfer.value / within.value, drawn).json()


def verdict(found: dict[str, float] | None) -> str:
    """What a paired ratio allows to be said; where there is none, nothing is shown."""
    return CONSISTENT_TOLD if found and found["low"] >= CONSISTENT else NOT_SHOWN


def check(pretrained: Pretrained, cohort: Cohort, rival: Within) -> None:
    """Refuse a model that is no yardstick for the platforms that `pretrained` is transferred to.

    Raises:
        ValueError: as `within.check`.
    """
    asked: dict[str, list[Section]] = {}
    for (own, relation), test in groups(cohort, set(pretrained.data["platforms"])).items():
        if relation != WITHIN:
            asked.setdefault(own, []).extend(test)
    within.check(rival, cohort, asked)


def evaluate(pretrained: Pretrained, cohort: Cohort, seed: int = 0, rival: Within | None = None) -> dict[str, Any]:
    """The table of protocol 6 as plain values.

    Args:
        rival: a model trained on the target platform, for the verdict.

    Raises:
        ValueError: as `check`.
    """
    if rival:
        check(pretrained, cohort, rival)
    trained = set(pretrained.data["platforms"])
    cohort = equal_depth(cohort, seed)
    found = groups(cohort, trained)
    source = [s for s in cohort.train if platform(cohort, s) in trained]
    if all(relation == WITHIN for _, relation in found) or not source:
        reason = "the test sections are all of platforms that the model was trained on, or none is for training"
        return {"protocol": PROTOCOL, "skipped": reason}
    columns = targets.top_variance(targets.moments([s.counts for s in source], [s.depth for s in source]))
    scores: dict[tuple[str, str], dict[str, Score]] = {}
    for (own, relation), test in found.items():
        target = [s for s in cohort.train if platform(cohort, s) == own]
        scores[own, relation] = of = {
            MODEL: _model(pretrained, cohort, test, columns, seed),
            SOURCE: _ridge(cohort, source, test, columns, seed),
        }
        if relation != WITHIN:
            of |= {TARGET: _ridge(cohort, target, test, columns, seed)} if target else {}
            of |= {TRAINED: _model(rival.pretrained, cohort, test, columns, seed)} if rival else {}
    level = [of for (_, relation), of in scores.items() if relation == WITHIN]
    return {
        **provenance(pretrained, cohort, seed, PROTOCOL), "target": "lognorm", "genes": len(columns),
        "trained_on": sorted(trained), "median_depth": float(np.median(np.concatenate([s.depth for s in source]))),
        "within": _told_of(rival), "groups": [_group(key, found[key], of, level) for key, of in scores.items()],
    }  # fmt: skip


def _told_of(rival: Within | None) -> dict[str, Any] | None:
    """The provenance of the second model."""
    if rival is None:
        return None
    of = rival.pretrained
    return {
        "model_hash": of.hash, "model_code": of.code_version, "shards_sha256": of.data["shards_hash"],
        "trained_on": sorted(of.data["platforms"]), "donors": len(rival.donors), "sections": len(rival.slides),
    }  # fmt: skip


def _group(
    key: tuple[str, str], test: list[Section], scores: dict[str, Score], level: list[dict[str, Score]]
) -> dict[str, Any]:
    """One row of the table; `level` are the scores of the groups within trained platforms."""
    entry: dict[str, Any] = {
        "platform": key[0], "relation": key[1], "sections": len(test), "donors": len({s.donor for s in test}),
        "profiles": sum(len(s.rows) for s in test), "scores": {name: of.json() for name, of in scores.items()},
    }  # fmt: skip
    if key[1] != WITHIN and level:
        for name in (MODEL, SOURCE):
            source = Score(
                float(np.mean([of[name].value for of in level])),
                np.mean([of[name].replicates for of in level], axis=0), level[0][name].each,
            )  # fmt: skip
            entry.setdefault("ratio_to_within", {})[name] = ratio(scores[name], source)
    if TRAINED in scores:
        of_target = ratio(scores[MODEL], scores[TRAINED], paired=True)
        entry |= {"ratio_to_trained_on_target": of_target, "verdict": verdict(of_target)}
    return entry


def _rival_columns(entry: dict[str, Any]) -> list[object]:
    """What a row tells of the second model."""
    scores, found = told(entry["scores"].get(TRAINED)), told(entry.get("ratio_to_trained_on_target"))
    return [scores, found, entry.get("verdict", "-")]


def text(values: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows: list[list[object]] = []
    rival = values["within"]
    for entry in values["groups"]:
        of = entry.get("ratio_to_within", {})
        ratios = [told(of.get(name)) for name in (MODEL, SOURCE)]
        scores = [told(entry["scores"].get(name)) for name in (MODEL, SOURCE, TARGET)]
        size = f"{entry['sections']} of {entry['donors']} donors"
        more = _rival_columns(entry) if rival else []
        rows.append([entry["platform"], entry["relation"], size, *scores, *ratios, *more])
    about = (
        f"The model was trained on {', '.join(values['trained_on'])}. Counts are thinned to a median depth of\n"
        f"{values['median_depth']:.0f} over the shared genes; {values['genes']} genes of rule var, target lognorm.\n"
        "The ratio to *within* sets two platforms with other ceilings beside each other; it is no verdict."
    )
    if rival:
        about += (
            f"\n\nThe second model was trained on {', '.join(rival['trained_on'])}, {rival['sections']} sections of "
            f"{rival['donors']} donors,\nnone of which is tested here. Ratio: transfer / trained on the target, paired "
            f"over sections, genes and blocks;\nconsistent where its lower bound is at least {CONSISTENT}. It says "
            "nothing where the second model is weak itself:\nhold it against the ridge of the target platform."
        )
    head = ["platform", "relation", "sections", MODEL, SOURCE, TARGET, "model: ratio to within", "ridge: ratio"]
    head += [TRAINED, "model: ratio to it", "verdict"] if rival else []
    return "\n\n".join([about, table(head, rows)])
