"""Adam and AdamW for values on the CPU: in one pass over memory, or with DeepSpeed's kernel."""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from distloop import native
from distloop.errors import ConfigError, WorldError
from distloop.optimizer import Adam, Group, Rule

Kernel = Literal["native", "torch", "deepspeed"]
THREAD = 2**18  # elements that are worth a thread
STREAM = 2**22  # elements from which on the rounded values would only push others out of the caches
_DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # as adam.c counts them
_NONE = 0


def cpu_adam(kernel: Kernel, betas: tuple[float, float], eps: float, decoupled: bool) -> Rule:
    """Return the rule of Adam, or AdamW if ``decoupled``, that computes with ``kernel``.

    Raises:
        ConfigError: there is no such kernel, or DeepSpeed is not installed.
        WorldError: DeepSpeed could not build its kernel.
    """
    if kernel == "native":
        return OnePassAdam(betas, eps, decoupled)
    if kernel == "torch":
        return Adam(betas, eps, decoupled)
    if kernel == "deepspeed":
        return DeepSpeedAdam(betas, eps, decoupled)
    raise ConfigError(f"the CPU optimizer's kernel {kernel!r} does not exist; there are {', '.join(get_args(Kernel))}")


class _Segment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("values", "exp_avg", "exp_avg_sq", "rounded")),
        ("numel", ctypes.c_int64),
    ]


class _Constants(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("divisor", "scale", "decay", "weight1", "beta2", "weight2")),
        *((name, ctypes.c_float) for name in ("root", "eps", "step")),
        ("stream", ctypes.c_int32),
    ]


class _Table:
    """What the kernel is told of a group: where its tensors are, and where this step's gradients."""

    def __init__(self, group: Group):
        exp_avg, exp_avg_sq = group.buffers("exp_avg"), group.buffers("exp_avg_sq")
        self.count = len(group.values)
        self.segments = (_Segment * self.count)()
        for i, values in enumerate(group.values):
            rounded = group.rounded[i].data_ptr() if group.rounded else None
            tensors = (values, exp_avg[i], exp_avg_sq[i])
            self.segments[i] = _Segment(*(t.data_ptr() for t in tensors), rounded, values.numel())
        self.gradients = (ctypes.c_void_p * self.count)()
        self.rounded = _DTYPES[group.rounded[0].dtype] if group.rounded else _NONE
        self.numel = sum(values.numel() for values in group.values)
        self.constants = _Constants(stream=self.numel >= STREAM)


@dataclass(frozen=True, eq=False)
class OnePassAdam(Rule):
    """Adam or AdamW in one pass over memory, for values in single precision on the CPU.

    Pending division, both averages, the new value and its rounding are one kernel (native/adam.c), with the bits of
    torch's fused kernel followed by a cast. Where that kernel cannot be had, and for other values, it is those two.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decoupled: bool = False
    _tables: WeakKeyDictionary[Group, _Table] = field(default_factory=WeakKeyDictionary, repr=False)
    folds = widens = rounds = True

    @cached_property
    def unavailable(self) -> str | None:
        """Why the kernel cannot be had here, as one clause; None: it can."""
        try:
            native.load("adam")
        except native.UnavailableError as failure:
            return str(failure)
        return None

    def describe(self) -> str:
        """Return in words which kernel it uses."""
        name = "AdamW" if self.decoupled else "Adam"
        return f"{name} in one pass" if self.unavailable is None else f"torch's fused {name}: {self.unavailable}"

    def for_group(self, group: Group) -> Rule:
        tensors = [*group.values[:1], *group.rounded[:1]]
        fits = group.values[0].dtype == torch.float32 and all(t.device.type == "cpu" for t in tensors)
        if fits and all(t.dtype in _DTYPES for t in tensors) and self.unavailable is None:
            return self
        return Adam(self.betas, self.eps, self.decoupled)

    def update(self, group: Group, gradients: list[Tensor], lr: float, divisor: Tensor | None) -> None:
        dtypes = {g.dtype for g in gradients}
        if len(dtypes) > 1 or not dtypes <= _DTYPES.keys():
            gradients, dtypes = [g.float() for g in gradients], {torch.float32}
        table = self._tables.get(group)
        if table is None:
            table = self._tables[group] = _Table(group)
        table.gradients[:] = [g.data_ptr() for g in gradients]
        self._fill(table.constants, group.count()[0].item(), group.weight_decay, lr, divisor)
        kernel, following = native.load("adam").dl_adam, ctypes.c_int64(0)
        constants, dtype = ctypes.byref(table.constants), _DTYPES[dtypes.pop()]

        def call() -> None:
            kernel(
                table.segments,
                table.gradients,
                ctypes.c_int64(table.count),
                dtype,
                table.rounded,
                constants,
                ctypes.byref(following),
            )

        in_threads(call, min(torch.get_num_threads(), table.numel // THREAD))

    def _fill(self, c: _Constants, step: float, weight_decay: float, lr: float, divisor: Tensor | None) -> None:
        """Write the step's constants, computed in double precision as torch does."""
        beta1, beta2 = self.betas
        c.divisor = 1.0 if divisor is None else divisor.item()
        c.scale = 1.0 - lr * weight_decay if self.decoupled else 1.0
        c.decay = 0.0 if self.decoupled else weight_decay
        c.weight1, c.beta2, c.weight2, c.eps = 1.0 - beta1, beta2, 1.0 - beta2, self.eps
        c.root = math.sqrt(1.0 - beta2**step)
        c.step = -(lr / (1.0 - beta1**step))


@dataclass(frozen=True, eq=False)
class DeepSpeedAdam(Rule):
    """Adam or AdamW with DeepSpeed's kernel for the CPU; for what that is not written for, torch's.

    Raises:
        ConfigError: DeepSpeed is not installed.
        WorldError: it could not build its kernel, which it compiles when it is first asked for.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decoupled: bool = False
    _instances: WeakKeyDictionary[Group, Any] = field(default_factory=WeakKeyDictionary, repr=False)

    def __post_init__(self) -> None:
        self._instance(0.0)

    def describe(self) -> str:
        """Return in words which kernel it uses."""
        return f"DeepSpeed's {'AdamW' if self.decoupled else 'Adam'}"

    def for_group(self, group: Group) -> Rule:
        fits = group.values[0].dtype == torch.float32 and group.values[0].device.type == "cpu"
        return self if fits else Adam(self.betas, self.eps, self.decoupled)

    def update(self, group: Group, gradients: list[Tensor], lr: float, divisor: Tensor | None) -> None:
        if group not in self._instances:
            self._instances[group] = self._instance(group.weight_decay)
        instance, step = self._instances[group], int(group.count()[0].item())
        state = zip(group.values, gradients, group.buffers("exp_avg"), group.buffers("exp_avg_sq"), strict=True)
        for tensors in state:
            constants = (instance.opt_id, step, lr, *self.betas, self.eps, group.weight_decay, True)
            instance.ds_opt_adam.adam_update(*constants, *(_flat(t) for t in tensors))

    def _instance(self, weight_decay: float) -> Any:
        try:
            kind = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
        except ImportError:
            raise ConfigError(
                'the optimizer\'s kernel: deepspeed is missing: pip install "distloop[deepspeed]"'
            ) from None
        nothing = [torch.nn.Parameter(torch.empty(0))]
        try:
            return kind(
                nothing, 1.0, betas=self.betas, eps=self.eps, weight_decay=weight_decay, adamw_mode=self.decoupled
            )
        except (RuntimeError, OSError) as failure:
            reason = str(failure.__cause__ or failure).strip().partition("\n")[0]
            raise WorldError(f"DeepSpeed could not build its kernel for Adam on the CPU ({reason})") from failure


def _flat(tensor: Tensor) -> Tensor:
    """Return a dense tensor's elements in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def in_threads(call: Callable[[], None], threads: int) -> None:
    """Run ``call`` in this thread and at the same time in as many others as make ``threads`` together."""
    others = [_pool(threads - 1).submit(call) for _ in range(threads - 1)]
    call()
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="cpu-adam")
