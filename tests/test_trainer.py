"""The trainer's parts: recipes, schedules, groups, batches, frozen parts, losses, steps, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import types
from dataclasses import replace

import pytest
import torch
from states import same
from torch import nn
from torch.utils.data import TensorDataset

import effnet_fast
from effnet_fast.ops import native
from effnet_fast.ops.backends import tracing
from effnet_fast.training import (
    PRESETS,
    Batches,
    Recipe,
    Trainer,
    build_optimizer,
    distillation_loss,
    evaluate,
    freeze,
    freeze_batch_norm,
    head_of,
    layers,
    parameter_groups,
    schedule,
    train,
    unfreeze,
)
from effnet_fast.training import checkpoint as checkpoints
from effnet_fast.training.distillation import Loss
from effnet_fast.training.loop import ema_decay
from effnet_fast.training.optimizer import RMSpropTF

PLAIN = Recipe(epochs=2, batch_size=4, opt="sgd", lr=0.05, weight_decay=0.0)


def net(classes: int = 3, drop: float = 0.0, width: float = 0.25) -> effnet_fast.models.EfficientNet:
    torch.manual_seed(0)
    return effnet_fast.efficientnet(depth=0.3, width=width, num_classes=classes, drop_rate=drop, drop_path_rate=drop)


def images(count: int = 12, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % classes)


def batches(recipe: Recipe = PLAIN, count: int = 12, **settings) -> Batches:
    return Batches(images(count), recipe.batch_size, training=True, seed=recipe.seed, **settings)


def test_presets_are_their_sources():
    paper = PRESETS["paper"]
    assert (paper.opt, paper.momentum, paper.opt_eps, paper.weight_decay) == ("rmsproptf", 0.9, 1e-3, 1e-5)
    assert (paper.epochs, paper.decay_rate, paper.decay_epochs, paper.smoothing) == (350, 0.97, 2.4, 0.1)
    assert (paper.aa, paper.model_ema_decay, paper.model_ema, paper.bn_momentum) == ("autoaugment", 0.9999, True, 0.01)
    assert replace(paper, batch_size=512).learning_rate(8) == pytest.approx(0.256)
    assert PRESETS["randaugment"].learning_rate(2) == pytest.approx(0.016)
    assert replace(PRESETS["cosine"], batch_size=32, grad_accum_steps=2).learning_rate(4) == pytest.approx(0.1)
    tuned, cosine = PRESETS["finetune"], PRESETS["cosine"]
    assert (tuned.aa, tuned.scale, tuned.clip_grad, tuned.smoothing) == ("randaugment", (0.35, 1.0), 1.0, 0.1)
    assert (cosine.epochs, cosine.smoothing, cosine.mixup, cosine.aa, cosine.scale) == (200, 0.1, 0.2, "none", (0.08, 1.0))
    betas = [build_optimizer(net(), Recipe(opt_betas=given)).defaults["betas"] for given in (None, (0.8, 0.99))]
    assert betas == [(0.9, 0.999), (0.8, 0.99)]


# At batches of four and three steps an epoch: the optimizer and its settings, then (epoch, step) -> the classifier's learning rate.
TRAINED = {
    "paper": (
        RMSpropTF,
        {"momentum": 0.9, "alpha": 0.9, "eps": 1e-3},
        1e-5,
        {(0, 0): 2.5e-4 / 15, (4, 2): 2.5e-4, (5, 0): 2.5e-4 * 0.97**2, (7, 0): 2.5e-4 * 0.97**2, (7, 1): 2.5e-4 * 0.97**3}
        | {(349, 2): 2.5e-4 * 0.97**145},
    ),
    "randaugment": (
        RMSpropTF,
        {"momentum": 0.9, "alpha": 0.9, "eps": 1e-3},
        1e-5,
        {(0, 0): 1e-6 + 2.49e-4 / 9, (2, 2): 2.5e-4, (3, 0): 2.5e-4 * 0.97, (449, 2): 2.5e-4 * 0.97**187},
    ),
    "cosine": (
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True, "dampening": 0},
        1e-4,
        {(0, 0): 1 / 9600, (4, 2): 1 / 640, (5, 0): 1 / 640}
        | {(epoch, 1): math.cos(math.pi / 2 * (3 * epoch - 14) / 585) ** 2 / 640 for epoch in (6, 102, 199)},
    ),
    "finetune": (
        torch.optim.AdamW,
        {"betas": (0.9, 0.999), "eps": 1e-8},
        0.05,
        {(0, 0): 1 / 192000, (0, 2): 1 / 64000, (1, 0): 1 / 64000}
        | {(epoch, 2): math.cos(math.pi / 2 * (3 * epoch - 1) / 57) ** 2 / 64000 for epoch in (1, 10, 19)},
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train_as_they_say(name):
    kind, settings, weight_decay, rates = TRAINED[name]
    trainer = Trainer(net(), replace(PRESETS[name], batch_size=4), batches())
    assert type(trainer.optimizer) is kind
    decayed, numbers = {}, layers(trainer.model)
    for (trainer.epoch, trainer.step), rate in rates.items():
        next(trainer.run_epoch())
        assert trainer.lr == pytest.approx(rate, rel=1e-12), (trainer.epoch, trainer.step)
        for group in trainer.optimizer.param_groups:
            assert {setting: group[setting] for setting in settings} == settings
            decayed |= dict.fromkeys(map(id, group["params"]), group["weight_decay"])
            if name == "finetune":
                scales = {0.85 ** (max(numbers.values()) - numbers[of]) for of in group["param_names"]}
                assert group["lr"] == pytest.approx(rate * scales.pop()) and not scales
            else:
                assert group["lr"] == trainer.lr
    assert [decayed[id(p)] for p in trainer.model.parameters()] == [
        weight_decay * (p.dim() > 1) for p in trainer.model.parameters()
    ]


@pytest.mark.parametrize(
    ("changed", "piece"),
    [
        ({"epochs": 0}, "epochs is 0; a whole number >= 1"),
        ({"lr": -1.0}, "lr is -1.0; a number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"smoothing": 1.0}, "smoothing is 1.0; a number from 0 and below 1"),
        ({"opt": "adam"}, "opt is 'adam'; 'sgd' or 'adamw' or 'rmsproptf' or 'rmsprop' would do"),
        ({"scale": (0.5, 0.2)}, "scale is (0.5, 0.2); two shares"),
        ({"ratio": (0.0, 2.0)}, "ratio is (0.0, 2.0); two numbers, 0 < low <= high, would do"),
        ({"opt_betas": (0.9, 1.0), "opt": "adamw"}, "opt_betas is (0.9, 1.0); two numbers from 0 and below 1 would do"),
        ({"opt_betas": (0.9, 0.99)}, "opt_betas is (0.9, 0.99), and opt 'sgd' has none; opt 'adamw' would do"),
        ({"remode": "rand"}, "remode is 'rand'; 'pixel' or 'const' would do"),
        ({"aa": "original", "color_jitter": 0.4}, "color_jitter is 0.4, and aa 'original' changes colours itself"),
        ({"mixup_off_epoch": -1}, "mixup_off_epoch is -1; a whole number >= 0"),
        ({"warmup_epochs": 3.0}, "warmup_epochs is 3 of 2 epochs"),
        ({"freeze_bn": True, "sync_bn": True}, "freeze_bn with sync_bn"),
        ({"amp": 1}, "amp is 1; True or False"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"seed": 2**64}, f"seed is {2**64}; a whole number >= 0 and < 2**64 would do"),
        ({"epochs": None}, "epochs is None"),
    ],
    ids=str,
)
def test_a_recipe_out_of_range_is_named(changed, piece):
    with pytest.raises(ValueError) as caught:
        replace(PLAIN, **changed)
    assert piece in str(caught.value)


def test_learning_rates_of_steps():
    cosine = schedule(replace(PLAIN, epochs=10, lr=1.0, warmup_epochs=2, min_lr=0.1), steps=5)
    assert [cosine(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [cosine(step) for step in (10, 30, 50)] == pytest.approx([1.0, 0.55, 0.1])
    paper = schedule(replace(PRESETS["paper"], warmup_epochs=5), steps=10)
    assert [paper(step) for step in (0, 49)] == pytest.approx([1 / 50, 1.0])
    for step, decays in ((50, 2), (71, 2), (72, 3), (239, 9), (240, 10), (3499, 145)):
        assert paper(step) == pytest.approx(0.97**decays), step
    assert schedule(replace(PLAIN, epochs=1), steps=4)(0) == 1.0
    warm = schedule(replace(PLAIN, lr=2.0, warmup_epochs=1, warmup_lr=0.5), steps=4)
    assert [2 * warm(step) for step in (0, 1, 3, 4)] == pytest.approx([0.875, 1.25, 2.0, 2.0])
    with pytest.raises(ValueError, match=r"warmup_lr is 0.5, above the learning rate 0.05; that at most would do"):
        schedule(replace(PLAIN, warmup_epochs=1, warmup_lr=0.5), steps=4)


def test_layer_decay_is_timms():
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model("efficientnet_b0", num_classes=5)
    scales = {id(p): group["lr_scale"] for group in param_groups_layer_decay(theirs, layer_decay=0.7) for p in group["params"]}
    expected = {name: scales[id(p)] for name, p in theirs.named_parameters()}
    for model in (theirs, effnet_fast.create_model("efficientnet_b0", num_classes=5)):
        groups = parameter_groups(model, 2.0, 0.1, 0.7)
        ours = {name: group["lr"] / 2 for group in groups for name, _ in group["params"]}
        assert ours == pytest.approx(expected)
        for group in groups:
            for name, parameter in group["params"]:
                assert group["weight_decay"] == (0.0 if name.endswith("bias") or parameter.dim() == 1 else 0.1)
    with pytest.raises(ValueError, match="layer_decay wants layers, and Sequential tells none"):
        layers(nn.Sequential())


def keys(b: Batches, epoch: int, first: int = 0) -> list[list[int]]:
    return [y.tolist() for _, y in b.of_epoch(epoch, first)]


def test_batches_depend_on_seed_epoch_and_index_alone():
    class Noisy:
        def __len__(self) -> int:
            return 11

        def __getitem__(self, index: int):
            return torch.rand(2), index

    made = Batches(Noisy(), 3, training=True, seed=5)
    one, other = list(made.of_epoch(0)), list(made.of_epoch(1))
    assert [len(y) for _, y in one] == [3, 3, 3] and len({*torch.cat([y for _, y in one]).tolist()}) == 9
    assert not torch.equal(one[0][1], other[0][1])
    torch.manual_seed(99)
    with_workers = Batches(Noisy(), 3, training=True, seed=5, workers=2)
    for again in (list(made.of_epoch(0)), list(with_workers.of_epoch(0))):
        assert all(torch.equal(a, b) for pair, twin in zip(one, again, strict=True) for a, b in zip(pair, twin, strict=True))
    middle = list(with_workers.of_epoch(1, first=2))
    assert len(middle) == 1 and torch.equal(middle[0][0], other[2][0]) and torch.equal(middle[0][1], other[2][1])
    assert len(torch.cat([x for x, _ in one]).unique()) == 18  # no two images were augmented alike
    del with_workers  # and its processes
    assert keys(Batches(Noisy(), 4, training=False), 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    with pytest.raises(ValueError, match="the 11 images fill no batch of 12"):
        Batches(Noisy(), 12, training=True)


def test_frozen_norms_survive_train_and_blocks_train_fused():
    model = net(width=0.5).train()
    x = images()[:4][0]
    freeze_batch_norm(model)
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with effnet_fast.backend("native"):
        rows = effnet_fast.explain(model, x, grad=True)
        assert effnet_fast.ops.native.REASON or all(row.plain is None for row in rows), rows
        model(x).sum().backward()
    assert same(dict(model.named_buffers()), before)
    assert not any(norm.training or norm.weight.requires_grad or norm.weight.grad is not None for norm in norms)
    assert model.conv_stem.weight.grad is not None and model.blocks[0].training
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.train()(x)
        assert same(dict(twin.named_buffers()), before)
        assert twin.bn1.train.args[0] is twin.bn1
    unfreeze(model)
    model(x)
    assert all(norm.training and norm.weight.requires_grad for norm in norms)
    assert not same(dict(model.named_buffers()), before)


def test_only_the_classifier_trains_at_first():
    recipe = replace(PLAIN, freeze_epochs=1)
    model = net()
    before = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, recipe, batches(recipe))
    assert len(list(trainer.run_epoch())) == 3
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["classifier.weight", "classifier.bias"]
    trainer.end_epoch()
    list(trainer.run_epoch())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"conv_stem.weight", "bn1.weight", "bn1.running_mean"} <= changed
    freeze(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    headless = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Sequential has no classifier"):
        freeze(headless)
    assert headless[0].weight.requires_grad


def test_what_the_user_froze_stays_frozen():
    whole, norms, single = net(), net(), net()
    freeze(whole)
    freeze_batch_norm(norms)
    single.conv_stem.weight.requires_grad_(False)
    single.classifier.bias.requires_grad_(False)
    for model in (whole, norms, single):
        flags = [p.requires_grad for p in model.parameters()]
        assert not all(flags)
        for freeze_epochs in (0, 1):
            before = copy.deepcopy(model.state_dict())
            train(model, batches(), replace(PLAIN, freeze_epochs=freeze_epochs))
            assert [p.requires_grad for p in model.parameters()] == flags
            moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters()]
            assert any(moved) and not any(now and not trains for now, trains in zip(moved, flags, strict=True))
            assert torch.equal(model.bn1.running_mean, before["bn1.running_mean"]) == (model is not single)


def test_where_nothing_would_train_it_is_told_at_once():
    frozen, no_head, student = net().requires_grad_(False), net(), net()
    no_head.classifier.requires_grad_(False)
    for model, teacher, freeze_epochs, piece in (
        (frozen, None, 0, "no parameter of the model trains: all have requires_grad False; unfreeze(), or"),
        (no_head, None, 1, "freeze_epochs is 1, and the classifier is frozen itself; 0 would do"),
        (student, student, 0, "the teacher has parameters of the model, which would not train; a copy would do"),
        (student, nn.Sequential(nn.Identity(), student), 0, "the teacher has parameters of the model"),
    ):
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError) as caught:
            Trainer(model, replace(PLAIN, freeze_epochs=freeze_epochs, freeze_bn=model is frozen), batches(), teacher=teacher)
        assert piece in str(caught.value)
        assert not any("train" in module.__dict__ for module in model.modules())
        assert [p.requires_grad for p in model.parameters()] == flags
    student.conv_stem.requires_grad_(False)  # which a teacher may share
    shared = net()
    shared.conv_stem = student.conv_stem
    Trainer(student, PLAIN, batches(), teacher=shared)
    with pytest.raises(ValueError, match=r"the model's answer is \[4, 1\]; logits \[N, K\] of K >= 2 classes would do"):
        train(net(1), batches(), PLAIN)


def test_heads_of_peers():
    for library in ("timm", "torchvision.models"):
        module = pytest.importorskip(library)
        model = (module.create_model if library == "timm" else module.get_model)("efficientnet_b0", num_classes=3)
        assert [tuple(p.shape) for p in head_of(model).parameters()] == [(3, 1280), (3,)]


def test_distillation():
    student, teacher = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    t = 3.0
    distillation_loss(student, teacher, t).backward()
    # arXiv 1503.02531, equation 2: (q - p) / T for each image, here times T^2 and averaged.
    expected = t * ((student / t).softmax(1) - (teacher / t).softmax(1)).detach() / 4
    torch.testing.assert_close(student.grad, expected)
    assert distillation_loss(teacher, teacher, t).item() == pytest.approx(0, abs=1e-12)

    model, other = net(), net()
    nn.init.normal_(other.classifier.weight)
    x, y = images()[:4]
    for share, like_teacher in ((1.0, True), (0.0, False)):
        recipe = replace(PLAIN, distill=share, temperature=2.0)
        trainer = Trainer(copy.deepcopy(model), recipe, batches(recipe), teacher=other)
        logits = trainer.model(x)
        loss = trainer.loss(x, logits, y)
        wanted = distillation_loss(logits, other(x), 2.0) if like_teacher else nn.functional.cross_entropy(logits, y)
        torch.testing.assert_close(loss, wanted)
    assert not other.training and not any(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="the teacher has 7 classes; 3, as the student"):
        list(Trainer(model, PLAIN, batches(), teacher=net(7)).run_epoch())


def test_the_average_is_one_of_weights_and_statistics():
    recipe = replace(PLAIN, model_ema=True, model_ema_decay=0.3)
    model = net()
    trainer = Trainer(model, recipe, batches(recipe))
    expected = None
    for number, _ in enumerate(trainer.run_epoch(), start=1):
        now = {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}
        decay = min(0.3, (1 + number) / (10 + number))
        assert ema_decay(0.3, number) == decay
        expected = now if expected is None else {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    averaged = trainer.judged.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value)
    assert not torch.equal(averaged["bn1.running_mean"], model.bn1.running_mean)


def gradients(recipe: Recipe, taken: list) -> dict[str, torch.Tensor]:
    model = net(width=0.5)
    with torch.no_grad():  # statistics that let the images through
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(images()[:][0])
    trainer = Trainer(model, recipe, batches(recipe))
    trainer.model.train()
    trainer._take_step(taken)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_accumulated_gradients_are_the_large_batchs():
    x, y = images()[:8]
    whole = gradients(replace(PLAIN, batch_size=8, freeze_bn=True), [(x, y)])
    parts = gradients(replace(PLAIN, grad_accum_steps=2, freeze_bn=True), [(x[:4], y[:4]), (x[4:], y[4:])])
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-7, msg=name)
    clipped = gradients(replace(PLAIN, batch_size=8, freeze_bn=True, clip_grad=1e-3), [(x, y)])
    assert torch.linalg.vector_norm(torch.stack([g.norm() for g in clipped.values()])).item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_and_checkpointing_train(dtype):
    recipe = replace(PLAIN, amp=True, amp_dtype=dtype, grad_checkpointing=True, epochs=14, lr=0.001)
    model, seen = net(), []

    def look(module, args):
        if module.training:
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))

    model.blocks[1][0].register_forward_pre_hook(look)
    history = train(model, batches(recipe), recipe)
    losses = [row["train_loss"] for row in history]
    assert min(losses[-5:]) < losses[0]
    assert set(seen) == {(True, getattr(torch, dtype))} and len(seen) == 2 * 3 * 14  # forward, and once more in backward


def test_smoothing_and_momentum_reach_what_they_are_of():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    for smoothing in (0.0, 0.3):
        expected = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        assert torch.equal(Loss(replace(PLAIN, smoothing=smoothing))(logits, logits, labels), expected)
    model = net()
    train(model, batches(), replace(PLAIN, epochs=1, bn_momentum=0.25))
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.25}


def test_any_classifier_trains():
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.body(x).mean((2, 3)))

    history = train(Tiny(), batches(), replace(PLAIN, epochs=3, freeze_epochs=1))
    assert [row["epoch"] for row in history] == [1, 2, 3] and "top1" not in history[0]
    with pytest.raises(
        ValueError, match="cuda_graph is True, on cpu in 1 processes; one process on a CUDA device, or False, would do"
    ):
        train(Tiny(), batches(), replace(PLAIN, cuda_graph=True))
    with pytest.raises(ValueError, match="cuda_graph and grad_checkpointing are True: .*; one of them would do"):
        checks = types.SimpleNamespace(type="cuda")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "device", lambda name: checks)
            Trainer(Tiny(), replace(PLAIN, cuda_graph=True, grad_checkpointing=True), batches(), device="cuda")
    with pytest.raises(ValueError, match="grad_checkpointing: Tiny has no"):
        train(Tiny(), batches(), replace(PLAIN, grad_checkpointing=True))
    for other, name in (
        (Batches(images(), 2, training=True), "batch_size is 2; 4"),
        (batches(replace(PLAIN, seed=3)), "seed is 3; 0"),
    ):
        with pytest.raises(ValueError, match=f"the batches' {name}, as the recipe's, would do"):
            train(Tiny(), other, PLAIN)
    with pytest.raises(ValueError, match="min_lr is 0.1, above the learning rate 0.05; that at most would do"):
        train(Tiny(), batches(), replace(PLAIN, min_lr=0.1))
    with pytest.raises(ValueError, match="grad_accum_steps is 4, and an epoch has 3 batches"):
        train(Tiny(), batches(), replace(PLAIN, grad_accum_steps=4))
    broken = Tiny()
    nn.init.constant_(broken.fc.weight, float("nan"))
    steps = []
    for count, taken in ((12, 3), (80, 8)):  # told at the end of an epoch, and in a long one before it
        with pytest.raises(ValueError, match="the training loss of epoch 1 is nan; a smaller lr"):
            train(broken, batches(count=count), PLAIN, augment=lambda x, y: (x, (steps.append(1), y)[1]))
        assert len(steps) == taken
        steps.clear()


def test_an_accelerated_peer_trains():
    timm = pytest.importorskip("timm")
    model = timm.create_model("efficientnet_b0", num_classes=3)
    effnet_fast.accelerate(model)
    before = copy.deepcopy(model.state_dict())
    recipe = replace(PLAIN, epochs=1, opt="adamw", lr=1e-3, layer_decay=0.8, model_ema=True, grad_checkpointing=True)
    (row,) = train(model, batches(recipe), recipe)
    assert math.isfinite(row["train_loss"]) and row["lr"] < 1e-3  # the last step's, on the cosine
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "weight" in name)


@pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))
def test_all_blocks_train_fused_where_they_are_asked_to():
    """Also those that are recomputed in the backward pass, and with batches that other processes load."""
    recipe = replace(PLAIN, epochs=1, grad_checkpointing=True)
    plain = []
    for asked in (contextlib.nullcontext(), effnet_fast.backend("native")):
        torch.manual_seed(0)
        model = effnet_fast.create_model("efficientnet_b0", num_classes=3)
        with asked, tracing() as trace:
            train(model, batches(recipe, 4, workers=1), recipe)
        plain.append([entry for entry in trace if isinstance(entry, str)])
    assert plain[0] and not plain[1]


def test_scores():
    class Fixed(nn.Module):
        def forward(self, x):
            return x

    logits = torch.eye(7) * 3 - torch.arange(7) / 10  # without a tie
    labels = torch.tensor([0, 1, 2, 6, 6, 0, 0])
    held_out = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    model = Fixed().train()
    scores = evaluate(model, held_out)
    assert model.training and scores.images == 7 and scores.top1 == pytest.approx(3 / 7)
    expected = (logits.topk(5, 1).indices == labels[:, None]).any(1).double().mean().item()
    assert scores.top5 == pytest.approx(expected) and scores.top5 < 1
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    mixed = nn.Sequential(nn.BatchNorm1d(6).eval(), nn.BatchNorm1d(6))
    evaluate(mixed, [(torch.eye(6), torch.arange(6))])
    assert [module.training for module in mixed.modules()] == [True, False, True] and not mixed[1].running_mean.any()
    assert evaluate(Fixed(), [(torch.eye(6), torch.arange(6))]).top5 == 1.0
    assert evaluate(Fixed(), [(torch.eye(5), torch.arange(5))]).top5 is None


def test_a_failing_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(net(), PLAIN, batches())
    path = tmp_path / "last.pth"
    checkpoints.save(path, trainer, [], {})
    before = path.read_bytes()
    list(trainer.run_epoch())
    write = torch.save

    def breaks(content, target):
        write(content, target)
        with open(target, "r+b") as file:
            file.truncate(1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(path, trainer, [], {})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_what_is_no_checkpoint_of_this_run_is_refused(tmp_path):
    trainer = Trainer(net(), PLAIN, batches())
    path = tmp_path / "last.pth"
    checkpoints.save(path, trainer, [], {"img_size": 32})
    for model, recipe, count, size, piece in (
        (net(), replace(PLAIN, lr=0.1), 12, 32, "a run with lr 0.05, not 0.1; the same would do"),
        (net(4), PLAIN, 12, 32, "a run with model 'EfficientNet, "),
        (net(), PLAIN, 16, 32, "a run with images 12, not 16"),
        (net(), PLAIN, 12, 64, "a run with img_size 32, not 64"),
    ):
        other = Trainer(model, recipe, batches(recipe, count))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) as caught:
            checkpoints.load(path, other, {"img_size": size})
        assert piece in str(caught.value)
        assert same(model.state_dict(), before)
    classes = [f"class {number}" for number in range(100)]
    checkpoints.save(tmp_path / "many.pth", trainer, [], {"classes": classes})
    for others, piece in (
        (
            [*classes[:-1], "another"],
            r"classes \.\.\.[^;]*'class 98', 'class 99'\], not \.\.\.[^;]*'class 98', 'another'\]; the same",
        ),
        (["another", *classes], r"classes \['class 0', [^;]*\.\.\., not \['another', 'class 0', [^;]*\.\.\.; the same"),
    ):
        with pytest.raises(ValueError, match=piece) as caught:
            checkpoints.load(tmp_path / "many.pth", trainer, {"classes": others})
        assert len(str(caught.value)) < 600
    older = torch.load(path, weights_only=True)
    for name in ("cuda_graph", "scale", "ratio", "opt_betas", "warmup_lr", "mixup_prob", "mixup_off_epoch", "remode"):
        del older["run"][name]  # settings that came after that run had their defaults
    torch.save(older, path)
    assert checkpoints.load(path, trainer, {"img_size": 32}) == []
    (tmp_path / "garbage.pth").write_text("no checkpoint")
    torch.save(net().state_dict(), tmp_path / "weights.pth")
    for name, piece in (("garbage.pth", "damaged or no checkpoint of a run"), ("weights.pth", "no run to go on with")):
        with pytest.raises(ValueError, match=piece):
            checkpoints.load(tmp_path / name, trainer, {})
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "nowhere.pth", trainer, {})
    (tmp_path / "other").mkdir()
    checkpoints.save(tmp_path / "other" / "last.pth", trainer, [], {})
    for resume in (None, tmp_path / "other" / "last.pth"):
        with pytest.raises(ValueError, match="holds a run already"):
            train(net(), batches(), PLAIN, out=tmp_path, resume=resume)


def test_gradients_have_their_parameters_strides():
    """Else DistributedDataParallel warns and copies them. With weights as they are built, blocks that train plain have others."""
    for make in (net, lambda: effnet_fast.create_model("efficientnet_b0", num_classes=3)):
        trainer = Trainer(make(), PLAIN, batches())
        list(trainer.run_epoch())
        assert all(p.grad.stride() == p.stride() for p in trainer.model.parameters())


def test_a_captured_pass_leaves_no_trace(monkeypatch):
    """The book-keeping around a CUDA graph, with a stand-in for it that runs the pass anew; tests of a GPU have the real one."""
    from effnet_fast.training import graphs

    captures, failing = [], []

    class Graph:
        def __init__(self) -> None:
            captures.append(self)

        def replay(self) -> None:
            graphed._loss.copy_(run(graphed._x, graphed._y))

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (("CUDAGraph", Graph), ("Stream", lambda device: stream), ("current_stream", lambda device: stream)):
        monkeypatch.setattr(graphs.torch.cuda, name, stand_in)
    for name in ("stream", "graph"):
        monkeypatch.setattr(graphs.torch.cuda, name, lambda *arguments, **settings: contextlib.nullcontext())
    monkeypatch.setattr(graphs.torch.random, "fork_rng", lambda devices: contextlib.nullcontext())

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.unused = nn.Linear(2, 2)
    plain, x, y = copy.deepcopy(model), torch.randn(5, 3), torch.randn(5, 2)

    def run(x: torch.Tensor, y: torch.Tensor, of: nn.Module = model) -> torch.Tensor:
        if failing:
            raise ValueError("seeded")
        loss = (of[2](of[1](of[0](x))) - y).square().mean()
        loss.backward()
        return loss.detach()

    graphed = graphs.GraphedPass(model)
    for training in (True, True, False, True):
        model[1].train(training)
        plain[1].train(training)
        assert torch.equal(graphed(run, x, y), run(x, y, plain))
    assert len(captures) == 3  # the norm's mode counts
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad) if theirs.grad is not None else ours.grad is None
    assert same(model.state_dict(), plain.state_dict())
    model.zero_grad()
    plain.zero_grad()
    graphed(run, x, y)
    run(x, y, plain)
    assert len(captures) == 4 and torch.equal(model[0].weight.grad, plain[0].weight.grad)
    failing.append(True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="seeded"):
        graphed(run, x[:3], y[:3])
    assert same(model.state_dict(), before) and torch.equal(model[0].weight.grad, plain[0].weight.grad)
