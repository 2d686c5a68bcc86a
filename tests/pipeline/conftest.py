"""Tiny random models of many architectures, a run to put faults into, statistics of solved sites."""

from tests.pipeline.driver_case import handed_over
from tests.support.fault_case import case, undisturbed
from tests.support.models import one_thread, pytest_generate_tests, rounded, tiny

__all__ = ["case", "handed_over", "one_thread", "pytest_generate_tests", "rounded", "tiny", "undisturbed"]
