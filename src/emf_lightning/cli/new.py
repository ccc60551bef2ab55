"""`emf new`: a copy of a shipped experiment to start from."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from emf_lightning.cli.parsing.experiment_files import config_files
from emf_lightning.cli.shipped import SHIPPED, experiment_file, shipped_path, unknown


def new(out: Path, experiment: str = "shapes/demo") -> None:
    """Copy a shipped experiment and the files it builds on into a folder, to change them.

    Weights that it names stay in the package and are found there.

    Args:
        out: folder to write.
        experiment: name of a shipped experiment, as in `emf experiments`.
    """
    source = experiment_file(shipped_path(experiment))
    if source is None or not source.resolve().is_relative_to(SHIPPED):
        raise ValueError(f"experiment: there is no {experiment}{unknown(experiment)}")
    copies = {file: out / file.resolve().relative_to(SHIPPED) for file in config_files(source)}
    if there := [str(copy) for copy in copies.values() if copy.exists()]:
        raise ValueError(f"out: {there[0]} is there already; give another folder, or remove it")
    for file, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        print(copy)
    shipped = f"experiments/{copies[source].relative_to(out)}"
    usage = re.search(rf"emf \w+ [^`\n]*{re.escape(shipped)}", source.read_text())
    command = usage[0] if usage else f"emf fit --config {shipped}"
    print(command.replace(shipped, shlex.quote(str(copies[source]))))
