"""When the weights of a layer may be used without calling the layer."""

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain_call(module: nn.Module) -> bool:
    """Tell whether calling a module runs the ``forward`` of its class and nothing else.

    Args:
        module: any module.

    Returns:
        bool: False if the module, or all modules, have hooks, or if its ``forward`` was replaced.
    """
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return not (any(hooks) or _has_any_global_hook() or "forward" in module.__dict__)


def is_plain_tensor(x: Tensor) -> bool:
    """Tell whether a tensor or parameter is not of a subclass, such as a fake or sharded tensor."""
    return type(x) in (nn.Parameter, Tensor)


def is_plain_pointwise(
    layer: nn.Module, kind: type[nn.Module] = nn.Conv2d, strided: bool = False
) -> bool:
    """Tell whether a layer is no more than the product of its weight with every pixel, and a bias.

    Args:
        layer: any module.
        kind: the class that it must have, ``nn.Conv2d`` or a known subclass of it.
        strided: whether it may have a stride.

    Returns:
        bool: True for a 1x1 ``kind`` without stride, padding, groups, hooks, parametrizations or a
        weight of a tensor's subclass; False for other subclasses, as of LoRA.
    """
    return (
        type(layer) is kind  # parametrizations make a subclass
        and layer.kernel_size == (1, 1)
        and (strided or layer.stride == (1, 1))
        and layer.padding == (0, 0)
        and layer.groups == 1
        and is_plain_tensor(layer.weight)
        and is_plain_call(layer)
    )
