"""Training."""

from medfusion.training.audit import Audit
from medfusion.training.loop import read_run, train
from medfusion.training.plan import plan_config, with_classes
from medfusion.training.scans import load_cases, load_domains, load_training_set

__all__ = [
    "Audit",
    "load_cases",
    "load_domains",
    "load_training_set",
    "plan_config",
    "read_run",
    "train",
    "with_classes",
]
