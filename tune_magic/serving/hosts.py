"""Addresses to listen on."""

from __future__ import annotations

import ipaddress
import socket

from tune_magic.errors import TuneError

NAMES_OF_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own, which no other can reach."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        TuneError: The port is taken, or the host is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise TuneError(
            f"Nothing can listen on {host}, port {port}: {error.strerror or error}.",
            hint="Take another `--port`; without one, a free one is found.",
        ) from error
    return listener
