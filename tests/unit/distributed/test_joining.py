"""Ranks that do not find each other say so soon, with the host and the port at which they were to meet."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch
from torch.distributed.distributed_c10d import _get_default_group

from launch.node.verdict import _LOST_PEER
from pomscale.base import hosts
from pomscale.base.errors import PomscaleError
from pomscale.distributed.world import join_world

SOON = timedelta(seconds=1)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Of two ranks, at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free)}.items():
        monkeypatch.setenv(name, value)
    return free


@pytest.mark.parametrize("rank", [0, 1])
def test_the_join_has_a_limit_of_its_own(port: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(PomscaleError) as caught, join_world("cpu", timeout=timedelta(hours=1), join_timeout=SOON):
        pass
    where = f"rank {rank} on {socket.gethostname()} did not find all 2 ranks at 127.0.0.1 port {port}, after "
    assert str(caught.value).startswith(where)
    assert _LOST_PEER.search(str(caught.value)), "the job starts again: another rank, or the network, is the cause"


def test_a_port_that_is_taken_is_not_said_to_have_been_waited_for(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        limit, told = timedelta(seconds=987), f"port {port}, after [0-9.]+ s: .*EADDRINUSE"
        with pytest.raises(PomscaleError, match=told) as caught, join_world("cpu", join_timeout=limit):
            pass
    assert "987" not in str(caught.value)


def test_a_name_that_does_not_resolve_is_no_reason_to_wait(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_PATIENCE_S", 0.0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    not_found = r"nowhere\.invalid, cannot be found by its name"
    with pytest.raises(PomscaleError, match=not_found) as caught, join_world("cpu", timeout=timedelta(hours=1)):
        pass
    assert not _LOST_PEER.search(str(caught.value)), "it would be the same at the next start"


def test_collectives_have_the_timeout_of_the_run(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_world("cpu", timeout=timedelta(hours=2), join_timeout=SOON):
        assert _get_default_group()._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=2)
