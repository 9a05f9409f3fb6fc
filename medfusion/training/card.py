"""The model card of a trained prior, from what the run knows: data, settings, losses, decibels, limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medfusion.prior import Prior


def model_card(prior: Prior) -> str:
    """Markdown; says what was not stated rather than leave it out."""
    config, about = prior.config, prior.provenance
    facts = {
        "Data": f"{about['data'] or 'not stated'}: {about['training_scans']} scans trained on, "
        f"{about['validation_scans']} held out for validation",
        "Licence of the weights": config.licence or "not stated",
        **(_diffusion(prior) if config.family == "diffusion" else {"Family": prior.kind}),
        **_autoencoder(prior),
        "Preprocessing": f"{config.preprocessing.modality}, {config.preprocessing.spacing:g} mm, nearest RAS "
        f"orientation, background median to -1, percentile {config.preprocessing.percentile:g} of the foreground to +1",
        "Training": f"{about['steps']} steps of {config.training.batch} crops of {config.data.crop}^3 voxels, "
        f"{config.training.optimizer}, {about['hours']:.1f} hours on {about['device']}, {about['arithmetic']}"
        + (f", from the weights of {config.training.start}" if config.training.start else ""),
        "Made": f"{about['trained']} with medfusion {about['medfusion']}, torch {about['torch']}",
    }
    return "\n".join(
        [
            f"# {prior.name}",
            *_table(("", ""), facts.items()),
            *_validation(config.family, about["validation_loss"]),
            *_denoising(about.get("denoising_psnr", {})),
            "## Intended use and limits",
            config.notes or "Not stated. For research, not for diagnosis.",
            "",
        ]
    )


def _diffusion(prior: Prior) -> dict[str, str]:
    process, shown = prior.config.process, prior.config.network
    told = [
        "position and kind of image" if shown.located else "",
        f"a label map of {shown.labels} values" if shown.labels else "",
        f"a class ({', '.join(shown.classes)})" if shown.classes else "",
    ]
    return {
        "Process": f"{process.family}, {process.schedule} schedule, {process.steps} steps, "
        f"{process.prediction}-prediction, objective {prior.config.training.objective}",
        "Network": f"residual U-Net without normalisation, stem {shown.stem}, channels {list(shown.channels)}, "
        f"{prior.provenance['parameters'] / 1e6:.1f} million parameters; "
        f"told {', '.join(filter(None, told)) or 'nothing beside the image'}",
    }


def _autoencoder(prior: Prior) -> dict[str, str]:
    config, shape = prior.config, prior.config.autoencoder
    if shape is None:
        return {}
    about = f"{shape.latents} latents at one {shape.factor}th of the resolution, channels {list(shape.channels)}"
    if config.latent:
        about += (
            f", {shape.steps} steps of {shape.batch} crops; held-out crops rebuilt at "
            f"{prior.provenance['reconstruction_psnr']:.2f} dB"
        )
    return {"Autoencoder": about}


def _validation(family: str, found: dict[str, float]) -> list[str]:
    if family == "diffusion":
        explained = "Mean loss on one fixed crop of each held-out scan, at fixed times and noise:"
        return ["## Validation loss", explained, *_table(("t", *found), [("loss", *found.values())])]
    return ["## Validation", "On one fixed crop of each held-out scan:", *_table(("measure", "value"), found.items())]


def _denoising(decibels: dict[str, dict[str, float]]) -> list[str]:
    """Nothing for latent priors, which do not denoise."""
    if not decibels:
        return []
    return [
        "## Denoising of held-out crops",
        "Gaussian noise in percent of the range from air to bright tissue; mean PSNR in the tissue, dB:",
        *_table(
            ("noise", *(f"{float(level):.0%}" for level in decibels)),
            [(name, *(f"{pair[name]:.2f}" for pair in decibels.values())) for name in ("noisy", "denoised")],
        ),
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    def line(cells: Iterable[object]) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    return ["", line(head), "|" + "---|" * len(head), *(line(row) for row in rows), ""]
