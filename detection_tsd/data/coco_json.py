"""A COCO file read entry by entry: the whole of it as Python objects would take gigabytes."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from common.log import InputError

CHUNK = 1 << 22  # characters
SPACE = re.compile(r"[ \t\n\r]*")
# Inside a list of lists of numbers no comma is followed by a quotation mark, so the match cannot
# end early; inside a JSON string the quotation marks would be escaped.
OUTLINE = re.compile(r'"segmentation"\s*:\s*\[[-+\d.eE,\[\]\s]*\](?=\s*(?:,\s*"|\}))')

Handler = Callable[[int, Any], None]


def read_lists(path: Path, handlers: Mapping[str, Handler], outlines: bool = True) -> None:
    """Hand the entries of the named lists of a JSON object to their handlers, in file order.

    Args:
        path: of the file; its other values are skipped.
        handlers: key -> function of the number of the entry and the entry.
        outlines: False drops polygons named "segmentation" unparsed; they are most of a file.

    Raises:
        InputError: the file cannot be read, is empty, is no JSON object, or has no list of such a
            name.
    """
    missing = dict(handlers)
    try:
        with path.open(encoding="utf-8-sig") as file:
            reader = _Reader(path, file, outlines)
            if not reader.peek():
                raise InputError(path, "is empty")
            for key in reader.keys():
                missing.pop(key, None)
                if reader.peek() == "[":
                    reader.entries(handlers.get(key, _ignore))
                elif key in handlers:
                    raise InputError(path, f"has {key!r} that is no list", reader.value())
                else:
                    reader.value()
            reader.finish()
    except OSError as error:
        raise InputError(path, "cannot be read", error.strerror or "") from error
    except UnicodeDecodeError as error:
        raise InputError(path, "is no UTF-8 text", error.reason) from error
    if missing:
        raise InputError(path, "has no list", repr(next(iter(missing))))


def _ignore(number: int, entry: Any) -> None:
    """An entry that nobody asked for."""


class _Reader:
    """Walks through the text; holds one chunk and the entry that it is in."""

    def __init__(self, path: Path, file: TextIO, outlines: bool):
        self.path, self.file, self.outlines = path, file, outlines
        self.text, self.at = "", 0
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Append the next chunk; it grows with the entry, so that a huge one takes linear time."""
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        if not self.outlines:
            chunk = OUTLINE.sub('"segmentation":0', chunk)
        self.text, self.at = rest + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            match = SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, accepted: str) -> str:
        """Move over one of these characters."""
        found = self.peek()
        if not found or found not in accepted:
            raise self._malformed(f"expected one of {' '.join(accepted)}", self.at)
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value; one that ends with the chunk may go on in the next."""
        self.peek()
        while True:
            start = self.at
            try:
                value, end = self.decode(self.text, start)
            except (ValueError, RecursionError) as error:
                if self.more():
                    continue
                place, what = start, str(error)
                if isinstance(error, json.JSONDecodeError):
                    place, what = error.pos, error.msg
                raise self._malformed(what, place - start) from error
            if end < len(self.text):
                self.at = end
                return value
            if not self.more():  # which has dropped everything before the value
                self.at = len(self.text)
                return value

    def keys(self) -> Iterator[str]:
        """Keys of the object, one after another; the caller takes each value in between."""
        if self.peek() != "{":
            raise InputError(self.path, "is no JSON object, begins with", repr(self._near(self.at)))
        self.at += 1
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            key = self.value() if self.peek() == '"' else None
            if key is None:
                raise self._malformed("expected a key", self.at)
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def entries(self, handle: Handler) -> None:
        """The entries of a list."""
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        number = 0
        while True:
            handle(number, self.value())
            number += 1
            if self.take(",]") == "]":
                return

    def finish(self) -> None:
        """Nothing may follow the object."""
        if self.peek():
            raise self._malformed("text after the end", self.at)

    def _near(self, place: int) -> str:
        return self.text[max(place - 20, 0) : place + 20]

    def _malformed(self, what: str, place: int) -> InputError:
        if place >= len(self.text.rstrip()):
            return InputError(self.path, "is no complete JSON, ends with", repr(self._near(place)))
        return InputError(self.path, f"is no JSON ({what}), near", repr(self._near(place)))
