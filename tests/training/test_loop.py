"""Training: the loss falls, what a run leaves is whole, signals are answered, what goes wrong is said."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prior_factory import tiny_config
from pydantic import ValidationError
from toy_runs import assert_same_run, checkpoint, rows, toy_cases, toy_config

from medfusion.data.crops import Case, Crop
from medfusion.diffusion import VE, VP, SubVP
from medfusion.errors import MedfusionError
from medfusion.prior import Prior, build_network
from medfusion.training import loop, objective, train
from medfusion.training.batches import Shown
from medfusion.training.evaluate import VALIDATION_TIMES
from medfusion.training.meter import State
from medfusion.training.stages import Diffusion


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return toy_cases()


def kill_at(step: int, *signals: int) -> Callable[[State], None]:
    """Send this process ``signals`` after a step."""

    def progress(state: State) -> None:
        if state.step == step:
            for number in signals:
                os.kill(os.getpid(), number)

    return progress


def test_the_loss_falls(tmp_path: Path, cases: list[Case]) -> None:
    seen: list[State] = []
    chosen = toy_config(
        steps=60, batch=4, checkpoint_every=60, validate_every=30, ema_half_life=20, learning_rate=1e-2, warmup=5
    )
    prior = train(cases, chosen, tmp_path, device="cpu", progress=seen.append)
    assert [state.step for state in seen] == list(range(1, 61))
    losses = [state.loss for state in seen]
    assert np.mean(losses[-15:]) < 0.85 * np.mean(losses[:5])
    first, last = (row["validation"] for row in rows(tmp_path) if "validation" in row)
    assert np.mean(list(last.values())) < np.mean(list(first.values()))
    assert prior.provenance["validation_loss"] == last
    logged = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in logged] == [10, 20, 30, 40, 50, 60]
    for number, row in enumerate(logged):
        assert row["loss"] == pytest.approx(np.mean(losses[10 * number : 10 * number + 10]), abs=1e-5)
        assert row["images_per_second"] > 0
        assert 0 <= row["waiting"] < 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_in_parts_is_the_same_batch(tmp_path: Path, cases: list[Case], optimizer: str) -> None:
    losses: dict[int, list[float]] = {1: [], 2: []}
    for parts, noted in losses.items():
        chosen = toy_config(steps=20, batch=4, accumulate=parts, checkpoint_every=20, optimizer=optimizer)
        train(cases, chosen, tmp_path / str(parts), device="cpu", progress=lambda s, noted=noted: noted.append(s.loss))
    assert losses[2] == pytest.approx(losses[1], abs=1e-4)
    whole, parted = (checkpoint(tmp_path / str(parts))["network"] for parts in losses)
    torch.testing.assert_close(parted, whole, rtol=0, atol=1e-4)


def test_what_a_run_leaves(tmp_path: Path, cases: list[Case]) -> None:
    out, said = tmp_path / "runs" / "first", list[str]()
    prior = train(cases, toy_config(validate_every=2), out, data="five phantoms", device="cpu", say=said.append)
    names = {path.name for path in out.iterdir()} - {"tensorboard"}
    assert names == {"checkpoint.pt", "metrics.jsonl", "prior.safetensors", "card.md", "pictures"}
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["step_0000002.png", "step_0000004.png"]
    assert [row["step"] for row in rows(out)] == [2, 2, 4, 4]
    for row in rows(out)[1::2]:
        assert [float(t) for t in row["validation"]] == list(VALIDATION_TIMES)
        assert all(np.isfinite(list(row["validation"].values())))
    loaded = Prior.load(out / "prior.safetensors")
    assert loaded.config == toy_config(validate_every=2)
    assert loaded.provenance == prior.provenance
    about = loaded.provenance
    assert (about["data"], about["training_scans"], about["validation_scans"]) == ("five phantoms", 4, 1)
    assert (about["steps"], about["torch"], about["device"]) == (4, torch.__version__, "1 x CPU")
    assert about["parameters"] == sum(parameter.numel() for parameter in prior.network.parameters())
    for name, weight in prior.network.state_dict().items():
        torch.testing.assert_close(loaded.network.state_dict()[name], weight.half().float(), rtol=0, atol=0)
    (plan,) = said
    assert plan.startswith("1 x CPU")
    assert about["arithmetic"] in plan


def test_another_seed_is_another_run(tmp_path: Path, cases: list[Case]) -> None:
    losses = []
    for seed in (1, 2):
        train(cases, toy_config(seed=seed), tmp_path / str(seed), device="cpu")
        losses.append([row["loss"] for row in rows(tmp_path / str(seed)) if "loss" in row])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("asked", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=str)
def test_a_signal_saves_after_the_step_and_the_resumed_run_is_the_unbroken_one(
    tmp_path: Path, cases: list[Case], asked: list[int]
) -> None:
    chosen, handlers = toy_config(steps=5, checkpoint_every=5), [signal.getsignal(n) for n in (2, 15)]
    with pytest.raises(KeyboardInterrupt):
        train(cases, chosen, tmp_path / "broken", device="cpu", progress=kill_at(2, *asked))
    assert checkpoint(tmp_path / "broken")["step"] == 2
    assert [signal.getsignal(n) for n in (2, 15)] == handlers
    train(cases, chosen, tmp_path / "broken", device="cpu", resume=True)
    train(cases, chosen, tmp_path / "unbroken", device="cpu")
    assert_same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path, cases: list[Case]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(cases, toy_config(), tmp_path, device="cpu", progress=kill_at(1, signal.SIGTERM, signal.SIGINT))
    assert not (tmp_path / "checkpoint.pt").exists()


WORKERS = """
import sys
from pathlib import Path
from toy_runs import toy_cases, toy_config, train
def fail(state): raise ValueError("from the caller")
train(toy_cases(), toy_config(steps=50), Path(sys.argv[1]), workers=2, device="cpu", progress=fail)
"""


def test_a_failed_run_with_workers_ends(tmp_path: Path) -> None:
    """Workers ignore SIGTERM, by which Python ends at its exit those that a traceback keeps: it would wait for ever."""
    ended = subprocess.run(
        [sys.executable, "-c", WORKERS, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stderr.strip().endswith("ValueError: from the caller")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scan_that_is_not_finite_is_named_and_the_last_checkpoint_stays(
    tmp_path: Path, cases: list[Case], value: float
) -> None:
    bad = [replace(case, image=case.image.clone()) for case in cases]
    chosen = tiny_config(
        training={"steps": 40, "batch": 1, "checkpoint_every": 1}, data={"remapped_share": 0.5, "crop": 16}
    )
    samples = loop.Samples(loop.split(cases, 1, 0)[0], chosen)
    named = [samples.scans_of_step(step) for step in range(40)]
    (first,) = named[0]
    (wanted,) = next(name for name in named if name != [first])
    next(case for case in bad if case.name == wanted).image[:] = value
    step = named.index([wanted])
    with pytest.raises(MedfusionError, match=rf"the loss of step {step + 1} is not finite") as error:
        train(bad, chosen, tmp_path, device="cpu")
    assert error.value.facts["scans_of_the_batch"] == wanted
    assert error.value.facts["last_good"] == tmp_path / "checkpoint.pt"
    kept = checkpoint(tmp_path)
    assert kept["step"] == step
    assert all(torch.isfinite(w).all() for part in ("network", "ema") for w in kept[part].values())


def test_a_rate_that_is_too_high_stops_the_run(tmp_path: Path, cases: list[Case]) -> None:
    wild = toy_config(steps=30, learning_rate=1e18, warmup=1, checkpoint_every=1)
    with pytest.raises(MedfusionError, match=r"the loss of step \d+ is not finite") as error:
        train(cases, wild, tmp_path, device="cpu")
    assert "learning_rate" in error.value.fix
    assert not (tmp_path / "prior.safetensors").exists()
    assert np.isfinite([row["loss"] for row in rows(tmp_path) if "loss" in row]).all()


@pytest.mark.parametrize(
    ("process", "chosen_objective"),
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
    tmp_path: Path, cases: list[Case], process: dict[str, Any], chosen_objective: str
) -> None:
    chosen = tiny_config(process=process, training={"objective": chosen_objective, "steps": 2})
    train(cases, chosen, tmp_path, device="cpu")
    loaded = Prior.load(tmp_path / "prior.safetensors")
    assert loaded.config == chosen
    assert type(loaded.process) is {"vp": VP, "sub-vp": SubVP, "ve": VE}[process["family"]]
    assert loaded.process.steps == process.get("steps", 1000)
    row, validated = rows(tmp_path)
    assert all(np.isfinite([row["loss"], *validated["validation"].values()]))
    denoise = loaded.denoiser()
    assert denoise.prediction == chosen.process.prediction
    x = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    x0, fraction = denoise.estimate(x, 0.5)
    assert x0.shape == x.shape
    assert (fraction is not None) == (chosen_objective == "hybrid")


def test_the_hybrid_objective_is_asked_at_every_step_of_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1, the only one whose term is a density, to T: a time k / T in float32 is step k, others are rounded."""
    asked: list[int] = []
    monkeypatch.setattr(objective, "hybrid_loss", lambda denoise, x0, noise, step: asked.extend(step.tolist()))
    chosen = tiny_config(process={"learned_variance": True}, training={"objective": "hybrid"})
    t = torch.cat([torch.arange(1, 1001) / 1000, torch.tensor([0.00149, 0.00151, 0.9996])])
    image = torch.zeros(1003, 1, 1, 1, 1)
    crop = Crop(image, torch.zeros(1003, 4, 1, 1, 1), None, torch.full((1003,), -1))
    objective.batch_loss(build_network(chosen), chosen, Shown(crop, image, t))
    assert asked == [*range(1, 1001), 1, 2, 1000]


def test_the_variance_is_learned_by_the_hybrid_objective_alone() -> None:
    for process, chosen_objective in (({"learned_variance": True}, "simple"), ({}, "hybrid")):
        with pytest.raises(ValidationError, match="go together"):
            tiny_config(process=process, training={"objective": chosen_objective})


def test_too_few_scans(tmp_path: Path, cases: list[Case]) -> None:
    with pytest.raises(MedfusionError, match=r"1 scan\(s\) and 1 held out leave none to train on"):
        train(cases[:1], toy_config(), tmp_path, device="cpu")


def test_a_run_may_start_from_a_prior_with_the_same_layers_alone(tmp_path: Path, cases: list[Case]) -> None:
    prior = train(cases, toy_config(steps=2), tmp_path / "first", device="cpu")
    path = tmp_path / "first" / "prior.safetensors"
    network, _ = loop._networks(Diffusion(toy_config(start=str(path))), cases, torch.device("cpu"))
    torch.testing.assert_close(network.tail.weight, prior.network.tail.weight.half().float(), rtol=0, atol=0)
    other = tiny_config(network={"channels": (8, 8)}, training={"start": str(path)})
    with pytest.raises(MedfusionError, match=r"training.start: the networks differ"):
        train(cases, other, tmp_path / "second", device="cpu")


def test_a_resumed_run_does_not_need_the_prior_it_started_from(tmp_path: Path, cases: list[Case]) -> None:
    train(cases, toy_config(steps=2), tmp_path / "first", device="cpu")
    path = tmp_path / "first" / "prior.safetensors"
    config = toy_config(start=str(path))

    def interrupt(state: State) -> None:
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(cases, config, tmp_path / "second", device="cpu", progress=interrupt)
    path.unlink()
    assert train(cases, config, tmp_path / "second", device="cpu", resume=True).provenance["steps"] == 4


def test_the_rate_warms_up_and_falls_to_a_thousandth() -> None:
    chosen = toy_config(steps=1000, warmup=100)
    rates = np.array([loop._warmup_then_cosine(step, chosen) for step in range(1000)])
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03], rel=2e-3)
    assert rates.argmax() == 99
    assert rates[500] == pytest.approx(0.501)
    assert 1e-3 <= rates[-1] < 1.01e-3
    assert (np.diff(rates[100:]) < 0).all()


def test_the_average_has_its_half_life_in_images_whatever_the_batch() -> None:
    for batch in (1, 5):
        chosen = toy_config(batch=batch, ema_half_life=50)
        ema, network = (build_network(chosen).requires_grad_(False) for _ in range(2))
        for parameter in ema.parameters():
            parameter.fill_(1.0)
        for parameter in network.parameters():
            parameter.zero_()
        for step in range(1000 // batch, 1050 // batch):
            loop._update_ema(ema, network, step, chosen)
        assert float(ema.head.bias[0]) == pytest.approx(0.5, abs=1e-3)


def test_tensorboard_is_written_where_it_is_installed(
    tmp_path: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(cases, toy_config(), tmp_path / "with", device="cpu")
    events = EventAccumulator(str(tmp_path / "with" / "tensorboard")).Reload()
    logged = [row for row in rows(tmp_path / "with") if "loss" in row]
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("loss")] == [(r["step"], r["loss"]) for r in logged]
    assert {f"validation/{t:g}" for t in VALIDATION_TIMES} < set(events.Tags()["scalars"])
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    train(cases, toy_config(), tmp_path / "without", device="cpu")
    assert not (tmp_path / "without" / "tensorboard").exists()
    assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.slow
def test_a_compiled_network_trains_alike_and_is_stored_alike(tmp_path: Path, cases: list[Case]) -> None:
    for compiled in (False, True):
        train(cases, toy_config(steps=2, compile=compiled), tmp_path / str(compiled), device="cpu")
    plain, fast = (rows(tmp_path / str(compiled))[0]["loss"] for compiled in (False, True))
    assert fast == pytest.approx(plain, abs=1e-4)
    one, other = (checkpoint(tmp_path / str(compiled))["network"] for compiled in (False, True))
    torch.testing.assert_close(other, one, rtol=0, atol=1e-4)
    assert json.dumps(list(one)) == json.dumps(list(other))
