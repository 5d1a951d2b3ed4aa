"""An attacker on the path between a client and its gateway, run on the gateway's host: it sees a request to resume, and
answers before the gateway does, from the gateway's address and port.

    python tests/forger.py KIND PID CLIENT GATEWAY

PID is the gateway's charon, which it keeps stopped until the forged answers are out, so that the sidecar cannot answer.
Prints `ready`, and at the end how many it sent.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from bridge.ike.message import ExchangeType, Flag, NotifyType, PayloadType, build, encode_ke, encode_notify
from bridge.ike.resumption_answer import build_response
from bridge.ike.resumption_request import parse_request
from bridge.net.packet import parse_datagram
from bridge.net.raw_socket import RawUdp

ETH_P_IP = 0x0800


def plain(request: bytes, *payloads: tuple[int, bytes], spi_r: bytes = bytes(8)) -> bytes:
    """An answer in the clear."""
    return build(
        spi_i=request[:8],
        spi_r=spi_r,
        exchange=ExchangeType.IKE_SA_INIT,
        flags=Flag.RESPONSE,
        message_id=0,
        payloads=payloads,
    )


def wrong_proof(request: bytes) -> bytes:
    """The right form, by somebody without SK_d."""
    parsed = parse_request(request)
    assert parsed is not None
    return build_response(parsed, spi_r=os.urandom(8), nonce=os.urandom(32), prf=5, sk_d_old=bytes(32), lifetime=60)


def draft_form(request: bytes) -> bytes:
    """`HDR, Nr`, as the draft has it: no PROOF at all."""
    return plain(request, (PayloadType.NONCE, os.urandom(32)), spi_r=os.urandom(8))


def ordinary(request: bytes) -> bytes:
    """What a gateway that does not resume would say: the client shall fall back."""
    parsed = parse_request(request)
    assert parsed is not None
    payloads = (
        (PayloadType.SA, bytes.fromhex("0000002c010100040300000c0100000c800e0080030000080300000c0300000802000005")),
        (PayloadType.KE, encode_ke(31, os.urandom(32))),
        (PayloadType.NONCE, os.urandom(32)),
    )
    return plain(request, *payloads, spi_r=os.urandom(8))


def error(request: bytes) -> bytes:
    """NO_PROPOSAL_CHOSEN: the client shall fall back."""
    return plain(request, (PayloadType.NOTIFY, encode_notify(NotifyType.NO_PROPOSAL_CHOSEN)))


def cookie(request: bytes) -> bytes:
    """A cookie that is none."""
    return plain(request, (PayloadType.NOTIFY, encode_notify(NotifyType.COOKIE, os.urandom(17))))


def cut(request: bytes) -> bytes:
    """The beginning of an answer."""
    return wrong_proof(request)[:-20]


def reflected(request: bytes) -> bytes:
    """The request itself, with the flags of an answer."""
    return request[:19] + bytes((Flag.RESPONSE,)) + request[20:]


KINDS: dict[str, Callable[[bytes], bytes]] = {
    made.__name__: made for made in (wrong_proof, draft_form, ordinary, error, cookie, cut, reflected)
}
COPIES = 5


def main() -> None:
    """The process."""
    kind, pid, client, gateway = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    raw = RawUdp()
    sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
    os.kill(pid, signal.SIGSTOP)
    try:
        print("ready", flush=True)
        while True:
            seen = parse_datagram(sniffer.recv(65535))
            if seen is None or (seen.src, seen.dst) != (client, gateway) or seen.ike[18] != ExchangeType.IKE_SA_INIT:
                continue
            for sent in range(1, COPIES + 1):  # noqa: B007 - printed at the end
                raw.send(gateway, seen.dport, client, seen.sport, KINDS[kind](seen.ike), seen.marker)
            # they are there before the gateway has looked at the request
            time.sleep(0.2)
            break
    finally:
        os.kill(pid, signal.SIGCONT)
    print(sent)


if __name__ == "__main__":
    main()
