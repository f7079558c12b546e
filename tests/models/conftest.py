"""What the tests of the models share: a second, plain writing of the official network, and a server of files."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

TINY = {"width": 8, "depths": (1, 1, 2, 1), "head_width": 16, "num_classes": 5}


@pytest.fixture
def tiny() -> dict:
    """Fields of a FasterNet that is built and run in milliseconds."""
    return dict(TINY)


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    return _randomise


@pytest.fixture(scope="session")
def randomise_norms() -> Callable[..., nn.Module]:
    """Give BN statistics of their own, and leave the rest as it is."""

    def randomise(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return model

    return randomise


@pytest.fixture(scope="module")
def resnet18(randomise_norms: Callable[..., nn.Module]) -> nn.Module:
    """Return torchvision's, for five classes."""
    torch.manual_seed(0)
    return randomise_norms(torchvision.models.resnet18(num_classes=5)).eval()


@pytest.fixture
def difference() -> Callable[[Tensor, Tensor], float]:
    return lambda a, b: ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def official() -> SimpleNamespace:
    """The official network as a function of its state dict, and such state dicts."""
    return SimpleNamespace(create_state=_create_official_state, run=_run_official)


def _randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor seeded values that a wrong map would show, at a scale that keeps activations sane."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        tensor.copy_(_draw(key, tensor.shape, generator))
    return model.eval()


def _draw(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.randint(1, 1000, shape, generator=generator)
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5
    if key.endswith(("running_var", "weight", "layer_scale")):
        return torch.rand(shape, generator=generator) + 0.5
    return torch.randn(shape, generator=generator) * 0.2


def _create_official_state(
    width: int,
    depths: tuple[int, ...],
    *,
    head_width: int = 1280,
    num_classes: int = 1000,
    layer_scale: bool = False,
    backbone: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Write down every key of an official file with its shape; ``backbone`` has four norms instead of a head."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add_norm(key: str, channels: int) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{key}.{name}"] = (channels,)
        shapes[f"{key}.num_batches_tracked"] = ()

    shapes["patch_embed.proj.weight"] = (width, 3, 4, 4)
    add_norm("patch_embed.norm", width)
    for i, depth in enumerate(depths):
        c = width * 2**i
        if i > 0:
            shapes[f"stages.{2 * i - 1}.reduction.weight"] = (c, c // 2, 2, 2)
            add_norm(f"stages.{2 * i - 1}.norm", c)
        for j in range(depth):
            block = f"stages.{2 * i}.blocks.{j}"
            shapes[f"{block}.mlp.0.weight"] = (2 * c, c, 1, 1)
            add_norm(f"{block}.mlp.1", 2 * c)
            shapes[f"{block}.mlp.3.weight"] = (c, 2 * c, 1, 1)
            shapes[f"{block}.spatial_mixing.partial_conv3.weight"] = (c // 4, c // 4, 3, 3)
            if layer_scale:
                shapes[f"{block}.layer_scale"] = (c,)
        if backbone:
            add_norm(f"norm{2 * i}", c)
    if not backbone:
        shapes["avgpool_pre_head.1.weight"] = (head_width, 8 * width, 1, 1)
        shapes["head.weight"] = (num_classes, head_width)
        shapes["head.bias"] = (num_classes,)
    generator = torch.Generator().manual_seed(seed)
    return {key: _draw(key, shape, generator) for key, shape in shapes.items()}


def _run_official(
    state: dict[str, Tensor],
    x: Tensor,
    depths: tuple[int, ...],
    act: Callable[[Tensor], Tensor],
    training: bool = False,
) -> list[Tensor]:
    """Return the four stages' outputs, and the logits where the state has a head; ``training`` moves the statistics."""

    def norm(x: Tensor, key: str) -> Tensor:
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{key}.weight"], state[f"{key}.bias"], training, 0.1, 1e-5)

    def block(x: Tensor, key: str) -> Tensor:
        conv = state[f"{key}.spatial_mixing.partial_conv3.weight"]
        head, tail = x[:, : x.shape[1] // 4], x[:, x.shape[1] // 4 :]
        y = torch.cat((F.conv2d(head, conv, padding=1), tail), 1)
        y = act(norm(F.conv2d(y, state[f"{key}.mlp.0.weight"]), f"{key}.mlp.1"))
        y = F.conv2d(y, state[f"{key}.mlp.3.weight"])
        return x + y * state.get(f"{key}.layer_scale", torch.ones(())).reshape(-1, 1, 1)

    x = norm(F.conv2d(x, state["patch_embed.proj.weight"], stride=4), "patch_embed.norm")
    outputs = []
    for i, depth in enumerate(depths):
        if i > 0:
            x = norm(F.conv2d(x, state[f"stages.{2 * i - 1}.reduction.weight"], stride=2), f"stages.{2 * i - 1}.norm")
        for j in range(depth):
            x = block(x, f"stages.{2 * i}.blocks.{j}")
        outputs.append(norm(x, f"norm{2 * i}") if f"norm{2 * i}.weight" in state else x)
    if "head.weight" in state:
        x = act(F.conv2d(F.adaptive_avg_pool2d(x, 1), state["avgpool_pre_head.1.weight"])).flatten(1)
        outputs.append(F.linear(x, state["head.weight"], state["head.bias"]))
    return outputs


class FileServer(ThreadingHTTPServer):
    """Serves ``files`` (path to content) on 127.0.0.1, as well or as badly as its switches say.

    Attributes:
        requests: Of each request: method, path and the Range header.
        cut_after: Bytes of a body after which the connection breaks off.
        knows_range: Whether a Range header is answered with a part.
        hub: Whether a path is answered as the Hugging Face hub does: with the file's SHA-256 and a way to its content.
        stated: SHA-256 that the hub states instead of the true one.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut_after: int | None = None
        self.knows_range = True
        self.hub = False
        self.stated: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.command, self.path, asked))
        content = server.files.get(self.path)
        if content is None:
            self.start(404, 0)
            return
        status, start = 200, int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.knows_range else 0
        headers = {}
        if start >= len(content) > 0:
            self.start(416, 0, {"Content-Range": f"bytes */{len(content)}"})
            return
        if start:
            status, headers = 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if server.hub:
            etag = server.stated or hashlib.sha256(content).hexdigest()
            headers |= {"X-Repo-Commit": "c" * 40, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        body = content[start:]
        self.start(status, len(body), headers)
        if with_body:
            self.wfile.write(body[: server.cut_after])

    def start(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path) -> FileServer:
    """The server in the place of the Hugging Face hub, whose cache is a temporary folder."""
    from huggingface_hub import constants

    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"), raising=False)
    server.hub = True
    return server
