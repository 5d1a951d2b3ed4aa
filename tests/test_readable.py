"""What people read of a stub without its key (bridge.stub.readable)."""

from __future__ import annotations

import msgspec
import pytest

from bank_support import stub_of
from bridge.ike.transforms import Encr, Group, Integ, Prf, Suite
from bridge.stub.readable import READABLE, readable_fields


@pytest.mark.parametrize(
    ("suite", "proposal"),
    [
        (
            Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, Group.CURVE_25519),
            "aes128-sha256-x25519",
        ),
        (
            Suite(Encr.AES_CBC, 256, Integ.HMAC_SHA1_160, Prf.HMAC_SHA1, Group.MODP_2048),
            "aes256-sha1_160-prfsha1-modp2048",
        ),
        (
            Suite(Encr.AES_GCM_16, 256, 0, Prf.HMAC_SHA2_384, Group.CURVE_25519, (Group.ML_KEM_768, 0, Group.ECP_384)),
            "aes256gcm16-prfsha384-x25519-ke1_mlkem768-ke3_ecp384",
        ),
    ],
)
def test_the_proposal_is_written_as_in_swanctl_conf(suite: Suite, proposal: str) -> None:
    """All that charon offers: tests/test_suites.py."""
    fields = readable_fields(msgspec.structs.replace(stub_of(), suite=suite))
    assert fields[READABLE.index("proposal")] == proposal
