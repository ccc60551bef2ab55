"""Renamed classes and arguments, for error messages that name the new one."""

CLASSES: dict[str, str] = {
    "MeanFlow": "FlowMapModule, with the objective MeanFlow",
    "FlowMatching": "FlowMapModule, with the objective FlowMatching",
    "ImprovedMeanFlow": "FlowMapModule, with the objective ImprovedMeanFlow",
    "MeanFlowObjective": "MeanFlow",
    "AlphaFlowObjective": "AlphaFlow",
    "SplitMeanFlowObjective": "SplitMeanFlow",
    "ImprovedMeanFlowObjective": "ImprovedMeanFlow",
    "BlipJudge": "BlipVqa",
    "QwenVlJudge": "QwenVqa",
    "MplugJudge": "MplugVqa",
}
"""Short name or dotted path of an old class -> the new class; a remark may follow. Read if a class does not fit."""

_OBJECTIVE = {
    name: f"objective.init_args.{name}"
    for name in (
        *("times", "weighting", "loss", "weight", "steps", "generator_time"),
        *("backward", "alignment", "adversarial", "r1"),
    )
} | {
    "velocity": "objective.init_args.velocity; write ConditionalVelocity, SelfVelocity or TeacherVelocity",
    "target_guidance": "objective.init_args.guidance",
    "law": "objective.init_args.guidance_sampler",
    "guidance_interval": "objective.init_args.sampling_interval",
    "judged_times": "objective.init_args.discriminator_times",
    "teacher_guidance": "objective.init_args.teacher_guidance_scale",
}
_MODULE = {
    "initial": "init_from",
    "guidance": "guidance_scale",
    "optimizer": "optimization.optimizer",
    "scheduler": "optimization.scheduler",
    "critic_updates": "alternation.auxiliary_updates",
    "gradient_clip_val": "alternation.gradient_clip_val",
    "micro_batches": "alternation.micro_batches",
}
_CALLBACK = {"also": "extra_metrics", "guidance": "guidance_scale"}

_BY_CLASS: dict[str, dict[str, str]] = {
    "FlowMapModule": _OBJECTIVE | _MODULE,
    "FGM": {
        "critic_optimizer": "online_optimization.optimizer",
        "critic_scheduler": "online_optimization.scheduler",
    },
    "SCFlow": {
        "critic_optimizer": "discriminator_optimization.optimizer",
        "critic_scheduler": "discriminator_optimization.scheduler",
    },
    "Objective": {"bound": "clip_target"},
    "ForwardMode": {"lean": "fast"},
    "AdaptiveWeighting": {"power": "p", "offset": "c"},
    "TransitionWeighting": {"power": "p", "offset": "c"},
    "SelfCorrectedFlow": {
        "reach": "consistency.max_step",
        "truncation": "consistency.truncation",
        "offset": "consistency.huber_c",
    },
    "TimeSampler": {
        "interval_share": "flow_matching_ratio; its value is 1 - interval_share",
        "zero_share": "consistency_ratio",
        "larger": "sort_first",
    },
    "VelocityConsistency": {"reach": "max_step", "offset": "huber_c"},
    "LossTerm": {"after": "start"},
    "SanaFlowMap": {
        "fresh_context": "finetuning.reset_text_projection",
        "math_attention": "attention_backend; write math for true, null for false",
        "improved": "guidance_conditioning",
    },
    "FlowMapNetwork": {
        "refit": "finetuning.refit",
        "trainable": "finetuning.trainable",
        "subfolder": "pretrained.subfolder; the name is then pretrained.path",
    },
    "ConvDiscriminator": {
        "most": "max_channels",
        "group": "mbstd_group_size",
        "width": "channels",
        "captioned": "conditional",
    },
    "Pixels": {"offset": "shift"},
    "WordEncoder": {"reach": "window"},
    "CaptionImageData": {"pictures": "images"},
    "FewStepSampling": _CALLBACK,
    "StepSweep": _CALLBACK,
    "SampleWriter": {"guidance": "guidance_scale"},
    "DpgBench": {"judge": "vqa_model"},
}
ARGUMENTS = {(kind, old): new for kind, names in _BY_CLASS.items() for old, new in names.items()}
"""(Short name of a class or of its base, old argument) -> new dotted argument, relative to the same ``init_args``.

A remark may follow after a semicolon. A whole sentence stands in place of the argument if no single one replaces it.
"""
