"""What must stay true of cyclegan.py, train.py and translate.py. The method comes first.

    python -m pytest              all of it, about two minutes on two CPU cores
    python test_cyclegan.py       our step against the literal one: differences, then times
"""

import copy
import functools
import inspect
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

import cyclegan
import train
import translate
from cyclegan import Config, CycleGAN, Discriminator, Generator, ImageBuffer, UserError

if __name__ != "__main__":  # the benchmark takes all
    torch.set_num_threads(1)  # tests take as long on a busy machine as on an idle one
HERE = Path(__file__).resolve().parent
TINY = {"image_size": 32, "load_size": 36, "width": 4, "blocks": 2}


def noise(*shape, seed=0, dtype=torch.float64):
    """Uniform on [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def image(seed=0):
    """One of the size of TINY, as training sees it."""
    return noise(1, 3, 32, 32, seed=seed, dtype=torch.float32)


# ==== The method ==================================================================================

# ---- The literal twin: networks and step as the authors' code has them, with nothing fused -------


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
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh())


def twin_discriminator(width):
    """The authors' NLayerDiscriminator with three layers."""
    layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for k, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
        layers += [nn.Conv2d(k, 2 * k, 4, stride, 1), nn.InstanceNorm2d(2 * k),
                   nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))


class Twin:
    """The step as one would write it down: six generator and six discriminator calls."""

    def __init__(self, model):
        self.config, device = model.config, next(model.parameters()).device
        for name in ("G", "F", "D_X", "D_Y"):
            ours = getattr(model, name)
            twin = (twin_generator(self.config.width, self.config.blocks) if name in "GF"
                    else twin_discriminator(self.config.width))
            twin.to(device, next(ours.parameters()).dtype)
            for parameter in twin.parameters():
                nn.init.zeros_(parameter)
            for key, value in ours.model.state_dict().items():
                twin.state_dict()[key].copy_(value)
            setattr(self, name, twin)
        betas = (self.config.beta1, 0.999)
        self.adam_GF = torch.optim.Adam(
            [*self.G.parameters(), *self.F.parameters()], self.config.lr, betas)
        self.adam_D = torch.optim.Adam(
            [*self.D_X.parameters(), *self.D_Y.parameters()], self.config.lr, betas)
        self.pool_X, self.pool_Y = [], []

    def step(self, x, y, draws):
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
        shown_x = self.shown(self.pool_X, fake_x.detach(), draws[0])
        shown_y = self.shown(self.pool_Y, fake_y.detach(), draws[1])
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

    def shown(self, pool, images, draws):
        """The authors' ImagePool, with its random numbers given."""
        size, result = self.config.buffer_size, []
        for image, (place, swap) in zip(images, draws.tolist()):
            if size == 0:
                result.append(image)
            elif len(pool) < size:
                pool.append(image.clone())
                result.append(image)
            elif swap < 0.5:
                result.append(pool[int(place * size)])
                pool[int(place * size)] = image.clone()
            else:
                result.append(image)
        return torch.stack(result)


STEPS = {
    "as in the paper": {}, "no identity": {"lambda_identity": 0.0},
    "log likelihood": {"objective": "log"},
    "log, no identity": {"objective": "log", "lambda_identity": 0.0},
    "no buffer": {"buffer_size": 0},
    "forward cycle only": {"lambda_backward": 0.0, "lambda_identity": 0.0},
    "forward cycle and its identity": {"lambda_backward": 0.0},
    "backward cycle only": {"lambda_forward": 0.0, "lambda_identity": 0.0},
    "backward cycle and its identity": {"lambda_forward": 0.0},
    "cycle and identity": {"lambda_gan": 0.0},
    "GAN alone": {"lambda_forward": 0.0, "lambda_backward": 0.0, "lambda_identity": 0.0},
    "cycle alone": {"lambda_gan": 0.0, "lambda_identity": 0.0},
    "unequal weights": {"lambda_gan": 2.0, "lambda_forward": 7.0, "lambda_backward": 3.0,
                        "lambda_identity": 0.1, "beta1": 0.3}}


def differences_from_twin(setting, batch_size):
    """Of four steps from the literal ones: the largest in a loss, relative, and in a weight."""
    model = CycleGAN(Config(**{**TINY, "buffer_size": 2, **setting})).double()
    twin, of_losses, of_weights = Twin(model), [0.0], []
    for k in range(4):
        x, y = noise(batch_size, 3, 32, 32, seed=k), noise(batch_size, 3, 32, 32, seed=k + 9)
        expected = twin.step(x, y, cyclegan.buffer_draws(0, k, x))
        losses = model.step(x, y)
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            if loss != expected[name]:  # both are 0 where a weight is
                of_losses.append(abs(loss / expected[name] - 1).item())
            assert loss.shape == () and not loss.requires_grad
    assert model.steps == 4
    for name in ("G", "F", "D_X", "D_Y"):
        for key, value in getattr(model, name).model.state_dict().items():
            of_weights.append((value - getattr(twin, name).state_dict()[key]).abs().max().item())
    return max(of_losses), max(of_weights)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("setting", STEPS.values(), ids=STEPS.keys())
def test_step_equals_the_literal_twin(setting, batch_size):
    assert max(differences_from_twin(setting, batch_size)) < 1e-12


def test_minimise_computes_and_changes_nothing_of_the_other_networks():
    model = CycleGAN(Config(**TINY))
    before = copy.deepcopy(model)
    loss = model.D_Y(model.G(image())).square().mean() + model.D_X(model.F(image())).mean()
    cyclegan.minimise(loss, model.engine.adam(model.G, model.F))
    for name, moves in (("G", True), ("F", True), ("D_X", False), ("D_Y", False)):
        for p, q in zip(getattr(before, name).parameters(), getattr(model, name).parameters()):
            assert torch.equal(p, q) != moves and (q.grad is not None) == moves, name


# ---- Networks ------------------------------------------------------------------------------------


def layers_of(network, size):
    """(channels, side) behind every layer that changes them."""
    shapes, h = [], torch.zeros(1, 3, size, size)
    for layer in network.model:
        h = layer(h)
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, cyclegan.R)):
            shapes.append((h.shape[1], h.shape[2]))
    return shapes


def test_layers_are_those_of_section_7_2():
    down, up = [(64, 256), (128, 128), (256, 64)], [(128, 128), (64, 256), (3, 256)]
    assert layers_of(Generator(64, 9), 256) == down + 9 * [(256, 64)] + up
    down, up = [(64, 128), (128, 64), (256, 32)], [(128, 64), (64, 128), (3, 128)]
    assert layers_of(Generator(64, 6), 128) == down + 6 * [(256, 32)] + up
    assert layers_of(Discriminator(), 256) == [(64, 128), (128, 64), (256, 32), (512, 31), (1, 30)]


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
    ours.model.load_state_dict({key: weights[key] for key in ours.model.state_dict()})
    for key in weights.keys() - ours.model.state_dict().keys():
        weights[key] += 3  # biases that a norm cancels
    images = noise(2, 3, 64, 48)
    assert (ours(images) - twin(images)).abs().max() < 1e-9  # values inside reach 10^4


AUTHORS_STEMS = {f"model.{i}" for i in (1, 4, 7, 19, 22, 26)} | {
    f"model.{b}.conv_block.{i}" for b in range(10, 19) for i in (1, 5)}


def test_state_dict_has_the_authors_keys():
    def stems(network):
        return {key.rsplit(".", 1)[0] for key in network.state_dict()}

    assert stems(Generator()) == AUTHORS_STEMS
    assert stems(Discriminator()) == {f"model.{i}" for i in (0, 2, 5, 8, 11)}
    # The paper's counts less the biases before a norm, of which each block has 512.
    count = [sum(p.numel() for p in n.parameters())
             for n in (Generator(), Generator(64, 6), Discriminator())]
    assert count == [11_378_179 - 5_248, 7_837_699 - 5_248 + 3 * 512, 2_764_737 - 896]


def test_receptive_field_is_70():
    D = Discriminator(4)
    for i, layer in enumerate(D.model):
        if isinstance(layer, cyclegan.InstanceNorm):
            D.model[i] = nn.Identity()  # its statistics would see the whole picture
    images = torch.rand(1, 3, 256, 256).requires_grad_()
    D(images)[0, 0, 15, 15].backward()
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_generator_keeps_size_and_range_and_refuses_sizes_it_would_change():
    for height, width in ((256, 256), (8, 12), (100, 64)):
        out = Generator(2, 1)(100 * noise(1, 3, height, width, dtype=torch.float32))
        assert out.shape == (1, 3, height, width) and out.abs().max() <= 1
    for height, width in ((250, 256), (256, 250), (4, 8)):
        with pytest.raises(ValueError, match=f"multiples of 4.*{height} x {width}"):
            Generator(2, 1)(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_is_the_same_in_either_layout_with_statistics_in_float32_at_least(dtype):
    h = (noise(2, 5, 33, 30) * 3 + 20).to(dtype)  # far from 0, where short mantissas cancel
    exact = nn.InstanceNorm2d(5)(h.double())
    # float32 has lost 24 bits less 5 by the subtraction; bf16 can be as exact as its last bit, 2^-7
    # of up to 2. With statistics in bf16 it is wrong by more than 0.03.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for layout in (torch.contiguous_format, torch.channels_last):
        normed = cyclegan.InstanceNorm()(h.contiguous(memory_format=layout))
        assert normed.dtype == dtype and normed.is_contiguous(memory_format=layout)
        assert (normed.double() - exact).abs().max() <= tolerance


def test_padding_is_pytorchs_and_keeps_the_layout_both_ways():
    ours, stock, g = cyclegan.ReflectionPad(3), nn.ReflectionPad2d(3), noise(2, 5, 14, 12, seed=1)
    for layout in (torch.contiguous_format, torch.channels_last):
        h, k = (noise(2, 5, 8, 6).contiguous(memory_format=layout).requires_grad_() for _ in "hk")
        padded, expected = ours(h), stock(k)
        assert torch.equal(padded, expected) and padded.is_contiguous(memory_format=layout)
        padded.backward(g.contiguous(memory_format=layout))
        expected.backward(g)
        assert (h.grad - k.grad).abs().max() < 1e-12  # sums in another order
        assert h.grad.is_contiguous(memory_format=layout)


def test_channels_last_holds_from_the_first_layer_to_the_last():
    # Fake tensors know, without a GPU, how each operation on CUDA lays out its result; all but
    # convolutions, which take the layout of their weights there, as they do on a CPU.
    cl = torch.channels_last

    def keeps(layer, inputs, output):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            return output.to(memory_format=cl)
        assert output.is_contiguous(memory_format=cl), layer

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(2, 3, 64, 64, device="cuda").to(memory_format=cl)
        with pytest.raises(AssertionError):  # the control
            keeps(None, None, nn.InstanceNorm2d(3)(images))
        for network in (Generator(8, 2), Discriminator(8)):
            for layer in network.modules():
                for name, parameter in layer.named_parameters(recurse=False):
                    on_gpu = torch.empty(parameter.shape, device="cuda")
                    setattr(layer, name, nn.Parameter(on_gpu))
                layer.register_forward_hook(keeps)
            network(images)


def test_weights_start_from_a_normal_of_2_percent():
    a, b, c = CycleGAN(Config(**TINY)), CycleGAN(Config(**TINY)), CycleGAN(Config(**TINY, seed=1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.G.model[1].weight, c.G.model[1].weight)
    assert not torch.equal(a.G.model[1].weight, a.F.model[1].weight)
    for network in (Generator(32), Discriminator(32), CycleGAN(Config(width=32)).F):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            elif parameter.numel() > 10_000:  # the standard error of a deviation is 1 / sqrt(2 n)
                assert abs(parameter.std().item() / 0.02 - 1) < 0.03
                assert abs(parameter.mean()) < 1e-3


# ---- Losses --------------------------------------------------------------------------------------


def test_adversarial_loss_against_numpy():
    loss, REAL, FAKE = cyclegan.adversarial_loss, cyclegan.REAL, cyclegan.FAKE
    scores = noise(2, 1, 5, 4) * 3
    s = scores.numpy()
    D = 1 / (1 + np.exp(-s))
    expected = {("lsgan", REAL): np.mean((s - 1) ** 2), ("lsgan", FAKE): np.mean(s ** 2),
                ("log", REAL): -np.mean(np.log(D)), ("log", FAKE): -np.mean(np.log(1 - D))}
    for (objective, target), value in expected.items():
        assert abs(loss(scores, target, objective).item() - value) < 1e-12
    for s in (-1e4, 1e4):  # the logarithm of a sigmoid overflows here, the loss must not
        assert loss(torch.tensor([s]), REAL, "log").item() == max(0, -s)
    per_patch = torch.tensor([[2.0, 0.0]])  # on average 1, yet each patch is wrong
    assert loss(per_patch, REAL) == 1 and loss(per_patch, FAKE) == 2


def test_cycle_and_identity_loss_against_numpy():
    x, y, of_x, of_y = (noise(2, 3, 4, 4, seed=k) for k in range(4))
    forward = np.mean(np.abs(of_x.numpy() - x.numpy()))
    backward = np.mean(np.abs(of_y.numpy() - y.numpy()))
    for loss in (cyclegan.cycle_loss, cyclegan.identity_loss):
        assert abs(loss(x, y, of_x, of_y) - (forward + backward)) < 1e-12
        assert abs(loss(x, y, of_x, of_y, 7.0, 3.0) - (7 * forward + 3 * backward)) < 1e-12


def test_discriminator_loss_against_numpy():
    def D(images):
        return 3 * images[:, :1]

    real, fake = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    r, f = 3 * real.numpy()[:, :1], 3 * fake.numpy()[:, :1]
    squares = (np.mean((r - 1) ** 2) + np.mean(f ** 2)) / 2
    logs = (np.mean(np.log(1 + np.exp(-r))) + np.mean(np.log(1 + np.exp(f)))) / 2
    assert abs(cyclegan.discriminator_loss(D, real, fake) - squares) < 1e-12
    assert abs(cyclegan.discriminator_loss(D, real, fake, "log") - logs) < 1e-12


# ---- The image buffer and the schedule -----------------------------------------------------------


def test_buffer_by_hand():
    buffer = ImageBuffer(2, 2)

    def exchange(values, draws):
        images = torch.tensor(values, dtype=torch.float32)[:, None, None, None].repeat(1, 3, 2, 2)
        out = buffer.exchange(images, torch.tensor(draws)).clone()
        assert out.shape == images.shape
        images.fill_(-1)  # what is stored is a copy
        return out[:, 0, 0, 0].tolist(), buffer.images[:, 0, 0, 0].tolist()

    keep = [0.9, 0.1]  # (place, coin): ignored while the buffer fills
    assert exchange([1.0], [keep]) == ([1], [1, 0])
    assert exchange([2.0], [keep]) == ([2], [1, 2])
    assert exchange([3.0], [[0.6, 0.5]]) == ([3], [1, 2])  # a coin from 1/2 on: itself
    assert exchange([4.0], [[0.6, 0.49]]) == ([2], [1, 4])  # else the old one at 0.6 * 2
    assert exchange([5.0, 6.0], [[0.0, 0.0], [0.0, 0.0]]) == ([1, 5], [6, 4])  # one after another
    assert exchange([7.0], [[1 - 2**-24, 0.0]]) == ([4], [6, 7])  # the largest float32 below 1
    assert buffer.count == 2


def test_draws_differ_by_step_and_seed_and_domain():
    def draws(seed, step, n=3):
        return cyclegan.buffer_draws(seed, step, torch.zeros(n, 1))

    values = [v for seed, step in ((0, 0), (0, 1), (1, 0)) for v in draws(seed, step).flatten()]
    assert len({float(v) for v in values}) == 36 and torch.equal(draws(0, 1), draws(0, 1))
    scaled = draws(0, 0, 1000) * 2**24
    assert (scaled == scaled.round()).all()  # of 24 bits: never rounded, so never up to 1


def test_learning_rate():
    config = Config()
    for epoch, rate in {0: 2e-4, 99: 2e-4, 100: 2e-4 * 100 / 101, 199: 2e-4 / 101}.items():
        assert abs(cyclegan.learning_rate(config, epoch) - rate) < 1e-18
    assert cyclegan.learning_rate(config, 1000) == 0
    assert cyclegan.learning_rate(Config(decay_epochs=0), 99) == 2e-4


def test_the_rate_that_is_set_is_adams():
    models = [CycleGAN(Config(**TINY)).double(), CycleGAN(Config(**TINY, lr=3e-4)).double()]
    models[0].set_learning_rate(3e-4)  # before there is an Adam
    for _ in range(2):
        for model in models:
            model.step(noise(1, 3, 32, 32), noise(1, 3, 32, 32, seed=1))
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters()))
    models[0].set_learning_rate(0.0)  # and after
    before = [p.clone() for p in models[0].parameters()]
    models[0].step(noise(1, 3, 32, 32), noise(1, 3, 32, 32))
    assert all(torch.equal(p, q) for p, q in zip(before, models[0].parameters()))


# ==== Using it from Python ========================================================================


@pytest.mark.parametrize("field, value", [
    ("image_size", 250), ("image_size", 16), ("load_size", 255), ("lambda_gan", -1.0),
    ("lambda_identity", -0.5), ("lambda_forward", math.nan), ("objective", "wgan"),
    ("batch_size", 0), ("lr", 0.0), ("lr", math.inf), ("lr", -1e-4), ("beta1", 1.0), ("width", 0),
    ("blocks", -1), ("buffer_size", -1), ("epochs", 1.5), ("seed", "x"), ("seed", 2**64),
    ("flip", 1), ("squash", "yes")])
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"^{field} .*{re.escape(repr(value))}"):
        Config(**{field: value})


def test_what_is_left_out_of_a_config_follows_from_the_image_size():
    for size, load_size, blocks in ((64, 72, 6), (128, 143, 6), (256, 286, 9), (512, 572, 9)):
        config = Config(image_size=size)
        assert (config.load_size, config.blocks) == (load_size, blocks)
    assert Config(image_size=64, load_size=64, blocks=0).load_size == 64


def test_step_refuses_other_shapes_in_words():
    model = CycleGAN(Config(**TINY))
    good = torch.zeros(2, 3, 32, 32)
    for x, y in ((good, good[:1]), (good[:, :, :28], good[:, :, :28]), (good[0], good[0]),
                 (good[:, :1], good[:, :1]), (good[:0], good[:0])):
        with pytest.raises(ValueError, match=r"must both be \(N, 3, 32, 32\)"):
            model.step(x, y)
    with pytest.raises(ValueError, match="x is on meta, the model on cpu"):
        model.step(good.to("meta"), good.to("meta"))
    assert model.steps == 0


class Small(nn.Module):
    """A user's own network."""

    def __init__(self, out):
        super().__init__()
        self.layer = nn.Conv2d(3, out, 3, padding=1)

    def forward(self, images):
        return self.layer(images)


def test_networks_of_ones_own_train_from_their_own_weights():
    model = CycleGAN(Config(**TINY))
    mine = {"G": Small(3), "D_X": Small(1)}
    before = copy.deepcopy(mine)
    for name, network in mine.items():
        setattr(model, name, network)
    model.set_learning_rate(1e-3)
    model.step(image(0), image(1))
    for name, network in mine.items():  # the first step of Adam is of the rate, whatever the slope
        step = network.layer.weight - before[name].layer.weight
        assert torch.allclose(step.abs(), torch.full_like(step, 1e-3), rtol=1e-2)
    model.F = Small(3)  # later it is refused
    with pytest.raises(ValueError, match="changed after the first step"):
        model.step(image(0), image(1))
    model = CycleGAN(Config(**TINY))
    model.step(image(0), image(1))
    with pytest.raises(ValueError, match="changed after the first step"):
        model.double().step(image(0).double(), image(1).double())


def test_checkpoints_of_other_networks_are_refused_in_words(tmp_path):
    model = CycleGAN(Config(**TINY))
    model.G = Small(3)
    model.step(image(0), image(1))
    cyclegan.save_checkpoint(str(tmp_path / "mine.pt"), model, {})
    with pytest.raises(UserError, match="mine.pt .*other networks: G.layer.bias"):
        cyclegan.load_checkpoint(tmp_path / "mine.pt")
    with pytest.raises(UserError, match="mine.pt"):
        cyclegan.load_generator(tmp_path / "mine.pt")


def test_a_further_loss_needs_one_line_and_one_entry():
    source = inspect.getsource(CycleGAN.update)
    line = "        drift = fake_y.mean()\n"
    source = source.replace("        # D_X minimises", line + "        # D_X minimises")
    source = source.replace('{"gan": gan', '{"drift": drift, "gan": gan')
    scope = dict(vars(cyclegan))
    exec("if True:\n" + source, scope)
    model = CycleGAN(Config(**TINY))
    model.update = functools.partial(scope["update"], model)
    losses = model.step(image(0), image(1))
    assert list(losses) == ["drift", "gan", "cycle", "identity", "D_X", "D_Y"]
    assert losses["drift"] != 0


def test_translate_takes_one_picture_or_many_and_refuses_floats():
    generator, random = Generator(2, 1), np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((33, 70, 3), (1, 1, 3), (2, 5, 7, 3)):
            picture = random.integers(256, size=shape, dtype=np.uint8)
            picture.flags.writeable = False
            result = cyclegan.translate(generator, picture)
            assert result.shape == shape and result.dtype == np.uint8
    one = cyclegan.translate(generator, picture[1])
    assert np.abs(one - cyclegan.translate(generator, picture)[1].astype(int)).max() <= 1
    for wrong in (picture / 255, picture[..., :1], picture[0, 0]):
        with pytest.raises(ValueError, match=f"uint8.* not {wrong.dtype} .*{wrong.shape[-1]}"):
            cyclegan.translate(generator, wrong)
    with pytest.raises(ValueError, match="must be uint8 arrays .N, H, W, 3., not uint8 .5, 7, 3."):
        cyclegan.to_tensor(picture[0])


def test_star_brings_the_public_names_only():
    scope = {}
    exec("from cyclegan import *", scope)
    names = {name for name in scope if not name.startswith("__")}
    assert {"Config", "CycleGAN", "load_generator", "translate"} <= names
    assert all(getattr(scope[name], "__module__", None) == "cyclegan" for name in names)


def test_exported_generators_are_exact_at_sizes_that_were_not_traced():
    generator = Generator(4, 2).eval().requires_grad_(False)
    height, width = (4 * torch.export.Dim(name, min=4, max=64) for name in ("h", "w"))
    exported = torch.export.export(generator, (noise(1, 3, 32, 40, dtype=torch.float32),),
                                   dynamic_shapes=({2: height, 3: width},)).module()
    for height, width in ((64, 48), (100, 16)):
        images = noise(1, 3, height, width, dtype=torch.float32)
        assert torch.equal(exported(images), generator(images))


# ---- The step on a GPU, seen without one ---------------------------------------------------------


@pytest.mark.parametrize("setting", [
    "as in the paper", "no identity", "log likelihood", "no buffer", "unequal weights"])
def test_step_waits_for_no_device(setting):
    # Under fake tensors whatever asks for a value (.item(), a Python branch, a mask) raises.
    model = CycleGAN(Config(**{**TINY, **STEPS[setting]}))
    x = noise(2, 3, 32, 32, dtype=torch.float32)
    for _ in range(2):
        model.step(x, x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        losses = model.step(x, x)
        with pytest.raises(DataDependentOutputException):
            bool(losses["gan"] > 0)  # the control


def test_step_is_the_same_with_its_networks_compiled(monkeypatch):
    # One graph without a break for each kind of network and size of batch: 1, 2 and 3, and 1 and 2.
    graphs = CompileCounterWithBackend("aot_eager")
    plain, compiled = (CycleGAN(Config(**TINY)).double() for _ in range(2))
    monkeypatch.setattr(compiled.engine, "fast", functools.cache(lambda *networks: [
        torch.compile(n, backend=graphs, fullgraph=True, dynamic=False) for n in networks]))
    for k in range(3):
        x, y = noise(1, 3, 32, 32, seed=k), noise(1, 3, 32, 32, seed=k + 9)
        one, two = plain.step(x, y), compiled.step(x, y)
        assert all(abs(one[name] - two[name]) < 1e-12 for name in one)
    assert graphs.frame_count == 5
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12


def test_networks_stay_as_they_are_where_nothing_can_be_compiled():
    if torch.cuda.is_available():
        pytest.skip("here they can be")
    with pytest.warns(UserWarning, match="torch.compile fails, so steps are slower: [A-Z]"):
        assert cyclegan.compiled(["G"]) == ["G"]


def test_only_what_fuses_is_compiled_and_captured(monkeypatch):
    def never(*_):
        raise NotImplementedError

    monkeypatch.setattr(cyclegan, "CudaGraph", never)
    model = CycleGAN(Config(**TINY), eager=True)
    model.step(image(0), image(1))  # as on CUDA with eager=True
    assert model.engine.graph is None and not model.engine.fuses
    model.engine.fuses = True
    with pytest.raises(NotImplementedError):
        model.step(image(0), image(1))
    monkeypatch.setattr(cyclegan, "compiled", never)
    with pytest.raises(NotImplementedError):
        model.engine.fast(Generator(2, 1))


def test_bf16_leaves_weights_losses_and_images_in_float32():
    assert CycleGAN(Config(**TINY)).engine.precision == "fp32"  # on a CPU, unless told
    model, x = CycleGAN(Config(**TINY), precision="bf16"), image()
    losses = model.step(x, x)
    tensors = (*losses.values(), *model.parameters(), model.buffer_X.images)
    assert {v.dtype for v in tensors} == {torch.float32}
    exact = CycleGAN(Config(**TINY)).step(x, x)  # bf16 has 8 bits: some percent after 12 layers
    assert all(0 < abs(losses[k] / exact[k] - 1) < 0.1 for k in ("gan", "cycle"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnCUDA:
    """In float64, where rounding is out of the way: orders of sums alone differ, by 1e-12 or so."""

    def model(self, precision="fp32", **settings):
        torch.compiler.reset()  # each test compiles anew, within the limits of recompilation
        config = {**TINY, "buffer_size": 2, "lr": 2**-12, **settings}  # a rate exact in float32
        model = CycleGAN(Config(**config), "cuda", precision)
        return model.double() if precision == "fp32" else model

    def images(self, k, n=1, dtype=torch.float64):
        return [noise(n, 3, 32, 32, seed=seed, dtype=dtype).to("cuda",
                memory_format=torch.channels_last) for seed in (k, k + 99)]

    def assert_close(self, one, two):
        for a, b in zip(state_of(one), state_of(two), strict=True):
            assert a.shape == b.shape and (not a.numel() or (a - b).abs().max() < 1e-9)

    def test_captured_steps_are_those_of_the_literal_twin(self):
        model = self.model()
        twin = Twin(model)
        for k in range(20):
            x, y = self.images(k)
            expected = twin.step(x, y, cyclegan.buffer_draws(0, k, x))
            losses = model.step(x, y)
            assert all(abs(losses[name] - expected[name]) < 1e-9 for name in expected)
            model.set_learning_rate(2**-13)  # reaches what is captured
            for adam in (twin.adam_GF, twin.adam_D):
                adam.param_groups[0]["lr"] = 2**-13
        assert model.engine.graph.graph is not None  # nothing fell back
        for name in ("G", "F", "D_X", "D_Y"):
            for key, value in getattr(model, name).model.state_dict().items():
                assert (value - getattr(twin, name).state_dict()[key]).abs().max() < 1e-9

    def test_another_size_of_batch_is_captured_anew(self):
        model, eager = self.model(), self.model()
        eager.engine.graph = eager.update
        for n in 6 * [1] + 6 * [2] + 6 * [1]:
            for each in (model, eager):
                each.step(*self.images(each.steps, n))
        self.assert_close(model, eager)

    def test_what_cannot_be_captured_goes_on_with_a_warning(self):
        class Waits(nn.Conv2d):
            def forward(self, h):
                return super().forward(h) + 0 * h.sum().item()

        model, plain = self.model(), self.model()
        for each in (model, plain):
            each.G = Waits(3, 3, 3, padding=1).double()
        plain.G.load_state_dict(model.G.state_dict())
        plain.engine.graph = plain.update
        with pytest.warns(UserWarning, match="CUDA cannot capture the step"):
            for k in range(6):
                for each in (model, plain):
                    each.step(*self.images(k))
        self.assert_close(model, plain)

    def test_an_eager_model_takes_the_same_steps_uncompiled(self, monkeypatch):
        model, eager = self.model(), CycleGAN(self.model().config, "cuda", "fp32", eager=True)
        eager.double()
        for k in range(6):
            model.step(*self.images(k))
        monkeypatch.setattr(cyclegan, "compiled", None)  # not to be called
        for k in range(6):
            eager.step(*self.images(k))
        assert eager.engine.graph is None and model.engine.graph.graph is not None
        self.assert_close(model, eager)

    def test_captured_draws_differ_and_memory_stays(self):
        model, stored = self.model(), set()
        for k in range(40):
            model.step(*self.images(0))
            stored.add(tuple(model.buffer_X.images.flatten(1).sum(1).tolist()))
            if k == 10:
                memory = torch.cuda.memory_allocated()
        assert 10 < len(stored) < 40 and torch.cuda.memory_allocated() == memory


# ==== Files =======================================================================================


def state_of(model):
    adams = [v for adam in cyclegan.optimizers(model) for s in adam.state.values()
             for v in s.values()]
    return [*model.state_dict().values(), *adams, torch.tensor(model.steps)]


def test_checkpoint_restores_everything_bit_for_bit(tmp_path):
    one = CycleGAN(Config(**TINY, buffer_size=2))
    for _ in range(3):
        one.step(image(0), image(1))
    cyclegan.save_checkpoint(tmp_path / "a.pt", one, {"epoch": 3})
    two, place = cyclegan.load_checkpoint(tmp_path / "a.pt")
    assert place == {"epoch": 3} and two.config == one.config
    with pytest.raises(ValueError, match="after loading"):  # its Adam has moments of another type
        copy.deepcopy(two).double().step(image(0).double(), image(1).double())
    for rate in (1e-3, 1e-4):
        assert all(torch.equal(a, b) for a, b in zip(state_of(one), state_of(two), strict=True))
        for each in (one, two):
            each.set_learning_rate(rate)
            each.step(image(0), image(1))
    assert not list(tmp_path.glob("*.part"))


PLACE = {"epoch": 0, "done": 0, "demo": False, "data": ["a", "b"], "save_every": 50,
         "save_minutes": 10.0, "sample_every": 1}


def test_checkpoints_of_the_first_form_of_the_program_load(tmp_path):
    # Typed from what commit 87842f7 wrote: `place`, and buffers that are empty before a first step.
    model = CycleGAN(Config(**TINY))
    weights = model.state_dict()
    for name in ("buffer_X", "buffer_Y"):
        weights[f"{name}.images"] = torch.zeros(50, 0, 0, 0)
    config = {"image_size": 32, "load_size": 36, "blocks": 2, "width": 4, "objective": "lsgan",
              "lambda_gan": 1.0, "lambda_forward": 10.0, "lambda_backward": 10.0,
              "lambda_identity": 0.5, "buffer_size": 50, "batch_size": 1, "lr": 0.0002,
              "beta1": 0.5, "epochs": 100, "decay_epochs": 100, "seed": 0}
    torch.save({"config": config, "precision": "fp32", "steps": 0, "place": PLACE,
                "model": weights, "adams": [{}, {}]}, tmp_path / "latest.pt")
    run = train.open_run({"resume": tmp_path, "save_every": 7}, torch.device("cpu"))
    assert (run.data, run.epoch, run.save_every) == (["a", "b"], 0, 7)
    assert run.model.config.squash and run.model.config.flip  # as that program did
    assert cyclegan.load_generator(tmp_path).config.squash
    for each in (model, run.model):
        each.step(image(0), image(1))
    assert all(torch.equal(a, b) for a, b in zip(state_of(model), state_of(run.model), strict=True))


FORMS = {  # (prefix, dropout, statistics) of the files that the authors' programs have written
    "plain": ("", False, False), "old": ("", False, True), "dropout": ("", True, False),
    "old with dropout": ("", True, True), "parallel": ("module.", False, False),
    "compiled": ("_orig_mod.", False, False)}


def authors_file(path, form, width=5, blocks=9, seed=0):
    """Writes a file of a generator as the authors' programs do, -> that generator, their twin."""
    prefix, dropout, statistics = FORMS[form]
    torch.manual_seed(seed)
    twin = twin_generator(width, blocks, dropout, statistics)
    for layer in twin.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # as in use; the statistics of a norm stay the picture's own
    path.parent.mkdir(exist_ok=True)
    torch.save({f"{prefix}model.{key}": value for key, value in twin.state_dict().items()}, path,
               _use_new_zipfile_serialization=not statistics)  # PyTorch 0.3 had no zip files
    return twin


def photograph():
    """(253, 190, 3) uint8: smooth, with some texture."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(256, size=(9, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((190, 253), Image.BICUBIC)).astype(int)
    return (smooth + random.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def by_twin(twin, picture):
    """What the authors' network makes of a picture that grew to a multiple of 4 by reflection."""
    height, width = picture.shape[:2]
    grown = np.pad(picture, ((0, -height % 4), (0, -width % 4), (0, 0)), mode="reflect")
    x = torch.from_numpy(grown).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        y = twin(x)[0, :, :height, :width]
    return ((y + 1) * 127.5).permute(1, 2, 0).numpy()


def test_authors_files_have_the_keys_that_they_have(tmp_path):
    # Typed from the authors' files: 9 blocks, then 6 blocks, dropout, and statistics.
    authors_file(tmp_path / "a", "plain", 2, 9)
    keys = {f"{stem}.{kind}" for stem in AUTHORS_STEMS for kind in ("weight", "bias")}
    assert torch.load(tmp_path / "a").keys() == keys and len(keys) == 48
    authors_file(tmp_path / "a", "old with dropout", 2, 6)
    assert {"model.10.conv_block.6.weight", "model.16.weight", "model.19.bias", "model.23.weight",
            "model.2.running_mean", "model.15.conv_block.7.running_var",
            "model.20.num_batches_tracked"} <= torch.load(tmp_path / "a").keys()


@pytest.mark.parametrize("blocks", [6, 9])
@pytest.mark.parametrize("form", FORMS)
def test_authors_files_translate_as_their_networks_do(form, blocks, tmp_path):
    picture = photograph()
    for name in ("latest_net_G", "latest_net_G_A", "200_net_G_B"):
        twin = authors_file(tmp_path / f"{name}.pth", form, 5, blocks, len(name))
        generator = cyclegan.load_generator(str(tmp_path / f"{name}.pth"))
        ours = cyclegan.translate(generator, picture)
        assert ours.shape == (253, 190, 3) and ours.std() > 5
        assert np.abs(ours - by_twin(twin, picture)).max() < 1  # one is rounded, the other is not
    assert generator.config is None and not generator.training
    assert not any(p.requires_grad for p in generator.parameters())


def test_a_folder_of_authors_files_gives_the_one_of_the_direction(tmp_path):
    cases = {  # files, then the one that is G and the one that is F
        "both": ("latest_net_G_A latest_net_G_B 95_net_G_A", "latest_net_G_A", "latest_net_G_B"),
        "epochs": ("195_net_G_A 200_net_G_A 1000_net_G_A 95_net_G_B 195_net_G_B 200_net_G_B",
                   "1000_net_G_A", "200_net_G_B"),
        "one way": ("latest_net_G", "latest_net_G", "latest_net_G")}
    for folder, (names, *wanted) in cases.items():
        twins = {name: authors_file(tmp_path / folder / f"{name}.pth", "plain", 3, 6, seed)
                 for seed, name in enumerate(names.split())}
        for direction, name in zip(("AtoB", "BtoA"), wanted):
            loaded = cyclegan.load_generator(tmp_path / folder, direction)
            assert torch.equal(loaded.model[1].weight, twins[name][1].weight)


def test_foreign_generators_are_refused_by_name(tmp_path):
    weights = Generator(4, 9).state_dict()
    for name, change, reason in (
            ("antialiased.pth", {"model.5.filt": torch.zeros(1)}, "an antialiased network"),
            ("unet.pth", {"model.model.0.weight": torch.zeros(1)}, "a U-Net"),
            ("batchnorm.pth", {"model.2.weight": torch.zeros(4)}, "model.2.weight"),
            ("grey.pth", {"model.1.weight": torch.zeros(4, 1, 7, 7)}, "RGB"),
            ("nothing.pth", {"model.1.weight": None}, "ResNet")):
        torch.save({**weights, **change}, tmp_path / name)
        with pytest.raises(UserError, match=f"{name}.*{reason}") as raised:
            cyclegan.load_generator(tmp_path / name)
        assert len(str(raised.value).splitlines()) == 1
    torch.save(Discriminator(4).state_dict(), tmp_path / "D.pth")
    with pytest.raises(UserError, match="D.pth"):
        cyclegan.load_generator(tmp_path / "D.pth")


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("malice_was_here",))


def test_damaged_checkpoints_are_refused_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cyclegan.save_checkpoint("whole", CycleGAN(Config(**TINY)), {})
    whole = Path("whole").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save({"model": Malice()}, "malice")
    for name, data in {"empty": b"", "text": b"hello", "short": whole[:-100],
                       "half": whole[:len(whole) // 2], "flipped": bytes(flipped),
                       "malice": Path("malice").read_bytes()}.items():
        Path(name).write_bytes(data)
        for load in (cyclegan.load_checkpoint, cyclegan.load_generator):
            with pytest.raises(UserError, match=name):
                load(name)
    assert not Path("malice_was_here").exists()


@pytest.mark.parametrize("keys, value", [
    (["place"], None), (["place"], {}), (["steps"], "x"), (["steps"], math.inf),
    # The fused Adam would write past the end of moments of another shape.
    (["adams", 1, 0, "exp_avg"], torch.zeros(3)), (["adams", 1, 0, "exp_avg_sq"], torch.zeros(1)),
    (["adams", 1, 0, "exp_avg"], None)], ids=str)
def test_impossible_values_in_a_checkpoint_are_refused(keys, value, tmp_path):
    model = CycleGAN(Config(**TINY))
    model.step(image(), image())
    cyclegan.save_checkpoint(tmp_path / "latest.pt", model, PLACE)
    saved = inside = torch.load(tmp_path / "latest.pt")
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    torch.save(saved, tmp_path / "latest.pt")
    with pytest.raises(UserError, match="latest.pt (is not a checkpoint|has no progress)"):
        train.open_run({"resume": tmp_path}, torch.device("cpu"))


def test_what_is_written_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda _: done.append("synced"))
    monkeypatch.setattr(os, "replace", lambda part, path: done.append(f"renamed to {path.name}"))
    cyclegan.write_file(tmp_path / "a", [b"1"])
    assert done == ["synced", "renamed to a"] and not list(tmp_path.iterdir())


def test_the_copy_of_an_epoch_is_saved_before_the_latest(monkeypatch):
    saved, model = [], CycleGAN(Config(**TINY))
    monkeypatch.setattr(cyclegan, "save_checkpoint", lambda path, *_, keep: saved.append(path.name))
    for epoch, done in ((50, 0), (50, 1), (51, 0), (0, 0)):
        train.Run(Path("run"), model, ["a", "b"], False, epoch, done).save()
    # Killed in between, a run would continue after the epoch and never write its copy.
    assert saved == ["epoch_0050.pt", *4 * ["latest.pt"]]


# ==== Pictures ====================================================================================


def test_pictures_of_every_mode(tmp_path):
    ramp = np.linspace(0, 255, 6 * 5).round().astype(np.uint8).reshape(5, 6)
    colours = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1)
    rgb, grey = Image.fromarray(colours), np.stack([ramp] * 3, -1)
    alpha = Image.fromarray(np.dstack([colours, np.where(ramp > 100, 255, 0).astype(np.uint8)]))
    sixteen = ramp.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    cases = [
        ("rgb.png", rgb, {}, colours), ("grey.png", Image.fromarray(ramp), {}, grey),
        ("16.png", Image.fromarray(sixteen), {}, grey),
        ("16.tif", Image.fromarray(sixteen), {}, grey),
        ("float.tif", Image.fromarray(ramp.astype(np.float32) / 255), {}, grey),
        ("32.tif", Image.fromarray(sixteen.astype(np.int32)), {}, grey),
        ("1.png", Image.fromarray(ramp > 100), {}, np.where(grey > 100, 255, 0)),
        ("palette.png", Image.fromarray(ramp).convert("P"), {}, grey),
        ("alpha.png", alpha, {}, np.where(ramp[..., None] > 100, colours, 255)),
        ("turned.png", rgb, {"exif": exif}, np.rot90(colours, -1)),
        ("la.png", alpha.convert("LA"), {}, None), ("cmyk.tif", rgb.convert("CMYK"), {}, colours),
        ("key.png", rgb, {"transparency": tuple(map(int, colours[0, 0]))}, None),
        ("animated.gif", Image.fromarray(ramp), {"save_all": True, "append_images": [rgb]}, grey)]
    for name, image, options, expected in cases:
        image.save(tmp_path / name, **options)
        picture = cyclegan.read_picture(str(tmp_path / name))
        assert picture.dtype == np.uint8 and picture.shape[2] == 3, name
        if expected is not None:
            assert picture.shape == expected.shape, name
            assert np.abs(picture - expected.astype(int)).max() <= 1, name
    assert (cyclegan.read_picture(tmp_path / "key.png")[0, 0] == 255).all()
    assert cyclegan.read_picture(tmp_path / "rgb.png", 10).shape == (10, 12, 3)
    assert cyclegan.read_picture(tmp_path / "rgb.png", 10, squash=True).shape == (10, 10, 3)
    assert len(cyclegan.find_pictures(str(tmp_path))) == len(cases)


def test_pictures_that_are_programs_do_not_run(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"  # Pillow would hand it to Ghostscript
    with pytest.raises(UserError, match="a.png: .*EPS"):
        cyclegan.read_picture(tmp_path / "a.png")


def test_bytes_survive_the_way_to_a_tensor_and_back():
    picture = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    tensor = cyclegan.to_tensor(picture)
    assert tensor.min() == -1 and tensor.max() == 1 and tensor.dtype == torch.float32
    assert (cyclegan.to_pictures(tensor) == picture).all()
    over_half = torch.full((1, 3, 1, 1), 0.5 / 127.5 - 1 + 1e-4)
    assert cyclegan.to_pictures(over_half).max() == 1  # rounds, not cuts


@pytest.mark.parametrize("height, width", [(1, 1), (1, 50), (5, 7), (64, 64), (33, 70)])
def test_a_network_that_changes_nothing_gives_the_picture_back(height, width):
    picture = np.random.default_rng(0).integers(256, size=(2, height, width, 3), dtype=np.uint8)
    nothing = nn.Conv2d(3, 3, 1)
    nn.init.dirac_(nothing.weight)
    nn.init.zeros_(nothing.bias)
    assert (cyclegan.translate(nothing, picture) == picture).all()


def cached(file, pictures, config):
    """Pictures in a cache, written by hand."""
    file.write_bytes(b"".join(picture.tobytes() for picture in pictures))
    shapes = [number for picture in pictures for number in picture.shape[:2]]
    np.array(shapes, np.int32).tofile(file.with_suffix(".shapes"))
    return train.Pictures(file, config)


def test_batches_follow_the_authors_sampling(tmp_path, monkeypatch):
    config = Config(image_size=24, load_size=30, batch_size=2, epochs=1, decay_epochs=1, seed=3)
    A, B = (np.zeros((n, 30, 30, 3), np.uint8) + np.arange(n, dtype=np.uint8)[:, None, None, None]
            for n in (7, 4))
    A = A + np.arange(30, dtype=np.uint8)[:, None, None] * 8  # a row tells the place of a crop
    A, B = (cached(tmp_path / name, pictures, config) for name, pictures in (("A", A), ("B", B)))
    seen, pairs, places = [], [], set()
    for epoch in (0, 1):
        batches = list(train.batches(config, A, B, epoch, 0))
        assert len(batches) == 4
        x, y = (np.concatenate(part) for part in zip(*batches))
        assert x.shape == y.shape == (8, 24, 24, 3)
        seen.append([int(v) % 8 for v in x[:, 0, 0, 0]])
        pairs.append(list(zip(seen[-1], y[:, 0, 0, 0].tolist())))
        places |= {int(v) // 8 for v in x[:, 0, 0, 0]}
        assert set(seen[-1][:7]) == set(range(7)) and seen[-1][7] == seen[-1][0]  # each, then again
    assert seen[0] != seen[1] and set(pairs[0]) != set(pairs[1]) and len(places) > 3
    rest = list(train.batches(config, A, B, 1, 4))  # of the place alone
    assert len(rest) == 2
    for one, two in zip(rest, batches[2:]):
        assert all((a == b).all() for a, b in zip(one, two))
    big = np.arange(30, dtype=np.uint8)[None, None, :, None] + np.zeros((1, 30, 30, 3), np.uint8)
    big = cached(tmp_path / "big", big, config)

    def mirrored(config):
        rows = [next(train.batches(config, big, big, s, 0))[0][0, 0, :, 0] for s in range(60)]
        return sum(int(row[0]) > int(row[-1]) for row in rows)

    assert 15 < mirrored(config) < 45 and mirrored(replace(config, flip=False)) == 0
    monkeypatch.setattr(train, "WORLD", 2)  # two processes share a batch of twice the size
    single, parts = replace(config, batch_size=1), []
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        parts.append(next(train.batches(single, A, B, 1, 4)))
    assert all((np.concatenate(part) == b).all() for *part, b in zip(*parts, rest[0]))


def test_crops_lie_anywhere_in_pictures_of_any_shape(tmp_path):
    config = Config(image_size=24, load_size=30, epochs=1, decay_epochs=1)
    random = np.random.default_rng(0)
    pictures = [random.integers(256, size=(*shape, 3), dtype=np.uint8)
                for shape in ((30, 200), (50, 30), (30, 30))]
    stored = cached(tmp_path / "A.bytes", pictures, config)
    places = {0: set(), 1: set(), 2: set()}
    for epoch in range(100):
        for x, _ in train.batches(replace(config, flip=False), stored, stored, epoch, 0):
            for k, picture in enumerate(pictures):
                windows = np.lib.stride_tricks.sliding_window_view(picture, (24, 24), (0, 1))
                same = (windows[:, :, :, :3, :3] == x[0, :3, :3].transpose(2, 0, 1)).all((2, 3, 4))
                for top, left in np.argwhere(same):
                    assert (picture[top:top + 24, left:left + 24] == x[0]).all()
                    places[k].add((int(top), int(left)))
    tops, lefts = ([{place[axis] for place in seen} for seen in places.values()] for axis in (0, 1))
    assert [max(t) for t in tops] == [6, 26, 6] and max(lefts[0]) > 165 and max(lefts[1]) == 6
    assert all(min(t) == 0 for t in tops[::2]) and len(lefts[0]) > 60


def test_the_shorter_side_becomes_the_load_size():
    size = cyclegan.scaled_size
    assert size(4000, 3000, 286) == (381, 286) and size(3000, 4000, 286) == (286, 381)
    assert size(64, 1800, 286) == (286, 8044) and size(1, 1, 72) == (72, 72)
    assert size(400, 100, 286, squash=True) == (286, 286)
    assert size(1920, 1080, 1024, at_once=True) == (1820, 1024)  # within 2 x 1024^2 pixels
    width, height = size(64, 1800, 286, at_once=True)  # not within 2^20 pixels
    assert 0.99 * 2**20 < width * height < 1.01 * 2**20 and abs(height / width / 28.125 - 1) < 0.01


@pytest.mark.parametrize("squash", [False, True])
def test_changed_folder_is_read_again(squash, user, tmp_path, capsys):
    folder, cache = tmp_path / "growing", tmp_path / "cache"
    shutil.copytree(user / "apples", folder)
    config = Config(**{**TINY, "load_size": 33}, squash=squash)

    def read():
        train.update_cache(folder, config, cache, "A")
        [file] = cache.glob("A-*.bytes")
        stored = train.cached_pictures(cache, "A", config)
        pictures = [stored.rows(k, 0, stored.shapes[k][0]) for k in range(len(stored))]
        return pictures, file, file.stat().st_mtime_ns

    def same(one, two):
        return len(one) == len(two) and all((a == b).all() for a, b in zip(one, two))

    pictures, file, made = read()
    paths = cyclegan.find_pictures(folder)
    assert same(pictures, [cyclegan.read_picture(path, 33, squash) for path in paths])
    assert len(pictures) == 5 and len({p.shape for p in pictures}) == (1 if squash else 5)
    assert read()[2] == made and "not those" not in capsys.readouterr().out
    for damaged in cache.iterdir():
        damaged.write_bytes(damaged.read_bytes()[:-1000 if damaged == file else -4])
        assert same(read()[0], pictures)
    shutil.copy(user / "oranges" / "oranges 0.png", folder)
    (folder / "nowhere.png").symlink_to("there is no such file")
    more, said = read()[0], capsys.readouterr().out
    assert len(more) == 6 and "nowhere.png" in said
    assert f"A: the pictures in {folder} are not those of the run's last start" in said
    assert len(list(cache.iterdir())) == (1 if squash else 2)
    shutil.rmtree(folder)
    assert same(read()[0], more) and "no longer exists" in capsys.readouterr().out


def test_a_cache_that_the_disk_has_no_room_for_is_refused_before_it_is_written(
        user, tmp_path, monkeypatch):
    config, folder = Config(**TINY), user / "apples"
    paths = cyclegan.find_pictures(folder)
    need = sum(cyclegan.read_picture(path, 36).size for path in paths)
    assert train.check_room(paths, config, tmp_path) == need
    assert train.check_room(1000 * paths, config, tmp_path) == pytest.approx(1000 * need, rel=0.1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
    with pytest.raises(UserError, match=f"{need:,} bytes.*{need - 1:,}; a lower --load-size"):
        train.update_cache(folder, config, tmp_path / "cache", "A")
    with pytest.raises(UserError, match="8 pictures take about"):  # both, before the run is made
        train.check_folders([folder, user / "oranges"], config, tmp_path / "out")
    assert not (tmp_path / "cache").exists()
    Image.new("RGB", (1, 5000)).save(tmp_path / "long.png")  # will be skipped
    assert train.check_room([tmp_path / "long.png"], config, tmp_path) == 0


P3 = {  # Display P3, typed from its definition: primaries adapted to D50, and the curve of sRGB
    "rXYZ": (0.51512, 0.24120, -0.00105), "gXYZ": (0.29198, 0.69225, 0.04189),
    "bXYZ": (0.15710, 0.06657, 0.78407)}
TO_SRGB = np.array([  # linear P3 -> linear sRGB
    [1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])


def curve(v):
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def profile_of_display_p3(name=b"Display P3"):
    """The bytes of an ICC profile, as its specification lays them out."""
    def s15(*numbers):
        return b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)

    levels = (curve(np.linspace(0, 1, 1024)) * 65535).round().astype(">u2")
    trc = b"curv" + bytes(4) + struct.pack(">I", 1024) + levels.tobytes()
    tags = {"desc": b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + bytes(79),
            "wtpt": b"XYZ " + bytes(4) + s15(0.9642, 1.0, 0.8249),
            **{tag: b"XYZ " + bytes(4) + s15(*xyz) for tag, xyz in P3.items()},
            "rTRC": trc, "gTRC": trc, "bTRC": trc}
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag.encode() + struct.pack(">II", start + len(data), len(content))
        data += content
    header = struct.pack(">I4sI4s4s4s", start + len(data), b"", 0x02400000, b"mntr", b"RGB ",
                         b"XYZ ") + bytes(12) + b"acsp" + bytes(28) + s15(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + table + data


def test_colour_profiles_are_brought_to_srgb_and_unreadable_ones_ignored(tmp_path):
    random = np.random.default_rng(0)
    picture = random.integers(40, 200, size=(8, 9, 3), dtype=np.uint8)
    linear = curve(picture / 255) @ TO_SRGB.T
    inside = (linear > 0.002).all(-1) & (linear < 1).all(-1)
    expected = 255 * (1.055 * linear.clip(0.002, 1) ** (1 / 2.4) - 0.055)
    for name, profile in (("p3", profile_of_display_p3()), ("broken", b"no profile"),
                          ("srgb", profile_of_display_p3(b"sRGB IEC61966-2.1"))):
        Image.fromarray(picture).save(tmp_path / f"{name}.png", icc_profile=profile)
    read = cyclegan.read_picture(tmp_path / "p3.png").astype(float)
    assert inside.mean() > 0.5 and np.abs(read - picture).max() > 10
    assert np.abs(read - expected)[inside].max() < 1.5  # rounded, and by tables of 16 bits
    for name in ("broken", "srgb"):
        assert (cyclegan.read_picture(tmp_path / f"{name}.png") == picture).all()
    opaque = Image.fromarray(picture).convert("RGBA")
    opaque.save(tmp_path / "alpha.png", icc_profile=profile_of_display_p3())
    assert (cyclegan.read_picture(tmp_path / "alpha.png") == read).all()


def test_greys_that_a_window_has_to_be_chosen_for_are_told(tmp_path):
    ct = np.linspace(0, 4095, 30).astype(np.uint16).reshape(5, 6)
    Image.fromarray(ct).save(tmp_path / "ct.png")
    with pytest.warns(UserWarning, match="a sixteenth of its range: 17 of 256 grey levels are"):
        picture = cyclegan.read_picture(tmp_path / "ct.png")
    assert picture.max() == 16
    for values in (np.array([[-1000.0, 400.0]], np.float32), np.array([[-1, 9]], np.int32)):
        Image.fromarray(values).save(tmp_path / "hounsfield.tif")
        with pytest.raises(UserError, match="hounsfield.tif: it has negative values"):
            cyclegan.read_picture(tmp_path / "hounsfield.tif")


def test_pictures_too_long_for_their_width_are_refused(tmp_path):
    Image.new("RGB", (6, 600)).save(tmp_path / "a.png")
    assert cyclegan.read_picture(tmp_path / "a.png", 24).shape == (2400, 24, 3)
    Image.new("RGB", (601, 6)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: it is more than a hundred times as long as wide"):
        cyclegan.read_picture(tmp_path / "a.png", 24)


def test_whole_pictures_are_small_enough_for_a_network(tmp_path):
    config = Config()
    pictures = cached(tmp_path / "A.bytes", [np.zeros((286, 6000, 3), np.uint8),
                                             np.zeros((381, 286, 3), np.uint8)], config)
    height, width, _ = train.whole_picture(pictures, 0, config).shape
    assert 0.99 * 2**20 < height * width < 1.01 * 2**20 and abs(width / height / 21 - 1) < 0.01
    assert train.whole_picture(pictures, 1, config).shape == (381, 286, 3)


def test_ignored_files_are_counted_by_suffix(tmp_path):
    (tmp_path / "more").mkdir()
    names = [*(f"more/{k}.HEIC" for k in range(1000)), "a.txt", "b.txt", "c", ".hidden", "d.png"]
    for name in names:
        (tmp_path / name).touch()
    ignored = cyclegan.ignored_files(tmp_path)
    if cyclegan.HEIC:  # pillow_heif is not installed
        assert ignored == f"1,000 .heic, 2 .txt, 1 without a suffix; {cyclegan.HEIC}"
        with pytest.raises(UserError, match="holds no pictures.*1,000 .heic; HEIC is read where"):
            cyclegan.find_pictures(tmp_path / "more")
    else:
        assert ignored == "2 .txt, 1 without a suffix"


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = np.asarray(Image.fromarray(photograph()).convert("L").convert("RGB"))
    pillow_heif.from_pillow(Image.fromarray(picture)).save(tmp_path / "a.heic", quality=-1)
    assert cyclegan.find_pictures(tmp_path) == [tmp_path / "a.heic"]
    read = cyclegan.read_picture(tmp_path / "a.heic")
    assert np.abs(read - picture.astype(int)).max() <= 3  # rounded on the way to YCbCr and back


# ---- One picture, at the scale of training -------------------------------------------------------


class Recolours(nn.Module):
    """A network with a scale that changes colours by an affine map, and notes what it saw."""

    def __init__(self, config=None, A=((1, 0, 0), (0, 1, 0), (0, 0, 1)), b=(0, 0, 0)):
        super().__init__()
        self.config, self.saw = config, []
        self.A, self.b = nn.Parameter(torch.tensor(A).float()), torch.tensor(b).float()

    def forward(self, images):
        self.saw.append(tuple(images.shape[2:]))
        return torch.einsum("ij,njhw->nihw", self.A, images) + self.b[:, None, None]


def test_pictures_reach_the_network_at_the_scale_of_training():
    ours, squashed = Config(), Config(squash=True)
    cases = [  # config, (width, height), size, then the height and width that the network sees
        (ours, (400, 300), None, (288, 384)), (ours, (30, 40), None, (384, 288)),
        (None, (400, 300), None, (256, 344)), (ours, (400, 300), 100, (100, 136)),
        (ours, (400, 300), "full", (300, 400)), (squashed, (400, 300), None, (288, 288)),
        (squashed, (400, 300), 100, (100, 100)), (ours, (7, 700), None, (10240, 104))]
    for config, (width, height), size, expected in cases:  # 286 x 381 grow to multiples of 4
        network = Recolours(config)
        picture = np.full((height, width, 3), 99, np.uint8)
        assert (translate.translate_photo(network, picture, size) == picture).all()
        assert network.saw == [expected]


def test_photographs_are_refused_in_words_where_their_scale_is_unknown():
    picture = np.zeros((9, 9, 3), np.uint8)[:, ::-1]
    for wrong in (picture / 255, picture[0], picture[..., :1]):
        with pytest.raises(ValueError, match="picture must be .H, W, 3. uint8, not"):
            translate.translate_photo(Recolours(), wrong)
    with pytest.raises(ValueError, match="give this one a size"):
        translate.translate_photo(Generator(2, 1), picture)
    assert translate.translate_photo(Generator(2, 1), picture, 24).shape == (9, 9, 3)


def test_a_picture_that_is_not_reduced_gets_the_networks_own_output():
    generator, picture = Generator(4, 1), photograph()
    generator.config = Config(image_size=64, load_size=190, blocks=1)
    result = translate.translate_photo(generator, picture)
    assert (result == cyclegan.translate(generator, picture)).all()
    generator.config = Config(image_size=64, load_size=285, blocks=1)  # enlarged
    larger = Image.fromarray(picture).resize((285, 380), Image.BICUBIC)
    result = Image.fromarray(cyclegan.translate(generator, np.asarray(larger)))
    expected = np.asarray(result.resize((190, 253), Image.BICUBIC))
    assert (translate.translate_photo(generator, picture) == expected).all()


def test_a_change_of_colours_is_carried_back_exactly():
    picture = np.asarray(Image.fromarray(photograph()).resize((700, 935), Image.BICUBIC))
    for A, b in (((-1, 0, 0), (0, -1, 0), (0, 0, -1)), (0, 0, 0)), (
            ((0.5, 0.2, 0), (0, 0.7, 0.1), (0.3, 0, 0.4)), (0.1, -0.2, 0.0)):
        network = Recolours(Config(image_size=64, load_size=72), A, b)
        result = translate.translate_photo(network, picture)
        assert network.saw == [(96, 72)] and result.shape == picture.shape
        expected = ((np.array(A) @ (picture / 127.5 - 1)[..., None])[..., 0] + b + 1) * 127.5
        # Bytes that the network returns are rounded: up to half a level, and one more here.
        assert np.abs(result - expected.clip(0, 255)).max() <= 1


def disc(side, period=None):
    """A plain disc on a wall; with stripes of a period, a fraction of the side, if given."""
    v, u = (np.mgrid[:side, :side] + 0.5) / side
    inside = (0.38 - np.hypot(u - 0.5, v - 0.5)) * side
    stripes = 0 if period is None else 90 * np.sign(np.sin(2 * np.pi * u / period))
    picture = 90 + np.clip(inside + 0.5, 0, 1) * (60 + stripes)
    return np.stack([picture, picture * 0.9, picture * 0.8], -1).round().astype(np.uint8)


def test_stripes_that_the_network_paints_are_carried_back():
    plain, small = disc(512), disc(64)
    for period, most in ((6, 8), (12, 4.5), (20, 3.5)):  # pixels of the small picture; grey levels
        truth = disc(512, period / 64)
        result = translate.carry_back(plain, small, disc(64, period / 64))
        untranslated = np.abs(plain - truth.astype(int)).mean()
        assert untranslated > 20 and np.abs(result - truth.astype(int)).mean() < most, period


def test_the_noise_of_the_network_is_not_carried_back():
    picture = np.asarray(Image.fromarray(photograph()).resize((760, 1012), Image.BICUBIC))
    small = np.asarray(Image.fromarray(picture).resize((95, 127), Image.BICUBIC))
    board = 12 * (2 * (np.indices(small.shape[:2]).sum(0) % 2) - 1)[..., None]
    noisy = np.clip(255 - small.astype(int) + board, 0, 255).astype(np.uint8)
    error = np.abs(translate.carry_back(picture, small, noisy) - (255 - picture.astype(int))).mean()
    assert error < 1
    assert np.abs(noisy - (255 - small.astype(int))).mean() > 10  # what enlarging would keep


def test_a_carried_back_picture_has_no_seams_and_any_size():
    random = np.random.default_rng(0)
    picture = np.asarray(Image.fromarray(photograph()).resize((300, 600), Image.BICUBIC))
    small = np.asarray(Image.fromarray(picture).resize((50, 100), Image.BICUBIC))
    translated = random.integers(256, size=small.shape, dtype=np.uint8)
    whole = translate.carry_back(picture, small, translated, strip=600)
    assert (translate.carry_back(picture, small, translated, strip=7) == whole).all()
    for height, width in ((1, 1), (2, 5), (300, 1)):
        picture = random.integers(256, size=(height, width, 3), dtype=np.uint8)
        small = picture[:max(1, height // 2), :max(1, width // 2)]
        assert translate.carry_back(picture, small, 255 - small).shape == picture.shape


# ==== The programs, run for real ==================================================================

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1",  # the fastest for networks so small
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
SMALL = "--image-size 24 --load-size 28 --width 2 --blocks 1"
TRAIN = f"train.py --dataA apples --dataB oranges {SMALL}"


IN_A_FORK = """
import os, resource, runpy, shlex, sys, torch
for stream, name in ((1, out), (2, err)):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), stream)
sys.stdout.reconfigure(line_buffering=True)
os.chdir(folder)
os.environ.update(environment)
torch.set_num_threads(1)
if file_size:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
program, *sys.argv[1:] = shlex.split(line)
sys.argv[0] = os.path.join(here, program)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Program:
    """A command line of a program in a process of its own, as from the shell.

    But it is forked from a process that has imported torch, which takes seconds.
    """

    def __init__(self, folder, line, file_size=None, **environment):
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["cyclegan", "torch._dynamo"])
        texts = Path(tempfile.mkdtemp(dir=folder, prefix="."))
        self.out, self.err = texts / "out", texts / "err"
        self.process = forks.Process(target=exec, args=(IN_A_FORK, {
            "here": HERE, "folder": folder, "line": line, "out": self.out, "err": self.err,
            "file_size": file_size, "environment": environment}))
        self.process.start()

    def wait_for(self, beginning):
        """Waits until it prints a line that begins so."""
        while not (self.out.exists() and f"\n{beginning}" in f"\n{self.out.read_text()}"):
            assert self.process.is_alive(), self.err.read_text()
            time.sleep(0.01)

    def send(self, number):
        os.kill(self.process.pid, number)

    def finish(self):
        """Waits for its end, -> (exit status, output, errors)."""
        self.process.join(300)
        status, out, err = self.process.exitcode, self.out.read_text(), self.err.read_text()
        shutil.rmtree(self.out.parent)
        assert "Traceback" not in err, err
        return status, out, err


def run(folder, *lines):
    """Runs command lines, two at a time, -> (exit status, output, errors) of each."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda line: Program(folder, line).finish(), lines))


def ok(folder, *lines):
    """What they print, if all end well."""
    ends = run(folder, *lines)
    assert all(status == 0 for status, *_ in ends), ends
    return [out for _, out, _ in ends]


def pair(folder, line):
    """Both processes of a command line that torchrun would start with --nproc-per-node 2."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [Program(folder, line, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank,
                    MASTER_ADDR="localhost", MASTER_PORT=port) for rank in "01"]


def steps_of(folder):
    """How many steps are in the checkpoint of a run."""
    return cyclegan.load_checkpoint(folder / "latest.pt")[0].steps


def logged_steps(folder):
    return [int(line.split(",")[0]) for line in
            (folder / "losses.csv").read_text().splitlines()[1:]]


def same_state(one, two):
    """Whether two runs have the same checkpoint, bit for bit."""
    one, here = cyclegan.load_checkpoint(one / "latest.pt")
    two, there = cyclegan.load_checkpoint(two / "latest.pt")
    return here == there and all(
        torch.equal(a, b) for a, b in zip(state_of(one), state_of(two), strict=True))


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with apples/ (5 pictures, one in a folder below), oranges/ (3) and a trained run."""
    folder = tmp_path_factory.mktemp("user")
    for name, count, colour in (("apples", 5, (200, 30, 40)), ("oranges", 3, (250, 150, 20))):
        (folder / name / "more").mkdir(parents=True)
        for k in range(count):
            picture = np.random.default_rng(k).integers(60, size=(30 + k, 41, 3))
            picture += np.array(colour) // 2
            path = folder / name / ("more" if k == 1 else "")
            path = path / f"{name} {k}.{'jpg' if k % 2 else 'png'}"
            Image.fromarray(picture.astype(np.uint8)).save(path)
    [out] = ok(folder, f"{TRAIN} --epochs 2 --decay-epochs 2 --batch-size 2 --buffer-size 3"
                       " --save-every 2 --out trained")
    assert "finished after step 12" in out  # 4 epochs of 3 batches for 5 pictures
    return folder


def test_training_writes_what_it_promises(user):
    folder = user / "trained"
    written = sorted(re.sub("-[0-9a-f]{16}", "", str(path.relative_to(folder)))
                     for path in folder.rglob("*") if path.is_file())
    assert written == [".lock", "cache/A.bytes", "cache/A.shapes", "cache/B.bytes",
                       "cache/B.shapes", "epoch_0002.pt", "epoch_0004.pt", "latest.pt",
                       "losses.csv", "losses.png", "samples.gif",
                       *(f"samples/epoch_000{k}.png" for k in (1, 2, 3, 4))]
    lines = (folder / "losses.csv").read_text().splitlines()
    assert lines[0] == "step,epoch,rate,gan,cycle,identity,D_X,D_Y"
    rows = [[float(v) for v in line.split(",")] for line in lines[1:]]
    assert [row[0] for row in rows] == list(range(1, 13))
    assert [row[1] for row in rows[::3]] == [1, 2, 3, 4]
    assert np.allclose([row[2] for row in rows[::3]], [2e-4, 2e-4, 2e-4 * 2 / 3, 2e-4 / 3],
                       rtol=1e-6)
    model = cyclegan.load_checkpoint(folder / "latest.pt")[0]
    sheet = np.asarray(Image.open(folder / "samples" / "epoch_0004.png"))
    titles, grid = sheet[:14], sheet[14:]
    assert grid.shape == (4 * 32, 6 * 42, 3)  # 28 x 38 pixels, 30 x 41 at their scale, and a frame
    written = (titles.reshape(14, 6, 42, 3) < 100).any(-1).sum((0, 2))  # dark pixels of each
    assert (written > 4).all() and written[2] > written[1] > written[0]  # F(G(x)), G(x), x
    for row, (a, b) in enumerate(((0, 0), (1, 0), (2, 1), (3, 2))):  # fourths of 5 and of 3
        for column, name, k, networks in ((0, "apples", a, (model.G, model.F)),
                                          (3, "oranges", b, (model.F, model.G))):
            path = cyclegan.find_pictures(user / name)[k]
            picture = cyclegan.read_picture(path, 28)  # whole, not cropped
            height, width = picture.shape[:2]
            image = cyclegan.to_tensor(cyclegan.pad_to_multiple_of_4(picture[None]))
            with torch.no_grad():
                images = [image, networks[0](image), networks[1](networks[0](image))]
            left = (42 - width) // 2
            for n, expected in enumerate(images):
                cell = grid[32 * row:32 * row + 32, 42 * (column + n):42 * (column + n) + 42]
                inside = cell[2:30, left:left + width].astype(int)
                expected = cyclegan.to_pictures(expected)[0, :height, :width]
                assert np.abs(inside - expected).max() <= 1  # in other batches rounding may differ
                assert (cell[:2] == 255).all() and (cell[:, :left] == 255).all()


def test_the_decaying_rate_reaches_adam_and_small_domains_are_drawn_from(user):
    lines = [f"train.py --dataA oranges --dataB apples {SMALL} {schedule}" for schedule in (
        "--lr 2e-4 --epochs 1 --decay-epochs 0", "--lr 4e-4 --epochs 0 --decay-epochs 1")]
    outs = [*ok(user, lines[0]), *ok(user, lines[1])]  # the second at half of its rate
    assert all("finished after step 5" in out for out in outs)  # max(3, 5)
    assert "new run runs/oranges-apples," in outs[0]  # the next free name
    assert "new run runs/oranges-apples-2," in outs[1]
    assert same_state(user / "runs" / "oranges-apples", user / "runs" / "oranges-apples-2")


def test_interrupted_and_resumed_equals_uninterrupted(user):
    new = f"{TRAIN} --buffer-size 3 --out"
    line = f"{new} stopped"
    for epoch, number in ((3, signal.SIGINT), (6, signal.SIGTERM), (9, signal.SIGHUP)):
        program = Program(user, line)
        program.wait_for(f"epoch {epoch}/")
        program.send(number)
        status, out, _ = program.finish()
        assert status == 128 + number and "python train.py --resume stopped" in out
        steps = steps_of(user / "stopped")
        assert f"stopped after step {steps};" in out
        line = "train.py --resume stopped"
    with open(user / "stopped" / "losses.csv", "a") as log:  # as if killed after the checkpoint
        log.write(f"{steps + 1},3,0.0002,1,1,1,1,1\n²,\nx\n\n{steps + 2},3,0.0")
    last = steps + 10 - steps % 5  # the end of an epoch
    ok(user, *(f"{each} --max-steps {last}" for each in (line, f"{new} whole")))
    assert same_state(user / "stopped", user / "whole")
    assert steps_of(user / "stopped") == last
    assert cyclegan.load_checkpoint(user / "whole" / "latest.pt")[1]["epoch"] == last // 5
    one, two = ((user / name / "losses.csv").read_text() for name in ("stopped", "whole"))
    assert one == two
    assert "nothing to do" in ok(user, f"{line} --max-steps {last}")[0]


def test_a_run_starts_from_the_networks_of_another(user):
    out, other = ok(
        user, "train.py --dataA oranges --dataB apples --image-size 24 --start-from trained"
        " --lr 1e-30 --seed 5 --max-steps 1 --out begun-from-run",
        f"train.py --dataA oranges --dataB apples {SMALL} --start-from trained/epoch_0002.pt"
        " --max-steps 1 --out begun-from-epoch")
    [larger] = ok(user, "train.py --dataA oranges --dataB apples --start-from trained --image-size "
                        "28 --max-steps 1 --out begun-larger")
    assert "trained at --image-size 24 --load-size 28, this run has 28 and 31" in larger
    assert "from trained: G, F, D_X, D_Y; at random: none" in out
    assert "from trained/epoch_0002.pt: G, F" in other and "note: they were" not in out + other
    old, new = (torch.load(user / name / "latest.pt") for name in ("trained", "begun-from-run"))
    assert new["steps"] == 1 and (new["config"]["width"], new["config"]["blocks"]) == (2, 1)
    assert new["config"]["seed"] == 5 and new["config"]["epochs"] == 100  # all else is new
    for key, value in old["model"].items():
        if not key.startswith("buffer"):
            assert torch.allclose(value, new["model"][key], rtol=0, atol=1e-20), key
    assert all(moments["step"] == 1 for adam in new["adams"] for moments in adam.values())


def test_a_run_starts_from_the_authors_files(user):
    twins = {}
    for seed, name in enumerate(("G_A", "G_B", "D_A", "D_B")):
        file = user / "theirs" / f"latest_net_{name}.pth"
        twins[name] = authors_file(file, "plain", 3, 6, seed)
        if name[0] == "D":
            torch.manual_seed(seed)
            twins[name] = twin_discriminator(3)
            torch.save({f"model.{k}": v for k, v in twins[name].state_dict().items()}, file)
    (user / "released").mkdir()
    shutil.copy(user / "theirs" / "latest_net_G_B.pth", user / "released" / "latest_net_G.pth")
    new = "train.py --dataA apples --dataB oranges --image-size 24 --lr 1e-30 --max-steps 1 --eager"
    four, one, file = ok(user, f"{new} --start-from theirs --out from-four",
                         f"{new} --start-from released --out from-one",
                         f"{new} --start-from theirs/latest_net_G_B.pth --out from-file")
    assert "from theirs: G, F, D_X, D_Y; at random: none" in four
    assert "from released: G; at random: F, D_X, D_Y" in one and "G; at random: F, D" in file
    taken = {"from-four": {"G": "G_A", "F": "G_B", "D_X": "D_B", "D_Y": "D_A"},
             "from-one": {"G": "G_B"}, "from-file": {"G": "G_B"}}  # their D_A judges what G_A makes
    for folder, names in taken.items():
        model = cyclegan.load_checkpoint(user / folder / "latest.pt")[0]
        assert (model.config.width, model.config.blocks) == (3, 6)
        for ours, theirs in names.items():
            weights = twins[theirs].state_dict()
            for key, value in getattr(model, ours).model.state_dict().items():
                assert torch.allclose(value, weights[key], rtol=0, atol=1e-20), (folder, ours, key)
    assert model.F.model[1].weight.std() < 0.03  # at random, as Sec. 7.1 has it
    torch.save(twin_discriminator(4).state_dict(), user / "released" / "latest_net_D_A.pth")
    with pytest.raises(UserError, match="latest_net_D_A.pth holds no 70 x 70 discriminator"):
        cyclegan.load_networks(user / "released")  # its keys lack "model."


def test_epochs_may_be_changed_either_way_when_a_run_is_resumed(user):
    for name in ("sooner", "longer", "later"):
        shutil.copytree(user / "trained", user / name)
    new = f"{TRAIN} --batch-size 2 --epochs 8 --decay-epochs 1 --max-steps 11 --out sooner"
    shutil.rmtree(user / "sooner")
    ok(user, new)  # in the middle of epoch 4
    sooner, longer = ok(user, "train.py --resume sooner --epochs 1 --decay-epochs 3",
                        "train.py --resume longer --epochs 6 --decay-epochs 2")
    assert "in epoch 4 the learning rate is 0.00015; in the last, epoch 6, 5e-05" in sooner
    assert "in epoch 5 the learning rate is 0.0002, until epoch 6; in the last, epoch 8," in longer
    rates = {name: [line.split(",")[1:3] for line in
                    (user / name / "losses.csv").read_text().splitlines()[1:]]
             for name in ("sooner", "longer")}
    assert [float(rate) for _, rate in rates["sooner"]] == pytest.approx(
        11 * [2e-4] + [1.5e-4] + 3 * [1e-4] + 3 * [5e-5], rel=1e-6)
    assert [float(rate) for _, rate in rates["longer"][12::3]] == pytest.approx(
        [2e-4, 2e-4, 4e-4 / 3, 2e-4 / 3], rel=1e-6)
    assert [int(epoch) for epoch, _ in rates["longer"][::3]] == list(range(1, 9))
    config = cyclegan.load_checkpoint(user / "sooner" / "latest.pt")[0].config
    assert (config.epochs, config.decay_epochs) == (3, 3)
    later = ok(user, "train.py --resume later --epochs 1 --decay-epochs 1")[0]
    assert "nothing to do" in later  # all of its epochs are done
    stopped = ok(user, "train.py --resume later --epochs 4 --max-steps 12")[0]
    assert "nothing to do" in stopped and "continue with" in stopped
    config = cyclegan.load_checkpoint(user / "later" / "latest.pt")[0].config
    assert (config.epochs, config.decay_epochs) == (4, 1)  # saved nevertheless


def test_between_the_minutes_of_saving_only_numbered_epochs_are_saved(user):
    program = Program(user, f"{TRAIN} --save-every 4 --out seldom")
    program.wait_for("epoch 3/")
    assert steps_of(user / "seldom") == 0  # after 10 minutes, unless told
    program.wait_for("epoch 6/")
    assert steps_of(user / "seldom") == 20
    program.send(signal.SIGINT)
    program.finish()
    assert steps_of(user / "seldom") > 20
    program = Program(user, f"{TRAIN} --batch-size 5 --save-minutes 1e-9 --out often")
    program.wait_for("epoch 3/")  # of one step each
    assert steps_of(user / "often") > 0
    program.send(signal.SIGKILL)
    program.finish()


HELD = """
import os, runpy, sys, time
replace, sleep, began = os.replace, time.sleep, []
def held(source, target):  # as by a virus scanner, a synchronising folder, Samba
    if os.path.basename(target) in NAMES.split() and os.path.exists(target):
        began.append(time.time())
        if time.time() < began[0] + SECONDS:
            raise PermissionError(13, "Permission denied")
    replace(source, target)
os.replace, time.sleep = held, lambda seconds: sleep(SLEEP * seconds)
sys.path.insert(0, HERE)
sys.argv[0] = os.path.join(HERE, "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_files_that_cannot_be_replaced_lose_nothing(user):
    def program(name, names, seconds, sleep):
        text = HELD.replace("NAMES", repr(names)).replace("SECONDS", str(seconds))
        text = text.replace("SLEEP", str(sleep)).replace("HERE", repr(str(HERE)))
        (user / f"{name}.py").write_text(text)
        line = f"{TRAIN} --epochs 2 --decay-epochs 2 --batch-size 2 --buffer-size 3 --out {name}"
        return Program(user, line.replace("train.py", str(user / f"{name}.py")) + " --save-every 2")

    brief = program("brief", "latest.pt", 3, 1)
    held = program("held", "latest.pt samples.gif epoch_0001.png", 1e9, 0.01)
    status, out, err = brief.finish()  # tried again until it went
    assert status == 0 and "note" not in out and same_state(user / "brief", user / "trained")
    status, out, err = held.finish()
    assert status == 1 and out.count("note: cannot replace held/latest.pt: Permission denied; "
                                     "training goes on\n") == 1  # after epoch 2
    assert len(err.splitlines()) == 1 and "rename held/latest.new.pt to latest.pt" in err, err
    assert steps_of(user / "held") == 0 and not list((user / "held").rglob("*.part"))
    os.replace(user / "held" / "latest.new.pt", user / "held" / "latest.pt")
    assert same_state(user / "held", user / "trained")
    assert (user / "held" / "epoch_0002.pt").exists()
    (user / "held" / "samples.gif").touch()
    shutil.copy(user / "held.py", user / "gif.py")
    line = f"{user / 'gif.py'} --resume held --epochs 3 --max-steps 13"
    (user / "gif.py").write_text((user / "held.py").read_text().replace("latest.pt", "-"))
    status, out, err = Program(user, line).finish()
    assert status == 0 and "note: cannot replace held/samples.gif" in out, (out, err)


@pytest.fixture(scope="module")
def killed(user):
    """A run killed after an epoch's end, half-written files in it, while others tried to begin."""
    new, folder = f"{TRAIN} --save-minutes 1e-9 --sample-every 3 --out killed", user / "killed"
    program = Program(user, new)
    program.wait_for("new run")
    assert steps_of(folder) == 0  # saved from the beginning
    program.wait_for("epoch 4/")
    refused = run(user, "train.py --resume killed", new)
    assert any(steps_of(folder) % 5 for _ in range(200))  # saved not only after epochs of 5
    program.send(signal.SIGKILL)
    program.finish()
    for name in ("latest.pt", "cache/A-0123.bytes", "samples/epoch_0007.png"):
        (folder / f"{name}.part").write_bytes(b"PK")
    return folder, refused


def test_one_training_at_a_time_is_at_work_in_a_run(killed):
    reasons = ("train.py is already running in killed", "--out killed is not empty")
    for (status, _, err), reason in zip(killed[1], reasons):
        assert status == 1 and len(err.splitlines()) == 1 and reason in err, err


def test_a_full_disk_gets_one_sentence_and_harms_no_checkpoint(killed, user):
    checkpoint = (killed[0] / "latest.pt").read_bytes()
    log = (killed[0] / "losses.csv").read_text().splitlines(keepends=True)
    line = len("".join(log[:steps_of(killed[0]) + 1])) + 20  # the checkpoint's log, not a line more
    cases = {"full1": (len(checkpoint) // 2, "latest.pt"), "full2": (100, "losses.csv"),
             "full3": (line, "losses.csv")}
    for name in cases:
        shutil.copytree(killed[0], user / name)
    for name, (limit, file) in cases.items():
        status, _, err = Program(user, f"train.py --resume {name}", file_size=limit).finish()
        assert status == 1 and len(err.splitlines()) == 1, err
        assert f"cannot write {name}/{file}" in err
        assert (user / name / "latest.pt").read_bytes() == checkpoint
        assert not list((user / name).rglob("*.part"))


def test_a_killed_run_continues_by_resume_alone(killed, user):
    folder, steps = killed[0], steps_of(killed[0])
    (user / "begun").mkdir()
    for name in (".lock", "cyclegan-01ab.part", "latest.pt.part"):  # killed before the first save
        (user / "begun" / name).write_bytes(b"PK")
    ok(user, f"train.py --resume killed --max-steps {steps + 12}",
       f"{TRAIN} --out begun --max-steps 1")
    assert logged_steps(folder) == list(range(1, steps + 13))
    after = cyclegan.load_checkpoint(folder / "latest.pt")[1]
    assert after["save_minutes"] == 1e-9 and after["sample_every"] == 3
    assert (folder / "samples" / "epoch_0003.png").exists()
    assert not (folder / "samples" / "epoch_0004.png").exists()
    assert not list(folder.glob("epoch_*.pt")) and not list(folder.rglob("*.part"))


def test_two_processes_train_as_one_and_hand_over(user):
    line = f"{TRAIN} --epochs 2 --decay-epochs 2 --buffer-size 3 --out"
    first, second = pair(user, f"{line} two")
    (status, out, err), (_, nothing, _) = first.finish(), second.finish()
    assert status == 0 and nothing == "", (out, err)
    assert out.count("finished after step 12") == 1 == out.count("A: 5 pictures")
    one, two = (np.loadtxt(user / name / "losses.csv", delimiter=",", skiprows=1)
                for name in ("trained", "two"))
    # float32, whose sums differ in their order: by 3e-6 here, by 0.04 if processes share wrongly
    assert np.allclose(one, two, rtol=1e-4)
    assert not np.allclose(one[0, 3:], one[1, 3:], rtol=1e-4)  # the control: steps differ
    first, second = pair(user, f"{line} stopped-pair")
    first.wait_for("epoch 1/")
    second.send(signal.SIGTERM)  # one stops, and the other too
    ends = first.finish(), second.finish()
    assert [status for status, *_ in ends] == [0, 143] or ends[0][0] == 143, ends
    steps = steps_of(user / "stopped-pair")
    assert f"stopped after step {steps}; everything is saved" in ends[0][1] and steps < 12
    assert [each.finish()[0] for each in pair(user, "train.py --resume stopped-pair")] == [0, 0]
    assert same_state(user / "two", user / "stopped-pair")
    assert logged_steps(user / "stopped-pair") == list(range(1, 13))
    ok(user, f"{line} handed --max-steps 2")  # 2 pictures of 5, then 3 by two processes
    ends = [each.finish() for each in pair(user, "train.py --resume handed --max-steps 4")]
    assert "stopped after step 4" in ends[0][1], ends
    assert cyclegan.load_checkpoint(user / "handed" / "latest.pt")[1]["epoch"] == 1
    assert "finished after step 17" in ok(user, "train.py --resume two --epochs 3")[0]  # and back


STEPS_OF_TWO = """
import torch, train
from cyclegan import Config, CycleGAN
from test_cyclegan import TINY, noise, state_of
rank, _ = train.RANK, train.connect(torch.device("cpu"))
model = CycleGAN(Config(**TINY, buffer_size=2)).double()
for k in range(4):
    losses = model.step(*(noise(2, 3, 32, 32, seed=k + s)[rank:rank + 1] for s in (0, 9)))
torch.manual_seed(rank)
custom = CycleGAN(Config(**TINY))
custom.G = torch.nn.Conv2d(3, 3, 3, padding=1)
custom.step(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))
torch.save(([*state_of(model), *losses.values()], custom.state_dict()), f"rank{rank}.pt")
"""


def test_two_processes_take_the_step_of_one_with_both_pictures(tmp_path):
    (tmp_path / "steps.py").write_text(STEPS_OF_TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "steps.py"], cwd=tmp_path, check=True,
                   env={**ENVIRONMENT, "PYTHONPATH": str(HERE)})
    model = CycleGAN(Config(**TINY, buffer_size=2)).double()
    for k in range(4):
        losses = model.step(*(noise(2, 3, 32, 32, seed=k + s) for s in (0, 9)))
    (one, custom), (two, other) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for a, b, whole in zip(one, two, [*state_of(model), *losses.values()], strict=True):
        assert torch.equal(a, b)  # the processes agree to the last bit
        assert (a - whole).abs().max() < 1e-12 if a.numel() else a.shape == whole.shape
    assert all(torch.equal(custom[key], other[key]) for key in custom)  # weights are rank 0's


def test_the_end_of_one_process_ends_the_other(user):
    first, second = pair(user, f"{TRAIN} --out dying")
    first.wait_for("epoch 2/")
    second.send(signal.SIGKILL)
    status, _, err = first.finish()
    assert status == 1 and err.startswith("train.py (rank 0): another process failed; see"), err
    second.finish()


def test_training_outlives_its_reader_and_under_nohup_its_terminal(user):
    line = [sys.executable, HERE / "train.py", *shlex.split(TRAIN)[1:], "--max-steps", "60"]
    process = subprocess.Popen([*line, "--out", "unread"], cwd=user, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    next(text for text in process.stdout if text.startswith("epoch 2"))
    process.stdout.close()  # as | head does
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0 and not process.stderr.read()
    assert steps_of(user / "unread") == 60


def test_translations_keep_names_folders_and_sizes(user):
    twin = authors_file(user / "horse2zebra" / "latest_net_G_B.pth", "old")
    Image.fromarray(photograph()).save(user / "a photograph.png")
    outs = ok(
        user, "translate.py apples --checkpoint trained --out there",
        "translate.py 'apples/apples 2.png' 'apples/more/apples 1.jpg' --direction BtoA"
        " --checkpoint trained/epoch_0004.pt --out two --side-by-side",
        "translate.py 'a photograph.png' --checkpoint horse2zebra --direction BtoA --out there"
        " --size full")
    names = {"apples 0", "more/apples 1", "apples 2", "apples 3", "apples 4"}
    printed = outs[0].splitlines()  # a line for each result
    assert set(printed[1:-1]) == {f"there/{name}.png" for name in names} and len(printed) == 7
    assert {str(p.relative_to(user / "there").with_suffix(""))
            for p in (user / "there").rglob("*.png")} == names | {"a photograph"}
    assert "5 translated" in printed[-1] and "1 picture\n" in outs[2]
    picture = cyclegan.read_picture(user / "apples" / "apples 2.png")
    model, _ = cyclegan.load_checkpoint(user / "trained" / "latest.pt")
    for folder, direction, width, top in (("there", "AtoB", 41, 0), ("two", "BtoA", 82, 14)):
        result = cyclegan.read_picture(user / folder / "apples 2.png")[top:]
        network = cyclegan.load_generator(user / "trained", direction)
        assert result.shape == (32, width, 3) and network.config == model.config
        assert (result[:, -41:] == translate.translate_photo(network, picture)).all()
    assert (result[:, :41] == picture).all()
    result = cyclegan.read_picture(user / "there" / "a photograph.png")
    assert np.abs(result - by_twin(twin, photograph())).max() < 1


def test_results_in_jpeg_replace_their_own_kind_only(user):
    line = "translate.py apples/more oranges --checkpoint trained --out jpegs --format"
    ok(user, f"{line} png")
    first = (user / "jpegs" / "more" / "apples 1.png").read_bytes()
    for _ in range(2):
        assert "4 translated into jpegs" in ok(user, f"{line} jpg")[0]
    results = {str(p.relative_to(user / "jpegs")) for p in (user / "jpegs").rglob("*.*")}
    assert results == {f"{name}.{kind}" for kind in ("png", "jpg") for name in (
        "more/apples 1", "oranges/oranges 0", "oranges/more/oranges 1", "oranges/oranges 2")}
    assert (user / "jpegs" / "more" / "apples 1.png").read_bytes() == first
    with Image.open(user / "jpegs" / "more" / "apples 1.jpg") as image:
        assert image.format == "JPEG" and image.size == (41, 31)
        lossless = cyclegan.read_picture(user / "jpegs" / "more" / "apples 1.png").astype(int)
        assert np.abs(lossless - np.asarray(image)).mean() < 6  # of noise
    own = shutil.copy(user / "apples" / "more" / "apples 1.jpg", user / "jpegs" / "oranges")
    os.replace(own, user / "jpegs" / "more" / "apples 1.jpg")
    [(status, _, err)] = run(user, f"{line} jpg")
    assert status == 1 and "apples 1.jpg exists and was not written by translate.py" in err


def test_a_folder_of_odd_shapes_trains_and_translates(user):
    sizes = [(64, 1800), (533, 8), (1, 1), (720, 1280), (30, 41), (8, 801)]  # width, height
    (user / "odd").mkdir()
    random = np.random.default_rng(0)
    for width, height in sizes:
        picture = random.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(user / "odd" / f"{width}x{height}.png")
    (user / "odd" / "notes.txt").touch()
    [out] = ok(user, f"train.py --dataA odd --dataB oranges {SMALL} --max-steps 7 --out odd-run")
    assert "8x801.png: it is more than a hundred times as long as wide" in out
    assert "A: 5 pictures" in out and "\nA: ignored: 1 .txt\n" in out
    with Image.open(user / "odd-run" / "samples" / "epoch_0001.png") as grid:
        assert grid.size == (6 * 60, 14 + 4 * 60)  # whole pictures, none longer than 2 x 28
    [(status, out, err)] = run(user, "translate.py odd --checkpoint odd-run --out odd-out")
    assert status == 1 and err.startswith("skipped: ") and "8x801.png" in err
    assert "odd: ignored: 1 .txt\n" in out
    for width, height in sizes[:-1]:
        with Image.open(user / "odd-out" / f"{width}x{height}.png") as image:
            assert image.size == (width, height)


def test_nothing_is_written_over(user):
    shutil.copytree(user / "apples", user / "twice" / "apples")
    shutil.copy(user / "apples" / "apples 3.jpg", user / "twice" / "apples" / "apples 0.jpg")
    for name in ("mine", "large", "folder/apples 1.png"):
        (user / name).mkdir(parents=True)
    Image.new("1", (20000, 10000)).save(user / "large" / "apples 1.png")
    mine = shutil.copy(user / "oranges" / "oranges 0.png", user / "mine" / "apples 1.png")
    twice = "translate.py twice --out twice-out"  # but results of an earlier call are
    cases = {"translate.py apples --out apples": "apples/apples 0.png",
             "translate.py twice-out --out twice-out": "apples 0-2.png",  # ours, but a source
             "translate.py apples/more --out mine": "mine/apples 1.png",  # no source, but not ours
             "translate.py apples/more --out large": "large/apples 1.png",  # nor to be opened
             "translate.py apples/more --out folder": "folder/apples 1.png"}
    for _ in range(2):
        ok(user, f"{twice} --checkpoint trained")
    ends = run(user, *(f"{line} --checkpoint trained" for line in cases))
    assert len(list((user / "twice-out").rglob("*.png"))) == 6
    assert (user / "twice-out" / "apples" / "apples 0-2.png").is_file()
    for (status, _, err), target in zip(ends, cases.values()):
        assert status == 1 and re.search(f"{target} (exists and was not|is itself to be)", err), err
    assert Path(mine).read_bytes() == (user / "oranges" / "oranges 0.png").read_bytes()


def test_what_memory_cannot_hold_is_skipped(tmp_path, monkeypatch, capsys):
    pairs = []
    for name, height in (("a", 8), ("b", 12), ("c", 8)):
        Image.new("RGB", (9, height)).save(tmp_path / f"{name}.png")
        pairs.append((tmp_path / f"{name}.png", tmp_path / "out" / f"{name}.png"))

    def network(_, picture, __):
        return torch.empty(10**15) if picture.shape[0] == 12 else 255 - picture

    monkeypatch.setattr(cyclegan, "translate", network)
    options = SimpleNamespace(size="full", side_by_side=False, direction="AtoB")
    assert translate.translate_all(None, pairs, options, "fp32") == 2
    err = capsys.readouterr().err
    assert err.startswith("skipped: too large") and "b.png; a lower --size" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "c.png"}
    assert (cyclegan.read_picture(tmp_path / "out" / "c.png") == 255).all()


def test_results_among_their_sources_are_not_translated_again(user, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "photos" / "translated"
    shutil.copytree(user / "apples", photos)
    pairs = translate.plan([photos], out)
    for _, target in pairs:
        translate.write(target, np.zeros((4, 4, 3), np.uint8))
    assert translate.plan([photos], out) == pairs and len(pairs) == 5
    assert len(translate.plan([out], tmp_path / "there")) == 5  # unless they are asked for


@pytest.fixture(scope="module")
def bad(user):
    """Things that can go wrong, beside the good ones."""
    for name in ("empty", "texts", "broken", "some"):
        (user / name).mkdir()
    (user / "texts" / "a.txt").write_text("no picture")
    (user / "downloads").mkdir()
    (user / "downloads" / "film.part").write_text("half of a film, and not ours")
    (user / "broken" / "a.png").write_bytes((user / "apples" / "apples 0.png").read_bytes()[:200])
    for name in ("broken/a.png", "apples/apples 2.png"):
        shutil.copy(user / name, user / "some")
    Image.new("1", (12000, 12000)).save(user / "some" / "huge.png")
    os.mkfifo(user / "pipe.png")
    (user / "some" / "loop.png").symlink_to("loop.png")
    shutil.copytree(user / "trained", user / "some" / "a run",
                    ignore=shutil.ignore_patterns("cache"))
    shutil.copy(user / "apples" / "apples 0.png", user / "some" / ("l" * 251 + ".png"))
    (user / "file").write_text("a file")
    for name in ("cut", "other", "unreplaced"):  # one for each, as they go side by side
        shutil.copytree(user / "trained", user / name)
    (user / "unreplaced" / "latest.new.pt").touch()
    (user / "gone").mkdir()
    cyclegan.save_checkpoint(user / "gone" / "latest.pt", CycleGAN(Config(**TINY)),
                             {**PLACE, "data": ["nowhere", "there"]})
    (user / "cut" / "latest.pt").write_bytes((user / "trained" / "latest.pt").read_bytes()[:5000])
    return user


MISTAKES = {  # a command line, and what its one sentence says
    "missing folder": ("train.py --dataA nowhere --dataB oranges", "nowhere"),
    "empty folder": ("train.py --dataA apples --dataB empty", "empty"),
    "no picture": ("train.py --dataA texts --dataB oranges", "texts"),
    "only broken pictures": (f"train.py --dataA broken --dataB oranges {SMALL}", "broken"),
    "a loop of links": ("train.py --dataA some/loop.png --dataB apples", "loop.png"),
    "one folder": ("train.py --dataA apples", "--dataB"),
    "out is a file": (f"{TRAIN} --out file", "file"),
    "out below a file": (f"{TRAIN} --out file/run", "file"),
    "out is a run": (f"{TRAIN} --out trained", "--resume trained"),
    "out holds a download": (f"{TRAIN} --out downloads", "--out downloads is not empty"),
    "impossible setting": (f"{TRAIN} --image-size 26", "image_size must be a multiple of 4"),
    "not a number": (f"{TRAIN} --lr fast", "--lr"),
    "half of a flag": (f"{TRAIN} --epoch 3", "--epoch"),
    "pictures that are gone": ("translate.py --checkpoint gone", "are no longer in"),
    "no such run": ("train.py --resume nowhere", "nowhere"),
    "not a run": ("train.py --resume apples", "no apples/latest.pt"),
    "checkpoint cut short": ("train.py --resume cut", "cut/latest.pt"),
    "other settings": ("train.py --resume trained --width 5", "--width 5"),
    "other pictures": ("train.py --resume other --dataA oranges", "--dataA"),
    "mirrored": ("train.py --resume trained --no-flip", "--no-flip contradicts"),
    "A twice": (f"{TRAIN} --dataB ./oranges/../apples --max-steps 1", "apples are one folder"),
    "the other in one": (f"{TRAIN} --dataB apples/more --max-steps 1", "in the other"),
    "one folder in the other": (f"{TRAIN} --dataA oranges/more --max-steps 1", "in the other"),
    "started and resumed": ("train.py --resume trained --start-from trained", "--start-from"),
    "another width than it has": (f"{TRAIN} --start-from trained --width 4 --max-steps 1",
                                  "--width 4"),
    "no networks": (f"{TRAIN} --start-from oranges", "oranges holds no networks"),
    "not replaced": ("train.py --resume unreplaced", "rename it to latest.pt"),
    "loss not finite": (f"{TRAIN} --lr 1e30 --out exploded", "is nan at step"),
    "weights not finite": (f"{TRAIN} --lr 1e39 --max-steps 1 --out overflowed",
                           "a weight is not finite after step 1"),
    "no picture to translate": ("translate.py nothing.jpg --checkpoint trained", "nothing.jpg"),
    "a pipe": ("translate.py pipe.png --checkpoint trained --out piped", "pipe.png"),
    "no checkpoint": ("translate.py apples --checkpoint apples", "apples/latest.pt"),
    "no generator": ("translate.py apples --checkpoint 'apples/apples 0.png'", "apples 0.png"),
    "cut checkpoint": ("translate.py apples --checkpoint cut", "cut/latest.pt"),
    "out cannot be written": ("translate.py apples --checkpoint trained --out file/x", "file/x"),
    "a size of nothing": ("translate.py apples --checkpoint trained --size some", "not some")}
if not torch.cuda.is_available():
    MISTAKES["no CUDA"] = (f"{TRAIN} --device cuda", "--device cuda")


@pytest.fixture(scope="module")
def mistakes(bad):
    """What each mistake gave, and the names of what all of them left behind."""
    before = set(bad.rglob("*"))
    results = run(bad, *(line for line, _ in MISTAKES.values()))
    left = {path.relative_to(bad).parts[0] for path in set(bad.rglob("*")) - before}
    return dict(zip(MISTAKES, results)), left


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_sentence(mistakes, case):
    status, _, err = mistakes[0][case]
    assert status != 0 and MISTAKES[case][1] in err, err
    assert err.startswith("usage:") or len(err.splitlines()) == 1, err


def test_mistakes_leave_nothing_behind(mistakes, bad):
    assert mistakes[1] == {"exploded", "overflowed"}
    assert (bad / "downloads" / "film.part").exists()
    assert [steps_of(bad / name) for name in mistakes[1]] == [0, 0]  # the last good one


def test_several_processes_without_their_addresses_get_one_sentence(tmp_path):
    status, _, err = Program(tmp_path, "train.py", WORLD_SIZE="2").finish()
    assert status == 1 and len(err.splitlines()) == 1, err
    assert "WORLD_SIZE is 2" in err and "torchrun" in err


def test_a_checkpoint_writes_nothing_outside_of_its_run(tmp_path):
    (tmp_path / "run").mkdir()
    cyclegan.save_checkpoint(tmp_path / "run" / "latest.pt", CycleGAN(Config(**TINY)), {
        **PLACE, "demo": True, "data": ["../outside/apples", "../outside/oranges"]})
    [(status, _, err)] = run(tmp_path, "train.py --resume run")
    assert status == 1 and "outside" in err and not (tmp_path / "outside").exists()


def test_unreadable_pictures_are_named_and_skipped(bad):
    trained, translated = run(
        bad, f"train.py --dataA some --dataB oranges {SMALL} --max-steps 1 --out partly",
        "translate.py some --checkpoint trained --out partly-out")
    assert trained[0] == 0 and translated[0] == 1, (trained, translated)
    assert "skipped: cannot read some/a.png" in trained[1].replace(f"{bad}/", "")
    assert "A: 2 pictures" in trained[1] and "3 of 5 skipped" in trained[1]
    assert "2 translated" in translated[1] and "some/a.png" in translated[2]
    assert "some/huge.png" in trained[1] and "some/huge.png" in translated[2]
    assert {p.name for p in (bad / "partly-out").iterdir()} == {"apples 2.png", "l" * 251 + ".png"}


# ---- The demo ------------------------------------------------------------------------------------


def test_demo_scenes_differ_in_the_fruit_alone():
    scene = train.draw_scene(np.random.default_rng(0))
    apples, oranges = (train.paint(scene, kind, 64).astype(int) for kind in ("apples", "oranges"))
    fruit = (apples != oranges).any(-1)
    assert 0.05 < fruit.mean() < 0.5
    others = [train.draw_scene(np.random.default_rng(k)) for k in range(20)]
    assert len({len(fruits) for fruits, *_ in others}) == 2  # one fruit or two
    red, orange = apples[fruit].mean(0), oranges[fruit].mean(0)
    assert red[0] > 2 * red[1] and 0.4 < orange[1] / orange[0] < 0.7


def test_the_demo_is_measured_against_the_truth(capsys, tmp_path):
    def network(brighter):  # changes nothing but the brightness
        layer = nn.Conv2d(3, 3, 1)
        nn.init.dirac_(layer.weight)
        nn.init.constant_(layer.bias, brighter)
        return layer

    config = Config(image_size=64, load_size=64, width=2, blocks=1)
    model = SimpleNamespace(G=network(0.0), F=network(0.1), config=config)
    (tmp_path / "samples.gif").touch()
    train.evaluate_demo(SimpleNamespace(model=model, folder=tmp_path))
    G, F, *words = capsys.readouterr().out.splitlines()
    assert G.startswith("apples to oranges") and "fruit is 100% of the untranslated picture's" in G
    assert "outside the fruit it is 0.000" in G
    assert F.startswith("oranges to apples") and "outside the fruit it is 0.102" in F  # 13 levels
    assert not any(line.startswith(("apples", "oranges")) for line in words)
    # Before training G paints grey: outside the fruit it is off by what walls and tables are.
    before = float(re.search(r"before training has \d+% and (0\.\d{3})", " ".join(words))[1])
    scene = train.paint(train.draw_scene(np.random.default_rng(2)), "apples", 64)
    assert abs(before - np.abs(scene / 127.5 - 1).mean()) < 0.15
    assert f"open {tmp_path / 'samples.gif'};" in words[-1]


def test_the_plot_of_losses_shows_them(tmp_path):
    rows = [f"{step},1,0.0002,2,{4 - step / 100},1,0.5,0.25\n" for step in range(1, 401)]
    (tmp_path / "losses.csv").write_text("step,epoch,rate,gan,cycle,identity,D_X,D_Y\n"
                                         + "".join(rows))
    plot = train.plot_losses(tmp_path / "losses.csv")
    top = len(plot) - 5 * (14 + 96)  # its title
    red = (plot[..., 0] > 150) & (plot[..., 1] < 80)
    panels = red[top:].reshape(5, 110, 720)[:, 14:]
    heights = [[panel[:, column].nonzero()[0].mean() for column in (20, 360, 700)]
               for panel in panels]
    assert np.ptp(heights[0]) < 1  # a constant
    start, middle, end = heights[1]  # 4 falls to 0: straight, from top to bottom
    assert start < 8 and abs(middle - (start + end) / 2) < 3 and end > 84
    (tmp_path / "losses.csv").write_text("step,epoch,rate,gan,D_X\n1,1,0.0002,2,3\n")
    assert train.plot_losses(tmp_path / "losses.csv").shape[1] == 720


# ==== The README ==================================================================================

TEXTS = {path: path.read_text() for path in (HERE / "README.md", *sorted(HERE.glob("docs/*.md")))}


def blocks_of_readme(language):
    """The code blocks of a language in README.md and docs/."""
    return re.findall(rf"```{language}\n(.*?)```", "".join(TEXTS.values()), re.S)


def block_with(text):
    [block] = [block for block in blocks_of_readme("python") if text in block]
    return block


def test_readme_commands_run_as_printed(user, tmp_path):
    lines = [line for block in blocks_of_readme("sh") for line in block.splitlines()]
    assert "python translate.py" in lines
    assert any(line.endswith("&& python train.py") for line in lines)
    for name in ("README.md", "requirements.txt", *(path.name for path in HERE.glob("*.py"))):
        shutil.copy(HERE / name, tmp_path)
    for name in {name for line in lines for name in re.findall(r"--data[AB] (\S+)", line)}:
        shutil.copytree(user / "apples", tmp_path / name)
    for name in ("folder", "horses"):
        shutil.copytree(user / "apples" / "more", tmp_path / name)
    shutil.copy(user / "apples" / "more" / "apples 1.jpg", tmp_path / "photo.jpg")
    authors_file(tmp_path / "horse2zebra" / "latest_net_G.pth", "plain")

    def run_line(line):
        line = line.removeprefix("python -m pip install -r requirements.txt && ")
        if "train.py" in line:
            line += f" --max-steps {2 if '--resume' in line else 1}"
        if "torchrun" in line or "--out runs/" in line:  # the paper's size takes long on a CPU
            line += " --width 2 --blocks 1"
        if "torchrun" in line:
            line = line.replace("-node 8", "-node 2") + " --device cpu"
            subprocess.run(line, shell=True, cwd=tmp_path, env=ENVIRONMENT, check=True)
        elif line != "python -m pytest":  # the tests that are running
            status, out, err = Program(tmp_path, line.removeprefix("python ")).finish()
            if "--device cuda" in line and not torch.cuda.is_available():
                assert status == 1 and err.startswith("train.py: --device cuda: ")
            else:
                assert status == 0, (line, out, err)

    apart = [line for line in lines if "--out runs/" in line or "torchrun" in line
             or "horse2zebra" in line]
    with ThreadPoolExecutor(2) as pool:  # the others build on each other
        rest = pool.submit(lambda: [run_line(line) for line in lines if line not in apart])
        list(pool.map(run_line, apart))
        rest.result()
    assert cyclegan.load_checkpoint(tmp_path / "runs/apples-oranges/latest.pt")[0].steps == 2
    assert len(list((tmp_path / "translated").rglob("*.png"))) == 2
    from_python = block_with("translate_photo(generator")
    subprocess.run([sys.executable, "-c", from_python], cwd=tmp_path, check=True,
                   env={**ENVIRONMENT, "PYTHONPATH": str(HERE)})
    settings = cyclegan.load_checkpoint(tmp_path / "runs/cityscapes/latest.pt")[0].config
    assert (settings.image_size, settings.load_size, settings.lambda_identity) == (128, 143, 0)


def test_readme_names_what_is_there():
    for path, text in TEXTS.items():
        names = set(re.findall(r"\[`(\w+)`\]\((?:\.\./)?cyclegan\.py\)", text))
        assert all(hasattr(cyclegan, name) or hasattr(CycleGAN, name) for name in names), names
        tests = set(re.findall(r"`(test_\w+)`", text)) - {"test_cyclegan"}
        assert tests <= globals().keys(), tests - globals().keys()
        links = re.findall(r'(?:src="|\]\()([\w./]+)', re.sub("```.*?```", "", text, flags=re.S))
        assert all((path.parent / link).is_file() for link in links if "http" not in link), links


def test_readme_has_the_very_lines_of_the_equations():
    code = (HERE / "cyclegan.py").read_text()
    rows = re.findall(r"^\| (?:Eq\.|Sec\.) .* \| `(.*)` \|$", TEXTS[HERE / "README.md"], re.M)
    assert len(rows) == 7 and all(row in code for row in rows), rows


def test_readme_shows_the_step_as_it_is():
    step = block_with("in_one_batch")
    assert len(step.splitlines()) > 10
    code = " ".join((HERE / "cyclegan.py").read_text().split())
    for part in step.split("\n\n"):
        assert " ".join(part.split()) in code, part


def test_readme_brings_a_folder_to_one_window(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ct").mkdir()
    for name, values in (("a", [[-1000.0, -160.0, 40.0]]), ("b", [[240.0, 3000.0, -159.0]])):
        Image.fromarray(np.array(values, np.float32)).save(f"ct/{name}.tif")
    exec(block_with("windowed"), {})
    pictures = [cyclegan.read_picture(f"windowed/{name}.png")[0, :, 0] for name in "ab"]
    assert np.stack(pictures).tolist() == [[0, 0, 127], [255, 255, 0]]


def test_readme_computes_table_3(tmp_path):
    road, car, void = (128, 64, 128), (0, 0, 142), (0, 0, 0)
    for name, row in (("truth", [road, road, road, car, void]),
                      ("translated", [road, (120, 70, 120), car, car, car])):
        (tmp_path / name).mkdir()
        Image.fromarray(np.array([row], np.uint8)).save(tmp_path / name / "a.png")
    done = subprocess.run([sys.executable, "-c", block_with("class IoU")], cwd=tmp_path,
                          env={**ENVIRONMENT, "PYTHONPATH": str(HERE)}, capture_output=True,
                          text=True)
    numbers = [float(number) for number in re.findall(r"[\d.]{3,}", done.stdout)]
    # By hand, void left out: 3 of 4 pixels; road 2 of 3, car 1 of 1; IoU 2 of 3 and 1 of 2.
    assert np.allclose(numbers, [3 / 4, (2 / 3 + 1) / 2, (2 / 3 + 1 / 2) / 2]), done.stderr


# ==== The benchmark ===============================================================================


def timed(step, rounds, cuda):
    """Milliseconds of a step, the mean of some in a row, between two waits for the device."""
    began = time.perf_counter()
    for _ in range(rounds):
        step()
    if cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began) / rounds


def compare():
    """Says how far our step is from the literal one, over all settings of STEPS."""
    pairs = [differences_from_twin(setting, n) for setting in STEPS.values() for n in (1, 3)]
    losses, weights = map(max, zip(*pairs))
    print(f"{len(pairs)} trainings of four steps in float64, ours and the literal one: losses "
          f"differ by at most {losses:.1e} of their value, weights by {weights:.1e}")


def benchmark(rounds=30):
    """Times our step and the literal one in turns: the paper's size on a GPU, else a small one."""
    cuda = torch.cuda.is_available()
    torch.backends.cudnn.benchmark = True
    device, config = ("cuda", Config()) if cuda else ("cpu", Config(image_size=64, width=32))
    print(f"{config.image_size} x {config.image_size}, width {config.width}, {config.blocks} blocks"
          f", torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'cpu'}")
    for batch_size in (1, 8) if cuda else (1,):
        steps = {"literal": stepping(Twin, config, device, batch_size),
                 "ours": stepping(lambda model: model, config, device, batch_size)}
        taken = {name: [] for name in steps}
        for k in range(rounds + 1):
            for name, step in steps.items():
                ms = timed(step, 10 if cuda else 1, cuda)
                taken[name] += [ms] * (k > 0)  # the first warms up
        for name, times in taken.items():
            ms = statistics.median(times)
            ratios = sorted(a / b for a, b in zip(taken["literal"], times))
            print(f"batch {batch_size}  {name:10} {ms:8.2f} ms/step   "
                  f"literal / {name}: {statistics.median(ratios):.2f}, half of the pairs within "
                  f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}")


def stepping(make, config, device, batch_size):
    """A function that takes a step of what `make` makes of a model."""
    stepper = make(CycleGAN(config, device, "fp32" if make is Twin else "auto"))
    shape = (batch_size, 3, config.image_size, config.image_size)
    x, y = (noise(*shape, seed=s, dtype=torch.float32).to(
        device, memory_format=cyclegan.memory_format(torch.device(device))) for s in (0, 1))
    draws = [cyclegan.buffer_draws(0, 0, x)] if make is Twin else []
    return lambda: stepper.step(x, y, *draws)


if __name__ == "__main__":
    compare()
    benchmark(*map(int, sys.argv[1:]))
