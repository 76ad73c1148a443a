"""Clips are measured as pictures are: FVD and the CLIP score of real videos, and of clips of a real network."""

from __future__ import annotations

import json
import tarfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.encode.encode import encode
from pomscale.base.errors import InputError
from pomscale.base.task_index import TaskIndex
from pomscale.codecs.extractors import build_extractor
from pomscale.config.load import load_encode_recipe
from pomscale.diffusion.options import SamplingOptions
from pomscale.evaluation.generated.clip_files import ClipFiles
from pomscale.evaluation.generated.clip_frames import decode_frames
from pomscale.evaluation.generated.evaluate import evaluate
from pomscale.evaluation.generated.evaluation import Evaluation
from pomscale.evaluation.generated.generated_clips import GeneratedClips
from pomscale.evaluation.generated.opening import Opening, open_pictures
from pomscale.evaluation.generated.picture_files import Fit
from pomscale.evaluation.generated.picture_sets import Frames, PictureSet, to_pixels
from pomscale.evaluation.generated.request import Outputs, Request
from pomscale.evaluation.generated.trained_model import Drawing, ModelSource
from pomscale.evaluation.generated.work_folder import PartFiles
from pomscale.metrics.kernels import clip_score
from pomscale.pretrained.load import load_pretrained
from pomscale.sampling.clips import ClipFiles as WrittenFiles
from pomscale.sampling.clips import ClipRequest, clip_codec, write_clips
from support.generated_clips import features_of, make_clips, save_i3d, write_clip, write_clip_folder, write_clip_tar
from support.generated_pictures import make_pixels, write_folder
from support.tiny_films import save_cogvideox_model, save_model, save_picture_model
from support.tiny_models import save_clip

FRAMES = Frames(4, 2)  # of 7 frames and more
PROMPTS = ("a red bar", "a blue bar", "rising")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 clips, 11 others and a network of clips in files, and two models of clips of 6 frames, 20x12."""
    root = tmp_path_factory.mktemp("clips")
    captions = [f"clip {number}" for number in range(13)]
    write_clip_folder(root / "source", make_clips(13, seed=1), captions)
    write_clip_folder(root / "reference", make_clips(11, seed=2))
    save_i3d(root / "i3d.pt")
    save_model(root / "causal", sampling={"prompts": list(PROMPTS)})
    save_model(root / "whole", temporal="none")
    return root


def request_of(root: Path, work: Path, **changes: Any) -> Request:
    opening = Opening(frames=FRAMES, model=ModelSource(Path(), device="cpu"))
    request = Request(
        str(root / "source"),
        str(root / "reference"),
        (f"torchscript:{root / 'i3d.pt'}",),
        opening=opening,
        batch=3,
        part=4,
        work=work,
    )
    return replace(request, **changes)


def result_of(request: Request, task: TaskIndex | None = None) -> dict[str, Any]:
    result = evaluate(Evaluation(request), task or TaskIndex(), progress=False).result
    assert result is not None
    return result


def all_clips(pictures: PictureSet, batch: int = 3) -> np.ndarray:
    """All clips (n, f, h, w, c)."""
    found = torch.cat([one.pixels for one in pictures.batches(0, pictures.num_pictures, batch)])
    return found.permute(0, 2, 3, 4, 1).numpy()


def plain_frechet(one: np.ndarray, other: np.ndarray) -> float:
    """The distance as the papers write it, with the root of the product by its eigenvalues."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    covariances = [np.cov(features, rowvar=False) for features in (one, other)]
    root_trace = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    difference = one.mean(0) - other.mean(0)
    return float(difference @ difference + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root_trace)


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_fvd_of_video_files(root: Path, tmp_path: Path, form: str) -> None:
    source = root / "source" if form == "folder" else write_clip_tar(tmp_path / "a.tar", root / "source")
    result = result_of(request_of(root, tmp_path / "work", source=str(source)))
    network = save_i3d(tmp_path / "same.pt")
    ours, theirs = (
        features_of(network, make_clips(*one)[:, :7:2]) for one in ((13, 9, (20, 12), 1), (11, 9, (20, 12), 2))
    )
    assert plain_frechet(ours, theirs) > 1e-3
    assert result["metrics"] == {"fvd": pytest.approx(plain_frechet(ours, theirs), rel=1e-5)}
    assert result["settings"]["frames"] == {"number": 4, "stride": 2, "fps": 8.0, "size": [20, 12]}
    assert result["settings"]["source"]["kind"] == ("folder" if form == "folder" else "tars")
    assert any(text.startswith("fvd of 11 clips is biased upwards") for text in result["warnings"])
    assert result["pictures"]["source"]["count"] == 13


@pytest.mark.parametrize("name", ["causal", "whole"])
def test_drawn_clips_are_those_of_sample(root: Path, tmp_path: Path, name: str) -> None:
    """Clip i has seed + i, and prompt i modulo their number; frames are left out after they are made."""
    folder = root / name / "model"
    model: Any = load_pretrained(folder, device="cpu")
    prompts, options = [PROMPTS[number % 3] for number in range(5)], SamplingOptions(num_steps=2, guidance=1.5)
    write_clips(
        model,
        prompts,
        range(7, 12),
        WrittenFiles(tmp_path / "a.mp4", npz=tmp_path / "a.npz"),
        ClipRequest(options, num_frames=6, size=(16, 12)),
    )
    with np.load(tmp_path / "a.npz") as arrays:
        expected = arrays["clips"]
    assert expected.std() > 20
    given = () if name == "causal" else PROMPTS
    drawing = Drawing(5, 7, changes={"num_steps": 2, "guidance": 1.5}, prompts=given, num_frames=6, size=(16, 12))
    drawn = GeneratedClips(ModelSource(folder, device="cpu"), drawing, Frames(3, 2))
    assert (drawn.size, drawn.num_channels, drawn.fps) == ((3, 16, 12), 3, 8.0)
    (whole,) = drawn.batches(0, 5, 5)
    np.testing.assert_array_equal(whole.pixels.permute(0, 2, 3, 4, 1), expected[:, ::2])
    assert whole.captions == prompts
    pieces = torch.cat([one.pixels for one in drawn.batches(0, 5, 2)])
    torch.testing.assert_close(pieces, whole.pixels, atol=1, rtol=0)
    guide = save_model(tmp_path, scale=0.105, temporal=model.config.temporal)
    for changes in ({"precision": "bf16"}, {"guide": guide}):
        (other,) = GeneratedClips(ModelSource(folder, device="cpu", **changes), drawing, Frames(3, 2)).batches(0, 5, 5)
        difference = (other.pixels.float() - whole.pixels.float()).abs().mean()
        assert 0.01 < difference < 4


def test_fvd_of_drawn_clips(root: Path, tmp_path: Path) -> None:
    """The real network of clips, and all settings that made the figure."""
    opening = Opening(
        num=7, frames=Frames(3), model=ModelSource(Path(), device="cpu"), drawing=Drawing(changes={"num_steps": 2})
    )
    request = request_of(root, tmp_path / "work", source=str(root / "causal" / "model"), opening=opening)
    result = result_of(request)
    drawn = open_pictures(request.source, opening)
    network = save_i3d(tmp_path / "same.pt")
    ours = features_of(network, np.concatenate([all_clips_of(drawn, first) for first in (0, 4)]))
    theirs = features_of(network, make_clips(11, seed=2)[:, :3])
    assert result["metrics"]["fvd"] == pytest.approx(plain_frechet(ours, theirs), rel=1e-5)
    settings = result["settings"]
    assert settings["drawn"]["prompts"]["number"] == 3
    assert settings["drawn"]["frames"] == 6
    assert settings["frames"] == {"number": 3, "stride": 1, "fps": 8.0, "size": [20, 12]}
    assert settings["checkpoint"]["average"]["name"] == "model"
    other = replace(opening, drawing=replace(opening.drawing, prompts=("one",)))
    assert open_pictures(request.source, other).settings()["drawn"] != settings["drawn"]


def all_clips_of(drawn: PictureSet, first: int) -> np.ndarray:
    """The clips of the part of 4 that begins with `first`, in batches of 3, as they are measured."""
    found = [one.pixels for one in drawn.batches(first, min(first + 4, drawn.num_pictures), 3)]
    return torch.cat(found).permute(0, 2, 3, 4, 1).numpy()


def test_any_process_measures_any_part_and_a_stop_costs_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = Drawing(changes={"num_steps": 1})
    opening = Opening(num=7, frames=Frames(3), model=ModelSource(Path(), device="cpu"), drawing=drawing)
    request = request_of(root, tmp_path / "alone", source=str(root / "causal" / "model"), opening=opening)
    alone = result_of(request)
    assert result_of(replace(request, work=tmp_path / "shared"), TaskIndex(2, 3)) == alone
    commit, commits = PartFiles.commit, list[int]()

    def stops_at_the_third(self: PartFiles, part: int, *arguments: Any) -> None:
        commits.append(part)
        if len(commits) == 3:
            raise KeyboardInterrupt
        commit(self, part, *arguments)

    monkeypatch.setattr(PartFiles, "commit", stops_at_the_third)
    stopped = replace(request, work=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        result_of(stopped)
    outcome = evaluate(Evaluation(stopped), progress=False)
    assert (outcome.num_made, outcome.num_parts) == (3, 5)
    assert outcome.result == alone


def test_frames_of_a_causal_codec_are_those_of_whole_clips(tmp_path: Path) -> None:
    model: Any = load_pretrained(save_cogvideox_model(tmp_path, latent_shape=(4, 4, 5, 3), patch_size=1), device="cpu")
    codec = clip_codec(model)
    latents = torch.randn(2, 4, 4, 5, 3, generator=torch.Generator().manual_seed(3))
    whole = to_pixels("a", codec.decode(latents))
    assert whole.float().std() > 5
    for frames in (Frames(5, 3), Frames(16, 1), Frames(1, 1), Frames(2, 9)):
        out = torch.empty(2, 3, frames.num, *whole.shape[3:], dtype=torch.uint8)
        with torch.inference_mode():
            decode_frames("a", codec.decoder(4), latents.split(1, dim=2), frames, out)
        torch.testing.assert_close(out, whole[:, :, : frames.span : frames.stride], atol=1, rtol=0)


@pytest.fixture(scope="session")
def shards(root: Path) -> Path:
    """A dataset of 9 clips of 8 frames and 3 of 4, through the pixel codec."""
    clips = make_clips(12, 8, seed=5)
    for number, frames in enumerate(clips):
        write_clip(root / "raw" / f"{number:02d}.mkv", frames if number % 4 else frames[:4])
    recipe = root / "encode.yaml"
    recipe.write_text(
        f"kind: encode\nname: clips\noutput: {root}/shards\nsource: {{kind: video_folder, path: {root}/raw}}\n"
        "codec: {name: pixel, channels: 3}\n"
        "transform: {kind: video, fps: 8, buckets: [[8, 20, 12], [4, 20, 12]]}\nshard_samples: 5\n"
    )
    encode(load_encode_recipe(recipe), progress=False)
    return root / "shards"


def test_clips_of_shards(root: Path, shards: Path, tmp_path: Path) -> None:
    """The same clips as from the files, in another order; those that are too short are listed and counted."""
    short = open_pictures(str(shards), Opening(frames=Frames(4)))
    clips = make_clips(12, 8, seed=5)[:, :4]
    key = lambda one: one.tobytes()  # noqa: E731
    np.testing.assert_array_equal(sorted(all_clips(short), key=key), sorted(clips, key=key))
    request = request_of(root, tmp_path / "work", source=str(shards))
    with pytest.raises(
        InputError, match=r"3 clips cannot be read, .* record \d+: has 4 frames, needs 7;.* --max-skipped 3"
    ):
        result_of(request)
    result = result_of(replace(request, max_skipped=3))
    long = np.stack([clip for number, clip in enumerate(make_clips(12, 8, seed=5)) if number % 4])[:, :7:2]
    network = save_i3d(tmp_path / "same.pt")
    expected = plain_frechet(features_of(network, long), features_of(network, make_clips(11, seed=2)[:, :7:2]))
    assert result["metrics"]["fvd"] == pytest.approx(expected, rel=1e-5)
    assert result["pictures"]["source"]["failures"] == 3
    assert result["settings"]["source"]["kind"] == "shards"
    with pytest.raises(InputError, match=r"its clips have 8 frames, and 16 are needed \(--measured-frames 16"):
        open_pictures(str(shards), Opening())


def test_clips_that_cannot_be_measured_are_listed_and_end_it(root: Path, tmp_path: Path) -> None:
    clips = make_clips(13, seed=1)
    source = write_clip_folder(tmp_path / "source", clips)
    write_clip(source / "00" / "0002.mkv", clips[2, :6])
    (source / "01" / "0007.mkv").write_bytes(b"damaged")
    request = request_of(root, tmp_path / "work", source=str(source))
    with pytest.raises(InputError, match=r"2 clips cannot be read, .* 00/0002.mkv: has 0.75 s; needs at least 0.875 s"):
        result_of(request)
    failures = [json.loads(line) for line in (tmp_path / "work" / "failures.jsonl").read_text().splitlines()]
    assert [failure["picture"] for failure in failures] == ["00/0002.mkv", "01/0007.mkv"]
    result = result_of(replace(request, max_skipped=2))
    network = save_i3d(tmp_path / "same.pt")
    ours = features_of(network, np.delete(clips, [2, 7], axis=0)[:, :7:2])
    expected = plain_frechet(ours, features_of(network, make_clips(11, seed=2)[:, :7:2]))
    assert result["metrics"]["fvd"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_the_clip_score_is_the_mean_over_frames(root: Path, tmp_path: Path, form: str) -> None:
    spec = f"clip:{save_clip(tmp_path / 'clip', seed=0)}"
    source = root / "source" if form == "folder" else write_clip_tar(tmp_path / "a.tar", root / "source")
    result = result_of(request_of(root, tmp_path / "work", source=str(source), reference=None, extractors=(spec,)))
    clip: Any = build_extractor(spec)
    texts, scores = clip.embed_texts([f"clip {number}" for number in range(13)]).numpy(), []
    for frames, text in zip(make_clips(13, seed=1)[:, :7:2], texts, strict=True):
        features = clip.extract(torch.from_numpy(frames).permute(0, 3, 1, 2))["pooled"].numpy()
        scores.append(clip_score(features, np.stack([text] * 4)).mean())
    assert max(scores) > 0
    assert result["metrics"] == {"clip_score": pytest.approx(np.mean(scores), rel=1e-5)}


def test_the_caption_of_a_drawn_clip_is_its_prompt(root: Path, tmp_path: Path) -> None:
    spec = f"clip:{save_clip(tmp_path / 'clip', seed=0)}"
    opening = Opening(
        num=4, frames=Frames(2), model=ModelSource(Path(), device="cpu"), drawing=Drawing(changes={"num_steps": 1})
    )
    source = str(root / "causal" / "model")
    request = request_of(root, tmp_path / "work", source=source, reference=None, extractors=(spec,), opening=opening)
    result = result_of(request)
    clip: Any = build_extractor(spec)
    texts = clip.embed_texts([*PROMPTS, PROMPTS[0]]).numpy().repeat(2, axis=0)
    pixels = torch.cat([one.pixels for one in open_pictures(source, opening).batches(0, 4, 3)])
    features = clip.extract(pixels.transpose(1, 2).flatten(0, 1).contiguous())["pooled"].numpy()
    assert result["metrics"]["clip_score"] == pytest.approx(clip_score(features, texts).mean(), rel=1e-5)


def test_written_clips_and_statistics(root: Path, tmp_path: Path) -> None:
    """Tars have the measured frames and their captions; statistics are a reference of clips with the same frames."""
    outputs = Outputs(tars=tmp_path / "tars", statistics=tmp_path / "statistics.npz")
    spec = f"clip:{save_clip(tmp_path / 'clip', seed=0)}"
    request = request_of(root, tmp_path / "work", outputs=outputs)
    result_of(replace(request, extractors=(*request.extractors, spec)))
    assert [path.name for path in sorted(outputs.tars.iterdir())] == [f"clips-00000{part}.tar" for part in range(4)]  # type: ignore[union-attr]
    with tarfile.open(tmp_path / "tars" / "clips-000001.tar") as tar:
        assert tar.extractfile("00000005.txt").read() == b"clip 5"  # type: ignore[union-attr]
    again = open_pictures(str(tmp_path / "tars"), Opening(frames=Frames(4), with_captions=True))
    assert (again.num_pictures, again.fps, again.size) == (13, 4.0, (4, 20, 12))
    measured = make_clips(13, seed=1)[:, :7:2]
    np.testing.assert_allclose(all_clips(again).mean((2, 3)), measured.mean((2, 3)), atol=4)  # H.264 keeps means
    statistics = replace(request, outputs=Outputs(), reference=str(tmp_path / "statistics.npz"))
    same = result_of(replace(statistics, work=tmp_path / "same"))
    assert same["metrics"]["fvd"] == pytest.approx(0, abs=1e-6)
    other = replace(statistics, opening=replace(request.opening, frames=Frames(4)))
    with pytest.raises(InputError, match=r"of clips with other frames \(stride 2 there, 1 here\)"):
        Evaluation(other)


def test_resampled_and_fitted_clips(root: Path, tmp_path: Path) -> None:
    """--fit and --fps make clips of several sizes and rates comparable, by the rules of `data encode`."""
    folder = write_clip_folder(tmp_path / "a", make_clips(2, 20, (40, 24)), fps=16)
    opening = Opening(frames=Frames(5), fit=Fit((20, 12)), fps=8.0)
    clips = open_pictures(str(folder), opening)
    assert (clips.size, clips.fps) == ((5, 20, 12), 8.0)
    assert clips.crop == {"kind": "video", "targets": [[20, 12]], "filter": "area", "version": 2}
    expected = make_clips(2, 20, (40, 24))[:, :10:2].reshape(2, 5, 20, 2, 12, 2, 3).mean((3, 5))
    np.testing.assert_allclose(all_clips(clips), expected, atol=1)
    write_clip(folder / "z.mkv", make_clips(1, 20)[0], fps=16)
    mixed = open_pictures(str(folder), Opening(frames=Frames(5)))
    with pytest.raises(InputError, match=r"z.mkv has 20x12 pixels, and the first clip 40x24; .* --fit 40x24"):
        all_clips(mixed)
    write_clip(folder / "z.mkv", make_clips(1, 20, (40, 24))[0], fps=12)
    with pytest.raises(InputError, match=r"z.mkv has 12\.\d+ frames per second, and the first clip 16; .* --fps 16"):
        all_clips(open_pictures(str(folder), Opening(frames=Frames(5))))


def test_no_more_than_a_batch_of_clips_is_held(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, most = list[Any](), list[int]()

    def watch(kind: type, name: str) -> None:
        make = getattr(kind, name)

        def watched(self: Any, *arguments: Any) -> Any:
            most.append(sum(one() is not None for one in held))
            made = make(self, *arguments)
            held.append(weakref.ref(getattr(made, "pixels", made)))
            return made

        monkeypatch.setattr(kind, name, watched)

    watch(ClipFiles, "_batch")
    watch(GeneratedClips, "_draw")
    drawing = Drawing(changes={"num_steps": 1})
    opening = Opening(num=7, frames=Frames(3), model=ModelSource(Path(), device="cpu"), drawing=drawing)
    result_of(request_of(root, tmp_path / "work", source=str(root / "causal" / "model"), opening=opening))
    assert len(most) == 8
    assert set(most) == {0}


def test_what_does_not_fit_is_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    pictures = str(write_folder(tmp_path / "pictures", make_pixels(9, (20, 12, 3))))
    narrow = str(write_clip_folder(tmp_path / "narrow", make_clips(2, 9, (20, 14))))
    fast = str(write_clip_folder(tmp_path / "fast", make_clips(2), fps=12))
    model, whole = str(root / "causal" / "model"), str(root / "whole" / "model")
    grey = save_model(tmp_path / "grey", codec=None, sampling={"prompts": ["a"]})
    still = save_picture_model(tmp_path / "still")
    opening, drawn = request_of(root, tmp_path).opening, Opening(frames=Frames(3))

    def with_model(**fields: Any) -> Opening:
        return replace(drawn, model=ModelSource(Path(), device="cpu", **fields))

    (tmp_path / "mixed").mkdir()
    write_clip(tmp_path / "mixed" / "a.mkv", make_clips(1)[0])
    (tmp_path / "mixed" / "b.png").touch()
    (tmp_path / "one").mkdir()
    write_clip(tmp_path / "one" / "a.mkv", make_clips(1, 1)[0])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"reference": pictures}, r"source has clips, and the reference .*pictures has pictures; compare clips with"),
        ({"reference": narrow}, r"source has clips of 20x12 pixels, and the reference .* of 20x14; cut and resize"),
        ({"reference": fast}, r"source has 8 frames per second, and the reference .*fast 12; resample .* --fps"),
        ({"extractors": ("pixels",)}, r"--extractor pixels: it takes pictures, and .* has clips, of which fvd, clip_s"),
        ({"metrics": ("fid",)}, r"--metrics fid: is not measured of clips, only fvd, clip_score are"),
        ({"source": pictures, "reference": pictures}, r"--extractor torchscript: it takes clips, and .* has pictures"),
        (
            {"source": pictures, "reference": pictures, "metrics": ("fvd",)},
            r"fvd: is not measured of pictures, only fid",
        ),
        (
            {"outputs": Outputs(npz=tmp_path / "a.npz")},
            r"--write-npz: holds pictures, and .* has clips; write --write-t",
        ),
        (
            {"source": model, "opening": opening},
            r"its clips have 6 frames, and 7 are needed \(--measured-frames 4 --fra",
        ),
        ({"source": whole, "opening": drawn}, r"say with --prompts or --prompt what the clips are to show"),
        ({"source": model, "opening": with_model(compile=True)}, r"--compile: this model makes clips frame group by"),
        ({"source": model, "opening": with_model(guide=still)}, r"still: this model makes pictures, and clips are mea"),
        ({"source": model, "opening": with_model(guide=grey)}, r"guidance is 0, so that a guide would change nothing"),
        ({"source": str(tmp_path / "mixed")}, r"files that are not measured \(1 .png\), only .mp4, "),
        (
            {"source": str(tmp_path / "one")},
            r"a.mkv: has fewer than two frames, .* none of the first clips can be read",
        ),
        ({"opening": replace(opening, num=14)}, r"14 clips are asked for, and 13 are here"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message) as raised:
            Evaluation(request_of(root, tmp_path / "work", **changes))
        assert "\n" not in str(raised.value)
    # Frames 4, stride 2 of clips of the shards' rate, at another rate of the model.
    assert not (tmp_path / "work").exists()
