"""The `lorry` command. What a command needs it imports when it runs, so that help is quick."""

import sys

import typer

from cli import (
    adapters,
    batch,
    jobs,
    keys,
    models,
    output,
    partition,
    schedules,
    services,
    tasks,
    webhook_listen,
    webhooks,
)
from cli.top import top
from core.errors import LorryError, UsageError

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="lorry",
    help="An asynchronous job queue for text generation over many LoRA adapters.",
    epilog="Settings: LORRY_* variables. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(context_settings=services.PASS_THROUGH)(services.up)
app.command()(services.api)
app.command(context_settings=services.PASS_THROUGH)(services.worker)
app.command()(services.steward)
app.command()(services.migrate)
app.command()(top)
app.add_typer(jobs.app, name="jobs")
app.add_typer(batch.app, name="batch")
app.add_typer(schedules.app, name="schedules")
app.add_typer(models.app, name="models")
app.add_typer(adapters.app, name="adapters")
app.add_typer(tasks.app, name="tasks")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(keys.app, name="keys")
adapters.app.command("partition")(partition.partition)
webhooks.app.command("listen")(webhook_listen.listen)


@app.command()
def demo(
    engine: services.Engine = "vllm",
    as_json: output.AsJson = False,
) -> None:
    """Start a stack, send 24 prompts to four models, and show the answers side by side."""
    from cli.demo.run import run

    raise typer.Exit(run(engine=engine, as_json=as_json))


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; every error becomes one line on stderr and an exit code."""
    try:
        code = app(args=arguments or ["--help"], prog_name="lorry", standalone_mode=False)
    except UsageError as error:
        output.error(error.message)
        return USAGE
    except LorryError as error:
        output.error(error.message)
        return FAILED
    except typer.TyperException as error:  # the command line itself: a missing or bad option
        output.error(error.format_message())
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except UnicodeEncodeError as error:  # bytes of an argument that are no text
        odd = ascii(error.object[error.start : error.end])
        output.error(f"{odd} cannot be written in {error.encoding}: give text in UTF-8")
        return USAGE
    except BrokenPipeError:
        sys.stderr.close()  # `lorry jobs list | head`: nobody reads on; say nothing more
        return FAILED
    return code if isinstance(code, int) else DONE


if __name__ == "__main__":
    main()
