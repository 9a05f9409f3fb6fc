"""`medfusion errors tag`: choose the cases that are looked at, and serve the page on which they are."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medfusion.errors import MedfusionError, some

if TYPE_CHECKING:
    import pandas as pd

    from medfusion.io import Series

KEPT = 6  # cases whose pictures are held ready


def cases_to_look_at(judged: pd.DataFrame, correct: int, seed: int) -> list[str]:
    """All errors and ``correct`` of the others, drawn at random, mixed so that nobody can tell which is which."""
    rng = np.random.default_rng(seed)
    wrong = judged.index[judged["error"]].to_numpy(str)
    right = judged.index[~judged["error"]].to_numpy(str)
    chosen = rng.choice(right, min(correct, len(right)), replace=False)
    return [str(name) for name in rng.permutation(np.concatenate([wrong, chosen]))]


def tag_cases(
    cases: list[str],
    images: Path | None,
    *,
    predictions: Path | None,
    truths: Path | None,
    store: Path,
    tags: list[str],
    import_csv: Path | None,
    title: str,
    port: int,
) -> int:
    """Serve the tagging page until Ctrl-C; returns the exit code.

    Raises
    ------
    MedfusionError : a case has no scan, prediction or truth; the store or the port cannot be used.
    """
    import typer

    from medfusion.analysis.tag_store import TagStore
    from medfusion.analysis.tags import read_tags
    from medfusion.io import discover
    from medfusion.report.tagging import Study, TaggingServer

    folders = {"scan": images, "prediction": predictions, "truth": truths}
    found = {name: _named(discover(folder), cases, folder) for name, folder in folders.items() if folder is not None}
    kept = TagStore(store, tags)
    try:
        if import_csv is not None:
            kept.take_in(read_tags(import_csv))
    except ValueError as error:
        raise MedfusionError(f"{import_csv}: cannot be taken in", reason=error) from error
    pictures = lru_cache(KEPT)(lambda case: _pictures({name: series[case] for name, series in found.items()}))
    try:
        server = TaggingServer(Study(title, cases, pictures, kept), port)
    except OSError as error:
        raise MedfusionError(f"--port {port}: cannot be used ({error.strerror})", fix="leave --port out") from error
    typer.echo(f"{len(cases)} cases to look at. Open this address on this machine, and keep it to yourself:")
    typer.echo(f"  {server.address}")
    typer.echo(f"Tags are kept in {store}. Ctrl-C ends it.")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


def _named(series: list[Series], cases: list[str], folder: Path) -> dict[str, Series]:
    by_name = {one.name: one for one in series}
    missing = [case for case in cases if case not in by_name]
    if missing:
        raise MedfusionError(f"cases without a file in {folder}", cases=some(missing), files=some(by_name))
    return {case: by_name[case] for case in cases}


def _pictures(series: dict[str, Series]) -> dict[str, bytes]:
    """What the viewer shows of a case: the scan, and where prediction and truth are not 0."""
    from medfusion.io import read
    from medfusion.report.viewer import block_affine, blocks, display_factors, nifti, scan_nifti

    pictures = {}
    for name, one in series.items():
        volume = read(one)
        factors = display_factors(volume)
        affine = block_affine(volume.affine, factors)
        if name == "scan":
            pictures[name] = scan_nifti(blocks(volume.array, factors, np.mean), affine)
        else:
            pictures[name] = nifti(blocks(volume.array > 0, factors, np.max), affine)
    return pictures
