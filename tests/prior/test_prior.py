"""Prior: one file that holds everything; what is not such a file is refused; any shape may be asked about."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from prior_factory import PROVENANCE, conditional_prior, random_prior, saved, tiny_config, white_prior
from safetensors.torch import save_file

from medfusion.diffusion import classifier_free
from medfusion.errors import MedfusionError
from medfusion.prior import DiffusionPrior, Prior, build_network, prior_path, read_metadata, shipped

TIME = torch.tensor([0.3], dtype=torch.float64)


def ask(prior: Prior, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
    return prior.denoiser(context)(x, TIME)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(5))


def test_a_saved_prior_comes_back_with_everything(tmp_path: Path) -> None:
    prior = random_prior()
    again = Prior.load(saved(prior, tmp_path))
    assert (again.name, again.config, again.provenance) == ("tiny", prior.config, PROVENANCE)
    assert again.process == prior.process
    for name, weight in again.network.state_dict().items():
        torch.testing.assert_close(weight, prior.network.state_dict()[name].half().float(), rtol=0, atol=0)
    # 2^-11 is the rounding of a weight to half precision, 2^-8 that of each activation where bfloat16 is native
    before, after = ask(prior, image(12, 16, 8)), ask(again, image(12, 16, 8))
    torch.testing.assert_close(after, before, rtol=0, atol=0.02 * float(before.std()))


def test_a_saved_prior_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert Path(saved(white_prior(), tmp_path)).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_loaded_prior_is_ready_for_use(tmp_path: Path) -> None:
    prior = Prior.load(saved(random_prior(), tmp_path), "cpu")
    assert prior.device.type == "cpu"
    assert not prior.network.training
    assert not any(parameter.requires_grad for parameter in prior.network.parameters())


def test_metadata_are_read_without_the_weights(tmp_path: Path) -> None:
    config, provenance = read_metadata(Path(saved(white_prior(), tmp_path)))
    assert config == tiny_config()
    assert provenance == PROVENANCE


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(MedfusionError, match="brain-t9: neither a shipped prior nor a file") as error:
        Prior.load("brain-t9")
    assert error.value.facts["shipped"] == (", ".join(shipped()) or "none")


def test_a_folder_is_not_a_prior(tmp_path: Path) -> None:
    with pytest.raises(MedfusionError, match="neither a shipped prior nor a file"):
        prior_path(tmp_path)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch.save"])
def test_a_pickle_is_refused_unread(tmp_path: Path, zipped: bool) -> None:
    path, trace = tmp_path / "prior.safetensors", tmp_path / "executed"
    if zipped:
        torch.save(Bomb(trace), path)
    else:
        path.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(MedfusionError, match="not a safetensors file"):
        Prior.load(path)
    assert not trace.exists()


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(MedfusionError, match="not a medfusion prior") as error:
        Prior.load(path)
    assert error.value.facts == {"format": "pt", "expected": "medfusion-prior-1"}


@pytest.mark.parametrize("keep", [0, 5, 100, -10], ids=["empty", "length", "header", "weights"])
def test_a_truncated_prior_is_refused(tmp_path: Path, keep: int) -> None:
    path = Path(saved(white_prior(), tmp_path))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MedfusionError, match=r"tiny.safetensors: not a safetensors file"):
        Prior.load(path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mixed.safetensors"
    other = build_network(tiny_config(network={"channels": (4, 8)}))
    DiffusionPrior(tiny_config(), other, PROVENANCE).save(path)
    with pytest.raises(MedfusionError, match="the weights do not fit the config beside them"):
        Prior.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.pop("provenance"),
        lambda metadata: metadata.update(config="{"),
        lambda metadata: metadata.update(config=json.dumps(json.loads(metadata["config"]) | {"future": 1})),
    ],
    ids=["no provenance", "not JSON", "unknown setting"],
)
def test_metadata_that_cannot_be_read_are_refused(tmp_path: Path, change) -> None:
    path = tmp_path / "prior.safetensors"
    metadata = {"format": "medfusion-prior-1", "config": tiny_config().model_dump_json(), "provenance": "{}"}
    change(metadata)
    save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(MedfusionError, match="its metadata cannot be read"):
        Prior.load(path)


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 15, 21), (5, 6, 7), (1, 30, 2)])
@pytest.mark.parametrize("located", [False, True], ids=["unknown", "context"])
def test_any_shape_may_be_asked_about(shape: tuple[int, int, int], located: bool) -> None:
    context = torch.randn(1, 4, *[(n + 1) // 2 for n in shape]) if located else None
    x = image(*shape)
    answer = ask(white_prior(), x, context)
    torch.testing.assert_close(answer, x * float(white_prior().process.alpha(TIME)))  # the shape is checked too
    assert ask(random_prior(), x, context).shape == x.shape


def test_padding_is_on_the_far_side_and_repeats_the_edge() -> None:
    prior, x = random_prior(), image(17, 15, 22)
    padded = torch.nn.functional.pad(x, (0, 2, 0, 1, 0, 3), mode="replicate")
    torch.testing.assert_close(ask(prior, x), ask(prior, padded)[..., :17, :15, :22], rtol=0, atol=0)


def test_the_network_is_told_the_context() -> None:
    prior, x = random_prior(), image(16, 16, 16)
    unknown, zeros, given = (
        ask(prior, x, context) for context in (None, torch.zeros(1, 4, 8, 8, 8), torch.ones(1, 4, 8, 8, 8))
    )
    torch.testing.assert_close(unknown, zeros, rtol=0, atol=1e-5)
    assert float((given - unknown).abs().mean()) > 0.05


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 15, 22)])
def test_labels_and_classes_are_told_and_may_be_unknown(shape: tuple[int, int, int]) -> None:
    prior, x = conditional_prior(), image(*shape)
    labels = torch.randint(0, 3, (1, *shape), generator=torch.Generator().manual_seed(0))
    unknown = torch.full_like(labels, -1)
    plain = ask(prior, x)
    torch.testing.assert_close(prior.denoiser(labels=unknown, classes=torch.tensor([-1]))(x, TIME), plain)
    for told in ({"labels": labels}, {"classes": torch.tensor([1])}):
        answer = prior.denoiser(**told)(x, TIME)
        assert answer.shape == x.shape
        assert not torch.allclose(answer, plain, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("prediction", ["v", "x0", "epsilon", "edm", "score"])
def test_guidance_in_one_batch_is_that_of_two_denoisers(scale: float, prediction: str) -> None:
    shown = {"labels": 3, "classes": ("a", "b")}
    data = {"labels": "*_seg.nii.gz", "classes": "classes.csv"}
    prior = random_prior(config=tiny_config(network=shown, data=data, process={"prediction": prediction}))
    x, context = torch.cat([image(16, 16, 16), image(16, 16, 16).flip(2)]), torch.ones(2, 4, 8, 8, 8)
    labels = torch.randint(0, 3, (2, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([1, 0])
    for told in ({"labels": labels}, {"classes": classes}, {"labels": labels, "classes": classes}):
        two = classifier_free(prior.denoiser(context, **told), prior.denoiser(context), scale)
        torch.testing.assert_close(prior.denoiser(context, **told, guidance=scale)(x, TIME), two(x, TIME))
    torch.testing.assert_close(prior.denoiser(context, guidance=scale)(x, TIME), prior.denoiser(context)(x, TIME))


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"labels": torch.full((1, 16, 16, 16), 3)}, "labels"),
        ({"labels": torch.full((1, 16, 16, 16), -2)}, "labels"),
        ({"classes": torch.tensor([2])}, "classes"),
    ],
    ids=["label too high", "label too low", "class too high"],
)
def test_what_the_prior_was_not_trained_on_is_refused(told: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        conditional_prior().denoiser(**told)


def test_labels_and_classes_need_a_prior_that_was_trained_with_them() -> None:
    with pytest.raises(ValueError, match="labels"):
        random_prior().denoiser(labels=torch.zeros(1, 16, 16, 16).long())
    with pytest.raises(ValueError, match="classes"):
        random_prior().denoiser(classes=torch.tensor([0]))


def test_what_lies_on_another_grid_is_refused() -> None:
    x = image(16, 16, 16)
    with pytest.raises(ValueError, match="labels"):
        conditional_prior().denoiser(labels=torch.zeros(1, 16, 16, 18).long())(x, TIME)
    with pytest.raises(ValueError, match="context"):
        ask(random_prior(), x, torch.zeros(1, 4, 16, 16, 16))


def test_priors_from_before_there_were_labels_and_classes_answer_as_they_did(tmp_path: Path) -> None:
    """The config in the file of such a prior lacks the settings that came later."""
    prior, path = random_prior(), tmp_path / "old.safetensors"
    config = json.loads(prior.config.model_dump_json())
    for name in ("located", "labels", "classes"):
        del config["network"][name]
    metadata = {"format": "medfusion-prior-1", "config": json.dumps(config), "provenance": "{}"}
    save_file({name: w.contiguous() for name, w in prior.network.state_dict().items()}, path, metadata)
    x, context = image(16, 16, 16), torch.ones(1, 4, 8, 8, 8)
    torch.testing.assert_close(ask(Prior.load(path), x, context), ask(prior, x, context), rtol=0, atol=0)
