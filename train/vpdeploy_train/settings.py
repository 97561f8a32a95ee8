"""What a training run was asked to do: one typed object, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from vpdeploy.errors import SpecError
from vpdeploy_train.config import FileSettings, checked_value, name_advice
from vpdeploy_train.recipes import recipe_named
from vpdeploy_train.shares import Shares, parse_shares

Precision = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal["sgd", "adamw"]
PruneScope = Literal["layer", "shared"]
PruneMode = Literal["remove", "zero"]
PruneSearch = Literal["halving", "full"]
Head = Literal["zero", "probe"]
Rewind = Literal["initial", "fresh"]
Resize = Literal["crop", "squash"]
Normalisation = Literal["backbone", "imagenet"]
Augment = Literal["none", "flip", "crop", "crop-flip", "rand-augment"]
Device = Literal["auto", "cpu", "cuda"]
SegmentOrder = Literal["contiguous", "strided"]
Pooling = Literal["model", "patches", "published"]
PromptNorm = Literal["block", "paper"]
PromptStart = Literal["apart", "zero"]

_DEFAULT_LR: dict[str, float] = {"sgd": 0.25, "adamw": 0.1}
_DEFAULT_LR_OF_WEIGHTS: dict[str, dict[str, float]] = {
    # Where a backbone's own weights move, they have to move far less than prompts.
    "full": {"sgd": 0.01, "adamw": 4e-4},
    "lora": {"sgd": 0.1, "adamw": 4e-3},
}
_DEFAULT_WEIGHT_DECAY: dict[str, float] = {"sgd": 0.001, "adamw": 0.01}


def _option(default: Any, text: str, choices: Any = None) -> Any:
    """Declare a setting: its default, what it means, and the values it may take."""
    return field(default=default, metadata={"help": text, "choices": get_args(choices) if choices else ()})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that determines a run. Written to ``args.toml``, read by ``--config`` and ``--resume``.

    Each field's meaning is its ``help`` metadata, which the command line shows too.

    Raises:
        SpecError: A value is out of range, or two contradict each other.
    """

    data: str
    recipe: str | None = _option(
        None, "the papers' settings for a data set, such as vtab/cifar100 or fgvc/cub; other options win"
    )
    method: str = _option("e2vpt", "e2vpt, vapt, vpt-deep, vpt-shallow, linear, lora or full")
    backbone: str = _option("vit_mini_patch8_64", "timm name of the frozen ViT; the default ships with vpdeploy")
    weights: str | None = _option(None, "state dict: safetensors, Google's .npz or a torch file; default: timm's")
    image_size: int | None = _option(None, "side of the backbone's input in pixels; default: the backbone's own")
    resize: Resize = _option("crop", "centre crop, or squash to a square", Resize)
    crop_ratio: float | None = _option(
        None, "share of the scaled image that the centre crop keeps; default: the backbone's own"
    )
    pooling: Pooling = _option(
        "model", "the model's own, the mean over patches, or as published over patches and prompts", Pooling
    )
    normalisation: Normalisation = _option("backbone", "mean and std: the backbone's, or ImageNet's", Normalisation)
    val_fraction: float = _option(0.2, "share of the training images held out where there is no validation split")

    prompt_tokens: int = _option(10, "visual prompts per block")
    kv_tokens: int = _option(5, "key/value prompts per block (e2vpt)")
    kv_shared: bool = _option(True, "keys and values share one tensor of key/value prompts (e2vpt)")
    prompt_dropout: float = _option(0.1, "dropout on the visual prompts (e2vpt, vapt, vpt-deep)")
    vapt_hidden: int = _option(8, "hidden units of the feature projector (vapt)")
    vapt_kernel: int = _option(2, "side of the convolution kernel (vapt)")
    vapt_norm: PromptNorm = _option("block", "LayerNorm eps: the block's, shared at run time, or 1e-5", PromptNorm)
    vapt_start: PromptStart = _option("apart", "tokens begin a little apart, or at zero (the paper)", PromptStart)
    lora_rank: int = _option(8, "rank of the updates (lora)")
    segment_order: SegmentOrder = _option("contiguous", "how channels form segments", SegmentOrder)

    head: Head = _option("probe", "where the classifier starts: a linear probe, or zero (the papers)", Head)
    epochs: int = _option(100, "passes over the training images")
    batch_size: int = _option(64, "images per step")
    optimizer: Optimizer = _option("adamw", "adamw, or sgd (the papers' recipe, momentum 0.9)", Optimizer)
    lr: float | None = _option(
        None, "learning rate for batches of 256, scaled by batch/256; default 0.1 adamw, 0.25 sgd"
    )
    weight_decay: float | None = _option(
        None, "on all trained tensors but the head's bias; default 0.01 adamw, 0.001 sgd"
    )
    head_lr_scale: float | None = _option(
        None, "the classifier's learning rate as a multiple of the prompts'; default 0.03 from a probe, else 1"
    )
    warmup_epochs: float | None = _option(None, "linear warm-up before the cosine; default a tenth of the epochs")
    grad_clip: float = _option(0.0, "largest gradient norm; 0 = no clipping")
    early_stop: int = _option(0, "stop after this many epochs without a better validation result; 0 = never")
    augment: Augment | None = _option(
        None, "none, flip, crop, crop-flip or rand-augment; default: what suits the data", Augment
    )
    workers: int | None = _option(None, "processes that load images; default: none where all fit into memory")
    seed: int = _option(0, "of everything random")
    device: Device = _option("auto", "auto, cpu or cuda", Device)
    precision: Precision = _option("fp32", "of the forward and backward pass", Precision)

    prune: bool | None = _option(None, "prune and rewind after training; default: yes for e2vpt")
    prune_scope: PruneScope = _option("layer", "each block its own tokens, or one choice shared by all", PruneScope)
    prune_mode: PruneMode = _option(
        "remove", "remove pruned tokens, or leave zeros that are attended to (the papers' code)", PruneMode
    )
    prune_kv: bool | None = _option(None, "prune key/value prompts, too; default: where the method has them")
    keep: str = _option("auto", "shares of tokens kept to try, e.g. 0.5,0.25; everything is always tried")
    keep_segments: str = _option("auto", "shares of segments kept, one for each of --keep, or one for all")
    keep_hidden: float = _option(1.0, "share of the feature projector's hidden units kept (vapt)")
    prune_search: PruneSearch = _option(
        "halving", "stop the worse candidates at 1/4 and 1/2 of the epochs, or train each in full", PruneSearch
    )
    prune_candidates: int | None = _option(
        None, "how many shares --keep auto tries; default 6, which cost 3 trainings at most by halving"
    )
    score_images: int = _option(2048, "most training images that importance scores are averaged over")
    prune_slack: float = _option(0.0, "validation accuracy, in [0, 1], that a smaller set may cost")
    rewind: Rewind = _option("initial", "retrain from the stored initial values, or from fresh ones", Rewind)

    def __post_init__(self) -> None:
        for setting in fields(self):
            choices = setting.metadata.get("choices")
            value = getattr(self, setting.name)
            if choices and value not in choices and not (value is None and setting.default is None):
                raise SpecError(f"--{_dashed(setting.name)} '{value}': choose one of {', '.join(choices)}")
        if self.recipe is not None:
            recipe_named(self.recipe)
        _check(self.epochs >= 1, "--epochs", "at least 1", self.epochs)
        _check(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        _check(0 <= self.prompt_tokens <= 1000, "--prompt-tokens", "0 to 1000", self.prompt_tokens)
        _check(0 <= self.kv_tokens <= 1000, "--kv-tokens", "0 to 1000", self.kv_tokens)
        _check(1 <= self.vapt_hidden <= 4096, "--vapt-hidden", "1 to 4096", self.vapt_hidden)
        _check(1 <= self.vapt_kernel <= 32, "--vapt-kernel", "1 to 32", self.vapt_kernel)
        _check(1 <= self.lora_rank <= 1024, "--lora-rank", "1 to 1024", self.lora_rank)
        _check(0 <= self.prompt_dropout < 1, "--prompt-dropout", "in [0, 1)", self.prompt_dropout)
        _check(0 < self.val_fraction < 1, "--val-fraction", "in (0, 1)", self.val_fraction)
        _check(self.image_size is None or 8 <= self.image_size <= 4096, "--image-size", "8 to 4096", self.image_size)
        _check(self.crop_ratio is None or 0 < self.crop_ratio <= 1, "--crop-ratio", "in (0, 1]", self.crop_ratio)
        _check(math.isfinite(self.base_lr) and self.base_lr > 0, "--lr", "positive", self.lr)
        _check(math.isfinite(self.decay) and self.decay >= 0, "--weight-decay", "at least 0", self.weight_decay)
        _check(
            math.isfinite(self.head_scale) and self.head_scale > 0,
            "--head-lr-scale",
            "positive",
            self.head_lr_scale,
        )
        _check(0 <= self.warmup <= self.epochs, "--warmup-epochs", "0 to --epochs", self.warmup_epochs)
        _check(math.isfinite(self.grad_clip) and self.grad_clip >= 0, "--grad-clip", "at least 0", self.grad_clip)
        _check(self.early_stop >= 0, "--early-stop", "at least 0", self.early_stop)
        _check(self.workers is None or self.workers >= 0, "--workers", "at least 0", self.workers)
        # Each phase's seed is derived by a product that has to stay below torch's limit of 2^64.
        _check(0 <= self.seed < 2**32, "--seed", "0 to 4294967295", self.seed)
        _check(0 < self.keep_hidden <= 1, "--keep-hidden", "in (0, 1]", self.keep_hidden)
        _check(self.score_images >= 1, "--score-images", "at least 1", self.score_images)
        _check(0 <= self.prune_slack < 1, "--prune-slack", "in [0, 1)", self.prune_slack)
        self.keep_ratios()

    @property
    def base_lr(self) -> float:
        """Learning rate for batches of 256 images."""
        if self.lr is not None:
            return self.lr
        return _DEFAULT_LR_OF_WEIGHTS.get(self.method, _DEFAULT_LR)[self.optimizer]

    @property
    def head_scale(self) -> float:
        """The classifier's learning rate as a multiple of the prompts'; one that starts well moves slowly."""
        if self.head_lr_scale is not None:
            return self.head_lr_scale
        settled = self.head == "probe" and self.method not in ("linear", *_DEFAULT_LR_OF_WEIGHTS)
        return 0.03 if settled else 1.0

    @property
    def decay(self) -> float:
        """Weight decay."""
        return _DEFAULT_WEIGHT_DECAY[self.optimizer] if self.weight_decay is None else self.weight_decay

    @property
    def warmup(self) -> float:
        """Epochs of linear warm-up."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def prunes(self) -> bool:
        """Whether pruning follows the training."""
        return self.method == "e2vpt" if self.prune is None else self.prune

    def keep_ratios(self) -> list[Shares]:
        """Return the shares that the pruning search tries, besides keeping everything.

        Raises:
            SpecError: They are malformed.
        """
        return parse_shares(self.keep, self.keep_segments, hidden=self.keep_hidden, candidates=self.prune_candidates)

    def to_toml(self) -> str:
        """Return the settings as TOML; those that are None are left out."""
        import tomli_w  # the command line reads this module's options without the extra installed

        return tomli_w.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def merge(cls, *layers: Mapping[str, Any]) -> TrainSettings:
        """Build settings from layers of named values, the later ones winning; None means "not given".

        Where a layer names a recipe, its settings lie beneath all layers.

        Raises:
            SpecError: A name is unknown, a value has the wrong type or range, or ``data`` is missing; where the layer
                was read from a file, the message names it.
        """
        known = {setting.name: setting for setting in fields(cls)}
        merged: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for layer in layers:
            origin = f"{layer.file}: " if isinstance(layer, FileSettings) else ""
            for name, value in layer.items():
                if name not in known:
                    raise SpecError(f"{origin}unknown setting '{name}'; {name_advice(name, list(known))}")
                if value is not None:
                    merged[name] = checked_value(name, value, str(known[name].type), origin=origin)
                    origins[name] = origin
        if "data" not in merged:
            raise SpecError("--data is missing: give a folder, a .csv/.json/.jsonl manifest, or 'digits'")
        try:
            if "recipe" in merged:
                merged = recipe_named(merged["recipe"]).settings(merged.get("method", default_of("method"))) | merged
            return cls(**merged)
        except SpecError as error:
            raise SpecError(f"{origins.get(_setting_named_by(error), '')}{error}") from None

    def difference(self, other: TrainSettings) -> str | None:
        """Name the first setting in which ``other`` differs; None when they are equal."""
        for setting in fields(self):
            mine, theirs = getattr(self, setting.name), getattr(other, setting.name)
            if mine != theirs:
                return f"--{_dashed(setting.name)} was {mine}, now {theirs}"
        return None


def default_of(name: str) -> Any:
    """Return a setting's default, None where it has none."""
    setting = next(setting for setting in fields(TrainSettings) if setting.name == name)
    return None if setting.default is MISSING else setting.default


def _check(holds: bool, option: str, expected: str, found: object) -> None:
    if not holds:
        raise SpecError(f"{option} should be {expected}, found {found}")


def _setting_named_by(error: SpecError) -> str:
    """Return the setting that a refusal, which begins with its option, is about."""
    return str(error).partition(" ")[0].rstrip(":").removeprefix("--").replace("-", "_")


def _dashed(name: str) -> str:
    return name.replace("_", "-")
