"""Segments of the ha plugin (bridge.charon.ha_segments)."""

from collections import Counter
from ipaddress import ip_address, ip_network

import pytest

from bridge.charon.ha_segments import (
    BLOCKED_SECONDS,
    LONGEST_PAUSE,
    SHARE,
    SegmentChooser,
    landing_addresses,
    segment_of,
)
from bridge.charon.half_open import REQUEST_SECONDS, HalfOpenSas


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


def use(choice: SegmentChooser, now: float, seconds: float = 0.0) -> int:
    """The segment that is activated at `now`; that takes `seconds`."""
    segment = choice.to_activate(now)
    assert segment is not None
    choice.disturbed(segment, now + seconds, seconds)
    return segment


ADDRESSES = landing_addresses(2)


@pytest.mark.parametrize("crashes", [True, False])
def test_a_segment_with_a_handshake_in_progress_is_not_activated_until_that_is_over(crashes: bool) -> None:
    half_open = HalfOpenSas()
    choice = SegmentChooser(2, half_open)
    choice.crashes = crashes
    half_open.began(b"one", ADDRESSES[1], 0.0)
    # however long it takes
    assert [use(choice, now) for now in (1.0, 2.0, 3600.0)] == [2, 2, 2]
    half_open.ended(b"one")
    assert use(choice, 3601.0) == 1


@pytest.mark.parametrize("crashes", [True, False])
def test_where_each_segment_has_a_handshake_in_progress_none_is_activated(crashes: bool) -> None:
    half_open = HalfOpenSas()
    choice = SegmentChooser(2, half_open)
    choice.crashes = crashes
    for segment, address in ADDRESSES.items():
        half_open.began(bytes((segment,)), address, 0.0)
    assert choice.next(1.0) in (1, 2)
    assert choice.blocked(1.0)
    assert choice.wait(1.0) == BLOCKED_SECONDS
    assert choice.to_activate(1.0) is None
    half_open.ended(b"\x02")
    assert not choice.blocked(2.0)
    assert choice.wait(2.0) == 0
    assert choice.to_activate(2.0) == 2


def test_a_handshake_that_begins_after_the_installation_has_the_sas_activated_elsewhere() -> None:
    half_open = HalfOpenSas()
    choice = SegmentChooser(2, half_open)
    assert choice.next(1.0) == 1
    half_open.began(b"one", ADDRESSES[1], 1.0)
    assert choice.to_activate(2.0) == 2


def test_a_request_on_its_way_to_charon_is_avoided_and_where_charon_crashes_it_counts_as_a_handshake() -> None:
    half_open = HalfOpenSas()
    choice = SegmentChooser(2, half_open)
    half_open.request(b"initiate", ADDRESSES[1], 1.0)
    assert use(choice, 1.1) == 2
    half_open.request(b"another1", ADDRESSES[2], 1.1)
    assert not choice.blocked(1.2)
    choice.crashes = True
    assert choice.blocked(1.2)
    assert choice.to_activate(1.2) is None
    # charon told of one of them
    half_open.began(b"initiate" + b"responds", ADDRESSES[1], 1.3)
    half_open.ended(b"initiate" + b"responds")
    assert use(choice, 1.4) == 1
    # of the other one nothing came
    assert not choice.blocked(1.1 + REQUEST_SECONDS)


def test_where_requests_are_held_back_during_activations_those_on_their_way_block_none() -> None:
    half_open = HalfOpenSas()
    choice = SegmentChooser(2, half_open)
    choice.crashes = True
    choice.held_back = lambda: True
    for segment, address in ADDRESSES.items():
        half_open.request(bytes((segment,)), address, 1.0)
    assert not choice.blocked(1.1)


def test_what_vici_lists_as_connecting_replaces_what_was_known_before() -> None:
    half_open = HalfOpenSas()
    half_open.began(b"failed", "192.0.2.1", 1.0)
    half_open.began(b"later", "192.0.2.2", 6.0)
    half_open.listed({b"listed": "192.0.2.3"}, 5.0)
    assert sorted(half_open.addresses()) == ["192.0.2.2", "192.0.2.3"]


def test_a_batch_is_installed_where_the_fewest_clients_are() -> None:
    choice = SegmentChooser(3)
    choice.established = Counter({1: 10, 2: 3, 3: 7})
    assert use(choice, 1.0) == 2


def test_a_segment_in_which_charon_itself_may_begin_a_handshake_is_activated_only_beside_handshakes() -> None:
    half_open = HalfOpenSas()
    choice = SegmentChooser(3, half_open)
    three = landing_addresses(3)
    choice.peers = lambda: [three[1], three[3], "2001:db8::1"]
    choice.established = Counter({2: 10})
    assert choice.with_peers() == {1, 3, choice.segment_of("::")}
    for now in (1.0, 2.0, 3.0):
        assert use(choice, now, 0.01) == 2
        # and not the one that needs no rest
        assert choice.wait(now + 0.02) > 0
    half_open.began(b"one", three[2], 100.0)
    assert use(choice, 101.0) in (1, 3)


def test_among_equals_the_segment_disturbed_longest_ago_is_next() -> None:
    choice = SegmentChooser(4)
    assert [use(choice, float(i)) for i in range(8)] == [1, 2, 3, 4, 1, 2, 3, 4]


def test_what_comes_before_an_activation_is_installed_where_the_others_are() -> None:
    choice = SegmentChooser(4)
    assert choice.next(1.0) == choice.next(2.0) == 1
    choice.disturbed(1, 3.0, 0.0)
    assert choice.next(4.0) == 2


@pytest.mark.parametrize(("count", "seconds"), [(1, 0.001), (1, 0.02), (2, 0.03), (16, 0.001), (16, 0.02), (16, 0.3)])
def test_no_segment_is_inactive_for_more_than_its_share(count: int, seconds: float) -> None:
    choice = SegmentChooser(count)
    choice.established = Counter(dict.fromkeys(range(1, count + 1), 100))
    inactive: Counter[int] = Counter()
    now, activations = 0.0, 0
    while activations < 20 * count:
        now += choice.wait(now)
        assert choice.wait(now) == 0
        inactive[use(choice, now, seconds)] += 1
        now += seconds
        activations += 1
    # each as often as the others
    assert set(inactive.values()) == {20}
    # two at once are allowed to begin with
    assert 20 * seconds / now == pytest.approx(SHARE, rel=0.005 + 2 / (20 * count - 2))


def test_activations_that_take_long_come_at_the_longest_pause() -> None:
    choice = SegmentChooser(16)
    choice.established = Counter(dict.fromkeys(range(1, 17), 10_000))
    use(choice, 0.0, 0.5)
    assert choice.wait(0.5) == 0
    use(choice, 0.5, 0.5)
    # the second one's own time is part of it
    assert choice.wait(1.0) == LONGEST_PAUSE - 0.5


def test_however_often_empty_segments_were_used_a_full_one_waits_for_one_pause_at_most() -> None:
    choice = SegmentChooser(2)
    choice.established = Counter({1: 10})
    now = 0.0
    for _ in range(100):
        assert use(choice, now, 0.5) == 2
        now += 0.5
    choice.established = Counter({1: 10, 2: 10})
    assert choice.wait(now) <= LONGEST_PAUSE


def test_sas_that_were_not_there_were_not_disturbed() -> None:
    choice = SegmentChooser(2)
    use(choice, 0.0, 0.5)
    use(choice, 0.5, 0.5)
    # chosen while it is empty
    assert choice.next(1.0) == 1
    choice.established = Counter({1: 10, 2: 10})
    assert choice.wait(1.0) <= LONGEST_PAUSE


def test_a_segment_without_sas_waits_for_nothing() -> None:
    choice = SegmentChooser(2)
    choice.established = Counter({1: 10})
    assert use(choice, 0.0, 0.1) == 2
    assert choice.wait(0.1) == 0
    choice.established = Counter({1: 10, 2: 10})
    use(choice, 0.1, 0.1)
    assert choice.wait(0.2) > 0
