"""Valkey 8 of Debian 13, for machines whose own Debian has Redis: program and libraries in a directory of their own.

python -m bridge.lab.valkey       installs it if it is missing
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bridge.lab.releases import APT, CACHE, mirror
from bridge.lab.space import LabError

RELEASE = "trixie"
DIRECTORY = CACHE / "valkey"


def program() -> list[str]:
    """The command line of valkey-server, without arguments. LabError while it is not installed."""
    if (own := shutil.which("valkey-server")) is not None:
        return [own]
    # with the C library that it was built for
    loader = next(DIRECTORY.glob("usr/lib/*/ld-linux*.so.?"), None)
    if loader is None:
        raise LabError(f"{DIRECTORY} is missing: run `{sys.executable} -m bridge.lab.valkey`")
    return [str(loader), "--library-path", str(loader.parent), str(DIRECTORY / "usr/bin/valkey-server")]


def install(directory: Path = DIRECTORY) -> None:
    """Fetch and unpack it, all of it or nothing. LabError with the end of what mmdebstrap said."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    new = directory.with_suffix(f".{os.getpid()}")
    options = ["--variant=extract", "--mode=root", "--include=valkey-server", *(f"--aptopt={option}" for option in APT)]
    try:
        done = subprocess.run(
            ["mmdebstrap", *options, RELEASE, str(new), mirror()], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise LabError("mmdebstrap failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
        new.rename(directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main() -> None:
    """Install it if it is missing, and say so."""
    try:
        program()
    except LabError:
        print(f"installing Valkey of Debian {RELEASE} in {DIRECTORY} (about 50 MB)", flush=True)
        install()


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(str(error))
