"""Muon: updates are orthogonal matrices of AdamW's size; both optimisers survive a checkpoint."""

import io

import pytest
import torch
from prior_factory import tiny_config

from medfusion.prior import build_network
from medfusion.training.optimizer import Muon, build_optimizers, orthogonal


@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (32, 32)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))
    singular = torch.logspace(0, -1.5, min(shape))
    matrix = 7 * u @ torch.diag(singular) @ v.T
    result, other = orthogonal(torch.stack([matrix, -1e-4 * matrix]))
    values = u.T @ result @ v  # diagonal where the singular vectors are those of the matrix
    assert 0.6 < float(values.diag().min()) <= float(values.diag().max()) < 1.3
    assert float((values - values.diag().diag()).abs().max()) < 0.02
    torch.testing.assert_close(other, -result, atol=0.02, rtol=0)
    torch.testing.assert_close(result, u @ values @ v.T, atol=0.02, rtol=0)


def test_rounds_on_the_small_matrix_are_the_rounds_of_the_paper() -> None:
    """X <- a X + (b X X^T + c (X X^T)^2) X on the matrix itself, with singular values down to 1e-5 of the largest."""
    u, _, v = torch.linalg.svd(torch.randn(3, 24, 200, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrices = u @ torch.logspace(0, -5, 24).diag() @ v
    x = matrices.double() / torch.linalg.matrix_norm(matrices.double(), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    torch.testing.assert_close(orthogonal(matrices).double(), x, atol=1e-3, rtol=0)


def test_updates_have_the_size_of_adamws_whatever_the_gradient() -> None:
    for scale in (1e-3, 1e3):
        kernel = torch.nn.Parameter(torch.zeros(16, 16, 3, 3, 3))
        kernel.grad = scale * torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
        Muon([kernel], 0.01).step()
        size = float(kernel.detach().square().mean().sqrt()) / (0.2 * 0.01)
        assert 0.7 < size < 1.2  # as its singular values are after five rounds
        assert float((kernel.detach() * kernel.grad).sum()) < 0


def test_muon_needs_fewer_steps_where_the_problem_is_ill_conditioned() -> None:
    """Inputs a hundredfold larger in some directions: AdamW, whose scaling is by coordinate, follows these."""
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(27, 27, generator=generator))
    inputs = torch.randn(512, 27, generator=generator) * torch.logspace(0, -2, 27) @ turn
    wanted = torch.randn(8, 27, generator=generator)
    errors = {}
    for name in ("muon", "adamw"):
        kernel = torch.nn.Parameter(torch.zeros(8, 1, 3, 3, 3))
        optimizer = Muon([kernel], 0.1) if name == "muon" else torch.optim.AdamW([kernel], 0.1, betas=(0.9, 0.99))
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
            optimizer.zero_grad()
            loss = (inputs @ (kernel.flatten(1) - wanted).T).square().mean()
            loss.backward()
            optimizer.step()
        errors[name] = float(loss.detach())
    assert errors["muon"] < errors["adamw"]


def test_muon_takes_the_inner_kernels_and_every_weight_is_taken_once() -> None:
    network = build_network(tiny_config())
    muon, adamw = build_optimizers(network, tiny_config(training={"optimizer": "muon"}).training)
    taken = {id(p): optimizer for optimizer in (muon, adamw) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in network.named_parameters():
        inner = parameter.ndim == 5 and not name.startswith(("head", "tail"))
        assert taken.pop(id(parameter)) is (muon if inner else adamw)
    assert not taken
    assert len(build_optimizers(network, tiny_config().training)) == 1


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_state_comes_back_from_a_file_bit_for_bit_in_channels_last(name: str) -> None:
    settings = tiny_config(training={"optimizer": name}).training

    def step(network, optimizers, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter).normal_(generator=generator)
        for optimizer in optimizers:
            optimizer.step()

    network = build_network(tiny_config()).to(memory_format=torch.channels_last_3d)
    optimizers = build_optimizers(network, settings)
    step(network, optimizers, 1)
    file = io.BytesIO()
    torch.save([network.state_dict(), [optimizer.state_dict() for optimizer in optimizers]], file)
    step(network, optimizers, 2)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    again = build_network(tiny_config()).to(memory_format=torch.channels_last_3d)
    again.load_state_dict(weights)
    restored = build_optimizers(again, settings)
    for optimizer, state in zip(restored, states, strict=True):
        optimizer.load_state_dict(state)
    step(again, restored, 2)
    torch.testing.assert_close(again.state_dict(), network.state_dict(), rtol=0, atol=0)
