"""What is read of ipsec.conf (bridge.charon.ipsec_conf), and PFS that is configured in it."""

from __future__ import annotations

from pathlib import Path

from bridge.charon.conf_parser import ChildProposals
from bridge.charon.ipsec_conf import IpsecConf

TEXT = """\
config setup
    charondebug="ike 2"

conn %default
    dpddelay=30s
    esp=aes128-sha256-modp2048!

conn home   # the first
    right=192.0.2.1
    also=common

conn common
    esp="aes128gcm16,aes256"

conn work
    right=192.0.2.2
include more/*.conf
"""


def files(folder: Path) -> Path:
    (folder / "more").mkdir()
    (folder / "more/third.conf").write_text("conn third\n\tesp=aes256-ecp256\n")
    path = folder / "ipsec.conf"
    path.write_text(TEXT)
    return path


def test_options_come_from_the_connection_from_also_or_from_the_default(tmp_path: Path) -> None:
    conf = IpsecConf(files(tmp_path))
    assert conf.get("home", "right") == "192.0.2.1"
    assert conf.get("home", "esp") == "aes128gcm16,aes256"
    assert conf.get("home", "dpddelay") == "30s"
    assert conf.get("third", "esp") == "aes256-ecp256"
    assert conf.get("home", "left") is None
    assert [conf.has(name) for name in ("home", "third", "%default", "setup", "other")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_a_connection_is_its_child_and_its_group_is_pfs(tmp_path: Path) -> None:
    proposals = ChildProposals(tmp_path / "swanctl.conf", files(tmp_path))
    assert proposals.with_pfs(["home", "work", "third", "other"]) == {
        ("work", "work"): "modp2048",
        ("third", "third"): "ecp256",
    }
    assert proposals.unseen(["home", "other"]) == ["other"]


def test_swanctl_conf_counts_before_it(tmp_path: Path) -> None:
    swanctl = tmp_path / "swanctl.conf"
    swanctl.write_text("connections { work { children { net { esp_proposals = aes128gcm16 } } } }\n")
    proposals = ChildProposals(swanctl, files(tmp_path))
    assert not proposals.in_ipsec_conf("work")
    assert proposals.in_ipsec_conf("home")
    assert proposals.with_pfs(["work"]) == {}


def test_connections_that_take_each_other_end(tmp_path: Path) -> None:
    path = tmp_path / "ipsec.conf"
    path.write_text("conn a\n also=b\nconn b\n also=a\ninclude ipsec.conf\n")
    assert IpsecConf(path).get("a", "esp") is None
