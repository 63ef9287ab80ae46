"""The bundle holds one reference and no code."""

import hashlib
import io
import subprocess
import sys
import tomllib
import zipfile

import pytest

from fedtune.server.bundle import SERVER_APP, build_bundle, bundle_hash


def test_the_bundle_holds_no_code() -> None:
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as archive:
        names = archive.namelist()
        project = tomllib.loads(archive.read("pyproject.toml").decode())
    assert sorted(names) == [".info/CONTENT", "pyproject.toml"]
    app = project["tool"]["flwr"]["app"]
    assert app["components"]["serverapp"] == SERVER_APP == "fedtune.server.flower_app:app"
    assert app["config"] == {"folder": ""}
    assert "dependencies" not in project["project"]


def test_the_same_reference_is_the_same_bundle_in_every_process() -> None:
    code = "from fedtune.server.bundle import *; print(bundle_hash(build_bundle()))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == bundle_hash(build_bundle()) == hashlib.sha256(build_bundle()).hexdigest()
    assert bundle_hash(build_bundle("other:app")) != other


def test_flower_reads_what_it_needs() -> None:
    from flwr.cli.config_utils import get_fab_config, get_fab_metadata

    assert get_fab_metadata(build_bundle()) == ("fedtune/fedtune", "1.0.0")
    config = get_fab_config(build_bundle("toy:app"))
    assert config["tool"]["flwr"]["app"]["components"]["serverapp"] == "toy:app"


def test_the_reference_leads_to_the_installed_app() -> None:
    from flwr.serverapp import ServerApp
    from flwr.supercore.object_ref import load_app, validate

    assert validate(SERVER_APP, check_module=True) == (True, None)
    assert isinstance(load_app(SERVER_APP, ValueError), ServerApp)


def test_a_stock_node_finds_no_app_of_ours() -> None:
    from flwr.supercore.object_ref import load_app

    with zipfile.ZipFile(io.BytesIO(build_bundle())) as archive:
        project = tomllib.loads(archive.read("pyproject.toml").decode())
    with pytest.raises(ValueError, match="nothing"):
        load_app(project["tool"]["flwr"]["app"]["components"]["clientapp"], ValueError)


@pytest.mark.parametrize("reference", ["", "no-colon", "a:"])
def test_a_reference_that_is_none_is_refused(reference: str) -> None:
    with pytest.raises(ValueError, match="Invalid"):
        build_bundle(reference)
