from pathlib import Path

import pytest
from PIL import Image

from fasternet.data.imagenet import open_evaluation_data

FLOWERS = ("daisy", "rose", "tulip")


def read(
    root: Path, pictures: str, text: str, classes: tuple[str, ...] = FLOWERS
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Open pictures with the labels of a text; return the label of each and the remarks."""
    for name in pictures.split():
        path = root / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    (root / "labels.txt").write_text(text)
    data = open_evaluation_data(
        str(root / "pictures"), class_names=classes, num_classes=len(classes), labels=str(root / "labels.txt")
    )
    found = zip(data.dataset.paths, data.dataset.labels, strict=True)
    return {path.as_posix(): label for path, label in found}, data.remarks


@pytest.mark.parametrize(
    "text",
    [
        "a.jpg rose\nb.jpg tulip",
        "file label\na.jpg rose\n\nb.jpg tulip\n\n",
        "file,label\na.jpg,rose\nb.jpg,tulip\n,\n\n",
        "file;label\na.jpg;rose\nb.jpg;tulip\n;\n",
        "a.jpg\trose\nb.jpg\ttulip\n",
        "a,rose,\nb,tulip,\n",
        'file,label\n"a.jpg","rose"\nb.jpg, 2\n',
        "\nval/a.jpg 1\n./b.jpg 2\n",
        "filename,label,split\na.jpg,rose,test\nb.jpg,tulip,test\n",
        "ImageId,Width,Class\na.jpg,640,rose\nb.jpg,480,2\n",
        "id;height;target;by\na;1;rose;\nb;1;tulip;me\n",
    ],
)
def test_label_file_is_read_as_people_write_it(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, "a.jpg b.jpg", text) == ({"a.jpg": 1, "b.jpg": 2}, ())


@pytest.mark.parametrize("text", ["a;1.jpg 1\nb.jpg 2\n", "name,class\na;1.jpg,rose\nb.jpg,tulip\n"])
def test_semicolon_separates_only_where_every_line_has_one(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, "a;1.jpg b.jpg", text) == ({"a;1.jpg": 1, "b.jpg": 2}, ())


@pytest.mark.parametrize(
    ("pictures", "text"),
    [
        ("a/1.jpg b/1.jpg", "a/1.jpg rose\nb/1.jpg tulip\n"),
        ("a/1.jpg b/1.jpg", "a/1 rose\nb/1 tulip\n"),
        ("a/1.jpg b/1.jpg", "data/pictures/a/1.jpg rose\ndata/pictures/b/1.jpg tulip\n"),
        ("a/1.jpg b/1.jpg c/2.jpg", "b/1.jpg tulip\na/1.jpg rose\n2.jpg daisy"),
        ("1.jpg b/1.jpg", "1.jpg daisy\nb/1.jpg tulip\n"),
    ],
)
def test_pictures_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, pictures: str, text: str) -> None:
    expected = {"a/1.jpg": 1, "b/1.jpg": 2, "c/2.jpg": 0, "1.jpg": 0}
    found, remarks = read(tmp_path, pictures, text)
    assert found == {name: expected[name] for name in pictures.split()}
    assert remarks == ()


@pytest.mark.parametrize(
    ("pictures", "chosen"),
    [
        ("dev/1.jpg prod/2.jpg", ["dev/1.jpg", "prod/2.jpg"]),
        ("train/1.jpg Val/2.jpg", ["2.jpg"]),
        ("test/1.jpg dev/2.jpg train/3.jpg", ["1.jpg"]),
        ("other/1.jpg val/2.jpg", ["2.jpg"]),
    ],
)
def test_flat_validation_folder_is_found(tmp_path: Path, pictures: str, chosen: list[str]) -> None:
    assert list(read(tmp_path, pictures, "1 0\n2 0\n3 0\n")[0]) == chosen


def test_names_beyond_the_folder_are_counted(tmp_path: Path) -> None:
    found, remarks = read(tmp_path, "a.jpg", "file,label\na.jpg,great auk\nc.jpg,cat\n", ("cat", "great auk"))
    assert found == {"a.jpg": 1}
    assert remarks == ("the label file names 1 more pictures, which are not in the folder",)


def test_number_that_is_a_name_is_taken_as_the_name_and_that_is_said(tmp_path: Path) -> None:
    classes = tuple(sorted(map(str, range(12))))
    found, remarks = read(tmp_path, "a.jpg b.jpg", "a.jpg 2\nb.jpg 0\n", classes)
    assert found == {"a.jpg": 4, "b.jpg": 0}
    assert remarks == ("labels such as 2 are taken as names of classes, not as indices",)


def test_pictures_of_one_name_and_folder_are_told_apart_by_their_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tell pictures a\.jpg and a\.png apart: .* with its folder or suffix$"):
        read(tmp_path, "a.jpg a.png", "a 1\n")
    assert read(tmp_path, "a.jpg a.png", "a.jpg 1\na.png 2\n")[0] == {"a.jpg": 1, "a.png": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/2.jpg rose\n", r"does not name a/1\.jpg \(2 of 2 pictures\)"),
        (
            "a/1.jpg rose\n",
            r"does not tell pictures a/1\.jpg and b/1\.jpg apart: give each a line with its folder or suffix$",
        ),
        (
            "1.jpg rose\n",
            r"does not tell pictures a/1\.jpg and b/1\.jpg apart: give each a line with its folder or suffix$",
        ),
        ("c/1.jpg rose\nd/1.jpg tulip\n", r"names c/1\.jpg and d/1\.jpg; either may be picture a/1\.jpg$"),
        ("a/1.jpg 0\nb/1.jpg 1\na/1.jpg 2\n", r"line 3 says that a/1\.jpg is of class 2, a line before it of class 0$"),
        ("b/1.jpg,rose garden\n", r"line 1: 'rose garden' is neither a class of the network nor the index of one$"),
        (
            "rose a/1.jpg\ntulip b/1.jpg\n",
            r"line 1 names picture a/1\.jpg last: the picture comes first, then its label$",
        ),
        (
            "a/1.jpg,640,480,rose\n",
            r"line 1 must be a picture's name and its label, but has 4 columns: .*; two are wanted,",
        ),
        ("file,width,x\na/1.jpg,640,rose\n", r"line 2 must .* has 3 columns: .* or a head that names one .* 'label'$"),
        ("file,label\na/1.jpg,rose, garden\n", r"line 2 must be a picture's name and its label, but has 3 columns"),
        ("file,width,label\na/1.jpg,640\n", r"line 2 must be a picture's name and its label, but has 2 columns"),
        ("file,label\na/1.jpg,\n", r"line 2 must be a picture's name and its label, but has 1 columns"),
    ],
)
def test_label_file_that_is_ambiguous_or_wrong_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"labels\.txt " + message):
        read(tmp_path, "a/1.jpg b/1.jpg", text)
