"""Unseen genes: how well genes outside a model's vocabulary are predicted from their descriptors alone.

In: an export that was trained with descriptors, a cohort, a table with rows for genes that the model has never seen.
Out: plain values for JSON. The genes are those that every test section measured, that the table holds and that are not
in the vocabulary. H&E only, target lognorm, Pearson within a section; a table that knows nothing must score nothing.
"""

from typing import Any

import numpy as np

from storm import inference
from storm.descriptors import Descriptors
from storm.evaluate import targets
from storm.evaluate.expression import Cohort, provenance, score
from storm.evaluate.sections import open_section
from storm.export import Pretrained

PROTOCOL = "2, H&E to expression, genes outside the vocabulary"


def evaluate(pretrained: Pretrained, cohort: Cohort, table: Descriptors, seed: int = 0) -> dict[str, Any]:
    """The mean Pearson over the unseen genes with its interval, and each gene's.

    Raises:
        ValueError: the table is not of the kind the model was trained with.
    """
    stores = [cohort.stores[section.slide_id] for section in cohort.test]
    common = set.intersection(*(set(store.genes().ids) for store in stores)) - set(pretrained.genes.ids)
    known, rows = inference.unseen_rows(pretrained, table, sorted(common))
    if not known:
        reason = "the test sections share no gene that the table holds and the vocabulary does not"
        return {"protocol": PROTOCOL, "skipped": reason}
    ids, nothing = list(known), np.zeros(0, np.int64)
    predicted, measured, sections = [], [], []
    for store in stores:
        section = open_section(store, ids)
        asked = inference.predict(
            pretrained, inference.prepare(pretrained, store), nothing, section.rows, unseen=rows
        )  # fmt: skip
        predicted.append(np.log1p(targets.SCALE * asked.composition.astype(np.float64)))
        measured.append(targets.lognorm(section.counts, section.depth))
        sections.append(section)
    found = score([predicted], measured, sections, seed)
    genes = dict(zip(ids, found.genes.tolist(), strict=True))
    told = provenance(pretrained, cohort, seed, PROTOCOL)
    return {**told, "genes": len(ids), "score": found.json(), "by_gene": genes}
