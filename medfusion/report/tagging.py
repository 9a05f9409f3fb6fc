"""The tagging page: reviewers look at cases in a viewer and tag them by keyboard; served to this machine alone.

Only a request with the token in its address is answered, only from a page of this server, and only for cases of the
study, which are asked for by number. Nothing is kept in the browser: every tag goes to the store at once.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from medfusion.errors import MedfusionError
from medfusion.report.page import template_environment

HOST = "127.0.0.1"
LARGEST = 20_000  # bytes of a request
_HERE = Path(__file__).parent
_SCRIPTS = {
    "niivue.js": _HERE / "vendor/niivue/niivue.umd.js",
    "viewer.js": _HERE / "viewer.js",
    "tagging.js": _HERE / "tagging.js",
}
# The browser itself enforces it: scripts and data of this server alone, no frame around the page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; img-src data: blob:; "
    "worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Store(Protocol):
    """What the page needs of ``medfusion.analysis.tag_store.TagStore``."""

    def add_tag(self, name: str) -> None:
        """A new tag."""

    def see(self, case: str, reviewer: str) -> None:
        """A case that was looked at."""

    def give(self, case: str, reviewer: str, tag: str, *, on: bool = True) -> None:
        """A tag given or taken away."""

    def comment(self, case: str, reviewer: str, text: str) -> None:
        """A comment."""

    def state(self, reviewer: str) -> dict[str, Any]:
        """What a reviewer did."""

    def export(self) -> pd.DataFrame:
        """All of it."""


@dataclass(frozen=True)
class Study:
    """Cases in the order in which they are shown, and where their tags go.

    ``definition`` is the hash of what an error is; ``images`` returns the pictures of a case: gzipped NIfTI files by
    name, "scan" first, then "prediction" and "truth", as far as there are any.
    """

    title: str
    definition: str
    cases: Sequence[str]
    images: Callable[[str], dict[str, bytes]]
    store: Store


class TaggingServer(ThreadingHTTPServer):
    """Serves one study on 127.0.0.1; ``address`` is what a reviewer opens.

    Parameters
    ----------
    port : 0 takes any that is free.
    """

    daemon_threads = True

    def __init__(self, study: Study, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.study, self.token = study, secrets.token_urlsafe(24)

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return f"http://{HOST}:{self.server_address[1]}"

    @property
    def address(self) -> str:
        """With the token, which is the key to the study."""
        return f"{self.origin}/{self.token}/"


class _Refused(Exception):
    """A request that is not answered."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: TaggingServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(
            {"": self._page, "script": self._script, "study": self._study, "image": self._image, "tags.csv": self._csv}
        )

    def do_POST(self) -> None:
        self._answer({"see": self._see, "give": self._give, "comment": self._comment, "new": self._new})

    def _answer(self, places: dict[str, Callable[[list[str]], tuple[str, bytes]]]) -> None:
        try:
            place, *rest = self._path()
            if place not in places:
                raise _Refused(HTTPStatus.NOT_FOUND, "no such page")
            kind, content = places[place](rest)
        except _Refused as error:
            self._send(error.status, "text/plain; charset=utf-8", f"{error}\n".encode())
        except MedfusionError as error:  # a scan that cannot be read
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, "text/plain; charset=utf-8", f"{error}\n".encode())
        except (ValueError, RecursionError) as error:
            self._send(HTTPStatus.BAD_REQUEST, "text/plain; charset=utf-8", f"{error}\n".encode())
        else:
            self._send(HTTPStatus.OK, kind, content)

    def _path(self) -> list[str]:
        """The parts of the address after the token.

        The name by which the server was called is checked, so that another site's name that points here gets nothing
        (DNS rebinding), and so is the page from which a request comes (cross-site requests).
        """
        if self.headers.get("Host") != self.server.origin.removeprefix("http://"):
            raise _Refused(HTTPStatus.FORBIDDEN, "called by another name")
        if self.headers.get("Origin", self.server.origin) != self.server.origin:
            raise _Refused(HTTPStatus.FORBIDDEN, "asked by another page")
        if self.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
            raise _Refused(HTTPStatus.FORBIDDEN, "asked by another site")
        token, *parts = self.path.partition("?")[0].strip("/").split("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "the address lacks its token")
        return parts or [""]

    def _page(self, rest: list[str]) -> tuple[str, bytes]:
        if rest or not self.path.endswith("/"):
            raise _Refused(HTTPStatus.NOT_FOUND, "no such page")
        html = (
            template_environment()
            .get_template("tagging.html")
            .render(title=self.server.study.title, licence=(_HERE / "vendor/niivue/LICENSE").read_text("utf-8"))
        )
        return "text/html; charset=utf-8", html.encode()

    def _script(self, rest: list[str]) -> tuple[str, bytes]:
        if len(rest) != 1 or rest[0] not in _SCRIPTS:
            raise _Refused(HTTPStatus.NOT_FOUND, "no such script")
        return "text/javascript; charset=utf-8", _SCRIPTS[rest[0]].read_bytes()

    def _study(self, rest: list[str]) -> tuple[str, bytes]:
        """Cases, and what this reviewer did: study/REVIEWER."""
        from urllib.parse import unquote

        study, reviewer = self.server.study, unquote(rest[0]) if rest else ""
        return _json({"cases": list(study.cases), **study.store.state(reviewer)})

    def _image(self, rest: list[str]) -> tuple[str, bytes]:
        """image/NUMBER/NAME.nii.gz"""
        if len(rest) != 2:
            raise _Refused(HTTPStatus.NOT_FOUND, "no such image")
        images = self.server.study.images(self._case(rest[0]))
        name = rest[1].removesuffix(".nii.gz")
        if name == "names":
            return _json(list(images))
        if name not in images:
            raise _Refused(HTTPStatus.NOT_FOUND, "no such image")
        return "application/gzip", images[name]

    def _csv(self, rest: list[str]) -> tuple[str, bytes]:
        table = self.server.study.store.export().assign(definition=self.server.study.definition)
        return "text/csv; charset=utf-8", table.to_csv(index=False).encode()

    def _see(self, rest: list[str]) -> tuple[str, bytes]:
        body = self._body()
        self.server.study.store.see(self._case(body["case"]), body.text("reviewer"))
        return _json({})

    def _give(self, rest: list[str]) -> tuple[str, bytes]:
        body = self._body()
        case = self._case(body["case"])
        self.server.study.store.give(case, body.text("reviewer"), body.text("tag"), on=body["on"] is True)
        return _json({})

    def _comment(self, rest: list[str]) -> tuple[str, bytes]:
        body = self._body()
        self.server.study.store.comment(self._case(body["case"]), body.text("reviewer"), body.text("text"))
        return _json({})

    def _new(self, rest: list[str]) -> tuple[str, bytes]:
        self.server.study.store.add_tag(self._body().text("tag"))
        return _json({})

    def _case(self, number: object) -> str:
        cases = self.server.study.cases
        if not str(number).isdecimal() or int(str(number)) >= len(cases):
            raise _Refused(HTTPStatus.NOT_FOUND, "no such case")
        return cases[int(str(number))]

    def _body(self) -> _Body:
        """The JSON object of a request. Another type of content could be sent by any page without asking."""
        if self.headers.get("Content-Type") != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON is expected")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too much")
        body = json.loads(self.rfile.read(int(length)))
        return _Body(body) if isinstance(body, dict) else _Body()

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        if status != HTTPStatus.OK:
            self.send_header("Connection", "close")  # what is left of a refused request is not read
            self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address has the token in it."""


class _Body(dict[str, Any]):
    """A request's fields; one that is missing makes the request a bad one."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{name} is missing")

    def text(self, name: str) -> str:
        """A field that is text."""
        if not isinstance(self[name], str):
            raise ValueError(f"{name} is no text")
        return str(self[name])


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(value).encode()
