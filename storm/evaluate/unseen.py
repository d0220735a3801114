"""Unseen genes: how well genes outside a model's vocabulary are predicted from their descriptors alone.

In: an export that was trained with descriptors, a cohort, a table with rows for genes that the model has never seen.
Out: a table (plain values, for JSON). The genes are those that every test section measured, that the table holds and
that are not in the vocabulary. H&E only, target lognorm, Pearson within a section.

A table that knows nothing must score nothing. What such a table would score is told by the same model with the rows of
the unseen genes dealt among them at random, DRAWS times: the mean is not what descriptors tell of their own gene, and
the spread is that of so few genes, which a bootstrap of the sections' blocks does not show. p is the share of deals
that score as much. An unseen gene's prediction hangs on its own row alone, so a deal permutes columns.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from storm import inference
from storm.descriptors import Descriptors
from storm.evaluate import targets
from storm.evaluate.expression import Cohort, provenance, score
from storm.evaluate.sections import Section, open_section
from storm.evaluate.statistics import told
from storm.export import Pretrained
from storm.markdown import table as markdown
from storm.schema import LOGNORM_SCALE

Floats = npt.NDArray[np.float64]
PROTOCOL = "2, H&E to expression, genes outside the vocabulary"
MODEL, DEALT = "STORM (this project), H&E only", "the same, descriptors dealt at random"
DRAWS = 999


def evaluate(pretrained: Pretrained, cohort: Cohort, table: Descriptors | None, seed: int = 0) -> dict[str, Any]:
    """The mean Pearson over the unseen genes with its interval, that of shuffled descriptors, and each gene's.

    Raises:
        ValueError: the table is not of the kind the model was trained with.
    """
    if table is None or not pretrained.config.descriptor_width:
        reason = "no table is given; --descriptors names one" if table is None else inference.refusal(pretrained)
        return {"protocol": PROTOCOL, "skipped": reason}
    stores = [cohort.stores[section.slide_id] for section in cohort.test]
    common = set.intersection(*(set(store.genes().ids) for store in stores)) - set(pretrained.genes.ids)
    known, rows = inference.unseen_rows(pretrained, table, sorted(common))
    if not known:
        reason = "the test sections share no gene that the table holds and the vocabulary does not"
        return {"protocol": PROTOCOL, "skipped": reason}
    ids = list(known)
    sections = [open_section(store, ids) for store in stores]
    measured = [targets.lognorm(section.counts, section.depth) for section in sections]
    predicted = _predicted(pretrained, cohort, sections, rows)
    own = score([predicted], measured, sections, seed)
    drawn = dealt(predicted, measured, np.random.default_rng([seed, len(ids)]))
    null = {"value": float(drawn.mean()), **dict(zip(("low", "high"), np.percentile(drawn, [2.5, 97.5]), strict=True))}
    return {
        **provenance(pretrained, cohort, seed, PROTOCOL), "genes": len(ids), "known_genes": len(pretrained.genes),
        "scores": {MODEL: own.json(), DEALT: {name: float(value) for name, value in null.items()}},
        "p": float((1 + (drawn >= own.value - 1e-9).sum()) / (1 + len(drawn))), "draws": len(drawn),
        "by_gene": dict(zip(ids, own.genes.tolist(), strict=True)),
    }  # fmt: skip


def dealt(predicted: list[Floats], measured: list[Floats], rng: np.random.Generator) -> Floats:
    """[DRAWS] mean Pearson where each gene is given the prediction [N, U] of one drawn without replacement."""
    every = np.mean([_pearsons(x, y) for x, y in zip(predicted, measured, strict=True)], axis=0)
    genes = np.arange(len(every))
    return np.array([every[rng.permutation(genes), genes].mean() for _ in range(DRAWS)])


def _pearsons(x: Floats, y: Floats) -> Floats:
    """[U, U] of every column of x with every column of y; 0 where one is constant."""
    unit = []
    for values in (x - x.mean(0), y - y.mean(0)):
        size = np.linalg.norm(values, axis=0)
        unit.append(values / np.where(size > 1e-12 * len(values), size, np.inf))
    return np.asarray(unit[0].T @ unit[1])


def _predicted(
    pretrained: Pretrained, cohort: Cohort, sections: list[Section], rows: npt.NDArray[np.float32]
) -> list[Floats]:
    """log1p(1e4 * composition) [N, U] of each section."""
    found = []
    for section in sections:
        slide = inference.prepare(pretrained, cohort.stores[section.slide_id])
        asked = inference.predict(pretrained, slide, np.zeros(0, np.int64), section.rows, unseen=rows)
        found.append(np.log1p(LOGNORM_SCALE * asked.composition.astype(np.float64)))
    return found


def text(values: dict[str, Any]) -> str:
    """The table as Markdown."""
    about = (
        f"{values['genes']} genes that no training profile showed, beside {values['known_genes']} known ones; target\n"
        f"lognorm, the prediction is composition alone. In brackets: a bootstrap of blocks, and the middle 95 % of\n"
        f"{values['draws']} deals; a deal scores as much as the model with p = {values['p']:.3f}."
    )
    rows: list[list[object]] = [[name, told(of)] for name, of in values["scores"].items()]
    return "\n\n".join([about, markdown(["method", "mean Pearson"], rows)])
