"""Stubs that clients hold, sealed and opened, and found (bridge.gateway.client_stubs, bridge.gateway.stub_lookup); the
bank is a real Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from bank_support import GATEWAY, RedisServer, ending, keyring, stub_of
from bridge.bank.prefetch import Prefetch
from bridge.bank.redis_bank import RedisBank
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.charon.sa_tracker import SaTracker
from bridge.gateway.client_stubs import ANSWER_SECONDS, ANSWERS_A_SECOND, HELD_SECONDS, ClientStubs, Policy
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.living import LivingSas
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.recent import Recent
from bridge.gateway.revocation import Revocations
from bridge.gateway.strays import Strays
from bridge.gateway.stub_lookup import Missing, StubLookup
from bridge.ike.resumption_request import build_request, parse_request
from bridge.ike.stub_exchange import StubSa, build_get, parse_stub_message, verify
from bridge.ike.sync_messages import SyncRequest
from bridge.stub.codec import encode
from bridge.stub.derivation import Derivation
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.stub import Index, Stub
from bridge.stub.types import TrafficSelector

pytestmark = pytest.mark.redis

RING = keyring()


class Nobody:
    """Sends nothing, and hears of nothing."""

    def send(self, *datagram: Any) -> None:
        raise AssertionError("nothing is sent here")

    def changed(self, sa: IkeSa) -> None: ...
    def gone(self, sa: IkeSa) -> None: ...
    def verified(self, ike_id: Any) -> None: ...
    def down(self, sa: Any) -> None: ...


def handout(policy: Policy = "fallback", ring: Keyring = RING) -> ClientStubs:
    tracker = SaTracker(Nobody(), wall=time.time, clock=time.monotonic)
    return ClientStubs(policy, ring, tracker, Nobody(), GATEWAY, GatewayMetrics())


def held(stub: Stub) -> bytes:
    """The stub as its client has it."""
    sealed = handout().seal(sa_of(stub))
    assert sealed is not None
    return sealed


def request(stub: Stub, *, sk_d: bytes | None = None, **changes: Any) -> SyncRequest:
    """A request that names the stub and carries it."""
    values: dict[str, Any] = {
        "spi_i": b"I" * 8,
        "suite": stub.suite,
        "ke_value": b"k" * 32,
        "nonce": b"n" * 32,
        "sync_index": (stub.index.gateway, stub.index.spi),
        "prf": stub.suite.prf,
        "sk_d_old": sk_d or stub.sk_d,
        "sealed_stub": held(stub),
    }
    found = parse_request(build_request(**(values | changes)))
    assert found is not None
    return found


# what is not looked at


class Held:
    """A held packet, and what was decided on it."""

    src, sport, dst, dport, marker = "192.0.2.9", 4500, GATEWAY, 4500, True

    def __init__(self, ike: bytes) -> None:
        self.ike = ike
        self.decided: list[str] = []

    @property
    def held(self) -> bool:
        return not self.decided

    def accept(self) -> None:
        self.decided.append("accept")

    def drop(self) -> None:
        self.decided.append("drop")


def test_a_message_about_an_unknown_sa_is_dropped_unparsed() -> None:
    made = handout()
    packet = Held(b"nobody's" * 2 + b"\xff" * 40)
    assert not made.concerns(packet)
    Strays(made._metrics).take(packet)
    assert packet.decided == ["drop"]
    assert made._metrics.values()["malformed_requests_total"] == 0


# GET Stub


class Wire:
    """What a gateway sends, and the time."""

    now = 100.0

    def __init__(self, policy: Policy = "fallback") -> None:
        self.stub = stub_of()
        self.answers: list[tuple[Any, ...]] = []
        tracker = SaTracker(Nobody(), wall=time.time, clock=time.monotonic)
        self.sa = sa_of(self.stub)
        tracker.adopt(self.sa)
        self._handout = ClientStubs(policy, RING, tracker, self, GATEWAY, GatewayMetrics(), clock=lambda: self.now)

    def send(self, *datagram: Any) -> None:
        self.answers.append(datagram)

    def forget(self) -> None:
        """As if the next message were of another SA."""
        self._handout._answered = Recent(ANSWER_SECONDS, clock=lambda: self.now)

    def get(self, *, src: str | None = None, sk_d: bytes | None = None, nonce: bytes = b"n" * 32) -> bytes:
        """A GET Stub arrives, by default from the address that the SA's peer has."""
        stub, index = self.stub, (self.stub.index.gateway, self.stub.index.spi)
        client = StubSa(stub.spi_i, stub.spi_r, True, index, stub.suite.prf, sk_d or stub.sk_d)
        packet = Held(build_get(client, nonce))
        packet.src = src or stub.remote.address
        assert self._handout.received(packet) is None
        assert packet.decided == ["drop"]
        return packet.ike


def test_get_stub_is_answered_to_where_it_came_from_with_a_stub_that_opens() -> None:
    wire = Wire()
    asked = wire.get()
    [(src, sport, dst, dport, octets, marker)] = wire.answers
    assert (src, sport, dst, dport, marker) == (GATEWAY, 4500, wire.stub.remote.address, 4500, True)
    answer = parse_stub_message(octets)
    assert verify(answer, wire.stub.suite.prf, wire.stub.sk_d, before=parse_stub_message(asked))
    assert answer.sealed_stub is not None
    assert handout().open(answer.sealed_stub, wire.stub.index) is not None
    assert answer.lifetime


def test_get_stub_without_a_proof_or_from_elsewhere_is_not_answered() -> None:
    wire = Wire()
    wire.get(sk_d=b"?" * 32)
    wire.get(src="203.0.113.1")
    assert wire.answers == []
    # nor has it cost the client its turn
    wire.get()
    assert len(wire.answers) == 1


def test_get_stub_is_answered_once_in_a_while() -> None:
    wire = Wire()
    for passed in (0.0, 0.0, ANSWER_SECONDS / 2, ANSWER_SECONDS * 0.6):
        wire.now += passed
        wire.get()
    assert len(wire.answers) == 2


def test_past_the_rate_of_all_clients_together_get_stub_is_not_answered() -> None:
    wire = Wire()
    for _ in range(ANSWERS_A_SECOND + 10):
        wire.forget()
        wire.get()
    assert len(wire.answers) == ANSWERS_A_SECOND


def test_where_clients_get_none_get_stub_is_not_answered() -> None:
    wire = Wire("off")
    wire.get()
    assert wire.answers == []


# sealing


def test_a_clients_stub_opens_again_without_the_shared_secret() -> None:
    stub = stub_of()
    assert handout().open(held(stub), stub.index) == msgspec.structs.replace(stub, shared_secret=None)


def test_it_opens_for_its_own_index_alone() -> None:
    stub = stub_of()
    assert handout().open(held(stub), Index(GATEWAY, b"\0" * 8)) is None


def test_a_stub_out_of_the_bank_is_none_that_a_client_may_present_and_the_other_way_round() -> None:
    stub = stub_of()
    banked = RING.seal(encode(stub), stub.index.key.encode())
    assert handout().open(banked, stub.index) is None
    with pytest.raises(SealError):
        RING.open(held(stub), stub.index.key.encode())


def test_one_that_is_altered_or_sealed_with_another_key_does_not_open() -> None:
    stub = stub_of()
    sealed = held(stub)
    assert handout().open(sealed[:-1] + bytes((sealed[-1] ^ 1,)), stub.index) is None
    assert handout(ring=keyring()).open(sealed, stub.index) is None


def test_one_that_expired_does_not_open() -> None:
    stub = stub_of(lifetime=-1)
    assert handout().open(held(stub), stub.index) is None


def test_it_expires_with_the_stub_in_the_bank_and_within_a_day() -> None:
    short, long = sa_of(stub_of(lifetime=600)), sa_of(stub_of(lifetime=10 * HELD_SECONDS))
    assert handout().expiry(short) == short.stub_expires
    assert abs(handout().expiry(long) - (time.time() + HELD_SECONDS)) < 60


def test_one_that_a_request_could_not_carry_is_not_given() -> None:
    stub = stub_of()
    selectors = tuple(TrafficSelector(7, 0, 0, 65535, False, f"10.{n}.0.0", f"10.{n}.3.255") for n in range(250))
    [child] = stub.children
    large = msgspec.structs.replace(stub, children=(msgspec.structs.replace(child, local_ts=selectors),))
    assert handout().seal(sa_of(large)) is None


def test_where_clients_get_none_theirs_count_for_nothing() -> None:
    stub = stub_of()
    assert handout("off").seal(sa_of(stub)) is None
    assert handout("off").open(held(stub), stub.index) is None


# finding


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as running:
        yield running


def lookup(
    server: RedisServer,
    policy: Policy,
    metrics: GatewayMetrics | None = None,
    *,
    reachable: bool = True,
    endings: Endings | None = None,
) -> StubLookup:
    bank = RedisBank(server.url, RING)
    return StubLookup(
        Prefetch(bank),
        bank,
        handout(policy),
        KnownSessions(Endings() if endings is None else endings, cast(LivingSas, None), Revocations(bank, RING)),
        metrics or GatewayMetrics(),
        reachable=lambda: reachable,
        timeout=2.0,
    )


async def found(look: StubLookup, *requests: SyncRequest) -> list[int | str]:
    """The revision of each stub found, or why there is none."""
    return [str(one) if isinstance(one, Missing) else one.revision for one in await look.find(requests)]


async def store(server: RedisServer, *stubs: Stub) -> None:
    assert all(await RedisBank(server.url, RING).store(stubs))


@pytest.mark.parametrize(("policy", "revision"), [("off", 2), ("fallback", 2), ("prefer", 1)])
async def test_what_counts_where_bank_and_client_both_have_one(
    server: RedisServer, policy: Policy, revision: int
) -> None:
    stub = stub_of()
    await store(server, msgspec.structs.replace(stub, revision=2))
    assert await found(lookup(server, policy), request(stub)) == [revision]


@pytest.mark.parametrize(("policy", "outcome"), [("off", "no-stub"), ("fallback", 1), ("prefer", 1)])
async def test_what_counts_where_the_bank_has_none(server: RedisServer, policy: Policy, outcome: int | str) -> None:
    metrics = GatewayMetrics()
    assert await found(lookup(server, policy, metrics), request(stub_of())) == [outcome]
    assert metrics.values()["stubs_presented_total"] == (1 if outcome == 1 else 0)


@pytest.mark.parametrize(("policy", "outcome"), [("off", "bank-unavailable"), ("fallback", 1), ("prefer", 1)])
@pytest.mark.parametrize("known", [True, False])
async def test_what_counts_while_the_bank_is_away(
    server: RedisServer, policy: Policy, outcome: int | str, known: bool
) -> None:
    server.kill()
    assert await found(lookup(server, policy, reachable=not known), request(stub_of())) == [outcome]


@pytest.mark.parametrize("policy", ["fallback", "prefer"])
async def test_a_session_that_ended_is_not_resumed_with_the_stub_that_its_client_kept(
    server: RedisServer, policy: Policy
) -> None:
    stub = stub_of()
    await store(server, stub)
    assert await RedisBank(server.url, RING).delete([ending(stub)]) == [True]
    assert await found(lookup(server, policy), request(stub)) == ["no-stub"]


@pytest.mark.parametrize("policy", ["fallback", "prefer"])
async def test_while_the_bank_is_away_a_gateway_remembers_the_sessions_that_ended_or_went_on_here(
    server: RedisServer, policy: Policy
) -> None:
    stub = stub_of()
    endings = Endings()
    look = lookup(server, policy, reachable=False, endings=endings)
    endings.add(stub.index, stub.expires)
    assert await found(look, request(stub)) == ["no-stub"]


@pytest.mark.parametrize("policy", ["fallback", "prefer"])
async def test_a_clients_stub_counts_for_nothing_without_a_proof_under_it(server: RedisServer, policy: Policy) -> None:
    stub = stub_of()
    assert await found(lookup(server, policy), request(stub, sk_d=b"?" * 32)) == ["no-stub"]


async def test_anothers_stub_in_the_same_batch_spoils_nothing(server: RedisServer) -> None:
    stub, other = stub_of(), stub_of()
    mixed = [request(stub), request(stub, sealed_stub=held(other)), request(other, sealed_stub=None)]
    assert await found(lookup(server, "prefer"), *mixed) == [1, "no-stub", "no-stub"]


def test_a_client_gets_nothing_that_takes_its_session_over_as_it_is() -> None:
    """Nonces and the Diffie-Hellman secret are for gateways that share an address, and of no use to the client."""
    stub = msgspec.structs.replace(stub_of(), derivation=Derivation(b"i" * 32, b"r" * 32, b"s" * 32, b"", b"", 0))
    sealed = handout().seal(sa_of(stub))
    assert sealed is not None
    opened = handout().open(sealed, stub.index)
    assert opened is not None
    assert (opened.derivation, opened.shared_secret) == (None, None)
    assert opened.sk_d == stub.sk_d
