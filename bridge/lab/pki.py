"""Certificates for the hosts of a lab, made with strongSwan's own tool."""

from __future__ import annotations

from collections.abc import Mapping

from bridge.lab.host import Host

KINDS = {"rsa": 2048, "ecdsa": 256, "ed25519": None}
"""key types of pki, with their size in bits"""
CA_NAME = "CN=lab"

_SCRIPT = """set -e
mkdir -p {work} && cd {work}
pki --gen {generate} --outform pem >ca.key
pki --self --ca --in ca.key --dn "{ca}" --outform pem >ca.pem
"""
_ISSUE = """
pki --gen {generate} --outform pem >{name}.key
pki --pub --in {name}.key >{name}.pub
pki --issue --in {name}.pub --type pub --cacert ca.pem --cakey ca.key --dn "{dn}" --san {san} --outform pem >{name}.pem
"""


def certify(kind: str, hosts: Mapping[Host, tuple[str, str]]) -> None:
    """Make an authority with keys of `kind`, and for each host a certificate with a distinguished name and one more.
    Each host then has `<kind>.pem` in swanctl's folders, and the authority's as `<kind>-ca.pem`."""
    maker = next(iter(hosts))
    work = f"/run/pki-{kind}"
    size = KINDS[kind]
    generate = f"--type {kind}" + (f" --size {size}" if size else "")
    script = _SCRIPT.format(work=work, generate=generate, ca=CA_NAME)
    for host, (dn, san) in hosts.items():
        script += _ISSUE.format(generate=generate, name=host.name, dn=dn, san=san)
    maker.run("sh", "-c", script)
    made = maker.path(work)
    for host in hosts:
        target = host.etc / "swanctl"
        for source, place in (
            (f"{host.name}.key", f"private/{kind}.key"),
            (f"{host.name}.pem", f"x509/{kind}.pem"),
            ("ca.pem", f"x509ca/{kind}-ca.pem"),
        ):
            (target / place).parent.mkdir(exist_ok=True)
            (target / place).write_bytes((made / source).read_bytes())
            (target / place).chmod(0o600)
