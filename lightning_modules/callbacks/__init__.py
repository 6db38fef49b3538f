"""What happens around training: averages, learning rate, a last validation, records, pictures."""

from lightning_modules.callbacks.best_checkpoint import BestCheckpoint
from lightning_modules.callbacks.config_record import ConfigRecord
from lightning_modules.callbacks.diagnoses import Diagnoses
from lightning_modules.callbacks.early_stop import EarlyStop
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.final_validation import FinalValidation
from lightning_modules.callbacks.last_checkpoint import LastCheckpoint
from lightning_modules.callbacks.metrics_file import MetricsFile
from lightning_modules.callbacks.monitor import Monitor
from lightning_modules.callbacks.non_finite import NonFinite
from lightning_modules.callbacks.pictures import Pictures
from lightning_modules.callbacks.plateau import Plateau
from lightning_modules.callbacks.profile import Profile
from lightning_modules.callbacks.random_state import RandomState
from lightning_modules.callbacks.seen_images import SeenImages
from lightning_modules.callbacks.steps import Steps
from lightning_modules.callbacks.test_images import TestImages

__all__ = [
    "EMA",
    "BestCheckpoint",
    "ConfigRecord",
    "Diagnoses",
    "EarlyStop",
    "FinalValidation",
    "LastCheckpoint",
    "MetricsFile",
    "Monitor",
    "NonFinite",
    "Pictures",
    "Plateau",
    "Profile",
    "RandomState",
    "SeenImages",
    "Steps",
    "TestImages",
]
