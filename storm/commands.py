"""What every command does with a fault that its user can mend: one line on stderr and an exit code, no traceback.

In: the command's body. Out: its exit code; 2 for wrong usage or input, 130 when interrupted, 141 when
the reader of its output has gone (`... | head`).
"""

import io
import os
import sys
from collections.abc import Callable

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_NO_READER = 141  # 128 + SIGPIPE


def guarded(body: Callable[[], int]) -> int:
    """Run a command's body. Faults of the program itself keep their traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal's encoding lacks must not stop the work
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = body()
        if sys.stdout:
            sys.stdout.flush()  # here, where a reader that has gone is not a traceback
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write goes nowhere
        return _NO_READER
    except KeyboardInterrupt:
        print("interrupted; what is complete stays, the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: {explain(error)}", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


def explain(error: OSError) -> str:
    """A system's error with its file and a cure."""
    cures = {PermissionError: "choose a folder that you may write to", FileNotFoundError: "check the path"}
    cure = cures.get(type(error), "check the path, the free space and the permissions")
    return f"{error.filename or 'a file'}: {error.strerror or error}; {cure}"
