"""``vpdeploy train``: one option for every setting and for every option of every method."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from vpdeploy.cli.signals import Stopped
from vpdeploy.cli.threads import Threads
from vpdeploy.errors import TrainingError
from vpdeploy.files import storage_reason
from vpdeploy.format.run import ARGS_FILE
from vpdeploy.text import shell_path
from vpdeploy_train.cli.cache import Cache
from vpdeploy_train.cli.door import check_training
from vpdeploy_train.cli.options import add_options, tell_refused_methods
from vpdeploy_train.config import read_toml
from vpdeploy_train.place import check_begun, check_new_place, choose_task_name, resume_command
from vpdeploy_train.settings import TrainSettings

logger = logging.getLogger("vpdeploy.train")


def train(
    out: Annotated[Path, typer.Option(help="The run folder to write.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="The task's name; default: the run folder's, or on --resume the run's.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from a TOML file; options given here win.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    cache: Cache = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **options: Any,
) -> None:
    """Learn, and prune, one task's prompts on a frozen backbone."""
    check_begun(out) if resume else check_new_place(out)
    choose_task_name(out, name=name, resume=resume)
    tell_refused_methods()
    stored = read_toml(out / ARGS_FILE) if resume and (out / ARGS_FILE).is_file() else {}
    settings = TrainSettings.merge(stored, {} if config is None else read_toml(config), options)

    try:
        from vpdeploy_train.device import use_threads
        from vpdeploy_train.training import train_run
        from vpdeploy_train.verdict import advise, describe_choice

        use_threads(threads)
        result = train_run(settings, out, resume=resume, name=name, cache_bytes=cache)
    except KeyboardInterrupt:
        if (out / ARGS_FILE).is_file():
            advice = f"continue with: {resume_command(out, threads=threads)}"
        else:
            advice = "the training had not begun, so there is nothing to resume: run the same command again"
        raise Stopped(advice) from None
    except OSError as error:
        reason = storage_reason(error)
        if reason is None or not (out / ARGS_FILE).is_file():
            raise
        command = resume_command(out, threads=threads)
        raise TrainingError(f"{error.filename or out}: {reason}; make room and continue with: {command}") from error
    if (remark := advise(result)) is not None:
        logger.warning("%s", remark)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    card, prompts = result.run.card, result.prompts
    typer.echo(
        f"{out}: task '{card.name}', {len(card.labels)} classes, {prompts.parameters} prompt parameters, "
        f"{prompts.tuned_percent:.2f} % of the model tuned"
    )
    if result.validation is None:
        typer.echo("no validation images: the last epoch is the result")
    else:
        typer.echo(f"validation accuracy {result.validation.accuracy:.4f}, loss {result.validation.loss:.4f}")
        typer.echo(describe_choice(result))
    if result.pruning is not None:
        before, after = result.pruning.before, result.pruning.after
        typer.echo(
            f"pruning chose {result.pruning.chosen}: {before.parameters} to {after.parameters} parameters, "
            f"validation accuracy {before.val_accuracy:.4f} to {after.val_accuracy:.4f}; {out / 'pruning.png'}"
        )
    typer.echo(f"next: vpdeploy export {shell_path(out)} --out {card.name}.onnx")


add_options(train, check=check_training)
