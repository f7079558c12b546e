"""Predictions into a file: bounded, in order, torn and resumed, shared out to processes and from shards."""

import csv
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasternet.data.images import find_images
from fasternet.models import Preprocessing, create_model, save_checkpoint
from fasternet.predict import Predictor, files, predict_to_file
from fasternet.train.distributed import World

NAMES = ("ant", "bee", "cat")
BATCH = 4


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = create_model("fasternet_t0", width=8, head_width=16, num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_checkpoint(folder, model, name="fasternet_t0", class_names=NAMES, preprocessing=Preprocessing(input_size=32))
    return folder


@pytest.fixture(scope="module")
def predictor(model_folder) -> Predictor:
    return Predictor.from_checkpoint(model_folder, batch_size=BATCH)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Return a folder of 22 pictures in three folders, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(22):
        path = folder / "acb"[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(values).resize((40, 40)).save(path)
    (folder / "a" / "0.png").write_text("text")
    (folder / "b" / "new\nline.png").write_text("text")
    (folder / "a" / ".hidden.png").write_text("text")
    return folder


@pytest.fixture(scope="module")
def whole(predictor, pictures, tmp_path_factory) -> bytes:
    """Return the output of one process that was not interrupted."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert predict_to_file(predictor, [pictures], output) == (23, 2)
    return output.read_bytes()


def read_lines(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


def start(pictures, model_folder, output, *options, launcher=("-m", "fasternet")) -> subprocess.Popen:
    command = [sys.executable, *launcher, "predict", pictures, "--checkpoint", model_folder, "--output", output]
    command += ["--batch-size", BATCH, "--device", "cpu", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen([str(word) for word in command], env=environment, stderr=subprocess.PIPE, text=True)


def test_lines_are_the_predictions_in_the_order_of_the_pictures(predictor, pictures, whole):
    lines = read_lines(whole)
    paths = find_images([pictures])
    assert [Path(line["path"]) for line in lines] == paths == list(files.list_images([pictures]))
    errors = []
    expected = {str(found.path): found.top for found in predictor(paths, on_error=errors.append)}
    assert [line["error"] for line in lines if "error" in line] == [*map(str, errors)]
    for line in lines:
        if "error" not in line:
            assert [top["label"] for top in line["top"]] == [label for label, _ in expected[line["path"]]]
            probabilities = [top["probability"] for top in line["top"]]
            assert probabilities == pytest.approx([value for _, value in expected[line["path"]]], abs=1e-6)


def test_loader_processes_change_nothing_and_parts_are_gone(predictor, pictures, whole, tmp_path):
    predict_to_file(predictor, [pictures], tmp_path / "out.jsonl", num_workers=2)
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.jsonl.settings", "out.jsonl"]


def test_csv_has_a_row_of_equal_length_per_picture(predictor, pictures, whole, tmp_path):
    predict_to_file(predictor, [pictures], tmp_path / "out.csv", top_k=2)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "error", "label_1", "probability_1", "label_2", "probability_2"]
    assert {len(row) for row in rows} == {6}
    for row, line in zip(rows[1:], read_lines(whole), strict=True):
        assert row[:2] == [line["path"], line.get("error", "")]
        if "top" in line:
            assert (row[4], float(row[5])) == (line["top"][1]["label"], line["top"][1]["probability"])


def test_run_torn_at_any_byte_is_resumed_to_the_same_bytes(predictor, pictures, whole, tmp_path, monkeypatch):
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part-00000-of-00001"
    monkeypatch.setattr(files, "_merge", lambda *_: None)
    predict_to_file(predictor, [pictures], output)
    monkeypatch.undo()
    complete = part.read_bytes()
    for length in (0, 5, *range(200, len(complete), 311), len(complete)):
        part.write_bytes(complete[:length])
        predicted, _ = predict_to_file(predictor, [pictures], output, resume=True)
        assert output.read_bytes() == whole
        num_kept = complete[:length].count(b"\n") - 1
        assert predicted <= 23 - max(0, num_kept - BATCH)
        output.unlink()


def test_two_processes_give_the_file_of_one(predictor, pictures, whole, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(files, "broadcast", lambda _, value: None if isinstance(value, Exception) else value)
    monkeypatch.setattr(files, "gather", lambda _, value: [value])
    assert predict_to_file(predictor, [pictures], output, world=World(1, 2)) == (11, 1)
    assert predict_to_file(predictor, [pictures], output, world=World(0, 2)) == (12, 1)
    assert output.read_bytes() == whole


def test_resume_refuses_what_is_not_the_run_that_was_begun(predictor, pictures, tmp_path, monkeypatch):
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part-00000-of-00001"
    monkeypatch.setattr(files, "_merge", lambda *_: None)
    predict_to_file(predictor, [pictures], output)
    with pytest.raises(FileExistsError, match=r"out.jsonl was begun already: resume it, or delete out.jsonl.part-\*$"):
        predict_to_file(predictor, [pictures], output)
    with pytest.raises(ValueError, match="was begun with top_k 3, not 1: resume it with that"):
        predict_to_file(predictor, [pictures], output, top_k=1, resume=True)
    part.write_text(part.read_text().replace("/a/12.png", "/a/11.png"))
    with pytest.raises(ValueError, match="the pictures are not those that this run began with"):
        predict_to_file(predictor, [pictures], output, resume=True)
    part.rename(tmp_path / "out.jsonl.part-00000-of-00002")
    with pytest.raises(ValueError, match="was begun with 2 processes, not 1: resume it with as many"):
        predict_to_file(predictor, [pictures], output, resume=True)


def test_part_that_a_process_still_writes_is_left_alone(predictor, pictures, tmp_path):
    def resume(_: int) -> None:
        with pytest.raises(BlockingIOError, match=r"another process is still writing .*part-00000-of-00001"):
            predict_to_file(predictor, [pictures], tmp_path / "out.jsonl", resume=True)

    predict_to_file(predictor, [pictures], tmp_path / "out.jsonl", on_batch=resume)


def test_finished_output_is_kept(predictor, pictures, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("kept")
    with pytest.raises(FileExistsError, match="exists already"):
        predict_to_file(predictor, [pictures], output)
    with pytest.warns(
        UserWarning, match=r"out\.jsonl is complete; it was not checked, as it is not known what made it"
    ):
        assert predict_to_file(predictor, [pictures], output, resume=True) == (0, 0)
    assert output.read_text() == "kept"


def test_finished_output_is_resumed_with_what_made_it_alone(predictor, pictures, whole, tmp_path):
    output = tmp_path / "out.jsonl"
    predict_to_file(predictor, [pictures], output)
    assert predict_to_file(predictor, [pictures], output, resume=True) == (0, 0)
    with pytest.raises(ValueError, match=r"is complete, and was made with top_k 3, not 1: name another output$"):
        predict_to_file(predictor, [pictures], output, top_k=1, resume=True)
    with pytest.raises(ValueError, match=f"was made with images .*{pictures}'.*, not .*{pictures / 'a'}'"):
        predict_to_file(predictor, [pictures / "a"], output, resume=True)
    other = dataclasses.replace(predictor, fingerprint="0")
    with pytest.raises(ValueError, match=r"was made with weights '.*', not '0'"):
        predict_to_file(other, [pictures], output, resume=True)
    assert output.read_bytes() == whole


@pytest.mark.parametrize("line", [1, 2, 7])
@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"{}\n", b"[1, 2]\n", b'[0, 0, {"path": "a"}] x\n', b"\xff\n"])
def test_damaged_line_of_a_part_is_one_sentence(predictor, pictures, tmp_path, monkeypatch, line, damage):
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part-00000-of-00001"
    monkeypatch.setattr(files, "_merge", lambda *_: None)
    predict_to_file(predictor, [pictures], output)
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*lines[: line - 1], damage, *lines[line:]]))
    words = f"00001 is damaged at line {line}: delete it, and resume predicts anew what it held$"
    with pytest.raises(ValueError, match=words):
        predict_to_file(predictor, [pictures], output, resume=True)


def test_wrong_arguments_leave_nothing_behind(predictor, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures in folder"):
        predict_to_file(predictor, [tmp_path / "empty"], tmp_path / "out.csv")
    with pytest.raises(ValueError, match=r"out.txt must end in .jsonl or .csv"):
        predict_to_file(predictor, [pictures], tmp_path / "out.txt")
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent for the output"):
        predict_to_file(predictor, [pictures], tmp_path / "absent" / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_listing_is_lazy(predictor, tmp_path, monkeypatch):
    """A run that never ends is written as it goes: neither names nor predictions are collected."""
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    monkeypatch.setattr(files, "list_images", lambda _: itertools.repeat(tmp_path / "1.png"))
    written = []

    def stop(num_images: int) -> None:
        written.append((tmp_path / "out.jsonl.part-00000-of-00001").read_bytes().count(b"\n") - 1)
        if len(written) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_to_file(predictor, [tmp_path], tmp_path / "out.jsonl", on_batch=stop)
    assert written == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH, 5 * BATCH]


@pytest.fixture(scope="module")
def shards(pictures, tmp_path_factory) -> Path:
    """Return a folder of three tar files of 7 or 8 pictures each."""
    folder = tmp_path_factory.mktemp("shards")
    paths = find_images([pictures])
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for index, path in enumerate(paths[number::3]):
                tar.add(path, f"{index:03}.png")
    return folder


def test_shards_are_shared_out_and_resumed_within_a_shard(predictor, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "broadcast", lambda _, value: None if isinstance(value, Exception) else value)
    monkeypatch.setattr(files, "gather", lambda _, value: [value])
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert predict_to_file(predictor, [shards], one) == (23, 2)
    names = [line["path"] for line in read_lines(one.read_bytes())]
    assert names[0] == "0.tar/000.png"
    assert names == sorted(names)
    assert predict_to_file(predictor, [shards], two, world=World(1, 2)) == (8, 0)
    part = tmp_path / "two.jsonl.part-00000-of-00002"

    def stop(_: int) -> None:
        if part.read_bytes().count(b"\n") > 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_to_file(predictor, [shards], two, world=World(0, 2), on_batch=stop)
    assert not two.exists()
    predicted, _ = predict_to_file(predictor, [shards], two, world=World(0, 2), resume=True)
    assert predicted < 8
    assert two.read_bytes() == one.read_bytes()


def test_archive_among_pictures_is_passed_over_and_shards_stand_alone(predictor, pictures, shards, tmp_path):
    (tmp_path / "mixed").mkdir()
    shutil.copy(pictures / "a" / "3.png", tmp_path / "mixed")
    shutil.copy(shards / "0.tar", tmp_path / "mixed")
    assert predict_to_file(predictor, [tmp_path / "mixed"], tmp_path / "out.jsonl", resume=True) == (1, 0)
    with pytest.raises(ValueError, match=r"0\.tar is a shard, no picture: name the folder of the shards"):
        predict_to_file(predictor, [shards / "0.tar"], tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match=f"name one folder of shards alone, or pictures .* {shards} has shards"):
        predict_to_file(predictor, [pictures, shards], tmp_path / "other.jsonl")


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_run_is_resumed_to_the_same_bytes(pictures, model_folder, tmp_path, num_processes):
    many = tmp_path / "many"
    many.mkdir()
    for number in range(40):
        (many / str(number)).symlink_to(pictures)
    launcher = ["-m", "fasternet"]
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", *launcher]
    output, part = tmp_path / "out.jsonl", tmp_path / f"out.jsonl.part-00000-of-{num_processes:05}"
    process = start(many, model_folder, output, launcher=launcher)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (part.exists() and part.read_bytes().count(b"\n") > 60):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    # torchrun ends the other processes where one dies.
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if num_processes == 1 else int(children[-1]), signal.SIGKILL)
    process.communicate()
    assert not output.exists()
    resumed = start(many, model_folder, output, "--resume", launcher=launcher)
    assert "pictures predicted" in resumed.communicate(timeout=120)[1]
    assert resumed.returncode == 0
    predict_to_file(Predictor.from_checkpoint(model_folder, batch_size=BATCH), [many], tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert output.read_bytes().count(b"\n") == 40 * 23
