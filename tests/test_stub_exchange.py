"""GET and Download Stub, Move and Moving (bridge.ike.stub_exchange)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.ike.message import Flag, MalformedMessage, PayloadType, build, parse
from bridge.ike.stub_exchange import (
    GET_MESSAGE_ID,
    Move,
    MoveStatus,
    StubSa,
    build_announcement,
    build_download,
    build_get,
    build_here,
    build_move,
    build_moving,
    build_probe,
    move_message_id,
    parse_stub_message,
    verify,
    verify_report,
)
from bridge.ike.sync_payload import Attribute, SyncPayload
from bridge.ike.transforms import PRF_OUTPUT, Prf

SK_D = b"d" * 32
NONCE = b"n" * 32
SPI_I, SPI_R = b"I" * 8, b"R" * 8
INDEX = ("192.0.2.1", SPI_R)
CLIENT = StubSa(SPI_I, SPI_R, True, INDEX, Prf.HMAC_SHA2_256, SK_D)
GATEWAY = StubSa(SPI_I, SPI_R, False, INDEX, Prf.HMAC_SHA2_256, SK_D)
TARGET = "192.0.2.2"
MOVE_ID = move_message_id(1_800_000_000)

GET = build_get(CLIENT, NONCE)
DOWNLOAD = build_download(GATEWAY, parse_stub_message(GET), b"sealed", 3600)
MOVE = build_move(GATEWAY, TARGET, MOVE_ID)
MOVING = build_moving(CLIENT, parse_stub_message(MOVE), MoveStatus.MOVING, NONCE)
ANNOUNCEMENT = build_announcement(GATEWAY, TARGET, MOVE_ID)
PROBE = build_probe(CLIENT, parse_stub_message(ANNOUNCEMENT), NONCE)
HERE = build_here(GATEWAY, parse_stub_message(PROBE))
NOT_HERE = build_here(GATEWAY, parse_stub_message(PROBE), MoveStatus.NOT_HERE)
STAYS = build_moving(CLIENT, parse_stub_message(ANNOUNCEMENT), MoveStatus.GATEWAY_LIVES, NONCE)


def proved(octets: bytes, before: bytes | None = None, sk_d: bytes = SK_D, prf: int = Prf.HMAC_SHA2_256) -> bool:
    return verify(
        parse_stub_message(octets), prf, sk_d, before=parse_stub_message(before) if before is not None else None
    )


def octets_of(payloads: list[tuple[int, bytes]], **changes: Any) -> bytes:
    values: dict[str, Any] = {
        "spi_i": SPI_I,
        "spi_r": SPI_R,
        "exchange": 240,
        "flags": Flag.INITIATOR,
        "message_id": GET_MESSAGE_ID,
    }
    return build(**(values | changes), payloads=payloads)


@pytest.mark.parametrize("prf", list(PRF_OUTPUT))
def test_a_report_is_verified_by_the_octets_of_the_announcement(prf: Prf) -> None:
    client, gateway = (StubSa(SPI_I, SPI_R, one, INDEX, prf, SK_D) for one in (True, False))
    announcement = build_announcement(gateway, TARGET, MOVE_ID)
    octets = build_moving(client, parse_stub_message(announcement), MoveStatus.MOVING, NONCE)
    report = parse_stub_message(octets)
    assert proved(octets, announcement, prf=prf)
    assert verify_report(report, prf, SK_D, announcement)
    assert not verify_report(report, prf, SK_D, build_announcement(gateway, TARGET, MOVE_ID + 1))
    assert not verify_report(report, prf, b"x" * 32, announcement)


def test_get_stub_names_the_sa_and_carries_a_nonce_and_last_the_index() -> None:
    message = parse(GET)
    assert message.header[:2] == (SPI_I, SPI_R)
    assert (message.header.exchange, message.header.flags) == (240, Flag.INITIATOR)
    assert [payload.type for payload in message.payloads] == [PayloadType.NONCE, PayloadType.SYNC]
    assert not any(payload.critical for payload in message.payloads)


@pytest.mark.parametrize("octets", [GET, DOWNLOAD, MOVE, MOVING])
def test_no_message_has_an_id_that_a_charon_could_expect(octets: bytes) -> None:
    assert parse(octets).header.message_id >= 1 << 31


def test_download_stub_is_read_as_it_was_built() -> None:
    found = parse_stub_message(DOWNLOAD)
    assert (found.spis, found.sealed_stub, found.lifetime, found.move) == (SPI_I + SPI_R, b"sealed", 3600, None)
    assert (found.sync.gateway, found.sync.spi) == INDEX


@pytest.mark.parametrize("target", ["192.0.2.2", "2001:db8::2"])
@pytest.mark.parametrize("status", MoveStatus)
def test_moving_names_the_target_and_what_becomes_of_it(target: str, status: MoveStatus) -> None:
    asked = parse_stub_message(build_move(GATEWAY, target, MOVE_ID))
    assert asked.move == Move(MoveStatus.ASKED, target)
    told = parse_stub_message(build_moving(CLIENT, asked, status, NONCE))
    assert told.move == Move(status, target)
    assert told.message_id == asked.message_id == MOVE_ID


@pytest.mark.parametrize("initiator", [True, False])
def test_the_flag_i_is_of_the_side_that_began_the_sa_and_the_flag_r_of_the_gateway(initiator: bool) -> None:
    client = StubSa(SPI_I, SPI_R, initiator, INDEX, Prf.HMAC_SHA2_256, SK_D)
    gateway = StubSa(SPI_I, SPI_R, not initiator, INDEX, Prf.HMAC_SHA2_256, SK_D)
    get = build_get(client, NONCE)
    assert parse(get).header.flags == (Flag.INITIATOR if initiator else 0)
    download = build_download(gateway, parse_stub_message(get), b"sealed", 1)
    assert parse(download).header.flags == Flag.RESPONSE | (0 if initiator else Flag.INITIATOR)


@pytest.mark.parametrize("algorithm", sorted(PRF_OUTPUT))
def test_every_message_is_proved_under_the_sas_sk_d_alone(algorithm: int) -> None:
    client = StubSa(SPI_I, SPI_R, True, INDEX, algorithm, SK_D)
    gateway = StubSa(SPI_I, SPI_R, False, INDEX, algorithm, SK_D)
    get = build_get(client, NONCE)
    download = build_download(gateway, parse_stub_message(get), b"sealed", 1)
    move = build_move(gateway, TARGET, MOVE_ID)
    moving = build_moving(client, parse_stub_message(move), MoveStatus.MOVING, NONCE)
    for octets, before in ((get, None), (download, get), (move, None), (moving, move)):
        assert proved(octets, before, prf=algorithm)
        assert not proved(octets, before, sk_d=b"e" * 32, prf=algorithm)


@pytest.mark.parametrize(("octets", "before"), [(GET, None), (DOWNLOAD, GET), (MOVE, None), (MOVING, MOVE)])
@given(data=st.data())
def test_a_message_with_any_octet_altered_proves_nothing(
    octets: bytes, before: bytes | None, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(octets) - 1))
    changed = bytearray(octets)
    changed[position] ^= data.draw(st.integers(1, 255))
    with suppress(MalformedMessage):
        assert not proved(bytes(changed), before)


def test_an_answer_to_another_request_proves_nothing() -> None:
    other = build_get(CLIENT, b"m" * 32)
    assert proved(DOWNLOAD, GET)
    assert not proved(DOWNLOAD, other)
    assert not proved(MOVING, build_move(GATEWAY, TARGET, MOVE_ID + 1))


def test_no_message_proves_itself_as_another() -> None:
    """What one side said is nothing that the other side said, alone or as an answer."""
    messages = {"get": (GET, None), "download": (DOWNLOAD, GET), "move": (MOVE, None), "moving": (MOVING, MOVE)}
    for name, (octets, _) in messages.items():
        for before in (None, GET, DOWNLOAD, MOVE, MOVING):
            assert proved(octets, before) == (messages[name][1] == before)


def test_move_ids_grow_with_time_and_are_never_that_of_get_stub() -> None:
    ids = [move_message_id(now) for now in (0, 1_800_000_000, 1_800_000_001, 2**31 - 2)]
    assert ids == sorted(set(ids))
    assert ids[0] > GET_MESSAGE_ID
    assert move_message_id(2**31 - 1) > GET_MESSAGE_ID


sync = SyncPayload(False, *INDEX, ((Attribute.PROOF, bytes(32)),)).encode()
from_gateway = SyncPayload(True, *INDEX, ((Attribute.PROOF, bytes(32)),)).encode()
with_move = SyncPayload(False, *INDEX, (Move(MoveStatus.MOVING, TARGET).encode(),)).encode()
nonce = (PayloadType.NONCE, NONCE)


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(octets_of([nonce, (PayloadType.SYNC, sync)], exchange=34), id="another exchange"),
        pytest.param(octets_of([nonce, (PayloadType.SYNC, sync)], spi_r=bytes(8)), id="no SPIr"),
        pytest.param(octets_of([nonce]), id="no SYN"),
        pytest.param(octets_of([nonce, (PayloadType.SYNC, sync), (PayloadType.SYNC, sync)]), id="SYN twice"),
        pytest.param(octets_of([nonce, (PayloadType.SYNC, from_gateway)]), id="C without the flag R"),
        pytest.param(octets_of([nonce, (PayloadType.SYNC, sync)], flags=Flag.RESPONSE), id="the flag R without C"),
        pytest.param(octets_of([(PayloadType.SYNC, sync)]), id="no nonce"),
        pytest.param(octets_of([(PayloadType.NONCE, b"n" * 15), (PayloadType.SYNC, sync)]), id="a short nonce"),
        pytest.param(octets_of([nonce, (PayloadType.SYNC, sync)], message_id=0), id="message ID 0"),
        pytest.param(octets_of([nonce, (PayloadType.SYNC, sync)], message_id=MOVE_ID), id="no MOVE"),
        pytest.param(octets_of([nonce, (PayloadType.SYNC, with_move)]), id="MOVE with the ID of GET Stub"),
    ],
)
def test_a_message_that_breaks_a_rule_is_malformed(octets: bytes) -> None:
    with pytest.raises(MalformedMessage):
        parse_stub_message(octets)


@pytest.mark.parametrize("value", [b"", b"\1", b"\1abc", b"\x63" + bytes(4), bytes(18)])
def test_a_move_attribute_of_another_length_or_status_is_malformed(value: bytes) -> None:
    with pytest.raises(MalformedMessage):
        Move.decode(value)


@given(st.binary(max_size=300))
def test_arbitrary_octets_raise_nothing_but_malformed_message(octets: bytes) -> None:
    with suppress(MalformedMessage):
        parse_stub_message(octets)


@given(st.data())
def test_altered_messages_raise_nothing_but_malformed_message(data: st.DataObject) -> None:
    octets = bytearray(data.draw(st.sampled_from([GET, DOWNLOAD, MOVE, MOVING])))
    for _ in range(data.draw(st.integers(1, 8))):
        octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MalformedMessage):
        parse_stub_message(bytes(octets))


def test_an_announcement_and_what_follows_it_are_read_as_they_were_built() -> None:
    found = [parse_stub_message(octets) for octets in (ANNOUNCEMENT, PROBE, HERE, NOT_HERE, STAYS)]
    assert [message.move and message.move.status for message in found] == [
        MoveStatus.GONE,
        MoveStatus.PROBE,
        MoveStatus.HERE,
        MoveStatus.NOT_HERE,
        MoveStatus.GATEWAY_LIVES,
    ]
    assert {message.message_id for message in found} == {MOVE_ID}
    assert {message.move and message.move.target for message in found} == {TARGET}
    assert [message.sync.from_gateway for message in found] == [True, False, True, True, False]


def test_an_announcement_and_a_probe_prove_themselves_and_here_proves_itself_with_the_probe() -> None:
    assert proved(ANNOUNCEMENT)
    assert proved(PROBE)
    assert proved(HERE, PROBE)
    assert proved(STAYS, ANNOUNCEMENT)
    other = build_probe(CLIENT, parse_stub_message(ANNOUNCEMENT), b"m" * 32)
    assert not proved(HERE)
    assert not proved(HERE, other)
    assert proved(NOT_HERE, PROBE)
    assert not proved(NOT_HERE, other)
    assert not proved(STAYS, MOVE)
    for octets in (ANNOUNCEMENT, PROBE):
        assert not proved(octets, sk_d=b"?" * 32)


def test_a_move_is_no_announcement_and_the_other_way_round() -> None:
    """The status is under PROOF: altered, it proves nothing."""
    for octets, status in ((MOVE, MoveStatus.GONE), (ANNOUNCEMENT, MoveStatus.ASKED)):
        at = octets.index(bytes((0, 5, 0, 5))) + 4
        assert not proved(octets[:at] + bytes((status,)) + octets[at + 1 :])
