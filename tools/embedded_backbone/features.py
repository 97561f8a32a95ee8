"""Stage 1: views, and what the teacher makes of them."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.embedded_backbone.encoding import IMAGENET_MEAN, IMAGENET_STD, encode
from tools.embedded_backbone.gallery import Gallery, open_gallery
from tools.embedded_backbone.packages import Bytes, Folders
from tools.embedded_backbone.teacher import load_teacher
from tools.embedded_backbone.views import CHUNK, draw_views

PATCH_TARGETS: Final = 128

# What the process that draws views holds; empty in every other process.
BOUND: Final[list[tuple[Gallery, int]]] = []


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


def fit_components(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the main directions of patch tokens (n, 64, D): mean (D,), basis (D, 128) and one scale ()."""
    rows = patches.flatten(0, 1).double()
    mean = rows.mean(0)
    basis = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors[:, -PATCH_TARGETS:]
    return mean.float(), basis.float(), ((rows - mean) @ basis).std().float()


def read_features(folder: Path, views: int) -> tuple[Bytes, Tensor, Tensor]:
    """Read inputs (n, 64, 64, 3), standardised class tokens (n, 384) and reduced patch tokens (n, 64, 128)."""
    chunks = [np.load(folder / f"{start:06d}.npz") for start in range(0, views, CHUNK)]
    token = torch.from_numpy(np.concatenate([chunk["token"] for chunk in chunks])[:views]).float()
    patches = torch.from_numpy(np.concatenate([chunk["patches"] for chunk in chunks])[:views])
    small = np.concatenate([chunk["small"] for chunk in chunks])[:views]
    return small, (token - token.mean(0)) / token.std(0), patches
