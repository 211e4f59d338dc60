#!/usr/bin/env python3
"""ddpm.py: a class-conditional diffusion model that draws handwritten digits, in one file to read from top to bottom.

Add Gaussian noise to an image in T small steps, until only noise is left. Train a neural network to look at a noisy
image and to predict the noise in it. Removing all of the predicted noise at once would give a blur: the mean of all
images that could have become this noisy one. So start from pure noise, remove a little of the predicted noise, add a
little fresh noise, look again, and repeat T times; a new image emerges. The network also gets the class y to draw.

    Eq. 4    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε                 t steps of noise at once                 section 2
    Eq. 14   L_simple = E ‖ε - ε_θ(x_t, t, y)‖²           the training loss, here weighted         section 4
    Eq. 15   x̂_0 = (x_t - √(1-ᾱ_t) ε_θ) / √ᾱ_t           the clean image a prediction implies     section 5
    Eq. 6    x_{t-1} ~ N(μ̃_t(x_t, x̂_0), β̃_t I)           one step back, x̂_0 in place of x_0       section 5

"Eq." and "Algorithm" without an author are those of Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models"
(arXiv 2006.11239). The names, with shapes for a batch of B images with C channels, height H and width W:

    x_0, x_t        clean image, with values in [-1, 1]; noisy image                                  (B, C, H, W)
    eps, eps_hat    ε, the noise in x_t; ε_θ, the network's prediction of it                          (B, C, H, W)
    x_0_hat         x̂_0, the clean image that x_t and eps_hat imply                                   (B, C, H, W)
    t, T, y         index of a noising step; number of steps; the class                               (B,) or an integer
    betas           β_t, variance of the noise that step t adds; α_t = 1-β_t                          (T,)
    alphas_cumprod  ᾱ_t = α_1 α_2 ... α_t; in x_t, the image x_0 is scaled by √ᾱ_t                   (T,)

The paper counts t = 1..T, the code t = 0..T-1, so alphas_cumprod[t] is the paper's ᾱ_{t+1}. Symbols such as ᾱ_t and
x_{t-1}, in equations and comments, number the steps as in the paper. x_0 is always the clean image.

    python ddpm.py sample --label 3      draw threes, with your newest weights or those in assets/
    python ddpm.py train                 train on MNIST, into runs/mnist
    python ddpm.py evaluate              measure how good the digits are
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

# ======================================================================================================================
# PART ONE: DDPM
# ======================================================================================================================
#
# A complete diffusion model: it learns and it draws. It uses torch and Python's own modules only. Shapes in comments
# are those of MNIST, grey images of 28x28 pixels, with the default channels; D = 128 is the length of an embedding.


@dataclass
class Config:
    """What a model is and how it was trained. It is kept as model.config and in each checkpoint."""

    # The images.
    dataset: str = "mnist"  # the data set's name
    image_channels: int = 1  # C: 1 for grey, 3 for colour
    image_size: int = 28  # H and W, in pixels
    classes: tuple = tuple("0123456789")  # the names of the classes; y is an index into them
    # The diffusion process and the network.
    timesteps: int = 1000  # T
    schedule: str = "linear"  # how β_t grows: "linear" or "cosine" (section 1)
    channels: tuple = (32, 64, 128, 256)  # channels of the U-Net, one number per size (section 3)
    prediction: str = "v"  # what the last layer predicts (section 3); checkpoints that say otherwise are refused
    # The training.
    epochs: int = 30  # passes over the training images
    batch_size: int = 128  # B, the number of images per training step
    lr: float = 2e-3  # the highest learning rate (section 9)
    class_dropout: float = 0.1  # share of the labels replaced by "no class" (section 4)
    ema_decay: float = 0.999  # how slowly the averaged weights follow the trained ones (section 9)
    seed: int = 0  # of all random numbers in training

    def __post_init__(self):
        self.channels = tuple(self.channels)  # accept a list, too


# ----------------------------------------------------------------------------------------------------------------------
# 1. The noise schedule
# ----------------------------------------------------------------------------------------------------------------------
#
# Noise is added in T small steps. Step t shrinks the pixel values a little and adds Gaussian noise of variance β_t.
# Write q for the probability densities of this process:
#
#     Eq. 2:  q(x_t | x_{t-1}) = N(√(1-β_t) x_{t-1}, β_t I)
#
# The factor √(1-β_t) keeps the scale: if the mean square of the pixels of x_{t-1} is 1 (for MNIST's images it is 0.93),
# that of x_t is (1-β_t) + β_t = 1, too. So the network's input has about the same scale at every t.
#
# Why must β_t be small? Sampling has to reverse these steps. The reverse of a small step is close to a Gaussian
# (Sohl-Dickstein et al. 2015, arXiv 1503.03585), which is easy to draw from; the reverse of a large step is not. A
# large step backwards would have to choose between different images, whereas a small one only has to nudge.
#
# The quantity to watch is ᾱ_t = α_1 α_2 ... α_t with α_t = 1 - β_t. After t steps, the image is left scaled by √ᾱ_t
# (Eq. 4, next section). ᾱ_t has to fall from almost 1 to almost 0. Sampling starts from pure noise, which holds no
# trace of an image, so x_T must hold almost none in training. With the linear schedule and T = 1000, the image enters
# x_T with the factor √ᾱ_T = 0.0064.

SCHEDULES = ("linear", "cosine")


def beta_schedule(schedule, timesteps):
    """The variance of the noise that each step adds: betas (T,), float64, in (0, 0.999].

    schedule is "linear" (Ho et al. 2020, section 4) or "cosine" (Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17);
    timesteps is T. Raises ValueError for any other name.
    """
    if schedule == "linear":
        # From 0.0001 to 0.02 for T = 1000. With fewer steps, each has to be larger, or x_T would still show the image.
        # For small β, ᾱ_T is about exp(-Σ β_t); 1000/T keeps that sum (unless a β_t is clamped, below).
        betas = 1000 / timesteps * torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    elif schedule == "cosine":
        # Their Eq. 17: ᾱ_t = f(t) / f(0), f(t) = cos²((t/T + 0.008) / (1 + 0.008) · π/2),  β_t = 1 - ᾱ_t / ᾱ_{t-1}
        # The linear schedule spends many steps on images that are almost pure noise. Here, ᾱ falls evenly in the middle
        # and slowly at both ends. Without the offset 0.008, the authors found, the first noise is too faint to predict.
        t_over_T = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        f = torch.cos((t_over_T + 0.008) / (1 + 0.008) * math.pi / 2) ** 2  # (T+1,)
        betas = 1 - f[1:] / f[:-1]  # f(0) cancels
    else:
        raise ValueError(f"no schedule is called {schedule!r}: choose from {SCHEDULES}")
    # A β_t ≥ 1 (cosine; linear with few steps) could make ᾱ_t ≤ 0, and sampling divides by √ᾱ_t.
    return betas.clamp(max=0.999)


def cumulative_alphas(config):
    """ᾱ_t for all t: alphas_cumprod (T,), float64, falling from almost 1 to almost 0."""
    alphas = 1 - beta_schedule(config.schedule, config.timesteps)
    return torch.cumprod(alphas, dim=0)


# ----------------------------------------------------------------------------------------------------------------------
# 2. The forward process: from image to noise
# ----------------------------------------------------------------------------------------------------------------------
#
# To train the network at step t, one needs x_t. Adding the noise step by step would take t draws. But a sum of
# independent Gaussians is a Gaussian, so t steps of Eq. 2 collapse into one. Two steps, for example, with independent
# ε_1, ε_2 ~ N(0, I):
#
#     x_2 = √α_2 x_1 + √β_2 ε_2
#         = √α_2 (√α_1 x_0 + √β_1 ε_1) + √β_2 ε_2
#         = √(α_2 α_1) x_0 + √(α_2 β_1) ε_1 + √β_2 ε_2
#
# The variances of the two noise terms add up to α_2 β_1 + β_2 = α_2 (1-α_1) + (1-α_2) = 1 - α_2 α_1. So one draw with
# that variance does the same. Repeat the argument, and t steps need one draw of variance 1-ᾱ_t.


def q_sample(x_0, t, eps, alphas_cumprod):
    """Adds the noise of all steps up to t to clean images: a draw from q(x_t | x_0) (Ho et al. 2020, Eq. 4).

    x_0 (B, C, H, W); t (B,) integers in 0..T-1; eps like x_0, standard normal; alphas_cumprod (T,), on the device of t,
    of the dtype of x_0. Returns x_t, like x_0.
    """
    alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1): each image has its own t
    # Eq. 4: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps


# ----------------------------------------------------------------------------------------------------------------------
# 3. The network: a U-Net that predicts the noise
# ----------------------------------------------------------------------------------------------------------------------
#
# Input: a noisy image, the step t and the class y. Output: the noise in the image. (The last layer gives a tensor v,
# and a fixed formula turns v into the noise; both are explained above class UNet.) The network needs to see the whole
# (which strokes belong together?) and every single pixel. On the way down, to see the whole, it halves the image three
# times and doubles the channels. On the way up, it returns to full size. Skip connections hand the details across: the
# decoder concatenates the encoder's output of the same size to its own.
#
#     x_t (1, 28, 28)                                               v (1, 28, 28), from which eps_hat follows
#         │ conv_in                                                                     ▲ conv_out
#     (32, 28, 28) ── encoder.0 ───────────────────── skip ───────────────────── decoder.0
#         │ downsample.0                                                                ▲ upsample.0
#     (64, 14, 14) ── encoder.1 ───────────────────── skip ───────────────────── decoder.1
#         │ downsample.1                                                                ▲ upsample.1
#     (128, 7, 7) ─── encoder.2 ───────────────────── skip ───────────────────── decoder.2
#         │ downsample.2                                                                ▲ upsample.2
#     (256, 4, 4) ─── encoder.3 ───────────────────── skip ───────────────────── decoder.3
#         │                                                                             ▲
#         └────────────────── middle (residual block) ── attention ─────────────────────┘
#
# The encoder, the decoder and the middle consist of residual blocks, which add a learned correction to their input. t
# and y enter each of them: what counts as noise in x_t depends on both. The activation is SiLU(x) = x · sigmoid(x), a
# smooth relative of ReLU.


def timestep_embedding(t, dim):
    """Sinusoidal embedding of the step (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

    t (B,) integers; dim is even. Returns (B, dim), with values in [-1, 1]: all cosines, then all sines.

    A single number t/T would be a poor input: for neighbouring steps it differs by 0.001, and so the outputs of a layer
    would be almost equal, unless its weights were huge. Sines and cosines work like the hands of a clock: the fast ones
    tell neighbouring steps apart, the slow ones tell early from late.
    """
    exponents = torch.arange(0, dim, 2, device=t.device, dtype=torch.float32) / dim
    freqs = torch.exp(-math.log(10000) * exponents)  # (dim/2,), from 1 down to about 1/10000
    angles = t[:, None] * freqs[None, :]  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)  # (B, dim)


def zero_init(layer):
    """Sets a layer's weight and bias to zero and returns it.

    With its last layer at zero, a residual block adds nothing at first: it begins as the identity (in the decoder, as a
    1x1 convolution, which reduces the channels), and learns what to add. The network's last layer begins at zero, too,
    and moves first: a zero layer blocks the gradient of those before it, but not its own, which depends on its input.
    """
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    """Group normalization with eight groups, or with 4, 2 or 1 where eight does not divide the channels.

    Unlike BatchNorm, it normalizes each image by itself. A batch mixes images with little and with much noise, so its
    statistics depend on which t happen to be in it.
    """
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResBlock(nn.Module):
    """Two convolutions whose result is added to their input. The step t and the class y act between the two.

    One nn.Linear projects the embedding of t, another that of y. The sum of the outputs is a scale and a shift for each
    channel: the adaptive group normalization of Dhariwal & Nichol 2021 (arXiv 2105.05233, section 3). Each block has
    its own projections, so it can amplify or damp its own features, depending on the noise level and on the class.
    (Dhariwal & Nichol project the sum of the embeddings. With two projections, t and y do not share weights.)

    forward: x (B, in_channels, H, W), t_emb (B, D), y_emb (B, D) -> (B, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, emb_dim):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(emb_dim, 2 * out_channels)
        self.class_proj = nn.Linear(emb_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity()
        if in_channels != out_channels:  # in the decoder, whose input has the skip concatenated
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, t_emb, y_emb):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        scale_and_shift = self.time_proj(t_emb) + self.class_proj(y_emb)  # (B, 2·out)
        scale_and_shift = scale_and_shift[:, :, None, None]  # (B, 2·out, 1, 1), the same at each pixel
        scale, shift = scale_and_shift.chunk(2, dim=1)  # each (B, out, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift  # 1 + scale, so that 0 means no change
        h = self.conv2(F.silu(h))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention: each position gathers what it needs from all others (Vaswani et al. 2017).

    A 3x3 convolution sees neighbouring positions only. Here, a linear layer gives each position a query, a key and a
    value, and a position takes the mean of all values, weighted by how well its query fits their keys. The price: each
    position is compared with every other. So attention is used only at the bottom: 16² comparisons at 4x4, not 784².

    forward: x (B, C, H, W) -> the same shape.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C): a sequence of positions
        query, key, value = self.qkv(h).chunk(3, dim=2)  # each (B, H·W, C)
        # softmax(query keyᵀ / √C) value
        h = F.scaled_dot_product_attention(query, key, value)  # (B, H·W, C)
        h = self.out(h).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        return x + h


# What the last layer predicts is not ε itself, but v (Salimans & Ho 2022, arXiv 2202.00512), a mixture of ε and x_0:
#
#     x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε                     x_0 = √ᾱ_t x_t - √(1-ᾱ_t) v
#     v   = √ᾱ_t ε - √(1-ᾱ_t) x_0                     ε   = √ᾱ_t v + √(1-ᾱ_t) x_t
#
# The left column rotates the pair (x_0, ε) into (x_t, v), by the angle whose cosine is √ᾱ_t. The right column rotates
# it back; by its last line, UNet turns v into ε, so that everything below reads as in the paper. Why v? It is roughly
# what x_t does not show: about ε at small t, where x_t is almost x_0, and about -x_0 at large t, where x_t is almost ε.
# A network that predicts ε at large t has to copy x_t almost exactly; only the tiny difference carries information
# about the image. So errors matter there: an error δ in ε becomes (√(1-ᾱ_t) / √ᾱ_t) δ in x̂_0, at t = T (linear
# schedule) 157 δ. By the right column, an error δ in v becomes √(1-ᾱ_t) δ in x̂_0 (up to the sign), never more than δ.


class UNet(nn.Module):
    """The noise prediction ε_θ(x_t, t, y), for a Config.

    forward: x_t (B, C, H, W), t (B,) in 0..T-1, y (B,) in 0..len(classes) -> eps_hat (B, C, H, W), float32.
    Class number len(classes) means "no class": one more row of the embedding, learned like the others.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.no_class = len(config.classes)
        # float32, like the layers, is exact enough here. Not part of a checkpoint, since it follows from the config.
        self.register_buffer("alphas_cumprod", cumulative_alphas(config).float(), persistent=False)

        channels = config.channels
        emb_dim = 4 * channels[0]  # D = 128
        self.emb_dim = emb_dim
        self.time_mlp = nn.Sequential(
            nn.Linear(emb_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim), nn.SiLU()
        )
        # The class needs no such layers: its embedding is learned directly, a row of numbers for each class.
        self.class_emb = nn.Embedding(len(config.classes) + 1, emb_dim)

        self.conv_in = nn.Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.encoder = nn.ModuleList([ResBlock(c, c, emb_dim) for c in channels])
        pairs = list(zip(channels, channels[1:]))  # (32, 64), (64, 128), (128, 256)
        self.downsample = nn.ModuleList(
            [nn.Conv2d(c, wider, 3, stride=2, padding=1) for c, wider in pairs]
        )
        self.middle = ResBlock(channels[-1], channels[-1], emb_dim)
        self.attention = Attention(channels[-1])
        self.decoder = nn.ModuleList([ResBlock(2 * c, c, emb_dim) for c in channels])
        self.upsample = nn.ModuleList([nn.Conv2d(wider, c, 1) for c, wider in pairs])
        self.norm_out = group_norm(channels[0])
        self.conv_out = zero_init(nn.Conv2d(channels[0], config.image_channels, 3, padding=1))

    def forward(self, x_t, t, y):
        t_emb = self.time_mlp(timestep_embedding(t, self.emb_dim))  # (B, D)
        y_emb = self.class_emb(y)  # (B, D)

        h = self.conv_in(x_t)  # (B, 32, 28, 28)
        skips = []
        for level, block in enumerate(self.encoder):
            if level > 0:
                h = self.downsample[level - 1](h)  # (B, 64, 14, 14) at level 1
            h = block(h, t_emb, y_emb)
            skips.append(h)

        h = self.middle(h, t_emb, y_emb)  # (B, 256, 4, 4)
        h = self.attention(h)

        for level in reversed(range(len(self.decoder))):
            h = torch.cat([h, skips[level]], dim=1)  # (B, 512, 4, 4) at level 3
            h = self.decoder[level](h, t_emb, y_emb)  # (B, 256, 4, 4)
            if level > 0:
                # The 1x1 convolution gives the same before enlarging as after it, and is cheaper before.
                h = self.upsample[level - 1](h)  # (B, 128, 4, 4)
                # The size comes from the skip: 4 doubled would be 8, but 7 is needed.
                size = skips[level - 1].shape[2:]
                h = F.interpolate(h, size=size, mode="nearest")  # (B, 128, 7, 7)

        v = self.conv_out(F.silu(self.norm_out(h)))  # v_θ (B, 1, 28, 28)
        alpha_bar = self.alphas_cumprod[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        # ε_θ = √ᾱ_t v_θ + √(1-ᾱ_t) x_t
        return alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t


# ----------------------------------------------------------------------------------------------------------------------
# 4. The training objective and Algorithm 1
# ----------------------------------------------------------------------------------------------------------------------
#
# The network should predict the noise, so it is trained to make the squared error of its prediction small, on average
# over all t (Eq. 14). For each image, one t is drawn at random:
#
#     Algorithm 1:  repeat
#                     x_0, y from the training images,  t ~ Uniform({1, ..., T}),  ε ~ N(0, I)
#                     take a gradient step on ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t, y)‖²
#
# What does the network learn? The minimiser of a squared error is the conditional mean: the best prediction is
# E[ε | x_t, y], the mean of all possible ε, each weighted by its probability. By Eq. 4, which is linear, it implies the
# mean of all possible x_0. At small t that is one image; at large t, where many are possible, it is a blur.
#
# Where does the loss come from? (This can wait until section 5 has been read.) Let p be the density that the model
# gives to the training images. An upper bound on -log p is a sum over the steps. Apart from its two end terms, each is
# a KL divergence: how far the network's step backwards, with x̂_0 for x_0, is from q(x_{t-1} | x_t, x_0), which would be
# right if x_0 were known. Both are Gaussians. With equal variances, the term is a weighted squared distance between the
# means, so between x_0 and x̂_0, and by Eq. 4 between ε and ε_θ (Eq. 12). Ho et al. got better images when they dropped
# these weights, which are largest at small t.
#
# The code changes Algorithm 1 in two ways. First, it weights the loss by 1/√ᾱ_t. (A weight that depends on t alone does
# not change the best prediction; it decides at which t an imperfect network errs less.) Why? By section 3,
#
#     ε - ε_θ = √ᾱ_t (v - v_θ)        v_θ is what the last layer predicts
#
# So L_simple is ᾱ_t ‖v - v_θ‖²: it hardly counts errors of v at large t, although sampling sets the large shapes there
# (Ho et al., section 4.3). The loss of v itself, ‖v - v_θ‖², is L_simple times 1/ᾱ_t; in it, small t, where details
# appear, have a smaller share. The code takes a middle way, 1/√ᾱ_t, so √ᾱ_t ‖v - v_θ‖² is its loss. README.md compares
# the three; the middle way gave the best images.
#
# Second, it drops labels. For a tenth of the images, the class is replaced by "no class". The network then learns two
# predictions, one for a given digit and one for digits in general; section 7 needs both (Ho & Salimans 2022, arXiv
# 2207.12598, Algorithm 1). Labels are dropped in the loss and not inside the network, as sampling must never drop one.


def ddpm_loss(model, x_0, y, t=None):
    """The loss of one batch in Algorithm 1: L_simple (Ho et al. 2020, Eq. 14), weighted by 1/√ᾱ_t.

    x_0 (B, C, H, W) in [-1, 1]; y (B,) classes, of which the share config.class_dropout is dropped; t (B,) in 0..T-1,
    drawn uniformly if it is None (section 9 gives its own). Returns a scalar.
    """
    B, device = len(x_0), x_0.device
    if t is None:
        t = torch.randint(0, model.config.timesteps, (B,), device=device)  # (B,), uniform
    eps = torch.randn_like(x_0)
    x_t = q_sample(x_0, t, eps, model.alphas_cumprod)
    dropped = torch.rand(B, device=device) < model.config.class_dropout  # (B,)
    y = torch.where(dropped, model.no_class, y)
    eps_hat = model(x_t, t, y)
    # Eq. 14: L_simple = E ‖ε - ε_θ(x_t, t, y)‖², here divided by the number of values
    loss = (eps - eps_hat).square().mean(dim=(1, 2, 3))  # (B,)
    weight = 1 / model.alphas_cumprod[t].sqrt()  # (B,)
    return (weight * loss).mean()


# ----------------------------------------------------------------------------------------------------------------------
# 5. Sampling: Algorithm 2
# ----------------------------------------------------------------------------------------------------------------------
#
# How does one get from x_t back to x_{t-1}? If x_0 were known, Bayes' theorem would tell, since a step of noise looks
# at nothing but the image before it, q(x_t | x_{t-1}, x_0) = q(x_t | x_{t-1}):
#
#     q(x_{t-1} | x_t, x_0)  ∝  q(x_t | x_{t-1})  q(x_{t-1} | x_0)
#
# As functions of x_{t-1}, both are bell curves. By Eq. 2, solved for x_{t-1}, the first has the mean x_t / √α_t and the
# variance β_t / α_t; by Eq. 4, the second has the mean √ᾱ_{t-1} x_0 and the variance 1-ᾱ_{t-1}. Their product is a bell
# curve, too: add the exponents and complete the square. The inverse variances add up, and the means are averaged with
# them as weights:
#
#     1 / β̃_t = α_t / β_t + 1 / (1-ᾱ_{t-1}) = (1-ᾱ_t) / (β_t (1-ᾱ_{t-1}))        as α_t (1-ᾱ_{t-1}) + β_t = 1-ᾱ_t
#     μ̃_t = β̃_t ((√α_t / β_t) x_t + (√ᾱ_{t-1} / (1-ᾱ_{t-1})) x_0)                 multiplied out: Eq. 7, in posterior()
#
# Before the first step there is no noise, so ᾱ_0 = 1. At t = 1, the second curve then has no width, so β̃_1 = 0 and
# μ̃_1 = x_0: where x_0 is known, the last step back is certain.
#
# But x_0 is not known. The network's ε_θ implies an estimate x̂_0 of it (Eq. 15), and x̂_0 takes its place. It is the
# mean of all possible x_0, which at large t is a blur. Why may it stand in for x_0? Because μ̃_t is linear in x_0, the
# mean of x_{t-1} over all possible x_0 comes out right (y is left out here):
#
#     E[x_{t-1} | x_t] = E[μ̃_t(x_t, x_0) | x_t] = μ̃_t(x_t, E[x_0 | x_t])
#
# Given x_t, x_{t-1} is nearly Gaussian (section 1). With the variance β̃_t for every pixel, as if x_0 were known (more
# on this below), a step back is a draw from N(μ̃_t(x_t, x̂_0), β̃_t I). Then the network looks again:
#
#     Algorithm 2:  x_T ~ N(0, I)
#                   for t = T, ..., 1:   z ~ N(0, I), but z = 0 if t = 1
#                                        x_{t-1} = μ̃_t(x_t, x̂_0) + √β̃_t z
#
# The paper writes the mean in terms of ε_θ: (x_t - β_t/√(1-ᾱ_t) ε_θ) / √α_t (Eq. 11). Put Eq. 15 into Eq. 7 to see that
# it is the same. The code uses x̂_0, because it can be clipped to [-1, 1].
#
# Ho et al. tried two variances, β̃_t and β_t, with similar results (their section 3.2). The right variance is β̃_t plus
# that of μ̃_t over all possible x_0. That is β̃_t if the data is a single image, and β_t if it is standard normal, the
# other extreme. They are far apart in the last few steps only: for t ≥ 16, β̃_t is above 0.9 β_t (linear schedule). As
# for z = 0 in the last step: with β̃_1 = 0, it changes nothing. With β_1, it omits a last noise of standard deviation
# √β_1 = 0.01, about one step between grey values (2/255).


def predict_x_0(x_t, eps_hat, alpha_bar):
    """The clean image that x_t and its predicted noise imply, clipped to [-1, 1]: x_0_hat (Ho et al. 2020, Eq. 15).

    x_t, eps_hat (B, C, H, W); alpha_bar is ᾱ_t, a float in (0, 1). All possible x_0 lie in [-1, 1], and so does their
    mean; so clipping removes only errors, and the excess of guidance (section 7).
    """
    # Eq. 15: x̂_0 = (x_t - √(1-ᾱ_t) ε_θ) / √ᾱ_t
    x_0_hat = (x_t - math.sqrt(1 - alpha_bar) * eps_hat) / math.sqrt(alpha_bar)
    return x_0_hat.clamp(-1, 1)


def posterior(x_0, x_t, alpha_bar, alpha_bar_prev):
    """Mean and standard deviation of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 6 and 7).

    x_0, x_t (B, C, H, W); alpha_bar and alpha_bar_prev are ᾱ_t and ᾱ_{t-1}, floats, alpha_bar < alpha_bar_prev <= 1.
    Returns a tensor like x_0 and a float.
    """
    # ᾱ_t = ᾱ_{t-1} α_t, so these two give α_t and β_t.
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    # Eq. 7: μ̃_t = √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0 + √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t
    weight_of_x_0 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
    weight_of_x_t = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
    mean = weight_of_x_0 * x_0 + weight_of_x_t * x_t
    # Eq. 7: β̃_t = (1-ᾱ_{t-1}) / (1-ᾱ_t) β_t
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    return mean, math.sqrt(variance)


@torch.no_grad()
def ddpm_sampler(model, x_T, y, alphas_cumprod, randn_like=torch.randn_like):
    """Algorithm 2 of Ho et al. 2020, with the class y: a generator that yields (x_t, x_0_hat) after each step.

    model is a UNet, or any function from (x_t, t, y) to eps_hat; x_T (B, C, H, W) is standard normal; y (B,);
    alphas_cumprod (T,) in float64, since 1 - ᾱ_t/ᾱ_{t-1} is tiny at small t; randn_like(x) returns standard normal
    noise like x. Each x_t is the new one, with less noise; the last is the finished image.
    """
    alpha_bars = alphas_cumprod.tolist()
    x_t = x_T
    for t in reversed(range(len(alpha_bars))):
        alpha_bar = alpha_bars[t]
        alpha_bar_prev = alpha_bars[t - 1] if t > 0 else 1.0
        eps_hat = model(x_t, torch.full_like(y, t), y)
        x_0_hat = predict_x_0(x_t, eps_hat, alpha_bar)
        mean, sigma = posterior(x_0_hat, x_t, alpha_bar, alpha_bar_prev)
        z = randn_like(x_t) if t > 0 else torch.zeros_like(x_t)
        x_t = mean + sigma * z  # x_{t-1}
        yield x_t, x_0_hat


# This is the method of DDPM, with a smaller network and five later additions: classes and label dropping, the cosine
# schedule, the scale and shift in each block, v, and the weight of the loss. You may stop here. The rest makes it
# faster, better and more convenient. With Part One alone, given batches of images x_0 (B, C, H, W) in [-1, 1] with
# classes y (B,), and a config, these lines train, and then draw x_t, an image for each class in the last y:
#
#     model = UNet(config)
#     optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
#     for x_0, y in batches:
#         loss = ddpm_loss(model, x_0, y)
#         optimizer.zero_grad()
#         loss.backward()
#         optimizer.step()
#     x_T = torch.randn_like(x_0)
#     for x_t, x_0_hat in ddpm_sampler(model, x_T, y, cumulative_alphas(config)):
#         pass

# ======================================================================================================================
# PART TWO: better images in fewer steps
# ======================================================================================================================
#
# Each section builds on Part One and leaves its code unchanged.

# ----------------------------------------------------------------------------------------------------------------------
# 6. DDIM: fewer steps
# ----------------------------------------------------------------------------------------------------------------------
#
# Algorithm 2 calls the network 1000 times. With DDIM (Song et al. 2020, arXiv 2010.02502), a
# dozen or two calls are enough. In this section, Eq. 12 and Eq. 16 are theirs.
#
# Training uses only q(x_t | x_0), and never sees x_t and x_{t-1} together. So x_{t-1} may be
# computed in any way that gives it, for known x_0, the distribution of Eq. 4 again: the image
# scaled by √ᾱ_{t-1}, and noise with a total variance of 1-ᾱ_{t-1}. Nor does "t-1" have to be the
# neighbour of t; it may be any smaller t.
#
# DDIM takes x̂_0 and adds noise to it again, but only as much as x_{t-1} has. A part of that noise
# is fresh, with standard deviation σ_t. The rest is the noise that x_t already has, as predicted:
#
#     Eq. 12:  x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-σ_t²) ε_θ + σ_t z
#
# If x̂_0 and ε_θ were the true x_0 and ε, this would have exactly the distribution of Eq. 4: the
# two noises are independent, so their variances, 1-ᾱ_{t-1}-σ_t² and σ_t², add up. The estimates
# stand in for the true values. That this still leads to images rests on section 5's argument if the
# steps are random and small, and on the curves below if they are not random.
#
# The fresh part is σ_t = η √β̃_t (Eq. 16), with β̃_t of this longer step: that of Eq. 7, where α_t is
# ᾱ_t / ᾱ_{t-1}. With η = 1 and all T steps, DDIM is Algorithm 2, written in terms of x̂_0 and ε_θ
# instead of x̂_0 and x_t. With η = 0 no step is random. As T and the number of steps grow, the path
# approaches a smooth curve, the solution of a differential equation. For a perfect network, these
# curves carry pure noise to images distributed like x_0 (Song, Sohl-Dickstein et al. 2020, arXiv
# 2011.13456, section 4.3). Longer steps follow them less closely; README.md measures what that
# costs.
#
# Which t's to visit? With the linear schedule, evenly spaced ones would waste steps: in the noisiest
# third, ᾱ_t is below 0.011, and x̂_0 is a blur that hardly changes. Section 3 rotates (x_0, ε) into
# (x_t, v), by an angle whose cosine is √ᾱ_t: almost 0° for a clean image, almost 90° for pure noise.
# The t's visited are evenly spaced in this angle, so with η = 0 all steps rotate equally far. If φ is
# the angle from one t to the next, Eq. 12 becomes x_{t-1} = cos φ x_t - sin φ v. (Insert section 3's
# right column for x̂_0 and ε_θ.) Of 2000 digits drawn in 5 steps of Eq. 12 (evaluate --eta 1e-9), the
# FID is 0.135 (section 12; lower is better), against 0.294 if visited_steps returns 999, 799, 599,
# 399, 199 and -1.
#
# A step holds x̂_0 fixed, but along the path x̂_0 changes, from a blur to an image. With the x̂_0 of
# its middle, a step follows the path more closely than with that of its beginning. If x̂_0 goes on
# changing as before, the one in the middle, half a step ahead, is
#
#     x̂_0 + ½ (x̂_0 - x̂_0 of the step before)
#
# It replaces x̂_0 in Eq. 12; ε_θ is replaced by the noise that Eq. 4 then implies. Only the first
# step, with none before it, takes x̂_0 as it is. Without guidance, the method is then of second
# order: if there are many steps, twice as many bring the error to about a quarter, and not only to
# half. (It is Algorithm 2 of Lu et al. 2022, arXiv 2211.01095, but with 1 in place of r_i, since
# our steps are equal in angle.) sample_steps, in section 7, does so if η = 0. With fresh noise, x̂_0
# changes at random as well, and its last change says less about the next.
#
# In the code, the list of the t's visited ends with -1, which stands for the clean image, whose ᾱ
# is 1. At the last t before it, noise is still easy to see: with 12 steps of the linear schedule,
# its standard deviation is 0.13. The last step removes it all: at ᾱ = 1, only x̂_0 is left of Eq. 12.


def visited_steps(alphas_cumprod, steps):
    """The t's that a sampler visits, as a list: from T-1 (noise) down to -1 (the clean image), evenly spaced in angle.

    alphas_cumprod (T,), float64. For 5 steps of the linear schedule with T = 1000: 999, 477, 320, 200, 95, -1. A t
    that two steps would share is visited once; so 1000 steps become 678.
    """
    angles = alphas_cumprod.sqrt().arccos()  # (T,), from almost 0° to almost 90°, in radians
    wanted = torch.linspace(0, angles[-1].item(), min(steps, len(angles)) + 1, dtype=torch.float64)[1:]
    visited = torch.searchsorted(angles, wanted)  # for each, the first t with at least that angle
    return [*visited.unique().flip(0).tolist(), -1]


@torch.no_grad()
def ddim_sampler(model, x_T, y, alphas_cumprod, visited, eta=0.0, randn_like=torch.randn_like, ahead=0.0):
    """DDIM (Song et al. 2020, Eq. 12 and 16; their α is our ᾱ): a generator like ddpm_sampler.

    visited lists the t's, falling to -1; eta in [0, 1] scales the fresh noise; ahead is how far x̂_0 is advanced, as a
    share of a step: 0 for DDIM as published, 0.5 for second order; the x_0_hat yielded is the advanced one. The other
    arguments are those of ddpm_sampler. In the comments, t-1 stands for t_prev, the next t visited.
    """
    alpha_bars = alphas_cumprod.tolist()
    x_t, x_0_before = x_T, None
    for t, t_prev in zip(visited, visited[1:]):
        alpha_bar = alpha_bars[t]
        alpha_bar_prev = alpha_bars[t_prev] if t_prev >= 0 else 1.0
        eps_hat = model(x_t, torch.full_like(y, t), y)
        x_0_now = predict_x_0(x_t, eps_hat, alpha_bar)
        # x̂_0 + ½ (x̂_0 - x̂_0 of the step before), if ahead is ½
        change = 0 if x_0_before is None else x_0_now - x_0_before
        x_0_hat = (x_0_now + ahead * change).clamp(-1, 1)
        x_0_before = x_0_now
        # The noise that goes with this clipped and advanced x̂_0, by Eq. 4, solved for ε:
        eps_hat = (x_t - math.sqrt(alpha_bar) * x_0_hat) / math.sqrt(1 - alpha_bar)
        # Eq. 16: σ_t = η √((1-ᾱ_{t-1}) / (1-ᾱ_t) (1 - ᾱ_t/ᾱ_{t-1}))
        sigma = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev))
        # Eq. 12: x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-σ_t²) ε_θ + σ_t z
        reused = math.sqrt(max(0, 1 - alpha_bar_prev - sigma**2))  # not below 0 by rounding
        x_t = math.sqrt(alpha_bar_prev) * x_0_hat + reused * eps_hat
        if sigma > 0:
            x_t = x_t + sigma * randn_like(x_t)
        yield x_t, x_0_hat


# ----------------------------------------------------------------------------------------------------------------------
# 7. Guidance and drawing
# ----------------------------------------------------------------------------------------------------------------------
#
# The network gives two predictions, one for class y and one for "no class". Guidance starts at the
# second, moves towards the first and past it (Ho & Salimans 2022, arXiv 2207.12598, Eq. 6; their w
# is S - 1):
#
#     ε̂ = ε_θ(x_t, t, none) + S (ε_θ(x_t, t, y) - ε_θ(x_t, t, none))
#
# S = 0 is unconditional, S = 1 plain conditional, S > 1 guided. The same formula holds for x̂_0
# (before clipping): it moves from "a digit" to "a four" and further. Why does that make a four look
# more like a four? By Eq. 4, the gradient of log q(x_t | x_0) with respect to x_t is -ε / √(1-ᾱ_t).
# Its mean over q(x_0 | x_t), which is q(x_0) q(x_t | x_0) / q(x_t), is the gradient of log q(x_t),
# since q ∇ log q = ∇q:
#
#     E[∇ log q(x_t | x_0) | x_t] = ∫ q(x_0) ∇q(x_t | x_0) dx_0 / q(x_t) = ∇q(x_t) / q(x_t) = ∇ log q(x_t)
#
# A perfect network predicts the mean of ε (section 4), so:
#
#     ε_θ(x_t, t, none) = -√(1-ᾱ_t) ∇ log q(x_t)        ε_θ(x_t, t, y) = -√(1-ᾱ_t) ∇ log q(x_t | y)
#
# By Bayes' theorem, the right one minus the left one is -√(1-ᾱ_t) ∇ log q(y | x_t). Sampling
# subtracts the predicted noise, so guided sampling follows ∇ log q(x_t) + S ∇ log q(y | x_t). An S
# above 1 favours images whose class is certain.
#
# Guidance is applied only in an interval of t (Kynkäänniemi et al. 2024, arXiv 2404.07724). They
# found that it harms variety at the noisiest steps and hardly matters at the last ones. Outside the
# interval, one prediction is enough.
#
# With guidance, a classifier recognises more of the images. The price is variety, since unusual
# fours are harder to recognise. FID, the distance between drawn and real images (section 12), sees
# both: badly drawn digits raise it, and so does lost variety. Of 2000 digits, 98.00 % were read
# right without guidance, with an FID of 0.054; 99.55 % and 0.056 with the defaults below; 99.80 %
# and 0.093 with S = 2.4 (README.md).

# The defaults, chosen by label accuracy and FID, for the linear schedule. 4 of the 12 steps are guided.
STEPS, GUIDANCE, GUIDANCE_INTERVAL = 12, 1.6, (0.25, 0.45)  # the interval is in shares of T


def guided(model, scale, interval=GUIDANCE_INTERVAL):
    """The guided prediction, as a function from (x_t, t, y) to eps_hat, for the samplers.

    scale is S >= 0. If S is above 1, it applies only inside the interval (low, high) of t/T, with 1 outside. If it is
    below 1, which weakens the class, it applies at every t. All images of a batch have the same t.
    """
    low, high = sorted(interval)

    def predict(x_t, t, y):
        inside = low <= t[0].item() / model.config.timesteps <= high
        S = scale if inside else min(scale, 1)
        with half_precision(x_t.device):  # bfloat16, if the device has it
            if S == 1:
                return model(x_t, t, y)
            # Both predictions in one call, which is faster than two.
            none = torch.full_like(y, model.no_class)
            y_both = torch.cat([y, none])  # (2B,)
            eps_both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), y_both)  # (2B, C, H, W)
        eps_cond, eps_uncond = eps_both.chunk(2)
        return eps_uncond + S * (eps_cond - eps_uncond)

    return predict


# What else drawing needs: layers that compute in bfloat16, noise from a seed for each image, labels in
# range, and the choice of the sampler, in sample_steps.


def has_bfloat16(device):
    """Whether the device has bfloat16 in hardware: CUDA GPUs from Ampere on, CPUs with AVX512_BF16.

    Convolutions are faster in it. It has the range of float32, but only 8 bits of precision. That is enough inside
    the network: an error of v does not grow in x_0_hat (section 3), unless S is large.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def half_precision(device):
    """A context in which the layers compute in bfloat16, if the device has it.

    The last line of UNet.forward still returns float32, because alphas_cumprod is float32. So the samplers and the loss
    compute in float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def seeded_randn_like(seeds):
    """A function like torch.randn_like for batches of len(seeds) images, each with its own random numbers.

    The noise of an image then depends on its seed alone, and not on the batch that it is drawn in. It is drawn on the
    CPU, since a GPU draws different numbers for the same seed.
    """
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def randn_like(x):
        noise = torch.empty_like(x, device="cpu")
        for image, stream in zip(noise, streams, strict=True):
            image.normal_(generator=stream)
        return noise.to(x.device)

    return randn_like


def checked(labels, model):
    """The labels (N,) as y, on the model's device. Raises ValueError if one is out of range."""
    y = torch.as_tensor(labels, dtype=torch.long, device=model.alphas_cumprod.device)
    if y.min() < 0 or y.max() >= model.no_class:
        raise ValueError(f"labels {y.tolist()} are not all in 0..{model.no_class - 1}")
    return y


def sample_steps(model, labels, steps=STEPS, eta=0.0, guidance=GUIDANCE,
                 guidance_interval=GUIDANCE_INTERVAL, seeds=None, x_T=None):  # fmt: skip
    """Draws an image for each label: a generator that yields (x_t, x_0_hat) after each step.

    The last x_t is the image.

    labels             (N,) integers, a list or a tensor
    steps              at least 1, at most T; no t is visited twice, so with hundreds there are fewer
    eta                in [0, 1], scales the fresh noise; 1 with T steps is Algorithm 2; 0 looks half a step ahead
    guidance           S >= 0; 1 turns it off
    guidance_interval  (low, high), the shares of T between which an S above 1 applies
    seeds              N integers, by default 0..N-1
    x_T                (N or 1, C, H, W), the noise to start from, by default drawn from the seeds

    Raises ValueError for a label outside the classes, and for guidance of a model trained without label dropping.
    """
    config = model.config
    device = model.alphas_cumprod.device
    y = checked(labels, model)
    if config.class_dropout == 0 and guidance != 1:
        raise ValueError("this network has not learned to draw without a class: it needs guidance=1")
    randn_like = seeded_randn_like(range(len(y)) if seeds is None else seeds)
    if x_T is None:
        shape = (len(y), config.image_channels, config.image_size, config.image_size)
        x_T = randn_like(torch.empty(shape, dtype=torch.float32, device=device))
    x_T = x_T.expand(len(y), -1, -1, -1)
    predict = guided(model, guidance, guidance_interval)
    alphas_cumprod = cumulative_alphas(config)
    if eta == 1 and steps >= config.timesteps:  # visits each t, unlike visited_steps
        return ddpm_sampler(predict, x_T, y, alphas_cumprod, randn_like)
    visited = visited_steps(alphas_cumprod, steps)
    ahead = 0.5 if eta == 0 else 0  # section 6
    return ddim_sampler(predict, x_T, y, alphas_cumprod, visited, eta, randn_like, ahead)


def sample(model, labels, **options):
    """The images of sample_steps, which has the same arguments: x_0 (N, C, H, W) in [-1, 1]."""
    for x_t, _ in sample_steps(model, labels, **options):
        pass
    return x_t


# ----------------------------------------------------------------------------------------------------------------------
# 8. Inversion: your handwriting
# ----------------------------------------------------------------------------------------------------------------------
#
# With η = 0, the steps from noise to image follow a smooth curve (section 6). It can also be
# followed the other way, from an image up to the noise that would become it (Song et al. 2020,
# section 4.3). That noise holds what the class does not say: the slant and the width of the digit,
# the weight of the stroke. Sampled with another label, it gives another digit in the same hand.
#
# But in a perfectly clean image the network finds almost no noise, so the image would stay almost
# noiseless on its way up, far from the pure noise that a sampler expects. The image therefore first
# gets, by Eq. 4, noise of the lowest level visited; the steps upwards amplify it. It is the only
# random part: noise of seed 0 for the first image of a batch, of seed 1 for the second, and so on.
#
# Inverting is unguided (S = 1): a written digit was not guided, so there is nothing to undo.
# Unguided sampling from that noise nearly returns the image. The sample command guides all the
# same, for clearer digits. Inverting takes more steps than sampling, as it has to guess where each
# step leads; with as few as sampling takes, more of the digits come out wrong.


@torch.no_grad()
def invert(model, x_0, labels, steps=50):
    """The noise x_T that sample(model, labels, guidance=1, x_T=x_T) turns back into x_0, nearly.

    x_0 (N, C, H, W) in [-1, 1], on the model's device; labels (N,), what the images show; steps as in sample_steps.
    Returns x_T, like x_0. Raises ValueError for a label outside the classes.
    """
    y = checked(labels, model)
    alphas_cumprod = model.alphas_cumprod
    downwards = visited_steps(cumulative_alphas(model.config), steps)[:-1]  # 999, 804, ..., 6
    upwards = [torch.full_like(y, t) for t in reversed(downwards)]  # 6, 15, ..., 999, each (N,)
    eps = seeded_randn_like(range(len(y)))(x_0)
    x_t = q_sample(x_0, upwards[0], eps, alphas_cumprod)
    for t, t_next in zip(upwards, upwards[1:]):
        # The step down from t_next calls the network with x at t_next and the index t_next. That x is
        # not known yet: x_t takes its place, and the index is half way, a compromise. With the index t,
        # the image comes back less closely.
        eps_hat = model(x_t, (t + t_next) // 2, y)
        # Eq. 15, then Eq. 4: the same image and the same noise, at a higher noise level. Nothing is
        # clipped, since what is cut off would be missing on the way back.
        alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
        x_0_hat = (x_t - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()
        x_t = q_sample(x_0_hat, t_next, eps_hat, alphas_cumprod)
    return x_t


# ----------------------------------------------------------------------------------------------------------------------
# 9. Training well
# ----------------------------------------------------------------------------------------------------------------------
#
# train_step is one step of Algorithm 1 with five more changes: t drawn unevenly, an optimizer for
# convolutions, a learning rate that rises and falls, averaged weights and bfloat16 (section 7).
#
# The steps t. Algorithm 1 draws t uniformly, but some steps teach less than others: below 0.1 T,
# x_0 is plain to see in x_t, and above 0.65 T little of it is left (linear schedule: ᾱ_t < 0.014).
# Training draws those in between more often. Here, t/T is the second smallest of four uniform
# draws, which has the distribution Beta(2, 3), with its peak at 1/3. This lowered the FID of
# README.md's small network, unguided, from 0.331 to 0.236 (section 12; lower is better). Weighting
# the loss by the density of t instead gives the same loss on average, but helps less (README.md).
# Esser et al. 2024 (arXiv 2403.03206), for similar models of large images, draw the middle more
# often, too.
#
# The optimizers. AdamW scales each entry of a gradient separately. For the weights of convolutions,
# read as matrices, Muon does better (class Muon): with t still uniform, it lowered the same FID from
# 0.803 to 0.331. Everything else is left to AdamW: the first and the last convolution, nn.Linear,
# norms, biases, the embedding of the class.
#
# The learning rate rises during the first steps, while the optimizers' averages of the gradient are
# unreliable, and then falls along half a cosine to zero, so that the weights come to rest.
#
# The weights for sampling are an exponential moving average (EMA) of the trained weights, over
# roughly the last 1000 steps. Each step sees one batch with random t and noise, so the weights
# jitter from step to step. Their average hardly does. In the first 9000 steps it covers fewer, about
# a tenth of the steps so far, to forget the random first weights sooner.


def learning_rate(step, total_steps):
    """The learning rate as a share of its peak: a linear warm-up, then half a cosine down to 0.

    step is in 0..total_steps-1; the warm-up takes 5 % of the run, at most 500 steps.
    """
    warmup = min(500, max(1, total_steps // 20))
    if step < warmup:
        return (step + 1) / warmup
    decayed = (step - warmup) / (total_steps - warmup)  # in [0, 1)
    return 0.5 * (1 + math.cos(math.pi * decayed))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum, made nearly orthogonal.

    Jordan's argument: a few directions dominate the gradient of a weight matrix. Muon lets the others count as well,
    by bringing the singular values of the momentum matrix close to each other. The weight of a convolution is such a
    matrix, (out, in·kernel height·kernel width).

    Each step also multiplies the weights by 1 - lr (weight decay; Liu et al. 2025, arXiv 2502.16982). Without it,
    they tend to grow. The first convolution of a block is followed by a normalization, which cancels the scale of its
    weights; so the larger these are, the less a step changes.

    lr is AdamW's learning rate. AdamW moves each weight by about lr, but an orthogonal matrix with n columns has
    entries of about 1/√n only. So a step of Muon is multiplied by 10 lr (ten was found by trial).
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                average = state["momentum"].lerp_(weight.grad, 0.05)  # 0.95 average + 0.05 gradient
                update = weight.grad.lerp(average, 0.95)  # Nesterov's momentum: mix the gradient in again
                direction = orthogonalized(update.flatten(1))  # a matrix, as above
                weight.mul_(1 - group["lr"])  # weight decay
                weight.sub_(direction.view_as(weight), alpha=10 * group["lr"])


def orthogonalized(matrix):
    """A matrix divided by its norm, its singular values brought close to each other by three Newton-Schulz steps.

    Each step applies p(s) = 3.4445 s - 4.7750 s³ + 2.0315 s⁵ to all singular values s, because X Xᵀ X has the same
    singular vectors as X, and the cubes of the singular values. Three steps bring those above 0.02 to about 0.7 to 1.2,
    and make smaller ones up to 41 times as large (3.4445³). The coefficients are those of Jordan, who takes five steps;
    three cost less.
    """
    # Divided by its norm, it has no singular value above 1. 1e-7 avoids 0/0: as long as a later
    # layer is still zero, there is no gradient.
    X = matrix / (matrix.norm() + 1e-7)
    with half_precision(matrix.device):
        for _ in range(3):
            A = X @ X.T
            B = torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315)  # -4.7750 A + 2.0315 A A
            X = torch.addmm(X, B, X, beta=3.4445)  # 3.4445 X + B X
    return X


def make_optimizers(model):
    """Muon for the convolutions, except the first and the last, and AdamW for everything else, as a list.

    Jordan leaves first and last layers to AdamW, too: their inputs or outputs are pixels, not features. But he gives
    Muon the inner nn.Linear.
    """
    matrices, others = [], []
    for name, weight in model.named_parameters():
        inner = weight.ndim == 4 and not name.startswith(("conv_in", "conv_out"))
        (matrices if inner else others).append(weight)
    lr = model.config.lr
    return [Muon(matrices, {"lr": lr}), torch.optim.AdamW(others, lr, fused=True)]  # decay: PyTorch's 0.01


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Moves the averaged weights a little towards the trained ones: ema = d · ema + (1-d) · model."""
    d = min(decay, (1 + step) / (10 + step))  # at first 0.1, then rising
    for average, weight in zip(ema.parameters(), model.parameters()):
        average.lerp_(weight, 1 - d)


def train_step(model, ema, optimizers, x_0, y, step, total_steps):
    """One step of Algorithm 1, with the learning rate for this step. The averaged weights, ema, follow.

    x_0 (B, C, H, W) in [-1, 1]; y (B,); step in 0..total_steps-1. Returns the loss, a scalar tensor.
    """
    uniform = torch.rand(4, len(x_0), device=x_0.device)  # (4, B), in [0, 1)
    second_smallest = uniform.sort(dim=0).values[1]  # (B,)
    t = (second_smallest * model.config.timesteps).long()  # (B,), in 0..T-1
    with half_precision(x_0.device):
        loss = ddpm_loss(model, x_0, y, t)
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = model.config.lr * learning_rate(step, total_steps)
        optimizer.step()
        optimizer.zero_grad()
    update_ema(ema, model, step, model.config.ema_decay)
    return loss.detach()


# ======================================================================================================================
# PART THREE: the program
# ======================================================================================================================
#
# Everything around the model: files, runs, measurements and commands. None of it is needed to
# understand diffusion.

import argparse
import copy
import io
import os
import signal
import socket
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

ASSETS = Path(__file__).resolve().parent / "assets"
BATCH = 256  # images drawn or judged at a time


class UserError(ValueError):
    """An error that the user can fix. main prints only the message, which says what to do."""


@contextmanager
def explained(message):
    """with explained("cannot read it"): an exception inside becomes a UserError that begins with this message.

    UserErrors, which explain themselves, and a lack of memory pass.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{message} ({reason})") from error


def say(text, stream=None):
    """Prints a line, to stdout by default. If that fails, for whatever reason, the work goes on."""
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:  # the stream's encoding lacks a character
        say(text.encode("ascii", "backslashreplace").decode(), stream)
    except Exception:
        pass  # the stream is closed, or its disk is full, or it is no proper stream


# ----------------------------------------------------------------------------------------------------------------------
# 10. Data, checkpoints, images
# ----------------------------------------------------------------------------------------------------------------------
#
# Data. Pixels come as bytes 0..255 and go to the network as numbers in [-1, 1], centred at zero,
# like the noise. The whole set stays on the device as bytes (MNIST: 47 MB), so a batch takes one
# indexing operation, and there is no loader to wait for. A data set of the same kind needs only an
# entry in DATASETS, with a Config. For the 3x32x32 images of CIFAR-10, for example, conv_in and
# conv_out have three image channels, and the sizes in the U-Net are 32, 16, 8 and 4.


@dataclass
class Dataset:
    """Where a data set comes from, and the Config of a run on it with no flags. Its images are square."""

    torchvision_name: str  # in torchvision.datasets; takes root, train, download; has data, targets
    folder: str  # the subfolder of --data-dir where that class looks for its files
    files: str  # their names, for the error message
    config: Config


IDX = "the unpacked train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
CLOTHES = tuple("t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(","))
THINGS = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
DATASETS = {
    "mnist": Dataset("MNIST", "MNIST/raw", IDX, Config()),
    "fashion-mnist": Dataset("FashionMNIST", "FashionMNIST/raw", IDX, Config("fashion-mnist", 1, 28, CLOTHES)),
    "cifar10": Dataset("CIFAR10", "", "cifar-10-python.tar.gz", Config("cifar10", 3, 32, THINGS)),
}


def load_dataset(name, data_dir, train=True):
    """Reads a data set through torchvision, which downloads it if it is not there.

    Returns images (N, C, H, W) uint8 and labels (N,) int64, on the CPU. Raises UserError when it is unavailable.
    """
    if name not in DATASETS:
        raise UserError(f"there is no data set called {name}")
    source, config = DATASETS[name], DATASETS[name].config
    timeout = socket.getdefaulttimeout()
    folder = Path(data_dir, source.folder)
    with explained(f"cannot read or download {name}: put {source.files} into {folder}"):
        # Imported here because the import is slow and sampling does not need it.
        import torchvision

        dataset_class = getattr(torchvision.datasets, source.torchvision_name)
        socket.setdefaulttimeout(30)  # seconds; without a limit, torchvision would wait forever
        try:
            dataset = dataset_class(data_dir, train=train, download=True)
        finally:
            socket.setdefaulttimeout(timeout)
        labels = torch.as_tensor(dataset.targets)
        images = torch.as_tensor(dataset.data)  # (N, H, W) if grey, (N, H, W, C) in colour
        images = images.view(len(labels), config.image_size, config.image_size, config.image_channels)
        if not 0 <= labels.min() <= labels.max() < len(config.classes):
            raise ValueError("it has labels of other classes")
    return images.permute(0, 3, 1, 2).contiguous(), labels  # (N, C, H, W)


# Files. A run leaves two files that can be loaded again. weights.pt is for sampling: the averaged
# weights as float16, and the Config. checkpoint.pt is for resuming. It needs all that it
# holds: without the optimizers' averages, the next steps would have wrong directions and lengths;
# without the trained weights, training would go on from the averaged ones; without the averaged
# weights, the average would start anew; without the step number, the learning rate and the order of
# the images would start anew, too. Both files hold tensors and plain values and are read with
# weights_only=True, since unpickling can run arbitrary code.

FORMAT = 2  # of all files; raise it when old files would be misread


@contextmanager
def replacing(path):
    """with replacing(path) as file: what is written to file is collected in memory, then written to
    a temporary file, and that replaces path, which is never half written.

    Raises UserError at once if path cannot be written, before any work is spent on its contents.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ValueError("it is a folder")
        temporary.touch()
        temporary.unlink()  # or a killed command would leave it behind
    try:
        file = io.BytesIO()
        yield file
        with explained(f"cannot write {path}"):
            with open(temporary, "wb") as disk:
                disk.write(file.getvalue())
                disk.flush()  # from Python's buffer to the system,
                os.fsync(disk.fileno())  # and from there to the disk
            os.replace(temporary, path)  # only now: the old file stays if any of this fails
    finally:
        temporary.unlink(missing_ok=True)


def save(contents, path):
    """Writes a dictionary of tensors and plain values. Raises UserError."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **contents}, file)


def load(path):
    """Reads what save wrote, onto the CPU. Raises UserError if path is unreadable or save did not write it."""
    with explained(f"cannot read {path} as a file of ddpm.py"):
        contents = torch.load(path, map_location="cpu", weights_only=True)
        config = contents.get("config")  # a classifier has none
        if contents["format"] != FORMAT or (config and config["prediction"] != Config.prediction):
            raise ValueError("it is from another version, or its network predicts something else")
    return contents


def find_weights():
    """The newest weights.pt in runs/, or else assets/mnist.pt."""
    return max(Path("runs").glob("*/weights.pt"), key=os.path.getmtime, default=ASSETS / "mnist.pt")


def load_model(path=None, device="cpu"):
    """The model of a weights.pt, by default that of find_weights, ready for sampling.

    Raises UserError if the file cannot be read, is no weights.pt, or belongs to another network.
    """
    path = path or find_weights()
    contents = load(path)
    with explained(f"{path} holds no weights for this network; of a run's files, give weights.pt"):
        config = Config(**contents["config"])
        # Building a network draws random numbers; the caller's generator must not notice.
        with torch.random.fork_rng(devices=[]):
            model = UNet(config).float()  # also where the caller's default is float64
        model.load_state_dict(contents["weights"])
    return model.to(device).requires_grad_(False)


def from_bytes(images):
    """Turns pixels as in files, uint8 in 0..255, into what the network wants: float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_bytes(x):
    """The inverse of from_bytes: x, clamped to [-1, 1] and rounded, as uint8 in 0..255, on the CPU."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_image(x, columns=None):
    """Images x (N, C, H, W) in [-1, 1] as one PIL image: a grid, by default about square."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    missing = -len(x) % columns  # in the last row
    # Two black pixels below and to the right of each image, and black images after the last:
    cells = F.pad(to_bytes(x), (0, 2, 0, 2, 0, 0, 0, missing))  # (rows·columns, C, H+2, W+2)
    rows = [torch.cat(list(row), dim=2) for row in cells.split(columns)]  # each (C, H+2, width)
    grid = torch.cat(rows, dim=1)[:, :-2, :-2]  # (C, height, width)
    return Image.fromarray(grid.permute(1, 2, 0).squeeze(2).numpy())


def generate_number(model, label, seed=0, **options):
    """One digit, for a notebook: a PIL image.

    model is from load_model; label is the number or name of a class; options are the others of sample_steps. Raises
    UserError (a ValueError) if there is no such class.
    """
    number = class_number(str(label), model.config.classes)
    return to_image(sample(model, [number], seeds=[seed], **options))


def save_film(frames, file, columns):
    """Writes the steps of a sampling as a GIF: x_t above, x_0_hat below. The last frame stays two seconds.

    frames is a list of (x_t (N, C, H, W), x_0_hat (N, C, H, W)), from noise to image.
    """
    images = [np.vstack([to_image(x, columns) for x in pair]) for pair in frames]
    film = [ImageOps.scale(Image.fromarray(image), 3, Image.Resampling.NEAREST) for image in images]
    milliseconds = [max(20, 4000 // len(film))] * (len(film) - 1) + [2000]
    film[0].save(file, "GIF", save_all=True, append_images=film[1:], duration=milliseconds, loop=0)


def read_digit(path, size=28):
    """Reads an image file of one digit and makes it look like those of MNIST: x_0 (1, 1, size, size) in [-1, 1].

    It may be grey or coloured, dark on light or light on dark; the background must be plain and empty. As in MNIST
    (LeCun et al. 1998, section III.A), the digit fits into a box of 20x20 pixels, and its centre of mass is the
    middle of 28x28. Raises UserError when the file is not an image or shows nothing.
    """
    with explained(f"cannot read {path} as an image"):
        image = ImageOps.exif_transpose(Image.open(path))  # turned as the camera says
        if image.mode[0] in "IF":  # 16 or 32 bits: stretch the range of its values to 0..255
            values = np.asarray(image, np.float64)
            values = np.interp(values, (values.min(), values.max()), (0, 255))
            image = Image.fromarray(values.astype(np.uint8))
        grey, alpha = image.convert("LA").split()
        # A transparent background becomes white or black, whichever contrasts with the ink.
        ground = 255 if np.average(grey, weights=alpha) < 128 else 0
        grey = Image.composite(grey, Image.new("L", grey.size, ground), alpha)
        grey.thumbnail((200, 200))
    # Lighting is rarely even, so the paper is the median of a wide neighbourhood. Ink is what
    # differs from it, in the direction in which it differs more.
    paper = grey.resize((32, 32)).filter(ImageFilter.MedianFilter(25)).resize(grey.size)
    ink = np.asarray(grey, np.float32) - np.asarray(paper, np.float32)  # (height, width)
    ink = max(ink, -ink, key=np.max)
    if ink.max() < 40:
        raise UserError(f"{path} shows no digit: nothing in it stands out from the background")
    ink = Image.fromarray((ink / ink.max() - 0.15).clip(0))  # 0.15 removes the paper's grain
    ink = ink.crop(ink.getbbox())
    scale = 20 / 28 * size / max(ink.size)
    box = [max(1, round(scale * side)) for side in ink.size]  # a thin stroke keeps one pixel
    digit = np.asarray(ink.resize(box, Image.Resampling.BILINEAR))
    stroke = np.median(digit[digit > 0.3 * digit.max()])  # its typical value; in MNIST it is white
    pixels = Image.fromarray((digit / stroke * 255).clip(0, 255).astype(np.uint8))
    row, column = [np.average(index, weights=digit) for index in np.indices(digit.shape)]  # centre of mass
    canvas = Image.new("L", (size, size))
    canvas.paste(pixels, (round(size / 2 - column), round(size / 2 - row)))
    return from_bytes(torch.from_numpy(np.array(canvas)))[None, None]


# ----------------------------------------------------------------------------------------------------------------------
# 11. A run
# ----------------------------------------------------------------------------------------------------------------------
#
# train, at the end of this section, is Algorithm 1 with a report. First comes what else a run
# needs: its state and its files, its options, its processes and its signals.
#
# Under torchrun, several processes train one model together, each on its share of every batch. rank
# is the number of a process; number 0 alone prints and writes.

REPORT_EVERY, SAVE_EVERY = 50, 500  # steps


class Run:
    """A training run: all that its next step depends on."""

    def __init__(self, config, images, labels, device):
        torch.manual_seed(config.seed)
        self.config = config
        self.images, self.labels = images.to(device), labels.to(device)
        self.checksum = zlib.crc32(labels.numpy(), zlib.crc32(images.numpy()))
        # Images that do not fill a batch are skipped, different ones in each epoch.
        self.steps_per_epoch = max(1, len(images) // config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.model = UNet(config).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = make_optimizers(self.model)
        self.parts = [self.model, self.ema, *self.optimizers]  # what has a state_dict
        self.step = 0  # steps done
        self.loss_sum = torch.zeros((), device=device)  # since the epoch began
        self.log_csv = "epoch,step,loss\n"  # the contents of that file

    def batch(self, rank, processes):
        """This process's share of the next step's images and classes: x_0 (share, C, H, W), y (share,).

        All randomness follows from the seed, the number of the step and the rank, so a resumed run needs no saved
        generator state, and no saved order: it is drawn anew in each step.
        """
        B = self.config.batch_size
        epoch, position = divmod(self.step, self.steps_per_epoch)
        # Python's hash of a tuple of integers, unlike a string's, is the same in every process.
        shuffle = torch.Generator().manual_seed(hash((self.config.seed, epoch)))
        order = torch.randperm(len(self.images), generator=shuffle)
        share = order.split(B)[position][rank::processes].to(self.images.device)
        # For t, the noise and the dropped labels:
        torch.manual_seed(hash((self.config.seed, self.step, rank)))
        return from_bytes(self.images[share]), self.labels[share]

    def report(self, steps_per_s):
        """Prints where the run is. At the end of an epoch, it also logs the mean loss and resets it.

        With several processes, it is the loss of this one's shares.
        """
        epoch, position = divmod(self.step - 1, self.steps_per_epoch)
        loss = self.loss_sum.item() / (position + 1)
        minutes = (self.total_steps - self.step) / steps_per_s / 60
        place = f"epoch {epoch + 1}  step {self.step}  loss {loss:.4f}"
        images_per_s = steps_per_s * self.config.batch_size
        say(f"{place}  {images_per_s:.0f} images/s  {minutes:.1f} min left")
        if position + 1 == self.steps_per_epoch:
            self.log_csv += f"{epoch + 1},{self.step},{loss:.6f}\n"
            self.loss_sum.zero_()

    def save(self, out, sample_every):
        """Writes checkpoint.pt, from which the run goes on as if it had never stopped, and then the other files.

        Those can be made again from checkpoint.pt. If one cannot be written, the next save tries again, and so does
        --resume; only the samples_EPOCH.png of an earlier epoch stays missing. Raises UserError if checkpoint.pt cannot
        be written, if the weights are not finite, or if another file cannot be written at the last step.
        """
        if not nn.utils.parameters_to_vector(self.model.parameters()).isfinite().all():
            raise UserError("the training has diverged: begin another run with a lower --lr")
        contents = {
            "config": asdict(self.config),
            "checksum": self.checksum,
            "parts": [part.state_dict() for part in self.parts],
            "step": self.step,
            "loss_sum": self.loss_sum.item(),
            "log_csv": self.log_csv,
        }
        save(contents, out / "checkpoint.pt")
        if self.step == 0:
            return  # nothing is learned yet
        try:
            self.write_outputs(out, sample_every)
        except UserError as error:
            if self.step == self.total_steps:
                raise UserError(f"training is complete, but {error}: --resume tries again")
            say(f"ddpm.py: warning: {error}", sys.stderr)

    def restore(self, saved):
        """Goes on from what save wrote. Raises UserError if it does not fit this run, or comes from other data."""
        with explained("this run cannot go on"):
            if saved["checksum"] != self.checksum:
                raise ValueError("it began with other images or labels than those in --data-dir")
            for part, state in zip(self.parts, saved["parts"], strict=True):
                part.load_state_dict(state)
            self.step = saved["step"]
            if self.step > self.total_steps:
                raise ValueError(f"it has already made {self.step} steps, more than --epochs asks for")
            self.loss_sum.fill_(saved["loss_sum"])
            self.log_csv = saved["log_csv"]

    def write_outputs(self, out, sample_every):
        """Writes weights.pt, log.csv and, when it is due, samples_EPOCH.png. Raises UserError."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        weights = {name: tensor.half() for name, tensor in self.ema.state_dict().items()}
        save({"config": asdict(self.config), "weights": weights}, out / "weights.pt")
        with replacing(out / "log.csv") as file:
            file.write(self.log_csv.encode())
        if position == 0 and (epoch % sample_every == 0 or self.step == self.total_steps):
            # Each class five times. Image i has the same noise in every epoch, so that epochs can
            # be compared. There is no guidance, to see what the network itself can do.
            n = len(self.config.classes)
            samples = sample(self.ema, list(range(n)) * 5, guidance=1)
            with replacing(out / f"samples_{epoch:03d}.png") as file:
                to_image(samples, columns=n).save(file, "PNG")


def settle_config(args, saved):
    """The Config of a new run, or, if there is a saved state, of the run that goes on.

    Raises UserError if a run would go on with other options.
    """
    given = {name: value for name, value in vars(args).items() if hasattr(Config, name) and value is not None}
    began = Config(**saved["config"]) if saved else DATASETS[args.dataset or Config.dataset].config
    config = replace(began, **given)
    if saved and replace(config, epochs=began.epochs) != began:
        raise UserError("the run began with other options: with --resume, only --epochs may change")
    return config


def join_processes(device, processes):
    """Joins the processes that torchrun started, waits for all, and returns this one's device."""
    if processes == 1:
        return device
    with explained("cannot join the other processes: use torchrun, with one GPU each or --device cpu"):
        backend = {"cpu": "gloo", "cuda": "nccl"}[device.type]
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.distributed.init_process_group(backend)
        torch.distributed.barrier()  # NCCL alone would not wait here
    return device


def share_gradients(model, processes):
    """From now on, backward() replaces each gradient by its mean over all processes.

    Each process sees its share of the batch, so this mean is the gradient of the whole batch. All processes start
    with the same weights and make the same steps, so they keep the same weights.
    """

    def average(parameter):
        torch.distributed.all_reduce(parameter.grad)  # their sum
        parameter.grad /= processes

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(average)


@contextmanager
def stop_requests(device, processes):
    """Yields a function that says whether a signal asked any process to stop; all then stop at the same step.

    A signal that was ignored when the program started, as under nohup, stays ignored. The old handlers are restored
    at the end.
    """
    received, handlers = [], {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            with suppress(ValueError):  # only the main thread may do this
                handlers[number] = signal.signal(number, lambda number, _: received.append(number))

    def asked():
        if processes == 1:
            return bool(received)
        count = torch.tensor(len(received), device=device)
        torch.distributed.all_reduce(count)
        return count.item() > 0

    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def begin(args, out, rank, processes):
    """The Run that args ask for, begun or resumed. Raises UserError."""
    saved = load(out / "checkpoint.pt") if args.resume else None
    with explained(f"cannot begin or resume the run in {out}"):
        config = settle_config(args, saved)
        if saved is None and any(out.glob("[!.]*")):
            raise ValueError("it is not empty: add --resume, choose another --out, or empty it")
    if config.batch_size % processes:
        raise UserError(f"{processes} processes cannot share a batch of {config.batch_size} images")
    if rank == 0:
        say(f"reading {config.dataset} from {args.data_dir}; what is missing there is downloaded")
        images, labels = load_dataset(config.dataset, args.data_dir)
    device = join_processes(torch.device(args.device), processes)  # waits for process 0, so only it downloads
    if rank > 0:
        images, labels = load_dataset(config.dataset, args.data_dir)
    run = Run(config, images, labels, device)
    if saved:
        run.restore(saved)
    if processes > 1:
        share_gradients(run.model, processes)
    if args.compile:
        run.model.compile()
    return run


def train(args):
    """The train command: leaves checkpoint.pt, weights.pt, log.csv and samples_EPOCH.png in a folder.

    args is what make_parser parsed. Process 0 returns 130 if it was stopped before the end. Raises UserError.
    """
    out = Path(args.out or f"runs/{args.dataset or Config.dataset}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if processes > 1 else 0
    run = begin(args, out, rank, processes)
    if rank == 0:
        # A new run sees at once whether it can write; a resumed one writes what was missing.
        run.save(out, args.sample_every)
    first_step, started_at, stopping = run.step, time.perf_counter(), False
    with stop_requests(run.images.device, processes) as asked_to_stop:
        while run.step < run.total_steps and not stopping:
            x_0, y = run.batch(rank, processes)
            run.loss_sum += train_step(run.model, run.ema, run.optimizers, x_0, y, run.step, run.total_steps)
            run.step += 1

            stopping = asked_to_stop()
            position = run.step % run.steps_per_epoch  # 0 at the end of an epoch
            save_now = stopping or position % SAVE_EVERY == 0
            if rank == 0 and (save_now or run.step % REPORT_EVERY == 0):
                run.report((run.step - first_step) / (time.perf_counter() - started_at))
            if rank == 0 and save_now:
                run.save(out, args.sample_every)

    if processes > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    if run.step < run.total_steps:
        say(f"stopped at step {run.step} of {run.total_steps}; repeat the command with --resume to go on")
        return 130
    say(f"done; try: python ddpm.py sample --checkpoint {out / 'weights.pt'}")


# ----------------------------------------------------------------------------------------------------------------------
# 12. Evaluation
# ----------------------------------------------------------------------------------------------------------------------
#
# How good are the images? Three numbers measure it. Each is blind to something, so none is given
# alone, and below each stands its value for as many real test images.
#
# Label accuracy: how often does a classifier read the digit that was asked for? It sees whether the
# class came through, not whether the image looks like handwriting: a printed 3 would pass. With
# guidance it can be higher than for real images, some of which are hard to read. That does not make
# the images better than real ones.
#
# FID (Heusel et al. 2017, arXiv 1706.08500): compute the classifier's penultimate-layer features of
# the samples and of all training images, describe each set by its mean and covariance, and measure
# how far these two Gaussians are apart. It sees missing variety and wrong style, and 0 is best. It
# is blind to labels, and to a model that only repeats its training images. The features usually
# come from Inception, a network trained on photographs of 299x299 pixels; grey digits are nothing
# like them. So an FID printed here can only be compared with others printed here, by the same
# classifier and for the same number of images: fewer images make it larger.
#
# Inception Score (Salimans et al. 2016, arXiv 1606.03498): is the classifier sure about each image,
# and does it find all classes equally often? It goes from 1 to the number of classes. It sees
# neither style nor variety within a class, and is given because it is widely known (here over all
# images at once, not as the mean of ten parts).

CLASSIFIER_STEPS = 1900  # of 128 images each, about four epochs of MNIST


def make_classifier(image_channels, classes):
    """A small convolutional network: (B, C, H, W) in [-1, 1] -> features (B, 64) -> logits (B, classes)."""

    def block(in_channels, out_channels):
        convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()

    body = nn.Sequential(
        *block(image_channels, 16),
        nn.MaxPool2d(2),  # (B, 16, 14, 14)
        *block(16, 32),
        *block(32, 32),
        nn.MaxPool2d(2),  # (B, 32, 7, 7)
        *block(32, 64),
        *block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),  # (B, 64)
    )
    return nn.Sequential(body, nn.Linear(64, classes))


@torch.no_grad()
def judge(classifier, images):
    """A classifier's verdict on images (N, C, H, W) uint8.

    Returns probabilities (N, classes) and features (N, 64), float64, on the CPU.
    """
    body, head = classifier.eval()  # the two parts that make_classifier gives it
    batches = images.to(head.weight.device).split(BATCH)
    features = torch.cat([body(from_bytes(batch)) for batch in batches])  # (N, 64)
    return head(features).cpu().double().softmax(dim=1), features.cpu().double()


def frechet_distance(features_1, features_2):
    """FID: the squared Fréchet distance of two Gaussians, fitted to features (N_1, n) and (N_2, n), float64."""
    mean_1, cov_1 = features_1.mean(dim=0), features_1.T.cov()
    mean_2, cov_2 = features_2.mean(dim=0), features_2.T.cov()
    # Heusel et al.: d² = ‖μ_1 - μ_2‖² + Tr(Σ_1 + Σ_2 - 2 (Σ_1 Σ_2)^½). The trace of a square root
    # is the sum of the square roots of the eigenvalues. They are real and not negative, except for
    # rounding.
    roots = torch.linalg.eigvals(cov_1 @ cov_2).real.clamp(min=0).sqrt()
    return ((mean_1 - mean_2) ** 2).sum() + torch.trace(cov_1 + cov_2) - 2 * roots.sum()


def inception_score(probabilities):
    """exp E KL(p(y|x) ‖ p(y)) of probabilities (N, classes): 1 to classes (Salimans et al. 2016)."""
    # E KL(p(y|x) ‖ p(y)) = H(E p(y|x)) - E H(p(y|x)), with the entropy H
    entropy_of_mean = torch.special.entr(probabilities.mean(dim=0)).sum()
    mean_entropy = torch.special.entr(probabilities).sum(dim=1).mean()
    return (entropy_of_mean - mean_entropy).exp()


def train_classifier(classifier, images, labels):
    """Trains a classifier on images (N, C, H, W) uint8 with labels (N,), on one device: two minutes on a CPU."""
    optimizer = torch.optim.AdamW(classifier.parameters())
    for step in range(CLASSIFIER_STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * learning_rate(step, CLASSIFIER_STEPS)
        batch = torch.randint(len(images), (128,))
        # Each batch is shifted by up to two pixels, so that the shape of a digit is learned and not
        # its position. (What leaves on one side comes back on the other; MNIST's margin is all but
        # empty.)
        shift = torch.randint(-2, 3, (2,)).tolist()
        x = from_bytes(images[batch]).roll(shift, dims=(2, 3))
        loss = F.cross_entropy(classifier(x), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def load_classifier(name, data_dir, device):
    """The classifier of a data set. If assets/ has none, it is trained now and kept there.

    Raises UserError if the data for that is unavailable, or if the file is damaged or cannot be written.
    """
    config, path = DATASETS[name].config, ASSETS / f"classifier_{name}.pt"
    torch.manual_seed(0)
    classifier = make_classifier(config.image_channels, len(config.classes)).to(device)
    if not path.exists():
        say(f"training a classifier of {name}, once")
        with replacing(path) as file:  # fails now, and not after the training, if it cannot be kept
            images, labels = (tensor.to(device) for tensor in load_dataset(name, data_dir))
            train_classifier(classifier, images, labels)
            torch.save({"format": FORMAT, "weights": classifier.state_dict()}, file)
    with explained(f"{path} is not a classifier of this ddpm.py: delete it"):
        classifier.load_state_dict(load(path)["weights"])
    return classifier


def draw(model, labels, seeds, **options):
    """Samples in batches, and yields the images one by one, each (C, H, W).

    labels and seeds are lists (N); options are the others of sample_steps, an x_T only as (1, C, H, W).
    """
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        images = sample(model, labels[part], seeds=seeds[part], **options)
        say(f"{start + len(images)} of {len(labels)}")
        yield from images


# The flags of sample and evaluate that are arguments of sample_steps, with their defaults:
SAMPLING = {"steps": STEPS, "eta": 0, "guidance": GUIDANCE, "guidance_interval": GUIDANCE_INTERVAL}


def sampling_options(args):
    """Those flags, as given."""
    return {name: getattr(args, name) for name in SAMPLING}


def evaluate(args):
    """The evaluate command: judges drawn images, in one line, and as many real ones, in a second."""
    model = load_and_say(args)
    name = model.config.dataset
    images, y = load_dataset(name, args.data_dir, train=False)
    # At random, since the two halves of MNIST's test set differ: they come from different writers.
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: args.count]
    images, y = images[chosen], y[chosen]
    classifier = load_classifier(name, args.data_dir, args.device)
    training_images, _ = load_dataset(name, args.data_dir)
    _, training_features = judge(classifier, training_images)
    seeds = [args.seed * 1_000_000 + i for i in range(len(y))]  # no two --seed share one
    drawn = draw(model, y.tolist(), seeds, **sampling_options(args))
    samples = to_bytes(torch.stack(list(drawn)))
    for title, x in ("samples", samples), ("test images", images):
        probabilities, features = judge(classifier, x)
        accuracy = (probabilities.argmax(dim=1) == y).double().mean()
        fid = frechet_distance(features, training_features)
        score = inception_score(probabilities)
        line = f"{len(x):>5} {title:<11}  label accuracy {accuracy:.2%}"
        say(f"{line}  FID {fid:.3f}  Inception Score {score:.3f}")


# ----------------------------------------------------------------------------------------------------------------------
# 13. The command line
# ----------------------------------------------------------------------------------------------------------------------
#
# Each command is a function of the parsed flags, args. The flags stand in one table, FLAGS: a block
# for each group of commands that share flags, headed by their names, and in it a line for each
# flag, with its name, its kind (an entry of KINDS) and its help. A flag of train that is named like
# a field of Config sets that field. It has no default of its own, so that None means "not given",
# as --resume needs to know. Other defaults stand below the table or in the commands; the help tells
# them all.


def load_and_say(args):
    """Loads the model of --checkpoint and prints which file it came from. Raises UserError."""
    path = args.checkpoint or find_weights()
    model = load_model(path, args.device)
    say(f"weights: {path} ({model.config.dataset})")
    if model.config.class_dropout == 0 and args.guidance != 1:
        raise UserError("this network has not learned to draw without a class: it needs --guidance 1")
    return model


def class_number(name, classes):
    """The index of the class called name; name may be the index itself, unless a class is called a number.

    Raises UserError if there is no such class.
    """
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes) and not any(map(str.isdecimal, classes)):
        return int(name)
    raise UserError(f"no class is called {name!r}: choose from {', '.join(classes)}")


def read_hand(model, args):
    """The noise x_T (1, 1, H, W) that becomes the digit in the image file --like. Raises UserError.

    It warns if that looks like another digit than --like-label.
    """
    if not args.like or not args.like_label or args.eta or model.config.image_channels != 1:
        raise UserError("--like needs --like-label, the digit it shows, --eta 0 and a model of grey images")
    if args.count:
        raise UserError("--like takes no --count: each label has one image in that hand")
    number = class_number(args.like_label, model.config.classes)
    x_0 = read_digit(args.like, model.config.image_size)
    if model.config.dataset == "mnist":  # its classifier is in assets/
        classifier = load_classifier("mnist", args.data_dir, "cpu")
        probabilities, _ = judge(classifier, to_bytes(x_0))
        read = probabilities.argmax().item()
        if read != number:
            say(f"ddpm.py: warning: {args.like} looks like {read}, so the hand may come out wrong", sys.stderr)
    return invert(model, x_0.to(args.device), [number])


def sample_command(args):
    """The sample command: draws the labels asked for and writes one image file, or a folder of them."""
    model = load_and_say(args)
    # Images of one label fill a square. Several labels, the digits of a number for example, form a
    # row, repeated count times.
    row = [class_number(name, model.config.classes) for name in args.label or model.config.classes]
    columns = len(row) if len(row) > 1 else None
    labels = row * (args.count or (1 if columns or args.like else 16))
    # The images of a row share a seed, so they look as if one hand had written them.
    seeds = [args.seed * 1_000_000 + i // len(row) for i in range(len(labels))]
    folder = args.out.is_dir() or not args.out.suffix
    if folder and any(args.out.glob("*.png")):
        raise UserError(f"{args.out} has images in it: choose another --out, or remove them")
    if not folder and args.out.suffix != ".png":
        raise UserError("--out takes a .png file or a folder")
    if args.gif and (args.gif.suffix != ".gif" or len(labels) > BATCH):
        raise UserError(f"--gif takes a .gif file and at most {BATCH} images")
    options = sampling_options(args)
    if args.like or args.like_label:
        options["x_T"] = read_hand(model, args)
    if folder:
        with explained(f"cannot write into {args.out}"):
            args.out.mkdir(parents=True, exist_ok=True)
    if args.gif:
        with replacing(args.gif) as file:
            frames = list(sample_steps(model, labels, seeds=seeds, **options))
            save_film(frames, file, columns)
        images, _ = frames[-1]
    else:
        images = draw(model, labels, seeds, **options)  # a generator: it draws below
    if folder:
        for i, x_0 in enumerate(images):
            with replacing(args.out / f"{labels[i]}_{i:05d}.png") as file:
                to_image(x_0[None]).save(file, "PNG")
    else:
        with replacing(args.out) as file:
            to_image(torch.stack(list(images)), columns).save(file, "PNG")
    say(f"written: {args.out}" + (f" and {args.gif}" if args.gif else ""))


def shapes_command(args):
    """The shapes command: runs the network once and prints each block's output shape and parameters."""
    config = settle_config(args, saved=None)
    model = UNet(config)

    def show(name, block, inputs, output):
        parameters = sum(p.numel() for p in block.parameters())
        shape = str(tuple(output.shape[1:]))
        say(f"{name:<14} {shape:<18} {parameters:>10,}")

    say(f"{'block':<14} {'output shape':<18} {'parameters':>10}")
    for name, block in model.named_modules():
        if name.rpartition(".")[0] in ("", "encoder", "downsample", "decoder", "upsample"):
            block.register_forward_hook(partial(show, name or "total"))  # prints in the order of the pass
    x_t = torch.zeros(1, config.image_channels, config.image_size, config.image_size)
    model(x_t, torch.tensor([0]), torch.tensor([0]))


DEVICES = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]


def in_range(convert, low, high):
    """An argparse type: a number from low to high."""

    def number(text):
        value = convert(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number  # if convert fails, argparse says "invalid number value"


KINDS = {
    "word": {},
    "words": {"nargs": "+"},
    "path": {"type": Path},
    "switch": {"action": "store_true"},
    "count": {"type": in_range(int, 1, 10**6)},
    "counts": {"type": in_range(int, 1, 10**6), "nargs": "+"},
    "timesteps": {"type": in_range(int, 2, 10**5)},  # one linear step would leave x_T almost clean
    # The covariance of 64 features needs more than 64 images; there are 10,000 test images.
    "many": {"type": in_range(int, 65, 10000)},
    "seed": {"type": in_range(int, 0, 2**31)},
    "number": {"type": in_range(float, 0, 99)},
    "share": {"type": in_range(float, 0, 1)},
    "shares": {"type": in_range(float, 0, 1), "nargs": 2},
    "dataset": {"choices": DATASETS},
    "schedule": {"choices": SCHEDULES},
    "device": {"choices": DEVICES},
}
FLAGS = f"""
train shapes
dataset            dataset   the data set (default: {Config.dataset})
channels           counts    of the U-Net, one number per size (default: 32 64 128 256)

train
epochs             count     passes over the training images (default: {Config.epochs})
batch-size         count     images in a step (default: {Config.batch_size})
lr                 share     peak learning rate (default: {Config.lr})
timesteps          timesteps T, the number of noising steps (default: {Config.timesteps})
schedule           schedule  of the noise (default: {Config.schedule})
class-dropout      share     share of labels to drop; 0 rules out guidance (default: {Config.class_dropout})
ema-decay          share     of the averaged weights, per step (default: {Config.ema_decay})
out                path      folder of the run (default: runs/DATASET)
sample-every       count     epochs between sample images (default: 1)
resume             switch    continue the run in --out; only --epochs may change
compile            switch    use torch.compile, which needs a compiler; the first step then takes longer

sample
label              words     class, or classes of a row, by name or number (default: all)
count              count     images (default: 16), or rows if several labels (default: 1); not with --like
like               word      write in the hand of this image of a digit, PNG or JPEG
like-label         word      the digit that --like shows
gif                path      a film of the sampling, x_t above and x_0_hat below
out                path      a .png file, or a folder to fill (default: samples.png)

evaluate
count              many      images to draw, and real ones beside them (default: 10000)

sample evaluate
checkpoint         path      a weights.pt (default: the newest in runs/, or assets/mnist.pt)
steps              count     from noise to image; more than T count as T (default: {STEPS})
eta                share     fresh noise; 1 with T steps is Algorithm 2 (default: 0)
guidance           number    S; 0: no class, 1: no guidance (default: {GUIDANCE})
guidance-interval  shares    shares of T between which S may be above 1 (default: 0.25 0.45)

train evaluate
data-dir           path      folder of the data; what is missing is downloaded (default: data)

train sample evaluate
seed               seed      of the random numbers (default: 0)
device             device    where to run (default: {DEVICES[0]})
"""
COMMANDS = {  # name: function, help, defaults
    "train": (train, "train a model into a folder", {"sample_every": 1}),
    "sample": (sample_command, "draw images", SAMPLING | {"seed": 0, "out": Path("samples.png")}),
    "evaluate": (evaluate, "measure how good drawn images are", SAMPLING | {"seed": 0, "count": 10000}),
    "shapes": (shapes_command, "show the blocks of the network", {}),
}


def make_parser():
    """The commands and their flags, as listed in FLAGS and COMMANDS.

    What is not given and has no default is None.
    """
    parser = argparse.ArgumentParser(prog="ddpm.py", description=__doc__.splitlines()[0])
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", help="has its own --help")
    commands = {}
    for name, (function, help, defaults) in COMMANDS.items():
        commands[name] = subparsers.add_parser(name, help=help, description=help)
        commands[name].set_defaults(function=function, device=DEVICES[0], data_dir=Path("data"), **defaults)
    for block in FLAGS.strip().split("\n\n"):
        names, *lines = block.splitlines()
        for line in lines:
            flag, kind, help = line.split(maxsplit=2)
            for name in names.split():
                commands[name].add_argument("--" + flag, help=help, **KINDS[kind])
    return parser


HINTS = {  # words in PyTorch's message: what to say instead
    "out of memory": "out of memory: choose a smaller --batch-size, --channels or --count",
    "to allocate": "out of memory: choose a smaller --batch-size, --channels or --count",
    "by peer": "another process is gone: --resume goes on from the last save",
    "C++ compiler": "--compile found no compiler: install one, or leave it out",
    "triton installation": "--compile found no Triton, which it needs on a GPU: install it, or leave it out",
}


def main(argv=None):
    """Runs one command, from argv or the process's arguments. Returns the exit status.

    0 is success, 1 an error, 130 a stop. A wrong flag exits at once, with status 2 (argparse). Any other exception is
    not caught.
    """
    args = make_parser().parse_args(argv)
    try:
        return args.function(args) or 0
    except KeyboardInterrupt:
        say("ddpm.py: stopped; files already written are kept", sys.stderr)
        return 130
    except (UserError, OSError) as error:
        message = error
    except (MemoryError, RuntimeError) as error:
        text = "out of memory" if isinstance(error, MemoryError) else str(error)
        message = next((hint for words, hint in HINTS.items() if words in text), None)
        if message is None:
            raise
    say(f"ddpm.py: error: {message}", sys.stderr)
    return 1


if __name__ == "__main__":
    # All files are written. An ordinary exit could still fail, in flushing a stdout that is full or
    # gone, or in ending threads of torch.distributed, which now and then abort the process.
    os._exit(main())
