"""What a request gets that no client of ours sends, and that the lab's suite cannot show (bridge.gateway.rebuild)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import msgspec
import pytest

from bank_support import keyring, stub_of
from bridge.bank.interface import StubBank
from bridge.charon.charon import Charon
from bridge.config import SyncConfig
from bridge.gateway.addresses import AddressHolders
from bridge.gateway.admission import Admission
from bridge.gateway.client_stubs import ClientStubs
from bridge.gateway.decision import Decision
from bridge.gateway.endings import Endings
from bridge.gateway.known_sessions import KnownSessions
from bridge.gateway.living import LivingSas
from bridge.gateway.rebuild import Rebuilder
from bridge.gateway.refusal import Refusal
from bridge.gateway.revocation import Revocations
from bridge.gateway.unconfirmed import Unconfirmed
from bridge.ike.cookie import Cookies
from bridge.ike.resumption_request import build_request, parse_request
from bridge.ike.transforms import PRF_OUTPUT, Encr, Group, Prf, Suite
from bridge.net.interface import Packet


class CharonWithoutConnections:
    def connection(self, name: str) -> None: ...


def decided(
    prf: Prf,
    nonce: bytes,
    *,
    proven: bool = True,
    asked: Callable[[Suite], Suite] = lambda suite: suite,
    **changes: int,
) -> Any:
    """What a request gets that names a stub of an SA with this prf, at a charon that has no connection for it."""
    stub = msgspec.structs.replace(stub_of(), **changes)
    stub = msgspec.structs.replace(stub, suite=msgspec.structs.replace(stub.suite, prf=prf))
    octets = build_request(
        spi_i=b"I" * 8,
        suite=asked(stub.suite),
        ke_value=bytes(32),
        nonce=nonce,
        sync_index=(stub.index.gateway, stub.index.spi),
        prf=prf,
        sk_d_old=stub.sk_d if proven else None,
    )
    request = parse_request(octets)
    assert request is not None
    charon, sync = cast(Charon, CharonWithoutConnections()), SyncConfig(proof="required" if proven else "optional")
    decision = Decision(
        charon,
        KnownSessions(Endings(), cast(LivingSas, None), Revocations(cast(StubBank, None), keyring())),
        cast(Unconfirmed, None),
        Admission(SyncConfig(), Cookies(), lambda source: 0),
        cast(AddressHolders, None),
        sync,
        Rebuilder(charon, cast(ClientStubs, None), sync),
    )
    return decision.of(cast(Packet, None), request, b"", stub)


# that of a stub of release 0.1 ends when its IKE_SA was to be reauthenticated
@pytest.mark.parametrize("field", ["authenticated_until", "reauth_at"])
def test_a_session_whose_authentication_has_ended_is_refused(field: str) -> None:
    now = int(time.time())
    assert (
        decided(Prf.HMAC_SHA2_256, bytes(32), proven=True, asked=lambda suite: suite, **{field: now - 1})
        is Refusal.AUTHENTICATION_ENDED
    )
    # goes on to the next question
    assert (
        decided(Prf.HMAC_SHA2_256, bytes(32), proven=True, asked=lambda suite: suite, **{field: now + 60})
        is Refusal.CONNECTION_MISSING
    )


@pytest.mark.parametrize("proven", [True, False])
@pytest.mark.parametrize("prf", [prf for prf in PRF_OUTPUT if PRF_OUTPUT[prf] > 32])
def test_a_nonce_of_less_than_half_the_key_size_of_the_prf_is_refused(prf: Prf, proven: bool) -> None:
    half = PRF_OUTPUT[prf] // 2
    assert decided(prf, bytes(half - 1), proven=proven) is Refusal.NONCE_SHORT
    # goes on to the next question
    assert decided(prf, bytes(half), proven=proven) is Refusal.CONNECTION_MISSING


@pytest.mark.parametrize(
    "change",
    [{"encr": Encr.AES_CTR}, {"encr_len": 192}, {"integ": 0}, {"group": Group.MODP_2048}, {"prf": Prf.AES128_XCBC}],
)
@pytest.mark.parametrize("proven", [True, False])
def test_a_request_with_another_proposal_or_group_than_the_old_sas_is_refused(
    change: dict[str, int], proven: bool
) -> None:
    def asked(suite: Suite) -> Suite:
        return msgspec.structs.replace(suite, **change)

    assert decided(Prf.HMAC_SHA2_256, bytes(32), proven=proven, asked=asked) is Refusal.PROPOSAL_DIFFERS
