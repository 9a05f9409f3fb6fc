"""Training: the loss falls, a resumed run is the unbroken one bit for bit, what goes wrong is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prior_factory import grid, head, tiny_config
from pydantic import ValidationError

from medfusion.config import Config
from medfusion.data.crops import Batch, Case, prepare
from medfusion.diffusion import VE, VP, SubVP
from medfusion.errors import MedfusionError
from medfusion.prior import Prior, build_network
from medfusion.training import loop, read_checkpoint, train
from medfusion.training.loop import VALIDATION_TIMES
from medfusion.volume import Volume


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Five heads that differ by their noise alone."""
    affine, shape = grid((40, 40, 40)), (40, 40, 40)
    volumes = [Volume(head(affine, shape, noise=5, seed=n), affine, f"case{n}") for n in range(5)]
    return [prepare(volume, tiny_config().preprocessing) for volume in volumes]


def config(**training: Any) -> Config:
    return tiny_config(training=training)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_seconds(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return Prior.load(out / "prior.safetensors").network.state_dict()


def interrupt_at(step: int) -> Callable[[int, float], None]:
    def progress(done: int, loss: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def test_the_loss_falls(tmp_path: Path, cases: list[Case]) -> None:
    losses: list[float] = []
    chosen = config(steps=60, batch=4, checkpoint_every=20, ema_half_life=20, learning_rate=1e-2, warmup=5)
    prior = train(cases, chosen, tmp_path, device="cpu", progress=lambda step, loss: losses.append(loss))
    assert len(losses) == 60
    assert np.mean(losses[-15:]) < 0.85 * np.mean(losses[:5])
    first, *_, last = rows(tmp_path)
    assert np.mean(list(last["validation"].values())) < np.mean(list(first["validation"].values()))
    assert prior.provenance["validation_loss"] == pytest.approx(last["validation"], abs=1e-4)


def test_what_a_run_leaves(tmp_path: Path, cases: list[Case]) -> None:
    out = tmp_path / "runs" / "first"
    prior = train(cases, config(), out, data="five phantoms", device="cpu")
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "metrics.jsonl", "prior.safetensors"}
    assert [row["step"] for row in rows(out)] == [2, 4]
    for row in rows(out):
        assert set(row) == {"step", "loss", "validation", "seconds"}
        assert [float(t) for t in row["validation"]] == list(VALIDATION_TIMES)
        assert all(np.isfinite([row["loss"], row["seconds"], *row["validation"].values()]))
    loaded = Prior.load(out / "prior.safetensors")
    assert loaded.config == config()
    assert loaded.provenance == prior.provenance
    about = loaded.provenance
    assert (about["data"], about["training_scans"], about["validation_scans"]) == ("five phantoms", 4, 1)
    assert (about["steps"], about["torch"]) == (4, torch.__version__)
    assert about["parameters"] == sum(parameter.numel() for parameter in prior.network.parameters())
    for name, weight in prior.network.state_dict().items():
        torch.testing.assert_close(loaded.network.state_dict()[name], weight.half().float(), rtol=0, atol=0)


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path: Path, cases: list[Case]) -> None:
    chosen = config(steps=7, checkpoint_every=3)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    train(cases, chosen, unbroken, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(cases, chosen, broken, device="cpu", progress=interrupt_at(5))
    assert read_checkpoint(broken, chosen)["step"] == 3
    assert not (broken / "prior.safetensors").exists()
    steps: list[int] = []
    train(cases, chosen, broken, resume=True, device="cpu", progress=lambda step, loss: steps.append(step))
    assert steps == [4, 5, 6, 7]
    assert without_seconds(broken) == without_seconds(unbroken)
    one, other = (read_checkpoint(out, chosen) for out in (unbroken, broken))
    for part in ("step", "network", "ema", "optimizer"):
        torch.testing.assert_close(other[part], one[part], rtol=0, atol=0)
    torch.testing.assert_close(weights(broken), weights(unbroken), rtol=0, atol=0)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, config(), tmp_path, device="cpu")
    before, measured = weights(tmp_path), rows(tmp_path)
    train(cases, config(), tmp_path, resume=True, device="cpu", progress=interrupt_at(5))
    torch.testing.assert_close(weights(tmp_path), before, rtol=0, atol=0)
    assert rows(tmp_path) == measured


def test_a_new_run_cannot_be_resumed_from_the_checkpoint_of_the_one_before(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, config(), tmp_path, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(cases, config(), tmp_path, device="cpu", progress=interrupt_at(1))
    with pytest.raises(MedfusionError, match="no checkpoint to resume from"):
        read_checkpoint(tmp_path, config())
    train(cases, config(), tmp_path, device="cpu")
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]


def test_another_seed_is_another_run(tmp_path: Path, cases: list[Case]) -> None:
    losses: dict[int, list[float]] = {1: [], 2: []}
    for seed, noted in losses.items():
        train(cases, config(seed=seed), tmp_path / str(seed), device="cpu", progress=lambda _, x, n=noted: n.append(x))
    assert losses[1] != losses[2]


def test_another_config_cannot_be_resumed(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, config(), tmp_path, device="cpu")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(MedfusionError, match="was made with another config"):
        train(cases, config(learning_rate=1e-4), tmp_path, resume=True, device="cpu")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_settings_that_do_not_exist_is_another_config(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, config(), tmp_path, device="cpu")
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"config": state["config"].replace('"batch"', '"bunch"')}, path)
    with pytest.raises(MedfusionError, match="was made with another config"):
        read_checkpoint(tmp_path, config())


def test_a_checkpoint_from_before_a_setting_was_there_can_be_resumed(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, config(), tmp_path, device="cpu")
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"config": state["config"].replace('"family":"vp",', "")}, path)
    assert "family" not in torch.load(path, weights_only=True)["config"]
    assert read_checkpoint(tmp_path, config())["step"] == 4


def test_nothing_to_resume_from(tmp_path: Path, cases: list[Case]) -> None:
    with pytest.raises(MedfusionError, match="no checkpoint to resume from"):
        train(cases, config(), tmp_path, resume=True, device="cpu")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None], ids=["empty", "text", "truncated"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, cases: list[Case], content: bytes | None) -> None:
    path = tmp_path / "checkpoint.pt"
    if content is None:
        train(cases, config(), tmp_path, device="cpu")
        content = path.read_bytes()[:-1000]
    path.write_bytes(content)
    with pytest.raises(MedfusionError, match="damaged, or no checkpoint"):
        read_checkpoint(tmp_path, config())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, cases: list[Case]
) -> None:
    wild = config(steps=30, learning_rate=1e18, warmup=1, checkpoint_every=1)
    with pytest.raises(MedfusionError, match=r"the loss of step \d+ is not finite") as error:
        train(cases, wild, tmp_path, device="cpu")
    assert error.value.facts["last_good"] == str(tmp_path / "checkpoint.pt")
    assert "learning_rate" in error.value.fix
    assert not (tmp_path / "prior.safetensors").exists()
    assert np.isfinite([row["loss"] for row in rows(tmp_path)]).all()


@pytest.mark.parametrize(
    ("process", "objective"),
    [
        ({"family": "vp", "schedule": "linear", "prediction": "epsilon"}, "min_snr"),
        ({"family": "sub-vp", "schedule": "linear", "prediction": "score"}, "likelihood"),
        ({"family": "ve", "sigma_max": 20.0, "steps": 50, "prediction": "edm"}, "edm"),
        ({"family": "ve", "sigma_max": 20.0, "prediction": "x0"}, "score_matching"),
        ({"family": "vp", "learned_variance": True}, "hybrid"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["family"],
)
def test_a_prior_of_any_process_and_objective(
    tmp_path: Path, cases: list[Case], process: dict[str, Any], objective: str
) -> None:
    chosen = tiny_config(process=process, training={"objective": objective})
    train(cases, chosen, tmp_path, device="cpu")
    loaded = Prior.load(tmp_path / "prior.safetensors")
    assert loaded.config == chosen
    assert type(loaded.process) is {"vp": VP, "sub-vp": SubVP, "ve": VE}[process["family"]]
    assert loaded.process.steps == process.get("steps", 1000)
    assert all(np.isfinite([row["loss"], *row["validation"].values()]).all() for row in rows(tmp_path))
    denoise = loaded.denoiser()
    assert denoise.prediction == chosen.process.prediction
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    x0, fraction = denoise.estimate(x, 0.5)
    assert x0.shape == x.shape
    assert (fraction is not None) == (objective == "hybrid")


def test_the_hybrid_objective_is_asked_at_every_step_of_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1, the only one whose term is a density, to T: a time k / T in float32 is step k, others are rounded."""
    asked: list[int] = []
    monkeypatch.setattr(loop, "hybrid_loss", lambda denoise, x0, noise, step: asked.extend(step.tolist()))
    chosen = tiny_config(process={"learned_variance": True}, training={"objective": "hybrid"})
    t = torch.cat([torch.arange(1, 1001) / 1000, torch.tensor([0.00149, 0.00151, 0.9996])])
    batch = Batch(torch.zeros(1003, 1, 1, 1, 1), torch.zeros(1003, 4, 1, 1, 1))
    loop._loss(build_network(chosen), chosen, batch, batch.images, t, torch.device("cpu"))
    assert asked == [*range(1, 1001), 1, 2, 1000]


def test_the_variance_is_learned_by_the_hybrid_objective_alone() -> None:
    for process, objective in (({"learned_variance": True}, "simple"), ({}, "hybrid")):
        with pytest.raises(ValidationError, match="go together"):
            tiny_config(process=process, training={"objective": objective})


def test_too_few_scans(tmp_path: Path, cases: list[Case]) -> None:
    with pytest.raises(MedfusionError, match=r"1 scan\(s\) and 1 held out leave none to train on"):
        train(cases[:1], config(), tmp_path, device="cpu")
