"""Pure `nn.Module`s: no loss, no noise schedule, no file access.

Every network class that a module of this package lists in its `__all__` is exported here, so a new
network is one new file and one YAML that names it. How it is called says what it is for:
`forward(x_t, image, t)` denoises masks, `forward(image)` outlines lesions, or diagnoses them if the
network says of how many classes by `num_classes`.
"""

from torch import nn

from common.rooms import export_public_names
from networks.reference_weights import infer_reference_architecture, load_reference_state_dict

__all__ = ["infer_reference_architecture", "load_reference_state_dict"]
__all__ += export_public_names(__name__, __path__, globals(), base=nn.Module)
