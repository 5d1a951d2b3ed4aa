"""What systemd wants to know of a service (sd_notify), and the sockets that it holds for one."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """sd_notify(3), where systemd asked for it."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


def inherited(kind: socket.SocketKind, address: tuple[str, int]) -> socket.socket | None:
    """The socket of this kind that systemd passed (sd_listen_fds(3)) and that is bound to `address`, if any."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    for descriptor in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0"))):
        sock = socket.socket(fileno=os.dup(descriptor))
        if sock.type == kind and sock.getsockname()[:2] == address:
            os.set_inheritable(sock.fileno(), False)
            return sock
        sock.close()
    return None
