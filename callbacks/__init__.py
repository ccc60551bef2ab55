"""What is watched: the source of ``emf_lightning.callbacks``; see the table in README.md."""

from emf_lightning.callbacks.ema_weights import EMAWeights
from emf_lightning.callbacks.experiment_progress_bar import ExperimentProgressBar
from emf_lightning.callbacks.few_step_sampling import FewStepSampling
from emf_lightning.callbacks.sample_writer import SampleWriter
from emf_lightning.callbacks.save_network import SaveNetwork
from emf_lightning.callbacks.training_log import TrainingLog
from emf_lightning.evaluation import shapes_suite  # noqa: F401  YAML may name the suites that are imported

__all__ = ["EMAWeights", "ExperimentProgressBar", "FewStepSampling", "SampleWriter", "SaveNetwork", "TrainingLog"]
