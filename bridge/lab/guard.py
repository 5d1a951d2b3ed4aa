"""Removes a lab when its owner is gone, however it went (SIGKILL included).

`python -m bridge.lab.guard LAB` waits for the end of its standard input, a pipe that the owner holds open.
"""

import os
import signal
import sys

from bridge.lab import space


def main() -> None:
    """Wait for the owner, then remove the lab."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    while os.read(sys.stdin.fileno(), 1):
        pass
    space.remove(sys.argv[1])


if __name__ == "__main__":
    main()
