"""The one-pass kernel against torch's fused Adam and AdamW, bit by bit; what it falls back to; memory on huge pages."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distloop import host_memory, native
from distloop.cpu_adam import THREAD, Kernel, OnePassAdam, cpu_adam
from distloop.errors import ConfigError
from distloop.optimizer import Adam, Group, Optimizer
from distloop.strategies.base import Segment
from distloop.transforms import Collected

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS = [1, 7, 8, 31, 32, 33, 64, 1003]


def kernel_or_skip() -> OnePassAdam:
    rule = OnePassAdam()
    if rule.unavailable:
        pytest.skip(rule.unavailable)
    return rule


def shard(sizes: list[int], rounded: torch.dtype | None, *, offset: int = 0) -> list[Segment]:
    """Return segments whose tensors begin ``offset`` elements behind an aligned address."""
    generator, found = torch.Generator().manual_seed(1), []
    for i, size in enumerate(sizes):
        values = torch.randn(size + offset, generator=generator)[offset:]
        narrow = None if rounded is None else torch.full((size + offset,), 7.0, dtype=rounded)[offset:]
        found.append(Segment(f"p{i}", nn.Parameter(values.clone()), 0, size, values, narrow))
    return found


def gradients(sizes: list[int], step: int, dtype: torch.dtype = FP32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    found = [torch.randn(size, generator=generator) for size in sizes]
    for gradient in found:
        gradient[::5] *= 1e-12  # as they are where a network has nearly converged
        gradient[::7] = 0.0
    return [gradient.to(dtype) for gradient in found]


def train(
    rule: Any,
    segments: list[Segment],
    *,
    steps: int = 20,
    decay: float = 0.1,
    divisor: float | None = 3.7,
    dtype: Any = FP32,
) -> list[Tensor]:
    """Return values, states and rounded values of all segments after some steps, each joined into one tensor."""
    optimizer = Optimizer(rule, [segments], {s.name: decay for s in segments})
    for step in range(steps):
        optimizer.lr = 0.01 / (step + 1)
        given = gradients([s.values.numel() for s in segments], step, dtype)
        optimizer.apply(Collected(given, None if divisor is None else torch.tensor(divisor)), optimizer.shards[0])
    (group,) = optimizer.shards[0].groups
    found = [group.values, group.state["exp_avg"], group.state["exp_avg_sq"], group.rounded]
    return [torch.cat(tensors) for tensors in found if tensors]


@pytest.mark.parametrize("divisor", [None, 8.0, 3.7])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.3, 0.9)])
def test_the_same_bits_as_torch(
    betas: tuple[float, float], decoupled: bool, decay: float, divisor: float | None
) -> None:
    """For whole vectors; torch computes what is left over at the end of a tensor in another order."""
    kernel_or_skip()
    sizes = [8, 64, 1000, 4096]
    ours, theirs = (
        train(rule, shard(sizes, BF16), decay=decay, divisor=divisor)
        for rule in (OnePassAdam(betas, 1e-8, decoupled), Adam(betas, 1e-8, decoupled))
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("rounded", [None, FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_any_length_and_place(dtype: torch.dtype, rounded: torch.dtype | None, offset: int) -> None:
    kernel_or_skip()
    ours, theirs = (
        train(rule, shard(LENGTHS, rounded, offset=offset), steps=4, dtype=dtype)
        for rule in (OnePassAdam(decoupled=True), Adam(decoupled=True))
    )
    for mine, other in zip(ours[:3], theirs, strict=False):
        torch.testing.assert_close(mine, other, rtol=2**-21, atol=0)  # the ends of torch's tensors
    if rounded is not None:
        assert torch.equal(ours[3], ours[0].to(rounded))


def test_bits_do_not_depend_on_how_a_shard_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on the number of threads, nor on whether the rounded values go around the caches."""
    kernel_or_skip()
    size = 2 * THREAD + 13
    (whole,) = shard([size], BF16)
    expected = train(OnePassAdam(), [whole], steps=2)
    cuts = [0, 5, 1000, THREAD + 3, size]
    (values,) = shard([size], BF16)
    parts = [
        Segment(f"p{a}", values.parameter, a, b, values.values[a:b], values.rounded[a:b]) for a, b in pairwise(cuts)
    ]
    monkeypatch.setattr("distloop.cpu_adam.STREAM", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    optimizer = Optimizer(OnePassAdam(), [parts], {p.name: 0.1 for p in parts})
    for step in range(2):
        optimizer.lr = 0.01 / (step + 1)
        (whole_gradient,) = gradients([size], step)
        split = [whole_gradient[a:b] for a, b in pairwise(cuts)]
        optimizer.apply(Collected(split, torch.tensor(3.7)), optimizer.shards[0])
    assert torch.equal(values.values, expected[0])
    assert torch.equal(values.rounded, expected[3])


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 2e38, -3.4e38, 65519.0, 65520.0, 6e-8, 3e-8, 2.9e-8]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("rounded", [BF16, FP16])
def test_rounding(
    rounded: torch.dtype, plain: bool, plain_kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the nearest, and of two the even one, as torch's cast; NaN of any bits stays NaN."""
    kernel_or_skip()
    if plain:
        monkeypatch.setattr(native, "load", lambda name: plain_kernel)
    bits = torch.randint(-(2**31), 2**31, (40_000,), generator=torch.Generator().manual_seed(0)).int()
    ties = (torch.arange(-4096, 4096) << 12).int() + 0x3F800000  # halfway between two numbers, for fp16 and for bf16
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000]).int()
    values = torch.cat([torch.tensor(SPECIAL), *(b.view(FP32) for b in (bits, ties, nan))])
    segment = Segment(
        "p", nn.Parameter(values.clone()), 0, len(values), values, torch.zeros_like(values, dtype=rounded)
    )
    optimizer = Optimizer(OnePassAdam(), [[segment]], {"p": 0.0})  # with a learning rate of 0
    optimizer.apply(Collected([torch.zeros_like(values)]), optimizer.shards[0])
    same = segment.rounded == segment.parameter.detach().to(rounded)
    assert bool((same | (segment.rounded.isnan() & segment.parameter.isnan())).all())


@pytest.fixture(scope="module")
def plain_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The kernel as other processors have it, without vectors."""
    kernel_or_skip()
    made = tmp_path_factory.mktemp("plain") / "adam.so"
    source = tmp_path_factory.mktemp("source") / "adam.c"
    text = (Path(native.__file__).parent / "adam.c").read_text()
    source.write_text("#define PLAIN\n" + text)
    flags = native.FLAGS
    native.FLAGS = [flag.replace("-O3", "-O0") for flag in flags]  # for the time it takes
    try:
        native._compile(["cc"], source, made)
    finally:
        native.FLAGS = flags
    yield ctypes.CDLL(str(made))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_without_vectors_the_same_bits(
    dtype: torch.dtype, plain_kernel: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_or_skip()
    ours = train(OnePassAdam(), shard(LENGTHS, dtype), steps=3, dtype=dtype)
    monkeypatch.setattr(native, "load", lambda name: plain_kernel)
    for mine, plain in zip(ours, train(OnePassAdam(), shard(LENGTHS, dtype), steps=3, dtype=dtype), strict=True):
        assert torch.equal(mine, plain)


def test_without_a_compiler_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> ctypes.CDLL:
        raise native.UnavailableError("there is no C compiler (cc) here")

    expected = train(Adam(decoupled=True), shard(LENGTHS, BF16), dtype=BF16)
    monkeypatch.setattr(native, "load", refuse)
    rule = OnePassAdam(decoupled=True)
    assert rule.describe() == "torch's fused AdamW: there is no C compiler (cc) here"
    for mine, other in zip(train(rule, shard(LENGTHS, BF16), dtype=BF16), expected, strict=True):
        assert torch.equal(mine, other)


def test_values_in_double_precision_are_torchs() -> None:
    def run(rule: Any) -> Tensor:
        values = torch.linspace(-1.0, 1.0, 33, dtype=torch.float64)
        segment = Segment("p", nn.Parameter(values.clone()), 0, 33, values, torch.zeros(33, dtype=BF16))
        optimizer = Optimizer(rule, [[segment]], {"p": 0.1})
        optimizer.lr = 0.1
        optimizer.apply(Collected([values.sin()], torch.tensor(2.0, dtype=torch.float64)), optimizer.shards[0])
        assert torch.equal(segment.rounded, values.to(BF16))
        return values

    assert torch.equal(run(OnePassAdam()), run(Adam()))


def test_a_wrong_kernel_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: constants that are off by little, and a division that is left out."""
    kernel_or_skip()
    right = train(OnePassAdam(), shard([64], BF16))[0]
    fill = OnePassAdam._fill
    for name, factor in (("divisor", 1 / 3.7), ("root", 1 + 1e-6), ("weight2", 1 + 1e-6), ("eps", 0.0), ("decay", 0.0)):

        def planted(self: OnePassAdam, c: Any, *rest: Any, name: str = name, factor: float = factor) -> None:
            fill(self, c, *rest)
            setattr(c, name, getattr(c, name) * factor)

        monkeypatch.setattr(OnePassAdam, "_fill", planted)
        found = train(OnePassAdam(), shard([64], BF16))[0]
        assert not torch.equal(found, right), name


def test_half_precision_is_divided_in_single() -> None:
    """Clipping and the loss scale are not rounded to the gradients' dtype."""
    collected = Collected([torch.tensor([1.0, 3.0], dtype=BF16), torch.tensor([1.0])], torch.tensor(3.0))
    narrow, other = collected.settle()
    assert narrow.dtype == other.dtype == FP32
    assert torch.equal(narrow, torch.tensor([1.0, 3.0]) / 3.0)


def test_the_choice_of_kernels() -> None:
    assert isinstance(cpu_adam("torch", (0.9, 0.999), 1e-8, True), Adam)
    assert isinstance(cpu_adam("native", (0.9, 0.999), 1e-8, True), OnePassAdam)
    wrong: Any = "numpy"
    with pytest.raises(ConfigError, match="'numpy' does not exist; there are native, torch, deepspeed"):
        cpu_adam(wrong, (0.9, 0.999), 1e-8, True)


def test_deepspeed_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", None)
    kernel: Kernel = "deepspeed"
    with pytest.raises(ConfigError, match=r'pip install "distloop\[deepspeed\]"'):
        cpu_adam(kernel, (0.9, 0.999), 1e-8, True)


def huge_bytes(address: int) -> int:
    """Return how much of the mapping around ``address`` is on huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no mapping there")


def test_large_states_are_on_huge_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system has no huge pages")
    values = [torch.zeros(2**20, 3).t(), torch.zeros(5)]
    first, second = Group([0, 1], values, 0.0).buffers("exp_avg")
    assert first.stride() == values[0].stride()
    assert second.shape == (5,)
    first.add_(1.0)
    assert float(second.sum()) == 0.0
    assert first.data_ptr() % host_memory.HUGE == 0
    assert huge_bytes(first.data_ptr()) >= first.nbytes // 2


def test_host_memory_is_zero_and_goes_with_its_tensor() -> None:
    for numel in (0, 1, 2**20 + 1):
        tensor = host_memory.allocate(numel, BF16)
        assert (tensor.numel(), tensor.dtype) == (numel, BF16)
        assert not tensor.count_nonzero()
    address = tensor[5:].data_ptr()
    kept = tensor[5:]
    del tensor
    kept.fill_(2.0)  # a view holds it
    assert huge_bytes(address) >= 0
    del kept
    with pytest.raises(AssertionError, match="no mapping"):
        huge_bytes(address)
