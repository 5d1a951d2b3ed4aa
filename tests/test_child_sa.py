"""CHILD_SAs in the same round trip as their IKE_SA (bridge.stub.child_sa), and what charon is told of them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.charon.ha_codec import decode
from bridge.charon.ha_commands import child_message
from bridge.charon.ha_message import VERSIONS, Attr, IkeId, MessageType
from bridge.ike.keys import prf_plus
from bridge.ike.transforms import Prf
from bridge.stub.child_sa import (
    AT_ONCE,
    MAX_SELECTORS,
    TUNNEL,
    NewChild,
    SpiChoice,
    grant,
    granted,
    is_plain,
    offer,
    stays,
    wire_spi,
)
from bridge.stub.types import ChildSa, TrafficSelector

NI, NR = bytes(32), bytes(range(32))
IKE = IkeId.of(b"initiate", b"responds", True)


def selector(first: str, last: str | None = None) -> TrafficSelector:
    return TrafficSelector(7, 0, 0, 65535, False, first, last or first)


CHILD = ChildSa(
    name="net",
    mode=TUNNEL,
    ipcomp=0,
    encr=20,
    encr_len=128,
    integ=0,
    esn=0,
    groups=(),
    spi_in=0xC0000001,
    spi_out=0xC1000002,
    local_ts=(selector("10.20.1.1"),),
    remote_ts=(selector("10.10.0.0", "10.10.255.255"),),
    initiator=True,
)


def changed(**changes: object) -> ChildSa:
    return msgspec.structs.replace(CHILD, **changes)


def seen_by_the_gateway(child: ChildSa) -> ChildSa:
    return msgspec.structs.replace(
        child,
        spi_in=child.spi_out,
        spi_out=child.spi_in,
        local_ts=child.remote_ts,
        remote_ts=child.local_ts,
        initiator=not child.initiator,
    )


esp_spis = st.integers(256, 2**32 - 1)
families = st.lists(
    st.tuples(esp_spis, esp_spis), max_size=6, unique_by=(lambda pair: pair[0], lambda pair: pair[1])
).map(lambda pairs: [changed(spi_in=spi_in, spi_out=spi_out) for spi_in, spi_out in pairs])


def both_sides(
    client: list[ChildSa], stub: list[ChildSa], *, numbered: bool = True
) -> tuple[tuple[NewChild, ...], tuple[NewChild, ...]]:
    """The CHILD_SAs that either side makes, of those that the client had and those in the stub."""
    here, there = SpiChoice(lambda: ()), SpiChoice(lambda: ())
    offered = offer(client, lambda _: True, here.next)
    given = grant(stub, offered.requested, offered.old_spis if numbered else None, lambda _: True, there.next, NI, NR)
    return granted(offered, given.answer, NI, NR), given.children


@given(families, st.randoms())
def test_both_sides_make_the_same_child_sas_whatever_order_they_know_them_in(
    children: list[ChildSa], random: object
) -> None:
    stub = [seen_by_the_gateway(child) for child in children]
    random.shuffle(stub)  # type: ignore[attr-defined]
    client, gateway = both_sides(children, stub)
    assert len(client) == len(children)
    for mine, other in zip(client, gateway, strict=True):
        assert seen_by_the_gateway(mine.child) == other.child
        assert (mine.nonce_i, mine.nonce_r) == (other.nonce_i, other.nonce_r)


def test_a_child_sa_that_one_side_does_not_know_is_not_made() -> None:
    common, late = changed(), changed(spi_in=3, spi_out=4)
    client, gateway = both_sides([late, common], [seen_by_the_gateway(common)])
    assert [new.child.name for new in client] == [new.child.name for new in gateway] == ["net"]
    assert both_sides([late], [seen_by_the_gateway(common)]) == ((), ())


def test_without_the_old_spis_the_numbers_are_places_in_the_stub() -> None:
    client, gateway = both_sides([CHILD], [seen_by_the_gateway(CHILD)], numbered=False)
    assert seen_by_the_gateway(client[0].child) == gateway[0].child


def test_a_child_sa_goes_on_with_selectors_mode_and_algorithms_under_new_spis() -> None:
    [new], _ = both_sides([CHILD], [seen_by_the_gateway(CHILD)])
    assert new.child == changed(spi_in=new.child.spi_in, spi_out=new.child.spi_out)
    assert {new.child.spi_in, new.child.spi_out}.isdisjoint({CHILD.spi_in, CHILD.spi_out})


def test_the_nonces_of_its_keys_end_in_its_spis_in_network_order() -> None:
    spis = iter([0x40010203])
    offered = offer([CHILD], lambda _: True, lambda: next(spis))
    [new] = granted(offered, [(0, 0x50040506)], NI, NR)
    assert new.nonce_i == NI + bytes.fromhex("40010203")
    assert new.nonce_r == NR + bytes.fromhex("50040506")
    assert (wire_spi(new.child.spi_in), wire_spi(new.child.spi_out)) == (0x40010203, 0x50040506)


def test_no_two_child_sas_of_an_ike_sa_share_keys() -> None:
    family = [changed(spi_in=number, spi_out=number) for number in range(AT_ONCE)]
    client, _ = both_sides(family, [seen_by_the_gateway(child) for child in family])
    keys = {prf_plus(Prf.HMAC_SHA2_256, bytes(32), new.nonce_i + new.nonce_r, 40) for new in client}
    assert len(keys) == AT_ONCE


def test_more_child_sas_than_messages_should_hold_come_back_by_create_child_sa() -> None:
    family = [changed(spi_in=number, spi_out=number) for number in range(AT_ONCE + 1)]
    offered = offer(family, lambda _: True, SpiChoice(lambda: ()).next)
    assert len(offered.requested) == len(offered.old_spis) == AT_ONCE
    stub = [seen_by_the_gateway(child) for child in family]
    asked = [(number, 0x40000000 + number) for number in range(AT_ONCE + 1)]
    given = grant(stub, asked, None, lambda _: True, SpiChoice(lambda: ()).next, NI, NR)
    assert len(given.answer) == len(given.children) == AT_ONCE


@pytest.mark.parametrize(
    "requested",
    [[(0, 255)], [(1, 0x40000000)], [(0, 0x40000000)] * 2],
    ids=["a reserved SPI", "a number of none", "one twice"],
)
def test_what_a_client_cannot_mean_makes_no_further_child_sa(requested: list[tuple[int, int]]) -> None:
    stub = [seen_by_the_gateway(CHILD)]
    given = grant(stub, requested, None, lambda _: True, SpiChoice(lambda: ()).next, NI, NR)
    assert len(given.children) == len(given.answer) == (1 if len(requested) == 2 else 0)


@pytest.mark.parametrize("answer", [[(1, 0x50000000)], [(0, 255)]], ids=["one not asked for", "a reserved SPI"])
def test_what_a_gateway_cannot_mean_makes_no_child_sa(answer: list[tuple[int, int]]) -> None:
    offered = offer([CHILD], lambda _: True, SpiChoice(lambda: ()).next)
    assert granted(offered, answer, NI, NR) == ()


@pytest.mark.parametrize(
    "child",
    [changed(groups=(31,)), changed(ipcomp=2), changed(mode=3), changed(remote_ts=CHILD.remote_ts * MAX_SELECTORS)],
    ids=["PFS", "IPComp", "BEET mode", "more selectors than a message to charon holds"],
)
def test_some_child_sas_come_back_by_create_child_sa_only(child: ChildSa) -> None:
    assert is_plain(CHILD)
    assert not is_plain(child)
    assert offer([child], lambda _: True, SpiChoice(lambda: ()).next).requested == []


def test_a_child_sa_about_an_address_that_is_another_now_does_not_stay() -> None:
    moved = {"192.168.50.1"}
    hosts = changed(mode=1, local_ts=(selector("192.168.50.10"),), remote_ts=(selector("192.168.50.1"),))
    assert stays(CHILD, moved)
    assert stays(hosts, ())
    assert not stays(hosts, moved)
    assert not stays(changed(remote_ts=(*CHILD.remote_ts, selector("192.168.50.1"))), moved)


def test_spis_are_chosen_beside_those_of_charon_and_never_twice() -> None:
    spis = SpiChoice(lambda: ())
    chosen = [spis.next() for _ in range(1000)]
    assert len(set(chosen)) == 1000
    assert all(255 < spi < 0xC0000000 for spi in chosen)


def test_an_spi_in_use_is_not_chosen() -> None:
    octets: Iterator[bytes] = iter([bytes(4), bytes(4), b"\0\0\0\7"])
    spis = SpiChoice(lambda: [wire_spi(0x40000000)], random=lambda _: next(octets))
    assert spis.next() == 0x40000007


def test_spis_of_child_sas_that_ended_are_free_again() -> None:
    numbers = itertools.count()
    in_use: list[int] = []
    spis = SpiChoice(lambda: in_use, random=lambda _: (next(numbers) % 10_001).to_bytes(4))
    first = [spis.next() for _ in range(10_000)]
    # nothing but one is in use: the next look at what is frees all the others
    in_use.append(wire_spi(first[0]))
    assert spis.next() == 0x40000000 + 10_000
    assert spis.next() == first[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_charon_gets_all_of_a_child_sa(version: int) -> None:
    child = changed(encr=12, integ=12, esn=1, remote_ts=(*CHILD.remote_ts, selector("10.11.0.1")))
    [new], _ = both_sides([child], [seen_by_the_gateway(child)])
    message = decode(child_message(version, IKE, new))
    assert message.type is MessageType.CHILD_ADD
    assert message.first(Attr.IKE_ID) == IKE
    assert message.first(Attr.INITIATOR) == 1
    assert (message.first(Attr.INBOUND_SPI), message.first(Attr.OUTBOUND_SPI)) == (new.child.spi_in, new.child.spi_out)
    assert (message.first(Attr.NONCE_I), message.first(Attr.NONCE_R)) == (new.nonce_i, new.nonce_r)
    assert message.first(Attr.CONFIG_NAME) == "net"
    algorithms = (Attr.ALG_ENCR, Attr.ALG_ENCR_LEN, Attr.ALG_INTEG, Attr.ESN)
    assert [message.first(name) for name in algorithms] == [12, 128, 12, 1]
    assert message.all(Attr.LOCAL_TS) == child.local_ts
    assert message.all(Attr.REMOTE_TS) == child.remote_ts


@pytest.mark.parametrize("version", VERSIONS)
def test_as_many_selectors_as_may_come_fit_into_a_message_to_charon(version: int) -> None:
    wide = TrafficSelector(8, 0, 0, 65535, False, "2001:db8::", "2001:db8::ffff")
    child = changed(name="n" * 64, local_ts=(wide,) * (MAX_SELECTORS - 1), remote_ts=(wide,))
    [new], _ = both_sides([child], [seen_by_the_gateway(child)])
    assert len(decode(child_message(version, IKE, new)).all(Attr.LOCAL_TS)) == MAX_SELECTORS - 1


def test_the_spi_of_charons_message_is_that_of_the_packets() -> None:
    """charon holds the octets of an SPI as they are in packets, and sends the number they are on its host."""
    new = NewChild(changed(spi_in=wire_spi(0x40010203)), NI, NR)
    sent = int.from_bytes(bytes.fromhex("40010203"), sys.byteorder)
    assert sent.to_bytes(4) in child_message(3, IKE, new)
