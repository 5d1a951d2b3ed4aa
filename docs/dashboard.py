"""Draw monitoring/grafana-dashboard.json with the data of a real failover, as an SVG: python docs/dashboard.py OUT.svg

Grafana is not needed: the panels' own queries go to a Prometheus in the lab, and its answers are drawn in the panels'
places. As root. The story: eight clients at gw1, which is killed; their sessions go to gw2. gw1 comes back, and gets
its half again (`drain --until-even`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from bridge.lab import Lab, Topology, standard
from bridge.lab.daemon import wait_until
from bridge.lab.demo import Ping
from bridge.lab.host import Host
from bridge.lab.sidecar import Sidecar
from bridge.lab.topology import CHOICES, SITE, client_config, client_host

MONITORING = Path(__file__).parents[1] / "monitoring"
PORT = 9090
CLIENTS = 8
PHASE = 45.0
"""seconds of each part of the story"""
STEP = 1
"""seconds between two points"""
INTERVAL = "10s"
"""what a rate is over, as Grafana chooses it by the scrape interval, here 1 s"""

COLUMN, ROW, EDGE, LEGEND = 58, 32, 8, 16
"""pixels: a column and a row of Grafana's grid, the gap between panels, a line of the legend"""
LINES = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0", "#508642", "#cca300")
STYLE = """
text { font: 11px sans-serif; fill: #d8d9da } .t { font-weight: bold; font-size: 12px } .r { font-size: 15px }
.a { fill: #8e8e8e; font-size: 10px } .s { font-size: 15px; fill: #fff } polyline { fill: none; stroke-width: 1.5 }
"""
FIGURE = 0.58
"""width of a letter, in its height"""

Series = tuple[str, list[tuple[float, float]]]
"""name and (Unix time, value)"""
Ask = Callable[[str], list[tuple[Mapping[str, str], list[tuple[float, float]]]]]
"""the series that a query gives over the time that is drawn: labels and (Unix time, value)"""


def named(pattern: str, labels: Mapping[str, str]) -> str:
    """A legend as Grafana fills it in."""
    for name in {part.split("}}")[0] for part in pattern.split("{{")[1:]}:
        pattern = pattern.replace("{{" + name + "}}", labels.get(name, ""))
    return pattern.strip()


def value(number: float, unit: str) -> str:
    """A number of an axis with its unit."""
    if unit == "s":
        return f"{number * 1000:.3g} ms" if number < 1 else f"{number:.3g} s"
    if unit == "bytes":
        return f"{number / 2**20:.3g} MiB"
    return f"{number:.3g}" + ("/s" if unit == "ops" else "")


def unbroken(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The parts between which there was nothing to scrape."""
    parts: list[list[tuple[float, float]]] = []
    for point in points:
        if not parts or point[0] - parts[-1][-1][0] > 1.5 * STEP:
            parts.append([])
        parts[-1].append(point)
    return parts


def curves(
    panel: Mapping[str, Any],
    series: Sequence[Series],
    box: tuple[float, float, float, float],
    span: tuple[float, float],
) -> list[str]:
    """A panel of type timeseries: lines over time, and whose they are."""
    x, y, width, height = box
    begin, end = span
    shown = [one for one in series if any(number for _, number in one[1])]
    zeros = len(series) - len(shown)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    # the legend's lines, as many letters as fit
    lines: list[list[tuple[str, str]]] = [[]]
    used = 0.0
    entries = [(LINES[number % len(LINES)], name) for number, (name, _) in enumerate(shown)]
    entries += [("none", f"{zeros} series at 0")] if zeros else []
    for entry in entries:
        room = 22 + len(entry[1]) * 11 * FIGURE
        if used + room > width - 16 and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += room
    left, top = x + 52, y + 26
    right, bottom = x + width - 10, y + height - 22 - LEGEND * len(lines)
    numbers = [number for _, points in shown for _, number in points]
    most = max(numbers, default=1.0) or 1.0

    def place(at: float, number: float) -> str:
        across = left + (at - begin) / (end - begin) * (right - left)
        return f"{across:.1f},{bottom - number / most * (bottom - top):.1f}"

    out = []
    for share in (0.0, 0.5, 1.0):
        level = bottom - share * (bottom - top)
        out.append(f'<line x1="{left}" x2="{right}" y1="{level:.1f}" y2="{level:.1f}" stroke="#2c3235"/>')
        out.append(
            f'<text class="a" x="{left - 5}" y="{level + 3:.1f}" text-anchor="end">{value(share * most, unit)}</text>'
        )
        at = begin + share * (end - begin)
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        spot = left + share * (right - left)
        out.append(f'<text class="a" x="{spot:.1f}" y="{bottom + 13}" text-anchor="{anchor}">{at - begin:.0f} s</text>')
    for number, (_, points) in enumerate(shown):
        for part in unbroken(points):
            drawn = " ".join(place(*point) for point in part)
            out.append(f'<polyline points="{drawn}" stroke="{LINES[number % len(LINES)]}"/>')
    level = bottom + 28
    for line in lines:
        spot = x + 10.0
        for colour, name in line:
            out.append(f'<rect x="{spot:.1f}" y="{level - 5:.1f}" width="10" height="3" fill="{colour}"/>')
            out.append(f'<text x="{spot + 14:.1f}" y="{level:.1f}">{escape(name)}</text>')
            spot += 22 + len(name) * 11 * FIGURE
        level += LEGEND
    return out


def states(panel: Mapping[str, Any], series: Sequence[Series], box: tuple[float, float, float, float]) -> list[str]:
    """A panel of type stat: the last value of each, in its colour."""
    x, y, width, height = box
    options = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    out = []
    each = (width - 12) / (len(series) or 1)
    for number, (name, points) in enumerate(series):
        state = options[f"{points[-1][1]:.0f}"]
        spot = x + 6 + number * each
        size = f'width="{each - 4:.1f}" height="{height - 30}"'
        out.append(f'<rect x="{spot:.1f}" y="{y + 24}" {size} fill="{state["color"]}" opacity="0.7"/>')
        centre = f'x="{spot + each / 2 - 2:.1f}" text-anchor="middle"'
        out.append(f'<text class="s" {centre} y="{y + height / 2 + 12}">{escape(state["text"])}</text>')
        out.append(f'<text {centre} y="{y + height - 14}">{escape(name)}</text>')
    return out


def draw(dashboard: Mapping[str, Any], host: Host, begin: float, end: float) -> str:
    """The dashboard as an SVG, with what the Prometheus on a host knows of a time."""
    ask = answers(host, begin, end)
    width = 24 * COLUMN + EDGE
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"]) * ROW + EDGE
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">']
    out += [f"<style>{STYLE}</style>", f'<rect width="{width}" height="{height}" fill="#111217"/>']
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        x, y = place["x"] * COLUMN + EDGE, place["y"] * ROW + EDGE
        w, h = place["w"] * COLUMN - EDGE, place["h"] * ROW - EDGE
        if panel["type"] == "row":
            out.append(f'<text class="r" x="{x}" y="{y + 16}">{escape(panel["title"])}</text>')
            continue
        out.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="#181b1f" stroke="#2c3235"/>')
        out.append(f'<text class="t" x="{x + 8}" y="{y + 16}">{escape(panel["title"])}</text>')
        series: list[Series] = []
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", INTERVAL).replace("$instance", ".+")
            series += [(named(target["legendFormat"], labels), points) for labels, points in ask(query)]
        if panel["type"] == "timeseries":
            out += curves(panel, series, (x, y, w, h), (begin, end))
        else:
            out += states(panel, series, (x, y, w, h))
    return "\n".join([*out, "</svg>"]) + "\n"


def answers(host: Host, begin: float, end: float) -> Ask:
    """What the Prometheus on a host knows of a time."""

    def ask(query: str) -> list[tuple[Mapping[str, str], list[tuple[float, float]]]]:
        said = host.run(
            *(
                "promtool",
                "query",
                "range",
                "-o",
                "json",
                f"--start={begin:.0f}",
                f"--end={end:.0f}",
                f"--step={STEP}s",
            ),
            *(f"http://127.0.0.1:{PORT}", query),
        ).stdout
        return [
            (one["metric"], [(float(at), float(number)) for at, number in one["values"] if number != "NaN"])
            for one in json.loads(said)
        ]

    return ask


def watch(host: Host, targets: Mapping[str, str]) -> None:
    """Start a Prometheus on a host that scrapes sidecars, instance by address, once a second, and ends with the lab."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["rule_files"] = [str(MONITORING / "ike-sa-sync.rules.yml")]
    [job] = config["scrape_configs"]
    job["scrape_interval"] = "1s"
    job["static_configs"] = [{"targets": [it], "labels": {"instance": name}} for name, it in targets.items()]
    folder = host.directory / "prometheus"
    folder.mkdir()
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("w") as log:
        host.popen(
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{PORT}",
            stdout=log,
            stderr=log,
        )
    wait_until(lambda: "Server is ready" in (folder / "log").read_text(), "Prometheus", 120)


def at(clients: Sequence[tuple[Host, Sidecar]], gateway: Host) -> int:
    """How many clients have their session there."""
    return sum([sa["remote-host"] for sa in host.charon.sas()] == [gateway.address] for host, _ in clients)


def story(topology: Topology, clients: Sequence[tuple[Host, Sidecar]]) -> tuple[float, float]:
    """A failover and the way back; when it began and ended."""
    gw1, gw2 = topology.gw1, topology.gw2
    for _, sidecar in clients:
        sidecar.start(wait=False)
    for host, sidecar in clients:
        host.charon.start()
        sidecar.wait_ready()
        host.charon.initiate("net", "home")
    pings = [Ping(host, SITE, 0.2) for host, _ in clients]
    for ping in pings:
        wait_until(lambda ping=ping: ping.answers() > 0, "traffic")  # type: ignore[misc]
    began = time.time()
    time.sleep(PHASE)
    topology.kill_gateway(gw1)
    wait_until(lambda: at(clients, gw2) == len(clients), "all sessions at gw2", 120)
    time.sleep(PHASE)
    topology.gateways["gw1"].start()
    gw1.charon.start()
    time.sleep(PHASE)
    topology.gateways["gw2"].command("drain", "--to", gw1.address, "--until-even", timeout=120)
    wait_until(lambda: at(clients, gw1) == len(clients) // 2, "half of the sessions at gw1", 120)
    time.sleep(PHASE)
    return began, time.time()


def main(out: Path) -> None:
    with Lab() as lab:
        topology = standard(lab, start=False, ha_pools=True)
        for sidecar in topology.gateways.values():
            sidecar.config["failover"] = {"announce": True, "detect": 1.0}
        topology.gateways["gw1"].config["metrics"] = f"{topology.gw1.address}:9470"
        topology.gateways["gw2"].config["metrics"] = f"{topology.gw2.address}:9470"
        clients = []
        for number in range(CLIENTS):
            host = client_host(lab, f"client{number}", f"192.168.50.{100 + number}", topology.secret)
            metrics = {"metrics": f"{host.address}:9471"}
            clients.append((host, host.sidecar("client", client_config(CHOICES) | metrics)))
        topology.start()
        scraped = {gateway.name: f"{gateway.address}:9470" for gateway in (topology.gw1, topology.gw2)}
        watch(topology.bank.host, scraped | {"client": f"{clients[0][0].address}:9471"})
        dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
        out.write_text(draw(dashboard, topology.bank.host, *story(topology, clients)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
