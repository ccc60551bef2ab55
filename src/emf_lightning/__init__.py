"""Few-step text-to-image training: MeanFlow and its relatives, in plain PyTorch and on PyTorch Lightning.

``__init__.pyi`` lists the public names. Each loads on its first use, so that the mathematics imports neither Lightning
nor diffusers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
