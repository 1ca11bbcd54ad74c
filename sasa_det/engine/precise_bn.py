"""Statistics of batch norms that are averaged over batches before an evaluation."""

from typing import Any

from detectron2.engine import hooks

from .distributed import unwrapped

__all__ = ["PreciseBN"]


class PreciseBN(hooks.PreciseBN):
    """detectron2's hook; a resumed run goes on in its data, and nothing but statistics changes."""

    def update_stats(self) -> None:
        """Compute the statistics; they stay as they were if the data cannot be read."""
        modules = list(unwrapped(self._model).modules())
        # Dense detectors average it over the batches of training.
        normalizers = [(m, m.loss_normalizer) for m in modules if hasattr(m, "loss_normalizer")]
        norms = hooks.get_bn_modules(self._model)
        before = [(norm.momentum, [b.clone() for b in norm.buffers()]) for norm in norms]
        try:
            super().update_stats()
        except Exception:
            for norm, (momentum, buffers) in zip(norms, before, strict=True):
                norm.momentum = momentum
                for buffer, value in zip(norm.buffers(), buffers, strict=True):
                    buffer.copy_(value)
            raise
        finally:
            for module, normalizer in normalizers:
                module.loss_normalizer = normalizer

    def state_dict(self) -> dict[str, Any]:
        return {"data_loader": self._data_loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._data_loader.load_state_dict(state["data_loader"])
