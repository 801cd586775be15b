"""Meta's Segment Anything behind our `Segmenter` protocol, from a checkpoint that the operator has.

The image is resized so that its longer side fills SAM's square *frame* (1024 pixels), and encoded once into *cells* of
16 frame pixels (``embed``). A small decoder answers clicks and boxes from there (``segment``). SAM knows no classes: a
project's own heads on the cells do (``dense``), and their objects are outlined by the decoder (``outline``).

The network, its weights and its numbers are those of the ``segment-anything`` package. The encoder's arithmetic is
arranged anew: attention never holds a whole map of all against all, and nothing is computed for padding.

Sources: Kirillov et al., "Segment Anything" (2023); Li et al., "MViTv2" (2022) for the decomposed relative positions.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import sys
import types
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from .checkpoints import sha256_of
from .compact import CELL_PX, OnTorch, read_scoring, save_heads
from .errors import BadImage, BadWeights
from .segmenter import DenseMaps, Embedding, Masks, Prompts

HEADS_KIND = "geoprelabel-sam-heads-1"

MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)

STABILITY_OFFSET = 1.0
"""A mask is stable where its logits cut at plus and at minus this make nearly the same shape."""

_DECODER_HEADS = 8
"""Attention heads of the prompt decoder: the one number that the shapes of a checkpoint do not tell."""

_LEAST_PATCH = 0.1
"""Patches of an answer without a click on them stay where they have this share of the largest one's area."""

_MAP_VALUES = {"cpu": 2**22, "cuda": 2**28}
"""Values of attention's map that are held at once: what fits into a processor's cache, or into a card."""

_BATCH = {"cpu": 4, "cuda": 64}
"""Prompts that are decoded at once."""

_MLP_TOKENS = 1024
"""Tokens that are widened at once, on a CPU."""


def _segment_anything() -> tuple[Any, Any]:
    """The package's ``modeling`` and ``build_sam``.

    Importing the package whole imports torchvision, which these two do not need: where it is missing, or was built for
    another torch, they are imported without running the package's ``__init__``.
    """
    try:
        from segment_anything import build_sam, modeling
    except (ImportError, RuntimeError, AttributeError):
        found = importlib.util.find_spec("segment_anything")
        if found is None or found.submodule_search_locations is None:
            raise BadWeights("Segment Anything needs a package: pip install segment-anything==1.0") from None
        bare = types.ModuleType("segment_anything")
        bare.__path__ = list(found.submodule_search_locations)
        sys.modules["segment_anything"] = bare
        from segment_anything import build_sam, modeling
    return modeling, build_sam


class SamHead(nn.Module):
    """Class and border logits of a label, (N, 2, 2h, 2w), from SAM's cells (N, C, h, w) and colours (N, 3, 2h, 2w)."""

    def __init__(self, channels: int = 256) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(channels, 32, 1)
        self.fine = nn.Conv2d(32 + 3, 16, 3, padding=1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        x = F.relu(self.coarse(coarse))
        x = F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        logits: Tensor = self.out(F.relu(self.fine(torch.cat([x, (fine - 128) / 64], 1))))
        return logits


class SamSegmenter(OnTorch):
    """A ``Segmenter`` on a checkpoint of Segment Anything, with a project's own heads where it has trained some."""

    def __init__(self, sam: Any, base_version: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        """``dtype`` is what the encoder computes in; None: float32, or bfloat16 where the device is made for that."""
        super().__init__(device)
        self._sam = sam.eval().requires_grad_(False).to(self._device)
        self._dtype = dtype or fitting_dtype(self._device)
        self._heads: dict[str, SamHead] = {}
        self._scoring: Mapping[str, tuple[float, ...]] = {}
        self.base_version = base_version
        self.version = base_version
        self.frame_px: int = sam.image_encoder.img_size
        self._cells: int = sam.prompt_encoder.image_embedding_size[0]
        self._pe: Tensor = sam.prompt_encoder.get_dense_pe()

    @classmethod
    def load(
        cls, path: Path, *, name: str = "sam", device: str = "cpu", heads: Path | None = None, sha256: str = ""
    ) -> SamSegmenter:
        """The segmenter from a checkpoint in the published format; its version is ``name`` and the file's hash.

        ``sha256`` saves reading the file for it. Only tensors are read, never code. Raises BadWeights.
        """
        try:
            # Mapped, the weights are in memory once for all server processes.
            is_new = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_new)
        except FileNotFoundError as error:
            raise BadWeights(f"{path} is not there; run geoprelabel weights get sam_vit_b") from error
        except Exception as error:  # what torch raises at a file of another kind is of many classes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadWeights(f"{path} is damaged or no checkpoint of Segment Anything: {reason}") from error
        segmenter = cls(build(state, str(path)), f"{name}-{(sha256 or sha256_of(path))[:8]}", device=device)
        return segmenter if heads is None else segmenter.with_heads(heads)

    def with_heads(self, path: Path) -> SamSegmenter:
        """The same network with a project's heads. Raises BadWeights."""
        heads, scoring, name = _load_heads(path, self.base_version, self._sam.prompt_encoder.embed_dim)
        new = self.with_only(heads, scoring)
        new.version = f"{self.base_version}-{name}"
        return new

    def with_only(
        self, heads: Mapping[str, SamHead], scoring: Mapping[str, tuple[float, ...]] | None = None
    ) -> SamSegmenter:
        """The same network and name with these heads alone, and with this scoring where one is given."""
        new = copy.copy(self)
        new._heads = {label: head.eval().requires_grad_(False).to(self._device) for label, head in heads.items()}
        new._scoring = self._scoring if scoring is None else scoring
        return new

    @property
    def scoring(self) -> Mapping[str, tuple[float, ...]]:
        """By label, the factors that tell how likely a candidate is an object; see `backend.instances`."""
        return self._scoring

    def save_heads(
        self,
        heads: Mapping[str, SamHead],
        path: Path,
        notes: Mapping[str, str] | None = None,
        *,
        scoring: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Write a project's heads by label, whole or not at all; ``with_heads`` reads them."""
        save_heads(heads, self.base_version, path, notes, scoring=scoring, kind=HEADS_KIND)

    def new_head(self) -> SamHead:
        """A head to be trained, on features ``coarse`` and ``fine`` of an embedding."""
        return SamHead(self._sam.prompt_encoder.embed_dim)

    def head(self, label: str) -> SamHead | None:
        """The head of a label, matched without regard to case; None where there is none."""
        return next((head for name, head in self._heads.items() if name.casefold() == label.casefold()), None)

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes that ``dense`` finds: none before a project trained some."""
        return tuple(self._heads)

    @torch.inference_mode()
    def embed(self, image_rgb: NDArray[np.uint8]) -> Embedding:
        """SAM's features of an image, (H, W, 3) uint8 RGB of any size: it is resized to fill SAM's frame."""
        if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8 or 0 in image_rgb.shape:
            raise BadImage(f"image must be (H, W, 3) uint8, got {image_rgb.shape} {image_rgb.dtype}")
        height, width = image_rgb.shape[:2]
        resized = resized_to(image_rgb, self.frame_px)
        frame = torch.zeros(1, 3, self.frame_px, self.frame_px, device=self._device)
        rgb = torch.from_numpy(resized).to(self._device).permute(2, 0, 1).float()
        mean, std = (rgb.new_tensor(values).view(3, 1, 1) for values in (MEAN_RGB, STD_RGB))
        frame[0, :, : resized.shape[0], : resized.shape[1]] = (rgb - mean) / std
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            cells = encoded(self._sam.image_encoder, frame)[0]
        padded = np.zeros((self.frame_px, self.frame_px, 3), np.uint8)
        padded[: resized.shape[0], : resized.shape[1]] = resized
        colours = cv2.resize(padded, (2 * self._cells, 2 * self._cells), interpolation=cv2.INTER_AREA)
        cell_px = self.frame_px / self._cells
        features: dict[str, NDArray[np.generic]] = {
            # Half precision: masks stay the same (IoU above .995), and twice as many tiles stay in memory.
            "coarse": cells.half().cpu().numpy(),
            "fine": np.ascontiguousarray(np.moveaxis(colours, -1, 0)),
            # As `compact.cell_size_xy` reads it.
            "scale_xy": np.array([resized.shape[1] / width, resized.shape[0] / height]) * CELL_PX / cell_px,
        }
        return Embedding(features, (height, width), self.base_version)

    @torch.inference_mode()
    def segment(self, embedding: Embedding, prompts: Prompts) -> Masks:
        """The object that the prompts mean, best candidate first. Raises BadPrompt where they mean none.

        A single click is ambiguous: it gets three candidates (part, object, group). Further clicks refine what was
        answered to those before the last one.
        """
        clicks_xy, box = prompts.within(embedding.image_hw)
        self._check(embedding)
        low_res, ious = self._answered(embedding, clicks_xy, prompts.is_foreground, box)
        logits = self._to_pixels(low_res, embedding.image_hw).cpu().numpy()
        scores = np.clip(ious.cpu().numpy(), 0, 1) * stability(logits)
        rows, columns = (np.floor(clicks_xy[:, i]).astype(int) for i in (1, 0))
        on_clicks = (logits[:, rows, columns] > 0) == prompts.is_foreground
        # What leaves out a click that was on the object is no answer, however sure SAM is of it.
        order = np.lexsort((-scores, -on_clicks.sum(1)))
        at = rows[prompts.is_foreground], columns[prompts.is_foreground]
        probabilities = np.stack([_tidied(logits[i], *at) for i in order])
        return Masks(probabilities, np.minimum.accumulate(scores[order]).astype(np.float32))

    def _check(self, embedding: Embedding) -> None:
        if embedding.version != self.base_version:
            raise ValueError(f"embedding is of {embedding.version}, and {self.base_version} is loaded")

    def _answered(
        self,
        embedding: Embedding,
        clicks_xy: NDArray[np.float64],
        is_foreground: NDArray[np.bool_],
        box: NDArray[np.float64] | None,
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution logits (K, h, w) and expected IoUs (K,)."""
        cells = self._cells_of(embedding)
        boxes = None if box is None else box[None]
        previous: Tensor | None = None
        if len(clicks_xy) > 1 and (box is not None or is_foreground[:-1].any()):
            # What the annotator saw before the last click; the network was trained to be told.
            several = box is None and len(clicks_xy) == 2
            before, ious = self._decode(
                cells, embedding, clicks_xy[None, :-1], is_foreground[None, :-1], boxes, several
            )
            previous = before[:, ious[0].argmax()][:, None]
        is_ambiguous = box is None and len(clicks_xy) == 1
        low_res, ious = self._decode(
            cells, embedding, clicks_xy[None], is_foreground[None], boxes, is_ambiguous, previous
        )
        return low_res[0], ious[0]

    def _cells_of(self, embedding: Embedding) -> Tensor:
        return torch.from_numpy(embedding.features["coarse"].astype(np.float32)).to(self._device)[None]

    def _in_frame(self, xy: NDArray[np.float64], embedding: Embedding) -> Tensor:
        """Pixel corners of the image, (…, 2), as SAM takes them: it adds half a pixel of its frame."""
        height, width = embedding.image_hw
        rows, columns = frame_hw(height, width, self.frame_px)
        return torch.from_numpy((xy * (columns / width, rows / height) - 0.5).astype(np.float32)).to(self._device)

    def _decode(
        self,
        cells: Tensor,
        embedding: Embedding,
        points_xy: NDArray[np.float64],
        is_foreground: NDArray[np.bool_],
        boxes_xyxy: NDArray[np.float64] | None,
        several: bool,
        previous: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, K, h, w) and expected IoUs (N, K) of N prompts of points (N, P, 2), boxes (N, 4) or both."""
        points = None
        if points_xy.shape[1]:
            labels = torch.from_numpy(is_foreground.astype(np.int64)).to(self._device)
            points = self._in_frame(points_xy, embedding), labels
        boxes = None
        if boxes_xyxy is not None:
            boxes = self._in_frame(boxes_xyxy.reshape(-1, 2, 2), embedding).reshape(-1, 4)
        sparse, dense = self._sam.prompt_encoder(points=points, boxes=boxes, masks=previous)
        low_res, ious = self._sam.mask_decoder(
            image_embeddings=cells,
            image_pe=self._pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )
        return low_res, ious

    def _to_pixels(self, maps: Tensor, image_hw: tuple[int, int]) -> Tensor:
        """Maps (K, h, w) that span SAM's frame, at the image's pixels: enlarged, the padding cut off, resized."""
        rows, columns = frame_hw(*image_hw, self.frame_px)
        whole = F.interpolate(maps[None], (self.frame_px, self.frame_px), mode="bilinear", align_corners=False)
        return F.interpolate(whole[..., :rows, :columns], image_hw, mode="bilinear", align_corners=False)[0]

    @torch.inference_mode()
    def dense(self, embedding: Embedding, *, window_xyxy: tuple[int, int, int, int] | None = None) -> DenseMaps:
        """Class and border probabilities of the whole tile, or of its columns and rows from … to, by the heads."""
        self._check(embedding)
        height, width = embedding.image_hw
        left, top, right, bottom = window_xyxy or (0, 0, width, height)
        maps = np.empty((2, len(self._heads), bottom - top, right - left), np.float32)
        if self._heads:
            coarse = self._cells_of(embedding)
            fine = torch.from_numpy(embedding.features["fine"].astype(np.float32)).to(self._device)[None]
            for i, head in enumerate(self._heads.values()):
                logits = self._to_pixels(head(coarse, fine)[0], embedding.image_hw)
                maps[:, i] = torch.sigmoid(logits[:, top:bottom, left:right]).cpu().numpy()
        return DenseMaps(self.labels, maps[0], maps[1], self._scoring)

    def outline(self, embedding: Embedding, boxes_xyxy: NDArray[np.float64]) -> Iterator[Masks]:
        """For each box, (N, 4) in pixel corners, the object in it, as one candidate; a few are decoded at once."""
        self._check(embedding)
        each = _BATCH.get(self._device.type, 16)
        for start in range(0, len(boxes_xyxy), each):
            boxes = np.asarray(boxes_xyxy[start : start + each], np.float64)
            with torch.inference_mode():
                no_points = np.zeros((len(boxes), 0, 2)), np.zeros((len(boxes), 0), bool)
                low_res, ious = self._decode(self._cells_of(embedding), embedding, *no_points, boxes, False)
                logits = self._to_pixels(low_res[:, 0], embedding.image_hw).cpu().numpy()
            none = np.zeros(0, int)
            for one, iou in zip(logits, ious[:, 0].cpu().numpy(), strict=True):
                score = np.clip(iou, 0, 1) * stability(one[None])
                yield Masks(_tidied(one, none, none)[None], score.astype(np.float32))

    def logit_size_xy(self, embedding: Embedding) -> NDArray[np.float64]:
        """Width and height of one of `propose`'s logits, in pixels of the image."""
        height, width = embedding.image_hw
        rows, columns = frame_hw(height, width, self.frame_px)
        return np.array([width / columns, height / rows]) * self.frame_px / (4 * self._cells)

    @torch.inference_mode()
    def propose(
        self, embedding: Embedding, points_xy: NDArray[np.float64], *, least_iou: float
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float32]]]:
        """Candidates of single clicks, (N, 2) in pixel corners, whose IoU SAM expects to be above ``least_iou``.

        A few clicks at a time: index of each candidate's click (M,), its logits over SAM's frame without the padding
        (M, h, w), and its expected IoU (M,).
        """
        self._check(embedding)
        cells = self._cells_of(embedding)
        rows, columns = frame_hw(*embedding.image_hw, self.frame_px)
        each, cell_px = _BATCH.get(self._device.type, 16), self.frame_px / (4 * self._cells)
        part = np.s_[:, : math.ceil(rows / cell_px), : math.ceil(columns / cell_px)]
        points = self._in_frame(points_xy[:, None], embedding)
        decoder = _ManyClicks(self._sam, cells, self._pe)
        for start in range(0, len(points), each):
            which, logits, ious = decoder.masks(points[start : start + each], least_iou)
            yield which.cpu().numpy() + start, logits[part].cpu().numpy(), ious.cpu().numpy()


@dataclass(frozen=True, slots=True)
class _Cells:
    """SAM's cells for N clicks: ``factor`` times what the image gives them, plus ``mix`` of what they were told."""

    factor: Tensor
    """(N or 1, h · w)."""

    mix: Tensor
    """(N, R, h · w)."""

    told: Tensor
    """(N, R, C)."""

    said: tuple[Tensor, ...] = ()
    """``told`` layer by layer as tokens and heads said it, (N, heads, T, d) each."""


class _ManyClicks:
    """SAM's prompt decoder for many single clicks on one image, with the products that the clicks share made once.

    All clicks see the same cells, and a layer only adds a mix of what few tokens tell them, of a rank far below the
    count of their channels. So the image's part of each product with the cells is made once for all clicks, and the
    click's part on tokens rather than on channels. The normalisation keeps that form: a factor for each cell. The masks
    of clicks that the decoder expects nothing of are never drawn.
    """

    def __init__(self, sam: Any, cells: Tensor, pe: Tensor) -> None:
        self._prompts, self._decoder = sam.prompt_encoder, sam.mask_decoder
        _, no_mask = self._prompts(points=None, boxes=None, masks=None)
        own, place = (maps.flatten(2)[0].T.contiguous() for maps in (cells + no_mask, pe))
        constant = own.new_zeros(own.shape[1])
        voices: list[Tensor] = []
        self._layers = []
        for layer in self._decoder.transformer.layers:
            asking = _AskingCells(layer.cross_attn_token_to_image, own, place, constant)
            telling = _TellingCells(layer.cross_attn_image_to_token, layer.norm4, own, place, constant, voices)
            self._layers.append((layer, asking, telling))
            own, voices, constant = telling.own, telling.voices, layer.norm4.bias
        self._last = _AskingCells(self._decoder.transformer.final_attn_token_to_image, own, place, constant)
        # Enlarging by two is a product of each cell with what its four pixels become.
        enlarging, _, _, again, _ = self._decoder.output_upscaling
        self._enlarging = enlarging.weight.permute(0, 2, 3, 1).flatten(1)
        self._enlarged = own @ self._enlarging
        self._enlarged_bias = constant @ self._enlarging + enlarging.bias.repeat(4)
        self._again, self._again_bias = again.weight.permute(0, 2, 3, 1).flatten(1), again.bias.repeat(4)

    def masks(self, points: Tensor, least_iou: float) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the click (M,), logits (M, h, w), expected IoU (M,) of the candidates of clicks (N, 1, 2)."""
        decoder = self._decoder
        labels = torch.ones(points.shape[:2], dtype=torch.int64, device=points.device)
        sparse, _ = self._prompts(points=(points, labels), boxes=None, masks=None)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])[None].expand(len(points), -1, -1)
        tokens, cells = self._two_way(torch.cat([own, sparse], 1))
        ious = decoder.iou_prediction_head(tokens[:, 0])[:, 1:]
        wanted = ious > least_iou
        networks = decoder.output_hypernetworks_mlps[1:]
        hyper = torch.stack([network(tokens[:, 2 + i]) for i, network in enumerate(networks)], 1)
        side = 4 * math.isqrt(len(self._enlarged))
        # One by one, a click's enlarged cells stay in the processor's cache.
        drawn = [self._drawn(cells, i, hyper[i, wanted[i]]) for i in wanted.any(1).nonzero()[:, 0].tolist()]
        return wanted.nonzero()[:, 0], torch.cat([hyper.new_empty(0, side, side), *drawn]), ious[wanted]

    def _two_way(self, prompts: Tensor) -> tuple[Tensor, _Cells]:
        """Tokens (N, T, C), and the cells, after they have looked at each other."""
        transformer, tokens = self._decoder.transformer, prompts
        nothing = prompts.new_empty(len(prompts), 0, len(self._enlarged)), prompts[:, :0]
        cells = _Cells(prompts.new_ones(1, len(self._enlarged)), *nothing)
        for layer, asking, telling in self._layers:
            if layer.skip_first_layer_pe:
                tokens = layer.norm1(layer.self_attn(q=tokens, k=tokens, v=tokens))
            else:
                q = tokens + prompts
                tokens = layer.norm1(tokens + layer.self_attn(q=q, k=q, v=tokens))
            tokens = layer.norm2(tokens + asking(tokens + prompts, cells))
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            cells = telling(tokens + prompts, tokens, cells)
        return transformer.norm_final_attn(tokens + self._last(tokens + prompts, cells)), cells

    def _drawn(self, cells: _Cells, click: int, hyper: Tensor) -> Tensor:
        """Logits (K, 4h, 4w) of a click's candidates whose weights are (K, c)."""
        _, norm, activation, _, last_activation = self._decoder.output_upscaling
        x = torch.addmm(self._enlarged_bias, cells.mix[click].T, cells.told[click] @ self._enlarging)
        x = x.addcmul_(cells.factor[click, :, None], self._enlarged).view(-1, len(norm.weight))
        x = activation(F.layer_norm(x, x.shape[1:], norm.weight, norm.bias, norm.eps))
        x = last_activation((x @ self._again).add_(self._again_bias)).view(-1, hyper.shape[1])
        side = math.isqrt(len(self._enlarged))
        logits = (hyper @ x.T).view(len(hyper), side, side, 2, 2, 2, 2)
        pixels = logits.permute(0, 1, 3, 5, 2, 4, 6).reshape(len(hyper), 4 * side, 4 * side)
        return cast(Tensor, pixels)


class _CellAttention:
    """Attention between tokens and cells, with the image's part of its products made once."""

    def __init__(self, attention: Any, of_cells: nn.Linear, own: Tensor, place: Tensor) -> None:
        """``own`` (h · w, C) is what the image gives the cells, ``place`` (h · w, C) what is added to them whole."""
        self._attention, self._heads = attention, attention.num_heads
        self._weight = of_cells.weight.view(self._heads, -1, own.shape[1])
        self._own = self._weight @ own.T
        self._place = F.linear(place, of_cells.weight, of_cells.bias).T.reshape_as(self._own)

    def _by_head(self, tokens: Tensor) -> Tensor:
        """(N, T, heads · d) as (N, heads, T, d)."""
        return tokens.view(*tokens.shape[:2], self._heads, -1).transpose(1, 2)

    def _scores(self, tokens: Tensor, cells: _Cells) -> Tensor:
        """How much tokens (N, T, heads · d) and cells mean each other, (N, heads, T, h · w)."""
        tokens = self._by_head(tokens) * self._weight.shape[1] ** -0.5
        of_told = torch.einsum("nhtd,hdc->nhtc", tokens, self._weight).flatten(1, 2) @ cells.told.transpose(1, 2)
        own, place = (torch.einsum("nhtd,hdp->nhtp", tokens, table) for table in (self._own, self._place))
        return (of_told @ cells.mix).view(own.shape).addcmul_(own, cells.factor[:, None, None]).add_(place)


class _AskingCells(_CellAttention):
    """Attention of tokens to cells."""

    def __init__(self, attention: Any, own: Tensor, place: Tensor, constant: Tensor) -> None:
        # What is the same for all cells, softmax over them does not see.
        super().__init__(attention, attention.k_proj, own, place)
        of_values = attention.v_proj
        self._of_values = of_values.weight.view_as(self._weight)
        self._values = self._of_values @ own.T
        self._bias = F.linear(constant, of_values.weight, of_values.bias)

    def __call__(self, tokens: Tensor, cells: _Cells) -> Tensor:
        shares = self._scores(self._attention.q_proj(tokens), cells).softmax(3)
        told = (shares.flatten(1, 2) @ cells.mix.transpose(1, 2) @ cells.told).view(*shares.shape[:3], -1)
        seen = torch.einsum("nhtc,hdc->nthd", told, self._of_values)
        seen += torch.einsum("nhtp,hdp->nthd", shares.mul_(cells.factor[:, None, None]), self._values)
        return cast(Tensor, self._attention.out_proj(seen.flatten(2) + self._bias))


class _TellingCells(_CellAttention):
    """Attention of cells to tokens, what it tells the cells added to them, and the sum normalised."""

    own: Tensor
    """What the image gives the cells from here on, (h · w, C)."""

    voices: list[Tensor]
    """What ``_Cells.said`` is multiplied with to be ``_Cells.told`` from here on, (heads, d, C) each."""

    def __init__(
        self, attention: Any, norm: nn.LayerNorm, own: Tensor, place: Tensor, constant: Tensor, voices: list[Tensor]
    ) -> None:
        super().__init__(attention, attention.q_proj, own, place + constant)
        self._norm = norm
        # A head's shares sum to one, so each can bring its part of what all cells are told alike.
        alike = ((attention.out_proj.bias + constant) / self._heads).expand(self._heads, 1, -1)
        self._voice = torch.cat([attention.out_proj.weight.T.reshape(self._heads, -1, own.shape[1]), alike], 1)
        voices = [*voices, self._voice]
        own = own - own.mean(1, keepdim=True)
        self._own_variance = own.square().mean(1)
        self._covariances = [2 / own.shape[1] * (voice @ own.T) for voice in voices]
        self.own = own * norm.weight
        self.voices = [(voice - voice.mean(2, keepdim=True)) * norm.weight for voice in voices]

    def __call__(self, asking: Tensor, tokens: Tensor, cells: _Cells) -> _Cells:
        # Cell beside cell: a softmax over few numbers that lie side by side takes four times as long.
        shares = self._scores(self._attention.k_proj(asking), cells).softmax(2)
        says = F.pad(self._by_head(self._attention.v_proj(tokens)), (0, 1), value=1.0)
        said, mix = (*cells.said, says), torch.cat([cells.mix, shares.flatten(1, 2)], 1)
        told = torch.cat([cells.told, torch.einsum("nhtd,hdc->nhtc", says, self._voice).flatten(1, 2)], 1)
        told -= told.mean(2, keepdim=True)
        # The variance over a cell's channels, from its parts' variances and covariances.
        spread = (told @ told.transpose(1, 2) / told.shape[2]) @ mix
        each = spread.view(len(told), len(said), *shares.shape[1:])
        for i, (one, table) in enumerate(zip(said, self._covariances, strict=True)):
            each[:, i].addcmul_(torch.einsum("nhtd,hdp->nhtp", one, table), cells.factor[:, None, None])
        variance = spread.mul_(mix).sum(1).addcmul_(cells.factor.square(), self._own_variance)
        by = variance.clamp_(min=0).add_(self._norm.eps).rsqrt_()
        return _Cells(cells.factor * by, mix.mul_(by[:, None]), told.mul_(self._norm.weight), said)


def fitting_dtype(device: torch.device) -> torch.dtype:
    """What the encoder computes in: half as wide as float32 where the device is faster with that."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def frame_hw(height: int, width: int, frame_px: int) -> tuple[int, int]:
    """Rows and columns of SAM's frame that an image takes: its longer side all of them."""
    scale = frame_px / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resized_to(image_rgb: NDArray[np.uint8], frame_px: int) -> NDArray[np.uint8]:
    """The image so large that it fills SAM's frame, as the package's authors do it: Pillow's bilinear filter."""
    rows, columns = frame_hw(image_rgb.shape[0], image_rgb.shape[1], frame_px)
    if image_rgb.shape[:2] == (rows, columns):
        return image_rgb.copy()
    return np.array(Image.fromarray(image_rgb).resize((columns, rows), Image.Resampling.BILINEAR))


def stability(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """For each map of logits (K, h, w), the IoU of its shapes at a higher and a lower cut, (K,), 0…1."""
    inner = np.array([np.count_nonzero(one > STABILITY_OFFSET) for one in logits], np.float64)
    outer = np.array([np.count_nonzero(one > -STABILITY_OFFSET) for one in logits], np.float64)
    return np.asarray(inner / np.maximum(outer, 1))


def _tidied(
    logits: NDArray[np.float32], rows: NDArray[np.integer[Any]], columns: NDArray[np.integer[Any]]
) -> NDArray[np.float32]:
    """Probabilities without specks: patches stay that hold one of the pixels named, or are large beside the largest."""
    probabilities = cast("NDArray[np.float32]", 1 / (1 + cv2.exp(-np.clip(logits, -30, 30))))
    count, patches, stats, _ = cv2.connectedComponentsWithStats((logits > 0).astype(np.uint8), connectivity=4)
    if count <= 2:
        return probabilities
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = np.zeros(count, bool)
    kept[1:] = areas >= _LEAST_PATCH * areas.max()
    kept[patches[rows, columns]] = True
    kept[0] = True
    # Below one half by a hair, so that the outlines of neighbours at one half stay where they are.
    return np.where(kept[patches], probabilities, np.float32(0.49))


def build(state: Mapping[str, Tensor], source: str = "the checkpoint") -> Any:
    """The package's ``Sam`` that a checkpoint's tensors fit, its sizes read from their shapes. Raises BadWeights."""
    modeling, _ = _segment_anything()
    try:
        patch, pos = state["image_encoder.patch_embed.proj.weight"], state["image_encoder.pos_embed"]
        cells, embed_dim = pos.shape[1], pos.shape[3]
        frame_px, depth = cells * patch.shape[2], _count(state, "image_encoder.blocks")
        reaches = [state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape for i in range(depth)]
        is_global = [rows == 2 * cells - 1 for rows, _ in reaches]
        windows = {(rows + 1) // 2 for (rows, _), whole in zip(reaches, is_global, strict=True) if not whole}
        channels = state["image_encoder.neck.0.weight"].shape[0]
        encoder, decoder = "image_encoder.blocks.0", "mask_decoder"
        with torch.device("meta"):
            sam = modeling.Sam(
                image_encoder=modeling.ImageEncoderViT(
                    depth=depth,
                    embed_dim=embed_dim,
                    img_size=frame_px,
                    mlp_ratio=state[f"{encoder}.mlp.lin1.weight"].shape[0] / embed_dim,
                    norm_layer=_layer_norm,
                    num_heads=embed_dim // reaches[0][1],
                    patch_size=patch.shape[2],
                    qkv_bias=f"{encoder}.attn.qkv.bias" in state,
                    use_rel_pos=True,
                    global_attn_indexes=tuple(i for i, whole in enumerate(is_global) if whole),
                    window_size=max(windows, default=0),
                    out_chans=channels,
                ),
                prompt_encoder=modeling.PromptEncoder(
                    embed_dim=channels,
                    image_embedding_size=(cells, cells),
                    input_image_size=(frame_px, frame_px),
                    mask_in_chans=state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
                ),
                mask_decoder=modeling.MaskDecoder(
                    num_multimask_outputs=state[f"{decoder}.mask_tokens.weight"].shape[0] - 1,
                    transformer=modeling.TwoWayTransformer(
                        depth=_count(state, f"{decoder}.transformer.layers"),
                        embedding_dim=channels,
                        mlp_dim=state[f"{decoder}.transformer.layers.0.mlp.lin1.weight"].shape[0],
                        num_heads=_DECODER_HEADS,
                    ),
                    transformer_dim=channels,
                    iou_head_depth=_count(state, f"{decoder}.iou_prediction_head.layers"),
                    iou_head_hidden_dim=state[f"{decoder}.iou_prediction_head.layers.0.weight"].shape[0],
                ),
            )
        sam.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise BadWeights(f"{source} is no checkpoint of Segment Anything: {type(error).__name__} {reason}") from error
    sam.pixel_mean, sam.pixel_std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN_RGB, STD_RGB))
    return sam.eval()


def _layer_norm(channels: int) -> nn.LayerNorm:
    return nn.LayerNorm(channels, eps=1e-6)


def _count(state: Iterable[str], prefix: str) -> int:
    """How many modules a list of that name holds."""
    numbers = {int(name[len(prefix) + 1 :].split(".")[0]) for name in state if name.startswith(f"{prefix}.")}
    return len(numbers)


def encoded(encoder: Any, frame: Tensor) -> Tensor:
    """What the package's ``ImageEncoderViT`` makes of a frame (1, 3, S, S), (1, C, h, w); up to rounding the same."""
    x = encoder.patch_embed(frame)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    _, rows, columns, channels = x.shape
    x, window = x.float().reshape(-1, channels), 0
    for block in encoder.blocks:
        if block.window_size != window:
            # Window by window, the tokens that look at each other lie together: they need not be copied for it.
            order = _windows(rows, columns, block.window_size)[0].to(x.device)
            x = x[order] if window == 0 else _in_rows(x, rows, columns, window)[order]
            window = block.window_size
        _add(x, block.attn.proj, _looked_around(block.attn, block.norm1(x), (rows, columns), window))
        # Part by part, the widened tokens stay in the processor's cache.
        for part in x.split(_MLP_TOKENS if x.device.type == "cpu" else len(x)):
            _add(part, block.mlp.lin2, block.mlp.act(block.mlp.lin1(block.norm2(part))))
    x = _in_rows(x, rows, columns, window).view(1, rows, columns, channels)
    return cast(Tensor, encoder.neck(x.permute(0, 3, 1, 2)).float())


def _add(x: Tensor, layer: nn.Linear, y: Tensor) -> None:
    """Add layer(y) to x, with the product added while it is made where both are of one type."""
    if x.dtype == y.dtype and layer.bias is not None:
        x.add_(layer.bias).addmm_(y, layer.weight.T)
    else:
        x += layer(y)


@functools.lru_cache(maxsize=16)
def _windows(rows: int, columns: int, side: int) -> tuple[Tensor, tuple[tuple[int, int, int], ...]]:
    """Numbers of the tokens window by window, and count, rows and columns of windows of one size after the other.

    Windows at the edge have fewer rows or columns than ``side``; one window holds all where that is 0.
    """
    numbers = torch.arange(rows * columns).view(rows, columns)
    high, wide = side or rows, side or columns
    order, sizes = [], []
    for top, down, h in ((0, rows // high, high), (rows - rows % high, 1, rows % high)):
        for left, across, w in ((0, columns // wide, wide), (columns - columns % wide, 1, columns % wide)):
            if down * h * across * w:
                part = numbers[top : top + down * h, left : left + across * w].reshape(down, h, across, w)
                order.append(part.permute(0, 2, 1, 3).reshape(-1))
                sizes.append((down * across, h, w))
    return torch.cat(order), tuple(sizes)


def _in_rows(x: Tensor, rows: int, columns: int, window: int) -> Tensor:
    """Tokens (T, C) that lie window by window, row by row."""
    if not window:
        return x
    order = _windows(rows, columns, window)[0].to(x.device)
    return torch.empty_like(x).index_copy_(0, order, x)


def _looked_around(attention: Any, x: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """What attention makes of tokens (T, C), window by window, before its projection."""
    qkv = attention.qkv(x).view(len(x), 3, attention.num_heads, -1)
    seen = torch.empty_like(qkv[:, 0])
    first = 0
    for count, high, wide in _windows(*size, window)[1]:
        some = slice(first, first := first + count * high * wide)
        kv, key_hw = qkv[some, 1:], (window or high, window or wide)
        if (high, wide) != key_hw:
            # Windows reach over the edge: there the input is zero, and its projection the bias.
            padded = kv.new_zeros(count, *key_hw, *kv.shape[1:])
            if attention.qkv.bias is not None:
                padded += attention.qkv.bias.view(3, *kv.shape[2:])[1:]
            padded[:, :high, :wide] = kv.view(count, high, wide, *kv.shape[1:])
            kv = padded.flatten(0, 2)
        _attention(qkv[some, 0], kv, (high, wide), key_hw, attention, seen[some])
    return seen.flatten(1)


def _attention(
    q: Tensor, kv: Tensor, query_hw: tuple[int, int], key_hw: tuple[int, int], attention: Any, out: Tensor
) -> None:
    """Softmax attention with decomposed relative positions, of windows one after the other, into ``out``.

    q and out are (n · h · w, heads, c), kv is (n · H · W, 2, heads, c). The map of all against all is never held whole,
    only for some windows, or some heads or rows of one at a time.
    """
    (high, wide), (_, heads, channels) = query_hw, q.shape
    tokens, others = high * wide, math.prod(key_hw)
    n = len(q) // tokens
    asks = q.view(n, tokens, heads, channels).transpose(1, 2)
    keys, values = kv.view(n, others, 2, heads, channels).permute(2, 0, 3, 1, 4)
    seen = out.view(n, tokens, heads, channels).transpose(1, 2)
    most = max(_MAP_VALUES.get(q.device.type, 2**24), wide * others)
    rows = min(high, most // (wide * others))
    at_once = min(heads, max(1, most // (tokens * others)))
    windows = min(n, max(1, most // (heads * tokens * others)))
    room = q.new_empty(windows * at_once * rows * wide * others)
    for i, head in itertools.product(range(0, n, windows), range(0, heads, at_once)):
        some = np.s_[i : i + windows, head : head + at_once]
        near = _nearness(asks[some], query_hw, key_hw, attention) if attention.use_rel_pos else None
        for y in range(0, high, rows):
            part, bias = np.s_[:, :, y * wide : (y + rows) * wide], None
            if near is not None:
                rel_h, rel_w = (each[:, :, y : y + rows] for each in near)
                bias = room[: rel_h[..., 0].numel() * others].view(*rel_h.shape[:4], *key_hw)
                torch.add(rel_h[..., :, None], rel_w[..., None, :], out=bias)
                bias = bias.view(*rel_h.shape[:2], -1, others)
            seen[some][part] = F.scaled_dot_product_attention(
                asks[some][part], keys[some], values[some], attn_mask=bias, scale=attention.scale
            )


def _nearness(
    asks: Tensor, query_hw: tuple[int, int], key_hw: tuple[int, int], attention: Any
) -> tuple[Tensor, Tensor]:
    """What queries (n, heads, h · w, c) make of the rows and of the columns of keys: (n, heads, h, w, H), (…, W).

    Each query is multiplied with all distances at once. Those that it has to the rows are then a window on the product
    that moves on by one from row to row: a view with its own strides, nothing is copied.
    """
    n, heads, tokens, channels = asks.shape
    tables = [_distances(attention.rel_pos_h, key_hw[0]), _distances(attention.rel_pos_w, key_hw[1])]
    distances = torch.cat(tables).to(asks.dtype)
    by_head = asks.transpose(0, 1).reshape(heads, n * tokens, channels)
    all_of_them = torch.bmm(by_head, distances.T.expand(heads, -1, -1))
    each = len(distances)
    strides = [tokens * each, n * tokens * each, query_hw[1] * each, each, 1]
    row, column = (list(strides) for _ in range(2))
    row[2] -= 1
    column[3] -= 1
    shape = (n, heads, *query_hw)
    return (
        all_of_them.as_strided((*shape, key_hw[0]), row, key_hw[0] - 1),
        all_of_them.as_strided((*shape, key_hw[1]), column, 2 * key_hw[0] + key_hw[1] - 2),
    )


def _distances(table: Tensor, length: int) -> Tensor:
    """Relative positions (2 · length - 1, c) from the key furthest before a query to the one furthest after it."""
    if len(table) != 2 * length - 1:
        table = F.interpolate(table.T[None], size=2 * length - 1, mode="linear")[0].T
    return table.flip(0)


def _load_heads(
    path: Path, base_version: str, channels: int
) -> tuple[dict[str, SamHead], dict[str, tuple[float, ...]], str]:
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
        labels = [str(label) for label in json.loads(metadata.get("labels", "null"))]
    except OSError as error:
        raise BadWeights(f"{path} cannot be read, and a project's heads should be there: {error.strerror}") from error
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise BadWeights(f"{path} is damaged or holds no heads: {error}") from error
    if metadata.get("kind") != HEADS_KIND:
        raise BadWeights(f"{path} holds {metadata.get('kind', 'weights of an unnamed kind')}, not {HEADS_KIND}")
    if metadata.get("base") != base_version:
        raise BadWeights(
            f"{path} was trained on {metadata.get('base')}, and {base_version} is loaded; train the project again"
        )
    heads = {label: SamHead(channels) for label in labels}
    for i, (label, head) in enumerate(heads.items()):
        try:
            head.load_state_dict({name.split(".", 1)[1]: v for name, v in tensors.items() if name.startswith(f"{i}.")})
        except RuntimeError as error:
            raise BadWeights(f"{path} has no head for {label} that fits: {str(error).splitlines()[0]}") from error
    return heads, read_scoring(metadata, path), hashlib.sha256(content).hexdigest()[:8]
