"""What Lorry adds to vLLM's worker processes: the class that `--worker-extension-cls` names."""

from workers.engine.vllm_fold_worker import FoldExtension
from workers.engine.vllm_read_ahead import ReadAheadExtension


class WorkerExtension(FoldExtension, ReadAheadExtension):
    """Folds adapters, and reads them ahead."""
