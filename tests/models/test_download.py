"""download: by URL with resume, and from the hub, against a server on this machine."""

import concurrent.futures
import hashlib
import socket
import subprocess
import sys

import pytest

from fasternet.models import download
from fasternet.models.download import download_from_hub, download_url

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WAY_OUT = r"refused.*: without a network, give a file \(checkpoint_path, or --checkpoint\)"
HUB_PATH = "/timm/fasternet_t0.in1k/resolve/main/model.safetensors"


@pytest.fixture
def url(server):
    server.files["/v1/weights.pth"] = CONTENT
    return f"{server.url}/v1/weights.pth"


@pytest.fixture
def closed_port(monkeypatch):
    """A port of this machine at which nobody listens."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_download_fetches_once_and_needs_no_network_again(server, url, tmp_path):
    path = download_url(url, sha256=SHA256, folder=tmp_path / "cache")
    assert path == tmp_path / "cache" / "weights.pth"
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert download_url(url, sha256=SHA256, folder=tmp_path / "cache") == path
    assert len(server.requests) == 1


def test_download_goes_to_the_cache_of_torch_hub(url, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert download_url(url) == tmp_path / "hub" / "checkpoints" / "weights.pth"


def test_interrupted_download_is_resumed(server, url, tmp_path):
    server.cut_after = 3000
    with pytest.raises(ConnectionError, match="broke off after 3000 of 10240 bytes"):
        download_url(url, folder=tmp_path)
    assert not (tmp_path / "weights.pth").exists()
    with pytest.raises(ConnectionError, match="broke off after 3000 of 7240 bytes"):
        download_url(url, folder=tmp_path)
    server.cut_after = None
    assert download_url(url, sha256=SHA256, folder=tmp_path).read_bytes() == CONTENT
    assert [asked for _, _, asked in server.requests] == [None, "bytes=3000-", "bytes=6000-"]


def test_download_starts_anew_where_the_server_ignores_the_range(server, url, tmp_path):
    server.knows_range = False
    (tmp_path / "weights.pth.part").write_bytes(b"other" * 100)
    assert download_url(url, folder=tmp_path).read_bytes() == CONTENT


def test_complete_part_is_taken_and_a_longer_one_is_not(server, url, tmp_path):
    part = tmp_path / "weights.pth.part"
    part.write_bytes(CONTENT)
    assert download_url(url, folder=tmp_path).read_bytes() == CONTENT
    (tmp_path / "weights.pth").unlink()
    part.write_bytes(CONTENT + b"of an older release")
    assert download_url(url, folder=tmp_path).read_bytes() == CONTENT
    assert [asked for _, _, asked in server.requests] == ["bytes=10240-", "bytes=10259-", None]


def test_download_with_another_hash_is_deleted(url, tmp_path):
    with pytest.raises(ValueError, match=f"weights.pth.part has SHA-256 {SHA256} instead of 0000") as caught:
        download_url(url, sha256="0" * 64, folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_many_that_want_the_same_file_fetch_it_once(server, url, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: download_url(url, sha256=SHA256, folder=tmp_path), range(8)))
    assert set(paths) == {tmp_path / "weights.pth"}
    assert paths[0].read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [paths[0]]
    assert len(server.requests) == 1


def test_process_that_holds_the_part_is_waited_for(server, url, tmp_path):
    """Another process is in the middle of the download; what it has written is not written twice."""
    part = tmp_path / "weights.pth.part"
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True)"
    )
    code += "; time.sleep(0.5); f.write(bytes(range(256)) * 20); f.flush()"
    with subprocess.Popen([sys.executable, "-c", code, part], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert download_url(url, sha256=SHA256, folder=tmp_path).read_bytes() == CONTENT
    assert [asked for _, _, asked in server.requests] == ["bytes=5120-"]


def test_bar_is_shown_on_a_terminal_alone(url, tmp_path, monkeypatch, capsys):
    download_url(url, folder=tmp_path / "a")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(download.sys.stderr, "isatty", lambda: True, raising=False)
    download_url(url, folder=tmp_path / "b")
    assert "weights.pth" in capsys.readouterr().err


def test_download_of_an_absent_file_says_so(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"cannot download http://127.*none.pth \(HTTP Error 404"):
        download_url(f"{server.url}/none.pth", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_download_without_a_network_is_one_sentence_with_the_way_out(closed_port, tmp_path):
    with pytest.raises(
        ConnectionError, match=r"refused.*: without a network, give a file \(checkpoint_path, or --checkpoint\)"
    ) as caught:
        download_url(f"http://127.0.0.1:{closed_port}/weights.pth", folder=tmp_path)
    assert "\n" not in str(caught.value)


def test_download_from_a_server_that_never_answers_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ConnectionError, match="timed out"):
        download_url(f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth", folder=tmp_path)


def test_hub_file_is_fetched_once_and_needs_no_network_again(hub, tmp_path):
    hub.files[HUB_PATH] = CONTENT
    path = download_from_hub("timm/fasternet_t0.in1k", "model.safetensors")
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path)
    num_requests = len(hub.requests)
    assert ("GET", HUB_PATH, None) in hub.requests
    hub.files.clear()
    assert download_from_hub("timm/fasternet_t0.in1k", "model.safetensors") == path
    assert len(hub.requests) == num_requests


def test_hub_file_with_another_hash_is_deleted_and_fetched_again(hub):
    hub.files[HUB_PATH] = CONTENT
    hub.stated = "0" * 64
    for _ in range(2):
        with pytest.raises(ValueError, match=f"model.safetensors has SHA-256 {SHA256} instead of 0000"):
            download_from_hub("timm/fasternet_t0.in1k", "model.safetensors")
    assert [method for method, _, _ in hub.requests].count("GET") == 2
    hub.stated = None
    assert download_from_hub("timm/fasternet_t0.in1k", "model.safetensors").read_bytes() == CONTENT


def test_hub_without_the_repository_says_so(hub):
    with pytest.raises(ConnectionError, match=r"cannot download timm/fasternet_t9/model.safetensors \(.*404"):
        download_from_hub("timm/fasternet_t9", "model.safetensors")


def test_hub_without_a_network_is_one_sentence_with_the_way_out(hub, closed_port, monkeypatch):
    from huggingface_hub import constants

    template = f"http://127.0.0.1:{closed_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(
        ConnectionError, match=r"refused.*: without a network, give a file \(checkpoint_path, or --checkpoint\)"
    ) as caught:
        download_from_hub("timm/fasternet_t0.in1k", "model.safetensors")
    assert "\n" not in str(caught.value)


def test_hub_in_offline_mode_says_which_variable_forbids_it(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        download_from_hub("timm/fasternet_t0.in1k", "model.safetensors")
    assert not hub.requests
