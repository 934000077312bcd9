"""predict --shard: shares of the images, by number or by torchrun's ranks, are all of them, each once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet_fast.cli import main

IMAGES = [f"{number}.png" for number in range(5)]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number, name in enumerate(IMAGES):
        Image.fromarray(np.full((40, 50, 3), 40 * number, dtype=np.uint8)).save(folder / name)
    return folder


def rows(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def names(found: list[dict]) -> list[str]:
    return [Path(row["image"]).name for row in found]


def test_shares_are_everything_once(saved, photographs, capsys, monkeypatch):
    """Each in order and of the same length, but for one; of few images some are empty; by its rank a process takes the same."""

    def predicted(*options: str) -> list[dict]:
        assert main(["predict", "efficientnet_b0", "--checkpoint", str(saved), str(photographs), "--json", *options]) == 0
        return rows(capsys.readouterr().out)

    everything = predicted()
    assert names(everything) == IMAGES
    for count in (2, 6):
        shares = [predicted("--shard", f"{index}/{count}") for index in range(count)]
        assert sorted(sum(map(names, shares), [])) == IMAGES and all(names(share) == sorted(names(share)) for share in shares)
        assert {len(share) for share in shares} <= {5 // count, 5 // count + 1}
        monkeypatch.setenv("WORLD_SIZE", str(count))
        monkeypatch.setenv("RANK", "1")
        assert names(predicted("--shard")) == names(shares[1])
    assert predicted() == everything, "without the option a rank does everything"


def test_ranks_of_torchrun_share_the_work(saved, photographs):
    """All of it, though one of them meets a damaged file."""
    (photographs / "00.jpg").write_bytes(b"no image")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "effnet_fast"]
    arguments = ["efficientnet_b0", "--checkpoint", str(saved), str(photographs), "--json", "--device", "cpu", "--shard"]
    done = subprocess.run([*torchrun, "predict", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(names(rows(done.stdout))) == IMAGES
    assert done.stderr.count("00.jpg cannot be read") == 1
