"""Records of a COCO json file are detectron2's, and keep what detectron2 would lose."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from pycocotools.mask import decode

from sasa_det.data import DatasetError, check_registered, register_coco
from sasa_det.data.coco import load_coco

RLE = {"size": [4, 6], "counts": [1, 2, 21]}


@pytest.fixture
def load(write, content, unregister):
    """Return a function that writes the content and loads it by a function."""
    unregister.append("pair")

    def call(function):
        if "pair" in MetadataCatalog:
            MetadataCatalog.remove("pair")
        json_file, root = write(content)
        return function(str(json_file), str(root), "pair")

    return call


def test_records_are_those_of_detectron2(load, content):
    first = content["annotations"][0] | {"keypoints": [1, 2, 2, 0.5, 0, 1]}
    content["annotations"] = [
        {**first, "segmentation": [[1, 1, 3, 1, 3, 3], [1, 1, 3]]},
        {**first, "id": 12, "category_id": 9, "segmentation": RLE},
        {**first, "id": 13, "image_id": 3, "segmentation": {"size": [4, 6], "counts": "12e0"}},
        {**first, "id": 14, "iscrowd": 1, "segmentation": []},
    ]
    for entry in content["annotations"][2:]:
        del entry["keypoints"]
    del content["annotations"][2]["iscrowd"]
    ours, theirs = load(load_coco), load(load_coco_json)
    assert ours == theirs
    assert [len(record["annotations"]) for record in ours] == [1, 3]
    assert decode(ours[1]["annotations"][1]["segmentation"]).T.flatten().sum() == 2
    metadata = MetadataCatalog.get("pair")
    assert metadata.thing_classes == ["ant", "cup"]
    assert metadata.thing_dataset_id_to_contiguous_id == {5: 0, 9: 1}


UNUSABLE = [
    {"segmentation": [[]]},
    {"segmentation": [[1, 2, 3, 4]]},
    {"segmentation": [1, 2, 3, 4]},
    {"segmentation": "abc"},
    {"segmentation": {"size": [4, 6]}},
    {"segmentation": {"size": [4, 6], "counts": "1"}},
    {"keypoints": ["nose", "eye"]},
    {"keypoints": [None, None, 2]},
    {"keypoints": [[1, 2, 2]]},
    {"keypoints": {"nose": 1}},
]


@pytest.mark.parametrize("values", UNUSABLE)
def test_what_cannot_be_used_is_left_out_of_the_record_and_the_box_is_kept(load, content, values):
    content["annotations"][0] |= values
    (annotation,) = load(load_coco)[1]["annotations"]
    assert annotation["bbox"] == [1, 1, 2, 2] and not values.keys() & annotation.keys()


@pytest.mark.parametrize("values", UNUSABLE)
def test_data_that_detectron2_itself_loads_are_refused_where_it_cannot(
    write, content, unregister, values
):
    """Of what detectron2 registers it would lose the box, or end in a traceback."""
    unregister += ["ours", "theirs"]
    content["annotations"][0] |= values
    json_file, root = map(str, write(content))
    register_coco("ours", json_file, root)
    check_registered(["ours"], training=True)
    assert len(DatasetCatalog.get("ours")[1]["annotations"]) == 1
    register_coco_instances("theirs", {}, json_file, root)
    with pytest.raises(DatasetError, match="'theirs' with sasa_det.data.register_coco"):
        check_registered(["theirs"], training=True)


def test_a_folder_is_the_same_however_it_is_written(write, content, unregister, monkeypatch):
    unregister.append("pair")
    json_file, root = write(content)
    register_coco("pair", json_file, root)
    monkeypatch.chdir(root.parent)
    register_coco("pair", "set.json", "images/")
    register_coco("pair", "./set.json", f"{root}/sub/..")
    with pytest.raises(DatasetError, match="'pair' is already registered"):
        register_coco("pair", json_file, root / "sub")
