"""The only door to mlx_lm (the generating parts of serve/ apart) and to model hubs.

Imported through this package, mlx_lm can't lower the process's file limits. The layer classes that adapters wrap are
re-exported here.
"""

from mlx_lora.machine import allocation

with allocation.file_limits_kept():
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

__all__ = ["QuantizedSwitchLinear", "SwitchLinear"]
