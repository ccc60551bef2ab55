from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LOCKED = re.compile(r"[a-z0-9][a-z0-9-]*==[\w.+!]+( ; [\w\s.*'<>=!()]+)?( --hash=sha256:[0-9a-f]{64})+")


def test_callbacks_are_linked_into_the_package(root: Path) -> None:
    link = root / "src/emf_lightning/callbacks"

    assert link.is_symlink(), (
        f"{link} is an ordinary file: this checkout turned the link into text. "
        "Run `git config core.symlinks true && git checkout -- src/emf_lightning/callbacks`"
    )
    assert link.readlink() == Path("../../callbacks")
    assert (link / "__init__.py").is_file()


def test_lock_holds_names_exact_versions_and_hashes_only(root: Path) -> None:
    text = (root / "requirements.lock").read_text()
    entries = text.replace(" \\\n    ", " ").splitlines()

    assert len(entries) > 100
    assert [entry for entry in entries if not LOCKED.fullmatch(entry)] == []


def test_make_installs_only_what_the_hashes_match(root: Path) -> None:
    makefile = (root / "Makefile").read_text()

    files = re.findall(r"(.*) -r \S*\.lock", makefile)
    assert len(files) == 3  # uv, everything, the audit
    assert all("--require-hashes" in line for line in files)
    assert "--no-deps --no-build-isolation -e ." in makefile
    assert re.search(r"^AUDIT := pip-audit@[\d.]+$", makefile, re.MULTILINE)
    assert re.search(r"^uv==", (root / "requirements.lock").read_text(), re.MULTILINE)


def test_lock_covers_every_direct_dependency(root: Path) -> None:
    locked = {line.partition("==")[0] for line in (root / "requirements.lock").read_text().splitlines()}
    project = (root / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    asked = re.findall(r'^    "([\w-]+)', project, re.MULTILINE)

    assert len(asked) > 15
    assert {name.lower().replace("_", "-") for name in asked} - locked == set()


def test_no_compromised_lightning_is_let_in(root: Path) -> None:
    locked = (root / "requirements.lock").read_text()

    assert not re.search(r"^(pytorch-)?lightning==2\.6\.[23]\b", locked, re.MULTILINE)
    assert '"lightning>=2.6,!=2.6.2,!=2.6.3"' in (root / "pyproject.toml").read_text()


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
