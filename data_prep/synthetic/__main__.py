"""Command line: `python -m data_prep.synthetic OUT --size SIZE --seed 0 --workers 2`."""

import argparse
import sys
from pathlib import Path

from data_prep.synthetic.corpus import SIZES, write_corpus
from storm.commands import guarded


def main() -> int:
    """Parse the arguments and write the corpus."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.synthetic", description="Write synthetic tissue.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size", choices=sorted(SIZES), default="quickstart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args()
    print(write_corpus(args.out, args.size, args.seed, args.workers))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
