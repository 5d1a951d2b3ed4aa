"""What has to hold after each round. Each of these gives what is wrong, one line for each; a line names its subject, so
that the same line of two looks is the same violation."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.lab.daemon import Daemon
from bridge.lab.host import Host
from bridge.lab.space import LabError
from chaos.world import LATELY, Sa, World

GROWTH_KB = 24 * 1024
"""that a process may grow by after its first rounds: allocators and tables of recent events settle, and lists of
what ended grow to a limit"""
WARM_ROUNDS = 10
BAD_WORDS = ("task-failed", "Traceback (most recent call last)", "move-failed", "confirmed-without-bank")
"""in the log of a sidecar"""


@dataclass
class Seen:
    """What all charons and the bank say at one moment."""

    clients: dict[str, list[Sa]]
    gateways: dict[str, list[Sa]]
    stubs: set[str] | None
    silent: list[str]
    """daemons that gave no answer"""


def look(world: World) -> Seen:
    """Look at everything."""
    found: dict[str, list[Sa]] = {}
    silent = []
    for host in world.strongswans:
        try:
            found[host.name] = world.sas(host)
        except (OSError, LabError) as error:
            found[host.name] = []
            silent.append(f"charon on {host.name} does not answer: {error}")
    stubs = world.stubs()
    if stubs is None:
        silent.append("the bank does not answer")
    clients = {host.name: found[host.name] for host in world.clients}
    return Seen(clients, {host.name: found[host.name] for host in world.gateways}, stubs, silent)


def own_spi(sa: Sa) -> str:
    """The SPI of the host that lists it."""
    return str(sa["initiator-spi" if sa.get("initiator") == "yes" else "responder-spi"])


def spis(sa: Sa) -> str:
    """Both SPIs."""
    return f"{sa['initiator-spi']}:{sa['responder-spi']}"


def _up(sas: list[Sa]) -> list[Sa]:
    """Those of sessions; one that was just resumed is PASSIVE until the gateway has activated it."""
    return [sa for sa in sas if sa["state"] == "ESTABLISHED" or (sa["state"] == "PASSIVE" and not _keeps_address(sa))]


def _keeps_address(sa: Sa) -> bool:
    """Whether it stands for a session elsewhere, whose address it keeps from being given out."""
    return str(sa.get("remote-id", "")).startswith("address-in-use")


def working(world: World, seen: Seen) -> Iterator[str]:
    """Every client that is not locked out has exactly one IKE_SA, which its gateway has too, and traffic."""
    for host in world.clients:
        if host.name in world.revoked:
            continue
        sas = seen.clients[host.name]
        if not sas:
            yield f"{host.name} has no IKE_SA"
            continue
        if len(sas) > 1:
            yield f"{host.name} has {len(sas)} IKE_SAs: {', '.join(sorted(sa['state'] for sa in sas))}"
            continue
        [sa] = sas
        if sa["state"] != "ESTABLISHED":
            yield f"{host.name} has an IKE_SA in state {sa['state']}"
            continue
        where = next((one.name for one in world.gateways if one.address == sa["remote-host"]), "nowhere")
        if spis(sa) not in {spis(other) for other in _up(seen.gateways.get(where, []))}:
            yield f"{host.name} has an IKE_SA with {where} that {where} does not have"
        elif not any(child["state"] == "INSTALLED" for child in sa.get("child-sas", {}).values()):
            yield f"{host.name} has no CHILD_SA"
        elif time.time() - world.last_answer(host) > LATELY:
            yield f"{host.name} has no traffic"


def elsewhere(world: World, seen: Seen) -> Iterator[str]:
    """No gateway has an IKE_SA that its client does not have."""
    for name, sas in seen.gateways.items():
        for sa in sas:
            if sa["state"] not in ("ESTABLISHED", "PASSIVE", "DELETING", "REKEYED"):
                # half-open ones are charon's, for half_open_timeout
                continue
            client = str(sa.get("remote-id", "")).partition("@")[0]
            if spis(sa) not in {spis(one) for one in seen.clients.get(client, [])}:
                yield f"{name} has an IKE_SA of {client} that {client} does not have ({spis(sa)}, {sa['state']})"


def stubs(world: World, seen: Seen) -> Iterator[str]:
    """The bank has the stubs of established IKE_SAs, and no others but those of a charon that was killed: as long as no
    gateway took the session over, its client may still come."""
    if seen.stubs is None:
        return
    address = {host.name: host.address for host in world.gateways}
    wanted = {}
    for name, sas in seen.gateways.items():
        for sa in _up(sas):
            own = own_spi(sa)
            wanted[f"ike:stub:{{{address[name]}/{own[:2]}}}:{own}"] = f"{name} of {sa.get('remote-id', '?')}"
    for key in sorted(wanted.keys() - seen.stubs):
        yield f"the bank lacks the stub {key} of an IKE_SA on {wanted[key]}"
    for key in sorted(seen.stubs - wanted.keys()):
        spi = key.rpartition(":")[2]
        if not (spi in world.killed and not world.went_on(spi)):
            yield f"the bank has the stub {key} of no IKE_SA"


def addresses(world: World, seen: Seen) -> Iterator[str]:
    """No two sessions share an address."""
    holders: dict[str, set[str]] = {}
    for sas in seen.gateways.values():
        for sa in _up(sas):
            for address in sa.get("remote-vips", []):
                holders.setdefault(address, set()).add(sa.get("remote-id", "?"))
    for address, names in holders.items():
        if len(names) > 1:
            yield f"{address} is the address of {' and '.join(sorted(names))}"


def locked_out(world: World, seen: Seen) -> Iterator[str]:
    """No client that is locked out is up."""
    for name, sas in seen.gateways.items():
        for sa in _up(sas):
            client = str(sa.get("remote-id", "")).partition("@")[0]
            if client in world.revoked:
                yield f"{client} is locked out, and has an IKE_SA on {name}"


def running(world: World, seen: Seen) -> Iterator[str]:
    """Everything runs and answers."""
    yield from seen.silent
    for daemon in world.daemons():
        if not daemon.running:
            yield f"{daemon.name} on {daemon.host.name} does not run"


INVARIANTS = (running, working, elsewhere, stubs, addresses, locked_out)


def violated(world: World) -> list[str]:
    """What does not hold at this moment."""
    seen = look(world)
    return [line for invariant in INVARIANTS for line in invariant(world, seen)]


class Logs:
    """What sidecars log that they must not."""

    def __init__(self) -> None:
        self._read: Counter[Path] = Counter()

    def news(self, world: World) -> list[str]:
        """What is new since the last look."""
        found = []
        for host in world.strongswans:
            log = host.sidecars[0].log
            text = log.read_bytes()[self._read[log] :].decode(errors="replace")
            self._read[log] = log.stat().st_size
            found += [
                f"{host.name}: {line.strip()[:300]}"
                for line in text.splitlines()
                if any(word in line for word in BAD_WORDS)
            ]
        return found


class Memory:
    """Resident memory of every process, by the number of rounds that it has lived."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[str, list[int]]] = {}

    def look(self, world: World) -> list[str]:
        """Note it; processes that grow."""
        living = {daemon.pid: daemon for daemon in world.daemons() if daemon.running}
        self._of = {pid: noted for pid, noted in self._of.items() if pid in living}
        found = []
        for pid, daemon in living.items():
            name, sizes = self._of.setdefault(pid, (f"{daemon.name} on {daemon.host.name}", []))
            sizes.append(resident(pid))
            grown = self._grown(sizes)
            if grown > GROWTH_KB:
                found.append(f"{name} grew by {grown // 1024} MB in {len(sizes)} rounds")
        return found

    @staticmethod
    def _grown(sizes: list[int]) -> int:
        return sizes[-1] - max(sizes[:WARM_ROUNDS]) if len(sizes) > WARM_ROUNDS else 0

    def most(self) -> str:
        """Which of those that live grew most."""
        grown = {name: (self._grown(sizes), len(sizes)) for name, sizes in self._of.values()}
        if not grown:
            return "-"
        name = max(grown, key=lambda one: grown[one])
        return f"{name}: {grown[name][0] / 1024:.1f} MB in {grown[name][1]} rounds"


def resident(pid: int) -> int:
    """KB of memory of a process; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def ended_by_gateway(host: Host, since: int) -> bool:
    """Whether a client's charon was told, or told its gateway, that its session ends: after octet `since` of its
    log."""
    text = host.charon.log.read_bytes()[since:]
    return b"received DELETE for IKE_SA" in text or b"sending DELETE for IKE_SA" in text


def size(daemon: Daemon) -> int:
    """Octets of a daemon's log."""
    return daemon.log.stat().st_size if daemon.log.exists() else 0
