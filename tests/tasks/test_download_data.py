"""Downloading whole datasets from a server of our own."""

import functools
import shutil
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common.errors import UserError
from datamodules import ISIC2018, ISIC2019
from datamodules.downloads import Download
from tasks import download_data


@pytest.fixture
def server(tmp_path):
    """Serves a folder; gives the folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def serve(source, served):
    """Zip every folder of a dataset as the archive does, and copy its tables."""
    for path in source.iterdir():
        if path.is_dir():
            with zipfile.ZipFile(served / f"{path.name}.zip", "w") as archive:
                for file in path.iterdir():
                    archive.write(file, f"{path.name}/{file.name}")
        else:
            shutil.copy(path, served)


def counted(cls, monkeypatch, **counts):
    """Let a dataset be published with other numbers of images."""
    downloads = tuple(
        Download(d.url, counts.get(d.target, 0)) for d in cls.downloads if d.target in counts
    )
    monkeypatch.setattr(cls, "downloads", downloads)


IMAGES = "ISIC2018_Task1-2_Training_Input"
MASKS = "ISIC2018_Task1_Training_GroundTruth"


@pytest.fixture
def download(make_config, server, tmp_path):
    def run(dataset="isic2018", *overrides):
        places = (f"paths.data={tmp_path}/new", f"source={server[1]}")
        config = make_config("task=download_data", f"datamodule={dataset}", *places, *overrides)
        download_data.run(config)
        return tmp_path / "new" / dataset

    return run


def test_a_downloaded_dataset_can_be_used(isic_data, server, download, monkeypatch, load, capsys):
    serve(isic_data / "isic2018", server[0])
    counted(ISIC2018, monkeypatch, **{IMAGES: 20, MASKS: 20})
    root = download()
    assert sorted(path.name for path in root.iterdir()) == [IMAGES, MASKS]
    assert len(load(ISIC2018, root).parts) == 20
    assert "task=check_data datamodule=isic2018" in capsys.readouterr().out


def test_the_same_command_again_does_nothing(isic_data, server, download, monkeypatch):
    serve(isic_data / "isic2018", server[0])
    counted(ISIC2018, monkeypatch, **{IMAGES: 20, MASKS: 20})
    download()
    for path in server[0].iterdir():
        path.unlink()
    download()


def test_archives_can_be_kept(isic_data, server, download, monkeypatch):
    serve(isic_data / "isic2018", server[0])
    counted(ISIC2018, monkeypatch, **{IMAGES: 20, MASKS: 20})
    root = download("isic2018", "keep_archives=true")
    assert (root / f"{IMAGES}.zip").is_file()


def test_tables_are_kept_as_files(server, download, monkeypatch, pairs, tmp_path):
    names = [download.target for download in ISIC2019.downloads]
    pairs(tmp_path / "source" / names[2], None, ["ISIC_1", "ISIC_2"])
    for name in names[:2]:
        (tmp_path / "source" / name).write_text("image\n")
    serve(tmp_path / "source", server[0])
    counted(ISIC2019, monkeypatch, **{names[0]: 0, names[1]: 0, names[2]: 2})
    root = download("isic2019")
    assert (root / names[0]).read_text() == "image\n"
    assert len(list((root / names[2]).iterdir())) == 2


def test_another_number_of_images_is_named(isic_data, server, download, monkeypatch):
    serve(isic_data / "isic2018", server[0])
    counted(ISIC2018, monkeypatch, **{IMAGES: 21})
    with pytest.raises(UserError, match=f"{IMAGES} has 20 images, published are 21; remove the fo"):
        download()


def test_a_damaged_archive_is_got_anew_by_the_next_command(
    isic_data, server, download, monkeypatch
):
    counted(ISIC2018, monkeypatch, **{IMAGES: 20})
    (server[0] / f"{IMAGES}.zip").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="is damaged"):
        download()
    serve(isic_data / "isic2018", server[0])
    assert len(list((download() / IMAGES).iterdir())) == 20


@pytest.mark.parametrize("dataset", ["ham10000", "ph2", "mediqa_magic", "synthetic"])
def test_where_a_form_is_needed_it_says_where_and_how(download, dataset):
    with pytest.raises(UserError, match="is not served without a login or form: .*folder must loo"):
        download(dataset)


@pytest.mark.parametrize("dataset", ["isic2016", "isic2017", "isic2018", "isic2019"])
def test_the_archive_serves_the_challenges(dataset, make_config):
    from tasks.build import build_datamodule

    datamodule = build_datamodule(make_config(f"datamodule={dataset}")["datamodule"])
    year = dataset[4:]
    for item in datamodule.downloads:
        assert item.url.startswith(f"https://isic-challenge-data.s3.amazonaws.com/{year}/IS")
    assert sum(item.images > 0 for item in datamodule.downloads) == {"2019": 1, "2016": 4}.get(
        year, 6
    )
