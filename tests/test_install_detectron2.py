import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "install_detectron2.py"


@pytest.fixture(scope="module")
def installer():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(choice):
    return subprocess.run(
        [sys.executable, SCRIPT],
        env={**os.environ, "DETECTRON2": choice},
        capture_output=True,
        text=True,
    )


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.py"))}


class TestUnpack:
    def test_returns_the_top_folder_of_the_expected_archive(self, installer, tmp_path):
        archive = tmp_path / "package-1.tar.gz"
        write_archive(archive, {"package-1/setup.py": b"x = 1\n"})
        folder = tmp_path / "out"
        folder.mkdir()
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()

        tree = installer.unpack(archive, folder, sha256)

        assert tree == folder / "package-1"
        assert (tree / "setup.py").read_bytes() == b"x = 1\n"

    def test_refuses_another_archive_before_unpacking(self, installer, tmp_path):
        archive = tmp_path / "package-1.tar.gz"
        write_archive(archive, {"package-1/setup.py": b"x = 1\n"})
        folder = tmp_path / "out"
        folder.mkdir()

        with pytest.raises(installer.InstallError, match="package-1.tar.gz has sha256") as error:
            installer.unpack(archive, folder, installer.RELEASE_SHA256)

        assert installer.RELEASE_SHA256 in str(error.value)
        assert list(folder.iterdir()) == []


class TestApplyFixes:
    def test_replaces_every_counted_occurrence(self, installer, tmp_path):
        (tmp_path / "a.py").write_text("np.int(1) + np.int(2)\n")
        installer.apply_fixes(tmp_path, [installer.Fix("a.py", "np.int(", "int(", 2)])
        assert (tmp_path / "a.py").read_text() == "int(1) + int(2)\n"

    @pytest.mark.parametrize("text", ["", "old\n", "old old old\n"])
    def test_names_the_file_when_the_count_differs(self, installer, tmp_path, text):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(installer.InstallError, match=r"detectron2/a\.py contains 'old'"):
            installer.apply_fixes(tmp_path, [installer.Fix("a.py", "old", "new", 2)])
        assert (tmp_path / "a.py").read_text() == text

    def test_names_a_file_that_is_absent(self, installer, tmp_path):
        with pytest.raises(installer.InstallError, match=r"detectron2/layers/b\.py contains"):
            installer.apply_fixes(tmp_path, [installer.Fix("layers/b.py", "old", "new")])

    def test_no_fix_matches_its_own_result(self, installer):
        # Applied twice, the fixes must fail rather than change something else.
        assert [fix for fix in installer.FIXES if fix.old in fix.new] == []


class TestAddFixes:
    @pytest.fixture
    def package(self, installer, packages):
        """An installed 0.6 of before the last fix."""
        texts = {**RELEASE_FILES, "_C.py": installer.STUB}
        for fix in installer.FIXES[:-1]:
            texts[fix.file] = texts.get(fix.file, "") + fix.new * fix.count + "\n"
        file, old, _, _ = installer.FIXES[-1]
        return packages({**texts, file: f"x = 1\n{old}y = 2\n"})

    @pytest.mark.parametrize("choice", ["", "existing", "0.6"])
    def test_an_installation_of_before_gets_those_that_it_lacks(self, installer, package, choice):
        before = snapshot(package)
        result = run_script(choice)
        file, _, new, _ = installer.FIXES[-1]
        assert result.returncode == 0, result.stderr
        assert f"in {file}: added." in result.stdout and result.stdout.count("added") == 1
        assert (package / file).read_text() == f"x = 1\n{new}y = 2\n"
        changed = {path for path, time in snapshot(package).items() if before.get(path) != time}
        assert changed == {package / file}
        assert "added" not in run_script(choice).stdout

    def test_compiled_ones_are_left_alone(self, package):
        (package / "_C.py").unlink()
        (package / "_C").mkdir()
        (package / "_C" / "__init__.py").touch()
        before = snapshot(package)
        assert run_script("existing").returncode == 0
        assert snapshot(package) == before

    def test_a_file_that_cannot_be_changed_is_named(self, package):
        folder = package / "export"
        (folder / "__init__.py.changed").mkdir()  # where the new text would be written
        result = run_script("")
        assert result.returncode == 1
        assert f"ERROR: {folder / '__init__.py'} cannot be changed" in result.stderr


class TestStub:
    @pytest.fixture
    def operators(self, installer):
        module = type(sys)("detectron2._C")
        exec(installer.STUB, module.__dict__)
        return module

    def test_says_on_use_what_is_absent(self, operators):
        with pytest.raises(AttributeError, match="_C.box_iou_rotated is absent.*pure Python"):
            operators.box_iou_rotated(None, None)

    def test_claims_no_operator(self, operators):
        assert not hasattr(operators, "COCOevalAccumulate")

    def test_answers_the_environment_report(self, operators):
        # detectron2's default_setup logs these.
        assert not operators.has_cuda()
        assert "not compiled" in operators.get_compiler_version()
        assert "not compiled" in operators.get_cuda_version()


def test_remove_unfinished_spares_everything_else(installer, tmp_path):
    spared = ["detectron2_plugin", "detectron2_plugin-1.0.dist-info", "torch", "~orch"]
    removed = ["detectron2", "detectron2-0.6.dist-info", "~etectron2", "~etectron2-0.6.dist-info"]
    for name in spared + removed:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()

    installer.remove_unfinished(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(spared)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Return a function that writes a detectron2, and a torch, which come before the real ones."""

    def write(files, torch=""):
        (tmp_path / "torch.py").write_text(torch)
        for name, text in files.items():
            path = tmp_path / "detectron2" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return tmp_path / "detectron2"

    return write


VERSION = "__version__ = '0.6'\n"
RELEASE_FILES = {"__init__.py": VERSION, "data/build.py": ""}
MAIN_FILES = {"__init__.py": VERSION, "modeling/backbone/vit.py": ""}


class TestFindInstalled:
    def test_main_is_told_by_what_it_has(self, installer, packages):
        folder = packages(MAIN_FILES)
        assert installer.find_installed() == (installer.Installed("main", False, str(folder)), "")

    def test_stub_does_not_count_as_compiled(self, installer, packages):
        folder = packages({**RELEASE_FILES, "_C.py": installer.STUB})
        installed, problem = installer.find_installed()
        assert (installed, problem) == (installer.Installed("0.6", False, str(folder)), "")
        assert "no deformable convolution" in installed.describe()

    def test_compiled_operators_are_told_by_what_imports(self, installer, packages):
        # As from an extension: a _C that imports and is no file _C.py of the package.
        folder = packages({**RELEASE_FILES, "_C/__init__.py": ""})
        installed, _ = installer.find_installed()
        assert installed == installer.Installed("0.6", True, str(folder))
        assert installed.describe().endswith("with compiled operators.")

    def test_names_why_it_does_not_import(self, installer, packages):
        packages({**RELEASE_FILES, "_C.py": "raise ImportError('undefined symbol')\n"})
        assert installer.find_installed() == (None, "ImportError: undefined symbol")

    def test_left_over_folder_is_no_installation(self, installer, packages):
        packages({"__init__.py": ""})
        installed, problem = installer.find_installed()
        assert installed is None
        assert "__version__" in problem

    def test_missing_torch_is_one_sentence(self, installer, packages):
        packages(MAIN_FILES, torch="raise ImportError('no such library')\n")
        with pytest.raises(installer.InstallError, match="detectron2 needs torch.*no such library"):
            installer.find_installed()


class TestProvide:
    def test_interrupted_installation_does_not_count(
        self, installer, packages, tmp_path, monkeypatch
    ):
        packages(RELEASE_FILES)
        mark = tmp_path / "mark"
        monkeypatch.setattr(installer, "UNFINISHED_MARK", mark)
        assert installer.provide("existing").kind == "0.6"
        mark.touch()
        with pytest.raises(installer.InstallError, match="its installation was interrupted"):
            installer.provide("existing")

    def test_forced_main_fails_before_touching_the_other_one(
        self, installer, packages, tmp_path, monkeypatch
    ):
        folder = packages(RELEASE_FILES)
        before = snapshot(folder)
        monkeypatch.setattr(installer, "MAIN_REPOSITORY", str(tmp_path / "nowhere"))
        with pytest.raises(installer.InstallError, match="DETECTRON2=main, but GitHub .*nowhere"):
            installer.provide("main")
        assert snapshot(folder) == before

    def test_missing_git_is_named(self, installer, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert installer.why_no_github() == "git is not installed"


class TestScript:
    def test_unknown_choice_is_refused_in_one_sentence(self):
        result = run_script("0.7")
        assert result.returncode == 2
        assert result.stderr == "DETECTRON2=0.7 is none of main, 0.6, existing.\n"
        assert result.stdout == ""

    def test_existing_fails_in_one_sentence_without_one(self, packages):
        packages({"__init__.py": "raise ImportError('broken')\n"})
        result = run_script("existing")
        assert result.returncode == 1
        assert result.stderr == (
            "[detectron2] ERROR: DETECTRON2=existing, but no detectron2 imports here "
            "(ImportError: broken).\n"
        )

    @pytest.mark.parametrize(
        "choice, files",
        [("", MAIN_FILES), ("existing", RELEASE_FILES), ("0.6", RELEASE_FILES)],
    )
    def test_present_one_is_kept(self, installer, packages, choice, files):
        folder = packages(files)
        before = snapshot(folder)
        result = run_script(choice)
        kind = "main" if files is MAIN_FILES else "0.6"
        expected = installer.Installed(kind, False, str(folder)).describe()
        assert (result.returncode, result.stdout) == (0, f"[detectron2] {expected}\n")
        assert snapshot(folder) == before


def test_installed_release_carries_every_fix(installer):
    installed, _ = installer.find_installed()
    if installed is None or installed.kind != "0.6" or installed.compiled:
        pytest.skip("only v0.6 as pure Python is fixed")
    for file, old, new, _ in installer.FIXES:
        text = (Path(installed.folder) / file).read_text(encoding="utf-8")
        assert new in text and old not in text, file


def test_export_imports_in_either_detectron2():
    from detectron2.export import TracingAdapter, dump_torchscript_IR, scripting_with_instances
    from detectron2.utils.analysis import FlopCountAnalysis

    assert all((TracingAdapter, dump_torchscript_IR, scripting_with_instances, FlopCountAnalysis))
