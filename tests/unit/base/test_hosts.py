"""Names of hosts that can be found, and those that cannot."""

from __future__ import annotations

import socket

import pytest

from pomscale.base import hosts
from pomscale.base.hosts import name_problem


def test_a_name_that_does_not_resolve_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_PATIENCE_S", 0.0)
    assert name_problem("localhost") is None
    assert name_problem("127.0.0.7") is None
    problem = name_problem("nowhere.invalid")
    assert problem is not None
    assert f"nowhere.invalid, cannot be found by its name on {socket.gethostname()}: " in problem
    assert "/etc/hosts" in problem


def test_a_name_server_that_is_busy_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")]

    def getaddrinfo(host: str, port: None) -> list[object]:
        if answers:
            raise answers.pop()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(hosts, "_AGAIN_S", 0.0)
    assert name_problem("n1") is None
