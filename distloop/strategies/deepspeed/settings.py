"""DeepSpeed's configuration, made from ours; what a user passes through is checked against DeepSpeed's own schema."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from distloop.errors import ConfigError, nearest
from distloop.strategies.base import Options, Recipe
from distloop.strategies.deepspeed import guest

WHERE = "strategy.deepspeed"
OURS = "distloop, which weighs and sums gradients itself"
# What distloop writes because a value of its own says it, or because gradients would not be exact otherwise.
SET_BY = {
    "train_batch_size": "data.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.micro_batch_size",
    "managed_gradient_accumulation": OURS,
    "gradient_clipping": "gradients.clip_norm",
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
    "fp16": "precision.name and precision.weights",
    "bf16.enabled": "precision.name and precision.weights",
    "bfloat16": "precision.name and precision.weights",
    "torch_autocast": "precision.name",
    "data_types.grad_accum_dtype": OURS,
    "data_types.param_dtype": "precision.weights",
    "gradient_allreduce_op": OURS,
    "prescale_gradients": OURS,
    "gradient_predivide_factor": OURS,
    "disable_allgather": OURS,
    "zero_allow_untested_optimizer": "the section optimizer",
    "zero_force_ds_cpu_optimizer": "strategy.cpu_adam",
    "zero_optimization.stage": "strategy.stage",
    "zero_optimization.reduce_bucket_size": "strategy.bucket_mb",
    "zero_optimization.allgather_bucket_size": "strategy.bucket_mb",
    "zero_optimization.offload_optimizer.device": "strategy.offload",
    "zero_optimization.offload_param.device": "strategy.offload",
    "zero_optimization.cpu_offload": "strategy.offload",
    "zero_optimization.cpu_offload_param": "strategy.offload",
    "zero_optimization.compute_grad_norm": OURS,
    "zero_optimization.ignore_unused_parameters": "strategy.unused_parameters",
}
# What distloop's loop has no place for: engines that own it, and models that are cut in other ways than data.
FOREIGN = {
    "autotuning": "it starts training runs of its own",
    "hybrid_engine": "it is another engine",
    "pipeline": "it cuts models, and distloop's ranks each have all of one",
    "tensor_parallel": "it cuts models, and distloop's ranks each have all of one",
    "expert_parallel": "it cuts models, and distloop's ranks each have all of one",
    "sequence_parallel_size": "it cuts samples, and distloop deals whole ones",
    "data_parallel_size": "it is the number of ranks",
    "data_efficiency": "distloop deals the samples itself, each once per epoch",
    "compile": "it compiles the model's forward pass, which distloop leaves to the task",
    "zero_optimization.zenflow": "it applies gradients later than at their own step",
}


def configuration(options: Options, recipe: Recipe, device: torch.device, bucket: int) -> dict[str, Any]:
    """Return what DeepSpeed is given: every default that matters written out, then what the user passes through.

    ``bucket`` is the largest number of elements that it sends at once. It must not be odd.
    """
    half = options.weights
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only for its own statistics, which nobody reads
        "gradient_accumulation_steps": 1,  # weights are ours; the last micro-batch is told by the boundary
        "managed_gradient_accumulation": True,
        "gradient_clipping": recipe.clip_norm or 0.0,  # it clips at 1.0 unless it is told otherwise
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # Static: the scale's dynamics are those of precision.loss_scale, and DeepSpeed is told each new value.
        "fp16": {"enabled": half == torch.float16, "auto_cast": False, "loss_scale": recipe.loss_scale or 1.0},
        "bf16": {"enabled": half == torch.bfloat16, "check_grad_overflow": True, "immediate_grad_update": False},
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(options, device, bucket),
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }
    return merged(own, options.deepspeed)


def _zero(options: Options, device: torch.device, bucket: int) -> dict[str, Any]:
    pinned = device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": options.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": False,
        "round_robin_gradients": False,
        "compute_grad_norm": True,
        "ignore_unused_parameters": True,
    }
    if options.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if options.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    if options.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": min(bucket, 100_000)}
    return zero


def merged(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``own`` with what is ``given`` in its place, section by section."""
    result = dict(own)
    for key, value in given.items():
        mine = result.get(key)
        result[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return result


def check_options(options: Options) -> None:
    """Refuse what DeepSpeed cannot do or does not know, before the ranks meet.

    Raises:
        ConfigError: DeepSpeed is not installed, or options contradict each other, or a key is not its.
    """
    if options.offload == "parameters" and options.stage != 3:
        raise ConfigError(
            f"strategy.offload: parameters can be offloaded under stage 3 alone, where ranks hold parts of them, and "
            f"strategy.stage is {options.stage}"
        )
    if options.stage == 3 and options.unused_parameters == "zeros":
        raise ConfigError(
            "strategy.unused_parameters: under stage 3 of deepspeed every rank's loss must reach every parameter; use "
            "stage 1 or 2, or freeze those that it never reaches"
        )
    guest.find()
    for path, reason in (*SET_BY.items(), *FOREIGN.items()):
        if _given(options.deepspeed, path):
            why = f"is set by {reason}" if path in SET_BY else f"is not for here: {reason}"
            raise ConfigError(f"{WHERE}: {path} {why}")
    if options.deepspeed:
        recipe = Recipe(torch.nn.Module(), "adamw", {}, {})
        check_keys(configuration(options, recipe, torch.device("cpu"), 2), options.deepspeed)


def check_keys(whole: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed's own reading of a configuration leaves unread, or what its schemas refuse.

    Its top level and some sections have no schema and accept any key without a word: what it asks for there is seen by
    letting it read. Other sections are pydantic models.
    """
    from pydantic import ValidationError

    config = guest.load(None).runtime.config
    read = _Watched(copy.deepcopy(dict(whole)))
    try:
        with guest.silence():
            config.DeepSpeedConfig(read)
    except ValidationError as failure:
        raise ConfigError(f"{WHERE}: {_sentence(failure, given)}") from None
    except (config.DeepSpeedConfigError, AssertionError, TypeError, ValueError, KeyError) as failure:
        raise ConfigError(f"{WHERE}: DeepSpeed refuses it: {' '.join(str(failure).split())}") from None
    for path, asked in read.unread():
        if _given(given, path):
            key = path.rpartition(".")[2]
            raise ConfigError(f"{WHERE}: DeepSpeed has no key {path!r}{nearest(key, asked)}")


class _Watched(dict[str, Any]):
    """A mapping that remembers which of its keys it was asked for."""

    def __init__(self, values: Mapping[str, Any], seen: set[str] | None = None):
        super().__init__({k: _Watched(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.seen: set[str] = set() if seen is None else seen

    def __copy__(self) -> _Watched:
        copied = _Watched({}, self.seen)
        for key, value in self.items():
            copied[key] = value
        return copied

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # written out so that f(**mapping) asks for every key, and not for the dict below

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def unread(self, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
        """Yield each key that nobody asked for, and those that were asked for beside it."""
        for key, value in self.items():
            if key not in self.seen:
                yield f"{prefix}{key}", sorted(self.seen)
            elif isinstance(value, _Watched) and value.seen:  # else a schema took it as a whole
                yield from value.unread(f"{prefix}{key}.")


def _given(given: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(given, Mapping) or part not in given:
            return False
        given = given[part]
    return True


def _sentence(failure: Any, given: Mapping[str, Any]) -> str:
    """Return the first thing that a schema of DeepSpeed's found wrong, with the place where the user wrote it."""
    error = failure.errors()[0]
    inner = [str(part) for part in error["loc"]]
    section = next((key for key, value in given.items() if _given(value, ".".join(inner))), None)
    path = ".".join([*([section] if section else []), *inner])
    if error["type"] != "extra_forbidden":
        return f"{path}: {error['input']!r} is wrong: {error['msg'][:1].lower()}{error['msg'][1:]}"
    return f"DeepSpeed has no key {path!r}{nearest(inner[-1], _fields(failure.title, inner[:-1]))}"


def _fields(title: str, path: list[str]) -> list[str]:
    """Return the keys of the schema called ``title``, or of the one that lies at ``path`` in it."""
    from pydantic import BaseModel

    base: Any = guest.load(None).runtime.config_utils.DeepSpeedConfigModel
    model: Any = next((kind for kind in _descendants(base) if kind.__name__ == title), None)
    for part in path:
        field = (
            None if model is None else next((f for n, f in model.model_fields.items() if part in (n, f.alias)), None)
        )
        kinds = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return [] if model is None else [field.alias or name for name, field in model.model_fields.items()]


def _descendants(kind: type[Any]) -> Iterator[type[Any]]:
    children: list[type[Any]] = kind.__subclasses__()
    for child in children:
        yield child
        yield from _descendants(child)
