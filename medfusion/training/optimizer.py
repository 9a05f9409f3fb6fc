"""Optimisers: Muon for the convolutions inside the network with AdamW for the rest, or AdamW for everything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from medfusion.config import TrainingConfig

WEIGHT_DECAY = 1e-5
BETAS = (0.9, 0.99)
ADVERSARIAL_BETAS = (0.0, 0.99)  # momentum makes players turn round each other (Mescheder et al. 2018)
ADAMW_RATE = 6e-4  # of what Muon does not update: the usual rate of AdamW for this network
MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)  # pushes singular values of (0, 1] to about 1 in five rounds


def build_optimizers(network: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """One optimiser, or Muon and AdamW; every group keeps its full rate as ``initial_lr``."""
    parameters = dict(network.named_parameters())
    inner = [p for name, p in parameters.items() if p.ndim == 5 and not name.startswith(("head", "tail"))]
    if config.optimizer != "muon":
        betas = BETAS if config.optimizer == "adamw" else ADVERSARIAL_BETAS
        optimizers: list[torch.optim.Optimizer] = [_adamw(parameters.values(), config.learning_rate, betas)]
    else:
        others = [p for p in parameters.values() if all(p is not q for q in inner)]
        optimizers = [Muon(inner, config.learning_rate), _adamw(others, ADAMW_RATE)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _adamw(
    parameters: Iterable[nn.Parameter], rate: float, betas: tuple[float, float] = BETAS
) -> torch.optim.Optimizer:
    # fused: without it AdamW spent 15 % of a step dividing (two cores)
    return torch.optim.AdamW(list(parameters), rate, betas=betas, weight_decay=WEIGHT_DECAY, fused=True)


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is replaced by the nearest orthogonal matrix (Jordan et al. 2024).

    A kernel (out, in, k, k, k) is taken as the matrix (out, in k^3). Updates have the root mean square of AdamW's, 0.2
    (Liu et al. 2025), so the two can share a schedule. torch.optim.Muon takes matrices only, and works in
    bfloat16 also where that is emulated: twelve times slower on a CPU without it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(list(parameters), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every kernel that has a gradient; those of one shape together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, kernels in shapes.items():
                matrices = torch.stack([self._look_ahead(p).flatten(1) for p in kernels])
                scale = 0.2 * max(matrices.shape[1:]) ** 0.5
                for p, update in zip(kernels, orthogonal(matrices), strict=True):
                    p.add_(update.view(shape), alpha=-group["lr"] * scale)

    def _look_ahead(self, p: nn.Parameter) -> Tensor:
        """Nesterov's momentum."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum: Tensor = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(momentum, MOMENTUM)


def orthogonal(matrices: Tensor, rounds: int = 5) -> Tensor:
    """(n, a, b): U V^T of each matrix U S V^T, its singular values being 0.7 to 1.2 instead of 1 after five rounds.

    Each round is X <- p(G) X with G = X X^T. All p(G) commute, so the rounds are worked out on G, which is small,
    and X itself is multiplied once: a third of the time for kernels, whose matrices are wide.
    """
    a, b, c = QUINTIC
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    gram, one = x @ x.mT, torch.eye(x.shape[1]).to(x)
    product = one.expand_as(gram)
    for _ in range(rounds):
        factor = a * one + b * gram + c * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    x = product @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT
