"""`medfusion priors` as its users run it, and the priors that the package ships."""

from importlib import resources
from pathlib import Path

from command_line import assert_refused, medfusion

from medfusion.prior import Prior, shipped

FOLDER = Path(str(resources.files("medfusion") / "priors"))


def test_every_shipped_prior_loads_and_has_its_card() -> None:
    files = sorted(FOLDER.glob("*.safetensors"))
    assert files, "the package ships no prior"
    assert [path.stem for path in files] == list(shipped())
    for path in files:
        prior = Prior.load(path.stem)
        assert prior.name == path.stem
        assert prior.config.licence
        assert {"data", "training_scans", "steps", "trained"} <= set(prior.provenance)
        assert path.stat().st_size < 15e6
        assert path.stem in path.with_suffix(".md").read_text()


def test_the_default_prior_can_state_error_rates() -> None:
    references = {(r.method, r.stripped): r for r in Prior.load("brain-t1").references}
    for method in ("default", "fast", "intensity", "blur"):
        for stripped in (False, True):
            assert references[method, stripped].scans >= 20, "a p of 0.05 needs 19"


def test_the_list() -> None:
    done = medfusion("priors")
    assert done.returncode == 0, done.stderr
    assert "Shipped priors" in done.stdout
    for name in shipped():
        assert name in done.stdout


def test_an_unknown_name() -> None:
    assert_refused(medfusion("priors", "brain-t9"), "brain-t9: no shipped prior has this name", "shipped")
