"""What a charon is told of a rebuilt IKE_SA (bridge.charon.install)."""

from __future__ import annotations

import pytest

from bridge.charon.ha import VERSIONS, Attr, IkeId, decode
from bridge.charon.install import Install, add_message, update_message
from bridge.charon.sa import Condition
from bridge.ike.transforms import Encr, Group, Prf, Suite
from bridge.stub import Endpoint, Identity

PLAIN, PRIVATE = int(Condition.NAT_ANY), int(Condition.PRIVATE) | 4
REBUILT = Install(
    id=IkeId.of(b"initiate", b"responds", False),
    suite=Suite(Encr.AES_GCM_16, 256, 0, Prf.HMAC_SHA2_384, Group.CURVE_25519, (Group.ML_KEM_768, 0, Group.ECP_384)),
    sk_d_old=bytes(48),
    nonce_i=bytes(32),
    nonce_r=bytes(range(32)),
    local_id=Identity(2, b"vpn.example.org"),
    remote_id=Identity(3, b"client@example.org"),
    eap_id=None,
    local=Endpoint("192.168.50.2", 4500),
    remote=Endpoint("192.168.50.10", 4500),
    connection="gw",
    conditions=(PLAIN, PRIVATE),
    extensions=(3, PRIVATE),
    local_vips=(),
    remote_vips=("10.20.1.1",),
)


@pytest.mark.parametrize("version", VERSIONS)
def test_further_key_exchanges_are_named_where_the_release_knows_them(version: int) -> None:
    message = decode(add_message(version, REBUILT, "198.18.0.8"))
    named = (Group.ML_KEM_768, 0, Group.ECP_384)
    expected = None if version == 3 else b"".join(group.to_bytes(2) for group in named)
    assert message.first(Attr.ALG_ADD_KES) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_no_secret_but_the_old_sk_d_goes_into_the_keys(version: int) -> None:
    message = decode(add_message(version, REBUILT, "198.18.0.8"))
    assert message.first(Attr.SECRET) == b""
    assert message.first(Attr.OLD_SKD) == REBUILT.sk_d_old
    assert message.first(Attr.ADD_SECRET) is None
    assert message.first(Attr.IKE_REKEY_ID) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_private_conditions_and_extensions_go_to_releases_that_know_them(version: int) -> None:
    message = decode(update_message(version, REBUILT, "198.18.0.8"))
    assert message.all(Attr.CONDITIONS) == ((PLAIN, PRIVATE) if version == 5 else (PLAIN,))
    assert message.all(Attr.EXTENSIONS) == ((3, PRIVATE) if version == 5 else (3,))
