"""The main job, shown: a gateway dies, and the session goes on at the other one."""

import itertools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bridge.lab.daemon import wait_until
from bridge.lab.esp import Esp
from bridge.lab.host import Host
from bridge.lab.lab import Lab
from bridge.lab.space import LabError
from bridge.lab.topology import SERVER, Topology, standard

# Seconds. The traffic's pace, and how long it is watched before the failure and after it.
INTERVAL = 0.05
BEFORE = 1.5
AFTER = 1.5

Say = Callable[[str, str], None]


@dataclass
class Traffic:
    """What `ping` saw: the answers' sequence numbers with their arrival in seconds, and the number sent."""

    answered: dict[int, float]
    sent: int

    @property
    def lost(self) -> int:
        """Requests that were never answered."""
        return self.sent - len(self.answered)

    @property
    def last(self) -> float:
        """When the last answer came, in Unix seconds; 0: none came."""
        return max(self.answered.values(), default=0.0)

    @property
    def silence(self) -> float:
        """The longest time between two answers, in seconds."""
        return self.silence_since(0.0)

    def silence_since(self, began: float) -> float:
        """The longest that ended after a time (Unix seconds)."""
        arrivals = sorted(self.answered.values())
        silences = [later - earlier for earlier, later in itertools.pairwise(arrivals) if later > began]
        return max(silences, default=0.0)

    def first_after(self, moment: float) -> float | None:
        """When the first answer after a time came, both in Unix seconds; None: none came."""
        return min((arrival for arrival in self.answered.values() if arrival > moment), default=None)


class Ping:
    """Echo requests through the tunnel, all the time."""

    def __init__(self, host: Host, target: str, interval: float = INTERVAL) -> None:
        self._output = host.directory / "ping.log"
        with self._output.open("w") as output:
            self._process = host.popen("ping", "-n", "-D", "-i", str(interval), target, stdout=output)

    def traffic(self) -> Traffic:
        """What happened so far."""
        text = self._output.read_text()
        answers = re.findall(r"^\[([\d.]+)\] \d+ bytes from .* icmp_seq=(\d+) ", text, re.MULTILINE)
        answered = {int(sequence): float(arrival) for arrival, sequence in answers}
        summary = re.search(r"(\d+) packets transmitted", text)
        return Traffic(answered, int(summary[1]) if summary else max(answered, default=0))

    def answers(self) -> int:
        """How many answers came so far."""
        return len(self.traffic().answered)

    def stop(self) -> Traffic:
        """End it, as Ctrl-C does, and give the whole of it."""
        # The answer to the last request is still under way.
        time.sleep(INTERVAL)
        self._process.send_signal(2)
        self._process.wait()
        return self.traffic()


def run(say: Say) -> dict[str, Any]:
    """Run the demo in a lab of its own. `say` gets a heading and a text, step by step.

    Gives what `ike-sa-sync resume --json` printed, with `sent`, `lost` (packets) and `silence_ms` added.
    LabError if the session cannot be set up, or does not carry traffic at the end.
    """
    say("lab", "a bank, two gateways with a server behind them, and a client, in namespaces of their own ...")
    with Lab() as lab:
        topology = standard(lab, ha_pools=True)
        version = topology.gw1.charon.vici().version()["version"].decode()
        where = "in the kernel" if lab.esp is Esp.KERNEL else "in userspace: this kernel has none"
        say("lab", f"bank, gw1, gw2, server and client are up; strongSwan {version}, ESP {where}")
        return failover(topology, say)


def failover(topology: Topology, say: Say) -> dict[str, Any]:
    """The demo's steps, in a standard lab that is up."""
    topology.connect()
    before = _session(topology.client)
    say(
        "session",
        f"client at gw1 ({before['remote-host']}) with virtual IP {before['local-vips'][0]}, {_spis(before)}",
    )
    wait_until(lambda: bool(topology.bank.stubs()), "the stub of the session in the bank")
    say("bank", f"gw1 left its stub: {topology.bank.stubs()[0]}")
    ping = Ping(topology.client, SERVER)
    wait_until(lambda: ping.answers() >= BEFORE / INTERVAL, "ping through the tunnel")
    times = f"every {INTERVAL * 1000:.0f} ms"
    say("traffic", f"ping {SERVER}, a server behind the gateways, {times}: {ping.answers()} answers so far")

    topology.kill_gateway(topology.gw1)
    say("failure", "gw1 is dead: charon and sidecar got SIGKILL")
    done = topology.agent.command("resume", "--json", check=False)
    try:
        outcome: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise LabError(f"`ike-sa-sync resume` gave no outcome: {done.stderr.strip()}") from None
    if outcome["result"] == "failed":
        say("outcome", f"failed: {outcome['reason']}")
        return outcome
    after = _session(topology.client)
    say("outcome", f"{outcome['result']} at {outcome['gateway']}, {_spis(after)}" + _times(outcome))

    resumed_at = ping.answers()
    wait_until(lambda: ping.answers() >= resumed_at + AFTER / INTERVAL, "ping through the tunnel again")
    traffic = ping.stop()
    silence = f"{traffic.silence * 1000:.0f} ms between the answers around the failure"
    say("traffic", f"ping goes on: {traffic.sent} sent, {traffic.lost} lost, {silence}")
    kept = "the same" if after["local-vips"] == before["local-vips"] else "another"
    say(
        "session",
        f"{kept} virtual IP, {after['local-vips'][0]}; gw2 knows the client as {_peer(topology.gw2)}",
    )
    return outcome | {"sent": traffic.sent, "lost": traffic.lost, "silence_ms": traffic.silence * 1000}


def _session(host: Host) -> dict[str, Any]:
    sas = [sa for sa in host.charon.sas() if sa["state"] == "ESTABLISHED"]
    if len(sas) != 1:
        raise LabError(f"{host.name} has {len(sas)} established IKE_SAs, not one\n{host.charon.tail()}")
    return sas[0]


def _spis(sa: dict[str, Any]) -> str:
    return f"SPIs {sa['initiator-spi']}_i {sa['responder-spi']}_r"


def _peer(gateway: Host) -> str:
    return str(_session(gateway)["remote-id"])


def _times(outcome: dict[str, Any]) -> str:
    if outcome.get("exchange_ms") is None:
        return ""
    return f"; answer after {outcome['exchange_ms']:.1f} ms, tunnel after {outcome['total_ms']:.1f} ms"
