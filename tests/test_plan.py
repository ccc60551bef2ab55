"""`emf plan` counts what is built, without weights and without a network connection."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch

from emf_lightning.cli import main
from emf_lightning.cli.sizes import EncoderSize, network_cost
from emf_lightning.cli.worth import Prices, choices
from emf_lightning.networks.sana import SanaArchitecture, SanaFlowMap

ROOT = Path(__file__).resolve().parent.parent


@cache
def planned(*options: str) -> dict[str, str]:
    """Printed lines by name."""
    with redirect_stdout(StringIO()) as said:
        main(["plan", *options])
    rows = {}
    for line in said.getvalue().splitlines():
        if found := re.match(r"\s{2,}(\S.*?)\s{2,}(\S.*)", line):
            rows[found[1]] = found[2]
    return rows


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_blip3o_next_is_planned_from_its_experiment_alone():
    rows = planned("--config", "experiments/emf/blip3o_next.yaml")

    assert rows["network"].startswith("1,640,356,512  1,630,025,600 train")
    assert rows["autoencoder"].startswith("312,250,275")
    assert rows["patch_embed"].endswith("  0 train")
    assert rows["data.cache"].startswith("572 GB  3.36 MB each in bfloat16; within max_gb")  # 730 x 2304 x 2 bytes
    assert rows["data.latent_cache"].startswith("11.9 GB  0.0656 MB each")
    assert rows["steps"] == "200,000  of 128 rows: 150.6 passes"
    # 26.1 GB: 4 bytes of each weight, 12 of each that trains
    assert rows["weights, gradients, AdamW"].startswith("26.1 GB")
    assert rows["in all, one device or DDP"].endswith("fits")
    assert rows["a checkpoint"].startswith("19.6 GB")
    # blocks' inputs, 20 x 1024 x 2240 numbers, and all that one block keeps: of 16 rows, in 16 bit
    assert 1.5 < float(rows["activations"].split()[0]) - 16 * 20 * 1024 * 2240 * 2 / 1e9 < 6


@pytest.mark.parametrize(
    ("options", "trained", "states", "averages", "checkpoint"),
    [
        # 4 bytes of each weight, 12 of each that trains; a checkpoint: that, and the fitted time embedding
        (["--config", "experiments/emf/blip3o_next_lora.yaml"], 47_183_360, "7.17 GB", None, "0.709 GB"),
        (
            ["--config", "experiments/meanflow/sd35.yaml", "--model.init_args.net.init_args.adapter.rank", "16"],
            14_699_520,
            "9.21 GB",
            "69.8 MB",
            "0.257 GB",
        ),
    ],
)
def test_adapters_count_by_what_trains(options, trained, states, averages, checkpoint):
    rows = planned(*options)
    total = int(rows["network"].split()[0].replace(",", ""))
    assert rows["network"].endswith(f"  {trained:,} train")
    assert rows["adapters"].startswith(f"rank 16  {trained / total:.2%} of the network train")
    assert rows["weights, gradients, AdamW"].startswith(f"{states}  fp32")
    assert rows.get("averages", "").partition("  ")[0] == (averages or "")
    assert rows["a checkpoint"].startswith(checkpoint)


def test_adapters_spare_the_gradients_of_frozen_weights():
    tflop = [
        float(planned("--config", f"experiments/emf/{name}.yaml")["a row"].split()[0])
        for name in ("blip3o_next", "blip3o_next_lora")
    ]
    # forward, its repetition, gradients of inputs, half of the rows' du/dt; and gradients of weights
    assert tflop[0] / tflop[1] == pytest.approx((4 + 1.99 / 2) / (3 + 1.99 / 2), rel=0.01)


def test_an_encoder_that_trains_counts():
    rows = planned("--config", "experiments/emf/sana_encoder.yaml")

    assert rows["text encoder"] == "2,614,341,888  all train"
    # 16 bytes of each weight that trains, the network's and the encoder's: fp32 weights, gradients, AdamW
    assert rows["weights, gradients, AdamW"].startswith("68.1 GB")
    assert rows["in all, one device or DDP"].endswith("does not fit")


def test_what_trains_two_networks_is_not_planned_as_sharded():
    rows = planned("--config", "experiments/shapes/fgm.yaml", "--samples", "1000")
    assert rows["in all, FSDP2"].startswith("none  it shards one network, and FGM trains two")
    assert rows["in all, one device or DDP"].endswith("fits")


def test_overlays_and_the_plans_own_options_count():
    files = ("experiments/emf/sana.yaml", "experiments/devices/fsdp2.yaml", "experiments/devices/nodes.yaml")
    options = [part for file in files for part in ("--config", file)]
    size = ["--trainer.devices", "8", "--trainer.strategy.init_args.data_parallel_size", "16"]
    one = planned(*options, *size, "--samples", "1000", "--device", "H200", "--utilisation", "0.6")
    two = planned(*options, *size, "--samples", "1000", "--device", "A100", "--utilisation", "0.6")

    assert one["steps"].startswith("200,000  of 128 rows")
    assert one["data.cache"].startswith("1.38 GB")
    assert "in all, FSDP2 over 16" in one
    seconds = [float(rows["a step"].split()[0]) for rows in (one, two)]
    assert seconds[1] / seconds[0] == pytest.approx(989 / 312, rel=0.01)


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [
        ("fgm/cifar10_teacher", "35,746,307"),  # DDPM's UNet for CIFAR-10, 35.7 M (arXiv 2006.11239)
        ("meanflow/flux_lite", "8,173,493,824"),  # FLUX.1-lite's 8,163 M and a second time embedding
    ],
)
def test_other_networks_are_planned(experiment, parameters):
    assert planned("--config", f"experiments/{experiment}.yaml")["network"].startswith(parameters)


def test_copies_and_discriminators_count():
    rows = planned("--config", "experiments/scflow/coco.yaml")

    assert rows["network"].startswith("859,520,964")  # Stable Diffusion 1.5's
    assert rows["copies that do not"] == "1,719,041,928  2 of the network"  # teacher, consistency target
    assert rows["discriminator"].startswith("363,")  # its encoder half and middle
    assert rows["weights, gradients, AdamW"].startswith("19.6 GB")  # 16 bytes of each that trains
    assert "passes: 3 train, 5 do not" in rows["a row"]


def test_what_is_stored_of_a_pair_follows_pooling_and_dtype():
    def entry(*options: str) -> str:
        return planned("--config", "experiments/emf/blip3o_next.yaml", *options)["data.cache"]

    pooled = ["--data.text.init_args.token_pool", "3"]
    assert entry(*pooled).startswith("64.8 GB  0.378 MB each in bfloat16")  # 1 + 27 x 27 / 9 tokens of 2304
    assert entry(*pooled, "--data.cache.dtype", "float8").startswith("32.7 GB  0.189 MB each in float8")


def test_what_pays_depends_on_how_often_a_pair_is_read():
    base = ("--config", "experiments/emf/blip3o_next.yaml")
    rows = planned(*base)

    assert rows["image tokens of a pair"].startswith("1.46 kB")  # 729 tokens of 16 bit
    best = {name: value.split("  ")[0] for name, value in rows.items() if name.endswith(" pairs")}
    assert best == {"170,000 pairs": "features", "10,000,000 pairs": "image tokens", "1,000,000,000 pairs": "nothing"}
    assert float(rows["encoding a pair again"].split()[2]) == pytest.approx(1 / 6, rel=0.3)

    dear = planned(*base, "--terabyte-month-price", "100000")
    assert dear["170,000 pairs"].startswith("image tokens")
    free = planned(*base, "--gpu-hour-price", "0")
    assert free["170,000 pairs"].startswith("nothing")


def test_the_cheapest_choice_by_hand():
    encoder = EncoderSize(1, 2, 4, 8, image_tokens=100, flops=(10**15, 3 * 10**15))
    prices = Prices(gpu_hour=3.6, terabyte_month=100.0, months=2.0)
    found = choices(encoder, 10**6, pairs=1000, rows=5000, flops_per_second=1e15, prices=prices)

    # features: 4 s of a GPU for each of 1000 pairs, 1 GB for two months; tokens: 1 s once, and 3 s at each read
    assert [(one.name, one.gpu_seconds, one.bytes) for one in found] == [
        ("features", 4000, 1e9),
        ("image tokens", 16000, 2e5),
        ("nothing", 20000, 0),
    ]
    assert [one.price for one in found] == pytest.approx([4 + 0.2, 16 + 2e-7 * 200, 20])


def test_what_is_kept_for_the_backward_pass_grows_with_blocks_and_checkpointing_saves_most():
    def cost(blocks: int):
        with torch.device("meta"):
            size = SanaArchitecture(num_layers=blocks, patch_size=1)
            net = SanaFlowMap(size, latent_channels=4, latent_size=16, context_width=32)
        return network_cost(net, (4, 16, 16), 20, 32)

    two, four, eight = (cost(blocks) for blocks in (2, 4, 8))
    assert eight.activations - four.activations == 2 * (four.activations - two.activations)
    assert eight.flops - four.flops == 2 * (four.flops - two.flops) > 0
    assert eight.block_activations < 0.3 * eight.activations


def test_operations_are_those_of_the_products():
    """A SANA of one block, counted by hand: its linear layers and convolutions."""
    size = SanaArchitecture(num_layers=1, patch_size=1)
    with torch.device("meta"):
        net = SanaFlowMap(size, latent_channels=4, latent_size=4, context_width=12)
        weights = dict(net.transformer.named_parameters())
    got = network_cost(net, (4, 4, 4), 5, 12).flops
    per_position = sum(
        p.numel()
        for name, p in weights.items()
        if name.endswith("weight")
        and name.startswith(("patch_embed", "transformer_blocks", "proj_out"))
        and not any(part in name for part in ("to_k", "to_v", "norm"))
    ) + sum(weights[f"transformer_blocks.0.attn1.to_{part}.weight"].numel() for part in "kv")
    by_hand = 2 * 16 * per_position
    assert by_hand < got < 1.6 * by_hand  # the rest: attention, the text's and the time's layers


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "experiments/emf/openuni.yaml", "--data.text.init_args.model", "no/where"], "model='no/where'"),
        (["--config", "experiments/emf/sana.yaml", "--months", "-1"], "must not be negative, got 3, 80, -1"),
        (["--config", "experiments/emf/sana.yaml", "--utilisation", "2"], "utilisation must lie in"),
        (["--config", "experiments/emf/sana.yaml", "--device", "H9"], "argument --device: invalid choice: 'H9'"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capsys, options, said):
    with pytest.raises(SystemExit):
        main(["plan", *options])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("given", "batch"), [("2", 2), ("0,1", 2), ("[0, 1]", 2), ("3,", 1), ("auto", 1), ("-1", 1)])
def test_devices_are_counted_as_lightning_counts_them(given, batch, capsys):
    main(["plan", "--config", "experiments/shapes/flow_matching.yaml", "--trainer.devices", given])
    said = capsys.readouterr().out
    assert f"Memory of each of {batch} devices" in said
    assert (f"trainer.devices {given}: planned with 1 device a node" in said) == (given in ("auto", "-1"))
