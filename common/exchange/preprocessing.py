"""From a picture to what the encoder takes: ``Views.evaluation`` in words that other libraries read.

Axes: c channels, S pixels of an image's side.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from common.data.views import Views

FILE, HUGGING_FACE = "preprocessing.json", "preprocessor_config.json"
_COLOUR = {1: "grey (ITU-R 601-2 luma of colour)", 3: "RGB (grey repeated)"}
_BILINEAR = 2                   # Pillow's number, by which Hugging Face names it


class Preprocessing(NamedTuple):
    """Upright picture of ``channels`` -> shorter side to ``short_side`` pixels, bilinear with antialiasing -> central
    ``size`` x ``size`` -> values 0..1 -> less ``mean``, over ``std``."""

    channels: int
    size: int
    short_side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, views: Views, channels: int) -> "Preprocessing":
        """What ``views.evaluation`` and ``views.normalize`` do with a picture that is larger than ``views.size``."""
        return cls(channels, views.size, views._short_side(0, 0), views.mean, views.std)

    def plain(self) -> dict[str, Any]:
        """For people, and for transforms of torchvision: what preprocessing.json holds.

        ``as_is`` is the height and width of a picture that is taken whole, without the margin that the crop else cuts
        off; null where there is no margin.
        """
        return {"channels": self.channels, "colour": _COLOUR.get(self.channels, "as stored"),
                "orientation": "upright (EXIF)", "transparency": "on white",
                "short_side": self.short_side, "interpolation": "bilinear",
                "antialias": True, "crop": "center", "size": [self.size, self.size],
                "as_is": [self.size, self.size] if self.short_side != self.size else None,
                "range": [0.0, 1.0], "mean": list(self.mean), "std": list(self.std)}

    def timm(self) -> dict[str, Any]:
        """The keys of timm's ``pretrained_cfg`` that ``timm.data.resolve_data_config`` reads."""
        return {"input_size": [self.channels, self.size, self.size], "crop_pct": self.crop_share(),
                "crop_mode": "center", "interpolation": "bilinear", "mean": list(self.mean), "std": list(self.std)}

    def crop_share(self) -> float:
        """``size / short_side``, rounded so that timm, which takes ``floor(size / share)``, finds ``short_side``."""
        share = self.size / self.short_side
        while math.floor(self.size / share) < self.short_side:
            share = math.nextafter(share, 0)
        return share

    def hugging_face(self) -> dict[str, Any]:
        """preprocessor_config.json, for transformers' ``AutoImageProcessor``."""
        return {"image_processor_type": "BitImageProcessor", "do_convert_rgb": self.channels == 3,
                "do_resize": True, "size": {"shortest_edge": self.short_side}, "resample": _BILINEAR,
                "do_center_crop": True, "crop_size": {"height": self.size, "width": self.size},
                "do_rescale": True, "rescale_factor": 1 / 255,
                "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std)}

    def write(self, folder: Path, hugging_face: bool = True) -> None:
        """Both files, in ``folder``. Without ``hugging_face`` only ours: transformers reads timm's config.json, too,
        and prepares a picture as timm does."""
        files = {FILE: self.plain()} | ({HUGGING_FACE: self.hugging_face()} if hugging_face else {})
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
