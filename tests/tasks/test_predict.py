"""Photographs of every kind become masks of their own size; what cannot be read is reported."""

import csv

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.geometry import restore
from datamodules.decoding import read_image
from datamodules.synthetic import synthesise_lesion
from datamodules.transforms import normalise, resize_image
from lightning_modules import DiffusionSegmentation
from tasks import predict as predict_task
from tasks.build import build_module
from tasks.checkpoints import load_checkpoint, network_from_checkpoint

QUICK = ("trainer.accelerator=cpu", "num_workers=0", "trainer.enable_progress_bar=false")


@pytest.fixture
def predict(make_config, make_checkpoint, tmp_path):
    """Predicts `photos` with a network that has just been made; returns the rows by name."""
    checkpoint = make_checkpoint()

    def run(*overrides, source=tmp_path / "photos", output="masks"):
        config = make_config(
            "task=predict",
            f"checkpoint={checkpoint}",
            f'input="{source}"',
            f"output={tmp_path / output}",
            *QUICK,
            *overrides,
        )
        predict_task.run(config)
        return rows_in(tmp_path / output)

    return run


def rows_in(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def photos(tmp_path):
    """A folder of four photographs of different sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, size in enumerate([(192, 144), (90, 120), (64, 64), (301, 77)]):
        image, _ = synthesise_lesion(0, index)
        Image.fromarray(image).resize(size).save(folder / f"photo_{index}.jpg")
    return folder


def test_every_photograph_gets_four_pictures_and_a_row(photos, predict, tmp_path):
    (photos / "notes.txt").write_text("no photograph")
    (photos / ".DS_Store").write_bytes(b"nor this")
    (photos / "photo_0_superpixels.png").write_bytes(b"nor that")
    rows = predict()
    assert sorted(rows) == [f"photo_{i}" for i in range(4)]
    for name, row in rows.items():
        with Image.open(photos / f"{name}.jpg") as image:
            size = image.size
        mask, chance, unsure = (
            picture(tmp_path / "masks" / f"{name}_{kind}.png")
            for kind in ("mask", "probability", "uncertainty")
        )
        overlay = picture(tmp_path / "masks" / f"{name}_overlay.jpg")
        assert mask.shape == chance.shape == unsure.shape == overlay.shape[:2] == size[::-1]
        assert set(np.unique(mask)) <= {0, 255}
        # Rounding to grey levels may hide a pixel on either side of the threshold.
        assert (((chance > 127.5) * 255) == mask).mean() > 0.99
        assert (int(row["width"]), int(row["height"])) == size
        assert int(row["lesion_pixels"]) == (mask > 0).sum()
        assert float(row["lesion_fraction"]) == pytest.approx((mask > 0).mean(), abs=1e-5)
        expected = np.sqrt(chance / 255 * (1 - chance / 255))
        assert np.abs(unsure / 510 - expected).mean() < 0.02
        assert float(row["mean_uncertainty"]) == pytest.approx(unsure.mean() / 510, abs=0.01)
        assert float(row["seconds"]) > 0
        assert row["error"] == ""


def test_the_mask_is_what_the_module_predicts_for_the_id(
    photos, predict, make_checkpoint, tmp_path
):
    predict(source=photos / "photo_2.jpg")
    checkpoint = load_checkpoint(tmp_path / "made.ckpt")
    network = network_from_checkpoint(checkpoint, "made.ckpt", "ema", "checkpoint")
    module = build_module(checkpoint["config"], network)
    size = checkpoint["config"]["datamodule"]["image_size"]
    square = resize_image(read_image(photos / "photo_2.jpg"), size, antialias=True)
    image = normalise(square, "minmax", train=False)[None]
    expected = module.predict({"image": image, "id": ["photo_2"]})["probability"]
    whole = restore(expected[0], (64, 64))[0].numpy()
    chance = picture(tmp_path / "masks" / "photo_2_probability.png") / 255
    assert np.abs(chance - whole).max() < 0.02


def test_batch_order_and_company_change_nothing(photos, predict, tmp_path):
    predict("sampler.ensemble=2", output="one")
    predict("sampler.ensemble=2", "batch_size=3", "sampler.members_at_once=2", output="three")
    predict("sampler.ensemble=2", source=photos / "photo_3.jpg", output="alone")
    predict("sampler.ensemble=2", "inference.fold=false", output="unfolded")
    predict("sampler.ensemble=2", "seed=7", output="other")
    for path in sorted((tmp_path / "one").glob("*.png")):
        first = picture(path).astype(int)
        others = ["three", "unfolded", *(["alone"] if path.stem.startswith("photo_3") else [])]
        for other in others:
            assert np.abs(picture(tmp_path / other / path.name) - first).mean() < 0.05
    first = picture(tmp_path / "one" / "photo_3_probability.png").astype(int)
    assert np.abs(picture(tmp_path / "other" / "photo_3_probability.png") - first).mean() > 1


def odd_files(folder):
    """Write photographs of every kind that people have; returns each one's size as it is seen."""
    image, _ = synthesise_lesion(0, 5)
    rgb = Image.fromarray(image)
    grey = np.asarray(rgb.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    writers = {
        "plain.jpg": lambda p: rgb.save(p),
        "upper.JPG": lambda p: rgb.save(p, format="JPEG"),
        "long.jpeg": lambda p: rgb.save(p),
        "turned.jpg": lambda p: rgb.save(p, exif=exif),
        "cmyk.jpg": lambda p: rgb.convert("CMYK").save(p),
        "grey.jpg": lambda p: rgb.convert("L").save(p),
        "grey.png": lambda p: rgb.convert("L").save(p),
        "alpha.png": lambda p: rgb.convert("RGBA").save(p),
        "grey_alpha.png": lambda p: rgb.convert("LA").save(p),
        "palette.png": lambda p: rgb.quantize(32).save(p),
        "black_and_white.png": lambda p: rgb.convert("1").save(p),
        "deep.png": lambda p: Image.fromarray(grey.astype(np.uint16) * 256).save(p),
        "deep_colours.png": lambda p: cv2.imwrite(str(p), image[..., ::-1].astype(np.uint16) * 257),
        "deep_colours.tiff": lambda p: cv2.imwrite(
            str(p), image[..., ::-1].astype(np.uint16) * 257
        ),
        "deep.tif": lambda p: Image.fromarray(grey.astype(np.uint16) * 256).save(p),
        "bitmap.bmp": lambda p: rgb.save(p),
        "tagged.tiff": lambda p: rgb.save(p),
        "web.webp": lambda p: rgb.save(p),
        "moving.gif": lambda p: rgb.save(p),
        "mit Umlaut ä.png": lambda p: rgb.save(p),
        "tiny.png": lambda p: rgb.resize((1, 1)).save(p),
        "strip.png": lambda p: rgb.resize((500, 3)).save(p),
        "constant.png": lambda p: Image.new("RGB", (40, 30), (120, 80, 60)).save(p),
    }
    folder.mkdir()
    sizes = {}
    for name, write in writers.items():
        write(folder / name)
        with Image.open(folder / name) as opened:
            sizes[name] = opened.size if name != "turned.jpg" else opened.size[::-1]
    return sizes


def test_every_kind_of_photograph_is_predicted(tmp_path, predict):
    sizes = odd_files(tmp_path / "photos")
    rows = {row["file"].rpartition("/")[2]: row for row in predict().values()}
    assert {name: (int(r["width"]), int(r["height"])) for name, r in rows.items()} == sizes
    # Two pairs have one stem: their suffixes tell their masks apart.
    assert {rows["grey.jpg"]["name"], rows["grey.png"]["name"]} == {"grey_jpg", "grey_png"}
    plain = read_image(tmp_path / "photos" / "bitmap.bmp")
    for name in ("deep_colours.png", "deep_colours.tiff", "alpha.png"):
        assert np.array_equal(read_image(tmp_path / "photos" / name), plain)
    for row in rows.values():
        assert picture(tmp_path / "masks" / f"{row['name']}_mask.png").shape == (
            int(row["height"]),
            int(row["width"]),
        )


def test_bad_files_are_reported_and_the_rest_is_done(photos, predict, tmp_path):
    whole = (photos / "photo_0.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    (photos / "empty.png").write_bytes(b"")
    (photos / "text.bmp").write_text("I am a text")
    with pytest.raises(UserError, match=r"3 of 7 photographs could not be predicted, first .*cut"):
        predict("batch_size=2")
    rows = rows_in(tmp_path / "masks")
    assert sorted(name for name, row in rows.items() if row["error"]) == ["cut", "empty", "text"]
    assert "cannot be decoded" in rows["cut"]["error"]
    assert not (tmp_path / "masks" / "cut_mask.png").exists()
    assert all((tmp_path / "masks" / f"photo_{i}_mask.png").is_file() for i in range(4))


def test_a_prediction_that_is_not_finite_is_no_mask(photos, predict, tmp_path, monkeypatch):
    original = DiffusionSegmentation.predict

    def diverge(module, batch):
        result = original(module, batch)
        result["probability"][[sample == "photo_2" for sample in batch["id"]], 0, 3, 3] = torch.inf
        return result

    monkeypatch.setattr(DiffusionSegmentation, "predict", diverge)
    with pytest.raises(UserError, match=r"1 of 4 photographs could not be predicted, first .*_2"):
        predict("batch_size=4")
    rows = rows_in(tmp_path / "masks")
    assert "not finite" in rows["photo_2"]["error"]
    assert rows["photo_2"]["lesion_pixels"] == ""
    assert not (tmp_path / "masks" / "photo_2_mask.png").exists()
    assert all((tmp_path / "masks" / f"photo_{i}_mask.png").is_file() for i in (0, 1, 3))
    monkeypatch.undo()
    assert not predict("skip_existing=true")["photo_2"]["error"], "it is still to be done"


def test_what_is_done_can_be_left_out(photos, predict, tmp_path):
    predict()
    mask = tmp_path / "masks" / "photo_1_mask.png"
    others = {p: p.stat().st_mtime_ns for p in mask.parent.glob("*.png") if "photo_1" not in p.name}
    mask.unlink()
    rows = predict("skip_existing=true")
    assert mask.is_file()
    assert sorted(rows) == [f"photo_{i}" for i in range(4)], "the rows of before stay"
    assert {p: p.stat().st_mtime_ns for p in others} == others
    predict("skip_existing=true")


def test_the_challenge_has_its_own_names(photos, predict, tmp_path):
    predict("output_format=mediqa_tiff")
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == [
        *(f"photo_{i}_mask_ann1.tiff" for i in range(4)),
        "predictions.csv",
    ]
    assert set(np.unique(picture(tmp_path / "masks" / "photo_0_mask_ann1.tiff"))) <= {0, 255}


def test_a_pattern_and_a_threshold(photos, predict, tmp_path):
    rows = predict(source=photos / "photo_[12].*")
    assert sorted(rows) == ["photo_1", "photo_2"]
    high = predict("threshold=0.9", source=photos / "photo_1.jpg", output="high")
    low = predict("threshold=0.1", source=photos / "photo_1.jpg", output="low")
    areas = [int(r["photo_1"]["lesion_pixels"]) for r in (high, rows, low)]
    assert areas == sorted(areas)
    assert areas[0] < areas[2]


def test_a_letterboxed_network_gets_its_proportions(photos, make_checkpoint, predict, tmp_path):
    make_checkpoint("datamodule.letterbox=true")
    predict(source=photos / "photo_3.jpg")
    chance = picture(tmp_path / "masks" / "photo_3_probability.png")
    assert chance.shape == (77, 301)
    make_checkpoint()
    predict(source=photos / "photo_3.jpg", output="squashed")
    assert (picture(tmp_path / "squashed" / "photo_3_probability.png") != chance).any()


@pytest.mark.parametrize(
    ("overrides", "source", "message"),
    [
        (["threshold=1.5"], "photos", "threshold=1.5"),
        (["output_format=jpeg"], "photos", "output_format=jpeg does not exist; .*mediqa_tiff"),
        ([], "nowhere", "is no file or folder and matches no file"),
        ([], "void", "has no images"),
        (["network=dermosegdiff_tiny", "network.kwargs.dim_x=16"], "photos", "cannot change"),
    ],
)
def test_mistakes_are_named(photos, predict, tmp_path, overrides, source, message):
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=message):
        predict(*overrides, source=tmp_path / source)


def test_photographs_are_never_written_over(photos, predict):
    with pytest.raises(UserError, match="holds photographs of the input"):
        predict(output="photos")


def test_input_and_checkpoint_are_needed(make_config):
    with pytest.raises(UserError, match="task=predict needs input"):
        predict_task.run(make_config("task=predict"))
    with pytest.raises(UserError, match="task=predict needs checkpoint"):
        predict_task.run(make_config("task=predict", "input=photo.jpg"))


def test_boundary_uncertainty_is_that_of_the_band():
    from tasks.prediction_writer import _band

    mask = np.zeros((100, 100), np.uint8)
    mask[30:70, 30:70] = 1
    band = _band(mask, 3.0)
    assert [bool(band[50, column]) for column in (26, 27, 30, 32, 33)] == [0, 1, 1, 1, 0]
    assert not _band(np.zeros_like(mask), 3.0).any()
    assert band.sum() == pytest.approx(4 * 40 * 6, rel=0.1)
