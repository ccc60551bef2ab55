"""Sources of the velocity v in the target and the tangent of MeanFlow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from emf_lightning.flow.velocity import Velocity

Network = Callable[..., Tensor]


class TargetVelocity(ABC):
    """Base of the sources of v.

    Attributes:
        needs_teacher: whether a frozen network has to be given before training.
    """

    needs_teacher = False

    def reference(self, net: Network) -> Network:
        """The network whose u(z, t, t) this source, and guidance inside the target, read."""
        return net

    @abstractmethod
    def __call__(self, v: Tensor, reference: Velocity, z: Tensor, t: Tensor) -> Tensor:
        """v at the state ``z`` ``[B, C, H, W]`` and ``t`` ``[B]``, like the conditional velocity ``v`` = e - x."""


class ConditionalVelocity(TargetVelocity):
    """v = e - x, as the EMF release has it.

    Example:
        >>> MeanFlow(velocity=ConditionalVelocity()).velocity.needs_teacher
        False
    """

    def __call__(self, v: Tensor, reference: Velocity, z: Tensor, t: Tensor) -> Tensor:
        return v


class SelfVelocity(TargetVelocity):
    """v = u(z, t, t) of the network itself, as the EMF paper writes it (arXiv 2604.18168, eq. 9).

    Example:
        >>> z, t = torch.ones(1, 1), torch.ones(1)
        >>> SelfVelocity()(v=torch.zeros(1, 1), reference=lambda z, r, t: 2 * z, z=z, t=t)
        tensor([[2.]])
    """

    def __call__(self, v: Tensor, reference: Velocity, z: Tensor, t: Tensor) -> Tensor:
        return reference(z, t, t).to(v.dtype)


class TeacherVelocity(SelfVelocity):
    """v = u(z, t, t) of a frozen flow-matching network, free of the conditional velocity's noise.

    See arXiv 2512.13006, section 4.

    Attributes:
        given: whether the teacher was an argument; a module gives its own otherwise.

    Args:
        teacher: the network; ``FlowMapModule`` gives a frozen copy of its network as training starts.

    Example:
        >>> teacher = lambda z, r, t: 2 * z
        >>> objective = MeanFlow(velocity=TeacherVelocity(teacher))
        >>> objective(lambda z, r, t: 2 * z, torch.randn(4, 1)).squared_error.shape
        torch.Size([4])
    """

    needs_teacher = True

    def __init__(self, teacher: Network | None = None) -> None:
        self.teacher = teacher
        self.given = teacher is not None

    def reference(self, net: Network) -> Network:
        if self.teacher is None:
            raise ValueError("TeacherVelocity has no teacher: give TeacherVelocity(teacher=frozen_network)")
        return self.teacher
