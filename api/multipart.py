"""A multipart form with one file, read as it comes.

Starlette's own form parser writes the whole file to a temporary one first, on a disk that need not
have room for it, and hands it over when all has come. Here its bytes go on as they arrive.
"""

from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from core.errors import UploadInvalid

MOST_FIELDS: Final = 16
LONGEST_FIELD: Final = 4096
LONGEST_NAME: Final = 255


class FileForm:
    """Feed it the body; take the file's bytes out as they come."""

    def __init__(self, content_type: str | None) -> None:
        """Begin a form.

        Raises:
            UploadInvalid: the content type is that of no multipart form.
        """
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise UploadInvalid(
                "the body must be multipart/form-data with a part `file` (curl -F file=@NAME)",
                field="Content-Type",
            )
        #: the form's text fields
        self.fields: dict[str, str] = {}
        #: the file's name; None until its part has begun
        self.filename: str | None = None
        #: whether the form's end has come
        self.ended = False
        self._file = bytearray()
        self._header = b"", b""
        self._disposition: dict[bytes, bytes] = {}
        self._value: bytearray | None = None
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise UploadInvalid(f"the boundary cannot be used: {error}") from None

    def feed(self, chunk: bytes) -> None:
        """Read on. Raises UploadInvalid where the form is broken."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise UploadInvalid(f"the multipart form is broken: {error}") from None

    @property
    def held(self) -> int:
        """Bytes of the file that wait to be taken."""
        return len(self._file)

    def take(self) -> bytes:
        """The file's bytes since the last time."""
        taken, self._file = bytes(self._file), bytearray()
        return taken

    def _begin_part(self) -> None:
        self._header, self._disposition, self._value = (b"", b""), {}, None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0] + data[start:end], self._header[1]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header = self._header[0], self._header[1] + data[start:end]

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            _, self._disposition = parse_options_header(value.decode("latin-1"))
        self._header = b"", b""

    def _end_headers(self) -> None:
        name = _text(self._disposition.get(b"name", b""))
        if name == "file":
            if self.filename is not None:
                raise UploadInvalid("file is given twice; send one", field="file")
            given = _text(self._disposition.get(b"filename", b""))
            self.filename = given[-LONGEST_NAME:] or "upload.jsonl"
            return
        if len(self.fields) >= MOST_FIELDS or name in self.fields:
            raise UploadInvalid(f"{name[:80]!r} is one form field too many; remove it")
        self.fields[name] = ""
        self._value = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self._file += memoryview(data)[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > LONGEST_FIELD:
            name = next(reversed(self.fields))
            raise UploadInvalid(
                f"{name[:80]!r} is longer than {LONGEST_FIELD} bytes; shorten it", field=name[:80]
            )

    def _end_part(self) -> None:
        if self._value is not None:
            self.fields[next(reversed(self.fields))] = _text(bytes(self._value))

    def _end(self) -> None:
        self.ended = True


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace").replace("\0", "\ufffd")
