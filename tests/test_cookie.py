"""Cookies (bridge.ike.cookie, RFC 7296 section 2.6)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.ike.cookie import COOKIE_OCTETS, SECRET_SECONDS, Cookies, Glance, glance
from bridge.ike.message import HEADER, Flag, MalformedMessage, NotifyType, PayloadType, build, encode_notify, parse
from bridge.ike.resumption_answer import parse_response
from bridge.ike.resumption_request import build_request, parse_request
from bridge.ike.sync_messages import CookieChallenge
from bridge.ike.transforms import Suite

SUITE = Suite(12, 128, 12, 5, 31)
SPI_I, NI = b"I" * 8, b"i" * 32
ADDRESS, PORT = "192.0.2.10", 4500


def request(**changes: Any) -> bytes:
    values: dict[str, Any] = {
        "spi_i": SPI_I,
        "suite": SUITE,
        "ke_value": b"k" * 32,
        "nonce": NI,
        "sync_index": ("192.0.2.1", b"O" * 8),
        "prf": SUITE.prf,
        "sk_d_old": b"d" * 32,
    }
    return build_request(**(values | changes))


def seen(octets: bytes) -> Glance:
    found = glance(octets)
    assert found is not None
    return found


def challenged(cookies: Cookies, octets: bytes, now: float = 0.0, address: str = ADDRESS, port: int = PORT) -> bytes:
    """The cookie that the answer to a request holds."""
    answer = parse_response(cookies.challenge(seen(octets), address, port, now), octets)
    assert isinstance(answer, CookieChallenge)
    return answer.cookie


def test_the_challenge_is_the_request_header_answered_and_a_cookie_alone() -> None:
    message = parse(Cookies().challenge(seen(request()), ADDRESS, PORT, 0.0))
    assert message.header[:2] == (SPI_I, bytes(8))
    assert (message.header.exchange, message.header.flags, message.header.message_id) == (34, Flag.RESPONSE, 0)
    [payload] = message.payloads
    assert (payload.type, payload.critical) == (PayloadType.NOTIFY, False)
    assert [len(cookie) for cookie in message.notifies(NotifyType.COOKIE)] == [COOKIE_OCTETS]


def test_a_challenge_is_shorter_than_any_request_so_nothing_is_amplified() -> None:
    assert len(Cookies().challenge(seen(request()), ADDRESS, PORT, 0.0)) < len(request(sk_d_old=None)) / 2


def test_a_cookie_that_comes_back_is_valid() -> None:
    cookies = Cookies()
    cookie = challenged(cookies, request())
    assert cookies.valid(seen(request(cookie=cookie)), ADDRESS, PORT, 0.0)


@pytest.mark.parametrize(
    ("changes", "address", "port"),
    [
        ({"nonce": b"j" * 32}, ADDRESS, PORT),
        ({"nonce": NI + b"i"}, ADDRESS, PORT),
        ({"spi_i": b"J" * 8}, ADDRESS, PORT),
        ({}, "192.0.2.11", PORT),
        ({}, "2001:db8::1", PORT),
        ({}, ADDRESS, PORT + 1),
    ],
    ids=["another Ni", "a longer Ni", "another SPIi", "another address", "another family", "another port"],
)
def test_a_cookie_is_good_for_one_nonce_spi_address_and_port(changes: dict[str, Any], address: str, port: int) -> None:
    cookies = Cookies()
    cookie = challenged(cookies, request())
    assert not cookies.valid(seen(request(cookie=cookie, **changes)), address, port, 0.0)


def test_what_belongs_to_the_address_cannot_be_taken_for_port_or_spi() -> None:
    """An attacker at 2.3.4.5 gets no cookie that serves for 12.3.4.5, whatever SPIi and Ni it sends."""
    cookies = Cookies()
    port = ord("1")
    cookie = challenged(cookies, request(), address="2.3.4.5", port=port)
    for shift in (b"1", b"2.3.4.5|", b"|"):
        for nonce in (NI, shift + NI, NI[len(shift) :]):
            assert not cookies.valid(seen(request(cookie=cookie, nonce=nonce)), "12.3.4.5", port, 0.0)


@given(st.integers(0, COOKIE_OCTETS - 1), st.integers(1, 255))
def test_a_cookie_with_any_octet_altered_is_not_valid(position: int, change: int) -> None:
    cookies = Cookies()
    cookie = bytearray(challenged(cookies, request()))
    cookie[position] ^= change
    assert not cookies.valid(seen(request(cookie=bytes(cookie))), ADDRESS, PORT, 0.0)


@pytest.mark.parametrize("cookie", [None, b"", b"c", b"c" * 64], ids=["none", "empty", "short", "long"])
def test_what_is_no_cookie_of_ours_is_not_valid(cookie: bytes | None) -> None:
    assert not Cookies().valid(seen(request(cookie=cookie)), ADDRESS, PORT, 0.0)


def test_a_cookie_of_another_gateway_is_not_valid() -> None:
    cookie = challenged(Cookies(), request())
    assert not Cookies().valid(seen(request(cookie=cookie)), ADDRESS, PORT, 0.0)


def test_a_cookie_outlives_one_change_of_the_secret_and_no_second() -> None:
    cookies = Cookies()
    asked = request(cookie=challenged(cookies, request(), now=1.0))
    assert cookies.valid(seen(asked), ADDRESS, PORT, SECRET_SECONDS + 1)
    assert challenged(cookies, request(), now=SECRET_SECONDS + 1) != asked[32 : 32 + COOKIE_OCTETS]
    assert cookies.valid(seen(asked), ADDRESS, PORT, SECRET_SECONDS + 1)
    assert not cookies.valid(seen(asked), ADDRESS, PORT, 2 * SECRET_SECONDS + 2)


def test_a_cookie_does_not_outlive_a_long_pause() -> None:
    cookies = Cookies()
    asked = request(cookie=challenged(cookies, request()))
    assert not cookies.valid(seen(asked), ADDRESS, PORT, 2 * SECRET_SECONDS)


def test_after_256_secrets_an_old_cookie_is_as_worthless() -> None:
    cookies = Cookies()
    asked = request(cookie=challenged(cookies, request()))
    for turn in range(1, 257):
        challenged(cookies, request(), now=turn * SECRET_SECONDS)
    assert not cookies.valid(seen(asked), ADDRESS, PORT, 256 * SECRET_SECONDS)


# the first look


def test_a_first_look_shows_spi_nonce_and_cookie() -> None:
    assert seen(request()) == Glance(SPI_I, NI, None)
    assert seen(request(cookie=b"crumb")) == Glance(SPI_I, NI, b"crumb")


def test_the_protocol_id_of_a_cookie_notification_is_ignored() -> None:
    """RFC 7296 section 3.10."""
    octets = bytearray(request(cookie=b"crumb"))
    octets[HEADER.size + 4] = 1
    assert seen(bytes(octets)).cookie == b"crumb"


def test_a_cookie_behind_other_payloads_is_none() -> None:
    """RFC 7296 section 2.6 has it as the first payload."""
    message = parse(request())
    payloads = [(payload.type, payload.body) for payload in message.payloads]
    payloads.insert(1, (PayloadType.NOTIFY, encode_notify(NotifyType.COOKIE, b"crumb")))
    octets = build(spi_i=SPI_I, spi_r=bytes(8), exchange=34, flags=Flag.INITIATOR, message_id=0, payloads=payloads)
    assert seen(octets).cookie is None


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        request()[:27],
        request()[:18] + b"\x23" + request()[19:],
        request()[:19] + bytes((Flag.RESPONSE,)) + request()[20:],
        request(sk_d_old=None).replace(bytes((PayloadType.SYNC,)), bytes((201,))),
    ],
    ids=["nothing", "cut header", "IKE_AUTH", "an answer", "no IKE_SA_SYNC"],
)
def test_a_first_look_passes_over_everything_else(octets: bytes) -> None:
    assert glance(octets) is None


@pytest.mark.parametrize(
    "octets",
    [request()[:-1], request(nonce=bytes(15)), request(nonce=bytes(257)), request()[: HEADER.size + 2] + b"\xc8"],
    ids=["cut", "short nonce", "long nonce", "cut payload header"],
)
def test_a_first_look_at_a_broken_request_finds_it_malformed(octets: bytes) -> None:
    with pytest.raises(MalformedMessage):
        glance(octets)


def test_a_chain_of_empty_payloads_is_not_followed_to_its_end() -> None:
    octets = request()[: HEADER.size].replace(bytes((33,)), bytes((PayloadType.SYNC,)), 1) + b"\xc8\0\0\4" * 800
    with pytest.raises(MalformedMessage, match="too long"):
        glance(octets)


@given(st.binary(max_size=60), st.integers(0, len(request(cookie=b"crumb")) - 1), st.integers(0, 255))
def test_a_first_look_agrees_with_the_whole_look(octets: bytes, position: int, value: int) -> None:
    """Whatever is taken for a request with IKE_SA_SYNC is one at first sight, with the same SPIi and nonce.

    So is its cookie, if any: one where RFC 7296 does not have it counts for none.
    """
    altered = bytearray(request(cookie=b"crumb"))
    altered[position] = value
    for data in (octets, request()[:28] + octets, bytes(altered)):
        try:
            whole = parse_request(data)
        except MalformedMessage:
            with suppress(MalformedMessage):
                glance(data)
            continue
        if whole is not None:
            assert seen(data)[:2] == (whole.spi_i, whole.nonce)
            assert seen(data).cookie in (None, whole.cookie)
