"""Generated images beside their nearest real images in feature space, to detect copies."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dcgan.data.reader import ShardReader
from dist_dcgan.metrics.features import read_images, scored_samples


def beside_nearest(images: Tensor, fake: Tensor, real: Tensor, reader: ShardReader, count: int) -> Tensor:
    """Return rows of an image and its `count` nearest real images, uint8 (len(images) * (1 + count), 3, size, size).

    `fake` are the features of the images, `real` those of `scored_samples(reader, len(real))`.
    """
    samples = scored_samples(reader, len(real))
    nearest = torch.cdist(fake, real).topk(count, largest=False).indices
    rows = [
        torch.cat([image[None], read_images(reader, samples[found.numpy()])])
        for image, found in zip(images, nearest, strict=True)
    ]
    return torch.cat(rows)
