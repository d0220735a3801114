"""`storm evaluate` from a checkout: the same arguments, the same exit codes."""

import sys

from storm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
