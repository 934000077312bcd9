"""The cases and entrants of each suite, as data."""

from __future__ import annotations

from benchmarks import kernels, training
from effnet_fast.benchmark import nets as whole_nets
from effnet_fast.benchmark.case import Case, Entrant
from effnet_fast.benchmark.roofline import EXPAND_DEPTHWISE, Launch, expand_depthwise_launches, op_launches
from effnet_fast.models import FAMILY
from effnet_fast.ops.backends import BACKENDS

NETS = ("b0", "b5", "b7", "b4", "b1", "b2", "b3", "b6")  # the first ones first: a time limit cuts the end off
SUITES = ("kernels", "model", "train")
# Images that fill the chip, for nets; for kernels, halved until a call moves no more than MOST_BYTES.
LARGE = {
    "cpu": {"b0": 16, "b4": 8, "b5": 4, "b7": 2},
    "cuda": {"b0": 256, "b4": 128, "b5": 64, "b7": 64},
}
TRAIN = {"cpu": {"b0": 16, "b5": 4}, "cuda": {"b0": 128, "b5": 32, "b4": 64, "b7": 8}}
KERNEL_LARGE = {"cpu": 16, "cuda": 128}
MOST_BYTES = {"cpu": 1 << 28, "cuda": 3 << 30}


def cases(
    suite: str, device: str, dtype: str, quick: bool = False, nets: tuple[str, ...] = NETS, most: int | None = None
) -> list[Case]:
    """Every case of a suite for ``nets``; with ``quick`` B0's at batch 1 (2 for a training step).

    ``most``: of each net and op so many shapes, evenly spaced from the net's first to its last.
    """
    nets = NETS[:1] if quick else nets
    if suite == "train":
        sizes = {"b0": 2} if quick else TRAIN[device]
        return [_net_case(net, sizes[net], dtype, device) for net in nets if net in sizes]
    if suite == "model":
        return [
            _net_case(net, batch, dtype, device)
            for net in nets
            if net in LARGE[device]
            for batch in ((1,) if quick else (LARGE[device][net], 1))
        ]
    # By what a kernel sees; a gate's images are of the size that they have in the first net which has it.
    shapes: dict[str, tuple[Launch, list[str]]] = {}
    for net in nets:
        config = FAMILY[f"efficientnet_{net}"]
        for launch in _chosen(op_launches(config) + (expand_depthwise_launches(config) if device == "cuda" else ()), most):
            _, having = shapes.setdefault(_name(launch), (launch, []))
            if net not in having:
                having.append(net)
    return [
        Case(f"{name} n{batch}", launch.op, tuple(having), batch, dtype, device, launch)
        for name, (launch, having) in shapes.items()
        for batch in ((1,) if quick else (_fills(launch, device, dtype), 1))
    ]


def entrants(suite: str, device: str, quick: bool = False) -> list[Entrant]:
    """Who takes part. BASELINE names the one that speed-ups are told against."""
    found = whole_nets.entrants(device) if suite == "model" else [*_ENTRANTS[suite], *_COMPILED[suite, device]]
    return [entrant for entrant in found if entrant.quick or not quick]


BASELINE = {"kernels": "eager channels_last", "model": "timm channels_last", "train": "timm channels_last"}
_ENTRANTS = {
    "kernels": [
        *(Entrant(f"ours {backend}", kernels.ours, (backend,), beside=True) for backend in BACKENDS if backend != "reference"),
        Entrant("ours, two kernels", kernels.ours_in_two, beside=True, groups=(EXPAND_DEPTHWISE,)),
        Entrant("eager channels_last", kernels.eager, ("channels_last",)),
        Entrant("eager nchw", kernels.eager, ("nchw",)),
    ],
    "train": [
        Entrant("ours", training.ours),
        Entrant("accelerated timm", training.timm_accelerated),
        Entrant("timm channels_last", training.timm_eager),
    ],
}


def _compiled(suite: str, name: str, options: dict[str, object], beside: bool = True) -> Entrant:
    prepare = {"kernels": kernels.compiled, "train": training.timm_compiled}[suite]
    # Every shape of eight nets compiled in each mode would take hours.
    nets = ("b0", "b5") if suite == "kernels" else None
    return Entrant(f"compile {name}", prepare, (options,), nets, beside, quick=False)


# What compiles comes last, and is given up first where time is short. reduce-overhead is CUDA graphs: nothing on a CPU, and kernels
# are timed inside a graph already. In a step it captures forward and backward and not the optimizer; ours and eager take part as
# one graph of all three.
_COMPILED = {
    ("kernels", "cpu"): [
        _compiled("kernels", "default", {}),
        _compiled("kernels", "max-autotune", {"mode": "max-autotune"}, beside=False),
    ],
    ("kernels", "cuda"): [
        _compiled("kernels", "default", {}),
        _compiled("kernels", "max-autotune", {"mode": "max-autotune-no-cudagraphs"}, beside=False),
    ],
    ("train", "cpu"): [_compiled("train", "default", {})],
    ("train", "cuda"): [
        Entrant("ours, graph", training.ours, (True,)),
        Entrant("timm channels_last, graph", training.timm_eager, (True,)),
        Entrant("ours, compile reduce-overhead", training.ours_compiled, ({"mode": "reduce-overhead"},), beside=True, quick=False),
        _compiled("train", "default", {}),
        _compiled("train", "reduce-overhead", {"mode": "reduce-overhead"}),
        _compiled("train", "max-autotune", {"mode": "max-autotune"}, beside=False),
    ],
}


def _net_case(net: str, batch: int, dtype: str, device: str) -> Case:
    name = f"efficientnet_{net}"
    return Case(f"{net} n{batch}", net, (net,), batch, dtype, device, net=name, size=FAMILY[name].resolution)


def _chosen(launches: tuple[Launch, ...], most: int | None) -> list[Launch]:
    """Of each op ``most`` shapes, evenly spaced."""
    chosen: list[Launch] = []
    for op in dict.fromkeys(launch.op for launch in launches):
        alike = list({_name(launch): launch for launch in reversed(launches) if launch.op == op}.values())[::-1]
        if most is not None and most < len(alike):
            alike = [alike[i * (len(alike) - 1) // max(1, most - 1)] for i in range(most)]
        chosen += alike
    return chosen


def _fills(launch: Launch, device: str, dtype: str) -> int:
    batch = KERNEL_LARGE[device]
    while batch > 2 and launch.bytes(dtype, batch) > MOST_BYTES[device]:
        batch //= 2
    return batch


def _name(launch: Launch) -> str:
    d = dict(launch.shape)
    op = "expand+depthwise" if launch.op == EXPAND_DEPTHWISE else launch.op.split("_")[0]
    if op == "squeeze":
        return f"gate c{d['c']} r{d['reduced']}"
    outputs = f"-{d['k']}" if "k" in d else ""
    window = f" k{d['kernel']}s{d['stride']}" if "kernel" in d else ""
    extras = [name for name in ("gate", "residual") if d.get(name)]
    return " ".join([f"{op} c{d['c']}{outputs} {d['h']}x{d['w']}{window}", *extras])
