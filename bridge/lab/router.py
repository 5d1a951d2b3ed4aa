"""The routing daemons of the lab, BIRD or FRR with the shipped configuration, on the gateways and behind them."""

from bridge.lab.daemon import Daemon
from bridge.lab.host import Host
from bridge.lab.unpacked import FRR as FRR_10
from bridge.service import shipped_files

CONTROL = "/run/bird.ctl"
GATEWAY = "strongswan-conf/network/bird-gateway.conf"
ROUTER = "strongswan-conf/network/bird-router.conf"
GATEWAY_FRR = "strongswan-conf/network/frr-gateway.conf"
GATEWAY_FRR_10 = "strongswan-conf/network/frr10-gateway.conf"
ROUTER_FRR = "strongswan-conf/network/frr-router.conf"
FRR = "/usr/lib/frr"
FRR_RUN = "/run/frr"

# The gateway that the shipped configuration is of.
SHIPPED_INSIDE = "10.10.1.1"


class Bird(Daemon):
    """BIRD on a host, with this configuration."""

    def __init__(self, host: Host, configuration: str) -> None:
        super().__init__(host, "bird")
        self.configuration = configuration

    def start(self) -> None:
        """Start it and wait until it answers."""
        file = self.host.directory / "bird.conf"
        file.write_text(self.configuration)
        self.spawn("bird", "-f", "-c", str(file), "-s", CONTROL)
        self.await_alive(self.answers, "it answered on its control socket")

    def answers(self) -> bool:
        """Whether it answers."""
        return self.host.run("birdc", "-s", CONTROL, "show", "status", check=False).returncode == 0

    def show(self, *what: str) -> str:
        """What `birdc show` prints."""
        return self.host.run("birdc", "-s", CONTROL, "show", *what).stdout


def gateway_bird(host: Host, inside: str) -> Bird:
    """BIRD of a gateway whose address in the network behind the gateways is `inside`."""
    return Bird(
        host, shipped_files.path(GATEWAY).read_text().replace(f"INSIDE = {SHIPPED_INSIDE}", f"INSIDE = {inside}")
    )


def router_bird(host: Host) -> Bird:
    """BIRD of the router behind the gateways."""
    return Bird(host, shipped_files.path(ROUTER).read_text())


class Frr(Daemon):
    """FRR on a host, zebra and bgpd, with this configuration. Each names the lines that are the other's in its log.
    `ten`: FRR 10 of Debian 13."""

    def __init__(self, host: Host, configuration: str, *, ten: bool = False) -> None:
        super().__init__(host, "bgpd")
        self.configuration = configuration
        self.ten = ten
        self.zebra = Daemon(host, "zebra")

    def start(self) -> None:
        """Start both, and wait until bgpd has read its configuration."""
        self.host.run("install", "-d", "-o", "frr", "-g", "frr", FRR_RUN)
        # where the user frr can read it
        file = f"{FRR_RUN}/frr.conf"
        self.host.path(file).write_text(self.configuration)
        self.host.path(file).chmod(0o644)
        common = ("-f", file, "-u", "frr", "-g", "frr", "-P", "0", "--log", "stdout")
        self.zebra.spawn(*self._program(f"{FRR}/zebra"), *common)
        self.zebra.await_alive(lambda: self.host.path(f"{FRR_RUN}/zserv.api").exists(), "it served bgpd")
        self.spawn(*self._program(f"{FRR}/bgpd"), *common)
        self.await_alive(lambda: "router identifier" in self.show("bgp", "summary"), "it had its configuration")

    def show(self, *what: str) -> str:
        """What `show` of vtysh prints."""
        return self.host.run(*self._program("/usr/bin/vtysh"), "-c", " ".join(("show", *what)), check=False).stdout

    def _program(self, path: str) -> list[str]:
        return FRR_10.program(path) if self.ten else [path]


def gateway_frr(host: Host, inside: str, *, ten: bool = False) -> Frr:
    """FRR of a gateway whose address in the network behind the gateways is `inside`."""
    text = shipped_files.path(GATEWAY_FRR_10 if ten else GATEWAY_FRR).read_text()
    return Frr(host, text.replace(f"router-id {SHIPPED_INSIDE}", f"router-id {inside}"), ten=ten)


def router_frr(host: Host) -> Frr:
    """FRR of the router behind the gateways."""
    return Frr(host, shipped_files.path(ROUTER_FRR).read_text())
