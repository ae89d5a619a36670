"""Folders, tables and arrays give the same set; misplaced files and wrong shapes are errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kitout.data.read.image_folders import from_arrays, load_images
from kitout.data.read.tables import DataError
from tiny_images import COLOURS, folder, picture


def test_a_folder_a_table_and_an_array_are_the_same_set(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", each=3)
    images = load_images(root)
    assert images.label_names == ("blue", "green", "red")
    files = [(str(f.relative_to(tmp_path)), f.parent.name) for f in sorted(root.glob("*/*.png"))]
    lines = "\n".join(json.dumps({"id": i, "file_name": f, "class": c}) for i, (f, c) in enumerate(files))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{f},{c}\n" for f, c in files))
    (tmp_path / "a.tsv").write_text("what\twho\n" + "".join(f"{tmp_path / f}\t{c}\n" for f, c in files))
    tables = [
        load_images(tmp_path / "a.jsonl"),
        load_images(tmp_path / "a.csv"),
        load_images(tmp_path / "a.tsv", image="what", label="who"),
    ]
    pixels = np.stack([np.asarray(images.open(i)) for i in range(len(images))])
    names = [images.label_names[label] for label in images.labels]
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array(names))
    arrays = [from_arrays(pixels, names), from_arrays(pixels / 255, names), load_images(tmp_path / "a.npz")]
    assert {other.digest for other in (*tables, *arrays)} == {images.digest}


def test_tables_named_after_splits(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", each=3)
    files = [(str(f.relative_to(tmp_path)), f.parent.name) for f in sorted(root.glob("*/*.png"))]
    for name, rows in (("train", files[::2] + files[1::2]), ("val", files[:2])):
        (tmp_path / f"{name}.csv").write_text("path,label\n" + "".join(f"{f},{c}\n" for f, c in rows))
    images = load_images(tmp_path)
    assert images.splits == ("train",) * 9 + ("validation",) * 2
    assert len(load_images(f"{tmp_path / 'train.csv'}#7")) == 7


def test_parquet_too(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = load_images(folder(tmp_path / "images", each=2))
    files = sorted((tmp_path / "images").glob("*/*.png"))
    columns = {"image": [str(f) for f in files], "label": [f.parent.name for f in files]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert load_images(tmp_path / "a.parquet").digest == images.digest


def test_splits_deep_folders_and_hidden_files(tmp_path: Path) -> None:
    folder(tmp_path / "train", each=3)
    folder(tmp_path / "Validation", each=1, first=50)
    folder(tmp_path / "test" / "red" / "deeper", each=1, kinds=("green",), first=90)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "train" / "red" / "._0.png").write_bytes(b"not an image")
    (tmp_path / "train" / "red" / "notes.txt").write_text("of no interest")
    images = load_images(tmp_path)
    assert images.splits == ("validation",) * 3 + ("test",) + ("train",) * 9
    assert images.label_names[images.labels[3]] == "red"  # the first folder says the class


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        folder(tmp_path / name, each=2, kinds=("red",) if name == "bus" else ("blue",))
    assert load_images(tmp_path).label_names == ("bus", "train")


def test_arrays_of_one_channel(tmp_path: Path) -> None:
    gray = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4)
    images = from_arrays(gray, [3, 7, 3, 7, 3, 7])
    assert images.label_names == ("3", "7")
    assert images.open(1).getpixel((0, 0)) == (16, 16, 16)


def test_misplaced_files_are_reported_together(tmp_path: Path) -> None:
    folder(tmp_path, each=1, kinds=("red",))
    picture("red", 1).save(tmp_path / "stray.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        load_images(tmp_path)
    assert "1 images are in" in str(error.value)
    assert "class folder" in str(error.value)
    with pytest.raises(DataError, match="no class folders; expected "):
        load_images(tmp_path / "empty")


@pytest.mark.parametrize(
    ("shape", "kind", "labels", "message"),
    [
        ((4, 3, 8, 8), np.uint8, [0, 1, 0, 1], "channels last"),
        ((4, 8), np.uint8, [0, 1, 0, 1], "expected .N, H, W."),
        ((0, 8, 8), np.uint8, [], "expected .N, H, W."),
        ((4, 8, 8), np.uint8, [0, 1, 0], "4 images and labels of the shape"),
        ((4, 8, 8), np.uint8, [0.5, 1, 0, 1], "labels are float64"),
        ((4, 8, 8), np.int64, [0, 1, 0, 1], "images are int64"),
    ],
)
def test_arrays_of_the_wrong_shape(shape: tuple[int, ...], kind: type, labels: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_arrays(np.zeros(shape, dtype=kind), labels)


@pytest.mark.parametrize("value", [255.0, -0.1, float("nan")])
def test_floats_run_from_0_to_1(value: float) -> None:
    images = np.zeros((4, 2, 2))
    images[0, 0, 0] = value
    with pytest.raises(DataError, match="expected 0 to 1"):
        from_arrays(images, [0, 1, 0, 1])


def test_tables_with_holes_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,label\n,red\nx.png,blue\n")
    with pytest.raises(DataError, match="line 2: 'image' is empty, expected text"):
        load_images(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("image,class\nnone\0.png,red\nx.png,blue\nx.png,\n")
    with pytest.raises(DataError, match="line 4: 'class' is empty, expected text"):
        load_images(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("image,class\nnone\0.png,red\nx.png,blue\n")
    with pytest.raises(DataError, match=r"a\.csv:3: there is no file"):
        load_images(tmp_path / "a.csv")
    with pytest.raises(DataError, match="they do not fit the format image"):
        load_images(_write(tmp_path / "b.csv", "words,label\nx,y\n"))
    with pytest.raises(DataError, match="there is no file"):
        load_images(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="there is no file"):
        load_images(tmp_path / "nothing.npz")
    with pytest.raises(DataError, match="there is no file or folder owner/name"):
        load_images("owner/name")


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_an_npz_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object), labels=np.array([0]))
    with pytest.raises(DataError, match=r"not an \.npz of plain arrays"):
        load_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros(1))
    with pytest.raises(DataError, match="has x; expected images and labels"):
        load_images(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match=r"not an \.npz of plain arrays"):
        load_images(tmp_path / "c.npz")


def test_given_label_names_fix_the_order(tmp_path: Path) -> None:
    root = folder(tmp_path, each=2)
    assert load_images(root, label_names=sorted(COLOURS, reverse=True)).label_names == ("red", "green", "blue")
    with pytest.raises(DataError, match="label 'blue' is not one of the given"):
        load_images(root, label_names=["red", "green"])
