"""The gateway's packets (bridge.gateway.responder), without root and without a lab: every request is accepted or
dropped, once, whatever happens in whatever order, and what is counted for a source is what is there of it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bank_support import keyring, stub_of
from bridge.bank.prefetch import Prefetch
from bridge.bank.write_queue import WriteQueue
from bridge.config import SyncConfig
from bridge.gateway.addresses import AddressHolders
from bridge.gateway.admission import Admission, source_of
from bridge.gateway.client_stubs import ClientStubs
from bridge.gateway.decision import Decision
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.living import LivingSas
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.rebuild import Rebuilder
from bridge.gateway.rebuilt_state import State
from bridge.gateway.responder import Responder
from bridge.gateway.revocation import Revocations
from bridge.gateway.stub_lookup import StubLookup
from bridge.gateway.unconfirmed import Unconfirmed
from bridge.ike.cookie import Cookies
from bridge.ike.resumption_answer import parse_response, verify_refusal, verify_response
from bridge.ike.resumption_request import build_request
from bridge.ike.sync_messages import CookieChallenge, SyncRefusal, SyncResponse
from bridge.stub.stub import Index, Stub
from role_support import FAILURES, FakeBank, FakeTime, Request, Wire, as_packets, fake_charon

HERE = "192.0.2.2"
SOURCES = ("198.51.100.7", "198.51.100.8", "2001:db8::7")
STUBS = 4
NUMBERS = st.integers(0, STUBS - 1)
LONG = 30.0
"""seconds of the clock in which all that is under way is over"""


class Gateway:
    """A Responder with a charon, a bank and a wire that are made up."""

    def __init__(self, loop: FakeTime, able: Callable[[], bool] = lambda: False, tag: bytes = b"", **sync: Any) -> None:
        self.loop = loop
        self.charon, self.installer, self.channel = fake_charon("home")
        self.bank, self.wire, self.metrics = FakeBank(), Wire(), GatewayMetrics()
        self.resumed: list[Stub] = []
        self.requests: list[Request] = []
        ring, bank, endings = keyring(), self.bank.as_bank(), Endings()
        stubs = ClientStubs("off", ring, self.charon.tracker, self.wire, HERE, self.metrics, clock=loop.time)
        self.writer = WriteQueue(bank)
        known = KnownSessions(endings, LivingSas(self.charon.tracker), Revocations(bank, ring))
        lookup = StubLookup(
            Prefetch(bank),
            bank,
            stubs,
            known,
            self.metrics,
            reachable=lambda: not self.bank.away,
            timeout=0.1,
            clock=loop.time,
        )
        config = SyncConfig(**sync)
        unconfirmed = Unconfirmed(
            self.charon,
            endings,
            lookup.ended,
            stubs,
            self.writer,
            self.metrics,
            confirm_timeout=config.confirm_timeout,
            clock=loop.time,
        )
        unconfirmed.on_resumed = lambda sa, stub: self.resumed.append(stub)
        admission = Admission(config, Cookies(), unconfirmed.of_source)
        holders = AddressHolders(self.charon, bank, HERE)
        self.responder = Responder(
            self.charon,
            lookup,
            admission,
            Decision(
                self.charon, known, unconfirmed, admission, holders, config, Rebuilder(self.charon, stubs, config, tag)
            ),
            self.wire,
            config,
            self.metrics,
            clock=loop.time,
        )
        self.responder.able = able

    async def start(self) -> None:
        self.responder.start()

    async def close(self) -> None:
        await self.responder.close()
        await self.writer.close()

    def receive(self, *requests: Request) -> None:
        async def arrive() -> None:
            self.responder.packets(as_packets(requests))

        self.requests += requests
        self.loop.run(arrive())

    def answers(self, request: bytes) -> list[Any]:
        """What was sent in answer to it."""
        return [parse_response(octets, request) for _, octets in self.wire.sent if octets[:8] == request[:8]]


@pytest.fixture
def loop() -> Any:
    loop = FakeTime()
    yield loop
    loop.end()


def started(loop: FakeTime, **sync: Any) -> tuple[Gateway, Stub]:
    """A gateway with one stub in its bank."""
    gateway = Gateway(loop, **sync)
    stub = stub_of()
    gateway.bank.stubs[stub.index] = stub
    loop.run(gateway.start())
    return gateway, stub


def resume(stub: Stub, **changes: Any) -> bytes:
    """A request to resume, as its client makes it."""
    values: dict[str, Any] = {
        "spi_i": os.urandom(8),
        "suite": stub.suite,
        "ke_value": os.urandom(32),
        "nonce": os.urandom(32),
        "sync_index": (stub.index.gateway, stub.index.spi),
        "prf": stub.suite.prf,
        "sk_d_old": stub.sk_d,
    }
    return build_request(**(values | changes))


def ordinary(stub: Stub) -> bytes:
    """An IKE_SA_INIT request without IKE_SA_SYNC: the first octet of the chain names SA, and SYN is left out."""
    octets = resume(stub, sk_d_old=None)
    first = bytearray(octets)
    at = 28
    kinds = []
    kind = first[16]
    while kind:
        kinds.append((kind, at))
        kind, at = first[at], at + int.from_bytes(first[at + 2 : at + 4])
    (last, end) = kinds[-1]
    assert last == 200
    first[kinds[-2][1]] = 0
    short = first[:end]
    short[24:28] = len(short).to_bytes(4)
    return bytes(short)


def test_a_proven_request_is_answered_after_its_sa_is_installed_and_confirmed_by_the_first_message(
    loop: FakeTime,
) -> None:
    gateway, stub = started(loop)
    octets = resume(stub)
    gateway.receive(request := Request(SOURCES[0], octets))
    loop.pass_time(1.0)
    assert request.fate == ["dropped"]
    [answer] = gateway.answers(octets)
    assert isinstance(answer, SyncResponse)
    assert verify_response(answer, octets, stub.suite.prf, stub.sk_d)
    [spis] = gateway.installer.installed
    loop.run(verified(gateway, spis))
    loop.pass_time(1.0)
    assert gateway.resumed == [stub]
    assert len(gateway.responder.unconfirmed) == 0
    loop.run(gateway.close())
    assert spis in gateway.installer.installed
    assert stub.index not in gateway.bank.stubs


async def verified(gateway: Gateway, spis: bytes) -> None:
    gateway.responder.unconfirmed.verified(gateway.installer.installed[spis].id)


def test_a_session_that_its_client_ends_before_the_bank_has_answered_leaves_nothing_to_resume(loop: FakeTime) -> None:
    gateway, stub = started(loop)
    unconfirmed = gateway.responder.unconfirmed
    for source in SOURCES[:2]:
        gateway.receive(Request(source, resume(stub)))
    loop.pass_time(1.0)
    first, second = gateway.installer.installed
    gateway.bank.seconds = 0.05
    loop.run(verified(gateway, first))

    async def ends() -> None:
        unconfirmed.gone(gateway.charon.tracker.sas[first])

    # the client logs out, or rekeys and deletes
    loop.pass_time(0.01)
    loop.run(ends())
    loop.pass_time(1.0)
    assert gateway.bank.went_on == {stub.index: Index(HERE, first[8:])}
    assert gateway.resumed == []
    assert stub.index not in gateway.bank.stubs
    assert stub.index in gateway.bank.over
    # the other attempt of the same session is over too
    assert second not in gateway.installer.installed
    gateway.receive(request := Request(SOURCES[0], resume(stub)))
    loop.pass_time(1.0)
    assert request.fate == ["accepted"]
    loop.run(gateway.close())


def test_an_sa_that_no_message_confirms_is_removed_after_confirm_timeout(loop: FakeTime) -> None:
    gateway, stub = started(loop, confirm_timeout=10)
    gateway.receive(Request(SOURCES[0], resume(stub)))
    loop.pass_time(9.0)
    assert len(gateway.installer.installed) == 1
    loop.pass_time(3.0)
    assert gateway.installer.installed == {}
    assert stub.index in gateway.bank.stubs
    loop.run(gateway.close())


def test_while_charon_is_away_a_client_that_proved_itself_gets_the_reason(loop: FakeTime) -> None:
    gateway, stub = started(loop)
    gateway.channel.up = False
    for sk_d, proven in ((stub.sk_d, True), (bytes(32), False)):
        octets = resume(stub, sk_d_old=sk_d, refusable=True)
        gateway.receive(request := Request(SOURCES[0], octets))
        loop.pass_time(1.0)
        assert request.fate == ["dropped"]
        [answer] = gateway.answers(octets)
        assert isinstance(answer, SyncRefusal) is proven
        if proven:
            assert answer.reason == "charon-unavailable"
            assert verify_refusal(answer, octets, stub.suite.prf, stub.sk_d)
    loop.run(gateway.close())


@pytest.mark.parametrize("failure", FAILURES)
def test_a_request_whose_sa_is_not_installed_is_accepted(loop: FakeTime, failure: str) -> None:
    gateway, stub = started(loop)
    gateway.installer.failure = FAILURES[failure]()
    gateway.receive(request := Request(SOURCES[0], octets := resume(stub)))
    loop.pass_time(1.0)
    assert request.fate == ["accepted"]
    assert gateway.answers(octets) == []
    assert len(gateway.responder.unconfirmed) == 0
    loop.run(gateway.close())


def test_a_request_is_accepted_where_the_look_up_fails_in_a_way_that_was_not_foreseen(loop: FakeTime) -> None:
    gateway, stub = started(loop)
    gateway.bank.failure = RuntimeError("a mistake")
    gateway.receive(request := Request(SOURCES[0], resume(stub)))
    loop.pass_time(1.0)
    assert request.fate == ["accepted"]
    gateway.receive(again := Request(SOURCES[0], resume(stub)))
    loop.pass_time(1.0)
    assert again.fate == ["dropped"]
    loop.run(gateway.close())


def test_a_request_is_accepted_where_judging_it_fails(loop: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, stub = started(loop)

    def fail(*_: object) -> None:
        raise RuntimeError("a mistake")

    with monkeypatch.context() as patch:
        patch.setattr(gateway.charon, "connection", fail)
        gateway.receive(request := Request(SOURCES[0], resume(stub)))
        loop.pass_time(1.0)
    assert request.fate == ["accepted"]
    loop.run(gateway.close())


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.003, 0.008, 0.02, 1.0])
def test_the_same_octets_have_one_answer_whenever_they_come_again(loop: FakeTime, seconds: float) -> None:
    gateway, stub = started(loop)
    octets = resume(stub)
    gateway.receive(first := Request(SOURCES[0], octets))
    loop.pass_time(seconds)
    gateway.receive(second := Request(SOURCES[1], octets))
    loop.pass_time(1.0)
    assert first.fate == second.fate == ["dropped"]
    assert len(gateway.installer.installed) == 1
    assert len({octets for _, octets in gateway.wire.sent}) == 1
    loop.run(gateway.close())


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.003, 0.004, 0.008, 0.02])
def test_a_sidecar_that_stops_leaves_no_request_undecided_and_no_sa_behind(loop: FakeTime, seconds: float) -> None:
    gateway, stub = started(loop)
    gateway.receive(request := Request(SOURCES[0], octets := resume(stub)))
    loop.pass_time(seconds)
    loop.run(gateway.close())
    let_go([request])
    assert len(request.fate) == 1
    assert (request.fate == ["dropped"]) is bool(gateway.answers(octets))
    assert gateway.installer.installed == {}
    assert len(gateway.responder.unconfirmed) == 0


def let_go(requests: Sequence[Request]) -> None:
    """What the interceptor does with what is left, after the responder has ended."""
    for request in requests:
        if request.held:
            request.accept()


class Packets(RuleBasedStateMachine):
    """Requests of a few clients, in any order with all that can go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = FakeTime()
        self.stops = False
        """in the middle of everything; else once all is settled"""

    @initialize(
        cookies=st.sampled_from([0, 3, 100]),
        each=st.sampled_from([2, 64]),
        every=st.sampled_from([3, 4096]),
        refused=st.sampled_from(["handshake", "drop"]),
        stops=st.booleans(),
    )
    def begin(self, cookies: int, each: int, every: int, refused: str, stops: bool) -> None:
        self.stops = stops
        self.gateway = Gateway(
            self.loop,
            cookie_threshold=cookies,
            max_unconfirmed_per_source=each,
            max_unconfirmed=every,
            source_rate=8,
            refused=refused,
        )
        self.stubs = [stub_of() for _ in range(STUBS)]
        self.gateway.bank.stubs = {stub.index: stub for stub in self.stubs}
        self.sent: list[bytes] = []
        self.loop.run(self.gateway.start())

    def receive(self, source: str, octets: bytes) -> None:
        self.gateway.receive(Request(source, octets))

    # clients

    @rule(source=st.sampled_from(SOURCES), number=NUMBERS, refusable=st.booleans())
    def a_client_resumes(self, source: str, number: int, refusable: bool) -> None:
        octets = resume(self.stubs[number], refusable=refusable)
        self.sent.append(octets)
        self.receive(source, octets)

    @precondition(lambda self: self.sent)
    @rule(source=st.sampled_from(SOURCES), which=st.integers(0, 99))
    def the_same_octets_come_again(self, source: str, which: int) -> None:
        self.receive(source, self.sent[which % len(self.sent)])

    @precondition(lambda self: self.sent)
    @rule(source=st.sampled_from(SOURCES), which=st.integers(0, 99), number=NUMBERS)
    def a_client_brings_the_cookie_that_it_was_given(self, source: str, which: int, number: int) -> None:
        asked = self.sent[which % len(self.sent)]
        cookies = [answer.cookie for answer in self.gateway.answers(asked) if isinstance(answer, CookieChallenge)]
        if cookies:
            octets = resume(self.stubs[number], spi_i=asked[:8], cookie=cookies[-1])
            self.sent.append(octets)
            self.receive(source, octets)

    @rule(source=st.sampled_from(SOURCES), number=NUMBERS, what=st.sampled_from("proof nonce stub"))
    def a_request_is_refused(self, source: str, number: int, what: str) -> None:
        stub = self.stubs[number]
        if what == "stub":
            stub = msgspec.structs.replace(stub, index=stub_of().index)
        wrong = {"sk_d_old": os.urandom(32)} if what == "proof" else {}
        self.receive(source, resume(stub, nonce=os.urandom(8 if what == "nonce" else 32), **wrong))

    @rule(source=st.sampled_from(SOURCES), number=NUMBERS)
    def an_ordinary_handshake_begins(self, source: str, number: int) -> None:
        self.receive(source, ordinary(self.stubs[number]))

    @rule(
        source=st.sampled_from(SOURCES),
        number=NUMBERS,
        at=st.integers(16, 90),
        octet=st.integers(0, 255),
    )
    def a_malformed_request_comes(self, source: str, number: int, at: int, octet: int) -> None:
        octets = bytearray(resume(self.stubs[number]))
        octets[at] = octet
        self.receive(source, bytes(octets))

    @precondition(lambda self: self.gateway.installer.installed)
    @rule(which=st.integers(0, 99))
    def a_client_confirms(self, which: int) -> None:
        # one without an answer does not know SPIr
        waiting = self.gateway.responder.unconfirmed._by_spis
        installed = [
            install
            for spis, install in self.gateway.installer.installed.items()
            if spis not in waiting or waiting[spis].state is not State.INSTALLING
        ]
        if not installed:
            return
        self.loop.run(self._in_loop(self.gateway.responder.unconfirmed.verified, installed[which % len(installed)].id))

    # what happens otherwise

    @precondition(lambda self: self.gateway.installer.installed)
    @rule(which=st.integers(0, 99))
    def charon_ends_an_sa(self, which: int) -> None:
        installed = self.gateway.installer.installed
        spis = list(installed)[which % len(installed)]
        sa = self.gateway.charon.tracker.forget(installed.pop(spis).id)
        if sa is not None:
            self.loop.run(self._in_loop(self.gateway.responder.unconfirmed.gone, sa))

    @rule(number=NUMBERS)
    def a_session_ends_elsewhere(self, number: int) -> None:
        self.gateway.bank.over.add(self.stubs[number].index)
        self.gateway.bank.stubs.pop(self.stubs[number].index, None)

    @rule(away=st.booleans())
    def the_bank_goes_or_comes(self, away: bool) -> None:
        self.gateway.bank.away = away

    @rule(seconds=st.sampled_from([0.0, 0.002, 0.2]))
    def the_bank_is_slow(self, seconds: float) -> None:
        self.gateway.bank.seconds = seconds

    @rule()
    def the_bank_fails_in_a_way_that_was_not_foreseen(self) -> None:
        self.gateway.bank.failure = RuntimeError("a mistake")

    @rule(up=st.booleans())
    def charon_goes_or_comes(self, up: bool) -> None:
        self.gateway.channel.up = up

    @rule(failure=st.sampled_from(sorted(FAILURES)))
    def the_next_installation_fails(self, failure: str) -> None:
        self.gateway.installer.failure = FAILURES[failure]()

    @rule(down=st.booleans())
    def the_way_back_goes_or_comes(self, down: bool) -> None:
        self.gateway.wire.down = down

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.003, 0.01, 0.05, 1.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.loop.pass_time(seconds)

    @staticmethod
    async def _in_loop(function: Any, *arguments: Any) -> None:
        function(*arguments)

    # what holds

    @invariant()
    def what_is_counted_for_a_source_is_what_is_there_of_it(self) -> None:
        if not hasattr(self, "gateway"):
            return
        unconfirmed = self.gateway.responder.unconfirmed
        rows = list(unconfirmed._by_spis.values())
        expected = Counter(source_of(made.install.remote.address) for made in rows)
        assert {source: unconfirmed.of_source(source) for source in expected} == expected
        assert sum(map(unconfirmed.of_source, {source_of(source) for source in SOURCES})) == len(unconfirmed)
        assert all(made.state not in (State.CONFIRMED, State.REMOVED) for made in rows)

    @invariant()
    def no_request_is_answered_by_two(self) -> None:
        """A request that charon got has no answer that resumes."""
        if not hasattr(self, "gateway"):
            return
        for request in self.gateway.requests:
            assert len(request.fate) <= 1

    def teardown(self) -> None:
        if hasattr(self, "gateway"):
            requests, unconfirmed = self.gateway.requests, self.gateway.responder.unconfirmed
            if not self.stops:
                self.loop.pass_time(LONG)
                assert [request for request in requests if request.held] == []
            self.gateway.channel.up = True
            self.loop.run(self.gateway.close())
            let_go(requests)
            assert [request.fate for request in requests if len(request.fate) != 1] == []
            self.check_answers()
            assert len(unconfirmed) == 0
            assert not any(map(unconfirmed.of_source, {source_of(source) for source in SOURCES}))
            assert not unconfirmed._by_source
            assert not unconfirmed._by_index
            assert self.loop.failures == []
        self.loop.end()

    def check_answers(self) -> None:
        """Where the sidecar resumed, at least one request of that attempt, with a cookie or without, was kept from
        charon."""
        for octets in set(self.sent):
            fates = [request.fate[0] for request in self.gateway.requests if request.ike[:8] == octets[:8]]
            answers = [one for one in self.gateway.answers(octets) if isinstance(one, SyncResponse)]
            if answers:
                assert "dropped" in fates


TestPackets = Packets.TestCase
# to shrink sequences of random octets would take minutes, and they differ each time
NOT_SHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)
TestPackets.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, phases=NOT_SHRUNK)
