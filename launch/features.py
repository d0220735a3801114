"""Cache a frozen encoder's features beside a shard set: `python launch/features.py --config FILE --variants 8`.

The config is that of the run, which then says data.features=auto. What is complete stays.
"""

import argparse
import sys
from pathlib import Path

from storm import config
from storm.commands import guarded


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description="Cache a frozen encoder's features beside a shard set.")
    parser.add_argument("--config", type=Path, help="YAML of the run")
    parser.add_argument(
        "--variants", type=int, default=8, metavar="V", help="of each group: itself, and V - 1 augmented"
    )
    parser.add_argument(
        "--split", action="append", choices=("train", "val", "test"), help="may come again (default: train)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()

    def run() -> int:
        from storm.train import trainer

        run_config = config.load(config.RunConfig, args.config, args.overrides)
        trainer.cache_features(run_config, args.variants, args.split or ["train"])
        return 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
