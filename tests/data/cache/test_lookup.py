from pathlib import Path

import pytest
import torch
from torch import Tensor

from emf_lightning.data.cache.feature_cache import FeatureCache
from emf_lightning.data.cache.latent_cache import LatentCache
from emf_lightning.data.cache.lmdb_store import LmdbStore
from emf_lightning.data.cache.lookup import Lookup
from emf_lightning.latents.pixels import Pixels
from emf_lightning.text.base import TextFeatures
from emf_lightning.text.words import WordEncoder

CPU = torch.device("cpu")


def latents(keys: list[str]) -> Tensor:
    return torch.stack([torch.full((3, 2, 2), float(ord(key))) for key in keys])


def same(first: TextFeatures | Tensor, second: TextFeatures | Tensor) -> bool:
    if isinstance(first, TextFeatures) and isinstance(second, TextFeatures):
        return torch.equal(first.context, second.context) and torch.equal(first.mask, second.mask)
    return torch.equal(first, second)


@pytest.fixture(params=["features", "latents"])
def cache_and_values(request, tmp_path: Path):
    """An open cache, and a function from keys to values."""
    if request.param == "latents":
        cache = LatentCache(tmp_path, 0.01)
        cache.open(Pixels(), 2, "plain")
        return cache, latents
    cache = FeatureCache(tmp_path, 0.01)
    cache.open(WordEncoder(width=8, length=2))
    return cache, WordEncoder(width=8, length=2)


def test_hits_entries_stored_since_and_new_values_come_in_batch_order(cache_and_values):
    cache, values = cache_and_values
    cache.store(["a"], values(["a"]))
    keys = list("dacbad")
    lookup = Lookup(keys, cache)
    assert lookup.found.tolist() == [False, True, False, False, True, False]
    cache.store(["b"], values(["b"]))  # by another batch
    encoded = []

    def encode(indices: list[int]):
        encoded.append([lookup.missing(keys)[index] for index in indices])
        return values(encoded[-1])

    assert same(lookup.complete(encode, cache, CPU), values(keys))
    assert encoded == [["d", "c"]]
    assert all(cache.holds(key) for key in "abcd")


def test_without_a_cache_each_key_is_encoded_once(cache_and_values):
    values, encoded = cache_and_values[1], []

    def encode(indices: list[int]):
        encoded.append(indices)
        return values(["aba"[index] for index in indices])

    assert same(Lookup(list("aba")).complete(encode, None, CPU), values(list("aba")))
    assert encoded == [[0, 1]]


def test_elements_of_lookups_are_chosen_and_joined_as_if_looked_up_together(cache_and_values):
    cache, values = cache_and_values
    cache.store(["a", "b", "c"], values(["a", "b", "c"]))
    first, second, none = Lookup(list("axbyc"), cache), Lookup(list("zc"), cache), Lookup(list("xy"), cache)
    for kept in ([0, 1, 2, 3, 4], [1, 2, 4], [3], [0], []):
        joined = Lookup.cat([first[kept], none[[1]], second])
        whole = Lookup([*("axbyc"[index] for index in kept), "y", "z", "c"], cache)
        assert joined.keys == whole.keys
        assert torch.equal(joined.found, whole.found)
        assert same(joined.hits, whole.hits)
    assert none[[0]].hits is Lookup([], cache).hits is None


def test_a_batch_is_read_in_one_transaction(cache_and_values, monkeypatch):
    cache, values = cache_and_values
    cache.store(["a", "b", "c"], values(["a", "b", "c"]))
    begun = []
    transaction = LmdbStore.transaction

    def counted(store: LmdbStore, write: bool = False):
        begun.append(write)
        return transaction(store, write)

    monkeypatch.setattr(LmdbStore, "transaction", counted)
    assert Lookup(list("axbycz"), cache).found.tolist() == [True, False] * 3
    assert begun == [False]
