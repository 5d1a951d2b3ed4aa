"""What is done to the installation within a round, at times that the seed decides."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from bridge.lab.daemon import Daemon
from bridge.lab.host import Host
from bridge.lab.topology import BANK_KEY, INSIDE
from bridge.stub.keyring import generate
from chaos.world import World, signalled

ROUND_SECONDS = 10.0
LOCKED_OUT_MOST = 2
"""clients that are locked out at the same time"""


@dataclass(frozen=True)
class Event:
    """Something that happens `at` seconds after the round began."""

    at: float
    text: str
    do: Callable[[], object]


Plan = Iterator[Event]


def _for_a_while(random: Random, longest: float = 6.0) -> tuple[float, float]:
    begin = random.uniform(0.0, 3.0)
    return begin, begin + random.uniform(0.5, longest)


def _kill(world: World, random: Random, host: Host, *daemons: Daemon) -> Plan:
    begin, end = _for_a_while(random)
    names = " and ".join(daemon.name for daemon in daemons)

    def kill() -> None:
        for daemon in daemons:
            if daemon is host.charon:
                world.kill_charon(host)
            else:
                daemon.kill()

    yield Event(begin, f"kill -9 {names} on {host.name}", kill)
    if random.random() < 0.6:
        # the others come back at the end of the round
        yield Event(end, f"{names} on {host.name} again", lambda: world.start_strongswans(host))


def _stop(random: Random, daemon: Daemon, longest: float = 6.0) -> Plan:
    begin, end = _for_a_while(random, longest)
    where = f"{daemon.name} on {daemon.host.name}"
    yield Event(begin, f"SIGSTOP {where}", lambda: signalled(daemon, signal.SIGSTOP))
    yield Event(end, f"SIGCONT {where}", lambda: _continue(daemon))


def _cut(world: World, random: Random, host: Host, network: str = "lan", interface: str = "eth0") -> Plan:
    begin, end = _for_a_while(random)
    where = f"{host.name} {interface}"
    yield Event(begin, f"cut {where}", lambda: world.lab.unplug(host, interface))
    yield Event(end, f"plug {where}", lambda: world.lab.plug(host, network, interface))


def kill_gateway_sidecar(world: World, random: Random) -> Plan:
    """SIGKILL to a gateway's sidecar."""
    host = random.choice(world.gateways)
    return _kill(world, random, host, host.sidecars[0])


def kill_gateway_charon(world: World, random: Random) -> Plan:
    """SIGKILL to a gateway's charon; its SAs are gone."""
    host = random.choice(world.gateways)
    return _kill(world, random, host, host.charon)


def kill_gateway(world: World, random: Random) -> Plan:
    """SIGKILL to charon and sidecar."""
    host = random.choice(world.gateways)
    return _kill(world, random, host, host.sidecars[0], host.charon)


def stop_gateway_sidecar(world: World, random: Random) -> Plan:
    """A sidecar that hangs."""
    return _stop(random, random.choice(world.gateways).sidecars[0])


def stop_gateway_charon(world: World, random: Random) -> Plan:
    """A charon that hangs, and with it what it does of ESP."""
    return _stop(random, random.choice(world.gateways).charon)


def cut_gateway(world: World, random: Random) -> Plan:
    """A gateway that neither clients nor the bank can reach."""
    return _cut(world, random, random.choice(world.gateways))


def cut_gateway_inside(world: World, random: Random) -> Plan:
    """A gateway without its inner network."""
    return _cut(world, random, random.choice(world.gateways), INSIDE, "eth1")


def cut_client(world: World, random: Random) -> Plan:
    """A client without a network."""
    return _cut(world, random, random.choice(world.clients))


def kill_client_sidecar(world: World, random: Random) -> Plan:
    """SIGKILL to a client's sidecar."""
    host = random.choice(world.clients)
    world.excuse(host, "its sidecar was killed")
    return _kill(world, random, host, host.sidecars[0])


def stop_client_sidecar(world: World, random: Random) -> Plan:
    """A client's sidecar that hangs."""
    return _stop(random, random.choice(world.clients).sidecars[0])


def kill_client(world: World, random: Random) -> Plan:
    """A client that restarts."""
    host = random.choice(world.clients)
    world.excuse(host, "its host was killed")
    return _kill(world, random, host, host.sidecars[0], host.charon)


def kill_redis(world: World, random: Random) -> Plan:
    """SIGKILL to the primary; its replica takes over."""
    yield Event(random.uniform(0, 4), "kill -9 the primary", lambda: _of_primary(world, lambda redis: redis.kill()))


def stop_redis(world: World, random: Random) -> Plan:
    """A primary that hangs: for longer than a second, its replica takes over, and it comes back as a primary."""
    begin, end = _for_a_while(random)
    yield Event(
        begin,
        "SIGSTOP the primary",
        lambda: _of_primary(world, lambda redis: signalled(redis, signal.SIGSTOP)),
    )
    yield Event(end, "SIGCONT both Redis", lambda: _continue(*world.redis))


def _continue(*daemons: Daemon) -> None:
    for daemon in daemons:
        signalled(daemon, signal.SIGCONT)


def cut_redis(world: World, random: Random) -> Plan:
    """A primary that nobody reaches."""
    return _cut(world, random, random.choice(world.redis).host)


def promote_lagging(world: World, random: Random) -> Plan:
    """A replica that has received nothing for seconds takes over."""
    begin = random.uniform(0, 2)
    yield Event(begin, "the replica lags", world.lag)
    yield Event(
        begin + random.uniform(2.0, 5.0),
        "kill -9 the primary: the replica that lags takes over",
        lambda: _of_primary(world, lambda redis: redis.kill()),
    )


def flush_redis(world: World, random: Random) -> Plan:
    """A bank that lost everything."""
    yield Event(random.uniform(0, 8), "flush Redis", lambda: _of_primary(world, lambda redis: redis.cli("flushall")))


def kick_subscribers(world: World, random: Random) -> Plan:
    """Redis drops all subscriptions."""
    words = ("client", "kill", "type", "pubsub")
    yield Event(
        random.uniform(0, 8), "drop all subscriptions", lambda: _of_primary(world, lambda redis: redis.cli(*words))
    )


def _of_primary(world: World, do: Callable[..., object]) -> None:
    primary = world.primary()
    if primary is not None and primary.running:
        do(primary)


def flush_rules(world: World, random: Random) -> Plan:
    """`nft flush ruleset` on a gateway, as a reload of a firewall does."""
    host = random.choice(world.gateways)
    yield Event(
        random.uniform(0, 8),
        f"flush the rules of {host.name}",
        lambda: host.run("nft", "flush", "ruleset"),
    )


def rotate_keys(world: World, random: Random) -> Plan:
    """A new key for the bank, which gateways get one after the other."""
    first, *others = random.sample(world.gateways, len(world.gateways))
    begin = random.uniform(0, 3)

    def copy(host: Host) -> None:
        host.write(BANK_KEY, (first.etc / BANK_KEY.removeprefix("/etc/")).read_text(), mode=0o600)

    yield Event(
        begin, f"new key on {first.name}", lambda: generate(first.etc / BANK_KEY.removeprefix("/etc/"), add=True)
    )
    for host in others:
        begin += random.uniform(0.2, 2)
        yield Event(begin, f"new key on {host.name}", lambda host=host: copy(host))  # type: ignore[misc]


def restart_charon(world: World, random: Random) -> Plan:
    """strongSwan's unit is restarted, as its drop-in has it: the sessions move first."""
    host = random.choice(world.gateways)

    def restart() -> None:
        host.run(*world.words(host, "drain", "--on-stop"), check=False)
        if host.charon.running:
            if not host.sidecars[0].running:
                # the next one cannot know whether these sessions ended, or their charon crashed
                world.leaves_stubs(host)
            # as systemd does, or one that hangs would not end
            signalled(host.charon, signal.SIGCONT)
            host.charon.stop()
            host.charon.forget()
        world.start_strongswans(host)

    yield Event(random.uniform(0, 4), f"restart charon of {host.name}", restart)


def drain(world: World, random: Random) -> Plan:
    """Sessions of a gateway move to the others."""
    host = random.choice(world.gateways)
    yield Event(random.uniform(0, 5), f"drain {host.name}", lambda: world.command(host, "drain", "--to", "any"))


def move_client(world: World, random: Random) -> Plan:
    """An operator moves a client."""
    client, gateway = random.choice(world.clients), random.choice(world.gateways)
    yield Event(
        random.uniform(0, 8),
        f"move {client.name} to {gateway.name}",
        lambda: world.command(client, "resume", "--to", gateway.address),
    )


def terminate(world: World, random: Random) -> Plan:
    """An operator ends a client's session at its gateway."""
    client = random.choice(world.clients)
    world.excuse(client, "an operator ended its session")

    def end() -> None:
        for host in world.gateways:
            for sa in world.sas_or_none(host):
                if sa.get("remote-id") == world.identity(client):
                    words = ("--terminate", "--ike-id", sa["uniqueid"], "--timeout", "2")
                    host.run("swanctl", *words, check=False)

    yield Event(random.uniform(0, 8), f"terminate {client.name}", end)


def reload(world: World, random: Random) -> Plan:
    """`swanctl --load-all` on a gateway."""
    host = random.choice(world.gateways)

    def load() -> None:
        if host.charon.running:
            host.run("timeout", "20", "swanctl", "--load-all", "--noprompt", check=False)

    yield Event(random.uniform(0, 8), f"load-all on {host.name}", load)


def rekey(world: World, random: Random) -> Plan:
    """A client rekeys its IKE_SA."""
    client = random.choice(world.clients)

    def again() -> None:
        for sa in world.sas_or_none(client):
            client.run("timeout", "5", "swanctl", "--rekey", "--ike-id", sa["uniqueid"], check=False)

    yield Event(random.uniform(0, 8), f"rekey {client.name}", again)


def revoke(world: World, random: Random) -> Plan:
    """A client is locked out."""
    client, host = random.choice(world.clients), random.choice(world.gateways)
    if client.name not in world.revoked and len(world.revoked) < LOCKED_OUT_MOST:
        yield Event(random.uniform(0, 6), f"revoke {client.name}", lambda: world.revoke(client, host))


KINDS: dict[Callable[[World, Random], Plan], int] = {
    kill_gateway_sidecar: 3,
    kill_gateway_charon: 2,
    kill_gateway: 3,
    stop_gateway_sidecar: 3,
    stop_gateway_charon: 2,
    cut_gateway: 3,
    cut_gateway_inside: 1,
    cut_client: 2,
    kill_client_sidecar: 1,
    stop_client_sidecar: 1,
    kill_client: 1,
    kill_redis: 2,
    stop_redis: 2,
    cut_redis: 2,
    promote_lagging: 3,
    flush_redis: 2,
    kick_subscribers: 1,
    flush_rules: 2,
    rotate_keys: 2,
    restart_charon: 2,
    drain: 2,
    move_client: 2,
    terminate: 1,
    reload: 1,
    rekey: 2,
    revoke: 2,
}
"""with how often each is chosen"""


def plan(world: World, random: Random, most: int) -> list[Event]:
    """What happens in a round, in order: 1 to `most` kinds of it."""
    kinds, weights = list(KINDS), list(KINDS.values())
    chosen = dict.fromkeys(random.choices(kinds, weights, k=random.randint(1, most)))
    events = [event for kind in chosen for event in kind(world, random)]
    return sorted(events, key=lambda event: event.at)
