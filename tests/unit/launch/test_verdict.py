"""What a job does after each way in which its ranks may end. Evidence in, verdict out."""

from __future__ import annotations

from typing import Any

import pytest

from launch.node.verdict import Evidence, decide_verdict
from launch.record.job import Ending, StartRecord, Verdict

HOSTS = ["n1", "n2"]
GLOO = "rank 0: RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]"
NCCL = "rank 1: DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"


def ending(rank: int, returncode: int, at: float = 100.0, **more: Any) -> Ending:
    return Ending(rank, HOSTS[rank // 2], 1000 + rank, 0.0, at, returncode, log=f"logs/rank-{rank:05d}.log", **more)


def outcome(rank: int, state: str, reason: str = "", at: float = 100.0) -> dict[str, Any]:
    return {"state": state, "incarnation": 1, "rank": rank, "ended_unix_s": at, "reason": reason}


def verdict(
    endings: list[Ending],
    outcomes: list[dict[str, Any]] = [],  # noqa: B006 (read only)
    *,
    samples: int | None = None,
    before: Verdict | None = None,
    num_ranks: int = 4,
    max_idle_requeues: int = 3,
) -> Verdict:
    start = StartRecord("7", 0, HOSTS, 2, 0.0, 0)
    evidence = Evidence(start, num_ranks, endings, {one["rank"]: one for one in outcomes}, samples)
    return decide_verdict(evidence, before, max_idle_requeues)


def test_finished() -> None:
    assert verdict([ending(rank, 0) for rank in range(4)]).action == "done"


def test_finished_though_a_rank_stumbles_at_its_exit() -> None:
    found = verdict([ending(0, 0), ending(1, -6)], [outcome(0, "finished")])
    assert (found.action, found.exit_code) == ("done", 0)


def test_a_stop_on_request_is_requeued() -> None:
    found = verdict([ending(rank, 75, ended_by="SIGUSR2") for rank in range(4)], samples=640)
    assert (found.action, found.exit_code, found.suspects) == ("requeue", 75, [])
    assert "SIGUSR2" in found.reason


def test_a_killed_rank_is_requeued_without_its_node() -> None:
    found = verdict(
        [ending(0, 1, 101.0), ending(1, 1, 101.0), ending(2, 1, 101.0, last_line=NCCL), ending(3, -9, 100.0)],
        [outcome(0, "failed", GLOO, 100.5), outcome(1, "failed", NCCL, 100.4)],
    )
    assert (found.action, found.suspects) == ("requeue", ["n2"])
    assert found.reason == "rank 3 on n2 was killed by SIGKILL"
    assert found.log == "logs/rank-00003.log"


def test_an_error_of_its_own_ends_the_job_and_is_told() -> None:
    """Also though the other ranks then lose it, and are killed or abort."""
    found = verdict(
        [ending(0, 1, 101.0), ending(1, 1, 100.0), ending(2, -6, 100.2), ending(3, -9, 130.0, ended_by="SIGTERM")],
        [outcome(0, "failed", GLOO, 100.9), outcome(1, "failed", "rank 1: ValueError: no such class", 100.0)],
    )
    assert (found.action, found.exit_code) == ("fail", 1)
    assert found.reason == "rank 1: ValueError: no such class (on n1)"
    assert found.log == "logs/rank-00001.log"


def test_what_follows_a_kill_is_no_error_of_its_own() -> None:
    found = verdict(
        [ending(0, 1, 111.0), ending(3, -11, 100.0)],
        [outcome(0, "failed", "rank 0: KeyError: what nobody foresaw", 110.0)],
    )
    assert (found.action, found.suspects) == ("requeue", ["n2"])


def test_wrong_input_before_the_run_began() -> None:
    found = verdict([ending(0, 2, last_line="dataset data/x: no manifest.json")], num_ranks=1)
    assert (found.action, found.exit_code) == ("fail", 2)
    assert found.reason == "rank 0 on n1: dataset data/x: no manifest.json"


def test_out_of_host_memory_is_its_own_fault() -> None:
    found = verdict([ending(0, 1, 101.0), ending(1, -9, 100.0, out_of_memory=True)], [outcome(0, "failed", GLOO)])
    assert found.action == "fail"
    assert "rank 1 on n1 was killed because the host memory ran out" in found.reason


def test_a_hang_is_requeued() -> None:
    endings = [ending(rank, 1) for rank in range(4)]
    found = verdict(endings, [outcome(rank, "hung", "no step for 600 s") for rank in range(4)])
    assert (found.action, found.suspects, found.reason) == ("requeue", [], "rank 0 hung: no step for 600 s")


@pytest.mark.parametrize("first", [outcome(0, "failed", GLOO), outcome(0, "hung", "no step for 600 s")])
def test_ranks_that_fall_silent_with_their_node(first: dict[str, Any]) -> None:
    found = verdict([ending(0, 1), ending(1, 1, last_line=GLOO)], [first])
    assert (found.action, found.suspects) == ("requeue", ["n2"])
    assert "rank 2, 3 on n2" in found.reason


def test_a_network_that_fails_blames_no_node() -> None:
    endings = [ending(rank, 1) for rank in range(4)]
    found = verdict(endings, [outcome(rank, "failed", GLOO) for rank in range(4)])
    assert (found.action, found.suspects) == ("requeue", [])


def test_a_rendezvous_that_fails_is_a_matter_of_the_network() -> None:
    words = "torch.distributed.DistNetworkError: The client socket has timed out after 60000ms"
    found = verdict([ending(rank, 1, last_line=words) for rank in range(4)])
    assert found.action == "requeue"


def test_a_rank_of_an_earlier_start_leaves_all_to_the_newer_one() -> None:
    found = verdict([ending(0, 1, last_line="a newer start (n3, process 4) of this run has taken over runs/x; ...")])
    assert found.action == "leave"


def test_skipped_items_are_told_by_the_exit_code() -> None:
    found = verdict([ending(0, 3)], num_ranks=1)
    assert (found.action, found.exit_code) == ("done", 3)


def test_a_second_signal_is_requeued_too() -> None:
    found = verdict([ending(0, 128 + 12, ended_by="SIGUSR2")], [outcome(0, "quit", "SIGUSR2 twice")], num_ranks=1)
    assert found.action == "requeue"
    assert "before it could save" in found.reason


def test_requeues_without_progress_come_to_an_end() -> None:
    killed = [ending(0, -9)]
    before, samples = None, 640
    for expected in (0, 1, 2, 3):
        before = verdict(killed, samples=samples, before=before, num_ranks=1)
        assert (before.action, before.num_idle) == ("requeue", expected)
    forward = verdict(killed, samples=samples + 32, before=before, num_ranks=1)
    assert (forward.action, forward.num_idle) == ("requeue", 0)
    last = verdict(killed, samples=samples, before=before, num_ranks=1)
    assert last.action == "fail"
    assert last.reason == "4 starts in a row made no progress; the last one: rank 0 on n1 was killed by SIGKILL"


def test_without_a_checkpoint_every_requeue_is_idle_but_those_of_an_encode_that_saved() -> None:
    assert verdict([ending(0, -9)], num_ranks=1).num_idle == 1
    assert verdict([ending(0, 75)], num_ranks=1).num_idle == 0
    assert verdict([ending(0, -9)], num_ranks=1, max_idle_requeues=0).action == "fail"


def test_a_failed_job_that_is_submitted_again_has_all_its_tries() -> None:
    failed = Verdict("fail", "4 starts in a row made no progress", 1, 0.0, num_idle=4, samples=640)
    found = verdict([ending(0, -9)], samples=640, before=failed, num_ranks=1)
    assert (found.action, found.num_idle) == ("requeue", 1)


def test_ranks_that_abort_since_they_have_lost_one_are_not_blamed() -> None:
    """As NCCL's own watchdog has it, and the rank that was lost may have died before or after by its guard's clock."""
    aborted = [ending(rank, -6, 99.0, last_line="frame #7: clone + 0x43") for rank in range(3)]
    found = verdict([*aborted, ending(3, -9, 100.0)])
    assert (found.action, found.suspects, found.reason) == ("requeue", ["n2"], "rank 3 on n2 was killed by SIGKILL")
    found = verdict(aborted[:2])
    assert (found.action, found.suspects) == ("requeue", ["n2"])
    assert "no sign of life from rank 2, 3 on n2" in found.reason
    found = verdict([*aborted, ending(3, -6, 100.0)])
    assert (found.action, found.suspects) == ("requeue", [])


def test_a_rank_that_aborts_alone_is_requeued_without_its_node() -> None:
    others = [ending(rank, 1, 101.0, last_line=GLOO) for rank in range(3)]
    found = verdict([*others, ending(3, -6)], [outcome(0, "failed", GLOO)])
    assert (found.action, found.suspects) == ("requeue", ["n2"])


def test_when_most_nodes_are_silent_none_is_blamed() -> None:
    """A file system that shows new files late, or a switch: there would be no node left to start on."""
    start = StartRecord("7", 0, [f"n{number}" for number in range(1, 9)], 2, 0.0, 0)
    told = [ending(0, 1, last_line=GLOO), ending(1, 1, last_line=GLOO)]
    found = decide_verdict(Evidence(start, 16, told, {}, None), None, 3)
    assert (found.action, found.suspects) == ("requeue", [])
    found = decide_verdict(Evidence(start, 4, told, {}, None), None, 3)
    assert found.suspects == ["n2"]


@pytest.mark.parametrize(
    "words",
    [
        "rank 2: AcceleratorError: CUDA error: uncorrectable ECC error encountered",
        "rank 2: OSError: [Errno 108] Cannot send after transport endpoint shutdown: 'runs/x/metrics.jsonl'",
    ],
)
def test_a_node_that_is_broken_is_avoided_though_it_is_a_rank_that_says_so(words: str) -> None:
    found = verdict(
        [ending(0, 1, 101.0), ending(1, 1, 101.0), ending(2, 1, 100.0), ending(3, 1, 101.0)],
        [outcome(0, "failed", GLOO, 100.9), outcome(2, "failed", words)],
    )
    assert (found.action, found.suspects) == ("requeue", ["n2"])
    assert found.reason == f"{words} (on n2)"
    assert verdict([ending(0, 1, last_line=words)], num_ranks=1).suspects == ["n1"]


def test_an_abort_after_an_error_does_not_excuse_it_however_the_clocks_go() -> None:
    found = verdict(
        [ending(0, -6, 90.0), ending(1, 1, 100.0), ending(2, -6, 90.0), ending(3, -6, 90.0)],
        [outcome(1, "failed", "rank 1: ValueError: no such class", 100.0)],
    )
    assert found.action == "fail"
