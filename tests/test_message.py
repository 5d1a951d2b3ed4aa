"""IKE messages (bridge.ike.message)."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.ike.message import (
    HEADER,
    ExchangeType,
    Flag,
    MalformedMessage,
    NotifyType,
    PayloadType,
    build,
    check_nonce,
    decode_ke,
    decode_notify,
    encode_ke,
    encode_notify,
    parse,
)

SPI_I, SPI_R = b"I" * 8, b"R" * 8
plain_types = st.integers(1, 255).filter(lambda kind: kind not in (PayloadType.SK, PayloadType.SKF))
chains = st.lists(st.tuples(plain_types, st.binary(max_size=60)), max_size=8)


def message(payloads: list[tuple[int, bytes]]) -> bytes:
    return build(
        spi_i=SPI_I,
        spi_r=SPI_R,
        exchange=ExchangeType.IKE_SA_INIT,
        flags=Flag.INITIATOR,
        message_id=7,
        payloads=payloads,
    )


@given(chains)
def test_every_message_survives_the_round_trip(payloads: list[tuple[int, bytes]]) -> None:
    octets = message(payloads)
    parsed = parse(octets)
    assert parsed.header[:2] == (SPI_I, SPI_R)
    assert (parsed.header.exchange, parsed.header.flags, parsed.header.message_id) == (34, 8, 7)
    assert [(p.type, p.body) for p in parsed.payloads] == payloads
    for payload in parsed.payloads:
        assert octets[payload.offset :].startswith(payload.body)


@given(st.binary(max_size=300))
def test_arbitrary_octets_raise_nothing_but_malformed_message(octets: bytes) -> None:
    with suppress(MalformedMessage):
        parse(octets)


@given(chains, st.data())
def test_a_message_with_any_octet_altered_raises_nothing_else(
    payloads: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    octets = bytearray(message(payloads))
    octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MalformedMessage):
        parsed = parse(bytes(octets))
        parsed.notifies(NotifyType.COOKIE)
        parsed.only(PayloadType.NONCE)


@given(chains, st.integers(1, 400))
def test_a_cut_message_is_malformed(payloads: list[tuple[int, bytes]], cut: int) -> None:
    octets = message(payloads)
    with pytest.raises(MalformedMessage):
        parse(octets[: max(0, len(octets) - cut)])


def test_an_encrypted_payload_ends_the_chain() -> None:
    octets = bytearray(message([(PayloadType.SK, b"sealed")]))
    octets[HEADER.size] = PayloadType.ID_I  # what is first inside
    [payload] = parse(bytes(octets)).payloads
    assert payload.type == PayloadType.SK


@pytest.mark.parametrize(
    ("offset", "value"),
    [(17, 0x10), (27, 0xFF), (HEADER.size + 3, 3), (HEADER.size + 2, 0xFF), (HEADER.size, PayloadType.NONCE)],
    ids=["IKEv1", "length", "payload shorter than its header", "payload too long", "chain goes on past the end"],
)
def test_a_broken_field_is_malformed(offset: int, value: int) -> None:
    octets = bytearray(message([(PayloadType.NONCE, bytes(16))]))
    octets[offset] = value
    with pytest.raises(MalformedMessage):
        parse(bytes(octets))


def test_octets_behind_the_chain_are_malformed() -> None:
    octets = bytearray(message([(PayloadType.NONCE, bytes(16))]) + b"more")
    octets[24:28] = len(octets).to_bytes(4)
    with pytest.raises(MalformedMessage, match="behind"):
        parse(bytes(octets))


def test_a_chain_without_end_is_malformed() -> None:
    with pytest.raises(MalformedMessage, match="more than"):
        parse(message([(PayloadType.VENDOR_ID, b"")] * 65))


def test_a_payload_that_may_come_once_is_refused_twice() -> None:
    parsed = parse(message([(PayloadType.NONCE, bytes(16)), (PayloadType.NONCE, bytes(16))]))
    with pytest.raises(MalformedMessage, match="2 payloads"):
        parsed.only(PayloadType.NONCE)


def test_notifications_are_found_by_type() -> None:
    parsed = parse(
        message(
            [
                (PayloadType.NOTIFY, encode_notify(NotifyType.COOKIE, b"one")),
                (PayloadType.NOTIFY, encode_notify(NotifyType.NAT_DETECTION_SOURCE_IP, b"two")),
            ]
        )
    )
    assert parsed.notifies(NotifyType.COOKIE) == [b"one"]
    assert parsed.notifies(NotifyType.NAT_DETECTION_DESTINATION_IP) == []


@given(st.integers(0, 65535), st.binary(max_size=80))
def test_notify_and_key_exchange_survive_the_round_trip(number: int, octets: bytes) -> None:
    assert decode_notify(encode_notify(number, octets)) == (number, octets)
    assert decode_ke(encode_ke(number, octets)) == (number, octets)


@given(st.binary(max_size=12))
def test_arbitrary_bodies_raise_nothing_but_malformed_message(body: bytes) -> None:
    for decode in (decode_notify, decode_ke, check_nonce):
        with suppress(MalformedMessage):
            decode(body)


@pytest.mark.parametrize("octets", [0, 15, 257])
def test_a_nonce_has_16_to_256_octets(octets: int) -> None:
    with pytest.raises(MalformedMessage):
        check_nonce(bytes(octets))
    assert check_nonce(bytes(16)) == bytes(16)
    assert check_nonce(bytes(256)) == bytes(256)
