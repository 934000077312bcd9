"""Images from files to labels and class activation maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from effnet_fast.inference import class_activation_maps, optimize_for_inference, predict
from effnet_fast.inference.images import (
    check_images,
    find_images,
    prepare,
    read_image,
    resize_and_crop,
    resized_size,
    seen_box,
)
from effnet_fast.models import EfficientNet, create_model, efficientnet
from effnet_fast.weights import Preprocessing

RNG = np.random.default_rng(0)


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    """Smooth at the top and noisy below, so that both filtering and cropping show."""
    ramp = np.linspace(0, 255, width)[None, :, None] * np.linspace(0.2, 1, channels)
    grain = RNG.integers(0, 256, (height, width, channels))
    mix = np.linspace(0, 1, height)[:, None, None]
    return np.rint(ramp * (1 - mix) + grain * mix).astype(np.uint8)


def small_net(in_chans: int = 3) -> EfficientNet:
    """A B0 of a quarter of the width, its classifier large enough that images get different labels."""
    torch.manual_seed(0)
    net = efficientnet(depth=0.3, width=0.25, resolution=0.3, in_chans=in_chans, num_classes=7)
    assert isinstance(net, EfficientNet)
    torch.nn.init.normal_(net.classifier.weight, std=1.0)
    torch.nn.init.normal_(net.classifier.bias)
    for module in net.modules():  # statistics of noise, so that the features depend on the image
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    net.train()
    with torch.no_grad():
        net(torch.randn(16, in_chans, 64, 64))
    return net.eval()


SMALL = Preprocessing(64, 72)

PREPROCESSINGS = [
    Preprocessing.of(224),
    Preprocessing.of(224, 0.875, interpolation="bilinear"),
    Preprocessing.of(288, 1.0, mean=(0.5,) * 3, std=(0.5,) * 3),
    Preprocessing.of(300, 0.904),
    Preprocessing.of(97, 0.9, crop_mode="squash"),
]


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS, ids=str)
@pytest.mark.parametrize("size", [(640, 427), (427, 640), (33, 57), (256, 256), (301, 300)], ids=str)
def test_preparation_is_torchvisions_to_the_last_bit(preprocessing: Preprocessing, size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    target = (preprocessing.resize,) * 2 if preprocessing.crop_mode == "squash" else preprocessing.resize
    theirs = transforms.Compose(
        [
            transforms.Resize(target, InterpolationMode(preprocessing.interpolation)),
            transforms.CenterCrop(preprocessing.crop),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )(image)
    ours = torch.from_numpy(prepare(image, preprocessing))
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert torch.equal(ours, theirs)


def test_preparation_is_timms() -> None:
    from timm.data import create_transform

    image = Image.fromarray(noise(500, 333))
    theirs = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875)(image)
    assert torch.equal(torch.from_numpy(prepare(image, Preprocessing.of(224, 0.875))), theirs)


def test_preparation_of_greyscale() -> None:
    image = Image.fromarray(noise(40, 30, 1)[..., 0])
    ours = prepare(image, Preprocessing(24, 24, mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3)))
    assert ours.shape == (1, 24, 24)
    np.testing.assert_array_equal(ours, prepare(image, Preprocessing(24, 24, mean=(0.3,), std=(0.2,))))


def test_a_sliver_is_refused_rather_than_made_a_giant() -> None:
    with pytest.raises(ValueError, match="elongated"):
        prepare(Image.new("RGB", (1, 100_000)), Preprocessing.of(224))


@pytest.mark.parametrize("size", [(640, 427), (100, 300)])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_what_is_seen_is_the_crop_of_the_original(size: tuple[int, int], mode: str) -> None:
    preprocessing = Preprocessing(200, 250, crop_mode=mode)
    left, top, right, bottom = seen_box(size, preprocessing)
    width, height = resized_size(size, preprocessing)
    assert right - left == pytest.approx(200 * size[0] / width) and bottom - top == pytest.approx(200 * size[1] / height)
    assert left + right == pytest.approx(size[0], abs=2) and top + bottom == pytest.approx(size[1], abs=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int, tmp_path: Path) -> None:
    upright = noise(24, 16)
    # How the camera stored it, for each orientation: what is undone when it is shown.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.png")), upright)


def test_modes(tmp_path: Path) -> None:
    """Every mode that files have, against what a viewer on white shows."""
    rgb, grey = noise(20, 10), noise(20, 10, 1)[..., 0]
    alpha = np.where(np.arange(20) < 10, 255, 0).astype(np.uint8)[None].repeat(10, 0)
    on_white = np.where(alpha[..., None] > 0, rgb, 255)
    palette = Image.fromarray(rgb).quantize(16)
    clear_palette = palette.copy()
    clear_palette.info["transparency"] = palette.getpixel((0, 0))
    shown = np.asarray(palette.convert("RGB"))
    hidden = np.asarray(palette) == palette.getpixel((0, 0))
    grey_rgb = grey[..., None].repeat(3, 2)
    cases = {
        "rgb.png": (Image.fromarray(rgb), rgb),
        "grey.png": (Image.fromarray(grey), grey_rgb),
        "rgba.png": (Image.fromarray(np.dstack([rgb, alpha])), on_white),
        "la.png": (Image.fromarray(np.dstack([grey, alpha])), np.where(alpha[..., None] > 0, grey_rgb, 255)),
        "palette.png": (palette, shown),
        "clear.png": (clear_palette, np.where(hidden[..., None], 255, shown)),
        "palette.gif": (palette, shown),
        "bits.png": (Image.fromarray(grey > 127), np.where(grey_rgb > 127, 255, 0)),
        "16.png": (Image.fromarray(grey.astype(np.uint16) * 257), grey_rgb),
        "16.tif": (Image.fromarray(grey.astype(np.uint16) * 257), grey_rgb),
        "32.tif": (Image.fromarray(grey.astype(np.int32) * 257), grey_rgb),
        "float.tif": (Image.fromarray(grey.astype(np.float32) / 255), grey_rgb),
        "cmyk.tif": (Image.fromarray(rgb).convert("CMYK"), rgb),
        "rgb.bmp": (Image.fromarray(rgb), rgb),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        read = read_image(tmp_path / name)
        assert read.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(read), expected, err_msg=name)
        one = read_image(tmp_path / name, channels=1)
        assert one.mode == "L" and one.size == (20, 10), name
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match=r"wide\.tif cannot be read: its grey values are"):
        read_image(tmp_path / "wide.tif")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name in ("x.png", "x.jpg", "x.gif", "x.webp", "x.bmp", "x.tif"):
        path = tmp_path / name
        Image.fromarray(noise(64, 64)).save(path)
        whole = path.read_bytes()
        read_image(path)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name} cannot be read: "):
            check_images([tmp_path, path])
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")


def test_directories_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a/x/3.tiff", "a/notes.txt", "c.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_images([tmp_path / "c.webp", tmp_path, tmp_path / "a/notes.txt"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "c.webp", "a/x/3.tiff", "b/1.png", "b/2.JPG", "c.webp", "a/notes.txt",
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        find_images([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_images([tmp_path / "nowhere"])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    paths = [folder / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        pixels = noise(90 + 5 * number, 80) // (number + 1)
        Image.fromarray(pixels).save(path)
    return paths


def test_batches_of_one_and_of_many_agree(photographs: list[Path]) -> None:
    net = small_net()
    names = list("abcdefg")
    one = list(predict(net, photographs, SMALL, top=7, batch=1, classes=names))
    assert [prediction.path for prediction in one] == photographs
    assert len({prediction.labels[0].index for prediction in one}) > 1
    x = torch.stack([torch.from_numpy(prepare(read_image(path), SMALL)) for path in photographs])
    with torch.no_grad():
        direct = net(x).softmax(1)
    for batch in (2, 3, 7, 100):
        many = list(predict(net, photographs, SMALL, top=7, batch=batch, classes=names))
        for left, right, row in zip(one, many, direct, strict=True):
            assert left.path == right.path
            for a, b in zip(left.labels, right.labels, strict=True):
                assert (a.index, a.name) == (b.index, names[b.index])
                assert a.probability == pytest.approx(b.probability, rel=1e-4, abs=1e-6)
                assert b.probability == pytest.approx(float(row[b.index]), rel=1e-4, abs=1e-6)
            assert sum(label.probability for label in right.labels) == pytest.approx(1, abs=1e-5)
            probabilities = [label.probability for label in right.labels]
            assert probabilities == sorted(probabilities, reverse=True)
    assert all(len(prediction.labels) == 2 for prediction in predict(net, photographs, SMALL, top=2))
    assert list(predict(net, [], SMALL)) == []


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "preprocessing", [Preprocessing(64, 70, "squash", "bilinear", (0.3,), (0.2,)), SMALL], ids=["squash", "crop"]
)
def test_any_preprocessing_and_channels_as_the_plain_module(
    photographs: list[Path], preprocessing: Preprocessing, channels: int
) -> None:
    """The copy that predict makes, and one that it is given."""
    net = small_net(channels)
    pixels = [resize_and_crop(read_image(path, channels), preprocessing) for path in photographs]
    assert all(image.shape == (64, 64, channels) and image.dtype == np.uint8 for image in pixels)
    x = torch.stack([torch.from_numpy(prepare(read_image(path, channels), preprocessing)) for path in photographs])
    with torch.no_grad():
        expected = net(x).softmax(1)
    for model in (net, optimize_for_inference(net, preprocessing=preprocessing)):
        for prediction, row in zip(predict(model, photographs, preprocessing, top=7, channels=channels), expected, strict=True):
            for label in prediction.labels:
                assert label.probability == pytest.approx(float(row[label.index]), rel=1e-4, abs=1e-6)


def test_unreadable_files_are_left_out_or_raised(photographs: list[Path], tmp_path: Path) -> None:
    net, broken = small_net(), tmp_path / "broken.png"
    broken.write_bytes(photographs[0].read_bytes()[:200])
    files = [broken, photographs[0], broken, broken, photographs[1]]
    errors: list[Exception] = []
    kept = [prediction.path for prediction in predict(net, files, SMALL, batch=2, unreadable=errors.append)]
    assert kept == photographs[:2] and len(errors) == 3 and all("broken.png" in str(error) for error in errors)
    with pytest.raises(ValueError, match=r"broken\.png"):
        list(predict(net, files, SMALL, batch=2))


def test_predict_refuses(photographs: list[Path]) -> None:
    net = small_net()
    for settings in ({"top": 0}, {"batch": 0}, {"classes": ["a", "b"]}):
        with pytest.raises(ValueError, match="predict: "):
            list(predict(net, photographs, SMALL, **settings))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="training mode"):
        list(predict(net.train(), photographs, SMALL))
    net.eval()
    with pytest.raises(ValueError, match=r"another mean or std; optimize_for_inference\(preprocessing=\) would do"):
        list(predict(optimize_for_inference(net), photographs, Preprocessing(64, 72, mean=(0.5,) * 3)))
    for channels, of_model, better in (
        (1, 3, "3"),
        (3, 1, "1"),
        (5, 5, r"a model of 1 \(greyscale\) or 3 \(RGB\)"),
        (3, 5, "a model"),
    ):
        errors: list[Exception] = []
        with pytest.raises(
            ValueError, match=f"channels is {channels}, and the model takes images of {of_model}; {better}.*would do"
        ):
            list(predict(small_net(of_model), photographs, SMALL, channels=channels, unreadable=errors.append))
        assert not errors  # the files are sound
    net.classifier.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        list(predict(net, photographs, SMALL))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mean_of_a_map_and_the_bias_is_the_logit(channels: int) -> None:
    net = small_net(channels).double()
    x = torch.randn(4, channels, 96, 130, dtype=torch.float64)
    with torch.no_grad():
        logits = net(x)
    best = class_activation_maps(net, x)
    assert torch.equal(best.classes, logits.argmax(1)) and best.maps.shape == (4, 3, 5)
    for classes in (2, torch.tensor([0, 6, 3, 3])):
        maps, chosen, given = class_activation_maps(net, x, classes)
        expected = given.gather(1, chosen[:, None])[:, 0]
        torch.testing.assert_close(maps.mean((1, 2)) + net.classifier.bias.detach()[chosen].float(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given.double(), logits, rtol=1e-5, atol=1e-5)
        assert (maps.flatten(1).std(1) > 0).all()


def test_maps_are_refused_where_they_would_not_be_exact() -> None:
    x = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="0 to 6 would do"):
        class_activation_maps(small_net(), x, 7)
    with pytest.raises(ValueError, match="training mode"):
        class_activation_maps(small_net().train(), x)
    for settings in ({"global_pool": "max"}, {"num_classes": 0}):
        net = create_model("efficientnet_b0", **settings).eval()
        with pytest.raises(ValueError, match="'avg' and a Linear would do"):
            class_activation_maps(net, x)  # type: ignore[arg-type]
