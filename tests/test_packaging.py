from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from emf_lightning.cli import main

LOCKED = re.compile(r"[a-z0-9][a-z0-9-]*==[\w.+!]+( ; [\w\s.*'<>=!()]+)?( --hash=sha256:[0-9a-f]{64})+")


@pytest.mark.parametrize(("folder", "file"), [("callbacks", "__init__.py"), ("experiments", "shapes/demo.yaml")])
def test_a_folder_is_linked_into_the_package(root: Path, folder: str, file: str) -> None:
    link = root / "src/emf_lightning" / folder

    assert link.is_symlink(), (
        f"{link} is an ordinary file: this checkout turned the link into text. "
        f"Run `git config core.symlinks true && git checkout -- src/emf_lightning/{folder}`"
    )
    assert link.readlink() == Path("../..", folder)
    assert (link / file).is_file()


def test_lock_holds_names_exact_versions_and_hashes_only(root: Path) -> None:
    text = (root / "requirements.lock").read_text()
    entries = text.replace(" \\\n    ", " ").splitlines()

    assert len(entries) > 100
    assert [entry for entry in entries if not LOCKED.fullmatch(entry)] == []


def test_make_installs_only_what_the_hashes_match(root: Path) -> None:
    makefile = (root / "Makefile").read_text()

    files = re.findall(r"(.*) -r (?:\S*\.lock|\$\(2\))", makefile)
    assert len(files) == 4  # uv, everything, in one environment and in each of several, the audit
    assert all("--require-hashes" in line for line in files)
    assert "--no-deps --no-build-isolation -e ." in makefile
    assert re.search(r"^AUDIT := pip-audit@[\d.]+$", makefile, re.MULTILINE)
    assert re.search(r"^uv==", (root / "requirements.lock").read_text(), re.MULTILINE)


def test_lock_covers_every_direct_dependency(root: Path) -> None:
    locked = {line.partition("==")[0] for line in (root / "requirements.lock").read_text().splitlines()}
    project = (root / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    project = re.sub(r"^play = \[.*?^\]", "", project, flags=re.DOTALL | re.MULTILINE)  # installed by those who want it
    asked = re.findall(r'^    "([\w-]+)', project, re.MULTILINE)

    assert len(asked) > 15
    assert {name.lower().replace("_", "-") for name in asked} - locked == set()


def test_no_compromised_lightning_is_let_in(root: Path) -> None:
    locked = (root / "requirements.lock").read_text()

    assert not re.search(r"^(pytorch-)?lightning==2\.6\.[23]\b", locked, re.MULTILINE)
    asked = re.search(r'^    "lightning([^"]+)"', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert asked is not None
    assert not any(SpecifierSet(asked[1]).contains(version) for version in ("2.6.2", "2.6.3"))


def test_help_lists_every_verb_without_importing_torch() -> None:
    code = (
        "import sys; from emf_lightning.cli import main; main(['--help']);"
        "print([name for name in ('torch', 'lightning', 'jsonargparse', 'numpy') if name in sys.modules])"
    )

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert all(f"\n  {verb} " in out for verb in ("fit", "validate", "test", "predict", "shards"))
    assert out.splitlines()[-1] == "[]"


def test_make_help_lists_every_verb(root: Path) -> None:
    phony = re.search(r"^\.PHONY: (.*)", (root / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None

    out = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout

    verbs = phony[1].partition("$")[0].split()
    assert len(verbs) > 10
    assert [verb for verb in verbs if f"make {verb} " not in out] == []


def test_the_shards_of_one_target_do_not_stand_in_the_way_of_another(root: Path, tmp_path: Path, monkeypatch) -> None:
    makefile = (root / "Makefile").read_text()
    written = [line.split() for line in re.findall(r"\(BIN\)/emf (shards .*)", makefile)]
    assert len(written) == 3  # training, validation, the parent's

    monkeypatch.chdir(tmp_path)
    for arguments in written:
        count = arguments.index("--count") + 1
        main([*arguments[:count], str(int(arguments[count]) // 1000), *arguments[count + 1 :]])

    read = re.findall(r"--data.shards (data/\S+)", makefile)
    assert read and all((tmp_path / folder / "manifest.json").is_file() for folder in read)


@pytest.mark.parametrize("command", [None, "apptainer exec --nv emf.sif emf"])
def test_the_slurm_script_starts_the_command_on_all_ranks(root: Path, tmp_path: Path, command: str | None) -> None:
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    environment |= {} if command is None else {"EMF": command}
    script = ["bash", str(root / "experiments/devices/slurm.sh"), "shapes/emf", "--config", "devices/nodes"]

    out = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    options = (
        "fit --config shapes/emf --config devices/ddp --config devices/nodes --trainer.num_nodes 2 --trainer.devices 8"
    )
    assert out == ["--kill-on-bad-exit=1", *(command or "emf").split(), *options.split()]


def test_the_container_is_built_of_files_that_are_there_and_of_the_lock(root: Path) -> None:
    text = (root / "Dockerfile").read_text()

    copied = re.findall(r"^COPY (\S+) ", text, re.MULTILINE)
    assert copied == ["requirements.lock", "."]
    assert all((root / name).exists() for name in copied)
    ignored = (root / ".dockerignore").read_text().split()
    assert not {"src", "callbacks", "experiments", "README.md", "LICENSE", "pyproject.toml"} & set(ignored)
    locks = re.findall(r"(.*) -r \S+\.lock", text)
    assert len(locks) == 2  # uv, then everything
    assert all("--require-hashes" in line for line in locks)


@pytest.mark.slow
def test_the_wheel_and_the_source_archive_hold_every_shipped_experiment(root: Path, tmp_path: Path) -> None:
    tracked = ["git", "ls-files", "-z", "callbacks", "experiments", "src", "LICENSE", "README.md", "pyproject.toml"]
    for name in filter(None, subprocess.run(tracked, cwd=root, capture_output=True, text=True).stdout.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / name, follow_symlinks=False)
    build = [sys.executable, "-m", "uv", "build", "--quiet", "--no-build-isolation", "--python", sys.executable, "."]
    subprocess.run(build, cwd=tmp_path, check=True)

    shipped = [file.relative_to(tmp_path) for file in (tmp_path / "experiments").rglob("*") if file.is_file()]
    (wheel,), (archive,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as built, tarfile.open(archive) as source:
        holds = {"": built.namelist(), f"{archive.name.removesuffix('.tar.gz')}/src/": source.getnames()}
    for prefix, names in holds.items():
        wanted = {f"{prefix}emf_lightning/{file.as_posix()}" for file in shipped}
        assert len(wanted) > 50
        assert wanted - set(names) == set()
