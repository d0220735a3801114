"""Synthetic tissue: how well each class of genes is predicted, between colour alone and all that can be known.

In: an export, a cohort of synthetic sections, the folder with their truth. Out: per class the mean Pearson of the
model, of colour ridge, of true depth, of the oracle (the expected composition, given the latents) and of the
control, and

    skill = (model - colour ridge) / (oracle - colour ridge)

    a  visible by colour and density       d  spatial fields of expression alone
    b  visible by texture or arrangement   e  noise and donor: no method may score
    c  niche: depends on a source 100-250 um away
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storm.evaluate import statistics, targets
from storm.evaluate.expression import MODEL, Cohort, baseline_scores, model_predictions
from storm.evaluate.sections import Section
from storm.export import Pretrained
from storm.schema import LOGNORM_SCALE

Floats = npt.NDArray[np.float64]
SHOWN = ("colour ridge", "true depth (measured, no image)", "colour ridge, patches shuffled")
ORACLE = "oracle"


def class_table(pretrained: Pretrained, cohort: Cohort, truth_dir: Path, seed: int = 0) -> dict[str, Any]:
    """Class -> genes, the mean Pearson of each method on target lognorm, and the skill.

    Raises:
        ValueError: a test section has no truth, or another one.
    """
    return with_model(pretrained, cohort, references(cohort, truth_dir, seed))


@dataclass(frozen=True)
class References:
    """What a model's scores stand beside, the same for every model on one cohort."""

    columns: npt.NDArray[np.int64]  # [K] genes of the cohort that the truth knows
    kind: npt.NDArray[np.str_]  # [K] their classes
    measured: list[Floats]  # [N, K] of each test section, lognorm
    scores: dict[str, Floats]  # method -> [K], mean over the sections

    def means(self, genes_K: Floats) -> dict[str, float]:
        """Class -> mean over its genes."""
        return {str(name): float(genes_K[self.kind == name].mean()) for name in sorted(set(self.kind))}


def references(cohort: Cohort, truth_dir: Path, seed: int = 0) -> References:
    """The baselines that are shown, and the oracle. Raises ValueError as `class_table`."""
    kind, expected = read_truths(truth_dir, cohort.test, cohort.gene_ids)
    columns = np.flatnonzero(kind != "")
    measured = [targets.lognorm(section.counts[:, columns], section.depth) for section in cohort.test]
    oracle = [np.log1p(LOGNORM_SCALE * values[:, columns]) for values in expected]
    found = baseline_scores(cohort, "lognorm", columns, seed, only=SHOWN)
    scores = {name: found[name].genes for name in SHOWN} | {ORACLE: _pearson(oracle, measured).mean(0)}
    return References(columns, kind[columns], measured, scores)


def with_model(pretrained: Pretrained, cohort: Cohort, known: References) -> dict[str, Any]:
    """The table of `class_table`, where the references are known."""
    predicted = model_predictions(pretrained, cohort, [cohort.gene_ids[i] for i in known.columns])["lognorm"]
    each = _pearson(predicted, known.measured)
    means = {name: known.means(genes) for name, genes in {MODEL: each.mean(0), **known.scores}.items()}
    classes = {}
    for name in sorted(set(known.kind)):
        scores = {method: of[name] for method, of in means.items()}
        classes[str(name)] = {"genes": int((known.kind == name).sum()), "scores": scores, "skill": skill(scores)}
    donors = _by_donor(each, cohort.test, known.kind)
    return {"target": "lognorm", "methods": list(means), "classes": classes, "model_by_donor": donors}


def _pearson(predicted: list[Floats], measured: list[Floats]) -> Floats:
    """[S, K] within each section."""
    return np.stack([statistics.pearson(x, y) for x, y in zip(predicted, measured, strict=True)])


def _by_donor(each: Floats, sections: list[Section], kind: npt.NDArray[np.str_]) -> dict[str, list[float]]:
    """Class -> mean of scores [S, K] for each test donor, in the order of their names (which are not told)."""
    donors = sorted({section.donor for section in sections})
    member = np.array([[section.donor == donor for section in sections] for donor in donors])
    return {str(name): [float(each[own][:, kind == name].mean()) for own in member] for name in sorted(set(kind))}


def skill(means: dict[str, float]) -> float | None:
    """None where the oracle is hardly better than colour ridge: a ratio of noise says nothing."""
    room = means[ORACLE] - means["colour ridge"]
    return (means[MODEL] - means["colour ridge"]) / room if room > 0.02 else None


def read_truths(
    folder: Path, sections: list[Section], gene_ids: list[str]
) -> tuple[npt.NDArray[np.str_], list[Floats]]:
    """(class of each gene [K], '' where the truth does not know it; expected composition [N, K] of each section).

    Raises:
        ValueError: a section has no truth, or another one, or one that knows other genes than that of the first, or
            none of these.
    """
    kinds, expected = zip(*(_read_truth(folder / f"{s.slide_id}.npz", s, gene_ids) for s in sections), strict=True)
    for section, kind in zip(sections, kinds, strict=True):
        if other := int((kind != kinds[0]).sum()):
            raise ValueError(
                f"{folder / section.slide_id}.npz: {other} genes have another class than in {sections[0].slide_id}.npz"
                ", or none; give the truth folder of one corpus"
            )
    if not (kinds[0] != "").any():
        fact = f"knows none of the {len(gene_ids)} genes that sections and model share (as {gene_ids[0]})"
        raise ValueError(
            f"{folder / sections[0].slide_id}.npz: {fact}; give the truth folder of the store's own corpus"
        )
    return kinds[0], list(expected)


def truth_arrays(path: Path, *names: str) -> list[npt.NDArray]:
    """Some of the arrays of a slide's truth. Raises ValueError naming the file where it does not hold them."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except (OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        fact = f"not readable as the truth of a slide ({error})"
        raise ValueError(f"{path}: {fact}; give the truth folder that python -m data_prep.synthetic wrote") from None


def _read_truth(path: Path, section: Section, gene_ids: list[str]) -> tuple[npt.NDArray[np.str_], Floats]:
    if not path.is_file():
        raise ValueError(f"{path}: no truth of this slide; give the truth folder of the store's own corpus")
    gene_id, profile_id, kinds, expected = truth_arrays(path, "gene_id", "profile_id", "gene_class", "expected")
    genes = {str(name): i for i, name in enumerate(gene_id)}
    rows = {str(name): i for i, name in enumerate(profile_id)}
    missing = [name for name in section.ids if name not in rows]
    if missing:
        raise ValueError(f"{path}: {len(missing)} profiles (as {missing[0]!r}) are not in it; it is of another corpus")
    column = np.array([genes.get(gene_id, -1) for gene_id in gene_ids])
    known = np.where(column >= 0, kinds[column], "")
    values = expected[[rows[name] for name in section.ids]][:, column].astype(np.float64)
    return known, np.where(column >= 0, values, 0.0)
