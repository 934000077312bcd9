"""Whole nets in evaluation mode with the same weights, ours and peers', each checked against float64 before it is timed."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import effnet_fast
from effnet_fast.benchmark import calibrate, images
from effnet_fast.benchmark.case import DTYPES, PEER_FACTOR, Case, Entrant
from effnet_fast.benchmark.machine import last_level_cache
from effnet_fast.benchmark.timing import EventTimer, HostTimer, Refused, Replayed, Skipped, Timer, copies, held, peak
from effnet_fast.benchmark.tolerance import largest, why_wrong
from effnet_fast.inference.graphs import FEW
from effnet_fast.models import config_of
from effnet_fast.weights import key_map

NOT_INSTALLED = "is not installed"
PEERS = ("torchvision", "compile", "onnxruntime", "openvino")
_FORMATS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # as OpenVINO's hint has them


def entrants(device: str, eager: str = "timm") -> list[Entrant]:
    """Who takes part, on the CPU or on CUDA. ``eager``: whose modules plain PyTorch is, from :func:`eager_of`.

    Freezing is what a CPU gains most from: it folds the norms and packs the weights. reduce-overhead and max-autotune are CUDA
    graphs, which copy each call's input and replay; so ours and eager take part as graphs too. What compiles comes last, and is
    given up first where time is short.
    """
    one_by_one = Entrant(f"{eager} channels_last, one by one", plain_eager, ("channels_last", False, True), quick=False, least=2)
    of_all = [
        Entrant("ours", ours),
        Entrant("accelerated timm", accelerated),
        Entrant("ours optimized", optimized),
        Entrant(f"{eager} channels_last", plain_eager, ("channels_last",)),
        Entrant(f"{eager} nchw", plain_eager, ("nchw",), quick=False),
        *([one_by_one] if device == "cpu" else []),
        Entrant("torchvision", torchvision_eager, quick=False, peer="torchvision"),
    ]
    if device == "cuda":
        return [
            *of_all,
            Entrant("ours optimized, one launch", optimized, (True,)),
            Entrant("ours, graph", ours, (True,)),
            Entrant("accelerated timm, graph", accelerated, (True,)),
            Entrant(f"{eager} channels_last, graph", plain_eager, ("channels_last", True)),
            _compiled("default", {}),
            _compiled("reduce-overhead", {"mode": "reduce-overhead"}),
            _compiled("max-autotune", {"mode": "max-autotune"}, beside=False),
        ]
    return [
        *of_all,
        Entrant("ONNX Runtime", onnxruntime, quick=False, peer="onnxruntime"),
        Entrant("ONNX Runtime throughput", onnxruntime, (True,), quick=False, least=2, peer="onnxruntime"),
        Entrant("OpenVINO", openvino, quick=False, peer="openvino"),
        Entrant("OpenVINO throughput", openvino, (True,), quick=False, least=2, peer="openvino"),
        _compiled("default", {}),
        _compiled("freezing", {"options": {"freezing": True}}),
        _compiled("freezing, one by one", {"options": {"freezing": True}}, one_by_one=True),
        _compiled("max-autotune", {"options": {"freezing": True, "max_autotune": True}}, beside=False),
    ]


def _compiled(name: str, options: dict[str, Any], beside: bool = True, one_by_one: bool = False) -> Entrant:
    least = 2 if one_by_one else 1
    return Entrant(f"compile {name}", compiled, (options, one_by_one), beside=beside, quick=False, least=least, peer="compile")


def write_weights(case: Case) -> None:
    """Write ``case.weights``: the net's calibrated weights, the images to check, and plain PyTorch's answer to them in the dtype
    and in float64. A smaller batch of the same net has the first of them."""
    torch.manual_seed(0)
    state = calibrate(effnet_fast.create_model(case.net), (case.size, case.size)).state_dict()
    x = _images(case, len(case.checked))
    peer = _placed(case, plain_net(case.net), state)
    plain = peer(_on(case, x)).cpu()
    exact = peer.to(torch.float64)
    exact.load_state_dict(state)  # which the dtype has not rounded
    reference = exact(x.to(case.device, torch.float64)).cpu()
    torch.save({"state": state, "images": x, "plain": plain, "reference": reference}, case.weights)


def ours(case: Case, graph: bool = False) -> Timer:
    """effnet_fast's own model, on whatever backends it chooses."""
    return checked(case, lambda state: _placed(case, effnet_fast.create_model(case.net), state), 2.0, graph=graph)


def accelerated(case: Case, graph: bool = False) -> Timer:
    """timm's model after :func:`effnet_fast.accelerate`."""
    installed("timm")  # before what the net takes is counted, here and below

    def build(state: dict[str, Tensor]) -> nn.Module:
        model = _placed(case, timm_net(case.net), state)
        effnet_fast.accelerate(model)
        return model

    return checked(case, build, 2.0, graph=graph)


def optimized(case: Case, one_launch: bool = False) -> Timer:
    """effnet_fast's own model after :func:`effnet_fast.optimize_for_inference`."""
    if one_launch and (case.batch > FEW or case.dtype == "fp32"):
        raise Skipped(f"is for batches of up to {FEW} in half precision")

    def build(state: dict[str, Tensor]) -> nn.Module:
        net = _placed(case, effnet_fast.create_model(case.net), state)
        serving = effnet_fast.optimize_for_inference(net, one_launch=one_launch)
        if one_launch:
            serving(_on(case, _images(case, case.batch)))
            if "in place of" not in (told := str(serving)):
                raise Skipped(f"is not what runs; {told}")
        return serving

    return checked(case, build, 2.0)


def plain_eager(case: Case, layout: str = "channels_last", graph: bool = False, one_by_one: bool = False) -> Timer:
    """Eager PyTorch: :func:`plain_net`, on all images at once or, where what lies between its operators then fits the caches, one
    after the other."""
    eager_of(case.net)

    def build(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        net = _placed(case, plain_net(case.net), state, layout)
        return _one_by_one(net) if one_by_one else net

    return checked(case, build, peer_factor(case), layout, graph)


def _one_by_one(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([net(image) for image in x.split(1)])


def compiled(case: Case, options: dict[str, Any], one_by_one: bool = False) -> Timer:
    """:func:`plain_net` by torch.compile, channels_last, on all images at once or on one after the other."""
    eager_of(case.net)
    importlib.import_module("torch._inductor.compile_fx")

    def build(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        net = torch.compile(_placed(case, plain_net(case.net), state), dynamic=False, **options)
        return _one_by_one(net) if one_by_one else net

    return checked(case, build, peer_factor(case))


def torchvision_eager(case: Case) -> Timer:
    """torchvision's model, channels_last."""
    installed("torchvision")

    def build(state: dict[str, Tensor]) -> nn.Module:
        model, names = torchvision_net(case.net), key_map(config_of(case.net), "torchvision")
        return _placed(case, model, {names[key]: value for key, value in state.items()})

    return checked(case, build, peer_factor(case))


def onnxruntime(case: Case, throughput: bool = False) -> Timer:
    """The net, exported to ONNX, by ONNX Runtime on as many threads as torch has: all on one call, or for ``throughput`` each on
    one image at a time."""
    if case.dtype != "fp32":
        raise Skipped(f"takes part in fp32 alone: on the CPU it has no convolution of {case.dtype}")
    runtime, threads = installed("onnxruntime"), torch.get_num_threads()

    def build(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1 if throughput else threads
        session = runtime.InferenceSession(exported(case, 1 if throughput else case.batch), options, ["CPUExecutionProvider"])

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

        if not throughput:
            return run
        pool = ThreadPoolExecutor(threads)
        return lambda x: torch.cat(list(pool.map(run, x.split(1))))

    return checked(case, build, peer_factor(case), "nchw")


def openvino(case: Case, throughput: bool = False) -> Timer:
    """The net, exported to ONNX, by OpenVINO on as many threads as torch has: for latency, or for ``throughput`` as single images
    over as many streams as it likes best. In half types it computes as its hint for precision says, on float32 images."""
    runtime = installed("openvino")
    core = runtime.Core()
    if case.dtype.upper() not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Skipped(f"OpenVINO has no {case.dtype} on this CPU")
    hints = {
        "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": _PRECISIONS[case.dtype],
    }

    def build(state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        model = core.compile_model(core.read_model(exported(case, 1 if throughput else case.batch)), "CPU", hints)
        if not throughput:
            return lambda x: torch.from_numpy(model(x.numpy())[0].copy())
        queue = runtime.AsyncInferQueue(model)

        def run(x: Tensor) -> Tensor:
            rows: list[Any] = [None] * len(x)

            def keep(request: Any, number: int) -> None:
                rows[number] = request.get_output_tensor().data.copy()

            queue.set_callback(keep)
            for number, image in enumerate(x.split(1)):
                queue.start_async({"x": image.numpy()}, number)
            queue.wait_all()
            return torch.cat([torch.from_numpy(row) for row in rows])

        return run

    return checked(case, build, peer_factor(case), "nchw", images_dtype=torch.float32)


def checked(
    case: Case,
    build: Callable[[dict[str, Tensor]], Callable[[Tensor], Tensor]],
    factor: float,
    layout: str = "channels_last",
    graph: bool = False,
    images_dtype: torch.dtype | None = None,
) -> Timer:
    """A timer for the net that ``build`` makes of the case's weights, with ``graph`` as a CUDA graph; Refused where it is wrong on
    a checked image. Its facts are how far off it was and the memory that it takes at work, its weights and what it keeps included:
    what the process has at most while it runs, over what it had before the net was built.

    images_dtype  of the images that it takes: by default the case's
    """
    torch.backends.cudnn.benchmark = True
    told = torch.load(case.weights)
    few = len(case.checked)
    first = _images(case, case.batch, seed=2)
    first[case.checked] = told["images"][:few]
    first = _on(case, first, layout, images_dtype)
    before = held(case.device)
    run = build(told["state"])
    run = Replayed(run, first) if graph else run
    out = run(first)[case.checked].cpu()
    wrong = why_wrong(out, told["plain"][:few], told["reference"][:few], factor)
    if wrong is not None:
        raise Refused(wrong)
    memory = peak(lambda: run(first), case.device) - before
    count = copies(first.nbytes, last_level_cache(case.device), most=16)
    sets = [first, *(first.clone(memory_format=torch.preserve_format) for _ in range(count - 1))]

    def step(i: int) -> Tensor:
        if case.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return run(sets[i])

    timer = (HostTimer if case.device == "cpu" else EventTimer)(step, count)
    timer.facts |= {"off_by": largest(out.double() - told["reference"][:few]), "memory_bytes": memory}
    return timer


def peer_factor(case: Case) -> float:
    """Times plain PyTorch's error that a peer's logits may be off by: in half types few, or another image's would pass."""
    return PEER_FACTOR if case.dtype == "fp32" else 4.0


def eager_of(net: str) -> str:
    """Whose modules :func:`plain_net` has: "timm", or "eager" for our own where timm is not installed or has no such net."""
    try:
        return "timm" if installed("timm").is_model(net) else "eager"
    except Skipped:
        return "eager"


def plain_net(net: str) -> nn.Module:
    """The net as plain PyTorch: timm's module where there is one, else ours, whose blocks run their children one by one."""
    if eager_of(net) == "timm":
        return timm_net(net)
    return effnet_fast.create_model(net, norm_layer=functools.partial(_UnfusedNorm, eps=config_of(net).bn_eps))


class _UnfusedNorm(nn.BatchNorm2d):
    """A batch norm that no fused op takes, by its type."""


def timm_net(net: str) -> nn.Module:
    """timm's. Raises Skipped where it has none."""
    timm = installed("timm")
    if not timm.is_model(net):
        raise Skipped(f"timm has no {net}")
    return timm.create_model(net)


def torchvision_net(net: str) -> nn.Module:
    """torchvision's, with the eps of ours. Raises Skipped where it has none."""
    builder = getattr(installed("torchvision").models, net.replace("v2_", "_v2_"), None)
    if builder is None:
        raise Skipped(f"torchvision has no {net}")
    model = builder()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = config_of(net).bn_eps
    return model


def installed(name: str) -> Any:
    """The package. Raises Skipped where there is none, or where it does not import."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        raise Skipped(f"{name} {NOT_INSTALLED}" if missing else f"{name} does not import: {error}") from error


def exported(case: Case, batch: int) -> Path:
    """The net as an ONNX file for a batch of so many images in float32: written once, in a process of its own, whose memory is not
    that of a runtime."""
    installed("onnxscript")
    path = Path(f"{case.weights}.n{batch}.onnx")
    if not path.exists():
        process = multiprocessing.get_context("spawn").Process(target=_export, args=(case, batch, path))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError("the export to ONNX failed")
    return path


def _export(case: Case, batch: int, path: Path) -> None:
    model = plain_net(case.net).eval()
    model.load_state_dict(torch.load(case.weights)["state"])
    x = torch.zeros(batch, 3, case.size, case.size)
    aside = path.with_suffix(".part")
    program = torch.onnx.export(model, (x,), input_names=["x"], dynamo=True, verbose=False)
    assert program is not None
    program.save(aside)
    aside.replace(path)


def _images(case: Case, count: int, seed: int = 1) -> Tensor:
    return images(count, (case.size, case.size), seed=seed).to(DTYPES[case.dtype])


def _on(case: Case, x: Tensor, layout: str = "channels_last", dtype: torch.dtype | None = None) -> Tensor:
    return x.to(case.device, dtype or DTYPES[case.dtype]).contiguous(memory_format=_FORMATS[layout])


def _placed(case: Case, model: nn.Module, state: dict[str, Tensor], layout: str = "channels_last") -> nn.Module:
    model.load_state_dict(state)
    form: dict[str, Any] = {"device": case.device, "dtype": DTYPES[case.dtype], "memory_format": _FORMATS[layout]}
    return model.eval().to(**form)
