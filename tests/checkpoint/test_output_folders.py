"""atomic_folder, check_existing and check_overlap: an output is whole or not there, and never eats its source."""

from pathlib import Path

import pytest

from sarqc.checkpoint import folders
from sarqc.checkpoint.folders import atomic_folder, check_existing, check_overlap
from sarqc.errors import CheckpointError


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


def test_appears_at_the_end(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with atomic_folder(out) as building:
        assert building.parent == out.parent and building.name.startswith(".out.")
        fill(building, "new")
        assert not out.exists()
    assert tree(tmp_path) == {"a/b/out/config.json": "new"}


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt, SystemExit])
def test_a_crash_inside_leaves_nothing_not_even_new_parents(tmp_path, kind):
    with pytest.raises(kind), atomic_folder(tmp_path / "a" / "out") as building:
        fill(building, "half")
        raise kind
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_keeps_its_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with atomic_folder(tmp_path / "out") as building:
        fill(building, "new")
    assert (tmp_path / "out").is_symlink() and tree(tmp_path / "real") == {"config.json": "new"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "real"]


def test_permissions_are_those_of_a_plain_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "out") as building:
        fill(building, "new")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_existing_is_refused_before_anything_is_made(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    with pytest.raises(CheckpointError, match="exists and is not empty"), atomic_folder(out):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"), atomic_folder(tmp_path / "file", overwrite=True):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"file": "x", "out/config.json": "old"}


def test_overwrite_replaces_everything_at_the_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    (out / "stale.safetensors").write_text("stale")
    with atomic_folder(out, overwrite=True) as building:
        fill(building, "new")
        assert tree(out) == {"config.json": "old", "stale.safetensors": "stale"}
    assert tree(tmp_path) == {"out/config.json": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_overwrite_keeps_the_old(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    with pytest.raises(KeyError), atomic_folder(out, overwrite=True) as building:
        fill(building, "half")
        raise KeyError
    assert tree(tmp_path) == {"out/config.json": "old"}


def test_a_rename_that_fails_puts_the_old_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(folders.Path, "rename", failing)
    with (
        pytest.raises(CheckpointError, match="cannot be made: Input/output error"),
        atomic_folder(out, True) as building,
    ):
        fill(building, "new")
    assert tree(tmp_path) == {"out/config.json": "old"}


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        check_existing(tmp_path / "home", overwrite=True)
    with pytest.raises(CheckpointError), atomic_folder(tmp_path / "home", overwrite=True):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"home/thesis.txt": "years"}


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="exists and is not empty"), atomic_folder(out) as building:
        fill(building, "ours")
        out.mkdir()
        fill(out, "theirs")
    assert tree(tmp_path) == {"out/config.json": "theirs"}


def test_a_parent_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be made"), atomic_folder(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize(
    ("out", "how"),
    [
        ("model", "is the model's own"),
        ("model/", "is the model's own"),
        ("model/../model", "is the model's own"),
        ("link", "is the model's own"),
        ("model/out", "is inside"),
        ("model/a/b", "is inside"),
        ("link/out", "is inside"),
        ("", "holds"),
        ("..", "holds"),
    ],
)
def test_overlap_with_the_source(tmp_path, out, how):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(CheckpointError, match=how):
        check_overlap(f"{tmp_path}/{out}", tmp_path / "model")


def test_neighbours_do_not_overlap(tmp_path):
    (tmp_path / "model").mkdir()
    for out in ("model-w4", "mode", "out/model", "x"):
        check_overlap(tmp_path / out, tmp_path / "model")


def test_a_mount_point_is_refused_because_nothing_can_be_renamed_to_it(tmp_path, monkeypatch):
    """As /out of `docker -v FOLDER:/out` is."""
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(CheckpointError, match="is a mount point, and cannot be replaced: give a folder inside it"):
        check_existing(tmp_path)
    check_existing(tmp_path / "inside")
