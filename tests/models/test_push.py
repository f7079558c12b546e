"""push: a model folder goes to the hub byte by byte, against a stub of the hub on this machine."""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import typer
from typer.testing import CliRunner

from fasternet.cli.push import push as push_command
from fasternet.models import create_model, save_checkpoint
from fasternet.models.push import push_folder

TOKEN = "hf_" + "a" * 34

# The hub's client hands its files to its HTTP library in a way that the library is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class HubStub(BaseHTTPRequestHandler):
    """The hub's upload: create, preupload, LFS batch, PUT, verify, commit. ``server.committed`` is the repository."""

    def answer(self, document: object, status: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def do_GET(self) -> None:
        self.server.requests.append(("GET", self.path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid token"}, 401)
            return
        self.answer({"id": "me/flowers", "private": self.server.private, "sha": "0" * 40, "siblings": [], "tags": []})

    def do_PUT(self) -> None:
        content = self.read()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        server, body, url = self.server, self.read(), f"http://{self.headers['Host']}"
        server.requests.append(("POST", self.path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid token"}, 401)
        elif self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            self.answer({"url": f"{url}/me/flowers"}, 409 if server.exists else 200)
        elif self.path.startswith("/api/models/me/flowers/preupload/"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in files]
            pairs = zip(files, modes, strict=True)
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in pairs]})
        elif self.path == "/me/flowers.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{url}/put/{item['oid']}"}, "verify": {"href": f"{url}/verify"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif self.path == "/verify":
            asked = json.loads(body)
            self.answer({}, 200 if len(server.large.get(asked["oid"], b"")) == asked["size"] else 404)
        elif self.path.startswith("/api/models/me/flowers/commit/"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.committed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.committed[value["path"]] = server.large[value["oid"]]
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{url}/me/flowers/commit/1"})
        else:  # the check of the card's head
            self.answer({"errors": [], "warnings": []})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), HubStub)
    server.requests, server.created, server.committed, server.large = [], [], {}, {}
    server.private, server.exists = False, False
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"), raising=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tiny, tmp_path):
    """A model folder among what training leaves beside it."""
    folder = tmp_path / "run" / "best"
    save_checkpoint(folder, create_model("fasternet_t0", **tiny), name="fasternet_t0")
    for name in ("state.pt", "state-1.pt", "log.jsonl", "notes.txt"):
        (folder / name).write_text("stays here")
    (folder.parent / "log.jsonl").write_text("stays here")
    return folder


def test_uploaded_bytes_are_those_of_the_files(hub, folder):
    assert push_folder(folder, "me/flowers") == f"{hub.url}/me/flowers"
    assert set(hub.committed) == {"model.safetensors", "config.json", "README.md"}
    for name in ("model.safetensors", "config.json"):
        assert hub.committed[name] == (folder / name).read_bytes()
    assert hub.created[0]["name"] == "flowers"
    assert not {"private", "visibility"} & set(hub.created[0])


def test_card_on_the_hub_names_its_repository_in_place_of_the_folder(hub, folder):
    own = (folder / "README.md").read_text()
    push_folder(folder, "me/flowers")
    card = hub.committed["README.md"].decode()
    fetch = "hf download me/flowers --local-dir flowers\nfasternet predict picture.jpg --checkpoint flowers\n"
    assert f"```sh\n{fetch}```\n" in card
    assert 'timm.create_model("hf-hub:me/flowers", pretrained=True)' in card
    assert "FOLDER" not in card
    assert (folder / "README.md").read_text() == own


def test_folder_without_a_card_goes_too(hub, folder):
    (folder / "README.md").unlink()
    (folder / "LICENSE").write_text("do as you like")
    push_folder(folder, "me/flowers")
    assert set(hub.committed) == {"model.safetensors", "config.json", "LICENSE"}


def test_run_folder_stands_for_its_best_and_the_license_is_kept(hub, folder):
    result = CliRunner().invoke(
        create_app(), [str(folder.parent), "me/flowers", "--license", "cc-by-4.0"], catch_exceptions=False
    )
    assert (result.exit_code, result.stdout) == (0, f"{hub.url}/me/flowers\n")
    document = json.loads(hub.committed["config.json"])
    assert document["fasternet"]["license"] == document["pretrained_cfg"]["license"] == "cc-by-4.0"
    assert hub.committed["README.md"].startswith(b"---\nlicense: cc-by-4.0\nlibrary_name: timm\n")
    assert (folder / "README.md").read_text().startswith("---\nlicense: cc-by-4.0\n")
    push_folder(folder, "me/flowers", license="other")
    assert hub.committed["README.md"].count(b"license:") == 1


def test_private_is_asked_for_and_a_public_repository_is_refused(hub, folder):
    hub.private = True
    push_folder(folder, "me/flowers", private=True)
    asked = hub.created[0]  # the word differs between releases of the hub's client
    assert asked.get("private") is True or asked["visibility"] == "private"
    hub.private, hub.exists, hub.committed = False, True, {}
    with pytest.raises(ValueError, match="me/flowers exists and is public"):
        push_folder(folder, "me/flowers", private=True)
    assert not hub.committed


def test_what_is_no_model_folder_is_refused_before_the_hub_is_asked(hub, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no model folder: it holds no model.safetensors"):
        push_folder(tmp_path, "me/flowers")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        push_folder(damaged, "me/flowers")
    with pytest.raises(ValueError, match="'a b'"):
        push_folder(folder, "a b")
    with pytest.raises(ValueError, match="license 'My own' must be written as the hub does"):
        push_folder(folder, "me/flowers", license="My own")
    assert not hub.requests


def test_no_token_and_a_refused_one_are_one_clear_sentence(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionError, match=r"^the hub refuses the token for me/flowers \(.*401") as caught:
        push_folder(folder, "me/flowers")
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match="with a token only: run `hf auth login`, or set HF_TOKEN"):
        push_folder(folder, "me/flowers")


def test_hub_that_cannot_be_reached_is_one_clear_sentence(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"^cannot push to me/flowers \(.*refused.*\)$"):
        push_folder(folder, "me/flowers")


def create_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(push_command)
    return app
