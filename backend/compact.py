"""The default segmenter: a small promptable network that runs on a plain CPU, from weights that come with the package.

An EfficientNet-Lite0 trunk and a feature pyramid give features at a quarter and at half of the image's resolution
(``embed``, once a tile). A small U-Net reads them together with the prompts, twice: the second time it also sees its
first answer, and how much each pixel's colour and features look like that answer (``segment``, each click). One small
head a class gives class and border probabilities (``dense``).

Frames: *pixels* of the image (corner-based), *cells* of the coarse features (4 pixels wide) and *half-cells* of the
fine ones (2 pixels wide).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import cv2
import numpy as np

# Threads that wait by spinning take the cores from what they wait for, wherever other programs run beside the backend:
# a click then takes 20 times as long. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import BadImage, BadWeights
from .segmenter import DenseMaps, Embedding, Masks, Prompts

FloatArray = NDArray[np.float64]

SHIPPED_WEIGHTS = Path(__file__).resolve().parent.parent / "model_weights" / "compact.safetensors"
ARCHITECTURE = "geoprelabel-compact-1"
HEADS_KIND = "geoprelabel-heads-1"

_SCORING_FACTORS, _WITHOUT_EVIDENCE = 17, 15
"""Factors that a scoring has: one for each of `backend.instances.FEATURES`, and a constant. Older ones know nothing of
the evidence, which comes last of the features."""

MEAN_RGB = (0.485, 0.456, 0.406)
STD_RGB = (0.229, 0.224, 0.225)

CELL_PX = 4
"""Pixels that a coarse feature cell is wide."""

COARSE, FINE = 48, 8
"""Channels of the coarse and fine features."""

STRIDE_PX = 32
"""The trunk's coarsest stride: images are padded to a multiple of it."""

_BLOCK_CELLS, _OVERLAP_CELLS = 256, 32
"""Larger images are embedded block by block, so that memory stays bounded; the overlap hides the seams."""

_FINEST_GSD_M, _FINEST_GSD_ELSE_M = {"field": 2.0}, 0.25
"""Coarser imagery is enlarged towards so many metres a pixel, where that class is in play and otherwise, ..."""

_MOST_SCALE, _MOST_WORKING_PX = 3.0, 1536
"""... so many times at most, and as long as the enlarged image is no larger than a square of so many pixels a side: the
time to embed it grows with its area."""

_HEAD_MARGIN_CELLS = 4
"""How far beyond a block the dense heads look, and a little more."""

_WIDE_BYTES = 64 * 2**20
"""More than this is not held at once of a block's wide channels."""

_CLICK_RADIUS_PX = 2.5
_MOST_LIFT = 3.0
"""A click is answered with at least this radius, in pixels; where the network sees nothing, its logits are lifted by
no more than this."""

_LEAST_FILL, _LIFTED_FILL, _MOST_LIFTED_PX = 0.45, 0.7, 100**2
"""A box alone that the network would fill to less than the first share is filled to the second, unless it is larger
than so many pixels: whoever draws a small box means something of its size. Chosen on held-out places."""

_NEAR_CELLS, _WINDOW_CELLS = 64, 96
"""Side of the square around clicks, and around what does not fit in there or is a box, that the decoder looks at,
unless the prompts ask for more."""

_GRABCUT_WEIGHT, _GRABCUT_ROUNDS, _LEAST_AGREEMENT = 0.5, 1, 0.6
"""How much the colours of the image at hand correct the answer, and the IoU with it that they need to be heard."""

_SURE_LOGIT = 3.5
"""Beyond this, about 0.97, GrabCut takes the answer as given."""

_STAGES = (  # expansion, kernel, stride, channels in, channels out, blocks: EfficientNet-Lite0
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
_TAPS = (0, 1, 2, 4, 6)
"""Stages whose outputs feed the pyramid, at strides 2, 4, 8, 16 and 32."""


class _Conv(nn.Conv2d):
    """Convolution with the trunk's padding: a stride of two pads one more at the right and bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.padded(x))

    def padded(self, x: Tensor) -> Tensor:
        """The input with what a stride of two needs at its edges."""
        return F.pad(x, self.edges * 2) if self.stride[0] == 2 else x

    @property
    def edges(self) -> tuple[int, int]:
        """What a stride of two needs at the left and top, and at the right and bottom, in cells."""
        total = self.kernel_size[0] - 2
        return total // 2, total - total // 2


def _relu6_padded(x: Tensor, edges: tuple[int, int]) -> Tensor:
    """``F.pad(F.relu6(x))`` in one walk over what is the largest of the trunk's arrays, without gradients."""
    before, after = edges
    count, channels, height, width = x.shape
    padded = torch.empty(
        (count, channels, before + height + after, before + width + after),
        dtype=x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    for axis, length in ((2, height), (3, width)):
        padded.narrow(axis, 0, before).zero_()
        padded.narrow(axis, before + length, after).zero_()
    torch.clamp(x, 0, 6, out=padded[:, :, before : before + height, before : before + width])
    return padded


class _InvertedResidual(nn.Module):
    """Expand, filter each channel, project. Batch normalisation is folded into the weights."""

    def __init__(self, expansion: int, kernel: int, stride: int, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _Conv(inputs, wide, 1) if expansion > 1 else None
        self.depthwise = _Conv(wide, wide, kernel, stride, groups=wide)
        self.project = _Conv(wide, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        if self.expand is not None and not torch.is_grad_enabled():
            wide_bytes = 4 * self.expand.out_channels * len(x) * x.shape[-2] * x.shape[-1]
            if wide_bytes > _WIDE_BYTES:
                return self._in_thirds(x, self.expand)
        # In place: a third of the trunk's time goes into making and filling new arrays otherwise.
        if self.expand is None:
            y = self.depthwise(x)
        elif self.depthwise.stride[0] == 2 and not torch.is_grad_enabled():
            y = nn.Conv2d.forward(self.depthwise, _relu6_padded(self.expand(x), self.depthwise.edges))
        else:
            y = self.depthwise(F.relu6(self.expand(x), inplace=True))
        y = cast(Tensor, self.project(F.relu6(y, inplace=True)))
        return y.add_(x) if self.adds else y

    def _in_thirds(self, x: Tensor, expand: _Conv) -> Tensor:
        """The same, a third of the wide channels at a time: for large images they are most of the memory."""
        depthwise, project = self.depthwise, self.project
        each = expand.out_channels // 3
        assert expand.bias is not None
        assert depthwise.bias is not None
        assert project.bias is not None
        total = project.bias.view(1, -1, 1, 1)
        for start in range(0, expand.out_channels, each):
            part = slice(start, start + each)
            y = F.relu6(F.conv2d(x, expand.weight[part], expand.bias[part]), inplace=True)
            y = F.conv2d(
                depthwise.padded(y), depthwise.weight[part], depthwise.bias[part], depthwise.stride,
                depthwise.padding, groups=each,
            )  # fmt: skip
            total = total + F.conv2d(F.relu6(y, inplace=True), project.weight[:, part])
        return total + x if self.adds else total


class Trunk(nn.Module):
    """EfficientNet-Lite0 without its classifier: features at strides 2, 4, 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, 32, 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    _InvertedResidual(
                        expansion, kernel, stride if i == 0 else 1, inputs if i == 0 else outputs, outputs
                    )
                    for i in range(blocks)
                )
            )
            for expansion, kernel, stride, inputs, outputs, blocks in _STAGES
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu6(self.stem(x), inplace=True)
        taps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in _TAPS:
                taps.append(x)
        return taps


def _separable(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.Conv2d(channels, channels, 1),
        nn.ReLU(inplace=True),
    )


class Pyramid(nn.Module):
    """Merges the trunk's features into coarse (stride 4) and fine (stride 2) ones."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, COARSE, 1) for c in (24, 40, 112, 320))
        self.smooth = nn.ModuleList(_separable(COARSE) for _ in range(4))
        self.last = nn.Conv2d(COARSE, COARSE, 1)
        self.fine = nn.Conv2d(16, FINE, 1)

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.merged(taps[1:]), self.fine(taps[0])

    def merged(self, taps: Sequence[Tensor]) -> Tensor:
        """Coarse features, from those of the trunk at strides 4, 8, 16 and 32."""
        x: Tensor | None = None
        for lateral, smooth, tap in zip(reversed(self.lateral), reversed(self.smooth), reversed(taps), strict=True):
            y = lateral(tap)
            if x is not None:
                y = y + F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = y + smooth(y)
        coarse: Tensor = self.last(x)
        return coarse


class DenseHead(nn.Module):
    """Class and border logits of one label, (N, 2, 2h, 2w), from features (N, C, h, w) and (N, c, 2h, 2w)."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(COARSE, 24, 3, padding=1)
        self.fine = nn.Conv2d(24 + FINE, 16, 3, padding=1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        x = F.relu(self.coarse(coarse))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        logits: Tensor = self.out(F.relu(self.fine(torch.cat([x, fine], 1))))
        return logits


class ProjectHead(nn.Module):
    """What a project trains for a label: a pyramid of its own on the shared trunk, and a dense head on that.

    Takes what `CompactSegmenter.inner` gives, in that order. Trunk and fine features stay as they are, and so do
    clicks; a tile's embedding costs little more.
    """

    def __init__(self, pyramid: Pyramid | None = None, dense: DenseHead | None = None) -> None:
        """Copies of those given, or untrained ones."""
        super().__init__()
        self.pyramid = copy.deepcopy(pyramid or Pyramid()).requires_grad_(True)
        del self.pyramid.fine
        self.dense = copy.deepcopy(dense or DenseHead()).requires_grad_(True)

    def forward(self, fine: Tensor, *taps: Tensor) -> Tensor:
        logits: Tensor = self.dense(self.pyramid.merged(taps), fine)
        return logits


AnyHead = DenseHead | ProjectHead

_CLICK_SPREAD_CELLS = (1.0, 4.0, 16.0)
_PROMPT_MAPS = 2 * len(_CLICK_SPREAD_CELLS) + 2
_EVIDENCE_MAPS = 4
_BINS = 8


def click_maps(points: Tensor, box_xyxy: Tensor, height: int, width: int) -> Tensor:
    """Prompts as maps, (N, 8, height, width).

    Clicks are (N, P, 3): x and y in cells, and +1 on the object, -1 off it, 0 for no click. Boxes are (N, 4) in cells,
    NaN for none.
    """
    device = points.device
    xs = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    ys = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    maps = []
    for sign in (1, -1):
        if points.shape[1]:
            squared = (ys[:, None] - points[..., 1, None, None]) ** 2 + (xs - points[..., 0, None, None]) ** 2
            squared = squared.masked_fill((points[..., 2] != sign)[..., None, None], math.inf).amin(1)
        else:
            squared = points.new_full((len(points), height, width), math.inf)
        maps += [torch.exp(-squared / (2 * spread**2)) for spread in _CLICK_SPREAD_CELLS]
    left, top, right, bottom = box_xyxy.nan_to_num(0.0).T[..., None]
    # Soft steps, so that a box edge inside a cell is seen at its place.
    inside_x = ((xs - left + 0.5).clamp(0, 1) * (right - xs + 0.5).clamp(0, 1))[:, None, :]
    inside_y = ((ys - top + 0.5).clamp(0, 1) * (bottom - ys + 0.5).clamp(0, 1))[:, :, None]
    given = (~box_xyxy.isnan().any(1)).float()[:, None, None]
    maps += [inside_x * inside_y * given, given.expand(-1, height, width)]
    return torch.stack(maps, 1)


def _colour_bins(rgb: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Colour bin of every pixel, (N, h·w), relative to the window's own mean and spread."""
    level = ((rgb - mean) / std * (_BINS / 5) + _BINS / 2).clamp(0, _BINS - 1).long().flatten(2)
    return (level[:, 0] * _BINS + level[:, 1]) * _BINS + level[:, 2]


def _weighted_share(bins: Tensor, weights: Tensor) -> Tensor:
    """Smoothed colour histogram, (N, bins), summing to one."""
    counts = weights.new_zeros(len(bins), _BINS**3).scatter_add_(1, bins, weights.flatten(1))
    cube = counts.view(-1, 1, _BINS, _BINS, _BINS)
    kernel = counts.new_tensor([0.25, 0.5, 0.25])
    for shape in ((3, 1, 1), (1, 3, 1), (1, 1, 3)):
        cube = F.conv3d(cube, kernel.view(1, 1, *shape), padding=tuple(s // 2 for s in shape))
    smooth = cube.flatten(1)
    return smooth / smooth.sum(1, keepdim=True).clamp(min=1e-6)


def colour_evidence(rgb_coarse: Tensor, rgb_fine: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """How much more a pixel's colour is that of the prior object than of its surroundings, -1…1, at both resolutions.

    The prior is (N, 1, h, w), 0…1. Surroundings count the more the nearer they are.
    """
    height, width = prior.shape[-2:]
    weight = prior[:, 0]
    total = weight.sum((1, 2)).clamp(min=1e-3)
    xs = torch.arange(width, device=prior.device, dtype=torch.float32)
    ys = torch.arange(height, device=prior.device, dtype=torch.float32)[:, None]
    x_mean, y_mean = (weight * xs).sum((1, 2)) / total, (weight * ys).sum((1, 2)) / total
    reach = 2 * total.sqrt() + 6
    squared = (xs - x_mean[:, None, None]) ** 2 + (ys - y_mean[:, None, None]) ** 2
    near = 0.1 + torch.exp(-squared / (2 * reach[:, None, None] ** 2))

    mean = rgb_coarse.mean((2, 3), keepdim=True)
    std = rgb_coarse.std((2, 3), keepdim=True).mean(1, keepdim=True).clamp(min=2.0)
    bins = _colour_bins(rgb_coarse, mean, std)
    inside = _weighted_share(bins, weight)
    outside = _weighted_share(bins, (1 - weight) * near)
    ratio = (torch.log((inside + 1e-3) / (outside + 1e-3)) / 4).clamp(-1, 1)

    def map_of(bins: Tensor, height: int, width: int) -> Tensor:
        # As a map of channels_last, or all that it is joined with would be copied into the other order.
        return ratio.gather(1, bins).view(len(bins), height, width, 1).permute(0, 3, 1, 2)

    return map_of(bins, height, width), map_of(_colour_bins(rgb_fine, mean, std), *rgb_fine.shape[-2:])


def _sample(maps: Tensor, points: Tensor) -> Tensor:
    """Values (N, C, P) of maps (N, C, h, w) at points (N, P, ≥2) given in cells."""
    grid = points[:, None, :, :2] * 2 / points.new_tensor([maps.shape[-1], maps.shape[-2]]) - 1
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]


class PromptDecoder(nn.Module):
    """Logits of the prompted object at a cell (N, 1, h, w) and half a cell (N, 1, 2h, 2w)."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Conv2d(COARSE, 16, 1)
        self.enter_image = nn.Conv2d(COARSE, 32, 3, padding=1)
        self.enter_prompts = nn.Conv2d(_PROMPT_MAPS + _EVIDENCE_MAPS + 1, 32, 3, padding=1)
        widths = (32, 48, 64, 96)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, padding=1) for a, b in pairwise(widths))
        self.middle = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1) for b in widths[1:])
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.merge = nn.ModuleList(nn.Conv2d(a, a, 3, padding=1) for a in widths[:-1])
        self.out = nn.Conv2d(32, 1, 1)
        self.to_fine = nn.Conv2d(32, 16, 1)
        self.fine_enter = nn.Conv2d(16 + FINE + 3 + 1, 16, 3, padding=1)
        self.fine_middle = nn.Conv2d(16, 16, 3, padding=1)
        self.fine_out = nn.Conv2d(16, 1, 1)

    def context(self, coarse: Tensor) -> Tensor:
        """What does not depend on the prompts, (N, 48, h, w), so that many prompts can share it."""
        return torch.cat([self.enter_image(coarse), F.normalize(self.key(coarse), dim=1)], 1)

    def forward(
        self,
        context: Tensor,
        fine: Tensor,
        rgb_coarse: Tensor,
        rgb_fine: Tensor,
        points: Tensor,
        box_xyxy: Tensor,
        previous: Tensor | None = None,
        prompted: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Context, fine features, colours (0…255) and prompts in.

        ``previous`` is the logits (N, 1, h, w) of the first pass, and None in it. ``prompted`` saves time in the second
        pass: what ``prompt_maps`` says of the same prompts.
        """
        entered, keys = context[:, :32], context[:, 32:]
        prompts, at_clicks = self.prompt_maps(context, points, box_xyxy) if prompted is None else prompted
        if previous is None:
            # What the prompts alone say: the surroundings of the clicks, or the inside of the box.
            prior = torch.maximum(prompts[:, :1], prompts[:, 6:7])
            shown = torch.zeros_like(prior)
        else:
            shown = prior = torch.sigmoid(previous.detach())
        colour_coarse, colour_fine = colour_evidence(
            rgb_coarse, rgb_fine if previous is not None else rgb_fine[:, :, :0, :0], prior
        )

        inside = (keys * prior).sum((2, 3), keepdim=True) / prior.sum((2, 3), keepdim=True).clamp(min=1e-3)
        outside = (keys * (1 - prior)).mean((2, 3), keepdim=True)
        like_inside = (keys * (F.normalize(inside, dim=1) - F.normalize(outside, dim=1))).sum(1, keepdim=True)

        maps = torch.cat([prompts, at_clicks, like_inside, colour_coarse, shown], 1)
        x = F.relu(entered + self.enter_prompts(maps), inplace=True)
        skips = []
        for down, middle in zip(self.down, self.middle, strict=True):
            skips.append(x)
            x = F.relu(down(x), inplace=True)
            x = F.relu(middle(x), inplace=True).add(x)
        for up, merge, skip in zip(reversed(self.up), reversed(self.merge), reversed(skips), strict=True):
            x = skip + F.interpolate(up(x), size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.relu(merge(x), inplace=True).add(x)
        logits = self.out(x)
        if previous is None:
            return logits, logits

        size = fine.shape[-2:]
        y = F.interpolate(self.to_fine(x), size=size, mode="bilinear", align_corners=False)
        y = F.relu(self.fine_enter(torch.cat([y, fine, (rgb_fine - 128) / 64, colour_fine], 1)), inplace=True)
        y = F.relu(self.fine_middle(y), inplace=True).add(y)
        return logits, F.interpolate(logits, size=size, mode="bilinear", align_corners=False) + self.fine_out(y)

    def prompt_maps(self, context: Tensor, points: Tensor, box_xyxy: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts as maps (N, 8, h, w), and each cell's likeness to those under the clicks on and off (N, 2, h, w)."""
        keys = context[:, 32:]
        prompts = click_maps(points, box_xyxy, *context.shape[-2:])
        look = []
        for sign in (1, -1):
            if points.shape[1]:
                at_clicks = F.normalize(_sample(keys, points), dim=1)
                alike = torch.einsum("nchw,ncp->nphw", keys, at_clicks)
                alike = alike.masked_fill((points[..., 2] != sign)[..., None, None], -1).amax(1, keepdim=True)
            else:
                alike = torch.full_like(prompts[:, :1], -1)
            look.append(alike)
        return prompts, torch.cat(look, 1)


class CompactNet(nn.Module):
    """Trunk, pyramid, prompt decoder, and one dense head a label."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self.scoring: Mapping[str, tuple[float, ...]] = {}
        self.evidence: Mapping[str, NDArray[np.float32]] = {}
        self.trunk = Trunk()
        self.pyramid = Pyramid()
        self.decoder = PromptDecoder()
        self.heads = nn.ModuleList(DenseHead() for _ in self.labels)

    def features(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse (N, 48, H/4, W/4) and fine (N, 8, H/2, W/2) features of images (N, 3, H, W), 0…255, H and W in 32s."""
        coarse, fine = self.pyramid(self.taps(rgb))
        return coarse, fine

    def taps(self, rgb: Tensor) -> list[Tensor]:
        """The trunk's features of such images, at strides 2, 4, 8, 16 and 32."""
        mean = rgb.new_tensor(MEAN_RGB).view(1, 3, 1, 1) * 255
        std = rgb.new_tensor(STD_RGB).view(1, 3, 1, 1) * 255
        taps: list[Tensor] = self.trunk((rgb - mean) / std)
        return taps


def save_weights(net: CompactNet, path: Path, notes: Mapping[str, str]) -> None:
    """Write a network as half-precision safetensors with its sha256 beside it, each file whole or not at all."""
    metadata = {**notes, "architecture": ARCHITECTURE, "labels": json.dumps(list(net.labels))}
    metadata["normalisation"] = json.dumps({"mean_rgb": MEAN_RGB, "std_rgb": STD_RGB})
    tensors = {name: value.detach().to(torch.float16).contiguous() for name, value in net.state_dict().items()}
    data = _serialised(tensors, metadata)
    sha256 = hashlib.sha256(data).hexdigest()
    for target, content in ((path, data), (_sha256_path(path), f"{sha256}  {path.name}\n".encode())):
        _write_whole(target, content)


def save_heads(
    heads: Mapping[str, nn.Module],
    base_version: str,
    path: Path,
    notes: Mapping[str, str] | None = None,
    *,
    scoring: Mapping[str, Sequence[float]] | None = None,
    kind: str = HEADS_KIND,
) -> None:
    """Write a project's heads by label, whole or not at all. They fit the weights of ``base_version`` only.

    ``scoring`` holds the factors of `backend.instances` for labels that have their own.
    """
    metadata = {**(notes or {}), "kind": kind, "base": base_version, "labels": json.dumps(list(heads))}
    metadata["scoring"] = json.dumps({label: list(factors) for label, factors in (scoring or {}).items()})
    tensors = {
        f"{i}.{name}": value.detach().cpu().contiguous()
        for i, head in enumerate(heads.values())
        for name, value in head.state_dict().items()
    }
    _write_whole(path, _serialised(tensors, metadata))


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file of the same bytes each time: the library shuffles the metadata, and versions are hashes."""
    data = safetensors.torch.save(tensors, metadata)
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), separators=(",", ":"), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _sha256_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _read(path: Path, what: str) -> tuple[bytes, dict[str, str], dict[str, Tensor]]:
    """Bytes, metadata and float32 tensors of a safetensors file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadWeights(f"{path} cannot be read, and {what} should be there: {error.strerror}") from error
    try:
        tensors = safetensors.torch.load(content)
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise BadWeights(f"{path} is damaged or no safetensors file, and {what} should be there: {error}") from error
    return content, metadata, {name: value.float() for name, value in tensors.items()}


def _labels(metadata: Mapping[str, str], path: Path) -> tuple[str, ...]:
    try:
        labels = json.loads(metadata["labels"])
    except (KeyError, ValueError) as error:
        raise BadWeights(f"{path} does not say which labels it knows") from error
    return tuple(str(label) for label in labels)


def read_scoring(metadata: Mapping[str, str], path: Path) -> dict[str, tuple[float, ...]]:
    """By label, the factors that tell how likely a candidate is an object; see `backend.instances`."""
    try:
        listed = json.loads(metadata.get("scoring", "{}"))
        scoring = {str(label): tuple(float(factor) for factor in factors) for label, factors in listed.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise BadWeights(f"{path} has a scoring that cannot be read") from error
    for label, factors in scoring.items():
        if len(factors) == _WITHOUT_EVIDENCE:
            factors = scoring[label] = (*factors[:-1], 0.0, 0.0, factors[-1])
        if len(factors) != _SCORING_FACTORS or not all(map(math.isfinite, factors)):
            raise BadWeights(
                f"{path} has {len(factors)} factors to score {label} by; {_SCORING_FACTORS} finite ones count"
            )
    return scoring


def _read_evidence(metadata: Mapping[str, str], path: Path) -> dict[str, NDArray[np.float32]]:
    """By label, what coarse and fine features weigh inside an object and round it, (2, 56)."""
    try:
        listed = json.loads(metadata.get("evidence", "{}"))
        evidence = {str(label): np.array(weights, np.float32) for label, weights in listed.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise BadWeights(f"{path} has evidence that cannot be read") from error
    for label, weights in evidence.items():
        if weights.shape != (2, COARSE + FINE) or not np.isfinite(weights).all():
            raise BadWeights(
                f"{path} has evidence for {label} of {weights.shape}; (2, {COARSE + FINE}) finite ones count"
            )
    return evidence


def _load_base(path: Path) -> tuple[CompactNet, str]:
    content, metadata, tensors = _read(path, "the compact segmenter's weights")
    if metadata.get("architecture") != ARCHITECTURE:
        raise BadWeights(
            f"{path} holds {metadata.get('architecture', 'weights of an unnamed kind')}, not {ARCHITECTURE}"
        )
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        recorded = _sha256_path(path).read_text().split()[0]
    except (OSError, IndexError) as error:
        raise BadWeights(
            f"{_sha256_path(path)} is missing or empty; it should hold the sha256 of {path.name}"
        ) from error
    if sha256 != recorded:
        raise BadWeights(
            f"{path} is damaged: its sha256 is {sha256[:8]}…, and {_sha256_path(path).name} says {recorded[:8]}…"
        )
    net = CompactNet(_labels(metadata, path))
    net.scoring = read_scoring(metadata, path)
    net.evidence = _read_evidence(metadata, path)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise BadWeights(f"{path} does not fit the network: {str(error).splitlines()[0]}") from error
    return net, f"compact-{sha256[:8]}"


def _load_heads(path: Path, base_version: str) -> tuple[dict[str, AnyHead], dict[str, tuple[float, ...]], str]:
    content, metadata, tensors = _read(path, "a project's heads")
    if metadata.get("kind") != HEADS_KIND:
        raise BadWeights(f"{path} holds {metadata.get('kind', 'weights of an unnamed kind')}, not {HEADS_KIND}")
    if metadata.get("base") != base_version:
        raise BadWeights(
            f"{path} was trained on {metadata.get('base')}, and {base_version} is loaded; train the project again"
        )
    heads: dict[str, AnyHead] = {}
    for i, label in enumerate(_labels(metadata, path)):
        own = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{i}.")}
        head: AnyHead = ProjectHead() if any(name.startswith("pyramid.") for name in own) else DenseHead()
        try:
            head.load_state_dict(own)
        except RuntimeError as error:
            raise BadWeights(f"{path} does not fit the network: {str(error).splitlines()[0]}") from error
        heads[label] = head
    return heads, read_scoring(metadata, path), hashlib.sha256(content).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class _Window:
    """The part of an embedding that the decoder looks at."""

    left: int
    top: int
    """First cell, in cells of the embedding."""

    width: int
    height: int
    """Cells of the embedding."""

    shrink: int
    """Cells of the embedding that make one of the decoder's, along each axis."""


def _window(lowest: FloatArray, highest: FloatArray, grid_wh: tuple[int, int], side: int, shrink: int) -> _Window:
    """The window round prompts that span ``lowest`` to ``highest`` (x and y in cells), moved to lie within the grid.

    ``side`` is in cells of the decoder.
    """
    size = [min(side * shrink, length) for length in grid_wh]
    middle = (lowest + highest) / 2
    left, top = (int(np.clip(round(m - s / 2), 0, n - s)) for m, s, n in zip(middle, size, grid_wh, strict=True))
    return _Window(left, top, size[0], size[1], shrink)


class OnTorch:
    """What computes on a device of torch, and on how many processors where that is them."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self.threads = torch.get_num_threads() if self._device.type == "cpu" else 1
        """Processors that it may use in all; one where it computes elsewhere."""

    def use_threads(self, count: int) -> None:
        """Compute on so many processors what the calling thread asks for from now on."""
        if self._device.type == "cpu":
            torch.set_num_threads(count)


class CompactSegmenter(OnTorch):
    """A ``Segmenter`` on the shipped weights, with a project's own heads where it has trained some."""

    def __init__(self, net: CompactNet, base_version: str, *, device: str = "cpu") -> None:
        super().__init__(device)
        self._net = net.eval().requires_grad_(False).to(self._device)
        self._net.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its types
        self._heads: dict[str, AnyHead] = dict(zip(net.labels, cast("Iterable[DenseHead]", net.heads), strict=True))
        self._scoring = net.scoring
        self._evidence = {label.casefold(): torch.from_numpy(v).to(self._device) for label, v in net.evidence.items()}
        self._net_version = self.base_version = base_version
        self.version = base_version

    @classmethod
    def load(
        cls, path: Path | None = None, *, device: str = "cpu", heads: Path | None = None, threads: int | None = None
    ) -> CompactSegmenter:
        """The segmenter from a weights file, or the shipped one. ``threads`` limits torch in the whole process."""
        if threads is not None:
            torch.set_num_threads(threads)
        segmenter = cls(*_load_base(path or SHIPPED_WEIGHTS), device=device)
        return segmenter if heads is None else segmenter.with_heads(heads)

    def with_heads(self, path: Path) -> CompactSegmenter:
        """The same network with a project's heads: they replace those of the same name, and come after the others."""
        heads, scoring, name = _load_heads(path, self._net_version)
        trained = {label.casefold() for label in heads}
        kept = {label: head for label, head in self._heads.items() if label.casefold() not in trained}
        new = self.with_only(kept | heads, {**self._scoring, **scoring})
        new.version = f"{self._net_version}-{name}"
        return new

    def with_only(
        self, heads: Mapping[str, AnyHead], scoring: Mapping[str, tuple[float, ...]] | None = None
    ) -> CompactSegmenter:
        """The same network and name with these heads alone, and with this scoring where one is given."""
        new = copy.copy(self)
        new._heads = {label: head.eval().requires_grad_(False).to(self._device) for label, head in heads.items()}
        new._scoring = self._scoring if scoring is None else scoring
        own = new._own_pyramids()
        # Embeddings hold what these pyramids make of the image.
        new.base_version = f"{self._net_version}+{_digest(own)}" if own else self._net_version
        return new

    def _own_pyramids(self) -> dict[str, Pyramid]:
        """By the name that their features have in an embedding, the pyramids of heads that have one of their own."""
        return {
            f"coarse {label.casefold()}": head.pyramid
            for label, head in self._heads.items()
            if isinstance(head, ProjectHead)
        }

    def new_head(self) -> ProjectHead:
        """A head to be trained, that knows nothing yet."""
        return ProjectHead(self._net.pyramid)

    def trainable_head(self, label: str) -> ProjectHead | None:
        """A copy of the label's head to be trained, which does the same as that one; None where there is none."""
        head = self.head(label)
        return ProjectHead(self._net.pyramid, head) if isinstance(head, DenseHead) else copy.deepcopy(head)

    def save_heads(
        self,
        heads: Mapping[str, AnyHead],
        path: Path,
        notes: Mapping[str, str] | None = None,
        *,
        scoring: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Write a project's heads by label, whole or not at all; ``with_heads`` reads them."""
        save_heads(heads, self._net_version, path, notes, scoring=scoring)

    @property
    def scoring(self) -> Mapping[str, tuple[float, ...]]:
        """By label, the factors that tell how likely a candidate is an object; see `backend.instances`."""
        return self._scoring

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes that ``dense`` finds."""
        return tuple(self._heads)

    def head(self, label: str) -> AnyHead | None:
        """The head of a label, matched without regard to case; None where there is none."""
        return next((head for name, head in self._heads.items() if name.casefold() == label.casefold()), None)

    def working_scale(self, image_hw: tuple[int, int], gsd_m: float | None, classes: Collection[str]) -> float:
        """How much ``embed`` should enlarge an image of ``gsd_m`` metres a pixel, where objects of ``classes`` count.

        The network learned objects of 20–130 px a side and outlines smaller ones worse, so coarse imagery is enlarged.
        Fine imagery must not be, so one of unknown scale stays as it is.
        """
        if gsd_m is None:
            return 1.0
        finest_m = max((_FINEST_GSD_M.get(name.casefold(), 0.0) for name in classes), default=0.0) or _FINEST_GSD_ELSE_M
        wanted = min(gsd_m / finest_m, _MOST_SCALE)
        affordable = _MOST_WORKING_PX / math.sqrt(image_hw[0] * image_hw[1])
        # Half steps, so that all tiles of a scene are seen at the same scale.
        return max(1.0, math.floor(2 * min(wanted, affordable)) / 2)

    @torch.inference_mode()
    def embed(self, image_rgb: NDArray[np.uint8], *, scale: float = 1.0) -> Embedding:
        """Features of an image, (H, W, 3) uint8 RGB, from 8 px to any size that fits in memory.

        The network sees it ``scale`` times as large; prompts and outlines stay in the image's own pixels.
        """
        padded, scale_xy = _padded(image_rgb, scale)
        rows, columns = (n // CELL_PX for n in padded.shape[:2])
        coarse = np.empty((COARSE, rows, columns), np.float16)
        fine = np.empty((FINE, 2 * rows, 2 * columns), np.float16)
        pyramids = self._own_pyramids()
        own = {name: np.empty_like(coarse) for name in pyramids}
        for y, top, below in _blocks(rows, _BLOCK_CELLS, _OVERLAP_CELLS):
            for x, left, beyond in _blocks(columns, _BLOCK_CELLS, _OVERLAP_CELLS):
                block = padded[y * CELL_PX : (y + _BLOCK_CELLS) * CELL_PX, x * CELL_PX : (x + _BLOCK_CELLS) * CELL_PX]
                taps = self._net.taps(self._batch_of_one(block))
                one, two = self._net.pyramid(taps)
                for kept, cells in (
                    (coarse, one),
                    *((own[name], pyramid.merged(taps[1:])) for name, pyramid in pyramids.items()),
                ):
                    part = cells[0, :, top - y : below - y, left - x : beyond - x]
                    kept[:, top:below, left:beyond] = part.cpu().numpy()
                fine[:, 2 * top : 2 * below, 2 * left : 2 * beyond] = (
                    two[0, :, 2 * (top - y) : 2 * (below - y), 2 * (left - x) : 2 * (beyond - x)].cpu().numpy()
                )
        half = cv2.resize(padded, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        features: dict[str, NDArray[np.generic]] = {
            "coarse": coarse,
            "fine": fine,
            "rgb": np.ascontiguousarray(np.moveaxis(half, -1, 0)),
            "scale_xy": scale_xy,
            **own,
        }
        height, width = image_rgb.shape[:2]
        return Embedding(features, (height, width), self.base_version)

    @torch.inference_mode()
    def inner(self, image_rgb: NDArray[np.uint8], *, scale: float = 1.0) -> Embedding:
        """What a `ProjectHead` reads of an image: the fine features, and the trunk's at strides 4, 8, 16 and 32.

        In one piece, so that it takes the more memory the larger the image is.
        """
        padded, scale_xy = _padded(image_rgb, scale)
        taps = self._net.taps(self._batch_of_one(padded))
        read = {"fine": self._net.pyramid.fine(taps[0]), **{f"stride {4 << i}": tap for i, tap in enumerate(taps[1:])}}
        features: dict[str, NDArray[np.generic]] = {n: v[0].half().cpu().numpy() for n, v in read.items()}
        return Embedding(
            {**features, "scale_xy": scale_xy}, (image_rgb.shape[0], image_rgb.shape[1]), self._net_version
        )

    def _batch_of_one(self, block: NDArray[np.uint8]) -> Tensor:
        rgb = torch.from_numpy(np.ascontiguousarray(block)).to(self._device)[None].permute(0, 3, 1, 2).float()
        return rgb.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def segment(self, embedding: Embedding, prompts: Prompts) -> Masks:
        """The object that the prompts mean, as one candidate. Raises BadPrompt where they mean none.

        Clicks on the object are inside and clicks off it outside. With clicks on the object, only the patches that hold
        one are kept; with a box alone, those inside the box.
        """
        clicks_xy, box = prompts.within(embedding.image_hw)
        self._check(embedding)
        height, width = embedding.image_hw
        logits, left, top = self._decode(embedding, clicks_xy, prompts.is_foreground, box)
        probabilities = np.zeros((height, width), np.float32)
        view = probabilities[top : top + logits.shape[0], left : left + logits.shape[1]]
        local_box = None if box is None else box - (left, top, left, top)
        view[:] = _obeying(logits, clicks_xy - (left, top), prompts.is_foreground, local_box)
        return Masks(probabilities[None], np.array([_expected_iou(view)], np.float32))

    def _check(self, embedding: Embedding) -> None:
        if embedding.version != self.base_version:
            raise ValueError(f"embedding is of {embedding.version}, and {self.base_version} is loaded")

    def _decode(
        self, embedding: Embedding, clicks_xy: FloatArray, is_foreground: NDArray[np.bool_], box: FloatArray | None
    ) -> tuple[NDArray[np.float32], int, int]:
        """Logits of the pixels round the prompts, with the first column and row they stand for."""
        rows, columns = embedding.features["coarse"].shape[1:]
        cell_xy = cell_size_xy(embedding)
        corners = clicks_xy if box is None else np.vstack([clicks_xy, box.reshape(2, 2)])
        lowest, highest = corners.min(0) / cell_xy, corners.max(0) / cell_xy
        shrink = max(1, math.ceil(float((highest - lowest).max()) * 1.4 / _WINDOW_CELLS))
        # Most objects are small: clicks get a near look first, which takes half the time. For boxes it is worse.
        is_near = box is None and float((highest - lowest).max()) * 1.4 <= _NEAR_CELLS
        side = _NEAR_CELLS if is_near else _WINDOW_CELLS
        while True:
            window = _window(lowest, highest, (columns, rows), side, shrink)
            logits = self._decode_window(
                embedding, window, clicks_xy / cell_xy, is_foreground, box if box is None else box / np.tile(cell_xy, 2)
            )
            if logits is not None:
                break
            if side < _WINDOW_CELLS:
                side = _WINDOW_CELLS
            else:
                shrink *= 2
        height, width = embedding.image_hw
        first_xy = np.array([window.left, window.top]) * cell_xy
        left, top = (int(v) for v in np.floor(first_xy))
        right, bottom = (int(v) for v in np.ceil(first_xy + np.array([window.width, window.height]) * cell_xy))
        right, bottom = min(width, right), min(height, bottom)
        return _resampled(logits, first_xy, cell_xy * shrink / 2, left, top, right, bottom), left, top

    def _decode_window(
        self,
        embedding: Embedding,
        window: _Window,
        clicks: FloatArray,
        is_foreground: NDArray[np.bool_],
        box: FloatArray | None,
    ) -> NDArray[np.float32] | None:
        """Logits of a window's half-cells; clicks and box are in cells of the embedding.

        None as soon as it shows that what was clicked runs out of the window: the last steps take most of the time.
        """
        shrink = window.shrink
        rows, columns = embedding.features["coarse"].shape[1:]

        def runs_out(logits: NDArray[np.float32]) -> bool:
            return box is None and _reaches_inner_edge(logits > 0, window, (columns, rows))

        def cut(name: str, each: int) -> Tensor:
            y, x = window.top * each, window.left * each
            part = embedding.features[name][:, y : y + window.height * each, x : x + window.width * each]
            values = self._on_device(part)
            if shrink > 1:
                values = F.pad(
                    values, (0, -window.width % shrink * each, 0, -window.height % shrink * each), mode="replicate"
                )
                values = F.avg_pool2d(values, shrink)
            return values

        rgb_fine = cut("rgb", 2)
        origin = np.array([window.left, window.top], np.float64)
        local = (clicks - origin) / shrink
        signed = np.column_stack([local, np.where(is_foreground, 1.0, -1.0)])
        edges = np.full(4, np.nan) if box is None else (box - np.tile(origin, 2)) / shrink
        views = (
            self._net.decoder.context(cut("coarse", 1)),
            cut("fine", 2),
            F.avg_pool2d(rgb_fine, 2),
            rgb_fine,
            torch.from_numpy(signed.astype(np.float32)).to(self._device)[None],
            torch.from_numpy(edges.astype(np.float32)).to(self._device)[None],
        )
        decoder = self._net.decoder
        prompted = decoder.prompt_maps(views[0], views[4], views[5])
        first, _ = decoder(*views, None, prompted)
        if runs_out(first[0, 0].cpu().numpy()):
            return None
        _, sharp = decoder(*views, first, prompted)
        logits = sharp[0, 0].cpu().numpy()
        if box is not None:
            return np.asarray(logits)  # the image's own colours help clicks, and harm boxes
        if runs_out(logits):
            return None
        rgb = np.ascontiguousarray(rgb_fine[0].permute(1, 2, 0).round().to(torch.uint8).cpu().numpy())
        adapted = _adapted(logits, rgb, 2 * local, is_foreground)
        return None if runs_out(adapted) else adapted

    @torch.inference_mode()
    def dense(
        self,
        embedding: Embedding,
        *,
        window_xyxy: tuple[int, int, int, int] | None = None,
        labels: Collection[str] | None = None,
    ) -> DenseMaps:
        """Class and border probabilities of the whole tile, with evidence, or of its columns and rows from … to.

        A window comes without evidence, which is there for the shipped classes alone. With ``labels``, of those classes
        only: each takes its time.
        """
        self._check(embedding)
        heads = {label: head for label, head in self._heads.items() if labels is None or label in labels}
        height, width = embedding.image_hw
        left, top, right, bottom = window_xyxy or (0, 0, width, height)
        rows, columns = embedding.features["coarse"].shape[1:]
        cell_xy = cell_size_xy(embedding)
        x0, y0 = (max(0, int(v) - _HEAD_MARGIN_CELLS) for v in (left, top) // cell_xy)
        x1, y1 = (
            min(n, math.ceil(v) + _HEAD_MARGIN_CELLS)
            for v, n in zip((right, bottom) / cell_xy, (columns, rows), strict=True)
        )
        weights = [None if window_xyxy else self._evidence.get(label.casefold()) for label in heads]
        speaks = any(weight is not None for weight in weights)
        logits = np.zeros((len(heads), 4 if speaks else 2, 2 * (y1 - y0), 2 * (x1 - x0)), np.float32)
        for y, above, below in _blocks(y1 - y0, _BLOCK_CELLS, _HEAD_MARGIN_CELLS):
            for x, before, beyond in _blocks(x1 - x0, _BLOCK_CELLS, _HEAD_MARGIN_CELLS):
                block = y0 + y, x0 + x, min(y1 - y0 - y, _BLOCK_CELLS), min(x1 - x0 - x, _BLOCK_CELLS)
                coarse, fine = (self._cut(embedding, name, each, *block) for name, each in (("coarse", 1), ("fine", 2)))
                for i, ((label, head), weight) in enumerate(zip(heads.items(), weights, strict=True)):
                    if isinstance(head, ProjectHead):
                        found = head.dense(self._cut(embedding, f"coarse {label.casefold()}", 1, *block), fine)
                    else:
                        found = head(coarse, fine)
                    if weight is not None:
                        found = torch.cat([found, _weighed(weight, coarse, fine)], 1)
                    logits[i, : found.shape[1], 2 * above : 2 * below, 2 * before : 2 * beyond] = (
                        found[0, :, 2 * (above - y) : 2 * (below - y), 2 * (before - x) : 2 * (beyond - x)]
                        .cpu()
                        .numpy()
                    )
        maps = np.empty((*logits.shape[:2], bottom - top, right - left), np.float32)
        for i, kind in np.ndindex(*logits.shape[:2]):
            maps[i, kind] = _resampled(
                logits[i, kind], np.array([x0, y0]) * cell_xy, cell_xy / 2, left, top, right, bottom
            )
            if kind < 2:
                maps[i, kind] = _sigmoid(maps[i, kind])
        return DenseMaps(tuple(heads), maps[:, 0], maps[:, 1], self._scoring, maps[:, 2:] if speaks else None)

    def dense_mirrored(
        self, image_rgb: NDArray[np.uint8], *, scale: float = 1.0, labels: Collection[str] | None = None
    ) -> DenseMaps:
        """What ``dense`` says of an image's mirror image; `DenseMaps.mean_with_mirrored` joins the two looks."""
        return self.dense(self.embed(np.ascontiguousarray(image_rgb[:, ::-1]), scale=scale), labels=labels)

    def _cut(self, embedding: Embedding, name: str, each: int, top: int, left: int, height: int, width: int) -> Tensor:
        """Part of named features, (1, C, h, w); place and size in cells, of which there are ``each`` a coarse one."""
        part = embedding.features[name][:, top * each : (top + height) * each, left * each : (left + width) * each]
        return self._on_device(part)

    def _on_device(self, part: NDArray[np.generic]) -> Tensor:
        """A batch of one, (1, C, h, w), of features, (C, h, w); each place's channels side by side, as is faster."""
        values = torch.from_numpy(part)[None].to(self._device)
        return values.to(torch.float32, memory_format=torch.channels_last)


def _padded(image_rgb: NDArray[np.uint8], scale: float) -> tuple[NDArray[np.uint8], FloatArray]:
    """The image as the network sees it, its sides in strides, and how many times wider and higher it became."""
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8 or min(image_rgb.shape[:2]) < 8:
        raise BadImage(
            f"image must be (H, W, 3) uint8 of at least 8 px a side, got {image_rgb.shape} {image_rgb.dtype}"
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")
    height, width = image_rgb.shape[:2]
    if scale != 1:
        size = max(8, round(width * scale)), max(8, round(height * scale))
        how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
        image_rgb = cast("NDArray[np.uint8]", cv2.resize(image_rgb, size, interpolation=how))
    bottom, right = (max(2 * STRIDE_PX, math.ceil(n / STRIDE_PX) * STRIDE_PX) - n for n in image_rgb.shape[:2])
    padded = cv2.copyMakeBorder(image_rgb, 0, bottom, 0, right, cv2.BORDER_REFLECT_101)
    return cast("NDArray[np.uint8]", padded), np.array([image_rgb.shape[1] / width, image_rgb.shape[0] / height])


def _digest(modules: Mapping[str, nn.Module]) -> str:
    """Eight hexadecimal digits that change with the names and values."""
    content = hashlib.sha256()
    for name, module in modules.items():
        content.update(name.encode())
        for value in module.state_dict().values():
            content.update(np.ascontiguousarray(value.cpu().numpy()).data)
    return content.hexdigest()[:8]


def _weighed(weight: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """Features times weights, (2, 56), as maps (1, 2, 2h, 2w)."""
    of_coarse = F.conv2d(coarse, weight[:, :COARSE, None, None])
    of_fine = F.conv2d(fine, weight[:, COARSE:, None, None])
    return F.interpolate(of_coarse, scale_factor=2, mode="bilinear", align_corners=False) + of_fine


def cell_size_xy(embedding: Embedding) -> FloatArray:
    """Width and height of a coarse feature cell, in pixels of the image that was embedded."""
    return CELL_PX / np.asarray(embedding.features["scale_xy"], np.float64)


def _blocks(length: int, size: int, overlap: int) -> list[tuple[int, int, int]]:
    """First cell, and first and last-but-one cell of the part that counts, of each block along one axis.

    The parts that count cover ``0 … length`` once, ``overlap`` away from any block edge that is no edge of the whole.
    """
    if length <= size:
        return [(0, 0, length)]
    step = size - 2 * overlap
    # Blocks start on the trunk's coarsest stride, so that each cell sees its surroundings as in one piece.
    starts = [*range(0, length - size, step - step % (STRIDE_PX // CELL_PX)), length - size]
    edges = [0, *(start + overlap for start in starts[1:]), length]
    return [(start, a, b) for start, a, b in zip(starts, edges, edges[1:], strict=False)]


def _reaches_inner_edge(mask: NDArray[np.bool_], window: _Window, grid_wh: tuple[int, int]) -> bool:
    """Whether a mask of cells or half-cells runs out of its window where there is more image to see."""
    columns, rows = grid_wh
    edges = (
        (window.left > 0, mask[:, 0]),
        (window.top > 0, mask[0]),
        (window.left + window.width < columns, mask[:, -1]),
        (window.top + window.height < rows, mask[-1]),
    )
    return any(inner and edge.mean() > 0.08 for inner, edge in edges)


def _resampled(
    values: NDArray[np.float32],
    origin_xy: FloatArray,
    each_xy: FloatArray,
    left: int,
    top: int,
    right: int,
    bottom: int,
) -> NDArray[np.float32]:
    """Values at the centres of pixels ``left … right``, ``top … bottom``.

    A value is ``each_xy`` pixels wide and high, and the first one begins at ``origin_xy``, in pixels.
    """
    offset = (np.array([left, top]) + 0.5 - origin_xy) / each_xy - 0.5
    matrix = np.column_stack([np.diag(1 / each_xy), offset])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    out = cv2.warpAffine(values, matrix, (right - left, bottom - top), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return cast("NDArray[np.float32]", out)


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    # OpenCV's exp is several times faster than NumPy's.
    return cast("NDArray[np.float32]", 1 / (1 + cv2.exp(-np.clip(logits, -30, 30))))


def _adapted(
    logits: NDArray[np.float32], rgb: NDArray[np.uint8], clicks: FloatArray, is_foreground: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Logits that also follow the colours of the image at hand, by GrabCut from the sure parts of the answer.

    Where the two disagree on what the object is, the network is right more often, and its answer stays.
    """
    rows, columns = np.nonzero(logits > 0)
    if _GRABCUT_WEIGHT == 0 or not len(rows):
        return logits
    margin = 8 + int(0.4 * max(np.ptp(rows), np.ptp(columns)))
    top, left = max(0, rows.min() - margin), max(0, columns.min() - margin)
    part = np.s_[top : rows.max() + margin + 1, left : columns.max() + margin + 1]
    seen = logits[part]
    seeds = np.where(seen > 0, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    seeds[seen > _SURE_LOGIT] = cv2.GC_FGD
    seeds[seen < -_SURE_LOGIT] = cv2.GC_BGD
    for (x, y), value in zip(clicks - (left, top), is_foreground, strict=True):
        cv2.circle(seeds, (int(x), int(y)), 1, cv2.GC_FGD if value else cv2.GC_BGD, -1)
    if len(np.unique(seeds & 1)) < 2:
        return logits
    cv2.setRNGSeed(0)  # GrabCut's clusters start at random
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.ascontiguousarray(rgb[part]), seeds, (0, 0, 1, 1), *models, _GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    found = (seeds & 1).astype(bool)
    if (found & (seen > 0)).sum() < _LEAST_AGREEMENT * (found | (seen > 0)).sum():
        return logits
    soft = np.clip(cv2.GaussianBlur(found.astype(np.float32), (0, 0), 0.8), 0.02, 0.98)
    adapted = logits.copy()
    adapted[part] += _GRABCUT_WEIGHT * np.log(soft / (1 - soft))
    return adapted


def _obeying(
    logits: NDArray[np.float32], clicks_xy: FloatArray, is_foreground: NDArray[np.bool_], box: FloatArray | None
) -> NDArray[np.float32]:
    """Probabilities that do what the prompts say, from logits; all in the logits' own pixels."""
    logits = logits.copy()
    height, width = logits.shape
    columns, rows = (np.clip(np.floor(clicks_xy[:, i]).astype(int), 0, n - 1) for i, n in ((0, width), (1, height)))
    at_clicks = logits[rows[is_foreground], columns[is_foreground]]
    if len(at_clicks) and at_clicks.max() < 0.3:
        # The annotator says that there is an object: lower the bar, rather than answer with a dot.
        logits += min(0.3 - float(at_clicks.max()), _MOST_LIFT)
    if box is not None and not len(at_clicks):
        inside = logits[_pixels_of(box, height, width)]
        if inside.size <= _MOST_LIFTED_PX and (inside > 0).mean() < _LEAST_FILL:
            logits -= np.quantile(inside, 1 - _LIFTED_FILL)
    for value in (True, False):
        for x, y in clicks_xy[is_foreground == value]:
            opposite = clicks_xy[is_foreground != value]
            radius = _CLICK_RADIUS_PX
            if len(opposite):
                radius = min(radius, max(0.75, float(np.hypot(*(opposite - (x, y)).T).min()) / 2))
            x0, y0 = max(0, int(x - 2 * radius)), max(0, int(y - 2 * radius))
            near = logits[y0 : int(y + 2 * radius) + 2, x0 : int(x + 2 * radius) + 2]
            ys, xs = np.ogrid[y0 + 0.5 : y0 + near.shape[0], x0 + 0.5 : x0 + near.shape[1]]
            hill = (1.5 * (1 - ((xs - x) ** 2 + (ys - y) ** 2) / radius**2)).astype(np.float32)
            near[:] = np.maximum(near, hill) if value else np.minimum(near, -hill)
    if box is not None:
        logits = np.minimum(logits, _box_limit(box, height, width))
    for value, sign in ((True, 1), (False, -1)):
        at = rows[is_foreground == value], columns[is_foreground == value]
        logits[at] = sign * np.maximum(sign * logits[at], 0.5)

    count, patches = cv2.connectedComponents((logits > 0).astype(np.uint8), connectivity=4)
    kept = np.zeros(count, bool)
    kept[patches[rows[is_foreground], columns[is_foreground]]] = True
    kept[0] = False
    if not kept.any() and count > 1:
        areas = np.bincount(patches.ravel())[1:]
        kept[1:] = areas >= 0.25 * areas.max()
    probabilities = _sigmoid(logits)
    # A rim outside the kept patches stays, so that the outline at one half runs smoothly between pixels.
    around = cv2.dilate(kept[patches].astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
    probabilities[~around | ((patches > 0) & ~kept[patches])] = 0
    return probabilities


def _pixels_of(box: FloatArray, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels that a box touches, at least one each."""
    left, top = (int(np.clip(math.floor(v), 0, n - 1)) for v, n in zip(box[:2], (width, height), strict=True))
    right, bottom = (
        int(np.clip(math.ceil(v), first + 1, n))
        for v, first, n in zip(box[2:], (left, top), (width, height), strict=True)
    )
    return slice(top, bottom), slice(left, right)


def _box_limit(box: FloatArray, height: int, width: int) -> NDArray[np.float32]:
    """Logits that fall below zero at a margin outside the box, which an annotator draws a little off."""
    margin = 1.5 + 0.06 * max(box[2] - box[0], box[3] - box[1])
    ys, xs = np.ogrid[0.5:height, 0.5:width]
    outside = np.maximum(np.maximum(box[0] - xs, xs - box[2]), np.maximum(box[1] - ys, ys - box[3]))
    return np.asarray(4 * (margin - outside), np.float32)


def _expected_iou(probabilities: NDArray[np.float32]) -> float:
    """IoU of the mask at one half with a truth drawn from the probabilities, roughly."""
    inside = probabilities > 0.5
    sure = float(probabilities[inside].sum())
    return sure / max(1e-6, float(inside.sum()) + float(probabilities[~inside].sum()))
