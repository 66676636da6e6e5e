"""Where tables are: shipped ones in this package, the user's in a cache directory.

The user's table is a directory with one file for each measurement. A file appears whole, by a
rename, so that processes that measure at the same time need no lock and lose nothing.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from normfuse.tuning.entry import Document
from normfuse.tuning.table import bucket

log = logging.getLogger("normfuse")

SHIPPED = Path(__file__).parent / "tables"


def variables() -> tuple[str | None, ...]:
    """What the place of the user's table follows from."""
    return tuple(os.environ.get(name) for name in ("NORMFUSE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"))


def user_directory() -> Path:
    """The user's table of this version of our ops: measurements of other kernels are not read.

    Below $NORMFUSE_CACHE_DIR, else $XDG_CACHE_HOME/normfuse, else ~/.cache/normfuse.
    """
    own = os.environ.get("NORMFUSE_CACHE_DIR")
    root = Path(own) if own else _cache_home() / "normfuse"
    return root / "tuning" / ops_digest()


def _cache_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir())


@lru_cache(maxsize=1)
def ops_digest() -> str:
    """What the measured code is: a digest of the sources of all ops and kernels."""
    root = Path(__file__).parent.parent / "ops"
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read(directory: Path) -> list[Document]:
    """The documents of a directory, in the order of their names; a damaged one is ignored."""
    documents = []
    for path in sorted(directory.glob("*.json")):
        try:
            documents.append(Document.parse(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            log.warning("the table %s is ignored: %s", path, error)
    return documents


def write(document: Document, directory: Path) -> None:
    """One measurement into its file, in place of an older one of the same site.

    Where nothing can be written, the measurement lasts as long as the process, and the log says so.
    """
    (entry,) = document.entries
    measured = entry.measurement
    identity = repr((*entry.key, bucket(measured.rows), measured.neighbours))
    path = directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"
    try:
        replace_file(path, document.text())
    except OSError as error:
        log.warning("the measurement of %s is not kept: %s", entry.key.op, error)


def replace_file(path: Path, text: str) -> None:
    """The whole text under this name, or what was there before; never a part of it.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
