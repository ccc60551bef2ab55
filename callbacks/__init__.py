"""Lightning callbacks: sampling, scores, checks and logs. README.md lists their files, tags and costs."""

from emf_lightning.callbacks.derivative_monitor import DerivativeMonitor
from emf_lightning.callbacks.distillation_monitor import DistillationMonitor
from emf_lightning.callbacks.experiment_progress_bar import ExperimentProgressBar
from emf_lightning.callbacks.few_step_sampling import FewStepSampling
from emf_lightning.callbacks.memory_snapshot import MemorySnapshot
from emf_lightning.callbacks.run_summary import RunSummary
from emf_lightning.callbacks.sample_writer import SampleWriter
from emf_lightning.callbacks.save_encoder import SaveEncoder
from emf_lightning.callbacks.save_network import SaveNetwork
from emf_lightning.callbacks.self_check import SelfCheck
from emf_lightning.callbacks.step_sweep import StepSweep
from emf_lightning.callbacks.training_log import TrainingLog
from emf_lightning.callbacks.weight_ema import WeightEMA
from emf_lightning.evaluation.geneval import mask2former, suite  # noqa: F401  YAML may name their classes

__all__ = [
    "DerivativeMonitor",
    "DistillationMonitor",
    "ExperimentProgressBar",
    "FewStepSampling",
    "MemorySnapshot",
    "RunSummary",
    "SampleWriter",
    "SaveEncoder",
    "SaveNetwork",
    "SelfCheck",
    "StepSweep",
    "TrainingLog",
    "WeightEMA",
]
