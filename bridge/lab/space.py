"""What a lab leaves in the system, and how it is found and removed again.

A lab is a name. Its traces are network namespaces called `<lab>-<host>`, the processes in them, and the
directory `/run/ike-sa-sync-lab/<lab>`; nothing else outside them is changed. So a process that knows the name can
remove a lab, also one whose owner was killed.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

STATE = Path("/run/ike-sa-sync-lab")
NAMESPACES = Path("/run/netns")

# In a host's directory: the id of the process that holds its namespaces.
HOLDER = "holder"

# The routing table that charon puts its routes into.
CHARON_TABLE = "220"

# A process that got SIGKILL is gone in microseconds unless it sleeps in the kernel.
KILL_PATIENCE = 10.0


class LabError(Exception):
    """A lab cannot be built or used; the message names the cause and the fix."""


def need_root() -> None:
    """Raises LabError unless root runs it."""
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces: run it as root")


def command(*argv: str) -> str:
    """Run a tool in the root namespaces, give its output; LabError with what it said if it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LabError(f"{argv[0]} is missing: run `make setup`, or install the package that has it") from None
    if done.returncode:
        raise LabError(f"`{' '.join(argv)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def in_network(namespace: str) -> list[str]:
    """The command line prefix that runs a command in a named network namespace."""
    return ["nsenter", f"--net={NAMESPACES / namespace}", "--"]


def into(pid: int) -> list[str]:
    """The command line prefix that runs a command in the namespaces of a host, given their holder.

    The prefix becomes the command by exec, so the process id stays.
    """
    return ["nsenter", f"--target={pid}", "--root", "--mount", "--net", "--uts", "--"]


def namespaces(lab: str) -> list[str]:
    """The names of a lab's network namespaces."""
    if not NAMESPACES.is_dir():
        return []
    return sorted(entry.name for entry in NAMESPACES.iterdir() if entry.name.startswith(f"{lab}-"))


def processes(namespace: str) -> list[int]:
    """The processes in a named network namespace; a namespace that is gone has none."""
    try:
        here = os.stat(NAMESPACES / namespace)
    except FileNotFoundError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                there = os.stat(entry / "ns/net")
                if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                    found.append(int(entry.name))
    return found


def kill_all(namespace: str, spare: int = 0) -> None:
    """SIGKILL every process in a network namespace but the one to spare, and wait until they are gone."""
    deadline = time.monotonic() + KILL_PATIENCE
    while victims := [pid for pid in processes(namespace) if pid not in (spare, os.getpid())]:
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            # Ours are reaped here, so that they do not stay as zombies; others belong to init.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            raise LabError(f"processes {victims} in {namespace} survive SIGKILL: look at them with `ps`")
        time.sleep(0.01)


def forget_sas(namespace: str) -> None:
    """Take charon's SAs and routes out of the kernel, which would go on with those of a dead one."""
    for what in ("xfrm state", "xfrm policy", "-4 route", "-6 route"):
        table = ("table", CHARON_TABLE) if what.endswith("route") else ()
        subprocess.run(["ip", "-n", namespace, *what.split(), "flush", *table], capture_output=True, check=False)


def remove(lab: str) -> None:
    """Remove every trace of a lab. Harmless where there is none."""
    for namespace in namespaces(lab):
        kill_all(namespace)
        subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
    shutil.rmtree(STATE / lab, ignore_errors=True)
    with contextlib.suppress(OSError):
        STATE.rmdir()


@contextlib.contextmanager
def owned(lab: str) -> Iterator[None]:
    """Hold the lock that says the lab's owner lives."""
    with (STATE / lab / "owner").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_owned(lab: str) -> bool:
    """Whether the process that built the lab still runs."""
    try:
        with (STATE / lab / "owner").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def labs() -> list[str]:
    """The names of all labs on this machine."""
    return sorted(entry.name for entry in STATE.iterdir()) if STATE.is_dir() else []
