"""What STORM costs on this machine: python launch/benchmark.py PART. Argument parsing alone."""

import argparse
import tempfile
from pathlib import Path


def loader(args: argparse.Namespace) -> None:
    """Rates beside other loaders, quality of the shuffles, resume and memory at scale."""
    from storm.data import benchmark, benchmark_order

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        print(benchmark.rate_tables(args.turns, Path(scratch), benchmark.GROUPS), flush=True)
    print(f"\n{benchmark_order.shuffle_table()}\n", flush=True)
    if args.groups:
        print(benchmark_order.scale_table(args.groups), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    own = parts.add_parser("loader", help="the stream: decoded groups/s, shuffles, resume (about 5 minutes)")
    own.add_argument("--turns", type=int, default=7, help="turns of each loader (default: 7)")
    own.add_argument("--groups", type=int, nargs="*", default=[19_000, 1_900_000], help="sizes of a synthetic index")
    own.add_argument("--scratch", help="folder for temporary shards (default: that of the system)")
    own.set_defaults(run=loader)
    args = parser.parse_args()
    args.run(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
