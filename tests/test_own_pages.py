"""The pages on parts of one's own: their code, experiments and commands run as written, from a folder of the user's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from emf_lightning.cli import main
from emf_lightning.pipeline import EMFPipeline
from tests.forked import Forked

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs/how_to"
SHORT = """
trainer:
  max_steps: 2
  val_check_interval: 2
  accelerator: cpu
  precision: 32-true
data: {batch_size: 8, num_workers: 0, resolution: 24, validation_share: 0.3}
"""


def pictures(folder: Path, count: int = 40) -> None:
    """Faces with a mood, in two folders, each with its text beside it."""
    for number in range(count):
        mood, colour = ("happy", "sad")[number % 2], ("yellow", "tomato", "skyblue")[number % 3]
        image = Image.new("RGB", (40, 32), "white")
        draw = ImageDraw.Draw(image)
        draw.ellipse((2, 2, 30, 30), fill=colour)
        draw.arc((8, 12, 24, 26), *((20, 160) if mood == "happy" else (200, 340)), fill="black", width=2)
        place = folder / mood
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:03d}.png")
        (place / f"{number:03d}.txt").write_text(f"a {mood} {colour} face")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which holds the experiments and ``my/pictures``, and whose files can be imported."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    pictures(tmp_path / "my/pictures")
    (tmp_path / "short.yaml").write_text(SHORT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write_page(name: str) -> list[list[str]]:
    """Writes a page's own class and experiment as ``my_<part>.py`` and ``.yaml``; returns its commands on them."""
    text = (PAGES / f"own_{name}.md").read_text()
    code = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "\nclass " in block]
    experiments = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if block.startswith("base:")]
    assert len(code) == len(experiments) == 1
    Path(f"my_{name}.py").write_text(code[0])
    Path(f"my_{name}.yaml").write_text(experiments[0])
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in blocks.splitlines() if "my_" in line and "compare" not in line]


def fit(*options: str) -> None:
    """`emf fit` with these options, for two steps."""
    scheduled = "own_data/" in Path(options[1]).read_text()
    warmup = ["--model.init_args.optimization.scheduler.init_args.warmup", "1"] if scheduled else []
    main(["fit", *options, "--config", "short.yaml", *warmup])


@pytest.mark.parametrize("name", ["network", "metric", pytest.param("encoder", marks=pytest.mark.slow)])
def test_a_class_of_ones_own_trains_from_its_page(name: str, folder: Path) -> None:
    commands = write_page(name)
    for command in commands:
        if command[0] == "fit":
            fit(*command[1:])
        else:
            main(command)
    (run,) = Path("runs").glob("**/version_0")
    assert run.name == "version_0" and run.parent.name == f"my_{name}"
    assert (run / "validation_captions/contact_sheet.png").is_file()
    if name == "metric":
        assert "colourfulness" in (run / "validation_captions/scores.jsonl").read_text()
        (rows, *_) = sorted((run / "validation_captions/results").glob("*.jsonl"))
        for line in rows.read_text().splitlines():
            assert {"filename", "prompt", "colourfulness"} <= set(json.loads(line))
    if name == "network":
        assert drawn_afresh("exported").shape == (24, 24, 3)


def draw(export: str) -> None:
    pipe = EMFPipeline.from_pretrained(export, trust_remote_code=True)
    pipe("a happy face", num_inference_steps=1).images[0].save("drawn.png")


def drawn_afresh(export: str) -> np.ndarray:
    """An image that a process of its own draws from an export, with the current folder on its path."""
    assert Forked(draw, export).wait() == 0
    return np.asarray(Image.open("drawn.png"))


@pytest.mark.slow
def test_an_objective_of_ones_own_starts_from_a_parent(folder: Path) -> None:
    fit("--config", "experiments/own_data/flow_matching.yaml", "--data.shards", "my/pictures")
    (command,) = write_page("objective")
    fit(*command[1:])
    assert (Path("runs/my_objective/version_0/checkpoints/last.ckpt")).is_file()
    main(["export", "--run", "runs/my_objective/version_0", "--out", "exported", "--trust_remote_code"])
    assert drawn_afresh("exported").std() > 0


TYPED = """
import dataclasses
import enum
import pathlib

import torch

from emf_lightning.text.words import WordEncoder
from my_network import MyFlowMap


class Mixing(enum.Enum):
    ADD = 1
    SCALE = 2


@dataclasses.dataclass
class Size:
    width: int = 8


class Typed(MyFlowMap):
    def __init__(self, size: Size, mixing: Mixing, file: pathlib.Path, layers: tuple[Size, ...] = (), **shapes: int):
        assert isinstance(mixing, Mixing) and file.read_text() == "kept" and all(one.width for one in layers)
        super().__init__(size.width, **shapes)


class Drawn(WordEncoder):
    def __init__(self) -> None:
        super().__init__(width=128)
        self.register_buffer("directions", torch.randn(3))


"""

FAILING = """
from my_network import MyFlowMap


class Failing(MyFlowMap):
    def __init__(self, **shapes: int) -> None:
        super().__init__(**shapes)
        self.layers = {}["heads"]
"""


def test_arguments_of_ones_own_kinds_are_exported_and_weights_drawn_at_random_are_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_page("network")
    Path("my_typed.py").write_text(TYPED)
    Path("settings.txt").write_text("kept")
    arguments = {"size": {"width": 3}, "mixing": "SCALE", "file": "settings.txt", "layers": [{"width": 2}]}
    net = json.dumps({"class_path": "my_typed.Typed", "init_args": arguments})
    options = ["--config", "my_network.yaml", "--data.shards", "my/pictures", "--model.init_args.net", net]
    fit(*options)
    main(["export", "--run", "runs/my_network/version_0", "--out", "exported", "--trust_remote_code"])
    assert "EMFPipeline.from_pretrained('exported', trust_remote_code=True)" in capsys.readouterr().out
    card = Path("exported/README.md").read_text()
    assert 'EMFPipeline.from_pretrained("exported", trust_remote_code=True)' in card
    assert "classes in `my_typed`, which this repository does not hold" in card
    Path("settings.txt").unlink()  # a copy is in the folder
    assert drawn_afresh("exported").shape == (24, 24, 3)
    Path("settings.txt").write_text("kept")
    fit(*options, "--data.text", "my_typed.Drawn")
    with pytest.raises(SystemExit):
        main(["export", "--run", "runs/my_network/version_1", "--out", "drawn", "--trust_remote_code"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "loads with other weights (directions, ...): Drawn is built again from the arguments" in said
    assert not Path("drawn").exists()


def test_an_error_in_a_constructor_of_ones_own_is_shown_where_it_is(folder: Path) -> None:
    write_page("network")
    Path("my_failing.py").write_text(FAILING)
    with pytest.raises(KeyError) as raised:
        fit(
            "--config", "my_network.yaml", "--data.shards", "my/pictures", "--model.init_args.net", "my_failing.Failing"
        )
    shown = [str(call.path) for call in raised.traceback]
    assert shown[-1] == str(folder / "my_failing.py")
    assert not any("jsonargparse" in path for path in shown)
    assert raised.value.__suppress_context__


FORGETFUL = """
from my_network import MyFlowMap


class Forgetful(MyFlowMap):
    def __init__(self, pretrained: str | None = None, latent_size: int = 24, context_width: int = 128) -> None:
        super().__init__(8, 3, latent_size, context_width)
"""


@pytest.mark.slow
def test_an_export_that_would_load_other_weights_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_page("network")
    Path("forgetful.py").write_text(FORGETFUL)
    net = json.dumps({"class_path": "forgetful.Forgetful"})
    fit("--config", "my_network.yaml", "--data.shards", "my/pictures", "--model.init_args.net", net)
    with pytest.raises(SystemExit):
        main(["export", "--run", "runs/my_network/version_0", "--out", "exported", "--trust_remote_code"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the written pipeline loads with other weights (layers.0.weight, ...)" in said
    assert "Forgetful.save_pretrained must write what its argument `pretrained` reads" in said


def test_the_encoder_study_takes_ones_own_pictures(folder: Path) -> None:
    options = ["--corpus.shards", "my/pictures", "--queries", "10"]
    main(["encoders", "--config", "experiments/encoders/own_data.yaml", *options])
    about = json.loads(Path("runs/encoders/own_data/encoders.json").read_text())
    assert "own data, 40 pairs, random features" in json.dumps(about)
    assert Path("runs/encoders/own_data/retrieved.png").is_file()
