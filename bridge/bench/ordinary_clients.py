"""Many ordinary clients, whose sessions another gateway takes over as they are."""

from __future__ import annotations

import json
import random
import time
from typing import Any

from bridge.bench.client_socket import ClientSocket
from bridge.bench.ordinary import Ordinary
from bridge.ike.message import MalformedMessage

READ_AT_ONCE = 64
PROGRESS_SECONDS = 0.5
ESP_SECONDS = 0.1
"""between two packets of a client that sends ESP"""


class OrdinaryClients:
    """They only answer."""

    def __init__(self, sock: ClientSocket) -> None:
        self._socket = sock
        self._clients: dict[bytes, Ordinary] = {}
        self._strange = 0

    def add(self, client: Ordinary) -> None:
        """One with its session."""
        self._clients[client.spi_i] = client

    def takeover(self, address: str, seconds: float, active: int) -> dict[str, Any]:
        """Answer the gateway that takes the sessions of ordinary clients over. The first ones of `active` send ESP."""
        clients = list(self._clients.values())
        senders = random.sample(clients, min(active, len(clients)))
        cpu, said, again, left = time.process_time(), 0.0, 0.0, len(clients)
        end = time.monotonic() + seconds
        while left and (now := time.monotonic()) < end:
            if now >= again:
                again = now + ESP_SECONDS
                for client in senders:
                    if not client.keyed:
                        self._socket.send(client.esp(), client.address, address, ike=False)
            left -= self._answer(address, now)
            if now >= said + PROGRESS_SECONDS:
                said = now
                print(json.dumps({"progress": 1 - left / len(clients)}), flush=True)
        return {
            "sessions": len(clients),
            "asked": [client.asked for client in clients if client.asked],
            "keyed": [client.keyed for client in clients if client.keyed],
            "active": [client.keyed for client in senders if client.keyed],
            "strange": self._strange,
            "generator_cpu_s": time.process_time() - cpu,
        }

    def _answer(self, gateway: str, now: float) -> int:
        """Answer what is there, up to a limit; how many clients have new keys since."""
        keyed = 0
        for _ in range(READ_AT_ONCE):
            message = self._socket.receive()
            if message is None:
                self._socket.wait(5)
                return keyed
            client = self._clients.get(message[:8])
            if client is None:
                self._strange += 1
                continue
            had = client.keyed
            try:
                answer = client.request(message, now)
            except MalformedMessage:
                self._strange += 1
                continue
            keyed += bool(client.keyed and not had)
            if answer is not None:
                self._socket.send(answer, client.address, gateway)
        return keyed
