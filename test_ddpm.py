"""The tests of ddpm.py, in the order of its sections. Run them with: python -m pytest -q

The first screen shows what the program promises, on examples that a reader can follow. Below it, each formula is held
against a second derivation of the same thing: another equation of the paper, Bayes' rule, a closed form or a plain
loop, in float64 where possible. All tests run on the CPU, offline and from fixed seeds.
"""

import ast
import copy
import io
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.nn import functional as F

import ddpm

# === The first screen =================================================================================================


def test_shapes_of_the_network():
    """The U-Net halves the image three times, undoes this three times, and returns a noise like its input."""
    model = ddpm.UNet(ddpm.Config())
    shapes = []
    for block in [*model.encoder, model.middle, model.attention, *model.decoder]:
        block.register_forward_hook(lambda block, inputs, output: shapes.append(output.shape))
    x_t = torch.zeros(2, 1, 28, 28)
    t = torch.tensor([0, 999])
    y = torch.tensor([3, 10])  # a three, and "no class"
    assert model(x_t, t, y).shape == x_t.shape
    down = [(2, 32, 28, 28), (2, 64, 14, 14), (2, 128, 7, 7), (2, 256, 4, 4)]
    assert shapes == down + [(2, 256, 4, 4)] * 2 + down[::-1]


def test_product_of_the_schedule():
    """The product of all 1-β of the cosine schedule is the curve of cosines that it is made from."""
    alphas_cumprod = ddpm.cumulative_alphas(ddpm.Config(schedule="cosine", timesteps=100))
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    for t in range(99):  # without the last step, whose β is limited to 0.999
        curve = math.cos(((t + 1) / 100 + 0.008) / 1.008 * math.pi / 2) ** 2
        assert alphas_cumprod[t].item() == pytest.approx(curve / start)


@pytest.mark.parametrize("schedule", ddpm.SCHEDULES)
def test_many_small_steps_are_one_jump(schedule):
    """Eq. 4 in one jump equals t steps of Eq. 2, for each t."""
    alphas_cumprod = ddpm.cumulative_alphas(ddpm.Config(schedule=schedule, timesteps=100))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mean, variance = 1.0, 0.0  # of an image that is 1 and has no noise
    for t, beta in enumerate(ddpm.beta_schedule(schedule, 100).tolist()):
        mean = math.sqrt(1 - beta) * mean
        variance = (1 - beta) * variance + beta
        image_alone = ddpm.q_sample(one, torch.tensor([t]), 0 * one, alphas_cumprod)
        noise_alone = ddpm.q_sample(0 * one, torch.tensor([t]), one, alphas_cumprod)
        assert image_alone.item() == pytest.approx(mean)
        assert noise_alone.item() == pytest.approx(math.sqrt(variance))


SOURCE = Path(ddpm.__file__).read_text(encoding="utf-8")
PART_ONE = SOURCE.partition("# PART TWO")[0]
END = PART_ONE.rpartition("yield x_t, x_0_hat")[2]  # a comment, with ten lines of code in it
TEN_LINES = "\n".join(re.findall("^#     (.*)$", END, re.MULTILINE))


def test_part_one_learns_to_draw():
    """The lines at the end of Part One learn three images by heart and draw each of them from noise."""
    images = torch.full((3, 1, 8, 8), -1.0)
    images[0, :, :, 3:5] = 1  # an upright stroke
    images[1, :, 3:5, :] = 1  # a level one
    images[2, :] = 2 * torch.eye(8) - 1  # a slanted one
    names = {}
    exec(PART_ONE, names)  # nothing else is there for the lines to use
    names["config"] = names["Config"](
        image_size=8, classes=("upright", "level", "slanted"), timesteps=50, channels=(16, 32)
    )
    names["batches"] = [(images.repeat(8, 1, 1, 1), torch.arange(3).repeat(8))] * 500
    torch.manual_seed(0)
    exec(TEN_LINES, names)
    for x_0, y in zip(names["x_t"], names["y"]):
        assert (x_0 - images[y]).abs().mean() < 0.25  # two of the images differ by 0.6 or more


def test_part_one_stands_alone():
    """Part One imports math, dataclasses and torch only, and neither opens nor prints anything."""
    nodes = list(ast.walk(ast.parse(PART_ONE)))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert modules == {"math", "dataclasses", "torch", "torch.nn"}
    assert not {"open", "print"} & {node.id for node in nodes if isinstance(node, ast.Name)}
    assert len(TEN_LINES.splitlines()) == 10


# === Helpers of all sections ==========================================================================================

T = 50


def close(actual, expected, tolerance=1e-9):
    """Fails unless the two are equal up to rounding in float64, or up to the tolerance."""
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def tiny(**changes):
    """The Config of a model so small that a test takes no time."""
    return ddpm.Config(**{"timesteps": T, "channels": (4, 6), "image_size": 8} | changes)


def alpha_bars(timesteps, schedule="linear"):
    """The products of 1-β as floats, with 1 behind the last, so that [-1] is the level of a clean image."""
    betas = ddpm.beta_schedule(schedule, timesteps).tolist()
    return [math.prod(1 - beta for beta in betas[: t + 1]) for t in range(timesteps)] + [1.0]


# Both are ᾱ_t for all t of the tiny Config: as floats of this file, and as the program computes them.
BARS = alpha_bars(T)
ALPHAS_CUMPROD = ddpm.cumulative_alphas(tiny())


def normal(*shape, seed=0):
    """Standard normal numbers in float64, the same in each run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# === 1. The noise schedule ============================================================================================


@pytest.mark.parametrize("timesteps", [10, 1000])
def test_linear_schedule(timesteps):
    """The linear betas rise evenly, from 0.1/T to 20/T."""
    close(ddpm.beta_schedule("linear", timesteps), (np.linspace(0.1, 20, timesteps) / timesteps).clip(max=0.999))


@pytest.mark.parametrize("schedule", ddpm.SCHEDULES)
@pytest.mark.parametrize("timesteps", [1, 10, 1000])
def test_any_number_of_steps(schedule, timesteps):
    """Each schedule has a β for each step, in (0, 0.999], and from ten steps on leaves almost nothing of the image."""
    betas = ddpm.beta_schedule(schedule, timesteps)
    assert betas.dtype == torch.float64 and betas.shape == (timesteps,)
    assert 0 < betas.min() and betas.max() <= 0.999
    assert timesteps < 10 or alpha_bars(timesteps, schedule)[-2] < 1e-4


# === 2. The forward process ===========================================================================================


def test_each_image_has_its_own_t():
    """In one batch, each image is noised to its own level."""
    x_0, eps = normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    steps = [T - 1, 0, 20]
    x_t = ddpm.q_sample(x_0, torch.tensor(steps), eps, ALPHAS_CUMPROD)
    for i, t in enumerate(steps):
        close(x_t[i], BARS[t] ** 0.5 * x_0[i] + (1 - BARS[t]) ** 0.5 * eps[i])


# === 3. The network ===================================================================================================


def random_unet(**changes):
    """A small U-Net in which no layer is zero any more, so that none hides what the others do."""
    model = ddpm.UNet(tiny(**changes))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.requires_grad_(False)


def some_input(channels=1, size=8):
    """Three noisy images, their steps and their classes."""
    x_t = normal(3, channels, size, size).float()
    return x_t, torch.full((3,), 7), torch.full((3,), 2)


def test_timestep_embedding():
    """The embedding of t is the cosines, then the sines of t times frequencies from 1 down towards 1/10000."""
    steps = [0, 1, 37, 999]
    got = ddpm.timestep_embedding(torch.tensor(steps), 8)
    for row, t in zip(got, steps):
        angles = [t / 10000 ** (i / 4) for i in range(4)]
        close(row, [math.cos(a) for a in angles] + [math.sin(a) for a in angles], 1e-4)


@pytest.mark.parametrize("channels", [(8,), (5, 3, 7), (4, 4, 4, 4)])
def test_any_channels(channels):
    """The output is like the input, in colour and with any number of any channels."""
    x_t, t, y = some_input(3, 28)
    assert random_unet(channels=channels, image_channels=3)(x_t, t, y).shape == x_t.shape


def test_untrained_network():
    """Before training, v is 0, and the predicted noise is the fixed share √(1-ᾱ_t) of x_t."""
    x_t, t, y = some_input()
    close(ddpm.UNet(tiny())(x_t, t, y).data, (1 - BARS[7]) ** 0.5 * x_t, 1e-6)


def test_blocks_before_training():
    """Encoder, middle and attention begin as the identity, decoder blocks as their 1x1 convolution."""
    assert [ddpm.group_norm(channels).num_groups for channels in (32, 12, 6, 5)] == [8, 4, 2, 1]
    model, emb = ddpm.UNet(tiny()).requires_grad_(False), normal(2, 16).float()
    for block in [*model.encoder, model.middle, *model.decoder]:
        x = normal(2, block.norm1.num_channels, 4, 4).float()
        assert torch.equal(block(x, emb, emb), block.shortcut(x))
    for block in [*model.encoder, model.middle]:
        assert isinstance(block.shortcut, torch.nn.Identity)
    for block in model.decoder:
        assert block.shortcut.kernel_size == (1, 1)
    x = normal(2, 6, 4, 4).float()
    assert torch.equal(model.attention(x), x)


def test_path_through_the_network():
    """Time and class reach each block, a skip the decoder block of its size, and v becomes √ᾱ v + √(1-ᾱ) x_t."""
    model = random_unet()
    x_t, t, y = normal(3, 1, 7, 7).float(), torch.tensor([0, 20, 49]), torch.tensor([3, 8, 10])
    first, _, second, _ = model.time_mlp  # the others are SiLU
    hidden = F.silu(first(ddpm.timestep_embedding(t, 16)))
    embeddings = F.silu(second(hidden)), model.class_emb.weight[y]
    large = model.encoder[0](model.conv_in(x_t), *embeddings)
    small = model.encoder[1](model.downsample[0](large), *embeddings)
    h = model.attention(model.middle(small, *embeddings))
    h = model.decoder[1](torch.cat([h, small], dim=1), *embeddings)
    h = model.upsample[0](h)[:, :, [0, 0, 1, 1, 2, 2, 3]][..., [0, 0, 1, 1, 2, 2, 3]]  # 4x4 to 7x7
    h = model.decoder[0](torch.cat([h, large], dim=1), *embeddings)
    v = model.conv_out(F.silu(model.norm_out(h)))
    bar = ALPHAS_CUMPROD[t].view(3, 1, 1, 1)
    assert v.abs().min(dim=0).values.max() > 0.1
    close(model(x_t, t, y), bar**0.5 * v + (1 - bar) ** 0.5 * x_t, 1e-4)


def test_scale_and_shift():
    """Between its convolutions, a block normalizes h, multiplies it by 1 + scale and adds the shift."""
    block = random_unet().double().decoder[0]
    x, t_emb, y_emb = normal(1, 8, 4, 4), normal(1, 16, seed=1), normal(1, 16, seed=2)
    h = block.norm2(block.conv1(F.silu(block.norm1(x))))
    scale, shift = (block.time_proj(t_emb) + block.class_proj(y_emb)).view(2, 4, 1, 1)
    h = h * (1 + scale) + shift
    close(block(x, t_emb, y_emb), block.shortcut(x) + block.conv2(h * h.sigmoid()))


def test_attention_is_softmax_of_products():
    """Each position gathers the values of all positions, weighted by the softmax of q·k/√C."""
    attention, x = random_unet().attention.double(), normal(1, 6, 2, 3)
    h = attention.norm(x)[0].flatten(1).T  # (6 positions, C)
    q, k, v = attention.qkv(h).chunk(3, dim=1)
    out = x.clone()
    for i in range(6):
        weights = [math.exp(q[i] @ k[j] / 6**0.5) for j in range(6)]
        value = sum(weight * v[j] for j, weight in enumerate(weights)) / sum(weights)
        out[0, :, i // 3, i % 3] += attention.out(value)
    close(attention(x), out)


# === 4. The training objective and Algorithm 1 ========================================================================


class Fake:
    """Stands in for the network: says answer(x_t, t, y) and remembers what it was asked."""

    no_class = 10

    def __init__(self, answer, config=None):
        self.answer, self.config, self.asked = answer, config or tiny(), []
        self.alphas_cumprod = ddpm.cumulative_alphas(self.config)

    def __call__(self, x_t, t, y):
        self.asked.append((x_t, t, y))
        return self.answer(x_t, t, y)


def noise_in(x_t, x_0, t, alphas_cumprod):
    """The noise that makes x_t of x_0: Eq. 4, solved for ε."""
    bar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return (x_t - bar**0.5 * x_0) / (1 - bar) ** 0.5


def test_loss_by_hand():
    """L_simple with the weight 1/√ᾱ_t equals the squared error of v with the weight √ᾱ_t."""
    torch.manual_seed(0)
    x_0, model = normal(64, 2, 4, 4).clamp(-1, 1), Fake(lambda x_t, t, y: x_t.sin())
    loss = ddpm.ddpm_loss(model, x_0, torch.arange(64) % 10)
    x_t, t, _ = model.asked[0]
    bar = model.alphas_cumprod[t].view(-1, 1, 1, 1)
    eps, eps_hat = noise_in(x_t, x_0, t, model.alphas_cumprod), x_t.sin()
    v = bar**0.5 * eps - (1 - bar) ** 0.5 * x_0
    v_hat = (eps_hat - (1 - bar) ** 0.5 * x_t) / bar**0.5
    close(loss, (bar**0.5 * (v - v_hat) ** 2).mean())


def test_each_step_is_trained():
    """Each t in 0..T-1 is drawn equally often, a new one for each image, and the noise is standard normal."""
    torch.manual_seed(0)
    model = Fake(lambda x_t, t, y: 0 * x_t, tiny(timesteps=5))
    x_0 = torch.ones(10000, 1, 2, 2, dtype=torch.float64)
    ddpm.ddpm_loss(model, x_0, torch.tensor(0))
    x_t, t, _ = model.asked[0]
    counts = torch.bincount(t)
    assert len(counts) == 5 and (counts - 2000).abs().max() < 5 * 40  # five standard deviations
    eps = noise_in(x_t, x_0, t, model.alphas_cumprod)
    assert abs(eps.mean()) < 5 / 200 and abs(eps.var() - 1) < 5 * 2**0.5 / 200


@pytest.mark.parametrize("share", [0, 0.1, 1])
def test_labels_are_dropped(share):
    """The given share of the labels becomes "no class", and the others stay."""
    torch.manual_seed(0)
    model, y = Fake(lambda x_t, t, y: x_t, tiny(class_dropout=share)), torch.arange(8000) % 10
    ddpm.ddpm_loss(model, torch.zeros(8000, 1, 1, 1), y)
    got = model.asked[0][2]
    dropped = got == 10
    assert torch.equal(got[~dropped], y[~dropped])
    assert abs(dropped.double().mean() - share) <= 5 * (share * (1 - share) / 8000) ** 0.5


def test_each_parameter_is_trained():
    """After three steps, the next gradient reaches each parameter, each class and "no class"."""
    torch.manual_seed(0)
    model = ddpm.UNet(tiny(channels=(12, 16), class_dropout=0.3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        ddpm.ddpm_loss(model, normal(64, 1, 8, 8).float(), torch.arange(64) % 10).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name
    assert (model.class_emb.weight.grad.abs().amax(dim=1) > 0).all()


# === 5. Sampling: Algorithm 2 =========================================================================================


@pytest.mark.parametrize("t", [1, 2, 25, T - 1])
def test_posterior_is_bayes_rule(t):
    """Eq. 7 is the mean and the deviation of Eq. 2 times Eq. 4, summed over a fine grid of x_{t-1}."""
    bar, bar_prev, x_0, x_t = BARS[t], BARS[t - 1], 0.7, -1.3
    mean, sigma = ddpm.posterior(x_0, x_t, bar, bar_prev)
    beta = ddpm.beta_schedule("linear", T)[t].item()
    x = mean + sigma * np.linspace(-9, 9, 20001)  # x_{t-1}
    log_density = -((x_t - (1 - beta) ** 0.5 * x) ** 2) / (2 * beta)  # Eq. 2
    log_density -= (x - bar_prev**0.5 * x_0) ** 2 / (2 * (1 - bar_prev))  # Eq. 4
    density = np.exp(log_density - log_density.max())
    grid_mean = np.average(x, weights=density)
    grid_variance = np.average((x - grid_mean) ** 2, weights=density)
    close([mean, sigma**2], [grid_mean, grid_variance])


def test_algorithm_2_finds_the_image_of_an_oracle():
    """If the network knows x_0, Algorithm 2 takes T steps, draws noise in all but the last, and ends at x_0."""
    x_0, x_T, y = normal(2, 1, 4, 4).clamp(-1, 1), normal(2, 1, 4, 4, seed=1), torch.tensor([3, 4])
    model, drawn = Fake(lambda x_t, t, y: noise_in(x_t, x_0, t, ALPHAS_CUMPROD)), []
    noise = lambda x: drawn.append(x) or torch.ones_like(x)  # noqa: E731
    pairs = list(ddpm.ddpm_sampler(model, x_T, y, ALPHAS_CUMPROD, noise))
    assert len(pairs) == T and len(drawn) == T - 1
    close(pairs[-1][0], x_0)
    for _, x_0_hat in pairs:
        close(x_0_hat, x_0)
    assert [t.tolist() for _, t, _ in model.asked] == [[t, t] for t in reversed(range(T))]


# === 6. DDIM: fewer steps =============================================================================================


@pytest.mark.parametrize("total, steps", [(1000, 12), (50, 99)])
def test_visited_steps(total, steps):
    """The t's are the first to reach evenly spaced angles, up to that of T-1; no t comes twice, and -1 ends them."""
    bars = ddpm.cumulative_alphas(tiny(timesteps=total))
    angles, n = np.arccos(np.sqrt(bars.numpy())), min(steps, total)
    reached = {(angles < i / n * angles[-1] - 1e-9).sum() for i in range(1, n + 1)}
    assert ddpm.visited_steps(bars, steps) == [*sorted(reached)[::-1], -1]


def wild(x_t, t, y):
    """A prediction that depends on everything, and is often so wrong that x̂_0 is clipped."""
    return (3 * x_t + (t / 9 + y).view(-1, 1, 1, 1)).sin()


def possible(eps_hat, x_t, bar):
    """The noise nearest to eps_hat that lies between that of a white and that of a black image."""
    white, black = [(x_t - pixel * bar**0.5) / (1 - bar) ** 0.5 for pixel in (1, -1)]
    return torch.minimum(torch.maximum(eps_hat, white), black)


@pytest.mark.parametrize("eta", [0, 0.5, 1])
def test_ddim_as_published(eta):
    """The sampler takes the steps of Eq. 12 and 16 of the DDIM paper, with the noise that clipping leaves."""
    y, x_t, z = torch.tensor([3, 8]), normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    draw = (lambda x: z) if eta else None  # without fresh noise, none is asked for
    visited = range(49, -2, -10)
    steps = ddpm.ddim_sampler(wild, x_t, y, ALPHAS_CUMPROD, visited, eta, draw)
    for t, t_prev, (ours, _) in zip(visited, visited[1:], steps):
        bar, bar_prev = BARS[t], BARS[t_prev]
        raw = wild(x_t, torch.full_like(y, t), y)
        eps = possible(raw, x_t, bar)
        assert (eps != raw).any()
        fresh = eta**2 * (1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev)
        image = (x_t - (1 - bar) ** 0.5 * eps) / bar**0.5
        x_t = bar_prev**0.5 * image + (1 - bar_prev - fresh) ** 0.5 * eps + fresh**0.5 * z
        close(ours, x_t)


def test_eta_1_is_algorithm_2():
    """DDIM with η = 1 and all T steps gives the images of Algorithm 2 from the same noise."""
    y, x_T = torch.tensor([3, 8]), normal(2, 1, 4, 4)
    shared = x_T, y, ALPHAS_CUMPROD
    torch.manual_seed(0)
    ho = list(ddpm.ddpm_sampler(wild, *shared))
    torch.manual_seed(0)
    song = list(ddpm.ddim_sampler(wild, *shared, range(T - 1, -2, -1), eta=1))
    for ours, other in zip(ho, song, strict=True):
        close(torch.cat(ours), torch.cat(other), 1e-6)


# === 7. Guidance and drawing ==========================================================================================


@pytest.fixture
def float32(monkeypatch):
    """Layers compute in float32, as on a device without bfloat16."""
    monkeypatch.setattr(ddpm, "has_bfloat16", lambda device: False)


@pytest.mark.parametrize("S", [0, 0.5, 1, 3])
def test_guidance(S):
    """S = 0 is unconditional, 1 conditional, and all other S lie on the line through the two, in one call."""
    model = Fake(wild)
    x_t, t, y = normal(2, 1, 4, 4), torch.tensor([20, 20]), torch.tensor([3, 8])
    eps_hat = ddpm.guided(model, S)(x_t, t, y)
    ((asked, _, _),) = model.asked
    assert len(asked) == (2 if S == 1 else 4)
    close(eps_hat, (1 - S) * wild(x_t, t, torch.tensor([10, 10])) + S * wild(x_t, t, y))


@pytest.mark.parametrize("S, S_outside", [(3, 1), (0.5, 0.5)])
@pytest.mark.parametrize("interval", [(0.2, 0.6), (0.6, 0.2)])
def test_guidance_interval(S, S_outside, interval):
    """Where t/T lies outside the interval, S is at most 1; the two ends may come in either order."""
    model, x_t, y = Fake(wild), normal(1, 1, 4, 4), torch.tensor([3])
    for step in range(T):
        t = torch.tensor([step])
        always = ddpm.guided(model, S if 10 <= step <= 30 else S_outside, (0, 1))
        close(ddpm.guided(model, S, interval)(x_t, t, y), always(x_t, t, y))


@pytest.mark.parametrize("steps", [7, T])
def test_options_of_sampling(steps):
    """sample passes its options on, one x_T serves all labels, and with eta 1 all steps are Algorithm 2."""
    x_T, visited = normal(1, 1, 8, 8), ddpm.visited_steps(ALPHAS_CUMPROD, 7)
    images = ddpm.sample(Fake(wild), [3, 8], steps=steps, eta=1, guidance=3, guidance_interval=(0, 0.5), x_T=x_T)
    shared = ddpm.guided(Fake(wild), 3, (0, 0.5)), x_T.expand(2, 1, 8, 8), torch.tensor([3, 8]), ALPHAS_CUMPROD
    noise = ddpm.seeded_randn_like([0, 1])
    song, ho = ddpm.ddim_sampler(*shared, visited, 1, noise), ddpm.ddpm_sampler(*shared, noise)
    *_, (x_0, _) = ho if steps == T else song
    close(images, x_0)


def test_path_to_known_data():
    """If x_0 is normal with deviation 0.3, paths are known: x_t keeps its ratio to the deviation of all x_t."""

    def mean_noise(x_t, t, y):
        bar = ALPHAS_CUMPROD[t[0]]
        return (1 - bar) ** 0.5 * x_t / (1 - bar + 0.3**2 * bar)

    x_T = normal(1, 1, 8, 8)
    x_0 = ddpm.sample(Fake(mean_noise), [3], steps=T, guidance=1, x_T=x_T)
    close(x_0, 0.3 * x_T, 0.005)  # steps of first order err by up to 0.04


def test_each_seed_has_a_stream():
    """The noise for a seed is that of its own generator, in the same order, whatever else is in the batch."""
    randn_like = ddpm.seeded_randn_like([5, 6])
    streams = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    for _ in range(3):
        noise = randn_like(torch.zeros(2, 1, 4, 4))
        for image, stream in zip(noise, streams):
            assert torch.equal(image, torch.randn(1, 4, 4, generator=stream))


@pytest.mark.parametrize("eta", [0, 1])
def test_an_image_depends_on_its_label_and_seed(float32, eta):
    """An image follows from its label and its seed, and is the same in every batch."""
    options = {"steps": 3, "eta": eta}  # with T = 13, 1 - ᾱ_{t-1} - σ_t² is rounded below 0
    model = random_unet(timesteps=13, image_channels=3)
    batch = ddpm.sample(model, [3, 1, 3], seeds=[7, 8, 9], **options)
    assert batch.shape == (3, 3, 8, 8) and batch.abs().max() <= 1
    for image, label, seed in zip(batch, [3, 1, 3], [7, 8, 9]):
        close(ddpm.sample(model, [label], seeds=[seed], **options)[0], image, 1e-3)
    assert (batch[0] - batch[2]).abs().max() > 0.1  # the same label, another seed
    assert (batch[0] - ddpm.sample(model, [1], seeds=[7], **options)[0]).abs().max() > 0.01


@pytest.mark.parametrize("label, share", [(10, 1), (-1, 1), (3, 0)])
def test_what_was_not_learned(label, share):
    """A label outside of the classes is a ValueError, and so are "no class" and guidance without it."""
    with pytest.raises(ValueError, match="labels|guidance=1"):
        ddpm.sample(Fake(wild, tiny(class_dropout=share)), [label])


@pytest.mark.parametrize("eta", [0, 1])
def test_result_is_an_ordinary_tensor(eta):
    """An image can be given to autograd, carries no history, and its drawing leaves the random state alone."""
    model = random_unet().requires_grad_(True)
    state = torch.get_rng_state()
    x_0 = ddpm.sample(model, [3], steps=T, eta=eta)
    assert torch.equal(torch.get_rng_state(), state)
    assert not (x_0.requires_grad or x_0.is_inference())


def test_default_dtype(float32):
    """Where float64 is the default, sampling gives the same float32 images."""
    model = random_unet()
    expected = ddpm.sample(model, [3, 8], steps=5, eta=0.5)
    torch.set_default_dtype(torch.float64)
    try:
        x_0 = ddpm.sample(model, [3, 8], steps=5, eta=0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert x_0.dtype == torch.float32
    close(x_0, expected, 1e-3)


# === 8. Inversion: your handwriting ===================================================================================


def test_inversion_closed_form():
    """If the network finds the same noise everywhere, x_T is Eq. 4 for that noise; nothing is clipped."""
    x_0 = 2 * normal(2, 1, 4, 4, seed=1)
    eps = torch.stack([normal(1, 4, 4, seed=seed) for seed in (0, 1)])  # what the first step adds
    model, bar = Fake(lambda x_t, t, y: eps), BARS[T - 1]
    x_T = ddpm.invert(model, x_0, [3, 4], steps=5)
    close(x_T, bar**0.5 * x_0 + (1 - bar) ** 0.5 * eps)
    asked = [(t.tolist(), y.tolist()) for _, t, y in model.asked]
    assert asked == [([t, t], [3, 4]) for t in (7, 13, 19, 36)]


def test_inversion_of_a_network(float32):
    """With a smooth network, sampling from the inverted noise comes back to the image, best if it is asked half way."""
    model = random_unet(timesteps=200, schedule="cosine")
    for parameter in model.parameters():
        parameter.data *= 0.3
    x_0 = normal(2, 1, 8, 8).float().clamp(-0.9, 0.9)
    forward, errors = model.forward, []
    for early in 0, 1:  # 1: at t itself
        model.forward = lambda x_t, t, y: forward(x_t, t - early, y)
        x_T = ddpm.invert(model, x_0, [3, 4], steps=100)
        model.forward = forward
        back = ddpm.sample(model, [3, 4], steps=100, guidance=1, x_T=x_T)
        errors.append((back - x_0).abs().mean())
    assert errors[0] < errors[1] < 0.1


# === 9. Training well =================================================================================================


def test_learning_rate():
    """The rate rises evenly for a twentieth of the steps, at most 500, and falls along half a cosine to 0."""
    start = [ddpm.learning_rate(step, 105) for step in range(5)]
    assert start == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    curve = np.array([ddpm.learning_rate(step, 20000) for step in range(20001)])
    points = {0: 1 / 500, 249: 0.5, 499: 1, 500: 1, 7000: 0.75, 10250: 0.5, 13500: 0.25, 20000: 0}
    close(curve[list(points)], list(points.values()))
    assert curve.max() == 1 and np.abs(np.diff(curve)).max() < 0.003  # no jumps
    assert ddpm.learning_rate(0, 1) == 1


def three_times_p(matrix):
    """The matrix divided by its length, with p applied three times to each singular value."""
    u, s, v = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
@pytest.mark.parametrize("bfloat16, tolerance", [(False, 1e-5), (True, 0.05)])
def test_orthogonalized(monkeypatch, shape, bfloat16, tolerance):
    """Each singular value becomes p(p(p(s))), and the singular vectors stay; a zero matrix stays zero."""
    monkeypatch.setattr(ddpm, "has_bfloat16", lambda device: bfloat16)
    matrix = normal(*shape).float()
    result = ddpm.orthogonalized(matrix)
    assert result.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    close(result.double(), three_times_p(matrix.numpy()), tolerance)
    assert not ddpm.orthogonalized(0 * matrix).any()


def test_two_steps_of_muon(float32):
    """Weights shrink by lr, and go 10 lr along 0.05 g + 0.95 m, made orthogonal; m is an average of gradients g."""
    first, second = normal(4, 2, 3, 3, seed=1), normal(4, 2, 3, 3, seed=2)
    weight = torch.nn.Parameter(normal(4, 2, 3, 3))
    expected, m = weight.detach().clone(), 0
    optimizer = ddpm.Muon([weight], {"lr": 0.01})
    for g in first, second:
        weight.grad = g.clone()
        optimizer.step()
        m = 0.95 * m + 0.05 * g
        direction = three_times_p((0.05 * g + 0.95 * m).flatten(1).numpy())
        expected = 0.99 * expected - 0.1 * torch.from_numpy(direction).view(4, 2, 3, 3)
        close(weight.data, expected, 1e-5)


def test_each_weight_has_one_optimizer():
    """Muon has the convolutions within the network; AdamW has all other weights."""
    model = ddpm.UNet(tiny())
    muon, adamw = ddpm.make_optimizers(model)
    assert isinstance(muon, ddpm.Muon) and isinstance(adamw, torch.optim.AdamW)
    owners = {id(w): [] for w in model.parameters()}
    for optimizer in muon, adamw:
        (group,) = optimizer.param_groups
        for weight in group["params"]:
            owners[id(weight)].append(optimizer)
    for name, weight in model.named_parameters():
        inner = weight.ndim == 4 and name not in ("conv_in.weight", "conv_out.weight")
        assert owners[id(weight)] == [muon if inner else adamw]


def test_average_of_the_weights():
    """The average holds each earlier weight with the share (1-d) times all later d, where d is at most the decay."""
    weights, model = normal(16, 3), torch.nn.Linear(3, 1, bias=False)
    ema = copy.deepcopy(model)
    ema.weight.data = weights[:1].clone()
    for step, weight in enumerate(weights[1:]):
        model.weight.data = weight[None]
        ddpm.update_ema(ema, model, step, decay=0.5)
    d = [min(0.5, (1 + n) / (10 + n)) for n in range(15)]  # 0.1, 0.18, ..., 0.5 from step 8 on
    shares = [math.prod(d), *((1 - d[n]) * math.prod(d[n + 1 :]) for n in range(15))]
    close(ema.weight.data[0], np.array(shares) @ weights.numpy())


@pytest.mark.parametrize("bfloat16", [False, True])
def test_precision(monkeypatch, bfloat16):
    """Layers compute in bfloat16 where the device has it; prediction, loss and gradients are float32."""
    monkeypatch.setattr(ddpm, "has_bfloat16", lambda device: bfloat16)
    model, seen = ddpm.UNet(tiny()), []
    for module in model.conv_out, model:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model.conv_out.bias.register_hook(lambda grad: seen.append(grad.dtype))
    x_0, y = normal(8, 1, 8, 8).float(), torch.arange(8)
    loss = ddpm.train_step(model, copy.deepcopy(model), [], x_0, y, 55, 105)
    layers = torch.bfloat16 if bfloat16 else torch.float32
    assert [*seen, loss.dtype] == [layers, torch.float32, torch.float32, torch.float32]
    ddpm.sample(model, y[:1], steps=1)
    assert seen[3:] == [layers, torch.float32]


def test_train_step():
    """A step draws t, noises the images, sets the rate of the curve and moves all weights, and the average follows."""
    torch.manual_seed(0)
    model, seen = random_unet(class_dropout=0, lr=0.004, ema_decay=0.5).requires_grad_(True), []
    model.register_forward_pre_hook(lambda model, inputs: seen.extend(inputs))
    ema, before = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = ddpm.make_optimizers(model)
    x_0, y = normal(2000, 1, 4, 4).float(), torch.arange(2000) % 10
    assert not ddpm.train_step(model, ema, optimizers, x_0, y, 55, 105).requires_grad
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([0.002, 0.002])  # half of the peak, in the middle of the cosine
    for old, new, average in zip(before.parameters(), model.parameters(), ema.parameters()):
        close(average.data, (old.data + new.data) / 2, 1e-6)
        assert new.grad is None and (new - old).abs().max() > 1e-4
    # AdamW's first step is as long as its rate:
    assert (model.conv_in.weight - before.conv_in.weight).abs().max().item() == pytest.approx(0.002, 0.1)
    x_t, t, classes = seen
    assert torch.equal(classes, y)
    assert noise_in(x_t, x_0, t, ALPHAS_CUMPROD).var().item() == pytest.approx(1, 0.05)
    # The distribution function of Beta(2, 3) at s is 6 s² - 8 s³ + 3 s⁴: here, at 0.2, 0.5 and 0.8.
    shares = [(t < t_max).double().mean() for t_max in (10, 25, 40)]
    close(shares, [0.1808, 0.6875, 0.9728], 0.05)


# ======================================================================================================================
# PART THREE: the program
# ======================================================================================================================

HERE = Path(ddpm.__file__).parent
FLAGS = "--device cpu --epochs 4 --batch-size 16 --timesteps 20 --channels 4 8 --sample-every 2".split()


def run(*argv):
    """The exit status of a command."""
    return ddpm.main([str(word) for word in argv])


def train(data, *flags):
    return run("train", "--data-dir", data, *FLAGS, *flags)


def error_of(capsys, *argv):
    """Runs a command that must fail as promised, with status 1 and one line on stderr. Returns the line."""
    capsys.readouterr()
    assert run(*argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpm.py: error: ")
    return line


def write_idx(path, array):
    """The format of MNIST: two zeros, 8 for bytes, the number of dimensions, each dimension, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root, seed=0):
    """A tiny MNIST of 70 training images and 5 test images, the first ones of them."""
    random = np.random.default_rng(seed)
    images, labels = random.integers(0, 256, (70, 28, 28), np.uint8), np.arange(70, dtype=np.uint8) % 10
    for part, n in ("train", 70), ("t10k", 5):
        write_idx(root / f"MNIST/raw/{part}-images-idx3-ubyte", images[:n])
        write_idx(root / f"MNIST/raw/{part}-labels-idx1-ubyte", labels[:n])
    return images, labels


def write_weights(path, **changes):
    model = random_unet(**{"image_size": 28} | changes)
    ddpm.save({"config": asdict(model.config), "weights": model.state_dict()}, Path(path))
    return model


def no_network(*args, **kwargs):
    raise urllib.error.URLError("Connection refused")


@pytest.fixture(autouse=True)
def offline_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:  # under nohup, for example, one is ignored
        signal.signal(number, signal.default_int_handler)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a tiny MNIST."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder)
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a finished run: 4 epochs of 4 steps."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(data, "--out", folder) == 0
    return folder


# === say ==============================================================================================================


class OnlyWrites:
    """A stdout as some graphical programs have it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


@pytest.mark.parametrize("make", [lambda: None, io.BytesIO, OnlyWrites])  # BytesIO refuses text
def test_whatever_is_wrong_with_stdout_the_work_goes_on(monkeypatch, make):
    """say never fails, and says what it can, whatever stands in place of stdout."""
    stream = make()
    monkeypatch.setattr(sys, "stdout", stream)
    ddpm.say("done")
    assert getattr(stream, "text", "done\n") == "done\n"


def test_what_a_code_page_lacks_is_escaped():
    """A line with a character that the stream cannot show is shown with that character escaped."""
    stream = io.TextIOWrapper(io.BytesIO(), "cp1252")
    ddpm.say("written: ᾱ.png", stream)
    assert stream.buffer.getvalue() == b"written: \\u1fb1.png\n"


def test_sample_needs_no_stdout(finished):
    """sample writes its picture and succeeds when the disk behind stdout is full; a wrong label is still an error."""
    program = f"'{sys.executable}' '{ddpm.__file__}' sample --device cpu --steps 2 --label 3"
    command = f"{program} --checkpoint '{finished}/weights.pt' >/dev/full"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b"" and Path("samples.png").exists()
    assert subprocess.call(f"{command} --label x", shell=True) == 1


# === 10. Data, checkpoints, images ====================================================================================


@pytest.mark.parametrize("train, count", [(True, 70), (False, 5)])
def test_mnist_is_read_from_its_files(tmp_path, train, count):
    """Each image and its label come as the IDX files have them."""
    images, labels = write_mnist(tmp_path)
    x, y = ddpm.load_dataset("mnist", tmp_path, train)
    assert x.dtype == torch.uint8 and y.dtype == torch.int64
    assert np.array_equal(x, images[:count, None]) and np.array_equal(y, labels[:count])


def test_cifar10_is_read_from_its_files(tmp_path, monkeypatch):
    """Colours, rows, columns and labels come as the batches of CIFAR-10 have them."""
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [["batch", "checksum"]])
    monkeypatch.setattr(source, "_check_integrity", lambda self: True)
    monkeypatch.setattr(source, "_load_meta", lambda self: None)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    contents = {"data": pixels.reshape(2, -1), "labels": [3, 9]}
    path = tmp_path / "cifar-10-batches-py/batch"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(contents))
    x, y = ddpm.load_dataset("cifar10", tmp_path)
    assert np.array_equal(x, pixels) and y.tolist() == [3, 9]


DAMAGES = {
    "cut short": lambda images, labels: images.write_bytes(images.read_bytes()[:-1000]),
    "a label too few": lambda images, labels: write_idx(labels, np.zeros(69, np.uint8)),
    "label out of range": lambda images, labels: write_idx(labels, np.full(70, 10, np.uint8)),
    "missing": lambda images, labels: images.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data_begins_no_run(tmp_path, capsys, damage):
    """One line names the folder and the files, also without a network, and no folder of a run is left."""
    write_mnist(tmp_path)
    files = [tmp_path / f"MNIST/raw/train-{name}-ubyte" for name in ("images-idx3", "labels-idx1")]
    DAMAGES[damage](*files)
    line = error_of(capsys, "train", "--data-dir", tmp_path, *FLAGS)
    assert str(tmp_path / "MNIST/raw") in line and "train-images-idx3-ubyte" in line
    assert not Path("runs").exists()


def test_a_download_does_not_hang(monkeypatch):
    """Downloads have a time limit, and afterwards the process has the limit that it had before."""
    limits = []

    def slow(*args, **kwargs):
        limits.append(socket.getdefaulttimeout())
        raise TimeoutError

    monkeypatch.setattr(urllib.request, "urlopen", slow)
    with pytest.raises(ddpm.UserError, match="t10k-labels-idx1-ubyte"):
        ddpm.load_dataset("mnist", "nowhere")
    assert set(limits) == {30} and socket.getdefaulttimeout() is None


class Dots:
    """A data set from outside, as torchvision's are: of class "b" is what is white."""

    def __init__(self, root, train, download):
        self.targets = [0, 1] * 8
        self.data = np.zeros((16, 8, 8), np.uint8)
        self.data[1::2] = 255


def test_a_data_set_from_outside(monkeypatch):
    """A data set added to DATASETS can be trained on, and its model knows its size and its classes."""
    monkeypatch.setitem(ddpm.DATASETS, "dots", ddpm.Dataset("Dots", "", "", tiny(classes=("a", "b"))))
    monkeypatch.setattr(torchvision.datasets, "Dots", Dots, raising=False)
    assert run("train", "--dataset", "dots", *FLAGS) == 0
    model = ddpm.load_model("runs/dots/weights.pt")
    assert model.config.dataset == "dots" and ddpm.generate_number(model, "b").size == (8, 8)


def fails(*args, **kwargs):
    raise OSError("disk full")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_save_leaves_the_old_file(monkeypatch, broken):
    """When the disk is full or the work fails, the old file is whole and nothing else is left."""
    path = Path("checkpoint.pt")
    ddpm.save({"step": 1}, path)
    with pytest.raises(ZeroDivisionError), ddpm.replacing(path) as file:
        assert os.listdir() == ["checkpoint.pt"]
        file.write(b"half")
        1 / 0
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    with ddpm.replacing(path) as file:
        file.write(path.read_bytes())
    assert sizes == [path.stat().st_size]  # all of it was on the disk before it replaced the old file
    monkeypatch.setattr(os, broken, fails)
    with pytest.raises(ddpm.UserError, match="checkpoint.pt.*disk full"):
        ddpm.save({"step": 2}, path)
    assert ddpm.load(path)["step"] == 1 and os.listdir() == ["checkpoint.pt"]


@pytest.mark.parametrize("path", ["folder", "/proc/image.png"])
def test_what_cannot_be_written_is_known_before_the_work(path):
    """replacing fails before its body runs, where a folder is in the way or the file cannot be made."""
    Path("folder").mkdir()
    with pytest.raises(ddpm.UserError), ddpm.replacing(Path(path)):
        pytest.fail("the work was done")


class Harmful:
    """Whoever unpickles it makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def changed(path, **changes):
    torch.save(torch.load(path) | changes, path)


BAD_FILES = {
    "missing": lambda path: path.unlink(),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Harmful())),
    "pickle inside": lambda path: changed(path, weights=Harmful()),
    "list": lambda path: torch.save([1, 2], path),
    "other format": lambda path: changed(path, format=1),
    "other prediction": lambda path: write_weights(path, prediction="eps"),
    "other network": lambda path: changed(path, config=asdict(ddpm.Config())),
    "classifier": lambda path: shutil.copy(ddpm.ASSETS / "classifier_mnist.pt", path),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage", BAD_FILES)
def test_a_file_that_holds_no_weights_is_refused(capsys, damage):
    """It is explained in one line, and no program inside of it runs."""
    path = Path("weights.pt")
    write_weights(path)
    BAD_FILES[damage](path)
    error = error_of(capsys, "sample", "--checkpoint", path)
    assert ("another version" in error) == (damage in ("other format", "other prediction"))
    assert not Path("harm").exists() and not Path("samples.png").exists()


def test_weights_and_not_the_checkpoint_are_for_sampling(finished, capsys):
    """weights.pt has the averaged weights in half precision; sampling refuses checkpoint.pt and names weights.pt."""
    saved, state = ddpm.load(finished / "weights.pt"), torch.get_rng_state()
    model = ddpm.load_model(finished / "weights.pt")
    ddpm.generate_number(model, 5)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers stay
    trained, ema, *_ = ddpm.load(finished / "checkpoint.pt")["parts"]
    last = "conv_out.weight"  # it was zero
    assert ema[last].any() and not torch.equal(ema[last], trained[last])
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32 and saved["weights"][name].dtype == torch.float16
        assert torch.equal(weight, ema[name].half().float()) and not weight.requires_grad
    assert "weights.pt" in error_of(capsys, "sample", "--checkpoint", finished / "checkpoint.pt")


def test_the_newest_weights_are_the_default():
    """Weights in runs/ come before those in assets/, and the newest of them first."""
    assert ddpm.find_weights() == HERE / "assets/mnist.pt"
    for name, age in ("a", 30), ("b", 10), ("c", 20):
        write_weights(f"runs/{name}/weights.pt")
        os.utime(f"runs/{name}/weights.pt", (1e9 - age, 1e9 - age))
    assert ddpm.find_weights() == Path("runs/b/weights.pt")


def test_bytes_and_back():
    """All 256 values of a pixel come back from [-1, 1], and what lies outside of it is cut."""
    pixels = torch.arange(256, dtype=torch.uint8)
    x = ddpm.from_bytes(pixels)
    assert (x.min(), x.max()) == (-1, 1) and torch.equal(ddpm.to_bytes(x), pixels)
    assert torch.equal(ddpm.to_bytes(1.01 * x[[0, 255]]), pixels[[0, 255]])


@pytest.mark.parametrize("channels, columns", [(1, None), (3, 5)])
def test_grid_of_images(channels, columns):
    """Images stand in rows, two black pixels apart, and the cells that are missing are black."""
    x = torch.rand(5, channels, 3, 4) * 2 - 1
    grid = np.atleast_3d(ddpm.to_image(x, columns))
    for i, image in enumerate(ddpm.to_bytes(x).permute(0, 2, 3, 1)):
        row, column = divmod(i, columns or 3)
        assert np.array_equal(grid[5 * row :, 6 * column :][:3, :4], image)
    assert grid.sum() == ddpm.to_bytes(x).sum()


def test_one_digit_for_a_notebook():
    """generate_number gives the same image for a number and its name, and ValueError for what is no class."""
    model = random_unet(image_size=28)
    image = ddpm.generate_number(model, 5, seed=1)
    assert image.size == (28, 28) and image.mode == "L"
    assert image == ddpm.generate_number(model, "5", seed=1) != ddpm.generate_number(model, 5)
    assert image != ddpm.generate_number(model, 5, seed=1, steps=3)
    for label in 10, 1.0:
        with pytest.raises(ValueError):
            ddpm.generate_number(model, label)


def drawing(stroke="black", paper="white", light=0.0, grain=0.0):
    """A four as somebody may draw it on paper, with light from the right and a grainy camera."""
    image = Image.new("RGB", (300, 400), paper)
    draw = ImageDraw.Draw(image)
    draw.line([(110, 110), (100, 190), (105, 210), (210, 205)], fill=stroke, width=18, joint="curve")
    draw.line([(190, 140), (182, 210), (172, 300)], fill=stroke, width=18)
    shade = 1 - light + light * np.linspace(0, 1, 300)[None, :, None]
    noise = np.random.default_rng(0).normal(0, grain, (400, 300, 3))
    return Image.fromarray((np.asarray(image) * shade + noise).clip(0, 255).astype(np.uint8))


def deep(dtype, scale):
    """The same drawing with more bits a pixel."""
    return Image.fromarray((np.asarray(drawing().convert("L")) * float(scale)).astype(dtype))


def transparent(ink):
    image = Image.new("RGBA", (300, 400), ink)
    image.putalpha(ImageOps.invert(drawing().convert("L")))
    return image


def turned_by_the_camera():
    exif = Image.Exif()
    exif[0x0112] = 6  # how the camera was held
    drawing().transpose(Image.Transpose.ROTATE_90).save("digit.jpg", exif=exif)


PICTURES = {
    "chalk on a board": lambda: drawing("white", "black").save("digit.png"),
    "photograph": lambda: drawing((30, 40, 110), (232, 224, 200), 0.45, 9).save("digit.jpg"),
    "black, transparent": lambda: transparent("black").save("digit.png"),
    "white, transparent": lambda: transparent("white").save("digit.png"),
    "16 bits": lambda: deep(np.uint16, 257).save("digit.png"),
    "floats": lambda: deep(np.float32, 1 / 255).save("digit.tif"),
    "turned": turned_by_the_camera,
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_a_digit_are_read_alike(kind):
    """However a four is drawn, photographed and stored, it comes out white on black, boxed and centred."""
    PICTURES[kind]()
    (path,) = Path().iterdir()
    x_0 = ddpm.read_digit(path)
    drawing().save(path.with_suffix(".png"))
    assert (x_0 - ddpm.read_digit(path.with_suffix(".png"))).abs().mean() < 0.06
    assert x_0.shape == (1, 1, 28, 28) and x_0.min() == -1 and x_0.max() == 1
    ink = (x_0[0, 0] + 1) / 2
    rows, columns = (ink > 0.2).nonzero(as_tuple=True)
    assert rows.max() - rows.min() + 1 in (19, 20)
    middle = [np.average(index, weights=ink) for index in np.indices((28, 28))]
    assert middle == pytest.approx([14, 14], abs=1.1)


def test_a_thin_stroke():
    """A stroke more than 40 times as long as wide keeps its length, and one pixel of width."""
    image = Image.new("L", (200, 200))
    image.paste(255, (99, 20, 102, 180))
    image.save("one.png")
    ink = ddpm.read_digit("one.png")[0, 0] > 0
    assert ink[4:24, 14].all()


def test_a_digit_of_mnist_is_left_as_it_is():
    """An image that is as MNIST has it comes back nearly unchanged."""
    for digit in 0, 4, 9:
        path = HERE / f"assets/hand_{digit}.png"
        pixels = ddpm.from_bytes(torch.tensor(np.asarray(Image.open(path))))
        assert (ddpm.read_digit(path) - pixels).abs().mean() < 0.05


# === 11. A run ========================================================================================================


def same(a, b):
    """Whether two values from a checkpoint are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def log(folder):
    return (folder / "log.csv").read_text().splitlines()


def before_step(monkeypatch, function):
    """From now on, function(step) is called before each step of training."""
    train_step = ddpm.train_step

    def watched(model, ema, optimizers, x_0, y, step, total_steps):
        function(step)
        return train_step(model, ema, optimizers, x_0, y, step, total_steps)

    monkeypatch.setattr(ddpm, "train_step", watched)


def test_files_of_a_run(finished):
    """A run leaves its checkpoint, its weights, a line of log for each epoch, and the samples asked for.

    Samples are unguided, from the averaged weights.
    """
    files = "checkpoint.pt log.csv samples_002.png samples_004.png weights.pt".split()
    assert sorted(os.listdir(finished)) == files
    assert [line[:4] for line in log(finished)] == ["epoc", "1,4,", "2,8,", "3,12", "4,16"]
    model = ddpm.load_model(finished / "weights.pt")
    expected = ddpm.to_image(ddpm.sample(model, list(range(10)) * 5, guidance=1), columns=10)
    assert expected.size == (298, 148)  # 5 rows, gaps of 2
    assert np.abs(pixels(finished / "samples_004.png") - np.asarray(expected)).max() <= 1


def test_a_run_saves_within_epochs(data, monkeypatch, capsys):
    """A run saves and reports after so many steps, and at the end of each epoch."""
    saved = []
    monkeypatch.setattr(ddpm, "REPORT_EVERY", 5)
    monkeypatch.setattr(ddpm, "SAVE_EVERY", 3)
    monkeypatch.setattr(ddpm.Run, "save", lambda run, *args: saved.append(run.step))
    monkeypatch.setattr(ddpm.UNet, "compile", lambda model: saved.append("compiled"))
    assert train(data, "--epochs", 2, "--compile") == 0
    assert saved == ["compiled", 0, 3, 4, 7, 8]
    assert re.findall(r"step (\d+) ", capsys.readouterr().out) == ["3", "4", "5", "7", "8"]


STOPS = {
    "in an epoch": (signal.SIGINT, 5),
    "between epochs": (signal.SIGTERM, 7),
    "at once": (signal.SIGHUP, 0),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_is_the_uninterrupted_one(data, finished, monkeypatch, stop):
    """A signal saves and ends with 130; --resume then ends with the same checkpoint and log, bit for bit."""
    number, last = STOPS[stop]
    handlers = [signal.getsignal(name) for name, _ in STOPS.values()]
    with monkeypatch.context() as patch:
        before_step(patch, lambda step: step == last and signal.raise_signal(number))
        assert train(data) == 130
    assert [signal.getsignal(name) for name, _ in STOPS.values()] == handlers
    folder = Path("runs/mnist")
    assert ddpm.load(folder / "checkpoint.pt")["step"] == last + 1
    torch.manual_seed(999)  # what happens in between does not matter
    assert train(data, "--resume") == 0
    assert log(folder) == log(finished)
    for name in "checkpoint.pt", "weights.pt":
        assert same(ddpm.load(folder / name), ddpm.load(finished / name))


def test_ignored_signals_stay_ignored(data, monkeypatch):
    """A run that was started under nohup is not stopped by the signal that nohup ignores."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_step(monkeypatch, lambda step: signal.raise_signal(signal.SIGHUP))
        assert train(data, "--epochs", 1) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_every_image_once_an_epoch(data, monkeypatch):
    """Each epoch, and each seed, has every image once, in its own order, with its own noise; the loss is a mean."""
    seen, noise = [], set()

    def rows(images, labels):
        return torch.cat([images.flatten(1).long(), labels[:, None]], dim=1)

    def watched(model, ema, optimizers, x_0, y, step, total_steps):
        assert total_steps in (5, 10)
        seen.append(rows(ddpm.to_bytes(x_0), y))
        noise.add(torch.randn(()).item())
        return torch.tensor(float(step))

    monkeypatch.setattr(ddpm, "train_step", watched)
    assert train(data, "--epochs", 2, "--batch-size", 14) == 0
    assert train(data, "--epochs", 1, "--batch-size", 14, "--seed", 1, "--out", "other") == 0
    everything = rows(*ddpm.load_dataset("mnist", data)).unique(dim=0)
    first, second, third = torch.cat(seen).chunk(3)
    assert len(everything) == 70
    for epoch, other in (first, second), (second, third), (third, first):
        assert torch.equal(epoch.unique(dim=0), everything) and not torch.equal(epoch, other)
    assert len(noise) == 15
    assert [float(line.split(",")[2]) for line in log(Path("runs/mnist"))[1:]] == [2, 7]


def test_another_seed_in_a_thread(data, finished):
    """A run needs no main thread, though signals do; another seed gives it other weights."""
    thread = threading.Thread(target=train, args=(data, "--seed", 1))
    thread.start()
    thread.join()
    a, b = [ddpm.load(path / "weights.pt")["weights"] for path in (finished, Path("runs/mnist"))]
    assert (a["class_emb.weight"] - b["class_emb.weight"]).abs().mean() > 0.5


def test_a_run_goes_on(data, finished, tmp_path):
    """--resume of a finished run makes its missing files again, and with more --epochs it goes on."""
    folder = Path(shutil.copytree(finished, "again"))
    for name in "weights.pt", "log.csv", "samples_004.png":
        (folder / name).unlink()
    assert run("train", "--data-dir", data, "--device", "cpu", "--out", folder, "--resume") == 0
    assert log(folder) == log(finished)
    assert same(ddpm.load(folder / "weights.pt"), ddpm.load(finished / "weights.pt"))
    assert Image.open(folder / "samples_004.png") == Image.open(finished / "samples_004.png")
    assert train(data, "--out", folder, "--resume", "--epochs", 5) == 0
    assert log(folder)[:5] == log(finished) and len(log(folder)) == 6
    assert (folder / "samples_005.png").exists()  # though only each second epoch is asked for


OTHERWISE = {
    "other options": (["--resume", "--lr", "0.5"], "options"),
    "other data": (["--resume", "--data-dir", "others"], "other images"),
    "other labels": (["--resume", "--data-dir", "relabelled"], "other images or labels"),
    "fewer epochs": (["--resume", "--epochs", "3"], "more than --epochs"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_a_run_is_not_lost(data, finished, capsys, case):
    """A folder with a run keeps its checkpoint when the command does not fit it."""
    flags, word = OTHERWISE[case]
    folder = Path(shutil.copytree(finished, "run"))
    write_mnist(Path("others"), seed=1)
    labels = Path(shutil.copytree(data, "relabelled"), "MNIST/raw/train-labels-idx1-ubyte")
    labels.write_bytes(labels.read_bytes().replace(b"\3", b"\4"))
    assert word in error_of(capsys, "train", "--data-dir", data, "--out", folder, *FLAGS, *flags)
    assert (folder / "checkpoint.pt").read_bytes() == (finished / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("name", ["weights.pt", "log.csv", "samples_002.png"])
def test_a_file_that_another_program_holds(data, monkeypatch, capsys, name):
    """Training outlives a file that cannot be replaced; the end says so, and --resume writes the file."""
    replace = os.replace

    def held(source, target):
        if Path(target).name == name:
            raise PermissionError("held by another program")
        replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    assert train(data, "--epochs", 2) == 1
    *warnings, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("ddpm.py: warning: ") and name in line for line in warnings)
    assert len(warnings) == (name != "samples_002.png")  # which is due at the end only
    assert error.startswith("ddpm.py: error: ") and "--resume" in error
    assert ddpm.load(Path("runs/mnist/checkpoint.pt"))["step"] == 8
    monkeypatch.setattr(os, "replace", replace)
    assert train(data, "--epochs", 2, "--resume") == 0 and Path("runs/mnist", name).exists()


def test_a_run_that_diverges(data, finished, monkeypatch, capsys):
    """It ends with an error, and the last good checkpoint and weights stay."""
    folder, loss = Path(shutil.copytree(finished, "run")), ddpm.ddpm_loss
    monkeypatch.setattr(ddpm, "ddpm_loss", lambda *args: loss(*args) * math.nan)
    flags = ["--data-dir", data, *FLAGS, "--out", folder, "--resume", "--epochs", 5]
    assert "--lr" in error_of(capsys, "train", *flags)
    for name, part in ("weights.pt", "weights"), ("checkpoint.pt", "parts"):
        assert same(ddpm.load(folder / name)[part], ddpm.load(finished / name)[part])


def test_shares_of_a_batch(data):
    """Two processes get the two halves of a batch, and each draws its own noise."""
    run = ddpm.Run(tiny(batch_size=16), *ddpm.load_dataset("mnist", data), torch.device("cpu"))
    whole, halves, noise = run.batch(0, 1)[0], [], []
    for rank in 0, 1:
        halves.append(run.batch(rank, 2)[0])
        noise.append(torch.randn(()))
    assert len(halves[0]) == 8 and noise[0] != noise[1]
    assert torch.equal(torch.cat(halves).unique(dim=0), whole.unique(dim=0))


WITHOUT_RANDOMNESS = """
import os, signal, sys, torch, ddpm
train_step, rank, processes = ddpm.train_step, os.environ["RANK"], os.environ["WORLD_SIZE"]

def loss(model, x_0, y, t):
    return (model(x_0, y, y) - 1).square().mean()

def stopping(model, ema, optimizers, x_0, y, step, total_steps):
    assert len(x_0) == len(y) == 16 / int(processes)
    if step == 5 and rank != "0" or processes == "1" and step == 5:
        signal.raise_signal(signal.SIGTERM)
    return train_step(model, ema, optimizers, x_0, y, step, total_steps)

ddpm.has_bfloat16 = lambda device: False
ddpm.ddpm_loss, ddpm.train_step = loss, stopping
os._exit(ddpm.main(sys.argv[1:]))  # as the program itself does
"""


def test_two_processes_are_one(data):
    """They make the steps that one process makes, with its weights; a signal to the second one stops both."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank, count, folder in ("0", "2", "two"), ("1", "2", "two"), ("0", "1", "one"):
        env |= {"RANK": rank, "WORLD_SIZE": count}
        command = f"train --data-dir {data} --out {folder}".split()
        command = [sys.executable, "-c", WITHOUT_RANDOMNESS, *command, *FLAGS]
        processes.append(subprocess.Popen(command, env=env))
    assert [process.wait(300) for process in processes] == [130, 0, 130]
    one, two = (ddpm.load(Path(name, "checkpoint.pt")) for name in ("one", "two"))
    assert one["step"] == two["step"] == 6
    weights = [torch.cat([w.flatten() for w in saved["parts"][0].values()]) for saved in (one, two)]
    assert (weights[0] - weights[1]).norm() < 0.02
    for a, b in zip(*(saved["parts"][2]["state"].values() for saved in (one, two)), strict=True):
        assert torch.allclose(a["momentum"], b["momentum"], rtol=0.1, atol=1e-4)
    assert one["parts"][0]["conv_out.weight"].abs().max() > 0.005  # at first, it was zero


@pytest.mark.parametrize("processes, word", [("2", "torchrun"), ("3", "3 processes cannot share a batch of 16")])
def test_processes_that_cannot_be(data, monkeypatch, capsys, processes, word):
    """WORLD_SIZE without torchrun, and a batch that cannot be shared evenly, are explained in one line."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert word in error_of(capsys, "train", "--data-dir", data, *FLAGS)


# === 12. Evaluation ===================================================================================================


def float64(array):
    return torch.tensor(np.asarray(array), dtype=torch.float64)


def covariance(seed):
    root = np.random.default_rng(seed).normal(size=(5, 5))
    return float64(root @ root.T)


def root_of(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T


def features_with(mean, cov):
    """2n features (n,) with this mean and covariance: along each column of a root of cov, one to either side."""
    root = root_of(cov) * math.sqrt(len(cov) - 0.5)  # the covariance of N features divides by N - 1
    return float64(mean) + torch.cat([root, -root])


def test_frechet_distance():
    """FID equals its closed form for diagonal covariances, and that with symmetric roots for any others."""
    a, b = float64([9, 4]).diag(), float64([1, 16]).diag()
    distance = ddpm.frechet_distance(features_with([1, 2], a), features_with([4, -2], b))
    close(distance, 5**2 + 2**2 + 2**2)  # of the means, 5 apart; of the roots 3 and 1, 2 and 4
    a, b = covariance(1), covariance(2)
    trace = torch.trace(a + b - 2 * root_of(root_of(a) @ b @ root_of(a)))
    distance = ddpm.frechet_distance(features_with(0, a), features_with(0, b))
    close(distance, trace)
    a[:, 2] = a[2, :] = 0  # a feature that never varies
    features = features_with(0, a)
    assert abs(ddpm.frechet_distance(features, features)) < 1e-6


BY_HAND = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25) - math.log(0.75)) / 2
SCORES = [
    (np.eye(4), 4),
    (np.full((3, 4), 0.25), 1),
    ([[0.5, 0.5], [1, 0]], math.exp(BY_HAND)),
]


@pytest.mark.parametrize("probabilities, expected", SCORES)
def test_inception_score(probabilities, expected):
    """It is the number of classes that are found, if the classifier is sure, and less if it is not."""
    assert ddpm.inception_score(float64(probabilities)).item() == pytest.approx(expected)


def test_shipped_files():
    """Both files of weights fit the network. The classifier needs no data to read digits of MNIST and drawn ones."""
    for name in "fashion-mnist", "mnist":
        model = ddpm.load_model(ddpm.ASSETS / f"{name}.pt")
        assert model.config.dataset == name
    assert model.config == ddpm.Config()  # of the last: plain train made it
    classifier = ddpm.load_classifier("mnist", "nowhere", "cpu")
    real = [ddpm.read_digit(HERE / f"assets/hand_{digit}.png") for digit in (0, 4, 9)]
    images = torch.cat([*real, ddpm.sample(model, list(range(10)))])
    probabilities, _ = ddpm.judge(classifier, ddpm.to_bytes(images))
    right = probabilities.argmax(dim=1) == torch.tensor([0, 4, 9, *range(10)])
    assert right[:3].all() and right.sum() >= 12


@pytest.fixture
def fashion(monkeypatch):
    """Two kinds of clothes, bright in the upper or in the lower half, weights for them, and empty assets."""
    for part, count in ("train", 300), ("t10k", 200):
        random = np.random.default_rng(count)
        labels = np.arange(count, dtype=np.uint8) % 2
        images = random.integers(0, 100, (count, 28, 28), np.uint8)
        images[::2, :14] += 150
        images[1::2, 14:] += 150
        write_idx(Path(f"data/FashionMNIST/raw/{part}-images-idx3-ubyte"), images)
        write_idx(Path(f"data/FashionMNIST/raw/{part}-labels-idx1-ubyte"), labels)
    monkeypatch.setattr(ddpm, "CLASSIFIER_STEPS", 20)
    monkeypatch.setattr(ddpm, "ASSETS", Path("assets"))
    write_weights("weights.pt", dataset="fashion-mnist", classes=ddpm.CLOTHES)


def test_a_missing_classifier_is_trained_and_kept(fashion, capsys):
    """It can read, and the next time it needs no data."""
    classifier = ddpm.load_classifier("fashion-mnist", "data", "cpu")
    images, labels = ddpm.load_dataset("fashion-mnist", "data")
    probabilities, _ = ddpm.judge(classifier, images)
    assert (probabilities.argmax(dim=1) == labels).double().mean() > 0.95
    again = ddpm.load_classifier("fashion-mnist", "nowhere", "cpu")
    assert same(again.state_dict(), classifier.state_dict())
    Path("assets/classifier_fashion-mnist.pt").write_bytes(b"damaged")
    with pytest.raises(ddpm.UserError, match="classifier_fashion-mnist.pt"):
        ddpm.load_classifier("fashion-mnist", "data", "cpu")


ROW = r"(\d+) (samples|test images) +label accuracy ([\d.]+)%  FID ([\d.]+)  Inception Score ([\d.]+)\n"


@pytest.mark.parametrize("good", [True, False])
def test_evaluate(fashion, monkeypatch, capsys, good):
    """Real images as samples get good numbers, one class alone bad ones; the options given are those used."""
    test_images, test_labels = ddpm.load_dataset("fashion-mnist", "data", train=False)
    asked, numbers, given, judged, judge = [], [], {}, [], ddpm.judge

    def draw(model, labels, seeds, **options):
        asked.extend(labels)
        numbers.extend(seeds)
        given.update(options)
        drawn = [test_images[test_labels == label * good][seed % 7] for label, seed in zip(labels, seeds)]
        return ddpm.from_bytes(torch.stack(drawn))

    monkeypatch.setattr(ddpm, "sample", draw)
    monkeypatch.setattr(ddpm, "judge", lambda by, x: judged.append(len(x)) or judge(by, x))
    monkeypatch.setattr(ddpm, "BATCH", 32)
    flags = "--count 100 --device cpu --seed 2 --steps 9 --eta 0.5 --guidance 3 --guidance-interval 0 1"
    assert run("evaluate", "--checkpoint", "weights.pt", *flags.split()) == 0
    assert judged == [300, 100, 100]  # the features of all training images, and what is compared with them
    assert numbers == list(range(2_000_000, 2_000_100))
    assert given == {"steps": 9, "eta": 0.5, "guidance": 3, "guidance_interval": [0, 1]}
    rows = re.findall(ROW, capsys.readouterr().out)
    assert [row[:2] for row in rows] == [("100", "samples"), ("100", "test images")]
    for (_, _, accuracy, fid, score), well in zip(rows, (good, True)):
        assert well == (float(accuracy) > 95) == (float(fid) < 1) == (float(score) > 1.05)
    assert asked != [0, 1] * 50 and 30 < sum(asked) < 70  # in the files, the two alternate


# === 13. The command line =============================================================================================


CLASS_NAMES = """
0,1,2,3 | 3 | 3
bag,Ankle boot | Ankle boot | 1
bag,Ankle boot | 0 | 0
A,a,b | A | 0
A,a,b | a | 1
A,a,b | b | 2
A,a,b | 2 | 2
1,2,3 | 1 | 0
1,2,3 | 0 |
BAG,bag | Bag |
a,b | -1 |
a,b | 2 |
"""


@pytest.mark.parametrize("line", CLASS_NAMES.strip().splitlines())
def test_class_names(line):
    """A class has its name or, where no class is called a number, its index; nothing is guessed."""
    classes, name, number = re.split(r" \| ?", line)
    if number:
        assert ddpm.class_number(name, classes.split(",")) == int(number)
    else:
        with pytest.raises(ddpm.UserError, match="choose from"):
            ddpm.class_number(name, classes.split(","))


@pytest.fixture
def weights():
    return write_weights("weights.pt")


def sample(*argv):
    return run("sample", "--checkpoint", "weights.pt", "--device", "cpu", "--steps", 2, *argv)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_one_picture_or_a_folder(weights, capsys, monkeypatch):
    """A label fills a square; several are a row, in one hand; a folder gets the same images, in any batch."""
    assert sample("--label", 3) == 0
    assert "weights: weights.pt (mnist)" in capsys.readouterr().out
    assert Image.open("samples.png").size == (118, 118)  # 4 images of 28 pixels, 3 gaps of 2
    assert sample("--label", 3, "--seed", 1, "--out", "other.png") == 0
    assert np.abs(pixels("samples.png") - pixels("other.png")).max() > 50
    number = ["--label", 2, 0, 2, 6, "--count", 3, "--seed", 5, "--out"]
    Path("v1.0").mkdir()  # an existing folder, though its name looks like that of a file
    assert sample(*number, "new/row.png") == 0
    monkeypatch.setattr(ddpm, "BATCH", 5)
    assert sample(*number, "v1.0") == 0
    grid = pixels("new/row.png")
    files = {path.name: pixels(path) for path in Path("v1.0").iterdir()}
    assert sorted(files) == sorted(f"{label}_{i:05d}.png" for i, label in enumerate([2, 0, 2, 6] * 3))
    for name, image in files.items():
        row, column = divmod(int(name[2:7]), 4)
        assert np.abs(grid[30 * row :, 30 * column :][:28, :28] - image).max() <= 1
    twos = [files[f"2_{i:05d}.png"] for i in (0, 2, 4)]
    assert np.abs(twos[0] - twos[1]).max() <= 1 < np.abs(twos[0] - twos[2]).max()


@pytest.mark.parametrize("flags, labels, seeds, columns", [
    (["--label", 1, 2], [1, 2], [0, 0], 2),
    (["--label", 3, "--count", 5, "--seed", 2], [3] * 5, range(2_000_000, 2_000_005), 3),
])  # fmt: skip
def test_film(weights, flags, labels, seeds, columns):
    """A film has a frame for each step, x_t above and x̂_0 below; the picture shows the last x_t."""
    assert sample(*flags, "--gif", "films/film.gif", "--steps", 7) == 0
    pairs = list(ddpm.sample_steps(weights, labels, steps=7, seeds=seeds))
    assert np.abs(pixels("samples.png") - ddpm.to_image(pairs[-1][0], columns)).max() <= 1
    with Image.open("films/film.gif") as film:
        assert film.n_frames == 7
        for i, pair in enumerate(pairs):
            film.seek(i)
            frame = np.asarray(film.convert("L"))[1::3, 1::3].astype(int)
            expected = np.vstack([ddpm.to_image(x, columns) for x in pair])
            assert np.abs(frame - expected).max() <= 8  # a GIF has few shades of grey


def test_handwriting(weights, capsys):
    """All digits begin with the noise of the image; a digit that looks like another one is warned of."""
    four = HERE / "assets/hand_4.png"
    assert sample("--like", four, "--like-label", 4, "--label", 7, "--guidance", 0) == 0
    assert capsys.readouterr().err == ""
    x_T = ddpm.invert(weights, ddpm.read_digit(four), [4])
    expected = np.asarray(ddpm.to_image(ddpm.sample(weights, [7], steps=2, guidance=0, x_T=x_T)))
    assert np.abs(pixels("samples.png") - expected).max() <= 1
    assert sample("--like", four, "--like-label", 9) == 0
    assert "looks like 4" in capsys.readouterr().err and Image.open("samples.png").size == (298, 28)


def test_shapes(capsys):
    """There is a row for each block, with its shape, and their parameters add up to the total."""
    assert run("shapes", "--dataset", "cifar10", "--channels", 4, 8) == 0
    *blocks, total = capsys.readouterr().out.splitlines()[1:]
    numbers = [int(line.split()[-1].replace(",", "")) for line in [*blocks, total]]
    assert numbers[-1] == sum(numbers[:-1])
    assert any(row.startswith("middle") and "(8, 16, 16)" in row for row in blocks)


MUST_FAIL = """
2 paint
2 sample --label
2 sample --count 0
2 sample --steps 1.5
2 sample --eta nan
2 sample --guidance -1
2 sample --guidance-interval 0.2
2 sample --guidance-interval 0 2
2 sample --seed -1
2 sample --device abacus
2 train --dataset dogs
2 train --epochs 0
2 train --timesteps 1
2 train --lr nan
2 train --schedule quadratic
2 train --channels 4 x
2 train --class-dropout 2
2 train --resume yes
2 evaluate --count 1
2 evaluate --label 3
2 shapes --channels 0
1 sample --label 10 # choose from 0, 1
1 sample --label=-1 # choose from
1 sample --label three # choose from
1 sample --checkpoint folder # cannot read folder
1 sample --checkpoint missing.pt # cannot read missing.pt
1 sample --checkpoint undropped.pt # --guidance 1
1 sample --out file # cannot write into file
1 sample --out file/a.png # cannot write file/a.png
1 sample --out folder # has images
1 sample --out row.jpg # .png
1 sample --gif film.png # .gif
1 sample --gif file/film.gif # cannot write file/film.gif
1 sample --gif film.gif --count 300 # 256 images
1 sample --like hand.png # --like-label
1 sample --like-label 4 # --like needs
1 sample --like hand.png --like-label 4 --eta 1 # --eta 0
1 sample --like hand.png --like-label 12 # choose from
1 sample --like hand.png --like-label 4 --count 2 # no --count
1 sample --like file --like-label 4 # as an image
1 sample --like blank.png --like-label 4 # shows no digit
1 sample --like hand.png --like-label 4 --checkpoint colour.pt # grey
1 train --resume # cannot read runs/mnist/checkpoint.pt
1 train --resume --out folder # cannot read folder/checkpoint.pt
1 train --out folder # not empty
1 train --out file # cannot write file/checkpoint.pt
1 train --out file/run # cannot write file/run/checkpoint.pt
1 train --data-dir file # file/MNIST/raw
1 evaluate --data-dir file # file/MNIST/raw
1 evaluate --checkpoint unknown.pt # no data set called dogs
1 sample --out """
MUST_FAIL += 300 * "a" + ".png"


@pytest.mark.parametrize("command", ddpm.COMMANDS)
def test_help(command):
    """Each command explains itself."""
    with pytest.raises(SystemExit, match="^0$"):
        run(command, "--help")


def everything():
    return {path: path.is_file() and hash(path.read_bytes()) for path in Path().rglob("*")}


@pytest.mark.parametrize("line", MUST_FAIL.strip().splitlines())
def test_commands_that_must_fail(data, capsys, line):
    """A wrong flag ends with the usage and status 2, all else with one line and 1; nothing is written."""
    line, _, words = line.partition(" # ")
    status, command, *flags = line.split()
    write_weights("weights.pt")
    write_weights("colour.pt", image_channels=3)
    write_weights("unknown.pt", dataset="dogs")
    write_weights("undropped.pt", class_dropout=0)
    drawing().save("hand.png")
    Image.new("L", (40, 40), 200).save("blank.png")
    Path("folder").mkdir()
    for name in "file", "folder/1.png":
        Path(name).touch()
    before = everything()
    if command == "train":
        flags = ["--data-dir", data, *FLAGS, *flags]
    if command in ("sample", "evaluate"):
        flags = ["--checkpoint", "weights.pt", "--device", "cpu", *flags]
    if status == "2":
        with pytest.raises(SystemExit) as stop:
            run(command, *flags)
        assert stop.value.code == 2 and "usage: ddpm.py" in capsys.readouterr().err
    else:
        assert words in error_of(capsys, command, *flags)
    assert everything() == before


ERRORS = [
    (MemoryError(), "smaller"),
    (RuntimeError("CUDA out of memory"), "smaller"),
    (RuntimeError("Connection closed by peer"), "another process is gone"),
    (RuntimeError("No working C++ compiler found in"), "leave it out"),
]


@pytest.mark.parametrize("error, word", ERRORS)
def test_what_is_known_of_errors(monkeypatch, capsys, error, word):
    """Known errors are explained in one line; Ctrl-C ends with 130; unknown errors keep their traceback."""

    def raises(*args):
        raise error

    monkeypatch.setattr(ddpm, "load_model", raises)
    assert word in error_of(capsys, "sample")
    error = KeyboardInterrupt()
    assert run("sample") == 130
    error = MemoryError()
    with pytest.raises(MemoryError), ddpm.explained("not this"):
        raises()
    error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError):
        run("sample")


LOOK = "torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(2)"


def test_import_has_no_side_effects():
    """import ddpm prints nothing, changes nothing in its process, writes nothing and needs no torchvision.

    It finds its assets through a symbolic link, too.
    """
    Path("ddpm.py").symlink_to(ddpm.__file__)
    code = f"import signal, sys, torch; before = [{LOOK}]; import ddpm; assert [{LOOK}] == before"
    code += "; assert 'torchvision' not in sys.modules; assert ddpm.find_weights().exists()"
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"") and os.listdir() == ["ddpm.py"]


# === README.md ========================================================================================================

README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^ *```(\w*)\n(.*?)^ *```", README)
COMMANDS = re.findall(r"(?:python|torchrun).* ddpm\.py (.*)", "\n".join(block for _, block in BLOCKS))


def test_lines_of_readme():
    """README.md says where each section begins, and it has commands."""
    assert len(COMMANDS) > 15
    for number, line in enumerate(SOURCE.splitlines(), 1):
        if re.match(r"# \d+\. ", line):
            assert f"| {number} | {line[2:]} |" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_readme(command):
    """The program knows each command in README.md's blocks of code."""
    assert ddpm.make_parser().parse_args(shlex.split(command, comments=True)).function


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_code_of_readme(monkeypatch, code):
    """The Python code that README.md shows runs."""
    monkeypatch.setattr(ddpm, "DATASETS", dict(ddpm.DATASETS))
    monkeypatch.setattr(ddpm, "load_model", random_unet)
    exec(textwrap.dedent(code), {})
