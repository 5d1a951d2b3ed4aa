"""The running charon, compared with what strongswan-conf/ says it needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bridge.charon.conf_parser import ChildProposals, Settings
from bridge.charon.ha_message import PORT, VERSIONS
from bridge.charon.releases import crashes_on_activation, version_for
from bridge.charon.socket_diag import proc_address
from bridge.charon.vici_client import START_SECONDS, ViciClient
from bridge.charon.vici_types import ConnectionInfo, GuardInfo, ViciError
from bridge.charon.vpns import Vpn
from bridge.check.finding import Finding, fail, ok, warn
from bridge.check.udp import UdpSocket, udp_socket
from bridge.config import ClientConfig, GatewayConfig
from bridge.service import control, shipped_files

STRONGSWAN_CONF = Path("/etc/strongswan.conf")
DROP_IN = "strongswan-conf/ike-sa-sync.conf"
GOOD_HASH_TABLE = 1024
"""buckets from which on look-ups stay cheap for the number of SAs one worries about"""
BEST_HASH_TABLE = 4096
JOURNALS = ("journal", "syslog.daemon")
"""where charon-systemd and charon log to unless they are told otherwise"""
CHATTY = ("enc", "net", "cfg", "ike")
"""the log groups that tell of each message"""
HASHES = ("hmac", "kdf")
"""plugins that compute HMAC faster than openssl for messages as short as those that keys are derived from"""
PROMPT_SECONDS = 60.0
"""a client that takes longer to notice that its gateway is dead will be asked about it"""

RETRANSMIT_DEFAULTS = {"retransmit_timeout": 4.0, "retransmit_base": 1.8, "retransmit_tries": 5.0}
"""of charon's"""


@dataclass
class CharonAnswer:
    """What VICI and the files say about one charon."""

    release: str
    plugins: list[str]
    started: int
    """Unix seconds"""
    settings: Settings
    connections: dict[str, ConnectionInfo] = field(default_factory=dict)
    proposals: ChildProposals = field(default_factory=ChildProposals)
    guards: list[GuardInfo] = field(default_factory=list)

    def where(self, connection: str) -> tuple[str, str]:
        """The file that a connection was loaded from, and the command that loads it again."""
        if self.proposals.in_ipsec_conf(connection):
            return "ipsec.conf", "ipsec reload"
        return "swanctl.conf", "swanctl --load-conns"

    def setting(self, name: str) -> str | None:
        """An option of charon; charon-systemd reads both sections."""
        found = self.settings.get(f"charon-systemd.{name}")
        return self.settings.get(f"charon.{name}") if found is None else found


async def ask(config: GatewayConfig | ClientConfig) -> tuple[CharonAnswer | None, list[Finding]]:
    """What there is to know of this host's charon; None where it does not answer."""
    vici = ViciClient(config.vici)
    try:
        release = await vici.version()
        charon = CharonAnswer(
            release,
            await vici.plugins(),
            await vici.started(),
            Settings(STRONGSWAN_CONF),
            await vici.list_connections(),
            ChildProposals(Path(config.swanctl) if config.swanctl is not None else None),
            await vici.list_guards(),
        )
    except ViciError as error:
        fix = "start strongSwan (charon-systemd), or set `vici` to its socket"
        return None, [fail("charon", f"{config.vici}: {error}", fix)]
    return charon, [_release(release)]


def _release(release: str) -> Finding:
    version = version_for(release)
    if version is None:
        return warn(
            "charon",
            f"strongSwan {release} is newer than this release of ike-sa-sync: nothing is resumed until its first "
            "HA message has shown its version",
            "look at `ha_version` in `ike-sa-sync status` after the next handshake; if there is none, install a newer "
            "ike-sa-sync",
        )
    if crashes_on_activation(release):
        return warn(
            "charon",
            f"strongSwan {release}: its ha plugin crashes when rebuilt SAs are activated beside a handshake in progress"
            " in the same HA segment; resumptions wait for a segment that has none, and a gateway's sidecar holds"
            " requests back meanwhile, but not what strongSwan initiates itself",
            "install strongSwan 6.0.2 or later, where this is fixed",
        )
    return ok("charon", f"strongSwan {release}, ha message version {version}")


async def ha_version(config: GatewayConfig | ClientConfig) -> list[Finding]:
    """Whether the sidecar understands what its charon sends."""
    try:
        status = (await control.call(config.control, {"command": "status"}))["charon"]
    except (control.ControlError, KeyError):
        # whether there is a sidecar another check says
        return []
    version = status.get("ha_unsupported")
    if version is None:
        return []
    known = ", ".join(map(str, VERSIONS))
    return [
        fail(
            "ha version",
            f"charon's HA messages have version {version}, this release knows {known}: nothing is stored or resumed",
            "install a newer ike-sa-sync, or the strongSwan release before it",
        )
    ]


def plugin(config: GatewayConfig | ClientConfig, charon: CharonAnswer) -> list[Finding]:
    """Whether the ha plugin is there, and speaks with the sidecar."""
    end = f"{config.ha.charon}:{PORT}"
    if "ha" not in charon.plugins:
        if charon.setting("plugins.ha.load") == "no":
            return [fail("ha plugin", "charon.plugins.ha.load is no", "set it to yes, and restart strongSwan")]
        return [
            fail(
                "ha plugin",
                "charon runs without the ha plugin",
                f"install libcharon-extra-plugins and {DROP_IN}, then restart strongSwan",
            )
        ]
    socket = udp_socket(config.ha.charon, PORT)
    if socket is None:
        return [
            fail(
                "ha plugin",
                f"charon does not hold UDP {end}",
                f"set charon.plugins.ha.local = {config.ha.charon}, or ha.charon here, and restart strongSwan",
            )
        ]
    findings = [_held_by_charon(socket, end)]
    _, far = proc_address(config.ha.listen, PORT)
    if socket.remote != far:
        findings.append(
            fail(
                "ha remote",
                f"charon's ha plugin does not speak to {config.ha.listen}:{PORT}",
                f"set charon.plugins.ha.remote = {config.ha.listen}, or ha.listen here, and restart strongSwan",
            )
        )
    return findings


def _held_by_charon(socket: UdpSocket, end: str) -> Finding:
    strangers = [holder for holder in socket.holders() if not holder.name.startswith("charon")]
    if socket.uid != 0 or strangers:
        who = f"process {strangers[0].pid} ({strangers[0].name})" if strangers else f"user {socket.uid}"
        return fail("ha plugin", f"UDP {end} belongs to {who}, not to charon", "stop that, then restart strongSwan")
    if socket.drops:
        return warn(
            "ha plugin",
            f"charon lost {socket.drops} messages of the sidecar's since it was started",
            "raise net.core.rmem_default, and restart strongSwan",
        )
    return ok("ha plugin", f"charon holds UDP {end}")


def drop_in(config: GatewayConfig | ClientConfig, charon: CharonAnswer) -> list[Finding]:
    """Each option of the drop-in that charon's files set otherwise."""
    findings = []
    wanted = dict(Settings(shipped_files.path(DROP_IN)).leaves())
    wanted["charon.plugins.ha.local"] = config.ha.charon
    wanted["charon.plugins.ha.remote"] = config.ha.listen
    wanted["charon.plugins.ha.segment_count"] = str(config.ha.segments)
    for path, value in wanted.items():
        name = path.removeprefix("charon.")
        why = REASONS.get(name)
        found = charon.setting(name)
        shown = "not set" if found is None else found
        if why is None or _same(value, found if found is not None else why.default):
            continue
        text = f"{path} is {shown}: {why.text}"
        findings.append((fail if why.fatal else warn)(name, text, f"set it to {value}, and restart strongSwan"))
    findings += _hash_table(config, charon) + _never(config, charon)
    return findings or [ok("drop-in", f"charon is configured as {DROP_IN} says")]


@dataclass(frozen=True)
class Reason:
    """Why an option matters; `default` is charon's."""

    text: str
    fatal: bool = True
    default: str = ""


REASONS = {
    "plugins.ha.local": Reason("charon's end of the HA channel is elsewhere"),
    "plugins.ha.remote": Reason("charon sends its keys elsewhere"),
    "plugins.ha.segment_count": Reason(
        "it differs from ha.segments, and SAs are activated in the wrong segment", default="1"
    ),
    "plugins.ha.monitor": Reason("charon takes and drops segments by itself", default="yes"),
    "plugins.ha.resync": Reason("charon asks the sidecar for SAs at start", default="yes"),
    "plugins.ha.fifo_interface": Reason("anyone with its FIFO may switch segments", fatal=False, default="yes"),
}


def _same(wanted: str, found: str) -> bool:
    synonyms = {"1": "yes", "true": "yes", "enabled": "yes", "0": "no", "false": "no", "disabled": "no"}
    return wanted == found or (wanted in ("yes", "no") and synonyms.get(found.lower(), found.lower()) == wanted)


def _hash_table(config: GatewayConfig | ClientConfig, charon: CharonAnswer) -> list[Finding]:
    """More than in the drop-in is fine, and on a client it matters little."""
    buckets = _number(charon.setting("ikesa_table_size"), 1)
    if buckets >= GOOD_HASH_TABLE or isinstance(config, ClientConfig):
        return []
    return [
        warn(
            "ikesa_table_size",
            f"charon.ikesa_table_size is {buckets:g}: charon walks a long list to find an IKE_SA",
            "set it to 4096 and ikesa_table_segments to 256, and restart strongSwan",
        )
    ]


def cost(config: GatewayConfig | ClientConfig, charon: CharonAnswer) -> list[Finding]:
    """Choices of the drop-in that make handshakes and resumptions cheaper at a gateway, and that charon's files do not
    have."""
    if isinstance(config, ClientConfig):
        return []
    left = []
    if _number(charon.setting("ikesa_table_size"), 1) > BEST_HASH_TABLE:
        left.append("ikesa_table_size 4096 (65536: 4.3 ms more at each activation)")
    if all(_number(charon.setting(f"{log}.default"), 1) > 0 for log in JOURNALS) and not any(
        _number(charon.setting(f"{log}.{group}"), 1) <= 0 for log in JOURNALS for group in CHATTY
    ):
        left.append("log levels (30 to 100 µs of a resumption)")
    if "openssl" in charon.plugins and not all(
        _number(charon.setting(f"plugins.{name}.load"), 1) > 1 for name in HASHES
    ):
        left.append("hmac and kdf before openssl (15 to 28 µs)")
    if not (charon.setting("plugins.kernel-netlink.fwmark") or "").startswith("!") and not _same(
        "no", charon.setting("install_routes") or "yes"
    ):
        left.append("a mark for charon's packets (or it reads all routes for each CHILD_SA)")
    if not left:
        return []
    return [ok("cost", f"possible savings, commented in {DROP_IN}: {', '.join(left)}")]


def _never(config: GatewayConfig | ClientConfig, charon: CharonAnswer) -> list[Finding]:
    """What is not in the drop-in, and must not be set elsewhere."""
    findings = []
    if charon.setting("plugins.ha.secret") is not None:
        findings.append(
            fail(
                "plugins.ha.secret",
                "charon.plugins.ha.secret is set: charon wants IPsec around the HA channel",
                "remove it, the channel stays on this host; restart strongSwan",
            )
        )
    if _same("no", charon.setting("reuse_ikesa") or "yes"):
        # a gateway brings CHILD_SAs up by itself for sites only
        grade = fail if isinstance(config, ClientConfig) else warn
        findings.append(
            grade(
                "reuse_ikesa",
                "charon.reuse_ikesa is no: CHILD_SAs get an IKE_SA of their own instead of the resumed one",
                "remove that line, and restart strongSwan",
            )
        )
    return findings


def unread(charon: CharonAnswer) -> list[Finding]:
    """Files that were changed after charon had read them."""
    changed = []
    for path in charon.settings.files:
        try:
            if path.stat().st_mtime > charon.started + START_SECONDS:
                changed.append(str(path))
        except OSError:
            continue
    if not changed:
        return []
    return [
        warn(
            "restart",
            f"changed since charon was started: {', '.join(changed)}",
            "restart strongSwan: a reload does not apply the plugins' options",
        )
    ]


def patience(vpn: Vpn, charon: CharonAnswer) -> list[Finding]:
    """How long this client takes to notice that its gateway is dead."""
    if not vpn.resume_on_down:
        return []
    timeout, base, tries = (_number(charon.setting(name), default) for name, default in RETRANSMIT_DEFAULTS.items())
    given_up = sum(timeout * base**attempt for attempt in range(int(tries) + 1))
    findings = []
    for name in dict.fromkeys(entry.connection for entry in vpn.gateways):
        connection = charon.connections.get(name)
        if connection is None:
            continue
        if not connection.dpd_delay:
            where, load = charon.where(name)
            option, value = ("dpddelay", "with dpdaction = clear") if where == "ipsec.conf" else ("dpd_delay", "")
            findings.append(
                fail(
                    "dpd_delay",
                    f"connection {name} has no {option}: charon does not notice that its gateway is dead",
                    f"set {option} in {where}, for instance to 5s{' ' if value else ''}{value}; then {load}",
                )
            )
            continue
        seconds = connection.dpd_delay + given_up
        text = f"{connection.name}: a gateway that does not answer is given up after {seconds:.0f} s at most"
        if seconds <= PROMPT_SECONDS:
            findings.append(ok("dpd_delay", text))
        else:
            fix = "lower dpd_delay, and charon.retransmit_timeout, retransmit_base and retransmit_tries"
            findings.append(warn("dpd_delay", text, fix))
    return findings


def _number(text: str | None, default: float) -> float:
    try:
        return default if text is None else float(text)
    except ValueError:
        return default
