"""Which CHILD_SAs come by CREATE_CHILD_SA, because other software waits for charon's event of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.charon.child_events import ChildEvents
from bridge.charon.conf_parser import ChildProposals
from bridge.charon.connection_reader import WANTING

HEAD = "Num       RefCount Protocol Flags    Type St Inode Path\n"
LISTENING = "0000000000000000: 00000002 00000000 00010000 0001 01 21222 /var/run/charon.lkp\n"
CLIENT = "0000000000000000: 00000003 00000000 00000000 0001 03 21299 /var/run/charon.lkp\n"
OTHER = "0000000000000000: 00000003 00000000 00000000 0001 03 21300 /run/charon.vici\n"


@pytest.mark.parametrize(
    ("plugins", "child", "needed"),
    [
        ((), "scripted", True),
        ((), "marked", False),
        (("farp", "vici"), "marked", False),
        (("connmark",), "marked", True),
        (("forecast",), "marked", True),
        (("connmark", "forecast"), "plain", False),
    ],
)
def test_scripts_and_plugins_that_act_on_marks(plugins: tuple[str, ...], child: str, needed: bool) -> None:
    events = ChildEvents(plugins, {("gw", "scripted")}, {("gw", "marked")}, sockets=Path("/nowhere"))
    assert events.needed("gw", child) is needed


@pytest.mark.parametrize(
    ("plugins", "sockets", "needed"),
    [
        (("lookip",), HEAD + LISTENING + OTHER, False),
        (("lookip",), HEAD + LISTENING + CLIENT, True),
        ((), HEAD + CLIENT, False),
    ],
)
def test_clients_of_lookip(tmp_path: Path, plugins: tuple[str, ...], sockets: str, needed: bool) -> None:
    (tmp_path / "unix").write_text(sockets)
    assert ChildEvents(plugins, sockets=tmp_path / "unix").needed("gw", "net") is needed


def test_options_of_children_are_found_in_both_kinds_of_configuration(tmp_path: Path) -> None:
    swanctl, ipsec = tmp_path / "swanctl.conf", tmp_path / "ipsec.conf"
    swanctl.write_text(
        "connections { a { children { one { mark_out = %unique } two { updown = /bin/x } three { } "
        "four { inactivity = 60s } } } }"
    )
    ipsec.write_text("conn b\n mark=%unique\nconn c\n leftupdown=/bin/x\nconn d\n auto=add\nconn e\n inactivity=60s\n")
    files = ChildProposals(swanctl, ipsec)
    names = ["a", "b", "c", "d", "e"]
    assert files.with_option(names, *WANTING) == {("a", "two"), ("a", "four"), ("c", "c"), ("e", "e")}
    assert files.with_option(names, ("mark_in", "mark_out"), ("mark",)) == {("a", "one"), ("b", "b")}
