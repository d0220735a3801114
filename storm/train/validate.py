"""How a model in training does on held-out donors: the same views of the same groups, whatever the step and the ranks.

In: the split `val` of the shards, and the engine. Out: `val/*`, the loss and its parts as in training, and
`val/pearson`, which is read without knowing the losses: log1p(1e4 x share of the counts), predicted from H&E alone and
measured, correlated over the profiles of a section, for each of the genes of highest expected share; the mean over
genes and sections.

View and place of a group are a pure function of (seed, index). The groups are cut into fixed batches, dealt to the
ranks; a rank without one runs another's and counts nothing, so that all run as many forwards. Nothing of training
moves: neither weights, nor the stream, nor torch's generators.
"""

import sys

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storm import losses, schema
from storm.config import RunConfig
from storm.data.batch import BatchSpec, loss_genes, top_genes
from storm.data.corpus import Corpus, open_corpus
from storm.data.order import Place
from storm.data.stream import OTHERS, Loader
from storm.data.view import View, draw_view, plain_view
from storm.train import engine, feature_cache
from storm.train.engine import Engine, World
from storm.train.metrics import PARTS, means, tagged

SPLIT = "val"
GENES = 50  # of val/pearson, at most
_VIEW, _GENES = 101, 102  # keep the generators of different purposes apart
_TINY = 1e-12  # a variance below it counts as none


def _rng(seed: int, purpose: int, index: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index], spawn_key=(purpose,))))


class Validation:
    """The groups that are looked at, and this rank's share of them.

    Raises:
        ValueError: a shard set has no split val, or it is empty.
    """

    def __init__(self, corpus: Corpus, spec: BatchSpec, config: RunConfig, world: World, encoder: str = "") -> None:
        """`encoder`: the fingerprint of the model's, by which cached features are found."""
        for one, name in zip(corpus.sets, corpus.names, strict=True):
            if not one.manifest["splits"].get(SPLIT, {}).get("groups"):
                raise ValueError(
                    f"{name}: has no group of split {SPLIT!r} to validate on; name donors in the manifest's column "
                    "split, and build and pack again (or give pack val_share), or set validation.every_steps=0"
                )
        self._spec, self._config, self._world = spec, config, world
        held_out = open_corpus(config.data, SPLIT)
        self._held_out = held_out.groups
        features = feature_cache.find(held_out, config, encoder) if config.data.features else None
        chosen = min(config.validation.groups, len(self._held_out))
        self._groups = np.arange(chosen) * len(self._held_out) // chosen
        self._loader = Loader(self._held_out, spec, config.mask, config.seed, features)
        self._slides = sorted({slide for part in self._held_out.parts for slide in part.index.slides})
        self._told: set[str] = set()
        self._genes = loss_genes(spec, config.mask.loss_genes, _rng(config.seed, _GENES))
        self._shown = np.flatnonzero(np.isin(self._genes, top_genes(spec, 4 * GENES)))

    def run(self, training: Engine) -> dict[str, float | None]:
        """The metrics by tag, on every rank; all ranks must call it."""
        micro = self._config.data.micro_batch_size
        batches = [self._groups[i : i + micro] for i in range(0, len(self._groups), micro)]
        sums = {name: torch.zeros((), dtype=torch.float64, device=self._world.device) for name in _sum_names()}
        moments = torch.zeros(len(self._slides), 6, len(self._shown), dtype=torch.float64, device=self._world.device)
        with training.evaluating():
            for first in range(0, len(batches), self._world.size):
                mine = first + self._world.rank
                groups = batches[min(mine, len(batches) - 1)]
                read, numbers = self._read(groups.tolist())
                found = self._losses(training, groups, read, numbers)
                rows, values = self._correlated(training, read, numbers)
                if mine < len(batches):
                    sums = {name: total + found[name] for name, total in sums.items()}
                    moments.index_add_(0, rows, values)
        return self._metrics(sums, moments)

    def _read(self, numbers: list[int]) -> tuple[list[schema.Group], list[int]]:
        """Groups and their numbers; where damaged ones are skipped, the next sound one in their place, the same at any
        step."""
        if self._config.data.on_error == "fail":
            return self._held_out.read(numbers), numbers
        found: list[tuple[schema.Group, int]] = []
        for number in numbers:
            places = [Place(0, number, (number + k) % len(self._held_out)) for k in range(OTHERS + 1)]
            group, place, faults = self._loader.sound(places[0], places[1:])
            for fault in set(faults) - self._told:
                print(f"skipped in validation: {fault}", file=sys.stderr, flush=True)
            self._told.update(faults)
            found.append((group, place))
        return [group for group, _ in found], [place for _, place in found]

    def _losses(
        self, training: Engine, groups: npt.NDArray[np.int64], read: list[schema.Group], numbers: list[int]
    ) -> dict[str, Tensor]:
        """Sums and counts of the loss and its parts, of groups as they are shown in training."""
        views = [
            draw_view(group, self._config.mask, _rng(self._config.seed, _VIEW, int(i)), self._spec.panel(group))
            for i, group in zip(groups, read, strict=True)
        ]
        batch = self._batch(read, views, numbers)
        outputs = training.forward(batch)
        found = losses.terms(outputs, batch, self._config.loss.align_over)
        found |= {f"expr_{mode}": term for mode, term in losses.expr_by_mode(outputs, batch).items()}
        return {part: found[part][0] for part in PARTS} | {f"count_{part}": found[part][1] for part in PARTS}

    def _correlated(self, training: Engine, read: list[schema.Group], numbers: list[int]) -> tuple[Tensor, Tensor]:
        """(slide of each region [R], sums over its profiles [R, 6, K] of 1, x, y, x2, y2, xy) from H&E alone."""
        views = [plain_view(group, use_counts=False) for group in read]
        batch = self._batch(read, views, numbers)
        shown = torch.from_numpy(self._shown).to(self._world.device)
        composition_RNK = training.forward(batch)["log_composition"][..., shown].double().exp()
        share_RNK = batch["target_count"][..., shown].double() / batch["target_log_depth"][..., None].double().exp()
        x_RNK, y_RNK = (torch.log1p(schema.LOGNORM_SCALE * x) for x in (composition_RNK, share_RNK))
        mask_RNK = batch["target_mask"][..., shown]
        terms = (torch.ones_like(x_RNK), x_RNK, y_RNK, x_RNK**2, y_RNK**2, x_RNK * y_RNK)
        slide = [self._slides.index(group.meta.slide) for group in read]
        rows_R = torch.tensor(slide, device=self._world.device)[batch["region_group"]]
        return rows_R, torch.stack([(term * mask_RNK).sum(1) for term in terms], dim=1)

    def _batch(self, read: list[schema.Group], views: list[View], numbers: list[int]) -> dict[str, Tensor]:
        """On the device; cached features in the first variant, the groups as they are."""
        batch = self._loader.with_features(read, views, numbers, [0] * len(read), self._genes)
        return {name: tensor.to(self._world.device) for name, tensor in batch.items()}

    def _metrics(self, sums: dict[str, Tensor], moments: Tensor) -> dict[str, float | None]:
        whole = engine.sum_over_ranks(torch.cat([torch.stack(list(sums.values())), moments.flatten()])).cpu()
        found = dict(zip(sums, whole.tolist(), strict=False))
        steps = self._config.optim.steps
        last = losses.weights(self._config.loss, steps, steps)  # of all terms: no step of the schedule bends the curve
        loss, parts = means(found, {part: found[f"count_{part}"] for part in PARTS}, last)
        return tagged("val", loss, parts) | {"val/pearson": mean_pearson(whole[len(sums) :].view(moments.shape))}


def _sum_names() -> list[str]:
    return [*PARTS, *(f"count_{part}" for part in PARTS)]


def mean_pearson(moments: Tensor) -> float | None:
    """Mean correlation over sections and genes of sums [S, 6, K] of 1, x, y, x2, y2, xy.

    As in the report, a gene that does not vary in a section counts 0 there; one that was not measured does not count.
    None where no section has two profiles.
    """
    n, x, y, xx, yy, xy = moments.unbind(1)
    some = n > 1
    if not bool(some.any()):
        return None
    n = n.clamp_min(1)
    spread = (xx / n - (x / n) ** 2).clamp_min(0) * (yy / n - (y / n) ** 2).clamp_min(0)
    found = torch.where(spread > _TINY, (xy / n - x * y / n**2) / spread.clamp_min(_TINY).sqrt(), 0.0)
    return float(found[some].mean())
