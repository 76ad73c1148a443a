"""A real SLURM cluster for the tests that ask for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.cluster import SlurmCluster, missing_packages
from support.forking import standing_in
from support.running import UNHURRIED


@pytest.fixture(scope="session")
def _plain_cluster() -> Iterator[SlurmCluster]:
    yield from _running(accounting=False)


@pytest.fixture(scope="session")
def _accounted_cluster() -> Iterator[SlurmCluster]:
    yield from _running(accounting=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of a module that says WITH_AND_WITHOUT_ACCOUNTING run on both kinds of cluster, by `make test` on one."""
    asks_for = {"slurm", "slurm_accounted"} & set(metafunc.fixturenames)
    if asks_for == {"slurm"} and getattr(metafunc.module, "WITH_AND_WITHOUT_ACCOUNTING", False):
        with_sacct = pytest.param("_accounted_cluster", marks=pytest.mark.exhaustive, id="with sacct")
        metafunc.parametrize("slurm", [pytest.param("_plain_cluster", id="without sacct"), with_sacct], indirect=True)


@pytest.fixture
def slurm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """A cluster without accounting: sacct fails, as at sites that have none. Commands of this process use it."""
    yield from _in_use(request.getfixturevalue(getattr(request, "param", "_plain_cluster")), monkeypatch)


@pytest.fixture
def slurm_accounted(_accounted_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """A cluster with a real sacct. This process's commands use it."""
    yield from _in_use(_accounted_cluster, monkeypatch)


def _running(*, accounting: bool) -> Iterator[SlurmCluster]:
    if missing := missing_packages(accounting=accounting):
        pytest.skip(f"a SLURM cluster needs: apt-get install {' '.join(missing)}")
    with SlurmCluster(accounting=accounting) as cluster:
        cluster.environment |= {"PYTHONPATH": UNHURRIED["PYTHONPATH"], **standing_in()}
        yield cluster


def _in_use(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield cluster
    cluster.reset()
