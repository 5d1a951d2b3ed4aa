"""Identities as octets, against the text that charon writes for them (bridge.charon.identity_text)."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from bridge.charon.identity_text import is_named
from bridge.stub.types import Identity, IdType


def name(*attributes: tuple[x509.ObjectIdentifier, str]) -> Identity:
    octets = x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes]).public_bytes()
    return Identity(IdType.ID_DER_ASN1_DN, octets)


ADMIN = name((NameOID.COUNTRY_NAME, "CH"), (NameOID.ORGANIZATION_NAME, "Corp, Inc."), (NameOID.COMMON_NAME, "admin"))


# as swanctl --list-sas of strongSwan 5.9.8, 6.0.1 and 6.1.0 shows them
@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (Identity(2, b"vpn.example.org"), "vpn.example.org"),
        (Identity(3, b"client@example.org"), "client@example.org"),
        (Identity(2, "münchen".encode()), "m??nchen"),
        (Identity(3, b"a\x00b\nc d"), "a?b?c d"),
        (Identity(1, bytes((192, 0, 2, 7))), "192.0.2.7"),
        (Identity(5, bytes.fromhex("20010db8000000000000000000000001")), "2001:db8::1"),
        (Identity(11, b"device 17"), "device 17"),
        (Identity(11, b"\x01\xff"), "01:ff"),
        (Identity(11, b"twenty printable oct"), b"twenty printable oct".hex(":")),
        (Identity(0, b""), "%any"),
        (ADMIN, "C=CH, O=Corp, Inc., CN=admin"),
        (name((NameOID.SURNAME, "Doe"), (NameOID.SERIAL_NUMBER, "7")), "SN=Doe, serialNumber=7"),
        (name((NameOID.SURNAME, "Doe"), (NameOID.SERIAL_NUMBER, "7")), "S=Doe, SN=7"),
        (name((NameOID.COMMON_NAME, "Zoë")), "CN=Zo??"),
    ],
)
def test_an_identity_is_the_one_that_charon_writes_so(identity: Identity, text: str) -> None:
    assert is_named(identity, text)


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (Identity(3, b"admin@example.org"), "client@example.org"),
        (Identity(3, b"client@example.org"), "client@example.or"),
        (Identity(1, bytes((192, 0, 2))), "192.0.2"),
        (ADMIN, "C=CH, O=Corp, Inc., CN=user"),
        (ADMIN, "C=CH, O=Corp, Inc."),
        (ADMIN, "C=CH, O=Corp, Inc., CN=admin, OU=more"),
        (ADMIN, "C=CH; O=Corp, Inc.; CN=admin"),
        (ADMIN, ""),
        # of what charon cannot write nothing can be said
        (Identity(10, b"general name"), "(ASN.1 general name)"),
        (Identity(4, bytes(8)), "0.0.0.0/0"),
        # charon cuts here
        (Identity(3, b"a" * 511), "a" * 511),
    ],
)
def test_another_identity_is_not(identity: Identity, text: str) -> None:
    assert not is_named(identity, text)


def test_a_name_cut_anywhere_is_none() -> None:
    for end in range(len(ADMIN.data)):
        assert not is_named(Identity(IdType.ID_DER_ASN1_DN, ADMIN.data[:end]), "C=CH, O=Corp, Inc., CN=admin")
    assert not is_named(Identity(IdType.ID_DER_ASN1_DN, ADMIN.data + b"\x00"), "C=CH, O=Corp, Inc., CN=admin")


@given(st.integers(0, 255), st.binary(max_size=300), st.text(max_size=300))
def test_arbitrary_octets_raise_nothing(kind: int, data: bytes, text: str) -> None:
    assert is_named(Identity(kind, data), text) in (True, False)
