"""Requests to resume that no client's sidecar would send, from the client's host, and what comes of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from bridge.ike.key_exchange import fresh_public_value
from bridge.ike.keys import prf
from bridge.ike.message import ExchangeType, Flag, build, parse
from bridge.ike.resumption_answer import parse_response
from bridge.ike.resumption_request import build_request
from bridge.ike.sync_messages import OrdinaryResponse
from bridge.lab import Topology
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar
from bridge.stub.codec import decode
from bridge.stub.keyring import Keyring
from bridge.stub.stub import Stub
from failover_support import stub_key, the_sa
from wire_support import proof_range

# Sends datagrams (hex, a line each) from a port of its own to a gateway's, and prints the answers that come back, hex:
# until there are as many as were sent and 0.3 s have brought no more, or for 5 s. Requests are no answers: charon sends
# one on a rebuilt SA when an address of its host changes (MOBIKE), its tunnel device's own at start among them.
PROBE = """
import socket, sys, time
gateway, own, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", own))
messages = [bytes.fromhex(line) for line in sys.stdin]
for message in messages:
    sock.sendto(message, (gateway, port))
    time.sleep(0.05)
until, count = time.monotonic() + 5, 0
while (left := until - time.monotonic()) > 0:
    sock.settimeout(left)
    try:
        octets = sock.recv(65536)
    except TimeoutError:
        break
    if len(octets) < 24 or not octets[23] & 0x20:
        continue
    print(octets.hex(), flush=True)
    count += 1
    if count >= len(messages):
        until = time.monotonic() + 0.3
"""


def send(
    topology: Topology, *messages: bytes, port: int = 4501, to: Host | None = None, by: Host | None = None
) -> list[bytes]:
    """Send IKE messages to a host (gw2) from another (the client's); what came back, without the non-ESP marker."""
    lines = "".join((bytes(4) + message).hex() + "\n" for message in messages)
    target = (to or topology.gw2).address
    done = (by or topology.client).run(sys.executable, "-c", PROBE, target, str(port), "4500", stdin=lines)
    return [bytes.fromhex(line)[4:] for line in done.stdout.split()]


def the_stub(topology: Topology) -> Stub:
    """The stub of the client's session at gw1, opened with the gateways' key: a test may, a client could not."""
    return stub_at(topology, the_sa(topology.client)["responder-spi"])


def stub_at(topology: Topology, spi: str) -> Stub:
    """The stub of gw1's with this SPI, in hex."""
    return stub_of_key(topology, stub_key(topology.gw1.address, spi))


def stub_of_key(topology: Topology, key: str) -> Stub:
    """The stub that the bank has under this key."""
    keyring = Keyring.load(topology.gw1.etc / "ike-sa-sync/bank.key")
    done = topology.bank.host.run(
        "python3",
        "-c",
        "import socket,sys;s=socket.create_connection(('127.0.0.1',6379));k=sys.argv[1].encode();"
        "s.sendall(b'*3\\r\\n$4\\r\\nHGET\\r\\n$%d\\r\\n%s\\r\\n$6\\r\\nsealed\\r\\n'%(len(k),k));"
        "f=s.makefile('rb');n=int(f.readline()[1:]);print(f.read(n).hex())",
        key,
    )
    return decode(keyring.open(bytes.fromhex(done.stdout.strip()), key.encode()))


def stored_children(topology: Topology, key: str) -> list[str]:
    """The names of the CHILD_SAs in the stub that the bank has under this key."""
    return sorted(child.name for child in stub_of_key(topology, key).children)


def request(stub: Stub, **changes: Any) -> bytes:
    """A request to resume the stub, as its client would make it, with what is changed."""
    values: dict[str, Any] = {
        "spi_i": b"\x11" * 8,
        "suite": stub.suite,
        "ke_value": fresh_public_value(stub.suite.group),
        "nonce": b"\x22" * 32,
        "sync_index": (stub.index.gateway, stub.index.spi),
        "prf": stub.suite.prf,
        "sk_d_old": stub.sk_d,
    }
    return build_request(**(values | changes))


def altered(message: bytes, *changes: tuple[int, bytes]) -> bytes:
    """`message` with octets replaced: (offset, octets) each, length and all else as they were."""
    octets = bytearray(message)
    for offset, value in changes:
        octets[offset : offset + len(value)] = value
    return bytes(octets)


def remade(stub: Stub, edit: Callable[[list[tuple[int, bytes]]], list[tuple[int, bytes]]], **header: Any) -> bytes:
    """A request to resume the stub whose payloads were edited, with another header if wanted, and then proved."""
    payloads = edit([(payload.type, payload.body) for payload in parse(request(stub)).payloads])
    fields: dict[str, Any] = {
        "spi_i": b"\x11" * 8,
        "spi_r": bytes(8),
        "exchange": ExchangeType.IKE_SA_INIT,
        "flags": Flag.INITIATOR,
        "message_id": 0,
    }
    message = build(**(fields | header), payloads=payloads)
    honest = request(stub)
    at = message.rindex(honest[proof_range(honest).start - 4 :][:4]) + 4
    blank = altered(message, (at, bytes(32)))
    key = prf(stub.suite.prf, stub.sk_d, b"IKE_SA_SYNC initiator")
    return altered(message, (at, prf(stub.suite.prf, key, blank)))


def refused(topology: Topology, message: bytes) -> bool:
    """Whether gw2 let a request go to charon, which answered as usual, and rebuilt nothing."""
    answers = [parse_response(answer, message) for answer in send(topology, message)]
    return bool(answers) and all(isinstance(answer, OrdinaryResponse) for answer in answers) and rebuilt(topology) == 0


def rebuilt(topology: Topology) -> int:
    """IKE_SAs on gw2, in any state that a rebuilt one can have."""
    return sum(sa["state"] in ("ESTABLISHED", "PASSIVE") for sa in topology.gw2.charon.sas())


@contextlib.contextmanager
def configured(sidecar: Sidecar, section: str, **changes: Any) -> Iterator[None]:
    """A sidecar with other values in a section of its configuration, for a while."""
    before = sidecar.config.get(section, {})
    sidecar.stop()
    sidecar.config[section] = before | changes
    sidecar.start()
    try:
        yield
    finally:
        sidecar.stop()
        sidecar.config[section] = before
        sidecar.start()
