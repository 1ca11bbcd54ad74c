"""Reading XML."""

from xml.etree import ElementTree

from ...errors import DatasetError


def parse_xml(path: str) -> ElementTree.Element:
    """Return the root of an XML file; a DatasetError names one that cannot be read."""
    try:
        # Bytes, for the file itself says what it is encoded in.
        with open(path, "rb") as file:
            return ElementTree.fromstring(file.read())
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise DatasetError(f"{path} is not XML: {error}") from error
