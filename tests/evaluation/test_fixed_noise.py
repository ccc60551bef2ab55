from __future__ import annotations

import torch

from emf_lightning.evaluation.fixed_noise import fixed_noise, noise_indices


def test_noise_is_a_function_of_seed_prompt_and_index():
    first = fixed_noise(0, "a photo of a circle", 0, (3, 4, 4))
    torch.manual_seed(123)

    assert torch.equal(first, fixed_noise(0, "a photo of a circle", 0, (3, 4, 4)))
    for other in ((1, "a photo of a circle", 0), (0, "a photo of a square", 0), (0, "a photo of a circle", 1)):
        assert not torch.equal(first, fixed_noise(*other, (3, 4, 4)))


def test_digits_do_not_move_between_index_and_prompt():
    assert not torch.equal(fixed_noise(0, "1 cat", 1, (8,)), fixed_noise(0, "cat", 11, (8,)))
    assert not torch.equal(fixed_noise(1, "", 11, (8,)), fixed_noise(11, "", 1, (8,)))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    fixed_noise(0, "a photo of a circle", 0, (3, 4, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal():
    noise = torch.stack([fixed_noise(0, "a photo of a circle", index, (3, 32, 32)) for index in range(20)])
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_a_prompt_that_comes_again_takes_the_next_noise():
    assert noise_indices([("a", 0), ("b", 0), ("a", 0), ("a", 0), ("b", 0)]) == [0, 0, 1, 2, 1]
    assert noise_indices([]) == []


def test_no_two_images_of_a_prompt_share_a_noise_and_the_first_keep_theirs():
    prompts = ["a", "b", "a", "a", "", ""]
    rows = [(prompt, index) for prompt in prompts for index in range(3)]
    found = noise_indices(rows)
    assert found[:6] == [0, 1, 2, 0, 1, 2]
    assert len({(prompt, number) for (prompt, _), number in zip(rows, found, strict=True)}) == len(rows)
    assert sorted(number for (prompt, _), number in zip(rows, found, strict=True) if prompt == "a") == list(range(9))


def test_a_protocol_of_50_000_images_without_prompts_has_as_many_noises():
    assert noise_indices([("", 0)] * 50_000) == list(range(50_000))
