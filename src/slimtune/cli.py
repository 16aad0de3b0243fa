"""The command line: one verb per thing a person does. No logic: it reads arguments, calls the package, prints.

Nothing heavy is imported until a verb runs, so `--help` is instant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from slimtune import __version__
from slimtune.errors import SlimtuneError

app = typer.Typer(
    name="slimtune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
INTERRUPTED = 130  # as shells say it: 128 and the number of SIGINT
FREE = {"allow_extra_args": True, "ignore_unknown_options": True}


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def slimtune(
    _: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Make a language model small and fine-tune it, from one recipe."""


def say(text: str) -> None:
    """Progress and messages, on stderr."""
    print(text, file=sys.stderr, flush=True)


@app.command(name="run")
def run_recipe(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. quantize.bits=3")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: runs/<recipe name>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
) -> None:
    """Run all steps of a recipe."""
    from slimtune.recipe.document import read_recipe
    from slimtune.recipe.run import run

    read = read_recipe(recipe, overrides or [])
    run(read, output or Path("runs") / read.name, resume=resume, overwrite=overwrite, say=say)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    memory: Annotated[str, typer.Option("--memory", help="What may be used, e.g. 24GB. Default: what is free.")] = "",
    as_json: Json = False,
) -> None:
    """Print what a recipe will do and what it takes; load no weights."""
    from slimtune.recipe.document import amount, read_recipe, write_recipe
    from slimtune.recipe.plan import plan as make_plan
    from slimtune.recipe.terminal import plan_text

    made = make_plan(read_recipe(recipe, overrides or []), memory=amount(memory, "--memory") if memory else None)
    if as_json:
        print(json.dumps(made.to_dict()))
    else:
        print(write_recipe(made.recipe))
        print(plan_text(made))


def _one_step(verb: str, steps: tuple[str, ...], help: str) -> None:
    @app.command(name=verb, help=help, context_settings=FREE)
    def command(
        context: typer.Context,
        model: Annotated[str, typer.Argument(help="A hub id, a folder, a .gguf file, or a bundled name.")],
        output: Output,
        resume: Annotated[bool, typer.Option("--resume")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
    ) -> None:
        from slimtune.recipe.options import options_of, speaking
        from slimtune.recipe.run import run
        from slimtune.recipe.shell import recipe_of

        options = options_of(verb, steps, context.args)
        with speaking(options):
            recipe = recipe_of(model, steps, context.args, verb)
            run(recipe, output, resume=resume, overwrite=overwrite, say=lambda line: say(options.line(line)))


_one_step(
    "rotate",
    ("rotate",),
    "Rotate a model: the same outputs, activations without outliers. Options are the keys of the recipe's rotate step: "
    "--kind hadamard --online r4 --stream (one block in memory), and --calibration FILE (whose outliers to report), "
    "--dtype, --seed.",
)
_one_step(
    "quantize",
    ("quantize",),
    "Quantize a model. Options are the keys of the recipe's quantize step: --method optq --bits 4 --group-size 64 ... "
    "(`slimtune list quantizers`), and --calibration FILE, --dtype, --seed.",
)
_one_step(
    "prune",
    ("prune",),
    "Remove channels, heads or layers of a model. Options are the keys of the recipe's prune step: --ratio 0.5 "
    "--importance wanda --refit ... (`slimtune list importances`), and --calibration FILE, --dtype, --seed.",
)
_one_step(
    "finetune",
    ("lora", "train"),
    "Fine-tune a model with LoRA. Options are the keys of the recipe's lora and train steps: --train FILE --r 16 "
    "--max-steps 200 --learning-rate 2e-4 ..., and --eval FILE, --dtype, --seed.",
)


@app.command()
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A hub id, a folder, a run, a .gguf file, or a bundled name.")],
    perplexity: Annotated[list[str] | None, typer.Option("--perplexity", help="A text file, or name=file.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", help="lm-eval tasks, files of questions, or lm-eval YAML files.")
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of a window.")] = 512,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of a text to use; -1: all.")] = -1,
    limit: Annotated[int, typer.Option("--limit", help="Items of a task; -1: all.")] = -1,
    num_fewshot: Annotated[int, typer.Option("--num-fewshot", help="Examples before an item of a task.")] = -1,
    speed: Annotated[bool, typer.Option("--speed", help="Measure tokens per second.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Default: the run's, or float32.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A JSON file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, tasks, speed and size of a model."""
    from slimtune.files import require_place, write_json
    from slimtune.recipe.options import speaking, typed
    from slimtune.recipe.shell import evaluate_model

    if output is not None:
        require_place(output)
    with speaking(typed("evaluate", context.params)):
        facts = evaluate_model(
            model,
            perplexity=perplexity or [],
            tasks=tasks or [],
            length=length,
            max_tokens=max_tokens,
            limit=limit,
            num_fewshot=num_fewshot,
            speed=speed,
            dtype=dtype,
            say=(lambda _: None) if as_json else say,
        )
    if output is not None:
        write_json(output, facts)
    if as_json:
        print(json.dumps(facts))


@app.command()
def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A hub id, a folder, a run, a .gguf file, or a bundled name.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What to answer.")],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="A PEFT adapter folder.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 128,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Among the likeliest of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of chance, with a temperature.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="Default: the run's, or float32.")] = "",
) -> None:
    """Answer a prompt, through the model's chat template where it has one."""
    from slimtune.evaluate.generate import Sampling
    from slimtune.recipe.options import speaking, typed
    from slimtune.recipe.shell import generate_text

    with speaking(typed("generate", context.params)):
        pace = generate_text(
            model,
            prompt,
            adapter=adapter,
            max_new_tokens=max_new_tokens,
            raw=raw,
            sampling=Sampling(temperature, top_p, seed),
            dtype=dtype,
            write=lambda t: print(t, end="", flush=True),
        )
    print()
    say(f"read {pace.prompt_tokens} tokens, {pace.prefill_tokens_per_second:.1f} tokens/s")
    say(f"wrote {pace.new_tokens} tokens, {pace.decode_tokens_per_second:.1f} tokens/s")


@app.command()
def export(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, or a model.")],
    format: Annotated[str, typer.Option("--format", help="See `slimtune list exporters`.")],
    output: Output,
    dtype: Annotated[str, typer.Option("--dtype", help="Of dense weights. Default: the run's, or float32.")] = "",
    quantization: Annotated[str, typer.Option("--quantization", help="gguf: f16 (default), q8_0, q4_0, ...")] = "",
    rank: Annotated[int, typer.Option("--rank", help="peft, gguf-lora: cut the adapter to this rank.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Write a model in a format other engines load."""
    from slimtune.recipe.options import speaking, typed
    from slimtune.recipe.shell import export_model

    with speaking(typed("export", context.params)):
        manifest = export_model(
            source, format, output, dtype=dtype, quantization=quantization, rank=rank, overwrite=overwrite
        )
    if "error" in manifest.facts:
        say(f"cut to rank {rank}: {manifest.facts['error']:.2g} of the update is lost")
    say(f"{manifest.path}: {manifest.bytes / 1e6:,.1f} MB, read back and compared")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="An HTML file to write.")] = None,
    as_json: Json = False,
) -> None:
    """Compare runs in one table."""
    from rich.console import Console

    from slimtune.files import require_place
    from slimtune.recipe.report import compare, print_comparison, write_comparison_html, write_html

    if output is not None:
        require_place(output)
    comparison = compare(runs)
    if as_json:
        print(json.dumps(comparison.to_json()))
    else:
        print_comparison(comparison, Console())
    if output is not None:
        write_comparison_html(comparison, output)
    elif len(runs) == 1:
        say(f"report: {write_html(runs[0])}")


@app.command(name="list")
def list_table(
    what: Annotated[str, typer.Argument(help="models, quantizers, inits, importances, families or exporters.")],
    as_json: Json = False,
) -> None:
    """Print what there is to choose from."""
    from slimtune.recipe.terminal import listing, listing_text

    rows = listing(what)
    print(json.dumps({what: rows}) if as_json else listing_text(rows))


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _guarded(command: Callable[[], Any]) -> int:
    try:
        command()
    except SlimtuneError as error:
        say(f"slimtune: {error}")
        return error.exit_status
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as ended:  # how typer ends a command; it takes Ctrl-C for itself
        return _interrupted() if ended.code == INTERRUPTED else int(ended.code or 0)
    return 0


def _interrupted() -> int:
    say("slimtune: interrupted; run, quantize, prune and finetune continue with the same command and --resume")
    return INTERRUPTED


def main() -> NoReturn:
    """The console script: 0 done, 2 the input is wrong, 130 interrupted, 1 anything else (with a traceback)."""
    from slimtune.quiet import quiet_libraries

    quiet_libraries()
    sys.exit(_guarded(lambda: app(standalone_mode=True)))


if __name__ == "__main__":
    main()
