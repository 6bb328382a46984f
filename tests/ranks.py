"""Ranks for tests: threads of this process, or gloo processes forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

from distloop.transports import Alone, ThreadCluster, Transport

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.warm"])


def in_threads(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(transport, *arguments)`` on every rank of a cluster of threads; return the results by rank."""
    if size == 1:
        return [function(Alone(), *arguments)]
    return ThreadCluster(size, timeout=20).run(lambda transport: function(transport, *arguments))


def in_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(transport, *arguments)`` on every rank of a gloo group; return the results by rank."""
    results = _CONTEXT.Queue()
    port = free_port()
    ranks = [
        _CONTEXT.Process(target=_rank, args=(rank, size, port, results, function, arguments)) for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        found: dict[int, Any] = {}
        for _ in ranks:
            rank, value, failure = pickle.loads(results.get(timeout=90))
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            found[rank] = value
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return [found[rank] for rank in range(size)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    rank: int, size: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch

    from distloop.transports.process_group import connect
    from distloop.world import World

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    transport: Transport = Alone()
    try:
        if size > 1:
            world = World(rank, size, rank, size, "test")
            transport = connect(world, backend="gloo", device=torch.device("cpu"), timeout=30)
        value = function(transport, *arguments)
        transport.close()
        results.put(pickle.dumps((rank, value, None)))  # torch's own way would leave tensors in shared memory
    except BaseException:
        results.put(pickle.dumps((rank, None, traceback.format_exc())))
        results.close()
        results.join_thread()
        os._exit(1)
