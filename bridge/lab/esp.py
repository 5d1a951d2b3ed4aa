"""Which ESP this machine has: the kernel's, or charon's own in userspace."""

import enum
import os
import subprocess
from pathlib import Path

from bridge.lab.space import LabError


class Esp(enum.Enum):
    """The charon plugin that does ESP."""

    KERNEL = "kernel-netlink"
    USERSPACE = "kernel-libipsec"  # over a TUN device, always in UDP


def detect(namespace: str) -> Esp:
    """Try to add an ESP SA in a network namespace; where the kernel cannot, charon has to.

    LabError where neither works.
    """
    state = ["ip", "-n", namespace, "xfrm", "state"]
    identity = ["src", "192.0.2.1", "dst", "192.0.2.2", "proto", "esp", "spi", "0x100"]
    key = "0x" + "00" * 16
    added = subprocess.run(
        [*state, "add", *identity, "mode", "tunnel", "enc", "cbc(aes)", key, "auth", "hmac(sha256)", key],
        capture_output=True,
        check=False,
    )
    if added.returncode == 0:
        subprocess.run([*state, "delete", *identity], capture_output=True, check=False)
        return Esp.KERNEL
    tun = Path("/dev/net/tun")
    if not os.access(tun, os.W_OK):
        raise LabError(f"the kernel has no ESP (CONFIG_INET_ESP) and no {tun}: load the module esp4 or tun")
    return Esp.USERSPACE
