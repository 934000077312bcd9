"""Training's CPU kernels under AddressSanitizer and UBSan (tests/emulator/training.cpp), for every width of vector."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulator import build

HERE = Path(__file__).parent / "emulator"
KERNELS = ("training/depthwise_cpu.cpp", "training/pointwise_cpu.cpp", "training/norm_act_cpu.cpp", "pointwise/pointwise_cpu.cpp")
FLAGS = ["-std=c++20", "-g1", *build.CPU.split(), *build.SANITIZERS.split(), "-Wall", "-Werror", "-Wno-psabi"]
FLAGS += ["-include", str(HERE / "cpu.h")]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers need g++")


def compiled(source: Path, csrc: Path, out: Path) -> Path:
    done = subprocess.run(["g++", *FLAGS, f"-I{csrc}", "-c", str(source), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def linked(objects: list[Path], out: Path) -> Path:
    subprocess.run(["g++", *build.SANITIZERS.split(), *map(str, objects), "-o", str(out)], check=True)
    return out


def run(program: Path, width: int, rounds: int) -> subprocess.CompletedProcess:
    env = {**os.environ, "EMULATED_WIDTH": str(width)}
    return subprocess.run([str(program), str(width), str(rounds)], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """The driver and the kernels, compiled: what takes longest first."""
    folder = tmp_path_factory.mktemp("sanitized")
    sources = {name: build.CSRC / name for name in KERNELS} | {"driver": HERE / "training.cpp"}
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda name: compiled(sources[name], build.CSRC, folder / f"{name.replace('/', '_')}.o"), sources)
        return dict(zip(sources, made, strict=True))


@pytest.mark.parametrize("width", [16, 8, 4])
def test_nothing_is_touched_beyond_a_tensor_and_all_is_written(width, objects, tmp_path):
    done = run(linked(list(objects.values()), tmp_path / "training"), width, 150)
    assert done.returncode == 0 and done.stdout == "sound\n", done.stderr


@pytest.mark.parametrize(
    ("path", "text", "replacement", "says"),
    [
        ("training/elements.h", "std::min(block * W, channels - W)", "block * W", "ERROR: AddressSanitizer"),
        ("training/norm_act_cpu.cpp", "unit < t.last; ++unit", "unit + 1 < t.last; ++unit", "was not all written"),
    ],
    ids=["a block beyond the channels", "a unit forgotten"],
)
def test_seeded_bugs_are_seen(path, text, replacement, says, objects, tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(build.CSRC, csrc)
    source = (csrc / path).read_text()
    assert text in source
    (csrc / path).write_text(source.replace(text, replacement, 1))
    name = "training/norm_act_cpu.cpp"
    spoilt = compiled(csrc / name, csrc, tmp_path / "spoilt.o")
    done = run(linked([spoilt, *(made for other, made in objects.items() if other != name)], tmp_path / "training"), 8, 150)
    assert done.returncode != 0 and says in done.stderr, done.stderr
