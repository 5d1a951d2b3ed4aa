"""charon's end of the HA channel as the kernel shows it, by sock_diag and by /proc, with real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from bridge.charon.ha_message import PORT
from bridge.charon.socket_diag import CharonSocket, Peer
from net_support import alone, run

SIDECAR, CHARON = "127.0.0.2", "127.0.0.1"


@pytest.fixture(name="alone")
def _alone() -> Iterator[None]:
    with alone():
        yield


@pytest.fixture
def sidecar(alone: None) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # for a test in which somebody has all addresses
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((SIDECAR, PORT))
        sock.connect((CHARON, PORT))
        yield sock


@pytest.fixture
def charon(sidecar: socket.socket) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((CHARON, PORT))
        sock.connect((SIDECAR, PORT))
        yield sock


@pytest.fixture(params=["sock_diag", "proc"])
def peer(request: pytest.FixtureRequest, sidecar: socket.socket) -> Iterator[Peer]:
    made = Peer(SIDECAR, CHARON)
    if request.param == "sock_diag":
        made.open()
        # else the other half of these tests would be run twice
        assert made._diag is not None
    yield made
    made.close()


def test_nobody_is_there(peer: Peer) -> None:
    assert peer.look() is None


def test_who_is_there_and_how_much_waits(peer: Peer, sidecar: socket.socket, charon: socket.socket) -> None:
    assert peer.look() == CharonSocket(0, 0, os.geteuid(), os.fstat(charon.fileno()).st_ino)
    sidecar.send(bytes(100))
    one = peer.look()
    assert one is not None
    assert one.queued >= 100
    sidecar.send(bytes(100))
    two = peer.look()
    assert two is not None
    assert two.queued == 2 * one.queued
    charon.recv(1000)
    charon.recv(1000)
    assert peer.look() == CharonSocket(0, 0, os.geteuid(), os.fstat(charon.fileno()).st_ino)


def test_what_did_not_fit_is_counted(peer: Peer, sidecar: socket.socket, charon: socket.socket) -> None:
    charon.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(100):
        sidecar.send(bytes(1000))
    found = peer.look()
    assert found is not None
    taken = 0
    charon.setblocking(False)
    try:
        while charon.recv(1000):
            taken += 1
    except BlockingIOError:
        pass
    assert found.drops == 100 - taken > 0


def test_a_socket_on_all_addresses_is_not_charons(peer: Peer) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("0.0.0.0", PORT))
        assert peer.look() is None


def test_another_users_socket_is_known_by_its_user(peer: Peer) -> None:
    ours = os.geteuid()
    os.seteuid(65534)
    try:
        other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        other.bind((CHARON, PORT))
    finally:
        os.seteuid(ours)
    with other:
        found = peer.look()
    assert found is not None
    assert found.uid == 65534


def test_ipv6(alone: None) -> None:
    listen, charon = "fd00::2", "fd00::1"
    for address in (listen, charon):
        run("ip", "address", "add", f"{address}/128", "dev", "lo", "nodad")
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sidecar:
        sidecar.bind((listen, PORT))
        sidecar.connect((charon, PORT))
        peer = Peer(listen, charon)
        peer.open()
        assert peer.look() is None
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as end:
            end.bind((charon, PORT))
            found = peer.look()
            assert found is not None
            assert found.inode == os.fstat(end.fileno()).st_ino
        peer.close()
