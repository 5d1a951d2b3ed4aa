"""What is held back while segments of charon's change hands, and what a failure of that does. The packet filter itself:
test_interception."""

from __future__ import annotations

import errno

import pytest

from bridge.config import InterceptConfig
from bridge.gateway.interception import Interception
from bridge.net.packet import may_begin_handshake
from bridge.net.queue_rules import iptables_text, nftables_text

IKEV1, IKEV2 = 0x10, 0x20
INITIATOR, RESPONSE = 0x08, 0x20
MAIN_MODE, AGGRESSIVE_MODE, IKE_SA_INIT, IKE_AUTH = 2, 4, 34, 35


@pytest.mark.parametrize(
    ("version", "exchange", "flags", "begins"),
    [
        (IKEV2, IKE_SA_INIT, INITIATOR, True),
        (IKEV2, IKE_SA_INIT, RESPONSE, False),
        (IKEV2, IKE_AUTH, INITIATOR, False),
        # charon does not look at the flags of IKEv1
        (IKEV1, MAIN_MODE, 0, True),
        (IKEV1, MAIN_MODE, RESPONSE, True),
        (IKEV1, AGGRESSIVE_MODE, 0, True),
        (IKEV1, AGGRESSIVE_MODE, RESPONSE, True),
    ],
)
def test_what_may_begin_a_handshake(version: int, exchange: int, flags: int, begins: bool) -> None:
    message = bytes([1] * 8) + bytes(8) + bytes([33, version, exchange, flags]) + bytes(8)
    assert may_begin_handshake(message) is begins


BEGINNINGS = ("0x00002200", "0x00000200", "0x00000400", "0x00000220", "0x00000420")


def test_the_packet_filter_holds_the_same_back() -> None:
    assert f"{{ {', '.join(BEGINNINGS)} }} meta l4proto @activating goto held" in nftables_text(1, "first")
    for family in ("ip", "ip6"):
        text = iptables_text(1, "first", family, True)
        assert f'={",".join(BEGINNINGS)}" -g ike-sa-sync-hold\n' in text


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOBUFS])
def test_an_order_that_the_kernel_does_not_take_ends_no_activation(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Queue:
        def get_fd(self) -> int:
            raise OSError(error, "refused")

    interception = Interception(
        InterceptConfig(rules="external"), lambda _: None, lambda: False, lambda: False, tag=b"\1\2"
    )
    monkeypatch.setattr(interception._interceptor, "_queue", Queue())
    with interception.holding() as holds:
        assert not holds()
