"""Imputation: what is hidden, how far it lies, and baselines on a field that is known."""

import numpy as np

from storm.evaluate import imputation, targets
from storm.evaluate.imputation import Ground, Hidden
from storm.evaluate.sections import take
from tests.evaluate import cohorts


def field(seed: int, side: int = 16) -> np.ndarray:
    """Ten genes that follow a smooth field, ten that follow none; each ten holds half of the molecules everywhere."""
    rng = np.random.default_rng(seed)
    xy, phase = cohorts.lattice(side), rng.uniform(0, 6, (2, 10))
    smooth = np.sin(xy[:, :1] / 300 + phase[0]) + np.sin(xy[:, 1:] / 300 + phase[1])
    smooth -= np.log(np.exp(smooth).mean(1, keepdims=True))
    return np.concatenate([smooth, np.zeros_like(smooth)], axis=1)


def test_a_keyed_share_is_visible_and_the_rest_is_asked() -> None:
    made = cohorts.section("a", "d", field(0), np.random.default_rng(0))
    found = imputation.hide(made, 0.05, 0)
    assert found.visible.sum() == 13 and len(found.asked.rows) == 243
    assert np.array_equal(imputation.hide(made, 0.05, 0).visible, found.visible)
    for other in (imputation.hide(made, 0.05, 1), imputation.hide(take(made, np.arange(256)), 0.5, 0)):
        assert not np.array_equal(other.visible, found.visible)
    apart = np.linalg.norm(made.xy_um[~found.visible, None] - made.xy_um[None, found.visible], axis=-1)
    np.testing.assert_allclose(found.distance_um, apart.min(1))
    shared = np.abs(made.xy_um[~found.visible, None] - made.xy_um[None, found.visible]).max(-1).min(1)
    np.testing.assert_allclose(found.apart_um, shared)
    assert set(np.flatnonzero(found.visible)) & set(found.asked.rows) == set()


def ground(train_seeds: tuple[int, ...], test_seed: int) -> tuple[Ground, list[Hidden], list[Hidden]]:
    rng = np.random.default_rng(1)
    train = [cohorts.section(f"t{i}", f"d{i}", field(i), rng) for i in train_seeds]
    test = [cohorts.section("x", "dx", field(test_seed), rng)]
    values = tuple([targets.lognorm(s.counts, s.depth) for s in part] for part in (train, test))
    mean = np.concatenate(values[0]).mean(0)
    ridges = {"mean": tuple([np.tile(mean, (len(v), 1)) for v in side] for side in values)}
    hidden = [[imputation.hide(s, 0.3, 0) for s in part] for part in (train, test)]
    return Ground((train, test), (values[0], values[1]), ridges), *hidden  # type: ignore[arg-type, return-value]


def test_kriging_finds_a_smooth_field_and_nothing_where_there_is_none() -> None:
    made, train, test = ground((0, 1), 2)
    found = imputation.baselines(made, train, test)
    measured = [v[~h.visible] for h, v in zip(test, made.values[1], strict=True)]
    for name in ("inverse distance", "ordinary kriging", "mean + kriged residual"):
        scored = imputation._score(found[name], measured, test, [h.distance_um >= 0 for h in test], 0)
        assert scored and scored.genes[:10].mean() > 0.8 and abs(scored.genes[10:].mean()) < 0.1, name
    # A constant added to what is kriged changes nothing: kriging knows no mean.
    np.testing.assert_allclose(found["mean + kriged residual"][0], found["ordinary kriging"][0], atol=1e-6)


def test_the_model_is_compared_with_the_best_rival_alone_and_by_distance() -> None:
    made, train, test = ground((0,), 2)
    measured = [v[~h.visible] for h, v in zip(test, made.values[1], strict=True)]
    rivals = imputation.baselines(made, train, test)
    predicted = {imputation.MODEL: measured, **dict.fromkeys(imputation.REFERENCES, measured), **rivals}
    found = imputation.compare(predicted, measured, test, 112.0, 0)
    assert found["versus_best_baseline"]["all"]["low"] > 0
    assert found["versus_best_baseline"]["all"]["baseline"] in rivals
    model = found["methods"][0]
    assert model["role"] == "model" and model["scores"]["all"]["value"] > 0.99
    rows = int((test[0].distance_um < 112).sum()), int((test[0].distance_um >= 112).sum())
    assert min(rows) >= imputation.LEAST_ASKED and model["bins"][0] > 0.99 and model["bins"][3] is None
    near = test[0].apart_um < 112
    blurred = [np.where(near[:, None], np.random.default_rng(0).normal(size=measured[0].shape), measured[0])]
    wrong = imputation.compare({**predicted, imputation.MODEL: blurred}, measured, test, 112.0, 0)["methods"][0]
    assert (
        abs(wrong["bins"][0]) < 0.1
        and wrong["scores"]["beyond a tile"]["value"] > 0.99 > wrong["scores"]["all"]["value"]
    )


def test_what_counts_add_is_told_by_class() -> None:
    made, _, test = ground((0,), 2)
    measured = [v[~h.visible] for h, v in zip(test, made.values[1], strict=True)]
    kind = np.array(["c"] * 10 + [""] + ["e"] * 9)
    blind = [np.where(kind == "c", np.random.default_rng(0).normal(size=v.shape), v) for v in measured]
    predicted = {imputation.MODEL: measured, **dict.fromkeys(imputation.REFERENCES, blind)}
    found = imputation.by_class(predicted, measured, test, kind, 0)
    assert {name: of["genes"] for name, of in found.items()} == {"c": 10, "e": 9}
    assert found["c"]["counts_add"]["low"] > 0.5 and abs(found["e"]["counts_add"]["value"]) < 1e-9
    assert found["c"]["scores"][imputation.MODEL]["value"] > 0.99 > found["c"]["scores"][imputation.BLIND]["value"]
    whole = imputation.compare(predicted, measured, test, 112.0, 0)
    assert whole["counts_add"]["all"]["low"] > 0


def test_training_predictions_are_out_of_fold() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 40)), rng.normal(size=(60, 1))  # features enough to learn noise by heart
    found = imputation._out_of_fold(x, y, np.arange(60) % 3, True)
    assert abs(np.corrcoef(found[:, 0], y[:, 0])[0, 1]) < 0.35
    assert np.isfinite(imputation._out_of_fold(x, y, np.zeros(60, int), True)).all()


def test_a_section_too_small_to_hide_from_is_left_out() -> None:
    rng = np.random.default_rng(0)
    small, whole = (cohorts.section("s", "a", np.zeros((side**2, 2)), rng) for side in (4, 5))
    assert imputation.of_size([small, whole]) == [whole]
