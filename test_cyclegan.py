"""What must stay true of cyclegan.py, train.py and translate.py. The method comes first.

    python -m pytest              all of it, about two minutes on two CPU cores
    python test_cyclegan.py       the three forms of the step: differences, then times
"""

import copy
import functools
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import types
import warnings
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

import cyclegan
import train
import translate
from cyclegan import Config, CycleGAN, Discriminator, FastStep, Generator, ImageBuffer, UserError

if __name__ != "__main__":  # the benchmark takes all
    torch.set_num_threads(1)  # tests take as long on a busy machine as on an idle one
HERE = Path(__file__).resolve().parent
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
PROCESSES.set_forkserver_preload(["test_cyclegan"])  # with torch: a process starts at once
TINY = {"image_size": 32, "load_size": 36, "width": 4, "blocks": 2}


def noise(*shape, seed=0, dtype=torch.float64):
    """Uniform on [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def image(seed=0):
    """One of the size of TINY, as training sees it."""
    return noise(1, 3, 32, 32, seed=seed, dtype=torch.float32)


# ==== The method ==================================================================================

# ---- The literal twin: networks and step as the authors' code has them ---------------------------


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
            [*self.G.parameters(), *self.F.parameters()], betas=betas)
        self.adam_D = torch.optim.Adam(
            [*self.D_X.parameters(), *self.D_Y.parameters()], betas=betas)
        self.pool_X, self.pool_Y = [], []

    def step(self, x, y, lr, uniforms):
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
        shown_x = self.shown(self.pool_X, fake_x.detach(), uniforms[0])
        shown_y = self.shown(self.pool_Y, fake_y.detach(), uniforms[1])
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

    def shown(self, pool, images, uniforms):
        """The authors' ImagePool, with its random numbers given."""
        size, result = self.config.buffer_size, []
        for image, (place, swap) in zip(images, uniforms.tolist(), strict=True):
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


def uniforms(k, n=1, seed=0):
    """What FastStep gives the buffers at step k: (2, n, 2), as its docstring says."""
    return torch.from_numpy(np.random.default_rng([seed, 0, k]).random((2, n, 2), np.float32))


def differences(setting, batch_size):
    """Of Part I from the literal twin, and of FastStep from Part I, over four steps in float64:
    the largest in a loss, relative to it, and in a weight."""
    config = Config(**{**TINY, "buffer_size": 2, **setting})
    model, fast = CycleGAN(config).double(), FastStep(CycleGAN(config).double())
    twin = Twin(model)
    largest = {"Part I": [0.0, 0.0], "FastStep": [0.0, 0.0]}

    def note(name, kind, value):
        largest[name][kind] = max(largest[name][kind], value.item())

    for k in range(4):
        x, y = noise(batch_size, 3, 32, 32, seed=k), noise(batch_size, 3, 32, 32, seed=k + 9)
        given = x, y, 2e-4 * (1 - k / 9)
        literal = twin.step(*given, uniforms(k, batch_size))
        plain, fused = model.step(*given, uniforms(k, batch_size)), fast(*given)
        assert list(plain) == list(fused) == list(literal)
        for name in plain:
            scale = max(abs(plain[name].item()), 1e-3)  # 0 where a weight is
            note("Part I", 0, abs(plain[name] - literal[name]) / scale)
            note("FastStep", 0, abs(plain[name] - fused[name]) / scale)
            assert plain[name].shape == () and not plain[name].requires_grad
    for name in ("G", "F", "D_X", "D_Y"):
        for key, value in getattr(model, name).model.state_dict().items():
            note("Part I", 1, (value - getattr(twin, name).state_dict()[key]).abs().max())
    for key, value in model.state_dict().items():
        if value.numel():
            note("FastStep", 1, (value - fast.model.state_dict()[key]).abs().max())
    return largest


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("setting", STEPS.values(), ids=STEPS.keys())
def test_part_one_is_the_literal_twin_and_fast_step_is_part_one(setting, batch_size):
    for of_losses, of_weights in differences(setting, batch_size).values():
        assert max(of_losses, of_weights) < 1e-12


def test_part_one_stands_alone():
    source = Path(cyclegan.__file__).read_text().partition("# ==== Part II")[0]

    def complete_and_check(config):
        object.__setattr__(config, "load_size", 36)
        object.__setattr__(config, "blocks", 2)

    scope = {"__name__": __name__, "complete_and_check": complete_and_check}
    exec(source, scope)
    model = scope["CycleGAN"](scope["Config"](image_size=32, width=4))
    same = CycleGAN(Config(**TINY))
    for each in (model, same):
        losses = each.step(image(0), image(1), 2e-4, uniforms(0))
    assert losses["gan"] > 0
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_depends_on_its_arguments_and_the_model_alone():
    a = CycleGAN(Config(**TINY)).double()
    b = copy.deepcopy(a)
    x, y = noise(1, 3, 32, 32), noise(1, 3, 32, 32, seed=1)
    for model in (a, b):
        torch.manual_seed(id(model))  # no global random number enters
        for k, lr in enumerate((1e-3, 0.0)):  # the rate is the one given, for both Adams
            before = copy.deepcopy(model.state_dict())
            model.step(x, y, lr, uniforms(k))
            for name, p in model.named_parameters():
                assert torch.equal(p, before[name]) == (lr == 0), name
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_minimise_computes_and_changes_nothing_of_the_other_networks():
    model = CycleGAN(Config(**TINY))
    before = copy.deepcopy(model)
    loss = model.D_Y(model.G(image())).square().mean() + model.D_X(model.F(image())).mean()
    cyclegan.minimise(loss, model.adam_GF, 1e-3)
    for name, moves in (("G", True), ("F", True), ("D_X", False), ("D_Y", False)):
        for p, q in zip(getattr(before, name).parameters(), getattr(model, name).parameters(),
                        strict=True):
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
        if isinstance(layer, nn.InstanceNorm2d):
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


def test_weights_start_from_a_normal_of_2_percent():
    a, b, c = CycleGAN(Config(**TINY)), CycleGAN(Config(**TINY)), CycleGAN(Config(**TINY, seed=1))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.G.model[1].weight, c.G.model[1].weight)
    assert not torch.equal(a.G.model[1].weight, a.F.model[1].weight)
    for network in (Generator(32), Discriminator(32), CycleGAN(Config(width=32)).F):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            elif parameter.numel() > 10_000:  # the standard error of a deviation is 1 / sqrt(2 n)
                assert abs(parameter.std().item() / 0.02 - 1) < 0.03
                assert abs(parameter.mean()) < 1e-3


# ---- Faster layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_is_the_same_in_either_layout_with_statistics_in_float32_at_least(dtype):
    h = (noise(2, 5, 33, 30) * 3 + 20).to(dtype)  # far from 0, where short mantissas cancel
    exact = nn.InstanceNorm2d(5)(h.double())
    # float32 has lost 24 bits less 5 by the subtraction; bf16 can be as exact as its last bit, 2^-7
    # of up to 2. With statistics in bf16 it is wrong by more than 0.03.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for layout in (torch.contiguous_format, torch.channels_last):
        normed = cyclegan.InstanceNorm(5)(h.contiguous(memory_format=layout))
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fast_layers_change_nothing_but_the_time(layout):
    for network in (Generator(4, 2), Discriminator(4)):
        fast = cyclegan.with_fast_layers(copy.deepcopy(network)).double()
        fast.to(memory_format=layout)
        assert fast.state_dict().keys() == network.state_dict().keys()
        kinds = [type(layer) for layer in fast.modules()]
        assert nn.InstanceNorm2d not in kinds and nn.ReflectionPad2d not in kinds
        assert (cyclegan.LastConvolution in kinds) == isinstance(network, Generator)
        results = []
        for each in (network.double(), fast):
            images = noise(2, 3, 40, 32).contiguous(memory_format=layout).requires_grad_()
            result = each(images)
            result.square().sum().backward()
            results.append([result, images.grad, *(p.grad for p in each.parameters())])
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() < 1e-12 * max(1, a.abs().max())  # sums in another order


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
        for network in map(cyclegan.with_fast_layers, (Generator(8, 2), Discriminator(8))):
            for layer in network.modules():
                for name, parameter in layer.named_parameters(recurse=False):
                    on_gpu = torch.empty(parameter.shape, device="cuda")
                    setattr(layer, name, nn.Parameter(on_gpu))
                layer.register_forward_hook(keeps)
            network(images)


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
    with pytest.raises(ValueError, match="LSGAN"):
        loss(per_patch, REAL, "LSGAN")


def test_cycle_and_identity_loss_against_numpy():
    x, y, of_x, of_y = (noise(2, 3, 4, 4, seed=k) for k in range(4))
    forward = np.mean(np.abs(of_x.numpy() - x.numpy()))
    backward = np.mean(np.abs(of_y.numpy() - y.numpy()))
    for loss in (cyclegan.cycle_loss, cyclegan.identity_loss):
        assert abs(loss(x, y, of_x, of_y, 7.0, 3.0) - (7 * forward + 3 * backward)) < 1e-12


def test_discriminator_loss_against_numpy():
    real, fake = noise(2, 1, 4, 4) * 3, noise(2, 1, 4, 4, seed=1) * 3
    r, f = real.numpy(), fake.numpy()
    squares = (np.mean((r - 1) ** 2) + np.mean(f ** 2)) / 2
    logs = (np.mean(np.log(1 + np.exp(-r))) + np.mean(np.log(1 + np.exp(f)))) / 2
    assert abs(cyclegan.discriminator_loss(real, fake) - squares) < 1e-12
    assert abs(cyclegan.discriminator_loss(real, fake, "log") - logs) < 1e-12


# ---- The image buffer and the schedule -----------------------------------------------------------


@pytest.mark.parametrize("kind", [ImageBuffer, cyclegan.CapturableBuffer])
def test_buffer_by_hand(kind):
    buffer = kind(2, 2)

    def query(values, draws):
        images = torch.tensor(values, dtype=torch.float32)[:, None, None, None].repeat(1, 3, 2, 2)
        out = buffer.query(images, torch.tensor(draws)).clone()
        assert out.shape == images.shape
        images.fill_(-1)  # what is stored is a copy
        return out[:, 0, 0, 0].tolist(), buffer.images[:, 0, 0, 0].tolist()

    keep = [0.9, 0.1]  # (place, coin): ignored while the buffer fills
    assert query([1.0], [keep]) == ([1], [1, 0])
    assert query([2.0], [keep]) == ([2], [1, 2])
    assert query([3.0], [[0.6, 0.5]]) == ([3], [1, 2])  # a coin from 1/2 on: itself
    assert query([4.0], [[0.6, 0.49]]) == ([2], [1, 4])  # else the old one at 0.6 * 2
    assert query([5.0, 6.0], [[0.0, 0.0], [0.0, 0.0]]) == ([1, 5], [6, 4])  # one after another
    assert query([7.0], [[1 - 2**-24, 0.0]]) == ([4], [6, 7])  # the largest float32 below 1
    assert buffer.count == 2
    images = noise(3, 3, 2, 2)
    assert torch.equal(kind(0, 2).query(images, torch.zeros(3, 2)), images)


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
    config = Config(image_size=np.int64(64), lr=np.float32(0.5), width=np.int32(8))
    assert [type(v) for v in (config.image_size, config.lr, config.width)] == [int, float, int]


def test_fast_step_refuses_what_it_cannot_take_in_words():
    fast, good = FastStep(CycleGAN(Config(**TINY))), torch.zeros(2, 3, 32, 32)
    for x, y in ((good, good[:1]), (good[:, :, :28], good[:, :, :28]), (good[0], good[0]),
                 (good[:, :1], good[:, :1]), (good[:0], good[:0]), (good.numpy(), good.numpy())):
        with pytest.raises(ValueError, match=r"must be tensors \(N, 3, 32, 32\)"):
            fast(x, y, 2e-4)
    for wrong in (good + 255, good * math.nan):
        with pytest.raises(ValueError, match="must lie in"):
            fast(good, wrong, 2e-4)
    assert fast.steps == 0


def test_devices_and_precisions_are_refused_by_name(tmp_path):
    fast = FastStep(CycleGAN(Config(**TINY)))
    cyclegan.save_checkpoint(tmp_path / "latest.pt", fast, {})
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    for device, precision, name in ((missing, "auto", missing), ("gpu", "auto", "gpu"),
                                    ("cpu", "fp16", "fp16")):
        for make in (lambda *given: FastStep(CycleGAN(Config(**TINY)), *given),
                     lambda *given: cyclegan.load_checkpoint(tmp_path, *given)):
            with pytest.raises(UserError, match=name) as raised:
                make(device, precision)
            assert "latest.pt" not in str(raised.value)
    with pytest.raises(UserError, match=missing):
        cyclegan.load_generator(tmp_path, device=missing)
    assert cyclegan.load_generator(str(tmp_path), device="auto").steps == 0


class Small(nn.Module):
    """A user's own network."""

    def __init__(self, out):
        super().__init__()
        self.layer = nn.Conv2d(3, out, 3, padding=1)

    def forward(self, images):
        return self.layer(images)


def test_networks_of_ones_own_train_and_are_saved(tmp_path):
    same = nn.Sequential()  # which is False, as it is empty
    assert CycleGAN(Config(**TINY), G=same).G is same
    mine = {"G": Small(3), "D_X": Small(1)}
    mine["G"].layer.bias.requires_grad_(False)
    before = copy.deepcopy(mine)
    plain = CycleGAN(Config(**TINY), **copy.deepcopy(mine))
    fast = FastStep(CycleGAN(Config(**TINY), **mine))
    plain.step(image(0), image(1), 1e-3, uniforms(0))
    fast(image(0), image(1), 1e-3)
    for name, network in mine.items():  # the first step of Adam is of the rate, whatever the slope
        for of in (network, getattr(plain, name)):
            step = of.layer.weight - before[name].layer.weight
            assert torch.allclose(step.abs(), torch.full_like(step, 1e-3), rtol=1e-2)
    assert torch.equal(mine["G"].layer.bias, before["G"].layer.bias)  # frozen by its owner
    cyclegan.save_checkpoint(tmp_path / "mine.pt", fast, {})
    again = {"G": Small(3), "D_X": Small(1)}
    again["G"].layer.bias.requires_grad_(False)
    loaded, _ = cyclegan.load_checkpoint(tmp_path / "mine.pt", **again)
    assert all(torch.equal(a, b) for a, b in zip(state_of(fast), state_of(loaded), strict=True))
    with pytest.raises(UserError, match="mine.pt .*other networks: D_X.layer.bias"):
        cyclegan.load_checkpoint(tmp_path / "mine.pt")
    with pytest.raises(UserError, match="mine.pt"):
        cyclegan.load_generator(tmp_path / "mine.pt")


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


def test_exported_generators_are_exact_at_sizes_that_were_not_traced():
    generator = cyclegan.with_fast_layers(Generator(4, 2)).eval().requires_grad_(False)
    height, width = (4 * torch.export.Dim(name, min=4, max=64) for name in ("h", "w"))
    exported = torch.export.export(generator, (noise(1, 3, 32, 40, dtype=torch.float32),),
                                   dynamic_shapes=({2: height, 3: width},)).module()
    for height, width in ((64, 48), (100, 16)):
        images = noise(1, 3, height, width, dtype=torch.float32)
        assert torch.equal(exported(images), generator(images))


# ---- The step on a GPU, seen without one ---------------------------------------------------------


@pytest.mark.parametrize("setting", STEPS.values(), ids=STEPS.keys())
def test_step_waits_for_no_device(setting):
    # Under fake tensors whatever asks for a value (.item(), a Python branch, a mask) raises.
    fast = FastStep(CycleGAN(Config(**{**TINY, **setting})))
    x = noise(2, 3, 32, 32, dtype=torch.float32)
    for k in range(2):
        fast.run(x, x, 2e-4, uniforms(k, 2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        losses = fast.run(x, x, 2e-4, uniforms(2, 2))
        with pytest.raises(DataDependentOutputException):
            bool(losses["gan"] > 0)  # the control
        with pytest.raises(DataDependentOutputException):
            ImageBuffer(2, 32).query(x, uniforms(0, 2)[0])  # Part I's would wait


def test_step_is_the_same_with_its_networks_compiled():
    # One graph without a break for each kind of network and size of batch: 1, 2 and 3, and 1 and 2.
    graphs = CompileCounterWithBackend("aot_eager")
    plain, model = FastStep(CycleGAN(Config(**TINY)).double()), CycleGAN(Config(**TINY)).double()
    cyclegan.with_fast_layers(model)
    fused = cyclegan.Fused(model, [
        torch.compile(n, backend=graphs, fullgraph=True, dynamic=False)
        for n in (model.G, model.F, model.D_X, model.D_Y)])
    for k in range(3):
        x, y = noise(1, 3, 32, 32, seed=k), noise(1, 3, 32, 32, seed=k + 9)
        one, two = plain(x, y, 2e-4), fused.step(x, y, 2e-4, uniforms(k))
        assert all(abs(one[name] - two[name]) < 1e-12 for name in one)
    assert graphs.frame_count == 5
    for p, q in zip(plain.model.parameters(), model.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12


def test_a_compiler_that_fails_is_told():
    if torch.cuda.is_available():
        pytest.skip("here it works")
    with pytest.warns(UserWarning, match="torch.compile fails, so steps are slower: [A-Z]"):
        assert not cyclegan.can_compile()


def test_bf16_leaves_weights_losses_and_images_in_float32():
    assert FastStep(CycleGAN(Config(**TINY))).precision == "fp32"  # on a CPU, unless told
    fast, x = FastStep(CycleGAN(Config(**TINY)), precision="bf16"), image()
    losses = fast(x, x, 2e-4)
    tensors = (*losses.values(), *fast.model.parameters(), fast.model.buffer_X.images)
    assert {v.dtype for v in tensors} == {torch.float32}
    exact = FastStep(CycleGAN(Config(**TINY)))(x, x, 2e-4)
    for name in ("gan", "cycle"):  # bf16 has 8 bits: some percent after 12 layers
        assert 0 < abs(losses[name] / exact[name] - 1) < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnCUDA:
    """In float64, where rounding is out of the way: orders of sums alone differ, by 1e-12 or so."""

    def fast(self, precision="fp32", eager=False, **networks):
        torch.compiler.reset()  # each test compiles anew, within the limits of recompilation
        model = CycleGAN(Config(**TINY, buffer_size=2), **networks)
        return FastStep(model.double(), "cuda", precision, eager)

    def images(self, k, n=1):
        return [noise(n, 3, 32, 32, seed=seed).to("cuda", memory_format=torch.channels_last)
                for seed in (k, k + 99)]

    def assert_close(self, one, two):
        for a, b in zip(state_of(one), state_of(two), strict=True):
            assert a.shape == b.shape and (not a.numel() or (a - b).abs().max() < 1e-9)

    def test_captured_steps_are_those_of_the_literal_twin(self):
        fast = self.fast()
        twin = Twin(fast.model)
        for k in range(20):
            x, y = self.images(k)
            lr = 2.0 ** (-12 - k // 10)  # exact in float32; another reaches what is captured
            expected = twin.step(x, y, lr, uniforms(k))
            losses = fast(x, y, lr)
            assert all(abs(losses[name] - expected[name]) < 1e-9 for name in expected)
        assert fast.run.graph is not None  # nothing fell back
        for name in ("G", "F", "D_X", "D_Y"):
            for key, value in getattr(fast.model, name).model.state_dict().items():
                assert (value - getattr(twin, name).state_dict()[key]).abs().max() < 1e-9

    def test_another_size_of_batch_is_captured_anew(self):
        fast, eager = self.fast(), self.fast(eager=True)
        for n in 6 * [1] + 6 * [2] + 6 * [1]:
            for each in (fast, eager):
                each(*self.images(each.steps, n), 2**-12)
        self.assert_close(fast, eager)

    def test_what_cannot_be_captured_goes_on_with_a_warning(self):
        class Waits(nn.Conv2d):
            def forward(self, h):
                return super().forward(h) + 0 * h.sum().item()

        G = Waits(3, 3, 3, padding=1)
        fast, eager = self.fast(G=copy.deepcopy(G)), self.fast(eager=True, G=G)
        with pytest.warns(UserWarning, match="CUDA cannot capture the step"):
            for k in range(6):
                for each in (fast, eager):
                    each(*self.images(k), 2**-12)
        self.assert_close(fast, eager)

    def test_eager_neither_compiles_nor_captures(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", None)  # not to be called
        monkeypatch.setattr(cyclegan, "CudaGraph", None)
        self.fast(eager=True)(*self.images(0), 2**-12)

    def test_captured_draws_differ_and_memory_stays(self):
        fast, stored = self.fast(), set()
        for k in range(40):
            fast(*self.images(0), 2**-12)
            stored.add(tuple(fast.model.buffer_X.images.flatten(1).sum(1).tolist()))
            if k == 10:
                memory = torch.cuda.memory_allocated()
        assert 10 < len(stored) < 40 and torch.cuda.memory_allocated() == memory


# ---- Several processes ---------------------------------------------------------------------------


def train_in_process(rank, world_size, port, folder):
    """Takes three steps in float64 with each size of buffer, and writes the weights after each."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank),
                          WORLD_SIZE=str(world_size))
        torch.distributed.init_process_group("gloo")
    for size in (0, 2):
        G = Generator(4, 2, torch.Generator().manual_seed(rank))  # rank 0's is taken
        fast = FastStep(CycleGAN(Config(**TINY, buffer_size=size), G=G).double())
        for k in range(3):
            images = noise(2, 2, 3, 32, 32, seed=k)  # x and y; of each, one for each process
            x, y = images if world_size == 1 else images[:, rank:rank + 1]
            step, given = fast.run, []
            fast.run = lambda *args, step=step, given=given: (given.extend(args), step(*args))[1]
            fast(x, y, 2e-4)
            fast.run = step
            assert torch.equal(given[3], uniforms(k, 2).chunk(world_size, 1)[rank])
            weights = torch.cat([p.detach().flatten() for p in fast.model.parameters()])
            np.save(folder / f"{world_size}_{rank}_{size}_{k}.npy", weights.numpy())


def test_two_processes_take_the_step_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [PROCESSES.Process(target=train_in_process, args=(*place, port, tmp_path))
               for place in ((0, 2), (1, 2), (0, 1))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    for size in (0, 2):
        for k in range(3):
            first, second, alone = (np.load(tmp_path / f"{place}_{size}_{k}.npy")
                                    for place in ("2_0", "2_1", "1_0"))
            assert np.array_equal(first, second)  # after every step
            if size == 0:  # else each process has a buffer of its own
                assert np.abs(first - alone).max() < 1e-12


def test_gradients_are_averaged_in_any_layout(monkeypatch):
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(2, 3, 2, 2)), nn.Parameter(torch.zeros(2)),
                             nn.Parameter(torch.zeros(1))])
    one, two, _ = adam.param_groups[0]["params"]  # the third has no gradient
    one.grad = noise(2, 3, 2, 2, dtype=torch.float32).to(memory_format=torch.channels_last)
    two.grad = noise(2, seed=1, dtype=torch.float32)
    expected = [one.grad * 3 / 2, two.grad * 3 / 2]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.mul_(3))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    cyclegan.average_gradients(adam)
    assert torch.equal(one.grad, expected[0]) and torch.equal(two.grad, expected[1])


# ==== Files =======================================================================================


def state_of(fast):
    """Everything that training changes."""
    adams = [value for adam in (fast.model.adam_GF, fast.model.adam_D)
             for moments in adam.state.values() for value in moments.values()]
    return [*fast.model.state_dict().values(), *adams, torch.tensor(fast.steps)]


def test_checkpoint_restores_everything_bit_for_bit(tmp_path):
    one = FastStep(CycleGAN(Config(**TINY, buffer_size=2)))
    for _ in range(3):
        one(image(0), image(1), 1e-3)
    cyclegan.save_checkpoint(str(tmp_path / "latest.pt"), one, {"epoch": 3})
    two, place = cyclegan.load_checkpoint(tmp_path)  # a folder will do
    assert place == {"epoch": 3} and two.model.config == one.model.config
    for rate in (1e-3, 1e-4):
        assert all(torch.equal(a, b) for a, b in zip(state_of(one), state_of(two), strict=True))
        for each in (one, two):
            each(image(2), image(1), rate)
    assert [path.name for path in tmp_path.iterdir()] == ["latest.pt"]


PLACE = {"epoch": 0, "done": 0, "demo": False, "data": ["a", "b"], "save_every": 50,
         "save_minutes": 10.0, "sample_every": 1}


def test_checkpoints_of_earlier_programs_load(tmp_path):
    # Typed from what commits 87842f7 and feae3e1 wrote; the first had no flip and no squash.
    one = FastStep(CycleGAN(Config(**TINY)))
    one(image(0), image(1), 2e-4)
    config = {"image_size": 32, "load_size": 36, "blocks": 2, "width": 4, "objective": "lsgan",
              "lambda_gan": 1.0, "lambda_forward": 10.0, "lambda_backward": 10.0,
              "lambda_identity": 0.5, "buffer_size": 50, "batch_size": 1, "lr": 0.0002,
              "beta1": 0.5, "epochs": 100, "decay_epochs": 100, "seed": 0}
    adams = [adam.state_dict()["state"] for adam in (one.model.adam_GF, one.model.adam_D)]
    for later, squash in (({}, True), ({"flip": True, "squash": False}, False)):
        torch.save({"config": {**config, **later}, "precision": "bf16", "steps": 1, "place": PLACE,
                    "model": one.model.state_dict(), "adams": adams}, tmp_path / "latest.pt")
        two, place = cyclegan.load_checkpoint(tmp_path)
        assert two.model.config.squash == squash and two.precision == "fp32" and place == PLACE
        assert all(torch.equal(a, b) for a, b in zip(state_of(one), state_of(two), strict=True))
        generator = cyclegan.load_generator(tmp_path, "BtoA")
        assert (generator.config.squash, generator.steps, generator.place) == (squash, 1, PLACE)
        assert torch.equal(generator.model[1].weight, one.model.F.model[1].weight)


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
        "one way": ("latest_net_G", "latest_net_G", "latest_net_G")}
    for folder, (names, *wanted) in cases.items():
        twins = {name: authors_file(tmp_path / folder / f"{name}.pth", "plain", 3, 6, seed)
                 for seed, name in enumerate(names.split())}
        for direction, name in zip(("AtoB", "BtoA"), wanted, strict=True):
            loaded = cyclegan.load_generator(tmp_path / folder, direction)
            assert torch.equal(loaded.model[1].weight, twins[name][1].weight)
    with pytest.raises(UserError, match="neither latest.pt nor latest_net_G_A.pth"):
        cyclegan.load_generator(tmp_path)


def test_foreign_generators_are_refused_by_name(tmp_path):
    weights = Generator(4, 9).state_dict()
    for name, change, reason in (
            ("antialiased.pth", {"model.5.filt": torch.zeros(1)}, "model.5.filt"),
            ("unet.pth", {"model.model.0.weight": torch.zeros(1)}, "model.model.0.weight"),
            ("batchnorm.pth", {"model.2.weight": torch.zeros(4)}, "model.2.weight"),
            ("grey.pth", {"model.1.weight": torch.zeros(4, 1, 7, 7)}, "RGB"),
            ("nothing.pth", {"model.1.weight": None}, "expected is a run's checkpoint")):
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
    cyclegan.save_checkpoint("whole", FastStep(CycleGAN(Config(**TINY))), {})
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
    monkeypatch.setattr(cyclegan, "with_fast_layers", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # which is not the file's fault
        cyclegan.load_checkpoint("whole")
    monkeypatch.setattr(cyclegan, "CycleGAN", lambda _: torch.empty(10**15))
    with pytest.raises(RuntimeError, match="allocate memory"):  # nor is this
        cyclegan.load_checkpoint("whole")


@pytest.mark.parametrize("keys, value", [
    (["steps"], "x"), (["steps"], math.inf), (["adams"], [{}, {}]), (["config", "lr"], -1.0),
    # The fused Adam would write past the end of moments of another shape.
    (["adams", 1, 0, "exp_avg"], torch.zeros(3)), (["adams", 1, 0, "exp_avg_sq"], torch.zeros(1)),
    (["adams", 1, 0, "exp_avg"], None)], ids=str)
def test_impossible_values_in_a_checkpoint_are_refused(keys, value, tmp_path):
    fast = FastStep(CycleGAN(Config(**TINY)))
    fast(image(), image(), 2e-4)
    cyclegan.save_checkpoint(tmp_path / "latest.pt", fast, PLACE)
    saved = inside = torch.load(tmp_path / "latest.pt")
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    torch.save(saved, tmp_path / "latest.pt")
    with pytest.raises(UserError, match="latest.pt is not a checkpoint"):
        cyclegan.load_checkpoint(tmp_path / "latest.pt")


def test_what_cannot_take_its_place_stays_whole_beside_it(tmp_path, monkeypatch):
    def fails(*_):
        raise PermissionError(13, "held")

    path, part = tmp_path / "a", tmp_path / "a.part"
    path.write_bytes(b"old")
    part.write_bytes(b"of a killed program")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        patch.setattr(cyclegan.time, "sleep", lambda _: None)
        with pytest.raises(UserError, match="cannot replace .*held; .* is whole, as .*a.part"):
            cyclegan.write_file(path, b"new")
    assert (path.read_bytes(), part.read_bytes()) == (b"old", b"new")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(UserError, match="cannot write .*held"):
            cyclegan.write_file(path, b"newer")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"


# ==== Pictures ====================================================================================


def pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def photograph(width=190, height=253):
    """Smooth, with some texture."""
    smooth = np.asarray(Image.fromarray(pixels(9, 7)).resize((190, 253), Image.BICUBIC)).astype(int)
    picture = Image.fromarray((smooth + pixels(253, 190) // 6 - 21).clip(0, 255).astype(np.uint8))
    return np.asarray(picture.resize((width, height), Image.BICUBIC))


def png_of_16_bits(values):
    """The bytes of a PNG of (H, W, 3) uint16, which Pillow does not write."""
    def chunk(data):
        return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + header) + chunk(b"IDAT" + zlib.compress(rows))
            + chunk(b"IEND"))


def test_few_levels_of_16_bits_are_told_and_what_needs_a_window_is_refused(tmp_path):
    for largest, dark in ((65535, False), (4095, True), (3000, True)):  # 4095: of 12-bit CT
        values = np.linspace(0, largest, 30).astype(np.uint16).reshape(5, 6)
        colours = np.stack([values, values // 2, values // 4], -1)
        (tmp_path / "rgb.png").write_bytes(png_of_16_bits(colours))
        Image.fromarray(values).save(tmp_path / "grey.png")
        Image.fromarray(values).save(tmp_path / "grey.tif")
        for path in sorted(tmp_path.iterdir()):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                picture = cyclegan.read_picture(path)
            expected = colours if path.stem == "rgb" else values[..., None]
            assert np.abs(picture - expected / 257).max() <= 1, path
            said = [f"{path}: its 16-bit values are below" in str(w.message) for w in told]
            assert said == [True] * dark, (path, largest)
    for values in (np.array([[-1000.0, 400.0]], np.float32), np.array([[0.5]], np.float32),
                   np.array([[-1, 9]], np.int32), np.array([[70000]], np.int32)):
        Image.fromarray(values).save(tmp_path / "deep.tif")
        with pytest.raises(UserError, match="deep.tif: it has 32 bits a pixel.*bring it to 8 bit"):
            cyclegan.read_picture(tmp_path / "deep.tif")


def test_pictures_that_are_not_to_be_decoded_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"  # Pillow would hand it to Ghostscript
    for name, size in (("b", (501, 5)), ("c", (61, 60)), ("d", (5, 500))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1829)  # of c Pillow refuses twice as many
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    assert cyclegan.read_picture(tmp_path / "d.png", 24).shape == (2400, 24, 3)
    for name, reason in (("a", "EPS"), ("b", "it is more than a hundred times as long as wide"),
                         ("c", "it has more pixels than Pillow reads; reduce it, or cut it")):
        with pytest.raises(UserError, match=f"{name}.png: .*{reason}"):
            cyclegan.read_picture(tmp_path / f"{name}.png", 24)


def test_large_jpegs_are_reduced_while_they_are_decoded_without_moving(tmp_path, monkeypatch):
    decoded, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *rest: (
        decoded.append(image.size) or resize(image, *rest)))
    for (width, height), side, size in (
            ((800, 640), 40, (100, 80)), ((800, 640), 41, (200, 160)),  # to twice the side, or more
            ((804, 640), 40, (201, 160)), ((802, 640), 40, (401, 320)),  # 8 and 4 do not divide it
            ((801, 640), 40, (801, 640)), ((800, 640), 321, (800, 640))):
        Image.fromarray(photograph(width, height)).save(tmp_path / "a.jpg", quality=95)
        with Image.open(tmp_path / "a.jpg") as image:
            whole = np.asarray(resize(image, (round(width * side / height), side), Image.BICUBIC))
        decoded.clear()
        read = cyclegan.read_picture(tmp_path / "a.jpg", side)
        assert decoded == [size], (width, side)
        # A JPEG's own reduction is a box, a little blunter than that of Pillow.
        assert np.abs(read - whole.astype(int)).max() <= 6, (width, side)


def test_pictures_are_found_through_links_and_what_is_ignored_is_counted(tmp_path):
    folder = tmp_path / "in"
    for name in ("../elsewhere/b.JPEG", "a.png", "x.txt", "more/y.TXT", "z", ".hidden.png",
                 ".git/c.png", "run/latest.pt", "run/samples/d.png", "out/.translated", "out/e.png",
                 "out/more/f.png", "g.HEIC", *(f"more/{k}.cr2" for k in range(1000))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "more" / "up").symlink_to(folder)  # without an end
    with pytest.warns(UserWarning) as told:
        assert cyclegan.find_pictures(folder) == [folder / "a.png", folder / "link" / "b.JPEG"]
    [said] = {str(warning.message) for warning in told}
    assert f"{folder}: 1,000 .cr2, 2 " in said and "2 .txt" in said and "1 without a suffix" in said
    assert "2 folder(s) of results" in said and "hidden" not in said
    if not any("heic" in name for name in cyclegan.SUFFIXES.split()):
        assert "1 .heic" in said and "(HEIC is read after: pip install pillow-heif)" in said
    # A folder of results itself is what was asked for.
    assert [path.name for path in cyclegan.find_pictures(folder / "out")] == ["e.png", "f.png"]


def stored(folder, pictures, config):
    """Pictures in files that lose nothing, as training reads them. None: a broken file."""
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
    A, B = (stored(tmp_path / name, pictures, config) for name in "AB")
    assert reads == [0, 0]  # to see that there is one
    next(train.batches(config, A, B, 0, 0))
    # The first batch, AHEAD others, whose reading has begun, and unreadable ones on the way.
    assert len(reads) <= 2 * (1 + 1 + train.AHEAD + 2)
    capsys.readouterr()
    monkeypatch.setattr(train, "MEMORY", 2 * 3 * pictures[2].nbytes)
    A = train.Pictures(tmp_path / "A", config)  # has room for its first three
    for _ in range(2):
        reads.clear()
        assert all((A.whole(k) == expected[k]).all() for k in range(40))
    assert reads == [5, 5, *range(5, 39)]  # the broken ones never again
    said = capsys.readouterr().out
    assert [said.count(f"skipped: cannot read {path}:") for path in A.paths].count(1) == 3
    assert said.count("skipped: ") == 3

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", out_of_memory)
    with pytest.raises(MemoryError):
        next(train.batches(config, A, B, 1, 0))
    assert set(A.unreadable) == {3, 4, 39}


def crop_of(crop, pictures):
    """(number, top, left, mirrored) of a crop of pictures whose pixels say where they are."""
    mirrored = bool(crop[0, 0, 1] > crop[0, -1, 1])
    plain = crop[:, ::-1] if mirrored else crop
    top, left, number = map(int, plain[0, 0])
    assert (plain == pictures[number][top:top + 24, left:left + 24]).all()
    return number, top, left, mirrored


def test_batches_show_every_picture_anywhere_as_a_function_of_the_place_alone(
        tmp_path, monkeypatch):
    config = Config(image_size=24, load_size=30, batch_size=2, seed=3)
    some = [np.stack([*np.mgrid[:height, :width], np.full((height, width), k)], -1).astype(np.uint8)
            for k, (height, width) in enumerate(
                [(30, 200), (50, 30), (30, 30), (30, 40), (40, 30), (30, 31), (31, 30)])]
    A, B = stored(tmp_path / "A", some, config), stored(tmp_path / "B", some[:4], config)
    orders, partners, crops = [], [], []
    for epoch in range(60):
        batches = list(train.batches(config, A, B, epoch, 0))
        assert len(batches) == 4 and all(len(x) == len(y) == 2 for x, y in batches)
        xs = [crop_of(crop, some) for x, _ in batches for crop in x]
        orders.append([number for number, *_ in xs])
        partners.append([crop_of(crop, some)[0] for _, y in batches for crop in y])
        crops += xs
        assert sorted(orders[-1][:7]) == list(range(7)) and orders[-1][7] == orders[-1][0]
    assert len(set(map(tuple, orders))) > 55 and len(set(map(tuple, partners))) > 55
    assert np.bincount(np.ravel(partners)).min() > 80  # 120 on average, 9.5 the deviation
    tops, lefts = ([{crop[axis] for crop in crops if crop[0] == k} for k in range(2)]
                   for axis in (1, 2))
    assert tops[0] == set(range(7)) == lefts[1] and len(lefts[0]) > 40  # of 177
    assert min(lefts[0]) < 20 and max(lefts[0]) > 156 and min(tops[1]) < 4 and max(tops[1]) > 22
    assert 0.4 < np.mean([mirrored for *_, mirrored in crops]) < 0.6  # of 480
    fixed = stored(tmp_path / "C", some, replace(config, flip=False))
    x, _ = next(train.batches(replace(config, batch_size=60), fixed, B, 0, 0))
    assert not any(crop_of(crop, some)[3] for crop in x)
    x, _ = zip(*train.batches(config, B, A, 0, 0), strict=True)  # the smaller comes round again
    assert sorted(np.bincount([crop_of(crop, some)[0] for crop in np.concatenate(x)[:7]])) == [
        1, 2, 2, 2]
    rest = list(train.batches(config, A, B, 59, 4))
    assert [[part.tolist() for part in batch] for batch in rest] == [
        [part.tolist() for part in batch] for batch in batches[2:]]
    other = next(train.batches(replace(config, seed=4), A, B, 59, 4))
    assert (other[0] != rest[0][0]).any()
    monkeypatch.setattr(train, "WORLD", 2)  # two processes share a batch of twice the size
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        shares.append(next(train.batches(replace(config, batch_size=1), A, B, 59, 4)))
    for *parts, whole in zip(*shares, rest[0], strict=True):
        assert (np.concatenate(parts) == whole).all()


def test_pictures_of_every_mode(tmp_path):
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
        ("cmyk.tif", rgb.convert("CMYK"), {}, colours),
        ("animated.gif", Image.fromarray(ramp), {"save_all": True, "append_images": [rgb]}, grey)]
    for name, image, options, expected in cases:
        image.save(tmp_path / name, **options)
        picture = cyclegan.read_picture(str(tmp_path / name))
        assert picture.dtype == np.uint8 and picture.shape == expected.shape, name
        assert np.abs(picture - expected.astype(float)).max() <= 1, name
    assert cyclegan.read_picture(tmp_path / "rgb.png", 10).shape == (10, 12, 3)
    assert cyclegan.read_picture(tmp_path / "rgb.png", 10, squash=True).shape == (10, 10, 3)


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
    for config, (width, height), size, expected in (  # what the network sees: height and width
            (ours, (400, 300), None, (288, 384)), (ours, (30, 40), None, (384, 288)),
            (None, (400, 300), None, (256, 344)), (ours, (400, 300), 100, (100, 136)),
            (ours, (400, 300), "full", (300, 400)), (squashed, (400, 300), None, (288, 288)),
            (squashed, (400, 300), 100, (100, 100)), (ours, (7, 700), None, (10240, 104))):
        network = Recolours(config)  # 286 x 381 grow to multiples of 4
        picture = np.full((height, width, 3), 99, np.uint8)
        assert (translate.translate_photo(network, picture, size) == picture).all()
        assert network.saw == [expected]
    picture = np.zeros((9, 9, 3), np.uint8)[:, ::-1]
    for wrong in (picture / 255, picture[0], picture[..., :1]):
        with pytest.raises(ValueError, match="picture must be .H, W, 3. uint8, .*not "):
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
    larger = np.asarray(Image.fromarray(picture).resize((285, 380), Image.BICUBIC))
    result = Image.fromarray(cyclegan.translate(generator, larger))
    expected = np.asarray(result.resize((190, 253), Image.BICUBIC))
    assert (translate.translate_photo(generator, picture) == expected).all()


def test_a_change_of_colours_is_carried_back_exactly():
    picture = photograph(700, 935)
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


def test_stripes_that_the_network_paints_are_carried_back_and_its_noise_is_not():
    for period, most in ((6, 8), (12, 4.5), (20, 3.5)):  # pixels of the small picture; grey levels
        truth = disc(512, period / 64).astype(int)
        result = translate.carry_back(disc(512), disc(64), disc(64, period / 64))
        assert np.abs(disc(512) - truth).mean() > 20 and np.abs(result - truth).mean() < most
    picture = photograph(760, 1012)
    small = np.asarray(Image.fromarray(picture).resize((95, 127), Image.BICUBIC))
    board = 12 * (2 * (np.indices(small.shape[:2]).sum(0) % 2) - 1)[..., None]
    noisy = np.clip(255 - small.astype(int) + board, 0, 255).astype(np.uint8)
    assert np.abs(noisy - (255 - small.astype(int))).mean() > 10  # what enlarging would keep
    error = translate.carry_back(picture, small, noisy) - (255 - picture.astype(int))
    assert np.abs(error).mean() < 1


def test_a_carried_back_picture_has_no_seams_and_any_size():
    picture, small = photograph(300, 600), photograph(50, 100)
    whole = translate.carry_back(picture, small, pixels(100, 50), strip=600)
    assert (translate.carry_back(picture, small, pixels(100, 50), strip=7) == whole).all()
    for height, width in ((1, 1), (2, 5), (300, 1)):
        picture = pixels(height, width)
        small = picture[:max(1, height // 2), :max(1, width // 2)]
        assert translate.carry_back(picture, small, 255 - small).shape == picture.shape


def test_bytes_survive_the_way_to_a_tensor_and_back():
    picture = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    assert cyclegan.to_tensor(picture).min() == -1 and cyclegan.to_tensor(picture).max() == 1
    assert (cyclegan.to_pictures(cyclegan.to_tensor(picture)) == picture).all()
    over_half = torch.full((1, 3, 1, 1), 0.5 / 127.5 - 1 + 1e-4)
    assert cyclegan.to_pictures(over_half).max() == 1  # rounds, not cuts
    for height, width in ((1, 1), (1, 50), (5, 7), (64, 64), (33, 70)):
        picture = np.stack([pixels(height, width), pixels(height, width, 1)])
        assert (cyclegan.translate(Recolours(), picture) == picture).all()


def test_the_plot_of_losses_shows_them():
    losses = {"gan": 2.0, "identity": 1.0, "D_X": 0.5, "D_Y": 0.25}
    plot = train.plot_losses([{"epoch": k, "step": k, "rate": 2e-4, "cycle": 4 - k / 100, **losses}
                              for k in range(1, 401)])
    red = (plot[..., 0] > 150) & (plot[..., 1] < 80)
    panels = red.reshape(5, 110, 720)[:, 14:]  # below its title
    (start, middle, end), constant = [[panel[:, column].nonzero()[0].mean()
                                       for column in (20, 360, 700)] for panel in panels[:2]]
    assert start < 8 and abs(middle - (start + end) / 2) < 3 and end > 84  # straight, from 4 to 0
    assert np.ptp(constant) < 1


def test_a_folder_of_odd_shapes_trains_and_translates(user):
    sizes = [(64, 1800), (533, 8), (1, 1), (30, 41), (8, 801)]  # width, height
    (user / "odd").mkdir()
    for width, height in sizes:
        Image.fromarray(pixels(height, width)).save(user / "odd" / f"{width}x{height}.png")
    Image.new("1", (20000, 9000)).save(user / "odd" / "huge.png")
    (user / "odd" / "loop.png").symlink_to("loop.png")
    shutil.copytree(user / "trained", user / "odd" / "a run")
    trained = ok(user, f"train.py --dataA odd --dataB oranges {SMALL} --max-steps 7 --out odd-run")
    status, out, err = run(user, "translate.py odd --checkpoint odd-run --out odd-out")
    assert status == 1 and "A: 7 pictures" in trained and "4 translated into odd-out, 3 sk" in out
    for reason in ("8x801.png: it is more than a hundred times as long as wide",
                   "huge.png: it has more pixels than Pillow reads", "loop.png: Too many levels",
                   "odd: 1 folder(s) of results; these are read: .avif"):
        assert trained.count(reason) == 1 == err.count(reason)
    for width, height in sizes[:-1]:
        with Image.open(user / "odd-out" / f"{width}x{height}.png") as image:
            assert image.size == (width, height)


# ==== The programs, run for real ==================================================================

SMALL = "--image-size 24 --load-size 28 --width 2 --blocks 1"
NEW = f"train.py --dataA apples --dataB oranges {SMALL} --buffer-size 3"
FOUR = "--epochs 2 --decay-epochs 2 --batch-size 2 --save-every 2"  # of 3 steps for 6 pictures
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
    make_step = cyclegan.FastStep.__call__
    def watched(self, *batch):
        if self.steps == step:
            do()
        return make_step(self, *batch)
    cyclegan.FastStep.__call__ = watched

exec(first)
program, *sys.argv[1:] = shlex.split(line)
sys.argv[0] = os.path.join(here, program)
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

    return finish


def run(folder, line, first="", **environment):
    """Runs a command line -> (exit status, output, errors)."""
    return start(folder, line, first, **environment)()


def ok(folder, line, first="", **environment):
    """What it prints, if it ends well."""
    status, out, err = run(folder, line, first, **environment)
    assert status == 0 and not err, (line, out, err)
    return out


def pair(folder, line, first=""):
    """The ends of two processes, as of torchrun. `first` is for the second alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
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


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with apples/ (5, and one that cannot be read), oranges/, photos/, and a run."""
    folder = tmp_path_factory.mktemp("user")
    for name, count, colour in (("apples", 5, (200, 30, 40)), ("oranges", 3, (250, 150, 20))):
        (folder / name / "more").mkdir(parents=True)
        for k in range(count):
            path = folder / name / ("more" if k == 1 else "")
            picture = Image.fromarray(pixels(30 + k, 41, k) // 4 + np.array(colour, np.uint8) // 2)
            picture.save(path / f"{name} {k}.{'jpg' if k % 2 else 'png'}")
    (folder / "apples" / "apples 1.png").write_text("version https://git-lfs.github.com/spec/v1")
    (folder / "photos" / "more").mkdir(parents=True)
    for k, name in enumerate(("a.jpg", "a.png", "more/b.png")):
        Image.fromarray(photograph(41, 32 + k)).save(folder / "photos" / name)
    out = ok(folder, f"{NEW} {FOUR} --out trained")
    assert "finished after step 12" in out and out.count("skipped: ") == 1
    assert f"skipped: cannot read {folder}/apples/apples 1.png: cannot identify" in out
    return folder


def test_training_writes_what_it_promises(user):
    folder, rates = user / "trained", (2e-4, 2e-4, 2e-4 * 2 / 3, 2e-4 / 3)
    assert files_of(folder).keys() == {
        "epoch_0002.pt", "epoch_0004.pt", "latest.pt", "losses.csv", "losses.png", "samples.gif",
        "samples/epoch_0003_step_010.png", *(f"samples/epoch_000{k}.png" for k in range(5))}
    assert (folder / "losses.csv").read_text().startswith(
        "epoch,step,rate,gan,cycle,identity,D_X,D_Y\n1,3,0.0002,")
    config = Config(**load(folder)["config"])
    assert config == Config(24, 28, 1, 2, buffer_size=3, batch_size=2, epochs=2, decay_epochs=2)
    pictures = train.open_pictures([user / "apples", user / "oranges"], config)
    fast, means = FastStep(CycleGAN(config)), []
    for epoch, rate in enumerate(rates):
        losses = [list(fast(*map(cyclegan.to_tensor, batch), rate).values())
                  for batch in train.batches(config, *pictures, epoch, 0)]
        means.append([epoch + 1, 3 * (epoch + 1), rate, *np.mean(losses, 0)])
    # Sums of float32, which are rounded to six places.
    assert np.allclose(losses_of(folder), means, rtol=1e-5, atol=1e-6)

    def middles(names):  # the squares in the middle of four pictures, evenly spaced
        paths = [next(user.glob(f"*/{name}")) for name in names.split(", ")]
        pictures = [cyclegan.read_picture(path, 28) for path in paths]
        return cyclegan.to_tensor(np.stack([
            p[(len(p) - 23) // 2:, (p.shape[1] - 23) // 2:][:24, :24] for p in pictures]))

    x = middles("apples 0.png, apples 2.png, apples 3.jpg, apples 4.png")
    y = middles("more/oranges 1.jpg, more/oranges 1.jpg, oranges 0.png, oranges 2.png")
    for name, model in (("0000", CycleGAN(config)), ("0004", fast.model)):
        sheet = np.asarray(Image.open(folder / "samples" / f"epoch_{name}.png"))
        grid = sheet[14:].reshape(4, 28, 6, 28, 3)  # below the titles
        with torch.no_grad():
            columns = [x, model.G(x), model.F(model.G(x)), y, model.F(y), model.G(model.F(y))]
        for k, images in enumerate(map(cyclegan.to_pictures, columns)):
            inside = grid[:, 2:-2, k, 2:-2].astype(int)  # of a frame
            assert np.abs(inside - images).max() < 2  # rounding may differ in other batches
    with Image.open(folder / "samples.gif") as film:
        assert film.n_frames == 6
    shutil.copytree(folder, user / "back")
    train.animate(user / "back", 2)  # after going back to that epoch
    with Image.open(user / "back" / "samples.gif") as film:
        assert film.n_frames == 3


def test_stopped_and_resumed_equals_never_stopped(user):
    line, folder = f"{NEW} {FOUR} --out stopped", user / "stopped"
    for step, name in ((2, "SIGINT"), (3, "SIGTERM"), (4, "SIGHUP"), (6, "SIGUSR1")):
        status, out, _ = run(user, line, f"at_step({step - 1}, lambda: kill('{name}'))")
        assert status == 128 + getattr(signal, name), (name, out)
        assert f"stopped after step {step}; everything is saved in stopped; continue with: " \
               "python train.py --resume stopped\n" in out and out.count("skipped: ") == 1
        assert load(folder)["steps"] == step
        line = "train.py --resume stopped"
    dies = "def dies(*_):\n    kill('SIGKILL')\nat_step(7, lambda: setattr(os, 'replace', dies))"
    assert run(user, f"{line} --save-minutes 0", dies)[0] == -signal.SIGKILL
    part = folder / "latest.pt.part"
    assert load(folder)["steps"] == 7 and torch.load(part)["steps"] == 8  # saved at every step
    part.write_bytes(part.read_bytes()[:5000])
    out = ok(user, f"{line} --save-minutes 10 --max-steps 9")
    assert "at step 7," in out and "stopped after step 9;" in out and not part.exists()
    for _ in range(2):  # after its end nothing is left to do
        assert "finished after step 12;" in ok(user, line)
        assert same(files_of(folder), files_of(user / "trained"))


def test_signals_before_training_ignored_ones_and_readers_that_have_gone(user):
    first = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nat_step(3, lambda: kill('SIGHUP'))\n" \
            "r, w = os.pipe()\nos.close(r)\nsys.stdout = open(w, 'w')"  # as nohup and | head do
    ok(user, f"{NEW} --max-steps 6 --out unread", first)
    assert load(user / "unread")["steps"] == 6
    status, _, err = run(user, f"{NEW} --out early",
                         "cyclegan.find_pictures = lambda _: kill('SIGTERM')")
    assert (status, err) == (1, "train.py: stopped before training began\n")


def test_what_may_change_when_a_run_is_resumed(user):
    shutil.copytree(user / "trained", user / "longer")
    ok(user, "train.py --resume longer --device cpu --precision fp32 --eager --dataA apples "
             "--dataB oranges --epochs 6 --decay-epochs 2 --save-every 5 --save-minutes 9 "
             "--sample-every 4 --max-steps 999")
    names = files_of(user / "longer").keys() - files_of(user / "trained").keys()
    assert names == {"samples/epoch_0008.png", "epoch_0005.pt"}
    ok(user, f"{NEW} --batch-size 2 --epochs 8 --decay-epochs 1 --max-steps 11 --out sooner")
    ok(user, "train.py --resume sooner --epochs 1 --decay-epochs 3")  # begins the decay now
    os.truncate(user / "longer" / "samples" / "epoch_0001.png", 500)
    ok(user, "train.py --resume longer --save-every 3")  # after its end
    assert load(user / "longer")["place"]["save_every"] == 3
    for name, rates in (("longer", 2 * [2e-4, 2e-4, 4e-4 / 3, 2e-4 / 3]),
                        ("sooner", 3 * [2e-4] + [1.5e-4, 1e-4, 5e-5])):
        assert losses_of(user / name)[:, 2] == pytest.approx(rates, rel=1e-6)
        assert losses_of(user / name)[:, 0].tolist() == list(range(1, len(rates) + 1))
    config = load(user / "sooner")["config"]
    assert (config["epochs"], config["decay_epochs"]) == (3, 3)


def test_folders_may_move_and_runs_of_the_older_program_go_on(user):
    for name in ("apples", "oranges"):
        shutil.copytree(user / name, user / "before" / name)
    folders = "--dataA before/apples --dataB before/oranges"
    ok(user, f"train.py {folders} {SMALL} --buffer-size 3 {FOUR} --out moved --max-steps 4")
    (user / "before").rename(user / "after")
    saved = load(user / "moved")
    for name in ("history", "sums", "summed"):
        del saved["place"][name]
    (user / "older").mkdir()
    torch.save(saved, user / "older" / "latest.pt")
    (user / "older" / "losses.csv").write_text("step,epoch,rate,gan\n1,1,0.0002,2.0\n")
    status, _, err = run(user, "train.py --resume moved")
    assert status == 1 and "say with --dataA and --dataB where they are" in err
    for name, rows in (("moved", 4), ("older", 3)):
        ok(user, f"train.py --resume {name} {folders.replace('before', 'after')} --max-steps 1")
        ok(user, f"train.py --resume {name}")  # it knows the folders, though no step was made
        assert same(load(user / name)["model"], load(user / "trained")["model"])
        assert len(losses_of(user / name)) == rows
        assert (losses_of(user / name)[-2:] == losses_of(user / "trained")[-2:]).all()
    assert (user / "older" / "losses-earlier.csv").read_text().endswith("1,1,0.0002,2.0\n")


def small_authors_file(path, seed=0):
    """A generator of width 3 with 6 blocks, as the authors' program saves it -> its weights."""
    weights = Generator(3, 6, torch.Generator().manual_seed(seed)).state_dict()
    biases = {key.replace("weight", "bias"): torch.zeros(3) for key in weights}
    path.parent.mkdir(exist_ok=True)
    torch.save(biases | weights, path)
    return weights


def test_a_run_starts_from_a_run_and_from_the_authors_files(user):
    theirs = {name: small_authors_file(user / "theirs" / f"latest_net_{file}.pth", seed)
              for seed, (name, file) in enumerate((("G", "G_A"), ("F", "G_B")))}
    trained = load(user / "trained")
    ours = {name: {key[len(name) + 1:]: value for key, value in trained["model"].items()
                   if key.startswith(f"{name}.")} for name in ("G", "F", "D_X", "D_Y")}
    for path, networks in (("trained", ours), ("trained/epoch_0004.pt", ours), ("theirs", theirs),
                           ("theirs/latest_net_G_B.pth", {"G": theirs["F"]})):
        settings = trained["config"] if networks is ours else asdict(Config(24, 28, 6, 3))
        shutil.rmtree(user / "begun", ignore_errors=True)
        out = ok(user, "train.py --dataA oranges --dataB photos --lr 1e-30 --seed 5 --max-steps 1 "
                       f"--image-size 24 --load-size 28 --start-from {path} --out begun")
        assert f"from {path}: {', '.join(networks)}; all else begins anew" in out
        begun = load(user / "begun")
        assert begun["config"] == {**settings, "lr": 1e-30, "seed": 5}
        for name, weights in networks.items():
            for key, value in weights.items():  # Adam moves them by the rate, and no more
                assert torch.allclose(begun["model"][f"{name}.{key}"], value, rtol=0, atol=1e-20)
        assert 0.01 < begun["model"]["F.model.1.weight"].std() < 0.03
        assert begun["steps"] == 1 and begun["model"]["buffer_X.count"] <= 2
        assert all(moments["step"] == 1 for adam in begun["adams"] for moments in adam.values())


HELD = """
replace, sleep, refusals = os.replace, cyclegan.time.sleep, []
def held(source, target):  # as by a virus scanner, a synchronising folder, Samba
    if os.path.basename(target) in {names} and os.path.exists(target):
        refusals.append(target)
        if len(refusals) <= {count}:
            raise PermissionError(13, "Permission denied")
    replace(source, target)
os.replace, cyclegan.time.sleep = held, lambda seconds: sleep(seconds / 100)
"""


def test_files_that_cannot_be_replaced_lose_nothing(user):
    line = f"{NEW} {FOUR} --out"
    out = ok(user, f"{line} brief", HELD.format(names=["latest.pt"], count=24))
    assert "note" not in out and same(files_of(user / "brief"), files_of(user / "trained"))
    names = ["latest.pt", "losses.csv"]
    status, out, err = run(user, f"{line} held", HELD.format(names=names, count=999))
    reason = "cannot replace held/latest.pt: Permission denied; the new one is whole, as held/"
    assert status == 1 and err == f"train.py: {reason}latest.pt.part\n", err
    assert out.count(f"note: {reason}latest.pt.part; training goes on\n") == 1  # after epoch 2
    assert "note: cannot replace held/losses.csv" in out and load(user / "held")["steps"] == 0
    assert "at step 12," in ok(user, "train.py --resume held")
    assert same(load(user / "held"), load(user / "trained"))
    assert (user / "held" / "epoch_0002.pt").exists() and not list(user.glob("held/latest.pt.part"))


def test_what_is_written_is_synced_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, function=function: (
            calls.append((name, os.listdir(tmp_path))), function(*given)))
    cyclegan.write_file(tmp_path / "a", b"12")
    assert calls == [("fsync", ["a.part"]), ("replace", ["a.part"])]
    assert (tmp_path / "a").read_bytes() == b"12"


def test_full_disks_and_memories_get_one_sentence_and_harm_no_checkpoint(user):
    shutil.copytree(user / "trained", user / "full")
    checkpoint = (user / "full" / "latest.pt").read_bytes()
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, 2 * ({len(checkpoint) // 2},))"
    status, out, err = run(user, "train.py --resume full --epochs 4 --save-minutes 0", limit)
    assert status == 1 and err == "train.py: cannot write full/latest.pt: File too large\n"
    assert out.count("note: cannot write full/latest.pt: File too large; training goes on") == 6
    assert (user / "full" / "latest.pt").read_bytes() == checkpoint
    assert not list((user / "full").rglob("*.part"))
    for k, first in enumerate((
            "at_step(1, lambda: torch.empty(10**15))",
            "def read(*_):\n    raise MemoryError\ncyclegan.read_picture = read")):
        status, out, err = run(user, f"{NEW} --out no-memory-{k}", first)
        assert status == 1 and err.startswith("train.py: out of memory; a lower --image-size")
        assert err.count("\n") == 1 and out.count("skipped") == 1 - k  # it is not unreadable
    once = "def fails(*_):\n    cyclegan.save_checkpoint = save\n    raise MemoryError\n" \
           "save = cyclegan.save_checkpoint\n" \
           "at_step(1, lambda: setattr(cyclegan, 'save_checkpoint', fails))"
    out = ok(user, f"{NEW} --out short-of-memory --save-minutes 0 --max-steps 3", once)
    assert out.count("note: out of memory for a checkpoint; training goes on") == 1
    assert load(user / "short-of-memory")["steps"] == 3


def test_two_processes_train_together_and_stop_together(user):
    flags = "--buffer-size 0 --save-every 4"  # as each process has a buffer of its own
    ok(user, f"{NEW} {flags} --batch-size 2 --max-steps 4 --out single")
    (first, out, _), (second, said, _) = pair(
        user, f"{NEW} {flags} --out two", "at_step(3, lambda: kill('SIGTERM'))")
    assert (first, second) == (0, 143) and said.count("skipped: ") == said.count("\n")
    assert "stopped after step 4; everything is saved in two" in out and "processes: 2" in out
    begun = CycleGAN(Config(24, 28, 1, 2, buffer_size=0)).state_dict()
    one, two = (load(user / name)["model"] for name in ("single", "two"))
    for key in begun:  # sums of float32 differ in their order, and Adam magnifies that
        apart, way = ((a[key] - one[key]).abs().float().mean() for a in (two, begun))
        assert key.startswith("buffer") or apart < 0.01 * way, key
    assert [end[0] for end in pair(user, "train.py --resume two --max-steps 5")] == [0, 0]
    ok(user, "train.py --resume two --epochs 1 --decay-epochs 2")  # by one process
    assert losses_of(user / "two")[:, 1].tolist() == [3, 7, 13]
    status, _, err = pair(user, f"{NEW} --out dying", "at_step(3, lambda: kill('SIGKILL'))")[0]
    assert status == 1 and err.startswith("train.py (rank 0): another process failed; see"), err


def test_the_surroundings_of_a_training(user):
    for name, source in (("trainA", "oranges"), ("trainB", "photos")):
        shutil.copytree(user / source, user / "fruit" / name)
    line = "train.py --dataA fruit/trainA --dataB fruit/trainB/ --image_size 24 --load_size=28 " \
           "--width 2 --blocks 1 --max-steps 1"
    assert "note: SLURM_NTASKS is 4, but this is a run of its own; torchrun starts" in ok(
        user, line, SLURM_NTASKS="4")
    notebook = "sys.stdout = io.StringIO()"  # which has no reconfigure
    assert ok(user, line, notebook) == "" == ok(user, "translate.py --out notebook", notebook)
    assert all(load(user / "runs" / name)["steps"] == 1 for name in ("fruit", "fruit-2"))
    assert len(list((user / "notebook").rglob("*.png"))) == 3  # of the newest run's own pictures


# ---- Translating ---------------------------------------------------------------------------------

PHOTOS = "translate.py photos --checkpoint trained"


def test_translations_keep_names_folders_and_sizes(user):
    out = ok(user, f"{PHOTOS} --out there").splitlines()
    assert out[0] == "trained, at step 12, AtoB on cpu, pictures: 3" and len(out) == 5
    assert re.fullmatch(r"2 of 3, 0:00:0\d left: there/a.png.png", out[2])
    assert out[-1] == "3 translated into there, 0 skipped"
    ok(user, "translate.py photos/a.png photos/more --checkpoint trained --format jpg "
             "--direction BtoA --side-by-side --out jpegs")
    assert files_of(user / "there").keys() == {
        ".translated", "a.jpg.png", "a.png.png", "more/b.png"}
    assert files_of(user / "jpegs").keys() == {".translated", "a.jpg", "more/b.jpg"}
    picture = cyclegan.read_picture(user / "photos" / "a.png")
    for file, direction, box in (("there/a.png.png", "AtoB", (0, 0, 41, 33)),
                                 ("jpegs/a.jpg", "BtoA", (41, 14, 82, 47))):
        network = cyclegan.load_generator(user / "trained", direction)
        expected = translate.translate_photo(network, picture).astype(int)
        with Image.open(user / file) as image:
            assert image.format == file[-3:].upper().replace("JPG", "JPEG")
            assert image.size == box[2:]
            error = np.abs(np.asarray(image.crop(box)) - expected)
            beside = np.asarray(image.crop((0, box[1], *(41, box[3]))))
        assert error.max() == 0 if file == "there/a.png.png" else error.mean() < 8  # a JPEG's
    assert np.abs(beside - picture.astype(int)).mean() < 8
    small_authors_file(user / "horse2zebra" / "latest_net_G.pth")
    out = ok(user, "translate.py photos/a.png --checkpoint horse2zebra")
    assert "horse2zebra, step unknown, AtoB on cpu, pictures: 1\nnote: these weights do " \
           "not say at what scale they were trained; 256 pixels are assumed" in out
    assert (user / "horse2zebra" / "translated-AtoB-horse2zebra" / "a.png").is_file()


def test_no_file_that_exists_is_touched_and_a_stopped_call_goes_on(user):
    stop = ("translate, seen = cyclegan.translate, []\ndef stops(*given):\n"
            "    seen.append(0)\n    if len(seen) == 3:\n        kill('SIGINT')\n"
            "    return translate(*given)\ncyclegan.translate = stops")
    status, _, err = run(user, PHOTOS, stop)
    assert status == 1 and err == f"translate.py: stopped; to go on: python {PHOTOS}\n", err
    out, name = user / "trained" / "translated-AtoB-12", "trained/translated-AtoB-12"
    assert len(list(out.rglob("*.png"))) < 3
    (out / "a.png.png").write_text("of somebody else")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    said = ok(user, PHOTOS)
    assert f"{len(before)} files with these names exist in {name} and are kept, whatever made " \
           "them; --overwrite makes them anew\n" in said
    assert f"{3 - len(before)} translated into {name}, 0 skipped" in said
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert (out / "a.png.png").read_text() == "of somebody else"
    ok(user, f"{PHOTOS} --overwrite")
    ok(user, PHOTOS.replace("trained", "trained/epoch_0002.pt"))
    later, earlier = files_of(out), files_of(user / "trained" / "translated-AtoB-6")
    assert later.keys() == earlier.keys() == {".translated", "a.jpg.png", "a.png.png", "more/b.png"}
    assert all(later[name] != earlier[name] for name in later if name != ".translated")
    assert later["a.png.png"][:4] == b"\x89PNG"
    shutil.copytree(user / "photos", user / "among")
    ok(user, "translate.py among/a.jpg among/a.png --checkpoint trained --out among --overwrite")
    ok(user, "translate.py among/more/b.png --checkpoint trained --out among/more --overwrite")
    sources, among = files_of(user / "photos"), files_of(user / "among")
    assert among.keys() == {*sources, "a.jpg.png", "a.png.png"}  # no source was overwritten
    assert all(among[name] == sources[name] for name in sources)
    (user / "growing").mkdir()
    for name in ("a.png", "a.jpg"):  # the second does not take the first one's result for its own
        shutil.copy(user / "photos" / name, user / "growing")
        ok(user, "translate.py growing --checkpoint trained --out grown")
    grown = files_of(user / "grown")
    assert grown["a.png"] == grown["a.png.png"] != grown["a.jpg.png"]


def test_results_are_nobodys_pictures_unless_they_are_asked_for(user):
    shutil.copytree(user / "photos", user / "mixed")
    (user / "mixed" / "results").mkdir()
    ok(user, "translate.py mixed --checkpoint trained --out mixed/results")
    out = ok(user, f"train.py --dataA mixed --dataB oranges {SMALL} --max-steps 1 --out mixed-run")
    assert "A: 3 pictures" in out and "mixed: 1 folder(s) of results" in out
    status, out, err = run(user, "translate.py mixed --checkpoint trained --out mixed/again")
    assert status == 0 and "3 translated" in out and "1 folder(s) of results" in err
    assert "3 translated" in ok(user, "translate.py mixed/again --checkpoint trained --out third")


def test_a_result_that_cannot_be_made_is_named_and_the_others_are_made(user, monkeypatch, capsys):
    (user / "blocked").mkdir()
    (user / "blocked" / "more").touch()  # where a folder should be
    status, out, err = run(user, f"{PHOTOS} --out blocked")
    assert status == 1 and "2 translated into blocked, 1 skipped" in out
    assert err.startswith("skipped: cannot write blocked/more/b.png:") and err.count("\n") == 1
    assert files_of(user / "blocked").keys() == {"more", "a.jpg.png", "a.png.png"}
    pairs = [(user / "photos" / name, Path(name)) for name in ("a.png", "more/b.png", "a.jpg")]
    monkeypatch.setattr(cyclegan, "translate", lambda _, picture: (
        torch.empty(10**15) if picture.shape[0] == 34 else 255 - picture))  # b.png has 34 rows
    options = SimpleNamespace(size="full", side_by_side=False, direction="AtoB")
    results = dict(translate.translate_all(None, pairs, options))
    assert list(results) == [Path("a.png"), Path("a.jpg")]
    assert (results[Path("a.png")] == 255 - cyclegan.read_picture(pairs[0][0])).all()
    assert re.match("skipped: too large.*b.png; a lower --size", capsys.readouterr().err)
    for error, said in ((MemoryError(), "too large for the memory here: c"), (
            OSError("encoder error -2"), "cannot write c: encoder error -2")):
        translate.skip(error, "c")
        assert f"skipped: {said}" in capsys.readouterr().err
    with pytest.raises(KeyError):
        translate.skip(KeyError("a bug"), "c")


# ---- Mistakes ------------------------------------------------------------------------------------

RESUME = "train.py --resume trained"
MISTAKES = {  # a command line -> what its one sentence says
    "train.py --dataA file.zip --dataB oranges": "file.zip is not a folder.*nor an archive",
    "train.py --dataA 'apples/*.jpg' --dataB oranges": "nor a pattern",
    "train.py --dataA texts --dataB oranges": "texts holds no pictures.*1 .txt",
    "train.py --dataA broken --dataB oranges": "no picture in .*broken .*; cannot read .*a.png: ",
    "train.py --dataA apples": "--dataA and --dataB go together",
    f"{NEW} --out file.zip": "file.zip: File exists",
    f"{NEW} --out trained": "--out trained is not empty.*--resume trained",
    f"{NEW} --out downloads": "--out downloads is not empty",
    f"{NEW} --image-size 26": "image_size must be a multiple of 4",
    f"{NEW} --save-minutes -3": "--save-minutes",
    f"{NEW} --save-minutes nan": "--save-minutes: must be a number of minutes, not nan",
    f"{NEW} --dataB ./oranges/../apples": "are one folder",
    f"{NEW} --dataB apples/more": "or one lies in the other",
    "train.py --dataA apples --dataB oranges --start-from trained --width 4":
        "--width and --blocks follow from --start-from trained",
    f"{NEW} --start-from oranges": "oranges holds neither latest",
    "train.py --resume nowhere": "folder of a run, with latest.pt in it, not nowhere",
    "train.py --resume trained/epoch_0002.pt": "to go back to an earlier .*copy it over latest.pt",
    "train.py --resume cut": "cut/latest.pt",
    f"{RESUME} --lr 1e-4": "leave out --lr, or begin .*--start-from trained",
    f"{RESUME} --dataA oranges --dataB apples": "are swapped: A was apples, B was oranges",
    f"{RESUME} --no-flip --start-from trained": "leave out --flip, --start-from, or",
    f"{NEW} --lr 1e30 --epochs 9 --out exploded": r"is nan by step \d.*lower --lr",
    f"{NEW} --lr 1e39 --max-steps 1 --out overflowed": "a weight is not finite after step 1",
    "translate.py nothing.jpg --checkpoint trained": "no file or folder nothing.jpg",
    "translate.py pipe.png --checkpoint trained --out piped": "pipe.png: it is not a file",
    "translate.py photos --checkpoint apples": "apples holds neither latest.pt nor latest_net_G_A",
    "translate.py photos --checkpoint 'apples/apples 0.png'": "apples 0.png is damaged or not a ch",
    "translate.py --checkpoint gone": "no longer in .*nowhere; name others",
    f"{PHOTOS} --out file.zip/x": "cannot make the folder file.zip/x: .*choose another --out",
    f"{PHOTOS} --out ./photos": "--out photos is the folder of the pictures",
    f"{PHOTOS} --out orange.png": "--out orange.png: it takes a folder",
    f"{PHOTOS} photos/more/b.png photos/more/b.png":
        "b.png and another would both become trained/translated-AtoB-12/b.png.png; give each",
    f"{PHOTOS} --size some": "must be full or a number of pixels, at least 8, not some"}
if not torch.cuda.is_available():
    MISTAKES[f"{NEW} --device cuda:1"] = "device cuda:1 cannot be used here .*try cpu"


def test_mistakes_get_one_sentence_and_leave_nothing_behind(user):
    for name in ("texts/a.txt", "downloads/film.part", "broken/a.png"):
        (user / name).parent.mkdir()
        (user / name).write_text("not what it seems")
    (user / "file.zip").write_text("a file")
    os.mkfifo(user / "pipe.png")
    for name in ("cut", "gone"):
        shutil.copytree(user / "trained", user / name)
    os.truncate(user / "cut" / "latest.pt", 5000)
    saved = load(user / "gone")
    saved["place"]["data"] = ["nowhere", "there"]
    torch.save(saved, user / "gone" / "latest.pt")

    before, wrong = set(user.rglob("*")), []
    for line, sentence in MISTAKES.items():
        status, _, err = run(user, line)
        lines = [text for text in err.splitlines() if not text.startswith("usage:")]
        if status == 0 or len(lines) != 1 or not re.search(sentence, err):
            wrong.append((line, status, err))
    assert not wrong
    left = {path.relative_to(user).parts[0] for path in set(user.rglob("*")) - before}
    assert left == {"exploded", "overflowed", "piped"} and (user / "downloads/film.part").exists()
    assert [load(user / name)["steps"] for name in ("exploded", "overflowed")] == [0, 0]
    status, _, err = run(user, "train.py", WORLD_SIZE="2")
    assert status == 1 and re.fullmatch("train.py.*: WORLD_SIZE is 2.*torchrun.*\n", err), err


# ---- The demo ------------------------------------------------------------------------------------


def test_demo_scenes_differ_in_the_fruit_alone():
    others = [train.draw_scene(np.random.default_rng(k)) for k in range(20)]
    assert len({len(fruits) for fruits, *_ in others}) == 2  # one fruit or two
    apples, oranges = (train.paint(others[0], kind, 64).astype(int)
                       for kind in ("apples", "oranges"))
    fruit = (apples != oranges).any(-1)
    red, orange = apples[fruit].mean(0), oranges[fruit].mean(0)
    assert 0.05 < fruit.mean() < 0.5
    assert red[0] > 2 * red[1] and 0.4 < orange[1] / orange[0] < 0.7


def test_the_demo_is_measured_against_the_truth(capsys):
    darker = Recolours(b=(-0.1, -0.1, -0.1))  # by 13 levels; the other changes nothing
    model = SimpleNamespace(G=Recolours(), F=darker, config=Config(64, 64, 1, 2))
    fast = SimpleNamespace(model=model)
    train.evaluate_demo(train.Run(Path("run"), (), fast, train.DEMO_FOLDERS))
    G, F, *_ = capsys.readouterr().out.splitlines()
    assert G.startswith("apples to oranges") and "in the fruit 100% of the untranslated" in G
    assert "elsewhere 0.000 on" in G and "pores 0% of a true orange's (should be 100%)" in G
    assert F.startswith("oranges to apples") and "elsewhere 0.102 on" in F
    left = int(re.search(r"pores (\d+)% of a true orange's \(should be 0%", F)[1])
    assert 95 <= left <= 100  # some levels are cut off at black


def test_pores_are_as_strong_as_they_are_wherever_they_sit():
    scene = train.draw_scene(np.random.default_rng(0))
    v, u = np.mgrid[:64, :64, :1][:2] / 64 + 0.5 / 64
    for start in ((0, 0), (0.3, 0.8)):
        s, t = (2 * np.pi * (train.PORES * w + k) for w, k in zip((u, v), start, strict=True))
        picture = 90 + 20 * u - 30 * v * v + 7 * np.sin(s) * np.sin(t) * [1, 1, 1]
        assert abs(train.pore_strength([picture], [scene]) - 7) < 1e-9


def test_programs_in_the_documentation_compute_what_they_promise(user, tmp_path):
    for name in ("apples-oranges", "full"):
        shutil.copytree(user / "trained", tmp_path / "runs" / name)
    shutil.copy(user / "photos" / "a.jpg", tmp_path / "photo.jpg")
    road, car, void = (128, 64, 128), (0, 0, 142), (0, 0, 0)
    for name, row, kind in (
            ("truth/a.png", [road, road, road, car, void], np.uint8),
            ("translated/a.png", [road, (120, 70, 120), car, car, car], np.uint8),
            ("ct/a.tif", [-1000, -160, 40], np.float32),
            ("ct/b.tif", [240, 3000, -159], np.float32)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.array([row], kind)).save(tmp_path / name)
    said = [run(tmp_path, "translate.py --help", block)[:2] for block in blocks_of("python")
            if "import " in block and "onnx" not in block]  # which not everybody has
    assert all(status == 0 for status, _ in said)
    windowed = [cyclegan.read_picture(tmp_path / f"windowed/{name}.png")[0, :, 0] for name in "ab"]
    assert np.stack(windowed).tolist() == [[0, 0, 127], [255, 255, 0]]
    [scores] = [out for _, out in said if "pixel accuracy" in out]
    # By hand, void left out: 3 of 4 pixels; road 2 of 3, car 1 of 1; IoU 2 of 3 and 1 of 2.
    assert np.allclose([float(number) for number in re.findall(r"[\d.]{3,}", scores)[:3]],
                       [3 / 4, (2 / 3 + 1) / 2, (2 / 3 + 1 / 2) / 2])


# ==== The README ==================================================================================

TEXTS = {path: path.read_text() for path in (HERE / "README.md", *sorted(HERE.glob("docs/*.md")))}


def blocks_of(language):
    """The code blocks of a language in README.md and docs/."""
    return re.findall(rf"```{language}\n(.*?)```", "".join(TEXTS.values()), re.S)


def test_readme_commands_run_as_printed(user, tmp_path):
    lines = "".join(blocks_of("sh")).splitlines()
    assert {"python train.py", "python translate.py", "python -m pytest"} <= set(lines)
    for name in re.findall(r"--data[AB] (\S+)", " ".join(lines)):
        shutil.copytree(user / "oranges", tmp_path / name, dirs_exist_ok=True)
    for name in ("folder", "horses", "photos"):
        shutil.copytree(user / "photos", tmp_path / name)
    shutil.copy(user / "photos" / "a.jpg", tmp_path / "photo.jpg")
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
            program = program.replace("-node 8 ", f"-node 2 {HERE}/")
            subprocess.run(f"{Path(sys.executable).parent}/{program} --device cpu", shell=True,
                           cwd=tmp_path, check=True)
        elif not program.startswith("-m "):  # what installs, and the tests that are running
            out = ok(tmp_path, program)
            assert ("oranges to apples, 32 held-out scenes" in out) == (line == "python train.py")
    assert load(tmp_path / "runs" / "apples-oranges")["steps"] == 2
    assert len(list((tmp_path / "translated-BtoA").rglob("*.png"))) == 4


def test_the_cycle_as_l2_changes_what_the_manual_says(tmp_path):
    manual = TEXTS[HERE / "docs" / "using.md"]
    [line] = re.findall(r"^return lambda_forward \* mse_loss.*$", manual, re.M)
    source = (HERE / "cyclegan.py").read_text()
    changed = source.replace("import binary_cross_entropy_with_logits, l1_loss",
                             "import binary_cross_entropy_with_logits, l1_loss, mse_loss")
    old = "return lambda_forward * l1_loss(back_x, x) + lambda_backward * l1_loss(back_y, y)"
    module = types.ModuleType("changed")
    sys.modules["changed"] = module  # where a dataclass looks itself up
    exec(changed.replace(old, line), vars(module))
    x, y, back_x, back_y = (noise(1, 3, 4, 4, seed=k) for k in range(4))
    squares = 7 * ((back_x - x) ** 2).mean() + 3 * ((back_y - y) ** 2).mean()
    assert abs(module.cycle_loss(x, y, back_x, back_y, 7, 3) - squares) < 1e-12
    fast = module.FastStep(module.CycleGAN(module.Config(**TINY)))
    plain = FastStep(CycleGAN(Config(**TINY)))
    one, two = fast(image(0), image(1), 2e-4), plain(image(0), image(1), 2e-4)
    assert one["cycle"] != two["cycle"] and one["gan"] == two["gan"]
    module.save_checkpoint(tmp_path / "latest.pt", fast, PLACE)
    assert cyclegan.load_checkpoint(tmp_path)[0].steps == 1  # goes on, and translates
    assert torch.equal(cyclegan.load_generator(tmp_path).model[1].weight,
                       fast.model.G.model[1].weight)


def test_readme_names_what_is_there_and_shows_the_code_as_it_is():
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
    assert len(shown) >= 3 and all(" ".join(lines.split()) in code for lines in shown), shown


# ==== The benchmark ===============================================================================


def compare():
    """Says how far the three forms of the step are from one another, over all settings of STEPS."""
    found = [differences(setting, n) for setting in STEPS.values() for n in (1, 3)]
    for one, other in (("Part I", "the literal step"), ("FastStep", "Part I")):
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
        device, memory_format=cyclegan.memory_format(torch.device(device))) for seed in (0, 1))
    model, fast = CycleGAN(config).to(device), FastStep(CycleGAN(config), device)
    given = x, y, 2e-4, uniforms(0).to(device)
    steps = {"literal": functools.partial(Twin(model).step, *given),
             "Part I": functools.partial(model.step, *given),
             "FastStep": functools.partial(fast, x, y, 2e-4)}
    taken = {name: [] for name in steps}
    for k in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(10 if cuda else 1):
                step()
            if cuda:
                torch.cuda.synchronize()
            if k > 0:  # the first warms up
                taken[name].append((time.perf_counter() - began) / (10 if cuda else 1))
    for name, times in taken.items():
        ratios = sorted(a / b for a, b in zip(times, taken["FastStep"], strict=True))
        print(f"{name:10} {1000 * statistics.median(times):8.2f} ms/step, {name} / FastStep: "
              f"{statistics.median(ratios):.2f}, half of the pairs within "
              f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}")


if __name__ == "__main__":
    compare()
    benchmark(*map(int, sys.argv[1:]))
