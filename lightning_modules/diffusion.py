"""Plain denoising diffusion of lesion masks, for a teacher or a student without a teacher."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.losses import (
    WeightedSum,
    boundary_loss,
    edge_closeness,
    huber_loss,
    l1_loss,
    l2_loss,
)
from lightning_modules.masks import MaskModule
from lightning_modules.processes import (
    NoiseSchedule,
    SampleNoise,
    min_snr_weight,
    predict_x0,
    snr,
    stable_seed,
    training_target,
)
from lightning_modules.processes.samplers import Sampler

__all__ = ["DiffusionSegmentation"]


class DiffusionSegmentation(MaskModule):
    """Learns to denoise lesion masks given the photograph, and samples masks from noise.

    Batches follow the project's contract; masks of {0, 1} become signals of {-1, 1} here and
    nowhere else. Source: Bozorgpour et al., "DermoSegDiff", 2023.

    Args:
        network: `network(x_t, image, t)` returning `(B, 1, H, W)`.
        schedule: noise schedule of training and sampling.
        sampler: how masks are drawn in validation and test.
        losses: term name to `{weight, **options}`, see `WeightedSum`.
        optimizer: `{name, lr, **arguments}`, see `build_optimizer`.
        objective: what the network predicts, `noise` (published), `x0` or `v`.
        t_min: smallest time step that is trained, 1 as published or 0.
        pure_noise_share: share of the samples that are trained at the last time, pure noise, which
            is the only one at which a mask in one step calls the network; 0 as published.
        min_snr_gamma: of `min_snr_weight` on the terms l1, l2 and huber; none weighs all times
            alike, as published.
        seed: of training noise (with step and rank) and sampling noise (with id and member).
        validation: `num_images` on which masks are sampled, `ensemble` samples each, and
            `num_timesteps`, the size of the grid of times on which `val/loss` is taken.
        metrics: arguments of `SegmentationScores`, by which it is tested.

    Raises:
        UserError: an argument is outside its range.
    """

    loss_functions: ClassVar[dict[str, Callable[..., Tensor]]] = {
        "l1": l1_loss,
        "l2": l2_loss,
        "huber": huber_loss,
        "boundary": boundary_loss,
    }
    kind: ClassVar[str] = "diffusion"
    # What the loss terms call the network's output.
    output_names: ClassVar[tuple[str, ...]] = ("prediction",)
    loss_inputs: ClassVar[tuple[str, ...]] = (
        *output_names,
        "target",
        "edge_distance",
        "mask",
        "closeness",
        "t",
        "num_timesteps",
        "time_weight",
        "x0",
    )

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        sampler: Sampler,
        losses: Mapping[str, Mapping[str, Any]],
        optimizer: Mapping[str, Any],
        validation: Mapping[str, int],
        objective: str = "noise",
        t_min: int = 1,
        pure_noise_share: float = 0.0,
        min_snr_gamma: float | None = None,
        seed: int = 0,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(network, losses, optimizer, metrics)
        if not 0 <= t_min < schedule.num_timesteps:
            raise UserError(
                f"lightning_module.t_min={t_min} must lie in [0, {schedule.num_timesteps})."
            )
        if not 0 <= pure_noise_share <= 1:
            raise UserError(
                f"lightning_module.pure_noise_share={pure_noise_share} must lie in [0, 1]."
            )
        for key, value in validation.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"lightning_module.validation.{key}={value} must be a whole number, at least 1."
                )
        # Converting zeros refuses an unknown objective before anything is trained.
        probe = torch.zeros(1, 1, 1, 1)
        training_target(schedule, objective, probe, probe, torch.zeros(1, dtype=torch.int64))
        sampler.timesteps(schedule)
        if sampler.num_steps == 1 and objective == "noise":
            gain = float(snr(schedule, torch.tensor(schedule.num_timesteps - 1)) ** -0.5)
            raise UserError(
                "sampler.num_steps=1 needs lightning_module.objective=x0 or v: the only call is at "
                f"pure noise, where a network that predicts noise has its error multiplied by "
                f"{gain:.0f} in the mask. Take more steps."
            )
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise UserError(
                f"lightning_module.min_snr_gamma={min_snr_gamma} must be above 0, or null."
            )
        self.schedule = schedule
        self.sampler = sampler
        self.validation = dict(validation)
        self.objective = objective
        self.t_min = t_min
        self.pure_noise_share = pure_noise_share
        self.min_snr_gamma = min_snr_gamma
        self.seed = seed
        self._val_images_seen = 0

    @property
    def calls_per_mask(self) -> int:
        """Network calls that one predicted mask costs."""
        return self.sampler.calls_per_mask

    def network_calls(self, num_val: int, num_test: int) -> tuple[int, int]:
        """Return how many single-image network calls one validation and the test make.

        Both also take their loss from one call an image.
        """
        sampled = min(num_val, self.validation["num_images"])
        steps, members = self.sampler.num_steps, self.validation["ensemble"]
        loss_calls = num_test if self.test_terms else 0
        return num_val + sampled * steps * members, num_test * self.calls_per_mask + loss_calls

    def diffusion_losses(
        self, batch: Mapping[str, Any], t: Tensor, noise: Tensor, losses: WeightedSum | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss and its terms at given times and noise.

        Args:
            batch: with `image`, `mask` and `edge_distance`.
            t: integer times `(B,)`.
            noise: standard normal `(B, 1, H, W)`.
            losses: the terms, by default those of the next training step.
        """
        losses = losses or self.training_terms()
        mask = batch["mask"]
        x0 = mask * 2 - 1
        x_t = self.schedule.q_sample(x0, t, noise)
        # Before the network is called: its graph need not be held meanwhile.
        extra = self.extra_loss_inputs(losses, batch, x_t, t)
        output = self.network(x_t, batch["image"], t).float()
        inputs = {
            **dict.fromkeys(self.output_names, output),
            "target": training_target(self.schedule, self.objective, x0, noise, t),
            "edge_distance": batch["edge_distance"],
            "mask": mask,
            "t": t,
            "num_timesteps": self.schedule.num_timesteps,
            "time_weight": self._time_weight(t),
            **extra,
        }
        if losses.needs("closeness"):
            inputs["closeness"] = edge_closeness(batch["edge_distance"], mask)
        if losses.needs("x0"):
            inputs["x0"] = predict_x0(self.schedule, self.objective, output, x_t, t)
        with torch.autocast(self.device.type, enabled=False):
            return losses(**inputs)

    def training_terms(self) -> WeightedSum:
        """Return the loss terms of the training step that is next, all by default."""
        return self.losses

    def _time_weight(self, t: Tensor) -> Tensor | None:
        if self.min_snr_gamma is None:
            return None
        return min_snr_weight(self.schedule, self.objective, t, self.min_snr_gamma)

    def extra_loss_inputs(
        self,
        losses: WeightedSum,
        batch: Mapping[str, Any],
        x_t: Tensor,
        t: Tensor,
    ) -> dict[str, Any]:
        """Return what the loss terms of a subclass need beyond `loss_inputs` of this class."""
        return {}

    def fixed_losses(
        self, batch: Mapping[str, Any], purpose: str, losses: WeightedSum | None = None
    ) -> dict[str, Tensor]:
        """Return the loss and its terms at times and noise that depend on each sample's id alone.

        Args:
            batch: with `image`, `mask`, `edge_distance` and `id`.
            purpose: name of the stream of noise.
            losses: the terms, all by default.
        """
        ids = batch["id"]
        noise = SampleNoise(self.seed, ids, purpose, batch["mask"].shape[1:], self.device)()
        losses = losses or self.losses
        loss, terms = self.diffusion_losses(batch, self._grid_times(ids), noise, losses)
        return {"loss": loss, **terms}

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        # Noise is a function of seed, step and rank: resuming needs no generator state, and
        # nothing else that draws random numbers can change the training.
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        generator = torch.Generator(self.device)
        generator.manual_seed(stable_seed(self.seed, "train", step, self.global_rank))
        mask = batch["mask"]
        t = torch.randint(
            self.t_min,
            self.schedule.num_timesteps,
            (len(mask),),
            generator=generator,
            device=self.device,
        )
        noise = torch.randn(mask.shape, generator=generator, device=self.device)
        if self.pure_noise_share:
            chosen = torch.rand(len(mask), generator=generator, device=self.device)
            t = t.masked_fill(chosen < self.pure_noise_share, self.schedule.num_timesteps - 1)
        loss, terms = self.diffusion_losses(batch, t, noise)
        self.log_training(loss, terms, len(mask))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._val_images_seen = 0

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        count = len(batch["id"])
        self.val_losses.update(self.fixed_losses(batch, "val"), count)
        sampled = self._leading_images(count)
        if not sampled:
            return {}
        part = {key: value[:sampled] for key, value in batch.items()}
        result = self.predict(part, ensemble=self.validation["ensemble"])
        self.score_validation(result, part)
        return result

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        if self.test_terms is not None:
            losses = self.fixed_losses(batch, "test", self.test_terms)
            self.test_losses.update(losses, len(batch["id"]))
        result = self.predict(batch)
        return {**result, "per_image": self.score_test(result, batch)}

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any], ensemble: int | None = None) -> dict[str, Tensor]:
        """Sample masks for a batch.

        The raw samples of all members are averaged as they come; the lesion is where the mean is
        above 0, which is where `probability` is above 0.5.

        Args:
            batch: with `image` and `id`; nothing else is read.
            ensemble: members, the sampler's own number by default.

        Returns:
            `probability` float32 `(B, 1, H, W)`, the mean sample mapped from [-1, 1] to [0, 1];
            with more than one member also `uncertainty`, the standard deviation over the members'
            samples on the same scale.
        """
        image, ids = batch["image"], batch["id"]
        shape = (1, *image.shape[-2:])
        members = ensemble or self.sampler.ensemble
        streams = [
            SampleNoise(self.seed, ids, member, shape, image.device) for member in range(members)
        ]
        return self.predict_from(image, streams)

    def predict_from(
        self, image: Tensor, streams: Sequence[Callable[[], Tensor]]
    ) -> dict[str, Tensor]:
        """Sample masks from noise that is given.

        Args:
            image: `(B, 3, H, W)`, normalised.
            streams: for each member, a function that returns fresh noise `(B, 1, H, W)`.

        Returns:
            As `predict`.
        """
        members = len(streams)
        mean = torch.zeros_like(image[:, :1], dtype=torch.float32)
        squares = torch.zeros_like(mean)
        # What a network computes from the image alone serves all steps and members.
        guidance = getattr(self.network, "guidance", None)
        features = None if guidance is None else guidance(image)
        at_once = self.sampler.members_at_once or (members if image.is_cuda else 1)
        for first in range(0, members, at_once):
            samples = self._sample(image, features, streams[first : first + at_once])
            for offset, sample in enumerate(samples):
                difference = sample - mean
                mean = mean + difference / (first + offset + 1)
                squares = squares + difference * (sample - mean)
        result = {"probability": (mean.clamp(-1, 1) + 1) / 2}
        if members > 1:
            result["uncertainty"] = (squares / members).sqrt() / 2
        return result

    def _sample(
        self,
        image: Tensor,
        features: Sequence[Tensor] | None,
        streams: Sequence[Callable[[], Tensor]],
    ) -> list[Tensor]:
        """Return one sample `(B, 1, H, W)`, float32, for each stream of noise.

        Args:
            image: as in `predict_from`.
            features: what the network's `guidance` makes of the image, none for other networks.
            streams: as in `predict_from`.
        """
        if features is None:
            network, condition = self.network, torch.cat([image] * len(streams))
        else:
            network = self.network.denoiser
            condition = [torch.cat([feature] * len(streams)) for feature in features]

        def denoise(x_t: Tensor, t: int) -> Tensor:
            # Of `len` a tracer would keep the number.
            times = torch.full(x_t.shape[:1], t, device=x_t.device)
            # The noise has float32, the network the precision of its images.
            output = network(x_t.to(image.dtype), condition, times)
            return predict_x0(self.schedule, self.objective, output, x_t, times)

        def draw() -> Tensor:
            return torch.cat([stream() for stream in streams])

        samples = self.sampler.sample(denoise, self.schedule, draw).float()
        return list(samples.unflatten(0, (len(streams), -1)).unbind())

    def _grid_times(self, ids: list[str]) -> Tensor:
        """Return one time of the fixed validation grid for each sample, chosen by its id."""
        low, high = self.t_min, self.schedule.num_timesteps - 1
        size = self.validation["num_timesteps"]
        grid = torch.linspace(low, high, size).round().long()
        picks = [stable_seed("val grid", sample) % size for sample in ids]
        return grid[picks].to(self.device)

    def _leading_images(self, count: int) -> int:
        """Return how many of the next `count` validation images belong to the sampled subset.

        The validation order is fixed and dealt out to the processes in turn, so the subset is the
        same images whatever the number of processes.
        """
        world, rank = self.trainer.world_size, self.global_rank
        total = self.validation["num_images"]
        mine = (total - rank + world - 1) // world
        leading = max(0, min(count, mine - self._val_images_seen))
        self._val_images_seen += count
        return leading
