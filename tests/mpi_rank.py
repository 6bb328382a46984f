"""One rank of tests.ranks.under_mpirun."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch

from distloop.transports.mpi import connect
from distloop.world import World


def main(task: Path) -> None:
    torch.set_num_threads(1)
    function, arguments = pickle.loads(task.read_bytes())
    transport = connect(World.from_environment(), timeout=30)
    value = function(transport, *arguments)
    transport.close()
    Path(f"{task}.{transport.rank}").write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
