"""`push`, and hub ids with a revision, beside a stand-in for a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sarqc
from sarqc.entrypoints.push import push
from sarqc.errors import ArgumentError, CheckpointError, ModelError
from sarqc.model.hub import is_hub_id, locate, split_revision
from tests.support import tiny
from tests.support.hub import TOKEN, Hub, hub

SCRIPT = """
import json, sys
from pathlib import Path
import sarqc
from sarqc.entrypoints.inspect import inspect
from sarqc.entrypoints.verify import verify

out = Path(sys.argv[1])
quick = dict(method="rtn", group_size=32)
made = sarqc.quantize("me/base@v1", out / "made", **quick)
try:
    sarqc.push(made.out, "me/made", private=True, revision="w4")
except sarqc.SarqcError as error:
    print(str(error))
print(sarqc.push(made.out, "me/made", private=True, revision="w4"))
text = out / "text"
text.write_text("One and one are two. " * 60)
verified = verify("me/made@w4", against="me/base@v1")
converted = sarqc.convert("me/made@w4", out / "converted", format="gptq")
print(json.dumps({
    "sound": verified.sound and verified.manifest and verified.errors != {},
    "kinds": len(sarqc.estimate("me/base@v1", out / "other", **quick).kinds),
    "linears": inspect("me/made@w4")["quantized_linears"],
    "generates": sarqc.generate("me/made@w4", "One", max_new_tokens=2) != "One",
    "perplexity": sarqc.evaluate(
        "me/made@w4", text=str(text), seqlen=32, max_windows=1).perplexity > 1,
}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    base = tiny.save("llama", tmp_path_factory.mktemp("push") / "base")
    return base, sarqc.quantize(base, base.parent / "made", method="rtn", group_size=32).out


def run(server: Hub, home: Path, *words: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": server.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | own
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.slow
def test_a_run_from_a_hub_to_a_hub(folders, tmp_path):
    """Every place that takes a model takes a revision; an upload that broke off goes on where it was."""
    with hub() as server:
        server.branches["me/base"] = {"main": {"config.json": b"{}"}, "v1": content(folders[0])}
        server.private["me/base"] = False
        server.fail = 1
        done = run(server, tmp_path / "home", "-c", SCRIPT, str(tmp_path))
        assert done.returncode == 0, done.stderr
        broken, address, message = done.stdout.strip().splitlines()[-3:]
        assert "was not uploaded" in broken or "the hub refused 'me/made'" in broken
        assert address.startswith(f"{server.address}/me/made/commit/")
        kinds = json.loads(message)["kinds"]
        assert json.loads(message) == {
            "sound": True,
            "kinds": kinds,
            "linears": 14,
            "generates": True,
            "perplexity": True,
        }
        there = server.branches["me/made"]
        assert there["main"] == {} and server.private["me/made"]
        assert there["w4"] == content(tmp_path / "made")
        assert {"README.md", "report.json", "report.html", "sarqc-manifest.json"} <= there["w4"].keys()
        assert "base_model: me/base\n" in there["w4"]["README.md"].decode()
        assert "base_model_relation: quantized\n" in there["w4"]["README.md"].decode()
        sent = [one for one in server.asked if one.startswith("PUT")]
        assert len(sent) <= len(set(sent)) + 1  # the one that failed was sent twice, no other


@pytest.mark.slow
def test_a_wrong_token_is_one_line(folders, tmp_path):
    with hub() as server:
        done = run(server, tmp_path, "-m", "sarqc", "push", str(folders[1]), "me/made", token="hf_wrong")
        assert done.returncode == 2 and server.branches == {}
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith(
            "sarqc: the hub does not let you write to 'me/made' (HTTP 401): log in with `hf auth login`"
        )


def test_what_is_not_whole_is_not_uploaded(folders, tmp_path, monkeypatch):
    def no_hub(*_: object) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi", no_hub)
    files = content(folders[1])
    weights = bytearray(files["model.safetensors"])
    weights[-3] ^= 4
    cases = {
        "changed": files | {"model.safetensors": bytes(weights)},
        "cut": files | {"model.safetensors": files["model.safetensors"][:-8]},
        "unfinished": {name: data for name, data in files.items() if name != "config.json"},
    }
    for name, there in cases.items():
        (tmp_path / name).mkdir()
        for file, data in there.items():
            (tmp_path / name / file).write_bytes(data)
        with pytest.raises(CheckpointError, match="nothing was uploaded"):
            push(tmp_path / name, "me/made")
    with pytest.raises(CheckpointError, match="has no manifest"):
        push(folders[0], "me/made")
    for repo in ("made", "me/made@w4", "a/b/c"):
        with pytest.raises(ArgumentError, match="give OWNER/NAME"):
            push(folders[1], repo)
    with pytest.raises(ArgumentError, match="'me/other' is not a folder"):  # nothing is fetched to be uploaded again
        push("me/other", "me/made")


def test_no_hub_at_all_is_one_line(folders, monkeypatch):
    class Gone:
        def create_repo(self, *_: object, **__: object) -> None:
            raise RuntimeError("\ncannot connect\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi", Gone)
    with pytest.raises(
        ModelError, match=r"^'me/made' was not uploaded: cannot connect more; the same command resumes$"
    ):
        push(folders[1], "me/made")


def test_a_revision_is_split_off_and_fetched(monkeypatch, tmp_path):
    fetched = []

    def snapshot_download(repo, revision=None, **_):
        fetched.append((repo, revision))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in ("me/made@w4", "me/made@refs/pr/3", "me/made"):
        assert is_hub_id(name)
        locate(name)
    assert fetched == [split_revision(name) for name in ("me/made@w4", "me/made@refs/pr/3", "me/made")]
    assert fetched[1] == ("me/made", "refs/pr/3")
    for name in ("me/made@", "me@w4/made", "made@w4", "me/made@../up", "me/made@a@b"):
        assert not is_hub_id(name)
        with pytest.raises(ModelError, match="OWNER/NAME@REVISION"):
            locate(name)
