"""The embedded data set: the source text of Python's own standard library.

Two halves that share no row: :data:`PRIVATE`, one client per package, is the
data set ``fedtune:stdlib``; :data:`PUBLIC` is what the embedded tiny model was
pretrained on.
"""

from __future__ import annotations

import ast
import io
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from fedtune.data.row import Row
from fedtune.errors import ExitCode, FedtuneError

__all__ = ["PRIVATE", "PUBLIC", "read_half", "sections"]

PRIVATE: tuple[str, ...] = tuple(
    """
    asyncio collections concurrent ctypes curses dbm email html http importlib json logging
    multiprocessing re tomllib urllib venv wsgiref xml xmlrpc zoneinfo
    """.split()
)
"""Packages of every supported Python, one client each."""

PUBLIC: tuple[str, ...] = tuple(
    """
    __future__ __hello__ _aix_support _android_support _bootsubprocess _collections_abc _colorize
    _compat_pickle _compression _ios_support _markupbase _opcode_metadata _osx_support _py_abc
    _pydatetime _pydecimal _pyio _pylong _sitebuiltins _strptime _threading_local _weakrefset abc
    aifc antigravity argparse ast asynchat asyncore base64 bdb bisect bz2 cProfile calendar cgi
    cgitb chunk cmd code codecs codeop colorsys compileall configparser contextlib contextvars
    copy copyreg crypt csv dataclasses datetime decimal difflib dis doctest enum filecmp fileinput
    fnmatch fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip
    hashlib heapq hmac imaplib imghdr imp inspect io ipaddress keyword linecache locale lzma
    mailbox mailcap mimetypes modulefinder netrc nntplib ntpath nturl2path numbers opcode operator
    optparse os pathlib pdb pickle pickletools pipes pkgutil platform plistlib poplib posixpath
    pprint profile pstats pty py_compile pyclbr pydoc queue quopri random reprlib rlcompleter
    runpy sched secrets selectors shelve shlex shutil signal site smtpd smtplib sndhdr socket
    socketserver sre_compile sre_constants sre_parse ssl stat statistics string stringprep struct
    subprocess sunau symtable sysconfig tabnanny tarfile telnetlib tempfile textwrap this
    threading timeit token tokenize trace traceback tracemalloc tty turtle types typing uu uuid
    warnings wave weakref webbrowser xdrlib zipapp zipfile zipimport
    distutils idlelib lib2to3 pydoc_data tkinter unittest
    """.split()
)
"""Single-file modules, and some packages; those a Python does not have are skipped."""

_SKIPPED = frozenset({"__pycache__", "test", "tests", "idle_test"})
_MERGE = 600  # characters: neighbouring sections are joined up to here
_TINY = 80  # characters: a section this small never stands alone before another
_LARGE = 2400  # characters: a class or a table this large is cut further


def read_half(names: Sequence[str]) -> tuple[Row, ...]:
    """Read one half of the standard library.

    Parameters
    ----------
    names : sequence of str
        :data:`PRIVATE` or :data:`PUBLIC`.

    Returns
    -------
    tuple of Row
        Columns ``client`` (package), ``module`` and ``text`` (a coherent piece
        of source), always in the same order. A text appears once; the public
        half has none of the private texts.

    Raises
    ------
    FedtuneError
        If this Python has no source text of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: dict[str, Row] = {}
    for row in _rows(root, names):
        rows.setdefault(row["text"], row)
    if not rows:
        raise FedtuneError(
            f"fedtune:stdlib: no source text of the standard library in '{root}'",
            hint="install it (Debian: libpython3-stdlib), or name your own data in data.source",
            code=ExitCode.DATA,
        )
    if tuple(names) == PUBLIC:
        for row in _rows(root, PRIVATE):
            rows.pop(row["text"], None)
    return tuple(rows.values())


def _rows(root: Path, names: Sequence[str]) -> Iterator[Row]:
    for name in names:
        for path in _files(root, name):
            parts = path.relative_to(root).with_suffix("").parts
            module = ".".join(part for part in parts if part != "__init__")
            for text in _sections_of(path):
                if text.strip():
                    yield {"client": name, "module": module, "text": text}


def _files(root: Path, name: str) -> list[Path]:
    """Return the files of a module or package, in an order that no file system decides."""
    if (root / name).is_dir():
        found = (path.relative_to(root) for path in (root / name).rglob("*.py"))
        kept = [path for path in found if not _SKIPPED & set(path.parts[:-1])]
        return [root / path for path in sorted(kept, key=lambda path: path.parts)]
    single = root / f"{name}.py"
    return [single] if single.is_file() else []


def _sections_of(path: Path) -> list[str]:
    """Cut a file; one that does not decode or parse has no sections."""
    try:
        with tokenize.open(path) as file:
            return sections(file.read())
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return []


def sections(source: str) -> list[str]:
    r"""Cut Python source into natural pieces that join to the same source.

    The head of the module (docstring and imports), then each class and function
    with the comments and decorators before it; large classes are cut by method.
    Small neighbours are merged.

    Parameters
    ----------
    source : str
        Python source with ``\n`` line breaks.

    Raises
    ------
    SyntaxError
        If it is not Python.

    Examples
    --------
    >>> sections("x = 1\n")
    ['x = 1\n']
    """
    lines = io.StringIO(source, newline="\n").readlines()
    cuts = sorted({1, *_cuts(ast.parse(source).body, 0, lines), len(lines) + 1})
    pieces = ["".join(lines[a - 1 : b - 1]) for a, b in pairwise(cuts)]
    merged: list[str] = []
    for piece in pieces:
        if merged and (len(merged[-1]) < _TINY or len(merged[-1]) + len(piece) <= _MERGE):
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _cuts(body: Sequence[ast.stmt], before: int, lines: Sequence[str]) -> Iterator[int]:
    """Yield the line numbers where a section starts; ``before`` ends what precedes the body."""
    after_block = False
    for node in body:
        end = node.end_lineno or node.lineno
        is_block = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_block or after_block:
            yield _with_comments(node, before, lines)
        if sum(map(len, lines[node.lineno - 1 : end])) > _LARGE:
            if isinstance(node, ast.ClassDef):
                yield from _cuts(node.body, node.lineno, lines)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
                yield from (key.lineno for key in node.value.keys if key is not None)
        before, after_block = end, is_block


def _with_comments(node: ast.stmt, before: int, lines: Sequence[str]) -> int:
    """Return the first line of a statement with its decorators and the comments above."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    comment = " " * node.col_offset + "#"
    above = (n for n in range(before + 1, first) if lines[n - 1].startswith(comment))
    return next(above, first)
