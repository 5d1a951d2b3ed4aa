"""This host: the sidecar on it, its socket, its queue, its rules, its key file."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

from bridge.charon.ha_message import PORT
from bridge.charon.ports import charon_ports
from bridge.check import foreign_rules
from bridge.check.finding import Finding, fail, ok, warn
from bridge.check.udp import process_name, udp_socket
from bridge.config import ClientConfig, GatewayConfig
from bridge.net import firewall, owner_rules, queue_rules
from bridge.net.nfqueue import queue_owner
from bridge.service import control
from bridge.stub.keyring import Keyring, SealError


def privileges() -> list[Finding]:
    if os.geteuid() == 0:
        return [ok("privileges", "running as root")]
    return [
        warn(
            "privileges",
            "not root: some checks cannot see enough, and the sidecar needs CAP_NET_ADMIN and CAP_NET_RAW",
            "run as root",
        )
    ]


def sidecar_pid(config: GatewayConfig | ClientConfig) -> int | None:
    """The process that listens on the control socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(config.control)
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return None
    return int(struct.unpack("3i", credentials)[0])


def sidecar(config: GatewayConfig | ClientConfig, pid: int | None) -> list[Finding]:
    """Whether it runs, and holds the socket that charon sends keys to; no other process may."""
    end = f"UDP {config.ha.listen}:{PORT}"
    role = "gateway" if isinstance(config, GatewayConfig) else "client"
    held = udp_socket(config.ha.listen, PORT)
    if held is None:
        return [
            fail(
                "sidecar",
                f"no process listens on {end}, to which charon sends session keys",
                f"start `ike-sa-sync {role}`, or its systemd socket, before charon",
            )
        ]
    # systemd holds it for a sidecar that is being restarted
    strangers = [holder for holder in held.holders() if holder.pid not in (1, pid)]
    if held.uid != 0 or strangers:
        who = f"process {strangers[0].pid} ({strangers[0].name})" if strangers else f"user {held.uid}"
        if pid is None and strangers and held.uid == 0:
            fix = f"if that is the sidecar, is `control: {config.control}` its socket? If not, stop it: it sees keys"
            return [warn("sidecar", f"{end} is held by {who}; no sidecar answers on {config.control}", fix)]
        return [
            fail("sidecar", f"{end}, where charon sends keys, is held by {who}", "stop that, then rekey: it saw keys")
        ]
    if pid is None:
        return [warn("sidecar", f"{end} is held, but no sidecar answers on {config.control}", f"start it: `{role}`")]
    if held.drops:
        return [
            warn(
                "sidecar", f"it lost {held.drops} messages of charon's since it was started", "raise ha.receive_buffer"
            )
        ]
    return [ok("sidecar", f"process {pid} holds {end}")]


def ha_rules(config: GatewayConfig | ClientConfig) -> list[Finding]:
    """Whether only root can send as charon or as the sidecar."""
    if config.ha.rules == "external":
        return []
    ends = (config.ha.charon, config.ha.listen)
    if owner_rules.present(ends, PORT):
        return [ok("HA rules", f"only root sends to and from {ends[0]} and {ends[1]}, UDP port {PORT}")]
    return [
        fail(
            "HA rules",
            f"any user of this host can send as charon or as the sidecar: no rules for {ends[0]} and {ends[1]}",
            "they come with the sidecar, within 5 s of its start and after a flush: is it running? see its log",
        )
    ]


async def match(config: GatewayConfig) -> list[Finding]:
    """Whether intercept.match fits the clients, as the sidecar has seen them."""
    if config.intercept.match == "first":
        return []
    try:
        counters = (await control.call(config.control, {"command": "counters"}))["counters"]
    except (control.ControlError, KeyError):
        return []
    clients = int(counters.get("clients_sync_last", 0))
    if clients:
        return [ok("match", f"{clients} clients sent IKE_SA_SYNC last within a day, as release 0.1 does")]
    return [
        warn(
            "match",
            "every handshake passes through the sidecar (intercept.match: anywhere), and no client needed that within "
            "a day, or since the sidecar started",
            "set intercept.match: first",
        )
    ]


def queue(config: GatewayConfig, pid: int | None) -> list[Finding]:
    """The kernel's queue, who reads it, and the rules that fill it."""
    number = config.intercept.queue
    try:
        backend = firewall.detect(
            queue_rules.rules(number, config.intercept.match, config.intercept.ports or charon_ports())
        )
    except firewall.RulesError as error:
        return [fail("NFQUEUE", str(error), "install nftables or iptables; modprobe nfnetlink_queue")]
    findings = [ok("NFQUEUE", f"this kernel takes rules by {backend}")]
    owner = queue_owner(number)
    if owner is not None and owner != pid:
        findings.append(
            fail(
                "queue",
                f"queue {number} is read by another program: netlink port {owner}{_named(owner)}",
                "stop it, or set another intercept.queue (and other rules, where they are external)",
            )
        )
    elif owner is None and pid is not None:
        findings.append(fail("queue", f"the sidecar does not read queue {number}", "see its log: nfqueue-unavailable"))
    findings += [
        fail(
            "bypass",
            f"a rule without bypass: {rule}",
            "add bypass (--queue-bypass): without it IKE stops when the sidecar does",
        )
        for rule in foreign_rules.without_bypass(number)
    ]
    if config.intercept.rules == "external":
        return findings
    if queue_rules.present(number):
        findings.append(ok("rules", f"requests with IKE_SA_SYNC come to queue {number}"))
        if not queue_rules.guarded():
            findings.append(
                warn(
                    "guard",
                    "a sidecar that hangs would hold up requests to resume: this kernel's iptables lack xt_recent",
                    "modprobe xt_recent, or install nftables; then restart the sidecar",
                )
            )
    else:
        fix = "they come with `ike-sa-sync gateway`; is it running, or did something flush them?"
        findings.append(warn("rules", f"no rules to queue {number} are in place", fix))
    return findings


def _named(port: int) -> str:
    """netlink's port id is the process id of a process's first such socket."""
    name = process_name(port)
    return f" ({name})" if name else ""


def key_file(config: GatewayConfig) -> list[Finding]:
    """Whether it can be used, and only by its owner."""
    path = Path(config.bank.key_file)
    try:
        keyring = Keyring.load(path)
        mode = stat.S_IMODE(path.stat().st_mode)
    except (SealError, OSError) as error:
        return [fail("key file", str(error), _key_fix(path))]
    keys = ", ".join(key_id.hex() for key_id in keyring.ids)
    return [ok("key file", f"{path}, mode {mode:04o}, key {keys}")]


def _key_fix(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"ike-sa-sync keygen {path}, or copy that of another gateway"
    except OSError:
        return "run as root; is it a file?"
    if stat.S_IMODE(mode) & 0o077:
        return f"chmod 600 {path}"
    if not os.access(path, os.R_OK):
        return "run as root"
    return f"copy that of another gateway, or write a new one: mv {path} {path}.old; ike-sa-sync keygen {path}"


def hooks(config: GatewayConfig) -> list[Finding]:
    """Whether the program of `hooks.session` can be called, and only root can change it; none without one."""
    if config.hooks.session is None:
        return []
    path = Path(config.hooks.session)
    fix = "hooks.session has to name an executable file, by its whole path, that only root can change"
    try:
        about = path.stat()
    except OSError as error:
        return [fail("hooks.session", f"{path}: {error.strerror}", fix)]
    if not path.is_absolute() or not stat.S_ISREG(about.st_mode) or not about.st_mode & 0o111:
        return [fail("hooks.session", f"{path} is no executable file", fix)]
    for place in (path, *path.parents):
        about = place.stat()
        # a folder like /tmp keeps others from replacing what is not theirs
        shared = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX
        if about.st_uid != 0 or (about.st_mode & 0o022 and not shared):
            return [fail("hooks.session", f"{place} can be changed by other users, and {path} runs as root", fix)]
    return [ok("hooks.session", str(path))]
