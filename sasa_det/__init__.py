"""Stand-alone self-attention for detectron2.

Importing this package registers its backbones, feature pyramids, heads, meta-architectures and
data sets with detectron2; nothing else happens. ``sasa_det.ops`` and ``sasa_det.layers`` need
torch alone and import without detectron2.
"""

import sys
from importlib.util import find_spec

__version__ = "0.1.0"
__all__ = ["add_sasa_config"]

_NO_DETECTRON2 = (
    "sasa_det needs detectron2, which is not installed: run `python tools/install_detectron2.py` "
    "from its source folder, or `pip install --no-build-isolation "
    "git+https://github.com/facebookresearch/detectron2`."
)


def _imported_for(*parts: str) -> bool:
    """Tell whether this package is being imported on the way to one of its parts.

    Python runs a package before any of its parts and does not tell it which one is wanted; the
    import machinery's frames do.
    """
    names = tuple(f"{__name__}.{part}" for part in parts)
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load":
            if str(frame.f_locals.get("name")).startswith(names):
                return True
        frame = frame.f_back
    return False


if find_spec("detectron2") is not None:
    from . import modeling  # noqa: F401
    from .config import add_sasa_config
    from .data.digit_crops import register_digit_crops
    from .data.digits import register_digits
    from .data.image_folder import register_imagenet

    register_digits()
    register_digit_crops()
    register_imagenet()
elif _imported_for("ops", "layers"):

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(_NO_DETECTRON2)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    raise ImportError(_NO_DETECTRON2)
