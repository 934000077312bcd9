"""``effnet-fast bench``: what it measures is told whole, what is wrong is caught, what is missing is named."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from effnet_fast.benchmark import compare, nets
from effnet_fast.benchmark.case import Case, Entrant
from effnet_fast.benchmark.results import write
from effnet_fast.benchmark.timing import Skipped, held, peak
from effnet_fast.cli import main
from effnet_fast.models import create_model
from effnet_fast.weights.files import whole

BATCH = 3


def wrong(case: Case):
    """A peer whose logits are all off by a hundredth."""
    print("times 1.01")
    model = create_model(case.net).eval()

    def build(state):
        model.load_state_dict(state)
        return lambda x: 1.01 * model(x)

    return nets.checked(case, build, nets.peer_factor(case))


def missing(case: Case):
    """A peer that is not there."""
    nets.installed("no_such_package")


FEW = [
    Entrant("ours optimized", nets.optimized),
    Entrant("eager channels_last", nets.plain_eager, ("channels_last",)),
    Entrant("wrong", wrong, peer="openvino"),
    Entrant("missing", missing, peer="openvino"),
]


def test_what_it_tells_and_writes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(compare, "entrants", lambda device, eager: FEW)
    out, plot = tmp_path / "b0.json", tmp_path / "b0.png"
    words = f"bench efficientnet_b0.ra_in1k --size 64 --batch 1,{BATCH} --seconds 0.01 --device cpu --json {out} --plot {plot}"
    assert main(words.split()) == 1  # one is wrong
    told, err = capsys.readouterr()
    assert sorted(tmp_path.iterdir()) == [out, plot]
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.read_bytes().endswith(b"IEND\xaeB`\x82")
    results = json.loads(out.read_text())
    assert (results["net"], results["size"], results["device"]) == ("efficientnet_b0", 64, "cpu")
    assert {"torch", "timm", "torchvision", "onnxruntime", "openvino"} <= results["machine"]["versions"].keys()
    assert results["roofline"]["fp32"]["copy_bytes_s"] > 1e8
    for case, batch in zip(compare.in_order(results), (1, BATCH), strict=True):
        assert case["batch"] == batch and case["bound_us"] > 0 < case["bound_L3_us"]
        assert case["best_peer"] == "eager channels_last" and f"batch {batch}, fp32: " in told
        ours, eager = (case["entrants"][name] for name in ("ours optimized", "eager channels_last"))
        assert ours["of_best_peer"] == eager["median_us"] / ours["median_us"] and eager["of_best_peer"] == 1
        for entrant in (ours, eager):
            low, high = entrant["quartiles_us"]
            assert entrant["status"] == "timed" and 0 < low <= entrant["median_us"] <= high
            assert entrant["images_s"] == pytest.approx(batch * 1e6 / entrant["median_us"])
            assert entrant["share_of_bound"] > 0 and 0 < entrant["off_by"] < 1e-5
            assert entrant["memory_bytes"] > 2e7, "less than the weights, also where a larger batch ran before"
        assert case["entrants"]["wrong"]["status"] == "refused" and "off by" in case["entrants"]["wrong"]["reason"]
        assert case["entrants"]["missing"] == {"status": "skipped", "reason": "no_such_package is not installed"}
    assert len(re.findall(r"^ours optimized +[\d.]+ +[\d.]+ - [\d.]+ +[\d.]+ +[\d.]+ ", told, re.M)) == 2
    assert len(re.findall(r"^wrong .* refused: off by ", told, re.M)) == 2
    assert "not installed: no_such_package; pip install 'effnet-fast[bench]' brings all peers" in told
    (logs,) = re.fullmatch(r"effnet-fast: note: what the entrants printed is in (\S+)\n", err).groups()
    assert set(Path(logs, "bench.wrong.log").read_text().splitlines()) == {"times 1.01"}
    shutil.rmtree(logs)


BAD = [
    ("efficientnet_b99", "unknown model 'efficientnet_b99'"),
    ("", "required: NAME"),
    ("efficientnet_b0 --batch 0", "'0' is no whole number >= 1"),
    ("efficientnet_b0 --batch 1,,2", "'' is no whole number >= 1"),
    ("efficientnet_b0 --dtype fp32,int8", "'int8' is none of fp32, bf16, fp16"),
    ("efficientnet_b0 --peers tensorrt", "'tensorrt' is none of all, none, torchvision, compile, onnxruntime, openvino"),
    ("efficientnet_b0 --peers none,compile", "all or none stands alone"),
    (
        "efficientnet_b0 --peers openvino,compile --device cuda",
        "--peers is openvino,compile and --device cuda; openvino run on cpu",
    ),
    ("efficientnet_b0 --device tpu", "invalid choice: 'tpu'"),
    ("efficientnet_b0 --size 31", "--size is 31; 32 pixels or more would do"),
    ("efficientnet_b0 --seconds 0", "'0' is no number of seconds > 0"),
    ("efficientnet_b0 --seconds nan", "'nan' is no number of seconds > 0"),
    ("efficientnet_b0 --json nowhere/b0.json", "--json is nowhere/b0.json; a file in a directory that exists would do"),
    ("efficientnet_b0 --json .", "--json is .; a file"),
    ("efficientnet_b0 --plot b0.jpg", "a name that ends in .png would do"),
]


@pytest.mark.parametrize(("arguments", "piece"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_gets_one_line_before_any_work(arguments, piece, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"effnet-fast: error: [^\n]+\n", err) and piece in err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(capsys):
    assert main(["bench", "efficientnet_b0", "--device", "cuda"]) == 2
    assert "there is no CUDA device here; cpu would do" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "extra"), [("matplotlib", "bench"), ("tqdm", "cli")])
def test_a_package_that_it_needs_is_named(package, extra, monkeypatch, capsys):
    for module in (package, "effnet_fast.benchmark.plot"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["bench", "efficientnet_b0", "--plot", "b0.png"]) == 2
    assert capsys.readouterr().err == f"effnet-fast: error: this needs {package}: pip install 'effnet-fast[{extra}]' would do\n"


def test_a_plan_has_whom_it_is_asked_for():
    def names(peers, batch=2, device="cpu", net="efficientnet_b0"):
        ((case, chosen),) = compare.plan(net, 64, [batch], ["bf16"], device, peers)
        assert (case.net, case.size, case.batch, case.dtype, case.device) == (net, 64, batch, "bf16", device)
        return [entrant.name for entrant in chosen]

    eager = nets.eager_of("efficientnet_b0")
    of_one = ["ours", "accelerated timm", "ours optimized", f"{eager} channels_last", f"{eager} nchw"]
    always = [*of_one, f"{eager} channels_last, one by one"]
    assert names([]) == always
    assert names(["openvino"]) == [*always, "OpenVINO", "OpenVINO throughput"]
    assert names(["onnxruntime"], batch=1) == [*of_one, "ONNX Runtime"]
    assert names(["torchvision"]) == [*always, "torchvision"]
    assert names([], net="efficientnetv2_b0")[3:5] == ["eager channels_last", "eager nchw"]  # which timm does not have
    compiled = ["compile default", "compile freezing", "compile max-autotune"]
    assert names(["compile"], batch=1) == [*of_one, *compiled]
    assert names(["compile"]) == [*always, *compiled[:2], "compile freezing, one by one", compiled[2]]
    assert [name for name in names(nets.PEERS, device="cuda") if name.startswith("compile")] == [
        "compile default",
        "compile reduce-overhead",
        "compile max-autotune",
    ]
    planned = compare.plan("efficientnet_b0", 64, [1, 16, 2], ["fp32", "bf16"], "cpu", [])
    assert [(case.dtype, case.batch) for case, _ in planned] == [(dtype, n) for dtype in ("fp32", "bf16") for n in (16, 2, 1)]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    """B0 on small images, with its weights."""
    case = Case("b0", "b0", ("b0",), BATCH, "fp32", "cpu", net="efficientnet_b0", size=64)
    object.__setattr__(case, "weights", str(tmp_path_factory.mktemp("bench") / "b0.pt"))
    with torch.no_grad():
        nets.write_weights(case)
    return case


def test_with_no_peer_installed(case, monkeypatch):
    """Ours and eager PyTorch run, with the weights that timm's module was given; each of the others says what is missing."""
    for package in ("timm", "torchvision", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    field = nets.entrants("cpu", nets.eager_of(case.net))
    told = {}
    with torch.no_grad():
        for entrant in field:
            if entrant.peer != "compile":
                try:
                    told[entrant.name] = len(entrant.prepare(case, *entrant.arguments).burst(0.0))
                except Skipped as reason:
                    told[entrant.name] = str(reason)
    assert told == {
        "ours": 3,
        "accelerated timm": "timm is not installed",
        "ours optimized": 3,
        "eager channels_last": 3,
        "eager nchw": 3,
        "eager channels_last, one by one": 3,
        "torchvision": "torchvision is not installed",
        **dict.fromkeys(("ONNX Runtime", "ONNX Runtime throughput"), "onnxruntime is not installed"),
        **dict.fromkeys(("OpenVINO", "OpenVINO throughput"), "openvino is not installed"),
    }
    module = nets.plain_net(case.net)
    assert module.state_dict().keys() == create_model(case.net).state_dict().keys()
    monkeypatch.setitem(sys.modules, "onnxruntime", torch)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(Skipped, match="onnxscript is not installed"):
        nets.exported(case, 1)


def test_a_package_that_does_not_import_is_told(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Skipped, match="half_there does not import: No module named 'no_such_package'"):
        nets.installed("half_there")


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
def test_throughput_gives_each_image_its_own_logits(case, peer):
    """Single images over threads or streams, put together again: what is out of order would be refused."""
    pytest.importorskip(peer, reason=f"{peer} is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with torch.no_grad():
        timer = getattr(nets, peer)(case, True)
    assert timer.facts["off_by"] < 1e-5 and len(timer.burst(0.0)) == 3
    assert [path.name for path in Path(case.weights).parent.glob("*.onnx")] == ["b0.pt.n1.onnx"]


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
def test_peers_run_on_as_many_threads_as_torch(case, peer, monkeypatch):
    """All on one image, or each of ONNX Runtime's on one of its own."""
    package = pytest.importorskip(peer, reason=f"{peer} is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    made, pools = [], []
    monkeypatch.setattr(nets, "checked", lambda case, build, *_, **settings: build({}))
    monkeypatch.setattr(nets, "ThreadPoolExecutor", pools.append)
    if peer == "onnxruntime":
        session = package.InferenceSession
        monkeypatch.setattr(package, "InferenceSession", lambda *arguments: made.append(session(*arguments)) or made[-1])
    else:
        compile_model = package.Core.compile_model
        monkeypatch.setattr(package.Core, "compile_model", lambda *arguments: made.append(compile_model(*arguments)) or made[-1])
    one, before = replace(case, batch=1), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for throughput in (False, True):
                getattr(nets, peer)(one, throughput)
    finally:
        torch.set_num_threads(before)
    if peer == "onnxruntime":
        assert [session.get_session_options().intra_op_num_threads for session in made] == [1, 1, 2, 1] and pools == [1, 2]
    else:
        assert [model.get_property("INFERENCE_NUM_THREADS") for model in made] == [1, 1, 2, 2]


def test_torchvision_has_the_same_weights_or_says_that_it_has_no_such_net(case, monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    with torch.no_grad():
        assert nets.torchvision_eager(case).facts["off_by"] < 1e-5
    for net in ("efficientnet_lite0", "tf_efficientnet_b0"):
        with pytest.raises(Skipped, match=f"torchvision has no {net}"):
            nets.torchvision_net(net)
    half = Case("b0", "b0", ("b0",), 1, "bf16", "cpu", net="efficientnet_b0", size=64)
    with pytest.raises(Skipped, match="takes part in fp32 alone"):
        nets.onnxruntime(half)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    out = tmp_path / "b0.json"
    write({"cases": []}, out)
    with pytest.raises(RuntimeError, match="broken off"), whole(out) as aside:
        aside.write_text("{")
        raise RuntimeError("broken off")
    assert json.loads(out.read_text()) == {"cases": []} and list(tmp_path.iterdir()) == [out]
    with pytest.raises(TypeError):
        write({"cases": object()}, out)
    assert json.loads(out.read_text()) == {"cases": []} and list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process's peak of memory")
def test_the_memory_of_a_call_is_its_peak():
    before, kept = held("cpu"), []
    with_one = peak(lambda: torch.ones(16 << 20).sum(), "cpu") - before
    assert 60 << 20 < with_one < 80 << 20 and held("cpu") - before < 4 << 20
    assert peak(lambda: kept.append(torch.ones(16 << 20)), "cpu") - before > 60 << 20
    assert held("cpu") - before > 60 << 20
