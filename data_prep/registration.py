"""Do the counts lie where the nuclei are? A check of the alignment that needs no landmark; it notes, and drops nothing.

In: an overview and what was counted at which place. Out: the correlation of counts with nuclear density as they lie,
its maximum over shifts of up to 200 um, and a note where another place fits significantly better.

Nuclear density is the optical density of red light, which hematoxylin takes and eosin hardly does. A correlation over
smooth maps has a maximum somewhere, also by chance, and chance has no simple size there: so the profiles are cut into
four quarters of the section, and a shift counts only where quarters find it independently of each other.
"""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from data_prep.tissue import Overview

MIN_PROFILES = 50
REACH_UM = 200.0
_MAX_PROFILES = 5_000  # of a slide; more tell nothing more
# The rule: shifted by 25 um or more, r higher by 0.05 or more and at least 0.1, not at the border of the scan, and the
# best shifts of three of the four quarters within 40 um of it. Best shifts of noise lie anywhere on the scan: three of
# four would meet there by chance about once in 5,000 times.
_MIN_SHIFT_UM, _MIN_GAIN, _MIN_R, _AGREE_UM, _AGREE = 25.0, 0.05, 0.1, 40.0, 3

Floats = npt.NDArray[np.float64]


def nuclear_density(overview: Overview) -> npt.NDArray[np.float32]:
    """[H, W] optical density of red light against the slide's glass, 0 where there is none."""
    clear = max(1.0, float(overview.glass[0]))
    table = np.maximum(0, -np.log10((np.arange(256) + 1) / (clear + 1))).astype(np.float32)
    return np.asarray(cv2.LUT(overview.rgb[..., 0], table))


def check(
    overview: Overview, mpp: float, xy_um: Floats, footprint_um: npt.NDArray[np.float32], depth: npt.NDArray[np.int64],
    area_um2: Floats,
) -> dict[str, Any]:  # fmt: skip
    """Figures of the alignment, with a `note` that may be empty.

    Args:
        mpp: um per level-0 px.
        xy_um: [N, 2] centres in the slide's frame; depth [N] their counts, area_um2 [N] of their footprints.
    """
    some = np.flatnonzero(depth > 0)
    if len(some) < MIN_PROFILES:
        return {"checked": False, "note": "", "reason": f"{len(some)} profiles with counts, {MIN_PROFILES} are needed"}
    some = some[:: -(-len(some) // _MAX_PROFILES)]
    px_um = overview.px_px0 * mpp
    # A disc of diameter d is as wide as a Gaussian of d / 4.
    spread = max(0.5, float(np.median(footprint_um[some])) / 4 / px_um)
    density = cv2.GaussianBlur(nuclear_density(overview), (0, 0), spread)
    reach = int(REACH_UM // px_um)
    density = np.pad(density, reach)
    at = np.floor(xy_um[some] / px_um).astype(np.int64).clip(0) + reach
    at = np.minimum(at, np.array(density.shape[::-1]) - 1 - reach)
    counts = np.log(depth[some] / area_um2[some])
    quarter = _quarters(xy_um[some])
    maps = _scan(density, at, counts, quarter, reach)
    return _judged(maps, reach, px_um)


def _quarters(xy_um: Floats) -> npt.NDArray[np.int64]:
    """[N] number 0..3 of the quarter of the section that holds a profile, of about equal numbers."""
    right = xy_um[:, 0] > np.median(xy_um[:, 0])
    low = np.zeros(len(xy_um), bool)
    for side in (right, ~right):
        low[side] = xy_um[side, 1] > np.median(xy_um[side, 1]) if side.any() else False
    return right * 2 + low


def _scan(
    density: npt.NDArray[np.float32], at: npt.NDArray[np.int64], counts: Floats, quarter: npt.NDArray[np.int64],
    reach: int,
) -> Floats:  # fmt: skip
    """[5, 2 reach + 1, 2 reach + 1] correlations over (dy, dx): of all profiles, and of each quarter."""
    groups = [np.arange(len(at)), *(np.flatnonzero(quarter == k) for k in range(4))]
    centred = [counts[g] - counts[g].mean() if len(g) else counts[g] for g in groups]
    scale = [np.sqrt((c * c).sum()) for c in centred]
    steps = np.arange(-reach, reach + 1)
    found = np.zeros((5, len(steps), len(steps)))
    for row, dy in enumerate(steps):
        values = density[(at[:, 1] + dy)[:, None], at[:, :1] + steps].astype(np.float64)  # [N, shifts]
        for k, g in enumerate(groups):
            own = values[g]
            spread = np.sqrt(((own - own.mean(axis=0)) ** 2).sum(axis=0)) * scale[k] if len(g) > 2 else 0.0
            found[k, row] = np.where(spread > 1e-12, centred[k] @ own / np.maximum(spread, 1e-12), 0.0)
    return found


def _best(found: Floats, reach: int) -> npt.NDArray[np.int64]:
    """(dx, dy) in px of the highest correlation; the smallest shift of several."""
    dy, dx = np.nonzero(found >= found.max() - 1e-12)
    nearest = np.argmin(np.hypot(dx - reach, dy - reach))
    return np.array([dx[nearest] - reach, dy[nearest] - reach])


def _judged(maps: Floats, reach: int, px_um: float) -> dict[str, Any]:
    best = _best(maps[0], reach)
    r_zero, r_best = float(maps[0, reach, reach]), float(maps[0].max())
    shift_um = best * px_um
    quarters = np.array([_best(found, reach) for found in maps[1:]]) * px_um
    agree = int((np.hypot(*(quarters - shift_um).T) <= _AGREE_UM).sum())
    better = (
        np.hypot(*shift_um) >= _MIN_SHIFT_UM and r_best - r_zero >= _MIN_GAIN and r_best >= _MIN_R
        and agree >= _AGREE and int(np.abs(best).max()) < reach
    )  # fmt: skip
    x, y = (round(float(v)) for v in shift_um)
    return {
        "checked": True, "r": round(r_zero, 4), "r_best": round(r_best, 4), "best_shift_um": [x, y],
        "quarters_agree": agree,
        "note": f"counts fit the image better when shifted by ({x}, {y}) um: r {r_best:.2f} instead of {r_zero:.2f}"
        if better else "",
    }  # fmt: skip
