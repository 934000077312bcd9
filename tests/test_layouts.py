"""The key maps against the libraries themselves: keys, shapes, and the order of the entries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import nn

from effnet_fast.models import FAMILY, create_model, efficientnet
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.weights.layouts import LAYOUTS, convention, detect, key_map, shapes

efficientnet_pytorch = pytest.importorskip("efficientnet_pytorch")

B = [f"b{number}" for number in range(8)]
# A tf_ form has its plain form's tensors (tested below): one of the two is enough.
PLAIN = [name for name in FAMILY if not name.startswith("tf_")]
TIMM = [name if timm.is_model(name) else f"tf_{name}" for name in PLAIN]
TORCHVISION = {
    **{f"efficientnet_{b}": f"efficientnet_{b}" for b in B},
    **{f"efficientnetv2_{s}": f"efficientnet_v2_{s}" for s in "sml"},
}


def peer(library: str, name: str) -> nn.Module:
    """The library's own net of that name, on the meta device."""
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name)
        if library == "torchvision":
            return torchvision.models.get_model(TORCHVISION[name])
        return efficientnet_pytorch.EfficientNet.from_name(name.removeprefix("tf_").replace("_", "-"))


CASES = [
    *(("timm", name) for name in TIMM),
    *(("torchvision", name) for name in TORCHVISION),
    *(("lukemelas", f"efficientnet_{b}") for b in [*B, "b8"]),
]


@pytest.mark.parametrize(("library", "name"), CASES, ids="-".join)
def test_keys_shapes_and_order_are_the_library_s_own(library: str, name: str) -> None:
    config = FAMILY[name]
    names = key_map(config, library)
    theirs = {key: tuple(value.shape) for key, value in peer(library, name).state_dict().items()}
    assert list(names.values()) == list(theirs)
    assert {names[key]: shape for key, shape in shapes(config).items()} == theirs
    assert detect(theirs) == library


@pytest.mark.parametrize("name", PLAIN)
def test_the_map_starts_from_our_own_state_dict(name: str) -> None:
    with torch.device("meta"):
        ours = EfficientNet(FAMILY[name]).state_dict()
    assert shapes(FAMILY[name]) == {key: tuple(value.shape) for key, value in ours.items()}
    assert list(key_map(FAMILY[name], "timm").items()) == [(key, key) for key in ours]
    assert list(shapes(FAMILY[f"tf_{name}"]).items()) == list(shapes(FAMILY[name]).items())


def test_a_point_of_the_law_has_a_name_in_every_layout() -> None:
    config = efficientnet(0.4, num_classes=0).config
    for layout in LAYOUTS:
        names = key_map(config, layout)
        assert len(set(names.values())) == len(names) == len(shapes(config))
        assert detect(names.values()) == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_backbone_s_keys_are_enough_to_tell_the_layout(layout: str) -> None:
    names = key_map(FAMILY["efficientnet_b0"], layout)
    ours = create_model("efficientnet_b0", features_only=True).state_dict()
    assert detect(names[key] for key in ours) == layout


def test_what_is_in_no_layout_is_described() -> None:
    keys = torchvision.models.resnet18().state_dict()
    with pytest.raises(
        ValueError, match=r"no layout known here: \d+ of 122 fit the nearest, timm; the first are conv1.weight, bn1.weight"
    ):
        detect(keys)
    with pytest.raises(ValueError, match="no layout"):
        detect([])


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("efficientnet_b0", "keras", "layout is 'keras'; one of 'timm', 'torchvision', 'lukemelas' would do"),
        ("efficientnet_lite0", "torchvision", "torchvision has no net without squeeze-excite such as efficientnet_lite0"),
        ("efficientnet_lite0", "lukemelas", "lukemelas has no net without squeeze-excite"),
        ("efficientnetv2_s", "lukemelas", "lukemelas has no FusedMBConv, which efficientnetv2_s is built of"),
    ],
)
def test_a_net_that_a_library_has_not_is_refused(name: str, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        key_map(FAMILY[name], layout)


@pytest.mark.parametrize(("library", "name"), [case for case in CASES if case[0] != "timm"], ids="-".join)
def test_conventions_are_the_library_s_own(library: str, name: str) -> None:
    model = peer(library, name)
    rules = convention(FAMILY[name], library)
    assert rules is not None
    norms = {(module.eps, round(module.momentum, 6)) for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert norms == {(rules.bn_eps, rules.bn_momentum)}
    own = {module.padding for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)}
    assert own == ({(1, 1)} if rules.padding == "symmetric" else {(0, 0)})


def test_timm_s_layout_says_nothing_of_its_convention() -> None:
    assert convention(FAMILY["efficientnet_b0"], "timm") is None
    assert convention(replace(FAMILY["efficientnet_b0"], name="mine"), "lukemelas") == ("same", 1e-3, 0.01)
