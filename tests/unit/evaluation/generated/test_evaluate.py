"""An evaluation gives what the metrics give of all features at once, however it was cut, stopped and continued."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pomscale.base.errors import InputError, PomscaleError
from pomscale.base.keyed_random import Stream, keyed_generator
from pomscale.base.task_index import TaskIndex
from pomscale.codecs.extractors import build_extractor
from pomscale.config.codecs import VaeCodecConfig
from pomscale.evaluation.generated.evaluate import Outcome, evaluate
from pomscale.evaluation.generated.evaluation import Evaluation
from pomscale.evaluation.generated.figures import Conventions
from pomscale.evaluation.generated.generated_pictures import PicturesOfClasses
from pomscale.evaluation.generated.measure import read_ahead
from pomscale.evaluation.generated.opening import Opening
from pomscale.evaluation.generated.picture_files import Fit
from pomscale.evaluation.generated.request import Outputs, Request
from pomscale.evaluation.generated.statistics_files import read_statistics
from pomscale.evaluation.generated.trained_model import Drawing, ModelSource
from pomscale.evaluation.generated.work_folder import PartFiles
from pomscale.metrics.frechet import frechet_distance
from pomscale.metrics.inception_score import InceptionScore, assign_splits
from pomscale.metrics.kernels import Subsets, clip_score, kid
from pomscale.metrics.moments import Moments
from pomscale.metrics.neighbours import neighbour_metrics
from pomscale.runs.result_settings import result_key
from support.generated_pictures import make_pixels, write_folder, write_tar
from support.tiny_films import save_picture_model
from support.tiny_models import save_clip, save_vae

SIZE = (6, 5)


def as_features(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1).astype(np.float32) / np.float32(255)


def moments(features: np.ndarray) -> Moments:
    found = Moments.empty(features.shape[1])
    found.add(features)
    return found


@pytest.fixture
def folders(tmp_path: Path) -> Request:
    """40 pictures against 50, in parts of 16."""
    write_folder(tmp_path / "source", make_pixels(40, SIZE, seed=1))
    write_folder(tmp_path / "reference", make_pixels(50, SIZE, seed=2))
    return Request(
        str(tmp_path / "source"), str(tmp_path / "reference"), ("pixels",), batch=7, part=16, work=tmp_path / "work"
    )


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_picture_model(tmp_path_factory.mktemp("model") / "model")


def generating(model: Path, work: Path, num: int = 20, **changes: Any) -> Request:
    drawing = Drawing(changes={"num_steps": 2, "guidance": 1.0})
    opening = Opening(num=num, model=ModelSource(Path(), device="cpu"), drawing=drawing)
    return replace(Request(str(model), None, ("pixels",), opening=opening, batch=4, part=8, work=work), **changes)


def run(request: Request, **options: Any) -> Outcome:
    return evaluate(Evaluation(request), progress=False, **options)


def result_of(request: Request) -> dict[str, Any]:
    result = run(request).result
    assert result is not None
    return result


def test_figures_are_those_of_all_features(folders: Request) -> None:
    ours, theirs = (as_features(make_pixels(count, SIZE, seed)) for count, seed in ((40, 1), (50, 2)))
    result = result_of(folders)
    neighbours = neighbour_metrics(ours, theirs)
    assert result["metrics"] == {
        "fid": pytest.approx(frechet_distance(moments(ours), moments(theirs)).value, rel=1e-9),
        "precision": neighbours.precision,
        "recall": neighbours.recall,
        "density": neighbours.density,
        "coverage": neighbours.coverage,
        "kid": kid(ours, theirs)[0],
    }
    subsets = replace(folders, work=None, conventions=Conventions(kid_subsets=(5, 20)), metrics=("kid",))
    subsets = replace(subsets, work=folders.work.with_name("subsets"))  # type: ignore[union-attr]
    assert result_of(subsets)["metrics"]["kid"] == kid(ours, theirs, Subsets(5, 20))[0]


def test_the_inception_score_of_parts(tmp_path: Path) -> None:
    """The score of parts is that of all logits at once."""
    pictures = make_pixels(40)
    folder = write_folder(tmp_path / "a", pictures)
    request = Request(str(folder), None, ("digits",), batch=7, part=16, work=tmp_path / "work")
    result = result_of(replace(request, conventions=Conventions(splits=4)))
    assert result["settings"]["conventions"] == {"splits": 4, "splits_shuffled": True}
    logits = build_extractor("digits").extract(torch.from_numpy(pictures)[:, None], ("logits",))["logits"].numpy()
    score = InceptionScore.empty(10, 4)
    score.add(logits, assign_splits(40, 4))
    assert score.score()[0] > 1.1
    assert result["metrics"]["inception_score"] == pytest.approx(score.score()[0], rel=1e-5)


def test_a_part_does_not_depend_on_who_measures_it(folders: Request) -> None:
    alone = result_of(folders)
    evaluation = Evaluation(replace(folders, work=folders.work.with_name("shared")))  # type: ignore[union-attr]
    # The second of two tasks takes its own parts first.
    outcome = evaluate(evaluation, TaskIndex(1, 2), progress=False)
    assert outcome.num_made == outcome.num_parts == 7
    assert outcome.result == alone


def test_settings_do_not_depend_on_parts_or_batches_and_change_with_any_picture(folders: Request) -> None:
    def settings(name: str, **changes: Any) -> dict[str, Any]:
        work = Path(folders.source).with_name(name)
        request = replace(folders, metrics=("fid",), work=work, **changes)
        return result_of(request)["settings"]  # type: ignore[no-any-return]

    before = settings("one")
    assert result_key(settings("two", part=9, batch=4)) == result_key(before)
    first, last = (Path(str(folders.reference), name) for name in ("00/0000.png", "09/0049.png"))
    contents = first.read_bytes(), last.read_bytes()
    first.write_bytes(contents[1])
    last.write_bytes(contents[0])  # the same pictures in another order are another set
    assert result_key(settings("three")) != result_key(before)


def test_a_stopped_evaluation_continues_part_by_part(folders: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = result_of(replace(folders, work=folders.work.with_name("whole")))  # type: ignore[union-attr]
    commit, commits = PartFiles.commit, list[int]()

    def stops_at_the_fourth(self: PartFiles, part: int, *arguments: Any) -> None:
        commits.append(part)
        if len(commits) == 4:
            raise KeyboardInterrupt
        commit(self, part, *arguments)

    monkeypatch.setattr(PartFiles, "commit", stops_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(folders)
    outcome = run(folders)
    assert (outcome.num_made, outcome.num_parts) == (4, 7)
    assert outcome.result == whole
    again = run(folders)
    assert (again.num_made, again.result) == (0, whole)
    assert sorted(path.name for path in folders.work.iterdir()) == ["claims", "plan.json", "result.json"]  # type: ignore[union-attr]


def test_a_task_that_starts_while_another_one_finishes_measures_nothing(
    folders: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(folders).result
    exists, asked = Path.exists, list[Path]()

    def not_at_first(self: Path, **options: Any) -> bool:
        if self.name == "result.json":
            asked.append(self)
        return exists(self, **options) and not (self.name == "result.json" and len(asked) == 1)

    monkeypatch.setattr(Path, "exists", not_at_first)
    late = run(folders)
    assert (late.num_made, late.result) == (0, result)
    assert len(asked) == 3


def test_a_work_folder_is_of_one_evaluation(folders: Request) -> None:
    run(folders)
    with pytest.raises(InputError, match=r"parts of an evaluation with another batch, conventions, metrics"):
        run(replace(folders, batch=8, metrics=("fid",)))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_pictures_that_were_replaced_are_measured_again(
    folders: Request, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = Path(folders.source)
    monkeypatch.chdir(source.parent)

    def write(value: int) -> None:  # constant pictures: all files have one size in bytes
        pixels = np.full((16, *SIZE), value, np.uint8)
        write_folder(source, pixels) if kind == "folder" else write_tar(source.with_suffix(".tar"), pixels)

    if kind == "folder":
        shutil.rmtree(source)
    request = replace(folders, source=folders.source + (".tar" if kind == "tar" else ""), work=None, metrics=("fid",))
    write(40)
    before = result_of(request)["metrics"]["fid"]
    write(41)
    assert result_of(request)["metrics"]["fid"] != before


def test_pictures_that_cannot_be_read_are_listed_and_end_it(folders: Request) -> None:
    Path(folders.source, "01", "0007.png").write_bytes(b"damaged")
    Path(str(folders.reference), "02", "0012.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 pictures cannot be read, .* 01/0007.png: no PNG, .* --max-skipped 2"):
        run(folders)
    lines = (folders.work / "failures.jsonl").read_text().splitlines()  # type: ignore[operator]
    assert [json.loads(line)["side"] for line in lines] == ["source", "reference"]
    outcome = run(replace(folders, max_skipped=2))
    assert outcome.num_made == 0
    assert outcome.result is not None
    assert outcome.result["pictures"]["source"]["count"] == 39
    assert outcome.result["pictures"]["source"]["failures"] == 1
    assert any(" of 39 pictures " in text for text in outcome.result["warnings"])
    rest = np.delete(make_pixels(40, SIZE, 1), 7, axis=0), np.delete(make_pixels(50, SIZE, 2), 12, axis=0)
    assert outcome.result["metrics"]["kid"] == kid(*map(as_features, rest))[0]
    # What was allowed once is no result where it is not allowed.
    with pytest.raises(InputError, match=r"2 pictures cannot be read, .* 01/0007.png: no PNG"):
        run(replace(folders, max_skipped=1))


def test_few_pictures_behind_statistics_are_warned_of(folders: Request, tmp_path: Path) -> None:
    outputs = Outputs(statistics=tmp_path / "statistics.npz")
    result_of(replace(folders, reference=None, opening=Opening(num=9), outputs=outputs))
    warnings = Evaluation(replace(folders, reference=str(outputs.statistics), metrics=("fid",))).warnings()
    assert [text.startswith("fid of 9 pictures ") for text in warnings] == [True]


def test_features_that_are_not_finite_end_it_in_one_line(folders: Request, tmp_path: Path) -> None:
    class Overflows(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(x.float().mean([2, 3]))

    torch.jit.script(Overflows()).save(str(tmp_path / "overflows.pt"))
    extractors = (f"torchscript:{tmp_path / 'overflows.pt'}",)
    with pytest.raises(InputError, match=r"source: extractor torchscript gives features that are not finite for some "):
        result_of(replace(folders, extractors=extractors, repeats_grey=True))


def test_pictures_are_drawn_with_a_seed_each(model: Path, tmp_path: Path) -> None:
    drawing = Drawing(num=9, seed=5, changes={"num_steps": 2, "guidance": 1.0})
    every = PicturesOfClasses(ModelSource(model, device="cpu"), drawing)
    (whole,) = every.batches(0, 9, 9)
    assert whole.labels == [0, 1, 2] * 3
    later = PicturesOfClasses(ModelSource(model, device="cpu"), replace(drawing, seed=8))
    (same,) = later.batches(0, 3, 9)  # seeds 8 to 10, and the same classes
    torch.testing.assert_close(same.pixels, whole.pixels[3:6], atol=1, rtol=0)
    pieces = torch.cat([one.pixels for one in every.batches(0, 9, 4)])
    torch.testing.assert_close(pieces, whole.pixels, atol=1, rtol=0)


def test_pictures_of_a_model_of_latents(tmp_path: Path) -> None:
    codec = VaeCodecConfig(name="vae", path=str(save_vae(tmp_path / "vae", seed=0)))
    folder = save_picture_model(tmp_path / "model", codec)
    pictures = PicturesOfClasses(ModelSource(folder, device="cpu"), Drawing(num=3, changes={"num_steps": 1}))
    assert (pictures.num_channels, pictures.size) == (3, (8, 8))
    (batch,) = pictures.batches(0, 3, 4)
    assert batch.pixels.shape == (3, 3, 8, 8)


def test_labels(model: Path) -> None:
    source = ModelSource(model, device="cpu")
    some = PicturesOfClasses(source, Drawing(num=9, classes=(2, 0)))
    assert some.labels_of([0, 1, 2, 7]) == [2, 0, 2, 0]
    assert PicturesOfClasses(source, Drawing(labels="none")).labels_of([4, 5]) == [3, 3]
    drawn = PicturesOfClasses(source, Drawing(labels="random", seed=7))
    expected = [int(keyed_generator(0, Stream.SAMPLE_LABEL, 7 + number).random() * 3) for number in range(60)]
    assert drawn.labels_of(range(60)) == expected
    assert set(expected) == {0, 1, 2}
    with pytest.raises(InputError, match=r"classes \[1, 3\] are asked for, and the model has 0..2"):
        PicturesOfClasses(source, Drawing(classes=(1, 3)))


def test_a_model_without_averages(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"has no average of the weights .* --weights model"):
        PicturesOfClasses(ModelSource(model, weights="ema", device="cpu"), Drawing())
    PicturesOfClasses(ModelSource(model, weights="model", device="cpu"), Drawing())
    assert capsys.readouterr().err == ""
    PicturesOfClasses(ModelSource(model, device="cpu"), Drawing())
    assert "those as last trained are measured" in capsys.readouterr().err


def test_settings_say_everything(model: Path, tmp_path: Path) -> None:
    reference = write_folder(tmp_path / "reference", make_pixels(30))
    settings = result_of(generating(model, tmp_path / "work", reference=str(reference)))["settings"]
    assert settings["checkpoint"]["average"].keys() == {"name", "sha256"}
    assert settings["sampling"]["steps"] == 2
    assert settings["sampling"]["sampler"] == "euler"
    assert settings["drawn"] == {"number": 20, "seed": 0, "labels": "balanced", "classes": 3}
    assert settings["dtype"] == "fp32"
    assert settings["extractors"]["pixels"].keys() == {"spec", "identity"}
    assert settings["reference"]["pictures"]["measured"] == 30
    assert len(settings["reference"]["pictures"]["pixels_sha256"]) == 64
    assert settings["versions"]["torch"] == torch.__version__


def test_written_pictures_are_the_measured_ones(model: Path, tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "out.npz", tmp_path / "tars", tmp_path / "statistics.npz")
    result = result_of(generating(model, tmp_path / "work", num=21, outputs=outputs))
    source = PicturesOfClasses(
        ModelSource(model, device="cpu"), Drawing(num=21, changes={"num_steps": 2, "guidance": 1})
    )
    expected = torch.cat([one.pixels for part in (0, 8, 16) for one in source.batches(part, min(part + 8, 21), 4)])
    with np.load(tmp_path / "out.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], expected.numpy().transpose(0, 2, 3, 1))
        assert arrays["arr_1"].tolist() == [number % 3 for number in range(21)]
        assert arrays["arr_0"].dtype == np.uint8
    found = []
    for path in sorted((tmp_path / "tars").glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [np.asarray(Image.open(tar.extractfile(m))) for m in tar if m.name.endswith(".png")]  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.stack(found), expected[:, 0].numpy())
    statistics = read_statistics(tmp_path / "statistics.npz")
    np.testing.assert_allclose(statistics.gaussians["pooled"].mean, as_features(expected.numpy()).mean(0), rtol=1e-6)
    assert statistics.settings["drawn"]["number"] == 21
    assert result["metrics"] == {}
    # What was written is measured like what was drawn.
    for where in ("out.npz", "tars"):
        request = Request(
            str(tmp_path / where), str(tmp_path / "statistics.npz"), ("pixels",), work=tmp_path / where[:3]
        )
        assert result_of(request)["metrics"]["fid"] == pytest.approx(0, abs=1e-9)


def test_equal_pictures_give_equal_files(model: Path, tmp_path: Path) -> None:
    contents = []
    for number in range(2):
        outputs = Outputs(tmp_path / f"{number}.npz", tmp_path / f"tars-{number}")
        run(generating(model, tmp_path / f"work-{number}", extractors=(), outputs=outputs))
        files = [tmp_path / f"{number}.npz", *sorted((tmp_path / f"tars-{number}").iterdir())]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


def test_what_is_damaged_in_the_work_folder_is_said(folders: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folders.work is not None
    whole = result_of(replace(folders, work=folders.work.with_name("whole")))
    with monkeypatch.context() as context:
        context.setattr("pomscale.evaluation.generated.evaluate.finish", lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):  # noqa: PT011
            run(folders)
    for name, damage in (
        ("source-000001.0.pooled.features.npy", Path.unlink),
        ("reference-000000.0.pooled.features.npy", lambda path: path.write_bytes(b"")),
        ("source-000002.npz", lambda path: path.write_bytes(b"x")),
    ):
        path = folders.work / "parts" / name
        before = path.read_bytes()
        damage(path)
        with pytest.raises(PomscaleError, match=rf"{name}: cannot be read: .*; delete .*json and run again"):
            run(folders)
        path.write_bytes(before)
    assert result_of(folders) == whole
    (folders.work / "result.json").write_text("{")
    with pytest.raises(InputError, match=r"result.json: is damaged .*; delete .*work to measure again"):
        run(folders)
    (folders.work / "result.json").unlink()
    assert result_of(folders) == whole


def test_tars_of_others_are_not_taken_over(model: Path, tmp_path: Path) -> None:
    theirs = write_tar(tmp_path / "tars" / "pictures-000000.tar", make_pixels(2))
    before = theirs.read_bytes()
    for _ in range(2):
        with pytest.raises(InputError, match=r"--write-tars .*: there are tars in it"):
            run(generating(model, tmp_path / "work", extractors=(), outputs=Outputs(tars=tmp_path / "tars")))
    assert theirs.read_bytes() == before


@pytest.mark.parametrize("output", ["npz", "tars", "statistics"])
def test_an_output_that_has_gone_is_said_to_be_gone(folders: Request, output: str) -> None:
    path = Path(folders.source).with_name("output.npz" if output != "tars" else "output")
    request = replace(folders, outputs=Outputs(**{output: path}))
    run(request)
    run(request)
    shutil.rmtree(path) if output == "tars" else path.unlink()
    with pytest.raises(InputError, match=r"output.*: is gone, .* delete .*work to measure again"):
        run(request)


def test_a_tar_that_has_gone_is_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = generating(model, tmp_path / "work", extractors=(), outputs=Outputs(tars=tmp_path / "tars"))
    with monkeypatch.context() as context:
        context.setattr("pomscale.evaluation.generated.evaluate.finish", lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):  # noqa: PT011
            run(request)
    (tmp_path / "tars" / "pictures-000001.tar").unlink()
    assert run(request).num_made == 1


@pytest.mark.parametrize(
    ("source", "reference", "changes", "message"),
    [
        (SIZE, (6, 4), {}, r"has pictures of 6x5 pixels, and the reference .* of 6x4; cut and resize"),
        (SIZE, (*SIZE, 3), {}, "a has grey pictures, and .*b has pictures with colours; .* --grey repeat"),
        ((40, 40), (40, 40), {}, "takes pictures up to 32x32"),
    ],
)
def test_pictures_that_do_not_fit(
    tmp_path: Path, source: tuple[int, ...], reference: tuple[int, ...], changes: dict[str, Any], message: str
) -> None:
    folders = [write_folder(tmp_path / name, make_pixels(9, size)) for name, size in (("a", source), ("b", reference))]
    request = Request(str(folders[0]), str(folders[1]), ("pixels",), work=tmp_path / "work", **changes)
    with pytest.raises(InputError, match=message):
        run(request)
    assert not (tmp_path / "work").exists()


def test_what_can_be_known_before_is_said_before(folders: Request, model: Path) -> None:
    file = Path(folders.source).with_name("one.npz")
    for changes, message in (
        ({"conventions": Conventions(kid_subsets=(3, 41))}, r"--kid-subsets 3x41: .*source has 40 pictures, too few"),
        ({"outputs": Outputs(npz=file, statistics=file)}, "pictures and statistics cannot be one file"),
        (
            {"source": str(model), "opening": Opening(drawing=Drawing(4, labels="none", classes=(1,)))},
            "--classes and --labels none",
        ),
    ):
        with pytest.raises(InputError, match=message):
            Evaluation(replace(folders, **changes))


def test_fitted_pictures_have_one_size(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path / name, make_pixels(9, size)) for name, size in (("a", (12, 9)), ("b", (8, 8)))]
    fit = Fit((6, 6))
    request = Request(str(folders[0]), str(folders[1]), ("pixels",), opening=Opening(fit=fit), work=tmp_path / "work")
    assert result_of(request)["settings"]["source"]["fit"]["targets"] == [[6, 6]]


def test_errors_of_what_reads_ahead_are_raised_where_it_is_read() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    ahead = read_ahead(numbers())
    assert [next(ahead) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="the sixth"):
        next(ahead)
    assert list(read_ahead(iter(range(7)))) == list(range(7))


def test_clip_scores_are_those_of_the_pairs(tmp_path: Path) -> None:
    spec = f"clip:{save_clip(tmp_path / 'clip', seed=0)}"
    pictures, captions = make_pixels(9, (9, 8, 3)), [f"cat {number}" for number in range(9)]
    tar = write_tar(tmp_path / "a.tar", pictures, captions)
    work = tmp_path / "work"
    result = result_of(Request(str(tar), None, (spec,), metrics=("clip_score",), batch=2, part=4, work=work))
    clip: Any = build_extractor(spec)
    features = clip.extract(torch.from_numpy(pictures).permute(0, 3, 1, 2))["pooled"]
    scores = clip_score(features.numpy(), clip.embed_texts(captions).numpy())
    assert scores.max() > 0
    assert result["metrics"] == {"clip_score": pytest.approx(scores.mean(), rel=1e-5)}


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"guide": "other"}])
def test_other_ways_to_draw(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Precision and guide change the pictures, and the settings say so; the hash of the weights stays."""
    if "guide" in changes:
        changes = {"guide": save_picture_model(tmp_path / "other", scale=0.05)}
    drawing = Drawing(num=6, changes={"num_steps": 2, "guidance": 2.0})
    usual = PicturesOfClasses(ModelSource(model, device="cpu"), drawing)
    unusual = PicturesOfClasses(ModelSource(model, device="cpu", **changes), drawing)
    (one,), (two,) = (source.batches(0, 6, 6) for source in (usual, unusual))
    assert not torch.equal(one.pixels, two.pixels)
    settings = usual.settings(), unusual.settings()
    assert settings[0]["checkpoint"] == settings[1]["checkpoint"]
    assert settings[0] != settings[1]
