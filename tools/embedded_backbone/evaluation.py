"""Stage 4: linear probes of the student, and of what it should beat or come near."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from timm.models.vision_transformer import VisionTransformer

from tools.embedded_backbone.encoding import IMAGENET_MEAN, IMAGENET_STD, encode
from tools.embedded_backbone.packages import Bytes, Folders, Labels
from tools.embedded_backbone.probes import PROBE_TRAIN, ProbeTask, build_tasks
from tools.embedded_backbone.teacher import load_teacher
from vpdeploy_train.embedded import vit_mini_patch8_64

Floats = npt.NDArray[np.float32]


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


def keep_teacher_tokens(folders: Folders, task: ProbeTask, seed: int) -> Floats:
    """Return the teacher's class tokens (n, 384) for a task, computed once."""
    path = folders.work / f"probe-{task.name}-seed{seed}.npy"
    if not path.exists():
        tokens = encode(load_teacher(folders), task.large, IMAGENET_MEAN, IMAGENET_STD)
        np.save(path, tokens[:, 0].numpy())
    kept: Floats = np.load(path)
    return kept


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
