"""A flood of requests to resume, from made-up addresses: well-formed, each with another index, none with a valid PROOF.

    python -m bridge.bench.spray GATEWAY PORT RATE SECONDS

Sends RATE IPv4 packets a second, and prints as JSON how many went out and how long it took. Sources are addresses of
CLIENTS: the caller has to route the answers to them to a place where they do no harm.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import time
from ipaddress import IPv4Address

from bridge.bench.generator import CLIENTS
from bridge.ike.resumption_request import build_request
from bridge.ike.transforms import Encr, Group, Integ, Prf, Suite
from bridge.net.packet import IPPROTO_UDP, PORT_NAT_T, udp_datagram

DIFFERENT = 16_384
"""packets, then the same once more: longer than any limit remembers a source"""
BURST_SECONDS = 0.001
STEP = 409
"""between the addresses of two packets"""
_SUITE = Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, Group.CURVE_25519)
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_FIRST = int(IPv4Address(CLIENTS.partition("/")[0])) + 1


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Mmsghdr(ctypes.Structure):
    """struct mmsghdr of sendmmsg(2), the msghdr in it spelled out."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("sent", ctypes.c_uint),
    )


def packet(number: int, gateway: str, port: int) -> bytes:
    """A request as an IPv4 packet; the kernel fills in identification and checksum of the header."""
    source = str(IPv4Address(_FIRST + number * STEP))
    message = build_request(
        spi_i=os.urandom(8),
        suite=_SUITE,
        ke_value=bytes(32),
        nonce=os.urandom(32),
        sync_index=(gateway, os.urandom(8)),
        prf=_SUITE.prf,
        sk_d_old=bytes(32),
        nat=(source, port, gateway, port),
    )
    udp = udp_datagram(source, port, gateway, port, message, port == PORT_NAT_T)
    addresses = socket.inet_aton(source), socket.inet_aton(gateway)
    return _IPV4.pack(0x45, 0, _IPV4.size + len(udp), 0, 0, 64, IPPROTO_UDP, 0, *addresses) + udp


def spray(gateway: str, port: int, rate: int, seconds: float) -> tuple[int, float]:
    """Send; how many packets the kernel took, and in how many seconds."""
    packets = [packet(number, gateway, port) for number in range(DIFFERENT)]
    libc = ctypes.CDLL(None, use_errno=True)
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 20)
    # struct sockaddr_in; a connected raw socket needs none a message
    sock.connect((gateway, 0))
    pairs = [(ctypes.create_string_buffer(octets, len(octets)), octets) for octets in packets]
    pieces = (_Iovec * DIFFERENT)(*[_Iovec(ctypes.addressof(buffer), len(octets)) for buffer, octets in pairs])
    messages = (_Mmsghdr * DIFFERENT)()
    for number in range(DIFFERENT):
        messages[number].iov = ctypes.pointer(pieces[number])
        messages[number].iovlen = 1
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    sent = 0
    while (passed := time.monotonic() - began) < seconds:
        due = int(passed * rate) - sent
        at = sent % DIFFERENT
        count = min(due, DIFFERENT - at, 1024)
        if count <= 0:
            time.sleep(BURST_SECONDS)
            continue
        done = libc.sendmmsg(sock.fileno(), ctypes.byref(messages, at * ctypes.sizeof(_Mmsghdr)), count, 0)
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        # what the kernel did not take is tried again
        sent += done
    return sent, time.monotonic() - began


def main() -> None:
    """The process. It says `ready`, and begins when it reads a line."""
    gateway, port, rate, seconds = sys.argv[1:]
    sent, took = spray(gateway, int(port), int(rate), float(seconds))
    print(json.dumps({"sent": sent, "seconds": round(took, 3)}))


if __name__ == "__main__":
    main()
