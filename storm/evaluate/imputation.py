"""Protocol 4, imputation: a share of a section's profiles is visible with its counts, the rest is asked.

In: an export, a cohort, for synthetic tissue its truth. Out: a table (plain values, for JSON), by share and by distance
to the nearest visible profile; with a truth also by class of genes (storm.evaluate.classes).

The visible profiles are drawn at random over the section, keyed by (seed, slide, share). The model is shown the pixels
and their counts; visible profiles are context in every region that holds them. Target lognorm, genes by rule `var`,
Pearson per gene within the section over the asked profiles. Beside it: inverse distance, ordinary kriging, and ridges
on the image whose residual is kriged; powers, ranges and nuggets are chosen per gene on training sections hidden alike.

A visible profile nearer than a tile in x and in y shares pixels with what is asked. So each score is also given over
the asked profiles that have none so near (column `beyond a tile`).
"""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import spatial

from storm import inference
from storm.evaluate import classes, interpolation, targets
from storm.evaluate.baselines import components, ridge_predict
from storm.evaluate.expression import Cohort, Score, gene_rules, inputs, provenance, read, score
from storm.evaluate.interpolation import Case
from storm.evaluate.sections import Section, take
from storm.evaluate.statistics import told
from storm.export import Pretrained
from storm.markdown import table
from storm.regions import slide_key

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
PROTOCOL = "4, imputation of hidden profiles"
SHARES = (0.05, 0.5)
MODEL, BLIND = "STORM (this project), H&E and visible counts", "STORM (this project), H&E only"
REFERENCES = {
    BLIND: (False, True),
    "STORM (this project), visible counts only": (True, False),
}
LEAST_VISIBLE, LEAST_ASKED = 3, 20  # profiles of a section; a bin with fewer asked ones is left out
BINS = (0.0, 1.0, 2.0, 4.0, np.inf)  # tile widths to the nearest visible profile

_ABOUT = """Target lognorm, {genes} genes of rule var, Pearson per gene within a section over the asked profiles. The
visible profiles are drawn at random over the section. *beyond a tile*: the asked profiles about which a tile shares no
pixel with one about a visible profile; the last columns: by distance to the nearest visible profile.
Powers, ranges and nuggets of the baselines were chosen per gene on training sections that were hidden alike."""


@dataclass(frozen=True)
class Hidden:
    """A section of which some profiles are visible; both distances [M] of the asked ones to the nearest visible one."""

    section: Section
    visible: Mask  # [N]
    distance_um: Floats
    apart_um: Floats  # the larger of |dx|, |dy|: from a tile's width on the two tiles about them share no pixel

    @property
    def asked(self) -> Section:
        return take(self.section, ~self.visible)


def hide(section: Section, share: float, seed: int) -> Hidden:
    """Draw the visible profiles of a section."""
    rng = np.random.default_rng([seed, slide_key(section.slide_id), round(1000 * share)])
    n = len(section.rows)
    visible = np.zeros(n, bool)
    visible[rng.permutation(n)[: max(LEAST_VISIBLE, round(share * n))]] = True
    near = spatial.KDTree(section.xy_um[visible])
    distance_um, apart_um = (near.query(section.xy_um[~visible], p=norm)[0] for norm in (2, np.inf))
    return Hidden(section, visible, distance_um, apart_um)


def _case(hidden: Hidden, values: Floats) -> Case:
    xy_um, visible = hidden.section.xy_um, hidden.visible
    return Case(xy_um[visible], xy_um[~visible], values[visible], values[~visible])


def _out_of_fold(x: Floats, y: Floats, fold: npt.NDArray[np.int64], standardise: bool) -> Floats:
    """[N, K] ridge predictions of training profiles by the other folds, as they will be for test profiles."""
    if len(np.unique(fold)) < 2:
        fold = np.arange(len(x)) * 5 // len(x)
    found = np.empty_like(y)
    for held in np.unique(fold):
        own = fold == held
        found[own] = ridge_predict(x[~own], y[~own], x[own], fold[~own], standardise=standardise)
    return found


@dataclass(frozen=True)
class Ground:
    """What no share changes, (train, test): sections, their values [N, K] and ridge predictions of these."""

    sections: tuple[list[Section], list[Section]]
    values: tuple[list[Floats], list[Floats]]
    ridges: dict[str, tuple[list[Floats], list[Floats]]]  # of training sections out of fold


def prepare(pretrained: Pretrained, cohort: Cohort, columns: npt.NDArray[np.int64]) -> Ground:
    """Values of the chosen genes, and the ridges on colour and on image features."""
    sections = cohort.train, cohort.test
    train, test = (inputs(part, read(pretrained, cohort, ("feature",), part)["feature"]) for part in sections)
    y = [[targets.lognorm(s.counts[:, columns], s.depth) for s in part] for part in sections]
    joined, ends = np.concatenate(y[0]), [np.cumsum([len(s.rows) for s in part])[:-1] for part in sections]
    ridges = {}
    for name, x, asked, unit in (
        ("colour ridge", train.around, test.around, True),
        ("ridge on image features", *components(train.image_around, test.image_around), False),
    ):
        own = _out_of_fold(x, joined, train.fold, unit)
        others = ridge_predict(x, joined, asked, train.fold, standardise=unit)
        ridges[name] = (np.split(own, ends[0]), np.split(others, ends[1]))
    return Ground(sections, (y[0], y[1]), ridges)


def baselines(ground: Ground, train: list[Hidden], test: list[Hidden]) -> dict[str, list[Floats]]:
    """Name -> predictions [M, K] for the asked profiles of each test section."""
    sides = list(zip((train, test), ground.values, strict=True))
    cases = [[_case(h, v) for h, v in zip(side, values, strict=True)] for side, values in sides]
    found = {}
    for name, options in (
        ("inverse distance", interpolation.INVERSE_DISTANCE),
        ("ordinary kriging", interpolation.KRIGING),
    ):
        chosen = interpolation.choose(options, cases[0])
        found[name] = [interpolation.interpolate(options, chosen, case) for case in cases[1]]
    for name, predicted in ground.ridges.items():
        left, asked = (
            [_case(h, v - p) for h, v, p in zip(side, values, own, strict=True)]
            for (side, values), own in zip(sides, predicted, strict=True)
        )
        chosen = interpolation.choose(interpolation.KRIGING, left)
        found[f"{name} + kriged residual"] = [
            p[~h.visible] + interpolation.interpolate(interpolation.KRIGING, chosen, case)
            for h, p, case in zip(test, predicted[1], asked, strict=True)
        ]
    return found


def model_predictions(
    pretrained: Pretrained, cohort: Cohort, test: list[Hidden], columns: npt.NDArray[np.int64], shown: tuple[bool, bool]
) -> list[Floats]:
    """lognorm [M, K] of the asked profiles; `shown`: whether visible counts, whether pixels."""
    genes = np.array([pretrained.genes.index[cohort.gene_ids[i]] for i in columns], dtype=np.int64)
    found = []
    for hidden in test:
        slide = inference.prepare(pretrained, cohort.stores[hidden.section.slide_id])
        visible = np.zeros(len(slide.profiles), bool)
        visible[hidden.section.rows[hidden.visible]] = shown[0]
        asked = inference.predict(pretrained, slide, genes, hidden.asked.rows, visible, use_image=shown[1])
        found.append(asked.lognorm().astype(np.float64))
    return found


def _score(
    predicted: list[Floats], measured: list[Floats], test: list[Hidden], keeps: list[Mask], seed: int
) -> Score | None:
    """Over the asked profiles `keeps` [M] of each section; None where no section has enough of them."""
    parts = []
    for values, truth, hidden, keep in zip(predicted, measured, test, keeps, strict=True):
        if keep.sum() >= LEAST_ASKED:
            parts.append((values[keep], truth[keep], take(hidden.asked, keep)))
    if not parts:
        return None
    values_of, truths, sections = (list(column) for column in zip(*parts, strict=True))
    return score([values_of], truths, sections, seed)


def compare(
    predicted: dict[str, list[Floats]], measured: list[Floats], test: list[Hidden], tile_um: float, seed: int
) -> dict[str, Any]:
    """Scores of all methods, of the model against the best baseline, and of what visible counts add to H&E; REFERENCES
    and MODEL are no rivals."""
    roles = {MODEL: "model"} | dict.fromkeys(REFERENCES, "reference")
    whole: dict[str, dict[str, Score]] = {"all": {}, "beyond a tile": {}}
    methods, versus = [], {}
    ranges = [(low * tile_um, high * tile_um) for low, high in itertools.pairwise(BINS)]
    ring = [[(h.distance_um >= low) & (h.distance_um < high) for h in test] for low, high in ranges]
    kept = {"all": _every(test), "beyond a tile": [h.apart_um >= tile_um for h in test]}
    for name, values in predicted.items():
        for column, keeps in kept.items():
            if found := _score(values, measured, test, keeps, seed):
                whole[column][name] = found
        bins = [_score(values, measured, test, keeps, seed) for keeps in ring]
        own = {column: of[name].json() for column, of in whole.items() if name in of}
        methods.append(
            {"name": name, "role": roles.get(name, "baseline"), "scores": own, "bins": [b and b.value for b in bins]}
        )
    for column, of in whole.items():
        if rivals := {name: entry.value for name, entry in of.items() if name not in roles}:
            best = max(rivals, key=rivals.__getitem__)
            versus[column] = {"baseline": best, **of[MODEL].minus(of[best]).json()}
    added = {column: of[MODEL].minus(of[BLIND]).json() for column, of in whole.items() if of}
    return {"methods": methods, "versus_best_baseline": versus, "counts_add": added}


def by_class(
    predicted: dict[str, list[Floats]],
    measured: list[Floats],
    test: list[Hidden],
    kind: npt.NDArray[np.str_],
    seed: int,
) -> dict[str, Any]:
    """Class -> its genes, the scores of all methods over the asked profiles, and what visible counts add to H&E."""
    found = {}
    for own in sorted(set(kind) - {""}):
        of = {
            name: _score(
                [x[:, kind == own] for x in values], [y[:, kind == own] for y in measured], test, _every(test), seed
            )
            for name, values in predicted.items()
        }
        scores = {name: entry.json() for name, entry in of.items() if entry}
        entry: dict[str, Any] = {"genes": int((kind == own).sum()), "scores": scores}
        if (model := of[MODEL]) and (blind := of[BLIND]):
            entry["counts_add"] = model.minus(blind).json()
        found[str(own)] = entry
    return found


def _every(test: list[Hidden]) -> list[Mask]:
    return [np.ones(len(h.distance_um), bool) for h in test]


def of_size(sections: list[Section]) -> list[Section]:
    """Those that have something to show and something to ask."""
    return [section for section in sections if len(section.rows) >= LEAST_VISIBLE + LEAST_ASKED]


def evaluate(pretrained: Pretrained, cohort: Cohort, seed: int = 0, truth_dir: Path | None = None) -> dict[str, Any]:
    """The tables of protocol 4 as plain values.

    Raises:
        ValueError: a test section has no truth in the folder, or another one.
    """
    train, test = of_size(cohort.train), of_size(cohort.test)
    if not train or not test:
        reason = f"needs a training and a test section of {LEAST_VISIBLE + LEAST_ASKED} profiles or more"
        return {"protocol": PROTOCOL, "skipped": reason}
    cohort = dataclasses.replace(cohort, train=train, test=test)
    columns = gene_rules(cohort)["var"]
    kind = classes.read_truths(truth_dir, test, cohort.gene_ids)[0][columns] if truth_dir else None
    ground = prepare(pretrained, cohort, columns)
    tile_um, shares = pretrained.config.tile_um, []
    for share in SHARES:
        known, hidden = ([hide(s, share, seed) for s in part] for part in ground.sections)
        shown = {MODEL: (True, True), **REFERENCES}
        predicted = {name: model_predictions(pretrained, cohort, hidden, columns, what) for name, what in shown.items()}
        predicted |= baselines(ground, known, hidden)
        measured = [values[~h.visible] for h, values in zip(hidden, ground.values[1], strict=True)]
        sizes = {"visible": sum(int(h.visible.sum()) for h in hidden), "asked": sum(map(len, measured))}
        of_class = {} if kind is None else {"classes": by_class(predicted, measured, hidden, kind, seed)}
        shares.append({"share": share, **sizes, **compare(predicted, measured, hidden, tile_um, seed), **of_class})
    return {
        **provenance(pretrained, cohort, seed, PROTOCOL, "H&E and the counts of the visible profiles"),
        "target": "lognorm", "genes": len(columns), "bins_um": [b * tile_um for b in BINS[:-1]], "shares": shares,
    }  # fmt: skip


def text(values: dict[str, Any]) -> str:
    """Tables as Markdown."""
    starts, parts = values["bins_um"], [_ABOUT.format(**values)]
    names = [f"{a:.0f}-{b:.0f} um" for a, b in itertools.pairwise(starts)] + [f"{starts[-1]:.0f} um on"]
    for entry in values["shares"]:
        rows: list[list[object]] = []
        for method in entry["methods"]:
            cells = [told(method["scores"].get(column)) for column in ("all", "beyond a tile")]
            far = ["-" if value is None else f"{value:.3f}" for value in method["bins"]]
            rows.append([method["name"], method["role"], *cells, *far])
        title = f"### {entry['share']:.0%} visible: {entry['visible']} profiles shown, {entry['asked']} asked"
        lines = [
            f"* {column}: model - best baseline ({v['baseline']}) {told(v, '+')}, paired."
            for column, v in entry["versus_best_baseline"].items()
        ]
        lines += [
            f"* {column}: visible counts add {told(v, '+')} to H&E, paired."
            for column, v in entry["counts_add"].items()
        ]
        parts += [title, table(["method", "role", "all", "beyond a tile", *names], rows), "\n".join(lines)]
        if "classes" in entry:
            parts.append(_class_table(entry))
    return "\n\n".join(parts)


def _class_table(entry: dict[str, Any]) -> str:
    of = entry["classes"]
    rows: list[list[object]] = [
        [method["name"], *(told(of[kind]["scores"].get(method["name"])) for kind in of)] for method in entry["methods"]
    ]
    rows.append(["visible counts add to H&E, paired", *(told(of[kind].get("counts_add"), "+") for kind in of)])
    return table(["gene class", *(f"{kind} ({of[kind]['genes']} genes)" for kind in of)], rows)
