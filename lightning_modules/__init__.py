"""How a network learns: one file a method, each handed its network and never importing one.

Every LightningModule that a module of this package lists in its `__all__` is exported here, so a
new method is one new file and one YAML that names it.
"""

import lightning as L

from common.rooms import export_public_names

__all__: list[str] = []
__all__ += export_public_names(__name__, __path__, globals(), base=L.LightningModule)
