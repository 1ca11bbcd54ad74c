"""Images and videos that the words of a command line name."""

import json
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from sasa_det.data.media import Medium, count_images, find_media, media_of_coco, read_frames
from sasa_det.errors import ImageError, UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with images in folders, and what is none."""
    for name in ("b.png", "a.JPG", "deep/er/c.tif", "deep/d.webp", ".hidden.png", ".git/e.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), "red").save(path)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "clip.mp4").write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_video(path, frames, fps=10):
    code = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), code, fps, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()


def names(*words, **options):
    return [medium.name for medium in find_media(words, **options)]


def test_what_words_name(folder):
    everything = ["a.JPG", "b.png", "deep/d.webp", "deep/er/c.tif"]
    assert names("in") == names("./in/") == everything
    assert names("in/b.png", "in") == ["b.png", "a.JPG", "deep/d.webp", "deep/er/c.tif"]
    assert names("in/*.png", "in/clip.mp4") == ["b.png", "clip.mp4"]
    assert names("in/**/*.tif") == ["c.tif"]
    assert names("in", leave_out="in/deep") == ["a.JPG", "b.png"]
    # A name with the characters of a pattern, and a file without the suffix of an image.
    Image.new("RGB", (2, 2)).save("in/[x].png")
    assert names("in/[x].png", "in/notes.txt") == ["[x].png", "notes.txt"]
    assert [medium.is_video for medium in find_media(["in/b.png", "in/clip.mp4"])] == [False, True]


@pytest.mark.parametrize(
    "word, sentence",
    (
        ("nowhere.png", "input 'nowhere.png' does not exist."),
        ("in/*.gif", "input 'in/*.gif' matches no file."),
        ("empty", "input folder 'empty' has no images, which end in .avif, .bmp, "),
    ),
)
def test_words_that_name_nothing(folder, word, sentence):
    with pytest.raises(UsageError) as error:
        find_media(["in/b.png", word])
    assert str(error.value).startswith(sentence)


def test_the_images_of_a_video(tmp_path):
    frames = [np.full((32, 48, 3), 20 * index, np.uint8) for index in range(11)]
    write_video(tmp_path / "clip.avi", frames)
    (clip,) = find_media([str(tmp_path / "clip.avi")])
    assert count_images(clip) == 11
    read = list(read_frames(clip, 10**6))
    assert [frame.index for frame in read] == list(range(11)) and read[0].fps == 10
    for frame, expected in zip(read, frames, strict=True):
        assert frame.image.shape == (32, 48, 3) and frame.medium is clip
        assert abs(frame.image.astype(int) - expected).max() <= 3


def test_what_cannot_be_read(folder):
    (clip,) = find_media(["in/clip.mp4"])
    assert count_images(clip) == 1
    with pytest.raises(ImageError, match="video in/clip.mp4 cannot be read by OpenCV"):
        list(read_frames(clip, 10**6))
    with pytest.raises(ImageError, match="more than the 10 that max_pixels"):
        list(read_frames(Medium("in/b.png", "b.png"), 10))


def test_the_images_of_a_coco_json(folder):
    images = [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "deep/d.webp"}]
    content = {"images": images, "categories": [{"id": 5, "name": "tree"}]}
    with open("test.json", "w") as file:
        json.dump(content, file)
    media, ids = media_of_coco("test.json", "in")
    assert [(m.path, m.name, m.image_id) for m in media] == [
        (os.path.join("in", "b.png"), "b.png", 7),
        (os.path.join("in", "deep/d.webp"), "deep/d.webp", 3),
    ]
    assert ids == {"tree": 5}


@pytest.mark.parametrize(
    "content, sentence",
    (
        ("{", "test.json is not a COCO json of images with an id and a file_name: "),
        ("[]", "test.json is not a COCO json of images"),
        ('{"images": []}', "test.json has no images, or names that are not text."),
        ('{"images": [{"id": "a", "file_name": "b.png"}]}', "must be integers."),
        ('{"images": [{"id": 1, "file_name": "../b.png"}]}', "leads out of the image folder."),
        ('{"images": [{"id": 1, "file_name": 5}]}', "names that are not text."),
    ),
)
def test_a_coco_json_that_cannot_be_used(folder, content, sentence):
    (folder / "test.json").write_text(content)
    with pytest.raises(UsageError) as error:
        media_of_coco("test.json", "in")
    assert sentence in str(error.value)
    with pytest.raises(UsageError, match="nowhere.json cannot be read: No such file"):
        media_of_coco("nowhere.json", "in")
    (folder / "good.json").write_text('{"images": [{"id": 1, "file_name": "b.png"}]}')
    with pytest.raises(UsageError, match="image folder nowhere does not exist"):
        media_of_coco("good.json", "nowhere")
