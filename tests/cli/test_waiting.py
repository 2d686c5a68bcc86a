"""How idle threads of OpenMP wait: the command line says so before torch is loaded, where nobody else has."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sarqc import cli

LOOK = """
import os, sys
from sarqc import cli
assert "torch" not in sys.modules, "its library has read the environment by now"
before = dict(os.environ)
sys.argv = ["sarqc", "--version"]
try:
    cli.main()
finally:
    print({name: value for name, value in os.environ.items() if before.get(name) != value})
"""


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "1"}])
def test_what_a_user_has_said_stays(own):
    environment = dict(own)
    cli.set_wait_policy(environment)
    assert environment == (own or {"GOMP_SPINCOUNT": str(cli.SPINS)})


def test_torch_is_loaded_afterwards(monkeypatch):
    for name in cli.WAITING:
        monkeypatch.delenv(name, raising=False)
    shown = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == str({"GOMP_SPINCOUNT": str(cli.SPINS)})
