"""What the data is: one file a dataset family, plus splits, cache, transforms and edge distance.

Every datamodule that a module of this package lists in its `__all__` is exported here, so a new
dataset is one new file and one YAML that names it.
"""

import lightning as L

from common.rooms import export_public_names
from datamodules.edges import border_distance, edge_distance

__all__ = ["border_distance", "edge_distance"]
__all__ += export_public_names(__name__, __path__, globals(), base=L.LightningDataModule)
