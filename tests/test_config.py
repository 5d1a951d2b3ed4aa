"""The YAML configuration (bridge.config), and what the commands make of a bad one."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bridge.config import ClientConfig, ConfigError, GatewayConfig, HaConfig, parse_host_port
from bridge.service.config_file import check_together, load, role_of

GATEWAY = """
address: 192.168.50.1
vici: /run/charon.vici
ha: {listen: 127.0.0.2, charon: 127.0.0.1, segments: 16}
bank:
  url: redis://127.0.0.1:6379/0
  key_file: /etc/ike-sa-sync/bank.key
sync: {proof: required, confirm_timeout: 10, cookie_threshold: 100}
control: /run/ike-sa-sync/gateway.sock
metrics: 127.0.0.1:9470
"""

CLIENT = """
vici: /run/charon.vici
ha: {listen: 127.0.0.2, charon: 127.0.0.1}
control: /run/ike-sa-sync/client.sock
gateways:
  - address: 192.168.50.1
    connection: home
  - address: 192.168.50.2
    connection: home-gw2
resume_on_down: true
"""


def _file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_the_documented_gateway_file_is_read_as_written(tmp_path: Path) -> None:
    config = load(_file(tmp_path, GATEWAY), GatewayConfig)
    assert config.address == "192.168.50.1"
    assert config.ha.segments == 16
    assert config.bank.url == "redis://127.0.0.1:6379/0"
    assert config.sync.proof == "required"


def test_the_documented_client_file_is_read_as_written(tmp_path: Path) -> None:
    config = load(_file(tmp_path, CLIENT), ClientConfig)
    assert [(entry.address, entry.connection) for entry in config.gateways] == [
        ("192.168.50.1", "home"),
        ("192.168.50.2", "home-gw2"),
    ]
    assert config.resume_on_down


PEERS = "peers: {192.168.50.2: 'redis://192.168.50.2'}"


def test_a_gateway_with_a_bank_of_its_own_names_those_of_its_peers(tmp_path: Path) -> None:
    text = """
address: 2001:DB8::1
bank:
  mode: distributed
  url: redis://127.0.0.1
  peers: {'2001:DB8:0::2': 'redis://[2001:db8::2]', 192.168.50.3: rediss://192.168.50.3}
  targets: ['2001:db8::2']
"""
    bank = load(_file(tmp_path, text), GatewayConfig).bank
    assert list(bank.peers) == ["2001:db8::2", "192.168.50.3"]
    assert bank.targets == ("2001:db8::2",)
    assert bank.copies == 1


@pytest.mark.parametrize(
    ("bank", "error"),
    [
        ("mode: both", "bank.mode: invalid enum value 'both'"),
        (PEERS, "bank.peers: has no meaning in mode centralised"),
        ("local: redis://127.0.0.1", "bank.local: has no meaning in mode centralised"),
        (f"mode: distributed, {PEERS}", "bank.url: is needed in mode distributed"),
        ("mode: mixed", "bank.url: is needed in mode mixed"),
        ("mode: distributed, url: redis://127.0.0.1", "bank.peers: is needed in mode distributed"),
        (
            f"mode: distributed, url: redis://127.0.0.1, local: redis://127.0.0.1, {PEERS}",
            "bank.local: has no meaning in mode distributed",
        ),
        (
            f"mode: distributed, url: redis://127.0.0.1, {PEERS}, targets: [192.168.50.3]",
            "bank.targets: 192.168.50.3 is not among bank.peers",
        ),
        (
            f"mode: distributed, url: redis://127.0.0.1, {PEERS}, targets: [gw3]",
            "bank.targets: 'gw3' is not an IP address",
        ),
        (
            "mode: mixed, url: redis://127.0.0.1, peers: {gw2: redis://gw2}",
            "bank.peers: 'gw2' is not an IP address",
        ),
        (
            "mode: mixed, url: redis://127.0.0.1, peers: {192.168.50.2: 'http://:s3cret@192.168.50.2'}",
            "bank.peers.192.168.50.2: must start with one of redis://",
        ),
        (
            "mode: mixed, url: redis://127.0.0.1, peers: {192.168.50.1: redis://192.168.50.1}",
            "bank.peers: 192.168.50.1 is this gateway itself",
        ),
        (
            f"mode: distributed, url: redis://127.0.0.1, {PEERS}, peer_timeout: 1.5",
            "bank.peer_timeout: must be less than get_timeout, which is 1",
        ),
    ],
)
def test_options_of_the_bank_that_do_not_go_together_are_named(tmp_path: Path, bank: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(_file(tmp_path, f"address: 192.168.50.1\nbank: {{{bank}}}\n"), GatewayConfig)
    assert error in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_gateway_file_means_the_defaults(tmp_path: Path) -> None:
    assert load(_file(tmp_path, ""), GatewayConfig) == GatewayConfig()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("adress: 192.168.50.1", "adress"),
        ("address: gateway", "address"),
        ("bank: {url: 'http://127.0.0.1'}", "bank.url"),
        ("bank: {url: 'redis+sentinel://127.0.0.1'}", "bank.url"),
        ("bank: {url: 'redis://127.0.0.1:nowhere/0'}", "bank.url"),
        ("bank: {urls: 1}", "bank.urls"),
        ("sync: {proof: maybe}", "sync.proof"),
        ("sync: {confirm_timeout: 0}", "sync.confirm_timeout"),
        ("ha: {segments: 17}", "ha.segments"),
        ("ha: {listen: 127.0.0.1}", "ha.listen"),
        ("metrics: nowhere", "metrics"),
        ("- a\n- b", "file"),
        ("address: [", "YAML"),
        # what PyYAML itself stumbles over, and a line break in a key
        ("address: 2001-99-99", "quote it"),
        ("address: 0x_", "quote it"),
        ("address: !!int ''", "quote it"),
        ("address: !!timestamp x", "quote it"),
        ("address: " + "[" * 3000, "quote it"),
        ("address: " + "9" * 5000, "quote it"),
        ('"a\\nb": 1', "a\\nb"),
    ],
)
def test_a_bad_file_is_one_line_with_file_key_and_reason(tmp_path: Path, text: str, key: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, GatewayConfig)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert key in line
    assert "\n" not in line


def test_a_gateway_may_be_named(tmp_path: Path) -> None:
    config = load(_file(tmp_path, "gateways: [{address: vpn.example.org, connection: home}]"), ClientConfig)
    assert config.gateways[0].address == "vpn.example.org"


@pytest.mark.parametrize("address", ["192.0.2", "192.0.2.300", "-vpn", "vpn..example", "", "a b"])
def test_what_is_neither_address_nor_name_is_refused(tmp_path: Path, address: str) -> None:
    text = f"vpns: {{a: {{gateways: [{{address: '{address}', connection: home}}]}}}}"
    with pytest.raises(ConfigError, match=r"vpns\.a\.gateways\[0\]\.address"):
        load(_file(tmp_path, text), ClientConfig)


def test_a_connection_belongs_to_one_vpn(tmp_path: Path) -> None:
    vpn = "{gateways: [{address: 192.0.2.1, connection: home}]}"
    with pytest.raises(ConfigError, match="connection 'home' is in VPN 'a' too"):
        load(_file(tmp_path, f"vpns: {{a: {vpn}, b: {vpn}}}"), ClientConfig)


def test_the_vpn_of_gateways_has_a_name_that_no_other_may_have(tmp_path: Path) -> None:
    entry = "[{address: 192.0.2.1, connection: home}]"
    with pytest.raises(ConfigError, match=r"vpns\.default"):
        load(_file(tmp_path, f"gateways: {entry}\nvpns: {{default: {{gateways: {entry}}}}}"), ClientConfig)


def test_a_password_in_a_bad_url_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(_file(tmp_path, "bank: {url: 'http://:secret@127.0.0.1'}"), GatewayConfig)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("role", ["gateway", "client"])
def test_a_command_with_a_bad_file_prints_one_line_and_exits_with_2(tmp_path: Path, role: str) -> None:
    path = _file(tmp_path, "nonsense: 1")
    done = subprocess.run(
        [sys.executable, "-m", "bridge", role, "-c", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr
    assert "nonsense" in done.stderr


@pytest.mark.parametrize(("text", "pair"), [("127.0.0.1:9470", ("127.0.0.1", 9470)), ("[::1]:80", ("::1", 80))])
def test_an_address_with_port_is_split(text: str, pair: tuple[str, int]) -> None:
    assert parse_host_port(text) == pair


def test_addresses_are_compared_in_their_canonical_form(tmp_path: Path) -> None:
    assert load(_file(tmp_path, "address: FD00:50:0::1"), GatewayConfig).address == "fd00:50::1"
    text = "gateways: [{address: 'FD00:50:0::2', connection: home}]"
    assert load(_file(tmp_path, text), ClientConfig).gateways[0].address == "fd00:50::2"


@pytest.mark.parametrize("key", ["client_stub", "forward_secrecy"])
def test_off_needs_no_quotes(tmp_path: Path, key: str) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"sync: {{{key}: off}}\n")
    assert getattr(load(file, GatewayConfig).sync, key) == "off"


A_GATEWAY, A_CLIENT = GatewayConfig(), ClientConfig()


def test_a_gateway_and_a_client_run_beside_one_charon() -> None:
    check_together([A_GATEWAY])
    check_together([A_GATEWAY, A_CLIENT])


@pytest.mark.parametrize(
    ("configs", "error"),
    [
        ([A_GATEWAY, A_GATEWAY], "two are of the same role"),
        ([A_GATEWAY, ClientConfig(vici="/run/other.vici")], "vici: differs"),
        ([A_GATEWAY, ClientConfig(ha=HaConfig(listen="127.0.0.3"))], "ha: differs"),
        ([A_GATEWAY, ClientConfig(control=A_GATEWAY.control)], "control: .* is in both files"),
        ([A_GATEWAY, ClientConfig(metrics=A_GATEWAY.metrics)], "metrics: .* is in both files"),
    ],
)
def test_two_files_that_do_not_go_together_are_refused(configs: list[GatewayConfig | ClientConfig], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        check_together(configs)


@pytest.mark.parametrize(
    ("text", "role"),
    [
        ("gateways: []", "client"),
        ("vpns: {}", "client"),
        ("held: {fetch: false}", "client"),
        ("bank: {}", "gateway"),
        ("address: 192.0.2.1", "gateway"),
        ("vici: /run/charon.vici", None),
        ("[]", None),
    ],
)
def test_the_keys_of_a_file_show_its_role(text: str, role: str | None) -> None:
    assert role_of(yaml.safe_load(text)) == role


@pytest.mark.parametrize("mode", ["distributed", "mixed"])
def test_shared_addresses_need_one_bank_for_all_gateways(tmp_path: Path, mode: str) -> None:
    """One bank decides who owns a session; banks that are replicated by the gateways could decide differently."""
    bank = f"bank: {{mode: {mode}, url: 'redis://127.0.0.1', {PEERS}}}"
    text = f"address: 192.168.50.1\n{bank}\ntakeover: {{addresses: [192.168.50.100]}}\n"
    with pytest.raises(ConfigError, match=r"takeover\.addresses: needs bank\.mode centralised"):
        load(_file(tmp_path, text), GatewayConfig)
