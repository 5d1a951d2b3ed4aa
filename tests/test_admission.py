"""Who is served: cookies and limits (bridge.gateway.admission, bridge.gateway.rate_limit)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from bridge.config import SyncConfig
from bridge.gateway.admission import HOLD_SECONDS, Admission, Demand, Source, Verdict, source_of
from bridge.gateway.rate_limit import Rate, SourceRates
from bridge.ike.cookie import Cookies, Glance
from bridge.ike.message import NotifyType, parse

A, B = "192.0.2.10", "192.0.2.11"
PORT = 4500
BARE = Glance(b"I" * 8, b"i" * 32, None)


class Door:
    """An Admission, and what a client that answers to its challenges would send."""

    def __init__(self, **limits: Any) -> None:
        self.cookies = Cookies()
        self.unconfirmed: Counter[Source] = Counter()
        self.admission = Admission(SyncConfig(**limits), self.cookies, self.unconfirmed.__getitem__)

    def bare(self, address: str = A, *, load: int = 0, now: float = 0.0) -> Verdict | Demand:
        return self.admission.judge(BARE, address, PORT, load, now)

    def proved(self, address: str = A, *, load: int = 0, now: float = 0.0) -> Verdict | Demand:
        [cookie] = parse(self.cookies.challenge(BARE, address, PORT, now)).notifies(NotifyType.COOKIE)
        return self.admission.judge(BARE._replace(cookie=cookie), address, PORT, load, now)


def test_a_quiet_gateway_asks_for_nothing() -> None:
    assert Door().bare() is Verdict.SERVE


def test_from_the_threshold_of_unconfirmed_sas_on_a_cookie_is_asked_for() -> None:
    door = Door(cookie_threshold=100)
    assert door.bare(load=99) is Verdict.SERVE
    assert door.bare(load=100) is Demand.UNCONFIRMED
    assert door.proved(load=100) is Verdict.SERVE


def test_a_threshold_of_zero_asks_every_client() -> None:
    door = Door(cookie_threshold=0)
    assert door.bare() is Demand.UNCONFIRMED
    assert door.proved() is Verdict.SERVE


def test_a_cookie_of_another_sender_is_as_none() -> None:
    door = Door(cookie_threshold=0)
    [cookie] = parse(door.cookies.challenge(BARE, B, PORT, 0.0)).notifies(NotifyType.COOKIE)
    assert door.admission.judge(BARE._replace(cookie=cookie), A, PORT, 0, 0.0) is Demand.UNCONFIRMED


def test_past_the_rate_of_requests_a_cookie_is_asked_for_until_it_is_quiet_again() -> None:
    door = Door(cookie_rate=50)
    sources = [f"10.0.0.{number}" for number in range(50)]
    assert {door.bare(source) for source in sources} == {Verdict.SERVE}
    assert door.bare(A) is Demand.RATE
    assert door.bare(A, now=HOLD_SECONDS - 1) is Demand.RATE
    assert door.proved(A) is Verdict.SERVE
    assert door.bare(A, now=HOLD_SECONDS + 1) is Verdict.SERVE


def test_who_was_asked_because_of_many_unconfirmed_sas_is_not_served_without_when_they_are_fewer() -> None:
    door = Door(cookie_threshold=100)
    assert door.bare(load=100) is Demand.UNCONFIRMED
    assert door.bare(load=0, now=HOLD_SECONDS - 1) is Demand.UNCONFIRMED
    assert door.proved(load=0, now=HOLD_SECONDS - 1) is Verdict.SERVE
    assert door.bare(load=0, now=HOLD_SECONDS + 1) is Verdict.SERVE


def test_the_rate_is_held_up_by_the_flood_itself() -> None:
    door = Door(cookie_rate=50)
    verdicts = [door.bare(f"10.0.{n // 250}.{n % 250}", now=n / 1000) for n in range(20_000)]
    assert all(verdict is Demand.RATE for verdict in verdicts[100:])


def test_requests_with_a_cookie_do_not_count_towards_the_rate() -> None:
    door = Door(cookie_rate=50)
    assert {door.proved(f"10.0.0.{number}") for number in range(200)} == {Verdict.SERVE}
    assert door.bare(A) is Verdict.SERVE


def test_a_source_past_its_rate_must_show_a_cookie_and_no_other_need() -> None:
    door = Door(source_rate=10)
    assert {door.bare(A) for _ in range(10)} == {Verdict.SERVE}
    assert door.bare(A) is Demand.SOURCE_RATE
    assert door.bare(B) is Verdict.SERVE
    assert door.proved(A) is Verdict.SERVE
    assert door.bare(A, now=1.0) is Verdict.SERVE


def test_a_source_that_proved_itself_is_refused_past_its_rate() -> None:
    door = Door(source_rate=10)
    assert {door.proved(A) for _ in range(10)} == {Verdict.SERVE}
    assert door.proved(A) is Verdict.REFUSE
    assert door.proved(B) is Verdict.SERVE


def test_whoever_takes_an_address_in_vain_cannot_have_it_refused() -> None:
    door = Door(source_rate=10)
    for _ in range(1000):
        door.bare(A)
    assert door.proved(A) is Verdict.SERVE


def test_from_half_its_unconfirmed_sas_on_a_source_must_show_a_cookie() -> None:
    door = Door(max_unconfirmed_per_source=4)
    door.unconfirmed[source_of(A)] += 1
    assert door.bare(A) is Verdict.SERVE
    door.unconfirmed[source_of(A)] += 1
    assert door.bare(A) is Demand.SOURCE_UNCONFIRMED
    assert door.bare(B) is Verdict.SERVE
    assert door.proved(A) is Verdict.SERVE
    door.unconfirmed[source_of(A)] -= 1
    assert door.bare(A) is Verdict.SERVE


def test_a_source_is_full_at_its_limit_and_not_once_one_is_settled() -> None:
    door = Door(max_unconfirmed_per_source=2)
    for _ in range(2):
        assert not door.admission.full(A)
        door.unconfirmed[source_of(A)] += 1
    assert door.admission.full(A)
    assert not door.admission.full(B)
    door.unconfirmed[source_of(A)] -= 1
    assert not door.admission.full(A)


def test_all_addresses_of_an_ipv6_network_are_one_source() -> None:
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:1")
    assert source_of("2001:db8:0:1::1") != source_of("2001:db8::1")
    assert source_of("192.0.2.1") != source_of("192.0.2.2")


@pytest.mark.parametrize("per_second", [1, 3, 10, 1000])
def test_a_rate_gives_what_it_says_together_and_then_evenly(per_second: int) -> None:
    rate = Rate(per_second)
    assert sum(rate.take(5.0) for _ in range(3 * per_second)) == per_second
    taken = sum(rate.take(5.0 + step / (4 * per_second)) for step in range(1, 4 * per_second * 10 + 1))
    assert 10 * per_second - 1 <= taken <= 10 * per_second + 1


def test_rates_of_many_sources_take_bounded_room_and_forget_the_oldest() -> None:
    rates = SourceRates(1, limit=100)
    assert rates.take("first", 0.0)
    for number in range(1000):
        assert rates.take(f"source {number}", 0.0)
    assert len(rates) == 100
    assert not rates.take("source 999", 0.0)
    assert rates.take("first", 0.0)


def test_a_flood_that_has_to_show_cookies_leaves_nothing_behind() -> None:
    door = Door(cookie_rate=10)
    for number in range(5000):
        door.bare(f"10.{number // 250}.0.{number % 250}")
    assert len(door.admission._unproved) <= 10
    assert len(door.admission._proved) == 0
