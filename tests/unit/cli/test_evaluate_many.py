"""`evaluate images --every` and `--sweep`: the commands that they make of the one that was typed."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.pipelines import checkpoints, points
from pomscale.base.errors import InputError
from pomscale.cli.arguments import VerbParser
from pomscale.cli.evaluate import many
from pomscale.runs.checkpoint_folder import remove


def measure(arguments: argparse.Namespace) -> int:
    """Stand for the evaluation of one checkpoint: FID falls, and rises again with guidance."""
    if many.is_asked(arguments):
        return many.run(arguments)
    assert (Path(arguments.source) / "COMPLETE").is_file()
    arguments.work.mkdir(parents=True, exist_ok=True)
    settings = {"guidance": arguments.guidance, "interval": arguments.guidance_interval, "weights": arguments.weights}
    result = {"metrics": {"fid": (arguments.guidance - 1) ** 2 + 3 + arguments.seed}, "settings": settings}
    (arguments.work / "result.json").write_text(json.dumps(result))
    return 0


@pytest.fixture
def parser() -> VerbParser:
    """A parser with those options of `evaluate images` that matter here."""
    parser = VerbParser(prog="pomscale")
    images = parser.add_subparsers(required=True).add_parser("evaluate").add_subparsers().add_parser("images")
    images.add_argument("source")
    images.add_argument("--reference")
    images.add_argument("--guidance", type=float, default=0.0)
    images.add_argument("--guidance-interval", type=lambda text: [float(one) for one in text.split(",")])
    images.add_argument("--weights")
    images.add_argument("--seed", type=int, default=0)
    images.add_argument("--name", default="images")
    for option in ("--work", "--json", "--write-npz", "--write-tars", "--write-statistics"):
        images.add_argument(option, type=Path)
    for flag in ("--no-record", "--dry-run"):
        images.add_argument(flag, action="store_true")
    many.add(images)
    checks: list[str] = []
    images.set_defaults(check=lambda one: checks.append(f"all at {one.guidance:g}, {one.reference}"))
    images.set_defaults(check_drawing=lambda one: checks.append(f"drawing at {one.guidance:g}"))
    images.set_defaults(run=measure, checks=checks)
    return parser


def call(parser: VerbParser, words: str) -> int:
    arguments = parser.parse_args(["evaluate", "images", *shlex.split(words)])
    return int(arguments.run(arguments))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for samples in (64, 128):
        folder = tmp_path / "a run" / "checkpoints" / f"samples-{samples:012d}"
        folder.mkdir(parents=True)
        (folder / "COMPLETE").touch()
    return Path("a run")


def test_every_hands_on_the_options_but_its_own(parser: VerbParser, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Asked:
        def __init__(self, *arguments: Any, check: Callable[[], None]) -> None:
            asked.append(arguments)
            check()

        def follow(self) -> int:
            return 0

    monkeypatch.setattr(checkpoints, "CheckpointEvaluation", Asked)
    words = "--reference 'a run' --every 100 --guidance 1.5 'a run' --cluster local --name {x} --seed 7 --dry-run"
    with pytest.raises(ValueError, match="String should match pattern"):
        call(parser, words)
    call(parser, words.replace("{x}", "guided").replace("--seed 7", "--weights {y}"))
    folder, config, request = asked[0]
    assert (folder, config.name, config.every_samples) == (run, "guided", 100)
    assert (request.cluster_name, request.dry_run) == ("local", True)
    assert parser.parse_args(["evaluate", "images", "R"]).checks == ["all at 1.5, a run"]
    (command,) = config.run
    assert [word.format(checkpoint="C", folder="F") for word in shlex.split(command)] == [
        *["evaluate", "images", "--reference", "a run", "--guidance", "1.5", "C", "--weights", "{y}"],
        *["--no-record", "--work", "F/work", "--json", "F/figures.json"],
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("R --every 10", "needs --cluster"),
        ("R --every 10 --sweep guidance=1,2", "give one of them"),
        ("R --every 10 --cluster local --json x", "--json: each of these evaluations has its own"),
        ("R --sweep guidance=1,2 --write-npz x", "--write-npz: each of these evaluations has its own"),
        ("R --eve 10 --cluster local", "write these options in full"),
        ("R --cluster local", "--cluster: goes with --every or --sweep"),
        ("R --time 1:00:00", "--time: goes with"),
        ("R --sweep guidance=1 --cluster local --time 1:00:00", "a local job has no time limit"),
    ],
)
def test_what_does_not_go_together(parser: VerbParser, run: Path, words: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        call(parser, words.replace("R", "'a run'"))


def test_a_wrong_value_is_found_before_anything_is_measured(
    parser: VerbParser, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sweep in ("guidance=1,x", "guidanze=1"):
        with pytest.raises(SystemExit):
            call(parser, f"'a run' --sweep {sweep} --work w")
    assert "invalid float value: 'x'" in capsys.readouterr().err
    assert not Path("w").exists()


def test_points_that_differ_in_how_a_model_draws_share_what_else_is_to_check(parser: VerbParser, run: Path) -> None:
    call(parser, "'a run' --sweep guidance=0,1,2,reference=a,b --dry-run")
    checks = parser.parse_args(["evaluate", "images", "R"]).checks
    assert checks == ["all at 0, a", "all at 0, b", *(f"drawing at {at}" for at in (1, 1, 2, 2))]


def test_a_sweep_that_could_not_begin_leaves_nothing(
    parser: VerbParser, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise InputError("no such file")

    monkeypatch.setattr(many, "_check_points", refuse)
    with pytest.raises(InputError, match="no such file"):
        call(parser, "'a run' --sweep guidance=1,2 --work w")
    assert not Path("w").exists()


def test_a_sweep_goes_on_point_by_point_over_the_same_checkpoint(
    parser: VerbParser, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = "'a run' --sweep guidance=0,1,2 --sweep interval=0:1,0:0.9,average=ema --work w"
    measured: list[str] = []
    write = many._write

    def killed_after_two(folder: Path, points: Any) -> str:
        measured.append("")
        if len(measured) == 2:
            raise KeyboardInterrupt
        return write(folder, points)

    monkeypatch.setattr(many, "_write", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        call(parser, sweep)
    newest = run / "checkpoints" / "samples-000000000128"
    later = run / "checkpoints" / "samples-000000000192"
    newest.rename(later)  # training has gone on, and retention has deleted the newest of then
    monkeypatch.setattr(many, "_write", write)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path("w").glob("*/result.json")}
    assert len(before) == 2
    assert call(parser, sweep) == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    out = capsys.readouterr().out
    assert [line.split()[:4] for line in out.splitlines()[:3]] == [
        ["guidance", "interval", "average", "fid"],
        ["0", "0:1", "ema", "4"],
        ["0", "0:0.9", "ema", "4"],
    ]
    assert "sweep.png" in out
    rows = json.loads(Path("w/sweep.json").read_text())
    assert rows[-1]["settings"] == {"guidance": 2.0, "interval": [0.0, 0.9], "weights": "ema"}
    assert not list(Path("w").glob("samples-*")), "the checkpoint is let go once all points are measured"
    assert call(parser, sweep) == 0, "all is there: only the table is made"
    remove(later)


def test_a_sweep_over_another_source_needs_another_folder(parser: VerbParser, run: Path) -> None:
    call(parser, "'a run' --sweep guidance=1,2 --work w")
    with pytest.raises(InputError, match=r"holds a sweep over .*/a run; give another --work"):
        call(parser, "'a run/checkpoints/samples-000000000064' --sweep guidance=1,2 --work w")
    remove(run / "checkpoints" / "samples-000000000128")
    with pytest.raises(InputError, match="checkpoint samples-000000000128 of this sweep is gone"):
        call(parser, "'a run' --sweep guidance=1,2,3 --work w")


def test_a_sweep_with_other_options_needs_another_folder(
    parser: VerbParser, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(parser, "'a run' --sweep guidance=1,2 --work w --reference there --seed 3")
    for options in ("--reference here --seed 3", "--seed 3", "--reference there", "--reference there --seed 4"):
        with pytest.raises(InputError, match=r"w: holds a sweep with another --(reference|seed), .* another --work"):
            call(parser, f"'a run' --sweep guidance=1,2 --work w {options}")
    capsys.readouterr()
    # The same options go on, in another order, with further points.
    assert call(parser, "--seed 3 'a run' --reference there --sweep guidance=1,2,4 --work w --no-record") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_points_are_jobs_on_a_cluster(
    parser: VerbParser, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: dict[Path, list[str]] = {}

    def submit(asked: dict[Path, list[str]], request: Any) -> dict[Path, str]:
        submitted.update(asked)
        return dict.fromkeys(asked, "job 7")

    monkeypatch.setattr(points, "submit_points", submit)
    call(parser, "'a run' --sweep guidance=0,1 --cluster local")
    folder = Path("sweeps/a run").absolute()
    assert submitted[folder / "guidance=1"] == [
        *["evaluate", "images", f"{folder}/samples-000000000128", "--guidance", "1"],
        *["--no-record", "--work", f"{folder}/guidance=1"],
    ]
    out = capsys.readouterr().out
    assert "guidance=0: job 7" in out
    assert out.count("no result yet") == 2
    assert (folder / "samples-000000000128" / "COMPLETE").is_file(), "the jobs need it"


def test_a_dry_run_of_a_sweep_prints_the_commands(
    parser: VerbParser, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(parser, "'a run' --sweep seed=0,100,guidance=1 --dry-run")
    assert (
        capsys.readouterr().out.splitlines()[1].startswith("pomscale evaluate images 'a run' --seed 100 --guidance 1")
    )
    assert not Path("sweeps").exists()
