"""Stand-alone self-attention for detectron2.

Importing this package registers its backbones, feature pyramids, heads, meta-architectures and
data sets with detectron2; nothing else happens. ``sasa_det.ops`` and ``sasa_det.layers`` need
torch alone and import without detectron2, as ``sasa_det.benchmark`` does.
"""

import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

from .utils.garbage import no_garbage_collection

__version__ = "0.1.0"
__all__ = ["add_sasa_config", "get_cfg"]

if find_spec("detectron2") is not None:
    # Garbage collection takes a sixth of the time of these imports. Nobody who imports detectron2
    # and fvcore can change that they call torch.jit.script then.
    with no_garbage_collection(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        from . import modeling  # noqa: F401
        from .config import add_sasa_config, get_cfg
        from .data.animals import register_animals
        from .data.digits import register_digit_crops, register_digits
        from .data.image_folder import register_imagenet

    register_digits()
    register_digits(name="digits_tuning", tuning=1)
    register_digit_crops()
    register_digit_crops(name="digit_crops_tuning", tuning=1)
    register_animals()
    register_imagenet()
else:
    _NO_DETECTRON2 = (
        "sasa_det needs detectron2, which is not installed: run "
        "`python tools/install_detectron2.py` from its source folder, or `pip install "
        "--no-build-isolation git+https://github.com/facebookresearch/detectron2`."
    )

    _PARTS_WITHOUT = (
        *("benchmark", "command_line", "config_files", "errors", "layers", "ops", "utils"),
    )

    class _WithoutDetectron2(MetaPathFinder):
        """Says what is to be done where a part of this package needs detectron2."""

        def find_spec(self, name: str, path=None, target=None) -> None:
            package, _, part = name.partition(".")
            known = part.split(".")[0] in _PARTS_WITHOUT or part.startswith("_C_torch")
            if package == __name__ and not known:
                raise ImportError(_NO_DETECTRON2, name="detectron2")

    sys.meta_path.insert(0, _WithoutDetectron2())

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(_NO_DETECTRON2, name="detectron2")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
