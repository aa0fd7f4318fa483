"""Tables of images: columns, splits, labels by name and number, and mistakes, which name the line."""

import json
import pickle

import numpy as np
import pytest
from data_helpers import dataset_of, put
from helpers import TINY_FINETUNE, assert_one_line, encoded, read_log

from Evaluation import probe
from Finetuning import main_finetune
from util.data.sources import readers
from util.data.sources.source import NoSplit
from util.errors import UserError
from util.training.run_state import fingerprint


@pytest.fixture
def folder(tmp_path, photographs):
    """Six crops of photographs, in folders and under odd names."""
    names = ("a.jpg", "deep/b.jpg", 'two, "c".jpg', "é.jpg", "no suffix", " d.jpg")
    for i, name in enumerate(names):
        put(tmp_path, name, content=encoded(photographs[i % 2].crop((30 * i, 0, 30 * i + 80, 60))))
    return tmp_path


def table(folder, text, split="train", labels=True, encoding="utf-8"):
    (folder / "t.csv").write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return readers.open_source(f"csv:{folder}/t.csv", split, labels)


def content(source):
    """[(path, class or number of the class)]"""
    labels = [source.classes[label] or label for label in source.labels.tolist()]
    return [*zip([source.name(index).partition("/t.csv")[0] for index in range(len(labels))], labels, strict=True)]


READ = {
    "names": ("path,label\na.jpg,dog\ndeep/b.jpg,cat\n", ["cat", "dog"], [1, 0]),
    "numbers": ("path,label\na.jpg,3\ndeep/b.jpg,01\n", ["", "", "", ""], [3, 1]),
    "names with a number": ("path,label\na.jpg,3\ndeep/b.jpg,3d\n", ["3", "3d"], [0, 1]),
    "BOM, CRLF, blank lines": ("\ufeff\r\npath,label\r\n\r\na.jpg,x\r\n,\r\ndeep/b.jpg,y\r\n \r\n", "xy", [0, 1]),
    "semicolons": ("Path; Label\na.jpg; x,y\ndeep/b.jpg; z\n", ["x,y", "z"], [0, 1]),
    "Excel's note": ("sep=;\r\npath;label\r\na.jpg;x\r\ndeep/b.jpg;y\r\n", "xy", [0, 1]),
    "tabs": ("Filename\tClass\tid\na.jpg\tx\t1\ndeep/b.jpg\ty\t2\n", "xy", [0, 1]),
    "spaces": ('path, label\na.jpg, "x, y"\ndeep/b.jpg, z \n', ["x, y", "z"], [0, 1]),
    "another order": ("id,class_name,file_name\n7,x,a.jpg\n8,y,deep/b.jpg\n", "xy", [0, 1]),
    "no line feed at the end": ("path,label\na.jpg,x\ndeep/b.jpg,y", "xy", [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_tables(folder, case):
    text, classes, labels = READ[case]
    source = table(folder, text)
    assert (source.classes, source.labels.tolist(), source.labels.dtype) == ([*classes], labels, np.int64)
    assert [source.path(index) for index in range(2)] == [f"{folder}/a.jpg", f"{folder}/deep/b.jpg"]
    assert source.read(1) == (folder / "deep" / "b.jpg").read_bytes()
    assert source.root == f"csv:{folder}/t.csv"


def test_odd_paths(folder):
    """Quoted, absolute, of other alphabets, without a suffix, above the folder of the table."""
    text = f'path,label\n"two, ""c"".jpg",x\n{folder}/a.jpg,x\né.jpg,ü\nno suffix,x\n../{folder.name}/./deep/b.jpg,x\n'
    source = table(folder, text + '" d.jpg",x\n')
    assert source.classes == ["x", "ü"]
    assert source.name(1) == f"{folder}/a.jpg"
    assert all(source.read(index)[:2] == b"\xff\xd8" for index in range(6))
    assert len({source.read(index) for index in range(6)}) == 6
    assert dataset_of(pickle.loads(pickle.dumps(source))).sample(3)[1][-1] == 0  # for workers that are spawned


SPLITS = "path,label,split\na.jpg,x,train\ndeep/b.jpg,y,Train\né.jpg,z,validation\nno suffix,,test\n"


def test_splits(folder, caplog):
    """Classes are those of the whole table; rows that are not read need no labels."""
    caplog.set_level("INFO")
    train, val = table(folder, SPLITS), table(folder, SPLITS, "val")
    assert caplog.messages == [f"--data_path csv:{folder}/t.csv: validation is taken as val; test is left out"]
    assert train.classes == val.classes == ["x", "y", "z"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [2])
    assert (train.root, val.root) == (f"csv:{folder}/t.csv (train)", f"csv:{folder}/t.csv (validation)")
    every = table(folder, SPLITS, "", labels=False)
    assert (len(every.labels), every.classes) == (4, [])
    assert caplog.messages[-1].endswith("line 5: no suffix: it has no label: the images are read without labels")


def test_tables_in_a_folder(folder):
    put(folder / "tables", "train.csv", content=b"path,label\n../a.jpg,x\n../no suffix,y\n")
    put(folder / "tables", "valid.csv", content="path,label\n../é.jpg,y\n".encode())
    path = f"csv:{folder}/tables"
    train, val = (readers.open_source(path, split) for split in ("train", "val"))
    assert (train.classes, train.labels.tolist()) == (["x", "y"], [0, 1])
    assert (val.classes, val.labels.tolist(), val.root) == (["y"], [0], f"{path}/valid.csv")
    (folder / "tables" / "valid.csv").unlink()
    with pytest.raises(NoSplit, match=r"tables: there is no val\.csv in it"):
        readers.open_source(path, "val")
    put(folder / "tables", "train.csv", content=b"path,split\n../a.jpg,train\n")
    with pytest.raises(UserError, match=r"train\.csv: the name says the split, so it must not have a column split"):
        readers.open_source(path, "train")


MISTAKES = {
    "a.jpg,1\n": r"t\.csv: its first line must name the columns, and one of them path or file .*; it is 'a\.jpg,1'",
    "a.jpg;1\n": "it is 'a\\.jpg;1'$",
    "": "its first line must name the columns",
    "path,label\n": "no row follows the names of the columns",
    "path\na.jpg\n": "it has no column of labels, called label or class or class_name",
    "path,label\na.jpg,1\ndeep/b.jpg\n": r"t\.csv line 3: it has 1 columns instead of 2$",
    "path,label\na.jpg,1,2\n": "line 2: it has 3 columns instead of 2$",
    "path,label\na.jpg,1\n\n,2\n": "line 4: it has no path$",
    "path,label\na.jpg,1\nz.jpg,1\ny.jpg,1\n": r"line 3: z\.jpg: No such file or directory; 2 lines are like that$",
    "path,label\ndeep\\b.jpg,1\n": r"line 2: .*: No such file or directory; write / between folders instead of \\$",
    "path,label\ndeep,1\n": "line 2: deep: it is no regular file$",
    "path,label\na\0.jpg,1\n": "line 2: .*NUL$",
    "path,label\na.jpg,1\ndeep/b.jpg, \n": r"line 3: deep/b\.jpg: it has no label$",
    "path,label\na.jpg,1000000\n": r"line 2: a\.jpg: its label is no number from 0 to 999999$",
    "path,label\na.jpg,0\ndeep/b.jpg,-1\n": r"line 3: deep/b\.jpg: its label is no number from 0 to 999999$",
    "path,label\na.jpg,99999999999999999999\n": r"a\.jpg: its label is no number from 0 to 999999$",
    "path,label\na.jpg,x\ndeep/../a.jpg,y\n": r"line 3: deep/\.\./a\.jpg: it is 'y' here, and 'x' in line 2$",
    "path,label,split\na.jpg,x,train\na.jpg,x,val\n": r"line 3: a\.jpg: it is 'val' here, and 'train' in line 2$",
    "path,label,split\na.jpg,x,dev\n": "its split is none of train, training, val, validation, valid, test$",
    "path,label,split\na.jpg,x,\n": "its split is none of",
    "path,label,split\na.jpg,x,val\n": "no row has the split train, only val$",
    'path,label\na.jpg,"x\n': "line 2: unexpected end of data$",
    'path,label\na.jpg,"x"y\n': "line 2: ',' expected after '\"'$",
    "path,label\na.jpg,x\ndeep/b.jpg,caf\xe9\n".encode("latin-1"): "line 3: it is not UTF-8: save the table as UTF-8$",
    "path,label\na.jpg,x\n".encode("utf-16"): "line 1: it is not UTF-8",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_in_tables(folder, text):
    with pytest.raises(UserError, match=MISTAKES[text]) as error:
        table(folder, text)
    assert str(error.value).isprintable()


def test_rows_that_repeat_an_image(folder, caplog):
    caplog.set_level("INFO")
    assert table(folder, "path,label\na.jpg,x\n./a.jpg,x\n").labels.tolist() == [0, 0]
    assert caplog.messages == [f"{folder}/t.csv: 1 rows repeat an image, which counts as often"]


def test_the_first_of_several_columns_is_named(folder, caplog):
    caplog.set_level("INFO")
    assert table(folder, "path,label,class,class_name\na.jpg,0,x,y\n").classes == [""]
    assert caplog.messages == [f"{folder}/t.csv: the first column label is read as the label"]


def test_tables_without_labels(folder):
    """Nothing about labels stops pretraining; paths are checked all the same."""
    assert table(folder, "image\na.jpg\n", labels=False).classes == []
    for rows in ("a.jpg,x\na.jpg,y\n", "a.jpg,x\né.jpg,\n", "a.jpg,1000000\né.jpg,1\n"):
        source = table(folder, f"path,label\n{rows}", labels=False)
        assert (source.classes, source.labels.tolist()) == ([], [0, 0])
    with pytest.raises(UserError, match=r"line 2: z\.jpg: No such file or directory$"):
        table(folder, "path\nz.jpg\n", labels=False)
    with pytest.raises(UserError, match="it has validation and no train"):
        table(folder, "path,split\na.jpg,validation\n", labels=False)
    with pytest.raises(NoSplit, match=r"all its rows are train: add the column, .* folder with train\.csv and val"):
        table(folder, "path,label\na.jpg,x\n", "val")


def test_the_fingerprint_of_a_table(folder):
    """With labels as of any source, without by the names of the images."""
    first, again = table(folder, "path,label\na.jpg,x\n"), table(folder, "file,label\ndeep/b.jpg,x\n")
    assert fingerprint(first) == fingerprint(again)
    first, again = (table(folder, f"path\n{name}\n", labels=False) for name in ("a.jpg", "deep/b.jpg"))
    assert fingerprint(first) != fingerprint(again)


def test_every_script_takes_a_table(folder, run_script, capsys):
    text = "path,label,split\na.jpg,x,train\ndeep/b.jpg,y,train\né.jpg,z,train\nno suffix,x,test\n"
    table(folder, text)
    data = ["--data_path", f"csv:{folder}/t.csv"]
    words = [*TINY_FINETUNE, *data, "--mixup", 0, "--cutmix", 0, "--epochs", 1, "--warmup_epochs", 0, "--batch_size", 2]
    run_script(main_finetune, *words, "--output_dir", folder / "out")
    assert read_log(folder / "out")[0]["test_images"] == 1
    best = folder / "out" / "checkpoint-best.pth"
    run_script(main_finetune, *words, "--eval", "--resume", best)
    assert "1 images of 1 classes" in capsys.readouterr().out
    run_script(probe, best, *data, "--probe", "knn", "--k", 1, "--device", "cpu", "--num_workers", 0)
    assert json.loads(best.with_suffix(".probe.json").read_text())
    capsys.readouterr()
    (folder / "deep" / "b.jpg").unlink()
    with pytest.raises(SystemExit) as exit_info:
        run_script(main_finetune, *words, "--output_dir", folder / "other")
    assert_one_line(capsys, exit_info, r"line 3: deep/b\.jpg: No such file")
