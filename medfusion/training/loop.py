"""The training loop: cases in, one Prior out; on one device or many, resumed exactly, visible while it runs.

    medfusion train configs/brain_t1.yaml --data DIR --out RUN [--resume]
    accelerate launch --num_processes 4 -m medfusion train configs/brain_t1.yaml --data DIR --out RUN

Crops, times and noise of step k are functions of (seed, k), so a resumed run repeats what an unbroken one would do, and
several processes, workers or parts of a batch see together what one would see.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from medfusion.config import Config
from medfusion.data.crops import Case, paired, split, validation_crops
from medfusion.errors import MedfusionError
from medfusion.io import staged
from medfusion.networks import Autoencoder
from medfusion.prior import Prior, fast_bfloat16
from medfusion.training import checkpoint
from medfusion.training.batches import Order, Samples, default_workers, end_workers, loader
from medfusion.training.card import model_card
from medfusion.training.memory import advice, on_device, out_of_memory, require_memory
from medfusion.training.meter import Meter, State
from medfusion.training.optimizer import build_optimizers
from medfusion.training.signals import signals_held
from medfusion.training.stages import Diffusion, Stage, autoencoding, only_stage
from medfusion.training.watch import burst, lost

CLIP_NORM = 1.0
LOG_EVERY = 10  # steps; a GPU is asked for its losses no more often, because it would have to wait for the answer


def train(
    cases: Sequence[Case],
    config: Config,
    out: Path,
    *,
    data: str = "",
    resume: bool = False,
    device: str | None = None,
    workers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[State], None] = lambda state: None,
) -> Prior:
    """Train a prior; ``out`` receives it with its card, ``metrics.jsonl``, ``checkpoint.pt`` and pictures.

    Ctrl-C and SIGTERM are answered after the step: a checkpoint is saved and KeyboardInterrupt raised.

    Parameters
    ----------
    data : one line about the scans for the provenance.
    device : as ``torch.device`` takes it; default: what accelerate finds, or was told by its launcher.
    workers : processes that draw crops ahead of the network; default: as many as help.
    say : told in one line what the run makes of the machine.
    progress : called after every step.

    Raises
    ------
    MedfusionError : too few cases, a batch that cannot be shared out, too little memory, a loss that is not finite, or
        nothing to resume from, or other scans than those that it began with.
    """
    accelerator = _accelerator(device)
    begun, resumed = read_run(out, config) if resume else (None, None)
    if not config.latent:
        run, hours = _Run(only_stage(config), cases, out, accelerator, workers, resumed), 0.0
        run.follow(say, progress)
        return run.finish(data, hours)
    assert config.autoencoder is not None
    before = config.autoencoder.steps
    autoencoder, hours = _first_stage(cases, config, out, accelerator, workers, begun, say, progress)
    run = _Run(Diffusion(config, autoencoder), cases, out, accelerator, workers, resumed)
    run.follow(say, lambda state: progress(state._replace(step=before + state.step)))
    return run.finish(data, hours)


def _first_stage(
    cases: Sequence[Case],
    config: Config,
    out: Path,
    accelerator: Accelerator,
    workers: int | None,
    state: dict[str, Any] | None,
    say: Callable[[str], None],
    progress: Callable[[State], None],
) -> tuple[Autoencoder, float]:
    """The trained autoencoder and the hours it took; what else its training held is let go."""
    stage = autoencoding(config)
    second = Diffusion(config, stage.build().to(accelerator.device))  # what is wrong with it shall be said before
    second.adopt_start(second.build())
    require_memory(second, accelerator.num_processes, accelerator.device)
    run = _Run(stage, cases, out / stage.folder, accelerator, workers, state)
    if accelerator.is_main_process and state is None:
        checkpoint.begin(out)  # a resumed run would take an earlier run's second stage for its own
    run.follow(say, progress)
    accelerator.free_memory()
    return stage.scaled(run.ema, run.samples), run.hours


def read_run(out: Path, config: Config) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The checkpoints of the autoencoder and of the diffusion from which a run in the folder ``out`` is resumed.

    Raises
    ------
    MedfusionError : there is none, one is damaged, or one was made with another config.
    """
    if not config.latent:
        return None, checkpoint.read_checkpoint(out, config)
    stage = autoencoding(config)
    parts = {"autoencoder", "preprocessing", "data", "training"}  # what it depends on
    first = checkpoint.read_checkpoint(out / stage.folder, stage.config, parts)
    return first, checkpoint.read_checkpoint(out, config) if (out / checkpoint.CHECKPOINT).is_file() else None


class _Run:
    """The training of one network. The methods stand in the order in which they are called."""

    def __init__(
        self,
        stage: Stage,
        cases: Sequence[Case],
        out: Path,
        accelerator: Accelerator,
        workers: int | None,
        state: dict[str, Any] | None,
    ) -> None:
        self.stage, self.config, self.out = stage, stage.config, out
        self.accelerator, self.device = accelerator, accelerator.device
        config = stage.config
        paired_up = config.cyclegan is not None
        training, self.validation = split(cases, config.data.validation, config.training.seed, domains=paired_up)
        if not training or (paired_up and len({case.class_index for case in training}) < 2):
            raise MedfusionError(f"{len(cases)} scan(s) and {config.data.validation} held out leave none to train on")
        self.scans = [case.name for case in training]
        self.held_out = validation_crops(self.validation, config.data, config.training.seed)
        self.held_out = paired(self.held_out) if paired_up else self.held_out
        self.network, self.ema = _networks(stage, training if state is None else None, self.device)
        self.need = require_memory(stage, accelerator.num_processes, self.device)
        self.optimizers = build_optimizers(self.network, config.training)
        self.start = self._restore(state) if state else 0
        spent = {name: state[name] for name in ("seconds", "waited", "worked", "losses", "norms")} if state else {}
        self.meter = Meter(config.training.batch, **spent)
        if config.training.compile:
            self.network.compile()
        self.model: nn.Module = accelerator.prepare_model(self.network)  # averages gradients over processes
        # processes that draw crops cannot be given scans that lie on a GPU
        training, resident = (training, False) if workers else on_device(training, self.device, self.need)
        self.samples = Samples(training, config)
        workers = default_workers(self.device, resident) if workers is None else workers
        self.plan = _plan(accelerator, resident, workers, self.need)
        self.validated: dict[str, float] = {}  # the last validation
        self.norms: list[float] = []  # the largest gradient of each row
        self.board = None
        if accelerator.is_main_process:
            checkpoint.forget_after(out, self.start) if state else checkpoint.begin(out)
            self.board = _tensorboard(out, self.start)
        accelerator.wait_for_everyone()
        order = Order(config, self.start, accelerator.process_index, accelerator.num_processes)
        self.parts = iter(loader(self.samples, order, workers))

    def follow(self, say: Callable[[str], None], progress: Callable[[State], None]) -> None:
        """Train to the last step, or until asked to stop."""
        self.say = say
        say(self.plan)
        try:
            with signals_held() as asked_to_stop:
                for step in range(self.start, self.config.training.steps):
                    self.update(step)
                    self.record(step + 1)
                    progress(self.meter.progress(step + 1))
                    if self.agreed(asked_to_stop(), step + 1):
                        self.save(step + 1)
                        raise KeyboardInterrupt
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise advice(self.stage, self.accelerator.num_processes, self.device, self.need) from error
        finally:
            end_workers(self.parts)

    def _restore(self, state: dict[str, Any]) -> int:
        if state["scans"] != self.scans:
            other = sorted(set(state["scans"]) ^ set(self.scans))
            raise MedfusionError(
                f"{self.out}: was begun with other scans",
                gone_or_new=", ".join(other) or "none, but their order differs",
                fix="resume with the same scans, or choose a new --out",
            )
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return int(state["step"])

    def update(self, step: int) -> None:
        """Step ``step``: forward and backward for each part of the batch, then the weights and their average."""
        rate = _warmup_then_cosine(step, self.config)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
        parts = self.config.training.accumulate
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            with self.meter.waiting():
                shown = next(self.parts).shown(self.device, self.config.noise_shape)
            with nullcontext() if part + 1 == parts else self.accelerator.no_sync(self.model):
                loss = self.stage.loss(self.model, shown, step / self.config.training.steps).mean() / parts
                self.accelerator.backward(loss)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
        _update_ema(self.ema, self.network, step, self.config)
        self.meter.add(total + 0 * norm, norm)  # a gradient that is not finite makes the loss so

    def record(self, done: int) -> None:
        """Read the losses, log, validate and save, each when it is due after ``done`` steps."""
        settings = self.config.training
        saves = done % settings.checkpoint_every == 0 or done == settings.steps
        validates = done % settings.validate_every == 0 or done == settings.steps
        logs = done % LOG_EVERY == 0 or saves or validates
        if logs or self.device.type == "cpu":
            self._read_losses(done)
        if logs:
            row = self.meter.row(done)
            self._log(row)
            self.norms.append(row["gradient_norm"])
            self._caution(done, burst(self.norms))
        if validates:
            self._validate(done)
        if saves:
            self.save(done)

    def _read_losses(self, done: int) -> None:
        values = self.accelerator.reduce(torch.stack(self.meter.unread), "mean").tolist()
        for number, (loss, _) in enumerate(values, done - len(values) + 1):
            if not math.isfinite(loss):
                raise self._not_finite(number)
        self.meter.read(values)

    def _not_finite(self, number: int) -> MedfusionError:
        """``number`` counts from 1, as the rows of metrics.jsonl do."""
        last_good = self.out / checkpoint.CHECKPOINT
        return MedfusionError(
            f"the loss of step {number} is not finite",
            scans_of_the_batch=", ".join(self.samples.scans_of_step(number - 1)),
            last_good=last_good if last_good.exists() else "no checkpoint yet",
            fix=f"look at these scans; if they are sound, begin anew with a lower {self.stage.settings}.learning_rate",
        )

    def _validate(self, done: int) -> None:
        with self.meter.paused():
            self.validated = self.stage.validate(self.ema, self.held_out)
            self._log({"step": done, "validation": self.validated})
            self._caution(done, lost(self.validated))
            if self.accelerator.is_main_process:
                self.stage.draw(self.ema, self.held_out, self.out / "pictures" / f"step_{done:07d}.png")
            self.accelerator.wait_for_everyone()

    def _caution(self, done: int, text: str) -> None:
        if text and self.accelerator.is_main_process:
            self.say(f"Caution  step {done}: {text}")

    def _log(self, row: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        checkpoint.log(self.out, row)
        if self.board is not None:
            flat = row | {f"validation/{t}": value for t, value in row.get("validation", {}).items()}
            for name, value in flat.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, row["step"])
            self.board.flush()

    def agreed(self, asked: bool, done: int) -> bool:
        """Whether to stop here: all processes do if one was asked to.

        They tell each other at every step, because a launcher soon kills; on GPUs, which are fast, more rarely.
        """
        if self.accelerator.num_processes == 1:
            return asked
        if self.device.type != "cpu" and done % LOG_EVERY:
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.device)) > 0)

    def save(self, done: int) -> None:
        """Replace the checkpoint; its losses have been read, so its weights are finite."""
        if self.meter.unread:
            self._read_losses(done)
        with self.meter.paused():
            if self.accelerator.is_main_process:
                checkpoint.save_checkpoint(
                    self.out,
                    self.config,
                    done,
                    self.network,
                    self.ema,
                    self.optimizers,
                    scans=self.scans,
                    seconds=self.meter.seconds,
                    waited=self.meter.waited,
                    worked=self.meter.worked,
                    losses=self.meter.losses,
                    norms=self.meter.norms,
                )
            self.accelerator.wait_for_everyone()

    @property
    def hours(self) -> float:
        """Of wall time, what came before a resume included."""
        return self.meter.seconds / 3600

    def finish(self, data: str, hours: float) -> Prior:
        """The averaged network with its provenance, on the disk with its card; ``hours`` were spent before this run."""
        prior = self.stage.prior(self.ema, self._provenance(data, hours + self.hours))
        if self.accelerator.is_main_process:
            with staged(self.out / checkpoint.PRIOR, overwrite=True) as unfinished:
                prior.save(unfinished)
            with staged(self.out / checkpoint.CARD, overwrite=True) as unfinished:
                unfinished.write_text(model_card(prior), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        return prior

    def _provenance(self, data: str, hours: float) -> dict[str, Any]:
        from medfusion import __version__

        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {
            "trained": datetime.now(UTC).date().isoformat(),
            "medfusion": __version__,
            "torch": torch.__version__,
            "data": data,
            "training_scans": len(set(self.scans)),
            "validation_scans": len({case.name for case in self.validation}),
            "steps": self.config.training.steps,
            "hours": round(hours, 4),
            "device": f"{self.accelerator.num_processes} x {name}",
            "arithmetic": _arithmetic(self.device),
            "waiting_for_data": round(self.meter.waited / max(self.meter.worked, 1e-9), 4),
            "parameters": sum(p.numel() for p in self.ema.parameters()),
            # a run may be resumed after its last step
            "validation_loss": self.validated or self.stage.validate(self.ema, self.held_out),
            **self.stage.measures(self.ema, self.held_out),
            "licence": self.config.licence,
        }


def _accelerator(device: str | None) -> Accelerator:
    """Several processes where accelerate's launcher started them, else one on ``device``.

    Raises
    ------
    MedfusionError : a device is named although the launcher gives each process its own, or the processes that it
        started do not find each other.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and device is not None:
        raise MedfusionError(
            "--device and accelerate launch exclude each other",
            fix="leave it out; ACCELERATE_USE_CPU=true accelerate launch ... keeps off the GPUs",
        )
    if launched == 1:  # its state outlives a run, and would keep the first one's device for all later ones
        AcceleratorState._reset_state(reset_partial_state=True)
    environment = {"ACCELERATE_TORCH_DEVICE": device} if device else {}
    os.environ |= environment
    try:
        # the atlas is the same everywhere and need not be sent at every step
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # half-width arithmetic is switched on in the loss, as in use, not by accelerate
        # launched without a GPU: unless told that it is on a CPU, each process would train alone
        cpu = device == "cpu" or (launched > 1 and not torch.cuda.is_available())
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[ddp])
    finally:
        for name in environment:
            del os.environ[name]
    if accelerator.num_processes != launched:
        raise MedfusionError(f"{launched} processes were launched, {accelerator.num_processes} found each other")
    return accelerator


def _networks(stage: Stage, cases: Sequence[Case] | None, device: torch.device) -> tuple[Any, Any]:
    """The network to train and its average, with their first weights; without cases these come from a checkpoint."""
    torch.manual_seed(stage.config.training.seed)
    network, ema = stage.build(), stage.build()
    if cases is not None:
        stage.begin(network, cases)
    ema.load_state_dict(network.state_dict())
    network = network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    ema = ema.eval().requires_grad_(False).to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network, ema


def _plan(accelerator: Accelerator, resident: bool, workers: int, need: int) -> str:
    device, where = accelerator.device, f"in memory, {workers} worker(s)"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return (
        f"{accelerator.num_processes} x {name}, {_arithmetic(device)}, "
        f"scans {'on the GPU' if resident else where}, about {need / 2**30:.1f} GiB a step"
    )


def _arithmetic(device: torch.device) -> str:
    return "bfloat16" if fast_bfloat16(device) else "float32"


def _warmup_then_cosine(step: int, config: Config) -> float:
    share = step / config.training.steps
    return min(1.0, (step + 1) / config.training.warmup) * (0.5 * (1 + math.cos(math.pi * share)) + 1e-3)


def _update_ema(ema: nn.Module, network: nn.Module, step: int, config: Config) -> None:
    """Half-life in images, shorter at the start so that the average does not remember the initialisation."""
    images = (step + 1) * config.training.batch
    half_life = min(config.training.ema_half_life, 0.1 * images)
    weight = 1 - 0.5 ** (config.training.batch / half_life)
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), weight)
        for average, buffer in zip(ema.buffers(), network.buffers(), strict=True):  # vectors of spectral norms
            average.copy_(buffer)


def _tensorboard(out: Path, start: int) -> Any:
    """A writer where TensorBoard is installed; what an earlier run wrote of steps behind ``start`` is hidden."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
