"""Only root speaks as either end of the HA channel (bridge.net.owner_rules), and the rules come back when they are
taken away (bridge.net.rules_watch)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from bridge.charon.ha_channel import HaChannel
from bridge.charon.ha_codec import encode
from bridge.charon.ha_message import Attr, IkeId, MessageType
from bridge.net import firewall, owner_rules, rules_watch
from bridge.net.rules_watch import RulesWatch
from net_support import End, Wire, inside, run, until, wire

pytestmark = pytest.mark.lab

CHARON, SIDECAR, PORT = "127.0.0.1", "127.0.0.2", 4510
NOBODY = 65534
DELETE = encode(3, MessageType.IKE_DELETE, [(Attr.IKE_ID, IkeId.of(b"I" * 8, b"R" * 8, False))])
RULES = owner_rules.rules((CHARON, SIDECAR), PORT)
SEND = """
import os, socket, sys
uid, source, sport, target, dport = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
os.setuid(uid)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind((source, sport))
try:
    sock.sendto(b"said", (target, dport))
except PermissionError:
    print("refused")
"""


@pytest.fixture(scope="module")
def cable() -> Iterator[Wire]:
    with wire() as made:
        yield made


@pytest.fixture(params=["nftables", "iptables"])
def backend(request: pytest.FixtureRequest, cable: Wire) -> Iterator[firewall.Backend]:
    # iptables leaves empty tables, which a flush of the ruleset takes away for good
    cable.host.run("nft", "flush", "ruleset")
    yield request.param
    with inside(cable.host.namespace):
        firewall.remove(RULES)


def arrives(cable: Wire, uid: int, source: tuple[str, int], target: tuple[str, int]) -> bool:
    """Whether a datagram of this user's arrives."""
    with inside(cable.host.namespace), contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as end:
        end.bind(target)
        end.settimeout(0.2)
        arguments = (str(uid), source[0], str(source[1]), target[0], str(target[1]))
        subprocess.run([sys.executable, "-c", SEND, *arguments], check=True, stdout=subprocess.DEVNULL)
        try:
            return end.recv(100) == b"said"
        except TimeoutError:
            return False


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param((CHARON, PORT), (SIDECAR, PORT), id="as charon"),
        pytest.param((CHARON, 0), (SIDECAR, PORT), id="to the sidecar from another port"),
        pytest.param(("127.0.0.5", PORT), (SIDECAR, PORT), id="to the sidecar from another address"),
        pytest.param((SIDECAR, PORT), (CHARON, PORT), id="as the sidecar"),
        pytest.param(("127.0.0.5", 0), (CHARON, PORT), id="to charon"),
        pytest.param((SIDECAR, PORT), ("127.0.0.7", 7777), id="from the sidecar's end to another"),
        pytest.param((CHARON, PORT), ("127.0.0.7", 7777), id="from charon's end to another"),
    ],
)
def test_another_user_cannot_send_as_either_end_or_to_it(
    cable: Wire, backend: firewall.Backend, source: tuple[str, int], target: tuple[str, int]
) -> None:
    assert arrives(cable, NOBODY, source, target)
    with inside(cable.host.namespace):
        placed = firewall.install(RULES, backend=backend)
    assert not arrives(cable, NOBODY, source, target)
    assert arrives(cable, os.getuid(), source, target)
    with inside(cable.host.namespace):
        assert owner_rules.dropped(firewall.look(RULES, placed)) == 1


def test_other_datagrams_of_other_users_pass(cable: Wire, backend: firewall.Backend) -> None:
    with inside(cable.host.namespace):
        firewall.install(RULES, backend=backend)
    assert arrives(cable, NOBODY, (CHARON, 0), (SIDECAR, 4511))
    assert arrives(cable, NOBODY, ("127.0.0.5", PORT), ("127.0.0.6", PORT))


def test_nothing_reaches_them_over_a_network_where_loopback_is_routed(cable: Wire, backend: firewall.Backend) -> None:
    """net.ipv4.conf.all.route_localnet=1, as Kubernetes sets it."""
    cable.host.run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    cable.peer.run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    cable.peer.run("ip", "route", "replace", "127.0.0.2/32", "via", cable.host.ipv4, "src", cable.peer.ipv4)
    cable.peer.run("ip", "route", "del", "local", "127.0.0.0/8", "table", "local")
    try:
        with inside(cable.host.namespace):
            charon_end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            charon_end.bind((SIDECAR, PORT))
            charon_end.settimeout(0.3)
        with inside(cable.peer.namespace):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sender.bind((cable.peer.ipv4, 0))
        with contextlib.closing(charon_end), contextlib.closing(sender):
            sender.sendto(b"over", (SIDECAR, PORT))
            assert charon_end.recv(100) == b"over"
            with inside(cable.host.namespace):
                firewall.install(RULES, backend=backend)
            sender.sendto(b"over", (SIDECAR, PORT))
            with pytest.raises(TimeoutError):
                charon_end.recv(100)
    finally:
        cable.peer.run("ip", "route", "del", "127.0.0.2/32")
        cable.peer.run("ip", "route", "add", "local", "127.0.0.0/8", "dev", "lo", "table", "local")
        for end in (cable.host, cable.peer):
            end.run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=0")


def test_whether_they_are_there_is_reported(cable: Wire, backend: firewall.Backend) -> None:
    with inside(cable.host.namespace):
        assert not owner_rules.present((CHARON, SIDECAR), PORT)
        firewall.install(RULES, backend=backend)
        assert owner_rules.present((CHARON, SIDECAR), PORT)
        assert not owner_rules.present((CHARON, "127.0.0.3"), PORT)


def in_the_namespace_of(end: End) -> Callable[..., Awaitable[Any]]:
    """In place of asyncio.to_thread: threads would work in the namespace of the process."""

    async def here(function: Callable[..., Any], *arguments: Any) -> Any:
        with inside(end.namespace):
            return function(*arguments)

    return here


async def test_what_waits_in_the_sidecars_socket_from_before_the_rules_is_forgotten(cable: Wire) -> None:
    handled: list[object] = []
    channel = HaChannel(SIDECAR, CHARON, lambda message, _: handled.append(message), lambda *_: handled.append(_))
    with inside(cable.host.namespace):
        channel.open()
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.bind((CHARON, PORT))
    with contextlib.closing(sender):
        for _ in range(3):
            sender.sendto(b"\3\1forged", (SIDECAR, PORT))
        channel.discard()
        channel.start()
        await asyncio.sleep(0.05)
        assert (channel.received, handled) == (0, [])
        sender.sendto(b"\3\1later", (SIDECAR, PORT))
        await until(lambda: channel.received == 1)
    channel.close()


@pytest.mark.parametrize("flushed", [False, True])
async def test_the_end_that_a_charon_that_is_gone_reported_last_counts_unless_another_user_could_have_sent_it(
    cable: Wire, backend: firewall.Backend, flushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "to_thread", in_the_namespace_of(cable.host))
    monkeypatch.setattr(rules_watch, "IN_FORCE_SECONDS", 0.0)
    handled: list[bool] = []
    channel = HaChannel(SIDECAR, CHARON, lambda _, genuine: handled.append(genuine), lambda *_: None)
    channel.expect(3)
    watch = RulesWatch("ha", RULES, backend)
    channel.guarded = watch.in_place_since
    with inside(cable.host.namespace):
        watch.place()
        channel.open()
        channel.start()
        charon_end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        charon_end.bind((CHARON, PORT))
    channel.receive()
    if flushed:
        for command in FLUSH[backend]:
            cable.host.run(*command)
    charon_end.sendto(DELETE, (SIDECAR, PORT))
    charon_end.close()
    await until(lambda: handled == [True] or channel.malformed == 1)
    assert handled == ([] if flushed else [True])
    channel.close()


FLUSH: dict[str, list[tuple[str, ...]]] = {
    "nftables": [("nft", "flush", "ruleset")],
    "iptables": [("iptables", "-t", firewall.TABLE, "-F"), ("iptables", "-t", firewall.TABLE, "-X")],
}
ALTER: dict[str, list[tuple[str, ...]]] = {
    "nftables": [("nft", "flush", "chain", "inet", owner_rules.NAME, "output")],
    "iptables": [("iptables", "-t", firewall.TABLE, "-F", "OUTPUT")],
}


@pytest.mark.parametrize("how", [FLUSH, ALTER], ids=["flushed", "altered"])
async def test_rules_that_are_gone_are_put_back(
    cable: Wire, backend: firewall.Backend, how: dict[str, list[tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "to_thread", in_the_namespace_of(cable.host))
    monkeypatch.setattr(rules_watch, "LOOK_SECONDS", 0.05)
    watch = RulesWatch("ha", RULES, backend, dropped=owner_rules.dropped)
    with inside(cable.host.namespace):
        watch.place()
        before = run("nft", "list", "ruleset")
    looked = 0

    def count() -> None:
        nonlocal looked
        looked += 1

    watching = asyncio.create_task(watch.run(count))
    try:
        await until(lambda: looked > 1)
        assert (watch.in_place, watch.restored) == (True, 0)
        for command in how[backend]:
            cable.host.run(*command)
        await until(lambda: watch.restored == 1)
        assert watch.in_place
        with inside(cable.host.namespace):
            assert run("nft", "list", "ruleset") == before
    finally:
        watching.cancel()


async def test_what_they_counted_is_not_lost_with_them(
    cable: Wire, backend: firewall.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = RulesWatch("ha", RULES, backend, dropped=owner_rules.dropped)
    with inside(cable.host.namespace):
        watch.place()
    assert not arrives(cable, NOBODY, (CHARON, PORT), (SIDECAR, PORT))

    monkeypatch.setattr(asyncio, "to_thread", in_the_namespace_of(cable.host))
    watch.look_now()
    watching = asyncio.create_task(watch.run())
    try:
        await until(lambda: watch.counted("dropped") == 1)
        for command in FLUSH[backend]:
            cable.host.run(*command)
        watch.look_now()
        await until(lambda: watch.restored == 1)
        assert watch.counted("dropped") == 1
    finally:
        watching.cancel()
