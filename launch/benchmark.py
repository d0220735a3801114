"""How fast and how far: `python launch/benchmark.py PART ...`; each part prints its table. See launch/SCALING.md.

Exit code 0, or 2: wrong usage, config or data.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from storm.commands import guarded

MODEL_TABLES = ("speed", "profiles", "memory")


def _overhead(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    part = commands.add_parser("overhead", help="share of a step around forward, backward and optimizer, on one rank")
    part.add_argument("--config", type=Path, help="YAML of what differs from the defaults")
    part.add_argument("--steps", type=int, default=8, metavar="N", help="steps that are measured (default: 8)")
    part.add_argument("overrides", nargs="*", metavar="section.key=value")
    part.set_defaults(run=overhead)


def overhead(args: argparse.Namespace) -> int:
    """`benchmark.py overhead`."""
    from storm import config
    from storm.train import overhead as part

    loaded = config.load(config.RunConfig, args.config, args.overrides)
    print(part.text(loaded, part.measure(loaded, args.steps), args.steps))
    return 0


def _scaling(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    part = commands.add_parser("scaling", help="1 to 512 GPUs by arithmetic: reads, network, memory, efficiency")
    part.add_argument("--shards", type=Path, help="take the mean group of this shard set, not the assumed one")
    part.set_defaults(run=scaling)


def scaling(args: argparse.Namespace) -> int:
    """`benchmark.py scaling`."""
    from storm.train import scaling as part

    print(part.report(part.from_shards(args.shards) if args.shards else part.Assumptions()))
    return 0


def _loader(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    part = commands.add_parser("loader", help="the stream: decoded groups/s, shuffles, resume (about 5 minutes)")
    part.add_argument("--turns", type=int, default=7, help="turns of each loader (default: 7)")
    part.add_argument("--groups", type=int, nargs="*", default=[19_000, 1_900_000], help="sizes of a synthetic index")
    part.add_argument("--scratch", help="folder for temporary shards (default: that of the system)")
    part.set_defaults(run=loader)


def loader(args: argparse.Namespace) -> int:
    """`benchmark.py loader`."""
    from storm.data import benchmark, benchmark_order

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        print(benchmark.rate_tables(args.turns, Path(scratch), benchmark.GROUPS), flush=True)
    print(f"\n{benchmark_order.shuffle_table()}\n", flush=True)
    if args.groups:
        print(benchmark_order.scale_table(args.groups), flush=True)
    return 0


def _model(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    part = commands.add_parser("model", help="the model on a CPU: beside timm, beside one tile per profile, its memory "
                                             "(about 15 minutes)")  # fmt: skip
    part.add_argument("--only", nargs="+", choices=MODEL_TABLES, default=MODEL_TABLES, help="some tables")
    part.add_argument("--turns", type=int, default=5, help="turns of each (default: 5)")
    part.add_argument("--threads", type=int, default=2)
    part.add_argument("--preset", default="", help="of all tables (default: small, for memory base)")
    part.set_defaults(run=model)


def model(args: argparse.Namespace) -> int:
    """`benchmark.py model`."""
    import torch

    from storm.presets import resolve_model
    from storm.train import benchmark_memory
    from storm.train import benchmark_model as part

    torch.set_num_threads(args.threads)
    small, base = (resolve_model({"preset": args.preset or name}) for name in ("small", "base"))
    tables = {
        "speed": lambda: part.gemm_share(small, part.GROUP, args.turns),
        "profiles": lambda: part.profile_rates(small, (part.CELLS, part.SPOTS), args.turns),
        "memory": lambda: benchmark_memory.memory_table(base, part.SPOTS, part.GENES, args.threads),
    }
    for name in args.only:
        preset = args.preset or ("base" if name == "memory" else "small")
        print(f"### {name}, preset {preset}\n\n{tables[name]()}\n", flush=True)
    return 0


PARTS = (_loader, _model, _overhead, _scaling)


def main() -> int:
    """Run a part; its exit code."""
    parser = argparse.ArgumentParser(description="How fast and how far.")
    commands = parser.add_subparsers(required=True, metavar="PART")
    for add in PARTS:
        add(commands)
    args = parser.parse_args()
    return guarded(lambda: int(args.run(args)))


if __name__ == "__main__":
    sys.exit(main())
