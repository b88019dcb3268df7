"""Inputs of a training step other than images: scalars on the device, filled before the step.

A captured CUDA graph repeats each kernel with the arguments that it had at capture. A Python number would therefore be
the same in every replay; a tensor is read again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dcgan.config import Config
from dist_dcgan.random_streams import set_key, stream_seed
from dist_dcgan.training.ema import ema_decay

NOISE_STREAMS = ("noise on real", "noise on fake", "noise under G")


class StepInputs:
    """Keys of the random streams that `config` uses, int64, and the weight of new parameters in the EMA, float32."""

    def __init__(self, config: Config, global_batch: int, device: torch.device) -> None:
        self._config, self._global_batch = config, global_batch
        streams = ["z"]
        streams += ["flip"] if config.data.random_flip else []
        streams += NOISE_STREAMS if config.noise.sigma > 0 else []
        self.keys = {stream: torch.zeros((), dtype=torch.int64, device=device) for stream in streams}
        self.ema_weight: Tensor = torch.zeros((), dtype=torch.float32, device=device)

    def fill(self, step: int) -> None:
        """Set the inputs of `step`, counted from 0, without host copies or synchronisation."""
        for stream, key in self.keys.items():
            set_key(key, stream_seed(self._config.seed, stream, step))
        images_seen = (step + 1) * self._global_batch
        self.ema_weight.fill_(1 - ema_decay(self._config, images_seen, self._global_batch))
