"""The store of tags: nothing is lost when a process is killed, reviewers do not get into each other's way."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from medfusion.analysis.tag_store import TagStore
from medfusion.analysis.tags import WRONG_LABEL, read_tags
from medfusion.errors import MedfusionError


def test_tags_are_given_taken_away_and_exported(tmp_path: Path) -> None:
    store = TagStore(tmp_path / "tags.sqlite", ["noisy"])
    store.give("b", "ann", "noisy")
    store.give("b", "ann", WRONG_LABEL)
    store.give("b", "bob", "noisy")
    store.give("b", "bob", "noisy", on=False)
    store.comment("b", "ann", ' "odd", <b>\n')
    store.see("a", "ann")
    store.add_tag("motion")
    store.add_tag(" noisy ")
    assert store.tags() == [WRONG_LABEL, "noisy", "motion"]
    store.export().to_csv(tmp_path / "tags.csv", index=False)
    assert read_tags(tmp_path / "tags.csv").to_numpy().tolist() == [
        ["a", "ann", "", "", ""],
        ["b", "ann", WRONG_LABEL, '"odd", <b>', ""],
        ["b", "ann", "noisy", '"odd", <b>', ""],
        ["b", "bob", "", "", ""],
    ]
    again = TagStore(tmp_path / "tags.sqlite")
    assert again.state("ann")["given"] == {"b": [WRONG_LABEL, "noisy"]}
    assert again.state("nobody")["seen"] == {}


def test_cases_that_were_seen_before_a_tag_are_known(tmp_path: Path) -> None:
    store = TagStore(tmp_path / "tags.sqlite")
    store.see("a", "ann")
    store.add_tag("motion")
    store.see("b", "ann")
    state = store.state("ann")
    assert [case for case, time in state["seen"].items() if time < dict(state["tags"])["motion"]] == ["a"]


def test_import_adds(tmp_path: Path) -> None:
    store = TagStore(tmp_path / "tags.sqlite")
    store.give("a", "ann", WRONG_LABEL)
    rows = [["a", "ann", "ghosting", "see b"], ["b", "ann", "", ""]]
    store.take_in(pd.DataFrame(rows, columns=["case", "reviewer", "tag", "comment"]))
    assert store.export()["tag"].tolist() == ["ghosting", WRONG_LABEL, ""]
    with pytest.raises(ValueError, match="reviewer"):
        store.take_in(pd.DataFrame([["a", "", "x", ""]], columns=["case", "reviewer", "tag", "comment"]))


WRITER = """
import sys
from pathlib import Path
from medfusion.analysis.tag_store import TagStore
store = TagStore(Path(sys.argv[1]), ["noisy"])
for number in range(100000):
    store.give(f"case{number}", "ann", "noisy")
    print(number, flush=True)
"""


def test_nothing_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "tags.sqlite"
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(50)]
        os.kill(writer.pid, signal.SIGKILL)
        told += [int(line) for line in writer.stdout]
    kept = TagStore(path).state("ann")["given"]
    assert set(kept) >= {f"case{number}" for number in told}


def test_two_reviewers_at_once(tmp_path: Path) -> None:
    store = TagStore(tmp_path / "tags.sqlite", ["noisy"])

    def review(reviewer: str) -> None:
        for number in range(40):
            store.give(f"case{number}", reviewer, "noisy")

    threads = [threading.Thread(target=review, args=(name,)) for name in ("ann", "bob", "eve")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.export()) == 120


def test_what_is_refused(tmp_path: Path) -> None:
    store = TagStore(tmp_path / "tags.sqlite")
    for reviewer, tag in (("", WRONG_LABEL), ("ann", "unknown"), ("a" * 201, WRONG_LABEL)):
        with pytest.raises(ValueError, match=r"name|no tag"):
            store.give("a", reviewer, tag)
    with pytest.raises(ValueError, match="tag needs a name"):
        store.add_tag(" ")
    with pytest.raises(ValueError, match="2000 characters"):
        store.comment("a", "ann", "x" * 2001)
    assert store.export().empty
    (tmp_path / "other.sqlite").write_text("case,tag\n" * 100)
    with pytest.raises(MedfusionError, match="cannot be used as a file of tags"):
        TagStore(tmp_path / "other.sqlite")
    with pytest.raises(MedfusionError, match="cannot be used as a file of tags"):
        TagStore(tmp_path / "nowhere" / "tags.sqlite")
    with pytest.raises(MedfusionError, match="a tag cannot be used"):
        TagStore(tmp_path / "new.sqlite", ["x" * 201])


def test_the_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "patients.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE tag (id INTEGER)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(MedfusionError, match="of another program"):
        TagStore(path)
    assert path.read_bytes() == before


def test_tags_are_taken_in_all_or_none(tmp_path: Path) -> None:
    store = TagStore(tmp_path / "tags.sqlite")
    rows = [("a", "ann", "noisy", ""), ("b", "", "noisy", "")]
    with pytest.raises(ValueError, match="case b: a reviewer needs a name"):
        store.take_in(pd.DataFrame(rows, columns=["case", "reviewer", "tag", "comment"]))
    assert store.export().empty
    assert store.tags() == [WRONG_LABEL]
