"""CycleGAN, to be read alongside the paper: Zhu, Park, Isola, Efros, "Unpaired Image-to-Image
Translation using Cycle-Consistent Adversarial Networks", ICCV 2017, arXiv 1703.10593v7.
"Sec.", "Eq." and "Fig." are the paper's. "(authors' code)": as in pytorch-CycleGAN-and-pix2pix,
where the paper is silent or differs. "(ours)": in neither the paper nor that code.

Given: images x of a domain X (say, apples) and images y of a domain Y (oranges), unpaired.
G: X -> Y and F: Y -> X learn to translate. D_Y learns to tell y from G(x), D_X to tell x from F(y).

      forward cycle (Fig. 3b)                    backward cycle (Fig. 3c)
           G            F                             F            G
      x ----> fake_y ----> back_x                y ----> fake_x ----> back_y
                |            |                             |            |
          D_Y: real y?    x again?                   D_X: real x?    y again?

An image is named after the domain it should belong to, so G makes every _y and F every _x:

      image                 should               loss                   weight   who learns from it
      fake_y = G(x)         look like a real y   adversarial, Sec. 4      1      G
      fake_x = F(y)         look like a real x   adversarial, Sec. 4      1      F
      back_x = F(fake_y)    equal x              cycle, Eq. 2            10      G and F
      back_y = G(fake_x)    equal y              cycle, Eq. 2            10      G and F
      same_x = F(x)         equal x              identity, Sec. 5.2       5      F
      same_y = G(y)         equal y              identity, Sec. 5.2       5      G

Identity: F makes apples, so it should leave an apple unchanged. That preserves colour. It is on by
default in the authors' code, in the paper only for paintings and flowers; its weight 5 is the
cycle's 10 times lambda_identity = 0.5. D_Y and D_X learn after that, from y and fake_y and from x
and fake_x, new and earlier ones from a buffer (Sec. 4). Images: (N, 3, H, W) in [-1, 1].
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

# ==== Part I: the method, in plain PyTorch ========================================================

# ---- Networks (Sec. 7.2) -------------------------------------------------------------------------
# Layers are named as in Sec. 7.2: c7s1-k, dk, Rk, uk, Ck. InstanceNorm (Ulyanov et al.) brings each
# channel of each image to mean 0 and variance 1, without a learned scale or shift (authors' code).
# It subtracts the mean, so a bias before it would do nothing: these convolutions have none (ours).


def c7s1(in_channels, k):
    """7x7 convolution with k filters and stride 1, InstanceNorm, ReLU."""
    return [nn.ReflectionPad2d(3), nn.Conv2d(in_channels, k, 7, bias=False),
            nn.InstanceNorm2d(k), nn.ReLU(inplace=True)]


def d(in_channels, k):
    """3x3 convolution, stride 2, InstanceNorm, ReLU; zero-padded, like u and C (authors' code)."""
    return [nn.Conv2d(in_channels, k, 3, stride=2, padding=1, bias=False),
            nn.InstanceNorm2d(k), nn.ReLU(inplace=True)]


class R(nn.Module):
    """Residual block: two 3x3 convolutions, k filters; no ReLU after the sum (authors' code)."""

    def __init__(self, k):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3, bias=False), nn.InstanceNorm2d(k),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3, bias=False), nn.InstanceNorm2d(k))

    def forward(self, h):
        return h + self.conv_block(h)


def u(in_channels, k):
    """3x3 transposed convolution, k filters, InstanceNorm, ReLU. The paper's stride 1/2 is a
    transposed convolution of stride 2; output_padding=1 makes it exactly double H and W."""
    return [nn.ConvTranspose2d(in_channels, k, 3, stride=2, padding=1, output_padding=1,
                               bias=False), nn.InstanceNorm2d(k), nn.ReLU(inplace=True)]


def C(in_channels, k, stride=2):
    """4x4 convolution with k filters, InstanceNorm, LeakyReLU with slope 0.2."""
    return [nn.Conv2d(in_channels, k, 4, stride=stride, padding=1, bias=False),
            nn.InstanceNorm2d(k), nn.LeakyReLU(0.2, inplace=True)]


def initialise(network, rng=None):
    """Gaussian weights, standard deviation 0.02 (Sec. 7.1), biases 0. rng: a torch.Generator."""
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:  # a norm's scale, if it has one (ours have none), stays 1
            nn.init.normal_(parameter, 0.0, 0.02, generator=rng)


class Generator(nn.Module):
    """c7s1-64, d128, d256, R256 x blocks, u128, u64, c7s1-3 (Sec. 7.2, after Johnson et al.).

    (N, 3, H, W) images -> the same shape. Only tanh follows the last convolution (authors' code).
    ValueError unless H and W are multiples of 4 (they are halved twice), at least 8 (R pads).
    """

    def __init__(self, width=64, blocks=9, rng=None):
        super().__init__()
        self.model = nn.Sequential(                  # 256 x 256 becomes
            *c7s1(3, width),                         #   64 x 256 x 256
            *d(width, 2 * width),                    #  128 x 128 x 128
            *d(2 * width, 4 * width),                #  256 x  64 x  64
            *[R(4 * width) for _ in range(blocks)],  #  256 x  64 x  64
            *u(4 * width, 2 * width),                #  128 x 128 x 128
            *u(2 * width, width),                    #   64 x 256 x 256
            nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())  # 3 x 256 x 256
        initialise(self, rng)

    def forward(self, images):
        H, W = images.shape[2:]
        if H % 4 or W % 4 or H < 8 or W < 8:
            raise ValueError(f"H and W must be multiples of 4, at least 8, not {H} x {W}")
        return self.model(images)


class Discriminator(nn.Module):
    """C64, C128, C256, C512, one more convolution: the 70 x 70 PatchGAN (Sec. 7.2; Isola et al.).

    (N, 3, H, W) images -> (N, 1, H', W') scores, one per patch of 70 x 70 pixels, high for real. No
    sigmoid. C64 has no norm. C512 has stride 1 (authors' code); the paper's 2 would give 94 x 94.
    Why 70: n outputs of a layer see stride * (n - 1) + 4 inputs; from one score: 4, 7, 16, 34, 70.
    """

    def __init__(self, width=64, rng=None):
        super().__init__()
        self.model = nn.Sequential(                          # 256 x 256 becomes
            nn.Conv2d(3, width, 4, stride=2, padding=1),     #   64 x 128 x 128, C64
            nn.LeakyReLU(0.2, inplace=True),
            *C(width, 2 * width),                            #  128 x  64 x  64
            *C(2 * width, 4 * width),                        #  256 x  32 x  32
            *C(4 * width, 8 * width, stride=1),              #  512 x  31 x  31
            nn.Conv2d(8 * width, 1, 4, padding=1))           #    1 x  30 x  30
        initialise(self, rng)

    def forward(self, images):
        return self.model(images)


# ---- Losses (Sec. 3, 4 and 5.2) ------------------------------------------------------------------
# Every loss, the L1 norms included, is a mean over images, channels, H and W (authors' code).
REAL, FAKE = 1.0, 0.0


def adversarial_loss(scores, target, objective="lsgan"):
    """One adversarial term: how far D's scores are from the target, REAL or FAKE. -> scalar

                             target REAL    target FAKE
        "lsgan" (Sec. 4)     (s - 1)^2      s^2              where s = scores (Mao et al.)
        "log" (Eq. 1)        -log(p)        -log(1 - p)      where p = sigmoid(scores)

    In D_Y's loss the target is REAL for y, FAKE for G(x); in G's loss it is REAL. So with "log"
    G minimises -log(p) (authors' code). Eq. 1 has log(1 - p), whose derivative with respect to s is
    -p: where D is sure of a fake, G would learn nothing. Raises ValueError for other objectives.
    """
    if objective == "lsgan":
        return (scores - target).square().mean()
    if objective == "log":
        return binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))
    raise ValueError(f'objective must be "lsgan" or "log", not {objective!r}')


def cycle_loss(x, y, back_x, back_y, lambda_forward, lambda_backward):
    """Eq. 2: ||F(G(x)) - x||_1 + ||G(F(y)) - y||_1, each with its weight (authors' code)."""
    return lambda_forward * l1_loss(back_x, x) + lambda_backward * l1_loss(back_y, y)


def identity_loss(x, y, same_x, same_y, lambda_forward, lambda_backward):
    """Sec. 5.2, Taigman et al.: ||F(x) - x||_1 + ||G(y) - y||_1, weighted as x's and y's cycles."""
    return lambda_forward * l1_loss(same_x, x) + lambda_backward * l1_loss(same_y, y)


def discriminator_loss(real_scores, fake_scores, objective="lsgan"):
    """What D minimises: ((D(real) - 1)^2 + D(fake)^2) / 2, or its "log" counterpart. -> scalar
    Halved to slow D down (Sec. 7.1), but Adam's step hardly depends on the scale of a loss."""
    return 0.5 * (adversarial_loss(real_scores, REAL, objective)
                  + adversarial_loss(fake_scores, FAKE, objective))


# ---- The image buffer (Sec. 4) -------------------------------------------------------------------


class ImageBuffer:
    """A history of generated images for D, which reduces oscillation (Sec. 4; Shrivastava et al.).

    What a query with a new image n does to a buffer of size 2 (authors' code):

                    before    after     D sees    when
        filling     [a]       [a, n]    n         there is room
        swapping    [a, b]    [a, n]    b         it is full, half of the time; a slot at random
        passing     [a, b]    [a, b]    n         it is full, the other half; always if size is 0
    """

    def __init__(self, size=50):
        self.size, self.images = size, []

    def query(self, images, rng):
        """(N, 3, H, W) generated images, detached -> N images to show D. rng: a random.Random."""
        shown = []
        for image in images:
            if len(self.images) < self.size:               # filling
                self.images.append(image.clone())          # a view would keep the whole batch
            elif self.size > 0 and rng.random() < 0.5:     # swapping
                slot = rng.randrange(self.size)
                old = self.images[slot]
                self.images[slot] = image.clone()
                image = old
            shown.append(image)
        return torch.stack(shown)


# ---- Training (Sec. 3.3, 4 and 7.1): its settings, then the step ---------------------------------


def setting(default, help):
    """A field of Config, with its line of train.py --help."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """All settings, each a flag of train.py. Those without a section follow the authors' code."""
    image_size: int = setting(256, "side of the training crops (Sec. 7.2), a multiple of 4")
    load_size: int = setting(None, "shorter side before the crop; default image_size x 286/256")
    blocks: int = setting(None, "residual blocks; default 9, or 6 below 256 pixels (Sec. 7.2)")
    width: int = setting(64, "filters in the first layer of every network (Sec. 7.2)")
    objective: str = setting("lsgan", "lsgan (least squares, Sec. 4) or log (Eq. 1)")
    lambda_gan: float = setting(1.0, "weight of the adversarial losses of G and F (1 in Eq. 3)")
    lambda_forward: float = setting(10.0, "weight of ||F(G(x)) - x||_1, forward cycle (Eq. 3)")
    lambda_backward: float = setting(10.0, "weight of ||G(F(y)) - y||_1, backward cycle (Eq. 3)")
    lambda_identity: float = setting(0.5, "identity's weight, relative to the cycle: 0.5 * 10 = 5")
    buffer_size: int = setting(50, "generated images kept for each discriminator (Sec. 4)")
    batch_size: int = setting(1, "images of each domain per step (Sec. 4)")
    lr: float = setting(2e-4, "learning rate of both optimizers (Sec. 7.1)")
    beta1: float = setting(0.5, "Adam's first beta; the second is 0.999 (both: authors' code)")
    epochs: int = setting(100, "first epochs, at the full learning rate (Sec. 7.1)")
    decay_epochs: int = setting(100, "epochs of linear decay after these (Sec. 7.1)")
    flip: bool = setting(True, "mirror half of the crops; turn off if left and right matter")
    squash: bool = setting(False, "resize to a square (authors' code), else in proportion (ours)")
    seed: int = setting(0, "seeds the weights; in train.py also order, crops, flips, buffers")

    def __post_init__(self):
        if self.load_size is None:
            self.load_size = round(self.image_size * 286 / 256)
        if self.blocks is None:
            self.blocks = 9 if self.image_size >= 256 else 6
        check(self)  # Part II; raises UserError


def learning_rate(config, epoch):
    """Constant, then linear (Sec. 7.1). The first epoch is 0. By default epochs 0 to 99 have 2e-4,
    epoch 100 has 2e-4 * 100/101, epoch 199 2e-4 * 1/101 (authors' code; older and newer: 0)."""
    decayed = max(0, epoch + 1 - config.epochs)
    return config.lr * max(0.0, 1.0 - decayed / (config.decay_epochs + 1))


def minimise(losses, optimizer, lr):
    """One Adam step on the sum of {name: loss}. -> the losses, detached. The losses of G and F pass
    through D_X and D_Y; without `inputs`, these would get gradients, too, which nobody needs."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad()
    sum(losses.values()).backward(inputs=[p for p in parameters if p.requires_grad])
    optimizer.step()
    return {name: loss.detach() for name, loss in losses.items()}


class CycleGAN(nn.Module):
    """The training state: networks (yours, if given), image buffers, two Adams (authors' code).

        model, rng = CycleGAN(config), random.Random(0)
        for epoch in range(config.epochs + config.decay_epochs):
            for x, y in batches:
                losses = model.step(x, y, learning_rate(config, epoch), rng)

    An epoch has max(|X|, |Y|) images of each domain. x runs through X in random order, and starts
    over if X is smaller; y is drawn from Y with replacement, so pairs change (authors' code).
    """

    def __init__(self, config, G=None, F=None, D_X=None, D_Y=None):
        super().__init__()
        self.config = config
        rng = torch.Generator().manual_seed(config.seed)  # PyTorch's random numbers
        self.G = Generator(config.width, config.blocks, rng) if G is None else G  # X -> Y
        self.F = Generator(config.width, config.blocks, rng) if F is None else F  # Y -> X
        self.D_X = Discriminator(config.width, rng) if D_X is None else D_X  # is it x, or F(y)?
        self.D_Y = Discriminator(config.width, rng) if D_Y is None else D_Y  # is it y, or G(x)?
        self.buffer_X = ImageBuffer(config.buffer_size)  # of F(y), for D_X
        self.buffer_Y = ImageBuffer(config.buffer_size)  # of G(x), for D_Y
        adam = {"lr": config.lr, "betas": (config.beta1, 0.999)}
        self.adam_GF = torch.optim.Adam([*self.G.parameters(), *self.F.parameters()], **adam)
        self.adam_D = torch.optim.Adam([*self.D_X.parameters(), *self.D_Y.parameters()], **adam)

    def step(self, x, y, lr, rng):
        """One training step (Eq. 4): updates G and F, then D_X and D_Y.

        x, y: (N, 3, image_size, image_size), chosen independently. rng: a random.Random. Returns
        {name: detached scalar}: gan, cycle, identity (all three weighted), D_X, D_Y.
        """
        losses, fake_x, fake_y = self.update_G_F(x, y, lr)
        # D_X and D_Y come after G and F (authors' code), which detached fakes no longer reach.
        shown_x, shown_y = self.buffer_X.query(fake_x, rng), self.buffer_Y.query(fake_y, rng)
        return losses | self.update_D(x, y, shown_x, shown_y, lr)

    def generate(self, x, y):
        """The six images of the table at the top, in its order."""
        fake_y, fake_x = self.G(x), self.F(y)
        back_x, back_y = self.F(fake_y), self.G(fake_x)
        same_x, same_y = self.F(x), self.G(y)
        return fake_y, fake_x, back_x, back_y, same_x, same_y

    def update_G_F(self, x, y, lr):
        """Updates G and F (Eq. 3 plus identity). -> losses, fake_x, fake_y, all of them detached"""
        c = self.config
        fake_y, fake_x, back_x, back_y, same_x, same_y = self.generate(x, y)
        # G and F minimise, with the default weights
        #     (D_Y(G(x)) - 1)^2 + (D_X(F(y)) - 1)^2    Sec. 4           weight 1
        #     ||F(G(x)) - x||_1 + ||G(F(y)) - y||_1    Eq. 2            weight 10
        #     ||F(x) - x||_1    + ||G(y) - y||_1       Sec. 5.2         weight 5
        gan = c.lambda_gan * (adversarial_loss(self.D_Y(fake_y), REAL, c.objective)
                              + adversarial_loss(self.D_X(fake_x), REAL, c.objective))
        cycle = cycle_loss(x, y, back_x, back_y, c.lambda_forward, c.lambda_backward)
        identity = c.lambda_identity * identity_loss(
            x, y, same_x, same_y, c.lambda_forward, c.lambda_backward)
        losses = minimise(dict(gan=gan, cycle=cycle, identity=identity), self.adam_GF, lr)
        return losses, fake_x.detach(), fake_y.detach()

    def update_D(self, x, y, shown_x, shown_y, lr):
        """Updates D_X and D_Y, on real images and on those from the buffers. -> losses"""
        losses = dict(D_X=self.loss_D(self.D_X, x, shown_x), D_Y=self.loss_D(self.D_Y, y, shown_y))
        return minimise(losses, self.adam_D, lr)

    def loss_D(self, D, real, fake):
        """Of D_X or D_Y."""
        return discriminator_loss(D(real), D(fake), self.config.objective)


# ==== Part II: speed, files and pictures. The method ends here. ===================================
# ruff: noqa: E402 (these imports are here because Part I does not need them)

import copy
import io
import math
import os
import pickle
import random
import re
import stat
import textwrap
import warnings
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from numbers import Integral, Real
from pathlib import Path
from types import MethodType

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import distributed
from torch.nn.functional import conv2d, pad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

# ---- Errors and settings -------------------------------------------------------------------------


class UserError(ValueError):
    """An error that the user can fix, said in one line."""


def out_of_memory(error):
    """Whether an exception says that memory ran out, on whatever device."""
    words = "out of memory", "allocate memory", "start new thread"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


@contextmanager
def as_user_error(what):
    """Turns errors in a block into UserErrors, "what: reason", except out-of-memory errors."""
    try:
        yield
    except Exception as error:  # a damaged file makes its readers raise anything at all
        if out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{what}: {textwrap.shorten(reason, 300)}") from error


def check(config):
    """Raises UserError naming the first value of a Config that is impossible."""
    kinds = {int: (Integral, "a whole number, at least 0"), bool: (bool, "True or False"),
             float: (Real, "a number, at least 0"), str: (str, "a string")}
    c = config
    for f in fields(c):
        value, (kind, rule) = getattr(c, f.name), kinds[f.type]
        if not isinstance(value, kind) or kind is not str and not 0 <= value < math.inf:
            raise UserError(f"{f.name} must be {rule}, not {value!r}")
        setattr(c, f.name, f.type(value))  # not numpy's types
    rules = {
        "image_size": (c.image_size % 4 == 0 and c.image_size >= 24, "a multiple of 4 above 20"),
        "load_size": (c.load_size >= c.image_size, f"at least image_size, {c.image_size}"),
        "objective": (c.objective in ("lsgan", "log"), "lsgan or log"),
        "width": (c.width > 0, "above 0"),
        "batch_size": (c.batch_size > 0, "above 0"),
        "lr": (c.lr > 0, "above 0"),
        "beta1": (c.beta1 < 1, "below 1"),
        "seed": (c.seed < 2**63, "below 2^63"),
        "epochs": (0 < c.epochs + c.decay_epochs < 10**6,
                   "from 1 to a million, together with decay_epochs")}
    for name, (possible, rule) in rules.items():
        if not possible:
            raise UserError(f"{name} must be {rule}, not {getattr(c, name)!r}")


# ---- Faster layers -------------------------------------------------------------------------------


class InstanceNorm(nn.InstanceNorm2d):
    """InstanceNorm as GroupNorm with one channel a group, which is faster on a CPU."""

    def forward(self, h):
        return torch.group_norm(h, h.shape[1], eps=self.eps)


class LastConvolution(nn.Conv2d):
    """7x7 convolution. Its 3 filters would leave most of a CPU's vector lanes empty.

    Four copies of the filters, each shifted down by one row, make 12 filters of 10x7 with stride 4:
    the same sums, four rows at a time, in half the time. H must be a multiple of 4.
    """

    def forward(self, h):
        filters = [pad(self.weight, (0, 0, k, 3 - k)) for k in range(4)]
        rows = conv2d(h, torch.cat(filters), self.bias.repeat(4), stride=(4, 1))
        return rows.unflatten(1, (4, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def with_fast_layers(network):
    """Swaps in the faster classes, in place; weights and names stay. -> the network"""
    for layer in network.modules():
        if type(layer) is nn.InstanceNorm2d and not layer.affine and not layer.track_running_stats:
            layer.__class__ = InstanceNorm
        elif type(layer) is Generator:
            last = layer.model[-2]  # of c7s1-3, unless it is another one here
            if (type(last) is nn.Conv2d and last.kernel_size == (7, 7) and last.padding == (0, 0)
                    and last.stride == last.dilation == (1, 1) and last.bias is not None):
                last.__class__ = LastConvolution
    return network


# ---- The step on a device ------------------------------------------------------------------------


def choose_device(device, precision="fp32", compiled=False):
    """The torch.device; "auto" is CUDA if there is one. Raises UserError."""
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision must be fp32 or bf16, not {precision!r}")
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device).partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"device must be auto, cpu, cuda (an NVIDIA GPU) or mps, not {device}")
    with as_user_error(f"device {device} cannot be used here; try cpu"):
        device = torch.device(device)
        torch.empty(0, device=device)
    if compiled and device.type != "cuda":
        raise UserError(f"compiling (--compile) is for CUDA, not for {device}; leave it out")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def in_one_batch(network, *batches):
    """[network(batch) for batch in batches] in one call: InstanceNorm treats each image alone."""
    return network(torch.cat(batches)).chunk(len(batches))


class FastCycleGAN(CycleGAN):
    """CycleGAN on a device: three generator calls instead of six, one discriminator call instead
    of two.

    device: "auto" is CUDA if there is one. precision: "fp32", or "bf16", autocast in the networks.
    compiled: on CUDA, compiles the networks and, in one process, captures both updates as CUDA
    graphs; config, networks and the shape of batches must not change after that. Several processes
    have their own images and buffers, and average their gradients. Networks are changed in place.
    They must treat each image of a batch alone, so BatchNorm is refused. Raises UserError.
    """

    def __init__(self, config, device="auto", precision="fp32", compiled=False, **networks):
        super().__init__(config, **networks)
        if any(isinstance(layer, BatchNorm) for layer in self.modules()):
            raise UserError("BatchNorm mixes the images of a batch; use InstanceNorm")
        self.device, self.precision = choose_device(device, precision, compiled), precision
        self.compiled, self.calls = compiled, 0  # calls: steps since this object was made
        self.steps, self.rank, self.world_size = 0, 0, 1  # steps: done so far
        self.to(self.device)
        if self.device.type == "cpu":
            with_fast_layers(self)
        for adam in (self.adam_GF, self.adam_D):
            cuda = self.device.type == "cuda"
            adam.param_groups[0].update(fused=self.device.type != "mps", capturable=cuda)
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        if self.world_size > 1:
            for tensor in self.state_dict().values():  # own networks may start with other weights
                distributed.broadcast(tensor, 0)
            for adam in (self.adam_GF, self.adam_D):
                adam.register_step_pre_hook(average_gradients)
        for network in (self.G, self.F, self.D_X, self.D_Y):
            if precision == "bf16":
                network.forward = MethodType(forward_in_bf16, network)
            if compiled:
                network.compile(dynamic=False)
        if compiled:
            torch._dynamo.config.cache_size_limit = 64  # one model needs 5 graphs, 8 is the default
        if compiled and type(self) is FastCycleGAN and self.world_size == 1:
            stream = torch.cuda.Stream(self.device)  # a capture would freeze a subclass
            self.update_G_F = CudaGraph(self.update_G_F, stream)
            self.update_D = CudaGraph(self.update_D, stream)

    def train_step(self, x, y, lr):
        """CycleGAN.step with x and y moved to the device; the buffers' rng follows from `steps`.

        x, y: (N, C, H, W) of one shape, in [-1, 1]. Raises ValueError, and UserError if PyTorch
        cannot compile or capture the step.
        """
        if x.shape != y.shape or x.dim() != 4:
            raise ValueError("x and y must be (N, 3, H, W) and of one shape, not "
                             f"{[*x.shape]} and {[*y.shape]}")
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be a number, at least 0, not {lr}")
        for images in (x, y):  # on a GPU this check would wait for it
            if images.device.type == "cpu" and not images.abs().amax() <= 1:
                raise ValueError("x and y must lie in [-1, 1]")
        rng = random.Random(f"{self.config.seed} {self.steps} {self.rank}")
        try:
            losses = self.step(x.to(self.device), y.to(self.device), lr, rng)
        except Exception as error:  # a driver, Triton, a compiler: each fails in its own way
            tried = not self.compiled or self.calls > 3
            if tried or isinstance(error, ValueError) or out_of_memory(error):
                raise
            cause = textwrap.shorten(repr(error.__context__ or error), 200)  # context: what broke
            raise UserError("PyTorch cannot compile or capture the step here; start again without "
                            f"--compile (compiled=False): {cause}") from error
        self.steps += 1
        self.calls += 1
        return losses

    def generate(self, x, y):
        """back_x needs fake_y, so G(x) comes first; then F takes its three inputs, G its others."""
        fake_y = self.G(x)
        if self.config.lambda_identity > 0:
            back_x, fake_x, same_x = in_one_batch(self.F, fake_y, y, x)
            back_y, same_y = in_one_batch(self.G, fake_x, y)
        else:
            back_x, fake_x = in_one_batch(self.F, fake_y, y)
            back_y = self.G(fake_x)
            same_x, same_y = x, y  # stand-ins, whose identity loss is 0
        return fake_y, fake_x, back_x, back_y, same_x, same_y

    def loss_D(self, D, real, fake):
        return discriminator_loss(*in_one_batch(D, real, fake), self.config.objective)


def average_gradients(adam, *_):
    """Replaces the gradients by their means over all processes."""
    for parameter in (p for group in adam.param_groups for p in group["params"]):
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()


def forward_in_bf16(network, images):
    """The network's own forward in bfloat16; its weights and its result keep their type."""
    with torch.autocast(images.device.type, torch.bfloat16):
        return type(network).forward(network, images).to(images.dtype)


class CudaGraph:
    """A function of CUDA tensors and numbers; from its fourth call on, a CUDA graph is replayed.

    The first three calls warm up: compilation, cuDNN's choice of kernels, Adam's state. Results are
    copies. Raises ValueError for tensors of another shape than at first.
    """

    def __init__(self, function, stream):
        self.function, self.stream, self.calls = function, stream, 0

    def __call__(self, *inputs):
        inputs = [value if torch.is_tensor(value)  # a captured graph would freeze a Python number
                  else torch.full((), value, device=self.stream.device) for value in inputs]
        if self.calls == 0:
            self.inputs = [tensor.clone() for tensor in inputs]
        for static, tensor in zip(self.inputs, inputs, strict=True):
            if static.shape != tensor.shape:  # copy_ would broadcast
                raise ValueError("all batches must have the shape of the first")
            static.copy_(tensor)
        self.calls += 1
        if self.calls < 4:  # on the capture's stream, as autograd and the allocator remember it
            current = torch.cuda.current_stream(self.stream.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                outputs = self.function(*self.inputs)
            current.wait_stream(self.stream)
            return outputs
        if self.calls == 4:  # kernels are recorded, not run; "thread_local": other threads go on
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream,
                                  capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        self.graph.replay()
        return copy.deepcopy(self.outputs)  # the next replay overwrites them


# ---- Files ---------------------------------------------------------------------------------------


def write_file(path, data):
    """Writes a temporary file, syncs, renames: `path` is always either the old file or the new one.

    Makes the folder. Raises UserError.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # one for each writer
    with as_user_error(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)  # it is there only after an error


def save_checkpoint(path, model, place):
    """Saves the whole state of a FastCycleGAN, and `place`, a dict of plain values and tensors.

    Raises UserError if it cannot be written, or if `place` holds what could not be loaded.
    """
    file = io.BytesIO()
    torch.save(place, file)
    try:
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"cannot save {path}: `place` must hold plain values and tensors only, "
                        "neither NumPy's numbers nor other objects") from error
    file = io.BytesIO()
    torch.save({"config": asdict(model.config), "steps": model.steps, "place": place,
                "model": model.state_dict(),
                "adams": [adam.state_dict()["state"] for adam in (model.adam_GF, model.adam_D)],
                "buffers": [model.buffer_X.images, model.buffer_Y.images]}, file)
    write_file(path, file.getvalue())


def read_checkpoint(path):
    """The dict in a checkpoint: tensors and plain values; no code in it runs. Raises UserError."""
    with as_user_error(f"cannot read the checkpoint {path}"), open(path, "rb"):
        whole = zipfile.is_zipfile(path)
    try:
        if whole and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile("a wrong checksum")  # at which torch.load does not look
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        if out_of_memory(error):
            raise
        what = f"is damaged or not a checkpoint ({type(error).__name__})"
        if whole and isinstance(error, pickle.UnpicklingError):
            what = "holds a whole module, or other Python objects, which are not loaded"
        raise UserError(f"{path} {what}; expected: a run's latest.pt or a state_dict such as the "
                        "authors' latest_net_G.pth") from error


def load_checkpoint(path, device="auto", precision="fp32", compiled=False, kind=FastCycleGAN,
                    **networks):
    """The (FastCycleGAN, place) in a run's folder or in a file of save_checkpoint.

    device, precision, compiled: of FastCycleGAN. kind: FastCycleGAN, or your subclass of it.
    networks: G, F, D_X, D_Y, if they are your own. Raises UserError if the file is damaged, is no
    checkpoint, or holds other networks.
    """
    path = Path(path) / "latest.pt" if Path(path).is_dir() else Path(path)
    choose_device(device, precision, compiled)  # whose errors are not the file's
    saved = read_checkpoint(path)
    with as_user_error(f"{path} is not a checkpoint of this model"):
        model = kind(Config(**saved["config"]), device, precision, compiled, **networks)
        model.load_state_dict(saved["model"])
        model.steps = int(saved["steps"])
        for adam, state in zip((model.adam_GF, model.adam_D), saved["adams"], strict=True):
            adam.load_state_dict({**adam.state_dict(), "state": state})
            for p, moments in adam.state.items():  # or the fused Adam would write past their end
                moments["exp_avg"].view_as(p), moments["exp_avg_sq"].view_as(p)
        model.buffer_X.images, model.buffer_Y.images = (
            [image.to(model.device) for image in images] for images in saved["buffers"])
        return model, saved["place"]


def load_generator(path, direction="AtoB", device="auto"):
    """G ("AtoB") or F ("BtoA") of a run's folder or checkpoint: in eval mode, without gradients.

    Also of the authors' files: one such as 200_net_G_B.pth, regardless of the direction, or a
    folder with latest_net_G_A.pth and latest_net_G_B.pth, or with latest_net_G.pth. It has the
    run's .config (else None), .steps and .place, and .settings. Raises UserError.
    """
    if direction not in ("AtoB", "BtoA"):
        raise ValueError(f'direction must be "AtoB" or "BtoA", not {direction!r}')
    path, device = Path(path), choose_device(device)
    if path.is_dir():
        names = "latest.pt", f"latest_net_G_{direction[0]}.pth", "latest_net_G.pth"
        files = [path / name for name in names if (path / name).is_file()]
        path = files[0] if files else path / "latest.pt"  # the error will name it
    saved = read_checkpoint(path)
    with as_user_error(f"{path} holds neither a run's generator nor the authors' ResNet"):
        if "model" in saved:
            config = Config(**saved["config"])
            name, settings = "G" if direction == "AtoB" else "F", asdict(config)
            generator = getattr(CycleGAN(config), name)  # whatever network CycleGAN names
            generator.load_state_dict({key[2:]: value for key, value in saved["model"].items()
                                       if key.startswith(f"{name}.")})
        else:
            config, (generator, settings) = None, authors_generator(saved)
    if config is None and not any(key.endswith("model.1.bias") for key in saved):
        warnings.warn(f"{path} has no biases before norms: right for a generator of this project, "
                      "wrong for a network without norms", stacklevel=2)
    generator.config, generator.settings = config, settings
    generator.steps, generator.place = saved.get("steps"), saved.get("place") or {}
    if device.type == "cpu":
        with_fast_layers(generator)
    return generator.to(device).eval().requires_grad_(False)


def authors_generator(saved):
    """The generator in an authors' state_dict, {"width", "blocks"}. Raises ValueError, KeyError."""
    weights = {}
    for key, value in saved.items():  # without a wrapper's prefix; 6 stands after a dropout
        key = key.replace("_orig_mod.", "").removeprefix("module.")
        weights[key.replace("conv_block.6.", "conv_block.5.")] = value
    first = weights.get("model.1.weight", torch.zeros(1, 3))
    for reason, holds in {
            "its weights are under state_dict; save these alone": "state_dict" in weights,
            "it has no model.1.weight": "model.1.weight" not in weights,
            "it is anti-aliased, as CUT's are by default": any(".filt" in key for key in weights),
            "its norms are BatchNorm or affine": "model.2.weight" in weights,
            f"it takes {first.shape[1]} channels, not RGB": first.shape[1] != 3}.items():
        if holds:
            raise ValueError(reason)
    settings = {"width": len(first),
                "blocks": sum(key.endswith("conv_block.1.weight") for key in weights)}
    generator = Generator(**settings)
    own = generator.state_dict().keys()
    without_effect = (".bias", ".running_mean", ".running_var", ".num_batches_tracked")
    weights = {key: value for key, value in weights.items()
               if key in own or not key.endswith(without_effect) and key != "n_averaged"}
    if weights.keys() != own:
        raise ValueError(f"missing or unexpected key {min(weights.keys() ^ own)}")
    generator.load_state_dict(weights)
    return generator, settings


# ---- Pictures ------------------------------------------------------------------------------------

SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
FORMATS = "JPEG PNG WEBP AVIF BMP GIF JPEG2000 PPM TIFF TGA"  # no EPS: Pillow would execute it
with suppress(ImportError):  # no requirement; where this is installed, HEIC is read
    import pillow_heif

    pillow_heif.register_heif_opener()
    SUFFIXES, FORMATS = f"{SUFFIXES} .heic .heif", f"HEIF {FORMATS}"
if not hasattr(Image.Image, "has_transparency_data"):
    raise ImportError("Pillow is too old; run: python -m pip install --upgrade pillow")
Image.init()
FORMATS = [name for name in FORMATS.split() if name in Image.OPEN]


def find_pictures(folder):
    """Pictures under a folder, sorted; links are followed. Raises UserError if there are none.

    Other files are left out with a warning, runs and hidden files silently.
    """
    folder, files, seen = Path(folder), [], set()
    if (folder / "latest.pt").exists():
        raise UserError(f"{folder} is a run, not a folder of pictures")
    for parent, folders, names in os.walk(folder, onerror=cannot_read, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or "latest.pt" in names:  # links may go round in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    pictures = sorted(file for file in files if file.suffix.lower() in SUFFIXES.split())
    ignored = Counter(file.suffix.lower() or "without a suffix" for file in files)
    counts = ", ".join(f"{count:,} {suffix}" for suffix, count in ignored.most_common()
                       if suffix not in SUFFIXES.split())
    if ".heic" in counts:
        counts += " (to read HEIC: pip install pillow-heif)"
    if not pictures:
        raise UserError(f"there are no pictures ({SUFFIXES}) in {folder}; ignored: "
                        f"{counts or 'nothing'}")
    if counts:
        warnings.warn(f"ignored in {folder}: {counts}; these are read: {SUFFIXES}", stacklevel=2)
    return pictures


def cannot_read(error):
    raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def read_picture(path, side=None, squash=False):
    """A picture of any 8-bit mode -> (H, W, 3) uint8; with `side`, resized to scaled_size.

    Rotated as its EXIF says, white where transparent, in sRGB. Raises UserError naming the file.
    """
    path = Path(path)
    with as_user_error(f"cannot read {path}"):
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
            raise ValueError("it is not a file")
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF" or re.search(";16[BLN]", str(image.tile)):
                raise ValueError("it has more than 8 bits a channel; docs/using.md has a script "
                                 "that converts a folder of such pictures to 8 bits")
            size, box = image.size, None
            if side:
                if max(size) > 100 * min(size):
                    raise ValueError("it is more than a hundred times as long as wide")
                size = scaled_size(*size, side, squash)
                draft = image.draft(None, [2 * length for length in size])  # 1/8, 1/4, 1/2 of JPEGs
                box = draft[1] if draft else None  # the picture's, without padding
            rgb = to_rgb(image).resize(size, Image.BICUBIC, box)
            rgb.info = image.info  # has the EXIF data, which conversions have dropped
            return np.array(ImageOps.exif_transpose(rgb))


def to_rgb(image):
    """A Pillow image of any 8-bit mode -> RGB, in the colours of sRGB."""
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    if profile:
        with suppress(ImageCms.PyCMSError, ImportError, OSError, ValueError):  # it is ignored
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if not ImageCms.getProfileDescription(source).startswith("sRGB"):
                image = ImageCms.profileToProfile(
                    image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB")


def scaled_size(width, height, side, squash=False, limited=False):
    """(width, height) in proportion, so that the shorter one is `side`; squashed, both are.

    limited: to max(2^20, 2 side^2) pixels, for a network that gets the whole picture.
    """
    if squash:
        return side, side
    scale, most = side / min(width, height), max(2**20, 2 * side**2)
    if limited and width * height * scale**2 > most:
        scale = (most / (width * height)) ** 0.5
    return max(1, round(width * scale)), max(1, round(height * scale))


def prefetch(function, items, ahead):
    """Yields (item, future of function(item)) in order, while threads work on the next ones."""
    coming, pool = deque(), ThreadPoolExecutor(4)
    try:
        for item in items:
            coming.append((item, pool.submit(function, item)))
            if len(coming) > ahead:
                yield coming.popleft()
        while coming:
            yield coming.popleft()
    finally:  # if nobody wants the others, those not begun are dropped
        pool.shutdown(wait=False, cancel_futures=True)


def to_tensor(pictures, device="cpu"):
    """(N, H, W, 3) uint8 array -> (N, 3, H, W) float32 tensor in [-1, 1]. Raises ValueError."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError("pictures must be uint8 arrays (N, H, W, 3), not "
                         f"{pictures.dtype} {pictures.shape}")
    pictures = torch.from_numpy(np.array(pictures, order="C")).to(device)  # sent as bytes
    return pictures.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_pictures(images):
    """(N, 3, H, W) tensor in [-1, 1] -> (N, H, W, 3) uint8 array, rounded to the nearest."""
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def translate(generator, pictures):
    """(H, W, 3) or (N, H, W, 3) uint8, of any size -> the same shape, through a generator.

    Padded by reflection to multiples of 4, at least 8, and cut to size again. Raises ValueError.
    """
    height, width = pictures.shape[-3:-1]
    batch = pictures.reshape(-1, height, width, pictures.shape[-1])
    below, right = (max(8, side + -side % 4) - side for side in (height, width))
    batch = np.pad(batch, ((0, 0), (0, below), (0, right), (0, 0)), mode="reflect")
    images = to_tensor(batch, next(generator.parameters()).device)
    images = generator.forward(images)  # not the compiled one, which would compile for each size
    return to_pictures(images)[:, :height, :width].reshape(pictures.shape)


def with_titles(picture, titles):
    """A picture with a strip on top, in which a title stands over each of its columns."""
    height, width = picture.shape[:2]
    size = max(10, min(height, width // len(titles)) // 20)
    top = size * 7 // 5
    sheet = Image.new("RGB", (width, top + height), "white")
    sheet.paste(Image.fromarray(picture), (0, top))
    for k, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((k * width // len(titles) + 3, size // 10), title, "black",
                                   ImageFont.load_default(size))
    return np.asarray(sheet)


def png(picture):
    """(H, W, 3) uint8 -> the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
