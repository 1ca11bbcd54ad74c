"""What wheels and source distributions contain; nothing is compiled for it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sasa_det

ROOT = Path(__file__).parents[1]

# As in the isolated build of a source distribution on a machine without torch.
BUILD = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_path("setup.py", run_name="__main__")
"""

# The configs are read where the package lies, with their bases and what they import.
READ = """
import sys
from pathlib import Path
from sasa_det import model_zoo
from sasa_det.config_files import CONFIGS, config_names
assert CONFIGS == Path(sys.argv[1], "sasa_det", "model_zoo", "configs")
for name in config_names():
    assert Path(model_zoo.get_config_file(name)).is_relative_to(sys.argv[1])
    if name.startswith("COCO-"):
        model_zoo.get_config(name)
    print(name)
"""


def files_in(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if is_source(path)}


def is_source(path):
    return path.is_file() and path.suffix not in (".pyc", ".so")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folders that a wheel is packed from, and that hold the list of a source distribution."""
    library, metadata = tmp_path_factory.mktemp("library"), tmp_path_factory.mktemp("metadata")
    words = ["--quiet", "egg_info", "--egg-base", metadata, "build_py", "--build-lib", library]
    subprocess.run(
        [sys.executable, "-c", BUILD, *map(str, words)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return library, metadata / "sasa_det.egg-info"


def test_a_wheel_has_all_of_the_package_and_the_configs(built):
    library, _ = built
    package = files_in(ROOT / "sasa_det")
    kernels = {path for path in package if path.parts[0] == "csrc" and path.parts[1] != "cuda"}
    configs = {Path("model_zoo", "configs") / path for path in files_in(ROOT / "configs")}
    assert len(kernels) > 20 and len(configs) > 80 and Path("py.typed") in package
    assert Path("csrc", "cuda", "warp.cuh") in package
    assert files_in(library / "sasa_det") == package - kernels | configs
    assert {path.name for path in library.iterdir()} == {"sasa_det", "sasa_det_cli.py"}


def test_configs_are_found_and_read_in_the_installed_package(built, tmp_path):
    library, _ = built
    done = subprocess.run(
        [sys.executable, "-c", READ, str(library)],
        env={"PYTHONPATH": str(library)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = {str(path) for path in files_in(ROOT / "configs")}
    assert set(done.stdout.splitlines()) == names


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sasa_det.__version__
    assert sasa_det.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_a_source_distribution_builds_and_tests_without_the_repository(built):
    _, metadata = built
    listed = set((metadata / "SOURCES.txt").read_text().splitlines())
    wanted = {
        str(Path(folder) / path)
        for folder in ("configs", "docs", "examples", "sasa_det", "tests", "tools")
        for path in files_in(ROOT / folder)
    }
    wanted |= {"sasa_det_cli.py", "setup.py", "pyproject.toml", "requirements.txt", "Makefile"}
    wanted |= {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "CONTRIBUTING.md"}
    assert wanted <= listed
