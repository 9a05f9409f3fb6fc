"""What should worry whoever watches a training: gradients that burst, modes or latents that are lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

BURST = 50.0  # times the usual gradient
USUAL = 10  # rows of metrics.jsonl from which it is known
LEAST_DIVERSITY = 0.5  # of samples, where that of scans is 1
LARGEST_GAP = 10.0  # between the logits of scans and of samples: e^-10 is what is left for the generator to learn from


def burst(norms: Sequence[float]) -> str:
    """Of the largest gradient of each row so far, the last one: "" or what is wrong with it."""
    *before, last = norms
    if len(before) < USUAL or last <= BURST * float(np.median(before)):
        return ""
    times = last / float(np.median(before))
    return f"the gradient is {times:.0f} times as long as usual: a lower learning_rate, a larger batch"


def lost(found: Mapping[str, float]) -> str:
    """Of what a validation found: "" or what is lost."""
    if found.get("latents_in_use") == 0:
        return "no latent is in use (posterior collapse): a smaller autoencoder.beta, or a longer beta_warmup"
    if found.get("diversity", 1.0) < LEAST_DIVERSITY:
        return f"samples differ by {found['diversity']:.2f} of what scans do (mode collapse): a larger gan.penalty"
    if found.get("logit_real", 0.0) - found.get("logit_generated", 0.0) > LARGEST_GAP:
        return "the discriminator tells all samples from scans, and teaches nothing more: a larger gan.penalty"
    return ""
