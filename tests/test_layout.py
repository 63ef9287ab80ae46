"""The house: one package from five folders, imports one way, and the house rules.

Most of this reads the source with ``ast`` and runs nothing of it.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "fedtune": "fedtune",
    "client": "fedtune.client",
    "privacy": "fedtune.privacy",
    "server": "fedtune.server",
    "simulations": "fedtune.simulations",
}
MAX_LINES = 500
MAX_MEDIAN = 200


# ---------------------------------------------------------------- the source as a graph


@dataclass(frozen=True)
class Module:
    """One source file, under the name it is imported by."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> bool:
        return self.path.name == "__init__.py"


def _modules() -> dict[str, Module]:
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            found[name] = Module(name, path, tree)
    return found


MODULES = _modules()


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _statements(body: list[ast.stmt], *, deep: bool) -> Iterator[ast.stmt]:
    """Yield statements; without ``deep`` only those that run when the module is imported."""
    for node in body:
        yield node
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not deep and (function or _type_checking(node)):
            continue
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ExceptHandler | ast.match_case):
                yield from _statements(child.body, deep=deep)
            elif isinstance(child, ast.stmt):
                yield from _statements([child], deep=deep)


def _imports(module: Module, *, deep: bool) -> set[str]:
    """Return the modules of ours that a module imports."""
    names: set[str] = set()
    for node in _statements(module.tree.body, deep=deep):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: line {node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else str(node.module))
    return {name for name in names if name == "fedtune" or name.startswith("fedtune.")}


def _room(name: str) -> str:
    """Return the room of a module: client, privacy, server, simulations, cli or shared."""
    if name == "fedtune.__main__":
        return "cli"
    second = name.split(".")[1] if "." in name else ""
    return second if second in {"client", "privacy", "server", "simulations", "cli"} else "shared"


# ---------------------------------------------------------------- imports run one way

ALLOWED = {
    "shared": {"shared", "privacy"},
    "privacy": {"shared", "privacy"},
    "client": {"shared", "privacy", "client"},
    "server": {"shared", "privacy", "server"},
    "simulations": {"shared", "privacy", "client", "server", "simulations"},
    "cli": {"shared", "privacy", "client", "server", "simulations", "cli"},
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name: str) -> None:
    room = _room(name)
    wrong = {
        other for other in _imports(MODULES[name], deep=True) if _room(other) not in ALLOWED[room]
    }
    assert not wrong, f"{name} ({room}) may not import {sorted(wrong)}"


def test_the_rule_sees_an_import_inside_a_function() -> None:
    tree = ast.parse("def f():\n    with g():\n        import fedtune.server")
    bad = Module("fedtune.client.bad", ROOT / "client" / "bad.py", tree)
    assert _imports(bad, deep=True) == {"fedtune.server"}
    assert _imports(bad, deep=False) == set()


def test_every_import_of_ours_exists() -> None:
    for module in MODULES.values():
        missing = _imports(module, deep=True) - set(MODULES)
        assert not missing, f"{module.name} imports {sorted(missing)}"


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return one cycle as the names along it, or an empty list."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            found = walk(other, [*trail, name])
            if found:
                return found
        done.add(name)
        return []

    for name in sorted(graph):
        found = walk(name, [])
        if found:
            return found
    return []


def test_no_circular_imports() -> None:
    graph = {name: _imports(module, deep=False) - {name} for name, module in MODULES.items()}
    assert _cycle(graph) == []


def test_the_cycle_finder_finds_one() -> None:
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# ---------------------------------------------------------------- house rules


def _lines(module: Module) -> int:
    return len(module.path.read_text(encoding="utf-8").splitlines())


def test_modules_fit_on_a_few_screens() -> None:
    counts = {name: _lines(module) for name, module in MODULES.items()}
    assert {name: count for name, count in counts.items() if count > MAX_LINES} == {}
    assert statistics.median(counts.values()) < MAX_MEDIAN


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(MODULES[name].tree), f"{name} has no docstring"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_errors_are_raised_and_nothing_unsafe_is_called(name: str) -> None:
    unsafe_modules = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
    for node in ast.walk(MODULES[name].tree):
        where = f"{name}: line {getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: assert in package code"
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
            assert not roots & unsafe_modules, f"{where}: {sorted(roots & unsafe_modules)}"
        if isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] not in unsafe_modules, where
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "builtins.eval", "builtins.exec"}, where


def test_no_class_inherits_from_one_of_ours() -> None:
    ours = {
        (module.name, node.name)
        for module in MODULES.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }
    for module in MODULES.values():
        origin = {name: (home, name) for home, name in ours if home == module.name}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    origin[alias.asname or alias.name] = (str(node.module), alias.name)
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for base in node.bases:
                plain = base.value if isinstance(base, ast.Subscript) else base
                name = ast.unparse(plain)
                inherited = origin.get(name) in ours or any(
                    name == f"{home}.{own}" or name.endswith(f"{home.split('.')[-1]}.{own}")
                    for home, own in ours
                )
                assert not inherited, f"{module.name}: {node.name} inherits from our {name}"


def _texts() -> Iterator[tuple[Path, str]]:
    """Yield every text file that git tracks or would track, or of the tree without git."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode == 0 and listing.stdout:
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        paths = [path for path in ROOT.iterdir() if path.is_file()]
        for folder in (*ROOMS, "tests", "docs"):
            paths += (ROOT / folder).rglob("*")
    for path in paths:
        if path.is_file() and path.stat().st_size < 2_000_000:
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_file_knows_a_machine() -> None:
    machine = re.compile(r"(?<![\w.:~})/-])/(?:work|home|root)(?:/|\b)")
    assert machine.search('open("' + "/" + 'home/somebody/x")')
    assert not machine.search("https://example.org/home/ and ../work and a/root/b")
    found = {
        f"{path.relative_to(ROOT)}: {hit.group()}"
        for path, text in _texts()
        for hit in machine.finditer(text)
    }
    assert found == set()


# ---------------------------------------------------------------- installed


def test_the_editable_install_is_this_tree() -> None:
    for folder, package in ROOMS.items():
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        assert Path(spec.origin).resolve() == ROOT / folder / "__init__.py"


def _python(*arguments: str, cwd: Path | None = None, path: Path | None = None) -> str:
    """Run this Python and return what it prints; fail with all that it said."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **({"PYTHONPATH": str(path)} if path else {})},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode != 0:
        pytest.fail(f"{' '.join(arguments[:4])}\n{result.stdout}\n{result.stderr}")
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel built from the sdist of a clean copy of this tree."""
    source = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in (*ROOMS, "tests", "docs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy2(path, source)
    out = tmp_path_factory.mktemp("dist")
    _python("-m", "build", "--no-isolation", "--outdir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


def _install(wheel: Path, *where: str, python: str = sys.executable) -> None:
    pip = ("-m", "pip", "--disable-pip-version-check", "--python", python, "install")
    # An egg-info beside the tests would count as installed already.
    _python(*pip, "--quiet", "--ignore-installed", "--no-deps", "--no-index", *where, str(wheel))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    _install(wheel, "--target", str(target))
    return target


def test_the_wheel_holds_every_module_and_asset(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {"fedtune/py.typed"}
    for folder, package in ROOMS.items():
        inside = package.replace(".", "/")
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            code = path.suffix in (".py", ".pyi")
            asset = relative.parts[0] == "assets" and path.suffix != ".pyc"
            experiment = relative.match("experiments/*.toml") and len(relative.parts) == 2
            if path.is_file() and (code or asset or experiment):
                wanted.add(f"{inside}/{relative.as_posix()}")
    assert names == wanted


def test_the_wheel_adds_one_name(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} <= {"fedtune", "bin"}
    assert "fedtune" in names
    assert len([name for name in names if name.endswith(".dist-info")]) == 1


def test_an_empty_environment_gets_one_name(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    (site,) = (tmp_path / "empty").glob("lib/python*/site-packages")
    before = {path.name for path in site.iterdir()}
    _install(wheel, python=str(tmp_path / "empty" / "bin" / "python"))
    added = {path.name for path in site.iterdir()} - before
    assert {name for name in added if not name.endswith(".dist-info")} == {"fedtune"}
    assert len(added) == 2
    assert (tmp_path / "empty" / "bin" / "fedtune").is_file()


IMPORT_ALL = """
import importlib, json, pkgutil, fedtune
names = ["fedtune"] + [
    module.name for module in pkgutil.walk_packages(fedtune.__path__, "fedtune.")
]
files = {name: importlib.import_module(name).__file__ for name in names}
print(json.dumps(files))
"""


def test_every_module_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    printed = _python("-c", IMPORT_ALL, cwd=tmp_path, path=installed)
    files = json.loads(printed.splitlines()[-1])
    assert set(files) == set(MODULES)
    assert [file for file in files.values() if not Path(file).is_relative_to(installed)] == []
    assert list(tmp_path.iterdir()) == [], "importing must not write"


def test_the_command_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    printed = _python("-m", "fedtune", "--help", cwd=tmp_path, path=installed)
    assert "simulate" in printed
