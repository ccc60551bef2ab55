"""`emf plan` counts a step's passes by taking the step with a stand-in for the network."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import ArgumentParser

from emf_lightning.cli.parsing import import_classes
from emf_lightning.cli.passes import StepPasses, step_passes
from emf_lightning.modules.flow_map import FlowMapModule

UNIFORM = {"class_path": "LogitNormalTimes", "init_args": {"flow_matching_ratio": {"start": 0.5}}}
HALF = {"times": UNIFORM}
GUIDED = HALF | {"guidance": {"scale": 1.5}}
TEACHER = {"velocity": {"class_path": "TeacherVelocity"}}
FLOW = {"class_path": "LogitNormalTimes", "init_args": {"flow_matching_ratio": {"start": 1.0}}}


def passes_of(kind: str, objective: str | None, settings: dict[str, Any], **arguments: Any) -> StepPasses:
    import_classes("modules", "flow", "networks")
    if objective is not None:
        arguments["objective"] = {"class_path": objective, "init_args": settings}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=FlowMapModule)
    net = {"class_path": "SanaFlowMap", "init_args": {"latent_channels": 4, "latent_size": 4, "context_width": 8}}
    spec = {"class_path": kind, "init_args": {"net": net, **arguments}}
    return step_passes(parser.parse_object({"model": spec}).model, max_steps=1200, batch_size=32, channels=4)


@pytest.mark.parametrize(
    ("objective", "settings", "expected"),
    [  # passes that train, that do not, that carry du/dt; a half of the rows have r < t
        ("FlowMatching", {"times": FLOW}, (1, 0, 0)),
        ("MeanFlow", HALF, (1, 0, 0.5)),
        ("MeanFlow", {}, (1, 0, 0.25)),
        ("MeanFlow", HALF | TEACHER, (1, 1, 0.5)),
        ("MeanFlow", GUIDED | TEACHER, (1, 2, 0.5)),
        ("MeanFlow", HALF | {"derivative": {"class_path": "FiniteDifference"}}, (1, 1, 0)),
        ("SplitMeanFlow", HALF, (1, 1, 0)),
        ("RCGM", HALF | {"order": 3}, (1, 2, 0)),
        # in half of the steps a sample more, and four solver steps of the teacher
        ("RefinedMeanFlow", HALF | {"refinement": {"start": 0.5}}, (1.5, 1 + 0.5 * 4, 0.5)),
        ("CMT", HALF | {"share": 0.5, "solver_steps": 32, "samples_per_path": 16}, (1, 0.5 * 2 + 0.5, 0.25)),
    ],
)
def test_passes_of_an_objective(objective, settings, expected):
    found = passes_of("FlowMapModule", objective, settings)

    assert (found.network.trained, found.network.plain, found.network.derivative) == pytest.approx(expected)
    assert found.network.backward == pytest.approx(2 * expected[0])
    assert found.network.recorded == (2 if objective == "RefinedMeanFlow" else 1)
    teacher = objective in ("CMT", "RefinedMeanFlow") or "velocity" in settings
    assert (found.trained_copies, found.frozen_copies) == (0, teacher)


def test_a_fused_derivative_has_its_backward_pass():
    found = passes_of("FlowMapModule", "MeanFlow", HALF | {"derivative": {"class_path": "Fused"}}).network
    assert (found.trained, found.derivative, found.backward) == pytest.approx((0.5, 0.5, 2))


def test_twin_flow():
    settings = {"fake_ratio": 0.25, "order": 2, "times": {"class_path": "AnyStepTimes"}}
    found = passes_of("FlowMapModule", "TwinFlow", settings).network

    assert found.trained == pytest.approx(1)  # real and fake samples
    assert found.plain > 0.25  # the fakes' own samples, RCGM's jumps, and the two velocities of the difference


def test_fgm():
    found = passes_of("FGM", "FlowGeneratorMatching", {"steps": 2}, alternation={"auxiliary_updates": 3})

    # jumps alternate between 1 and 2: three updates of the online flow on such samples, one of the generator
    network = found.network
    assert network.trained == pytest.approx(3 + 1.5 - 0.5)  # the first of two jumps has no graph
    assert network.plain == pytest.approx(3 * 1.5 + 0.5 + 2)  # teacher and online flow are fixed
    assert network.backward == pytest.approx(3 * 2 + 2 + 2)
    assert network.recorded == 3
    assert (found.trained_copies, found.frozen_copies) == (1, 1)


def test_scflow_with_its_discriminator():
    found = passes_of(
        "SCFlow",
        "SelfCorrectedFlow",
        {"adversarial": {"weight": 0.1, "start": 600}, "r1": 1.0, "teacher_guidance_scale": 2.0},
        discriminator={"class_path": "ConvDiscriminator"},
    )
    # consistency and alignment; the one-step sample from the middle of training on, when it faces the discriminator
    assert found.network.trained == pytest.approx(2 + 0.5)
    assert found.network.plain == pytest.approx(2 + 2 + 0.5 + 0.5)  # guided teacher, target on both sides, samples
    assert (found.trained_copies, found.frozen_copies) == (0, 2)
    critic = found.discriminator
    assert (critic.trained, critic.plain) == pytest.approx((1, 0.5))
    assert critic.backward == pytest.approx(0.5 * (2 + 5 + 1))  # fakes, real ones with R1, and the network's samples


def test_joint_distillation():
    weights = {"matching_weight": {"weight": 2.0, "start": 600}, "rollout_steps": [1, 2, 3], "gradient_jumps": 1}
    settings = {"regression": {"class_path": "MeanFlow", "init_args": HALF}, **weights}
    found = passes_of("JointDistillation", "JointObjective", settings)

    assert found.network.derivative == pytest.approx(0.5)
    assert found.network.trained == pytest.approx(1 + 0.5 * 2)  # one jump with a graph, one update of the online flow
    assert found.network.plain == pytest.approx(0.5 * (1 + 2 + 2))  # jumps without a graph, rollouts, both velocities
    assert (found.trained_copies, found.frozen_copies) == (1, 1)


def test_micro_batches_keep_less():
    found = passes_of("FGM", None, {}, alternation={"micro_batches": 4})
    assert found.network.recorded == pytest.approx(3 / 4)
    assert found.network.trained == pytest.approx(2)
