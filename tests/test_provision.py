"""The scripts of vagrant/provision on a host where apt has started everything already, as it does on a new machine.

Mount and network namespaces keep this host as it was; `systemctl` is a stand-in that starts the real Redis. The whole
of it, with systemd, is in test_vm_machines.py (`make test-vm`)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = "192.168.56.20"

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="mount and network namespaces need root"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server here"),
]

SYSTEMCTL = """\
#!/bin/sh
# is-active: true while any of the named units runs, as systemd's is
echo "$@" >>"$LOG"
case "$1" in
is-active) shift; for unit; do [ "$unit" = --quiet ] || { [ -e "$STATE/$unit" ] && exit 0; }; done; exit 3 ;;
restart)
    touch "$STATE/$2"
    [ "$2" = redis-server ] || exit 0
    kill "$(cat "$STATE/pid")" 2>/dev/null && while kill -0 "$(cat "$STATE/pid")" 2>/dev/null; do sleep 0.05; done
    redis-server /etc/redis/redis.conf --daemonize yes --supervised no --pidfile "$STATE/pid" >/dev/null
    until redis-cli -h 127.0.0.1 ping 2>&1 | grep -q .; do sleep 0.05; done ;;
esac
"""

INSIDE = """\
set -eu
for place in /etc/redis /etc/bird /etc/strongswan.d /etc/swanctl /usr/local/bin /var/lib/redis; do
    mkdir -p "$WORK$place" && cp -a "$place/." "$WORK$place/" 2>/dev/null || true
    mount --bind "$WORK$place" "$place"
done
rm -rf /var/lib/redis/*
ip link set lo up
ip address add {address}/32 dev lo
export PATH="$WORK/bin:$PATH"
trap 'kill "$(cat "$STATE/pid")" 2>/dev/null || true' EXIT
"""


def inside(work: Path, script: str) -> str:
    """Run `script` in namespaces of its own, with `systemctl` replaced; its output."""
    (work / "bin").mkdir(exist_ok=True)
    (work / "state").mkdir(exist_ok=True)
    systemctl = work / "bin/systemctl"
    systemctl.write_text(SYSTEMCTL)
    systemctl.chmod(0o755)
    done = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", INSIDE.format(address=ADDRESS) + script],
        env=os.environ
        | {
            "WORK": str(work),
            "STATE": str(work / "state"),
            "LOG": str(work / "log"),
            "IKE_SA_SYNC_CHANGED": str(work / "changed"),
            "PROVISION": str(ROOT / "vagrant/provision"),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


AS_GATEWAY = f'REDISCLI_AUTH=$(cat "$WORK/secrets/bank-password") redis-cli -h {ADDRESS} --user gateway '


def test_a_redis_that_apt_has_started_gets_the_banks_configuration(tmp_path: Path) -> None:
    told = inside(
        tmp_path,
        f"""
        "$PROVISION/secrets" "$WORK/secrets"
        # what apt leaves behind: Debian's configuration, running
        systemctl restart redis-server
        redis-cli ping
        "$PROVISION/bank" {ADDRESS} "$WORK/secrets"
        {AS_GATEWAY} set ike:x 1
        redis-cli get ike:x || true
        grep -c . /var/lib/redis/appendonlydir/*.manifest
        """,
    )
    assert told.splitlines()[0] == "PONG"
    assert "OK" in told
    assert "NOAUTH" in told
    assert "answers the user gateway" in told


def test_a_second_provisioning_restarts_nothing_and_a_new_password_does(tmp_path: Path) -> None:
    inside(
        tmp_path,
        f"""
        "$PROVISION/secrets" "$WORK/secrets"
        "$PROVISION/bank" {ADDRESS} "$WORK/secrets"
        echo second >>"$LOG"
        "$PROVISION/bank" {ADDRESS} "$WORK/secrets"
        echo third >>"$LOG"
        echo another >"$WORK/secrets/bank-password"
        "$PROVISION/bank" {ADDRESS} "$WORK/secrets"
        """,
    )
    first, second, third = (tmp_path / "log").read_text().replace("third\n", "second\n").split("second\n")
    assert "restart redis-server" in first
    assert "restart" not in second
    assert "restart redis-server" in third


def test_a_guard_is_put_up_once_and_restarts_nothing_else(tmp_path: Path) -> None:
    script = """
        mkdir "$WORK/upper" "$WORK/work"
        mount -t overlay overlay -o "lowerdir=/etc,upperdir=$WORK/upper,workdir=$WORK/work" /etc
        touch "$STATE/charon"
        guard 10.20.0.0/16 10.20.1.0/24
        guard 10.20.0.0/16 10.20.1.0/24
        restart_changed charon
    """
    inside(tmp_path, SOURCED + script)
    assert (tmp_path / "upper/ike-sa-sync/guard").read_text().splitlines() == ["10.20.0.0/16", "10.20.1.0/24"]
    restarted = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("restart")]
    assert restarted == ["restart ike-sa-sync-guard"]


SOURCED = '. "$PROVISION/common"\n'


def test_a_change_inside_a_pipeline_is_not_forgotten(tmp_path: Path) -> None:
    inside(tmp_path, SOURCED + 'echo new | put "$WORK/file"\nrestart_changed one two\n')
    assert (tmp_path / "log").read_text().splitlines() == ["restart one", "restart two"]


def test_a_change_of_an_earlier_script_is_not_forgotten(tmp_path: Path) -> None:
    inside(tmp_path, f"(\n{SOURCED}echo new | put $WORK/drop-in\n)\n(\n{SOURCED}restart_changed charon\n)\n")
    assert (tmp_path / "log").read_text().splitlines() == ["restart charon"]


@pytest.mark.parametrize("down", ["one", "two"])
def test_units_are_restarted_where_any_of_them_is_not_active(tmp_path: Path, down: str) -> None:
    script = f'touch "$STATE/one" "$STATE/two"; rm "$STATE/{down}"\nrestart_changed one two\n'
    inside(tmp_path, SOURCED + script)
    assert [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("restart")] == [
        "restart one",
        "restart two",
    ]


def test_nothing_is_restarted_where_all_run_and_nothing_changed(tmp_path: Path) -> None:
    inside(tmp_path, SOURCED + 'touch "$STATE/one" "$STATE/two"\nrestart_changed one two\n')
    assert "restart" not in (tmp_path / "log").read_text()


def test_of_several_packages_the_newest_of_this_release_is_served(tmp_path: Path) -> None:
    told = inside(
        tmp_path,
        f"""
        mkdir -p "$WORK/source/dist" "$WORK/cache" && cd "$WORK/source"
        . /etc/os-release
        echo old >"dist/ike-sa-sync_0.1.0+deb${{VERSION_ID}}_amd64.deb" && touch -d '1 hour ago' dist/*
        echo new >"dist/ike-sa-sync_0.2.0+deb${{VERSION_ID}}_amd64.deb"
        echo "of another release" >dist/ike-sa-sync_0.2.0+deb99_amd64.deb
        cat >"$WORK/bin/systemd-run" <<'END'
#!/bin/sh
while [ "$1" != python3 ]; do shift; done
"$@" >/dev/null 2>&1 &
END
        chmod +x "$WORK/bin/systemd-run"
        "$PROVISION/package" build "$WORK/cache" {ADDRESS}
        "$PROVISION/package" fetch {ADDRESS} "$WORK/fetched.deb"
        cat "$WORK/fetched.deb"
        """,
    )
    assert told.splitlines()[-1] == "new"


@pytest.mark.skipif(shutil.which("bird") is None, reason="no bird here")
@pytest.mark.parametrize("arguments", ["gateway 10.10.1.11 10.10.1.100", "server 10.10.1.100 10.10.1.11 10.10.1.12"])
def test_bird_takes_what_the_machines_of_the_inner_network_are_given(tmp_path: Path, arguments: str) -> None:
    inside(
        tmp_path, f'"$PROVISION/router" {arguments}\nbird -p -c /etc/bird/bird.conf\ncp /etc/bird/bird.conf "$WORK"\n'
    )
    text = (tmp_path / "bird.conf").read_text()
    addresses = arguments.split()[1:]
    assert f"router id {addresses[0]}" in text or f"define INSIDE = {addresses[0]};" in text
    assert all(f"neighbor {address} as" in text for address in addresses[1:])
    assert not any(f"neighbor 10.10.1.{shipped} as" in text for shipped in (1, 2, 10))
