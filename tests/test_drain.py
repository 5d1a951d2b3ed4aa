"""A living gateway is drained: real charons, a real Redis, clients with traffic, one of them without a sidecar."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bridge.charon.ike_sa import sa_of, stub_sa
from bridge.ike.stub_exchange import build_move, move_message_id
from bridge.lab import Lab, Topology
from bridge.lab.bank import PORT as BANK_PORT
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.host import Host
from bridge.lab.sidecar import program
from bridge.lab.topology import BANK_KEY, SITE, bank_key
from drain_support import Clients, four
from failover_support import complete, established, fresh, resume, spis, stub_key, the_sa
from probe_support import the_stub

pytestmark = pytest.mark.lab

LOST_AT_MOST = 60
"""echo requests, 50 ms apart, that a move may cost on a busy machine; waiting for a dead gateway costs more"""


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with Lab() as lab:
        yield four(lab)


@pytest.fixture
def topology(clients: Clients) -> Topology:
    return clients.topology


@pytest.fixture(autouse=True)
def _fresh(clients: Clients) -> None:
    for host in clients.all:
        for sa in host.charon.sas():
            host.swanctl("--terminate", "--ike-id", sa["uniqueid"], "--force", "--timeout", "1", check=False)
        wait_until(lambda host=host: not host.charon.sas(), "the end of all SAs")  # type: ignore[misc]
    fresh(clients.topology)
    # emptied with the bank
    beats = [f"ike:gateway:{host.address}" for host in (clients.topology.gw1, clients.topology.gw2)]
    wait_until(lambda: clients.topology.bank.cli("EXISTS", *beats) == "2", "signs of life of both gateways")


def drain(topology: Topology, *arguments: str, code: int = 0) -> dict[str, Any]:
    """`ike-sa-sync drain --json` on gw1."""
    done = topology.gateways["gw1"].command("drain", "--json", *arguments, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    return dict(json.loads(done.stdout))


def lost(ping: Ping) -> int:
    """Echo requests between the first answer and the last that were not answered."""
    answered = sorted(ping.stop().answered)
    return answered[-1] - answered[0] + 1 - len(answered)


@contextmanager
def spoilt(topology: Topology, *keys: str) -> Iterator[None]:
    """Stubs that do not open. A comparison with the bank, which comes every 30 s, puts them right; so they are spoilt
    again and again."""
    spoiling = [
        topology.bank.host.popen(
            *("redis-cli", "-p", str(BANK_PORT), "-r", "-1", "-i", "0.02", "HSET", key, "sealed", "spoilt"),
            stdout=subprocess.DEVNULL,
        )
        for key in keys
    ]
    try:
        for key in keys:
            wait_until(
                lambda key=key: topology.bank.cli("HSTRLEN", key, "sealed") == str(len("spoilt")),  # type: ignore[misc]
                "the spoilt stub",
            )
        yield
    finally:
        for process in spoiling:
            process.terminate()
            process.wait()


def test_clients_move_with_their_traffic_and_one_without_a_sidecar_is_left_alone(clients: Clients) -> None:
    topology = clients.topology
    clients.connect()
    before = {host.name: the_sa(host)["local-vips"] for host in clients.all}
    plain = spis(the_sa(clients.plain))
    pings = {host.name: Ping(host, SITE) for host in clients.all}
    wait_until(lambda: all(ping.answers() >= 20 for ping in pings.values()), "traffic")
    # one of four cannot move, so the share that was asked for is not reached
    done = drain(topology, "--to", topology.gw2.address, code=1)
    seen = {name: ping.answers() for name, ping in pings.items()}
    wait_until(lambda: all(ping.answers() >= seen[name] + 20 for name, ping in pings.items()), "traffic goes on")
    losses = {name: lost(ping) for name, ping in pings.items()}
    print("lost:", losses)
    assert (done["wanted"], done["moved"], done["left"], done["failed"]) == (4, 3, 1, 0)
    assert clients.at(topology.gw2) == {"client", "second", "third"}
    assert clients.at(topology.gw1) == {"plain"}
    assert {host.name: the_sa(host)["local-vips"] for host in clients.all} == before
    # nothing happened to it
    assert spis(the_sa(clients.plain)) == plain
    assert losses.pop("plain") == 0
    assert all(number <= LOST_AT_MOST for number in losses.values())
    # nothing is left behind where they were
    assert [spis(sa) for sa in topology.gw1.charon.sas()] == [plain]
    assert len(topology.gw2.charon.sas()) == 3
    assert len(topology.bank.stubs()) == 4


def test_a_share_of_the_sessions_moves(clients: Clients) -> None:
    topology = clients.topology
    clients.connect()
    done = drain(topology, "--to", topology.gw2.address, "--share", "0.5")
    assert (done["sessions"], done["wanted"], done["moved"]) == (4, 2, 2)
    assert len(clients.at(topology.gw2)) == 2
    assert len(clients.at(topology.gw1)) == 2


def test_a_session_that_the_target_does_not_resume_stays_where_it_is(clients: Clients) -> None:
    topology = clients.topology
    clients.connect()
    before = {host.name: spis(the_sa(host)) for host in clients.all}
    with spoilt(topology, *topology.bank.stubs()):
        done = drain(topology, "--to", topology.gw2.address, code=1)
    assert (done["moved"], done["left"], done["failed"]) == (0, 1, 3)
    assert {row["reason"] for row in done["failures"]} == {"the target did not resume the session"}
    assert {host.name: spis(the_sa(host)) for host in clients.all} == before
    assert all(host.ping(SITE) == 3 for host in clients.all)


def test_some_clients_move_and_the_others_stay_each_with_its_reason(clients: Clients) -> None:
    topology = clients.topology
    gw1, gw2, client = topology.gw1, topology.gw2, topology.client
    second, third = clients.hosts[1:]
    plain = clients.plain
    dropped = ("INPUT", "-s", gw2.address, "-j", "DROP")
    # one client's session is of a connection that the target lacks, one's stub was spoilt, one cannot hear the target
    gw1.configure("connections { own : connections.gw { remote { id = plain@example.org } } }\n", "own.conf")
    gw1.swanctl("--load-conns")
    third.run("iptables", "-A", *dropped)
    try:
        clients.connect()
        facts = f"ike:facts:{gw2.address}"
        wait_until(lambda: '"gw"' in topology.bank.cli("GET", facts), "what gw2 says of itself", timeout=90)
        stub_of_second = stub_key(gw1.address, the_sa(second)["responder-spi"])
        before = {host.name: spis(the_sa(host)) for host in clients.all}
        pings = {host.name: Ping(host, SITE) for host in clients.all}
        wait_until(lambda: all(ping.answers() >= 20 for ping in pings.values()), "traffic")

        with spoilt(topology, stub_of_second):
            done = topology.gateways["gw1"].command("drain", "--json", "--to", gw2.address, check=False, timeout=120)
        seen = {name: ping.answers() for name, ping in pings.items()}
        wait_until(lambda: all(ping.answers() >= seen[name] + 20 for name, ping in pings.items()), "traffic goes on")
        losses = {name: lost(ping) for name, ping in pings.items()}
        print("lost:", losses)

        assert done.returncode == 1
        assert done.stderr.splitlines() == ["1 session will not be asked: the target has no connection 'own'"]
        told = json.loads(done.stdout)
        assert (told["wanted"], told["moved"], told["left"], told["failed"]) == (4, 1, 1, 2)
        assert {(row["identity"], row["address"], row["reason"]) for row in told["failures"]} == {
            ("second@example.org", second.address, "the target did not resume the session"),
            ("third@example.org", third.address, "the target did not answer the client"),
        }
        assert {(row["result"], row["reason"], row["sessions"]) for row in told["outcomes"]} >= {
            ("left alone", "the target has no connection 'own'", 1),
            ("moved", "", 1),
        }
        assert clients.at(gw2) == {client.name}
        assert clients.at(gw1) == {second.name, third.name, plain.name}
        # nothing happened to those that stayed: neither a handshake nor a lost packet
        assert all(spis(the_sa(host)) == before[host.name] for host in (second, third, plain))
        assert [losses[host.name] for host in (second, third, plain)] == [0, 0, 0]
        assert losses[client.name] <= LOST_AT_MOST
        # nothing is left behind: one IKE_SA and one stub for each session
        assert {spis(sa) for sa in established(gw1)} == {before[host.name] for host in (second, third, plain)}
        wait_until(lambda: len(established(gw2)) == 1, "the end of what the target could not finish")
        at_gw1 = {stub_key(gw1.address, responder) for _, responder in map(spis, established(gw1))}
        at_gw2 = {stub_key(gw2.address, responder) for _, responder in map(spis, established(gw2))}
        assert set(topology.bank.stubs()) == at_gw1 | at_gw2

        # those that the target could not serve move when it can, and in a terminal that is seen
        third.run("iptables", "-D", *dropped)
        with spoilt(topology, stub_of_second):
            again = topology.gateways["gw1"].in_terminal("drain", "--to", gw2.address)
        assert again.returncode == 1
        assert f"moved to {gw2.address}" in again.stdout
        assert "under way, 1 left alone" in again.stdout
        assert "done: 1 of 3 sessions wanted moved to 192.168.50.2" in again.stdout
        assert clients.at(gw2) == {client.name, third.name}
        assert clients.at(gw1) == {second.name, plain.name}
    finally:
        third.run("iptables", "-D", *dropped, check=False)
        (gw1.etc / "swanctl/conf.d/own.conf").unlink()
        gw1.swanctl("--load-conns")


def test_a_client_to_which_the_target_is_a_stranger_is_left_alone(clients: Clients) -> None:
    topology = clients.topology
    sidecar, target = clients.sidecars[0], topology.gw2.address
    gateways = sidecar.config["gateways"]
    sidecar.stop()
    sidecar.config["gateways"] = [entry for entry in gateways if entry["address"] != target]
    sidecar.start()
    try:
        clients.connect()
        before = spis(the_sa(clients.hosts[1]))
        done = drain(topology, "--to", target, code=1)
        assert (done["moved"], done["left"], done["failed"]) == (2, 2, 0)
        assert {"result": "left alone", "reason": "the target is none of the client's gateways", "sessions": 1} in done[
            "outcomes"
        ]
        assert spis(the_sa(clients.hosts[1])) == before
        assert clients.at(topology.gw1) == {"second", "plain"}
    finally:
        sidecar.stop()
        sidecar.config["gateways"] = gateways
        sidecar.start()


def test_a_target_without_a_heartbeat_is_refused_before_any_client_is_asked(clients: Clients) -> None:
    topology = clients.topology
    said = topology.agent.text().count("move-requested")
    done = topology.gateways["gw1"].command("drain", "--to", "192.168.50.77", check=False)
    assert done.returncode == 1
    assert "no gateway lives at 192.168.50.77; others that do: 192.168.50.2" in done.stderr
    done = topology.gateways["gw1"].command("drain", "--to", topology.gw1.address, check=False)
    assert done.returncode == 1
    assert "is this gateway" in done.stderr
    assert topology.agent.text().count("move-requested") == said


def refusal(topology: Topology) -> str:
    """What `ike-sa-sync drain` to gw2 says while nobody is asked to move, and nobody moves."""
    said, before = topology.agent.text().count("move-requested"), the_sa(topology.client)
    done = topology.gateways["gw1"].command("drain", "--to", topology.gw2.address, check=False)
    assert done.returncode == 1
    assert spis(the_sa(topology.client)) == spis(before)
    assert topology.agent.text().count("move-requested") == said
    return str(done.stderr)


def test_a_target_with_another_bank_key_is_refused_before_any_client_is_asked(clients: Clients) -> None:
    topology = clients.topology
    clients.connect()
    sidecar, key = topology.gateways["gw2"], (topology.gw2.etc / "ike-sa-sync/bank.key").read_text()
    sidecar.stop()
    topology.gw2.write(BANK_KEY, bank_key(), mode=0o600)
    sidecar.start()
    try:
        assert f"{topology.gw2.address} has another bank key" in refusal(topology)
    finally:
        sidecar.stop()
        topology.gw2.write(BANK_KEY, key, mode=0o600)
        sidecar.start()


def test_a_target_without_the_connection_is_refused_before_any_client_is_asked(clients: Clients) -> None:
    topology = clients.topology
    clients.connect()
    sidecar, file = topology.gateways["gw2"], topology.gw2.etc / "swanctl/swanctl.conf"
    conf = file.read_text()
    assert conf.count("    gw {") == 1
    sidecar.stop()
    topology.gw2.write("/etc/swanctl/swanctl.conf", conf.replace("    gw {", "    away {"))
    topology.gw2.swanctl("--load-conns")
    sidecar.start()
    try:
        facts = f"ike:facts:{topology.gw2.address}"
        wait_until(lambda: '"away"' in topology.bank.cli("GET", facts), "what gw2 says of itself", timeout=90)
        assert "the target has no connection 'gw'" in refusal(topology)
    finally:
        sidecar.stop()
        topology.gw2.write("/etc/swanctl/swanctl.conf", conf)
        topology.gw2.swanctl("--load-conns")
        sidecar.start()
        wait_until(lambda: '"gw"' in topology.bank.cli("GET", facts), "what gw2 says of itself", timeout=90)


MARKED = ("-p", "udp", "--sport", "4500", "-m", "u32", "--u32", "0>>22&0x3C@8=0")
"""IKE messages on port 4500: behind a non-ESP marker"""
MESSAGES_AT_MOST = 20
"""of one host's in one drain, liveness checks of charon's included"""


def lose_one(host: Host, number: int) -> None:
    """Lose the IKE message with this number, from 0, of those that the host sends from now on."""
    nth = ("-m", "statistic", "--mode", "nth", "--every", "100000", "--packet", str(number))
    host.run("iptables", "-A", "OUTPUT", *MARKED, *nth, "-j", "DROP")


def lose_no_more(host: Host) -> int:
    """End that; how many were lost."""
    listed = host.run("iptables", "-L", "OUTPUT", "-v", "-n", "-x").stdout.splitlines()
    host.run("iptables", "-F", "OUTPUT")
    return sum(int(line.split()[0]) for line in listed if "DROP" in line)


@pytest.mark.parametrize("sender", ["client", "the gateway that is drained", "the target"])
def test_one_lost_datagram_changes_nothing(clients: Clients, sender: str) -> None:
    """Each IKE message of a drain lost once: of the sidecars' and of charon's."""
    topology = clients.topology
    topology.client.charon.initiate("net", "home")
    here, there = topology.gw1, topology.gw2
    wait_until(lambda: complete(topology, stub_key(here.address, the_sa(here)["responder-spi"])), "the stub")
    for number in range(MESSAGES_AT_MOST):
        host = {"client": topology.client, "the target": there}.get(sender, here)
        before = the_sa(topology.client)["local-vips"]
        lose_one(host, number)
        try:
            asked = topology.gateways[here.name].command("drain", "--json", "--to", there.address, check=False)
        finally:
            lost = lose_no_more(host)
        told = json.loads(asked.stdout)
        assert (told["moved"], told["left"], told["failed"]) == (1, 0, 0), (number, told)
        assert [sa["remote-host"] for sa in established(topology.client)] == [there.address]
        assert the_sa(topology.client)["local-vips"] == before
        wait_until(lambda here=here: not here.charon.sas(), "the end of the old IKE_SA")  # type: ignore[misc]
        assert spis(the_sa(topology.client)) == spis(the_sa(there))
        assert topology.client.ping(SITE) == 3
        new = stub_key(there.address, the_sa(there)["responder-spi"])
        wait_until(lambda new=new: topology.bank.stubs() == [new], "the one stub")  # type: ignore[misc]
        here, there = there, here
        if not lost:
            break
    assert number > 0, "no message was lost"


def test_ctrl_c_asks_no_more_clients_and_waits_for_those_that_move(clients: Clients) -> None:
    topology = clients.topology
    clients.connect()
    # the second client's turn comes in a minute
    arguments = ("drain", "--to", topology.gw2.address, "--rate", "0.016", "--json")
    sidecar = topology.gateways["gw1"]
    command = topology.gw1.popen(*program(), *arguments, "-c", sidecar.file, stdout=subprocess.PIPE)
    # the first one asked may be the one without a sidecar
    wait_until(lambda: "drain-begins" in sidecar.text().rsplit("drain-ends", 1)[-1], "the beginning")
    command.send_signal(signal.SIGINT)
    text, _ = command.communicate(timeout=60)
    done = json.loads(text)
    assert command.returncode == 130
    assert done["state"] == "stopped"
    assert done["under_way"] == 0
    assert done["moved"] + done["left"] <= 1
    assert len(clients.at(topology.gw2)) == done["moved"]


def test_a_replayed_move_is_not_accepted(clients: Clients) -> None:
    topology = clients.topology
    clients.connect()
    stub = the_stub(topology)
    move = build_move(stub_sa(sa_of(stub), stub.index), topology.gw2.address, move_message_id(stub.established))
    send_from(topology.gw1, topology.client, move)
    wait_until(lambda: the_sa_at(topology.client, topology.gw2), "the first move")
    assert resume(topology, "--to", topology.gw1.address)["result"] == "resumed"
    said = topology.agent.text().count("move-requested")
    again = spis(the_sa(topology.client))
    send_from(topology.gw1, topology.client, move)
    # the other one is heeded, so the replay was there before it
    stub = the_stub(topology)
    wrong = build_move(stub_sa(sa_of(stub), stub.index), "192.0.2.77", move_message_id(stub.established))
    send_from(topology.gw1, topology.client, wrong)
    wait_until(lambda: "move-refused target=192.0.2.77" in topology.agent.text(), "the refusal of a foreign target")
    assert topology.agent.text().count("move-requested") == said
    assert spis(the_sa(topology.client)) == again


SEND = """
import sys
from bridge.net.raw_socket import RawUdp
RawUdp().send(sys.argv[1], 4500, sys.argv[2], 4500, bytes.fromhex(sys.argv[3]), True)
"""


def send_from(gateway: Host, client: Host, message: bytes) -> None:
    """Send an IKE message from a gateway's port 4500 to a client's."""
    python = str(program()[0]).replace("ike-sa-sync", "python")
    gateway.run(python, "-c", SEND, gateway.address, client.address, message.hex())


def the_sa_at(client: Host, gateway: Host) -> bool:
    return [sa["remote-host"] for sa in established(client)] == [gateway.address]


def test_to_any_gateway_the_sessions_go_to_those_that_live(clients: Clients) -> None:
    topology = clients.topology
    clients.connect()
    done = drain(topology, "--to", "any", code=1)
    assert (done["wanted"], done["moved"], done["left"], done["failed"]) == (4, 3, 1, 0)
    assert clients.at(topology.gw2) == {"client", "second", "third"}


def test_before_strongswan_stops_its_sessions_move(clients: Clients) -> None:
    """As the drop-in of strongswan.service has it: ExecStop, and then charon is told to end."""
    topology = clients.topology
    clients.connect()
    ping = Ping(topology.client, SITE)
    wait_until(lambda: ping.answers() >= 20, "traffic")
    told = topology.gateways["gw1"].command("drain", "--on-stop")
    topology.gw1.charon.stop()
    at = ping.answers()
    wait_until(lambda: ping.answers() >= at + 20, "traffic goes on")
    print("lost:", lost(ping))
    assert "moved to any" in told.stdout
    assert clients.at(topology.gw2) == {"client", "second", "third"}
    topology.gw1.charon.start()


def test_a_session_that_could_not_move_before_strongswan_stops_is_set_up_again_at_the_other_gateway(
    clients: Clients,
) -> None:
    """charon's DELETE after a move that was asked for and failed is no wanted end, which a DELETE alone is."""
    topology = clients.topology
    clients.connect()
    with spoilt(topology, *topology.bank.stubs()):
        topology.gateways["gw1"].command("drain", "--on-stop", check=False)
        assert clients.at(topology.gw1) == {"client", "second", "third", "plain"}
        topology.gw1.charon.stop()
        wait_until(lambda: clients.at(topology.gw2) == {"client", "second", "third"}, "handshakes at the other gateway")
    assert not established(clients.plain)
    assert topology.client.ping(SITE) == 3
    topology.gw1.charon.start()


def test_strongswan_stops_immediately_where_no_other_gateway_lives(clients: Clients) -> None:
    topology = clients.topology
    clients.connect()
    topology.gateways["gw2"].kill()
    beat = f"ike:gateway:{topology.gw2.address}"
    wait_until(lambda: topology.bank.cli("EXISTS", beat) == "0", "the end of its heartbeat")
    told = topology.gateways["gw1"].command("drain", "--on-stop")
    assert "no other gateway lives" in told.stderr
    assert clients.at(topology.gw1) == {"client", "second", "third", "plain"}
    topology.gateways["gw2"].start()


def test_a_gateway_that_returned_gets_its_share_of_the_sessions_back(clients: Clients) -> None:
    topology = clients.topology
    gw1, gw2 = topology.gw1, topology.gw2
    clients.connect()
    drain(topology, "--to", gw2.address, code=1)
    assert clients.at(gw2) == {"client", "second", "third"}
    stats = f"ike:stats:{gw1.address}"
    wait_until(lambda: json.loads(topology.bank.cli("GET", stats)).get("ike_sas") == 1, "what gw1 counts")
    # three there and one here: one comes back
    arguments = ("drain", "--json", "--to", gw1.address, "--until-even")
    done = json.loads(topology.gateways["gw2"].command(*arguments, timeout=120).stdout)
    assert done["sessions_at"] == {gw2.address: 3, gw1.address: 1}
    assert (done["wanted"], done["moved"]) == (1, 1)
    assert [len(clients.at(gateway)) for gateway in (gw1, gw2)] == [2, 2]
    assert all(host.ping(SITE) == 3 for host in clients.all)
    # and nothing is left to do
    wait_until(lambda: json.loads(topology.bank.cli("GET", stats)).get("ike_sas") == 2, "what gw1 counts")
    told = topology.gateways["gw2"].command("drain", "--to", gw1.address, "--until-even").stdout
    assert f"sessions before: {gw2.address} 2, {gw1.address} 2" in told
    assert "done: 0 of 0 sessions wanted moved" in told
