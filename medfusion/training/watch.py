"""What should worry whoever watches a training: gradients that burst, modes or latents that are lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

BURST = 50.0  # times the usual gradient
USUAL = 10  # rows of metrics.jsonl from which it is known
LEAST_DIVERSITY = 0.5  # of samples, where that of scans is 1
# Between the logits of scans and of samples. e^-10 of its gradient is left to the discriminator: it learns no more, and
# what it tells the generator is arbitrary (Arjovsky & Bottou 2017). A critic's answers have no such scale.
LARGEST_GAP = 10.0


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
    for domain in (name.removesuffix("logit_real") for name in found if name.endswith("logit_real")):
        if found[f"{domain}logit_real"] - found[f"{domain}logit_generated"] > LARGEST_GAP:
            return "the discriminator tells all samples from scans, and learns nothing more: a larger penalty"
    return ""
