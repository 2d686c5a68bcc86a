"""Tiny random models of many architectures."""

from tests.support.models import one_thread, pytest_generate_tests, rounded, tiny

__all__ = ["one_thread", "pytest_generate_tests", "rounded", "tiny"]
