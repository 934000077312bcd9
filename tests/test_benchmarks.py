"""The README's tables are what its sources say, and the comparison that they rest on is not vacuous."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import parity, report
from effnet_fast.benchmark import calibrate, images
from effnet_fast.models import create_model

ROOT = Path(__file__).resolve().parents[1]


def test_readme_tables_are_current():
    assert report.render(report.README.read_text()) == report.README.read_text(), "run: python -m benchmarks.report"


def test_parity_measures_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "CASES", [("timm", "efficientnet_b0", (64, 64)), ("torchvision", "efficientnet_b0", (64, 64))])
    monkeypatch.setattr(sys, "argv", ["parity", "--out", str(tmp_path / "parity.json")])
    parity.main()
    results = json.loads((tmp_path / "parity.json").read_text())
    committed = json.loads((ROOT / "benchmarks" / "results" / "parity.json").read_text())
    assert results["cases"][0].keys() == committed["cases"][0].keys() and results["machine"].keys() == committed["machine"].keys()
    for case in results["cases"]:
        assert 0 < case["ours_from_float64"] < 1e-4 * case["largest_logit"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_comparison_of_untouched_nets_would_be_vacuous():
    """What calibrate is for: fresh statistics give all images the same logits, and it refuses such a net."""
    torch.manual_seed(0)
    model = create_model("efficientnet_b0").eval()
    with torch.no_grad():
        a, b = model(images(2, (64, 64)))
        assert (a - b).abs().max() < 1e-3
        a, b = calibrate(model)(images(2, (64, 64)))
        assert (a - b).abs().max() > 1e-2
    constant = create_model("efficientnet_b0", norm_layer=torch.nn.Identity)
    for parameter in constant.parameters():
        torch.nn.init.zeros_(parameter)
    constant.classifier.bias.data.fill_(1.0)
    with pytest.raises(RuntimeError, match="vacuous"):
        calibrate(constant)


def test_report_command_checks():
    done = subprocess.run([sys.executable, "-m", "benchmarks.report", "--check"], cwd=ROOT)
    assert done.returncode == 0
