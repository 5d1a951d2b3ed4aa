"""Forward secrecy of a resumption: a Diffie-Hellman exchange in the round trip (docs/protocol.md)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from bank_support import GATEWAY, keyring, stub_of
from bridge.bank.interface import StubBank
from bridge.charon.charon import Charon
from bridge.charon.ha_codec import decode
from bridge.charon.ha_commands import add_message
from bridge.charon.ha_message import Attr, IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import ConnectionInfo
from bridge.client.ike_transport import IkeTransport
from bridge.client.sync_request import Answer, RefusedError, SyncRequester, Target
from bridge.config import ResumeConfig, SyncConfig
from bridge.gateway.addresses import AddressHolders
from bridge.gateway.admission import Admission
from bridge.gateway.client_stubs import ClientStubs
from bridge.gateway.decision import Decision
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.living import LivingSas
from bridge.gateway.rebuild import Rebuilder
from bridge.gateway.rebuilt import Rebuilt
from bridge.gateway.refusal import Refusal
from bridge.gateway.revocation import Revocations
from bridge.gateway.unconfirmed import Unconfirmed
from bridge.ike.cookie import Cookies
from bridge.ike.key_exchange import KeyExchange, UnsupportedGroup, can_exchange
from bridge.ike.keys import derive_sk_d, prf, skeyseed_rekey, skeyseed_resume
from bridge.ike.message import MalformedMessage, PayloadType, encode_ke, parse
from bridge.ike.resumption_answer import build_response, parse_response, verify_response
from bridge.ike.resumption_request import build_request, parse_request
from bridge.ike.sync_messages import SyncRequest, SyncResponse
from bridge.ike.sync_payload import Attribute, SyncPayload
from bridge.ike.transforms import PRF_OUTPUT, Group, Prf, Suite
from bridge.net.interface import Packet
from bridge.net.packet import Datagram
from bridge.stub.child_sa import NOTHING
from bridge.stub.stub import Stub
from bridge.stub.types import Endpoint

SUITE = Suite(12, 128, 12, 5, 31)
SK_D = b"d" * 32
Policy = Literal["offered", "required", "off"]

CURVES = [group for group in Group if can_exchange(group)]
OTHERS = [group for group in Group if not can_exchange(group) and group is not Group.NONE]


# the exchange


@pytest.mark.parametrize("group", CURVES)
def test_both_sides_come_to_the_same_secret(group: Group) -> None:
    one, other = KeyExchange(group), KeyExchange(group)
    assert one.shared(other.public) == other.shared(one.public)
    assert one.public != other.public


def test_the_secret_is_that_of_x25519_itself() -> None:
    ours, theirs = KeyExchange(Group.CURVE_25519), X25519PrivateKey.generate()
    expected = theirs.exchange(X25519PublicKey.from_public_bytes(ours.public))
    assert ours.shared(theirs.public_key().public_bytes_raw()) == expected


@pytest.mark.parametrize("group", CURVES)
def test_a_value_that_is_none_of_the_group_is_refused(group: Group) -> None:
    exchange = KeyExchange(group)
    for value in (b"", exchange.public[:-1], exchange.public + b"\0", bytes(len(exchange.public))):
        with pytest.raises(ValueError):  # noqa: PT011 - the text is the library's
            exchange.shared(value)


@pytest.mark.parametrize("group", OTHERS)
def test_a_group_that_is_no_curve_cannot_be_had(group: Group) -> None:
    with pytest.raises(UnsupportedGroup):
        KeyExchange(group)


@pytest.mark.parametrize("algorithm", PRF_OUTPUT)
def test_skeyseed_is_that_of_a_rekey(algorithm: Prf) -> None:
    seed = skeyseed_resume(algorithm, b"SK_d", b"Ni", b"Nr", b"g^ir")
    assert seed == prf(algorithm, b"SK_d", b"g^irNiNr") == skeyseed_rekey(algorithm, b"SK_d", b"g^ir", b"Ni", b"Nr")


# the messages


def ask(**changes: Any) -> bytes:
    values: dict[str, Any] = {
        "spi_i": b"I" * 8,
        "suite": SUITE,
        "ke_value": b"k" * 32,
        "nonce": b"i" * 32,
        "sync_index": ("192.0.2.1", b"O" * 8),
        "prf": SUITE.prf,
        "sk_d_old": SK_D,
        "forward_secrecy": True,
    }
    return build_request(**(values | changes))


def read(octets: bytes) -> SyncRequest:
    found = parse_request(octets)
    assert found is not None
    return found


def answer(to: bytes, **changes: Any) -> bytes:
    values: dict[str, Any] = {"spi_r": b"R" * 8, "nonce": b"r" * 32, "prf": SUITE.prf, "sk_d_old": SK_D}
    return build_response(read(to), **(values | {"key_exchange": (31, b"K" * 32)} | changes))


def answered(octets: bytes, to: bytes) -> SyncResponse:
    found = parse_response(octets, to)
    assert isinstance(found, SyncResponse)
    return found


def test_a_request_asks_with_an_attribute_and_offers_the_public_value_that_it_has_anyway() -> None:
    request = read(ask())
    assert request.forward_secrecy
    assert (request.group, request.public_value) == (31, b"k" * 32)
    assert not read(ask(forward_secrecy=False)).forward_secrecy
    assert request.sync.first(Attribute.FORWARD_SECRECY) == b""


def test_the_attribute_has_no_value_and_is_there_once() -> None:
    for attributes in ([(9, b"\1")], [(9, b""), (9, b"")]):
        with pytest.raises(MalformedMessage):
            SyncPayload.decode(SyncPayload(False, "192.0.2.1", b"O" * 8, tuple(attributes)).encode())


def test_the_answer_carries_ker_in_front_of_nr_and_is_none_of_a_full_handshake() -> None:
    asked = ask()
    octets = answer(asked)
    assert [payload.type for payload in parse(octets).payloads] == [
        PayloadType.KE,
        PayloadType.NONCE,
        PayloadType.SYNC,
    ]
    found = answered(octets, asked)
    assert found.key_exchange == (31, b"K" * 32)
    assert verify_response(found, asked, SUITE.prf, SK_D)
    assert answered(answer(asked, key_exchange=None), asked).key_exchange is None


@pytest.mark.parametrize("position", [-1, 4, 5, 8])
def test_proof_covers_ker(position: int) -> None:
    asked = ask()
    octets = bytearray(answer(asked))
    [ke] = [payload for payload in parse(bytes(octets)).payloads if payload.type == PayloadType.KE]
    octets[ke.offset + (position if position >= 0 else len(ke.body) - 1) - 4] ^= 1
    try:
        found = answered(bytes(octets), asked)
    except MalformedMessage:
        return
    assert not verify_response(found, asked, SUITE.prf, SK_D)


def test_an_answer_stripped_of_ker_proves_nothing() -> None:
    asked = ask()
    octets = answer(asked)
    ke = len(encode_ke(31, b"K" * 32)) + 4
    stripped = bytearray(octets[:28] + octets[28 + ke :])
    stripped[16] = PayloadType.NONCE
    stripped[24:28] = len(stripped).to_bytes(4)
    assert not verify_response(answered(bytes(stripped), asked), asked, SUITE.prf, SK_D)


def test_charon_gets_the_secret_with_the_new_sa() -> None:
    made = rebuilt(decided("offered"))
    octets = add_message(5, made.install, "198.18.0.1")
    assert decode(octets).first(Attr.SECRET) == made.install.g_ir != b""


# the gateway


class FakeSpis:
    def next(self) -> int:
        return 0x40000001


class FakeCharon:
    """A charon with the stub's connection."""

    def __init__(self) -> None:
        self.tracker = SaTracker(cast(Any, None), wall=lambda: 0.0, clock=lambda: 0.0)
        self.spis = FakeSpis()

    def connection(self, name: str) -> ConnectionInfo:
        return ConnectionInfo(name, 14_400, 0, ())

    def takes_at_once(self, *_: str) -> bool:
        return False


class Nothing:
    """Of what a decision asks, all is as it should be."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        results: dict[str, Any] = {
            "beside": set(),
            "of_others": set(),
            "made_from": set(),
            "attempts": 0,
            "clashes": False,
            "gateways": (),
        }
        return lambda *_: results.get(name)

    def __len__(self) -> int:
        return 0


def decided(
    policy: Policy, *, group: int = 31, asks: bool = True, ke: tuple[int, bytes] | None = None, **changes: Any
) -> Rebuilt | Refusal:
    stub = msgspec.structs.replace(stub_of(), suite=msgspec.structs.replace(SUITE, group=group))
    return decide(policy, stub, request_of(stub, asks=asks, ke=ke, **changes))


def request_of(stub: Stub, *, asks: bool = True, ke: tuple[int, bytes] | None = None) -> bytes:
    group, value = ke or (stub.suite.group, os.urandom(32))
    return build_request(
        spi_i=b"I" * 8,
        suite=msgspec.structs.replace(stub.suite, group=group),
        ke_value=value,
        nonce=b"i" * 32,
        sync_index=(stub.index.gateway, stub.index.spi),
        prf=stub.suite.prf,
        sk_d_old=stub.sk_d,
        forward_secrecy=asks,
    )


def decide(policy: Policy, stub: Stub, request: bytes) -> Rebuilt | Refusal:
    charon, sync = cast(Charon, FakeCharon()), SyncConfig(forward_secrecy=policy)
    decision = Decision(
        charon,
        KnownSessions(Endings(), cast(LivingSas, Nothing()), Revocations(cast(StubBank, None), keyring())),
        cast(Unconfirmed, Nothing()),
        Admission(SyncConfig(), Cookies(), lambda source: 0),
        cast(AddressHolders, Nothing()),
        sync,
        Rebuilder(charon, cast(ClientStubs, Nothing()), sync),
    )
    packet = cast(Packet, Datagram("198.51.100.7", 4500, "192.0.2.2", 4500, request, True))
    return decision.of(packet, read(request), b"digest", stub)


def rebuilt(made: Rebuilt | Refusal) -> Rebuilt:
    assert isinstance(made, Rebuilt), made
    return made


def test_where_it_is_offered_a_client_that_asks_gets_keys_that_its_old_sk_d_does_not_give() -> None:
    exchange = KeyExchange(31)
    stub = msgspec.structs.replace(stub_of(), suite=SUITE)
    request = request_of(stub, ke=(31, exchange.public))
    made = rebuilt(decide("offered", stub, request))
    found = answered(made.response, request)
    assert verify_response(found, request, SUITE.prf, stub.sk_d)
    assert found.key_exchange is not None
    g_ir = exchange.shared(found.key_exchange[1])
    assert made.install.g_ir == g_ir

    def sk_d(secret: bytes) -> bytes:
        seed = skeyseed_resume(SUITE.prf, stub.sk_d, b"i" * 32, found.nonce, secret)
        return derive_sk_d(SUITE, seed, b"i" * 32, found.nonce, b"I" * 8, found.spi_r)

    assert made.sa.sk_d == sk_d(g_ir) != sk_d(b"")


@pytest.mark.parametrize(
    ("policy", "asks", "group", "outcome"),
    [
        ("offered", True, 31, True),
        ("offered", False, 31, False),
        ("offered", True, 14, False),
        ("off", True, 31, False),
        ("off", False, 31, False),
        ("required", True, 31, True),
        ("required", False, 31, Refusal.FORWARD_SECRECY_MISSING),
        ("required", True, 14, Refusal.FORWARD_SECRECY_MISSING),
    ],
)
def test_what_a_gateway_makes_of_it(policy: Policy, asks: bool, group: int, outcome: bool | Refusal) -> None:
    made = decided(policy, asks=asks, group=group)
    if isinstance(outcome, Refusal):
        assert made is outcome
    else:
        assert (rebuilt(made).install.g_ir != b"") is outcome
        assert (PayloadType.KE in [one.type for one in parse(rebuilt(made).response).payloads]) is outcome


@pytest.mark.parametrize(
    ("ke", "reason"),
    [
        ((31, b"short"), Refusal.PUBLIC_VALUE_WRONG),
        ((31, bytes(32)), Refusal.PUBLIC_VALUE_WRONG),
        ((19, b"k" * 64), Refusal.PROPOSAL_DIFFERS),
    ],
)
def test_a_public_value_of_another_group_or_of_none_is_refused(ke: tuple[int, bytes], reason: Refusal) -> None:
    assert decided("offered", ke=ke) is reason


# the client


class Wire:
    """Takes a client's request, and answers it as a gateway would that has the stub."""

    def __init__(self, config: ResumeConfig, reply: Callable[[bytes], bytes], group: int = 31) -> None:
        self.request = b""
        self._reply = reply
        self._transport = IkeTransport(self)
        self._asker = SyncRequester(self._transport, config, lambda _: None, lambda *_: NOTHING)
        self._sa = IkeSa(
            IkeId.of(b"initiate", b"responds", True),
            msgspec.structs.replace(SUITE, group=group),
            SK_D,
            up=True,
            local=Endpoint("127.0.0.1", 4500),
            remote=Endpoint(GATEWAY, 4500),
        )

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        self.request = payload
        self._transport.datagram(Datagram(dst, dport, src, sport, self._reply(payload), marker))

    async def asked(self) -> Answer:
        async with asyncio.timeout(5):
            return await self._asker.ask(self._sa, Target("127.0.0.9", "home"))


def config(wanted: bool | Literal["preferred"]) -> ResumeConfig:
    return ResumeConfig(forward_secrecy=wanted, answer_timeout=1.0)


def with_ker(request: bytes) -> bytes:
    return answer(request, key_exchange=(31, GATEWAYS_HALF.public))


GATEWAYS_HALF = KeyExchange(31)


@pytest.mark.parametrize("wanted", [True, "preferred"])
async def test_a_client_that_asks_uses_what_it_gets(wanted: bool | Literal["preferred"]) -> None:
    wire = Wire(config(wanted), with_ker)
    got = await wire.asked()
    assert read(wire.request).forward_secrecy
    assert got.g_ir == GATEWAYS_HALF.shared(read(wire.request).public_value)


async def test_a_client_that_does_not_want_it_does_not_ask() -> None:
    wire = Wire(config(False), lambda request: answer(request, key_exchange=None))
    assert (await wire.asked()).g_ir == b""
    assert not read(wire.request).forward_secrecy


async def test_a_client_that_asked_believes_no_answer_without_it() -> None:
    wire = Wire(config(True), lambda request: answer(request, key_exchange=None))
    with pytest.raises(RefusedError) as refused:
        await wire.asked()
    assert refused.value.why == "forward-secrecy-missing"


async def test_unless_it_is_configured_so() -> None:
    wire = Wire(config("preferred"), lambda request: answer(request, key_exchange=None))
    assert (await wire.asked()).g_ir == b""


@pytest.mark.parametrize("ker", [(31, bytes(32)), (31, b"K" * 31), (19, b"K" * 64)])
async def test_a_value_in_ker_that_is_none_of_the_group_is_refused(ker: tuple[int, bytes]) -> None:
    with pytest.raises(RefusedError):
        await Wire(config("preferred"), lambda request: answer(request, key_exchange=ker)).asked()


@pytest.mark.parametrize("group", OTHERS)
async def test_a_client_with_a_group_that_is_no_curve_never_asks(group: int) -> None:
    """MODP groups, ML-KEM and brainpoolP224r1: it falls back, or goes on without where it need not have it."""
    wire = Wire(config(True), lambda request: answer(request, key_exchange=None), group=group)
    with pytest.raises(RefusedError) as refused:
        await wire.asked()
    assert refused.value.why == "forward-secrecy-impossible"
    assert wire.request == b""
    wire = Wire(config("preferred"), lambda request: answer(request, key_exchange=None), group=group)
    assert (await wire.asked()).g_ir == b""
    assert not read(wire.request).forward_secrecy
