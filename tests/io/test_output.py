"""Outputs appear whole or not at all, whatever interrupts them: real files, a real size limit, a real full disk."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from medfusion.errors import MedfusionError
from medfusion.io.output import check_output, staged


def everything(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_folder(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "1.txt").write_text(text)


def interrupted(target: Path, write: Callable[[Path], object], interruption: type[BaseException]) -> None:
    with staged(target, overwrite=True) as beside:
        write(beside)
        raise interruption


def test_file_appears_at_the_end_under_its_suffix_and_in_new_folders(tmp_path):
    target = tmp_path / "a" / "b" / "scan.nii.gz"
    with staged(target) as beside:
        assert beside.parent == target.parent
        assert beside.name.endswith("scan.nii.gz")
        assert beside.name.startswith(".")
        beside.write_text("voxels")
        assert not target.exists()
    assert everything(tmp_path) == {"a/b/scan.nii.gz": "voxels"}


def test_folder_appears_at_the_end(tmp_path):
    with staged(tmp_path / "series") as beside:
        write_folder(beside, "slice")
        assert not (tmp_path / "series").exists()
    assert everything(tmp_path) == {"series/1.txt": "slice"}


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("write", [lambda p: p.write_text("half"), lambda p: write_folder(p, "half")])
def test_interruption_leaves_nothing_and_keeps_what_was_there(tmp_path, interruption, write):
    write(tmp_path / "old")
    before = everything(tmp_path)
    for target in ("old", "new"):
        with pytest.raises(interruption):
            interrupted(tmp_path / target, write, interruption)
    assert everything(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("old", ["file", "folder", "link to folder", "broken link"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_existing_output_is_refused_and_replaced_only_on_overwrite(tmp_path, old, new):
    target, elsewhere = tmp_path / "out" / "x", tmp_path / "elsewhere"
    target.parent.mkdir()
    write_folder(elsewhere, "mine")
    if old == "file":
        target.write_text("old")
    elif old == "folder":
        write_folder(target, "old")
    else:
        target.symlink_to(elsewhere if old == "link to folder" else tmp_path / "nowhere")
    with pytest.raises(MedfusionError, match="exists already") as error, staged(target):
        pytest.fail("the block must not run")
    assert "--overwrite" in str(error.value)
    assert "--resume" in str(error.value)
    if (old, new) == ("folder", "file"):  # what is in it would be gone
        with pytest.raises(MedfusionError, match="a folder is in the way"), staged(target, overwrite=True) as beside:
            beside.write_text("new")
        assert everything(target.parent) == {"x/1.txt": "old"}
        return
    with staged(target, overwrite=True) as beside:
        beside.write_text("new") if new == "file" else write_folder(beside, "new")
    assert everything(target.parent) == ({"x": "new"} if new == "file" else {"x/1.txt": "new"})
    assert len(list(target.parent.iterdir())) == 1
    assert everything(elsewhere) == {"1.txt": "mine"}


def test_failed_replacement_puts_the_old_folder_back(tmp_path):
    write_folder(tmp_path / "x", "old")
    with pytest.raises(FileNotFoundError), staged(tmp_path / "x", overwrite=True):
        pass  # nothing was written, so there is nothing to rename
    assert everything(tmp_path) == {"x/1.txt": "old"}


FULL = """
    import resource
    from pathlib import Path
    import numpy as np
    from medfusion.errors import MedfusionError
    from medfusion.io.nifti import write_nifti
    from medfusion.io.output import staged
    from medfusion.volume import Volume

    out = Path({out!r})
    if {limit}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    noise = np.random.default_rng(0).normal(size=(64, 64, 64)).astype(np.float32)
    for name in ("scan.nii", "scan.nii.gz"):
        try:
            write_nifti(Volume(noise, np.eye(4)), out / name)
        except MedfusionError as error:
            print(error)
    try:
        with staged(out / "series") as folder:
            folder.mkdir()
            for k in range(3):
                (folder / str(k)).write_bytes(noise.tobytes())
    except MedfusionError as error:
        print(error)
    print("left:", sorted(p.name for p in out.rglob("*")))
"""


def run_full(out: Path, limit: int, *prefix: str) -> list[str]:
    script = textwrap.dedent(FULL.format(out=str(out), limit=limit))
    result = subprocess.run([*prefix, sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def assert_full(lines: list[str]) -> None:
    assert sum("no space left to write it" in line for line in lines) == 3
    assert sum(line.strip().startswith("free") and line.endswith("MiB") for line in lines) == 3
    assert lines[-1] == "left: []"


def test_file_size_limit_is_an_error_and_leaves_nothing(tmp_path):
    assert_full(run_full(tmp_path, limit=100_000))


@pytest.mark.skipif(
    not sys.platform.startswith("linux")
    or subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode != 0,
    reason="needs the right to mount a small disk in a private namespace",
)
def test_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    mount = f'mount -t tmpfs -o size=200k none "{tmp_path}" && exec "$@"'
    assert_full(run_full(tmp_path, 0, "unshare", "-rm", "sh", "-c", mount, "sh"))


def test_control_c_leaves_nothing(tmp_path):
    script = """
        import signal, sys, time
        from pathlib import Path
        from medfusion.io.output import staged
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
        with staged(Path(sys.argv[1]) / "series") as folder:
            folder.mkdir()
            (folder / "1").write_text("half")
            print("writing", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) != 0
    assert list(tmp_path.iterdir()) == []


def test_separate_output_passes_and_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "there").mkdir()
    check_output(tmp_path / "out" / "deep", tmp_path / "in")
    check_output(tmp_path / "there", tmp_path / "in")
    check_output(tmp_path / "in2", tmp_path / "in")  # the same beginning, yet another folder
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "there"]


def test_one_file_to_another_beside_it_passes_even_if_it_exists(tmp_path):
    for name in ("scan.nii.gz", "done.nii.gz"):
        (tmp_path / name).touch()
    check_output(tmp_path / "new.nii", tmp_path / "scan.nii.gz")
    check_output(tmp_path / "done.nii.gz", tmp_path / "scan.nii.gz")
    check_output(tmp_path, tmp_path / "scan.nii.gz")  # results beside a single scan, under names of their own
    with pytest.raises(MedfusionError, match="is the input"):
        check_output(tmp_path / "scan.nii.gz", tmp_path / "scan.nii.gz")


@pytest.mark.parametrize(
    ("out", "inputs", "message"),
    [
        ("in", "in", "is the input"),
        ("in/../in", "in", "is the input"),
        ("link", "in", "is the input"),
        ("in/out", "in", "lies inside the input"),
        ("link/out", "in", "lies inside the input"),
        ("in", "link", "is the input"),
        (".", "in", "the input lies inside the output"),
        ("in/scan.txt", "out", "a file is in the way"),
        ("in/scan.nii/out", "out", "a file is in the way"),
        ("in/scan.nii/deep/out", "out", "a file is in the way"),
        ("in/scan.txt/out.nii", "out", "a file is in the way"),
    ],
)
def test_output_tangled_with_input_or_blocked(tmp_path, out, inputs, message):
    (tmp_path / "in").mkdir()
    for name in ("scan.nii", "scan.txt"):
        (tmp_path / "in" / name).write_text("voxels")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(MedfusionError, match=message) as error:
        check_output(tmp_path / out, tmp_path / inputs)
    assert error.value.fix
    assert everything(tmp_path / "in") == {"scan.nii": "voxels", "scan.txt": "voxels"}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody may write to")
def test_unwritable_folder_is_one_error(tmp_path):
    with pytest.raises(MedfusionError, match="cannot be written") as error:
        check_output(Path("/proc/medfusion/out"), tmp_path)
    assert "/proc" in str(error.value)
    with pytest.raises(MedfusionError, match="cannot be written"), staged(Path("/proc/medfusion.nii")):
        pytest.fail("the block must not run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_one_error(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(MedfusionError, match="cannot be written"):
        check_output(locked / "out", tmp_path / "in")
