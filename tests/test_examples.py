"""The example configurations of strongswan-conf/: charon loads each, and a session that they make is resumed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bridge.lab import Topology
from bridge.lab.charon import render
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host
from bridge.lab.topology import DPD_DELAY, SITE
from bridge.service import shipped_files
from failover_support import connect, established, fresh, resume, the_sa

pytestmark = pytest.mark.lab

EXAMPLES = {
    "roadwarrior-eap": "alice",
    "roadwarrior-cert": "client@example.org",
    "site-to-site": "branch.example.org",
}
BRANCH = "10.30.0.1"
PASSWORD = 'secrets { eap-alice { id = alice\n secret = "open sesame" } }\n'


def pki(*arguments: str) -> str:
    return subprocess.run(("pki", *arguments), check=True, capture_output=True, text=True).stdout


def issue(directory: Path, file: str, name: str) -> None:
    """A key and a certificate of the CA for a name, as <file>.key and <file>.pem."""
    key, certificate = directory / f"{file}.key", directory / f"{file}.pem"
    key.write_text(pki("--gen", "--type", "ecdsa", "--size", "256", "--outform", "pem"))
    ca = ("--cacert", str(directory / "ca.pem"), "--cakey", str(directory / "ca.key"))
    what = ("--in", str(key), "--type", "ecdsa", "--dn", f"CN={name}", "--san", name, "--outform", "pem")
    certificate.write_text(pki("--issue", *ca, *what))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    key = directory / "ca.key"
    key.write_text(pki("--gen", "--type", "ecdsa", "--size", "256", "--outform", "pem"))
    what = ("--in", str(key), "--type", "ecdsa", "--dn", "CN=CA", "--ca", "--outform", "pem")
    (directory / "ca.pem").write_text(pki("--self", *what))
    for file, name in {
        "vpn": "vpn.example.org",
        "client": "client@example.org",
        "branch": "branch.example.org",
    }.items():
        issue(directory, file, name)
    return directory


def set_up(host: Host, example: str, role: str, certificates: Path, own: str | None) -> None:
    """The example as the host's swanctl.conf, with the files that its first lines name."""
    swanctl = host.etc / "swanctl"
    shutil.copy(shipped_files.path(f"strongswan-conf/{example}/{role}.conf"), swanctl / "swanctl.conf")
    for folder in ("x509", "x509ca", "private"):
        shutil.rmtree(swanctl / folder, ignore_errors=True)
        (swanctl / folder).mkdir()
    shutil.copy(certificates / "ca.pem", swanctl / "x509ca/ca.pem")
    if own is not None:
        shutil.copy(certificates / f"{own}.pem", swanctl / f"x509/{own}.pem")
        shutil.copy(certificates / f"{own}.key", swanctl / f"private/{own}.pem")
    host.configure(PASSWORD if example == "roadwarrior-eap" else "", "secrets.conf")
    # in place of the lab's own settings, which name its client
    host.configure(render({"connections.home.dpd_delay": DPD_DELAY}) if role == "client" else "")
    host.charon.load()


def session(topology: Topology, example: str) -> dict[str, Any]:
    """The client's session at gw1, with its stub complete in the bank. Gives the client's IKE_SA."""
    if example != "site-to-site":
        return connect(topology)
    # it starts by itself
    wait_until(
        lambda: bool(established(topology.client)) and len(topology.bank.stubs()) == 1, "the session and its stub"
    )
    wait_until(lambda: answered(topology, example), "traffic")
    return the_sa(topology.client)


def answered(topology: Topology, example: str) -> bool:
    source = ("-I", BRANCH) if example == "site-to-site" else ()
    told = topology.client.run("ping", "-n", "-c", "1", "-W", "2", *source, SITE, check=False).stdout
    return " bytes from " in told


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_session_of_the_example_is_resumed(topology: Topology, certificates: Path, example: str) -> None:
    fresh(topology)
    own = {"roadwarrior-eap": None, "roadwarrior-cert": "client", "site-to-site": "branch"}[example]
    for gateway in (topology.gw1, topology.gw2):
        set_up(gateway, example, "gateway", certificates, "vpn")
        # it looks for new connections of charon's every half a minute, and at its start
        topology.gateways[gateway.name].stop()
        topology.gateways[gateway.name].start()
    if example == "site-to-site":
        topology.client.run("ip", "address", "replace", f"{BRANCH}/32", "dev", "lo")
    set_up(topology.client, example, "client", certificates, own)
    before = session(topology, example)
    gateway_sa = the_sa(topology.gw1)
    assert gateway_sa.get("remote-eap-id", gateway_sa["remote-id"]) == EXAMPLES[example]
    topology.kill_gateway(topology.gw1)
    outcome = resume(topology)
    assert (outcome["result"], outcome["children"]) == ("resumed", ["net"]), outcome
    after, gateway_sa = the_sa(topology.client), the_sa(topology.gw2)
    assert after.get("local-vips") == before.get("local-vips")
    assert gateway_sa.get("remote-eap-id", gateway_sa["remote-id"]) == EXAMPLES[example]
    wait_until(lambda: answered(topology, example), "traffic")
