"""`medfusion detect`: maps, findings, and a page for each scan to review them on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medfusion.tasks.detect import Detection
    from medfusion.tasks.runner import Run
    from medfusion.volume import Volume


def detect_scans(input: Path, output: Path, *, prior: str, method: str, **options: Any) -> Run:
    """Detect, with ``CASE_review.html`` beside the results of each scan."""
    from medfusion.report.review import write_review
    from medfusion.tasks.detect import detect

    def page(path: Path, scan: Volume, found: Detection) -> None:
        shown = {"p of the heaviest region": f"{found.scan_p:.3g}", "Prior": prior, "Method": method}
        write_review(
            path,
            scan,
            found.signed.array,
            found.findings,
            threshold=found.threshold,
            facts=shown | ({"Cautions": [found.flag]} if found.flag else {}),
            mask=found.mask.array,
            overwrite=options["overwrite"] or options["resume"],
        )

    return detect(input, output, prior=prior, method=method, page=page, **options)
