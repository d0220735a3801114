"""Which genes become tokens: against a plain loop, what is drawn, and what a draw may not see."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storm.data.batch import collate
from storm.data.tokens import Chosen, TokenSpec, choose, pack, percentile
from storm.data.view import plain_view
from storm.schema import TOKENS
from tests.data import samples
from tests.data.test_batch import MODES, dense, drawn, only, recount

SPEC = TokenSpec(genes=6, zeros=4)
GENES = 30


def shown(seed: int = 0, n: int = 70) -> dict[str, Any]:
    """Entries of `n` profiles, of which every third is hidden, over 30 genes of which 24 were measured."""
    rng = np.random.default_rng(seed)
    measured, visible = np.arange(GENES) % 5 != 4, np.arange(n) % 3 != 1
    counts = rng.poisson(rng.uniform(0, 3, GENES), (n, GENES)) * measured * visible[:, None]
    row, gene = np.nonzero(counts)
    share = rng.dirichlet(np.ones(GENES))
    return {"row": row, "gene": gene, "count": counts[row, gene], "visible": visible, "measured": measured,
            "share": share, "sum_to": 1e3}  # fmt: skip


def plain_percentile(value: np.ndarray) -> np.ndarray:
    return np.array([((value < v).sum() + (value == v).sum() / 2) / len(value) for v in value])


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30))
def test_percentiles_are_those_within_a_row(pairs: list[tuple[int, int]]) -> None:
    row, value = np.array(sorted(pairs)).T
    found = percentile(row, value)
    for r in np.unique(row):
        np.testing.assert_allclose(found[row == r], plain_percentile(value[row == r]))


def test_without_a_seed_the_choice_equals_a_plain_loop() -> None:
    given_ = shown()
    found = choose(**given_, spec=SPEC, seed=None)
    row, gene, count, share = (given_[name] for name in ("row", "gene", "count", "share"))
    for profile, visible in enumerate(given_["visible"]):
        own = found.gene[found.row == profile]
        if not visible:
            assert not len(own)
            continue
        genes, counts = gene[row == profile], count[row == profile]
        rank = plain_percentile(counts)
        best = np.argsort(plain_percentile(share[genes]) - rank, kind="stable")[: SPEC.genes]
        zeros = np.setdiff1d(np.flatnonzero(given_["measured"]), genes)
        top = zeros[np.argsort(-share[zeros])][: SPEC.zeros]
        np.testing.assert_array_equal(own, [*sorted(genes[best]), *sorted(top)])
        kept = np.sort(best)
        expected = np.stack([np.log1p(counts * 1e3 / counts.sum()), np.log1p(counts), rank], -1)[kept]
        np.testing.assert_allclose(found.value[found.row == profile], [*expected, *np.zeros((len(top), 3))])


def test_any_gene_can_be_drawn_and_the_deviating_ones_come_more_often() -> None:
    given_ = shown(n=1)
    seen = np.zeros(GENES)
    for seed in range(300):
        found = choose(**given_, spec=SPEC, seed=seed)
        assert len(np.unique(found.gene)) == len(found.gene) <= SPEC.genes + SPEC.zeros
        seen[found.gene] += 1
    assert (seen[given_["measured"]] > 0).all() and not seen[~given_["measured"]].any()
    always = choose(**given_, spec=SPEC, seed=None).gene
    others = np.setdiff1d(np.flatnonzero(given_["measured"]), always)
    assert seen[always].mean() > 1.3 * seen[others].mean()


def test_a_seed_is_a_choice() -> None:
    one, again, other = (choose(**shown(), spec=SPEC, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one.gene, other.gene)


def test_a_profile_is_told_alike_in_any_company() -> None:
    """Without a draw; more profiles than are looked at at a time."""
    given_ = shown(n=150)
    whole = choose(**given_, spec=SPEC, seed=None)
    for profile in (0, 71, 149):
        mine = given_["row"] == profile
        entries = {name: given_[name][mine] for name in ("row", "gene", "count")}
        alone = choose(**given_ | entries | {"visible": np.arange(150) == profile}, spec=SPEC, seed=None)
        np.testing.assert_array_equal(alone.gene, whole.gene[whole.row == profile])
        np.testing.assert_array_equal(alone.value, whole.value[whole.row == profile])


@pytest.mark.parametrize("count", [1, 50_000])
def test_counts_of_nothing_and_of_very_much(count: int) -> None:
    """A visible profile without any count shows zeros; one with 50,000 of a gene is finite."""
    visible, measured = np.ones(2, bool), np.ones(GENES, bool)
    share = np.full(GENES, 1 / GENES)
    found = choose(
        np.array([1]), np.array([3]), np.array([count]), visible, measured, share, 1e4, SPEC, None
    )  # fmt: skip
    assert found.row.tolist() == [0] * 4 + [1] * 5 and np.isfinite(found.value).all()
    np.testing.assert_allclose(found.value[4], [np.log1p(1e4), np.log1p(count), 0.5])


def test_tokens_are_packed_longest_first() -> None:
    rows = [np.array([4, 4, 7]), np.array([12, 12, 12, 13])]
    found = [Chosen(row, row * 10 + np.arange(len(row)), np.ones((len(row), 3))) for row in rows]
    out = pack(found)
    assert out["token_profile"].tolist() == [12, 4, 7, 13] and out["token_offsets"].tolist() == [0, 3, 5, 6, 7]
    assert out["token_gene"].tolist() == [120, 121, 122, 40, 41, 72, 133] and len(out["token_slots"]) == 3
    none = pack([Chosen(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 3)))])
    assert none["token_profile"].tolist() == [-1] and none["token_offsets"].tolist() == [0, 1]


@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_of_a_batch(mode: str) -> None:
    """The contract's types, of visible profiles and genes alone, and hidden counts move none of it."""
    group, spec = samples.group(2), samples.spec(token_spec=SPEC)
    view = drawn(group, only(mode, thinning=0.7, panel_subsampling=0.5), 1)
    batch = collate([group], [view], spec)
    for name, (dtype, _) in TOKENS.items():
        assert str(batch[name].dtype) == f"torch.{dtype}"
    assert batch["token_offsets"][-1] == len(batch["token_gene"]) == len(batch["token_value"])
    shown_genes = samples.PANEL if view.visible_genes is None else samples.PANEL & view.visible_genes
    if mode == "image_only":
        assert batch["token_profile"].tolist() == [-1]
    else:
        places = batch["token_profile"]
        assert torch.equal(places.sort().values, batch["visible"].flatten().nonzero().flatten())
        assert shown_genes[batch["token_gene"]].all()
        assert torch.equal(batch["token_offsets"].diff().max(), torch.tensor(len(batch["token_slots"])))
    other = recount(group, view, np.random.default_rng(0))
    after = collate([other], [drawn(other, only(mode, thinning=0.7, panel_subsampling=0.5), 1)], spec)
    assert all(torch.equal(batch[name], after[name]) for name in TOKENS)


def test_values_of_tokens_are_those_of_the_bag() -> None:
    """v of a gene with a count is the same number in both encoders' inputs."""
    group, spec = samples.group(3), samples.spec(token_spec=TokenSpec(100, 5))
    batch = collate([group], [plain_view(group, True)], spec)
    starts = [*batch["input_offsets"].tolist(), len(batch["input_gene"])]
    counts = dense(group)
    for i, (low, high) in zip(batch["token_profile"].tolist(), pairwise(batch["token_offsets"].tolist()), strict=True):
        bag = batch["input_gene"][starts[i] : starts[i + 1]], batch["input_value"][starts[i] : starts[i + 1]]
        genes, values = batch["token_gene"][low:high], batch["token_value"][low:high]
        counted = values[:, 0] > 0
        assert torch.equal(genes[counted], bag[0]) and torch.equal(values[counted, 0], bag[1])
        assert not counts[i, genes[~counted]].any() and not values[~counted].any()
