"""Cells read from the maps of shared tiles, beside one tile per cell; what is told apart inside a spot; additivity.

In: an export, a cohort with test sections of cells, the truth of synthetic tissue. Out: tables (plain values, for
JSON), of H&E alone. The cells are those that share a disc of a spot's size, on a hexagonal lattice, with another cell.

    cells       Pearson within a section of lognorm, with what was measured and with the truth (the expected
                composition), for each way of reading of storm.evaluate.reads with the same weights; differences paired.
                skill as storm.evaluate.classes has it, of the same cells.
    inside      the mean of its disc taken from the log composition of each cell, predicted and true: Pearson over all
                cells of a section of what is left. Of all discs, and of those whose cells have their centres in one
                tile of the grid, where the read `tile mean` is one for all: what is left to it is place and size.
    additivity  see storm.evaluate.additivity; needs no truth

The weights were trained on the grid: the other two ways show them what they have not seen in training.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storm import inference
from storm.evaluate import additivity, classes, statistics, targets
from storm.evaluate.expression import MODEL, Cohort, Score, baseline_scores, provenance, score
from storm.evaluate.reads import GRID, OWN_TILE, READS, reading
from storm.evaluate.sections import Section, take
from storm.evaluate.statistics import told
from storm.export import Pretrained
from storm.markdown import table
from storm.regions import tiles_by
from storm.schema import LOGNORM_SCALE
from storm.store import SlideStore

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
PROTOCOL = "2, H&E to expression of cells, by how they are read"
DISC_UM, PITCH_UM = 55.0, 100.0
ALL, NOISE, RIDGE = "a-d", "e", "colour ridge"  # all genes of which anything can be told; the others
NO_TRUTH = "no truth is given; --truth names that of synthetic tissue"
_LEAST = 1e-12  # of an expected share, for its log


def discs(xy_um: Floats) -> Ints:
    """[N] number of the disc in which each cell's centre lies together with another; -1: in none, or alone."""
    height_um = PITCH_UM * np.sqrt(3) / 2
    row = np.round(xy_um[:, 1] / height_um)
    shift = (row % 2) / 2  # of every second row
    col = np.round(xy_um[:, 0] / PITCH_UM - shift)
    node = np.stack([(col + shift) * PITCH_UM, row * height_um], axis=1)
    inside = np.linalg.norm(xy_um - node, axis=1) <= DISC_UM / 2
    number = np.unique(np.stack([row, col], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    together = np.bincount(number, inside, minlength=len(number)) >= 2
    return np.where(inside & together[number], number, -1)


def centred(values: Floats, disc: Ints) -> Floats:
    """[N, K] less the mean of each cell's disc; what is left of rounding alone is 0."""
    _, disc = np.unique(disc, return_inverse=True)
    sums = np.zeros((int(disc.max(initial=-1)) + 1, values.shape[1]))
    np.add.at(sums, disc, values)
    left = values - (sums / np.bincount(disc)[:, None])[disc]
    rounding = 1e-9 * np.abs(values).max(axis=0, initial=0)
    return np.where(np.abs(left) > rounding, left, 0.0)


@dataclass(frozen=True)
class Cells:
    """The cells of a section that are asked, N of them, K genes of which the truth knows the class."""

    section: Section
    disc: Ints  # [N]
    in_one_tile: npt.NDArray[np.bool_]  # [N] all cells of the disc have their centres in one tile of the grid
    share: Floats  # [N, K] expected composition
    white: float  # share of the cells in whose own tile a part is not stored


def open_cells(section: Section, store: SlideStore, share: Floats) -> Cells:
    """The cells of `section` that share a disc; `share` [cells, K] of all of them."""
    disc = discs(section.xy_um)
    keep, tile_um = disc >= 0, store.info.tile_um
    xy_um, disc = section.xy_um[keep], disc[keep]
    tile = np.floor(xy_um / tile_um)
    apart = np.abs(centred(tile, disc)).max(axis=1) > 1e-9  # cells that are not in the mean tile of their disc
    read = tiles_by(np.arange(len(xy_um)), xy_um, np.zeros(len(xy_um), np.float32), tile_um)
    absent = {int(i) for i, row, col in read if (int(row), int(col)) not in store.tile_index}
    white = len(absent) / max(1, len(xy_um))
    return Cells(take(section, keep), disc, ~np.isin(disc, disc[apart]), share[keep], white)


def evaluate(pretrained: Pretrained, cohort: Cohort, seed: int, truth_dir: Path | None) -> dict[str, Any]:
    """The tables as plain values. Without a truth, or where no cells share a disc, only the additivity is told, with
    the reason under `no_cells`.

    Raises:
        ValueError: a test section has no truth in the folder, or another one.
    """
    sections = [s for s in cohort.test if cohort.stores[s.slide_id].info.kind == "cell"]
    if not sections:
        return {"protocol": PROTOCOL, "skipped": "no test section is one of cells"}
    cohort = dataclasses.replace(cohort, test=sections)
    stores = [cohort.stores[s.slide_id] for s in sections]
    return {
        **provenance(pretrained, cohort, seed, PROTOCOL),
        **(_by_truth(pretrained, cohort, truth_dir, seed) if truth_dir else {"no_cells": NO_TRUTH}),
        "additivity": additivity.measure(pretrained, stores, cohort.gene_ids),
    }


def _by_truth(pretrained: Pretrained, cohort: Cohort, truth_dir: Path, seed: int) -> dict[str, Any]:
    kind, expected = classes.read_truths(truth_dir, cohort.test, cohort.gene_ids)
    columns = np.flatnonzero(kind != "")
    kind = kind[columns]
    opened = [
        open_cells(section, cohort.stores[section.slide_id], share[:, columns])
        for section, share in zip(cohort.test, expected, strict=True)
    ]
    asked = [cells for cells in opened if len(cells.disc)]
    if not asked:
        return {"no_cells": f"no two cells of {len(opened)} sections share a disc of {DISC_UM:g} um"}
    genes = [cohort.gene_ids[i] for i in columns]
    lognorm, log_share = predictions(pretrained, cohort, asked, genes)
    return {
        "asked": {
            "sections": len(asked), "cells": sum(len(cells.disc) for cells in asked),
            "discs": sum(len(np.unique(cells.disc)) for cells in asked),
            "white": float(np.mean([cells.white for cells in asked])),
        },
        "genes": {name: int(_of(kind, name).sum()) for name in _classes(kind)},
        "cells": _cells(cohort, asked, columns, kind, lognorm, seed),
        "inside": {
            "all discs": _inside(asked, kind, log_share, seed, [np.ones_like(cells.in_one_tile) for cells in asked]),
            "in one tile": _inside(asked, kind, log_share, seed, [cells.in_one_tile for cells in asked]),
        },
    }  # fmt: skip


def predictions(
    pretrained: Pretrained, cohort: Cohort, asked: list[Cells], gene_ids: list[str]
) -> tuple[dict[str, list[Floats]], dict[str, list[Floats]]]:
    """Read -> lognorm [N, K] of each section, and read -> log composition."""
    genes = np.array([pretrained.genes.index[gene_id] for gene_id in gene_ids], dtype=np.int64)
    lognorm: dict[str, list[Floats]] = {name: [] for name in READS}
    log_share: dict[str, list[Floats]] = {name: [] for name in READS}
    for cells in asked:
        slide = inference.prepare(pretrained, cohort.stores[cells.section.slide_id])
        for name in READS:
            with reading(pretrained.model, name):
                found = inference.predict(pretrained, slide, genes=genes, rows=cells.section.rows)
            lognorm[name].append(found.lognorm().astype(np.float64))
            log_share[name].append(np.log(np.maximum(found.composition.astype(np.float64), _LEAST)))
    return lognorm, log_share


def _classes(kind: npt.NDArray[np.str_]) -> list[str]:
    return [*sorted(str(name) for name in set(kind)), ALL]


def _of(kind: npt.NDArray[np.str_], name: str) -> npt.NDArray[np.bool_]:
    return kind != NOISE if name == ALL else kind == name


def _compared(
    predicted: Mapping[str, list[Floats]], truth: list[Floats], sections: list[Section], kind: npt.NDArray[np.str_],
    seed: int,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Class -> the score of each read, and its difference to the grid's."""
    found = {}
    for name in _classes(kind):
        own = _of(kind, name)
        scores: dict[str, Score] = {
            read: score([[x[:, own] for x in values]], [y[:, own] for y in truth], sections, seed)
            for read, values in predicted.items()
        }
        found[name] = {
            "scores": {read: of.json() for read, of in scores.items()},
            "less_grid": {read: of.minus(scores[GRID]).json() for read, of in scores.items() if read != GRID},
        }
    return found


def _cells(
    cohort: Cohort, asked: list[Cells], columns: Ints, kind: npt.NDArray[np.str_],
    lognorm: dict[str, list[Floats]], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The table `cells`: each class with what was measured (between colour ridge and oracle), and with the truth."""
    sections = [cells.section for cells in asked]
    measured = [targets.lognorm(s.counts[:, columns], s.depth) for s in sections]
    truth = [np.log1p(LOGNORM_SCALE * cells.share) for cells in asked]
    ridge = baseline_scores(dataclasses.replace(cohort, test=sections), "lognorm", columns, seed, only=(RIDGE,))[RIDGE]
    oracle = np.mean([statistics.pearson(x, y) for x, y in zip(truth, measured, strict=True)], axis=0)
    with_measured, with_truth = (_compared(lognorm, y, sections, kind, seed) for y in (measured, truth))
    found = {}
    for name, of in with_measured.items():
        own = _of(kind, name)
        bounds = {RIDGE: float(ridge.genes[own].mean()), classes.ORACLE: float(oracle[own].mean())}
        found[name] = {"measured": of, "truth": with_truth[name], "bounds": bounds, **_skills(of, bounds)}
    return found


def _skills(measured: dict[str, Any], bounds: dict[str, float]) -> dict[str, Any]:
    """The skill of each read, and its difference to the grid's; None where a ratio would be one of noise."""
    skills = {read: classes.skill({MODEL: of["value"], **bounds}) for read, of in measured["scores"].items()}
    room = bounds[classes.ORACLE] - bounds[RIDGE]
    less = {
        read: None if skills[GRID] is None else {key: value / room for key, value in of.items()}
        for read, of in measured["less_grid"].items()
    }
    return {"skill": skills, "skill_less_grid": less}


def _inside(
    asked: list[Cells], kind: npt.NDArray[np.str_], log_share: dict[str, list[Floats]], seed: int,
    keep: list[npt.NDArray[np.bool_]],
) -> dict[str, Any]:  # fmt: skip
    """The table `inside`, of the cells of each section at `keep`; empty where it keeps none."""
    some = [i for i, kept in enumerate(keep) if kept.any()]
    if not some:
        return {}
    sections = [take(asked[i].section, keep[i]) for i in some]

    def left(values: list[Floats]) -> list[Floats]:
        return [centred(values[i][keep[i]], asked[i].disc[keep[i]]) for i in some]

    truth = left([np.log(np.maximum(cells.share, _LEAST)) for cells in asked])
    cells = sum(int(keep[i].sum()) for i in some)
    predicted = {read: left(values) for read, values in log_share.items()}
    return {"cells": cells, "classes": _compared(predicted, truth, sections, kind, seed)}


def text(values: dict[str, Any]) -> str:
    """Tables as Markdown."""
    parts = []
    if "cells" in values:
        parts += [_ABOUT.format(**values["asked"]), "### Cells, with what was measured", _measured(values)]
        parts += ["### Cells, with the truth", _reads({n: of["truth"] for n, of in values["cells"].items()}, values)]
        for name, of in values["inside"].items():
            if of:
                head = f"### Inside a spot's area, with the truth: {name} ({of['cells']} cells)"
                parts += [head, _reads(of["classes"], values)]
    else:
        parts.append(f"No table of cells: {values['no_cells']}.")
    return "\n\n".join([*parts, "### Additivity", additivity.text(values["additivity"])])


def _measured(values: dict[str, Any]) -> str:
    head = ["class", "genes", RIDGE, classes.ORACLE, *READS, f"{OWN_TILE} - {GRID}",
            *(f"skill, {read}" for read in READS), f"skill, {OWN_TILE} - {GRID}"]  # fmt: skip
    rows: list[list[object]] = []
    for name, of in values["cells"].items():
        skills = ["-" if skill is None else f"{skill:.3f}" for skill in of["skill"].values()]
        rows.append([
            name, values["genes"][name], *(f"{of['bounds'][key]:.3f}" for key in (RIDGE, classes.ORACLE)),
            *(told(of["measured"]["scores"][read]) for read in READS), told(of["measured"]["less_grid"][OWN_TILE], "+"),
            *skills, told(of["skill_less_grid"][OWN_TILE], "+"),
        ])  # fmt: skip
    return table(head, rows)


def _reads(of: dict[str, Any], values: dict[str, Any]) -> str:
    rows = [
        [name, values["genes"][name], *(told(entry["scores"][read]) for read in READS),
         *(told(entry["less_grid"][read], "+") for read in READS if read != GRID)]
        for name, entry in of.items()
    ]  # fmt: skip
    return table(["class", "genes", *READS, *(f"{read} - {GRID}" for read in READS if read != GRID)], rows)


_ABOUT = """{cells} cells of {sections} sections: those that share one of {discs} discs of 55 um with another cell. The
same weights read each cell from the maps of the tiles of a grid, as they were trained; from a tile of its own, centred
on it; and as the mean of the grid's tile that holds it. Of {white:.1%} of the cells a part of the own tile is not
stored and white. Mean Pearson within a section, 95 % interval of a bootstrap of spatial blocks, differences paired.
Class e is noise, whose truth is constant within a section: 0 by rule. Skill lies between colour ridge (0) and the
oracle (1), which are held fixed in the interval of its difference. Measured lognorm of cells hangs on their depth, of
every gene, and a predicted depth explains some of it: what class e scores with what was measured is that alone."""
