"""The image files that a json names: present, regular, and inside of the image folder."""

import os
from collections import defaultdict

__all__ = ["check_image_files", "is_inside"]


def check_image_files(image_root, file_names):
    """Look for image files, and for names that lead out of their folder.

    Folders are listed once, which is much cheaper than to ask for every image.

    Args:
        image_root (str or path): the folder that the names are relative to.
        file_names (dict[int, str]): names by any key.

    Yields:
        tuple[int, bool, str]: for each file that cannot be used its key, whether it is unsafe (it
            is missing otherwise), and a clause that says why.
    """
    root = os.path.realpath(image_root)
    folders = defaultdict(lambda: defaultdict(list))
    for key, name in file_names.items():
        reason = _unsafe_name(name)
        if reason:
            yield key, True, f"file_name {name!r} {reason}"
        else:
            folder, base = os.path.split(name)
            folders[folder][base].append(key)

    for folder, wanted in folders.items():
        path = os.path.join(image_root, folder)
        if not is_inside(os.path.realpath(path), root):
            for base, keys in wanted.items():
                for key in keys:
                    name = os.path.join(folder, base)
                    yield key, True, f"file_name {name!r} leads out of the image folder"
            continue
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name in wanted:
                        keys = wanted.pop(entry.name)
                        problem = _file_problem(entry, root)
                        for key in keys if problem else ():
                            yield key, *problem
            reason = "does not exist"
        except (FileNotFoundError, NotADirectoryError):
            reason = "does not exist"
        except OSError as error:
            reason = f"cannot be looked for: {error.strerror}"
        for base, keys in wanted.items():
            for key in keys:
                yield key, False, f"{os.path.join(path, base)!r} {reason}"


def _unsafe_name(name):
    """Return why a name is refused whatever the files are, or None."""
    if os.path.isabs(name):
        return "is absolute; it must be relative to the image folder"
    if os.path.normpath(name).split(os.sep)[0] == os.pardir:
        return "leads out of the image folder"
    try:
        if b"\0" not in os.fsencode(name):
            return None
    except UnicodeEncodeError:
        pass
    return "is not possible for a file"


def _file_problem(entry, root):
    # What a plain file needs is known from the listing: only links take further calls.
    if not entry.is_symlink():
        if entry.is_file():
            return None
    elif not is_inside(os.path.realpath(entry.path), root):
        target = os.path.realpath(entry.path)
        return True, f"{entry.path!r} is a link to {target!r}, out of the image folder"
    elif os.path.isfile(entry.path):
        return None
    return False, f"{entry.path!r} is no regular file"


def is_inside(path, root):
    """Tell whether a path is a folder or in it; both are real paths."""
    return path == root or path.startswith(os.path.join(root, ""))
