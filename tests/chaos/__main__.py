"""`python -m chaos`: rounds until they are over, or Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from bridge.lab import Lab, LabError
from bridge.lab.releases import RELEASES
from chaos.run import Chaos
from chaos.world import World


def main() -> int:
    """The process; 1 where something did not hold."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="number of rounds (default 200)")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()) % 1_000_000, help="of what happens (default: the time)"
    )
    parser.add_argument("--first", type=int, default=1, help="number of the first round (default 1)")
    parser.add_argument("--most", type=int, default=3, help="most disturbances in a round (default 3)")
    parser.add_argument("--keep", type=Path, default=Path("build/chaos"), help="where logs of violations go")
    parser.add_argument("--stop", action="store_true", help="end with the first violation")
    parser.add_argument(
        "--release",
        choices=RELEASES,
        help="Debian release whose strongSwan the gateways and one client run (default: this machine's); "
        "`python -m bridge.lab.releases` installs it",
    )
    options = parser.parse_args()
    # a shell that puts it into the background has it ignore SIGINT
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)

    say(f"seed {options.seed}, strongSwan of {options.release or 'this machine'}")
    with Lab() as lab:
        chaos = None
        try:
            world = World(lab, release=options.release)
            world.begin()
            chaos = Chaos(world, options.seed, say, most=options.most, keep=options.keep)
            chaos.begin()
            say("everything is up")
            for number in range(options.first, options.first + options.rounds):
                if not chaos.round(number) and options.stop:
                    break
        except KeyboardInterrupt:
            say("interrupted")
        except LabError as error:
            say(f"the lab cannot be begun: {error}")
        if chaos is None or not chaos.report.rounds:
            return 2
        report = chaos.end()
        print(f"{report.text()}\nmemory, most growth: {chaos.memory.most()}", flush=True)
        return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
