"""Protocol 10, uncertainty: do intervals about H&E-only predictions hold as many measurements as they promise.

In: an export, a cohort with its validation sections. Out: tables (plain values, for JSON). Genes: GENES of the
shared ones, spread evenly over their expected share of counts, in BINS bins of it.

    negative binomial   the central 90 % of raw counts under mu and r, at the depth that is predicted; counts are
                        discrete, so that the interval of a true model holds more than 90 %: `promised` is how much
    split-conformal     predicted lognorm +- the 90 % quantile of |measured - predicted| of the gene over calibration
                        donors of the platform: those of split val; where it has none, the other donors of the test

The donor is the unit: calibration donors weigh alike, coverage is told per donor. With LEAST calibration donors or more
one more, unseen, donor is counted as a miss (arXiv 2306.06342), which bounds the coverage of a new donor's profile from
below, on average over donors that are exchangeable. With fewer no guarantee is claimed.

Beside each coverage stands a 95 % interval. Of one donor: spatial blocks are drawn. Of a mean over donors: donors are
drawn, and the blocks of each. Model and calibration are held fixed; with few donors such an interval is too narrow.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from storm import inference
from storm.evaluate import statistics, targets
from storm.evaluate.expression import Cohort, provenance
from storm.evaluate.sections import Section
from storm.evaluate.statistics import Interval
from storm.export import Pretrained
from storm.markdown import table
from storm.prediction import Prediction

Floats = npt.NDArray[np.float64]
Columns = npt.NDArray[np.int64]
PROTOCOL = "10, uncertainty"
LEVEL = 0.9
LEAST = 9  # donors: with fewer an unseen one is more than 10 % of all
GENES, BINS = 500, 5
NB, CONFORMAL = "negative binomial", "split-conformal"
VAL, OTHERS = "val donors", "other test donors"


def noise_interval(of: Prediction) -> tuple[Floats, Floats, Floats]:
    """Lower and upper end of the central LEVEL of counts, and the probability that the model gives it, each [N, K].

    The ends belong to it. NaN where the model learned no noise of counts.
    """
    mean = np.exp(of.log_depth.astype(np.float64))[:, None] * of.composition
    size, zeros = of.dispersion.astype(np.float64), of.zeros.astype(np.float64)
    poisson, known = np.isinf(size), ~np.isnan(size)
    r = np.where(poisson | ~known, 1.0, size)

    def quantile(p: float) -> Floats:
        left = np.broadcast_to(np.clip((p - zeros) / (1 - zeros), 0, 1), mean.shape)  # of the counts beside the zeros
        found = np.where(poisson, stats.poisson.ppf(left, mean), stats.nbinom.ppf(left, r, r / (r + mean)))
        return np.where(known, np.maximum(found, 0), np.nan)

    def below(count: Floats) -> Floats:
        found = np.where(poisson, stats.poisson.cdf(count, mean), stats.nbinom.cdf(count, r, r / (r + mean)))
        return np.asarray(np.where(count >= 0, zeros + (1 - zeros) * found, 0.0))

    low, high = quantile((1 - LEVEL) / 2), quantile((1 + LEVEL) / 2)
    return low, high, np.where(known, below(high) - below(low - 1), np.nan)


def radius(scores: list[Floats]) -> Floats:
    """[K] quantile of the scores [N, K] of several donors, each of which weighs 1."""
    weight = np.concatenate([np.full(len(s), 1 / (len(scores) * len(s))) for s in scores])
    level = LEVEL * (len(scores) + 1) / len(scores) if len(scores) >= LEAST else LEVEL
    every = np.concatenate(scores)
    order = np.argsort(every, axis=0, kind="stable")
    reached = np.cumsum(weight[order], axis=0) >= min(level, 1) - 1e-9
    at = np.where(reached.any(0), reached.argmax(0), len(every) - 1)
    return np.asarray(np.take_along_axis(every, order, 0)[at, np.arange(every.shape[1])])


def _ask(pretrained: Pretrained, cohort: Cohort, section: Section, columns: Columns) -> Prediction:
    genes = np.array([pretrained.genes.index[cohort.gene_ids[i]] for i in columns], dtype=np.int64)
    slide = inference.prepare(pretrained, cohort.stores[section.slide_id])
    return inference.predict(pretrained, slide, genes, section.rows)


def _misses(of: Prediction, section: Section, columns: Columns) -> Floats:
    """[N, K] |lognorm - predicted lognorm|."""
    return np.asarray(np.abs(targets.lognorm(section.counts[:, columns], section.depth) - of.lognorm()))


def _of_donors(sections: list[Section], values: list[Floats]) -> dict[tuple[str, str], Floats]:
    """Donor -> the values of its sections end to end."""
    donors = sorted({s.donor for s in sections})
    return {d: np.concatenate([v for v, s in zip(values, sections, strict=True) if s.donor == d]) for d in donors}


def bins(pretrained: Pretrained, gene_ids: list[str]) -> list[Columns]:
    """The columns of each bin, from the least expressed genes to the most."""
    share = np.asarray(pretrained.genes.share)[[pretrained.genes.index[gene] for gene in gene_ids]]
    order = np.argsort(share, kind="stable")
    spread = order[np.arange(min(GENES, len(order))) * len(order) // min(GENES, len(order))]
    return [part for part in np.array_split(spread, BINS) if len(part)]


def evaluate(pretrained: Pretrained, cohort: Cohort, seed: int = 0) -> dict[str, Any]:
    """The tables of protocol 10 as plain values."""
    val = cohort.val
    groups = bins(pretrained, cohort.gene_ids)
    columns = np.concatenate(groups)
    kinds = {s.slide_id: cohort.stores[s.slide_id].info.platform for s in cohort.test + val}
    rows: list[dict[str, Any]] = []
    for kind in sorted({kinds[s.slide_id] for s in cohort.test}):
        test, own = ([s for s in part if kinds[s.slide_id] == kind] for part in (cohort.test, val))
        asked = [_ask(pretrained, cohort, s, columns) for s in test]
        counts = [s.counts[:, columns].toarray() for s in test]
        misses = _of_donors(test, [_misses(of, s, columns) for of, s in zip(asked, test, strict=True)])
        known = [_misses(_ask(pretrained, cohort, s, columns), s, columns) for s in own]
        noise = _of_donors(test, [noise_of(of, count) for of, count in zip(asked, counts, strict=True)])
        for donor, given in calibrations(misses, _of_donors(own, known)).items():
            mine = [s for s in test if s.donor == donor]
            about = {"platform": kind, "sections": len(mine), "profiles": len(misses[donor]), **given[0]}
            rows.append(about | {"donor": donor} | _row(noise[donor], misses[donor], given[1], blocks(mine)))
    sizes = np.cumsum([len(part) for part in groups])[:-1]
    mean = np.concatenate([s.counts[:, columns].toarray() for s in cohort.test]).mean(0)
    return {
        **provenance(pretrained, cohort, seed, PROTOCOL), "level": LEVEL, "genes": len(columns),
        "val": {"sections": len(val), "donors": len({s.donor for s in val}), "left_out": cohort.val_left_out},
        "bins": [
            {"genes": len(own), "mean_count": float(mean[at].mean()), **_bin(rows, at, seed)}
            for own, at in zip(groups, np.split(np.arange(len(columns)), sizes), strict=True)
        ],
        "donors": [_told_donor(row, seed) for row in rows],
    }  # fmt: skip


def noise_of(of: Prediction, count: Floats) -> Floats:
    """[N, 3, K] of measured counts: 1 where the interval holds them, what it promised, its width; NaN without noise."""
    low, high, promised = noise_interval(of)
    held = np.where(np.isnan(low), np.nan, (count >= low) & (count <= high))
    return np.stack([held, promised, high - low], axis=1)


def calibrations(
    test: dict[tuple[str, str], Floats], val: dict[tuple[str, str], Floats]
) -> dict[tuple[str, str], tuple[dict[str, Any], list[Floats]]]:
    """Test donor -> (who calibrates it, their scores [N, K] donor by donor)."""
    found = {}
    for donor in test:
        source = val or test
        given = [scores for other, scores in source.items() if other != donor]
        by = VAL if val else OTHERS
        found[donor] = {"calibrated_by": by, "calibrators": len(given), "guarantee": len(given) >= LEAST}, given
    return found


def blocks(sections: list[Section]) -> Columns:
    """[N] number of the spatial block of each profile of a donor's sections, end to end."""
    found, start = [], 0
    for section in sections:
        found.append(statistics.blocks(section.xy_um) + start)
        start = int(found[-1].max()) + 1
    return np.concatenate(found)


def _row(noise: Floats, misses: Floats, given: list[Floats], block: Columns) -> dict[str, Any]:
    """Of one donor, method -> [3, K] per gene: covered, promised, width; and how many each block holds."""
    found, held = {NB: noise.mean(0)}, {NB: _sums(noise[:, 0], block)}
    if given:
        reach = radius(given)
        inside = (misses <= reach).astype(np.float64)
        found[CONFORMAL] = np.stack([inside.mean(0), np.full(len(reach), LEVEL), 2 * reach])
        held[CONFORMAL] = _sums(inside, block)
    return {"methods": found, "held": held, "block_sizes": np.bincount(block)}


def _sums(values: Floats, block: Columns) -> Floats:
    """[blocks, K] of values [N, K]."""
    found = np.zeros((int(block.max()) + 1, values.shape[1]))
    np.add.at(found, block, values)
    return found


def _summary(rows: list[dict[str, Any]], name: str, at: Columns, seed: int) -> dict[str, Any] | None:
    """Of one method and some genes: means over rows, least and most coverage of one, and the mean's interval.

    A donor of two platforms has two rows, which are drawn together.
    """
    rows = [row for row in rows if name in row["methods"]]
    each = np.array([row["methods"][name][:, at].mean(1) for row in rows])
    if not len(each) or np.isnan(each).any():
        return None
    covered, promised, width = each.mean(0)
    found = _interval(rows, name, at, float(covered), seed)
    return {
        "covered": float(covered), "low": found.low, "high": found.high,
        "least": float(each[:, 0].min()), "most": float(each[:, 0].max()),
        "promised": float(promised), "width": float(width),
    }  # fmt: skip


def _interval(rows: list[dict[str, Any]], name: str, at: Columns, covered: float, seed: int) -> Interval:
    """Of the mean coverage of some rows."""
    drawn = []
    for row in rows:
        sizes = row["block_sizes"]
        weight = statistics.block_weights(np.arange(len(sizes)), seed)
        drawn.append(weight @ row["held"][name][:, at].mean(1) / (weight @ sizes))
    donors = sorted({row["donor"] for row in rows})
    number = np.array([donors.index(row["donor"]) for row in rows])
    return statistics.interval(covered, statistics.over_donors(np.array(drawn), number, seed))


def _bin(rows: list[dict[str, Any]], at: Columns, seed: int) -> dict[str, Any]:
    """Method -> its summary over donors for some of the genes."""
    return {"methods": {name: _summary(rows, name, at, seed) for name in (NB, CONFORMAL)}}


def _told_donor(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """A donor's row without its name: means over the genes."""
    kept = {name: row[name] for name in row if name not in ("donor", "held", "block_sizes")}
    every = {name: _summary([row], name, np.arange(values.shape[1]), seed) for name, values in row["methods"].items()}
    told = ("covered", "low", "high", "promised", "width")
    return {**kept, "methods": {name: of and {k: of[k] for k in told} for name, of in every.items()}}


def _cells(of: dict[str, Any] | None) -> list[object]:
    if of is None:
        return ["-", "-", "-", "-"]
    spread = f" [{of['least']:.3f}, {of['most']:.3f}]" if "least" in of else ""
    between = f"{of['low']:.3f} to {of['high']:.3f}"
    return [f"{of['covered']:.3f}{spread}", between, f"{of['promised']:.3f}", f"{of['width']:.2f}"]


def text(values: dict[str, Any]) -> str:
    """The tables as Markdown."""
    head = [f"{name}: {what}" for name in (NB, CONFORMAL) for what in ("covered", "95 % interval", "promised", "width")]
    genes: list[list[object]] = [
        [f"{of['mean_count']:.3g}", of["genes"], *(c for name in (NB, CONFORMAL) for c in _cells(of["methods"][name]))]
        for of in values["bins"]
    ]
    donors: list[list[object]] = [
        [i, of["platform"], of["sections"], of["profiles"], f"{of['calibrators']} {of['calibrated_by']}",
         *(c for name in (NB, CONFORMAL) for c in _cells(of["methods"].get(name)))]
        for i, of in enumerate(values["donors"], 1)
    ]  # fmt: skip
    sure = all(of["guarantee"] for of in values["donors"])
    about = (
        f"Intervals of {values['level']:.0%} about predictions from H&E alone, {values['genes']} genes by mean count; "
        "covered: mean over donors\n[least, most covered donor]. Negative binomial: raw counts at the predicted depth, "
        "whose level H&E does not\ntell; the width is in counts. Split-conformal: lognorm, the width is in its unit. "
        "The 95 % interval\nof a donor is a bootstrap of blocks, that of a mean over donors one of donors and their "
        "blocks (of one donor: of\nits blocks alone); model and calibration are held fixed, and with few donors it is "
        "too narrow. "
    ) + (
        "Calibration donors suffice for a bound\non the mean over exchangeable donors, not for each donor or gene."
        if sure
        else f"**No guarantee**: some donor has fewer than\n{LEAST} calibration donors of its platform."
    )
    return "\n\n".join([
        about, table(["mean count", "genes", *head], genes),
        table(["donor", "platform", "sections", "profiles", "calibrated by", *head], donors),
    ])  # fmt: skip
