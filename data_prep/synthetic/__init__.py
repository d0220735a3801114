"""A synthetic tissue with known truth, written as slides and vendors' files: the embedded data and the tests' ground.

`write_corpus(folder, size, seed, workers)` writes manifest, images, measurements and the oracle; `SIZES`: how large.
"""

from data_prep.synthetic.corpus import SIZES, Size, write_corpus

__all__ = ["SIZES", "Size", "write_corpus"]
