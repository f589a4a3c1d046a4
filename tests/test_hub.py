"""One layer of a hub model costs one layer: against a stand-in for the hub on this machine."""

import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from test_llmblock import store
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmblock import LLMBlock, UserError

LAYER = 4 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256)  # bytes
WEIGHTS = (".safetensors", ".bin")
COMMIT = "c0ffee" * 6 + "c0de"


class Hub(ThreadingHTTPServer):
    """Serves folder/ORG/NAME/FILE at /ORG/NAME/resolve/REVISION/FILE, weights by way of a CDN."""

    sent = 0  # bytes of all answers
    ranges = True  # False: a server that answers every range with the whole file
    large = 0  # answers so far of more than 100 kB
    breaks = range(0)  # which of them break off in the middle
    gate = token = None  # status that a gated repository answers without the token

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    def head(self, status, length=0, **headers):
        self.send_response(status)
        headers |= dict(Content_Length=length, X_Repo_Commit=COMMIT)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_GET(self):
        hub, cdn = self.server, self.path.startswith("/cdn/")
        if self.path.startswith("/api/models/"):
            return self.list_files()
        org, name, _, _, file = self.path.removeprefix("/cdn").strip("/").split("/", 4)
        path = hub.folder / org / name / file
        token = self.headers.get("Authorization")
        if not path.parent.is_dir():
            return self.head(404, X_Error_Code="RepoNotFound")
        if cdn and token:  # tokens are the hub's business alone
            return self.head(400)
        if hub.gate and not cdn and token != f"Bearer {hub.token}":
            return self.head(hub.gate, X_Error_Code="GatedRepo")
        if not path.is_file():
            return self.head(404, X_Error_Code="EntryNotFound")
        if self.command == "GET" and not cdn and file.endswith(WEIGHTS):
            return self.head(302, Location=f"http://localhost:{hub.server_port}/cdn{self.path}")
        self.send_file(path)

    do_HEAD = do_GET

    def send_file(self, path):
        hub, data, status = self.server, path.read_bytes(), 200
        headers = dict(ETag=f'"{path.name}-{len(data)}"')
        span = self.headers.get("Range")
        if span and hub.ranges:
            start, _, last = span.removeprefix("bytes=").partition("-")
            status, stop = 206, int(last or len(data)) + 1
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[int(start) : stop]
        self.head(status, len(data), **headers)
        if self.command == "GET":
            hub.large += len(data) > 100_000
            if len(data) > 100_000 and hub.large in hub.breaks:
                data = data[: len(data) // 2]
            hub.sent += len(data)
            self.wfile.write(data)

    def list_files(self):
        org, name = self.path.split("/")[3:5]
        files = list((self.server.folder / org / name).iterdir())
        body = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in files]}
        if "/tree/" in self.path:
            body = [{"type": "file", "path": p.name, "size": 1, "oid": "0"} for p in files]
        body = json.dumps(body).encode()
        self.head(200, len(body), Content_Type="application/json")
        self.wfile.write(body)


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """One LLM of 8 layers, 21 MB, stored in every way."""
    folder = tmp_path_factory.mktemp("repos")
    config = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8, vocab_size=500)
    config = CONFIG_MAPPING["llama"](**config, num_attention_heads=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "org/one")
    for name, suffix in (("shards", ".safetensors"), ("bins", ".bin")):
        shutil.copytree(folder / "org/one", folder / "org" / name)
        store(folder / "org" / name, suffix, shards=2)
    return folder


@pytest.fixture
def hub(repos, tmp_path, monkeypatch):
    hub = Hub(repos)
    url = f"http://127.0.0.1:{hub.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = dict(HUGGINGFACE_CO_URL_TEMPLATE=template, ENDPOINT=url)
    settings |= dict(HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE=False)
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
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
def test_only_the_layers_bytes_travel_and_only_once(name, hub, repos, tmp_path):
    for layer in (-1, 0):
        hub.sent = 0
        check(repos, name, layers=layer)
        assert LAYER <= hub.sent < LAYER + 250_000
    hub.sent = 0
    check(repos, name)
    snapshot = next(tmp_path.glob("*/snapshots/*"))
    for file in (repos / name).iterdir():  # as if all of it had been fetched before
        if not (snapshot / file.name).exists():
            (snapshot / file.name).symlink_to(file)
    check(repos, name, layers=3)
    assert hub.sent == 0  # only asked whether the model has changed


def test_offline(hub, repos, tmp_path, monkeypatch):
    check(repos)
    hub.close()  # nobody answers
    check(repos)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check(repos)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
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


@pytest.mark.parametrize("name", ["org/one", "org/bins"])
def test_without_ranges_or_safetensors_the_whole_model_is_fetched(name, hub, repos, capsys):
    hub.ranges = name == "org/bins"
    check(repos, name)
    assert "fetching the whole model" in capsys.readouterr().out
    hub.sent = 0
    check(repos, name)
    assert hub.sent == 0


def write_half(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError("No space left on device")


def test_gated_unknown_and_a_full_disk(hub, repos, monkeypatch):
    assert "RepositoryNotFoundError" in fails("org/unknown")
    hub.token = "hf_friend"
    for hub.gate in (401, 403):
        assert "GatedRepoError" in fails()
    monkeypatch.setenv("HF_TOKEN", "hf_friend")
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_bytes", write_half)
        assert "No space left" in fails()
    check(repos)  # what was written is not taken for the layer
