"""The text of the page on scaling: sections of Markdown, whose every number is computed, or read from stored results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.findings import DRIFT
from benchmarks.report import table
from effnet_fast import scaling
from effnet_fast.cli.stages import stage_rows
from effnet_fast.cli.table import si
from effnet_fast.scaling import (
    B0,
    BaseNet,
    CompoundScaling,
    Cost,
    Found,
    Growth,
    NetConfig,
    compound_growth,
    published_fit,
    search,
    thresholds,
)
from effnet_fast.scaling.courses import claims
from effnet_fast.scaling.growth import growth_rows
from effnet_fast.scaling.published import (
    B0_SCALED,
    FAMILY,
    OF_FAMILY,
    PAPER,
    RIVALS,
    SCALED_UP,
    TRANSFER,
    VERSIONS,
    Figure,
    PublishedNet,
)
from effnet_fast.scaling.rules import convention
from effnet_fast.training.laboratory import Size

LAW = CompoundScaling()
_SIZES = {"s": 1, "m": 2, "l": 3, "xl": 4}  # by name; all others come first, as the package has them
_BASES = [base for base in vars(scaling).values() if isinstance(base, BaseNet)]
BASES = {base.name: base for base in sorted(_BASES, key=lambda base: _SIZES.get(base.name.rpartition("_")[2], 0))}
BATCHES = (1, 32, 256)
TRAINED = 32  # images of a step, where memory of training is told
PHIS = range(8)
LITTLE = 0.1  # a phi at which the image already has another side
# What the constrained problem is filled in with.
BUDGETS: tuple[dict[str, Any], ...] = (
    {"parameters": "b2"},
    {"macs": "b4"},
    {"macs": "b2"},
    {"macs": "b2", "over": "free"},
    {"memory": 8e9, "training": True, "batch": TRAINED},
)
FILLED = {"macs": 1.5e9, "parameters": "b2"}
GRID_ROWS = 8
Results = dict[str, Any]


def page(measured: Results, grid: Results, labs: Sequence[Results], stored: Path, out: Path) -> str:
    """The page.

    measured     what ``scaling.json`` holds
    grid, labs   results of ``effnet-fast grid`` and of each ``effnet-fast lab``; their figures are within ``stored``
    out          the folder that the page is for
    """
    place = Path(os.path.relpath(stored, out))
    milliseconds = milliseconds_of(measured)
    opening, problem, family = of_times(measured)
    sections = (
        opening,
        _stages(),
        _composition(),
        _batches(),
        problem,
        _growth(growths()),
        _phi(),
        _layers(),
        family,
        _scaled(milliseconds),
        _rivals(),
        _savings(),
        of_grid(grid, place),
        *(_lab(lab, place) for lab in labs),
        _courses(),
    )
    return "\n\n".join(sections) + "\n"


def milliseconds_of(measured: Results) -> dict[str, float]:
    """By the published net's name, of its quicker turn."""
    return {row["net"]: min(row["turns_ms"]) for row in measured["latencies"]}


def of_times(measured: Results) -> tuple[str, ...]:
    """The sections that tell what was measured."""
    return _opening(measured), _problem(measured), _family(measured, milliseconds_of(measured))


@cache
def growths() -> dict[str, tuple[Growth, ...]]:
    """Of every base twice each dimension and all three, and the law's step."""
    return {name: growth_rows(base) for name, base in BASES.items()}


def _opening(measured: Results) -> str:
    machine = measured["machine"]
    return (
        f"# Compound scaling, by running it\n\n"
        f"All of this page is written by `{measured['command']}`: counts come from the cost model, accuracies on ImageNet from the "
        f"tables of {PAPER} ({OF_FAMILY}), times from [scaling.json](scaling.json) ({machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['versions']['torch']}, commit {machine['commit']}, {machine['date']}). "
        f"FLOPs are multiply-adds, MACs, as in the paper. What is a fit or a rule of thumb is called one."
    )


def _stages() -> str:
    config = B0.scaled()
    cost = Cost.of(config)
    parts = cost.by("stage")
    rows = []
    for row in stage_rows(config, cost):
        ends = parts[row["stage"]].layers
        shapes = (ends[0].input_shapes[0], ends[-1].output_shape)
        kernel = f" {row['kernel_size']}x{row['kernel_size']}" if row["stage"].startswith("blocks") else ""
        told = [row["stage"], f"{row['operator']}{kernel}", str(row["layers"]), *(_space(shape) for shape in shapes)]
        rows.append([*told, f"{row['parameters']:,}", si(row["macs"])])
    header = ["stage", "operator F", "layers L", "domain", "codomain", "parameters", "MACs"]
    first = next(shape for shape in cost.layers[0].input_shapes)
    return (
        f"## A stage is a function\n\n"
        f"A stage repeats one operator F, L times. Its domain is the space of images of one shape, channels x height x width; its "
        f"codomain that of another: only the first of its layers changes the shape. {config.name} takes {_space(first)} to "
        f"{_space(cost.layers[-1].output_shape)} in {len(parts)} stages, stem and head among them:\n\n"
        f"{table(header, rows)}"
    )


def _space(shape: Sequence[int]) -> str:
    return f"R^({'x'.join(map(str, shape))})"


def _composition() -> str:
    nets = (LAW.at(0).config, LAW.at(1).config)
    lines = "\n".join(f"phi = {phi}:  N = {_composed(config)}" for phi, config in enumerate(nets))
    base, after = nets
    return (
        f"## The network is their composition\n\n"
        f"Equation 1 of the paper writes a network as its stages, one applied to what the one before made; F^L is F applied L "
        f"times. Scaling keeps every F and changes the L (depth), the channels (width) and the pixels (resolution) alone:\n\n"
        f"```\n{lines}\n```\n\n"
        f"At phi = 0 that is on {base.resolution}x{base.resolution} pixels with {_channels(base)} channels, at phi = 1 on "
        f"{after.resolution}x{after.resolution} with {_channels(after)}."
    )


def _composed(config: NetConfig) -> str:
    inner = [f"F{number}^{stage.layers}" for number, stage in enumerate(config.stages, start=1)]
    return " o ".join(["head", *reversed(inner), "stem"])


def _channels(config: NetConfig) -> str:
    return ", ".join(map(str, [config.stem_channels, *(stage.out_channels for stage in config.stages), config.head_channels]))


def _batches() -> str:
    config = B0.scaled()
    cost, side = Cost.of(config), config.resolution
    last = [layer for layer in cost.layers if layer.kind == "conv"][-1].output_shape
    rows = []
    for batch in BATCHES:
        shape = (batch, config.in_channels, side, side)
        elements = torch.Size(shape).numel()
        memory = [cost.inference_memory("fp32", batch).total, cost.training_memory("fp32", batch).total]
        told = [_shape(shape), *(si(size * elements, "B") for size in (4, 2)), _shape((batch, *last))]
        rows.append([*told, *(si(total, "B") for total in memory)])
    header = ["batch of images", "in fp32", "in bf16", "last feature map", "inference, fp32", "training with Adam, fp32"]
    x = torch.empty(BATCHES[1], config.in_channels, side, side)
    strides = x.stride(), x.contiguous(memory_format=torch.channels_last).stride()
    return (
        f"## The shape of a batch\n\n"
        f"n images are one tensor [n, {config.in_channels}, {side}, {side}]: images, channels, height, width. The functions above "
        f"act on each image for itself, so n multiplies activations and MACs and leaves the weights alone. The order in memory is "
        f"another matter: a batch of {BATCHES[1]} has strides {strides[0]} as it is made, and {strides[1]} in channels_last, which "
        f"all kernels here work in: the shape stays.\n\n"
        f"{table(header, rows)}"
    )


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _problem(measured: Results) -> str:
    rows = [[_asked(budget), *_found(search(**budget)[0])] for budget in BUDGETS]
    timed = measured["search"]
    if timed is not None:
        net = LAW.at(timed["phi"])
        told = [f"x{value:.3g}" for value in (net.depth, net.width)]
        answer = [f"{timed['phi']:.4g}", *told, str(net.config.resolution), si(Cost.of(net.config).macs)]
        share = f"{100 * timed['used'] / timed['most']:.1f} %"
        accuracy = f"{published_fit()(net):.1f}"
        rows.append([f"time here <= {timed['most']:.3g} ms", *answer, accuracy, timed["binding"] or "none", share])
    header = ["targets", "phi", "d", "w", "pixels", "MACs", "top-1 by the fit", "binding", "used of it"]
    best = search(**FILLED)[0]
    limits = "\n".join(
        f"{'' if number else 'subject to':<12}{limit.name}(N) <= {limit.most:,.0f}" for number, limit in enumerate(best.limits)
    )
    taken = ", ".join(f"{limit.name} {limit.used:,.0f}" for limit in best.limits)
    least = Cost.of(B0.scaled()).macs
    try:
        search(macs=least / 2)
    except ValueError as error:
        refusal = str(error)
    return (
        f"## The constrained problem, filled in\n\n"
        f"Equation 2 asks for the d, w, r with the highest accuracy of N(d, w, r) whose memory and FLOPs are within targets; "
        f"equation 3 ties the three to one phi. `effnet_fast.scaling.search` solves it, over phi or freely over the three. Filled "
        f"in once:\n\n"
        f"```\nmaximise    top-1(N(d, w, r)),  d = {LAW.alpha:g}^phi, w = {LAW.beta:g}^phi, r = {LAW.gamma:g}^phi\n{limits}\n"
        f"solution    phi = {best.net.phi:.6g}: top-1 {best.accuracy:.2f} by the fit, {taken}; binding: {best.binding}\n```\n\n"
        f"And for other targets, those named after a net being what that net takes:\n\n"
        f"{table(header, rows)}\n\n"
        f"Accuracy is a fit, not a measurement: {published_fit()}.\n\n"
        f"Where nothing fits, the error says by how much: `{refusal}`."
    )


def _asked(budget: dict[str, Any]) -> str:
    told = []
    for name in ("macs", "parameters", "memory"):
        if name in budget:
            value = budget[name]
            amount = f"{value.upper()}'s" if isinstance(value, str) else si(value, "B" if name == "memory" else "")
            told.append(f"{name.replace('macs', 'MACs')} <= {amount}")
    if budget.get("training"):
        told[-1] += f" in training, batch {budget['batch']}"
    return " and ".join(told) + (", d, w, r free" if budget.get("over") == "free" else "")


def _found(found: Found) -> list[str]:
    net = found.net
    place = ["-" if net.phi is None else f"{net.phi:.4g}", f"x{net.depth:.3g}", f"x{net.width:.3g}", str(found.config.resolution)]
    shares = [f"{100 * limit.used / limit.most:.1f} %" for limit in found.limits if limit.name == found.binding]
    accuracy = f"{found.accuracy:.1f}" + (" (extrapolated)" if published_fit().beyond(net) else "")
    return [*place, si(found.cost.macs), accuracy, found.binding or "none", *(shares or ["-"])]


def _growth(families: dict[str, tuple[Growth, ...]]) -> str:
    quantities = [name.removesuffix("_rule") for name in Growth._fields if name.endswith("_rule")]
    rows = [
        [name, row.label, *(_beside(getattr(row, one), getattr(row, f"{one}_rule")) for one in quantities)]
        for name, grown in families.items()
        for row in grown
    ]
    memory = []
    for row in families[B0.name]:
        net = LAW.at(1) if row.label.startswith("phi") else LAW.scaled(row.depth, row.width, row.resolution)
        cost = Cost.of(net.config)
        taken = cost.inference_memory().total, cost.training_memory(batch=TRAINED).total
        memory.append([row.label, *(si(total, "B") for total in taken)])
    spread = ", ".join(
        f"{label} {min(values):.2f} to {max(values):.2f} (rule {rule:g})"
        for number, label, rule in ((n, row.label, row.macs_rule) for n, row in enumerate(families[B0.name]))
        for values in [[grown[number].macs for grown in families.values()]]
    )
    return (
        f"## What doubling each dimension does\n\n"
        f"Multiply-adds should grow as depth x width^2 x resolution^2, parameters as depth x width^2, what convolutions write as "
        f"depth x width x resolution^2. Counted, over all {len(families)} base nets: {spread}. Depthwise convolutions grow with "
        f"the width and not its square; stem and head have no depth; layers and channels are rounded, and feature maps are "
        f"rounded up at each stride.\n\n"
        f"![growth](scaling-growth.png)\n\n"
        f"Times the base's, and what the rule says; depthwise are the MACs of depthwise convolutions alone, peak the elements "
        f"alive at once in inference, saved those kept to train:\n\n"
        f"<details><summary>every base net</summary>\n\n"
        f"{table(['base', 'scaled', *quantities], rows)}\n\n"
        f"</details>\n\n"
        f"In bytes, of {B0.name} in fp32:\n\n"
        f"{table(['scaled', 'inference, one image', f'training with Adam, batch {TRAINED}'], memory)}"
    )


def _beside(value: float | None, rule: float) -> str:
    return "-" if value is None else f"{value:.2f} ({rule:.3g})"


def _phi() -> str:
    base, product = Cost.of(LAW.at(0).config).macs, LAW.constraint.value
    rows = []
    for phi in PHIS:
        net = LAW.at(phi)
        cost = Cost.of(net.config)
        growth = [f"{cost.macs / base:.2f}", f"{2**phi}", f"{product**phi:.2f}"]
        nearest = net.nearest.name.removeprefix("efficientnet_") if net.nearest else ""
        rows.append([str(phi), str(net.config.resolution), f"{cost.parameters:,}", si(cost.macs), *growth, nearest])
    header = ["phi", "pixels", "parameters", "MACs", "of phi = 0", "2^phi", f"{product:.3f}^phi", "nearest published"]
    alone = []
    for phi in (LITTLE, 1):
        for row in compound_growth(LAW, phi):
            made = [f"{value:.3f}" for value in (row.macs, row.macs_rule, row.layers, row.channels, row.pixels)]
            alone.append([f"{phi:g}", row.label, *made])
    jump = Cost.of(LAW.at(LITTLE).config).macs / base
    side = B0.resolution + 1
    odd = Cost.of(B0.scaled(resolution=side)).macs / base
    return (
        f"## FLOPs as a function of phi\n\n"
        f"With alpha {LAW.alpha:g}, beta {LAW.beta:g}, gamma {LAW.gamma:g} each step of phi multiplies d w^2 r^2 by alpha beta^2 "
        f"gamma^2 = {product:.4g}, which the paper calls about 2. What is counted begins above that: at phi = {LITTLE:g} it is "
        f"already {jump:.2f} times {B0.name}. Layers are rounded up, and so are feature maps at each stride: one pixel more, "
        f"{side} a side, alone makes {odd:.3f} times the multiply-adds. Channels go to the nearest multiple of eight. The "
        f"published nets are a table of their own and no points of the law.\n\n"
        f"{table(header, rows)}\n\n"
        f"Each dimension alone at a small phi and at one, as times the base's, and what rounding made of the multipliers:\n\n"
        f"{table(['phi', 'scaled', 'MACs', 'rule', 'layers', 'channels', 'pixels of the image'], alone)}\n\n"
        f"![phi](scaling-phi.png)"
    )


def _layers() -> str:
    changes = thresholds(LAW, PHIS[-1])
    rows = []
    for number, stage in enumerate(B0.stages):
        of_stage = [change for change in changes if change.part == f"blocks.{number}"]
        phis = [f"{change.phi:.2f}" for change in of_stage if change.quantity == "layers"]
        wider = [f"{change.phi:.2f}" for change in of_stage if change.quantity == "channels"]
        rows.append([f"blocks.{number}", str(stage.layers), ", ".join(phis), str(stage.out_channels), ", ".join(wider[:4])])
    deeper = sum(change.quantity == "layers" for change in changes)
    header = ["stage", "layers", "one more just above phi =", "channels", "eight more from phi = (the first four)"]
    return (
        f"## When new layers appear\n\n"
        f"A stage of n layers has ceil(n alpha^phi), so it gains one just above each phi where n alpha^phi is whole; channels are "
        f"rounded to multiples of eight. Up to phi = {PHIS[-1]} that happens {deeper} times with layers and "
        f"{len(changes) - deeper} times with channels:\n\n"
        f"{table(header, rows)}"
    )


def _family(measured: Results, milliseconds: dict[str, float]) -> str:
    first, last = FAMILY[0], FAMILY[-1]
    more = convention(last).macs / convention(first).macs
    turns = len(measured["latencies"][0]["turns_ms"])
    versions = [[net.name, f"{net.top1:.1f}", *(f"{nets[net.name][0]:.1f}" for nets in VERSIONS.values())] for net in FAMILY]
    slower = [max(row["turns_ms"]) / min(row["turns_ms"]) - 1 for row in measured["latencies"]]
    return (
        f"## The family side by side\n\n"
        f"Counts are computed by one convention (`effnet-fast tables --help`) beside those that {PAPER}, table 2, prints; "
        f"`effnet-fast tables` lists what other rules give. Top-1 and top-5 are as often quoted, a column that the table has in "
        f"neither v1 nor v5. By it top-1 rises from {first.name} to {last.name} by {last.top1 - first.top1:.1f} points for "
        f"{more:.0f} times the multiply-adds.\n\n"
        f"{_published(FAMILY, milliseconds)}\n\n"
        f"Beside table 2 of both versions:\n\n"
        f"{table(['net', 'top-1 as often quoted', *(f'{version} top-1' for version in VERSIONS)], versions)}\n\n"
        f"![accuracy](scaling-accuracy.png)\n\n"
        f"Times are of one image in {measured['dtype']}, by the frozen copy that `optimize_for_inference` makes (ResNets run in it "
        f"as plain PyTorch), the median of the quicker of {turns} turns. The slower one took over {100 * DRIFT:.0f} % longer with "
        f"{sum(share > DRIFT for share in slower)} of {len(slower)} nets, at most {100 * max(slower):.0f} %."
    )


def _published(nets: Sequence[PublishedNet], milliseconds: dict[str, float]) -> str:
    rows = []
    for net in nets:
        cost = convention(net)
        told = [net.name, f"{net.depth:g}", f"{net.width:g}", str(round(net.base.resolution * net.resolution))]
        accuracies = [f"{net.top1:.1f}", "-" if net.top5 is None else f"{net.top5:.1f}"]
        counts = [*_compared(net.parameters, cost.parameters), *_compared(net.flops, cost.macs)]
        time = f"{milliseconds[net.name]:.4g}" if net.name in milliseconds else "-"
        rows.append([*told, *accuracies, *counts, time])
    header = ["net", "d", "w", "pixels", "top-1", "top-5", "parameters printed", "computed", "FLOPs printed", "computed", "ms here"]
    return table(header, rows)


def _compared(printed: Figure | None, computed: float) -> tuple[str, str]:
    """As printed and as computed, with the difference where the one does not round to the other."""
    if printed is None:
        return "-", si(computed)
    off = "" if printed.agrees(computed) else f" ({100 * (computed / printed.value - 1):+.1f} %)"
    return printed.text, f"{si(computed)}{off}"


def _scaled(milliseconds: dict[str, float]) -> str:
    base, *forms = B0_SCALED
    gains = {form.name.partition(" ")[2]: form.top1 - base.top1 for form in forms}
    *alone, together = gains.values()
    told = ", ".join(f"{how} {gain:+.1f}" for how, gain in gains.items())
    return (
        f"## One dimension at a time, and all three\n\n"
        f"{PAPER}, table 7, scales {base.name} by four methods to about the same multiply-adds. Top-1 gained: {told}. The best "
        f"dimension alone brings {max(alone):.1f} points, all three {together:.1f}.\n\n"
        f"![methods](scaling-methods.png)\n\n"
        f"{_published(B0_SCALED, milliseconds)}\n\n"
        f"The same of other bases (table 3). The paper's figure 3 shows more steps of each dimension, but as a plot without "
        f"numbers, so only rows of its tables are drawn; the dashed curves are the fit above, whose form saturates by assumption.\n"
        f"\n"
        f"![dimensions](scaling-dimensions.png)\n\n"
        f"{_published(SCALED_UP, milliseconds)}"
    )


def _rivals() -> str:
    family = {net.name: net for net in FAMILY}
    rows = []
    for one in RIVALS:
        net = family[one.group]
        cost = convention(net)
        ratios = [f"{one.parameters.value / cost.parameters:.1f}", f"{one.flops.value / cost.macs:.1f}" if one.flops else "-"]
        flops = one.flops.text if one.flops else "-"
        accuracies = [f"{net.top1:.1f}", f"{VERSIONS['v5'][net.name][0]:.1f}"]
        rows.append([one.name, f"{one.top1:.1f}", one.parameters.text, flops, net.name, *accuracies, *ratios])
    header = ["net", "top-1", "parameters", "FLOPs", "beside", "its top-1 as often quoted", "in v5"]
    header += ["times its parameters", "times its FLOPs"]
    transfers = [[one.dataset, one.net, f"{one.accuracy:g}", one.parameters.text if one.parameters else "-"] for one in TRANSFER]
    return (
        f"## The nets of others\n\n"
        f"As {PAPER}, table 2, prints them, over our count of the net beside them, whose top-1 is told as often quoted and as that "
        f"version has it:\n\n"
        f"{table(header, rows)}\n\n"
        f"And on other data sets (table 5):\n\n"
        f"{table(['data set', 'net', 'accuracy, %', 'parameters'], transfers)}"
    )


def _savings() -> str:
    from benchmarks.scaling_figures import CHANNELS, EXPANSION, KERNELS, SAVINGS

    few, many = round(CHANNELS[0]), round(CHANNELS[-1])
    rows = [
        [title.replace("\n", " "), f"{kernel}x{kernel}", *(f"{100 * saved(count, kernel):.1f} %" for count in (few, many))]
        for title, saved in SAVINGS.items()
        for kernel in KERNELS
    ]
    return (
        f"## What a depthwise block saves\n\n"
        f"A depthwise separable convolution takes 1/C_out + 1/k^2 of a dense one's multiply-adds. An inverted residual block "
        f"expands by {EXPANSION} first, so it is compared with itself with a dense expanding convolution (EfficientNetV2's fused "
        f"block), and with one dense convolution that does not expand, where less than nothing saved means that it costs more. "
        f"Counted, without squeeze-excite:\n\n"
        f"![saving](scaling-saving.png)\n\n"
        f"{table(['block', 'kernel', f'{few} channels', f'{many} channels'], rows)}"
    )


def of_grid(result: Results, place: Path = Path()) -> str:
    nets = result["scaled"]["nets"]
    base = next(row["macs"] for row in nets if row["label"] == "phi=0")
    points = sorted(result["points"], key=lambda point: (-point["accuracy"], point["macs"]))
    rows = []
    for point in points[:GRID_ROWS]:
        a, b, c = (point[name] for name in ("alpha", "beta", "gamma"))
        cost = [f"{a * b**2 * c**2:.3f}", f"{point['macs'] / base:.2f}"]
        rows.append([*(f"{value:g}" for value in (a, b, c)), *cost, f"{100 * point['accuracy']:.2f}"])
    header = ["alpha", "beta", "gamma", "alpha beta^2 gamma^2", "MACs, times the base's", "held out right, %"]
    scaled = [[row["label"], f"{row['macs'] / base:.2f}", f"{100 * row['accuracy']:.2f}"] for row in nets]
    spread = [point["macs"] / base for point in points]
    *_, law = (row for row in nets if row["label"].startswith("phi"))
    ahead = [
        f"{row['label']} by {100 * (row['accuracy'] - law['accuracy']):.2f} %"
        for row in nets
        if row["macs"] < law["macs"] and row["accuracy"] > law["accuracy"]
    ]
    verdict = (
        f"With fewer MACs more is scored than by the law's {law['label']}: {', '.join(ahead)}, so the law is not shown best here"
        if ahead
        else f"Nothing with fewer MACs scored more than the law's {law['label']}"
    )
    best, searched, machine = result["best"], result["search"], result["machine"]
    return (
        f"## The grid search, really run\n\n"
        f"`effnet-fast grid` trained all {len(points)} laws whose product is within {searched['tolerance']:g} of 2, in steps of "
        f"{searched['step']:g}, on {searched['data']} for {searched['recipe']['epochs']} epochs with seeds "
        f"{', '.join(map(str, searched['seeds']))}, in {result['seconds']:.0f} s ({machine['cpu']}, commit {machine['commit']}). "
        f"The best {len(rows)}, judged by {result['held_out']} held-out images:\n\n"
        f"{table(header, rows)}\n\n"
        f"The first, alpha {best['alpha']:g}, beta {best['beta']:g}, gamma {best['gamma']:g}, scaled on with other seeds:\n\n"
        f"{table(['net', header[4], 'held out right, %'], scaled)}\n\n"
        f"![grid]({place / 'grid-digits.png'})\n\n"
        f"One held-out image is {100 / result['held_out']:.2f} %; the best and the last of these {len(rows)} rows are "
        f"{100 * (points[0]['accuracy'] - points[len(rows) - 1]['accuracy']):.2f} % apart. The laws are not ranked at equal "
        f"budgets: rounding makes their nets {min(spread):.2f} to {max(spread):.2f} times the base's MACs. {verdict}."
    )


def _lab(result: Results, place: Path) -> str:
    name, recipe, machine = result["experiment"], result["recipe"], result["rows"][-1]["machine"]
    rows = [
        [row["label"], str(row["resolution"]), f"{row['parameters']:,}", si(row["macs"]), _right(row)] for row in result["rows"]
    ]
    published = [
        [value["net"], value["data"], f"{value['parameters']:.2f} M", f"{value['top1']:g}", value["source"]]
        for value in result["published"]
    ]
    options = "".join(f" --{option} {value:g}" for option, value in result["size"].items() if value != getattr(Size(), option))
    return (
        f"## The laboratory: {result['title']}\n\n"
        f"`effnet-fast lab {name} --epochs {recipe['epochs']} --batch-size {recipe['batch_size']}{options}` on {result['data']}, "
        f"seed {result['seed']} ({machine['cpu']}, commit {machine['commit']}, {machine['date']}):\n\n"
        f"{table(['run', 'pixels', 'parameters', 'MACs', 'held out right, %'], rows)}\n\n"
        f"Published, each on the data named:\n\n"
        f"{table(['net', 'on', 'parameters, counted', 'right, %', 'source'], published)}\n\n"
        f"![{name}]({place / 'lab' / f'{name}.png'})"
    )


def _right(row: Results) -> str:
    return "no finite loss" if row["top1"] is None else f"{row['top1']:.2f}"


def _courses() -> str:
    rows = [[claim.said, claim.so] for claim in claims()]
    return f"## What courses and slides say, and what is so\n\n{table(['said', 'so'], rows)}"
