"""What a training run was asked to do: one typed object, checked once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from vpdeploy.errors import SpecError
from vpdeploy.toml import name_advice
from vpdeploy_train.config import FileSettings, SharedSettings
from vpdeploy_train.methods import METHODS, LoadedMethods, MethodOptions
from vpdeploy_train.option import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Limits,
    Option,
    between,
    check_options,
    option,
    options_of,
    require,
    values_of,
)
from vpdeploy_train.pace import Pace, warmup_steps
from vpdeploy_train.recipes import recipe_named
from vpdeploy_train.shares import Shares, parse_shares

if TYPE_CHECKING:
    from vpdeploy_train.methods.method import PromptMethod

TrainPrecision = Literal["fp32", "bf16", "fp16"]
"""Type that the forward and backward pass compute in; the trained tensors stay float32."""
Optimizer = Literal["sgd", "adamw"]
PruneScope = Literal["layer", "shared"]
PruneMode = Literal["remove", "zero"]
PruneSearch = Literal["halving", "full"]
ClassWeights = Literal["none", "balanced"]
Head = Literal["zero", "probe"]
Rewind = Literal["initial", "fresh"]
Resize = Literal["crop", "squash"]
Normalisation = Literal["backbone", "imagenet"]
Augment = Literal["none", "flip", "crop", "crop-flip", "rand-augment"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
PoolingChoice = Literal["model", "patches", "published"]

_DEFAULT_WEIGHT_DECAY: dict[str, float] = {"sgd": 0.001, "adamw": 0.01}

AUTO_LR: Final = "auto"
"""The learning rate that a range test chooses."""

VERB_WORDS: Final = frozenset(
    {"out", "name", "config", "resume", "as_json", "json", "help", "threads", "cache"}
    | {"trials", "search", "storage", "study", "pruner"}
)
"""Parameters of the verbs that train, which no option of a method may be called by."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that determines a run. Written to ``args.toml``, read by ``--config`` and ``--resume``.

    Each field's meaning is its ``help`` metadata, which the command line shows too.

    Attributes:
        options: What the method alone has to choose; its defaults where none are given.

    Raises:
        SpecError: A value is out of range, or two contradict each other.

    Example:
        >>> settings = vpdeploy_train.TrainSettings.of(data=photos, method="vpt-deep", prompt_tokens=5)
        >>> settings.options.prompt_tokens, settings.changed(prompt_tokens=10).options.prompt_tokens
        (5, 10)
    """

    data: str = option(
        MISSING,
        "folder, .csv/.json/.jsonl manifest, vtab:DIR, hf:NAME, digits[:TASK] or shapes:TASK; "
        "with #final behind it, train on the validation images, too",
    )
    recipe: str | None = option(
        None, "the papers' settings for a data set, such as vtab/cifar100 or fgvc/cub; other options win"
    )
    method: str = option("e2vpt", "one of " + ", ".join(METHODS))
    backbone: str = option("vit_mini_patch8_64", "timm name of the frozen ViT; the default ships with vpdeploy")
    weights: str | None = option(None, "state dict: safetensors, Google's .npz or a torch file; default: timm's")
    image_size: int | None = option(
        None, "side of the backbone's input in pixels; default: the backbone's own", limits=between(8, 4096)
    )
    resize: Resize = option("crop", "centre crop, or squash to a square")
    crop_ratio: float | None = option(
        None,
        "share of the scaled image that the centre crop keeps; default: the backbone's own",
        limits=Limits(low=0, high=1, low_open=True),
    )
    pooling: PoolingChoice = option(
        "model", "the model's own, the mean over patches, or as published over patches and prompts"
    )
    normalisation: Normalisation = option("backbone", "mean and std: the backbone's, or ImageNet's")
    val_fraction: float = option(
        0.2,
        "share of the training images held out where there is no validation split",
        limits=Limits(low=0, high=1, low_open=True, high_open=True),
    )

    skip_corrupt: bool = option(False, "leave out images that cannot be decoded, with a list, instead of ending")

    options: MethodOptions = MethodOptions()
    """What the method itself lets its user choose: an object of its ``Options``; here, the method's own defaults."""

    head: Head = option("probe", "where the classifier starts: a linear probe, or zero (the papers)")
    epochs: int = option(100, "passes over the training images", limits=AT_LEAST_ONE)
    batch_size: int = option(64, "images per step", limits=AT_LEAST_ONE)
    optimizer: Optimizer = option("adamw", "adamw, or sgd (the papers' recipe, momentum 0.9)")
    lr: float | Literal["auto"] | None = option(
        None,
        "learning rate for batches of 256, scaled by batch/256, or auto: by a range test on training images; "
        "default: the method's own",
        limits=POSITIVE,
    )
    weight_decay: float | None = option(
        None, "on all trained tensors but the head's bias; default 0.01 adamw, 0.001 sgd", limits=NOT_NEGATIVE
    )
    head_lr_scale: float | None = option(
        None,
        "the classifier's learning rate as a multiple of the prompts'; default 0.03 from a probe, else 1",
        limits=POSITIVE,
    )
    warmup_epochs: float | None = option(
        None, "linear warm-up before the cosine; default a tenth of the epochs, at least 20 steps or half of all"
    )
    grad_clip: float = option(0.0, "largest gradient norm; 0 = no clipping", limits=NOT_NEGATIVE)
    early_stop: int = option(
        0, "stop after this many epochs without a better validation result; 0 = never", limits=NOT_NEGATIVE
    )
    class_weights: ClassWeights = option(
        "none", "balanced: every class counts the same in the training loss and the probe, however many images it has"
    )
    label_smoothing: float = option(
        0.0,
        "share of the training target that is spread over all classes",
        limits=Limits(low=0, high=1, high_open=True),
    )
    augment: Augment | None = option(None, "none, flip, crop, crop-flip or rand-augment; default: what suits the data")
    workers: int | None = option(
        None, "processes that load images; default: none where all fit into memory", limits=NOT_NEGATIVE
    )
    seed: int = option(0, "of everything random", limits=between(0, 2**32 - 1))
    device: DeviceChoice = option("auto", "auto, cpu or cuda")
    precision: TrainPrecision = option("fp32", "of the forward and backward pass")

    prune: bool | None = option(None, "prune and rewind after training; default: the method's own")
    prune_scope: PruneScope = option("layer", "each block its own tokens, or one choice shared by all")
    prune_mode: PruneMode = option(
        "remove", "remove pruned tokens, or leave zeros that are attended to (the papers' code)"
    )
    prune_kv: bool | None = option(None, "prune key/value prompts, too; default: where the method has them")
    keep: str = option("auto", "shares of tokens kept to try, e.g. 0.5,0.25; everything is always tried")
    keep_segments: str = option("auto", "shares of segments kept, one for each of --keep, or one for all")
    keep_hidden: float = option(
        1.0, "share of a feature projector's hidden units kept", limits=Limits(low=0, high=1, low_open=True)
    )
    prune_search: PruneSearch = option(
        "halving", "stop the worse candidates at 1/4 and 1/2 of the epochs, or train each in full"
    )
    prune_candidates: int | None = option(
        None, "how many shares --keep auto tries; default 6, which cost 3 trainings at most by halving"
    )
    score_images: int = option(
        2048, "most training images that importance scores are averaged over", limits=AT_LEAST_ONE
    )
    prune_slack: float = option(
        0.0, "validation accuracy, in [0, 1], that a smaller set may cost", limits=Limits(low=0, high=1, high_open=True)
    )
    rewind: Rewind = option("initial", "retrain from the stored initial values, or from fresh ones")

    def __post_init__(self) -> None:
        check_options(self)
        if self.recipe is not None:
            recipe_named(self.recipe)
        if self.warmup_epochs is not None:
            require(0 <= self.warmup_epochs <= self.epochs, "--warmup-epochs", "0 to --epochs", self.warmup_epochs)
        self.keep_ratios()
        expected = self.kind.Options
        if type(self.options) is MethodOptions and expected is not MethodOptions:
            object.__setattr__(self, "options", expected())
        elif type(self.options) is not expected:
            raise SpecError(
                f"method '{self.method}' has options of its own, {expected.__qualname__}, "
                f"found {type(self.options).__qualname__}"
            )

    @property
    def kind(self) -> type[PromptMethod]:
        """The method's class."""
        return METHODS.named(self.method)

    @property
    def base_lr(self) -> float:
        """Learning rate for batches of 256 images; the method's own where none is chosen, or a range test is to."""
        return self.kind.rates.of(self.optimizer) if self.lr is None or isinstance(self.lr, str) else self.lr

    @property
    def head_scale(self) -> float:
        """The classifier's learning rate as a multiple of the prompts'; one that starts well moves slowly."""
        if self.head_lr_scale is not None:
            return self.head_lr_scale
        return 0.03 if self.head == "probe" and self.kind.settles_head else 1.0

    @property
    def decay(self) -> float:
        """Weight decay."""
        return _DEFAULT_WEIGHT_DECAY[self.optimizer] if self.weight_decay is None else self.weight_decay

    def pace(self, *, steps_per_epoch: int, lr: float | None = None, reason: str | None = None) -> Pace:
        """Return the pace that these settings ask for.

        Args:
            steps_per_epoch: Batches of the training images.
            lr: The rate that a range test chose; None takes the settings' own.
            reason: Why it did.
        """
        return Pace(
            lr=self.base_lr if lr is None else lr,
            head_scale=self.head_scale,
            weight_decay=self.decay,
            warmup_steps=warmup_steps(self.warmup_epochs, epochs=self.epochs, steps_per_epoch=steps_per_epoch),
            reason=reason,
        )

    @property
    def prunes(self) -> bool:
        """Whether pruning follows the training."""
        return self.kind.pruned_by_default if self.prune is None else self.prune

    def keep_ratios(self) -> list[Shares]:
        """Return the shares that the pruning search tries, besides keeping everything.

        Raises:
            SpecError: They are malformed.
        """
        return parse_shares(self.keep, self.keep_segments, hidden=self.keep_hidden, candidates=self.prune_candidates)

    def to_fields(self) -> dict[str, Any]:
        """Return all settings by name, the method's own among them; those that are None are left out."""
        values = values_of(self) | values_of(self.options)
        return {name: value for name, value in values.items() if value is not None}

    def to_toml(self) -> str:
        """Return the settings as TOML; those that are None are left out."""
        import tomli_w  # the command line reads this module's options without the extra installed

        return tomli_w.dumps(self.to_fields())

    @classmethod
    def of(cls, **values: Any) -> TrainSettings:
        """Build settings from their flat names, those of the method among them; None means "not given".

        Args:
            **values: Settings by name.

        Returns:
            Settings, in which those that were not given have their defaults.

        Raises:
            SpecError: A name is unknown, or none of the method's, or a value is out of range.
        """
        return cls.merge(values)

    @classmethod
    def merge(cls, *layers: Mapping[str, Any]) -> TrainSettings:
        """Build settings from layers of named values, the later ones winning; None means "not given".

        Where a layer names a recipe, its settings lie beneath all layers. What a recipe, a file or other
        ``SharedSettings`` say for other methods than the chosen one is left out.

        Args:
            *layers: Settings by name.

        Returns:
            Settings, in which those that no layer gives have their defaults.

        Raises:
            SpecError: A name is unknown or none of the method's, a value has the wrong type or range, or ``data`` is
                missing; where the layer was read from a file, the message names it.
        """
        # The method decides which options there are; a recipe lies beneath all layers.
        method = _last_of(layers, "method") or default_of("method")
        recipe = _last_of(layers, "recipe")
        known = _known_to(method)
        merged: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        if recipe is not None:
            shared |= recipe_named(recipe).settings(method)
            merged |= {name: value for name, value in shared.items() if name in known}

        # Each layer over the ones before, its values typed; errors name the file they came from.
        origins: dict[str, str] = {}
        for layer in layers:
            origin = f"{layer.file}: " if isinstance(layer, FileSettings) else ""
            for name, value in layer.items():
                if name not in known:
                    _check_foreign(name, value, method, shared, is_shared=isinstance(layer, SharedSettings), at=origin)
                elif value is not None:
                    merged[name] = known[name].typed(value, origin=origin)
                    origins[name] = origin
            if isinstance(layer, SharedSettings):
                shared |= layer

        # One object: common settings, and the method's own options beside them.
        if "data" not in merged:
            raise SpecError("--data is missing: give a folder, a .csv/.json/.jsonl manifest, or 'digits'")
        try:
            own = {name: merged.pop(name) for name in list(merged) if name not in options_of(cls)}
            return cls(**merged, options=METHODS.named(method).Options(**own))
        except SpecError as error:
            raise SpecError(f"{origins.get(_setting_named_by(error), '')}{error}") from None

    def changed(self, **values: Any) -> TrainSettings:
        """Return a copy in which some settings, given by their flat names, have other values.

        Where the method is another, its options keep what was chosen here and it knows, too.

        Args:
            **values: The settings that change, by name.

        Raises:
            SpecError: A value is out of range.
            TypeError: There is no such setting.
        """
        common = {name: value for name, value in values.items() if name in options_of(type(self))}
        own = {name: value for name, value in values.items() if name not in common}
        kind = METHODS.named(common.get("method", self.method))
        if kind is self.kind:
            return replace(self, **common, options=replace(self.options, **own))
        declared = options_of(type(self.options))
        chosen = {
            name: value
            for name, value in values_of(self.options).items()
            if value != declared[name].default and name in options_of(kind.Options)
        }
        return replace(self, **common, options=kind.Options(**chosen | own))

    def located(self) -> TrainSettings:
        """Return a copy whose data and weights are found from every directory.

        Raises:
            SpecError: The data are unknown.
        """
        # Imported here, as the data formats load numpy.
        from vpdeploy_train.data.address import absolute_path
        from vpdeploy_train.data.resolve import absolute_spec

        weights = None if self.weights is None else str(absolute_path(Path(self.weights)))
        return replace(self, data=absolute_spec(self.data), weights=weights)

    def difference(self, other: TrainSettings) -> str | None:
        """Return the first setting that differs, in words, or None where all are equal.

        Data and weights are equal where they are the same folder or file in another spelling.

        Args:
            other: The settings to compare with.
        """
        mine, theirs = (values_of(each) | values_of(each.options) for each in (self, other))
        for name in mine:
            if not _is_same(name, mine[name], theirs.get(name)):
                return f"--{name.replace('_', '-')} was {mine[name]}, now {theirs.get(name)}"
        return None


def _is_same(name: str, before: Any, now: Any) -> bool:
    """Tell whether a setting means the same."""
    if before == now or before is None or now is None or name not in ("data", "weights"):
        return bool(before == now)
    if name == "weights":
        return Path(before).expanduser().resolve() == Path(now).expanduser().resolve()
    from vpdeploy_train.data.resolve import is_same_data  # the data formats load numpy

    return is_same_data(before, now)


def default_of(name: str) -> Any:
    """Return the default of a setting that all methods have, None where it has none."""
    default = options_of(TrainSettings)[name].default
    return None if default is MISSING else default


@functools.cache
def usable_methods() -> LoadedMethods:
    """Load every installed method whose options fit beside those of all others."""
    common = options_of(TrainSettings)
    negated = {each.negated_name for each in common.values() if each.negated_name is not None}
    return METHODS.load(reserved=common.keys() | negated | VERB_WORDS)


def usable_method(name: str) -> type[PromptMethod]:
    """Load a method.

    Raises:
        SpecError: There is none of that name, or it is broken, or its options do not fit beside those of others.
    """
    methods = usable_methods()
    if name not in methods.kinds and name in methods.refusals:
        raise SpecError(methods.refusals[name])
    METHODS.require(name)
    return methods.kinds[name]


def every_option() -> dict[str, Option]:
    """Return the settings that all methods have, then those of each method, by name."""
    own = usable_methods().options()
    return {**options_of(TrainSettings), **{name: next(iter(methods.values())) for name, methods in own.items()}}


def _last_of(layers: tuple[Mapping[str, Any], ...], name: str) -> Any:
    """Return what the last layer that gives a text setting says; None where none does.

    Raises:
        SpecError: It is no text, or no method or recipe of that name is known.
    """
    found = None
    for layer in layers:
        value = layer.get(name)
        if value is None:
            continue
        origin = f"{layer.file}: " if isinstance(layer, FileSettings) else ""
        found = options_of(TrainSettings)[name].typed(value, origin=origin)
        try:
            METHODS.require(found) if name == "method" else recipe_named(found)
        except SpecError as error:
            raise SpecError(f"{origin}{error}") from None
    return found


def _known_to(method: str) -> dict[str, Option]:
    return {**options_of(TrainSettings), **options_of(usable_method(method).Options)}


def _check_foreign(name: str, value: Any, method: str, shared: Mapping[str, Any], *, is_shared: bool, at: str) -> None:
    """Accept a setting of another method where it is shared by several, or says what something shared says.

    Raises:
        SpecError: No method knows it, or the chosen one does not.
    """
    everything = every_option()
    if name not in everything:
        raise SpecError(f"{at}unknown setting '{name}'; {name_advice(name, list(everything))}")
    if value is None:
        return
    typed = everything[name].typed(value, origin=at)
    if is_shared or (name in shared and shared[name] == typed):
        return
    knowing = " and ".join(usable_methods().options()[name])
    raise SpecError(f"{everything[name].flag}: method '{method}' does not know it, only {knowing}; leave it away")


def _setting_named_by(error: SpecError) -> str:
    """Return the setting that a refusal, which begins with its option, is about."""
    return str(error).partition(" ")[0].rstrip(":").removeprefix("--").replace("-", "_")
