from __future__ import annotations

import sysconfig
import tokenize
from collections import Counter
from pathlib import Path

import pytest

from fedtune.config import DataConfig
from fedtune.data import load
from fedtune.data.row import Row
from fedtune.data.stdlib import PRIVATE, PUBLIC, read_half, sections
from fedtune.errors import FedtuneError

ROOT = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def private() -> tuple[Row, ...]:
    return read_half(PRIVATE)


def test_halves_are_disjoint(private: tuple[Row, ...]) -> None:
    public = read_half(PUBLIC)
    texts = [row["text"] for row in (*private, *public)]
    assert not set(PRIVATE) & set(PUBLIC)
    assert len(set(texts)) == len(texts)
    assert sum(len(row["text"]) for row in public) > 4_000_000


def test_private_half(private: tuple[Row, ...]) -> None:
    sizes: Counter[str] = Counter()
    for row in private:
        assert set(row) == {"client", "module", "text"}
        assert row["module"].split(".")[0] == row["client"]
        sizes[row["client"]] += len(row["text"])
    assert set(sizes) == set(PRIVATE)
    assert len(sizes) >= 16
    assert min(sizes.values()) > 10_000
    assert max(sizes.values()) > 10 * min(sizes.values())
    assert not any(".test" in row["module"] for row in private)


def test_is_the_default_source(private: tuple[Row, ...]) -> None:
    federation = load(DataConfig(), 0)
    found = [row for shard in federation.shards for row in shard.train + shard.held]
    assert sorted(row["text"] for row in found) == sorted(row["text"] for row in private)
    assert tuple(shard.name for shard in federation.shards) == PRIVATE
    assert federation.notes == ()


@pytest.mark.parametrize("name", ["json/decoder.py", "asyncio/events.py", "re/_parser.py"])
def test_sections_join_to_the_file(name: str) -> None:
    with tokenize.open(ROOT / name) as file:
        source = file.read()
    pieces = sections(source)
    assert "".join(pieces) == source
    assert len(pieces) > 3


def test_sections_start_with_comments_and_decorators() -> None:
    head = '"""' + "Head. " * 20 + '"""\nimport re\n\n'
    block = "# why\n\n# more\n@re\ndef f():\n" + "    return 1\n" * 60 + "\n\n"
    rest = "x = 1\ny = 2\n"
    assert sections(head + block + rest) == [head, block, rest]


def test_large_classes_are_cut_by_method() -> None:
    method = "    # about\n    def m(self):\n" + "        return 1\n" * 100 + "\n"
    source = "class A:\n" + '    """What it is, at some length, so that it is not tiny."""\n' * 2
    pieces = sections(source + method * 3)
    assert pieces == [source, method, method, method]


def test_large_tables_are_cut_by_key() -> None:
    entry = "    'key%d': '" + "x" * 500 + "',\n"
    source = "table = {\n" + "".join(entry % i for i in range(9)) + "}\n"
    pieces = sections(source)
    assert "".join(pieces) == source
    assert max(map(len, pieces)) < 1200


def test_small_and_empty_sources() -> None:
    assert sections("") == []
    assert sections("# only\n") == ["# only\n"]
    assert sections("def f(): pass\ndef g(): pass") == ["def f(): pass\ndef g(): pass"]
    with pytest.raises(SyntaxError):
        sections("def\n")


def tree(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def test_skips_and_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "json/__init__.py": b"a = 1\n",
        "json/b.py": b"a = 1\n",
        "json/c.py": b"c = 1\n",
        "json/bad.py": b"def\n",
        "json/bytes.py": b"x = '\xff'\n",
        "json/zero.py": b"x = '\0'\n",
        "json/empty.py": b"",
        "json/tests/t.py": b"t = 1\n",
        "json/sub/__pycache__/p.py": b"p = 1\n",
        "html/d.py": b"c = 1\n",
        "os.py": b"c = 1\n",
        "abc.py": b"d = 1\n",
    }
    tree(tmp_path, files)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read_half(PRIVATE) == (
        {"client": "html", "module": "html.d", "text": "c = 1\n"},
        {"client": "json", "module": "json", "text": "a = 1\n"},
    )
    assert read_half(PUBLIC) == ({"client": "abc", "module": "abc", "text": "d = 1\n"},)


def test_no_source_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FedtuneError, match="no source text of the standard library") as caught:
        read_half(PRIVATE)
    assert "data.source" in caught.value.hint
