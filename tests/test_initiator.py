"""How a client moves its sessions (bridge.client.initiator, attempt, auto_resume), without root and without a lab: what
gateways answer is made up, and the clock does not pass by itself."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import Attr, HaMessage, IkeId, MessageType
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.client.initiator import Initiator
from bridge.client.metrics import ClientMetrics
from bridge.client.outcome import Outcome, Result
from bridge.client.sessions import Session
from bridge.client.sync_request import Answer, NoAnswerError, RefusedError, Target
from bridge.config import ClientConfig, GatewayEntry, HeldConfig, ResumeConfig, VpnConfig
from bridge.ike.stub_exchange import StubSa, build_move, move_message_id
from bridge.net.packet import Datagram
from bridge.service.tasks import spawn
from bridge.stub.types import Endpoint
from role_support import LOCAL, FakeTime, Wire, fake_charon, ike_sa

ONE, TWO, THREE = "192.0.2.1", "192.0.2.2", "192.0.2.3"
GATEWAYS = tuple(GatewayEntry(address, f"gw{number}") for number, address in enumerate((ONE, TWO, THREE), 1))


@dataclass
class Client:
    """An Initiator whose gateways answer as `answers` says by address, and take handshakes as `handshakes` says by
    connection."""

    loop: FakeTime
    config: ClientConfig

    def __post_init__(self) -> None:
        self.charon, self.installer, self.channel = fake_charon("gw1", "gw2", "gw3", "work1", "work2")
        self.wire = Wire()
        self.initiator = Initiator(
            self.charon, self.wire, self.config, ClientMetrics(), clock=self.loop.time, wall=lambda: 1_800_000_000.0
        )
        self.answers: dict[str, Exception | None] = {}
        """what each gateway does: resumes, where it is not named"""
        self.handshakes: dict[str, Exception | None] = {}
        self.switches: dict[str, Exception | None] = {}
        self.asked: list[str] = []
        self.asked_for: list[bytes] = []
        """both SPIs of what each was asked to resume"""
        self.without_stub: set[bytes] = set()
        """both SPIs of those that no gateway has a stub of"""
        self.origins: list[bytes] = []
        """both SPIs of what was resumed"""
        self.tried: list[str] = []
        for one, name, fake in (
            (self.initiator._requester, "ask", self.ask),
            (self.initiator._switchover, "resume", self.resume),
            (self.initiator._switchover, "handshake", self.handshake),
            (self.initiator._switchover, "end_half_open", self.end_half_open),
        ):
            setattr(one, name, fake)

    async def ask(self, sa: IkeSa, gateway: Target) -> Answer:
        self.asked.append(gateway.address)
        self.asked_for.append(sa.id.spis)
        await asyncio.sleep(0.01)
        failure = self.answers.get(gateway.address)
        if sa.id.spis in self.without_stub:
            failure = RefusedError(None)
        if isinstance(failure, NoAnswerError):
            await asyncio.sleep(3.0)
        if failure is not None:
            raise failure
        ike_id = IkeId.of(os.urandom(8), os.urandom(8), True)
        remote = Endpoint(gateway.address, 4500)
        return Answer(ike_id, b"i" * 32, b"r" * 32, LOCAL, remote, False, False, 0.01, None, None, ())

    async def resume(
        self,
        session: Session,
        old: IkeSa,
        gateway: Target,
        answer: Answer,
        confirmed_by: Any,
        *,
        stay: bool,
        origin: IkeSa,
    ) -> tuple[IkeSa, list[str], float]:
        self.origins.append(origin.id.spis)
        await asyncio.sleep(0.01)
        failure = self.switches.get(gateway.address)
        if failure is not None:
            raise failure
        new = ike_sa(gateway.connection, gateway.address)
        self.charon.tracker.forget(old.id)
        self.charon.tracker.adopt(new)
        self.initiator._sessions.moved(session, new)
        return new, ["net"], self.loop.time()

    async def handshake(self, session: Session | None, gateway: Target) -> list[str]:
        self.tried.append(gateway.connection)
        await asyncio.sleep(0.1)
        failure = self.handshakes.get(gateway.connection)
        if failure is not None:
            raise failure
        self.up(gateway.connection, gateway.address)
        return ["net"]

    async def end_half_open(self, session: Session, vpn: Any) -> None: ...

    def up(self, connection: str = "gw1", gateway: str = ONE) -> IkeSa:
        """charon has an IKE_SA."""
        sa = ike_sa(connection, gateway)
        self.charon.tracker.adopt(sa)
        self.initiator.changed(sa)
        return sa

    def rekeyed(self, old: IkeSa) -> IkeSa:
        """The gateway rekeys an IKE_SA; whether it has the answer is not known."""
        new = self.begins_rekey(old)
        self.completes(new)
        return new

    def begins_rekey(self, old: IkeSa) -> IkeSa:
        """The same, and charon has yet to report that the new one is up."""
        tracker = self.charon.tracker
        new = ike_sa(old.connection, ONE)
        new.id = IkeId.of(new.id.spi_i, new.id.spi_r, False)
        tracker.sas[new.id.spis] = new
        tracker.notes.rekeyed_from[new.id.spis] = old
        tracker.forget(old.id)
        self.initiator.gone(old)
        return new

    def completes(self, new: IkeSa) -> None:
        """It is up."""
        del self.charon.tracker.notes.rekeyed_from[new.id.spis]
        self.initiator.changed(new)

    def lose(self, sa: IkeSa, state: str = "CONNECTING") -> None:
        """Its gateway does not answer any more."""
        self.charon.tracker.forget(sa.id)
        self.initiator.gone(sa)
        self.initiator.down(info(sa, state))

    def run(self, work: Any) -> Any:
        return self.loop.run(work)


def info(sa: IkeSa, state: str) -> SaInfo:
    values: dict[str, Any] = dict.fromkeys(SaInfo._fields)
    values |= {"connection": sa.connection, "spi_i": sa.id.spi_i, "spi_r": sa.id.spi_r, "state": state}
    return SaInfo(**(values | {"initiator": True, "remote": sa.remote, "local": sa.local, "children": ()}))


CONFIG = ClientConfig(gateways=GATEWAYS, held=HeldConfig(fetch=False))


@pytest.fixture
def client(loop: FakeTime) -> Client:
    return Client(loop, CONFIG)


async def moved(client: Client, **arguments: Any) -> Outcome:
    return await client.initiator.resume(**arguments)


async def with_session(client: Client, **arguments: Any) -> Outcome:
    client.up()
    return await moved(client, **arguments)


def test_the_first_gateway_that_answers_takes_the_session(client: Client) -> None:
    outcome = client.run(with_session(client))
    assert (outcome.result, outcome.gateway, outcome.connection) == (Result.RESUMED, TWO, "gw2")
    assert client.asked == [TWO]


def test_the_gateway_that_the_session_is_on_is_asked_last(client: Client) -> None:
    client.answers = {TWO: NoAnswerError(), THREE: NoAnswerError()}
    outcome = client.run(with_session(client))
    assert client.asked == [TWO, THREE, ONE]
    assert (outcome.result, outcome.gateway) == (Result.RESUMED, ONE)


def test_after_a_refusal_no_other_gateway_is_asked_and_its_handshake_is_tried_first(client: Client) -> None:
    client.answers = {TWO: RefusedError(None)}
    client.handshakes = {"gw2": ViciError("it takes no handshake"), "gw3": ViciError("neither")}
    outcome = client.run(with_session(client))
    assert client.asked == [TWO]
    assert client.tried == ["gw2", "gw3", "gw1"]
    assert (outcome.result, outcome.connection, outcome.reason) == (Result.FALLBACK, "gw1", "refused")


async def rekeyed(client: Client, *, lost: bool = False) -> tuple[IkeSa, IkeSa]:
    """A session whose gateway has rekeyed its IKE_SA: both of them."""
    old = client.up()
    new = client.rekeyed(old)
    if lost:
        client.lose(new)
    return old, new


@pytest.mark.parametrize("lost", [False, True])
def test_without_a_stub_of_the_rekeyed_ike_sa_the_previous_one_is_resumed(client: Client, lost: bool) -> None:
    old, new = client.run(rekeyed(client, lost=lost))
    client.without_stub = {new.id.spis}
    outcome = client.run(moved(client))
    assert (outcome.result, outcome.gateway, outcome.reason) == (Result.RESUMED, TWO, None)
    assert client.asked_for == [new.id.spis, old.id.spis]
    assert client.origins == [old.id.spis]


def test_the_previous_ike_sa_is_tried_once(client: Client) -> None:
    old, new = client.run(rekeyed(client))
    client.without_stub = {old.id.spis, new.id.spis}
    outcome = client.run(moved(client))
    assert (outcome.result, outcome.reason) == (Result.FALLBACK, "refused")
    assert client.asked_for == [new.id.spis, old.id.spis]


@pytest.mark.parametrize("attempt_first", [False, True])
def test_an_attempt_during_which_a_rekey_is_completed_asks_for_nothing_twice(
    client: Client, attempt_first: bool
) -> None:
    async def attempt() -> tuple[IkeSa, Outcome]:
        old = client.up()
        new = None if attempt_first else client.begins_rekey(old)
        moving = spawn("move", moved(client))
        await asyncio.sleep(0.005)
        new = new or client.begins_rekey(old)
        client.without_stub = {old.id.spis, new.id.spis}
        client.completes(new)
        async with asyncio.timeout(60.0):
            return old, await moving

    old, outcome = client.run(attempt())
    assert client.asked_for == [old.id.spis]
    assert (outcome.result, outcome.reason) == (Result.FALLBACK, "refused")


def test_a_session_that_ended_with_its_rekey_half_made_does_not_come_back(client: Client) -> None:
    async def ends() -> None:
        old = client.up()
        client.begins_rekey(old)
        client.initiator.down(info(old, "DELETING"))
        await asyncio.sleep(60.0)

    client.run(ends())
    assert client.asked == []
    assert list(client.initiator._sessions) == []


def test_where_the_stub_of_the_rekeyed_ike_sa_is_the_previous_one_is_not_tried(client: Client) -> None:
    """A gateway that proves its reason has the stub."""
    _, new = client.run(rekeyed(client))
    client.answers = {TWO: RefusedError("connection-missing")}
    assert client.run(moved(client)).result is Result.FALLBACK
    assert client.asked_for == [new.id.spis]


def test_where_no_gateway_answers_the_previous_ike_sa_is_not_tried_either(client: Client) -> None:
    _, new = client.run(rekeyed(client))
    client.answers = dict.fromkeys((ONE, TWO, THREE), NoAnswerError())
    assert client.run(moved(client)).result is Result.FALLBACK
    assert set(client.asked_for) == {new.id.spis}


@pytest.mark.parametrize("on_old", [True, False])
def test_an_ike_sa_whose_rekey_the_gateway_completed_is_never_tried(client: Client, on_old: bool) -> None:
    old, new = client.run(rekeyed(client))
    client.initiator.verified((old if on_old else new).id)
    client.without_stub = {new.id.spis}
    assert client.run(moved(client)).result is Result.FALLBACK
    assert client.asked_for == [new.id.spis]


def test_where_no_gateway_answers_there_is_a_handshake_and_where_none_takes_it_the_attempt_failed(
    client: Client,
) -> None:
    client.answers = dict.fromkeys((ONE, TWO, THREE), NoAnswerError())
    client.handshakes = dict.fromkeys(("gw1", "gw2", "gw3"), ViciError("no"))
    outcome = client.run(with_session(client))
    assert (outcome.result, outcome.reason) == (Result.FAILED, "no-answer")
    assert client.tried == ["gw2", "gw3", "gw1"]


@pytest.mark.parametrize("error", [ViciError("no CHILD_SA came up"), ChannelError("charon is gone")])
def test_a_session_that_charon_does_not_go_on_with_is_set_up_again(client: Client, error: Exception) -> None:
    client.switches = {TWO: error}
    outcome = client.run(with_session(client))
    assert (outcome.result, outcome.connection, outcome.reason) == (Result.FALLBACK, "gw2", "sa-unusable")


@pytest.mark.parametrize(
    ("answer", "reason"), [(RefusedError(None), "refused"), (NoAnswerError(), "no-answer")], ids=["refused", "silent"]
)
def test_a_session_whose_gateway_asked_for_the_move_stays_there_where_it_is_not_resumed(
    client: Client, answer: Exception, reason: str
) -> None:
    client.answers = {TWO: answer}

    async def sent_away() -> Outcome:
        task = client.initiator._sent_away(client.up(), TWO)
        assert task is not None
        return await task

    outcome = client.run(sent_away())
    assert (outcome.result, outcome.reason) == (Result.FAILED, reason)
    assert client.tried == []


@pytest.mark.parametrize("resume_on_down", [True, False])
def test_a_session_whose_move_ended_without_an_ike_sa_comes_back_by_itself(
    loop: FakeTime, resume_on_down: bool
) -> None:
    client = Client(loop, replace(CONFIG, resume_on_down=resume_on_down))
    client.answers = {ONE: RefusedError("refused")}

    async def handshake(session: Session, gateway: Target) -> list[str]:
        # as the real one does where both IKE_SAs would be of one connection
        client.charon.tracker.forget(session.last.id)
        client.initiator._sessions.dropped(session.last)
        raise ViciError("no CHILD_SA came up")

    client.initiator._switchover.handshake = handshake  # type: ignore[method-assign, assignment]

    async def commanded() -> tuple[Outcome, bool]:
        client.up()
        outcome = await moved(client, to=ONE)
        client.answers = {}
        await asyncio.sleep(20)
        session = next(iter(client.initiator._sessions))
        return outcome, session.up

    outcome, up = client.run(commanded())
    assert outcome.result is Result.FAILED
    assert up


def test_a_session_that_cannot_be_resumed_is_set_up_again(client: Client) -> None:
    async def work() -> Outcome:
        sa = client.up()
        sa.resumable = False
        client.initiator.changed(sa)
        return await moved(client)

    outcome = client.run(work())
    assert (outcome.result, outcome.reason) == (Result.FALLBACK, "not-resumable")
    assert client.asked == []


def test_without_charons_ha_plugin_there_is_a_handshake(client: Client) -> None:
    client.channel.up = False
    outcome = client.run(with_session(client))
    assert (outcome.result, outcome.reason) == (Result.FALLBACK, "charon-unavailable")


def test_a_mistake_in_the_middle_fails_one_attempt_and_the_next_one_goes_on(client: Client) -> None:
    client.switches = {TWO: RuntimeError("a mistake")}
    outcome = client.run(with_session(client))
    assert (outcome.result, outcome.reason) == (Result.FAILED, "internal: RuntimeError")
    client.switches.clear()
    assert client.run(moved(client)).result is Result.RESUMED


def test_who_asks_while_it_moves_gets_the_same_outcome(client: Client) -> None:
    async def both() -> list[Outcome]:
        client.up()
        return list(await asyncio.gather(moved(client), moved(client)))

    first, second = client.run(both())
    assert first is second
    assert client.asked == [TWO]


def test_two_sessions_move_beside_each_other(loop: FakeTime) -> None:
    work = VpnConfig(gateways=(GatewayEntry("192.0.2.11", "work1"), GatewayEntry("192.0.2.12", "work2")))
    client = Client(loop, ClientConfig(gateways=GATEWAYS, vpns={"work": work}, held=HeldConfig(fetch=False)))

    async def both() -> list[Outcome]:
        client.up("gw1", ONE)
        client.up("work1", "192.0.2.11")
        client.answers = {TWO: NoAnswerError()}
        one, other = moved(client, vpn="default"), moved(client, vpn="work")
        return list(await asyncio.gather(one, other))

    one, other = loop.run(both())
    assert (one.result, one.gateway, one.vpn) == (Result.RESUMED, THREE, "default")
    assert (other.result, other.gateway, other.vpn) == (Result.RESUMED, "192.0.2.12", "work")


def test_nothing_to_move_and_nowhere_to_go_are_failures_with_their_reasons(client: Client) -> None:
    assert client.run(moved(client)).reason == "no-ike-sa"
    assert client.run(moved(client, connection="other")).reason == "connection-not-configured"
    assert client.run(moved(client, vpn="other")).reason == "vpn-not-configured"
    assert client.run(with_session(client, to="203.0.113.1")).reason == "gateway-not-configured"


# by itself


async def lost(client: Client, state: str = "CONNECTING") -> None:
    client.lose(client.up(), state)


def test_a_session_whose_gateway_died_moves_by_itself(client: Client) -> None:
    client.run(lost(client))
    client.loop.pass_time(1.0)
    assert client.initiator.last is not None
    assert (client.initiator.last.result, client.initiator.last.gateway) == (Result.RESUMED, TWO)


def test_a_session_that_one_of_the_sides_ended_does_not(client: Client) -> None:
    client.run(lost(client, "DELETING"))
    client.loop.pass_time(100.0)
    assert client.asked == []


async def deleted(client: Client, *requests: tuple[str, float]) -> None:
    """Requests on its IKE_SA, charon's own and the peer's, each so long after the one before; then one of the sides has
    ended it."""
    sa = client.up()
    reports = client.charon.reports
    for whose, seconds in requests:
        await asyncio.sleep(seconds)
        kind = MessageType.IKE_MID_INITIATOR if whose == "own" else MessageType.IKE_MID_RESPONDER
        reports.handle(HaMessage(5, kind, [(Attr.IKE_ID, sa.id), (Attr.MID, 7)]))
    client.lose(sa, "DELETING")


@pytest.fixture
def returning(loop: FakeTime) -> Client:
    """A client whose sessions are set up again when their gateway ends them."""
    client = Client(loop, replace(CONFIG, resume=ResumeConfig(after_delete="handshake")))
    client.charon.tracker.clock = loop.time
    client.charon.vici.list_sas = no_sas  # type: ignore[method-assign,assignment]
    return client


async def no_sas(*_: Any) -> list[SaInfo]:
    return []


@pytest.mark.parametrize("since_own", [1.0, 0.2])
def test_a_session_that_its_gateway_deleted_is_set_up_again_elsewhere_first(
    returning: Client, since_own: float
) -> None:
    """charon's own request may have been a liveness check."""
    returning.run(deleted(returning, ("own", 1.0), ("peer", since_own)))
    returning.loop.pass_time(5.0)
    assert returning.tried == ["gw2"]
    assert returning.initiator.last is not None
    assert returning.initiator.last.reason == "deleted-by-gateway"


@pytest.mark.parametrize(
    "requests",
    [
        (),
        (("peer", 1.0), ("own", 1.0)),
        (("peer", 1.0), ("own", 0.001)),
        (("own", 1.0), ("peer", 5.0), ("own", 9.0)),
    ],
)
def test_a_session_that_may_have_been_ended_here_is_not(returning: Client, requests: Any) -> None:
    returning.run(deleted(returning, *requests))
    returning.loop.pass_time(100.0)
    assert returning.tried == []


def test_what_the_peer_said_long_before_is_no_delete(returning: Client) -> None:
    async def later() -> None:
        sa = returning.up()
        returning.charon.reports.handle(
            HaMessage(5, MessageType.IKE_MID_RESPONDER, [(Attr.IKE_ID, sa.id), (Attr.MID, 7)])
        )
        await asyncio.sleep(2.0)
        returning.lose(sa, "DELETING")

    returning.run(later())
    returning.loop.pass_time(100.0)
    assert returning.tried == []


def test_an_end_that_this_host_waits_for_is_its_own(returning: Client) -> None:
    async def both() -> None:
        sa = returning.up()
        assert sa.requests is not None
        sa.requests.deleting = True
        returning.charon.reports.handle(
            HaMessage(5, MessageType.IKE_MID_RESPONDER, [(Attr.IKE_ID, sa.id), (Attr.MID, 7)])
        )
        returning.lose(sa, "DELETING")

    returning.run(both())
    returning.loop.pass_time(100.0)
    assert returning.tried == []


@pytest.mark.parametrize("own", [False, True], ids=["its gateway's doing", "charon's own reauthentication"])
def test_what_ends_with_its_authentication_has_lapsed_unless_charon_authenticates_again(
    client: Client, own: bool
) -> None:
    async def ends() -> None:
        sa = client.up()
        sa.authenticated_until = 1_800_000_001
        client.lose(sa, "DELETING")

    async def under_way(*_: Any) -> list[SaInfo]:
        return [info(ike_sa("gw1", ONE), "CONNECTING")] if own else []

    client.charon.vici.list_sas = under_way  # type: ignore[method-assign,assignment]
    with structlog.testing.capture_logs() as events:
        client.run(ends())
        client.loop.pass_time(5.0)
    lapsed = [event for event in events if event["event"] == "authentication-lapsed"]
    assert (len(lapsed), len(client.tried)) == ((0, 0) if own else (1, 1))


def test_a_client_that_is_deleted_again_and_again_comes_ever_more_seldom(returning: Client) -> None:
    pauses: list[float] = []
    for number in range(10):
        returning.run(deleted(returning, ("peer", 0.1)))
        began = returning.loop.time()
        while len(returning.tried) == number:
            returning.loop.pass_time(0.5)
        pauses.append(returning.loop.time() - began)
    assert 1.0 <= pauses[0] <= 4.0
    assert pauses == sorted(pauses)
    assert 300.0 <= pauses[-1] <= 302.0
    # one that lived for long is set up at once again
    returning.loop.pass_time(1200.0)
    returning.run(deleted(returning, ("peer", 0.1)))
    returning.loop.pass_time(5.0)
    assert len(returning.tried) == 11


def test_sessions_that_a_gateway_deletes_together_do_not_wait_for_each_other(loop: FakeTime) -> None:
    uplinks = VpnConfig(gateways=(GatewayEntry(ONE, "work1"), GatewayEntry(TWO, "gw1"), GatewayEntry(THREE, "gw2")))
    client = Client(
        loop, ClientConfig(vpns={"work": uplinks}, held=CONFIG.held, resume=ResumeConfig(after_delete="handshake"))
    )
    client.charon.tracker.clock = loop.time
    client.charon.vici.list_sas = no_sas  # type: ignore[method-assign,assignment]

    async def stopped() -> None:
        sas = [client.up(connection, ONE) for connection in ("work1", "gw1", "gw2")]
        await asyncio.sleep(5.0)
        for sa in sas:
            client.charon.reports.handle(
                HaMessage(5, MessageType.IKE_MID_RESPONDER, [(Attr.IKE_ID, sa.id), (Attr.MID, 7)])
            )
            client.lose(sa, "DELETING")
            await asyncio.sleep(0.1)

    client.run(stopped())
    client.loop.pass_time(5.0)
    assert len(client.tried) == 3


def test_by_default_a_session_that_its_gateway_deleted_is_charons(client: Client) -> None:
    client.run(deleted(client, ("peer", 1.0)))
    client.loop.pass_time(100.0)
    assert client.tried == []


@pytest.mark.parametrize(("seconds", "comes_back"), [(100.0, True), (130.0, False)])
def test_a_session_that_its_gateway_asked_to_move_in_vain_is_set_up_again_after_its_delete(
    client: Client, seconds: float, comes_back: bool
) -> None:
    client.charon.tracker.clock = client.loop.time
    client.charon.vici.list_sas = no_sas  # type: ignore[method-assign,assignment]
    client.answers = {TWO: RefusedError(None)}

    async def asked_and_deleted() -> None:
        sa = client.up()
        await asyncio.sleep(0.1)  # addresses of its gateways
        at_gateway = StubSa(sa.id.spi_i, sa.id.spi_r, False, sa.index_there(), sa.suite.prf, sa.sk_d)
        move = build_move(at_gateway, TWO, move_message_id(1_800_000_000.0))
        client.initiator.datagrams([Datagram(ONE, 4500, LOCAL.address, LOCAL.port, move, True)])
        await asyncio.sleep(seconds)
        assert client.asked == [TWO]
        news = HaMessage(5, MessageType.IKE_MID_RESPONDER, [(Attr.IKE_ID, sa.id), (Attr.MID, 7)])
        client.charon.reports.handle(news)
        client.lose(sa, "DELETING")

    client.run(asked_and_deleted())
    client.loop.pass_time(10.0)
    assert client.tried == (["gw2"] if comes_back else [])


def test_while_no_gateway_can_be_reached_it_is_tried_again_ever_more_seldom(client: Client) -> None:
    client.answers = dict.fromkeys((ONE, TWO, THREE), NoAnswerError())
    client.handshakes = dict.fromkeys(("gw1", "gw2", "gw3"), ViciError("no"))
    client.run(lost(client))
    client.loop.pass_time(600.0)
    attempts = len(client.asked) // 3
    assert 8 <= attempts <= 14
    client.answers.clear()
    client.loop.pass_time(70.0)
    assert client.initiator.last is not None
    assert client.initiator.last.result is Result.RESUMED


def test_a_session_that_comes_up_meanwhile_is_not_moved(client: Client) -> None:
    async def work() -> None:
        client.lose(client.up())
        await asyncio.sleep(0.01)
        client.up()

    client.run(work())
    client.loop.pass_time(10.0)
    assert client.asked == []


def test_a_return_that_was_stopped_and_begun_again_is_still_known_to_be_under_way(client: Client) -> None:
    auto_resume = client.initiator._auto_resume

    async def work() -> None:
        client.answers = dict.fromkeys((ONE, TWO, THREE), NoAnswerError())
        client.handshakes = dict.fromkeys(("gw1", "gw2", "gw3"), ViciError("no"))
        sa = client.up()
        session = client.initiator._sessions.of(sa.id.spis)
        assert session is not None
        client.lose(sa)
        auto_resume.stop(session)
        auto_resume.start(session)
        await asyncio.sleep(0.01)
        auto_resume.start(session)
        await asyncio.sleep(0.01)
        assert len([task for task in asyncio.all_tasks() if task.get_name().startswith("return")]) == 1

    client.run(work())


def test_a_client_that_stops_leaves_no_task_behind(client: Client) -> None:
    async def work() -> None:
        client.answers = {TWO: NoAnswerError()}
        client.lose(client.up())
        await asyncio.sleep(0.5)
        await client.initiator.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    client.run(work())
