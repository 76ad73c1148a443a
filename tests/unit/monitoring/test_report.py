from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pomscale.base.errors import InputError
from pomscale.monitoring.report import compare
from pomscale.monitoring.report import run as run_report
from pomscale.monitoring.report.html import MAX_CLIP_BYTES
from pomscale.monitoring.report.plots import Panel, run_styles
from pomscale.monitoring.report.run import Run
from pomscale.monitoring.report.write import write_report
from pomscale.monitoring.sinks import JsonlSink
from pomscale.runs.evaluation_log import record
from pomscale.runs.history import read_history
from pomscale.runs.metric_names import evaluation_name, validation_bin

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
    for number, start in ((0, 1), (1, 100)):
        record = {"incarnation": number, "started_unix_s": 1.8e9, "start_samples": 64 * (start - 1)}
        record |= {"num_ranks": 2, "host": f"node-{number}<", "versions": {"torch": "2.13.0"}}
        with (run / "incarnations.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        sink = JsonlSink(run, number)
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


def begin(run: Path) -> Path:
    """Make a run of one step, whose plots take a tenth of the time of those of `run_folder`."""
    run.mkdir(parents=True)
    sink = JsonlSink(run, 0)
    sink.log(8, {"train/loss": 1.0})
    sink.close()
    return run


@pytest.fixture
def young(tmp_path: Path) -> Path:
    return begin(tmp_path / "young")


def test_page_is_self_contained_and_escaped(run_folder: Path) -> None:
    paths = write_report([run_folder])
    assert (paths.png, paths.html) == (run_folder / "report.png", run_folder / "report.html")
    text = paths.html.read_text()
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "iframe", "i"}
    assert page.resources.pop(0) == "data:,"  # no icon
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


def test_report_of_a_young_run_into_another_folder(young: Path, tmp_path: Path) -> None:
    paths = write_report([young], tmp_path / "new" / "folder")
    assert paths.html.parent == tmp_path / "new" / "folder"
    assert "running or killed" in paths.html.read_text()
    assert paths.png.exists()
    assert not (young / "report.html").exists()


def test_report_without_metrics_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no metrics in"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="no metrics in"):
        write_report([tmp_path])


# --- evaluations -----------------------------------------------------------------------------------------------------


def evaluate(run: Path, samples: int, accuracy: float) -> None:
    folder = run / "evaluations" / "digits" / f"samples-{samples:012d}"
    folder.mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "grid.png")
    (folder / "clip.mp4").write_bytes(b"not looked at")
    figures = {"accuracy": accuracy, "accuracy_real": 0.98, "by_class_00": accuracy, "by_class_01": 1.0}
    record(
        run,
        samples,
        {evaluation_name("digits", name): value for name, value in figures.items()},
        {evaluation_name("digits", name): folder / f"{name}.{end}" for name, end in (("grid", "png"), ("clip", "mp4"))},
    )


def test_evaluations_have_tables_curves_and_media(run_folder: Path) -> None:
    evaluate(run_folder, 6400, 0.5)
    evaluate(run_folder, 9600, 0.75)
    failed = run_folder / "evaluations" / "digits" / "samples-000000008000" / "failed.json"
    failed.parent.mkdir()
    failed.write_text(json.dumps({"reason": "no <disk>"}))
    text = write_report([run_folder]).html.read_text()
    page = Page(text)
    assert page.open == []
    section = text[text.index("<h2>Evaluations") : text.index("<h2>Wall time")]
    assert "failed at 8k samples: no &lt;disk&gt;" in section
    rows = re.findall(r"<tr><td>(.*?)</td><td class=\"number\">(.*?)</td><td class=\"number\">(.*?)</td></tr>", section)
    assert rows == [("9.6k", "0.75", "0.98"), ("6.4k", "0.5", "0.98"), ("9.6k", "0.75", "1"), ("6.4k", "0.5", "1")]
    assert "grid at 9.6k samples" in section
    assert section.count("<video") == section.count("data:video/mp4;base64,") == 1
    for plotted, expected in (("digits/accuracy", 1), ("digits/by_class", 1), ("digits/accuracy_real", 0)):
        assert text.count(f'alt="{plotted}"') == expected, "what is always the same is no curve"


def measure(run: Path, samples: int, fid: float, **settings: float) -> None:
    record(run, samples, {evaluation_name("images", "fid"): fid}, settings=settings)


def lines_of(panels: list[Panel]) -> dict[str, dict[str, list[float]]]:
    return {
        panel.title: {label: list(y) for label, (_, y) in panel.lines.items()}
        for panel in panels
        if panel.title.startswith("images")
    }


def test_results_of_other_settings_are_lines_of_their_own(run_folder: Path) -> None:
    for samples, fid in ((6400, 9.0), (9600, 8.0)):
        measure(run_folder, samples, fid, guidance=1.0, steps=50)
        measure(run_folder, samples, fid - 3, guidance=2.0, steps=50)
    panels = run_report._panels(read_history(run_folder))
    assert lines_of(panels) == {"images/fid": {"guidance 1": [9.0, 8.0], "guidance 2": [6.0, 5.0]}}
    text = write_report([run_folder]).html.read_text()
    assert text.count('alt="images/fid"') == 1
    assert '<th scope="row">guidance</th><td>2.0</td>' in text


def test_of_a_clip_that_is_too_large_its_sheet_is_shown(young: Path) -> None:
    clip = young / "samples" / "a-clip.mp4"
    clip.parent.mkdir()
    clip.write_bytes(bytes(MAX_CLIP_BYTES + 1))
    text = write_report([young]).html.read_text()
    assert "<video" not in text
    assert "a-clip.mp4: 8 MiB, see" in text
    assert 'alt="a-clip.mp4"' not in text
    Image.new("L", (8, 8)).save(clip.with_suffix(".png"))
    text = write_report([young]).html.read_text()
    assert text.count('alt="a-clip.mp4"') == 1
    assert "a-clip.mp4: 8 MiB, see" in text
    assert "<video" not in text


def test_a_clip_that_is_empty_or_gone_is_named(young: Path) -> None:
    clip = young / "samples" / "b-clip.mp4"
    clip.parent.mkdir()
    clip.touch()
    assert "b-clip.mp4: empty" in write_report([young]).html.read_text()
    clip.unlink()
    clip.symlink_to("nowhere.mp4")
    assert "b-clip.mp4: No such file" in write_report([young]).html.read_text()


def test_alerts_are_shown(young: Path) -> None:
    alert = {"samples": 6400, "time_unix_s": 1.8e9, "incarnation": 1, "event": "alert"}
    with (young / "events.jsonl").open("a") as file:
        file.write(json.dumps(alert | {"title": "stalled", "text": "no step for <300> s", "level": "WARN"}) + "\n")
    assert "stalled<small>no step for &lt;300&gt; s</small>" in write_report([young]).html.read_text()


# --- several runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(run_folder: Path, tmp_path: Path) -> list[Path]:
    """The same run twice, but for its name, learning rate and speed."""
    other = tmp_path / "other <b>"
    shutil.copytree(run_folder, other)
    (run_folder / "recipe.yaml").write_text("name: a\nseed: 0\noptimizer: {lr: 0.001, betas: [0.9, 0.99]}\n")
    (other / "recipe.yaml").write_text("name: b\nseed: 0\noptimizer: {lr: 0.002, betas: [0.9, 0.99]}\nema: {x: 1}\n")
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    faster = (json.dumps(row | {"speed/samples_per_s": 750.0}) for row in rows)
    (other / "metrics.jsonl").write_text("\n".join(faster) + "\n")
    evaluate(run_folder, 6400, 0.5)
    evaluate(other, 6400, 0.75)
    return [run_folder, other]


def cells(text: str, first: str) -> list[str]:
    """Cells of the row that begins with a cell."""
    row = re.search(rf"<tr><td[^>]*>{re.escape(first)}(?:<small>.*?</small>)?</td>(.*?)</tr>", text)
    assert row is not None, first
    return [re.sub(r"<small>.*?</small>|<[^>]+>", "", cell) for cell in row[1].split("</td>")[:-1]]


def test_runs_are_compared(two_runs: list[Path], tmp_path: Path) -> None:
    paths = write_report(two_runs, tmp_path / "out")
    assert (paths.png, paths.html) == (tmp_path / "out" / "comparison.png", tmp_path / "out" / "comparison.html")
    text = paths.html.read_text()
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "iframe", "b"}
    assert all(resource.startswith("data:") for resource in page.resources)
    assert not re.search(r"url\(|@import", text)
    asked = text[text.index("<h2>What was asked") : text.index("<h2>Newest")]
    assert cells(asked, "optimizer.lr") == ["0.001", "0.002"]
    assert cells(asked, "ema.x") == ["–", "1"]
    assert "seed" not in asked
    assert "betas" not in asked
    assert cells(text, "speed/samples_per_s") == ["500", "750"]
    assert cells(text, "evaluation/digits/accuracy") == ["0.5", "0.75"]
    assert cells(text, "productive") == ["7h 30m", "7h 30m"]
    plots = re.findall(r'alt="([^"]+)"', text)
    assert plots[:3] == ["training loss", "held-out loss", "last held-out loss by time bin, 0 = nearest to the data"]
    assert "digits/accuracy" in plots
    assert "digits/accuracy_real" not in plots
    assert text.count('class="key"') == 2
    with Image.open(paths.png) as picture:
        assert picture.size[0] == 1800


def test_runs_share_a_plot_only_of_the_same_settings(two_runs: list[Path]) -> None:
    one, other = two_runs
    for samples in (6400, 9600):
        measure(one, samples, 9.0 + samples, guidance=1.0)
        measure(other, samples, 7.0 + samples, guidance=2.0)
        measure(other, samples, 8.0 + samples, guidance=1.0)
    runs = [Run(folder, read_history(folder), None) for folder in two_runs]
    panels = lines_of(compare._panels(compare._named(runs)))
    assert panels == {
        "images/fid: guidance 1": {one.name: [6409.0, 9609.0], other.name: [6408.0, 9608.0]},
        "images/fid: guidance 2": {other.name: [6407.0, 9607.0]},
    }
    text = write_report(two_runs).html.read_text()
    assert cells(text, "evaluation/images/fid") == ["9609", "9608"]


def test_losses_of_two_objectives_share_no_plot_but_that_of_v(two_runs: list[Path]) -> None:
    for folder, diffusion in zip(two_runs, ("{objective: flow}", "{objective: x, noise_scale: 2}"), strict=True):
        with (folder / "recipe.yaml").open("a") as recipe:
            recipe.write(f"diffusion: {diffusion}\n")
        JsonlSink(folder, 1).log(100_000, {"validation/v_loss": 0.25})
    runs = [Run(folder, read_history(folder), None) for folder in two_runs]
    names = [folder.name for folder in two_runs]
    panels = {panel.title: list(panel.lines) for panel in compare._panels(compare._named(runs))}
    assert panels[run_report.V_LOSS_TITLE] == names
    for loss in ("training loss", "held-out loss", "last held-out loss by time bin, 0 = nearest to the data"):
        assert loss not in panels
        assert panels[f"{loss}, v"] == names[:1]
        assert panels[f"{loss}, v of x, clamp 0.05, noise scale 2"] == names[1:]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [begin(tmp_path / place / "run") for place in ("here", "there")]
    text = write_report(folders).html.read_text()
    assert (folders[0].parent / "comparison.html").is_file()
    assert "here/run" in text
    assert "there/run" in text


def test_the_same_run_twice_is_an_input_error(run_folder: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        write_report([run_folder, run_folder / ".." / run_folder.name])


def test_many_runs_differ_in_colour_or_dash() -> None:
    styles = run_styles([str(number) for number in range(21)])
    assert len({(style.color, style.dash) for style in styles.values()}) == 21
