"""The bank's host: a real Redis with the shipped configuration."""

from bridge.lab.daemon import Daemon
from bridge.lab.host import Host
from bridge.service import shipped_files
from bridge.stub import bank_keys

PORT = 6379


class Bank(Daemon):
    """A redis-server on a host, reachable by the lab's other hosts."""

    def __init__(self, host: Host) -> None:
        super().__init__(host, "redis")
        self.storage = host.directory / "redis"
        self.storage.mkdir()

    @property
    def url(self) -> str:
        """Its address for `bank.url`."""
        return f"redis://{self.host.address}:{PORT}/0"

    def start(self) -> None:
        """Start it with redis/redis.conf and wait until it answers."""
        shipped = shipped_files.path("redis/redis.conf")
        # No password in the lab's own network: protected mode would refuse every other host.
        lab = {
            "bind": f"{self.host.address} 127.0.0.1",
            "port": PORT,
            "protected-mode": "no",
            "dir": self.storage,
            "daemonize": "no",
            "logfile": "",
        }
        arguments = [part for key, value in lab.items() for part in (f"--{key}", str(value))]
        self.spawn("redis-server", *([str(shipped)] if shipped.exists() else []), *arguments)
        self.await_alive(self.answers, "it answered PING")

    def answers(self) -> bool:
        """Whether it answers PING."""
        return self.cli("ping") == "PONG"

    def cli(self, *arguments: str) -> str:
        """Run redis-cli against it, give its output; empty if it cannot be reached."""
        return self.host.run("redis-cli", "-p", str(PORT), *arguments, check=False).stdout.strip()

    def stubs(self) -> list[str]:
        """The keys of the stubs it holds."""
        return self.cli("--scan", "--pattern", f"{bank_keys.STUB}*").split()
