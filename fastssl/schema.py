"""Every key a recipe may have, with its default and its meaning. Frozen: a resolved recipe never changes during a run.

The text after each field (in the ``metadata`` of :func:`key`) is what ``fastssl config show --help-keys`` prints.
All batch sizes are GLOBAL (summed over ranks). All lengths are optimiser updates unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def key(default: Any, help: str, choices: tuple[Any, ...] | None = None) -> Any:
    """A recipe key with its help text; mutable defaults are copied per instance."""
    meta = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    if isinstance(default, type):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class DataConfig:
    path: str = key("", "converted dataset folder (the one that holds dataset.json)")
    source: str = key(
        "auto",
        "who delivers canvases; auto = the dataset folder's own format (shards for format dali); dali = decoding by NVIDIA DALI",
        ("auto", "arrays", "ffcv", "dali", "shards"),
    )
    split: str = key("", "label split: a name in <path>/splits/ or a path to a split file")
    selection: str = key("", "folder of a selection (fastssl select topk): its rows and labels take the place of a stream; empty = none")
    selection_as: str = key("labeled", "the stream whose rows are the selection's; unlabeled: without their labels", ("labeled", "unlabeled"))
    eval_on: str = key("test", "evaluate on the official test split, or on the validation rows that the label split holds out of train", ("test", "validation"))
    labeled_batch: int = key(64, "labelled images per update")
    unlabeled_batch: int = key(448, "unlabelled images per update; ignored by methods that read none")
    include_labeled: bool = key(True, "the unlabelled stream also contains the labelled rows (FixMatch paper: yes; TLlib: no)")
    labeled_law: str = key("shuffle", "order law of the labelled stream")
    unlabeled_law: str = key("shuffle", "order law of the unlabelled stream")
    ahead: int = key(3, "steps that are read ahead of the trainer")
    pack: str = key(
        "auto", "send images back to back to the device and unpack them there; auto = on CUDA if canvases are over 30 % padding", ("auto", "on", "off")
    )
    workers: int = key(0, "decoding threads per process; 0 = cores divided by processes, at most 8")
    engine: str = key("auto", "who reads .beton files: native, or the ffcv package's compiled pipeline; auto = native", ("auto", "native", "ffcv"))
    scaled_decode: float = key(
        0.0, "above 0: training decodes JPEGs (.beton, shards) at 1/2, 1/4 or 1/8 while both sides stay at least this times the largest view (1 = usual)"
    )
    device_resident: str = key("auto", "arrays: keep the dataset on the device; auto = on CUDA if a quarter of its memory is enough", ("auto", "yes", "no"))
    stall_timeout_s: float = key(120.0, "seconds without data after which the feed gives up with an error")


@dataclass(frozen=True)
class AugmentConfig:
    size: int = key(32, "side of the rendered square views in pixels")
    weak: Any = key("fixmatch_weak", "policy name, or a list of {law: options}, for weak views")
    strong: Any = key("fixmatch_strong", "policy name, or a list of {law: options}, for strong views")
    eval: Any = key("plain", "policy for evaluation")
    extra: dict[str, Any] = key({}, "more policies by name, for methods that ask for them; labeled_weak and the like replace a policy for one stream")
    mean: Any = key("dataset", "'dataset' = the manifest's measured mean, or one number per channel in [0, 1]")
    std: Any = key("dataset", "like mean")
    backend: str = key("auto", "who renders pixels", ("auto", "reference", "triton"))
    geometry: str = key("per_op", "how often pixels are resampled: per_op as published, composed once for crop, mirror and affine ops", ("per_op", "composed"))


@dataclass(frozen=True)
class ModelConfig:
    name: str = key("wrn_28_2", "wrn_28_2, wrn_28_8, a published network (models/named.py), a small CPU network, timm/<name> or torchvision/<name>")
    options: dict[str, Any] = key({}, "keyword arguments of the builder (dropout, width, ...)")
    weights: str = key("", "checkpoint to start from (.safetensors, .pth); empty = from scratch")
    start: str = key("", "checkpoint folder or file whose whole network, classifier included, is the start (model.weights: the backbone alone)")


@dataclass(frozen=True)
class BatchNormConfig:
    groups: Any = key(1, "the global batch is normalised in this many equal row groups; 1 or 'global' = one group over all ranks")
    momentum: float | None = key(None, "running-statistics momentum; null = the model's own")
    eps: float | None = key(None, "epsilon; null = the model's own")


@dataclass(frozen=True)
class TeacherConfig:
    enabled: bool = key(True, "keep an exponential moving average of the student")
    momentum: float = key(0.999, "weight of the old average")
    momentum_law: str = key("constant", "constant; warmup = min(momentum, 1 - 1/k) at update k; cosine = ramp to 1", ("constant", "warmup", "cosine"))
    buffers: str = key(
        "copy", "BatchNorm statistics of the teacher: leave, copy the student's, average (EMAN), copy_matching", ("leave", "copy", "average", "copy_matching")
    )
    buffers_matching: str = key("", "regular expression on buffer names for copy_matching")
    when: str = key("after_step", "when the average moves", ("after_step", "before_forward", "by_method"))
    mode: str = key("eval", "mode in which a method's teacher forward runs", ("train", "eval"))
    shuffle: bool = key(False, "train mode: the teacher's rows meet others in their BatchNorm group than the student's do (ShuffleBN)")
    start: str = key("copy", "copy of the student, or the path of a checkpoint whose teacher stays frozen")


@dataclass(frozen=True)
class OptimConfig:
    name: str = key("sgd", "optimiser", ("sgd", "adamw"))
    lr: float = key(0.03, "base learning rate for the global batch; never rescaled")
    momentum: float = key(0.9, "SGD momentum")
    nesterov: bool = key(True, "Nesterov momentum")
    betas: Any = key([0.9, 0.999], "AdamW betas")
    weight_decay: float = key(5e-4, "L2 penalty (SGD) or decoupled decay (AdamW)")
    no_decay: Any = key(["bias", "norm"], "what is exempt from decay: 'bias', 'norm' (norm-layer weights), or regular expressions on parameter names")
    lr_factors: dict[str, float] = key({}, "regular expression on parameter names -> factor on lr; first match wins")
    freeze: Any = key([], "regular expressions of parameters that are never trained")
    clip_norm: float = key(0.0, "clip the global gradient norm; 0 = off")


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = key("cosine_7_16", "learning-rate law over updates", ("cosine_7_16", "cosine_half", "cosine_epoch", "exp", "multistep", "constant"))
    warmup_steps: int = key(0, "linear warm-up in updates")
    warmup_epochs: int = key(0, "cosine_epoch, multistep: linear warm-up in epochs")
    warmup_from: float = key(0.0, "the share of lr at which warm-up begins")
    gamma: float = key(4e-4, "exp: lr (1 + gamma x)^-decay at finished update x; multistep: factor at each milestone")
    decay: float = key(0.75, "exp: exponent")
    milestones: Any = key([], "multistep: epochs at which lr is multiplied by gamma")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = key(1024, "optimiser updates of the whole run")
    steps_per_epoch: int = key(1024, "updates per epoch: evaluation and epoch-wise laws follow it")
    precision: str = key("no", "mixed precision through Accelerate", ("no", "bf16", "fp16"))
    channels_last: bool = key(True, "channels-last memory for convolutions")
    capture: str = key("auto", "record the whole update as one CUDA graph", ("auto", "on", "off"))
    compile: str = key("off", "student: its forward and backward go through torch.compile, which may round differently", ("off", "student"))
    threads: int = key(0, "CPU threads per process; 0 = cores divided by processes")
    deterministic: bool = key(True, "ask PyTorch for deterministic algorithms")


@dataclass(frozen=True)
class EvalConfig:
    every: int = key(0, "updates between evaluations; 0 = each epoch")
    batch: int = key(256, "images per evaluation batch")
    headline: str = key("ema", "which weights the plain eval/* names report", ("ema", "raw"))


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(0, "updates between checkpoints; 0 = each epoch")
    keep: int = key(2, "how many step checkpoints stay on disk besides the best one")


@dataclass(frozen=True)
class LogConfig:
    every: int = key(50, "updates between log lines; device counters are read only then")
    trackers: Any = key(["tensorboard"], "Accelerate trackers: tensorboard, wandb; [] for none")
    project: str = key("fastssl", "tracker project name")


@dataclass(frozen=True)
class MethodSpec:
    """The method's name beside its own Config; written flat in YAML: ``method: {name: fixmatch, threshold: 0.95}``."""

    name: str
    config: Any


@dataclass(frozen=True)
class Recipe:
    method: MethodSpec
    name: str = key("run", "name of the run folder under runs_dir")
    title: str = key("", "one line for lists and reports")
    seed: int = key(0, "seeds weights, data order and every augmentation number")
    runs_dir: str = key("runs", "where run folders are made")
    data: DataConfig = key(DataConfig, "")
    augment: AugmentConfig = key(AugmentConfig, "")
    model: ModelConfig = key(ModelConfig, "")
    batchnorm: BatchNormConfig = key(BatchNormConfig, "")
    teacher: TeacherConfig = key(TeacherConfig, "")
    optim: OptimConfig = key(OptimConfig, "")
    schedule: ScheduleConfig = key(ScheduleConfig, "")
    train: TrainConfig = key(TrainConfig, "")
    eval: EvalConfig = key(EvalConfig, "")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "")
    log: LogConfig = key(LogConfig, "")


Origin = Literal["default", "recipe", "extends", "command line"]
