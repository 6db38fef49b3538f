"""What happens around training: moving average, a last validation, records and pictures."""

from lightning_modules.callbacks.config_record import ConfigRecord
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.final_validation import FinalValidation
from lightning_modules.callbacks.pictures import Pictures
from lightning_modules.callbacks.test_images import TestImages

__all__ = ["EMA", "ConfigRecord", "FinalValidation", "Pictures", "TestImages"]
