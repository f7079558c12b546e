import functools
import http.server
import json
import multiprocessing
import os
import pickle
import random
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from fasternet.data import shard_files
from fasternet.data.datasets import create_datasets, create_validation_dataset
from fasternet.data.images import ImageError
from fasternet.data.packing import pack_shards
from fasternet.data.shards import ShardLoader, stream_shard_pictures


def read_colour(image: Image.Image) -> torch.Tensor:
    return torch.tensor([image.getpixel((0, 0))[0], random.random(), torch.rand(()).item()])


def create_loader(data: Path | str, batch_size: int = 4, **options) -> ShardLoader:
    stream = create_datasets(data).train
    stream.transform = read_colour
    return ShardLoader(stream, batch_size, **options)


def list_colours(loader: ShardLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [images[:, 0].int().tolist() for images, _ in loader.batches(epoch, start)]


def flatten(parts: list[list[int]]) -> list[int]:
    return [colour for part in parts for colour in part]


def list_parts(loader: ShardLoader, epoch: int = 0, start: int = 0) -> list[list[list[float]]]:
    return [[*images.tolist(), labels.tolist()] for images, labels in loader.batches(epoch, start)]


def find_member(path: Path, number: int) -> tuple[tarfile.TarInfo, int]:
    with tarfile.open(path) as tar:
        member = [member for member in tar if member.name.endswith(".png")][number]
    return member, member.offset_data


def damage(path: Path, number: int = 0) -> str:
    """Overwrite a picture in a shard; return its name."""
    member, offset = find_member(path, number)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"x" * member.size)
    return f"{path.name}/{member.name}"


def forget_sizes(shards: Path) -> None:
    """Make shards.json what it was before it told sizes."""
    contents = json.loads((shards / "shards.json").read_text())
    for shard in contents["train"] + contents["validation"]:
        del shard["num_bytes"]
    (shards / "shards.json").write_text(json.dumps(contents))


def test_epoch_gives_each_picture_once_with_its_label_in_an_order_of_its_own(shards: Path) -> None:
    loader = create_loader(shards, seed=3)
    assert loader.num_steps == 10
    epochs = [flatten(list_colours(loader, epoch)) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1] != flatten(list_colours(create_loader(shards, seed=4), 1))
    for images, labels in loader.batches(0):
        assert (images[:, 0].int() % 2).tolist() == labels.tolist()


def test_loader_repeats_itself_and_leaves_the_random_states_alone(shards: Path) -> None:
    before = random.getstate(), torch.get_rng_state()
    first = list_parts(create_loader(shards), 5)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(99)
    torch.manual_seed(99)
    assert list_parts(create_loader(shards), 5) == first
    draws = [picture[1:] for part in first for picture in part[:-1]]
    assert len({tuple(draw) for draw in draws}) == 40


@pytest.mark.parametrize(("batch_size", "accumulate"), [(6, 1), (12, 2)])
def test_processes_share_the_shards_and_give_equally_many_parts(shards: Path, batch_size: int, accumulate: int) -> None:
    seen = []
    for rank in range(3):
        loader = create_loader(shards, batch_size, rank=rank, world_size=3, accumulate=accumulate)
        parts = list_colours(loader)
        assert len(parts) == loader.num_steps * accumulate
        assert {len(part) for part in parts} == {2}
        seen.append(set(flatten(parts)))
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


@pytest.mark.parametrize("start", [1, 4, 7, 9])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.multiprocess)])
def test_epoch_goes_on_exactly_where_it_stopped(shards: Path, monkeypatch, start: int, num_workers: int) -> None:
    monkeypatch.setattr("fasternet.data.shards.describe_machine", lambda: type("M", (), {"cores": 2}))
    loader = create_loader(shards, num_workers=num_workers, rank=1, world_size=2, accumulate=2)
    assert list_parts(loader, 1, start) == list_parts(loader, 1)[2 * start :]
    assert loader.describe_resume(0) is None
    assert f"if 2 processes with {num_workers} workers each" in loader.describe_resume(start)


@pytest.mark.multiprocess
def test_workers_are_no_more_than_shards_and_read_different_ones(create_tree, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("fasternet.data.shards.describe_machine", lambda: type("M", (), {"cores": 4}))
    pack_shards(create_tree(tmp_path / "tree"), tmp_path / "shards", images_per_shard=20)
    loader = create_loader(tmp_path / "shards", num_workers=4)
    assert "with 2 workers" in loader.describe_resume(1)
    assert sorted(flatten(list_colours(loader))) == list(range(40))


def test_process_whose_shards_are_short_begins_them_anew(create_tree, tmp_path: Path) -> None:
    pack_shards(create_tree(tmp_path / "tree", 24), tmp_path / "shards", images_per_shard=10)  # 10, 10 and 4
    lengths = []
    for rank in range(3):
        parts = list_parts(create_loader(tmp_path / "shards", 6, rank=rank, world_size=3))
        assert [len(part) - 1 for part in parts] == [2] * 4
        pictures = [tuple(picture) for part in parts for picture in part[:-1]]
        assert len(set(pictures)) == 8  # a picture that comes again is augmented anew
        lengths.append(len({colour for colour, *_ in pictures}))
    assert sorted(lengths) == [4, 8, 8]


def test_names_are_the_pictures_of_a_step(shards: Path) -> None:
    loader = create_loader(shards, 8, accumulate=2)
    colours = list_colours(loader, 2)
    for step in (0, 3):
        names = loader.names(2, step)
        assert [int(Path(name).stem) for name in names] == colours[2 * step] + colours[2 * step + 1]
        assert all(name.startswith("train-00000") for name in names)


def test_wrong_numbers_are_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"7 training shards in .* are too few for 8 processes"):
        create_loader(shards, 8, world_size=8)
    with pytest.raises(ValueError, match="batch_size=5 must be a multiple of the 2 parts"):
        create_loader(shards, 5, accumulate=2)


def test_small_set_is_one_step_of_all_pictures(shards: Path) -> None:
    loader = create_loader(shards, 64)
    assert [len(part) for part in list_colours(loader)] == [40]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.multiprocess)])
def test_unreadable_picture_is_named_and_the_next_takes_its_place(shards: Path, num_workers: int) -> None:
    name = damage(shards / "train-000002.tar", 1)
    with pytest.raises(ImageError, match=f"^cannot read {shards}/{name}: it is no picture of a known format$"):
        list_colours(create_loader(shards, num_workers=num_workers))
    errors: list[ImageError] = []
    colours = flatten(list_colours(create_loader(shards, num_workers=num_workers, on_error=errors.append)))
    assert [str(error).split(": ")[0] for error in errors] == [f"cannot read {shards}/{name}"]
    lost = int(Path(name).stem)
    assert (len(colours), set(range(40)) - set(colours)) == (40, {lost})


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.multiprocess)])
def test_truncated_shard_is_one_sentence_that_names_it(shards: Path, share: float, num_workers: int) -> None:
    path = shards / "train-000003.tar"
    forget_sizes(shards)
    _, end = find_member(path, 5)
    os.truncate(path, int(end * share) // 100 * 100)
    with pytest.raises(ValueError, match=f"^shard {path} is damaged or truncated: [^\n]*$"):
        list_colours(create_loader(shards, num_workers=num_workers))


def test_shard_of_another_size_is_one_sentence(shards: Path) -> None:
    for split, read in (
        ("train", lambda: list_colours(create_loader(shards))),
        ("val", lambda: create_datasets(shards)),
    ):
        path = shards / f"{split}-000000.tar"
        size = path.stat().st_size
        os.truncate(path, size + 512)
        words = f"is not the one that shards.json describes: it has {size + 512} bytes instead of {size}"
        with pytest.raises(ValueError, match=f"^shard {path} {words}$"):
            read()
        os.truncate(path, size)


def test_missing_shard_and_wrong_label_are_one_sentence(shards: Path) -> None:
    contents = json.loads((shards / "shards.json").read_text())
    (shards / "shards.json").write_text(json.dumps({**contents, "class_names": ["a"]}))
    with pytest.raises(
        ValueError, match=r"val-000000\.tar/b/01\.png has the label 1; it must be one of 0 to 0, or its name$"
    ):
        create_datasets(shards)
    (shards / "shards.json").write_text(json.dumps(contents))
    (shards / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=f"^no shard at {shards}/train-000001.tar$"):
        list_colours(create_loader(shards))
    (shards / "val-000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"^no shard at .*val-000000\.tar$"):
        create_datasets(shards)


@pytest.mark.parametrize(
    "change",
    [
        {"train": [{"name": "../x.tar", "num_images": 1, "sha256": "0" * 64}]},
        {"train": 3},
        {"class_names": 5},
        {"preprocessing": {"x": 1}},
    ],
)
def test_strange_list_of_shards_is_one_sentence(shards: Path, change) -> None:
    contents = json.loads((shards / "shards.json").read_text())
    (shards / "shards.json").write_text(json.dumps({**contents, **change}))
    with pytest.raises(ValueError, match=r"shards/shards\.json is not what 'fasternet data pack' writes"):
        create_datasets(shards)
    (shards / "shards.json").write_text("[")
    with pytest.raises(ValueError, match=r"shards/shards\.json is not what 'fasternet data pack' writes"):
        create_datasets(shards)


def test_validation_pictures_are_a_data_set_like_any_other(shards: Path) -> None:
    validation = pickle.loads(pickle.dumps(create_validation_dataset(shards)))
    assert [path.as_posix() for path in validation.paths[:2]] == ["a/00.png", "a/02.png"]
    chosen = validation.select([4, 0])
    chosen.transform = read_colour
    assert [(int(image[0]), label) for image, label in (chosen[0], chosen[1])] == [(3, 1), (0, 0)]
    name = damage(shards / "val-000000.tar", 1)
    with pytest.raises(ImageError, match=f"cannot read {shards}/{name}: it is no picture"):
        validation.load(1)


# Pictures alone


def test_pictures_of_all_shards_are_dealt_once(shards: Path) -> None:
    name = damage(shards / "train-000000.tar")
    (shards / "notes.tar").write_bytes((shards / "val-000000.tar").read_bytes())  # not listed, not read
    shares = [dict(stream_shard_pictures(shards, rank, 3)) for rank in range(3)]
    assert sum(map(len, shares)) == len({*shares[0], *shares[1], *shares[2]}) == 46
    loaders = shares[0] | shares[1] | shares[2]
    with pytest.raises(ImageError, match=f"cannot read {shards}/{name}: "):
        loaders.pop(name)()
    assert all(load().getpixel((0, 0))[0] == int(Path(name).stem) for name, load in loaders.items())
    (shards / "shards.json").unlink()
    assert len(list(stream_shard_pictures(shards))) == 52
    with pytest.raises(FileNotFoundError, match=r"no shards in folder .*; looked for shards\.json and \*\.tar$"):
        next(stream_shard_pictures(shards.parent))


# Addresses


@pytest.fixture
def server(shards: Path, tmp_path: Path, monkeypatch):
    """Serve the shards; ``fail`` holds the numbers of the requests that break off in the middle."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_files, "RETRY_DELAYS_S", (0.0, 0.0))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append(self.path)
            if len(server.requests) not in server.fail:
                return super().do_GET()
            content = (shards / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:1000])

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(shards)))
    server.requests, server.fail = [], set()
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_shards_at_an_address_equal_local_ones(shards: Path, server) -> None:
    server.fail = {5, 6}
    assert list_parts(create_loader(server.address + "/")) == list_parts(create_loader(shards))
    assert dict(stream_shard_pictures(server.address, 1, 2)).keys() == dict(stream_shard_pictures(shards, 1, 2)).keys()


def test_validation_shards_are_fetched_once(shards: Path, server) -> None:
    for _ in range(2):
        validation = create_validation_dataset(server.address)
    assert [validation.read(i) for i in range(6)] == [create_validation_dataset(shards).read(i) for i in range(6)]
    assert server.requests.count("/val-000000.tar") == 1


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_damaged_shard_in_the_cache_is_fetched_again(shards: Path, server, tmp_path: Path, harm: str) -> None:
    create_validation_dataset(server.address)
    (path,) = (tmp_path / "cache").rglob("val-000000.tar")
    if harm == "cut":
        os.truncate(path, 700)
    else:
        damage(path)
    create_validation_dataset(server.address).load(0)
    assert path.read_bytes() == (shards / path.name).read_bytes()
    assert server.requests.count("/val-000000.tar") == 2


def test_broken_connection_is_one_sentence(shards: Path, server, tmp_path: Path) -> None:
    loader = create_loader(server.address)
    server.fail = range(1000)
    with pytest.raises(ConnectionError, match=rf"^cannot download {server.address}/train-\d+\.tar \([^\n]*\)$"):
        list_colours(loader)
    with pytest.raises(ConnectionError, match=r"^cannot download http://127\.0\.0\.1:1/shards\.json \([^\n]*\)$"):
        create_datasets("http://127.0.0.1:1")


def test_shard_that_differs_from_its_hash_is_refused(shards: Path, server) -> None:
    loader = create_loader(server.address)
    damage(shards / "train-000000.tar")
    with pytest.raises(ValueError, match=rf"^{server.address}/train-000000\.tar is not the file that shards\.json"):
        list_colours(loader)


def _open_validation(address: str, barrier, results) -> None:
    barrier.wait()
    results.put(len(create_validation_dataset(address)))


@pytest.mark.multiprocess
def test_processes_that_want_the_same_shards_wait_for_one(server) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_open_validation, args=(server.address, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [6, 6]
    for process in processes:
        process.join()
    assert server.requests.count("/val-000000.tar") == 1
