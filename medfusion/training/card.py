"""The model card of a trained prior, from what the run knows: data, settings, losses, decibels, limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from medfusion.prior import Prior


def model_card(prior: Prior) -> str:
    """Markdown; says what was not stated rather than leave it out."""
    config, about = prior.config, prior.provenance
    process, shown = config.process, config.network
    told = [
        "position and kind of image" if shown.located else "",
        f"a label map of {shown.labels} values" if shown.labels else "",
        f"a class ({', '.join(shown.classes)})" if shown.classes else "",
    ]
    facts = {
        "Data": f"{about['data'] or 'not stated'}: {about['training_scans']} scans trained on, "
        f"{about['validation_scans']} held out for validation",
        "Licence of the weights": config.licence or "not stated",
        "Process": f"{process.family}, {process.schedule} schedule, {process.steps} steps, "
        f"{process.prediction}-prediction, objective {config.training.objective}",
        "Network": f"residual U-Net without normalisation, stem {shown.stem}, channels {list(shown.channels)}, "
        f"{about['parameters'] / 1e6:.1f} million parameters; "
        f"told {', '.join(filter(None, told)) or 'nothing beside the image'}",
        "Preprocessing": f"{config.preprocessing.modality}, {config.preprocessing.spacing:g} mm, nearest RAS "
        f"orientation, background median to -1, percentile {config.preprocessing.percentile:g} of the foreground to +1",
        "Training": f"{about['steps']} steps of {config.training.batch} crops of {config.data.crop}^3 voxels, "
        f"{config.training.optimizer}, {about['hours']:.1f} hours on {about['device']}, {about['arithmetic']}"
        + (f", from the weights of {config.training.start}" if config.training.start else ""),
        "Made": f"{about['trained']} with medfusion {about['medfusion']}, torch {about['torch']}",
    }
    if config.autoencoder is not None:
        facts["Autoencoder"] = (
            f"{config.autoencoder.latents} latents at one {config.autoencoder.factor}th of the resolution, "
            f"channels {list(config.autoencoder.channels)}, {config.autoencoder.steps} steps of "
            f"{config.autoencoder.batch} crops; held-out crops rebuilt at {about['reconstruction_psnr']:.2f} dB"
        )
    return "\n".join(
        [
            f"# {prior.name}",
            *_table(("", ""), facts.items()),
            "## Validation loss",
            "Mean loss on one fixed crop of each held-out scan, at fixed times and noise:",
            *_table(("t", *about["validation_loss"]), [("loss", *about["validation_loss"].values())]),
            *_denoising(about.get("denoising_psnr", {})),
            "## Intended use and limits",
            config.notes or "Not stated. For research, not for diagnosis.",
            "",
        ]
    )


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
