"""What must stay true of cyclegan.py, train.py and translate.py.

    python -m pytest                    everything, about two minutes on two CPU cores
    python test_cyclegan.py             a benchmark: the fused step against the literal one
"""

import torch
from torch import nn

import cyclegan
from cyclegan import Config, CycleGAN, Discriminator, Generator, ImageBuffer

# --------------------------------------------------------------------------------------------------
# The literal twin: the step as the authors' code takes it, with no fusion, written independently
# --------------------------------------------------------------------------------------------------


def twin_generator(width, blocks):
    """The authors' ResnetGenerator: stock layers, a bias everywhere, ReLU in place."""
    class Block(nn.Module):
        def __init__(self, k):
            super().__init__()
            self.conv_block = nn.Sequential(
                nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3), nn.InstanceNorm2d(k), nn.ReLU(True),
                nn.ReflectionPad2d(1), nn.Conv2d(k, k, 3), nn.InstanceNorm2d(k))

        def forward(self, h):
            return h + self.conv_block(h)

    w = width
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, w, 7), nn.InstanceNorm2d(w), nn.ReLU(True)]
    for k in (w, 2 * w):
        layers += [nn.Conv2d(k, 2 * k, 3, 2, 1), nn.InstanceNorm2d(2 * k), nn.ReLU(True)]
    layers += [Block(4 * w) for _ in range(blocks)]
    for k in (4 * w, 2 * w):
        layers += [nn.ConvTranspose2d(k, k // 2, 3, 2, 1, 1), nn.InstanceNorm2d(k // 2), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(w, 3, 7), nn.Tanh())


def twin_discriminator(width):
    """The authors' NLayerDiscriminator with three layers."""
    layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for k, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
        layers += [nn.Conv2d(k, 2 * k, 4, stride, 1), nn.InstanceNorm2d(2 * k), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))


class Twin:
    """Six generator calls, six discriminator calls, gradients toggled, pictures pooled in a list."""

    def __init__(self, config, model):
        self.config, device = config, next(model.parameters()).device
        self.networks = {}
        for name in ("G", "F", "D_X", "D_Y"):
            ours = getattr(model, name)
            twin = (twin_generator(config.width, config.blocks) if name in "GF"
                    else twin_discriminator(config.width)).to(device, next(ours.parameters()).dtype)
            for parameter in twin.parameters():
                nn.init.zeros_(parameter)
            for key, value in ours.model.state_dict().items():
                twin.state_dict()[key].copy_(value)
            self.networks[name] = twin
        betas = (config.beta1, 0.999)
        self.adam_G, self.adam_D = (
            torch.optim.Adam([*self.networks[a].parameters(), *self.networks[b].parameters()],
                             config.lr, betas) for a, b in (("G", "F"), ("D_X", "D_Y")))
        self.pools = {"X": [], "Y": []}

    def gan(self, scores, real):
        target = torch.tensor(float(real), device=scores.device, dtype=scores.dtype).expand_as(scores)
        criterion = nn.MSELoss() if self.config.objective == "lsgan" else nn.BCEWithLogitsLoss()
        return criterion(scores, target)

    def pooled(self, pool, images, draws):
        size, result = self.config.buffer_size, []
        for image, (swap, place) in zip(images, draws.tolist()):
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

    def step(self, x, y, draws):
        c, l1 = self.config, nn.L1Loss()
        G, F, D_X, D_Y = (self.networks[name] for name in ("G", "F", "D_X", "D_Y"))
        fake_y = G(x)
        back_x = F(fake_y)
        fake_x = F(y)
        back_y = G(fake_x)

        for D in (D_X, D_Y):
            D.requires_grad_(False)
        self.adam_G.zero_grad()
        loss = c.lambda_gan * self.gan(D_Y(fake_y), True) + c.lambda_gan * self.gan(D_X(fake_x), True)
        loss = loss + c.lambda_forward * l1(back_x, x) + c.lambda_backward * l1(back_y, y)
        if c.lambda_identity:
            loss = loss + c.lambda_identity * c.lambda_backward * l1(G(y), y)
            loss = loss + c.lambda_identity * c.lambda_forward * l1(F(x), x)
        loss.backward()
        self.adam_G.step()

        for D in (D_X, D_Y):
            D.requires_grad_(True)
        self.adam_D.zero_grad()
        for D, real, fake, pool, draw in ((D_Y, y, fake_y, "Y", draws[1]), (D_X, x, fake_x, "X", draws[0])):
            fake = self.pooled(self.pools[pool], fake.detach(), draw)
            loss_D = (self.gan(D(real), True) + self.gan(D(fake), False)) * 0.5
            loss_D.backward()
        self.adam_D.step()
        return loss
