"""CycleGAN, to be read beside its paper: Zhu, Park, Isola, Efros, "Unpaired Image-to-Image
Translation using Cycle-Consistent Adversarial Networks", ICCV 2017, arXiv 1703.10593v7.
"Sec.", "Eq." and "Fig." are the paper's. "(authors' code)": as in pytorch-CycleGAN-and-pix2pix,
where the paper says nothing or something else. "(ours)": in neither of the two.

Given: images x of a domain X (say, apples) and images y of a domain Y (oranges), unpaired.
G: X -> Y and F: Y -> X learn to translate. D_Y learns to tell y from G(x), D_X to tell x from F(y).

      forward cycle (Fig. 3b)                    backward cycle (Fig. 3c)
           G            F                             F            G
      x ----> fake_y ----> back_x                y ----> fake_x ----> back_y
                |            |                             |            |
          D_Y: real y?    x again?                   D_X: real x?    y again?

An image is named after the domain it should lie in, so G makes every _y and F every _x:

      image                 should               loss                   weight   who learns from it
      fake_y = G(x)         look like a real y   adversarial, Sec. 4      1      G
      fake_x = F(y)         look like a real x   adversarial, Sec. 4      1      F
      back_x = F(fake_y)    equal x              cycle, Eq. 2            10      G and F
      back_y = G(fake_x)    equal y              cycle, Eq. 2            10      G and F
      same_x = F(x)         equal x              identity, Sec. 5.2       5      F
      same_y = G(y)         equal y              identity, Sec. 5.2       5      G

The identity loss preserves colours. The authors' code uses it by default, the paper only with
paintings and flowers. Its weight is lambda_identity x 10 = 0.5 x 10; 0 turns it off. D_Y learns
from y and buffered fake_y, D_X from x and buffered fake_x. Images: (N, 3, H, W), in [-1, 1].
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

# ==== Part I: the method, in plain PyTorch ========================================================

# ---- Networks (Sec. 7.2) -------------------------------------------------------------------------
# Layers are named as in Sec. 7.2: c7s1-k, dk, Rk, uk, Ck. InstanceNorm, not affine (authors' code),
# subtracts the mean and so cancels a bias: convolutions before it have none (ours).


def c7s1(in_channels, k):
    """7x7 convolution with k filters and stride 1, InstanceNorm, ReLU."""
    return [nn.ReflectionPad2d(3), nn.Conv2d(in_channels, k, 7, bias=False),
            nn.InstanceNorm2d(k), nn.ReLU(True)]


def d(in_channels, k):
    """3x3 convolution, k filters, stride 2, zero padding (authors' code), InstanceNorm, ReLU."""
    return [nn.Conv2d(in_channels, k, 3, stride=2, padding=1, bias=False),
            nn.InstanceNorm2d(k), nn.ReLU(True)]


class R(nn.Module):
    """Residual block: two 3x3 convolutions, k filters; no ReLU after the sum (authors' code)."""

    def __init__(self, k):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3, bias=False), nn.InstanceNorm2d(k),
            nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3, bias=False), nn.InstanceNorm2d(k))

    def forward(self, h):
        return h + self.conv_block(h)


def u(in_channels, k):
    """3x3 transposed convolution, k filters, doubles H and W (stride 1/2), InstanceNorm, ReLU."""
    return [nn.ConvTranspose2d(in_channels, k, 3, stride=2, padding=1, output_padding=1,
                               bias=False), nn.InstanceNorm2d(k), nn.ReLU(True)]


def C(in_channels, k, stride=2):
    """4x4 convolution with k filters, InstanceNorm, LeakyReLU of slope 0.2."""
    return [nn.Conv2d(in_channels, k, 4, stride=stride, padding=1, bias=False),
            nn.InstanceNorm2d(k), nn.LeakyReLU(0.2, True)]


def initialise(network, rng=None):
    """Weights from a Gaussian, mean 0, deviation 0.02 (Sec. 7.1); biases are 0 (authors' code)."""
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, 0.0, 0.02, generator=rng)


class Generator(nn.Module):
    """c7s1-64, d128, d256, R256 x blocks, u128, u64, c7s1-3 (Sec. 7.2; width is 64).

    (N, 3, H, W) images -> the same shape; H and W must be multiples of 4 and at least 8. The last
    convolution is followed by tanh only: no norm, no ReLU (authors' code).
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
    """C64, C128, C256, C512, one more convolution: the 70 x 70 PatchGAN (Sec. 7.2; width is 64).

    (N, 3, H, W) images -> (N, 1, H', W') scores, one per patch of 70 x 70 pixels, high for real.
    No sigmoid. C64 has no norm. C512 has stride 1 (authors' code): 2 would make patches of 94 x 94.
    """

    def __init__(self, width=64, rng=None):
        super().__init__()
        self.model = nn.Sequential(                          # 256 x 256 becomes
            nn.Conv2d(3, width, 4, stride=2, padding=1),     #   64 x 128 x 128, C64
            nn.LeakyReLU(0.2, True),
            *C(width, 2 * width),                            #  128 x  64 x  64
            *C(2 * width, 4 * width),                        #  256 x  32 x  32
            *C(4 * width, 8 * width, stride=1),              #  512 x  31 x  31
            nn.Conv2d(8 * width, 1, 4, padding=1))           #    1 x  30 x  30
        initialise(self, rng)

    def forward(self, images):
        return self.model(images)


# ---- Losses (Sec. 3, 4 and 5.2) ------------------------------------------------------------------
# Every loss, ||.||_1 too, is a mean over images, channels and positions (authors' code).
REAL, FAKE = 1.0, 0.0


def adversarial_loss(scores, target, objective="lsgan"):
    """One adversarial term: how far D's scores are from the target, REAL or FAKE. -> scalar

                             target REAL    target FAKE
        "lsgan" (Sec. 4)     (s - 1)^2      s^2              where s = scores
        "log" (Eq. 1)        -log(p)        -log(1 - p)      where p = sigmoid(scores)

    In D_Y's loss y has the target REAL and G(x) has FAKE; in G's loss G(x) has REAL. So with "log"
    G minimises -log(p) (authors' code), not Eq. 1's log(1 - p), whose gradient vanishes while D
    rejects all fakes. Raises ValueError for any other objective.
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
    """Sec. 5.2: ||F(x) - x||_1 + ||G(y) - y||_1, weighted as Eq. 2; lambda_identity: see step."""
    return lambda_forward * l1_loss(same_x, x) + lambda_backward * l1_loss(same_y, y)


def discriminator_loss(real_scores, fake_scores, objective="lsgan"):
    """What D minimises: ((D(real) - 1)^2 + D(fake)^2) / 2, or its "log" counterpart. -> scalar
    Halved so that D learns more slowly than G (Sec. 7.1); Adam's steps hardly depend on it."""
    return 0.5 * (adversarial_loss(real_scores, REAL, objective)
                  + adversarial_loss(fake_scores, FAKE, objective))


# ---- The image buffer (Sec. 4) -------------------------------------------------------------------


class ImageBuffer(nn.Module):
    """Shows D earlier generated images as well, which damps oscillation (Sec. 4).

    What a query with a new image n does to a buffer of size 2 (authors' code):

                                        D sees
        filling     [a, -] -> [a, n]    n         while there is room
        swapping    [a, b] -> [a, n]    b         when full, half of the time; a slot at random
        passing     [a, b] -> [a, b]    n         when full, the other half; always if size is 0
    """

    def __init__(self, size=50, side=256):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, 3, side, side))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))  # stored so far

    def query(self, images, uniforms):
        """(N, 3, side, side) images -> as many for D to see. uniforms: N (slot, coin) pairs."""
        size, shown = len(self.images), []
        for image, (slot, coin) in zip(images, uniforms, strict=True):
            if self.count < size:           # filling
                self.images[self.count] = image
                self.count += 1
            elif size > 0 and coin < 0.5:   # swapping
                k = int(slot * size)
                self.images[k], image = image, self.images[k].clone()  # a copy, not a view
            shown.append(image)
        return torch.stack(shown)


# ---- Training (Sec. 3.3, 4 and 7.1): its settings, then the step ---------------------------------


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """All settings; those that name no section follow the authors' code. Raises UserError."""
    image_size: int = setting(256, "side of the training crops (Sec. 7.2), a multiple of 4")
    load_size: int = setting(None, "shorter side before the crop; default image_size x 286/256")
    blocks: int = setting(None, "residual blocks; default 9, or 6 below 256 pixels (Sec. 7.2)")
    width: int = setting(64, "channels after the first layer of every network (Sec. 7.2)")
    objective: str = setting("lsgan", "lsgan (least squares, Sec. 4) or log (Eq. 1)")
    lambda_gan: float = setting(1.0, "weight of the adversarial losses of G and F (1 in Eq. 3)")
    lambda_forward: float = setting(10.0, "weight of ||F(G(x)) - x||_1, forward cycle (Eq. 3)")
    lambda_backward: float = setting(10.0, "weight of ||G(F(y)) - y||_1, backward cycle (Eq. 3)")
    lambda_identity: float = setting(0.5, "identity, relative to the cycle: 0.5 x 10 = 5")
    buffer_size: int = setting(50, "generated images kept for each discriminator (Sec. 4)")
    batch_size: int = setting(1, "images of each domain per step (Sec. 4)")
    lr: float = setting(2e-4, "learning rate of both optimizers (Sec. 7.1)")
    beta1: float = setting(0.5, "Adam's first beta; the second is 0.999 (both: authors' code)")
    epochs: int = setting(100, "first epochs, at the full learning rate (Sec. 7.1)")
    decay_epochs: int = setting(100, "then epochs of linear decay towards zero (Sec. 7.1)")
    flip: bool = setting(True, "mirror half of the crops; turn off where left and right matter")
    squash: bool = setting(False, "resize to a square (authors' code), else in proportion (ours)")
    seed: int = setting(0, "seeds the weights; in train.py also order, crops, flips, buffers")

    def __post_init__(self):
        complete_and_check(self)  # Part II: replaces None with defaults, raises UserError


def learning_rate(config, epoch):
    """Constant, then linear (Sec. 7.1). Epochs count from 0. By default epochs 0 to 99 have 2e-4,
    epoch 100 has 2e-4 x 100/101, epoch 199 has 2e-4 x 1/101 (authors' code until mid-2020)."""
    decayed = max(0, epoch + 1 - config.epochs)
    return config.lr * max(0.0, 1.0 - decayed / (config.decay_epochs + 1))


def minimise(loss, optimizer, lr):
    """One step of Adam. G's loss passes through D_Y, but `inputs` gives gradients only to this
    optimizer's parameters, unless frozen, so D_Y learns nothing from it."""
    group = optimizer.param_groups[0]
    group["lr"] = lr
    optimizer.zero_grad()
    loss.backward(inputs=[p for p in group["params"] if p.requires_grad])
    optimizer.step()


class CycleGAN(nn.Module):
    """All that training changes: four networks, two image buffers, two optimizers.

        model = CycleGAN(config)
        for epoch in range(config.epochs + config.decay_epochs):
            lr = learning_rate(config, epoch)
            for x, y in batches:
                losses = model.step(x, y, lr, uniforms=torch.rand(2, len(x), 2))

    An epoch has max(|X|, |Y|) images of each domain: every x, shuffled, repeated if X is smaller;
    random y, with replacement (authors' code). You may pass networks of your own.
    """

    def __init__(self, config, G=None, F=None, D_X=None, D_Y=None):
        super().__init__()
        self.config = config
        rng = torch.Generator().manual_seed(config.seed)  # random numbers, not a network
        self.G = Generator(config.width, config.blocks, rng) if G is None else G  # X -> Y
        self.F = Generator(config.width, config.blocks, rng) if F is None else F  # Y -> X
        self.D_X = Discriminator(config.width, rng) if D_X is None else D_X  # is it x, or F(y)?
        self.D_Y = Discriminator(config.width, rng) if D_Y is None else D_Y  # is it y, or G(x)?
        self.buffer_X = ImageBuffer(config.buffer_size, config.image_size)  # of F(y), for D_X
        self.buffer_Y = ImageBuffer(config.buffer_size, config.image_size)  # of G(x), for D_Y
        adam = {"lr": config.lr, "betas": (config.beta1, 0.999)}  # joint: authors' code
        self.adam_GF = torch.optim.Adam([*self.G.parameters(), *self.F.parameters()], **adam)
        self.adam_D = torch.optim.Adam([*self.D_X.parameters(), *self.D_Y.parameters()], **adam)

    def six_images(self, x, y):
        """The six images of the table at the top. Part II overrides this and loss_of, for speed."""
        fake_y, fake_x = self.G(x), self.F(y)
        back_x, back_y = self.F(fake_y), self.G(fake_x)
        same_x, same_y = self.F(x), self.G(y)
        return fake_y, fake_x, back_x, back_y, same_x, same_y

    def loss_of(self, D, real, fake):  # what D minimises
        return discriminator_loss(D(real), D(fake), self.config.objective)

    def step(self, x, y, lr, uniforms):
        """Six images, five reported losses, two updates (Eqs. 3 and 4, and identity).

        x, y: (N, 3, image_size, image_size), chosen independently. lr: of both optimizers.
        uniforms: torch.rand(2, N, 2), [buffer, image, slot or coin], passed in to be repeatable.
        Returns {name: detached scalar}: gan, cycle, identity (all three weighted), D_X, D_Y.
        """
        c = self.config
        fake_y, fake_x, back_x, back_y, same_x, same_y = self.six_images(x, y)

        # G and F minimise, with the default weights
        #     (D_Y(G(x)) - 1)^2 + (D_X(F(y)) - 1)^2    Sec. 4           weight 1
        #     ||F(G(x)) - x||_1 + ||G(F(y)) - y||_1    Eq. 2            weight 10
        #     ||F(x) - x||_1    + ||G(y) - y||_1       Sec. 5.2         weight 5
        gan = c.lambda_gan * (adversarial_loss(self.D_Y(fake_y), REAL, c.objective)
                              + adversarial_loss(self.D_X(fake_x), REAL, c.objective))
        cycle = cycle_loss(x, y, back_x, back_y, c.lambda_forward, c.lambda_backward)
        identity = c.lambda_identity * identity_loss(
            x, y, same_x, same_y, c.lambda_forward, c.lambda_backward)
        minimise(gan + cycle + identity, self.adam_GF, lr)

        # D_X and D_Y are updated after G and F (authors' code), from the fakes made before that
        # update. These are detached, so G and F learn nothing here.
        shown_x = self.buffer_X.query(fake_x.detach(), uniforms[0])
        shown_y = self.buffer_Y.query(fake_y.detach(), uniforms[1])
        loss_D_X = self.loss_of(self.D_X, x, shown_x)
        loss_D_Y = self.loss_of(self.D_Y, y, shown_y)
        minimise(loss_D_X + loss_D_Y, self.adam_D, lr)

        losses = dict(gan=gan, cycle=cycle, identity=identity, D_X=loss_D_X, D_Y=loss_D_Y)
        return {name: loss.detach() for name, loss in losses.items()}


# ==== Part II: what makes it fast and easy to use. You may stop reading here. =====================
# ruff: noqa: E402 (these imports stand here, as Part I does without)

import io
import os
import time
import warnings
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from numbers import Integral, Real
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import distributed
from torch.nn.functional import conv2d, pad

# ---- Errors and settings -------------------------------------------------------------------------


class UserError(ValueError):
    """An error that the user can fix, said in one line."""

    def __str__(self):  # reasons of other libraries and names of files may have several lines
        return " ".join(line.strip() for line in super().__str__().splitlines())


def out_of_memory(error):
    """Whether an exception says that memory ran out, on whatever device."""
    words = "out of memory", "allocate memory"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def complete_and_check(config):
    """Replaces None in a new Config. Raises UserError naming the first impossible value."""
    kinds = {int: (Integral, "a whole number, at least 0"), float: (Real, "a number, at least 0"),
             bool: (bool, "True or False"), str: (str, "lsgan or log")}

    def require(name, possible, rule):
        if not possible:
            raise UserError(f"{name} must be {rule}, not {getattr(config, name)!r}")

    c = config
    for f in fields(c):
        value, (kind, rule) = getattr(c, f.name), kinds[f.type]
        if value is None and f.name == "load_size":
            value = round(c.image_size * 286 / 256)
        if value is None and f.name == "blocks":
            value = 9 if c.image_size >= 256 else 6
        require(f.name, isinstance(value, kind), rule)
        object.__setattr__(c, f.name, f.type(value))  # frozen for everyone else
        require(f.name, kind is str or 0 <= f.type(value) < 1e300, rule)
    for name, possible, rule in (
            ("image_size", c.image_size % 4 == 0 and c.image_size >= 24,
             "a multiple of 4, at least 24"),
            ("load_size", c.load_size >= c.image_size, f"at least image_size, {c.image_size}"),
            ("objective", c.objective in ("lsgan", "log"), "lsgan or log"),
            ("width", c.width > 0, "above 0"),
            ("batch_size", c.batch_size > 0, "above 0"),
            ("lr", c.lr > 0, "above 0"),
            ("beta1", c.beta1 < 1, "below 1"),
            ("seed", c.seed < 2**63, "below 2^63"),
            ("epochs", 0 < c.epochs + c.decay_epochs < 10**6,
             "between 1 and a million, together with decay_epochs")):
        require(name, possible, rule)


# ---- Layers and buffer, made faster --------------------------------------------------------------
# On CUDA images lie in memory as channels_last (NHWC), which its convolutions want. PyTorch's own
# norm and padding would return NCHW. On a CPU images stay NCHW.


class InstanceNorm(nn.InstanceNorm2d):
    """Normalises each channel of each image to mean 0 and variance 1; keeps the memory layout."""

    def forward(self, h):
        if h.is_contiguous():  # NCHW: one channel a group, the fastest on a CPU
            return torch.group_norm(h, h.shape[1], eps=self.eps)
        wide = h if h.dtype == torch.float64 else h.float()  # statistics in bfloat16 would be wrong
        variance, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)
        return ((wide - mean) * torch.rsqrt(variance + self.eps)).to(h.dtype)


class ReflectionPad(nn.ReflectionPad2d):
    """Reflection padding that keeps the memory layout, backward too."""

    def forward(self, h):
        if h.is_contiguous():
            return super().forward(h)
        last = h.movedim(1, -1)  # (N, H, W, C): padded as three dimensions, C by nothing
        return pad(last, (0, 0, *self.padding), "reflect").movedim(-1, 1)


class LastConvolution(nn.Conv2d):
    """7x7 convolution. Its 3 filters would leave most of a CPU's vector lanes empty.

    On a CPU, therefore, four copies of the filters, each shifted down by one row, make 12 filters
    of 10x7 with stride 4: the same sums, four rows at a time, in half the time. H must be a
    multiple of 4.
    """

    def forward(self, h):
        if not h.is_contiguous():
            return super().forward(h)
        filters = [pad(self.weight, (0, 0, k, 3 - k)) for k in range(4)]
        rows = conv2d(h, torch.cat(filters), self.bias.repeat(4), stride=(4, 1))
        return rows.unflatten(1, (4, 3)).permute(0, 2, 3, 1, 4).flatten(2, 3)


class CapturableBuffer(ImageBuffer):
    """ImageBuffer without branches on data, at which a CPU would have to wait for the GPU."""

    def query(self, images, uniforms):
        if len(self.images) == 0:
            return images
        shown = []
        for image, (slot, coin) in zip(images, uniforms, strict=True):
            filling = self.count < len(self.images)
            swapping = ~filling & (coin < 0.5)
            k = torch.where(filling, self.count, (slot * len(self.images)).long())
            old = self.images[k]  # a copy, as k is a tensor
            shown.append(torch.where(swapping, old, image))
            self.images[k] = torch.where(filling | swapping, image, old)
            self.count += filling
        return torch.cat(shown)


def with_fast_layers(model):
    """A model or network whose layers get the faster classes; tensors and names stay."""
    for layer in model.modules():
        if type(layer) is nn.InstanceNorm2d and not layer.affine and not layer.track_running_stats:
            layer.__class__ = InstanceNorm
        elif type(layer) is nn.ReflectionPad2d:
            layer.__class__ = ReflectionPad
        elif type(layer) is ImageBuffer:
            layer.__class__ = CapturableBuffer
        elif type(layer) is Generator:
            layer.model[-2].__class__ = LastConvolution
    return model


# ---- The step on a device ------------------------------------------------------------------------


def choose_device(device, precision="auto"):
    """(torch.device, precision); "auto" is CUDA, and bf16 where native. Raises UserError."""
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision must be auto, fp32 or bf16, not {precision!r}")
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it is none of cpu, cuda, mps")
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {device} cannot be used here ({reason}); try cpu") from None
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    if precision == "auto":
        native = (device.type == "cuda"
                  and torch.cuda.is_bf16_supported(including_emulation=False))
        precision = "bf16" if native else "fp32"
    return device, precision


def memory_format(device):
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def to_device(tensor, device):
    """A CPU tensor on a device; to CUDA it goes from pinned memory, so that nothing waits."""
    cuda = device.type == "cuda"
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)


def in_one_batch(network, *batches):
    """[network(batch) for batch in batches] in one call: InstanceNorm treats each image alone."""
    return network(torch.cat(batches)).chunk(len(batches))


class Fused:
    """CycleGAN.step of a model, three calls of a generator for six, one of a discriminator for two.

    It shares the model's weights, buffers and Adams. `networks` stand in for G, F, D_X and D_Y.
    """
    step = CycleGAN.step

    def __init__(self, model, networks):
        self.config = model.config
        self.G, self.F, self.D_X, self.D_Y = networks
        self.buffer_X, self.buffer_Y = model.buffer_X, model.buffer_Y
        self.adam_GF, self.adam_D = model.adam_GF, model.adam_D

    def six_images(self, x, y):
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

    def loss_of(self, D, real, fake):
        return discriminator_loss(*in_one_batch(D, real, fake), self.config.objective)


class FastStep:
    """CycleGAN.step on a device, fast. The model, which has made no step, is moved there, and its
    layers get faster classes.

    precision: "fp32"; "bf16", autocast in the networks; or "auto", bf16 where a GPU supports it.
    On CUDA, unless `eager`, networks are compiled, and with one process the step becomes a CUDA
    graph. Several processes have each their images and buffers, and average their gradients.
    Networks must treat each image of a batch alone, so BatchNorm will not do.
    """

    def __init__(self, model, device="cpu", precision="auto", eager=False):
        self.device, self.precision = choose_device(device, precision)
        self.model, self.steps = with_fast_layers(model), 0  # done so far
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world_size = distributed.get_world_size() if together else 1
        if self.world_size > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)  # own networks may start with other weights
        model.to(self.device, memory_format=memory_format(self.device))
        cuda = self.device.type == "cuda"
        for adam in (model.adam_GF, model.adam_D):
            adam.param_groups[0].update(fused=cuda or self.device.type == "cpu", capturable=cuda)
            if self.world_size > 1:
                adam.register_step_pre_hook(average_gradients)

        networks = [model.G, model.F, model.D_X, model.D_Y]
        self.compiles = cuda and not eager and can_compile()
        if self.compiles:
            networks = [torch.compile(network, dynamic=False) for network in networks]
        if self.precision == "bf16":
            networks = [in_bfloat16(network) for network in networks]
        self.run = Fused(model, networks).step
        if cuda and not eager and self.world_size == 1:
            self.run = CudaGraph(self.run, self.device)

    def __call__(self, x, y, lr):
        """CycleGAN.step, whose uniforms follow from the seed and `steps`. Raises ValueError."""
        check_batch(x, y, self.model.config.image_size)
        random = np.random.default_rng([self.model.config.seed, 0, self.steps])
        uniforms = random.random((2, self.world_size * len(x), 2), np.float32)  # never rounded to 1
        uniforms = torch.from_numpy(uniforms).chunk(self.world_size, 1)[self.rank]
        if self.device.type == "cuda":
            lr = torch.full((), lr, device=self.device)  # a captured graph would freeze a number
        losses = self.run(x, y, lr, to_device(uniforms, self.device))
        self.steps += 1
        return losses


def check_batch(x, y, side):
    """Raises ValueError unless x and y are batches of images that a step can take."""
    for images in (x, y):
        expected = (max(1, len(x)), 3, side, side)
        if not isinstance(images, torch.Tensor) or images.shape != expected:
            raise ValueError(f"x and y must be tensors (N, 3, {side}, {side}), as image_size is "
                             f"{side}; to_tensor() makes them from pictures")
        if images.device.type == "cpu" and not images.abs().amax() <= 1:  # a GPU would wait
            raise ValueError("x and y must lie in [-1, 1]")


def average_gradients(adam, *_):
    """Replaces the gradients by their means over all processes, in one reduction."""
    gradients = [p.grad for p in adam.param_groups[0]["params"] if p.grad is not None]
    in_memory = [g.as_strided((g.numel(),), (1,)) for g in gradients]  # a view in any layout
    flat = torch.cat(in_memory)
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(in_memory, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean)


def in_bfloat16(network):
    """Computes the network in bfloat16; its weights and its result keep their type."""
    def call(images):
        with torch.autocast(images.device.type, torch.bfloat16):
            return network(images).to(images.dtype)

    return call


def can_compile():
    """Whether torch.compile works here. If not, a warning says why."""
    try:
        torch.compile(lambda h: h * h + 1)(torch.ones(8, device="cuda"))
    except Exception as error:  # a driver, Triton, a compiler: each fails in its own way
        warn_of_slow_steps("torch.compile fails", error)
        return False
    torch._dynamo.config.cache_size_limit = 64  # past 8 sizes, G's and F's together, it gives up
    return True


def warn_of_slow_steps(what, error):
    reason = f"{type(error).__name__} {error}".strip().partition("\n")[0]
    warnings.warn(f"{what}, so steps are slower: {reason} (with --eager it is not tried)",
                  stacklevel=4)


class CudaGraph:
    """A function of CUDA tensors, captured at its fourth call as a CUDA graph, then replayed.

    The first three calls are real ones, in which PyTorch compiles and picks its kernels. Tensors
    of another shape start anew. What cannot be captured runs as it is, with a warning.
    """

    def __init__(self, function, device):
        self.function, self.inputs = function, []
        self.stream = torch.cuda.Stream(device)  # of the first calls and of the capture

    def __call__(self, *tensors):
        if [t.shape for t in self.inputs] != [t.shape for t in tensors]:
            self.inputs = [tensor.clone() for tensor in tensors]
            self.calls, self.graph = 0, None
        for static, tensor in zip(self.inputs, tensors, strict=True):
            static.copy_(tensor)
        self.calls += 1
        if self.calls == 4:
            self.capture()
        if self.graph is not None:
            self.graph.replay()
            return {name: loss.clone() for name, loss in self.losses.items()}
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            losses = self.function(*self.inputs)
        current.wait_stream(self.stream)
        return losses

    def capture(self):
        current = torch.cuda.current_stream(self.stream.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # a call of another thread would spoil a "global" capture
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.losses = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # torch.cuda.graph may have failed to
            torch.backends.cudnn.benchmark = False  # would free memory and fail (pytorch 180395)
            warn_of_slow_steps("CUDA cannot capture the step", error.__context__ or error)


# ---- Files ---------------------------------------------------------------------------------------


def write_file(path, data):
    """Writes bytes beside `path`, syncs, renames: there is always the old file or the new one.

    Raises UserError. If the new file is only denied the place of the old one, it stays, whole, as
    PATH.part, until the next is written.
    """
    part = path.with_name(f"{path.name}.part")
    if len(os.fsencode(part.name)) > 255:  # more than file systems take
        part = path.with_name(f"{zlib.crc32(os.fsencode(path.name)):x}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                raise OSError("another program is writing it, too")
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    for _ in range(25):  # for 5 seconds, as a virus scanner may hold the old file
        try:
            os.replace(part, path)
            return
        except OSError as error:
            reason = error.strerror or error
            time.sleep(0.2)
    raise UserError(f"cannot replace {path}: {reason}; the new one is whole, as {part}")


def save_checkpoint(path, fast, place):
    """Writes the whole state of a FastStep, with `place`, a dict of plain values. UserError."""
    model, file = fast.model, io.BytesIO()
    torch.save({"config": asdict(model.config), "steps": fast.steps, "place": place,
                "model": model.state_dict(),
                "adams": [adam.state_dict()["state"] for adam in (model.adam_GF, model.adam_D)]},
               file)
    write_file(Path(path), file.getbuffer())


def read_checkpoint(path):
    """The dict in a checkpoint: tensors and plain values; no code in it runs. Raises UserError."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile("a wrong checksum")  # at which torch.load does not look
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the sentences below say it better
            saved = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file makes the readers raise anything at all
        if out_of_memory(error):
            raise
        if getattr(error, "filename", None):  # it is missing, or may not be read
            raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}); expected "
                        "is latest.pt of a run, or a state_dict such as the authors' "
                        "latest_net_G.pth") from error
    if isinstance(saved.get("config"), dict):
        saved["config"].setdefault("squash", True)  # as pictures were before that setting
    return saved


def load_checkpoint(path, device="cpu", precision="auto", eager=False, **networks):
    """The (FastStep, place) in a run's folder or a file of save_checkpoint.

    device, precision, eager: of FastStep. networks: G, F, D_X, D_Y, if they are your own. Raises
    UserError if the file is damaged, is no checkpoint, or holds other networks.
    """
    path = Path(path) / "latest.pt" if Path(path).is_dir() else Path(path)
    saved = read_checkpoint(path)
    with blamed_on(path):
        model = CycleGAN(Config(**saved["config"]), **networks)
        others = saved["model"].keys() ^ model.state_dict().keys()
        if others:
            raise ValueError(f"it has other networks: {min(others)}")
        model.to(saved["model"]["buffer_X.images"].dtype)  # float64 after .double()
        model.load_state_dict(saved["model"])
    fast = FastStep(model, device, precision, eager)
    with blamed_on(path):
        fast.steps = int(saved["steps"])
        for adam, moments in zip((model.adam_GF, model.adam_D), saved["adams"], strict=True):
            load_moments(adam, moments, fast.steps)
        return fast, saved["place"]


@contextmanager
def blamed_on(path):
    """Makes errors UserErrors about a checkpoint, but for want of memory."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{path} is not a checkpoint of a run ({error})") from error


def load_moments(adam, state, steps):
    """Loads saved moments into a new Adam, which keeps its flags (fused, capturable)."""
    if steps > 0 and len(state) != sum(p.requires_grad for p in adam.param_groups[0]["params"]):
        raise ValueError("it lacks moments of Adam")
    adam.load_state_dict({**adam.state_dict(), "state": state})
    for parameter, moments in adam.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = moments[name].view_as(parameter)  # or the fused Adam would write past its end
            moments[name] = torch.empty_like(parameter).copy_(moment)


def load_generator(path, direction="AtoB", device="cpu"):
    """G ("AtoB") or F ("BtoA") of a run's folder or checkpoint: in eval mode, without gradients.

    Also of the authors' files: one such as 200_net_G_B.pth, taken for what it is, or a folder with
    latest_net_G_A.pth and latest_net_G_B.pth, of which the direction picks one, or with
    latest_net_G.pth. Blocks and width follow from the weights. What is returned has the run's
    .config (else None), .steps and .place, and .settings. Raises UserError naming the file.
    """
    if direction not in ("AtoB", "BtoA"):
        raise ValueError(f'direction must be "AtoB" or "BtoA", not {direction!r}')
    name, (device, _) = "G" if direction == "AtoB" else "F", choose_device(device)
    file = find_network(Path(path), name)
    generator = with_fast_layers(generator_of(read_checkpoint(file), name, file))
    generator.to(device, memory_format=memory_format(device))
    return generator.eval().requires_grad_(False)


def find_network(path, name):
    """The file of G or F: the path itself, or one in a folder. Raises UserError."""
    if not path.is_dir():
        return path
    theirs = "latest_net_G_A.pth" if name == "G" else "latest_net_G_B.pth"
    for file in (path / "latest.pt", path / theirs, path / "latest_net_G.pth"):
        if file.is_file():
            return file
    raise UserError(f"{path} holds neither latest.pt nor {theirs}; name a file")


def generator_of(saved, name, path):
    """G or F in a checkpoint, or the generator that is in an authors' file. Raises UserError."""
    try:
        config = Config(**saved["config"]) if "model" in saved else None
        weights = {}
        for key, value in saved.get("model", saved).items():
            if config and key.startswith(f"{name}."):
                weights[key.removeprefix(f"{name}.")] = value
            elif not config:  # without a wrapper's prefix; 6 stands after a dropout
                key = key.replace("_orig_mod.", "").removeprefix("module.")
                weights[key.replace("conv_block.6.", "conv_block.5.")] = value
        settings = {"width": len(weights["model.1.weight"]),
                    "blocks": sum(key.endswith("conv_block.1.weight") for key in weights)}
        generator = Generator(**settings)
        own = generator.state_dict().keys()
        without_effect = (".bias", ".running_mean", ".running_var", ".num_batches_tracked")
        for key in weights.keys() - own:
            if key.endswith(without_effect):
                del weights[key]
        if weights.keys() != own:
            raise ValueError(f"it lacks, or has besides, {min(weights.keys() ^ own)}")
        generator.load_state_dict(weights)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no ResNet generator from RGB ({error}); expected is a run's "
                        "checkpoint, or a state_dict with model.1.weight and so on") from error
    generator.config, generator.settings = config, asdict(config) if config else settings
    generator.steps, generator.place = saved.get("steps"), saved.get("place") or {}
    return generator


# ---- Pictures ------------------------------------------------------------------------------------

SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
FORMATS = "AVIF BMP GIF JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP"  # no EPS: Pillow would execute it
RESULTS = ".translated"  # marks a folder of results of translate.py, which are nobody's pictures
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # phones have 108 MP
with suppress(ImportError):  # no requirement; where this is installed, HEIC is read
    import pillow_heif

    pillow_heif.register_heif_opener()
    SUFFIXES, FORMATS = f"{SUFFIXES} .heic .heif", f"{FORMATS} HEIF"


def find_pictures(folder):
    """Pictures under a folder, sorted; links are followed. Raises UserError if there are none.

    Other files, runs and folders of results are left out with a warning, hidden files silently.
    """
    folder, found, ignored, seen = Path(folder), [], Counter(), set()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; a folder of pictures is wanted, neither a file "
                        "nor an archive nor a pattern")
    for parent, folders, names in os.walk(folder, onerror=cannot_read, followlinks=True):
        is_results = {"latest.pt", RESULTS} & set(names) and Path(parent) != folder
        if is_results or os.path.realpath(parent) in seen:  # links may go round in circles
            ignored["folder(s) of results"] += bool(is_results)
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES.split():
                found.append(path)
            else:
                ignored[path.suffix.lower() or "without a suffix"] += 1
    counts = ", ".join(f"{count:,} {what}" for what, count in ignored.most_common() if count)
    if ".heic" in ignored:
        counts += " (HEIC is read after: pip install pillow-heif)"
    if not found:
        raise UserError(f"the folder {folder} holds no pictures ({SUFFIXES}); ignored: "
                        f"{counts or 'none'}")
    if counts:
        warnings.warn(f"ignored in {folder}: {counts}; these are read: {SUFFIXES}", stacklevel=2)
    return sorted(found)


def cannot_read(error):
    raise UserError(f"cannot read {error.filename}: {error.strerror}")


def read_picture(path, side=None, squash=False):
    """A picture of any mode that Pillow opens -> (H, W, 3) uint8; with `side`, at that scale.

    Turned as its EXIF data say, white where transparent, in sRGB, 16-bit values scaled; resized
    bicubic to scaled_size. Raises UserError naming the file.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise UserError("it is not a file")
        with Image.open(path) as image:
            check_picture(image)
            if side:
                reduce_jpeg(image, *scaled_size(*image.size, side, squash))
            deep = ";16" in str(image.tile)  # 16 bits a channel; of RGB Pillow keeps the upper 8
            image = to_rgb(ImageOps.exif_transpose(image))
            if deep and max(high for _, high in image.getextrema()) <= 16:
                warnings.warn(f"{path}: its 16-bit values are below a sixteenth of their range, so "
                              "few levels are left; bring it to 8 bits first", stacklevel=2)
            if side:
                image = image.resize(scaled_size(*image.size, side, squash), Image.BICUBIC)
            return np.array(image)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes the decoders raise anything at all
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, Image.DecompressionBombError):
            reason = "it has more pixels than Pillow reads; reduce it, or cut it into parts"
        raise UserError(f"cannot read {path}: {reason}") from error


def check_picture(image):
    """Raises UserError for a picture, just opened, that is not to be decoded."""
    if image.format not in FORMATS.split():
        raise UserError(f"{image.format} is not a supported format ({FORMATS})")
    if max(image.size) > 100 * min(image.size):
        raise UserError("it is more than a hundred times as long as wide")
    if image.mode == "F" or image.mode == "I" and image.format != "PPM":
        raise UserError("it has 32 bits a pixel, or negative values; bring it to 8 bits, with a "
                        "window of your choice")


def reduce_jpeg(image, width, height):
    """Has a JPEG decoded at 1/8, 1/4 or 1/2, to at least twice the wanted size, which is faster.

    Only where that divides both sides: Pillow rounds up, which would move the edges.
    """
    for scale in (8, 4, 2):
        large = image.width >= 2 * scale * width and image.height >= 2 * scale * height
        if large and image.width % scale == 0 and image.height % scale == 0:
            image.draft(None, (image.width // scale, image.height // scale))
            return


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


def to_rgb(image):
    """A Pillow image of any mode -> RGB, in the colours of sRGB."""
    if image.mode[0] == "I":  # greys of 16 bits
        grey = np.asarray(image, np.float64) / 65535
        image = Image.fromarray((grey * 255).round().astype(np.uint8))
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    return (to_srgb(image, profile) if profile else image).convert("RGB")


def to_srgb(image, profile):
    """An image with a colour profile -> the same colours in sRGB. An unreadable one is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        if name in ("sRGB", "sRGB built-in") or name.startswith("sRGB IEC61966"):
            return image
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError):
        return image


def in_threads(function, items, ahead):
    """Yields (item, future of function(item)) in order, while threads do those that come next."""
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
    """(N, H, W, 3) uint8 array -> (N, 3, H, W) float32 tensor in [-1, 1], sent as bytes."""
    device = torch.device(device)
    if pictures.dtype != np.uint8 or pictures.ndim != 4:
        raise ValueError("pictures must be uint8 arrays (N, H, W, 3), not "
                         f"{pictures.dtype} {pictures.shape}")
    pictures = torch.from_numpy(np.array(pictures, order="C"))
    images = to_device(pictures, device).permute(0, 3, 1, 2).float()
    return images.contiguous(memory_format=memory_format(device)) / 127.5 - 1


def to_pictures(images):
    """(N, 3, H, W) tensor in [-1, 1] -> (N, H, W, 3) uint8 array, rounded to the nearest."""
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def translate(generator, pictures):
    """(H, W, 3) or (N, H, W, 3) uint8, of any size -> the same shape, through a generator.

    Padded by reflection to multiples of 4, at least 8, and cut to size again. Raises ValueError for
    other arrays.
    """
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4) or pictures.shape[-1] != 3:
        raise ValueError("pictures must be uint8 arrays (H, W, 3) or (N, H, W, 3), not "
                         f"{pictures.dtype} {pictures.shape}")
    height, width = pictures.shape[-3:-1]
    batch = pictures.reshape(-1, height, width, 3)
    below, right = (max(8, side + -side % 4) - side for side in (height, width))
    batch = np.pad(batch, ((0, 0), (0, below), (0, right), (0, 0)), mode="reflect")
    images = generator(to_tensor(batch, next(generator.parameters()).device))
    return to_pictures(images)[:, :height, :width].reshape(pictures.shape)


def titled(picture, titles):
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
