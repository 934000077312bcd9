"""A network as a table of its stages, with what each costs: what ``summary`` and ``scale`` print."""

from __future__ import annotations

from typing import Any

from effnet_fast.cli.table import si, table
from effnet_fast.scaling import Cost, NetConfig

_NAMES = {"mbconv": "MBConv", "fused_mbconv": "FusedMBConv", "separable": "Separable", "basic": "Basic", "bottleneck": "Bottleneck"}
_HEADER = (
    "stage",
    "operator",
    "kernel",
    "stride",
    "expand",
    "SE",
    "in",
    "out",
    "layers",
    "input",
    "parameters",
    "MACs",
    "activations",
)


def stage_rows(config: NetConfig, cost: Cost) -> list[dict[str, Any]]:
    """One dict a stage, stem and head included. ``resolution`` is (height, width) of the stage's input."""
    parts = cost.by("stage")
    channels = [config.in_channels, config.stem_channels, *(stage.out_channels for stage in config.stages)]
    kernel, pool = config.stem_kernel, ", max pool" if config.stem_pool else ""
    stem = f"Conv{kernel}x{kernel}{pool}"
    rows = [_row("stem", parts["stem"], stem, kernel, config.stem_stride, None, None, channels[0], channels[1], 1)]
    for number, stage in enumerate(config.stages):
        name, operator = (
            f"blocks.{number}",
            _NAMES[stage.operator] + (str(stage.expand_ratio) if "mbconv" in stage.operator else ""),
        )
        ends = channels[number + 1], channels[number + 2]
        rows.append(
            _row(
                name,
                parts[name],
                operator,
                stage.kernel_size,
                stage.stride,
                stage.expand_ratio,
                stage.se_ratio,
                *ends,
                stage.layers,
            )
        )
    steps = ["Conv1x1"] * bool(config.head_channels) + ["pool"] + ["linear"] * bool(config.num_classes)
    made = config.num_classes or config.features
    rows.append(_row("head", parts["head"], ", ".join(steps), 1, 1, None, None, channels[-1], made, 1))
    return rows


def _row(
    stage: str,
    part: Cost,
    operator: str,
    kernel_size: int,
    stride: int,
    expand_ratio: int | None,
    se_ratio: float | None,
    in_channels: int,
    out_channels: int,
    layers: int,
) -> dict[str, Any]:
    return {
        "stage": stage,
        "operator": operator,
        "kernel_size": kernel_size,
        "stride": stride,
        "expand_ratio": expand_ratio,
        "se_ratio": se_ratio,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "layers": layers,
        "resolution": part.layers[0].input_shapes[0][1:],
        "parameters": part.parameters,
        "macs": part.macs,
        "activations": part.activations,
    }


def stage_table(rows: list[dict[str, Any]], cost: Cost) -> str:
    """The rows as text, the totals last."""
    lines = [
        (
            row["stage"],
            row["operator"],
            f"{row['kernel_size']}x{row['kernel_size']}",
            row["stride"],
            row["expand_ratio"],
            row["se_ratio"] or None,
            row["in_channels"],
            row["out_channels"],
            row["layers"],
            "x".join(map(str, row["resolution"])),
            row["parameters"],
            si(row["macs"]),
            si(row["activations"]),
        )
        for row in rows
    ]
    total = ("total", *[""] * 7, sum(row["layers"] for row in rows), "", cost.parameters, si(cost.macs), si(cost.activations))
    return table(_HEADER, [*lines, total], "llrrrrrrrrrrr")


def cost_json(config: NetConfig, cost: Cost) -> dict[str, Any]:
    """The network and its totals as plain values, stages included."""
    return {
        "name": config.name,
        "resolution": cost.layers[0].input_shapes[0][1:],
        "parameters": cost.parameters,
        "macs": cost.macs,
        "activations": cost.activations,
        "dropout": config.dropout,
        "drop_path": config.drop_path,
        "stages": stage_rows(config, cost),
    }
