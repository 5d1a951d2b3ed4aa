"""Programs of Debian 13 for machines of an older Debian, Valkey 8, FRR 10, libreswan 5.2 and OpenIKED 7.4: each
package with its libraries in a directory of its own.

    python -m bridge.lab.unpacked NAME...       unpacks those that are missing of valkey, frr, libreswan, openiked
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bridge.lab.releases import APT, CACHE, machine, mirror
from bridge.lab.space import LabError

RELEASE = "trixie"


class Unpacked(NamedTuple):
    """A package that is unpacked and not installed."""

    name: str
    package: str

    @property
    def directory(self) -> Path:
        """Where it is unpacked."""
        return CACHE / self.name

    def program(self, path: str) -> list[str]:
        """The command line of one of its programs (`/usr/sbin/...`), without arguments: of the machine's package where
        that is the same one and is installed. LabError while neither is."""
        if machine() == RELEASE and Path(path).exists():
            return [path]
        # with the C library that it was built for
        loader = next(self.directory.glob("usr/lib/*/ld-linux*.so.?"), None)
        if loader is None:
            raise LabError(f"{self.directory} is missing: run `{sys.executable} -m bridge.lab.unpacked {self.name}`")
        libraries = f"{loader.parent}:{loader.parent / self.name}"
        return [str(loader), "--library-path", libraries, str(self.directory / path.lstrip("/"))]

    def install(self) -> None:
        """Fetch and unpack it, all of it or nothing. LabError with the end of what mmdebstrap said."""
        CACHE.mkdir(parents=True, exist_ok=True)
        new = self.directory.with_suffix(f".{os.getpid()}")
        options = ["--variant=extract", "--mode=root", f"--include={self.package}"]
        options += [f"--aptopt={option}" for option in APT]
        try:
            done = subprocess.run(
                ["mmdebstrap", *options, RELEASE, str(new), mirror()], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise LabError(f"mmdebstrap {self.package} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
            new.rename(self.directory)
        finally:
            shutil.rmtree(new, ignore_errors=True)


VALKEY = Unpacked("valkey", "valkey-server")
VALKEY_SERVER = "/usr/bin/valkey-server"
FRR = Unpacked("frr", "frr")
LIBRESWAN = Unpacked("libreswan", "libreswan")
PLUTO = "/usr/libexec/ipsec/pluto"
OPENIKED = Unpacked("openiked", "openiked")
IKED = "/usr/sbin/iked"

ALL = {each.name: each for each in (VALKEY, FRR, LIBRESWAN, OPENIKED)}


def main() -> None:
    """Unpack what is missing of the named ones, and say so."""
    parser = argparse.ArgumentParser(prog="python -m bridge.lab.unpacked")
    parser.add_argument("names", nargs="+", choices=ALL, metavar="NAME", help=", ".join(ALL))
    for name in parser.parse_args().names:
        each = ALL[name]
        if not each.directory.is_dir():
            print(f"unpacking {each.package} of Debian {RELEASE} in {each.directory} (about 100 MB)", flush=True)
            each.install()


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(str(error))
