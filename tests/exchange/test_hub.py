"""To and from the Hugging Face hub: against a server of its documented calls, and a cache in its layout."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants

import tools.export
from common import hub
from common.config import ConfigError
from common.exchange import load_backbone, manifest
from common.exchange.export import Exported
from common.exchange.formats import safetensors
from common.exchange.formats import timm as timm_folder
from common.exchange.handed import hand
from common.exchange.proof import Proof
from common.run import Run
from common.trained import load_trained
from tests import tiny

TOKEN = "hf_" + "secret" * 6
COMMIT = "5" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface.co answers when a folder is uploaded; what it gets stands in ``server.files``."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.calls.append(f"{self.command} {path}")
        status, said = self._said(path, body)
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def _said(self, path, body):
        if path.startswith("/put/"):
            self.server.blobs[path[5:]] = body
            return 200, {}
        if self.server.refuses or self.headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        place = f"http://{self.headers['Host']}"
        if path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return 200, {"url": f"{place}/me/net"}
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [
                {**each, "actions": {"upload": {"href": f"{place}/put/{each['oid']}"}}} for each in objects]}
        if "/preupload/" in path:
            return 200, {"files": [{"path": each["path"], "shouldIgnore": False, "uploadMode":
                                    "lfs" if each["path"].endswith(".safetensors") else "regular"}
                                   for each in json.loads(body)["files"]]}
        if "/commit/" in path:
            self._commit(body)
            return 200, {"commitUrl": f"{place}/me/net/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        return 200, {"id": "me/net", "private": self.server.private, "errors": [], "warnings": []}

    def _commit(self, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]


@pytest.fixture
def server(monkeypatch):
    found = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    found.calls, found.made, found.blobs, found.files = [], [], {}, {}
    found.refuses, found.private = False, False
    threading.Thread(target=found.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{found.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)         # what HF_ENDPOINT sets when the library is imported
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ten steps with a backbone that timm knows."""
    folder = tmp_path_factory.mktemp("run")
    encoder = {"name": "common.backbones.encoder", "arch": "resnet10t", "dim": 16, "stem": "imagenet"}
    method = {**tiny.METHODS["instdisc"], "encoder": encoder}
    Run(tiny.settings(tiny.photos(folder / "photos", 16), folder / "run", "instdisc", method=method, views={"size": 32},
                      train={"epochs": 1}, evaluate={"protocols": []})).train()
    return folder / "run"


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """Two formats, written without their proof, which takes fresh processes; ``done``: as the tool would have them."""
    out, handed, done = tmp_path_factory.mktemp("out"), hand(load_trained(run)), []
    for format in (timm_folder.FORMAT, safetensors.FORMAT):
        (folder := out / format.name).mkdir()
        format.write(folder, handed)
        (folder / "README.md").write_text("---\nlicense: unknown\n---\n")
        manifest.write(folder, {"format": format.name})
        done.append(Exported(folder, format, handed, Proof(0, 1, (), ())))
    return {"timm": out / "timm", "safetensors": out / "safetensors", "done": done}


def cached(root: Path, name: str, files: dict[str, bytes], commit: str = COMMIT) -> None:
    """A repository as the hub's cache holds it: refs/main, snapshots/COMMIT (huggingface.co/docs, "Manage cache")."""
    place = root / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for file, content in files.items():
        path = place / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_sent_whole(server, exports):
    said = hub.push(exports["timm"], "me/net")
    assert server.files == contents(exports["timm"])
    assert server.made == [{"name": "net", "organization": "me", "visibility": "public"}]
    assert said.endswith("/me/net")


def test_a_private_repository_is_private(server, exports):
    server.private = True
    hub.push(exports["timm"], "me/net", private=True)
    assert server.made[0]["visibility"] == "private" and server.files


def test_nothing_private_goes_to_a_repository_that_is_public_already(server, exports):
    with pytest.raises(ConfigError, match="there already, and public. Nothing was sent"):
        hub.push(exports["timm"], "me/net", private=True)
    assert not server.files and not server.blobs


def test_a_refusal_is_explained_and_never_names_the_token(server, exports):
    server.refuses = True
    with pytest.raises(ConfigError, match="hf auth login") as found:
        hub.push(exports["timm"], "me/net")
    assert TOKEN not in f"{found.value}{found.value.__cause__}"


@pytest.mark.parametrize("name", ["net", "me/net/file", "me/net@main", "a b/c", ""])
def test_a_name_that_is_none_is_refused_before_anything_is_sent(server, exports, name):
    with pytest.raises(ConfigError, match="Give USER/NAME"):
        hub.push(exports["timm"], name)
    assert not server.calls


def test_the_tool_sends_what_it_is_told_to_and_nothing_without_the_flag(server, exports, monkeypatch, capsys):
    monkeypatch.setattr(tools.export, "_verify", lambda *given: exports["done"][:1])         # takes a fresh process
    arguments = ["--verify", str(exports["timm"])]
    assert tools.export.main(arguments) == 0
    assert not server.calls
    assert tools.export.main([*arguments, "--push-to-hub", "me/net"]) == 0
    assert server.files == contents(exports["timm"])
    sent = len(server.calls)
    (exports["timm"] / ".env").write_text(TOKEN)
    assert tools.export.main([*arguments, "--push-to-hub", "me/net"]) == 2
    (exports["timm"] / ".env").unlink()
    monkeypatch.setattr(tools.export, "_verify", lambda *given: exports["done"])
    assert tools.export.main([*arguments, "--push-to-hub", "me/net"]) != 0
    assert len(server.calls) == sent
    said = capsys.readouterr()
    assert "sent to http://127.0.0.1" in said.out
    assert TOKEN not in said.out + said.err


@pytest.mark.parametrize("arguments", [
    ["--checkpoint", "x", "--format", "timm", "--out", "y", "--private"],
    ["--checkpoint", "x", "--format", "timm", "onnx", "--out", "y", "--push-to-hub", "me/net"]])
def test_half_a_command_is_refused(arguments):
    with pytest.raises(SystemExit):
        tools.export.parse(arguments)


def test_timm_loads_what_was_sent_from_the_hubs_cache(server, exports, cache):
    constants.HF_HUB_OFFLINE = False
    hub.push(exports["timm"], "me/net")
    cached(cache, "me/net", server.files)
    constants.HF_HUB_OFFLINE = True
    model = timm.create_model("hf-hub:me/net", pretrained=True, cache_dir=str(cache)).eval()
    again = timm.create_model(f"local-dir:{exports['timm']}", pretrained=True).eval()
    images_BcHW = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images_BcHW), again(images_BcHW))


def test_a_folder_for_timm_claims_nothing_of_timms_own_weights(exports):
    """Theirs of this name are of ImageNet, and Apache-2.0."""
    said = json.loads((exports["timm"] / "config.json").read_text())
    assert not {"tag", "license", "origin_url", "url", "hf_hub_id"} & said["pretrained_cfg"].keys()
    assert timm.get_pretrained_cfg("resnet10t").license == "apache-2.0"


def test_a_backbone_of_ours_is_loaded_by_its_address(exports, cache):
    cached(cache, "me/net", contents(exports["safetensors"]))
    images_BcHW = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_backbone("hf-hub:me/net")(images_BcHW), load_backbone(exports["safetensors"])(images_BcHW))
    assert hub.local(f"hf-hub:me/net@{COMMIT}") == hub.local("hf-hub:me/net")


def test_a_checkpoint_is_opened_by_its_address(run, cache):
    file = load_trained(run).file
    cached(cache, "me/net", {"weights/last.pt": file.read_bytes()})
    assert load_trained("hf-hub:me/net/weights/last.pt").sha256() == load_trained(run).sha256()


@pytest.mark.parametrize("address", ["hf-hub:me/none", "hf-hub:me/net/none.pt"])
def test_what_is_not_there_is_said_to_be_so(cache, address):
    cached(cache, "me/net", {"config.json": b"{}"})
    with pytest.raises(ConfigError, match=f"{address}.*(HF_HUB_OFFLINE|no such file)"):
        hub.local(address)


@pytest.mark.parametrize("address", ["hf-hub:", "hf-hub:net", "hf-hub:me/", "hf-hub:me/net@",
                                     "hf-hub:../../etc/passwd@", "hf-hub:me/net/../../x", "hf-hub:me/net//etc/x"])
def test_what_is_no_address_is_refused(cache, address):
    with pytest.raises(ConfigError, match="hf-hub:USER/NAME|no name that the hub allows"):
        hub.local(address)


def test_a_path_is_left_as_it_is():
    assert hub.local("runs/demo") == Path("runs/demo")


def test_no_program_and_no_pickle_comes_down_with_a_folder():
    from fnmatch import fnmatch

    names = ["load.py", "weights.pth", "model.pkl", "pytorch_model.bin", "checkpoint.pth.tar"]
    assert not [name for name in names for pattern in hub.PULLED if fnmatch(name, pattern)]
