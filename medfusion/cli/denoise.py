"""`medfusion denoise`: the estimate alone, or the denoised scans with a page for each that shows what was taken off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfusion.cli.show import show_run
from medfusion.errors import MedfusionError

if TYPE_CHECKING:
    from medfusion.report import Section
    from medfusion.tasks.audit import Audit
    from medfusion.tasks.denoise import Denoised
    from medfusion.volume import Volume


def denoise_scans(input: Path, output: Path, *, adapt: float | None, prior: str, **options: Any) -> int:
    """Denoise, with a prior adapted first where ``adapt`` says for how many minutes; returns the exit code."""
    import typer

    from medfusion.io.output import check_output
    from medfusion.prior import prior_path, read_metadata
    from medfusion.tasks.adapt import adapt_prior
    from medfusion.tasks.denoise import denoise
    from medfusion.tasks.runner import single_file

    if adapt is not None:
        check_output(output, input)  # not only after minutes of training
        path = (output.parent if single_file(output) else output) / "adapted.safetensors"
        resumed = options["resume"] and path.exists()
        if resumed and read_metadata(path)[0].name == read_metadata(prior_path(prior))[0].name:
            typer.echo(f"{path.name}: as an earlier run left it")
        else:
            shared = {name: options[name] for name in ("sigma", "kind", "seed", "device", "volume")}
            replaced = options["overwrite"] or options["resume"]
            found = adapt_prior(input, path, minutes=adapt, prior=prior, overwrite=replaced, **shared)
            verdict = "kept" if found.kept else f"no gain beyond chance, {prior} is used as it is"
            typer.echo(
                f"adapted in {found.steps} steps: squared error on voxels kept back, as estimated without clean scans, "
                f"{found.before:.3f} of the noise's before, {found.after:.3f} after: {verdict}"
            )
            for reason in found.left_out:
                typer.echo(f"not adapted to: {reason}")
        prior = str(path)

    def page(main: Path, scan: Volume, result: Denoised, audit: Audit | None) -> None:
        from medfusion.report import write_report

        path = main.with_name(main.name.removesuffix(".gz").removesuffix(".nii") + ".html")
        section = _section(scan, result, audit)
        write_report(path, scan.name, [section], subtitle="What was taken off, and is it noise?")

    return show_run(denoise(input, output, prior=prior, seen=page, **options), output)


def _section(scan: Volume, result: Denoised, audit: Audit | None) -> Section:
    """Scan, result, what was taken off and how sure the result is, with the verdict."""
    import numpy as np

    from medfusion.report import Figure, KeyValues, Section, comparison_figure, slice_figure
    from medfusion.tasks.denoise import summary

    columns = {"scan": scan, "denoised": result.volume}
    picture = comparison_figure(columns, difference=("scan", "denoised"))
    blocks: list[Any] = [summary(result, audit), Figure(picture, "Slices before and after, and the difference.")]
    if audit is not None:
        if not audit.warnings:
            blocks.insert(1, "What was taken off is noise, as far as its structure, strength, spectrum and edges tell.")
        blocks.append(
            KeyValues(
                {
                    "Structure": f"{audit.structured:.3%} of the tissue",
                    "More than the noise": f"{audit.loud:.2%} of the tissue",
                    "Power by frequency, low to high": ", ".join(f"{power:.2f}" for power in audit.spectrum),
                    "Correlation with edges": f"{audit.edges:.3f}",
                    "Noise that neighbours share": f"{result.noise.shared:.1%}",
                }
            )
        )
    if len(result.samples) > 1:
        spread = result.std
        picture = slice_figure(spread, window=(0.0, float(np.percentile(spread.array, 99.9))))
        blocks.append(Figure(picture, "Standard deviation of the samples.", "Where the result is less certain."))
    return Section("Verdict", blocks)


def show_estimates(input: Path, *, prior: str, device: str | None, volume: int | None, as_json: bool) -> int:
    """Print the noise of every scan under a path and write nothing; returns the exit code.

    Raises
    ------
    MedfusionError : there is no scan under the path, or no such prior or device.
    """
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from medfusion.io import discover
    from medfusion.prior import Prior
    from medfusion.tasks.runner import pick_device

    loaded = Prior.load(prior, pick_device(device))
    rows = [_estimate(series, loaded, volume) for series in discover(input)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        table = Table(title=f"Noise, prior {loaded.name}", title_justify="left")
        for column in ("case", "sigma", "of bright tissue", "kind", "shared by neighbours", "verdict"):
            table.add_column(column, overflow="fold")
        for row in rows:
            sigma, shares = row["sigma"], (row["relative"], row["shared"])
            known = ["" if sigma is None else f"{sigma:.4g}", *("" if s is None else f"{s:.1%}" for s in shares)]
            table.add_row(escape(row["case"]), known[0], known[1], row["kind"], known[2], escape(row["verdict"]))
        Console().print(table)
    failed = sum(row["sigma"] is None for row in rows)
    return 0 if not failed else 2 if failed == len(rows) else 1


def _estimate(series: Any, prior: Any, volume: int | None) -> dict[str, Any]:
    from medfusion.io import read_volumes
    from medfusion.tasks.denoise import noise_verdict, series_noise

    row: dict[str, Any] = dict.fromkeys(("case", "sigma", "relative", "kind", "shared", "verdict"))
    row["case"] = series.name
    try:
        if series.problems:
            raise MedfusionError("; ".join(series.problems))
        scans = list(read_volumes(series, volume))
        noise = series_noise(scans, prior)
    except MedfusionError as error:
        return row | {"verdict": str(error)}
    relative, verdict = noise_verdict(scans[0], noise, prior)
    return row | {
        "sigma": noise.sigma,
        "relative": relative,
        "kind": noise.kind,
        "shared": noise.shared,
        "verdict": verdict,
    }
