"""What a build would refuse without looking at a pixel: no alignment, no pixel size, no genes, no outlines of tissue.

In: a manifest row, the header of its image, the files of its measurement. Out: how many profiles it has, or the
ValueError of the build: the readers and the placing of the build itself are asked, so that both say the same. A
measurement is read, without its counts, where its files are small or it is an h5ad; of a larger Xenium or CosMx export
the files that tell its space are; of other large ones nothing.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep import one_slide, outlines, platforms, profiles, slides
from data_prep.manifest import ManifestRow
from data_prep.platforms import Frame, Measurement
from storm.prep_config import PrepConfig

SMALL_BYTES = 50_000_000  # of a measurement's files: about a second
FAULTS = (ValueError, OSError, EOFError, zlib.error)  # what a damaged or wrong input raises


def check(row: ManifestRow, slide: slides.Header | None, found: Sequence[Path], config: PrepConfig) -> int | None:
    """Read the user's outlines of the tissue, and read and place the measurement as far as that is cheap.

    Args:
        slide: header of the image; None for expression alone.
        found: the measurement's files.

    Returns:
        how many profiles it has; None where it was not read.

    Raises:
        one of FAULTS: the build would fail.
    """
    if row.tissue and slide:
        outlines.read(row.tissue, (slide.width_px0, slide.height_px0))
    if row.source is None:
        return None
    reader = platforms.reader(row.reader)
    whole = row.measurement is not None and row.measurement.suffix == ".h5ad"
    whole = whole or sum(path.stat().st_size for path in found) <= SMALL_BYTES
    frame = None if whole or not hasattr(reader, "frame") else reader.frame(row.source)
    if not whole and frame is None:
        return None
    measured = _without_profiles(row, frame) if frame else reader.read(row.source)
    placed = profiles.place(row, slide, measured, config)
    one_slide.check_resolution(row, placed.mpp.value, measured, config)
    if not whole:
        return None
    profiles.profiles_of(row, measured, placed, config)
    return len(measured.ids)


def _without_profiles(row: ManifestRow, frame: Frame) -> Measurement:
    """A measurement of which only its space is known; its one place keeps the frame of expression alone finite."""
    none = np.zeros(1)
    return Measurement(
        row.platform, "cell", [""], np.zeros((1, 2)), none.astype(np.float32), none.astype(np.uint8),
        platforms.counts_in_memory(np.zeros(2, np.int64), none[:0], none[:0]), [], [], none[:0].astype(np.uint8),
        space_um=frame.space_um, matrix=frame.matrix, matrix_source=frame.source,
    )  # fmt: skip
