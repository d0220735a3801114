"""The segments of a TIFF page, tiles or strips: where they lie in the file, and their bytes as pixels.

In: pages as tifffile parsed them, and bytes of the file. Out: `Layout`, plain data that may be sent to another process,
`decoded`, and a cache of decoded segments of bounded size.

Sizes that a segment tells of itself are compared with those of the page before memory is taken for them.
"""

import math
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg

from data_prep.slides.base import Pixels

JPEG, J2K_YCBCR = 7, 33003
_J2K = (J2K_YCBCR, 33005, 34712)
_RAW = {
    1: lambda data, size: data, 5: lambda data, size: imagecodecs.lzw_decode(data, out=size),
    8: lambda data, size: imagecodecs.zlib_decode(data, out=size),
    32946: lambda data, size: imagecodecs.zlib_decode(data, out=size),
    32773: lambda data, size: imagecodecs.packbits_decode(data, out=size),
    50000: lambda data, size: imagecodecs.zstd_decode(data, out=size),
}  # fmt: skip
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6
_ADOBE = bytes.fromhex("ffee000e41646f6265006400000000")  # ... and the transform: 0 is RGB, 1 is YCbCr
MAX_SEGMENT_PX = 16 << 20
_PIECE_BYTES = 32 << 20
FAULTS = (RuntimeError, ValueError, TypeError, struct.error, IndexError)  # of imagecodecs and simplejpeg
Offsets = npt.NDArray[np.int64]


class UnusualError(Exception):
    """A TIFF that another reader must read, and why."""


class InOnePieceError(UnusualError):
    """A TIFF that cannot be read in parts."""


@dataclass(frozen=True)
class Layout:
    """One level: its size, the grid of its segments, and how they are coded."""

    width_px: int
    height_px: int
    segment_px: tuple[int, int]  # height, width
    tiled: bool
    codec: int
    photometric: int
    predictor: int
    samples: int  # in one segment
    alpha: int  # 0 none, 1 colours are multiplied by it, 2 they are not
    head: bytes  # of a JPEG: its tables, and which colours it holds
    offsets: Offsets  # [planes, segments]
    counts: Offsets

    @property
    def cols(self) -> int:
        """Segments side by side."""
        return -(-self.width_px // self.segment_px[1])

    @property
    def takes_memory(self) -> bool:
        """Whether it is decoded into memory that is given."""
        return self.codec == JPEG and self.samples == 3

    @property
    def scales(self) -> bool:
        """Whether it can be decoded at an eighth of its size."""
        return self.codec == JPEG and self.tiled and all(side % 8 == 0 for side in self.segment_px)


def _tag(page: Any, name: str, default: int) -> int:
    tag = page.tags.get(name)
    return default if tag is None else int(tag.value[0] if isinstance(tag.value, tuple) else tag.value)


def _alpha(page: Any, samples: int) -> int:
    extra = tuple(int(kind) for kind in page.extrasamples)
    if samples in (1, 3) and not extra:
        return 0
    if samples == 4 and len(extra) == 1:
        return extra[0] if extra[0] in (1, 2) else 0
    raise UnusualError(f"{samples} samples per pixel")


def layout_of(pages: Sequence[Any]) -> Layout:
    """The layout of a level: one page, or three of one colour each.

    Raises:
        UnusualError: pixels or compression that are not read here.
    """
    page = pages[0].keyframe
    bits = page.bitspersample if isinstance(page.bitspersample, tuple) else (page.bitspersample,)
    if set(bits) != {8} or int(page.sampleformat) != 1 or page.imagedepth != 1:
        raise UnusualError("pixels are not of 8 bits")
    if _tag(page, "FillOrder", 1) != 1 or _tag(page, "Orientation", 1) != 1:
        raise UnusualError("turned pixels")
    planes = len(pages) if len(pages) > 1 else (page.samplesperpixel if int(page.planarconfig) == 2 else 1)
    samples = 1 if planes > 1 else page.samplesperpixel
    photometric, codec = int(page.photometric), int(page.compression)
    if planes not in (1, 3) or photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR):
        raise UnusualError(f"{planes} planes, photometric {photometric}")
    if codec == JPEG and samples not in (1, 3):
        raise UnusualError(f"JPEG of {samples} samples")
    if codec not in (JPEG, *_J2K, *_RAW) or (photometric == _YCBCR and codec in _RAW):
        raise UnusualError(f"compression {codec}")
    height, width = page.imagelength, page.imagewidth
    side = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
    if min(side) < 1 or side[0] * side[1] > MAX_SEGMENT_PX:
        raise InOnePieceError(f"segments of {side[1]} x {side[0]} px")
    n = -(-width // side[1]) * -(-height // side[0])
    offsets = np.array([list(p.dataoffsets) for p in pages], np.int64).reshape(planes, -1)
    counts = np.array([list(p.databytecounts) for p in pages], np.int64).reshape(planes, -1)
    if offsets.shape != (planes, n) or counts.shape != (planes, n):
        raise UnusualError("segments are missing")
    return Layout(
        width, height, side, page.is_tiled, codec, photometric, _tag(page, "Predictor", 1), samples,
        _alpha(page, samples) if planes == 1 else 0, _jpeg_head(page.jpegtables, photometric, samples), offsets, counts,
    )  # fmt: skip


def _jpeg_head(tables: bytes | None, photometric: int, samples: int) -> bytes:
    start = tables[:-2] if tables else b"\xff\xd8"
    if samples == 3:
        start += _ADOBE + bytes([photometric == _YCBCR])
    return start


def names_its_colours(layout: Layout, data: bytes) -> bool:
    """Whether a JPEG segment says itself, against the page, that its pixels are YCbCr, or are RGB."""
    if layout.samples != 3:
        return False
    at, found = 2, []
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xC0, 0xC1, 0xC2, 0xDA):
        (length,) = struct.unpack(">H", data[at + 2 : at + 4])
        body = data[at + 4 : at + 2 + length]
        if data[at + 1] == 0xE0 and body.startswith(b"JFIF"):
            found.append(1)
        if data[at + 1] == 0xEE and body.startswith(b"Adobe") and len(body) >= 12:
            found.append(body[11])
        at += 2 + length
    return any(kind != (layout.photometric == _YCBCR) for kind in found)


def shape_of(layout: Layout, rows: int, step: int = 1) -> tuple[int, int, int]:
    """Shape of a decoded segment of one plane."""
    return rows // step, layout.segment_px[1] // step, layout.samples


def decoded(
    layout: Layout, planes: Sequence[bytes], rows: int, step: int = 1, memory: Pixels | None = None
) -> Pixels:  # fmt: skip
    """The pixels [height, width, 3] of a segment.

    Args:
        planes: its bytes, of each colour where these lie apart.
        rows: of the segment; a last strip has fewer.
        step: 1, or 2, 4, 8 where layout.scales: the sides are so much smaller.
        memory: of its shape, for a JPEG of three colours, the pixels of which it holds then.

    Raises:
        RuntimeError, ValueError, TypeError, struct.error, IndexError: it is damaged.
    """
    shape = shape_of(layout, rows, step)
    found = [_plane(layout, data, shape, step, memory) for data in planes]
    pixels = found[0] if len(found) == 1 else np.concatenate(found, axis=2)
    if layout.photometric == _WHITE_IS_ZERO:
        pixels = 255 - pixels
    if pixels.shape[2] == 4:
        return _flat(pixels, layout.alpha)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def _plane(layout: Layout, data: bytes, shape: tuple[int, int, int], step: int, memory: Pixels | None) -> Pixels:
    if layout.codec == JPEG:
        pixels = _jpeg(layout, data, shape, step, memory)
    elif layout.codec in _J2K:
        pixels = _jpeg2000(layout, data, shape)
    else:
        size = shape[0] * shape[1] * shape[2]
        raw = np.frombuffer(_RAW[layout.codec](data, size), np.uint8)
        if raw.size < size:
            raise ValueError(f"{raw.size} of {size} bytes")
        pixels = raw[:size].reshape(shape)
        if layout.predictor == 2:
            pixels = imagecodecs.delta_decode(pixels, axis=1)
        elif layout.predictor != 1:
            raise ValueError(f"predictor {layout.predictor}")
    if pixels.shape != shape:
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} px of {pixels.shape[2]} samples, not {shape}")
    return pixels


def _jpeg(layout: Layout, data: bytes, shape: tuple[int, int, int], step: int, memory: Pixels | None) -> Pixels:
    colours = {1: "GRAY", 3: "RGB"}[layout.samples]
    # Memory of the right size is given: a header that tells a larger one is refused by it. Strict, as OpenSlide is.
    memory = np.empty(shape, np.uint8) if memory is None else memory
    return simplejpeg.decode_jpeg(
        layout.head + data[2:], colours, fastdct=False, fastupsample=False, buffer=memory, min_factor=step,
        min_height=shape[0] if step > 1 else 0, min_width=shape[1] if step > 1 else 0,
    )  # fmt: skip


def _jpeg2000(layout: Layout, data: bytes, shape: tuple[int, int, int]) -> Pixels:
    marker, width, height, left, top = struct.unpack_from(">2xH4xIIII", data)
    parts = [struct.unpack_from(">BBB", data, 42 + 3 * i) for i in range(struct.unpack_from(">H", data, 40)[0])]
    if marker != 0xFF51 or (height - top, width - left, len(parts)) != shape or set(parts) != {(7, 1, 1)}:
        raise ValueError("its header does not tell the size or the samples of its page")
    pixels = imagecodecs.jpeg2k_decode(data, numthreads=1)
    return _rgb_of_ycbcr(pixels) if layout.codec == J2K_YCBCR else pixels


def _rgb_of_ycbcr(pixels: Pixels) -> Pixels:
    """ITU-R BT.601 with the rounding of OpenSlide."""
    y, cb, cr = (pixels[..., i].astype(np.int32) for i in range(3))
    red = y + _R_CR[cr]
    green = y + ((_G_CB[cb] + _G_CR[cr]) >> 16)
    blue = y + _B_CB[cb]
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


_CHROMA = np.arange(256) - 128
_R_CR, _B_CB = (np.rint(factor * _CHROMA).astype(np.int32) for factor in (1.402, 1.772))
_G_CB = np.rint((1 << 16) * (0.5 - 0.34414 * _CHROMA)).astype(np.int32)
_G_CR = np.rint((1 << 16) * -0.71414 * _CHROMA).astype(np.int32)


def _flat(pixels: Pixels, alpha: int) -> Pixels:
    """[H, W, 3] on white."""
    colours, cover = pixels[..., :3], pixels[..., 3:]
    if alpha == 0:
        return np.ascontiguousarray(colours)
    if alpha == 2:
        colours = np.rint(colours * (cover / np.float32(255))).astype(np.uint8)
    return np.minimum(colours.astype(np.uint16) + 255 - cover, 255).astype(np.uint8)


def _uneven(size: int) -> Pixels:
    """[size] memory that begins beside a multiple of 16 bytes.

    Rows at such multiples libjpeg-turbo writes past the processor's caches (its SIMD colour conversion stores them
    without a copy there), so that what reads the pixels next waits for main memory: decoding takes a seventh longer,
    and shrinking twice as long.
    """
    memory = np.empty(size + 32, np.uint8)
    start = -memory.ctypes.data % 16 + 8
    return memory[start : start + size]


class Cache:
    """Decoded segments, and the memory for new ones: those of which every pixel was asked for go first, then the least
    recently used.

    Memory is taken in large pieces, which the system backs with large pages, and used again while the processor's
    caches hold it: fresh memory costs as much as a decode.
    """

    def __init__(self, budget: int) -> None:
        """Of at most `budget` bytes, or of one segment."""
        self._budget, self._held = budget, 0
        self._segments: OrderedDict[tuple[int, ...], Pixels] = OrderedDict()
        self._left_px: dict[tuple[int, ...], int] = {}
        self._free: dict[tuple[int, ...], list[Pixels]] = {}

    def get(self, key: tuple[int, ...]) -> Pixels | None:
        """A segment, if it is still held."""
        found = self._segments.get(key)
        if found is not None:
            self._segments.move_to_end(key)
        return found

    def memory(self, shape: tuple[int, int, int]) -> Pixels:
        """An array to decode into; it goes to `put`, or comes back by `give`."""
        free = self._free.setdefault(shape, [])
        if not free:
            # The first goes out first: the end of a piece may lie on small pages, where a decode takes a fifth longer.
            count = max(1, _PIECE_BYTES // math.prod(shape))
            free.extend(_uneven(count * math.prod(shape)).reshape(count, *shape)[::-1])
        return free.pop()

    def give(self, memory: Pixels) -> None:
        """Take back what `memory` gave."""
        self._free.setdefault(memory.shape, []).append(memory)

    def put(self, key: tuple[int, ...], pixels: Pixels, size_px: int) -> None:
        """Hold a segment, `size_px` of which lie on the slide."""
        self._segments[key], self._left_px[key] = pixels, size_px
        self._held += pixels.nbytes
        while self._held > self._budget and len(self._segments) > 1:
            self._drop(next(iter(self._segments)))

    def used(self, key: tuple[int, ...], size_px: int) -> None:
        """So many pixels of a segment were copied. Tiles abut: what was copied whole is not asked for again."""
        self._left_px[key] -= size_px
        if self._left_px[key] <= 0:
            self._drop(key)

    def _drop(self, key: tuple[int, ...]) -> None:
        old = self._segments.pop(key)
        del self._left_px[key]
        self._held -= old.nbytes
        if old.shape in self._free:
            self.give(old)
