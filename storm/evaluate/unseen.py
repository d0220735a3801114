"""Unseen genes: how well genes outside a model's vocabulary are predicted from their descriptors alone.

In: an export that was trained with descriptors, a cohort, a table with rows for genes that the model has never seen.
Out: a table (plain values, for JSON). The genes are those that every test section measured, that the table holds and
that are not in the vocabulary. H&E only, target lognorm, Pearson within a section.

A table that knows nothing must score nothing. Beside it the same model with the rows of the unseen genes dealt among
them at random, DRAWS times: what is left of the score then is not what the descriptors tell of their own gene.
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

Floats = npt.NDArray[np.float64]
PROTOCOL = "2, H&E to expression, genes outside the vocabulary"
MODEL, SHUFFLED = "STORM (this project), H&E only", "the same, descriptors shuffled"
DRAWS = 5


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
    ids, rng = list(known), np.random.default_rng([seed, len(known)])
    sections = [open_section(store, ids) for store in stores]
    measured = [targets.lognorm(section.counts, section.depth) for section in sections]
    scores = {
        MODEL: score([_predicted(pretrained, cohort, sections, rows)], measured, sections, seed),
        SHUFFLED: score(
            [_predicted(pretrained, cohort, sections, rows[rng.permutation(len(rows))]) for _ in range(DRAWS)],
            measured, sections, seed,
        ),
    }  # fmt: skip
    return {
        **provenance(pretrained, cohort, seed, PROTOCOL), "genes": len(ids), "known_genes": len(pretrained.genes),
        "scores": {name: of.json() for name, of in scores.items()},
        "versus_shuffled": scores[MODEL].minus(scores[SHUFFLED]).json(),
        "by_gene": dict(zip(ids, scores[MODEL].genes.tolist(), strict=True)),
    }  # fmt: skip


def _predicted(
    pretrained: Pretrained, cohort: Cohort, sections: list[Section], rows: npt.NDArray[np.float32]
) -> list[Floats]:
    """log1p(1e4 * composition) [N, U] of each section."""
    found = []
    for section in sections:
        slide = inference.prepare(pretrained, cohort.stores[section.slide_id])
        asked = inference.predict(pretrained, slide, np.zeros(0, np.int64), section.rows, unseen=rows)
        found.append(np.log1p(targets.SCALE * asked.composition.astype(np.float64)))
    return found


def text(values: dict[str, Any]) -> str:
    """The table as Markdown."""
    about = (
        f"{values['genes']} genes that no training profile showed, beside {values['known_genes']} known ones; target\n"
        f"lognorm, the prediction is composition alone. Shuffled: the mean of {DRAWS} draws."
    )
    gain = f"* The model - shuffled: {told(values['versus_shuffled'], '+')}, paired."
    rows: list[list[object]] = [[name, told(of)] for name, of in values["scores"].items()]
    return "\n\n".join([about, markdown(["method", "mean Pearson"], rows), gain])
