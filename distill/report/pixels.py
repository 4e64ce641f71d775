"""Converts images of any range into displayable pictures."""

from torch import Tensor


def clip_outliers(images: Tensor) -> Tensor:
    """Clamps values to the mean ± 2.5 standard deviations of the whole tensor, as in published pictures."""
    mean, std = images.mean(), images.std()
    return images.clamp(mean - 2.5 * std, mean + 2.5 * std)


def scaled_bytes(images: Tensor) -> Tensor:
    """[n, C, H, W] of any range → bytes, each image scaled to its own range."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return ((images - low) / (high - low).clamp(min=1e-8) * 255).round().byte()
