import pytest

from sarqc.errors import ModelError
from sarqc.model.hub import locate


def test_a_folder_is_itself(tmp_path):
    assert locate(tmp_path) == tmp_path and locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../up", "owner/", "spa ce/name"])
def test_what_is_neither_folder_nor_hub_id_is_said_so(name):
    with pytest.raises(ModelError, match="no such folder"):
        locate(name)


def test_a_hub_id_without_a_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"owner/name.*hub") as caught:
        locate("owner/name")
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_model(tmp_path):
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(ModelError, match="is a file"):
        locate(path)


def test_of_a_hub_everything_that_is_used_is_fetched_and_nothing_twice(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    there = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "qwen.tiktoken", "NOTICE", "USE_POLICY.md", "LICENSE", "chat_template.jinja",
    ]  # fmt: skip
    twice = ["consolidated.safetensors", "consolidated.safetensors.index.json", "original/params.json"]
    twice += ["original/model.safetensors", "fp32/model.safetensors", "pytorch_model.bin", "model.py"]
    fetched = []

    def snapshot_download(hub_id, revision, **patterns):
        fetched.extend(filter_repo_objects([*there, *twice], **patterns))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    locate("owner/name")
    assert fetched == there
