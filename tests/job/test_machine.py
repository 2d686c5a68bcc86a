"""What of the machine's memory is this process's."""

import pytest

from sarqc.job import machine

GB = 1 << 30


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"memory.max": 2 * GB}, 2 * GB),
        ("0::/slurm/job_7/step\n", {"slurm/job_7/memory.max": GB, "slurm/job_7/step/memory.max": "max"}, GB),
        ("0::/a/b\n", {"a/memory.max": GB, "a/b/memory.max": 2 * GB}, GB),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": GB}, GB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": 1 << 62}, None),
        ("0::/\n", {}, None),
        ("", {"memory.max": GB}, None),
    ],
)
def test_the_least_limit_on_the_way_to_our_own_group_holds(tmp_path, monkeypatch, own, files, expected):
    (tmp_path / "own").write_text(own)
    for name, limit in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "absent")
    whole = machine.host_memory()
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")
    assert whole > 2 * GB and machine.host_memory() == (expected or whole)
