"""labelme and CVAT: exact boxes and masks, and what is wrong named by file."""

import math

import pytest

from sasa_det.data import DatasetError
from sasa_det.data.formats import read_cvat, read_labelme


def shape(label, points, shape_type="rectangle"):
    return {"label": label, "points": points, "shape_type": shape_type}


def labelme(image, *shapes, size=(60, 40)):
    return {
        "imagePath": image,
        "imageWidth": size[0],
        "imageHeight": size[1],
        "imageData": "AAAA",
        "shapes": shapes,
    }


def test_shapes_of_labelme(folder, objects_of, faults_of):
    folder.image("images/a.jpg")
    folder.image("b.jpg")
    shapes = [
        shape("tree", [[11, 20], [1, 2]]),
        shape("car", [[1, 1], [10, 1], [10, 20]], "polygon"),
        shape("car", [[20, 20], [23, 24]], "circle"),
        shape("car", [[20, 20]], "point"),
    ]
    folder.json("a.json", labelme("images\\a.jpg", *shapes))
    converted = read_labelme(str(folder.root))
    assert objects_of(converted) == [
        ("images/a.jpg", "tree", [1, 2, 10, 18], 180, 0),
        ("images/a.jpg", "car", [1, 1, 9, 19], 85.5, 0),
        ("images/a.jpg", "car", [15, 15, 10, 10], 100, 0),
    ]
    assert converted.content["annotations"][1]["segmentation"] == [[1, 1, 10, 1, 10, 20]]
    assert [c["name"] for c in converted.content["categories"]] == ["car", "tree"]
    assert faults_of(converted) == [
        "{}/a.json shape 4 is a 'point'",
        "image {}/b.jpg has no json file",
    ]
    folder.text("labels.txt", "__ignore__\n_background_\ntree\ncar\n")
    categories = read_labelme(str(folder.root)).content["categories"]
    assert [c["name"] for c in categories] == ["tree", "car"]


def test_faults_of_labelme(folder, faults_of):
    folder.image("a.jpg")
    shapes = [
        shape("tree", [[math.nan, 1], [2, 3]]),
        shape("tree", [[1, 1], [2, 3]], "polygon"),
        shape("tree", 5),
        7,
        shape(None, [[1, 1], [2, 3]]),
        shape("tree", [[1, 1], [2, 3]]),
    ]
    folder.json("a.json", labelme("a.jpg", *shapes))
    folder.json("b.json", labelme("gone.jpg"))
    folder.json("c.json", labelme("a.jpg", size=(40, 60)))
    folder.text("d.json", "{")
    folder.text("e.json", "[]")
    folder.json("f.json", labelme(None))
    converted = read_labelme(str(folder.root))
    assert faults_of(converted) == [
        "{}/a.json shape 1 has nan where a number is needed",
        "{}/a.json shape 2 is a polygon of 2 points; it needs 3",
        "{}/a.json shape 3 has points 5; they must be a list of x and y",
        "{}/a.json shape 4 is 7, not a shape",
        "{}/a.json shape 5 is of class null, which is not one of the classes in {}: tree",
        "{}/b.json: image {}/gone.jpg does not exist",
        "{}/c.json: image {}/a.jpg has 60 x 40 pixels, but its annotations are for 40 x 60",
        "{}/f.json has imagePath null, not a file name",
        "{}/d.json is not JSON: Expecting property name enclosed in double quotes: line 1 column "
        "2 (char 1)",
        "{}/e.json must hold the shapes of labelme",
    ]
    assert converted.num_left_out == 5 and len(converted.content["annotations"]) == 1
    with pytest.raises(DatasetError, match="has no json files of labelme"):
        (folder.root / "empty").mkdir()
        read_labelme(str(folder.root / "empty"))


META = "<meta><task><labels>{}</labels></task></meta>".format(
    "".join(f"<label><name>{name}</name></label>" for name in ("tree", "car", "bus"))
)
SHAPES = """
<box label="tree" xtl="1" ytl="2" xbr="11.5" ybr="22"/>
<polygon label="car" points="1,1;10,1;10,20"/>"""


def cvat(folder, shapes, name="a.jpg", meta=META):
    return folder.text(
        "annotations.xml",
        f'<annotations><version>1.1</version>{meta}<image id="0" name="{name}" width="60" '
        f'height="40">{shapes}</image></annotations>',
    )


def test_shapes_of_cvat(folder, objects_of, faults_of):
    folder.image("images/a.jpg")
    turned = '<box label="car" xtl="10" ytl="15" xbr="30" ybr="25" rotation="{}"/>'
    ellipse = '<ellipse label="bus" cx="20" cy="20" rx="10" ry="5" rotation="90"/>'
    other = '<tag label="tree"/><points label="tree" points="1,1"/>'
    shapes = f"{SHAPES}{turned.format(90)}{turned.format(45)}{ellipse}{other}"
    converted = read_cvat(cvat(folder, shapes))
    half = 7.5 * math.sqrt(2)
    assert objects_of(converted) == [
        ("a.jpg", "tree", [1, 2, 10.5, 20], 210, 0),
        ("a.jpg", "car", [1, 1, 9, 19], 85.5, 0),
        ("a.jpg", "car", [15, 10, 10, 20], 200, 0),
        ("a.jpg", "car", [20 - half, 20 - half, 2 * half, 2 * half], 200, 0),
        ("a.jpg", "bus", [15, 10, 10, 20], 200, 0),
    ]
    # Clockwise in the image: its first corner goes to the right of the top.
    (corners,) = converted.content["annotations"][2]["segmentation"]
    assert corners == pytest.approx([25, 10, 25, 30, 15, 30, 15, 10])
    assert [c["name"] for c in converted.content["categories"]] == ["tree", "car", "bus"]
    assert faults_of(converted) == ["{}/annotations.xml image 'a.jpg', points 7 has no box"]


def test_content_is_that_of_hotcoco(folder):
    hotcoco = pytest.importorskip("hotcoco")
    folder.image("a.jpg")
    path = cvat(folder, SHAPES)
    expected, content = hotcoco.COCO.from_cvat(path).dataset, read_cvat(path).content
    for section in ("images", "annotations", "categories"):
        found = [{k: v for k, v in e.items() if k != "source"} for e in content[section]]
        assert found == [
            {k: e[k] for k in kept} for e, kept in zip(expected[section], found, strict=True)
        ]


def test_faults_of_cvat(folder, faults_of):
    folder.image("a.jpg")
    shapes = '<box label="tree" xtl="nan" ytl="2" xbr="1" ybr="2"/><polygon label="car" points=""/>'
    shapes += '<box label="cra" xtl="1" ytl="2" xbr="3" ybr="4"/><box label="car" xtl="1"/>'
    path = cvat(folder, shapes)
    start = "{}/annotations.xml image 'a.jpg', "
    assert faults_of(read_cvat(path)) == [
        f"{start}box 1 has 'nan' where a number is needed",
        f"{start}polygon 2 has '' where a number is needed",
        f"{start}box 3 is of class 'cra', which is not one of the labels in {{}}/annotations.xml: "
        "tree, car, bus; did you mean car?",
        f"{start}box 4 has null where a number is needed",
    ]
    folder.image("wide.jpg", (61, 40))
    assert faults_of(read_cvat(cvat(folder, SHAPES, name="wide.jpg"))) == [
        "{}/annotations.xml image 'wide.jpg': image {}/wide.jpg has 61 x 40 pixels, but its "
        "annotations are for 60 x 40"
    ]
    path = cvat(folder, SHAPES, name="gone.jpg")
    assert faults_of(read_cvat(path)) == [
        "{}/annotations.xml image 'gone.jpg': image {}/images/gone.jpg does not exist"
    ]
    for content, message in (
        ("<annotations>", "is not XML: no element found"),
        ("<annotation/>", "must hold the <annotations> of CVAT, not <annotation>"),
        ("<annotations><track/></annotations>", "has tracks of a video"),
        ("<annotations/>", "has no labels of a task, a job or a project"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_cvat(folder.text("annotations.xml", content))
