"""Photographs of every kind become masks of their own size; what cannot be read is reported."""

import csv
import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.geometry import restore
from datamodules import large
from datamodules.decoding import read_image
from datamodules.synthetic import synthesise_lesion
from datamodules.transforms import normalise, resize_image
from lightning_modules import DiffusionSegmentation
from lightning_modules.metrics import expected_dice
from tasks import predict as predict_task
from tasks import prediction_writer
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
        (["max_megapixels=0"], "photos", "max_megapixels=0"),
        (["batch_size=0"], "photos", "batch_size=0"),
        (["datamodule.normalization=foo"], "photos", "normalization=foo .*minmax, reference"),
        (["datamodule.antialias=maybe"], "photos", "antialias=maybe .*pillow"),
        (["datamodule.letterbox=5"], "photos", "letterbox=5 does not exist"),
        (["datamodule.image_size=0"], "photos", "image_size=0 must be"),
        (["datamodule.batch_size=4"], "photos", "no effect on task=predict.*use batch_size"),
        (["datamodule=isic2018"], "photos", "datamodule has no effect on task=predict"),
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


def test_strips_are_what_is_restored_at_once(monkeypatch):
    monkeypatch.setattr(prediction_writer, "STRIP_PIXELS", 700)
    values = torch.rand(1, 16, 16)
    for size, letterbox in (((33, 70), False), ((70, 33), True), ((5, 9), False), ((900, 1), True)):
        whole = restore(values, size, letterbox)[0]
        found = np.empty(size, np.float32)
        for rows, strip in prediction_writer.restored_rows(values, size, letterbox):
            assert strip.size <= 700
            found[rows] = strip
        assert np.abs(found - whole.numpy()).max() < 1e-6


def test_components_are_counted_by_their_outlines():
    rng = np.random.default_rng(0)
    for share in (0, 0.05, 0.3, 0.6, 0.95, 1):
        mask = (rng.random((60, 50)) < share).astype(np.uint8)
        labels = cv2.connectedComponents(mask, connectivity=8)[0] - 1
        assert prediction_writer._count_components(mask) == labels


def test_scores_of_a_row_are_those_of_the_whole_map(photos, predict, tmp_path, monkeypatch):
    kept = {}

    def keep(row, photograph, probability, uncertainty):
        kept[row["name"]] = (probability, photograph.size)

    original = prediction_writer.PredictionWriter._write
    monkeypatch.setattr(
        prediction_writer.PredictionWriter,
        "_write",
        lambda self, *given: (keep(*given), original(self, *given))[1],
    )
    monkeypatch.setattr(prediction_writer, "STRIP_PIXELS", 1000)
    rows = predict("threshold=0.4")
    for name, (probability, size) in kept.items():
        whole = restore(probability, size)
        dice = float(expected_dice(whole[None], 0.4))
        assert float(rows[name]["expected_dice"]) == pytest.approx(dice, abs=2e-6)
        assert int(rows[name]["lesion_pixels"]) == (whole > 0.4).sum()


def test_large_photographs_are_predicted_as_small_ones(photos, predict, tmp_path, monkeypatch):
    (photos / "photo_2.jpg").unlink()
    small = predict("datamodule.image_size=16", output="small")
    for module in (large, prediction_writer):
        monkeypatch.setattr(module, "WHOLE_PIXELS", 4000)
    rows = predict("datamodule.image_size=16", output="reduced")
    assert "48x36 px" in rows["photo_0"]["remark"]
    assert picture(tmp_path / "reduced" / "photo_0_overlay.jpg").shape == (36, 48, 3)
    assert picture(tmp_path / "reduced" / "photo_0_mask.png").shape == (144, 192)
    one, other = (
        picture(tmp_path / name / "photo_0_probability.png").astype(float)
        for name in ("small", "reduced")
    )
    assert np.abs(one - other).mean() / 255 < 0.02
    assert small["photo_0"]["remark"] == ""
    with pytest.raises(UserError, match="1 of 3 photographs"):
        predict("max_megapixels=0.024", output="limited")
    assert "max_megapixels" in rows_in(tmp_path / "limited")["photo_0"]["error"]


def test_folders_are_mirrored(photos, predict, tmp_path):
    for folder, name in (("p1", "photo_0"), ("p2", "photo_1")):
        (photos / folder).mkdir()
        shutil.move(photos / f"{name}.jpg", photos / folder / "IMG_0001.jpg")
    rows = predict(output="photos/masks")
    assert list(rows) == ["p1/IMG_0001", "p2/IMG_0001", "photo_2", "photo_3"]
    masks = photos / "masks"
    sizes = [picture(masks / p / "IMG_0001_mask.png").shape for p in ("p1", "p2")]
    assert sizes == [(144, 192), (120, 90)]
    assert list(predict(output="photos/masks")) == list(rows), "masks are no photographs"


def test_what_is_no_photograph_is_named_and_the_rest_is_done(photos, predict, tmp_path, capsys):
    (photos / "gone.jpg").symlink_to("/nowhere/x.jpg")
    os.mkfifo(photos / "pipe.jpg")
    odd = (b"caf\xe9.jpg", b"=cmd|calc.jpg", b"a\x1b[31mb\n.jpg")
    for name in odd:
        shutil.copy(photos / "photo_2.jpg", os.path.join(os.fsencode(photos), name))
    with pytest.raises(UserError, match="2 of 9 photographs"):
        predict()
    table = (tmp_path / "masks" / "predictions.csv").read_bytes()
    assert b"\x1b" not in table
    assert len(table.decode().splitlines()) == 10
    rows = rows_in(tmp_path / "masks")
    assert {name for name, row in rows.items() if row["error"]} == {"gone", "pipe"}
    assert {"caf\\xe9", "'=cmd|calc", "a\\x1b[31mb\\x0a"} < set(rows)
    for name in odd:
        mask = os.path.join(os.fsencode(tmp_path / "masks"), name[:-4] + b"_mask.png")
        assert os.path.isfile(mask)
    assert "\x1b[31mb" not in capsys.readouterr().out
    with pytest.raises(UserError, match="2 of 2 photographs"):
        predict("skip_existing=true")
    assert list(rows_in(tmp_path / "masks")) == sorted(rows)


def test_transparent_photographs_have_a_remark(photos, predict, tmp_path):
    colours = np.dstack([picture(photos / "photo_2.jpg"), np.full((64, 64), 255, np.uint8)])
    colours[:20, :, 3] = 0
    Image.fromarray(colours).save(photos / "cut.png")
    colours[:20, :, :3] = 255
    (photos / "white").mkdir()
    Image.fromarray(colours[..., :3]).save(photos / "white" / "cut.png")
    rows = predict()
    assert "white" in rows["cut"]["remark"]
    assert rows["white/cut"]["remark"] == rows["photo_2"]["remark"] == ""
    assert rows["cut"]["lesion_pixels"] == rows["white/cut"]["lesion_pixels"]


def without_seconds(folder):
    return {name: row | {"seconds": ""} for name, row in rows_in(folder).items()}


class StopError(Exception):
    pass


def test_a_run_that_was_stopped_goes_on(photos, predict, tmp_path, monkeypatch):
    predict(output="straight")
    written = []
    original = prediction_writer.PredictionWriter.record

    def stop(writer, row):
        if len(written) == 2:
            raise StopError
        written.append(row["name"])
        original(writer, row)

    monkeypatch.setattr(prediction_writer.PredictionWriter, "record", stop)
    with pytest.raises(StopError):
        predict()
    monkeypatch.undo()
    table = tmp_path / "masks" / "predictions.csv"
    assert sorted(rows_in(tmp_path / "masks")) == sorted(written)
    # As a process leaves it that is killed while it writes.
    with table.open("ab") as file:
        file.write(b"photo,photo_3,1,2")
    (tmp_path / "masks" / ".photo_3_mask.png.abcdefgh.part").touch()
    done = tmp_path / "masks" / f"{written[0]}_mask.png"
    before = done.stat().st_mtime_ns
    predict("skip_existing=true")
    assert done.stat().st_mtime_ns == before
    assert without_seconds(tmp_path / "masks") == without_seconds(tmp_path / "straight")
    assert list(rows_in(tmp_path / "masks")) == [f"photo_{i}" for i in range(4)]
    assert not [p.name for p in (tmp_path / "masks").iterdir() if p.name.startswith(".")]
    # Nothing is left, and the table of a run that was killed before it sorted it is sorted.
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    predict("skip_existing=true")
    assert table.read_text().splitlines() == lines


def test_rows_of_other_settings_or_photographs_are_not_done(photos, predict, tmp_path):
    predict()
    first = without_seconds(tmp_path / "masks")
    predict("skip_existing=true", "threshold=0.9")
    high = without_seconds(tmp_path / "masks")
    assert all(first[name]["settings"] != high[name]["settings"] for name in first)
    predict("threshold=0.9", output="high")
    assert high == without_seconds(tmp_path / "high")
    predict("skip_existing=true", "threshold=0.9", "trainer.precision=bf16-true")
    half = without_seconds(tmp_path / "masks")
    assert all(half[name]["settings"] != high[name]["settings"] for name in high)
    # Another photograph of the same name is no new version of it.
    (photos / "more").mkdir()
    Image.new("RGB", (50, 40), (200, 150, 130)).save(photos / "more" / "photo_1.png")
    with pytest.raises(UserError, match=r"prediction of .*photo_1.jpg, .*more/photo_1.png would"):
        predict("skip_existing=true", source=photos / "more")
    shutil.copy(photos / "more" / "photo_1.png", photos / "photo_1.jpg")
    shutil.rmtree(photos / "more")
    (tmp_path / "masks" / "photo_0_mask.png").write_bytes(b"")
    before = rows_in(tmp_path / "masks")
    predict("skip_existing=true", "threshold=0.9", "trainer.precision=bf16-true")
    rows = rows_in(tmp_path / "masks")
    assert (rows["photo_1"]["width"], rows["photo_0"]["width"]) == ("50", "192")
    assert rows["photo_2"] == before["photo_2"], "it is done already"
    assert (tmp_path / "masks" / "photo_0_mask.png").stat().st_size > 0


def test_tables_of_other_kinds_are_kept(photos, predict, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "predictions.csv").write_text("id,label\na,nv\n")
    with pytest.raises(UserError, match=r"masks/predictions.csv has other columns"):
        predict()
    assert (tmp_path / "masks" / "predictions.csv").read_text() == "id,label\na,nv\n"
