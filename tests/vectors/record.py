"""Records test vectors from charon itself: what its ha plugin sends, and the keys it logs at `ike = 4`.

    python tests/vectors/record.py >tests/vectors/recorded-RELEASE.json

For each proposal: a session, and an IKE rekey by the client. The keys belong to labs that are gone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from typing import Any

from bridge.lab import Host, Lab, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until

PROPOSALS = (
    "aes128-sha1-prfsha1-modp2048",
    "aes256-sha384-prfsha384-ecp256",
    "aes128-sha512-prfsha512-curve25519",
    "aes128-aesxcbc-prfaesxcbc-curve25519",
    "aes128-aescmac-prfaescmac-curve25519",
    "aes128gcm16-prfsha256-ecp521",
    "aes256gcm16-prfsha512-curve448",
    "aes192ctr-sha256-prfsha256-modp3072",
    "chacha20poly1305-prfaesxcbc-ecp384bp",
)

RECORDER = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.2", 4510))
while True:
    print(sock.recv(65536).hex(), flush=True)
"""


def logged(log: str, name: str) -> list[str]:
    """Every value of a secret that charon logged, hex, in order."""
    found = []
    lines = log.splitlines()
    for number, line in enumerate(lines):
        match = re.search(rf"\[IKE\].* {re.escape(name)} => (\d+) bytes", line)
        if match:
            octets: list[str] = []
            for dump in lines[number + 1 :]:
                if len(octets) >= int(match[1]):
                    break
                octets += re.findall(r"\b[0-9A-F]{2}\b", dump.split(": ", 1)[1][:48])
            found.append("".join(octets[: int(match[1])]).lower())
    return found


def record(proposal: str) -> dict[str, Any]:
    """One proposal's vector."""
    with Lab() as lab:
        topology = standard(lab, start=False)
        recorders = {}
        for host in (topology.gw1, topology.client):
            host.charon.settings |= {
                "charon.filelog.lab.ike": 4,
                "charon.send_vendor_id": "no",
            }
            connections = ("gw",) if host is topology.gw1 else ("home", "home-gw2")
            host.configure(
                render({f"connections.{name}.proposals": proposal for name in connections}) + "\n", "proposal.conf"
            )
            output = (host.directory / "ha.hex").open("w")
            recorders[host.name] = host.popen(sys.executable, "-c", RECORDER, stdout=output)
            wait_until(lambda host=host: "127.0.0.2:4510" in host.run("ss", "-Huan").stdout, "the recorder")  # type: ignore[misc]
            host.charon.start()
        topology.connect()
        topology.client.swanctl("--rekey", "--ike", "home")
        wait_until(lambda: len(logged(topology.client.charon.text(), "Sk_d secret")) == 2, "the rekey")
        wait_until(lambda: len(topology.gw1.charon.sas()) == 1, "the end of the old SA")
        messages = {name: messages_of(host) for name, host in (("gateway", topology.gw1), ("client", topology.client))}
        for process in recorders.values():
            process.kill()
            process.wait()
        log = topology.client.charon.text()
        seeds, keys = logged(log, "SKEYSEED"), logged(log, "Sk_d secret")
        version = topology.client.charon.vici().version()["version"].decode()
        return {
            "proposal": proposal,
            "strongswan": version,
            "initial": {"skeyseed": seeds[0], "sk_d": keys[0]},
            "rekeyed": {"skeyseed": seeds[1], "sk_d": keys[1]},
        } | messages


def messages_of(host: Host) -> list[str]:
    """The HA messages charon sent on a host, hex."""
    return (host.directory / "ha.hex").read_text().split()


def main() -> None:
    vectors = []
    for proposal in PROPOSALS:
        print(textwrap.shorten(proposal, 60), file=sys.stderr)
        try:
            vectors.append(record(proposal))
        except (subprocess.SubprocessError, IndexError) as error:
            print(f"  not recorded: {error}", file=sys.stderr)
    json.dump(vectors, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
