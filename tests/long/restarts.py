"""torchrun restarts its ranks over and over, because one is killed in each attempt; the last attempt trains to the end.

python -m tests.long.restarts --count 100
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 60  # an attempt, at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    count = parser.parse_args().count
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(count)]
    quiet = ("--log.tensorboard", "false", "--log.picture", "false", "--log.name", "run", "--train.epochs", "3")
    task = ["-m", "distloop", "train", "tests.faulty_tasks:Faulty", "--data.global_batch_size", "30", *quiet]
    variables = {"FAULT": "kill", "FAULT_RANK": "1", "FAULT_ATTEMPTS": str(count), "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [sys.executable, "-m", *launcher, *task],
            cwd=folder,
            env=os.environ | variables | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS * (count + 1),
            check=False,
        )
        results = [json.loads(path.read_text()) for path in Path(folder).glob("runs/*/result.json")]
    figures = {
        "restarts": count,
        "exit_code": ended.returncode,
        "kills_named": len(re.findall(r"rank 1 was killed by signal 9", ended.stdout)),
        "runs_finished": len(results),
        "steps": [result["steps"] for result in results],
        "seconds_per_attempt": round((time.monotonic() - begun) / (count + 1), 2),
    }
    print(json.dumps(figures))
    if figures | {"seconds_per_attempt": 0} != {
        "restarts": count,
        "exit_code": 0,
        "kills_named": count,
        "runs_finished": 1,
        "steps": [12],
        "seconds_per_attempt": 0,
    }:
        print(ended.stdout[-4000:], file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
