"""Stored arrays: the same as numpy reads, whatever save_arrays writes; anything else is refused."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from storm import schema
from storm.npz import load_arrays

DTYPES = st.sampled_from(["uint8", "int8", "uint16", "int32", "int64", "float32", "float64", "bool"])
ARRAYS = DTYPES.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=9)))


@given(found=st.dictionaries(st.sampled_from(["region", "xy_um", "ids", "indptr", "gene"]), ARRAYS, min_size=1))
def test_the_arrays_are_those_that_numpy_reads(found: dict[str, np.ndarray]) -> None:
    data = schema.save_arrays({name: np.ascontiguousarray(array) for name, array in found.items()})
    mine = load_arrays(data, "here")
    with np.load(io.BytesIO(data), allow_pickle=False) as plain:
        assert list(mine) == plain.files
        for name, array in mine.items():
            assert array.dtype == plain[name].dtype and array.shape == plain[name].shape
            assert array.tobytes() == plain[name].tobytes() and array.flags.writeable and array.flags.aligned


def bad(kind: str) -> bytes:
    """Bytes that are no stored npz of plain arrays."""
    good = schema.save_arrays({"gene": np.arange(9)})
    buffer = io.BytesIO()
    if kind == "deflated":
        np.savez_compressed(buffer, gene=np.arange(9))
    elif kind == "objects":
        np.savez(buffer, gene=np.array([None, {}], dtype=object))
    elif kind == "fortran":
        np.savez(buffer, gene=np.asfortranarray(np.ones((3, 4))))
    elif kind == "longer":
        return good.replace(b"(9,)", b"(8,)")
    else:
        return {"cut": good[: len(good) // 2], "none": b"", "other": b"not a zip"}[kind]
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["deflated", "objects", "fortran", "longer", "cut", "none", "other"])
def test_other_bytes_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"train/000000\.tar: group s_0: no readable npz \(.*\); pack again"):
        load_arrays(bad(kind), "train/000000.tar: group s_0")
