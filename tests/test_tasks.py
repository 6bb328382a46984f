"""The supplied tasks: their data, and that they learn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import distloop
from distloop.errors import ConfigError, DataError
from distloop.tasks.byte_lm import PADDING, START, ByteLM, Chunks
from distloop.tasks.digits import Digits
from distloop.tasks.gpt import GPT


def test_digits_are_divided_once_and_for_all() -> None:
    task = Digits()
    train, test = task.train, task.validation
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(Digits().validation.tensors[0], test.tensors[0])
    assert float(train.tensors[0].min()) >= 0.0 and float(train.tensors[0].max()) == 1.0
    for model in ("cnn", "mlp"):
        assert Digits(model=model).objectives["classifier"].guess((test.tensors[0][:5],)).shape == (5, 10)
    with pytest.raises(ConfigError, match=r"task\.model: unknown 'rnn'"):
        Digits(model="rnn")  # type: ignore[arg-type]


def test_digits_learn_from_python_too(tmp_path: Path) -> None:
    """That the configuration reaches 97 % is shown under torchrun."""
    result = distloop.fit(
        Digits(),
        config=Path(__file__).parent.parent / "configs" / "digits.yaml",
        log={"directory": str(tmp_path), "tensorboard": False},
        train={"epochs": 4},
    )
    assert result.best is not None and result.best >= 0.9
    assert (result.directory / "curves.png").stat().st_size > 10_000


def test_chunks_hold_every_byte_once() -> None:
    documents = [b"hello world", b"a", b"", b"0123456789" * 3]
    chunks = Chunks(documents, context=4)
    tokens, targets = chunks.__getitems__(list(range(len(chunks))))
    assert tokens.shape == targets.shape
    valid = targets != PADDING
    assert bytes(targets[valid].tolist()) == b"".join(documents)
    assert (tokens[:, 0] == START).all()
    assert torch.equal(tokens[:, 1:][valid[:, 1:]], targets[:, :-1][valid[:, 1:]]), "a token is the target before it"
    assert [int(v.sum()) for v in valid] == [4, 4, 3, 1, 4, 4, 4, 4, 4, 4, 4, 2]
    one, target = chunks[2]
    assert bytes(target.tolist()) == b"rld" and one.shape == (3,)


def test_gpt_looks_back_only() -> None:
    torch.manual_seed(0)
    model = GPT(vocabulary=257, outputs=256, context=8, width=16, layers=2, heads=2).eval()
    tokens = torch.randint(256, (1, 8))
    changed = tokens.clone()
    changed[0, 5] += 1
    scores, others = model(tokens), model(changed)
    assert torch.equal(scores[:, :5], others[:, :5])
    assert not torch.equal(scores[:, 5:], others[:, 5:])


def test_byte_lm_reads_a_file_a_directory_or_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a line of text\n" * 400)
    (tmp_path / "two.md").write_text("another line\n" * 400)
    (tmp_path / "image.png").write_bytes(b"\x89PNG" * 100)
    small = {"width": 16, "layers": 1, "heads": 2, "context": 16}
    a_file = ByteLM(str(tmp_path / "one.txt"), validation_bytes=1000, **small)
    assert len(a_file.validation._text) == 600, "a tenth of a single document at most"
    folder = ByteLM(str(tmp_path), validation_bytes=1000, **small)
    assert len(folder.train._text) + len(folder.validation._text) == 400 * (15 + 13)
    assert bytes(a_file.validation._text.tolist()).endswith(b"a line of text\n"), "the end is held out"
    (tmp_path / "many").mkdir()
    for i in range(20):
        (tmp_path / "many" / f"{i}.txt").write_text("x" * 4000)
    many = ByteLM(str(tmp_path / "many"), **small)
    assert (len(many.train._text), len(many.validation._text)) == (18 * 4000, 2 * 4000), "a tenth at most"
    library = ByteLM(max_bytes=300_000, **small)
    assert 100_000 < len(library.train._text) < 300_000
    with pytest.raises(DataError, match="no such file or directory"):
        ByteLM(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="too little text"):
        ByteLM(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="does not divide"):
        ByteLM(width=10, heads=3)


def test_byte_lm_learns_and_counts_bits(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 300)
    task = ByteLM(str(tmp_path / "text.txt"), width=32, layers=1, heads=2, context=32)
    with torch.no_grad():
        untrained = task.evaluate(task.validation.__getitems__([0, 1]))["bits_per_byte"]
    assert float(untrained[0]) / untrained[1] == pytest.approx(math.log2(256), rel=0.05)
    result = distloop.fit(
        task,
        optimizer={"lr": 1e-2},
        gradients={"clip_norm": 1.0},
        data={"global_batch_size": 16},
        train={"max_steps": 60},
        log={"directory": str(tmp_path / "runs"), "tensorboard": False, "picture": False},
    )
    assert result.metrics["bits_per_byte"] < 1.0
