"""The figures of a report: the loss curve of a run, and genes as measured and as predicted.

In: log lines; places and values. Out: PNG files. The drawing needs no display.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from storm.evaluate.statistics import pearson

Floats = npt.NDArray[np.float64]

LOSSES = {
    "train/loss": "total loss", "train/loss/expr": "expression (NB NLL per gene)",
    "train/loss/depth": "depth (Gaussian NLL)", "train/loss/image": "image (hidden tiles)",
}  # fmt: skip
_INK, _LIGHT = "#1b3a5c", "#a9bdd2"
_PNG = {"Software": None}  # no version in the file: equal figures have equal bytes


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130, metadata=_PNG)


def _smooth(values: Floats, width: int) -> Floats:
    """Running mean over `width` steps, shorter at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def loss_curve(lines: list[dict[str, Any]], path: Path) -> None:
    """Total and terms by step: every logged value, and a running mean over a tenth of the run."""
    names = [name for name in LOSSES if any(line.get(name) is not None for line in lines)]
    figure = Figure(figsize=(3.4 * len(names), 2.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        logged = [line for line in lines if line.get(name) is not None]
        step = np.array([line["step"] for line in logged])
        value = np.array([line[name] for line in logged], dtype=np.float64)
        axes.plot(step, value, color=_LIGHT, linewidth=0.8)
        axes.plot(step, _smooth(value, max(1, len(value) // 10)), color=_INK, linewidth=1.6)
        axes.set_title(LOSSES[name], fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def gene_map(
    image: npt.NDArray[np.uint8], px_per_um: float, xy_um: Floats, footprint_um: float, names: list[str],
    measured: Floats, predicted: Floats, path: Path,
) -> None:  # fmt: skip
    """The section, and for each gene a map of the measurement above one of the prediction.

    Args:
        xy_um: [N, 2]; measured, predicted: [N, len(names)], lognorm.
        footprint_um: a profile is drawn at most at this size, and large enough to be seen.
    """
    low, high = xy_um.min(0), xy_um.max(0)
    pad = 0.04 * float((high - low).max()) + footprint_um
    frame = (low[0] - pad, high[0] + pad, high[1] + pad, low[1] - pad)  # y grows downward, as in the image
    ratio = (frame[2] - frame[3]) / (frame[1] - frame[0])
    columns = 1 + len(names)
    figure = Figure(figsize=(2.9 * columns, 5.0 * ratio + 0.7), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False)
    extent = (0, image.shape[1] / px_per_um, image.shape[0] / px_per_um, 0)
    for axes in grid[:, 0]:
        axes.imshow(image, extent=extent, interpolation="antialiased")
        _frame(axes, frame)
    _scale_bar(grid[0, 0], frame)
    _dots(grid[1, 0], xy_um, footprint_um, None)
    grid[0, 0].set_title("H&E, held-out section", fontsize=10)
    grid[1, 0].set_title(f"{len(xy_um)} profiles", fontsize=10)
    agreement = pearson(predicted, measured)
    for i, name in enumerate(names):
        for axes, values, text in (
            (grid[0, 1 + i], measured[:, i], f"{name}, measured"),
            (grid[1, 1 + i], predicted[:, i], f"predicted, r = {agreement[i]:.2f}"),
        ):
            dots = _dots(axes, xy_um, footprint_um, values)
            _frame(axes, frame)
            axes.set_title(text, fontsize=10, parse_math=False)  # a symbol may hold a $
            bar = figure.colorbar(dots, ax=axes, shrink=0.75, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            bar.outline.set_visible(False)
    _save(figure, path)


def _frame(axes: Axes, frame: tuple[float, float, float, float]) -> None:
    axes.set_xlim(frame[0], frame[1])
    axes.set_ylim(frame[2], frame[3])
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _dots(axes: Axes, xy_um: Floats, footprint_um: float, values: Floats | None) -> EllipseCollection:
    """Profiles as discs in um: grown to nine tenths of the pitch where they would be specks."""
    apart = np.linalg.norm(xy_um[:, None] - xy_um[None], axis=-1) if len(xy_um) < 5000 else np.zeros((0, 0))
    np.fill_diagonal(apart, np.inf)
    pitch_um = float(np.median(apart.min(1))) if len(apart) > 1 else footprint_um
    size = np.full(len(xy_um), max(footprint_um, 0.9 * pitch_um) if values is not None else footprint_um)
    dots = EllipseCollection(
        size, size, np.zeros(len(xy_um)), units="xy", offsets=xy_um, offset_transform=axes.transData, linewidths=0
    )
    if values is None:
        dots.set(facecolor="none", edgecolor=_INK, linewidth=0.7)
    else:
        dots.set_array(values)
        dots.set_cmap("viridis")
        dots.set_clim(*np.percentile(values, [2, 98]))
    axes.add_collection(dots)
    return dots


def _scale_bar(axes: Axes, frame: tuple[float, float, float, float]) -> None:
    width = frame[1] - frame[0]
    length = max(length for length in (100, 200, 500, 1000, 2000, 5000) if length <= max(100, width / 3))
    x, y = frame[0] + 0.05 * width, frame[2] - 0.05 * (frame[2] - frame[3])
    axes.plot([x, x + length], [y, y], color="black", linewidth=2.5, solid_capstyle="butt")
    text = f"{length} um" if length < 1000 else f"{length // 1000} mm"
    box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5}
    axes.text(x + length / 2, y - 0.03 * width, text, ha="center", va="bottom", fontsize=8, bbox=box)
