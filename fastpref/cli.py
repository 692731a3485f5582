"""The commands: ``fastpref COMMAND [--config recipe.yaml] [--key value ...]``."""

import dataclasses
import json
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "sft": "supervised fine-tuning on prompts and completions, or on the chosen side of pairs",
    "dpo": "learn from preference pairs against a frozen reference",
    "kto": "learn from single completions labelled good or bad, against a frozen reference",
    "quickstart": "the whole way in miniature: data, SFT, sampled pairs, DPO, reward against KL",
    "tiny": "make a small random model with a tokenizer trained on a data file",
    "report": "draw the HTML page of a run or of several side by side: fastpref report RUN...",
}

# what a command needs beyond the ops' own torch and triton
TRAIN_PACKAGES = {
    *("transformers", "datasets", "jsonargparse", "rich", "yaml", "safetensors"),
    *("matplotlib", "jinja2"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 for input it cannot work with, 2 for no command."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        import fastpref

        print(f"fastpref {fastpref.__version__}")
        return 0
    if args[0].startswith("--local_rank"):  # where a launcher puts it in front
        args = [*args[1:], args[0]]
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        return fail(f"unknown command {command!r}\n\n{usage()}", 2)
    try:
        return report(rest) if command == "report" else run_command(command, rest)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:
        if not is_input_error(error):
            raise
        hint = "; pip install 'fastpref[train]'" if isinstance(error, ModuleNotFoundError) else ""
        return fail(f"{error}{hint}", 1)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    head = "usage: fastpref COMMAND [--config recipe.yaml] [--key value ...]"
    tail = "fastpref COMMAND --help lists the keys of a command."
    return "\n".join([head, "", *lines, "", tail])


def run_command(command: str, args: list[str]) -> int:
    # imported here: the help of the program must not wait for transformers
    from transformers.utils import logging

    from fastpref.models.tiny import TinyConfig, make_tiny
    from fastpref.quickstart import QuickstartConfig, quickstart
    from fastpref.train.config import SFTConfig
    from fastpref.train.console import tell
    from fastpref.train.guard import Stopped
    from fastpref.train.preference_config import DPOConfig, KTOConfig
    from fastpref.train.run import dpo, kto, sft

    commands: dict[str, tuple[type[Any], Callable[[Any], object]]] = {
        "sft": (SFTConfig, sft),
        "dpo": (DPOConfig, dpo),
        "kto": (KTOConfig, kto),
        "quickstart": (QuickstartConfig, quickstart),
        "tiny": (TinyConfig, make_tiny),
    }
    config_class, action = commands[command]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar is enough, and it is ours
    config = parse(command, config_class, args)
    try:
        action(config)
    except Stopped as stop:
        if stop.finished:
            return 0
        again = args if getattr(config, "resume", "auto") == "auto" else [*args, "--resume", "auto"]
        line = shlex.join(["fastpref", command, *again])
        tell(f"fastpref: go on with: {line}")
    return 0


def report(args: list[str]) -> int:
    """Write the page of the runs in ``args`` and print where it lies."""
    from jsonargparse import ArgumentParser

    from fastpref.report.page import write_report

    parser = ArgumentParser(
        prog="fastpref report", description=COMMANDS["report"], exit_on_error=False
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run or a quickstart")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page; by default report.html in the folder of one run, or here for several",
    )
    found = parser.parse_args(args)
    if not found.runs:
        raise UsageError("need fastpref report RUN..., got no RUN")
    runs = [Path(run) for run in found.runs]
    folder = runs[0] if len(runs) == 1 else Path()
    print(write_report(runs, Path(found.output or folder / "report.html")))
    return 0


def parse(command: str, config_class: type[Any], args: list[str]) -> Any:
    """The command's configuration from YAML files and flags, later ones winning."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"fastpref {command}", description=COMMANDS[command], exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file of keys and values")
    parser.add_class_arguments(config_class, None, fail_untyped=False)
    namespace = parser.parse_args(normalise(config_class, args))
    values = {f.name: namespace[f.name] for f in dataclasses.fields(config_class)}
    return config_class(**values)


def normalise(config_class: type[Any], args: list[str]) -> list[str]:
    """Flags as jsonargparse takes them, from flags as recipes and launchers write them.

    ``--flag`` and ``--no_flag`` for booleans, several values for a list, dashes for underscores,
    the names that TRL has for a key of ours; YAML files go through the same check of their keys.
    """
    types = typing.get_type_hints(config_class)
    out: list[str] = []
    for flag, values in flags(args):
        key = flag.replace("-", "_")
        if key in ("help", "h", "print_config"):
            out += [f"--{key}" + (f"={values[0]}" if values else "")]
        elif key == "config":
            for path in values:
                out += ["--config", json.dumps(checked(config_class, read_yaml(path)))]
        else:
            if not values and key.startswith("no_") and key not in types:
                key, values = key.removeprefix("no_"), ["false"]
            value = [parse_scalar(text) for text in values or ["true"]]
            value = value[0] if len(value) == 1 else value
            for name, taken in checked(config_class, {key: value}).items():
                entries = isinstance(taken, dict) and name != key  # of a mapping
                several = "list" in str(types[name]) or name == "lora"
                if len(values) > 1 and not several:
                    raise UsageError(f"need one value for --{flag}, got {' '.join(values)}")
                if entries:
                    for entry, x in taken.items():
                        out.append(f"--{name}.{entry}={x if isinstance(x, str) else json.dumps(x)}")
                    continue
                kinds = types[name], *typing.get_args(types[name])
                if str not in kinds and any(typing.get_origin(kind) is list for kind in kinds):
                    taken = taken if isinstance(taken, list) else [taken]  # a list of one
                if str in kinds and taken == value and not isinstance(taken, list):
                    text = values[0] if values else "true"  # as it was typed, leading zeros and all
                else:
                    text = taken if isinstance(taken, str) else json.dumps(taken)
                out.append(f"--{name}={text}")
    return out


def flags(args: list[str]) -> list[tuple[str, list[str]]]:
    """``--name a b --other=c`` as [(name, [a, b]), (other, [c])]."""
    found: list[tuple[str, list[str]]] = []
    for arg in args:
        if arg in ("-h", "--help"):
            found.append(("help", []))
        elif arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            found.append((name, [value] if equals else []))
        elif not found:
            raise UsageError(f"need --key value, got {arg!r}")
        else:
            found[-1][1].append(arg)
    return found


def parse_scalar(text: str) -> Any:
    """The value that a recipe would hold; text that is no YAML stands for itself."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path) as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: need keys and values, got {type(values).__name__}")
    return values


def checked(config_class: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """The keys that the class takes, under its own names; what has no effect is said."""
    from fastpref.train.config import ConfigError, TrainConfig, check_keys, unknown

    if issubclass(config_class, TrainConfig):
        taken, notes = check_keys(config_class, values)
        for note in notes:
            print(note, file=sys.stderr)
        return taken
    known = {f.name for f in dataclasses.fields(config_class)}
    for key in values:
        if key not in known:
            raise ConfigError(unknown("key", key, known))
    return values


class UsageError(ValueError):
    """A command line that cannot be read."""


def is_input_error(error: Exception) -> bool:
    """Whether the message alone tells the user what to do; anything else shows its trace."""
    if isinstance(error, ModuleNotFoundError) and error.name in TRAIN_PACKAGES:
        return True
    from jsonargparse import ArgumentError

    from fastpref.data.files import DataError
    from fastpref.models.attention import ModelError
    from fastpref.report.read import ReportError
    from fastpref.train.checkpoint import CheckpointError
    from fastpref.train.config import ConfigError
    from fastpref.train.guard import DivergedError

    ours = (UsageError, ConfigError, DataError, ModelError, CheckpointError, DivergedError)
    return isinstance(error, (*ours, ReportError, ArgumentError))


def fail(message: str, code: int) -> int:
    print(f"fastpref: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
