"""The README is a promise: its code runs, its numbers are what the code gives, its commands and options exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import effnet_fast
from effnet_fast import cli, weights

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_python(tmp_path, monkeypatch):
    """Every Python block, in order, in one namespace; only the downloads are left out."""
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **arguments: create(name, **arguments))
    monkeypatch.setattr(weights, "load_pretrained", lambda model, pretrained: None)
    monkeypatch.chdir(tmp_path)
    torch.save(effnet_fast.efficientnet_b0().state_dict(), "efficientnet_b0_rwightman-7f5810bc.pth")
    namespace: dict = {}
    checked = 0
    for code in blocks("python"):
        exec(code, namespace)
        for expression, number in re.findall(r"^(\S.*?) +# (\d[\d,]*)\b", code, flags=re.M):
            value = eval(expression, namespace)
            value = value[0] if isinstance(value, tuple) else value
            assert value == int(number.replace(",", "")), expression
            checked += 1
    assert checked >= 2


def test_commands_and_their_options(capsys):
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("effnet-fast ")]
    assert {shlex.split(line, comments=True)[1] for line in lines} == set(cli.COMMANDS)
    for line in lines:
        command = shlex.split(line, comments=True)[1]
        assert cli.main([command, "--help"]) == 0
        told = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", line):
            assert option in told, f"{option} of {command}"


def test_figures_of_summary(capsys):
    (line,) = re.findall(r"effnet-fast (summary \S+) +# stage by stage: (.*)", README)
    assert cli.main(line[0].split()) == 0
    told = capsys.readouterr().out
    parameters, macs, resolution = re.fullmatch(r"([\d,]+) parameters and ([\d.]+ GMACs) at (\d+)", line[1]).groups()
    assert f"{parameters} parameters" in told and macs in told and f"at {resolution}x{resolution}" in told


def test_figures_of_tables(capsys):
    follow, figures = re.search(r"(\d+) of\s(\d+) figures follow", README).groups()
    assert cli.main(["tables"]) == 0
    assert f"{follow} of {figures} figures follow" in capsys.readouterr().out


def test_names_of_the_house():
    """The folders that the README draws are those there are."""
    root = Path(effnet_fast.__file__).parent
    drawn = set(re.findall(r"^  (\w+)/ ", README, flags=re.M))
    assert drawn == {path.name for path in root.iterdir() if path.is_dir() and path.name != "__pycache__"}
