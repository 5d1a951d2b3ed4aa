"""Runs one coverage-guided fuzz target until it is stopped, finds a crash, or has had -runs inputs.

    python fuzz/run.py TARGET [libFuzzer options]

The corpus begins with the target's seeds and with fuzz/corpus/TARGET.hex, one input a line. What is found on top goes
to the folder given with --into (a temporary one without), for `fuzz/keep.py` to choose from.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bridge", "fuzz"]):
    from fuzz.corpus import kept
    from fuzz.targets import TARGETS


def main() -> None:
    """The process; libFuzzer ends it."""
    name, *options = sys.argv[1:]
    into = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    if options and options[0].startswith("--into="):
        into = Path(options.pop(0).partition("=")[2])
        into.mkdir(parents=True, exist_ok=True)
    target = TARGETS[name]
    for number, octets in enumerate([*target.seeds(), *kept(name)]):
        (into / f"seed-{number}").write_bytes(octets)
    atheris.Setup([sys.argv[0], str(into), *options], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
