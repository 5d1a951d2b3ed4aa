"""The routing daemons of the lab: BIRD with the shipped configuration, on the gateways and behind them."""

from bridge.lab.daemon import Daemon
from bridge.lab.host import Host
from bridge.service import shipped_files

CONTROL = "/run/bird.ctl"
GATEWAY = "strongswan-conf/network/bird-gateway.conf"
ROUTER = "strongswan-conf/network/bird-router.conf"

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
