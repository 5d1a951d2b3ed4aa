"""A gateway's address of the other family (bridge.gateway.other_family), and clients that know gateways by it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest

from bank_support import stub_of
from bridge.bank import gateway_facts
from bridge.bank.gateway_facts import Facts
from bridge.charon.ike_sa import sa_of
from bridge.gateway.other_family import other_address
from bridge.gateway.other_gateways import OtherGateways
from bridge.ike.stub_exchange import MoveStatus
from bridge.stub.types import Endpoint
from role_support import FakeTime
from test_drain_run import THERE, Scene

HERE, SIX = "192.0.2.1", "2001:db8::1"
THERE_SIX = "2001:db8::2"


def nothing() -> Mapping[str, int]:
    return {}


def unreadable() -> Mapping[str, int]:
    raise OSError


@pytest.mark.parametrize(("own", "other"), [(HERE, SIX), (SIX, HERE)])
def test_it_is_the_one_that_most_sessions_have(own: str, other: str) -> None:
    assert other_address(own, [own, own, "198.51.100.3", "2001:db8::77", other, other], nothing) == other


@pytest.mark.parametrize(
    ("present", "found"),
    [
        ({HERE: 2, SIX: 2, "fe80::1": 2, "2001:db8:9::1": 3, "127.0.0.1": 1}, SIX),
        ({HERE: 2, SIX: 2, "2001:db8::77": 2}, ""),
        ({HERE: 2, "fe80::1": 2}, ""),
        ({SIX: 2}, ""),
    ],
)
def test_without_sessions_it_is_the_only_one_of_the_interface(present: dict[str, int], found: str) -> None:
    assert other_address(HERE, [HERE], lambda: present) == found


def test_addresses_that_cannot_be_read_tell_nothing() -> None:
    assert other_address(HERE, [], unreadable) == ""


def test_it_is_posted_and_what_is_no_address_is_not_believed() -> None:
    facts = Facts({}, other=SIX)
    assert gateway_facts.decode(gateway_facts.encode(facts)) == facts
    assert gateway_facts.decode('{"connections": {}}') == Facts({})
    assert gateway_facts.decode('{"connections": {}, "other": "vpn\\n"}') is None


@pytest.mark.parametrize(("peer", "first"), [("198.51.100.7", THERE), ("2001:db8::7", THERE_SIX)])
def test_a_client_is_sent_to_the_address_of_its_family_first(loop: FakeTime, peer: str, first: str) -> None:
    scene = Scene(loop, 1)
    [sa] = scene.sas
    scene.charon.tracker.forget(sa.id)
    sa = scene.sas[0] = sa_of(msgspec.structs.replace(stub_of(b"7" * 8), remote=Endpoint(peer, 4500)))
    scene.charon.tracker.adopt(sa)
    scene.bank.posts["facts", THERE] = gateway_facts.encode(Facts({"home": ["net"]}, other=THERE_SIX)).encode()
    scene.begin()
    loop.pass_time(0.2)
    assert [message.move.target for message in scene.moves(sa) if message.move] == [first]
    # it knows its gateways by the other one
    scene.report(sa, MoveStatus.NOT_CONFIGURED)
    loop.pass_time(0.2)
    assert {message.move.target for message in scene.moves(sa) if message.move} == {THERE, THERE_SIX}


def test_a_gateway_is_found_by_either_address() -> None:
    others = OtherGateways({THERE: Facts({}, other=THERE_SIX), "192.0.2.3": None}, frozenset(), False)
    assert (others.named(THERE_SIX), others.named(THERE), others.named("192.0.2.9")) == (THERE, THERE, "192.0.2.9")


@pytest.mark.parametrize("status", [MoveStatus.REFUSED, MoveStatus.NO_ANSWER])
def test_a_gateway_that_does_not_resume_it_is_not_named_by_its_other_address_too(
    loop: FakeTime, status: MoveStatus
) -> None:
    scene = Scene(loop, 1)
    [sa] = scene.sas
    scene.bank.posts["facts", THERE] = gateway_facts.encode(Facts({"home": ["net"]}, other=THERE_SIX)).encode()
    scene.begin()
    loop.pass_time(0.2)
    scene.report(sa, status)
    loop.pass_time(0.5)
    assert len({message.message_id for message in scene.moves(sa)}) == 1
    assert scene.told()["state"] == "done"
