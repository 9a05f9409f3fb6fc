"""Whole-or-nothing output: write beside the target, then rename; check the output folder before work starts."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medfusion.errors import MedfusionError

FILES = {".nii", ".gz", ".safetensors", ".csv", ".json", ".html"}  # suffixes that no folder is replaced under
ANOTHER = "choose another name"
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staged(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file or folder to; it takes the name ``path`` when the block succeeds.

    On any exception, Ctrl-C included, what was written is removed and an existing ``path`` is left as it was.
    The yielded path does not exist yet and keeps the suffix of ``path``, so that ``.nii.gz`` is still recognised;
    its name begins with a dot, so that discovery passes over it. Missing parent folders are made.

    Raises
    ------
    MedfusionError : ``path`` exists and ``overwrite`` is False; it is a folder, which no file replaces; its folder
        cannot be written; the disk is full.
    """
    if os.path.lexists(path) and not overwrite:
        raise MedfusionError(
            f"{path.name}: the output exists already",
            path=path,
            fix="--overwrite replaces it, --resume keeps what is whole and does the rest",
        )
    require_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and path.suffix in FILES:
        raise MedfusionError(f"{path.name}: a folder is in the way of the file", path=path, fix=ANOTHER)
    beside = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
    try:
        with disk_full_told(path, beside):
            yield beside
            _rename(beside, path)
    finally:
        _remove(beside)


@contextmanager
def disk_full_told(path: Path, beside: Path | None = None) -> Iterator[None]:
    """Around writing ``path``, or ``beside`` in its place.

    Raises
    ------
    MedfusionError : the disk is full.
    """
    try:
        yield
    except OSError as error:
        if not _disk_full(error):
            raise
        raise MedfusionError(
            f"{path.name}: no space left to write it",
            path=path,
            written=_size(_bytes_in(beside or path)),
            free=_size(shutil.disk_usage(path.parent).free),
            fix="free some space or choose an output folder on another disk",
        ) from error


def check_output(out: Path, inputs: Path) -> None:
    """Check, before work starts, that ``out`` can be written and is apart from ``inputs``.

    ``out`` is a folder, or one NIfTI file or prior, which may exist: ``staged`` refuses or replaces it. Symbolic links
    are followed. Nothing is left behind and ``out`` itself is not made.

    Raises
    ------
    MedfusionError : ``out`` is, lies inside or contains ``inputs``; a file is in the way; the folder is not writable.
    """
    out_real, inputs_real = out.resolve(), inputs.resolve()
    if out_real == inputs_real or inputs_real in out_real.parents:
        where = "is" if out_real == inputs_real else "lies inside"
        raise MedfusionError(
            f"the output {where} the input", out=out_real, input=inputs_real, fix="write beside the input"
        )
    if out_real in inputs_real.parents and inputs_real.is_dir():
        raise MedfusionError(
            "the input lies inside the output",
            out=out_real,
            input=inputs_real,
            fix="choose an empty or new folder, for example a sub-folder beside the input",
        )
    require_writable(out_real.parent if out.name.endswith((".nii", ".nii.gz", ".safetensors")) else out_real)


def require_writable(folder: Path) -> None:
    """Raise unless ``folder``, or the nearest folder above it that exists, takes a new file."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not nearest.is_dir():
        raise MedfusionError(
            f"{folder}: a file is in the way of the output folder", file=nearest, fix="choose another output folder"
        )
    try:
        with tempfile.TemporaryFile(dir=nearest):  # the only test that also knows read-only disks, quotas and root
            pass
    except OSError as error:
        raise MedfusionError(
            f"{folder}: the output folder cannot be written",
            folder=nearest,
            reason=error.strerror,
            fix="choose another output folder or change its permissions",
        ) from error


def _rename(source: Path, target: Path) -> None:
    """Rename over ``target``; a folder in its place is set aside first and put back if the rename fails."""
    if source.is_file() and target.is_dir() and not target.is_symlink():
        raise MedfusionError(f"{target.name}: a folder is in the way of the file", path=target, fix=ANOTHER)
    if not target.is_dir() and not source.is_dir():
        os.replace(source, target)
        return
    aside = target.with_name(f".replaced-{secrets.token_hex(4)}-{target.name}")
    try:
        if os.path.lexists(target):
            os.rename(target, aside)
        os.rename(source, target)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(target):
            os.rename(aside, target)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one it came from, is a full disk: pydicom re-raises without the error number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _bytes_in(path: Path) -> int:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path] if path.is_file() else []
    return sum(p.stat().st_size for p in files)


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
