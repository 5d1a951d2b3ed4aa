"""What gateways post of the failures that they announce, and what several of them say together."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from bridge.bank.failover_progress import FailoverProgress, decode, encode, together

DEAD, ONE, OTHER = "192.0.2.9", "192.0.2.1", "192.0.2.2"


def progress(**more: object) -> FailoverProgress:
    return replace(FailoverProgress(DEAD, "running", "", 10, 10, 0, 0, 0, 0, 0, 0, 1.0), **more)


def test_what_is_posted_is_read_again() -> None:
    assert decode(encode([progress(announced=3)]).encode()) == [progress(announced=3)]


@pytest.mark.parametrize(
    "octets",
    [b"", b"{", b"[1]", b'[{"gateway": "192.0.2.9"}]', b"[" * 100_001, encode([progress(gateway="x")]).encode()],
)
def test_what_no_gateway_posts_says_nothing(octets: bytes) -> None:
    assert decode(octets) == []


def test_text_that_no_gateway_posts_does_nothing_to_a_terminal() -> None:
    [failure] = decode(encode([progress(state="\x1b[2J", reason="\x07")]).encode())
    assert (failure.state + failure.reason).isprintable()


def test_two_gateways_each_announce_a_part() -> None:
    told = {
        ONE: [progress(announced=5, under_way=1, resumed=4)],
        OTHER: [progress(announced=5, resumed=3, elsewhere=4, silent=2, seconds=2.0)],
    }
    [both] = together(told)
    assert (both.announced, both.under_way, both.resumed, both.over, both.silent) == (10, 1, 7, 7, 2)
    assert (both.stubs, both.seconds, both.left) == (10, 2.0, 0)


def test_what_is_not_over_once_all_are_done_is_left_to_dpd() -> None:
    told = {
        ONE: [progress(state="done", resumed=4, elsewhere=3)],
        OTHER: [progress(state="done", resumed=3, elsewhere=4)],
    }
    [both] = together(told)
    assert (both.state, both.over, both.left) == ("done", 7, 3)


def test_failures_of_two_gateways_are_two() -> None:
    told = {ONE: [progress(), progress(gateway=OTHER)], "192.0.2.3": [progress()]}
    assert [failure.gateway for failure in together(told)] == [OTHER, DEAD]
