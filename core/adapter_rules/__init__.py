"""What makes a LoRA adapter usable: rules over its configuration, its tensors and its base model.

Nothing here does I/O. `db/adapter_package.py` reads the files, a worker the base's facts; `check`
says everything that is wrong, so that no adapter is found bad by the job that needs it.
"""

from core.adapter_rules.base import BaseFacts, TensorInfo
from core.adapter_rules.check import check, hints
from core.adapter_rules.config import AdapterConfig, parse_config
from core.adapter_rules.findings import Finding

__all__ = [
    "AdapterConfig",
    "BaseFacts",
    "Finding",
    "TensorInfo",
    "check",
    "hints",
    "parse_config",
]
