"""The recall task: its data, its difficulty, and a tiny training that a kill does not change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pomscale.config.yaml_file import RecipeError
from pomscale.experiments.recall import train
from pomscale.experiments.recall.__main__ import main
from pomscale.experiments.recall.config import RecallConfig, read_recall
from pomscale.experiments.recall.data import Vocabulary, recall_batch
from pomscale.experiments.recall.network import build_network

TINY = [
    *("num_tokens=24", "num_pairs=4", "num_questions=2", "num_keys=8", "num_values=4", "num_fillers=5"),
    *("dim=32", "depth=1", "num_heads=2", "batch=32", "num_steps=150", "warmup_steps=10", "lr=1e-2"),
    "num_evaluated=64",
]
CPU = torch.device("cpu")


def config(*overrides: str) -> RecallConfig:
    return read_recall([*TINY, *overrides])


def test_a_sequence_depends_on_seed_and_number_alone() -> None:
    together = recall_batch(config(), range(6))
    alone = recall_batch(config(), [4])
    for name in ("words", "values", "answers"):
        assert torch.equal(getattr(together, name)[4:5], getattr(alone, name))
    assert not torch.equal(recall_batch(config("seed=1"), [4]).words, alone.words)
    assert not torch.equal(recall_batch(config(), [5]).words, alone.words)


def test_every_question_has_its_answer_once_in_the_sequence() -> None:
    task = config("num_tokens=40", "num_pairs=7", "num_questions=5")
    words = Vocabulary.of(task)
    batch = recall_batch(task, range(50))
    assert batch.words.shape == batch.values.shape == (50, 40)
    assert batch.answers.shape == (50, 5)
    is_pair = batch.words < words.filler
    assert (is_pair.sum(1) == 7).all()
    assert torch.equal(batch.values < task.num_values, is_pair)
    assert not is_pair[:, -5:].any()
    assert (batch.words[:, -5:] >= words.asked).all()
    for row, values, answers in zip(batch.words, batch.values, batch.answers, strict=True):
        assert len(set(row[-5:].tolist())) == 5
        for question, answer in zip(row[-5:].tolist(), answers.tolist(), strict=True):
            (at,) = (row == question - words.asked).nonzero().flatten().tolist()
            assert values[at] == answer


def test_answers_cannot_be_guessed() -> None:
    """Each value is the answer equally often, for each key, so that no table of keys helps."""
    task = config()
    batch = recall_batch(task, range(4000))
    asked = batch.words[:, -2:].flatten() - Vocabulary.of(task).asked
    counts = torch.zeros(8, 4).index_put_((asked, batch.answers.flatten()), torch.ones(8000), accumulate=True)
    assert counts.min() > 180  # 250 are expected; 180 is 4.4 standard deviations below
    assert counts.max() < 330


def test_the_order_of_the_tokens_says_nothing() -> None:
    """The network reads pairs as a set: any order of what stands before the questions gives the same logits."""
    task = config("depth=2", "mixer=[pom, attention]")
    network = build_network(task)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = recall_batch(task, range(3))
    order = torch.cat([torch.randperm(22, generator=torch.Generator().manual_seed(0)), torch.arange(22, 24)])
    moved = type(batch)(batch.words[:, order], batch.values[:, order], batch.answers)
    torch.testing.assert_close(network(batch), network(moved), rtol=1e-4, atol=1e-4)


def test_a_tiny_training_learns_and_a_kill_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, torn = tmp_path / "whole.json", tmp_path / "torn.json"
    figures = train.train_recall(config("mixer=attention"), whole, CPU)
    assert figures["accuracy"] > 0.5, "chance is 0.25"
    step = train._step

    def killed(*arguments: object) -> float:
        if arguments[3] == 70:
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train_recall(config("mixer=attention"), torn, CPU)
    assert not torn.exists()
    with pytest.raises(Exception, match=r"torn.state.pt: is the state of a training with other settings"):
        train.train_recall(config("mixer=pom"), torn, CPU)
    monkeypatch.setattr(train, "_step", step)
    again = train.train_recall(config("mixer=attention"), torn, CPU)
    assert {name: again[name] for name in ("accuracy", "loss")} == {
        name: figures[name] for name in ("accuracy", "loss")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torn.json", "whole.json"]


def test_the_command_writes_figures_and_settings(tmp_path: Path) -> None:
    out = tmp_path / "recall.json"
    mixer = "mixer={kind: pom, form: coefficients, heads: 4}"
    assert main(["--out", str(out), *TINY, "num_steps=2", mixer]) == 0
    content = json.loads(out.read_text())
    assert content["metrics"]["chance"] == 0.25
    assert content["metrics"]["state"] == 64
    assert content["metrics"]["step_s"] > 0
    assert content["settings"]["mixer"]["form"] == "coefficients"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("num_pairs=9", "num_pairs: no key is there twice, so at most num_keys = 8"),
        ("num_questions=5", "num_questions: at most num_pairs = 4"),
        ("num_tokens=5", "num_tokens: fewer than num_pairs + num_questions"),
        ("mixer=[pom, attention]", "mixer: a pattern of 2 does not divide depth 1"),
        ("mixer={kind: pom, form: coefficients, heads: 5}", "do not divide expand x dim = 64"),
        ("mixer={kind: pom, form: coefficients, rope: true}", "rope: tokens of this task have no positions"),
        ("mixr=pom", "mixr: unknown key; did you mean 'mixer'?"),
    ],
)
def test_wrong_settings_are_one_line(override: str, line: str) -> None:
    with pytest.raises(RecipeError) as raised:
        config(override)
    assert len(raised.value.problems) == 1
    assert line in str(raised.value)
