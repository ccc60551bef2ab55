"""`emf completion`: a script by which the shell completes verbs and options."""

from __future__ import annotations

from typing import Literal

from emf_lightning.cli.schema import parser_of
from emf_lightning.cli.verbs import EXPERIMENT_VERBS, FUNCTION_VERBS, OWN_OPTIONS, TRAINER_VERBS

SCRIPT = """\
{head}_emf() {{
  local verb=${{COMP_WORDS[1]}} word=${{COMP_WORDS[COMP_CWORD]}} options=
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
    return
  fi
  case $verb in
{cases}
  esac
  case $word in
    -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}}
complete -o filenames -F _emf emf
"""


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a script by which the shell completes verbs and options; it starts no Python at the TAB key.

    `eval "$(emf completion bash)"` in ~/.bashrc takes seconds at each start of a shell: write it to a file once,
    `emf completion bash > ~/.emf-completion`, and let ~/.bashrc or ~/.zshrc read that: `source ~/.emf-completion`.

    Args:
        shell: bash or zsh.
    """
    verbs = [*TRAINER_VERBS, *EXPERIMENT_VERBS, *FUNCTION_VERBS]
    cases = "\n".join(f"    {verb}) options='{' '.join(_options(verb))}' ;;" for verb in verbs)
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    print(SCRIPT.format(head=head, verbs=" ".join(verbs), cases=cases), end="")


def _options(verb: str) -> list[str]:
    names = [name for action in parser_of(verb)._actions for name in action.option_strings if name.startswith("--")]
    return sorted({*names, *OWN_OPTIONS.get(verb, ())})
