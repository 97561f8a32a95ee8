"""What a training run was asked to do: one typed object, checked once."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from vpdeploy.errors import SpecError

Precision = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal["sgd", "adamw"]
PruneScope = Literal["layer", "shared"]
Head = Literal["zero", "probe"]
Rewind = Literal["initial", "fresh"]
Resize = Literal["crop", "squash"]
Normalisation = Literal["backbone", "imagenet"]
SegmentOrder = Literal["contiguous", "strided"]

_DEFAULT_LR: dict[str, float] = {"sgd": 0.25, "adamw": 0.1}
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
    method: str = _option("e2vpt", "e2vpt, vpt-deep or linear")
    backbone: str = _option("vit_mini_patch8_64", "timm name of the frozen ViT; the default ships with vpdeploy")
    weights: str | None = _option(None, "state dict: safetensors, Google's .npz or a torch file; default: timm's")
    image_size: int | None = _option(None, "side of the backbone's input in pixels; default: the backbone's own")
    resize: Resize = _option("crop", "centre crop, or squash to a square", Resize)
    normalisation: Normalisation = _option("backbone", "mean and std: the backbone's, or ImageNet's", Normalisation)
    val_fraction: float = _option(0.2, "share of the training images held out where there is no validation split")

    prompt_tokens: int = _option(10, "visual prompts per block")
    kv_tokens: int = _option(5, "key/value prompts per block (e2vpt)")
    kv_shared: bool = _option(True, "keys and values share one tensor of key/value prompts")
    prompt_dropout: float = _option(0.1, "dropout on the visual prompts")
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
    augment: str | None = _option(None, "none, flip, crop, crop-flip or rand-augment; default: what suits the data")
    workers: int | None = _option(None, "processes that load images; default: none where all fit into memory")
    seed: int = _option(0, "of everything random")
    device: str = _option("auto", "auto, cpu or cuda")
    precision: Precision = _option("fp32", "of the forward and backward pass", Precision)

    prune: bool | None = _option(None, "prune and rewind after training; default: yes for e2vpt")
    prune_scope: PruneScope = _option("layer", "each block its own tokens, or one choice shared by all", PruneScope)
    keep: str = _option("auto", "shares of tokens kept to try, e.g. 0.5,0.25; everything is always tried")
    keep_segments: str = _option("auto", "shares of segments kept, one for each of --keep, or one for all")
    prune_trials: int = _option(3, "most trainings that the search for the best share may cost")
    score_images: int = _option(2048, "most training images that importance scores are averaged over")
    prune_slack: float = _option(0.0, "validation accuracy, in [0, 1], that a smaller set may cost")
    rewind: Rewind = _option("initial", "retrain from the stored initial values, or from fresh ones", Rewind)

    def __post_init__(self) -> None:
        for setting in fields(self):
            choices = setting.metadata.get("choices")
            value = getattr(self, setting.name)
            if choices and value not in choices:
                raise SpecError(f"--{_dashed(setting.name)} '{value}': choose one of {', '.join(choices)}")
        _check(self.epochs >= 1, "--epochs", "at least 1", self.epochs)
        _check(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        _check(0 <= self.prompt_tokens <= 1000, "--prompt-tokens", "0 to 1000", self.prompt_tokens)
        _check(0 <= self.kv_tokens <= 1000, "--kv-tokens", "0 to 1000", self.kv_tokens)
        _check(0 <= self.prompt_dropout < 1, "--prompt-dropout", "in [0, 1)", self.prompt_dropout)
        _check(0 < self.val_fraction < 1, "--val-fraction", "in (0, 1)", self.val_fraction)
        _check(self.image_size is None or self.image_size >= 8, "--image-size", "at least 8", self.image_size)
        _check(math.isfinite(self.base_lr) and self.base_lr > 0, "--lr", "positive", self.lr)
        _check(math.isfinite(self.decay) and self.decay >= 0, "--weight-decay", "at least 0", self.weight_decay)
        _check(
            math.isfinite(self.head_scale) and self.head_scale > 0,
            "--head-lr-scale",
            "positive",
            self.head_lr_scale,
        )
        _check(0 <= self.warmup <= self.epochs, "--warmup-epochs", "0 to --epochs", self.warmup_epochs)
        _check(self.grad_clip >= 0, "--grad-clip", "at least 0", self.grad_clip)
        _check(self.early_stop >= 0, "--early-stop", "at least 0", self.early_stop)
        _check(self.workers is None or self.workers >= 0, "--workers", "at least 0", self.workers)
        # Each phase's seed is derived by a product that has to stay below torch's limit of 2^64.
        _check(0 <= self.seed < 2**32, "--seed", "0 to 4294967295", self.seed)
        _check(self.prune_trials >= 1, "--prune-trials", "at least 1", self.prune_trials)
        _check(self.score_images >= 1, "--score-images", "at least 1", self.score_images)
        _check(0 <= self.prune_slack < 1, "--prune-slack", "in [0, 1)", self.prune_slack)
        self.keep_ratios()

    @property
    def base_lr(self) -> float:
        """Learning rate for batches of 256 images."""
        return _DEFAULT_LR[self.optimizer] if self.lr is None else self.lr

    @property
    def head_scale(self) -> float:
        """The classifier's learning rate as a multiple of the prompts'; one that starts well moves slowly."""
        if self.head_lr_scale is not None:
            return self.head_lr_scale
        return 0.03 if self.head == "probe" and self.method != "linear" else 1.0

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

    def keep_ratios(self) -> list[tuple[float, float]]:
        """Return the shares (tokens, segments) that the pruning search tries, besides keeping everything.

        Raises:
            SpecError: ``keep`` or ``keep_segments`` is not a list of shares, or there are more than ``prune_trials``.
        """
        if self.keep == "auto":
            tokens = [0.5, 0.25, 0.75, 0.1, 0.9][: self.prune_trials]
        else:
            tokens = _shares("--keep", self.keep)
        if len(tokens) > self.prune_trials:
            raise SpecError(f"--keep {self.keep}: {len(tokens)} shares, --prune-trials allows {self.prune_trials}")
        segments = [0.75] if self.keep_segments == "auto" else _shares("--keep-segments", self.keep_segments)
        if len(segments) == 1:
            segments *= len(tokens)
        if len(segments) != len(tokens):
            raise SpecError(
                f"--keep-segments {self.keep_segments}: expected one share, or {len(tokens)} as in --keep; "
                f"found {len(segments)}"
            )
        return list(zip(tokens, segments, strict=True))

    def to_toml(self) -> str:
        """Return the settings as TOML; those that are None are left out."""
        import tomli_w  # the command line reads this module's options without the extra installed

        return tomli_w.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def merge(cls, *layers: Mapping[str, Any]) -> TrainSettings:
        """Build settings from layers of named values, the later ones winning; None means "not given".

        Raises:
            SpecError: A name is unknown, a value has the wrong type or range, or ``data`` is missing.
        """
        known = {setting.name: setting for setting in fields(cls)}
        merged: dict[str, Any] = {}
        for layer in layers:
            for name, value in layer.items():
                if name not in known:
                    raise SpecError(f"unknown setting '{name}'; expected one of: {', '.join(known)}")
                if value is not None:
                    merged[name] = _typed(name, value, str(known[name].type))
        if "data" not in merged:
            raise SpecError("--data is missing: give a folder, a .csv/.json/.jsonl manifest, or 'digits'")
        return cls(**merged)

    def difference(self, other: TrainSettings) -> str | None:
        """Name the first setting in which ``other`` differs; None when they are equal."""
        for setting in fields(self):
            mine, theirs = getattr(self, setting.name), getattr(other, setting.name)
            if mine != theirs:
                return f"--{_dashed(setting.name)} was {mine}, now {theirs}"
        return None


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file.

    Raises:
        SpecError: The file is missing or is not TOML.
    """
    # Imported here: the command line reads this module's options without the extra installed.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: file not found") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: not a readable TOML file: {error}") from error


def default_of(name: str) -> Any:
    """Return a setting's default, None where it has none."""
    setting = next(setting for setting in fields(TrainSettings) if setting.name == name)
    return None if setting.default is MISSING else setting.default


def _typed(name: str, value: Any, annotation: str) -> Any:
    """Check a value from a file or the command line against a field's annotation."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if "float" in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = {"int": int, "float": float, "bool": bool}.get(kinds[0], str)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise SpecError(f"--{_dashed(name)}: expected {expected.__name__}, found {value!r}")
    return value


def _shares(option: str, text: str) -> list[float]:
    """Parse a comma-separated list of shares in (0, 1]."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise SpecError(f"{option} '{text}': expected 'auto' or shares in (0, 1], e.g. 0.5,0.25")
    return shares


def _check(holds: bool, option: str, expected: str, found: object) -> None:
    if not holds:
        raise SpecError(f"{option} should be {expected}, found {found}")


def _dashed(name: str) -> str:
    return name.replace("_", "-")
