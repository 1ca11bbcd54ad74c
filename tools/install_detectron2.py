"""Install detectron2, which PyPI does not carry under its name, for the Python that runs this file.

Without further ado: keep a detectron2 that imports; else build the official source where GitHub
answers; else take the v0.6 release that PyPI carries as `pb1-detectron2`, as pure Python, with
the fixes below. The environment variable DETECTRON2 forces one: `main`, `0.6` or `existing`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

CHOICES = ("main", "0.6", "existing")

MAIN_REPOSITORY = "https://github.com/facebookresearch/detectron2"
MAIN_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
GITHUB_PATIENCE_S = 10

RELEASE_NAME, RELEASE_VERSION = "pb1-detectron2", "0.6"
RELEASE_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"

# Present while site-packages is being changed, so that an interrupted installation is noticed.
UNFINISHED_MARK = Path(sys.prefix, ".detectron2-unfinished")
BUILD_LOG = Path(sys.prefix, "detectron2-main-build.log")


class InstallError(Exception):
    """The installation cannot go on; the message is one sentence for the user."""


# ------------------------------------------------------- what v0.6 needs on today's libraries


class Fix(NamedTuple):
    file: str
    old: str
    new: str
    count: int = 1  # occurrences of `old`, all of them replaced


FIXES = (
    # NumPy 1.24 removed the aliases of Python's types; NumPy 2 forbids copies under copy=False.
    Fix("data/build.py", "np.int)", "int)"),
    Fix("data/build.py", "np.int\n", "int\n"),
    Fix("data/datasets/pascal_voc.py", "np.str)", "str)"),
    Fix("evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", 2),
    Fix("evaluation/sem_seg_evaluation.py", "np.int)", "int)", 2),
    Fix("evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5),
    Fix("layers/mask_ops.py", "np.array(mask, copy=False)", "np.asarray(mask)"),
    Fix("structures/masks.py", "np.bool)", "bool)", 3),
    Fix("utils/video_visualizer.py", "np.bool)", "bool)"),
    Fix("utils/visualizer.py", "np.bool)", "bool)", 3),
    # Pillow 10 removed the second name of the bilinear filter.
    Fix("data/transforms/transform.py", "Image.LINEAR", "Image.BILINEAR"),
    # Fast COCO evaluation is a compiled operator: evaluate with pycocotools, and log it so.
    Fix(
        "evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "COCOeval_opt = COCOeval\n",
    ),
    Fix(
        "evaluation/coco_evaluation.py",
        "self._use_fast_impl = use_fast_impl",
        "self._use_fast_impl = False",
    ),
    # Caffe2, which PyTorch no longer carries, kept all else of detectron2.export from importing.
    Fix("export/__init__.py", "from .api import *\n", ""),
)

STUB = '''"""Stands in for the compiled operators, which this installation of detectron2 lacks."""


def get_compiler_version():
    return "none, operators are not compiled"


def get_cuda_version():
    return "none, operators are not compiled"


def has_cuda():
    return False


def __getattr__(name):
    raise AttributeError(
        f"detectron2._C.{name} is absent: this detectron2 is pure Python, without compiled "
        "operators (deformable convolution, rotated boxes, fast COCO evaluation)"
    )
'''

# The release's own setup.py compiles C++ sources that the release does not contain.
SETUP = """from setuptools import find_packages, setup

projects = {
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}
setup(
    name="detectron2",
    version="0.6",
    description="detectron2 v0.6 as pure Python, with fixes for today's NumPy and Pillow",
    url="https://github.com/facebookresearch/detectron2",
    license="Apache-2.0",
    packages=find_packages(include=["detectron2", "detectron2.*"]) + list(projects),
    package_dir=projects,
    package_data={"detectron2.model_zoo": ["configs/**/*"]},
)
"""


def unpack(archive, folder, sha256):
    """Unpack a source archive after checking it.

    Args:
        archive (Path): a .tar.gz file.
        folder (Path): an existing folder to unpack into.
        sha256 (str): the hash that the archive must have, in hexadecimal.

    Returns:
        Path: the archive's one top folder. Raises InstallError, before anything is unpacked,
        if the hash differs.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise InstallError(f"{archive.name} has sha256 {found} where {sha256} was expected.")
    with tarfile.open(archive) as tar:
        # Python before 3.10.12 and 3.11.4 has no extraction filters.
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (top,) = folder.iterdir()
    return top


def apply_fixes(package, fixes=FIXES):
    """Apply text replacements below a package folder.

    Args:
        package (Path): the folder that the fixes' file names are relative to.
        fixes (iterable of Fix): raises InstallError, which names the file, if a text does not
            occur exactly as often as its fix says.
    """
    for file, old, new, count in fixes:
        path = package / file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text.count(old) != count:
            raise InstallError(
                f"detectron2/{file} contains {old.strip()!r} {text.count(old)} time(s) where "
                f"{count} was expected, so the fixes for v0.6 do not fit it."
            )
        try:
            # Replaced whole: other programs may be importing it.
            changed = path.with_suffix(".py.changed")
            changed.write_text(text.replace(old, new), encoding="utf-8")
            changed.replace(path)
        except OSError as error:
            raise InstallError(f"{path} cannot be changed ({error.strerror}).") from error


def add_fixes(package):
    """Apply the fixes that an installed v0.6 lacks, as one of an earlier version of this file.

    Args:
        package (Path): the installed package, without compiled operators.

    Returns:
        list of Fix: those that it lacked.
    """
    lacking = [
        fix
        for fix in FIXES
        if (path := package / fix.file).is_file() and fix.old in path.read_text(encoding="utf-8")
    ]
    apply_fixes(package, lacking)
    return lacking


# ------------------------------------------------------------------- what is installed already


class Installed(NamedTuple):
    kind: str  # "main" or "0.6"
    compiled: bool
    folder: str

    def describe(self):
        operators = (
            "with compiled operators"
            if self.compiled
            else "as pure Python, without compiled operators: no deformable convolution, no "
            "rotated boxes, no fast COCO evaluation (pycocotools evaluates)"
        )
        return f"detectron2 {self.kind} is installed in {self.folder}, {operators}."


# Runs in an interpreter of its own: only a fresh one sees what pip has just changed.
PROBE = """
import importlib, json, sys
report = {}
try:
    import torch
    report["torch"] = True
    for name in sys.argv[1:]:
        importlib.import_module(name)
    import detectron2
    detectron2.__version__  # a left-over folder imports too, as an empty namespace package
    report["folder"] = detectron2.__path__[0]
    try:
        report["operators"] = importlib.import_module("detectron2._C").__file__
    except ModuleNotFoundError:
        report["operators"] = ""
except Exception as error:
    lines = str(error).splitlines() or [""]
    report["error"] = f"{type(error).__name__}: {lines[0]}"
    report["missing"] = getattr(error, "name", None) == "detectron2"
print(json.dumps(report))
"""


def find_installed(*imports):
    """Look at the detectron2 that this Python imports.

    Args:
        *imports (str): modules of it that must import as well.

    Returns:
        (Installed or None, str): and why there is none, empty if there simply is none. Raises
        InstallError if torch, which detectron2 needs, does not import.
    """
    output = subprocess.run(
        [sys.executable, "-c", PROBE, *imports],
        cwd=sys.prefix,  # not the caller's folder, which comes first on the path
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    # A crash of the interpreter itself, as of a wrongly linked library, leaves no report.
    report = json.loads(output.splitlines()[-1]) if output else {"error": "Python crashed"}
    if "torch" not in report:
        raise InstallError(
            f"detectron2 needs torch, which {sys.executable} cannot import ({report['error']})."
        )
    if "error" in report:
        return None, "" if report.get("missing") else report["error"]
    folder = Path(report["folder"])
    kind = "main" if (folder / "modeling/backbone/vit.py").is_file() else "0.6"
    compiled = report["operators"] not in ("", str(folder / "_C.py"))
    return Installed(kind, compiled, str(folder)), ""


def remove_unfinished(site_packages):
    """Remove what an interrupted pip leaves of detectron2, `~` being pip's name for the old copy.

    Args:
        site_packages (Path): the folder that pip installs into.
    """
    for pattern in ("detectron2", "detectron2-*.dist-info", "~etectron2", "~etectron2-*.dist-info"):
        for folder in site_packages.glob(pattern):
            shutil.rmtree(folder)


# ----------------------------------------------------------------------------------- installing


def say(message):
    print(f"[detectron2] {message}", flush=True)


def pip_command(*arguments):
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]


def run_pip(doing, *arguments):
    process = subprocess.run(
        pip_command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if process.returncode:
        sys.stderr.write(process.stdout)
        raise InstallError(f"pip failed at {doing}, for the reason that it gives above.")


def download_release(folder):
    """Download the source archive of v0.6 into `folder` and return its path."""
    # Every pip command that downloads a source archive also runs its setup.py, and pip 26 refuses
    # what that one declares. pip's own search knows the user's index, proxy and certificates.
    from pip._internal.commands import create_command
    from pip._internal.exceptions import PipError
    from pip._vendor.requests import RequestException

    command = create_command("download")
    options, _ = command.parse_args(["--no-binary", ":all:"])
    try:
        with command.main_context():
            session = command.get_default_session(options)
            finder = command._build_package_finder(options, session)
            links = [
                candidate.link
                for candidate in finder.find_all_candidates(RELEASE_NAME)
                if str(candidate.version) == RELEASE_VERSION
            ]
            if not links:
                raise InstallError(
                    f"pip finds no {RELEASE_NAME} {RELEASE_VERSION} source archive; is the package "
                    "index reachable?"
                )
            archive = folder / links[0].filename
            # Not unpacked on the way: the hash is that of the file.
            headers = {"Accept-Encoding": "identity"}
            response = session.get(links[0].url_without_fragment, headers=headers)
            response.raise_for_status()
            archive.write_bytes(response.content)
    except (PipError, RequestException) as error:
        raise InstallError(f"{RELEASE_NAME} cannot be downloaded ({error}).") from error
    return archive


def build_wheel_of_release(folder):
    """Build v0.6 as pure Python into `folder`, from PyPI's source archive."""
    say("installing v0.6 from PyPI, as pure Python, with fixes for today's libraries ...")
    archive = download_release(folder)
    sources = folder / "sources"
    sources.mkdir()
    tree = unpack(archive, sources, RELEASE_SHA256)
    apply_fixes(tree / "detectron2")
    (tree / "detectron2" / "_C.py").write_text(STUB)
    (tree / "setup.py").write_text(SETUP)
    run_pip(
        "building detectron2 0.6",
        *("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree),
    )


def why_no_github():
    """Return why the official source cannot be fetched, empty if GitHub answers."""
    try:
        answer = subprocess.run(
            ["git", "ls-remote", MAIN_REPOSITORY, "HEAD"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GITHUB_PATIENCE_S,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
    except FileNotFoundError:
        return "git is not installed"
    except subprocess.TimeoutExpired:
        return f"GitHub did not answer within {GITHUB_PATIENCE_S} s"
    reason = (answer.stderr.strip().splitlines() or [f"git exits with {answer.returncode}"])[0]
    return f"GitHub does not answer ({reason})" if answer.returncode else ""


def build_wheel_of_main(folder):
    """Build the official source into `folder`; its compiler output goes to BUILD_LOG."""
    say(f"building the official source at {MAIN_COMMIT[:12]}; compiling takes some minutes ...")
    command = pip_command(
        *("wheel", "--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", folder),
        "--no-cache-dir",  # a cached build may be one for another torch
        f"git+{MAIN_REPOSITORY}@{MAIN_COMMIT}",
    )
    started = time.monotonic()
    with open(BUILD_LOG, "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as build:
        while build.poll() is None:
            try:
                build.wait(timeout=60)
            except subprocess.TimeoutExpired:
                say(f"compiling for {(time.monotonic() - started) / 60:.0f} min ...")
    if build.returncode:
        lines = BUILD_LOG.read_text(errors="replace").splitlines()
        error = next((line for line in lines if "error:" in line.lower()), "pip names no error")
        raise InstallError(
            f"the official detectron2 did not build ({error.strip()}; see {BUILD_LOG})."
        )


def install_wheel(folder):
    """Replace the installed detectron2 by the wheel in `folder`."""
    (wheel,) = folder.glob("*.whl")
    UNFINISHED_MARK.touch()
    # The same version number as the one to be replaced: without force pip would keep that one.
    run_pip(
        f"installing {wheel.name}",
        *("install", "--no-deps", "--no-index", "--force-reinstall", wheel),
    )
    UNFINISHED_MARK.unlink()


def install(kind):
    """Install "main" or "0.6" and return what then is there, an Installed."""
    with tempfile.TemporaryDirectory(prefix="detectron2-") as name:
        folder = Path(name)
        (build_wheel_of_main if kind == "main" else build_wheel_of_release)(folder)
        install_wheel(folder)
    parts = ("config", "data", "evaluation", "model_zoo", "modeling")
    installed, problem = find_installed(*(f"detectron2.{part}" for part in parts))
    if installed is None:
        raise InstallError(f"detectron2 {kind} was installed but does not import ({problem}).")
    if installed.kind != kind:
        raise InstallError(
            f"detectron2 {kind} was installed, but Python finds {installed.kind} first, in "
            f"{installed.folder}."
        )
    return installed


def install_best():
    """Install the official source where it can be had, else 0.6; return an Installed."""
    reason = why_no_github()
    if not reason:
        try:
            return install("main")
        except InstallError as error:
            reason = f"WARNING: {str(error).rstrip('.')}"
    say(f"{reason}; taking the older v0.6.")
    return install("0.6")


def provide(choice):
    """Provide a detectron2 and return what then is there, an Installed.

    Args:
        choice (str): one of CHOICES, or empty to keep what is there or else install the best.
    """
    installed, problem = find_installed()
    if UNFINISHED_MARK.exists():
        installed, problem = None, "its installation was interrupted"
    if choice == "existing" and installed is None:
        raise InstallError(
            "DETECTRON2=existing, but no detectron2 imports here"
            + (f" ({problem})." if problem else ".")
        )
    if installed and choice in ("", "existing", installed.kind):
        if installed.kind == "0.6" and not installed.compiled:
            for fix in add_fixes(Path(installed.folder)):
                say(f"detectron2 0.6 lacked a fix for today's libraries in {fix.file}: added.")
        return installed
    if choice == "main" and (reason := why_no_github()):
        raise InstallError(f"DETECTRON2=main, but {reason}.")
    if installed:
        say(f"replacing detectron2 {installed.kind}, since DETECTRON2={choice}.")
    elif problem:
        say(f"the detectron2 that is there cannot be used ({problem}): installing it anew.")
    if UNFINISHED_MARK.exists():
        for site_packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            remove_unfinished(Path(site_packages))
    return install(choice) if choice else install_best()


def main():
    choice = os.environ.get("DETECTRON2", "")
    if choice and choice not in CHOICES:
        print(f"DETECTRON2={choice} is none of {', '.join(CHOICES)}.", file=sys.stderr)
        return 2
    try:
        say(provide(choice).describe())
    except InstallError as error:
        print(f"[detectron2] ERROR: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
