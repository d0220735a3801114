"""Pretrain: `deepspeed --num_gpus N launch/pretrain.py --config FILE`, or `python launch/pretrain.py ...` on one rank.

The same under torchrun and srun; launch/README.md has the ways and the exit codes. 0: finished, or stopped where asked;
75: saved before its end, the same command goes on.
"""

import argparse
import sys
from pathlib import Path

from storm import config
from storm.commands import INTERRUPTED, explain
from storm.train import ranks, stop


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
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if args.ranks is not None and not args.dry_run:
        parser.error("--ranks is of --dry-run; ranks of a training are the launcher's: torchrun --nproc_per_node N")
    return args


def tell(error: Exception) -> int:
    """Say what is wrong in one line; the exit code."""
    print(f"error: {explain(error) if isinstance(error, OSError) else error}", file=sys.stderr, flush=True)
    return int(getattr(error, "code", stop.USAGE))


def act(args: argparse.Namespace, run: config.RunConfig, place: ranks.Place) -> int:
    """Train, or look before; the exit code."""
    from storm.train import dry_run, preflight, trainer

    if args.preflight:
        return preflight.preflight(run)
    if not args.dry_run:
        return trainer.pretrain(run, args.resume, args.stop_after_step, args.allow_change).code
    if place.rank == 0:
        print(dry_run.dry_run(run, args.ranks or place.size))
    return 0


def main() -> int:
    """Run it; the exit code."""
    args = arguments()
    stop.listen()
    try:
        place = ranks.current()
    except ValueError as error:
        return tell(error)
    try:
        run = config.load(config.RunConfig, args.config, args.overrides)
    except ValueError as error:
        return stop.USAGE if place.local_rank else tell(error)  # each node says what is wrong there, once
    # Only now, for it takes seconds, in which a signal must not end the process.
    from storm.train.trainer import NotFiniteError

    try:
        return act(args, run, place)
    except stop.ToldError as error:
        return error.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, NotFiniteError, stop.RankLeftError) as error:
        return tell(error)
    finally:
        stop.end_listening()


if __name__ == "__main__":
    sys.exit(main())
