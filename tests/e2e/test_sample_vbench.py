"""`pomscale sample --vbench`: the videos of a suite, made once each, by one process or several, over kills."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pomscale.base.errors import InputError
from pomscale.codecs import build_text_encoder
from pomscale.config.codecs import PixelCodecConfig
from pomscale.config.sampling import SamplingConfig
from pomscale.config.text import TextEncoderConfig
from pomscale.config.train import DiffusionConfig
from pomscale.diffusion.options import SamplingOptions
from pomscale.models import make_model
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.load import PretrainedVDiPoM, load_pretrained
from pomscale.pretrained.weights import parameter_shapes, write_weights
from pomscale.sampling.clips import ClipFiles, ClipRequest, write_clips
from pomscale.sampling.vbench import ModelSource, SuiteReport, SuiteRequest, write_suite
from pomscale.sampling.vbench_suite import read_manifest, video_seed
from pomscale.shards.schema import TextInfo
from support import running
from support.running import TIMEOUT_S, Finished, mounted_disk, started
from support.tiny_clips import TEXT_DIM, awaken, video_config
from support.tiny_models import save_t5

NEEDS_AV = "clips need PyAV: pip install -e '.[video]'"
PROMPTS = ("A cat.", "a surfboard on the bottom of skis, front view")
NUM_FRAMES, SIZE = 4, 32  # of 16x16 pixels, which are enlarged

# The same pixels do not always make the same file: x264 decides otherwise in one of some hundred films this small (its
# mbtree; seen up to 2 levels apart). Films of two seeds are 40 apart.
SAME_FILM = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder of a model that makes clips frame group by frame group."""
    pytest.importorskip("av", reason=NEEDS_AV)
    root = tmp_path_factory.mktemp("model")
    config = TextEncoderConfig(
        path=str(save_t5(root / "t5", 0, d_model=TEXT_DIM)), tokenizer="bytes", max_length=64, precision="fp32"
    )
    encoder = build_text_encoder(config)
    (null,) = encoder.encode([""])
    card = ModelCard(
        model=video_config(latent_shape=(4, NUM_FRAMES, 8, 8), temporal="block_causal"),
        diffusion=DiffusionConfig(),
        sampling=SamplingConfig(num_steps=2),
        codec=PixelCodecConfig(name="pixel", channels=1),
        codec_identity=None,
        class_names=(),
        text=TextInfo(
            config=config,
            identity=encoder.identity(),
            dim=TEXT_DIM,
            null_length=len(null),
            null_embedding=base64.b64encode(null.astype("<f2").tobytes()).decode(),
        ),
        fps=8.0,
        latent_mean=(0.5,) * 4,
        latent_std=(0.25,) * 4,
        averages=(),
    )
    network = make_model(card.model)
    awaken(network)
    provenance = {"run": "tiny", "samples": 640, "data": [{"path": "nowhere"}]}
    tensors = {"model": (parameter.detach() for parameter in network.parameters())}
    write_weights(root / "exported", card, provenance, parameter_shapes(card.model), tensors)
    return root / "exported"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def suite(model: Path, prompts: Path, folder: Path, **changes: Any) -> SuiteReport:
    chosen = {"num": 2, "seed": 3, "num_frames": None, "task": (0, 1), **changes}
    request = SuiteRequest(
        prompts,
        num=chosen.pop("num"),
        seed=chosen.pop("seed"),
        num_frames=chosen.pop("num_frames"),
        changes={"num_steps": chosen.pop("steps", None), "guidance": chosen.pop("guidance", None)},
    )
    task = chosen.pop("task")
    return write_suite(ModelSource(model, device="cpu", **chosen), request, folder, task=task)


def command(model: Path, prompts: Path, folder: Path, *words: str) -> list[str]:
    named = ["--vbench", str(prompts), "--out-dir", str(folder), "--device", "cpu"]
    return [sys.executable, "-m", "pomscale", "sample", str(model), *named, *words]


def run(*words: Any) -> Finished:
    return running.run(command(*words), expect=None)


def frames(path: Path) -> np.ndarray:
    """(f, h, w, 3) uint8"""
    av = pytest.importorskip("av", reason=NEEDS_AV)
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Of two films, in levels of 255."""
    return float(np.abs(first.astype(float) - second).mean())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_what_vbench_reads_and_says_what_made_it(model: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "films"
    done = run(model, prompts, folder, "--num", "2", "--seed", "3", "--steps", "1", "--task", "0/1")
    assert done.returncode == 0, done.stderr
    assert f"4 made now, 4 of 4 are there; give VBench --videos_path {folder}/videos" in done.stdout
    assert "videos: 4 of 4" in done.stderr
    expected = {f"{prompt}-{index}.mp4": video_seed(3, prompt, index) for prompt in PROMPTS for index in range(2)}
    assert names(folder / "videos") == sorted(expected)
    assert names(folder) == ["manifest.json", "videos"]

    manifest = read_manifest(folder)
    assert manifest["videos"] == expected
    assert manifest["model"]["samples"] == 640
    assert (manifest["model"]["run"], manifest["model"]["weights"]) == ("tiny", "model")
    assert manifest["sampling"] == {"num_frames": None, "sampler": None, "steps": 1, "guidance": 0.0, "seed": 3}
    assert (manifest["fps"], manifest["prompts"]) == (8.0, str(prompts))
    assert {"pomscale", "torch"} <= manifest["versions"].keys()

    network = load_pretrained(model, device="cpu")
    assert isinstance(network, PretrainedVDiPoM)
    for prompt in PROMPTS:
        alone = tmp_path / "alone.mp4"
        seed = expected[f"{prompt}-1.mp4"]
        write_clips(network, [prompt], [seed], ClipFiles(alone), ClipRequest(SamplingOptions(num_steps=1)))
        found = frames(folder / "videos" / f"{prompt}-1.mp4")
        assert found.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        assert mean_difference(found, frames(alone)) < SAME_FILM
    first, second = (frames(folder / "videos" / f"A cat.-{index}.mp4") for index in range(2))
    assert mean_difference(first, second) > 4 * SAME_FILM, "each has a seed of its own"


def test_only_what_is_missing_is_made_and_tasks_share_it(model: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "films"
    report = suite(model, prompts, folder, task=(1, 3))
    assert (report.num_made, report.num_there, report.num_videos) == (1, 1, 4)
    assert "1 of 4 are there; run the same command" in str(report)
    assert [suite(model, prompts, folder, task=(index, 3)).num_made for index in range(3)] == [2, 0, 1]
    before = {path.name: path.stat().st_ino for path in (folder / "videos").iterdir()}
    first = frames(folder / "videos" / "A cat.-1.mp4")
    (folder / "videos" / "A cat.-1.mp4").unlink()
    assert suite(model, prompts, folder).num_made == 1
    assert mean_difference(frames(folder / "videos" / "A cat.-1.mp4"), first) < SAME_FILM
    after = {path.name: path.stat().st_ino for path in (folder / "videos").iterdir()}
    assert {name for name in after if after[name] != before[name]} <= {"A cat.-1.mp4"}


def test_a_guide_makes_other_videos_and_the_manifest_names_it(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = save_weaker(model, tmp_path / "guide")
    guided = {"num": 1, "guidance": 3.0, "guide": guide}
    suite(model, prompts, tmp_path / "guided", **guided)
    suite(model, prompts, tmp_path / "alone", num=1, guidance=3.0)
    name = "A cat.-0.mp4"
    one, other = (frames(tmp_path / folder / "videos" / name) for folder in ("guided", "alone"))
    assert mean_difference(one, other) > SAME_FILM
    recorded = read_manifest(tmp_path / "guided")["sampling"]["guide"]
    assert (recorded["run"], recorded["samples"], recorded["weights"]) == ("tiny", 320, "model")
    assert "guide" not in read_manifest(tmp_path / "alone")["sampling"]
    with pytest.raises(InputError, match=r"guide .*320.* there and None now"):
        suite(model, prompts, tmp_path / "guided", num=1, guidance=3.0)
    for changes, message in (
        ({"guide": model, "guidance": 3.0}, "its weights are those of the model itself"),
        ({"guide": guide}, "guidance is 0"),
    ):
        with pytest.raises(InputError, match=f"guide: .*{message}"):
            suite(model, prompts, tmp_path / "refused", num=1, **changes)
    assert not (tmp_path / "refused" / "manifest.json").exists()


def save_weaker(model: Path, folder: Path) -> Path:
    """An earlier state of the model, with smaller weights."""
    network = load_pretrained(model, device="cpu")
    tensors = {"model": (0.5 * parameter.detach() for parameter in network.parameters())}
    provenance = {"run": "tiny", "samples": 320}
    write_weights(folder, network.card, provenance, parameter_shapes(network.card.model), tensors)
    return folder


def test_what_would_mix_videos_of_two_kinds_is_refused(model: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "films"
    suite(model, prompts, folder, num=1)
    for changes, message in (
        ({"steps": 5}, "steps 2 there and 5 now"),
        ({"seed": 4}, "seed 3 there and 4 now"),
        ({"num": 2}, "2 videos of other prompts there and 4 now"),
    ):
        with pytest.raises(InputError, match=message):
            suite(model, prompts, folder, **{"num": 1, **changes})
    other = tmp_path / "other"
    other.symlink_to(model)
    suite(other, prompts, folder, num=1)  # the same model under another name
    assert len(names(folder / "videos")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vbench", "{prompts}"], "--out-dir"),
        (["--out-dir", "{folder}"], "only with --vbench"),
        (["--task", "0/2"], "only with --vbench"),
        (["--vbench", "{prompts}", "--out-dir", "{folder}", "--task", "2/2"], "INDEX/COUNT"),
        (["--vbench", "{prompts}", "--out-dir", "{folder}", "--prompt", "a dog"], "--prompt: not with --vbench"),
        (["--vbench", "{folder}.txt", "--out-dir", "{folder}"], "prompts cannot be read"),
        (["--vbench", "{prompts}", "--out-dir", "{folder}", "--weights", "x"], "has no weights 'x'"),
        (["--vbench", "{prompts}", "--out-dir", "{folder}", "--frames", "3"], "--frames 3"),
        (["--vbench", "{prompts}", "--out-dir", "{prompts}/x"], "cannot be made"),
    ],
)
def test_wrong_options_end_before_the_first_video(
    model: Path, prompts: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from pomscale.cli import main  # noqa: PLC0415

    folder = tmp_path / "films"
    with pytest.raises(SystemExit) as ended:
        main(
            ["sample", str(model), "--device", "cpu", *(word.format(prompts=prompts, folder=folder) for word in words)]
        )
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "manifest.json").exists(), "the right options find a free folder"


def test_a_codec_that_is_another_one_is_noticed_before_the_folder_is_taken(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["card"]["codec_identity"] = "of another network"
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its weights are not those that made the training latents"):
        suite(other, prompts, tmp_path / "films")
    assert not (tmp_path / "films" / "manifest.json").exists()


def test_a_long_prompt_is_told_once_and_not_of_every_video(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("A cat.\n" + "y" * 70)
    suite(model, tmp_path / "prompts.txt", tmp_path / "films", num=3)
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "the last 7 are left out" in said


def _there(folder: Path) -> list[Path]:
    return list((folder / "videos").glob("*.mp4"))


def _wait_for(folder: Path, num_videos: int, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(_there(folder)) < num_videos:
        assert process.poll() is None, "it has ended by itself"
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


# The command, which makes no sixth video: however late the kill comes, it comes in the middle.
FIVE_VIDEOS = """
import itertools, time
from pomscale import cli
from pomscale.sampling import vbench

write_clips, numbers = vbench.write_clips, itertools.count(1)

def write_and_wait(*arguments, **options):
    write_clips(*arguments, **options)
    if next(numbers) == 6:
        time.sleep(3600)

vbench.write_clips = write_and_wait
cli.main()
"""


@pytest.fixture
def killed(model: Path, prompts: Path, tmp_path: Path) -> Path:
    """A folder in which a process was killed at its second video of many."""
    folder = tmp_path / "films"
    python, _, _, *words = command(model, prompts, folder, "--num", "10", "--steps", "20")
    with started([python, "-c", FIVE_VIDEOS, *words], stderr=subprocess.DEVNULL) as process:
        _wait_for(folder, 2, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return folder


def test_after_a_kill_it_goes_on_and_every_video_is_whole(killed: Path, model: Path, prompts: Path) -> None:
    there = {path: path.stat().st_ino for path in _there(killed)}
    assert 2 <= len(there) < 20
    assert all(len(frames(path)) == NUM_FRAMES for path in there)
    report = suite(model, prompts, killed, num=10, seed=0, steps=20)
    assert (report.num_made, report.num_there) == (20 - len(there), 20)
    assert all(path.stat().st_ino == inode for path, inode in there.items())
    assert all(len(frames(path)) == NUM_FRAMES for path in _there(killed))
    assert names(killed) == ["manifest.json", "videos"], "what the killed process left is gone"


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_video(model: Path, prompts: Path, tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "disk", "64k") as folder:
        done = run(model, prompts, folder, "--num", "100", "--steps", "1")
        assert done.returncode == 1, done.stderr
        assert "No space left" in done.stderr.splitlines()[-1]
        assert "run the same command again to continue" in done.stderr
        assert _there(folder)
        assert all(len(frames(path)) == NUM_FRAMES for path in _there(folder))
        assert json.loads((folder / "manifest.json").read_text())["sampling"]["steps"] == 1
