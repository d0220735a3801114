"""The tables of a study: each arm's scores by gene class, and its difference to the base, with intervals.

In: a plan, its runs, the results that are there, what failed. Out: Markdown. It says what is missing, which arms have
one seed alone, and on which classes the base itself scores too little for an ablation to take anything away.
"""

import statistics as figures
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from storm.evaluate import classes
from storm.evaluate.expression import MODEL
from storm.evaluate.statistics import Interval, donor_bootstrap, told
from storm.evaluate.study import BASE, Arm, Plan, Result, Run
from storm.markdown import clean, table

CLASSES = "abcde"
LEAST = 0.02  # mean Pearson: of a base that scores less, an ablation has nothing to take away
_LEGEND = """\
Mean Pearson within a section over the genes of a class, target lognorm, from H&E alone, on held-out donors; in
brackets the skill, (model - colour ridge) / (oracle - colour ridge), where the oracle is clearly better than colour
ridge. Classes: a visible by colour and density; b by texture or arrangement; c niche, a source 100-250 um away; d
spatial fields of expression alone; e noise and donor, where every method must be near 0."""
_DIFFERENCE = """\
Arm minus base, with a 95 % interval over drawn test donors (the same for both) and drawn seeds of each. Bold: the class
on which the arm is judged. An arm with one seed is exploratory: its interval holds no spread over trainings of its
own."""


def scores(results: Sequence[Result]) -> npt.NDArray[np.float64]:
    """[seeds, donors, classes] of the runs of an arm."""
    of_runs = [[result["model_by_donor"][name] for name in CLASSES] for result in results]
    return np.array(of_runs, dtype=np.float64).transpose(0, 2, 1)


def levels(base: Sequence[Result]) -> dict[str, Interval]:
    """Class -> what the base scores, with its interval over seeds and donors."""
    own = scores(base)
    return dict(zip(CLASSES, compare(own, np.zeros_like(own)), strict=True))


def compare(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> list[Interval]:
    """Per class the mean difference of scores [seeds, donors, classes]; of one donor nothing follows for others, and
    its interval has no ends."""
    if first.shape[1] > 1:
        return donor_bootstrap(first, second, 0)
    return [Interval(float(value), -np.inf, np.inf) for value in first.mean((0, 1)) - second.mean((0, 1))]


def has_power(level: Interval) -> bool:
    """Whether the base scores enough on a class for an ablation to take something away."""
    return level.low > 0 and level.value >= LEAST


def text(plan: Plan, wanted: Sequence[Run], found: Sequence[Result], failed: Mapping[str, str]) -> str:
    """The study as Markdown.

    Args:
        wanted: all runs of the plan.
        found: the results that are there.
        failed: name of a run -> what its training said last.
    """
    by_arm = {arm.name: [result for result in found if result["arm"] == arm.name] for arm in plan.all_arms}
    parts = [f"# {clean(plan.title)}"]
    if found:
        parts += [_conditions(plan, found), _LEGEND, _scores(plan, by_arm)]
    if by_arm[BASE]:
        parts += [_power(plan, by_arm[BASE]), _DIFFERENCE, _differences(plan, by_arm)]
    return "\n\n".join([*parts, *_missing(wanted, found, failed)]) + "\n"


def _conditions(plan: Plan, found: Sequence[Result]) -> str:
    """Data, code and machine; several where the results differ in them."""

    def said(name: str) -> str:
        return " and ".join(sorted({clean(result[name]) for result in found}))

    one = found[0]
    sections = one["sections"]
    timed = [result["train_s"] for result in found if result["train_s"] is not None]
    minutes = f"; {figures.median(timed) / 60:.1f} minutes of training per run (median)" if timed else ""
    return (
        f"Base: `{clean(plan.base)}`. Data: {sections['train']} sections for training, {sections['test']} of "
        f"{one['test_donors']} donors for the test, split by {one['split_by']}, shards {one['shards_sha256'][:12]}. "
        f"Commit {said('commit') or 'unknown'}, trained by {said('model_code')}. On {said('hardware')}{minutes}."
    )


def _scores(plan: Plan, by_arm: Mapping[str, Sequence[Result]]) -> str:
    rows: list[list[object]] = []
    for arm in plan.all_arms:
        if results := by_arm[arm.name]:
            cells = [_cell(results, name) for name in CLASSES]
            timed = [result["train_s"] / 60 for result in results if result["train_s"] is not None]
            rows.append([_name(arm), len(results), *cells, f"{figures.median(timed):.1f}" if timed else "-"])
    one = next(results for results in by_arm.values() if results)[0]
    for method in one["methods"]:
        if method != MODEL:
            shown = [f"{one['classes'][name]['scores'][method]:.3f}" for name in CLASSES]
            rows.append([method, "", *shown, ""])
    return table(["arm", "seeds", *CLASSES, "minutes"], rows)


def _cell(results: Sequence[Result], name: str) -> str:
    """Mean over seeds of the score of a class, and its skill."""
    means = dict(results[0]["classes"][name]["scores"])
    means[MODEL] = figures.fmean(result["classes"][name]["scores"][MODEL] for result in results)
    skill = classes.skill(means)
    return f"{means[MODEL]:.3f}" + (f" ({skill:.2f})" if skill is not None else "")


def _name(arm: Arm) -> str:
    """An arm with what it changes."""
    return f"{arm.name}: `{' '.join(arm.overrides)}`" if arm.overrides else arm.name


def _power(plan: Plan, base: Sequence[Result]) -> str:
    """What the base scores on the classes that arms are judged on, and where that is too little."""
    lines = []
    for name, level in levels(base).items():
        judged = [arm.name for arm in plan.arms if arm.judged == name]
        line = f"* Class {name}: the base scores {told(level.json())}"
        ridge = base[0]["classes"][name]["scores"]["colour ridge"]
        if ridge > max(level.value, LEAST):
            line += f", below colour ridge ({ridge:.3f})"
        if not has_power(level):
            line += f". **No power**: below {LEAST}, or not apart from 0; nothing that an ablation could take away"
            line += f", so {', '.join(judged)} cannot be judged" if judged else ""
        lines.append(f"{line}.")
    return "\n".join(lines)


def _differences(plan: Plan, by_arm: Mapping[str, Sequence[Result]]) -> str:
    base, rows = scores(by_arm[BASE]), []
    for arm in plan.arms:
        if not by_arm[arm.name]:
            continue
        found = compare(scores(by_arm[arm.name]), base)
        cells = [told(value.json(), "+") for value in found]
        cells = [f"**{cell}**" if name == arm.judged else cell for name, cell in zip(CLASSES, cells, strict=True)]
        alone = len(by_arm[arm.name]) == 1 or len(base) == 1
        rows.append([arm.name, f"{len(by_arm[arm.name])}{' (exploratory)' if alone else ''}", *cells])
    return table(["arm", "seeds", *CLASSES], rows) if rows else "No other arm has a result yet."


def _missing(wanted: Sequence[Run], found: Sequence[Result], failed: Mapping[str, str]) -> list[str]:
    done = {(result["arm"], result["seed"]) for result in found}
    left = [run for run in wanted if (run.arm.name, run.seed) not in done]
    parts = []
    if waiting := [f"{run.arm.name} seed {run.seed}" for run in left if run.name not in failed]:
        parts.append(f"Not run yet: {', '.join(waiting)}.")
    if lines := [f"* {run.arm.name} seed {run.seed}: {clean(failed[run.name])}" for run in left if run.name in failed]:
        parts.append("\n".join(["Failed:", "", *lines]))
    return parts
