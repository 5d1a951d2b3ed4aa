"""The strongSwan of other Debian releases, for hosts of the lab: each release in a root directory of its own.

    python -m bridge.lab.releases       installs those that are missing

A root directory is what `mmdebstrap` makes of a release's packages, kept in `/var/cache` for all labs, which mount it
read-only.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from bridge.lab.space import LabError, command

CACHE = Path("/var/cache/ike-sa-sync")

RELEASES = ("bookworm", "trixie", "forky")
"""Debian's, oldest first: strongSwan 5.9.8, 6.0.1, and 6.1.0 or later."""

PACKAGES = (
    "charon-systemd",
    "strongswan-swanctl",
    "libcharon-extra-plugins",
    "libcharon-extauth-plugins",
    "libstrongswan-extra-plugins",
    "libstrongswan-standard-plugins",
)

# A release in the making may have been asleep for longer than its index says it is valid.
APT = ('Acquire::Check-Valid-Until "false"', 'APT::Install-Recommends "false"', 'Acquire::Retries "3"')
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


def machine() -> str:
    """The release that this machine runs, by Debian's code name."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def root(release: str) -> Path:
    """Where a release's strongSwan is: `/` for the machine's own. LabError while it is not installed."""
    if release == machine():
        return Path("/")
    directory = CACHE / release
    if not directory.is_dir():
        raise LabError(f"{directory} is missing: run `{sys.executable} -m bridge.lab.releases`")
    return directory


def mirror() -> str:
    """Where this machine's apt has Debian from. LabError if that is nowhere."""
    shown = command("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian")
    for line in shown.splitlines():
        # security updates have an archive of their own, with other releases' names in it
        if not line.rstrip("/").endswith("-security"):
            return line
    raise LabError("apt knows no Debian archive: run `apt-get update`, or look at /etc/apt/sources.list.d")


def install(release: str) -> None:
    """Make a release's root directory, all of it or none. LabError with the end of what mmdebstrap said."""
    if shutil.which("mmdebstrap") is None:
        raise LabError("mmdebstrap is missing: run `make test-releases`, or install the package of that name")
    CACHE.mkdir(parents=True, exist_ok=True)
    new = CACHE / f"{release}.{os.getpid()}"
    options = [f"--include={','.join(PACKAGES)}", *(f"--aptopt={option}" for option in APT)]
    options += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    try:
        done = subprocess.run(
            ["mmdebstrap", "--variant=apt", "--mode=root", *options, release, str(new), mirror()],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LabError(f"mmdebstrap {release} failed:\n" + "\n".join(done.stderr.splitlines()[-15:]))
        new.rename(CACHE / release)
    finally:
        if new.exists():
            shutil.rmtree(new)


def main() -> None:
    """Install what is missing, and say so."""
    for release in RELEASES:
        try:
            root(release)
        except LabError:
            print(f"installing strongSwan of Debian {release} below {CACHE} (about 150 MB)", flush=True)
            install(release)


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(str(error))
