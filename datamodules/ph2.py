"""PH2: 200 photographs of melanocytic lesions with masks.

Source: Mendonça et al., "PH2 - A dermoscopic image database for research and benchmarking", 2013.
"""

from pathlib import Path

from common.errors import UserError
from datamodules.files import FileSample, Listing, pair_files, unpaired
from datamodules.segmentation import SegmentationDataModule

__all__ = ["PH2"]

TREE = "PH2 Dataset images"


class PH2(SegmentationDataModule):
    """The published tree, `PH2 Dataset images/<id>/<id>_Dermoscopic_Image/<id>.bmp` and
    `.../<id>_lesion/<id>_lesion.bmp`; or the reference's, `trainx/<id>.bmp` and
    `trainy/<id>_lesion.bmp`.

    The reference divides the sorted images into 80, 20 and 100.
    """

    name = "ph2"
    reference_split = (80, 20, 100)
    source = "www.fc.up.pt/addi/ph2%20database.html (on request)"

    def list_files(self) -> Listing:
        tree = self.root / TREE
        if tree.is_dir():
            return _list_tree(tree, self.hint)
        if (self.root / "trainx").is_dir():
            return pair_files([self.root / "trainx"], self.root / "trainy", "_lesion", self.hint)
        raise UserError(f"The folder {self.root} has neither {TREE}/ nor trainx/; {self.hint}")


def _list_tree(tree: Path, hint: str) -> Listing:
    listing = Listing()
    for case in sorted(path for path in tree.iterdir() if path.is_dir()):
        image = _find_bitmap(case / f"{case.name}_Dermoscopic_Image", case.name)
        mask = _find_bitmap(case / f"{case.name}_lesion", f"{case.name}_lesion")
        if image.is_file() and mask.is_file():
            listing.samples.append(FileSample(case.name, image, (mask,)))
        else:
            what, missing = ("image", mask) if image.is_file() else ("mask", image)
            listing.problems.append(unpaired(what, case, str(missing)))
    if not listing.samples and not listing.problems:
        raise UserError(f"The folder {tree} has no images; {hint}")
    return listing


def _find_bitmap(folder: Path, stem: str) -> Path:
    # Some copies have a JPEG preview of the mask beside it, which is no mask.
    upper = folder / f"{stem}.BMP"
    return upper if upper.is_file() else folder / f"{stem}.bmp"
