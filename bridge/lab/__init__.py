"""Real strongSwan hosts in network namespaces: the demo, the tests and the benchmarks use the same ones."""

from bridge.lab.host import Host
from bridge.lab.lab import Lab
from bridge.lab.sidecar import Sidecar
from bridge.lab.space import LabError
from bridge.lab.topology import Topology, standard

__all__ = ["Host", "Lab", "LabError", "Sidecar", "Topology", "standard"]
