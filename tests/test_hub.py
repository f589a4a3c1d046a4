"""One layer of a hub model costs one layer: against a stand-in for the hub on this machine.

python -m pytest tests/test_hub.py -q
"""

import errno
import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from llmblock import LLMBlock, UserError  # noqa: E402

LAYER = 4 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256)  # bytes
FEW = 1.1 * LAYER + 200_000
WEIGHTS = (".safetensors", ".bin")
COMMIT = "c0ffee" * 6 + "c0de"


class Hub(ThreadingHTTPServer):
    """Serves folder/ORG/NAME/FILE at /ORG/NAME/resolve/REVISION/FILE, weights by way of a CDN."""

    daemon_threads = True
    ranges = True  # False: a server that answers every range with the whole file
    large = 0  # answers so far of more than 100 kB
    breaks = range(0)  # which of them break off in the middle
    gate = token = None  # status that a gated repository answers without the token

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.sent = folder, Counter()  # body bytes by file name
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def weights_sent(self):
        return sum(n for name, n in self.sent.items() if name.endswith(WEIGHTS))

    def close(self):
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def head(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Connection", "close")  # so that a closed hub is silent at once
        self.end_headers()

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, cdn = self.server, self.path.startswith("/cdn/")
        if self.path.startswith("/api/models/"):
            return self.list_files()
        org, name, _, _, file = self.path.removeprefix("/cdn").strip("/").split("/", 4)
        path = hub.folder / org / name / file
        authorization = self.headers.get("Authorization")
        if not path.parent.is_dir():
            return self.head(404, X_Error_Code="RepoNotFound", Content_Length=0)
        if cdn and authorization:  # tokens are the hub's business alone
            return self.head(400, Content_Length=0)
        if hub.gate and not cdn and authorization != f"Bearer {hub.token}":
            return self.head(hub.gate, X_Error_Code="GatedRepo", Content_Length=0)
        if not path.is_file():
            return self.head(404, X_Error_Code="EntryNotFound", Content_Length=0)
        if self.command == "GET" and not cdn and file.endswith(WEIGHTS):
            location = f"http://localhost:{hub.server_port}/cdn{self.path}"
            return self.head(302, Location=location, Content_Length=0)

        size = path.stat().st_size
        start, stop, status, extra = 0, size, 200, {}
        if (span := self.headers.get("Range")) and hub.ranges:
            start, _, last = span.removeprefix("bytes=").partition("-")
            start, stop, status = int(start), min(size, int(last or size) + 1), 206
            extra = dict(Content_Range=f"bytes {start}-{stop - 1}/{size}")
        self.head(status, Content_Length=stop - start, ETag=f'"{file}-{size}"', **extra)
        if self.command == "GET":
            if stop - start > 100_000:
                hub.large += 1
                if hub.large in hub.breaks:
                    stop = (start + stop) // 2
            self.send(path, start, stop)

    def list_files(self):
        org, name = self.path.split("/")[3:5]
        files = sorted((self.server.folder / org / name).iterdir())
        body = {"id": f"{org}/{name}", "sha": COMMIT}
        body["siblings"] = [{"rfilename": p.name} for p in files]
        if "/tree/" in self.path:
            sizes = [{"path": p.name, "size": p.stat().st_size} for p in files]
            body = [{"type": "file", "oid": "0" * 40, **file} for file in sizes]
        body = json.dumps(body).encode()
        self.head(200, Content_Type="application/json", Content_Length=len(body))
        self.wfile.write(body)

    def send(self, path, start, stop):
        with open(path, "rb") as f:
            f.seek(start)
            while piece := f.read(min(1 << 16, stop - f.tell())):
                try:
                    self.wfile.write(piece)
                except OSError:  # the client has heard enough
                    return
                self.server.sent[path.name] += len(piece)


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """One LLM of 8 layers, 21 MB, stored in every way."""
    folder, tensors = tmp_path_factory.mktemp("repos"), None
    config = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8, vocab_size=500)
    config = CONFIG_MAPPING["llama"](**config, num_attention_heads=4)
    for name in ("one", "shards", "bins"):
        repo = folder / "org" / name
        if tensors is None:
            AutoModelForCausalLM.from_config(config).save_pretrained(repo)
            tensors = load_file(repo / "model.safetensors")
            continue
        config.save_pretrained(repo)
        if name == "shards":  # part the layer's tensors
            index = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(tensors)}
            save, path = save_file, repo / "model.safetensors.index.json"
        else:
            index = {n: f"pytorch_model-{int('layers.7.' in n)}.bin" for n in tensors}
            save, path = torch.save, repo / "pytorch_model.bin.index.json"
        for file in set(index.values()):
            save({n: t for n, t in tensors.items() if index[n] == file}, repo / file)
        path.write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture
def hub(repos, tmp_path, monkeypatch):
    torch.set_num_threads(1)  # more would only wait for each other
    hub = Hub(repos)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    yield hub
    hub.close()


def check(repos, name="org/one", **args):
    """The block of a hub's LLM is the block of the same files on disk, bit for bit."""
    x = torch.randn(2, 5, 32)
    block, local = LLMBlock(name, 32, **args), LLMBlock(repos / "org/one", 32, **args)
    assert torch.equal(block(x), local(x))
    assert block.record["hash"] == local.record["hash"]


def fails(name="org/one"):
    with pytest.raises(UserError, match=name) as e:
        LLMBlock(name, 32)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", ["org/one", "org/shards"])
def test_only_the_layers_bytes_travel_and_only_once(name, hub, repos):
    check(repos, name)
    assert LAYER <= hub.weights_sent() < FEW
    hub.sent.clear()
    check(repos, name)
    assert not hub.sent  # only asked whether the model has changed
    check(repos, name, layers=0)
    assert LAYER <= hub.weights_sent() < FEW


def test_a_model_in_the_cache_is_not_fetched_again(hub, repos, tmp_path):
    check(repos)
    snapshot = next(tmp_path.glob("*/snapshots/*"))
    (snapshot / "model.safetensors").symlink_to(repos / "org/one/model.safetensors")
    hub.sent.clear()
    check(repos, layers=3)
    assert hub.weights_sent() == 0


def test_offline(hub, repos, tmp_path, monkeypatch):
    check(repos)
    hub.close()
    check(repos)  # nobody answers
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check(repos)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert "LocalEntryNotFoundError" in fails()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "LocalEntryNotFoundError" in fails()


@pytest.mark.parametrize("name", ["org/one", "org/shards"])
def test_connections_that_break_off(name, hub, repos, tmp_path):
    hub.breaks = [2]  # once: asks again
    check(repos, name)
    assert hub.large > hub.breaks[0]
    for path in tmp_path.glob("*/snapshots/*/llmblock*"):
        path.unlink()
    hub.large, hub.breaks = 0, range(1, 1000)  # for good
    assert "RemoteProtocolError" in fails(name)
    assert not list(tmp_path.glob("*/snapshots/*/llmblock*.safetensors"))  # no half file
    hub.breaks = []
    check(repos, name)


def test_a_full_disk(hub, repos, tmp_path, monkeypatch):
    def write(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    assert "No space left" in fails()


@pytest.mark.parametrize("name", ["org/one", "org/bins"])
def test_without_ranges_or_safetensors_the_whole_model_is_fetched(name, hub, repos, capsys):
    hub.ranges = name == "org/bins"
    check(repos, name)
    assert "fetching the whole model" in capsys.readouterr().out
    hub.sent.clear()
    check(repos, name)
    assert hub.weights_sent() == 0


@pytest.mark.parametrize("status", [401, 403])
def test_gated_and_unknown_repositories(status, hub, repos, monkeypatch):
    assert "RepositoryNotFoundError" in fails("org/unknown")
    hub.gate, hub.token = status, "hf_friend"
    assert "GatedRepoError" in fails()
    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    check(repos)
