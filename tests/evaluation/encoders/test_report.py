from __future__ import annotations

from emf_lightning.evaluation.bootstrap import Estimate
from emf_lightning.evaluation.encoders.discriminability import Discriminability
from emf_lightning.evaluation.encoders.disentanglement import Disentanglement
from emf_lightning.evaluation.encoders.features import VARIANTS
from emf_lightning.evaluation.encoders.report import EncoderStudy, StudiedEncoder


def test_the_panels_of_the_figure_name_their_quantities(tmp_path):
    estimates = {name: Estimate(0.5, 0.4, 0.6) for name in VARIANTS}
    discriminability = Discriminability(estimates, Estimate(0.2, 0.1, 0.3), 0.2, 0.9, {})
    disentanglement = Disentanglement(estimates, estimates, estimates, 0.0, 0.0)
    figure = EncoderStudy((StudiedEncoder("words", discriminability, disentanglement),)).figure()
    assert [axes.get_ylabel() for axes in figure.axes] == ["disentanglement", "contrast with unrelated prompts"]
    figure.savefig(tmp_path / "encoders.png")
