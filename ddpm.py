#!/usr/bin/env python3
"""ddpm.py: a class-conditional diffusion model that draws handwritten digits, in one file to read from top to bottom.

The idea, in five sentences. Take an image and add a little Gaussian noise to it, again and again, T times: what is left
is pure noise. Stop after any number of these steps, and train a neural network to look at the noisy image and to
predict all the noise in it. Removing all of that at once would give a blur, the average of all images that could have
become this one. So, to draw a new image, start from pure noise, remove a little of the predicted noise, look again, and
repeat. Tell the network, while it learns, which digit it is looking at, and it will draw the digit that you ask for.

The four equations, with their numbers in Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv
2006.11239), and the sections of this file that explain them. The class y is an addition to that paper; so is DDIM, the
faster sampler that is used by default.

    Eq. 4    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε                 t steps of noise at once                   here: section 2
    Eq. 14   L_simple = E ‖ε - ε_θ(x_t, t, y)‖²           what the network learns                    here: section 4
    Eq. 15   x̂_0 = (x_t - √(1-ᾱ_t) ε_θ) / √ᾱ_t           the clean image that a prediction implies  here: section 5
    Eq. 6    x_{t-1} ~ N(μ̃_t(x_t, x̂_0), β̃_t I)           one step back, with x̂_0 in place of x_0    here: section 5

The names:

    paper     here                          meaning
    T, t      T, t                          number of noising steps; the index of one
    β_t       betas; beta                   variance of the noise that step t adds          (T,); a float in the sampler
    α_t       alpha                         1 - β_t, the share of the variance that is kept
    ᾱ_t       alphas_cumprod; alpha_bar     α_1 α_2 ... α_t, the share that is left of x_0  (T,); of one t or of a batch
    ᾱ_{t-1}   alpha_bar_prev                the same at the step that sampling goes to; 1 for the clean image
    x_0, x_t  x_0, x_t                      clean image, in [-1, 1]; noisy image              (B, C, H, W)
    ε, ε_θ    eps, eps_hat                  the noise in x_t; its prediction                  (B, C, H, W)
    x̂_0       x_0_hat                       the clean image that goes with eps_hat            (B, C, H, W)
    μ̃_t, √β̃_t mean, sigma                   mean and standard deviation of x_{t-1}, if x_t and x_0 are known
    σ_t       mean, sigma                   in general, mean and standard deviation of a sampling step
    η         eta                           scale of σ_t, 0 to 1 (DDIM, section 5)
    S         guidance                      how much the class counts (section 5)
    y         y; labels                     class of each image; the number after the last class means "no class"  (B,)

    The paper counts t = 1..T, the code t = 0..T-1: alphas_cumprod[0] is the paper's ᾱ_1, one step of noise. The clean
    image comes before t = 0. In shapes, B is the batch, N any number of images, C the channels, H and W height and
    width, D the width of an embedding or of features; shape comments assume 28x28 grey images and the default channels
    32, 64, 128, 256.

Commands (each has --help):

    python ddpm.py sample --label 3                                            draw threes
    python ddpm.py sample --label 2 0 2 6 --count 5                            write a number, five times
    python ddpm.py sample --like four.jpg --like-label 4 --label 0 1 2 3       write in somebody's hand
    python ddpm.py train                                                       train on MNIST, into runs/mnist
    torchrun --nproc_per_node=2 ddpm.py train                                  with two processes
    python ddpm.py evaluate                                                    measure how good the digits are
    python ddpm.py shapes                                                      the network as a table

From Python, model = ddpm.load_model() and then ddpm.generate_number(model, label=5) gives a PIL image.

Measured: python ddpm.py train --epochs 20 on two CPU cores (AMD EPYC, PyTorch 2.14.1, seed 0) takes an hour, at 310 to
380 images/s; its weights are those in assets/mnist.pt. Of 1000 digits that evaluate --count 1000 draws with them, a
classifier reads 99.4 % as their label, and their FID is 0.168; of 1000 real test images, 99.5 %, and the FID is 0.110.
"""

import argparse
import copy
import math
import os
import pickle
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from http.client import HTTPException
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.nn import functional as F


class UserError(ValueError):
    """Something that the user can put right. The message says what is wrong and what to do; main prints just that."""


@contextmanager
def explained(message):
    """with explained("cannot read it"): whatever libraries raise inside over files or processes becomes a UserError."""
    try:
        yield
    except (OSError, HTTPException, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
            EOFError, SyntaxError, pickle.UnpicklingError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
        raise UserError(f"{message} ({' '.join(str(error).split())[:300] or type(error).__name__})") from error


# ======================================================================================================================
# 1. The noise schedule
# ======================================================================================================================
#
# Noise is added in T small steps. Step t shrinks the image a little and adds Gaussian noise of variance β_t:
#
#     Eq. 2:  q(x_t | x_{t-1}) = N(√(1-β_t) x_{t-1}, β_t I)
#
# The factor √(1-β_t) keeps the variance from growing: if x_{t-1} has variance 1, x_t has (1-β_t) + β_t = 1. So
# the network's input has about the same scale at every t.
#
# Why must β be small? Because only then is the *reverse* of a step, from x_t to x_{t-1}, close to a Gaussian too, and a
# Gaussian is what the sampler draws from. A big step backwards would have to choose between different images; a small
# one only has to nudge.
#
# What a schedule must achieve is best seen in ᾱ_t = α_1 α_2 ... α_t with α_t = 1 - β_t: the share of the image's
# variance that is left after t steps (Eq. 4, next section). It has to fall from almost 1 to almost 0. At the end √ᾱ_T
# must be close to 0, because sampling starts from pure noise: any signal that x_T still held during training would be
# missing when sampling. With the linear schedule and T = 1000, √ᾱ_T is 0.006.


SCHEDULES = ["linear", "cosine"]


def beta_schedule(schedule, timesteps):
    """The variance of the noise that each step adds.

    schedule is "linear" (Ho et al. 2020, section 4) or "cosine" (Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17);
    timesteps is T, which should be well above 20: up to there, some β of "linear" reach 1 and are cut. Returns
    betas (T,) in (0, 0.999], in float64, since ᾱ is a long product and the precision costs nothing. Raises UserError
    for another name.
    """
    if schedule == "linear":
        # From 0.0001 to 0.02 when T is 1000. Fewer steps have to be bigger ones, or signal would be left in x_T.
        betas = 1000 / timesteps * torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    elif schedule == "cosine":
        # Eq. 17: ᾱ_t = f(t) / f(0),  f(t) = cos²((t/T + s) / (1 + s) · π/2),  s = 0.008,  and β_t = 1 - ᾱ_t / ᾱ_{t-1}.
        # ᾱ falls more evenly than with the linear schedule, whose last steps see hardly anything but noise. The offset
        # s keeps the noise of the first steps from being so tiny that it cannot be predicted.
        s = 0.008
        t_over_T = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        f = torch.cos((t_over_T + s) / (1 + s) * math.pi / 2) ** 2  # (T+1,)
        betas = 1 - f[1:] / f[:-1]  # f(0) cancels
    else:
        raise UserError(f"no schedule is called {schedule!r}: choose {' or '.join(SCHEDULES)}")
    # As Nichol & Dhariwal: at β = 1 nothing of the image would be left, and sampling would divide by zero.
    return betas.clamp(max=0.999)


def cumulative_alphas(config):
    """ᾱ_t of all steps of a model with this config ("schedule", "timesteps"): (T,) in float64, falling to almost 0."""
    return torch.cumprod(1 - beta_schedule(config["schedule"], config["timesteps"]), dim=0)


# ======================================================================================================================
# 2. The forward process: from image to noise
# ======================================================================================================================
#
# To train the network at step t, one needs x_t. Going there step by step would take t draws of noise. But a sum of
# independent Gaussians is Gaussian again, so t steps of Eq. 2 collapse into one. Two of them, for example:
#
#     x_2 = √α_2 x_1 + √β_2 ε_2 = √α_2 (√α_1 x_0 + √β_1 ε_1) + √β_2 ε_2 = √(α_2 α_1) x_0 + √(α_2 β_1) ε_1 + √β_2 ε_2
#
# The variances of the two noises add up to α_2 β_1 + β_2 = α_2 (1-α_1) + (1-α_2) = 1 - α_2 α_1. So one draw with that
# variance does the same; and so on for t steps, with ᾱ_t in place of α_2 α_1. Training at any t is cheap.


def q_sample(x_0, t, eps, alphas_cumprod):
    """Adds the noise of all steps up to t to clean images: a draw from q(x_t | x_0) (Ho et al. 2020, Eq. 4).

    x_0 (B, C, H, W) in [-1, 1]; t (B,) integers in 0..T-1; eps like x_0, standard normal; alphas_cumprod (T,), on the
    device of t. Returns x_t, like x_0.
    """
    alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1): each image has its own t
    # Eq. 4: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps


# ======================================================================================================================
# 3. The network: a U-Net that predicts the noise
# ======================================================================================================================
#
# Input: a noisy image, the step t, the class y. Output: the noise in it, of the same shape. For that the network needs
# both the whole (is this going to be a three?) and every single pixel. The way down halves the image and doubles the
# channels, to see the whole; the way up returns to full size; and at each size a skip connection hands the details
# across.
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
# Time and class enter every residual block: what counts as noise in x_t depends on both. Channels are normalized in
# groups, image by image (GroupNorm), and not over the batch: a batch mixes images with little and with much noise, and
# its statistics would depend on which t happen to be in it. Between the layers stands SiLU, x · sigmoid(x), a smooth
# relative of ReLU.


def timestep_embedding(t, dim):
    """Sinusoidal embedding of the step (Vaswani et al. 2017, section 3.5; used for t by Ho et al. 2020).

    t (B,); dim is even. Returns (B, dim), values in [-1, 1], all cosines before all sines. It works like the hands of a
    clock: high frequencies tell neighbouring steps apart, low ones say whether it is early or late.
    """
    freqs = torch.exp(-math.log(10000) * torch.arange(0, dim, 2, device=t.device) / dim)  # (dim/2,) 1 to about 1/10000
    args = t[:, None] * freqs[None, :]  # (B, dim/2)
    return torch.cat([args.cos(), args.sin()], dim=1)  # (B, dim)


def zero_init(layer):
    """Sets a layer's weight and bias to zero and returns it.

    The last layer of every residual block and of the attention starts like this, so that at first the block passes its
    input on, and learns what to add. So does conv_out: the first prediction is 0, and the first loss 1, the variance of
    the noise.
    """
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    """Group normalization in eight groups, or in the largest of 4, 2 and 1 that divides the channels."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class ResBlock(nn.Module):
    """Two convolutions whose result is added to their input; time and class act between the two.

    One nn.Linear projects the time, another one the class, each to a scale and a shift for every channel: the adaptive
    group norm of Dhariwal & Nichol 2021 (arXiv 2105.05233, section 3). It can say: at this noise level, for this digit,
    turn this feature up and that one off.

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
        # Where the number of channels changes, a 1x1 convolution adapts x, so that it can still be added.
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, t_emb, y_emb):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, H, W)
        # Both (B, out, 1, 1):
        scale, shift = (self.time_proj(t_emb) + self.class_proj(y_emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift  # 1 + scale, so that 0 means no change
        h = self.conv2(F.silu(h))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention: every position looks at all the others and gathers what it finds there (Vaswani et al. 2017).

    A 3x3 convolution sees neighbouring positions only. Here at the bottom, where the image is 4x4, sixteen positions
    can agree in one step on what the whole is to become; at 28x28 the same would take 784² comparisons.

    forward: x (B, C, H, W) -> the same shape.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C): a sequence of positions
        q, k, v = self.qkv(h).chunk(3, dim=2)  # each (B, H·W, C)
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ / √C) v, (B, H·W, C)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)


class UNet(nn.Module):
    """The noise prediction ε_θ(x_t, t, y).

    config is a dictionary of plain values: "channels" (one number for each size of the image), "image_channels",
    "image_size" and "classes" (their names). It stays with the model as model.config, together with the options of its
    training, of which sampling needs "schedule" and "timesteps", and goes into weights.pt, which is then enough to
    rebuild the model. Raises UserError when the image is too small for so many sizes.

    forward: x_t (B, C, H, W), t (B,) in 0..T-1, y (B,) in 0..len(classes) -> eps_hat (B, C, H, W).
    Class number len(classes) means "no class": one more row of the embedding, learned like the others.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels, image_size = config["channels"], config["image_size"]
        if image_size <= 2 ** (len(channels) - 1):
            raise UserError(f"{image_size} pixels halved {len(channels) - 1} times are too few: give fewer --channels")
        self.emb_dim = emb_dim = 4 * channels[0]  # D = 128
        self.time_mlp = nn.Sequential(nn.Linear(emb_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim), nn.SiLU())
        self.class_emb = nn.Embedding(len(config["classes"]) + 1, emb_dim)  # the last row is "no class"

        self.conv_in = nn.Conv2d(config["image_channels"], channels[0], 3, padding=1)
        self.encoder = nn.ModuleList([ResBlock(c, c, emb_dim) for c in channels])
        pairs = list(zip(channels[:-1], channels[1:]))  # (32, 64), (64, 128), (128, 256)
        self.downsample = nn.ModuleList([nn.Conv2d(c, wider, 3, stride=2, padding=1) for c, wider in pairs])
        self.middle_in = ResBlock(channels[-1], channels[-1], emb_dim)
        self.attention = Attention(channels[-1])
        self.middle_out = ResBlock(channels[-1], channels[-1], emb_dim)
        self.decoder = nn.ModuleList([ResBlock(2 * c, c, emb_dim) for c in channels])
        self.upsample = nn.ModuleList([nn.Conv2d(wider, c, 1) for c, wider in pairs])
        self.norm_out = group_norm(channels[0])
        self.conv_out = zero_init(nn.Conv2d(channels[0], config["image_channels"], 3, padding=1))

    def forward(self, x_t, t, y):
        t_emb = self.time_mlp(timestep_embedding(t, self.emb_dim))  # (B, D)
        y_emb = self.class_emb(y)  # (B, D)

        h = self.conv_in(x_t)  # (B, 32, 28, 28)
        skips = []
        for downsample, block in zip([nn.Identity(), *self.downsample], self.encoder):
            h = downsample(h)  # (B, 32, 28, 28), (B, 64, 14, 14), (B, 128, 7, 7), (B, 256, 4, 4)
            h = block(h, t_emb, y_emb)
            skips.append(h)

        h = self.middle_in(h, t_emb, y_emb)  # (B, 256, 4, 4)
        h = self.attention(h)
        h = self.middle_out(h, t_emb, y_emb)

        for level in reversed(range(len(self.decoder))):
            h = torch.cat([h, skips[level]], dim=1)  # (B, 512, 4, 4), (B, 256, 7, 7), (B, 128, 14, 14), (B, 64, 28, 28)
            h = self.decoder[level](h, t_emb, y_emb)  # (B, 256, 4, 4), (B, 128, 7, 7), (B, 64, 14, 14), (B, 32, 28, 28)
            if level > 0:
                # A 1x1 convolution and the copying of pixels commute, and on the small image the convolution is
                # cheaper. The size comes from the skip, since 4 doubled would be 8 where 7 is wanted.
                h = self.upsample[level - 1](h)  # (B, 128, 4, 4), (B, 64, 7, 7), (B, 32, 14, 14)
                h = F.interpolate(h, size=skips[level - 1].shape[2:], mode="nearest")

        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 1, 28, 28)


# ======================================================================================================================
# 4. The training objective (Algorithm 1)
# ======================================================================================================================
#
# In theory the network should make the training images likely. A bound of the log-likelihood is a sum of terms, one for
# each step and one for x_T. With fixed variances, all but the first and the last are a weighted squared error between
# the noise and its prediction (Eq. 12). Ho et al. drop the weights, which are largest where t is small and the noise
# tiny: compared with the bound, the simple loss cares more about larger t, where there is more to decide, and its
# images are better. Instead of the sum over t, one random t per image:
#
#     Algorithm 1:  repeat   x_0 from the data,  t ~ Uniform,  ε ~ N(0, I)
#                            a gradient step on ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t, y)‖²
#
# Why predict ε and not x_0? Either follows from the other by Eq. 4, and the squared error of ε is then ᾱ_t/(1-ᾱ_t)
# times that of x_0. So a loss of x_0 would care about large t far more still, where nobody could know x_0. Ho et al.
# report worse images when x_0 is predicted (section 3.2).
#
# Why are labels sometimes dropped? With the class replaced by "no class" for a tenth of the images, one network learns
# two predictions: for a given digit, and for digits in general. Section 5 needs their difference to make a digit more
# like the one asked for (Ho & Salimans 2022, arXiv 2207.12598, Algorithm 1). Labels are dropped here, in the loss, and
# not inside the network: sampling must never drop one.


def ddpm_loss(model, x_0, y, alphas_cumprod, class_dropout=0.1, t_range=None):
    """The loss of one batch, L_simple (Ho et al. 2020, Eq. 14).

    x_0 (B, C, H, W) in [-1, 1]; y (B,) classes; alphas_cumprod (T,) in float32; class_dropout in [0, 1] is the share of
    labels that are replaced by "no class"; t_range (low, high) limits t to low..high-1, to see where the loss comes
    from. Returns a scalar: the mean over all pixels, about 1 for a network that predicts 0.
    """
    B, device = len(x_0), x_0.device
    low, high = t_range or (0, len(alphas_cumprod))
    t = torch.randint(low, high, (B,), device=device)  # uniform
    eps = torch.randn_like(x_0)
    y = torch.where(torch.rand(B, device=device) < class_dropout, len(model.config["classes"]), y)
    eps_hat = model(q_sample(x_0, t, eps, alphas_cumprod), t, y)
    # Eq. 14, divided by the number of pixels: L_simple = E ‖ε - ε_θ(x_t, t, y)‖²
    return F.mse_loss(eps, eps_hat.float())  # in float32, whatever the network calculates in


# ======================================================================================================================
# 5. Sampling: from noise to image
# ======================================================================================================================
#
# Everything goes through x̂_0. If the network says that the noise in x_t is ε_θ, then Eq. 4, solved for x_0, says which
# clean image that implies (Eq. 15). At large t this image is a blur, the mean of all that x_t could have come from.
# So do not jump there: take one step towards it, ask again, and the blur gets sharper from step to step.
#
# How far to step, and how much fresh noise to add? Here are two rules, and the loop below can use either.
#
# Ho's rule. If x_0 were known, then x_{t-1} given x_t would be a Gaussian, q(x_{t-1} | x_t, x_0), that Bayes' theorem
# gives exactly (Eq. 6 and 7). It is not known, so x̂_0 takes its place. The mean then equals Eq. 11 of the paper, which
# says the same in terms of ε_θ: (x_t - β_t/√(1-ᾱ_t) ε_θ) / √α_t (unless x̂_0 is clipped, as in the loop below). Ho's
# rule is Algorithm 2: T steps, with fresh noise in each but the last. Of the variances β_t and β̃_t that the paper
# tries, Eq. 6 has the second.
#
# Song's rule (DDIM, arXiv 2010.02502). Training only ever looked at q(x_t | x_0), never at how one gets from x_t to
# x_{t-1}. So any rule is allowed that keeps each x_t at its noise level: take x̂_0 and noise it again to the lower
# level, with fresh noise scaled by η and the predicted noise for the rest. With η = 1 it is Ho's rule again, written
# differently; Ho's rule has a function of its own so that Algorithm 2 can be read with the paper. With η = 0 no step is
# random, and 50 steps do instead of 1000: section 1 wanted small steps so that each is a Gaussian, but without
# randomness the steps follow one smooth curve, and that can be done in long steps.


def posterior_step(x_0_hat, x_t, alpha_bar, alpha_bar_prev):
    """Mean and standard deviation of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, Eq. 6 and 7).

    x_0_hat and x_t (B, C, H, W); alpha_bar and alpha_bar_prev are ᾱ_t < 1 and ᾱ_{t-1} > ᾱ_t, floats. When steps are
    left out, "t-1" is the step one goes to, and α_t is ᾱ_t / ᾱ_{t-1} all the same. Returns (mean, sigma).
    """
    alpha, beta = alpha_bar / alpha_bar_prev, 1 - alpha_bar / alpha_bar_prev
    # Eq. 7: μ̃_t(x_t, x_0) = √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0 + √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t
    mean_x_0 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * x_0_hat
    mean_x_t = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * x_t
    # Eq. 7: β̃_t = (1-ᾱ_{t-1}) / (1-ᾱ_t) β_t. In the last step it is 0: Algorithm 2 adds no noise to the final image.
    return mean_x_0 + mean_x_t, math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * beta)


def ddim_step(x_0_hat, eps_hat, alpha_bar, alpha_bar_prev, eta):
    """Mean and standard deviation of a DDIM step (Song et al. 2020, Eq. 12 and 16; their α is our ᾱ).

    Arguments as in posterior_step; eps_hat (B, C, H, W) is the noise that goes with x_0_hat; eta in [0, 1]. Returns
    (mean, sigma).
    """
    # Eq. 16: σ_t = η √((1-ᾱ_{t-1}) / (1-ᾱ_t)) √(1 - ᾱ_t/ᾱ_{t-1})
    sigma = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * math.sqrt(1 - alpha_bar / alpha_bar_prev)
    # Eq. 12: x_{t-1} = √ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-σ_t²) ε_θ + σ_t z, with fresh noise z
    mean = math.sqrt(alpha_bar_prev) * x_0_hat + math.sqrt(1 - alpha_bar_prev - sigma**2) * eps_hat
    return mean, sigma


# Guidance. Asked for a four, the network predicts noise whose removal leads to fours; asked for nothing, to digits. To
# remove the difference of the two predictions leads from "a digit" to "a four", and to remove more of it than the
# network asks for makes the four more of a four (Ho & Salimans 2022, Eq. 6, with S = 1 + w):
#
#     ε̂ = ε_θ(x_t, t, none) + S (ε_θ(x_t, t, y) - ε_θ(x_t, t, none))
#
# S = 0 ignores the class, 1 is the plain conditional prediction, above 1 trades variety for clarity. At the noisiest
# steps that is a bad trade, because there it drives all samples to the same few shapes, and in the last steps, where
# the digit has long been decided, it is of no use. So S above 1 applies only in an interval of t (Kynkäänniemi et al.
# 2024, arXiv 2404.07724; the interval here is our own), and only there, or where S is below 1, is the network asked
# twice.

STEPS, GUIDANCE, GUIDANCE_INTERVAL = 50, 1.4, (0.2, 0.6)  # the defaults of sampling; the interval in shares of T


def predict_noise(model, x_t, t, y, guidance):
    """The guided prediction: x_t (B, C, H, W), t an integer, y (B,), guidance S >= 0 -> eps_hat (B, C, H, W)."""
    t, none = torch.full_like(y, t), torch.full_like(y, len(model.config["classes"]))
    if guidance == 1:
        return model(x_t, t, y)
    # Both predictions in one call, which is faster than two.
    eps_cond, eps_uncond = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, none])).chunk(2)
    return eps_uncond + guidance * (eps_cond - eps_uncond)


def trajectory(config, steps):
    """The steps visited on the way from noise to image: a list of (t, ᾱ_t, ᾱ_{t-1}), "t-1" being the next one visited.

    They are evenly spaced from T-1, the noisiest, to -1, the clean image, whose ᾱ is 1: 999, 979, ..., 19, -1 for 50
    steps of T = 1000. Asked for more than T steps, it takes T.
    """
    T = config["timesteps"]
    alpha_bars = [*cumulative_alphas(config).tolist(), 1.0]  # the 1 is alpha_bars[-1], of the clean image
    visited = torch.linspace(T - 1, -1, min(steps, T) + 1).round().int().tolist()
    return [(t, alpha_bars[t], alpha_bars[t_prev]) for t, t_prev in zip(visited, visited[1:])]


@torch.inference_mode()
def sample(model, labels, steps=STEPS, eta=0.0, guidance=GUIDANCE, guidance_interval=GUIDANCE_INTERVAL,
           seeds=None, x_T=None, on_step=None):
    """Draws an image for each label, by DDIM (Song et al. 2020) or, with eta 1, T steps and guidance 1, by Algorithm 2.

    labels (N,) integers, a list or a tensor; steps >= 1 is how many of the T steps are visited; eta in [0, 1] scales
    the fresh noise; guidance is S >= 0, but S above 1 counts as 1 while t/T lies outside guidance_interval; seeds
    are N integers, 0..N-1 if left out. The noise of an image is drawn on the CPU, from a stream that its seed alone
    determines, so the image is the same, up to rounding, in a batch of any size and on any device. If given, x_T (N or
    1, C, H, W) is the noise to start from, and on_step(x_t, x_0_hat) is called in each step. Returns x_0 (N, C, H, W),
    in [-1, 1].
    """
    device = next(model.parameters()).device
    T, C, size = (model.config[name] for name in ("timesteps", "image_channels", "image_size"))
    y = torch.as_tensor(labels, device=device)
    streams = [torch.Generator().manual_seed(seed) for seed in (range(len(y)) if seeds is None else seeds)]

    def standard_normal():
        return torch.stack([torch.randn(C, size, size, generator=stream) for stream in streams]).to(device)

    x_t = standard_normal() if x_T is None else x_T.expand(len(y), -1, -1, -1)
    for t, alpha_bar, alpha_bar_prev in trajectory(model.config, steps):
        inside = min(guidance_interval) <= t / T <= max(guidance_interval)
        eps_hat = predict_noise(model, x_t, t, y, guidance if inside else min(guidance, 1))
        # Eq. 15: x̂_0 = (x_t - √(1-ᾱ_t) ε_θ) / √ᾱ_t
        x_0_hat = (x_t - math.sqrt(1 - alpha_bar) * eps_hat) / math.sqrt(alpha_bar)
        # No image lies outside [-1, 1]. At large t, where Eq. 15 divides by almost 0, the estimate often does, and the
        # error can grow from step to step. Clipping x̂_0 changes the noise that it implies: Eq. 4, solved for ε.
        x_0_hat = x_0_hat.clamp(-1, 1)
        eps_hat = (x_t - math.sqrt(alpha_bar) * x_0_hat) / math.sqrt(1 - alpha_bar)
        if on_step:
            on_step(x_t, x_0_hat)
        if eta == 1:
            mean, sigma = posterior_step(x_0_hat, x_t, alpha_bar, alpha_bar_prev)
        else:
            mean, sigma = ddim_step(x_0_hat, eps_hat, alpha_bar, alpha_bar_prev, eta)
        x_t = mean + sigma * standard_normal() if sigma > 0 else mean
    return x_t


# The loop backwards. With η = 0 nothing is random on the way from noise to image, so it can be walked in the other
# direction too: to the noise that becomes a given image (Song et al. 2020, section 4.3). That noise holds what the
# class does not say: slant and width of the digit, weight of the stroke. Sampled with another label, it gives another
# digit in the same hand.
#
# It only works from an image with some noise in it. In a perfectly clean one the network rightly finds none, so there
# is nothing to carry upwards, and the result is far from the pure noise that the sampler expects. So the first step is
# one of Eq. 4, up to the lowest noise level that the sampler visits: with the defaults, a standard deviation of 0.08.


@torch.inference_mode()
def invert(model, x_0, labels, steps=STEPS):
    """The noise x_T from which sample(model, labels, steps, eta=0, guidance=1, x_T=x_T) comes back to x_0, nearly.

    x_0 (N, C, H, W) in [-1, 1]; labels (N,), what the images show; steps as in sample. Returns x_T, like x_0.
    """
    y = torch.as_tensor(labels, device=x_0.device)
    (t, alpha_bar, _), *upwards = reversed(trajectory(model.config, steps))  # from little noise to much
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0.device)
    # Eq. 4: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε
    x_t = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps
    for t_next, alpha_bar_next, _ in upwards:
        # On the way down this step begins at t_next, on the way up at t. Asked about the middle between the two, the
        # network leads back to x_0 more exactly than when it is asked about t.
        eps_hat = predict_noise(model, x_t, (t + t_next) // 2, y, guidance=1)
        # Eq. 15, and Eq. 4 at t_next: the same image and the same noise, at a higher noise level. Nothing is clipped:
        # what is cut off would be missing on the way back.
        x_0_hat = (x_t - math.sqrt(1 - alpha_bar) * eps_hat) / math.sqrt(alpha_bar)
        x_t = math.sqrt(alpha_bar_next) * x_0_hat + math.sqrt(1 - alpha_bar_next) * eps_hat
        t, alpha_bar = t_next, alpha_bar_next
    return x_t


# ======================================================================================================================
# 6. Data, checkpoints, images
# ======================================================================================================================
#
# What is read and written.
#
# Data. Pixels come as bytes 0..255 and go to the network as numbers in [-1, 1], centred at zero as the noise is. The
# whole set stays on the device as bytes (MNIST: 47 MB), and a batch is an index away: there is no loader to wait for.

CLOTHES = "t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot".split(", ")
THINGS = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck".split(", ")
IDX = "the unpacked train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
DATASETS = {  # name: torchvision's class, the folder and the names of its files, what a model has to know of its images
    "mnist": ("MNIST", "MNIST/raw", IDX, dict(image_channels=1, image_size=28, classes=list("0123456789"))),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw", IDX, dict(image_channels=1, image_size=28, classes=CLOTHES)),
    "cifar10": ("CIFAR10", "", "cifar-10-python.tar.gz", dict(image_channels=3, image_size=32, classes=THINGS)),
}


def load_dataset(name, data_dir, train=True):
    """Reads a data set through torchvision, which downloads it if it is not there.

    Returns images (N, C, H, W) uint8 and labels (N,) int64, on the CPU. Raises UserError when it cannot be had or read.
    """
    class_name, folder, files, config = DATASETS[name]
    dataset_class = getattr(torchvision.datasets, class_name)
    url = getattr(dataset_class, "url", None) or dataset_class.mirrors[0]
    C, size, classes = (config[key] for key in ("image_channels", "image_size", "classes"))
    with explained(f"cannot download or read {name}: put {files} from {url} into {Path(data_dir, folder)}"):
        dataset = dataset_class(data_dir, train=train, download=True)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        # (N, H, W) if grey, (N, H, W, 3) if in colour
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        if images.shape != (len(labels), C, size, size) or not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"images {tuple(images.shape)} and {len(labels)} labels do not fit each other or the set")
    return images.contiguous(), labels


# Checkpoints. A run leaves two files to be loaded. weights.pt is for sampling: the averaged weights (section 7) in
# half precision and the configuration, so that nothing else is needed to load it. checkpoint.pt is for resuming:
# whatever the next step of training depends on. Both hold tensors and plain values only, and are read with
# weights_only=True: a pickle could run any program. The classifier of section 8 is kept in the same way.

ASSETS = Path(__file__).parent / "assets"
FORMAT = 1  # a version number in every file, so that an older program can refuse a newer file


def save(contents, path):
    """Writes a checkpoint to a temporary file beside path, then renames it: path holds the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with explained(f"cannot write {path}; is the disk full?"), open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **contents}, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk, not just on its way there, before the old file is given up
    os.replace(temporary, path)


def load(path):
    """Reads what save wrote, onto the CPU. Raises UserError when that is not possible, or path is something else."""
    with explained(f"cannot read {path} as a checkpoint of ddpm.py"):
        if any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is compressed, so a small file could fill the memory")
        contents = torch.load(path, map_location="cpu", weights_only=True)
        if contents["format"] > FORMAT:
            raise ValueError("it was written by a newer ddpm.py: update this one")
    return contents


def load_model(path=None, device="cpu"):
    """The model of a weights.pt, ready for sampling; by default the newest in runs/, or else assets/mnist.pt.

    Prints which it is. Raises UserError when the file cannot be read or is something else.
    """
    candidates = [ASSETS / "mnist.pt", *sorted(Path("runs").glob("*/weights.pt"), key=os.path.getmtime)]
    path = Path(path or candidates[-1])
    contents = load(path)
    with explained(f"{path} holds no weights for the network of this ddpm.py"):
        config, weights = contents["config"], contents["weights"]
        claimed = sum(tensor.numel() for tensor in weights.values())
        # A tensor can repeat one number, and so claim to be far larger than its file.
        if claimed > path.stat().st_size or not 1 <= config["timesteps"] <= 10**6 or config["image_size"] > 1000:
            raise ValueError("a size is out of range")
        with torch.device("meta"):  # shapes only, and no memory yet: the weights come from the file
            model = UNet(config)
        model.load_state_dict(weights, assign=True)
        print(f"weights: {path} ({config['dataset']})")
    return model.float().to(device).eval().requires_grad_(False)


# Images.


def from_bytes(images):
    """Pixels as files have them, 0..255 in uint8, as the network wants them: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(x):
    """The way back, on the CPU: x in [-1, 1] as uint8, rounded; what lies outside is cut."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def to_image(x, columns=None):
    """Images x (N, C, H, W) in [-1, 1] as one PIL image: a grid of so many columns, by default a square."""
    # What torchvision calls nrow is the number of columns.
    grid = torchvision.utils.make_grid(to_bytes(x), nrow=columns or math.ceil(math.sqrt(len(x))))  # (3, height, width)
    return torchvision.transforms.functional.to_pil_image(grid if len(x) > 1 else to_bytes(x)[0])


def generate_number(model, label, seed=0):
    """One digit, for a notebook: model from load_model, label in 0..9 -> PIL image (28x28, grey for MNIST)."""
    return to_image(sample(model, [label], seeds=[seed]))


def save_film(frames, path, columns):
    """Writes the steps of a sampling: a GIF of x_t, about four seconds and then two of the last frame; and ten moments
    of the first image, x_t above, x_0_hat below, as film_moments.png beside film.gif.

    frames is a list of (x_t (N, C, H, W), x_0_hat (1, C, H, W)), from noise to image; path ends in .gif.
    """
    def moments(count):
        return [frames[round(i)] for i in torch.linspace(0, len(frames) - 1, min(count, len(frames))).tolist()]

    film = [ImageOps.scale(to_image(x_t, columns), 3, Image.Resampling.NEAREST) for x_t, _ in moments(60)]
    milliseconds = [4000 // len(film)] * (len(film) - 1) + [2000]
    film[0].save(path, save_all=True, append_images=film[1:], duration=milliseconds, loop=0)
    strip = [x_t[:1] for x_t, _ in moments(10)] + [x_0_hat for _, x_0_hat in moments(10)]
    to_image(torch.cat(strip), columns=len(strip) // 2).save(path.with_name(path.stem + "_moments.png"))


def read_digit(path, size=28):
    """An image file of one digit, as MNIST would show it: x_0 (1, 1, size, size) in [-1, 1].

    Grey or colour, dark on light or light on dark, evenly lit or not, but with nothing else in it. MNIST's own recipe
    (LeCun et al. 1998, section III.A): the digit fits into a box of 20x20 pixels, and its centre of mass lies in the
    middle of 28x28, which in its files is the pixel of index 14. Raises UserError when the file is not an image, too
    large, or shows nothing.
    """
    with explained(f"cannot read {path} as an image"):  # also when it has far too many pixels
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")
    image.thumbnail((200, 200))  # enough for a digit, and the mean of many pixels has less noise
    grey = torchvision.transforms.functional.to_tensor(image)[0]  # (height, width) in [0, 1]
    # Light mostly falls from one side, so the paper is a plane through the brightness of the margin. Ink is what
    # differs from the paper, in the direction in which it differs more.
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in grey.shape), indexing="ij")
    plane = torch.stack([torch.ones_like(grey), rows, columns], dim=-1)  # (height, width, 3)
    margin = torch.maximum(rows.abs(), columns.abs()) > 0.9
    ink = grey - plane @ torch.linalg.lstsq(plane[margin], grey[margin].unsqueeze(1)).solution[:, 0]
    ink = ink if ink.max() > -ink.min() else -ink
    if ink.max() < 0.15:
        raise UserError(f"{path} shows no digit: nothing in it stands out from its margin")
    ink = (ink / ink.max() - 0.15).clamp(min=0)  # without the grain of the paper
    inked_rows, inked_columns = (ink > 0.05).nonzero().T
    box = ink[inked_rows.min() : inked_rows.max() + 1, inked_columns.min() : inked_columns.max() + 1]
    shape = [max(1, round(n * size * 20 / 28 / max(box.shape))) for n in box.shape]
    box = F.interpolate(box[None, None], shape, mode="bilinear", antialias=True)[0, 0]
    box = (box / box[box > 0.3 * box.max()].median()).clamp(0, 1)  # strokes as white as MNIST's, thin ones too
    centre = [(box.sum(dim=1 - dim) * torch.arange(n)).sum() / box.sum() for dim, n in enumerate(shape)]  # of mass
    top, left = (min(max(0, round(size / 2 - c.item())), size - n) for c, n in zip(centre, shape))
    return F.pad(box * 2 - 1, (left, size - left - shape[1], top, size - top - shape[0]), value=-1.0)[None, None]


# ======================================================================================================================
# 7. Training
# ======================================================================================================================
#
# Algorithm 1 in a loop, with three standard tricks.
#
# The learning rate of the optimizer, AdamW, rises during the first steps, while AdamW's averages of the gradient are
# still unreliable, and then falls along half a cosine to zero, so that the weights come to rest. It is computed from
# the number of the step, so a resumed run goes on where the curve was. (With other --epochs than before, it goes on
# where the other curve would have been.)
#
# Gradients are clipped to length 1, so that one unlucky batch cannot dominate the averages of AdamW.
#
# The weights for sampling are an exponential moving average (EMA) of the weights over the last steps. Each step sees
# one batch with random t and noise, so the weights jitter; their average does not. At the start it is kept short, over
# about a tenth of the steps so far, or it would remember the random first weights for thousands of steps.


def learning_rate(step, total_steps, peak):
    """Linear warm-up over the first 5 % of the steps (500 at most), then half a cosine down to 0 at total_steps."""
    warmup = min(500, max(1, total_steps // 20))
    decayed = min(1, max(0, step - warmup) / max(1, total_steps - warmup))  # 0 during the warm-up, then 0..1
    return peak * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * decayed))


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """Moves the averaged weights a little towards the current ones: ema = d · ema + (1-d) · model."""
    d = min(decay, (1 + step) / (10 + step))
    for averaged, current in zip(ema.parameters(), model.parameters()):
        averaged.lerp_(current, 1 - d)


def has_bfloat16(device):
    """Whether the device has bfloat16 in hardware, as CUDA GPUs from Ampere on and CPUs with AVX512_BF16 do.

    Convolutions are faster in it. It has the range of float32, but only 8 bits of precision: enough for gradients,
    which are noise for the most part. The weights themselves, and their small changes, stay in float32.
    """
    return (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else
            device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())  # fmt: skip


def train_step(model, ema, optimizer, x_0, y, alphas_cumprod, step, total_steps, options):
    """One step of Algorithm 1 at that step's learning rate; then the averaged weights, ema, follow.

    x_0 (B, C, H, W) in [-1, 1]; y (B,); alphas_cumprod (T,); options has "lr", "class_dropout" and "ema_decay". Returns
    the loss, a scalar tensor.
    """
    optimizer.param_groups[0]["lr"] = learning_rate(step, total_steps, options["lr"])
    with torch.autocast(x_0.device.type, torch.bfloat16, enabled=has_bfloat16(x_0.device)):
        loss = ddpm_loss(model, x_0, y, alphas_cumprod, options["class_dropout"])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    update_ema(ema, model, step, options["ema_decay"])
    return loss.detach()


# The rest of this section is the life of a run: its options, beginning or resuming, stepping, reporting, saving, and
# stopping when asked to.


def in_range(convert, low, high):
    """An argparse type: convert(text), refused outside [low, high]."""

    def number(text):  # argparse will say "invalid number value"
        if not low <= (value := convert(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


POSITIVE, SHARE = in_range(int, 1, 10**9), in_range(float, 0, 1)
TRAIN_OPTIONS = {  # the flags that a checkpoint remembers
    "dataset": {"default": "mnist", "choices": DATASETS, "help": "what to learn"},
    "epochs": {"default": 30, "type": POSITIVE, "help": "passes over the data"},
    "batch_size": {"default": 128, "type": POSITIVE, "help": "images per step"},
    "lr": {"default": 2e-3, "type": in_range(float, 0, 1000), "help": "peak learning rate"},
    "timesteps": {"default": 1000, "type": in_range(int, 1, 10**6), "help": "T, noising steps"},
    "schedule": {"default": "linear", "choices": SCHEDULES, "help": "of the noise"},
    "channels": {"default": [32, 64, 128, 256], "type": POSITIVE, "nargs": "+", "help": "one number a level"},
    "class_dropout": {"default": 0.1, "type": SHARE, "help": "share of labels to drop; 0: sample with --guidance 1"},
    "ema_decay": {"default": 0.999, "type": SHARE, "help": "of the averaged weights, per step"},
    "seed": {"default": 0, "type": in_range(int, 0, 2**31), "help": "of the random numbers"},
}


def show(line, last=False):
    """Progress: on a terminal, one line that is written over again and again; elsewhere, only the last one."""
    if last or sys.stdout.isatty():
        print("\r" + line.ljust(79) if sys.stdout.isatty() else line, end="\n" if last else "", flush=True)


def train(args):
    """The train command. Leaves checkpoint.pt, weights.pt, log.csv and sample images in a folder.

    args is what make_parser parsed. Returns 130 if it was stopped before the end. Raises UserError and OSError.
    """
    given = {name: value for name, value in vars(args).items() if name in TRAIN_OPTIONS}
    out, device = Path(args.out or f"runs/{given.get('dataset', 'mnist')}"), torch.device(args.device)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not args.resume:
        raise UserError(f"{out} holds a run already: add --resume to go on with it, or choose another --out")
    saved = load(checkpoint) if args.resume else {}
    # A new run has the given options, a resumed one those that it began with; of these, only --epochs may change.
    options = {name: option["default"] for name, option in TRAIN_OPTIONS.items()} | saved.get("options", given)
    changed = ["--" + name.replace("_", "-") for name in given if given[name] != options[name] and name != "epochs"]
    if changed:
        raise UserError(f"{out} was begun with another {' and '.join(changed)}: leave that out, or start anew")
    options |= given
    config = options | DATASETS[options["dataset"]][-1]

    # torchrun starts several processes and numbers them. Each takes its share of every batch, with noise of its own,
    # and DistributedDataParallel averages their gradients, so that all have the same weights after every step. Process
    # 0 alone reports and saves, and it is the first to look for the data, so that it alone downloads.
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if options["batch_size"] % processes:
        raise UserError(f"--batch-size {options['batch_size']} cannot be shared by {processes} processes")
    if rank == 0:
        load_dataset(options["dataset"], args.data_dir)
    else:
        sys.stdout = open(os.devnull, "w")
    if processes > 1:
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else None
        device = gpu or device
        torch.distributed.init_process_group("nccl" if gpu else "gloo", device_id=gpu)  # waits until all have come here
    images, labels = (tensor.to(device) for tensor in load_dataset(options["dataset"], args.data_dir))
    print(f"{len(images)} images of {options['dataset']}, on {device}, into {out}", flush=True)

    torch.manual_seed(options["seed"])
    model = UNet(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options["lr"])
    parts = {"model": model, "ema": ema, "optimizer": optimizer}
    first_step, history, loss_sum = 0, ["epoch,step,loss,lr,images_per_s"], torch.zeros((), device=device)
    if saved:
        with explained(f"{checkpoint} does not fit this network: choose another --out"):
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            first_step, history, loss_sum = saved["step"], saved["history"], loss_sum + saved["loss_sum"]
    network = torch.compile(model) if args.compile else model  # a faster view of the same weights
    if processes > 1:
        network = nn.parallel.DistributedDataParallel(network)
        network.config = config

    batch_size = min(options["batch_size"], len(images))
    steps_per_epoch = len(images) // batch_size  # the remainder, different images in each epoch, is skipped
    epochs, total_steps = options["epochs"], options["epochs"] * steps_per_epoch
    alphas_cumprod = cumulative_alphas(config).float().to(device)
    if saved and epochs != saved["options"]["epochs"]:
        print(f"for {epochs} epochs, the learning rate is {learning_rate(first_step, total_steps, options['lr']):.1e}")

    # Ctrl-C and kill only set a flag; the loop checks it between steps, when the state is consistent. Of several
    # processes, 0 decides: if another one left first, the step that 0 is in could not be finished. When 0 has saved and
    # left, the others miss it in their next step, and end with an error or are ended by torchrun.
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if rank > 0 else lambda signum, frame: stop.append(signum))

    out.mkdir(parents=True, exist_ok=True)
    saved_at, shown_at, saved_step, rate = time.monotonic(), time.monotonic(), first_step, 0
    for step in range(first_step, total_steps):
        epoch, position = divmod(step, steps_per_epoch)
        # All chance follows from the seed and the place in the run, so a resumed run needs no state of a generator.
        # (Of integers, unlike text, Python's hash is the same in every process.)
        if position == 0 or step == first_step:
            shuffle = torch.Generator().manual_seed(hash((options["seed"], epoch)))
            order = torch.randperm(len(images), generator=shuffle).to(device)
        torch.manual_seed(hash((options["seed"], step, rank)))
        batch = order[position * batch_size : (position + 1) * batch_size][rank::processes]
        x_0, y = from_bytes(images[batch]), labels[batch]
        with explained(f"step {step} failed; maybe another process is gone") if processes > 1 else nullcontext():
            loss_sum += train_step(network, ema, optimizer, x_0, y, alphas_cumprod, step, total_steps, options)

        done, end_of_epoch = step + 1, position + 1 == steps_per_epoch
        save_now = end_of_epoch or stop or time.monotonic() - saved_at > 300  # seconds
        if rank > 0 or not (save_now or time.monotonic() - shown_at > 0.5):
            continue
        # The mean since the epoch began, of process 0's share. It waits for the device, so the clock is read after it.
        loss = loss_sum.item() / (position + 1)
        shown_at = time.monotonic()
        rate = (done - saved_step) * batch_size / (shown_at - saved_at)
        left = f"{(total_steps - done) * batch_size / rate / 60:.1f} min left"
        show(f"epoch {epoch + 1}/{epochs}  step {done}  loss {loss:.4f}  {rate:.0f} images/s  {left}", end_of_epoch)
        if not save_now:
            continue
        if not (math.isfinite(loss) and nn.utils.parameters_to_vector(model.parameters()).isfinite().all()):
            raise UserError(f"diverged between steps {saved_step} and {done} (loss {loss}): a lower --lr may help")
        if end_of_epoch:
            history.append(f"{epoch + 1},{done},{loss:.6f},{optimizer.param_groups[0]['lr']:.3e},{rate:.0f}")
            loss_sum.zero_()
        progress = {"options": options, "step": done, "history": history, "loss_sum": loss_sum.item()}
        save({name: part.state_dict() for name, part in parts.items()} | progress, checkpoint)
        save({"config": config, "weights": {k: v.half() for k, v in ema.state_dict().items()}}, out / "weights.pt")
        (out / "log.csv").write_text("\n".join(history) + "\n")  # all of it: no row twice, none missing
        if end_of_epoch and ((epoch + 1) % args.sample_every == 0 or done == total_steps):
            # Each class five times, from the same noise each time, so that epochs can be compared; without
            # guidance, to see what the network itself can do.
            images_of_classes = sample(ema, list(range(len(config["classes"]))) * 5, guidance=1)
            to_image(images_of_classes, len(config["classes"])).save(out / f"samples_{epoch + 1:03d}.png")
        if stop and done < total_steps:
            show(f"stopped at step {done} of {total_steps}; go on with the same command and --resume", last=True)
            return 130
        saved_at, saved_step = time.monotonic(), done

    print(f"done, at {rate:.0f} images/s; try: python ddpm.py sample --checkpoint {out / 'weights.pt'}")


# ======================================================================================================================
# 8. Evaluation
# ======================================================================================================================
#
# How good are the images? Three numbers say it, each blind to something, so none is given alone; and each beside the
# same number for as many real test images, the yardstick: without it, nobody knows what a good value is. (A third
# column gives those of training images, from which the classifier has learned.)
#
# Label accuracy: how often does a classifier read the digit that was asked for? It sees whether the class arrived, not
# whether the image looks like handwriting: a printed 3 would pass. With guidance it can be higher than for real images,
# some of which are hard to read; that is not a merit. Text-to-image models are often judged by CLIP, which compares an
# image with a sentence. But CLIP learned from photographs and their captions, and its score is a similarity: that of a
# good 1 and of a good 8 may differ, and nobody can say from which value on an 8 is an 8. A classifier of digits answers
# the very question, right or wrong, for each digit, and the real images say how far it can be trusted.
#
# Inception Score (Salimans et al. 2016, arXiv 1606.03498): is the classifier sure about each image, and does it find
# all classes equally often? It goes from 1 to the number of classes. It sees neither whether digits look written nor
# whether all threes are the same three, and is given because everybody knows it (here over all images at once, not as
# the mean of ten parts).
#
# FID (Heusel et al. 2017, arXiv 1706.08500): take the features that the classifier calculates before it decides, of the
# samples and of all training images; describe either set by its mean and covariance; and measure how far these two
# Gaussians are apart. It sees missing variety and wrong style, 0 is best; it is blind to labels, and to a model that
# only repeats its training images. The features usually come from Inception, a network for photographs of 299x299
# pixels, trained on the thousand classes of ImageNet. Grey digits, scaled up tenfold, are nothing that it knows, and on
# other data than ImageNet its verdict misleads (Barratt & Sharma 2018, arXiv 1801.01973, about the Inception Score). So
# FID here is only to be compared with FID here, by the same classifier and for the same number of images: fewer images
# make it larger.
#
# One more number needs no samples. The loss of section 4, of the averaged weights and with all labels, on images of
# the training set and on images that the network has not seen, shows overfitting, if it is clearly larger on the
# latter; in five bands of t, it shows where the loss comes from.

BATCH = 256  # images that are drawn, or judged, at once
CLASSIFIER_STEPS = 1900  # of training; about as many images as four epochs of MNIST


def make_classifier(config):
    """A small convolutional network: images (B, C, H, W) in [-1, 1] -> features (B, 64) -> logits (B, classes)."""

    def block(in_channels, out_channels):
        return nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU()

    features = nn.Sequential(
        *block(config["image_channels"], 16), nn.MaxPool2d(2),  # (B, 16, 14, 14)
        *block(16, 32), *block(32, 32), nn.MaxPool2d(2),  # (B, 32, 7, 7)
        *block(32, 64), *block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(),  # (B, 64)
    )  # fmt: skip
    return nn.Sequential(features, nn.Linear(64, len(config["classes"])))


@torch.inference_mode()
def judge(classifier, images):
    """Images (N, C, H, W) uint8 -> probabilities (N, classes) and features (N, 64) of a classifier in eval mode.

    Both are in float64 and on the CPU.
    """
    features, head = classifier
    f = torch.cat([features(from_bytes(batch.to(head.weight.device))) for batch in images.split(BATCH)])
    return head(f).cpu().double().softmax(dim=1), f.cpu().double()


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """FID: the squared Fréchet distance of two Gaussians, of means (D,) and covariances (D, D), float64."""
    # Heusel et al.: d² = ‖μ_1 - μ_2‖² + Tr(Σ_1 + Σ_2 - 2 (Σ_1 Σ_2)^½). The trace of a square root is the sum of the
    # square roots of the eigenvalues, which are real and not negative here, but for rounding.
    roots = torch.linalg.eigvals(cov_1 @ cov_2).real.clamp(min=0).sqrt()
    return ((mean_1 - mean_2) ** 2).sum() + torch.trace(cov_1 + cov_2) - 2 * roots.sum()


def inception_score(probabilities):
    """exp E KL(p(y|x) ‖ p(y)) of probabilities p(y|x) (N, classes) (Salimans et al. 2016): 1 to classes."""
    # E KL(p(y|x) ‖ p(y)) = H(E p(y|x)) - E H(p(y|x)), with the entropy H
    mean_entropy = torch.special.entr(probabilities).sum(dim=1).mean()
    return (torch.special.entr(probabilities.mean(dim=0)).sum() - mean_entropy).exp()


def load_classifier(name, data_dir, device):
    """The classifier of a data set, and mean (64,) and covariance (64, 64) of its features of the training images.

    They lie in assets/ or in runs/; if in neither, they are made now and kept in runs/. Raises UserError when that
    would take data that cannot be had, or when a file is damaged.
    """
    file = f"classifier_{name}.pt"
    path = ASSETS / file if (ASSETS / file).exists() else Path("runs", file)
    torch.manual_seed(0)
    classifier = make_classifier(DATASETS[name][-1]).to(device)
    if not path.exists():
        print(f"training a classifier of {name}, once; on a CPU this takes a minute or two", flush=True)
        images, labels = (tensor.to(device) for tensor in load_dataset(name, data_dir))
        optimizer = torch.optim.AdamW(classifier.parameters())
        for step in range(CLASSIFIER_STEPS):
            optimizer.param_groups[0]["lr"] = learning_rate(step, CLASSIFIER_STEPS, peak=3e-3)
            batch = torch.randint(len(images), (128,), device=device)
            # Each batch is moved by up to two pixels, so that the shape of a digit is learned and not its place. (What
            # leaves on one side comes back on the other; MNIST's margin is all but empty.)
            x = torch.roll(from_bytes(images[batch]), torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
            loss = F.cross_entropy(classifier(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _, features = judge(classifier.eval(), images)
        path.parent.mkdir(exist_ok=True)
        save({"weights": classifier.state_dict(), "mean": features.mean(dim=0), "cov": features.T.cov()}, path)
    contents = load(path)
    with explained(f"{path} is not a classifier of this ddpm.py: delete it"):
        classifier.load_state_dict(contents["weights"])
        return classifier.eval(), contents["mean"], contents["cov"]


@torch.inference_mode()
def denoising_loss(model, images, labels):
    """The loss of section 4 in five bands of t, of the first 1000 images (N, C, H, W) uint8: {name: text}. labels (N,).

    t and noise come from a fixed seed: two sets of the same size get the same, so that their losses can be compared.
    """
    rows, device, T = {}, next(model.parameters()).device, model.config["timesteps"]
    alphas_cumprod = cumulative_alphas(model.config).float().to(device)
    x_0, y = from_bytes(images[:1000].to(device)), labels[:1000].to(device)  # enough for two or three digits
    edges = sorted({T * i // 5 for i in range(6)})
    for low, high in zip(edges[:-1], edges[1:]):
        torch.manual_seed(0)
        rows[f"loss, t {low}..{high - 1}"] = f"{ddpm_loss(model, x_0, y, alphas_cumprod, 0, (low, high)):.4f}"
    return rows


def draw(model, labels, seeds, args, x_T=None, on_step=None):
    """Samples in batches, with progress: labels and seeds are lists (N), args as parsed, x_T and on_step as in sample.

    Yields the images one by one, x_0 (C, H, W), on the CPU. An x_T must fit every batch: (1, C, H, W).
    """
    started_at = time.monotonic()
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        yield from sample(model, labels[part], args.steps, args.eta, args.guidance, args.guidance_interval, seeds[part],
                          x_T, on_step).cpu()  # fmt: skip
        done = min(start + BATCH, len(labels))
        show(f"{done} of {len(labels)}, {done / (time.monotonic() - started_at):.1f} images/s", done == len(labels))


def evaluate(args):
    """The evaluate command: draws images, judges them beside as many real ones, and prints a table."""
    model = load_model(args.checkpoint, args.device)
    name, classes, count = model.config["dataset"], model.config["classes"], args.count
    if name not in DATASETS or model.config != model.config | DATASETS[name][-1]:  # channels, size, classes
        raise UserError(f"this model's images are not those of {', '.join(DATASETS)}: nothing to compare them with")
    classifier, mean, cov = load_classifier(name, args.data_dir, args.device)
    real, y = {}, torch.arange(count) % len(classes)  # without real images, all classes equally often
    try:
        for part, is_train in ("test images", False), ("training images", True):
            images, labels = load_dataset(name, args.data_dir, is_train)
            y = y if is_train else labels[torch.arange(count) * len(labels) // count]  # classes about as in the test
            # At random: MNIST's test set begins with its easier half, and in both sets images of two groups of writers
            # alternate, so that every tenth image, for example, would be by the same group.
            chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
            real[part] = images[chosen], labels[chosen]
    except UserError as error:
        print(f"figures of real images are missing: {error}")

    seen, started_at = [], time.monotonic()  # how many images the network sees, call by call
    model.register_forward_hook(lambda model, inputs, output: seen.append(len(output)))
    seeds = range(args.seed * 1_000_000, args.seed * 1_000_000 + count)
    samples = torch.stack([to_bytes(x_0) for x_0 in draw(model, y.tolist(), seeds, args)])
    print(f"{sum(seen) / count:g} network evaluations an image, {sum(seen) / (time.monotonic() - started_at):.0f}/s\n")

    table = {}
    for part, (images, labels) in {"samples": (samples, y), **real}.items():
        probabilities, features = judge(classifier, images)
        right = (probabilities.argmax(dim=1) == labels).double()
        rows = {"": part, "images": f"{len(labels)}", "label accuracy": f"{right.mean():.2%}"}
        rows |= {f"  {label}": f"{right[labels == i].mean():.2%}" for i, label in enumerate(classes)}
        rows["FID"] = f"{frechet_distance(features.mean(dim=0), features.T.cov(), mean, cov):.3f}"
        rows["Inception Score"] = f"{inception_score(probabilities):.3f}"
        table[part] = rows | (denoising_loss(model, images, labels) if part in real else {})
    for row in table[part]:  # the last column has all the rows
        print(f"{row:<24}" + "".join(f"{rows.get(row, ''):>18}" for rows in table.values()))


# ======================================================================================================================
# 9. The command line
# ======================================================================================================================


def class_number(name, classes):
    """The number of a class, given its name (lower case in classes) or its number as text. Raises UserError."""
    names = [str(number) for number in range(len(classes))] + classes
    if name.lower() not in names:
        raise UserError(f"there is no class {name!r}: choose 0 to {len(classes) - 1}, or one of {', '.join(classes)}")
    return names.index(name.lower()) % len(classes)  # first the numbers, then the names in the same order


def sample_command(args):
    """The sample command: draws the labels asked for and writes one image file, or a folder of them."""
    model, out, gif = load_model(args.checkpoint, args.device), args.out, args.gif
    config, classes = model.config, model.config["classes"]
    # One label fills a square; several make a row, a number for example, that is drawn count times.
    row = [class_number(name, classes) for name in args.label or classes]
    columns = len(row) if len(row) > 1 else None
    labels = row * (args.count or (1 if columns or args.like else 16))
    if out.suffix not in ("", ".png") or gif and (gif.suffix != ".gif" or len(labels) > BATCH):
        raise UserError(f"--out takes a .png or a folder; --gif a .gif, for {BATCH} images at most, not {len(labels)}")
    if args.like and not (args.like_label and config["image_channels"] == 1):
        raise UserError("--like needs --like-label, the digit that the image shows, and a model of grey images")
    x_T = invert(model, read_digit(args.like, config["image_size"]).to(args.device),
                 [class_number(args.like_label, classes)], args.steps) if args.like else None  # fmt: skip

    (out.parent if out.suffix else out).mkdir(parents=True, exist_ok=True)
    (gif or out).parent.mkdir(parents=True, exist_ok=True)
    # The images of a row start from the same noise: they come out as if one hand had written them.
    seeds = [args.seed * 1_000_000 + i // len(row) for i in range(len(labels))]
    images, frames = [], []
    on_step = (lambda x_t, x_0_hat: frames.append((x_t.cpu(), x_0_hat[:1].cpu()))) if gif else None
    for i, x_0 in enumerate(draw(model, labels, seeds, args, x_T, on_step)):
        if not out.suffix:
            to_image(x_0[None]).save(out / f"{labels[i]}_{i:05d}.png")
        if out.suffix or gif:  # a folder may get more images than the memory holds
            images.append(x_0)
    if out.suffix:
        to_image(torch.stack(images), columns).save(out)
    if gif:
        save_film([*frames, (torch.stack(images), images[0][None])], gif, columns)
    print(f"written: {out}" + (f", {gif} and its ten moments" if gif else ""))


def shapes_command(args):
    """The shapes command: runs the network once and prints what each of its blocks gives out."""
    model = UNet({"channels": args.channels, "schedule": "linear", "timesteps": 1, **DATASETS[args.dataset][-1]})
    print(f"{'block':<14} {'output shape':<18} {'parameters':>10}")
    for name, block in model.named_modules():  # "" is the whole network
        if name.rpartition(".")[0] in ("", "encoder", "downsample", "decoder", "upsample"):
            line = f"{name or 'total':<14} {{!s:<18}} {sum(p.numel() for p in block.parameters()):>10,}"
            # A hook prints when the block has run, so in the order of the forward pass.
            block.register_forward_hook(lambda _, inputs, out, line=line: print(line.format(tuple(out.shape[1:]))))
    sample(model, [0], guidance=1)


def make_parser():
    """The commands and their flags."""
    parser = argparse.ArgumentParser(prog="ddpm.py", description="A diffusion model that draws handwritten digits.")
    commands = parser.add_subparsers(dest="command", required=True, help="each has its own --help")
    # Within this function, the commands' names stand for their parsers.
    train = commands.add_parser("train", help="train a model; write weights, log and samples into a folder")
    sample = commands.add_parser("sample", help="draw images with trained weights")
    evaluate = commands.add_parser("evaluate", help="draw images and measure how good they are, beside real ones")
    shapes = commands.add_parser("shapes", help="show each block's output shape and number of parameters")

    def flag(command, name, help, default=None, **options):
        help += f" (default: {default})" if default is not None else ""
        command.add_argument(name, help=help, default=default, **options)

    for name, option in TRAIN_OPTIONS.items():  # what is not given is left out, as a resumed run keeps what it has
        option = {**option, "default": argparse.SUPPRESS, "help": f"{option['help']} (default: {option['default']})"}
        train.add_argument("--" + name.replace("_", "-"), **option)
    flag(train, "--out", "folder of the run (default: runs/DATASET)")
    flag(train, "--sample-every", "epochs between sample images", 1, type=POSITIVE)
    flag(train, "--resume", "go on with the run in --out, by its own options", action="store_true")
    flag(train, "--compile", "use torch.compile: a minute's wait, then faster steps", action="store_true")

    flag(sample, "--label", "a class, or the classes of a row, by number or name (default: all)", nargs="+")
    flag(sample, "--count", "images of one label (default: 16; with --like 1), or rows of several (1)", type=POSITIVE)
    flag(sample, "--like", "write in the hand of this image of a digit, PNG or JPEG", metavar="IMAGE")
    flag(sample, "--like-label", "the digit that IMAGE shows", metavar="D")
    flag(sample, "--gif", "a film of the sampling; ten moments of it as PATH_moments.png", type=Path, metavar="PATH")
    flag(sample, "--out", "a .png file, or a folder to fill", "samples.png", type=Path)
    # The covariance of 64 features needs more than 64 images, and there are 10,000 test images.
    flag(evaluate, "--count", "images to draw, and real ones beside them", 10000, type=in_range(int, 65, 10000))

    for c in sample, evaluate:
        flag(c, "--checkpoint", "a weights.pt (default: the newest in runs/, else assets/mnist.pt)")
        flag(c, "--steps", "steps from noise to image, up to T", STEPS, type=POSITIVE)
        flag(c, "--eta", "scale of the fresh noise: 0 is DDIM; 1, with T steps and S = 1, Algorithm 2", 0.0, type=SHARE)
        flag(c, "--guidance", "S: 0 unconditional, 1 conditional, more: guided", GUIDANCE, type=in_range(float, 0, 99))
        flag(c, "--guidance-interval", "shares of T: where S may be above 1", GUIDANCE_INTERVAL, type=SHARE, nargs=2)
        flag(c, "--seed", **TRAIN_OPTIONS["seed"])
    for c in train, evaluate:
        flag(c, "--data-dir", "folder of the data sets; what is not there is downloaded", "data")
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    for c in train, sample, evaluate:
        flag(c, "--device", "where to run", "auto", type=lambda name: name.replace("auto", devices[0]), choices=devices)
    for name in ("dataset", "channels"):
        flag(shapes, "--" + name, **TRAIN_OPTIONS[name])
    return parser


def main(argv=None):
    """Runs one command, from argv or the process's arguments. Returns the exit status: 0, 1 error, 130 stopped.

    A wrong flag exits at once, with status 2 (argparse).
    """
    args = make_parser().parse_args(argv)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    commands = {"train": train, "sample": sample_command, "evaluate": evaluate, "shapes": shapes_command}
    try:
        return commands[args.command](args) or 0
    except (UserError, OSError) as error:
        print(f"ddpm.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ddpm.py: stopped; what is written stays", file=sys.stderr)
        return 130
    finally:
        for number, handler in handlers.items():  # train has its own; a notebook goes on after it
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
