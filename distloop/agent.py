"""``python -m distloop.agent``: torchrun, that passes signals on, waits for its ranks, and ends with their exit code.

torchrun itself ends with 1 whenever a rank ended otherwise than with 0, so a job script cannot tell a run that stopped
for a requeue (75) from a mistake (2). SIGUSR1, with which Slurm warns, kills it and leaves its ranks alone. When it is
ended (SIGTERM) its ranks have 30 s, and get a second signal, which ends them at once, from a scheduler that signals all
processes of a job. This is torchrun, with its arguments, in this process; otherwise is that

* the ranks' codes are read off their processes. The exception by which torch tells of failed ranks does not come when
  the agent loses the others' store before its ranks have ended, and a file by each rank not from one that is killed.
* SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 go to each rank, once, as soon as it can bear them, and nothing is ended:
  who sends them says how long to wait. The second of the first three kills the ranks. To the ranks each of them is a
  question, however often it comes: ``AGENT`` in their environment says who else counts.
* an agent that has lost the others' store ends its ranks, after the time in which they end by themselves: one that
  stands still would be left behind.
* ranks that stopped or found what another attempt will find as well are not started again by ``--max-restarts``.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

from distloop.agent_codes import FINAL, telling
from distloop.agent_signals import Passing
from distloop.ending import leave
from distloop.errors import INTERRUPTED, RankDiedError
from distloop.signals import AGENT


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Be torchrun with these arguments."""
    os.environ[AGENT] = str(os.getpid())
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)  # the ranks say what was wrong
    passing = Passing()
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments), passing)
    except KeyboardInterrupt:
        code = INTERRUPTED
    leave(code)


def _run(arguments: list[str], passing: Passing) -> int:
    torchrun = _import_quietly()
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.launcher import api

    parsed = torchrun.parse_args(arguments)
    parsed.signals_to_handle = "SIGQUIT"  # the others are ours
    agent = _agent(passing)
    api.LocalElasticAgent = agent  # type: ignore[attr-defined]  # which is what makes one
    failure: BaseException | None = None
    try:
        torchrun.run(parsed)
    except SignalException as ended:
        return 128 + ended.sigval
    except Exception as raised:
        failure = raised
    code = telling(process.poll() or 0 for process in passing.processes)
    if passing.cut_off:
        sentence = "the agents' store has ended, or cannot be reached: ended the ranks of this host"
        print(f"distloop: {sentence}", file=sys.stderr, flush=True)
        return RankDiedError.exit_code
    if failure is not None and code == 0:
        return passing.code or _say(failure, parsed)
    if not passing.told:
        _say_killed(passing.processes, code)
    return code


def _import_quietly() -> ModuleType:
    """Return torch's launcher, whose C++ part says nothing: what cannot be reached is said in a sentence."""
    ranks = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = ranks or "FATAL"
    from torch.distributed import run

    if ranks is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # it was read
    return run


def _agent(passing: Passing) -> type[Any]:
    """Return torch's agent, that tells ``passing`` of its ranks; made here, as importing torch takes seconds."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        def _rendezvous(self, worker_group: Any) -> None:
            super()._rendezvous(worker_group)
            passing.watch(worker_group.store if worker_group.group_world_size > 1 else None)

        def _start_workers(self, worker_group: Any) -> dict[int, Any]:
            passing.processes = []
            pids: dict[int, Any] = super()._start_workers(worker_group)
            handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
            passing.processes = [handler.proc for handler in handlers.values()]
            return pids

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.is_failed() and (passing.code or _codes(result) & FINAL):
                self._remaining_restarts = 0
            return result

    return Agent


def _codes(result: Any) -> set[int]:
    return {failure.exitcode for failure in result.failures.values()}


def _say(failure: BaseException, parsed: Any) -> int:
    """Say in a sentence why no rank was started; return the exit code for it."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    text = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    if isinstance(failure, AssertionError | ValueError):  # of the arguments
        print(f"distloop: command line: {text}", file=sys.stderr, flush=True)
        return 2
    where = parsed.rdzv_endpoint or f"{parsed.master_addr}:{parsed.master_port}"
    sentence = f"the agents of {parsed.nnodes} hosts did not find or lost each other at {where}: {text}"
    print(f"distloop: {sentence}", file=sys.stderr, flush=True)
    return 3


def _say_killed(processes: Sequence[subprocess.Popen[bytes]], code: int) -> None:
    """Say what killed a rank, where no other rank has said so."""
    for rank, process in enumerate(processes):
        if process.returncode is not None and code == 128 - process.returncode > 128:
            with suppress(ValueError):
                name = signal.Signals(code - 128).name
                sentence = f"local rank {rank} (process {process.pid}) was killed by {name}"
                print(f"distloop: {sentence}", file=sys.stderr, flush=True)
            return


if __name__ == "__main__":
    main()
