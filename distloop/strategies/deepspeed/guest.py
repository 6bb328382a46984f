"""DeepSpeed in this process: imported late and quietly, attached to the ranks that distloop has brought together."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from distloop.errors import ConfigError, WorldError
from distloop.transports import Transport

INSTALL = 'pip install "distloop[deepspeed]"'


def find() -> None:
    """Raise unless DeepSpeed is installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"strategy.name: deepspeed is not installed here: {INSTALL}")


def load(device: torch.device | None, half: torch.dtype | None = None) -> Any:
    """Return the module ``deepspeed`` for models on ``device`` (None: nothing will be computed), with weights ``half``.

    Raises:
        ConfigError: it is not installed, or breaks.
        WorldError: it was imported before, for another kind of device.
    """
    find()
    first = "deepspeed" not in sys.modules
    if device is not None:
        # Asked of the environment at its first import; otherwise it takes whatever device it finds.
        os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        with silence():
            import deepspeed
            import deepspeed.ops.adam
            import deepspeed.ops.op_builder
            import deepspeed.runtime.config_utils
    except (ImportError, RuntimeError, OSError) as failure:
        raise ConfigError(
            f"strategy.name: deepspeed is installed but cannot be imported ({failure}): {INSTALL}"
        ) from failure
    _hush(deepspeed, redirect=first)
    if device is not None and (found := deepspeed.get_accelerator().device_name()) != device.type:
        raise WorldError(
            f"strategy.name: deepspeed works on {found} in this process and models are on {device.type}: set "
            f"DS_ACCELERATOR={device.type} in the environment, and import deepspeed no earlier than distloop does"
        )
    if half is torch.float16 and device is not None and device.type == "cpu":
        # It asks for instructions that few processors have; torch computes without them, if slowly.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep off the screen what DeepSpeed prints of its progress; what it warns of, its logger says."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _hush(deepspeed: Any, *, redirect: bool) -> None:
    """Send DeepSpeed's warnings where warnings go, if it was imported while the screen was covered."""
    for handler in deepspeed.utils.logger.handlers:
        if redirect:
            handler.setStream(sys.stderr)
        handler.addFilter(_needs_saying)
    # It calls what torch will rename; nobody who trains can do anything about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def _needs_saying(record: logging.LogRecord) -> bool:
    return "untested ZeRO Optimizer" not in (text := record.getMessage()) and "untested optimizer" not in text


class Company:
    """The process group that DeepSpeed's engines of this process use; as long as one of them lives."""

    def __init__(self) -> None:
        self._engines = 0
        self._own = False
        self._before: dict[str, str | None] = {}  # variables of the environment as they were

    def join(self, deepspeed: Any, transport: Transport, device: torch.device) -> None:
        """Let DeepSpeed find the ranks of ``transport``; a rank alone gets a group of one."""
        if transport.size == 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or gloo listens on whatever the host name resolves to
            store = dist.HashStore()  # type: ignore[attr-defined]  # not among what torch says it exports
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            self._own = True
        group = dist.group.WORLD if transport.size == 1 else transport.process_group()
        # Its operation for CPU ranks of one host is compiled on the spot for half a minute; training does not use it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with silence():
            deepspeed.comm.init_distributed(dist_backend=dist.get_backend(group), auto_mpi_discovery=False)
        # It would make a group of its own, whose timeout is not ours.
        deepspeed.utils.groups._WORLD_GROUP = group
        if not self._engines:
            self._say_which(device)
        self._engines += 1

    def leave(self, deepspeed: Any) -> None:
        """Take note that an engine is no more."""
        self._engines -= 1
        if self._engines > 0:
            return
        deepspeed.utils.groups._WORLD_GROUP = None
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before = {}
        if self._own:
            dist.destroy_process_group()
            self._own = False

    def _say_which(self, device: torch.device) -> None:
        """Tell DeepSpeed, which now and then asks the environment for its device, which one distloop chose."""
        names = {"LOCAL_RANK"} | ({"OMPI_COMM_WORLD_LOCAL_RANK"} & set(os.environ))
        said = next((os.environ[name] for name in sorted(names) if name in os.environ), "0")
        number = said if device.index is None else str(device.index)
        self._before = {name: os.environ.get(name) for name in names}
        os.environ |= dict.fromkeys(names, number)


company = Company()  # a process has one default process group
