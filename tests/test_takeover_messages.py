"""Message IDs of sessions that were taken over: the client's from its requests, the gateway's by trying."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace

from bridge.charon.ha_message import IkeId
from bridge.charon.ha_segments import segment_of
from bridge.charon.vici_types import ChildConfig, ConnectionInfo
from bridge.gateway.takeover_rekeys import ANSWER_SECONDS, REFUSAL_SECONDS, TakeoverRekeys
from bridge.gateway.takeover_requests import TakeoverRequests
from bridge.gateway.takeover_session import CHILD_LOST, REFUSES_KEYS, SILENT, Session, session_of
from bridge.gateway.takeover_state import Event, State
from bridge.ike.encrypted_payload import Protection, protect
from bridge.ike.transforms import Suite
from bridge.net.packet import Datagram
from bridge.stub.child_sa import wire_spi
from test_takeover_session import NOW, takeable

NET = ConnectionInfo("home", 14400, 0, (ChildConfig("net"),))
INFORMATIONAL, REQUEST_OF_INITIATOR = 37, 0x08
EXPECTED = 7
"""message ID of the client's next request, by the stub"""
OWN = 4


class Charon:
    """What is asked of it, in order."""

    def __init__(self) -> None:
        self.ids: list[tuple[str, int]] = []
        self.rekeyed: list[str] = []
        self.refusal = ""
        self.open: set[str] = {"CHILD_REKEY"}
        """what it awaits an answer for"""
        self.repeated: list[bytes] = []
        self.channel = SimpleNamespace(receive=lambda: None, drained=self._nothing)
        self.vici = SimpleNamespace(rekey_children=self._rekey, tasks=self._tasks)
        self.installer = SimpleNamespace(set_next_id=self._set)
        self.landing = SimpleNamespace(segment_of=segment_of)

    async def _nothing(self) -> None:
        pass

    async def _rekey(self, wanted: Sequence[tuple[str, str]]) -> list[str]:
        self.rekeyed += [child for _, child in wanted]
        return [self.refusal] * len(wanted)

    async def _tasks(self, unique_ids: Sequence[str]) -> list[set[str]]:
        return [self.open] * len(unique_ids)

    async def _set(self, _: object, number: int, *, own: bool) -> None:
        self.ids.append(("own" if own else "client", number))

    def send(self, *datagram: Any) -> None:
        self.repeated.append(datagram[4])


def session(state: State = State.REKEYING) -> Session:
    made = session_of(takeable(), NET, began=0.0, now=NOW)
    if state is not State.INSTALLING:
        made.on(Event.INSTALLED)
    return made


def request(of: Session, message_id: int, *, forged: bool = False) -> Datagram:
    """What its client sends."""
    derivation = of.stub.derivation
    assert derivation is not None
    keys = derivation.keys(of.stub.suite, of.stub.spi_i, of.stub.spi_r)
    protection = Protection.of(of.stub.suite, keys, initiator=True)
    if forged:
        protection = protection._replace(sk_a=bytes(len(protection.sk_a)), sk_e=bytes(len(protection.sk_e)))
    octets = protect(
        protection,
        spi_i=of.stub.spi_i,
        spi_r=of.stub.spi_r,
        exchange=INFORMATIONAL,
        flags=REQUEST_OF_INITIATOR,
        message_id=message_id,
        payloads=[],
        iv=bytes(protection.iv_length),
    )
    remote, local = of.stub.remote, of.stub.local
    return Datagram(remote.address, remote.port, local.address, local.port, octets, True)


async def judged(
    *message_ids: int, confirmed: bool = False, forged: bool = False, suite: Suite | None = None
) -> tuple[Charon, Session]:
    """What charon is told when these requests come."""
    charon, one = Charon(), session()
    if suite is not None:
        one.stub = replace(one.stub, suite=suite)
    requests = TakeoverRequests(charon, charon)  # type: ignore[arg-type]
    requests.watch(one)
    if confirmed:
        requests.verified(one.sa.id.spis)
    for message_id in message_ids:
        requests.overheard([request(one, message_id, forged=forged)])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return charon, one


@pytest.mark.parametrize("message_id", [EXPECTED - 1, EXPECTED + 1, EXPECTED + 40])
async def test_charon_is_told_the_message_id_of_a_request_and_gets_it_again(message_id: int) -> None:
    charon, one = await judged(message_id)
    assert charon.ids == [("client", message_id)]
    assert charon.repeated == [request(one, message_id).ike]


@pytest.mark.parametrize("encr", [20, 28])
async def test_requests_of_an_aead_are_verified_too(encr: int) -> None:
    suite = Suite(encr=encr, encr_len=128 if encr == 20 else 0, integ=0, prf=5, group=31)
    charon, _ = await judged(EXPECTED + 1, suite=suite)
    assert charon.ids == [("client", EXPECTED + 1)]


async def test_a_request_that_charon_expects_is_left_to_it() -> None:
    charon, _ = await judged(EXPECTED)
    assert (charon.ids, charon.repeated) == ([], [])


async def test_a_replay_of_an_older_request_is_ignored() -> None:
    charon, _ = await judged(EXPECTED - 2)
    assert charon.ids == []


async def test_after_the_first_verified_request_the_message_id_goes_forward_only() -> None:
    charon, _ = await judged(EXPECTED - 1, EXPECTED + 3, confirmed=True)
    assert charon.ids == [("client", EXPECTED + 3)]


async def test_a_forged_request_changes_nothing() -> None:
    charon, _ = await judged(EXPECTED + 1, forged=True)
    assert charon.ids == []


async def test_a_request_before_charon_has_the_session_is_judged_afterwards() -> None:
    charon, one = Charon(), session(State.INSTALLING)
    requests = TakeoverRequests(charon, charon)  # type: ignore[arg-type]
    requests.watch(one)
    requests.overheard([request(one, EXPECTED + 1)])
    assert charon.ids == []
    one.on(Event.INSTALLED)
    requests.judge(one)
    await asyncio.sleep(0)
    assert charon.ids == [("client", EXPECTED + 1)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Rekeys:
    """TakeoverRekeys with its clock, for one session."""

    def __init__(self, one: Session) -> None:
        self.charon, self.clock, self.session = Charon(), Clock(), one
        self.done: list[tuple[State, str]] = []
        self.rekeys = TakeoverRekeys(
            self.charon,  # type: ignore[arg-type]
            lambda session, reason: self.done.append((session.state, reason)),
            clock=self.clock,
        )

    async def asked(self) -> None:
        self.rekeys.put(self.session)
        self.rekeys._waiting.clear()
        self.rekeys._asked[self.session.sa.id.spis] = self.session
        await self.rekeys._ask([self.session])

    async def refused(self) -> None:
        """charon has sent its request, and awaits no answer any more; no CHILD_SA came."""
        self.rekeys.sent(self.session.sa.id.spis)
        self.charon.open = set()
        await self.wait()

    async def wait(self) -> None:
        self.clock.now += ANSWER_SECONDS
        await self.rekeys._look_after()


async def test_charon_rekeys_each_child_sa() -> None:
    rekeys = Rekeys(session())
    await rekeys.asked()
    assert rekeys.charon.rekeyed == ["net"]


async def test_a_client_that_is_silent_is_asked_under_the_next_message_ids_and_the_one_before() -> None:
    rekeys = Rekeys(session())
    await rekeys.asked()
    for _ in range(4):
        await rekeys.wait()
    # at last the one of the stub again
    assert rekeys.charon.ids == [("own", OWN + number) for number in (1, 2, -1, 0)]
    assert rekeys.done == [(State.LEFT, SILENT)]


async def test_where_charon_refuses_the_command_no_other_message_id_is_tried() -> None:
    """Nothing was sent, so that the message ID is still right."""
    rekeys = Rekeys(session())
    rekeys.charon.refusal = "no matching SAs to rekey found"
    await rekeys.asked()
    await rekeys.wait()
    assert (rekeys.charon.rekeyed, rekeys.charon.ids) == (["net", "net"], [])
    rekeys.charon.refusal = ""
    await rekeys.wait()
    await rekeys.wait()
    assert [one for one, _ in rekeys.charon.ids] == ["own"]


async def test_a_client_that_refuses_new_keys_is_asked_again_under_no_other_message_id() -> None:
    rekeys = Rekeys(session())
    await rekeys.asked()
    for _ in range(10):
        await rekeys.refused()
    assert (rekeys.charon.rekeyed, rekeys.charon.ids, rekeys.done) == (["net"] * 11, [], [])
    # its IKE_SA may be rekeyed: it answers, whatever happens next
    rekeys.rekeys.sent(rekeys.session.sa.id.spis)
    rekeys.charon.open = {"CHILD_REKEY"}
    await rekeys.wait()
    assert (rekeys.charon.ids, rekeys.done) == ([], [(State.LEFT, SILENT)])


async def test_a_client_that_refuses_new_keys_for_long_has_to_connect_again() -> None:
    rekeys = Rekeys(session())
    await rekeys.asked()
    for _ in range(int(REFUSAL_SECONDS / ANSWER_SECONDS) + 1):
        await rekeys.refused()
    assert rekeys.done == [(State.LEFT, REFUSES_KEYS)]


async def test_on_a_new_ike_sa_a_client_has_refused_nothing_yet() -> None:
    """It answered TEMPORARY_FAILURE because it rekeyed the old one."""
    rekeys = Rekeys(session())
    await rekeys.asked()
    await rekeys.refused()
    rekeys.session.follow(rekeys.session.sa)
    rekeys.clock.now += REFUSAL_SECONDS
    rekeys.charon.open = {"CHILD_REKEY"}
    await rekeys.asked()
    await rekeys.wait()
    assert (REFUSES_KEYS not in [reason for _, reason in rekeys.done], rekeys.session.refuses_since) == (True, None)


async def test_a_session_that_is_put_again_has_refused_nothing_yet() -> None:
    rekeys = Rekeys(session())
    await rekeys.asked()
    await rekeys.refused()
    rekeys.rekeys.put(rekeys.session)
    assert rekeys.session.refuses_since is None


async def test_for_each_child_sa_a_client_may_refuse_new_keys_for_the_same_time() -> None:
    """One that comes with no new keys for another changes nothing."""
    one = session()
    [first] = one.stub.children
    second = replace(first, spi_in=first.spi_in + 1)
    one.stub = replace(one.stub, children=(first, second))
    one.sa.put_child(second)
    rekeys = Rekeys(one)
    await rekeys.asked()
    await rekeys.refused()
    rekeys.rekeys.changed(one.sa)
    assert one.refuses_since is not None
    one.sa.put_child(replace(first, spi_in=99))
    rekeys.rekeys.changed(one.sa)
    assert one.refuses_since is None


async def test_an_ike_sa_that_was_rekeyed_gets_no_message_id_of_the_one_before() -> None:
    """Also after its client was silent for a while."""
    one = session()
    one.follow(one.sa)
    rekeys = Rekeys(one)
    for _ in range(2):
        await rekeys.asked()
        rekeys.rekeys.sent(one.sa.id.spis)
        await rekeys.wait()
        assert (rekeys.charon.ids, rekeys.done.pop()) == ([], (State.LEFT, SILENT))
        one.on(Event.HEARD)


async def test_where_charon_is_slow_to_send_its_request_that_is_no_refusal() -> None:
    rekeys = Rekeys(session())
    await rekeys.asked()
    rekeys.charon.open = set()
    await rekeys.wait()
    assert [one for one, _ in rekeys.charon.ids] == ["own"]


async def test_where_charon_sent_its_request_again_meanwhile_the_client_has_its_second() -> None:
    rekeys = Rekeys(session())
    await rekeys.asked()
    await rekeys.refused()
    spis = rekeys.session.sa.id.spis
    rekeys.rekeys.sent(spis)
    rekeys.charon.open = {"CHILD_REKEY"}
    # while VICI lists the tasks, charon begins by itself
    tasks = rekeys.charon.vici.tasks

    async def slow(unique_ids: Sequence[str]) -> list[set[str]]:
        rekeys.rekeys.sent(spis)
        return cast(list[set[str]], await tasks(unique_ids))

    rekeys.charon.vici.tasks = slow
    await rekeys.wait()
    assert (rekeys.charon.ids, rekeys.done) == ([], [])


async def test_a_message_id_below_the_first_is_not_tried() -> None:
    one = session()
    assert one.stub.derivation is not None
    one.stub = replace(one.stub, derivation=replace(one.stub.derivation, next_request=0))
    rekeys = Rekeys(one)
    await rekeys.asked()
    for _ in range(4):
        await rekeys.wait()
    assert rekeys.charon.ids == [("own", 1), ("own", 2)]


async def test_a_session_is_taken_over_once_its_child_sas_have_new_keys() -> None:
    rekeys = Rekeys(session())
    await rekeys.asked()
    [old] = rekeys.session.sa.children
    rekeys.session.sa.put_child(replace(old, spi_in=99))
    rekeys.rekeys.changed(rekeys.session.sa)
    assert rekeys.done == [(State.TAKEN_OVER, "")]


async def test_a_client_with_another_child_sa_than_the_stub_has_to_connect_again() -> None:
    rekeys = Rekeys(session())
    await rekeys.asked()
    [old] = rekeys.session.sa.children
    rekeys.session.sa.drop_child(old.spi_in)
    rekeys.rekeys.changed(rekeys.session.sa)
    assert rekeys.done == [(State.TAKEN_OVER, CHILD_LOST)]


async def test_a_session_whose_client_sends_esp_is_next() -> None:
    """By the SPI, which a NAT does not change."""
    rekeys = Rekeys(session()).rekeys
    others = [session() for _ in range(2)]
    for number, one in enumerate(others):
        one.sa.id = IkeId.of(one.sa.id.spi_i, bytes([number]) * 8, False)
        [child] = one.stub.children
        one.stub = replace(one.stub, children=(replace(child, spi_in=number + 1),))
        rekeys.put(one)
    assert next(iter(rekeys._waiting.values())) is others[0]
    rekeys.first_by_spi(wire_spi(2))
    assert next(iter(rekeys._waiting.values())) is others[1]
    # what no session here has
    rekeys.first_by_spi(99)
