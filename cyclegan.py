"""CycleGAN, to be read beside its paper, from top to bottom.

Zhu, Park, Isola, Efros: "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
Networks", ICCV 2017, arXiv 1703.10593v7. "Sec." and "Eq." are that paper's; "the authors' code" is
junyanz/pytorch-CycleGAN-and-pix2pix.

There are two domains, X and Y, and only unpaired pictures x and y of them. G: X -> Y and F: Y -> X
translate; D_X tells x from F(y), D_Y tells y from G(x). X is domain A of the command line, Y is B.
"""

import io
import math
import os
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import nn

class UserError(ValueError):
    """Something that whoever runs the program can put right; the text is one line about it."""

    def __str__(self):  # other libraries' reasons and file names may have several
        return " ".join(line.strip() for line in super().__str__().splitlines())

def out_of_memory(error):
    """Whether an exception says that memory ran out, on whatever device."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "allocate memory"))

# ---- Settings ------------------------------------------------------------------------------------

def _setting(default, least, meaning):
    return field(default=default, metadata={"least": least, "help": meaning})

@dataclass(frozen=True)
class Config:
    """All that decides the result of a training. Raises UserError naming an impossible value."""

    image_size: int = _setting(256, 24, "side of the crops, a multiple of 4 from 24 on (Sec. 7.2)")
    load_size: int = _setting(286, 24, "side that pictures are resized to (authors' code)")
    blocks: int = _setting(9, 0, "residual blocks of a generator (Sec. 7.2)")
    width: int = _setting(64, 1, "channels after the first layer of each network (Sec. 7.2)")
    objective: str = _setting("lsgan", None, "lsgan (least squares, Sec. 4) or log (Eq. 1)")
    lambda_gan: float = _setting(1.0, 0, "weight of the adversarial losses (1 in Eq. 3)")
    lambda_forward: float = _setting(10.0, 0, "weight of the forward cycle, F(G(x)) - x (Eq. 2, 3)")
    lambda_backward: float = _setting(10.0, 0, "weight of the backward one, G(F(y)) - y (Eq. 2, 3)")
    lambda_identity: float = _setting(0.5, 0, "weight of identity, times the cycle's (Sec. 5.2)")
    buffer_size: int = _setting(50, 0, "generated images kept per discriminator (Sec. 4)")
    batch_size: int = _setting(1, 1, "pictures of each domain, per process and step (Sec. 4)")
    lr: float = _setting(2e-4, 0, "Adam's learning rate before the decay (Sec. 4)")
    beta1: float = _setting(0.5, 0, "Adam's first beta; the second is 0.999 (authors' code)")
    epochs: int = _setting(100, 0, "epochs at the full learning rate (Sec. 7.1)")
    decay_epochs: int = _setting(100, 0, "further epochs, the rate falling to zero (Sec. 7.1)")
    seed: int = _setting(0, 0, "decides weights, order, crops, flips and the buffers' draws")

    def __post_init__(self):
        def check(name, possible, rule):
            if not possible:
                raise UserError(f"{name} must be {rule}, not {getattr(self, name)!r}")

        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            if f.type is not str:
                check(f.name, isinstance(value, (int, f.type)) and least <= value < 1e300,
                      f"{'a whole' if f.type is int else 'a'} number, at least {least}")
        check("image_size", self.image_size % 4 == 0, "a multiple of 4")
        check("load_size", self.load_size >= self.image_size, f"{self.image_size} or more")
        check("objective", self.objective in ("lsgan", "log"), "lsgan or log")
        check("lr", self.lr > 0, "above 0")
        check("beta1", self.beta1 < 1, "below 1")
        check("seed", self.seed < 2**63, "below 2^63")
        check("epochs", 0 < self.epochs + self.decay_epochs < 10**6,
              "between 1 and a million, together with decay_epochs")

# ---- Networks (Sec. 7.2) -------------------------------------------------------------------------
# No bias stands before an InstanceNorm, which would subtract it again.

class InstanceNorm(nn.Module):
    """Each channel of each picture less its mean, over its deviation, in the layout of h."""

    def forward(self, h):
        if h.is_contiguous():  # NCHW: one channel a group, the fastest on a CPU
            return torch.group_norm(h, h.shape[1])
        wide = h if h.dtype == torch.float64 else h.float()  # statistics take float32 at least
        variance, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)
        return ((wide - mean) * torch.rsqrt(variance + 1e-5)).to(h.dtype)

class ReflectionPad(nn.ReflectionPad2d):
    """Keeps the layout of h; PyTorch's own padding and norms return NCHW on CUDA."""

    def forward(self, h):
        padded = super().forward(h)
        return padded if h.is_contiguous() else padded.to(memory_format=torch.channels_last)

def c7s1(channels, k):
    """7x7 convolution with k filters and stride 1, InstanceNorm, ReLU."""
    return [ReflectionPad(3), nn.Conv2d(channels, k, 7, bias=False), InstanceNorm(), nn.ReLU(True)]

def d(channels, k):
    """3x3 convolution with k filters and stride 2, InstanceNorm, ReLU."""
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

def C(channels, k, stride=2, norm=True):
    """4x4 convolution with k filters, InstanceNorm but in the first layer, LeakyReLU 0.2."""
    return [nn.Conv2d(channels, k, 4, stride, padding=1, bias=not norm),
            *([InstanceNorm()] if norm else []), nn.LeakyReLU(0.2, True)]

def initialise(network, random=None):
    """Draws weights from N(0, 0.02), sets biases to 0 (Sec. 7.1)."""
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, 0, 0.0 if name.endswith("bias") else 0.02, random)

class LastConvolution(nn.Conv2d):
    """7x7 convolution with 3 filters, which would leave most of a CPU's vector lanes empty.

    There four copies, each shifted down by one row, make 12 filters of 10x7 with stride 4: the same
    sums, four rows at a time, in about half of the time. The height must be a multiple of 4.
    """

    def forward(self, h):
        if not h.is_contiguous():  # channels last, on CUDA
            return super().forward(h)
        filters = torch.cat([nn.functional.pad(self.weight, (0, 0, k, 3 - k)) for k in range(4)])
        rows = nn.functional.conv2d(h, filters, self.bias.repeat(4), stride=(4, 1))
        return rows.unflatten(1, (4, 3)).permute(0, 2, 3, 1, 4).flatten(2, 3)

class Generator(nn.Module):
    """c7s1-64, d128, d256, R256 times blocks, u128, u64, c7s1-3 (Sec. 7.2, where width is 64).

    (N, 3, H, W) in [-1, 1] -> the same; H and W are multiples of 4, at least 8. The state dict has
    the authors' keys, less the biases that a norm would cancel.
    """

    def __init__(self, width=64, blocks=9):
        super().__init__()
        self.model = nn.Sequential(                  # 256 x 256 become
            *c7s1(3, width),                         #   64 x 256 x 256
            *d(width, 2 * width),                    #  128 x 128 x 128
            *d(2 * width, 4 * width),                #  256 x  64 x  64
            *(R(4 * width) for _ in range(blocks)),  #  256 x  64 x  64
            *u(4 * width, 2 * width),                #  128 x 128 x 128
            *u(2 * width, width),                    #   64 x 256 x 256
            ReflectionPad(3), LastConvolution(width, 3, 7), nn.Tanh())  # 3 x 256 x 256
        initialise(self)

    def forward(self, images):
        return self.model(images).to(images.dtype)  # losses take float32 at least

class Discriminator(nn.Module):
    """C64, C128, C256, C512, then one filter: the 70 x 70 PatchGAN (Sec. 7.2, where width is 64).

    (N, 3, H, W) in [-1, 1] -> (N, 1, H', W') scores, high for real, each of an overlapping patch of
    70 x 70 pixels; no sigmoid. With a stride of 2 in C512 too, as one can read the paper, patches
    would have 94 x 94 pixels; the authors' codes have 1.
    """

    def __init__(self, width=64):
        super().__init__()
        self.model = nn.Sequential(                  # 256 x 256 become
            *C(3, width, norm=False),                #   64 x 128 x 128
            *C(width, 2 * width),                    #  128 x  64 x  64
            *C(2 * width, 4 * width),                #  256 x  32 x  32
            *C(4 * width, 8 * width, stride=1),      #  512 x  31 x  31
            nn.Conv2d(8 * width, 1, 4, padding=1))   #    1 x  30 x  30
        initialise(self)

    def forward(self, images):
        return self.model(images).to(images.dtype)  # losses take float32 at least

# ---- Losses (Sec. 3 to 5.2) ----------------------------------------------------------------------

def adversarial_loss(scores, real, objective):
    """An expectation of Eq. 1 as a loss: how far scores are from saying `real`, True or False.

    "log": -log D for real, -log(1 - D) for not, where D = sigmoid(scores); "lsgan" (Sec. 4):
    (D - 1)^2 and D^2, where D = scores. The mean over pictures and patches comes last. -> 0-d

    G minimises it with real=True: -log D(G(x)), not log(1 - D(G(x))), as in both authors' codes.
    """
    if objective == "log":  # -log sigmoid(s) = softplus(-s), which never overflows
        return nn.functional.softplus(-scores if real else scores).mean()
    return (scores - float(real)).square().mean()

def L1(a, b):
    """The norm of Eq. 2 per value: the mean absolute difference. -> 0-d tensor."""
    return (a - b).abs().mean()

def together(network, *batches):
    """What a network makes of each batch, by one call: InstanceNorm is per picture, so it may."""
    return network(torch.cat(batches)).chunk(len(batches))

def discriminator_loss(D, real, fake, buffer, draws, objective):
    """D's part of Eq. 1, halved (Sec. 7.1), on what the buffer gives for `fake`. -> 0-d"""
    on_real, on_fake = together(D, real, buffer.exchange(fake.detach(), draws))
    return (adversarial_loss(on_real, True, objective)
            + adversarial_loss(on_fake, False, objective)) / 2

# ---- Several processes, started by torchrun, each with its share of a batch ----------------------

def processes():
    """(rank, number) of this among the processes that train together; (0, 1) for one alone."""
    alone = not (dist.is_available() and dist.is_initialized())
    return (0, 1) if alone else (dist.get_rank(), dist.get_world_size())

def average(tensors):
    """Puts in place of each tensor its mean over all processes; they travel as one flat tensor."""
    if processes()[1] > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor) / processes()[1])

def gather(images):
    """(N, 3, H, W) of every process -> those of all, in the order of the ranks."""
    if processes()[1] == 1:
        return images
    everyones = [images.new_empty(images.shape) for _ in range(processes()[1])]
    dist.all_gather(everyones, images.contiguous())
    return torch.cat(everyones)

# ---- The buffer of generated images (Sec. 4) -----------------------------------------------------

class ImageBuffer(nn.Module):
    """`size` earlier generated images of one domain, for its discriminator (authors' code).

    While it fills, an image is stored and returned. From then on it is returned with probability
    1/2; else a stored one, drawn at random, is returned, and leaves its place to the new one.
    """

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.register_buffer("images", torch.zeros(size, 0, 0, 0))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def exchange(self, images, draws=None):
        """(N, 3, H, W) -> the same shape, decided for one image after another, on the device.

        draws: (N, 2) in [0, 1), two random numbers per image. Another H or W empties the buffer.
        Of several processes each has the same buffer, for the images of all (so draws for all).
        """
        if self.size == 0:
            return images
        rank, number = processes()
        images = gather(images)
        if self.images.shape[1:] != images.shape[1:]:
            self.images, self.count = images.new_zeros(self.size, *images.shape[1:]), self.count * 0
        draws = torch.rand(len(images), 2, device=images.device) if draws is None else draws
        returned = []
        for image, where, whether in zip(images.split(1), *draws.split(1, 1)):
            filling = self.count < self.size
            place = torch.where(filling, self.count, (where * self.size).long())
            swap = ~filling & (whether < 0.5)
            stored = self.images.index_select(0, place)
            returned.append(torch.where(swap, stored, image))
            self.images[place] = torch.where(filling | swap, image, stored)
            self.count += filling
        return torch.cat(returned).chunk(number)[rank]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        shape = state_dict[prefix + "images"].shape[1:]  # not known before the first exchange
        self.images = self.images.new_zeros(self.size, *shape)
        if not 0 <= state_dict[prefix + "count"].item() <= self.size:
            raise ValueError(f"{prefix}count is no number of images")
        super()._load_from_state_dict(state_dict, prefix, *args)

# ---- On CUDA: fused kernels, in one recording ----------------------------------------------------

def compiled(networks, device):
    """The networks, on CUDA compiled; where that fails, as they are, with a warning."""
    if torch.device(device).type != "cuda":
        return networks
    try:
        torch.compile(lambda h: h * h + 1)(torch.ones(8, device=device))
    except Exception as error:  # a driver, Triton, a compiler: each fails in its own way
        warnings.warn("steps are slower here, as torch.compile fails: "
                      f"{type(error).__name__} {str(error).strip().partition(chr(10))[0]}")
        return networks
    torch._dynamo.config.recompile_limit = 64  # past 8 sizes it would go on uncompiled, in silence
    return tuple(torch.compile(network, dynamic=False) for network in networks)

class Recording:
    """A function of CUDA tensors that is recorded as one CUDA graph, which its later calls replay.

    The first three calls are real ones, in which PyTorch compiles and picks its kernels. Tensors of
    another shape start anew. What cannot be recorded goes on unrecorded, with a warning.
    """

    def __init__(self, function):
        self.function, self.shapes, self.stream = function, None, None

    def __call__(self, *tensors):
        self.stream = self.stream or torch.cuda.Stream(tensors[0].device)  # the one that records
        here = torch.cuda.current_stream(tensors[0].device)
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        if self.shapes != shapes:
            self.shapes, self.calls, self.graph = shapes, 0, None
        if self.calls == 3:
            self.inputs, self.graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.result = self.function(*self.inputs)
            except RuntimeError as error:
                torch.cuda.set_stream(here)  # torch.cuda.graph may have failed to
                self.graph = None  # and the memory that it holds
                warnings.warn("steps are slower here, as CUDA cannot record them: "
                              f"{error.__context__ or error}")
        self.calls += 1
        if self.graph:
            for fixed, tensor in zip(self.inputs, tensors):
                fixed.copy_(tensor)
            self.graph.replay()
            return self.result.clone()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = self.function(*tensors)
        here.wait_stream(self.stream)
        return result

# ---- Training (Sec. 4 and 7.1) -------------------------------------------------------------------

LOSSES = ("gan", "cycle", "identity", "D_X", "D_Y")

def learning_rate(config, epoch):
    """Adam's rate in an epoch counted from 0: constant, then linear to 1/101 in the last of 100."""
    late = max(0, epoch + 1 - config.epochs) / (config.decay_epochs + 1)
    return config.lr * max(0.0, 1 - late)

def update(adam, loss):
    """One step of Adam; gradients are computed of its own parameters and of no others."""
    parameters = adam.param_groups[0]["params"]
    adam.zero_grad()
    loss.backward(inputs=parameters)
    average([parameter.grad for parameter in parameters])
    adam.step()

class CycleGAN(nn.Module):
    """All that training changes: G, F, D_X, D_Y, a buffer for either D, an Adam for either pair.

    precision: "bf16" for networks under autocast, while weights, losses and Adam stay in float32;
    "fp32"; or "auto", bf16 on a CUDA GPU that has it. After .double() all of it computes in
    float64. `steps` counts the steps done.
    """

    def __init__(self, config, device="cpu", precision="auto"):
        super().__init__()
        kind = torch.device(device).type
        self.config, self.precision, self.steps = config, pick(kind, precision)[1], 0
        self.G, self.F = (Generator(config.width, config.blocks) for _ in "GF")
        self.D_X, self.D_Y = (Discriminator(config.width) for _ in "XY")
        self.buffer_X, self.buffer_Y = (ImageBuffer(config.buffer_size) for _ in "XY")
        initialise(self, torch.Generator().manual_seed(config.seed))
        self.to(device, memory_format=layout(device))
        rate = torch.tensor(config.lr, device=device) if kind == "cuda" else config.lr
        self.adam_G, self.adam_D = (
            torch.optim.Adam([*a.parameters(), *b.parameters()], rate, (float(config.beta1), 0.999),
                             fused=kind in ("cpu", "cuda"), capturable=kind == "cuda")
            for a, b in ((self.G, self.F), (self.D_X, self.D_Y)))
        self.networks = compiled((self.G, self.F, self.D_X, self.D_Y), device)
        self.recording = Recording(self.updates)
        self.register_load_state_dict_post_hook(  # buffers may be other tensors then
            lambda *_: vars(self.recording).update(shapes=None))

    def set_learning_rate(self, rate):
        for adam in (self.adam_G, self.adam_D):
            [group] = adam.param_groups  # on CUDA a tensor: a number would be recorded, and stay
            group["lr"] = group["lr"].fill_(rate) if group["capturable"] else rate

    def draws(self, images):
        """Random numbers for both buffers, (2, N of all processes, 2), by the seed and the step."""
        random = np.random.default_rng([self.config.seed, 0, self.steps])
        shape = (2, len(images) * processes()[1], 2)
        draws = random.random(shape, np.float32)  # rounded from 64 bits it could be 1
        return send(torch.from_numpy(draws), images.device)

    def step(self, x, y):
        """One update of G and F and one of D_X and D_Y (Eq. 3 and 4). Waits for no device.

        x, y: (N, 3, H, W) in [-1, 1]. Returns detached 0-d tensors: "gan", "cycle" and "identity"
        as they enter the sum, "D_X" and "D_Y" halved. Raises ValueError if x and y differ in shape.
        Of several processes all must take it; they get the mean losses of all their pictures.
        """
        if x.shape != y.shape:
            raise ValueError(f"x and y differ in shape: {tuple(x.shape)}, {tuple(y.shape)}")
        recorded = x.device.type == "cuda" and processes()[1] == 1
        losses = (self.recording if recorded else self.updates)(x, y, self.draws(x))
        self.steps += 1
        return dict(zip(LOSSES, losses.unbind()))

    def updates(self, x, y, draws):
        """What `step` does on the device, with nothing that waits for it. Returns its losses."""
        c, (G, F, D_X, D_Y), (draws_X, draws_Y) = self.config, self.networks, draws
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            fake_y, same_x, same_y = G(x), x, y  # same_... if there is no identity loss
            if c.lambda_identity:
                back_x, fake_x, same_x = together(F, fake_y, y, x)
                back_y, same_y = together(G, fake_x, y)
            else:
                back_x, fake_x = together(F, fake_y, y)
                back_y = G(fake_x)
            gan = c.lambda_gan * (adversarial_loss(D_Y(fake_y), True, c.objective)
                                  + adversarial_loss(D_X(fake_x), True, c.objective))
            cycle = c.lambda_forward * L1(back_x, x) + c.lambda_backward * L1(back_y, y)
            identity = c.lambda_identity * (c.lambda_backward * L1(same_y, y)
                                            + c.lambda_forward * L1(same_x, x))
            loss_X = discriminator_loss(D_X, x, fake_x, self.buffer_X, draws_X, c.objective)
            loss_Y = discriminator_loss(D_Y, y, fake_y, self.buffer_Y, draws_Y, c.objective)
        update(self.adam_G, gan + cycle + identity)
        update(self.adam_D, loss_X + loss_Y)
        losses = torch.stack([gan, cycle, identity, loss_X, loss_Y]).detach()
        average([losses])
        return losses

# ---- Files ---------------------------------------------------------------------------------------

def write_file(path, chunks):
    """Writes bytes beside `path`, syncs, renames: the old file or the new. Raises UserError."""
    part = path.with_name(path.name[-40:] + ".part")  # names have a longest length
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if os.path.exists(part):  # only after a failure
            part.unlink()

def save_checkpoint(path, model, place):
    """Writes the whole state of a CycleGAN to a file, with `place`, a dict of plain values."""
    file, adams = io.BytesIO(), [a.state_dict()["state"] for a in (model.adam_G, model.adam_D)]
    torch.save({"config": asdict(model.config), "precision": model.precision, "steps": model.steps,
                "place": place, "model": model.state_dict(), "adams": adams}, file)
    write_file(path, [file.getbuffer()])

def read_checkpoint(path):
    """The dict in a checkpoint: tensors and plain values; no code in it runs. Raises UserError."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile  # a wrong checksum: torch.load looks at none
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the sentences below say
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file makes the readers raise anything at all
        raise UserError(f"{path} is damaged, or no checkpoint ({type(error).__name__})") from error

def load_checkpoint(path, device="cpu", saved=None):
    """The (CycleGAN, place) in a file, or in `saved`, read from it before. Raises UserError."""
    saved = read_checkpoint(path) if saved is None else saved
    try:
        model = CycleGAN(Config(**saved["config"]), device, saved["precision"])
        model.load_state_dict(saved["model"])
        model.steps = int(saved["steps"])
        if not 0 <= model.steps < 2**48:
            raise ValueError(f"{model.steps} steps")
        for adam, state in zip((model.adam_G, model.adam_D), saved["adams"], strict=True):
            adam.load_state_dict({**adam.state_dict(), "state": state})  # its settings are ours
            for parameter, moments in adam.state.items():  # of another shape they would crash it
                for name in ("exp_avg", "exp_avg_sq"):
                    if moments[name].shape != parameter.shape or moments["step"].numel() != 1:
                        raise ValueError(f"{name} is of no parameter")
                    moments[name] = torch.empty_like(parameter).copy_(moments[name])
        return model, saved["place"]
    except torch.OutOfMemoryError:  # a RuntimeError, too
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError,
            RuntimeError) as error:
        raise UserError(f"{path} is no checkpoint of a run ({error})") from error

def load_generator(path, direction="AtoB", device="cpu"):
    """G ("AtoB") or F ("BtoA") from a run's folder or checkpoint, in eval mode.

    The authors' files will do: one such as 200_net_G_B.pth, taken for what it is, or a folder with
    the latest_net_G_A.pth and _B.pth or those of epochs, of which the direction picks one, or with
    latest_net_G.pth. Blocks and width follow from the weights. Raises UserError naming the file.
    """
    path, name = Path(path), f"net_G_{direction[0]}.pth"
    if path.is_dir():
        files = [path / "latest.pt", path / f"latest_{name}", path / "latest_net_G.pth",
                 *sorted(path.glob(f"*_{name}"), key=lambda f: (len(f.name), f.name), reverse=True)]
        path = next((file for file in files if file.is_file()), files[0])
    saved, weights = read_checkpoint(path), {}
    ours = ("G." if direction == "AtoB" else "F.") if "model" in saved else ""
    try:
        for key, value in saved.get("model", saved).items():
            if key.startswith(ours):
                key = key.replace("_orig_mod.", "").removeprefix("module.").removeprefix(ours)
                weights[key.replace("conv_block.6.", "conv_block.5.")] = value  # 6: after a dropout
        for sign, kind in ((".filt", "an antialiased"), ("model.model.", "a U-Net")):
            if any(sign in key for key in weights):
                raise UserError(f"it is {kind} network's")
        blocks = sum(key.endswith("conv_block.1.weight") for key in weights)
        generator = Generator(len(weights["model.1.weight"]), blocks)
        wanted = generator.state_dict()
        for key in weights.keys() - wanted.keys():  # statistics and biases without effect may go
            if not key.endswith((".bias", ".running_mean", ".running_var", ".num_batches_tracked")):
                raise UserError(f"it has {key} besides")
        generator.load_state_dict({key: weights[key] for key in wanted})
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no ResNet generator from RGB to RGB ({error})") from error
    return generator.to(device, memory_format=layout(device)).eval()

# ---- Pictures ------------------------------------------------------------------------------------

SUFFIXES = ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp"
FORMATS = "AVIF BMP GIF JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP"  # no EPS: Pillow would execute it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # read_picture refuses

def find_pictures(folder):
    """Pictures under a folder, sorted; none hidden, none in a run's folder. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    runs = {path.parent for path in folder.rglob("latest.pt")}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES.split()
                   and "/." not in f"/{path.relative_to(folder).as_posix()}"
                   and runs.isdisjoint(path.parents) and (path.is_file() or path.is_symlink()))
    if not paths:
        raise UserError(f"the folder {folder} holds no picture ({SUFFIXES})")
    return paths

def read_picture(path, side=None):
    """A picture of any mode that Pillow opens -> (H, W, 3) uint8; with `side`, resized to a square.

    Turned as its EXIF data say, white where transparent, greys of 16 bits scaled, resized bicubic.
    Raises UserError naming the file.
    """
    try:
        if not os.path.isfile(path):  # a pipe would never end
            raise UserError("it is no file")
        with Image.open(path) as image:
            if image.format not in FORMATS.split():
                raise UserError(f"{image.format} is none of {FORMATS}")
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise UserError(f"more than Pillow's limit of {Image.MAX_IMAGE_PIXELS} pixels")
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # greys of 16 bits, or of 32, for which no white is agreed
                grey = np.nan_to_num(np.asarray(image, np.float64)).clip(0)
                white = max(65535 if image.mode[0] == "I" else 1, grey.max())
                image = Image.fromarray((grey / white * 255).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            return np.asarray(image.resize((side, side), Image.BICUBIC) if side else image)
    except Exception as error:  # a damaged file makes the decoders raise anything at all
        raise UserError(f"cannot read {path}: {error}") from error

def send(tensor, device):
    """A CPU tensor on a device; to CUDA it goes from pinned memory, so that nothing waits."""
    cuda = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)

def layout(device):
    """How images lie in memory: channels last on CUDA, whose convolutions want that, else NCHW."""
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format

def to_tensor(pictures, device="cpu"):
    """(N, H, W, 3) uint8 array -> (N, 3, H, W) float32 tensor in [-1, 1]; bytes are what travels.

    H and W grow, by reflection, to the next multiples of 4 that are at least 8.
    """
    below, right = (max(8, n + -n % 4) - n for n in pictures.shape[1:3])
    if below or right:
        pictures = np.pad(pictures, ((0, 0), (0, below), (0, right), (0, 0)), mode="reflect")
    images = send(torch.from_numpy(pictures), device).permute(0, 3, 1, 2)
    return images.float().contiguous(memory_format=layout(device)) / 127.5 - 1

def to_pictures(images):
    """(N, 3, H, W) tensor in [-1, 1] -> (N, H, W, 3) uint8 array, rounded to the nearest."""
    levels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

@torch.no_grad()
def translate(generator, pictures, precision="fp32"):
    """(N, H, W, 3) uint8, of any size -> the same shape, through a generator."""
    device, (height, width) = next(generator.parameters()).device, pictures.shape[1:3]
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        images = generator(to_tensor(pictures, device))
    return to_pictures(images)[:, :height, :width]

def png(picture, **more):
    """(H, W, 3) uint8 -> the bytes of a PNG file; `more` is for Pillow."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", **more)
    return file.getvalue()

def pick(device, precision="auto"):
    """(torch.device, precision); "auto" is CUDA, and bf16 where native. Raises UserError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = "cuda" if there["cuda"] else "cpu"
    if not there.get(device, True):
        raise UserError(f"--device {device}: PyTorch finds none on this machine; try --device cpu")
    if precision == "auto":
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    return torch.device(device), precision
