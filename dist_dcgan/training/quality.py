"""How good the averaged generator's images are, every so many images, and the best generator kept apart."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dcgan.config import QualityOptions
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.distributed import from_rank_zero
from dist_dcgan.metrics.extractors import INSTALL, Extractor, load_extractor, missing_packages
from dist_dcgan.metrics.features import extract, real_features, to_pixels
from dist_dcgan.metrics.quality import kid_name, quality
from dist_dcgan.training.ema import recompute_statistics, sample_images
from dist_dcgan.training.export import export_generator, is_finite
from dist_dcgan.training.notices import warn
from dist_dcgan.training.run_directory import RunDirectory
from dist_dcgan.training.train_state import TrainState


class QualityMeter:
    """Scores the averaged generator against the training data: all ranks extract features, rank 0 compares."""

    def __init__(self, state: TrainState, reader: ShardReader, run: RunDirectory) -> None:
        """Load the extractor; raises UserError where its package or weights are missing."""
        self._state, self._reader, self._run = state, reader, run
        reached = state.plan.total_steps * state.plan.global_batch >= state.config.quality.every_images
        self._extractor = _load(state.config.quality, state.world.device) if reached else None

    def read(self) -> dict[str, float]:
        """Return the scores, equal on all ranks, where the last step passed a multiple of `every_images`; else none."""
        state, options = self._state, self._state.config.quality
        if self._extractor is None or not state.passed(options.every_images):
            return {}
        extractor = self._extractor
        if not is_finite(state.generator_ema):  # on all ranks alike; the watchdog says so
            return {}
        recompute_statistics(state.generator_ema, state.config, state.world.device, state.dtype)

        def draw(slots: range) -> Tensor:
            return to_pixels(sample_images(state.generator_ema, state.config, slots, state.world.device, "quality"))

        real = real_features(self._reader, extractor, options.reals, state.world)
        fake = extract(draw, options.fakes, extractor, state.world)
        scores, state.best_kid = from_rank_zero(lambda: self._judge(real, fake, extractor))
        return scores

    def _judge(self, real: Tensor, fake: Tensor, extractor: Extractor) -> tuple[dict[str, float], float | None]:
        """Return the scores and the lowest kernel distance so far; its generator is exported beside the latest."""
        state = self._state
        try:
            found = quality(real, fake, extractor)
        except Exception as error:  # no convergence, no memory, ...: a score is no reason to stop
            warn(f"images of step {state.step} are not scored: {error!r}")
            return {}, state.best_kid
        scores = {f"quality/{name}": value for name, value in found.items()}
        kid = scores[f"quality/{kid_name(extractor)}"]
        if not kid < (float("inf") if state.best_kid is None else state.best_kid):  # not where it is NaN either
            return scores, state.best_kid
        try:
            size = self._reader.manifest.image_size
            export_generator(self._run.best, state.generator_ema, state.config, size, state.step, scores)
        except OSError as error:  # a full disk is no reason to stop
            warn(f"the best generator so far is not kept: {error}")
            return scores, state.best_kid
        return scores, kid


def _load(options: QualityOptions, device: torch.device) -> Extractor | None:
    """Return the extractor that the configuration asks for, None where none is to be had or wanted."""
    if options.extractor == "none":
        return None
    name = options.extractor
    if name == "auto":
        if not from_rank_zero(_installed):  # rank 0 decides, so that all ranks take part or none does
            return None
        name = "efficientnet-lite0"
    return load_extractor(name, options.weights, device)


def _installed() -> bool:
    """Return whether the packages of the `eval` extra are there; says so where they are not."""
    missing = missing_packages()
    if missing:
        warn(f"images are not scored for want of {', '.join(missing)}: {INSTALL} brings what is missing")
    return not missing
