"""The command line. Each command is a file of this package, imported when it is called."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import NoReturn

import click

from dist_reg import __version__
from dist_reg.errors import STOPPED, Stopped, UserError, nearest
from dist_reg.launch import failure
from dist_reg.runtime import die_with_launcher, keep_freed_memory, leave

COMMANDS = {
    "train": "Train, evaluate and export what a run file describes.",
    "eval": "Evaluate an exported model or a finished run.",
    "submit": "Submit what a run file describes to SLURM, alone or as an array.",
    "status": "Show how far the runs below a folder are.",
    "report": "Summarise the results of the runs below a folder.",
    "methods": "List the methods, or one method's options.",
    "diagnose": "Show how far noise at one layer moves every layer above.",
    "doctor": "Say what this machine can do and what to install.",
    "demo": "Compare HyPe with plain fine-tuning on a small task, in minutes.",
    "bench": "Measure what a method and its kernels cost.",
}


class Commands(click.Group):
    """A group that imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(import_module(f"dist_reg.cli.{cmd_name}"), "command")  # noqa: B009

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in COMMANDS:
            raise UserError(f"unknown command {args[0]!r}; {nearest(args[0], list(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dist-reg")
def dist_reg() -> None:
    """Fine-tune pretrained transformers with hidden-representation regularisers.

    A run is a YAML file and key=value overrides; under torchrun every command is the same program.
    """


def main() -> NoReturn:
    """Run the command line and end the process: 0, 2 for a user's mistake, 75 when a run was stopped and is saved, 130 when
    interrupted."""
    leave(run_command())


def run_command() -> int:
    """Run what the command line says and return the exit code; a user's mistake is one sentence and 2."""
    die_with_launcher()
    keep_freed_memory()
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    if os.environ.get("RANK", "0") != "0":
        logging.getLogger().setLevel(logging.ERROR)
    try:
        code = dist_reg.main(standalone_mode=False)
    except UserError as error:
        _say_mistake(error, f"error: {error}")
        code = 2
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            _say(str(stop))
        code = STOPPED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = 2
    except click.ClickException as error:
        message = error.format_message()
        _say_mistake(
            error, f"error: {message[0].lower()}{' '.join(message[1:].replace('. Did', '; did').split())}"
        )
        code = 2
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted")
        code = 130
    except Exception as error:
        failure.record(error)
        if not failure.is_reported():
            raise
        code = 1
    return code if isinstance(code, int) else 0


def _say_mistake(error: Exception, sentence: str) -> None:
    failure.record(error, sentence=sentence)
    if not failure.is_reported():
        _say(sentence)


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        click.echo(text, err=True)
    elif "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        # Past the start a mistake may be this rank's alone: its disk, its node's data.
        click.echo(f"rank {rank}: {text}", err=True)
