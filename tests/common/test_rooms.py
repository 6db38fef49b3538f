"""What a room exports, and what is said of a name that it does not have."""

import pytest

import datamodules
import lightning_modules
import networks
from common.errors import UserError
from common.rooms import look_up
from lightning_modules import processes


def test_rooms_export_what_can_be_chosen():
    assert set(networks.__all__) == {
        "Classifier",
        "CompactDermoSegDiff",
        "DeepLabV3",
        "DeepLabV3Plus",
        "DermoSegDiff",
        "LiteDermoSegDiff",
        "SmpNetwork",
        "UNet",
        "infer_reference_architecture",
        "load_reference_state_dict",
    }
    assert set(datamodules.__all__) >= {"HAM10000", "ISIC2018", "Synthetic", "edge_distance"}
    assert set(lightning_modules.__all__) == {
        "AuxiliaryHeads",
        "Classification",
        "ClassificationDistillation",
        "DiffusionSegmentation",
        "EdgeFocusedDistillation",
        "Segmentation",
        "SegmentationDistillation",
        "SelfSupervisedHead",
    }
    assert {"DDIM", "DDPM"} <= set(processes.__all__)
    assert "Sampler" not in processes.__all__


@pytest.mark.parametrize("name", ["DDPN", "predict_x0", "OBJECTIVES", "torch"])
def test_only_exported_classes_can_be_looked_up(name):
    assert look_up(processes, "DDPM", "sampler.name") is processes.DDPM
    with pytest.raises(UserError, match=rf"sampler.name={name} does not exist; .*DDPM"):
        look_up(processes, name, "sampler.name")
