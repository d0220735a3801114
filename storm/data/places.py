"""Where files lie: on which kind of file system, and which folder of a node is its own.

In: a path, the environment. Out: what decides how far apart a stream may read, and where it keeps copies.
"""

import os
import re
import tempfile
from pathlib import Path

# Of parallel and network file systems, as the kernel names them in mountinfo; fuse.* too: sshfs, s3fs, gcsfuse, ...
_SHARED = re.compile(
    r"nfs4?|cifs|smb3?|smbfs|lustre|gpfs|beegfs|beegfs_nodev|ceph|glusterfs|orangefs|pvfs2|panfs|wekafs|afs|"
    r"9p|daos|fuse(\..+)?"
)
_MEMORY = {"tmpfs", "ramfs"}


def file_system(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds a path, which need not exist; '' where the kernel does not tell."""
    if not mountinfo.is_file():
        return ""
    absolute = path.resolve()
    found, longest = "", -1
    for line in mountinfo.read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        mount = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
        if absolute.is_relative_to(mount) and len(mount) >= longest:
            found, longest = after.split()[0], len(mount)
    return found


def is_shared(path: Path) -> bool:
    """Whether a path lies on a parallel or network file system."""
    return bool(_SHARED.fullmatch(file_system(path)))


def job_folder() -> Path | None:
    """The folder on a local disk that the scheduler gave this job: SLURM_TMPDIR, then TMPDIR; None outside a job, or
    where it is memory."""
    named = os.environ.get("SLURM_TMPDIR") or (os.environ.get("TMPDIR") if os.environ.get("SLURM_JOB_ID") else "")
    found = Path(named) if named else None
    return found if found and found.is_dir() and file_system(found) not in _MEMORY else None


def own_folder(path: Path) -> Path:
    """`path`, made where it is missing, for this user alone.

    Raises:
        ValueError: it is another user's.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise ValueError(f"{path}: belongs to another user; name a folder of your own (data.cache_dir, data.stage_dir)")
    return path


def cache_folder(asked: str) -> Path:
    """The folder for groups of remote shards: as asked; `auto`: in the job's folder, or that of temporaries."""
    if asked != "auto":
        return own_folder(Path(asked))
    return own_folder((job_folder() or Path(tempfile.gettempdir())) / f"storm-{os.getuid()}")


def loader_processes(asked: int | str) -> int:
    """The number of loader processes of a rank; `auto`: the cores this process may use, but one for the rank itself.

    A launcher that starts several ranks in one set of cores (torchrun: LOCAL_WORLD_SIZE, deepspeed: LOCAL_SIZE) leaves
    each its part; a SLURM step has bound them already.
    """
    if not isinstance(asked, str):
        return asked
    cores = len(os.sched_getaffinity(0))
    if "SLURM_STEP_ID" not in os.environ:
        cores //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))))
    return max(0, cores - 1)
