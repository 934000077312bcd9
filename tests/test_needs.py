"""A run of the tests that lacks what it requires."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("required", "told"), [("native,nvcc", "nvcc: there is no nvcc on PATH"), ("gcc", "gcc: only native, nvcc, ")]
)
def test_it_ends_before_the_first_test(required, told):
    env = {**os.environ, "PATH": "/nonexistent", "EFFNET_FAST_TESTS_REQUIRE": required}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__], capture_output=True, text=True, env=env
    )
    assert done.returncode == 1 and told in done.stdout + done.stderr, done.stdout + done.stderr
    assert "passed" not in done.stdout
