from .cli.load_run import load_run
from .data.datamodule import CaptionImageData
from .flow.derivative.finite_difference import FiniteDifference
from .flow.derivative.forward_mode import ForwardMode
from .flow.guidance import TargetGuidance
from .flow.objectives.alpha_flow import AlphaFlow
from .flow.objectives.cmt import CMT
from .flow.objectives.distribution_matching import DMD, DistributionMatching
from .flow.objectives.flow_generator_matching import FlowGeneratorMatching
from .flow.objectives.flow_matching import FlowMatching
from .flow.objectives.improved_meanflow import ImprovedMeanFlow
from .flow.objectives.joint import JointObjective
from .flow.objectives.meanflow import MeanFlow
from .flow.objectives.rcgm import RCGM
from .flow.objectives.refined_meanflow import RefinedMeanFlow, Refinement
from .flow.objectives.self_corrected import SelfCorrectedFlow
from .flow.objectives.split_meanflow import SplitMeanFlow
from .flow.objectives.twin_flow import TwinFlow
from .flow.sampling import EulerSampler, FlowMapSampler, MultistepSampler, sample
from .flow.target_velocity import ConditionalVelocity, SelfVelocity, TeacherVelocity
from .flow.times import AnyStepTimes, LogitNormalTimes, Schedule, UniformTimes
from .flow.velocity import AverageVelocity
from .flow.weighting import AdaptiveWeighting, AnyStepWeighting, TransitionWeighting, UniformWeighting
from .modules.encoder_tuning import EncoderTuning
from .modules.fgm import FGM
from .modules.flow_map import FlowMapModule
from .modules.joint_distillation import JointDistillation
from .modules.optimization import Optimization
from .modules.scflow import SCFlow
from .networks.auraflow import AuraFlowFlowMap
from .networks.flux import FluxFlowMap
from .networks.lumina2 import Lumina2FlowMap
from .networks.mmdit import MMDiTFlowMap
from .networks.pixart import PixArtFlowMap
from .networks.qwen_image import QwenImageFlowMap
from .networks.sana import SanaFlowMap
from .networks.unet import TextUNetFlowMap, UNetFlowMap
from .pipeline import EMFPipeline

__all__ = [
    "CMT",
    "DMD",
    "FGM",
    "RCGM",
    "AdaptiveWeighting",
    "AlphaFlow",
    "AnyStepTimes",
    "AnyStepWeighting",
    "AuraFlowFlowMap",
    "AverageVelocity",
    "CaptionImageData",
    "ConditionalVelocity",
    "DistributionMatching",
    "EMFPipeline",
    "EncoderTuning",
    "EulerSampler",
    "FiniteDifference",
    "FlowGeneratorMatching",
    "FlowMapModule",
    "FlowMapSampler",
    "FlowMatching",
    "FluxFlowMap",
    "ForwardMode",
    "ImprovedMeanFlow",
    "JointDistillation",
    "JointObjective",
    "LogitNormalTimes",
    "Lumina2FlowMap",
    "MMDiTFlowMap",
    "MeanFlow",
    "MultistepSampler",
    "Optimization",
    "PixArtFlowMap",
    "QwenImageFlowMap",
    "RefinedMeanFlow",
    "Refinement",
    "SCFlow",
    "SanaFlowMap",
    "Schedule",
    "SelfCorrectedFlow",
    "SelfVelocity",
    "SplitMeanFlow",
    "TargetGuidance",
    "TeacherVelocity",
    "TextUNetFlowMap",
    "TransitionWeighting",
    "TwinFlow",
    "UNetFlowMap",
    "UniformTimes",
    "UniformWeighting",
    "load_run",
    "sample",
]
