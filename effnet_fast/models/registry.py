"""Models by name, by a point of the scaling law, or by any config."""

from __future__ import annotations

import difflib
import fnmatch
import math
import os
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

from effnet_fast import weights
from effnet_fast.models.classics import MnasNet, MobileNetV2, ResNet
from effnet_fast.models.efficientnet import EfficientNet, EfficientNetFeatures
from effnet_fast.models.family import CLASSICS, FAMILY
from effnet_fast.models.net import Classifier
from effnet_fast.scaling.config import NetConfig
from effnet_fast.scaling.law import CompoundScaling

_NAMED = {**FAMILY, **CLASSICS}
_CLASSES: dict[str, type[Classifier]] = {
    "efficientnet": EfficientNet,
    "mobilenet_v2": MobileNetV2,
    "mnasnet": MnasNet,
    "resnet": ResNet,
}
# Constructor argument: the NetConfig field that it sets.
_CONFIG_ARGUMENTS = {
    "num_classes": "num_classes",
    "in_chans": "in_channels",
    "drop_path_rate": "drop_path",
    "bn_eps": "bn_eps",
    "bn_momentum": "bn_momentum",
    "pad_type": "padding",
}
_LAYER_ARGUMENTS = ("norm_layer", "act_layer")
_CLASSIFIER_ARGUMENTS = ("drop_rate", "global_pool", *_LAYER_ARGUMENTS)
_FEATURES_ARGUMENTS = ("out_indices", *_LAYER_ARGUMENTS)
_OTHER_ARGUMENTS = ("features_only", "output_stride", "checkpoint_path")
_PADDINGS = {"": "symmetric", "symmetric": "symmetric", "same": "same"}


def list_models(pattern: str = "*") -> list[str]:
    """The names that :func:`create_model` takes, those matching a shell pattern such as ``"tf_*b?"``."""
    return sorted(fnmatch.filter(_NAMED, pattern))


def config_of(name: str) -> NetConfig:
    """The config of a name, a tag of weights behind it or not; ValueError with the nearest good name for an unknown one."""
    name = name.partition(".")[0]
    if name not in _NAMED:
        raise ValueError(f"unknown model {name!r}; {_nearest(name, list(_NAMED))} would do (list_models() gives all)")
    return _NAMED[name]


def create_model(name: str, pretrained: bool | str = False, **arguments: Any) -> Classifier | EfficientNetFeatures:
    """Build a network by name, such as ``"efficientnet_b5"``, or ``"efficientnet_b0.ra_in1k"`` with the tag of its weights.

    pretrained       True (the name's default weights), the tag of others, or the path of a checkpoint file or of a directory
                     that holds one; see effnet_fast.weights
    num_classes      1000; 0 for none. Weights for another number load all but the classifier
    in_chans         3; pretrained stems are summed (1) or repeated and rescaled
    drop_rate, drop_path_rate   of the row (the paper's) where not given
    global_pool      "avg", "max", "avgmax", ""
    norm_layer, act_layer       factories (channels) -> module and () -> module; other than batch norm and the ops' activations
                     run unfused
    bn_eps, bn_momentum, pad_type ("", "same")   of the row where not given
    features_only, out_indices  a backbone that returns feature maps (EfficientNets and MobileNetV1)
    checkpoint_path  a file to load strictly, after all else

    Raises ValueError or TypeError that names an unknown name or argument and the nearest good one.
    """
    name, _, tag = name.partition(".")
    if tag:
        pretrained = tag if pretrained is True or not pretrained else pretrained
    return _build(config_of(name), pretrained, arguments)


def efficientnet(
    phi: float | None = None,
    *,
    depth: float | None = None,
    width: float | None = None,
    resolution: float | None = None,
    law: CompoundScaling | None = None,
    **arguments: Any,
) -> Classifier | EfficientNetFeatures:
    """Build any point of the law: at ``phi``, or at multipliers of its base's depth, width and resolution (each > 0, default 1).

    law  the paper's of B0 where None; ``CompoundScaling(base=effnet_fast.scaling.RESNET18)`` scales another net

    ``model.config`` holds what resulted, its resolution too. ``arguments`` are those of :func:`create_model`.
    """
    if "pretrained" in arguments:
        raise TypeError(
            "efficientnet: no weights were trained for a point of the law; create_model(name, pretrained=True) would do"
        )
    law = law or CompoundScaling()
    multipliers = {"depth": depth, "width": width, "resolution": resolution}
    given = {key: value for key, value in multipliers.items() if value is not None}
    if (phi is None) == (not given):
        raise ValueError("efficientnet: phi or some of depth, width, resolution would do, not both or none")
    point = law.at(phi) if phi is not None else law.scaled(**given)
    return _build(point.config, False, arguments)


def build(config: NetConfig, **arguments: Any) -> Classifier:
    """The classifier of any config; ``arguments`` are those of its class (drop_rate, global_pool, norm_layer, act_layer)."""
    return _CLASSES[config.family](config, **arguments)


def _build(config: NetConfig, pretrained: bool | str, arguments: dict[str, Any]) -> Classifier | EfficientNetFeatures:
    known = (*_CONFIG_ARGUMENTS, *_CLASSIFIER_ARGUMENTS, *_FEATURES_ARGUMENTS, *_OTHER_ARGUMENTS)
    for argument in arguments:
        if argument not in known:
            raise TypeError(f"{config.name}: unknown argument {argument!r}; {_nearest(argument, list(known))} would do")
    if arguments.get("output_stride", 32) != 32:
        raise ValueError(f"{config.name}: output_stride {arguments['output_stride']} would need dilation; 32 would do")
    features_only = arguments.get("features_only", False)
    if features_only and config.family != "efficientnet":
        raise ValueError(f"{config.name}: features_only is {features_only!r}; False would do: only EfficientNets give feature maps")
    unused = set(_CLASSIFIER_ARGUMENTS if features_only else _FEATURES_ARGUMENTS) - set(_LAYER_ARGUMENTS)
    for argument in sorted(unused & arguments.keys()):
        raise TypeError(f"{config.name}: {argument!r} has no meaning with features_only={features_only}")

    _check_probability(config.name, "drop_rate", arguments.get("drop_rate") or 0)
    for argument in _LAYER_ARGUMENTS:
        if arguments.get(argument) is not None and not callable(arguments[argument]):
            raise TypeError(
                f"{config.name}: {argument} is {arguments[argument]!r}; a class or factory, such as torch.nn.ReLU, would do"
            )
    fields = {field: arguments[name] for name, field in _CONFIG_ARGUMENTS.items() if arguments.get(name) is not None}
    built = replace(config, **_checked(config.name, fields))
    if features_only:
        model: Classifier | EfficientNetFeatures = EfficientNetFeatures(
            built, **{key: arguments[key] for key in _FEATURES_ARGUMENTS if key in arguments}
        )
    else:
        model = build(built, **{key: arguments[key] for key in _CLASSIFIER_ARGUMENTS if key in arguments})
    if pretrained:
        weights.load_pretrained(model, pretrained)
    if arguments.get("checkpoint_path"):
        weights.load_checkpoint(model, os.fspath(arguments["checkpoint_path"]))
    return model


def _checked(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, each of the right type and range."""
    if "padding" in fields:
        if fields["padding"] not in _PADDINGS:
            raise ValueError(f"{name}: pad_type is {fields['padding']!r}; '' or 'same' would do")
        fields["padding"] = _PADDINGS[fields["padding"]]
    for field, least in (("num_classes", 0), ("in_channels", 1)):
        value = fields.get(field, least)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: {field} is {value!r}; a whole number >= {least} would do")
        if field in fields:
            fields[field] = int(value)
    _check_probability(name, "drop_path_rate", fields.get("drop_path", 0))
    if not _is_number(fields.get("bn_eps", 1e-5)) or fields.get("bn_eps", 1e-5) <= 0:
        raise ValueError(f"{name}: bn_eps is {fields['bn_eps']!r}; a number > 0 would do")
    _check_probability(name, "bn_momentum", fields.get("bn_momentum", 0.1), most=1)
    return fields


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_probability(name: str, argument: str, value: Any, most: float = math.nextafter(1, 0)) -> None:
    if not _is_number(value) or not 0 <= value <= most:
        raise ValueError(f"{name}: {argument} is {value!r}; a number in [0, 1{']' if most == 1 else ')'} would do")


def _nearest(word: str, known: list[str]) -> str:
    found = difflib.get_close_matches(str(word), known, n=1, cutoff=0.0)
    return repr(found[0])
