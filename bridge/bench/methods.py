"""The ways to authenticate that handshakes are measured with, as swanctl.conf of gateway and client."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.lab.host import Host
from bridge.lab.pki import certify

METHODS = {"PSK": "home-gw2", "ECDSA": "bench-ecdsa", "EAP-MSCHAPv2": "bench-eap"}
"""the client's connection of each"""
PASSWORD = "of the benchmark's lab only"  # noqa: S105
_CHILD = "children { net { %s = 10.10.0.0/16\n esp_proposals = aes128gcm16-aes256gcm16,aes128-sha256\n } }"
_SECRETS = 'secrets {{ eap-bench {{ id = bench\n secret = "{password}"\n }} }}\n'

_GATEWAY = """
connections {{
    bench-ecdsa {{
        version = 2
        pools = clients
        dpd_delay = 0s
        local {{ auth = pubkey
            certs = ecdsa.pem
            id = ecdsa.example.org
        }}
        remote {{ auth = pubkey
            id = *.ecdsa.example.org
        }}
        {child}
    }}
    bench-eap {{
        version = 2
        pools = clients
        dpd_delay = 0s
        local {{ auth = pubkey
            certs = ecdsa.pem
            id = ecdsa.example.org
        }}
        remote {{ auth = eap-mschapv2
            eap_id = %any
            id = *.eap.example.org
        }}
        {child}
    }}
}}
"""

_CLIENT = """
connections {{
    bench-ecdsa {{
        version = 2
        remote_addrs = {gateway}
        vips = 0.0.0.0
        local {{ auth = pubkey
            certs = ecdsa.pem
            id = {name}.ecdsa.example.org
        }}
        remote {{ auth = pubkey
            id = ecdsa.example.org
        }}
        {child}
    }}
    bench-eap {{
        version = 2
        remote_addrs = {gateway}
        vips = 0.0.0.0
        local {{ auth = eap-mschapv2
            eap_id = bench
            id = {name}.eap.example.org
        }}
        remote {{ auth = pubkey
            id = ecdsa.example.org
        }}
        {child}
    }}
}}
"""


def configure(gateway: Host, clients: Sequence[Host]) -> None:
    """Have the clients know all METHODS with a gateway of the standard lab; certificates are ECDSA P-256."""
    names = {gateway: ("CN=ecdsa.example.org", "ecdsa.example.org")}
    for client in clients:
        name = f"{client.name}.ecdsa.example.org"
        names[client] = (f"CN={name}", name)
    certify("ecdsa", names)
    secrets = _SECRETS.format(password=PASSWORD)
    gateway.configure(_GATEWAY.format(child=_CHILD % "local_ts") + secrets, "bench.conf")
    for client in clients:
        text = _CLIENT.format(gateway=gateway.address, name=client.name, child=_CHILD % "remote_ts")
        client.configure(text + secrets, "bench.conf")
