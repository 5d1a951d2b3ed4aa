"""The values that are read when they are asked for, and where they are read."""

from __future__ import annotations

from bridge.charon.charon import Charon
from bridge.service.metrics import Metrics


def of_charon(metrics: Metrics, charon: Charon) -> None:
    """What both roles have: charon's SAs and the two ends of its HA channel."""
    gauge, total = metrics.gauge, metrics.total

    def charon_drops() -> float:
        end = charon.channel.charon_socket()
        return float(end.drops) if end else 0.0

    gauge("charon_reachable", "1 while charon answers on VICI", lambda: float(charon.vici.connected))
    gauge("ha_ready", "1 while charon's ha plugin is there and understood", lambda: float(charon.channel.ready()))
    gauge("ike_sas", "established IKE_SAs of charon", lambda: charon.tracker.count()[0])
    total("ike_sas_unresumable", "IKE_SAs that cannot be resumed by their kind", lambda: charon.tracker.unresumable)
    total("ha_datagrams", "datagrams that charon's ha plugin sent", lambda: charon.channel.received)
    total("ha_malformed", "such datagrams that were not understood", lambda: charon.channel.malformed)
    total("ha_drops", "HA datagrams from charon that the kernel dropped", charon.channel.drops)
    total("ha_drops_charon", "HA datagrams to charon that the kernel dropped", charon_drops)
    charon.ha_rules.gauges(metrics)
