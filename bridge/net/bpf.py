"""The packet filter of the raw socket: classic BPF, which passes answers of our exchanges only."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence

from bridge.net.packet import (
    ANSWERED,
    EXCHANGE_OFFSET,
    FLAG_RESPONSE,
    PORT_IKE,
    PORT_NAT_T,
    UDP_HEADER,
)

_SO_ATTACH_FILTER = 26

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, operand"""

LOAD_X_NUMBER, LOAD_X_IPV4_HEADER = 0x01, 0xB1

_LOAD_WORD, _LOAD_HALF = 0x40, 0x48
"""at X plus the operand"""

_LOAD_BYTE = 0x30
"""at the operand"""

_SOURCE_PORT, _DESTINATION_PORT = 0, 2
"""in the UDP header"""

_AND, _JUMP, _JUMP_EQUAL, _RETURN = 0x54, 0x05, 0x15, 0x06

_BEGINNING = 96
"""octets: the longest IPv4 header, those of UDP and ESP"""

_RETURN_BEGINNING = (_RETURN, 0, 0, _BEGINNING)

_RETURN_ALL, RETURN_NONE = (_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)


def answers_filter(load_x: Instruction) -> list[Instruction]:
    """Passes answers of the exchanges in question. `load_x` puts the offset of the UDP header into X."""
    exchange, answers = UDP_HEADER + EXCHANGE_OFFSET, [kind << 8 | FLAG_RESPONSE for kind in ANSWERED]
    last = len(answers) - 1
    return [
        load_x,
        # which messages follow a non-ESP marker: as bridge.net.packet.has_marker has it
        (_LOAD_HALF, 0, 0, _SOURCE_PORT),
        (_JUMP_EQUAL, 7, 0, PORT_IKE),
        (_JUMP_EQUAL, 2, 0, PORT_NAT_T),
        (_LOAD_HALF, 0, 0, _DESTINATION_PORT),
        (_JUMP_EQUAL, 4, 0, PORT_IKE),
        (_LOAD_WORD, 0, 0, UDP_HEADER),
        (_JUMP_EQUAL, 0, len(answers) + 5, 0),
        (_LOAD_HALF, 0, 0, exchange + 4),
        (_JUMP, 0, 0, 1),
        (_LOAD_HALF, 0, 0, exchange),
        (_AND, 0, 0, 0xFF00 | FLAG_RESPONSE),
        *((_JUMP_EQUAL, last - at, 0 if at < last else 1, answer) for at, answer in enumerate(answers)),
        _RETURN_ALL,
        RETURN_NONE,
    ]


ESTABLISHED = (36, 37)
"""exchanges of an established IKE_SA: CREATE_CHILD_SA, INFORMATIONAL"""


def requests_filter(load_x: Instruction, ports: Sequence[int]) -> list[Instruction]:
    """Passes requests of established IKE_SAs to one of `ports`. `load_x` puts the offset of the UDP header into X. A
    load beyond the packet's end rejects it."""
    exchange = UDP_HEADER + EXCHANGE_OFFSET
    requests = [kind << 8 for kind in ESTABLISHED]

    def judge(at: int) -> list[Instruction]:
        last = len(requests)
        return [
            (_LOAD_HALF, 0, 0, at),
            (_AND, 0, 0, 0xFF00 | FLAG_RESPONSE),
            *(
                (_JUMP_EQUAL, last - number - 1, 0 if number < last - 1 else 1, each)
                for number, each in enumerate(requests)
            ),
            _RETURN_ALL,
            RETURN_NONE,
        ]

    plain, marked = judge(exchange), judge(exchange + 4)
    return [
        load_x,
        *_to_one_of(ports),
        # as bridge.net.packet.has_marker has it: never to 500
        (_JUMP_EQUAL, 0, len(plain), PORT_IKE),
        *plain,
        (_LOAD_WORD, 0, 0, UDP_HEADER),
        (_JUMP_EQUAL, 1, 0, 0),
        RETURN_NONE,
        *marked,
    ]


def esp_in_udp_filter(load_x: Instruction, ports: Sequence[int]) -> list[Instruction]:
    """Passes the beginning of ESP in UDP to one of `ports` (RFC 3948 section 2.1)."""
    return [
        load_x,
        *_to_one_of(ports),
        (_JUMP_EQUAL, 2, 0, PORT_IKE),
        (_LOAD_WORD, 0, 0, UDP_HEADER),
        (_JUMP_EQUAL, 0, 1, 0),
        RETURN_NONE,
        _RETURN_BEGINNING,
    ]


def esp_filter() -> list[Instruction]:
    """Passes the beginning of each packet."""
    return [_RETURN_BEGINNING]


def _to_one_of(ports: Sequence[int]) -> list[Instruction]:
    """Rejects what is to another port; leaves the port in A."""
    chosen = [
        (_JUMP_EQUAL, len(ports) - number - 1, 0 if number < len(ports) - 1 else 1, port)
        for number, port in enumerate(ports)
    ]
    return [(_LOAD_HALF, 0, 0, _DESTINATION_PORT), *chosen, (_JUMP, 0, 0, 1), RETURN_NONE]


def is_solicitation() -> list[Instruction]:
    """Passes Ethernet frames with a neighbour solicitation (ICMPv6 type 135) without extension headers."""
    next_header, icmp_type = 14 + 6, 14 + 40
    return [
        (_LOAD_BYTE, 0, 0, next_header),
        (_JUMP_EQUAL, 0, 3, 58),
        (_LOAD_BYTE, 0, 0, icmp_type),
        (_JUMP_EQUAL, 0, 1, 135),
        _RETURN_ALL,
        RETURN_NONE,
    ]


def attach(sock: socket.socket, program: list[Instruction]) -> None:
    """Have the kernel pass only what `program` lets through. Raises OSError."""
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(buffer)))
