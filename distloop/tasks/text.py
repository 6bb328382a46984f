"""Text to learn from: the documents of a file or a folder; by default the source of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from distloop.errors import DataError

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
TEXT_SUFFIXES = {".py", ".txt", ".md", ".rst", ".tex", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".html", ".csv"}


def divide(path: str | None, max_bytes: int, validation_bytes: int) -> tuple[list[bytes], list[bytes]]:
    """Return training and validation documents; of a single long document the end is for validation.

    Args:
        path: a text file, or a directory whose text files are the documents (None: Python's standard library).
        max_bytes: how much text to take at most.
        validation_bytes: how much of it, in whole documents, is kept for evaluation; a tenth of it at most.

    Raises:
        DataError: there is nothing at ``path``, it cannot be read, or it is too little.
    """
    documents = list(_read(path, max_bytes))
    kept = min(validation_bytes, sum(map(len, documents)) // 10)
    if len(documents) == 1:
        documents = [documents[0][:-kept], documents[0][-kept:]] if kept else documents
    validation = [documents.pop()] if len(documents) > 1 else []
    while len(documents) > 1 and sum(map(len, validation)) + len(documents[-1]) <= kept:
        validation.append(documents.pop())
    if not validation or not documents[0]:
        raise DataError(
            f"task.path: {path or 'the standard library'} holds too little text to train and evaluate on"
            + ("" if path is None or Path(path).is_file() else f" (files ending in {' '.join(sorted(TEXT_SUFFIXES))})")
        )
    return documents, validation


def _read(path: str | None, max_bytes: int) -> Iterator[bytes]:
    """Yield documents, up to ``max_bytes`` in all, in an order that depends on their names alone."""
    root = Path(path) if path is not None else Path(sysconfig.get_paths()["stdlib"])
    if root.is_file():
        yield _head(root, max_bytes)
        return
    if not root.is_dir():
        raise DataError(f"task.path: {path}: there is no such file or directory")
    left = max_bytes
    for file in sorted(
        _files(root, path is None), key=lambda f: hashlib.sha256(str(f.relative_to(root)).encode()).digest()
    ):
        text = _head(file, left)
        if text:
            yield text
        left -= len(text)
        if left <= 0:
            return


def _head(file: Path, most: int) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(most)
    except OSError as failure:
        raise DataError(f"task.path: {file} cannot be read: {failure.strerror}") from failure


def _files(root: Path, standard_library: bool) -> Iterator[Path]:
    for file in root.rglob("*"):
        parts = file.relative_to(root).parts
        wanted = (
            file.suffix == ".py" and LEFT_OUT.isdisjoint(parts) if standard_library else file.suffix in TEXT_SUFFIXES
        )
        if wanted and file.is_file():
            yield file
