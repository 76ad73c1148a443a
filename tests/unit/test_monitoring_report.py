from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pomscale.errors import InputError
from pomscale.monitoring.names import validation_bin
from pomscale.monitoring.report import write_report
from pomscale.monitoring.sinks import JsonlSink

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Collects what a browser would load and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.resources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    run = tmp_path / "a&b $x$"
    (run / "samples").mkdir(parents=True)
    for incarnation, start in ((0, 1), (1, 100)):
        record = {"incarnation": incarnation, "started_unix_s": 1.8e9, "start_samples": 64 * (start - 1)}
        record |= {"num_ranks": 2, "host": f"node-{incarnation}<", "versions": {"torch": "2.13.0"}}
        with (run / "incarnations.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        sink = JsonlSink(run, incarnation)
        for step in range(start, start + 150):
            metrics: dict[str, float | str] = {
                "train/loss": 100.0 / step,
                "train/grad_norm": float("nan") if step == 9 else 1.0,
                "speed/samples_per_s": 500.0,
            }
            if step % 50 == 0:
                metrics |= {"validation/loss": 0.5, **{validation_bin(index): 0.1 * index + 0.1 for index in range(8)}}
            sink.log(64 * step, metrics)
        sink.close()
    rows: list[dict[str, object]] = [
        {"incarnation": 0, "samples": 0, "start": {"submitted_unix_s": 1_000, "process_unix_s": 4_600}},
        {"incarnation": 0, "samples": 6400, "seconds": {"start_up": 600, "step": 36_000, "data_wait": 1800}},
        {"incarnation": 0, "samples": 6400, "event": "rollback<", "to_samples": 4800},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps({"time_unix_s": 0, **row}) + "\n" for row in rows))
    for samples in range(6):
        Image.new("L", (8, 8), color=40 * samples).save(run / "samples" / f"{samples:012d}.png")
    (run / "recipe.yaml").write_text("name: <script>alert(1)</script>\n")
    (run / "code.json").write_text(json.dumps({"git_commit": "47ab44a", "dirty": True}))
    (run / "outcome.json").write_text(json.dumps({"state": "<i>finished</i>"}))
    for samples, committed in ((6400, True), (9600, False)):
        folder = run / "checkpoints" / f"samples-{samples:012d}"
        folder.mkdir(parents=True)
        meta = {
            "data": [{"fingerprint": "abc123"}],
            "card": {"codec": {"name": "pixel"}, "model": {"dim": "not again"}},
        }
        (folder / "checkpoint.json").write_text(json.dumps(meta) if committed else '{"card": ')
        if committed:
            (folder / "COMPLETE").touch()
    return run


def test_page_is_self_contained_and_escaped(run_folder: Path) -> None:
    paths = write_report(run_folder)
    assert (paths.png, paths.html) == (run_folder / "report.png", run_folder / "report.html")
    text = paths.html.read_text()
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "iframe", "i"}
    assert len(page.resources) == 4 + 4 + 1  # the newest grids; loss, bins, gradient norm, speed; wall time
    assert all(resource.startswith("data:image/png;base64,") for resource in page.resources)
    assert not re.search(r"url\(|@import", text)
    assert "a&amp;b $x$" in text
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;i&gt;finished&lt;/i&gt;" in text
    for expected in ("47ab44a", "2.13.0", "node-1&lt;", "abc123", "codec.name", "resumes: 1", "000000000005.png"):
        assert expected in text
    assert "not again" not in text
    # 11 h 40 min in all, 10 h of them steps, a quarter of which was given up.
    for kind, duration, share in (("productive", "7h 30m", "64.29%"), ("lost", "2h 30m", "21.43%")):
        row = re.search(rf"<td>{kind}<small>.*?</tr>", text)
        assert row is not None
        assert f">{duration}<" in row[0]
        assert f">{share}<" in row[0]
    assert "<b>64.3%</b><span>of the wall time was productive</span>" in text
    assert "rollback&lt;: 1" in text
    assert text.count("<td>complete</td>") == text.count("<td>incomplete, never loaded</td>") == 1
    assert text.index("000000000005.png") < text.index("000000000004.png")
    assert "000000000001.png" not in text
    with Image.open(paths.png) as picture:
        assert picture.size[0] == 1800


def test_report_of_a_young_run_into_another_folder(tmp_path: Path) -> None:
    run = tmp_path / "young"
    run.mkdir()
    sink = JsonlSink(run, 0)
    sink.log(8, {"train/loss": 1.0})
    sink.close()
    paths = write_report(run, tmp_path / "new" / "folder")
    assert paths.html.parent == tmp_path / "new" / "folder"
    assert "running or killed" in paths.html.read_text()
    assert paths.png.exists()
    assert not (run / "report.html").exists()


def test_report_without_metrics_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no metrics in"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="no metrics in"):
        write_report(tmp_path)
