"""The network at a point of the compound scaling law (arXiv 1905.11946, eq. 3: depth alpha^phi, width beta^phi, resolution
gamma^phi), at multipliers of a base's depth, width and resolution, or the best one within a budget (eq. 2): of multiply-adds,
parameters, memory, and milliseconds that the fused model takes on this machine. Limits can be combined, and the one that binds is
named. Accuracies are a law fitted to the paper's points, never measured. --growth tells what each dimension costs, exactly.

examples: effnet-fast scale --phi 3
          effnet-fast scale --depth 0.5 --width 0.5 --resolution 128px
          effnet-fast scale --macs 1.5G --parameters b2 --plot b2.png
          effnet-fast scale --macs 1.5G --free
          effnet-fast scale --ms 20 --batch 4
          effnet-fast scale --target-memory 8GB --training --batch 32 --dtype bf16
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from effnet_fast import scaling
from effnet_fast.cli.options import amount, check_output, count, memory, positive, resolution
from effnet_fast.cli.stages import cost_json, stage_rows, stage_table
from effnet_fast.cli.table import si, table
from effnet_fast.scaling import (
    PUBLISHED,
    BaseNet,
    CompoundScaling,
    Cost,
    Found,
    Growth,
    ScaledNet,
    published_fit,
    search,
)
from effnet_fast.scaling.cost import ITEM_BYTES
from effnet_fast.scaling.growth import growth_rows

_COEFFICIENTS = ("alpha", "beta", "gamma")
_MULTIPLIERS = ("depth", "width", "resolution")
_TARGETS = ("target_macs", "target_parameters", "target_memory", "target_ms")
_GROWTH = ("growth", "base", *_COEFFICIENTS, "json")
_BASES = {base.name: base for base in vars(scaling).values() if isinstance(base, BaseNet)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phi", type=float, metavar="P", help="the compound coefficient, any number >= 0; 0 is B0")
    parser.add_argument("--depth", type=float, metavar="D", help="multiplier of the layers per stage, > 0 (default 1)")
    parser.add_argument("--width", type=float, metavar="W", help="multiplier of the channels, > 0 (default 1)")
    parser.add_argument(
        "--resolution", type=resolution, metavar="R", help="multiplier of the image side, or its pixels: 260px (default 1)"
    )
    parser.add_argument(
        "--target-macs",
        "--macs",
        type=_amount_or_net,
        metavar="M",
        help="multiply-adds per image not to exceed: 390M, 1.5G, or b2's",
    )
    parser.add_argument(
        "--target-parameters", "--parameters", type=_amount_or_net, metavar="N", help="parameters not to exceed: 9M, or b2 for b2's"
    )
    parser.add_argument("--target-memory", "--memory", type=memory, metavar="B", help="not to exceed, such as 500MB or 2GiB")
    parser.add_argument(
        "--target-ms", "--ms", type=positive, metavar="T", help="milliseconds of a batch not to exceed, measured on this machine"
    )
    parser.add_argument(
        "--free", action="store_true", help="depth, width and resolution each for itself, in place of the law's phi"
    )
    parser.add_argument(
        "--growth", action="store_true", help="what each dimension costs, beside the rules; of every base, or --base"
    )
    parser.add_argument("--base", choices=list(_BASES), help="that is scaled (default efficientnet_b0)")
    for name in _COEFFICIENTS:
        parser.add_argument(f"--{name}", type=float, metavar="X", help="of the law, >= 1 (default: the paper's)")
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="images that memory and time are of (default 1)")
    parser.add_argument("--dtype", choices=list(ITEM_BYTES), default="fp32", help="that memory and time are of (default fp32)")
    parser.add_argument("--training", action="store_true", help="--target-memory is for training, with Adam, not for inference")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what a budget found (matplotlib)")


def _amount_or_net(text: str) -> float | str:
    return text if text in PUBLISHED else amount(text)


def run(arguments: argparse.Namespace) -> int:
    if arguments.growth:
        return _growth(arguments)
    law = CompoundScaling(**_given(arguments, _COEFFICIENTS), base=_BASES[arguments.base or "efficientnet_b0"])
    targets = _given(arguments, _TARGETS)
    if arguments.plot:
        check_output("plot", arguments.plot, ".png")
        if not targets:
            raise ValueError("--plot draws what a budget found; it needs one of --macs, --parameters, --memory, --ms")
        from effnet_fast.cli.scaling_plots import draw_found
    net = _net(law, arguments, targets)
    found = _search(law, arguments, targets) if net is None else ()
    net = net or found[0].net
    if arguments.plot:
        draw_found(law, found, published_fit() if law.base == scaling.B0 else None, arguments.plot)
    config, cost = net.config, Cost.of(net.config)
    inference = cost.inference_memory(arguments.dtype, arguments.batch)
    training = cost.training_memory(arguments.dtype, arguments.batch)
    if arguments.json:
        print(
            json.dumps(
                {
                    "phi": net.phi,
                    **{name: getattr(net, name) for name in _MULTIPLIERS[:2]},
                    "resolution_multiplier": net.resolution,
                    **{name: getattr(law, name) for name in _COEFFICIENTS},
                    "constraint": law.constraint.value,
                    "nearest": net.nearest and net.nearest.name,
                    "inference_memory": {**inference._asdict(), "total": inference.total},
                    "training_memory": {**training._asdict(), "total": training.total},
                    "dtype": arguments.dtype,
                    "batch": arguments.batch,
                    **({"binding": found[0].binding, "fit": _fit_told(found[0])} if found else {}),
                    "found": [_found_json(one) for one in found],
                    **cost_json(config, cost),
                }
            )
        )
        return 0
    coefficients = ", ".join(f"{name} {getattr(law, name):g}" for name in _COEFFICIENTS)
    phi = "" if net.phi is None else f"phi {net.phi:.6g}: "
    print(f"{phi}depth x{net.depth:.4g}, width x{net.width:.4g}, resolution x{net.resolution:.4g} = {config.resolution} pixels")
    if net.phi is not None:
        value, distance = law.constraint
        print(f"{coefficients}: alpha * beta^2 * gamma^2 = {value:.4g}, {distance:.2g} from the 2 that would double MACs each phi")
    print(f"\n{stage_table(stage_rows(config, cost), cost)}\n")
    print(f"parameters   {cost.parameters:,}")
    print(f"MACs         {si(cost.macs)} per image")
    print(f"activations  {si(cost.activations)} elements per image")
    print(f"regularised  dropout {net.dropout:.3g}, stochastic depth {net.drop_path:.3g}")
    print(f"memory       {si(inference.total, 'B')} for inference, {si(training.total, 'B')} for training with Adam;", end=" ")
    print(f"{arguments.dtype}, batch {arguments.batch}")
    if net.nearest:
        published, apart = net.nearest
        distance_text = "the same" if apart < 1e-9 else f"log distance {apart:.2g}"
        print(f"nearest      {published} of the published networks ({distance_text})")
    if found:
        print(f"\n{_found_table(found)}")
    return 0


def _net(law: CompoundScaling, arguments: argparse.Namespace, targets: dict[str, Any]) -> ScaledNet | None:
    """The net that is asked for by its place; None where a budget is given."""
    multipliers = _given(arguments, _MULTIPLIERS)
    ways = {
        "--phi": arguments.phi is not None,
        "--depth/--width/--resolution": bool(multipliers),
        "/".join(f"--{name.replace('_', '-')}" for name in _TARGETS): bool(targets),
    }
    asked = [way for way, given in ways.items() if given]
    if len(asked) != 1:
        raise ValueError(f"{' and '.join(asked) or 'nothing'} given; exactly one of {', '.join(ways)}, or --growth, would do")
    if arguments.training and "target_memory" not in targets:
        raise ValueError("--training says what --target-memory counts; it needs that option")
    if arguments.free and not targets:
        raise ValueError("--free says how a budget is spent; it needs one of --macs, --parameters, --memory, --ms")
    if arguments.free and law.base != scaling.B0:
        raise ValueError(f"--free goes by the published points, which are of {scaling.B0.name}; no --free, or no --base, would do")
    if (multipliers or arguments.free) and _given(arguments, _COEFFICIENTS):
        raise ValueError("--alpha, --beta and --gamma change nothing with explicit multipliers or --free; --phi would use them")
    if multipliers:
        value, unit = multipliers.pop("resolution", (1.0, "x"))
        return law.scaled(**multipliers, resolution=value / law.base.resolution if unit == "px" else value)
    return None if targets else law.at(arguments.phi)


def _search(law: CompoundScaling, arguments: argparse.Namespace, targets: dict[str, Any]) -> tuple[Found, ...]:
    settings: dict[str, Any] = {"over": "free" if arguments.free else "phi", "training": arguments.training}
    settings |= {"dtype": arguments.dtype, "batch": arguments.batch}
    limits = {name.removeprefix("target_"): value for name, value in targets.items()}
    if "ms" in limits:
        import torch

        from effnet_fast.benchmark.latency import Latency

        settings["milliseconds"] = limits.pop("ms")
        settings["latency"] = Latency(arguments.batch, arguments.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # a search without a bar finds the same
        return search(law, **limits, **settings)
    # How many it takes is known once it is done.
    with tqdm(desc="counted or timed", unit="net", delay=2, disable=None, leave=False) as bar:

        def watch(net: ScaledNet) -> None:
            bar.set_postfix_str(net.config.name, refresh=False)
            bar.update()

        return search(law, **limits, **settings, watch=watch)


def _found_json(found: Found) -> dict[str, Any]:
    net = found.net
    return {
        "name": found.config.name,
        "phi": net.phi,
        **{name: getattr(net, name) for name in _MULTIPLIERS},
        "pixels": found.config.resolution,
        "macs": found.cost.macs,
        "parameters": found.cost.parameters,
        "accuracy": found.accuracy,
        "extrapolated": _extrapolated(found),
        "limits": [{**limit._asdict(), "slack": limit.slack} for limit in found.limits],
        "binding": found.binding,
    }


def _plain(value: float) -> str:
    """Counts to the last digit, times to four."""
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"


def _fit_told(found: Found) -> str | None:
    return None if found.accuracy is None else str(published_fit())


def _extrapolated(found: Found) -> list[str]:
    return [] if found.accuracy is None else list(published_fit().beyond(found.net))


def _found_table(found: tuple[Found, ...]) -> str:
    """The nets that were found, the best first, with what is left of each limit."""
    header = ("phi", "depth", "width", "pixels", "MACs", "parameters", "top-1", "binding")
    rows = []
    for one in found:
        used = [f"{100 * limit.used / limit.most:.1f} %" for limit in one.limits]
        top1 = None if one.accuracy is None else f"{one.accuracy:.1f}"
        beyond = _extrapolated(one)
        place = [None if one.net.phi is None else f"{one.net.phi:.4g}", f"x{one.net.depth:.3g}", f"x{one.net.width:.3g}"]
        rows.append(
            (*place, one.config.resolution, si(one.cost.macs), one.cost.parameters, top1, one.binding, *used)
            + (f"extrapolated in {', '.join(beyond)}" if beyond else "",)
        )
    best = found[0]
    told = [f"{limit.name} {_plain(limit.used)} of {_plain(limit.most)}, {_plain(limit.slack)} left" for limit in best.limits]
    lines = [
        table((*header, *(limit.name for limit in best.limits), ""), rows, "rrrrrrrl" + "r" * len(best.limits) + "l"),
        "",
        f"limits       {'; '.join(told)}",
    ]
    lines.append(f"binding      {best.binding or 'nothing: the search ends there'}")
    if told_fit := _fit_told(best):
        lines.append(f"fit          {told_fit}")
    return "\n".join(lines)


def _growth(arguments: argparse.Namespace) -> int:
    """Twice the depth, width and resolution, and the law's step, of every base or of one."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [name for name, value in vars(arguments).items() if value != parser.get_default(name) and name not in _GROWTH]
    if given:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"{told} given, but --growth is of twice each dimension and of phi = 1; only --base, --alpha, --beta, --gamma, --json "
            "go with it"
        )
    names = [arguments.base] if arguments.base else list(_BASES)
    laws = {name: CompoundScaling(**_given(arguments, _COEFFICIENTS), base=_BASES[name]) for name in names}
    rows = {name: growth_rows(law) for name, law in laws.items()}
    if arguments.json:
        print(json.dumps({name: [row._asdict() for row in grown] for name, grown in rows.items()}))
        return 0
    quantities = [name.removesuffix("_rule") for name in Growth._fields if name.endswith("_rule")]
    for name, grown in rows.items():
        lines = [
            (row.label, *(_beside(getattr(row, one), getattr(row, f"{one}_rule")) for one in quantities))
            + tuple(f"{value:.2f}" for value in (row.layers, row.channels, row.pixels))
            for row in grown
        ]
        print(f"{name}: times the base's, and (what the rule says)\n")
        print(table(("", *quantities, "layers", "channels", "pixels"), lines, "l" + "r" * (len(quantities) + 3)) + "\n")
    print("layers, channels and pixels are what rounding made of the multipliers; the rules are of unrounded ones")
    return 0


def _beside(value: float | None, rule: float) -> str | None:
    return None if value is None else f"{value:.2f} ({rule:.3g})"


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
