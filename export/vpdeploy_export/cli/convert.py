"""``vpdeploy convert``: a bundle to the files of another runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from vpdeploy.cli.threads import Threads
from vpdeploy.errors import SpecError
from vpdeploy.format.bundle import Bundle

TARGET_NAMES: Final = ("onnx-adapter", "triton", "ep-context")
"""The names of ``vpdeploy_export.targets.TARGETS``, which loads torch."""


def convert(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="onnx-adapter, triton or ep-context.")],
    out: Annotated[Path, typer.Option(help="The folder to write; for triton the model repository.")],
    name: Annotated[str | None, typer.Option(help="triton: the model's name; default: the bundle's.")] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="triton, ep-context: images in one run at most; default 32.")
    ] = None,
    queue_delay_ms: Annotated[
        float | None, typer.Option(help="triton: how long a batch waits to fill; default 2.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="triton: auto, cpu or gpu; default auto.")] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            help="ep-context: TensorrtExecutionProvider (default) or NvTensorRTRTXExecutionProvider.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Images to compare on; default: synthetic ones.")] = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert a bundle for another runtime. Nothing is written unless the result answers as the bundle does."""
    if to not in TARGET_NAMES:
        raise SpecError(f"--to '{to}': choose one of {', '.join(TARGET_NAMES)}")
    if not bundle.is_file():  # which is refused with more words
        Bundle.open(bundle)

    from vpdeploy_export.conversion import convert as convert_bundle
    from vpdeploy_export.targets.target import TargetOptions
    from vpdeploy_train.device import use_threads

    use_threads(threads)
    options = TargetOptions(
        name=name, max_batch=max_batch, queue_delay_ms=queue_delay_ms, device=device, provider=provider
    )
    report = convert_bundle(bundle, out, target=to, options=options, images=images)
    if as_json:
        typer.echo(json.dumps(report.to_fields(), indent=2, ensure_ascii=False))
        return
    typer.echo(f"{report.path}: {to}, {report.size_bytes / 1e6:.1f} MB, {len(report.parity)} tasks")
    for each in report.parity:
        typer.echo(
            f"  {each.task}: max |Δ logit| {each.max_abs_difference:.2g} (allowed {each.allowed_difference:.2g}) on "
            f"{report.source}"
        )
    typer.echo(f"next: {report.next_step}")
