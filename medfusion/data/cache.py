"""Prepared scans on the disk: made once, memory-mapped ever after, so that a set may be larger than memory.

Each Case is one ``.safetensors`` file whose name is the hash of all it was made from. When a file or a setting changes,
the name does, and what lay under the old name is never read again; nothing is deleted, for other runs may share the
folder. MONAI's ``PersistentDataset`` does not do this: it moves each file over from the temporary folder, which is not
atomic across disks, reads files whole, and does not see that a scan has changed under its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from medfusion.config import PreprocessingConfig
from medfusion.data.crops import Case
from medfusion.io import staged

CACHE_VERSION = 2  # to be raised whenever the same files and settings give another Case, or more is said about it


def cache_file(
    folder: Path, name: str, kind: float, config: PreprocessingConfig, files: Mapping[str, Sequence[Path]]
) -> Path:
    """Where in ``folder`` the Case of this name and kind lies, made from ``files`` (role to paths) as they are now."""
    sources = []
    for role, paths in files.items():
        for path in paths:
            status = path.stat()
            sources.append((role, str(path.resolve()), status.st_size, status.st_mtime_ns))
    key = json.dumps([CACHE_VERSION, config.model_dump(mode="json"), name, kind, sources])
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def save_case(path: Path, case: Case, about: str) -> None:
    """Write a Case, whole or not at all, with a text that `load_case` gives back; its class is left out.

    Raises
    ------
    MedfusionError : the folder cannot be written, or the disk is full.
    """
    tensors = {"image": case.image.contiguous()}
    if case.labels is not None:
        tensors["labels"] = case.labels.contiguous()
    facts = {"name": case.name, "centre": case.centre.tolist(), "spacing": case.spacing, "kind": case.kind}
    metadata = {"case": json.dumps(facts | {"about": about})}  # one entry: safetensors writes several in random order
    with staged(path, overwrite=True) as unfinished:
        unfinished.write_bytes(save(tensors, metadata))


def load_case(path: Path) -> tuple[Case, str] | None:
    """A Case, its voxels memory-mapped, and the text saved with it; None where the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            facts, names = json.loads((file.metadata() or {})["case"]), set(file.keys())
            case = Case(
                facts["name"],
                file.get_tensor("image"),
                np.array(facts["centre"]),
                facts["spacing"],
                facts["kind"],
                file.get_tensor("labels") if "labels" in names else None,
            )
            return case, facts["about"]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
