"""Training."""

from medfusion.training.audit import Audit
from medfusion.training.loop import read_run, train
from medfusion.training.scans import load_cases

__all__ = ["Audit", "load_cases", "read_run", "train"]
