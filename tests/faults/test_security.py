"""Files from a stranger run no code: a crafted file would leave a canary if what it names were called or imported."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import _common
from omegaconf.basecontainer import BaseContainer
from torch.distributed.checkpoint import Metadata

from emf_lightning.cli import main
from emf_lightning.cli.load_run import load_run
from emf_lightning.cli.parsing.parser_errors import class_of
from emf_lightning.flow.guidance import ConditionedGuidance, SamplingGuidance
from emf_lightning.modules.flow_map import FlowMapModule
from emf_lightning.part_classes import builder
from emf_lightning.pipeline import EMFPipeline, PipelinePart
from tests.cli.world import BASE

EXPORT = Path(__file__).parents[1] / "earlier_versions" / "export"
CANARY = "canary"
MODULE = f"open({CANARY!r}, 'w').close()\n\n\nclass Stranger:\n    pass\n"

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "os.system": ("os.system", {"command": f"touch {CANARY}"}),
    "posix": ("posix.system", {"command": f"touch {CANARY}"}),
    "Popen": ("subprocess.Popen", {"args": ["touch", CANARY]}),
    "open": ("builtins.open", {"file": CANARY, "mode": "w"}),
    "exec": ("builtins.exec", {"__source": f"open({CANARY!r}, 'w')"}),
    "run_path": ("runpy.run_path", {"path_name": "stranger.py"}),
    "import": ("stranger.Stranger", {}),
    "import_module": ("importlib.import_module", {"name": "stranger"}),
    "through our module": ("emf_lightning.files.os.system", {"command": f"touch {CANARY}"}),
    "through our package": ("emf_lightning.networks.sana.torch.os.system", {"command": f"touch {CANARY}"}),
    "our function": ("emf_lightning.files.write_json_lines", {"path": CANARY, "rows": []}),
    "our command line": ("emf_lightning.cli.main", {"args": ["captions", "--prompts", "p.txt", "--out", CANARY]}),
    "our class elsewhere": ("emf_lightning.data.cache.lmdb_store.LmdbStore", {"path": CANARY}),
    "a library's class": ("lightning.pytorch.loggers.CSVLogger", {"save_dir": CANARY}),
    "a library's function": ("torch.utils.cpp_extension.load", {"name": "x", "sources": ["x.cpp"]}),
    "a package's copy": ("emf_lightning_.Stranger", {}),
    "no path": ("system", {"command": f"touch {CANARY}"}),
    "dots": ("..os.system", {"command": f"touch {CANARY}"}),
    "a list": (["os", "system"], {}),  # type: ignore[dict-item]
    "a method": ("pathlib.Path.touch", {"self": CANARY}),
}
"""Something that leaves the canary: the name that a file gives it, and its arguments."""


def spec(call: str) -> dict[str, Any]:
    path, arguments = CALLS[call]
    return {"class_path": path, "init_args": arguments}


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A working directory with a stranger's modules, in which nothing may have run at the end of a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "stranger.py").write_text(MODULE)
    (tmp_path / "emf_lightning_.py").write_text(MODULE)
    (tmp_path / "p.txt").write_text("a dog\n")
    yield tmp_path / CANARY
    assert not (tmp_path / CANARY).exists(), "a stranger's file ran code"
    assert not {"stranger", "emf_lightning_"} & set(sys.modules), "a stranger's module was imported"


# -- exported folders -------------------------------------------------------------------------------------------------


def exported(tmp_path: Path, file: str, change: Any) -> str:
    """A copy of an exported folder whose JSON ``file`` was changed."""
    folder = tmp_path / "export"
    shutil.copytree(EXPORT, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return str(folder)


def at(*keys: str, value: Any) -> Any:
    """A change that puts ``value`` at the place ``keys``."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


PART = "transformer/part.json"


SOME = ("import", "os.system", "through our module", "our class elsewhere", "a list")


@pytest.mark.parametrize(
    ("file", "keys", "call"),
    [(PART, (), call) for call in CALLS]
    + [
        (file, keys, call)
        for call in SOME
        for file, keys in [
            (PART, ()),
            ("vae/part.json", ()),
            ("text_encoder/part.json", ()),
            (PART, ("init_args", "prediction")),
            (PART, ("init_args", "prediction", "init_args", "min_time")),
            (PART, ("init_args", "interval")),
            (PART, ("init_args", "time_scale")),
            (PART, ("init_args", "unknown")),
            (PART, ("init_args",)),
            ("vae/part.json", ("init_args",)),
            ("text_encoder/part.json", ("init_args",)),
            (PART, ("init_args", "prediction", "init_args")),
            ("model_index.json", ("sampler", "init_args")),
            ("model_index.json", ("sampler",)),
            ("model_index.json", ("guidance",)),
            ("model_index.json", ("model",)),
        ]
    ],
)
def test_a_part_of_another_class_is_refused(tmp_path, file, keys, call):
    def change(content: Any) -> None:
        if file == "model_index.json" and keys != ("model",):
            guidance = {"class_path": "emf_lightning.flow.guidance.ClassifierFreeGuidance"}
            content |= {"sampler": {"class_path": "emf_lightning.flow.sampling.EulerSampler"}, "guidance": guidance}
            content["model"] = None
        if keys:
            at(*keys, value=spec(call))(content)
        else:
            content.update(spec(call))

    folder = exported(tmp_path, file, change)
    if keys == ("model",) and call != "a list":  # of earlier versions: its name alone is read
        EMFPipeline.from_pretrained(folder)
        return
    with pytest.raises(ValueError, match="class_path"):
        EMFPipeline.from_pretrained(folder)
    if file == PART:
        with pytest.raises(ValueError, match="class_path"):
            PipelinePart.from_pretrained(Path(folder) / "transformer")


@pytest.mark.parametrize("call", ["os.system", "import", "through our module"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda one: [one],
        lambda one: {"a": {"b": [one]}},
        lambda one: {"class_path": "emf_lightning.networks.prediction.PredictData", "init_args": {"min_time": [one]}},
    ],
)
def test_a_class_deep_inside_the_arguments_is_refused(tmp_path, wrap, call):
    folder = exported(tmp_path, PART, at("init_args", "prediction", value=wrap(spec(call))))
    with pytest.raises(ValueError, match="class_path"):
        EMFPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "value",
    [
        ["os", "system"],
        ["stranger", "Stranger"],
        ["emf_lightning.files", "write_atomic"],
        ["emf_lightning.pipeline", "EMFPipeline"],
        ["diffusers", "DiffusionPipeline"],
        ["transformers", "AutoModel"],
        "stranger.Stranger",
        [None, None],
    ],
)
@pytest.mark.parametrize("name", ["transformer", "vae", "scheduler"])
def test_a_component_of_the_index_that_is_no_part_of_ours_is_refused(tmp_path, name, value):
    folder = exported(tmp_path, "model_index.json", at(name, value=value))
    if name == "scheduler" and isinstance(value, str):
        EMFPipeline.from_pretrained(folder)  # a value that nothing reads
        return
    with pytest.raises(ValueError, match=f"model_index.json: {name} is "):
        EMFPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", [["stranger", "Stranger"], "DiffusionPipeline", "os.system", None])
def test_a_pipeline_class_in_the_folder_is_refused(tmp_path, name):
    folder = exported(tmp_path, "model_index.json", at("_class_name", value=name))
    shutil.copy("stranger.py", folder)
    with pytest.raises(ValueError, match="_class_name is "):
        EMFPipeline.from_pretrained(folder)


def test_trust_is_not_a_word_of_the_folder(tmp_path):
    folder = exported(tmp_path, "model_index.json", at("trust_remote_code", value=True))
    at_part = Path(folder) / PART
    at_part.write_text(json.dumps(spec("import") | {"trust_remote_code": True}))
    with pytest.raises(ValueError, match="say so with trust_remote_code"):
        EMFPipeline.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00", "[" * 100_000, '{"class_path": 3}', '{"init_args": []}'])
@pytest.mark.parametrize("file", [PART, "model_index.json"])
def test_a_damaged_file_of_an_exported_folder_is_named(tmp_path, file, text):
    folder = exported(tmp_path, file, dict)
    (Path(folder) / file).write_text(text)
    with pytest.raises(ValueError, match=file):
        EMFPipeline.from_pretrained(folder)


def test_a_spec_keeps_the_kinds_of_its_values():
    spec = {"class_path": "emf_lightning.flow.guidance.ConditionedGuidance", "init_args": {"interval": (0.0, 0.5)}}
    assert builder(spec, (SamplingGuidance,), "here")() == ConditionedGuidance(interval=(0.0, 0.5))


def test_a_class_of_ones_own_loads_from_a_folder_that_one_trusts(tmp_path, monkeypatch):
    (tmp_path / "own_encoder.py").write_text(
        "from emf_lightning.text.words import WordEncoder\n\n\nclass OwnEncoder(WordEncoder):\n    pass\n"
    )
    own = {"class_path": "own_encoder.OwnEncoder", "init_args": {"width": 8, "length": 10}}
    folder = exported(tmp_path, "text_encoder/part.json", lambda content: content.update(own))
    with pytest.raises(ValueError, match=r"own_encoder\.OwnEncoder"):
        EMFPipeline.from_pretrained(folder)
    pipe = EMFPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe.text_encoder.part).__name__ == "OwnEncoder"


# -- run folders ------------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[str, ...]] = {
    "callback": ("trainer", "callbacks", "0"),
    "logger": ("trainer", "logger"),
    "strategy": ("trainer", "strategy"),
    "plugin": ("trainer", "plugins"),
    "profiler": ("trainer", "profiler"),
    "accelerator": ("trainer", "accelerator"),
    "text": ("data", "text"),
    "autoencoder": ("data", "autoencoder"),
    "cache": ("data", "cache"),
    "model": ("model",),
    "net": ("model", "init_args", "net"),
    "objective": ("model", "init_args", "objective"),
    "weighting": ("model", "init_args", "objective", "init_args", "weighting"),
    "prediction": ("model", "init_args", "net", "init_args", "prediction"),
    "architecture": ("model", "init_args", "net", "init_args", "architecture"),
    "optimizer": ("model", "init_args", "optimization", "optimizer"),
    "scheduler": ("model", "init_args", "optimization", "scheduler"),
}


def crafted(keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The tiny experiment with ``value`` at the place ``keys``."""
    content = yaml.safe_load(BASE.replace("${trainer.max_steps}", "2"))
    content["data"]["prompts"] = "p.txt"
    inner = content
    for key in keys[:-1]:
        inner = inner[int(key)] if isinstance(inner, list) else inner.setdefault(key, {})
    inner[int(keys[-1]) if isinstance(inner, list) else keys[-1]] = value
    return content


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def run_folder(content: Any) -> Path:
    Path("run/checkpoints").mkdir(parents=True, exist_ok=True)
    Path("run/checkpoints/step=1.ckpt").touch()
    Path("run/config.yaml").write_text(yaml.safe_dump(content))
    return Path("run/config.yaml")


def quick(cases: Iterable[tuple[str, str]], kinds: tuple[str, ...], with_second: str) -> list[Any]:
    """All ``cases``, of which those of ``kinds`` with one value of the second are quick, one of each kind."""
    return [
        pytest.param(*case, marks=() if case[0] in kinds and case[1] == with_second else pytest.mark.slow)
        for case in cases
    ]


KINDS = ("callback", "strategy", "text", "net", "weighting", "optimizer")


@pytest.mark.parametrize(
    ("place", "call"), quick(product(PLACES, ("import", "through our module")), KINDS, "through our module")
)
def test_a_run_folder_that_names_another_class_is_refused(capsys, place, call):
    run_folder(crafted(PLACES[place], spec(call)))
    said = refused(capsys, "export", "--run", "run", "--out", "out")
    assert "trust_remote_code" in said, said


LOOSE: dict[str, tuple[tuple[str, ...], Any]] = {
    "a callable as a name": (
        ("trainer", "callbacks", "0"),
        {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "os.system"}},
    ),
    "a callable as a spec": (
        ("trainer", "callbacks", "0"),
        {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": spec("import")}},
    ),
    "an argument of any type": (
        ("trainer", "logger"),
        {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"experiment": spec("os.system")}},
    ),
    "keywords that a logger passes on": (
        ("trainer", "logger", "init_args", "sub_dir"),
        {"class_path": "stranger.Stranger"},
    ),
    "keywords of a strategy": (
        ("trainer", "strategy"),
        {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": "os.system"}},
    ),
    "a policy of a strategy": (
        ("trainer", "strategy"),
        {"class_path": "lightning.pytorch.strategies.FSDPStrategy", "init_args": {"auto_wrap_policy": spec("import")}},
    ),
    "keywords of an optimiser": (
        ("model", "init_args", "optimization", "optimizer"),
        {"class_path": "torch.optim.AdamW", "init_args": {"lr": spec("os.system")}},
    ),
    "a function of a schedule": (
        ("model", "init_args", "optimization", "scheduler"),
        {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "os.system"}},
    ),
    "a dict": (("trainer", "limit_train_batches"), spec("import")),
    "a plain value": (("trainer", "callbacks", "0", "init_args", "monitor"), spec("os.system")),
    "a plugin's argument": (
        ("trainer", "plugins"),
        [{"class_path": "lightning.pytorch.plugins.AsyncCheckpointIO", "init_args": {"checkpoint_io": spec("import")}}],
    ),
    "an argument that is not there": (("data", "text", "init_args", "_target_"), "os.system"),
    "options of an autoencoder": (
        ("data", "autoencoder"),
        {"class_path": "KLAutoencoder", "init_args": {"pretrained": "x", "dtype": spec("import")}},
    ),
    "a tag of YAML": (("data", "text"), "TAG"),
}
"""Places that take functions, or values of any type."""


LOOSE_KINDS = ("a callable as a name", "an argument of any type", "keywords of a strategy", "a dict", "a tag of YAML")


@pytest.mark.parametrize(("place", "verb"), quick(product(LOOSE, ("export", "test")), LOOSE_KINDS, "export"))
def test_a_run_folder_calls_nothing_where_a_place_takes_anything(place, verb):
    keys, value = LOOSE[place]
    config = run_folder(crafted(keys, value))
    config.write_text(config.read_text().replace("TAG", "!!python/object/apply:os.system ['touch canary']"))
    options = {"export": ["--run", "run", "--out", "out"]}.get(verb, ["--config", str(config)])
    with pytest.raises((SystemExit, ValueError)):  # at the latest for want of a checkpoint, or of shards
        main([verb, *options, *(["--ckpt_path", "run/last.ckpt"] if verb == "test" else [])])


@pytest.mark.parametrize(
    "path", ["stranger.Stranger", "os.system", "Stranger", "", "emf_lightning_.Stranger", "os.path"]
)
def test_a_class_is_looked_up_without_importing_its_module(path):
    with pytest.raises(ValueError, match="names no class that is known here"):
        class_of(path)


@pytest.mark.parametrize("verb", ["validate", "test", "predict", "plan", "cache"])
def test_every_verb_but_fit_refuses_a_strangers_class(capsys, verb):
    config = run_folder(crafted(("data", "text"), spec("import")))
    assert "trust_remote_code" in refused(capsys, verb, "--config", str(config))


def test_a_file_for_a_function_is_refused_alike(capsys, tmp_path):
    Path("images").mkdir()
    Path("score.yaml").write_text(yaml.safe_dump({"folder": "images", "metric": spec("import")}))
    Path("encoders.yaml").write_text(yaml.safe_dump({"encoders": {"one": spec("os.system")}}))
    assert "trust_remote_code" in refused(capsys, "score", "--config", "score.yaml")
    assert "trust_remote_code" in refused(capsys, "encoders", "--config", "encoders.yaml")


@pytest.mark.parametrize(
    "value", ["${oc.env:SECRET}", "a/${oc.env:SECRET,b}", "${oc.create:${oc.env:SECRET}}", "${own:1}"]
)
@pytest.mark.parametrize("verb", ["export", "plan"])
def test_a_run_folder_reads_no_environment(capsys, monkeypatch, verb, value):
    monkeypatch.setenv("SECRET", "hush")
    monkeypatch.setitem(BaseContainer._resolvers, "own", lambda *_: Path(CANARY).touch())
    run_folder(crafted(("data", "shards"), value))
    options = ["--run", "run", "--out", "out"] if verb == "export" else ["--config", "run/config.yaml"]
    said = refused(capsys, verb, *options)
    assert "shards: ${o" in said
    assert "trust_remote_code" in said
    assert "hush" not in said
    assert "own" in BaseContainer._resolvers


def test_a_run_folder_cannot_trust_itself(capsys):
    content = crafted(("data", "text"), spec("import"))
    run_folder(content | {"trust_remote_code": True})
    refused(capsys, "export", "--run", "run", "--out", "out")


def test_a_class_of_ones_own_needs_the_flag_outside_fit(capsys, tmp_path):
    (tmp_path / "own_words.py").write_text(
        "from emf_lightning.text.words import WordEncoder\n\n\nclass OwnWords(WordEncoder):\n    pass\n"
    )
    config = run_folder(crafted(("data", "text"), {"class_path": "own_words.OwnWords", "init_args": {"width": 16}}))
    Path("run/checkpoints/last.ckpt").touch()
    assert "own_words.OwnWords" in refused(capsys, "plan", "--config", str(config))
    main(["plan", "--config", str(config), "--trust_remote_code"])
    assert "cannot be read as a checkpoint" in refused(
        capsys, "export", "--run", "run", "--out", "out", "--trust_remote_code"
    )
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_run("run", trust_remote_code=True)
    with pytest.raises(Exception, match=r"own_words\.OwnWords"):
        load_run("run")
    # fit is the one's own experiment: it stops for want of shards alone
    assert "shards" in refused(capsys, "fit", "--config", str(config))


def test_the_parser_of_other_programs_is_as_before(capsys):
    before = dict(_common.parsing_settings)
    run_folder(crafted(("data", "text"), spec("import")))
    refused(capsys, "export", "--run", "run", "--out", "out")
    assert before == _common.parsing_settings


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def checkpoint(**content: Any) -> str:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "global_step": 1, **content}, "run.ckpt")
    return "run.ckpt"


@pytest.mark.parametrize("call", ["os.system", "import", "through our module", "our function"])
def test_a_checkpoint_whose_hyperparameters_name_another_class_is_refused(call):
    settings = yaml.safe_load(BASE.replace("${trainer.max_steps}", "2"))["model"]["init_args"]
    instantiator = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    FlowMapModule.load_from_checkpoint(checkpoint(hyper_parameters=settings | instantiator), strict=False)
    with pytest.raises(Exception, match="is not allowed"):
        FlowMapModule.load_from_checkpoint(checkpoint(hyper_parameters=settings | instantiator | {"net": spec(call)}))


@pytest.mark.parametrize("name", ["os.system", "stranger.Stranger", "emf_lightning.files.os.system"])
def test_a_function_in_a_checkpoint_is_not_called(name):
    with pytest.raises(Exception, match="instantiator"):
        FlowMapModule.load_from_checkpoint(checkpoint(hyper_parameters={"_instantiator": name}))


def test_a_pickle_in_a_checkpoint_is_not_run(capsys):
    path = checkpoint(hyper_parameters=Bomb())
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        FlowMapModule.load_from_checkpoint(path)
    config = run_folder(crafted(("data", "batch_size"), 1))
    assert "cannot be read as a checkpoint" in refused(capsys, "test", "--config", str(config), "--ckpt_path", path)
    Path("run/checkpoints").mkdir(exist_ok=True)
    shutil.copy(path, "run/checkpoints/last.ckpt")
    assert "cannot be read as a checkpoint" in refused(capsys, "export", "--run", "run", "--out", "out")


@pytest.mark.parametrize("verb", ["validate", "fit"])
@pytest.mark.parametrize("file", [".metadata", "meta.pt"])
def test_a_pickle_in_a_sharded_checkpoint_is_not_run(capsys, verb, file):
    strategy = {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 1, "tensor_parallel_size": 1},
    }
    config = run_folder(crafted(("trainer", "strategy"), strategy))
    Path("sharded").mkdir()
    Path("sharded/.metadata").write_bytes(pickle.dumps(Bomb() if file == ".metadata" else Metadata({})))
    torch.save(Bomb(), "sharded/meta.pt")
    said = refused(capsys, verb, "--config", str(config), "--ckpt_path", "sharded", "--trainer.devices", "1")
    assert f"sharded/{file} cannot be read as part of a sharded checkpoint" in said
    assert file != ".metadata" or "it names posix.system" in said


def test_a_checkpoint_that_the_file_itself_names_is_read_without_pickles(capsys):
    content = crafted(("data", "batch_size"), 1)
    config = run_folder(content | {"ckpt_path": checkpoint(hyper_parameters=Bomb()), "weights_only": False})
    assert "cannot be read as a checkpoint" in refused(capsys, "test", "--config", str(config))
