"""Fresh memory is NaN in every test, where the compiled module allocates it up to 1 MB: what a kernel leaves unwritten shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    import torch  # not before conftest.py has set the environment

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
