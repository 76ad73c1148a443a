"""The pages of `pomscale report` in a real browser: they load nothing, show everything, and fit a telephone."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pomscale.monitoring.report.write import write_report
from pomscale.monitoring.sinks import JsonlSink
from pomscale.runs.evaluation_log import record
from pomscale.runs.metric_names import evaluation_name, validation_bin
from support.browser import CHROMIUM, Browser, open_browser

pytest.importorskip("av", reason="clips need PyAV: pip install -e '.[video]'")
from support.make_video import numbered_frame, write_video

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: apt-get install --no-install-recommends chromium"
)

LOOK = """(async () => {
  const images = [...document.images];
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  const videos = [...document.querySelectorAll("video")];
  await Promise.all(videos.map(video => video.readyState ? null : new Promise(done => {
    video.addEventListener("loadedmetadata", done); video.addEventListener("error", done); })));
  const isSeen = element => element.getBoundingClientRect().width > 0;
  return {
    images: images.map(image => [image.alt, image.naturalWidth, image.naturalHeight, isSeen(image)]),
    videos: videos.map(video => [video.videoWidth, video.videoHeight]),
    headings: [...document.querySelectorAll("h2")].map(heading => heading.textContent),
    tables: [...document.querySelectorAll("table")].map(table => table.rows.length),
    background: getComputedStyle(document.body).backgroundColor,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    outside: [...document.querySelectorAll("main *")].filter(element => {
      const box = element.getBoundingClientRect();
      return !element.closest(".card") && (box.right > innerWidth + 0.5 || box.left < -0.5);
    }).map(element => element.outerHTML.slice(0, 80)),
  };
})()"""


# What somebody sees who plays a clip: the middle of each bar of the frame at half of its time, which is number 4 after
# the first, a multiple of 100. A clip of 0.3 s that loops seeks by itself meanwhile, so an event of the end of a seek
# may be of another one: the frame is looked at until it is that one, or is given back as it is after a minute.
PLAY = """(async () => {
  const found = [];
  for (const video of document.querySelectorAll("video")) {
    const poster = new Image();
    poster.src = video.poster;
    await poster.decode();
    const attributes = [video.controls, video.loop, video.muted, video.playsInline, video.autoplay];
    await video.play();
    video.pause();
    video.loop = false;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const context = canvas.getContext("2d", {willReadFrequently: true});
    const look = () => {
      context.drawImage(video, 0, 0);
      let number = 0;
      for (let bar = 0; bar < 10; bar++) {
        const row = Math.floor((bar + .5) * canvas.height / 10);
        number += (context.getImageData(canvas.width / 2, row, 1, 1).data[0] > 127) * 2 ** bar;
      }
      return number;
    };
    const middle = video.duration / 2, end_ms = performance.now() + 60000;
    let number;
    do {
      if (!video.seeking && Math.abs(video.currentTime - middle) > 1e-3) video.currentTime = middle;
      await new Promise(done => setTimeout(done, 20));
      number = look();
    } while ((video.seeking || number % 100 != 4) && performance.now() < end_ms);
    found.push({
      number,
      poster: [poster.naturalWidth, poster.naturalHeight],
      attributes,
      caption: video.parentElement.querySelector("figcaption").innerText,
      top: video.getBoundingClientRect().top,
    });
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def make_run(folder: Path, number: int) -> Path:
    """With all that a report may show; names and reasons are as long as they get."""
    (folder / "samples").mkdir(parents=True)
    (folder / "evaluations").mkdir()
    lines = {
        "recipe.yaml": f"name: run-{number}\noptimizer: {{lr: {0.001 * number}}}\ndata: {{path: {'/long' * 30}}}\n",
        "outcome.json": json.dumps({"state": "failed", "reason": "word" * 60}),
        "code.json": json.dumps({"git_commit": 40 * "a", "dirty": True}),
        "incarnations.jsonl": json.dumps(
            {"incarnation": 0, "started_unix_s": 1.8e9, "start_samples": 0, "num_ranks": 512, "host": "node" * 20}
        ),
        "events.jsonl": "\n".join(
            json.dumps({"incarnation": 0, "samples": samples, "time_unix_s": 1.8e9, **row})
            for samples, row in (
                (0, {"start": {"submitted_unix_s": 1_000, "process_unix_s": 4_600}}),
                (6400, {"seconds": {"start_up": 600, "step": 36_000 / number, "data_wait": 1800}}),
                (6400, {"event": "alert", "title": "stalled", "text": "node" * 50, "level": "WARN"}),
            )
        ),
    }
    for name, text in lines.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    sink = JsonlSink(folder, 0)
    for step in range(1, 201):
        metrics: dict[str, float | str] = {
            "train/loss": number / math.sqrt(step),
            "train/grad_norm": float("inf") if step == 7 else 1.0 + 0.1 * math.sin(step),
            "speed/samples_per_s": 500.0 * number,
        }
        if step % 50 == 0:
            metrics |= {"validation/loss": 1 / step, **{validation_bin(index): index / step for index in range(8)}}
        sink.log(64 * step, metrics)
    sink.close()
    for samples in (6400, 12800):
        Image.new("L", (89, 89), color=200).save(folder / "samples" / f"samples-{samples:012d}.png")
        picture = folder / "evaluations" / f"grid-{samples}.png"
        Image.new("RGB", (640, 480)).save(picture)
        figures = {f"figure-{letter}": samples * place * number / 1e5 for place, letter in enumerate("abcdefghi")}
        named = {evaluation_name("fid-50k", name): value for name, value in figures.items()}
        record(folder, samples, named, {evaluation_name("fid-50k", "grid"): picture})
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / f"run-{number}-{'with-a-long-name' * 4}", number) for number in (1, 2, 3)]
    return {"one": write_report(runs[:1]).html, "several": write_report(runs).html}


def problems(found: dict[str, Any]) -> list[str]:
    """Of a page as LOOK saw it."""
    told = [f"picture {alt!r} is {width}x{height}" for alt, width, height, _ in found["images"] if not width * height]
    told += [f"picture {alt!r} cannot be seen" for alt, _, _, is_seen in found["images"] if not is_seen]
    told += ["a table is empty" for rows in found["tables"] if rows < 2]
    told += [f"outside of the window: {element}" for element in found["outside"]]
    if found["overflow"] > 0:
        told.append(f"{found['overflow']} pixels wider than the window")
    return told


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize(
    ("which", "sections", "num_images"),
    [
        (
            "one",
            ["Samples", "Curves", "Evaluations of checkpoints", "Wall time", "Alerts", "Recipe"],
            2 + 4 + 8 + 1 + 1,  # grids, curves of training, those of evaluations that vary, their picture, wall time
        ),
        ("several", ["Runs", "Curves", "Last figures", "What was asked for differently", "Wall time"], 5 + 8 + 3 + 1),
    ],
)
def test_a_page_is_whole(
    browser: Browser, pages: dict[str, Path], which: str, sections: list[str], num_images: int, width: int
) -> None:
    visit = browser.visit(pages[which], LOOK, width=width)
    assert visit.complaints == []
    assert [address for address in visit.requested if not address.startswith("data:")] == [pages[which].as_uri()]
    assert problems(visit.found) == []
    assert set(sections) <= set(visit.found["headings"])
    assert len(visit.found["images"]) == num_images
    assert len(visit.found["tables"]) >= 4
    assert visit.found["background"] == "rgb(244, 246, 249)", "the policy lets the page's own style in"
    with Image.open(io.BytesIO(visit.screenshot)) as picture:
        assert picture.size[0] == width
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100


def film(run: Path, first: int) -> Path:
    """As a run of clips leaves them: a clip whose frames show `first` and the numbers after it, and its sheet."""
    frames = [numbered_frame(number, 48, 64) for number in range(first, first + 9)]
    return write_video(run / "samples" / "samples-000000012800.mp4", frames)


def test_clips_play_where_they_stand_for_their_sheets(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    with (run / "recipe.yaml").open("a") as recipe:
        recipe.write("sampling: {prompts: [three moving left, <b> moving right]}\n")
    film(run, 100)
    clip = write_video(run / "evaluations" / "best.mp4", [numbered_frame(number, 48, 64) for number in range(200, 209)])
    sheet = clip.with_suffix(".png")
    Image.new("RGB", (320, 200)).save(sheet)
    named = {evaluation_name("films", "best"): clip, evaluation_name("films", "best_sheet"): sheet}
    record(run, 12800, {evaluation_name("films", "accuracy"): 0.9}, named)
    page = write_report([run]).html

    looked = browser.visit(page, LOOK, width=400)
    assert looked.complaints == []
    assert problems(looked.found) == []
    assert looked.found["videos"] == [[64, 48], [64, 48]]
    pictures = [alt for alt, *_ in looked.found["images"] if "samples-" in alt or " at " in alt]
    assert pictures == ["samples-000000006400.png", "grid at 12.8k samples"], "no sheet is there twice"

    played = browser.visit(page, PLAY, width=1200)
    assert played.complaints == []
    training, evaluation = played.found
    assert (training["number"], training["poster"]) == (104, [89, 89])
    assert training["caption"].split("\n") == ["samples-000000012800.mp4", "three moving left", "<b> moving right"]
    assert (evaluation["number"], evaluation["poster"]) == (204, [320, 200])
    assert evaluation["caption"] == "best at 12.8k samples"
    assert training["attributes"] == evaluation["attributes"] == [True, True, True, True, False]
    assert all(address.startswith(("data:", page.as_uri())) for address in played.requested)


def test_clips_of_several_runs_stand_side_by_side(browser: Browser, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{number}", number) for number in (1, 2)]
    for number, run in enumerate(runs, 1):
        film(run, 100 * number)
        with (run / "recipe.yaml").open("a") as recipe:
            recipe.write("sampling: {prompts: [three moving left]}\n")
    visit = browser.visit(write_report(runs).html, PLAY, width=1200)
    assert visit.complaints == []
    one, two = visit.found
    assert (one["number"], two["number"]) == (104, 204)
    assert one["top"] == two["top"]
    for number, clip in enumerate((one, two), 1):
        assert clip["caption"].split("\n") == [f"run-{number}, samples-000000012800", "three moving left"]


def test_these_tests_can_fail(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """A script, a foreign picture, a broken one and something wide: all of it is noticed."""
    spoiled = tmp_path / "spoiled.html"
    insert = (
        '<main><script>document.title = "x"</script><img alt="foreign" src="http://127.0.0.1:9/x.png">'
        '<img alt="broken" src="data:image/png;base64,AAAA"><div style="width: 3000px">wide</div>'
    )
    spoiled.write_text(pages["one"].read_text(encoding="utf-8").replace("<main>", insert), encoding="utf-8")
    visit = browser.visit(spoiled, LOOK, width=400)
    assert any("script" in complaint for complaint in visit.complaints)
    assert any("127.0.0.1:9" in complaint for complaint in visit.complaints)
    told = "\n".join(problems(visit.found))
    for expected in ("'foreign' is 0x0", "'broken' is 0x0", "outside of the window: <div", "pixels wider"):
        assert expected in told
