"""The command line: `emf VERB ...`.

Each verb imports its own modules, so that `emf --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from importlib.metadata import version

from emf_lightning.cli.parsing import import_classes, without_collection
from emf_lightning.cli.verbs import EXPERIMENT_VERBS, FUNCTION_VERBS, TRAINER_VERBS

_HELP = """\
usage: emf VERB [options]

{verbs}

An experiment is a YAML file:   emf fit --config experiments/shapes/demo.yaml
or the name of a shipped one:   emf fit --config shapes/demo
Options override its values:    emf fit --config FILE --trainer.max_steps 1000
All options of a verb:          emf VERB --help
Options of a part:              emf fit --config FILE --model.net.architecture.help
EMF_DEBUG=1 shows the traceback of an error.
Classes of your own:            emf fit builds them; other verbs only with --trust_remote_code
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one verb of the command line.

    Args:
        args: the arguments after ``emf``; by default ``sys.argv[1:]``.

    Raises:
        SystemExit: with status 2 and one line on stderr if the user can fix the error.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        verbs = {**TRAINER_VERBS, **EXPERIMENT_VERBS, **FUNCTION_VERBS}
        print(_HELP.format(verbs="\n".join(f"  {name:<11} {line}" for name, line in verbs.items())), end="")
    elif verb == "--version":
        print(f"emf_lightning {version('emf_lightning')}")
    else:
        hook, threading.excepthook = threading.excepthook, partial(_say_of_thread, verb)
        try:
            _run(verb, arguments, args is None)
        except Exception as error:
            from emf_lightning.cli.parsing.errors import constructor_error, user_message

            line = user_message(error, verb)
            if os.environ.get("EMF_DEBUG"):
                raise
            if line is None and (raised := constructor_error(error)):
                raise raised from raised.__cause__
            if line is None:
                raise
            print(f"emf {verb}: {line}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print(f"emf {verb}: interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            threading.excepthook = hook


def _say_of_thread(verb: str, arguments: threading.ExceptHookArgs) -> None:
    """One line for an error that ended a library's thread, as TensorBoard's writer at a full disk."""
    from emf_lightning.cli.parsing.errors import user_message

    line = user_message(arguments.exc_value, verb) if isinstance(arguments.exc_value, Exception) else None
    if line is None or os.environ.get("EMF_DEBUG"):
        threading.__excepthook__(arguments)
    else:
        print(f"emf {verb}: {line}", file=sys.stderr)


def _run(verb: str, arguments: list[str], alone: bool) -> None:
    from emf_lightning.cli.parsing.experiment_files import expand, with_options
    from emf_lightning.cli.parsing.own_classes import find_own_classes
    from emf_lightning.part_classes import FLAG, trusting

    flag = f"--{FLAG}"
    trust, arguments = verb == "fit" or flag in arguments, [argument for argument in arguments if argument != flag]
    if verb in TRAINER_VERBS or verb in EXPERIMENT_VERBS:
        from emf_lightning.cli.runs import with_run

        arguments = with_run(with_options(arguments))
    arguments = expand(arguments)
    if trust:
        find_own_classes(arguments)
    with trusting(trust):
        _call(verb, arguments, alone)


def _call(verb: str, arguments: list[str], alone: bool) -> None:
    """Imports the verb and runs it; ``alone`` in this process, it may keep all imports from the garbage collector."""
    if verb in TRAINER_VERBS:
        from emf_lightning.cli.trainings import end_with_parent

        end_with_parent()  # before the slow imports
        with without_collection(keep=alone):
            from emf_lightning.cli.parsing.emf_cli import CLASS_PACKAGES, EMFCLI
            from emf_lightning.cli.parsing.nested_help import with_classes

            import_classes(*CLASS_PACKAGES)
        EMFCLI.run(with_classes(arguments))
    elif verb in EXPERIMENT_VERBS:
        _function(verb, alone)(arguments[1:])
    elif verb in FUNCTION_VERBS:
        from emf_lightning.cli.parsing.function_verb import call

        call(_function(verb, alone), arguments)
    else:
        verbs = (*TRAINER_VERBS, *EXPERIMENT_VERBS, *FUNCTION_VERBS)
        near = get_close_matches(verb, verbs, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no such verb; {hint}the verbs are {', '.join(verbs)}")


def _function(verb: str, alone: bool) -> Callable[..., None]:
    with without_collection(keep=alone):
        return getattr(import_module(f"emf_lightning.cli.{verb}"), verb)
