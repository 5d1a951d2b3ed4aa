"""Public values of key exchange groups (bridge.ike.key_exchange), given to a real charon."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from bridge.ike.key_exchange import fresh_public_value
from bridge.ike.message import ExchangeType, Flag, Message, PayloadType, build, encode_ke, parse
from bridge.ike.transforms import Encr, Group, Integ, Prf, Suite
from bridge.lab import Lab
from net_support import inside

pytestmark = pytest.mark.lab

ADDRESS, PORT = "192.168.50.1", 5000

# swanctl's keywords: the groups of charon 5.9.8 in Debian, which every later release has too
KEYWORDS = {
    Group.MODP_768: "modp768",
    Group.MODP_1024: "modp1024",
    Group.MODP_1536: "modp1536",
    Group.MODP_2048: "modp2048",
    Group.MODP_3072: "modp3072",
    Group.MODP_4096: "modp4096",
    Group.MODP_6144: "modp6144",
    Group.MODP_8192: "modp8192",
    Group.ECP_256: "ecp256",
    Group.ECP_384: "ecp384",
    Group.ECP_521: "ecp521",
    Group.MODP_1024_160: "modp1024s160",
    Group.MODP_2048_224: "modp2048s224",
    Group.MODP_2048_256: "modp2048s256",
    Group.ECP_192: "ecp192",
    Group.ECP_224: "ecp224",
    Group.ECP_224_BP: "ecp224bp",
    Group.ECP_256_BP: "ecp256bp",
    Group.ECP_384_BP: "ecp384bp",
    Group.ECP_512_BP: "ecp512bp",
    Group.CURVE_25519: "curve25519",
    Group.CURVE_448: "curve448",
}

CONNECTION = """
connections {{
    peer {{
        version = 2
        proposals = {proposals}
        local {{
            auth = psk
        }}
        remote {{
            auth = psk
        }}
    }}
}}
"""


@pytest.fixture(scope="module")
def client() -> Iterator[socket.socket]:
    """A socket beside a charon that takes every one of the groups."""
    with Lab() as lab:
        host = lab.add_host("gw", f"{ADDRESS}/24")
        # it would limit the half-open SAs of one address
        host.charon.settings["charon.dos_protection"] = "no"
        proposals = ", ".join(f"aes128-sha256-{keyword}" for keyword in KEYWORDS.values())
        host.write("/etc/swanctl/swanctl.conf", CONNECTION.format(proposals=proposals))
        host.charon.start()
        with inside(host.namespace):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            sock.bind((ADDRESS, PORT))
            sock.settimeout(10)
            yield sock


def ask(client: socket.socket, group: Group, value: bytes) -> Message:
    """charon's answer to an ordinary first request with this public value."""
    suite = Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, group)
    request = build(
        spi_i=os.urandom(8),
        spi_r=bytes(8),
        exchange=ExchangeType.IKE_SA_INIT,
        flags=Flag.INITIATOR,
        message_id=0,
        payloads=[
            (PayloadType.SA, suite.proposal()),
            (PayloadType.KE, encode_ke(group, value)),
            (PayloadType.NONCE, os.urandom(32)),
        ],
    )
    client.sendto(request, (ADDRESS, 500))
    return parse(client.recv(65535))


@pytest.mark.parametrize("group", KEYWORDS)
def test_charon_answers_a_fresh_public_value_with_a_normal_response(client: socket.socket, group: Group) -> None:
    answer = ask(client, group, fresh_public_value(group))
    assert {PayloadType.SA, PayloadType.KE, PayloadType.NONCE} <= {payload.type for payload in answer.payloads}


def test_charon_refuses_a_value_that_is_no_point_of_its_curve(client: socket.socket) -> None:
    answer = ask(client, Group.ECP_224_BP, bytes(range(56)))
    assert answer.only(PayloadType.KE) is None
