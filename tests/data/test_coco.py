import logging
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from sasa_det.data import (
    DatasetError,
    check_coco,
    check_registered,
    num_classes_of,
    register_coco,
)


@pytest.mark.parametrize("training", [True, False, None])
def test_valid_set_passes(write, content, training):
    summary = check_coco(*write(content), training=training)
    assert (summary.num_images, summary.num_annotations) == (2, 1)
    assert summary.class_names == ("ant", "cup")


def break_section(section, value):
    def edit(content):
        content[section] = value

    return edit


def drop_section(section):
    return lambda content: content.pop(section)


def drop_key(section, key):
    return lambda content: content[section][-1].pop(key)


def set_key(section, key, value):
    def edit(content):
        content[section][-1][key] = value

    return edit


@pytest.mark.parametrize(
    "edit, training, message",
    [
        (drop_section("images"), None, "lacks 'images'"),
        (drop_section("annotations"), None, "lacks 'annotations'"),
        (drop_section("categories"), None, "lacks 'categories'"),
        (break_section("images", {}), None, "'images' must be a list, not a dict"),
        (break_section("images", []), None, "'images' is empty; at least one image"),
        (
            break_section("annotations", [[]]),
            None,
            r"annotations\[0\] must be an object, not a lis",
        ),
        (break_section("categories", []), None, "'categories' is empty; at least one category"),
        (break_section("annotations", []), True, "'annotations' is empty; a training set needs"),
        (drop_key("images", "id"), None, r"images\[1\] lacks 'id'"),
        (drop_key("images", "file_name"), None, r"images\[1\] \(id 3\) lacks 'file_name'"),
        (drop_key("images", "height"), None, r"images\[1\] \(id 3\) lacks 'height'"),
        (drop_key("images", "width"), None, r"images\[1\] \(id 3\) lacks 'width'"),
        (drop_key("annotations", "id"), None, r"annotations\[0\] \(of image 7\) lacks 'id'"),
        (drop_key("annotations", "image_id"), None, r"annotations\[0\] \(id 11\) lacks 'image_id'"),
        (
            drop_key("annotations", "category_id"),
            None,
            r"annotations\[0\] \(id 11 of image 7\) lacks 'category_id'",
        ),
        (
            drop_key("annotations", "bbox"),
            None,
            r"annotations\[0\] \(id 11 of image 7\) lacks 'bbox'",
        ),
        (
            drop_key("annotations", "area"),
            False,
            r"annotations\[0\] \(id 11 of image 7\) lacks 'area'",
        ),
        (
            drop_key("annotations", "iscrowd"),
            False,
            r"annotations\[0\] \(id 11 of image 7\) lacks 'iscrowd'",
        ),
        (drop_key("categories", "name"), None, r"categories\[1\] \(id 5\) lacks 'name'"),
        (
            set_key("annotations", "image_id", 8),
            None,
            r"annotations\[0\] \(id 11\) has image_id 8, which is not the id of any of the 2 image",
        ),
        (
            set_key("annotations", "category_id", 1),
            None,
            r"annotations\[0\] \(id 11 of image 7\) has category_id 1, which is not .* of the 2 c",
        ),
    ],
)
def test_each_problem_is_named_with_the_file(write, content, edit, training, message):
    edit(content)
    with pytest.raises(DatasetError, match=rf"set\.json: {message}") as error:
        check_coco(*write(content), training=training)
    assert "\n" not in str(error.value)


def test_what_a_use_does_not_need_may_be_absent(write, content):
    for key in ("area", "iscrowd"):
        del content["annotations"][0][key]
    assert check_coco(*write(content), training=True).num_annotations == 1
    content["annotations"] = []
    assert check_coco(*write(content), training=False).num_annotations == 0


@pytest.mark.parametrize(
    "text, message", [("{", "is not JSON"), ("[]", "must hold a JSON object .* not a list")]
)
def test_file_that_is_not_a_json_object(write, text, message):
    with pytest.raises(DatasetError, match=rf"set\.json: {message}"):
        check_coco(*write(text))


def test_binary_file_is_not_json(write, tmp_path):
    _, root = write("")
    (tmp_path / "set.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"set\.json: is not JSON"):
        check_coco(tmp_path / "set.json", root)


def test_missing_files_are_named_and_counted(write, content, tmp_path):
    json_file, root = write(content)
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        check_coco(tmp_path / "none.json", root)
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere of .*set\.json"):
        check_coco(json_file, tmp_path / "nowhere")
    (root / "sub" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 image files .* first is .*sub/b\.png"):
        check_coco(json_file, root)
    (root / "sub").rmdir()
    (root / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 2 image files .* first is .*images/a\.png"):
        check_coco(json_file, root)


def test_registered_set_has_its_classes_before_and_after_loading(write, content, unregister):
    unregister.append("pair")
    json_file, root = write(content)
    register_coco("pair", json_file, root)
    assert MetadataCatalog.get("pair").thing_classes == ["ant", "cup"]
    assert num_classes_of(["pair"]) == 2
    loaded = DatasetCatalog.get("pair")
    assert [d["image_id"] for d in loaded] == [3, 7]
    assert loaded[1]["annotations"][0]["category_id"] == 0
    assert MetadataCatalog.get("pair").thing_dataset_id_to_contiguous_id == {5: 0, 9: 1}
    assert MetadataCatalog.get("pair").evaluator_type == "coco"


def test_registering_again(write, content, unregister, tmp_path):
    unregister.append("pair")
    json_file, root = write(content)
    register_coco("pair", json_file, root)
    register_coco("pair", str(json_file), str(root))
    with pytest.raises(DatasetError, match=r"'pair' is already registered .*other\.json"):
        register_coco("pair", tmp_path / "other.json", root)


def test_broken_set_is_not_registered(write, content):
    content["images"] = []
    with pytest.raises(DatasetError, match="'images' is empty"):
        register_coco("broken", *write(content))
    assert "broken" not in DatasetCatalog and "broken" not in MetadataCatalog


def test_number_of_classes_must_be_known_and_agree(write, content, unregister):
    unregister += ["pair", "pair_renamed", "nameless"]
    register_coco("pair", *write(content))
    content["categories"][0]["name"] = "mug"
    register_coco("pair_renamed", *write(content, "renamed.json"))
    DatasetCatalog.register("nameless", list)
    assert num_classes_of(("pair", "pair")) == 2
    assert num_classes_of(("coco_2017_train", "coco_2017_val")) == 80
    with pytest.raises(
        DatasetError,
        match=r"'pair_renamed' \(2: ant, mug\) and dataset 'pair' \(2: ant, cup\) have different "
        "classes, 1: mug in the first alone and 1: cup in the second alone: they must",
    ):
        num_classes_of(("pair", "pair_renamed"))
    with pytest.raises(DatasetError, match="'nameless' has no 'thing_classes'"):
        num_classes_of(("nameless",))
    with pytest.raises(DatasetError, match="no dataset is named"):
        num_classes_of(())


def test_unknown_name_gets_the_nearest_ones():
    with pytest.raises(
        DatasetError, match=r"'coco_2017_trian' is not registered; did you mean coco_2017_train\?$"
    ):
        num_classes_of(["coco_2017_trian"])
    with pytest.raises(DatasetError, match=r"'qqqqqq' is not registered\.$"):
        check_registered(["qqqqqq"], training=True)
    assert "coco_2017_trian" not in MetadataCatalog


def test_registered_files_are_checked(write, content, unregister):
    unregister.append("pair")
    json_file, root = write(content)
    register_coco("pair", json_file, root)
    check_registered(["pair"], training=True)
    content["annotations"] = []
    write(content)
    check_registered(["pair"], training=False)
    with pytest.raises(DatasetError, match="'annotations' is empty"):
        check_registered(["pair"], training=True)
    content["categories"].append({"id": 10, "name": "dog"})
    write(content)
    with pytest.raises(DatasetError, match=r"\(3: ant, cup, dog\) are not the .*\(2: ant, cup\)"):
        check_registered(["pair"], training=False)


def test_first_error_says_how_many_more_there_are(write, content):
    content["annotations"][0] |= {"bbox": None, "iscrowd": "0", "category_id": 1}
    with pytest.raises(DatasetError) as error:
        check_coco(*write(content))
    message = str(error.value)
    assert "set.json: annotations[0] (id 11 of image 7) has iscrowd '0'" in message
    assert message.endswith("(and 2 more errors, which sasa-det validate-data lists)")


def test_missing_image_is_no_excuse_for_other_errors(write, content):
    content["images"][1]["file_name"] = "gone.png"
    content["images"][0]["file_name"] = "../set.json"
    with pytest.raises(
        DatasetError, match=r"images\[0\] \(id 7\): file_name '../set.json' leads out"
    ):
        check_coco(*write(content))


def test_warnings_are_logged_with_count_and_ids(write, content, unregister, caplog):
    unregister.append("pair")
    content["annotations"] += [
        {**content["annotations"][0], "id": 20 + i, "bbox": [1, 1, 0, 2]} for i in range(7)
    ]
    register_coco("pair", *write(content))
    with caplog.at_level(logging.WARNING, "sasa_det"):
        check_registered(["pair"], training=True)
    ids = ", ".join(f"annotation {20 + i}" for i in range(5))
    (empty,) = [m for m in caplog.messages if "boxes of no width" in m]
    assert empty.endswith(
        f"set.json: boxes of no width or height: 7 ({ids}, ...); training drops them"
    )


def test_file_is_read_once_until_it_changes(write, content, unregister):
    unregister.append("pair")
    json_file, root = write(content)
    register_coco("pair", json_file, root)
    # Nobody reads it again: otherwise this would be no JSON.
    stat, text = json_file.stat(), json_file.read_text()
    json_file.write_text("x" * len(text))
    os.utime(json_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    check_registered(["pair"], training=True)
    check_registered(["pair"], training=False)
    os.utime(json_file)
    with pytest.raises(DatasetError, match="is not JSON"):
        check_registered(["pair"], training=True)


def test_use_is_judged_anew_when_the_file_is_not_read_again(write, content, unregister):
    unregister.append("pair")
    del content["annotations"][0]["area"]
    register_coco("pair", *write(content))
    check_registered(["pair"], training=True)
    with pytest.raises(DatasetError, match=r"\(id 11 of image 7\) lacks 'area', which the COCO"):
        check_registered(["pair"], training=False)


def test_options_reach_the_check(write, content, unregister):
    unregister.append("pair")
    register_coco("pair", *write(content))
    check_registered(["pair"], training=True, max_pixels=24)
    with pytest.raises(
        DatasetError, match=r"images\[0\] \(id 7\) has 6 x 4 pixels, more than the 23"
    ):
        check_registered(["pair"], training=True, max_pixels=23)


def test_other_processes_register_without_reading(tmp_path, unregister):
    unregister.append("pair")
    register_coco("pair", tmp_path / "none.json", tmp_path, check=False)
    assert MetadataCatalog.get("pair").json_file == str(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        check_registered(["pair"], training=True)


@pytest.mark.parametrize("name", ["coco_2017_train", "lvis_v1_val"])
def test_absent_builtin_set_says_where_it_was_looked_for(name):
    metadata = MetadataCatalog.get(name)
    with pytest.raises(FileNotFoundError) as error:
        check_registered([name], training=True)
    message = str(error.value)
    assert f"dataset '{name}'" in message and "$DETECTRON2_DATASETS" in message
    for path in (metadata.json_file, metadata.image_root):
        assert os.path.abspath(path) in message
