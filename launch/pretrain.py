"""Pretrain: `deepspeed --num_gpus N launch/pretrain.py --config FILE`, or `python launch/pretrain.py ...` on one rank.

Exit code 0: finished, or stopped where asked; 1: a loss or gradient was not finite; 2: wrong usage, config or data.
"""

import argparse
import os
import sys
from pathlib import Path

from storm import config
from storm.commands import INTERRUPTED, explain
from storm.train.dry_run import dry_run
from storm.train.preflight import preflight
from storm.train.trainer import NotFiniteError, RankError, pretrain


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pretrain STORM on a shard set.")
    parser.add_argument("--config", type=Path, help="YAML of what differs from the defaults")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default: auto")
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY", help="resume though this key changed"
    )
    parser.add_argument("--stop-after-step", type=int, metavar="N", help="write a checkpoint there and stop")
    parser.add_argument("--dry-run", action="store_true", help="print layout, sizes and memory, run one made-up batch")
    parser.add_argument("--preflight", action="store_true", help="look at every node and link of the job, and stop")
    parser.add_argument("--ranks", type=int, metavar="N", help="of --dry-run: as if on so many ranks (default: these)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args()


def main() -> int:
    """Run it; the exit code."""
    args = arguments()
    rank = int(os.environ.get("RANK", "0"))
    try:
        loaded = config.load(config.RunConfig, args.config, args.overrides)
        if args.dry_run:
            if rank == 0:
                print(dry_run(loaded, args.ranks or int(os.environ.get("WORLD_SIZE", "1"))))
        elif args.preflight:
            return preflight(loaded)
        else:
            pretrain(loaded, args.resume, args.stop_after_step, args.allow_change)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, NotFiniteError) as error:
        if rank == 0 or isinstance(error, RankError):  # the others have met the same
            text = explain(error) if isinstance(error, OSError) else error
            print(f"error: {text}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, NotFiniteError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
