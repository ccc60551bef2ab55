from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from emf_lightning.evaluation.distances.fid_kid import FrechetDistance, KernelDistance, frechet
from emf_lightning.evaluation.distances.image_features import InceptionFeatures, RandomFeatures
from emf_lightning.evaluation.distances.reference_images import gaussian

FEATURES = RandomFeatures(width=16)


def images_of(seed: int, count: int = 40, noise: float = 40.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(40, 200, 36)[None, :, None]
    return [np.clip(ramp + rng.normal(0, noise, (36, 36, 3)), 0, 255).astype(np.uint8) for _ in range(count)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    for number, image in enumerate(images_of(0)):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def distance(reference, images, **arguments) -> float:
    metric = FrechetDistance(FEATURES, reference, **arguments)
    metric.update(images[:7], [""] * 7)
    metric.update(images[7:], [""] * (len(images) - 7))
    return metric.compute()["score"].item()


def features_of(images) -> torch.Tensor:
    return FEATURES(images)


class Ready(nn.Module):
    """A feature extractor for torchmetrics that returns given features."""

    num_features = 16

    def forward(self, rows):
        return rows


def test_fid_of_the_reference_itself_is_zero_and_grows_with_noise(reference):
    assert distance(reference, images_of(0)) == pytest.approx(0, abs=1e-6)
    levels = [distance(reference, images_of(1, noise=noise)) for noise in (40.0, 60.0, 90.0)]
    assert 0 < levels[0] < levels[1] < levels[2]


def test_fid_is_torchmetrics(reference):
    torch_metric = FrechetInceptionDistance(feature=Ready())
    torch_metric.update(features_of(images_of(0)), real=True)
    torch_metric.update(features_of(images_of(1, noise=60.0)), real=False)
    assert distance(reference, images_of(1, noise=60.0)) == pytest.approx(torch_metric.compute().item(), rel=1e-3)


def test_frechet_distance_of_gaussians_in_closed_form():
    mean, scales = torch.tensor([1.0, -2.0]).double(), torch.tensor([[4.0, 9.0], [1.0, 16.0]]).double()
    expected = 5 + sum((a**0.5 - b**0.5) ** 2 for a, b in scales.T.tolist())
    found = frechet(mean, torch.diag(scales[0]), torch.zeros(2).double(), torch.diag(scales[1]))
    assert found.item() == pytest.approx(expected)


def test_statistics_in_a_file_stand_for_the_folder(reference, tmp_path):
    rows = features_of(images_of(0)).double()
    mu, sigma = gaussian(rows.sum(0), rows.T @ rows, len(rows))
    torch.testing.assert_close(sigma, torch.cov(rows.T))
    np.savez(tmp_path / "statistics.npz", mu=mu.numpy(), sigma=sigma.numpy())
    generated = images_of(2)
    assert distance(tmp_path / "statistics.npz", generated) == pytest.approx(distance(reference, generated), rel=1e-6)

    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="are of 3 features, the images have 16"):
        FrechetDistance(FEATURES, tmp_path / "wide.npz")


def test_kid_is_that_of_torchmetrics_where_the_subset_is_everything(reference):
    metric = KernelDistance(FEATURES, reference, subsets=2, subset_size=40)
    metric.update(images_of(3, noise=60.0), [""] * 40)
    theirs = KernelInceptionDistance(feature=Ready(), subsets=2, subset_size=40)
    theirs.update(features_of(images_of(0)), real=True)
    theirs.update(features_of(images_of(3, noise=60.0)), real=False)

    found = metric.compute()
    assert found["score"].item() == pytest.approx(1000 * theirs.compute()[0].item(), rel=1e-3)
    assert found["spread"].isnan(), "one possible subset does not show a spread"


def test_kid_depends_neither_on_the_order_of_images_nor_on_batches(reference):
    generated = images_of(3, noise=60.0)
    found = []
    for images, batch in ((generated, 40), (generated[::-1], 40), ([*generated[::2], *generated[1::2]], 7)):
        metric = KernelDistance(FEATURES, reference, subsets=3, subset_size=15)
        for first in range(0, len(images), batch):
            metric.update(images[first : first + batch], [""] * len(images[first : first + batch]))
        found.append(metric.compute()["score"].item())
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


@pytest.mark.parametrize(("subset_size", "known"), [(15, True), (20, False), (40, False)])
def test_the_spread_of_kid_is_known_where_subsets_are_smaller_than_both_sets(reference, subset_size, known):
    metric = KernelDistance(FEATURES, reference, subsets=5, subset_size=subset_size)
    metric.update(images_of(3, 20, noise=60.0), [""] * 20)
    spread = metric.compute()["spread"]
    assert spread > 0 if known else spread.isnan()


def test_a_part_of_the_images_smaller_than_a_subset_has_a_kid_of_all_of_it(reference):
    whole = KernelDistance(FEATURES, reference, subsets=2, subset_size=40)
    whole.check_count(40)
    generated, parts = images_of(3, noise=60.0), []
    for first in (0, 20):
        part = whole.fresh_copy()
        part.update(generated[first : first + 20], [""] * 20)
        parts.append(part.compute()["score"].item())
        whole.merge(part)
    assert parts == pytest.approx([whole.compute()["score"].item()] * 2, rel=0.5)
    assert whole.settings()["subset_size"] == 40


class Counting(RandomFeatures):
    """Counts the images whose features are computed."""

    described = 0

    def __call__(self, images):
        self.described += len(images)
        return super().__call__(images)


@pytest.mark.parametrize("kind", [FrechetDistance, lambda *a, **b: KernelDistance(*a, **b, subset_size=8)])
def test_the_reference_is_described_when_it_is_needed_once_and_kept_in_a_file(tmp_path, kind):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(images_of(0, 10)):
        Image.fromarray(image).save(folder / f"{number}.png")

    def described(reference=folder, **arguments) -> tuple[int, int, float]:
        """Images described by the check and by the first distance, and that distance."""
        features = Counting(width=8)
        metric = kind(features, reference, **arguments)
        metric.check_count(20)
        before = features.described
        copies = [metric.fresh_copy(), metric.fresh_copy()]
        for copy in copies:
            copy.update(images_of(1, 20), [""] * 20)
        scores = [copy.compute()["score"].item() for copy in copies]
        assert scores[0] == scores[1]
        return before, features.described - 40, scores[0]

    first = described()
    assert first[:2] == (0, 10)
    assert described() == (0, 0, first[2])
    assert described(resolution=18)[:2] == (0, 10)
    assert described()[:2] == (0, 0)
    Image.fromarray(images_of(5)[0]).save(folder / "0.png")
    assert described()[:2] == (0, 10)
    assert described()[2] != first[2]


@pytest.mark.parametrize("kind", ["fid", "kid"])
def test_a_reference_image_that_cannot_be_used_is_left_out_with_a_warning(tmp_path, kind):
    folders = tmp_path / "damaged", tmp_path / "whole"
    for folder in folders:
        folder.mkdir()
        for number, image in enumerate(images_of(0, 5)):
            Image.fromarray(image).save(folder / f"{number}.png")
    (folders[0] / "1.png").write_bytes((folders[0] / "1.png").read_bytes()[:100])
    (folders[1] / "1.png").unlink()
    images = images_of(1, 4)

    def score(folder):
        metric = FrechetDistance(FEATURES, folder) if kind == "fid" else KernelDistance(FEATURES, folder, subset_size=4)
        metric.update(images, [""] * 4)
        return float(metric.compute()["score"])

    for _ in range(2):  # from the images, then from the kept features
        with pytest.warns(UserWarning, match=r"reference: 1 of 5 images are left out, .*1\.png first \(corrupt image"):
            damaged = score(folders[0])
    assert damaged == score(folders[1])


def test_kept_statistics_of_other_features_are_refused(reference):
    distance(reference, images_of(1))
    statistics = [
        path
        for path in reference.with_name(f"{reference.name}-statistics").iterdir()
        if path.name.startswith("moments")
    ]
    of_full_size = [path for path in statistics if np.load(path)["resolution"] == 0]
    assert distance(of_full_size[0], images_of(1)) == pytest.approx(distance(reference, images_of(1)))
    with pytest.raises(ValueError, match=r"are of features \w+, the images would be of"):
        FrechetDistance(RandomFeatures(width=16, seed=1), of_full_size[0])
    with pytest.raises(ValueError, match="are of resolution 0, the images would be of 20"):
        FrechetDistance(FEATURES, of_full_size[0], resolution=20)


def test_too_few_images_are_refused(reference):
    with pytest.raises(ValueError, match="5 images, fewer than subset_size=10"):
        KernelDistance(FEATURES, reference, subset_size=10).check_count(5)
    with pytest.raises(ValueError, match="has 40 images, fewer than subset_size=50"):
        KernelDistance(FEATURES, reference, subset_size=50)
    with pytest.raises(ValueError, match=r"5 images, but count is 5,000"):
        FrechetDistance(FEATURES, reference, count=5000).check_count(5)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (KernelDistance, {"subsets": 0}, "subsets must be at least 1, got 0"),
        (KernelDistance, {"subset_size": 1}, "subset_size must be at least 2, got 1"),
        (KernelDistance, {"count": 0}, "count must be at least 1, got 0"),
        (FrechetDistance, {"resolution": 0}, "resolution must be at least 1, got 0"),
    ],
)
def test_numbers_that_no_distance_has_are_refused(kind, settings, said):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {said}"):
        kind(FEATURES, **settings)


def test_images_of_other_sizes_are_brought_to_the_protocols(reference):
    wide = [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in images_of(0)]
    assert distance(reference, wide, resolution=36) < 0.2 * distance(reference, images_of(1, noise=90.0))


def test_inceptions_weights_must_be_there_and_its_own(tmp_path):
    with pytest.raises(ValueError, match=r"no file nowhere\.pth; give weights-inception"):
        InceptionFeatures("nowhere.pth")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"cannot load weights=.*other\.pth"):
        InceptionFeatures(tmp_path / "other.pth")


def test_inception_describes_images_of_any_size_with_weights_from_a_file(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            return None

    torch.save({}, tmp_path / "none.pth")
    torch.manual_seed(0)
    untrained = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path / "none.pth"))
    torch.save(untrained.state_dict(), tmp_path / "weights.pth")
    features = InceptionFeatures(tmp_path / "weights.pth", "cpu")
    rows = features([images_of(0)[0], np.zeros((20, 30, 3), np.uint8)])

    assert rows.shape == (2, 2048)
    image = torch.from_numpy(images_of(0)[0]).permute(2, 0, 1)[None]
    torch.testing.assert_close(rows[:1], untrained.eval()(image)[0], rtol=1e-4, atol=1e-5)

    own = InceptionFeatures(tmp_path / "weights.pth", "cpu", resize="pytorch")
    assert own.digest != features.digest
    pixels = nn.functional.interpolate(image / 255, (299, 299), mode="bilinear", align_corners=False)
    seen = []
    own.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    rows = own([images_of(0)[0]])
    torch.testing.assert_close(seen[0], (pixels - 0.5) / 0.5)
    # what follows the resizing is the network's own
    own.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, given: (seen[0],))
    torch.testing.assert_close(rows, own.network(image)[0], rtol=1e-4, atol=1e-5)
