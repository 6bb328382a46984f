"""The same on a real GPU: tokens per second, and the largest model under a cap of memory. Not run on one so far.

Every side is a process of its own, ``python gpu.py JSON``: the optimizer on the GPU, on the host by zero_offload, on
the host by DeepSpeed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools

import ranks
import torch
from torch import Tensor, nn

SIZES = {"width": 2048, "heads": 16, "layers": 24, "context": 1024}  # 1.3 B parameters
VOCABULARY = 32000
BATCH, STEPS, WARM_UP = 16, 10, 3
CAP = 16  # GiB of the device for the largest model
TRIALS = {"batch": 1, "steps": 2, "width": 2560, "heads": 20, "context": 512}  # 79 M parameters a layer
SIDES = ("resident", "zero_offload", "deepspeed")
NO_MEMORY = 9  # exit code


def missing() -> str | None:
    """Return why this cannot be measured here, if so."""
    return None if torch.cuda.is_available() else "no GPU: tokens/s and the largest model are left out"


def measure(*, quick: bool, deepspeed: bool) -> dict[str, Any]:
    """Return tokens per second and layers of the largest model by side."""
    sides = SIDES if deepspeed else SIDES[:2]
    small = {"layers": 4, "steps": 5} if quick else {}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(1 if quick else 3):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            times[side] += _train(SIZES | {"side": side, "batch": BATCH, "steps": STEPS} | small)["seconds"][WARM_UP:]
    tokens = BATCH * SIZES["context"]
    speed = {side: tokens / statistics.median(own) for side, own in times.items()}
    return {"speed": speed, "largest": {side: largest(side, 2 if quick else CAP) for side in sides}}


def largest(side: str, cap: float) -> dict[str, float]:
    """Return layers and parameters of the largest model that trains in ``cap`` GiB, by doubling and halving."""
    fits, fails = {"layers": 0, "parameters": 0}, 0
    while not fails or fails - fits["layers"] > max(1, fits["layers"] // 20):
        layers = (fits["layers"] + fails) // 2 if fails else max(1, 2 * fits["layers"])
        try:
            told = _train(TRIALS | {"side": side, "layers": layers, "cap": cap})
        except ranks.Failed as failure:
            if f"[{NO_MEMORY}]" not in str(failure):
                raise
            fails = layers
        else:
            fits = {"layers": layers, "parameters": told["parameters"]}
    return fits


def table(found: dict[str, Any]) -> str:
    lines = ["| side | tokens/s | of resident | largest model, B parameters |", "|---|---|---|---|"]
    for side, speed in found["speed"].items():
        share, billions = speed / found["speed"]["resident"], found["largest"][side]["parameters"] / 1e9
        lines.append(f"| {side} | {speed:.0f} | {share:.1%} | {billions:.2f} |")
    for name, share, must, moonshot in asked(found):
        lines.append(f"\n{name}: {share:.2f} (must {must}, moonshot {moonshot})")
    return "\n".join(lines)


def asked(found: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Return what was to be reached: what, how far it is, the must and the moonshot."""
    speed = found["speed"]
    ours, several = speed["zero_offload"], [("tokens/s of resident training", "resident", 0.85, 0.97)]
    several.append(("tokens/s of DeepSpeed's", "deepspeed", 2.0, 3.0))
    return [(name, ours / speed[side], must, moonshot) for name, side, must, moonshot in several if side in speed]


def missed(found: dict[str, Any]) -> list[str]:
    return [f"{share:.2f} of {name}" for name, share, must, _ in asked(found) if share < must]


def _train(wanted: dict[str, Any]) -> dict[str, Any]:
    (told,) = ranks.run([__file__, json.dumps(wanted)], 1, limit=900.0)
    return told


# -- a process -------------------------------------------------------------------------------------------------------

Step = Callable[[Tensor], None]


class Language(nn.Module):
    """A GPT with its loss."""

    def __init__(self, wanted: dict[str, Any]):
        super().__init__()
        from distloop.tasks.gpt import GPT

        sizes = {name: wanted[name] for name in SIZES}
        self.gpt = GPT(vocabulary=VOCABULARY, outputs=VOCABULARY, **sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.gpt(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def resident(model: nn.Module, wanted: dict[str, Any]) -> Step:
    """The optimizer on the GPU, with masters in fp32, as people write it by hand."""
    masters = [p.detach().float() for p in model.parameters()]
    model.bfloat16()
    values = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.01, fused=True)

    def step(tokens: Tensor) -> None:
        model(tokens).backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        for master, value in zip(masters, values, strict=True):
            assert value.grad is not None
            master.grad, value.grad = value.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(values, masters)

    return step


def zero_offload(model: nn.Module, wanted: dict[str, Any]) -> Step:
    from distloop.strategies import Options
    from distloop.strategies.zero_offload import ZeroOffload
    from distloop.transports import Alone
    from offloading.training import learner_of, train

    options = Options(weights=torch.bfloat16)
    strategy = ZeroOffload(dict(model.named_parameters()), Alone(), options)
    learner = learner_of(model, strategy, clip=1.0)
    return lambda tokens: train(learner, tokens)


def deepspeed(model: nn.Module, wanted: dict[str, Any]) -> Step:
    from deepspeed import init_distributed, initialize

    init_distributed("nccl")
    configuration = {
        "train_micro_batch_size_per_gpu": wanted["batch"],
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "bf16": {"enabled": True},
    }
    engine = initialize(model=model, model_parameters=model.parameters(), config=configuration)[0]

    def step(tokens: Tensor) -> None:
        engine.backward(engine(tokens))
        engine.step()

    return step


def main() -> None:
    wanted = json.loads(sys.argv[1])
    device = torch.device("cuda", 0)
    if "cap" in wanted:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, wanted["cap"] * 2**30 / whole), device)
    torch.manual_seed(0)
    # Where the masters are on the host, what comes to the device is in half precision from the beginning.
    torch.set_default_dtype(torch.float32 if wanted["side"] == "resident" else torch.bfloat16)
    stamps = []
    try:
        with device:
            model = Language(wanted)
        step = globals()[wanted["side"]](model, wanted)
        for _ in range(wanted["steps"] + 1):
            tokens = torch.randint(VOCABULARY, (wanted["batch"], wanted["context"] + 1), device=device)
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            step(tokens)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        sys.exit(NO_MEMORY)
    seconds = [b - a for a, b in itertools.pairwise(stamps)]
    ranks.tell({"seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())})


if __name__ == "__main__":
    main()
