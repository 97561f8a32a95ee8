"""The entry point: verbs of this package, verbs of the training and export packages, errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any, NoReturn

import typer

from vpdeploy import __version__
from vpdeploy.cli import exits
from vpdeploy.cli.bench import bench
from vpdeploy.cli.build import build
from vpdeploy.cli.doctor import doctor
from vpdeploy.cli.failure import describe_results, fail, fail_usage, report_stop, watching_stdout
from vpdeploy.cli.gc import collect
from vpdeploy.cli.inspect import inspect
from vpdeploy.cli.late import complete_verb
from vpdeploy.cli.log import tell_on_stderr
from vpdeploy.cli.predict import predict
from vpdeploy.cli.serve import serve
from vpdeploy.cli.signals import Stopped, stopping
from vpdeploy.cli.task import list_tasks, remove, rollback
from vpdeploy.cli.threads import let_waiting_threads_sleep
from vpdeploy.errors import VpdeployError
from vpdeploy.files import noting_results, storage_reason

VERB_GROUP = "vpdeploy.verbs"

_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""Typer's error of a wrong command line, of which it names one kind publicly."""

_ORDER = (
    "quickstart",
    "train",
    "sweep",
    "eval",
    "import",
    "export",
    "verify",
    "convert",
    "build",
    "predict",
    "bench",
    "serve",
    "inspect",
    "gc",
    "doctor",
)


_CONTEXTS = {"serve": {"auto_envvar_prefix": "VPDEPLOY_SERVE"}}
"""Verbs whose options may be given in the environment, and the prefix of the variables."""


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """Return the command line with every verb that is installed.

    Args:
        arguments: The command line that it will be given: the verb there learns the rest of its options, which may load
            much; the others are only listed.

    Raises:
        VpdeployError: The command line names something that there is not.
    """
    app = typer.Typer(
        name="vpdeploy",
        help="Train, compile and serve prompt-tuned vision transformers: many tasks, one engine, one batch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    task_app = typer.Typer(help="Add, remove, roll back or list the tasks of a bundle.", no_args_is_help=True)
    verbs: dict[str, Callable[..., Any]] = {
        "build": build,
        "predict": predict,
        "bench": bench,
        "serve": serve,
        "inspect": inspect,
        "gc": collect,
        "doctor": doctor,
    }
    task_verbs: dict[str, Callable[..., Any]] = {"list": list_tasks, "remove": remove, "rollback": rollback}
    for point in entry_points(group=VERB_GROUP):
        group, _, name = point.name.rpartition(".")
        (task_verbs if group == "task" else verbs)[name] = point.load()
    asked, rest = _verb_in(arguments)
    for name, verb in verbs.items():
        if name == asked:
            complete_verb(verb, rest)
    for name in sorted(verbs, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)):
        app.command(name, context_settings=_CONTEXTS.get(name))(verbs[name])
    for name in sorted(task_verbs):
        task_app.command(name)(task_verbs[name])
    app.add_typer(task_app, name="task")
    app.callback()(_global_options)
    return app


def main() -> NoReturn:
    """Run the command line and exit.

    The codes: 0 ok, 1 known error, 2 usage, 3 missing extra, 4 parity failed, 130 Ctrl-C, 143 SIGTERM.
    """
    let_waiting_threads_sleep()
    arguments = sys.argv[1:]
    with stopping() as stop, watching_stdout(arguments), noting_results() as results:
        told = None
        try:
            code = _run(arguments)
        except KeyboardInterrupt:
            code = exits.INTERRUPTED
        except Stopped as stopped:
            code, told = exits.INTERRUPTED, str(stopped)
        if code == exits.INTERRUPTED:
            code = stop.exit_code
            report_stop(told or describe_results(results), code)
        sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    """Run a verb and return its exit code; an error that is known ends the process."""
    debug = "--debug" in arguments[:1] or bool(os.environ.get("VPDEPLOY_DEBUG"))
    try:
        # Typer returns the code of ``typer.Exit``, or what the verb returns, which is nothing.
        code = build_app(arguments)(standalone_mode=False)
    except VpdeployError as error:
        _fail(error, exits.exit_code(error), debug)
    except ModuleNotFoundError as error:
        known = exits.missing_extra(error)
        if known is None:
            raise
        _fail(known, exits.MISSING_EXTRA, debug)
    except BrokenPipeError:
        # The reader of our output went away; Python would complain once more while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.KNOWN_ERROR
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, typer.Abort):  # what some versions make of Ctrl-C; others return its exit code
            return exits.INTERRUPTED
        known_cause = exits.out_of_memory(error, _verb_in(arguments)[0] or "")
        if known_cause is not None:
            _fail(known_cause, exits.KNOWN_ERROR, debug)
        if not isinstance(error, OSError):
            raise
        _fail(_storage_error(error), exits.KNOWN_ERROR, debug)
    except Exception as error:
        if not isinstance(error, _USAGE_ERROR):
            raise
        fail_usage(error)
    return code if isinstance(code, int) else exits.OK


def _verb_in(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """Return the verb of a command line and what stands behind it; the options before it take no values."""
    for place, argument in enumerate(arguments):
        if not argument.startswith("-"):
            return argument, arguments[place + 1 :]
    return None, ()


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


def _global_options(
    # Eager: it is answered before Typer asks for a verb.
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors; give it before the verb.")] = False,
) -> None:
    tell_on_stderr()


def _storage_error(error: OSError) -> VpdeployError:
    """Turn an error of the operating system into one line."""
    place = f"{error.filename}: " if error.filename else ""
    if reason := storage_reason(error):
        return VpdeployError(f"{place}{reason}; make room and run the command again")
    return VpdeployError(f"{place}{error.strerror or error}")


def _fail(error: VpdeployError, code: int, debug: bool) -> NoReturn:
    if debug:
        raise error
    fail(error, code)
