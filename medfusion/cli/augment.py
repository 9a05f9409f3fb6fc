"""`medfusion augment`: learn a prior where none is named, generate, audit, and write the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from medfusion.cli.show import show_run
from medfusion.errors import MedfusionError

if TYPE_CHECKING:
    from medfusion.tasks.audit_synthetic import Audit
    from medfusion.tasks.augment import Request
    from medfusion.tasks.runner import Run

REPORT = "report.html"


def augment_set(
    input: Path,
    output: Path,
    *,
    prior: str | None,
    config: Path | None,
    audit_steps: int,
    device: str | None,
    overwrite: bool,
    resume: bool,
    **asked: Any,
) -> int:
    """Generate and audit new cases; returns the exit code."""
    from medfusion.tasks.augment import Request

    request = Request(**asked)
    if prior is None:
        learnt = _learn(input, output, request, config, device=device, overwrite=overwrite, resume=resume)
        if learnt is None:
            return 130
        prior = str(learnt)
    elif config is not None:
        raise MedfusionError("--config is for learning a prior, and --prior names one", fix="leave one of them out")
    given = {"audit_steps": audit_steps, "device": device, "overwrite": overwrite, "resume": resume}
    run, audit = augment_and_report(input, output, request, prior=prior, **given)
    code = show_run(run, output)
    if audit is not None:
        show_audit(audit)
        Console().print(f"Report: {output / REPORT}", markup=False, highlight=False, soft_wrap=True)
    return code


def augment_and_report(
    input: Path, output: Path, request: Request, *, prior: str, **given: Any
) -> tuple[Run, Audit | None]:
    """``medfusion.tasks.augment.augment``, with REPORT beside the dataset."""
    from medfusion.report.augment import augment_sections
    from medfusion.report.page import write_report
    from medfusion.tasks.augment import augment

    run, audit = augment(input, output, request, prior=prior, **given)
    if audit is not None:
        title = f"Synthetic cases for {input.absolute().name}"
        write_report(output / REPORT, title, augment_sections(input, output, run, audit))
    return run, audit


def _learn(
    input: Path,
    output: Path,
    request: Request,
    config: Path | None,
    *,
    device: str | None,
    overwrite: bool,
    resume: bool,
) -> Path | None:
    """The prior of the training set, trained in OUT/prior unless an earlier run has; None when interrupted."""
    from medfusion.cli.train import train_cases
    from medfusion.config import load_config
    from medfusion.tasks.augment import check_prior, check_request
    from medfusion.training import load_training_set, plan_config, with_classes

    real, out = check_request(input, output, request), output / "prior"
    prior = out / "prior.safetensors"
    if resume and prior.exists():
        return prior
    settings = plan_config(real) if config is None else load_config(config)
    if request.classes:
        settings = with_classes(settings, real, Path(request.classes))
    check_prior(settings.name, settings, real, request)
    done = train_cases(
        lambda **given: load_training_set(real, settings, **given),
        settings,
        [input],
        out,
        cache=out / "cache",
        device=device,
        overwrite=overwrite,
        resume=resume and (out / "checkpoint.pt").exists(),
    )
    return prior if done == 0 else None


def show_audit(audit: Audit) -> None:
    """Print the figures of the audit, real beside synthetic, and what was dropped."""
    from medfusion.report.augment import audit_rows

    console = Console()
    table = Table(title="Audit", title_justify="left")
    for column in ("measure", "synthetic", "real"):
        table.add_column(column, overflow="fold")
    for row in audit_rows(audit):
        table.add_row(*row)
    console.print(table)
    console.print(f"{len(audit.dropped)} of {len(audit.cases)} cases dropped", highlight=False)
    for name, reason in audit.dropped.items():
        console.print(f"  {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
