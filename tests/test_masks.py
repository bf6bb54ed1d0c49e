"""Masks from files: which file is whose, what its values stand for, and what is refused before anything runs."""

import numpy as np
import pytest
import torch
from PIL import Image

from vision_attn.errors import UsageError
from vision_attn.evaluate.masks import open_masks

CLASSES = ("dress", "hat", "shoes")


@pytest.fixture
def folders(tmp_path):
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    masks.mkdir()
    return photos, masks


def photo(folder, name="a.jpg", size=(8, 6), orientation=None):
    """Writes a photo of (width, height) as stored, and returns its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.new("RGB", size, "grey").save(path, exif=exif)
    return path


def labels(folder, values, name="a.png", size=(8, 6), mode="L", dtype=np.uint8):
    """Writes a mask of (width, height) whose first pixels have the values, and returns its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size[::-1], dtype=dtype)
    pixels.flat[: len(values)] = values
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([255 - i // 3 for i in range(768)])
    (image if mode in ("L", "P", "I;16") else image.convert(mode)).save(path)
    return path


def boxes(folder, objects, name="a.xml", size=(8, 6), tag="annotation"):
    path = folder / name
    told = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    parts = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax>"
        f"<ymax>{box[3]}</ymax></bndbox></object>"
        for label, box in objects
    )
    path.write_text(f"<{tag}>{told}{parts}</{tag}>")
    return path


def opened(folders, *paths, **options):
    return open_masks(folders[1], dict.fromkeys(paths, folders[0]), options.pop("classes", CLASSES), **options)


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_labels_are_classes_in_their_order_and_255_is_neither(folders, mode):
    path = photo(folders[0])
    labels(folders[1], [1, 3, 3, 255, 0], mode=mode)
    found = opened(folders, path)
    assert found.kind == "classes" and found.classes_in == {path: (0, 2)} and found.missing == ()
    masks = found.read(path)
    assert list(masks) == [0, 2] and all(mask.shape == (6, 8) and mask.dtype == torch.bool for mask in masks.values())
    assert masks[0].flatten().nonzero().tolist() == [[0]]
    assert masks[2].flatten().nonzero().tolist() == [[1], [2]]


def test_names_tell_what_labels_stand_for(folders):
    path = photo(folders[0])
    labels(folders[1], [1, 2, 3, 4])
    found = opened(folders, path, names=["shoes", "", "dress", "shoes"])
    masks = found.read(path)
    assert found.classes_in[path] == (0, 2) == tuple(masks)
    assert masks[0].flatten().nonzero().tolist() == [[2]]
    assert masks[2].flatten().nonzero().tolist() == [[0], [3]]
    with pytest.raises(UsageError, match="expected a known class for a label, got 'shoe': did you mean 'shoes'"):
        opened(folders, path, names=["shoe"])


@pytest.mark.parametrize("values", [[255, 0, 255], [1, 1], [0]])
def test_two_values_are_an_object(folders, values):
    path = photo(folders[0])
    labels(folders[1], values)
    found = opened(folders, path)
    assert found.kind == "object"
    masks = found.read(path)
    assert found.classes_in[path] == tuple(masks) == ((None,) if any(values) else ())
    if masks:
        assert masks[None].flatten().nonzero().flatten().tolist() == [i for i, value in enumerate(values) if value]


def test_all_files_together_decide_what_masks_are(folders):
    first, second = photo(folders[0]), photo(folders[0], "b.jpg")
    labels(folders[1], [1])
    labels(folders[1], [255], "b.png")
    assert opened(folders, first).kind == opened(folders, second).kind == "object"
    both = opened(folders, first, second)
    assert both.kind == "classes" and both.classes_in == {first: (0,), second: ()} and both.read(second) == {}


def test_what_is_asked_for_stands_above_what_values_look_like(folders):
    path = photo(folders[0])
    labels(folders[1], [1, 1])
    assert list(opened(folders, path, kind="classes").read(path)) == [0]
    assert opened(folders, path, names=["hat"]).classes_in[path] == (1,)
    labels(folders[1], [1, 2, 255])
    assert int(opened(folders, path, kind="object").read(path)[None].sum()) == 3
    with pytest.raises(UsageError, match="known kind of masks, got 'objects': did you mean 'object'"):
        opened(folders, path, kind="objects")


def test_sixteen_bits_hold_more_labels_than_eight(folders):
    path = photo(folders[0])
    classes = [f"c{i}" for i in range(300)]
    labels(folders[1], [255, 256, 300, 65535], mode="I;16", dtype=np.uint16)
    assert list(opened(folders, path, classes=classes).read(path)) == [254, 255, 299]
    labels(folders[1], [254, 255, 3])
    assert list(opened(folders, path, classes=classes).read(path)) == [2, 253]
    labels(folders[1], [2, 255, 65535], mode="I;16", dtype=np.uint16)
    assert list(opened(folders, path).read(path)) == [1]


def test_boxes_count_from_one_and_hold_both_ends(folders):
    path = photo(folders[0])
    boxes(folders[1], [("hat", (1, 1, 2, 1)), ("hat", (8, 6, 8, 6)), ("shoes", (0, 3, 1, 4))])
    found = opened(folders, path)
    assert found.kind == "classes" and found.classes_in[path] == (1, 2)
    masks = found.read(path)
    assert masks[1].nonzero().tolist() == [[0, 0], [0, 1], [5, 7]]
    assert masks[2].nonzero().tolist() == [[2, 0], [3, 0]]


def test_boxes_of_other_things_are_objects(folders):
    path = photo(folders[0])
    boxes(folders[1], [("raccoon", (1, 1, 2, 1)), ("dog", (4, 1, 4, 1))], size=None)
    found = opened(folders, path)
    assert found.kind == "object" and found.classes_in[path] == (None,)
    assert found.read(path)[None].nonzero().tolist() == [[0, 0], [0, 1], [0, 3]]


# ------------------------------------------------------------------------------------------------ which file is whose


def test_the_path_below_the_root_comes_before_the_name(folders):
    first, second = photo(folders[0], "x/1.jpg"), photo(folders[0], "y/1.jpeg")
    labels(folders[1], [1, 2], "x/1.png")
    labels(folders[1], [3, 2], "y/1.PNG")
    found = opened(folders, first, second)
    assert found.classes_in == {first: (0, 1), second: (1, 2)}


def test_a_name_that_one_photo_and_one_mask_bear_is_enough(folders):
    path = photo(folders[0], "deep/in/a.b.jpg")
    labels(folders[1], [1, 2], "elsewhere/a.b.png")
    labels(folders[1], [9], "elsewhere/._a.b.png")
    assert opened(folders, path).files == {path: folders[1] / "elsewhere/a.b.png"}
    # Two photos of this name: which of them is it?
    other = photo(folders[0], "other/a.b.jpg")
    with pytest.raises(UsageError, match=r"each of 2 photos, got none for 2, the first .*a\.b\.jpg"):
        opened(folders, path, other)


def test_two_masks_for_a_photo_are_refused(folders):
    path = photo(folders[0], "deep/a.jpg")
    labels(folders[1], [1], "one/a.png")
    labels(folders[1], [1], "two/a.png")
    with pytest.raises(UsageError, match=r"expected one mask for .*got .*one/a.png and .*two/a.png"):
        opened(folders, path)
    path = photo(folders[0], "b.jpg")
    labels(folders[1], [1], "b.png")
    boxes(folders[1], [("hat", (1, 1, 2, 2))], "b.xml")
    with pytest.raises(UsageError, match=r"expected one mask for .*b.png and .*b.xml"):
        opened(folders, path)


def test_photos_are_not_their_own_masks(folders):
    path = photo(folders[0], "images/a.png")
    labels(folders[0], [1, 2], "masks/a.png")
    found = open_masks(folders[0], {path: folders[0]}, CLASSES)
    assert found.files == {path: folders[0] / "masks/a.png"}


def test_photos_without_a_mask_are_refused_or_listed(folders):
    first, second = photo(folders[0]), photo(folders[0], "b.jpg")
    labels(folders[1], [1, 2])
    with pytest.raises(UsageError, match=r"for each of 2 photos, got none for [^,]*b\.jpg: add it"):
        opened(folders, first, second)
    found = opened(folders, first, second, missing="skip")
    assert found.missing == (second,) and list(found.files) == [first]
    with pytest.raises(UsageError, match=r"expected a photo with a mask, got .*b.jpg"):
        found.read(second)
    with pytest.raises(UsageError, match=r"got none for .*b.jpg"):
        opened(folders, second, missing="skip")
    with pytest.raises(UsageError, match=r"expected a known way .* got 'ignore'"):
        opened(folders, first, missing="ignore")


# ------------------------------------------------------------------------------------------------ what is refused


def test_masks_lie_on_the_upright_photo(folders):
    path = photo(folders[0], size=(8, 6), orientation=6)
    labels(folders[1], [1, 2], size=(6, 8))
    assert opened(folders, path).read(path)[0].shape == (8, 6)
    labels(folders[1], [1, 2], size=(8, 6))
    with pytest.raises(UsageError, match=r"of 8 x 6 for .*a.jpg of 6 x 8, which is the photo before it was turned up"):
        opened(folders, path)


def test_masks_of_another_size_are_counted(folders):
    paths = [photo(folders[0], f"{name}.jpg") for name in "abc"]
    for name, size in zip("abc", [(8, 6), (4, 3), (6, 8)], strict=True):
        labels(folders[1], [1, 2], f"{name}.png", size=size)
    message = r"size of their photos in .*got 2, the first .*b\.png of 4 x 3 for .*b\.jpg of 8 x 6: make"
    with pytest.raises(UsageError, match=message) as caught:
        opened(folders, *paths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objects", "options", "message"),
    [
        ([("hat", (1, 1, 2, 2))], {"size": (6, 8)}, "a.xml of 6 x 8 for .*a.jpg of 8 x 6"),
        ([("hat", (1, 1, 9, 2))], {"size": None}, "a box for 'hat' to 9, 2 for .*a.jpg of 8 x 6"),
        ([("hat", (3, 1, 2, 2))], {}, r"\(a box for 'hat' from 3, 1 to 2, 2\)"),
        ([("hat", (1, 1, "", 2))], {}, "'hat' without a box of four numbers"),
        ([("hat", (1, 1, 2, 2))], {"tag": "coco"}, "XML of <coco> instead of VOC's <annotation>"),
        ([("hat", (1, 1, 2, 2)), ("shoe", (1, 1, 2, 2))], {}, r"'shoe': did you mean 'shoes'\? \(in .*a.xml\)"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(folders, objects, options, message):
    path = photo(folders[0])
    boxes(folders[1], objects, **options)
    with pytest.raises(UsageError, match=message):
        opened(folders, path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", r"a\.png \(a file that is no image\)"),
        ("a.png", b"text", "a file that is no image"),
        ("a.xml", b"<annotation>", r"a\.xml \(a damaged file: no element found"),
    ],
)
def test_files_that_cannot_be_read_are_refused(folders, name, content, message):
    path = photo(folders[0])
    (folders[1] / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"expected masks that can be read in .*{message}"):
        opened(folders, path)


def test_a_cut_file_and_colours_are_refused(folders):
    path = photo(folders[0], size=(80, 60))
    mask = labels(folders[1], np.arange(4800) % 4, size=(80, 60))
    whole = mask.read_bytes()
    mask.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"a\.png \(a damaged file: "):
        opened(folders, path)
    Image.new("RGB", (80, 60), "red").save(mask)
    with pytest.raises(UsageError, match="colours or transparency instead of one label a pixel"):
        opened(folders, path)
    Image.new("LA", (80, 60), (3, 100)).save(mask)
    with pytest.raises(UsageError, match="colours or transparency"):
        opened(folders, path)


def test_labels_above_the_classes_are_refused(folders):
    first, second = photo(folders[0]), photo(folders[0], "b.jpg")
    labels(folders[1], [3, 4])
    labels(folders[1], [9], "b.png")
    with pytest.raises(
        UsageError, match=r"labels of 0 to 3 \(and 255 .*got 4 in 2, the first .*a\.png: name the labels"
    ):
        opened(folders, first, second)


def test_masks_of_two_kinds_are_refused(folders):
    first, second = photo(folders[0]), photo(folders[0], "b.jpg")
    labels(folders[1], [255])
    boxes(folders[1], [("hat", (1, 1, 2, 2))], "b.xml")
    with pytest.raises(UsageError, match=r"an object in .*a\.png and classes in .*b\.xml: say which"):
        opened(folders, first, second)
    assert opened(folders, first, second, kind="object").classes_in == {first: (None,), second: (None,)}


def test_a_folder_without_masks_is_refused(folders):
    path = photo(folders[0])
    with pytest.raises(UsageError, match=r"expected masks \(.png or .xml\) in .*masks, got none"):
        opened(folders, path)
    with pytest.raises(UsageError, match=r"expected a folder of masks, got .*nowhere"):
        open_masks(folders[1] / "nowhere", {path: folders[0]}, CLASSES)


def test_a_photo_that_is_damaged_is_left_to_those_who_read_it(folders):
    path = photo(folders[0])
    path.write_bytes(b"")
    labels(folders[1], [1, 2])
    assert opened(folders, path).classes_in[path] == (0, 1)


# ------------------------------------------------------------------------------------------------ on real files


@pytest.mark.real
def test_the_clothing_masks_are_labels_of_ten_classes(real_dir):
    root = real_dir / "data" / "clothing_masks"
    photos = dict.fromkeys(sorted((root / "images").glob("*.jpg")), root / "images")
    classes = sorted(path.name for path in (real_dir / "data" / "clothing" / "test").iterdir())
    found = open_masks(root / "masks", photos, classes)
    assert found.kind == "classes" and len(found.files) == len(photos) == 126
    pixels = {index for path in photos for index in found.classes_in[path]}
    assert pixels == set(range(10))
    for path in list(photos)[:5]:
        values = np.asarray(Image.open(root / "masks" / f"{path.stem}.png"))
        masks = found.read(path)
        assert tuple(masks) == found.classes_in[path]
        assert all(np.array_equal(mask.numpy(), values == index + 1) for index, mask in masks.items())


@pytest.mark.real
def test_the_raccoons_boxes_are_objects_of_a_clothing_classifier(real_dir):
    root = real_dir / "data" / "raccoon"
    photos = dict.fromkeys(sorted((root / "images").iterdir()), root / "images")
    found = open_masks(root / "annotations", photos, CLASSES)
    assert found.kind == "object" and len(found.files) == 60
    first = found.read(root / "images" / "raccoon-1.jpg")[None]
    assert first.shape == (417, 650) and int(first.sum()) == (522 - 80) * (408 - 87)
    named = open_masks(root / "annotations", photos, ["raccoon"])
    assert named.kind == "classes" and set(named.classes_in.values()) == {(0,)}
