"""Scores of images beside the ones that they should be: L1, PSNR, SSIM, sharpness. Sums over images, divided once."""

from __future__ import annotations

import torch
from torch import Tensor

from .evaluator import Totals

SMALLEST = 11  # pixels: the side of SSIM's window
LEAST_ERROR = 1e-10  # of the mean square, so that an image without error has 100 dB and not infinitely many


def totals(outputs: Tensor, truths: Tensor) -> Totals:
    """Sums over a batch of images and what they should be, both (B, C, H, W) in [-1, 1]."""
    with torch.autocast(outputs.device.type, enabled=False):
        made, true = (_unit(images) for images in (outputs, truths))
        error = made - true
        square = error.square().mean((1, 2, 3)).clamp(min=LEAST_ERROR)
        sums = {
            "l1": error.abs().mean((1, 2, 3)),
            "psnr": -10 * square.log10(),
            "detail": _laplacian(made),
            "true_detail": _laplacian(true),
            "count": torch.ones_like(square),
        }
        if made.shape[-1] >= SMALLEST:
            sums["ssim"] = _ssim(made, true)
    return {f"pairs/{name}": values.double().sum() for name, values in sums.items()}


def report(totals: Totals) -> dict[str, float]:
    """`l1` of pixels in [0, 1]; `psnr` in dB (the mean of the images' own); `ssim` (Wang et al. 2004) of images of 11
    pixels or more; `sharpness`: the mean absolute Laplacian over that of the truth, 1 is as sharp, less is blurred."""
    count = totals["pairs/count"]
    means = {
        name: float(totals[f"pairs/{name}"] / count) for name in ("l1", "psnr", "ssim") if f"pairs/{name}" in totals
    }
    return {**means, "sharpness": float(totals["pairs/detail"] / totals["pairs/true_detail"].clamp(min=1e-12))}


def _unit(images: Tensor) -> Tensor:
    wide = images if images.dtype == torch.float64 else images.float()
    return (wide / 2 + 0.5).clamp(0, 1)


def _laplacian(images: Tensor) -> Tensor:
    """The mean absolute difference of a pixel to the mean of its four neighbours, (B,)."""
    inner = images[:, :, 1:-1, 1:-1]
    around = images[:, :, :-2, 1:-1] + images[:, :, 2:, 1:-1] + images[:, :, 1:-1, :-2] + images[:, :, 1:-1, 2:]
    return (inner - around / 4).abs().mean((1, 2, 3))


def _ssim(made: Tensor, true: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim  # takes seconds

    values = ssim(made, true, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.view(len(made))
