"""Renamed classes and arguments, for error messages that name the new one."""

CLASSES: dict[str, str] = {}
"""Short name or dotted path of an old class -> the new class; a remark may follow."""

ARGUMENTS: dict[tuple[str, str], str] = {
    ("FlowMapModule", "initial"): "init_from",
    ("FlowMapModule", "guidance"): "guidance_scale",
    ("SanaFlowMap", "fresh_context"): "finetuning.reset_text_projection",
    ("SanaFlowMap", "math_attention"): "attention_backend; write math for true, null for false",
    ("SanaFlowMap", "improved"): "guidance_conditioning",
    ("FlowMapNetwork", "refit"): "finetuning.refit",
    ("FlowMapNetwork", "trainable"): "finetuning.trainable",
    ("TimeSampler", "interval_share"): "flow_matching_ratio; its value is 1 - interval_share",
    ("TimeSampler", "zero_share"): "consistency_ratio",
    ("Pixels", "offset"): "shift",
    ("WordEncoder", "reach"): "window",
    ("CaptionImageData", "pictures"): "images",
}
"""(Short name of a class or of its base, old argument) -> new dotted argument, relative to the same ``init_args``.

A remark may follow after a semicolon. A whole sentence takes the place of the argument where no single one replaces it.
"""
