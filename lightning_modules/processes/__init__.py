"""Noise schedules, the forward process, objectives and samplers. Knows no network and no data.

Every sampler that a module of this package lists in its `__all__` is exported here.
"""

from common.rooms import export_public_names
from lightning_modules.processes import samplers as _samplers
from lightning_modules.processes.noise import SampleNoise, stable_seed
from lightning_modules.processes.objectives import (
    OBJECTIVES,
    min_snr_weight,
    output_from_x0,
    predict_x0,
    training_target,
)
from lightning_modules.processes.schedule import NoiseSchedule, snr

__all__ = [
    "OBJECTIVES",
    "NoiseSchedule",
    "SampleNoise",
    "min_snr_weight",
    "output_from_x0",
    "predict_x0",
    "snr",
    "stable_seed",
    "training_target",
]
__all__ += export_public_names(__name__, __path__, globals(), base=_samplers.Sampler)
