"""The configuration's schema, in one place: every key, its type, its range, its default and its meaning."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# Counts that a float holds too, magnitudes that fp32 holds, waits that the system's calls take: 24 days and a half.
MOST, LARGEST, LONGEST_WAIT = 2**53, 3.4e38, 2e6
Positive = Annotated[int, Field(ge=1, le=MOST)]
NotNegative = Annotated[int, Field(ge=0, le=MOST)]
Processes = Annotated[int, Field(ge=0, le=1024)]
Threads = Annotated[int, Field(ge=1, le=1024)]
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Wait = Annotated[float, Field(gt=0, le=LONGEST_WAIT, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

Name = Annotated[str, Field(min_length=1, max_length=500)]


def _below(name: str) -> str:
    """Return the name of a folder that is made in another, or refuse one that would lie elsewhere."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or any(len(p.encode()) > 200 for p in path.parts):
        raise ValueError("Should name a folder below log.directory, of at most 200 bytes")
    return name


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TaskSection(BaseModel):
    """What is learned. Keys beside ``name`` are the arguments of the task's constructor."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    name: Name = Field("digits", description="a supplied task (see docs/kinds.md) or my_package.my_module:MyTask")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataSection(Section):
    global_batch_size: Positive = Field(64, description="samples per step over all ranks; the primary number")
    micro_batch_size: Positive | None = Field(
        None, description="most samples a rank runs at once; accumulation follows"
    )
    shuffle: bool = Field(True, description="a new order each epoch, from train.seed")
    workers: Processes = Field(0, description="loader processes per rank (0: the rank reads itself)")
    prefetch: Positive = Field(2, description="batches that each loader process reads ahead")
    pin_memory: bool = Field(True, description="page-locked memory on the way to a GPU")
    worker_timeout: Wait = Field(120.0, description="seconds after which a silent loader process is an error")


class OptimizerSection(Section):
    name: Name = Field("adamw", description="sgd, rmsprop, adam, adamw, or package.module:Class")
    lr: PositiveFloat = Field(1e-3, description="base learning rate")
    momentum: BelowOne = Field(0.0, description="sgd, rmsprop")
    nesterov: bool = Field(False, description="sgd")
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)] = Field([0.9, 0.999], description="adam, adamw")
    eps: PositiveFloat = Field(1e-8, description="rmsprop, adam, adamw")
    alpha: BelowOne = Field(0.99, description="rmsprop: smoothing of the squared gradient")
    weight_decay: NotNegativeFloat = Field(0.0, description="decoupled for adamw, else added to the gradient")
    decay_biases_and_norms: bool = Field(False, description="decay parameters of fewer than two dimensions too")
    lr_scaling: Literal["none", "linear", "sqrt"] = Field("none", description="with global over reference batch size")
    reference_batch_size: Positive = Field(256, description="the batch size that lr is meant for")
    options: dict[str, Any] = Field({}, description="further arguments of a package.module:Class")


class ScheduleSection(Section):
    name: Literal["constant", "step", "linear", "cosine", "one_cycle", "plateau"] = Field(
        "constant", description="shape"
    )
    steps: Positive | None = Field(None, description="updates until its end (default: those of the run)")
    warmup_steps: NotNegative = Field(0, description="updates of linear warm-up")
    warmup_start: Fraction | None = Field(None, description="factor it starts at (default 0; 1/scale with lr_scaling)")
    final: Fraction = Field(0.0, description="linear, cosine: factor at the end")
    every: Positive = Field(1000, description="step: updates between two reductions")
    gamma: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        0.1, description="step, plateau: factor of a reduction"
    )
    peak: Annotated[float, Field(gt=0, lt=1)] = Field(0.3, description="one_cycle: part of the updates that rise")
    start_div: PositiveFloat = Field(25.0, description="one_cycle: top over start")
    final_div: PositiveFloat = Field(1e4, description="one_cycle: start over end")
    patience: NotNegative = Field(10, description="plateau: evaluations without improvement that are borne")
    threshold: NotNegativeFloat = Field(1e-4, description="plateau: relative improvement that counts")


class GradientsSection(Section):
    clip_norm: PositiveFloat | None = Field(None, description="largest global L2 norm")
    clip_value: PositiveFloat | None = Field(None, description="largest magnitude of an element")


class PrecisionSection(Section):
    name: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of forward and loss (autocast)")
    loss_scale: PositiveFloat = Field(65536.0, description="fp16: where the loss scale starts")
    growth_interval: Positive = Field(2000, description="fp16: good updates after which it doubles")
    weights: Literal["fp32", "half"] = Field(
        "fp32",
        description="half: the model itself in precision.name while it trains, with fp32 copies at the optimizer; "
        "zero_offload, deepspeed",
    )


class StrategySection(Section):
    name: Name = Field(
        "ddp", description="how gradients are collected: ddp, naive, ring, direct, auto, tree, zero_offload, deepspeed"
    )
    bucket_mb: PositiveFloat | None = Field(
        None, description="largest bucket, MiB (default 2 on CPU, 25 on GPU; auto chooses)"
    )
    unused_parameters: Literal["refuse", "zeros"] = Field("refuse", description="those that the loss does not reach")
    wire_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="direct, auto, zero_offload: of gradients between ranks"
    )
    calibration: Literal["cached", "fresh"] = Field(
        "cached", description="auto: whether measurements of the last day on the same hosts will do"
    )
    accumulate: Literal["device", "shard"] = Field(
        "device",
        description="zero_offload: where gradients of several micro-batches are added up (shard: by their owners; less "
        "memory, and all of them travel)",
    )
    device_fraction: Fraction = Field(
        0.0, description="zero_offload: part of the optimizer that stays on the device, with 12 bytes a parameter"
    )
    delayed_update: bool = Field(
        False,
        description="zero_offload: leave the last update out of the next gradient, so that it need not be waited for",
    )
    stage: Literal[1, 2, 3] = Field(
        2, description="deepspeed: what ranks have a part of (1 optimizer state, 2 and gradients, 3 and parameters)"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="deepspeed: what is kept and updated on the CPU (parameters: stage 3; optimizer too)"
    )
    cpu_adam: Literal["native", "torch", "deepspeed"] = Field(
        "native", description="kernel of Adam on the CPU (deepspeed has no native one and takes torch's)"
    )
    deepspeed: dict[str, Any] = Field({}, description="further keys of DeepSpeed's own configuration")


class TrainSection(Section):
    epochs: Positive | None = Field(
        None, description="passes over the data (default 10, if max_steps is not given either)"
    )
    max_steps: Positive | None = Field(None, description="stop after this many global batches")
    max_seconds: PositiveFloat | None = Field(None, description="stop after this much time")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of data order, dropout, and the initial weights of tasks that are made by name"
    )
    deterministic: bool = Field(
        False, description="the same bits on any number of ranks up to train.leaves (strategy tree; one thread a rank)"
    )
    leaves: Annotated[int, Field(ge=1, le=2**20)] = Field(
        8,
        description="deterministic: parts of a global batch whose gradients are added along one fixed tree; at least "
        "as many as ranks will ever take part",
    )


class EvaluateSection(Section):
    every_epochs: Positive | None = Field(1, description="evaluate after this many epochs")
    every_steps: Positive | None = Field(None, description="evaluate after this many steps instead")
    batch_size: Positive = Field(512, description="most samples a rank evaluates at once")


class MonitorSection(Section):
    metric: Name | None = Field(None, description="which metric tells what is better (default: the first evaluated)")
    mode: Literal["min", "max"] | None = Field(
        None, description="default: min for losses and errors by name, else max; shown at start"
    )
    patience: NotNegative | None = Field(
        None, description="stop early after more evaluations than this without a better"
    )
    min_delta: NotNegativeFloat = Field(0.0, description="least change that counts as better")
    target: Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)] | None = Field(
        None, description="stop as soon as the metric is this good"
    )
    keep_best: bool = Field(True, description="keep the best model and load it at the end")
    replicas_every: NotNegative | None = Field(
        None,
        description="compare what ranks have copies of after this many steps (default: at 1 % of the time; 0: never)",
    )
    explosion: PositiveFloat | None = Field(1000.0, description="stop if the loss exceeds this many times the first")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="at a NaN or an infinity: stop the run, or skip updates whose gradient has one"
    )
    most_skipped: Positive = Field(20, description="skip: updates in a row that may be skipped")


class CheckpointSection(Section):
    enabled: bool = Field(True, description="save checkpoints, and the last one when the run is stopped or ends")
    every_steps: Positive | None = Field(None, description="save after this many steps")
    every_epochs: Positive | None = Field(None, description="save after this many epochs")
    every_seconds: PositiveFloat | None = Field(300.0, description="save after this much time")
    keep_last: Positive = Field(3, description="how many stay, the newest")
    keep_every: Positive | None = Field(None, description="those of every so many steps stay too")
    background: bool = Field(True, description="write beside the training")
    grace: Wait = Field(
        30.0, description="seconds between a signal and the kill that follows; a save that takes longer is warned of"
    )
    resume: Annotated[str, Field(min_length=1, max_length=4000)] | None = Field(
        None, description="auto: go on in the run directory log.name if it is there; or the path of a run or checkpoint"
    )


class LogSection(Section):
    every: Positive = Field(50, description="steps between two log lines")
    directory: Annotated[str, Field(min_length=1, max_length=4000)] = Field(
        "runs", description="where run directories are made"
    )
    name: Annotated[Name, AfterValidator(_below)] | None = Field(
        None, description="of the run directory (default: task, date and time)"
    )
    progress: bool | None = Field(None, description="progress bar (default: if the output is a terminal)")
    tensorboard: bool | None = Field(None, description="default: if tensorboardX is installed")
    picture: bool | None = Field(None, description="learning curves at the end (default: if matplotlib is installed)")
    observers: list[Name] = Field([], description="package.module:callable, called on rank 0 with every record")


class LearnerSection(Section):
    """What one of several learners does otherwise; keys are those of the sections of the same names."""

    optimizer: dict[str, Any] = Field({}, description="keys of optimizer")
    schedule: dict[str, Any] = Field({}, description="keys of schedule")
    gradients: dict[str, Any] = Field({}, description="keys of gradients")


class WorldSection(Section):
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where models run (auto: a GPU if there is one)")
    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="of torch.distributed (auto: nccl on GPUs)")
    transport: Literal["auto", "torch", "sockets", "shared_memory", "mpi"] = Field(
        "auto",
        description="of gradients (auto: MPI under mpirun, else shared memory or sockets; ddp, deepspeed: by torch)",
    )
    shared_memory: bool = Field(True, description="whether ranks of one host may share memory")
    timeout: Wait = Field(300.0, description="seconds after which a missing rank is an error")
    heartbeat: Annotated[float, Field(ge=0, le=LONGEST_WAIT, allow_inf_nan=False)] | None = Field(
        None,
        description="seconds without a sign of life after which a rank is frozen (default 10, with GPUs 60; 0: never)",
    )
    threads: Threads | None = Field(None, description="torch threads per rank (default: this rank's part of the cores)")
    bind: Literal["none", "auto", "cores"] = Field(
        "none",
        description="keep each rank of a host to cores of its own (cores), or where each has two or more and the "
        "launcher has not done so (auto); see decision 0016",
    )


class Config(Section):
    """All of it."""

    task: TaskSection = TaskSection()
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    gradients: GradientsSection = GradientsSection()
    learners: dict[str, LearnerSection] = Field({}, description="by learner, what it does otherwise than the others")
    precision: PrecisionSection = PrecisionSection()
    strategy: StrategySection = StrategySection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    monitor: MonitorSection = MonitorSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    world: WorldSection = WorldSection()
