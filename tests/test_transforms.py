"""The suite of an IKE_SA, its name and its proposal (bridge.ike.transforms), and fresh public values (groups)."""

from __future__ import annotations

import itertools
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, x448, x25519
from hypothesis import given
from hypothesis import strategies as st

from bridge.ike.key_exchange import fresh_public_value
from bridge.ike.transforms import (
    Encr,
    Group,
    Integ,
    Prf,
    Suite,
    UnsupportedSuite,
    check_resumable,
    child_name,
    proposes,
)

CLASSIC = Suite(12, 128, 12, 5, 31)
AEAD = Suite(20, 256, 0, 7, 20)
HYBRID = Suite(20, 256, 0, 6, 31, (36, 0, 37))


@pytest.mark.parametrize(
    ("suite", "name"),
    [
        (CLASSIC, "AES_CBC_128/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/CURVE_25519"),
        (AEAD, "AES_GCM_16_256/PRF_HMAC_SHA2_512/ECP_384"),
        (HYBRID, "AES_GCM_16_256/PRF_HMAC_SHA2_384/CURVE_25519/KE1_ML_KEM_768/KE3_ML_KEM_1024"),
        (Suite(3, 0, 2, 2, 2), "3DES_CBC/HMAC_SHA1_96/PRF_HMAC_SHA1/MODP_1024"),
        (Suite(99, 0, 98, 97, 96), "ENCR_99/INTEG_98/PRF_PRF_97/GROUP_96"),
    ],
)
def test_a_suite_is_named_as_strongswan_names_it(suite: Suite, name: str) -> None:
    assert suite.name == name


def test_the_proposal_of_a_suite_lists_its_transforms() -> None:
    # RFC 7296 section 3.3: proposal 1, IKE, no SPI, four transforms, the cipher with its key length
    assert CLASSIC.proposal().hex() == (
        "0000002c010100040300000c0100000c800e0080030000080300000c0300000802000005000000080400001f"
    )


@pytest.mark.parametrize("suite", [CLASSIC, AEAD, HYBRID])
def test_the_lengths_in_a_proposal_add_up(suite: Suite) -> None:
    octets = suite.proposal()
    last, _, length, number, protocol, spi_size, count = struct.unpack_from("!BBHBBBB", octets)
    assert (last, length, number, protocol, spi_size) == (0, len(octets), 1, 1, 0)
    offset, seen = 8, []
    while offset < len(octets):
        more, _, size, kind, _, _ = struct.unpack_from("!BBHBBH", octets, offset)
        seen.append(kind)
        offset += size
        assert more == (3 if offset < len(octets) else 0)
    assert len(seen) == count
    assert {1, 2, 4} <= set(seen)
    assert (3 in seen) != suite.is_aead


def test_an_aead_has_no_integrity_algorithm_and_a_salt() -> None:
    assert AEAD.is_aead
    assert (AEAD.integ_key_length, AEAD.encr_key_length, AEAD.salt_length, AEAD.tag_length) == (0, 36, 4, 16)


@pytest.mark.parametrize("prf", [Prf.HMAC_MD5, 3, 0])
def test_a_suite_whose_keys_cannot_be_derived_is_refused_by_name(prf: int) -> None:
    with pytest.raises(UnsupportedSuite, match="prf"):
        check_resumable(Suite(12, 128, 12, prf, 31))


@pytest.mark.parametrize("prf", [2, 4, 5, 6, 7, 8])
def test_every_other_prf_of_charon_is_served(prf: int) -> None:
    check_resumable(Suite(12, 128, 12, prf, 31))


def test_a_child_suite_is_named_too() -> None:
    assert child_name(Encr.AES_GCM_16, 128, 0, 0) == "AES_GCM_16_128"
    assert child_name(Encr.AES_CBC, 256, Integ.HMAC_SHA2_256_128, 1) == "AES_CBC_256/HMAC_SHA2_256_128/ESN"


@pytest.mark.parametrize("group", [group for group in Group if group is not Group.NONE])
def test_public_values_are_fresh(group: Group) -> None:
    first, second = fresh_public_value(group), fresh_public_value(group)
    assert first != second
    assert len(first) == len(second)


@pytest.mark.parametrize(
    ("group", "curve"),
    [(Group.ECP_256, ec.SECP256R1()), (Group.ECP_521, ec.SECP521R1()), (Group.ECP_384_BP, ec.BrainpoolP384R1())],
)
def test_a_public_value_of_a_curve_is_a_point_on_it(group: Group, curve: ec.EllipticCurve) -> None:
    ec.EllipticCurvePublicKey.from_encoded_point(curve, b"\x04" + fresh_public_value(group))


def test_a_public_value_of_brainpool_p224r1_is_a_point_on_it() -> None:
    # RFC 5639 section 3.3
    p = 0xD7C134AA264366862A18302575D1D787B09F075797DA89F57EC8C0FF
    a = 0x68A5E62CA9CE6C1C299803A6C1530B514E182AD8B0042A59CAD29F43
    b = 0x2580F63CCFE44138870713B1A92369E33E2135D266DBB372386C400B
    value = fresh_public_value(Group.ECP_224_BP)
    x, y = int.from_bytes(value[:28]), int.from_bytes(value[28:])
    assert (y * y - x**3 - a * x - b) % p == 0


@pytest.mark.parametrize(
    ("group", "octets"), [(Group.ML_KEM_512, 800), (Group.ML_KEM_768, 1184), (Group.ML_KEM_1024, 1568)]
)
def test_an_ml_kem_public_value_has_its_coefficients_below_q(group: Group, octets: int) -> None:
    # FIPS 203 section 7.2, the check of an encapsulation key
    value = fresh_public_value(group)
    packed = int.from_bytes(value[:-32], "little")
    coefficients = [packed >> 12 * n & 0xFFF for n in range((octets - 32) * 8 // 12)]
    assert len(value) == octets
    assert max(coefficients) < 3329


def test_public_values_of_montgomery_curves_have_their_length() -> None:
    x25519.X25519PublicKey.from_public_bytes(fresh_public_value(Group.CURVE_25519))
    x448.X448PublicKey.from_public_bytes(fresh_public_value(Group.CURVE_448))


@pytest.mark.parametrize(("group", "octets"), [(Group.MODP_2048, 256), (Group.MODP_4096, 512), (Group.ECP_224_BP, 56)])
def test_other_public_values_have_the_length_of_their_group(group: Group, octets: int) -> None:
    assert len(fresh_public_value(group)) == octets


def test_a_proposal_is_that_of_its_suite_in_any_order_and_of_no_other() -> None:
    suite = Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, Group.CURVE_25519, (Group.ML_KEM_768,))
    body = suite.proposal()
    assert proposes(body, suite)
    head, parts, at = body[:8], [], 8
    while at < len(body):
        length = int.from_bytes(body[at + 2 : at + 4])
        parts.append(body[at : at + length])
        at += length
    for order in itertools.permutations(parts):
        marked = [bytes((0 if part is order[-1] else 3,)) + part[1:] for part in order]
        assert proposes(head + b"".join(marked), suite)
    for other in (
        Suite(Encr.AES_CBC, 256, suite.integ, suite.prf, suite.group, suite.additional),
        Suite(suite.encr, 128, Integ.HMAC_SHA2_384_192, suite.prf, suite.group, suite.additional),
        Suite(suite.encr, 128, suite.integ, suite.prf, Group.ECP_256, suite.additional),
        Suite(suite.encr, 128, suite.integ, suite.prf, suite.group, (Group.ML_KEM_512,)),
        Suite(suite.encr, 128, suite.integ, suite.prf, suite.group),
    ):
        assert not proposes(other.proposal(), suite)
    # two proposals, another protocol, an SPI, and anything cut
    assert not proposes(bytes((2,)) + body[1:] + body, suite)
    assert not proposes(body[:5] + b"\x03" + body[6:], suite)
    assert not proposes(body[:6] + b"\x08" + body[7:], suite)
    assert not any(proposes(body[:end], suite) for end in range(len(body)))


@given(st.binary(max_size=100))
def test_arbitrary_octets_are_no_proposal(octets: bytes) -> None:
    suite = Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, Group.CURVE_25519)
    assert not proposes(octets, suite)
    assert not proposes(suite.proposal()[:8] + octets, suite) or octets == suite.proposal()[8:]
