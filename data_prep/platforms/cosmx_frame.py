"""The coordinates of CosMx: fields of view, local and global pixels, um per pixel, and the key of a cell.

In: the places of the fields of view (three vintages of the file) and columns of other tables. Out: global px and their
size. Local px start again in each field of view; global px are those of the whole slide, whose y axis points up.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.platforms import tabular

PIXEL_RANGE = (0.05, 0.5)  # um; instruments so far have 0.12 to 0.18
FOV_PX = 6000.0  # no field of view is larger: 4256 x 4256, on the prototypes 5472 x 3648
_SLACK_PX = 600.0  # a cell or a molecule may lie somewhat beside its field of view
_MM = (("x_global_mm", "y_global_mm"), ("x_mm", "y_mm"))
Numbers = npt.NDArray[np.float64]
Places = dict[int, tuple[float, float]]


def pick(path: Path, known_as: Mapping[str, tuple[str, ...]], needed: tuple[str, ...], cure: str) -> dict[str, str]:
    """Our name -> the file's name of each column that is there.

    Raises:
        ValueError: one of `needed` is not.
    """
    there = tabular.header(path)
    chosen = {own: name for own, names in known_as.items() for name in reversed(names) if name in there}
    missing = [known_as[own][0] for own in needed if own not in chosen]
    if missing:
        raise ValueError(f"{path}: columns {missing} are missing; {cure}")
    return chosen


def keys(fov: Numbers, cell: Numbers, path: Path) -> npt.NDArray[np.int64]:
    """One number for each (fov, cell_ID). Raises ValueError where one is no whole number."""
    for name, values in (("fov", fov), ("cell_ID", cell)):
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~((values >= 0) & (values < 2**31) & (values == np.floor(values))))
        if bad.size:
            raise ValueError(
                f"{path}: {name} {values[bad[0]]} in row {bad[0] + 1} is no whole number; restore the file that AtoMx "
                "wrote"
            )
    return (fov.astype(np.int64) << 32) | cell.astype(np.int64)


def name_of(key: int) -> str:
    """What a cell is called here: f<fov>_c<cell_ID>."""
    return f"f{key >> 32}_c{key & 0xFFFFFFFF}"


class Fovs:
    """Where the fields of view lie: in px, in mm, or both, as the vintage has it."""

    def __init__(self, path: Path | None) -> None:
        """Read fov_positions_file. Raises ValueError where it is of another form."""
        self.path = path
        self.px: Places = {}
        self.mm: Places = {}
        if path is None:
            return
        known = {name.lower(): name for name in tabular.header(path)}
        pairs = [(self.px, ("x_global_px", "y_global_px")), *((self.mm, pair) for pair in reversed(_MM))]
        for target, pair in pairs:
            if {"fov", *pair} <= set(known):
                columns = [known[name] for name in ("fov", *pair)]
                fov, x, y = (tabular.whole(path, columns).numbers[name].tolist() for name in columns)
                if len(set(fov)) < len(fov):
                    raise ValueError(f"{path}: a field of view comes twice; give the export of one slide")
                target.update({int(f): (a, b) for f, a, b in zip(fov, x, y, strict=True) if np.isfinite(f + a + b)})
        if not self.px and not self.mm:
            raise ValueError(
                f"{path}: has no fov with x_global_px and y_global_px, or with mm; restore the file that AtoMx wrote"
            )

    def pixel_um(self, seen_px: Places) -> float | None:
        """um per px from places that are known in mm and in px; None where they are not.

        Args:
            seen_px: places that other tables tell, where the file itself has mm alone.

        Raises:
            ValueError: it is that of no instrument.
        """
        px = self.px or seen_px
        both = sorted(set(px) & set(self.mm))
        if not both or (len(both) == 1 and not self.px):
            return None
        a, b = (np.array([places[f] for f in both]) for places in (px, self.mm))
        if len(both) > 1:  # origins may differ, and so may the direction of y: distances do not
            a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        size = round(float(1000 * np.sqrt((b**2).sum() / max(1e-12, float((a**2).sum())))), 6)
        if not PIXEL_RANGE[0] <= size <= PIXEL_RANGE[1]:
            raise ValueError(
                f"{self.path}: its places in px and in mm make a pixel {size:.3g} um wide, which none is; restore the "
                "file, or give space_um in the manifest"
            )
        return size

    def space_um(self, told: float | None, seen_px: Places, folder: Path) -> tuple[float, list[str]]:
        """(um per px, notes): what the manifest tells, else what the files do.

        Raises:
            ValueError: neither does.
        """
        if told is not None:
            try:
                found = self.pixel_um(seen_px)
            except ValueError:
                found = None  # the manifest was asked for just this
            apart = found is not None and abs(found / told - 1) > 0.01
            return told, [f"space_um {told} of the manifest, the files tell {found:.5f}"] if apart else []
        found = self.pixel_um(seen_px)
        if found is None:
            raise ValueError(
                f"{folder}: no file tells the size of a pixel (places of the fields of view in px and in mm); give um "
                "per pixel in the column space_um (0.12028 on commercial instruments, 0.18 on the first prototypes)"
            )
        return found, []

    def to_global(self, fov: npt.NDArray[np.int64], local: Numbers, told_um: float | None, path: Path) -> Numbers:
        """Local px [n, 2] -> global px.

        Raises:
            ValueError: the place of a field of view is not known in px.
        """
        px = self.px
        if not px and told_um is not None:
            px = {f: (x * 1000 / told_um, y * 1000 / told_um) for f, (x, y) in self.mm.items()}
        names, own = np.unique(fov, return_inverse=True)
        unknown = [f for f in names.tolist() if f not in px]
        if unknown:
            raise ValueError(
                f"{path}: has no global px, and field of view {unknown[0]} has no place in px; give fov_positions_file "
                "of the same export, and where it has mm alone, space_um in the manifest"
            )
        return np.asarray(np.array([px[f] for f in names.tolist()]).reshape(-1, 2)[own] + local, np.float64)


def check_local(path: Path, local: Numbers, whole: Numbers | None) -> None:
    """Raises ValueError where places within the field of view lie beside it: columns may be swapped."""

    def fits(xy: Numbers) -> bool:
        return not len(xy) or bool(xy.min() >= -_SLACK_PX and xy.max() <= FOV_PX)

    if fits(local):
        return
    swapped = whole is not None and fits(whole)
    cure = "the names of the local and the global columns are swapped; swap them back" if swapped else (
        "restore the file that AtoMx wrote"
    )  # fmt: skip
    raise ValueError(
        f"{path}: local px reach {np.abs(local).max():.0f}, a field of view has at most {FOV_PX:.0f}; {cure}"
    )


def places(path: Path, table: Mapping[str, Numbers], fovs: Fovs, told_um: float | None) -> tuple[Numbers, Places]:
    """([n, 2] global px, the place of each field of view that follows) of x_local, y_local, x_global, y_global.

    Raises:
        ValueError: a place is no number, lies beside its field of view, or cannot be made global.
    """
    pairs = {kind: np.column_stack([table[f"x_{kind}"], table[f"y_{kind}"]])
             for kind in ("local", "global") if {f"x_{kind}", f"y_{kind}"} <= set(table)}  # fmt: skip
    if not pairs:
        raise ValueError(f"{path}: has neither global nor local px; restore the file that AtoMx wrote")
    for xy in pairs.values():
        bad = np.flatnonzero(~np.isfinite(xy).all(axis=1))
        if bad.size:
            raise ValueError(f"{path}: row {bad[0] + 1} has no place; restore the file that AtoMx wrote")
    fov = table["fov"].astype(np.int64)
    local, whole = pairs.get("local"), pairs.get("global")
    if local is not None:
        check_local(path, local, whole)
    if whole is None:
        assert local is not None  # one of both is there
        return fovs.to_global(fov, local, told_um, path), {}
    if local is None:
        return whole, {}
    names, own = np.unique(fov, return_inverse=True)
    size = np.bincount(own)
    x, y = (np.bincount(own, (whole - local)[:, k]) / size for k in (0, 1))
    return whole, {f: (a, b) for f, a, b in zip(names.tolist(), x.tolist(), y.tolist(), strict=True)}
