"""Where a measurement lies on its slide, and how large a pixel is.

In: the printed lattice in um and where its spots were found in the image; alignment files (a matrix, or key points);
the mpp that manifest, lattice, matrix and image tell. Out: maps between pixels; one mpp with its source, and the notes
or the refusal that their disagreement calls for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storm.prep_config import PrepConfig

EMBEDDED_MPP = (0.05, 2.0)  # outside it a tag is junk: 72 dpi, 1 px per cm
_STRETCH = 0.02  # two scanners differ by less; more is worth a note
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LatticeFit:
    """Least-squares affine map lattice um -> level-0 px."""

    mpp: float  # um per px, geometric mean of both directions
    residual_px0: float  # rms distance
    anisotropy: float  # ratio of the two principal scales, minus 1
    matrix: Matrix  # [3, 3]


def fit_lattice(lattice_um: Matrix, px0: Matrix) -> LatticeFit:
    """Fit a lattice [M, 2] to its places [M, 2] in the image.

    Raises:
        ValueError: the points lie on one line, or coincide.
    """
    design = np.column_stack([lattice_um, np.ones(len(lattice_um))])
    solution, _, rank, _ = np.linalg.lstsq(design, px0, rcond=None)
    scales = np.linalg.svd(solution[:2], compute_uv=False)
    if rank < 3 or scales[1] < 1e-6 * scales[0]:
        raise ValueError("the spots lie on one line, so no pixel size follows; give mpp in the manifest")
    residual = float(np.sqrt(np.mean(np.sum((px0 - design @ solution) ** 2, axis=1))))
    matrix = np.eye(3)
    matrix[:2] = solution.T
    return LatticeFit(float(1 / np.sqrt(scales[0] * scales[1])), residual, float(scales[0] / scales[1] - 1), matrix)


def lattice_fault(fit: LatticeFit, platform: str, config: PrepConfig) -> str | None:
    """Why a fit is not to be believed, or None."""
    st = platform == "st"
    limit_px0 = config.st_residual_um / fit.mpp if st else config.lattice_residual_px0
    limit = config.st_anisotropy if st else config.lattice_anisotropy
    if fit.anisotropy > limit:
        return f"the spots' lattice has two pixel sizes, {100 * fit.anisotropy:.1f} % apart (limit {100 * limit:.1f} %)"
    if fit.residual_px0 > limit_px0:
        return f"the spots lie {fit.residual_px0:.1f} px (rms) off their lattice (limit {limit_px0:.1f})"
    return None


@dataclass(frozen=True)
class Mpp:
    """um per level-0 pixel, who told it, and what was odd."""

    value: float
    source: str  # manifest, lattice, matrix or embedded
    notes: list[str]


def choose_mpp(told: dict[str, float | None], config: PrepConfig) -> Mpp:
    """The first that is known of manifest, lattice, matrix, embedded; the others are compared to it.

    Raises:
        ValueError: none is known, or another source differs by more than `mpp_refuse` and the manifest is silent.
    """
    low, high = EMBEDDED_MPP
    usable = {s: v for s, v in told.items() if v is not None and (s != "embedded" or low <= v <= high)}
    source = next((s for s in ("manifest", "lattice", "matrix", "embedded") if s in usable), None)
    notes = [f"the {s} mpp of {v:.4g} is not believable and ignored" for s, v in told.items() if v and s not in usable]
    if source is None:
        raise ValueError("; ".join([*notes, "the pixel size (mpp) is unknown; give um per pixel in the column mpp, "
                                   "or by --mpp of storm embed and predict"]))  # fmt: skip
    chosen = usable[source]
    for other, value in usable.items():
        apart = abs(value / chosen - 1)
        text = f"mpp {chosen:.4f} ({source}) and {value:.4f} ({other}) are {100 * apart:.0f} % apart"
        if apart > config.mpp_refuse and source != "manifest":
            raise ValueError(f"{text}; is this the image that was measured? If so, give mpp in the manifest")
        if apart > config.mpp_warn:
            notes.append(f"WARNING: {text}" if apart > config.mpp_refuse else text)
    return Mpp(chosen, source, notes)


@dataclass(frozen=True)
class Alignment:
    """Where a measurement lies on its slide: what an alignment file tells."""

    matrix: Matrix  # [3, 3], measurement's px -> level-0 px of the slide
    source: str  # file or key points
    points: int = 0  # key points that were fitted
    residual_px0: float | None = None  # rms distance of the key points after the fit

    def residual(self) -> tuple[dict[str, Any], list[str]]:
        """(facts, notes) of the fit; none of a matrix that a file gives."""
        if self.residual_px0 is None:
            return {}, []
        facts = {"key_points": {"points": self.points, "residual_px0": round(self.residual_px0, 3)}}
        return facts, [f"aligned by {self.points} key points, {self.residual_px0:.1f} px (rms) off"]


_KEY_POINTS = ("fixedX", "fixedY", "alignmentX", "alignmentY")


def read_alignment(path: Path, from_slide: bool = False) -> Alignment:
    """A 3 x 3 matrix (csv without header), or key points (csv with the header fixedX,fixedY,alignmentX,alignmentY).

    Args:
        from_slide: the file's matrix maps level-0 px of the slide to the measurement's px, as Xenium Explorer writes
            it; otherwise the measurement's px to level-0 px. Key points name their sides: `fixed` is the measurement,
            `alignment` the slide.

    Raises:
        ValueError: no such file, not an invertible affine matrix, fewer than three key points, or all on one line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such alignment file; correct its path")
    try:
        with path.open(encoding="utf-8-sig") as handle:
            header = [name.strip(' "\r\n') for name in handle.readline(4096).split(",")]
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a csv of numbers; write three lines of three, or key points") from None
    if set(_KEY_POINTS) & set(header):
        return _fitted(path, header)
    matrix = read_matrix(path)
    return Alignment(np.linalg.inv(matrix).astype(np.float64) if from_slide else matrix, "file")


def _fitted(path: Path, header: list[str]) -> Alignment:
    missing = [name for name in _KEY_POINTS if name not in header]
    if missing:
        raise ValueError(f"{path}: columns {missing} are missing; key points have {','.join(_KEY_POINTS)}")
    columns = [header.index(name) for name in _KEY_POINTS]
    try:
        points = np.loadtxt(path, delimiter=",", skiprows=1, usecols=columns, ndmin=2, encoding="utf-8-sig")
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: its key points are no numbers ({error}); export them again") from None
    if len(points) < 3 or not np.isfinite(points).all():
        raise ValueError(f"{path}: {len(points)} key points; a map needs three or more, all of them numbers")
    try:
        fit = fit_lattice(points[:, :2], points[:, 2:])
    except ValueError:
        raise ValueError(f"{path}: the {len(points)} key points lie on one line; set some beside it") from None
    return Alignment(fit.matrix, "key points", len(points), fit.residual_px0)


def check_scale(matrix: Matrix, space_um: float, path: Path) -> list[str]:
    """Notes on a map from px of `space_um` um to level-0 px.

    Raises:
        ValueError: a pixel of the slide would be smaller or larger than any scanner's.
    """
    scales = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    mpp = space_um / float(np.sqrt(scales[0] * scales[1]))
    low, high = EMBEDDED_MPP
    if not low <= mpp <= high:
        raise ValueError(
            f"{path}: makes a pixel of the slide {mpp:.3g} um wide, which none is; give the map between pixels (not "
            "um or mm), in the direction that the platform has it"
        )
    stretch = float(scales[0] / scales[1] - 1)
    return [f"the alignment stretches one direction by {100 * stretch:.1f} %"] if stretch > _STRETCH else []


def read_matrix(path: Path) -> Matrix:
    """A 3 x 3 matrix (csv without header) as the file has it.

    Raises:
        ValueError: no such file, or not an invertible affine 3 x 3 matrix.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such alignment file; correct its path")
    try:
        matrix = np.loadtxt(path, delimiter=",", ndmin=2, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path}: not a csv of numbers ({error}); write three lines of three") from None
    if (
        matrix.shape != (3, 3)
        or not np.isfinite(matrix).all()
        or not np.allclose(matrix[2], [0, 0, 1])
        or abs(np.linalg.det(matrix)) < 1e-12
    ):
        raise ValueError(f"{path}: no invertible affine 3 x 3 matrix whose last line is 0,0,1; write three lines")
    return matrix


def apply(matrix: Matrix, xy: Matrix) -> Matrix:
    """[N, 2] points under a [3, 3] affine matrix."""
    return xy @ matrix[:2, :2].T + matrix[:2, 2]
