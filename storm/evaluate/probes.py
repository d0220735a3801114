"""Protocol 8, shortcut probes: what of section and donor can be read from the features, beside what biology they keep.

In: an export, a cohort. Out: a table (plain values, for JSON), per level: colour, image features, embeddings.

Logistic regression on principal components tells sections of one donor apart, and donors; it is tested on spatial
blocks that it has not seen (FOLDS folds of blocks of each section). Figure: balanced accuracy, chance 1 / number of
classes. Biology that is kept: mean Pearson of a ridge from the same features to expression, fitted on training
sections, within test sections (target lognorm, rule var). Wanted: less leakage at equal skill.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from storm.evaluate import statistics, targets
from storm.evaluate.baselines import components, ridge_predict
from storm.evaluate.expression import Cohort, gene_rules, inputs, provenance, read, score
from storm.evaluate.sections import Section
from storm.evaluate.statistics import told
from storm.export import Pretrained
from storm.markdown import table

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
PROTOCOL = "8, shortcut probes"
FOLDS = 5
_ITERATIONS = 500  # some tens are taken
_LEAST = 1e-3
LEVELS = {"image features": ("feature", False), "embedding, H&E only": ("embedding", False)} | {
    "embedding, H&E and counts": ("embedding", True)
}  # level -> the model's output, and whether it sees counts


def folds(sections: list[Section], seed: int) -> list[Ints]:
    """[N] fold of each profile of each section: whole blocks, dealt at random within the section."""
    found = []
    for i, section in enumerate(sections):
        block = statistics.blocks(section.xy_um, least=FOLDS)
        order = np.random.default_rng([seed, i]).permutation(int(block.max()) + 1)
        found.append(order[block] % FOLDS)
    return found


def unit_scale(x: Floats) -> Floats:
    """[F] sd of each column, no less than _LEAST of the largest: what is 0 but for rounding is not blown up.

    Components differ in variance by orders; on one scale the regression converges in tens of iterations.
    """
    sd = x.std(0)
    return np.asarray(np.maximum(sd, max(_LEAST * float(sd.max()), 1e-12)))


def hits(features: list[Floats], label: list[int], fold: list[Ints]) -> list[Floats]:
    """[N] 1 where a held-out profile's label is told right, for each section; `label` is one per section."""
    x, y = np.concatenate(features), np.repeat(label, [len(f) for f in features])
    held = np.concatenate(fold)
    found = np.zeros(len(x))
    for i in np.unique(held):
        train, test = held != i, held == i
        if len(np.unique(y[train])) < 2:
            continue
        own, asked = components(x[train], x[test])
        scale = unit_scale(own)
        model = LogisticRegression(class_weight="balanced", max_iter=_ITERATIONS).fit(own / scale, y[train])
        found[test] = model.predict(asked / scale) == y[test]
    return np.split(found, np.cumsum([len(f) for f in features])[:-1])


def probe(features: list[Floats], label: list[int], sections: list[Section], seed: int) -> tuple[float, Floats]:
    """(balanced accuracy, its replicates [R]): the mean over classes of the mean over their sections."""
    right = hits(features, label, folds(sections, seed))
    kinds = np.array(label)
    drawn = [statistics.block_means(r, statistics.blocks(s.xy_um), seed) for r, s in zip(right, sections, strict=True)]
    value = np.mean([np.mean([right[i].mean() for i in np.flatnonzero(kinds == k)]) for k in np.unique(kinds)])
    replicates = [np.mean([drawn[i] for i in np.flatnonzero(kinds == k)], axis=0) for k in np.unique(kinds)]
    return float(value), np.mean(replicates, axis=0)


def tasks(sections: list[Section]) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Task -> its problems: (numbers of the sections, label of each). Sections are told apart within each donor."""
    donors = sorted({s.donor for s in sections})
    members = [[i for i, s in enumerate(sections) if s.donor == donor] for donor in donors]
    found = {"section within donor": [(own, list(range(len(own)))) for own in members if len(own) > 1]}
    if len(donors) > 1:
        found["donor"] = [(list(range(len(sections))), [donors.index(s.donor) for s in sections])]
    return {name: problems for name, problems in found.items() if problems}


def leakage(features: list[Floats], sections: list[Section], seed: int) -> dict[str, Any]:
    """Task -> balanced accuracy with its interval (mean over donors), and chance."""
    found = {}
    for name, problems in tasks(sections).items():
        probed = [probe([features[i] for i in own], label, [sections[i] for i in own], seed) for own, label in problems]
        by_chance = float(np.mean([1 / len(set(label)) for _, label in problems]))
        value, replicates = (np.mean(part, axis=0) for part in zip(*probed, strict=True))
        found[name] = {**statistics.interval(float(value), replicates).json(), "chance": by_chance}
    return found


def biology(features: tuple[list[Floats], list[Floats]], cohort: Cohort, columns: Ints, seed: int) -> dict[str, float]:
    """Mean Pearson of a ridge from features (train, test) to expression, with its interval."""
    y, measured = (
        [targets.lognorm(s.counts[:, columns], s.depth) for s in part] for part in (cohort.train, cohort.test)
    )
    x, asked = components(*(np.concatenate(part) for part in features))
    predicted = ridge_predict(x, np.concatenate(y), asked, inputs(cohort.train).fold, standardise=False)
    ends = np.cumsum([len(s.rows) for s in cohort.test])[:-1]
    return score([np.split(predicted, ends)], measured, cohort.test, seed).json()


def evaluate(pretrained: Pretrained, cohort: Cohort, seed: int = 0) -> dict[str, Any]:
    """The table of protocol 8 as plain values."""
    if not cohort.train or not tasks(cohort.train + cohort.test):
        reason = "needs training sections, and two donors or a donor with two sections"
        return {"protocol": PROTOCOL, "skipped": reason}
    columns, sections = gene_rules(cohort)["var"], cohort.train + cohort.test
    levels = {"colour": [s.colour for s in sections]} | {
        name: read(pretrained, cohort, (output,), sections, counts)[output] for name, (output, counts) in LEVELS.items()
    }
    found = {}
    for name, features in levels.items():
        sides = features[: len(cohort.train)], features[len(cohort.train) :]
        found[name] = {
            "leakage": leakage(features, sections, seed),
            "biology": biology(sides, cohort, columns, seed),
        }
    return {
        **provenance(pretrained, cohort, seed, PROTOCOL, "H&E only; H&E and counts"),
        "genes": len(columns), "folds": FOLDS, "levels": found,
    }  # fmt: skip


def text(values: dict[str, Any]) -> str:
    """The table as Markdown."""
    first = next(iter(values["levels"].values()))["leakage"]
    rows: list[list[object]] = [
        [name, *(told(entry["leakage"][task]) for task in first), told(entry["biology"])]
        for name, entry in values["levels"].items()
    ]
    head = [f"{task} (chance {entry['chance']:.2f})" for task, entry in first.items()]
    about = (
        "Balanced accuracy of logistic regression on spatial blocks that it was not fitted on (it was on those beside\n"
        "them), over training and test sections, beside the mean Pearson of a ridge from the same features to\n"
        "expression on the test sections. A level that sees counts holds what it is asked for there."
    )
    return "\n\n".join([about, table(["level", *head, "expression kept"], rows)])
