"""Networks of segmentation_models.pytorch: the contract, weights, sizes, refusals by name."""

import ast
import inspect

import pytest
import torch
from safetensors.torch import save_file
from segmentation_models_pytorch import MODEL_ARCHITECTURES_MAPPING, encoders

from common.errors import UserError
from networks import SmpNetwork

VIT = {"encoder": "tu-vit_tiny_patch16_224", "options": {"img_size": 128}}
# PSPNet uses half of its encoder, DPT not its last norm and head.
IDLE = {
    "pspnet": ("model.encoder.layer3", "model.encoder.layer4"),
    "dpt": ("model.encoder.model.norm", "model.encoder.model.head"),
}


def test_preset(check_preset):
    check_preset("smp", 24_436_369, 1.953)


@pytest.mark.parametrize(
    ("architecture", "encoder", "sizes"),
    [
        ("Unet", "resnet18", [(32, 48), (21, 37)]),
        ("segformer", "mit_b0", [(32, 64), (64, 64)]),
        ("FPN", "tu-convnext_atto", [(32, 64), (64, 64)]),
    ],
)
def test_some_keep_the_contract(check_network, architecture, encoder, sizes):
    once = ("model.encoder", "model.decoder", "model.segmentation_head")
    check_network(lambda: SmpNetwork(architecture, encoder), *sizes, once=once)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODEL_ARCHITECTURES_MAPPING)
def test_every_architecture_keeps_the_contract(check_network, architecture):
    settings = VIT if architecture == "dpt" else {"encoder": "resnet18"}
    sizes = [(128, 128)] if architecture in ("dpt", "pan") else [(64, 96), (64, 64)]
    idle = IDLE.get(architecture, ())
    check_network(lambda: SmpNetwork(architecture, **settings), *sizes, idle=idle)


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoder",
    ["efficientnet-b0", "mobileone_s0", "densenet121", "tu-hrnet_w18_small", "tu-pvt_v2_b0"],
)
def test_encoders_that_are_built_in_other_ways_give_logits(encoder):
    network = SmpNetwork("Unet", encoder).eval()
    with torch.no_grad(), torch.device("meta"):
        shape_only = SmpNetwork("Unet", encoder).eval()(torch.empty(1, 3, 64, 64))
    assert shape_only.shape == network(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_options_reach_the_architecture_and_the_encoder_of_timm():
    with torch.device("meta"):
        shallow = SmpNetwork(
            "Unet", "resnet18", options={"encoder_depth": 3, "decoder_channels": [32, 16, 8]}
        )
        assert shallow.model.decoder.blocks[-1].conv1[0].out_channels == 8
        swin = SmpNetwork("Unet", "tu-swin_tiny_patch4_window7_224", options={"img_size": 64})
        assert swin.eval()(torch.empty(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_the_head_has_no_activation():
    for architecture in ("Unet", "DeepLabV3Plus", "Segformer"):
        with torch.device("meta"):
            head = SmpNetwork(architecture, "resnet18").model.segmentation_head
        assert isinstance(head[-1].activation, torch.nn.Identity)


def test_weights_fill_the_encoder(tmp_path, monkeypatch):
    published = encoders.get_encoder("resnet18").state_dict()
    path = tmp_path / "model.safetensors"
    save_file(published, path)
    asked = []

    def download(repository, filename, revision):
        asked.append((repository, filename))
        return str(path)

    monkeypatch.setattr(encoders, "hf_hub_download", download)
    network = SmpNetwork("Unet", "resnet18", weights="imagenet")
    assert ("smp-hub/resnet18.imagenet", "model.safetensors") in asked
    for key, value in network.model.encoder.state_dict().items():
        assert torch.equal(value, published[key]), key


def test_weights_of_timm_are_those_of_the_name(monkeypatch, recwarn):
    asked = {}

    def load(model, pretrained_cfg, **settings):
        asked.update({key: pretrained_cfg[key] for key in ("architecture", "tag")})

    monkeypatch.setattr("timm.models._builder.load_pretrained", load)
    SmpNetwork("Unet", "tu-resnet18.a1_in1k")
    assert asked == {}
    SmpNetwork("Unet", "tu-resnet18.a1_in1k", weights="imagenet")
    assert asked == {"architecture": "resnet18", "tag": "a1_in1k"}
    assert not [w for w in recwarn if "encoder_weights" in str(w.message)]


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (
            {"architecture": "FPN", "encoder": "resnet18"},
            (40, 64),
            "An image of 40x64 pixels does not fit FPN with encoder resnet18: height and width "
            "must be multiples of 32, such as 32x64.",
        ),
        (
            {"architecture": "DeepLabV3", "encoder": "resnet18"},
            (12, 4),
            "height and width must be multiples of 8, such as 16x8.",
        ),
        (
            {"architecture": "PAN", "encoder": "resnet18"},
            (32, 32),
            "does not fit PAN with encoder resnet18, which takes, of the common sizes, 128x128, ",
        ),
        (
            {"architecture": "Unet", "encoder": "tu-swin_tiny_patch4_window7_224"},
            (64, 64),
            "which takes, of the common sizes, 224x224. Many encoders of timm take others with "
            "network.kwargs.options.img_size=64.",
        ),
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_one_that_does(settings, size, message):
    network = SmpNetwork(**settings).eval()
    with pytest.raises(UserError) as caught:
        network(torch.randn(1, 3, *size))
    assert message in str(caught.value)


def test_an_error_that_is_not_about_the_size_is_left_alone():
    network = SmpNetwork("Unet", "resnet18").eval()

    def fail(module, inputs):
        if not inputs[0].is_meta:
            raise torch.OutOfMemoryError("full")

    network.model.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        network(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Unt", "resnet18"), "network.kwargs.architecture=unt does not exist; choose one of unet"),
        (
            ("Unet", "resnet35"),
            "network.kwargs.encoder=resnet35 does not exist; there are, among many, resnet",
        ),
        (("Unet", "tu-resnt18"), "among many, tu-resnet18"),
        (("Unet", "zzzzz"), "among many, resnet34, mit_b0, tu-convnext_atto"),
        (
            ("Unet", "resnet18", "coco"),
            "network.weights=coco does not exist; choose one of null, imagenet, ssl, swsl.",
        ),
        (("Unet", "tu-convnext_atto", "ssl"), "network.weights=ssl does not exist; choose one of"),
        (("Unet", "tu-resnet18.nothing", None), "Invalid pretrained tag"),
        (("Linknet", "mit_b0"), "Linknet with encoder mit_b0 cannot be built: "),
        (("DPT", "resnet18"), "cannot be built: Only Timm encoders are supported"),
        (("Unet", "tu-vit_tiny_patch16_224"), "Unsupported model downsampling pattern"),
        (("FPN", "resnet18", None, {"encoder_depth": 2}), "cannot be less than 3"),
        (
            ("Unet", "resnet18", None, {"img_size": 64}),
            "network.kwargs.options.img_size is not an option of Unet with encoder resnet18; it "
            "takes encoder_depth, decoder_use_norm,",
        ),
        (("Unet", "tu-resnet18", None, {"colour": 1}), "unexpected keyword argument 'colour'"),
        (("Unet", "resnet18", None, {"classes": 2}), "options.classes is not an option"),
        (("Unet", "tu-resnet18", None, {"aux_params": {}}), "options.aux_params is not an option"),
    ],
)
def test_what_does_not_exist_is_refused(arguments, message):
    with pytest.raises(UserError) as caught:
        SmpNetwork(*arguments)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_library_is_imported_only_where_it_is_used():
    at_import = ast.parse(inspect.getsource(inspect.getmodule(SmpNetwork))).body
    names = [node.module for node in at_import if isinstance(node, ast.ImportFrom)]
    names += [
        alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names
    ]
    assert "torch" in names
    assert not {"timm", "segmentation_models_pytorch"} & set(names)
