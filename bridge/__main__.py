"""Entry point of `ike-sa-sync`, and `python -m bridge`: a signal at any time ends it without a traceback."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line. Ctrl-C and SIGTERM unwind the stack, so that a terminal is as it was before."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        from bridge.cli.main import main as commands  # here: an interrupt may come while it is imported

        commands()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
