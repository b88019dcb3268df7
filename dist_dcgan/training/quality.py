"""How good the averaged generator's images are, every so many images, and the best generator kept apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from dist_dcgan.config import QualityOptions
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.distributed.collectives import from_rank_zero
from dist_dcgan.distributed.world import World
from dist_dcgan.drawing import to_pixels
from dist_dcgan.metrics.extractors import INSTALL, Extractor, load_extractor, missing_packages
from dist_dcgan.metrics.features import extract, real_features
from dist_dcgan.metrics.quality import kid_name, quality
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.export import export_generator, is_finite
from dist_dcgan.training.ema import recompute_statistics, sample_images
from dist_dcgan.training.train_state import TrainState
from shards.common.messages import tell, warn

SHARE_ON_GPU = 0.03


class TimeShare:
    """Tells whether something may be done again, as long as it takes no more than a share of the time.

    The first time is always allowed: its cost is not known. Each later one is expected to cost what the last did.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`share` is in (0, 1]; 1 allows it always."""
        self.share, self._clock = share, clock
        self._cost, self._ended = 0.0, clock()

    def allows(self) -> bool:
        """Return whether the next one would keep to the share of the time since the last one ended, itself included."""
        return self._cost <= self.share * (self._clock() - self._ended + self._cost)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Measure what the block costs."""
        began = self._clock()
        yield
        self._ended = self._clock()
        self._cost = self._ended - began


class QualityMeter:
    """Scores the averaged generator against the training data: all ranks extract features, rank 0 compares."""

    def __init__(
        self, state: TrainState, reader: ShardReader, run: RunDirectory, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Load the extractor; raises UserError if its package or weights are missing."""
        self._state, self._reader, self._run = state, reader, run
        options = state.config.quality
        reached = state.plan.total_steps * state.plan.global_batch >= options.every_images
        self.extractor = _load(options, state.world) if reached else None
        """None: images are not scored."""
        share = options.time_share or (SHARE_ON_GPU if state.world.device.type == "cuda" else 1.0)
        self._time, self._told = TimeShare(share, clock), False

    def read(self) -> dict[str, float]:
        """Return the scores, equal on all ranks, if the last step passed a multiple of `every_images`.

        Empty otherwise, and if the generator is not finite or scores would take more than their share of the time.
        """
        state = self._state
        if self.extractor is None or not state.passed(state.config.quality.every_images):
            return {}
        if not is_finite(state.generator_ema):  # on all ranks alike; the watchdog says so
            return {}
        if self._time.share < 1 and not from_rank_zero(self._has_time, state.world.slow_group):
            return {}
        return self._score(self.extractor)

    def _has_time(self) -> bool:
        allowed = self._time.allows()
        if not (allowed or self._told):
            share = f"{self._time.share:.0%} of the time"
            tell(f"a score is left out, as scores may take {share}: --quality.time-share 1 leaves out none")
            self._told = True
        return allowed

    def _score(self, extractor: Extractor) -> dict[str, float]:
        """Return the scores; ranks wait for each other in the slow group, whose timeout is long."""
        state, options = self._state, self._state.config.quality

        def draw(slots: range) -> Tensor:
            return to_pixels(sample_images(state.generator_ema, state.config, slots, state.world.device, "quality"))

        real = real_features(self._reader, extractor, options.reals, state.world)
        self._reader.close()  # they are cached: a shard that a cache evicts later takes no space
        with self._time.spending():  # without the real images: only the first score extracts their features
            recompute_statistics(state.generator_ema, state.config, state.world.device, state.dtype)
            fake = extract(draw, options.fakes, extractor, state.world)
            network = f"{extractor.name} {extractor.weights_sha256}"
            if state.best_kid_extractor not in (network, None):  # two networks' distances do not compare
                state.best_kid = None
            state.best_kid_extractor = network
            scores, state.best_kid = from_rank_zero(lambda: self._judge(real, fake, extractor), state.world.slow_group)
        return scores

    def _judge(self, real: Tensor, fake: Tensor, extractor: Extractor) -> tuple[dict[str, float], float | None]:
        """Return the scores and the lowest kernel distance so far; its generator is exported beside the latest."""
        state = self._state
        try:
            found = quality(real, fake, extractor, state.world.device)
        except Exception as error:  # no convergence, no memory, ...: a score is no reason to stop
            warn(f"images of step {state.step} are not scored: {error!r}")
            return {}, state.best_kid
        scores = {f"quality/{name}": value for name, value in found.items()}
        kid = scores[f"quality/{kid_name(extractor)}"]
        if not kid < (float("inf") if state.best_kid is None else state.best_kid):  # also false for NaN
            return scores, state.best_kid
        try:
            size = self._reader.manifest.image_size
            export_generator(self._run.best, state.generator_ema, state.config, size, state.step, scores)
        except OSError as error:  # a full disk is no reason to stop
            warn(f"the best generator so far is not kept: {error}")
            return scores, state.best_kid
        return scores, kid


def _load(options: QualityOptions, world: World) -> Extractor | None:
    """Return the extractor that the configuration asks for, None if it is disabled or not installed."""
    if options.extractor == "none":
        return None
    name = options.extractor
    if name == "auto":
        if not from_rank_zero(_installed, world.slow_group):  # rank 0 decides, so that all ranks take part or none does
            return None
        name = "efficientnet-lite0"
    return load_extractor(name, options.weights, world.device)


def _installed() -> bool:
    """Return whether the packages of the `eval` extra are installed; warns if not."""
    missing = missing_packages()
    if missing:
        warn(f"images are not scored for want of {', '.join(missing)}: {INSTALL} brings what is missing")
    return not missing
