"""Records test vectors from charon itself: what its ha plugin sends, and the keys it logs at `ike = 4`.

    python tests/vectors/record.py bookworm >tests/vectors/recorded-5.9.8.json
    python tests/vectors/record.py trixie >tests/vectors/recorded-6.0.1.json
    python tests/vectors/record.py forky >tests/vectors/recorded-6.1.0.json

For each proposal: a session, and an IKE rekey, from `A > B` one that changes the algorithms. The keys belong to labs
that are gone. Releases that are not this machine's own have to be installed (`python -m bridge.lab.releases`).
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from typing import Any

from bridge.lab import Host, Lab, LabError, standard
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until

PROPOSALS = {
    "bookworm": (
        "aes128-sha1-prfsha1-modp2048",
        "aes256-sha384-prfsha384-ecp256",
        "aes128-sha512-prfsha512-curve25519",
        "aes128-aesxcbc-prfaesxcbc-curve25519",
        "aes128-aescmac-prfaescmac-curve25519",
        "aes128gcm16-prfsha256-ecp521",
        "aes256gcm16-prfsha512-curve448",
        "aes192ctr-sha256-prfsha256-modp3072",
        "chacha20poly1305-prfaesxcbc-ecp384bp",
    ),
    "trixie": (
        "aes128-sha256-x25519",
        "aes256gcm16-prfsha384-x25519-ke1_ecp384",
        "aes128-aesxcbc-prfaesxcbc-ecp256-ke1_modp3072-ke3_curve448",
        "aes128-sha256-prfsha256-x25519 > aes128-sha256-prfsha512-x25519",
        "aes128-sha256-prfsha512-x25519 > aes128-sha256-prfaescmac-x25519",
    ),
    "forky": (
        "aes128-sha256-x25519",
        "aes256gcm16-prfsha384-x25519-ke1_mlkem768",
        "aes128-sha256-mlkem512",
        "aes256-sha512-prfaescmac-ecp384-ke1_mlkem1024-ke2_mlkem512-ke7_modp2048",
    ),
}

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


def record(release: str, proposal: str) -> dict[str, Any]:
    """One proposal's vector."""
    # a first SA derives keys once for each of its key exchanges (RFC 9370 section 2.2.2), a rekeyed one once for all
    last = len(re.findall(r"-ke\d_", proposal))
    with Lab() as lab:
        topology = standard(lab, start=False, releases=dict.fromkeys(("gw1", "gw2", "client"), release))
        recorders = {}
        for host in (topology.gw1, topology.client):
            host.charon.settings |= {
                "charon.filelog.lab.ike": 4,
                "charon.send_vendor_id": "no",
            }
            # each side takes from the other's proposals the first of its own
            proposals = proposal.split(" > ")
            connections = ["gw"]
            if host is topology.client:
                connections = ["home", "home-gw2"]
                proposals.reverse()
            own = {f"connections.{name}.proposals": ",".join(proposals) for name in connections}
            host.configure(render(own) + "\n", "proposal.conf")
            output = (host.directory / "ha.hex").open("w")
            recorders[host.name] = host.popen(sys.executable, "-c", RECORDER, stdout=output)
            wait_until(lambda host=host: "127.0.0.2:4510" in host.run("ss", "-Huan").stdout, "the recorder")  # type: ignore[misc]
            host.charon.start()
        topology.connect()
        topology.gw1.swanctl("--rekey", "--ike", "gw")
        wait_until(lambda: len(logged(topology.client.charon.text(), "Sk_d secret")) == last + 2, "the rekey")
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
            "initial": {"skeyseed": seeds[last], "sk_d": keys[last]},
            "rekeyed": {"skeyseed": seeds[last + 1], "sk_d": keys[last + 1]},
        } | messages


def messages_of(host: Host) -> list[str]:
    """The HA messages charon sent on a host, hex."""
    return (host.directory / "ha.hex").read_text().split()


def main() -> None:
    [release] = sys.argv[1:]
    vectors = []
    for proposal in PROPOSALS[release]:
        print(textwrap.shorten(proposal, 60), file=sys.stderr)
        try:
            vectors.append(record(release, proposal))
        except (LabError, IndexError) as error:
            print(f"  not recorded: {error}", file=sys.stderr)
    json.dump(vectors, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
