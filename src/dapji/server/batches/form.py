"""Reading a form with a file (RFC 7578): the file goes to the disk as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from dapji.server.problem import Problem

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MOST_FIELDS = 64 << 10
"""Bytes of all that is no file, and of the parts' heads."""


class _Form:
    """What the parser calls."""

    def __init__(self, body: BinaryIO) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.ended = False
        self._body = body
        self._small = 0
        self._header: list[bytearray] = [bytearray(), bytearray()]
        self._disposition = b""
        self._name = ""
        self._value: bytearray | None = None

    def on_part_begin(self) -> None:
        self._disposition, self._value = b"", bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._keep(self._header[0], data[start:end])

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._keep(self._header[1], data[start:end])

    def on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = [bytearray(), bytearray()]

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name in self.fields or (self._name == "file" and self.filename is not None):
            raise Problem("invalid_request", f"{self._name} stands twice in the form", self._name)
        if self._name == "file":
            self.filename = options.get(b"filename", b"").decode(errors="replace") or "file"
            self._value = None

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self._body.write(data[start:end])
        else:
            self._keep(self._value, data[start:end])

    def on_part_end(self) -> None:
        if self._value is not None:
            self.fields[self._name] = self._value.decode(errors="replace")

    def on_end(self) -> None:
        self.ended = True

    def _keep(self, kept: bytearray, data: bytes) -> None:
        self._small += len(data)
        if self._small > _MOST_FIELDS:
            raise Problem("too_large", f"the form has more than {_MOST_FIELDS} bytes beside its file")
        kept += data


async def read_form(request: Request, body: BinaryIO, *, limit: int) -> tuple[dict[str, str], str]:
    """The fields of a form, and its file's name; the file's bytes, `limit` at most, go to `body`. Raises Problem."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Problem("invalid_request", "the body is no form: Content-Type must be multipart/form-data")
    form = _Form(body)
    callbacks: MultipartCallbacks = {
        "on_part_begin": form.on_part_begin,
        "on_header_field": form.on_header_field,
        "on_header_value": form.on_header_value,
        "on_header_end": form.on_header_end,
        "on_headers_finished": form.on_headers_finished,
        "on_part_data": form.on_part_data,
        "on_part_end": form.on_part_end,
        "on_end": form.on_end,
    }
    received = 0
    try:
        parser = MultipartParser(boundary, callbacks)
        async for part in request.stream():
            parser.write(part)
            received += len(part)
            if body.tell() > limit or received > limit + 2 * _MOST_FIELDS:  # fields, and what stands between the parts
                raise Problem("too_large", f"the file is larger than this server's limit of {limit} bytes", "file")
    except FormParserError as error:
        raise Problem("invalid_request", f"the body is no form: {error}") from None
    if not form.ended:
        raise Problem("invalid_request", "the body ends before the form does")
    if form.filename is None:
        raise Problem("invalid_request", "file: the form has none", "file")
    return form.fields, form.filename
