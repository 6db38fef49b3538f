"""Masks and diagnoses that need no learning, as a floor for every score."""

import cv2
import numpy as np
import torch
from rich.progress import track
from torch.utils.data import Dataset

from lightning_modules.metrics import dice_score, overlap_counts

__all__ = ["best_constant_mask", "majority_baseline", "otsu_mask", "trivial_baselines"]


def otsu_mask(image: np.ndarray) -> np.ndarray:
    """Call the darker side of Otsu's threshold lesion.

    Args:
        image: `(3, H, W)` RGB, any range.

    Returns:
        bool `(H, W)`.
    """
    low, high = float(image.min()), float(image.max())
    scaled = (image - low) / max(high - low, 1e-6) * 255
    grey = cv2.cvtColor(scaled.transpose(1, 2, 0).astype(np.uint8), cv2.COLOR_RGB2GRAY)
    _, mask = cv2.threshold(grey, 0, 1, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
    return mask.astype(bool)


def best_constant_mask(masks: np.ndarray) -> np.ndarray:
    """Return the one mask that overlaps best with all given ones.

    Candidates are the level sets of the mean mask; the one of highest mean Dice is taken.

    Args:
        masks: {0, 1} `(N, H, W)`.

    Returns:
        bool `(H, W)`.
    """
    mean = masks.mean(axis=0, dtype=np.float64)
    candidates = [mean >= level for level in np.linspace(0.02, 0.98, 49)]
    return max(candidates, key=lambda mask: _mean_dice(np.broadcast_to(mask, masks.shape), masks))


def trivial_baselines(train_masks: np.ndarray, test: Dataset) -> dict[str, float]:
    """Return the mean Dice over the test images of Otsu's threshold and the best constant mask.

    Args:
        train_masks: {0, 1} `(N, S, S)`, on which the constant mask is chosen; without any, there
            is none.
        test: yields items with `image` and `mask`.
    """
    items = [test[0, index] for index in track(range(len(test)), "Trivial baselines")]
    truth = np.stack([item["mask"][0].numpy() for item in items])
    otsu = np.stack([otsu_mask(item["image"].numpy()) for item in items])
    scores = {"otsu": _mean_dice(otsu, truth)}
    if len(train_masks):
        constant = np.broadcast_to(best_constant_mask(train_masks), truth.shape)
        scores["constant"] = _mean_dice(constant, truth)
    return scores


def majority_baseline(train_labels: np.ndarray, test_labels: np.ndarray) -> dict[str, float]:
    """Return the balanced accuracy of the most frequent class of the training for every image.

    Args:
        train_labels, test_labels: classes as numbers, `(N,)` each; without labels of the training
            there is no such score.
    """
    if not len(train_labels):
        return {}
    majority = np.bincount(train_labels).argmax()
    present = np.unique(test_labels)
    return {"majority": float((present == majority).mean()) if len(present) else 0.0}


def _mean_dice(predictions: np.ndarray, masks: np.ndarray) -> float:
    counts = overlap_counts(
        torch.from_numpy(np.array(predictions))[:, None],
        torch.from_numpy(np.array(masks))[:, None],
    )
    return float(dice_score(counts).mean())
