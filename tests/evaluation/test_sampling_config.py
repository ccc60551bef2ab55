"""Sampling configs: the tags of loggers and files, and rows of earlier versions."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from emf_lightning.evaluation.sampling_config import SamplingConfig, sampling_configs


def test_tags_leave_out_the_main_guidance_scale():
    configs = sampling_configs([1, 4], [1.0, 2.5])
    assert [config.tag for config in configs] == ["1step", "4step", "1step_cfg2.5", "4step_cfg2.5"]
    assert [config.title for config in configs] == ["1 step", "4 steps", "1 step, cfg2.5", "4 steps, cfg2.5"]
    assert sampling_configs([2], None) == [SamplingConfig(2)]


@pytest.mark.parametrize("config", sampling_configs([4], [1.0, 2.0]))
def test_rows_are_read_as_they_are_and_were_written(config):
    old = {"label": config.tag, "steps": 4, "guidance": config.guidance_scale}
    assert SamplingConfig.from_row(asdict(config)) == SamplingConfig.from_row(old) == config
    assert SamplingConfig.from_row({"label": config.tag}).curve == config.curve
