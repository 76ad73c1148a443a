"""Names of hosts: whether this machine can find another one by its name."""

from __future__ import annotations

import socket
import time

NOT_FOUND = "cannot be found by its name"
"""Part of the message about a host whose name does not resolve."""

_PATIENCE_S, _AGAIN_S = 30.0, 2.0  # a name server that is busy answers within seconds


def name_problem(host: str) -> str | None:
    """Return why a host cannot be found by its name, as a message for people; None if it can be found.

    Without an answer of the name server it is asked again for half a minute.
    """
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            socket.getaddrinfo(host, None)
            return None
        except OSError as error:
            if error.errno != socket.EAI_AGAIN or time.monotonic() > deadline_s:
                return (
                    f"the first node, {host}, {NOT_FOUND} on {socket.gethostname()}: {error.strerror}; the nodes of a "
                    "job must know each other's names (DNS or /etc/hosts, which a container may lack)"
                )
        time.sleep(_AGAIN_S)
