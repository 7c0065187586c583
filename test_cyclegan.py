"""What must stay true of cyclegan.py, train.py, translate.py and demo/. The method comes first.

    python -m pytest              all of it, about a minute on two CPU cores
    python test_cyclegan.py       the three forms of the step: differences, then times
"""

import copy
import functools
import importlib.util
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
import warnings
import zlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import cyclegan
import train
import translate
from cyclegan import (
    Config,
    CycleGAN,
    Discriminator,
    FastCycleGAN,
    Generator,
    ImageBuffer,
    UserError,
)
from demo import scenes

HERE = Path(cyclegan.__file__).resolve().parent
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
PROCESSES.set_forkserver_preload(["cyclegan", "torch._dynamo"])  # so a process starts at once
TINY = {"image_size": 32, "load_size": 36, "width": 4, "blocks": 2}
torch.set_num_threads(1)  # tests take as long on a busy machine as on an idle one


def noise(*shape, seed=0, dtype=torch.float64):
    """Uniform on [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def image(seed=0):
    """One of the size of TINY, as training sees it."""
    return noise(1, 3, 32, 32, seed=seed, dtype=torch.float32)


# ==== The method ==================================================================================

# ---- The literal twin: networks and step as the authors' code has them ---------------------------


def named_model(layers):
    """Layers whose state_dict has the authors' keys, such as model.1.weight."""
    return nn.Sequential(OrderedDict(model=nn.Sequential(*layers)))


def twin_generator(width, blocks, dropout=False, statistics=False):
    """The authors' ResnetGenerator: stock layers, a bias everywhere, ReLU in place.

    dropout: as with their flag; statistics: with buffers in every norm, as their older ones had.
    """
    def norm(k):
        return nn.InstanceNorm2d(k, track_running_stats=statistics)

    class Block(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.conv_block = nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3), norm(k), nn.ReLU(True),
                *[nn.Dropout(0.5)] * dropout, nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3), norm(k))

        def forward(self, h):
            return h + self.conv_block(h)

    w = width
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, w, 7), norm(w), nn.ReLU(True)]
    for k in (w, 2 * w):
        layers += [nn.Conv2d(k, 2 * k, 3, 2, 1), norm(2 * k), nn.ReLU(True)]
    layers += [Block(4 * w) for _ in range(blocks)]
    for k in (4 * w, 2 * w):
        layers += [nn.ConvTranspose2d(k, k // 2, 3, 2, 1, 1), norm(k // 2), nn.ReLU(True)]
    return named_model([*layers, nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh()])


def twin_discriminator(width):
    """The authors' NLayerDiscriminator with three layers."""
    layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for k, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
        layers += [nn.Conv2d(k, 2 * k, 4, stride, 1), nn.InstanceNorm2d(2 * k),
                   nn.LeakyReLU(0.2, True)]
    return named_model([*layers, nn.Conv2d(8 * width, 1, 4, 1, 1)])


class Twin(nn.Module):
    """The step as one would write it down: six generator and six discriminator calls."""

    def __init__(self, model):
        super().__init__()
        c = self.config = model.config
        self.G, self.F = twin_generator(c.width, c.blocks), twin_generator(c.width, c.blocks)
        self.D_X, self.D_Y = twin_discriminator(c.width), twin_discriminator(c.width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.load_state_dict(model.state_dict(), strict=False)  # biases before norms stay 0
        self.to(next(model.parameters()).dtype)
        self.adam_GF, self.adam_D = (
            torch.optim.Adam([*one.parameters(), *two.parameters()], betas=(c.beta1, 0.999))
            for one, two in ((self.G, self.F), (self.D_X, self.D_Y)))
        self.pool_X, self.pool_Y = [], []

    def step(self, x, y, lr, rng):
        for adam in (self.adam_GF, self.adam_D):
            adam.param_groups[0]["lr"] = lr
        c, l1 = self.config, nn.L1Loss()
        G, F, D_X, D_Y = self.G, self.F, self.D_X, self.D_Y

        # G and F, while D_X and D_Y are frozen, as in the authors' code
        for D in (D_X, D_Y):
            D.requires_grad_(False)
        fake_y = G(x)
        back_x = F(fake_y)
        fake_x = F(y)
        back_y = G(fake_x)
        gan = c.lambda_gan * (self.gan(D_Y(fake_y), True) + self.gan(D_X(fake_x), True))
        cycle = c.lambda_forward * l1(back_x, x) + c.lambda_backward * l1(back_y, y)
        identity = 0 * cycle
        if c.lambda_identity:
            identity = c.lambda_identity * c.lambda_backward * l1(G(y), y)
            identity = identity + c.lambda_identity * c.lambda_forward * l1(F(x), x)
        self.adam_GF.zero_grad()
        (gan + cycle + identity).backward()
        self.adam_GF.step()

        # D_X and D_Y
        for D in (D_X, D_Y):
            D.requires_grad_(True)
        shown_x = self.shown(self.pool_X, fake_x.detach(), rng)
        shown_y = self.shown(self.pool_Y, fake_y.detach(), rng)
        loss_X = (self.gan(D_X(x), True) + self.gan(D_X(shown_x), False)) * 0.5
        loss_Y = (self.gan(D_Y(y), True) + self.gan(D_Y(shown_y), False)) * 0.5
        self.adam_D.zero_grad()
        (loss_X + loss_Y).backward()
        self.adam_D.step()
        return {"gan": gan, "cycle": cycle, "identity": identity, "D_X": loss_X, "D_Y": loss_Y}

    def gan(self, scores, real):
        target = torch.full_like(scores, float(real))
        criterion = nn.MSELoss() if self.config.objective == "lsgan" else nn.BCEWithLogitsLoss()
        return criterion(scores, target)

    def shown(self, pool, images, rng):
        """The authors' ImagePool."""
        size, result = self.config.buffer_size, []
        for image in images:
            if len(pool) < size:
                pool.append(image)
            elif size > 0 and rng.random() < 0.5:
                slot = rng.randrange(size)
                image, pool[slot] = pool[slot], image
            result.append(image)
        return torch.stack(result)


STEPS = [
    {}, {"lambda_identity": 0.0}, {"objective": "log"}, {"buffer_size": 0},
    {"lambda_gan": 0.0, "lambda_backward": 0.0}, {"lambda_forward": 0.0, "lambda_identity": 0.0},
    {"lambda_forward": 0.0, "lambda_backward": 0.0, "lambda_identity": 0.0},  # the GAN alone
    {"lambda_gan": 2.0, "lambda_forward": 7.0, "lambda_backward": 3.0, "lambda_identity": 0.1,
     "objective": "log", "beta1": 0.3, "seed": 3}]


def batch(k, n=1):
    return noise(n, 3, 32, 32, seed=k), noise(n, 3, 32, 32, seed=k + 99)


def draws(model, k):
    """The random numbers that the buffers get at step k, as the docstring of train_step says."""
    return random.Random(f"{model.config.seed} {k} 0")


def weight_difference(model, other):
    """The largest; the other one may have weights besides."""
    weights = other.state_dict()
    return max((value.cpu() - weights[key].cpu()).abs().max().item()
               for key, value in model.state_dict().items())


def differences(setting, batch_size):
    """Of Part I from the literal twin, and of FastCycleGAN from Part I, over four steps in float64:
    the largest in a loss, relative to it, and in a weight."""
    config = Config(**{**TINY, "buffer_size": 2, **setting})
    model, fast = CycleGAN(config).double(), FastCycleGAN(config, "cpu").double()
    twin, of_part_one, of_fast = Twin(model), [], []
    for k in range(4):
        x_y_lr = *batch(k, batch_size), 2e-4 * (1 - k / 9)
        literal, plain = (each.step(*x_y_lr, draws(model, k)) for each in (twin, model))
        fused = fast.train_step(*x_y_lr)
        assert list(plain) == list(fused) == list(literal)
        for name, loss in plain.items():
            scale = max(abs(loss.item()), 1e-3)  # 0 where a weight is
            of_part_one.append(abs(loss - literal[name]).item() / scale)
            of_fast.append(abs(loss - fused[name]).item() / scale)
            assert loss.shape == () and not loss.requires_grad
    return {"Part I": (max(of_part_one), weight_difference(model, twin)),
            "FastCycleGAN": (max(of_fast), weight_difference(model, fast))}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("setting", STEPS, ids=str)
def test_part_one_is_the_literal_twin_and_fast_cyclegan_is_part_one(setting, batch_size):
    for of_losses, of_weights in differences(setting, batch_size).values():
        assert max(of_losses, of_weights) < 1e-12


def test_part_one_stands_alone():
    source = Path(cyclegan.__file__).read_text().partition("# ==== Part II")[0]
    scope = {"__name__": __name__, "check": lambda config: None}
    exec(source, scope)
    config = scope["Config"](image_size=32, width=4)
    assert (config.load_size, config.blocks) == (36, 6)
    alone, model = scope["CycleGAN"](config), CycleGAN(Config(image_size=32, width=4))
    for each in (alone, model):
        losses = each.step(image(0), image(1), 2e-4, random.Random(0))
    assert losses["gan"] > 0 and weight_difference(alone, model) == 0


# ---- Its parts -----------------------------------------------------------------------------------


def test_layers_are_those_of_section_7_2():
    def shapes(network, size):
        """(channels / 2, side) behind every layer that changes them, at a width of 2."""
        found, h = [], torch.zeros(1, 3, size, size)
        for layer in network.model:
            h = layer(h)
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, cyclegan.R)):
                found.append((h.shape[1] / 2, h.shape[2]))
        return found

    down, up = [(1, 256), (2, 128), (4, 64)], [(2, 128), (1, 256), (3 / 2, 256)]
    assert shapes(Generator(2, 9), 256) == down + 9 * [(4, 64)] + up
    assert shapes(Discriminator(2), 256) == [(1, 128), (2, 64), (4, 32), (8, 31), (1 / 2, 30)]


@pytest.mark.parametrize("ours, twin", [
    (Generator(4, 6), twin_generator(4, 6)), (Generator(3, 9), twin_generator(3, 9)),
    (Discriminator(4), twin_discriminator(4))])
def test_networks_compute_what_the_authors_networks_do(ours, twin):
    # Padding, strides, norms, signs, activations: any difference of wiring shows in the values.
    ours.double()
    twin.double()
    for parameter in twin.parameters():  # large weights, so that no nonlinearity idles
        nn.init.normal_(parameter, 0, 0.3, torch.Generator().manual_seed(parameter.numel()))
    weights = twin.state_dict()
    ours.load_state_dict({key: weights[key] for key in ours.state_dict()})
    for key in weights.keys() - ours.state_dict().keys():
        weights[key] += 3  # biases that a norm cancels
    images = noise(2, 3, 64, 48)
    assert (ours(images) - twin(images)).abs().max() < 1e-9  # values inside reach 10^4


AUTHORS_STEMS = {f"model.{i}" for i in (1, 4, 7, 19, 22, 26)} | {
    f"model.{b}.conv_block.{i}" for b in range(10, 19) for i in (1, 5)}


def test_state_dicts_have_the_authors_keys_and_the_papers_sizes():
    def stems(network):
        return {key.rsplit(".", 1)[0] for key in network.state_dict()}

    assert stems(Generator()) == AUTHORS_STEMS
    assert stems(Discriminator()) == {f"model.{i}" for i in (0, 2, 5, 8, 11)}
    # The paper's counts less the biases before a norm, of which each block has 512.
    count = [sum(p.numel() for p in n.parameters())
             for n in (Generator(), Generator(64, 6), Discriminator())]
    assert count == [11_378_179 - 5_248, 7_837_699 - 5_248 + 3 * 512, 2_764_737 - 896]
    # Typed from the authors' files: 9 blocks, then 6 blocks, dropout, and statistics.
    assert twin_generator(2, 9).state_dict().keys() == {
        f"{stem}.{kind}" for stem in AUTHORS_STEMS for kind in ("weight", "bias")}
    assert {"model.10.conv_block.6.weight", "model.16.weight", "model.19.bias", "model.23.weight",
            "model.2.running_mean", "model.15.conv_block.7.running_var",
            "model.20.num_batches_tracked"} <= twin_generator(2, 6, True, True).state_dict().keys()


def test_receptive_field_is_70():
    D = Discriminator(4)
    for i, layer in enumerate(D.model):
        if isinstance(layer, nn.InstanceNorm2d):
            D.model[i] = nn.Identity()  # its statistics would see the whole picture
    images = torch.rand(1, 3, 256, 256).requires_grad_()
    D(images)[0, 0, 15, 15].backward()
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_generators_refuse_sizes_that_they_would_change():
    for height, width in ((250, 256), (256, 250), (4, 8), (8, 4)):
        with pytest.raises(ValueError, match=f"multiples of 4.*{height} x {width}"):
            Generator(2, 1)(torch.zeros(1, 3, height, width))
    assert Generator(2, 1)(torch.zeros(1, 3, 8, 12)).shape == (1, 3, 8, 12)


def test_weights_start_from_a_normal_of_2_percent():
    one, same_seed, other = (CycleGAN(Config(width=32, blocks=1, seed=k)) for k in (0, 0, 1))
    assert weight_difference(one, same_seed) == 0
    first = [model.get_parameter(f"{name}.model.{k}.weight") for model in (one, other)
             for name, k in (("G", 1), ("F", 1), ("D_X", 0), ("D_Y", 0))]
    assert len({weight.sum().item() for weight in first}) == 8  # each has numbers of its own
    for name, parameter in one.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.numel() > 10_000:  # the standard error of a deviation is 1 / sqrt(2 n)
            assert abs(parameter.std().item() / 0.02 - 1) < 0.03
            assert abs(parameter.mean()) < 1e-3
    norm = nn.InstanceNorm2d(4, affine=True)  # of a network of one's own
    cyclegan.initialise(norm)
    assert (norm.weight == 1).all()


def values_and_gradients(network):
    images = noise(2, 3, 32, 24).requires_grad_()
    result = network(images)
    result.square().sum().backward()
    return [result, images.grad, *(p.grad for p in network.parameters())]


def test_fast_layers_change_nothing_but_the_time():
    networks = [Generator(4, 2), Discriminator(4)]
    for place, layer in (  # of one's own
            (2, nn.InstanceNorm2d(4, affine=True)), (2, nn.InstanceNorm2d(4, eps=0.5)),
            (2, nn.InstanceNorm2d(4, track_running_stats=True)), (-2, nn.Conv2d(4, 3, 5)),
            (-2, nn.Conv2d(4, 3, 7, padding=3)), (-2, nn.Conv2d(4, 3, 7, bias=False)),
            (-2, nn.Conv2d(4, 3, 7, stride=2)), (-2, nn.Conv2d(4, 3, 7, dilation=2))):
        networks.append(Generator(4, 1))
        networks[-1].model[place] = layer
    for network in networks:
        fast = cyclegan.with_fast_layers(copy.deepcopy(network.double()))
        assert list(fast.state_dict()) == list(network.state_dict())
        for a, b in zip(values_and_gradients(network), values_and_gradients(fast), strict=True):
            assert (a - b).abs().max() < 1e-12 * max(1, a.abs().max())  # sums in another order
    cyclegan.with_fast_layers(networks[0])
    kinds = {type(layer) for layer in networks[0].modules()}
    assert {cyclegan.InstanceNorm, cyclegan.LastConvolution} < kinds
    assert nn.InstanceNorm2d not in kinds


def test_losses_against_numpy():
    loss, REAL, FAKE = cyclegan.adversarial_loss, cyclegan.REAL, cyclegan.FAKE
    real, fake = noise(2, 1, 5, 4) * 3, noise(2, 1, 5, 4, seed=1) * 3
    r, f = real.numpy(), fake.numpy()
    expected = {"lsgan": (np.mean((r - 1) ** 2), np.mean(f ** 2)),
                "log": (np.mean(np.log(1 + np.exp(-r))), np.mean(np.log(1 + np.exp(f))))}
    for objective, (of_real, of_fake) in expected.items():
        of_D = cyclegan.discriminator_loss(real, fake, objective)
        assert abs(loss(real, REAL, objective) - of_real) < 1e-12
        assert abs(loss(fake, FAKE, objective) - of_fake) < 1e-12
        assert abs(of_D - (of_real + of_fake) / 2) < 1e-12
    for score in (-1e4, 1e4):  # the logarithm of a sigmoid overflows here, the loss must not
        assert loss(torch.tensor([score]), REAL, "log").item() == max(0, -score)
    per_patch = torch.tensor([[2.0, 0.0]])  # on average 1, yet each patch is wrong
    assert loss(per_patch, REAL) == 1 and loss(per_patch, FAKE) == 2
    with pytest.raises(ValueError, match="LSGAN"):
        loss(per_patch, REAL, "LSGAN")
    x, y, of_x, of_y = (noise(2, 3, 4, 4, seed=k) for k in range(4))
    forward = np.mean(np.abs(of_x.numpy() - x.numpy()))
    backward = np.mean(np.abs(of_y.numpy() - y.numpy()))
    for loss in (cyclegan.cycle_loss, cyclegan.identity_loss):
        assert abs(loss(x, y, of_x, of_y, 7.0, 3.0) - (7 * forward + 3 * backward)) < 1e-12


def test_buffer_by_hand():
    buffer, numbers = ImageBuffer(2), []
    rng = SimpleNamespace(random=lambda: numbers.pop(0), randrange=lambda size: numbers.pop(0))

    def query(values, *drawn):
        numbers[:] = drawn
        images = torch.tensor(values)[:, None, None, None].repeat(1, 3, 2, 2)
        out = buffer.query(images, rng)
        assert out.shape == images.shape and not numbers
        images.fill_(-1)  # what is stored is a copy
        return [image[0, 0, 0].item() for image in (*out, *buffer.images)]

    assert query([1.0]) == [1, 1]  # what D sees, then what is stored
    assert query([2.0]) == [2, 1, 2]
    assert query([3.0], 0.5) == [3, 1, 2]  # passes
    assert query([4.0], 0.49, 1) == [2, 1, 4]  # is swapped
    assert query([5.0, 6.0], 0.0, 0, 0.0, 0) == [1, 5, 6, 4]  # one after another
    buffer = ImageBuffer(0)
    assert query([7.0, 8.0]) == [7, 8]


def test_learning_rate():
    config = Config()
    for epoch, rate in {0: 2e-4, 99: 2e-4, 100: 2e-4 * 100 / 101, 199: 2e-4 / 101}.items():
        assert abs(cyclegan.learning_rate(config, epoch) - rate) < 1e-18
    assert cyclegan.learning_rate(config, 1000) == 0
    assert cyclegan.learning_rate(Config(decay_epochs=0), 99) == 2e-4


# ==== Using it from Python ========================================================================


@pytest.mark.parametrize("field, value", [
    ("image_size", 250), ("image_size", 16), ("load_size", 255), ("lambda_gan", -1.0),
    ("lambda_identity", -0.5), ("lambda_forward", math.nan), ("objective", "wgan"),
    ("batch_size", 0), ("lr", 0.0), ("lr", math.inf), ("lr", -1e-4), ("beta1", 1.0), ("width", 0),
    ("blocks", -1), ("buffer_size", -1), ("epochs", 1.5), ("epochs", 10**6), ("seed", "x"),
    ("seed", 2**64), ("flip", 1), ("squash", "yes")])
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"^{field} .*{re.escape(repr(value))}"):
        Config(**{field: value})


def test_what_is_left_out_of_a_config_follows_from_the_image_size():
    for size, load_size, blocks in ((64, 72, 6), (128, 143, 6), (256, 286, 9), (512, 572, 9)):
        config = Config(image_size=size)
        assert (config.load_size, config.blocks) == (load_size, blocks)
    config = Config(image_size=np.int64(64), load_size=64, blocks=0, lr=np.float32(0.5))
    assert (config.load_size, config.blocks) == (64, 0)
    assert type(config.image_size) is int and type(config.lr) is float  # plain, to be saved


def test_train_step_refuses_what_it_cannot_take_in_words():
    model, good = FastCycleGAN(Config(**TINY), "cpu"), torch.zeros(2, 3, 32, 32)
    before = copy.deepcopy(state_of(model))
    for x, y, lr, reason in (
            (good, good[:1], 1.0, r"be \(N, 3, H, W\) and of one shape, not \[2, .* and \[1, 3,"),
            (good[0], good[0], 1.0, r"must be \(N, 3, H, W\)"), (good, good, -1.0, "lr .*-1"),
            (good, good, math.nan, "lr .*nan"), (good, good, math.inf, "lr .*inf"),
            (good, good + 255, 1.0, r"lie in \[-1, 1\]"), (good * math.nan, good, 1.0, "lie in")):
        with pytest.raises(ValueError, match=reason):
            model.train_step(x, y, lr)
    assert same(state_of(model), before)


def test_devices_precisions_and_compiling_are_refused_by_name(tmp_path):
    cyclegan.save_checkpoint(tmp_path / "latest.pt", FastCycleGAN(Config(**TINY), "cpu"), {})
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    for given, reason in (((missing,), f"^device {missing} cannot be used here"),
                          (("gpu",), "^device must be .*gpu"), (("cpu", "fp16"), "not 'fp16'"),
                          (("cpu", "fp32", True), "^compiling .--compile. is for CUDA")):
        with pytest.raises(UserError, match=reason):
            FastCycleGAN(Config(**TINY), *given)
        with pytest.raises(UserError, match=reason) as raised:
            cyclegan.load_checkpoint(tmp_path, *given)
        assert "latest.pt" not in str(raised.value)
    with pytest.raises(UserError, match=missing):
        cyclegan.load_generator(tmp_path, device=missing)


class Small(nn.Module):
    """A user's own network."""

    def __init__(self, out, channels=3):
        super().__init__()
        self.layer = nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, images):
        return self.layer(images)


def state_of(model):
    """Everything that training changes."""
    adams = [value for adam in (model.adam_GF, model.adam_D)
             for moments in adam.state.values() for value in moments.values()]
    return [*model.state_dict().values(), *adams, *model.buffer_X.images, *model.buffer_Y.images,
            model.steps]


def own_networks():
    networks = {"G": Small(3), "D_X": Small(1)}
    networks["G"].layer.bias.requires_grad_(False)
    return networks


def test_networks_of_ones_own_train_and_are_saved(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="^BatchNorm mixes the images of a batch"):
        FastCycleGAN(Config(**TINY), "cpu", D_X=nn.Sequential(nn.BatchNorm2d(3)))
    path, empty = tmp_path / "mine.pt", nn.Sequential()  # which is False
    assert CycleGAN(Config(**TINY), G=empty).G is empty
    model = FastCycleGAN(Config(**TINY), "cpu", **own_networks())
    before = copy.deepcopy(model)
    model.train_step(image(0), image(1), 1e-3)
    for name, moves in (("G.layer.weight", 1), ("D_X.layer.weight", 1), ("G.layer.bias", 0)):
        step = (model.get_parameter(name) - before.get_parameter(name)).abs()
        assert (step / 1e-3 - moves).abs().max() < 1e-2  # Adam's first; the bias is frozen
    cyclegan.save_checkpoint(path, model, {})
    again, _ = cyclegan.load_checkpoint(path, "cpu", **own_networks())
    assert same(state_of(model), state_of(again))
    for load_it in (cyclegan.load_checkpoint, cyclegan.load_generator):
        with pytest.raises(UserError, match="mine.pt "):
            load_it(path)
    monkeypatch.setattr(  # as if it named these networks itself
        cyclegan, "CycleGAN", lambda config: CycleGAN(config, **own_networks()))
    assert weight_difference(cyclegan.load_generator(path, device="cpu"), model.G) == 0


def test_images_may_have_one_channel_and_fill_the_buffer():
    networks = {"G": Small(1, 1), "F": Small(1, 1), "D_X": Small(1, 1), "D_Y": Small(1, 1)}
    model = FastCycleGAN(Config(**TINY), "cpu", **networks)
    for k in range(55):
        model.train_step(image(k)[:, :1], image(k + 99)[:, :1], 1e-4)
    assert [len(model.buffer_X.images), len(model.buffer_Y.images)] == [50, 50]


class Mine(FastCycleGAN):
    """A user's own: another step and other losses, and two groups of parameters."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        group = self.adam_GF.param_groups[0]
        self.adam_GF.add_param_group({**group, "params": [group["params"].pop()]})
        self.seen = 0

    def step(self, x, y, lr, rng):
        self.seen += 1
        return super().step(x, y, lr, rng) | {"seen": torch.tensor(self.seen)}

    def update_G_F(self, x, y, lr):
        fake_y, fake_x, back_x, back_y, _, _ = self.generate(x, y)
        losses = {"cycle": (back_x - x).square().mean() + (back_y - y).square().mean()}
        return cyclegan.minimise(losses, self.adam_GF, lr), fake_x.detach(), fake_y.detach()

    def loss_D(self, D, real, fake):
        return D(real).mean() - D(fake).mean()


def test_a_subclass_runs_its_own_code_and_is_resumed(tmp_path):
    mine = Mine(Config(**TINY), "cpu").double()
    before, (x, y), G, F = copy.deepcopy(mine), batch(0), mine.G, mine.F
    cycle = (F(G(x)) - x).square().mean() + (G(F(y)) - y).square().mean()
    losses, fake_x, fake_y = mine.update_G_F(x, y, 1e-3)
    assert list(losses) == ["cycle"] and abs(losses["cycle"] - cycle) < 1e-12
    for name, p in mine.named_parameters():  # all of G and F, by Adam's first step, and no other
        step = (p - before.get_parameter(name)).abs().max()
        assert 0.9e-3 < step < 1.1e-3 if name[0] in "GF" else step == 0 and p.grad is None, name
    D_Y = mine.D_Y(y).mean() - mine.D_Y(fake_y).mean()
    assert abs(mine.update_D(x, y, fake_x, fake_y, 1e-3)["D_Y"] - D_Y) < 1e-12
    mine = Mine(Config(**TINY, buffer_size=2), "cpu")
    for k in range(4):
        losses = mine.train_step(image(k), image(k + 9), 1e-3)
    assert list(losses) == ["cycle", "D_X", "D_Y", "seen"] and losses["seen"] == 4
    cyclegan.save_checkpoint(tmp_path / "latest.pt", mine, {})
    again, _ = cyclegan.load_checkpoint(tmp_path, "cpu", kind=Mine)
    for each in (mine, again):
        each.train_step(image(5), image(6), 1e-4)
    assert type(again) is Mine and same(state_of(mine), state_of(again))


@pytest.mark.filterwarnings("error")
def test_translate_takes_one_picture_or_many_and_refuses_floats():
    generator = Generator(2, 1)
    for shape in ((33, 70, 3), (1, 1, 3), (2, 5, 7, 3)):
        picture = pixels(math.prod(shape[:-2]), shape[-2]).reshape(shape)[..., ::-1, :]
        picture.flags.writeable = False
        result = cyclegan.translate(generator, picture)
        assert result.shape == shape and result.dtype == np.uint8
    one = cyclegan.translate(generator, picture[1].copy())
    assert np.abs(one - result[1].astype(int)).max() <= 1  # rounded
    for wrong in (picture / 255, picture[..., :1]):
        with pytest.raises(ValueError, match=f"uint8.* not {wrong.dtype} .*{wrong.shape[-1]}"):
            cyclegan.translate(generator, wrong)
    with pytest.raises(ValueError, match="must be uint8 arrays .N, H, W, 3., not uint8 .5, 7, 3."):
        cyclegan.to_tensor(picture[0])


def test_exported_generators_are_exact_at_sizes_that_were_not_traced():
    generator = cyclegan.with_fast_layers(Generator(4, 2)).eval().requires_grad_(False)
    height, width = (4 * torch.export.Dim(name, min=4, max=64) for name in ("h", "w"))
    exported = torch.export.export(generator, (noise(1, 3, 32, 40, dtype=torch.float32),),
                                   dynamic_shapes=({2: height, 3: width},)).module()
    for height, width in ((64, 48), (100, 16)):
        images = noise(1, 3, height, width, dtype=torch.float32)
        assert torch.equal(exported(images), generator(images))


# ---- The step on a GPU, seen without one ---------------------------------------------------------


class OnStandIns(cyclegan.CudaGraph):
    """A CudaGraph on the CPU. Recording runs the function, so the first replay has nothing to do.
    What is recorded is spoilt after each call, as the next replay would write over it."""

    def __call__(self, *inputs):
        results = super().__call__(*inputs)
        if self.calls > 3:
            self.graph.replay = self.replay
            outputs = self.outputs if isinstance(self.outputs, dict) else self.outputs[0]
            for loss in outputs.values():
                loss.fill_(math.nan)
        return results

    def replay(self):
        self.outputs = self.function(*self.inputs)


@pytest.fixture
def on_stand_ins(monkeypatch):
    """Makes a compiled FastCycleGAN on the CPU, without CUDA's streams and graphs."""
    for name in ("stream", "current_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: MagicMock(device=device))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock)
    monkeypatch.setattr(cyclegan, "CudaGraph", OnStandIns)
    monkeypatch.setattr(cyclegan, "choose_device", lambda *_: torch.device("cpu"))

    def make(backend, kind=FastCycleGAN):
        torch.compiler.reset()
        compiler = functools.partial(torch.compile, backend=backend, fullgraph=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", compiler if backend else lambda call, **_: call)
            return kind(Config(32, 36, 1, 2, buffer_size=2), compiled=True).double()

    return make


def assert_steps_of_the_twin(model):
    """Twelve at two rates, in float64, on whatever device; then a batch of another size."""
    twin, found, expected = Twin(model), [], []
    for k in range(12):
        lr = 2.0 ** (-12 - k // 8)  # exact in float32; another reaches what is captured
        expected.append(twin.step(*batch(k), lr, draws(model, k)))
        found.append(model.train_step(*batch(k), lr))
    for one, two in zip(found, expected, strict=True):  # no later step has changed earlier losses
        assert all(abs(one[name].cpu() - loss) < 1e-9 for name, loss in two.items())
    assert weight_difference(model, twin) < 1e-9
    if model.compiled:
        before = copy.deepcopy(state_of(model))
        with pytest.raises(ValueError, match="must have the shape of the first"):
            model.train_step(*batch(0, 2), lr)
        assert same(state_of(model), before)


def test_compiled_and_captured_steps_are_those_of_the_literal_twin(on_stand_ins):
    graphs = CompileCounterWithBackend("aot_eager")
    model = on_stand_ins(graphs)
    assert_steps_of_the_twin(model)
    for update in (model.update_G_F, model.update_D):
        assert update.graph.replay == update.replay  # it was captured, and once
    model.step(*batch(0), 2e-4, random.Random(0))  # as in Part I
    # One graph without a break for each kind of network and size: 1, 2 and 3, and 1 and 2.
    assert graphs.frame_count == 5
    cyclegan.translate(model.G.float(), np.zeros((3, 40, 36, 3), np.uint8))
    assert graphs.frame_count == 5  # a translation compiles nothing


def assert_own_steps(mine):
    """A subclass runs its own Python in every step, so it is not captured."""
    plain = Mine(mine.config, "cpu").double()
    for k in range(6):
        for each in (mine, plain):
            each.train_step(*batch(k), 2.0**-12)
    assert mine.seen == 6 and weight_difference(mine, plain) < 1e-9


def test_a_subclass_is_compiled_but_not_captured(on_stand_ins):
    graphs = CompileCounterWithBackend("eager")
    mine = on_stand_ins(graphs, Mine)
    assert_own_steps(mine)
    assert graphs.frame_count > 3
    assert not isinstance(mine.update_G_F, cyclegan.CudaGraph)


def test_a_step_that_cannot_be_compiled_is_told_in_one_sentence(on_stand_ins):
    def no_compiler(*_):
        raise RuntimeError("no Triton\nhere")

    def fails(*_):  # as a capture does: its end raises an error, too, which hides the first one
        try:
            raise RuntimeError("the cause")
        finally:
            raise error

    said = "^PyTorch cannot compile or capture the step here; start again without --compile .*"
    with pytest.raises(UserError, match=f"{said}no Triton"):
        on_stand_ins(no_compiler).train_step(*batch(0), 2e-4)
    for error, steps, told in (
            (RuntimeError("capture ended"), 0, True), (RuntimeError("capture ended"), 3, True),
            (RuntimeError("of a driver"), 4, False), (RuntimeError("CUDA out of memory"), 0, False),
            (ValueError("of a user's own"), 0, False)):
        model = on_stand_ins(None)
        for k in range(steps):
            model.train_step(*batch(k), 2e-4)
        model.update_D = fails
        with pytest.raises(UserError if told else type(error),
                           match=f"{said}the cause" if told else str(error)):
            model.train_step(*batch(0), 2e-4)
        assert model.steps == steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnCUDA:
    """In float64, where rounding is out of the way: orders of sums alone differ, by 1e-12 or so."""

    @pytest.mark.parametrize("compiled", [False, True])
    def test_steps_are_those_of_the_literal_twin_and_memory_stays(self, compiled):
        torch.compiler.reset()
        config = Config(**TINY, buffer_size=2)
        model, memory = FastCycleGAN(config, "cuda", compiled=compiled).double(), []
        assert_steps_of_the_twin(model)
        assert not compiled or model.update_D.graph
        for k in range(30):
            model.train_step(*batch(k), 2e-4)
            memory.append(torch.cuda.memory_allocated())
        assert memory[9] == memory[29]

    def test_a_subclass_is_compiled_but_not_captured(self):
        torch.compiler.reset()
        assert_own_steps(Mine(Config(**TINY, buffer_size=2), "cuda", compiled=True).double())


def test_bf16_leaves_weights_losses_and_images_in_float32():
    model, x = FastCycleGAN(Config(**TINY), "cpu", "bf16"), image()
    losses = model.train_step(x, x, 2e-4)
    tensors = (*losses.values(), *model.parameters(), *model.buffer_X.images)
    assert {v.dtype for v in tensors} == {torch.float32}
    exact = FastCycleGAN(Config(**TINY), "cpu").train_step(x, x, 2e-4)
    for name in ("gan", "cycle"):  # bf16 has 8 bits: some percent after 12 layers
        assert 0 < abs(losses[name] / exact[name] - 1) < 0.1
    G = copy.deepcopy(model.G)
    for parameter in G.parameters():
        nn.init.zeros_(parameter)
    assert not G(x).any()  # a copy computes with its own weights


# ---- Several processes ---------------------------------------------------------------------------


def train_in_process(rank, world_size, port, folder):
    """Takes three steps in float64 with each size of buffer, and writes the weights after each."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank),
                          WORLD_SIZE=str(world_size))
        torch.distributed.init_process_group("gloo")
    weights = []
    for size in (0, 2):  # of the buffers
        G = Generator(4, 2, torch.Generator().manual_seed(rank))  # rank 0's is taken
        G.model[-2].bias.requires_grad_(False)  # so it has no gradient
        model = Mine(Config(**TINY, buffer_size=size), "cpu", G=G).double()
        for k in range(3):
            def step(x, y, lr, rng):
                assert rng.getstate() == random.Random(f"0 {k} {rank}").getstate()
                return CycleGAN.step(model, x, y, lr, rng)

            model.step = step
            images = noise(2, 2, 3, 32, 32, seed=k)  # x and y; of each, one for each process
            model.train_step(*images if world_size == 1 else images[:, rank:rank + 1], 2e-4)
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())
    np.save(folder / f"{world_size}_{rank}.npy", weights)


def test_two_processes_take_the_step_of_one(tmp_path):
    port = free_port()
    workers = [PROCESSES.Process(target=train_in_process, args=(rank, 2, port, tmp_path))
               for rank in (0, 1)]
    for worker in workers:
        worker.start()
    train_in_process(0, 1, port, tmp_path)
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    first, second, alone = (np.load(tmp_path / f"{name}.npy") for name in ("2_0", "2_1", "1_0"))
    assert np.array_equal(first, second)  # after every step
    # With buffers, of which each process has its own, the step is another.
    assert np.abs(first - alone)[:3].max() < 1e-12 < np.abs(first - alone)[5].max()


# ==== Files =======================================================================================


def test_checkpoint_restores_everything_bit_for_bit(tmp_path):
    one, run = FastCycleGAN(Config(**TINY, buffer_size=2), "cpu"), tmp_path / "run"
    place = {"epoch": 3, "a": [1, 2.5, None, True, "b"], "c": {"d": torch.ones(2)}}
    for k in range(4):
        one.train_step(image(k), image(k + 9), 1e-3)
    cyclegan.save_checkpoint(f"{run}/latest.pt", one, place)
    two, of_two = cyclegan.load_checkpoint(str(run), "cpu")  # a folder will do
    assert same(of_two, place) and two.config == one.config and two.steps == 4
    for direction, network in (("AtoB", one.G), ("BtoA", one.F)):
        generator = cyclegan.load_generator(run, direction, "cpu")
        assert weight_difference(generator, network) == 0 and not generator.training
        assert not any(p.requires_grad for p in generator.parameters())
        assert (generator.config, generator.steps) == (one.config, 4)
        assert same(generator.place, place)
    for rate in (1e-3, 1e-4):
        assert same(state_of(one), state_of(two))
        for each in (one, two):
            each.train_step(image(20), image(30), rate)
    saved = files_of(run)
    for wrong in (np.float64(0.1), np.zeros(3), np.int64(7), tmp_path, [{"a": tmp_path}]):
        with pytest.raises(UserError, match="latest.pt: `place` must hold plain values and tens"):
            cyclegan.save_checkpoint(run / "latest.pt", one, {"a": wrong})
    assert same(files_of(run), saved) and list(saved) == ["latest.pt"]
    with pytest.raises(ValueError, match="BtoC"):
        cyclegan.load_generator(run, "BtoC")


FORMS = {  # prefix, dropout, statistics, blocks of files that the authors' programs have written
    "plain": ("", False, False, 9), "old": ("", False, True, 9), "dropout": ("", True, False, 6),
    "old with dropout": ("", True, True, 9), "parallel": ("module.", False, False, 6),
    "compiled": ("_orig_mod.", False, False, 9), "small": ("", False, False, 6)}


def authors_file(path, form="small", width=3, seed=0):
    """Writes a file of a generator as the authors' programs do, -> that generator, their twin."""
    prefix, dropout, statistics, blocks = FORMS[form]
    torch.manual_seed(seed)
    twin = twin_generator(width, blocks, dropout, statistics)
    for layer in twin.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # as in use; the statistics of a norm stay the picture's own
    path.parent.mkdir(exist_ok=True)
    torch.save({f"{prefix}{key}": value for key, value in twin.state_dict().items()}, path,
               _use_new_zipfile_serialization=not statistics)  # PyTorch 0.3 had no zip files
    return twin


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
def test_authors_files_translate_as_their_networks_do(form, tmp_path):
    picture, path = photograph(), tmp_path / "200_net_G_B.pth"
    twin = authors_file(path, form, 5)
    generator = cyclegan.load_generator(str(path), device="cpu")
    ours = cyclegan.translate(generator, picture)
    height, width = picture.shape[:2]  # it grows to multiples of 4 by reflection
    grown = np.pad(picture, ((0, -height % 4), (0, -width % 4), (0, 0)), mode="reflect")
    with torch.no_grad():
        theirs = twin(torch.from_numpy(grown).permute(2, 0, 1)[None] / 127.5 - 1)
    theirs = (theirs[0, :, :height, :width].permute(1, 2, 0).numpy() + 1) * 127.5
    assert ours.shape == picture.shape and ours.std() > 5
    assert np.abs(ours - theirs).max() < 1  # one is rounded, the other is not
    assert generator.config is None and generator.settings == {"width": 5, "blocks": FORMS[form][3]}
    assert (generator.steps, generator.place) == (None, {})


def test_averages_load_and_networks_without_biases_are_loaded_with_a_note(tmp_path):
    for network, notes in ((twin_generator(3, 6), 0), (Generator(3, 6), 1)):
        torch.save(torch.optim.swa_utils.AveragedModel(network).state_dict(), tmp_path / "a")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loaded = cyclegan.load_generator(tmp_path / "a", device="cpu")
        assert weight_difference(loaded, network) == 0 and len(told) == notes
        assert all("no biases before norms: right for a generator of this project, wrong for"
                   in str(warning.message) for warning in told)


def test_a_folder_of_authors_files_gives_the_one_of_the_direction(tmp_path):
    with pytest.raises(UserError, match="latest.pt: No such file"):
        cyclegan.load_generator(tmp_path)
    for names in (("latest_net_G_A", "latest_net_G_B"), ("latest_net_G", "latest_net_G")):
        folder = tmp_path / str(len(names[0]))
        authors_file(folder / "95_net_G_A.pth")
        twins = [authors_file(folder / f"{name}.pth", seed=ord(name[-1])) for name in names]
        for twin, direction in zip(twins, ("AtoB", "BtoA"), strict=True):
            loaded = cyclegan.load_generator(folder, direction, "cpu")
            assert weight_difference(loaded, twin) == 0


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("malice_was_here",))


def test_damaged_and_foreign_files_are_refused_by_their_reason_and_run_no_code(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cyclegan.save_checkpoint("whole", FastCycleGAN(Config(**TINY), "cpu"), {})
    whole, weights = Path("whole").read_bytes(), Generator(4, 9).state_dict()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for name, content, reason in (
            ("missing", None, "No such file"), ("empty", b"", "is damaged"),
            ("text", b"hello", "is damaged"), ("short", whole[:-100], "is damaged"),
            ("half", whole[:len(whole) // 2], "is damaged"),
            ("flipped", bytes(flipped), "is damaged"), ("list", [1, 2], "is damaged or not a"),
            ("malice", {"model": Malice()}, "holds a whole module, or other Python objects"),
            ("module", Generator(2, 1), "holds a whole module, .* which are not loaded"),
            ("antialiased", {**weights, "model.5.filt": torch.zeros(1)}, "it is anti-aliased"),
            ("unet", {"model.model.0.weight": torch.zeros(1)}, "it has no model.1.weight"),
            ("D", Discriminator(4).state_dict(), "it has no model.1.weight"),
            ("batch", {**weights, "model.2.weight": torch.zeros(4)}, "its norms are BatchN"),
            ("grey", {**weights, "model.1.weight": torch.zeros(4, 1, 7, 7)}, "takes 1 channels"),
            ("more", {**weights, "model.30.weight": torch.zeros(4)}, "unexpected key model.30.wei"),
            ("less", {k: v for k, v in weights.items() if "19" not in k}, "missing .* model.19."),
            ("wide", {**weights, "model.4.weight": torch.zeros(3)}, "size mismatch"),
            ("nothing", {**weights, "model.1.weight": None}, "NoneType"),
            ("inside", {"epoch": 3, "state_dict": weights}, "its weights are under state_dict")):
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        elif content is not None:
            torch.save(content, name)
        with pytest.raises(UserError, match=f"{name}.*{reason}") as raised:
            cyclegan.load_generator(name)
        assert "\n" not in str(raised.value)
        with pytest.raises(UserError, match=name):
            cyclegan.load_checkpoint(name)
    assert not Path("malice_was_here").exists()


def test_memory_that_runs_out_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    cyclegan.save_checkpoint(tmp_path / "latest.pt", FastCycleGAN(Config(**TINY), "cpu"), {})
    for owner, name in ((torch, "load"), (cyclegan, "Config")):
        monkeypatch.setattr(owner, name, fails)
        for load_it in (cyclegan.load_checkpoint, cyclegan.load_generator):
            with pytest.raises(RuntimeError, match="^DefaultCPUAllocator"):
                load_it(tmp_path)
        monkeypatch.undo()


def test_impossible_values_in_a_checkpoint_are_refused(tmp_path):
    model, path = FastCycleGAN(Config(**TINY), "cpu"), tmp_path / "latest.pt"
    model.train_step(image(), image(), 2e-4)
    cyclegan.save_checkpoint(path, model, {})
    for *keys, last, value in (
            ("steps", "x"), ("steps", math.inf), ("adams", [{}]), ("config", "lr", -1.0),
            ("buffers", None), ("model", "G.model.1.weight", torch.zeros(3)),
            # The fused Adam would write past the end of moments of another shape.
            ("adams", 1, 0, "exp_avg", torch.zeros(3)), ("adams", 1, 0, "exp_avg", None),
            ("adams", 1, 0, "exp_avg_sq", torch.zeros(1))):
        saved = torch.load(path)
        functools.reduce(lambda inside, key: inside[key], keys, saved)[last] = value
        torch.save(saved, tmp_path / "wrong.pt")
        with pytest.raises(UserError, match="wrong.pt is not a checkpoint of this model"):
            cyclegan.load_checkpoint(tmp_path / "wrong.pt", "cpu")


def test_files_are_synced_before_they_take_their_names(tmp_path, monkeypatch):
    path, calls, failing = tmp_path / "new" / "a", [], []

    def watched(name, function):
        def call(*given):
            calls.append((name, os.listdir(path.parent)))
            if name in failing:
                raise PermissionError(13, "held")
            function(*given)

        monkeypatch.setattr(os, name, call)

    watched("fsync", os.fsync)
    watched("replace", os.replace)
    cyclegan.write_file(path, b"old")
    assert calls == [(name, [f"a.{os.getpid()}.part"]) for name in ("fsync", "replace")]
    for failing[:] in (["fsync"], ["replace"]):
        with pytest.raises(UserError, match=f"^cannot write {path}: held$"):
            cyclegan.write_file(path, b"new")
        assert os.listdir(path.parent) == ["a"] and path.read_bytes() == b"old"
    failing.clear()
    for wrong in (path / "b", tmp_path / ("n" * 300), tmp_path):
        with pytest.raises(UserError, match="^cannot write "):
            cyclegan.write_file(wrong, b"")


def test_importing_cyclegan_leaves_pillows_guard_against_bombs_on(tmp_path, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 2**30 // 4 // 3
    Image.new("1", (15, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 70)
    with pytest.raises(UserError, match="a.png: .*decompression bomb"):
        cyclegan.read_picture(tmp_path / "a.png")


# ==== Helpers for the programs ====================================================================


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def photograph(width=190, height=253):
    """Smooth, with some texture."""
    smooth = np.asarray(Image.fromarray(pixels(9, 7)).resize((190, 253), Image.BICUBIC)).astype(int)
    picture = Image.fromarray((smooth + pixels(253, 190) // 6 - 21).clip(0, 255).astype(np.uint8))
    return np.asarray(picture.resize((width, height), Image.BICUBIC))


class Recolours(nn.Module):
    """A network with a scale that changes colours by an affine map, and notes what it saw."""

    def __init__(self, config=None, A=((1, 0, 0), (0, 1, 0), (0, 0, 1)), b=(0, 0, 0)):
        super().__init__()
        self.config, self.saw = config, []
        self.A, self.b = nn.Parameter(torch.tensor(A).float()), torch.tensor(b).float()

    def forward(self, images):
        self.saw.append(tuple(images.shape[2:]))
        return torch.einsum("ij,njhw->nihw", self.A, images) + self.b[:, None, None]


def small_authors_file(path, seed=0):
    """A generator of width 3 with 6 blocks, as the authors' program saves it -> its weights."""
    weights = authors_file(path, seed=seed).state_dict()
    return {key: weights[key] for key in Generator(3, 6).state_dict()}


IN_A_FORK = """
import io, os, resource, runpy, shlex, signal, sys, torch, cyclegan
for stream, name in ((1, out), (2, err)):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), stream)
sys.stdout.reconfigure(line_buffering=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever those of pytest are
for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
os.chdir(folder)
os.environ.update(environment)
torch.set_num_threads(1)

def kill(name):
    os.kill(os.getpid(), getattr(signal, name))

def at_step(step, do):  # does something when so many steps are done
    train_step = cyclegan.FastCycleGAN.train_step
    def watched(self, *batch):
        if self.steps == step:
            do()
        return train_step(self, *batch)
    cyclegan.FastCycleGAN.train_step = watched

exec(first)
program, *sys.argv[1:] = shlex.split(line)
sys.argv[0] = os.path.join(here, program)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(folder, line, first="", **environment):
    """Starts a command line, as from the shell, after some Python -> a function to wait for it.

    The process is forked from one that has imported torch, which takes seconds.
    """
    texts = Path(tempfile.mkdtemp(dir=folder, prefix="."))
    process = PROCESSES.Process(target=exec, args=(IN_A_FORK, {
        "here": HERE, "folder": folder, "line": line, "out": texts / "out", "err": texts / "err",
        "first": first, "environment": environment}))
    process.start()

    def finish():
        process.join(300)
        out, err = ((texts / name).read_text() for name in ("out", "err"))
        shutil.rmtree(texts)
        assert "Traceback" not in err, err
        return process.exitcode, out, err

    finish.pid, finish.texts = process.pid, texts  # for signals, and for what it says meanwhile
    return finish


def run(folder, line, first="", **environment):
    """Runs a command line -> (exit status, output, errors)."""
    return start(folder, line, first, **environment)()


def ok(folder, line, first="", **environment):
    """What it prints, if it ends well."""
    status, out, err = run(folder, line, first, **environment)
    assert status == 0 and not err, (line, out, err)
    return out


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def pair(folder, line, first=""):
    """The ends of two processes, as of torchrun. `first` is for the second alone."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    programs = [start(folder, line, first * rank, WORLD_SIZE="2", RANK=str(rank),
                      LOCAL_RANK=str(rank), **address) for rank in (0, 1)]
    return [finish() for finish in programs]


def load(run):
    return torch.load(run / "latest.pt", weights_only=True)


def same(one, two):
    """Whether two things, of dicts, lists, tensors and values, are the same to the last bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def files_of(folder):
    """{name: bytes}, of checkpoints {name: what is in them}, of all below a folder."""
    return {str(path.relative_to(folder)): torch.load(path) if path.suffix == ".pt"
            else path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses_of(run):
    return np.loadtxt(run / "losses.csv", delimiter=",", skiprows=1)


# ==== Pictures ====================================================================================


def fill(folder, *names):
    """Makes empty files, and their folders."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_pictures_are_found_through_links_and_what_is_ignored_is_counted(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    fill(folder, "a.png", "x.txt", "more/y.TXT", "z", ".hidden.png", ".git/c.png", "run/latest.pt",
         "run/samples/d.png", "g.HEIC", *(f"more/{k}.cr2" for k in range(1000)))
    fill(tmp_path, "elsewhere/b.JPEG", "texts/a.txt", "empty/.hidden.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "more" / "up").symlink_to(folder)  # round in circles
    # As where pillow-heif is not installed.
    monkeypatch.setattr(cyclegan, "SUFFIXES", cyclegan.SUFFIXES.replace(" .heic .heif", ""))
    with pytest.warns(UserWarning) as warned:
        found = cyclegan.find_pictures(str(folder))
    assert found == [folder / "a.png", folder / "link" / "b.JPEG"]
    [said] = {str(warning.message) for warning in warned}
    assert f"{folder}: 1,000 .cr2, 2 .txt, 1 " in said and "1 without a suffix" in said
    assert "png," not in said and ".pt" not in said
    assert "1 .heic" in said and "(to read HEIC: pip install pillow-heif)" in said

    deep = os.open(tmp_path / "empty", os.O_RDONLY)
    for name in ["deep"] + 40 * ["d" * 140]:  # longer than a path may be: even root cannot read it
        os.mkdir(name, dir_fd=deep)
        parent, deep = deep, os.open(name, os.O_RDONLY, dir_fd=deep)
        os.close(parent)
    os.close(deep)
    for name, sentence in (("in/run", "is a run, not a folder of pictures"),
                           ("texts", "there are no pictures .*texts; ignored: 1 .txt$"),
                           ("nowhere", "nowhere: No such file"), ("empty", "empty/deep/ddd")):
        with pytest.raises(UserError, match=sentence):
            cyclegan.find_pictures(tmp_path / name)


def test_pictures_of_every_8_bit_mode(tmp_path):
    ramp = np.linspace(0, 255, 6 * 5).round().astype(np.uint8).reshape(5, 6)
    colours = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1)
    rgb, grey, white = Image.fromarray(colours), np.stack([ramp] * 3, -1), ramp[..., None] > 100
    alpha = Image.fromarray(np.dstack([colours, np.where(ramp > 100, 255, 0).astype(np.uint8)]))
    luma, key = (colours @ [0.299, 0.587, 0.114])[..., None].repeat(3, -1), colours[0, 0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    cases = [
        ("rgb.png", rgb, {}, colours), ("grey.png", Image.fromarray(ramp), {}, grey),
        ("1.png", Image.fromarray(ramp > 100), {}, np.where(grey > 100, 255, 0)),
        ("palette.png", Image.fromarray(ramp).convert("P"), {}, grey),
        ("alpha.png", alpha, {}, np.where(white, colours, 255)),
        ("la.png", alpha.convert("LA"), {}, np.where(white, luma, 255)),
        ("key.png", rgb, {"transparency": tuple(map(int, key))},
         np.where((colours == key).all(-1, keepdims=True), 255, colours)),
        ("turned.png", rgb, {"exif": exif}, np.rot90(colours, -1)),
        ("turned.tif", rgb, {"exif": exif}, np.rot90(colours, -1)),
        ("turned-alpha.png", alpha, {"exif": exif}, np.rot90(np.where(white, colours, 255), -1)),
        ("cmyk.tif", rgb.convert("CMYK"), {}, colours),
        ("animated.gif", Image.fromarray(ramp), {"save_all": True, "append_images": [rgb]}, grey)]
    for name, image, options, expected in cases:
        image.save(tmp_path / name, **options)
        picture = cyclegan.read_picture(str(tmp_path / name))
        assert picture.dtype == np.uint8 and picture.shape == expected.shape, name
        assert np.abs(picture - expected.astype(float)).max() <= 1, name  # rounded on the way
        larger = cyclegan.read_picture(tmp_path / name, 10)
        assert larger.shape == ((12, 10, 3) if "turned" in name else (10, 12, 3)), name
    assert cyclegan.read_picture(tmp_path / "rgb.png", 10, squash=True).shape == (10, 10, 3)

    header = struct.pack("<2sIIIIiiHHIIiiIIIII", b"BM", 70, 0, 66, 40, 2, 1, 1, 16, 3, 4, 0, 0, 0,
                         0, 0xF800, 0x07E0, 0x001F)  # 5, 6 and 5 bits of red, green and blue
    (tmp_path / "565.bmp").write_bytes(header + struct.pack("<HH", 31 << 11, 63 << 5))
    assert cyclegan.read_picture(tmp_path / "565.bmp").tolist() == [[[255, 0, 0], [0, 255, 0]]]


def test_colour_profiles_are_brought_to_srgb_and_unreadable_ones_ignored(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = srgb.replace("sRGB built-in".encode("utf-16-be"), "RsGB built-in".encode("utf-16-be"))
    exchanged = other.replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")
    picture = pixels(8, 9)
    for profile, channels in ((srgb, [0, 1, 2]), (b"no profile", [0, 1, 2]),
                              (exchanged, [1, 0, 2])):  # whose red is green, and green red
        for image in (Image.fromarray(picture), Image.fromarray(picture).convert("RGBA")):
            image.save(tmp_path / "a.png", icc_profile=profile)
            read = cyclegan.read_picture(tmp_path / "a.png")
            assert np.abs(read - picture[..., channels].astype(int)).max() <= 1  # rounded


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = photograph()[..., :1].repeat(3, -1)
    pillow_heif.from_pillow(Image.fromarray(picture)).save(tmp_path / "a.heic", quality=-1)
    assert cyclegan.find_pictures(tmp_path) == [tmp_path / "a.heic"]
    read = cyclegan.read_picture(tmp_path / "a.heic")
    assert np.abs(read - picture.astype(int)).max() <= 3  # rounded on the way to YCbCr and back


def test_an_old_pillow_is_said_as_such(monkeypatch):
    monkeypatch.delattr(Image.Image, "has_transparency_data")  # 10.1 was the first to have it
    with pytest.raises(ImportError, match="^Pillow is too old; run: python -m pip install --up"):
        runpy.run_path(cyclegan.__file__)


def test_pictures_that_cannot_be_read_are_refused_in_one_sentence(tmp_path):
    deep = "it has more than 8 bits a channel; docs/using.md has a script"
    values, folder = np.linspace(0, 65535, 30).astype(np.uint16).reshape(5, 6), tmp_path
    for name, kind in (("grey.png", np.uint16), ("grey.tif", np.uint16), ("whole.tif", np.int32),
                       ("fraction.tif", np.float32)):
        Image.fromarray(values.astype(kind)).save(folder / name)
    data = bytearray(cyclegan.png(pixels(5, 6)))
    data[24] = 16  # bits a channel, which Pillow does not write
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (folder / "rgb.png").write_bytes(data)
    (folder / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with Image.open(folder / "eps.png") as image:
        assert image.format == "EPS"  # Pillow would have Ghostscript execute it
    os.mkfifo(folder / "pipe.png")  # to read it would take for ever
    Image.new("1", (20000, 9000)).save(folder / "huge.png")
    for name, size in (("long.png", (501, 5)), ("tall.png", (5, 500))):
        Image.new("RGB", size).save(folder / name)
    (folder / "cut.png").write_bytes((folder / "long.png").read_bytes()[:60])
    (folder / "loop.png").symlink_to("loop.png")
    reasons = {"grey.png": deep, "grey.tif": deep, "whole.tif": deep, "fraction.tif": deep,
               "rgb.png": deep, "eps.png": "cannot identify", "pipe.png": "it is not a file",
               "cut.png": "", "long.png": "it is more than a hundred times as long as wide",
               "huge.png": ".*180000000 pixels.* exceeds limit", "missing.png": "No such file",
               "loop.png": ""}
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=f"cannot read .*{name}: {reason}") as raised:
            cyclegan.read_picture(folder / name, 24)
        assert "\n" not in str(raised.value)
        # By the number training tells a drive that is away from a picture that is damaged.
        number = getattr(raised.value.__cause__, "errno", None)
        assert bool(number) == (name in ("loop.png", "missing.png")), name
    assert cyclegan.read_picture(folder / "tall.png", 24).shape == (2400, 24, 3)
    assert cyclegan.read_picture(folder / "long.png").shape == (5, 501, 3)


def test_large_jpegs_are_reduced_while_they_are_decoded_without_moving(tmp_path, monkeypatch):
    decoded, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *rest: (
        decoded.append(image.size) or resize(image, *rest)))
    for (width, height), side, size in (
            ((800, 640), 40, (100, 80)), ((800, 640), 41, (200, 160)),  # to twice the side, or more
            ((807, 641), 40, (101, 81)), ((805, 643), 41, (202, 161)),  # 8 and 4 do not divide it
            ((800, 640), 321, (800, 640))):
        Image.fromarray(photograph(width, height)).save(tmp_path / "a.jpg", quality=95)
        with Image.open(tmp_path / "a.jpg") as image:
            whole = np.asarray(resize(image, (round(width * side / height), side), Image.BICUBIC))
        decoded.clear()
        read = cyclegan.read_picture(tmp_path / "a.jpg", side)
        assert decoded == [size], (width, side)
        # A JPEG's own reduction is a box, a little blunter than that of Pillow.
        assert np.abs(read - whole.astype(int)).max() <= 6, (width, side)


def test_bytes_survive_the_way_to_a_tensor_and_back():
    picture = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    tensor = cyclegan.to_tensor(picture)
    assert tensor.shape == (1, 3, 16, 16) and (tensor.min(), tensor.max()) == (-1, 1)
    assert (cyclegan.to_pictures(tensor) == picture).all()
    cut = (3 * picture.astype(int) - 255).clip(0, 255)
    assert (cyclegan.to_pictures(3 * tensor) == cut).all()
    over_half = torch.full((1, 3, 1, 1), 0.5 / 127.5 - 1 + 1e-4)
    assert cyclegan.to_pictures(over_half).max() == 1  # rounded, not cut
    for height, width in ((1, 1), (1, 50), (5, 7), (64, 64), (33, 70)):
        pictures = np.stack([pixels(height, width), pixels(height, width, 1)])
        assert (cyclegan.translate(Recolours(), pictures) == pictures).all()
    for wrong in (picture / 255, picture[..., :1], picture[0]):
        with pytest.raises(ValueError, match="pictures must be uint8 arrays"):
            cyclegan.to_tensor(wrong)


def test_titles_stand_above_their_columns():
    for (height, width), strip in (((40, 120), 14), ((500, 900), 21)):
        picture, titles = pixels(height, width), ["x", "G(x)", "F(G(x))"]
        sheet = cyclegan.with_titles(picture, titles)
        assert sheet.shape == (strip + height, width, 3) and (sheet[strip:] == picture).all()
        ink = (sheet[:strip] < 128).all(-1).reshape(strip, 3, width // 3).any(0)
        starts, ends = ink.argmax(1), width // 3 - ink[:, ::-1].argmax(1)
        assert ink.any(1).all() and max(starts) < 8 and ends[0] < ends[1] < ends[2]


# ---- One picture, at the scale of training -------------------------------------------------------


def test_pictures_reach_the_network_at_the_scale_of_training():
    ours, squashed = Config(), Config(squash=True)
    for config, (width, height), size, expected in (  # what the network sees: height and width
            (ours, (400, 300), None, (288, 384)), (ours, (30, 40), None, (384, 288)),
            (None, (400, 300), None, (256, 344)), (ours, (400, 300), 100, (100, 136)),
            (ours, (400, 300), "full", (300, 400)), (squashed, (400, 300), None, (288, 288)),
            (squashed, (400, 300), 100, (100, 100)), (ours, (7, 700), None, (10240, 104))):
        network = Recolours(config)  # 286 x 381 grow to multiples of 4
        picture = np.full((height, width, 3), 99, np.uint8)
        assert (translate.translate_photo(network, picture, size) == picture).all()
        assert network.saw == [expected]


def test_a_picture_that_is_not_reduced_gets_the_networks_own_output():
    generator, picture = Generator(4, 1), photograph()
    generator.config = Config(image_size=64, load_size=190, blocks=1)
    result = translate.translate_photo(generator, picture)
    assert (result == cyclegan.translate(generator, picture)).all()
    generator.config = Config(image_size=64, load_size=285, blocks=1)  # enlarged
    larger = np.asarray(Image.fromarray(picture).resize((285, 380), Image.BICUBIC))
    result = Image.fromarray(cyclegan.translate(generator, larger))
    expected = np.asarray(result.resize((190, 253), Image.BICUBIC))
    assert (translate.translate_photo(generator, picture) == expected).all()


def disc(side, period=None):
    """A plain disc on a wall; with stripes of a period, a fraction of the side, if given."""
    v, u = (np.mgrid[:side, :side] + 0.5) / side
    inside = (0.38 - np.hypot(u - 0.5, v - 0.5)) * side
    stripes = 0 if period is None else 90 * np.sign(np.sin(2 * np.pi * u / period))
    picture = 90 + np.clip(inside + 0.5, 0, 1) * (60 + stripes)
    return np.stack([picture, picture * 0.9, picture * 0.8], -1).round().astype(np.uint8)


def enlarged(image, height, width):
    """(h, w, 3) -> (height, width, 3): bilinear between the centres of pixels, in NumPy."""
    def weights(old, new):
        centres = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
        return np.maximum(0, 1 - abs(centres[:, None] - np.arange(old)))

    rows, columns = weights(image.shape[0], height), weights(image.shape[1], width)
    return np.einsum("yi,ijc,xj->yxc", rows, image, columns, optimize=True)


def test_what_the_network_changed_is_enlarged_and_added():
    config = Config(image_size=64, load_size=72)
    picture = photograph(701, 935) // 2 + 60
    brighter = Recolours(config, b=(20 / 127.5, -30 / 127.5, 0))
    result = translate.translate_photo(brighter, picture)
    assert brighter.saw == [(96, 72)] and (result == picture + np.array([20, -30, 0])).all()
    A, b = ((0.5, 0.2, 0), (0, 0.7, 0.1), (0.3, 0, 0.4)), (0.1, -0.2, 0.3)
    small = np.asarray(Image.fromarray(picture).resize((72, 96), Image.BICUBIC))
    change = (np.array(A) @ (small / 127.5 - 1)[..., None])[..., 0] + b - (small / 127.5 - 1)
    expected = (picture + enlarged(change * 127.5, 935, 701)).clip(0, 255)
    result = translate.translate_photo(Recolours(config, A, b), picture)
    assert np.abs(result - expected).max() <= 1.01  # both the change and the sum are rounded
    for height, width in ((1, 1), (2, 5), (300, 1)):
        picture = pixels(height, width)
        small = picture[:max(1, height // 2), :max(1, width // 2)]
        result = translate.carry_back(picture, small, 255 - small)
        expected = picture + enlarged(255 - 2.0 * small, height, width)
        assert np.abs(result - expected.clip(0, 255)).max() <= 0.51
        assert translate.translate_photo(Recolours(), picture).shape == picture.shape


def test_stripes_that_the_network_paints_are_carried_back():
    # The drawn stripes have sharp edges, those of 64 pixels cannot. Measured: 7.1, 4.1, 3.0 grey
    # levels; 9.4, 5.3, 3.6 with a bicubic change, 20, 11, 8 where it is averaged over 3 x 3.
    for period, most in ((6, 8), (12, 4.7), (20, 3.3)):  # pixels of the small picture
        truth = disc(512, period / 64).astype(int)
        result = translate.carry_back(disc(512), disc(64), disc(64, period / 64))
        assert np.abs(disc(512) - truth).mean() > 20 and np.abs(result - truth).mean() < most


def test_a_picture_of_12_megapixels_needs_little_memory(tmp_path):
    code = """
import numpy as np, translate
picture, network = np.full((3000, 4000, 3), 99, np.uint8), torch.nn.Identity()
network.config, network.parameters = None, lambda: iter([torch.zeros(1)])
def print_peak():  # in GB
    unit = 1 if sys.platform == "darwin" else 1024
    print(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9)
print_peak()
translate.translate_photo(network, picture)
print_peak()
cyclegan.to_pictures(cyclegan.to_tensor(picture[None]))
print_peak()
"""
    before, small, whole = map(float, ok(tmp_path, "translate.py --help", code).splitlines()[:3])
    # The picture takes 0.14 GB as float32, and is in memory two and three times at once.
    assert small - before < 0.36 and whole - before < 0.5 and whole < 1.5


# ---- Translating (translate.py as a program) -----------------------------------------------------

PHOTOS = "translate.py photos --checkpoint trained"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with apples/ (4), oranges/ (2), photos/ (3 of different sizes), and a run."""
    folder = tmp_path_factory.mktemp("user")
    for name, count in (("apples", 4), ("oranges", 2)):
        (folder / name).mkdir()
        for k in range(count):
            Image.fromarray(photograph(30 + k, 33)).save(folder / name / f"{k}.png")
    (folder / "photos" / "more").mkdir(parents=True)
    for k, name in enumerate(("a.jpg", "b.png", "more/b.png")):
        Image.fromarray(photograph(41, 32 + k)).save(folder / "photos" / name)
    small_authors_file(folder / "horse2zebra" / "latest_net_G.pth")
    ok(folder, "train.py --dataA apples --dataB oranges --image-size 24 --load-size 28 --width 2 "
               "--blocks 1 --epochs 1 --decay-epochs 1 --save-every 1 --out trained")
    return folder


def test_translations_keep_names_folders_and_sizes(photos):
    out = ok(photos, f"{PHOTOS} --out there/new").splitlines()
    assert out[0] == "trained, at step 8, AtoB, pictures: 3" and len(out) == 5
    assert re.fullmatch(r"2 of 3, 0:00:0\d left: there/new/b.png", out[2])
    assert out[-1] == "3 translated into there/new, 0 skipped"
    ok(photos, "translate.py photos/b.png --checkpoint ~/trained --format jpg ~/photos/more "
               "--direction BtoA --side-by-side --out ~/jpegs", HOME=str(photos))
    assert files_of(photos / "there" / "new").keys() == {"a.png", "b.png", "more/b.png"}
    assert files_of(photos / "jpegs").keys() == {"b.jpg", "more/b.jpg"}
    picture = cyclegan.read_picture(photos / "photos" / "b.png")
    for file, direction, box in (("there/new/b.png", "AtoB", (0, 0, 41, 33)),
                                 ("jpegs/b.jpg", "BtoA", (41, 14, 82, 47))):
        network = cyclegan.load_generator(photos / "trained", direction)
        expected = translate.translate_photo(network, picture).astype(int)
        with Image.open(photos / file) as image:
            assert image.format == file[-3:].upper().replace("JPG", "JPEG")
            assert image.size == box[2:]
            error = np.abs(np.asarray(image.crop(box)) - expected)
            left = np.asarray(image.crop((0, box[1], 41, box[3])))
        # Rounding may differ in another process; a JPEG loses more.
        assert error.max() <= 1 if direction == "AtoB" else error.mean() < 8
    assert np.abs(left - picture.astype(int)).mean() < 8
    out = ok(photos, "translate.py photos/b.png --checkpoint horse2zebra")
    assert out.startswith(
        "horse2zebra, step unknown, AtoB, pictures: 1\nnote: these weights do not record the "
        "scale of their training; 256 pixels are assumed, --size sets another\n")
    ok(photos, f"{PHOTOS} --size full --side-by-side")
    for name in ("horse2zebra/translated-AtoB-horse2zebra",
                 "trained/translated-AtoB-8-full-side-by-side"):
        assert (photos / name / "b.png").is_file()


def test_results_that_exist_are_kept_and_a_stopped_call_goes_on(photos):
    stop = ("translate, seen = cyclegan.translate, []\ndef stops(*inputs):\n"
            "    seen.append(0)\n    if len(seen) == 3:\n        kill('SIGINT')\n"
            "    return translate(*inputs)\ncyclegan.translate = stops")
    status, _, err = run(photos, PHOTOS, stop)
    assert status == 1 and err == f"translate.py: stopped; to continue: python {PHOTOS}\n", err
    out, name = photos / "trained" / "translated-AtoB-8", "trained/translated-AtoB-8"
    assert 3 > len(list(out.rglob("*.png"))) == len(files_of(out))
    (out / "b.png").write_text("of somebody else")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    said = ok(photos, PHOTOS)
    assert f"\n{len(before)} of the results exist in {name} and are kept; use --overwrite to " \
           f"redo them\n" in said and said.startswith("trained, at step 8, AtoB, pictures: 3\n")
    assert said.endswith(f"{3 - len(before)} translated into {name}, 0 skipped\n")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    ok(photos, f"{PHOTOS} --overwrite")
    ok(photos, PHOTOS.replace("trained", "trained/epoch_0001.pt"))
    later, earlier = files_of(out), files_of(photos / "trained" / "translated-AtoB-4")
    assert later.keys() == earlier.keys() == {"a.png", "b.png", "more/b.png"}
    assert all(later[name] != earlier[name] for name in later) and later["b.png"][1:4] == b"PNG"


def test_pictures_that_are_translated_are_never_written_over(photos):
    shutil.copytree(photos / "photos", photos / "mixed")
    (photos / "link").symlink_to("mixed")
    sources = files_of(photos / "mixed")
    folder, over = "is the folder of the pictures; choose another\n", "would overwrite pictures; ch"
    for line, sentence in {
            "mixed --out mixed": folder, "link --out mixed": folder, "mixed --out link": folder,
            "mixed/b.png --out mixed": over, "link/b.png --out mixed": over,
            "mixed/b.png --out link": over, "mixed/a.jpg --out mixed --format jpg": over,
            "mixed/more oranges/0.png --out mixed": over}.items():
        status, _, err = run(photos, f"translate.py {line} --checkpoint trained --overwrite")
        assert status == 1 and sentence in err and err.count("\n") == 1, (line, err)
    assert files_of(photos / "mixed") == sources
    for said in ("3 translated", "3 of the results exist"):  # the first results are no sources
        assert said in ok(photos, "translate.py mixed --checkpoint trained --out mixed/results")
    assert "3 translated" in ok(photos, "translate.py mixed/results --checkpoint trained --out b")
    assert files_of(photos / "mixed").items() > sources.items()


def test_pictures_that_cannot_be_translated_are_named_and_the_others_are_made(photos, capsys):
    shutil.copytree(photos / "photos", photos / "some")
    (photos / "some" / "c.png").write_bytes((photos / "photos" / "b.png").read_bytes()[:99])
    os.mkfifo(photos / "some" / "pipe.png")
    Image.new("L", (66000, 1)).save(photos / "long.png")  # too long for a JPEG
    fill(photos, "blocked/some/more")  # a file where a folder should be
    status, out, err = run(photos, "translate.py some long.png --size full --format jpg "
                                   "--checkpoint trained --out blocked")
    assert status == 1 and out.endswith("2 translated into blocked, 4 skipped\n")
    said = re.findall("^skipped: (.*): .*", err, re.M)  # libjpeg has a line of its own
    assert said == [f"cannot read {photos}/some/c.png", f"cannot read {photos}/some/pipe.png",
                    "cannot write blocked/some/more/b.jpg", "cannot write blocked/long.jpg"]
    assert files_of(photos / "blocked").keys() == {"some/more", "some/a.jpg", "some/b.jpg"}

    class Greedy(Recolours):
        def forward(self, images):
            if images.shape[2] == 36:  # of b.png, which has 33 rows
                torch.empty(10**15)
            return -images

    pairs = [(name, photos / "photos" / name) for name in ("b.png", "a.jpg")]
    args = SimpleNamespace(size="full", side_by_side=False, direction="AtoB")
    [(name, result)] = translate.translate_all(Greedy(), pairs, args)
    assert name == "a.jpg" and (result == 255 - cyclegan.read_picture(pairs[1][1])).all()
    assert capsys.readouterr().err.endswith("/b.png is too large for this machine's memory\n")
    with pytest.raises(RuntimeError, match="tensor"):  # a bug is no reason to skip a picture
        list(translate.translate_all(Recolours(b=(0, 0)), pairs, args))


def test_without_arguments_the_newest_run_translates_the_pictures_it_was_trained_on(photos):
    for name, age in (("older", 100), ("newer", 50), ("oldest", 200)):
        shutil.copytree(photos / "trained", photos / "runs" / name,
                        ignore=shutil.ignore_patterns("translated-*"))
        os.utime(photos / "runs" / name / "latest.pt", (1e9 - age, 1e9 - age))
    fill(photos, "runs/no run/a.txt")
    for direction, count in (("AtoB", 4), ("BtoA", 2)):
        out = ok(photos, f"translate.py --direction {direction}")
        assert out.startswith("the newest of 3 runs; --checkpoint takes another\nruns/newer, "
                              f"at step 8, {direction}, pictures: {count}\n")
        results = photos / "runs" / "newer" / f"translated-{direction}-8"
        assert files_of(results).keys() == {f"{k}.png" for k in range(count)}


TRANSLATING_MISTAKES = {  # a command line -> what its one sentence says
    "translate.py": "there is no run in runs/; train one, or give a --checkpoint",
    "translate.py nothing.jpg --checkpoint trained --out new": "such picture or folder: .*/nothi",
    "translate.py trained": "trained is a run; to translate with it: --checkpoint trained$",
    "translate.py texts --checkpoint trained --out new": "there are no pictures .*texts.*1 .txt",
    "translate.py photos --checkpoint apples": "the checkpoint apples/latest.pt: No such file",
    "translate.py photos --checkpoint apples/0.png": "0.png is damaged or not a checkpoint",
    "translate.py photos --checkpoint cut": "cut/latest.pt is damaged or not a checkpoint",
    "translate.py photos --checkpoint new": "new is at step 0, untrained; train.py saves every 10",
    "translate.py --checkpoint moved": "the pictures of moved are no longer in .*moved/gone; give",
    "translate.py --checkpoint horse2zebra": "horse2zebra is not a run; give the pictures",
    f"{PHOTOS} --out file.zip/x": "cannot create the folder file.zip/x; .* --out: Not a dir",
    f"{PHOTOS} --out file.zip": "cannot create the folder file.zip; .* --out: File exists",
    f"{PHOTOS} --out new/result.jpg": "--out must be a folder, not new/result.jpg",
    f"{PHOTOS} --out ./photos": "--out photos is the folder of the pictures; choose another",
    "translate.py photos/b.png photos/more/b.png --checkpoint trained --out new":
        "photos/b.png and .*photos/more/b.png would both become new/b.png;",
    "translate.py alike --checkpoint trained --out new": "alike/A.png and .*alike/a.jpg would both",
    f"{PHOTOS} --size some": "--size: invalid .*'some'",
    f"{PHOTOS} --size 7": "--size: must be full or at least 8, not 7",
    f"{PHOTOS} --device tpu": "device must be auto, cpu, cuda .*, not tpu",
    f"{PHOTOS} --over": "unrecognized arguments: --over"}


def test_mistakes_in_translating_get_one_sentence_and_leave_nothing_behind(tmp_path, photos):
    for name in ("photos", "apples", "trained", "horse2zebra"):
        shutil.copytree(photos / name, tmp_path / name)
    fill(tmp_path, "texts/a.txt", "alike/A.png", "alike/a.jpg", "file.zip")
    for name in ("cut", "moved", "new"):
        shutil.copytree(tmp_path / "trained", tmp_path / name)
    os.truncate(tmp_path / "cut" / "latest.pt", 5000)
    saved = load(tmp_path / "moved")
    torch.save(saved | {"steps": 0}, tmp_path / "new" / "latest.pt")
    saved["place"]["data"] = ["gone", "gone"]
    torch.save(saved, tmp_path / "moved" / "latest.pt")
    before, wrong = set(tmp_path.rglob("*")), []
    for line, sentence in TRANSLATING_MISTAKES.items():
        status, out, err = run(tmp_path, line)
        *usage, said = err.splitlines() or [""]
        if (status in (0, None) or out or usage and not usage[0].startswith("usage: ")
                or not re.search(f"^translate.py: .*{sentence}", said)):
            wrong.append((line, status, out, err))
    assert not wrong
    assert set(tmp_path.rglob("*")) == before


# ==== Training as a program =======================================================================

SMALL = "--image-size 24 --load-size 28 --width 2 --blocks 1"
NEW = f"train.py --dataA apples --dataB oranges {SMALL} --buffer-size 3"
KEEP = "--save-every 2 --sample-every 3"
FOUR = f"--epochs 2 --decay-epochs 2 --batch-size 2 {KEEP}"  # of 3 steps for 6 pictures


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with apples/ (5, and one that is damaged), oranges/ (3), many/ (40), and a run."""
    folder = tmp_path_factory.mktemp("user")
    for name, count, colour in (("apples", 5, (200, 30, 40)), ("oranges", 3, (250, 150, 20)),
                                ("many", 40, (90, 90, 90))):
        (folder / name / "more").mkdir(parents=True)
        for k in range(count):
            path = folder / name / ("more" if k == 1 else "")
            picture = Image.fromarray(pixels(30 + k, 41, k) // 4 + np.array(colour, np.uint8) // 2)
            picture.save(path / f"{name} {k}.{'jpg' if k % 2 else 'png'}")
    (folder / "apples" / "apples 1.png").write_text("version https://git-lfs.github.com/spec/v1")
    out = ok(folder, f"{NEW} {FOUR} --out trained")
    assert "A: 6 pictures in " in out and "finished after step 12; everything is saved in" in out
    assert f"skipped: cannot read {folder}/apples/apples 1.png: cannot identify" in out
    assert out.count("skipped: ") == 1
    return folder


def run_of(model, A, B):
    """A Run as train.py makes it, for its batches."""
    return train.Run(SimpleNamespace(max_steps=math.inf), Path("run"), model, A, B, [])


def test_training_writes_what_it_promises(user):
    folder, rates = user / "trained", (2e-4, 2e-4, 2e-4 * 2 / 3, 2e-4 / 3)
    assert files_of(folder).keys() == {
        "epoch_0002.pt", "epoch_0004.pt", "latest.pt", "losses.csv", "losses.png", "samples.gif",
        "samples/epoch_0000.png", "samples/epoch_0003.png", "samples/epoch_0004.png"}
    assert (folder / "losses.csv").read_text().startswith(
        "epoch,step,lr,gan,cycle,identity,D_X,D_Y\n1,3,0.0002,")
    config = Config(**load(folder)["config"])
    assert config == Config(24, 28, 1, 2, buffer_size=3, batch_size=2, epochs=2, decay_epochs=2)
    begun, model, means = CycleGAN(config), CycleGAN(config), []
    model.steps = 0
    batch = run_of(model, *train.open_pictures([user / "apples", user / "oranges"], config)).batch
    for epoch, lr in enumerate(rates):
        losses = [list(model.step(*batch(step), lr, random.Random(f"0 {step} 0")).values())
                  for step in range(3 * epoch, 3 * epoch + 3)]
        means.append([epoch + 1, 3 * (epoch + 1), lr, *np.mean(losses, 0)])
    # float32: training sums in another order, and Adam magnifies that.
    assert np.allclose(losses_of(folder), means, rtol=1e-3, atol=1e-6)

    def middles(*names):  # of four pictures, evenly spaced
        pictures = [cyclegan.read_picture(next(user.glob(f"*/{name}")), 28) for name in names]
        return cyclegan.to_tensor(np.stack([
            p[(len(p) - 24) // 2:, (p.shape[1] - 24) // 2:][:24, :24] for p in pictures]))

    x = middles("apples 0.png", "apples 2.png", "apples 3.jpg", "apples 4.png")
    y = middles("more/oranges 1.jpg", "more/oranges 1.jpg", "oranges 0.png", "oranges 2.png")
    for name, G, F in (("0000", begun.G, begun.F), ("0004", model.G, model.F)):
        sheet = cyclegan.read_picture(folder / "samples" / f"epoch_{name}.png")
        grid = sheet[14:].reshape(4, 28, 6, 28, 3)  # below the titles
        columns = [x, G(x), F(G(x)), y, F(y), G(F(y))]
        for k, images in enumerate(map(cyclegan.to_pictures, columns)):
            inside = grid[:, 2:-2, k, 2:-2].astype(int)  # of a frame
            assert np.abs(inside - images).max() < 2  # as above


def test_the_gif_shows_the_samples_in_the_order_of_their_numbers(tmp_path):
    names = ["0000", "0000_step_300", "0000_step_1000", "0001", "9999", "10000"]
    (tmp_path / "samples").mkdir()
    for k, name in enumerate(names):
        Image.new("RGB", (60, 40), (40 * k,) * 3).save(tmp_path / "samples" / f"epoch_{name}.png")
    for most, levels in ((40, [0, 40, 80, 120, 160, 200]), (3, [0, 80, 200])):
        train.animate(tmp_path, most)
        shown = []
        with Image.open(tmp_path / "samples.gif") as film:
            for k in range(film.n_frames):
                film.seek(k)
                shown.append(film.convert("RGB").getpixel((50, 45))[0])
        assert np.abs(np.subtract(shown, levels)).max() <= 2  # a GIF has 256 colours


def test_the_plot_of_losses_shows_them():
    losses = {"gan": 2.0, "identity": 1.0, "D_X": 0.5, "D_Y": 0.25}
    plot = train.plot_losses([{"epoch": k, "step": k, "lr": 2e-4, "cycle": 4 - k / 100, **losses}
                              for k in range(1, 401)])
    red = (plot[..., 0] > 150) & (plot[..., 1] < 80)
    panels = red.reshape(5, 110, 720)[:, 14:]  # below its title
    (start, middle, end), constant = [[panel[:, column].nonzero()[0].mean()
                                       for column in (20, 360, 700)] for panel in panels[:2]]
    assert start < 8 and abs(middle - (start + end) / 2) < 3 and end > 84  # straight, from 4 to 0
    assert np.ptp(constant) < 1


# ---- Batches and pictures ------------------------------------------------------------------------


def stored(folder, pictures, config):
    """Pictures in files that lose nothing, as training reads them. None: a damaged file."""
    folder.mkdir()
    for k, picture in enumerate(pictures):
        if picture is None:
            (folder / f"{k:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        else:
            Image.fromarray(picture).save(folder / f"{k:03}.png")
    return train.Pictures(folder, config)


def test_pictures_are_read_when_needed_and_kept_while_there_is_room(tmp_path, monkeypatch, capsys):
    config = Config(image_size=24, load_size=30)
    pictures = [pixels(30, 31 + k, k) for k in range(40)]
    pictures[3] = pictures[4] = pictures[39] = None
    expected = dict(enumerate(pictures)) | {3: pictures[5], 4: pictures[5], 39: pictures[0]}
    reads, read = [], cyclegan.read_picture
    monkeypatch.setattr(cyclegan, "read_picture", lambda path, *scale: (
        reads.append(int(path.stem)) or read(path, *scale)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # processes of one machine share its memory
    A, B = (stored(tmp_path / name, pictures, config) for name in "AB")
    assert reads == 2 * list(range(8))  # to see what they are like
    assert A.free_bytes == 0.25e9 - 30 * 3 * sum(31 + k for k in (0, 1, 2, 5, 6, 7))
    next(run_of(SimpleNamespace(config=config, steps=0), A, B).batches())
    # The first batch, AHEAD others, whose reading has begun, and damaged ones on the way.
    assert len(reads) <= 2 * 8 + 2 * (1 + train.AHEAD + 1)
    capsys.readouterr()
    A = train.Pictures(tmp_path / "A", config)  # from which no thread is reading
    A.cache.clear()
    A.free_bytes = sum(pictures[k].nbytes for k in (0, 1, 2, 5)) - 1
    for _ in range(2):
        reads.clear()
        assert all((A.read(k) == expected[k]).all() for k in range(40))
    assert reads == [5, 5, *range(5, 39)]  # 3 and 4 become 5; the damaged ones never again
    A.free_bytes, both = 1e6, threading.Barrier(2)
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(cyclegan, "read_picture", lambda *given: (both.wait(), read(*given))[1])
        list(pool.map(A.read, (20, 20)))  # two threads read one picture, which is kept once
    assert A.free_bytes == 1e6 - pictures[20].nbytes
    said = capsys.readouterr().out
    assert all(said.count(f"skipped: cannot read {A.paths[k]}:") == 1 for k in (3, 4, 39))

    def out_of_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", out_of_memory)
    with pytest.raises(MemoryError):
        A.read(21)
    assert len(A.damaged) == 3


def crop_of(crop, pictures):
    """(number, top, left, mirrored) of a crop of pictures whose pixels say where they are."""
    mirrored = bool(crop[0, 0, 1] > crop[0, -1, 1])
    plain = crop[:, ::-1] if mirrored else crop
    top, left, number = map(int, plain[0, 0])
    assert (plain == pictures[number][top:top + 24, left:left + 24]).all()
    return number, top, left, mirrored


def test_batches_follow_from_the_seed_and_the_step(tmp_path, monkeypatch):
    config = Config(image_size=24, load_size=30, batch_size=2, seed=3)
    some = [np.stack([*np.mgrid[:height, :width], np.full((height, width), k)], -1).astype(np.uint8)
            for k, (height, width) in enumerate(
                [(30, 200), (50, 30), (30, 30), (30, 40), (40, 30), (30, 31), (31, 30)])]
    A, B = stored(tmp_path / "A", some, config), stored(tmp_path / "B", some[:4], config)

    def batch(step, A=A, B=B, **settings):  # -> the crops of x and those of y
        model = SimpleNamespace(config=replace(config, **settings), steps=0)
        return [cyclegan.to_pictures(images) for images in run_of(model, A, B).batch(step)]

    orders, partners, crops = [], [], []
    for epoch in range(60):
        batches = [batch(step) for step in range(4 * epoch, 4 * epoch + 4)]
        xs = [crop_of(crop, some) for x, _ in batches for crop in x]
        orders.append([number for number, *_ in xs])
        partners.append([crop_of(crop, some)[0] for _, y in batches for crop in y])
        crops += xs
        assert sorted(orders[-1][:7]) == list(range(7)) and orders[-1][7:] == orders[-1][:1]
    assert len(set(map(tuple, orders))) > 55 and len(set(map(tuple, partners))) > 55
    assert np.bincount(np.ravel(partners)).min() > 80  # 120 on average, 9.5 the deviation
    tops, lefts = ([{crop[axis] for crop in crops if crop[0] == k} for k in range(2)]
                   for axis in (1, 2))
    assert tops[0] == set(range(7)) == lefts[1] and len(lefts[0]) > 40  # of 177
    assert min(lefts[0]) < 20 and max(lefts[0]) > 156 and min(tops[1]) < 4 and max(tops[1]) > 22
    assert 0.4 < np.mean([mirrored for *_, mirrored in crops]) < 0.6  # of 480
    fixed = train.Pictures(tmp_path / "A", replace(config, flip=False))
    x, _ = batch(0, A=fixed, batch_size=60)
    assert not any(crop_of(crop, some)[3] for crop in x)
    x = np.concatenate([batch(step, A=B, B=A)[0] for step in range(4)])
    assert sorted(np.bincount([crop_of(crop, some)[0] for crop in x[:7]])) == [1, 2, 2, 2]
    again, other = batch(238), batch(238, seed=4)
    assert all(map(np.array_equal, again, batches[2])) and (again[0] != other[0]).any()
    monkeypatch.setattr(train, "WORLD", 2)  # two processes share a batch of twice the size
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        shares.append(batch(238, batch_size=1))
    for *parts, whole in zip(*shares, again, strict=True):
        assert (np.concatenate(parts) == whole).all()


# ---- Stopped, killed, and resumed ----------------------------------------------------------------


HANGS = """
import time
replace = os.replace
def hangs(source, target):
    if target.name == "epoch_0002.pt":
        open("hangs", "w")
        time.sleep(300)
    replace(source, target)
os.replace = hangs
"""


def test_resumed_training_equals_uninterrupted_training(user):
    line, folder = f"{NEW} {FOUR} --out stopped", user / "stopped"
    dies = "def dies(*_):\n    kill('SIGKILL')\nos.replace = dies"  # before the first checkpoint
    assert run(user, line, dies)[0] == -signal.SIGKILL and len(list(folder.iterdir())) == 1
    for step, name in ((1, "SIGINT"), (3, "SIGTERM"), (4, "SIGHUP"), (5, "SIGUSR1")):
        times = 1 if name == "SIGINT" else 2  # a closed terminal sends SIGHUP twice
        status, out, err = run(
            user, line, f"at_step({step - 1}, lambda: [kill('{name}') for _ in range({times})])")
        assert status == 128 + getattr(signal, name), (name, out)
        assert err == "\nfinishing this step, then saving; once more ends at once\n"
        assert out.endswith(f"stopped after step {step}; everything is saved in stopped; continue "
                            "with: python train.py --resume stopped\n")
        assert out.count("skipped: ") == 1 and load(folder)["steps"] == step
        line = f"train.py --resume stopped {KEEP}"
    finish, begin = start(user, f"{line} --save-minutes 0", HANGS), time.monotonic()
    while not (user / "hangs").exists() and time.monotonic() < begin + 60:
        time.sleep(0.05)
    refused = [run(user, other) for other in (line, f"{NEW} --out stopped")]
    os.kill(finish.pid, signal.SIGKILL)
    assert finish()[0] == -signal.SIGKILL
    assert all(status == 1 and err.endswith("training run is using stopped; stop it first\n")
               for status, _, err in refused), refused
    [part] = folder.glob("*.part")
    assert load(folder)["steps"] == 5 and torch.load(part)["steps"] == 6
    (folder / "samples" / "epoch_0003.png.9.part").touch()
    out = ok(user, f"{line} --max-steps 9")
    assert "at step 5 of 9," in out and "stopped after step 9;" in out
    early = "load = cyclegan.load_checkpoint\ndef early(*given):\n    kill('SIGTERM')\n" \
            "    return load(*given)\ncyclegan.load_checkpoint = early"
    status, out, _ = run(user, line, early)  # it makes one step
    assert status == 128 + signal.SIGTERM and "stopped after step 10;" in out
    assert "finished after step 12;" in ok(user, line)
    assert same(files_of(folder), files_of(user / "trained"))
    shutil.copy(user / "trained" / "epoch_0002.pt", folder / "latest.pt")  # goes back
    ok(user, line)
    assert same(files_of(folder), files_of(user / "trained"))


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_finished_run_that_is_resumed_stays_as_it_is(user):
    before = times_of(user / "trained")
    out = ok(user, "train.py --resume trained --save-every 1")
    assert "nothing is left to train: trained is at step 12 of 12; to train longer, raise " \
           "--epochs: python train.py --resume trained --epochs ..." in out
    assert times_of(user / "trained") == before


ANSWER = """
import itertools, threading, time
def answered():  # in one call, in which Python handles no signal, as in a long step
    read = os.open(err, os.O_RDONLY)
    return any(map(os.pread, *map(itertools.repeat, (read, 1, 0), (10**7, 10**7, 10**7))))
def twice():
    threading.Timer(0.1, kill, ["SIGTERM"]).start()
    print("answered:", answered())
    kill("SIGINT")
    time.sleep(60)
at_step(2, twice)
"""


def test_the_first_signal_is_answered_at_once_and_the_second_ends_at_once(user):
    begin = time.monotonic()
    status, out, err = run(user, f"{NEW} --out twice", ANSWER)
    assert status == 128 + signal.SIGINT and "answered: True" in out
    assert err == "\nfinishing this step, then saving; once more ends at once\n"
    assert load(user / "twice")["steps"] == 0 and time.monotonic() - begin < 50


def test_ignored_signals_and_readers_that_have_gone_do_not_stop_training(user):
    first = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nat_step(3, lambda: kill('SIGHUP'))\n" \
            "r, w = os.pipe()\nos.close(r)\nsys.stdout = open(w, 'w')"  # as nohup and | head do
    ok(user, f"{NEW} --max-steps 6 --out unread", first)
    assert load(user / "unread")["steps"] == 6


AGES = """
import time
minutes, make_step = [0], cyclegan.FastCycleGAN.train_step
time.perf_counter = lambda: 60.0 * minutes[0]  # each step takes a minute
def watched(self, *batch):
    minutes[0] += 1
    print("age:", self.steps - torch.load(folder / "aged" / "latest.pt")["steps"])
    return make_step(self, *batch)
cyclegan.FastCycleGAN.train_step = watched
"""


def test_latest_is_never_older_than_the_minutes_asked_for(user):
    out = ok(user, f"{NEW} {FOUR} --save-minutes 4 --out aged", AGES)
    assert "".join(re.findall(r"age: (\d+)", out)) == "012340012340"  # epochs end at 3, 6, 9


def test_what_may_change_when_a_run_is_resumed(user):
    shutil.copytree(user / "trained", user / "longer")
    out = ok(user, "train.py --resume longer --device cpu --precision bf16 --dataA apples --dataB "
                   "oranges --epochs 6 --decay-epochs 2 --save-every 5 --sample-every 4 "
                   "--max-steps 999")
    assert "run longer, at step 12 of 24, on cpu in bf16, processes: 1" in out
    names = files_of(user / "longer").keys() - files_of(user / "trained").keys()
    assert names == {"samples/epoch_0008.png", "epoch_0005.pt"}
    ok(user, f"{NEW} --batch-size 2 --epochs 8 --decay-epochs 1 --max-steps 11 --out sooner")
    ok(user, "train.py --resume sooner --epochs 1 --decay-epochs 3")  # begins the decay now
    for name, rates in (("longer", 2 * [2e-4, 2e-4, 4e-4 / 3, 2e-4 / 3]),
                        ("sooner", 3 * [2e-4] + [1.5e-4, 1e-4, 5e-5])):
        assert losses_of(user / name)[:, 2] == pytest.approx(rates, rel=1e-6)
        assert losses_of(user / name)[:, 0].tolist() == list(range(1, len(rates) + 1))
    config = load(user / "sooner")["config"]
    assert (config["epochs"], config["decay_epochs"]) == (3, 3)


def test_folders_of_pictures_may_move(user):
    for name in ("apples", "oranges"):
        shutil.copytree(user / name, user / "before" / name)
    new = NEW.replace("apples", "before/apples").replace("oranges", "before/oranges")
    ok(user, f"{new} {FOUR} --out moved --max-steps 4")
    (user / "before").rename(user / "after")
    status, _, err = run(user, "train.py --resume moved")
    assert status == 1 and "there is no folder " in err
    ok(user, f"train.py --resume moved --dataA after/apples --dataB after/oranges {KEEP} "
             "--max-steps 5")
    ok(user, f"train.py --resume moved {KEEP}")  # it knows the folders by now
    moved, trained = files_of(user / "moved"), files_of(user / "trained")
    for files in (moved, trained):
        for name in ("epoch_0002.pt", "epoch_0004.pt", "latest.pt"):
            del files[name]["place"]["data"]
    assert same(moved, trained)


def test_pictures_that_cannot_be_reached_stop_training_and_lose_nothing(user):
    new = f"train.py --dataA many --dataB oranges {SMALL} --max-steps 31 --out"
    ok(user, f"{new} near")
    assert files_of(user / "near").keys() == {
        "latest.pt", "losses.csv", "losses.png", "samples.gif", "samples/epoch_0000.png",
        "samples/epoch_0000_step_010.png", "samples/epoch_0000_step_030.png"}
    assert losses_of(user / "near")[:, :2].tolist() == [[0, 10], [0, 30]]
    status, out, err = run(user, f"{new} away", "at_step(4, lambda: os.rename('many', 'gone'))")
    assert status == 1 and "skipped" not in out
    step = load(user / "away")["steps"]
    assert 4 < step < 31 and err.count("\n") == 1
    assert re.match("train.py: cannot read .*/many/.*: No such file or directory; ", err), err
    assert f"step {step} (python train.py --resume away)\n" in err
    assert "there is no " in run(user, "train.py --resume away")[2]
    (user / "gone").rename(user / "many")
    ok(user, "train.py --resume away --max-steps 31")
    assert same(files_of(user / "away"), files_of(user / "near"))


# ---- Started from other networks -----------------------------------------------------------------


def test_a_run_starts_from_a_run_and_from_the_authors_files(user):
    theirs = {name: small_authors_file(user / "theirs" / f"latest_net_{file}.pth", seed)
              for seed, (name, file) in enumerate((("G", "G_A"), ("F", "G_B")))}
    trained = load(user / "trained")
    ours = {name: {key[len(name) + 1:]: value for key, value in trained["model"].items()
                   if key.startswith(f"{name}.")} for name in ("G", "F", "D_X", "D_Y")}
    larger = trained["config"] | {"image_size": 48, "load_size": 54}  # 48 * 286 / 256
    small = asdict(Config(24, 27, 6, 3))
    for k, (path, networks, settings, flags) in enumerate((
            ("trained", ours, trained["config"], ""),
            ("trained/epoch_0004.pt", ours, larger, "--image-size 48"),
            ("theirs", theirs, small, "--image-size 24"),
            ("theirs/latest_net_G_B.pth", {"G": theirs["F"]}, small, "--image-size 24"))):
        out = ok(user, f"train.py --dataA oranges --dataB apples --lr 1e-30 --seed 5 {flags} "
                       f"--max-steps 1 --start-from {path} --out begun-{k}")
        assert f"starting from {path}: {', '.join(networks)}; the rest is init" in out
        begun = load(user / f"begun-{k}")
        assert begun["config"] == {**settings, "lr": 1e-30, "seed": 5}
        for name, weights in networks.items():
            for key, value in weights.items():  # Adam moves them by the rate, and no more
                assert torch.allclose(begun["model"][f"{name}.{key}"], value, rtol=0, atol=1e-20)
        if "F" not in networks:
            assert 0.01 < begun["model"]["F.model.1.weight"].std() < 0.03
        assert begun["steps"] == 1 and len(begun["buffers"][0]) == settings["batch_size"]
        assert all(moments["step"] == 1 for adam in begun["adams"] for moments in adam.values())


# ---- When the machine fails ----------------------------------------------------------------------


def test_a_full_disk_harms_no_checkpoint(user):
    first = "most, kind = resource.getrlimit(resource.RLIMIT_FSIZE)[1], resource.RLIMIT_FSIZE\n" \
            "limit = lambda size: resource.setrlimit(kind, (size, most))\n" \
            "at_step(6, lambda: limit(5000))\nat_step(8, lambda: limit(most))\n" \
            "at_step(11, lambda: limit(5000))"
    status, out, err = run(user, f"{NEW} {FOUR} --save-minutes 0 --out full", first)
    assert out.count("note: cannot write full/latest.pt: File too large; training continues") == 2
    assert status == 1 and err == "train.py: cannot write full/latest.pt: File too large; the " \
        "last complete checkpoint: step 11 (python train.py --resume full)\n"
    assert not list((user / "full").rglob("*.part"))
    ok(user, f"train.py --resume full {KEEP}")
    assert same(files_of(user / "full"), files_of(user / "trained"))


def test_memory_that_runs_out_gets_one_sentence(user):
    status, _, err = run(user, f"{NEW} --out crowded", "at_step(1, lambda: torch.empty(10**15))")
    assert status == 1 and err.startswith("train.py: out of memory; reduce --image-size")
    first = "def read(*_):\n    raise MemoryError\n" \
            "at_step(4, lambda: setattr(cyclegan, 'read_picture', read))"
    status, out, err = run(user, f"{NEW} --dataA many --out reading", first)
    assert status == 1 and err.startswith("train.py: out of memory") and "skipped" not in out
    step = load(user / "reading")["steps"]
    assert f"step {step} (python train.py --resume reading)\n" in err and err.count("\n") == 1
    first = "at_step(2, lambda: setattr(cyclegan, 'to_tensor', lambda *_: torch.empty(10**15)))"
    status, out, err = run(user, f"{NEW} --out tensors", first)
    assert status == 1 and "allocate" in err and load(user / "tensors")["steps"] > 1
    fails = "def fails(*_):\n    cyclegan.{0} = save\n    raise MemoryError\n" \
            "save = cyclegan.{0}\nat_step(1, lambda: setattr(cyclegan, '{0}', fails))"
    for k, name in enumerate(("save_checkpoint", "with_titles")):
        line = f"{NEW} --batch-size 2 --out short-of-memory-{k} --save-minutes 0 --max-steps 3"
        out = ok(user, line, fails.format(name))
        assert out.count("note: out of memory; training continues") == 1
        assert load(user / f"short-of-memory-{k}")["steps"] == 3


@pytest.mark.parametrize("lr", ["1e30", "1e39"])
def test_training_that_diverges_says_so_and_keeps_its_last_good_checkpoint(user, lr):
    line = f"{NEW} --lr {lr} --save-minutes 0 --max-steps 9 --out diverged-{lr}"
    status, out, err = run(user, line)
    saved = load(user / f"diverged-{lr}")
    assert status == 1 and all(weight.isfinite().all() for weight in saved["model"].values())
    assert re.match("train.py: training has diverged by step [1-6]: start again with a lower --lr "
                    f".* step {saved['steps']} .*\n", err) and err.count("\n") == 1, err
    assert "nan" not in out


# ---- Two processes -------------------------------------------------------------------------------


def test_two_processes_train_together_and_stop_together(user):
    flags = "--buffer-size 0 --save-every 4"  # as each process has a buffer of its own
    ok(user, f"{NEW} {flags} --batch-size 2 --max-steps 4 --out single", WORLD_SIZE="")
    (first, out, _), (second, said, _) = pair(
        user, f"{NEW} {flags} --out two", "at_step(3, lambda: kill('SIGTERM'))")
    assert (first, second, said) == (0, 128 + signal.SIGTERM, "")
    assert "stopped after step 4; everything is saved in two" in out and "processes: 2" in out
    begun = CycleGAN(Config(24, 28, 1, 2, buffer_size=0)).state_dict()
    one, two = (load(user / name)["model"] for name in ("single", "two"))
    for key in begun:  # sums of float32 differ in their order, and Adam magnifies that
        apart, way = ((a[key] - one[key]).abs().mean() for a in (two, begun))
        assert apart < 0.01 * way, key
    assert [status for status, *_ in pair(user, "train.py --resume two --max-steps 5")] == [0, 0]
    assert losses_of(user / "two")[1] == 3 and load(user / "two")["steps"] == 5
    status, _, err = run(user, "train.py --resume two")
    assert status == 1 and "processes as before: [6, 3, 2], not [6, 3, 1]" in err
    status, _, err = pair(user, f"{NEW} --out dying", "at_step(3, lambda: kill('SIGKILL'))")[0]
    assert status == 1 and err == "train.py: another process failed; see its message\n", err
    (first, _, err), (second, _, other) = pair(user, f"{NEW} --out trained")
    assert first == second == 1 and "--out trained is not empty" in err, (first, second, err)
    assert other == "train.py: another process failed; see its message\n"


WAITS = """
import threading, torch.distributed
connect = torch.distributed.init_process_group
def waits(*given, **named):
    threading.Timer(0.3, kill, [{!r}]).start()
    connect(*given, **named)
torch.distributed.init_process_group = waits
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_process_that_waits_for_the_others_says_so_and_can_be_ended(user, name):
    port = str(free_port())
    status, out, err = run(user, NEW, WAITS.format(name), WORLD_SIZE="2", RANK="0",
                           LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port)
    assert status == -getattr(signal, name)
    assert out == f"waiting for 1 more process at localhost:{port}\n" and err == ""


# ---- The surroundings ----------------------------------------------------------------------------


def test_paths_names_and_notes(user):
    for name in ("trainA", "trainB"):
        shutil.copytree(user / "oranges", user / "home" / "fruit" / name)
    line = f"train.py --dataA ~/fruit/trainA --dataB ~/fruit/trainB/ {SMALL} --max-steps 1"
    first, second = (ok(user, line, HOME=str(user / "home"), LOCAL_WORLD_SIZE="") for _ in "12")
    assert "note" not in first and second.startswith(
        "note: runs/fruit exists; to continue it: --resume runs/fruit\n")
    assert second.count("note") == 1
    ok(user, f"{line} --out '~/a run'", HOME=str(user / "home"))
    assert all(load(user / name)["steps"] == 1
               for name in ("runs/fruit", "runs/fruit-2", "home/a run"))
    (user / "labels").mkdir()
    for k in range(9):
        label_map = Image.fromarray(pixels(30, 40, k) // 10)
        label_map.save(user / "labels" / f"{k}.png")
    out = ok(user, f"train.py --dataA labels --dataB oranges {SMALL} --max-steps 1",
             "sys.stdout = open('said', 'w')") or (user / "said").read_text()
    assert out.count("nearly black") == 1 and f"in {user}/labels are nearly black" in out
    assert load(user / "runs" / "labels-oranges")["steps"] == 1


# ---- Mistakes ------------------------------------------------------------------------------------

ONE = f"{NEW} --max-steps 1"
BEGIN = "train.py --dataA apples --dataB oranges --image-size 24 --max-steps 1"
RESUME = "train.py --resume trained"
TRAINING_MISTAKES = {  # a command line -> what its one sentence says
    "train.py --dataA file.zip --dataB oranges": "there is no folder .*file.zip; --dataA and",
    "train.py --dataA texts --dataB oranges": "there are no pictures .*/texts; ignored: 1 .txt",
    "train.py --dataA damaged --dataB oranges": "none of the pictures in .*damaged can be",
    "train.py --dataA trained --dataB oranges": "trained is a run, not a folder of pictures",
    "train.py --dataA apples": "--dataA and --dataB are both needed",
    f"{ONE} --dataB ./oranges/../apples": "are the same folder",
    f"{ONE} --dataB apples/more": "or one contains the other",
    f"{ONE} --out file.zip": "cannot create the folder file.zip; choose .* --out: File exists",
    f"{ONE} --out file.zip/x": "cannot create the folder file.zip/x; choose .* --out: Not a dir",
    f"{ONE} --out trained": "--out trained is not empty; .*--resume trained",
    f"{ONE} --out downloads": "--out downloads is not empty",
    f"{ONE} --image-size 26": "image_size must be a multiple of 4 above 20, not 26",
    f"{ONE} --image_sise 32": "unrecognized arguments: --image_sise 32; --help",
    f"{ONE} --flip false": "unrecognized arguments: false; .*--no-flip and --squash take no",
    f"{ONE} --save-every 0": "--max-steps, --save-every and --sample-every must be at least 1",
    f"{ONE} --save-minutes -3": "--save-minutes at least 0",
    f"{ONE} --save-minutes nan": "--save-minutes at least 0",
    f"{ONE} --device gpu": "device must be auto, cpu, cuda .* or mps, not gpu",
    f"{ONE} --device cpu --compile": "compiling .--compile. is for CUDA, not for cpu",
    "train.py --start-from trained": "--dataA and --dataB are both needed",
    f"{BEGIN} --start-from trained --width 4": "--width and --blocks are taken from --start",
    f"{BEGIN} --start-from oranges": "oranges/latest.pt: No such file",
    f"{BEGIN} --start-from unequal": "generators in unequal have different .*3.*2",
    "train.py --resume nowhere": "folder of a run; there is no nowhere/latest.pt$",
    "train.py --resume trained/epoch_0002.pt": "epoch_0002.pt/latest.pt; to go back to this file,",
    "train.py --resume cut": "cut/latest.pt is damaged .*; cut/epoch_0004.pt may be intact: copy",
    f"{RESUME} --lr 1e-4": "keeps its folder and its settings.*--start-from trained --dataA",
    f"{RESUME} --no-flip": "a resumed run keeps",
    f"{RESUME} --device gpu": "or mps, not gpu$",  # and no word of an earlier checkpoint
    "train.py --resume foreign": "foreign/latest.pt was not saved by train.py",
    f"{RESUME} --dataA many": r"processes as before: \[6, 3, 1\], not \[40, 3, 1\]",
    f"{RESUME} --dataA oranges --dataB apples": r"\[6, 3, 1\], not \[3, 6, 1\]"}
if not torch.cuda.is_available():
    TRAINING_MISTAKES[f"{ONE} --device cuda:1"] = "device cuda:1 cannot be used here; try cpu"


def test_mistakes_get_one_sentence_and_leave_nothing_behind(user):
    for name in ("texts/a.txt", "downloads/film.part", "damaged/a.png"):
        (user / name).parent.mkdir()
        (user / name).write_text("not what it seems")
    (user / "file.zip").write_text("a file")
    shutil.copytree(user / "trained", user / "cut")
    os.truncate(user / "cut" / "latest.pt", 5000)
    (user / "foreign").mkdir()
    torch.save(load(user / "trained") | {"place": {"epoch": 1}}, user / "foreign" / "latest.pt")
    small_authors_file(user / "unequal" / "latest_net_G_A.pth")
    torch.save(CycleGAN(Config(24, 28, 1, 2)).G.state_dict(), user / "unequal/latest_net_G_B.pth")
    before, wrong = times_of(user), []
    for line, sentence in TRAINING_MISTAKES.items():
        status, _, err = run(user, line)
        lines = [text for text in err.splitlines() if not text.startswith("usage:")]
        if status == 0 or len(lines) != 1 or not re.search(sentence, err):
            wrong.append((line, status, err))
    assert not wrong, wrong
    assert times_of(user) == before
    status, _, err = run(user, "train.py", WORLD_SIZE="2")
    assert status == 1 and re.fullmatch("train.py: WORLD_SIZE is 2.*torchrun.*\n", err), err


# ---- The demo ------------------------------------------------------------------------------------


def test_the_scenes_differ_in_the_fruit_alone():
    others = [scenes.draw_scene(np.random.default_rng(k)) for k in range(20)]
    assert len({len(fruits) for fruits, *_ in others}) == 2  # one fruit or two
    apples, oranges = (scenes.paint(others[0], kind, 64).astype(int)
                       for kind in ("apples", "oranges"))
    fruit = (apples != oranges).any(-1)
    x, y, radius = others[0][0][-1][:3]
    v, u = (np.mgrid[:64, :64] + 0.5) / 64
    discs = [np.hypot(u - x, v - y) < radius + 0.02 for x, y, radius, *_ in others[0][0]]
    assert 0.05 < fruit.mean() < 0.5 and not (fruit & ~np.any(discs, 0)).any()
    red, orange = apples[fruit].mean(0), oranges[fruit].mean(0)
    assert red[0] > 2 * red[1] and 0.4 < orange[1] / orange[0] < 0.7


def test_pores_are_as_strong_as_they_are_wherever_they_sit():
    scene = scenes.draw_scene(np.random.default_rng(0))
    v, u = np.mgrid[:64, :64, :1][:2] / 64 + 0.5 / 64
    for start in ((0, 0), (0.3, 0.8)):
        s, t = (2 * np.pi * (scenes.PORES * w + k) for w, k in zip((u, v), start, strict=True))
        picture = 90 + 20 * u - 30 * v * v + 7 * np.sin(s) * np.sin(t) * [1, 1, 1]
        assert abs(scenes.pore_strength([picture], [scene]) - 7) < 1e-9


def test_the_demo_is_measured_against_the_truth():
    darker = Recolours(b=(-0.1, -0.1, -0.1))  # by 13 levels; the other changes nothing
    said = []
    scenes.evaluate(SimpleNamespace(G=Recolours(), F=darker, config=Config(64, 64, 1, 2)),
                    said.append)
    G, F, _ = said
    assert G.startswith("apples to oranges") and "in the fruit 100% of the untranslated" in G
    assert "elsewhere 0.000 on" in G and "pores 0% of a true orange's (should be 100%)" in G
    assert F.startswith("oranges to apples") and "elsewhere 0.102 on" in F
    left = int(re.search(r"pores (\d+)% of a true orange's \(should be 0%", F)[1])
    assert 95 <= left <= 100  # some levels are cut off at black


def test_the_demo_draws_its_pictures_and_goes_on_from_where_it_stopped(user):
    tiny = "--image-size 24 --width 2 --blocks 1"
    status, out, _ = run(user, f"train.py {tiny}", "at_step(0, lambda: kill('SIGINT'))")
    demo = user / "runs" / "demo"
    assert status == 130 and "held-out" not in out  # it is not what was waited for
    assert sorted(path.name for path in demo.glob("pictures/oranges/*")) == [
        f"{k:03}.png" for k in range(200)]
    expected = scenes.paint(scenes.draw_scene(np.random.default_rng([1, 7])), "oranges", 24)
    assert (cyclegan.read_picture(demo / "pictures" / "oranges" / "007.png") == expected).all()
    config = load(demo)["config"]
    assert (config["load_size"], config["lr"], config["epochs"]) == (24, 1e-3, 2)
    demo.rename(user / "elsewhere")
    out = ok(user, "train.py --resume elsewhere --max-steps 2")
    assert "oranges to apples, 32 held-out scenes" in out and "stopped after step 2;" in out


# ==== docs/changing.md ============================================================================

CHANGES = dict(re.findall(r"\*\*\((\w)\).*?```diff\n(.*?)```",
                          (HERE / "docs" / "changing.md").read_text(), re.S))
FROM_A_COPY = """
for name in ("cyclegan", "train", "translate", "demo.scenes", "demo"):
    sys.modules.pop(name, None)
"""


def changed_copy(folder, change):
    """Copies the programs into a folder, and makes a change of docs/changing.md in them."""
    for name in ("cyclegan.py", "train.py", "translate.py"):
        shutil.copy(HERE / name, folder)
    shutil.copytree(HERE / "demo", folder / "demo")
    for name, lines in re.findall(r"^@@ (\S+)\n(.*?)(?=^@@|\Z)", change, re.S | re.M):
        old = "".join(line[1:] + "\n" for line in lines.splitlines() if line[0] != "+")
        new = "".join(line[1:] + "\n" for line in lines.splitlines() if line[0] != "-")
        source = (folder / name).read_text()
        assert source.count(old) == 1, old
        (folder / name).write_text(source.replace(old, new))


@pytest.mark.parametrize("letter", "abcdefgh")
def test_a_change_of_the_manual_trains_resumes_translates(letter, user, tmp_path):
    changed_copy(tmp_path, CHANGES[letter])
    data, rng = "--dataA apples --dataB oranges", np.random.default_rng(0)
    for name in ("apples", "oranges", "pairs/x", "pairs/y"):
        shutil.copytree(user / "oranges", tmp_path / name)
    features = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
    torch.save(features.state_dict(), tmp_path / "features.pth")
    if letter == "h":
        (tmp_path / "listed").mkdir()
        (tmp_path / "listed" / "list.csv").write_text("oranges/oranges 0.png,red\n")
        data = "--dataA listed --dataB apples"

    def program(line):
        name, flags = line.split(" ", 1)
        return ok(tmp_path, f"{tmp_path / name} {flags}", FROM_A_COPY)

    out = program(f"train.py {data} {SMALL} --epochs 1 --decay-epochs 1 --max-steps 2 --out run")
    assert letter != "h" or "A: 1 pictures" in out
    assert "finished after step" in program("train.py --resume run")
    assert "3 translated" in program("translate.py oranges --checkpoint run --size full --out out")
    saved, header = load(tmp_path / "run"), (tmp_path / "run" / "losses.csv").read_text().split()[0]
    row = dict(zip(header.split(","), losses_of(tmp_path / "run")[-1], strict=True))
    column = {"a": "smooth", "c": "perceptual", "g": "pairs"}.get(letter)
    assert column is None or row[column] > 0
    first = Image.open(next((tmp_path / "out").rglob("*.png")))
    assert (len(first.getcolors(10**6)) <= 256) == (letter == "f")
    shapes = {key: tuple(value.shape) for key, value in saved["model"].items()}
    assert (shapes.get("G.model.1.weight") == (2, 1, 7, 7)) == (letter == "f")
    assert ("G.up1.0.weight" in shapes) == (letter == "d")
    assert letter != "e" or row["gan"] != abs(row["gan"]) or abs(row["D_X"]) > 1  # no squares
    if letter == "b":
        spec = importlib.util.spec_from_file_location("changed", tmp_path / "cyclegan.py")
        changed = importlib.util.module_from_spec(spec)
        sys.modules["changed"] = changed  # where a dataclass looks itself up
        spec.loader.exec_module(changed)
        x, y, back_x, back_y = rng.normal(size=(4, 1, 3, 4, 4))
        expected = 7 * ((back_x - x) ** 2).mean() + 3 * ((back_y - y) ** 2).mean()
        given = map(torch.from_numpy, (x, y, back_x, back_y))
        assert abs(changed.cycle_loss(*given, 7, 3) - expected) < 1e-12


# ==== The documentation ===========================================================================

TEXTS = {path: path.read_text() for path in (HERE / "README.md", *sorted(HERE.glob("docs/*.md")))}


def blocks_of(language):
    """The code blocks of a language in README.md and docs/, less those of docs/changing.md."""
    texts = [text for path, text in TEXTS.items() if path.name != "changing.md"]
    return re.findall(rf"```{language}\n(.*?)```", "".join(texts), re.S)


def test_programs_in_the_documentation_compute_what_they_promise(user, tmp_path):
    for name in ("apples-oranges", "full"):
        shutil.copytree(user / "trained", tmp_path / "runs" / name)
    for name in ("apples", "oranges"):
        shutil.copytree(user / "oranges", tmp_path / name)
    shutil.copy(user / "oranges" / "oranges 0.png", tmp_path / "photo.jpg")
    shutil.copytree(user / "oranges", tmp_path / "test-apples")
    shutil.copytree(user / "oranges", tmp_path / "test-oranges")
    road, car, void = (128, 64, 128), (0, 0, 142), (0, 0, 0)
    for name, row, kind in (
            ("truth/a.png", [road, road, road, car, void], np.uint8),
            ("translated/a.png", [road, (120, 70, 120), car, car, car], np.uint8),
            ("facades/train/a.jpg", [road] * 8 + [car] * 8, np.uint8),
            ("ct/a.tif", [-1000, -160, 40], np.float32),
            ("ct/b.tif", [240, 3000, -159], np.float32)):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.array([row], kind)).save(tmp_path / name)
    said = [run(tmp_path, "translate.py --help", block)[:2] for block in blocks_of("python")
            if "import " in block and "onnx" not in block and "tensorboard" not in block]
    assert len(said) >= 5 and all(status == 0 for status, _ in said)
    windowed = [cyclegan.read_picture(tmp_path / f"windowed/{name}.png")[0, :, 0] for name in "ab"]
    assert np.stack(windowed).tolist() == [[0, 0, 127], [255, 255, 0]]
    halves = [cyclegan.read_picture(tmp_path / f"facades-{name}/a.png")[0] for name in "AB"]
    assert [half.shape for half in halves] == [(8, 3), (8, 3)]
    assert halves[0][0, 0] > 100 and halves[1][-1, 0] < 60  # a JPEG blurs the edge between them
    [scores] = [out for _, out in said if "pixel accuracy" in out]
    # By hand, void left out: 3 of 4 pixels; road 2 of 3, car 1 of 1; IoU 2 of 3 and 1 of 2.
    assert np.allclose([float(number) for number in re.findall(r"[\d.]{3,}", scores)[:3]],
                       [3 / 4, (2 / 3 + 1) / 2, (2 / 3 + 1 / 2) / 2])


def test_commands_in_the_documentation_run_as_printed(user, tmp_path):
    lines = [re.sub(r"^python3 -m venv .* && ", "", line)  # whose set-up these tests stand on
             for line in "".join(blocks_of("sh")).splitlines()]
    assert {"python train.py", "python translate.py", "python -m pytest"} <= set(lines)
    for name in re.findall(r"--data[AB] (\S+)", " ".join(lines)):
        shutil.copytree(user / "oranges", tmp_path / name, dirs_exist_ok=True)
    for name in ("folder", "horses", "photos", "test-apples", "test-oranges"):
        shutil.copytree(user / "oranges", tmp_path / name)
    shutil.copy(user / "oranges" / "oranges 0.png", tmp_path / "photo.jpg")
    small_authors_file(tmp_path / "horse2zebra" / "latest_net_G.pth")
    for line in lines:
        program = line.removeprefix("python ")
        if "train.py" in line:
            program += " --max-steps 2" if "--resume" in line else " --max-steps 1"
            if "--resume" not in line and "--start-from" not in line:
                program += f" {SMALL}"  # the paper's size takes long on a CPU
        if "train.py --out" in line:  # the demo, which is drawn once, above
            program += " --dataA apples --dataB oranges"
        if line.startswith("torchrun"):
            _, _, flags = program.partition("train.py")
            ends = pair(tmp_path, f"train.py {flags}")  # as torchrun starts them, on a CPU
            assert [status for status, *_ in ends] == [0, 0]
        elif not program.startswith("-m "):  # the tests that are running
            out = ok(tmp_path, program)
            assert ("oranges to apples, 32 held-out scenes" in out) == (line == "python train.py")
    assert load(tmp_path / "runs" / "apples-oranges")["steps"] == 2
    assert len(list((tmp_path / "translated-BtoA").rglob("*.png"))) >= 3


def test_documentation_names_what_is_there_and_shows_the_code_as_it_is():
    for path, text in TEXTS.items():
        names = set(re.findall(r"\[`(\w+)`\]\((?:\.\./)?cyclegan\.py\)", text))
        assert all(hasattr(cyclegan, name) or hasattr(CycleGAN, name) for name in names), names
        tests = set(re.findall(r"`(test_\w+)`", text)) - {"test_cyclegan"}
        assert tests <= globals().keys(), tests - globals().keys()
        links = re.findall(r'(?:src="|\]\()([\w./]+)', re.sub("```.*?```", "", text, flags=re.S))
        assert all((path.parent / link).is_file() for link in links if "http" not in link), links
    code = " ".join((HERE / "cyclegan.py").read_text().split())
    shown = [part for block in blocks_of("python") if "import " not in block  # which is not run
             for part in block.split("\n\n")]
    assert len(shown) >= 2 and all(" ".join(lines.split()) in code for lines in shown), shown


# ==== The benchmark ===============================================================================


def compare():
    """Says how far the three forms of the step are from one another, over all settings of STEPS."""
    found = [differences(setting, n) for setting in STEPS for n in (1, 3)]
    for one, other in (("Part I", "the literal step"), ("FastCycleGAN", "Part I")):
        losses, weights = (max(each[one][kind] for each in found) for kind in (0, 1))
        print(f"{one} and {other}, {len(found)} trainings of four steps in float64: losses differ "
              f"by at most {losses:.1e} of their value, weights by {weights:.1e}")


def benchmark(rounds=20):
    """Times the three in turns: at the paper's size on a GPU, else at a small one."""
    cuda = torch.cuda.is_available()
    torch.backends.cudnn.benchmark = True
    device, config = ("cuda", Config()) if cuda else ("cpu", Config(image_size=64, width=32))
    print(f"{config.image_size} x {config.image_size}, width {config.width}, {config.blocks} blocks"
          f", torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'cpu'}")
    x, y = (noise(1, 3, config.image_size, config.image_size, seed=seed, dtype=torch.float32).to(
        device) for seed in (0, 1))
    model, fast, rng = CycleGAN(config).to(device), FastCycleGAN(config, device), random.Random(0)
    steps = {"literal": functools.partial(Twin(model).to(device).step, x, y, 2e-4, rng),
             "Part I": functools.partial(model.step, x, y, 2e-4, rng),
             "FastCycleGAN": functools.partial(fast.train_step, x, y, 2e-4)}
    if cuda:
        compiled = FastCycleGAN(config, device, compiled=True)
        steps["compiled"] = functools.partial(compiled.train_step, x, y, 2e-4)
    repeats, taken = 10 if cuda else 1, {name: [] for name in steps}
    for k in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(repeats):
                step()
            if cuda:
                torch.cuda.synchronize()
            if k > 0:  # the first warms up
                taken[name].append((time.perf_counter() - began) / repeats)
    for name, times in taken.items():
        ratios = sorted(a / b for a, b in zip(times, taken["FastCycleGAN"], strict=True))
        print(f"{name:12} {1000 * statistics.median(times):8.2f} ms/step, {name} / FastCycleGAN: "
              f"{statistics.median(ratios):.2f}, half of the pairs within "
              f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count())
    compare()
    benchmark(*map(int, sys.argv[1:]))
