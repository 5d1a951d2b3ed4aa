"""`bench handshake-vs-resume`: ordinary handshakes and resumptions, in turn, at the same charon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from bridge.bench.rig import Rig
from bridge.bench.storm import Progress, resumptions
from bridge.bench.usage import quantile
from bridge.lab.host import Host
from bridge.lab.pki import certify
from bridge.lab.space import LabError

SETTLE_SECONDS = 0.1
"""for the stub to reach the bank: that is part of a session's price"""
PASSWORD = "of the benchmark's lab only"  # noqa: S105
KINDS = {"psk": "home-gw2", "ecdsa": "bench-ecdsa", "eap-mschapv2": "bench-eap"}
"""what is measured, by the client's connection"""

GATEWAY = """
connections {
    bench-ecdsa {
        version = 2
        pools = clients
        dpd_delay = 0s
        local { auth = pubkey
            certs = ecdsa.pem
            id = cert.example.org
        }
        remote { auth = pubkey
            id = client.example.org
        }
        children { net { local_ts = 10.10.0.0/16
            esp_proposals = aes128gcm16-aes256gcm16,aes128-sha256
        } }
    }
    bench-eap {
        version = 2
        pools = clients
        dpd_delay = 0s
        local { auth = pubkey
            certs = ecdsa.pem
            id = cert.example.org
        }
        remote { auth = eap-mschapv2
            eap_id = %any
            id = eap.example.org
        }
        children { net { local_ts = 10.10.0.0/16
            esp_proposals = aes128gcm16-aes256gcm16,aes128-sha256
        } }
    }
}
secrets { eap-bench { id = bench
    secret = "PASSWORD"
} }
"""

CLIENT = """
connections {
    bench-ecdsa {
        version = 2
        remote_addrs = GATEWAY
        vips = 0.0.0.0
        local { auth = pubkey
            certs = ecdsa.pem
            id = client.example.org
        }
        remote { auth = pubkey
            id = cert.example.org
        }
        children { net { remote_ts = 10.10.0.0/16
            esp_proposals = aes128gcm16-aes256gcm16,aes128-sha256
        } }
    }
    bench-eap {
        version = 2
        remote_addrs = GATEWAY
        vips = 0.0.0.0
        local { auth = eap-mschapv2
            eap_id = bench
            id = eap.example.org
        }
        remote { auth = pubkey
            id = cert.example.org
        }
        children { net { remote_ts = 10.10.0.0/16
            esp_proposals = aes128gcm16-aes256gcm16,aes128-sha256
        } }
    }
}
secrets { eap-bench { id = bench
    secret = "PASSWORD"
} }
"""


def _packets(host: Host) -> int:
    """Packets in and out of a host's eth0."""
    for line in Path(f"/proc/{host.pid}/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "eth0":
            columns = rest.split()
            return int(columns[1]) + int(columns[9])
    return 0


def _row(cpu: list[float], latency: list[float], packets: list[int]) -> dict[str, Any]:
    return {
        "sessions": len(cpu),
        "cpu_ms": round(median(cpu) * 1000, 3),
        "cpu_mean_ms": round(sum(cpu) / len(cpu) * 1000, 3),
        "p50_ms": round(quantile(latency, 0.5), 2),
        "p99_ms": round(quantile(latency, 0.99), 2),
        "packets": int(median(packets)),
    }


def compare(rig: Rig, rounds: int, progress: Progress) -> dict[str, Any]:
    """`rounds` sessions of each kind, in turn. CPU is that of charon, sidecar and bank together, stub included."""
    topology, client, gateway = rig.topology, rig.topology.client, rig.target
    certify(
        "ecdsa",
        {
            gateway: ("CN=cert.example.org", "cert.example.org"),
            client: ("CN=client.example.org", "client.example.org"),
        },
    )
    gateway.configure(GATEWAY.replace("PASSWORD", PASSWORD), "bench.conf")
    client.configure(CLIENT.replace("PASSWORD", PASSWORD).replace("GATEWAY", gateway.address), "bench.conf")
    gateway.charon.load()
    client.charon.load()
    # the model's session would be moved about by the client's sidecar
    topology.agent.stop()
    _terminate_all(client)
    samples: dict[str, tuple[list[float], list[float], list[int]]] = {kind: ([], [], []) for kind in KINDS}
    alone: list[dict[str, Any]] = []
    many: list[dict[str, Any]] = []
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}", number / rounds)
        for kind, connection in KINDS.items():
            cpu, latency, packets = samples[kind]
            meter, before, began = rig.meter(), _packets(client), time.monotonic()
            for message in client.charon.vici().initiate({"ike": connection, "child": "net", "loglevel": "-1"}):
                del message
            latency.append((time.monotonic() - began) * 1000)
            time.sleep(SETTLE_SECONDS)
            cpu.append(sum(used["cpu_s"] for used in meter.read().values()))
            packets.append(_packets(client) - before)
            _terminate_all(client)
            time.sleep(SETTLE_SECONDS)
        alone.append(resumptions(rig, 12, 1))
        many.append(resumptions(rig, 200, 200))
    return {
        "handshakes": {kind: _row(*values) for kind, values in samples.items()},
        "resumption alone": _mean(alone),
        "resumption among 200": _mean(many),
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "sessions": sum(row["sessions"] for row in rows),
        "failures": sum(row["failures"] for row in rows),
        "cpu_ms": round(median(row["cpu_us_each"] for row in rows) / 1000, 3),
        "p50_ms": round(median(row["answer_ms"]["p50"] for row in rows), 2),
        "p99_ms": round(max(row["answer_ms"]["p99"] for row in rows), 2),
        "confirmed_p50_ms": round(median(row["confirmed_ms"]["p50"] for row in rows), 2),
        "by_process_ms": {
            name: round(median(row["processes"][name]["cpu_us_each"] for row in rows) / 1000, 3)
            for name in rows[0]["processes"]
        },
    }


def _terminate_all(client: Host) -> None:
    for sa in client.charon.sas():
        client.swanctl("--terminate", "--ike-id", sa["uniqueid"], "--force", "--timeout", "1", check=False)
    if client.charon.sas():
        raise LabError(f"sessions that do not end: {json.dumps([sa['name'] for sa in client.charon.sas()])}")
