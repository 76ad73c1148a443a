"""Clips that are stopped, saved and gone on with: the same bits, or one clear error."""

from __future__ import annotations

import base64
import shutil
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pomscale.base.condition import Text
from pomscale.base.errors import InputError, PomscaleError
from pomscale.codecs import build_text_encoder
from pomscale.config.codecs import PixelCodecConfig
from pomscale.config.model import ImageModelConfig
from pomscale.config.sampling import SamplingConfig
from pomscale.config.text import TextEncoderConfig
from pomscale.config.train import DiffusionConfig, TimeConfig
from pomscale.pretrained.card import ModelCard
from pomscale.pretrained.load import PretrainedDiPoM, PretrainedVDiPoM
from pomscale.sampling.api import sample
from pomscale.sampling.clip_state import read_clip_state, write_clip_state
from pomscale.sampling.stream import ClipStream
from pomscale.shards.schema import TextInfo
from support.paths import TESTS
from support.running import run
from support.tiny_clips import TEXT_DIM, V2, awaken, normal, text_of, video_config
from support.tiny_models import save_t5

TEXT, SEEDS = text_of([5, 2]), [11, 12]
NULL = np.arange(TEXT_DIM, dtype=np.float16) / TEXT_DIM
TEXT_INFO = TextInfo(
    config=TextEncoderConfig(path="nowhere", max_length=6),
    identity="abc",
    dim=TEXT_DIM,
    null_length=1,
    null_embedding=base64.b64encode(NULL.tobytes()).decode(),
)


def pretrained(
    mixer: Any = "pom",
    *,
    per_frame_group: bool = False,
    objective: Literal["flow", "eps"] = "flow",
    max_start_group: int = 100,
    text: TextInfo = TEXT_INFO,
    **fields: Any,
) -> PretrainedVDiPoM:
    config = video_config(**{"mixer": mixer, "temporal": "block_causal", **fields})
    card = ModelCard(
        model=config,
        diffusion=DiffusionConfig(
            objective=objective, time=TimeConfig(per_frame_group=per_frame_group), max_start_group=max_start_group
        ),
        sampling=SamplingConfig(),
        codec=PixelCodecConfig(name="pixel"),
        codec_identity=None,
        class_names=(),
        text=text,
        latent_mean=(0.0,) * 3,
        latent_std=(1.0,) * 3,
        averages=(),
    )
    model = PretrainedVDiPoM(card)
    awaken(model, scale=0.1)
    return model.requires_grad_(False)


def stream(model: PretrainedVDiPoM, num_groups: int | None = None, **changes: Any) -> ClipStream:
    return ClipStream(model, TEXT, SEEDS, num_groups=num_groups, **{"num_steps": 3, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The state after two frame groups."""
    clips = stream(pretrained(), 2)
    list(clips)
    clips.save(tmp_path / "state.safetensors")
    return tmp_path / "state.safetensors"


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_frame_group", [False, True], ids=["one t", "t per group"])
@pytest.mark.parametrize(
    "mixer", ["pom", "attention", ["pom", "attention"], V2], ids=["pom", "attention", "hybrid", "coefficients"]
)
def test_a_resumed_stream_gives_the_same_bits(mixer: Any, per_frame_group: bool, tmp_path: Path) -> None:
    """Stopped before the first group, among the known ones, and after them; by another model object."""
    known = normal(2, 3, 5, 4, 6)
    settings: dict[str, Any] = {"sampler": "heun", "guidance": 1.5, "known": known}
    model = pretrained(mixer, per_frame_group=per_frame_group)
    expected = list(islice(stream(model, **settings), 6))
    extra = {"cache": normal(3, 2).T, "count": torch.tensor(7)}
    for num_before in (0, 1, 2, 4):
        clips = stream(model, **settings)
        before = list(islice(clips, num_before))
        clips.save(tmp_path / "state", extra)
        resumed, found = ClipStream.resume(
            pretrained(mixer, per_frame_group=per_frame_group), tmp_path / "state", num_groups=6 - num_before
        )
        assert resumed.next_group == num_before
        assert torch.equal(torch.stack([*before, *resumed]), torch.stack(expected))
        assert found.keys() == extra.keys()
        assert all(torch.equal(found[name], extra[name]) for name in extra)


@pytest.mark.parametrize("per_frame_group", [False, True], ids=["one t", "t per group"])
@pytest.mark.parametrize("with_guide", [False, True], ids=["alone", "guided"])
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "sde", "eta": 0.5, "grid": "rho"},
        {"sampler": "unipc", "guidance": 1.5, "guidance_interval": (0.2, 0.9), "shift": 2.0},
        {"guidance": 1.0, "guidance_schedule": "cosine", "guidance_base_size": 3, "times": (1.0, 0.6, 0.0)},
    ],
    ids=["sde", "interval", "schedule"],
)
def test_all_options_survive_a_stop(
    options: dict[str, Any], with_guide: bool, per_frame_group: bool, tmp_path: Path
) -> None:
    model, weak = (pretrained(mixer, per_frame_group=per_frame_group) for mixer in ("pom", "attention"))
    options = {**options, "guidance": options.get("guidance", 1.0), "guide": weak if with_guide else None}
    expected = list(islice(stream(model, **options), 4))
    clips = stream(model, **options)
    before = list(islice(clips, 2))
    clips.save(tmp_path / "state")
    resumed, _ = ClipStream.resume(model, tmp_path / "state", num_groups=2, guide=options["guide"])
    assert torch.equal(torch.stack([*before, *resumed]), torch.stack(expected))
    plain = list(islice(stream(model, guidance=1.0), 2))
    assert not torch.equal(torch.stack(plain), torch.stack(expected[:2]))


def test_a_state_of_the_first_version_is_continued(saved: Path) -> None:
    """It knows of three options alone, and of no guide."""
    expected = list(stream(pretrained(), 4))[2:]
    meta, tensors = read_clip_state(saved)
    meta["sampling"] = {name: meta["sampling"][name] for name in ("sampler", "steps", "guidance")}
    del meta["guide"], meta["num_worse_states"]
    write_clip_state(saved, meta, tensors)
    rewritten(saved, lambda tensors, metadata: metadata.update(format_version="1"))
    clips, _ = ClipStream.resume(pretrained(), saved, num_groups=2)
    assert torch.equal(torch.stack(list(clips)), torch.stack(expected))


def test_a_guide_belongs_to_its_clips(saved: Path) -> None:
    weak, other = pretrained("attention"), pretrained(["pom", "attention"])
    with pytest.raises(InputError, match=r"state.safetensors: these clips were begun without a guide; continue them"):
        ClipStream.resume(pretrained(), saved, num_groups=1, guide=weak)
    clips = stream(pretrained(), 1, guidance=1.0, guide=weak)
    clips.save(saved)
    for wrong, message in ((None, "begun with a guide; give the same one"), (other, "begun with another guide")):
        with pytest.raises(InputError, match=f"state.safetensors: these clips were {message}"):
            ClipStream.resume(pretrained(), saved, num_groups=1, guide=wrong)


def test_another_process_goes_on_with_the_same_bits(saved: Path) -> None:
    expected = list(stream(pretrained(), 4))[2:]
    code = """
import sys; from pathlib import Path; import torch
sys.path[:0] = sys.argv[2:]
from test_clip_state import *
clips, _ = ClipStream.resume(pretrained(), Path(sys.argv[1]), num_groups=2)
torch.save(list(clips), sys.argv[1] + ".pt")
"""
    here = Path(__file__).parent
    run([sys.executable, "-c", code, str(saved), str(here), str(TESTS)])
    found = torch.load(f"{saved}.pt", weights_only=True)
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_a_state_does_not_change_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_clip_state(path, {}, {"a": torch.ones(3000)})
    _, tensors = read_clip_state(path)
    with path.open("r+b") as file:  # as `cp` over it does
        file.seek(-12000, 2)
        file.write(bytes(12000))
    assert torch.equal(tensors["a"], torch.ones(3000))


def test_a_stream_without_end_can_be_stopped_and_gone_on_with_twice(tmp_path: Path) -> None:
    model = pretrained()
    expected = list(stream(model, 5))
    clips = stream(model)
    found = [next(clips)]
    for _ in range(2):
        clips.save(tmp_path / "state")
        clips, _ = ClipStream.resume(model, tmp_path / "state", num_groups=None)
        found += list(islice(clips, 2))
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_with_one_t_for_all_frames_the_stream_is_the_clip_that_sample_draws() -> None:
    model = pretrained(objective="eps")
    at_once = sample(model, TEXT, seeds=SEEDS, num_frames=6, num_steps=3, guidance=1.0)
    groups = torch.cat(list(stream(model, 3, guidance=1.0, size=(10, 6))), dim=2)
    torch.testing.assert_close(groups, at_once, rtol=1e-4, atol=1e-5)
    options: dict[str, Any] = {"sampler": "ddpm", "guidance": 1.0, "guidance_interval": (0.0, 0.7), "num_steps": 5}
    at_once = sample(model, TEXT, seeds=SEEDS, num_frames=6, **options)
    torch.testing.assert_close(torch.cat(list(stream(model, 3, **options)), dim=2), at_once, rtol=1e-4, atol=1e-4)


def test_what_was_asked_comes_back_without_the_text_encoder(tmp_path: Path) -> None:
    """Its weights may not be there any more."""
    folder = save_t5(tmp_path / "t5", 0, d_model=TEXT_DIM)
    config = TextEncoderConfig(path=str(folder), tokenizer="bytes", max_length=12, precision="fp32")
    text = TEXT_INFO.model_copy(update={"config": config, "identity": build_text_encoder(config).identity()})
    prompts = ["a dog", "a cat that runs away"]
    clips = ClipStream(pretrained(text=text), prompts, SEEDS, num_groups=2, num_steps=2, guidance=1.0)
    expected = list(clips)
    clips = ClipStream(pretrained(text=text), prompts, SEEDS, num_groups=0, num_steps=2, guidance=1.0)
    clips.save(tmp_path / "state")
    shutil.rmtree(folder)
    again, _ = ClipStream.resume(pretrained(text=text), tmp_path / "state", num_groups=2)
    assert (again.prompts, again.seeds, again.next_group) == (prompts, SEEDS, 0)
    assert torch.equal(torch.stack(list(again)), torch.stack(expected))


def test_num_groups_counts_what_the_stream_gives_and_none_is_endless() -> None:
    assert [len(list(stream(pretrained(), number))) for number in (0, 1, 3)] == [0, 1, 3]
    assert len(list(islice(stream(pretrained(), None), 10))) == 10


def test_positions_beyond_those_of_training_are_told_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    clips = stream(pretrained(max_start_group=1))  # 3 groups in training: positions 0 to 3
    list(islice(clips, 4))
    assert capsys.readouterr().err == ""
    list(islice(clips, 3))
    warning = capsys.readouterr().err
    assert warning.count("warning") == 1
    assert "frame groups 0 to 3" in warning
    assert "diffusion.max_start_group" in warning


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (9, 6)}, "latent size 9x6 is not divisible by patch_size 2"),
        ({"known": torch.zeros(2, 3, 2, 5, 6)}, "latent size 5x6 is not divisible by patch_size 2"),
        ({"known": torch.zeros(1, 3, 2, 4, 6)}, r"expected latents of shape \(2 3 frames 4 6\), got \(1, 3, 2, 4, 6\)"),
        ({"known": torch.zeros(2, 3, 2, 4, 6), "size": (8, 6)}, r"expected latents of shape \(2 3 frames 8 6\)"),
        ({"known": torch.zeros(2, 3, 4, 6)}, r"got \(2, 3, 4, 6\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stream(pretrained(), 1, **changes)


def test_prompts_need_a_seed_each() -> None:
    with pytest.raises(InputError, match="2 prompts but 1 seeds; give one seed per clip"):
        ClipStream(pretrained(), TEXT, [1], num_groups=1)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        ({"per_frame_group": True}, "it was trained with temporal block_causal, patch_frames 2, a t per frame group"),
        ({"temporal": "none"}, "it was trained with temporal none.* frame group by frame group need both alike"),
        ({"objective": "eps"}, "its objective is eps, and the model's is flow"),
        ({"text": TEXT_INFO.model_copy(update={"identity": "xyz"})}, "its text encoder is xyz, and the model's is abc"),
        ({"latent_shape": (4, 6, 8, 6)}, "its number of latent channels is 4, and the model's is 3"),
    ],
)
def test_guides_that_cannot_go_along_are_refused(guide: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"guide: {message}"):
        stream(pretrained(), 1, guidance=1.0, guide=pretrained(**guide))


def test_a_guide_of_other_clips_can_guide_them_at_once() -> None:
    """Neither mask nor form matter where all frames are drawn together."""
    model, weak = pretrained(), pretrained("attention", temporal="none")
    given: dict[str, Any] = {"seeds": SEEDS, "num_frames": 4, "num_steps": 3, "guidance": 1.0}
    assert not torch.equal(sample(model, TEXT, guide=weak, **given), sample(model, TEXT, **given))
    with pytest.raises(InputError, match="guide: guidance is 0, so that a guide would change nothing"):
        sample(model, TEXT, guide=weak, seeds=SEEDS)


def test_models_that_carry_no_state_are_refused() -> None:
    with pytest.raises(InputError, match=r"reads all frames at once .* or train it with"):
        stream(pretrained(temporal="none"), 1)
    config = ImageModelConfig(latent_shape=(3, 4, 4), num_classes=2, dim=8, depth=1)
    pictures = PretrainedDiPoM(pretrained().card.model_copy(update={"model": config}))
    with pytest.raises(InputError, match="this model makes pictures"):
        ClipStream(pictures, TEXT, SEEDS, num_groups=1)  # type: ignore[arg-type]


def other_weights() -> PretrainedVDiPoM:
    model = pretrained()
    model.text_embedding.bias[0] += 1
    return model


@pytest.mark.parametrize(
    "make",
    [
        other_weights,
        lambda: pretrained(per_frame_group=True),
        lambda: pretrained(objective="eps"),
        lambda: pretrained(depth=3),
        lambda: pretrained().bfloat16(),
    ],
    ids=["weights", "form", "objective", "size", "precision"],
)
def test_a_state_of_another_model_is_refused(make: Callable[[], PretrainedVDiPoM], saved: Path) -> None:
    with pytest.raises(InputError, match=r"state.safetensors: these clips are of another model.*the model that began"):
        ClipStream.resume(make(), saved, num_groups=1)


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """The file with other tensors or metadata, as another program would write it."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


def other_seed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"[11, 12]", b"[11, 13]"))


def other_version(path: Path) -> None:
    rewritten(path, lambda tensors, metadata: metadata.update(format_version="99", pomscale="9.9"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "cannot be read .* or a part of one; copy or save it again"),
        (flip, "damaged; copy it again"),
        (other_seed, "damaged; copy it again"),
        (other_version, "format version 99, this pomscale reads 1 and 2; use pomscale 9.9"),
        (lambda path: path.write_bytes(b""), "cannot be read .* no state of clips"),
        (
            lambda path: path.write_text("not a state at all, but long enough for a header"),
            "cannot be read .* no state",
        ),
        (lambda path: save_file({"x": torch.zeros(2)}, path), "holds no state of clips; give a file"),
        (lambda path: path.unlink(), "there is no such file; give the file"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read .* no state of clips"),
    ],
    ids=["truncated", "flipped bit", "changed by hand", "later version", "empty", "text", "weights", "none", "folder"],
)
def test_a_file_that_is_no_state_is_one_clear_error(spoil: Callable[[Path], Any], message: str, saved: Path) -> None:
    spoil(saved)
    with pytest.raises(InputError, match=rf"{saved.name}: {message}"):
        ClipStream.resume(pretrained(), saved, num_groups=1)


def test_a_save_that_fails_keeps_what_was_there(saved: Path) -> None:
    clips, _ = ClipStream.resume(pretrained(), saved, num_groups=1)
    with pytest.raises(PomscaleError, match="cannot write"):
        clips.save(saved.parent / "no such folder" / "state")
    assert ClipStream.resume(pretrained(), saved, num_groups=1)[0].next_group == 2
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_text_is_saved_as_it_was_given(tmp_path: Path) -> None:
    half = Text(TEXT.embeddings.half(), TEXT.mask)
    ClipStream(pretrained(), half, SEEDS, num_groups=1).save(tmp_path / "state")
    assert load_file(tmp_path / "state")["text.embeddings"].dtype == torch.float16
