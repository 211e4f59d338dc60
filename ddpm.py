#!/usr/bin/env python3
"""ddpm.py: a class-conditional diffusion model that writes handwritten digits, in one file to be read from top to bottom.

The idea, in five sentences. Take a picture and add a little Gaussian noise to it, again and again, T times: what is left
is pure noise. One such step is so small that it can be undone, if only one knows which noise was added. So a neural
network is trained to look at a noisy picture and to predict the noise that is in it. To draw a new picture, start from
pure noise and take away a little of the predicted noise, again and again, T times. Tell the network which digit it is
looking at while it learns, and it will draw the digit that you ask for.

The four equations (numbers as in Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239):

    Eq. 4    q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I)               t steps of noise at once                     section 2
    Eq. 14   L_simple     = E ‖ε - ε_θ(x_t, t, y)‖²                what the network learns                      section 4
    Eq. 15   x̂_0          = (x_t - √(1-ᾱ_t) ε_θ) / √ᾱ_t           the picture that it sees in the noise        section 5
    Eq. 6    x_{t-1}      ~ N(μ̃_t(x_t, x̂_0), β̃_t I)              one step back, from noise towards a picture  section 5

The names:

    paper      here                   meaning
    T, t       T, t                   number of noising steps; which of them. The code counts t = 0..T-1, the paper 1..T:
                                      index t here is the paper's t+1, and "x_{t-1}" of t = 0 is the clean picture x_0
    β_t        betas                  variance of the noise that step t adds                        (T,)
    α_t        alphas                 1 - β_t, what is left of the variance of the picture          (T,)
    ᾱ_t        alphas_cumprod         α_1 α_2 ... α_t, what t steps leave of it                     (T,)
    ᾱ_{t-1}    alphas_cumprod_prev    the same, one step earlier; before the first step it is 1
    x_0, x_t   x_0, x_t               clean picture, in [-1, 1]; the same after t steps of noise    (B, C, H, W)
    ε, ε_θ     eps, eps_hat           the noise that was added; what the network takes it for       (B, C, H, W)
    x̂_0        x_0_hat                the clean picture that eps_hat implies                        (B, C, H, W)
    y          y                      class of each picture, 0..9; one more number says "none"      (B,)

    In shapes, B is the batch, C the channels, H and W height and width, E the width of an embedding; comments show the
    shapes of 28x28 grey pictures and of the default channels 32, 64, 128, 256.

Commands (each has --help):

    python ddpm.py sample --label 3            draw threes with the trained weights in assets/
    python ddpm.py sample --label 2 0 2 6      write a number
    python ddpm.py train                       train on MNIST, into runs/mnist
    python ddpm.py shapes                      the network as a table

From Python: model = ddpm.load_model(); ddpm.generate_number(model, label=5) gives a PIL image.
"""

import argparse
import copy
import csv
import io
import math
import os
import pickle
import signal
import socket
import sys
import time
import zipfile
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

# ======================================================================================================================
# 1. The noise schedule
# ======================================================================================================================
#
# Noise is added in T small steps. Step t shrinks the picture a little and adds Gaussian noise of variance β_t:
#
#     Eq. 2:  q(x_t | x_{t-1}) = N(√(1-β_t) x_{t-1}, β_t I)
#
# The factor √(1-β_t) keeps the total variance where it was: if x_{t-1} has variance 1, x_t has (1-β_t) + β_t = 1.
# The network therefore always sees inputs of the same size.
#
# Why must β be small? Because only then is the *reverse* of a step, from x_t to x_{t-1}, close to a Gaussian too, and a
# Gaussian is all that the sampler of section 5 can draw from. Big steps backwards would have to choose between
# different pictures; small ones only have to nudge.
#
# What the schedule has to achieve is best seen in ᾱ_t = α_1 α_2 ... α_t with α_t = 1 - β_t: the share of the picture's
# variance that is left after t steps (Eq. 4, next section). It has to fall from almost 1 to almost 0. At the end,
# √ᾱ_T must be close to 0, since sampling starts from pure noise: whatever signal x_T still held in training would be
# missing there. With the linear schedule √ᾱ_T is 0.006.


def beta_schedule(schedule, timesteps):
    """The variance of the noise that each step adds.

    schedule is "linear" (Ho et al. 2020, section 4) or "cosine" (Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17).
    timesteps is T, at least 1. Returns betas (T,) in float64, each in (0, 0.999]. Raises ValueError for another name.

    Why float64: ᾱ is a product of T factors just below 1, and near t = 0 what counts is 1-ᾱ, a difference of almost
    equal numbers. On T numbers the precision costs nothing. (The network itself works in float32.)
    """
    if schedule == "linear":
        # From 0.0001 to 0.02 when T is 1000. Fewer steps have to be bigger ones, or signal would be left in x_T.
        scale = 1000 / timesteps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
    elif schedule == "cosine":
        # Eq. 17: ᾱ_t = f(t) / f(0),  f(t) = cos²((t/T + s) / (1 + s) · π/2),  s = 0.008,  and β_t = 1 - ᾱ_t / ᾱ_{t-1}.
        # ᾱ falls more evenly than with the linear schedule, which destroys small pictures sooner than necessary. The
        # offset s keeps the first β from being too small to be of use.
        s = 0.008
        t = torch.arange(timesteps + 1, dtype=torch.float64)
        f = torch.cos((t / timesteps + s) / (1 + s) * math.pi / 2) ** 2  # (T+1,)
        betas = 1 - f[1:] / f[:-1]  # f(0) cancels
    else:
        raise ValueError(f"no schedule is called {schedule!r}: choose linear or cosine")
    return betas.clamp(max=0.999)  # at β = 1 nothing of the picture would be left, and sampling would divide by zero


# ======================================================================================================================
# 2. The forward process: from picture to noise
# ======================================================================================================================
#
# To train the network at step t, one needs x_t. Going there step by step would take t draws of noise. But a sum of
# independent Gaussians is Gaussian again, so t steps of Eq. 2 collapse into one. Two of them, for example:
#
#     x_2 = √α_2 x_1 + √β_2 ε_2 = √α_2 (√α_1 x_0 + √β_1 ε_1) + √β_2 ε_2 = √(α_2 α_1) x_0 + √(α_2 β_1) ε_1 + √β_2 ε_2
#
# The variances of the two noises add up to α_2 β_1 + β_2 = α_2 (1-α_1) + (1-α_2) = 1 - α_2 α_1. So one draw with that
# variance does the same; and so on for t steps, with ᾱ_t in place of α_2 α_1. That makes training cheap: any t, at once.


def q_sample(x_0, t, eps, alphas_cumprod):
    """Noises clean pictures to step t (Ho et al. 2020, Eq. 4).

    x_0 (B, C, H, W) in [-1, 1]; t (B,) integers in 0..T-1; eps like x_0, standard normal; alphas_cumprod (T,), on the
    device of t. Returns x_t, like x_0.
    """
    alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1): each picture has its own t
    # Eq. 4: q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps


# ======================================================================================================================
# 3. The network: a U-Net that predicts the noise
# ======================================================================================================================
#
# Input: a noisy picture, the step t, the class y. Output: the noise in it, as large as the picture. The network needs
# both the overall shape (is this going to be a three?) and every single pixel. A U-Net has a path for each: downwards
# it halves the picture while it doubles the channels, to see the whole; upwards it comes back to full size; and at each
# size a skip connection hands the details across.
#
#     x_t (1, 28, 28)                                                             eps_hat (1, 28, 28)
#         │ conv_in                                                                     ▲ conv_out
#     (32, 28, 28) ── encoder.0 ───────────────────── skip ───────────────────── decoder.0
#         │ downsample.0                                                                ▲ upsample.0
#     (64, 14, 14) ── encoder.1 ───────────────────── skip ───────────────────── decoder.1
#         │ downsample.1                                                                ▲ upsample.1
#     (128, 7, 7) ─── encoder.2 ───────────────────── skip ───────────────────── decoder.2
#         │ downsample.2                                                                ▲ upsample.2
#     (256, 4, 4) ─── encoder.3 ───────────────────── skip ───────────────────── decoder.3
#         │                                                                             ▲
#         └──────────── middle_in (residual) ── attention ── middle_out (residual) ─────┘
#
# Time and class enter each residual block; without them the same x_t could mean different noise. Groups of channels are
# normalised picture by picture (GroupNorm), never over the batch: a batch mixes pictures with little and with much
# noise, whose common statistics would mean nothing.


def timestep_embedding(t, dim):
    """Sinusoidal embedding of the step (Vaswani et al. 2017, section 3.5; used for t by Ho et al. 2020).

    t (B,); dim is even. Returns (B, dim), values in [-1, 1]. It works as the hands of a clock do: fast frequencies tell
    neighbouring steps apart, slow ones say whether it is early or late. A bare number t would do both badly.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)  # (dim/2,) from 1 to about 1/10000
    args = t[:, None] * freqs[None, :]  # (B, dim/2)
    return torch.cat([args.cos(), args.sin()], dim=1)  # (B, dim)


def zero_init(layer):
    """Sets a layer's weight and bias to zero and returns it.

    The last layer of each residual branch begins like this: the branch adds nothing at first, so that the untrained
    network passes its input straight through, however deep it is, and each branch grows in as far as it helps.
    """
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    """Eight groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResBlock(nn.Module):
    """Two convolutions around which the input is added back (a residual), told of time and class in between.

    One nn.Linear projects the time, another the class, each to a scale and a shift for every channel: the adaptive
    group norm of Dhariwal & Nichol 2021 (arXiv 2105.05233, section 3). "At this noise level, for this digit, turn this
    feature up and that one off." Applied to the (B, E) embedding, nn.Linear is a 1x1 convolution whose picture is one
    pixel; its result is spread over all H x W positions.

    forward: x (B, in_channels, H, W), t_emb (B, E), y_emb (B, E) -> (B, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, emb_dim):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(emb_dim, 2 * out_channels)
        self.class_proj = nn.Linear(emb_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        # Only pictures with equally many channels can be added, so where their number changes, a 1x1 convolution adapts it.
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, t_emb, y_emb):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        scale_shift = self.time_proj(t_emb) + self.class_proj(y_emb)  # (B, 2·out)
        scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)  # each (B, out, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(F.silu(h))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention: every position looks at every other one, and takes over what it finds there (Vaswani et al. 2017).

    A 3x3 convolution sees its neighbours only. Here, at the bottom, where the picture is 4x4, sixteen positions can
    agree in one step on what the whole is to become; at 28x28 the same would take 784² comparisons.

    forward: x (B, C, H, W) -> the same shape.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C): a sequence of positions
        q, k, v = self.qkv(h).chunk(3, dim=2)  # each (B, H·W, C)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √C) v, (B, H·W, C)
        h = self.out(h).transpose(1, 2).reshape(B, C, H, W)
        return x + h


class UNet(nn.Module):
    """The noise prediction ε_θ(x_t, t, y).

    config is a dictionary of plain values: "channels" (one number for each size of the picture), "image_channels",
    "image_size", "classes" (their names). It stays with the model as model.config, together with the "schedule" and the
    "timesteps" that the model is trained for, and goes into every checkpoint: a checkpoint says itself how to rebuild it.
    Raises ValueError when the picture cannot be halved as often as there are channels.

    forward: x_t (B, C, H, W), t (B,) in 0..T-1, y (B,) in 0..num_classes -> eps_hat (B, C, H, W).
    Class number num_classes means "no class": one more row in the embedding, learned like the others.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_classes = len(config["classes"])
        channels = config["channels"]
        if config["image_size"] <= 2 ** (len(channels) - 2):
            raise ValueError(
                f"{len(channels)} channels halve the picture {len(channels) - 1} times, which {config['image_size']} pixels"
                " do not allow: give fewer"
            )
        self.emb_dim = emb_dim = 4 * channels[0]  # E = 128
        self.time_mlp = nn.Sequential(nn.Linear(emb_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim), nn.SiLU())
        self.class_emb = nn.Embedding(self.num_classes + 1, emb_dim)

        self.conv_in = nn.Conv2d(config["image_channels"], channels[0], 3, padding=1)
        self.encoder = nn.ModuleList([ResBlock(c, c, emb_dim) for c in channels])
        steps = list(zip(channels[:-1], channels[1:]))  # (32, 64), (64, 128), (128, 256)
        self.downsample = nn.ModuleList([nn.Conv2d(c, wider, 3, stride=2, padding=1) for c, wider in steps])
        self.middle_in = ResBlock(channels[-1], channels[-1], emb_dim)
        self.attention = Attention(channels[-1])
        self.middle_out = ResBlock(channels[-1], channels[-1], emb_dim)
        self.decoder = nn.ModuleList([ResBlock(2 * c, c, emb_dim) for c in channels])
        self.upsample = nn.ModuleList([nn.Conv2d(wider, c, 1) for c, wider in steps])
        self.norm_out = group_norm(channels[0])
        self.conv_out = zero_init(nn.Conv2d(channels[0], config["image_channels"], 3, padding=1))

    def forward(self, x_t, t, y):
        t_emb = self.time_mlp(timestep_embedding(t, self.emb_dim))  # (B, E)
        y_emb = self.class_emb(y)  # (B, E)

        h = self.conv_in(x_t)  # (B, 32, 28, 28)
        skips = []
        for level, block in enumerate(self.encoder):
            if level > 0:
                h = self.downsample[level - 1](h)  # (B, 64, 14, 14), (B, 128, 7, 7), (B, 256, 4, 4)
            h = block(h, t_emb, y_emb)
            skips.append(h)

        h = self.middle_in(h, t_emb, y_emb)  # (B, 256, 4, 4)
        h = self.attention(h)
        h = self.middle_out(h, t_emb, y_emb)

        for level in reversed(range(len(self.decoder))):
            h = torch.cat([h, skips[level]], dim=1)  # (B, 512, 4, 4), (B, 256, 7, 7), (B, 128, 14, 14), (B, 64, 28, 28)
            h = self.decoder[level](h, t_emb, y_emb)  # half as many channels
            if level > 0:
                # Channels first, then size: a 1x1 convolution on the small picture costs a quarter of one on the large.
                # The size is taken from the skip, since 4 doubled would be 8 where 7 is wanted.
                h = self.upsample[level - 1](h)
                h = F.interpolate(h, size=skips[level - 1].shape[2:], mode="nearest")

        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, 28, 28)


# ======================================================================================================================
# 4. The training objective (Algorithm 1)
# ======================================================================================================================
#
# A diffusion model is trained on a bound of the likelihood, and that bound turns out to be a sum over t of weighted
# squared errors between the noise and its prediction (Eq. 12). Ho et al. drop the weights: the simple loss cares less
# about the tiny noise of the first steps and more about the difficult middle, and its pictures are better. One picture
# at a random t is an unbiased sample of the sum:
#
#     Algorithm 1:  repeat   x_0 ~ q(x_0),  t ~ Uniform,  ε ~ N(0, I)
#                            a gradient step on ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖²
#
# Why are labels sometimes dropped? With the class replaced by "no class" in a tenth of the pictures, one network learns
# two predictions: for a given digit, and for digits in general. Section 5 needs their difference to make a digit more
# like the one asked for (Ho & Salimans 2022, arXiv 2207.12598, Algorithm 1). It belongs to the loss, not to the
# network: sampling must never drop a label.


def ddpm_loss(model, x_0, y, alphas_cumprod, class_dropout=0.1):
    """The loss of one batch, L_simple (Ho et al. 2020, Eq. 14).

    x_0 (B, C, H, W) in [-1, 1]; y (B,) classes; alphas_cumprod (T,) in float32; class_dropout in [0, 1] is the share of
    labels that are replaced by "no class". Returns a scalar: the mean over all pixels, 1 for a network that says 0.
    """
    B, T = len(x_0), len(alphas_cumprod)
    no_class = len(model.config["classes"])
    t = torch.randint(T, (B,), device=x_0.device)  # uniform over 0..T-1
    eps = torch.randn_like(x_0)
    drop = torch.rand(B, device=x_0.device) < class_dropout
    y = torch.where(drop, no_class, y)
    x_t = q_sample(x_0, t, eps, alphas_cumprod)
    # GPUs with bfloat16 in hardware convolve twice as fast in it. The error is taken in float32, where sums do not round.
    with torch.autocast(x_0.device.type, torch.bfloat16, enabled=has_bfloat16(x_0.device)):
        eps_hat = model(x_t, t, y)
    # Eq. 14: L_simple = E ‖ε - ε_θ(x_t, t, y)‖²
    return F.mse_loss(eps, eps_hat.float())


def has_bfloat16(device):
    """Whether the device calculates in bfloat16 natively: CUDA GPUs from compute capability 8.0 (Ampere) on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


# ======================================================================================================================
# 5. Sampling: from noise to picture
# ======================================================================================================================
#
# Everything runs through x̂_0. If the network says that the noise in x_t is ε_θ, then Eq. 4, solved for x_0, says which
# clean picture that implies (Eq. 15). At large t this picture is a blur, the mean of everything that x_t could become.
# So do not jump there: take one step towards it, ask again, and the blur gets sharper from step to step.
#
# How far to step, and how much fresh noise to add? Two rules follow, and the loop below can use either.
#
# Ho's rule. If x_0 were known, then x_{t-1} given x_t would be a Gaussian that Bayes' theorem gives exactly, q(x_{t-1} |
# x_t, x_0) (Eq. 6 and 7). It is not known, so x̂_0 takes its place. The mean then equals Eq. 11 of the paper, which says
# the same in terms of ε_θ: (x_t - β_t/√(1-ᾱ_t) ε_θ) / √α_t. This is Algorithm 2 of the paper: T steps, noise in each
# but the last.
#
# Song's rule (DDIM, arXiv 2010.02502). Training only ever looked at q(x_t | x_0), never at how one gets from x_t to
# x_{t-1}. So any rule that keeps each x_t at its noise level is allowed: take x̂_0 and noise it again to the earlier
# level, with a share of fresh noise (η = 1) or with exactly the predicted noise and no chance at all (η = 0). Without
# chance, the way from noise to picture is so smooth that 50 steps do instead of 1000. At η = 1 this is Ho's rule again.


def posterior_step(x_0_hat, x_t, alpha_bar, alpha_bar_prev):
    """Mean and standard deviation of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 6 and 7).

    x_0_hat and x_t (B, C, H, W); alpha_bar and alpha_bar_prev are ᾱ_t and ᾱ_{t-1}, floats in (0, 1]. When steps are left
    out, ᾱ_{t-1} is that of the step one goes to, and α_t the product of the α in between. Returns (mean, sigma).
    """
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    # Eq. 7: μ̃_t(x_t, x_0) = √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0 + √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t
    mean_x_0 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * x_0_hat
    mean_x_t = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * x_t
    # Eq. 7: β̃_t = (1-ᾱ_{t-1}) / (1-ᾱ_t) β_t, which is 0 in the last step: Algorithm 2 adds no noise to the final picture
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    return mean_x_0 + mean_x_t, math.sqrt(variance)


def ddim_step(x_0_hat, eps_hat, alpha_bar, alpha_bar_prev, eta):
    """Mean and standard deviation of a DDIM step (Song et al. 2020, Eq. 12 and 16; their α is our ᾱ).

    Arguments as in posterior_step; eps_hat (B, C, H, W) is the noise that goes with x_0_hat; eta in [0, 1].
    """
    # Eq. 16: σ_t = η √((1-ᾱ_{t-1}) / (1-ᾱ_t)) √(1 - ᾱ_t/ᾱ_{t-1})
    sigma = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * math.sqrt(1 - alpha_bar / alpha_bar_prev)
    # Eq. 12: x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-σ_t²) ε_θ + σ_t ε
    mean = math.sqrt(alpha_bar_prev) * x_0_hat + math.sqrt(1 - alpha_bar_prev - sigma**2) * eps_hat
    return mean, sigma


# Guidance. Asked for a four, the network predicts noise whose removal leads to digits that look like fours; asked for
# nothing, to digits. The difference of the two predictions points from "a digit" to "a four", and going further in that
# direction than the network asks for makes the four more of a four (Ho & Salimans 2022, Eq. 6, where S is 1 + w):
#
#     ε = ε_θ(x_t, t, none) + S (ε_θ(x_t, t, y) - ε_θ(x_t, t, none))
#
# S = 0 ignores the class, 1 is the plain conditional prediction, above 1 trades variety for clarity. At the noisiest
# steps that trade is a bad one, since there guidance drives all samples to the same few shapes, and at the last steps,
# where the digit has long been decided, it is useless. So it is switched on only in between (Kynkäänniemi et al. 2024,
# arXiv 2404.07724); there the network has to be asked twice, elsewhere once.

STEPS, GUIDANCE, GUIDANCE_INTERVAL = 50, 1.5, (0.2, 0.8)  # the defaults of sampling; the interval is in shares of T


def predict_noise(model, x_t, t, y, guidance):
    """The guided prediction: x_t (B, C, H, W), t an integer, y (B,), guidance S >= 0 -> eps_hat (B, C, H, W)."""
    t = torch.full_like(y, t)
    none = torch.full_like(y, len(model.config["classes"]))
    if guidance == 1:
        return model(x_t, t, y)
    if guidance == 0:
        return model(x_t, t, none)
    both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, none]))  # one batch is faster than two
    eps_cond, eps_uncond = both.chunk(2)
    return eps_uncond + guidance * (eps_cond - eps_uncond)


@torch.inference_mode()
def sample(model, labels, steps=STEPS, eta=0.0, guidance=GUIDANCE, guidance_interval=GUIDANCE_INTERVAL, seeds=None):
    """Draws one picture for each label: Algorithm 2 (Ho et al. 2020) for eta 1, DDIM (Song et al. 2020) below.

    labels (N,) integers, a list or a tensor; steps in 1..T is how many of the T steps are visited; eta in [0, 1] is the
    share of fresh noise; guidance S >= 0 applies where t/T lies in guidance_interval; seeds are N integers (0..N-1 if
    left out). A picture depends on its own label and seed alone: its noise is drawn on the CPU from a stream of its own,
    the same in a batch of any size and on any device. Returns x_0 (N, C, H, W) in [-1, 1], on the model's device.
    """
    device = next(model.parameters()).device
    config, T = model.config, model.config["timesteps"]
    alphas_cumprod = torch.cumprod(1 - beta_schedule(config["schedule"], T), dim=0).tolist()  # T floats
    y = torch.as_tensor(labels, device=device)
    streams = [torch.Generator().manual_seed(seed) for seed in (range(len(y)) if seeds is None else seeds)]
    image_shape = (config["image_channels"], config["image_size"], config["image_size"])

    def standard_normal():
        return torch.stack([torch.randn(image_shape, generator=stream) for stream in streams]).to(device)

    # The steps to visit, evenly spaced. They start at T-1, where x_T is pure noise, and end at -1: the clean picture.
    visited = torch.linspace(T - 1, -1, steps + 1).round().int().tolist()  # T = 1000, 50 steps: 999, 979, ..., 19, -1
    x_t = standard_normal()
    for t, t_prev in zip(visited[:-1], visited[1:]):
        alpha_bar = alphas_cumprod[t]
        alpha_bar_prev = alphas_cumprod[t_prev] if t_prev >= 0 else 1.0
        guided = guidance_interval[0] <= t / T <= guidance_interval[1]
        eps_hat = predict_noise(model, x_t, t, y, guidance if guided else 1)
        # Eq. 15: x̂_0 = (x_t - √(1-ᾱ_t) ε_θ) / √ᾱ_t
        x_0_hat = (x_t - math.sqrt(1 - alpha_bar) * eps_hat) / math.sqrt(alpha_bar)
        # No picture lies outside [-1, 1]. At large t, where Eq. 15 divides by almost 0, the estimate often does, and
        # the error would grow from step to step. Once it is clipped, the noise that goes with it is another: Eq. 4.
        x_0_hat = x_0_hat.clamp(-1, 1)
        eps_hat = (x_t - math.sqrt(alpha_bar) * x_0_hat) / math.sqrt(1 - alpha_bar)
        if eta == 1:
            mean, sigma = posterior_step(x_0_hat, x_t, alpha_bar, alpha_bar_prev)
        else:
            mean, sigma = ddim_step(x_0_hat, eps_hat, alpha_bar, alpha_bar_prev, eta)
        x_t = mean + sigma * standard_normal() if sigma > 0 else mean
    return x_t


# ======================================================================================================================
# 6. Data, checkpoints, pictures
# ======================================================================================================================
#
# What the model never has to know about: files.


class UserError(Exception):
    """Something that the user can put right. The message says what is wrong and what to do; main prints it as one line."""


# --- Data. Pixels come as bytes 0..255 and go to the network as numbers in [-1, 1], centred at zero as the noise is:
# then x_t has about the same size at every t, and "no picture lies outside [-1, 1]" gives the sampler its clipping.
# The whole set stays on the device as bytes (MNIST: 47 MB), and a batch is an index away: there is no loader to wait for.

IDX_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
DIGITS = list("0123456789")
CLOTHES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
THINGS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DATASETS = {  # name: (its torchvision class, picture shape, class names, folder and files to put there by hand)
    "mnist": ("MNIST", (1, 28, 28), DIGITS, "MNIST/raw", f"the four files {IDX_FILES}"),
    "fashion-mnist": ("FashionMNIST", (1, 28, 28), CLOTHES, "FashionMNIST/raw", f"the four files {IDX_FILES}"),
    "cifar10": ("CIFAR10", (3, 32, 32), THINGS, ".", "cifar-10-python.tar.gz"),
}


def load_dataset(name, data_dir, train=True):
    """Reads a data set through torchvision, which downloads it if it is not there.

    Returns images (N, C, H, W) uint8 and labels (N,) int64, on the CPU. Raises UserError when it cannot be had or read.
    """
    class_name, image_shape, classes, folder, files = DATASETS[name]
    dataset_class = getattr(torchvision.datasets, class_name)
    url = getattr(dataset_class, "mirrors", [getattr(dataset_class, "url", None)])[0]
    by_hand = f"put {files} from {url} into {Path(data_dir, folder)}"
    try:
        dataset = dataset_class(data_dir, train=train, download=True)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        # (N, H, W) if grey, (N, H, W, 3) if in colour
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    except (OSError, HTTPException) as error:
        raise UserError(f"cannot download {name} from {url} ({error}): {by_hand}") from error
    # A file that is cut short or not what its name says: torchvision lets these through from wherever it stumbles.
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot get or read {name} ({reason}): {by_hand}, in place of what is there") from error
    if images.shape[1:] != image_shape or len(images) != len(labels) or not 0 < len(images):
        raise UserError(f"{name} in {data_dir} holds pictures {tuple(images.shape)} for {len(labels)} labels: {by_hand}")
    if not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{name} in {data_dir} has labels outside 0..{len(classes) - 1}: {by_hand}")
    return images.contiguous(), labels


# --- Checkpoints. A run leaves two files. weights.pt is for sampling: the averaged weights (section 7) in half precision
# and the configuration, so that nothing else is needed to load it. checkpoint.pt is for going on: whatever the next step
# of training depends on, down to the state of the random number generator. Both hold tensors and plain values only, and
# are read with weights_only=True: a pickle could run any program.

FORMAT = 1  # goes into every file; to be raised when its meaning changes


def save(contents, path):
    """Writes a checkpoint to a temporary file beside path, then renames it: at any moment, path is whole or as it was."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **contents}, buffer)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())  # on the disk, not just on its way there, before the old file is given up
    os.replace(temporary, path)


def load(path):
    """Reads what save wrote, onto the CPU. Raises UserError when the file is something else."""
    if not zipfile.is_zipfile(path):
        if not path.exists():
            raise UserError(f"{path} does not exist")
        raise UserError(f"{path} is not a checkpoint, or it is cut short")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        if contents["format"] > FORMAT:
            raise UserError(f"{path} was written by a newer ddpm.py (format {contents['format']}): update this one")
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a checkpoint of ddpm.py") from error
    return contents


def find_weights():
    """The newest weights of your own runs, or those that come with this file."""
    own = sorted(Path("runs").glob("*/weights.pt"), key=lambda path: path.stat().st_mtime)
    return own[-1] if own else Path(__file__).parent / "assets" / "mnist.pt"


def load_model(path=None, device="cpu"):
    """The model of a weights.pt, ready for sampling. Without a path: find_weights(). Raises UserError, OSError."""
    path = Path(path or find_weights())
    contents = load(path)
    try:
        model = UNet(contents["config"])
        model.load_state_dict(contents["weights"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no weights for the network of this ddpm.py") from error
    return model.to(device).eval().requires_grad_(False)


# --- Pictures.


def to_image(x, columns=None):
    """Pictures x (N, C, H, W) in [-1, 1] as one PIL image: a grid of that many columns, as square as can be if left out."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    grid = torchvision.utils.make_grid(x, nrow=columns, padding=2) if len(x) > 1 else x[0]  # (C, height, width)
    return torchvision.transforms.functional.to_pil_image(grid)


def generate_number(model, label, seed=0):
    """One digit, for a notebook: model from load_model, label in 0..9 -> PIL image (28x28, grey for MNIST)."""
    return to_image(sample(model, [label], seeds=[seed]))


# ======================================================================================================================
# 7. Training
# ======================================================================================================================
#
# Algorithm 1 in a loop, and three old tricks around it.
#
# The learning rate rises during the first steps, while Adam's averages of the gradient are still unreliable, and then
# falls along a half cosine to zero, so that the weights come to rest. It is computed from the number of the step and
# from nothing else, so a resumed run goes on where the curve was.
#
# Gradients are clipped to length 1: a batch of unlucky noise cannot throw the weights far.
#
# The weights used for sampling are not the last ones but an exponential moving average (EMA) over the last steps. Single
# steps jump about, as each saw one batch, one t a picture, one noise; the average does not, and its samples are visibly
# cleaner. At the start the average is kept short, or it would remember the random weights for a thousand steps.


def learning_rate(step, total_steps, peak):
    """Linear warm-up over the first 5 % of the steps (500 at most), then half a cosine down to 0 at total_steps."""
    warmup = min(500, max(1, total_steps // 20))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Moves the averaged weights a little towards the current ones: ema = d · ema + (1-d) · model."""
    d = min(decay, (1 + step) / (10 + step))
    for averaged, current in zip(ema.parameters(), model.parameters()):
        averaged.lerp_(current, 1 - d)


def train_step(model, ema, optimizer, x_0, y, alphas_cumprod, step, total_steps, options):
    """One step of Algorithm 1: x_0 (B, C, H, W) in [-1, 1], y (B,). Returns the loss, a scalar tensor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total_steps, options["lr"])
    loss = ddpm_loss(model, x_0, y, alphas_cumprod, options["class_dropout"])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    update_ema(ema, model, step, options["ema_decay"])
    return loss.detach()


TRAIN_OPTIONS = "dataset epochs batch_size lr timesteps schedule channels class_dropout ema_decay seed".split()
SAVE_EVERY = 300  # seconds


def choose_device(name):
    """"auto" is the first of cuda, mps and cpu that is there. Raises UserError when the named one is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device  # the only sure way to find out
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name} is not to be had here: try --device auto") from error


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def show(line, last=False):
    """Progress: one line that is written over again on a terminal; elsewhere only the last state of it is printed."""
    if sys.stdout.isatty():
        print("\r" + line.ljust(79), end="\n" if last else "", flush=True)
    elif last:
        print(line, flush=True)


def train(args, saved=None):
    """The train command: args as main parses them, saved the contents of the checkpoint to go on from. Returns 0, or 130
    when it was interrupted. Leaves checkpoint.pt, weights.pt, log.csv and a picture for each epoch in args.out.
    """
    device, out = choose_device(args.device), Path(args.out or f"runs/{args.dataset}")
    if (out / "checkpoint.pt").exists() and not args.resume:
        raise UserError(f"{out} holds a run already: add --resume to go on with it, or choose another --out")
    options = {name: getattr(args, name) for name in TRAIN_OPTIONS}
    _, (image_channels, image_size, _), classes, _, _ = DATASETS[args.dataset]
    config = {name: options[name] for name in ("dataset", "channels", "schedule", "timesteps")}
    config |= {"image_channels": image_channels, "image_size": image_size, "classes": classes}

    torch.manual_seed(args.seed)
    model = UNet(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    rng = torch if device.type == "cpu" else getattr(torch, device.type)  # where the random state of the device lives
    step, history, loss_sum = 0, [], torch.zeros((), device=device)
    if saved:
        try:
            model.load_state_dict(saved["model"])
            ema.load_state_dict(saved["ema"])
            optimizer.load_state_dict(saved["optimizer"])
            step, history = saved["step"], saved["history"]
            loss_sum += saved["loss_sum"]
            if saved["device"] == device.type:  # on another device the run goes on, with other noise
                rng.set_rng_state(saved["random_state"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out / 'checkpoint.pt'} is not the checkpoint of such a run") from error

    images, labels = (tensor.to(device) for tensor in load_dataset(args.dataset, args.data_dir))
    batch_size = min(args.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size  # what is left over is too few for a batch, and other pictures each time
    total_steps = args.epochs * steps_per_epoch
    alphas_cumprod = torch.cumprod(1 - beta_schedule(args.schedule, args.timesteps), dim=0).float().to(device)
    network = torch.compile(model) if args.compile else model  # a faster view of the same weights

    # Ctrl-C and kill only leave a note; the loop reads it between two steps, when everything fits together.
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))

    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(images)} pictures of {args.dataset}, {count_parameters(model) / 1e6:.1f}M parameters, on {device}, into {out}")
    started_at, first_step = time.monotonic(), step
    saved_at = shown_at = started_at
    order = None
    while step < total_steps:
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0:
            loss_sum.zero_()
        if position == 0 or order is None:
            # The order of an epoch depends on seed and epoch alone: a resumed run finds its place in it again.
            shuffle = torch.Generator().manual_seed(args.seed * 1_000_000 + epoch)
            order = torch.randperm(len(images), generator=shuffle).to(device)
        batch = order[position * batch_size : (position + 1) * batch_size]
        x_0 = images[batch].float() / 127.5 - 1  # bytes 0..255 to [-1, 1]
        loss_sum += train_step(network, ema, optimizer, x_0, labels[batch], alphas_cumprod, step, total_steps, options)
        step += 1

        end_of_epoch, now = step % steps_per_epoch == 0, time.monotonic()
        if end_of_epoch or sys.stdout.isatty() and now - shown_at > 0.5:
            loss = loss_sum.item() / (position + 1)  # waits for the device, so the clock is read after it
            shown_at = now = time.monotonic()
            rate = (step - first_step) * batch_size / (now - started_at)
            left = timedelta(seconds=round((total_steps - step) * batch_size / rate))
            line = f"epoch {epoch + 1}/{args.epochs}  step {step}  loss {loss:.4f}  {rate:.0f} images/s  {left} left"
            show(line, last=end_of_epoch)
        if end_of_epoch:
            history.append([epoch + 1, step, loss, learning_rate(step, total_steps, args.lr), rate])
            if (epoch + 1) % args.sample_every == 0 or step == total_steps:
                # Each class five times, from the same noise after every epoch, so that epochs can be compared.
                grid = sample(ema, list(range(len(classes))) * 5)
                to_image(grid, columns=len(classes)).save(out / f"samples_{epoch + 1:03d}.png")
        if end_of_epoch or stop or now - saved_at > SAVE_EVERY:
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "history": history, "loss_sum": loss_sum.item()}
            state |= {"device": device.type, "random_state": rng.get_rng_state()}
            save({"config": config, "options": options, **state}, out / "checkpoint.pt")
            save({"config": config, "weights": {k: v.half() for k, v in ema.state_dict().items()}}, out / "weights.pt")
            with open(out / "log.csv", "w", newline="") as file:  # all of it from the checkpoint: no row twice, none missing
                csv.writer(file).writerows([["epoch", "step", "loss", "lr", "images_per_s"], *history])
            saved_at = time.monotonic()
            started_at += saved_at - now  # pictures and files are not training time
        if stop and step < total_steps:
            show(f"stopped at step {step} of {total_steps}; go on with the same command and --resume", last=True)
            return 130

    seconds = time.monotonic() - started_at
    print(f"{step - first_step} steps in {timedelta(seconds=round(seconds))}, {(step - first_step) * batch_size / seconds:.0f} images/s")
    print(f"weights, log and pictures are in {out}; look: python ddpm.py sample --checkpoint {out / 'weights.pt'}")
    return 0


# ======================================================================================================================
# 9. The command line
# ======================================================================================================================
#
# Each flag checks its own value here, so that nothing above has to.

BATCH = 256  # pictures that are sampled at once


def sample_command(args):
    """The sample command: draws the labels asked for and writes one picture, or a folder of them."""
    out = Path(args.out)
    if out.suffix not in ("", ".png"):
        raise UserError(f"--out {out}: name a .png file or a folder")
    device = choose_device(args.device)
    path = Path(args.checkpoint or find_weights())
    model = load_model(path, device)
    classes, T = model.config["classes"], model.config["timesteps"]
    print(f"weights: {path} ({model.config['dataset']})")
    if args.steps > T:
        raise UserError(f"--steps {args.steps}: this model was trained with {T} steps")
    asked = args.label or list(range(len(classes)))
    if max(asked) >= len(classes):
        raise UserError(f"--label {max(asked)}: the classes are 0 to {len(classes) - 1} ({', '.join(classes)})")
    # One label fills a square; several make a row, a number for example, that is drawn count times.
    count = args.count or (16 if len(asked) == 1 else 1)
    columns = None if len(asked) == 1 else len(asked)
    labels = asked * count
    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)

    started_at, pictures = time.monotonic(), []
    for start in range(0, len(labels), BATCH):
        batch = labels[start : start + BATCH]
        seeds = [args.seed * 1_000_000 + start + i for i in range(len(batch))]
        x_0 = sample(model, batch, args.steps, args.eta, args.guidance, args.guidance_interval, seeds)
        if out.suffix:
            pictures.append(x_0.cpu())
        else:
            for i, label in enumerate(batch):
                to_image(x_0[i : i + 1]).save(out / f"{label}_{start + i:05d}.png")
        done = start + len(batch)
        rate = done / (time.monotonic() - started_at)
        show(f"{done} of {len(labels)} pictures, {rate:.1f} pictures/s", last=done == len(labels))
    if out.suffix:
        to_image(torch.cat(pictures), columns).save(out)
    print(f"written: {out}")
    return 0


def shapes_command(args):
    """The shapes command: runs the network once and prints what each of its blocks gives out."""
    _, (image_channels, image_size, _), classes, _, _ = DATASETS[args.dataset]
    config = {"channels": args.channels, "image_channels": image_channels, "image_size": image_size, "classes": classes}
    model = UNet(config)
    blocks = {}
    for name, child in model.named_children():
        parts = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        blocks |= {f"{name}.{part}".rstrip("."): module for part, module in parts}
    print(f"{'block':<14} {'output shape':<18} {'parameters':>10}")
    for name, module in blocks.items():  # a hook prints its line when its block has run: in the order of the forward pass
        module.register_forward_hook(
            lambda module, inputs, output, name=name: print(
                f"{name:<14} {str(tuple(output.shape[1:])):<18} {count_parameters(module):>10,}"
            )
        )
    with torch.inference_mode():
        zero = torch.zeros(1, dtype=torch.int64)
        model(torch.zeros(1, image_channels, image_size, image_size), zero, zero)
    print(f"{'total':<33} {count_parameters(model):>10,}")
    return 0


def in_range(convert, low, high=math.inf):
    """An argparse type: convert(text), refused outside [low, high]."""

    def parse(text):
        value = convert(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = convert.__name__  # argparse says "invalid int value"
    return parse


def make_parser():
    """The commands and their flags. Returns the parser and, for its defaults, that of the train command."""
    parser = argparse.ArgumentParser(prog="ddpm.py", description="A diffusion model that writes digits. See --help of each command.")
    commands = parser.add_subparsers(dest="command", required=True)
    positive, share = in_range(int, 1), in_range(float, 0, 1)

    def add_command(name, run, help):
        command = commands.add_parser(name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        return command

    c = trainer = add_command("train", train, "train a model; writes checkpoint, weights, log and pictures into a folder")
    c.add_argument("--dataset", choices=DATASETS, default="mnist", help="what to learn")
    c.add_argument("--data-dir", default="data", help="folder of the data sets; what is missing is downloaded")
    c.add_argument("--out", help="folder of the run (default: runs/DATASET)")
    c.add_argument("--epochs", type=positive, default=30, help="passes over the data")
    c.add_argument("--batch-size", type=positive, default=128, help="pictures a step")
    c.add_argument("--lr", type=in_range(float, 0), default=1e-3, help="peak of the learning rate of AdamW")
    c.add_argument("--timesteps", type=positive, default=1000, help="T, noising steps")
    c.add_argument("--schedule", choices=["linear", "cosine"], default="linear", help="how the noise grows")
    c.add_argument("--channels", type=positive, nargs="+", default=[32, 64, 128, 256], help="one number a level")
    c.add_argument("--class-dropout", type=share, default=0.1, help="share of labels to drop, for guidance")
    c.add_argument("--ema-decay", type=share, default=0.999, help="of the averaged weights, a step")
    c.add_argument("--sample-every", type=positive, default=1, help="epochs from picture to picture")
    c.add_argument("--resume", action="store_true", help="go on with the run in --out, with its options")
    c.add_argument("--compile", action="store_true", help="torch.compile the network: a minute's wait, then faster steps")

    c = add_command("sample", sample_command, "draw pictures with trained weights")
    c.add_argument("--label", type=in_range(int, 0), nargs="+", help="class, or classes of a row (default: all)")
    c.add_argument("--count", type=positive, help="pictures of one label (default: 16), or rows of several (1)")
    c.add_argument("--checkpoint", help="a weights.pt (default: the newest in runs/, else the one in assets/)")
    c.add_argument("--steps", type=positive, default=STEPS, help="steps from noise to picture, at most T")
    c.add_argument("--eta", type=share, default=0.0, help="share of fresh noise: 0 is DDIM, 1 Algorithm 2")
    c.add_argument("--guidance", type=in_range(float, 0), default=GUIDANCE, metavar="S",
                   help="eps = eps_uncond + S (eps_cond - eps_uncond): 0 unconditional, 1 conditional, above 1 guided")
    c.add_argument("--guidance-interval", type=share, nargs=2, default=GUIDANCE_INTERVAL, metavar=("LO", "HI"),
                   help="where guidance applies, in shares of T; elsewhere S is 1")
    c.add_argument("--out", default="samples.png", help="a .png file, or a folder for one file each")

    for c in (trainer, c):
        c.add_argument("--seed", type=in_range(int, 0, 2**31), default=0, help="of all random numbers")
        c.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto: the first of them that is there")

    c = add_command("shapes", shapes_command, "show each block's output shape and number of parameters")
    c.add_argument("--dataset", choices=DATASETS, default="mnist", help="whose pictures go in")
    c.add_argument("--channels", type=positive, nargs="+", default=[32, 64, 128, 256], help="one number a level")
    return parser, trainer


def main(argv=None):
    """Runs one command, argv or the process's own arguments. Returns the exit status: 0, 1 after an error, 130 stopped."""
    parser, trainer = make_parser()
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("high")  # where float32 is left on a GPU, tensor cores may round it to TF32
    socket.setdefaulttimeout(30)  # seconds; a download that hangs should end, but torchvision sets no limit
    try:
        if args.command == "train" and args.resume:
            # The run's own options become the defaults, so they need not be given again; those given must agree.
            path = Path(args.out or f"runs/{args.dataset}", "checkpoint.pt")
            saved = load(path)
            trainer.set_defaults(**saved["options"])
            args = parser.parse_args(argv)
            changed = [name for name in TRAIN_OPTIONS if name != "epochs" and getattr(args, name) != saved["options"][name]]
            if changed:
                raise UserError(f"{path} was begun with another {' and '.join(changed)}: leave it out, or start anew")
            return train(args, saved)
        return args.run(args)
    except (UserError, OSError) as error:
        print(f"ddpm.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
