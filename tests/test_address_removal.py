"""An address that goes from its interface (bridge.net.address_removal), in a network namespace of its own."""

from __future__ import annotations

import errno

import pytest

from bridge.net import address_watch
from bridge.net.address_removal import remove
from net_support import alone, run


@pytest.mark.parametrize(("address", "other"), [("10.20.1.1", "10.20.1.2"), ("fd20::1", "fd20::2")])
def test_one_address_goes(address: str, other: str) -> None:
    with alone():
        for each in (address, other):
            run("ip", "address", "add", each, "dev", "lo")
        remove(address)
        assert address not in address_watch.present()
        assert other in address_watch.present()
        with pytest.raises(OSError, match="keeps the address") as raised:
            remove(address)
        assert raised.value.errno == errno.ENODEV


@pytest.mark.parametrize("network", ["10.20.1.1/24", "fd20::1/64"])
def test_an_address_that_has_a_network_stays(network: str) -> None:
    with alone():
        run("ip", "address", "add", network, "dev", "lo")
        address, _ = network.split("/")
        with pytest.raises(OSError, match="keeps the address"):
            remove(address)
        assert address in address_watch.present()
