"""``vpdeploy sweep``: options of ``vpdeploy train``, some of which may be ranges or lists."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vpdeploy.cli.signals import Stopped
from vpdeploy.cli.threads import Threads
from vpdeploy.errors import SpecError
from vpdeploy.text import shell_path
from vpdeploy_train.cli.cache import Cache
from vpdeploy_train.cli.door import check_study_name, check_sweep
from vpdeploy_train.cli.options import add_options, tell_refused_methods
from vpdeploy_train.config import read_toml
from vpdeploy_train.option import options_of
from vpdeploy_train.recipes import recipe_named
from vpdeploy_train.settings import TrainSettings, every_option
from vpdeploy_train.sweep.space import Choices, Interval, applies, default_space, may_vary, read_option, read_space

logger = logging.getLogger("vpdeploy.train")


def sweep(
    out: Annotated[Path, typer.Option(help="The sweep's folder; an existing one is continued.", show_default=False)],
    trials: Annotated[int, typer.Option(help="Trials in the end, earlier ones included.", min=1)] = 20,
    search: Annotated[
        Path | None, typer.Option(help="What to vary, from a TOML file; then nothing is varied by default.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Database URL, where several machines share the study; default: a file in --out.")
    ] = None,
    study: Annotated[str, typer.Option(help="The study's name in the storage, and of its tasks.")] = "sweep",
    pruner: Annotated[
        Literal["median", "asha", "none"], typer.Option(help="How unpromising trials are found and stopped.")
    ] = "median",
    config: Annotated[Path | None, typer.Option(help="Settings from a TOML file; options given here win.")] = None,
    cache: Cache = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Search hyper-parameters on the validation images: rates, prompt lengths, what pruning keeps.

    The options of `vpdeploy train` hold for all trials. A range LOW:HIGH or a list A,B,C varies --method, --lr,
    --weight-decay, --head-lr-scale, --batch-size and every number that is an option of a method, such as
    --prompt-tokens; a range varies --keep. By default --lr, --weight-decay and the method's numbers of prompts are
    varied; a value fixes one.
    """
    check_study_name(study)
    tell_refused_methods()
    settings, space = _plan(options, config, search)
    try:
        import optuna  # noqa: F401  (named first where it is missing)

        from vpdeploy_train.device import use_threads
        from vpdeploy_train.results import TrainingResult
        from vpdeploy_train.sweep.sweeping import SweepPlan, run_sweep
        from vpdeploy_train.verdict import advise

        use_threads(threads)
        plan = SweepPlan(
            settings=settings,
            space=space,
            out=out,
            trials=trials,
            storage=storage,
            study=study,
            pruner=pruner,
            cache_bytes=cache,
        )
        result = run_sweep(plan)
    except KeyboardInterrupt:
        raise Stopped("the same command continues the sweep") from None
    if result.best_run is not None and (remark := advise(TrainingResult.read(result.best_run))) is not None:
        logger.warning("of the best trial, %s", remark)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    typer.echo(f"{out}: " + ", ".join(f"{count} {state}" for state, count in result.states.items()))
    if result.best is None:
        raise SpecError(f"{out}: no trial is complete; see {out / 'trials.csv'}")
    values = ", ".join(f"{name} {value}" for name, value in result.values.items())
    typer.echo(f"best: trial {result.best}, validation accuracy {result.val_accuracy:.4f}: {values}")
    typer.echo(f"its run: {result.best_run or 'on the machine that trained it'}; its settings: {out / 'best.toml'}")
    best = shell_path(out / "best.toml")
    typer.echo(f"next: vpdeploy train --config {best} --seed 1 --out RUN")


def _plan(options: dict[str, Any], config: Path | None, search: Path | None) -> tuple[TrainSettings, dict[str, Any]]:
    """Return what all trials have in common and what they vary.

    Raises:
        SpecError: Options, files or both do not fit.
    """
    known = every_option()
    read = {
        name: read_option(name, value) if value is not None and may_vary(known[name]) else value
        for name, value in options.items()
    }
    varied = {name: value for name, value in read.items() if isinstance(value, Choices | Interval)}
    stored = {} if config is None else read_toml(config)
    fixed = {name: None if name in varied else value for name, value in read.items()}
    method = varied.get("method")
    methods = method.values if isinstance(method, Choices) else ()
    if methods:
        fixed["method"] = methods[0]
    pinned = _pinned(methods, stored, fixed)
    settings = TrainSettings.merge(stored, {name: value for name, value in fixed.items() if name not in pinned})
    if search is None:
        given = {name for layer in (stored, fixed) for name, value in layer.items() if value is not None}
        if settings.recipe is not None:
            given |= options_of(type(settings.options)).keys() & recipe_named(settings.recipe).settings(settings.method)
        space = default_space(settings, given | set(varied), methods=methods) | pinned | varied
    else:
        space = read_space(read_toml(search)) | pinned | varied
    shares = any(name in space for name in ("keep", "keep_segments", "keep_hidden"))
    if settings.prune is None:  # a search in every trial costs several trainings; with a share to try, it is asked for
        settings = replace(settings, prune=shares)
    if shares and not settings.prune:
        raise SpecError("what pruning keeps is varied, but --no-prune leaves nothing to prune; leave one away")
    if methods and settings.prune:
        raise SpecError("--method: several methods cannot be compared together with pruning; use --no-prune")
    return settings, space


def _pinned(methods: tuple[str, ...], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of methods that are fixed where several methods are compared: each trial takes what it knows.

    Args:
        methods: The methods; none where one is fixed.
        layers: Settings by name, the later ones winning.
    """
    given = {name: value for layer in layers for name, value in layer.items() if value is not None}
    common, known = options_of(TrainSettings), every_option()
    return {
        name: Choices(values=(known[name].typed(value),))
        for name, value in given.items()
        if name in known and name not in common and any(applies(name, method) for method in methods)
    }


add_options(sweep, check=check_sweep, as_text=may_vary)
