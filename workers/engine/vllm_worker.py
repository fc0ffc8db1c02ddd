"""What Lorry adds to vLLM's worker processes: the class that `--worker-extension-cls` names."""

from workers.engine.vllm_fold_worker import FoldExtension
from workers.engine.vllm_lora_kernels import use_tuned_kernels
from workers.engine.vllm_lora_steps import prepare_on_host
from workers.engine.vllm_read_ahead import ReadAheadExtension

prepare_on_host()
use_tuned_kernels()


class WorkerExtension(FoldExtension, ReadAheadExtension):
    """Folds adapters, and reads them ahead."""
