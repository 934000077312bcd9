"""The model suite's entrants: whole nets in evaluation mode with the same weights, checked against timm's in float64."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import effnet_fast
from benchmarks.case import DTYPES, Case
from benchmarks.kernels import PEER_FACTOR
from effnet_fast.benchmark import calibrate, images
from effnet_fast.benchmark.machine import last_level_cache
from effnet_fast.benchmark.timing import EventTimer, HostTimer, Refused, Replayed, Skipped, Timer, copies
from effnet_fast.benchmark.tolerance import why_wrong


def write_weights(case: Case) -> None:
    """Write ``case.weights``: the net's calibrated weights, the images to check, and timm's answer to them in the dtype and in
    float64. A smaller batch of the same net has the first of them."""
    net, size = case.nets[0], _size(case)
    torch.manual_seed(0)
    state = calibrate(effnet_fast.create_model(f"efficientnet_{net}"), size).state_dict()
    x = images(len(case.checked), size).to(DTYPES[case.dtype])
    peer = _timm(case, state)
    plain = peer(_on(case, x)).cpu()
    exact = peer.to(torch.float64)
    exact.load_state_dict(state)  # which the dtype has not rounded
    reference = exact(x.to(case.device, torch.float64)).cpu()
    torch.save({"state": state, "images": x, "plain": plain, "reference": reference}, case.weights)


def ours(case: Case, graph: bool = False) -> Timer:
    """effnet_fast's own model, on whatever backends it chooses."""
    model = effnet_fast.create_model(f"efficientnet_{case.nets[0]}").eval()
    return checked(case, lambda state: _placed(case, model, state), graph, 2.0)


def accelerated(case: Case, graph: bool = False) -> Timer:
    """timm's model after :func:`effnet_fast.accelerate`."""

    def build(state: dict[str, Tensor]) -> nn.Module:
        model = _timm(case, state)
        effnet_fast.accelerate(model)
        return model

    return checked(case, build, graph, 2.0)


def optimized(case: Case) -> Timer:
    """effnet_fast's own model after :func:`effnet_fast.optimize_for_inference`."""
    model = effnet_fast.create_model(f"efficientnet_{case.nets[0]}").eval()
    return checked(case, lambda state: effnet_fast.optimize_for_inference(_placed(case, model, state)), False, 2.0)


def onnxruntime(case: Case) -> Timer:
    """timm's model, exported to ONNX, by ONNX Runtime on as many threads as torch has."""
    runtime = _installed("onnxruntime")

    def build(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(_onnx(case, state), options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return checked(case, build, False, PEER_FACTOR, "nchw")


def openvino(case: Case) -> Timer:
    """timm's model, exported to ONNX, by OpenVINO on as many threads as torch has, for latency."""
    runtime = _installed("openvino")

    def build(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        core = runtime.Core()
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(_onnx(case, state)), "CPU", hints)
        return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())

    return checked(case, build, False, PEER_FACTOR, "nchw")


def _installed(name: str) -> Any:
    if importlib.util.find_spec(name) is None:
        raise Skipped(f"{name} is not installed")
    return importlib.import_module(name)


def _onnx(case: Case, state: dict[str, Tensor]) -> bytes:
    """The net as an ONNX model of one file, for the case's batch."""
    _installed("onnxscript")
    x = torch.zeros(case.batch, 3, *_size(case), dtype=DTYPES[case.dtype])
    program = torch.onnx.export(_timm(case, state, "nchw"), (x,), input_names=["x"], dynamo=True, verbose=False)
    return program.model_proto.SerializeToString()


def timm_eager(case: Case, layout: str = "channels_last", graph: bool = False) -> Timer:
    return checked(case, lambda state: _timm(case, state, layout), graph, PEER_FACTOR, layout)


def timm_compiled(case: Case, options: dict[str, Any]) -> Timer:
    return checked(case, lambda state: torch.compile(_timm(case, state), dynamic=False, **options), False, PEER_FACTOR)


def checked(
    case: Case,
    build: Callable[[dict[str, Tensor]], Callable[[Tensor], Tensor]],
    graph: bool,
    factor: float,
    layout: str = "channels_last",
) -> Timer:
    """A timer for the net that ``build`` makes of the case's weights, with ``graph`` as a CUDA graph; Refused where it is wrong on
    a checked image."""
    torch.backends.cudnn.benchmark = True
    told = torch.load(case.weights)
    run = build(told["state"])
    few = len(case.checked)
    first = images(case.batch, _size(case), seed=2).to(DTYPES[case.dtype])
    first[case.checked] = told["images"][:few]
    first = _on(case, first, layout)
    run = Replayed(run, first) if graph else run
    out = run(first)[case.checked].cpu()
    wrong = why_wrong(out, told["plain"][:few], told["reference"][:few], factor)
    if wrong is not None:
        raise Refused(wrong)
    count = copies(first.numel() * first.element_size(), last_level_cache(case.device), most=16)
    sets = [first, *(first.clone(memory_format=torch.preserve_format) for _ in range(count - 1))]

    def step(i: int) -> Tensor:
        if case.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return run(sets[i])

    return (HostTimer if case.device == "cpu" else EventTimer)(step, count)


def _size(case: Case) -> tuple[int, int]:
    side = effnet_fast.models.FAMILY[f"efficientnet_{case.nets[0]}"].resolution
    return side, side


def _on(case: Case, x: Tensor, layout: str = "channels_last") -> Tensor:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return x.to(case.device, DTYPES[case.dtype]).contiguous(memory_format=form)


def _placed(case: Case, model: nn.Module, state: dict[str, Tensor], layout: str = "channels_last") -> nn.Module:
    model.load_state_dict(state)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return model.eval().to(device=case.device, dtype=DTYPES[case.dtype], memory_format=form)


def _timm(case: Case, state: dict[str, Tensor], layout: str = "channels_last") -> nn.Module:
    import timm

    return _placed(case, timm.create_model(f"efficientnet_{case.nets[0]}"), state, layout)
