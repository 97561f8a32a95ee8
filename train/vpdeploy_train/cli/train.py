"""``vpdeploy train``: one option for every field of ``TrainSettings``."""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from vpdeploy_train.settings import TrainSettings, read_toml


def train(
    out: Annotated[Path, typer.Option(help="The run folder to write.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="The task's name; default: the run folder's name.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from a TOML file; options given here win.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Learn, and prune, one task's prompts on a frozen backbone."""
    stored = read_toml(out / "args.toml") if resume and (out / "args.toml").is_file() else {}
    settings = TrainSettings.merge(stored, {} if config is None else read_toml(config), options)

    from vpdeploy_train.training import train_run

    try:
        run = train_run(settings, out, resume=resume, name=name)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; continue with: vpdeploy train --out {out} --resume", err=True)
        raise typer.Exit(130) from None
    metrics, prompts = run.card.details["metrics"], run.card.details["prompts"]
    if as_json:
        typer.echo(
            json.dumps({"run": str(out), "task": run.card.name, "metrics": metrics, "prompts": prompts}, indent=2)
        )
        return
    typer.echo(
        f"{out}: task '{run.card.name}', {len(run.card.labels)} classes, {prompts['parameters']} prompt parameters"
    )
    typer.echo(f"validation accuracy {metrics['val_accuracy']:.4f}, loss {metrics['val_loss']:.4f}")
    typer.echo(f"next: vpdeploy export {out} --out {run.card.name}.onnx")


def _options() -> list[inspect.Parameter]:
    """Return one keyword parameter for every setting; None means that the option was not given."""
    kinds = {"int": int, "float": float, "bool": bool}
    parameters = []
    for setting in fields(TrainSettings):
        kind = kinds.get(str(setting.type).partition(" |")[0], str)
        text = setting.metadata.get("help", "folder, .csv/.json/.jsonl manifest, digits[:TASK] or shapes:TASK")
        if setting.default not in (None, MISSING):
            text += f" [default: {setting.default}]"
        option = typer.Option(help=text, show_default=False)
        parameters.append(
            inspect.Parameter(
                setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )
    return parameters


def _with_options(parameters: list[inspect.Parameter]) -> None:
    """Give ``train`` the signature that Typer reads: its own parameters, then one for each setting."""
    own = inspect.signature(train, eval_str=True)
    kept = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword_only = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in kept]
    setattr(train, "__signature__", own.replace(parameters=[*keyword_only, *parameters]))  # noqa: B010 (typed away)
    train.__annotations__ = {each.name: each.annotation for each in [*keyword_only, *parameters]}


_with_options(_options())
