"""CycleGAN, to be read beside its paper: Zhu, Park, Isola, Efros, "Unpaired Image-to-Image
Translation using Cycle-Consistent Adversarial Networks", ICCV 2017, arXiv 1703.10593v7.
"Sec.", "Eq." and "Fig." are the paper's; the authors' code is pytorch-CycleGAN-and-pix2pix.

There are images x of one domain, X (say, apples), and y of another, Y (oranges), but no pairs.
G: X -> Y and F: Y -> X learn to translate. D_Y learns to tell y from G(x), D_X to tell x from F(y).

      forward cycle (Fig. 3b)                    backward cycle (Fig. 3c)
           G            F                             F            G
      x ----> fake_y ----> back_x                y ----> fake_x ----> back_y
                |            |                             |            |
          D_Y: real y?    x again?                   D_X: real x?    y again?

An image is named after the domain it should lie in, so G makes all _y and F makes all _x:

      fake_y = G(x)         fake_x = F(y)         should pass for real         Eq. 1
      back_x = F(fake_y)    back_y = G(fake_x)    should be x and y again      Eq. 2
      same_x = F(x)         same_y = G(y)         should be x and y still      Sec. 5.2

"Images" are tensors (N, 3, H, W) in [-1, 1], "pictures" are uint8 arrays (H, W, 3).
On the command line X is A and Y is B. Part I is the method, Part II what it takes to use it.
"""

import io
import os
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch import distributed, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

# ==== Part I: the method. First its settings ======================================================


def setting(default, text):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Every setting of the method. Raises UserError for an impossible value."""
    image_size: int = setting(256, "side of the training crops (Sec. 7.2), a multiple of 4")
    load_size: int = setting(None, "shorter side before the crop; default image_size x 286 / 256")
    blocks: int = setting(None, "residual blocks; default 9, or 6 below 256 pixels (Sec. 7.2)")
    width: int = setting(64, "channels after the first layer of every network (Sec. 7.2)")
    objective: str = setting("lsgan", "lsgan (least squares, Sec. 4) or log (Eq. 1)")
    lambda_gan: float = setting(1.0, "weight of the adversarial losses of G and F (1 in Eq. 3)")
    lambda_forward: float = setting(10.0, "weight of ||F(G(x)) - x||_1, forward cycle (Eq. 3)")
    lambda_backward: float = setting(10.0, "weight of ||G(F(y)) - y||_1, backward cycle (Eq. 3)")
    lambda_identity: float = setting(0.5, "weight of identity, as a part of the cycle's (authors')")
    buffer_size: int = setting(50, "generated images kept for each discriminator (Sec. 4)")
    batch_size: int = setting(1, "images of each domain per step (Sec. 7.1)")
    lr: float = setting(2e-4, "learning rate of Adam (Sec. 7.1)")
    beta1: float = setting(0.5, "first beta of Adam; the second is 0.999 (authors' code)")
    epochs: int = setting(100, "epochs at the full learning rate (Sec. 7.1)")
    decay_epochs: int = setting(100, "further epochs, in which it decays towards zero (Sec. 7.1)")
    flip: bool = setting(True, "mirror half of the crops; no good for text, or unequal sides")
    squash: bool = setting(False, "resize to a square, whatever the proportions (authors' code)")
    seed: int = setting(0, "seed of weights, order, crops, flips and buffers")

    def __post_init__(self):
        fill_in_and_check(self)  # what is None, and what is impossible


# ---- Networks (Sec. 7.2) -------------------------------------------------------------------------
# InstanceNorm, ReflectionPad and LastConvolution are PyTorch's InstanceNorm2d, ReflectionPad2d
# and Conv2d, made faster in Part II. No convolution has a bias that a norm would cancel.


def c7s1(channels, k):
    """7x7 convolution with k filters and stride 1, InstanceNorm, ReLU."""
    return [ReflectionPad(3), nn.Conv2d(channels, k, 7, bias=False), InstanceNorm(), nn.ReLU(True)]


def d(channels, k):
    """3x3 convolution with k filters, stride 2, padded by zeros (authors'), InstanceNorm, ReLU."""
    return [nn.Conv2d(channels, k, 3, 2, padding=1, bias=False), InstanceNorm(), nn.ReLU(True)]


def u(channels, k):
    """3x3 transposed convolution with k filters, stride 2 (the paper's 1/2), InstanceNorm, ReLU."""
    return [nn.ConvTranspose2d(channels, k, 3, 2, padding=1, output_padding=1, bias=False),
            InstanceNorm(), nn.ReLU(True)]


class R(nn.Module):
    """Residual block: two 3x3 convolutions with k filters. No ReLU after the sum."""

    def __init__(self, k):
        super().__init__()
        self.conv_block = nn.Sequential(
            ReflectionPad(1), nn.Conv2d(k, k, 3, bias=False), InstanceNorm(), nn.ReLU(True),
            ReflectionPad(1), nn.Conv2d(k, k, 3, bias=False), InstanceNorm())

    def forward(self, h):
        return h + self.conv_block(h)


def C(channels, k, stride=2):
    """4x4 convolution with k filters, stride 2 by default, InstanceNorm, LeakyReLU of slope 0.2."""
    return [nn.Conv2d(channels, k, 4, stride, padding=1, bias=False),
            InstanceNorm(), nn.LeakyReLU(0.2, True)]


def initialise(network, rng=None):
    """Weights are drawn from N(0, 0.02), of standard deviation 0.02; biases are 0 (Sec. 7.1)."""
    for name, parameter in network.named_parameters():
        std = 0.0 if name.endswith("bias") else 0.02
        nn.init.normal_(parameter, 0.0, std, rng)


class Generator(nn.Module):
    """c7s1-64, d128, d256, `blocks` times R256, u128, u64, c7s1-3 (Sec. 7.2, where width is 64).

    (N, 3, H, W) images -> the same shape. Raises ValueError unless H and W are multiples of 4,
    at least 8. The last layer has neither norm nor ReLU (authors' code).
    """

    def __init__(self, width=64, blocks=9):
        super().__init__()
        self.model = nn.Sequential(                  # 256 x 256 becomes
            *c7s1(3, width),                         #   64 x 256 x 256
            *d(width, 2 * width),                    #  128 x 128 x 128
            *d(2 * width, 4 * width),                #  256 x  64 x  64
            *[R(4 * width) for _ in range(blocks)],  #  256 x  64 x  64
            *u(4 * width, 2 * width),                #  128 x 128 x 128
            *u(2 * width, width),                    #   64 x 256 x 256
            ReflectionPad(3), LastConvolution(width, 3, 7), nn.Tanh())  # 3 x 256 x 256
        initialise(self)

    def forward(self, images):
        check_sides(images)
        return self.model(images)


class Discriminator(nn.Module):
    """C64, C128, C256, C512, one more convolution: the 70 x 70 PatchGAN (Sec. 7.2, width 64).

    (N, 3, H, W) images -> (N, 1, H', W') scores, high for real, each of a patch of 70 x 70 pixels;
    no sigmoid. C64 has no norm. C512 has stride 1 (authors' code): with 2 it would be 94 x 94.
    """

    def __init__(self, width=64):
        super().__init__()
        self.model = nn.Sequential(                  # 256 x 256 becomes
            nn.Conv2d(3, width, 4, 2, padding=1),    #   64 x 128 x 128, C64
            nn.LeakyReLU(0.2, True),
            *C(width, 2 * width),                    #  128 x  64 x  64
            *C(2 * width, 4 * width),                #  256 x  32 x  32
            *C(4 * width, 8 * width, stride=1),      #  512 x  31 x  31
            nn.Conv2d(8 * width, 1, 4, padding=1))   #    1 x  30 x  30
        initialise(self)

    def forward(self, images):
        return self.model(images)


# ---- Losses (Sec. 3, 4 and 5.2) ------------------------------------------------------------------
# E[.] and ||.||_1 are means over images, channels and positions, as in the authors' code.
REAL, FAKE = 1.0, 0.0


def adversarial_loss(scores, target, objective="lsgan"):
    """A term of Eq. 1 as a loss: how far D's scores are from the target, REAL or FAKE. -> scalar

                             target REAL    target FAKE
        "lsgan" (Sec. 4)     (D - 1)^2      D^2              where D = scores
        "log" (Eq. 1)        -log(D)        -log(1 - D)      where D = sigmoid(scores)

    The target of y is REAL and of G(x) FAKE in D_Y's loss, and of G(x) REAL in G's: with "log"
    -log(D) (authors' code), as the gradient of Eq. 1's log(1 - D) vanishes once D is sure.
    """
    if objective == "lsgan":
        return (scores - target).square().mean()
    return binary_cross_entropy_with_logits(scores, torch.full_like(scores, target))


def cycle_loss(x, y, back_x, back_y, lambda_forward=1.0, lambda_backward=1.0):
    """Eq. 2: ||F(G(x)) - x||_1 + ||G(F(y)) - y||_1, each with its weight (Eq. 3). -> scalar"""
    return lambda_forward * l1_loss(back_x, x) + lambda_backward * l1_loss(back_y, y)


def identity_loss(x, y, same_x, same_y, lambda_forward=1.0, lambda_backward=1.0):
    """Sec. 5.2: ||F(x) - x||_1 + ||G(y) - y||_1, weighted as the cycles of x and y. -> scalar"""
    return lambda_forward * l1_loss(same_x, x) + lambda_backward * l1_loss(same_y, y)


def discriminator_loss(D, real, fake, objective="lsgan"):
    """What D minimises, halved (Sec. 4, 7.1): ((D(real) - 1)^2 + D(fake)^2) / 2. -> scalar"""
    real_scores, fake_scores = in_one_batch(D, real, fake)  # D(real), D(fake) (Part II)
    return 0.5 * (adversarial_loss(real_scores, REAL, objective)
                  + adversarial_loss(fake_scores, FAKE, objective))


# ---- The image buffer (Sec. 4) -------------------------------------------------------------------


class ImageBuffer(nn.Module):
    """Once full, shows D an earlier generated image half of the time, which damps oscillation.

    What a new image c does to a buffer of size 2 (authors' code):

        filling     [a, -] -> [a, c]    c is shown    while there is room
        swapping    [a, b] -> [a, c]    b is shown    when full, probability 1/2: a or b, at random
        passing     [a, b] -> [a, b]    c is shown    when full, otherwise
    """

    def __init__(self, size=50, side=256):
        super().__init__()
        self.register_buffer("images", torch.zeros(size, 3, side, side))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))  # places filled

    def exchange(self, images, draws):
        """(N, 3, side, side) new images -> as many to show. draws: (N, 2) uniform on [0, 1)."""
        shown = []
        for image, draw in zip(images.split(1), draws.split(1)):
            place, coin = draw.unbind(1)  # each of shape (1,)
            # torch.where, not `if`: that would make the CPU wait for the GPU.
            filling = self.count < len(self.images)
            swapping = ~filling & (coin < 0.5)
            slot = torch.where(filling, self.count, (place * len(self.images)).long())
            old = self.images[slot]  # a copy, as slot is a tensor
            shown.append(torch.where(swapping, old, image))
            self.images[slot] = torch.where(filling | swapping, image, old)
            self.count += filling
        return torch.cat(shown)


# ---- Training (Sec. 3.3, 4 and 7.1) --------------------------------------------------------------
# From Part II: exchange(b, ...) is b.exchange(...), and average_... are means, over all GPUs;
# engine.fast(G) is G, compiled on GPUs; engine.adam(G, F) is always the same Adam, of G and F.


def learning_rate(config, epoch):
    """By default 2e-4 in epochs 0 to 99, then 100/101, ..., 1/101 of that (authors' code)."""
    late = max(0, epoch + 1 - config.epochs)
    return config.lr * max(0.0, 1.0 - late / (config.decay_epochs + 1))


def six_images(G, F, x, y, lambda_identity=0.5):
    """The six images of the table at the top, in three calls of a generator.

    back_x needs fake_y, so G(x) comes first. Then F takes its three inputs in one batch, then G
    its other two: faster, with the same result, as InstanceNorm treats each image alone.
    """
    fake_y = G(x)
    if lambda_identity > 0:
        back_x, fake_x, same_x = in_one_batch(F, fake_y, y, x)
        back_y, same_y = in_one_batch(G, fake_x, y)
    else:
        back_x, fake_x = in_one_batch(F, fake_y, y)
        back_y = G(fake_x)
        same_x, same_y = x, y  # stand-ins, whose identity loss is 0
    return fake_x, fake_y, back_x, back_y, same_x, same_y


def minimise(loss, optimizer):
    """A step of Adam. G's loss passes through D_Y; `inputs` keeps gradients from D_Y's weights."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    average_gradients(parameters)
    optimizer.step()


class CycleGAN(nn.Module):
    """What training changes: four networks, two image buffers, two optimizers.

        for epoch in range(config.epochs + config.decay_epochs):
            model.set_learning_rate(learning_rate(config, epoch))
            for x, y in unpaired_batches:
                losses = model.step(x, y)

    You may replace any before the first step by one that treats each image alone (no BatchNorm).
    """

    def __init__(self, config, device="cpu", precision="auto", eager=False):
        super().__init__()
        self.config = config
        self.G = Generator(config.width, config.blocks)  # X -> Y
        self.F = Generator(config.width, config.blocks)  # Y -> X
        self.D_X = Discriminator(config.width)           # is it x, or F(y)?
        self.D_Y = Discriminator(config.width)           # is it y, or G(x)?
        self.buffer_X = ImageBuffer(config.buffer_size, config.image_size)  # of F(y), for D_X
        self.buffer_Y = ImageBuffer(config.buffer_size, config.image_size)  # of G(x), for D_Y
        self.steps = 0                                   # done so far
        self.engine = Engine(config, device, precision, eager)  # device, Adam, speed (Part II)
        initialise(self, torch.Generator().manual_seed(config.seed))  # again, from one seed
        self.to(self.engine.device, memory_format=memory_format(self.engine.device))

    def set_learning_rate(self, lr):
        self.engine.lr.fill_(lr)

    def step(self, x, y):
        """One training step on x and y, each (N, 3, image_size, image_size), drawn independently.

        Returns {name: detached scalar}: gan, cycle, identity with their weights, D_X and D_Y
        halved. Raises ValueError for other shapes. The learning rate is the caller's to set.
        """
        check_step(self, x, y)
        draws = buffer_draws(self.config.seed, self.steps, x)  # (2, N, 2), a function of the step
        losses = self.engine.run(self, x, y, draws)  # calls self.update(x, y, draws)
        self.steps += 1
        return losses

    def update(self, x, y, draws):
        """Six images, five losses, two updates (Eq. 3 and 4, and identity)."""
        c = self.config
        G, F, D_X, D_Y = self.engine.fast(self.G, self.F, self.D_X, self.D_Y)
        fake_x, fake_y, back_x, back_y, same_x, same_y = six_images(G, F, x, y, c.lambda_identity)

        # G and F minimise   Eq. 1, Sec. 4:  (D_Y(G(x)) - 1)^2 + (D_X(F(y)) - 1)^2    weight 1
        #                    Eq. 2:          ||F(G(x)) - x||_1 + ||G(F(y)) - y||_1    weight 10
        #                    Sec. 5.2:       ||F(x) - x||_1    + ||G(y) - y||_1       weight 5
        gan = c.lambda_gan * (adversarial_loss(D_Y(fake_y), REAL, c.objective)
                              + adversarial_loss(D_X(fake_x), REAL, c.objective))
        cycle = cycle_loss(x, y, back_x, back_y, c.lambda_forward, c.lambda_backward)
        identity = c.lambda_identity * identity_loss(
            x, y, same_x, same_y, c.lambda_forward, c.lambda_backward)

        # D_X minimises      Eq. 1, Sec. 4:  ((D_X(x) - 1)^2 + D_X(shown_x)^2) / 2, D_Y likewise
        shown_x = exchange(self.buffer_X, fake_x.detach(), draws[0])
        shown_y = exchange(self.buffer_Y, fake_y.detach(), draws[1])
        loss_D_X = discriminator_loss(D_X, x, shown_x, c.objective)
        loss_D_Y = discriminator_loss(D_Y, y, shown_y, c.objective)

        # All five losses precede both updates; one Adam for two networks (authors' code).
        minimise(gan + cycle + identity, self.engine.adam(self.G, self.F))
        minimise(loss_D_X + loss_D_Y, self.engine.adam(self.D_X, self.D_Y))
        return detach_and_average({"gan": gan, "cycle": cycle, "identity": identity,
                                   "D_X": loss_D_X, "D_Y": loss_D_Y})


# ==== Part II: what it takes to use the method. You may stop reading here. ========================

__all__ = ["Config", "CycleGAN", "Discriminator", "Generator", "ImageBuffer", "UserError",
           "adversarial_loss", "cycle_loss", "discriminator_loss", "find_pictures",
           "identity_loss", "learning_rate", "load_checkpoint", "load_generator", "load_networks",
           "read_picture", "save_checkpoint", "six_images", "to_pictures", "to_tensor", "translate"]

# ---- Errors and settings -------------------------------------------------------------------------


class UserError(ValueError):
    """An error that the user can fix, said in one line."""

    def __str__(self):  # reasons of other libraries and names of files may have several lines
        return " ".join(line.strip() for line in super().__str__().splitlines())


def out_of_memory(error):
    """Whether an exception says that memory ran out, on whatever device."""
    words = "out of memory", "allocate memory"
    return isinstance(error, MemoryError) or any(w in str(error) for w in words)


LEAST = {"width": 1, "batch_size": 1}  # smallest values; 0 for the other settings


def fill_in_and_check(config):
    """Replaces None in a new Config. Raises UserError naming the first impossible value."""
    def require(name, possible, rule):
        if not possible:
            raise UserError(f"{name} must be {rule}, not {getattr(config, name)!r}")

    size = config.image_size
    require("image_size", isinstance(size, int) and size >= 24 and size % 4 == 0,
            "a multiple of 4, at least 24")
    defaults = {"load_size": round(size * 286 / 256), "blocks": 9 if size >= 256 else 6}
    for name, value in defaults.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)  # frozen for everyone else
    for f in fields(config):
        value, least = getattr(config, f.name), LEAST.get(f.name, 0)
        if f.type is int:
            require(f.name, isinstance(value, int) and value >= least,
                    f"a whole number, at least {least}")
        elif f.type is bool:
            require(f.name, isinstance(value, bool), "True or False")
        elif f.type is float:
            require(f.name, isinstance(value, (int, float)) and 0 <= value < 1e300,
                    "a number, at least 0")
    require("load_size", config.load_size >= size, f"at least image_size, {size}")
    require("objective", config.objective in ("lsgan", "log"), "lsgan or log")
    require("lr", config.lr > 0, "above 0")
    require("beta1", config.beta1 < 1, "below 1")
    require("seed", config.seed < 2**63, "below 2^63")
    require("epochs", 0 < config.epochs + config.decay_epochs < 10**6,
            "between 1 and a million, together with decay_epochs")


# ---- Layers, made faster -------------------------------------------------------------------------
# On CUDA images lie in memory as channels_last (NHWC), which its convolutions want. PyTorch's own
# norm and padding would return NCHW. On a CPU images stay NCHW.


class InstanceNorm(nn.Module):
    """Normalises each channel of each image to mean 0 and variance 1; keeps the memory layout."""

    def forward(self, h):
        if h.is_contiguous():  # NCHW: one channel a group, the fastest on a CPU
            return torch.group_norm(h, h.shape[1])
        wide = h if h.dtype == torch.float64 else h.float()  # statistics in bfloat16 would be wrong
        variance, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)
        return ((wide - mean) * torch.rsqrt(variance + 1e-5)).to(h.dtype)


class ReflectionPad(nn.ReflectionPad2d):
    """Reflection padding that keeps the memory layout, backward too."""

    def forward(self, h):
        if h.is_contiguous():
            return super().forward(h)
        last = h.movedim(1, -1)  # (N, H, W, C): padded as three dimensions, C by nothing
        return nn.functional.pad(last, (0, 0, *self.padding), "reflect").movedim(-1, 1)


class LastConvolution(nn.Conv2d):
    """7x7 convolution with 3 filters, which would leave most of a CPU's vector lanes empty.

    There, four copies of the filters, each shifted down by one row, make 12 filters of 10x7 with
    stride 4: the same sums, four rows at a time, in half the time. H must be a multiple of 4.
    """

    def forward(self, h):
        if not h.is_contiguous():
            return super().forward(h)
        filters = [nn.functional.pad(self.weight, (0, 0, k, 3 - k)) for k in range(4)]
        rows = nn.functional.conv2d(h, torch.cat(filters), self.bias.repeat(4), stride=(4, 1))
        return rows.unflatten(1, (4, 3)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def check_sides(images):
    """Raises ValueError unless height and width are multiples of 4, at least 8."""
    height, width = images.shape[2:]
    if height % 4 or width % 4 or height < 8 or width < 8:
        raise ValueError(f"height and width must be multiples of 4, at least 8, not {height} x "
                         f"{width}; translate() takes pictures of any size")


def in_one_batch(network, *batches):
    """[network(batch) for batch in batches], in one call of the network."""
    return network(torch.cat(batches)).chunk(len(batches))


# ---- Running the step on a device ----------------------------------------------------------------


def choose_device(device, precision="auto"):
    """(torch.device, precision); "auto" is CUDA, and bf16 where native. Raises UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if str(device) == "auto":
        device = "cuda" if available["cuda"] else "cpu"
    device = torch.device(device)
    if not available.get(device.type, True):
        raise UserError(f"--device {device}: PyTorch finds none on this machine; try --device cpu")
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


def check_step(model, x, y):
    """Raises ValueError if a step cannot take these images, or not with these networks."""
    size, engine = model.config.image_size, model.engine
    if x.shape != y.shape or x.shape[1:] != (3, size, size) or len(x) == 0:
        raise ValueError(f"x and y must both be (N, 3, {size}, {size}), as image_size is {size}; "
                         f"they are {tuple(x.shape)} and {tuple(y.shape)}")
    if x.device.type != engine.device.type:
        raise ValueError(f"x is on {x.device}, the model on {engine.device}, as said when it was "
                         "made: CycleGAN(config, device)")
    if engine.trained not in (None, networks_and_type(model)):
        raise ValueError("a network, or the type of its weights, changed after the first step or "
                         "after loading; change them on a new CycleGAN")


def networks_and_type(model):
    return model.G, model.F, model.D_X, model.D_Y, next(model.parameters()).dtype


def buffer_draws(seed, step, images):
    """Place and coin for each image in both buffers: (2, N of all processes, 2) on [0, 1)."""
    random = np.random.default_rng([seed, 0, step])
    draws = random.random((2, len(images) * rank_and_world_size()[1], 2), np.float32)  # never 1
    return to_device(torch.from_numpy(draws), images.device)


class Engine:
    """Runs CycleGAN.update: holds the optimizers and, on CUDA, what makes it fast.

    precision: "fp32"; "bf16", autocast in the networks; or "auto", bf16 where a GPU supports it.
    eager: on CUDA, too, nothing is compiled and no graph captured.
    """

    def __init__(self, config, device, precision, eager=False):
        self.device, self.precision = choose_device(device, precision)
        self.fuses = self.device.type == "cuda" and not eager
        self.betas = (float(config.beta1), 0.999)
        # The rate is a tensor, which both optimizers read: a CUDA graph would bake a number in.
        if self.device.type == "cuda":
            self.lr = torch.tensor(config.lr, dtype=torch.float32, device=self.device)
        else:
            self.lr = torch.tensor(config.lr, dtype=torch.float64)
        self.optimizers = {}  # networks -> their Adam
        self.networks = {}    # networks -> what stands in for them
        self.trained = None   # after the first step: networks_and_type
        self.graph = None

    def adam(self, *networks):
        """The Adam of all parameters of some networks, made at the first call."""
        if networks not in self.optimizers:
            parameters = [p for n in networks for p in n.parameters() if p.requires_grad]
            kind = self.device.type
            self.optimizers[networks] = torch.optim.Adam(
                parameters, self.lr, self.betas, fused=kind in ("cpu", "cuda"),
                capturable=kind == "cuda")
        return self.optimizers[networks]

    def fast(self, *networks):
        """Networks as the step calls them: on CUDA compiled; in bfloat16 if that is asked for."""
        if networks not in self.networks:
            for network in networks:
                network.to(self.device, memory_format=memory_format(self.device))
                take_from_rank_0(network)
            fast = compiled(networks) if self.fuses else networks
            if self.precision == "bf16":
                fast = [in_bfloat16(network) for network in fast]
            self.networks[networks] = fast
        return self.networks[networks]

    def run(self, model, *tensors):
        """model.update(*tensors), on CUDA as a captured graph, unless processes talk within it."""
        if self.graph is None and self.fuses and rank_and_world_size()[1] == 1:
            self.graph = CudaGraph(model.update, self.device)
        losses = self.graph(*tensors) if self.graph else model.update(*tensors)
        self.trained = networks_and_type(model)
        return losses


def in_bfloat16(network):
    """Computes the network in bfloat16; its weights and its result keep their type."""
    def call(images):
        with torch.autocast(images.device.type, torch.bfloat16):
            return network(images).to(images.dtype)

    return call


def compiled(networks):
    """The networks compiled; if that fails, as they are, with a warning that says why."""
    try:
        torch.compile(lambda h: h * h + 1)(torch.ones(8, device="cuda"))
    except Exception as error:  # a driver, Triton, a compiler: each fails in its own way
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"torch.compile fails, so steps are slower: {type(error).__name__} {reason} "
                      "(with --eager it is not tried)", stacklevel=2)
        return networks
    torch._dynamo.config.cache_size_limit = 64  # past 8 sizes it would go on uncompiled
    return [torch.compile(network, dynamic=False) for network in networks]


class CudaGraph:
    """A function of CUDA tensors, captured at its fourth call as a CUDA graph, then replayed.

    The first three calls are real ones, in which PyTorch compiles and picks its kernels. Tensors
    of another shape start anew. What cannot be captured runs as it is, with a warning.
    """

    def __init__(self, function, device):
        self.function, self.inputs = function, []
        self.stream = torch.cuda.Stream(device)  # of eager calls and of the capture

    def __call__(self, *tensors):
        if [t.shape for t in self.inputs] != [t.shape for t in tensors]:
            self.inputs = [tensor.clone() for tensor in tensors]
            self.calls, self.graph = 0, None
        self.calls += 1
        if self.calls == 4:
            self.capture()
        if self.graph is None:
            return self.run_eagerly(tensors)
        for static, tensor in zip(self.inputs, tensors):
            static.copy_(tensor)
        self.graph.replay()
        return {name: value.clone() for name, value in self.result.items()}

    def run_eagerly(self, tensors):
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = self.function(*tensors)
        current.wait_stream(self.stream)
        return result

    def capture(self):
        current = torch.cuda.current_stream(self.stream.device)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.function(*self.inputs)
        except RuntimeError as error:
            self.graph = None
            torch.cuda.set_stream(current)  # torch.cuda.graph may have failed to
            torch.backends.cudnn.benchmark = False  # would free memory and fail (pytorch 180395)
            warnings.warn("CUDA cannot capture the step, so steps are slower: "
                          f"{error.__context__ or error} (with --eager it is not tried)",
                          stacklevel=2)


# ---- Several processes, each with its share of a batch -------------------------------------------


def rank_and_world_size():
    """This process's rank, and how many train together; (0, 1) for one alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def take_from_rank_0(network):
    """Gives every process the weights of rank 0, as custom networks may start with others."""
    if rank_and_world_size()[1] > 1:
        for tensor in network.state_dict().values():
            distributed.broadcast(tensor, 0)


def exchange(buffer, images, draws):
    """buffer.exchange; every process has the same buffer, and passes it the images of all."""
    rank, world_size = rank_and_world_size()
    if len(buffer.images) == 0:
        return images
    if world_size > 1:
        images = images.contiguous()
        gathered = [torch.empty_like(images) for _ in range(world_size)]
        distributed.all_gather(gathered, images)
        images = torch.cat(gathered)
    return buffer.exchange(images, draws).chunk(world_size)[rank]


def average(tensors):
    """Replaces each tensor by its mean over all processes, with one reduction for all of them."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return
    in_memory = [t.as_strided((t.numel(),), (1,)) for t in tensors]  # a view in any layout
    flat = torch.cat(in_memory)
    distributed.all_reduce(flat)
    flat /= world_size
    for tensor, mean in zip(in_memory, flat.split([t.numel() for t in tensors])):
        tensor.copy_(mean)


def average_gradients(parameters):
    average([p.grad for p in parameters if p.grad is not None])


def detach_and_average(losses):
    """{name: loss} -> the same, detached, each its mean over all processes."""
    losses = {name: loss.detach() for name, loss in losses.items()}
    average(list(losses.values()))
    return losses


# ---- Files ---------------------------------------------------------------------------------------


class NotReplaced(UserError):
    """A file was written, but could not take the place of the old one."""


def write_file(path, chunks, keep=False):
    """Writes bytes beside `path`, syncs, renames: it is always the old file or the new.

    With `keep`, a new file that cannot take the place of the old one stays beside it: latest.pt
    as latest.new.pt. Raises UserError; NotReplaced, if it is only the place that it cannot take.
    """
    part = path.with_name(f"cyclegan-{os.urandom(8).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        replace_file(part, path)
    except NotReplaced as error:
        if not keep:
            raise
        new = path.with_suffix(f".new{path.suffix}")
        new.unlink(missing_ok=True)
        os.rename(part, new)
        raise NotReplaced(f"{error}; the new one is whole: rename {new} to {path.name}") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if os.path.exists(part):  # only after a failure
            part.unlink()


def replace_file(part, path):
    """Renames; if that fails, again for five seconds: a virus scanner may hold the old file."""
    for _ in range(25):
        try:
            os.replace(part, path)
            return
        except OSError as error:
            reason = error.strerror or error
            time.sleep(0.2)
    raise NotReplaced(f"cannot replace {path}: {reason}")


def optimizers(model):
    return model.engine.adam(model.G, model.F), model.engine.adam(model.D_X, model.D_Y)


def save_checkpoint(path, model, place, keep=False):
    """Writes the whole state of a CycleGAN to a file, with `place`, a dict of plain values.

    keep: see write_file. Raises UserError.
    """
    state = {"config": asdict(model.config), "precision": model.engine.precision,
             "steps": model.steps, "place": place, "model": model.state_dict(),
             "adams": [adam.state_dict()["state"] for adam in optimizers(model)]}
    file = io.BytesIO()
    torch.save(state, file)
    write_file(Path(path), [file.getbuffer()], keep)


def read_checkpoint(path):
    """The dict in a checkpoint: tensors and plain values; no code in it runs. Raises UserError."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile  # a wrong checksum, at which torch.load does not look
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the sentences below say
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file makes the readers raise anything at all
        raise UserError(f"{path} is damaged or not a checkpoint "
                        f"({type(error).__name__})") from error


def load_checkpoint(path, device="cpu", eager=False):
    """The (CycleGAN, place) in a file of save_checkpoint; device, eager: of CycleGAN.

    Raises UserError if it is not one, is damaged, or holds networks other than this module's.
    """
    saved = read_checkpoint(path)
    try:
        model = CycleGAN(saved_config(saved), device, saved["precision"], eager)
        state, own = saved["model"], model.state_dict()
        for key in ("buffer_X.images", "buffer_Y.images"):
            if state[key].numel() == 0:  # as older files have them before the first step
                state[key] = own[key]
        if state.keys() != own.keys():
            raise ValueError(f"it has other networks: {min(state.keys() ^ own.keys())}")
        model.to(state["buffer_X.images"].dtype).load_state_dict(state)
        model.steps = int(saved["steps"])
        for adam, moments in zip(optimizers(model), saved["adams"], strict=True):
            load_moments(adam, moments, model)
        if model.steps > 0:
            model.engine.trained = networks_and_type(model)
        return model, saved["place"]
    except Exception as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{path} is not a checkpoint of a run ({error})") from error


def saved_config(saved):
    """The Config in a checkpoint. Those from before `squash` had their pictures squashed."""
    return Config(**{"squash": True, **saved["config"]})


def load_moments(adam, state, model):
    """Restores saved moments into a new Adam."""
    if model.steps > 0 and len(state) != len(adam.param_groups[0]["params"]):
        raise ValueError("it lacks moments of Adam")
    adam.load_state_dict({**adam.state_dict(), "state": state})
    adam.param_groups[0]["lr"] = model.engine.lr  # the tensor itself; load_state_dict copied it
    for parameter, moments in adam.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].shape != parameter.shape:  # the fused Adam would write past its end
                raise ValueError(f"{name} has the shape of no parameter")
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


def load_generator(path, direction="AtoB", device="cpu"):
    """G ("AtoB") or F ("BtoA") of a run's folder or checkpoint: in eval mode, without gradients.

    The authors' files will do, too: one such as 200_net_G_B.pth, taken for what it is, or a
    folder with latest_net_G_A.pth and _B.pth or those of epochs, of which the direction picks
    one, or with latest_net_G.pth. Blocks and width follow from the weights. `.config` of what is
    returned is the run's Config, None for the authors' files. Raises UserError naming the file.
    """
    if direction not in ("AtoB", "BtoA"):
        raise ValueError(f'direction must be "AtoB" or "BtoA", not {direction!r}')
    name = "G" if direction == "AtoB" else "F"
    file = find_network(Path(path), name) or Path(path) / "latest.pt"
    generator = network_of(read_checkpoint(file), name, file)
    device = torch.device(device)
    generator.to(device, memory_format=memory_format(device))
    return generator.eval().requires_grad_(False)


AUTHORS = {"G": "G_A", "F": "G_B", "D_X": "D_B", "D_Y": "D_A"}  # their D_A judges what G_A makes


def load_networks(path):
    """Those of the four networks that a run, a checkpoint or the authors' files hold, by name.

    Of a single generator's file, or of a folder with latest_net_G.pth, it is G. Raises UserError.
    """
    files = {name: find_network(Path(path), name) for name in AUTHORS}
    saved = {file: read_checkpoint(file) for file in set(files.values()) if file}
    if not saved:
        raise UserError(f"{path} holds no networks: neither latest.pt nor latest_net_G_A.pth")
    networks, taken = {}, set()
    for name, file in files.items():
        if file and ("model" in saved[file] or file not in taken):
            networks[name] = network_of(saved[file], name, file)
            taken.add(file)
    return networks


def find_network(path, name):
    """The file of a network in a folder, of the authors' epochs the latest; or None."""
    if not path.is_dir():
        return path
    theirs = f"net_{AUTHORS[name]}.pth"
    epochs = sorted(path.glob(f"*_{theirs}"), key=lambda file: (len(file.name), file.name))
    files = [path / "latest.pt", path / f"latest_{theirs}", *epochs[::-1]]
    if name in ("G", "F") and not any(path.glob("*_net_G_?.pth")):
        files.append(path / "latest_net_G.pth")  # of a training in one direction
    return next((file for file in files if file.is_file()), None)


def network_of(saved, name, path):
    """The network of that name in a checkpoint, or the one that is in an authors' file.

    Its `.config` is the run's Config, None for the authors' files. Raises UserError.
    """
    config, generates = None, name in ("G", "F")
    try:
        if "model" in saved:
            config, prefix = saved_config(saved), f"{name}."
            saved = {key.removeprefix(prefix): value for key, value in saved["model"].items()
                     if key.startswith(prefix)}
        weights = {plain_key(key): value for key, value in saved.items()}
        width = len(weights["model.1.weight" if generates else "model.0.weight"])
        blocks = sum(key.endswith("conv_block.1.weight") for key in weights)
        network = Generator(width, blocks) if generates else Discriminator(width)
        missing, others = network.load_state_dict(weights, strict=False)
        without_effect = (".bias", ".running_mean", ".running_var", ".num_batches_tracked")
        others = [key for key in others if not key.endswith(without_effect)]
        if missing or others:
            raise ValueError(f"it lacks {missing} and has {others} besides")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        kind = "ResNet generator" if generates else "70 x 70 discriminator"
        raise UserError(f"{path} holds no {kind} from RGB ({error})") from error
    network.config = config
    return network


def plain_key(key):
    """A key of the authors' files as Generator has it."""
    for sign, kind in ((".filt", "an antialiased"), ("model.model.", "a U-Net")):
        if sign in key:
            raise ValueError(f"it is {kind} network's")
    key = key.replace("_orig_mod.", "").removeprefix("module.")
    return key.replace("conv_block.6.", "conv_block.5.")  # 6: after a dropout


# ---- Pictures ------------------------------------------------------------------------------------

SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
FORMATS = "AVIF BMP GIF JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP"  # no EPS: Pillow would execute it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # read_picture refuses
try:
    import pillow_heif  # no requirement; where it happens to be installed, HEIC is read
except ImportError:
    HEIC = "HEIC is read where the package pillow_heif is installed"
else:
    pillow_heif.register_heif_opener()
    SUFFIXES, FORMATS, HEIC = f"{SUFFIXES} .heic .heif", f"{FORMATS} HEIF", ""


def find_pictures(folder):
    """Pictures under a folder, sorted; none hidden, none in a run's folder. Raises UserError."""
    paths = [path for path in find_files(folder) if path.suffix.lower() in SUFFIXES.split()]
    if not paths:
        ignored = ignored_files(folder)
        raise UserError(f"the folder {folder} holds no pictures ({SUFFIXES})"
                        + (f"; ignored: {ignored}" if ignored else ""))
    return paths


def find_files(folder):
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    runs = {path.parent for path in folder.rglob("latest.pt")}
    return sorted(path for path in folder.rglob("*")
                  if "/." not in f"/{path.relative_to(folder).as_posix()}"
                  and runs.isdisjoint(path.parents) and (path.is_file() or path.is_symlink()))


def ignored_files(folder):
    """What find_pictures leaves out, by suffix, as "1,000 .heic, 2 .txt"; or ""."""
    counts = {}
    for path in find_files(folder):
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES.split() and path.is_file():
            counts[suffix] = counts.get(suffix, 0) + 1
    listed = ", ".join(f"{counts[suffix]:,} {suffix or 'without a suffix'}"
                       for suffix in sorted(counts, key=counts.get, reverse=True))
    return f"{listed}; {HEIC}" if HEIC and {".heic", ".heif"} & counts.keys() else listed


def read_picture(path, side=None, squash=False):
    """A picture of any mode that Pillow opens -> (H, W, 3) uint8; with `side`, at that scale.

    Turned as its EXIF data say, white where transparent, in sRGB, 16-bit greys scaled; resized
    bicubic to scaled_size. Raises UserError naming the file.
    """
    try:
        if not os.path.isfile(path):  # a pipe would never end
            raise UserError("it is not a file")
        with Image.open(path) as image:
            if image.format not in FORMATS.split():
                raise UserError(f"{image.format} is none of {FORMATS}")
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise UserError(f"more than Pillow's limit of {limit} pixels")
            if max(image.size) > 100 * min(image.size):
                raise UserError("it is more than a hundred times as long as wide")
            image = to_rgb(ImageOps.exif_transpose(image))
            size = scaled_size(*image.size, side, squash) if side else image.size
            return np.array(image.resize(size, Image.BICUBIC) if side else image)
    except Exception as error:  # a damaged file makes the decoders raise anything at all
        raise UserError(f"cannot read {path}: {error}") from error


def scaled_size(width, height, side, squash=False, at_once=False):
    """(width, height) in proportion, so that the shorter one is `side`; squashed, both are.

    at_once: smaller if it takes that to have at most max(2^20, 2 side^2) pixels, for a network
    that gets the picture whole.
    """
    if squash:
        return side, side
    scale, most = side / min(width, height), max(2**20, 2 * side**2)
    if at_once and width * height * scale**2 > most:
        scale = (most / (width * height)) ** 0.5
    return max(1, round(width * scale)), max(1, round(height * scale))


def to_rgb(image):
    """A Pillow image of any mode -> RGB, in the colours of sRGB."""
    if image.mode[0] in "IF":
        image = eight_bits(image)
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("RGB")
    return (to_srgb(image, profile) if profile else image).convert("RGB")


def eight_bits(image):
    """Greys of 16 bits, or of 32, for which no white is agreed, -> of 8."""
    grey = np.nan_to_num(np.asarray(image, np.float64))
    if grey.min() < 0:
        raise UserError("it has negative values; bring it to 8 bits, with a window of your choice")
    white = max(65535 if image.mode[0] == "I" else 1, grey.max())
    levels = (grey / white * 255).round().astype(np.uint8)
    if 0 < grey.max() < white / 16 and image.mode[0] == "I":
        warnings.warn("a 16-bit picture uses less than a sixteenth of its range: "
                      f"{levels.max() + 1} of 256 grey levels are left; bring it to 8 bits first",
                      stacklevel=2)
    return Image.fromarray(levels)


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


def pad_to_multiple_of_4(pictures):
    """(N, H, W, 3): H and W padded by reflection to the next multiples of 4 that are at least 8."""
    below, right = (max(8, n + -n % 4) - n for n in pictures.shape[1:3])
    return np.pad(pictures, ((0, 0), (0, below), (0, right), (0, 0)), mode="reflect")


@torch.no_grad()
def translate(generator, pictures, precision="fp32"):
    """(H, W, 3) or (N, H, W, 3) uint8, of any size -> the same shape, through a generator.

    Raises ValueError for other arrays.
    """
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4) or pictures.shape[-1] != 3:
        raise ValueError("pictures must be uint8 arrays (H, W, 3) or (N, H, W, 3), not "
                         f"{pictures.dtype} {pictures.shape}")
    batch = pictures if pictures.ndim == 4 else pictures[None]
    height, width = batch.shape[1:3]
    device = next(generator.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        images = generator(to_tensor(pad_to_multiple_of_4(batch), device))
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
