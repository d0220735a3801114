"""Who trains in a run folder: one job at a time, and never a lock that outlives its holder.

In: a run folder. Out: while held, a file in it, `.owner.<host>.<job>.<pid>.<start>.<random>.tmp` (storm.files), whose
name alone tells whose it is. Files of processes known to be gone count for nothing: a process of this machine that
runs no more, a job that has ended, or that SLURM has started again since.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from storm import files
from storm.train import engine
from storm.train.engine import World

_NAME = "owner"


def _claim(run_dir: Path) -> Path:
    """Write this process's file, then look for others: of two that begin at once, none overlooks the other.

    Raises:
        ValueError: another process that may be alive holds the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    mine = files.temporary(run_dir / _NAME)
    mine.touch()
    files.sweep(run_dir, _NAME)
    others = [left for left in files.leftovers(run_dir) if left.path.name.startswith(f".{_NAME}.")]
    alive = [left for left in others if left.path != mine and not left.dead]
    if alive:
        mine.unlink()
        raise ValueError(
            f"{run_dir}: {alive[0].owner} trains here; wait for it, end it, or choose another run_dir (where it is "
            f"certain that it has ended, remove {alive[0].path.name})"
        )
    return mine


@contextlib.contextmanager
def owned(run_dir: Path, world: World) -> Iterator[None]:
    """Hold a run folder: rank 0 for all ranks, which must call it together. One that it made and in which nothing was
    written, as by a run that is refused, is removed again.

    Raises:
        ValueError: another living job holds it; raised on every rank.
    """
    mine, fault, is_new = None, "", not run_dir.exists()
    if world.rank == 0:
        try:
            mine = _claim(run_dir)
        except ValueError as error:
            fault = str(error)
    if fault := engine.gather(fault)[0]:
        raise ValueError(fault)
    try:
        yield
    finally:
        if mine:
            mine.unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):  # it holds something
                    run_dir.rmdir()
