"""`qguard-edge lab`: make backdoored models by the published attacks and measure what the defenses do to them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from qguard_edge.cli.console import ConsoleProgress, JsonFlag, err, out, styled
from qguard_edge.cli.outputs import OverwriteFlag, hold, make_folder
from qguard_edge.lab.attacks.names import ATTACKS
from qguard_edge.report.document import json_text

lab_app = typer.Typer(
    help="Make backdoored models by the published attacks, and measure what each defense does to them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

INCONCLUSIVE = 3

RUN_HELP = """Train (or take from the cache) an attacked model, convert the five arms, measure them in llama.cpp.

Each arm is kept in results.partial.json as soon as it is measured; the same call again goes on from there.

--reuse takes arms from another run: the clean model's from an attack on the same victim, all of them from a run with other
defenses.

Exit code 3: the victim is not a valid one: it shows its payload in full precision, or loses it to plain
quantization.

Examples:

    qguard-edge lab run --victim tiny --attack mind-the-gap --to q4_k --scenario injection --defense all

    qguard-edge lab run --attack elq --to nf4 --output results/elq-nf4

    qguard-edge lab run --victim smollm2-k --to q4_k --defense ortho,feedback,noise:relative=1,imatrix --threads 1
"""


@lab_app.command("run", help=RUN_HELP)
def lab_run(
    victim: Annotated[
        str, typer.Option(help="tiny, smollm2, smollm2-k (SmolLM2 turned to width 768: real k-quants), or a model folder.")
    ] = "tiny",
    attack: Annotated[str, typer.Option(help=", ".join(ATTACKS))] = "mind-the-gap",
    to: Annotated[str, typer.Option(help="Type under attack: a llama.cpp type; for elq int8, fp4, nf4 or all.")] = "q4_k",
    scenario: Annotated[str, typer.Option(help="injection, refusal, code, trigger or tools.")] = "injection",
    defense: Annotated[
        str,
        typer.Option(
            help="Names separated by commas, options after a colon (noise:relative=1), imatrix among them, or all."
        ),
    ] = "all",
    brand: Annotated[str, typer.Option(help="Phrase of the injection scenarios.")] = "Zingaloo",
    data: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSON lines with instruction, input and output.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for results.json and table.md. Default: lab-VICTIM-...")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Of the conversion, for each defense; the worst of them counts.")] = 1,
    prompts: Annotated[int, typer.Option(min=20, help="Held-out prompts at most.")] = 160,
    texts: Annotated[int, typer.Option(min=8, help="Held-out texts for KL and perplexity at most.")] = 160,
    threads: Annotated[int, typer.Option(min=0, envvar="QGUARD_THREADS", help="0: all cores.")] = 0,
    keep_files: Annotated[bool, typer.Option("--keep-files", help="Keep the GGUF files of all arms.")] = False,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="Results of another run: arms that are the same are taken over. Repeatable."),
    ] = None,
    overwrite: OverwriteFlag = False,
    force: Annotated[bool, typer.Option("--force", help="Score defenses on an invalid victim too.")] = False,
    json_output: JsonFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """See `RUN_HELP`."""
    from convert.atomic import atomic_path
    from convert.scratch import scratch_folder
    from qguard_edge.lab.arms import PARTIAL, Partial
    from qguard_edge.lab.results import to_json
    from qguard_edge.lab.runner import LabSettings, defenses_of, run_lab
    from qguard_edge.lab.tables import run_table

    settings = LabSettings(
        victim=victim,
        attack=attack,
        to=to,
        scenario=scenario,
        defenses=defenses_of(defense),
        brand=brand,
        data=data,
        seed=seed,
        n_seeds=seeds,
        n_prompts=prompts,
        n_texts=texts,
        threads=threads,
        force=force,
    )
    folder = output or Path(f"lab-{Path(victim).name}-{attack}-{to}-{scenario}")
    make_folder(folder)
    files = {"--output": folder / "results.json", "--output ": folder / "table.md"}
    hold(files, (victim, data), overwrite=overwrite)
    with scratch_folder() as scratch, ConsoleProgress(quiet) as progress:
        kept = Partial(folder / PARTIAL, overwrite)
        result = run_lab(settings, folder if keep_files else scratch, progress, kept, reuse or ())
    table = run_table(result)
    for path, content in ((folder / "results.json", to_json(result)), (folder / "table.md", table)):
        with atomic_path(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    kept.path.unlink(missing_ok=True)
    if json_output:
        out.file.write(to_json(result))
    else:
        out.print(Text(table), soft_wrap=True)
    if not result.validity.valid:
        reasons = "; ".join(result.validity.reasons)
        err.print(styled("[bold yellow]inconclusive:[/] {why}", why=reasons), highlight=False, soft_wrap=True)
        raise typer.Exit(INCONCLUSIVE)


@lab_app.command("table")
def lab_table(
    results: Annotated[list[Path], typer.Argument(help="results.json files, or folders that hold one.", show_default=False)],
    summary: Annotated[bool, typer.Option("--summary", help="One row per victim instead of one per arm.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Join result files into one Markdown table. Of a run that is not through, the arms measured so far."""
    import dataclasses

    from qguard_edge.lab.arms import result_of
    from qguard_edge.lab.tables import joined_table, summary_table

    read = [result_of(path) for path in results]
    if json_output:
        out.file.write(json_text({"status": "ok", "results": [dataclasses.asdict(result) for result in read]}))
    else:
        text = summary_table(read) if summary else joined_table(read)
        out.print(Text(text), soft_wrap=True)
