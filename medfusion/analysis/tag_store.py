"""The tags that reviewers give, in an SQLite file: written at once, safe for several reviewers, whole after a crash."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from medfusion.analysis.tags import WRONG_LABEL
from medfusion.errors import MedfusionError

APPLICATION = 0x6D656474  # "medt": by which a file of tags is known among SQLite databases
LONGEST = 200  # characters of a tag or a name; comments ten times that
TABLES = """
CREATE TABLE IF NOT EXISTS tag (name TEXT PRIMARY KEY, made TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS given (case_name TEXT, reviewer TEXT, tag TEXT REFERENCES tag(name), given_at TEXT NOT NULL,
                                  PRIMARY KEY (case_name, reviewer, tag));
CREATE TABLE IF NOT EXISTS seen (case_name TEXT, reviewer TEXT, comment TEXT NOT NULL DEFAULT '', seen_at TEXT NOT NULL,
                                 PRIMARY KEY (case_name, reviewer));
"""


class TagStore:
    """Tags, who gave them to which case, and comments.

    Every call is a transaction of its own that is on the disk when it returns. Times tell which cases a reviewer saw
    before a tag was thought of, and should see again.
    """

    def __init__(self, path: Path, tags: Sequence[str] = ()) -> None:
        """Open or make the file at ``path``, with ``tags`` beside "label is wrong".

        Raises
        ------
        MedfusionError : the file is another SQLite database, or none, or cannot be written; a tag cannot be one.
        """
        self.path = path
        try:
            if path.exists():
                self._require_ours()
            with self._open() as connection:
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.executescript(TABLES)
            for tag in (WRONG_LABEL, *tags):
                self.add_tag(tag)
        except sqlite3.Error as error:
            raise MedfusionError(
                f"{path}: cannot be used as a file of tags",
                reason=error,
                fix="a file in a folder that is there and can be written; it is made if it is not there",
            ) from error
        except ValueError as error:
            raise MedfusionError(f"a tag cannot be used: {error}") from error

    def _require_ours(self) -> None:
        """Raise a MedfusionError, before anything is changed, if the database belongs to another program."""
        connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        finally:
            connection.close()
        if tables and application != APPLICATION:
            raise MedfusionError(f"{self.path}: a database of another program", fix="name a file of its own")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=30)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            with connection:
                yield connection
        finally:
            connection.close()

    def add_tag(self, name: str) -> None:
        """A new tag, at the end; nothing if there is one of this name.

        Raises
        ------
        ValueError : the name is empty or too long.
        """
        with self._open() as connection:
            connection.execute("INSERT OR IGNORE INTO tag VALUES (?, ?)", (_text(name, "tag"), _now()))

    def tags(self) -> list[str]:
        """All tags, in the order in which they were made."""
        with self._open() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM tag ORDER BY rowid")]

    def see(self, case: str, reviewer: str) -> None:
        """Note that the reviewer is done with the case for now, tags or none."""
        with self._open() as connection:
            _see(connection, case, _text(reviewer, "reviewer"))

    def give(self, case: str, reviewer: str, tag: str, *, on: bool = True) -> None:
        """Give a tag to a case, or take it away.

        Raises
        ------
        ValueError : there is no such tag, or no name of a reviewer.
        """
        reviewer = _text(reviewer, "reviewer")
        with self._open() as connection:
            if not connection.execute("SELECT 1 FROM tag WHERE name = ?", (tag,)).fetchone():
                raise ValueError(f"no tag {tag!r}")
            if on:
                connection.execute("INSERT OR IGNORE INTO given VALUES (?, ?, ?, ?)", (case, reviewer, tag, _now()))
            else:
                key = (case, reviewer, tag)
                connection.execute("DELETE FROM given WHERE case_name = ? AND reviewer = ? AND tag = ?", key)
            _see(connection, case, reviewer)

    def comment(self, case: str, reviewer: str, text: str) -> None:
        """Replace the reviewer's comment on a case.

        Raises
        ------
        ValueError : it is too long, or there is no name of a reviewer.
        """
        _check(reviewer, WRONG_LABEL, text)
        reviewer = _text(reviewer, "reviewer")
        with self._open() as connection:
            _see(connection, case, reviewer)
            where = (text.strip(), case, reviewer)
            connection.execute("UPDATE seen SET comment = ? WHERE case_name = ? AND reviewer = ?", where)

    def state(self, reviewer: str) -> dict[str, Any]:
        """What one reviewer did: ``seen`` (case: time), ``given`` (case: tags), ``comments``; ``tags`` (name, time)."""
        with self._open() as connection:
            seen = connection.execute("SELECT case_name, seen_at, comment FROM seen WHERE reviewer = ?", (reviewer,))
            rows = seen.fetchall()
            given: dict[str, list[str]] = {}
            for case, tag in connection.execute("SELECT case_name, tag FROM given WHERE reviewer = ?", (reviewer,)):
                given.setdefault(case, []).append(tag)
            tags = connection.execute("SELECT name, made FROM tag ORDER BY rowid").fetchall()
        comments = {case: comment for case, _, comment in rows if comment}
        return {"seen": {case: time for case, time, _ in rows}, "given": given, "comments": comments, "tags": tags}

    def export(self) -> pd.DataFrame:
        """A row for each tag of each case by each reviewer, as ``read_tags`` reads them, sorted."""
        query = """SELECT seen.case_name, seen.reviewer, COALESCE(given.tag, ''), seen.comment FROM seen
                   LEFT JOIN given ON given.case_name = seen.case_name AND given.reviewer = seen.reviewer
                   ORDER BY seen.case_name, seen.reviewer, given.tag"""
        with self._open() as connection:
            rows = connection.execute(query).fetchall()
        return pd.DataFrame(rows, columns=["case", "reviewer", "tag", "comment"])

    def take_in(self, tags: pd.DataFrame) -> None:
        """Add what ``read_tags`` read. What is here stays, but a comment that is not "" replaces the one that is here.

        Raises
        ------
        ValueError : a tag is too long, or a row has no reviewer; then nothing was added.
        """
        for case, reviewer, tag, comment in tags[["case", "reviewer", "tag", "comment"]].itertuples(index=False):
            try:
                _check(reviewer, tag or WRONG_LABEL, comment)
            except ValueError as error:
                raise ValueError(f"case {case}: {error}") from error
        for case, reviewer, tag, comment in tags[["case", "reviewer", "tag", "comment"]].itertuples(index=False):
            self.see(case, reviewer)
            if tag:
                self.add_tag(tag)
                self.give(case, reviewer, tag)
            if comment:
                self.comment(case, reviewer, comment)


def _see(connection: sqlite3.Connection, case: str, reviewer: str) -> None:
    connection.execute(
        "INSERT INTO seen (case_name, reviewer, seen_at) VALUES (?, ?, ?)"
        " ON CONFLICT (case_name, reviewer) DO UPDATE SET seen_at = excluded.seen_at",
        (case, reviewer, _now()),
    )


def _check(reviewer: str, tag: str, comment: str) -> None:
    _text(reviewer, "reviewer")
    _text(tag, "tag")
    if len(comment) > 10 * LONGEST:
        raise ValueError(f"a comment has {10 * LONGEST} characters at most")


def _text(name: str, what: str) -> str:
    name = name.strip()
    if not 0 < len(name) <= LONGEST or not name.isprintable():
        raise ValueError(f"a {what} needs a name of 1 to {LONGEST} characters that can be printed")
    return name


def _now() -> str:
    """Sorts as time does."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
