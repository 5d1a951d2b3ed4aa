"""One host of the lab: a network namespace with a file system view of its own.

Inside, `/run` is empty and private and `/etc` is the machine's, read-only, but for strongSwan's files and
`ike-sa-sync`, which are the host's own. From outside they are plain files under
`Host.etc`.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from bridge.lab import space
from bridge.lab.charon import Charon
from bridge.lab.daemon import SLOWNESS
from bridge.lab.esp import Esp
from bridge.lab.sidecar import Role, Sidecar
from bridge.lab.space import LabError

# The parts of /etc that are the host's own.
OWN = ("strongswan.conf", "strongswan.d", "swanctl", "ipsec.conf", "ipsec.secrets", "ike-sa-sync")

# strongSwan's programs run from a copy: AppArmor confines Debian's, by their path, to the real /etc and /run.
PROGRAMS = ("usr/sbin/charon-systemd", "usr/sbin/swanctl")

# Those of another release run in its root directory, by a program of the same name that becomes them.
ELSEWHERE = """\
#!/bin/sh
exec chroot {root} /{program} "$@"
"""

# $1 is the lab's directory, $2 the host's, $3 its name, $4 the root directory of another release or nothing. The
# lab's directory lies in /run and has to stay visible. mount -n: or it would note the mounts in the machine's
# /run/mount. All of it happens in a mount namespace of its own, which the process that stays holds.
UNSHARE = ("unshare", "--mount", "--uts", "--propagation", "private")
HOLD = """
set -e
mount -n -t tmpfs tmpfs "$2/run"
lab="$2/run/${1#/run/}"
mkdir -p "$lab" "$2/run/lock"
mount -n --bind "$1" "$lab"
mount -n --bind /etc "$lab/$3/machine-etc"
mount -n -o remount,bind,ro "$lab/$3/machine-etc"
mount -n --bind "$2/etc" /etc
mount -n --rbind "$2/run" /run
mount -n -t sysfs sysfs /sys 2>/dev/null || :
if [ -n "$4" ]; then
    root="$2/root"
    mount -n --bind "$4" "$root"
    mount -n -o remount,bind,ro "$root"
    for part in dev proc sys; do mount -n --rbind "/$part" "$root/$part"; done
    for part in strongswan.conf strongswan.d swanctl; do mount -n --bind "/etc/$part" "$root/etc/$part"; done
    mount -n --bind /run "$root/run"
    mkdir -p "$root$1"
    mount -n --bind "$1" "$root$1"
fi
echo "$3" > /proc/sys/kernel/hostname
echo held
exec sleep infinity
"""


class Host:
    """A host. Made by `Lab.add_host`. `root` is where its strongSwan is installed: `/`, or another release's root."""

    def __init__(self, name: str, lab: str, esp: Esp, root: Path = Path("/")) -> None:
        self.name = name
        self.esp = esp
        self.root = root
        self.namespace = f"{lab}-{name}"
        self.directory = space.STATE / lab / name
        self.etc = self.directory / "etc"
        self.address = ""  # the first one, without prefix length
        self.charon = Charon(self)
        self.sidecars: list[Sidecar] = []
        self._lab_directory = space.STATE / lab
        self._holder: subprocess.Popen[str] | None = None

    def boot(self) -> None:
        """Make the namespaces and the private file system view. LabError if a mount is refused."""
        for part in (
            "run",
            "machine-etc",
            "bin",
            "root",
            "etc/strongswan.d",
            "etc/swanctl/conf.d",
            "etc/ike-sa-sync",
        ):
            (self.directory / part).mkdir(parents=True)
        self._fill_etc()
        self._fill_bin()
        space.command("ip", "netns", "add", self.namespace)
        space.command("ip", "-n", self.namespace, "link", "set", "lo", "up")
        elsewhere = "" if self.root == Path("/") else str(self.root)
        arguments = (str(self._lab_directory), str(self.directory), self.name, elsewhere)
        holder = subprocess.Popen(
            [*space.in_network(self.namespace), *UNSHARE, "sh", "-c", HOLD, "sh", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "held\n":
            raise LabError(f"no private file system for {self.name}: {holder.stderr.read().strip()}; be root")
        holder.stdout.close()
        holder.stderr.close()
        self._holder = holder
        (self.directory / space.HOLDER).write_text(str(holder.pid))

    def _fill_etc(self) -> None:
        for entry in Path("/etc").iterdir():
            if entry.name not in OWN:
                # A link of the machine's own is repeated as it stands: its target may be relative to /etc.
                target = os.readlink(entry) if entry.is_symlink() else self.directory / "machine-etc" / entry.name
                (self.etc / entry.name).symlink_to(target)

        # a file cannot be mounted on before it is there
        (self.etc / "strongswan.conf").touch()

    def _fill_bin(self) -> None:
        for program in PROGRAMS:
            there, here = self.root / program, self.directory / "bin" / Path(program).name
            if not there.exists():
                raise LabError(f"{there} is missing: run `make setup`, or install the package that has it")
            if self.root == Path("/"):
                shutil.copy(there, here)
            else:
                here.write_text(ELSEWHERE.format(root=self.directory / "root", program=program))
                here.chmod(0o755)

    @property
    def pid(self) -> int:
        """The process that holds the host's namespaces."""
        if self._holder is None:
            raise LabError(f"host {self.name} is not up")
        return self._holder.pid

    def path(self, inside: str) -> Path:
        """Where a path inside the host is seen from outside, for instance charon's VICI socket."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def enter(self, *argv: str) -> list[str]:
        """The command line that runs a command inside the host. It becomes that command, by exec."""
        return [*space.into(self.pid), *argv]

    def environment(self) -> dict[str, str]:
        """The environment of the host's commands: this process's, with the host's programs first."""
        path = f"{self.directory / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        own = {"PATH": path, "LC_ALL": "C.UTF-8"}
        return {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"} | own

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end. With `check`, LabError with what it said if it fails.

        `timeout` is in seconds; a command that takes longer is a LabError too, later on a slow machine.
        """
        timeout *= SLOWNESS
        try:
            done = subprocess.run(
                self.enter(*argv),
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout,
                input=stdin,
                env=self.environment(),
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{self.name}: `{' '.join(argv)}` did not end within {timeout:g} s") from None
        if check and done.returncode:
            said = (done.stderr.strip() + "\n" + done.stdout.strip()).strip()
            raise LabError(f"{self.name}: `{' '.join(argv)}` failed ({done.returncode}): {said}")
        return done

    def popen(
        self, *argv: str, stdout: int | IO[Any] | None = None, stderr: int | IO[Any] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command inside; its pid is the command's own. It dies with the lab at the latest."""
        return subprocess.Popen(
            self.enter(*argv),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            env=self.environment(),
            start_new_session=True,
        )

    def swanctl(self, *arguments: str, check: bool = True, timeout: float = 60.0) -> str:
        """Run swanctl inside, give its output."""
        return self.run("swanctl", *arguments, check=check, timeout=timeout).stdout

    def configure(self, text: str, name: str = "lab.conf") -> None:
        """Write `/etc/swanctl/conf.d/<name>`; sections of the same name add to and override swanctl.conf.

        A running charon reads it at the next `charon.load()`.
        """
        self._write(self.etc / "swanctl/conf.d" / name, text)

    def write(self, inside: str, text: str, mode: int = 0o644) -> Path:
        """Write a file below one of the host's own parts of /etc; gives where it is from outside."""
        target = self.etc / Path(inside).relative_to("/etc")
        self._write(target, text, mode)
        return target

    @staticmethod
    def _write(target: Path, text: str, mode: int = 0o600) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(mode)

    def sidecar(self, role: Role, config: Mapping[str, Any]) -> Sidecar:
        """A sidecar with this configuration (the keys of its YAML file), not yet started."""
        sidecar = Sidecar(self, role, config)
        self.sidecars.append(sidecar)
        return sidecar

    def ping(self, target: str, count: int = 3, timeout: float = 2.0) -> int:
        """Send `count` echo requests, 0.1 s apart, and give the number of answers."""
        done = self.run("ping", "-n", "-c", str(count), "-i", "0.1", "-W", f"{timeout:g}", target, check=False)
        return done.stdout.count(" bytes from ")

    def power_off(self) -> None:
        """Fail as a machine does: all processes end together, nothing answers, the kernel forgets its SAs."""
        space.kill_all(self.namespace, spare=self.pid)
        self.charon.forget()
        for sidecar in self.sidecars:
            sidecar.forget()
        self.link("down")

    def link(self, state: str) -> None:
        """Set the host's links `up` or `down`."""
        for interface in self.interfaces():
            space.command("ip", "-n", self.namespace, "link", "set", interface, state)

    def interfaces(self) -> Sequence[str]:
        """Its links into the lab's networks."""
        shown = space.command("ip", "-n", self.namespace, "-br", "link", "show", "type", "veth")
        return [line.split("@")[0].split()[0] for line in shown.splitlines()]
