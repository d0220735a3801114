"""Protocol 5, spatial domains: clusters of frozen embeddings against annotated domains, section by section.

In: an export, a cohort, labels per profile. Out: a table (plain values, for JSON): ARI, NMI and F1 of the boundaries.

k is the number of annotated domains. Backends: a Gaussian mixture and k-means, SEEDS starts each; Leiden needs a
library that this project does not bring, and is left out. Primary: no refinement. Secondary: one majority vote.
Baselines of equal receptive field are smoothed over neighbours. Components and radius of every method, the model's too,
are those of the best mean ARI (k-means) on training sections, or the first of each where none is labelled.
"""

import csv
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score
from sklearn.preprocessing import StandardScaler

from storm.evaluate import classes, clusters, statistics, targets
from storm.evaluate.expression import Cohort, gene_rules, provenance, read
from storm.evaluate.sections import Section, take
from storm.evaluate.statistics import told
from storm.export import Pretrained
from storm.markdown import table

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
PROTOCOL = "5, spatial domains"
SEEDS, SEEDS_TO_CHOOSE = 10, 2
COMPONENTS = (15, 30)
RADII = (1.5, 2.5, 3.5)  # of smoothing, in distances to the nearest profile
LEAST_PROFILES = 30  # with a label
MODELS = {"STORM (this project), H&E and counts": True, "STORM (this project), H&E only": False}  # whether counts
SMOOTHED = "STORM (this project), H&E and counts, smoothed"  # with the spatial level off, a baseline of equal reach


@dataclass(frozen=True)
class Labelled:
    """The labelled profiles of a section, N of them."""

    section: Section
    label: Ints  # [N] 0..k-1

    @property
    def k(self) -> int:
        return int(self.label.max()) + 1

    def near(self, radius: float = RADII[0]) -> sparse.csr_array:
        """Profiles within `radius` times the usual distance to the nearest one."""
        return clusters.neighbours(self.section.xy_um, radius)


def read_labels(section: Section, truth_dir: Path | None, labels_dir: Path | None) -> list[str]:
    """[N] the domain of each profile, '' where none is known.

    From <labels_dir>/<slide>.csv with the columns profile_id and label, or the truth of synthetic tissue.
    """
    path = labels_dir / f"{section.slide_id}.csv" if labels_dir else None
    if path and path.is_file():
        with path.open(newline="", encoding="utf-8-sig") as handle:
            lines = csv.DictReader(handle)
            if not {"profile_id", "label"} <= set(lines.fieldnames or ()):
                raise ValueError(f"{path}: its first line lacks the columns profile_id and label; write them there")
            known = {line["profile_id"]: line["label"] or "" for line in lines}
        found = [known.get(name, "") for name in section.ids]
        if not any(found):
            raise ValueError(f"{path}: names none of this slide's profiles (as {section.ids[0]!r}); mend profile_id")
        return found
    path = truth_dir / f"{section.slide_id}.npz" if truth_dir else None
    if path and path.is_file():
        profile_id, domain = classes.truth_arrays(path, "profile_id", "domain")
        by_id = dict(zip(profile_id.tolist(), domain.tolist(), strict=True))
        return [str(by_id.get(name, "")) for name in section.ids]
    return [""] * len(section.ids)


def labelled(section: Section, names: list[str]) -> tuple[Labelled, npt.NDArray[np.bool_]] | None:
    """(the labelled profiles, which these are [N]); None with too few of them, or one domain alone."""
    keep = np.array([name != "" for name in names])
    kinds = sorted(set(names) - {""})
    if keep.sum() < LEAST_PROFILES or len(kinds) < 2:
        return None
    return Labelled(take(section, keep), np.array([kinds.index(n) for n in names if n], dtype=np.int64)), keep


@dataclass(frozen=True)
class Features:
    """What one method clusters: features [N, F] of each section, and whether neighbours are averaged."""

    sections: list[Floats]
    smoothed: bool


def reduce(x: Floats, near: sparse.csr_array | None, components: int) -> Floats:
    """Principal components of a section's features, then their mean over the neighbours."""
    found = PCA(min(components, *x.shape), random_state=0).fit_transform(x)
    return np.asarray(found if near is None else near @ found)


def choose(features: Features, sections: list[Labelled], seed: int) -> tuple[int, float]:
    """(components, radius) of the best mean ARI of k-means on these sections."""
    options = list(itertools.product(COMPONENTS, RADII if features.smoothed else RADII[:1]))
    if not sections:
        return options[0]
    found = []
    for components, radius in options:
        scores = []
        for x, labels in zip(features.sections, sections, strict=True):
            reduced = reduce(x, labels.near(radius) if features.smoothed else None, components)
            for i in range(SEEDS_TO_CHOOSE):
                cluster = clusters.k_means(reduced, labels.k, seed + i)
                scores.append(
                    clusters.adjusted_rand(clusters.contingency(labels.label, cluster, np.zeros_like(cluster)))[0]
                )
        found.append(float(np.mean(scores)))
    return options[int(np.argmax(found))]


def _score(features: Features, sections: list[Labelled], chosen: tuple[int, float], backend: str, seed: int) -> dict:
    """ARI, NMI and boundary F1 of one method and backend over sections and seeds; `replicates` [R] of the ARI."""
    ari, nmi, edge, voted, replicates = [], [], [], [], []
    for x, labels in zip(features.sections, sections, strict=True):
        near = labels.near()
        reduced = reduce(x, labels.near(chosen[1]) if features.smoothed else None, chosen[0])
        block = statistics.blocks(labels.section.xy_um)
        weight = statistics.block_weights(block, seed)
        drawn = []
        for cluster in (clusters.BACKENDS[backend](reduced, labels.k, seed + i) for i in range(SEEDS)):
            counts = clusters.contingency(labels.label, cluster, block)
            ari.append(float(clusters.adjusted_rand(counts.sum(0))))
            drawn.append(clusters.adjusted_rand(np.einsum("rb,bkc->rkc", weight, counts)))
            nmi.append(float(normalized_mutual_info_score(labels.label, cluster)))
            edge.append(clusters.boundary_f1(near, labels.label, cluster))
            again = clusters.contingency(labels.label, clusters.vote(near, cluster), block)
            voted.append(float(clusters.adjusted_rand(again.sum(0))))
        replicates.append(np.median(drawn, axis=0))
    per_section = np.median(np.reshape(ari, (len(sections), SEEDS)), axis=1)
    return {
        "ari": float(per_section.mean()), "replicates": np.mean(replicates, axis=0),
        **{f"{name}_quartiles": np.percentile(of, [25, 50, 75]).tolist()
           for name, of in (("ari", ari), ("nmi", nmi), ("boundary_f1", edge), ("voted_ari", voted))},
    }  # fmt: skip


def methods(pretrained: Pretrained, cohort: Cohort, sections: list[Section]) -> dict[str, Features]:
    """Name -> features of all profiles of the sections: the model's embeddings, and the baselines'."""
    columns = gene_rules(cohort)["var"]
    expressed = [targets.lognorm(s.counts[:, columns], s.depth) for s in sections]
    scaled = [StandardScaler().fit_transform(x) for x in expressed]
    colour = [StandardScaler().fit_transform(s.colour) for s in sections]
    image = [StandardScaler().fit_transform(x) for x in read(pretrained, cohort, ("feature",), sections)["feature"]]
    both = [
        np.concatenate([x / np.sqrt(x.shape[1]), c / np.sqrt(c.shape[1])], axis=1)
        for x, c in zip(scaled, colour, strict=True)
    ]
    found = {
        name: Features(read(pretrained, cohort, ("embedding",), sections, counts)["embedding"], smoothed=False)
        for name, counts in MODELS.items()
    }
    own = next(iter(found.values())).sections
    return found | {
        SMOOTHED: Features(own, smoothed=True),
        "PCA of expression": Features(scaled, smoothed=False), "PCA of expression, smoothed": Features(scaled, True),
        "colour, smoothed": Features(colour, True), "image features, smoothed": Features(image, True),
        "expression and colour, smoothed": Features(both, True),
    }  # fmt: skip


def evaluate(
    pretrained: Pretrained, cohort: Cohort, seed: int, truth_dir: Path | None, labels_dir: Path | None
) -> dict[str, Any]:
    """The table of protocol 5 as plain values."""
    sides: list[list[Labelled]] = []
    features: list[dict[str, Features]] = []
    for part in (cohort.train, cohort.test):
        found = [(s, labelled(s, read_labels(s, truth_dir, labels_dir))) for s in part]
        known = [(s, entry) for s, entry in found if entry]
        sides.append([entry[0] for _, entry in known])
        whole = methods(pretrained, cohort, [s for s, _ in known]) if known else {}
        features.append({
            name: Features([x[entry[1]] for x, (_, entry) in zip(of.sections, known, strict=True)], of.smoothed)
            for name, of in whole.items()
        })  # fmt: skip
    if not sides[1]:
        cure = "give --labels, or --truth for synthetic tissue"
        return {"protocol": PROTOCOL, "skipped": f"no test section has labelled profiles enough; {cure}"}
    chosen = {name: choose(features[0].get(name, of), sides[0], seed) for name, of in features[1].items()}
    scores = {
        backend: {name: _score(of, sides[1], chosen[name], backend, seed) for name, of in features[1].items()}
        for backend in clusters.BACKENDS
    }
    return {
        **provenance(pretrained, cohort, seed, PROTOCOL, "H&E and counts; H&E only"),
        "sections": len(sides[1]), "sections_to_choose": len(sides[0]), "seeds": SEEDS,
        "domains": [labels.k for labels in sides[1]], "profiles": sum(len(labels.label) for labels in sides[1]),
        "chosen": {name: {"components": c, "radius": r} for name, (c, r) in chosen.items()},
        "backends": {backend: _compared(of) for backend, of in scores.items()},
    }  # fmt: skip


def _compared(scores: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The scores with intervals, and each embedding against the best baseline, paired."""
    best = max((name for name in scores if name not in (*MODELS, SMOOTHED)), key=lambda name: scores[name]["ari"])
    found: dict[str, Any] = {"methods": {}, "versus_best_baseline": {}}
    for name, entry in scores.items():
        plain = {key: value for key, value in entry.items() if key not in ("ari", "replicates")}
        found["methods"][name] = {"ari": statistics.interval(entry["ari"], entry["replicates"]).json(), **plain}
    for name in MODELS:
        gain = scores[name]["ari"] - scores[best]["ari"], scores[name]["replicates"] - scores[best]["replicates"]
        found["versus_best_baseline"][name] = {"baseline": best, **statistics.interval(*gain).json()}
    return found


def text(values: dict[str, Any]) -> str:
    """Tables as Markdown."""
    parts = [_ABOUT.format(**values)]
    for backend, of in values["backends"].items():
        rows: list[list[object]] = []
        for name, entry in of["methods"].items():
            quartiles = [entry[f"{key}_quartiles"] for key in ("ari", "nmi", "boundary_f1", "voted_ari")]
            rows.append([name, told(entry["ari"]), *(f"{q[1]:.3f} ({q[0]:.3f} to {q[2]:.3f})" for q in quartiles)])
        head = ["method", "ARI", "ARI, median (IQR)", "NMI", "boundary F1", "ARI after one vote"]
        lines = [
            f"* {name} - best baseline ({v['baseline']}): {told(v, '+')}, paired."
            for name, v in of["versus_best_baseline"].items()
        ]
        parts += [f"### {backend}", table(head, rows), "\n".join(lines)]
    return "\n\n".join(parts)


_ABOUT = """{sections} sections, {profiles} labelled profiles, k as annotated, {seeds} starts. First column: median over
starts, mean over sections, and the 95 % interval of a bootstrap of spatial blocks; then median and quartiles over
starts and sections. ARI rewards smoothing; the F1 of boundary profiles does not. Components and radius of every method
were chosen on {sections_to_choose} labelled training sections."""
