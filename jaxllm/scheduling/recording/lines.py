"""Lines written to a file behind a busy thread's back, and read again from one that ended abruptly."""

from __future__ import annotations

import atexit
import contextlib
import gzip
import json
import logging
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import orjson

from jaxllm.errors import ConfigError

logger = logging.getLogger(__name__)

_INTERVAL = 1.0  # seconds of lines that a crash may take with it
_CHUNK = 256 * 1024  # bytes after which the file's thread is woken before its time
_MOST = 64 * 1024 * 1024  # bytes that may wait for a disk that does not keep up


def check_writable(path: str, param: str) -> None:
    """Open a file that is to be written, so that a bad path is refused before anything slow is begun.

    What it holds is lost.

    Raises:
        ConfigError: it cannot be opened.
    """
    try:
        Path(path).open("wb").close()
    except OSError as error:
        raise ConfigError(
            f"{param}={path!r} cannot be written: {error.strerror}. Give a file in a directory that exists.",
            param=param,
        ) from error


def json_line(value: object) -> bytes:
    """A value as a line of JSON."""
    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        # Half a surrogate pair, which a client may have put into a name, has no UTF-8.
        return json.dumps(value).encode() + b"\n"


class LineWriter:
    """Appends lines to a file from a thread of its own; whoever writes never waits for the disk.

    A name that ends in `.gz` is compressed, each portion by itself, so that what is there can be read
    whatever happens to the rest. Where the disk fails or does not keep up, the log says so and the file
    ends there; the program goes on.

    Args:
        path: is overwritten.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = self.path.open("wb")
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = self._failed = False
        self._thread = threading.Thread(target=self._run, name="jaxllm-recording", daemon=True)
        self._thread.start()
        # A program may end without having closed it.
        atexit.register(self.close)

    def write(self, line: bytes) -> None:
        """Take a line, which ends in a newline."""
        if self._failed or self._closed:
            return
        with self._lock:
            self._lines.append(line)
            self._num_bytes += len(line)
        if self._num_bytes > _MOST:
            self._fail("the disk does not keep up")
        elif self._num_bytes > _CHUNK:
            self._wake.set()

    def close(self) -> None:
        """Write what is left; returns when it is in the file."""
        self._closed = True
        self._wake.set()
        self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        closed = False
        while not closed:
            self._wake.wait(_INTERVAL)
            self._wake.clear()
            closed = self._closed  # read first, so that no line is left behind
            with self._lock:
                lines, self._lines, self._num_bytes = self._lines, [], 0
            if lines and not self._failed:
                self._append(b"".join(lines))
        # What could not be written then cannot be written now.
        with contextlib.suppress(OSError):
            self._file.close()

    def _append(self, data: bytes) -> None:
        try:
            self._file.write(gzip.compress(data, 3) if self.path.suffix == ".gz" else data)
            self._file.flush()
        except OSError as error:
            self._fail(str(error))

    def _fail(self, reason: str) -> None:
        self._failed = True
        logger.error("%s ends here: %s. Everything else goes on.", self.path, reason)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, which is compressed if its name ends in `.gz`.

    What breaks off at the end, since whoever wrote it was killed, is left out with a warning.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for line in lines:
                if not line.endswith(b"\n") and not _is_json(line):
                    raise EOFError("its last line is not whole")
                yield line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            logger.warning("%s breaks off: %s. What stands before it is read.", path, error)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
