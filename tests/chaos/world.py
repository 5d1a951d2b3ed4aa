"""The installation under test: three gateways, six clients with traffic, a Redis with a replica under Sentinel, a
server behind the gateways, and a host of an attacker."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vici

from bridge.lab import Lab
from bridge.lab.charon import VICI_SOCKET
from bridge.lab.daemon import Daemon
from bridge.lab.host import Host
from bridge.lab.router import Bird, gateway_bird, router_bird
from bridge.lab.sidecar import program
from bridge.lab.space import LabError
from bridge.lab.topology import (
    BANK_KEY,
    INSIDE,
    PATIENCE,
    SERVER,
    bank_key,
    client_config,
    client_host,
    gateway_config,
    swanctl,
)
from bridge.service import shipped_files
from bridge.stub import bank_keys

GATEWAYS = 3
CLIENTS = 6
REDIS_PORT, SENTINEL_PORT = 6379, 26379
SERVICE = "bank"
VICI_SECONDS = 10.0
"""that charon may take to answer"""
LATELY = 2.0
"""seconds within which a tunnel that works has carried an answer"""
PING = "while :; do ping -n -D -i 0.25 -w 20 {server}; sleep 0.25; done"
OPERATOR_TRIES = 8
OPERATOR_PAUSE = 5.0
"""seconds; gateways give marks that the bank lost back to it within 30 s"""
COMMAND_SECONDS = 60.0
PLACEHOLDER = "address-in-use-at-another-gateway"

Sa = dict[str, Any]


class Redis(Daemon):
    """A redis-server with the shipped configuration, which Sentinel may rewrite."""

    def __init__(self, host: Host, primary: str | None) -> None:
        super().__init__(host, "redis")
        self._directory = host.directory / "redis"
        self._directory.mkdir()
        conf = self._directory / "redis.conf"
        own = [
            f"bind {host.address} 127.0.0.1",
            "protected-mode no",
            f"dir {self._directory}",
            'logfile ""',
            # what Sentinel does to a server that comes back shall not take a minute
            "repl-timeout 5",
        ]
        if primary is not None:
            own.append(f"replicaof {primary} {REDIS_PORT}")
        conf.write_text("\n".join([shipped_files.path("redis/redis.conf").read_text(), *own]) + "\n")
        self._conf = conf

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.spawn("redis-server", str(self._conf))
        self.await_alive(lambda: self.cli("ping") != "", "it answered")

    def cli(self, *arguments: str) -> str:
        """Run redis-cli against it, give its output; empty if it cannot be reached."""
        command = ("timeout", "5", "redis-cli", "-p", str(REDIS_PORT), *arguments)
        return self.host.run(*command, check=False).stdout.strip()


class Sentinel(Daemon):
    """Watches over the two Redis, alone."""

    def __init__(self, host: Host, primary: str) -> None:
        super().__init__(host, "sentinel")
        self._conf = host.directory / "sentinel.conf"
        self._conf.write_text(
            f"port {SENTINEL_PORT}\nbind {host.address} 127.0.0.1\nprotected-mode no\ndir {host.directory}\n"
            f"sentinel monitor {SERVICE} {primary} {REDIS_PORT} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} 1000\n"
            f"sentinel failover-timeout {SERVICE} 4000\n"
        )

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.spawn("redis-server", str(self._conf), "--sentinel")
        self.await_alive(lambda: self.cli("ping") == "PONG", "it answered")

    def cli(self, *arguments: str) -> str:
        """Run redis-cli against it, give its output."""
        command = ("timeout", "5", "redis-cli", "-p", str(SENTINEL_PORT), *arguments)
        return self.host.run(*command, check=False).stdout.strip()

    def primary(self) -> str:
        """The address of the primary."""
        return self.cli("sentinel", "get-master-addr-by-name", SERVICE).partition("\n")[0]


@dataclass
class Operation:
    """A command of an operator, who repeats it until it succeeds."""

    host: Host
    words: tuple[str, ...]
    process: subprocess.Popen[str]


class World:
    """All of it. `begin` starts it; the lab that it is made in ends it."""

    def __init__(self, lab: Lab, clients: int = CLIENTS, release: str | None = None) -> None:
        """`release`: Debian's, whose strongSwan the gateways and the first client run; the machine's where it is
        None."""
        self.lab = lab
        self.release = release
        self.redis = [
            Redis(lab.add_host("bank1", "192.168.50.20/24"), None),
            Redis(lab.add_host("bank2", "192.168.50.21/24"), "192.168.50.20"),
        ]
        self.sentinel = Sentinel(lab.add_host("sentinel", "192.168.50.22/24"), "192.168.50.20")
        self.attacker = lab.add_host("attacker", "192.168.50.66/24")
        lab.add_network(INSIDE)
        self.server = lab.add_host("server", f"{SERVER}/24", network=INSIDE, forward=True)
        secret = base64.b64encode(os.urandom(32)).decode()
        key = bank_key()
        url = f"redis+sentinel://{self.sentinel.host.address}:{SENTINEL_PORT}/{SERVICE}/0"
        self.gateways = [self._gateway(number, secret, key, url) for number in range(1, GATEWAYS + 1)]
        self.routers: list[Bird] = [gateway_bird(host, f"10.10.1.{n}") for n, host in enumerate(self.gateways, 1)]
        router = router_bird(self.server)
        router.configuration += "protocol bgp gw3v4 from gateway4 { neighbor 10.10.1.3 as 65001; }\n"
        self.routers.append(router)
        self.clients = [self._client(number, secret) for number in range(1, clients + 1)]
        self.revoked: set[str] = set()
        """the names of the clients that are locked out"""
        self.killed: set[str] = set()
        """the SPIs (hex) of the stubs that the bank had of a gateway's charon when that was killed"""
        self.died: list[str] = []
        """daemons that ended by themselves"""
        self.excused: dict[str, str] = {}
        """clients whose session may have ended, since they were last seen to work: why"""
        self._traffic: list[subprocess.Popen[str]] = []
        self._operations: list[Operation] = []

    def _gateway(self, number: int, secret: str, key: str, bank: str) -> Host:
        host = self.lab.add_host(f"gw{number}", f"192.168.50.{number}/24", forward=True, release=self.release)
        self.lab.attach(host, f"10.10.1.{number}/24", network=INSIDE)
        swanctl(host, "gateway", f'ike-clients {{ secret = "{secret}" }}')
        host.charon.settings["charon.plugins.ha.pools.clients"] = f"10.20.{number}.0/24"
        host.charon.settings.update(PATIENCE)
        # what charon alone can notice, it does within seconds: a client that is gone for good
        host.configure("connections { gw { dpd_delay = 10s } }\n")
        host.write(BANK_KEY, key, mode=0o600)
        config = gateway_config(host.address, bank)
        # two cores for all of it: a heartbeat may be late
        config["failover"] = {"detect": 2.0, "announce": True}
        host.sidecar("gateway", config)
        return host

    def _client(self, number: int, secret: str) -> Host:
        """Each begins at another gateway, and has them all."""
        order = [(number + step - 1) % GATEWAYS + 1 for step in range(GATEWAYS)]
        release = self.release if number == 1 else None
        host = client_host(self.lab, f"client{number}", f"192.168.50.{10 + number}", secret, release=release)
        more = "".join(
            f"home-gw{gateway} : connections.home {{ remote_addrs = 192.168.50.{gateway} }}\n"
            for gateway in range(1, GATEWAYS + 1)
        )
        host.configure(f"connections {{\n{more}}}\n", "more.conf")
        host.sidecar("client", client_config({f"192.168.50.{n}": f"home-gw{n}" for n in order}))
        return host

    # starting, and healing

    def begin(self) -> None:
        """Start everything, connect every client, with traffic."""
        for redis in self.redis:
            redis.start()
        self.sentinel.start()
        for router in self.routers:
            router.start()
        self.heal()
        for host in self.clients:
            self.connect(host)
            self._traffic.append(
                host.popen(
                    *("sh", "-c", PING.format(server=SERVER)),
                    stdout=(host.directory / "ping.log").open("w"),
                    stderr=subprocess.DEVNULL,
                )
            )

    @property
    def strongswans(self) -> list[Host]:
        """The hosts with a charon and a sidecar."""
        return [*self.gateways, *self.clients]

    def daemons(self) -> Iterator[Daemon]:
        """All that may be killed."""
        for host in self.strongswans:
            yield host.charon
            yield host.sidecars[0]
        yield from self.redis
        yield self.sentinel

    def heal(self) -> None:
        """Everything runs again, with all cables."""
        for daemon in self.daemons():
            self._notice(daemon)
            signalled(daemon, signal.SIGCONT)
        for host in self.lab.hosts.values():
            self.lab.plug(host)
        for host in (*self.gateways, self.server):
            self.lab.plug(host, INSIDE, "eth1" if host is not self.server else "eth0")
        for redis in self.redis:
            redis.host.run("nft", "flush", "ruleset")
            if not redis.running:
                redis.start()
        if not self.sentinel.running:
            self.sentinel.start()
        self.start_strongswans(*self.strongswans)

    def start_strongswans(self, *hosts: Host) -> None:
        """Start each charon and sidecar that does not run on these hosts, the sidecars first."""
        for host in hosts:
            self._notice(host.charon)
            self._notice(host.sidecars[0])
        begun = [host.sidecars[0] for host in hosts if not host.sidecars[0].running]
        for sidecar in begun:
            sidecar.launch()
        for sidecar in begun:
            sidecar.wait_held()
        for host in hosts:
            if not host.charon.running:
                host.charon.start()
        for sidecar in begun:
            sidecar.wait_ready()

    def _notice(self, daemon: Daemon) -> None:
        """Whether it ended, and nobody killed it."""
        if daemon.process is not None and not daemon.running:
            self.died.append(f"{daemon.name} on {daemon.host.name} ended by itself: {daemon.process.returncode}")
            daemon.forget()

    def connect(self, host: Host) -> bool:
        """What a user does whose session ended: connect again, to the first gateway that answers."""
        for entry in host.sidecars[0].config["gateways"]:
            words = ("--initiate", "--child", "net", "--ike", entry["connection"], "--timeout", "5")
            if host.run("swanctl", *words, check=False).returncode == 0:
                return True
        return False

    # looking

    def sas(self, host: Host) -> list[Sa]:
        """The IKE_SAs of a host as VICI lists them, without placeholders. Raises OSError or LabError where charon does
        not answer."""
        if not host.charon.running:
            raise LabError(f"{host.name}: charon is not running")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(VICI_SECONDS)
            connection.connect(str(host.path(VICI_SOCKET)))
            listed = vici.Session(connection).list_sas()
            found = [{"name": name} | _text(sa) for entry in listed for name, sa in entry.items()]
        return [sa for sa in found if sa.get("remote-id") != PLACEHOLDER]

    def sas_or_none(self, host: Host) -> list[Sa]:
        """The same; none where charon does not answer."""
        try:
            return self.sas(host)
        except (OSError, LabError):
            return []

    @staticmethod
    def identity(client: Host) -> str:
        """The IKE identity of a client."""
        return f"{client.name}@example.org"

    def primary(self) -> Redis | None:
        """The Redis that Sentinel says is the primary."""
        address = self.sentinel.primary()
        return next((redis for redis in self.redis if redis.host.address == address), None)

    def lag(self) -> None:
        """Have the replica receive nothing more of the primary, which neither of them notices for a while."""
        primary = self.sentinel.primary()
        for redis in self.redis:
            if redis.host.address != primary:
                redis.host.run("nft", "add table inet lag")
                redis.host.run("nft", "add chain inet lag in { type filter hook input priority 0; }")
                redis.host.run("nft", f"add rule inet lag in ip saddr {primary} tcp sport {REDIS_PORT} drop")

    def stubs(self) -> set[str] | None:
        """The keys of the stubs in the bank; None where it does not answer."""
        primary = self.primary()
        if primary is None or primary.cli("ping") != "PONG":
            return None
        return set(primary.cli("--scan", "--pattern", f"{bank_keys.STUB}*").split())

    def went_on(self, spi: str) -> bool:
        """Whether a gateway took a session over whose stub had this SPI (hex)."""
        return any(
            "event=sa-resumed" in line and line.endswith(f"old_spi={spi}")
            for host in self.gateways
            for line in host.sidecars[0].text().splitlines()
        )

    def last_answer(self, host: Host) -> float:
        """When the server last answered a client, in Unix seconds."""
        with (host.directory / "ping.log").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode(errors="replace").splitlines()
        times = [line[1:].partition("]")[0] for line in lines if " bytes from " in line and line.startswith("[")]
        return float(times[-1]) if times else 0.0

    def kill_charon(self, host: Host) -> None:
        """SIGKILL to a charon, whose stubs stay."""
        self.killed |= {sa["responder-spi"] for sa in self.sas_or_none(host)}
        host.charon.crash()
        # what its sidecar had yet to write included
        self.leaves_stubs(host)

    def leaves_stubs(self, host: Host) -> None:
        """The stubs of a gateway stay, though its charon has no IKE_SAs any more."""
        for redis in self.redis:
            keys = redis.cli("--scan", "--pattern", f"{bank_keys.STUB}{{{host.address}/*").split()
            self.killed |= {key.rpartition(":")[2] for key in keys}

    # what operators do

    def excuse(self, client: Host, why: str) -> None:
        """A client's session may end for a reason that nobody resumes from."""
        self.excused[client.name] = why

    @staticmethod
    def words(host: Host, *words: str) -> list[str]:
        """The command line of `ike-sa-sync WORDS -c FILE` on a host."""
        return [*program(), *words, "-c", host.sidecars[0].file]

    def revoke(self, client: Host, at: Host) -> None:
        """Lock a client out, by a command on a gateway."""
        self.revoked.add(client.name)
        self._operate(at, "revoke", self.identity(client), "--for", "1h")

    def unrevoke(self, client: Host, at: Host) -> None:
        """Let it in again."""
        self.revoked.discard(client.name)
        self.excuse(client, "it was locked out")
        self._operate(at, "unrevoke", self.identity(client))

    def _operate(self, host: Host, *words: str) -> None:
        self._operations.append(Operation(host, words, self.command(host, *words)))

    def finish(self) -> None:
        """See that what operators began succeeds: they try again."""
        waiting, self._operations = self._operations, []
        for operation in waiting:
            for _ in range(OPERATOR_TRIES):
                if operation.process.wait(COMMAND_SECONDS) == 0:
                    break
                time.sleep(OPERATOR_PAUSE)
                operation.process = self.command(operation.host, *operation.words)
            else:
                raise LabError(f"{operation.host.name}: {' '.join(operation.words)} fails again and again")

    def command(self, host: Host, *words: str) -> subprocess.Popen[str]:
        """`ike-sa-sync WORDS -c FILE` on a host, in the background; its output goes to a file there."""
        with (host.directory / "commands.log").open("a") as log:
            log.write(f"{time.time():.3f} {' '.join(words)}\n")
            log.flush()
            return host.popen(*self.words(host, *words), stdout=log, stderr=log)

    def keep_logs(self, target: Path) -> None:
        """Copy all logs to a directory."""
        for host in self.lab.hosts.values():
            there = target / host.name
            there.mkdir(parents=True, exist_ok=True)
            for log in host.directory.glob("*.log"):
                shutil.copy(log, there)


def signalled(daemon: Daemon, number: signal.Signals) -> None:
    """Send a signal to a daemon, if it runs."""
    if daemon.running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon.pid, number)


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _text(item) for key, item in value.items()}
    return value
