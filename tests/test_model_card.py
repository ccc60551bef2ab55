"""The card of an exported model, and its way to the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from emf_lightning.cli import main
from emf_lightning.cli.model_card import public_name
from tests.hub_server import hub
from tests.test_pipeline import CONFIG, RUNS, SCORES

PARENT = "runs/parent/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that started from another one, and its export."""
    path = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        Path("scores.yaml").write_text(SCORES)
        main(["shards", "--out", "shards", "--count", "16", "--samples_per_shard", "8"])
        from_parent = ["--config", "scores.yaml", "--model.init_args.init_from", PARENT]
        for name, options in (("parent", []), ("child", from_parent)):
            Path(f"{name}.yaml").write_text(CONFIG.format(name=name, **RUNS["meanflow"]))
            main(["fit", "--config", f"{name}.yaml", *options])
        data = path.resolve() / "shards"
        config = Path("runs/child/version_0/config.yaml")
        config.write_text(config.read_text().replace("shards: shards", f"shards: [{data}]"))
        options = ["--license", "apache-2.0", "--parent", "owner/parent"]
        main(["export", "--run", "runs/child/version_0", "--out", "exported", *options])
        main(["export", "--run", "runs/child/version_0", "--out", "plain"])
    return path


def test_the_head_is_what_the_hub_reads(world):
    card = ModelCard.load(world / "exported/README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "owner/parent"
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.data.app_file == "app.py"
    results = [result for result in card.data.eval_results if result.metric_type == "shapes"]
    assert {result.metric_name for result in results} == {f"shapes (steps {n}, guidance 1)" for n in (1, 2)}
    assert all(0 <= result.metric_value <= 1 for result in results)
    plain = ModelCard.load(world / "plain/README.md")
    assert (plain.data.license, plain.data.base_model) == (None, None)


def test_it_names_the_parent_of_the_training_and_no_path_of_the_machine(world):
    for export in ("exported", "plain"):
        text = (world / export / "README.md").read_text()
        assert str(world) not in text
    assert "| started from | last.ckpt of the run parent/version_0 |" in text
    assert "| seed | 1 |" in text
    assert "| training data | shards |" in text


def test_the_prompt_of_its_example_is_one_of_the_runs_own(world):
    prompts = (world / "exported/prompts.txt").read_text().splitlines()
    assert f"pipe({prompts[0]!r}, num_inference_steps=1" in (world / "exported/README.md").read_text()


def test_it_says_what_stock_classes_do(world):
    text = (world / "exported/README.md").read_text()
    assert "The stock class SanaTransformer2DModel loads it without its second time, and computes something" in text
    assert "trust_remote_code=True" in text
    assert "pip install emf_lightning" in text


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("owner/name", "owner/name"),
        ("/home/somebody/models/sana", "sana"),
        ("runs/a/version_0/checkpoints/last.ckpt", "last.ckpt"),
        ("https://host/data/{000..009}.tar", "{000..009}.tar"),
    ],
)
def test_names_of_the_hub_alone_are_shown_whole(name, public):
    assert public_name(name) == public


@pytest.mark.parametrize(
    ("name", "said"),
    [("owner/name", "push: owner/name cannot be uploaded, as HF_HUB_OFFLINE"), ("a/b/c", "push: 'a/b/c' is no name")],
)
def test_pushing_is_refused_in_a_sentence(world, monkeypatch, capsys, name, said):
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit):
        main(["export", "--run", "runs/child/version_0", "--out", "pushed", "--push", name])
    assert said in capsys.readouterr().err
    assert not Path("pushed").exists(), "before any work"


def test_a_pushed_export_is_downloaded_as_it_was_written(world, tmp_path):
    code = (
        "from pathlib import Path\nfrom emf_lightning.hub import pushed\n"
        "print(pushed(Path('exported'), 'owner/name'))\n"
        "from huggingface_hub import snapshot_download\nprint(snapshot_download('owner/name'))\n"
    )
    (tmp_path / "empty").mkdir()
    with hub("owner/name", tmp_path / "empty") as address:
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_TOKEN": "none"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code], cwd=world, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    url, copy = done.stdout.strip().splitlines()[-2:]
    assert url == f"{address}/owner/name"
    written, received = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (world / "exported", Path(copy))
    )
    assert "model_index.json" in written
    assert received == written


def test_a_hub_that_cannot_be_reached_is_named(world):
    code = (
        "from pathlib import Path\nfrom emf_lightning.hub import check_pushing, pushed\n"
        "check_pushing('owner/name')\npushed(Path('exported'), 'owner/name')\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "none"}
    done = subprocess.run([sys.executable, "-c", code], cwd=world, env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: push: exported is written, but owner/name cannot be uploaded (")
