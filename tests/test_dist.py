"""What a release consists of: the source and the wheel for pip, and the Debian packages (`make test-dist`)."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tomllib
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import deployment_page
from bridge.service import process
from test_compiled import MODULES

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NEWER = f"{VERSION}.1"
RELEASES = ["bookworm", "trixie"]
HERE = platform.freedesktop_os_release()["VERSION_CODENAME"]
WHICH_CODE = "from bridge.service.process import code; print(code())"
BLOCKS = deployment_page.blocks((ROOT / deployment_page.PAGE).read_text())

pytestmark = [
    pytest.mark.dist,
    pytest.mark.releases,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="root directories of other releases need root"),
]


def run(*argv: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(arg) for arg in argv], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source and the wheel."""
    built = tmp_path_factory.mktemp("dist")
    run("make", "--silent", "dist", f"DIST={built}")
    return built


def test_two_builds_of_source_and_wheels_are_the_same_octets(dist: Path, tmp_path: Path) -> None:
    run("make", "--silent", "dist", f"DIST={tmp_path}")
    python = "cp{}{}".format(*sys.version_info)
    assert set(digests(dist)) == {
        f"ike_sa_sync-{VERSION}.tar.gz",
        f"ike_sa_sync-{VERSION}-py3-none-any.whl",
        f"ike_sa_sync-{VERSION}-{python}-{python}-linux_{platform.machine()}.whl",
    }
    assert digests(tmp_path) == digests(dist)


def test_the_compiled_wheel_has_an_extension_for_each_module(dist: Path) -> None:
    [file] = dist.glob("*-linux_*.whl")
    with zipfile.ZipFile(file) as wheel:
        inside = wheel.namelist()
    suffix = EXTENSION_SUFFIXES[0]
    assert {name for name in inside if name.endswith(".so")} == {
        process.COMPILED + suffix,
        *(path.removesuffix(".py") + suffix for path in MODULES),
    }
    # for those who read it, and for tracebacks
    assert set(MODULES) <= set(inside)


@pytest.mark.parametrize(
    ("release", "kind", "code"),
    [
        *((release, kind, "pure Python") for release in RELEASES for kind in ("*-none-any.whl", "*.tar.gz")),
        # made with the Python of this release, and for it
        (HERE, "*-linux_*.whl", "compiled"),
    ],
)
def test_pip_installs_it(dist: Path, tmp_path: Path, release: str, kind: str, code: str) -> None:
    [file] = dist.glob(kind)
    (tmp_path / file.name).write_bytes(file.read_bytes())
    script = f"""
        python3 -m venv "$1/venv"
        "$1/venv/bin/pip" install --quiet --disable-pip-version-check "$1/$2"
        cd / && "$1/venv/bin/ike-sa-sync" --version
        "$1/venv/bin/python" -c "{WHICH_CODE}"
    """
    told = run("debian/in-release", release, tmp_path, "sh", "-euc", script, "sh", tmp_path, file.name)
    version, form = told.splitlines()[-2:]
    assert version.split()[-1] == VERSION
    assert form == code


@pytest.mark.parametrize("release", RELEASES)
def test_two_builds_of_a_debian_package_are_the_same_octets_and_it_runs(tmp_path: Path, release: str) -> None:
    for build in ("one", "two"):
        (tmp_path / build).mkdir()
        run("debian/in-release", release, tmp_path / build, "debian/build", tmp_path / build)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    [package] = (tmp_path / "one").iterdir()
    number = {"bookworm": "12", "trixie": "13"}[release]
    assert package.name.startswith(f"ike-sa-sync_{VERSION}+deb{number}_")
    script = f"""
        mkdir "$1/made" && dpkg-deb -x "$1/"*.deb "$1/made"
        cd / && export PYTHONPATH=$(echo "$1"/made/usr/lib/ike-sa-sync/lib/python3*/site-packages)
        python3 -m bridge --version
        python3 -c "{WHICH_CODE}"
    """
    told = run("debian/in-release", release, tmp_path / "one", "sh", "-euc", script, "sh", tmp_path / "one")
    version, form = told.splitlines()[-2:]
    assert version.split()[-1] == VERSION
    assert form == "compiled"


def test_the_deployment_guides_way_without_a_package(tmp_path: Path) -> None:
    """On a release that this machine does not run: what is changed there is lost."""
    install = f"""
        # a host that runs strongSwan, whose operator answers apt's question
        echo 'APT::Get::Assume-Yes "yes";' >/etc/apt/apt.conf.d/90yes
        apt-get -q update
        apt-get -q install charon-systemd strongswan-swanctl redis-server bird2
        apt-get -q install iputils-ping iproute2 iptables procps mount systemd
        mount -t sysfs sysfs /sys
        {BLOCKS["Without the package 1"]}
        mkdir /etc/ike-sa-sync
        echo 'address: 127.0.0.1' >/etc/ike-sa-sync/gateway.yaml
        echo 'gateways: [{{address: 127.0.0.1, connection: home}}]' >/etc/ike-sa-sync/client.yaml
        ike-sa-sync keygen /etc/ike-sa-sync/bank.key
        # for systemctl: no systemd runs here
        export SYSTEMD_OFFLINE=1
        {BLOCKS["Without the package 2"]}
        # what it runs is what was installed
        drain=$(grep ^ExecStop= /etc/systemd/system/strongswan.service.d/ike-sa-sync.conf | cut -d ' ' -f 1)
        cmp "${{drain#ExecStop=-}}" /opt/ike-sa-sync/bin/ike-sa-sync
    """
    start = f"""
        ip link set lo up
        for role in gateway client; do
            $(grep "ike-sa-sync $role" <<'END'
{BLOCKS["Without the package 3"]}END
            ) &
            until ike-sa-sync status -c /etc/ike-sa-sync/$role.yaml; do kill -0 $!; sleep 0.5; done
            kill $!
            wait $! || true
        done
    """
    update = f"""
        # the clone of a newer release, elsewhere: this tree is seen from outside
        mkdir /srv/clone
        tar --exclude=./.venv --exclude=./.vm --exclude=./build --exclude=./dist --exclude=./.git -cf - . |
            tar -xf - -C /srv/clone
        cd /srv/clone
        sed -i 's/^version = .*/version = "{NEWER}"/' pyproject.toml
        {BLOCKS["Without the package 4"]}
        ike-sa-sync --version
    """
    remove = f"""
        cd /
        {BLOCKS["Without the package 5"]}
        find /etc /opt /usr /var/lib /run -xdev -name '*ike-sa-sync*' | if grep .; then exit 1; fi
    """
    release = next(it for it in RELEASES if it != HERE)
    # the sidecars set rules: in a network of their own
    serve = 'unshare --net sh -euc "$1"'
    script = "\n".join((install, serve, update, serve, remove))
    told = run("debian/in-release", release, tmp_path, "sh", "-euc", script, "sh", start)
    assert told.splitlines().count(f"ike-sa-sync, version {NEWER}") == 1
    assert "resumed" in told


def test_the_program_prints_the_version_of_pyproject() -> None:
    assert run(sys.executable, "-m", "bridge", "--version").split()[-1] == VERSION
