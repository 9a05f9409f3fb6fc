"""`medfusion errors`, as a team runs it: on CSV files of another system."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.command_line import assert_refused, medfusion

DEFINITION = """name: masses
case: one kidney
error: {kind: classification, truth: truth, probabilities: {malignant: p}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 cases of 100 patients, 40 of them wrong: masses at site B are missed."""
    (tmp_path / "error.yaml").write_text(DEFINITION)
    rng = np.random.default_rng(0)
    rows = ["case,patient,truth,p,site,age"]
    for number in range(200):
        site = "B" if number % 4 == 0 else "A"
        wrong = number % 5 == 0 or (site == "B" and number % 3 == 0)
        rows.append(f"k{number:03d},p{number // 2},malignant,{0.2 if wrong else 0.9},{site},{rng.integers(20, 80)}")
    (tmp_path / "cases.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def errors(*arguments: object) -> str:
    done = medfusion("errors", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sizes() -> None:
    plan = json.loads(errors("sizes", "--error-rate", 0.05, "--errors", 100, "--json"))
    assert (plan["eyeball"], plan["naive"]) == (2254, 2000)
    text = errors("sizes", "--error-rate", 0.05, "--errors", 100, "--difference", 0.02, "--available", 500)
    assert "2254 cases" in text
    assert "too few for both sets" in text
    assert_refused(
        medfusion("errors", "sizes", "--error-rate", 5, "--errors", 100),
        "error rate",
        "should be from 1e-06 to below 1",
    )


def test_sizes_of_cases(folder: Path) -> None:
    stated = ["--cases", folder / "cases.csv", "--define", folder / "error.yaml"]
    plan = json.loads(errors("sizes", "--errors", 10, *stated, "--json"))
    assert plan["error_rate"] == pytest.approx(0.27, abs=0.03)
    assert plan["eyeball_patients"] == pytest.approx(plan["eyeball"] / 2, abs=1)
    assert len(plan["definition"]) == 12
    assert medfusion("errors", "sizes", "--errors", 10).returncode == 2


def test_table_and_agreement(folder: Path) -> None:
    rows = [
        f"k{number:03d},{who},{'small' if number % 2 else ''}" for number in range(0, 200, 5) for who in ("ann", "bob")
    ]
    (folder / "tags.csv").write_text("case,reviewer,tag\n" + "\n".join(rows) + "\n")
    arguments = ["table", folder / "cases.csv", folder / "tags.csv", "--define", folder / "error.yaml"]
    found = json.loads(errors(*arguments, "--json"))
    assert [row["tag"] for row in found["tags"]] == ["small", "(no tag)"]
    assert found["tags"][0]["share"] == 0.5
    assert found["looked_at"] == 40
    assert found["tags"][0]["cost"] is None
    text = errors(*arguments, "--cost", "small=2")
    assert "40 errors looked at: rough" in text
    assert "gain/cost" in text  # the last column is not cut off
    assert_refused(medfusion("errors", *arguments, "--cost", "small"), "TAG=COST")
    agree = ["agree", *arguments[1:]]
    agreed = json.loads(errors(*agree, "--json"))
    assert agreed["tags"][0]["kappa"] == 1
    assert agreed["definition"] == found["definition"]
    assert "1.00" in errors(*agree)
    with (folder / "tags.csv").open("a") as file:
        file.write("x1,ann,small\nx1,bob,small\n")
    assert_refused(medfusion("errors", *agree), "not in the table of cases", "x1")


def test_slices(folder: Path) -> None:
    arguments = ["slices", folder / "cases.csv", "--define", folder / "error.yaml"]
    found = json.loads(errors(*arguments, "--json"))
    assert found["columns"] == ["site", "age"]
    assert found["table"][0]["slice"].startswith("site is ")
    assert "kept back" in errors(*arguments, "--column", "site")
    assert_refused(medfusion("errors", *arguments, "--column", "vendor"), "lacks columns", "vendor")


def test_parts(folder: Path) -> None:
    rows = ["case,patient,fixed,truth,p"]
    for number in range(60):
        first, second = number % 3 == 0, number % 5 == 0
        for fixed in ("", "segment", "classify", "segment+classify"):
            wrong = (first and "segment" not in fixed) or (second and "classify" not in fixed)
            rows.append(f"k{number},p{number},{fixed},malignant,{0.1 if wrong else 0.8}")
    (folder / "parts.csv").write_text("\n".join(rows) + "\n")
    arguments = ["parts", folder / "parts.csv", "--define", folder / "error.yaml"]
    found = json.loads(errors(*arguments, "--json"))
    shares = {row["component"]: row["shapley"] for row in found["table"]}
    assert shares == pytest.approx({"segment": (20 - 2) / 60, "classify": (12 - 2) / 60})
    assert [name for name, _ in found["order"]] == ["segment", "classify"]
    assert "Work on segment (to 20.0 %)" in errors(*arguments)
    (folder / "parts.csv").write_text("\n".join(rows[:-1]) + "\n")
    assert_refused(medfusion("errors", *arguments), "every case needs all 4 subsets", "k59")


SYSTEM = """
from types import SimpleNamespace
from medfusion.analysis.system import component

def cases():
    return [SimpleNamespace(name=f"k{n}", patient=f"p{n}", organ=n % 3 > 0, mass=n % 5 > 0) for n in range(LAST)]

@component(oracle=lambda case: True)
def organ(case):
    return case.organ

@component(oracle=lambda case: 0.9)
def mass(case, organ):
    return 0.9 if case.mass and organ else 0.1

def score(case, mass):
    return {"truth": "malignant", "p": mass}
"""


def test_a_system_is_run_resumed_and_attributed(folder: Path) -> None:
    system, table = folder / "system.py", folder / "parts.csv"
    system.write_text(SYSTEM.replace("LAST", "40"))
    assert "40 cases with 4 subsets of organ, mass" in errors("run", system, table)
    found = json.loads(errors("run", system, folder / "again.csv", "--json"))
    assert found == {"table": str(folder / "again.csv"), "components": ["organ", "mass"], "cases": 40, "kept": 0}
    first = table.read_text()
    assert (folder / "again.csv").read_text() == first
    assert_refused(medfusion("errors", "run", system, table), "is there already")
    system.write_text(SYSTEM.replace("LAST", "60"))
    assert "20 cases" in errors("run", system, table, "--resume")
    assert table.read_text().startswith(first)
    whole = table.read_text()
    table.write_text(whole[:-30])  # killed while it wrote the last case
    assert "1 cases" in errors("run", system, table, "--resume")
    assert table.read_text().split() == whole.split()
    found = json.loads(errors("parts", table, "--define", folder / "error.yaml", "--json"))
    assert [row["alone"] for row in found["table"]] == pytest.approx([16 / 60, 28 / 60])
    assert [row["last"] for row in found["table"]] == pytest.approx([0, 12 / 60])
    system.write_text(SYSTEM.replace("LAST", "70").replace('"p": mass', '"q": mass'))
    assert_refused(medfusion("errors", "run", system, table, "--resume"), "other columns than `score` returns")


def test_report(folder: Path) -> None:
    rows = [f"k{number:03d},ann,{'small' if number % 2 else '<b>odd</b>'}" for number in range(0, 200, 5)]
    (folder / "tags.csv").write_text("case,reviewer,tag\n" + "\n".join(rows) + "\n")
    define, out = ["--define", folder / "error.yaml"], folder / "out"
    errors("split", folder / "cases.csv", folder / "split", *define, "--eyeball", 150)
    errors("ask", folder / "split", folder / "cases.csv", *define, "--model", "first")
    rows = (folder / "split" / "split.csv").read_text().splitlines()
    sealed = {row.split(",")[0] for row in rows if ",blackbox," in row}
    given = (folder / "tags.csv").read_text().splitlines()
    (folder / "tags.csv").write_text("\n".join(row for row in given if row.split(",")[0] not in sealed) + "\n")
    arguments = [
        "report",
        folder / "cases.csv",
        out,
        *define,
        "--tags",
        folder / "tags.csv",
        "--split",
        folder / "split",
    ]
    assert "blackbox cases stay sealed" in medfusion("errors", *arguments).stderr
    page = (out / "report.html").read_text()
    assert "first" in page
    assert "&lt;b&gt;odd" in page
    assert not [name for name in sealed if name in page or name in (out / "tables" / "cases.csv").read_text()]
    assert "site is " in (out / "tables" / "slices.csv").read_text()
    definitions = {line.rsplit(",", 1)[1] for line in (out / "tables" / "tags.csv").read_text().splitlines()[1:]}
    assert len(definitions) == 1
    assert definitions.pop() in page
    assert "report.html: is there already" in medfusion("errors", *arguments).stderr
    written = json.loads(errors(*arguments, "--overwrite", "--json"))
    assert written["report"] == str(out / "report.html")
    assert sorted(written["tables"]) == sorted(str(path) for path in out.glob("tables/*.csv"))
    with (folder / "tags.csv").open("a") as file:
        file.write(f"{min(sealed)},ann,peeked\n")
    done = medfusion("errors", "table", folder / "cases.csv", folder / "tags.csv", *define, "--split", folder / "split")
    assert_refused(done, "in the blackbox set", min(sealed))


def test_tables_that_cannot_be_read(folder: Path) -> None:
    (folder / "bad.csv").write_text((folder / "cases.csv").read_text().replace("k003,p1,", "k003,,"))
    done = medfusion("errors", "slices", folder / "bad.csv", "--define", folder / "error.yaml")
    assert_refused(done, "bad.csv: cases without a patient", "k003")
    (folder / "error.yaml").write_text("name: x\n")
    assert_refused(
        medfusion("errors", "slices", folder / "cases.csv", "--define", folder / "error.yaml"), "Field required"
    )


def test_a_split_is_asked_and_refilled(folder: Path) -> None:
    define, split = ["--define", folder / "error.yaml"], folder / "split"
    (folder / "train.txt").write_text("p3\nk010\np900\n")
    arguments = ["split", folder / "cases.csv", split, *define, "--eyeball", 60, "--stratify", "site"]
    text = errors(*arguments, "--taken", folder / "train.txt")
    assert "eyeball   60 cases of 30 patients" in text
    assert "train.txt: 2 of 3 names are in the table" in text
    assert "Left out, as their patients are in other sets: k006, k007, k010, k011" in text
    assert_refused(medfusion("errors", *arguments), "is there already")

    again = json.loads(
        errors(*arguments[:2], folder / "again", *arguments[3:], "--taken", folder / "train.txt", "--json")
    )
    assert again["parts"]["eyeball"] == {"cases": 60, "patients": 30}
    assert again["taken"] == {str(folder / "train.txt"): {"names": 3, "in_table": 2}}
    assert again["left_out"] == ["k006", "k007", "k010", "k011"]
    assert (folder / "again" / "split.csv").read_text() == (split / "split.csv").read_text()

    model = [split, folder / "cases.csv", *define, "--model"]
    assert "question 1 to" in errors("ask", *model, "first")
    assert json.loads(errors("ask", *model, "second", "--json"))["query"] == 2

    perfect = (folder / "cases.csv").read_text().replace(",0.2,", ",0.9,")
    sealed = [line.split(",")[0] for line in (split / "split.csv").read_text().splitlines() if ",blackbox," in line]
    kept = {line.split(",")[0]: line for line in (folder / "cases.csv").read_text().splitlines()}
    lines = [kept[name] if (name := line.split(",")[0]) in sealed else line for line in perfect.splitlines()]
    (folder / "now.csv").write_text("\n".join(lines) + "\n")
    two = ["overfit", split, folder / "cases.csv", folder / "now.csv", *define, "--model"]
    assert "worn out" in errors(*two, "third")
    found = json.loads(errors(*two, "fourth", "--json"))
    assert (found["verdict"], found["look"], found["blackbox"]["now"]) == ("overfit", 4, found["blackbox"]["before"])

    assert "eyeball   80 cases of 40 patients" in errors("refill", split, "--patients", 10)
    assert json.loads(errors("ask", *model, "fifth", "--json"))["cases"] == 196 - 80
    found = json.loads(errors("refill", split, "--patients", 1, "--json"))
    assert found["parts"]["eyeball"] == {"cases": 82, "patients": 41}
    (split / "split.csv").write_text((split / "split.csv").read_text().replace("blackbox", "eyeball", 1))
    assert_refused(medfusion("errors", "ask", *model, "sixth"), "was changed by hand")


def test_a_scan_under_two_names_stays_in_one_part(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        array = rng.normal(size=(6, 7, 8)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), scans / f"s{number}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(array[::-1].copy(), np.diag([-1.0, 1, 1, 1])), scans / "s0.nii.gz")
    (tmp_path / "error.yaml").write_text(DEFINITION)
    (tmp_path / "cases.csv").write_text("case,patient\n" + "".join(f"s{k},p{k}\n" for k in range(12)))
    arguments = ["split", tmp_path / "cases.csv", tmp_path / "split", "--define", tmp_path / "error.yaml"]
    text = errors(*arguments, "--eyeball", 4, "--images", scans)
    assert "The same scan, kept in one part: s0 = s11" in text
    (tmp_path / "cases.csv").write_text("case,patient\ns0,p\nt0,q\n")
    done = medfusion("errors", *arguments[:2], tmp_path / "other", *arguments[3:], "--eyeball", 1, "--images", scans)
    assert_refused(done, "1 of 2 cases have no file in", "t0")


def test_the_eyeball_cases_are_served_and_the_blackbox_stays_sealed(tmp_path: Path) -> None:
    for kind in ("scans", "truths"):
        (tmp_path / kind).mkdir()
        for number in range(12):
            array = np.random.default_rng(number).normal(size=(6, 7, 8)) if kind == "scans" else np.ones((6, 7, 8))
            nibabel.save(
                nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), tmp_path / kind / f"s{number}.nii.gz"
            )
    (tmp_path / "error.yaml").write_text("name: x\ncase: y\nerror: {kind: value, column: dice, below: 0.7}\n")
    lines = [f"s{number},p{number},{number % 2}" for number in range(12)]
    (tmp_path / "cases.csv").write_text("case,patient,dice\n" + "\n".join(lines) + "\n")
    (tmp_path / "tags.csv").write_text("case,reviewer,tag,comment\ns0,bob,motion,blurred\n")
    define = ["--define", tmp_path / "error.yaml"]
    errors("split", tmp_path / "cases.csv", tmp_path / "split", *define, "--eyeball", 8)
    rows = (tmp_path / "split" / "split.csv").read_text().splitlines()
    eyeball = {row.split(",")[0] for row in rows if ",eyeball," in row}
    options = ["--images", tmp_path / "scans", "--truths", tmp_path / "truths", "--store", tmp_path / "tags.sqlite"]
    options += ["--split", tmp_path / "split", "--correct", 1, "--tag", "noisy", "--import", tmp_path / "tags.csv"]
    command = [sys.executable, "-m", "medfusion", "errors", "tag", tmp_path / "cases.csv", *define, *options, "--json"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        assert server.stderr.readline() == "4 blackbox cases stay sealed\n"
        about = json.loads(server.stdout.readline())
        address = about["address"]
        study = json.loads(urllib.request.urlopen(f"{address}study/bob", timeout=60).read())
        names = json.loads(urllib.request.urlopen(f"{address}image/0/names", timeout=60).read())
        saved = urllib.request.urlopen(f"{address}tags.csv", timeout=60).read().decode()
        server.terminate()
        assert server.wait(60) == 0
    assert about == {
        "address": address,
        "cases": len(study["cases"]),
        "store": str(tmp_path / "tags.sqlite"),
        "definition": about["definition"],
    }
    assert saved.splitlines() == [
        "case,reviewer,tag,comment,definition",
        f"s0,bob,motion,blurred,{about['definition']}",
    ]
    assert set(study["cases"]) <= eyeball
    wrong = {f"s{number}" for number in range(0, 12, 2)} & eyeball
    assert wrong < set(study["cases"])
    assert len(study["cases"]) == len(wrong) + 1
    assert [name for name, _ in study["tags"]] == ["label is wrong", "noisy", "motion"]
    assert study["comments"] == {"s0": "blurred"}
    assert names == ["scan", "truth"]
    sealed = next(name for name in sorted({f"s{number}" for number in range(12)} - eyeball))
    (tmp_path / "tags.csv").write_text(f"case,reviewer,tag\n{sealed},ann,peeked\n")
    done = medfusion(*command[3:])
    assert done.returncode == 2
    assert "in the blackbox set" in done.stderr
    assert sealed in done.stderr
    (tmp_path / "scans" / "s0.nii.gz").unlink()
    done = medfusion("errors", "tag", tmp_path / "cases.csv", *define, *options[:6])
    assert_refused(done, "have no file in", "s0")


def test_what_is_measured_on_the_scans_tells_where_the_errors_are(tmp_path: Path) -> None:
    """Half of the scans are noisy, and the system errs on these: the slice is found, as nobody had to write it down."""
    for kind in ("scans", "truths"):
        (tmp_path / kind).mkdir()
    rng = np.random.default_rng(0)
    lines = ["case,patient,dice"]
    for number in range(80):
        head = np.zeros((12, 13, 14), np.float32)
        head[2:-2, 2:-2, 2:-2] = 100
        truth = np.zeros(head.shape, np.uint8)
        truth[4 : 5 + number % 3, 4:6, 4:6] = 1
        noisy = number % 2 == 0
        head += rng.normal(0, 20 if noisy else 5, head.shape)
        for kind, array in (("scans", head), ("truths", truth)):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 1, 2.5, 1])), tmp_path / kind / f"s{number}.nii.gz")
        lines.append(f"s{number},p{number},{0.5 if noisy and number % 6 else 0.9}")
    (tmp_path / "error.yaml").write_text("name: x\ncase: y\nerror: {kind: value, column: dice, below: 0.7}\n")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    define, measured = ["--define", tmp_path / "error.yaml"], tmp_path / "measured.csv"
    arguments = ["measure", tmp_path / "cases.csv", measured, *define, "--images", tmp_path / "scans"]
    assert "80 cases, with modality" in errors(*arguments, "--truths", tmp_path / "truths")
    rows = [line.split(",") for line in measured.read_text().splitlines()]
    assert [row[:3] for row in rows] == [line.split(",") for line in lines]
    first = dict(zip(rows[0], rows[1], strict=True))
    assert (first["pixel_mm"], first["slice_mm"], first["truth_ml"]) == ("1.0", "2.5", "0.01")
    found = json.loads(errors("slices", measured, *define, "--json"))
    assert {"noise", "truth_ml"} <= set(found["columns"])
    assert found["table"][0]["slice"].startswith("noise > ")
    assert found["table"][0]["confirmed"]

    assert_refused(medfusion("errors", *arguments), "measured.csv: is there already")
    assert json.loads(errors(*arguments, "--overwrite", "--json"))["columns"][-1] == "blur_mm"
    done = medfusion("errors", "measure", measured, tmp_path / "twice.csv", *arguments[3:])
    assert_refused(done, "has columns that would be measured", "noise")
    (tmp_path / "scans" / "s7.nii.gz").unlink()
    assert_refused(medfusion("errors", *arguments, "--overwrite"), "1 of 80 cases have no file in", "s7")


def test_what_is_there_stays_there(folder: Path) -> None:
    """Outputs that would replace something else are refused before any work, whatever --overwrite says."""
    define, cases = ["--define", folder / "error.yaml"], (folder / "cases.csv").read_text()
    (folder / "tags.csv").write_text("case,reviewer,tag\nk000,ann,small\n")
    errors("report", folder / "cases.csv", folder, *define, "--tags", folder / "tags.csv", "--overwrite")
    assert (folder / "cases.csv").read_text() == cases
    assert (folder / "tags.csv").read_text() == "case,reviewer,tag\nk000,ann,small\n"
    (folder / "study" / "tables").mkdir(parents=True)
    (folder / "study" / "tables" / "mine.csv").write_text("a\n")
    done = medfusion("errors", "report", folder / "cases.csv", folder / "study", *define, "--overwrite")
    assert_refused(done, "is of no report")
    assert (folder / "study" / "tables" / "mine.csv").exists()
    scans = folder / "scans"
    scans.mkdir()
    (scans / "k000.nii.gz").write_text("")
    done = medfusion("errors", "measure", folder / "cases.csv", scans, *define, "--images", scans, "--overwrite")
    assert_refused(done, "have no file in")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), scans / "k000.nii.gz")
    (folder / "one.csv").write_text("\n".join(cases.splitlines()[:2]) + "\n")
    done = medfusion("errors", "measure", folder / "one.csv", scans, *define, "--images", scans, "--overwrite")
    assert_refused(done, "a folder is in the way")
    assert (scans / "k000.nii.gz").exists()


def test_a_table_of_another_system_is_not_resumed(folder: Path) -> None:
    system, table = folder / "system.py", folder / "parts.csv"
    system.write_text(SYSTEM.replace("LAST", "4"))
    errors("run", system, table)
    before = table.read_bytes()
    system.write_text(SYSTEM.replace("LAST", "6").replace("mass", "tumour"))
    assert_refused(medfusion("errors", "run", system, table, "--resume"), "made with other components")
    assert table.read_bytes() == before
    system.write_text(SYSTEM.replace("LAST", "6").replace('return {"truth"', 'return {"case"'))
    assert_refused(medfusion("errors", "run", system, table, "--resume"), "score() has to return")
    (folder / "one.csv").write_text("".join(before.decode().splitlines(keepends=True)[:5]))  # a single case
    one = (folder / "one.csv").read_bytes()
    system.write_text(SYSTEM.replace("LAST", "6").replace("mass", "tumour"))
    assert_refused(medfusion("errors", "run", system, folder / "one.csv", "--resume"), "made with other components")
    assert (folder / "one.csv").read_bytes() == one
    system.write_text("raise SystemExit(3)\n")
    assert_refused(medfusion("errors", "run", system, folder / "new.csv"), "cannot be executed")
    assert table.read_bytes() == before


def test_renamed_columns_go_through_the_whole_chain(folder: Path) -> None:
    (folder / "error.yaml").write_text(DEFINITION + "columns: {case: scan, patient: subject}\nscores: [other]\n")
    lines = (folder / "cases.csv").read_text().splitlines()
    scored = ["scan,subject,truth,p,site,age,other", *(f"{line},{line.split(',')[3]}" for line in lines[1:])]
    (folder / "cases.csv").write_text("\n".join(scored) + "\n")
    define = ["--define", folder / "error.yaml"]
    assert "other" not in json.loads(errors("slices", folder / "cases.csv", *define, "--json"))["columns"]
    (folder / "system.py").write_text(SYSTEM.replace("LAST", "40"))
    errors("run", folder / "system.py", folder / "parts.csv")
    assert "Work on" in errors("parts", folder / "parts.csv", *define)
    (folder / "unscored.yaml").write_text(DEFINITION + "columns: {case: scan, patient: subject}\n")
    text = errors("slices", folder / "cases.csv", "--define", folder / "unscored.yaml")
    assert "list its column under `scores`" in text


def test_a_split_of_other_cases_opens_nothing(folder: Path) -> None:
    define, split = ["--define", folder / "error.yaml"], folder / "split"
    errors("split", folder / "cases.csv", split, *define, "--eyeball", 150)
    renamed = (folder / "cases.csv").read_text().replace("\nk", "\nK")
    (folder / "renamed.csv").write_text(renamed)
    done = medfusion("errors", "slices", folder / "renamed.csv", *define, "--split", split)
    assert_refused(done, "none of the cases is in the eyeball set")
    (folder / "more.csv").write_text((folder / "cases.csv").read_text() + "new,q,malignant,0.9,A,50\n")
    done = medfusion("errors", "slices", folder / "more.csv", *define, "--split", split)
    assert "1 cases are not in the split and are left out: new" in done.stderr
    sealed = next(line for line in (split / "split.csv").read_text().splitlines() if ",blackbox," in line).split(",")[0]
    (folder / "tags.csv").write_text(f"case,reviewer,tag\n{sealed},ann,x\n{sealed},bob,x\n")
    done = medfusion("errors", "agree", folder / "cases.csv", folder / "tags.csv", *define, "--split", split)
    assert_refused(done, "in the blackbox set", sealed)


def test_what_cannot_be_answered_is_not_asked(folder: Path) -> None:
    define, split, log = ["--define", folder / "error.yaml"], folder / "split", folder / "split" / "log.jsonl"
    errors("split", folder / "cases.csv", split, *define, "--eyeball", 190)
    before = log.read_text()
    two = ["overfit", split, folder / "cases.csv", folder / "cases.csv", *define, "--model", "m"]
    assert_refused(medfusion("errors", *two, "--tolerance", "nan"), "out of range")
    assert_refused(medfusion("errors", *two), "blackbox set has")
    assert_refused(
        medfusion("errors", "ask", split, folder / "cases.csv", *define, "--model", " "), "a name of the model"
    )
    assert log.read_text() == before
    (folder / "other.yaml").write_text(DEFINITION + "severity: {bad: 1}\n")
    asked = ["ask", split, folder / "cases.csv", "--define", folder / "other.yaml", "--model", "m"]
    assert "by another definition of an error" in errors(*asked)


def test_bad_input_is_named(folder: Path) -> None:
    define, cases = ["--define", folder / "error.yaml"], (folder / "cases.csv").read_text()
    (folder / "tags.csv").write_text("case,reviewer,tag,comment,definition\nk000,ann,small,,0123\nk000,bob,,,\n")
    table = ["table", folder / "cases.csv", folder / "tags.csv", *define]
    assert_refused(medfusion("errors", *table, "--error-rate", 5), "error rate 5")
    text = errors(*table)
    assert "another definition of an error: 0123" in text
    assert "2 reviewers" in text
    for change, message in (
        (lambda text: text.replace(",", ";"), "not separated by commas"),
        (lambda text: text.replace("site", "loss"), "names of those that a judgement adds"),
        (lambda text: text.replace("k003", '"k\r3"'), "cannot be printed"),
    ):
        (folder / "bad.csv").write_text(change(cases))
        assert_refused(medfusion("errors", "slices", folder / "bad.csv", *define), "bad.csv", message)
    (folder / "error.yaml").write_text("name: x\ncase: y\nerror: {kind: value, column: p, below: .nan}\n")
    assert_refused(medfusion("errors", "slices", folder / "cases.csv", *define), "finite number")
    assert_refused(medfusion("errors", "sizes", "--errors", 20, "--error-rate", 1e-300), "error rate", "1e-06")
