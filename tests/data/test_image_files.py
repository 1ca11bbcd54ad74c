"""Image files that are missing or outside of their folder are found, others are left alone."""

import os

import pytest

from sasa_det.data.images import check_image_files


@pytest.fixture
def root(tmp_path):
    """A folder that holds plain files and links, beside files that it must not lead to."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "images_more").mkdir()
    for name in ("images/a.png", "images/sub/b.png", "other/secret", "images_more/c.png"):
        (tmp_path / name).write_bytes(b"x")
    for name, target in (
        ("link.png", root / "sub" / "b.png"),
        ("relative.png", "sub/b.png"),
        ("out.png", tmp_path / "other" / "secret"),
        ("near.png", "../images_more/c.png"),
        ("chain.png", "out.png"),
        ("broken.png", "nowhere"),
        ("loop.png", "loop.png"),
        ("inner", "sub"),
        ("outer", tmp_path / "other"),
    ):
        os.symlink(target, root / name)
    os.mkfifo(root / "pipe.png")
    return root


def problems(root, *names):
    return list(check_image_files(root, dict(enumerate(names))))


def test_plain_files_and_links_inside_are_fine(root):
    names = ["a.png", "sub/b.png", "./a.png", "sub/../a.png", "link.png", "relative.png"]
    assert problems(root, *names, "inner/b.png", "a.png") == []


def test_folder_may_itself_be_a_link(root, tmp_path):
    os.symlink(root, tmp_path / "linked")
    assert problems(tmp_path / "linked", "a.png", "link.png", "inner/b.png") == []
    assert problems(os.path.relpath(tmp_path / "linked"), "a.png", "link.png") == []


@pytest.mark.parametrize(
    "name, unsafe, clause",
    [
        ("../other/secret", True, "file_name '../other/secret' leads out of the image folder"),
        ("sub/../../other/secret", True, "leads out of the image folder"),
        ("..", True, "leads out"),
        ("/etc/passwd", True, "file_name '/etc/passwd' is absolute; it must be relative"),
        ("out.png", True, "images/out.png' is a link to '{other}/secret', out of the image folder"),
        ("chain.png", True, "is a link to '{other}/secret', out of"),
        ("near.png", True, "is a link to"),
        ("outer/secret", True, "file_name 'outer/secret' leads out of the image folder"),
        # Where the system goes, not where the text does: `inner` is a link, so `..` is not root.
        ("outer/../a.png", True, "leads out"),
        ("a\0.png", True, r"file_name 'a\x00.png' is not possible"),
        ("\ud800.png", True, r"file_name '\ud800.png' is not possible"),
        ("none.png", False, "images/none.png' does not exist"),
        ("none/b.png", False, "images/none/b.png' does not exist"),
        ("a.png/b.png", False, "does not exist"),
        (f"{'x' * 300}/b.png", False, "cannot be looked for: File name too long"),
        ("broken.png", False, "is not a regular file"),
        ("loop.png", False, "is not a regular file"),
        ("loop.png/b.png", False, "cannot be looked for: Too many levels of symbolic links"),
        ("pipe.png", False, "is not a regular file"),
        ("sub", False, "is not a regular file"),
        ("sub/", False, "does not exist"),
        (".", False, "does not exist"),
    ],
)
def test_others_are_named(root, tmp_path, name, unsafe, clause):
    ((key, is_unsafe, found),) = problems(root, name)
    assert (key, is_unsafe) == (0, unsafe)
    assert clause.format(other=tmp_path / "other") in found


def test_every_image_of_a_bad_file_is_named(root):
    found = problems(root, "a.png", "none.png", "none.png", "out.png", "out.png", "outer/secret")
    assert sorted(key for key, *_ in found) == [1, 2, 3, 4, 5]
