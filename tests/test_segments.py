"""Segments of the ha plugin (bridge.charon.segments)."""

from collections import Counter
from ipaddress import ip_address, ip_network

import pytest

from bridge.charon.segments import LandingChoice, landing_addresses, segment_of


@pytest.mark.parametrize(("address", "segment"), [("192.168.50.10", 13), ("198.18.0.8", 7), ("198.18.0.9", 3)])
def test_an_ipv4_address_is_in_the_segment_that_charon_puts_it(address: str, segment: int) -> None:
    assert segment_of(address, 16) == segment


def test_all_ipv6_addresses_share_one_segment() -> None:
    assert segment_of("2001:db8::1", 16) == segment_of("fe80::1", 16) == segment_of("0.0.0.0", 16)


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_there_is_a_landing_address_of_the_benchmark_network_in_every_segment(count: int) -> None:
    addresses = landing_addresses(count)
    assert sorted(addresses) == list(range(1, count + 1))
    for segment, address in addresses.items():
        assert ip_address(address) in ip_network("198.18.0.0/15")
        assert segment_of(address, count) == segment


def test_addresses_spread_over_all_segments() -> None:
    spread = Counter(segment_of(f"10.0.{i // 250}.{i % 250 + 1}", 16) for i in range(4000))
    assert len(spread) == 16
    assert max(spread.values()) < 2 * min(spread.values())


def test_a_batch_lands_where_no_handshake_is_in_progress() -> None:
    choice = LandingChoice(2, handshake_seconds=5)
    address = landing_addresses(2)[1]
    choice.handshake_seen(address, now=100.0)
    assert choice.next(101.0) == 2
    assert choice.next(102.0) == 2
    assert choice.next(106.0) == 1


def test_a_batch_lands_where_the_fewest_clients_are() -> None:
    choice = LandingChoice(3)
    choice.established = Counter({1: 10, 2: 3, 3: 7})
    assert choice.next(1.0) == 2


def test_among_equals_the_segment_disturbed_longest_ago_is_next() -> None:
    choice = LandingChoice(4)
    assert [choice.next(float(i)) for i in range(8)] == [1, 2, 3, 4, 1, 2, 3, 4]
